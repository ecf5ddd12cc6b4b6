"""How fast the pageserver's storage engine is, without redo, network and decoding: puts, flush, reads.

    python benchmarks/pageserver_storage.py [--wal-mb 64] [--store memory|local] [--null]

The values look like those of pgbench's TPC-B at scale 10: 600,000 per 64 MiB of WAL, about 100 bytes each, mostly on
random pages of accounts, some on few hot pages, a commit-log bit per transaction. Redo is a Python function that costs
nothing worth mentioning, so what remains is the engine itself. Sealing is AES-256-GCM unless `--null` (then
KEYLAKE_UNSAFE_NULL_CIPHER=1 must be set): the difference is the price of encryption.

Loop delay: a task that sleeps for 1 ms while the flush runs, and notes how much later than that it woke up. That is
what a GetPage that arrives during a flush waits for the event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import resource
import statistics
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import uvloop

from benchmarks.harness import percentile
from pageserver.layer.in_memory import InMemoryLayer, KeyedValue
from pageserver.layer_cache import LayerCache
from pageserver.native import pack_clog_set
from pageserver.timeline import InitdbPosition, Timeline, TimelineConfig, TimelineServices
from shared.crypto.aead import null_cipher_allowed
from shared.ids import ProjectId, TimelineId
from shared.keyspace import REL_SIZE, Fork, RelTag, Slru, field1_range, pack_key, slru_key
from shared.storage.base import ObjectStore
from shared.storage.local import LocalObjectStore
from shared.storage.memory import MemoryObjectStore
from shared.storage.threads import BlockingPool
from shared.wal.rmgr_clog import XidStatus
from tests.fixtures.keys import InMemoryKeySource, ignore_loss

ACCOUNTS = RelTag(1663, 5, 16397, Fork.MAIN)
ACCOUNTS_BLOCKS = 16_394
HISTORY = RelTag(1663, 5, 16400, Fork.MAIN)
HOT = [RelTag(1663, 5, rel, Fork.MAIN) for rel in (16403, 16406)]
INDEX = RelTag(1663, 5, 16410, Fork.MAIN)
WAL, WAL_INIT, IMAGE, NATIVE = 1, 2, 0, 3
INITDB_LSN = 0x1500000
PAGE = bytes(range(256)) * 32


class NoRedo:
    """Returns a page without looking at the records."""

    def __init__(self) -> None:
        self.records = 0

    async def apply(
        self, rel: tuple[int, int, int], fork: int, blkno: int, base: bytes | None, records: Sequence[tuple[int, bytes]]
    ) -> bytes:
        self.records += len(records)
        return PAGE


def workload(wal_bytes: int, start: int, seed: int) -> list[tuple[list[KeyedValue], int, int]]:
    """Batches as ingest makes them: (values, last_record_lsn, prev_record_lsn)."""
    rng = random.Random(seed)
    batches: list[tuple[list[KeyedValue], int, int]] = []
    lsn, xid, values = start, 1000, []
    end = start + wal_bytes
    prev = start
    pool = rng.randbytes(1 << 16)
    while lsn < end:
        block = rng.randrange(ACCOUNTS_BLOCKS)
        keys = [
            ACCOUNTS.block_key(block),
            ACCOUNTS.block_key(rng.randrange(ACCOUNTS_BLOCKS)),
            HOT[0].block_key(rng.randrange(10)),
            HOT[1].block_key(rng.randrange(4)),
            HISTORY.block_key((xid - 1000) // 150),
        ]
        if xid % 4 == 0:
            keys.append(INDEX.block_key(rng.randrange(2_700)))
        for key in keys:
            prev, lsn = lsn, lsn + 120
            at = rng.randrange(60_000)
            values.append((key, lsn, WAL, pool[at : at + 60 + at % 90]))
        prev, lsn = lsn, lsn + 40
        values.append((slru_key(Slru.CLOG, xid // 32768), lsn, NATIVE, pack_clog_set([xid], XidStatus.COMMITTED)))
        xid += 1
        if len(values) >= 500:
            batches.append((values, lsn, prev))
            values = []
    if values:
        batches.append((values, lsn, prev))
    return batches


def initdb_values() -> list[tuple[bytes, bytes]]:
    values = [(ACCOUNTS.block_key(block), PAGE) for block in range(ACCOUNTS_BLOCKS)]
    values += [(INDEX.block_key(block), PAGE) for block in range(2_700)]
    values += [(HISTORY.block_key(block), PAGE) for block in range(2_000)]
    values += [(rel.block_key(block), PAGE) for rel in HOT for block in range(10)]
    values += [(slru_key(Slru.CLOG, page), bytes(8192)) for page in range(16)]
    values += [(pack_key(REL_SIZE, 1663, 5, rel, 0, 0), struct.pack(">I", 20_000)) for rel in range(16384, 17384)]
    return values


async def loop_delay(delays: list[float]) -> None:
    while True:
        started = perf_counter()
        await asyncio.sleep(0.001)
        delays.append(perf_counter() - started - 0.001)


def report(name: str, value: str) -> None:
    print(f"{name:<58} {value}")


def report_delays(name: str, delays: list[float]) -> None:
    report(
        name,
        f"p50 {1e3 * statistics.median(delays):.2f}  p99 {1e3 * percentile(delays, 0.99):.2f}  "
        f"max {1e3 * max(delays):.1f} ms",
    )


async def timed_reads(name: str, timeline: Timeline, requests: Sequence[tuple[RelTag, int]], lsn: int) -> None:
    times = []
    for rel, block in requests:
        started = perf_counter()
        await timeline.get_page(rel, block, lsn)
        times.append(perf_counter() - started)
    report(
        name,
        f"mean {1e6 * statistics.mean(times):.1f}  p50 {1e6 * statistics.median(times):.1f}  "
        f"p99 {1e6 * percentile(times, 0.99):.1f} µs",
    )


def bench_puts(batches: list[tuple[list[KeyedValue], int, int]]) -> None:
    count = sum(len(values) for values, _, _ in batches)
    best = float("inf")
    for _ in range(3):
        layer = InMemoryLayer(INITDB_LSN + 1)
        gc.collect()
        started = perf_counter()
        for values, _, _ in batches:
            layer.put_all(values)
        best = min(best, perf_counter() - started)
    report("put_all into an in-memory layer", f"{1e6 * best / count:.3f} µs/value, {count / best / 1e6:.2f} M values/s")
    report("  its accounting", f"{layer.size_bytes / 1e6:.0f} MB for {count} values on {layer.key_count} keys")


async def make(
    store: ObjectStore, root: Path, config: TimelineConfig, redo: NoRedo
) -> tuple[Callable[[], asyncio.Future[Timeline]], Timeline, BlockingPool]:
    keys = InMemoryKeySource()
    pool = BlockingPool(2, "bench")
    files = await LayerCache.open(store, root, 4 << 30, pool)
    project, timeline_id = ProjectId.new(), TimelineId.new()
    lease = await keys.acquire(project, ignore_loss)
    services = TimelineServices(store, files, keys, redo, pool)
    position = InitdbPosition(1, INITDB_LSN, INITDB_LSN - 120)
    started = perf_counter()
    values = initdb_values()
    timeline = await Timeline.create(project, timeline_id, services, lease, config, position, values)
    report("create: image layer, sealed and uploaded", f"{perf_counter() - started:.2f} s for {len(values)} keys")

    def reopen() -> asyncio.Future[Timeline]:
        return asyncio.ensure_future(Timeline.open(project, timeline_id, services, lease, config))

    return reopen, timeline, pool


async def bench_timeline(wal_bytes: int, store: ObjectStore, root: Path, layers: int) -> None:
    redo = NoRedo()
    config = TimelineConfig(checkpoint_distance_bytes=1 << 40)
    reopen, timeline, pool = await make(store, root, config, redo)
    lsn = INITDB_LSN
    background = asyncio.create_task(timeline.run())
    for number in range(layers):
        batches = workload(wal_bytes, lsn, number)
        count = sum(len(values) for values, _, _ in batches)
        gc.collect()
        delays: list[float] = []
        ticker = asyncio.create_task(loop_delay(delays))
        took = 0.0
        before = redo.records
        for values, last, prev in batches:
            started = perf_counter()
            await timeline.put_batch(values, last, prev)
            took += perf_counter() - started
            await asyncio.sleep(0)  # as the WAL receiver does
        ticker.cancel()
        lsn = timeline.last_record_lsn
        del batches, values
        if number == 0:
            report(
                "put_batch, batches of 500",
                f"{1e6 * took / count:.3f} µs/value ({wal_bytes / took / 1e6:.0f} MB of WAL/s)",
            )
            report_delays("  loop delay meanwhile, with images of hot pages", delays)
            report("  images of hot pages", f"{redo.records - before} records redone")
            accounts = [(ACCOUNTS, random.randrange(ACCOUNTS_BLOCKS)) for _ in range(5000)]
            await timed_reads("get_page, values in memory, base in a layer, first", timeline, accounts, lsn)
            await timed_reads("get_page, page cache", timeline, accounts[-1000:], lsn)
            await timed_reads("get_page, one record older (reapplied)", timeline, accounts[-1000:], lsn - 4000)
        delays = []
        ticker = asyncio.create_task(loop_delay(delays))
        before = redo.records
        cpu = resource.getrusage(resource.RUSAGE_SELF)
        started = perf_counter()
        await timeline.checkpoint()
        took = perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_SELF)
        ticker.cancel()
        stats = timeline.last_flush
        cpu_s = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
        report(
            f"flush of layer {number + 1}: {count} values, {wal_bytes >> 20} MB of WAL",
            f"{took:.2f} s ({cpu_s:.2f} s CPU), {stats.plaintext_size_bytes / took / 1e6:.0f} MB/s of layer",
        )
        report(
            "  of it",
            f"build {stats.build_s:.2f}, {stats.images} images {stats.images_s:.2f} ({redo.records - before} records), "
            f"seal {stats.seal_s:.3f}, upload {stats.upload_s:.3f} s; {stats.plaintext_size_bytes / 1e6:.0f} MB",
        )
        report_delays("  loop delay meanwhile", delays)
    await timeline.drop_plaintext()
    background.cancel()

    timeline = await reopen()
    started = perf_counter()
    await timeline.get_page(ACCOUNTS, 0, lsn)
    report(
        f"first get_page after a restart ({layers + 1} layers to open)", f"{1e3 * (perf_counter() - started):.1f} ms"
    )
    accounts = [(ACCOUNTS, block) for block in random.sample(range(ACCOUNTS_BLOCKS), 6000)]
    await timed_reads("get_page, random, chunks from local disk", timeline, accounts[:3000], lsn)
    await timed_reads("get_page, random, chunks mostly in memory", timeline, accounts[3000:], lsn)
    await timed_reads("get_page, page cache", timeline, accounts[3000:], lsn)
    started = perf_counter()
    pages = 0
    for first in range(0, 8192, 256):
        pages += len(await timeline.get_pages(ACCOUNTS, range(first, first + 256), lsn - 3))
    took = perf_counter() - started
    report(
        "get_pages, batches of 256 (another LSN)",
        f"{1e6 * took / pages:.1f} µs/page, {pages * 8192 / took / 1e6:.0f} MB/s",
    )
    started = perf_counter()
    found = await timeline.scan(field1_range(REL_SIZE), lsn)
    report(f"scan of {len(found)} relation sizes", f"{1e3 * (perf_counter() - started):.1f} ms")
    await timeline.drop_plaintext()
    await pool.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wal-mb", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--store", choices=["memory", "local"], default="local")
    parser.add_argument("--null", action="store_true", help="seal with the null suite")
    arguments = parser.parse_args()
    if arguments.null != null_cipher_allowed():
        parser.error("--null goes together with KEYLAKE_UNSAFE_NULL_CIPHER=1")
    print(f"Python on {os.cpu_count()} cores; {'null cipher' if arguments.null else 'AES-256-GCM'}")
    bench_puts(workload(arguments.wal_mb << 20, INITDB_LSN, 0))
    with tempfile.TemporaryDirectory() as folder:
        store: ObjectStore
        if arguments.store == "local":
            store = await LocalObjectStore.open(Path(folder, "store"))
        else:
            store = MemoryObjectStore()
        await bench_timeline(arguments.wal_mb << 20, store, Path(folder, "cache"), arguments.layers)
        await store.close()
    report("peak memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    uvloop.run(main())
