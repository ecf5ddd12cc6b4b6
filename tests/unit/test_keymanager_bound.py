"""The computed worst case against the watcher's core: no adversary gets past it, and one gets as far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keymanager.bound import BoundSettings, detection_s, worst_case, worst_cases
from keymanager.lease_table import CLOCK_DRIFT
from keymanager.state import KmsAccess
from keymanager.watch import ProbeOutcome, Watch, jittered_s
from shared.api.keymanager import KeyState, NoCause

SETTINGS = BoundSettings(
    interval_s=1.0, grace_s=0.0, deadline_s=4.0, lease_ttl_s=5.0, leader_ttl_s=1.5, session_s=3600.0
)
DENIED = ProbeOutcome.DENIED
INCONCLUSIVE = (ProbeOutcome.UNREACHABLE, ProbeOutcome.THROTTLED, ProbeOutcome.AMBIGUOUS)
ANSWERS = {
    NoCause.DENIED: (DENIED,),
    NoCause.NO_ANSWER: INCONCLUSIVE,
    NoCause.FLAPPING: (DENIED, *INCONCLUSIVE),
}
"""What the KMS may say from the no on."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What the adversary does to one probe, and to the pause behind it."""

    outcome: ProbeOutcome
    takes: float = 1.0
    """Of the deadline."""
    draw: float = 0.0
    """Of the jitter; 0 is the longest pause."""


def found_after_s(settings: BoundSettings, last_yes_takes: float, draw: float, probes: Sequence[Probe]) -> float:
    """Plays `Watcher._watch` and `_check` on a virtual clock. The last yes is decided at 0, and asked for just then;
    returns when issuing stops. What comes after `probes` is like the last of them."""
    watch = Watch(KmsAccess.ALLOWED, settings.grace_s, settings.interval_s, 0.0)
    now_s = last_yes_takes * settings.deadline_s
    pause_s = jittered_s(watch.judge(ProbeOutcome.ALLOWED, 0.0, now_s).probe_again_after_s, draw)
    for probe in chain(probes, repeat(probes[-1])):
        asked_at_s = now_s + pause_s
        now_s = asked_at_s + probe.takes * settings.deadline_s
        judgement = watch.judge(probe.outcome, asked_at_s, now_s)
        if judgement.event is not None:
            return now_s
        pause_s = judgement.probe_again_after_s
        if not judgement.confirming:
            pause_s = jittered_s(pause_s, probe.draw)
    raise AssertionError("unreachable")


shares = st.floats(0, 1)
draws = st.floats(0, 1)


@st.composite
def attacks(draw: st.DrawFn) -> tuple[NoCause, BoundSettings, float, float, list[Probe]]:
    cause = draw(st.sampled_from(list(ANSWERS)))
    settings = replace(
        SETTINGS,
        interval_s=draw(st.floats(0.1, 60)),
        grace_s=draw(st.one_of(st.just(0.0), st.floats(0, 300))),
        deadline_s=draw(st.floats(0.05, 60)),
    )
    probe = st.builds(Probe, st.sampled_from(ANSWERS[cause]), shares, draws)
    return cause, settings, draw(shares), draw(draws), draw(st.lists(probe, min_size=1, max_size=40))


@given(attacks())
def test_no_row_of_answers_is_found_out_later_than_computed(
    attack: tuple[NoCause, BoundSettings, float, float, list[Probe]],
) -> None:
    cause, settings, last_yes_takes, pause_draw, probes = attack
    bound_s = detection_s(cause, settings)
    assert bound_s is not None
    assert found_after_s(settings, last_yes_takes, pause_draw, probes) <= bound_s * (1 + 1e-9)


UNREACHABLE = ProbeOutcome.UNREACHABLE
WORST: list[tuple[NoCause, float, Callable[[], list[Probe]]]] = [
    (NoCause.DENIED, 0.0, lambda: [Probe(DENIED)]),
    (NoCause.DENIED, 600.0, lambda: [Probe(DENIED)]),
    (NoCause.NO_ANSWER, 0.0, lambda: [Probe(UNREACHABLE)]),
    (NoCause.FLAPPING, 0.0, lambda: [Probe(UNREACHABLE)] * 2 + [Probe(DENIED), Probe(UNREACHABLE)]),
]


