"""WAL of one timeline leaves this node's disk: to the object store, and from there it is read again.

Theory of operation. A piece that is closed and below commit_lsn never changes again, and no election cuts it. One at a
time, oldest first:

    LOCAL   is a piece of this term in the object store that covers it, of whatever node?  no: put ours
            → control file: BOTH
    BOTH    below the pageserver's remote_consistent_lsn, and not of the newest `keep_size_bytes`
            → does one that covers it open, to its last frame?  no: put ours, and look again the next time
            → control file: REMOTE → the local files go
    any     so far below remote_consistent_lsn that nobody will ask for it
            → control file: trimmed → local files and objects go (trim.py)

*Safe to remove* means all of: it was found in the object store by a listing, which is how peers find it, read as a
whole just before, and every frame of it is genuine; it is below remote_consistent_lsn, so the pageserver has layers of
it that are durable; it is below commit_lsn, so no election takes it back; and all of that is in this node's control
file, by the same write that says REMOTE. A crash anywhere in between leaves a file that is not needed, or an object
that is found again. A name alone proves nothing: a peer may have died while it put the piece, and stores lose things.

A piece may be the only copy of whoever says REMOTE, whichever node put it. So a node that deletes a timeline deletes
its own files and no object; those go when the timeline is gone from every node (`SafekeeperNode.delete_offloaded`).

Who offloads: whoever comes first. Each node looks before it puts, and nodes look at random times, so that mostly one of
them puts; if two do at the same time, there are two pieces, and nothing else happens.

Reading goes the other way: any piece of the right term that covers the position will do. So a peer that was away for
hours, and a pageserver that lost its place, get old WAL through any safekeeper of the quorum, wherever it lies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safekeeper import piece_file
from safekeeper.control_file import ControlState
from safekeeper.log_map import Extent, Place
from safekeeper.piece_keys import PieceKeys
from safekeeper.remote_wal import RemotePiece, RemoteWal
from safekeeper.wal_segment import FrameIndex, PieceCipher, PieceHeader, index_frames, open_frames
from shared.crypto.aead import AeadKey
from shared.crypto.envelope import Envelope
from shared.crypto.secret import KeyWipedError
from shared.errors import CorruptedError, IntegrityError, NotFoundError, UnavailableError
from shared.lsn import WAL_SEGMENT_SIZE_BYTES
from shared.storage.base import ObjectNotFoundError


@dataclass(frozen=True, slots=True)
class OffloadTuning:
    interval_s: float = 5.0
    """About how often a timeline is looked at."""
    keep_size_bytes: int = 4 * WAL_SEGMENT_SIZE_BYTES
    """Behind commit_lsn, kept on the disk in any case."""
    history_size_bytes: int = 1 << 30
    """Behind remote_consistent_lsn, kept wherever it lies. Readers that lag are served from it. No record of WAL is as
    long (XLogRecordMaxSize), so the last one of the log is always in it."""


def to_offload(state: ControlState) -> list[Extent]:
    """Closed, committed, and not known to be in the object store; oldest first."""
    committed = state.acceptor.commit_lsn
    return [
        extent
        for extent in state.log.extents
        if extent.place is Place.LOCAL and extent.end_lsn is not None and extent.end_lsn <= committed
    ]


def to_remove(state: ControlState, keep_size_bytes: int) -> list[Extent]:
    """What need not lie on this disk any more; oldest first."""
    acceptor = state.acceptor
    limit = min(state.remote_consistent_lsn, acceptor.commit_lsn, max(0, acceptor.commit_lsn - keep_size_bytes))
    return [
        extent
        for extent in state.log.extents
        if extent.place is Place.BOTH and extent.end_lsn is not None and extent.end_lsn <= limit
    ]


class OpenedPiece:
    """A sealed piece in memory, to be read from more than once."""

    def __init__(self, source: RemotePiece, content: bytes, cipher: PieceCipher, index: FrameIndex) -> None:
        self.source = source
        self._content = content
        self._cipher = cipher
        self._index = index

    def read(self, lsn: int, end_lsn: int) -> bytes:
        """Bytes from `lsn` on, up to `end_lsn` or the piece's end. Raises IntegrityError, KeyWipedError."""
        index = self._index
        end_lsn = min(end_lsn, self.source.end_lsn)
        first, last = index.frame_of(lsn), index.frame_of(end_lsn - 1)
        view = memoryview(self._content)[index.offsets[first] : index.offsets[last + 1]]
        opened = b"".join(open_frames(self._cipher, index, first, view, last + 1 - first))
        return opened[lsn - index.lsns[first] : end_lsn - index.lsns[first]]

    def verify(self) -> None:
        """Open every frame, one at a time. Raises IntegrityError, KeyWipedError."""
        index, view = self._index, memoryview(self._content)
        for number in range(index.frames):
            frame = view[index.offsets[number] : index.offsets[number + 1]]
            open_frames(self._cipher, index, number, frame, 1)


