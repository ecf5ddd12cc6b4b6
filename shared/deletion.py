"""What became of a shredded project's data on one node. A core."""

from __future__ import annotations

import enum
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from shared.ids import ProjectId

_PIECE: Final = re.compile(r"[0-9a-f]{16}\.[0-9a-f]{16}\.\S+", re.ASCII)
"""A piece of WAL, at a safekeeper or in the object store."""


class ObjectKind(enum.StrEnum):
    """What an object or a file of a project is, as its name says."""

    LAYER = "layer"
    INDEX = "index"
    WAL = "wal"
    ENVELOPE = "envelope"
    VERIFIER = "verifier"
    """Of a role's password, in the compute manager's database."""
    OTHER = "other"
    """Control files, marks, and whatever nobody knows."""

    @classmethod
    def of(cls, name: str) -> ObjectKind:
        """By the names of docs/formats: never fails, whatever the name is."""
        folders, _, last = name.rpartition("/")
        if last.endswith(".key"):
            return cls.ENVELOPE
        if folders.endswith("/layers"):
            return cls.LAYER
        if folders.endswith("/index"):
            return cls.INDEX
        return cls.WAL if _PIECE.fullmatch(last) else cls.OTHER


@dataclass(frozen=True, slots=True)
class Deleted:
    """Of one kind."""

    objects: int = 0
    """Old versions and markers of deletions included."""
    old_versions: int = 0
    """How many of them those are."""
    size_bytes: int = 0

    def __add__(self, other: Deleted) -> Deleted:
        return Deleted(
            self.objects + other.objects, self.old_versions + other.old_versions, self.size_bytes + other.size_bytes
        )


@dataclass(frozen=True, slots=True)
class Deletion:
    """One look: what was deleted, and what was found left when looking again afterwards."""

    deleted: Mapping[ObjectKind, Deleted] = field(default_factory=dict)
    """Orphans included."""
    left_objects: int = 0
    remains: tuple[str, ...] = ()
    """In words: which objects the store would not delete, and why."""
    not_checked: tuple[str, ...] = ()
    """In words: where nobody could look."""

    @property
    def total(self) -> Deleted:
        return sum(self.deleted.values(), Deleted())

    def __add__(self, other: Deletion) -> Deletion:
        """Of two places."""
        return Deletion(
            counted([*self.deleted.items(), *other.deleted.items()]),
            self.left_objects + other.left_objects,
            self.remains + other.remains,
            self.not_checked + other.not_checked,
        )


def counted(each: Iterable[tuple[ObjectKind, Deleted]]) -> dict[ObjectKind, Deleted]:
    """One sum for each kind."""
    sums: dict[ObjectKind, Deleted] = {}
    for kind, deleted in each:
        sums[kind] = sums.get(kind, Deleted()) + deleted
    return sums


DeleteProject = Callable[[ProjectId], Awaitable[Deletion]]
"""Deletes everything that a node stores of a project, but names. Idempotent. Raises KeylakeError, and is called again
then."""


def plain_text(text: str) -> str:
    """Fit for logs and databases: printable ASCII, not empty, at most 300 characters."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:300]) or "?"
