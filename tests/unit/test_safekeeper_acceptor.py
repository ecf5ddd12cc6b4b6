"""Messages in, effects out: what is persisted before what is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from safekeeper import acceptor
from safekeeper.acceptor import AcceptorState, DropStream, EndSubscriptions, Persist, ReplyVote
from safekeeper.log_map import LogMap
from safekeeper.peer_recovery import is_padding
from safekeeper.term_history import TermHistory, TermRange
from safekeeper.wal_segment import PieceId
from shared.errors import ConflictError, InvalidInputError
from shared.lsn import WAL_SEGMENT_SIZE_BYTES

H = TermHistory.of


def state(term: int, entries: list[tuple[int, int]], commit_lsn: int = 100) -> AcceptorState:
    return AcceptorState(100, term, H(entries), commit_lsn)


def test_a_vote_drops_the_stream_then_persists_then_answers() -> None:
    before = state(3, [(3, 100)])
    effects = acceptor.vote(before, 4)
    assert effects == [DropStream(), EndSubscriptions(), Persist(state(4, [(3, 100)])), ReplyVote(granted=True)]


@pytest.mark.parametrize("term", [1, 2, 3])
def test_a_vote_for_an_old_term_changes_nothing(term: int) -> None:
    assert acceptor.vote(state(3, []), term) == [ReplyVote(granted=False)]


def test_a_vote_is_of_this_disk_and_of_the_newest_membership() -> None:
    member = replace(state(3, [(3, 100)]), seat=2, generation=4)
    for seat, generation, reason in ((1, 4, "disk"), (0, 9, "disk"), (3, 4, "disk"), (2, 3, "membership")):
        for term in (2, 4):
            with pytest.raises(ConflictError, match=reason):
                acceptor.vote(member, term, seat, generation)
    # What it promises in, it has stored before it answers.
    assert Persist(replace(member, term=4, generation=6)) in acceptor.vote(member, 4, 2, 6)
    assert acceptor.vote(member, 3, 2, 6) == [ReplyVote(granted=False)]


@pytest.mark.parametrize("term", [0, -1, 1 << 64])
def test_a_term_that_cannot_be_is_refused(term: int) -> None:
    with pytest.raises(InvalidInputError):
        acceptor.vote(state(3, []), term)


def test_elected_clips_and_adopts_in_one_step() -> None:
    before = state(5, [(1, 100), (4, 200)])
    after = H([(1, 100), (3, 150), (5, 180)])
    assert acceptor.elected(before, 250, 5, after) == [
        EndSubscriptions(),
        Persist(AcceptorState(100, 5, after, 100), clip_lsn=150),
    ]


def test_elected_without_a_clip_leaves_subscriptions_alone() -> None:
    before = state(5, [(1, 100)])
    after = H([(1, 100), (5, 300)])
    assert acceptor.elected(before, 250, 5, after) == [Persist(AcceptorState(100, 5, after, 100), clip_lsn=250)]


def test_elected_again_changes_nothing() -> None:
    assert acceptor.elected(state(5, [(1, 100), (5, 300)]), 310, 5, H([(1, 100), (5, 300)])) == []


@pytest.mark.parametrize(
    ("term", "entries", "error"),
    [
        (4, [(1, 100), (4, 300)], ConflictError),  # deposed
        (6, [(1, 100), (6, 300)], ConflictError),  # not voted for
        (5, [(1, 100)], InvalidInputError),  # its own term is missing
        (5, [(1, 108), (5, 300)], InvalidInputError),  # another timeline's start
        (5, [(1, 100), (2, 120), (5, 300)], ConflictError),  # takes back what is committed
    ],
)
def test_elected_refuses(term: int, entries: list[tuple[int, int]], error: type[Exception]) -> None:
    with pytest.raises(error):
        acceptor.elected(state(5, [(1, 100)], commit_lsn=200), 250, term, H(entries))


def test_one_term_has_one_history() -> None:
    with pytest.raises(ConflictError):
        acceptor.elected(state(5, [(5, 100)]), 100, 5, H([(1, 100), (5, 100)]))
    with pytest.raises(ConflictError):
        H([(1, 100), (2, 300)]).common_point(H([(1, 100), (2, 200)]), 100, 400)


@pytest.mark.parametrize(
    ("leader", "own", "flush_lsn", "common"),
    [
        ([(1, 100)], [], 100, 100),
        ([(2, 100)], [(1, 100)], 300, 100),
        ([(1, 100), (2, 200)], [(1, 100)], 300, 200),
        ([(1, 100), (2, 200)], [(1, 100)], 150, 150),
        ([(1, 100), (3, 200)], [(1, 100), (2, 150)], 300, 150),
        ([(1, 100), (3, 120)], [(1, 100), (2, 150)], 300, 120),
        ([(1, 100), (2, 150), (3, 250)], [(1, 100), (2, 150)], 200, 200),
        ([(1, 100), (3, 150)], [(1, 100), (2, 180)], 160, 150),  # entry (2, 180) was never reached
    ],
)
def test_where_histories_part(
    leader: list[tuple[int, int]], own: list[tuple[int, int]], flush_lsn: int, common: int
) -> None:
    assert H(leader).common_point(H(own), 100, flush_lsn) == common


def test_last_log_term_is_that_of_the_log_and_not_of_the_history() -> None:
    before = state(7, [(2, 100), (7, 400)])
    assert [before.last_log_term(lsn) for lsn in (100, 399, 400, 500)] == [2, 2, 7, 7]
    assert state(7, []).last_log_term(100) == 0


def test_streaming_needs_the_term_its_leader_and_its_start() -> None:
    acceptor.check_may_stream(state(5, [(5, 300)]), 300, 5)
    for before, term in ((state(5, [(5, 300)]), 4), (state(6, [(5, 300)]), 6), (state(6, [(5, 300)]), 5)):
        with pytest.raises(ConflictError):
            acceptor.check_may_stream(before, 300, term)
    with pytest.raises(ConflictError):
        acceptor.check_may_stream(state(5, [(5, 300)]), 299, 5)


def test_commit_lsn_is_monotone_bounded_and_of_the_current_term() -> None:
    before = state(5, [(5, 100)], commit_lsn=200)
    assert acceptor.commit(before, 300, 250).commit_lsn == 250
    assert acceptor.commit(before, 300, 150) is before
    assert acceptor.commit(before, 300, 900).commit_lsn == 300
    voted = state(6, [(5, 100)], commit_lsn=200)
    assert acceptor.commit(voted, 300, 250) is voted


def test_ranges_follow_the_terms() -> None:
    history = H([(1, 100), (2, 200), (3, 200), (4, 300)])
    assert history.ranges(150, 350) == [TermRange(1, 150, 200), TermRange(3, 200, 300), TermRange(4, 300, 350)]
    assert history.ranges(220, 220) == []
    with pytest.raises(InvalidInputError):
        history.ranges(99, 120)
    for bad in ([(0, 100)], [(2, 100), (2, 200)], [(2, 100), (1, 200)], [(1, 200), (2, 100)]):
        with pytest.raises(InvalidInputError):
            H(bad)


def test_the_map_closes_clips_and_opens() -> None:
    size = WAL_SEGMENT_SIZE_BYTES
    log = LogMap(size + 40).opened(PieceId(1, 1, 0), size + 40).opened(PieceId(2, 1, 1), 2 * size)
    log.check(H([(1, size + 40)]))
    assert [(e.start_lsn, e.end_lsn) for e in log.extents] == [(size + 40, 2 * size), (2 * size, None)]
    clipped = log.closed_at(size + 100)
    assert [(e.start_lsn, e.end_lsn) for e in clipped.extents] == [(size + 40, size + 100)]
    assert clipped.next_sequence == 2, "a name is never used again"
    assert log.closed_at(2 * size).extents == log.extents[:1], "an open piece without WAL goes away"
    assert log.closed_at(size + 40).extents == ()
    assert log.find(size + 40) == 0
    assert log.find(2 * size - 1) == 0
    assert log.find(2 * size) == 1


def test_padding_is_less_than_an_alignment_or_the_rest_of_a_segment() -> None:
    size = WAL_SEGMENT_SIZE_BYTES
    assert is_padding(101, 104)
    assert not is_padding(96, 104)
    assert not is_padding(104, 104)
    assert is_padding(size + 1000, 2 * size)
    assert not is_padding(size, 2 * size)
    assert not is_padding(size - 8, 2 * size)
