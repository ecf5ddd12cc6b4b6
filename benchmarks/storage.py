"""WAL ingest into layers on one core; redo; GetPage@LSN warm; compute start at scale 10 against a stock basebackup."""

from __future__ import annotations

import asyncio
import random
import shutil
import statistics
import tempfile
from pathlib import Path
from time import perf_counter, process_time

import asyncpg

from benchmarks.harness import Row, pgbench_init, pgbench_tps, restored_start_s, run, socket_env, stock_primary
from keylake.cluster import Cluster
from keylake.demo.pgbench import run_pgbench
from pageserver.ingest_shell import IngestShell, load_tip
from pageserver.initdb_import import read_position, read_values
from pageserver.layer.in_memory import LONG_RUN_VALUES
from pageserver.layer_cache import LayerCache
from pageserver.project_redo import ProjectRedo
from pageserver.redo.build import prepare
from pageserver.redo.worker import RedoWorker
from pageserver.timeline import InitdbPosition, Timeline, TimelineConfig, TimelineServices
from shared.auth import Scope, Service, TokenIssuer
from shared.config import Address
from shared.entry import calm_garbage_collector
from shared.framed_tcp import connect
from shared.ids import ProjectId, TimelineId
from shared.keyspace import Fork, RelTag
from shared.lsn import WAL_SEGMENT_SIZE_BYTES
from shared.postgres import PostgresServer, find_postgres
from shared.storage.local import LocalObjectStore
from shared.storage.threads import BlockingPool
from shared.tls import client_context
from shared.wal.page import segment_file_name
from shared.wal.reader import WalStreamDecoder
from shared.wal.record import Rel, parse_blocks
from shared.wal.rmgr import RmgrId
from shared.wire.pagestream import GET_PAGE, MAX_FRAME_SIZE_BYTES, PAGE, BlockRequest, Open, parse_request_id
from tests.fixtures.keys import InMemoryKeySource, ignore_loss

_FEED_BYTES = 64 * 1024
_CLIENTS = 8


async def measure_ingest(scale: int = 10, transactions: int = 10_000, copied_rows: int = 800_000) -> list[Row]:
    """WAL decoded, ingested, sealed and uploaded, per second of CPU of this process, which collects garbage as rarely
    as a service does: of pgbench's load (rows one by one), of its TPC-B by 8 clients, of COPY without and with an
    index."""
    calm_garbage_collector()
    rows: list[Row] = []
    async with stock_primary(wal_keep_size="4GB", max_wal_size="8GB", shared_buffers="256MB") as server:
        await server.stop()
        position, values = read_position(server.pgdata), list(read_values(server.pgdata))
        await server.start()
        await pgbench_init(socket_env(server), scale)
        connection = await asyncpg.connect(host=server.host, port=server.port, user="postgres", database="postgres")
        loaded = await _flushed(connection)
        await run(
            find_postgres().program("pgbench"),
            "-n",
            "-c",
            str(_CLIENTS),
            "-t",
            str(transactions),
            env=socket_env(server),
        )
        executed = await _flushed(connection)
        await connection.execute("CREATE TABLE copied (id int, v text)")
        # As `COPY … FROM PROGRAM`, so that the client's speed does not matter.
        copy = f"COPY copied FROM PROGRAM 'seq -f \"%.0f\tsome text of a row\" {copied_rows}'"
        await connection.execute(copy)
        copied = await _flushed(connection)
        await connection.execute("CREATE INDEX ON copied (id)")
        await connection.execute(copy)
        await connection.close()
        await server.stop()
        root = Path(tempfile.mkdtemp(prefix="keylake-bench-"))
        pool = BlockingPool(4, "bench")
        try:
            store = await LocalObjectStore.open(root / "objects")
            keys = InMemoryKeySource()
            project = ProjectId.new()
            lease = await keys.acquire(project, ignore_loss)
            redo = ProjectRedo(await prepare())
            files = await LayerCache.open(store, root / "cache", 4 << 30, pool)
            services = TimelineServices(store, files, keys, redo, pool)
            start = InitdbPosition(position.system_identifier, position.initdb_lsn, position.last_record_lsn)
            timeline = await Timeline.create(
                project, TimelineId.new(), services, lease, TimelineConfig(), start, values
            )
            work = asyncio.create_task(timeline.run())
            shell = IngestShell(timeline, await load_tip(timeline))
            decoder = WalStreamDecoder(
                position.initdb_lsn,
                system_identifier=position.system_identifier,
                last_record_start=position.last_record_lsn,
            )
            for name, end, target in (
                ("pgbench's load", loaded, 25),
                ("pgbench's TPC-B", executed, 25),
                ("a COPY", copied, 60),
                ("a COPY into a table with an index", None, None),
            ):
                begun, cpu = perf_counter(), process_time()
                size = await _feed(server, decoder, shell, end)
                await timeline.checkpoint()
                wall, used = perf_counter() - begun, process_time() - cpu
                rate = size / used / 1e6
                rows.append(
                    Row(
                        f"WAL ingest of {name} into sealed layers, per core",
                        f"{rate:.1f} MB/s of CPU time ({size / wall / 1e6:.1f} of wall time, {size / 1e6:.0f} MB)",
                        "-",
                        None,
                        "report" if target is None else f">= {target} MB/s",
                        None if target is None else rate >= target,
                    )
                )
            work.cancel()
            await asyncio.wait([work])
            await redo.close()
            await store.close()
        finally:
            await pool.close()
            shutil.rmtree(root, ignore_errors=True)
    return rows


