"""Tablespaces (Postgres `commands/tablespace.h`). Projects have only the two of initdb, so ingest refuses these."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from shared.wal.record import INFO_RMGR_MASK
from shared.wal.rmgr import DataCursor, unknown_opcode

_OID: Final = struct.Struct("<I")


class TblspcOp(IntEnum):
    CREATE = 0x00
    DROP = 0x10


@dataclass(frozen=True, slots=True)
class TablespaceCreate:
    """`path` is the location that the user named."""

    tablespace: int
    path: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class TablespaceDrop:
    tablespace: int


def parse(info: int, data: bytes) -> TablespaceCreate | TablespaceDrop:
    cursor = DataCursor(data, "Tablespace")
    match info & INFO_RMGR_MASK:
        case TblspcOp.CREATE:
            (tablespace,) = cursor.take(_OID)
            path = cursor.take_cstring()
            cursor.finish()
            return TablespaceCreate(tablespace, path)
        case TblspcOp.DROP:
            (tablespace,) = cursor.take(_OID)
            cursor.finish()
            return TablespaceDrop(tablespace)
        case _:
            raise unknown_opcode("Tablespace", info)
