"""TLS for a Postgres client that has none: a private Unix socket here, the same bytes over verified TLS to the server.

The psql of the wheel is built without OpenSSL, and the proxy rightly takes no password in the clear. So `keylake psql`
gives psql a socket in a directory that only its user can enter, for as long as psql runs, and speaks TLS for it:

    psql ──Unix socket, mode 0700──► TlsRelay ──SSLRequest, 'S', TLS 1.3, certificate verified──► proxy

The relay does not look into what it passes on; a cancel request is a connection like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import tempfile
from pathlib import Path
from typing import Final, Self

from shared.errors import UnavailableError
from shared.wire.pgproto import ErrorResponse
from shared.wire.pgstartup import SSLRequest

SOCKET_PORT: Final = 5432
"""What a client passes as port: it is a part of the socket's name."""
_CONNECT_TIMEOUT_S: Final = 10.0
_CHUNK_SIZE_BYTES: Final = 256 * 1024
_CLOSE_TIMEOUT_S: Final = 2.0


async def open_postgres_tls(
    host: str, port: int, context: ssl.SSLContext
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to a Postgres server on which TLS is up and the certificate is verified for `host`; nothing else was
    said yet.

    Raises UnavailableError: not reachable, no TLS, or not who it should be.
    """
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            return await _open(host, port, context)
    except ssl.SSLCertVerificationError as error:
        raise UnavailableError(f"the server's certificate is not good: {error.verify_message}") from None
    except TimeoutError:
        raise UnavailableError("the server does not answer") from None
    except OSError as error:
        raise UnavailableError(f"the server cannot be reached: {error.strerror or type(error).__name__}") from None


async def _open(host: str, port: int, context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    connection = socket.socket(family, kind, protocol)
    try:
        connection.setblocking(False)
        await loop.sock_connect(connection, address)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_sendall(connection, SSLRequest().serialize())
        # One byte and no more: what somebody puts behind it must be taken for TLS, and fail (CVE-2021-23222).
        if await loop.sock_recv(connection, 1) != b"S":
            raise UnavailableError("the server does not speak TLS")
        return await asyncio.open_connection(sock=connection, ssl=context, server_hostname=host)
    except BaseException:
        connection.close()
        raise


class TlsRelay:
    """Use as an async context manager; leaving ends every connection and removes the socket."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext) -> None:
        self._host = host
        self._port = port
        self._context = context
        self._directory: Path | None = None
        self._server: asyncio.Server | None = None
        self._sessions: set[asyncio.Task[None]] = set()

    @property
    def socket_dir(self) -> Path:
        """What a client passes as host."""
        if self._directory is None:
            raise UnavailableError("the relay is not open")
        return self._directory

    async def __aenter__(self) -> Self:
        # In /tmp whatever TMPDIR says: a socket's path has 107 bytes at most. Mode 0700.
        self._directory = Path(tempfile.mkdtemp(prefix="kl-psql-", dir="/tmp"))
        try:
            path = self._directory / f".s.PGSQL.{SOCKET_PORT}"
            self._server = await asyncio.start_unix_server(self._accept, path, limit=_CHUNK_SIZE_BYTES)
        except BaseException:
            shutil.rmtree(self._directory)
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._server is not None:
            self._server.close()
        for session in tuple(self._sessions):
            session.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: asyncio would report its cancellation as an error.
        task = asyncio.create_task(self._session(reader, writer))
        self._sessions.add(task)
        task.add_done_callback(self._sessions.discard)

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._relay(reader, writer)
        finally:
            await _close(writer)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Before we connect: a server is not bothered for a client that says nothing, and an answer to a client that
        # has not been read yet would be lost with the connection.
        if not (first := await reader.read(_CHUNK_SIZE_BYTES)):
            return
        try:
            server_reader, server_writer = await open_postgres_tls(self._host, self._port, self._context)
        except UnavailableError as error:
            writer.write(_fatal(str(error)))
            return
        try:
            server_writer.write(first)
            directions = (
                asyncio.create_task(_copy(reader, server_writer)),
                asyncio.create_task(_copy(server_reader, writer)),
            )
            try:
                await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for direction in directions:
                    direction.cancel()
                await asyncio.gather(*directions, return_exceptions=True)
        finally:
            await _close(server_writer)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until either end is gone."""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while chunk := await reader.read(_CHUNK_SIZE_BYTES):
            writer.write(chunk)
            await writer.drain()


async def _close(writer: asyncio.StreamWriter) -> None:
    """What was written still goes out, unless the other end does not take it."""
    writer.close()
    with contextlib.suppress(ConnectionError, ssl.SSLError, TimeoutError):
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await writer.wait_closed()


def _fatal(message: str) -> bytes:
    """What a server says that takes no connection; sqlclient_unable_to_establish_sqlconnection."""
    return ErrorResponse.of("FATAL", "08001", message).serialize()
