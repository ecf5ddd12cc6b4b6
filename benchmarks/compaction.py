"""What compaction does to reads, and what it costs: pgbench-like WAL in many flushes, with and without it.

    python -m benchmarks compaction

Redo is a function that costs nothing worth mentioning, so what remains is layers. "Layers per read" counts delta and
image layers that a read of the newest version looks into, with no page cached.
"""

from __future__ import annotations

import asyncio
import gc
import random
import resource
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from benchmarks.harness import Row, percentile
from benchmarks.pageserver_storage import (
    ACCOUNTS,
    ACCOUNTS_BLOCKS,
    INDEX,
    INITDB_LSN,
    NoRedo,
    initdb_values,
    loop_delay,
    workload,
)
from pageserver.compactor import CompactionStats
from pageserver.layer.name import LayerDescriptor
from pageserver.layer.opened import OpenLayer
from pageserver.layer_cache import LayerCache
from pageserver.open_layers import OpenLayers
from pageserver.read_path import OpenRequest, gather
from pageserver.retention import Retention
from pageserver.timeline import InitdbPosition, Timeline, TimelineConfig, TimelineServices
from shared.ids import ProjectId, TimelineId
from shared.storage.local import LocalObjectStore
from shared.storage.threads import BlockingPool
from tests.fixtures.keys import InMemoryKeySource, ignore_loss

FLUSHES = 40
WAL_BYTES = 8 << 20
READS = 300
CONFIG = TimelineConfig(
    checkpoint_distance_bytes=1 << 40,
    image_threshold_values=1 << 30,  # or images inside of delta layers would end most chains
    compaction_target_bytes=8 << 20,
    retention=Retention(0, 0),
    lsn_lease_s=1e-6,
)


class _Counting:
    """Implements `Memory`, with nothing in it."""

    def __init__(self, layers: OpenLayers) -> None:
        self._layers = layers
        self.visited = 0

    def peek(self, layer: LayerDescriptor) -> OpenLayer | None:
        self.visited += 1
        return None

    def peek_bytes(self, layer: OpenLayer, start: int, end: int) -> bytes | None:
        return None

    async def open(self, layer: LayerDescriptor) -> OpenLayer:
        return await self._layers.open(layer)

    async def read(self, layer: OpenLayer, start: int, end: int) -> bytes:
        return await self._layers.read(layer, start, end)


async def _layers_visited(timeline: Timeline, layers: OpenLayers, keys: Sequence[bytes]) -> list[int]:
    counts = []
    live = timeline._live  # noqa: SLF001 - what a read would hold
    if live is None:
        raise RuntimeError("the timeline is not open")
    for key in keys:
        counting = _Counting(layers)
        plan = gather(live.snapshot, counting, key, timeline.last_record_lsn, None)
        try:
            request = next(plan)
            while True:
                if isinstance(request, OpenRequest):
                    request = plan.send(await counting.open(request.layer))
                else:
                    request = plan.send(await counting.read(request.layer, request.start, request.end))
        except StopIteration:
            counts.append(counting.visited)
    return counts


@dataclass(slots=True)
class _Run:
    visited: list[int]
    read_s: list[float]
    stats: CompactionStats
    compact_cpu_s: float
    delays_s: list[float]
    stored_bytes: int
    layers: int
    wal_bytes: int


