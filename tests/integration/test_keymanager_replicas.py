"""Several keymanagers on one database: who leads, who takes over, and that nobody else's word gets out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import asyncpg
import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from customercloud.faults import Faults, Outage
from keylake.links import Cut, Links
from keymanager.leadership import Seat, Term
from keymanager.repository import Repository
from keymanager.seat import SeatTable
from shared.api.keymanager import (
    SERVER_MESSAGE,
    Acknowledge,
    Generate,
    Keys,
    KeyState,
    Project,
    Renew,
    Renewed,
    RevokeRequest,
    Role,
    ServerMessage,
)
from shared.audit_chain import AuditEntry
from shared.clock import SystemClock
from shared.errors import KeylakeError, NotLeaderError, RevokedError, UnauthenticatedError, UnavailableError
from shared.ids import InstanceId, ProjectId
from shared.keyclient import KeyClient
from shared.keysession import session_tokens
from shared.lease import KeyLoss, Lease
from tests.fixtures.key_source_contract import Losses, named
from tests.fixtures.keymanager import Keymanager
from tests.fixtures.keymanager_replicas import Replicas, go_on, pause, readiness
from tests.fixtures.waiting import wait_until
from tests.integration.test_keymanager_session import opened, raw_socket, token_of

pytestmark = pytest.mark.integration


async def new_project(replicas: Replicas) -> tuple[Project, str]:
    """A project under a CMK of its own: with the CMK's ARN."""
    first, tenant = replicas.nodes[0], replicas.nodes[0].tenant
    cmk = await asyncio.to_thread(tenant.customer.create_key, role_arn=tenant.role_arn)
    return await first.new_project(cmk), cmk


@dataclass
class Watched:
    """A lease, looked at all the time."""

    lease: Lease
    gaps: int = 0
    looks: int = 0

    async def run(self) -> None:
        while True:
            self.looks += 1
            self.gaps += not self.lease.live
            await asyncio.sleep(0.01)


@asynccontextmanager
async def watched(lease: Lease) -> AsyncIterator[Watched]:
    watch = Watched(lease)
    task = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        task.cancel()


async def renewed_by_leader(replicas: Replicas, keys: KeyClient, project_id: ProjectId) -> None:
    """Returns when the lease was renewed by whoever leads: it has most of a ttl before it."""

    async def look() -> bool:
        status = await replicas.status()
        [lease] = [lease for lease in keys.leases() if lease.project_id == project_id]
        known = any(info.instance_id == keys.identity.instance_id for info in status.leases)
        return known and keys.connected and lease.remaining_s > status.lease_ttl_s * 0.6

    await wait_until(look)


# --- who answers ---


async def test_standby_answers_everything_with_who_leads(replicas: Replicas) -> None:
    project, _ = await new_project(replicas)
    leader, standby = replicas.nodes
    assert await readiness(standby) == (503, "standby")
    async with standby.client() as client:
        for method, path in (
            ("GET", "/v1/status"),
            ("GET", "/v1/projects"),
            ("POST", f"/v1/projects/{project.project_id}:revalidate"),
            ("DELETE", "/v1/key-configurations/kc-0123456789abcdef"),
            ("GET", "/no/such/path"),
        ):
            with pytest.raises(NotLeaderError, match="keymanager-1 leads"):
                await client.request(method, path)
        assert (await client.request("GET", "/healthz")).is_success
    async with standby.client(standby.trust.stranger) as client:
        with pytest.raises(UnauthenticatedError):
            await client.request("GET", "/v1/status")
    for token, code in ((token_of(standby), "not_leader"), ("not.a.token", "unauthenticated")):
        with pytest.raises(InvalidStatus) as refused:
            async with raw_socket(standby, token):
                pass
        assert json.loads(refused.value.response.body or b"")["code"] == code
    # Whoever knows both is served, whichever comes first.
    for addresses in ([leader.address, standby.address], [standby.address, leader.address]):
        tokens = session_tokens(leader.trust.issuers[Role.PROXY])
        async with KeyClient(
            addresses, leader.trust.ca_certificate, tokens, role=Role.PROXY, node_id="proxy-1"
        ) as keys:
            (await keys.acquire(project.project_id, Losses())).check()


# --- takeover ---


