"""The key client in bad weather: lost connections, a keymanager that stands still, impatient callers."""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from typing import TYPE_CHECKING

import pytest

from shared.api.keymanager import KeyState, Project, RevokeRequest
from shared.config import Address
from shared.errors import LeaseExpiredError, RevokedError, UnavailableError
from shared.lease import KeyLoss
from tests.fixtures.key_source_contract import Losses, named
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from tests.fixtures.keymanager import Keymanager

pytestmark = pytest.mark.integration


async def test_requests_survive_lost_connections(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    losses = Losses()
    async with keymanager.key_client(cache_capacity=1) as keys:
        await keys.acquire(project.project_id, losses)
        names = [named(f"layer-{n}") for n in range(200)]
        made = await keys.generate(project.project_id, names)
        items = [(name, envelope) for name, (_, envelope) in zip(names, made, strict=True)]
        seals = [dek.seal(bytes(12), b"x", b"") for dek, _ in made]
        del made
        for _ in range(10):
            asking = [asyncio.create_task(keys.unwrap(project.project_id, [item])) for item in items[:-1]]
            more = asyncio.create_task(keys.generate(project.project_id, [named()]))
            await asyncio.sleep(0)
            if keys._session is not None:
                keys._session.abort()
            answers = await asyncio.gather(*asking)
            assert [a[0].seal(bytes(12), b"x", b"") for a in answers] == seals[:-1]
            await more
    assert losses.seen == []


async def test_impatient_waiter_does_not_disturb_the_others(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    async with keymanager.key_client() as keys:
        await keys.acquire(project.project_id, Losses())
        [(_, envelope)] = await keys.generate(project.project_id, [thing := named()])
        await keys.release(project.project_id)
        await keys.acquire(project.project_id, Losses())
        waiting = [asyncio.create_task(keys.unwrap(project.project_id, [(thing, envelope)])) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert isinstance(results[1], list)
        assert results[1] == results[2]
    assert len([r for r in await keymanager.audit("dek.unwrap") if r["outcome"] == "ok"]) == 1


async def test_standing_keymanager_costs_the_lease_and_its_return_gives_it_back(
    keymanager: Keymanager, cmk: str
) -> None:
    project = await keymanager.new_project(cmk)
    losses = Losses()
    async with keymanager.key_client(request_timeout_s=1) as keys:
        lease = await keys.acquire(project.project_id, losses)
        [(dek, envelope)] = await keys.generate(project.project_id, [thing := named()])
        assert keymanager.process is not None
        keymanager.process.send_signal(signal.SIGSTOP)
        try:
            await wait_until(lambda: losses.seen, keymanager.lease_ttl_s + 2)
            assert dek.wiped
            with pytest.raises(LeaseExpiredError):
                lease.check()
            with pytest.raises(LeaseExpiredError):
                await keys.unwrap(project.project_id, [(thing, envelope)])
        finally:
            keymanager.process.send_signal(signal.SIGCONT)
        await wait_until(lambda: lease.live)
        await keys.unwrap(project.project_id, [(thing, envelope)])
    assert [(loss.state, loss.revocation_id) for loss in losses.seen] == [(KeyState.ACTIVE, None)]


async def test_acquire_waits_for_the_keymanager_but_not_for_ever(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    keymanager.stop()
    async with keymanager.key_client(request_timeout_s=0.5) as impatient:
        with pytest.raises(UnavailableError):
            await impatient.acquire(project.project_id, Losses())
        assert impatient.leases() == []
    async with keymanager.key_client(request_timeout_s=30) as patient:
        acquiring = asyncio.create_task(patient.acquire(project.project_id, Losses()))
        await keymanager.start()
        (await acquiring).check()


async def test_cancelled_acquire_leaves_nothing_behind(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    async with keymanager.key_client() as keys:
        keys_addresses, keys._opener._addresses = keys._opener._addresses, deque([Address(port=1)])
        first = asyncio.create_task(keys.acquire(project.project_id, Losses()))
        second = asyncio.create_task(keys.acquire(project.project_id, Losses()))
        await asyncio.sleep(0)
        first.cancel()
        keys._opener._addresses = keys_addresses
        (await second).check()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert len(keys.leases()) == 1


async def test_closing_wipes_releases_and_ends(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    async with keymanager.key_client() as keys:
        lease = await keys.acquire(project.project_id, Losses())
        [(dek, envelope)] = await keys.generate(project.project_id, [thing := named()])
        assert len((await keymanager.status()).leases) == 1
    assert dek.wiped
    assert not lease.live
    with pytest.raises(LeaseExpiredError):
        await keys.unwrap(project.project_id, [(thing, envelope)])
    with pytest.raises(LeaseExpiredError):
        await keys.acquire(project.project_id, Losses())

    async def released() -> bool:
        status = await keymanager.status()
        return not status.leases and status.instances == 0

    await wait_until(released)
    # What was given back does not hold up a revocation.
    async with keymanager.client() as client:
        await client.request("POST", f"/v1/projects/{project.project_id}:revoke", body=RevokeRequest(reason="x"))
    sealed = await keymanager.wait_sealed(project.project_id)
    assert sealed.instances == []


async def test_lease_is_not_granted_anew_before_its_plaintext_is_gone(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    called, may_return = asyncio.Event(), asyncio.Event()
    live_inside: list[bool] = []

    async def slow(loss: KeyLoss) -> dict[str, float]:
        called.set()
        await may_return.wait()
        live_inside.append(lease.live)
        return {}

    async with keymanager.key_client() as keys, keymanager.client() as client:
        lease = await keys.acquire(project.project_id, slow)
        path = f"/v1/projects/{project.project_id}"
        await client.request("POST", f"{path}:revoke", body=RevokeRequest(reason="an incident"))
        await called.wait()
        after = await client.call(Project, "POST", f"{path}:restore")
        assert after.state is KeyState.REVOKED  # not before everybody has answered
        with pytest.raises(RevokedError):
            lease.check()
        # It does not answer in time, is fenced, and the project goes on without it.
        await keymanager.wait_state(project.project_id, KeyState.ACTIVE)
        [revocation] = await keymanager.revocations(project.project_id)
        assert revocation.sealed_after_s is not None
        assert [instance.outcome for instance in revocation.instances] == ["fenced"]
        await asyncio.sleep(keymanager.lease_ttl_s / 2)  # some renewals, all answered "yes"
        assert not lease.live
        may_return.set()
        await wait_until(lambda: lease.live)
    assert live_inside == [False]
