"""asyncio shells of the framed TCP protocols: TLS, HELLO with a token, then frames both ways."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable
from typing import Final

from shared.auth import MAX_TOKEN_SIZE_BYTES, Principal, Scope, Service, TokenVerifier
from shared.config import Address
from shared.errors import KeylakeError, UnauthenticatedError, UnavailableError
from shared.receiver import open_tls_connection, start_tls_server
from shared.sockets import drop
from shared.telemetry import get_logger
from shared.tls import service_host_name
from shared.wire.frames import ERROR, HELLO, HELLO_OK, ErrorFrame, FrameDecoder, ProtocolError, pack_frame

HELLO_TIMEOUT_S: Final = 10.0
_READ_SIZE_BYTES: Final = 256 * 1024
WRITE_BUFFER_HIGH_BYTES: Final = 64 * 1024
"""More than that of what was sent waits in the TLS layer only as the end of one `send`. (Transports below it have as
much again.)"""
_log = get_logger(__name__)


def _no_objection() -> None:
    """What is sent may always be sent."""


class FramedConnection:
    """Frames over one TLS stream. One reader at a time; any number may `send`, one after the other, each when what
    came before has left but for WRITE_BUFFER_HIGH_BYTES."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_frame_size_bytes: int) -> None:
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()
        if not writer.is_closing():
            writer.transport.set_write_buffer_limits(high=WRITE_BUFFER_HIGH_BYTES)
        self._decoder = FrameDecoder(max_frame_size_bytes)
        self._ready: list[tuple[int, bytes]] = []

    async def receive(self) -> list[tuple[int, bytes]]:
        """All frames that are here, at least one; empty at end of stream. Raises ProtocolError, UnavailableError."""
        if self._ready:
            frames, self._ready = self._ready, []
            return frames
        while True:
            try:
                data = await self._reader.read(_READ_SIZE_BYTES)
            except (OSError, ssl.SSLError) as error:
                raise UnavailableError(f"connection lost: {type(error).__name__}") from None
            if not data:
                return []
            frames = self._decoder.feed(data)
            if frames:
                return frames

    async def receive_one(self) -> tuple[int, bytes] | None:
        """The next frame; None at end of stream."""
        frames = await self.receive()
        if not frames:
            return None
        self._ready = frames[1:] + self._ready
        return frames[0]

    async def send(self, data: bytes, check: Callable[[], None] = _no_objection) -> None:
        """Write packed frames and wait while the peer reads too slowly. Raises UnavailableError.

        `check` is called when it is this call's turn, with nothing between it and the write: what it raises is raised,
        and nothing is written then.
        """
        async with self._turn:
            if self._writer.is_closing():
                raise UnavailableError("connection lost")
            check()
            try:
                self._writer.write(data)
                await self._writer.drain()
            except (OSError, ssl.SSLError) as error:
                raise UnavailableError(f"connection lost: {type(error).__name__}") from None

    def write(self, data: bytes) -> None:
        """Write without waiting; the caller bounds how much. Into nothing once the connection is closing: whoever
        receives from it finds out. (asyncio's own TLS transport raises AttributeError once it was closed twice.)"""
        if not self._writer.is_closing():
            self._writer.write(data)

    async def close(self) -> None:
        if not self._writer.is_closing():
            self._writer.close()
        with contextlib.suppress(OSError, ssl.SSLError):
            await self._writer.wait_closed()

    def abort(self, farewell: bytes = b"") -> None:
        """Drop the connection now: nothing that waits to be sent leaves after the return of this. `farewell` does if
        nothing waits; a peer that reads too slowly to be told anything is told nothing. Idempotent."""
        transport = self._writer.transport
        if farewell and not transport.is_closing():
            # With nothing before it, what is written goes to the kernel within the call; so does TLS's close_notify.
            self._writer.write(farewell)
            self._writer.close()
        drop(transport)


ConnectionHandler = Callable[[FramedConnection, Principal], Awaitable[None]]


class FramedServer:
    """Listens with TLS, checks the token of HELLO, then hands the connection to `handler`.

    A stranger gets an ERROR frame and is closed; one that says nothing is closed after HELLO_TIMEOUT_S. The handler's
    KeylakeError is sent as an ERROR frame (request id 0) before the connection closes.
    """

    def __init__(
        self,
        listen: Address,
        context: ssl.SSLContext,
        verifier: TokenVerifier,
        scope: Scope,
        max_frame_size_bytes: int,
        handler: ConnectionHandler,
    ) -> None:
        self._listen = listen
        self._context = context
        self._verifier = verifier
        self._scope = scope
        self._max = max_frame_size_bytes
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FramedServer:
        listen = self._listen
        self._server = await start_tls_server(
            self._accept, listen.host, listen.port, self._context, HELLO_TIMEOUT_S, _READ_SIZE_BYTES
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def port(self) -> int:
        """The port that it really listens on."""
        if self._server is None:
            raise RuntimeError("the server was not started")
        return int(self._server.sockets[0].getsockname()[1])

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: asyncio would complain about one of its own that is cancelled.
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._connections.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a connection's handler failed", exc_info=error)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = FramedConnection(reader, writer, self._max)
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                principal = await self._hello(FramedConnection(reader, writer, MAX_TOKEN_SIZE_BYTES + 1))
            await self._handler(connection, principal)
        except TimeoutError:
            connection.abort()
        except KeylakeError as error:
            with contextlib.suppress(KeylakeError):
                await connection.send(ErrorFrame.of(0, error).pack())
        finally:
            await connection.close()

    async def _hello(self, connection: FramedConnection) -> Principal:
        # The client waits for HELLO_OK before it sends anything else, so this decoder holds no bytes when it is
        # dropped.
        frame = await connection.receive_one()
        if frame is None or frame[0] != HELLO:
            raise ProtocolError("the first frame must be HELLO")
        try:
            token = frame[1].decode("ascii")
        except UnicodeDecodeError:
            raise UnauthenticatedError("the token is not valid") from None
        principal = self._verifier.verify(token)
        if self._scope not in principal.scopes:
            principal.require(self._scope)
        await connection.send(pack_frame(HELLO_OK))
        return principal


async def connect(
    service: Service,
    address: Address,
    context: ssl.SSLContext,
    token: str,
    max_frame_size_bytes: int,
    timeout_s: float = 5.0,
) -> FramedConnection:
    """An authenticated connection to a service. Raises UnavailableError, or the error by which the peer refused."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await open_tls_connection(
                address.host, address.port, context, service_host_name(service.value), _READ_SIZE_BYTES
            )
            connection = FramedConnection(reader, writer, max_frame_size_bytes)
            await connection.send(pack_frame(HELLO, token.encode("ascii")))
            answer = await connection.receive_one()
    except (OSError, ssl.SSLError, TimeoutError) as error:
        raise UnavailableError(f"{service.value} cannot be reached: {type(error).__name__}") from None
    if answer is None:
        await connection.close()
        raise UnavailableError(f"{service.value} closed the connection")
    kind, payload = answer
    if kind == HELLO_OK:
        return connection
    await connection.close()
    if kind == ERROR:
        raise ErrorFrame.parse(payload).exception()
    raise ProtocolError(f"{service.value} answered HELLO with frame type {kind:#x}")
