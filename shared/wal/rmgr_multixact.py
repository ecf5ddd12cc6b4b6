"""Multixacts: sets of xids that lock one row (Postgres `access/multixact.h`)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from shared.errors import CorruptedError
from shared.wal.record import INFO_RMGR_MASK
from shared.wal.rmgr import DataCursor, unknown_opcode

_PAGE: Final = struct.Struct("<i")
_CREATE: Final = struct.Struct("<IIi")
_MEMBER: Final = struct.Struct("<II")
_TRUNCATE: Final = struct.Struct("<IIIII")
_MAX_STATUS: Final = 5


class MultixactOp(IntEnum):
    ZERO_OFFSETS_PAGE = 0x00
    ZERO_MEMBERS_PAGE = 0x10
    CREATE = 0x20
    TRUNCATE = 0x30


@dataclass(frozen=True, slots=True)
class MultixactZeroPage:
    """A page of pg_multixact/members, or else of pg_multixact/offsets, starts as zeros."""

    of_members: bool
    page_number: int


@dataclass(frozen=True, slots=True)
class MultixactCreate:
    """`multixact_id` is `members` [(xid, MultiXactStatus)], stored from `members_offset` on (which wraps at 2^32)."""

    multixact_id: int
    members_offset: int
    members: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class MultixactTruncate:
    """[start, end) of the offsets (multixact ids) and of the members go; `end_offset` is the oldest id from here on."""

    oldest_database: int
    start_offset: int
    end_offset: int
    start_member: int
    end_member: int


def parse(info: int, data: bytes) -> MultixactZeroPage | MultixactCreate | MultixactTruncate:
    cursor = DataCursor(data, "MultiXact")
    match info & INFO_RMGR_MASK:
        case MultixactOp.ZERO_OFFSETS_PAGE | MultixactOp.ZERO_MEMBERS_PAGE as op:
            (page_number,) = cursor.take(_PAGE)
            cursor.finish()
            return MultixactZeroPage(op == MultixactOp.ZERO_MEMBERS_PAGE, page_number)
        case MultixactOp.CREATE:
            multixact_id, members_offset, count = cursor.take(_CREATE)
            members = tuple((xid, status) for xid, status in cursor.take_rows(_MEMBER, count))
            cursor.finish()
            if any(status > _MAX_STATUS for _, status in members):
                raise CorruptedError("MultiXact record has a member of unknown status")
            return MultixactCreate(multixact_id, members_offset, members)
        case MultixactOp.TRUNCATE:
            fields = cursor.take(_TRUNCATE)
            cursor.finish()
            return MultixactTruncate(*fields)
        case _:
            raise unknown_opcode("MultiXact", info)
