"""The control file in use: one writer at a time, memory changes only after the disk did."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

from safekeeper import files
from safekeeper.control_file import FILE_NAME, ControlState
from shared.errors import UnavailableError


class DiskFullError(UnavailableError):
    """There is no space. What is there is kept; goes on when space comes back."""

    code = "disk_full"


class ControlStore:
    """The persisted state of one timeline.

    `commit_lsn` and `remote_consistent_lsn` are the exception to "disk first": they are hints, may lag on disk, and
    ride along with the next update.
    """

    def __init__(self, directory: Path, state: ControlState, executor: Executor) -> None:
        self._path = directory / FILE_NAME
        self._durable = state
        self._executor = executor
        self._lock = asyncio.Lock()
        self._commit_lsn = state.acceptor.commit_lsn
        self._remote_consistent_lsn = state.remote_consistent_lsn
        self.state = state
        """What is durable, with the hints as they are now. Read-only."""

    @property
    def commit_lsn_is_dirty(self) -> bool:
        return self._commit_lsn > self._durable.acceptor.commit_lsn

    def raise_commit_lsn(self, lsn: int) -> None:
        if lsn > self._commit_lsn:
            self._commit_lsn = lsn
            self.state = self._with_hints()

    def raise_remote_consistent_lsn(self, lsn: int) -> None:
        if lsn > self._remote_consistent_lsn:
            self._remote_consistent_lsn = lsn
            self.state = self._with_hints()

    def _with_hints(self) -> ControlState:
        state = self._durable
        if self._remote_consistent_lsn > state.remote_consistent_lsn:
            state = replace(state, remote_consistent_lsn=self._remote_consistent_lsn)
        if self._commit_lsn > state.acceptor.commit_lsn:
            return replace(state, acceptor=replace(state.acceptor, commit_lsn=self._commit_lsn))
        return state

    async def update(
        self, change: Callable[[ControlState], ControlState], applied: Callable[[], None] = lambda: None
    ) -> ControlState:
        """Apply `change` to the current state, make the result durable, then visible. Not to be cancelled half way: a
        caller that is cancelled leaves it running to its end.

        `applied` is called in the step that makes it visible: what else in memory has to agree with the file does so
        at any moment, whatever becomes of the caller.
        Raises DiskFullError (nothing changed), FsyncFailedError (the timeline must stop), or what `change` raises.
        """
        return await asyncio.shield(asyncio.create_task(self._update(change, applied)))

    async def _update(
        self, change: Callable[[ControlState], ControlState], applied: Callable[[], None]
    ) -> ControlState:
        async with self._lock:
            state = change(self.state)
            if state != self._durable:
                await self._write(state.serialize())
                self._durable = state
                self.state = self._with_hints()
            applied()
            return state

    async def _write(self, data: bytes) -> None:
        """Replace the file, durably. Raises DiskFullError (nothing changed), FsyncFailedError."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._executor, files.replace_file, self._path, data)
        except OSError as error:
            raise DiskFullError(f"the control file cannot be written: {error.strerror}") from None
