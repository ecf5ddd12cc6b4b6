"""The customer says no, or nobody can be asked: everything stops, and comes back with nothing lost."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import combinations, product
from time import monotonic

import asyncpg
import pytest
import pytest_asyncio

from customercloud.faults import Faults, KeyFaults, Outage
from keylake.cluster import Cluster, RunningProject
from keylake.demo.ledger import CLIENT_ERRORS, describe
from keylake.layout import SAFEKEEPERS
from shared.api.keymanager import KeyState, NoCause
from shared.errors import (
    KeyAccessError,
    KeylakeError,
    LeaseExpiredError,
    NotFoundError,
    RevokedError,
    ShreddedError,
    SuspendedError,
    UnavailableError,
)
from shared.wire.pagestream import GET_PAGE
from tests.cluster.bank import Bank
from tests.cluster.pages import page_client
from tests.cluster.people import shred_by_two
from tests.cluster.primary import Session, connect, safekeeper_timelines, stopped
from tests.cluster.processes import ComputeProcesses, Process, below, compute_of, standing_still, title
from tests.cluster.tenants import (
    LEASE_TTL_S,
    PROBE_INTERVAL_S,
    Tenant,
    allow,
    cancel_deletion,
    deny,
    disable,
    enable,
    new_tenant,
    nothing_is_served,
    refused,
    schedule_deletion,
    sqlstate_of_connecting,
)
from tests.cluster.wal import WalReader, first_wal, wal_reader
from tests.fixtures.forked_cluster import ForkedCluster
from tests.fixtures.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

OUTAGE_GRACE_S = 3.0
RESTORE_HOLD_S = 2.0
QUIET_S = 1.0
"""Clients of a live database commit hundreds of times in this time."""
SHORT_S = 0.5
"""Several commits, and a safekeeper that lacks some pages of the log has them."""
START_S = 10.0
"""A compute that is started takes connections after a fifth of it."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[Cluster]:
    keymanager = {"lease_ttl_s": LEASE_TTL_S, "restore_hold_s": RESTORE_HOLD_S}
    settings = {"keymanager": keymanager, "compute": {"poll_interval_s": 0.2}}
    async with ForkedCluster(settings=settings, links=True) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bystander(cluster: Cluster) -> AsyncIterator[Tenant]:
    """Somebody with a key of their own, whom the others' troubles are none of."""
    async with new_tenant(cluster, "bystander", outage_grace_s=600) as tenant:
        yield tenant


def asleep(cluster: Cluster, *names: str) -> AbstractContextManager[None]:
    """These services are stopped (SIGSTOP) within the block."""
    return standing_still([cluster.service(name).pid for name in names])


async def test_the_customer_takes_the_key_away_and_gives_it_back(cluster: Cluster, bystander: Tenant) -> None:
    async with AsyncExitStack() as stack:
        tenant = await stack.enter_async_context(new_tenant(cluster, "by disabling"))
        client = await stack.enter_async_context(page_client(cluster, tenant.project))
        assert await tenant.read_page(client) != bytes(8192)
        other_client = await stack.enter_async_context(page_client(cluster, bystander.project))
        others = await stack.enter_async_context(bystander.bank(clients=2))
        bank = await stack.enter_async_context(tenant.bank())
        await others.commits(20)
        await bank.commits(50)
        begun = monotonic()
        compute = await tenant.compute()

        await disable(cluster.customer, tenant.key_arn)
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

        await enable(cluster.customer, tenant.key_arn)
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


async def connect_directly(tenant: Tenant, compute: ComputeProcesses) -> Session:
    """To its socket, around the proxy."""
    connection = tenant.project.connection
    return await asyncpg.connect(
        host=str(compute.socket_dir),
        port=5432,
        user=connection.user,
        password=connection.password,
        database=connection.database,
    )


@asynccontextmanager
async def deaf_compute(tenant: Tenant) -> AsyncIterator[Bank]:
    """Clients of a compute that hears of nothing: its manager and its agent are stopped (SIGSTOP) within the block.

    The clients connect to its socket, around the proxy, which would hear and end their sessions.
    """
    manager = tenant.cluster.service("compute")
    compute = await tenant.compute()
    async with tenant.bank(by=lambda: connect_directly(tenant, compute)) as bank:
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