async def test_leader_killed_and_no_lease_is_lost(replicas: Replicas) -> None:
    project, _ = await new_project(replicas)
    leader, standby = replicas.nodes
    losses = Losses()
    async with replicas.key_client() as keys:
        lease = await keys.acquire(project.project_id, losses)
        [(key, envelope)] = await keys.generate(project.project_id, [name := named()])
        async with watched(lease) as watch:
            leader.kill()
            made = await keys.generate(project.project_id, [named()])  # waits for the next leader
            await renewed_by_leader(replicas, keys, project.project_id)
        assert (watch.gaps, losses.seen) == (0, [])
        assert watch.looks > 10
        assert len(made) == 1
        assert (await replicas.status()).node_id == "keymanager-2"
        assert (await replicas.status()).epoch == 2
        # The old one comes back as what it is now; and takes over again when the other one goes in good order.
        leader.spawn()
        await replicas.stands_by(leader)
        assert await asyncio.to_thread(standby.stop) == 0
        await replicas.leads(leader)
        await renewed_by_leader(replicas, keys, project.project_id)
        assert losses.seen == []
        [again] = await keys.unwrap(project.project_id, [(name, envelope)])
        assert again.seal(bytes(12), b"x", b"") == key.seal(bytes(12), b"x", b"")
    assert (await leader.verify_audit()).intact


@dataclass
class Tap:
    """Everything that comes out of a key session, until it ends."""

    connection: ClientConnection
    messages: list[ServerMessage] = field(default_factory=list)

    async def run(self) -> None:
        try:
            while True:
                self.messages.append(SERVER_MESSAGE.validate_json(await self.connection.recv()))
        except ConnectionClosed:
            pass


async def test_stopped_leader_lets_nothing_out_when_it_goes_on(replicas: Replicas) -> None:
    """SIGSTOP for longer than all ttls, with requests waiting in its sockets; then SIGCONT."""
    project, _ = await new_project(replicas)
    old, new = replicas.nodes
    instance_id = InstanceId.new()
    losses = Losses()
    async with (
        opened(old, node_id="pageserver-8", instance_id=instance_id) as connection,
        old.client() as admin,
        replicas.key_client() as keys,
    ):
        await connection.send(Renew(request_id=1, project_ids=[project.project_id]).model_dump_json())
        assert isinstance(SERVER_MESSAGE.validate_json(await connection.recv()), Renewed)
        generate = Generate(request_id=2, project_id=project.project_id, objects=[named()]).model_dump_json()
        await connection.send(generate)
        assert isinstance(SERVER_MESSAGE.validate_json(await connection.recv()), Keys)
        await admin.request("GET", "/v1/projects")  # so that there is a connection
        lease = await keys.acquire(project.project_id, losses)
        async with watched(lease) as watch:
            pause(old)
            tap = Tap(connection)
            tapping = asyncio.create_task(tap.run())
            for number in range(10, 40, 3):
                await connection.send(Renew(request_id=number, project_ids=[project.project_id]).model_dump_json())
                await connection.send(generate)
                gone = Acknowledge(revocation_id="rev-0", project_id=project.project_id)
                await connection.send(gone.model_dump_json())
            asked = [
                asyncio.create_task(admin.request(method, path, body=body, timeout_s=60))
                for method, path, body in (
                    ("GET", "/v1/projects", None),
                    ("GET", f"/v1/projects/{project.project_id}", None),
                    ("GET", "/v1/status", None),
                    ("GET", "/v1/audit:verify", None),
                    ("POST", f"/v1/projects/{project.project_id}:revoke", RevokeRequest(reason="by the old leader")),
                )
            ]
            await replicas.leads(new)
            await renewed_by_leader(replicas, keys, project.project_id)

            async def old_lease_is_over() -> bool:
                return all(info.instance_id != instance_id for info in (await new.status()).leases)

            await wait_until(old_lease_is_over)
            go_on(old)
            async with asyncio.timeout(30):
                await tapping
                answers = await asyncio.gather(*asked, return_exceptions=True)
        assert tap.messages == []
        assert all(isinstance(answer, UnavailableError) for answer in answers), answers
        await replicas.stands_by(old)
        assert (watch.gaps, losses.seen) == (0, [])  # it had found the new leader long before
    assert (await new.project(project.project_id)).state is KeyState.ACTIVE
    assert await new.revocations(project.project_id) == []
    assert (await new.verify_audit()).intact


