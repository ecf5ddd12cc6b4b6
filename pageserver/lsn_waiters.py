"""Who waits for which LSN. Lives on one event loop."""

from __future__ import annotations

import asyncio
import heapq
import itertools

from shared.errors import KeyAccessError


class LsnWaiters:
    def __init__(self) -> None:
        self._heap: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    async def wait(self, lsn: int, timeout_s: float) -> None:
        """Returns once `release` got to `lsn`. Raises TimeoutError, or what `fail` was given."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (lsn, next(self._numbers), waiter)
        heapq.heappush(self._heap, entry)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        finally:
            if entry in self._heap:  # timed out or cancelled: a far-off LSN must not pile up waiters for ever
                self._heap.remove(entry)
                heapq.heapify(self._heap)

    def release(self, lsn: int) -> None:
        while self._heap and self._heap[0][0] <= lsn:
            _, _, waiter = heapq.heappop(self._heap)
            if not waiter.done():
                waiter.set_result(None)

    def fail(self, error: KeyAccessError) -> None:
        """Everybody gets an error of that class and text."""
        heap, self._heap = self._heap, []
        for _, _, waiter in heap:
            if not waiter.done():
                waiter.set_exception(type(error)(str(error)))

    def __len__(self) -> int:
        return len(self._heap)
