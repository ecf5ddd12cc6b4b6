"""The customer says no, or nobody can be asked: everything stops, and comes back with nothing lost."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from time import monotonic

import asyncpg
import pytest
import pytest_asyncio

from keylake.cluster import Cluster, Customer, RunningProject
from keylake.demo.ledger import CLIENT_ERRORS, Ledger, describe
from shared.api.compute import EndpointState
from shared.api.keymanager import KeyState, Revocation
from shared.errors import KeyAccessError, KeylakeError, LeaseExpiredError, RevokedError, SuspendedError
from shared.keyspace import Fork, RelTag
from shared.lsn import Lsn
from shared.wire.pagestream import GET_PAGE
from tests.cluster.bank import Bank, audit, open_bank
from tests.cluster.pages import PageClient, page_client
from tests.cluster.primary import Session, caught_up, connect, safekeeper_timelines, stopped, tag_of
from tests.cluster.processes import ComputeProcesses, compute_of
from tests.fixtures.forked_cluster import ForkedCluster
from tests.fixtures.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

LEASE_TTL_S = 2.0
PROBE_INTERVAL_S = 0.2
OUTAGE_GRACE_S = 3.0
QUIET_S = 1.0
"""Clients of a live database commit hundreds of times in this time."""

Act = Callable[[Customer, str], Awaitable[None]]


@dataclass(slots=True)
class Tenant:
    """A workspace under a CMK of its own, with one project and a bank in it."""

    cluster: Cluster
    key_arn: str
    project: RunningProject
    page: tuple[RelTag, int, int] = (RelTag(0, 0, 0, Fork.MAIN), 0, 0)
    """(fork, block, LSN) of a page with rows in it."""
    ledger: Ledger = field(default_factory=Ledger)
    banks: int = 0

    async def connect(self) -> Session:
        return await connect(self.project)

    def bank(self, clients: int = 3, by: Callable[[], Awaitable[Session]] | None = None) -> Bank:
        self.banks += 1
        return Bank(by or self.connect, self.ledger, f"b{self.banks}", clients)

    async def check(self) -> None:
        connection = await self.connect()
        problems = await audit(connection, self.ledger)
        await connection.close()
        assert not problems, problems

    async def compute(self) -> ComputeProcesses:
        return await compute_of(self.cluster, self.project.endpoint.endpoint_id)

    async def state(self) -> KeyState:
        return (await self.cluster.client.project(self.project.project.project_id)).state

    async def becomes(self, state: KeyState, timeout_s: float = 20.0) -> None:
        async def look() -> bool:
            return await self.state() is state

        await wait_until(look, timeout_s)

    async def revocations(self) -> list[Revocation]:
        return await self.cluster.client.revocations(self.project.project.project_id)

    async def sealed(self, timeout_s: float = 20.0) -> Revocation:
        """Returns when the last revocation is over: every instance has acknowledged, or its lease has run out."""

        async def look() -> Revocation | None:
            found = await self.revocations()
            done = found and all(r.sealed_after_s is not None for r in found)
            return max(found, key=lambda r: r.detected_at) if done else None

        revocation = await wait_until(look, timeout_s)
        assert isinstance(revocation, Revocation)
        return revocation

    async def read_page(self, client: PageClient) -> bytes:
        return await client.page(*self.page)

    async def read_page_anew(self) -> bytes:
        """By a connection of its own: one that was there when the keys were lost has ended with them."""
        async with page_client(self.cluster, self.project) as client:
            return await self.read_page(client)

    async def flushed(self) -> list[Lsn]:
        """flush_lsn of every safekeeper."""
        return [t.flush_lsn for t in (await safekeeper_timelines(self.cluster, self.project)).values()]

    def told_since(self, at: float) -> set[tuple[str, str]]:
        """(SQLSTATE, message) of every error that a server sent to a client; the driver's own have no SQLSTATE."""
        return {(code, message) for _, code, message in self.ledger.errors_since(at) if len(code) == 5}

    def acknowledged_since(self, at: float) -> list[str]:
        return [number for number, when in self.ledger.acknowledged.items() if when > at]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[Cluster]:
    settings = {"keymanager": {"lease_ttl_s": LEASE_TTL_S}, "compute": {"poll_interval_s": 0.2}}
    async with ForkedCluster(settings=settings) as cluster:
        yield cluster