async def test_revocation_that_a_leader_began_is_finished_by_the_next(replicas: Replicas) -> None:
    project, cmk = await new_project(replicas)
    leader, standby = replicas.nodes
    told = asyncio.Event()
    released = asyncio.Event()

    async def slow(loss: KeyLoss) -> dict[str, float]:
        told.set()
        await released.wait()
        return {"unmounted": 0.5}

    async with replicas.key_client() as keys:
        await keys.acquire(project.project_id, slow)
        await asyncio.to_thread(leader.tenant.customer.disable, cmk)
        async with asyncio.timeout(20):
            await told.wait()
        # Holders are told before it is stored, and the next leader goes on with what is.
        [begun] = await wait_until(lambda: leader.revocations(project.project_id))
        leader.kill()
        await replicas.leads(standby)
        released.set()
        sealed = await standby.wait_sealed(project.project_id)
        assert sealed.revocation_id == begun.revocation_id
        assert [(i.node_id, i.outcome) for i in sealed.instances] == [("pageserver-1", "acknowledged")]
        with pytest.raises(RevokedError):
            keys.leases()[0].check()
        await asyncio.to_thread(leader.tenant.customer.enable, cmk)
        await standby.wait_state(project.project_id, KeyState.ACTIVE)
        await wait_until(lambda: keys.leases()[0].live)
    assert (await standby.verify_audit()).intact


async def test_slow_kms_of_one_customer_does_not_hold_up_a_takeover(replicas: Replicas) -> None:
    """Its projects wait for its answer; everybody else is served."""
    project, _ = await new_project(replicas)
    leader, standby = replicas.nodes
    losses = Losses()
    async with replicas.key_client() as keys:
        lease = await keys.acquire(project.project_id, losses)
        with leader.tenant.admin.during(Faults(outage=Outage.HANG)):
            leader.kill()
            await replicas.leads(standby)
            lease.check()
            [status] = [info for info in (await standby.status()).leases if info.project_id == project.project_id]
            assert status.node_id == "pageserver-1"
            async with standby.key_client(node_id="pageserver-2") as other:
                with pytest.raises(UnavailableError, match="not said yes"):
                    await other.acquire(project.project_id, Losses())


async def test_killed_leader_is_back_at_once_in_its_own_place(keymanager: Keymanager) -> None:
    """Longer than this test waits, a stranger would have to wait for the seat."""
    keymanager.stop()
    keymanager.options = {"leader_ttl_s": 60.0}
    await keymanager.start()
    before = await keymanager.status()
    keymanager.kill()
    async with asyncio.timeout(50):
        await keymanager.start()
    assert (await keymanager.status()).epoch == before.epoch + 1


# --- the fence, in the database ---


def entry(action: str) -> AuditEntry:
    return AuditEntry("tests", action, "ok", None)


@asynccontextmanager
async def opened_repository(dsn: str, idle_s: float = 30.0) -> AsyncIterator[tuple[Repository, SeatTable, SeatTable]]:
    async with Repository.open(dsn, 4, SystemClock(), idle_transaction_timeout_s=idle_s) as repository:
        one, two = SeatTable(dsn), SeatTable(dsn)
        try:
            yield repository, one, two
        finally:
            await one.aclose()
            await two.aclose()


async def taken(seat: SeatTable, holder: InstanceId) -> Term:
    seen = await seat.look(5)
    assert await seat.take(seen, holder, "keymanager-9", "", 5)
    return Term(seen.epoch + 1, SystemClock().monotonic_s(), 60.0, SystemClock())


async def test_writes_of_an_older_epoch_fail_as_a_whole(metadata_dsn: str) -> None:
    async with opened_repository(metadata_dsn) as (repository, one, two):
        first, second = InstanceId.new(), InstanceId.new()
        assert await one.look(5) == Seat(0, 0, None)
        old = await taken(one, first)
        async with repository.during(old).transaction() as transaction:
            await transaction.audit([entry("written")])
        assert await one.renew(old.epoch, first, 5)
        assert not await two.renew(old.epoch, second, 5)
        new = await taken(two, second)
        assert not await one.renew(old.epoch, first, 5)
        for _ in range(2):  # the first finds out, the second knows
            with pytest.raises(NotLeaderError):
                async with repository.during(old).transaction() as transaction:
                    await transaction.audit([entry("too late")])
        assert not old.valid
        with pytest.raises(NotLeaderError):
            await repository.during(old).reserve_wraps(ProjectId.new(), 1, 4096)
        async with repository.during(new).transaction() as transaction:
            await transaction.audit([entry("written too")])
        links = await repository.audit_page(0, 100)
        assert [link.entry.action for link in links] == ["written", "written too"]
        # A seat that was seen before is not taken twice, and only its holder gives it back.
        assert not await one.take(Seat(old.epoch, 1, first), first, "keymanager-9", "", 5)
        await one.give_back(new.epoch, first, 5)
        assert (await one.look(5)).holder == second
        await two.give_back(new.epoch, second, 5)
        assert (await one.look(5)).holder is None


