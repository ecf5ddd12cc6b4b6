"""What rows of KMS answers come to."""

from __future__ import annotations

from itertools import product

import pytest

from keymanager.lifecycle import KeyEvent, KmsAccess
from keymanager.watch import BACKOFF_MAX_S, INCONCLUSIVE_TO_SUSPEND, Hold, HoldDown, Judgement, ProbeOutcome, Watch

ALLOWED, DENIED, UNREACHABLE, THROTTLED, AMBIGUOUS = ProbeOutcome
INCONCLUSIVE = (UNREACHABLE, THROTTLED, AMBIGUOUS)


def judge_all(
    outcomes: list[ProbeOutcome], *, grace_s: float = 0.0, access: KmsAccess = KmsAccess.ALLOWED
) -> tuple[Watch, list[Judgement]]:
    """Outcomes at 1 s, 2 s, …; the KMS last said yes at 0."""
    watch = Watch(access, grace_s, 1.0, 0.0)
    return watch, [watch.judge(o, float(n), float(n)) for n, o in enumerate(outcomes, start=1)]


def events(outcomes: list[ProbeOutcome], grace_s: float = 0.0) -> list[KeyEvent | None]:
    return [judgement.event for judgement in judge_all(outcomes, grace_s=grace_s)[1]]


def test_one_denial_is_confirmed_at_once_and_two_revoke() -> None:
    watch, (first, second) = judge_all([DENIED, DENIED])
    assert first.event is None
    assert first.confirming
    assert first.probe_again_after_s < 0.1
    assert second == Judgement(KeyEvent.KMS_DENIED, 1.0)
    assert watch.access is KmsAccess.DENIED


def test_a_permission_between_denials_starts_the_count_again() -> None:
    assert events([DENIED, ALLOWED, DENIED, ALLOWED, DENIED]) == [None] * 5


@pytest.mark.parametrize("between", INCONCLUSIVE)
def test_no_answer_between_denials_does_not(between: ProbeOutcome) -> None:
    assert events([DENIED, between, DENIED], grace_s=100.0) == [None, None, KeyEvent.KMS_DENIED]


@pytest.mark.parametrize("outcomes", list(product(INCONCLUSIVE, repeat=4)))
def test_without_an_answer_there_is_never_a_revocation(outcomes: tuple[ProbeOutcome, ...]) -> None:
    assert KeyEvent.KMS_DENIED not in events(list(outcomes))
    assert KeyEvent.KMS_OUTAGE in events(list(outcomes))


@pytest.mark.parametrize("outcome", INCONCLUSIVE)
def test_outage_needs_three_probes_even_without_grace(outcome: ProbeOutcome) -> None:
    _, judgements = judge_all([outcome] * 4)
    assert [j.event for j in judgements] == [None, None, KeyEvent.KMS_OUTAGE, None]
    assert [j.confirming for j in judgements] == [True] * (INCONCLUSIVE_TO_SUSPEND - 1) + [False] * 2


def test_grace_counts_from_the_last_permission() -> None:
    _, judgements = judge_all([UNREACHABLE] * 12, grace_s=10.0)
    assert [n for n, j in enumerate(judgements, start=1) if j.event is not None] == [10]
    # The last probe before the end of the grace is timed to its end.
    watch = Watch(KmsAccess.ALLOWED, 10.0, 4.0, 0.0)
    for at in (1.0, 2.0, 7.5):
        last = watch.judge(UNREACHABLE, at, at)
    assert last == Judgement(None, 2.5)


