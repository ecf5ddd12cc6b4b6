"""The proposer of an election: which votes win, whose log counts, and where the new term's log begins.

Theory of operation (architecture.md §5; Neon `walproposer.c`, RFC 013). Committed means flushed by a majority of the
configured safekeepers. The candidate picks a term that is higher than any it has seen and asks everybody for a vote. A
safekeeper votes once per term, drops the stream of the older compute before it answers, and answers with its log's term
history and flush position. Any majority of votes shares a member with the majority that flushed a committed record, and
after the vote no old compute can find another majority. So the log that is most advanced among the voters, by
*(last_log_term, flush_lsn)*, holds everything that was ever committed:

  * within one term logs are prefixes of one another, because one compute wrote them all: the longer holds the shorter;
  * a log of a later term starts from a log that its own election chose: it holds everything committed before.

flush_lsn alone would choose a long log of an old term, whose tail nobody committed, over a short one of a new term.

The chosen log ends where its last complete record ends. That is the new `start_lsn`; what is behind it is half a record
that nobody can have acknowledged. The new history is the donor's up to there, and {term, start_lsn}.

This file is a core: no I/O.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from shared.api.safekeeper import TermStart, TimelineStatus, VoteResponse
from shared.errors import ConflictError, IntegrityError, UnavailableError
from shared.lsn import ZERO_LSN, Lsn


def majority(nodes: int) -> int:
    """How many of `nodes` safekeepers are a quorum: any two quorums share one."""
    if nodes < 1:
        raise ValueError("a quorum needs somebody")
    return nodes // 2 + 1


def next_term(seen: Iterable[int]) -> int:
    """Higher than every term that was seen; 1 when there was none."""
    return max(seen, default=0) + 1


def check_members(told: Collection[str], members: Collection[str]) -> None:
    """Raises ConflictError when the safekeepers in the settings are not those that have the timeline.

    A member that has it and is not asked any more may hold, with one other, what was committed; and who has taken its
    place would vote without it. A new disk takes a member's place under its name (docs/consensus.md).
    """
    strangers = sorted(set(told) - set(members))
    if strangers:
        raise ConflictError(
            f"this timeline's WAL is on {', '.join(strangers)}, which the settings do not name any more:"
            " name it again; if it is lost, a new one takes its place under its name (keylake safekeeper replace)"
        )


@dataclass(frozen=True, slots=True)
class Membership:
    """Which disks the members are, as a candidate read it together with its term."""

    generation: int = 0
    """One more for each attempt to replace a disk; who has voted in it votes in no earlier one."""
    seats: Mapping[str, int] = field(default_factory=dict)
    """Node → number of its disk; 0 for those that are not named."""

    def seat(self, node_id: str) -> int:
        return self.seats.get(node_id, 0)


@dataclass(frozen=True, slots=True)
class Reservation:
    """A term that nobody else asks for, and the membership that it is asked for in.

    Invariant: both are read in one step, in the order of terms. So whoever reserves a term after a replacement knows of
    it, and a replacement does not happen after somebody has reserved a later term than its own.
    """

    term: int
    membership: Membership = field(default_factory=Membership)


class Outcome(enum.Enum):
    PENDING = "pending"
    WON = "won"
    LOST = "lost"
    """A majority can no longer be reached in this term."""


@dataclass(slots=True)
class Tally:
    """The votes of one term. Feed it answers (`record`) and failures (`unreachable`) in any order, each node once."""

    nodes: Sequence[str]
    term: int
    votes: dict[str, VoteResponse] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    """Node → the term that it holds instead."""
    silent: set[str] = field(default_factory=set)
    needed: int = 0
    """Votes that win; 0: a majority of `nodes`."""

    def record(self, node_id: str, answer: VoteResponse) -> None:
        """Raises IntegrityError when a vote is for another term than was asked for, which no sound safekeeper does."""
        self._expect(node_id)
        if not answer.granted:
            self.refusals[node_id] = answer.term
        elif answer.term != self.term:
            raise IntegrityError(f"{node_id} voted in term {answer.term} when asked in term {self.term}")
        else:
            self.votes[node_id] = answer

    def unreachable(self, node_id: str) -> None:
        self._expect(node_id)
        self.silent.add(node_id)

    def _expect(self, node_id: str) -> None:
        if node_id not in self.nodes or node_id in self.votes or node_id in self.refusals or node_id in self.silent:
            raise ValueError(f"unexpected answer of {node_id!r}")

    @property
    def outcome(self) -> Outcome:
        needed = self.needed or majority(len(self.nodes))
        if len(self.votes) >= needed:
            return Outcome.WON
        if len(self.nodes) - len(self.refusals) - len(self.silent) < needed:
            return Outcome.LOST
        return Outcome.PENDING

    @property
    def highest_term(self) -> int:
        """The highest term that any answer named: what the next attempt has to exceed."""
        return max((self.term, *self.refusals.values()))

    def lost_error(self) -> UnavailableError:
        """Why there was no majority, for people."""
        if self.silent:
            return UnavailableError(f"no quorum of safekeepers: no usable answer from {', '.join(sorted(self.silent))}")
        return UnavailableError("another compute was elected at the same time")


def choose_donor(votes: Mapping[str, VoteResponse]) -> str:
    """Whose log is the log: the highest (last_log_term, flush_lsn). Ties are equal logs; the name decides."""
    return max(votes, key=lambda node: (votes[node].last_log_term, votes[node].flush_lsn, node))


@dataclass(frozen=True, slots=True)
class Plan:
    """What the winner of `term` tells everybody."""

    term: int
    start_lsn: Lsn
    term_history: tuple[TermStart, ...]
    """Its last entry is {term, start_lsn}."""
    donor: str
    membership: Membership = field(default_factory=Membership)


def make_plan(
    tally: Tally,
    *,
    donor: str,
    end_of_wal: Lsn,
    timeline_start_lsn: Lsn,
    membership: Membership = Membership(),
) -> Plan:
    """The plan of a won election. `end_of_wal`: the end of the donor's last complete record; 0/0 when it has no record.

    Raises IntegrityError when the votes contradict each other: then there must be no new term, whatever it costs.
    """
    if tally.outcome is not Outcome.WON:
        raise ValueError("the election is not won")
    start_lsn = timeline_start_lsn if end_of_wal == ZERO_LSN else end_of_wal
    chosen = tally.votes[donor]
    if start_lsn < timeline_start_lsn:
        raise IntegrityError("the log ends before the timeline begins")
    # Invariant: a log is never cut below what a majority has flushed.
    for node, vote in tally.votes.items():
        if vote.commit_lsn > start_lsn:
            raise IntegrityError(f"{node} knows {vote.commit_lsn} as committed, but the best log ends at {start_lsn}")
    history = _clip(chosen.term_history, start_lsn)
    if history and history[-1].term >= tally.term:
        raise IntegrityError(f"{donor} has a log of term {history[-1].term} and voted in term {tally.term}")
    return Plan(tally.term, start_lsn, (*history, TermStart(term=tally.term, start_lsn=start_lsn)), donor, membership)


def _clip(history: Sequence[TermStart], end_lsn: Lsn) -> list[TermStart]:
    """The entries that start at or before `end_lsn`. Raises IntegrityError unless terms rise and positions do not
    fall.
    """
    for before, after in pairwise(history):
        if after.term <= before.term or after.start_lsn < before.start_lsn:
            raise IntegrityError("a term history is not in order")
    return [entry for entry in history if entry.start_lsn <= end_lsn]


class Need(enum.Enum):
    """What one safekeeper needs while `term` is current."""

    NOTHING = "nothing"
    CREATE = "create"
    """It was down when the timeline was made."""
    VOTE = "vote"
    """It is of an older term: it has to drop the older compute's stream before anything else."""
    ELECT = "elect"
    STREAM = "stream"
    DEPOSED = "deposed"
    """It follows a later term: this compute can never commit again and must go."""
    LOST_DISK = "lost disk"
    """It once had this timeline and does not know it any more. An operator has to see to it."""


def need_of(status: TimelineStatus | None, plan: Plan, *, was_created: bool, compute_ready: bool) -> Need:
    """One step of reconciliation. `status` is None when the safekeeper does not know the timeline."""
    if status is None:
        return Need.LOST_DISK if was_created else Need.CREATE
    if status.term > plan.term:
        return Need.DEPOSED
    if status.term < plan.term:
        return Need.VOTE
    current = status.term_history[-1] if status.term_history else None
    if current is None or current.term != plan.term or status.flush_lsn < plan.start_lsn:
        return Need.ELECT
    if compute_ready and not status.streaming:
        return Need.STREAM
    return Need.NOTHING


def reached(status: TimelineStatus | None, plan: Plan) -> bool:
    """Its log is the plan's log, at least up to `start_lsn`."""
    return need_of(status, plan, was_created=True, compute_ready=False) is Need.NOTHING
