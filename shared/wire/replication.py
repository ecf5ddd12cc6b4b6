"""The streaming replication protocol (PG manual, "Streaming Replication Protocol"): what is inside CopyData.

    walsender → receiver     `w` XLogData             `k` PrimaryKeepalive
    receiver → walsender     `r` StandbyStatusUpdate  `h` HotStandbyFeedback

Positions are Lsn in the classes and plain integers in `unpack_xlog_data`, for loops where that counts. Times are
microseconds since 2000-01-01 UTC (TimestampTz of datatype/timestamp.h), 64-bit signed.

`serialize()` gives the payload of CopyData, not the message around it.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import ClassVar, Final, Self

from shared.lsn import Lsn
from shared.wire.buffer import ProtocolViolationError, ReadBuffer, WriteBuffer
from shared.wire.pgproto import Query

POSTGRES_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)

XLOG_DATA_HEADER_BYTES: Final = 1 + 8 + 8 + 8

_XLOG_DATA: Final = struct.Struct(">cQQq")
_SLOT_NAME: Final = re.compile(r"[a-z0-9_]{1,63}", re.ASCII)


def postgres_timestamp_us(moment: datetime) -> int:
    """`moment` must be aware."""
    return (moment - POSTGRES_EPOCH) // timedelta(microseconds=1)


def from_postgres_timestamp_us(timestamp_us: int) -> datetime:
    """Raises OverflowError for times that Python cannot hold; Postgres's "infinity" is one of them."""
    return POSTGRES_EPOCH + timedelta(microseconds=timestamp_us)


@dataclass(frozen=True, slots=True)
class XLogData:
    """A piece of WAL. It may start and end anywhere, also within a record or a record header."""

    type: ClassVar[bytes] = b"w"
    start_lsn: Lsn
    """Of the first byte of `data`."""
    server_end_lsn: Lsn
    """How far the server had WAL (flushed, for a primary) when it sent this."""
    sent_at_us: int
    data: bytes = field(repr=False)

    @property
    def end_lsn(self) -> Lsn:
        """Just behind the last byte of `data`."""
        return self.start_lsn + len(self.data)

    def serialize(self) -> bytes:
        header = _XLOG_DATA.pack(self.type, self.start_lsn.value, self.server_end_lsn.value, self.sent_at_us)
        return header + self.data

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        start_lsn, server_end_lsn, sent_at_us, data = unpack_xlog_data(payload)
        return cls(Lsn(start_lsn), Lsn(server_end_lsn), sent_at_us, bytes(data))


def unpack_xlog_data(payload: bytes | bytearray | memoryview) -> tuple[int, int, int, memoryview]:
    """(start LSN, server's end LSN, sent at, data), the data as a view into `payload`.

    Raises ProtocolViolationError when it is not XLogData.
    """
    if len(payload) < XLOG_DATA_HEADER_BYTES:
        raise ProtocolViolationError("XLogData is shorter than its header")
    type_byte, start_lsn, server_end_lsn, sent_at_us = _XLOG_DATA.unpack_from(payload)
    if type_byte != XLogData.type:
        raise ProtocolViolationError("not XLogData")
    data = memoryview(payload)[XLOG_DATA_HEADER_BYTES:]
    if start_lsn + len(data) >= 1 << 64:
        raise ProtocolViolationError("XLogData runs past the end of the LSN space")
    return start_lsn, server_end_lsn, sent_at_us, data


@dataclass(frozen=True, slots=True)
class PrimaryKeepalive:
    type: ClassVar[bytes] = b"k"
    server_end_lsn: Lsn
    """How far the server has sent WAL."""
    sent_at_us: int
    reply_requested: bool
    """Answer with a StandbyStatusUpdate now, or wal_sender_timeout strikes."""

    def serialize(self) -> bytes:
        writer = WriteBuffer().bytes_(self.type).uint64(self.server_end_lsn.value).int64(self.sent_at_us)
        return writer.uint8(self.reply_requested).getvalue()

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        reader = _body(payload, cls.type)
        parsed = cls(Lsn(reader.uint64()), reader.int64(), _flag(reader))
        reader.end()
        return parsed


@dataclass(frozen=True, slots=True)
class StandbyStatusUpdate:
    """What the receiver has. Each position is the end of what is covered: the last byte + 1."""

    type: ClassVar[bytes] = b"r"
    write_lsn: Lsn
    flush_lsn: Lsn
    """Durable: with synchronous_commit=on the primary lets commits up to here return."""
    apply_lsn: Lsn
    sent_at_us: int
    reply_requested: bool = False

    def serialize(self) -> bytes:
        writer = WriteBuffer().bytes_(self.type).uint64(self.write_lsn.value).uint64(self.flush_lsn.value)
        writer.uint64(self.apply_lsn.value).int64(self.sent_at_us)
        return writer.uint8(self.reply_requested).getvalue()

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        reader = _body(payload, cls.type)
        write_lsn, flush_lsn, apply_lsn = Lsn(reader.uint64()), Lsn(reader.uint64()), Lsn(reader.uint64())
        parsed = cls(write_lsn, flush_lsn, apply_lsn, reader.int64(), _flag(reader))
        reader.end()
        return parsed


