"""The control file of a timeline: what must survive a crash besides the WAL itself. A core.

Written to a temporary file, fsynced, renamed over the old one, directory fsynced, before anything that depends on it is
said to anybody (files.py). It holds no secrets. Format version 4, big-endian (versions 1 to 3 are read, too)::

    offset | size | field
    -------+------+------------------------------------------------------------
    0      | 4    | magic "KLSC"
    4      | 2    | format version, 4
    6      | 2    | length of the node id, m
    8      | 20   | project id, ASCII
    28     | 19   | timeline id, ASCII
    47     | 1    | reserved, zero
    48     | 8    | system identifier (pg_control's)
    56     | 8    | timeline start LSN
    64     | 8    | term
    72     | 8    | commit LSN
    80     | 4    | sequence number of the next piece
    84     | 4    | number of term history entries, h
    88     | 4    | number of pieces, p
    92     | 8    | remote consistent LSN (not in version 1)
    100    | 4    | seat number (from version 3 on)
    104    | 4    | generation of the membership (from version 3 on)
    108    | 8    | where the log was trimmed, 0: nowhere (from version 4 on)
    116    | m    | node id, ASCII
    …      | 16 h | term u64, start LSN u64
    …      | 37 p | segment number u64, term u64, sequence u32, start LSN u64, end LSN u64 (2^64-1: open), place u8
           |      | (0: on this disk, 1: in the object store, too, 2: there only; not in version 1)
    …      | 4    | CRC-32C of everything before
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Self

import google_crc32c

from safekeeper.acceptor import AcceptorState
from safekeeper.log_map import Extent, LogMap, Place
from safekeeper.term_history import TermHistory
from safekeeper.wal_segment import PieceId
from shared.errors import CorruptedError, IntegrityError, InvalidInputError
from shared.ids import ProjectId, TimelineId

MAGIC: Final = b"KLSC"
FORMAT_VERSION: Final = 4
FILE_NAME: Final = "control"
_FIXED: Final = struct.Struct(">4sHH20s19sxQQQQIII")
_ENTRY: Final = struct.Struct(">QQ")
_EXTENT: Final = struct.Struct(">QQIQQB")
_EXTENT_1: Final = struct.Struct(">QQIQQ")
_REMOTE_CONSISTENT: Final = struct.Struct(">Q")
_MEMBER: Final = struct.Struct(">II")
_TRIMMED: Final = struct.Struct(">Q")
_CRC: Final = struct.Struct(">I")
_OPEN: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class ControlState:
    node_id: str
    project_id: ProjectId
    timeline_id: TimelineId
    system_identifier: int
    acceptor: AcceptorState
    log: LogMap
    remote_consistent_lsn: int = 0
    """The pageserver has everything below in layers that are durable; may be more than commit_lsn. A hint that may
    lag, as that one."""

    def end_of_log(self, open_piece_end_lsn: int | None) -> int:
        """Where the log ends, given where the good frames of the open piece (None: there is none) end.

        Raises CorruptedError for more WAL of a term than its history allows, IntegrityError when WAL that was committed
        is missing: such a log must not vote.
        """
        flush_lsn = self.log.closed_end_lsn
        extent = self.log.open_extent
        if extent is not None and open_piece_end_lsn is not None:
            flush_lsn = open_piece_end_lsn
            last_lsn = max(extent.start_lsn, flush_lsn - 1)
            if self.acceptor.history.last_term_at(last_lsn) != extent.piece.term:
                raise CorruptedError("the log has more WAL of a term than its history allows")
        if flush_lsn < self.acceptor.commit_lsn:
            raise IntegrityError("WAL that was committed is missing from the log")
        return flush_lsn

    def serialize(self) -> bytes:
        node_id = self.node_id.encode("ascii")
        parts = [
            _FIXED.pack(
                MAGIC,
                FORMAT_VERSION,
                len(node_id),
                str(self.project_id).encode("ascii"),
                str(self.timeline_id).encode("ascii"),
                self.system_identifier,
                self.acceptor.timeline_start_lsn,
                self.acceptor.term,
                self.acceptor.commit_lsn,
                self.log.next_sequence,
                len(self.acceptor.history.entries),
                len(self.log.extents),
            ),
            _REMOTE_CONSISTENT.pack(self.remote_consistent_lsn),
            _MEMBER.pack(self.acceptor.seat, self.acceptor.generation),
            _TRIMMED.pack(self.log.trimmed_lsn),
            node_id,
        ]
        parts += (_ENTRY.pack(*entry) for entry in self.acceptor.history.entries)
        parts += (
            _EXTENT.pack(*e.piece, e.start_lsn, _OPEN if e.end_lsn is None else e.end_lsn, e.place)
            for e in self.log.extents
        )
        body = b"".join(parts)
        return body + _CRC.pack(google_crc32c.value(body))

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Raises CorruptedError for anything but what `serialize` makes of a state that can be."""
        if len(data) < _FIXED.size + _CRC.size:
            raise CorruptedError("the control file is too short")
        body = data[: -_CRC.size]
        if google_crc32c.value(body) != _CRC.unpack_from(data, len(body))[0]:
            raise CorruptedError("the control file has a wrong CRC")
        magic, version, name_length, project, timeline, system_identifier, start_lsn, term, commit_lsn, *counts = (
            _FIXED.unpack_from(body)
        )
        if magic != MAGIC or not 1 <= version <= FORMAT_VERSION:
            raise CorruptedError("not a control file of a version that we know")
        next_sequence, history_length, pieces = counts
        name_at, extent_format = _FIXED.size, _EXTENT_1
        remote_consistent_lsn = 0
        if version != 1:
            name_at, extent_format = _FIXED.size + _REMOTE_CONSISTENT.size, _EXTENT
            if len(body) < name_at:
                raise CorruptedError("the control file is too short")
            (remote_consistent_lsn,) = _REMOTE_CONSISTENT.unpack_from(body, _FIXED.size)
        seat = generation = trimmed_lsn = 0
        if version >= 3:
            if len(body) < name_at + _MEMBER.size:
                raise CorruptedError("the control file is too short")
            seat, generation = _MEMBER.unpack_from(body, name_at)
            name_at += _MEMBER.size
        if version >= 4:
            if len(body) < name_at + _TRIMMED.size:
                raise CorruptedError("the control file is too short")
            (trimmed_lsn,) = _TRIMMED.unpack_from(body, name_at)
            name_at += _TRIMMED.size
        history_at = name_at + name_length
        extents_at = history_at + history_length * _ENTRY.size
        if len(body) != extents_at + pieces * extent_format.size:
            raise CorruptedError("the control file has another length than it says")
        try:
            history = TermHistory.of(_ENTRY.iter_unpack(body[history_at:extents_at]))
            found = cls(
                body[name_at:history_at].decode("ascii"),
                ProjectId.parse(project.decode("ascii")),
                TimelineId.parse(timeline.decode("ascii")),
                system_identifier,
                AcceptorState(start_lsn, term, history, commit_lsn, seat, generation),
                LogMap(start_lsn, tuple(_extents(extent_format, body[extents_at:])), next_sequence, trimmed_lsn),
                remote_consistent_lsn,
            )
        except (ValueError, InvalidInputError):
            raise CorruptedError("the control file holds values that cannot be") from None
        if history.last_term > term or (history.entries and history.entries[0].start_lsn != start_lsn):
            raise CorruptedError("the control file's term history does not fit its term or its start")
        if trimmed_lsn > commit_lsn:
            raise CorruptedError("the control file says that WAL was trimmed which is not committed")
        found.log.check(history)
        if version == FORMAT_VERSION and found.serialize() != data:
            raise CorruptedError("the control file has bytes where none belong")
        return found


def _extents(form: struct.Struct, data: bytes) -> list[Extent]:
    """Raises ValueError for a place that there is not."""
    found = []
    for segment, term, sequence, start, end, *place in form.iter_unpack(data):
        where = Place(place[0]) if place else Place.LOCAL
        found.append(Extent(PieceId(segment, term, sequence), start, None if end == _OPEN else end, where))
    return found
