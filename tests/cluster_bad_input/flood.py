"""Connections that nobody should wait for, hundreds of them."""

from __future__ import annotations

import ssl
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from typing import Any, Final

from shared.config import Address
from shared.wire.pgstartup import SSLRequest
from tests.cluster_bad_input.framed_cases import ports
from tests.cluster_bad_input.listeners import configured_ports
from tests.cluster_bad_input.place import Place
from tests.cluster_bad_input.postgres_cases import encrypted, tunnel
from tests.cluster_bad_input.wire import careless_context, over_tls, plain

OF_EACH: Final = 10
_HALF_A_HELLO: Final = bytes.fromhex("1603010200010001fc0303")


def bad_connections(place: Place) -> Iterator[Coroutine[Any, Any, None]]:
    """Each returns when the other end has closed."""
    framed = [port.address for port in ports(place)]
    front = place.address("proxy", "postgres_listen")
    behind = tunnel(place, set(configured_ports(place.cluster)))
    for _ in range(OF_EACH):
        for address in (*framed, front, behind):
            yield _says(address, b"")
            yield _says(address, _HALF_A_HELLO)
            yield _says(address, b"\xff" * 5000)
        for address in framed:
            yield _says_in_tls(address, b"")
            yield _says_in_tls(address, b"\0\0\0")
            yield _says_in_tls(address, b"\xff" * 5000)
        yield _says(front, SSLRequest().serialize())
        yield _says(front, SSLRequest().serialize() + _HALF_A_HELLO)
        yield _hangs_at_the_proxy(place)


async def _says(address: Address, sent: bytes) -> None:
    async with plain(address) as wire:
        await wire.send(sent)
        await wire.rest()


async def _says_in_tls(address: Address, sent: bytes) -> None:
    with suppress(OSError, ssl.SSLError):
        async with over_tls(address, careless_context(), "localhost") as wire:
            await wire.send(sent)
            await wire.rest()


async def _hangs_at_the_proxy(place: Place) -> None:
    """With TLS, and half of a start-up packet."""
    async with encrypted(place) as wire:
        await wire.send(b"\0\0\0")
        await wire.rest()
