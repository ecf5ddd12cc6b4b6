"""A network that loses, delays, reorders and doubles what it carries, and parts nodes from one another.

Calls (`Network.call`) are single messages each way: any of it may get lost, come late or come twice. Connections
(`Network.connect`) are like TCP: in order and complete, or broken.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from shared.errors import KeylakeError, UnavailableError
from shared.wire.frames import FrameDecoder
from shared.wire.walstream import MAX_FRAME_SIZE_BYTES
from tests.simulation_wal.virtual_time import Process, current_process

T = TypeVar("T")
Find = Callable[[str], Process | None]
"""The process that answers under a name now; None while there is none."""


class Network:
    def __init__(self, rng: random.Random, find: Find) -> None:
        self._rng: Final = rng
        self._find: Final = find
        self.loss = 0.0
        """Probability that a message, or a connection's next piece, is lost."""
        self.doubling = 0.0
        self.slowness = 0.0
        """Probability of a delay that is far longer than usual: how messages get reordered."""
        self._parted: set[tuple[str, str]] = set()

    def part(self, one: str, other: str) -> None:
        """Nothing gets through from `one` to `other`."""
        self._parted.add((one, other))

    def heal(self) -> None:
        self._parted.clear()
        self.loss = self.doubling = self.slowness = 0.0

    def reaches(self, one: str, other: str) -> bool:
        return (one, other) not in self._parted

    def delay_s(self) -> float:
        rng = self._rng
        return rng.uniform(0.0005, 0.004) if rng.random() >= self.slowness else rng.uniform(0.02, 0.8)

    def _gets_through(self, one: str, other: str) -> bool:
        return self.reaches(one, other) and (not self.loss or self._rng.random() >= self.loss)

    async def call(self, caller: str, callee: str, work: Callable[[], Awaitable[T]], timeout_s: float) -> T:
        """The answer of `work`, which runs in the callee's process. Raises UnavailableError, or what it raises."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def deliver() -> None:
            process = self._find(callee)
            if process is None:
                refuse(UnavailableError(f"{callee} does not answer"))
            else:
                process.spawn(serve())

        async def serve() -> None:
            try:
                result = await work()
            except KeylakeError as error:
                if self._gets_through(callee, caller):
                    loop.call_later(self.delay_s(), refuse, error)
                return
            if self._gets_through(callee, caller):
                loop.call_later(self.delay_s(), accept, result)

        def accept(result: T) -> None:
            if not answer.done():
                answer.set_result(result)

        def refuse(error: KeylakeError) -> None:
            if not answer.done():
                answer.set_exception(error)

        for _ in range(2 if self.doubling and self._rng.random() < self.doubling else 1):
            if self._gets_through(caller, callee):
                loop.call_later(self.delay_s(), deliver)
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise UnavailableError(f"{callee} did not answer") from None

    async def connect(self, caller: str, callee: str, serve: Callable[[Connection], Awaitable[None]]) -> Connection:
        """A connection whose other end `serve` has, in the callee's process. Raises UnavailableError."""
        await asyncio.sleep(self.delay_s())
        process = self._find(callee)
        if process is None or not (self.reaches(caller, callee) and self.reaches(callee, caller)):
            raise UnavailableError(f"{callee} cannot be reached")
        here = Connection(self, caller, callee, current_process())
        there = Connection(self, callee, caller, process)
        here.other, there.other = there, here

        async def run() -> None:
            try:
                await serve(there)
            except KeylakeError as error:
                there.failed(error)
            finally:
                await there.close()

        process.spawn(run())
        return here


class Connection:
    """One end. Stands in for `shared.framed_tcp.FramedConnection`."""

    def __init__(self, network: Network, name: str, peer: str, process: Process) -> None:
        self._network = network
        self._name = name
        self._peer = peer
        self._process = process
        self.other: Connection | None = None
        self._decoder = FrameDecoder(MAX_FRAME_SIZE_BYTES)
        self._ready: deque[tuple[int, bytes]] = deque()
        self._changed = asyncio.Event()
        self._ended = False
        self._broken = False
        self._is_aborted = False
        self._error: KeylakeError | None = None
        self._last_s = 0.0

    async def receive(self) -> list[tuple[int, bytes]]:
        while True:
            if self._ready:
                frames = list(self._ready)
                self._ready.clear()
                return frames
            if self._error is not None:
                raise self._error
            if self._broken or not self._process.alive:
                raise UnavailableError("connection lost")
            if self._ended:
                return []
            self._changed.clear()
            await self._changed.wait()

    async def receive_one(self) -> tuple[int, bytes] | None:
        frames = await self.receive()
        if not frames:
            return None
        self._ready.extendleft(reversed(frames[1:]))
        return frames[0]

    async def send(self, data: bytes) -> None:
        if not self._is_open:
            raise UnavailableError("connection lost")
        self._post("data", data)

    @property
    def _is_open(self) -> bool:
        return self._process.alive and not (self._broken or self._is_aborted)

    def write(self, data: bytes) -> None:
        if self._is_open:
            self._post("data", data)

    def failed(self, error: KeylakeError) -> None:
        """Tell the peer, and close."""
        if not (self._broken or self._is_aborted):
            self._post("error", error)

    async def close(self) -> None:
        if not (self._broken or self._is_aborted):
            self._post("end", b"")

    def abort(self) -> None:
        """Whoever does it reads the end of the stream, as from a socket that is closed here; the peer gets an error."""
        self._ended = self._is_aborted = True
        self._changed.set()
        if self.other is not None:
            self.other._break()

    def _break(self) -> None:
        if not self._is_aborted:
            self._broken = True
            self._changed.set()

    def _post(self, what: str, content: bytes | KeylakeError) -> None:
        loop = asyncio.get_running_loop()
        # In order, whatever the delays are; the heap of timers keeps no order among equal times.
        self._last_s = max(self._last_s + 1e-6, loop.time() + self._network.delay_s())
        loop.call_at(self._last_s, self._arrive, what, content)

    def _arrive(self, what: str, content: bytes | KeylakeError) -> None:
        other = self.other
        if other is None or other._broken or other._is_aborted:
            return
        # What a dead process has sent before may still arrive; that it is dead shows afterwards.
        if not self._network._gets_through(self._name, self._peer):
            self._break()
            other._break()
            return
        if isinstance(content, KeylakeError):
            other._error = content
        elif what == "end":
            other._ended = True
        else:
            other._ready.extend(other._decoder.feed(content))
        other._changed.set()
