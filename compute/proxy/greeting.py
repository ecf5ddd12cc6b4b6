"""From an accepted socket to a complete start-up packet: plain bytes first, then TLS.

From load balancers that are known as such a PROXY protocol header comes before all else (proxy_protocol.py).

What comes before TLS is read from the raw socket, and exactly as many bytes as a packet has. Whatever a client, or
somebody between it and us, has put behind its SSLRequest stays in the kernel and is taken for TLS, where it fails: it
can not slip into the session (CVE-2021-23214, CVE-2021-23222).

    first byte 0x16    TLS at once, PostgreSQL 17's `sslnegotiation=direct`: only with ALPN "postgresql"
    SSLRequest         'S', then TLS
    GSSENCRequest      'N', once; the client tries something else
    CancelRequest      taken without TLS too: psql before 17 sends it so
    StartupMessage     without TLS only from this machine, and only if allowed
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import weakref
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from compute.proxy import goodbye, proxy_protocol
from compute.proxy.cancel import CancelKeys
from compute.proxy.proxy_protocol import Peer
from compute.proxy.session import ClientSide
from shared.errors import UnauthenticatedError
from shared.tls import CertificateFiles
from shared.wire.buffer import ProtocolViolationError
from shared.wire.pgframing import startup_payload_length
from shared.wire.pgstartup import CancelRequest, GSSENCRequest, SSLRequest, StartupMessage, parse_startup

ALPN: Final = "postgresql"
_TLS_HANDSHAKE: Final = 0x16
_SHUTDOWN_TIMEOUT_S: Final = 1.0


class FrontTls:
    """The TLS context that clients see, and the server names that they asked for."""

    def __init__(self, files: CertificateFiles) -> None:
        self._names: weakref.WeakKeyDictionary[ssl.SSLObject | ssl.SSLSocket, str] = weakref.WeakKeyDictionary()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2  # clients are whatever our customers use
        context.load_cert_chain(files.certificate, files.private_key)
        context.set_alpn_protocols([ALPN])
        context.sni_callback = self._remember
        self.context = context

    def _remember(self, tls: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
        if name is not None:
            self._names[tls] = name

    def server_name(self, transport: asyncio.Transport) -> str | None:
        tls = transport.get_extra_info("ssl_object")
        return None if tls is None else self._names.get(tls)


@dataclass(frozen=True, slots=True)
class Greeting:
    client: ClientSide
    peer: Peer | None
    request: StartupMessage | CancelRequest
    server_name: str | None


@dataclass(frozen=True, slots=True)
class Manners:
    """What settings say of how clients come."""

    allow_plaintext_loopback: bool = False
    proxy_protocol_from: tuple[IPv4Network | IPv6Network, ...] = ()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who connected, before a word of the client's own is read."""

    peer: Peer | None
    """Its address: the connection's other end, or what a load balancer says. None: not by IP."""
    plain_is_good: bool


async def identify(connection: socket.socket, manners: Manners) -> Caller:
    """Raises ProtocolViolationError, OSError; the caller bounds the time, and closes the socket if this raises."""
    peer = _peer(connection)
    plain_is_good = manners.allow_plaintext_loopback and _is_loopback(peer)
    if peer is not None and any(peer.address in network for network in manners.proxy_protocol_from):
        named = await _proxied(connection)
        # Whoever comes through a load balancer on this machine is not on this machine, and cannot say so.
        plain_is_good = plain_is_good and (named is None or _is_loopback(named))
        peer = named or peer
    return Caller(peer, plain_is_good)


async def greet(connection: socket.socket, caller: Caller, tls: FrontTls, cancel_keys: CancelKeys) -> Greeting | None:
    """None when the client went away or was refused. Takes the socket over. Raises as `identify`."""
    loop = asyncio.get_running_loop()
    if await _peek(connection) == _TLS_HANDSHAKE:
        return await _over_tls(connection, tls, cancel_keys, caller.peer, direct=True)
    gss_refused = False
    while True:
        payload = await _packet(connection)
        if payload is None:
            connection.close()
            return None
        match parse_startup(payload):
            case SSLRequest():
                await loop.sock_sendall(connection, b"S")
                return await _over_tls(connection, tls, cancel_keys, caller.peer, direct=False)
            case GSSENCRequest():
                if gss_refused:
                    raise ProtocolViolationError("a second GSSENCRequest")
                gss_refused = True
                await loop.sock_sendall(connection, b"N")
            case CancelRequest() | StartupMessage() as request:
                _, client = await loop.connect_accepted_socket(lambda: ClientSide(cancel_keys), connection)
                if isinstance(request, StartupMessage) and not caller.plain_is_good:
                    client.end(goodbye.tls_required())
                    return None
                return Greeting(client, caller.peer, request, None)


