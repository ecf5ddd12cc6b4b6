"""Which term wrote which part of the log, and where two logs part ways. A core.

A history is a list of (term, start): from `start` on, up to the next entry's start, the log was written in `term`.
Terms rise strictly; starts never fall (a leader that wrote nothing leaves an empty part). Two safekeepers that have an
entry of the same term have the same start for it and the same bytes in it, as far as both have any: a term has one
leader and a leader has one log ("log matching", Raft §5.3; Neon's docs/rfcs/013-term-history.md).

Positions are plain integers; ranges are half-open.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from shared.errors import ConflictError, InvalidInputError

MAX_TERM = (1 << 64) - 1


class TermEntry(NamedTuple):
    term: int
    start_lsn: int


class TermRange(NamedTuple):
    """A part of the log that was written in one term."""

    term: int
    start_lsn: int
    end_lsn: int


@dataclass(frozen=True, slots=True)
class TermHistory:
    """Immutable; empty before the first election."""

    entries: tuple[TermEntry, ...] = ()

    @classmethod
    def of(cls, entries: Iterable[tuple[int, int]]) -> TermHistory:
        """Raises InvalidInputError for a history that no log can have."""
        history = tuple(TermEntry(term, start) for term, start in entries)
        for term, start in history:
            if not 1 <= term <= MAX_TERM or not 0 <= start < 1 << 64:
                raise InvalidInputError("a term history entry is out of range")
        for earlier, later in pairwise(history):
            if later.term <= earlier.term or later.start_lsn < earlier.start_lsn:
                raise InvalidInputError("a term history must have rising terms and positions")
        return cls(history)

    @property
    def last_term(self) -> int:
        """0 for an empty history."""
        return self.entries[-1].term if self.entries else 0

    def up_to(self, lsn: int) -> TermHistory:
        """The entries that a log which ends at `lsn` has reached. One that starts exactly there counts: its leader was
        elected on top of just this log."""
        return TermHistory(tuple(entry for entry in self.entries if entry.start_lsn <= lsn))

    def last_term_at(self, lsn: int) -> int:
        """The term of the end of a log that ends at `lsn`: the last one that it has reached. 0 for none."""
        return next((entry.term for entry in reversed(self.entries) if entry.start_lsn <= lsn), 0)

    def start_of(self, term: int) -> int | None:
        return next((entry.start_lsn for entry in self.entries if entry.term == term), None)

    def ranges(self, start_lsn: int, end_lsn: int) -> list[TermRange]:
        """[start_lsn, end_lsn) cut where the term changes, empty parts left out.

        Raises InvalidInputError when the history does not reach back to `start_lsn`.
        """
        if end_lsn <= start_lsn:
            return []
        if not self.entries or start_lsn < self.entries[0].start_lsn:
            raise InvalidInputError("the term history begins behind this part of the log")
        found = []
        ends = [entry.start_lsn for entry in self.entries[1:]] + [end_lsn]
        for entry, next_start in zip(self.entries, ends, strict=True):
            start, end = max(entry.start_lsn, start_lsn), min(next_start, end_lsn)
            if start < end:
                found.append(TermRange(entry.term, start, end))
        return found

    def common_point(self, own: TermHistory, own_start_lsn: int, own_flush_lsn: int) -> int:
        """How far the log of `own`, which is [own_start_lsn, own_flush_lsn), agrees with the log that this history
        (a new leader's) describes.

        As `find_highest_common_point` of Neon's safekeeper.rs: the last term that both have, up to where the first of
        the two left it. Raises ConflictError when the two give one term two starts, which cannot happen while every
        term has one leader.
        """
        mine = own.up_to(own_flush_lsn).entries
        common = 0
        for leader, follower in zip(self.entries, mine, strict=False):
            if leader.term != follower.term:
                break
            if leader.start_lsn != follower.start_lsn:
                raise ConflictError(f"term {leader.term} begins at two places: it had two leaders")
            common += 1
        if common == 0:
            return own_start_lsn
        leader_end = self.entries[common].start_lsn if common < len(self.entries) else own_flush_lsn
        own_end = mine[common].start_lsn if common < len(mine) else own_flush_lsn
        return min(leader_end, own_end, own_flush_lsn)
