"""Commit throughput with three safekeepers against three `pg_receivewal --synchronous`: same machine, same run.

    python -m benchmarks.safekeeper_commit [--seconds 8] [--rounds 2] [--clients 1,8,32] [--directory DIR]

Both sides are synchronous standbys of the same stock PostgreSQL 16 (on tmpfs, fsync off, `ANY 2` of three), reached by
its Unix socket; both write to DIR, which should be a disk. pg_receivewal is C and writes plaintext; a safekeeper is
Python and seals every byte. Rounds alternate, so that a noisy neighbour hits both. The load is pgbench's TPC-B at scale
10. A standby costs CPU and pgbench, Postgres and six processes share the cores, so on a small machine with a fast disk
the figure is about CPU; on a disk with a real fdatasync it approaches 1.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import statistics
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

import uvloop

from shared.postgres import find_postgres, postgres_command, postgres_environment
from tests.fixtures.safekeeper_postgres import Primary, primary_postgres
from tests.fixtures.safekeeper_process import elect, safekeeper_processes, timeline_clients
from tests.fixtures.waiting import wait_until

STANDBYS = 3
SCALE = 10


def program(primary: Primary, name: str, *arguments: str) -> list[str]:
    argv = [
        find_postgres().program(name),
        "-h",
        primary.address.host,
        "-p",
        str(primary.address.port),
        "-U",
        "postgres",
    ]
    return postgres_command([*argv, *arguments])


async def pgbench(primary: Primary, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *program(primary, "pgbench", *arguments, "postgres"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=postgres_environment(),
    )
    output, _ = await process.communicate()
    text = output.decode()
    assert process.returncode == 0, text
    return text


async def tps(primary: Primary, clients: int, seconds: int) -> float:
    text = await pgbench(primary, "-n", "-T", str(seconds), "-c", str(clients), "-j", "2")
    match = re.search(r"tps = ([0-9.]+)", text)
    assert match is not None, text
    return float(match[1])


async def stream_names(primary: Primary) -> set[str]:
    connection = await primary.connect()
    try:
        rows = await connection.fetch("SELECT application_name FROM pg_stat_replication WHERE state = 'streaming'")
        return {row["application_name"] for row in rows}
    finally:
        await connection.close()


async def with_standbys(primary: Primary, names: list[str], clients: list[int], seconds: int) -> dict[int, float]:
    await primary.require_quorum(names)

    async def all_there() -> bool:
        return set(names) <= await stream_names(primary)

    await wait_until(all_there)
    found = {count: await tps(primary, count, seconds) for count in clients}
    await primary.execute("ALTER SYSTEM SET synchronous_standby_names = ''")
    await primary.execute("SELECT pg_reload_conf()")
    return found


async def measure_pg_receivewal(
    primary: Primary, directory: Path, clients: list[int], seconds: int
) -> dict[int, float]:
    names = [f"receivewal-{n + 1}" for n in range(STANDBYS)]
    processes = []
    try:
        for name in names:
            path = directory / name
            path.mkdir()
            argv = [find_postgres().program("pg_receivewal"), "-D", str(path), "--synchronous", "--no-loop"]
            dsn = f"host={primary.address.host} port={primary.address.port} user=postgres application_name={name}"
            processes.append(
                subprocess.Popen(
                    postgres_command([*argv, "-d", dsn]), stderr=subprocess.DEVNULL, env=postgres_environment()
                )
            )
        return await with_standbys(primary, names, clients, seconds)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(15)
        for name in names:
            shutil.rmtree(directory / name)


async def measure_safekeepers(primary: Primary, directory: Path, clients: list[int], seconds: int) -> dict[int, float]:
    base = directory / "safekeepers"
    base.mkdir()
    try:
        async with safekeeper_processes(base, STANDBYS) as processes:
            start = await primary.insert_lsn()
            async with timeline_clients(processes, primary.system_identifier, start.value) as timelines:
                await elect(timelines, 1)
                for timeline in timelines:
                    await timeline.stream(1, start, primary.address)
                names = [process.node_id for process in processes]
                return await with_standbys(primary, names, clients, seconds)
    finally:
        shutil.rmtree(base)


async def main(arguments: argparse.Namespace) -> None:
    clients = [int(count) for count in arguments.clients.split(",")]
    results: dict[str, defaultdict[int, list[float]]] = {
        "receivewal": defaultdict(list),
        "safekeeper": defaultdict(list),
    }
    with tempfile.TemporaryDirectory(prefix="keylake-bench-", dir=arguments.directory) as name:
        directory = Path(name)
        async with primary_postgres(shared_buffers="256MB", wal_keep_size="256MB", max_wal_size="512MB") as primary:
            await pgbench(primary, "-i", "-q", "-s", str(SCALE))
            await tps(primary, 8, 2)
            for _ in range(arguments.rounds):
                for side, measure in (("receivewal", measure_pg_receivewal), ("safekeeper", measure_safekeepers)):
                    await primary.execute("CHECKPOINT")
                    for count, value in (await measure(primary, directory, clients, arguments.seconds)).items():
                        results[side][count].append(value)
    print(f"{'clients':>8} {'pg_receivewal tps':>18} {'safekeeper tps':>15} {'ratio':>6}")
    for count in clients:
        theirs = statistics.median(results["receivewal"][count])
        ours = statistics.median(results["safekeeper"][count])
        print(f"{count:>8} {theirs:>18.0f} {ours:>15.0f} {ours / theirs:>6.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=8, help="length of each measurement")
    parser.add_argument("--rounds", type=int, default=2, help="measurements per side and number of clients")
    parser.add_argument("--clients", default="1,8,32", help="numbers of pgbench clients")
    parser.add_argument(
        "--directory", default=None, help="where the standbys write; the temporary directory if not given"
    )
    uvloop.run(main(parser.parse_args()))
