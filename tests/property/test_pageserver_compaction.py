"""Compaction and GC against naive models: the plans alone, and a timeline whose every version stays what it was."""

from __future__ import annotations

import asyncio
import struct
import tempfile
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pageserver import native
from pageserver.compaction import deltas_above, depth, holes, image_lsn, partitions, plan_images, plan_merge
from pageserver.gc import unneeded_layers
from pageserver.layer.layer_map import LayerMap
from pageserver.layer.name import LayerDescriptor, LayerKind, layer_name
from pageserver.retention import HistoryPoint, Retention, gc_cutoff, remember
from pageserver.timeline import Timeline
from shared.clock import ManualClock
from shared.errors import CorruptedError, InvalidInputError
from shared.keyspace import KEY_SIZE_BYTES, WHOLE_KEYSPACE, Fork, KeyRange, RelTag, Slru, slru_key
from shared.wal.rmgr_clog import XidStatus
from tests.fixtures.pageserver import (
    IMAGE,
    INITDB_LSN,
    NATIVE,
    QUICK,
    TOMBSTONE,
    WAL,
    WAL_INIT,
    Engine,
    engine,
    page_of,
    record,
)
from tests.property.test_pageserver_timeline import Oracle

# --- plans ---

KEYS = 6
LSNS = 12


def key_at(number: int) -> bytes:
    return number.to_bytes(KEY_SIZE_BYTES, "big")


@st.composite
def layer_sets(draw: st.DrawFn) -> list[LayerDescriptor]:
    """Layers as an index may list them."""
    layers: list[LayerDescriptor] = []
    for number in range(draw(st.integers(0, 10))):
        first = draw(st.integers(1, KEYS))
        keys = KeyRange(key_at(first), key_at(draw(st.integers(first + 1, KEYS + 1))))
        start = draw(st.integers(1, LSNS))
        kind = draw(st.sampled_from(LayerKind))
        end = start + 1 if kind is LayerKind.IMAGE else draw(st.integers(start + 1, LSNS + 1))
        level = draw(st.integers(0, 1))
        layer = LayerDescriptor(layer_name(kind, start, end, 1, f"{number:016x}"), kind, keys, start, end, 1, level)
        try:
            LayerMap([*layers, layer])
        except CorruptedError:
            continue
        layers.append(layer)
    return layers


def visited(layers: LayerMap, key: bytes, lsn: int) -> list[tuple[LayerDescriptor, tuple[int, int]]]:
    """What a read may need: layers, each with the LSNs of it that count, as if every key had a value at each."""
    image = layers.image(key, lsn)
    floor = 0 if image is None else image.lsn_start
    found = [
        (layer, (max(layer.lsn_start, floor + 1), min(layer.last_lsn, lsn))) for layer in layers.deltas(key, lsn, floor)
    ]
    return found + ([] if image is None else [(image, (floor, floor))])


@settings(max_examples=150, deadline=None)
@given(layer_sets(), st.integers(0, LSNS + 1), st.sets(st.integers(1, LSNS), max_size=2))
def test_gc_removes_exactly_what_no_read_needs(layers: list[LayerDescriptor], cutoff: int, retained: set[int]) -> None:
    gone = {layer.name for layer in unneeded_layers(layers, cutoff, retained)}
    before, after = LayerMap(layers), LayerMap(layer for layer in layers if layer.name not in gone)
    needed: set[str] = set()
    for number in range(1, KEYS + 1):
        for lsn in {*range(max(cutoff, 1), LSNS + 2), *retained}:
            wanted = visited(before, key_at(number), lsn)
            assert visited(after, key_at(number), lsn) == wanted
            needed |= {layer.name for layer, _ in wanted}
    # Images of one LSN for one key stand in for each other: such twins are never made, and may both stay.
    twins = {
        one.name
        for one in layers
        for other in layers
        if one is not other and one.kind is other.kind is LayerKind.IMAGE and one.lsn_start == other.lsn_start
    }
    newer = {layer.name for layer in layers if layer.last_lsn > cutoff}
    assert {layer.name for layer in layers} - gone <= needed | newer | twins


