"""Receiving over TLS without an object of 256 KiB per message: our own protocols, those of others, asyncio streams."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import Final

from shared.addresses import through_addresses

_ROOM: Final = memoryview(bytearray(256 * 1024))
_ZEROS: Final = memoryview(bytes(len(_ROOM)))

Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]


class Receiver(asyncio.BufferedProtocol):
    """Reads into one buffer that all connections share: the event loop asks for it, fills it and says so, with nothing
    in between.

    With `asyncio.Protocol`, uvloop makes an object of 256 KiB for each read of a TLS connection and shrinks it to what
    has come. In a service the C library fills memory when it is given and when it is taken back (`shared.hardening`):
    512 KiB to write per message, some 20 µs, where all else of a round trip takes 30. Without TLS, a read costs
    0.6 µs more than with `asyncio.Protocol`; uvloop's own buffer, which nobody empties, is not used then, either.
    """

    def get_buffer(self, sizehint: int) -> memoryview:
        return _ROOM

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(_ROOM[:nbytes])
        _ROOM[:nbytes] = _ZEROS[:nbytes]  # nothing of a project stays behind
        self.data_received(data)

    def data_received(self, data: bytes) -> None:
        raise NotImplementedError


class ReceivingFor(Receiver):
    """Between a transport and a protocol that was written for `asyncio.Protocol`, to which all else is left."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self._protocol = protocol

    def data_received(self, data: bytes) -> None:
        self._protocol.data_received(data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._protocol.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.connection_lost(exc)

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received()

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()


async def open_tls_connection(
    host: str, port: int, context: ssl.SSLContext, server_hostname: str, limit: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As `asyncio.open_connection`. Raises OSError, ssl.SSLError."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    streams = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await through_addresses(
        host,
        port,
        lambda address: loop.create_connection(
            lambda: ReceivingFor(streams), address, port, ssl=context, server_hostname=server_hostname
        ),
    )
    return reader, asyncio.StreamWriter(transport, streams, reader, loop)


async def start_tls_server(
    accept: Accept, host: str, port: int, context: ssl.SSLContext, handshake_timeout_s: float, limit: int
) -> asyncio.Server:
    """As `asyncio.start_server`. Raises OSError."""
    loop = asyncio.get_running_loop()

    def accepted() -> ReceivingFor:
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        return ReceivingFor(asyncio.StreamReaderProtocol(reader, accept, loop=loop))

    return await loop.create_server(accepted, host, port, ssl=context, ssl_handshake_timeout=handshake_timeout_s)