def test_who_gives_no_answer_is_asked_less_and_less_often_and_who_denies_is_not() -> None:
    _, judgements = judge_all([UNREACHABLE] * 20)
    assert [j.probe_again_after_s for j in judgements[2:]] == [1.0, 2.0] + [BACKOFF_MAX_S] * 16
    _, judgements = judge_all([DENIED] * 20)
    assert {j.probe_again_after_s for j in judgements[1:]} == {1.0}
    # An answer ends it.
    _, judgements = judge_all([UNREACHABLE] * 20 + [ALLOWED] + [UNREACHABLE] * 3)
    assert [j.probe_again_after_s for j in judgements[-4:]] == [1.0, 0.25, 0.25, 1.0]
    # A long interval stays what it is, however long there was no answer.
    watch = Watch(KmsAccess.OUTAGE, 0.0, 60.0, 0.0)
    assert {watch.judge(THROTTLED, 0.0, 1.0).probe_again_after_s for _ in range(2000)} == {0.25, 60.0}


def test_a_permission_within_the_grace_starts_it_again() -> None:
    watch = Watch(KmsAccess.ALLOWED, 10.0, 1.0, 0.0)
    for at in (3.0, 6.0, 9.0):
        assert watch.judge(UNREACHABLE, at, at).event is None
    watch.judge(ALLOWED, 9.5, 9.8)
    assert watch.last_allowed_s == 9.5  # when it was asked for, not when it was answered
    for at in (12.0, 15.0, 19.4):
        assert watch.judge(UNREACHABLE, at, at).event is None
    assert watch.judge(UNREACHABLE, 19.5, 19.5).event is KeyEvent.KMS_OUTAGE


def test_a_grace_that_was_over_before_a_restart_is_over() -> None:
    watch = Watch(KmsAccess.ALLOWED, 10.0, 1.0, -1000.0)
    assert [watch.judge(UNREACHABLE, 0, 0).event for _ in range(3)] == [None, None, KeyEvent.KMS_OUTAGE]


def test_a_denial_during_an_outage_revokes_and_an_outage_during_a_denial_changes_nothing() -> None:
    assert events([UNREACHABLE] * 3 + [DENIED] * 2)[-1] is KeyEvent.KMS_DENIED
    assert events([DENIED] * 2 + [UNREACHABLE] * 5)[2:] == [None] * 5


@pytest.mark.parametrize("access", [KmsAccess.OUTAGE, KmsAccess.DENIED])
def test_one_permission_restores(access: KmsAccess) -> None:
    watch, [judgement] = judge_all([ALLOWED], access=access)
    assert judgement.event is KeyEvent.KMS_ALLOWED
    assert watch.access is KmsAccess.ALLOWED


# --- a KMS that flaps ---

HOLD_DOWN = HoldDown(first_s=5.0, longest_s=40.0, calm_s=100.0)


class Played:
    """A watch with a hold-down and no grace, asked each second from 1 s on, unless it wants to be asked sooner."""

    def __init__(self) -> None:
        self.watch = Watch(KmsAccess.ALLOWED, 0.0, 1.0, 0.0, HOLD_DOWN)
        self.now_s = 0.0
        self.changes: list[tuple[float, KmsAccess]] = []

    def say(self, *outcomes: ProbeOutcome) -> None:
        for outcome in outcomes:
            self.now_s += 1.0
            if self.watch.judge(outcome, self.now_s, self.now_s).event is not None:
                self.changes.append((self.now_s, self.watch.access))

    def say_yes_until_back(self) -> float:
        """How long that takes, from the first yes."""
        begun_s = self.now_s + 1.0
        while self.watch.access is not KmsAccess.ALLOWED:
            self.say(ALLOWED)
        return self.now_s - begun_s


@pytest.mark.parametrize("fall", [[DENIED] * 2, [UNREACHABLE] * 3, [THROTTLED, AMBIGUOUS, UNREACHABLE]])
def test_each_fall_soon_after_a_return_makes_the_next_return_take_longer(fall: list[ProbeOutcome]) -> None:
    played = Played()
    took_s = []
    for _ in range(6):
        played.say(*fall)
        assert played.watch.access is not KmsAccess.ALLOWED, "falling is never put off"
        took_s.append(played.say_yes_until_back())
    assert took_s == [0.0, 5.0, 10.0, 20.0, 40.0, 40.0]


