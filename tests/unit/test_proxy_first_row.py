"""The first row of a compute: which of the many things that go through a session it is."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from compute.proxy.first_row import FirstRow, has_row
from shared.wire.pgproto import CommandComplete, DataRow, ReadyForQuery, TransactionStatus

ROW = DataRow((b"1",)).serialize()
DONE = CommandComplete("SET").serialize() + ReadyForQuery(TransactionStatus.IDLE).serialize()


def test_the_question_that_got_it_is_timed_and_nothing_before() -> None:
    """One second passes from each look at the clock to the next."""
    seconds = itertools.count()
    seen: list[tuple[float, float]] = []
    first = FirstRow(lambda: float(next(seconds)), lambda *both: seen.append(both))  # 0
    first.asked()  # a password
    assert not first.answered(ROW, ready=False)
    first.logged_in()  # 1
    first.logged_in()
    first.asked()  # 2
    assert not first.answered(DONE, ready=True)
    next(seconds)  # 3: the client thinks
    first.asked()  # 4
    first.asked()
    assert not first.answered(DONE[:-6], ready=False)
    assert first.answered(DONE[:-6] + ROW + DONE, ready=True)  # 5
    assert seen == [(1.0, 1.0)]


messages = st.builds(
    lambda kind, body: bytes([kind]) + (4 + len(body)).to_bytes(4, "big") + body,
    st.integers(0, 255).filter(lambda kind: kind != ord("D")),
    st.binary(max_size=40),
)


@given(st.lists(messages, max_size=6), st.booleans(), st.lists(messages, max_size=3), st.integers(0, 200))
def test_a_row_is_found_behind_whatever_stands_before_it(
    before: list[bytes], there: bool, after: list[bytes], cut: int
) -> None:
    data = b"".join(before) + (ROW if there else b"") + b"".join(after)
    left = max(0, len(data) - cut)
    assert has_row(data[:left]) is (there and left >= len(b"".join(before)) + 5)


@given(st.binary(max_size=300))
def test_nonsense_ends(noise: bytes) -> None:
    assert has_row(noise) in (True, False)