async def _proxied(connection: socket.socket) -> Peer | None:
    """Whom the header names. Raises ProtocolViolationError, also at end of stream."""
    first = await _peek(connection)
    if first == ord("P"):
        line = b""
        while not line.endswith(b"\n") and len(line) < proxy_protocol.V1_MAX_BYTES:
            line += await _exactly(connection, 1) or b"\n"
        return proxy_protocol.parse_v1(line)
    fixed = await _exactly(connection, proxy_protocol.V2_FIXED_BYTES) if first == proxy_protocol.SIGNATURE[0] else None
    if fixed is None:
        raise ProtocolViolationError("no PROXY protocol header")
    rest = await _exactly(connection, proxy_protocol.rest_of_v2(fixed))
    if rest is None:
        raise ProtocolViolationError("half a PROXY protocol header")
    return proxy_protocol.parse_v2(fixed + rest)


async def _over_tls(
    connection: socket.socket, tls: FrontTls, cancel_keys: CancelKeys, peer: Peer | None, *, direct: bool
) -> Greeting | None:
    loop = asyncio.get_running_loop()
    client = ClientSide(cancel_keys)
    try:
        await loop.connect_accepted_socket(
            lambda: client, connection, ssl=tls.context, ssl_shutdown_timeout=_SHUTDOWN_TIMEOUT_S
        )
    except (OSError, ssl.SSLError):
        return None  # their handshake, their problem
    transport = client.transport
    if transport is None:
        return None
    if direct and transport.get_extra_info("ssl_object").selected_alpn_protocol() != ALPN:
        client.end(goodbye.of_error(UnauthenticatedError("direct TLS needs ALPN with the protocol postgresql")))
        return None
    try:
        request = await _request(client)
    except ProtocolViolationError as error:
        client.end(goodbye.of_error(error))
        return None
    except asyncio.CancelledError:
        # It took too long. The socket is the transport's now: whoever closes only the socket ends nothing.
        transport.abort()
        raise
    return None if request is None else Greeting(client, peer, request, tls.server_name(transport))


async def _request(client: ClientSide) -> StartupMessage | CancelRequest | None:
    length_field = await client.read_exactly(4)
    if length_field is None:
        return None
    payload = await client.read_exactly(startup_payload_length(length_field))
    if payload is None:
        return None
    request = parse_startup(payload)
    if not isinstance(request, StartupMessage | CancelRequest):
        raise ProtocolViolationError("encryption was asked for twice")
    return request


async def _packet(connection: socket.socket) -> bytes | None:
    """The payload of one packet from the raw socket; None at end of stream."""
    length_field = await _exactly(connection, 4)
    return None if length_field is None else await _exactly(connection, startup_payload_length(length_field))


async def _exactly(connection: socket.socket, size_bytes: int) -> bytes | None:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size_bytes:
        piece = await loop.sock_recv(connection, size_bytes - len(data))
        if not piece:
            return None
        data += piece
    return data


async def _peek(connection: socket.socket) -> int | None:
    """The first byte, left where it is; None at end of stream."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(connection, readable.set)
    try:
        while True:
            await readable.wait()
            try:
                first = connection.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                readable.clear()
                continue
            return first[0] if first else None
    finally:
        loop.remove_reader(connection)


def _peer(connection: socket.socket) -> Peer | None:
    """Raises OSError when it is gone."""
    name = connection.getpeername()
    if not isinstance(name, tuple):
        return None
    address = ipaddress.ip_address(str(name[0]).partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped  # an IPv4 client of a socket for both
    return Peer(address, int(name[1]))


def _is_loopback(peer: Peer | None) -> bool:
    return peer is not None and peer.address.is_loopback
