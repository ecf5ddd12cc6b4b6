"""Relation maps: which file a mapped catalog is in (Postgres `utils/relmapper.h`, relmapper.c RelMapFile)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

import google_crc32c

from shared.errors import CorruptedError
from shared.wal.record import INFO_RMGR_MASK
from shared.wal.rmgr import DataCursor, unknown_opcode

RELMAP_FILE_SIZE_BYTES: Final = 524
"""magic, count, 64 mappings of 8 bytes, CRC-32C of what stands before it."""

RELMAP_FILE_MAGIC: Final = 0x592717
UPDATE: Final = 0x00

_HEAD: Final = struct.Struct("<IIi")
_U32: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class RelmapUpdate:
    """`content` is the whole new pg_filenode.map of `database` (0: the shared one, in `global/`)."""

    database: int
    tablespace: int
    content: bytes = field(repr=False)


def parse(info: int, data: bytes) -> RelmapUpdate:
    """Also checks the magic and the CRC of the map itself."""
    if info & INFO_RMGR_MASK != UPDATE:
        raise unknown_opcode("RelMap", info)
    cursor = DataCursor(data, "RelMap")
    database, tablespace, size = cursor.take(_HEAD)
    content = cursor.take_bytes(size)
    cursor.finish()
    if size != RELMAP_FILE_SIZE_BYTES or _U32.unpack_from(content)[0] != RELMAP_FILE_MAGIC:
        raise CorruptedError(f"RelMap record holds a map of {size} bytes that is none")
    if google_crc32c.value(content[:-4]) != _U32.unpack_from(content, size - 4)[0]:
        raise CorruptedError("RelMap record holds a map with a wrong CRC")
    return RelmapUpdate(database, tablespace, content)
