"""Postgres messages: known bytes, limits, what is refused and what is not shown."""

from __future__ import annotations

import pytest

from shared.lsn import Lsn
from shared.wire.buffer import ProtocolViolationError, ReadBuffer, WriteBuffer
from shared.wire.pgauth import (
    AuthenticationOk,
    AuthenticationSASL,
    PasswordMessage,
    SASLInitialResponse,
    SASLResponse,
    parse_authentication,
)
from shared.wire.pgframing import (
    FrameScanner,
    MessageFramer,
    pack_message,
    startup_payload_length,
)
from shared.wire.pgproto import (
    BackendKeyData,
    CommandComplete,
    CopyBothResponse,
    CopyData,
    DataRow,
    ErrorField,
    ErrorResponse,
    FieldDescription,
    NoticeResponse,
    Query,
    ReadyForQuery,
    RowDescription,
    TransactionStatus,
    parse_backend,
    parse_frontend,
)
from shared.wire.pgstartup import (
    CancelRequest,
    GSSENCRequest,
    SSLRequest,
    StartupMessage,
    UnsupportedProtocolError,
    parse_startup,
)
from shared.wire.replication import (
    POSTGRES_EPOCH,
    PrimaryKeepalive,
    StandbyStatusUpdate,
    SystemIdentity,
    XLogData,
    from_postgres_timestamp_us,
    identify_system,
    postgres_timestamp_us,
    start_replication,
)

# Known bytes, after the manual's "Message Formats".


@pytest.mark.parametrize(
    ("message", "raw"),
    [
        (SSLRequest(), "00000008 04d2162f"),
        (GSSENCRequest(), "00000008 04d21630"),
        (CancelRequest(258, b"\x01\x02\x03\x04"), "00000010 04d2162e 00000102 01020304"),
        (
            StartupMessage({"user": "a", "database": "b"}),
            "0000001b 00030000 75736572 00 6100 6461746162617365 00 6200 00",
        ),
        (AuthenticationOk(), "52 00000008 00000000"),
        (AuthenticationSASL(("S",)), "52 0000000b 0000000a 5300 00"),
        (SASLInitialResponse("S", b"x"), "70 0000000b 5300 00000001 78"),
        (SASLInitialResponse("S", None), "70 0000000a 5300 ffffffff"),
        (Query("x"), "51 00000006 7800"),
        (ReadyForQuery(TransactionStatus.IDLE), "5a 00000005 49"),
        (BackendKeyData(1, b"\0\0\0\2"), "4b 0000000c 00000001 00000002"),
        (CommandComplete("COMMIT"), "43 0000000b 434f4d4d495400"),
        (DataRow((b"1", None, b"")), "44 00000013 0003 00000001 31 ffffffff 00000000"),
        (CopyBothResponse(), "57 00000007 00 0000"),
        (
            RowDescription((FieldDescription("c", type_oid=23, type_size_bytes=4),)),
            "54 0000001a 0001 6300 00000000 0000 00000017 0004 ffffffff 0000",
        ),
        (
            ErrorResponse.of("FATAL", "KL003", "no"),
            "45 0000001e 53 464154414c00 56 464154414c00 43 4b4c30303300 4d 6e6f00 00",
        ),
        (
            StandbyStatusUpdate(Lsn(3), Lsn(2), Lsn(1), -1, reply_requested=True),
            "72 0000000000000003 0000000000000002 0000000000000001 ffffffffffffffff 01",
        ),
        (XLogData(Lsn(1), Lsn(2), 3, b"wal"), "77 0000000000000001 0000000000000002 0000000000000003 77616c"),
        (PrimaryKeepalive(Lsn(1 << 63), 0, False), "6b 8000000000000000 0000000000000000 00"),
    ],
)
def test_known_bytes(message: Query, raw: str) -> None:
    assert message.serialize().hex() == raw.replace(" ", "")


# Start-up.