@asynccontextmanager
async def new_tenant(cluster: Cluster, name: str, outage_grace_s: float = 0.0) -> AsyncIterator[Tenant]:
    key_arn = await cluster.customer.create_key(name)
    workspace = await cluster.create_workspace(
        key_arn, name, probe_interval_s=PROBE_INTERVAL_S, outage_grace_s=outage_grace_s
    )
    tenant = Tenant(cluster, key_arn, await cluster.create_project(name, workspace.workspace_id))
    await open_bank(tenant.connect)
    connection = await tenant.connect()
    tag = await tag_of(connection, "account")
    await connection.close()
    info = await caught_up(cluster, tenant.project)
    tenant.page = (tag, 0, info.last_record_lsn.value)
    try:
        yield tenant
    finally:
        await cluster.client.stop_endpoint(tenant.project.endpoint.endpoint_id)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bystander(cluster: Cluster) -> AsyncIterator[Tenant]:
    """Somebody with a key of their own, whom the others' troubles are none of."""
    async with new_tenant(cluster, "bystander", outage_grace_s=600) as tenant:
        yield tenant


async def nothing_is_served(tenant: Tenant, client: PageClient, expected: type[KeyAccessError]) -> None:
    """Not a page, not a connection, not a compute. `client`: a connection from better times."""
    with pytest.raises(expected):
        await tenant.read_page(client)
    async with page_client(tenant.cluster, tenant.project) as fresh:
        with pytest.raises(expected):
            await tenant.read_page(fresh)
    with pytest.raises(expected):
        await tenant.cluster.client.start_endpoint(tenant.project.endpoint.endpoint_id)
    endpoint = await tenant.cluster.client.endpoint(tenant.project.endpoint.endpoint_id)
    assert endpoint.state is EndpointState.STOPPED
    assert await sqlstate_of_connecting(tenant) == expected.sqlstate


@asynccontextmanager
async def asleep(cluster: Cluster, *names: str) -> AsyncIterator[None]:
    """These services are stopped (SIGSTOP) within the block."""
    pids = [cluster.service(name).pid for name in names]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


async def refused(tenant: Tenant, expected: type[KeyAccessError]) -> None:
    """Returns when the page is not served any more, for this reason."""

    async def look() -> bool:
        try:
            await tenant.read_page_anew()
        except expected:
            return True
        return False

    await wait_until(look)


async def sqlstate_of_connecting(tenant: Tenant) -> str:
    """How the proxy refuses; empty when it does not."""
    try:
        connection = await tenant.connect()
    except CLIENT_ERRORS as error:
        return describe(error)[0]
    await connection.close()
    return ""


async def disable(customer: Customer, key_arn: str) -> None:
    await customer.disable(key_arn)


async def enable(customer: Customer, key_arn: str) -> None:
    await customer.enable(key_arn)


async def schedule_deletion(customer: Customer, key_arn: str) -> None:
    await customer.schedule_deletion(key_arn)


async def cancel_deletion(customer: Customer, key_arn: str) -> None:
    await customer.cancel_deletion(key_arn)
    await customer.enable(key_arn)


async def deny(customer: Customer, key_arn: str) -> None:
    await customer.deny(key_arn)


async def allow(customer: Customer, key_arn: str) -> None:
    await customer.allow(key_arn)


