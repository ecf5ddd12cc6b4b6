"""WAL page headers and segment names (Postgres `access/xlog_internal.h`, XLogPageHeaderData).

| offset | size | field                                                        |
|--------|------|--------------------------------------------------------------|
| 0      | 2    | xlp_magic, 0xD113 in PostgreSQL 16                           |
| 2      | 2    | xlp_info, flags below                                        |
| 4      | 4    | xlp_tli                                                      |
| 8      | 8    | xlp_pageaddr, LSN of the page's first byte                   |
| 16     | 4    | xlp_rem_len, bytes of the record begun on an earlier page    |
| 20     | 4    | padding                                                      |
| 24     | 8    | xlp_sysid            | only on the first page of a segment   |
| 32     | 4    | xlp_seg_size         | (XLP_LONG_HEADER)                     |
| 36     | 4    | xlp_xlog_blcksz      |                                       |
"""

from __future__ import annotations

import struct
from typing import Final

from shared.errors import CorruptedError
from shared.lsn import WAL_BLOCK_SIZE_BYTES, WAL_SEGMENT_SIZE_BYTES

PAGE_MAGIC: Final = 0xD113
SHORT_HEADER_SIZE_BYTES: Final = 24
LONG_HEADER_SIZE_BYTES: Final = 40
WAL_TIMELINE: Final = 1
"""The only WAL timeline: nothing here is ever promoted, so terms (ours) tell histories apart, not Postgres's TLI."""

FIRST_IS_CONTRECORD: Final = 0x0001
LONG_HEADER: Final = 0x0002
BACKUP_REMOVABLE: Final = 0x0004
FIRST_IS_OVERWRITE_CONTRECORD: Final = 0x0008
ALL_FLAGS: Final = 0x000F

_SHORT = struct.Struct("<HHIQI4x")
_LONG_TAIL = struct.Struct("<QII")
_SEGMENTS_PER_LOG_ID = (1 << 32) // WAL_SEGMENT_SIZE_BYTES


def format_lsn(lsn: int) -> str:
    """Postgres's `%X/%X`, for messages."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def align8(lsn: int) -> int:
    """MAXALIGN: records start at multiples of 8 bytes."""
    return (lsn + 7) & ~7


def page_header_size(page_lsn: int) -> int:
    """Size in bytes of the header of the page that starts at `page_lsn`."""
    return LONG_HEADER_SIZE_BYTES if page_lsn % WAL_SEGMENT_SIZE_BYTES == 0 else SHORT_HEADER_SIZE_BYTES


def record_start(end_lsn: int) -> int:
    """Where the record after `end_lsn` (an EndRecPtr) starts: behind the header of a page that starts there."""
    return end_lsn + page_header_size(end_lsn) if end_lsn % WAL_BLOCK_SIZE_BYTES == 0 else end_lsn


def is_record_boundary(lsn: int) -> bool:
    """Can a record end, and the next one start, at `lsn`? At page starts and at aligned positions behind a header."""
    offset = lsn % WAL_BLOCK_SIZE_BYTES
    return lsn % 8 == 0 and (offset == 0 or offset >= page_header_size(lsn - offset))


def boundary_of(lsn: int) -> int:
    """Where a log can begin that holds what a log up to `lsn` holds.

    Up to the next multiple of 8, as Neon does (`Lsn::align`): a record's end is one. And back over a page header:
    no record ends inside of one.
    """
    aligned = align8(lsn)
    return aligned if is_record_boundary(aligned) else aligned - aligned % WAL_BLOCK_SIZE_BYTES


def segment_file_name(lsn: int) -> str:
    """Name in pg_wal of the segment that holds the byte at `lsn` (XLogFileName), on timeline 1."""
    log_id, segment = divmod(lsn // WAL_SEGMENT_SIZE_BYTES, _SEGMENTS_PER_LOG_ID)
    return f"{WAL_TIMELINE:08X}{log_id:08X}{segment:08X}"


def build_page_header(page_lsn: int, system_identifier: int, remaining_bytes: int = 0, flags: int = 0) -> bytes:
    """Header of the page at `page_lsn`. `remaining_bytes` > 0: the page begins with the rest of an earlier record.

    `flags`: BACKUP_REMOVABLE or FIRST_IS_OVERWRITE_CONTRECORD; the other two follow from the arguments.
    """
    if remaining_bytes:
        flags |= FIRST_IS_CONTRECORD
    if page_lsn % WAL_SEGMENT_SIZE_BYTES:
        return _SHORT.pack(PAGE_MAGIC, flags, WAL_TIMELINE, page_lsn, remaining_bytes)
    return _SHORT.pack(PAGE_MAGIC, flags | LONG_HEADER, WAL_TIMELINE, page_lsn, remaining_bytes) + _LONG_TAIL.pack(
        system_identifier, WAL_SEGMENT_SIZE_BYTES, WAL_BLOCK_SIZE_BYTES
    )


def parse_page_header(data: bytes, offset: int, page_lsn: int, system_identifier: int | None = None) -> tuple[int, int]:
    """Check the header at `data[offset:]` of the page that must start at `page_lsn`; answer (flags, remaining_bytes).

    The checks are those of XLogReaderValidatePageHeader, with the timeline pinned to 1. `system_identifier` is compared
    on segment starts unless it is None.
    Raises CorruptedError.
    """
    size = page_header_size(page_lsn)
    if offset < 0 or len(data) - offset < size:
        raise CorruptedError(f"WAL page header at {format_lsn(page_lsn)} is cut off")
    magic, flags, timeline, address, remaining_bytes = _SHORT.unpack_from(data, offset)
    if magic != PAGE_MAGIC:
        raise CorruptedError(f"WAL page at {format_lsn(page_lsn)} has magic {magic:#06x}, not {PAGE_MAGIC:#06x}")
    if address != page_lsn:
        raise CorruptedError(
            f"WAL page at {format_lsn(page_lsn)} carries the address {format_lsn(address)} of another page"
        )
    if timeline != WAL_TIMELINE:
        raise CorruptedError(f"WAL page at {format_lsn(page_lsn)} is of timeline {timeline}, not {WAL_TIMELINE}")
    if flags & ~ALL_FLAGS or bool(flags & LONG_HEADER) != (size == LONG_HEADER_SIZE_BYTES):
        raise CorruptedError(f"WAL page at {format_lsn(page_lsn)} has impossible flags {flags:#06x}")
    if flags & LONG_HEADER:
        found_identifier, segment_size, block_size = _LONG_TAIL.unpack_from(data, offset + SHORT_HEADER_SIZE_BYTES)
        if segment_size != WAL_SEGMENT_SIZE_BYTES or block_size != WAL_BLOCK_SIZE_BYTES:
            raise CorruptedError(
                f"WAL segment at {format_lsn(page_lsn)} has segments of {segment_size} and blocks of {block_size} bytes"
            )
        if system_identifier is not None and found_identifier != system_identifier:
            raise CorruptedError(f"WAL segment at {format_lsn(page_lsn)} is of another database system")
    return flags, remaining_bytes