@pytest.mark.parametrize(("cause", "grace_s", "probes"), WORST)
def test_the_bound_is_reached(cause: NoCause, grace_s: float, probes: Callable[[], list[Probe]]) -> None:
    """It promises no more than it must."""
    settings = replace(SETTINGS, grace_s=grace_s)
    assert found_after_s(settings, 1.0, 0.0, probes()) == pytest.approx(detection_s(cause, settings))


@pytest.mark.parametrize(("cause", "denials"), [(NoCause.NO_ANSWER, 0), (NoCause.FLAPPING, 1)])
def test_the_bound_of_a_long_grace_is_reached(cause: NoCause, denials: int) -> None:
    """Quick answers until a whole interval before the grace is over, and then the slowest that there are."""
    settings = replace(SETTINGS, grace_s=100.0)
    early = [Probe(UNREACHABLE, takes=0.0)] * 200
    best = 0.0
    for at in range(len(early)):
        late = [Probe(DENIED)] * denials + [Probe(UNREACHABLE)]
        attack = [*early[:at], Probe(UNREACHABLE, takes=0.0), *late]
        best = max(best, found_after_s(settings, 0.0, 0.0, attack))
    bound_s = detection_s(cause, settings)
    assert bound_s is not None
    assert bound_s - 0.6 < best <= bound_s


def test_what_follows_the_detection() -> None:
    lease_s = SETTINGS.lease_ttl_s * (1 + CLOCK_DRIFT)
    for case in worst_cases(SETTINGS):
        found_s = detection_s(case.cause, SETTINGS)
        assert found_s is not None
        assert case.detection_s == pytest.approx(found_s, abs=0.0011)
        assert case.reachable_s == pytest.approx(found_s + SETTINGS.fan_out_s, abs=0.0011)
        assert case.partitioned_s == pytest.approx(found_s + lease_s, abs=0.0011)
        assert case.keymanager_stalled_s == pytest.approx(found_s + lease_s + SETTINGS.leader_ttl_s, abs=0.0011)


def test_a_short_lease_ends_what_a_push_does_not_reach_in_time() -> None:
    case = worst_case(NoCause.OPERATOR, replace(SETTINGS, lease_ttl_s=0.5))
    assert (case.detection_s, case.reachable_s, case.partitioned_s) == (0.0, 0.51, 0.51)


def test_what_is_not_known_is_not_promised() -> None:
    case = worst_case(NoCause.TRUST_WITHDRAWN, replace(SETTINGS, session_s=None))
    assert (case.detection_s, case.reachable_s, case.partitioned_s, case.keymanager_stalled_s) == (None,) * 4


def test_every_cause_has_a_case_and_a_state_that_serves_nothing() -> None:
    cases = worst_cases(SETTINGS)
    assert [case.cause for case in cases] == list(NoCause)
    assert KeyState.ACTIVE not in {case.state for case in cases}


def test_a_bound_is_rounded_upwards() -> None:
    case = worst_case(NoCause.DENIED, replace(SETTINGS, interval_s=math.pi))
    exact = detection_s(NoCause.DENIED, replace(SETTINGS, interval_s=math.pi))
    assert case.detection_s is not None
    assert exact is not None
    assert exact <= case.detection_s < exact + 0.0011


def test_the_documented_figures_are_computed_ones() -> None:
    rows = []
    for line in (Path(__file__).parents[2] / "docs/key-configurations.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[1].endswith(" s"):
            rows.append([float(cell.removesuffix(" s")) for cell in cells[1:]])
    computed = [[c.detection_s, c.reachable_s, c.partitioned_s, c.keymanager_stalled_s] for c in worst_cases(SETTINGS)]
    assert rows == [[pytest.approx(value, abs=0.051) for value in row] for row in computed]
