"""Attacks on what speaks the Postgres protocol: the proxy, and a compute's tunnel."""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import Iterator
from contextlib import AsyncExitStack

from shared.config import Address
from shared.ids import EndpointId
from shared.tls import client_context
from shared.wire.pgproto import ErrorResponse
from shared.wire.pgstartup import (
    CANCEL_REQUEST_CODE,
    GSSENC_REQUEST_CODE,
    PROTOCOL_3_0,
    SSL_REQUEST_CODE,
    CancelRequest,
    GSSENCRequest,
    SSLRequest,
    StartupMessage,
)
from tests.cluster_bad_input.http_cases import Attempt
from tests.cluster_bad_input.listeners import listeners
from tests.cluster_bad_input.place import Place
from tests.cluster_bad_input.wire import Wire, careless_context, over_tls, plain

PROTOCOL, NO_SUCH, NOT_SUPPORTED, NOT_ALLOWED = "08P01", "08004", "0A000", "28000"


def packet(code: int, rest: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack(">iI", 8 + len(rest) if length is None else length, code) + rest


def startup(place: Place, **changes: str | None) -> bytes:
    """Of a client that knows everything but the password."""
    connection = place.busy.connection
    parameters = {
        "user": connection.user,
        "database": connection.database,
        "options": f"endpoint={connection.endpoint_id}",
        **changes,
    }
    return StartupMessage({name: value for name, value in parameters.items() if value is not None}).serialize()


def refused_anyhow() -> dict[str, tuple[bytes, str]]:
    """With and without TLS: what → (first packet, SQLSTATE)."""
    lengths = {f"a length of {n}": (struct.pack(">i", n) + bytes(8), PROTOCOL) for n in range(8)}
    large = (1 << 31) - 1
    return lengths | {
        "2 GB": (packet(PROTOCOL_3_0, length=large), PROTOCOL),
        "2 GB and some of it": (packet(PROTOCOL_3_0, b"user\0app\0", length=large), PROTOCOL),
        "a negative length": (packet(PROTOCOL_3_0, length=-1), PROTOCOL),
        "a little too long": (packet(PROTOCOL_3_0, length=10_005), PROTOCOL),
        "HTTP": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", PROTOCOL),
        "protocol 2.0": (packet(2 << 16, b"user\0app\0\0"), NOT_SUPPORTED),
        "protocol 4.0": (packet(4 << 16, b"user\0app\0\0"), NOT_SUPPORTED),
        "an unknown request": (packet(1234 << 16 | 5681), NOT_SUPPORTED),
        "no user": (packet(PROTOCOL_3_0, b"database\0app\0\0"), PROTOCOL),
        "an empty user": (packet(PROTOCOL_3_0, b"user\0\0\0"), PROTOCOL),
        "no parameters": (packet(PROTOCOL_3_0, b"\0"), PROTOCOL),
        "no end": (packet(PROTOCOL_3_0, b"user\0app"), PROTOCOL),
        "a user twice": (packet(PROTOCOL_3_0, b"user\0app\0user\0admin\0\0"), PROTOCOL),
        "bytes behind the end": (packet(PROTOCOL_3_0, b"user\0app\0\0xyz"), PROTOCOL),
        "an SSLRequest with more in it": (packet(SSL_REQUEST_CODE, b"x"), PROTOCOL),
        "a GSSENCRequest with more in it": (packet(GSSENC_REQUEST_CODE, b"x"), PROTOCOL),
        "a CancelRequest without a key": (packet(CANCEL_REQUEST_CODE, bytes(4)), PROTOCOL),
        "a CancelRequest with a long key": (packet(CANCEL_REQUEST_CODE, bytes(4 + 257)), PROTOCOL),
    }


def at_the_proxy(place: Place) -> Iterator[Attempt]:
    address = place.address("proxy", "postgres_listen")
    for about, (sent, sqlstate) in refused_anyhow().items():
        yield _plain(address, about, sent, sqlstate)
        yield _inside(place, about, sent, sqlstate)
    inside = {
        "SSLRequest again": (SSLRequest().serialize(), PROTOCOL),
        "GSSENCRequest": (GSSENCRequest().serialize(), PROTOCOL),
        "no endpoint": (startup(place, options=None), NO_SUCH),
        "an unknown endpoint": (startup(place, options=f"endpoint={EndpointId.new()}"), NO_SUCH),
        "a malformed endpoint": (startup(place, options="endpoint=x"), NO_SUCH),
        "two endpoints": (startup(place, options=f"endpoint={EndpointId.new()} endpoint={EndpointId.new()}"), NO_SUCH),
        "replication": (startup(place, replication="true"), "42501"),
        "an unknown user": (startup(place, user="nobody"), PROTOCOL),
        "the superuser": (startup(place, user="keylake_admin"), "42501"),
    }
    for about, (sent, sqlstate) in inside.items():
        yield _inside(place, about, sent, sqlstate)
    yield _plain(address, "no TLS", startup(place), NOT_ALLOWED)
    gss = GSSENCRequest().serialize()
    yield _plain(address, "GSSENCRequest twice", gss + gss, PROTOCOL, before=b"N")
    yield _says_nothing(address, CancelRequest(4711, bytes(4)).serialize())
    yield _says_nothing(address, CancelRequest(1, b"x" * 256).serialize())
    yield _says_nothing(address, b"")
    yield _says_nothing(address, struct.pack(">i", 100) + bytes(20))
    yield _no_tls_behind_sslrequest(address)
    yield _direct_tls(place, alpn=None)
    yield _direct_tls(place, alpn="h2")


async def _plain(address: Address, about: str, sent: bytes, sqlstate: str, before: bytes = b"") -> None:
    async with plain(address) as wire:
        await wire.send(sent)
        check(about, (await wire.rest()).removeprefix(before), sqlstate)


async def _inside(place: Place, about: str, sent: bytes, sqlstate: str) -> None:
    """Behind an SSLRequest and TLS, as every client comes."""
    async with AsyncExitStack() as stack:
        wire = await stack.enter_async_context(encrypted(place))
        await wire.send(sent)
        said = await wire.some()
        if said[:1] == b"R":  # it asks for a password, as of everybody: so nobody learns who exists
            await wire.send(b"p" + struct.pack(">i", 8) + b"xyz\0")
            said = await wire.rest()
        check(about, said + await wire.rest(), sqlstate)


def encrypted(place: Place) -> _Encrypted:
    return _Encrypted(place)


class _Encrypted:
    """`async with`: a connection to the proxy that has asked for TLS and got it."""

    def __init__(self, place: Place) -> None:
        self._address = place.address("proxy", "postgres_listen")
        self._context = client_context(place.ca_certificate)
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Wire:
        reader, writer = await asyncio.open_connection(self._address.host, self._address.port)
        self._writer = writer
        writer.write(SSLRequest().serialize())
        assert await reader.readexactly(1) == b"S"
        await writer.start_tls(self._context, server_hostname="localhost")
        return Wire(reader, writer)

    async def __aexit__(self, *exc_info: object) -> None:
        if self._writer is not None:
            self._writer.transport.abort()


def check(about: str, said: bytes, sqlstate: str) -> None:
    """One FATAL ErrorResponse and nothing else."""
    assert said[:1] == b"E", (about, said)
    length = int.from_bytes(said[1:5], "big")
    error = ErrorResponse.parse(said[5 : 1 + length])
    assert error.sqlstate == sqlstate, (about, said)
    assert b"SFATAL\0" in said, (about, said)
    assert len(said) == 1 + length, (about, said)


async def _says_nothing(address: Address, sent: bytes) -> None:
    """A guess at a cancel key, or half a packet: closed without a word."""
    async with plain(address) as wire:
        await wire.send(sent)
        wire.finish()
        assert await wire.rest() == b""


async def _no_tls_behind_sslrequest(address: Address) -> None:
    async with plain(address) as wire:
        await wire.send(SSLRequest().serialize() + b"and now in plain text\n" * 10)
        said = await wire.rest()
        assert said[:1] == b"S"
        assert said[1:2] in (b"", b"\x15"), said  # nothing, or a TLS alert


async def _direct_tls(place: Place, alpn: str | None) -> None:
    context = client_context(place.ca_certificate)
    if alpn is not None:
        context.set_alpn_protocols([alpn])
    try:
        async with over_tls(place.address("proxy", "postgres_listen"), context, "localhost") as wire:
            await wire.send(startup(place))
            check(f"direct TLS, ALPN {alpn}", await wire.rest(), NOT_ALLOWED)
    except (ssl.SSLError, OSError):
        assert alpn is not None, "without ALPN the handshake is good, and the answer is ours"


# --- the tunnel of a compute ---


def tunnel(place: Place, known: set[int]) -> Address:
    """The one port that is in no service's settings."""
    [port] = {each.port for each in listeners(place.cluster) if not each.is_unix} - known
    return Address(port=port)


def at_the_tunnel(place: Place, address: Address) -> Iterator[Attempt]:
    for sent in (b"GET / HTTP/1.1\r\n\r\n", startup(place), SSLRequest().serialize(), bytes(1000)):
        yield _no_tls(address, sent)
    refused = {
        "no SASL": (startup(place, options=None), PROTOCOL),
        "the superuser": (startup(place, options=None, user="keylake_admin", database="postgres"), PROTOCOL),
        "replication": (startup(place, options=None, replication="true"), NOT_ALLOWED),
    }
    for about, (sent, sqlstate) in refused.items():
        yield _in_tunnel(address, about, sent, sqlstate)
    for sent in (packet(PROTOCOL_3_0, length=(1 << 31) - 1), bytes(8), CancelRequest(1, bytes(4)).serialize()):
        yield _closed_in_tunnel(address, sent)


async def _no_tls(address: Address, sent: bytes) -> None:
    async with plain(address) as wire:
        await wire.send(sent)
        assert (await wire.rest())[:1] in (b"", b"\x15")


async def _in_tunnel(address: Address, about: str, sent: bytes, sqlstate: str) -> None:
    async with over_tls(address, careless_context(), "localhost") as wire:
        await wire.send(sent)
        said = await wire.some()
        if said[:1] == b"R":
            await wire.send(b"p" + struct.pack(">i", 8) + b"xyz\0")
            said = b""
        said += await wire.rest()
        assert f"C{sqlstate}\0".encode() in said, (about, said)


async def _closed_in_tunnel(address: Address, sent: bytes) -> None:
    """Postgres's own way."""
    async with over_tls(address, careless_context(), "localhost") as wire:
        await wire.send(sent)
        assert await wire.rest() == b""
