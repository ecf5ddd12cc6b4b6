"""A stopped compute, from a client's connect to its first row; and how little that grows with the database.

    python -m benchmarks.cold_start [--small 50MB] [--large 1GB] [--relations 0] [--starts 30]

One cluster with lazy volumes holds a small and a large database, rows made on the server. Each is stopped, and started
by a connection through the proxy, over TLS, in turn, so that a slow minute hits both. The first row is one of
pgbench_accounts, chosen at random, so its pages come from the pageserver. A start begins when all of the cluster is at
rest: who wakes a compute after minutes finds an agent that has done its imports, and so does this client.

The peer restores the same database, made by the same pgbench, with pg_basebackup over a Unix socket, and starts it:
on the same disk, nothing synced.

A start lists all relations, so it grows with their number: `--relations 10000` are made in the large database, half of
them empty tables and half their keys. `--large 50MB` with it shows what that alone costs.

The large database lies on the disk many times: as WAL of three safekeepers and in the object store, as layers and in
the pageserver's cache, in the volume while it is loaded, and twice at the peer. `--large 5GB` needs tens of GB.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Final

import asyncpg
import uvloop
from rich.console import Console

from benchmarks.harness import (
    PLAINTEXT,
    KeylakeBench,
    Row,
    at_rest,
    cpu_of_descendants,
    percentile,
    pgbench_init,
    restored_start_s,
    show,
    socket_env,
    stock_primary,
)
from compute.volume.base import VolumeKind
from keylake.cluster import Cluster

_MB_PER_SCALE: Final = 15
_EMPTY_MB: Final = 8
"""A database that initdb made."""
_ROWS_PER_SCALE: Final = 100_000
_QUERY: Final = "SELECT abalance FROM pgbench_accounts WHERE aid = $1"
_RESTORES: Final = 3
_TABLES_AT_ONCE: Final = 500
"""Each is two locks of one transaction."""
_RNG: Final = random.Random(1)


@dataclass(slots=True)
class Starts:
    """Of one database."""

    scale: int
    size_mb: int
    relations: int
    """Made in it, besides pgbench's."""
    seconds: list[float] = field(default_factory=list)
    """Connect to first row."""
    stages: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds, by name: the manager's and the agent's, and what the client saw behind them."""
    pages: list[int] = field(default_factory=list)
    """Fetched one by one until Postgres was up."""
    cpu_s: list[float] = field(default_factory=list)
    """Of all processes of the cluster."""
    restored_s: float = 0.0
    """The peer's."""

    @property
    def name(self) -> str:
        return f"{self.size_mb} MB" + (f" in {self.relations} relations" if self.relations else "")

    @property
    def p50_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p99_s(self) -> float:
        return percentile(self.seconds, 0.99)


async def measure(small_mb: int = 50, large_mb: int = 1000, starts: int = 30, relations: int = 0) -> list[Row]:
    wanted = [
        (max(1, round((size_mb - _EMPTY_MB) / _MB_PER_SCALE)), more)
        for size_mb, more in ((small_mb, 0), (large_mb, relations))
    ]
    # The disk of a volume is what one compute may write, and one compute loads the whole database, index and WAL.
    volume = {"compute": {"volume": VolumeKind.FUSE.value, "volume_disk_mb": max(4096, 4 * large_mb)}}
    measured: list[Starts] = []
    async with Cluster(settings=PLAINTEXT | volume) as cluster:
        projects: list[tuple[KeylakeBench, Starts]] = []
        for name, (scale, more) in zip(("small", "large"), wanted, strict=True):
            bench = await KeylakeBench.create(cluster, scale, name)
            connection = await bench.connect()
            await _make_relations(connection, more)
            size = await connection.fetchval("SELECT pg_database_size(current_database())")
            await connection.close()
            await bench.ingested()
            await bench.stop()
            projects.append((bench, Starts(scale, round(size / 1e6), more)))
        for _ in range(starts):
            for bench, of in projects:
                await at_rest()
                await _start(cluster, bench, of)
                await bench.stop()
        measured = [of for _, of in projects]
    with tempfile.TemporaryDirectory(prefix="keylake-bench-") as name:
        for of in measured:
            async with stock_primary(Path(name, f"scale-{of.scale}-{of.relations}")) as server:
                await pgbench_init(socket_env(server), of.scale)
                connection = await asyncpg.connect(
                    host=server.host, port=server.port, user="postgres", database="postgres"
                )
                await _make_relations(connection, of.relations)
                await connection.close()
                of.restored_s = statistics.median(
                    [await restored_start_s(server, Path(name), _QUERY, _any_row(of.scale)) for _ in range(_RESTORES)]
                )
    return _rows(*measured)


