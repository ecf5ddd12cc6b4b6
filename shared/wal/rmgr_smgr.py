"""Relation files: creation and truncation (Postgres `catalog/storage_xlog.h`). For removal see rmgr_xact."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from shared.errors import CorruptedError
from shared.keyspace import Fork
from shared.wal.record import INFO_RMGR_MASK, Rel
from shared.wal.rmgr import DataCursor, unknown_opcode

_CREATE: Final = struct.Struct("<IIIi")
_TRUNCATE: Final = struct.Struct("<IIIIi")


class SmgrOp(IntEnum):
    CREATE = 0x10
    TRUNCATE = 0x20


class TruncateFlag(IntFlag):
    HEAP = 0x01
    VISIBILITY_MAP = 0x02
    FSM = 0x04


@dataclass(frozen=True, slots=True)
class SmgrCreate:
    """The fork exists from here on, with no blocks."""

    rel: Rel
    fork: Fork


@dataclass(frozen=True, slots=True)
class SmgrTruncate:
    """The main fork has `block_count` blocks from here on; `flags` says which forks are cut."""

    rel: Rel
    block_count: int
    flags: TruncateFlag


def parse(info: int, data: bytes) -> SmgrCreate | SmgrTruncate:
    cursor = DataCursor(data, "Storage")
    match info & INFO_RMGR_MASK:
        case SmgrOp.CREATE:
            spc, db, rel, fork = cursor.take(_CREATE)
            cursor.finish()
            if not Fork.MAIN <= fork <= Fork.INIT:
                raise CorruptedError(f"Storage record creates fork {fork}")
            return SmgrCreate((spc, db, rel), Fork(fork))
        case SmgrOp.TRUNCATE:
            block_count, spc, db, rel, flags = cursor.take(_TRUNCATE)
            cursor.finish()
            if flags & ~0x07:
                raise CorruptedError(f"Storage record truncates with flags {flags:#x}")
            return SmgrTruncate((spc, db, rel), block_count, TruncateFlag(flags))
        case _:
            raise unknown_opcode("Storage", info)
