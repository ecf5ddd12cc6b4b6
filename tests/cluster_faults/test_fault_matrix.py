"""Every part in every trouble while customers take their keys away in every way: nothing is served after the computed
bound, nothing that was acknowledged is lost, and whoever keeps their key notices nothing at all.

`make test` plays the rounds in which a keymanager is there all the time, and one in which it is killed, alone; `make
fault-matrix` all of the covering set, in which it is cut off, stopped and killed while others are in trouble, too, and
with FAULTS=full the whole product (KEYLAKE_FAULT_MATRIX says which). These need a machine that has little else to do:
that the bystander notices nothing takes a takeover within a lease.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from time import monotonic

import pytest
import pytest_asyncio

from customercloud.faults import KeyFaults
from shared.api.keymanager import KeyState
from tests.cluster_faults.place import (
    BYSTANDER_GRACE_S,
    BYSTANDERS_WAY,
    LEASE_TTL_S,
    Place,
    Tenant,
    new_tenant,
    open_place,
)
from tests.cluster_faults.rounds import eventually, is_over, play
from tests.cluster_faults.schedule import COVERING, TAKEOVER, WORKSPACES, Condition, Event, Part, Round, full

ROUNDS = {
    "": [*(each for each in COVERING if each.conditions[Part.KEYMANAGER] is Condition.REACHABLE), TAKEOVER],
    "covering": COVERING,
    "full": list(full()),
}[os.environ.get("KEYLAKE_FAULT_MATRIX", "")]
pytestmark = [pytest.mark.integration, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Place]:
    async with open_place() as place:
        yield place


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bystander(place: Place) -> AsyncIterator[Tenant]:
    """Keeps its key, which its KMS gives no answer about each fifth time: within the grace that is nothing, and a new
    leader has its first yes long before a lease is over. By a manager and a proxy that nothing happens to."""
    async with new_tenant(place, "bystander", grace_s=BYSTANDER_GRACE_S, ways=[BYSTANDERS_WAY]) as tenant:
        await place.fault(tenant.key_arn, KeyFaults(error_rate=0.2))
        yield tenant
        await tenant.check()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tenants(place: Place, bystander: Tenant) -> AsyncIterator[list[Tenant]]:
    """The first one is a project of the bystander's workspace, under a key of its own."""
    async with AsyncExitStack() as stack:

        async def make(number: int) -> Tenant:
            within = bystander.project.project.workspace_id if number == 0 else None
            context = new_tenant(place, f"t{number}", grace_s=0.0, ways=["proxy", "proxy-2"], within=within)
            return await stack.enter_async_context(context)

        yield await asyncio.gather(*map(make, range(WORKSPACES)))


@pytest.mark.parametrize("each", ROUNDS, ids=str)
async def test_nothing_leaves_after_the_bound(
    place: Place, bystander: Tenant, tenants: list[Tenant], each: Round
) -> None:
    begun, committed = monotonic(), len(bystander.ledger.acknowledged)
    losing = tenants[: len(each.events)]
    await play(place, each, losing)
    for tenant in losing:
        await tenant.check()
        await tenant.open_bank()
    assert not bystander.ledger.errors_since(begun)
    assert len(bystander.ledger.acknowledged) > committed
    assert await bystander.state() is KeyState.ACTIVE


async def test_who_is_cut_off_from_what_a_commit_does_not_need(
    place: Place, bystander: Tenant, tenants: list[Tenant]
) -> None:
    """The keymanagers from the KMS, the manager from everybody, the pageserver from the safekeepers, for longer than a
    lease. Who has no grace is suspended within the bound, and comes back by itself; who has one notices nothing."""
    cluster, begun, committed = place.cluster, monotonic(), len(bystander.ledger.acknowledged)
    try:
        for keymanager in cluster.ports.keymanagers:
            await cluster.partition(keymanager, "customercloud")
        for tenant in tenants:
            bound_s = tenant.bound(Event.TIMEOUT).partitioned_s
            assert bound_s is not None
            tenant.history.said_no(monotonic(), bound_s)
        for safekeeper in ("safekeeper-1", "safekeeper-2", "safekeeper-3"):
            await cluster.partition("compute", safekeeper)
            await cluster.partition("pageserver", safekeeper)
        for other in ("pageserver", "metadata", "proxy"):
            await cluster.partition("compute", other)
        cut = monotonic()
        for tenant in tenants:
            await eventually(partial(is_over, tenant, Event.TIMEOUT), f"{tenant.name} is not suspended")
        await asyncio.sleep(max(0.0, cut + LEASE_TTL_S + 1.0 - monotonic()))
        for tenant in tenants:
            assert not tenant.history.violations(tenant.commits())
    finally:
        for tenant in tenants:
            tenant.history.will_say_yes(monotonic())
        await cluster.heal()
    healed = monotonic()
    for tenant in tenants:
        await tenant.works(healed)
    assert not bystander.ledger.errors_since(begun)
    assert len(bystander.ledger.acknowledged) > committed
