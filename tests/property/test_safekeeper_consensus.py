"""Three acceptors, any number of leaders, crashes between effects: nothing that was committed is ever lost.

The acceptors are the real cores; around them is a model that performs their effects, loses messages, crashes nodes in
the middle of a list of effects, and lets deposed leaders go on as long as somebody listens to them. The oracle
remembers what a quorum acknowledged to a leader, which is what a client was told is committed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from safekeeper import acceptor
from safekeeper.acceptor import AcceptorState, DropStream, Effect, EndSubscriptions, Persist, ReplyVote
from safekeeper.term_history import TermEntry, TermHistory
from shared.errors import ConflictError

START = 100
RECORD = 3
"""Bytes per record; elections cut behind the last whole one, commits are of whole ones."""
NODES = 3
QUORUM = 2

Byte = tuple[int, int]
"""(term, serial number): no two leaders write the same."""


@dataclass
class Node:
    state: AcceptorState = field(default_factory=lambda: AcceptorState(START, commit_lsn=START))
    log: list[Byte] = field(default_factory=list)
    streams_term: int = 0
    """The term of the stream that may still write and acknowledge; 0 for none. Lost in a crash."""

    @property
    def flush_lsn(self) -> int:
        return START + len(self.log)

    def perform(self, effects: list[Effect], crash_after: int) -> bool | None:
        """The vote if it was sent. Crashes before effect number `crash_after` if there is one."""
        reply = None
        for number, effect in enumerate(effects):
            if number == crash_after:
                self.streams_term = 0
                return None
            match effect:
                case DropStream():
                    self.streams_term = 0
                case EndSubscriptions():
                    pass
                case Persist(state=state, clip_lsn=clip_lsn):
                    self.state = state
                    if clip_lsn is not None:
                        del self.log[clip_lsn - START :]
                case ReplyVote(granted=granted):
                    assert not granted or not self.streams_term, "a vote while the old stream can still acknowledge"
                    reply = granted
        return reply


@dataclass
class Leader:
    term: int
    history: TermHistory
    log: list[Byte]
    start_lsn: int
    followers: set[int] = field(default_factory=set)
    """Nodes that answered `elected`."""
    acknowledged: dict[int, int] = field(default_factory=dict)

    def committed_lsn(self) -> int:
        positions = sorted(self.acknowledged.values(), reverse=True)
        if len(positions) < QUORUM:
            return START
        return START + (positions[QUORUM - 1] - START) // RECORD * RECORD


crash_points = st.one_of(st.just(99), st.integers(0, 4))
numbers = st.integers(0, NODES - 1)
leaders = st.integers(0, 2)
majorities = st.sets(numbers, min_size=QUORUM)
sizes = st.sampled_from([0, 1, RECORD, 5 * RECORD, 100])


class Cluster(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.nodes = [Node() for _ in range(NODES)]
        self.leaders: list[Leader] = []
        self.committed: list[Byte] = []
        self.serial = 0

    @rule(
        reached=st.sets(numbers, min_size=1),
        ahead=st.integers(-1, 2),
        crashes=st.tuples(crash_points, crash_points, crash_points),
    )
    def elect(self, reached: set[int], ahead: int, crashes: tuple[int, int, int]) -> None:
        """Ask for votes; with a majority, choose the donor, cut, lead. Candidates may be behind the times."""
        term = max(1, max(node.state.term for node in self.nodes) + ahead)
        votes = []
        for number in sorted(reached):
            node = self.nodes[number]
            granted = node.perform(acceptor.vote(node.state, term), crashes[number])
            if granted:
                history = node.state.history.up_to(node.flush_lsn)
                votes.append((history.last_term, node.flush_lsn, history, list(node.log)))
        if len(votes) < QUORUM:
            return
        _, flush_lsn, history, log = max(votes, key=lambda vote: vote[:2])
        start_lsn = START + (flush_lsn - START) // RECORD * RECORD
        entries = [entry for entry in history.entries if entry.start_lsn <= start_lsn]
        history = TermHistory.of([*entries, TermEntry(term, start_lsn)])
        self.leaders.append(Leader(term, history, log[: start_lsn - START], start_lsn))
        assert self.leaders[-1].log[: len(self.committed)] == self.committed, "a leader without committed WAL"

    @precondition(lambda self: self.leaders)
    @rule(leader=leaders, node=numbers, crash=crash_points)
    def follow(self, leader: int, node: int, crash: int) -> None:
        """Tell a node that a leader, perhaps an old one, was elected."""
        self._follow(self._leader(leader), node, crash)

    @precondition(lambda self: self.leaders)
    @rule(leader=leaders, node=numbers, size=st.integers(1, 2 * RECORD))
    def recover(self, leader: int, node: int, size: int) -> None:
        """Copy a part of what lies below the new term's start. Any node that has adopted the history may."""
        self._recover(self._leader(leader), node, size)

    @precondition(lambda self: self.leaders)
    @rule(leader=leaders, records=st.integers(1, 3))
    def write(self, leader: int, records: int) -> None:
        """A compute writes WAL, once a majority follows it."""
        self._write(self._leader(leader), records)

    @precondition(lambda self: self.leaders)
    @rule(leader=leaders, node=numbers, size=st.integers(0, 3 * RECORD))
    def stream(self, leader: int, node: int, size: int) -> None:
        """A node receives, flushes and acknowledges, if its acceptor lets it."""
        self._stream(self._leader(leader), node, size)

    @rule(
        reached=majorities,
        followers=st.permutations(range(NODES)),
        copied=st.tuples(sizes, sizes, sizes),
        records=st.integers(1, 3),
        streamed=st.tuples(sizes, sizes, sizes),
    )
    def reign(
        self,
        reached: set[int],
        followers: list[int],
        copied: tuple[int, int, int],
        records: int,
        streamed: tuple[int, int, int],
    ) -> None:
        """A whole term in one step, so that the search gets to logs with many terms in them."""
        before = len(self.leaders)
        self.elect(reached=reached, ahead=1, crashes=(99, 99, 99))
        if len(self.leaders) == before:
            return
        leader = self.leaders[-1]
        for node in followers:
            if node in reached:
                self._follow(leader, node, 99)
                self._recover(leader, node, copied[node])
        self._write(leader, records)
        for node in followers:
            self._stream(leader, node, streamed[node])

    # --- what the rules do ---

    def _leader(self, back: int) -> Leader:
        """Old leaders go on; the newest is number 0."""
        return self.leaders[-1 - min(back, len(self.leaders) - 1)]

    def _follow(self, leader: Leader, number: int, crash: int) -> None:
        node = self.nodes[number]
        try:
            effects = acceptor.elected(node.state, node.flush_lsn, leader.term, leader.history)
        except ConflictError as error:
            if "committed" in str(error):
                raise AssertionError("a correct leader was refused") from error
            return
        node.perform(effects, crash)
        if crash >= len(effects):
            leader.followers.add(number)

    def _recover(self, leader: Leader, number: int, size: int) -> None:
        node = self.nodes[number]
        if node.state.term == leader.term and node.state.history == leader.history:
            end = min(node.flush_lsn + size, leader.start_lsn)
            node.log += leader.log[len(node.log) : max(end - START, len(node.log))]

    def _write(self, leader: Leader, records: int) -> None:
        if len(leader.followers) < QUORUM:
            return
        for _ in range(records * RECORD):
            self.serial += 1
            leader.log.append((leader.term, self.serial))

    def _stream(self, leader: Leader, number: int, size: int) -> None:
        node = self.nodes[number]
        if node.streams_term != leader.term:
            try:
                acceptor.check_may_stream(node.state, node.flush_lsn, leader.term)
            except ConflictError:
                return
            assert node.flush_lsn >= leader.start_lsn, "a compute has no WAL from before its start"
            node.streams_term = leader.term
        node.log += leader.log[len(node.log) : len(node.log) + size]
        leader.acknowledged[number] = node.flush_lsn
        committed = leader.log[: leader.committed_lsn() - START]
        if len(committed) > len(self.committed):
            assert committed[: len(self.committed)] == self.committed, "two leaders committed different WAL"
            self.committed = committed

    @rule(node=numbers)
    def crash(self, node: int) -> None:
        self.nodes[node].streams_term = 0

    @rule(node=numbers, back=st.integers(0, RECORD))
    def feedback(self, node: int, back: int) -> None:
        """Somebody who follows a quorum in this node's own term tells how far it is committed."""
        found = self.nodes[node]
        candidate = START + len(self.committed) - back
        if self.leaders and found.state.term == self.leaders[-1].term:
            found.state = acceptor.commit(found.state, found.flush_lsn, candidate)

    # --- what must hold at any time ---

    @invariant()
    def committed_wal_is_held_by_a_majority(self) -> None:
        holders = sum(node.log[: len(self.committed)] == self.committed for node in self.nodes)
        assert holders >= QUORUM

    @invariant()
    def the_log_is_what_its_history_says(self) -> None:
        for node in self.nodes:
            assert node.state.history.last_term <= node.state.term
            for part in node.state.history.ranges(START, node.flush_lsn) if node.log else []:
                written = {term for term, _ in node.log[part.start_lsn - START : part.end_lsn - START]}
                assert written == {part.term}

    @invariant()
    def commit_lsn_is_true(self) -> None:
        for node in self.nodes:
            size = node.state.commit_lsn - START
            assert size <= len(node.log)
            assert node.log[:size] == self.committed[:size]

    @invariant()
    def logs_match(self) -> None:
        """Equal (term, position) means equal bytes, and equal everything before."""
        for first in self.nodes:
            for second in self.nodes:
                size = min(len(first.log), len(second.log))
                same = [a == b for a, b in zip(first.log, second.log, strict=False)]
                for position in range(size - 1, -1, -1):
                    if first.log[position][0] == second.log[position][0]:
                        assert all(same[: position + 1])
                        break


Cluster.TestCase.settings = settings(
    max_examples=400, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestConsensus = Cluster.TestCase
