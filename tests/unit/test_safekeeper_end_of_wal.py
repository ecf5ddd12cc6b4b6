"""Where the last whole record ends, from wherever the search starts."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from safekeeper.end_of_wal import RecordBoundary, find_last_record
from shared.errors import CorruptedError
from shared.lsn import WAL_SEGMENT_SIZE_BYTES
from tests.fixtures.wal import SYSTEM_IDENTIFIER, WalBuilder

START = WAL_SEGMENT_SIZE_BYTES + 40


class Log:
    def __init__(self, start_lsn: int, data: bytes) -> None:
        self.start_lsn = start_lsn
        self.data = data
        self.lowest_lsn = 1 << 64

    async def read(self, lsn: int, size_bytes: int) -> bytes:
        self.lowest_lsn = min(self.lowest_lsn, lsn)
        at = lsn - self.start_lsn
        assert 0 <= at < len(self.data)
        return self.data[at : at + min(size_bytes, 100_003)]

    async def find(self, known: RecordBoundary | None = None) -> RecordBoundary:
        with ThreadPoolExecutor(1) as pool:
            flush_lsn = self.start_lsn + len(self.data)
            return await find_last_record(self.read, self.start_lsn, flush_lsn, SYSTEM_IDENTIFIER, known, pool)


async def test_cut_anywhere_it_finds_the_last_whole_record() -> None:
    rng = random.Random(random.getrandbits(64))
    wal = WalBuilder(START)
    for _ in range(60):
        wal.append_noop(rng.choice((29, 40, 500, 9000)))
    for _ in range(40):
        size = rng.randrange(len(wal.data))
        found = await Log(START, bytes(wal.data[:size])).find()
        whole = [record for record, last in zip(wal.records, wal.last_bytes, strict=True) if last <= START + size]
        expected = RecordBoundary(whole[-1][0], whole[-1][1]) if whole else RecordBoundary(0, START)
        assert found == expected


async def test_it_starts_in_the_segment_that_holds_the_end() -> None:
    wal = WalBuilder(START)
    wal.fill_to(4 * WAL_SEGMENT_SIZE_BYTES)
    wal.append_noop(500)
    log = Log(START, bytes(wal.data))
    assert await log.find() == RecordBoundary(wal.records[-1][0], wal.end_lsn)
    assert log.lowest_lsn == 4 * WAL_SEGMENT_SIZE_BYTES


async def test_a_record_longer_than_segments_makes_it_look_further_back() -> None:
    wal = WalBuilder(START)
    for _ in range(5):
        wal.append_noop(1000)
    last = wal.records[-1]
    wal.append_noop(3 * WAL_SEGMENT_SIZE_BYTES)
    whole = Log(START, bytes(wal.data))
    assert await whole.find() == RecordBoundary(wal.records[-1][0], wal.end_lsn)
    cut = Log(START, bytes(wal.data[:-100]))
    assert await cut.find() == RecordBoundary(last[0], last[1])
    assert cut.lowest_lsn == START


async def test_a_known_boundary_is_where_it_starts() -> None:
    wal = WalBuilder(START)
    for _ in range(50):
        wal.append_noop(3000)
    known = RecordBoundary(wal.records[30][0], wal.records[30][1])
    log = Log(START, bytes(wal.data))
    assert await log.find(known) == RecordBoundary(wal.records[-1][0], wal.end_lsn)
    assert log.lowest_lsn == known.end_lsn
    assert await log.find(RecordBoundary(wal.records[-1][0], wal.end_lsn + 8)) == await log.find()


async def test_no_record_yet() -> None:
    assert await Log(START, b"").find() == RecordBoundary(0, START)
    wal = WalBuilder(START)
    wal.append_noop(1000)
    assert await Log(START, bytes(wal.data[:500])).find() == RecordBoundary(0, START)


async def test_damage_is_not_an_end() -> None:
    wal = WalBuilder(START)
    for _ in range(5):
        wal.append_noop(1000)
    data = bytearray(wal.data)
    data[2500] ^= 1
    with pytest.raises(CorruptedError):
        await Log(START, bytes(data)).find()
