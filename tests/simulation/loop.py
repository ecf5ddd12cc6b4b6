"""An asyncio event loop in which time is a number, and processes can be killed and stopped between any two steps.

The real code runs on it unchanged: its tasks, timeouts and locks are asyncio's own. When nothing is ready, the clock
jumps to the next timer. Every callback belongs to the process (a context variable) whose task asked for it; those of a
dead process are not run, and those of a stopped one wait until it goes on, as after SIGKILL and SIGSTOP. What belongs
to no process is the world: networks, the database, faults.

The order of everything is a function of the program and of the seed: ready callbacks run first in, first out, and tasks
hash by number rather than by address, because asyncio keeps them in sets.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar, TypeVarTuple

T = TypeVar("T")
_Ts = TypeVarTuple("_Ts")

_EPOCH: Final = datetime(2026, 1, 1, tzinfo=UTC)
_numbers = itertools.count(1)


class StuckError(Exception):
    """Nothing is ready and nothing ever will be."""


class Process:
    """What is killed and stopped as a whole. Its clock ticks at `rate`, beginning anywhere."""

    def __init__(self, name: str, loop: SimulatedLoop, rate: float = 1.0, offset_s: float = 0.0) -> None:
        self.name = name
        self.loop = loop
        self.alive = True
        self.paused = False
        self.backlog: deque[asyncio.Handle] = deque()
        self.tasks: list[asyncio.Task[Any]] = []
        """All of them, so that a dead process's are not collected, which would run their `finally` blocks."""
        self._rate, self._offset_s = rate, offset_s
        self._context = copy_context()
        self._context.run(_current.set, self)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        return self.loop.create_task(work, context=self._context.copy())

    def pause(self) -> None:
        self.paused = True

    def go_on(self) -> None:
        self.paused = False
        self.loop.extend(self.backlog)
        self.backlog.clear()

    def kill(self) -> None:
        self.alive = False

    def bury(self) -> None:
        """When the run is over: what a dead or stopped process left is run to its end, unheard, because a coroutine
        that is merely dropped runs its `finally` blocks whenever the garbage collector likes."""
        self.alive = True
        self.go_on()

    # --- shared.clock.Clock ---

    def monotonic_s(self) -> float:
        return self._offset_s + self.loop.time() * self._rate

    def now(self) -> datetime:
        """Wall clocks of servers are set by NTP: the same everywhere, here."""
        return _EPOCH + timedelta(seconds=self.loop.time())


_current: ContextVar[Process | None] = ContextVar("process", default=None)


def current_process() -> Process:
    process = _current.get()
    assert process is not None, "called outside of any process"
    return process


class _Task(asyncio.Task[Any]):
    def __init__(self, coro: Generator[Any, None, Any] | Coroutine[Any, Any, Any], **options: Any) -> None:
        self._number = next(_numbers)
        super().__init__(coro, **options)
        self._log_destroy_pending = False
        context = options.get("context")
        process = _current.get() if context is None else context.get(_current)
        if process is not None:
            process.tasks.append(self)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class SimulatedLoop(asyncio.BaseEventLoop):
    _ready: deque[asyncio.Handle]  # BaseEventLoop's own, which typeshed does not know

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timers_made = 0
        self.set_task_factory(lambda loop, coro, **options: _Task(coro, loop=loop, **options))

    def time(self) -> float:
        return self._now_s

    def extend(self, handles: deque[asyncio.Handle]) -> None:
        self._ready.extend(handles)

    def world(self, delay_s: float, callback: Any, *arguments: Any) -> asyncio.TimerHandle:
        """Call it outside of every process."""
        return self.call_at(self._now_s + delay_s, callback, *arguments, context=Context())

    def call_at(
        self,
        when: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._timers_made += 1
        heapq.heappush(self._timers, (when, self._timers_made, timer))
        return timer

    def _run_once(self) -> None:
        ready, timers = self._ready, self._timers
        while not ready:
            if not timers:
                raise StuckError
            when_s, _, timer = heapq.heappop(timers)
            if not timer.cancelled():
                self._now_s = max(self._now_s, when_s)
                ready.append(timer)
        handle = ready.popleft()
        if handle.cancelled():
            return
        process: Process | None = handle._context.get(_current)  # type: ignore[attr-defined]
        if process is not None and (process.paused or not process.alive):
            process.backlog.append(handle)
            return
        handle._run()

    def _process_events(self, event_list: object) -> None:
        raise AssertionError("there is no I/O here")

    def _write_to_self(self) -> None:
        raise AssertionError("there are no threads here")
