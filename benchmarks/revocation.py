"""From the customer's no to the last instance sealed, and from their yes to the first row.

`measure` is the short form, for `make bench`. `python -m benchmarks.revocation` is `make bench-revocation`:
distributions over many runs with many computes alive; the same behind a partition; and 10,000 simulated instances on
one keymanager. It prints a table and writes benchmarks/results/revocation.json and .svg.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter, time
from typing import Any, Final

import asyncpg
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.fleet import Fleet, FleetSettings, fleet
from benchmarks.harness import Row
from benchmarks.plot import Curve, ecdf
from keylake.cluster import Cluster, RunningProject
from keylake.demo.ledger import CLIENT_ERRORS
from shared.api.keymanager import Revocation
from shared.config import Address
from shared.ids import ProjectId
from tests.cluster_secrecy.keys import metadata

RESULTS: Final = Path(__file__).parent / "results"
_RETRY_S: Final = 0.1
"""Between two log-ins of a client that is refused. A handshake each: more of them would keep others waiting."""
_PROBE_S: Final = 0.1
"""Between two queries of the client that each compute has."""
_LOOK_S: Final = 0.5
_WAIT_S: Final = 120.0
_STEADY_S: Final = 20.0
_CUT_OFF: Final = ("compute", "proxy", "pageserver", "safekeeper")
"""All that hold leases. A compute's agent is told its manager's way to the keymanager."""


async def measure(rounds: int = 5) -> list[Row]:
    sealed, restored = [], []
    # The key goes again and again, which the hold-down would take for a KMS that flaps.
    async with Cluster(settings={"keymanager": {"restore_hold_s": 0}}) as cluster:
        key = await cluster.customer.create_key()
        workspace = await cluster.create_workspace(key)
        stage = _Stage(cluster, key, [await cluster.create_project("bench", workspace.workspace_id)])
        await stage.start()
        for _ in range(rounds):
            run = await stage.turn()
            sealed.append(run.sealed_s)
            restored.append(run.restored_s)
    worst = max(sealed)
    return [
        Row(
            f"CMK disabled → last instance sealed, {rounds} times",
            f"median {statistics.median(sealed):.2f} s, worst {worst:.2f} s",
            "10 min, best documented bound of a managed database",
            worst / 600,
            "<= 5 s",
            worst <= 5,
        ),
        Row(
            "CMK enabled → first row",
            f"median {statistics.median(restored):.2f} s, worst {max(restored):.2f} s",
            "-",
            None,
            "report",
            None,
        ),
    ]


# --- computes ---


@dataclass
class Run:
    """One time off and on again, in seconds from the customer's call."""

    sealed_s: float
    """Until the keymanager has sealed the last instance of the last project."""
    silent_s: float
    """Until the last answer of any compute."""
    fenced: int
    restored_s: float
    """From the customer's yes to the first row of the project that asks."""
    all_restored_s: float


