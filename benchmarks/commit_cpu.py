"""What a commit costs in CPU, process by process: Keylake against stock Postgres with three `pg_receivewal`.

    python -m benchmarks.commit_cpu [--clients 8] [--seconds 8] [--rounds 3]

The same two systems as in `commits`, loaded in turn; every thread of either is read from /proc before and after the
middle of its load, and what it has used is divided by the transactions in between. CPU time is what a busy machine
leaves comparable: rates are not, beside other work. (Some 10 % more of it is used at a high load, by colder caches.)

Not counted: pgbench, which both sides have, and interrupts that no thread is charged for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import asyncpg
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.harness import (
    IN_MEMORY,
    TICKS_PER_S,
    KeylakeBench,
    pg_receivewals,
    pgbench_init,
    pgbench_tps,
    require_quorum,
    socket_env,
    stock_primary,
)
from keylake.cluster import Cluster

_NAMES: Final = ["r1", "r2", "r3"]
_SETTLED_S: Final = 1.0
"""Of the load's beginning and end, which are not measured."""


@dataclass(frozen=True, slots=True)
class Used:
    """CPU seconds and context switches of one thread, or of several."""

    user_s: float = 0.0
    system_s: float = 0.0
    switches: int = 0

    def __add__(self, other: Used) -> Used:
        return Used(self.user_s + other.user_s, self.system_s + other.system_s, self.switches + other.switches)

    def __sub__(self, other: Used) -> Used:
        return Used(self.user_s - other.user_s, self.system_s - other.system_s, self.switches - other.switches)

    def per(self, count: int) -> Used:
        return Used(self.user_s / count, self.system_s / count, self.switches)


Thread = tuple[str, int, int]
"""(what it belongs to, pid, tid)"""


def _used_by(task: Path) -> Used:
    """Of one thread: proc_pid_stat(5), proc_pid_schedstat, proc_pid_status(5)."""
    user, system = (int(field) for field in (task / "stat").read_bytes().rpartition(b") ")[2].split()[11:13])
    status = (task / "status").read_text().splitlines()
    switches = sum(int(line.split()[1]) for line in status if "ctxt_switches" in line)
    return Used(user / TICKS_PER_S, system / TICKS_PER_S, switches)


def _trees(roots: Mapping[int, str]) -> dict[int, str]:
    """All processes below `roots`, with a name each: that of the nearest root, and the program's."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_bytes().rpartition(b") ")[2].split()[1])
    names: dict[int, str] = {}
    for pid in parents:
        above = pid
        while above not in roots and above in parents:
            above = parents[above]
        if above in roots:
            names[pid] = roots[pid] if pid in roots else _program(pid, roots[above])
    return names


def _program(pid: int, above: str) -> str:
    """`postgres: walsender`, `agent`, …: what a child calls itself."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().split()
    except OSError:
        return above
    text = " ".join(words)
    if words and words[0] == "postgres:":
        kind = words[1] if words[1] in ("walsender", "checkpointer", "walwriter", "autovacuum", "background") else ""
        return f"{above}: {kind or 'backend'}"
    if "/postgres" in text or words[:1] == ["postgres"]:
        return f"{above}: postmaster"
    module = words[words.index("-m") + 1] if "-m" in words else Path(words[0]).name if words else "?"
    return f"{above}: {module}"


def snapshot(roots: Mapping[int, str]) -> dict[Thread, Used]:
    found: dict[Thread, Used] = {}
    for pid, name in _trees(roots).items():
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError):
                    kind = name if int(task.name) == pid else f"{name}, other threads"
                    found[kind, pid, int(task.name)] = _used_by(task)
    return found


def grouped(before: Mapping[Thread, Used], after: Mapping[Thread, Used]) -> dict[str, Used]:
    """By what they belong to. Threads that began meanwhile count from nothing; of those that ended nothing is known."""
    sums: dict[str, Used] = defaultdict(Used)
    for thread, used in after.items():
        sums[thread[0]] += used - before.get(thread, Used())
    return dict(sums)