def test_answers_that_take_turns_take_the_computes_down_twice_and_not_in_each_round() -> None:
    """Without a grace every round is a denial that counts and a yes that would restore."""
    played = Played()
    played.say(*[DENIED, DENIED, ALLOWED] * 50)
    assert [access for _, access in played.changes] == [KmsAccess.DENIED, KmsAccess.ALLOWED, KmsAccess.DENIED]
    played.say(DENIED)
    assert played.say_yes_until_back() == 5.0


@pytest.mark.parametrize("interruption", [DENIED, *INCONCLUSIVE])
def test_any_other_answer_begins_the_stretch_again(interruption: ProbeOutcome) -> None:
    played = Played()
    played.say(DENIED, DENIED, ALLOWED, DENIED, DENIED)
    played.say(*[ALLOWED] * 5, interruption)
    assert played.watch.access is KmsAccess.DENIED
    assert played.say_yes_until_back() == 5.0


def test_calm_ends_the_row_of_flaps() -> None:
    played = Played()
    for _ in range(3):
        played.say(DENIED, DENIED)
        played.say_yes_until_back()
    played.say(*[ALLOWED] * 98, DENIED, DENIED)  # 100 s after it was back
    assert played.say_yes_until_back() == 0.0
    played.say(*[ALLOWED] * 97, DENIED, DENIED)  # and 99
    assert played.say_yes_until_back() == 5.0


def test_what_a_hold_says_and_when_it_is_asked_again() -> None:
    played = Played()
    played.say(DENIED, DENIED)
    assert played.watch.hold(played.now_s) is None, "a first fall is no flap"
    played.say(ALLOWED)
    assert played.watch.hold(played.now_s) is None
    played.say(DENIED, DENIED)
    assert played.watch.hold(played.now_s) == Hold(1, 5.0, 5.0)
    played.say(ALLOWED)
    assert played.watch.hold(played.now_s + 2.0) == Hold(1, 5.0, 3.0)
    assert "for 5 s, of which 3 s are left" in Hold(1, 5.0, 3.0).reason
    # The end of the stretch is met, however long the interval is.
    played.watch.configure(0.0, 60.0)
    assert played.watch.judge(ALLOWED, 7.0, 7.5) == Judgement(None, 3.5)
    assert played.watch.judge(ALLOWED, 11.0, 11.0) == Judgement(KeyEvent.KMS_ALLOWED, 60.0)


def test_a_person_does_not_wait_and_the_next_flap_counts_all_the_same() -> None:
    played = Played()
    played.say(DENIED, DENIED, ALLOWED, DENIED, DENIED)
    played.watch.lift_hold()
    played.say(DENIED, ALLOWED)  # the KMS has the last word, and the person has had theirs
    assert played.changes[-1] == (5.0, KmsAccess.DENIED)
    played.watch.lift_hold()
    played.say(ALLOWED)
    assert played.changes[-1] == (8.0, KmsAccess.ALLOWED)
    played.say(DENIED, DENIED)
    assert played.say_yes_until_back() == 10.0


def test_a_denial_while_an_outage_is_held_revokes() -> None:
    played = Played()
    played.say(*[UNREACHABLE] * 3, ALLOWED, *[UNREACHABLE] * 3, ALLOWED, DENIED, DENIED)
    assert played.watch.access is KmsAccess.DENIED
    assert played.say_yes_until_back() == 5.0


def test_a_hold_down_may_be_off() -> None:
    watch = Watch(KmsAccess.ALLOWED, 0.0, 1.0, 0.0, HoldDown(first_s=0.0))
    events = [watch.judge(outcome, n, n).event for n, outcome in enumerate([DENIED, DENIED, ALLOWED] * 4)]
    assert events.count(KeyEvent.KMS_ALLOWED) == 4
    assert HoldDown(first_s=300.0, longest_s=5.0).needed_s(1) == 5.0
    assert HoldDown().needed_s(10**9) == HoldDown().longest_s
