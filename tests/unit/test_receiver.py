"""What a connection has read is handed on as a copy, and does not stay where it was read into."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from shared.auth import Service
from shared.config import Address
from shared.keysession import dial_over_tls
from shared.receiver import Receiver, ReceivingFor, open_tls_connection, start_tls_server
from shared.service import HttpServer
from shared.tls import client_context, server_context, service_host_name
from tests.fixtures.realm import Realm
from tests.fixtures.sockets import LOOP_NAMES, LOOPS

T = TypeVar("T")


class Collecting(Receiver):
    def __init__(self) -> None:
        self.received: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        self.received.append(data)


def _alive(kind: type[T]) -> list[T]:
    # Not by isinstance, which asks a weak reference's proxy for what it stands for, and that may be gone.
    return [each for each in gc.get_objects() if issubclass(type(each), kind)]


def test_the_shared_buffer_is_empty_again_and_what_was_read_is_not() -> None:
    one, other = Collecting(), Collecting()
    for receiver, data in ((one, b"of one project" * 1000), (other, b"of another")):
        room = receiver.get_buffer(-1)
        room[: len(data)] = data
        receiver.buffer_updated(len(data))
        assert not any(room)
    assert one.received == [b"of one project" * 1000]
    assert other.received == [b"of another"]


def test_a_full_buffer() -> None:
    receiver = Collecting()
    room = receiver.get_buffer(-1)
    room[:] = b"x" * len(room)
    receiver.buffer_updated(len(room))
    assert receiver.received == [b"x" * len(room)]
    assert not any(room)


@pytest.mark.parametrize("run", LOOPS, ids=LOOP_NAMES)
def test_streams_over_tls_are_read_through_the_shared_buffer(
    run: Callable[[Coroutine[Any, Any, None]], None], tmp_path: Path
) -> None:
    """More than it holds, both ways, slower than it comes, up to the end; and nothing of it is left in there."""
    realm = Realm.create(tmp_path)
    much = bytes(range(1, 256)) * 10_000

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(len(much)))
        await writer.drain()
        writer.close()

    async def scenario() -> None:
        context = server_context(realm.identity(Service.PAGESERVER).files)
        server = await start_tls_server(echo, "127.0.0.1", 0, context, 10.0, 1000)
        port = server.sockets[0].getsockname()[1]
        name = service_host_name(Service.PAGESERVER.value)
        reader, writer = await open_tls_connection("127.0.0.1", port, client_context(realm.ca_certificate), name, 1000)
        try:
            both = _alive(ReceivingFor)
            assert both, "read in some other way"
            writer.write(much)
            assert await reader.read() == much
            assert not any(both[0].get_buffer(-1))
        finally:
            writer.close()
            await writer.wait_closed()
            server.close()
            await server.wait_closed()  # uvloop waits for ever at the loop's end for an end that is still closing

    run(scenario())


async def _echo(scope: AsgiScope, receive: Receive, send: Send) -> None:
    """An ASGI application: each text of a WebSocket comes back."""
    while True:
        message = await receive()
        match message["type"]:
            case "lifespan.startup" | "lifespan.shutdown":
                await send({"type": f"{message['type']}.complete"})
            case "websocket.connect":
                await send({"type": "websocket.accept"})
            case "websocket.receive":
                await send({"type": "websocket.send", "text": message["text"]})
        if message["type"] in ("lifespan.shutdown", "websocket.disconnect"):
            return


def test_the_web_sockets_of_a_service_are_read_through_the_shared_buffer(tmp_path: Path) -> None:
    """After an upgrade of a connection that was read so, too."""
    realm = Realm.create(tmp_path)
    much = "much" * 60_000

    async def scenario() -> None:
        files = realm.identity(Service.KEYMANAGER).files
        async with HttpServer(_echo, Address(host="127.0.0.1", port=0), files) as server:
            dial = dial_over_tls(client_context(realm.ca_certificate))
            client = await dial(Address(host="127.0.0.1", port=server.port), "a token", 5.0)
            for text in ("little", much):
                await client.send(text)
                assert await client.recv() == text
            [socket] = _alive(WebSocketsSansIOProtocol)
            receiver = socket.transport.get_protocol()
            assert isinstance(receiver, ReceivingFor), "read in some other way"
            assert receiver._protocol is socket
            assert not any(receiver.get_buffer(-1))
            await client.close()

    uvloop.run(scenario())
