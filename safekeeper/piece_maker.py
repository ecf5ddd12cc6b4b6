"""Makes new pieces: sequence number, DEK, files; ahead of time where it can. At most one is waiting to be taken."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

from safekeeper import piece_file
from safekeeper.control_store import DiskFullError
from safekeeper.piece_file import PieceFile
from safekeeper.piece_keys import PieceKeys
from safekeeper.wal_segment import PieceCipher, PieceHeader, PieceId
from shared.crypto.aead import default_suite
from shared.lsn import WAL_SEGMENT_SIZE_BYTES


class _Prepared(NamedTuple):
    piece: PieceId
    start_lsn: int
    task: asyncio.Task[PieceFile]

    def fits(self, term: int, lsn: int) -> bool:
        return (self.piece.term, self.start_lsn) == (term, lsn)

    @property
    def failed(self) -> bool:
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)


class PieceMaker:
    """What is made is not part of the log until the control file says so; what is not taken is removed again."""

    def __init__(self, directory: Path, keys: PieceKeys, executor: Executor, next_sequence: int) -> None:
        self._directory = directory
        self._keys = keys
        self._executor = executor
        self._next_sequence = next_sequence
        self._waiting: _Prepared | None = None
        self._discarding: set[asyncio.Task[None]] = set()
        self._making: set[asyncio.Task[PieceFile]] = set()

    @property
    def idle(self) -> bool:
        return self._waiting is None

    @property
    def waiting(self) -> PieceId | None:
        """What is being made, or is made and not taken yet."""
        return None if self._waiting is None else self._waiting.piece

    def begin(self, term: int, start_lsn: int) -> None:
        """Start to make the piece that will be needed at `start_lsn`. Only while `idle`."""
        self._waiting = self._make(term, start_lsn)

    async def ready(self, term: int, start_lsn: int) -> None:
        """Returns when the piece for `start_lsn` lies ready. Raises as `take`."""
        if self._waiting is not None and not self._waiting.fits(term, start_lsn):
            self.forget()
        if self._waiting is None:
            self.begin(term, start_lsn)
        waiting = self._waiting
        assert waiting is not None  # noqa: S101 - begun just now
        await asyncio.shield(waiting.task)

    async def take(self, term: int, start_lsn: int) -> PieceFile:
        """The piece for `start_lsn`, made now unless it is there.

        Raises KeyAccessError, UnavailableError (DiskFullError among them), FsyncFailedError.
        """
        if self._waiting is not None and (self._waiting.failed or not self._waiting.fits(term, start_lsn)):
            self.forget()
        taken = self._waiting or self._make(term, start_lsn)
        self._waiting = None
        return await taken.task

    def forget(self) -> None:
        """Let go of what is waiting, and remove its files."""
        forgotten, self._waiting = self._waiting, None
        if forgotten is not None:
            task = asyncio.create_task(self._discard(forgotten))
            self._discarding.add(task)
            task.add_done_callback(self._discarding.discard)

    async def aclose(self) -> None:
        self.forget()
        if self._discarding:
            await asyncio.wait(self._discarding)

    def reserve(self, segment_number: int, term: int) -> PieceId:
        """A name that no other piece of the timeline has."""
        piece = PieceId(segment_number, term, self._next_sequence)
        self._next_sequence += 1
        return piece

    async def settled(self) -> None:
        """Return when all that is being made, or removed, now lies on the disk, or does not."""
        under_way = [*self._making, *self._discarding]
        if under_way:
            await asyncio.wait(under_way)

    def _make(self, term: int, start_lsn: int) -> _Prepared:
        piece = self.reserve(start_lsn // WAL_SEGMENT_SIZE_BYTES, term)
        task = asyncio.create_task(self._make_files(piece, start_lsn))
        task.add_done_callback(_retrieve)
        self._making.add(task)
        task.add_done_callback(self._making.discard)
        return _Prepared(piece, start_lsn, task)

    async def _make_files(self, piece: PieceId, start_lsn: int) -> PieceFile:
        key, envelope, aad = await self._keys.generate(piece)
        cipher = PieceCipher(key, aad, PieceHeader(piece, start_lsn, default_suite()))
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._executor, piece_file.create, self._directory, piece, start_lsn, cipher, envelope
            )
        except OSError as error:
            raise DiskFullError(f"a WAL piece cannot be made: {error.strerror}") from None

    async def _discard(self, prepared: _Prepared) -> None:
        await asyncio.wait([prepared.task])
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, piece_file.discard, self._directory, prepared.piece)


def _retrieve(task: asyncio.Task[PieceFile]) -> None:
    """A piece that could not be made ahead is made, or fails, again when it is needed."""
    if not task.cancelled():
        task.exception()
