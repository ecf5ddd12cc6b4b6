"""What became of a shredded project's data on one node. A core."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from shared.ids import ProjectId


@dataclass(frozen=True, slots=True)
class Deletion:
    """One look: what was deleted, and what was found left when looking again afterwards."""

    deleted_objects: int = 0
    """Old versions and orphans included."""
    deleted_size_bytes: int = 0
    left_objects: int = 0
    remains: tuple[str, ...] = ()
    """In words: which objects the store would not delete, and why."""
    not_checked: tuple[str, ...] = ()
    """In words: where nobody could look."""

    def __add__(self, other: Deletion) -> Deletion:
        """Of two places."""
        return Deletion(
            self.deleted_objects + other.deleted_objects,
            self.deleted_size_bytes + other.deleted_size_bytes,
            self.left_objects + other.left_objects,
            self.remains + other.remains,
            self.not_checked + other.not_checked,
        )


DeleteProject = Callable[[ProjectId], Awaitable[Deletion]]
"""Deletes everything that a node stores of a project. Idempotent. Raises KeylakeError, and is called again then."""


def plain_text(text: str) -> str:
    """Fit for logs and databases: printable ASCII, not empty, at most 300 characters."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:300]) or "?"