@pytest.mark.parametrize(
    ("revoke", "restore"),
    [(disable, enable), (schedule_deletion, cancel_deletion), (deny, allow)],
    ids=["disable", "deletion", "policy"],
)
async def test_the_customer_takes_the_key_away_and_gives_it_back(
    cluster: Cluster, bystander: Tenant, revoke: Act, restore: Act
) -> None:
    async with AsyncExitStack() as stack:
        tenant = await stack.enter_async_context(new_tenant(cluster, f"by {revoke.__name__}"))
        client = await stack.enter_async_context(page_client(cluster, tenant.project))
        assert await tenant.read_page(client) != bytes(8192)
        other_client = await stack.enter_async_context(page_client(cluster, bystander.project))
        others = await stack.enter_async_context(bystander.bank(clients=2))
        bank = await stack.enter_async_context(tenant.bank())
        await others.commits(20)
        await bank.commits(50)
        begun = monotonic()
        compute = await tenant.compute()

        await revoke(cluster.customer, tenant.key_arn)
        await tenant.becomes(KeyState.REVOKED)
        revocation = await tenant.sealed()
        sealed = monotonic()

        assert revocation.state is KeyState.REVOKED
        # Nobody is cut off from anybody here, so everybody must have answered.
        assert {i.outcome for i in revocation.instances} == {"acknowledged"}
        assert not [p for p in compute.alive() if p.command == "postgres"]
        await compute.gone()
        flushed = await tenant.flushed()
        await nothing_is_served(tenant, client, RevokedError)
        await others.commits(50)
        assert await tenant.flushed() == flushed
        assert not tenant.acknowledged_since(sealed)
        # Clients must be told why, and nothing else.
        assert {code for code, _ in tenant.told_since(begun)} == {RevokedError.sqlstate}, tenant.told_since(begun)
        assert await bystander.read_page(other_client)

        await restore(cluster.customer, tenant.key_arn)
        await bank.commits(50)
        await bank.stop()
        await tenant.check()
        assert await tenant.read_page_anew()
        assert not bystander.ledger.errors_since(begun), "another workspace must notice nothing"
        await others.stop()
        await bystander.check()


async def test_a_read_replica_ends_and_comes_back_with_the_key(cluster: Cluster) -> None:
    async with new_tenant(cluster, "replicated") as tenant:
        endpoint = await cluster.client.create_endpoint(tenant.project.timeline, "replica", follows=True)
        connection = replace(tenant.project.connection, endpoint_id=endpoint.endpoint_id)
        replica = RunningProject(tenant.project.project, tenant.project.timeline, endpoint, connection)
        reader = await connect(replica)
        accounts = await reader.fetchval("select count(*) from account")
        assert accounts > 0
        compute = await compute_of(cluster, endpoint.endpoint_id)
        query = asyncio.create_task(reader.fetchval("select pg_sleep(60)"))

        await disable(cluster.customer, tenant.key_arn)
        revocation = await tenant.sealed()
        assert {i.outcome for i in revocation.instances} == {"acknowledged"}
        assert str(endpoint.endpoint_id) in {i.node_id for i in revocation.instances}
        assert not [p for p in compute.alive() if p.command == "postgres"]
        await compute.gone()
        with pytest.raises(CLIENT_ERRORS) as told:
            await query
        assert describe(told.value)[0] == RevokedError.sqlstate
        with pytest.raises(asyncpg.PostgresError) as refusal:
            await connect(replica)
        assert refusal.value.sqlstate == RevokedError.sqlstate

        await enable(cluster.customer, tenant.key_arn)
        await tenant.becomes(KeyState.ACTIVE)

        async def back() -> bool:
            try:
                again = await connect(replica)
            except CLIENT_ERRORS:
                return False
            found = await again.fetchval("select count(*) from account")
            await again.close()
            return bool(found == accounts)

        await wait_until(back)
        await cluster.client.stop_endpoint(endpoint.endpoint_id)