@dataclass
class _Stage:
    cluster: Cluster
    key: str
    projects: list[RunningProject]
    connections: dict[int, asyncpg.Connection[Any]] = field(default_factory=dict)
    answered_s: float = 0.0
    turns: int = 0

    async def start(self) -> None:
        for number in range(len(self.projects)):
            await self._connect(number)
            await self.connections[number].execute("CREATE TABLE t (n int)")

    async def _connect(self, number: int) -> None:
        arguments = self.projects[number].connection.asyncpg_arguments()
        begun = perf_counter()
        while True:
            try:
                self.connections[number] = await asyncpg.connect(**arguments, timeout=60)
                return
            except CLIENT_ERRORS:
                if perf_counter() - begun > _WAIT_S:
                    raise
                await asyncio.sleep(_RETRY_S)

    async def _ask(self, number: int) -> None:
        """Queries until there is no answer any more."""
        with contextlib.suppress(*CLIENT_ERRORS):
            while True:
                await self.connections[number].fetchval("SELECT count(*) FROM t")
                self.answered_s = max(self.answered_s, time())
                await asyncio.sleep(_PROBE_S)

    async def turn(self, cut: _Cut | None = None) -> Run:
        """Everything alive → off → sealed → on → everything alive. `cut`: everybody is cut off first."""
        client, customer = self.cluster.client, self.cluster.customer
        self.turns += 1
        for number in range(len(self.projects)):
            await self.connections[number].execute("INSERT INTO t VALUES ($1)", self.turns)
        before = [len(await client.revocations(each.project.project_id)) for each in self.projects]
        asking = [asyncio.create_task(self._ask(number)) for number in range(len(self.projects))]
        await asyncio.sleep(3 * _PROBE_S)
        if cut is not None:
            cut.cut()
        denied_at = time()
        await customer.disable(self.key)
        revocations = [await self._sealed(each, known) for each, known in zip(self.projects, before, strict=True)]
        await asyncio.wait_for(asyncio.gather(*asking), _WAIT_S)
        sealed_at = max(each.detected_at.timestamp() + (each.sealed_after_s or 0.0) for each in revocations)
        silent_at = self.answered_s
        for connection in self.connections.values():
            connection.terminate()
        if cut is not None:
            cut.mend()
        enabled = perf_counter()
        await customer.enable(self.key)
        await self._connect(0)
        if await self.connections[0].fetchval("SELECT count(*) FROM t") != self.turns:
            raise RuntimeError("a committed row is lost")
        restored_s = perf_counter() - enabled
        await asyncio.gather(*(self._connect(number) for number in range(1, len(self.projects))))
        fenced = sum(i.outcome == "fenced" for each in revocations for i in each.instances)
        if cut is not None and fenced != sum(len(each.instances) for each in revocations):
            raise RuntimeError("somebody has heard of it through the cut")
        return Run(sealed_at - denied_at, max(0.0, silent_at - denied_at), fenced, restored_s, perf_counter() - enabled)

    async def _sealed(self, project: RunningProject, known: int) -> Revocation:
        async with asyncio.timeout(_WAIT_S):
            while True:
                found = await self.cluster.client.revocations(project.project.project_id)
                if len(found) > known and found[0].sealed_after_s is not None:
                    return found[0]
                await asyncio.sleep(_LOOK_S)  # when it was is written there; to ask takes the keymanager's CPU


class _Cut:
    """The only way to the keymanager: bytes are passed on, until it is cut.

    Not the links of a cluster, which would pass on rows, pages and WAL as well, and take this machine's time.
    """

    def __init__(self) -> None:
        self.port = 0
        self._open = asyncio.Event()
        self._open.set()
        self._target = 0

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            self._open.set()
            server.close()

    def to(self, port: int) -> None:
        self._target = port

    def cut(self) -> None:
        """Nothing goes through, and nobody is told."""
        self._open.clear()

    def mend(self) -> None:
        self._open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pass(reader, back), self._pass(there, writer), return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        finally:
            await self._open.wait()  # nor does anybody hear who has gone
            writer.close()


async def measure_computes(runs: int, computes: int, partitioned_runs: int, console: Console) -> list[Row]:
    cut = _Cut()
    async with cut.serving():
        address = [{"host": "127.0.0.1", "port": cut.port}]
        settings: dict[str, dict[str, Any]] = {name: {"keymanager": address} for name in _CUT_OFF}
        settings["keymanager"] = {"restore_hold_s": 0}
        async with Cluster(settings=settings) as cluster:
            cut.to(cluster.ports.keymanager)
            key = await cluster.customer.create_key()
            workspace = await cluster.create_workspace(key)
            projects = [await cluster.create_project(f"p{n}", workspace.workspace_id) for n in range(computes)]
            stage = _Stage(cluster, key, projects)
            await stage.start()
            ttl_s = (await cluster.client.keymanager_status()).lease_ttl_s
            reachable = []
            for number in range(runs):
                reachable.append(await stage.turn())
                console.print(f"run {number + 1} of {runs}: {_words(reachable[-1])}")
            behind = []
            for number in range(partitioned_runs):
                behind.append(await stage.turn(cut))
                console.print(f"partitioned run {number + 1} of {partitioned_runs}: {_words(behind[-1])}")
    _store("computes", {"reachable": [asdict(r) for r in reachable], "partitioned": [asdict(r) for r in behind]})
    what = f"{computes} computes alive"
    rows = [
        _row(f"CMK disabled → last instance sealed, {what}", [r.sealed_s for r in reachable], 2.0),
        _row(f"CMK disabled → last answer of any compute, {what}", [r.silent_s for r in reachable], 2.0),
        _row("CMK enabled → first row", [r.restored_s for r in reachable], 3.0),
        _row(f"CMK enabled → all {computes} computes back", [r.all_restored_s for r in reachable], None),
    ]
    if behind:
        limit_s = ttl_s + 1
        rows += [
            _row("all cut off: CMK disabled → last instance fenced", [r.sealed_s for r in behind], limit_s),
            _row("all cut off: CMK disabled → last answer of any compute", [r.silent_s for r in behind], limit_s),
        ]
    return rows


