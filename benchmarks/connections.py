"""A thousand clients at once, each with TLS and SCRAM, of one endpoint; then more than the proxy takes.

usage: python -m benchmarks connections, or with other numbers: python -m benchmarks.connections --clients 1000

All of them come at the same moment; each asks its question when it is in, and stays until everybody has been
answered. The peer is the same crowd at the same Postgres's own socket: no proxy and no TLS, but SCRAM.

Memory is what is the process's own and its share of what is shared (Pss, proc_pid_smaps_rollup(5)).
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import asyncpg
import uvloop
from rich.console import Console

from benchmarks.harness import Row, show
from keylake.cluster import Cluster, RunningProject
from shared.open_files import allow_open_files
from tests.cluster.processes import below, compute_of
from tests.fixtures.waiting import wait_until

CLIENTS: Final = 1000
MORE: Final = 50
_PATIENCE_S: Final = 300.0
_QUESTION: Final = "SELECT sum(a) FROM generate_series(1, 1000) a"
_ANSWER: Final = 500500

Connect = Callable[[], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Footprint:
    memory_kb: int
    descriptors: int

    @classmethod
    def of(cls, *pids: int) -> Footprint:
        """Of processes together; those that have ended count nothing."""
        memory_kb = descriptors = 0
        for pid in pids:
            with suppress(FileNotFoundError, ProcessLookupError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                memory_kb += int(next(line for line in lines if line.startswith("Pss:")).split()[1])
                descriptors += len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return cls(memory_kb, descriptors)


@dataclass(slots=True)
class Crowd:
    """Clients that came at once."""

    connections: list[Any]
    errors: list[BaseException]
    seconds: float
    """Until the last of them was answered."""

    @classmethod
    async def come(cls, connect: Connect, count: int) -> Crowd:
        began = time.monotonic()
        came = await asyncio.gather(*(cls._one(connect) for _ in range(count)), return_exceptions=True)
        seconds = time.monotonic() - began
        connections = [each for each in came if not isinstance(each, BaseException)]
        return cls(connections, [each for each in came if isinstance(each, BaseException)], seconds)

    @staticmethod
    async def _one(connect: Connect) -> Any:
        connection = await connect()
        if await connection.fetchval(_QUESTION, timeout=_PATIENCE_S) != _ANSWER:
            raise AssertionError("a wrong answer")
        return connection

    async def go(self) -> None:
        await asyncio.gather(*(each.close(timeout=_PATIENCE_S) for each in self.connections))
        self.connections.clear()

    def complain(self) -> None:
        if self.errors:
            raise RuntimeError(f"{len(self.errors)} clients were not served") from self.errors[0]


async def measure(clients: int = CLIENTS, more: int = MORE) -> list[Row]:
    allow_open_files(2 * (clients + more) + 256)  # this process is all the clients
    settings: dict[str, dict[str, Any]] = {
        # What agents and operators need comes on top: the proxy's limit is the one that is met.
        "compute": {"max_connections": clients + 10},
        "proxy": {"max_endpoint_connections": clients, "max_connections": clients + more},
    }
    async with Cluster(settings=settings) as cluster:
        project = await cluster.create_project("crowd")
        return await _measure(cluster, project, clients, more)


async def _measure(cluster: Cluster, project: RunningProject, clients: int, more: int) -> list[Row]:
    arguments = project.connection.asyncpg_arguments() | {"timeout": _PATIENCE_S}  # one TLS context for all
    (await asyncpg.connect(**arguments)).terminate()  # wakes it
    compute = await compute_of(cluster, project.endpoint.endpoint_id)
    proxy = cluster.service("proxy").pid
    wanted = ("user", "password", "database", "timeout")
    direct = {name: arguments[name] for name in wanted} | {"host": str(compute.socket_dir)}

    async def through() -> Any:
        return await asyncpg.connect(**arguments)

    async def straight() -> Any:
        return await asyncpg.connect(**direct)

    def backends() -> list[int]:
        return [each.pid for each in below(compute.postmaster.pid)]

    others = len(backends())
    peer = await Crowd.come(straight, clients)
    peer.complain()
    of_backends = Footprint.of(*backends())
    await peer.go()
    await wait_until(lambda: len(backends()) <= others, _PATIENCE_S)

    before = Footprint.of(proxy)
    crowd = await Crowd.come(through, clients)
    crowd.complain()
    full = Footprint.of(proxy)
    refused = await Crowd.come(through, more)
    too_many = [
        each
        for each in refused.errors
        if isinstance(each, asyncpg.TooManyConnectionsError) and "too many connections to this endpoint" in str(each)
    ]
    still = sum(await asyncio.gather(*(each.fetchval("SELECT 1") for each in crowd.connections)))
    await crowd.go()

    async def let_go() -> bool:
        return Footprint.of(proxy).descriptors <= before.descriptors + 2 and len(backends()) <= others

    await wait_until(let_go, _PATIENCE_S)
    after = Footprint.of(proxy)
    again = await Crowd.come(through, clients)
    again.complain()
    full_again = Footprint.of(proxy)
    await again.go()

    per_session = (full.memory_kb - before.memory_kb) / clients
    per_backend = of_backends.memory_kb / clients
    return [
        Row(
            f"{clients} clients at once, TLS and SCRAM: all answered",
            f"{crowd.seconds:.1f} s",
            f"{peer.seconds:.1f} s straight to its Postgres, without TLS",
            crowd.seconds / peer.seconds,
            "every one",
            still == clients,
        ),
        Row(
            f"{more} more than the proxy takes of an endpoint",
            f"{len(too_many)} refused with 53300",
            "",
            None,
            "every one, at once, and nobody else notices",
            len(too_many) == more and still == clients,
        ),
        Row(
            "memory of one more session: proxy",
            f"{per_session:.0f} KiB",
            f"{per_backend:.0f} KiB of its Postgres backend",
            per_session / per_backend,
            "less than the backend's",
            per_session < per_backend,
        ),
        Row(
            "the proxy's memory with a second crowd",
            f"{full_again.memory_kb / 1024:.0f} MiB",
            f"{full.memory_kb / 1024:.0f} MiB with the first; {before.memory_kb / 1024:.0f} before, "
            f"{after.memory_kb / 1024:.0f} between",
            full_again.memory_kb / full.memory_kb,
            "≤ 1.1",
            full_again.memory_kb <= 1.1 * full.memory_kb,
        ),
        Row(
            "the proxy's file descriptors when they have gone",
            str(after.descriptors),
            f"{before.descriptors} before, {full.descriptors} with all of them",
            None,
            "as before",
            after.descriptors <= before.descriptors + 2,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.connections", description=__doc__)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--more", type=int, default=MORE)
    arguments = parser.parse_args()
    show(uvloop.run(measure(arguments.clients, arguments.more)), Console(highlight=False))


if __name__ == "__main__":
    main()
