"""The end of a layer file's plaintext: where its index lies. The same for delta and image layers.

Format version 1, little-endian, 56 bytes, at the very end::

    offset | size | field
    -------+------+------------------------------------
    0      | 4    | magic: "KLDL" delta, "KLIL" image
    4      | 2    | format version, 1
    6      | 2    | reserved, zero
    8      | 8    | number of keys
    16     | 8    | number of values
    24     | 8    | offset of the index
    32     | 8    | lsn_start
    40     | 8    | lsn_end
    48     | 8    | reserved, zero

The index lies between its offset and the footer. Everything before it is payload.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from typing import Final

from pageserver.layer.name import LayerKind
from shared.errors import CorruptedError

FORMAT_VERSION: Final = 1
_LAYOUT: Final = struct.Struct("<4sHHQQQQQQ")
FOOTER_SIZE_BYTES: Final = _LAYOUT.size
_MAGICS: Final = {LayerKind.DELTA: b"KLDL", LayerKind.IMAGE: b"KLIL"}
_KINDS: Final = {magic: kind for kind, magic in _MAGICS.items()}

if sys.byteorder != "little":  # memoryview.cast and array read columns in the machine's own order
    raise ImportError("layer files are read in place, on little-endian machines only")


@dataclass(frozen=True, slots=True)
class Footer:
    kind: LayerKind
    keys: int
    values: int
    index_offset: int
    lsn_start: int
    lsn_end: int

    def serialize(self) -> bytes:
        return _LAYOUT.pack(
            _MAGICS[self.kind],
            FORMAT_VERSION,
            0,
            self.keys,
            self.values,
            self.index_offset,
            self.lsn_start,
            self.lsn_end,
            0,
        )

    def index_range(self, plaintext_size_bytes: int) -> tuple[int, int]:
        """Half-open byte range of the index in the plaintext."""
        return self.index_offset, plaintext_size_bytes - FOOTER_SIZE_BYTES

    @classmethod
    def parse(cls, data: bytes | memoryview, plaintext_size_bytes: int) -> Footer:
        """`data`: the last FOOTER_SIZE_BYTES of a plaintext of that size. Raises CorruptedError."""
        if len(data) != FOOTER_SIZE_BYTES:
            raise CorruptedError("a layer is shorter than its footer")
        magic, version, reserved, keys, values, index_offset, lsn_start, lsn_end, reserved2 = _LAYOUT.unpack(data)
        kind = _KINDS.get(magic)
        if kind is None:
            raise CorruptedError("not a layer: wrong magic")
        if version != FORMAT_VERSION or reserved or reserved2:
            raise CorruptedError(f"layer format version {version} is not supported")
        if (
            index_offset > plaintext_size_bytes - FOOTER_SIZE_BYTES
            or (keys == 0 and kind is LayerKind.DELTA)  # an image may say: nothing exists here
            or values < keys
            or lsn_start >= lsn_end
        ):
            raise CorruptedError("a layer's footer is impossible")
        return cls(kind, keys, values, index_offset, lsn_start, lsn_end)
