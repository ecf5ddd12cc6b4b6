"""The checker finds what it is there for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cluster_faults.history import History


def history(*answers: float) -> History:
    """No from 10 to 30 with a bound of 5, and again from 40 on with a bound of 1."""
    made = History()
    made.said_no(10.0, 5.0)
    made.will_say_yes(30.0)
    made.said_no(40.0, 1.0)
    for at_s in answers:
        made.answered(at_s, "read")
    return made


@pytest.mark.parametrize("at_s", [0.0, 10.0, 14.9, 15.0, 30.0, 39.0, 40.5, 41.0])
def test_answers_within_the_bounds_are_good(at_s: float) -> None:
    assert history(at_s).violations() == []
    assert history().violations(commits=[at_s]) == []


@pytest.mark.parametrize("at_s", [15.1, 29.9, 41.1, 1000.0])
def test_answers_after_the_bounds_are_not(at_s: float) -> None:
    assert len(history(0.0, at_s, 31.0).violations()) == 1
    (found,) = history().violations(commits=[0.0, at_s])
    assert found.startswith("commit")


@given(st.lists(st.floats(0, 100)), st.floats(0.001, 58))
def test_one_late_answer_is_never_hidden_by_others(answers: list[float], late_s: float) -> None:
    assert history(*answers, 41.0 + late_s).violations()


def test_the_last_answer_is_measured_from_the_last_no() -> None:
    assert history(12.0, 40.7, 39.0).last_answer_after_s(commits=[40.2]) == pytest.approx(0.7)
    assert history(12.0).last_answer_after_s() == 0.0
    assert history(12.0, 41.0).ways_since(20.0) == {"read": 1}