@pytest.mark.parametrize("length", [0, 3, 4, 7, 10_005, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
def test_lengths_of_startup_packets_are_refused_from_four_bytes(length: int) -> None:
    with pytest.raises(ProtocolViolationError):
        startup_payload_length(length.to_bytes(4, "big"))


def test_lengths_of_startup_packets() -> None:
    assert startup_payload_length((8).to_bytes(4, "big")) == 4
    assert startup_payload_length((10_004).to_bytes(4, "big")) == 10_000


def test_startup_parameters() -> None:
    raw = StartupMessage({"user": "u", "database": "", "_pq_.x": "1"}).serialize()
    parsed = parse_startup(raw[4:])
    assert isinstance(parsed, StartupMessage)
    assert (parsed.user, parsed.database) == ("u", "u")
    assert parsed.parameters["_pq_.x"] == "1"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\3\0",
        b"\0\3\0\0",
        b"\0\3\0\0\0",  # no user
        b"\0\3\0\0user\0\0\0",  # an empty one
        b"\0\3\0\0database\0d\0\0",
        b"\0\3\0\0user\0u\0",  # no terminator
        b"\0\3\0\0user\0u\0\0x",  # something behind it
        b"\0\3\0\0user\0u\0\0\0",
        b"\0\3\0\0user\0u\0user\0postgres\0\0",  # two users
        b"\0\3\0\0user\0u",
        b"\x04\xd2\x16\x2f\0",  # SSLRequest with something behind it: CVE-2021-23222's cousin
        b"\x04\xd2\x16\x2e\0\0\0\1",
        b"\x04\xd2\x16\x2e\0\0\0\1\0\0\0",
        b"\x04\xd2\x16\x2e\0\0\0\1" + bytes(257),
    ],
)
def test_bad_startup_packets(payload: bytes) -> None:
    with pytest.raises(ProtocolViolationError):
        parse_startup(payload)


@pytest.mark.parametrize("version", [0, 1 << 16, 2 << 16, 4 << 16, 0x16030100, 0x47455420])
def test_other_protocols_are_refused_as_such(version: int) -> None:
    with pytest.raises(UnsupportedProtocolError) as caught:
        parse_startup(version.to_bytes(4, "big") + b"user\0u\0\0")
    assert caught.value.sqlstate == "0A000"


# Other messages.


@pytest.mark.parametrize(
    ("type_byte", "payload"),
    [
        (b"Z", b"X"),
        (b"Z", b"II"),
        (b"C", b"no zero"),
        (b"C", b"two\0zeros\0"),
        (b"D", b"\xff\xff"),
        (b"D", b"\x7f\xff"),
        (b"D", b"\0\1\xff\xff\xff\xfe"),
        (b"D", b"\0\1\x7f\xff\xff\xff"),
        (b"T", b"\x7f\xff"),
        (b"T", b"\0\1" + bytes(18)),
        (b"W", b"\0\x7f\xff"),
        (b"v", b"\0\3\0\0\x7f\xff\xff\xff"),
        (b"v", b"\0\3\0\0\xff\xff\xff\xff"),
        (b"E", b""),
        (b"E", b"Mtext\0"),
        (b"E", b"Ma\0Mb\0\0"),
        (b"E", b"\xe9a\0\0"),
        (b"c", b"x"),
        (b"R", b"\0\0\0\5salt"),  # MD5
        (b"R", b"\0\0\0\7"),  # GSSAPI
        (b"R", b"\0\0\0\0x"),
        (b"R", b"\0\0\0\x0aSCRAM-SHA-256\0"),
        (b"1", b""),
        (b"", b""),
    ],
)
def test_bad_backend_messages(type_byte: bytes, payload: bytes) -> None:
    with pytest.raises(ProtocolViolationError):
        parse_backend(type_byte, payload)


