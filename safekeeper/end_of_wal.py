"""Where the last complete record of a log ends: there the next term begins.

Decoding from the timeline's start would take longer with every day, so it starts at the beginning of the segment that
holds the end of the log, or one further back when that has no record that begins and ends in it; a boundary that was
found once is where the next search starts. Decoding runs in the executor, a chunk at a time, between reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Final, NamedTuple

from shared.errors import UnavailableError
from shared.lsn import WAL_SEGMENT_SIZE_BYTES
from shared.wal.reader import WalStreamDecoder

_CHUNK_SIZE_BYTES: Final = 256 * 1024

Read = Callable[[int, int], Awaitable[bytes]]


class RecordBoundary(NamedTuple):
    last_record_lsn: int
    """0: there is no record, the log is empty or holds only a part of its first one."""
    end_lsn: int
    """Can lie behind the last byte of the log: Postgres leaves zeros between (alignment, XLOG_SWITCH)."""


async def find_last_record(
    read: Read,
    start_lsn: int,
    flush_lsn: int,
    system_identifier: int,
    known: RecordBoundary | None,
    executor: Executor,
    *,
    oldest_lsn: int = 0,
) -> RecordBoundary:
    """The last complete record of the log [start_lsn, flush_lsn), where `start_lsn` is a record boundary. What can be
    read of it begins at `oldest_lsn`.

    `known`: a boundary of this very log, found earlier. `read(lsn, size)` answers at least one byte before flush_lsn.
    Raises CorruptedError when the log is not WAL.
    """
    if flush_lsn <= start_lsn:
        return RecordBoundary(0, start_lsn)
    if known is not None and known.last_record_lsn and known.end_lsn <= flush_lsn:
        decoder = WalStreamDecoder(
            known.end_lsn, system_identifier=system_identifier, last_record_start=known.last_record_lsn
        )
        return await _decode(read, decoder, flush_lsn, executor)
    segment_lsn = (flush_lsn - 1) // WAL_SEGMENT_SIZE_BYTES * WAL_SEGMENT_SIZE_BYTES
    while segment_lsn > max(start_lsn, oldest_lsn):
        decoder = WalStreamDecoder(segment_lsn, system_identifier=system_identifier, synchronise=True)
        found = await _decode(read, decoder, flush_lsn, executor)
        if found.last_record_lsn:
            return found
        segment_lsn -= WAL_SEGMENT_SIZE_BYTES
    if oldest_lsn > start_lsn:
        decoder = WalStreamDecoder(oldest_lsn, system_identifier=system_identifier, synchronise=True)
        found = await _decode(read, decoder, flush_lsn, executor)
        if not found.last_record_lsn:
            raise UnavailableError("the last record began before what is kept of the log")
        return found
    decoder = WalStreamDecoder(start_lsn, system_identifier=system_identifier)
    found = await _decode(read, decoder, flush_lsn, executor)
    return found if found.last_record_lsn else RecordBoundary(0, start_lsn)


async def _decode(read: Read, decoder: WalStreamDecoder, flush_lsn: int, executor: Executor) -> RecordBoundary:
    loop = asyncio.get_running_loop()
    while decoder.next_lsn < flush_lsn:
        lsn = decoder.next_lsn
        chunk = await read(lsn, min(_CHUNK_SIZE_BYTES, flush_lsn - lsn))
        await loop.run_in_executor(executor, decoder.feed, lsn, chunk)
        if decoder.next_lsn < lsn + len(chunk):
            break  # zeros where a record should start
    return RecordBoundary(decoder.last_record_start or 0, decoder.end_lsn)