def _words(run: Run) -> str:
    return (
        f"sealed {run.sealed_s:.2f} s (fenced: {run.fenced}), last answer {run.silent_s:.2f} s, first row "
        f"{run.restored_s:.2f} s, all back {run.all_restored_s:.1f} s; load {os.getloadavg()[0]:.1f}"
    )


def _row(what: str, values_s: Sequence[float], limit_s: float | None) -> Row:
    p50, p99 = _quantile(values_s, 0.5), _quantile(values_s, 0.99)
    return Row(
        what,
        f"p50 {p50:.2f} s, p99 {p99:.2f} s, n = {len(values_s)}",
        "",
        None,
        "reported" if limit_s is None else f"p99 <= {limit_s:g} s",
        None if limit_s is None else p99 <= limit_s,
    )


def _quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


# --- simulated instances ---


async def measure_fleet(size: int, rounds: int, console: Console) -> list[Row]:
    # One keymanager: it needs no haste in being replaced, and its clients compete with it for two cores.
    async with Cluster(settings={"keymanager": {"leader_ttl_s": 10, "restore_hold_s": 0}}) as cluster:
        workspace = await cluster.create_workspace()
        project = await cluster.client.create_project(workspace.workspace_id, "fleet")
        ttl_s = (await cluster.client.keymanager_status()).lease_ttl_s
        settings = FleetSettings(
            size,
            Address(port=cluster.ports.keymanager),
            cluster.layout.ca_certificate,
            cluster.layout.keys / "pageserver.json",
            project.project_id,
            ttl_s / 2,
        )
        keymanager = cluster.service("keymanager").pid
        heard, sealed, cpu = list[float](), list[float](), list[float]()
        async with fleet(settings) as instances:
            console.print(f"{size} sessions opened in {instances.opened_s:.0f} s")
            await _all_live(instances, size)
            cpu_s = _cpu_s(keymanager)
            await asyncio.sleep(_STEADY_S)
            waits = (await instances.state())["waits_s"]
            per_cpu_s = len(waits) / (_cpu_s(keymanager) - cpu_s)
            await _all_live(instances, size)
            memory_mb = _resident_mb(keymanager)
            for _ in range(rounds):
                cpu_s = _cpu_s(keymanager)
                revocation, state = await _revoke(cluster, project.project_id, instances)
                cpu.append(_cpu_s(keymanager) - cpu_s)
                detected_at = revocation.detected_at.timestamp()
                heard.append(max(state["heard"]) - detected_at)
                sealed.append(revocation.sealed_after_s)
                console.print(
                    f"{len(state['heard'])} of {size} heard of it within {heard[-1]:.2f} s; "
                    f"sealed after {sealed[-1]:.2f} s, {revocation.fenced} fenced, {cpu[-1]:.2f} s of the keymanager's "
                    f"CPU; load {os.getloadavg()[0]:.1f}"
                )
                await cluster.client.restore(project.project_id)
                await _all_live(instances, size)
    _store("fleet", {"size": size, "heard_s": heard, "sealed_s": sealed, "cpu_s": cpu, "opened_s": instances.opened_s})
    return [
        Row(
            f"{size} sessions open at once on one keymanager, each with a lease that is renewed every {ttl_s / 2:g} s",
            f"opened at {size / instances.opened_s:.0f}/s; {memory_mb:.0f} MB; a renewal takes p50 "
            f"{_quantile(waits, 0.5) * 1e3:.0f} ms, p99 {_quantile(waits, 0.99) * 1e3:.0f} ms",
            "",
            None,
            f"p99 < {ttl_s / 2:g} s",
            _quantile(waits, 0.99) < ttl_s / 2,
        ),
        Row(
            f"renewals by these {size}, tokens renewed too, per second of the keymanager's CPU",
            f"{per_cpu_s:.0f}; {len(waits) / _STEADY_S:.0f}/s were asked for",
            f"{size / (ttl_s / 2):.0f}/s: what they ask for",
            per_cpu_s / (size / (ttl_s / 2)),
            ">= 1 on one core",
            per_cpu_s >= size / (ttl_s / 2),
        ),
        _row(f"revoked → the last of {size} has heard of it", heard, 2.0),
        _row(f"revoked → {size} acknowledgements recorded, sealed", sealed, None),
        _row("CPU of the keymanager for one of these", cpu, None),
    ]