async def test_what_is_cancelled_while_the_database_is_cut_off_ends_at_once(metadata_dsn: str) -> None:
    """A leader that is cut off has to be ready to lead again, not to wait until somebody mends the network."""
    port = urlsplit(metadata_dsn).port
    assert port is not None
    links = Links()
    links.start()
    try:
        through = await links.add_tcp("keymanager", "metadata", port)
        async with opened_repository(metadata_dsn.replace(f":{port}/", f":{through}/")) as (repository, seat, _):
            term = await taken(seat, InstanceId.new())

            async def write(seconds: float) -> None:
                async with repository.during(term).transaction() as transaction:
                    await transaction.audit([entry("cancelled")])
                    await transaction._connection.execute("SELECT pg_sleep($1)", seconds)

            # The network is fine: the server stops, too, and holds no lock any more.
            writing = asyncio.create_task(write(600))
            direct = await asyncpg.connect(metadata_dsn)
            active = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query = 'SELECT pg_sleep($1)'"

            async def sleeping(count: int) -> bool:
                return bool(await direct.fetchval(active) == count)

            await wait_until(lambda: sleeping(1))
            writing.cancel()
            await asyncio.wait([writing], timeout=5)
            assert writing.cancelled()
            await wait_until(lambda: sleeping(0))
            # Cut off: it does not wait for an answer. (The server hears of nothing, and goes to the end of it.)
            writing = asyncio.create_task(write(3))
            await wait_until(lambda: sleeping(1))
            await links.cut("keymanager", "metadata", Cut.SILENT)
            writing.cancel()
            await asyncio.wait([writing], timeout=5)
            assert writing.cancelled()
            await links.heal()
            await wait_until(lambda: sleeping(0))
            await direct.close()
            async with repository.during(term).transaction() as transaction:
                await transaction.audit([entry("written")])
            assert [link.entry.action for link in await repository.audit_page(0, 100)] == ["written"]
    finally:
        await links.stop()


async def test_takeover_waits_for_what_is_being_written_and_renewals_do_not(metadata_dsn: str) -> None:
    async with opened_repository(metadata_dsn) as (repository, one, two):
        first, second = InstanceId.new(), InstanceId.new()
        old = await taken(one, first)
        async with repository.during(old).transaction() as transaction:
            await transaction.audit([entry("begun before")])
            assert await one.renew(old.epoch, first, 5)
            taking = asyncio.create_task(taken(two, second))
            assert await one.look(5) == Seat(1, 1, first, "keymanager-9")
            assert not taking.done()
        new = await taking
        assert new.epoch == old.epoch + 1
        assert [link.entry.action for link in await repository.audit_page(0, 9)] == ["begun before"]


async def test_transaction_of_a_stopped_leader_does_not_hold_up_the_next(metadata_dsn: str) -> None:
    async with opened_repository(metadata_dsn, idle_s=0.3) as (repository, one, two):
        old = await taken(one, InstanceId.new())
        begun = asyncio.Event()
        going_on = asyncio.Event()

        async def write() -> None:
            async with repository.during(old).transaction() as transaction:
                await transaction.audit([entry("begun")])
                begun.set()
                await going_on.wait()  # does nothing, as if its process were stopped

        writing = asyncio.create_task(write())
        await begun.wait()
        new = await taken(two, InstanceId.new())
        going_on.set()
        with pytest.raises(UnavailableError):
            await writing
        async with repository.during(new).transaction() as transaction:
            await transaction.audit([entry("of the next")])
        assert [link.entry.action for link in await repository.audit_page(0, 9)] == ["of the next"]


async def test_unreachable_database_is_told_as_such() -> None:
    seat = SeatTable("postgresql://postgres@127.0.0.1:1/none")
    with pytest.raises(KeylakeError) as refused:
        await seat.look(1)
    assert isinstance(refused.value, UnavailableError)
    await seat.aclose()
