"""Collecting what Python's reference counts do not free: one collection for all who wait for one.

It takes tens of milliseconds in a service, during which nothing else happens there, and a customer's key takes many
projects along, each of which has to know that nothing of it is left.
"""

from __future__ import annotations

import asyncio
import gc


class GarbageCollection:
    """One per process and event loop."""

    def __init__(self) -> None:
        self._next: asyncio.Future[None] | None = None

    async def collected(self) -> None:
        """What was garbage before this call is gone."""
        if self._next is None:
            loop = asyncio.get_running_loop()
            self._next = loop.create_future()
            loop.call_soon(self._collect, self._next)
        await asyncio.shield(self._next)

    def _collect(self, waited_for: asyncio.Future[None]) -> None:
        self._next = None
        gc.collect()
        waited_for.set_result(None)
