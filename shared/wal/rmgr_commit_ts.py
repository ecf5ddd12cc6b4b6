"""Commit timestamp pages (Postgres `access/commit_ts.h`). Their entries are set by commit records, see rmgr_xact."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from shared.wal.record import INFO_RMGR_MASK
from shared.wal.rmgr import DataCursor, unknown_opcode

_ZERO_PAGE: Final = struct.Struct("<i")
_TRUNCATE: Final = struct.Struct("<iI")


class CommitTsOp(IntEnum):
    ZERO_PAGE = 0x00
    TRUNCATE = 0x10


@dataclass(frozen=True, slots=True)
class CommitTsZeroPage:
    page_number: int


@dataclass(frozen=True, slots=True)
class CommitTsTruncate:
    """Segments wholly before `page_number` go; nothing older than `oldest_xid` is known from here on."""

    page_number: int
    oldest_xid: int


def parse(info: int, data: bytes) -> CommitTsZeroPage | CommitTsTruncate:
    cursor = DataCursor(data, "CommitTs")
    match info & INFO_RMGR_MASK:
        case CommitTsOp.ZERO_PAGE:
            (page_number,) = cursor.take(_ZERO_PAGE)
            cursor.finish()
            return CommitTsZeroPage(page_number)
        case CommitTsOp.TRUNCATE:
            page_number, oldest_xid = cursor.take(_TRUNCATE)
            cursor.finish()
            return CommitTsTruncate(page_number, oldest_xid)
        case _:
            raise unknown_opcode("CommitTs", info)
