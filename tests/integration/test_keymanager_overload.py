"""The keymanager without its database, and the keymanager with too much to do: it says no, in time, and goes on."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.api.keymanager import KeyState, Role
from shared.errors import KeyAccessError, KeylakeError, LeaseExpiredError, OverloadedError, UnavailableError
from shared.ids import InstanceId
from shared.keyclient import KeyClient
from shared.keysession import session_tokens
from shared.lease import Lease
from shared.postgres import PostgresServer, Shutdown, initdb
from tests.fixtures.customercloud import CloudProcess, new_tenant
from tests.fixtures.key_source_contract import Losses, named
from tests.fixtures.keymanager import Keymanager, Trust
from tests.fixtures.keymanager_replicas import readiness
from tests.fixtures.waiting import wait_until

pytestmark = pytest.mark.integration


# --- without the metadata database ---


@dataclass
class Place:
    database: PostgresServer
    keymanager: Keymanager
    cmk: str


@pytest.fixture
async def place(tmp_path: Path, trust: Trust, shared_cloud: CloudProcess) -> AsyncIterator[Place]:
    """A keymanager on a PostgreSQL of its own."""
    password = secrets.token_hex(8)
    tenant = new_tenant(shared_cloud)
    with tempfile.TemporaryDirectory(prefix="kl-", dir="/dev/shm") as directory:
        await initdb(Path(directory) / "p", password=password)
        async with PostgresServer(Path(directory) / "p", socket_dir=Path(directory) / "s") as database:
            dsn = f"postgresql://postgres:{password}@/postgres?host={database.host}"
            keymanager = Keymanager(tmp_path, trust, dsn, tenant)
            try:
                await keymanager.start()
                yield Place(database, keymanager, tenant.customer.create_key(role_arn=tenant.role_arn))
                assert keymanager.stop() == 0
            finally:
                if keymanager.process is not None and keymanager.process.poll() is None:
                    keymanager.kill()
                tenant.close()


async def says(keymanager: Keymanager, status: int, word: str) -> bool:
    return await readiness(keymanager) == (status, word)


async def refused(keymanager: Keymanager, method: str, path: str) -> KeylakeError:
    async with keymanager.client() as client:
        with pytest.raises(KeylakeError) as error:
            await client.request(method, path)
    return error.value


@pytest.mark.parametrize("how", [Shutdown.FAST, Shutdown.KILL])
async def test_without_its_database_nothing_is_granted_and_all_comes_back(place: Place, how: Shutdown) -> None:
    keymanager, database = place.keymanager, place.database
    project = await keymanager.new_project(place.cmk)
    url = f"/v1/projects/{project.project_id}"
    losses, others = Losses(), Losses()
    async with keymanager.key_client() as keys, keymanager.key_client(node_id="pageserver-2") as other:
        lease = await keys.acquire(project.project_id, losses)
        [(_, envelope)] = await keys.generate(project.project_id, [name := named()])
        await database.stop(how)

        # What was granted runs out by itself.
        await wait_until(lambda: losses.seen)
        assert [(loss.state, loss.revocation_id) for loss in losses.seen] == [(KeyState.ACTIVE, None)]
        with pytest.raises(LeaseExpiredError):
            lease.check()
        # Nothing new is granted, and nothing is claimed: neither a revocation nor its end.
        assert await says(keymanager, 503, "waiting")
        with pytest.raises(UnavailableError):
            await other.acquire(project.project_id, others)
        with pytest.raises(KeyAccessError):
            await keys.unwrap(project.project_id, [(name, envelope)])
        for method, path in (("GET", url), ("POST", f"{url}:revalidate"), ("GET", "/v1/audit:verify")):
            assert isinstance(await refused(keymanager, method, path), UnavailableError)
        # What the customer does meanwhile is found out afterwards.
        await asyncio.to_thread(keymanager.tenant.customer.disable, place.cmk)

        await database.start()
        await wait_until(lambda: says(keymanager, 200, "ready"))
        await keymanager.wait_state(project.project_id, KeyState.REVOKED)
        sealed = await keymanager.wait_sealed(project.project_id)
        assert sealed.state is KeyState.REVOKED
        await asyncio.to_thread(keymanager.tenant.customer.enable, place.cmk)
        await keymanager.wait_state(project.project_id, KeyState.ACTIVE)
        await wait_until(lambda: lease.live)
        await keys.unwrap(project.project_id, [(name, envelope)])
        (await other.acquire(project.project_id, others)).check()
        assert len(await keymanager.revocations(project.project_id)) == 1
        assert (await keymanager.verify_audit()).intact


async def test_database_that_is_away_for_a_moment_is_noticed_by_nobody(place: Place) -> None:
    keymanager = place.keymanager
    keymanager.stop()
    keymanager.lease_ttl_s = 10.0
    await keymanager.start()
    project = await keymanager.new_project(place.cmk)
    losses = Losses()
    async with keymanager.key_client() as keys:
        lease = await keys.acquire(project.project_id, losses)
        await place.database.stop()
        await place.database.start()
        await keys.generate(project.project_id, [named()])
        lease.check()
    assert losses.seen == []


async def test_keymanager_waits_for_a_database_that_is_not_there_yet(place: Place) -> None:
    keymanager = place.keymanager
    keymanager.stop()
    await place.database.stop()
    keymanager.spawn()
    await wait_until(lambda: says(keymanager, 503, "waiting"))
    await place.database.start()
    await wait_until(lambda: says(keymanager, 200, "ready"))
    assert (await keymanager.new_project(place.cmk)).state is KeyState.ACTIVE


# --- with too much to do ---


async def renewals(lease: Lease, times: int) -> None:
    """Returns when the lease was renewed so often."""
    for _ in range(times):
        before = lease.remaining_s
        while (now := lease.remaining_s) <= before:
            before = now
            await asyncio.sleep(0.02)


async def test_flood_of_key_requests_costs_nobody_a_lease(keymanager: Keymanager, cmk: str) -> None:
    """Six storage nodes ask for keys as fast as they can; what is too much is refused at once, and the leases of all
    of them, and of one that asks for nothing, are renewed in time. The keymanager does not lose its leadership."""
    project = await keymanager.new_project(cmk)
    keymanager.stop()
    keymanager.options = {"concurrent_key_requests": 2, "waiting_key_requests": 6, "all_key_requests": 40}
    keymanager.lease_ttl_s = 6.0  # on a busy machine everything takes its time
    await keymanager.start()
    epoch = (await keymanager.status()).epoch
    losses = Losses()
    served = overloaded = 0
    objects = [named(f"layer-{n}") for n in range(128)]

    async def ask(keys: KeyClient) -> None:
        nonlocal served, overloaded
        while True:
            try:
                await keys.generate(project.project_id, objects)
                served += 1
            except OverloadedError:
                overloaded += 1
                await asyncio.sleep(0.02)

    async with contextlib.AsyncExitStack() as stack:
        quiet = await stack.enter_async_context(keymanager.key_client(Role.PROXY, "proxy-1"))
        leases = [await quiet.acquire(project.project_id, losses)]
        clients = []
        for number in range(6):
            client = await stack.enter_async_context(keymanager.key_client(node_id=f"pageserver-{number}"))
            leases.append(await client.acquire(project.project_id, losses))
            clients.append(client)
        asking = [asyncio.create_task(ask(client)) for client in clients for _ in range(12)]
        try:
            async with asyncio.timeout(60):  # four renewals take longer than a lease lasts
                await asyncio.gather(*(renewals(lease, 4) for lease in leases))
            assert served > 0
            assert overloaded > 0
        finally:
            for task in asking:
                task.cancel()
            results = await asyncio.gather(*asking, return_exceptions=True)
        assert {type(result) for result in results} == {asyncio.CancelledError}
        for lease in leases:
            lease.check()
    assert losses.seen == []
    assert (await keymanager.status()).epoch == epoch


async def test_more_sessions_and_requests_than_allowed_are_refused(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    keymanager.stop()
    keymanager.options = {"max_sessions": 1, "max_requests": 2}
    await keymanager.start()
    async with keymanager.key_client() as first:
        (await first.acquire(project.project_id, Losses())).check()
        tokens = session_tokens(keymanager.trust.issuers[Role.PROXY])
        async with KeyClient(
            keymanager.address,
            keymanager.trust.ca_certificate,
            tokens,
            role=Role.PROXY,
            node_id="proxy-1",
            instance_id=InstanceId.new(),
            request_timeout_s=1.0,
        ) as second:
            with pytest.raises(UnavailableError):
                await second.acquire(project.project_id, Losses())
        assert (await keymanager.status()).instances == 1
        async with keymanager.client() as client:
            answers = await asyncio.gather(
                *(client.request("GET", "/v1/audit:verify") for _ in range(40)), return_exceptions=True
            )
        refusals = [answer for answer in answers if isinstance(answer, BaseException)]
        assert refusals
        assert {type(refusal) for refusal in refusals} == {OverloadedError}
        assert len(refusals) < len(answers)
        first.leases()[0].check()
