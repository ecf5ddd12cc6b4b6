"""What a layer is: its kind, which keys and LSNs it covers, and what it is called.

A layer's name is the last part of its object's key::

    delta-<lsn_start>-<lsn_end>-<generation>-<unique>      image-<lsn>-<generation>-<unique>

with 16 hexadecimal digits for each of them. `unique` is random, so two pageservers, or one before and after a crash,
never write the same object twice: layers are put once and then only deleted. `generation` says which life of which
writer made it (remote_timeline.py). Unlike Neon's, the name says nothing about keys: a name is visible to whoever runs
the object store, and relfilenumbers are not theirs to know. Key ranges stand in the sealed index.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final

from shared.errors import CorruptedError
from shared.keyspace import KEY_SIZE_BYTES, KeyRange

_NAME: Final = re.compile(
    r"(?:delta-([0-9A-F]{16})-([0-9A-F]{16})|image-([0-9A-F]{16}))-([0-9a-f]{16})-[0-9a-f]{16}", re.ASCII
)
_MAX_LSN: Final = (1 << 64) - 1


class LayerKind(enum.StrEnum):
    DELTA = "delta"
    """Values in an LSN range."""
    IMAGE = "image"
    """Every key of the key range that exists at one LSN, with its whole value."""

    @property
    def object_kind(self) -> str:
        """What DEK and AAD call such an object (`ObjectName.kind`), with the format's version."""
        return f"{self.value}-layer/1"


@dataclass(frozen=True, slots=True)
class LayerDescriptor:
    """One layer as the index lists it. `key_range` is half-open and so are LSNs: [lsn_start, lsn_end).

    An image at L covers [L, L + 1) and holds the state *as of* L, that is, after every value at or below L.
    """

    name: str
    kind: LayerKind
    key_range: KeyRange
    lsn_start: int
    lsn_end: int
    size_bytes: int
    """Of the sealed object."""
    level: int = 0
    """0: as a flush or an import made it. 1: made by compaction (pageserver/compaction.py)."""

    def __post_init__(self) -> None:
        """Raises CorruptedError for a descriptor that no layer has."""
        if (self.kind, self.lsn_start, self.lsn_end) != parse_layer_name(self.name):
            raise CorruptedError("a layer's name contradicts its description")
        keys = self.key_range
        if len(keys.start) != KEY_SIZE_BYTES or len(keys.end) != KEY_SIZE_BYTES or keys.start >= keys.end:
            raise CorruptedError("a layer has an impossible key range")
        if self.size_bytes <= 0:
            raise CorruptedError("a layer has an impossible size")
        if self.level not in (0, 1):
            raise CorruptedError("a layer has an impossible level")

    @property
    def last_lsn(self) -> int:
        """The newest LSN that it may hold a value of, or the LSN of an image."""
        return self.lsn_end - 1

    @property
    def generation(self) -> int:
        return parse_generation(self.name)


def layer_name(kind: LayerKind, lsn_start: int, lsn_end: int, generation: int, unique: str) -> str:
    """`unique`: 16 random hexadecimal digits."""
    lsns = f"{lsn_start:016X}-{lsn_end:016X}" if kind is LayerKind.DELTA else f"{lsn_start:016X}"
    return f"{kind.value}-{lsns}-{generation:016x}-{unique}"


def parse_layer_name(name: str) -> tuple[LayerKind, int, int]:
    """(kind, lsn_start, lsn_end). Raises CorruptedError."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise CorruptedError("not the name of a layer")
    delta_start, delta_end, image, _ = match.groups()
    if image is not None:
        lsn = int(image, 16)
        kind, start, end = LayerKind.IMAGE, lsn, lsn + 1
    else:
        kind, start, end = LayerKind.DELTA, int(delta_start, 16), int(delta_end, 16)
    if not start < end <= _MAX_LSN:
        raise CorruptedError("a layer has an impossible LSN range")
    return kind, start, end


def parse_generation(name: str) -> int:
    """Raises CorruptedError."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise CorruptedError("not the name of a layer")
    return int(match[4], 16)


def covering_range(first_key: bytes, last_key: bytes) -> KeyRange:
    """The smallest half-open range with both keys in it."""
    return KeyRange(first_key, (int.from_bytes(last_key, "big") + 1).to_bytes(KEY_SIZE_BYTES, "big"))
