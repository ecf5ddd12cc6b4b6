"""TLS for clients that have none: the bytes go through unchanged, and only to who it should be."""

from __future__ import annotations

import asyncio
import os
import ssl
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from keylake.tls_relay import SOCKET_PORT, TlsRelay, open_postgres_tls
from shared.errors import UnavailableError
from shared.tls import CertificateAuthority, CertificateFiles, client_context, server_context
from shared.wire.pgproto import ErrorResponse
from shared.wire.pgstartup import SSLRequest

pytestmark = pytest.mark.integration

Session = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Pki:
    def __init__(self, directory: Path, address: str = "127.0.0.1") -> None:
        authority = CertificateAuthority()
        directory.mkdir(exist_ok=True)
        self.ca = directory / "ca.crt"
        self.ca.write_bytes(authority.certificate_pem)
        self.files: CertificateFiles = authority.issue_files(directory, "server", ["x.test"], [address])

    @property
    def client(self) -> ssl.SSLContext:
        return client_context(self.ca)


@asynccontextmanager
async def postgres_door(pki: Pki, session: Session, *, answer: bytes = b"S") -> AsyncIterator[int]:
    """The port of a server that answers an SSLRequest with `answer`, then TLS, then `session`."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = SSLRequest().serialize()
            assert await reader.readexactly(len(request)) == request
            writer.write(answer)
            if answer[:1] == b"S":
                await writer.start_tls(server_context(pki.files))
                await session(reader, writer)
        except (ConnectionError, ssl.SSLError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        finally:
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(65536):
        writer.write(chunk)
        await writer.drain()


async def through(relay: TlsRelay, data: bytes, expected_size_bytes: int | None = None) -> bytes:
    reader, writer = await asyncio.open_unix_connection(relay.socket_dir / f".s.PGSQL.{SOCKET_PORT}")
    try:
        sending = asyncio.create_task(send(writer, data))
        if expected_size_bytes is None:
            answer = await reader.read()
        else:
            answer = await reader.readexactly(expected_size_bytes)
        await sending
        return answer
    finally:
        writer.close()
        await writer.wait_closed()


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


async def test_bytes_go_through_unchanged_in_both_directions(tmp_path: Path) -> None:
    pki = Pki(tmp_path / "pki")
    blobs = [os.urandom(size) for size in (1, 100, 3_000_000)]
    async with postgres_door(pki, echo) as port, TlsRelay("127.0.0.1", port, pki.client) as relay:
        answers = await asyncio.gather(*(through(relay, blob, len(blob)) for blob in blobs))
    assert answers == blobs


async def test_the_last_words_of_a_server_arrive(tmp_path: Path) -> None:
    async def say_and_go(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(5) == b"hello"
        writer.write(b"x" * 1_000_000 + b"goodbye")

    pki = Pki(tmp_path / "pki")
    async with postgres_door(pki, say_and_go) as port, TlsRelay("127.0.0.1", port, pki.client) as relay:
        answer = await through(relay, b"hello")
    assert len(answer) == 1_000_007
    assert answer.endswith(b"goodbye")


async def test_the_socket_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    pki = Pki(tmp_path / "pki")
    async with postgres_door(pki, echo) as port:
        async with TlsRelay("127.0.0.1", port, pki.client) as relay:
            directory = relay.socket_dir
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
            reader, writer = await asyncio.open_unix_connection(directory / f".s.PGSQL.{SOCKET_PORT}")
            writer.write(b"still open")
            assert await reader.readexactly(10) == b"still open"
        assert await reader.read() == b""
        writer.close()
        assert not directory.exists()
        with pytest.raises(OSError, match="No such file"):
            await asyncio.open_unix_connection(directory / f".s.PGSQL.{SOCKET_PORT}")


async def refusal(relay: TlsRelay) -> str:
    answer = await through(relay, b"startup packet")
    assert answer[:1] == b"E"
    return ErrorResponse.parse(answer[5:]).message


async def test_another_authority_is_not_trusted_and_hears_nothing(tmp_path: Path) -> None:
    heard = bytearray()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.extend(await reader.read())

    server, client = Pki(tmp_path / "server"), Pki(tmp_path / "client")
    async with postgres_door(server, listen) as port, TlsRelay("127.0.0.1", port, client.client) as relay:
        assert "certificate" in await refusal(relay)
    assert not heard


async def test_a_certificate_for_another_name_is_not_good(tmp_path: Path) -> None:
    pki = Pki(tmp_path / "pki", address="127.0.0.2")
    async with postgres_door(pki, echo) as port, TlsRelay("127.0.0.1", port, pki.client) as relay:
        assert "certificate" in await refusal(relay)


async def test_a_server_without_tls_gets_nothing(tmp_path: Path) -> None:
    pki = Pki(tmp_path / "pki")
    async with postgres_door(pki, echo, answer=b"N") as port, TlsRelay("127.0.0.1", port, pki.client) as relay:
        assert "does not speak TLS" in await refusal(relay)


async def test_what_is_injected_before_tls_is_no_answer(tmp_path: Path) -> None:
    pki = Pki(tmp_path / "pki")
    async with postgres_door(pki, echo, answer=b"S" + b"R\0\0\0\x08\0\0\0\0") as port:
        with pytest.raises(UnavailableError):
            await open_postgres_tls("127.0.0.1", port, pki.client)


async def test_nobody_there(tmp_path: Path, unused_tcp_port: int) -> None:
    pki = Pki(tmp_path / "pki")
    async with TlsRelay("127.0.0.1", unused_tcp_port, pki.client) as relay:
        assert "cannot be reached" in await refusal(relay)
