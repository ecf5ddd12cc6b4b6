"""Which WAL is committed, from what the safekeepers say. A core.

A byte is committed when a majority of safekeepers hold it flushed *in the same history*, and that history is the one
of the term that they are all in. Logs whose last entry has the same term are prefixes of each other (log matching, Raft
§5.3). That alone is not enough: WAL of an older term that a majority happens to hold, while a newer term is being
elected, may still lose to a third log (Raft §5.4.2, figure 8). So a safekeeper counts only while `last_log_term ==
term`: it has adopted the history of the newest term that it voted for, and what it holds is of that history.

A position says nothing without its term. What a quorum holds may end inside of a record, and the next term cuts that
half off and has other bytes there, which nobody but one safekeeper may hold yet. So a later term's position takes the
place of an earlier one's even when it is lower, and is about the logs of its own term alone (ADR 50).

Safekeepers are told apart by name, not by disk. One that has adopted a term's history has voted for that term, as a
member of the one membership that the term is asked for in: so those of one term are members of one membership, and a
disk that was replaced, which votes no more, stays in a term that the others have left (ADR 50).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from shared.wire.walstream import Status


def majority(members: int) -> int:
    return members // 2 + 1


@dataclass(frozen=True, slots=True, order=True)
class Committed:
    """Everything below `lsn` is committed, in the history of `term`. The later term is the greater one."""

    term: int
    lsn: int

    def is_agreed_by(self, status: Status) -> bool:
        """Is what this safekeeper has below `lsn` what is committed there?

        It is while it is in that term, with that history. One that did not hear of the election may have other bytes at
        these positions; so may one that has voted for a later term and does not know the result yet; and one that knows
        it may have others in place of the last half record.
        """
        return status.term == status.last_log_term == self.term


NOTHING_COMMITTED = Committed(0, 0)


def committed(statuses: Iterable[Status], quorum: int) -> Committed:
    """Largest position up to which `quorum` safekeepers of one term hold that term's log."""
    by_term: defaultdict[int, list[int]] = defaultdict(list)
    for status in statuses:
        if status.term == status.last_log_term:
            by_term[status.term].append(status.flush_lsn)
    return max(
        (Committed(t, sorted(held, reverse=True)[quorum - 1]) for t, held in by_term.items() if len(held) >= quorum),
        default=NOTHING_COMMITTED,
    )