async def _make_relations(connection: asyncpg.Connection[asyncpg.Record], count: int) -> None:
    for first in range(0, count // 2, _TABLES_AT_ONCE):
        last = min(first + _TABLES_AT_ONCE, count // 2) - 1
        await connection.execute(
            f"DO $$ BEGIN FOR i IN {first} .. {last} LOOP "
            "EXECUTE format('CREATE TABLE many_%s (id int PRIMARY KEY)', i); END LOOP; END $$"
        )


async def _start(cluster: Cluster, bench: KeylakeBench, of: Starts) -> None:
    wanted = _any_row(of.scale)
    with cpu_of_descendants(of.cpu_s):
        begun = perf_counter()
        connection = await bench.connect()
        connected = perf_counter()
        row = await connection.fetchval(_QUERY, wanted)
        took = perf_counter() - begun
    await connection.close()
    if row is None:
        raise RuntimeError("the row is not there")
    endpoint = await cluster.client.endpoint(bench.project.endpoint.endpoint_id)
    stages: defaultdict[str, float] = defaultdict(float)
    for stage in endpoint.stages:
        stages[stage.stage] += stage.seconds
    # Some stages run beside each other, so their sum may be more than the time until the login.
    for stage_name, seconds in stages.items():
        of.stages[stage_name].append(seconds)
    of.stages["connect, all of the above"].append(connected - begun)
    of.stages["the client's first query"].append(took - (connected - begun))
    of.seconds.append(took)
    if endpoint.pages_at_start is None:
        raise RuntimeError(f"not a lazy volume: {endpoint.volume}")
    of.pages.append(endpoint.pages_at_start)


def _any_row(scale: int) -> int:
    return _RNG.randint(1, scale * _ROWS_PER_SCALE)


def _rows(small: Starts, large: Starts) -> list[Row]:
    rows = [
        Row(
            f"cold start of {of.name}, connect to first row, {len(of.seconds)} times",
            f"p50 {of.p50_s:.2f} s, p99 {of.p99_s:.2f} s",
            f"{of.restored_s:.2f} s pg_basebackup and start",
            of.p50_s / of.restored_s,
            "p50 <= 0.6 s, p99 <= 1.5 s",
            of.p50_s <= 0.6 and of.p99_s <= 1.5,
        )
        for of in (small, large)
    ]
    growth = large.p50_s / small.p50_s
    rows.append(
        Row(
            f"cold start of {large.name} : of {small.name}, p50",
            f"{large.p50_s:.3f} s : {small.p50_s:.3f} s; pages fetched "
            f"{statistics.median(large.pages):.0f} : {statistics.median(small.pages):.0f}",
            f"{large.restored_s / small.restored_s:.1f} pg_basebackup and start",
            growth,
            "<= 1.2",
            growth <= 1.2,
        )
    )
    cpu = [statistics.median(of.cpu_s) for of in (large, small)]
    rows.append(
        Row(
            f"the same in CPU time of all processes, {large.name} : {small.name}, medians",
            f"{cpu[0]:.2f} s : {cpu[1]:.2f} s",
            "-",
            cpu[0] / cpu[1],
            "report",
            None,
        )
    )
    for of in (small, large):
        stages = ", ".join(f"{name} {statistics.median(values):.3f}" for name, values in of.stages.items())
        rows.append(Row(f"stages of a cold start of {of.name}, medians, s", stages, "-", None, "report", None))
    return rows


def _megabytes(text: str) -> int:
    match = re.fullmatch(r"(\d+) ?(MB|GB)", text)
    if match is None:
        raise argparse.ArgumentTypeError("a size is, for example, 50MB or 5GB")
    return int(match[1]) * (1000 if match[2] == "GB" else 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cold_start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--small", type=_megabytes, default=50, help="size of the small database (50MB)")
    parser.add_argument("--large", type=_megabytes, default=1000, help="size of the large database (1GB)")
    parser.add_argument("--relations", type=int, default=0, help="made in the large database (none)")
    parser.add_argument("--starts", type=int, default=30, help="starts of each (30)")
    arguments = parser.parse_args()
    rows = uvloop.run(measure(arguments.small, arguments.large, arguments.starts, arguments.relations))
    show(rows, Console(highlight=False))


if __name__ == "__main__":
    main()