KeysOf = Callable[[str], PieceKeys]
"""Of the pieces that a node has sealed."""


class RemoteReader:
    """Reads offloaded WAL. Keeps the sealed bytes of the piece that was read last."""

    def __init__(self, remote: RemoteWal, keys_of: KeysOf) -> None:
        self._remote = remote
        self._keys_of = keys_of
        self._last: OpenedPiece | None = None
        self._fetching = asyncio.Lock()

    def drop_keys(self) -> None:
        self._last = None

    async def read(self, extent: Extent, lsn: int, end_lsn: int, max_size_bytes: int) -> bytes:
        """At least one byte from `lsn` on, of the part of the log that `extent` holds.

        Raises KeyAccessError, UnavailableError (also when no piece is listed that has it), IntegrityError.
        """
        end_lsn = min(end_lsn, lsn + max_size_bytes)
        async with self._fetching:
            opened = self._last
            if opened is None or not opened.source.covers(extent.piece.term, lsn, lsn + 1):
                return await self._read_any(extent.piece.term, lsn, end_lsn)
            try:
                return await asyncio.to_thread(opened.read, lsn, end_lsn)
            except IntegrityError:  # another piece may be good
                self._last = None
                return await self._read_any(extent.piece.term, lsn, end_lsn)
            except KeyWipedError:
                self._last = None
                raise

    async def _read_any(self, term: int, lsn: int, end_lsn: int) -> bytes:
        """From the first piece that has it, and is good there."""
        damage: IntegrityError | None = None
        for source in await self._remote.pieces(lsn // WAL_SEGMENT_SIZE_BYTES):
            if not source.covers(term, lsn, lsn + 1):
                continue
            try:
                opened, _ = await self._fetch(source)
                data = await asyncio.to_thread(opened.read, lsn, end_lsn)
            except ObjectNotFoundError:
                continue  # sealed anew meanwhile: another one has it
            except IntegrityError as error:
                damage = error
                continue
            self._last = opened
            return data
        raise damage or UnavailableError("the object store does not show this part of the log")

    async def has(self, extent: Extent) -> bool:
        """Does a piece that covers `extent` lie in the object store, and does every frame of it open?

        Raises KeyAccessError, UnavailableError, StoreDeniedError.
        """
        assert extent.end_lsn is not None  # noqa: S101 - only closed ones are offloaded
        for source in await self._remote.pieces(extent.piece.segment_number):
            if source.covers(extent.piece.term, extent.start_lsn, extent.end_lsn):
                try:
                    await self.verify(source)
                except (NotFoundError, IntegrityError):  # also of the KEK that it is under
                    continue
                return True
        return False

    async def verify(self, source: RemotePiece) -> Envelope:
        """Read all of a piece, and open every frame. Its envelope.

        Raises ObjectNotFoundError, NotFoundError for a KEK that is gone, KeyAccessError, UnavailableError,
        StoreDeniedError, IntegrityError.
        """
        opened, envelope = await self._fetch(source)
        await asyncio.to_thread(opened.verify)
        return envelope

    async def _fetch(self, source: RemotePiece) -> tuple[OpenedPiece, Envelope]:
        content, envelope = await self._remote.fetch(source)
        key, aad = await self._keys_of(source.node_id).unwrap(source.piece, envelope)
        return self._opened(source, content, key, aad), envelope

    def _opened(self, source: RemotePiece, content: bytes, key: AeadKey, aad: bytes) -> OpenedPiece:
        header = PieceHeader.parse(content)
        if header.piece != source.piece or header.start_lsn != source.start_lsn:
            raise CorruptedError("an offloaded WAL piece is another one than its name says")
        cipher = PieceCipher(key, aad, header)
        return OpenedPiece(source, content, cipher, index_frames(content, header, source.end_lsn))


async def read_for_upload(directory: Path, extent: Extent) -> bytes:
    """The sealed bytes of a closed piece, up to the frame that reaches its end. Raises IntegrityError, OSError."""
    return await asyncio.to_thread(_sealed_bytes, directory, extent)


def _sealed_bytes(directory: Path, extent: Extent) -> bytes:
    assert extent.end_lsn is not None  # noqa: S101 - the caller picked closed ones
    header, _ = piece_file.read_header(directory, extent.piece, extent.start_lsn)
    content = piece_file.paths(directory, extent.piece)[0].read_bytes()
    return content[: index_frames(content, header, extent.end_lsn).end_offset]
