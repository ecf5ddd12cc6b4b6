"""Crashes, tampering and rivals: what the engine says is durable is there, and what it reads is right or refused."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from pageserver.remote_timeline import TimelineExistsError
from pageserver.timeline import Timeline
from shared.errors import CorruptedError, IntegrityError, KeylakeError
from shared.ids import ProjectId, TimelineId
from shared.keyspace import REL_SIZE, field1_range
from shared.storage.base import Data, ObjectInfo, ObjectStore
from shared.storage.local import LocalObjectStore
from shared.storage.memory import MemoryObjectStore
from tests.fixtures.keys import InMemoryKeySource, ignore_loss
from tests.fixtures.pageserver import (
    IMAGE,
    INITDB_LSN,
    QUICK,
    REL,
    WAL,
    Engine,
    apply_record,
    engine,
    page_of,
    record,
)

BLOCKS = 8


class ProcessDiedError(Exception):
    """Not a KeylakeError: nobody handles it."""


class DyingStore:
    """The process dies at its `at`-th call of the store, before or after that takes effect; no call works after."""

    def __init__(self, inner: ObjectStore, at: int, *, after: bool) -> None:
        self._inner = inner
        self._at = at
        self._after = after
        self.calls = 0

    def _before(self) -> None:
        self.calls += 1
        if self.calls > self._at or (self.calls == self._at and not self._after):
            raise ProcessDiedError

    def _done(self) -> None:
        if self.calls >= self._at:
            raise ProcessDiedError

    async def put(self, key: str, data: Data) -> None:
        self._before()
        await self._inner.put(key, data)
        self._done()

    async def put_if_absent(self, key: str, data: Data) -> None:
        self._before()
        await self._inner.put_if_absent(key, data)
        self._done()

    async def get(self, key: str) -> bytes:
        self._before()
        data = await self._inner.get(key)
        self._done()
        return data

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        self._before()
        data = await self._inner.get_range(key, start, end)
        self._done()
        return data

    async def head(self, key: str) -> ObjectInfo:
        return await self._inner.head(key)

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        self._before()
        async for info in self._inner.list(prefix):
            yield info
        self._done()

    async def delete(self, key: str) -> None:
        self._before()
        await self._inner.delete(key)
        self._done()

    async def delete_many(self, keys: Iterable[str]) -> None:
        self._before()
        for key in keys:  # one by one: a crash may come between
            await self._inner.delete(key)
            self._before()
        self._done()

    async def close(self) -> None:
        await self._inner.close()


def initdb() -> list[tuple[bytes, bytes]]:
    return [(REL.block_key(block), page_of(block)) for block in range(BLOCKS)] + [
        (REL.size_key(), struct.pack(">I", BLOCKS))
    ]


def change(number: int) -> tuple[int, bytes]:
    return number % BLOCKS, record(100 + number, struct.pack(">I", number))


def lsn_of(number: int) -> int:
    return INITDB_LSN + 0x40 * (number + 1)


async def put_up_to(timeline: Timeline, last: int) -> None:
    """Changes 0 … last, from wherever the timeline stands."""
    first = (timeline.last_record_lsn - INITDB_LSN) // 0x40
    for number in range(first, last + 1):
        block, payload = change(number)
        lsn = lsn_of(number)
        await timeline.put_batch([(REL.block_key(block), lsn, WAL, payload)], lsn, lsn - 0x40)


def expected(block: int, lsn: int) -> bytes:
    page = bytearray(page_of(block))
    for number in range((lsn - INITDB_LSN) // 0x40):
        changed, payload = change(number)
        if changed == block:
            apply_record(page, payload)
    return bytes(page)


async def check(timeline: Timeline, lsns: Iterable[int]) -> None:
    for lsn in lsns:
        for block in range(BLOCKS):
            assert await timeline.get_page(REL, block, lsn) == expected(block, lsn)
    assert len(await timeline.scan(field1_range(REL_SIZE), timeline.last_record_lsn)) == 1


async def life(process: Engine, announced: list[int]) -> None:
    """A pageserver's life: create or open, ingest, flush twice. `announced`: what it told safekeepers."""
    try:
        timeline = await process.create(initdb())
    except TimelineExistsError:
        timeline = await process.open()
    for step in range(2):
        first = (timeline.last_record_lsn - INITDB_LSN) // 0x40
        await put_up_to(timeline, first + 15 + step)
        await timeline.checkpoint()
        announced.append(timeline.remote_consistent_lsn)


