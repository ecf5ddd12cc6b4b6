"""A compute's tunnel: what it lets out when it is closed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from compute.agent.tunnel import TUNNEL_HOST_NAME, Tunnel, tunnel_client_context
from shared.config import Address
from shared.errors import LeaseExpiredError
from tests.fixtures.sockets import LOOP_NAMES, LOOPS, rest_of, take_all
from tests.fixtures.waiting import wait_until

ROWS = b"plaintext of rows, " * 4096


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A Postgres that has more to say than anybody takes."""
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(ROWS)
            await writer.drain()


@pytest.mark.parametrize("run", LOOPS, ids=LOOP_NAMES)
def test_what_waits_for_a_slow_client_stays_here(
    run: Callable[[Coroutine[Any, Any, None]], None], tmp_path: Path
) -> None:
    """When the keys are gone the agent closes its tunnel, and acknowledges that nothing leaves any more."""

    async def scenario() -> None:
        postgres = await asyncio.start_unix_server(talk, str(tmp_path / "postgres"))
        tunnel = Tunnel(Address(port=0), tmp_path / "postgres", tmp_path, 2, lambda: None)
        port = await tunnel.start()
        context = tunnel_client_context(tunnel.certificate_pem)

        def log_in() -> socket.socket:
            plain = socket.create_connection(("127.0.0.1", port))
            tls = context.wrap_socket(plain, server_hostname=TUNNEL_HOST_NAME)
            return socket.socket(fileno=tls.detach())  # from here on what the kernel has, sealed or not

        with await asyncio.to_thread(log_in) as slow:
            slow.setblocking(False)
            await wait_until(lambda: any(each.get_write_buffer_size() for each in tunnel._connections.values()))
            assert take_all(slow)  # so there is room for what waits
            tunnel.close()
            assert await rest_of(slow) == b""
            await wait_until(lambda: not tunnel._connections)
        postgres.close()

    run(scenario())


@pytest.mark.parametrize("run", LOOPS, ids=LOOP_NAMES)
def test_what_comes_when_the_lease_is_over_is_not_passed_on(
    run: Callable[[Coroutine[Any, Any, None]], None], tmp_path: Path
) -> None:
    """As after a pause of everything: Postgres is the first to go on, and nobody has closed the tunnel yet."""

    async def scenario() -> None:
        talkers: list[asyncio.StreamWriter] = []

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            talkers.append(writer)
            writer.write(b"live")

        def check() -> None:
            if over:
                raise LeaseExpiredError("over")

        over = False
        postgres = await asyncio.start_unix_server(answer, str(tmp_path / "postgres"))
        tunnel = Tunnel(Address(port=0), tmp_path / "postgres", tmp_path, 2, check)
        port = await tunnel.start()
        context = tunnel_client_context(tunnel.certificate_pem)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=TUNNEL_HOST_NAME)
        async with asyncio.timeout(20):
            assert await reader.readexactly(4) == b"live"
            over = True
            talkers[0].write(b"a row")
            assert await rest_of_stream(reader) == b""
            await wait_until(lambda: not tunnel._connections)
        for each in (writer, *talkers):
            each.close()
        tunnel.close()
        postgres.close()

    async def rest_of_stream(reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.read()
        except OSError:
            return b""

    run(scenario())
