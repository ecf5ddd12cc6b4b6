"""WAL by LSN: what a safekeeper serves to the pageserver and to its peers, in frames of `shared.wire.frames`.

    type | direction | payload (big-endian)
    -----+-----------+----------------------------------------------------------------------------------------
    0x10 | → server  | SUBSCRIBE: project id (20 ASCII), timeline id (19 ASCII), start u64, end u64 (0 = follow), flags
    u8
    0x20 | → client  | WAL: lsn u64 of the first byte, then the bytes; contiguous from `start`
    0x21 | → client  | STATUS: term u64, last_log_term u64, flush_lsn u64, commit_lsn u64, remote_consistent_lsn u64,
         |           | oldest_lsn u64; at once, and on every change
    0x22 | → client  | END: the range up to `end` was sent; nothing follows
    0x23 | → server  | FEEDBACK: commit_lsn u64, remote_consistent_lsn u64, ingested_lsn u64; each 0: not said

WAL is sent up to the server's own flush_lsn: what a quorum holds is for the client to find out from the STATUS of all
safekeepers. A server that votes for a new term, or clips its log, ends every subscription, so that a client never
mixes two histories on one connection.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from shared.ids import ProjectId, TimelineId
from shared.wire.frames import ProtocolError, pack_frame

SUBSCRIBE: Final = 0x10
WAL: Final = 0x20
STATUS: Final = 0x21
END: Final = 0x22
FEEDBACK: Final = 0x23

MAX_FRAME_SIZE_BYTES: Final = 4 * 1024 * 1024
_SUBSCRIBE: Final = struct.Struct(">20s19sQQB")
_STATUS: Final = struct.Struct(">QQQQQQ")
_FEEDBACK: Final = struct.Struct(">QQQ")
_LSN: Final = struct.Struct(">Q")


class SubscribeFlags(enum.IntFlag):
    NONE = 0
    STATUS_ONLY = 1
    """Send no WAL, only STATUS: the client takes the bytes from another safekeeper."""


@dataclass(frozen=True, slots=True)
class Subscribe:
    project_id: ProjectId
    timeline_id: TimelineId
    start: int
    end: int
    flags: SubscribeFlags

    def pack(self) -> bytes:
        payload = _SUBSCRIBE.pack(
            str(self.project_id).encode(), str(self.timeline_id).encode(), self.start, self.end, self.flags
        )
        return pack_frame(SUBSCRIBE, payload)

    @classmethod
    def parse(cls, payload: bytes) -> Subscribe:
        """Raises ProtocolError."""
        try:
            project, timeline, start, end, flags = _SUBSCRIBE.unpack(payload)
            return cls(
                ProjectId.parse(project.decode("ascii")),
                TimelineId.parse(timeline.decode("ascii")),
                start,
                end,
                SubscribeFlags(flags),
            )
        except (struct.error, ValueError):
            raise ProtocolError("malformed SUBSCRIBE") from None


@dataclass(frozen=True, slots=True)
class Status:
    term: int
    last_log_term: int
    flush_lsn: int
    commit_lsn: int
    remote_consistent_lsn: int = 0
    """The highest that a pageserver has said, as far as it is remembered."""
    oldest_lsn: int = 0
    """Where the log begins that can be read."""

    def pack(self) -> bytes:
        fields = (self.term, self.last_log_term, self.flush_lsn, self.commit_lsn, self.remote_consistent_lsn)
        return pack_frame(STATUS, _STATUS.pack(*fields, self.oldest_lsn))

    @classmethod
    def parse(cls, payload: bytes) -> Status:
        """Raises ProtocolError."""
        try:
            return cls(*_STATUS.unpack(payload))
        except struct.error:
            raise ProtocolError("malformed STATUS") from None


@dataclass(frozen=True, slots=True)
class Feedback:
    commit_lsn: int
    remote_consistent_lsn: int
    ingested_lsn: int = 0

    def pack(self) -> bytes:
        return pack_frame(FEEDBACK, _FEEDBACK.pack(self.commit_lsn, self.remote_consistent_lsn, self.ingested_lsn))

    @classmethod
    def parse(cls, payload: bytes) -> Feedback:
        """Raises ProtocolError."""
        try:
            return cls(*_FEEDBACK.unpack(payload))
        except struct.error:
            raise ProtocolError("malformed FEEDBACK") from None


def pack_wal(lsn: int, data: bytes | memoryview) -> bytes:
    return pack_frame(WAL, _LSN.pack(lsn), data)


def parse_wal(payload: bytes) -> tuple[int, memoryview]:
    """(LSN of the first byte, bytes). Raises ProtocolError."""
    if len(payload) <= _LSN.size:
        raise ProtocolError("malformed WAL frame")
    return _LSN.unpack_from(payload)[0], memoryview(payload)[_LSN.size :]
