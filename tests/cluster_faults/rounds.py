"""One round of faults: the customers' noes in the middle of them, and everything back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Final

from shared.api.keymanager import KeyState, WorstCase
from shared.errors import KeylakeError
from tests.cluster_faults.place import Place, Tenant
from tests.cluster_faults.schedule import Condition, Event, Part, Round
from tests.cluster_faults.troubles import Trouble, somebody_unheard, troubles
from tests.fixtures.waiting import wait_until

AFTERMATH_S: Final = 0.7
"""How long is looked for late answers, after everybody who was cut off or stopped is back."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What became of one event in one round."""

    event: Event
    last_answer_after_s: float
    bound_s: float
    state: KeyState


async def play(place: Place, each: Round, tenants: Sequence[Tenant]) -> list[Measured]:
    """Faults, the customers' noes, and everything back. `tenants`: one for each event, at work and well.

    Raises AssertionError for what must not be.
    """
    for tenant in tenants:
        await tenant.works(monotonic())
    begun = monotonic()
    pairs = list(zip(tenants, each.events, strict=True))
    bounds = {tenant.name: _bound_s(tenant.bound(event), each.conditions) for tenant, event in pairs}
    faults = await troubles(place, each.conditions, tenants)
    try:
        said_no = await _take_away(place, each, pairs, faults, bounds)
        await asyncio.sleep(AFTERMATH_S)
        # Whatever the bound allows: when it is sealed, and everybody has woken up, nothing comes any more.
        states, settled = [await tenant.state() for tenant in tenants], monotonic()
        await asyncio.sleep(AFTERMATH_S)
        for tenant in tenants:
            late = [what for at, what in tenant.history.answers if at > settled]
            assert not late, f"{each}: {tenant.name} still gets answers: {late}"
            assert not [at for at in tenant.commits() if at > settled], f"{each}: {tenant.name} still commits"
        measured = _measure(each, pairs, states, bounds, begun)
    finally:
        for tenant, event in pairs:
            if tenant.history.is_no:
                tenant.history.will_say_yes(monotonic())
                await tenant.say_yes(event)
    restored = monotonic()
    for tenant in tenants:
        try:
            await tenant.works(restored)
        except TimeoutError:
            ways = dict(tenant.history.ways_since(restored))
            raise AssertionError(
                f"{each}: {tenant.name} does not come back: state {await tenant.state()}, ways {ways}, "
                f"errors {tenant.errors[-3:]} {tenant.ledger.errors[-2:]}"
            ) from None
    _print_round(each, measured, said_no - begun, restored - said_no, monotonic() - restored)
    return measured


async def _take_away(
    place: Place,
    each: Round,
    pairs: Sequence[tuple[Tenant, Event]],
    faults: Sequence[Trouble],
    bounds: Mapping[str, float],
) -> float:
    """From the first trouble until everybody is back, with the keys gone. Returns when the customers had said no."""
    try:
        await asyncio.gather(*(trouble.prepare() for trouble in faults))
        async with somebody_unheard(place.cluster, each):
            await asyncio.gather(*(trouble.before() for trouble in faults))
            await asyncio.gather(*(_say_no(tenant, event, bounds[tenant.name]) for tenant, event in pairs))
            said_no = monotonic()
            await asyncio.gather(*(trouble.after_no() for trouble in faults))
            tenants = [tenant for tenant, _ in pairs]
            begun = partial(_in_fan_out, tenants, each.kills)
            await eventually(begun, f"{each}: no project is touched, or nothing was left of the fan-out")
            await asyncio.gather(*(trouble.in_fan_out() for trouble in faults))
        for tenant, event in pairs:
            await eventually(partial(is_over, tenant, event), f"{each}: {tenant.name} is not sealed after {event}")
    finally:
        # Who was cut off or asleep is back: the moment for late answers.
        await asyncio.gather(*(trouble.end() for trouble in faults))
        await place.cluster.heal()
    return said_no


def _measure(
    each: Round,
    pairs: Sequence[tuple[Tenant, Event]],
    states: Sequence[KeyState],
    bounds: Mapping[str, float],
    begun: float,
) -> list[Measured]:
    measured = []
    for (tenant, event), state in zip(pairs, states, strict=True):
        violations = tenant.history.violations(tenant.commits())
        assert not violations, f"{each}: {tenant.name}: {violations[:3]}"
        assert state in event.ends_in, f"{each}: {tenant.name} is {state} after {event}"
        assert "proxy-2" in tenant.history.ways_since(begun - 5.0), "somebody must have read before"
        tenant.check_errors(begun)
        last = tenant.history.last_answer_after_s(tenant.commits())
        measured.append(Measured(event, last, bounds[tenant.name], state))
    return measured


async def _say_no(tenant: Tenant, event: Event, bound_s: float) -> None:
    await tenant.say_no(event)
    tenant.history.said_no(monotonic(), bound_s)


def _print_round(each: Round, measured: Sequence[Measured], before_s: float, no_s: float, back_s: float) -> None:
    """Into the captured output: pytest shows it with a failure, or with -s."""
    print(f"{each} ({before_s:.1f} s, {no_s:.1f} s, back in {back_s:.1f} s)")  # noqa: T201
    for one in measured:
        print(f"  {one.event:9} last answer {one.last_answer_after_s:6.3f} s, bound {one.bound_s:6.3f} s, {one.state}")  # noqa: T201


def _bound_s(case: WorstCase, conditions: Mapping[Part, Condition]) -> float:
    if conditions[Part.KEYMANAGER] is not Condition.REACHABLE:
        bound_s = case.keymanager_stalled_s
    elif set(conditions.values()) != {Condition.REACHABLE}:
        bound_s = case.partitioned_s
    else:
        bound_s = case.reachable_s
    assert bound_s is not None
    return bound_s


async def _in_fan_out(tenants: Sequence[Tenant], is_under_way: bool) -> bool:
    """Of a project, or more. `is_under_way`: and somebody has not acknowledged it yet."""
    for tenant in tenants:
        if await tenant.state() is not KeyState.ACTIVE and (not is_under_way or await tenant.unsealed()):
            return True
    return False


async def is_over(tenant: Tenant, event: Event) -> bool:
    return await tenant.state() in event.ends_in and not await tenant.unsealed()


async def eventually(condition: Callable[[], Awaitable[bool]], otherwise: str) -> None:
    async def look() -> bool:
        try:
            return await condition()
        except KeylakeError:
            return False  # the keymanagers are changing places

    try:
        await wait_until(look, 45.0)
    except TimeoutError:
        raise AssertionError(otherwise) from None
