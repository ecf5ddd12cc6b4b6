"""What rows of KMS answers come to."""

from __future__ import annotations

from itertools import product

import pytest

from keymanager.lifecycle import KeyEvent, KmsAccess
from keymanager.watch import BACKOFF_MAX_S, INCONCLUSIVE_TO_SUSPEND, Judgement, ProbeOutcome, Watch

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
