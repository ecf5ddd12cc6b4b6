"""Framed connections: whose turn it is to send, and what an abort lets out."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from shared.auth import Service
from shared.errors import RevokedError, UnavailableError
from shared.framed_tcp import FramedConnection
from shared.tls import client_context, server_context, service_host_name
from tests.fixtures.realm import Realm
from tests.fixtures.sockets import LOOP_NAMES, LOOPS, rest_of, socket_pair, take_all
from tests.fixtures.waiting import wait_until

Run = Callable[[Coroutine[Any, Any, None]], None]
MUCH = b"plaintext of a page " * 50_000
loops = pytest.mark.parametrize("run", LOOPS, ids=LOOP_NAMES)


async def framed(end: socket.socket) -> FramedConnection:
    reader, writer = await asyncio.open_unix_connection(sock=end)
    return FramedConnection(reader, writer, 1 << 20)


@loops
def test_what_waits_to_be_sent_stays_here_when_a_connection_is_aborted(run: Run) -> None:
    """Also when the peer has made room by then: the event loop would send on before it closes the socket."""

    async def scenario() -> None:
        ours, theirs = socket_pair()
        connection = await framed(ours)
        connection.write(MUCH)
        assert len(take_all(theirs)) < len(MUCH)  # the rest waits, and there is room for it now
        connection.abort(b"farewell")
        assert await rest_of(theirs) == b""
        connection.abort()
        await connection.close()
        theirs.close()

    run(scenario())


@loops
def test_a_peer_that_has_read_everything_hears_the_farewell(run: Run, tmp_path: Path) -> None:
    realm = Realm.create(tmp_path)

    async def scenario() -> None:
        ours, theirs = socket_pair()
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        context = server_context(realm.identity(Service.PAGESERVER).files)
        accepting = asyncio.create_task(loop.connect_accepted_socket(lambda: protocol, ours, ssl=context))
        their_reader, their_writer = await asyncio.open_unix_connection(
            sock=theirs,
            ssl=client_context(realm.ca_certificate),
            server_hostname=service_host_name(Service.PAGESERVER.value),
        )
        transport, _ = await accepting
        connection = FramedConnection(reader, asyncio.StreamWriter(transport, protocol, reader, loop), 1 << 20)
        await connection.send(b"an answer, ")
        connection.abort(b"farewell")
        async with asyncio.timeout(20):
            assert await their_reader.read() == b"an answer, farewell"
            await connection.close()
        with pytest.raises(UnavailableError):
            await connection.send(b"more")
        their_writer.close()

    run(scenario())


async def test_who_waited_for_their_turn_is_checked_when_it_comes() -> None:
    ours, theirs = socket_pair()
    connection = await framed(ours)
    allowed = True

    def check() -> None:
        if not allowed:
            raise RevokedError("the customer's key is revoked")

    first = asyncio.create_task(connection.send(MUCH, check))
    second = asyncio.create_task(connection.send(b"second", check))
    await asyncio.sleep(0)
    allowed = False
    received = b""

    def first_is_out() -> bool:
        nonlocal received
        received += take_all(theirs)
        return first.done()

    await wait_until(first_is_out)
    with pytest.raises(RevokedError):
        await second
    await connection.close()
    assert received + await rest_of(theirs) == MUCH
    theirs.close()
