"""Open pieces, for reading: the few that were used last, with their keys and their frame indexes."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import Executor
from pathlib import Path
from typing import Final

from safekeeper import piece_file
from safekeeper.log_map import Extent
from safekeeper.piece_file import PieceFile
from safekeeper.piece_keys import PieceKeys
from safekeeper.wal_segment import PieceCipher, PieceId
from shared.crypto.secret import KeyWipedError
from shared.errors import UnavailableError
from shared.storage.threads import until_ended

_CAPACITY: Final = 8


class PiecePool:
    def __init__(self, directory: Path, keys: PieceKeys, executor: Executor) -> None:
        self._directory = directory
        self._keys = keys
        self._executor = executor
        self._pieces: OrderedDict[PieceId, PieceFile] = OrderedDict()

    def add(self, piece: PieceFile) -> None:
        """Keep it open; the one that was not used for longest is let go when there are too many."""
        self._pieces[piece.piece] = piece
        self._pieces.move_to_end(piece.piece)
        while len(self._pieces) > _CAPACITY:
            self._pieces.popitem(last=False)

    def forget(self, piece: PieceId) -> None:
        self._pieces.pop(piece, None)

    def clear(self) -> None:
        self._pieces.clear()

    async def open_verified(self, extent: Extent) -> tuple[PieceFile, bool]:
        """See `piece_file.open_verified`. Raises also KeyAccessError, UnavailableError."""
        cipher = await self._cipher_of(extent)
        loop = asyncio.get_running_loop()
        piece, torn = await loop.run_in_executor(self._executor, piece_file.open_verified, self._directory, cipher)
        self.add(piece)
        return piece, torn

    async def read(self, extent: Extent, lsn: int, end_lsn: int, max_size_bytes: int) -> bytes:
        """At least one byte from `lsn` on; `end_lsn` is where the extent ends, or the log, if that is earlier.

        Raises KeyAccessError, UnavailableError, IntegrityError.
        """
        loop = asyncio.get_running_loop()
        try:
            piece = self._pieces.get(extent.piece)
            if piece is None:
                cipher = await self._cipher_of(extent)
                piece = await loop.run_in_executor(
                    self._executor, piece_file.open_closed, self._directory, cipher, end_lsn
                )
            self.add(piece)
            return await until_ended(self._executor.submit(piece.read, lsn, end_lsn, max_size_bytes))
        except KeyWipedError:
            self.forget(extent.piece)
            raise
        except OSError as error:
            raise UnavailableError(f"the log cannot be read: {error.strerror}") from None

    async def _cipher_of(self, extent: Extent) -> PieceCipher:
        loop = asyncio.get_running_loop()
        header, envelope = await loop.run_in_executor(
            self._executor, piece_file.read_header, self._directory, extent.piece, extent.start_lsn
        )
        key, aad = await self._keys.unwrap(extent.piece, envelope)
        return PieceCipher(key, aad, header)
