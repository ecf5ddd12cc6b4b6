"""Which part of a log may be acknowledged while the pageserver lags."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safekeeper.backpressure import Backpressure, BackpressureTuning
from shared.wire.frames import ProtocolError
from shared.wire.walstream import Feedback

TUNING = BackpressureTuning(1000, 5.0)


def test_up_to_the_limit_above_what_is_ingested() -> None:
    pressure = Backpressure(TUNING)
    assert pressure.allowed_lsn(10**9, 0) == 10**9, "nobody ingests"
    pressure.heard(0, 0)
    assert pressure.allowed_lsn(10**9, 0) == 10**9, "whoever reports does not ingest"
    pressure.heard(5000, 1)
    assert [pressure.allowed_lsn(lsn, 2) for lsn in (4000, 5000, 6000, 6001, 10**9)] == [4000, 5000, 6000, 6000, 6000]
    pressure.heard(9000, 3)
    assert pressure.allowed_lsn(10**9, 4) == 10_000
    pressure.heard(7000, 5)  # the pageserver was restarted
    assert pressure.allowed_lsn(10**9, 6) == 8000


def test_nobody_waits_for_a_pageserver_that_makes_no_progress() -> None:
    pressure = Backpressure(TUNING)
    pressure.heard(5000, 100)
    for now_s in (101, 104, 105):
        pressure.heard(5000, now_s)  # it says so, and that is no progress
        assert pressure.allowed_lsn(9000, now_s) == 6000
    assert pressure.allowed_lsn(9000, 105.1) == 9000
    pressure.heard(5001, 106)
    assert pressure.allowed_lsn(9000, 106) == 6001


def test_without_a_limit() -> None:
    pressure = Backpressure(BackpressureTuning(0))
    pressure.heard(5000, 0)
    assert pressure.allowed_lsn(10**12, 0) == 10**12


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_feedback_round_trips(commit_lsn: int, remote_consistent_lsn: int, ingested_lsn: int) -> None:
    feedback = Feedback(commit_lsn, remote_consistent_lsn, ingested_lsn)
    frame = feedback.pack()
    assert Feedback.parse(frame[-24:]) == feedback


@given(st.binary(max_size=40).filter(lambda data: len(data) != 24))
def test_feedback_of_another_size_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Feedback.parse(data)
