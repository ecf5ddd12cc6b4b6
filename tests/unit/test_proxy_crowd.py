"""Places to shake hands: no address takes them all, none is refused for another one's sake, and none is lost."""

from __future__ import annotations

import asyncio
import random
from ipaddress import ip_address

import pytest

from compute.proxy.crowd import Crowd
from compute.proxy.proxy_protocol import Peer
from shared.errors import OverloadedError


class Visitor:
    """A client that has a place from when it gets one until it is told to go."""

    def __init__(self, crowd: Crowd, address: str) -> None:
        self._crowd = crowd
        self._peer = Peer(ip_address(address), 1)
        self._over = asyncio.Event()
        self.inside = False
        self.task = asyncio.create_task(self._visit())

    async def _visit(self) -> None:
        async with self._crowd.place_for(self._peer):
            self.inside = True
            try:
                await self._over.wait()
            finally:
                self.inside = False

    async def go(self) -> None:
        self._over.set()
        await self.task
        await settle()

    @property
    def refused(self) -> bool:
        return self.task.done() and isinstance(self.task.exception(), OverloadedError)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def come(crowd: Crowd, address: str, count: int = 1) -> list[Visitor]:
    visitors = [Visitor(crowd, address) for _ in range(count)]
    await settle()
    return visitors


def inside(visitors: list[Visitor]) -> list[int]:
    return [number for number, each in enumerate(visitors) if each.inside]


async def end(*visitors: Visitor) -> None:
    for each in visitors:
        each.task.cancel()
    await asyncio.gather(*(each.task for each in visitors), return_exceptions=True)


async def test_one_address_has_its_places_and_waits_behind_nobody_else() -> None:
    crowd = Crowd(places=5, places_of_one=2, waiting=100)
    many = await come(crowd, "192.0.2.1", 50)
    assert inside(many) == [0, 1]
    [other] = await come(crowd, "192.0.2.2")
    assert other.inside
    await many[0].go()
    assert inside(many) == [1, 2], "who came first is served first"
    assert crowd.present == 3
    await end(*many, other)
    assert crowd.present == 0


async def test_free_places_go_round_the_addresses() -> None:
    crowd = Crowd(places=2, places_of_one=2, waiting=100)
    first = await come(crowd, "192.0.2.1", 6)
    second = await come(crowd, "192.0.2.2", 2)
    third = await come(crowd, "192.0.2.3", 1)
    await first[0].go()
    await first[1].go()
    assert (inside(first), inside(second), inside(third)) == ([2], [0], [])
    await first[2].go()
    assert (inside(first), inside(second), inside(third)) == ([], [0], [0])
    await end(*first, *second, *third)


async def test_when_too_many_wait_who_has_most_of_them_is_refused() -> None:
    crowd = Crowd(places=1, places_of_one=1, waiting=4)
    loud = await come(crowd, "2001:db8:0:1::1", 3) + await come(crowd, "2001:db8:0:1:ffff::2", 2)  # one /64
    assert [each.refused for each in loud] == [False] * 5
    [one_more] = await come(crowd, "2001:db8:0:1::3")
    assert one_more.refused
    quiet = await come(crowd, "2001:db8:0:2::1", 2)
    assert [each.refused for each in quiet] == [False, False]
    assert [each.refused for each in loud] == [False, False, False, True, True], "the last that came go first"
    [one_more] = await come(crowd, "2001:db8:0:2::1")
    assert one_more.refused, "both have as many"
    await loud[0].go()
    assert inside(loud) == [1]
    await loud[1].go()
    assert inside(quiet) == [0]
    await end(*loud, *quiet, one_more)
    assert crowd.present == 0


async def test_where_nobody_may_wait_more_are_refused() -> None:
    crowd = Crowd(places=2, places_of_one=1, waiting=0)
    first, second = await come(crowd, "192.0.2.1", 2)
    assert (first.inside, second.refused) == (True, True)
    await end(first)


@pytest.mark.parametrize("seed", range(20))
async def test_no_place_is_lost_whoever_gives_up_when(seed: int) -> None:
    """Clients come, go, and are cut off while they wait, also in the moment in which they get their place."""
    luck = random.Random(seed)
    crowd = Crowd(places=4, places_of_one=2, waiting=6)
    here: list[Visitor] = []
    for _ in range(300):
        match luck.randrange(4):
            case 0 | 1:
                here.append(Visitor(crowd, f"192.0.2.{luck.randrange(4)}"))
            case 2 if here:
                luck.choice(here)._over.set()
            case 3 if here:
                luck.choice(here).task.cancel()
        if luck.randrange(3):
            await asyncio.sleep(0)
        here = [each for each in here if not each.task.done() or not (each.task.cancelled() or each.refused)]
        assert sum(each.inside for each in here) <= crowd.present <= 4
    await end(*here)
    assert crowd.present == 0
    anew = await come(crowd, "192.0.2.1", 4) + await come(crowd, "192.0.2.2", 4) + await come(crowd, "192.0.2.3", 2)
    assert inside(anew) == [0, 1, 4, 5], "all places are there"
    assert not any(each.refused for each in anew), "and all that may wait"
    await end(*anew)
