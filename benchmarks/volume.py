"""The lazy volume: a sequential scan of cold data beside the tmpfs volume, and TPC-B beside other disks, in one run.

    python -m benchmarks volume volume-tpcb

TPC-B runs on four Postgres servers with the same settings, read from the compute's own postgresql.conf, all reached by
a Unix socket, each with three synchronous standbys of which two must have a commit on disk. The computes have
safekeepers; the stock ones have `pg_receivewal --synchronous`. PGDATA is on

    the lazy volume    FUSE, pages from the pageserver, what is written sealed in a file on disk
    a plain directory  of the same disk, as it comes
    gocryptfs          FUSE, every file sealed, on the same disk
    the tmpfs volume   memory: what the volume alone costs, for the rest is ours on both sides

The computes are stopped after the load, so the pages of the lazy volume have come from the pageserver; accounts and its
index are read once before it begins, as the peers' files are in the kernel's cache from the load. Rounds go in turn, so
that a slow minute of the machine hits all alike; medians are compared.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.harness import (
    PLAINTEXT,
    KeylakeBench,
    Row,
    at_rest,
    pg_receivewals,
    pgbench_init,
    pgbench_tps,
    require_quorum,
    socket_env,
    stock_primary,
)
from benchmarks.peers import gocryptfs, not_measured
from compute.volume.base import VolumeKind
from keylake.cluster import Cluster

CLIENTS = (1, 8, 32)
NAMES = ["r1", "r2", "r3"]


@dataclass(frozen=True, slots=True)
class Scans:
    """MB/s of the first and the second sequential scan of the largest table after a start."""

    first: float
    second: float


def _settings(kind: VolumeKind) -> dict[str, dict[str, Any]]:
    return PLAINTEXT | {"compute": {"volume": kind.value, "volume_size_mb": 4096}}


# --- sequential scan ---


async def measure(scale: int = 20) -> list[Row]:
    """`scale`: of pgbench; one is 15 MB."""
    tmpfs = await _scans(VolumeKind.TMPFS, scale)
    fuse = await _scans(VolumeKind.FUSE, scale)
    return [
        Row(
            "first sequential scan after a start, lazy volume; peer: tmpfs, where it came with the start",
            f"{fuse.first:.0f} MB/s",
            f"{tmpfs.first:.0f} MB/s",
            fuse.first / tmpfs.first,
            ">= 60 MB/s",
            fuse.first >= 60,
        ),
        Row(
            "second scan, from the kernel's cache",
            f"{fuse.second:.0f} MB/s",
            f"{tmpfs.second:.0f} MB/s",
            fuse.second / tmpfs.second,
            "report",
            None,
        ),
    ]


async def _scans(kind: VolumeKind, scale: int) -> Scans:
    async with Cluster(settings=_settings(kind)) as cluster:
        bench = await KeylakeBench.create(cluster, scale)
        await bench.stop()
        await at_rest()  # the pageserver merges what was loaded, and has one core of two for that
        connection = await bench.connect()
        await connection.execute("SET max_parallel_workers_per_gather = 0")
        size = await connection.fetchval("SELECT pg_relation_size('pgbench_accounts')")
        speeds = []
        for _ in range(2):
            begun = perf_counter()
            await connection.fetchval("SELECT sum(abalance) FROM pgbench_accounts")
            speeds.append(size / 1e6 / (perf_counter() - begun))
        await connection.close()
        return Scans(*speeds)


# --- TPC-B ---


async def measure_tpcb(scale: int = 20, seconds: int = 8, rounds: int = 3) -> list[Row]:
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keylake-bench-")))
        computes: dict[str, KeylakeBench] = {}
        for name, kind in (("lazy", VolumeKind.FUSE), ("tmpfs", VolumeKind.TMPFS)):
            bench = await KeylakeBench.create(await stack.enter_async_context(Cluster(settings=_settings(kind))), scale)
            await bench.stop()
            await _read_all(bench)
            computes[name] = bench
        settings = await computes["lazy"].settings()
        systems = {name: bench.socket_env() for name, bench in computes.items()}
        disks = {"plain": directory / "plain"}
        if (mounted := await stack.enter_async_context(gocryptfs(directory / "gocryptfs"))) is not None:
            disks["gocryptfs"] = mounted / "pgdata"
        for name, pgdata in disks.items():
            server = await stack.enter_async_context(stock_primary(pgdata, **settings))
            (standbys := directory / f"standbys-{name}").mkdir()
            await stack.enter_async_context(pg_receivewals(server, NAMES, standbys))
            await require_quorum(server, NAMES)
            await pgbench_init(socket_env(server), scale)
            systems[name] = socket_env(server)
        rows = []
        for clients in CLIENTS:
            results: dict[str, list[float]] = {name: [] for name in systems}
            for _ in range(rounds):
                for name, env in systems.items():
                    # Pageservers work after the commit, but on the same cores.
                    await asyncio.gather(*(bench.ingested() for bench in computes.values()))
                    results[name].append(await pgbench_tps(env, clients, seconds))
            medians = {name: statistics.median(values) for name, values in results.items()}
            rows += _rows(clients, medians, _file_system(directory))
        return rows


async def _read_all(bench: KeylakeBench) -> None:
    connection = await bench.connect()
    await connection.fetchval("SELECT sum(abalance) FROM pgbench_accounts")
    await connection.execute("SET enable_seqscan = off")
    await connection.fetchval("SELECT count(*) FROM pgbench_accounts WHERE aid > 0")
    await connection.close()


def _rows(clients: int, tps: dict[str, float], disk: str) -> list[Row]:
    lazy, plain = tps["lazy"], tps["lazy"] / tps["plain"]
    what = f"TPC-B on the lazy volume, {clients} client{'s' * (clients > 1)}"
    rows = [
        Row(what, f"{lazy:.0f} tps", f"{tps['plain']:.0f} tps on plain {disk}", plain, ">= 0.9", plain >= 0.9),
        Row(what, f"{lazy:.0f} tps", f"gocryptfs on {disk} {not_measured('gocryptfs fuse3')}", None, ">= 1.0", None),
        Row(what, f"{lazy:.0f} tps", f"{tps['tmpfs']:.0f} tps on tmpfs", lazy / tps["tmpfs"], "report", None),
    ]
    if (sealed := tps.get("gocryptfs")) is not None:
        ratio = lazy / sealed
        rows[1] = Row(what, f"{lazy:.0f} tps", f"{sealed:.0f} tps on gocryptfs", ratio, ">= 1.0", ratio >= 1.0)
    return rows


def _file_system(path: Path) -> str:
    """Its type, for example ext4: that of the longest mount point above it (proc_pid_mounts(5))."""
    found = ("", "a disk")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount_point, kind, *_ = line.split()
        if path.resolve().is_relative_to(mount_point) and len(mount_point) >= len(found[0]):
            found = (mount_point, kind)
    return found[1]