@asynccontextmanager
async def deaf_compute(tenant: Tenant) -> AsyncIterator[Bank]:
    """Clients of a compute that hears of nothing: its manager and its agent are stopped (SIGSTOP) within the block.

    The clients connect to its socket, around the proxy, which would hear and end their sessions.
    """
    manager = tenant.cluster.service("compute")
    compute = await tenant.compute()
    connection = tenant.project.connection

    async def connect_directly() -> Session:
        return await asyncpg.connect(
            host=str(compute.socket_dir),
            port=5432,
            user=connection.user,
            password=connection.password,
            database=connection.database,
        )

    async with tenant.bank(by=connect_directly) as bank:
        await bank.commits(50)
        manager.send_signal(signal.SIGSTOP)
        compute.pause()
        try:
            await bank.commits(50)
            yield bank
            assert compute.postmaster.exists, "it must run, or this shows nothing"
        finally:
            compute.resume()
            manager.send_signal(signal.SIGCONT)
        # It sees that its lease is over, and leaves nothing.
        await compute.gone()
        await wait_until(lambda: stopped(tenant.cluster, tenant.project))


async def test_a_compute_that_does_not_hear_of_it_commits_nothing(cluster: Cluster) -> None:
    """Nobody kills this Postgres. Nor does anybody acknowledge its WAL."""
    async with new_tenant(cluster, "deaf") as tenant, page_client(cluster, tenant.project) as client:
        async with deaf_compute(tenant) as bank:
            await disable(cluster.customer, tenant.key_arn)
            revocation = await tenant.sealed()
            sealed = monotonic()
            outcomes = {i.role.value: i.outcome for i in revocation.instances}
            assert outcomes["compute"] == outcomes["manager"] == "fenced"
            assert outcomes["safekeeper"] == outcomes["pageserver"] == "acknowledged"
            flushed = await tenant.flushed()
            with pytest.raises(TimeoutError):
                await bank.commits(1, timeout_s=QUIET_S)
            assert await tenant.flushed() == flushed
            assert not tenant.acknowledged_since(sealed)
            with pytest.raises(RevokedError):
                await tenant.read_page(client)
        await nothing_is_served(tenant, client, RevokedError)
        await restored(tenant)


async def test_safekeepers_that_slept_through_a_revocation_acknowledge_nothing(cluster: Cluster) -> None:
    """The WAL of commits lies in their sockets when they wake up, and the compute waits for one word."""
    async with new_tenant(cluster, "sleeping quorum") as tenant, page_client(cluster, tenant.project) as client:
        async with deaf_compute(tenant) as bank:
            async with asleep(cluster, "safekeeper-1", "safekeeper-2", "safekeeper-3"):
                stopped_at = monotonic()
                await disable(cluster.customer, tenant.key_arn)
                revocation = await tenant.sealed()
                assert {i.outcome for i in revocation.instances if i.role.value == "safekeeper"} == {"fenced"}
                # What was answered before the signal took effect may still have been on its way.
                assert not tenant.acknowledged_since(stopped_at + 0.5)
                sealed = monotonic()
            with pytest.raises(TimeoutError):
                await bank.commits(1, timeout_s=QUIET_S)
            assert not tenant.acknowledged_since(sealed)
        await nothing_is_served(tenant, client, RevokedError)
        await restored(tenant)


async def restored(tenant: Tenant) -> None:
    """The customer allows again: work goes on, and everything is there."""
    await enable(tenant.cluster.customer, tenant.key_arn)
    async with tenant.bank() as bank:
        await bank.commits(50)
    await tenant.check()


