"""The byte stream of WAL → raw records. The hot path of ingest, so it is written flat.

Theory of operation. The stream is cut into pages, each with a header; records follow each other at 8-byte boundaries
and run on across page headers. `feed` walks the new bytes once and is, at each byte, in one of four situations:

    skipping   before `_skip_to`: bytes of no record (alignment padding, the rest of a segment after XLOG_SWITCH, or
               the tail of a record that began before we did)
    page       at a page start: check the header; while a record is open, its `xlp_rem_len` must be what is missing
    open       a record has begun and has not ended: collect its pieces
    record     at a record start: the fast loop takes every record that lies whole within this page and this chunk

Between two calls it keeps less than 40 bytes (a cut header) or the pieces of one open record. Which positions are
handed out follows `XLogDecodeNextRecord` (xlogreader.c): a record's end is its aligned end, so that a record which
fills its page ends *at* the page boundary, before the next page's header; XLOG_SWITCH ends at the end of its segment.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

import google_crc32c

from shared.errors import CorruptedError, InvalidInputError
from shared.lsn import WAL_BLOCK_SIZE_BYTES, WAL_SEGMENT_SIZE_BYTES
from shared.wal.page import (
    FIRST_IS_CONTRECORD,
    FIRST_IS_OVERWRITE_CONTRECORD,
    align8,
    format_lsn,
    is_record_boundary,
    page_header_size,
    parse_page_header,
)

RECORD_HEADER: Final = struct.Struct("<IIQBB2xI")
"""xl_tot_len, xl_xid, xl_prev, xl_info, xl_rmid, (padding), xl_crc."""
RECORD_HEADER_SIZE_BYTES: Final = RECORD_HEADER.size

RECORD_MAX_SIZE_BYTES: Final = 1020 * 1024 * 1024
"""XLogRecordMaxSize."""

_WHOLE_RECORD: Final = struct.Struct("<I4xQHxxI")
"""The same, of what the fast loop looks at: xl_tot_len, xl_prev, xl_info and above it xl_rmid, xl_crc."""
_CRC_OFFSET: Final = 20
_MAGIC_SIZE_BYTES: Final = 2
_TOTAL_LENGTH: Final = struct.Struct("<I")

RawRecord = tuple[int, int, bytes]
"""(start_lsn, end_lsn, record): the record's bytes without page headers; `end_lsn` as in the module's docstring."""


def record_crc(record: bytes) -> int:
    """CRC-32C as in ValidXLogRecord: the body first, then the header up to xl_crc."""
    crc: int = google_crc32c.value(record[RECORD_HEADER_SIZE_BYTES:] + record[:_CRC_OFFSET])
    return crc


class WalStreamDecoder:
    """Turns contiguous WAL bytes in chunks of any size into records, and refuses everything that is not WAL.

    `next_lsn`           where the next chunk must start
    `end_lsn`            end of the last complete record (before the first one: where it will start looking)
    `last_record_start`  start of the last complete record, None before the first unless given

    After a CorruptedError from the bytes themselves the decoder is dead: it stays at the last good record and raises
    again on every further chunk. (A chunk for the wrong position leaves it alive.)
    """

    __slots__ = (
        "_carry",
        "_failure",
        "_max_record_size_bytes",
        "_missing_bytes",
        "_open_start",
        "_pieces",
        "_skip_to",
        "_synchronising",
        "_system_identifier",
        "end_lsn",
        "last_record_start",
        "next_lsn",
    )

    def __init__(
        self,
        start_lsn: int,
        *,
        system_identifier: int | None = None,
        last_record_start: int | None = None,
        synchronise: bool = False,
        max_record_size_bytes: int = RECORD_MAX_SIZE_BYTES,
    ) -> None:
        """`start_lsn` is a record boundary, or any position at all with `synchronise`: then records are handed out from
        the first one that starts on a page whose header was seen, and whatever lies before it is skipped.

        `last_record_start`: start of the record that ends at `start_lsn`, to check the first record's xl_prev against.
        Raises InvalidInputError when `start_lsn` cannot be a record boundary and `synchronise` is not set.
        """
        if not synchronise and not is_record_boundary(start_lsn):
            raise InvalidInputError(f"no WAL record can start at {format_lsn(start_lsn)}")
        self.next_lsn = start_lsn
        self.end_lsn = start_lsn
        self.last_record_start = last_record_start
        self._system_identifier = system_identifier
        self._max_record_size_bytes = max_record_size_bytes
        self._synchronising = synchronise
        # To the next page header; that is the one at `start_lsn`, when it is a page start itself.
        self._skip_to = -(-start_lsn // WAL_BLOCK_SIZE_BYTES) * WAL_BLOCK_SIZE_BYTES if synchronise else start_lsn
        self._carry = b""
        self._open_start = -1
        self._pieces: list[bytes] = []
        self._missing_bytes = 0
        self._failure: str | None = None

    def restarted(self) -> WalStreamDecoder:
        """A decoder that goes on at the end of the last complete record, for a stream whose bytes behind it changed."""
        return WalStreamDecoder(
            self.end_lsn,
            system_identifier=self._system_identifier,
            last_record_start=self.last_record_start,
            max_record_size_bytes=self._max_record_size_bytes,
        )

    def feed(self, lsn: int, data: bytes) -> list[RawRecord]:
        """Take the bytes [lsn, lsn + len(data)) and return the records that they complete, in order.

        Zero bytes where a record or page should start are WAL that is not written yet: they are not taken, and
        `next_lsn` stays at their start, so the caller sees `next_lsn < lsn + len(data)` and feeds from there again.
        Raises CorruptedError: a gap or overlap; a header, length, xl_prev or CRC that is wrong. Records of this very
        chunk before the bad one are then lost to the caller, though counted in `end_lsn`.
        """
        if self._failure is not None:
            raise CorruptedError(self._failure)
        if lsn != self.next_lsn:
            raise CorruptedError(f"WAL chunk starts at {format_lsn(lsn)}, expected {format_lsn(self.next_lsn)}")
        self.next_lsn = lsn + len(data)
        if self._carry:
            data = self._carry + data
            lsn -= len(self._carry)
            self._carry = b""
        # From here an index into data and its LSN are equal modulo 8, which makes aligning an index cheap.
        pos = lsn & 7
        if pos:
            data = bytes(pos) + data
        base = lsn - pos
        size = len(data)
        records: list[RawRecord] = []

        while pos < size:
            here = base + pos
            if here < self._skip_to:
                pos = min(size, self._skip_to - base)
                continue
            in_page = here % WAL_BLOCK_SIZE_BYTES
            if in_page == 0:
                header_size = page_header_size(here)
                header = data[pos : pos + header_size]
                if len(header) >= _MAGIC_SIZE_BYTES and not any(header):
                    self.next_lsn = here
                    break
                if len(header) < header_size:
                    self._carry = header
                    break
                self._enter_page(data, pos, here, header_size)
                pos += header_size
                continue
            page_end = pos + WAL_BLOCK_SIZE_BYTES - in_page
            limit = page_end if page_end < size else size
            if self._missing_bytes:
                taken = data[pos : min(limit, pos + self._missing_bytes)]
                self._pieces.append(taken)
                self._missing_bytes -= len(taken)
                pos += len(taken)
                if not self._missing_bytes:
                    self._close_record(base + pos, records)
                continue

            pos = self._take_whole_records(data, pos, limit, base, records)
            if pos >= size or base + pos < self._skip_to or pos == page_end:
                continue
            # Records and pages are aligned, so at least the length of a record lies on its first page.
            header = data[pos : min(limit, pos + RECORD_HEADER_SIZE_BYTES)]
            total = _TOTAL_LENGTH.unpack_from(header)[0] if len(header) >= _TOTAL_LENGTH.size else None
            if total == 0:
                if any(header):
                    self._fail(f"WAL record at {format_lsn(base + pos)} has length 0")
                self.next_lsn = base + pos
                break
            if total is None or (len(header) < RECORD_HEADER_SIZE_BYTES and limit < page_end):
                self._carry = header
                break
            pos = self._open_record(data, pos, limit, base, total)
            if not self._missing_bytes:
                self._close_record(base + pos, records)
        return records

    def _take_whole_records(self, data: bytes, pos: int, limit: int, base: int, records: list[RawRecord]) -> int:
        """Take the records that lie whole in data[pos:limit], one page's part; answer where the next one starts.

        Stops early, without judging, at anything else than the next record of a chain: `_open_record` looks again.
        """
        unpack_header = _WHOLE_RECORD.unpack_from
        crc32c = google_crc32c.value
        append = records.append
        # No record starts at -1, so without a known predecessor the first record goes the slow way.
        last = -1 if self.last_record_start is None else self.last_record_start
        lsn = base + pos
        last_whole = limit - RECORD_HEADER_SIZE_BYTES
        while pos <= last_whole:
            total, prev, operation, crc = unpack_header(data, pos)
            end = pos + total
            if end > limit or prev != last or total < RECORD_HEADER_SIZE_BYTES:
                break
            record = data[pos:end]
            # One call on a joined copy is faster than two calls (160 against 200 ns for a record of 100 bytes).
            if crc32c(record[24:] + record[:20]) != crc:
                break
            pos = (end + 7) & -8
            last, lsn = lsn, base + pos
            if operation < 0x100 and operation & 0xF0 == 0x40:  # XLOG_SWITCH, of RM_XLOG_ID
                self.last_record_start = last
                self._end_record(lsn, is_switch=True)
                append((last, self.end_lsn, record))
                return pos
            append((last, lsn, record))
        if last >= 0 and last != self.last_record_start:
            self.last_record_start = last
            self._end_record(base + pos, is_switch=False)
        return pos

    def _enter_page(self, data: bytes, pos: int, page_lsn: int, header_size: int) -> None:
        try:
            flags, remaining_bytes = parse_page_header(data, pos, page_lsn, self._system_identifier)
        except CorruptedError as error:
            self._fail(str(error))
        if self._synchronising:
            # As XLogFindNextRecord: the tail of an earlier record may fill pages.
            tail = align8(remaining_bytes) if flags & FIRST_IS_CONTRECORD else 0
            room = WAL_BLOCK_SIZE_BYTES - header_size
            self._skip_to = page_lsn + header_size + min(tail, room)
            self.end_lsn = self._skip_to if tail else page_lsn
            self._synchronising = tail >= room
        elif flags & FIRST_IS_OVERWRITE_CONTRECORD:
            # After a crash inside a record Postgres gives that record up and starts anew on this page.
            self._drop_open_record()
            self.end_lsn = page_lsn
        elif self._missing_bytes:
            if not flags & FIRST_IS_CONTRECORD or remaining_bytes != self._missing_bytes:
                self._fail(
                    f"WAL page at {format_lsn(page_lsn)} continues a record by {remaining_bytes} bytes, but"
                    f" {self._missing_bytes} are missing of the one at {format_lsn(self._open_start)}"
                )
        elif flags & FIRST_IS_CONTRECORD:
            self._fail(f"WAL page at {format_lsn(page_lsn)} continues a record that never began")

    def _open_record(self, data: bytes, pos: int, limit: int, base: int, total: int) -> int:
        """Begin the record of `total` bytes at data[pos:limit]; answer the position behind what there is of it.

        Also the slow way of a record that is whole already: the fast loop judges nothing.
        """
        start = base + pos
        if not RECORD_HEADER_SIZE_BYTES <= total <= self._max_record_size_bytes:
            self._fail(f"WAL record at {format_lsn(start)} has the absurd length {total}")
        end = min(limit, pos + total)
        self._open_start = start
        self._pieces = [data[pos:end]]
        self._missing_bytes = total - (end - pos)
        return end

    def _close_record(self, end: int, records: list[RawRecord]) -> None:
        record = b"".join(self._pieces)
        start = self._open_start
        self._drop_open_record()
        _total, _xid, prev, info, rmid, crc = RECORD_HEADER.unpack_from(record)
        if prev >= start if self.last_record_start is None else prev != self.last_record_start:
            self._fail(f"WAL record at {format_lsn(start)} does not follow its predecessor: xl_prev {format_lsn(prev)}")
        if record_crc(record) != crc:
            self._fail(f"WAL record at {format_lsn(start)} has a wrong CRC")
        self.last_record_start = start
        self._end_record(align8(end), is_switch=rmid == 0 and info & 0xF0 == 0x40)
        records.append((start, self.end_lsn, record))

    def _end_record(self, end: int, *, is_switch: bool) -> None:
        if is_switch:
            end = -(-end // WAL_SEGMENT_SIZE_BYTES) * WAL_SEGMENT_SIZE_BYTES
        self.end_lsn = end
        self._skip_to = end

    def _drop_open_record(self) -> None:
        self._open_start = -1
        self._pieces = []
        self._missing_bytes = 0

    def _fail(self, message: str) -> NoReturn:
        self._failure = message
        raise CorruptedError(message)


@dataclass(frozen=True, slots=True)
class EndOfWal:
    """Where the last complete record starts and ends.

    `last_record_start` is None when no record is complete; `end_lsn` then is merely where the first one would start.
    `end_lsn` can lie behind the last byte there is, when that was cut inside the alignment padding of a record (up to 7
    bytes) or in the rest of a segment after XLOG_SWITCH: who continues the log there fills the difference with zeros.
    """

    last_record_start: int | None
    end_lsn: int


def find_end_of_wal(
    read: Callable[[int, int], bytes],
    start_lsn: int,
    *,
    system_identifier: int | None = None,
    last_record_start: int | None = None,
    synchronise: bool = False,
    chunk_size_bytes: int = 1 << 20,
) -> EndOfWal:
    """Follow the records from `start_lsn` up to the last one that is complete.

    `read(lsn, size_bytes)` answers up to `size_bytes` bytes from `lsn`, none at the end. The other arguments are those
    of WalStreamDecoder. A record that is cut off, or zeros, end the log.
    Raises CorruptedError for bytes that are neither: a wrong CRC is damage, not an end, and cutting there could throw
    away what was acknowledged.
    """
    decoder = WalStreamDecoder(
        start_lsn,
        system_identifier=system_identifier,
        last_record_start=last_record_start,
        synchronise=synchronise,
    )
    while chunk := read(decoder.next_lsn, chunk_size_bytes):
        expected = decoder.next_lsn + len(chunk)
        decoder.feed(decoder.next_lsn, chunk)
        if decoder.next_lsn < expected:
            break
    return EndOfWal(decoder.last_record_start, decoder.end_lsn)
