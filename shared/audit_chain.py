"""The audit chain: what a record is, how it is hashed, how a chain is verified.

`record_hash` = SHA-256 over the canonical encoding of everything else in the record, `previous_hash` included; the
first record's `previous_hash` is 32 zero bytes. So no record can be altered, removed, inserted or moved without every
later hash changing, and whoever kept one later hash (a receipt does) can tell.

Canonical encoding, version 1 (big-endian)::

    size | field
    -----+---------------------------------------------------------------
    18   | "keylake/v1/audit\\0" and the version, 1
    32   | previous_hash
    8    | sequence, from 1, without gaps
    8    | at: microseconds since 1970-01-01 UTC
    …    | actor, action, outcome, project_id ("" if none): each u32 length, UTF-8
    4    | number of details, n
    …    | n details, sorted by name (bytewise): each name and value, as above

Lengths make it injective. A record holds ids, counts, verdicts and durations; never key material, user data or tokens.
Renewals are not recorded: a lease's grant and its end say the same, and there are thousands of them per minute.

The keymanager, which writes the chain, and whoever verifies an exported one without it (`shared.audit_export`) use this
one implementation. This file is a core: no I/O and no clock.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from shared.ids import ProjectId

HASH_SIZE_BYTES: Final = 32
GENESIS_HASH: Final = bytes(HASH_SIZE_BYTES)
_LABEL: Final = b"keylake/v1/audit\0\x01"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_U32: Final = struct.Struct(">I")
_SEQUENCE_AND_TIME: Final = struct.Struct(">Qq")


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Something that happened, before it has a place in the chain."""

    actor: str
    action: str
    outcome: str
    project_id: ProjectId | None = None
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChainHead:
    """The last record of a chain."""

    sequence: int = 0
    record_hash: bytes = GENESIS_HASH


@dataclass(frozen=True, slots=True)
class Link:
    """An entry at its place in the chain."""

    sequence: int
    at: datetime
    entry: AuditEntry
    previous_hash: bytes
    record_hash: bytes

    @property
    def head(self) -> ChainHead:
        return ChainHead(self.sequence, self.record_hash)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return _U32.pack(len(encoded)) + encoded


def encode(sequence: int, at: datetime, entry: AuditEntry, previous_hash: bytes) -> bytes:
    """The canonical bytes that are hashed. Raises ValueError for a naive time."""
    if at.tzinfo is None:
        raise ValueError("audit times have a time zone")
    project = "" if entry.project_id is None else str(entry.project_id)
    details = sorted((name.encode(), name, value) for name, value in entry.details.items())
    parts = [_LABEL, previous_hash, _SEQUENCE_AND_TIME.pack(sequence, (at - _EPOCH) // _MICROSECOND)]
    parts += [_text(entry.actor), _text(entry.action), _text(entry.outcome), _text(project), _U32.pack(len(details))]
    parts += [_text(name) + _text(value) for _, name, value in details]
    return b"".join(parts)


def append(head: ChainHead, at: datetime, entries: Iterable[AuditEntry]) -> list[Link]:
    """The links that follow `head`, in order."""
    links: list[Link] = []
    for entry in entries:
        sequence = head.sequence + 1
        record_hash = hashlib.sha256(encode(sequence, at, entry, head.record_hash)).digest()
        links.append(Link(sequence, at, entry, head.record_hash, record_hash))
        head = links[-1].head
    return links


class ChainVerifier:
    """Walks a chain, link by link, and stops at the first problem."""

    def __init__(self, start: ChainHead | None = None) -> None:
        """`start`: the record that the first one fed must follow; none: it must be record 1."""
        self.head = start or ChainHead()
        self.problem: str | None = None

    def feed(self, link: Link) -> bool:
        """False when the chain is broken here; `problem` then says where and how."""
        if self.problem is None:
            self.problem = self._problem_of(link)
        if self.problem is None:
            self.head = link.head
        return self.problem is None

    def finish(self, head: ChainHead) -> None:
        """Compare with the head that was kept apart: records cut off at the end leave a chain that looks whole."""
        if self.problem is not None:
            return
        if self.head.sequence != head.sequence:
            self.problem = f"the chain ends at record {self.head.sequence}, but its head is record {head.sequence}"
        elif not hmac.compare_digest(self.head.record_hash, head.record_hash):
            self.problem = f"record {head.sequence} is not the record that the head names"

    def _problem_of(self, link: Link) -> str | None:
        expected = self.head.sequence + 1
        if link.sequence != expected:
            return f"record {expected} is missing: record {link.sequence} follows record {self.head.sequence}"
        if not hmac.compare_digest(link.previous_hash, self.head.record_hash):
            return f"record {expected} does not follow record {self.head.sequence}: its previous hash is another one"
        computed = hashlib.sha256(encode(link.sequence, link.at, link.entry, link.previous_hash)).digest()
        if not hmac.compare_digest(computed, link.record_hash):
            return f"record {expected} was altered: its hash does not fit its contents"
        return None
