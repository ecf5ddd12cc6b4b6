"""What the benchmarks share: rows of a result table, pgbench, a project of ours, a stock Postgres as peer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, Final

import asyncpg
from rich.console import Console
from rich.table import Table

from compute.agent.postgres_conf import POSTGRES_PORT
from compute.volume.base import VolumeKind
from keylake.cluster import Cluster, RunningProject
from shared.lsn import Lsn
from shared.postgres import PostgresServer, find_postgres, initdb

TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_REST_WINDOW_S: Final = 0.5
_REST_SHARE: Final = 0.2
_REST_TIMEOUT_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `ratio` is measured : peer, in the same run; `target` is what the project promises, in words."""

    what: str
    measured: str
    peer: str
    ratio: float | None
    target: str
    reached: bool | None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table(show_edge=False)
    for heading in ("what", "measured", "peer, same run", "ratio", "target", ""):
        table.add_column(heading)
    for row in rows:
        mark = {True: "✓", False: "✗", None: ""}[row.reached]
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.what, row.measured, row.peer, ratio, row.target, mark)
    console.print(table)


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank: of 30 values, the 99th percentile is the largest."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


# --- CPU ---


def cpu_s(pid: int) -> float:
    """User and system time of a process (proc_pid_stat(5), fields 14 and 15)."""
    return _cpu_s(Path(f"/proc/{pid}/stat").read_bytes())


def _cpu_s(stat: bytes) -> float:
    fields = stat.rpartition(b") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def _descendants_cpu_s() -> dict[int, float]:
    """Of each process that we, or those that we started, have started."""
    stats: dict[int, bytes] = {}
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has just ended
                stat = (entry / "stat").read_bytes()
                stats[int(entry.name)] = stat
                children.setdefault(int(stat.rpartition(b") ")[2].split()[1]), []).append(int(entry.name))
    found, left = {}, [os.getpid()]
    while left:
        for pid in children.get(left.pop(), ()):
            found[pid] = _cpu_s(stats[pid])
            left.append(pid)
    return found


@contextlib.contextmanager
def cpu_of_descendants(into: list[float]) -> Iterator[None]:
    """Appends what all that we have started has used within the block, in seconds, processes that were started in it
    included; not those that ended in it. Other work on the machine makes it longer, but less than the time."""
    before = _descendants_cpu_s()
    yield
    into.append(sum(seconds - before.get(pid, 0.0) for pid, seconds in _descendants_cpu_s().items()))


def _is_runnable(pid: int) -> bool:
    """It runs, or waits for a core (proc_pid_stat(5), field 3)."""
    with contextlib.suppress(OSError):  # it has just ended
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].startswith(b"R")
    return False


async def at_rest() -> None:
    """Returns when all that we have started uses next to no CPU, and wants none: nothing is compacted, no spare agent
    imports. Where others use the cores, one that waits for its turn uses none, either: it is in state R.

    Whatever else runs on the machine does not matter. Raises TimeoutError.
    """
    deadline = monotonic() + _REST_TIMEOUT_S
    before, begun = _descendants_cpu_s(), monotonic()
    while monotonic() < deadline:
        await asyncio.sleep(_REST_WINDOW_S)
        after, now = _descendants_cpu_s(), monotonic()
        used_s = sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())
        if used_s < _REST_SHARE * (now - begun) and not any(map(_is_runnable, after)):
            return
        before, begun = after, now
    raise TimeoutError(f"still at work after {_REST_TIMEOUT_S:g} s")


# --- pgbench ---


async def run(*command: str, env: dict[str, str] | None = None) -> str:
    """Output of a command that must succeed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **(env or {})},
    )
    output, _ = await process.communicate()
    text = output.decode(errors="replace")
    if process.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {text[-2000:]}")
    return text


async def pgbench_tps(env: dict[str, str], clients: int, seconds: int) -> float:
    """Commits per second of TPC-B. Raises RuntimeError when a transaction failed."""
    program = find_postgres().program("pgbench")
    output = await run(program, "-n", "-c", str(clients), "-j", "1", "-T", str(seconds), env=env)
    tps = re.search(r"tps = ([0-9.]+)", output)
    failed = re.search(r"number of failed transactions: ([0-9]+)", output)
    if tps is None or failed is None or failed[1] != "0":
        raise RuntimeError(output)
    return float(tps[1])


async def pgbench_init(env: dict[str, str], scale: int) -> None:
    """Rows made on the server (G), so that the client's speed does not matter."""
    await run(find_postgres().program("pgbench"), "-i", "-s", str(scale), "-I", "dtGvp", "-q", env=env)


