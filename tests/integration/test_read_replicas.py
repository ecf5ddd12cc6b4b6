"""Read replicas: a stock hot standby over what the pageserver and the safekeepers have, with everything around it real.

`app` may not checkpoint. But DROP DATABASE does, whatever else is going on, and CREATE DATABASE … STRATEGY file_copy.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from compute.volume.base import VolumeKind
from shared.api.compute import (
    BranchFrom,
    ChangeEndpoint,
    CreatedEndpoint,
    CreateEndpoint,
    CreateTimeline,
    Endpoint,
    EndpointSize,
    EndpointState,
    Timeline,
)
from shared.api.pageserver import ADMIN_ROLE
from shared.errors import ConflictError, UnavailableError
from shared.http import ServiceClient
from shared.ids import ProjectId
from shared.lease import Lease
from tests.fixtures.compute_cluster import ComputeCluster, compute_cluster
from tests.fixtures.fuse import why_no_fuse
from tests.fixtures.keymanager import metadata_server
from tests.fixtures.waiting import wait_until
from tests.integration.test_compute_manager import (
    CONNECTION_LOST,
    log_in,
    make_endpoint,
    reach,
    state_of,
)

__all__ = ["metadata_server"]  # a fixture

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]


@dataclass(slots=True)
class Place:
    cluster: ComputeCluster
    client: ServiceClient
    primary: CreatedEndpoint
    replica: CreatedEndpoint
    """Of `primary`. Tests share the two, with tables of their own, and care nothing whether they run."""

    async def another(self, name: str) -> CreatedEndpoint:
        return await follower_of(self.client, self.primary, name)

    @asynccontextmanager
    async def sessions(self, *endpoints: CreatedEndpoint) -> AsyncIterator[list[Any]]:
        """One at each, in order; what is stopped starts."""
        sessions = []
        try:
            for endpoint in endpoints:
                sessions.append(await log_in(await reach(self.client, endpoint), endpoint))
            yield sessions
        finally:
            for session in sessions:
                session.terminate()

    async def change(self, endpoint: Endpoint, **changes: Any) -> None:
        path = f"/v1/endpoints/{endpoint.endpoint_id}"
        await self.client.call(Endpoint, "PATCH", path, body=ChangeEndpoint(**changes))

    async def act(self, endpoint: Endpoint, verb: str) -> Endpoint:
        return await self.client.call(Endpoint, "POST", f"/v1/endpoints/{endpoint.endpoint_id}:{verb}")

    async def stopped(self, endpoint: Endpoint) -> Endpoint:
        async def look() -> Endpoint | None:
            state = await state_of(self.client, endpoint)
            return state if state.state is EndpointState.STOPPED else None

        found: Endpoint = await wait_until(look, 40)
        return found


async def follower_of(client: ServiceClient, primary: CreatedEndpoint, name: str) -> CreatedEndpoint:
    """With the password that it has."""
    body = CreateEndpoint(timeline_id=primary.timeline_id, name=name, follows=True)
    made = await client.call(CreatedEndpoint, "POST", f"/v1/projects/{primary.project_id}/endpoints", body=body)
    assert (made.password, made.follows, made.read_only_lsn) == ("", True, None)
    return made.model_copy(update={"password": primary.password})


@asynccontextmanager
async def running(metadata_server: str, **options: object) -> AsyncIterator[Place]:
    name = f"replicas_{secrets.token_hex(6)}"
    metadata = await asyncpg.connect(f"{metadata_server}/postgres")
    try:
        await metadata.execute(f"CREATE DATABASE {name}")
        with tempfile.TemporaryDirectory(prefix="kl-") as scratch:
            dsn = f"{metadata_server}/{name}"
            async with (
                compute_cluster(Path(scratch), dsn, pageserver=True, **options) as cluster,
                cluster.client() as client,
            ):
                # Everything but the computes shares one event loop here, also when many rows are ingested at a time.
                cluster.leases.ttl_s = 20.0
                primary = await make_endpoint(client, ProjectId.new())
                place = Place(cluster, client, primary, await follower_of(client, primary, "replica"))
                async with place.sessions(primary) as (session,):
                    await session.execute("CREATE TABLE there_is_a_log ()")
                yield place
        await metadata.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await metadata.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place(metadata_server: str) -> AsyncIterator[Place]:
    async with running(metadata_server, idle_poll_interval_s=0.2) as place:
        yield place


async def checkpoint(session: Any) -> None:
    await session.execute("CREATE DATABASE short_lived")
    await session.execute("DROP DATABASE short_lived")


async def prepare_turmoil(session: Any) -> None:
    for table in ("shrinks", "emptied", "rewritten", "dropped", "locked"):
        await session.execute(f"CREATE TABLE {table} (i int PRIMARY KEY, b text)")
        await session.execute(f"INSERT INTO {table} SELECT g, repeat('x', 100) FROM generate_series(1, 2000) g")  # noqa: S608


async def turmoil(session: Any, other: Any) -> None:
    """Everything that redo may find done already: files that are shorter, longer, gone, replaced, or another's."""
    await session.execute("DELETE FROM shrinks WHERE i > 100")
    await session.execute("VACUUM shrinks")  # cuts it
    await session.execute("INSERT INTO shrinks SELECT g, 'y' FROM generate_series(5000, 6500) g")
    await session.execute("TRUNCATE emptied; INSERT INTO emptied VALUES (1)")
    await session.execute("UPDATE rewritten SET b = 'y' WHERE i % 3 = 0")
    await session.execute("VACUUM FULL rewritten")
    await session.execute("DROP TABLE dropped; CREATE TABLE added AS SELECT * FROM rewritten")
    await session.execute("CREATE INDEX ON rewritten (b, i); CREATE UNLOGGED TABLE unlogged AS SELECT 1")
    for each in (session, other):
        await each.execute("BEGIN; SELECT FROM locked WHERE i < 100 FOR KEY SHARE")  # a multixact
    await other.execute("COMMIT")
    await session.execute("UPDATE locked SET b = 'y' WHERE i % 2 = 0; COMMIT")
    await session.execute("VACUUM (FREEZE) locked")