@settings(max_examples=100, deadline=None)
@given(layer_sets(), st.integers(1, LSNS))
def test_partitions_are_what_the_layer_map_says(layers: list[LayerDescriptor], lsn: int) -> None:
    parts = partitions(layers, lsn)
    assert parts[0].key_range.start == WHOLE_KEYSPACE.start
    assert parts[-1].key_range.end == WHOLE_KEYSPACE.end
    for part, following in pairwise(parts):
        assert part.key_range.end == following.key_range.start
    whole = LayerMap(layers)
    for number in range(1, KEYS + 1):
        (part,) = [part for part in parts if key_at(number) in part.key_range]
        assert part.image == whole.image(key_at(number), lsn)
        floor = -1 if part.image is None else part.image.lsn_start
        assert {layer.name for layer in whole.deltas(key_at(number), lsn, floor)} <= {
            layer.name for layer in deltas_above(layers, part, lsn)
        }


@settings(max_examples=100, deadline=None)
@given(layer_sets(), st.integers(1, 3))
def test_images_are_planned_where_many_layers_lie(layers: list[LayerDescriptor], threshold: int) -> None:
    lsn = image_lsn(layers)
    if lsn is None:
        return
    parts = [(part, deltas_above(layers, part, lsn)) for part in partitions(layers, lsn)]
    plans = plan_images(parts, lsn, threshold, lambda layer, keys: True)
    whole = LayerMap(layers)
    for number in range(1, KEYS + 1):
        (part,) = [part for part, _ in parts if key_at(number) in part.key_range]
        deltas = list(whole.deltas(key_at(number), lsn, -1 if part.image is None else part.image.lsn_start))
        planned = any(key_at(number) in plan.key_range for plan in plans)
        assert planned or len(deltas) < threshold
        assert len(deltas) <= depth(deltas_above(layers, part, lsn))
    assert not plan_images(parts, lsn, 99, lambda layer, keys: True)
    lazy = plan_images(parts, lsn, threshold, lambda layer, keys: False)
    assert all(depth(deltas_above(layers, part, lsn)) >= 4 * threshold for part, _ in parts
               if any(part.key_range.start in plan.key_range for plan in lazy))  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(layer_sets(), st.integers(1, 4))
def test_a_merge_takes_the_oldest(layers: list[LayerDescriptor], threshold: int) -> None:
    flushed = [layer for layer in layers if layer.level == 0 and layer.kind is LayerKind.DELTA]
    taken = plan_merge(layers, threshold, 3)
    assert bool(taken) == (len(flushed) >= threshold)
    assert len(taken) == (min(3, len(flushed)) if taken else 0)
    assert all(one.lsn_start <= other.lsn_start for one in taken for other in flushed if other not in taken)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_holes_end_where_something_is_held_again(held: list[bool]) -> None:
    layers = [
        LayerDescriptor(
            layer_name(LayerKind.IMAGE, 5, 6, 1, f"{number:016x}"),
            LayerKind.IMAGE, KeyRange(key_at(number), key_at(number + 1)), 5, 6, 1,
        )
        for number in range(len(held))
    ]  # fmt: skip
    parts = partitions(layers, 5)[: len(held)]
    cuts = holes(parts, lambda keys: held[int.from_bytes(keys.start, "big")])
    assert len(cuts) <= 16
    for cut in cuts:
        number = int.from_bytes(cut, "big")
        assert not held[number - 1]
        assert number == len(held) or held[number]


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 1000)), max_size=60),
    st.integers(0, 3000),
    st.integers(0, 3000),
)
def test_history_says_how_far_back_the_window_reaches(steps: list[tuple[int, int]], age_s: int, lsn_bytes: int) -> None:
    """Never shorter than asked for; longer by at most a share of it, beside pauses of the clock."""
    now_s, lsn = 0, 100
    every: list[HistoryPoint] = [HistoryPoint(0, 100)]
    kept: tuple[HistoryPoint, ...] = (every[0],)
    cutoff = 100
    for seconds, size in steps:
        now_s, lsn = now_s + seconds, lsn + size
        every.append(HistoryPoint(now_s, lsn))
        kept = remember(kept, now_s, lsn, age_s)
        before, cutoff = cutoff, gc_cutoff(Retention(lsn_bytes, age_s), kept, now_s, lsn, cutoff)
        exact = max((point.lsn for point in every if point.time_s <= now_s - age_s), default=0)
        assert before <= cutoff <= max(before, min(exact if age_s else lsn, lsn - lsn_bytes))
        assert kept == tuple(sorted(kept))
        assert len(kept) <= 600


