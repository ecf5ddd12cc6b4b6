"""`make regression SQL=…/src/test/regress`: PostgreSQL's own suite against an endpoint, then every page compared.
`make isolation SPECS=…/src/test/isolation`: the same with its isolation tests.

Neither is ours or shipped with the wheel: the directory is that of a PostgreSQL source tree, for the isolation tests
one in which `isolationtester` was built. Files run in the order of the schedule, those of a group side by side, as a
superuser owner (docs/conformance.md). What they answer is compared with what the suite expects for information only:
the suite may be of another major version, and its C library is not built; nobody has sorted out why which file differs.
The volume is the one that the machine offers. What counts: nothing breaks the compute or the pageserver, and after it
all every page of every database, the commit log, the multixacts, two-phase files and relation maps are what the compute
had on its own volume.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import uvloop

from keylake.cluster import Cluster, RunningProject
from keylake.tls_relay import SOCKET_PORT, TlsRelay
from pageserver.redo.build import prepare
from pageserver.redo.worker import RedoWorker
from shared.postgres import find_postgres
from tests.cluster.primary import SHUT_DOWN_LEASE_S, connect, shut_down
from tests.cluster.processes import compute_of
from tests.cluster.test_workloads import Place, differences

_FILE_TIMEOUT_S = 300.0


def groups_of(schedule: Path) -> list[list[str]]:
    lines = [line.partition("#")[0].strip() for line in schedule.read_text().splitlines()]
    return [line.partition(":")[2].split() for line in lines if line.startswith("test:")]


@dataclass(frozen=True)
class Suite:
    """A directory of PostgreSQL's tests: a schedule, inputs, what is expected, and what runs one input."""

    directory: Path
    schedule: str
    inputs: str
    """Pattern of an input's name, below `directory`."""
    command: tuple[str, ...]
    good_statuses: tuple[int, ...]
    """Of `command`, when it came to its end."""
    database: str
    """Some tests name the one that they expect to run in."""
    own_socket: bool = False
    """Past the proxy, at the Postgres's own socket."""


def regression_suite(directory: Path) -> Suite:
    psql = find_postgres().program("psql")
    options = ("-X", "-a", "-q", "-d", "regression", "-v", "HIDE_TABLEAM=on", "-v", "HIDE_TOAST_COMPRESSION=on")
    return Suite(directory, "parallel_schedule", "sql/{}.sql", (str(psql), *options), (0, 3), "regression")


def isolation_suite(directory: Path) -> Suite:
    tester = str(directory.absolute() / "isolationtester")
    # Past the proxy: it asks who waits for whom by the pids that libpq was told, and through the proxy those are the
    # proxy's.
    database = "isolation_regression"
    command = (tester, f"dbname={database}")
    return Suite(directory, "isolation_schedule", "specs/{}.spec", command, (0,), database, own_socket=True)


async def run_file(suite: Suite, results: Path, name: str, env: Mapping[str, str]) -> str:
    """Returns "as expected", "different" or "no end"."""
    given = suite.directory / suite.inputs.format(name)
    with given.open("rb") as sql, (results / f"{name}.out").open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *suite.command,
            stdin=sql,
            stdout=out,
            stderr=asyncio.subprocess.STDOUT,
            env={**env, "PGAPPNAME": f"{suite.directory.name}/{name}"},
        )
        try:
            async with asyncio.timeout(_FILE_TIMEOUT_S):
                status = await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
            return "no end"
    if status not in suite.good_statuses:
        return "no end"
    content = (results / f"{name}.out").read_bytes()
    expected = [file.read_bytes() for file in (suite.directory / "expected").glob(f"{name}*.out")]
    return "as expected" if content in expected else "different"