@pytest.mark.parametrize(("type_byte", "payload"), [(b"Q", b"x"), (b"Q", b"a\0b\0"), (b"X", b"x"), (b"p", b"x\0")])
def test_bad_frontend_messages(type_byte: bytes, payload: bytes) -> None:
    with pytest.raises(ProtocolViolationError):
        parse_frontend(type_byte, payload)


def test_reports() -> None:
    raw = pack_message(b"N", b"SWARNUNG\0VWARNING\0C01000\0Mtext\0zunknown\0\0")
    notice = NoticeResponse.parse(raw[5:])
    assert (notice.severity, notice.sqlstate, notice.message) == ("WARNING", "01000", "text")
    assert notice.get(ErrorField.DETAIL) is None
    assert notice.serialize() == raw
    assert ErrorResponse.of("ERROR", "22000", "m", detail="d", hint="h").get(ErrorField.HINT) == "h"
    assert ErrorResponse({}).severity == ""


def test_strings_that_cannot_be_sent() -> None:
    for bad, why in (
        (Query("a\0b"), "zero byte"),
        (CommandComplete("\ud800"), "surrogates"),
        (StartupMessage({"": "x"}), "name"),
        (ErrorResponse({"MM": ""}), "ASCII"),
        (AuthenticationSASL(("",)), "name"),
    ):
        with pytest.raises(ValueError, match=why):
            bad.serialize()


def test_secrets_and_user_data_are_not_shown() -> None:
    for message in (
        PasswordMessage("hunter2"),
        SASLInitialResponse("SCRAM-SHA-256", b"hunter2"),
        SASLResponse(b"hunter2"),
        BackendKeyData(1, b"hunter2"),
        CancelRequest(1, b"hunter2"),
        Query("SELECT 'hunter2'"),
        DataRow((b"hunter2",)),
        CopyData(b"hunter2"),
        XLogData(Lsn(0), Lsn(0), 0, b"hunter2"),
        ErrorResponse.of("ERROR", "23505", "hunter2", detail="hunter2"),
        StartupMessage({"user": "hunter2"}),
    ):
        assert "hunter2" not in repr(message)


def test_undecodable_text_survives() -> None:
    raw = pack_message(b"C", b"caf\xe9\0")
    assert CommandComplete.parse(raw[5:]).serialize() == raw


def test_buffer_values_are_ours_to_get_right() -> None:
    with pytest.raises(ValueError, match="range"):
        WriteBuffer().uint8(256)
    with pytest.raises(ValueError, match="range"):
        WriteBuffer().int16(1 << 15)
    with pytest.raises(ValueError, match="range"):
        WriteBuffer().uint64(-1)
    reader = ReadBuffer(memoryview(b"\0\1rest"))
    assert reader.int16() == 1
    with pytest.raises(ProtocolViolationError):
        reader.bytes_(-1)
    assert reader.rest() == b"rest"
    reader.end()


# Framing.


