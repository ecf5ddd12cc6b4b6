"""The end of transactions (Postgres `access/xact.h`, xactdesc.c; state files of prepared ones: twophase.c)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Final

import google_crc32c

from shared.errors import CorruptedError
from shared.wal.record import INFO_RMGR_MASK, Rel
from shared.wal.rmgr import DataCursor, unknown_opcode

TWOPHASE_MAGIC: Final = 0x57F94534
TWOPHASE_HEADER_SIZE_BYTES: Final = 72
GID_SIZE_BYTES: Final = 200
"""GIDSIZE: longest gid with its NUL."""

_OPCODE_MASK: Final = 0x70
_HAS_INFO: Final = 0x80
_TIME: Final = struct.Struct("<q")
_U32: Final = struct.Struct("<I")
_COUNT: Final = struct.Struct("<i")
_DATABASE: Final = struct.Struct("<II")
_STATS_ITEM: Final = struct.Struct("<iII")
_INVALIDATION_SIZE_BYTES: Final = 16
_ORIGIN: Final = struct.Struct("<Qq")
_ASSIGNMENT: Final = struct.Struct("<Ii")
# magic, total_len, xid, database, prepared_at, owner, six counts, initfileinval, gidlen, origin_lsn, origin_timestamp
_PREPARE: Final = struct.Struct("<IIIIqIiiiiii?xHQq")


class XactOp(IntEnum):
    COMMIT = 0x00
    PREPARE = 0x10
    ABORT = 0x20
    COMMIT_PREPARED = 0x30
    ABORT_PREPARED = 0x40
    ASSIGNMENT = 0x50
    INVALIDATIONS = 0x60


_COMMITS: Final = frozenset({XactOp.COMMIT, XactOp.COMMIT_PREPARED})
_ENDS_OF_PREPARED: Final = frozenset({XactOp.COMMIT_PREPARED, XactOp.ABORT_PREPARED})


class XactInfo(IntFlag):
    """XACT_XINFO_* and XACT_COMPLETION_*."""

    HAS_DATABASE = 1 << 0
    HAS_SUBXACTS = 1 << 1
    HAS_RELS = 1 << 2
    HAS_INVALIDATIONS = 1 << 3
    HAS_TWOPHASE = 1 << 4
    HAS_ORIGIN = 1 << 5
    HAS_EXCLUSIVE_LOCKS = 1 << 6
    HAS_GID = 1 << 7
    HAS_DROPPED_STATS = 1 << 8
    APPLY_FEEDBACK = 1 << 29
    UPDATE_RELCACHE_FILE = 1 << 30
    FORCE_SYNC_COMMIT = 1 << 31


_KNOWN_INFO: Final = sum(XactInfo)
# As plain integers: an operation on an IntFlag costs more than the rest of a commit record.
_HAS_DATABASE: Final = int(XactInfo.HAS_DATABASE)
_HAS_SUBXACTS: Final = int(XactInfo.HAS_SUBXACTS)
_HAS_RELS: Final = int(XactInfo.HAS_RELS)
_HAS_INVALIDATIONS: Final = int(XactInfo.HAS_INVALIDATIONS)
_HAS_TWOPHASE: Final = int(XactInfo.HAS_TWOPHASE)
_HAS_GID: Final = int(XactInfo.HAS_GID)
_HAS_STATS: Final = int(XactInfo.HAS_DROPPED_STATS)
HAS_ORIGIN: Final = int(XactInfo.HAS_ORIGIN)


@dataclass(frozen=True, slots=True)
class XactEnd:
    """COMMIT, ABORT and their PREPARED forms.

    `xid` with all `subxids` becomes committed or aborted; all forks of `dropped_rels` are unlinked; `was_prepared`: the
    state file of `xid` goes. Times are TimestampTz (microseconds since 2000-01-01 UTC).
    """

    committed: bool
    was_prepared: bool
    xid: int
    """0 for a transaction that only sends invalidations, and has nothing in the commit log."""
    time_us: int
    info: int
    """XactInfo bits."""
    database: int
    tablespace: int
    subxids: tuple[int, ...]
    dropped_rels: tuple[Rel, ...]
    dropped_stats: tuple[tuple[int, ...], ...]
    """(kind, database, object OID)."""
    invalidations: bytes
    """SharedInvalidationMessage, 16 bytes each."""
    gid: bytes = field(repr=False)
    origin_lsn: int
    origin_time_us: int


@dataclass(frozen=True, slots=True)
class XactPrepare:
    """PREPARE TRANSACTION. The record's main data is the state file, all but the CRC: see `twophase_file`."""

    xid: int
    database: int
    owner: int
    prepared_at_us: int
    gid: bytes = field(repr=False)
    subxids: tuple[int, ...]
    commit_rels: tuple[Rel, ...]
    """Dropped if it commits."""
    abort_rels: tuple[Rel, ...]
    """Dropped if it aborts."""
    origin_lsn: int
    origin_time_us: int


@dataclass(frozen=True, slots=True)
class XactAssignment:
    """These subtransactions belong to `top_xid`."""

    top_xid: int
    subxids: tuple[int, ...]


