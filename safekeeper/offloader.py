"""Performs what offload.py and trim.py decide, for the log of one timeline.

Every step may be the last one before a crash; the next pass after it goes on by what the control file and the object
store say. Passes of one log run one at a time (`Timeline.offload`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from safekeeper.control_file import ControlState
from safekeeper.control_store import ControlStore
from safekeeper.log_map import Extent, Place
from safekeeper.offload import OffloadTuning, RemoteReader, to_offload, to_remove
from safekeeper.remote_wal import RemotePiece, RemoteWal
from safekeeper.trim import trim_limit, trimmed
from shared.crypto.envelope import Envelope
from shared.failpoints import failpoint
from shared.telemetry import get_logger

_log = get_logger(__name__)


class OffloadedLog(Protocol):
    """What a pass does with a log. Implemented by WalStore."""

    async def change_control(self, change: Callable[[ControlState], ControlState]) -> None: ...

    async def sealed(self, extent: Extent) -> tuple[bytes, Envelope] | None: ...


class Offloader:
    def __init__(
        self,
        log: OffloadedLog,
        control: ControlStore,
        remote: RemoteWal,
        reader: RemoteReader,
        node_id: str,
        tuning: OffloadTuning,
    ) -> None:
        self._log = log
        self._control = control
        self._remote = remote
        self._reader = reader
        self._node_id = node_id
        self._tuning = tuning
        self._swept_lsn = 0

    @property
    def trim_limit(self) -> int:
        return trim_limit(self._control.state, self._tuning)

    async def run_once(self) -> None:
        """One pass. Raises KeyAccessError, UnavailableError, StoreDeniedError, IntegrityError."""
        await self._trim()
        for extent in to_offload(self._control.state):
            end_lsn, term = extent.end_lsn, extent.piece.term
            assert end_lsn is not None  # noqa: S101 - to_offload picks closed ones
            there = await self._remote.pieces(extent.piece.segment_number)
            if not any(piece.covers(term, extent.start_lsn, end_lsn) for piece in there):
                await self._put(extent)
            failpoint("offload-put")
            await self._place(extent, Place.BOTH)
        for extent in to_remove(self._control.state, self._tuning.keep_size_bytes):
            if await self._reader.has(extent):
                await self._place(extent, Place.REMOTE)
            else:
                _log.warning(
                    "offloaded WAL is gone or damaged, it is put again",
                    timeline_id=str(self._control.state.timeline_id),
                    piece=extent.piece.file_name,
                )
                await self._put(extent)

    async def _trim(self) -> None:
        """First the control file says that the log begins later; then files and objects go."""
        if trimmed(self._control.state, self._tuning) is not self._control.state:
            failpoint("trim-before-control")
            await self._log.change_control(lambda state: trimmed(state, self._tuning))
            failpoint("trim-files-removed")
        trimmed_lsn = self._control.state.log.trimmed_lsn
        if trimmed_lsn > self._swept_lsn:  # also what a crash has left
            await self._remote.remove_before(trimmed_lsn)
            failpoint("trim-objects-removed")
            self._swept_lsn = trimmed_lsn

    async def _put(self, extent: Extent) -> None:
        """Nothing, if it was sealed anew just now: the next pass takes the new one."""
        assert extent.end_lsn is not None  # noqa: S101 - only closed ones are offloaded
        sealed = await self._log.sealed(extent)
        if sealed is not None:
            await self._remote.put(RemotePiece(extent.piece, extent.start_lsn, extent.end_lsn, self._node_id), *sealed)

    async def _place(self, extent: Extent, place: Place) -> None:
        def change(state: ControlState) -> ControlState:
            log = state.log.placed(extent, place)
            return state if log is None else replace(state, log=log)

        await self._log.change_control(change)