async def _all_live(instances: Fleet, size: int) -> None:
    """Raises RuntimeError when they are not, in time."""
    failures: list[str] = []
    for _ in range(round(_WAIT_S / 0.5)):
        state = await instances.state()
        if state["live"] == state["open"] == size:
            return
        failures += state["failures"]
        await asyncio.sleep(0.5)
    raise RuntimeError(f"only {state['open']} sessions and {state['live']} leases of {size}: {failures[-3:]}")


@dataclass(frozen=True, slots=True)
class _Sealed:
    detected_at: datetime
    sealed_after_s: float
    fenced: int


async def _revoke(cluster: Cluster, project_id: ProjectId, instances: Fleet) -> tuple[_Sealed, dict[str, Any]]:
    await instances.state()
    # What the keymanager has written down, without asking it: its answer is 10,000 lines long.
    async with metadata(cluster) as database, asyncio.timeout(_WAIT_S):
        await cluster.client.revoke(project_id, "benchmark")
        while True:
            await asyncio.sleep(0.1)
            [row] = await database.fetch(
                "SELECT revocation_id, detected_at, sealed_after_s FROM revocation ORDER BY detected_at DESC LIMIT 1"
            )
            if row["sealed_after_s"] is not None:
                break
        fenced = await database.fetchval(
            "SELECT count(*) FROM revocation_instance WHERE revocation_id = $1 AND outcome = 'fenced'",
            row["revocation_id"],
        )
        return _Sealed(row["detected_at"], row["sealed_after_s"], fenced), await instances.state()


def _cpu_s(pid: int) -> float:
    """User and system time of a process (proc(5), fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


# --- results ---


def _store(part: str, values: dict[str, Any]) -> None:
    """Adds to results/revocation.json, so that the parts can be measured one by one; and draws the picture anew."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "revocation.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    stored[part] = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, Linux {platform.release()}, load {os.getloadavg()[0]:.1f} at the end",
        **values,
    }
    path.write_text(json.dumps(stored, indent=2))
    curves = []
    computes = stored.get("computes", {})
    for name, key, label in (
        ("reachable", "sealed_s", "disabled → sealed"),
        ("reachable", "restored_s", "enabled → first row"),
        ("partitioned", "sealed_s", "disabled → fenced, all cut off"),
        ("partitioned", "silent_s", "disabled → last answer, all cut off"),
    ):
        if runs := computes.get(name):
            curves.append(Curve(label, [run[key] for run in runs]))
    if "fleet" in stored:
        curves.append(Curve(f"revoked → {stored['fleet']['size']} have heard of it", stored["fleet"]["heard_s"]))
    (RESULTS / "revocation.svg").write_text(ecdf("Revocation and restore", curves))


async def _all(arguments: argparse.Namespace, console: Console) -> list[Row]:
    rows: list[Row] = []
    if arguments.runs:
        rows += await measure_computes(arguments.runs, arguments.computes, arguments.partitioned_runs, console)
    if arguments.fleet:
        rows += await measure_fleet(arguments.fleet, arguments.fleet_rounds, console)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.revocation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.revocation --runs 5 --computes 4 --fleet 0",
    )
    parser.add_argument("--runs", type=int, default=30, help="with computes; 0: none (default: %(default)s)")
    parser.add_argument("--computes", type=int, default=20, help="alive at once (default: %(default)s)")
    parser.add_argument("--partitioned-runs", type=int, default=30, help="more, cut off (default: %(default)s)")
    parser.add_argument("--fleet", type=int, default=10_000, help="simulated instances; 0: none (default: %(default)s)")
    parser.add_argument("--fleet-rounds", type=int, default=10, help="revocations of it (default: %(default)s)")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    rows = uvloop.run(_all(arguments, console))
    table = Table(show_edge=False)
    for heading in ("what", "measured", "target", ""):
        table.add_column(heading)
    for row in rows:
        table.add_row(row.what, row.measured, row.target, {True: "✓", False: "✗", None: ""}[row.reached])
    console.print(table)
    console.print(f"{RESULTS / 'revocation.json'} and .svg; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
