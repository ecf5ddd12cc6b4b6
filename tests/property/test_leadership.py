"""Replicas of the keymanager on a simulated seat: clocks that tick differently, pauses, delays, lost answers.

Real time is what nobody in the simulation can read. Each replica has a clock of its own that runs up to 1 % fast or
slow; a paused one does nothing, and then does everything at once with what it has read before. A request reaches the
seat late or never, and its answer too; so a commit may have happened of which nobody hears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from keymanager.leadership import LOOKS_PER_TTL, Election, Look, Renew, Seat, Step, Take, Term, Wait
from shared.clock import ManualClock
from shared.errors import NotLeaderError
from shared.ids import InstanceId

TTL_S = 1.5
MAX_DRIFT = 0.009
"""Of one clock against real time: two of them then differ by less than CLOCK_DRIFT."""


class DriftingClock:
    def __init__(self, world: World, rate: float, offset_s: float) -> None:
        self._world, self._rate, self._offset_s = world, rate, offset_s

    def monotonic_s(self) -> float:
        return self._offset_s + self._world.real_s * self._rate

    def now(self) -> datetime:
        return datetime.now(UTC)


@dataclass
class Request:
    step: Step
    sent_at_s: float
    """On the replica's own clock."""
    answer: Seat | bool | None = None


@dataclass
class Node:
    """What `replica.py` does, as far as it matters here."""

    instance_id: InstanceId
    place: str
    clock: DriftingClock
    election: Election
    request: Request | None = None
    paused: bool = False
    terms: list[Term] = field(default_factory=list)


@dataclass
class World:
    real_s: float = 0.0
    seat: Seat = field(default_factory=lambda: Seat(0, 0, None))
    nodes: list[Node] = field(default_factory=list)
    stray: list[tuple[Node, Request]] = field(default_factory=list)
    """Requests that their senders have given up, and that may still arrive."""


def started(place: str, clock: DriftingClock) -> Node:
    instance_id = InstanceId.new()
    return Node(instance_id, place, clock, Election(instance_id, TTL_S, clock, place))


def apply(world: World, node: Node, step: Step) -> Seat | bool:
    """What the database does with a request, in one transaction."""
    seat = world.seat
    match step:
        case Look():
            return seat
        case Take(seen):
            if seat != seen:
                return False
            world.seat = Seat(seen.epoch + 1, 0, node.instance_id, place=node.place)
            return True
        case Renew(term):
            if (seat.epoch, seat.holder) != (term.epoch, node.instance_id):
                return False
            world.seat = Seat(seat.epoch, seat.renewals + 1, seat.holder, place=seat.place)
            return True
        case Wait():
            raise AssertionError("waiting is no request")


def answered(node: Node, request: Request) -> None:
    election, answer = node.election, request.answer
    match request.step:
        case Look():
            assert isinstance(answer, Seat)
            election.saw(answer)
        case Take(seen):
            election.took(seen, request.sent_at_s, won=answer is True)
            if election.term is not None:
                node.terms.append(election.term)
        case Renew(term):
            election.renewed(term, request.sent_at_s, kept=answer is True)
        case Wait():
            raise AssertionError("waiting is no request")


NODES = st.integers(0, 2)