async def content_of_turmoil(session: Any) -> list[Any]:
    """By scans, and by the indexes."""
    found = []
    for way in ("enable_indexscan", "enable_seqscan"):
        await session.execute(f"SET {way} = off; SET enable_bitmapscan = off")
        for table in ("shrinks", "emptied", "rewritten", "added", "locked"):
            query = f"SELECT count(*), md5(string_agg(t::text, ',' ORDER BY i)) FROM {table} t WHERE i > 0"  # noqa: S608
            found.append(tuple(await session.fetchrow(query)))
        await session.execute("RESET ALL")
    return found


async def subtransactions(session: Any, table: str, what: str, count: int) -> None:
    for number in range(count):
        await session.execute(f"SAVEPOINT s{number}")
        await session.execute(f"INSERT INTO {table} VALUES ($1)", what)  # noqa: S608


def shows(session: Any, expected: object, query: str) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return bool(await session.fetchval(query) == expected)

    return look


# --- what it shows ---


async def test_transactions_in_flight_at_its_start_appear_when_they_commit_and_not_before(place: Place) -> None:
    """A snapshot that took them for aborted would not only hide their rows: it would write so into the rows' hint bits,
    and hide them for good."""
    count = "SELECT count(*) FROM flight"
    replica = await place.another("flight")
    async with place.sessions(*[place.primary] * 4) as (setup, early, late, lost):
        await setup.execute("CREATE TABLE flight (what text)")
        await prepare_turmoil(setup)
        # Before the checkpoint that the replica starts from: some with subtransactions, as many as a snapshot lists.
        for session, name, times in ((early, "early", 60), (lost, "lost", 3)):
            await session.execute("BEGIN")
            await session.execute("INSERT INTO flight VALUES ($1)", name)
            await subtransactions(session, "flight", name, times)
        for name in ("kept", "undone"):
            await setup.execute("BEGIN")
            await setup.execute("INSERT INTO flight VALUES ($1)", name)
            await setup.execute(f"PREPARE TRANSACTION '{name}'")
        await checkpoint(setup)
        # Behind it, more of them than a snapshot lists, so that from the next checkpoint on nobody could start.
        await late.execute("BEGIN")
        await subtransactions(late, "flight", "late", 100)
        await setup.execute("BEGIN; INSERT INTO flight VALUES ('kept'); PREPARE TRANSACTION 'kept later'")
        await setup.execute("INSERT INTO flight VALUES ('committed')")
        async with place.sessions(place.primary) as (other,):
            await turmoil(setup, other)
        await checkpoint(setup)

        async with place.sessions(replica) as (follower,):
            assert await content_of_turmoil(follower) == await content_of_turmoil(setup)
            assert "late" not in {row["what"] for row in await follower.fetch("SELECT what FROM flight")}
            with pytest.raises(asyncpg.FeatureNotSupportedError):
                await follower.execute("SELECT FROM unlogged")
            assert await follower.fetchval(count) == 1
            assert await follower.fetchval("SELECT min(what) FROM flight") == "committed"
            await early.execute("COMMIT")
            await wait_until(shows(follower, 62, count))
            await late.execute("RELEASE s50; ROLLBACK TO s40; COMMIT")
            for name in ("kept", "kept later"):
                await setup.execute(f"COMMIT PREPARED '{name}'")
            await setup.execute("ROLLBACK PREPARED 'undone'")
            await lost.execute("ROLLBACK")
            await wait_until(shows(follower, 62 + 40 + 2, count))
            rows = "SELECT what, count(*) FROM flight GROUP BY 1 ORDER BY 1"
            assert await follower.fetch(rows) == await setup.fetch(rows)
    await place.act(replica, "kill")