class Copied:
    """Rows of a query that does not end, and when they came."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.came_at: list[float] = []

    async def run(self) -> None:
        """Raises what ends it."""
        slow = "select repeat('row', 3000), pg_sleep(0.01) from generate_series(1, 1000000)"
        await self._session.copy_from_query(slow, output=self._take)

    async def _take(self, data: bytes) -> None:
        self.came_at.append(monotonic())

    async def goes_on(self) -> None:
        seen = len(self.came_at)
        await wait_until(lambda: len(self.came_at) > seen)


async def hears_nothing_of(tenant: Tenant, revoked: bool) -> None:
    """A client whose compute is stopped as a whole until its lease is over, and goes on: Postgres first, with nobody
    there yet who would kill it, and rows to send."""
    cluster = tenant.cluster
    async with AsyncExitStack() as stack:
        session = await tenant.connect()
        manager, compute = cluster.service("compute"), await tenant.compute()
        through_proxy, directly = Copied(session), Copied(await connect_directly(tenant, compute))
        query, other = asyncio.create_task(through_proxy.run()), asyncio.create_task(directly.run())
        await asyncio.gather(through_proxy.goes_on(), directly.goes_on())
        manager.send_signal(signal.SIGSTOP)
        stack.callback(manager.send_signal, signal.SIGCONT)
        compute.pause_all()
        stack.callback(compute.resume_all)
        if revoked:
            await disable(cluster.customer, tenant.key_arn)
            revocation = await tenant.sealed()
            outcomes = {i.role.value: i.outcome for i in revocation.instances}
            assert outcomes["compute"] == "fenced", "its lease was over before it woke up"
            assert outcomes["proxy"] == "acknowledged"
        else:
            await asyncio.sleep(LEASE_TTL_S)
        over = monotonic()
        compute.resume_all(but_the_agent=True)
        await directly.goes_on()
        with pytest.raises(CLIENT_ERRORS) as told:
            await asyncio.wait_for(query, START_S)
        assert compute.postmaster.exists, "the proxy alone has ended it"
        assert describe(told.value)[0] == (RevokedError.sqlstate if revoked else "57P01")
        assert through_proxy.came_at[-1] < over
        await stack.aclose()
        await compute.gone()
        with pytest.raises(CLIENT_ERRORS):
            await other


async def test_of_a_compute_that_was_stopped_as_a_whole_no_row_arrives_when_it_goes_on(cluster: Cluster) -> None:
    """Whether the project is revoked meanwhile, or nobody has said anything and its own lease is over. (Who has got at
    its own socket is sent rows: docs/honesty.md.)"""
    async with new_tenant(cluster, "frozen") as tenant:
        await hears_nothing_of(tenant, revoked=False)
        assert await tenant.state() is KeyState.ACTIVE
        assert not await tenant.revocations()
        await hears_nothing_of(tenant, revoked=True)
        await restored(tenant)


async def follow(reader: WalReader, came_at: list[float]) -> KeylakeError:
    """Reads what follows, and remembers when it came. Returns why there is no more."""
    try:
        while True:
            await reader.read()
            came_at.append(monotonic())
    except KeylakeError as error:
        return error


async def test_safekeepers_that_slept_through_a_revocation_acknowledge_and_send_nothing(cluster: Cluster) -> None:
    """The WAL of commits lies in their sockets when they wake up, and the compute waits for one word. So do those who
    follow the log, and a question from who asks for it while they sleep."""
    async with new_tenant(cluster, "sleeping quorum") as tenant, AsyncExitStack() as stack:
        client = await stack.enter_async_context(page_client(cluster, tenant.project))
        _, _, lsn = tenant.page
        came_at: list[float] = []
        askers: list[WalReader] = []
        followers: list[asyncio.Task[KeylakeError]] = []
        for port in cluster.ports.safekeepers_wal:
            askers.append(await stack.enter_async_context(wal_reader(cluster, tenant.project, port)))
            follower = await stack.enter_async_context(wal_reader(cluster, tenant.project, port))
            await follower.ask(lsn)
            await follower.read()
            followers.append(asyncio.create_task(follow(follower, came_at)))
        async with deaf_compute(tenant) as bank:
            with asleep(cluster, "safekeeper-1", "safekeeper-2", "safekeeper-3"):
                stopped_at = monotonic()
                assert came_at, "there are commits, so there is WAL"
                await disable(cluster.customer, tenant.key_arn)
                for asker in askers:
                    await asker.ask(lsn)
                revocation = await tenant.sealed()
                assert {i.outcome for i in revocation.instances if i.role.value == "safekeeper"} == {"fenced"}
                # What was answered before the signal took effect may still have been on its way.
                assert not tenant.acknowledged_since(stopped_at + 0.5)
                sealed = monotonic()
            for asker in askers:
                with pytest.raises((KeyAccessError, UnavailableError)):  # cut off, with or without a word
                    await asker.read()
            with pytest.raises(TimeoutError):
                await bank.commits(1, timeout_s=QUIET_S)
            assert not tenant.acknowledged_since(sealed)
            reasons = await asyncio.gather(*followers)
            assert {type(reason) for reason in reasons} <= {LeaseExpiredError, RevokedError, UnavailableError}
            assert not [at for at in came_at if at > stopped_at + 0.5]
        await nothing_is_served(tenant, client, RevokedError)
        await restored(tenant)


async def restored(tenant: Tenant) -> None:
    """The customer allows again: work goes on, and everything is there."""
    await enable(tenant.cluster.customer, tenant.key_arn)
    async with tenant.bank() as bank:
        await bank.commits(50)
    await tenant.check()


async def test_a_kms_that_flaps_takes_a_compute_down_twice_however_often_it_says_yes(cluster: Cluster) -> None:
    """Its first return is believed at once. Then it says yes and no in turns, and each answer is heard, under load."""
    async with new_tenant(cluster, "flapping") as tenant, tenant.bank() as bank:
        customer, endpoint_id = cluster.customer, tenant.project.endpoint.endpoint_id

        async def heard(verdict: str) -> None:
            async def look() -> bool:
                found = await cluster.client.key_configuration(tenant.project.project.key_configuration_id)
                return found.last_verdict.startswith(verdict)

            await wait_until(look)

        async def term() -> int:
            return (await cluster.client.endpoint(endpoint_id)).term

        await bank.commits(50)
        began, first = monotonic(), await term()
        await disable(customer, tenant.key_arn)
        await tenant.becomes(KeyState.REVOKED)
        await enable(customer, tenant.key_arn)
        await bank.commits(50)
        for _ in range(5):
            await disable(customer, tenant.key_arn)
            await heard("DENIED")
            await tenant.becomes(KeyState.REVOKED)  # the first time by a second denial
            await enable(customer, tenant.key_arn)
            await heard("ALLOWED")
        assert await tenant.state() is KeyState.REVOKED
        assert len(await tenant.revocations()) == 2
        assert await term() == first + 1, "one compute, after the first return"
        await tenant.sealed()
        held = monotonic()
        await bank.commits(50)
        assert len(await tenant.revocations()) == 2
        assert await term() == first + 2
        assert {code for code, _ in tenant.told_since(began)} == {RevokedError.sqlstate}, tenant.told_since(began)
        assert not [at for at in tenant.ledger.acknowledged.values() if held < at < held + RESTORE_HOLD_S - 1.0]
        await bank.stop()
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
            # The grace is counted from when the last good probe was begun: one interval before, and what it took itself
            # beside other work.
            assert ended_after_s > OUTAGE_GRACE_S - PROBE_INTERVAL_S - 0.5, "the grace was cut short"
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


# --- cut off, while states change ---


QUORUM = [f"safekeeper-{number}" for number in range(1, SAFEKEEPERS + 1)]
LAGS = 2
"""The last of them."""
FROM_KEYMANAGER = [(name, "keymanager") for name in ("pageserver", *QUORUM, "compute", "proxy")]
FROM_EACH_OTHER = [
    *combinations(QUORUM, 2),
    *(("compute", name) for name in ("pageserver", *QUORUM, "proxy")),
    *(("pageserver", name) for name in QUORUM),
]


@asynccontextmanager
async def cut_off(cluster: Cluster, pairs: Sequence[tuple[str, str]]) -> AsyncIterator[float]:
    """From each other within the block. Gives the time."""
    try:
        for one, other in pairs:
            await cluster.partition(one, other)
        yield monotonic()
    finally:
        await cluster.heal()


async def link(tenant: Tenant) -> None:
    """Its compute's socket can be cut when this returns: the safekeepers and the clients have come to it once more."""
    compute = await tenant.compute()
    endpoint = await tenant.cluster.client.endpoint(tenant.project.endpoint.endpoint_id)
    assert endpoint.instance_id is not None
    before = sessions(compute)
    await tenant.cluster.link_compute(endpoint.instance_id)
    for process in before:
        os.kill(process.pid, signal.SIGTERM)

    def are_back() -> bool:
        names = [title(process) for process in sessions(compute) if process not in before]
        return sum("walsender" in name for name in names) == SAFEKEEPERS and not [p for p in before if p.exists]

    await wait_until(are_back)


