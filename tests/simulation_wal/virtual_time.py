"""An asyncio event loop whose clock is a number: a sleep costs nothing, and two runs of one seed are the same run.

Processes live in the loop as groups of tasks. Whatever a task starts belongs to its process, so that a crash can end
all of it at once, at whatever await each part of it stands.
"""

from __future__ import annotations

import asyncio
import contextvars
import selectors
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from typing import Any, Final, TypeVar, TypeVarTuple, Unpack

from shared.errors import KeylakeError

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


class Crashed(asyncio.CancelledError):
    """Raised into code of a process that is dead: nothing that it does counts any more."""


class Process:
    """What dies together."""

    def __init__(self, name: str) -> None:
        self.name: Final = name
        self.alive = True
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._context = contextvars.copy_context()
        self._context.run(_current.set, self)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        loop = asyncio.get_running_loop()
        return loop.create_task(work, context=self._context)

    def run(self, work: Callable[..., object], *args: object) -> None:
        """Call it as code of this process."""
        self._context.run(work, *args)

    def adopt(self, task: asyncio.Task[Any]) -> None:
        self._tasks[task] = None
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)

    def check(self) -> None:
        if not self.alive:
            raise Crashed(self.name)

    def kill(self) -> None:
        self.alive = False
        for task in list(self._tasks):
            task.cancel()


_current: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


def current_process() -> Process:
    process = _current.get()
    if process is None:
        raise RuntimeError("this code runs outside of any simulated process")
    return process


class _NoSelector(selectors.BaseSelector):
    """Nothing to wait for but time, which passes at once."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, 0, None)

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        raise KeyError(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return {}

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("the simulation is stuck: everybody waits and no time is set")
        self.now_s += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _NoSelector()
        super().__init__(self._virtual)
        self.defects: list[BaseException] = []
        """Exceptions that no error handling of ours is meant to see."""
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._unexpected)

    def _make_self_pipe(self) -> None:
        """No signals and no threads: nobody has to wake this loop."""

    def _close_self_pipe(self) -> None:
        pass

    def time(self) -> float:
        return self._virtual.now_s

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Arguments]], T], *args: *Arguments
    ) -> asyncio.Future[T]:
        """There are no threads: it runs here, in no time."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _make_task(
        self, _: asyncio.AbstractEventLoop, work: Any, context: contextvars.Context | None = None
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=self, context=context)
        process = _current.get() if context is None else context.get(_current)
        if process is not None:
            process.adopt(task)
        task.add_done_callback(self._look)
        return task

    def _look(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._note(error)

    def _note(self, error: BaseException) -> None:
        if isinstance(error, BaseExceptionGroup):
            for each in error.exceptions:
                self._note(each)
        elif not isinstance(error, (KeylakeError, asyncio.CancelledError, TimeoutError)):
            self.defects.append(error)

    def raise_defects(self) -> None:
        """The first one, if there was any."""
        if self.defects:
            raise self.defects[0]

    def _unexpected(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is not None:
            self._note(error)
