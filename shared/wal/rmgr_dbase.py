"""Databases (Postgres `commands/dbcommands_xlog.h`)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from shared.wal.record import INFO_RMGR_MASK
from shared.wal.rmgr import DataCursor, unknown_opcode

_FILE_COPY: Final = struct.Struct("<IIII")
_WAL_LOG: Final = struct.Struct("<II")
_DROP: Final = struct.Struct("<Ii")


class DbaseOp(IntEnum):
    CREATE_FILE_COPY = 0x00
    CREATE_WAL_LOG = 0x10
    DROP = 0x20


@dataclass(frozen=True, slots=True)
class DatabaseFileCopy:
    """All files of the source, as they are on disk at this record, become the new database. No blocks are logged."""

    database: int
    tablespace: int
    source_database: int
    source_tablespace: int


@dataclass(frozen=True, slots=True)
class DatabaseCreate:
    """The directory exists from here on; relation map and blocks follow as records of their own."""

    database: int
    tablespace: int


@dataclass(frozen=True, slots=True)
class DatabaseDrop:
    """The directories of the database in these tablespaces go."""

    database: int
    tablespaces: tuple[int, ...]


def parse(info: int, data: bytes) -> DatabaseFileCopy | DatabaseCreate | DatabaseDrop:
    cursor = DataCursor(data, "Database")
    match info & INFO_RMGR_MASK:
        case DbaseOp.CREATE_FILE_COPY:
            fields = cursor.take(_FILE_COPY)
            cursor.finish()
            return DatabaseFileCopy(*fields)
        case DbaseOp.CREATE_WAL_LOG:
            fields = cursor.take(_WAL_LOG)
            cursor.finish()
            return DatabaseCreate(*fields)
        case DbaseOp.DROP:
            database, count = cursor.take(_DROP)
            tablespaces = cursor.take_u32s(count)
            cursor.finish()
            return DatabaseDrop(database, tablespaces)
        case _:
            raise unknown_opcode("Database", info)