def parse(info: int, xid: int, data: bytes) -> XactEnd | XactPrepare | XactAssignment | None:
    """`xid` is the one in the record's header. None for invalidation messages inside a transaction."""
    match info & _OPCODE_MASK:
        case XactOp.COMMIT | XactOp.COMMIT_PREPARED | XactOp.ABORT | XactOp.ABORT_PREPARED as op:
            return _parse_end(XactOp(op), info, xid, DataCursor(data, "Transaction"))
        case XactOp.PREPARE:
            return _parse_prepare(data)
        case XactOp.ASSIGNMENT:
            cursor = DataCursor(data, "Transaction")
            top_xid, count = cursor.take(_ASSIGNMENT)
            subxids = cursor.take_u32s(count)
            cursor.finish()
            return XactAssignment(top_xid, subxids)
        case XactOp.INVALIDATIONS:
            return None
        case _:
            raise unknown_opcode("Transaction", info & INFO_RMGR_MASK)


def _parse_end(op: XactOp, info: int, xid: int, cursor: DataCursor) -> XactEnd:
    committed = op in _COMMITS
    was_prepared = op in _ENDS_OF_PREPARED
    (time_us,) = cursor.take(_TIME)
    xinfo: int = cursor.take(_U32)[0] if info & _HAS_INFO else 0
    if xinfo & ~_KNOWN_INFO:
        raise CorruptedError(f"Transaction record has unknown flags {xinfo:#x}")
    if was_prepared is not bool(xinfo & _HAS_TWOPHASE):
        raise CorruptedError(f"Transaction record {op.name} has flags {xinfo:#x}")
    database, tablespace = cursor.take(_DATABASE) if xinfo & _HAS_DATABASE else (0, 0)
    subxids = cursor.take_u32s(*cursor.take(_COUNT)) if xinfo & _HAS_SUBXACTS else ()
    dropped_rels = cursor.take_rels(*cursor.take(_COUNT)) if xinfo & _HAS_RELS else ()
    dropped_stats = cursor.take_rows(_STATS_ITEM, *cursor.take(_COUNT)) if xinfo & _HAS_STATS else ()
    invalidations = b""
    if xinfo & _HAS_INVALIDATIONS:
        if not committed:
            raise CorruptedError("Transaction record aborts with invalidations")
        (count,) = cursor.take(_COUNT)
        invalidations = cursor.take_bytes(count * _INVALIDATION_SIZE_BYTES)
    gid = b""
    if was_prepared:
        (xid,) = cursor.take(_U32)
        if xinfo & _HAS_GID:
            gid = cursor.take_cstring()
    origin_lsn, origin_time_us = cursor.take(_ORIGIN) if xinfo & HAS_ORIGIN else (0, 0)
    cursor.finish()
    return XactEnd(
        committed=committed,
        was_prepared=was_prepared,
        xid=xid,
        time_us=time_us,
        info=xinfo,
        database=database,
        tablespace=tablespace,
        subxids=subxids,
        dropped_rels=dropped_rels,
        dropped_stats=dropped_stats,
        invalidations=invalidations,
        gid=gid,
        origin_lsn=origin_lsn,
        origin_time_us=origin_time_us,
    )


def _parse_prepare(data: bytes) -> XactPrepare:
    cursor = DataCursor(data, "Transaction")
    magic, total, xid, database, prepared_at, owner, *counts, _, gid_size, origin_lsn, origin_time = cursor.take(
        _PREPARE
    )
    subxact_count, commit_count, abort_count, commit_stats, abort_stats, invalidations = counts
    if magic != TWOPHASE_MAGIC or total != len(data) + _U32.size:
        raise CorruptedError(f"Transaction record prepares with magic {magic:#x} and length {total}")
    # From here on each array starts aligned; what follows them are the records of two-phase resource managers.
    gid = cursor.take_bytes(gid_size)
    if not gid.endswith(b"\0") or len(gid) > GID_SIZE_BYTES:
        raise CorruptedError("Transaction record prepares with a malformed gid")
    cursor.align8()
    subxids = cursor.take_u32s(subxact_count)
    cursor.align8()
    commit_rels = cursor.take_rels(commit_count)
    cursor.align8()
    abort_rels = cursor.take_rels(abort_count)
    cursor.align8()
    for count, size_bytes in (
        (commit_stats, _STATS_ITEM.size),
        (abort_stats, _STATS_ITEM.size),
        (invalidations, _INVALIDATION_SIZE_BYTES),
    ):
        cursor.take_bytes(count * size_bytes)
        cursor.align8()
    return XactPrepare(
        xid=xid,
        database=database,
        owner=owner,
        prepared_at_us=prepared_at,
        gid=gid[:-1],
        subxids=subxids,
        commit_rels=commit_rels,
        abort_rels=abort_rels,
        origin_lsn=origin_lsn,
        origin_time_us=origin_time,
    )


def twophase_file_name(xid: int) -> str:
    """Name in pg_twophase."""
    return f"{xid:08X}"


def twophase_file(main_data: bytes) -> bytes:
    """Content of the state file of a prepared transaction: the main data of its PREPARE record, and a CRC-32C."""
    return main_data + _U32.pack(google_crc32c.value(main_data))
