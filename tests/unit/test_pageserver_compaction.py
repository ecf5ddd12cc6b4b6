"""Compaction and GC at work: bounds of reads, memory and disk; kills, rivals, lost keys, rotations at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from pageserver.layer.name import LayerDescriptor, LayerKind
from pageserver.layer.opened import OpenLayer
from pageserver.live import Live
from pageserver.open_layers import OpenLayers
from pageserver.read_path import GatherRequest, OpenRequest, gather
from pageserver.remote_timeline import FencedError
from pageserver.retention import Retention
from pageserver.timeline import Timeline
from shared.clock import ManualClock
from shared.errors import IntegrityError, InvalidInputError, KeyAccessError, UnavailableError
from shared.keyspace import Fork, RelTag
from shared.lsn import Lsn
from shared.storage.base import ObjectStore
from shared.storage.faulty import Call, FaultyObjectStore, Moment, Operation
from shared.storage.local import LocalObjectStore
from shared.storage.memory import MemoryObjectStore
from tests.fixtures.dying_store import DyingObjectStore
from tests.fixtures.pageserver import (
    IMAGE,
    INITDB_LSN,
    PAGE,
    QUICK,
    REL,
    TOMBSTONE,
    WAL,
    Engine,
    engine,
    page_of,
    record,
)
from tests.fixtures.waiting import wait_until
from tests.unit.test_pageserver_key_upkeep import keep, project_keys, uses, versions
from tests.unit.test_pageserver_timeline import count, put, running

BLOCKS = 8
BLOCK = REL.block_key(0)
SIZE = struct.pack(">I", BLOCKS)
EAGER = replace(
    QUICK,
    compaction_l0_layers=4,
    compaction_target_bytes=2 * PAGE,
    image_layer_deltas=2,
    retention=Retention(0, 0),
    lsn_lease_s=1e-6,
)
COARSE = replace(EAGER, compaction_target_bytes=6 * PAGE)
"""Two layers at a time: enough for every step, and few of each."""
LAZY = replace(EAGER, compaction_l0_layers=1 << 30, ingest_l0_layers=1 << 30)


async def begun(on: Engine) -> Timeline:
    blocks = [(REL.block_key(block), page_of(block)) for block in range(BLOCKS)]
    return await on.create([*blocks, (REL.size_key(), SIZE)])


async def grow(timeline: Timeline, layers: int, blocks: int = BLOCKS) -> None:
    """Layers of one value per block each."""
    for number in range(layers):
        for block in range(blocks):
            await put(timeline, (REL.block_key(block), WAL, record(100 + number % 50, bytes([number]))))
        await timeline.checkpoint()


async def filled(on: Engine, layers: int = 6) -> tuple[Timeline, dict[int, list[bytes]]]:
    """A timeline, and what its pages are at some LSNs."""
    timeline = await begun(on)
    history: dict[int, list[bytes]] = {}
    for _ in range(layers):
        await grow(timeline, 1)
        history[timeline.last_record_lsn] = await pages(timeline, timeline.last_record_lsn)
    return timeline, history


async def pages(timeline: Timeline, lsn: int) -> list[bytes]:
    return await timeline.get_pages(REL, range(BLOCKS), lsn)


async def check(timeline: Timeline, history: dict[int, list[bytes]]) -> None:
    for lsn, want in history.items():
        if lsn >= timeline.oldest_lsn:
            assert await pages(timeline, lsn) == want


async def objects(store: ObjectStore, part: str = "/layers/") -> set[str]:
    return {info.key async for info in store.list("") if part in info.key}


async def only_listed_layers(on: Engine, timeline: Timeline) -> bool:
    listed = {layer.name for layer, _ in timeline._known_index().layers}
    return {key.rpartition("/")[2].removesuffix(".key") for key in await objects(on.store)} == listed


def live_of(timeline: Timeline) -> Live:
    assert timeline._live is not None
    return timeline._live


# --- what reads cost ---


class Counting:
    """Implements `Memory`, and counts the layers that a read looks into."""

    def __init__(self, layers: OpenLayers) -> None:
        self._layers = layers
        self.visited: list[str] = []

    def peek(self, layer: LayerDescriptor) -> OpenLayer | None:
        self.visited.append(layer.name)
        return None

    def peek_bytes(self, layer: OpenLayer, start: int, end: int) -> bytes | None:
        return None

    async def open(self, layer: LayerDescriptor) -> OpenLayer:
        return await self._layers.open(layer)

    async def read(self, layer: OpenLayer, start: int, end: int) -> bytes:
        return await self._layers.read(layer, start, end)


async def layers_visited(timeline: Timeline, key: bytes) -> int:
    """By a read of the newest version, with nothing cached; those of an ancestor count, too."""
    live, snapshot = live_of(timeline), live_of(timeline).snapshot
    counted = [Counting(live.layers)]
    if live.parent is not None:
        assert snapshot.ancestor is not None
        assert snapshot.ancestor.snapshot.ancestor is None
        counted.append(Counting(live.parent.layers))
        snapshot = snapshot._replace(ancestor=snapshot.ancestor._replace(layers=counted[1]))
    plan = gather(snapshot, counted[0], key, timeline.last_record_lsn, None)
    with contextlib.suppress(StopIteration):
        request: GatherRequest = next(plan)
        while True:
            if isinstance(request, OpenRequest):
                request = plan.send(await request.layers.open(request.layer))
            else:
                request = plan.send(await request.layers.read(request.layer, request.start, request.end))
    return sum(len(each.visited) for each in counted)


async def test_a_read_visits_a_bounded_number_of_layers(tmp_path: Path) -> None:
    """However long the history is. Keys that change seldom suffer most: none of their values starts a chain."""
    worst: dict[str, list[int]] = {}
    for name, config in (("compacted", EAGER), ("not compacted", LAZY)):
        async with engine(tmp_path / name, config=config) as one:
            timeline = await begun(one)
            worst[name] = []
            for number in range(60):
                block = 1 + number % (BLOCKS - 1)
                await put(
                    timeline, (REL.block_key(block), WAL, record(9, b"x")), (REL.block_key(0), WAL, record(9, b"y"))
                )
                await timeline.checkpoint()
                await timeline.compactor.compact()
                if number % 5 == 4:
                    worst[name].append(max([await layers_visited(timeline, REL.block_key(b)) for b in range(BLOCKS)]))
            want = await pages(timeline, timeline.last_record_lsn)
            assert [page[0] for page in want[:6]] == [60, 9, 9, 9, 9, 8]
    # Fewer than 4 of L0, fewer than 2 of L1 for the keys' own partition or 8 that merely span it, one image.
    assert max(worst["compacted"]) <= 3 + 8 + 1
    assert max(worst["compacted"][6:]) <= max(worst["compacted"][:6]), "it does not grow with history"
    assert worst["not compacted"][-1] > 50, "the control: without compaction it does"


async def test_compaction_streams(tmp_path: Path) -> None:
    """24 MB of values are merged, and imaged, with a fraction of that in memory."""
    config = replace(EAGER, compaction_target_bytes=1 << 20, chunk_cache_bytes=1 << 20, page_cache_bytes=1)
    rel = RelTag(1663, 5, 20000, Fork.MAIN)
    blocks = 500
    async with engine(tmp_path / "a", store=await LocalObjectStore.open(tmp_path / "store"), config=config) as one:
        timeline = await one.create([(rel.size_key(), struct.pack(">I", blocks))])
        for number in range(6):
            lsn = timeline.last_record_lsn
            values = [(rel.block_key(block), lsn + 8, IMAGE, bytes([number]) * PAGE) for block in range(blocks)]
            await timeline.put_batch(values, lsn + 8, lsn)
            del values
            await timeline.checkpoint()
        async with engine(tmp_path / "b", like=one, config=config) as two:
            fresh = await two.open()
            total = fresh.layer_size_bytes
            tracemalloc.start()
            try:
                before, _ = tracemalloc.get_traced_memory()
                await fresh.compactor.compact(force=True)
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert fresh.compactor.stats.merges == 1
            assert fresh.compactor.stats.layers_written > 20 + 4
            assert total > 24_000_000
            # A window per input, and a layer with its sealed bytes.
            assert peak - before < 14 * (1 << 20)
            assert await fresh.get_pages(rel, range(blocks), fresh.last_record_lsn) == [bytes([5]) * PAGE] * blocks


async def test_a_key_with_too_many_values_is_cut_by_lsn(tmp_path: Path) -> None:
    async with engine(tmp_path, config=EAGER) as one:
        timeline = await begun(one)
        history: dict[int, list[bytes]] = {}
        for number in range(9):
            await put(timeline, *((REL.block_key(block), IMAGE, page_of(number)) for block in (1, 2)))
            for _ in range(2):
                await put(
                    timeline, (REL.block_key(1), IMAGE, page_of(100 + number)), (REL.block_key(0), WAL, record(9, b"x"))
                )
            await timeline.checkpoint()
            history[timeline.last_record_lsn] = await pages(timeline, timeline.last_record_lsn)
        await timeline.compactor.compact(force=True)
        alone = [layer for layer in live_of(timeline).layer_map.layers if layer.kind is LayerKind.DELTA
                 and layer.key_range.start == REL.block_key(1)]  # fmt: skip
        assert len(alone) > 4
        for newer, older in itertools.pairwise(alone):
            assert older.lsn_end == newer.lsn_start
        await check(timeline, history)
        await check(await one.open(), history)


async def test_images_leave_out_what_does_not_exist(tmp_path: Path) -> None:
    """Or a dropped table would be copied from image to image for ever."""
    async with engine(tmp_path, config=EAGER) as one:
        gone = RelTag(1663, 5, 17000, Fork.MAIN)
        timeline = await one.create([(REL.block_key(0), page_of(1)), (REL.size_key(), struct.pack(">I", 1))])
        await put(timeline, *((gone.block_key(b), IMAGE, page_of(b)) for b in range(40)),
                  (gone.size_key(), IMAGE, struct.pack(">I", 40)))  # fmt: skip
        existed = await put(timeline, *((REL.block_key(b), IMAGE, page_of(b)) for b in range(1, 20)),
                            (REL.size_key(), IMAGE, struct.pack(">I", 20)))  # fmt: skip
        await timeline.checkpoint()
        await put(timeline, (gone.size_key(), TOMBSTONE, b""), (REL.size_key(), IMAGE, struct.pack(">I", 1)))
        await timeline.checkpoint()
        full = timeline.layer_size_bytes
        await timeline.compactor.compact(force=True)
        assert await timeline.get_page(gone, 39, existed) == page_of(39)
        await timeline.history.collect()
        assert timeline.layer_size_bytes < full / 20
        # Grown again: a block that no record initialises starts from zeros (pageserver/ingest.py).
        lsn = timeline.last_record_lsn
        await timeline.put_batch(
            [(REL.block_key(1), lsn + 7, TOMBSTONE, b""), (REL.block_key(1), lsn + 8, WAL, record(50, b"!")),
             (REL.size_key(), lsn + 8, IMAGE, struct.pack(">I", 2))],
            lsn + 8, lsn,
        )  # fmt: skip
        page = await timeline.get_page(REL, 1, lsn + 8)
        assert (page[0], page[50:52]) == (1, b"!\0")


async def test_a_range_in_which_nothing_is_left_has_an_empty_image(tmp_path: Path) -> None:
    async with engine(tmp_path, config=EAGER) as one:
        gone = RelTag(1, 1, 1, Fork.MAIN)  # before the first key of all images, and without a size: it does not exist
        timeline = await begun(one)
        await put(timeline, (gone.block_key(0), IMAGE, page_of(1)))
        await timeline.checkpoint()
        await timeline.compactor.compact(force=True)
        await timeline.history.collect()
        (empty,) = [layer for layer in live_of(timeline).layer_map.layers if gone.block_key(0) in layer.key_range]
        assert empty.kind is LayerKind.IMAGE
        assert empty.size_bytes < 200
        for reader in (timeline, await one.open()):
            assert await reader.rel_size(gone, reader.last_record_lsn) is None
            assert await pages(reader, reader.last_record_lsn) == [page_of(block) for block in range(BLOCKS)]


async def test_it_happens_by_itself(tmp_path: Path) -> None:
    config = replace(EAGER, gc_interval_s=0.02, compaction_interval_s=0.02)
    async with engine(tmp_path, config=config) as one:
        timeline = await begun(one)
        async with running(timeline):
            await grow(timeline, 30)
            await wait_until(lambda: timeline.l0_layer_count < 4)
            await wait_until(lambda: timeline.oldest_lsn == timeline.last_record_lsn)
            assert timeline.compactor.stats.merges > 1
            await wait_until(lambda: not timeline.compactor.lock.locked())
            assert timeline.layer_count < 20
        assert timeline.fault == ""
        assert [page[0] for page in await pages(timeline, timeline.last_record_lsn)] == [30] * BLOCKS


async def test_what_cannot_be_read_stays_as_it_is(tmp_path: Path) -> None:
    """A damaged layer is reported, and neither merged nor removed; ingest goes on."""
    async with engine(tmp_path, config=EAGER, cache_capacity_bytes=0) as one:
        await filled(one, layers=3)
        (damaged, *_) = sorted(key for key in await objects(one.store) if "/delta-" in key and ".key" not in key)
        whole = await one.store.get(damaged)
        await one.store.put(damaged, whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
        before = await objects(one.store)
        fresh = await one.open()
        with pytest.raises(IntegrityError):
            await fresh.compactor.compact(force=True)
        assert "compaction" in fresh.fault
        await grow(fresh, 1)
        assert before <= await objects(one.store)
        await one.store.put(damaged, whole)
        await fresh.compactor.compact(force=True)
        assert fresh.fault == ""
        assert await only_listed_layers(one, fresh)


# --- crashes, rivals, keys ---


async def work(timeline: Timeline) -> None:
    """All that may replace or remove layers."""
    await grow(timeline, 1)
    await timeline.compactor.compact(force=True)
    await timeline.history.collect()


@pytest.mark.parametrize("dies_after", [False, True])
async def test_a_kill_between_any_two_steps_loses_nothing(tmp_path: Path, dies_after: bool) -> None:
    changes, finished = 0, False
    while not finished:
        async with engine(tmp_path / f"{changes}", config=COARSE) as one:
            _, history = await filled(one, layers=2)
            store = DyingObjectStore(one.store, changes, dies_after=dies_after)
            async with engine(tmp_path / f"{changes}-dying", like=one, store=store, config=COARSE) as dying:
                timeline = await dying.open()
                oldest = last = timeline.oldest_lsn
                with contextlib.suppress(UnavailableError):
                    await work(timeline)
                last = timeline.remote_consistent_lsn
                finished = not store.dead
            async with engine(tmp_path / f"{changes}-next", like=one, config=COARSE) as two:
                timeline = await two.open(at_least_lsn=last)
                assert timeline.oldest_lsn >= oldest
                await check(timeline, history)
                await work(timeline)
                await check(timeline, history)
                await grow(timeline, 1)  # what a load finds is deleted with the next index
                assert await only_listed_layers(two, timeline)
        changes += 1
    assert changes > 12, "it was cut off at each of its steps"


@pytest.mark.parametrize("moment", list(Moment))
async def test_a_hiccup_at_any_step_is_made_good_by_the_same_process(tmp_path: Path, moment: Moment) -> None:
    hiccup, reached = 0, True
    while reached:
        flaky = FaultyObjectStore(MemoryObjectStore())
        async with engine(tmp_path / f"{hiccup}", store=flaky, config=COARSE) as one:
            timeline, history = await filled(one, layers=3)
            flaky.fail_nth_change(hiccup, moment)
            for _ in range(3):
                with contextlib.suppress(UnavailableError):
                    await work(timeline)
                    break
            reached = flaky.quiet
            flaky.heal()
            await check(timeline, history)
            await grow(timeline, 1)
            fresh = await one.open()
            await check(fresh, history)
            await grow(fresh, 1)
            assert await only_listed_layers(one, fresh)
        hiccup += 1
    assert hiccup > 12


async def test_of_two_pageservers_only_the_one_that_counts_deletes(tmp_path: Path) -> None:
    store = FaultyObjectStore(MemoryObjectStore())
    async with engine(tmp_path / "a", store=store, config=EAGER) as one:
        timeline, history = await filled(one, layers=4)
        async with engine(tmp_path / "b", like=one, config=EAGER) as two:
            # The other one takes over while layers are uploaded: nothing of them is ever listed.
            hold = store.hold(Operation.PUT_IF_ABSENT)
            compacting = asyncio.create_task(timeline.compactor.compact(force=True))
            await hold.reached.wait()
            other = await two.open()
            await grow(other, 1)
            hold.release.set()
            with pytest.raises(FencedError):
                await compacting
            await check(other, history)
            with pytest.raises(FencedError):
                await timeline.history.collect()
            await check(other, history)
            assert other.last_record_lsn > timeline.last_record_lsn


async def test_before_a_delete_the_slots_are_looked_at_once_more(tmp_path: Path) -> None:
    """A reader is slow, and by the time it has left another pageserver has taken over."""
    store = FaultyObjectStore(MemoryObjectStore())
    config = replace(EAGER, chunk_cache_bytes=1, page_cache_bytes=1)
    async with engine(tmp_path / "a", store=store, config=config, cache_capacity_bytes=0) as one:
        await filled(one, layers=4)
        timeline = await one.open()
        await pages(timeline, timeline.last_record_lsn)  # opens the layers; their chunks are read anew
        hold = store.hold(Operation.GET_RANGE)
        reading = asyncio.create_task(pages(timeline, timeline.last_record_lsn))
        await hold.reached.wait()
        before = await objects(store)
        compacting = asyncio.create_task(timeline.compactor.compact(force=True))
        live = live_of(timeline)
        await wait_until(lambda: bool(live._leaving))
        assert before < await objects(store), "inputs stay while somebody reads them"
        async with engine(tmp_path / "b", like=one, config=EAGER) as two:
            other = await two.open()
            await grow(other, 1)
            store.calls.clear()
            hold.release.set()
            with pytest.raises(FencedError, match="nothing is deleted"):
                await compacting
            with contextlib.suppress(IntegrityError):
                await reading  # to the new writer the inputs were orphans
            assert not [call for call in store.calls if call.operation in (Operation.DELETE, Operation.DELETE_MANY)]


@pytest.mark.parametrize("operation", [Operation.GET_RANGE, Operation.PUT_IF_ABSENT])
async def test_keys_lost_in_the_middle(tmp_path: Path, operation: Operation) -> None:
    store = FaultyObjectStore(MemoryObjectStore())
    async with engine(tmp_path, store=store, config=EAGER, cache_capacity_bytes=0) as one:
        _, history = await filled(one, layers=4)
        timeline = await one.open()
        listed = timeline._known_index().layers
        hold = store.hold(operation)
        compacting = asyncio.create_task(timeline.compactor.compact(force=True))
        await hold.reached.wait()
        revoking = asyncio.create_task(one.keys.revoke(one.project_id))
        await wait_until(lambda: not timeline.is_live)
        hold.release.set()
        await revoking
        with pytest.raises(KeyAccessError):
            await compacting
        assert timeline._known_index().layers == listed
        assert timeline.compactor.fault == ""
        with pytest.raises(UnavailableError):
            await timeline.history.collect()
        await one.keys.restore(one.project_id)
        await timeline.reopen()
        await timeline.compactor.compact(force=True)
        await grow(timeline, 1)
        await check(timeline, history)
        assert await only_listed_layers(one, timeline)


async def test_rotations_at_the_same_time(tmp_path: Path) -> None:
    """Flushes, merges, images, GC, re-wraps and re-keys all publish; old KEKs can go, and nothing is lost."""
    async with engine(tmp_path / "a", config=EAGER) as one:
        timeline, _ = await filled(one, layers=2)
        stop = asyncio.Event()

        async def write() -> int:
            rounds = 0
            while not stop.is_set():
                await grow(timeline, 1)
                rounds += 1
                await asyncio.sleep(0.01)
            return rounds

        async def compact() -> None:
            while not stop.is_set():
                await timeline.compactor.compact(force=True)
                await timeline.history.collect()
                await asyncio.sleep(0)

        async def read() -> None:
            while not stop.is_set():
                await pages(timeline, timeline.last_record_lsn)
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            writer = group.create_task(write())
            group.create_task(compact())
            group.create_task(read())
            for _ in range(3):
                one.keys.rotate(one.project_id, rekey=True)
                await keep(project_keys(one, timeline), rekey=True)
                # Counted while all goes on: nothing that is written later may be under an older KEK.
                found = await uses(one, timeline)
                version = one.lease.kek_version
                assert {kek for kek, _ in versions(found)} == {version}
                for old in range(1, version):
                    with contextlib.suppress(KeyError):
                        one.keys.destroy(one.project_id, old)
            stop.set()
        want = await pages(timeline, timeline.last_record_lsn)
        assert [count(page) for page in want] == [2 + writer.result()] * BLOCKS
        async with engine(tmp_path / "b", like=one, config=EAGER) as two:
            fresh = await two.open()
            assert await pages(fresh, fresh.last_record_lsn) == want
            await grow(fresh, 1)
            assert await only_listed_layers(two, fresh)


# --- what is kept ---


async def test_the_cutoff_is_durable_before_anything_is_gone(tmp_path: Path) -> None:
    store = FaultyObjectStore(MemoryObjectStore())
    async with engine(tmp_path, store=store, config=EAGER) as one:
        timeline, history = await filled(one)
        await timeline.compactor.compact(force=True)
        store.calls.clear()
        result = await timeline.history.collect()
        assert result.layers > 0
        calls = store.calls

        def first(call: Call) -> int:
            return calls.index(call)

        indexed = max(first(c) for c in calls if c.operation is Operation.PUT_IF_ABSENT and "/index/" in c.key)
        deleted = [n for n, c in enumerate(calls) if c.operation is Operation.DELETE_MANY and "/layers/" in c.key]
        looked = [n for n, c in enumerate(calls) if c.operation is Operation.HEAD and n > indexed]
        assert indexed < looked[-1] < min(deleted), "index, then validation, then deletes"
        fresh = await one.open()
        assert fresh.oldest_lsn == timeline.oldest_lsn == max(history)
        for reader in (timeline, fresh):
            with pytest.raises(InvalidInputError, match=f"not kept any more: history begins at {Lsn(max(history))}"):
                await pages(reader, max(history) - 1)
            await check(reader, history)


async def test_leases_branch_points_and_holders_keep_what_they_read(tmp_path: Path) -> None:
    clock = ManualClock()
    async with engine(tmp_path, config=replace(EAGER, lsn_lease_s=10.0), clock=clock) as one:
        timeline, history = await filled(one, layers=8)
        leased, held, branched, other = sorted(history)[:4]
        collector = timeline.history
        with pytest.raises(UnavailableError, match="LSN leases from before"):
            await collector.collect()
        clock.advance(10)
        collector.retain_lsns = lambda: [branched]
        assert collector.lease(leased) == pytest.approx(10)
        with pytest.raises(InvalidInputError, match="lasts up to 10 s"):
            collector.lease(leased, 10.5)  # after a restart it would be forgotten before its end
        with collector.held(held):
            await timeline.compactor.compact(force=True)
            await collector.collect()
            for lsn in (leased, held, branched):
                assert await pages(timeline, lsn) == history[lsn]
            for refused in (other, leased + 1, branched - 1):
                with pytest.raises(InvalidInputError):
                    await pages(timeline, refused)
                with pytest.raises(InvalidInputError):
                    collector.lease(refused)
                with pytest.raises(InvalidInputError), collector.held(refused):
                    pass
            clock.advance(9)
            collector.lease(leased)
        clock.advance(9)
        await collector.collect()
        assert await pages(timeline, leased) == history[leased]
        with pytest.raises(InvalidInputError):
            await pages(timeline, held)
        clock.advance(2)
        with pytest.raises(InvalidInputError):
            await pages(timeline, leased)
        before = timeline.layer_count
        collector.retain_lsns = list
        await collector.collect()
        assert timeline.layer_count < before

        def unknown() -> list[int]:
            raise UnavailableError("branches are not known yet")

        await grow(timeline, 2)
        collector.retain_lsns = unknown
        with pytest.raises(UnavailableError, match="branches"):
            await collector.collect()
        assert timeline.oldest_lsn == max(history)


async def test_a_window_in_time(tmp_path: Path) -> None:
    clock = ManualClock()
    async with engine(tmp_path, config=EAGER, clock=clock) as one:
        timeline = await begun(one)
        clock.advance(600)
        await timeline.history.set_retention(Retention(0, 3600))
        history: dict[int, int] = {}
        for minute in range(0, 180, 10):
            await grow(timeline, 1)
            history[minute] = timeline.last_record_lsn
            clock.advance(600)
            await timeline.compactor.compact(force=True)
            await timeline.history.collect()
            # What stood an hour ago can be read, whenever one looks; not much more is kept.
            then = max((m for m in history if m <= minute + 10 - 60), default=-10)
            assert timeline.oldest_lsn == history.get(then, INITDB_LSN)
            await pages(timeline, timeline.oldest_lsn)
        fresh = await one.open()
        assert fresh.retention == Retention(0, 3600)
        assert fresh.oldest_lsn == timeline.oldest_lsn > INITDB_LSN
        # A longer window brings nothing back, and a shorter one counts at once.
        await fresh.history.set_retention(Retention(0, 7200))
        clock.advance(1)
        assert (await fresh.history.collect()).cutoff_lsn == timeline.oldest_lsn
        await fresh.history.set_retention(Retention(1 << 40, 0))
        assert (await fresh.history.collect()).cutoff_lsn == timeline.oldest_lsn
        await fresh.history.set_retention(Retention(0, 0))
        assert (await fresh.history.collect()).cutoff_lsn == fresh.last_record_lsn


async def test_local_disk_is_bounded(tmp_path: Path) -> None:
    """The cache of sealed layers never takes more than it may, and everything is read all the same."""
    limit = 64 * 1024
    config = replace(EAGER, chunk_size_bytes=2048, chunk_cache_bytes=2048, page_cache_bytes=1, index_cache_bytes=1)
    cache = tmp_path / "cache"

    def on_disk() -> int:
        return sum(path.stat().st_size for path in cache.rglob("layers/*"))

    async with engine(cache, config=config, cache_capacity_bytes=limit) as one:
        timeline, history = await filled(one, layers=12)
        fetching = asyncio.create_task(one.files.run())
        highest = 0

        async def watch() -> None:
            nonlocal highest
            while True:
                highest = max(highest, on_disk())
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        for _ in range(3):
            await check(timeline, history)
            await grow(timeline, 2)
            await timeline.compactor.compact()
        for task in (watching, fetching):
            task.cancel()
        await asyncio.gather(watching, fetching, return_exceptions=True)
        assert timeline.layer_size_bytes > 2 * limit
        assert 0 < highest <= limit
        assert one.files.size_bytes <= limit
        assert one.files.local_reads
        assert one.files.remote_reads
