"""Start-up packets of PostgreSQL's protocol 3: the first thing on every connection, without a type byte.

    offset 0   4 bytes   length, which counts itself
    offset 4   4 bytes   protocol version (3.x), or one of three request codes
    offset 8   …         parameters, or nothing, or whom to cancel

Source: PG manual, "Message Formats"; libpq/pqcomm.h; ProcessStartupPacket in postmaster.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final, Self

from shared.wire.buffer import ProtocolViolationError, ReadBuffer, WriteBuffer

PROTOCOL_3_0: Final = 3 << 16
CANCEL_REQUEST_CODE: Final = 1234 << 16 | 5678
SSL_REQUEST_CODE: Final = 1234 << 16 | 5679
GSSENC_REQUEST_CODE: Final = 1234 << 16 | 5680

CANCEL_KEY_LENGTH_MAX_BYTES: Final = 256
"""4 in protocol 3.0; up to 256 in 3.2 (PostgreSQL 18)."""


class UnsupportedProtocolError(ProtocolViolationError):
    """A start-up packet of another protocol generation than 3."""

    sqlstate = "0A000"


def _startup_packet(payload: bytes) -> bytes:
    return (len(payload) + 4).to_bytes(4, "big") + payload


@dataclass(frozen=True, slots=True)
class StartupMessage:
    """The first message of a session."""

    parameters: Mapping[str, str] = field(repr=False)
    """`user` is required; `database`, `options`, `replication` and any run-time setting may follow."""
    protocol: int = PROTOCOL_3_0
    """Major version in the upper 16 bits (always 3), minor in the lower."""

    @property
    def user(self) -> str:
        return self.parameters["user"]

    @property
    def database(self) -> str:
        """As Postgres understands it: the user's name when there is none."""
        return self.parameters.get("database") or self.user

    def serialize(self) -> bytes:
        writer = WriteBuffer().int32(self.protocol)
        for name, value in self.parameters.items():
            if not name:
                raise ValueError("a start-up parameter needs a name")
            writer.cstring(name).cstring(value)
        return _startup_packet(writer.uint8(0).getvalue())

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Stricter than Postgres in one thing: a parameter given twice is refused.

        Postgres would take the last one; a proxy that decided by the first could be told two different stories.
        Raises UnsupportedProtocolError for a major version other than 3.
        """
        reader = ReadBuffer(payload)
        protocol = reader.int32()
        if protocol >> 16 != 3:
            raise UnsupportedProtocolError("unsupported frontend protocol: only 3.x is spoken here")
        parameters: dict[str, str] = {}
        while name := reader.cstring():
            if name in parameters:
                raise ProtocolViolationError("start-up parameter given twice")
            parameters[name] = reader.cstring()
        reader.end()
        if not parameters.get("user"):
            raise ProtocolViolationError("no user name in start-up packet")
        return cls(parameters, protocol)


@dataclass(frozen=True, slots=True)
class _CodeOnlyRequest:
    code: ClassVar[int]

    def serialize(self) -> bytes:
        return _startup_packet(WriteBuffer().int32(self.code).getvalue())

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        reader = ReadBuffer(payload)
        if reader.int32() != cls.code:
            raise ProtocolViolationError("wrong request code")
        reader.end()
        return cls()


@dataclass(frozen=True, slots=True)
class SSLRequest(_CodeOnlyRequest):
    """May we speak TLS? Answered by one byte, `S` or `N`."""

    code = SSL_REQUEST_CODE


@dataclass(frozen=True, slots=True)
class GSSENCRequest(_CodeOnlyRequest):
    """May we speak GSSAPI encryption? Answered by one byte, `G` or `N`."""

    code = GSSENC_REQUEST_CODE


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """On a connection of its own: cancel what that backend does. Never answered."""

    process_id: int
    secret_key: bytes = field(repr=False)

    def serialize(self) -> bytes:
        writer = WriteBuffer().int32(CANCEL_REQUEST_CODE).int32(self.process_id)
        return _startup_packet(writer.bytes_(self.secret_key).getvalue())

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        reader = ReadBuffer(payload)
        if reader.int32() != CANCEL_REQUEST_CODE:
            raise ProtocolViolationError("wrong request code")
        return cls(reader.int32(), cancel_key(reader))


def cancel_key(reader: ReadBuffer) -> bytes:
    """The rest of a message, which is a cancel key. Raises ProtocolViolationError unless it is 4 to 256 bytes."""
    if not 4 <= reader.remaining_bytes <= CANCEL_KEY_LENGTH_MAX_BYTES:
        raise ProtocolViolationError("invalid length of cancel key")
    return reader.rest()


StartupPacket = StartupMessage | SSLRequest | GSSENCRequest | CancelRequest


def parse_startup(payload: bytes) -> StartupPacket:
    """`payload`: what follows the length of the first packet of a connection."""
    match ReadBuffer(payload).int32():
        case code if code == SSL_REQUEST_CODE:
            return SSLRequest.parse(payload)
        case code if code == GSSENC_REQUEST_CODE:
            return GSSENCRequest.parse(payload)
        case code if code == CANCEL_REQUEST_CODE:
            return CancelRequest.parse(payload)
        case _:
            return StartupMessage.parse(payload)
