"""Commits per second, durable in a quorum: Keylake sealed, Keylake with the null cipher, stock Postgres with three
pg_receivewal.

All three have PGDATA in memory, write the WAL that they receive to the same disk, and are reached by a Unix socket:
what differs is who makes it durable. (On the lazy volume: `volume-tpcb`.) The same load through the proxy is shown
beside it. TPC-B has seven statements, so a client waits seven times for that hop, on loopback without TLS, because the
pgbench of the wheel has none.

Each round begins when the pageservers have ingested what was before: they work after the commit, but on the same cores.

`measure` lets everything share all cores. `measure_apart` gives Postgres, its clients and the proxy one half of them,
and whoever stores WAL and pages the other half, in all three systems: compute and storage on machines of their own.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
from collections.abc import Collection
from contextlib import AsyncExitStack
from pathlib import Path

from benchmarks.harness import (
    IN_MEMORY,
    KeylakeBench,
    Row,
    pg_receivewals,
    pgbench_init,
    pgbench_tps,
    require_quorum,
    socket_env,
    stock_primary,
)
from keylake.cluster import Cluster

CLIENTS = (1, 8, 32)
NAMES = ["r1", "r2", "r3"]
PROXIED = "proxied"
COMPUTE_SIDE = ("compute", "proxy")
"""The services that are not storage."""


async def measure_apart() -> list[Row]:
    """Raises RuntimeError on a machine with one core."""
    ours = os.sched_getaffinity(0)
    if len(ours) < 2:
        raise RuntimeError("compute and storage need a core each")
    cores = sorted(ours)
    compute, storage = set(cores[: len(cores) // 2]), set(cores[len(cores) // 2 :])
    os.sched_setaffinity(0, compute)  # and everything that is started from here
    try:
        return await measure(storage_cores=storage)
    finally:
        os.sched_setaffinity(0, ours)


async def measure(scale: int = 10, seconds: int = 8, rounds: int = 3, storage_cores: Collection[int] = ()) -> list[Row]:
    """Rounds go in turn, so that a slow minute of the machine hits all alike; medians are compared.

    `storage_cores`: where what stores WAL and pages runs; none: where everything else does.
    """
    where = ", compute and storage on cores of their own" if storage_cores else ""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keylake-bench-")))
        sealed = await stack.enter_async_context(Cluster(settings=IN_MEMORY))
        null = await stack.enter_async_context(Cluster(settings=IN_MEMORY, null_cipher=True))
        stock = await stack.enter_async_context(stock_primary())
        receivers = await stack.enter_async_context(pg_receivewals(stock, NAMES, directory))
        if storage_cores:
            services = [process for each in (sealed, null) for process in each.services.values()]
            stored = [process.pid for process in services if process.name not in COMPUTE_SIDE]
            for pid in [*receivers, *stored]:
                move(pid, storage_cores)
        await require_quorum(stock, NAMES)
        await pgbench_init(socket_env(stock), scale)
        keylake, plain = await KeylakeBench.create(sealed, scale), await KeylakeBench.create(null, scale)
        systems = {
            "sealed": keylake.socket_env(),
            "null": plain.socket_env(),
            "stock": socket_env(stock),
            PROXIED: keylake.proxy_env(),
        }
        rows = []
        for clients in CLIENTS:
            results: dict[str, list[float]] = {name: [] for name in systems}
            for _ in range(rounds):
                for name, env in systems.items():
                    await asyncio.gather(keylake.ingested(), plain.ingested())
                    results[name].append(await pgbench_tps(env, clients, seconds))
            rows += _rows(clients, where, {name: statistics.median(values) for name, values in results.items()})
        return rows


def move(pid: int, cores: Collection[int]) -> None:
    """All threads of a process; those that it makes later, and its children, follow."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def _rows(clients: int, where: str, tps: dict[str, float]) -> list[Row]:
    stock = f"{tps['stock']:.0f} stock Postgres, 3 pg_receivewal"
    against_stock, against_null = tps["sealed"] / tps["stock"], tps["sealed"] / tps["null"]
    what = f"commits/s, TPC-B, {clients} client{'s' * (clients > 1)}{where}"
    sealed = f"{tps['sealed']:.0f}"
    return [
        Row(what, sealed, stock, against_stock, ">= 0.8", against_stock >= 0.8),
        Row(
            f"{what}: price of sealing",
            sealed,
            f"{tps['null']:.0f} null cipher",
            against_null,
            ">= 0.95",
            against_null >= 0.95,
        ),
        Row(f"{what}: through the proxy", f"{tps[PROXIED]:.0f}", stock, tps[PROXIED] / tps["stock"], "", None),
    ]