async def test_it_waits_where_only_an_incomplete_list_of_running_transactions_is_left(place: Place) -> None:
    """From before a database that was copied file by file no redo may start."""
    replica = await place.another("patient")
    async with place.sessions(place.primary, place.primary) as (setup, large):
        await setup.execute("CREATE TABLE patience (what text)")
        await large.execute("BEGIN")
        await subtransactions(large, "patience", "large", 80)
        await setup.execute("CREATE DATABASE copied STRATEGY file_copy")
        starting = asyncio.create_task(reach(place.client, replica))

        async def has_replayed() -> bool:
            return (await state_of(place.client, replica)).lag_bytes == 0

        await wait_until(has_replayed, 60)
        assert not starting.done()
        assert (await state_of(place.client, replica)).state is EndpointState.STARTING
        await large.execute("COMMIT")
        await checkpoint(setup)
        await starting
        async with place.sessions(replica) as (follower,):
            assert await follower.fetchval("SELECT count(*) FROM patience") == 80
    await place.act(replica, "kill")


async def test_it_follows_whoever_writes_and_whichever_safekeeper_is_there(place: Place) -> None:
    primary, replica, count = place.primary, place.replica, "SELECT count(*) FROM followed"
    async with place.sessions(primary) as (writer,):
        await place.act(replica, "stop")
        await writer.execute("CREATE TABLE followed AS SELECT generate_series(1, 1000) AS a")
        async with place.sessions(replica) as (follower,):
            assert await follower.fetchval(count) == 1000, "what was acknowledged before it was woken"
            for statement in ("DELETE FROM followed", "CREATE TEMPORARY TABLE x ()", "TRUNCATE followed", "VACUUM"):
                with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
                    await follower.execute(statement)
            with pytest.raises(asyncpg.FeatureNotSupportedError):
                await follower.execute("SET transaction_read_only = off; DELETE FROM followed")

            # Killed, and another one elected, with other settings, which a standby's may not fall behind of.
            await place.act(primary, "kill")
            await place.change(primary, size=EndpointSize.TWO)
            async with place.sessions(primary) as (writer,):
                assert await writer.fetchval("SHOW max_connections") == "403"
                await writer.execute("INSERT INTO followed SELECT generate_series(1001, 2000)")
                await wait_until(shows(follower, 2000, count))
                for safekeeper in place.cluster.safekeepers:
                    await safekeeper.stop()
                    await writer.execute("INSERT INTO followed VALUES (0)")
                    await safekeeper.start()
                await wait_until(shows(follower, 2003, count))

                async def caught_up() -> bool:
                    state = await state_of(place.client, replica)
                    end = await writer.fetchval("SELECT pg_current_wal_flush_lsn()::text")
                    return state.lag_bytes == 0 and str(state.replay_lsn) == end

                await wait_until(caught_up)
            # Without the primary it stays.
            await place.change(primary, size=None)
            await place.act(primary, "stop")
            assert await follower.fetchval(count) == 2003
    state = await state_of(place.client, replica)
    assert (state.state, state.term, state.crashes) == (EndpointState.RUNNING, 0, 0)
    assert {stage.stage for stage in state.stages} >= {"lease", "basebackup", "replay"}