class Replicas(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @initialize(clocks=st.lists(st.tuples(st.floats(-MAX_DRIFT, MAX_DRIFT), st.floats(0, 1e6)), min_size=2, max_size=3))
    def start(self, clocks: list[tuple[float, float]]) -> None:
        for drift, offset_s in clocks:
            clock = DriftingClock(self.world, 1 + drift, offset_s)
            self.world.nodes.append(started(f"place {len(self.world.nodes)}", clock))

    def node(self, number: int) -> Node:
        return self.world.nodes[number % len(self.world.nodes)]

    def one_that(self, number: int, can: Callable[[Node], bool]) -> Iterable[Node]:
        """None, or one of the nodes that can."""
        able = [node for node in self.world.nodes if can(node)]
        return able and [able[number % len(able)]]

    # --- time ---

    @rule(seconds=st.one_of(st.floats(0, 0.3), st.floats(0, 4 * TTL_S)))
    def time_passes(self, seconds: float) -> None:
        self.world.real_s += seconds

    @rule(number=NODES)
    def pause(self, number: int) -> None:
        self.node(number).paused = True

    @rule(number=NODES)
    def go_on(self, number: int) -> None:
        self.node(number).paused = False

    @rule(number=NODES)
    def restart(self, number: int) -> None:
        """Another process in the same place: it remembers nothing, the one before is dead, and what that has asked for
        may still arrive."""
        node = self.node(number)
        if node.request is not None and node.request.answer is None:
            self.world.stray.append((node, node.request))
        at = self.world.nodes.index(node)
        self.world.nodes[at] = started(node.place, node.clock)

    # --- requests ---

    @rule(number=NODES)
    def step(self, number: int) -> None:
        for node in self.one_that(number, lambda n: not n.paused and n.request is None):
            step = node.election.next()
            if isinstance(step, Wait):
                assert step.seconds > 0
            else:
                node.request = Request(step, node.clock.monotonic_s())

    @rule(number=NODES)
    def arrives(self, number: int) -> None:
        """Even while its sender is paused."""
        for node in self.one_that(number, lambda n: n.request is not None and n.request.answer is None):
            assert node.request is not None
            node.request.answer = apply(self.world, node, node.request.step)

    @rule(number=NODES)
    def is_answered(self, number: int) -> None:
        for node in self.one_that(number, lambda n: not n.paused and n.request is not None):
            request = node.request
            assert request is not None
            if request.answer is not None:
                node.request = None
                answered(node, request)

    @rule(number=NODES)
    def answer_is_lost(self, number: int) -> None:
        for node in self.one_that(number, lambda n: not n.paused and n.request is not None):
            request, node.request = node.request, None
            assert request is not None
            if request.answer is None:
                self.world.stray.append((node, request))
            node.election.unanswered()

    @precondition(lambda self: self.world.stray)
    @rule(number=st.integers(0, 9))
    def stray_request_arrives(self, number: int) -> None:
        node, request = self.world.stray.pop(number % len(self.world.stray))
        apply(self.world, node, request.step)

    @rule(number=NODES, rounds=st.integers(1, 12))
    def works_undisturbed(self, number: int, rounds: int) -> None:
        """So that long reigns and takeovers are not left to chance."""
        for node in self.one_that(number, lambda n: not n.paused and n.request is None):
            for _ in range(rounds):
                step = node.election.next()
                if isinstance(step, Wait):
                    self.world.real_s += step.seconds * 1.01
                    continue
                request = Request(step, node.clock.monotonic_s())
                self.world.real_s += 0.01
                request.answer = apply(self.world, node, step)
                answered(node, request)
                self.at_most_one_leads()

    @rule(number=NODES, there_s=st.floats(0, TTL_S), back_s=st.floats(0, TTL_S))
    def leader_is_cut_off_after_a_slow_renewal(self, number: int, there_s: float, back_s: float) -> None:
        """The narrowest race: another replica has looked right after the renewal, and takes the seat as early as it
        may."""
        leading = [n for n in self.world.nodes if n.election.term is not None and n.election.term.valid]
        others = self.one_that(number, lambda n: n not in leading and not n.paused and n.request is None)
        for leader in leading:
            if leader.request is not None or leader.paused:
                continue
            while isinstance(step := leader.election.next(), Wait):
                self.world.real_s += step.seconds * 1.01
            renewal = Request(step, leader.clock.monotonic_s())
            self.world.real_s += there_s
            renewal.answer = apply(self.world, leader, step)
            heard_at_s = self.world.real_s + back_s
            for other in others:
                for _ in range(40):
                    step = other.election.next()
                    if not isinstance(step, Wait):
                        request = Request(step, other.clock.monotonic_s())
                        request.answer = apply(self.world, other, step)
                        answered(other, request)
                    elif self.world.real_s < heard_at_s <= self.world.real_s + step.seconds:
                        self.world.real_s = heard_at_s
                        answered(leader, renewal)
                    else:
                        self.world.real_s += max(1e-6, step.seconds / (1 + MAX_DRIFT))
                    self.at_most_one_leads()

    # --- what always holds ---

    @invariant()
    def at_most_one_leads(self) -> None:
        leading = [node for node in self.world.nodes if node.election.term is not None and node.election.term.valid]
        assert len(leading) <= 1

    @invariant()
    def terms_end_for_good_and_epochs_are_led_once(self) -> None:
        terms = [term for node in self.world.nodes for term in node.terms]
        epochs = [term.epoch for term in terms]
        assert len(set(epochs)) == len(epochs)
        for node in self.world.nodes:
            for term in node.terms:
                if term is not node.election.term:
                    assert not term.valid

    @invariant()
    def the_leader_holds_the_newest_epoch(self) -> None:
        """So whoever may send may also write: the fence is never closed to a valid leader."""
        for node in self.world.nodes:
            term = node.election.term
            if term is not None and term.valid:
                assert (self.world.seat.epoch, self.world.seat.holder) == (term.epoch, node.instance_id)


TestReplicas = Replicas.TestCase
TestReplicas.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


# --- what a single replica does, step by step ---


def lone() -> tuple[Election, ManualClock, InstanceId]:
    clock, instance_id = ManualClock(), InstanceId.new()
    return Election(instance_id, TTL_S, clock), clock, instance_id


def test_an_empty_seat_is_taken_at_once_and_renewed_every_third_of_the_ttl() -> None:
    election, clock, _ = lone()
    assert election.next() == Look()
    election.saw(empty := Seat(0, 0, None))
    assert election.next() == Take(empty)
    election.took(empty, clock.monotonic_s(), won=True)
    term = election.term
    assert term is not None
    assert (term.epoch, term.valid) == (1, True)
    step = election.next()
    assert isinstance(step, Wait)
    assert step.seconds == pytest.approx(TTL_S / 3)
    clock.advance(TTL_S / 3)
    assert election.next() == Renew(term)
    election.renewed(term, clock.monotonic_s(), kept=True)
    clock.advance(TTL_S - 0.01)
    assert term.valid
    clock.advance(0.01)
    assert not term.valid
    with pytest.raises(NotLeaderError):
        term.check()


def test_a_held_seat_is_taken_when_it_has_not_changed_for_longer_than_the_ttl() -> None:
    election, clock, _ = lone()
    held = Seat(4, 7, InstanceId.new())
    takes_after_s = 0.0
    while not isinstance(step := election.next(), Take):
        if isinstance(step, Look):
            election.saw(held)
        else:
            assert isinstance(step, Wait)
            clock.advance(step.seconds)
            takes_after_s += step.seconds
    assert step == Take(held)
    assert TTL_S < takes_after_s < TTL_S * (1 + 1 / LOOKS_PER_TTL)


def test_a_dead_holder_in_our_own_place_is_not_waited_for() -> None:
    clock, instance_id = ManualClock(), InstanceId.new()
    for place, seen, at_once in (("here", "here", True), ("here", "there", False), ("", "", False)):
        election = Election(instance_id, TTL_S, clock, place)
        assert election.next() == Look()
        election.saw(held := Seat(4, 7, InstanceId.new(), "keymanager-1", seen))
        assert (election.next() == Take(held)) is at_once


def test_a_renewal_that_was_refused_or_that_came_late_ends_the_term() -> None:
    for late in (False, True):
        election, clock, _ = lone()
        election.next()
        election.saw(empty := Seat(0, 0, None))
        election.next()
        election.took(empty, clock.monotonic_s(), won=True)
        term = election.term
        assert term is not None
        clock.advance(TTL_S / 3)
        assert election.next() == Renew(term)
        sent_at_s = clock.monotonic_s()
        clock.advance(TTL_S if late else 0.1)
        election.renewed(term, sent_at_s, kept=late)
        assert not term.valid
        assert not isinstance(election.next(), Renew)
        assert election.term is None


def test_a_seat_of_ours_without_a_term_is_taken_again_at_once_in_a_new_epoch() -> None:
    election, clock, own = lone()
    election.next()
    election.saw(empty := Seat(0, 0, None))
    assert election.next() == Take(empty)
    election.unanswered()  # it was done, but nobody said so
    clock.advance(TTL_S / LOOKS_PER_TTL)
    assert election.next() == Take(empty)
    election.took(empty, clock.monotonic_s(), won=False)
    clock.advance(TTL_S / LOOKS_PER_TTL)
    assert election.next() == Look()
    election.saw(ours := Seat(1, 0, own))
    assert election.next() == Take(ours)
    election.took(ours, clock.monotonic_s(), won=True)
    assert election.term is not None
    assert election.term.epoch == 2
