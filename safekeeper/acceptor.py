"""What a safekeeper promised, and what it may do next: the acceptor of the election protocol. A core.

Theory of operation. Synchronous replication of Postgres is not consensus; this is the part that makes it one. A
*proposer* (the compute manager) that wants to start a compute picks a term higher than any it has seen and asks all
safekeepers for their vote. A vote is a promise: nothing of a lower term is accepted or acknowledged from then on. So
the old compute can never commit again once a majority has voted. Having a majority, the proposer takes the most
advanced log among the votes (by last_log_term, then flush_lsn), cuts it behind its last complete record, and sends
everybody the resulting history (*elected*); each safekeeper clips its log at the common point and fetches what it lacks
below the new term's start. Then, and only then, it streams from the new compute.

    vote      term < t   → promise t: drop the stream, end subscriptions, persist, answer
              of another disk than this, or in an earlier membership than was promised in → refused
    elected   t = term   → clip at the common point, adopt the history, persist; again with the same history: nothing
    append    t = term, and t is the last term of the history, and the log reaches t's start
    commit    monotone, never beyond flush_lsn

The functions return effects; the shell (timeline.py) performs them in order. `Persist` always stands before the reply
it backs. `DropStream` stands before `Persist`: until the stream is down an acknowledgement might still go out, and the
position that the vote reports must cover it.

Source of the rules: Neon's safekeeper/src/safekeeper.rs and docs/rfcs/013-term-history.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from safekeeper.term_history import MAX_TERM, TermHistory
from shared.errors import ConflictError, InvalidInputError


@dataclass(frozen=True, slots=True)
class AcceptorState:
    """The persisted part. `flush_lsn` is not in it: the log itself says how far it reaches."""

    timeline_start_lsn: int
    term: int = 0
    """The highest term that was promised. At least `history.last_term`."""
    history: TermHistory = field(default_factory=TermHistory)
    """As adopted; may name terms that start beyond the end of the log while the log catches up."""
    commit_lsn: int = 0
    """A lower bound of what a quorum holds, as far as we were told."""
    seat: int = 0
    """Which disk this is of those that the node has had. Never changes."""
    generation: int = 0
    """Of the membership in which a term was promised last: none of an earlier one is promised any more."""

    def last_log_term(self, flush_lsn: int) -> int:
        """The term in which the end of the log was written (0 before the first election)."""
        return self.history.last_term_at(flush_lsn)


@dataclass(frozen=True, slots=True)
class DropStream:
    """Stop whatever writes to the log, and wait until it cannot write or acknowledge any more."""


@dataclass(frozen=True, slots=True)
class EndSubscriptions:
    """End all WAL subscriptions, so that no client mixes two histories on one connection."""


@dataclass(frozen=True, slots=True)
class Persist:
    """Make the new state durable. With `clip_lsn` the log is closed there, and what is behind is forgotten, in the same
    atomic step."""

    state: AcceptorState
    clip_lsn: int | None = None


@dataclass(frozen=True, slots=True)
class ReplyVote:
    """Answer, with the position of the log as it is now."""

    granted: bool


Effect = DropStream | EndSubscriptions | Persist | ReplyVote


def vote(state: AcceptorState, term: int, seat: int = 0, generation: int = 0) -> list[Effect]:
    """A candidate asks for `term`, of the member `seat` in the membership `generation`. Granted only for a higher term
    than was ever promised.

    Raises ConflictError when another disk than this is the member, or the candidate's membership is not the newest.
    """
    if not 1 <= term <= MAX_TERM:
        raise InvalidInputError("a term is a positive 64-bit number")
    check_member(state, seat, generation)
    if term <= state.term:
        return [ReplyVote(granted=False)]
    promised = replace(state, term=term, generation=generation)
    return [DropStream(), EndSubscriptions(), Persist(promised), ReplyVote(granted=True)]


def check_member(state: AcceptorState, seat: int, generation: int) -> None:
    """Raises ConflictError: see `vote`."""
    if seat != state.seat:
        raise ConflictError(f"the member is disk number {seat} of this safekeeper, and this is number {state.seat}")
    if generation < state.generation:
        raise ConflictError(
            f"membership {generation} is over: this safekeeper has voted in {state.generation}; if the compute"
            " manager's database was restored from a backup, replace again what was replaced since"
        )


def elected(state: AcceptorState, flush_lsn: int, term: int, history: TermHistory) -> list[Effect]:
    """The leader of `term` says what the log is. The log must stand still meanwhile: call it when nothing is writing.

    Raises ConflictError: not the term that was promised, another history than was adopted for this term, or a clip
    below what is known to be committed (which no correct proposer asks for). InvalidInputError: a history that cannot
    be one of this term or timeline.
    """
    if term != state.term:
        raise ConflictError(f"term {term} was not voted for: the current one is {state.term}")
    if history.last_term != term:
        raise InvalidInputError("the last entry of the term history must be the term that was elected")
    if history.entries[0].start_lsn != state.timeline_start_lsn:
        raise InvalidInputError("the term history must begin where the timeline begins")
    if state.history.last_term == term:
        if state.history != history:
            raise ConflictError(f"term {term} was elected with another history")
        return []
    common_lsn = history.common_point(state.history, state.timeline_start_lsn, flush_lsn)
    if common_lsn < state.commit_lsn:
        raise ConflictError("this history would take back WAL that is committed")
    persist = Persist(replace(state, history=history), clip_lsn=common_lsn)
    return [EndSubscriptions(), persist] if common_lsn < flush_lsn else [persist]


def check_may_stream(state: AcceptorState, flush_lsn: int, term: int) -> None:
    """May WAL of `term` be appended at `flush_lsn`? Raises ConflictError unless it may."""
    if term != state.term:
        raise ConflictError(f"WAL of term {term} is refused: the current term is {state.term}")
    if state.history.last_term != term:
        raise ConflictError(f"term {term} was voted for, but its leader is not elected yet")
    if state.history.entries[-1].start_lsn > flush_lsn:
        raise ConflictError("the log does not reach the start of its term yet")


def commit(state: AcceptorState, flush_lsn: int, candidate_lsn: int) -> AcceptorState:
    """Raise commit_lsn, never beyond our own log, never back.

    What we hear counts only while our log is of the current term: between a vote and the election's result, the bytes
    at these positions may be other ones than those that a quorum holds.
    """
    if state.last_log_term(flush_lsn) != state.term:
        return state
    lsn = min(candidate_lsn, flush_lsn)
    return replace(state, commit_lsn=lsn) if lsn > state.commit_lsn else state