async def test_a_branch_that_nobody_has_written_to_has_nothing_to_follow(place: Place) -> None:
    await reach(place.client, place.primary)
    body = CreateTimeline(name="branch", branch_from=BranchFrom(timeline_id=place.primary.timeline_id))
    path = f"/v1/projects/{place.primary.project_id}"
    branch = await place.client.call(Timeline, "POST", f"{path}/timelines", body=body)
    request = CreateEndpoint(timeline_id=branch.timeline_id, name="of branch", follows=True)
    replica = await place.client.call(CreatedEndpoint, "POST", f"{path}/endpoints", body=request)
    with pytest.raises(UnavailableError, match="no compute has written to this branch yet"):
        await reach(place.client, replica)
    assert (await state_of(place.client, replica)).crashes == 0


async def test_no_compute_starts_on_a_branch_that_is_deleted_meanwhile(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    project_id, manager = place.primary.project_id, place.cluster.manager
    body = CreateTimeline(name="short-lived", branch_from=BranchFrom(timeline_id=place.primary.timeline_id))
    branch = await place.client.call(Timeline, "POST", f"/v1/projects/{project_id}/timelines", body=body)
    endpoint = await manager.create_endpoint(project_id, branch.timeline_id, "of the short-lived")
    looked, go, ended, finish = (asyncio.Event() for _ in range(4))
    hold_all, delete = manager._hold_all, manager._pageserver.delete_timeline

    async def hold_up(project_ids: Sequence[ProjectId]) -> list[Lease]:
        monkeypatch.setattr(manager, "_hold_all", hold_all)  # the start only
        looked.set()
        await go.wait()
        return await hold_all(project_ids)

    async def slowly(*timeline: Any) -> None:
        ended.set()
        await finish.wait()
        await delete(*timeline)

    monkeypatch.setattr(manager, "_hold_all", hold_up)
    monkeypatch.setattr(manager._pageserver, "delete_timeline", slowly)
    starting = asyncio.create_task(manager.connect(endpoint.endpoint_id))
    await looked.wait()
    deleting = asyncio.create_task(manager.delete_timeline(project_id, branch.timeline_id))
    await ended.wait()  # what ran has been stopped
    go.set()
    with pytest.raises(ConflictError, match="is being deleted"):
        await starting
    finish.set()
    await deleting
    assert endpoint.endpoint_id not in manager._runs


# --- who gets in ---


async def test_nobody_gets_in_without_the_primarys_password(place: Place) -> None:
    primary, replica = place.primary, place.replica
    host = (await reach(place.client, replica)).compute.host
    for user, password in (
        (primary.user, ""),
        (primary.user, "x" * 32),
        (ADMIN_ROLE, ""),
        (ADMIN_ROLE, primary.password),
        ("keylake_safekeeper", ""),
        ("standby", ""),
    ):
        for database in ("postgres", primary.database):
            with pytest.raises((asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidPasswordError)):
                await asyncpg.connect(host=host, user=user, password=password, database=database, timeout=10)
    # Whoever is made on the primary is one here, too.
    async with place.sessions(primary) as (writer,):
        await writer.execute("CREATE ROLE made_there LOGIN PASSWORD 'there'")

        async def known() -> bool:
            try:
                connection = await asyncpg.connect(
                    host=host, user="made_there", password="there", database=primary.database, timeout=10
                )
            except asyncpg.InvalidPasswordError:
                return False
            await connection.close()
            return True

        await wait_until(known)


# --- its ends ---


async def test_it_is_suspended_and_woken_as_every_compute_is(place: Place) -> None:
    """That it ends with the key as every compute does is shown in tests/cluster/test_revocation.py."""
    replica, count = place.replica, "SELECT count(*) FROM ended"
    async with place.sessions(place.primary) as (writer,):
        await writer.execute("CREATE TABLE ended AS SELECT 1 AS a")
        async with place.sessions(replica) as (follower,):
            await wait_until(shows(follower, "ended", "SELECT to_regclass('ended')::text"))
            await follower.execute("BEGIN")
            await place.change(replica, suspend_after_s=0.5)
            await asyncio.sleep(1)  # twice as long: nothing may happen
            assert await follower.fetchval(count) == 1
            await follower.execute("COMMIT")
            await place.stopped(replica)

            async def recorded() -> bool:
                state = await state_of(place.client, replica)
                return state.reason == "suspended: nobody used it for 0.5 s"

            await wait_until(recorded)
        await place.change(replica, suspend_after_s=None)
        await writer.execute("INSERT INTO ended VALUES (2)")
        async with place.sessions(replica) as (follower,):
            assert await follower.fetchval(count) == 2


async def test_one_that_is_too_small_for_what_it_follows_says_so(metadata_server: str) -> None:
    """On tmpfs, where the volume's size is the endpoint's."""
    async with running(metadata_server, volume=VolumeKind.TMPFS, volume_size_mb=160) as place:
        await place.act(place.primary, "stop")
        await place.change(place.primary, size=EndpointSize.QUARTER)
        async with place.sessions(place.primary) as (writer,):
            await writer.execute("CREATE TABLE t (a text STORAGE plain)")
            async with place.sessions(place.replica) as (follower,):
                while (await state_of(place.client, place.replica)).state is EndpointState.RUNNING:
                    await writer.execute("INSERT INTO t SELECT repeat('x', 8000) FROM generate_series(1, 1000)")
                stopped = await place.stopped(place.replica)
                assert stopped.reason.endswith("its volume of 160 MiB is full"), stopped.reason
                with pytest.raises(CONNECTION_LOST):
                    await follower.fetchval("SELECT 1")


# --- the lazy volume ---


async def test_on_a_lazy_volume_pages_of_its_start_and_of_the_log_are_one(place: Place) -> None:
    if why := why_no_fuse():
        pytest.skip(why)
    primary = await make_endpoint(place.client, ProjectId.new())
    replica = await follower_of(place.client, primary, "replica")
    async with place.sessions(primary, primary) as (writer, other):
        await prepare_turmoil(writer)
        await checkpoint(writer)
        async with place.sessions(replica) as (follower,):
            assert (await state_of(place.client, replica)).volume.startswith("FUSE, pages on demand")
            # On pages that it has not fetched yet, and then fetches as they were at its start.
            await turmoil(writer, other)
            await wait_until(shows(follower, 1000, "SELECT count(*) FROM locked WHERE b = 'y'"))
            assert await content_of_turmoil(follower) == await content_of_turmoil(writer)
    await place.act(primary, "kill")