async def _run(root: Path, *, compact: bool) -> _Run:
    keys = InMemoryKeySource()
    pool = BlockingPool(2, "bench")
    store = await LocalObjectStore.open(root / "store")
    files = await LayerCache.open(store, root / "cache", 4 << 30, pool)
    project, timeline_id = ProjectId.new(), TimelineId.new()
    lease = await keys.acquire(project, ignore_loss)
    services = TimelineServices(store, files, keys, NoRedo(), pool)
    position = InitdbPosition(1, INITDB_LSN, INITDB_LSN - 120)
    config = CONFIG if compact else replace(CONFIG, compaction_l0_layers=1 << 30, ingest_l0_layers=1 << 30)
    timeline = await Timeline.create(project, timeline_id, services, lease, config, position, initdb_values())
    cpu_s, delays = 0.0, list[float]()
    for number in range(FLUSHES):
        for values, last, prev in workload(WAL_BYTES, timeline.last_record_lsn, number):
            await timeline.put_batch(values, last, prev)
        await timeline.checkpoint()
        gc.collect()
        ticker = asyncio.create_task(loop_delay(delays)) if compact else None
        before = resource.getrusage(resource.RUSAGE_SELF)
        await timeline.compactor.compact()
        await timeline.history.collect()
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if ticker is not None:
            ticker.cancel()
    rng = random.Random(7)
    sample = [(rel, rng.randrange(blocks)) for rel, blocks in ((ACCOUNTS, ACCOUNTS_BLOCKS), (INDEX, 2_700))
              for _ in range(READS // 2)]  # fmt: skip
    live = timeline._live  # noqa: SLF001
    if live is None:
        raise RuntimeError("the timeline is not open")
    visited = await _layers_visited(timeline, live.layers, [rel.block_key(block) for rel, block in sample])
    read_s = []
    for rel, block in sample:
        started = perf_counter()
        await timeline.get_page(rel, block, timeline.last_record_lsn)
        read_s.append(perf_counter() - started)
    run = _Run(
        visited, read_s, timeline.compactor.stats, cpu_s, delays, timeline.layer_size_bytes, timeline.layer_count,
        timeline.last_record_lsn - INITDB_LSN,
    )  # fmt: skip
    await timeline.drop_plaintext()
    await pool.close()
    await store.close()
    return run


async def measure() -> list[Row]:
    """Read amplification and throughput of compaction."""
    with tempfile.TemporaryDirectory() as root:
        plain = await _run(Path(root, "plain"), compact=False)
        compacted = await _run(Path(root, "compacted"), compact=True)
    stats = compacted.stats
    wal = f"{compacted.wal_bytes / 1e6:.0f} MB of WAL in {FLUSHES} flushes"
    return [
        Row(
            f"layers per read, {wal}",
            f"mean {statistics.mean(compacted.visited):.1f}, max {max(compacted.visited)}",
            f"mean {statistics.mean(plain.visited):.1f}, max {max(plain.visited)} without compaction",
            max(compacted.visited) / max(plain.visited),
            "max ≤ 7 + 3·4 + 1",
            max(compacted.visited) <= 20,
        ),
        Row(
            "get_page without redo, page not cached",
            f"mean {1e3 * statistics.mean(compacted.read_s):.2f} ms",
            f"mean {1e3 * statistics.mean(plain.read_s):.2f} ms without compaction",
            statistics.mean(compacted.read_s) / statistics.mean(plain.read_s),
            "reported",
            None,
        ),
        Row(
            "compaction: sealed bytes of L0 per second of CPU, images and GC included",
            f"{stats.read_size_bytes / compacted.compact_cpu_s / 1e6:.0f} MB/s",
            f"{stats.merges} merges: {stats.merge_s:.1f} s, {stats.image_runs} runs of images: {stats.images_s:.1f} s",
            None,
            "≥ 10 MB/s",
            stats.read_size_bytes / compacted.compact_cpu_s >= 10e6,
        ),
        Row(
            "bytes written by compaction per byte of WAL",
            f"{stats.written_size_bytes / compacted.wal_bytes:.1f}",
            f"kept: {compacted.stored_bytes / 1e6:.0f} MB in {compacted.layers} layers; without compaction "
            f"{plain.stored_bytes / 1e6:.0f} MB in {plain.layers}",
            compacted.stored_bytes / plain.stored_bytes,
            "reported",
            None,
        ),
        Row(
            "delay of the event loop while it compacts",
            f"p50 {1e3 * statistics.median(compacted.delays_s):.1f}, "
            f"p99 {1e3 * percentile(compacted.delays_s, 0.99):.1f} ms",
            "",
            None,
            "reported",
            None,
        ),
    ]  # fmt: skip
