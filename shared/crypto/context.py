"""What a ciphertext belongs to, as bytes that go into the AAD of every seal and wrap.

Canonical encoding, version 1 (big-endian)::

    offset | size | field
    -------+------+------------------------------------------
    0      | 2    | number of pairs, n
    2      | …    | n pairs, sorted by name (bytewise), each:
           | 2    |   length of name
           | …    |   name, UTF-8
           | 2    |   length of value
           | …    |   value, UTF-8

Length prefixes make it injective: no two contexts share an encoding. The same pairs are the encryption context of AWS
KMS, so they stand in the customer's CloudTrail: nothing secret and no user text goes in. (The AWS Encryption SDK
serialises its context the same way: "Message header AAD".)
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from shared.ids import AccountId, ProjectId, TimelineId, WorkspaceId

MAX_ENCODED_SIZE_BYTES: Final = 4096
_U16 = struct.Struct(">H")


@functools.lru_cache(maxsize=1024)
def _encode(name: str, value: str) -> bytes:
    """One pair. Cached: all but an object's name recur in every context of a project."""
    raw_name, raw_value = name.encode(), value.encode()
    return b"".join((_U16.pack(len(raw_name)), raw_name, _U16.pack(len(raw_value)), raw_value))


@dataclass(frozen=True, slots=True)
class EncryptionContext:
    """Immutable name → value pairs. `with_pairs` extends it; a name is never given twice."""

    pairs: Mapping[str, str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", MappingProxyType(dict(self.pairs)))
        for name in self.pairs:
            if not name:
                raise ValueError("an encryption context name is empty")

    def with_pairs(self, **pairs: str) -> EncryptionContext:
        doubled = self.pairs.keys() & pairs.keys()
        if doubled:
            raise ValueError(f"encryption context already has {sorted(doubled)}")
        return EncryptionContext({**self.pairs, **pairs})

    def to_aad(self) -> bytes:
        """Canonical bytes, at most 4096. Raises ValueError when longer."""
        pairs = self.pairs
        # Code points sort as their UTF-8 does.
        encoded = _U16.pack(len(pairs)) + b"".join([_encode(name, pairs[name]) for name in sorted(pairs)])
        if len(encoded) > MAX_ENCODED_SIZE_BYTES:
            raise ValueError(f"encryption context is {len(encoded)} bytes, more than {MAX_ENCODED_SIZE_BYTES}")
        return encoded


@dataclass(frozen=True, slots=True)
class KeyScope:
    """Whose data a KEK protects. Services learn it from their lease; it is bound into everything they seal."""

    account_id: AccountId
    workspace_id: WorkspaceId
    project_id: ProjectId

    def context(self) -> EncryptionContext:
        return EncryptionContext(
            {
                "keylake:account": str(self.account_id),
                "keylake:workspace": str(self.workspace_id),
                "keylake:project": str(self.project_id),
            }
        )

    def object_context(self, timeline_id: TimelineId, object_name: str, kind: str) -> EncryptionContext:
        """Context of one sealed object. `kind` says what it is and which format version, e.g. `wal-piece/1`."""
        return self.context().with_pairs(
            **{"keylake:timeline": str(timeline_id), "keylake:object": object_name, "keylake:kind": kind}
        )
