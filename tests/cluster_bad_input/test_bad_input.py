"""Bad input on every API and port of a whole cluster gets a clear, typed error and leaves state as it was."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
import pytest
import pytest_asyncio
from pydantic import SecretStr

from keylake.layout import SAFEKEEPERS
from shared.api.pageserver import TimelineInfo
from shared.api.safekeeper import (
    ComputeAddress,
    Donor,
    Elected,
    StopStream,
    StreamFrom,
    TermStart,
    VoteRequest,
)
from shared.auth import Scope, Service
from shared.errors import UnavailableError
from shared.http import ServiceClient
from tests.cluster.pages import page_client
from tests.cluster.primary import caught_up, pageserver_timeline, tag_of
from tests.cluster_bad_input import (
    cloud_cases,
    flood,
    framed_cases,
    gap,
    http_cases,
    postgres_cases,
    session_cases,
)
from tests.cluster_bad_input.gap import fake_primary
from tests.cluster_bad_input.http_cases import Target, carry_out, dealt, every_route
from tests.cluster_bad_input.listeners import configured_ports, listeners
from tests.cluster_bad_input.place import CANARY, Place, place_under_attack
from tests.cluster_bad_input.small_disk import small_disk, small_disk_of_the_pageserver
from tests.cluster_bad_input.state import unchanged
from tests.cluster_secrecy.keys import metadata
from tests.fixtures.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole_place() -> AsyncIterator[Place]:
    async with place_under_attack() as place:
        yield place


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def targets(whole_place: Place) -> AsyncIterator[list[Target]]:
    async with every_route(whole_place) as found:
        yield found


@pytest_asyncio.fixture(loop_scope="module")
async def place(whole_place: Place, targets: list[Target]) -> AsyncIterator[Place]:
    """For every test: whatever it does, the cluster is afterwards as it was before."""
    async with unchanged(whole_place):
        yield whole_place


# --- HTTP ---

ATTACKS = (http_cases.tokens, http_cases.unknown, http_cases.malformed, http_cases.bodies, http_cases.large_bodies)


@pytest.mark.parametrize("attack", ATTACKS)
async def test_every_route(place: Place, targets: list[Target], attack: http_cases.Attack) -> None:
    await carry_out(dealt(targets, attack))


async def test_methods_and_paths_that_nobody_offers(place: Place, targets: list[Target]) -> None:
    await carry_out(http_cases.methods(targets))


async def test_the_admin_side_of_the_customers_cloud(place: Place, tmp_path: Path) -> None:
    await carry_out(cloud_cases.attempts(place, tmp_path))


# --- key sessions ---


async def test_key_sessions(place: Place) -> None:
    await carry_out(session_cases.attempts(place))


# --- framed ports ---


async def test_framed_ports_and_strangers(place: Place) -> None:
    await carry_out(attempt for port in framed_cases.ports(place) for attempt in framed_cases.by_strangers(port))


async def test_framed_ports_and_malformed_requests(place: Place) -> None:
    await carry_out(attempt for port in framed_cases.ports(place) for attempt in framed_cases.by_friends(port))


# --- Postgres's protocol ---


async def test_the_proxy(place: Place) -> None:
    await carry_out(postgres_cases.at_the_proxy(place))


async def test_the_tunnel_of_a_compute(place: Place) -> None:
    address = postgres_cases.tunnel(place, set(configured_ports(place.cluster)))
    await carry_out(postgres_cases.at_the_tunnel(place, address))


async def test_a_wrong_password(place: Place) -> None:
    arguments = place.busy.connection.asyncpg_arguments() | {"password": CANARY}
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(**arguments)


# --- all at once ---


async def test_hundreds_of_bad_connections_while_somebody_works(place: Place) -> None:
    """They hang in the handshake, say nothing, or say nonsense; each is ended, and the one client notices nothing."""
    connection = await place.connect()
    over = asyncio.Event()

    async def work() -> int:
        rows = 0
        while not over.is_set():
            rows += 1
            await connection.execute("insert into work values ($1)", rows)
            if rows % 20 == 0:
                another = await place.connect()
                assert await another.fetchval("select count(*) from work") >= rows
                await another.close()
        return rows

    working = asyncio.create_task(work())
    await asyncio.gather(*flood.bad_connections(place))
    over.set()
    rows = await working
    assert await connection.fetchval("select count(*) from work") == rows > 20
    await connection.execute("truncate work")
    await connection.close()


# --- a replication stream with a gap ---


async def test_a_replication_stream_with_a_gap(whole_place: Place, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing behind the gap is taken or acknowledged; the safekeeper asks again for what it lacks, and gets on."""
    place, cluster = whole_place, whole_place.cluster
    project = await cluster.client.create_project(place.idle.project.workspace_id, f"gap {secrets.token_hex(4)}")
    timeline = await cluster.client.create_timeline(project.project_id)
    start, path = timeline.start_lsn, f"/v1/projects/{project.project_id}/timelines/{timeline.timeline_id}"
    donor = Donor(node_id="safekeeper-1", address=place.address("safekeeper-1", "wal_listen"))
    elected = Elected(term=1, term_history=[TermStart(term=1, start_lsn=start)], donor=donor)
    address, issuer = place.address("safekeeper-1"), place.issuers["compute"]
    scopes = frozenset({Scope.WAL_ELECT})
    with TemporaryDirectory(dir="/tmp", prefix="kl-") as directory:
        async with (
            fake_primary(Path(directory), timeline.system_identifier, start) as primary,
            ServiceClient(Service.SAFEKEEPER, address, place.ca_certificate, issuer, scopes) as client,
        ):
            await client.request("POST", f"{path}:vote", body=VoteRequest(term=1, candidate="test"))
            await client.request("POST", f"{path}:elected", body=elected)
            compute = ComputeAddress(host=directory, port=gap.PORT)
            stream = StreamFrom(term=1, start_lsn=start, compute=compute, user="x", password=SecretStr(""))
            await client.request("POST", f"{path}:stream", body=stream)
            good_end = start + primary.good_bytes
            await wait_until(lambda: primary.asked_from.count(good_end) >= 2)
            assert primary.asked_from[0] == start
            assert max(primary.flushed) == good_end
            primary.healed = True
            await wait_until(lambda: max(primary.flushed) == good_end + 1000)
            await client.request("POST", f"{path}:stop-stream", body=StopStream(term=1))
    status = await cluster.client.safekeeper_status(0)
    assert status.fault == ""
    [mine] = [each for each in status.timelines if each.timeline_id == timeline.timeline_id]
    assert mine.flush_lsn == good_end + 1000

    async def is_told_by_all() -> bool:
        """Of what they keep of it: those that keep nothing, too, and later than anybody waits for."""
        async with metadata(cluster) as database:
            users = await database.fetchval(
                "select count(*) from key_user where project_id = $1", str(project.project_id)
            )
        return bool(users == SAFEKEEPERS + 1)

    await wait_until(is_told_by_all)  # the tests after this one compare what there is


