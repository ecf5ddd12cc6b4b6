"""What a safekeeper's files say without any key: for people who look at a disk, or at an object store. A core.

Nothing here needs a key, and nothing here can say that bytes are genuine: checksums only say that they are whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from safekeeper.control_file import ControlState
from safekeeper.wal_segment import MAX_FRAME_SIZE_BYTES, FrameIndex, PieceHeader, next_frame_length
from shared.crypto.aead import Buffer
from shared.crypto.envelope import Envelope
from shared.lsn import WAL_SEGMENT_SIZE_BYTES, Lsn

MAX_PIECE_SIZE_BYTES: Final = WAL_SEGMENT_SIZE_BYTES * 64
"""Of a segment in frames of a byte each, more or less; a larger file is no piece."""


@dataclass(frozen=True, slots=True)
class PieceReport:
    """Of one WAL piece. `frames` are those whose headers are whole and follow each other from the beginning."""

    segment_number: int
    term: int
    sequence: int
    suite: str
    start_lsn: Lsn
    end_lsn: Lsn
    frames: int
    largest_frame_bytes: int
    smallest_frame_bytes: int
    sealed_size_bytes: int
    """Header and frames."""
    behind_bytes: int
    """That are not zero, behind the last whole frame: a torn frame, or damage."""
    kek_version: int | None
    dek_version: int | None


def describe_piece(data: Buffer, envelope: Envelope | None) -> PieceReport:
    """Raises CorruptedError when it does not begin as a piece does; IntegrityError for a suite that is refused."""
    header = PieceHeader.parse(data)
    index = whole_frames(data, header)
    sizes = [index.lsns[n + 1] - index.lsns[n] for n in range(index.frames)]
    behind = bytes(memoryview(data)[index.end_offset :]).rstrip(b"\0")
    return PieceReport(
        segment_number=header.piece.segment_number,
        term=header.piece.term,
        sequence=header.piece.sequence,
        suite=header.suite.name,
        start_lsn=Lsn(header.start_lsn),
        end_lsn=Lsn(index.end_lsn),
        frames=index.frames,
        largest_frame_bytes=max(sizes, default=0),
        smallest_frame_bytes=min(sizes, default=0),
        sealed_size_bytes=index.end_offset,
        behind_bytes=len(behind),
        kek_version=None if envelope is None else envelope.kek_version,
        dek_version=None if envelope is None else envelope.dek_version,
    )


def whole_frames(data: Buffer, header: PieceHeader) -> FrameIndex:
    """Those whose headers are intact and follow each other from the beginning. Whether they are genuine shows when they
    are opened."""
    index = FrameIndex.empty(header.start_lsn)
    while index.end_lsn < header.piece.segment_end_lsn:
        length = next_frame_length(data, index)
        if length is None or index.end_lsn + length > header.piece.segment_end_lsn:
            break
        index.append(length)
    return index


def may_be_torn(report: PieceReport) -> bool:
    """Can a crash while one frame was being written have left this?"""
    return 0 < report.behind_bytes <= MAX_FRAME_SIZE_BYTES


@dataclass(frozen=True, slots=True)
class ControlReport:
    node_id: str
    project_id: str
    timeline_id: str
    system_identifier: int
    term: int
    start_lsn: Lsn
    oldest_lsn: Lsn
    """Where what is kept of the log begins."""
    commit_lsn: Lsn
    remote_consistent_lsn: Lsn
    seat: int
    generation: int
    term_history: list[tuple[int, Lsn]]
    pieces: list[tuple[str, Lsn, Lsn | None, str]]
    """(file name, start, end or None for the open one, where it lies)."""


def describe_control(data: bytes) -> ControlReport:
    """Raises CorruptedError."""
    state = ControlState.parse(data)
    acceptor = state.acceptor
    return ControlReport(
        node_id=state.node_id,
        project_id=str(state.project_id),
        timeline_id=str(state.timeline_id),
        system_identifier=state.system_identifier,
        term=acceptor.term,
        start_lsn=Lsn(state.log.start_lsn),
        oldest_lsn=Lsn(state.log.oldest_lsn),
        commit_lsn=Lsn(acceptor.commit_lsn),
        remote_consistent_lsn=Lsn(state.remote_consistent_lsn),
        seat=acceptor.seat,
        generation=acceptor.generation,
        term_history=[(entry.term, Lsn(entry.start_lsn)) for entry in acceptor.history.entries],
        pieces=[
            (
                extent.piece.file_name,
                Lsn(extent.start_lsn),
                None if extent.end_lsn is None else Lsn(extent.end_lsn),
                extent.place.name.lower(),
            )
            for extent in state.log.extents
        ],
    )
