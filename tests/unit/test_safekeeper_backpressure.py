"""Which part of a log may be acknowledged while the pageserver lags."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safekeeper.backpressure import Backpressure
from shared.wire.frames import ProtocolError
from shared.wire.walstream import Feedback


def test_up_to_the_limit_above_what_is_ingested() -> None:
    pressure = Backpressure(1000, 3000)
    assert pressure.allowed_lsn(10**9) == 4000, "nobody has said anything since the start"
    pressure.heard(0)
    assert pressure.allowed_lsn(10**9) == 4000, "whoever reports does not ingest"
    pressure.heard(5000)
    assert [pressure.allowed_lsn(lsn) for lsn in (4000, 5000, 6000, 6001, 10**9)] == [4000, 5000, 6000, 6000, 6000]
    pressure.heard(9000)
    assert pressure.allowed_lsn(10**9) == 10_000
    pressure.heard(7000)  # the pageserver was restarted
    assert pressure.allowed_lsn(10**9) == 8000


def test_without_a_limit() -> None:
    pressure = Backpressure(0, 3000)
    pressure.heard(5000)
    assert pressure.allowed_lsn(10**12) == 10**12


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_feedback_round_trips(commit_lsn: int, remote_consistent_lsn: int, ingested_lsn: int) -> None:
    feedback = Feedback(commit_lsn, remote_consistent_lsn, ingested_lsn)
    frame = feedback.pack()
    assert Feedback.parse(frame[-24:]) == feedback


@given(st.binary(max_size=40).filter(lambda data: len(data) != 24))
def test_feedback_of_another_size_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Feedback.parse(data)
