"""What is in a part of a log, described: its records, their headers and the blocks that they are about; no data.

The safekeeper opens it, under the project's lease: no DEK leaves it, and nothing opens it once the keys are gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Final

from shared.api.safekeeper import WalBlock, WalContent, WalRecord
from shared.lsn import Lsn
from shared.wal.reader import RawRecord, WalStreamDecoder
from shared.wal.record import parse_record
from shared.wal.rmgr import RMGR_NAMES, RmgrId

MAX_RECORDS: Final = 10_000
_CHUNK_SIZE_BYTES: Final = 256 * 1024
Read = Callable[[int, int], Awaitable[bytes]]


async def describe_wal(
    read: Read, start_lsn: int, end_lsn: int, timeline_start_lsn: int, system_identifier: int, executor: Executor
) -> WalContent:
    """The records that begin and end in [start_lsn, end_lsn). One that began before is not among them; without the
    beginning of the log they are found from the next page on.

    `read(lsn, size)` answers at least one byte before end_lsn. Raises CorruptedError when the log is not WAL.
    """
    decoder = WalStreamDecoder(
        start_lsn, system_identifier=system_identifier, synchronise=start_lsn != timeline_start_lsn
    )
    loop = asyncio.get_running_loop()
    found: list[WalRecord] = []
    while decoder.next_lsn < end_lsn and len(found) < MAX_RECORDS:
        lsn = decoder.next_lsn
        chunk = await read(lsn, min(_CHUNK_SIZE_BYTES, end_lsn - lsn))
        found += await loop.run_in_executor(executor, _records, decoder, lsn, chunk)
        if decoder.next_lsn < lsn + len(chunk):
            break  # zeros where a record should start
    return WalContent(records=found[:MAX_RECORDS], more=len(found) >= MAX_RECORDS and decoder.end_lsn < end_lsn)


def _records(decoder: WalStreamDecoder, lsn: int, chunk: bytes) -> list[WalRecord]:
    return [_described(raw) for raw in decoder.feed(lsn, chunk)]


def _described(raw: RawRecord) -> WalRecord:
    start_lsn, end_lsn, data = raw
    record = parse_record(data)
    header = record.header
    known = header.rmgr_id in RmgrId.__members__.values()
    return WalRecord(
        start_lsn=Lsn(start_lsn),
        end_lsn=Lsn(end_lsn),
        resource_manager=RMGR_NAMES[RmgrId(header.rmgr_id)] if known else f"number {header.rmgr_id}",
        info=header.info,
        xid=header.xid,
        size_bytes=header.total_length_bytes,
        blocks=[
            WalBlock(
                tablespace=block.rel[0],
                database=block.rel[1],
                relfilenumber=block.rel[2],
                fork=block.fork,
                block=block.block_number,
                has_image=block.image is not None,
            )
            for block in record.blocks
        ],
    )