@dataclass(frozen=True, slots=True)
class HotStandbyFeedback:
    """Which old row versions the standby still needs. xmin 0: none, and none of what was said before."""

    type: ClassVar[bytes] = b"h"
    sent_at_us: int
    xmin: int
    xmin_epoch: int
    catalog_xmin: int
    catalog_xmin_epoch: int

    def serialize(self) -> bytes:
        writer = WriteBuffer().bytes_(self.type).int64(self.sent_at_us).uint32(self.xmin).uint32(self.xmin_epoch)
        return writer.uint32(self.catalog_xmin).uint32(self.catalog_xmin_epoch).getvalue()

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        reader = _body(payload, cls.type)
        parsed = cls(reader.int64(), reader.uint32(), reader.uint32(), reader.uint32(), reader.uint32())
        reader.end()
        return parsed


def parse_from_primary(payload: bytes) -> XLogData | PrimaryKeepalive:
    """CopyData that a walsender sent. Raises ProtocolViolationError."""
    match payload[:1]:
        case XLogData.type:
            return XLogData.parse(payload)
        case PrimaryKeepalive.type:
            return PrimaryKeepalive.parse(payload)
        case _:
            raise ProtocolViolationError("unknown replication message from the primary")


def parse_from_standby(payload: bytes) -> StandbyStatusUpdate | HotStandbyFeedback:
    """CopyData that a receiver sent. Raises ProtocolViolationError."""
    match payload[:1]:
        case StandbyStatusUpdate.type:
            return StandbyStatusUpdate.parse(payload)
        case HotStandbyFeedback.type:
            return HotStandbyFeedback.parse(payload)
        case _:
            raise ProtocolViolationError("unknown replication message from the standby")


def _body(payload: bytes, expected_type: bytes) -> ReadBuffer:
    reader = ReadBuffer(payload)
    if reader.bytes_(1) != expected_type:
        raise ProtocolViolationError("replication message of another type")
    return reader


def _flag(reader: ReadBuffer) -> bool:
    value = reader.uint8()
    if value > 1:
        raise ProtocolViolationError("a flag must be 0 or 1")
    return value == 1


# Commands.


def identify_system() -> Query:
    """Answered by one row: see SystemIdentity."""
    return Query("IDENTIFY_SYSTEM")


def start_replication(start_lsn: Lsn, *, pg_timeline: int | None = None, slot: str | None = None) -> Query:
    """Physical replication from `start_lsn` on; answered by CopyBothResponse.

    The server starts at exactly that byte, which should be a record's or a segment's beginning. `pg_timeline` is
    Postgres's WAL timeline (ours is always 1); None: the server's current one. `slot` must exist.
    """
    if slot is not None and not _SLOT_NAME.fullmatch(slot):
        raise ValueError("a replication slot's name is 1-63 of a-z 0-9 _")
    if pg_timeline is not None and not 1 <= pg_timeline < 1 << 32:
        raise ValueError("a WAL timeline is 1 … 2^32 - 1")
    slot_clause = f"SLOT {slot} " if slot is not None else ""
    timeline_clause = f" TIMELINE {pg_timeline}" if pg_timeline is not None else ""
    return Query(f"START_REPLICATION {slot_clause}PHYSICAL {start_lsn}{timeline_clause}")


@dataclass(frozen=True, slots=True)
class SystemIdentity:
    """The answer to IDENTIFY_SYSTEM."""

    system_identifier: int
    """Of the cluster, 64 bits, made by initdb."""
    pg_timeline: int
    flush_lsn: Lsn
    database: str | None
    """None on a connection for physical replication."""

    @classmethod
    def from_row(cls, values: tuple[bytes | None, ...]) -> Self:
        """From the values of the DataRow. Raises ProtocolViolationError."""
        try:
            system_identifier, pg_timeline, flush_lsn, database = values
            if system_identifier is None or pg_timeline is None or flush_lsn is None:
                raise ValueError
            return cls(
                _decimal(system_identifier, 64),
                _decimal(pg_timeline, 32),
                Lsn.parse(flush_lsn.decode("ascii")),
                None if database is None else database.decode("utf-8", "surrogateescape"),
            )
        except ValueError:
            raise ProtocolViolationError("not an answer to IDENTIFY_SYSTEM") from None


def _decimal(text: bytes, bits: int) -> int:
    if not re.fullmatch(rb"[0-9]{1,20}", text):
        raise ValueError("not a decimal number")
    value = int(text)
    if value >= 1 << bits:
        raise ValueError(f"number does not fit in {bits} bits")
    return value
