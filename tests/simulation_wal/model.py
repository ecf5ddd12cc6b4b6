"""The states that a small world can get into, by the real cores: an explicit-state checker (docs/consensus.md).

    python -m tests.simulation_wal.model           small worlds, each to its end, for minutes
    python -m tests.simulation_wal.model --deep    and larger ones, up to a limit

The world: three safekeepers; candidates for the terms 1 … T, each of which may ask anybody at any time; a leader per
term that writes W records of R bytes. At each state every step is tried that could come next: a message that arrives
(or is lost, or its answer is), a byte that is copied or streamed, with or without its acknowledgement, a crash. What
steps do is decided by `safekeeper.acceptor`, `safekeeper.term_history` and `compute.proposer`. States that differ by
the names of safekeepers only count once.

Looked for in every state: two leaders of one term; a leader without a committed byte; a committed position with two
contents; committed WAL that a majority does not hold; a commit_lsn of a safekeeper above what is committed, or that
falls; a correct leader that is refused.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

from compute import proposer
from compute.proposer import Tally, make_plan
from safekeeper import acceptor
from safekeeper.acceptor import AcceptorState, DropStream, Effect, Persist, ReplyVote
from safekeeper.term_history import TermHistory
from shared.api.safekeeper import TermStart, VoteResponse
from shared.errors import ConflictError, IntegrityError, InvalidInputError
from shared.lsn import Lsn

START: Final = 100
NAMES: Final = ("a", "b", "c")
QUORUM: Final = 2
T = TypeVar("T")

Log = tuple[int, ...]
"""The byte at a position is the term of its leader: of one term there is one content."""


class Node(NamedTuple):
    state: AcceptorState
    log: Log
    stream: int
    """Term of the stream that may still write and acknowledge."""


class Vote(NamedTuple):
    flush_lsn: int
    history: TermHistory
    commit_lsn: int


class Leader(NamedTuple):
    history: TermHistory
    start_lsn: int
    log: Log
    followers: frozenset[int]
    acknowledged: tuple[int, ...]


class State(NamedTuple):
    nodes: tuple[Node, ...]
    votes: tuple[tuple[Vote | None, ...], ...]
    """Per term, per node: what the candidate has heard."""
    leaders: tuple[Leader | None, ...]
    committed: Log


class ModelError(AssertionError):
    """With the steps that lead to it."""


@dataclass(frozen=True)
class Bounds:
    terms: int = 2
    records: int = 1
    record_bytes: int = 1
    crashes: bool = True


class Model:
    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds

    @property
    def first(self) -> State:
        node = Node(AcceptorState(START, commit_lsn=START), (), 0)
        terms = self.bounds.terms
        return State((node,) * 3, ((None,) * 3,) * terms, (None,) * terms, ())

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        for number, node in enumerate(state.nodes):
            name = NAMES[number]
            if self.bounds.crashes and node.stream:
                yield f"{name} crashes", _with_node(state, number, node._replace(stream=0))
            if node.state.commit_lsn < START + len(state.committed):
                yield from self._feedback(state, number)
            for term in range(1, self.bounds.terms + 1):
                if state.leaders[term - 1] is None and state.votes[term - 1][number] is None:
                    yield from self._vote(state, number, term)
                leader = state.leaders[term - 1]
                if leader is not None:
                    yield from self._elected(state, number, term, leader)
                    yield from self._recover(state, number, term, leader)
                    yield from self._stream(state, number, term, leader)
        for term in range(1, self.bounds.terms + 1):
            leader = state.leaders[term - 1]
            if leader is None:
                yield from self._win(state, term)
            elif len(leader.followers) >= QUORUM:
                size = self.bounds.records * self.bounds.record_bytes
                if len(leader.log) < leader.start_lsn - START + size:
                    longer = leader._replace(log=leader.log + (term,) * self.bounds.record_bytes)
                    yield f"the leader of {term} writes", _with_leader(state, term, longer)

    def _vote(self, state: State, number: int, term: int) -> Iterator[tuple[str, State]]:
        node = state.nodes[number]
        effects = acceptor.vote(node.state, term)
        label = f"{NAMES[number]} is asked for its vote in {term}"
        for crash in range(1, len(effects) + 1):
            done, reply = _perform(node, effects[:crash])
            after = _with_node(state, number, done)
            if reply:
                history = done.state.history.up_to(START + len(done.log))
                vote = Vote(START + len(done.log), history, done.state.commit_lsn)
                votes = _put(state.votes[term - 1], number, vote)
                yield label, after._replace(votes=_put(state.votes, term - 1, votes))
            elif after != state:
                yield f"{label}, and crashes after effect {crash}", after

    def _win(self, state: State, term: int) -> Iterator[tuple[str, State]]:
        votes = {NAMES[n]: vote for n, vote in enumerate(state.votes[term - 1]) if vote is not None}
        if len(votes) < QUORUM:
            return
        tally = Tally(NAMES, term)
        for name, vote in votes.items():
            tally.record(name, _response(term, vote))
        donor = proposer.choose_donor(tally.votes)
        # The donor is asked where its log ends after the vote: it may have gone on to another term meanwhile.
        log = state.nodes[NAMES.index(donor)].log
        end_lsn = START + len(log) // self.bounds.record_bytes * self.bounds.record_bytes
        try:
            plan = make_plan(tally, donor=donor, end_of_wal=Lsn(end_lsn), timeline_start_lsn=Lsn(START))
        except IntegrityError as error:
            if self._is_current(state, term):
                raise ModelError(f"the candidate of {term} stops: {error}") from None
            return
        prefix = log[: end_lsn - START]
        history = TermHistory.of((entry.term, entry.start_lsn.value) for entry in plan.term_history)
        if self._is_current(state, term) and prefix[: len(state.committed)] != state.committed:
            raise ModelError(f"the leader of {term} lacks WAL that was committed")
        leader = Leader(history, end_lsn, prefix, frozenset(), (START, START, START))
        yield f"the candidate of {term} wins, donor {donor}", _with_leader(state, term, leader)

    @staticmethod
    def _is_current(state: State, term: int) -> bool:
        """Can this candidate still get a majority to follow?"""
        return sum(node.state.term <= term for node in state.nodes) >= QUORUM

    def _elected(self, state: State, number: int, term: int, leader: Leader) -> Iterator[tuple[str, State]]:
        node = state.nodes[number]
        try:
            effects = acceptor.elected(node.state, START + len(node.log), term, leader.history)
        except (ConflictError, InvalidInputError) as error:
            # A donor that went on to a later term names another end: what comes of that is refused, and may be.
            if node.state.term == term and self._is_current(state, term):
                raise ModelError(f"{NAMES[number]} refuses the leader of {term}: {error}") from None
            return
        done, _ = _perform(node, effects)
        after = _with_node(state, number, done)
        followed = leader._replace(followers=leader.followers | {number})
        after = _with_leader(after, term, followed)
        if after != state:
            yield f"{NAMES[number]} follows the leader of {term}", after

    def _recover(self, state: State, number: int, term: int, leader: Leader) -> Iterator[tuple[str, State]]:
        node = state.nodes[number]
        if node.state.term == term and node.state.history == leader.history:
            at = len(node.log)
            if START + at < leader.start_lsn:
                copied = node._replace(log=(*node.log, leader.log[at]))
                yield f"{NAMES[number]} copies a byte for {term}", _with_node(state, number, copied)

    def _stream(self, state: State, number: int, term: int, leader: Leader) -> Iterator[tuple[str, State]]:
        node, flush_lsn = state.nodes[number], START + len(state.nodes[number].log)
        if node.stream != term:
            try:
                acceptor.check_may_stream(node.state, flush_lsn, term)
            except ConflictError:
                return
            yield f"{NAMES[number]} streams in {term}", _with_node(state, number, node._replace(stream=term))
            return
        name = NAMES[number]
        if flush_lsn < START + len(leader.log):
            longer = node._replace(log=(*node.log, leader.log[len(node.log)]))
            yield f"{name} flushes a byte of {term}", _with_node(state, number, longer)
        if leader.acknowledged[number] < flush_lsn:
            acknowledged = leader._replace(acknowledged=_put(leader.acknowledged, number, flush_lsn))
            after = _with_leader(state, term, acknowledged)
            yield f"{name} acknowledges {flush_lsn} to the leader of {term}", self._commit(after, acknowledged)

    def _commit(self, state: State, leader: Leader) -> State:
        held = sorted(leader.acknowledged, reverse=True)[QUORUM - 1] - START
        log = leader.log[: held // self.bounds.record_bytes * self.bounds.record_bytes]
        known = min(len(log), len(state.committed))
        if log[:known] != state.committed[:known]:
            raise ModelError("a position has two contents that were committed")
        return state._replace(committed=log) if len(log) > known else state

    def _feedback(self, state: State, number: int) -> Iterator[tuple[str, State]]:
        """From the pageserver, which tells those who are in the term of what is committed."""
        node, committed_lsn = state.nodes[number], START + len(state.committed)
        flush_lsn = START + len(node.log)
        if node.state.last_log_term(flush_lsn) != node.state.term or node.state.term < state.committed[-1]:
            return
        raised = acceptor.commit(node.state, flush_lsn, committed_lsn)
        if raised is not node.state:
            yield f"{NAMES[number]} hears of commits", _with_node(state, number, node._replace(state=raised))

    def check(self, state: State) -> None:
        size = len(state.committed)
        if sum(node.log[:size] == state.committed for node in state.nodes) < QUORUM:
            raise ModelError("WAL that was committed is not held by a majority")
        for name, node in zip(NAMES, state.nodes, strict=True):
            known = node.state.commit_lsn - START
            if known > size or node.log[:known] != state.committed[:known]:
                raise ModelError(f"{name} knows as committed what is not")


def _perform(node: Node, effects: list[Effect]) -> tuple[Node, bool]:
    """The node when it has got that far, and whether it granted a vote."""
    granted = False
    for effect in effects:
        match effect:
            case DropStream():
                node = node._replace(stream=0)
            case Persist(state=state, clip_lsn=clip_lsn):
                log = node.log if clip_lsn is None else node.log[: clip_lsn - START]
                node = node._replace(state=state, log=log)
            case ReplyVote(granted=granted):
                if granted and node.stream:
                    raise ModelError("a vote while the old stream can still acknowledge")
            case _:
                pass
    return node, granted


def _response(term: int, vote: Vote) -> VoteResponse:
    return VoteResponse(
        granted=True,
        term=term,
        last_log_term=vote.history.last_term,
        flush_lsn=Lsn(vote.flush_lsn),
        commit_lsn=Lsn(vote.commit_lsn),
        term_history=[TermStart(term=entry.term, start_lsn=Lsn(entry.start_lsn)) for entry in vote.history.entries],
    )


def _put(values: tuple[T, ...], number: int, value: T) -> tuple[T, ...]:
    return (*values[:number], value, *values[number + 1 :])


def _with_node(state: State, number: int, node: Node) -> State:
    return state._replace(nodes=_put(state.nodes, number, node))


def _with_leader(state: State, term: int, leader: Leader) -> State:
    return state._replace(leaders=_put(state.leaders, term - 1, leader))


def _canonical(state: State) -> int:
    """Equal for states that differ by the names of nodes only: a state is a column per node, and what is of no node."""
    columns = [
        hash(
            (
                node,
                tuple(votes[n] for votes in state.votes),
                tuple((n in leader.followers, leader.acknowledged[n]) for leader in state.leaders if leader),
            )
        )
        for n, node in enumerate(state.nodes)
    ]
    leaders = tuple((leader.history, leader.log) if leader else None for leader in state.leaders)
    return hash((tuple(sorted(columns)), leaders, state.committed))


REIGN: Final = (
    "a is asked for its vote in 1",
    "b is asked for its vote in 1",
    "the candidate of 1 wins, donor b",
    "a follows the leader of 1",
    "b follows the leader of 1",
    "the leader of 1 writes",
    "a streams in 1",
    "b streams in 1",
)
"""To a state from which more can happen in few steps: the first leader reigns."""


def explore(bounds: Bounds, limit: int | None = None, beginning: Sequence[str] = ()) -> int:
    """Breadth first, so that the way to an error is the shortest; answer how many states there are.

    Raises ModelError with that way. `limit`: stop after this many states. `beginning`: steps to take first.
    """
    model = Model(bounds)
    first, way_there = model.first, None
    for label in beginning:
        first = dict(model.steps(first))[label]
        way_there = _Way(label, way_there)
    seen = {_canonical(first)}
    model.check(first)
    queue: deque[tuple[State, _Way | None]] = deque([(first, way_there)])
    while queue and (limit is None or len(seen) < limit):
        state, way = queue.popleft()
        label = ""
        try:
            for label, after in model.steps(state):
                key = _canonical(after)
                if key not in seen:
                    seen.add(key)
                    model.check(after)
                    queue.append((after, _Way(label, way)))
        except ModelError as error:
            told = [] if way is None else list(way)
            raise ModelError("\n".join([*told, f"(after: {label})", str(error)])) from None
    return len(seen)


class _Way:
    """The steps that led to a state, from the last one back."""

    __slots__ = ("_before", "_label")

    def __init__(self, label: str, before: _Way | None) -> None:
        self._label = label
        self._before = before

    def __iter__(self) -> Iterator[str]:
        if self._before is not None:
            yield from self._before
        yield self._label


WHOLE: Final = {
    Bounds(terms=1, records=1): 584,
    Bounds(terms=2, records=0): 1_542,
    Bounds(terms=3, records=0): 57_566,
    Bounds(terms=1, records=2, record_bytes=2): 102_651,
    Bounds(terms=2, records=1, crashes=False): 356_373,
    Bounds(terms=2, records=1): 1_482_473,
}
"""Worlds that were explored to their end, and how many states they have."""
DEEP: Final = (Bounds(terms=2, records=2), Bounds(terms=2, records=1, record_bytes=2), Bounds(terms=3, records=1))
DEEP_LIMIT: Final = 2_000_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation_wal.model")
    parser.add_argument("--deep", action="store_true", help="larger worlds, too, for many minutes")
    parser.add_argument("--limit", type=int, default=DEEP_LIMIT, help="stop after this many states, by breadth")
    arguments = parser.parse_args()
    for bounds in (*WHOLE, *(DEEP if arguments.deep else ())):
        for beginning in ((), REIGN) if bounds in DEEP else ((),):
            began = time.monotonic()
            states = explore(bounds, arguments.limit, beginning)
            told = "the first" if states >= arguments.limit else "all"
            seconds = time.monotonic() - began
            print(f"{bounds}, {len(beginning)} steps ahead: {told} {states:,} states, {seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
