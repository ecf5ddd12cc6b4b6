"""Connections that say whatever a test wants."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from shared.auth import Service
from shared.config import Address
from shared.tls import client_context, service_host_name
from shared.wire.frames import ERROR, HELLO, HELLO_OK, ErrorFrame, FrameDecoder, pack_frame
from tests.cluster_bad_input.place import CANARY, Place

PATIENCE_S = 15.0
_LONGEST = 8 << 20


class Wire:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        with suppress(OSError, ssl.SSLError):  # it may have been closed already, and that is what we look for
            self._writer.write(data)
            await self._writer.drain()

    def finish(self) -> None:
        """Nothing more comes from us."""
        if self._writer.can_write_eof():
            self._writer.write_eof()

    async def some(self) -> bytes:
        """What comes next; empty at the end."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                return await self._reader.read(1 << 16)
            except (OSError, ssl.SSLError):
                return b""

    async def rest(self) -> bytes:
        """Everything until the other end closes, which it must."""
        parts = []
        while data := await self.some():
            parts.append(data)
        said = b"".join(parts)
        assert CANARY.encode() not in said
        return said

    def abort(self) -> None:
        self._writer.transport.abort()


@asynccontextmanager
async def plain(address: Address) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection(address.host, address.port)
    wire = Wire(reader, writer)
    try:
        yield wire
    finally:
        wire.abort()


@asynccontextmanager
async def over_tls(address: Address, context: ssl.SSLContext, host: str) -> AsyncIterator[Wire]:
    """Raises ssl.SSLError, OSError when the handshake fails."""
    reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context, server_hostname=host)
    wire = Wire(reader, writer)
    try:
        yield wire
    finally:
        wire.abort()


def careless_context() -> ssl.SSLContext:
    """Trusts everybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@asynccontextmanager
async def framed(place: Place, service: Service, address: Address, token: str | None = None) -> AsyncIterator[Wire]:
    """A framed port; after HELLO when a token is given."""
    host = service_host_name(service.value)
    async with over_tls(address, client_context(place.ca_certificate), host) as wire:
        if token is not None:
            await wire.send(pack_frame(HELLO, token.encode()))
            assert frames_in(await wire.some()) == [(HELLO_OK, b"")]
        yield wire


def frames_in(data: bytes) -> list[tuple[int, bytes]]:
    return FrameDecoder(_LONGEST).feed(data)


def errors_in(data: bytes) -> list[str]:
    """Codes of the ERROR frames."""
    return [ErrorFrame.parse(payload).code for kind, payload in frames_in(data) if kind == ERROR]
