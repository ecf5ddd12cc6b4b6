"""An object store that misbehaves on order: a wrapper for fault tests.

    store = FaultyObjectStore(MemoryObjectStore())
    store.fail(Operation.PUT, times=2)                        # not done, StoreUnavailableError
    store.fail(Operation.PUT, times=1, moment=Moment.AFTER)   # done, but the reply is lost
    store.delay(Operation.GET, 0.05)
    store.reorder(random.Random(1), 0.01)                     # slow, and in no order, listings too
    hold = store.hold(Operation.DELETE)                       # the next delete waits ...
    await hold.reached.wait(); hold.release.set()             # ... until the test says so

Faults apply in the order in which they were ordered; each applies to the first calls that match it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeVar

from shared.storage.base import Data, ObjectInfo, ObjectStore, StoreUnavailableError

T = TypeVar("T")


class Operation(Enum):
    PUT = auto()
    PUT_IF_ABSENT = auto()
    GET = auto()
    GET_RANGE = auto()
    HEAD = auto()
    LIST = auto()
    DELETE = auto()
    DELETE_MANY = auto()


_CHANGES = frozenset({Operation.PUT, Operation.PUT_IF_ABSENT, Operation.DELETE, Operation.DELETE_MANY})


class Moment(Enum):
    BEFORE = auto()
    """The store is never reached."""
    AFTER = auto()
    """The store has done it; only the reply is lost."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call that reached the wrapper. `key` is the prefix for LIST and the first key for DELETE_MANY."""

    operation: Operation
    key: str


@dataclass(frozen=True, slots=True)
class Hold:
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by the call when it has arrived."""
    release: asyncio.Event = field(default_factory=asyncio.Event)
    """To be set by the test: the call goes on."""


@dataclass(slots=True)
class _Fault:
    operation: Operation
    key_prefix: str
    times_left: int
    moment: Moment
    error: Callable[[], Exception] | None = None
    delay_s: float = 0.0
    hold: Hold | None = None

    def matches(self, call: Call, moment: Moment) -> bool:
        return (
            self.times_left > 0
            and self.moment is moment
            and self.operation is call.operation
            and call.key.startswith(self.key_prefix)
        )


def _unavailable() -> Exception:
    return StoreUnavailableError("object store did not answer (ordered by a test)")


ALWAYS = 1 << 62
"""For `times`: until `heal`."""


class FaultyObjectStore:
    """Closing it closes the inner store."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner
        self._faults: list[_Fault] = []
        self._change: tuple[int, Moment] | None = None
        self._stale: list[ObjectInfo] | None = None
        self._order: tuple[random.Random, float] | None = None
        self.calls: list[Call] = []

    def fail(
        self,
        operation: Operation,
        *,
        times: int = 1,
        key_prefix: str = "",
        moment: Moment = Moment.BEFORE,
        error: Callable[[], Exception] = _unavailable,
    ) -> None:
        """The next `times` matching calls raise `error()`."""
        self._faults.append(_Fault(operation, key_prefix, times, moment, error=error))

    def delay(self, operation: Operation, delay_s: float, *, times: int = ALWAYS, key_prefix: str = "") -> None:
        """The next `times` matching calls start `delay_s` later."""
        self._faults.append(_Fault(operation, key_prefix, times, Moment.BEFORE, delay_s=delay_s))

    def reorder(self, rng: random.Random, at_most_s: float) -> None:
        """From now on, until `heal`, each call starts after a time of its own, and so each of those that are under way
        at once is done before or after any other; and listings are in no order."""
        self._order = rng, at_most_s

    def hold(self, operation: Operation, *, key_prefix: str = "", moment: Moment = Moment.BEFORE) -> Hold:
        """The next matching call waits for `release`, before or after the store does its work."""
        hold = Hold()
        self._faults.append(_Fault(operation, key_prefix, 1, moment, hold=hold))
        return hold

    def fail_nth_change(self, number: int, moment: Moment) -> None:
        """Of the puts and deletes from now on, that many happen; the next one raises, and then all is well again."""
        self._change = (number, moment)

    async def freeze_lists(self) -> None:
        """From now on, until `heal`, every listing shows what is there now: new objects are missing, old ones stay."""
        self._stale = [info async for info in self._inner.list()]

    @property
    def quiet(self) -> bool:
        """Everything that was ordered has happened."""
        return self._change is None and all(fault.times_left == 0 for fault in self._faults)

    def heal(self) -> None:
        """Forget all faults that have not happened yet."""
        self._faults.clear()
        self._change = None
        self._stale = None
        self._order = None

    async def put(self, key: str, data: Data) -> None:
        await self._through(Call(Operation.PUT, key), lambda: self._inner.put(key, data))

    async def put_if_absent(self, key: str, data: Data) -> None:
        await self._through(Call(Operation.PUT_IF_ABSENT, key), lambda: self._inner.put_if_absent(key, data))

    async def get(self, key: str) -> bytes:
        return await self._through(Call(Operation.GET, key), lambda: self._inner.get(key))

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        return await self._through(Call(Operation.GET_RANGE, key), lambda: self._inner.get_range(key, start, end))

    async def head(self, key: str) -> ObjectInfo:
        return await self._through(Call(Operation.HEAD, key), lambda: self._inner.head(key))

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        call = Call(Operation.LIST, prefix)
        self.calls.append(call)
        await self._misbehave(call, Moment.BEFORE)
        if self._stale is not None:
            for info in self._stale:
                if info.key.startswith(prefix):
                    yield info
            return
        if self._order is not None:
            found = [info async for info in self._inner.list(prefix)]
            self._order[0].shuffle(found)
            for info in found:
                yield info
        else:
            async for info in self._inner.list(prefix):
                yield info
        await self._misbehave(call, Moment.AFTER)

    async def delete(self, key: str) -> None:
        await self._through(Call(Operation.DELETE, key), lambda: self._inner.delete(key))

    async def delete_many(self, keys: Iterable[str]) -> None:
        all_keys = tuple(keys)
        call = Call(Operation.DELETE_MANY, next(iter(all_keys), ""))
        await self._through(call, lambda: self._inner.delete_many(all_keys))

    async def close(self) -> None:
        await self._inner.close()

    async def _through(self, call: Call, work: Callable[[], Awaitable[T]]) -> T:
        self.calls.append(call)
        await self._misbehave(call, Moment.BEFORE)
        result = await work()
        await self._misbehave(call, Moment.AFTER)
        return result

    async def _misbehave(self, call: Call, moment: Moment) -> None:
        if self._order is not None and moment is Moment.BEFORE:
            rng, at_most_s = self._order
            await asyncio.sleep(rng.uniform(0, at_most_s))
        if self._change is not None and call.operation in _CHANGES:
            left, when = self._change
            if left == 0 and moment is when:
                self._change = None
                raise _unavailable()
            if left and moment is Moment.AFTER:
                self._change = (left - 1, when)
        for fault in [fault for fault in self._faults if fault.matches(call, moment)]:
            if fault.times_left == 0:
                continue  # used up by another call while this one slept
            fault.times_left -= 1
            if fault.delay_s:
                await asyncio.sleep(fault.delay_s)
            if fault.hold is not None:
                fault.hold.reached.set()
                await fault.hold.release.wait()
            if fault.error is not None:
                raise fault.error()