class KeylakeBench:
    """One project at scale, reached in two ways. The cluster must allow plaintext from this machine (`PLAINTEXT`)."""

    def __init__(self, cluster: Cluster, project: RunningProject) -> None:
        self._cluster = cluster
        self.project = project

    @classmethod
    async def create(cls, cluster: Cluster, scale: int, name: str = "bench") -> KeylakeBench:
        made = cls(cluster, await cluster.create_project(name))
        await pgbench_init(made.proxy_env(), scale)
        await made.ingested()
        return made

    def proxy_env(self) -> dict[str, str]:
        connection = self.project.connection
        return {
            "PGHOST": connection.host,
            "PGPORT": str(connection.port),
            "PGUSER": connection.user,
            "PGPASSWORD": connection.password,
            "PGDATABASE": connection.database,
            "PGOPTIONS": f"endpoint={connection.endpoint_id}",
        }

    def socket_env(self) -> dict[str, str]:
        """Past the proxy, to the one compute that runs in this cluster."""
        (socket,) = (self._cluster.runtime_dir / "c").rglob(f".s.PGSQL.{POSTGRES_PORT}")
        env = self.proxy_env() | {"PGHOST": str(socket.parent), "PGPORT": str(POSTGRES_PORT)}
        del env["PGOPTIONS"]
        return env

    async def connect(self) -> asyncpg.Connection[asyncpg.Record]:
        """Through the proxy, with TLS; starts the compute if need be."""
        return await asyncpg.connect(**self.project.connection.asyncpg_arguments(), timeout=120)

    async def stop(self) -> None:
        await self._cluster.client.stop_endpoint(self.project.endpoint.endpoint_id)

    async def ingested(self) -> None:
        """Returns when the pageserver has all WAL that the compute has written."""
        connection = await self.connect()
        try:
            flushed = Lsn.parse(await connection.fetchval("SELECT pg_current_wal_flush_lsn()::text"))
        finally:
            await connection.close()
        timeline_id = self.project.timeline.timeline_id
        while True:
            status = await self._cluster.client.pageserver_status()
            if any(t.timeline_id == timeline_id and t.last_record_lsn >= flushed for t in status.timelines):
                return
            await asyncio.sleep(0.2)

    async def settings(self) -> dict[str, str]:
        """Of its postgresql.conf, all that a stock Postgres can have as well, in base units."""
        connection = await self.connect()
        try:
            rows = await connection.fetch("SELECT name, setting FROM pg_settings WHERE source = 'configuration file'")
        finally:
            await connection.close()
        ours = {"synchronous_standby_names", "shared_preload_libraries"}
        return {row["name"]: row["setting"] for row in rows if row["name"] not in ours}


PLAINTEXT: Final[dict[str, dict[str, Any]]] = {"proxy": {"allow_plaintext_loopback": True}}
IN_MEMORY: Final[dict[str, dict[str, Any]]] = PLAINTEXT | {"compute": {"volume": VolumeKind.TMPFS.value}}
"""And PGDATA where `stock_primary` has it, for what is not about volumes."""

# --- a stock Postgres ---

PRIMARY_CONF: dict[str, str | int | float | bool] = {
    # The same as a compute's, so that what differs is who receives the WAL, and how one gets there.
    "fsync": False,
    "full_page_writes": False,
    "wal_level": "replica",
    "shared_buffers": "64MB",
    "max_connections": 100,
    "max_wal_senders": 10,
    "wal_keep_size": "256MB",
    "dynamic_shared_memory_type": "mmap",
}


@contextlib.asynccontextmanager
async def stock_primary(
    directory: Path | None = None, **conf: str | int | float | bool
) -> AsyncIterator[PostgresServer]:
    """A stock Postgres with its data directory in memory, or in `directory`, which must be empty."""
    root = Path(tempfile.mkdtemp(prefix="keylake-bench-", dir="/dev/shm"))
    pgdata = directory or root / "p"
    try:
        await initdb(pgdata)
        server = PostgresServer(pgdata, socket_dir=root / "s", conf={**PRIMARY_CONF, **conf})
        async with server:
            yield server
    finally:
        shutil.rmtree(root, ignore_errors=True)


async def restored_start_s(
    server: PostgresServer, directory: Path, query: str = "SELECT 1", *arguments: object
) -> float:
    """Seconds of pg_basebackup into `directory` over the Unix socket, without syncing; start of the copy; first row.
    Nothing is left in `directory`."""
    root = Path(tempfile.mkdtemp(prefix="restored-", dir=directory))
    socket_dir = Path(tempfile.mkdtemp(prefix="keylake-bench-", dir="/dev/shm"))
    try:
        begun = perf_counter()
        program = find_postgres().program("pg_basebackup")
        await run(program, "-D", str(root / "p"), "-c", "fast", "--no-sync", env=socket_env(server))
        async with PostgresServer(root / "p", socket_dir=socket_dir / "s", conf={"fsync": False}) as copy:
            connection = await asyncpg.connect(host=copy.host, port=copy.port, user="postgres", database="postgres")
            await connection.fetchval(query, *arguments)
            took = perf_counter() - begun
            await connection.close()
        return took
    finally:
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(socket_dir, ignore_errors=True)


def socket_env(server: PostgresServer) -> dict[str, str]:
    return {"PGHOST": server.host, "PGPORT": str(server.port), "PGUSER": "postgres", "PGDATABASE": "postgres"}


@contextlib.asynccontextmanager
async def pg_receivewals(server: PostgresServer, names: list[str], directory: Path) -> AsyncIterator[list[int]]:
    """`pg_receivewal --synchronous` under each name, writing below `directory`; ends with the block. Their pids."""
    program = find_postgres().program("pg_receivewal")
    processes = []
    try:
        for name in names:
            target = directory / name
            target.mkdir()
            env = {**os.environ, **socket_env(server), "PGAPPNAME": name}
            processes.append(
                await asyncio.create_subprocess_exec(
                    program, "-D", str(target), "--synchronous", "--no-loop", env=env, stderr=asyncio.subprocess.DEVNULL
                )
            )
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


async def require_quorum(server: PostgresServer, names: Sequence[str]) -> None:
    """From now on two of the three that stream under these names make a commit durable."""
    admin = await asyncpg.connect(host=server.host, port=server.port, user="postgres", database="postgres")
    try:
        await admin.execute(f"ALTER SYSTEM SET synchronous_standby_names = 'ANY 2 ({', '.join(names)})'")
        await admin.execute("SELECT pg_reload_conf()")
        while await admin.fetchval("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'") < len(names):
            await asyncio.sleep(0.1)
    finally:
        await admin.close()