# --- a timeline ---

RELS = [RelTag(1663, 5, 16384, Fork.MAIN), RelTag(1663, 5, 16390, Fork.MAIN)]
BLOCKS = 4
CLOG = slru_key(Slru.CLOG, 0)
TINY = replace(
    QUICK,
    image_threshold_values=3,
    chunk_size_bytes=700,
    chunk_cache_bytes=3000,
    index_cache_bytes=1,
    page_cache_bytes=20_000,
    compaction_l0_layers=3,
    compaction_l0_layers_at_once=4,
    compaction_target_bytes=12_000,
    image_layer_deltas=2,
    lsn_lease_s=3600.0,
    retention=Retention(0, 0),
)


@dataclass
class Life:
    """A timeline, an oracle that keeps everything, and the sizes that ingest would know."""

    timeline: Timeline
    clock: ManualClock
    oracle: Oracle = field(default_factory=Oracle)
    leased: set[int] = field(default_factory=set)
    lsns: list[int] = field(default_factory=lambda: [INITDB_LSN])

    def size(self, rel: RelTag, lsn: int) -> int:
        value = self.oracle.read(rel.size_key(), lsn)
        return 0 if value is None else int(struct.unpack(">I", value)[0])

    async def put(self, changes: list[tuple[int, int, int, int]], native_change: bool) -> None:
        """(relation, block, kind, number): as ingest writes them, with sizes, and blocks that start from zeros."""
        lsn = self.timeline.last_record_lsn
        prev, at = lsn, lsn + 0x10
        values: list[tuple[bytes, int, int, bytes]] = []
        for index, block, kind, number in changes:
            rel = RELS[index]
            payload = {IMAGE: page_of(number)}.get(kind, record(100 + number, struct.pack(">H", number)))
            old = self.size(rel, lsn)
            if block >= old:
                values += [(rel.block_key(gap), at - 1, TOMBSTONE, b"") for gap in range(old, block + (kind == WAL))]
                values.append((rel.size_key(), at, IMAGE, struct.pack(">I", block + 1)))
            values.append((rel.block_key(block), at, kind, payload))
        if native_change:
            values.append((CLOG, at, NATIVE, native.pack_clog_set([at % 32768], XidStatus.COMMITTED)))
        await self.take(values, at, prev)

    async def resize(self, index: int, blocks: int | None) -> None:
        rel = RELS[index]
        lsn = self.timeline.last_record_lsn
        if blocks is not None and blocks >= self.size(rel, lsn):
            return
        kind, payload = (TOMBSTONE, b"") if blocks is None else (IMAGE, struct.pack(">I", blocks))
        await self.take([(rel.size_key(), lsn + 8, kind, payload)], lsn + 8, lsn)

    async def take(self, values: list[tuple[bytes, int, int, bytes]], lsn: int, prev: int) -> None:
        for value in values:
            self.oracle.put(*value)
        await self.timeline.put_batch(values, lsn, prev)
        self.lsns.append(lsn)

    async def check(self, lsn: int) -> None:
        """Everything that a client can see at `lsn`."""
        timeline = self.timeline
        for rel in RELS:
            size = self.size(rel, lsn)
            assert (await timeline.rel_size(rel, lsn) or 0) == size
            want = [self.oracle.read(rel.block_key(block), lsn) for block in range(size)]
            assert await timeline.get_pages(rel, range(size), lsn) == want
        assert await timeline.get(CLOG, lsn) == self.oracle.read(CLOG, lsn)

    async def check_all(self) -> None:
        """Every version from the oldest one on, and every leased one below it."""
        oldest = self.timeline.oldest_lsn
        for lsn in self.lsns:
            if lsn >= oldest or lsn in self.leased:
                await self.check(lsn)
            else:
                with pytest.raises(InvalidInputError, match="not kept any more"):
                    await self.timeline.get(CLOG, lsn)

    async def collect(self, kept_bytes: int) -> None:
        timeline = self.timeline
        before = timeline.oldest_lsn
        await timeline.history.set_retention(Retention(kept_bytes, 0))
        result = await timeline.history.collect()
        assert result.cutoff_lsn == timeline.oldest_lsn == max(before, timeline.remote_consistent_lsn - kept_bytes)

    async def restart(self, process: Engine, *, lose_keys: bool) -> None:
        durable = self.timeline.remote_consistent_lsn
        self.oracle.forget_after(durable)
        self.lsns = [lsn for lsn in self.lsns if lsn <= durable]
        self.leased = {lsn for lsn in self.leased if lsn <= durable}
        if lose_keys:
            await process.keys.revoke(process.project_id)
            await process.keys.restore(process.project_id)
            await self.timeline.reopen()
            return
        self.timeline = await process.open(at_least_lsn=durable)
        self.clock.advance(TINY.lsn_lease_s)
        oldest = self.timeline.oldest_lsn
        self.leased = {lsn for lsn in self.leased if lsn >= oldest}  # those of a process end with it
        for lsn in self.leased:
            self.timeline.history.lease(lsn)


