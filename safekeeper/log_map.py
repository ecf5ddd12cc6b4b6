"""Which pieces make up the log: the manifest that stands in the control file. A core.

The pieces follow each other without gap or overlap from the timeline's start on, or from where the log was trimmed
(trim.py); all but the last have an end. A clip
is done here, by giving a piece an earlier end and forgetting those behind it; the files themselves are never rewritten.
A piece lies on this disk, in the object store, or on both (offload.py).
What is not in the map is not part of the log, whatever lies on the disk. So a piece that vanished, or came back in an
older and shorter version, is noticed; and a clip, the adoption of a term history and the promise of a term become
durable in one atomic write.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import NamedTuple

from safekeeper.term_history import TermHistory
from safekeeper.wal_segment import PieceId
from shared.errors import CorruptedError
from shared.lsn import WAL_SEGMENT_SIZE_BYTES


class Place(enum.IntEnum):
    """Where the WAL of an extent is to be had."""

    LOCAL = 0
    BOTH = 1
    REMOTE = 2
    """In the object store only: some piece of this term that covers it, not necessarily one of this name."""


class Extent(NamedTuple):
    """The part of the log that `piece` holds: [start_lsn, end_lsn). `end_lsn` None: open, ends where its frames end."""

    piece: PieceId
    start_lsn: int
    end_lsn: int | None
    place: Place = Place.LOCAL


@dataclass(frozen=True, slots=True)
class LogMap:
    start_lsn: int
    extents: tuple[Extent, ...] = ()
    next_sequence: int = 0
    """Of the next piece. Never goes back, so no name is used twice and an old file never passes for a new one."""
    trimmed_lsn: int = 0
    """What lies before is in the pageserver's layers, and not kept as WAL any more. 0: nothing was trimmed."""

    @property
    def oldest_lsn(self) -> int:
        """Where the log begins that can be read."""
        return max(self.start_lsn, self.trimmed_lsn)

    def check(self, history: TermHistory) -> None:
        """Raises CorruptedError unless this is a map of one contiguous log that fits `history`."""
        if 0 < self.trimmed_lsn <= self.start_lsn:
            raise CorruptedError("the map of WAL pieces is trimmed before its start")
        expected: int | None = self.oldest_lsn
        for extent in self.extents:
            segment, _, sequence = extent.piece
            if extent.start_lsn != expected:
                raise CorruptedError("the map of WAL pieces has a gap or an overlap")
            limit = extent.piece.segment_end_lsn
            if extent.start_lsn // WAL_SEGMENT_SIZE_BYTES != segment or sequence >= self.next_sequence:
                raise CorruptedError("the map of WAL pieces has a piece that cannot be")
            if extent.end_lsn is not None and not extent.start_lsn < extent.end_lsn <= limit:
                raise CorruptedError("the map of WAL pieces has a piece that ends where none can")
            if extent.end_lsn is None and extent.place is not Place.LOCAL:
                raise CorruptedError("the map of WAL pieces has an open piece that is offloaded")
            last_lsn = extent.start_lsn if extent.end_lsn is None else extent.end_lsn - 1
            if {history.last_term_at(lsn) for lsn in (extent.start_lsn, last_lsn)} != {extent.piece.term}:
                raise CorruptedError("the map of WAL pieces disagrees with the term history")
            expected = extent.end_lsn
        # An open piece leaves `expected` None, which no further start equals: it can only be the last one.

    @property
    def open_extent(self) -> Extent | None:
        last = self.extents[-1] if self.extents else None
        return last if last is not None and last.end_lsn is None else None

    @property
    def local_pieces(self) -> set[PieceId]:
        """Whose files must be here."""
        return {extent.piece for extent in self.extents if extent.place is not Place.REMOTE}

    @property
    def closed_end_lsn(self) -> int:
        """How far the log surely reaches, without looking into the open piece."""
        if not self.extents:
            return self.oldest_lsn
        last = self.extents[-1]
        return last.start_lsn if last.end_lsn is None else last.end_lsn

    def closed_at(self, lsn: int) -> LogMap:
        """Everything before `lsn`, which is within the log: later pieces forgotten, the one around it cut."""
        kept = tuple(e for e in self.extents if e.start_lsn < lsn)
        if kept:
            last = kept[-1]
            end = lsn if last.end_lsn is None else min(last.end_lsn, lsn)
            kept = (*kept[:-1], last._replace(end_lsn=end))
        return replace(self, extents=kept)

    def opened(self, piece: PieceId, start_lsn: int) -> LogMap:
        """A new open piece from `start_lsn`, the end of the log, on."""
        closed = self.closed_at(start_lsn)
        return replace(
            closed,
            extents=(*closed.extents, Extent(piece, start_lsn, None)),
            next_sequence=max(self.next_sequence, piece.sequence + 1),
        )

    def replaced(self, extent: Extent, piece: PieceId) -> LogMap | None:
        """`piece` holds the same WAL as the closed `extent`, on this disk. None when there is no such extent (any
        more)."""
        if extent not in self.extents or extent.end_lsn is None:
            return None
        new = extent._replace(piece=piece, place=Place.LOCAL)
        extents = tuple(new if each == extent else each for each in self.extents)
        return replace(self, extents=extents, next_sequence=max(self.next_sequence, piece.sequence + 1))

    def placed(self, extent: Extent, place: Place) -> LogMap | None:
        """`extent` lies elsewhere now. None when there is no such extent (any more)."""
        if extent not in self.extents or extent.end_lsn is None:
            return None
        new = extent._replace(place=place)
        return replace(self, extents=tuple(new if each == extent else each for each in self.extents))

    def trimmed_at(self, lsn: int) -> LogMap:
        """Without the pieces before `lsn`, which is where one of them ends, or where the log goes on that this one is
        too far behind to be filled up."""
        kept = tuple(extent for extent in self.extents if extent.end_lsn is None or extent.end_lsn > lsn)
        return replace(self, extents=kept, trimmed_lsn=lsn)

    def find(self, lsn: int) -> int:
        """Index of the extent that holds `lsn`, which must not be before `oldest_lsn`."""
        return bisect_right(self.extents, lsn, key=lambda extent: extent.start_lsn) - 1
