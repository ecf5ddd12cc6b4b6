"""A WebSocket that costs its client little: after the handshake, frames are cut and made by hand, in the callback that
reads. `shared.keysession.Connection`, for 10,000 of them in one process beside the keymanager that is measured.

What goes over the wire is what a service's session sends and gets: TLS, a handshake by the same library, text frames.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final, cast

from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosedError
from websockets.http11 import Response
from websockets.uri import parse_uri

from shared.auth import Service
from shared.config import Address
from shared.errors import UnavailableError
from shared.receiver import Receiver
from shared.tls import service_host_name

_TEXT, _CLOSE = 0x81, 0x88
_TEXT_FRAME: Final = bytes((_TEXT,))
_MASKED, _NO_MASK = 0x80, bytes(4)
"""A client masks what it sends (RFC 6455, 5.3). A mask of zeros leaves it as it is; the server takes it off all the
same."""


class Socket(Receiver):
    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.on_text: Callable[[bytes], None] | None = None
        """Gets each message, in order; None: they wait for `recv`."""
        self.on_end: Callable[[], None] = lambda: None
        self._handshake: ClientProtocol | None = None
        self._upgraded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._rest = b""
        self._texts: deque[bytes] = deque()
        self._came = asyncio.Event()
        self._ended = False

    @classmethod
    async def dial(cls, tls: ssl.SSLContext, address: Address, token: str, timeout_s: float) -> Socket:
        """`shared.keysession.Dial`, but for its first argument."""
        name = service_host_name(Service.KEYMANAGER.value)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(timeout_s):
            _, socket = await loop.create_connection(cls, address.host, address.port, ssl=tls, server_hostname=name)
            await socket.shake_hands(f"wss://{name}/v1/session", token)
        return socket

    async def shake_hands(self, uri: str, token: str) -> None:
        handshake = self._handshake = ClientProtocol(parse_uri(uri))
        request = handshake.connect()
        request.headers["Authorization"] = f"Bearer {token}"
        handshake.send_request(request)
        self.transport.write(b"".join(handshake.data_to_send()))
        await self._upgraded

    # --- asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._handshake is not None:
            self._be_answered(self._handshake, data)
            return
        data = self._rest + data if self._rest else data
        at = 0
        while len(data) - at >= 2:
            kind, size, begin = data[at], data[at + 1], at + 2
            if size >= 126:
                begin += 2 if size == 126 else 8
                size = int.from_bytes(data[at + 2 : begin], "big")
            if len(data) < begin + size:
                break
            self._frame(kind, data[begin : begin + size])
            at = begin + size
        self._rest = data[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    # --- Connection ---

    def write(self, text: str) -> None:
        data = text.encode()
        size = len(data)
        length = bytes((_MASKED | size,)) if size < 126 else bytes((_MASKED | 126,)) + size.to_bytes(2, "big")
        self.transport.write(_TEXT_FRAME + length + _NO_MASK + data)

    async def send(self, message: str, /) -> None:
        if self._ended:
            raise ConnectionClosedError(None, None)
        self.write(message)

    async def recv(self) -> bytes:
        while not self._texts:
            if self._ended:
                raise ConnectionClosedError(None, None)
            self._came.clear()
            await self._came.wait()
        return self._texts.popleft()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield await self.recv()

    async def close(self) -> None:
        self.transport.close()

    def listen(self, on_text: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
        """From now on. What has come by now comes first."""
        self.on_text, self.on_end = on_text, on_end
        while self._texts:
            on_text(self._texts.popleft())
        if self._ended:
            on_end()

    # --- inside ---

    def _be_answered(self, handshake: ClientProtocol, data: bytes) -> None:
        # What follows the response is frames already.
        head, end, rest = (self._rest + data).partition(b"\r\n\r\n")
        if not end:
            self._rest += data
            return
        self._rest, self._handshake = b"", None
        handshake.receive_data(head + end)
        [response] = handshake.events_received()
        if self._upgraded.done():
            return
        if isinstance(response, Response) and handshake.handshake_exc is None:
            self._upgraded.set_result(None)
            if rest:
                self.data_received(rest)
        else:
            self._upgraded.set_exception(UnavailableError(f"no session: {handshake.handshake_exc}"))

    def _frame(self, kind: int, payload: bytes) -> None:
        if kind == _CLOSE:
            self.transport.close()
        elif kind != _TEXT:
            raise RuntimeError(f"the keymanager sent a frame of kind {kind:#x}")
        elif self.on_text is not None:
            self.on_text(payload)
        else:
            self._texts.append(payload)
            self._came.set()

    def _end(self) -> None:
        self._ended = True
        self._came.set()
        if not self._upgraded.done():
            self._upgraded.set_exception(UnavailableError("the connection was closed"))
            self._upgraded.exception()  # retrieved: nobody may be waiting
        self.on_end()
