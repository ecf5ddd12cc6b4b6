"""Records → pages of WAL; and the shutdown checkpoint that lets an unpatched Postgres start at any LSN.

Why minting works. Postgres that finds `state = DB_SHUTDOWNED` and, where pg_control points, a shutdown checkpoint whose
redo is its own position, starts without recovery and goes on writing behind that record (xlogrecovery.c
InitWalRecovery, FinishWalRecovery). It reads nothing else than that record, the headers of its pages and the first page
header of their segments. The record is the one that crash recovery itself would append at the end of WAL; it is
streamed from `end_lsn` on like any other, so every copy of the log stays byte-identical. Bytes of that page before
`end_lsn` are never streamed, so they may be zeros here.
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass, field
from typing import Final

from shared.errors import InvalidInputError
from shared.lsn import WAL_BLOCK_SIZE_BYTES, WAL_SEGMENT_SIZE_BYTES
from shared.wal.control import CHECKPOINT_SIZE_BYTES, CheckPoint, ControlFile, DbState
from shared.wal.page import (
    WAL_TIMELINE,
    align8,
    build_page_header,
    format_lsn,
    is_record_boundary,
    page_header_size,
    record_start,
    segment_file_name,
)
from shared.wal.reader import RECORD_HEADER, RECORD_HEADER_SIZE_BYTES, RECORD_MAX_SIZE_BYTES, record_crc
from shared.wal.record import DATA_SHORT
from shared.wal.rmgr import RmgrId
from shared.wal.rmgr_xlog import XlogOp

_CRC: Final = struct.Struct("<I")
_CRC_OFFSET: Final = 20


def build_record(*, rmgr_id: int, info: int, prev_lsn: int, xid: int = 0, fragments: bytes = b"") -> bytes:
    """A raw record with its CRC. `fragments`: all that follows XLogRecord, see `shared.wal.record`."""
    total = RECORD_HEADER_SIZE_BYTES + len(fragments)
    if total > RECORD_MAX_SIZE_BYTES:
        raise InvalidInputError(f"WAL record of {total} bytes is longer than Postgres allows")
    unsigned = RECORD_HEADER.pack(total, xid, prev_lsn, info, rmgr_id, 0) + fragments
    return unsigned[:_CRC_OFFSET] + _CRC.pack(record_crc(unsigned)) + fragments


@dataclass(frozen=True, slots=True)
class LaidOutRecord:
    """A record in its place. `data` are the WAL bytes [from the `end_lsn` given, `end_lsn`), page headers included."""

    record_lsn: int
    end_lsn: int
    data: bytes = field(repr=False)


def lay_out_record(record: bytes, end_lsn: int, system_identifier: int) -> LaidOutRecord:
    """Put `record` behind the one that ends at `end_lsn`, across as many pages as it takes.

    Raises InvalidInputError when no record can start there.
    """
    if not is_record_boundary(end_lsn):
        raise InvalidInputError(f"no WAL record can start at {format_lsn(end_lsn)}")
    out = bytearray()
    position = end_lsn
    written = 0
    while written < len(record):
        if position % WAL_BLOCK_SIZE_BYTES == 0:
            header = build_page_header(position, system_identifier, len(record) - written if written else 0)
            out += header
            position += len(header)
        room = WAL_BLOCK_SIZE_BYTES - position % WAL_BLOCK_SIZE_BYTES
        piece = record[written : written + room]
        out += piece
        written += len(piece)
        position += len(piece)
    padding = align8(position) - position
    out += bytes(padding)
    return LaidOutRecord(record_start(end_lsn), position + padding, bytes(out))


@dataclass(frozen=True, slots=True)
class MintedStart:
    """What to put into a PGDATA so that Postgres starts from `checkpoint_lsn` and writes on from `end_lsn`.

    `control` is the content of global/pg_control, to be written last; `segments` maps names in pg_wal to contents of
    WAL_SEGMENT_SIZE_BYTES; `streamed` are the WAL bytes that Postgres will send for the range from the end of the old
    log to `end_lsn`.
    """

    checkpoint_lsn: int
    end_lsn: int
    control: bytes = field(repr=False)
    segments: dict[str, bytes] = field(repr=False)
    streamed: bytes = field(repr=False)


def mint_shutdown_checkpoint(
    control: bytes, checkpoint: CheckPoint, last_record_start: int, end_lsn: int
) -> MintedStart:
    """Mint a CHECKPOINT_SHUTDOWN behind the log that ends at `end_lsn`; its last record starts at `last_record_start`.

    `control`: a pg_control of this database system, from whenever. `checkpoint`: the state of the database at
    `end_lsn`; its redo, timelines and oldest active xid are replaced by what a shutdown checkpoint has. Its time
    becomes the "shut down at" time.
    Raises CorruptedError for `control`, InvalidInputError for positions that no log has.
    """
    old = ControlFile.parse(control)
    if not is_record_boundary(end_lsn):
        raise InvalidInputError(f"no WAL record can start at {format_lsn(end_lsn)}")
    if not 0 < last_record_start <= end_lsn - RECORD_HEADER_SIZE_BYTES:
        raise InvalidInputError(
            f"no WAL record from {format_lsn(last_record_start)} can be the last one before {format_lsn(end_lsn)}"
        )
    checkpoint = dataclasses.replace(
        checkpoint,
        redo=record_start(end_lsn),
        this_timeline=WAL_TIMELINE,
        prev_timeline=WAL_TIMELINE,
        oldest_active_xid=0,
    )
    record = build_record(
        rmgr_id=RmgrId.XLOG,
        info=XlogOp.CHECKPOINT_SHUTDOWN,
        prev_lsn=last_record_start,
        fragments=bytes((DATA_SHORT, CHECKPOINT_SIZE_BYTES)) + checkpoint.serialize(),
    )
    placed = lay_out_record(record, end_lsn, old.system_identifier)
    new = dataclasses.replace(
        old,
        state=DbState.SHUTDOWNED,
        time_s=checkpoint.time_s,
        checkpoint_lsn=placed.record_lsn,
        checkpoint=checkpoint,
        min_recovery_lsn=0,
        min_recovery_timeline=0,
        backup_start_lsn=0,
        backup_end_lsn=0,
        backup_end_required=False,
    )
    return MintedStart(
        checkpoint_lsn=placed.record_lsn,
        end_lsn=placed.end_lsn,
        control=new.serialize(),
        segments=build_segments(placed.data, end_lsn, old.system_identifier),
        streamed=placed.data,
    )


def build_segments(data: bytes, start_lsn: int, system_identifier: int) -> dict[str, bytes]:
    """Segment files that hold the WAL bytes `data` from `start_lsn` on, and zeros elsewhere.

    The first page of the first segment, and the page that `start_lsn` lies in, get plain headers: readers check them.
    """
    segments: dict[str, bytes] = {}
    end = start_lsn + len(data)
    segment_lsn = start_lsn - start_lsn % WAL_SEGMENT_SIZE_BYTES
    while segment_lsn < end:
        content = bytearray(WAL_SEGMENT_SIZE_BYTES)
        page_of_start = start_lsn - start_lsn % WAL_BLOCK_SIZE_BYTES
        for page in {segment_lsn, page_of_start}:
            if segment_lsn <= page < start_lsn:
                header = build_page_header(page, system_identifier)
                content[page - segment_lsn : page - segment_lsn + page_header_size(page)] = header
        first, last = max(segment_lsn, start_lsn), min(segment_lsn + WAL_SEGMENT_SIZE_BYTES, end)
        content[first - segment_lsn : last - segment_lsn] = data[first - start_lsn : last - start_lsn]
        segments[segment_file_name(segment_lsn)] = bytes(content)
        segment_lsn += WAL_SEGMENT_SIZE_BYTES
    return segments
