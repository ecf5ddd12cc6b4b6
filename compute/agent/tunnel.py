"""TLS to a compute's Postgres from other hosts: the agent ends TLS and passes the bytes on to the Unix socket.

The wheel's Postgres is built without OpenSSL. So this is a plain TLS listener, not Postgres's SSLRequest: the client
speaks TLS from the first byte and the Postgres protocol inside. The certificate is made at boot, with a key that
never leaves this process, and is *pinned*: whoever connects got it from the manager and trusts no other. Who may do
what is still decided by Postgres's own authentication.

What Postgres says passes the lease: a process tree that was stopped (SIGSTOP) may go on with bytes that wait for us.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from shared.config import Address
from shared.errors import KeyAccessError
from shared.open_files import allow_open_files
from shared.receiver import start_tls_server
from shared.sockets import drop
from shared.tls import CertificateAuthority, server_context

TUNNEL_HOST_NAME: Final = "compute.keylake"
_READ_SIZE_BYTES: Final = 64 * 1024
_HANDSHAKE_TIMEOUT_S: Final = 10.0
_OWN_FILES: Final = 256
"""Descriptors of everything else in this process."""


class Tunnel:
    """Listens while it is entered. `key_dir` must be in memory: the private key passes through it for a moment, because
    OpenSSL's Python API loads keys from files only. `check`: raises KeyAccessError unless data may leave."""

    def __init__(
        self, listen: Address, socket_path: Path, key_dir: Path, max_connections: int, check: Callable[[], None]
    ) -> None:
        self._check = check
        self._listen = listen
        self._socket_path = socket_path
        self._max_connections = max_connections
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.WriteTransport] = {}
        with TemporaryDirectory(dir=key_dir) as directory:
            # Of a CA that signs nothing else and is forgotten at once.
            files = CertificateAuthority().issue_files(Path(directory), "compute", [TUNNEL_HOST_NAME])
            self._context = server_context(files)
            self.certificate_pem = files.certificate.read_text()
        """The one certificate to trust: the listener's own."""

    async def start(self) -> int:
        """The port that it listens on. Raises OSError."""
        allow_open_files(2 * self._max_connections + _OWN_FILES)
        listen = self._listen
        self._server = await start_tls_server(
            self._accept, listen.host, listen.port, self._context, _HANDSHAKE_TIMEOUT_S, _READ_SIZE_BYTES
        )
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Drop every connection: nothing of what waits to be sent leaves when this returns."""
        if self._server is not None:
            self._server.close()
        for task, transport in self._connections.items():
            drop(transport)
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._connections) >= self._max_connections:
            writer.transport.abort()
            return
        self._connections[task] = writer.transport
        task.add_done_callback(self._connections.pop)
        try:
            inner_reader, inner_writer = await asyncio.open_unix_connection(
                str(self._socket_path), limit=_READ_SIZE_BYTES
            )
        except OSError:
            writer.transport.abort()
            return
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_copy(reader, inner_writer, writer.transport.abort))
                group.create_task(_copy(inner_reader, writer, inner_writer.transport.abort, self._check))
        except* KeyAccessError:
            drop(writer.transport)  # the agent's clean-up, which is due, kills Postgres
        finally:
            writer.transport.abort()
            inner_writer.transport.abort()


async def _copy(
    source: asyncio.StreamReader,
    sink: asyncio.StreamWriter,
    at_end: Callable[[], None],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Until the source ends; then the sink gets what is left and is closed, and `at_end` ends the other direction.
    Raises what `check` raises."""
    with contextlib.suppress(OSError, ssl.SSLError):
        while data := await source.read(_READ_SIZE_BYTES):
            check()
            sink.write(data)
            await sink.drain()
        sink.close()
        await sink.wait_closed()
    at_end()


def tunnel_client_context(certificate_pem: str) -> ssl.SSLContext:
    """For clients of the tunnel: trusts exactly this compute. Connect with `server_hostname=TUNNEL_HOST_NAME`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it is pinned itself; whoever signed it does not matter
    context.load_verify_locations(cadata=certificate_pem)
    return context
