"""`python -m benchmarks chaos --minutes 20 --seed 1`: everything at once, and nothing lost.

The clients and the kills are those of tests/cluster/test_durability.py: transfers whose clients remember what they were
told, and SIGKILLs of one service after the other, any of them, which has to come back. Meanwhile somebody else loads
and empties a table, branches, restores to a time, compacts and collects garbage, in an order that the seed decides
(what falls together is up to the machine). Each branch has to hold the bank as it was then: all that was acknowledged
before, nothing twice, and the total.

At the end all of it is looked at: the bank, three equal logs, and every object that is stored.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Final, TypeVar

from benchmarks.harness import Row
from keylake.cluster import Cluster, RunningProject
from keylake.demo.ledger import CLIENT_ERRORS, Ledger
from shared.api.compute import Timeline
from shared.api.pageserver import Findings
from shared.errors import KeylakeError, NotFoundError, UnavailableError
from shared.point_in_time import PointInTime
from tests.cluster.bank import Bank, audit, open_bank
from tests.cluster.primary import caught_up, connect
from tests.cluster.test_durability import MANAGER, SAFEKEEPERS, Place, converge, crash

T = TypeVar("T")
VICTIMS: Final = [
    *SAFEKEEPERS,
    "pageserver",
    "agent",
    *SAFEKEEPERS,
    "pageserver",
    "postmaster",
    "proxy",
    MANAGER,
    "keymanager",
]
LOAD_ROWS: Final = 20_000
_LOAD: Final = "insert into ballast select i, repeat('b', 400) from generate_series(1, $1::int) i"
KEPT_BRANCHES: Final = 2
SUSPEND_AFTER_S: Final = 5.0
"""Computes of branches, once they were looked at."""
SLOW_START_S: Final = 120.0
PATIENCE_S: Final = 180.0
"""So long one thing is tried again while services are down."""
SETTINGS: Final[dict[str, dict[str, float]]] = {
    "compute": {"poll_interval_s": 0.2},
    "keymanager": {"lease_ttl_s": 15},
    # Small, so that there is much to do: flushes, merges, images, garbage, offloaded and trimmed WAL.
    "pageserver": {
        "checkpoint_distance_mb": 2,
        "compaction_l0_layers": 3,
        "compaction_target_mb": 4,
        "retention_lsn_mb": 8,
        "retention_age_s": 60,
        "gc_interval_s": 5,
        # Whoever loses the lease of the version that it started at loses its compute, and rightly: so it outlasts a
        # stop of the pageserver, or of the manager that renews it, on a machine that is busy.
        "lsn_lease_s": 15,
    },
    "safekeeper": {"wal_keep_size_bytes": 0, "wal_history_size_bytes": 64 << 20, "offload_interval_s": 1},
}


async def patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Again until it works, whoever is down. Raises what it raised last."""
    deadline = monotonic() + PATIENCE_S
    while True:
        try:
            return await attempt()
        except (KeylakeError, *CLIENT_ERRORS):
            if monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