def sessions(compute: ComputeProcesses) -> list[Process]:
    """Of the safekeepers and of clients; not the agent's own."""
    kinds = ("postgres: walsender ", "postgres: app ")
    return [process for process in below(compute.postmaster.pid) if title(process).startswith(kinds)]


async def nothing_is_acknowledged(tenant: Tenant, bank: Bank, clients: int) -> None:
    """But what was on its way."""
    with pytest.raises(TimeoutError):
        await bank.commits(clients + 1, timeout_s=SHORT_S)
    assert await tenant.state() is KeyState.ACTIVE


async def only_the_manager_hears_nothing(tenant: Tenant) -> None:
    """Of a revocation: its computes hold leases of their own."""
    cluster = tenant.cluster
    manager, compute = cluster.service("compute"), await tenant.compute()
    try:
        await cluster.partition("compute", "keymanager", pids=[manager.pid])
        cut_at = monotonic()
        await schedule_deletion(cluster.customer, tenant.key_arn)
        await compute.gone()
        assert monotonic() < cut_at + LEASE_TTL_S, "it does not wait for its manager"
        outcomes = {i.node_id: i.outcome for i in (await tenant.sealed()).instances}
        assert {name for name, outcome in outcomes.items() if outcome == "fenced"} == {"compute"}
        await silent(tenant, cut_at)
    finally:
        await cluster.heal()
    await told(tenant, RevokedError)


