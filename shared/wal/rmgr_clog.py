"""Commit log pages (Postgres `access/clog.h`). Its bits are set by commit and abort records, see rmgr_xact."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from shared.wal.record import INFO_RMGR_MASK
from shared.wal.rmgr import DataCursor, unknown_opcode

_ZERO_PAGE: Final = struct.Struct("<i")
_TRUNCATE: Final = struct.Struct("<iII")


class ClogOp(IntEnum):
    ZERO_PAGE = 0x00
    TRUNCATE = 0x10


class XidStatus(IntEnum):
    """Two bits per xid, xid 0 of a page in the lowest bits of its first byte."""

    IN_PROGRESS = 0
    COMMITTED = 1
    ABORTED = 2
    SUB_COMMITTED = 3


@dataclass(frozen=True, slots=True)
class ClogZeroPage:
    page_number: int


@dataclass(frozen=True, slots=True)
class ClogTruncate:
    """Segments wholly before `page_number` go; `oldest_xid`/`oldest_xid_database` belong into the checkpoint."""

    page_number: int
    oldest_xid: int
    oldest_xid_database: int


def parse(info: int, data: bytes) -> ClogZeroPage | ClogTruncate:
    cursor = DataCursor(data, "CLOG")
    match info & INFO_RMGR_MASK:
        case ClogOp.ZERO_PAGE:
            (page_number,) = cursor.take(_ZERO_PAGE)
            cursor.finish()
            return ClogZeroPage(page_number)
        case ClogOp.TRUNCATE:
            page_number, oldest_xid, database = cursor.take(_TRUNCATE)
            cursor.finish()
            return ClogTruncate(page_number, oldest_xid, database)
        case _:
            raise unknown_opcode("CLOG", info)
