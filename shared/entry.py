"""What the main function of every process of Keylake begins with. Imports next to nothing: a compute's processes start
while a client waits.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Awaitable, Callable

import uvloop


async def wait_for_shutdown_signal() -> None:
    """Returns at the first SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()


def calm_garbage_collector() -> None:
    """What start-up made stays out of garbage collection for good; the rest is looked at a hundred times less often.

    A service's modules are some 200,000 objects, a pageserver's values millions, all without cycles: a full collection
    over them stops everything for up to 90 ms (5 ms so). What is young is half a million objects at most: with five
    million a keymanager of 10,000 sessions stood still for half a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 5, 1000)


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a service's main coroutine on uvloop."""
    calm_garbage_collector()

    async def _main() -> None:
        await main()

    uvloop.run(_main())
