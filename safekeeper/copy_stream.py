"""WAL out of a copy-both stream, with as little work per commit as Python allows. A core.

The same framing as `shared.wire.pgframing` and the same messages as `shared.wire.replication` (a test holds them
against each other), but over one fixed buffer that the socket reads into, and without an object per message: what a
synchronous commit waits for is mostly this loop.

    buffer   [ consumed | complete messages … | a part of one | free ]
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from shared.wire.buffer import ProtocolViolationError
from shared.wire.replication import XLOG_DATA_HEADER_BYTES, PrimaryKeepalive

BUFFER_SIZE_BYTES: Final = 1024 * 1024
"""One buffer's worth of WAL fits into one sealed frame. A walsender sends at most 128 KiB in a message."""

_HEADER: Final = struct.Struct(">BI")
_XLOG_DATA: Final = struct.Struct(">BQQq")
_COPY_DATA: Final = ord("d")
_XLOG_DATA_TYPE: Final = ord("w")
_STREAM_ENDS: Final = frozenset(b"cCEZ")
_ASIDES: Final = frozenset(b"NS")


@dataclass(slots=True)
class Received:
    """What `CopyStreamReader.take` found."""

    data: bytearray
    """WAL, contiguous from where the last one ended; may be empty."""
    reply_requested: bool
    ended: bool
    """The server ends the stream (shutdown or error); nothing behind that was looked at."""


class CopyStreamReader:
    """Read into `free`, tell `received` how much, then `take`."""

    __slots__ = ("_buffer", "_end", "_view", "expected_lsn")

    def __init__(self, start_lsn: int) -> None:
        self.expected_lsn = start_lsn
        self._buffer = bytearray(BUFFER_SIZE_BYTES)
        self._view = memoryview(self._buffer)
        self._end = 0

    @property
    def free(self) -> memoryview:
        """Where to read into next; never empty."""
        return self._view[self._end :]

    def received(self, size_bytes: int) -> None:
        self._end += size_bytes

    def take(self) -> Received:
        """Everything complete. Raises ProtocolViolationError: WAL that is not contiguous, or bytes that do not belong
        here; the stream is of no use any more then."""
        buffer, view, end = self._buffer, self._view, self._end
        position = 0
        expected = self.expected_lsn
        parts: list[memoryview] = []
        reply_requested = ended = False
        while end - position >= _HEADER.size:
            kind, length = _HEADER.unpack_from(buffer, position)
            message_end = position + 1 + length
            if length < 4 or message_end - position > BUFFER_SIZE_BYTES:
                raise ProtocolViolationError("invalid message length")
            if message_end > end:
                break
            start = position + _HEADER.size
            position = message_end
            if kind == _COPY_DATA:
                if start < message_end and buffer[start] == _XLOG_DATA_TYPE:
                    if message_end - start < XLOG_DATA_HEADER_BYTES:
                        raise ProtocolViolationError("XLogData is shorter than its header")
                    _, lsn, _, _ = _XLOG_DATA.unpack_from(buffer, start)
                    if lsn != expected:
                        raise ProtocolViolationError("the compute's WAL has a gap or rewrites what was sent")
                    part = view[start + XLOG_DATA_HEADER_BYTES : message_end]
                    expected += len(part)
                    parts.append(part)
                else:
                    reply_requested |= PrimaryKeepalive.parse(bytes(view[start:message_end])).reply_requested
            elif kind in _STREAM_ENDS:
                ended = True
                break
            elif kind not in _ASIDES:
                raise ProtocolViolationError("unexpected message in a replication stream")
        if expected >= 1 << 64:
            raise ProtocolViolationError("WAL runs past the end of the LSN space")
        data = bytearray().join(parts)
        rest = end - position
        if rest:
            buffer[:rest] = buffer[position:end]
        self._end = rest
        self.expected_lsn = expected
        return Received(data, reply_requested, ended)
