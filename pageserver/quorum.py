"""Which WAL is committed, from what the safekeepers say. A core.

A byte is committed when a majority of safekeepers hold it flushed *in the same history*, and that history is the one
of the term that they are all in. Logs whose last entry has the same term are prefixes of each other (log matching, Raft
§5.3). That alone is not enough: WAL of an older term that a majority happens to hold, while a newer term is being
elected, may still lose to a third log (Raft §5.4.2, figure 8). So a safekeeper counts only while `last_log_term ==
term`: it has adopted the history of the newest term that it voted for, and what it holds is of that history.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from shared.wire.walstream import Status


def majority(members: int) -> int:
    return members // 2 + 1


@dataclass(frozen=True, slots=True)
class Committed:
    """Everything below `lsn` is committed, in the history of `term`."""

    term: int
    lsn: int

    def is_agreed_by(self, status: Status) -> bool:
        """Is this safekeeper in that term, with that history?"""
        return status.term == status.last_log_term == self.term

    def is_held_by(self, status: Status) -> bool:
        """Is what this safekeeper has below `lsn` what is committed there?

        Of its own term's log, and not of an older term than this: a later log begins with all that was committed. One
        that did not hear of the newer election may have other bytes at these positions, and so may one that has voted
        and does not know the result yet.
        """
        return status.term == status.last_log_term and status.term >= self.term


NOTHING_COMMITTED = Committed(0, 0)


def committed(statuses: Iterable[Status], quorum: int) -> Committed:
    """Largest position up to which `quorum` safekeepers of one term hold that term's log."""
    by_term: defaultdict[int, list[int]] = defaultdict(list)
    for status in statuses:
        if status.term == status.last_log_term:
            by_term[status.term].append(status.flush_lsn)
    return max(
        (Committed(t, sorted(held, reverse=True)[quorum - 1]) for t, held in by_term.items() if len(held) >= quorum),
        key=lambda c: c.lsn,
        default=NOTHING_COMMITTED,
    )
