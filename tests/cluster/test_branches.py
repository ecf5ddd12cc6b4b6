"""Branches, points in time and read-only endpoints, on a real cluster: what each side sees, and whose keys count."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic

import asyncpg
import pytest
import pytest_asyncio

from keylake.cluster import Cluster, RunningProject
from keylake.layout import SAFEKEEPERS
from shared.api.compute import Timeline
from shared.api.keymanager import KeyState
from shared.api.pageserver import Compact, Garbage, RetentionWindow, TimelineInfo
from shared.errors import ConflictError, InvalidInputError, KeyAccessError, NotFoundError
from shared.keyspace import Fork, RelTag
from shared.lsn import Lsn
from shared.point_in_time import PointInTime
from tests.cluster.pages import PageClient, page_client
from tests.cluster.primary import Session, call_pageserver, caught_up, connect, pageserver_timeline, tag_of
from tests.cluster.processes import compute_of
from tests.fixtures.forked_cluster import ForkedCluster
from tests.fixtures.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

ROWS = 3000
LSN_LEASE_S = 3.0
RELATIONS = ("t", "t_pkey", "pg_class", "pg_attribute", "pg_proc", "pg_database")


@dataclass(slots=True)
class Place:
    """`main` has ROWS rows of generation 0 at `before`, then lost a third and had the others changed."""

    cluster: Cluster
    key_arn: str
    main: RunningProject
    before: Lsn

    async def branch(self, source: RunningProject, name: str, at: PointInTime | None = None) -> RunningProject:
        """With an endpoint of its name."""
        timeline = await self.cluster.client.create_branch(source.timeline, name, at)
        return await self.endpoint(timeline, name)

    async def endpoint(self, timeline: Timeline, name: str, read_only_at: PointInTime | None = None) -> RunningProject:
        client = self.cluster.client
        endpoint = await client.create_endpoint(timeline, name, read_only_at=read_only_at)
        return RunningProject(self.main.project, timeline, endpoint, client.connection(endpoint))

    async def branch_under(self, key_arn: str, name: str) -> RunningProject:
        """Of `main`, under a CMK of its own."""
        client, parent = self.cluster.client, self.main
        configuration = await self.cluster.create_key_configuration(key_arn, name)
        project = await client.create_project(
            parent.project.workspace_id, f"shop/{name}", configuration.key_configuration_id
        )
        timeline = await client.create_branch(parent.timeline, "main", project_id=project.project_id)
        endpoint = await client.create_endpoint(timeline)
        return RunningProject(project, timeline, endpoint, client.connection(endpoint))

    async def timelines(self) -> dict[str, Timeline]:
        found = await self.cluster.client.timelines(self.main.project.project_id)
        return {timeline.name: timeline for timeline in found}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Place]:
    # Small layers: some of what a branch reads lies in its ancestor's sealed files.
    async with ForkedCluster(
        settings={
            "pageserver": {"checkpoint_distance_mb": 1, "lsn_lease_s": LSN_LEASE_S},
            "compute": {"poll_interval_s": 0.2},
        }
    ) as c:
        key_arn = await c.customer.create_key()
        main = await c.create_project("shop", (await c.create_workspace(key_arn)).workspace_id)
        session = await connect(main)
        await session.execute("create table t (id int primary key, generation int, filler text)")
        await session.execute("insert into t select g, 0, repeat('x', 500) from generate_series(1, $1::int) g", ROWS)
        before = await position(session)
        await session.execute("delete from t where id % 3 = 0")
        await session.execute("update t set generation = 1")
        await session.execute("vacuum t")
        await session.close()
        yield Place(c, key_arn, main, before)


async def position(session: Session) -> Lsn:
    """The end of what is committed."""
    return Lsn.parse(await session.fetchval("select pg_current_wal_flush_lsn()::text"))


async def content(project: RunningProject) -> tuple[int, int, int]:
    """(rows, sum of their ids, sum of their generations)."""
    session = await connect(project)
    try:
        row = await session.fetchrow("select count(*), sum(id), sum(generation) from t")
        assert row is not None
        return row[0], row[1], row[2]
    finally:
        await session.close()


async def content_in_time(project: RunningProject) -> tuple[int, int, int]:
    """Once somebody who reconnects gets through: leases have to come back first."""

    async def look() -> tuple[int, int, int] | None:
        with contextlib.suppress(asyncpg.PostgresError):
            return await content(project)
        return None

    found: tuple[int, int, int] = await wait_until(look, 60)
    return found


ALL = (ROWS, ROWS * (ROWS + 1) // 2, 0)


# --- what a branch is ---


async def pages_of(client: PageClient, tag: RelTag, lsn: Lsn) -> list[bytes] | None:
    size = await client.size(tag, lsn.value)
    return None if size is None else await client.pages(tag, range(size), lsn.value)


async def test_a_branch_has_its_parents_pages_of_that_lsn_and_each_goes_its_own_way(place: Place) -> None:
    client = place.cluster.client
    dev = await place.branch(place.main, "dev", PointInTime(lsn=place.before))
    assert dev.timeline.start_lsn == place.before
    assert dev.timeline.ancestor_timeline_id == place.main.timeline.timeline_id
    assert dev.timeline.system_identifier == place.main.timeline.system_identifier
    session = await connect(dev)
    main_session = await connect(place.main)
    tags = [await tag_of(main_session, name) for name in RELATIONS]
    tags += [RelTag(tag.spc, tag.db, tag.rel, Fork.VISIBILITY_MAP) for tag in tags]
    assert await content(dev) == ALL, "the password of a branch's endpoint is its own"
    # Both go on, at the same LSNs and with other bytes.
    for number in range(3):
        await session.execute("update t set generation = 10 where id % 7 = $1", number)
        await session.execute(
            "insert into t select g, 10, 'dev' from generate_series($1::int, $1 + 9) g", ROWS + 1 + number * 10
        )
        await main_session.execute("update t set generation = generation + 1 where id % 5 = $1", number)
    await session.close()
    await main_session.close()
    assert (await content(dev))[0] == ROWS + 30
    assert (await content(place.main))[0] == ROWS - ROWS // 3
    async with page_client(place.cluster, place.main) as old, page_client(place.cluster, dev) as new:
        compared = different = 0
        info = await caught_up(place.cluster, dev)
        for tag in tags:
            pages = await pages_of(old, tag, place.before)
            assert await pages_of(new, tag, place.before) == pages, f"{tag} differs"
            compared += len(pages or ())
            different += await pages_of(new, tag, info.last_record_lsn) != pages
        assert compared > 300
        assert different, "the comparison would notice"
        # What the parent did later never shows, not even its size.
        with pytest.raises(InvalidInputError):
            await new.page(tags[0], 0, 8)
    with pytest.raises(ConflictError):
        await client.create_branch(place.main.timeline, "dev")
    with pytest.raises(NotFoundError):
        await client.delete_branch(dev.timeline.model_copy(update={"project_id": type(dev.timeline.project_id).new()}))


async def test_a_branch_of_a_branch_and_a_restart_of_everything_by_sigkill(place: Place) -> None:
    cluster = place.cluster
    one = await place.branch(place.main, "one", PointInTime(lsn=place.before))
    session = await connect(one)
    await session.execute("delete from t where id <= 10")
    await session.execute("create table own as select g from generate_series(1, 100) g")
    await session.close()
    two = await place.branch(one, "two")
    session = await connect(two)
    await session.execute("insert into own select g from generate_series(101, 150) g")
    await session.close()
    expected = [(project, await content(project)) for project in (place.main, one, two)]
    for project in (one, two):  # what comes back is read from images of what each of them has changed, and through them
        await caught_up(cluster, project)
        await call_pageserver(cluster, project, "compact", TimelineInfo, Compact(force=True))
    sandboxes = Path(json.loads((cluster.layout.config / "pageserver.json").read_text())["cache_dir"]) / "sandboxes"
    left = sandboxes.readlink()
    assert list(left.iterdir()), "of its redo workers"
    names = ["keymanager", *(f"safekeeper-{n}" for n in range(1, SAFEKEEPERS + 1)), "pageserver", "compute", "proxy"]
    await asyncio.gather(*(cluster.service(name).kill() for name in names))
    assert left.is_dir(), "who is killed wipes nothing"
    for name in names:
        await cluster.service(name).start()
    assert not left.exists()
    assert sandboxes.readlink().is_dir()
    for project, rows in expected:
        assert await content_in_time(project) == rows
    for project, own_rows in ((two, 150), (one, 100)):
        session = await connect(project)
        assert await session.fetchval("select count(*) from own") == own_rows
        await session.close()
    info = await pageserver_timeline(cluster, two)
    assert info is not None
    assert info.ancestor is not None
    assert info.ancestor.timeline_id == one.timeline.timeline_id


# --- points in time ---


async def test_back_to_before_a_drop_table_by_its_time(place: Place) -> None:
    session = await connect(place.main)
    await session.execute("create table precious as select g from generate_series(1, 1000) g")
    await session.execute("insert into precious values (0)")
    time: datetime = await session.fetchval("select clock_timestamp()")
    await session.execute("drop table precious")
    await session.execute("create table junk as select 1")
    await session.close()
    restored = await place.branch(place.main, "restored", PointInTime(timestamp=time))
    session = await connect(restored)
    assert await session.fetchval("select count(*) from precious") == 1001
    assert await session.fetchval("select to_regclass('junk')") is None
    await session.close()
    for wrong, message in (
        (PointInTime(timestamp=datetime.now(UTC) + timedelta(hours=1)), "has not come yet"),
        (PointInTime(timestamp=datetime(2001, 1, 1, tzinfo=UTC)), "before the first commit"),
        (PointInTime(lsn=Lsn(1 << 60)), "the end of the log"),
        (PointInTime(lsn=Lsn(8)), "history of this branch begins"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            await place.cluster.client.create_branch(place.main.timeline, "never", wrong)
    # Below where it was branched off there is nothing of its own.
    with pytest.raises(InvalidInputError, match="history of this branch begins"):
        await place.cluster.client.create_branch(restored.timeline, "never", PointInTime(lsn=place.before))
    assert "never" not in await place.timelines()
    # A time after the last commit means all of it.
    latest = await place.branch(place.main, "latest", PointInTime(timestamp=datetime.now(UTC)))
    session = await connect(latest)
    assert await session.fetchval("select to_regclass('junk')") is not None
    await session.close()


async def test_a_read_only_endpoint_shows_the_past_and_refuses_writes(place: Place) -> None:
    past = await place.endpoint(place.main.timeline, "past", PointInTime(lsn=place.before))
    assert past.endpoint.read_only_lsn == place.before
    writer = await connect(place.main)
    assert await content(past) == ALL
    session = await connect(past)
    for statement in (
        "insert into t values (0)",
        "create table x ()",
        "create temporary table x ()",
        "set transaction_read_only = off; delete from t",
        "truncate t",
    ):
        with pytest.raises(asyncpg.PostgresError) as refused:
            await session.execute(statement)
        assert refused.value.sqlstate in ("25006", "0A000", "22023"), statement
    assert await session.fetchval("select pg_is_in_recovery()")
    await writer.execute("insert into t values (-1, 0, 'while it is read')")
    assert await session.fetchval("select count(*) from t where id < 0") == 0
    # Its writing neighbour on the same timeline is not disturbed by its start, nor by its end.
    term = (await place.cluster.client.endpoint(place.main.endpoint.endpoint_id)).term
    await place.cluster.client.kill_endpoint(past.endpoint.endpoint_id)
    await writer.execute("delete from t where id = -1")
    assert await content(past) == ALL, "it starts again"
    assert (await place.cluster.client.endpoint(place.main.endpoint.endpoint_id)).term == term
    await session.close()
    await writer.close()


async def test_what_a_read_only_endpoint_reads_is_not_collected_while_it_runs(place: Place) -> None:
    cluster = place.cluster
    leased = await cluster.create_project("leased", place.main.project.workspace_id)
    writer = await connect(leased)
    await writer.execute("create table t (id int primary key, generation int)")
    await writer.execute("insert into t values (1, 0)")
    lsn = await position(writer)
    endpoint = await cluster.client.create_endpoint(leased.timeline, "past", read_only_at=PointInTime(lsn=lsn))
    past = RunningProject(leased.project, leased.timeline, endpoint, cluster.client.connection(endpoint))
    assert await content(past) == (1, 1, 0)
    began = monotonic()
    await writer.execute("update t set generation = 1")
    await writer.execute("create table junk as select repeat('x', 500) from generate_series(1, 4000)")  # it is flushed
    await writer.close()

    async def flushed() -> bool:
        return (await caught_up(cluster, leased)).remote_consistent_lsn > lsn

    await wait_until(flushed, 30)

    async def collected() -> Garbage:
        """With everything but the newest version too old."""
        await caught_up(cluster, leased)
        await call_pageserver(cluster, leased, "compact", TimelineInfo, Compact(force=True))
        window = RetentionWindow(lsn_bytes=1, age_s=0)
        await call_pageserver(cluster, leased, "retention", TimelineInfo, window)
        return await call_pageserver(cluster, leased, "gc", Garbage)

    await asyncio.sleep(max(0.0, began + 1.5 * LSN_LEASE_S - monotonic()))  # the first lease alone would be over
    assert (await collected()).oldest_lsn > lsn
    await cluster.client.kill_endpoint(past.endpoint.endpoint_id)
    assert await content(past) == (1, 1, 0), "another compute gets all of it"
    await cluster.client.stop_endpoint(past.endpoint.endpoint_id)

    async def gone() -> bool:
        await collected()
        async with page_client(cluster, leased) as client:
            try:
                await client.size(RelTag(1663, 1, 1259, Fork.MAIN), lsn.value)
            except InvalidInputError:
                return True
        return False

    await wait_until(gone, 10 * LSN_LEASE_S)
    with pytest.raises(asyncpg.PostgresError, match="not kept any more"):
        await content(past)


# --- keys ---


async def test_branches_are_made_while_keys_rotate(place: Place) -> None:
    client, project_id = place.cluster.client, place.main.project.project_id
    expected = await content(place.main)

    async def rotate() -> None:
        for _ in range(3):
            await client.rotate_kek(project_id)
            await client.start_key_upkeep(project_id)

    branches, _ = await asyncio.gather(
        asyncio.gather(*(client.create_branch(place.main.timeline, f"rotated-{n}") for n in range(3))), rotate()
    )

    async def only_the_newest_is_left() -> bool:
        with contextlib.suppress(ConflictError):  # somebody has not reported yet
            await client.retire_keks(project_id)
        return all(kek.destroyed for kek in (await client.encryption(project_id)).keks[:-1])

    await client.start_key_upkeep(project_id)
    await wait_until(only_the_newest_is_left, 60)
    await place.cluster.service("pageserver").kill()
    await place.cluster.service("pageserver").start()
    assert await content(await place.endpoint(branches[-1], "rotated")) == expected


async def test_branches_both_ways_between_two_projects_are_made_at_once(place: Place) -> None:
    client = place.cluster.client
    configuration = await place.cluster.create_key_configuration(place.key_arn, "both ways")
    other = await client.create_project(
        place.main.project.workspace_id, "shop/both-ways", configuration.key_configuration_id
    )
    there = await client.create_branch(place.main.timeline, "main", project_id=other.project_id)
    expected = await content(place.main)
    # Two each way: whoever waits for the first one is handed one lock while the next has the other.
    async with asyncio.timeout(25):  # the pageserver's own patience is longer
        made = await asyncio.gather(
            *(
                branch
                for number in range(2)
                for branch in (
                    client.create_branch(place.main.timeline, f"there-{number}", project_id=other.project_id),
                    client.create_branch(there, f"back-{number}", project_id=place.main.project.project_id),
                )
            )
        )
    assert [each.project_id for each in made] == [other.project_id, place.main.project.project_id] * 2
    # One of `main`'s own project that reads through another project, and `main` again.
    back = await place.endpoint(made[1], "back")
    assert await content(back) == expected
    await client.stop_endpoint(back.endpoint.endpoint_id)


async def test_revocation_ends_every_compute_of_every_branch(place: Place) -> None:
    cluster, client = place.cluster, place.cluster.client
    branch = await place.branch(place.main, "revoked")
    past = await place.endpoint(place.main.timeline, "revoked-past", PointInTime(lsn=place.before))
    own_key_arn = await cluster.customer.create_key()
    own = await place.branch_under(own_key_arn, "own")
    running = [place.main, branch, past, own]
    for project in (branch, own):
        session = await connect(project)
        await session.execute("insert into t values (-5, 5, 'its own')")
        await session.close()
    expected = [await content(project) for project in running]

    async def active() -> bool:
        projects = [await client.project(each.project.project_id) for each in (place.main, own)]
        return all(project.state is KeyState.ACTIVE for project in projects)

    async def served(number: int) -> bool:
        with contextlib.suppress(asyncpg.PostgresError):  # the proxy has not heard of it yet
            return await content(running[number]) == expected[number]
        return False

    async def all_served() -> None:
        await wait_until(active, 60)
        for number in range(len(running)):
            await wait_until(functools.partial(served, number), 60)

    # Its own key ends that branch, and nothing else.
    compute = await compute_of(cluster, own.endpoint.endpoint_id)
    session = await connect(place.main)
    await cluster.customer.disable(own_key_arn)
    await compute.gone()
    async with page_client(cluster, own) as pages:
        with pytest.raises(KeyAccessError):
            await pages.size(RelTag(1663, 1, 1259, Fork.MAIN), own.timeline.start_lsn.value)
    await session.execute("update t set generation = generation where id = 1")
    assert [await content(project) for project in running[:-1]] == expected[:-1]
    await session.close()
    await cluster.customer.enable(own_key_arn)
    await all_served()

    # The key of what it was made from ends all of them.
    computes = [await compute_of(cluster, project.endpoint.endpoint_id) for project in running]
    await cluster.customer.disable(place.key_arn)
    try:
        for compute in computes:
            await compute.gone()
        for project in (branch, own):
            async with page_client(cluster, project) as pages:
                with pytest.raises(KeyAccessError):
                    await pages.size(RelTag(1663, 1, 1259, Fork.MAIN), project.timeline.start_lsn.value)
        for project in running:
            with pytest.raises(asyncpg.PostgresError):
                await connect(project)
        with pytest.raises(KeyAccessError):
            await client.create_branch(place.main.timeline, "while-revoked")
        assert "while-revoked" not in await place.timelines()
    finally:
        await cluster.customer.enable(place.key_arn)
    await all_served()


# --- deletion ---


async def test_a_branch_that_others_read_stays_and_a_deleted_one_leaves_nothing(place: Place) -> None:
    cluster, client = place.cluster, place.cluster.client
    upper = await place.branch(place.main, "upper")
    session = await connect(upper)
    await session.execute("delete from t")
    await session.close()
    lower = await place.branch(upper, "lower")
    assert (await content(lower))[0] == 0
    with pytest.raises(ConflictError, match="delete lower first"):
        await client.delete_branch(upper.timeline)
    with pytest.raises(ConflictError, match="no branch"):
        await client.delete_branch(place.main.timeline)

    def files(timeline: Timeline) -> list[Path]:
        return [p for p in cluster.layout.home.rglob("*") if p.is_file() and str(timeline.timeline_id) in str(p)]

    assert len(files(lower.timeline)) > SAFEKEEPERS
    compute = await compute_of(cluster, lower.endpoint.endpoint_id)
    await client.delete_branch(lower.timeline)
    await compute.gone()
    # The highest slot that was seen is remembered: an index that comes back from a backup is refused.
    assert {path.name for path in files(lower.timeline)} <= {"index-seen"}
    assert "lower" not in await place.timelines()
    with pytest.raises(NotFoundError):
        await client.endpoint(lower.endpoint.endpoint_id)
    with pytest.raises(NotFoundError):
        await client.delete_branch(lower.timeline)
    # After a restart nobody misses it, and what it was made from can go, too.
    await cluster.service("pageserver").kill()
    await cluster.service("pageserver").start()
    info = await wait_until(lambda: pageserver_timeline(cluster, upper))
    assert info.branches == {}
    assert (await client.pageserver_status()).fault == ""
    await client.delete_branch(upper.timeline)
    again = await place.branch(place.main, "upper")
    assert (await content(again))[0] > 0