@pytest.mark.parametrize("length", [0, 1, 3, 101, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
def test_a_bad_length_is_refused_from_the_header(length: int) -> None:
    header = b"Q" + length.to_bytes(4, "big")
    framer, scanner = MessageFramer(limit_bytes=96), FrameScanner([b"Z"], limit_bytes=96)
    for feed in (framer.feed, scanner.scan):
        feed(header[:4])
        with pytest.raises(ProtocolViolationError):
            feed(header[4:])
        with pytest.raises(ProtocolViolationError):
            feed(pack_message(b"Q", b""))


def test_limits_per_type() -> None:
    framer = MessageFramer(limit_bytes=10, limits_bytes={b"d": 20})
    assert len(framer.feed(pack_message(b"d", bytes(20)) + pack_message(b"Q", bytes(10)))) == 2
    with pytest.raises(ProtocolViolationError):
        framer.feed(pack_message(b"Q", bytes(11)))


def test_scanner_tells_where_a_message_lies_in_the_chunk() -> None:
    notice, row = pack_message(b"N", b"warning"), pack_message(b"D", bytes(100))
    scanner = FrameScanner([b"N"])
    scan = scanner.scan(row + notice + row[:3])
    assert scan.types == b"DN"
    (found,) = scan.wanted
    assert (found.payload, found.start, found.end) == (b"warning", len(row), len(row) + len(notice))
    assert not scanner.at_boundary
    assert scanner.scan(row[3:]).types == b"D"
    assert scanner.at_boundary
    scanner.scan(notice[:2])
    scanner.scan(notice[2:6])
    (found,) = scanner.scan(notice[6:] + row).wanted
    assert (found.payload, found.start, found.end) == (b"warning", -6, len(notice) - 6)


def test_scanner_copies_nothing_that_nobody_asked_for() -> None:
    scanner = FrameScanner([b"Z"])
    scanner.scan(pack_message(b"d", bytes(1 << 20))[: 1 << 19])
    held = [value for value in vars(scanner).values() if isinstance(value, bytes | bytearray)]
    assert sum(map(len, held)) == 0


def test_wanted_messages_are_bounded() -> None:
    scanner = FrameScanner([b"N"], wanted_limit_bytes=10)
    assert scanner.scan(pack_message(b"D", bytes(1000))).types == b"D"
    with pytest.raises(ProtocolViolationError):
        scanner.scan(pack_message(b"N", bytes(11))[:5])


# Replication.


def test_replication_commands() -> None:
    assert identify_system().sql == "IDENTIFY_SYSTEM"
    assert start_replication(Lsn.parse("1/2A000000")).sql == "START_REPLICATION PHYSICAL 1/2A000000"
    assert (
        start_replication(Lsn(0), pg_timeline=1, slot="sk_1").sql
        == "START_REPLICATION SLOT sk_1 PHYSICAL 0/0 TIMELINE 1"
    )
    for slot in ("", "A", 'x" y', "x;", "x" * 64):
        with pytest.raises(ValueError, match="slot"):
            start_replication(Lsn(0), slot=slot)
    for pg_timeline in (0, -1, 1 << 32):
        with pytest.raises(ValueError, match="timeline"):
            start_replication(Lsn(0), pg_timeline=pg_timeline)


def test_system_identity() -> None:
    identity = SystemIdentity.from_row((b"7312345678901234567", b"1", b"0/16B3748", None))
    assert identity == SystemIdentity(7312345678901234567, 1, Lsn.parse("0/16B3748"), None)
    rows: list[tuple[bytes | None, ...]] = [
        (),
        (b"1", b"1", b"0/0"),
        (None, b"1", b"0/0", None),
        (b"1", b"x", b"0/0", None),
        (b"1", b"-1", b"0/0", None),
        (b"1", b"\xd9\xa3", b"0/0", None),
        (b"18446744073709551616", b"1", b"0/0", None),
        (b"1", b"4294967296", b"0/0", None),
        (b"1", b"1", b"0", None),
        (b"1", b"1", b"\xff/0", None),
    ]
    for row in rows:
        with pytest.raises(ProtocolViolationError):
            SystemIdentity.from_row(row)


def test_xlog_data_at_the_end_of_the_lsn_space() -> None:
    payload = XLogData(Lsn((1 << 64) - 3), Lsn(0), 0, b"").serialize()
    assert XLogData.parse(payload + b"ab").end_lsn == Lsn((1 << 64) - 1)
    with pytest.raises(ProtocolViolationError):
        XLogData.parse(payload + b"abc")


def test_timestamps() -> None:
    assert postgres_timestamp_us(POSTGRES_EPOCH) == 0
    moment = from_postgres_timestamp_us(846_028_800_123_456)
    assert moment.isoformat() == "2026-10-23T00:00:00.123456+00:00"
    assert postgres_timestamp_us(moment) == 846_028_800_123_456
    with pytest.raises(OverflowError):
        from_postgres_timestamp_us((1 << 63) - 1)


def test_authentication_needs_its_code() -> None:
    with pytest.raises(ProtocolViolationError):
        parse_authentication(b"\0\0\0")