async def run_suite(
    cluster: Cluster, project: RunningProject, suite: Suite, results: Path, names: Collection[str]
) -> Counter[str]:
    """Those of `names` only, if there are any."""
    connection = await connect(project)
    await connection.execute(f"CREATE DATABASE {suite.database} TEMPLATE template0")
    for name, value in (("lc_messages", "C"), ("lc_monetary", "C"), ("lc_numeric", "C"), ("lc_time", "C"),
                        ("bytea_output", "hex"), ("timezone_abbreviations", "Default")):  # fmt: skip
        await connection.execute(f"ALTER DATABASE {suite.database} SET {name} TO '{value}'")
    await connection.close()
    target = project.connection
    outcomes: Counter[str] = Counter()
    async with TlsRelay(target.host, target.port, target.ssl_context()) as relay:
        env = {
            **os.environ,
            "PGHOST": str(relay.socket_dir),
            "PGPORT": str(SOCKET_PORT),
            "PGUSER": target.user,
            "PGPASSWORD": target.password,
            # The proxy takes the endpoint out; the rest is what pg_regress sets.
            "PGOPTIONS": f"endpoint={target.endpoint_id}",
            "PGTZ": "PST8PDT",
            "PGDATESTYLE": "Postgres, MDY",
            "PG_ABS_SRCDIR": str(suite.directory.absolute()),
            "PG_ABS_BUILDDIR": str(results),
            "PG_LIBDIR": str(results),
            "PG_DLSUFFIX": ".so",
            "LC_ALL": "C",
        }
        if suite.own_socket:
            compute = await compute_of(cluster, project.endpoint.endpoint_id)
            [socket] = compute.socket_dir.glob(".s.PGSQL.*[0-9]")
            env |= {"PGHOST": str(compute.socket_dir), "PGPORT": socket.name.rpartition(".")[2]}
            del env["PGOPTIONS"]
        for scheduled in groups_of(suite.directory / suite.schedule):
            group = [name for name in scheduled if not names or name in names]
            if not group:
                continue
            found = await asyncio.gather(*(run_file(suite, results, name, env) for name in group))
            outcomes.update(found)
            print(
                " ".join(
                    f"{name}{'' if end == 'as expected' else f' ({end})'}"
                    for name, end in zip(group, found, strict=True)
                )
            )
    return outcomes


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "directory", type=Path, help="src/test/regress or src/test/isolation of a PostgreSQL source tree"
    )
    parser.add_argument("names", nargs="*", help="of tests to run; none: all of the schedule")
    parser.add_argument("--results", type=Path, metavar="DIR", help="keep there what the tests answered")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    isolation = (directory / "isolation_schedule").is_file()
    suite = isolation_suite(directory) if isolation else regression_suite(directory)
    if not (directory / suite.schedule).is_file():
        parser.error(f"{directory} has neither a parallel_schedule nor an isolation_schedule")
    if isolation and not (directory / "isolationtester").is_file():
        parser.error(f"{directory} has no isolationtester: build it there (docs/conformance.md)")
    settings: dict[str, dict[str, object]] = {
        "pageserver": {"checkpoint_distance_mb": 32},
        "compute": {"superuser_owners": True, "volume_size_mb": 4096, "max_connections": 60},
        "keymanager": {"lease_ttl_s": SHUT_DOWN_LEASE_S},
    }
    with tempfile.TemporaryDirectory(prefix="keylake-regression-") as temporary:
        results: Path = arguments.results or Path(temporary)
        (results / "results").mkdir(parents=True, exist_ok=True)
        for shared in (results, results / "results"):
            shared.chmod(0o777)  # the compute's Postgres writes there, as somebody else
        async with Cluster(settings=settings) as cluster:
            project = await cluster.create_project("regression")
            redo = await RedoWorker.start(await prepare())
            begun = perf_counter()
            outcomes = await run_suite(cluster, project, suite, results, arguments.names)
            print(f"{dict(outcomes)} in {perf_counter() - begun:.0f} s")
            connection = await connect(project)
            rows = await connection.fetch(
                "SELECT datname FROM pg_database WHERE datallowconn AND datname <> 'template0'"
            )
            await connection.close()
            primary = await shut_down(cluster, project, [row["datname"] for row in rows])
            counts: Counter[str] = Counter()
            different = await differences(Place(cluster, project, redo, {}, primary), primary, counts)
            await redo.close()
            # The next compute comes up from storage, and reads all of it.
            connection = await connect(project, suite.database)
            rows = await connection.fetch(
                "SELECT oid::regclass::text AS name FROM pg_class WHERE relkind IN ('r', 'm') AND relpersistence = 'p'"
            )
            for row in rows:
                await connection.execute(f"SELECT count(*) FROM {row['name']}")  # noqa: S608
            await connection.close()
            for each in different:
                print(f"DIFFERENT: {each}")
            print(f"{counts['pages']} pages compared, {counts['equal']} equal to the byte, {len(different)} different;"
                  f" {len(rows)} tables read by the next compute")  # fmt: skip
            status = await cluster.client.pageserver_status()
            faults = [timeline.fault for timeline in status.timelines if timeline.fault]
            if different or faults or outcomes["no end"] or not counts["pages"]:
                raise SystemExit(f"not equal, or broken: {faults}")


if __name__ == "__main__":
    uvloop.run(main())