async def test_an_unreachable_kms_suspends_after_its_grace_and_revokes_nothing(cluster: Cluster) -> None:
    cloud = cluster.service("customercloud")
    async with (
        new_tenant(cluster, "outage", OUTAGE_GRACE_S) as tenant,
        page_client(cluster, tenant.project) as client,
        tenant.bank() as bank,
    ):
        await bank.commits(50)
        compute = await tenant.compute()
        began = monotonic()
        await cloud.kill()
        try:
            await bank.commits(50)
            await wait_until(lambda: tenant.ledger.errors_since(began))
            ended_after_s = tenant.ledger.errors_since(began)[0][0] - began
            # The last good probe was at most one interval before.
            assert ended_after_s > OUTAGE_GRACE_S - PROBE_INTERVAL_S - 0.1, "the grace was cut short"
            await tenant.becomes(KeyState.SUSPENDED)
            await tenant.sealed()
            sealed = monotonic()
            await compute.gone()
            await nothing_is_served(tenant, client, SuspendedError)
            assert not tenant.acknowledged_since(sealed)
            assert {r.state for r in await tenant.revocations()} == {KeyState.SUSPENDED}
            assert {code for code, _ in tenant.told_since(began)} == {SuspendedError.sqlstate}, tenant.told_since(began)
        finally:
            await cloud.start()
        await bank.commits(50)
        assert await tenant.state() is KeyState.ACTIVE
        await bank.stop()
        await tenant.check()


async def test_without_the_keymanager_leases_run_out_and_come_back(cluster: Cluster) -> None:
    keymanager = cluster.service("keymanager")
    async with (
        new_tenant(cluster, "orphan") as tenant,
        tenant.bank() as bank,
    ):
        await bank.commits(50)
        compute = await tenant.compute()
        await keymanager.kill()
        killed = monotonic()
        try:
            await bank.commits(20)  # the leases are good for a while yet
            await asyncio.gather(compute.gone(), refused(tenant, LeaseExpiredError))
            assert monotonic() < killed + LEASE_TTL_S + 2.0
            flushed = await tenant.flushed()
            with pytest.raises(TimeoutError):
                await bank.commits(1, timeout_s=QUIET_S)
            assert await tenant.flushed() == flushed
            assert not tenant.acknowledged_since(killed + LEASE_TTL_S)
        finally:
            await keymanager.start()
        await bank.commits(50)
        await bank.stop()
        await tenant.check()
        assert await tenant.read_page_anew()


# --- a pageserver that was asleep ---


async def answers(questions: list[asyncio.Future[bytes | int]]) -> list[bytes | int | BaseException]:
    async with asyncio.timeout(20):
        return list(await asyncio.gather(*questions, return_exceptions=True))


async def test_a_pageserver_that_slept_through_its_lease_answers_nothing_it_was_asked_before(cluster: Cluster) -> None:
    async with new_tenant(cluster, "sleeper") as tenant, page_client(cluster, tenant.project) as client:
        page = await tenant.read_page(client)
        async with asleep(cluster, "pageserver"):
            fell_asleep = monotonic()
            questions = [client.ask(GET_PAGE, *tenant.page) for _ in range(100)]
            await asyncio.wait(questions, timeout=LEASE_TTL_S + 0.5)
            assert not [q for q in questions if q.done()]
        got = await answers(questions)
        assert monotonic() - fell_asleep > LEASE_TTL_S
        assert {type(answer) for answer in got} == {LeaseExpiredError}

        async def awake() -> bool:
            try:
                return await tenant.read_page_anew() == page
            except KeylakeError:
                return False

        await wait_until(awake)


async def test_a_pageserver_that_slept_through_a_revocation_answers_nothing(cluster: Cluster) -> None:
    async with new_tenant(cluster, "dreamer") as tenant, page_client(cluster, tenant.project) as client:
        assert await tenant.read_page(client)
        async with asleep(cluster, "pageserver"):
            questions = [client.ask(GET_PAGE, *tenant.page) for _ in range(100)]
            await disable(cluster.customer, tenant.key_arn)
            revocation = await tenant.sealed()
            assert [i.outcome for i in revocation.instances if i.role.value == "pageserver"] == ["fenced"]
        got = await answers(questions)
        assert all(isinstance(answer, KeyAccessError) for answer in got), {type(answer) for answer in got}

        with pytest.raises(KeyAccessError):
            await tenant.read_page(client)  # whether or not it has heard by now
        await refused(tenant, RevokedError)
        await restored(tenant)
