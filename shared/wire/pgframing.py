"""Cutting a Postgres v3 byte stream into messages.

After the start-up packet every message, in both directions, is (PG manual, "Message Formats"):

    offset 0   1 byte    type
    offset 1   4 bytes   length, which counts itself but not the type
    offset 5   …         payload

`MessageFramer` is for an end that reads every message. `FrameScanner` is for a relay that passes the chunks on as they
are and only wants to know where messages end and what a few of them say.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from shared.wire.buffer import ProtocolViolationError

STARTUP_PACKET_LENGTH_MAX_BYTES: Final = 10_000
"""MAX_STARTUP_PACKET_LENGTH of libpq/pqcomm.h; without the length field."""

SMALL_MESSAGE_LENGTH_MAX_BYTES: Final = 10_000
"""PQ_SMALL_MESSAGE_LIMIT of libpq/libpq.h."""

MESSAGE_LENGTH_MAX_BYTES: Final = 0x3FFF_FFFF - 1
"""PQ_LARGE_MESSAGE_LIMIT of libpq/libpq.h (MaxAllocSize - 1): no server sends or takes more in one message."""

_HEADER: Final = struct.Struct(">BI")
_HEADER_BYTES: Final = 5
_LENGTH: Final = struct.Struct(">I")


class Frame(NamedTuple):
    type: bytes
    """One byte."""
    payload: bytes
    """Without type and length."""


def startup_payload_length(length_field: bytes) -> int:
    """Bytes that follow the four bytes `length_field` with which every connection begins.

    Raises ProtocolViolationError unless Postgres would read on: the request code must fit in
    (ProcessStartupPacket in postmaster.c), and nobody gets to make us wait for, or allocate, two gigabytes.
    """
    (length,) = _LENGTH.unpack(length_field)
    payload_length = int(length) - 4
    if not 4 <= payload_length <= STARTUP_PACKET_LENGTH_MAX_BYTES:
        raise ProtocolViolationError("invalid length of startup packet")
    return payload_length


def pack_message(type_byte: bytes, payload: bytes) -> bytes:
    """The message as it goes over the wire."""
    return b"%b%b%b" % (type_byte, _LENGTH.pack(len(payload) + 4), payload)


class _Limits:
    """The largest payload per type byte."""

    __slots__ = ("by_type",)

    def __init__(self, default: int, special: Mapping[bytes, int]) -> None:
        self.by_type = [default] * 256
        for type_byte, limit in special.items():
            self.by_type[type_byte[0]] = limit

    def payload_length(self, type_byte: int, length: int) -> int:
        """Raises ProtocolViolationError for a length field that is too small for itself or above the limit."""
        payload_length = length - 4
        if not 0 <= payload_length <= self.by_type[type_byte]:
            raise _invalid_length()
        return payload_length


def _invalid_length() -> ProtocolViolationError:
    return ProtocolViolationError("invalid message length")


_NO_LIMITS: Final[Mapping[bytes, int]] = {}


class MessageFramer:
    """Incremental: feed bytes as they come, get the messages that are complete.

    Holds at most one incomplete message, so memory is bounded by the limit of its type plus one chunk; a length
    above the limit is refused as soon as its five header bytes are there. After a ProtocolViolationError the framer
    (like the connection) is dead and raises again.
    """

    def __init__(
        self,
        *,
        limit_bytes: int = MESSAGE_LENGTH_MAX_BYTES,
        limits_bytes: Mapping[bytes, int] = _NO_LIMITS,
    ) -> None:
        """`limits_bytes` bounds the payloads of single types, `limit_bytes` those of all others."""
        self._limits = _Limits(limit_bytes, limits_bytes)
        self._pending = bytearray()
        self._broken = False

    @property
    def pending_bytes(self) -> int:
        """Bytes held of a message that is not complete.

        Must be 0 before a stream is handed to somebody else (TLS, a relay), or those bytes are lost, or worse,
        taken for something that was said over the secured connection (CVE-2021-23222).
        """
        return len(self._pending)

    def feed(self, chunk: bytes | bytearray | memoryview) -> list[Frame]:
        """Raises ProtocolViolationError; messages before the bad one are lost with it."""
        if self._broken:
            raise ProtocolViolationError("the stream is broken")
        data: bytes | bytearray | memoryview = chunk
        if self._pending:
            self._pending += chunk
            data = self._pending
        try:
            frames, consumed = self._split(data)
        except ProtocolViolationError:
            self._broken = True
            self._pending.clear()
            raise
        if data is self._pending:
            del self._pending[:consumed]
        else:
            self._pending += data[consumed:]
        return frames

    def _split(self, data: bytes | bytearray | memoryview) -> tuple[list[Frame], int]:
        frames: list[Frame] = []
        position, size = 0, len(data)
        while size - position >= _HEADER_BYTES:
            type_byte, length = _HEADER.unpack_from(data, position)
            payload_length = self._limits.payload_length(type_byte, length)
            end = position + _HEADER_BYTES + payload_length
            if end > size:
                break
            frames.append(Frame(bytes((type_byte,)), bytes(data[position + _HEADER_BYTES : end])))
            position = end
        return frames, position


@dataclass(frozen=True, slots=True)
class ScannedFrame:
    """A message of a wanted type, complete now. Offsets count from the start of the chunk just scanned."""

    type: bytes
    payload: bytes
    start: int
    """Where its type byte is; negative when it came with an earlier chunk."""
    end: int
    """Where the next message begins: a relay that must not pass this message on cuts before `start`."""


@dataclass(frozen=True, slots=True)
class Scan:
    types: bytes
    """The type bytes of all messages that became complete in this chunk, in order."""
    wanted: tuple[ScannedFrame, ...]


class FrameScanner:
    """Follows message boundaries over chunks of any size without keeping or copying them.

    Only payloads of the wanted types are copied; they may be no longer than `wanted_limit_bytes`, which bounds the
    memory. One pass over the headers: the cost is per message, not per byte.
    After a ProtocolViolationError the scanner is dead and raises again.
    """

    def __init__(
        self,
        wanted: Collection[bytes],
        *,
        wanted_limit_bytes: int = 64 * 1024,
        limit_bytes: int = MESSAGE_LENGTH_MAX_BYTES,
    ) -> None:
        self._wanted = frozenset(type_byte[0] for type_byte in wanted)
        self._limits = _Limits(limit_bytes, dict.fromkeys(wanted, wanted_limit_bytes))
        self._header = bytearray()  # of a message of which fewer than five bytes have come
        self._missing_bytes = 0  # of the payload of the message that we are in
        self._type = 0  # ... and its type
        self._collected: bytearray | None = None  # ... and what has come of its payload, if it is wanted
        self._start = 0  # where it began, counted from the start of the current chunk
        self._broken = False

    @property
    def at_boundary(self) -> bool:
        """True between messages: all that has been scanned is complete messages."""
        return not self._header and self._missing_bytes == 0

    def scan(self, chunk: bytes | bytearray | memoryview) -> Scan:
        """Raises ProtocolViolationError when the stream is not a sequence of messages within the limits."""
        if self._broken:
            raise ProtocolViolationError("the stream is broken")
        types = bytearray()
        found: list[ScannedFrame] = []
        try:
            self._scan(chunk, types, found)
        except ProtocolViolationError:
            self._broken = True
            self._collected = None
            raise
        self._start -= len(chunk)
        return Scan(bytes(types), tuple(found))

    def _scan(self, chunk: bytes | bytearray | memoryview, types: bytearray, found: list[ScannedFrame]) -> None:
        size = len(chunk)
        position = self._finish_started(chunk, types, found)
        # From here on messages start in this chunk; the loop touches only their headers.
        limits, wanted, unpack = self._limits.by_type, self._wanted, _HEADER.unpack_from
        last_header = size - _HEADER_BYTES
        while position <= last_header:
            type_byte, length = unpack(chunk, position)
            if not 4 <= length <= limits[type_byte] + 4:  # as _Limits.payload_length, without the call
                raise _invalid_length()
            payload_start = position + _HEADER_BYTES
            end = position + 1 + length
            if end > size:
                self._begin(type_byte, length - 4, position)
                self._advance(chunk, payload_start, size)
                return
            types.append(type_byte)
            if type_byte in wanted:
                payload = bytes(chunk[payload_start:end])
                found.append(ScannedFrame(bytes((type_byte,)), payload, position, end))
            position = end
        if position < size:
            self._start = position
            self._header += chunk[position:]

    def _finish_started(
        self, chunk: bytes | bytearray | memoryview, types: bytearray, found: list[ScannedFrame]
    ) -> int:
        """Go on with a message of an earlier chunk. Returns where in `chunk` it ends; len(chunk) if it does not."""
        position = 0
        if self._header:
            position = min(_HEADER_BYTES - len(self._header), len(chunk))
            self._header += chunk[:position]
            if len(self._header) < _HEADER_BYTES:
                return position
            type_byte, length = _HEADER.unpack(self._header)
            self._header.clear()
            self._begin(type_byte, self._limits.payload_length(type_byte, length), self._start)
        elif self._missing_bytes == 0:
            return 0
        end = min(position + self._missing_bytes, len(chunk))
        self._advance(chunk, position, end)
        if self._missing_bytes == 0:
            types.append(self._type)
            if self._collected is not None:
                frame_type = bytes((self._type,))
                found.append(ScannedFrame(frame_type, bytes(self._collected), self._start, end))
                self._collected = None
        return end

    def _begin(self, type_byte: int, payload_length: int, start: int) -> None:
        self._type, self._missing_bytes, self._start = type_byte, payload_length, start
        self._collected = bytearray() if type_byte in self._wanted else None

    def _advance(self, chunk: bytes | bytearray | memoryview, start: int, end: int) -> None:
        """chunk[start:end] belongs to the payload of the message that we are in."""
        self._missing_bytes -= end - start
        if self._collected is not None:
            self._collected += chunk[start:end]
