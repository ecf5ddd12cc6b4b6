"""What hot standbys need to know (Postgres `storage/standbydefs.h`); ingest wants the oldest running xid."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from shared.wal.record import INFO_RMGR_MASK
from shared.wal.rmgr import DataCursor, unknown_opcode

_RUNNING: Final = struct.Struct("<ii?3xIII")
_COUNT: Final = struct.Struct("<i")
_LOCK: Final = struct.Struct("<III")


class StandbyOp(IntEnum):
    LOCK = 0x00
    RUNNING_XACTS = 0x10
    INVALIDATIONS = 0x20


@dataclass(frozen=True, slots=True)
class RunningXacts:
    """`xids`: top-level ones; `subxids` may be incomplete when `subxids_overflowed`. `next_xid` is without epoch."""

    next_xid: int
    oldest_running_xid: int
    latest_completed_xid: int
    xids: tuple[int, ...]
    subxids: tuple[int, ...]
    subxids_overflowed: bool


@dataclass(frozen=True, slots=True)
class StandbyLocks:
    """AccessExclusiveLocks held: (xid, database, relation OID)."""

    locks: tuple[tuple[int, ...], ...]


def parse(info: int, data: bytes) -> RunningXacts | StandbyLocks | None:
    """None for invalidation messages: they concern caches of a running server only."""
    cursor = DataCursor(data, "Standby")
    match info & INFO_RMGR_MASK:
        case StandbyOp.LOCK:
            (count,) = cursor.take(_COUNT)
            locks = cursor.take_rows(_LOCK, count)
            cursor.finish()
            return StandbyLocks(locks)
        case StandbyOp.RUNNING_XACTS:
            count, sub_count, overflowed, next_xid, oldest, latest = cursor.take(_RUNNING)
            xids, subxids = cursor.take_u32s(count), cursor.take_u32s(sub_count)
            cursor.finish()
            return RunningXacts(next_xid, oldest, latest, xids, subxids, overflowed)
        case StandbyOp.INVALIDATIONS:
            return None
        case _:
            raise unknown_opcode("Standby", info)
