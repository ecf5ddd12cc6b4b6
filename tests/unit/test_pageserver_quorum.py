"""Which WAL is committed, from what safekeepers say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageserver.quorum import Committed, committed, majority
from shared.wire.walstream import Status


def said(*pairs: tuple[int, int]) -> list[Status]:
    """(last_log_term, flush_lsn) of each safekeeper."""
    return [Status(term=term, last_log_term=term, flush_lsn=flush, commit_lsn=0) for term, flush in pairs]


@pytest.mark.parametrize(
    ("statuses", "lsn"),
    [
        ([], 0),
        ([(1, 100)], 0),
        ([(1, 100), (1, 80)], 80),
        ([(1, 100), (1, 80), (1, 90)], 90),
        # A longer log of another term is another log.
        ([(1, 100), (2, 80), (2, 90)], 80),
        ([(1, 100), (2, 200), (3, 300)], 0),
        # One that was elected alone does not take away what two others hold.
        ([(1, 100), (1, 100), (2, 500)], 100),
    ],
)
def test_what_two_of_three_hold_in_one_history(statuses: list[tuple[int, int]], lsn: int) -> None:
    assert committed(said(*statuses), majority(3)).lsn == lsn


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 50)), max_size=5))
def test_is_the_largest_position_that_a_majority_of_one_history_reaches(pairs: list[tuple[int, int]]) -> None:
    quorum = majority(5)

    def held(position: int) -> bool:
        return any(sum(t == term and flush >= position for t, flush in pairs) >= quorum for term in (1, 2, 3))

    assert committed(said(*pairs), quorum).lsn == max((p for p in range(51) if held(p)), default=0)


def test_wal_of_an_older_term_does_not_count_while_a_newer_one_is_elected() -> None:
    """Raft's figure 8: A and C, in term 6, hold term 4's log up to 145; B, with term 5's, may still be elected by C."""
    a = Status(term=6, last_log_term=4, flush_lsn=148, commit_lsn=100)
    c = Status(term=6, last_log_term=4, flush_lsn=145, commit_lsn=100)
    b = Status(term=5, last_log_term=5, flush_lsn=100, commit_lsn=100)
    assert committed([a, b, c], majority(3)) == Committed(0, 0)


def test_only_safekeepers_of_the_committed_history_agree() -> None:
    quorum = committed(said((5, 200), (5, 180)), majority(3))
    assert quorum == Committed(5, 180)
    assert quorum.is_agreed_by(Status(5, 5, 10, 0))
    assert not quorum.is_agreed_by(Status(4, 4, 500, 0))
    assert not quorum.is_agreed_by(Status(6, 5, 500, 0))
    assert not quorum.is_agreed_by(Status(6, 6, 500, 0)), "it may have others in place of the last half record"


def test_a_later_terms_position_takes_the_place_of_an_earlier_ones() -> None:
    """Behind the last complete record of term 5 are other bytes now, and fewer."""
    assert committed(said((6, 170), (6, 160)), majority(3)) > committed(said((5, 200), (5, 180)), majority(3))
