"""Messages of PostgreSQL's frontend/backend protocol 3 (PG manual, chapter "Frontend/Backend Protocol").

Every message is a frozen dataclass with

* `serialize()`: the whole message, type byte and length included;
* `parse(payload)`: from what follows the length. Raises ProtocolViolationError, and nothing else, for any bytes.

`parse_frontend` and `parse_backend` choose the class. The start-up packets are in shared.wire.pgstartup, messages of
authentication in shared.wire.pgauth; cutting a stream into payloads is shared.wire.pgframing's work.

Texts are str with undecodable bytes as lone surrogates (ReadBuffer.cstring), so that they survive a round trip
whatever the encoding; encode them with "backslashreplace" or the like before logging.

Cancel keys and user data (rows, queries, copy streams, error texts) are absent from repr.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Final, Self

from shared.wire.buffer import ProtocolViolationError, ReadBuffer, WriteBuffer
from shared.wire.pgauth import Authentication, parse_authentication
from shared.wire.pgframing import pack_message
from shared.wire.pgstartup import cancel_key

# Messages without contents.


@dataclass(frozen=True, slots=True)
class _Empty:
    type: ClassVar[bytes]

    def serialize(self) -> bytes:
        return pack_message(self.type, b"")

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        ReadBuffer(payload).end()
        return cls()


@dataclass(frozen=True, slots=True)
class Terminate(_Empty):
    """The client leaves."""

    type = b"X"


@dataclass(frozen=True, slots=True)
class CopyDone(_Empty):
    """Either side: no more CopyData from here."""

    type = b"c"


@dataclass(frozen=True, slots=True)
class EmptyQueryResponse(_Empty):
    """Instead of CommandComplete for an empty query string."""

    type = b"I"


# Messages that are one run of bytes.


@dataclass(frozen=True, slots=True)
class _Opaque:
    type: ClassVar[bytes]
    data: bytes = field(repr=False)

    def serialize(self) -> bytes:
        return pack_message(self.type, self.data)

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        return cls(bytes(payload))


@dataclass(frozen=True, slots=True)
class CopyData(_Opaque):
    """Either side: a piece of the copy stream; in replication one message of shared.wire.replication."""

    type = b"d"


# Messages that are one string.


@dataclass(frozen=True, slots=True)
class Query:
    """A simple query: one string, any number of statements."""

    type: ClassVar[bytes] = b"Q"
    sql: str = field(repr=False)

    def serialize(self) -> bytes:
        return pack_message(self.type, WriteBuffer().cstring(self.sql).getvalue())

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        return cls(_only_cstring(payload))


@dataclass(frozen=True, slots=True)
class CommandComplete:
    """One statement is done: `SELECT 3`, `INSERT 0 1`, `COMMIT`."""

    type: ClassVar[bytes] = b"C"
    tag: str

    def serialize(self) -> bytes:
        return pack_message(self.type, WriteBuffer().cstring(self.tag).getvalue())

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        return cls(_only_cstring(payload))


def _only_cstring(payload: bytes) -> str:
    reader = ReadBuffer(payload)
    text = reader.cstring()
    reader.end()
    return text


# What the server says about itself and the session.


class ErrorField(StrEnum):
    """Field codes of ErrorResponse and NoticeResponse (PG manual, "Error and Notice Message Fields")."""

    SEVERITY = "S"
    """Localised; use SEVERITY_NONLOCALIZED for decisions."""
    SEVERITY_NONLOCALIZED = "V"
    SQLSTATE = "C"
    MESSAGE = "M"
    DETAIL = "D"
    HINT = "H"
    POSITION = "P"
    INTERNAL_POSITION = "p"
    INTERNAL_QUERY = "q"
    WHERE = "W"
    SCHEMA = "s"
    TABLE = "t"
    COLUMN = "c"
    DATA_TYPE = "d"
    CONSTRAINT = "n"
    FILE = "F"
    LINE = "L"
    ROUTINE = "R"


@dataclass(frozen=True, slots=True)
class _Report:
    """`fields`: field code (one ASCII character) → text, in the order of the wire. Unknown codes are kept: the
    protocol tells readers to ignore them."""

    type: ClassVar[bytes]
    fields: Mapping[str, str] = field(repr=False)

    @classmethod
    def of(cls, severity: str, sqlstate: str, text: str, *, detail: str = "", hint: str = "") -> Self:
        """The usual fields. `text` and the rest reach the client."""
        fields: dict[str, str] = {
            ErrorField.SEVERITY: severity,
            ErrorField.SEVERITY_NONLOCALIZED: severity,
            ErrorField.SQLSTATE: sqlstate,
            ErrorField.MESSAGE: text,
        }
        if detail:
            fields[ErrorField.DETAIL] = detail
        if hint:
            fields[ErrorField.HINT] = hint
        return cls(fields)

    def get(self, code: ErrorField) -> str | None:
        return self.fields.get(code)

    @property
    def severity(self) -> str:
        """ERROR, FATAL, PANIC, WARNING, NOTICE, DEBUG, INFO or LOG; empty if the server sent none."""
        return self.fields.get(ErrorField.SEVERITY_NONLOCALIZED) or self.fields.get(ErrorField.SEVERITY, "")

    @property
    def sqlstate(self) -> str:
        return self.fields.get(ErrorField.SQLSTATE, "")

    @property
    def message(self) -> str:
        """May quote user data."""
        return self.fields.get(ErrorField.MESSAGE, "")

    def serialize(self) -> bytes:
        writer = WriteBuffer()
        for code, text in self.fields.items():
            if len(code) != 1 or not 0 < ord(code) < 128:
                raise ValueError("an error field code is one ASCII character")
            writer.uint8(ord(code)).cstring(text)
        return pack_message(self.type, writer.uint8(0).getvalue())

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        reader = ReadBuffer(payload)
        fields: dict[str, str] = {}
        while code := reader.uint8():
            if code >= 128 or chr(code) in fields:
                raise ProtocolViolationError("invalid or repeated error field code")
            fields[chr(code)] = reader.cstring()
        reader.end()
        return cls(fields)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(severity={self.severity!r}, sqlstate={self.sqlstate!r})"


@dataclass(frozen=True, slots=True, repr=False)
class ErrorResponse(_Report):
    """The command failed; after severity FATAL the server closes the connection."""

    type = b"E"


@dataclass(frozen=True, slots=True, repr=False)
class NoticeResponse(_Report):
    """Something to show to the user; may come at any time."""

    type = b"N"


class TransactionStatus(StrEnum):
    IDLE = "I"
    IN_TRANSACTION = "T"
    FAILED = "E"


@dataclass(frozen=True, slots=True)
class ReadyForQuery:
    """The server waits for the next command."""

    type: ClassVar[bytes] = b"Z"
    status: TransactionStatus

    def serialize(self) -> bytes:
        return pack_message(self.type, self.status.encode("ascii"))

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        reader = ReadBuffer(payload)
        status = chr(reader.uint8())
        reader.end()
        try:
            return cls(TransactionStatus(status))
        except ValueError:
            raise ProtocolViolationError("unknown transaction status") from None


@dataclass(frozen=True, slots=True)
class ParameterStatus:
    """A run-time setting that clients care about, now or since it changed."""

    type: ClassVar[bytes] = b"S"
    name: str
    value: str

    def serialize(self) -> bytes:
        return pack_message(self.type, WriteBuffer().cstring(self.name).cstring(self.value).getvalue())

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        reader = ReadBuffer(payload)
        parsed = cls(reader.cstring(), reader.cstring())
        reader.end()
        return parsed


@dataclass(frozen=True, slots=True)
class BackendKeyData:
    """What a CancelRequest for this session must say."""

    type: ClassVar[bytes] = b"K"
    process_id: int
    secret_key: bytes = field(repr=False)

    def serialize(self) -> bytes:
        return pack_message(self.type, WriteBuffer().int32(self.process_id).bytes_(self.secret_key).getvalue())

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        reader = ReadBuffer(payload)
        return cls(reader.int32(), cancel_key(reader))


@dataclass(frozen=True, slots=True)
class NegotiateProtocolVersion:
    """The server does not know the minor version or some `_pq_.` options of the start-up packet."""

    type: ClassVar[bytes] = b"v"
    newest_protocol: int
    """As in StartupMessage.protocol (the manual says "minor", ProcessStartupPacket sends PG_PROTOCOL_LATEST)."""
    unknown_options: tuple[str, ...]

    def serialize(self) -> bytes:
        writer = WriteBuffer().int32(self.newest_protocol).int32(len(self.unknown_options))
        for option in self.unknown_options:
            writer.cstring(option)
        return pack_message(self.type, writer.getvalue())

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        reader = ReadBuffer(payload)
        newest_protocol = reader.int32()
        count = reader.int32()
        if not 0 <= count <= reader.remaining_bytes:
            raise ProtocolViolationError("message is shorter than its contents")
        options = tuple(reader.cstring() for _ in range(count))
        reader.end()
        return cls(newest_protocol, options)


# Results.


@dataclass(frozen=True, slots=True)
class FieldDescription:
    name: str
    type_oid: int = 25
    """25: text."""
    table_oid: int = 0
    column_number: int = 0
    type_size_bytes: int = -1
    """Negative: variable."""
    type_modifier: int = -1
    format: int = 0
    """0 text, 1 binary."""


_FIELD_LENGTH_MIN_BYTES: Final = 1 + 4 + 2 + 4 + 2 + 4 + 2


@dataclass(frozen=True, slots=True)
class RowDescription:
    """The columns of the DataRows that follow."""

    type: ClassVar[bytes] = b"T"
    fields: tuple[FieldDescription, ...]

    def serialize(self) -> bytes:
        writer = WriteBuffer().int16(len(self.fields))
        for column in self.fields:
            writer.cstring(column.name).uint32(column.table_oid).int16(column.column_number)
            writer.uint32(column.type_oid).int16(column.type_size_bytes)
            writer.int32(column.type_modifier).int16(column.format)
        return pack_message(self.type, writer.getvalue())

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        reader = ReadBuffer(payload)
        fields = []
        for _ in range(reader.count(_FIELD_LENGTH_MIN_BYTES)):
            name, table_oid, column_number = reader.cstring(), reader.uint32(), reader.int16()
            type_oid, type_size, type_modifier = reader.uint32(), reader.int16(), reader.int32()
            fields.append(
                FieldDescription(
                    name=name,
                    type_oid=type_oid,
                    table_oid=table_oid,
                    column_number=column_number,
                    type_size_bytes=type_size,
                    type_modifier=type_modifier,
                    format=reader.int16(),
                )
            )
        reader.end()
        return cls(tuple(fields))


@dataclass(frozen=True, slots=True)
class DataRow:
    """One row; None is NULL."""

    type: ClassVar[bytes] = b"D"
    values: tuple[bytes | None, ...] = field(repr=False)

    def serialize(self) -> bytes:
        writer = WriteBuffer().int16(len(self.values))
        for value in self.values:
            if value is None:
                writer.int32(-1)
            else:
                writer.int32(len(value)).bytes_(value)
        return pack_message(self.type, writer.getvalue())

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        reader = ReadBuffer(payload)
        values: list[bytes | None] = []
        for _ in range(reader.count(4)):
            length = reader.int32()
            values.append(None if length == -1 else reader.bytes_(length))
        reader.end()
        return cls(tuple(values))

    def texts(self) -> tuple[str | None, ...]:
        """Columns in text format, with undecodable bytes as lone surrogates."""
        return tuple(None if value is None else value.decode("utf-8", "surrogateescape") for value in self.values)


@dataclass(frozen=True, slots=True)
class CopyBothResponse:
    """START_REPLICATION worked: CopyData flows both ways from here."""

    type: ClassVar[bytes] = b"W"
    overall_format: int = 0
    column_formats: tuple[int, ...] = ()

    def serialize(self) -> bytes:
        writer = WriteBuffer().uint8(self.overall_format).int16(len(self.column_formats))
        for column_format in self.column_formats:
            writer.int16(column_format)
        return pack_message(self.type, writer.getvalue())

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        reader = ReadBuffer(payload)
        overall_format = reader.uint8()
        formats = tuple(reader.int16() for _ in range(reader.count(2)))
        reader.end()
        return cls(overall_format, formats)


BackendMessage = (
    Authentication
    | BackendKeyData
    | CommandComplete
    | CopyBothResponse
    | CopyData
    | CopyDone
    | DataRow
    | EmptyQueryResponse
    | ErrorResponse
    | NegotiateProtocolVersion
    | NoticeResponse
    | ParameterStatus
    | ReadyForQuery
    | RowDescription
)

FrontendMessage = Query | CopyData | CopyDone | Terminate

_BACKEND: Final[Mapping[bytes, Callable[[bytes], BackendMessage]]] = {
    b"R": parse_authentication,
    b"K": BackendKeyData.parse,
    b"C": CommandComplete.parse,
    b"W": CopyBothResponse.parse,
    b"d": CopyData.parse,
    b"c": CopyDone.parse,
    b"D": DataRow.parse,
    b"I": EmptyQueryResponse.parse,
    b"E": ErrorResponse.parse,
    b"v": NegotiateProtocolVersion.parse,
    b"N": NoticeResponse.parse,
    b"S": ParameterStatus.parse,
    b"Z": ReadyForQuery.parse,
    b"T": RowDescription.parse,
}

_FRONTEND: Final[Mapping[bytes, Callable[[bytes], FrontendMessage]]] = {
    b"Q": Query.parse,
    b"d": CopyData.parse,
    b"c": CopyDone.parse,
    b"X": Terminate.parse,
}


def parse_backend(type_byte: bytes, payload: bytes) -> BackendMessage:
    """Messages of the extended query protocol and COPY are not spoken here: ProtocolViolationError."""
    parser = _BACKEND.get(type_byte)
    if parser is None:
        raise ProtocolViolationError("unexpected type of backend message")
    return parser(payload)


def parse_frontend(type_byte: bytes, payload: bytes) -> FrontendMessage:
    """For `p` use the class that the state calls for: PasswordMessage, SASLInitialResponse or SASLResponse."""
    parser = _FRONTEND.get(type_byte)
    if parser is None:
        raise ProtocolViolationError("unexpected type of frontend message")
    return parser(payload)
