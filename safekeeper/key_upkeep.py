"""Keys of one timeline's WAL pieces: wrapped again under a newer KEK, replaced by sealing the WAL anew, and counted.

    re-wrap   the envelope beside a piece (`<piece>.key`) is replaced: written, fsynced, renamed over the old one
    re-key    the open piece ends where it is, and the next append goes to a new one; each closed piece is written once
              more under a new sequence number and DEK  →  the control file lists it instead  →  the old one is deleted

Invariant: a piece that the control file lists has an envelope beside it that opens, at any moment: renames are atomic,
and both the old envelope and the new one are wraps of the same DEK under KEKs that this node has not reported as free.
What a crash leaves is not listed, and goes at the next start. Offloaded WAL: remote_upkeep.py.

What may interleave: appends, reads, elections. Changes of the map of pieces are decided inside of the control file's
update, on the state of then; one that does not fit any more is left to the next pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from safekeeper import files, piece_file
from safekeeper.control_store import ControlStore, DiskFullError
from safekeeper.log_map import Extent, Place
from safekeeper.piece_keys import PieceKeys
from safekeeper.piece_maker import PieceMaker
from safekeeper.remote_upkeep import RemoteUpkeep
from safekeeper.wal_segment import KEY_SUFFIX, PieceCipher, PieceHeader, PieceId
from safekeeper.wal_store import WalStore
from shared.crypto.aead import default_suite
from shared.crypto.envelope import Envelope
from shared.errors import IntegrityError, UnavailableError
from shared.key_upkeep import Pace, UseCounter

_BATCH: Final = 256
P = ParamSpec("P")
T = TypeVar("T")


class PieceUpkeep:
    """Lives as long as the store."""

    def __init__(
        self,
        store: WalStore,
        directory: Path,
        control: ControlStore,
        keys: PieceKeys,
        executor: Executor,
        remote: RemoteUpkeep | None = None,
    ) -> None:
        self._store = store
        self._directory = directory
        self._control = control
        self._keys = keys
        self._executor = executor
        self._remote = remote
        self._plaintext = asyncio.Lock()

    @property
    def _maker(self) -> PieceMaker:
        return self._store.maker

    async def rewrap(self, kek_version: int, pace: Pace) -> None:
        """See `UpkeepProject.rewrap`."""
        self._store.check_ready()
        outdated = [
            (piece, envelope) for piece, envelope, _ in await self._stored() if envelope.kek_version < kek_version
        ]
        if self._maker.waiting in {piece for piece, _ in outdated}:
            self._maker.forget()  # it is made again when it is needed
        for start in range(0, len(outdated), _BATCH):
            batch = outdated[start : start + _BATCH]
            made = await self._keys.rewrap(batch)
            if any(envelope.kek_version < kek_version for envelope in made):
                raise IntegrityError("the keymanager wrapped DEKs under an older KEK than the one in force")
            for (piece, _), envelope in zip(batch, made, strict=True):
                await self._replace_envelope(piece, envelope)
            await pace.rewrapped(len(batch))
        if self._remote is not None:
            await self._remote.rewrap(kek_version, pace)

    async def _replace_envelope(self, piece: PieceId, envelope: Envelope) -> None:
        # Only of pieces of the log: one that is just being taken into it is the next pass's, so that what is removed
        # below has been in the log and is not any more.
        if not self._listed(piece):
            return
        _, key_path = piece_file.paths(self._directory, piece)
        try:
            await self._in_thread(files.replace_file, key_path, envelope.serialize())
        except IntegrityError as error:
            raise self._store.failed(error) from None
        if not self._listed(piece):  # removed meanwhile: so is what we have just written
            await self._in_thread(piece_file.discard, self._directory, piece)

    def _listed(self, piece: PieceId) -> bool:
        return any(extent.piece == piece for extent in self._control.state.log.extents)

    async def rekey(self, dek_floor: int, pace: Pace) -> None:
        """See `UpkeepProject.rekey`."""
        self._store.check_ready()
        if dek_floor == 0:
            return
        old = await self._older_than(dek_floor)
        if self._maker.waiting in old:
            self._maker.forget()
        extent = self._control.state.log.open_extent
        if extent is not None and extent.piece in old:
            await self._store.begin_piece()
        for extent in self._control.state.log.extents:
            if extent.piece in old and extent.end_lsn is not None and extent.place is not Place.REMOTE:
                await self._seal_anew(extent)
                await pace.rekeyed(extent.end_lsn - extent.start_lsn)
        if self._remote is not None:
            async with self._plaintext:
                await self._remote.rekey(dek_floor, pace, self._new_name)
        if await self._older_than(dek_floor):
            raise UnavailableError("the log was changed while it was sealed anew: the rest comes next")

    async def _new_name(self, segment_number: int, term: int) -> PieceId:
        """One that is never given again, not even after a crash."""
        piece = self._maker.reserve(segment_number, term)
        await self._control.update(
            lambda state: replace(
                state, log=replace(state.log, next_sequence=max(state.log.next_sequence, piece.sequence + 1))
            )
        )
        return piece

    async def _older_than(self, dek_floor: int) -> set[PieceId]:
        return {piece for piece, envelope, _ in await self._stored() if envelope.dek_version < dek_floor}

    async def _seal_anew(self, extent: Extent) -> None:
        piece = self._maker.reserve(extent.piece.segment_number, extent.piece.term)
        # The key first: with plaintext in hand nobody waits for the keymanager, which may not answer before the lease
        # is over.
        key, envelope, aad = await self._keys.generate(piece)
        cipher = PieceCipher(key, aad, PieceHeader(piece, extent.start_lsn, default_suite()))
        try:
            async with self._plaintext:
                parts = await self._store.read_extent(extent)
                if parts is None:
                    return
                await self._in_thread(
                    piece_file.create_closed, self._directory, piece, extent.start_lsn, cipher, envelope, parts
                )
                del parts
            if not await self._store.replace_piece(extent, piece):
                await self._in_thread(piece_file.discard, self._directory, piece)
        except DiskFullError:
            await self._in_thread(piece_file.discard, self._directory, piece)
            raise
        except IntegrityError as error:
            raise self._store.failed(error) from None

    async def plaintext_gone(self) -> None:
        """Return when no plaintext is held; call it when the keys are wiped, so that none comes."""
        async with self._plaintext:
            return

    async def census(self) -> UseCounter:
        """Every envelope in the directory, and of the timeline's offloaded WAL, whoever put it. What was being made
        when this was called is in it."""
        self._store.check_fault()
        counter = UseCounter()
        for _, envelope, size_bytes in await self._stored():
            counter.add(envelope, size_bytes)
        if self._remote is not None:
            await self._remote.count(counter)
        return counter

    async def _stored(self) -> list[tuple[PieceId, Envelope, int]]:
        await self._maker.settled()
        return await self._in_thread(_scan, self._directory)

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: work(*args, **kwargs))
        except OSError as error:
            raise DiskFullError(f"keys of WAL pieces cannot be written: {error.strerror}") from None


def _scan(directory: Path) -> list[tuple[PieceId, Envelope, int]]:
    """(piece, envelope, size of the piece's file) of every envelope. Raises CorruptedError for one that is none."""
    found: list[tuple[PieceId, Envelope, int]] = []
    for path in sorted(directory.iterdir()):
        piece = PieceId.parse(path.name.removesuffix(KEY_SUFFIX))
        if piece is None or not path.name.endswith(KEY_SUFFIX):
            continue
        try:
            envelope = Envelope.parse(path.read_bytes())
        except FileNotFoundError:
            continue  # its piece was removed just now
        try:
            size_bytes = path.with_name(piece.file_name).stat().st_size
        except FileNotFoundError:
            size_bytes = 0
        found.append((piece, envelope, size_bytes))
    return found
