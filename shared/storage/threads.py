"""A sized thread pool for blocking calls, seen from asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def until_ended(call: Future[T]) -> T:
    """Its result, as `asyncio.wrap_future`; but a call that has started is waited for when we are cancelled, too.

    For calls that have plaintext at hand: whoever waits for this to end waits for the thread.
    """
    waiting = asyncio.wrap_future(call)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        call.cancel()  # if it has not started
        while not waiting.done():
            with contextlib.suppress(asyncio.CancelledError):  # again: it changes nothing
                await asyncio.wait([waiting])
        raise


class BlockingPool:
    """At most `threads` calls run at once, the rest wait in order. Not the loop's default executor, which others share.

    Cancelling `run` abandons a call that has started; it ends by itself.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)
        self._closed = False

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Raises RuntimeError after `close`, else what `function` raises."""
        if self._closed:
            raise RuntimeError("object store is closed")
        return await asyncio.wrap_future(self._executor.submit(function, *args, **kwargs))

    async def run_to_end(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `run`, but cancelling does not abandon a call that has started: see `until_ended`."""
        if self._closed:
            raise RuntimeError("object store is closed")
        return await until_ended(self._executor.submit(function, *args, **kwargs))

    async def close(self) -> bool:
        """Wait for running calls. Returns False when somebody else closed it before."""
        if self._closed:
            return False
        self._closed = True
        await asyncio.to_thread(self._executor.shutdown, wait=True)
        return True
