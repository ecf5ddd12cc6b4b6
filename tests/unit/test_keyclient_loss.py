"""A service that cannot drop its plaintext: it acknowledges nothing and gets no lease before it has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shared import keyclient
from shared.api.keymanager import KeyState, Role
from shared.auth import Service
from shared.ids import ProjectId
from shared.keyclient import KeyClient
from shared.keysession import session_tokens
from shared.lease import KeyLoss
from tests.fixtures.leases import LeaseServer
from tests.fixtures.realm import Realm
from tests.fixtures.waiting import wait_until


class Handler:
    """An `on_loss` that fails for as long as it is told to."""

    def __init__(self) -> None:
        self.fails = True
        self.calls = 0

    async def __call__(self, loss: KeyLoss) -> dict[str, float]:
        self.calls += 1
        if self.fails:
            raise OSError("device or resource busy")
        return {"dropped": 0.25}


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyclient, "_DROP_AGAIN_S", 0.01)


@asynccontextmanager
async def client(directory: Path) -> AsyncIterator[tuple[LeaseServer, KeyClient]]:
    realm = Realm.create(directory)
    leases = LeaseServer(realm)
    async with (
        leases.serving(),
        KeyClient(
            leases.address,
            realm.ca_certificate,
            session_tokens(realm.issuers[Service.PAGESERVER]),
            role=Role.PAGESERVER,
            node_id="pageserver-1",
        ) as keys,
    ):
        yield leases, keys


async def test_a_loss_is_neither_acknowledged_nor_over_before_plaintext_was_dropped(tmp_path: Path) -> None:
    async with client(tmp_path) as (leases, keys):
        project_id, handler = ProjectId.new(), Handler()
        lease = await keys.acquire(project_id, handler)
        await leases.revoke(project_id)
        await wait_until(lambda: handler.calls >= 2)
        assert not leases.acknowledged
        await leases.restore(project_id)
        calls = handler.calls
        await wait_until(lambda: handler.calls >= calls + 3)  # the answer to the renewal has come long since, or comes
        assert not lease.live
        assert not leases.acknowledged
        handler.fails = False
        await wait_until(lambda: lease.live)
        assert leases.acknowledged[Role.PAGESERVER].steps_s == {"dropped": 0.25}


async def test_connections_are_cut_in_the_step_in_which_the_lease_ends(tmp_path: Path) -> None:
    async with client(tmp_path) as (_, keys):
        project_id, handler = ProjectId.new(), Handler()
        cut: list[tuple[bool, int]] = []
        lease = await keys.acquire(project_id, handler, lambda _: cut.append((lease.live, handler.calls)))
        keys._lose(
            keys._held[project_id], KeyLoss(project_id, KeyState.REVOKED, "the KMS said DisabledException", "rev-1")
        )
        assert cut == [(False, 0)]
        handler.fails = False


async def test_a_project_that_was_given_back_meanwhile_is_not_forgotten(tmp_path: Path) -> None:
    async with client(tmp_path) as (leases, keys):
        project_id, handler = ProjectId.new(), Handler()
        await keys.acquire(project_id, handler)
        await leases.revoke(project_id)
        await wait_until(lambda: handler.calls)
        await keys.release(project_id)
        await leases.restore(project_id)
        acquiring = asyncio.create_task(keys.acquire(project_id, Handler()))
        await leases.revoke(project_id)  # it was not given back to the keymanager, which asks again
        calls = handler.calls
        await wait_until(lambda: handler.calls >= calls + 3)
        assert not leases.acknowledged
        assert not acquiring.done()
        leases.states.clear()
        handler.fails = False
        assert (await acquiring).live
        await wait_until(lambda: Role.PAGESERVER in leases.acknowledged)
