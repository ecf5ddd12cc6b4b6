"""Defects put into the real code on purpose: the simulation must find every one of them.

Each is a mistake that somebody could make, or has made in another system. One that nothing finds would mean that a
check is missing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final
from unittest.mock import patch

from compute import election, replacement
from compute.proposer import Tally
from pageserver import quorum, walreceiver
from safekeeper import acceptor, trim
from safekeeper.acceptor import AcceptorState, DropStream, Effect, Persist
from safekeeper.control_file import ControlState
from safekeeper.offload import OffloadTuning
from safekeeper.remote_wal import RemotePiece, RemoteWal
from safekeeper.term_history import TermHistory
from safekeeper.timeline import Timeline
from shared.api.safekeeper import EndOfWal, VoteResponse
from shared.crypto.envelope import Envelope
from shared.lsn import Lsn
from shared.wire.walstream import Feedback, Status
from tests.simulation_wal import safekeeper, world

_vote = acceptor.vote
_elected = acceptor.elected
_write = safekeeper.SimControl._write


def _donor_by_flush_lsn(votes: Mapping[str, VoteResponse]) -> str:
    return max(votes, key=lambda node: (votes[node].flush_lsn, node))


def _donor_by_name(votes: Mapping[str, VoteResponse]) -> str:
    return max(votes)


async def _forget_promises(self: safekeeper.SimControl, data: bytes) -> None:
    """A term that is only promised does not reach the disk."""
    state = ControlState.parse(data)
    history = state.acceptor.history
    forgetful = replace(state, acceptor=replace(state.acceptor, term=max(history.last_term, 0)))
    await _write(self, forgetful.serialize())


def _vote_twice(state: AcceptorState, term: int, seat: int = 0, generation: int = 0) -> list[Effect]:
    """Equal terms are granted, too."""
    return _vote(replace(state, term=min(state.term, term - 1)), term, seat, generation)


def _keep_the_stream(state: AcceptorState, term: int, seat: int = 0, generation: int = 0) -> list[Effect]:
    return [effect for effect in _vote(state, term, seat, generation) if not isinstance(effect, DropStream)]


def _any_disk(state: AcceptorState, seat: int, generation: int) -> None:
    """One that was replaced votes, too."""


async def _change_seat_and_generation(self: world.Members, node_id: str, seat: int, term: int) -> bool:
    """The new generation begins with the new member, so that not all of the others need have heard of it."""
    changed = await _change_seat(self, node_id, seat, term)
    if changed:
        self.true = self.shown = replace(self.shown, generation=self.shown.generation + 1)
    return changed


_change_seat = world.Members.change_seat


def _one_voter_is_enough(nodes: Sequence[str], term: int, needed: int) -> Tally:
    """For a replacement."""
    return Tally(nodes, term, needed=min(needed, 1))


async def _copy_nothing(self: Any, safekeeper: Any, plan: Any, donor: Any) -> None:
    """The new disk is a member before it holds anything."""


def _do_not_clip(state: AcceptorState, flush_lsn: int, term: int, history: TermHistory) -> list[Effect]:
    return [
        replace(effect, clip_lsn=flush_lsn) if isinstance(effect, Persist) else effect
        for effect in _elected(state, flush_lsn, term, history)
    ]


def _clip_too_little(self: TermHistory, own: TermHistory, own_start_lsn: int, own_flush_lsn: int) -> int:
    """The common point by LSN instead of by term."""
    return min(self.entries[-1].start_lsn, own_flush_lsn)


def _commit_any_log(state: AcceptorState, flush_lsn: int, candidate_lsn: int) -> AcceptorState:
    return replace(state, commit_lsn=max(state.commit_lsn, min(candidate_lsn, flush_lsn)))


def _tell_all(self: walreceiver.WalReceiver) -> None:
    complete = min(self.commit_lsn, self._decoder.end_lsn)
    for connection in self._connections.values():
        connection.write(Feedback(complete, self._remote_consistent_lsn(), self._decoder.end_lsn).pack())


def _whatever_the_source_sends(self: walreceiver.WalReceiver) -> int:
    return self.commit_lsn


def _also_of_a_later_term(self: walreceiver.WalReceiver) -> int:
    """As if a later log began with all *bytes* that were committed: the last half record is not among them."""
    status = self._statuses.get(self._source or "")
    is_held = status is not None and status.last_log_term == status.term >= self._committed.term
    return self.commit_lsn if is_held else 0


def _count_any_term(statuses: Iterable[Status], needed: int) -> quorum.Committed:
    """Positions without histories."""
    held = sorted(statuses, key=lambda status: status.flush_lsn, reverse=True)
    if len(held) < needed:
        return quorum.NOTHING_COMMITTED
    return quorum.Committed(held[needed - 1].term, held[needed - 1].flush_lsn)


_end_of_wal = safekeeper.SimTimeline.end_of_wal


async def _cut_nothing(self: safekeeper.SimTimeline) -> EndOfWal:
    """The new term begins behind half a record."""
    await _end_of_wal(self)
    return EndOfWal(last_record_lsn=Lsn(self.start_lsn), end_lsn=Lsn(self.flush_lsn))


async def _acknowledge_unsynced(self: safekeeper.SimLog, term: int, data: bytes) -> None:
    before = self._io.sync
    self._io.sync = lambda: None  # type: ignore[method-assign]
    try:
        await _append_frame(self, term, data)
    finally:
        self._io.sync = before  # type: ignore[method-assign]


_append_frame = safekeeper.SimLog._append_frame


def _trim_what_is_committed(state: ControlState, tuning: OffloadTuning) -> int:
    return max(0, state.acceptor.commit_lsn - tuning.history_size_bytes)


async def _put_nothing(self: RemoteWal, piece: RemotePiece, content: bytes, envelope: Envelope) -> None:
    pass


_wire_status = Timeline.wire_status


def _begins_where_it_is_committed(self: Timeline) -> Status:
    status = _wire_status(self)
    return replace(status, oldest_lsn=status.commit_lsn)


def _begin_uncommitted(state: ControlState, flush_lsn: int, lsn: int) -> ControlState:
    return replace(state, log=state.log.closed_at(flush_lsn).trimmed_at(lsn))


def _one_is_enough(nodes: int) -> int:
    return 1


Mutation = Callable[[], list[Any]]
"""Patches, to be entered together."""

MUTATIONS: Final[Mapping[str, Mutation]] = {
    "the donor is chosen by flush_lsn alone": lambda: [patch.object(election, "choose_donor", _donor_by_flush_lsn)],
    "any voter is the donor": lambda: [patch.object(election, "choose_donor", _donor_by_name)],
    "the vote is not persisted": lambda: [patch.object(safekeeper.SimControl, "_write", _forget_promises)],
    "a term is voted for twice": lambda: [patch.object(acceptor, "vote", _vote_twice)],
    "the old stream survives the vote": lambda: [patch.object(acceptor, "vote", _keep_the_stream)],
    "the log is not clipped": lambda: [patch.object(acceptor, "elected", _do_not_clip)],
    "the common point is found by LSN": lambda: [patch.object(TermHistory, "common_point", _clip_too_little)],
    "commit_lsn is told to any log, and taken over": lambda: [
        patch.object(acceptor, "commit", _commit_any_log),
        patch.object(walreceiver.WalReceiver, "_send_feedback", _tell_all),
    ],
    "the pageserver counts positions of any term": lambda: [patch.object(walreceiver, "committed", _count_any_term)],
    "the pageserver takes its source's word for the log": lambda: [
        patch.object(walreceiver.WalReceiver, "_feedable_lsn", property(_whatever_the_source_sends))
    ],
    "the pageserver takes a later term's bytes for an earlier one's": lambda: [
        patch.object(walreceiver.WalReceiver, "_feedable_lsn", property(_also_of_a_later_term))
    ],
    "the log is cut nowhere": lambda: [patch.object(safekeeper.SimTimeline, "end_of_wal", _cut_nothing)],
    "what is not synced is acknowledged": lambda: [
        patch.object(safekeeper.SimLog, "_append_frame", _acknowledge_unsynced)
    ],
    "a disk that was replaced votes": lambda: [patch.object(acceptor, "check_member", _any_disk)],
    "the others vote for a replacement in the old generation": lambda: [
        patch.object(world.Members, "reserve", world.Members.reserve_same),
        patch.object(world.Members, "change_seat", _change_seat_and_generation),
    ],
    "a replacement takes one vote": lambda: [patch.object(election, "Tally", _one_voter_is_enough)],
    "a new disk is a member before it holds the log": lambda: [
        patch.object(replacement.Replacer, "_bring_up", _copy_nothing)
    ],
    "WAL is trimmed that is not in layers": lambda: [
        patch.object(trim, "trim_limit", _trim_what_is_committed),
    ],
    "a piece is offloaded that nobody has put": lambda: [patch.object(RemoteWal, "put", _put_nothing)],
    "a donor has trimmed less than it says": lambda: [
        patch.object(Timeline, "wire_status", _begins_where_it_is_committed)
    ],
    "a log goes on behind what it knows as committed": lambda: [
        patch.object(safekeeper, "begun_at", _begin_uncommitted)
    ],
    "one vote is a majority": lambda: [
        patch("compute.proposer.majority", _one_is_enough),
        patch.object(world, "majority", _one_is_enough),
    ],
}
