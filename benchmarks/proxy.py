"""What the proxy costs: pgbench's SELECT-only load through it, through pgbouncer, and straight to the same Postgres.

    python -m benchmarks.proxy [--seconds 5] [--rounds 3] [--clients 1 8 32] [--mode simple|prepared]

What is alike: the client comes by TCP on this machine, with TLS or without, and from both proxies a Unix socket without
TLS leads to the same Postgres, which asks for SCRAM; the certificate is the same; both use one thread. "Straight" is
TCP without TLS in every row. The wheel's Postgres and pgbench have no TLS: rows with TLS need a pgbench that has,
`pgbench` in PATH or Debian's; the numbers beside each other in a row always come from one program.

What is not alike: pgbouncer (session mode) has the passwords, checks them itself and keeps connections to Postgres,
while our proxy passes SCRAM through and opens one connection per session. That is in no figure: logging in is not
counted. Our proxy looks at the project's lease for each chunk and at each message's header on its way to the client;
pgbouncer looks at the headers in both directions.

CPU is that of the process in the middle, user and system, per transaction, which is one round trip. Rounds go in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import glob
import re
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import uvloop
from rich.console import Console

from benchmarks.harness import Row, cpu_s, percentile, run, show
from benchmarks.peers import Bouncer, not_measured, pgbouncer, program
from keylake.ports import free_port
from shared.api.safekeeper import ComputeAddress
from shared.postgres import find_postgres
from tests.fixtures.proxy import ProxyBench, proxy_bench, running_backend

_PASSWORD: Final = "pw"  # noqa: S105 - what `running_backend` gives its superuser
_LOGGED: Final = 0.2
"""Share of transactions whose latency pgbench writes down, which costs it time."""
_COPY: Final = "SELECT repeat('x', 200) FROM generate_series(1, 2000000)"


@dataclass(frozen=True, slots=True)
class Way:
    """To Postgres."""

    conninfo: str
    pid: int | None
    """Of the process in the middle."""


@dataclass(slots=True)
class Load:
    """What one way did; one element per round."""

    tps: list[float] = field(default_factory=list)
    p50_us: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    """Of the process in the middle, per transaction."""

    def __str__(self) -> str:
        text = f"{statistics.median(self.tps):.0f}/s"
        return text if not self.cpu_us else f"{text}, {statistics.median(self.cpu_us):.0f} µs of CPU each"


@dataclass(frozen=True, slots=True)
class Place:
    """A Postgres, our proxy before it, and pgbouncer, if it is installed."""

    port: int
    proxy: ProxyBench
    bouncer: Bouncer | None

    def ways(self, sslmode: str) -> dict[str, Way]:
        def by_tcp(port: int, sslmode: str) -> str:
            return (
                f"host=localhost hostaddr=127.0.0.1 port={port} user=postgres password={_PASSWORD} dbname=postgres "
                f"sslmode={sslmode}"
            )

        ways = {
            "proxy": Way(self.proxy.conninfo(f"sslmode={sslmode}"), self.proxy.process.pid),
            "straight": Way(by_tcp(self.port, "disable"), None),
        }
        if self.bouncer is not None:
            ways["pgbouncer"] = Way(by_tcp(self.bouncer.port, sslmode), self.bouncer.pid)
        return ways

    async def connect_to_bouncer(self) -> Any:
        assert self.bouncer is not None
        return await self.proxy.connect(port=self.bouncer.port, server_settings={})


@asynccontextmanager
async def _place() -> AsyncIterator[Place]:
    port = free_port()
    # A socket for the proxies, TCP for who comes straight.
    running = running_backend("listen_addresses=127.0.0.1", f"port={port}")
    backend = await asyncio.to_thread(running.__enter__)  # it blocks, and runs a loop of its own
    try:
        async with proxy_bench(backend, allow_plaintext_loopback=True) as proxy:
            proxy.point_at(ComputeAddress(host=str(backend.directory), port=port))
            files = proxy.realm.directory
            async with pgbouncer(
                backend.directory, port, "postgres", _PASSWORD, files / "front.crt", files / "front.key"
            ) as bouncer:
                yield Place(port, proxy, bouncer)
    finally:
        await asyncio.to_thread(running.__exit__, None, None, None)


async def measure(
    clients: Sequence[int] = (1, 8, 32), seconds: int = 5, rounds: int = 3, mode: str = "simple"
) -> list[Row]:
    pgbench = find_postgres().program("pgbench")
    rows: list[Row] = []
    async with _place() as place:
        await run(pgbench, "-i", "-q", "-s", "1", place.ways("disable")["straight"].conninfo)
        for count in clients:
            loads = await _loads(pgbench, place.ways("disable"), count, seconds, rounds, mode)
            rows += _rows(count, "without TLS", loads)
        if (pgbench_with_tls := await _pgbench_with_tls(place)) is None:
            missing = not_measured("postgresql (its pgbench has TLS)")
            rows.append(Row("SELECT-only through the proxy, with TLS", missing, "-", None, ">= 0.6", None))
        else:
            for count in clients:
                loads = await _loads(pgbench_with_tls, place.ways("require"), count, seconds, rounds, mode)
                rows += _rows(count, "with TLS", loads)
        rows.append(await _copy_row(place))
    return rows


async def _pgbench_with_tls(place: Place) -> str | None:
    """The first that can log in with TLS; of whatever version."""
    conninfo = place.ways("require")["proxy"].conninfo
    for candidate in (program("pgbench"), *sorted(glob.glob("/usr/lib/postgresql/*/bin/pgbench"), reverse=True)):
        if candidate is not None:
            with contextlib.suppress(RuntimeError):
                await run(candidate, "-S", "-n", "-t", "1", conninfo)
                return candidate
    return None


async def _loads(
    pgbench: str, ways: dict[str, Way], clients: int, seconds: int, rounds: int, mode: str
) -> dict[str, Load]:
    loads = {name: Load() for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            await _load(pgbench, way, clients, seconds, mode, loads[name])
    return loads


async def _load(pgbench: str, way: Way, clients: int, seconds: int, mode: str, load: Load) -> None:
    """One round, added to `load`."""
    with tempfile.TemporaryDirectory(prefix="keylake-bench-") as directory:
        cpu_before_s = 0.0 if way.pid is None else cpu_s(way.pid)
        output = await run(
            pgbench, "-S", "-n", "-M", mode, "-c", str(clients), "-j", "1", "-T", str(seconds),
            "--log", "--log-prefix", f"{directory}/log", "--sampling-rate", str(_LOGGED), way.conninfo,
        )  # fmt: skip
        tps = re.search(r"tps = ([\d.]+) \(without initial", output)
        count = re.search(r"number of transactions actually processed: (\d+)", output)
        failed = re.search(r"number of failed transactions: (\d+)", output)
        if tps is None or count is None or failed is None or failed[1] != "0":
            raise RuntimeError(output)
        # Third field: latency in µs (pgbench, "Per-Transaction Logging").
        lines = [line for log in Path(directory).iterdir() for line in log.read_text().splitlines()]
        load.tps.append(float(tps[1]))
        load.p50_us.append(percentile([float(line.split()[2]) for line in lines], 0.5))
        if way.pid is not None:
            load.cpu_us.append((cpu_s(way.pid) - cpu_before_s) / int(count[1]) * 1e6)


def _rows(clients: int, how: str, loads: dict[str, Load]) -> list[Row]:
    """Throughput against pgbouncer; and for one client, what the hop adds to a round trip."""
    proxy, straight, bouncer = loads["proxy"], loads["straight"], loads.get("pgbouncer")
    rate, straight_rate = statistics.median(proxy.tps), statistics.median(straight.tps)
    what = f"SELECT-only through the proxy, {how}, {clients} client{'s' * (clients > 1)}"
    measured = f"{proxy} ({rate / straight_rate:.2f} of {straight}, straight)"
    if bouncer is None:
        rows = [Row(what, measured, f"pgbouncer {not_measured('pgbouncer')}", None, ">= 0.6", None)]
    else:
        ratio = rate / statistics.median(bouncer.tps)
        rows = [Row(what, measured, f"{bouncer}, pgbouncer", ratio, ">= 0.6", ratio >= 0.6)]
    if clients == 1:
        straight_us = statistics.median(straight.p50_us)
        added_us = statistics.median(proxy.p50_us) - straight_us
        peer, ratio_added = f"pgbouncer {not_measured('pgbouncer')}", None
        if bouncer is not None:
            theirs_us = statistics.median(bouncer.p50_us) - straight_us
            peer, ratio_added = f"{theirs_us:.0f} µs, pgbouncer", added_us / theirs_us
        rows.append(
            Row(
                f"added to a round trip, {how}, p50",
                f"{added_us:.0f} µs ({straight_us:.0f} µs straight)",
                peer,
                ratio_added,
                "<= 150 µs",
                added_us <= 150,
            )
        )
    return rows


async def _copy_row(place: Place) -> Row:
    ours = await _copied_mb_per_s(place.proxy.connect)
    if place.bouncer is None:
        peer, ratio = f"pgbouncer {not_measured('pgbouncer')}", None
    else:
        theirs = await _copied_mb_per_s(place.connect_to_bouncer)
        peer, ratio = f"{theirs:.0f} MB/s, pgbouncer", ours / theirs
    return Row("COPY TO STDOUT with TLS, asyncpg", f"{ours:.0f} MB/s", peer, ratio, "report", None)


async def _copied_mb_per_s(connect: Callable[[], Awaitable[Any]]) -> float:
    connection = await connect()
    received = 0

    async def take(data: bytes) -> None:
        nonlocal received
        received += len(data)

    began = time.monotonic()
    await connection.copy_from_query(_COPY, output=take)
    took_s = time.monotonic() - began
    await connection.close()
    return received / 1e6 / took_s


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proxy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=5, help="length of each measurement (5)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind (3)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="numbers of clients (1 8 32)")
    parser.add_argument("--mode", choices=("simple", "prepared"), default="simple", help="pgbench's protocol (simple)")
    arguments = parser.parse_args()
    rows = uvloop.run(measure(arguments.clients, arguments.seconds, arguments.rounds, arguments.mode))
    show(rows, Console(highlight=False))


if __name__ == "__main__":
    main()
