"""The proposer against a model of safekeepers: whatever crashes and whoever is away, nothing committed is lost.

The model's log is a list of records; a safekeeper may hold the first half of one more. Commit is what the
architecture says it is: a record that a majority has flushed whole, in the compute's term.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from compute.proposer import Need, Outcome, Plan, Tally, choose_donor, majority, make_plan, need_of, next_term
from shared.api.safekeeper import TermStart, TimelineStatus, VoteResponse
from shared.errors import IntegrityError
from shared.ids import ProjectId, TimelineId
from shared.lsn import ZERO_LSN, Lsn

START = 1000
RECORD = 16


# These make the machine below fail within some hundred examples, as they should: choosing the donor by flush_lsn alone,
# adopting a lower start than the donor's end, counting a minority as a majority.


@dataclass(frozen=True, slots=True)
class Record:
    """One record: who wrote it, and which it is."""

    term: int
    number: int


@dataclass(slots=True)
class Keeper:
    """A safekeeper as the protocol describes it; its log begins at START and records are RECORD bytes long."""

    name: str
    term: int = 0
    history: list[TermStart] = field(default_factory=list)
    log: list[Record] = field(default_factory=list)
    half: bool = False
    commit: int = START

    @property
    def end(self) -> int:
        return START + len(self.log) * RECORD

    @property
    def flush(self) -> int:
        return self.end + (RECORD // 2 if self.half else 0)

    def last_log_term(self) -> int:
        return max((entry.term for entry in self.history if entry.start_lsn.value <= self.flush), default=0)

    def vote(self, term: int) -> VoteResponse:
        granted = term > self.term
        if granted:
            self.term = term
        return VoteResponse(
            granted=granted,
            term=self.term,
            last_log_term=self.last_log_term(),
            flush_lsn=Lsn(self.flush),
            commit_lsn=Lsn(self.commit),
            term_history=[entry for entry in self.history if entry.start_lsn.value <= self.flush],
        )

    def common_point(self, history: tuple[TermStart, ...]) -> int:
        """Up to where this log is the log of `history`."""
        ours, theirs = self.history, list(history)
        point = START
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
            if mine != other:
                break
            my_end = ours[index + 1].start_lsn.value if index + 1 < len(ours) else self.flush
            other_end = theirs[index + 1].start_lsn.value if index + 1 < len(theirs) else 1 << 62
            point = min(my_end, other_end, self.flush)
            if my_end != other_end:
                break
        return point

    def elected(self, plan: Plan, donor_log: list[Record]) -> None:
        assert plan.term == self.term
        point = self.common_point(plan.term_history)
        assert point >= self.commit, "a safekeeper was asked to take back what is committed"
        start_records = (plan.start_lsn.value - START) // RECORD
        kept = self.log[: max(0, point - START) // RECORD]
        self.log = kept + donor_log[len(kept) : start_records]
        self.log = self.log[:start_records]
        self.half = False
        self.history = list(plan.term_history)
        assert self.end == plan.start_lsn.value


class Elections(RuleBasedStateMachine):
    """Computes come and go; each writes records that reach some safekeepers, whole or half."""

    keepers: list[Keeper]

    @initialize(count=st.sampled_from([1, 3, 5]))
    def begin(self, count: int) -> None:
        self.keepers = [Keeper(f"safekeeper-{n}") for n in range(count)]
        self.committed: list[Record] = []
        self.compute_term = 0
        self.compute_log: list[Record] = []
        self.streams: dict[str, int] = {}
        self.written = 0

    def majority(self) -> int:
        return majority(len(self.keepers))

    @rule(data=st.data())
    def elect(self, data: st.DataObject) -> None:
        """Some safekeepers are away, and of those who vote some never hear the result."""
        # Mostly bare majorities, in any order: these are the elections in which it matters who is away.
        size = data.draw(st.sampled_from([self.majority()] * 3 + [1, len(self.keepers)]))
        present = data.draw(st.permutations(self.keepers))[:size]
        everybody_answers = data.draw(st.sampled_from([True, True, True, False]))
        terms = [keeper.term for keeper in self.keepers]
        seen = terms if everybody_answers else data.draw(st.lists(st.sampled_from(terms)))
        tally = Tally([keeper.name for keeper in self.keepers], next_term([*seen, self.compute_term]))
        for keeper in present:
            if tally.outcome is Outcome.PENDING:
                answer = keeper.vote(tally.term)
                tally.record(keeper.name, answer)
                if answer.granted:
                    self.streams.pop(keeper.name, None)
        if tally.outcome is not Outcome.WON:
            return
        by_name = {keeper.name: keeper for keeper in self.keepers}
        donor = by_name[choose_donor(tally.votes)]
        end = ZERO_LSN if not donor.log else Lsn(donor.end)
        plan = make_plan(tally, donor=donor.name, end_of_wal=end, timeline_start_lsn=Lsn(START))
        assert plan.term_history[-1] == TermStart(term=tally.term, start_lsn=plan.start_lsn)
        donor_log = donor.log[: (plan.start_lsn.value - START) // RECORD]
        assert donor_log[: len(self.committed)] == self.committed, "a committed record is not in the chosen log"
        told = [each for each in present if each.name in tally.votes]
        if data.draw(st.sampled_from([False, False, False, True])):
            told = told[: data.draw(st.integers(0, len(told)))]
        for keeper in told:
            keeper.elected(plan, donor_log)
        if len(told) < self.majority():
            return  # nobody may start a compute on that
        self.compute_term = plan.term
        self.compute_log = list(donor_log)
        self.plan = plan
        self.streams = {keeper.name: len(donor_log) for keeper in told}

    @precondition(lambda self: bool(self.streams))
    @rule(data=st.data(), count=st.integers(1, 4))
    def write(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            self.written += 1
            self.compute_log.append(Record(self.compute_term, self.written))
        for keeper in self.keepers:
            if keeper.name not in self.streams or keeper.term != self.compute_term:
                continue
            reach = data.draw(st.sampled_from([len(self.compute_log), len(keeper.log), len(self.compute_log) - 1]))
            reach = max(reach, len(keeper.log))
            keeper.half = reach < len(self.compute_log) and data.draw(st.booleans())
            keeper.log = self.compute_log[:reach]
        self._commit(data)

    def _commit(self, data: st.DataObject) -> None:
        holders = [each for each in self.keepers if each.name in self.streams and each.term == self.compute_term]
        if len(holders) < self.majority():
            return
        reach = sorted((len(keeper.log) for keeper in holders), reverse=True)[self.majority() - 1]
        if reach > len(self.committed):
            assert self.compute_log[: len(self.committed)] == self.committed
            self.committed = self.compute_log[:reach]
        for keeper in holders:
            if data.draw(st.booleans()):
                keeper.commit = max(keeper.commit, min(START + len(self.committed) * RECORD, keeper.end))

    @precondition(lambda self: bool(self.streams))
    @rule(data=st.data())
    def late_joiner(self, data: st.DataObject) -> None:
        """A safekeeper that was away is brought up by its follower."""
        keeper = data.draw(st.sampled_from(self.keepers))
        if keeper.name in self.streams or keeper.term > self.compute_term:
            return
        status = status_of(keeper)
        need = need_of(status, self.plan, was_created=True, compute_ready=True)
        if need is Need.VOTE:
            assert keeper.vote(self.plan.term).granted
            need = need_of(status_of(keeper), self.plan, was_created=True, compute_ready=True)
        if need is Need.ELECT:
            keeper.elected(self.plan, self.compute_log[: (self.plan.start_lsn.value - START) // RECORD])
            need = need_of(status_of(keeper), self.plan, was_created=True, compute_ready=True)
        assert need is Need.STREAM
        self.streams[keeper.name] = len(keeper.log)

    @invariant()
    def committed_is_held_by_a_majority(self) -> None:
        if not hasattr(self, "keepers"):
            return
        holders = [keeper for keeper in self.keepers if keeper.log[: len(self.committed)] == self.committed]
        assert len(holders) >= self.majority()

    @invariant()
    def histories_are_in_order(self) -> None:
        for keeper in getattr(self, "keepers", []):
            for before, after in pairwise(keeper.history):
                assert before.term < after.term
                assert before.start_lsn <= after.start_lsn


def status_of(keeper: Keeper) -> TimelineStatus:
    return TimelineStatus(
        project_id=ProjectId("prj-0000000000000000"),
        timeline_id=TimelineId("tl-0000000000000000"),
        system_identifier=1,
        term=keeper.term,
        last_log_term=keeper.last_log_term(),
        term_history=keeper.history,
        timeline_start_lsn=Lsn(START),
        flush_lsn=Lsn(keeper.flush),
        commit_lsn=Lsn(keeper.commit),
        streaming=False,
        wal_size_bytes=0,
    )


TestElections = Elections.TestCase
TestElections.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)


def vote(
    last_log_term: int, flush: int, *, commit: int = START, history: list[tuple[int, int]] | None = None
) -> VoteResponse:
    return VoteResponse(
        granted=True,
        term=9,
        last_log_term=last_log_term,
        flush_lsn=Lsn(flush),
        commit_lsn=Lsn(commit),
        term_history=[TermStart(term=t, start_lsn=Lsn(s)) for t, s in history or []],
    )


def won(votes: dict[str, VoteResponse]) -> Tally:
    tally = Tally(["a", "b", "c"], 9)
    for node, answer in votes.items():
        tally.record(node, answer)
    return tally


def test_a_short_log_of_a_later_term_beats_a_long_one_of_an_earlier() -> None:
    votes = {"a": vote(1, 9000, history=[(1, 1000)]), "b": vote(2, 1500, history=[(1, 1000), (2, 1400)])}
    assert choose_donor(votes) == "b"


def test_no_plan_below_what_is_committed() -> None:
    tally = won({"a": vote(1, 2000, history=[(1, 1000)]), "b": vote(1, 1500, commit=2000, history=[(1, 1000)])})
    with pytest.raises(IntegrityError):
        make_plan(tally, donor="a", end_of_wal=Lsn(1990), timeline_start_lsn=Lsn(START))


def test_an_empty_log_starts_where_the_timeline_starts() -> None:
    tally = won({"a": vote(0, 0, commit=0), "b": vote(0, 0, commit=0)})
    plan = make_plan(tally, donor="b", end_of_wal=ZERO_LSN, timeline_start_lsn=Lsn(START))
    assert plan.start_lsn == Lsn(START)
    assert [entry.term for entry in plan.term_history] == [9]


@pytest.mark.parametrize(
    "history", [[(2, 1000), (1, 1100)], [(1, 1100), (2, 1000)], [(1, 1000), (1, 1000)], [(1, 1000), (9, 1100)]]
)
def test_impossible_histories_are_refused(history: list[tuple[int, int]]) -> None:
    tally = won({"a": vote(2, 2000, history=history), "b": vote(0, 0)})
    with pytest.raises(IntegrityError):
        make_plan(tally, donor="a", end_of_wal=Lsn(2000), timeline_start_lsn=Lsn(START))


@given(st.lists(st.sampled_from(["vote", "refuse", "silent"]), min_size=1, max_size=9))
def test_outcome_is_decided_exactly_when_it_can_be(answers: list[str]) -> None:
    nodes = [f"n{i}" for i in range(len(answers))]
    tally = Tally(nodes, 9)
    needed = majority(len(nodes))
    for index, (node, answer) in enumerate(zip(nodes, answers, strict=True)):
        match answer:
            case "vote":
                tally.record(node, vote(0, 0))
            case "refuse":
                tally.record(node, vote(0, 0).model_copy(update={"granted": False, "term": 12}))
            case _:
                tally.unreachable(node)
        granted = answers[: index + 1].count("vote")
        possible = granted + len(nodes) - index - 1
        expected = Outcome.WON if granted >= needed else Outcome.LOST if possible < needed else Outcome.PENDING
        assert tally.outcome is expected
    assert tally.highest_term == (12 if "refuse" in answers else 9)
    with pytest.raises(ValueError, match="unexpected"):
        tally.unreachable(nodes[0])


def test_a_vote_for_another_term_is_no_vote() -> None:
    with pytest.raises(IntegrityError):
        Tally(["a"], 8).record("a", vote(0, 0))
