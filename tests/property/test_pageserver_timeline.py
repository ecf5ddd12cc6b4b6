"""A timeline against an oracle that keeps every value for ever and applies all of them for each read."""

from __future__ import annotations

import asyncio
import struct
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pageserver import native
from pageserver.timeline import Timeline
from shared.keyspace import REL_BLOCK, REL_SIZE, KeyRange, Slru, field1_range, slru_key
from shared.wal.rmgr_clog import XidStatus
from tests.fixtures.pageserver import (
    IMAGE,
    INITDB_LSN,
    NATIVE,
    PAGE,
    QUICK,
    REL,
    TOMBSTONE,
    WAL,
    WAL_INIT,
    Engine,
    apply_record,
    engine,
    page_of,
    record,
)

BLOCKS = 3
CLOG = slru_key(Slru.CLOG, 0)
SIZE = REL.size_key()
TINY = replace(
    QUICK,
    image_threshold_values=3,
    chunk_size_bytes=700,
    chunk_cache_bytes=3000,
    index_cache_bytes=1,
    page_cache_bytes=20_000,
    checkpoint_distance_bytes=1 << 40,
    frozen_layers=1 << 30,
    ingest_l0_layers=1 << 30,
)


@dataclass
class Oracle:
    values: dict[bytes, list[tuple[int, int, bytes]]] = field(default_factory=dict)
    durable_lsn: int = INITDB_LSN

    def put(self, key: bytes, lsn: int, kind: int, payload: bytes) -> None:
        self.values.setdefault(key, []).append((lsn, kind, payload))

    def forget_after(self, lsn: int) -> None:
        for key in self.values:
            self.values[key] = [value for value in self.values[key] if value[0] <= lsn]

    def read(self, key: bytes, lsn: int) -> bytes | None:
        current: bytes | None = None
        for at, kind, payload in self.values.get(key, ()):
            if at > lsn:
                break
            if kind == IMAGE:
                current = payload
            elif kind == TOMBSTONE:
                current = bytes(PAGE) if key[0] == REL_BLOCK else None
            elif kind == NATIVE:
                assert current is not None
                current = native.apply_native(key, current, [payload])
            else:
                page = bytearray(PAGE if kind == WAL_INIT or current is None else current)
                apply_record(page, payload)
                current = bytes(page)
        return current

    def scan(self, key_range: KeyRange, lsn: int) -> list[tuple[bytes, bytes]]:
        found = [(key, self.read(key, lsn)) for key in sorted(self.values) if key in key_range]
        return [(key, value) for key, value in found if value is not None]


block_change = st.tuples(
    st.integers(0, BLOCKS - 1),
    st.sampled_from([WAL, WAL, WAL, WAL, WAL_INIT, IMAGE, TOMBSTONE]),
    st.integers(0, 200),
)
put = st.tuples(
    st.just("put"),
    st.lists(block_change, max_size=4, unique_by=lambda change: change[0]),
    st.integers(0, 3),
    st.sampled_from([8, 0x40, 0x1000]),
)
read = st.tuples(st.just("read"), st.integers(0, BLOCKS), st.just(1.0) | st.floats(0, 1))
step = st.one_of(
    put,
    put,
    put,
    put,
    read,
    read,
    st.sampled_from([("checkpoint",), ("freeze",), ("restart",), ("empty disk",), ("lose keys",), ("scan",)]),
)


async def take(timeline: Timeline, oracle: Oracle, changes: list[tuple[int, int, int]], extra: int, gap: int) -> None:
    prev, lsn = timeline.last_record_lsn, timeline.last_record_lsn + gap
    values = []
    for block, kind, number in changes:
        if kind == IMAGE:
            payload = page_of(number)
        elif kind == TOMBSTONE:
            payload = b""
        else:
            payload = record(100 + number, struct.pack(">H", number))
        values.append((REL.block_key(block), lsn, kind, payload))
    if extra == 1:
        xid = lsn % 32768
        values.append((CLOG, lsn, NATIVE, native.pack_clog_set([xid], XidStatus.COMMITTED)))
    elif extra == 2:
        values.append((SIZE, lsn, IMAGE, struct.pack(">I", len(changes))))
    elif extra == 3:
        values.append((SIZE, lsn, TOMBSTONE, b""))
    for value in values:
        oracle.put(*value)
    await timeline.put_batch(values, lsn, prev)


async def check_all(timeline: Timeline, oracle: Oracle, lsn: int) -> None:
    for block in range(BLOCKS):
        assert await timeline.get(REL.block_key(block), lsn) == oracle.read(REL.block_key(block), lsn)
    for key_range in (field1_range(REL_SIZE), field1_range(REL_BLOCK), KeyRange(CLOG, CLOG + b"\0")):
        assert await timeline.scan(key_range, lsn) == oracle.scan(key_range, lsn)
    assert await timeline.get_pages(REL, range(BLOCKS), lsn) == [
        oracle.read(REL.block_key(block), lsn) for block in range(BLOCKS)
    ]


async def play(steps: list[tuple[object, ...]], root: Path) -> None:
    oracle = Oracle()
    initdb = [(REL.block_key(block), page_of(block)) for block in range(BLOCKS)]
    initdb += [(CLOG, bytes(PAGE)), (SIZE, struct.pack(">I", BLOCKS))]
    for key, value in initdb:
        oracle.put(key, INITDB_LSN, IMAGE, value)
    async with engine(root / "0", config=TINY, cache_capacity_bytes=20_000) as one:
        process: Engine = one
        timeline = await one.create(initdb)
        for number, (name, *arguments) in enumerate(steps):
            match name, arguments:
                case "put", [list(changes), int(extra), int(gap)]:
                    await take(timeline, oracle, changes, extra, gap)
                case "read", [int(block), float(share)]:
                    lsn = INITDB_LSN + int((timeline.last_record_lsn - INITDB_LSN) * share)
                    key = REL.block_key(block)
                    assert await timeline.get(key, lsn) == oracle.read(key, lsn)
                case "checkpoint", _:
                    await timeline.checkpoint()
                    assert timeline.remote_consistent_lsn == timeline.last_record_lsn
                case "freeze", _:
                    live = timeline._live
                    assert live is not None
                    timeline._freeze(live)
                case "scan", _:
                    await check_all(timeline, oracle, timeline.last_record_lsn)
                case (("restart" | "empty disk" | "lose keys"), _):
                    oracle.forget_after(timeline.remote_consistent_lsn)
                    if name == "lose keys":
                        await process.keys.revoke(process.project_id)
                        await process.keys.restore(process.project_id)
                        await timeline.reopen()
                    else:
                        if name == "empty disk":
                            for path in (root / "0").rglob("layers/*"):
                                path.unlink()
                        timeline = await process.open(at_least_lsn=timeline.remote_consistent_lsn)
            oracle.durable_lsn = timeline.remote_consistent_lsn
            assert number < len(steps)
        await check_all(timeline, oracle, timeline.last_record_lsn)
        await timeline.checkpoint()
        fresh = await process.open()
        await check_all(fresh, oracle, fresh.last_record_lsn)
        await check_all(fresh, oracle, (INITDB_LSN + fresh.last_record_lsn) // 2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(step, max_size=20) | st.lists(step, min_size=20, max_size=60))
def test_timeline_equals_the_oracle(steps: list[tuple[object, ...]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        asyncio.run(play(steps, Path(root)))