async def _flushed(connection: asyncpg.Connection[asyncpg.Record]) -> int:
    return int(await connection.fetchval("SELECT pg_current_wal_flush_lsn() - '0/0'::pg_lsn"))


async def measure_redo(repeats: int = 2000) -> list[Row]:
    """Pages of pgbench_accounts rebuilt by one redo worker, one request at a time: of one record, of 100, and
    of as many as a read may have to apply."""
    rows: list[Row] = []
    async with stock_primary(wal_keep_size="4GB", max_wal_size="8GB") as server:
        await pgbench_init(socket_env(server), 1)
        connection = await asyncpg.connect(host=server.host, port=server.port, user="postgres", database="postgres")
        await connection.execute("CHECKPOINT")
        start = await _flushed(connection)
        await pgbench_tps(socket_env(server), 8, 10)
        await server.stop()
        await connection.close()
        decoder = WalStreamDecoder(start)
        chains: dict[tuple[Rel, int], list[tuple[int, bytes]]] = {}
        while (segment := server.pgdata / "pg_wal" / segment_file_name(decoder.next_lsn)).exists():
            data = segment.read_bytes()[decoder.next_lsn % WAL_SEGMENT_SIZE_BYTES :]
            before = decoder.next_lsn
            for _, end, record in decoder.feed(before, data):
                for block in parse_blocks(record).blocks:
                    if record[17] in (RmgrId.HEAP, RmgrId.HEAP2) and block.fork == Fork.MAIN:
                        chain = chains.setdefault((block.rel, block.block_number), [])
                        if block.starts_over:
                            chain.clear()
                            chain.append((end, record))
                        elif chain:
                            chain.append((end, record))
            if decoder.next_lsn != before + len(data):
                break
    (rel, block_number), longest = max(chains.items(), key=lambda item: len(item[1]))
    worker = await RedoWorker.start(await prepare())
    try:
        for count, target_us in ((1, 60), (100, 1500), (LONG_RUN_VALUES, 1500)):
            begun, times = longest[0:1], []
            base = await worker.apply(rel, 0, block_number, None, begun)
            chain = longest[1 : 1 + count]
            for _ in range(repeats):
                at = perf_counter()
                await worker.apply(rel, 0, block_number, base, chain)
                times.append(perf_counter() - at)
            times.sort()
            median_us, p99_us = 1e6 * statistics.median(times), 1e6 * times[int(len(times) * 0.99)]
            rows.append(
                Row(
                    f"redo of {len(chain)} record{'s' if count > 1 else ''} of a heap page, round trip to the worker",
                    f"p50 {median_us:.0f} µs, p99 {p99_us:.0f} µs",
                    "-",
                    None,
                    f"<= {target_us} µs",
                    len(chain) == count and median_us <= target_us,
                )
            )
    finally:
        await worker.close()
    return rows


