"""The log's own records (Postgres `catalog/pg_control.h` XLOG_*, `access/xlog_internal.h`)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from shared.errors import CorruptedError
from shared.wal.control import CHECKPOINT_SIZE_BYTES, CheckPoint
from shared.wal.record import INFO_RMGR_MASK
from shared.wal.rmgr import DataCursor, unknown_opcode

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_PARAMETERS: Final = struct.Struct("<iiiiii??2x")
_END_OF_RECOVERY: Final = struct.Struct("<qII")
_RESTORE_POINT: Final = struct.Struct("<q64s")
_OVERWRITE: Final = struct.Struct("<Qq")


class XlogOp(IntEnum):
    CHECKPOINT_SHUTDOWN = 0x00
    CHECKPOINT_ONLINE = 0x10
    NOOP = 0x20
    NEXT_OID = 0x30
    SWITCH = 0x40
    BACKUP_END = 0x50
    PARAMETER_CHANGE = 0x60
    RESTORE_POINT = 0x70
    FPW_CHANGE = 0x80
    END_OF_RECOVERY = 0x90
    FPI_FOR_HINT = 0xA0
    FPI = 0xB0
    OVERWRITE_CONTRECORD = 0xD0


@dataclass(frozen=True, slots=True)
class XlogCheckpoint:
    is_shutdown: bool
    checkpoint: CheckPoint


@dataclass(frozen=True, slots=True)
class NextOid:
    """OIDs below this may be in use."""

    next_oid: int


@dataclass(frozen=True, slots=True)
class ParameterChange:
    """Settings that pg_control keeps."""

    max_connections: int
    max_worker_processes: int
    max_wal_senders: int
    max_prepared_transactions: int
    max_locks_per_transaction: int
    wal_level: int
    wal_log_hints: bool
    track_commit_timestamp: bool


@dataclass(frozen=True, slots=True)
class FullPageWritesChange:
    full_page_writes: bool


@dataclass(frozen=True, slots=True)
class PageImages:
    """XLOG_FPI, XLOG_FPI_FOR_HINT: all there is to it are the images of its blocks."""

    for_hint: bool


@dataclass(frozen=True, slots=True)
class Switch:
    """The rest of the segment is unused."""


@dataclass(frozen=True, slots=True)
class BackupEnd:
    start_lsn: int


@dataclass(frozen=True, slots=True)
class RestorePoint:
    """`time_us` is a TimestampTz: microseconds since 2000-01-01 UTC."""

    time_us: int
    name: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class EndOfRecovery:
    time_us: int
    this_timeline: int
    prev_timeline: int


@dataclass(frozen=True, slots=True)
class OverwriteContrecord:
    """The record that began at `overwritten_lsn` was given up after a crash."""

    overwritten_lsn: int
    time_us: int


XlogRecord = (
    XlogCheckpoint
    | NextOid
    | ParameterChange
    | FullPageWritesChange
    | PageImages
    | Switch
    | BackupEnd
    | RestorePoint
    | EndOfRecovery
    | OverwriteContrecord
)


def parse(info: int, data: bytes) -> XlogRecord | None:
    """None for NOOP, whose data is padding."""
    cursor = DataCursor(data, "XLOG")
    result: XlogRecord
    match info & INFO_RMGR_MASK:
        case XlogOp.CHECKPOINT_SHUTDOWN | XlogOp.CHECKPOINT_ONLINE as op:
            checkpoint = CheckPoint.parse(cursor.take_bytes(CHECKPOINT_SIZE_BYTES))
            result = XlogCheckpoint(op == XlogOp.CHECKPOINT_SHUTDOWN, checkpoint)
        case XlogOp.NOOP:
            return None
        case XlogOp.NEXT_OID:
            result = NextOid(*cursor.take(_U32))
        case XlogOp.SWITCH:
            result = Switch()
        case XlogOp.BACKUP_END:
            result = BackupEnd(*cursor.take(_U64))
        case XlogOp.PARAMETER_CHANGE:
            result = ParameterChange(*cursor.take(_PARAMETERS))
        case XlogOp.RESTORE_POINT:
            time_us, name = cursor.take(_RESTORE_POINT)
            result = RestorePoint(time_us, name.partition(b"\0")[0])
        case XlogOp.FPW_CHANGE:
            (flag,) = cursor.take_bytes(1)
            if flag > 1:
                raise CorruptedError(f"XLOG record sets full_page_writes to {flag}")
            result = FullPageWritesChange(flag == 1)
        case XlogOp.END_OF_RECOVERY:
            result = EndOfRecovery(*cursor.take(_END_OF_RECOVERY))
        case XlogOp.FPI_FOR_HINT | XlogOp.FPI as op:
            result = PageImages(op == XlogOp.FPI_FOR_HINT)
        case XlogOp.OVERWRITE_CONTRECORD:
            result = OverwriteContrecord(*cursor.take(_OVERWRITE))
        case _:
            raise unknown_opcode("XLOG", info)
    cursor.finish()
    return result
