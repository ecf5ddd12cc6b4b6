"""Postgres messages: parse∘serialize is the identity, and no bytes make a parser raise anything undocumented."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Protocol

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.lsn import Lsn
from shared.wire.buffer import ProtocolViolationError
from shared.wire.pgauth import (
    Authentication,
    AuthenticationCleartextPassword,
    AuthenticationOk,
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    PasswordMessage,
    SASLInitialResponse,
    SASLResponse,
    parse_authentication,
)
from shared.wire.pgframing import MessageFramer, startup_payload_length
from shared.wire.pgproto import (
    BackendKeyData,
    BackendMessage,
    CommandComplete,
    CopyBothResponse,
    CopyData,
    CopyDone,
    DataRow,
    EmptyQueryResponse,
    ErrorField,
    ErrorResponse,
    FieldDescription,
    FrontendMessage,
    NegotiateProtocolVersion,
    NoticeResponse,
    ParameterStatus,
    Query,
    ReadyForQuery,
    RowDescription,
    Terminate,
    TransactionStatus,
    parse_backend,
    parse_frontend,
)
from shared.wire.pgstartup import (
    CancelRequest,
    GSSENCRequest,
    SSLRequest,
    StartupMessage,
    StartupPacket,
    parse_startup,
)
from shared.wire.replication import (
    HotStandbyFeedback,
    PrimaryKeepalive,
    StandbyStatusUpdate,
    SystemIdentity,
    XLogData,
    parse_from_primary,
    parse_from_standby,
    unpack_xlog_data,
)

int16 = st.integers(-(1 << 15), (1 << 15) - 1)
int32 = st.integers(-(1 << 31), (1 << 31) - 1)
int64 = st.integers(-(1 << 63), (1 << 63) - 1)
uint32 = st.integers(0, (1 << 32) - 1)
lsn = st.integers(0, (1 << 63)).map(Lsn)
# Any bytes without a zero can be a string on the wire; this is how they look once decoded.
wire_text = st.binary(max_size=40).map(lambda data: data.replace(b"\0", b"").decode("utf-8", "surrogateescape"))
some_text = wire_text.filter(bool)

startup_packets: st.SearchStrategy[StartupPacket] = st.one_of(
    st.builds(
        lambda user, others, minor: StartupMessage({"user": user, **others}, 3 << 16 | minor),
        some_text,
        st.dictionaries(some_text.filter(lambda name: name != "user"), wire_text, max_size=4),
        st.integers(0, 0xFFFF),
    ),
    st.just(SSLRequest()),
    st.just(GSSENCRequest()),
    st.builds(CancelRequest, int32, st.binary(min_size=4, max_size=256)),
)

authentications: st.SearchStrategy[Authentication] = st.one_of(
    st.just(AuthenticationOk()),
    st.just(AuthenticationCleartextPassword()),
    st.builds(AuthenticationSASL, st.lists(some_text, max_size=3).map(tuple)),
    st.builds(AuthenticationSASLContinue, st.binary(max_size=60)),
    st.builds(AuthenticationSASLFinal, st.binary(max_size=60)),
)

report_fields = st.dictionaries(
    st.sampled_from([*ErrorField, "x", "\x01"]).map(str), wire_text, max_size=len(ErrorField)
)

backend_messages: st.SearchStrategy[BackendMessage] = st.one_of(
    authentications,
    st.builds(BackendKeyData, int32, st.binary(min_size=4, max_size=256)),
    st.builds(CommandComplete, wire_text),
    st.builds(CopyBothResponse, st.integers(0, 255), st.lists(int16, max_size=3).map(tuple)),
    st.builds(CopyData, st.binary(max_size=60)),
    st.just(CopyDone()),
    st.just(EmptyQueryResponse()),
    st.builds(DataRow, st.lists(st.none() | st.binary(max_size=20), max_size=5).map(tuple)),
    st.builds(ErrorResponse, report_fields),
    st.builds(NoticeResponse, report_fields),
    st.builds(NegotiateProtocolVersion, int32, st.lists(wire_text, max_size=3).map(tuple)),
    st.builds(ParameterStatus, wire_text, wire_text),
    st.builds(ReadyForQuery, st.sampled_from(TransactionStatus)),
    st.builds(
        RowDescription,
        st.lists(st.builds(FieldDescription, wire_text, uint32, uint32, int16, int16, int32, int16), max_size=4).map(
            tuple
        ),
    ),
)

frontend_messages: st.SearchStrategy[FrontendMessage] = st.one_of(
    st.builds(Query, wire_text), st.builds(CopyData, st.binary(max_size=60)), st.just(CopyDone()), st.just(Terminate())
)

from_primary = st.one_of(
    st.builds(XLogData, lsn, lsn, int64, st.binary(max_size=60)), st.builds(PrimaryKeepalive, lsn, int64, st.booleans())
)
from_standby = st.one_of(
    st.builds(StandbyStatusUpdate, lsn, lsn, lsn, int64, st.booleans()),
    st.builds(HotStandbyFeedback, int64, uint32, uint32, uint32, uint32),
)


@given(startup_packets)
def test_startup_packets(packet: StartupPacket) -> None:
    data = packet.serialize()
    assert startup_payload_length(data[:4]) == len(data) - 4
    assert parse_startup(data[4:]) == packet


@given(backend_messages)
def test_backend_messages(message: BackendMessage) -> None:
    (frame,) = MessageFramer().feed(message.serialize())
    assert parse_backend(*frame) == message


@given(frontend_messages)
def test_frontend_messages(message: FrontendMessage) -> None:
    (frame,) = MessageFramer().feed(message.serialize())
    assert parse_frontend(*frame) == message


@given(wire_text, st.none() | st.binary(max_size=40))
def test_messages_of_type_p(text: str, data: bytes | None) -> None:
    messages: list[PasswordMessage | SASLInitialResponse | SASLResponse] = [
        PasswordMessage(text),
        SASLInitialResponse(text, data),
        SASLResponse(data or b""),
    ]
    frames = MessageFramer().feed(b"".join(message.serialize() for message in messages))
    assert [frame.type for frame in frames] == [b"p"] * 3
    assert [type(m).parse(frame.payload) for m, frame in zip(messages, frames, strict=True)] == messages


@given(from_primary)
def test_messages_from_the_primary(message: XLogData | PrimaryKeepalive) -> None:
    assert parse_from_primary(message.serialize()) == message


@given(from_standby)
def test_messages_from_the_standby(message: StandbyStatusUpdate | HotStandbyFeedback) -> None:
    assert parse_from_standby(message.serialize()) == message


@given(st.builds(XLogData, lsn, lsn, int64, st.binary(max_size=60)))
def test_xlog_data_without_copying(message: XLogData) -> None:
    payload = message.serialize()
    start, server_end, sent_at_us, data = unpack_xlog_data(memoryview(payload))
    assert (Lsn(start), Lsn(server_end), sent_at_us) == (message.start_lsn, message.server_end_lsn, message.sent_at_us)
    assert data == message.data
    assert data.obj is payload


class Parser(Protocol):
    def __call__(self, payload: bytes, /) -> object: ...


def of_type(type_byte: bytes, parse: Callable[[bytes, bytes], object]) -> Parser:
    return lambda payload: parse(type_byte, payload)


PARSERS: dict[str, Parser] = {
    "startup": parse_startup,
    "authentication": parse_authentication,
    "password": PasswordMessage.parse,
    "sasl initial": SASLInitialResponse.parse,
    "sasl": SASLResponse.parse,
    "from primary": parse_from_primary,
    "from standby": parse_from_standby,
    "xlog data": unpack_xlog_data,
    "row": lambda payload: SystemIdentity.from_row(tuple(payload.split(b","))),
    **{f"backend {bytes((t,))!r}": of_type(bytes((t,)), parse_backend) for t in range(128)},
    **{f"frontend {bytes((t,))!r}": of_type(bytes((t,)), parse_frontend) for t in (*b"QdcXp", 0, 255)},
}


@pytest.mark.parametrize("name", ["startup", "authentication", "password", "sasl initial", "from primary", "row"])
@given(data=st.binary(max_size=80))
@example(data=b"")
def test_random_bytes_raise_only_violations(name: str, data: bytes) -> None:
    tolerate(PARSERS[name], data)


@given(name=st.sampled_from(sorted(PARSERS)), data=st.binary(max_size=80))
def test_random_bytes_to_any_parser(name: str, data: bytes) -> None:
    tolerate(PARSERS[name], data)


@given(
    message=st.one_of(backend_messages, startup_packets, from_primary, from_standby),
    position=st.integers(0, 200),
    inserted=st.binary(max_size=3),
    removed=st.integers(0, 3),
    data=st.data(),
)
def test_damaged_messages_raise_only_violations(
    message: BackendMessage | StartupPacket | XLogData | PrimaryKeepalive | StandbyStatusUpdate | HotStandbyFeedback,
    position: int,
    inserted: bytes,
    removed: int,
    data: st.DataObject,
) -> None:
    raw = message.serialize()
    position %= len(raw) + 1
    damaged = raw[:position] + inserted + raw[position + removed :]
    for offset in (0, 4, 5):  # of the payload in the three families
        tolerate(PARSERS[data.draw(st.sampled_from(sorted(PARSERS)))], damaged[offset:])
    if isinstance(message, StartupMessage | CancelRequest | SSLRequest | GSSENCRequest):
        tolerate(parse_startup, damaged[4:])
    elif isinstance(message, XLogData | PrimaryKeepalive):
        tolerate(parse_from_primary, damaged)
    elif isinstance(message, StandbyStatusUpdate | HotStandbyFeedback):
        tolerate(parse_from_standby, damaged)
    else:
        tolerate(of_type(raw[:1], parse_backend), damaged[5:])


def tolerate(parse: Parser, data: bytes) -> None:
    with contextlib.suppress(ProtocolViolationError):
        parse(data)
