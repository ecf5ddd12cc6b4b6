"""Log-in to a compute that does not run yet: the client proves to the proxy that it knows the password, the compute is
started for it, and the proxy logs in there as this client.

    client                     proxy                         manager       compute
      │ ── start-up ──────────►  │ ── log-in ───────────────► │
      │ ◄── SASL, continue ────  │ ◄──────────── verifier ──  │
      │ ── proof ─────────────►  │  wrong: 28P01, the end
      │                          │ ── connect ──────────────► │ ─ starts it ─► │
      │                          │ ── start-up, SCRAM with the client's keys ► │
      │ ◄── final, ok, … ──────  │ ◄─────────────────────────────── ok, … ──  │

In SCRAM a valid proof gives the server the ClientKey (RFC 5802, section 3), which is as good as this role's password
for this one verifier. It is kept from the proof to the log-in, and wiped then (ADR 49). The client hears nothing more
of its log-in before the compute has let it in: a compute that knows another password has the last word.
"""

from __future__ import annotations

import base64
import secrets
import struct
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Final, Protocol

from compute.proxy.session import ServerSide
from shared.wire.buffer import ProtocolViolationError
from shared.wire.pgauth import (
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    SASLInitialResponse,
    SASLResponse,
    parse_authentication,
)
from shared.wire.pgframing import SMALL_MESSAGE_LENGTH_MAX_BYTES
from shared.wire.pgproto import NegotiateProtocolVersion
from shared.wire.pgstartup import PROTOCOL_3_0, StartupMessage
from shared.wire.scram import (
    MECHANISM,
    NONCE_LENGTH_BYTES,
    ScramAuthenticationError,
    ScramClient,
    ScramKeys,
    ScramServer,
    ScramVerifier,
)

_HEADER: Final = struct.Struct(">BI")
_SASL_MESSAGE_MAX_BYTES: Final = 1024
"""PG_MAX_SASL_MESSAGE_LENGTH of libpq/sasl.h."""
_NAME_MAX_BYTES: Final = 63
_PROTOCOL_OPTION: Final = "_pq_."


class Client(Protocol):
    """Its end of the connection, as far as this module knows it."""

    @property
    def broke_protocol(self) -> bool: ...

    def answer(self, data: bytes) -> None: ...

    async def read_exactly(self, size_bytes: int) -> bytes | None: ...


@dataclass(frozen=True, slots=True)
class Proof:
    """What a client has proved, and with which its compute will let it in. `wipe` it."""

    keys: ScramKeys
    final: bytes = field(repr=False)
    """What it is told when that has happened."""

    def wipe(self) -> None:
        self.keys.client_key.wipe()


def role_name(startup: StartupMessage) -> bytes:
    """As Postgres looks for it: cut off at its longest name (ProcessStartupPacket in postmaster.c)."""
    return startup.user.encode("utf-8", "surrogateescape")[:_NAME_MAX_BYTES]


async def ask(client: Client, startup: StartupMessage, verifier: ScramVerifier) -> Proof | None:
    """None: it has gone away. Raises ScramAuthenticationError, ProtocolViolationError. The caller bounds the time."""
    if client.broke_protocol:
        raise ProtocolViolationError("the client went on before it was answered")
    client.answer(_negotiation(startup) + AuthenticationSASL((MECHANISM,)).serialize())
    if (payload := await _message(client)) is None:
        return None
    initial = SASLInitialResponse.parse(payload)
    if initial.mechanism != MECHANISM or initial.data is None:
        raise ProtocolViolationError("the client selected an invalid SASL authentication mechanism")
    server = ScramServer(verifier, _nonce())
    client.answer(AuthenticationSASLContinue(server.first(initial.data)).serialize())
    if (payload := await _message(client)) is None:
        return None
    try:
        final, keys = server.final(SASLResponse.parse(payload).data)
    except ScramAuthenticationError:
        # Postgres's words: whether there is such a role they do not say.
        raise ScramAuthenticationError(f'password authentication failed for user "{startup.user}"') from None
    return Proof(keys, AuthenticationSASLFinal(final).serialize())


def _negotiation(startup: StartupMessage) -> bytes:
    """To a client that asks for more than protocol 3.0 (ProcessStartupPacket in postmaster.c)."""
    unknown = tuple(name for name in startup.parameters if name.startswith(_PROTOCOL_OPTION))
    if startup.protocol == PROTOCOL_3_0 and not unknown:
        return b""
    return NegotiateProtocolVersion(PROTOCOL_3_0, unknown).serialize()


async def _message(client: Client) -> bytes | None:
    header = await client.read_exactly(_HEADER.size)
    if header is None:
        return None
    kind, length = _HEADER.unpack(header)
    if bytes((kind,)) != SASLResponse.type or not 4 <= length <= 4 + _SASL_MESSAGE_MAX_BYTES:
        raise ProtocolViolationError("expected a SASL response")
    return await client.read_exactly(length - 4)


async def log_in(server: ServerSide, first_words: bytes, proof: Proof) -> bytes:
    """What the client is to be told: that it is in, or the compute's error; and what has come behind it. Empty when the
    compute has gone away.

    `first_words`: of the compute's answer to the start-up packet. Raises ProtocolViolationError, and
    ScramAuthenticationError when who answers does not know the role's verifier.
    """
    words = _Words(server.words, first_words)
    client = ScramClient(proof.keys, _nonce())
    while message := await words.message():
        kind, payload = message[:1], message[_HEADER.size :]
        if kind == b"E":
            return message + words.rest
        if kind == NegotiateProtocolVersion.type:
            continue  # the client knows
        if kind != AuthenticationSASL.type:
            break
        match parse_authentication(payload):
            case AuthenticationSASL(mechanisms) if MECHANISM in mechanisms:
                server.send(SASLInitialResponse(MECHANISM, client.first()).serialize())
            case AuthenticationSASLContinue(data):
                server.send(SASLResponse(client.final(data)).serialize())
            case AuthenticationSASLFinal(data):
                client.verify(data)
                return proof.final + words.rest
            case _:
                break
    if not message:
        return b""
    raise ProtocolViolationError("the compute does not ask for a password as it should")


class _Words:
    """A compute's, cut into messages."""

    def __init__(self, more: _More, first: bytes) -> None:
        self._more = more
        self.rest = first
        """What has come behind the last message."""

    async def message(self) -> bytes:
        """The next one, whole; empty at the end of the connection. Raises ProtocolViolationError."""
        while len(self.rest) < _HEADER.size or len(self.rest) < self._end():
            chunk = await self._more()
            if not chunk:
                return b""
            self.rest += chunk
        end = self._end()
        message, self.rest = self.rest[:end], self.rest[end:]
        return message

    def _end(self) -> int:
        _, length = _HEADER.unpack_from(self.rest)
        if not 4 <= length <= 4 + SMALL_MESSAGE_LENGTH_MAX_BYTES:
            raise ProtocolViolationError("invalid message length")
        return 1 + int(length)


class _More(Protocol):
    def __call__(self) -> Awaitable[bytes]: ...


def _nonce() -> str:
    return base64.b64encode(secrets.token_bytes(NONCE_LENGTH_BYTES)).decode("ascii")
