"""Authentication messages of PostgreSQL's protocol 3 (PG manual, "Message Formats" and "SASL Authentication").

The server's all have type `R` and an int32 that says which; the client's all have type `p` and only the state of the
exchange says which. What SCRAM writes into the SASL data is shared.wire.scram's work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

from shared.wire.buffer import ProtocolViolationError, ReadBuffer, WriteBuffer
from shared.wire.pgframing import pack_message


@dataclass(frozen=True, slots=True)
class PasswordMessage:
    """The answer to AuthenticationCleartextPassword."""

    type: ClassVar[bytes] = b"p"
    password: str = field(repr=False)

    def serialize(self) -> bytes:
        return pack_message(self.type, WriteBuffer().cstring(self.password).getvalue())

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        reader = ReadBuffer(payload)
        password = reader.cstring()
        reader.end()
        return cls(password)


@dataclass(frozen=True, slots=True)
class SASLResponse:
    """The client's further steps of a SASL exchange."""

    type: ClassVar[bytes] = b"p"
    data: bytes = field(repr=False)

    def serialize(self) -> bytes:
        return pack_message(self.type, self.data)

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        return cls(bytes(payload))


@dataclass(frozen=True, slots=True)
class SASLInitialResponse:
    """The client's choice of mechanism and its first step."""

    type: ClassVar[bytes] = b"p"
    mechanism: str
    data: bytes | None = field(repr=False)
    """None: no initial response (length -1)."""

    def serialize(self) -> bytes:
        writer = WriteBuffer().cstring(self.mechanism)
        if self.data is None:
            writer.int32(-1)
        else:
            writer.int32(len(self.data)).bytes_(self.data)
        return pack_message(self.type, writer.getvalue())

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        reader = ReadBuffer(payload)
        mechanism = reader.cstring()
        length = reader.int32()
        data = None if length == -1 else reader.bytes_(length)
        reader.end()
        return cls(mechanism, data)


@dataclass(frozen=True, slots=True)
class AuthenticationOk:
    type: ClassVar[bytes] = b"R"
    code: ClassVar[int] = 0

    def serialize(self) -> bytes:
        return pack_message(self.type, WriteBuffer().int32(self.code).getvalue())


@dataclass(frozen=True, slots=True)
class AuthenticationCleartextPassword:
    type: ClassVar[bytes] = b"R"
    code: ClassVar[int] = 3

    def serialize(self) -> bytes:
        return pack_message(self.type, WriteBuffer().int32(self.code).getvalue())


@dataclass(frozen=True, slots=True)
class AuthenticationSASL:
    """The server's mechanisms, best first."""

    type: ClassVar[bytes] = b"R"
    code: ClassVar[int] = 10
    mechanisms: tuple[str, ...]

    def serialize(self) -> bytes:
        writer = WriteBuffer().int32(self.code)
        for mechanism in self.mechanisms:
            if not mechanism:
                raise ValueError("a SASL mechanism needs a name")
            writer.cstring(mechanism)
        return pack_message(self.type, writer.uint8(0).getvalue())


@dataclass(frozen=True, slots=True)
class AuthenticationSASLContinue:
    type: ClassVar[bytes] = b"R"
    code: ClassVar[int] = 11
    data: bytes = field(repr=False)

    def serialize(self) -> bytes:
        return pack_message(self.type, WriteBuffer().int32(self.code).bytes_(self.data).getvalue())


@dataclass(frozen=True, slots=True)
class AuthenticationSASLFinal:
    type: ClassVar[bytes] = b"R"
    code: ClassVar[int] = 12
    data: bytes = field(repr=False)

    def serialize(self) -> bytes:
        return pack_message(self.type, WriteBuffer().int32(self.code).bytes_(self.data).getvalue())


Authentication = (
    AuthenticationOk
    | AuthenticationCleartextPassword
    | AuthenticationSASL
    | AuthenticationSASLContinue
    | AuthenticationSASLFinal
)


def parse_authentication(payload: bytes) -> Authentication:
    """Methods that are not spoken here (MD5 among them) raise ProtocolViolationError."""
    reader = ReadBuffer(payload)
    parsed: Authentication
    match code := reader.int32():
        case AuthenticationOk.code:
            parsed = AuthenticationOk()
        case AuthenticationCleartextPassword.code:
            parsed = AuthenticationCleartextPassword()
        case AuthenticationSASL.code:
            mechanisms = []
            while mechanism := reader.cstring():
                mechanisms.append(mechanism)
            parsed = AuthenticationSASL(tuple(mechanisms))
        case AuthenticationSASLContinue.code:
            parsed = AuthenticationSASLContinue(reader.rest())
        case AuthenticationSASLFinal.code:
            parsed = AuthenticationSASLFinal(reader.rest())
        case _:
            raise ProtocolViolationError(f"authentication method {code} is not supported")
    reader.end()
    return parsed