async def _next_xid(env: Mapping[str, str]) -> int:
    connection = await asyncpg.connect(
        host=env["PGHOST"],
        port=int(env["PGPORT"]),
        user=env["PGUSER"],
        database=env["PGDATABASE"],
        password=env.get("PGPASSWORD"),
    )
    try:
        return int(await connection.fetchval("SELECT pg_snapshot_xmax(pg_current_snapshot())::text"))
    finally:
        await connection.close()


async def measure(roots: Mapping[int, str], env: dict[str, str], clients: int, seconds: int) -> dict[str, Used]:
    """Per transaction, each of which has an xid, of a load of `seconds`."""
    load = asyncio.create_task(pgbench_tps(env, clients, seconds))
    await asyncio.sleep(_SETTLED_S)
    before, first = snapshot(roots), await _next_xid(env)
    await asyncio.sleep(seconds - 2 * _SETTLED_S)
    last, after = await _next_xid(env), snapshot(roots)
    await load
    count = last - first
    return {name: used.per(count) for name, used in grouped(before, after).items()} | {
        "": Used(count / (seconds - 2 * _SETTLED_S))
    }


def _medians(rounds: Collection[dict[str, Used]]) -> dict[str, Used]:
    names = {name for each in rounds for name in each}
    return {
        name: Used(
            statistics.median(each.get(name, Used()).user_s for each in rounds),
            statistics.median(each.get(name, Used()).system_s for each in rounds),
            int(statistics.median(each.get(name, Used()).switches for each in rounds)),
        )
        for name in names
    }


def _show(title: str, found: dict[str, Used], seconds: float, console: Console) -> None:
    rate = found.pop("").user_s
    total = sum(found.values(), Used())
    table = Table(title=f"{title}: {rate:.0f} commits/s", show_edge=False, title_justify="left")
    for heading in ("µs per commit", "user", "system", "both", "switches per commit"):
        table.add_column(heading, justify="left" if heading == "µs per commit" else "right")
    for name, used in sorted(found.items(), key=lambda item: -(item[1].user_s + item[1].system_s)):
        both = used.user_s + used.system_s
        if both > 0.2e-6:
            table.add_row(name, *(f"{1e6 * s:.1f}" for s in (used.user_s, used.system_s, both)),
                          f"{used.switches / seconds / rate:.2f}")  # fmt: skip
    table.add_row("all", *(f"{1e6 * s:.1f}" for s in (total.user_s, total.system_s, total.user_s + total.system_s)), "")
    console.print(table)


async def main(arguments: argparse.Namespace, console: Console) -> None:
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keylake-bench-")))
        cluster = await stack.enter_async_context(Cluster(settings=IN_MEMORY))
        stock = await stack.enter_async_context(stock_primary())
        receivers = await stack.enter_async_context(pg_receivewals(stock, _NAMES, directory))
        await require_quorum(stock, _NAMES)
        await pgbench_init(socket_env(stock), arguments.scale)
        keylake = await KeylakeBench.create(cluster, arguments.scale)
        ours = {service.pid: service.name.rpartition("-")[0] or service.name for service in cluster.services.values()}
        postmaster = int((stock.pgdata / "postmaster.pid").read_text().split()[0])
        theirs = dict.fromkeys(receivers, "pg_receivewal") | {postmaster: "postgres"}
        systems = {"Keylake": (ours, keylake.socket_env()), "stock Postgres": (theirs, socket_env(stock))}
        results: dict[str, list[dict[str, Used]]] = {name: [] for name in systems}
        for _ in range(arguments.rounds):
            for name, (roots, env) in systems.items():
                await keylake.ingested()
                results[name].append(await measure(roots, env, arguments.clients, arguments.seconds))
        for name, rounds in results.items():
            _show(name, _medians(rounds), arguments.seconds - 2 * _SETTLED_S, console)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=8, help="length of each load; all but two are measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=int, default=10)
    uvloop.run(main(parser.parse_args(), Console(highlight=False, width=120)))