@pytest.mark.parametrize("after", [False, True])
async def test_a_crash_at_any_call_of_the_store_loses_nothing_announced(tmp_path: Path, *, after: bool) -> None:
    config = replace(QUICK, image_threshold_values=3, chunk_size_bytes=2048)
    for at in range(1, 100):
        inner = MemoryObjectStore()
        keys = InMemoryKeySource()
        root = tmp_path / f"{at}"
        announced: list[int] = []
        dying = DyingStore(inner, at, after=after)
        async with engine(root, store=dying, keys=keys, config=config) as first:
            finished = False
            try:
                await life(first, announced)
                finished = True
            except ProcessDiedError:
                pass
        disk = root if at % 2 else tmp_path / f"{at} on another machine"
        async with engine(disk, store=inner, like=first, config=config) as second:
            try:
                timeline = await second.create(initdb())
                assert not announced
            except TimelineExistsError:
                timeline = await second.open(at_least_lsn=max(announced, default=0))
            assert timeline.last_record_lsn >= max(announced, default=INITDB_LSN)
            await check(timeline, {INITDB_LSN, (INITDB_LSN + timeline.last_record_lsn) // 2, timeline.last_record_lsn})
            # And it goes on from there, as if nothing had happened.
            await put_up_to(timeline, 50)
            await timeline.checkpoint()
            await check(await second.open(), [lsn_of(10), lsn_of(33), lsn_of(50)])
            # No half layer, no orphan: everything under layers/ is listed, with its envelope.
            objects = [info.key async for info in inner.list("") if "/layers/" in info.key]
            assert len(objects) == 2 * timeline.layer_count
        if finished:
            assert at > 20
            return
    pytest.fail("the life never came to its end")


async def test_a_life_after_a_life_after_a_crash(tmp_path: Path) -> None:
    """Random crashes in a row, on the same disk."""
    rng = random.Random(7)
    inner = MemoryObjectStore()
    announced = [0]
    keys = InMemoryKeySource()
    async with engine(tmp_path, store=inner, keys=keys) as base:
        await base.create(initdb())
    for _ in range(40):
        dying = DyingStore(inner, rng.randrange(1, 40), after=rng.random() < 0.5)
        async with engine(tmp_path, store=dying, like=base) as process:
            try:
                timeline = await process.open(at_least_lsn=max(announced))
                await check(timeline, [timeline.last_record_lsn])
                last = (timeline.last_record_lsn - INITDB_LSN) // 0x40
                await put_up_to(timeline, last + rng.randrange(5))
                await timeline.checkpoint()
                announced.append(timeline.remote_consistent_lsn)
            except ProcessDiedError:
                pass
    async with engine(tmp_path / "elsewhere", store=inner, like=base) as process:
        timeline = await process.open(at_least_lsn=max(announced))
        await check(timeline, [timeline.last_record_lsn, (timeline.last_record_lsn + INITDB_LSN) // 2])
    assert len(announced) > 5


async def filled(process: Engine) -> Timeline:
    timeline = await process.create(initdb())
    await put_up_to(timeline, 20)
    await timeline.checkpoint()
    await put_up_to(timeline, 40)
    await timeline.checkpoint()
    return timeline


async def layer_objects(process: Engine) -> list[str]:
    return [info.key async for info in process.store.list("") if "/layers/" in info.key]


async def outcome(process: Engine) -> str:
    """Read everything, from an empty cache. "right" or the error; a wrong page fails the test."""
    timeline = await process.open()
    try:
        await check(timeline, [lsn_of(10), lsn_of(40)])
    except IntegrityError:
        return "refused"
    return "right"


async def test_altered_layers_in_the_store_are_refused(tmp_path: Path) -> None:
    config = replace(QUICK, chunk_size_bytes=2048)
    rng = random.Random(3)
    async with engine(tmp_path, config=config, cache_capacity_bytes=0) as one:
        await filled(one)
        assert await outcome(one) == "right"
        for key in await layer_objects(one):
            good = await one.store.get(key)
            positions = [0, 5, 8, 11, 15, len(good) - 1, *(rng.randrange(len(good)) for _ in range(25))]
            refused = 0
            for position in positions:
                flipped = good[:position] + bytes([good[position] ^ (1 << rng.randrange(8))]) + good[position + 1 :]
                await one.store.put(key, flipped)
                refused += await outcome(one) == "refused"
            if key.endswith(".key"):
                continue  # read only when the index's copy of the envelope does not open
            # All is read but pages that later images stand for, so nearly all flips are noticed; none is wrong.
            assert refused > len(positions) // 2
            for bad in (good[:-1], good[: len(good) // 2], good[:16], b"", good[2048:]):
                await one.store.put(key, bad)
                assert await outcome(one) == "refused"
            await one.store.put(key, good + b"\0")  # no byte behind the announced end is ever looked at
            assert await outcome(one) == "right"
            await one.store.put(key, good)
        assert await outcome(one) == "right"


async def test_a_layer_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    """Other layer, other timeline, other project: same store, same keys where they can be had."""
    keys = InMemoryKeySource()
    async with engine(tmp_path / "a", keys=keys, cache_capacity_bytes=0) as one:
        other_timeline = replace(one, timeline_id=TimelineId.new(), timelines=[])
        async with engine(tmp_path / "b", store=one.store, keys=keys, cache_capacity_bytes=0) as other_project:
            assert other_project.project_id != one.project_id
            everything = []
            for process in (one, other_timeline, other_project):
                timeline = await filled(process)
                prefix = f"projects/{process.project_id}/timelines/{process.timeline_id}/layers/"
                everything.append([info.key async for info in one.store.list(prefix) if "delta" in info.key])
                assert timeline.layer_count == 3
            mine = [key for key in everything[0] if not key.endswith(".key")]
            for target in mine:
                good = {key: await one.store.get(key) for key in (target, target + ".key")}
                others = [mine[1 - mine.index(target)]]
                others += [key for keys_of in everything[1:] for key in keys_of if not key.endswith(".key")]
                for source in others:
                    for suffixes in (("",), ("", ".key")):
                        for suffix in suffixes:
                            await one.store.put(target + suffix, await one.store.get(source + suffix))
                        assert await outcome(one) == "refused"
                        for key, data in good.items():
                            await one.store.put(key, data)
            assert await outcome(one) == "right"


async def test_a_missing_layer_is_an_error_and_not_an_older_page(tmp_path: Path) -> None:
    async with engine(tmp_path, cache_capacity_bytes=0) as one:
        await filled(one)
        newest = max(key for key in await layer_objects(one) if "delta" in key and not key.endswith(".key"))
        await one.store.delete(newest)
        timeline = await one.open()
        with pytest.raises(KeylakeError):
            await timeline.get_page(REL, 0, lsn_of(40))


async def test_damaged_local_copies_heal_from_the_store(tmp_path: Path) -> None:
    rng = random.Random(5)
    config = replace(QUICK, chunk_size_bytes=2048)
    async with engine(tmp_path, config=config) as one:
        await filled(one)
        local = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name == "layers"]
        assert len(local) == 3
        for _ in range(25):
            for path in local:
                if not path.exists():
                    await one.files.insert(str(path.relative_to(tmp_path)), await one.store.get(_key(path, tmp_path)))
                data = bytearray(path.read_bytes())
                data[rng.choice([8, 9, 10, 11, 3, rng.randrange(len(data))])] ^= 1 << rng.randrange(8)
                path.write_bytes(data)
            assert await outcome(one) == "right"
        # Damaged here and there: then it is an error.
        for path in local:
            data = bytearray(await one.store.get(_key(path, tmp_path)))
            data[len(data) // 2] ^= 1
            await one.store.put(_key(path, tmp_path), bytes(data))
            await one.files.insert(_key(path, tmp_path), bytes(data))
        assert await outcome(one) == "refused"


def _key(path: Path, root: Path) -> str:
    return str(path.relative_to(root))


async def test_on_a_directory_store_with_reads_writes_and_flushes_side_by_side(tmp_path: Path) -> None:
    config = replace(QUICK, checkpoint_distance_bytes=0x400, image_threshold_values=5, chunk_size_bytes=4096)
    store = await LocalObjectStore.open(tmp_path / "store")
    try:
        async with engine(tmp_path / "cache", store=store, config=config) as one:
            timeline = await one.create(initdb())
            async with asyncio.TaskGroup() as group:
                background = group.create_task(timeline.run())
                fetching = group.create_task(one.files.run())

                async def read(seed: int) -> None:
                    # Each waits for a record and then reads, as page service does. One that never waited would keep
                    # the loop spinning, and CPython then starves the threads that flush: a waiter of the GIL asks for
                    # it only when nobody has dropped it for a whole switch interval, and every poll drops it.
                    rng = random.Random(seed)
                    for newest in range(300):
                        await timeline.wait_lsn(lsn_of(newest), 60)
                        for number in (newest, rng.randrange(newest + 1)):
                            block, lsn = rng.randrange(BLOCKS), lsn_of(number)
                            assert await timeline.get_page(REL, block, lsn) == expected(block, lsn)

                readers = [group.create_task(read(seed)) for seed in range(4)]
                for number in range(300):
                    await put_up_to(timeline, number)
                    await asyncio.sleep(0)
                for reader in readers:
                    await reader
                await timeline.checkpoint()
                background.cancel()
                fetching.cancel()
            assert timeline.layer_count > 10
            await check(timeline, [lsn_of(299), lsn_of(150)])
        async with engine(tmp_path / "cache", like=one, store=store, config=config) as two:
            await check(await two.open(), [lsn_of(299), lsn_of(7)])
    finally:
        await store.close()


async def test_another_projects_index_does_not_open_under_mine(tmp_path: Path) -> None:
    keys = InMemoryKeySource()
    async with engine(tmp_path / "a", keys=keys) as one:
        await filled(one)
        victim = replace(one, project_id=ProjectId.new(), timelines=[])
        victim.lease = await keys.acquire(victim.project_id, ignore_loss)
        prefix = f"projects/{one.project_id}"
        for key in [info.key async for info in one.store.list(prefix)]:
            await one.store.put(key.replace(str(one.project_id), str(victim.project_id)), await one.store.get(key))
        with pytest.raises(IntegrityError):
            await victim.open()


async def test_a_value_that_is_no_page_is_refused(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await one.create(initdb())
        lsn = INITDB_LSN + 8
        await timeline.put_batch([(REL.block_key(0), lsn, IMAGE, b"short")], lsn, INITDB_LSN)
        with pytest.raises(CorruptedError):
            await timeline.get_page(REL, 0, lsn)
