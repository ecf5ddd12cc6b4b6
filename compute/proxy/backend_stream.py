"""What a compute sends to its client, cut where a session may end. A core.

The proxy does not take part in the conversation, but it must be able to end it cleanly, and there is one thing that a
client must never hear.

**Ending.** An ErrorResponse can only be sent between messages. So what goes on to the client is whole messages: the
beginning of one that is not complete is held back. Messages above HOLD_LIMIT_BYTES are passed on as they come, to
bound the memory; a session that ends in the middle of one of these ends without a word.

**Cancelled commits.** When the wait for the quorum is cancelled (a cancel request, statement_timeout,
pg_terminate_backend), Postgres sends a WARNING. Stock Postgres then reports success, although the commit may exist on
the compute only (SyncRepWaitForLSN in syncrep.c); a compute's goes on waiting (compute/guard), and the client, which
does not want to, is told that nobody knows yet. So from that WARNING on nothing is passed on. It is recognised by its
text (lc_messages is C there), or by the field R, which holds the C function's name.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from shared.wire.buffer import ProtocolViolationError
from shared.wire.pgframing import MESSAGE_LENGTH_MAX_BYTES
from shared.wire.pgproto import BackendKeyData, NoticeResponse

HOLD_LIMIT_BYTES: Final = 64 * 1024

_HEADER: Final = struct.Struct(">BI")
_HEADER_BYTES: Final = 5
_ERROR: Final = ord("E")
_KEY_DATA: Final = ord("K")
_NOTICE: Final = ord("N")
_READY: Final = ord("Z")
_IDLE: Final = ord("I")
_LENGTH_MAX: Final = MESSAGE_LENGTH_MAX_BYTES + 4
_ROUTINE: Final = b"\0RSyncRepWaitForLSN\0"
_TEXTS: Final = (
    b"\0Mcanceling wait for synchronous replication",
    b"\0Mcanceling the wait for synchronous replication",
)


@dataclass(frozen=True, slots=True)
class Passed:
    """What to do with a chunk."""

    data: bytes
    """Whole messages, to be passed on."""
    key_data: BackendKeyData | None = None
    """Comes instead of being in `data`; the client gets another one, before `after_key_data`."""
    after_key_data: bytes = b""
    cancelled_wait: bytes = b""
    """The WARNING that says that a commit may not be durable, whole. Nothing behind it may be passed on."""


def is_cancelled_wait(notice: bytes) -> bool:
    """`notice`: a whole NoticeResponse."""
    if _ROUTINE in notice:
        return True
    # The first field starts right behind the length; from the second on, a zero byte stands before each.
    fields = b"\0" + notice[_HEADER_BYTES:]
    return any(text in fields for text in _TEXTS)


class BackendStream:
    """Feed chunks in order. After `cancelled_wait`, or an error, do not feed any more."""

    __slots__ = ("_held", "_hold_limit_bytes", "_status", "_through_bytes", "last_type", "logged_in")

    def __init__(self, hold_limit_bytes: int = HOLD_LIMIT_BYTES) -> None:
        self._hold_limit_bytes = hold_limit_bytes
        self._held = b""  # the beginning of a message
        self._through_bytes = 0  # missing of a long message that is passed on as it comes
        self._status = 0  # of the last ReadyForQuery, if that is the last message
        self.last_type = 0
        """Type byte of the last complete message."""
        self.logged_in = False
        """The first ReadyForQuery has come."""

    @property
    def at_boundary(self) -> bool:
        """All that was passed on is whole messages: another one may follow."""
        return self._through_bytes == 0

    @property
    def ready(self) -> bool:
        """Postgres waits for a statement, and all that it said was passed on."""
        return self.last_type == _READY and not self._held and self._through_bytes == 0

    @property
    def idle(self) -> bool:
        """The same, outside of any transaction."""
        return self.ready and self._status == _IDLE

    @property
    def said_goodbye(self) -> bool:
        """The last message was an error. A FATAL one, if the connection ends behind it."""
        return self.last_type == _ERROR and not self._held and self._through_bytes == 0

    def feed(self, chunk: bytes) -> Passed:
        """Raises ProtocolViolationError when it is not a sequence of messages."""
        head = b""
        if self._through_bytes:
            if len(chunk) <= self._through_bytes:
                self._through_bytes -= len(chunk)
                return Passed(chunk)
            head, chunk = chunk[: self._through_bytes], chunk[self._through_bytes :]
            self._through_bytes = 0
        data = self._held + chunk if self._held else chunk
        passed = self._split(data) if self.logged_in else self._split_login(data)
        if head:
            return Passed(head + passed.data, passed.key_data, passed.after_key_data, passed.cancelled_wait)
        return passed

    def _split(self, data: bytes) -> Passed:
        # The hot loop: one pass over the headers; a chunk of whole messages is passed on without a copy.
        unpack, position, size, last = _HEADER.unpack_from, 0, len(data), self.last_type
        while size - position >= _HEADER_BYTES:
            kind, length = unpack(data, position)
            if length < 4 or length > _LENGTH_MAX:
                raise ProtocolViolationError("invalid message length")
            end = position + 1 + length
            if end > size:
                break
            if kind == _NOTICE and is_cancelled_wait(data[position:end]):
                return Passed(data[:position], cancelled_wait=data[position:end])
            last = kind
            position = end
        self.last_type = last
        if position and last == _READY:
            self._status = data[position - 1]
        return Passed(self._hold(data, position))

    def _split_login(self, data: bytes) -> Passed:
        """As `_split`, until the first ReadyForQuery, and looking for the cancel key."""
        before, key_data, position, size = b"", None, 0, len(data)
        start = 0
        while size - position >= _HEADER_BYTES and not self.logged_in:
            kind, length = _HEADER.unpack_from(data, position)
            if length < 4 or length > _LENGTH_MAX:
                raise ProtocolViolationError("invalid message length")
            end = position + 1 + length
            if end > size:
                break
            if kind == _KEY_DATA:
                if key_data is not None:
                    raise ProtocolViolationError("a second cancel key")
                key_data = BackendKeyData.parse(data[position + _HEADER_BYTES : end])
                before, start = data[:position], end
            self.logged_in = kind == _READY
            self.last_type, self._status = kind, data[end - 1]
            position = end
        if self.logged_in and position < size:
            rest = self._split(data[position:])
            tail = data[start:position] + rest.data
            wait = rest.cancelled_wait
        else:
            tail, wait = self._hold(data, position)[start:], b""
        if key_data is None:
            return Passed(tail, cancelled_wait=wait)
        return Passed(before, key_data, tail, wait)

    def _hold(self, data: bytes, position: int) -> bytes:
        """What of `data` may be passed on, given that the message at `position` is not complete."""
        if position == len(data):
            self._held = b""
            return data
        if len(data) - position >= _HEADER_BYTES:
            _, length = _HEADER.unpack_from(data, position)
            if length > self._hold_limit_bytes:
                self._held = b""
                self._through_bytes = position + 1 + length - len(data)
                self.last_type = data[position]
                return data
        self._held = data[position:]
        return data[:position]

    @staticmethod
    def notice(message: bytes) -> NoticeResponse:
        """For tests and logs. Raises ProtocolViolationError."""
        return NoticeResponse.parse(message[_HEADER_BYTES:])
