"""Whoever waits for a collection is told when it has taken their garbage; many who wait share one."""

from __future__ import annotations

import asyncio
import gc
import weakref

from shared.garbage import GarbageCollection


class _Circle:
    def __init__(self) -> None:
        self.itself = self


async def test_projects_that_lose_their_keys_together_share_a_collection() -> None:
    garbage, collections = GarbageCollection(), 0

    def count(phase: str, info: dict[str, int]) -> None:
        nonlocal collections
        collections += phase == "start" and info["generation"] == 2

    async def lose() -> bool:
        lost = weakref.ref(_Circle())
        await garbage.collected()
        return lost() is None

    gc.callbacks.append(count)
    gc.disable()
    try:
        assert all(await asyncio.gather(*(lose() for _ in range(20))))
        assert collections == 1
        assert await lose(), "a later one has a collection of its own"
        assert collections == 2
    finally:
        gc.enable()
        gc.callbacks.remove(count)
