"""The fake key source passes the contract, and does what only a fake does."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from shared.api.keymanager import KeyState
from shared.clock import ManualClock
from shared.errors import RevokedError, ShreddedError, SuspendedError, UnavailableError
from shared.ids import ProjectId
from tests.fixtures.key_source_contract import KeySourceContract, Losses, named
from tests.fixtures.keys import InMemoryKeySource


@dataclass
class FakeBench:
    keys: InMemoryKeySource
    project_id: ProjectId
    other_project_id: ProjectId

    async def revoke(self) -> None:
        await self.keys.revoke(self.project_id)

    async def restore(self) -> None:
        await self.keys.restore(self.project_id)

    async def rotate(self) -> None:
        self.keys.rotate(self.project_id)

    async def run_out(self) -> None:
        await self.keys.expire(self.project_id)


@pytest.fixture
def bench() -> FakeBench:
    return FakeBench(InMemoryKeySource(), ProjectId.new(), ProjectId.new())


class TestFake(KeySourceContract):
    pass


async def test_with_a_manual_clock_the_lease_runs_out_when_told() -> None:
    clock, losses, project = ManualClock(), Losses(), ProjectId.new()
    keys = InMemoryKeySource(clock, ttl_s=5)
    lease = await keys.acquire(project, losses)
    clock.advance(4.999)
    await keys.expire_overdue()
    lease.check()
    clock.advance(0.001)
    assert not lease.live
    await keys.expire_overdue()
    await keys.expire_overdue()
    assert len(losses.seen) == 1
    await keys.renew(project)
    lease.check()


async def test_states_raise_their_own_errors_and_shredded_is_for_ever() -> None:
    keys, project = InMemoryKeySource(), ProjectId.new()
    lease = await keys.acquire(project, Losses())
    assert await keys.suspend(project) == {"dropped": 0.25}
    with pytest.raises(SuspendedError):
        lease.check()
    await keys.revoke(project, KeyState.REVOKED)
    with pytest.raises(RevokedError):
        lease.check()
    await keys.shred(project)
    await keys.restore(project)
    with pytest.raises(ShreddedError):
        lease.check()
    assert [a.steps_s for a in keys.acknowledgements] == [{"dropped": 0.25}] * 3


async def test_unavailable_keymanager_still_answers_from_the_cache() -> None:
    keys, project = InMemoryKeySource(cache_capacity=1), ProjectId.new()
    await keys.acquire(project, Losses())
    first, second = named("a"), named("b")
    [(_, evicted), (cached_key, cached)] = await keys.generate(project, [first, second])
    keys.available = False
    assert await keys.unwrap(project, [(second, cached)]) == [cached_key]
    with pytest.raises(UnavailableError):
        await keys.unwrap(project, [(first, evicted)])
    with pytest.raises(UnavailableError):
        await keys.acquire(ProjectId.new(), Losses())