async def silent(tenant: Tenant, cut_at: float) -> None:
    """Who hears nothing serves nothing when the computed time is over, whatever became of the project meanwhile."""
    bound_s = (await tenant.bound(NoCause.OPERATOR)).partitioned_s
    assert bound_s is not None
    await asyncio.sleep(max(0.0, cut_at + bound_s - monotonic()))
    flushed = await tenant.flushed()
    with pytest.raises(KeyAccessError):
        await tenant.read_page_anew()
    _, _, lsn = tenant.page
    for port in tenant.cluster.ports.safekeepers_wal:
        with pytest.raises((KeyAccessError, NotFoundError)):  # nothing is there of one that is shredded
            await first_wal(tenant.cluster, tenant.project, port, lsn)
    # A proxy that does not reach the manager does not answer before its patience is over.
    assert await sqlstate_of_connecting(tenant, START_S)
    assert await tenant.flushed() == flushed
    assert not tenant.acknowledged_since(cut_at + bound_s)


async def told(tenant: Tenant, expected: type[KeyAccessError]) -> None:
    """Returns when everybody says the same of it again."""

    async def look() -> bool:
        return await sqlstate_of_connecting(tenant) == expected.sqlstate

    await asyncio.gather(refused(tenant, expected), wait_until(look))


async def test_who_is_cut_off_is_silent_within_a_lease_in_every_state_and_then_believes_the_new_one(
    cluster: Cluster,
) -> None:
    """Cut off while ACTIVE, and the state changes to each of the others; cut off in each of these, and it changes back.
    One customer schedules the key's deletion, the other takes the right to use it away. Before and after that, what
    depends on one cut alone: the commits' path, the rows', what a safekeeper that lags lacks, and the manager's."""
    customer = cluster.customer
    spared = frozenset({customer.bootstrap.customer.access_key_id})
    async with AsyncExitStack() as stack:
        names = ("active", "suspended", "revoked", "shredded")
        tenants = [await stack.enter_async_context(new_tenant(cluster, f"cut off, {name}")) for name in names]
        active, suspended, revoked, shredded = tenants
        await link(active)
        banks = [await stack.enter_async_context(tenant.bank(clients=2)) for tenant in tenants]
        for bank in banks:
            await bank.commits(10)
        computes = [await tenant.compute() for tenant in tenants]
        for tenant, port in product(tenants, cluster.ports.safekeepers_wal):
            _, _, lsn = tenant.page
            assert await first_wal(cluster, tenant.project, port, lsn)

        for path in ([("compute", name) for name in QUORUM[1:]], [("proxy", "compute")]):
            async with cut_off(cluster, path):
                await nothing_is_acknowledged(active, banks[0], clients=2)
            await banks[0].commits(10)

        async with cut_off(cluster, FROM_KEYMANAGER) as cut_at:
            silence = KeyFaults(outage=Outage.REFUSE)
            faults = Faults(of_keys={suspended.key_arn.rpartition("/")[2]: silence}, spared_access_key_ids=spared)
            await asyncio.to_thread(customer.simulation.set_faults, faults)
            await schedule_deletion(customer, revoked.key_arn)
            await shred_by_two(stack, cluster, shredded.project.project)
            await suspended.becomes(KeyState.SUSPENDED)
            await revoked.becomes(KeyState.REVOKED)
            await shredded.becomes(KeyState.SHREDDED)
            for tenant in (suspended, revoked, shredded):
                instances = (await tenant.sealed()).instances
                assert not [each for each in instances if each.outcome != "fenced"], "nobody can have heard of it"
            await asyncio.gather(*(silent(tenant, cut_at) for tenant in tenants))
            await asyncio.gather(*(compute.gone() for compute in computes))
            assert await active.state() is KeyState.ACTIVE
        await banks[0].commits(10)
        await told(suspended, SuspendedError)
        await told(revoked, RevokedError)
        await told(shredded, ShreddedError)

        await link(active)
        stack.push_async_callback(cluster.heal)
        await cluster.partition("compute", QUORUM[LAGS])
        await banks[0].commits(10)  # which it lacks from here on
        async with cut_off(cluster, FROM_KEYMANAGER + FROM_EACH_OTHER) as cut_at:
            await asyncio.to_thread(customer.simulation.clear_faults)
            await cancel_deletion(customer, revoked.key_arn)
            await deny(customer, active.key_arn)
            await suspended.becomes(KeyState.ACTIVE)
            await revoked.becomes(KeyState.ACTIVE)
            await active.becomes(KeyState.REVOKED)
            await active.sealed()
            await asyncio.gather(*(silent(tenant, cut_at) for tenant in tenants))
        for bank in banks[1:3]:
            await bank.commits(10)
        await told(active, RevokedError)
        await told(shredded, ShreddedError)
        async with cut_off(cluster, [(QUORUM[LAGS], name) for name in QUORUM[:LAGS]]):
            await allow(customer, active.key_arn)
            await banks[0].commits(10)
            with pytest.raises(TimeoutError):
                await wait_until(lambda: has_caught_up(active), SHORT_S)
        await wait_until(lambda: has_caught_up(active))
        for tenant, bank in zip(tenants[:3], banks, strict=False):
            await bank.stop()
            await tenant.check()
        await only_the_manager_hears_nothing(revoked)


async def has_caught_up(tenant: Tenant) -> bool:
    """The safekeeper that was cut off, with the log of before it, which it can have from the other ones only."""
    return (await safekeeper_timelines(tenant.cluster, tenant.project))[LAGS].streaming


# --- a pageserver that was asleep ---


async def answers(questions: list[asyncio.Future[bytes | int]]) -> list[bytes | int | BaseException]:
    async with asyncio.timeout(20):
        return list(await asyncio.gather(*questions, return_exceptions=True))


async def test_a_pageserver_that_slept_through_its_lease_answers_nothing_it_was_asked_before(cluster: Cluster) -> None:
    async with new_tenant(cluster, "sleeper") as tenant, page_client(cluster, tenant.project) as client:
        page = await tenant.read_page(client)
        with asleep(cluster, "pageserver"):
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
        with asleep(cluster, "pageserver"):
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