class Chaos:
    """One run. Kills and work go on side by side."""

    def __init__(self, place: Place, seed: int) -> None:
        self.place = place
        self.done: Counter[str] = Counter()
        self._kills = random.Random(f"kills {seed}")
        self._work = random.Random(f"work {seed}")
        self._began_s = monotonic()
        self._branches: list[Timeline] = []

    async def kill(self, bank: Bank, until_s: float) -> None:
        while monotonic() < until_s:
            victim = self._kills.choice(VICTIMS)
            try:
                try:
                    await crash(self.place, bank, victim)
                except UnavailableError:
                    service = self.place.cluster.services.get(victim)
                    if service is None or service.running:
                        raise
                    # It was not ready in time: a busy machine may need longer to start a process.
                    await service.start(SLOW_START_S)
                    await bank.commits(1, SLOW_START_S)
                    self.done["starts that took long"] += 1
            except (TimeoutError, LookupError, UnavailableError) as error:
                error.add_note(f"kill {self.done.total()}, {victim}")
                raise
            self.done[f"killed: {'a safekeeper' if victim in SAFEKEEPERS else victim}"] += 1

    async def work(self, until_s: float) -> None:
        steps = {
            "loads": self._load,
            "branches": self._branch,
            "restores to a time": self._restore,
            "compactions": self._compact,
            "collections": self._collect,
        }
        while monotonic() < until_s:
            step = self._work.choice(list(steps))
            await steps[step]()
            self.done[step] += 1
            await asyncio.sleep(self._work.uniform(0, 2))

    # --- what is done ---

    async def _load(self) -> None:
        async def load() -> None:
            session = await self.place.connect()
            try:
                await session.execute("create table if not exists ballast (id int, filler text)")
                await session.execute("truncate ballast")
                await session.execute(_LOAD, LOAD_ROWS)
            finally:
                session.terminate()

        await patiently(load)

    async def _compact(self) -> None:
        force = self._work.random() < 0.3
        await patiently(lambda: self.place.cluster.client.compact(self.place.project.timeline, force=force))

    async def _collect(self) -> None:
        await patiently(lambda: self.place.cluster.client.collect_garbage(self.place.project.timeline))

    async def _branch(self) -> None:
        await self._branch_at(None, dict(self.place.ledger.acknowledged))

    async def _restore(self) -> None:
        age_s = min(self._work.uniform(1, 20), monotonic() - self._began_s)
        at = PointInTime(timestamp=datetime.now(UTC) - timedelta(seconds=age_s))
        then_s = monotonic() - age_s
        told = {number: told_s for number, told_s in self.place.ledger.acknowledged.items() if told_s < then_s}
        await self._branch_at(at, told)

    async def _branch_at(self, at: PointInTime | None, told: dict[str, float]) -> None:
        """`told`: what was acknowledged by then."""
        project = await patiently(lambda: self._endpoint_of_branch(at))
        self._branches.append(project.timeline)
        ledger = self.place.ledger

        async def look() -> list[str]:
            session = await connect(project)
            try:
                later = {**ledger.acknowledged, **ledger.unknown}
                return await audit(session, Ledger(told, later))
            finally:
                session.terminate()

        if problems := await patiently(look):
            raise AssertionError(f"a branch at {at or 'the end'}: {problems}")
        if len(self._branches) > KEPT_BRANCHES:
            await self._drop(self._branches.pop(self._work.randrange(len(self._branches))))

    async def _endpoint_of_branch(self, at: PointInTime | None) -> RunningProject:
        client, place = self.place.cluster.client, self.place
        name = f"branch-{self._work.getrandbits(40):x}"  # one whose answer was lost stays, as it would for people
        timeline = await client.create_branch(place.project.timeline, name, at)
        endpoint = await client.create_endpoint(timeline, name, suspend_after_s=SUSPEND_AFTER_S)
        return RunningProject(place.project.project, timeline, endpoint, client.connection(endpoint))

    async def _drop(self, branch: Timeline) -> None:
        async def drop() -> None:
            try:
                await self.place.cluster.client.delete_branch(branch)
            except NotFoundError:
                return  # by an attempt whose answer was lost

        await patiently(drop)
        self.done["branches deleted"] += 1

    # --- what is left ---

    async def findings(self) -> list[str]:
        """What is wrong with anything that is stored; and what nobody needs, after two more versions of each index."""
        place, client = self.place, self.place.cluster.client
        await caught_up(place.cluster, place.project)
        found: list[str] = []

        def take(of: str, report: Findings | None) -> None:
            if report is not None:
                found.extend(f"{of}: {each.kind.value} {each.object} {each.detail}" for each in report.findings)

        for timeline in await client.timelines(place.project.project.project_id):
            for _ in range(2):
                await patiently(lambda timeline=timeline: client.compact(timeline, force=True))  # type: ignore[misc]
                await patiently(lambda timeline=timeline: client.checkpoint(timeline))  # type: ignore[misc]
        for info in (await client.pageserver_status()).timelines:
            take(f"{info.timeline_id}, layers", await client.scrub(info))
            take(f"{info.timeline_id}, WAL", await client.scrub_wal(info))
        take("strays", await client.scrub_project(place.project.project.project_id))
        return found


async def measure(minutes: float, seed: int) -> list[Row]:
    """Raises at the first thing that is wrong."""
    async with Cluster(settings=SETTINGS) as cluster:
        place = Place(cluster, await cluster.create_project("chaos"))
        await open_bank(place.connect)
        chaos = Chaos(place, seed)
        until_s = monotonic() + minutes * 60
        async with place.bank() as bank, asyncio.TaskGroup() as tasks:
            await bank.commits(20)
            tasks.create_task(chaos.kill(bank, until_s))
            tasks.create_task(chaos.work(until_s))
        await place.check()
        await converge(place)
        findings = await chaos.findings()
    ledger = place.ledger
    spent_s = max(ledger.acknowledged.values()) - min(ledger.acknowledged.values())
    name = f"chaos, {minutes:g} minutes, seed {seed}"
    rows = [Row(f"{name}: {what}", str(count), "", None, "", None) for what, count in sorted(chaos.done.items())]
    transfers = f"{len(ledger.acknowledged)} in {spent_s:.0f} s"
    rows.append(Row(f"{name}: acknowledged, all there once", transfers, "", None, "none lost, none twice", True))
    rows.append(
        Row(f"{name}: scrub", "; ".join(findings[:5]) or "nothing found", "", None, "nothing found", not findings)
    )
    return rows