# --- a disk that is full ---


async def test_a_safekeeper_whose_disk_is_full(whole_place: Place) -> None:
    """It acknowledges nothing more; the other two carry the commits; with space it goes on where it was."""
    connection = await whole_place.connect()
    await connection.execute("create table if not exists filler (n int, body text)")

    async def fill(megabytes: int) -> None:
        for _ in range(megabytes):
            await connection.execute("insert into filler select n, repeat('f', 1000) from generate_series(1, 1000) n")

    async with small_disk(whole_place, "safekeeper-1", free_bytes=6 << 20) as disk:
        await disk.streaming()
        before = await connection.fetchval("select count(*) from filler")
        await fill(16)
        await disk.full()
        stuck = await disk.flush_lsn()
        await fill(2)
        assert await disk.flush_lsn() == stuck, "what does not fit is not acknowledged"
        assert (await disk.status()).fault == "", "a full disk is no damage"
        assert await connection.fetchval("select count(*) from filler") == before + 18_000
        disk.grow()
        await disk.caught_up()
    await connection.execute("drop table filler")
    await connection.close()


async def test_a_pageserver_whose_disk_is_full(whole_place: Place) -> None:
    """It says so, and what to do; commits and reads go on; with space it stores all that it has taken in meanwhile."""
    cluster, busy, pageserver = whole_place.cluster, whole_place.busy, whole_place.cluster.service("pageserver")
    connection = await whole_place.connect()

    async def info() -> TimelineInfo:
        found = await pageserver_timeline(cluster, busy)
        assert found is not None
        return found

    async with small_disk_of_the_pageserver(whole_place, free_bytes=1 << 20) as make_room:
        await connection.execute("create table kept as select n, md5(n::text) as body from generate_series(1, 60000) n")
        stored_lsn = (await caught_up(cluster, busy)).remote_consistent_lsn
        with pytest.raises(UnavailableError, match=r"no room .* make some, and writing goes on by itself"):
            await cluster.client.checkpoint(busy.timeline)
        assert "no room" in (await info()).fault
        await connection.execute("insert into kept values (0, 'acknowledged')")
        full = await caught_up(cluster, busy)
        assert full.remote_consistent_lsn == stored_lsn, "nobody is told that something is stored"
        async with page_client(cluster, busy) as pages:
            assert any(await pages.page(await tag_of(connection, "kept"), 0, full.last_record_lsn.value))
        make_room()

        async def is_stored() -> bool:
            now = await info()
            return not now.fault and now.remote_consistent_lsn > stored_lsn

        await wait_until(is_stored, 30)
        await cluster.client.checkpoint(busy.timeline)
        await pageserver.kill()
        await pageserver.start()
    await connection.close()
    await cluster.client.kill_endpoint(busy.endpoint.endpoint_id)
    connection = await whole_place.connect()
    assert await connection.fetchval("select count(*) from kept where n = 0 or body = md5(n::text)") == 60_001
    await connection.execute("drop table kept")
    await connection.close()
    await wait_until(whole_place.busy_has_answered)


# --- what listens ---


async def test_nothing_else_listens(place: Place) -> None:
    """So that the tests above are of everything: settings name each port but the compute's own."""
    found = listeners(place.cluster)
    tcp = {each.port for each in found if not each.is_unix}
    assert {each.host for each in found if not each.is_unix} == {"0100007F"}, "127.0.0.1 only"
    known = configured_ports(place.cluster)
    assert tcp - {postgres_cases.tunnel(place, set(known)).port} == set(known)
    assert set(known.values()) == {"listen", "port", "pages_listen", "wal_listen", "postgres_listen"}, (
        "a new kind of port needs tests"
    )


async def test_sockets_are_for_their_owner(place: Place) -> None:
    paths = [Path(each.host) for each in listeners(place.cluster) if each.is_unix]
    assert len(paths) >= 2, "the metadata database's and the compute's"
    for path in paths:
        assert path.is_absolute(), f"{path}: anybody may connect to an abstract socket"
        closed = [p for p in path.parents if p.stat().st_mode & 0o077 == 0 and p.stat().st_uid == os.geteuid()]
        assert closed, path
