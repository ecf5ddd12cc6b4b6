"""Which WAL nobody will ask for any more: it goes, from the disk and from the object store (ADR 40). A core.

    below remote_consistent_lsn by `history_size_bytes`, committed, and below what stays on the disk in any case
        → control file: trimmed_lsn, and no pieces before it  →  files and objects that end at or before it go

Why that is safe. What is below remote_consistent_lsn is in layers that a durable index lists, and the pageserver never
starts over below it: it refuses an object store that shows less. Reads of the past, branches and restores to a time are
made of layers alone. A branch has a log of its own. A safekeeper that lacks what its donor has trimmed goes on from
there (peer_recovery.py): what it skips is committed, and in layers. A replica that lags by more starts anew.

Each node trims by what it has heard itself, and deletes objects whoever put them. A peer that has heard less may look
for them in vain until it has heard the same; what it misses it would not be asked for.
"""

from __future__ import annotations

from dataclasses import replace

from safekeeper.control_file import ControlState
from safekeeper.offload import OffloadTuning


def trim_limit(state: ControlState, tuning: OffloadTuning) -> int:
    """Nobody asks for WAL before this.

    Up to commit_lsn this log is the one that is in layers. That it lags behind remote_consistent_lsn costs no margin:
    what peers have trimmed by that, this node may be asked for and not have.
    """
    in_layers = state.remote_consistent_lsn - tuning.history_size_bytes
    return max(0, min(in_layers, state.acceptor.commit_lsn - tuning.keep_size_bytes))


def trim_point(state: ControlState, tuning: OffloadTuning) -> int:
    """Where the last closed piece ends that lies before that; 0 if there is none."""
    limit = trim_limit(state, tuning)
    ends = (extent.end_lsn for extent in state.log.extents)
    return max((end for end in ends if end is not None and end <= limit), default=0)


def trimmed(state: ControlState, tuning: OffloadTuning) -> ControlState:
    """Without the pieces that nobody will ask for; the same state when there are none."""
    lsn = trim_point(state, tuning)
    return state if lsn <= state.log.oldest_lsn else replace(state, log=state.log.trimmed_at(lsn))


def begun_at(state: ControlState, flush_lsn: int, lsn: int) -> ControlState:
    """With a log that begins at `lsn`, where the donor's does; ours ends before, at `flush_lsn`. What was trimmed was
    committed."""
    acceptor = replace(state.acceptor, commit_lsn=max(state.acceptor.commit_lsn, lsn))
    return replace(state, acceptor=acceptor, log=state.log.closed_at(flush_lsn).trimmed_at(lsn))
