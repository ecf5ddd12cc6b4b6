"""The network between processes: late, cut, and in order only within one connection.

A connection is TCP's: what is sent while the link is cut arrives after it was mended, or the connection breaks and
what was under way on it is lost. A process that dies breaks its connections, as its kernel would; one that is stopped
keeps them.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, ConnectionClosedOK
from websockets.frames import Close

from tests.simulation.loop import Process, SimulatedLoop

_ORDERLY = (1000, 1001)


class Network:
    """Also the way to the database and to KMSes: whoever is named can be cut off."""

    def __init__(self, loop: SimulatedLoop, rng: random.Random) -> None:
        self.loop = loop
        self._rng = rng
        self._cut: set[frozenset[str]] = set()
        self._held: list[tuple[frozenset[str], Callable[[], None]]] = []
        self.slow = 1.0

    def cut(self, a: str, b: str) -> None:
        self._cut.add(frozenset((a, b)))

    def mend(self) -> None:
        self._cut.clear()
        held, self._held = self._held, []
        for _, deliver in held:  # TCP repeats at its own pace
            self.loop.world(self._rng.uniform(0.0, 1.0), deliver)

    def is_cut(self, a: str, b: str) -> bool:
        return frozenset((a, b)) in self._cut

    def latency_s(self) -> float:
        common = self._rng.uniform(0.0003, 0.004)
        if self._rng.random() < 0.06:
            common += self._rng.expovariate(1 / 0.15)
        return common * self.slow

    def send(self, a: str, b: str, deliver: Callable[[], None]) -> None:
        """It arrives some time; while the link is cut, it does not."""

        def arrive() -> None:
            if self.is_cut(a, b):
                self._held.append((frozenset((a, b)), deliver))
            else:
                deliver()

        self.loop.world(self.latency_s(), arrive)


class _End:
    """Where one side reads."""

    def __init__(self) -> None:
        self.inbox: deque[str] = deque()
        self.closed: tuple[int, str] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._sent = 0
        self._arrived: dict[int, Callable[[], None]] = {}
        self._next = 1

    def in_order(self, deliver: Callable[[], None]) -> Callable[[], None]:
        """What is to happen when this packet arrives: in the order of sending, however late another one is."""
        self._sent += 1
        number = self._sent

        def arrive() -> None:
            self._arrived[number] = deliver
            while self._next in self._arrived:
                self._next += 1
                self._arrived.pop(self._next - 1)()

        return arrive

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def take_in(self, text: str) -> None:
        if self.closed is None:
            self.inbox.append(text)
            self._wake()

    def close(self, code: int, reason: str) -> None:
        if self.closed is None:
            self.closed = code, reason
            self._wake()

    async def next(self) -> str | None:
        """None: closed."""
        while not self.inbox:
            if self.closed is not None:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.inbox.popleft()


class SimulatedConnection:
    """Both sides of a WebSocket."""

    def __init__(self, network: Network, client: Process, server: Process) -> None:
        self._network = network
        self.client_process, self.server_process = client, server
        self.client_end, self.server_end = _End(), _End()

    def to_server(self, deliver: Callable[[], None]) -> None:
        arrive = self.server_end.in_order(deliver)
        self._network.send(self.client_process.name, self.server_process.name, arrive)

    def to_client(self, deliver: Callable[[], None]) -> None:
        arrive = self.client_end.in_order(deliver)
        self._network.send(self.server_process.name, self.client_process.name, arrive)

    def broken(self) -> None:
        """Reset by the network: each side notices when its kernel does."""
        self._network.loop.world(self._network.latency_s(), self.client_end.close, 1006, "")
        self._network.loop.world(self._network.latency_s(), self.server_end.close, 1006, "")

    def died(self, process: Process) -> None:
        """The kernel closes the sockets of a process that is gone."""
        if process is self.client_process:
            self.server_gone()
        else:
            self.client_gone()

    def server_gone(self) -> None:
        self.to_server(lambda: self.server_end.close(1006, ""))

    def client_gone(self) -> None:
        self.to_client(lambda: self.client_end.close(1006, ""))


class ClientSide:
    """`shared.keysession.Connection`."""

    def __init__(self, connection: SimulatedConnection) -> None:
        self._connection = connection

    @property
    def transport(self) -> ClientSide:
        return self

    def abort(self) -> None:
        self._connection.client_end.close(1006, "")
        self._connection.server_gone()

    def _closed(self) -> ConnectionClosed:
        code, reason = self._connection.client_end.closed or (1006, "")
        if code == 1006:
            return ConnectionClosedError(None, None)
        kind = ConnectionClosedOK if code in _ORDERLY else ConnectionClosedError
        return kind(Close(code, reason), None)

    async def send(self, message: str, /) -> None:
        if self._connection.client_end.closed is not None:
            raise self._closed()
        self._connection.to_server(lambda: self._connection.server_end.take_in(message))

    async def recv(self) -> str | bytes:
        text = await self._connection.client_end.next()
        if text is None:
            raise self._closed()
        return text

    async def __aiter__(self) -> AsyncIterator[str | bytes]:
        try:
            while True:
                yield await self.recv()
        except ConnectionClosedOK:
            return

    async def close(self) -> None:
        self._connection.client_end.close(1000, "")
        self._connection.to_server(lambda: self._connection.server_end.close(1000, ""))


class ServerSide:
    """What `keymanager.session` uses of Starlette's WebSocket. `leaves` is told of every message before it leaves."""

    def __init__(self, connection: SimulatedConnection, leaves: Callable[[str], None]) -> None:
        self._connection = connection
        self._leaves = leaves

    async def receive(self) -> dict[str, Any]:
        text = await self._connection.server_end.next()
        if text is None:
            code, _ = self._connection.server_end.closed or (1006, "")
            return {"type": "websocket.disconnect", "code": code}
        return {"type": "websocket.receive", "text": text}

    async def send_text(self, text: str) -> None:
        if self._connection.server_end.closed is not None:
            raise WebSocketDisconnect(1006)
        self._leaves(text)
        self._connection.to_client(lambda: self._connection.client_end.take_in(text))

    async def close(self, code: int, reason: str) -> None:
        self._connection.server_end.close(code, reason)
        self._connection.to_client(lambda: self._connection.client_end.close(code, reason))