async def _feed(server: PostgresServer, decoder: WalStreamDecoder, shell: IngestShell, end: int | None) -> int:
    """Feed pg_wal up to `end` (None: to its end). Returns bytes."""
    size = 0
    while end is None or decoder.next_lsn < end:
        segment = server.pgdata / "pg_wal" / segment_file_name(decoder.next_lsn)
        if not segment.exists():
            return size
        data = segment.read_bytes()[decoder.next_lsn % WAL_SEGMENT_SIZE_BYTES :]
        before, offset = decoder.next_lsn, 0
        while offset < len(data):
            chunk = data[offset : offset + _FEED_BYTES]
            records = decoder.feed(before + offset, chunk)
            if records:
                await shell.ingest(records)
            await asyncio.sleep(0)
            offset += len(chunk)
            if decoder.next_lsn != before + offset:
                return size + decoder.next_lsn - before
        size += offset
    return size


async def measure_cluster(scale: int = 10, reads: int = 5000) -> list[Row]:
    """On one local cluster: GetPage warm by one client, and a compute's start."""
    async with Cluster() as cluster:
        project = await cluster.create_project("bench")
        await run_pgbench(project.connection, "-i", "-s", str(scale), "-I", "dtGvp", "-q")
        await run_pgbench(project.connection, "-n", "-c", "8", "-T", "10")
        connection = await asyncpg.connect(**project.connection.asyncpg_arguments())
        path = str(await connection.fetchval("SELECT pg_relation_filepath('pgbench_accounts')"))
        blocks = int(await connection.fetchval("SELECT pg_relation_size('pgbench_accounts') / 8192"))
        await connection.close()
        _, db, rel = path.split("/")
        tag = RelTag(1663, int(db), int(rel), Fork.MAIN)
        rows = [await _getpage(cluster, project.project.project_id, project.timeline.timeline_id, tag, blocks, reads)]
        starts = []
        for _ in range(3):
            await cluster.client.stop_endpoint(project.endpoint.endpoint_id)
            begun = perf_counter()
            connection = await asyncpg.connect(**project.connection.asyncpg_arguments(), timeout=60)
            await connection.fetchval("SELECT 1")
            starts.append(perf_counter() - begun)
            await connection.close()
        stages = (await cluster.client.endpoint(project.endpoint.endpoint_id)).stages
        ours = statistics.median(starts)
        async with stock_primary() as server:
            await pgbench_init(socket_env(server), scale)
            stock = await restored_start_s(server, server.pgdata.parent)
        rows.append(
            Row(
                f"compute start at scale {scale}, connect to first row",
                f"{ours:.2f} s (" + ", ".join(f"{s.stage} {s.seconds:.2f}" for s in stages if s.seconds > 0.005) + ")",
                f"{stock:.2f} s pg_basebackup and start",
                ours / stock,
                "report",
                None,
            )
        )
        return rows


async def _getpage(
    cluster: Cluster, project_id: ProjectId, timeline_id: TimelineId, tag: RelTag, blocks: int, reads: int
) -> Row:
    """Random blocks, one request at a time, over TLS. Warm: every block was read once before."""
    issuer = TokenIssuer.load(cluster.layout.keys / "compute.json")
    token = issuer.issue(Service.PAGESERVER, [Scope.STORAGE_READ], project_id=project_id)
    status = await cluster.client.pageserver_status()
    lsn = next(t.last_record_lsn.value for t in status.timelines if t.timeline_id == timeline_id)
    stream = await connect(
        Service.PAGESERVER,
        Address(port=cluster.ports.pages),
        client_context(cluster.layout.ca_certificate),
        token,
        MAX_FRAME_SIZE_BYTES,
    )
    await stream.send(Open(project_id, timeline_id).pack())
    rng = random.Random(1)
    chosen = [rng.randrange(blocks) for _ in range(min(reads, 2000))]

    async def read(number: int, block: int) -> float:
        begun = perf_counter()
        await stream.send(BlockRequest(number, lsn, tag, block).pack(GET_PAGE))
        frame = await stream.receive_one()
        took = perf_counter() - begun
        if frame is None or frame[0] != PAGE or parse_request_id(frame[1])[0] != number:
            raise RuntimeError(f"GetPage was answered with {frame and frame[0]}")
        return took

    for number, block in enumerate(chosen):
        await read(number, block)
    times = sorted([await read(number, rng.choice(chosen)) for number in range(reads)])
    await stream.close()
    mean, p99 = statistics.fmean(times) * 1000, times[int(len(times) * 0.99)] * 1000
    return Row(
        "GetPage@LSN, warm, one client, TLS",
        f"mean {mean:.3f} ms, p99 {p99:.3f} ms",
        "-",
        None,
        "mean <= 0.4 ms, p99 <= 1.5 ms",
        mean <= 0.4 and p99 <= 1.5,
    )