change = st.tuples(
    st.integers(0, 1),
    st.integers(0, BLOCKS - 1),
    st.sampled_from([WAL, WAL, WAL, WAL, WAL_INIT, IMAGE]),
    st.integers(0, 200),
)
put = st.tuples(st.just("put"), st.lists(change, min_size=1, max_size=4, unique_by=lambda one: one[0]), st.booleans())
step = st.one_of(
    put,
    put,
    put,
    st.just(("checkpoint",)),
    st.just(("checkpoint",)),
    st.just(("compact",)),
    st.just(("force",)),
    st.tuples(st.just("resize"), st.integers(0, 1), st.none() | st.integers(0, BLOCKS)),
    st.tuples(st.just("gc"), st.integers(0, 0x60)),
    st.tuples(st.just("lease"), st.floats(0, 1)),
    st.sampled_from([("restart",), ("lose keys",), ("check",)]),
)


async def play(steps: list[tuple[object, ...]], root: Path) -> None:
    initdb = [(rel.block_key(block), page_of(block)) for rel in RELS for block in range(2)]
    initdb += [(rel.size_key(), struct.pack(">I", 2)) for rel in RELS]
    initdb += [(CLOG, bytes(8192))]
    clock = ManualClock()
    async with engine(root, config=TINY, cache_capacity_bytes=20_000, clock=clock) as process:
        life = Life(await process.create(initdb), clock)
        clock.advance(TINY.lsn_lease_s)
        for key, value in initdb:
            life.oracle.put(key, INITDB_LSN, IMAGE, value)
        for name, *arguments in steps:
            match name, arguments:
                case "put", [list(changes), bool(native_change)]:
                    await life.put(changes, native_change)
                case "resize", [int(index), blocks]:
                    assert blocks is None or isinstance(blocks, int)
                    await life.resize(index, blocks)
                case "checkpoint", _:
                    await life.timeline.checkpoint()
                case "compact", _:
                    await life.timeline.compactor.compact()
                case "force", _:
                    await life.timeline.compactor.compact(force=True)
                    assert life.timeline.l0_layer_count == 0
                case "gc", [int(kept_bytes)]:
                    await life.collect(kept_bytes)
                case "lease", [float(share)]:
                    lsn = life.lsns[int(share * (len(life.lsns) - 1))]
                    if lsn >= life.timeline.oldest_lsn:
                        life.timeline.history.lease(lsn)
                        life.leased.add(lsn)
                case "check", _:
                    await life.check_all()
                case (("restart" | "lose keys"), _):
                    await life.restart(process, lose_keys=name == "lose keys")
        await life.check_all()
        await life.timeline.checkpoint()
        await life.timeline.compactor.compact(force=True)
        await life.collect(0x20)
        await life.check_all()
        life.leased.clear()
        life.timeline = await process.open()
        await life.check_all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(step, max_size=20) | st.lists(step, min_size=20, max_size=60))
def test_every_version_stays_what_it_was(steps: list[tuple[object, ...]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        asyncio.run(play(steps, Path(root)))
