"""Files of WAL pieces: make, append, read, verify. Blocking: call from an executor."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from safekeeper import files
from safekeeper.wal_segment import (
    FRAME_HEADER_SIZE_BYTES,
    FRAME_OVERHEAD_SIZE_BYTES,
    KEY_SUFFIX,
    PIECE_HEADER_SIZE_BYTES,
    FrameIndex,
    PieceCipher,
    PieceHeader,
    PieceId,
    index_frames,
    open_frames,
    verify_tail,
)
from shared.crypto.envelope import Envelope
from shared.errors import CorruptedError
from shared.failpoints import failpoint

INITIAL_ALLOCATION_BYTES: Final = 512 * 1024
ALLOCATION_STEP_BYTES: Final = 2 * 1024 * 1024
"""Space is written with zeros ahead of use, so that fdatasync has no size and no extents to record. Measured on ext4:
18 µs per 600-byte frame against 28 µs in a growing file; posix_fallocate is as fast for small frames but pays for
converting unwritten extents with larger ones. How the zeros are written matters, too: files.write_zeros."""


class PieceFile:
    """One open piece. The descriptor is closed when nobody refers to the object any more, threads included."""

    __slots__ = ("__weakref__", "_segment_end_lsn", "allocated_bytes", "cipher", "descriptor", "index", "piece")

    def __init__(self, descriptor: int, piece: PieceId, cipher: PieceCipher, index: FrameIndex) -> None:
        self.descriptor = descriptor
        self.piece = piece
        self.cipher = cipher
        self.index = index
        self.allocated_bytes = 0
        self._segment_end_lsn = piece.segment_end_lsn
        weakref.finalize(self, os.close, descriptor)

    @property
    def end_lsn(self) -> int:
        return self.index.end_lsn

    def fits(self, term: int, lsn: int, size_bytes: int) -> bool:
        """Does WAL of `term` at `lsn` belong into this piece, as one frame, and is there space for it?"""
        return (
            term == self.piece.term
            and lsn + size_bytes <= self._segment_end_lsn
            and self.index.offsets[-1] + size_bytes + FRAME_OVERHEAD_SIZE_BYTES <= self.allocated_bytes
        )

    def append(self, data: bytes | bytearray) -> None:
        """Seal `data` as the next frame and make it durable. The caller then calls `index.append`, on its own thread.

        Raises OSError or KeyWipedError (after either, nobody may append to this piece again: the frame's number is
        used up), FsyncFailedError.
        """
        index = self.index
        header, sealed = self.cipher.seal(index.frames, index.end_lsn, data)
        size = FRAME_HEADER_SIZE_BYTES + len(sealed)
        written = os.pwritev(self.descriptor, (header, sealed), index.end_offset)
        if written < size:
            files.pwrite_all(self.descriptor, (header + sealed)[written:], index.end_offset + written)
        failpoint("frame-written")
        files.fdatasync(self.descriptor)
        failpoint("frame-durable")

    def allocate(self, start: int, end: int) -> None:
        """Write zeros to [start, end) of the file, which nobody has written yet. Raises OSError, FsyncFailedError."""
        files.write_zeros(self.descriptor, start, end)
        files.fdatasync(self.descriptor)

    def trim(self) -> None:
        """Give back the space behind the last frame. Raises OSError."""
        os.ftruncate(self.descriptor, self.index.end_offset)

    def read(self, lsn: int, end_lsn: int, max_size_bytes: int) -> bytes:
        """Bytes from `lsn` on, at least one, at most up to `end_lsn` (within the piece) or `max_size_bytes`.

        Raises IntegrityError, KeyWipedError, OSError.
        """
        index = self.index
        end_lsn = min(end_lsn, lsn + max_size_bytes)
        first, last = index.frame_of(lsn), index.frame_of(end_lsn - 1)
        start, end = index.offsets[first], index.offsets[last + 1]
        raw = os.pread(self.descriptor, end - start, start)
        opened = open_frames(self.cipher, index, first, raw, last + 1 - first)
        plaintext = opened[0] if len(opened) == 1 else b"".join(opened)
        base = index.lsns[first]
        if base == lsn and end_lsn - base == len(plaintext):
            return plaintext
        return plaintext[lsn - base : end_lsn - base]


def create(directory: Path, piece: PieceId, start_lsn: int, cipher: PieceCipher, envelope: Envelope) -> PieceFile:
    """New files: the envelope first, then the piece with its header and some zeroed space; all durable, names too.

    A file of this name that is there already is the rest of an attempt that never came into use. Raises OSError (then
    neither file is left), FsyncFailedError.
    """
    path, key_path = paths(directory, piece)
    discard(directory, piece)
    try:
        files.write_new(key_path, envelope.serialize())
        failpoint("piece-key-written")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        made = PieceFile(descriptor, piece, cipher, FrameIndex.empty(start_lsn))
        header = cipher.header.serialize()
        made.allocated_bytes = INITIAL_ALLOCATION_BYTES
        files.pwrite_all(descriptor, header, 0)
        files.write_zeros(descriptor, len(header), INITIAL_ALLOCATION_BYTES)
        files.fsync(descriptor)
        files.fsync_directory(directory)
        failpoint("piece-made")
    except OSError:
        discard(directory, piece)
        raise
    return made


def create_closed(
    directory: Path, piece: PieceId, start_lsn: int, cipher: PieceCipher, envelope: Envelope, parts: Sequence[bytes]
) -> None:
    """A whole piece at once: each of `parts` becomes a frame. All durable, names too. Raises as `create`."""
    path, key_path = paths(directory, piece)
    discard(directory, piece)
    try:
        files.write_new(key_path, envelope.serialize())
        index = FrameIndex.empty(start_lsn)
        content = bytearray(cipher.header.serialize())
        for part in parts:
            header, sealed = cipher.seal(index.frames, index.end_lsn, part)
            content += header
            content += sealed
            index.append(len(part))
        files.write_new(path, content)
        files.fsync_directory(directory)
    except OSError:
        discard(directory, piece)
        raise


def paths(directory: Path, piece: PieceId) -> tuple[Path, Path]:
    path = directory / piece.file_name
    return path, path.with_name(path.name + KEY_SUFFIX)


def discard(directory: Path, piece: PieceId) -> None:
    for path in paths(directory, piece):
        path.unlink(missing_ok=True)


def read_header(directory: Path, piece: PieceId, start_lsn: int) -> tuple[PieceHeader, Envelope]:
    """What can be checked without a key. Raises CorruptedError when a file is missing or is not what it should be."""
    path, key_path = paths(directory, piece)
    try:
        with path.open("rb") as file:
            header = PieceHeader.parse(file.read(PIECE_HEADER_SIZE_BYTES))
        envelope = Envelope.parse(key_path.read_bytes())
    except FileNotFoundError:
        raise CorruptedError("a WAL piece or its key is missing") from None
    if header.piece != piece or header.start_lsn != start_lsn:
        raise CorruptedError("a WAL piece is another one than its name says")
    return header, envelope


def open_closed(directory: Path, cipher: PieceCipher, end_lsn: int) -> PieceFile:
    """A piece whose end is known, for reading. Raises IntegrityError, OSError."""
    piece = cipher.header.piece
    descriptor = os.open(paths(directory, piece)[0], os.O_RDONLY)
    opened = PieceFile(descriptor, piece, cipher, FrameIndex.empty(cipher.header.start_lsn))
    opened.index = index_frames(_content(descriptor), cipher.header, end_lsn)
    return opened


def open_verified(directory: Path, cipher: PieceCipher) -> tuple[PieceFile, bool]:
    """The piece that was open when its process ended, every frame verified; and whether its tail was torn.

    The process may have died between a write and its fdatasync. Then the frame is good in the page cache and not on
    the disk, and must not count before it is: synced first, then read from the disk and not from the cache.
    Raises IntegrityError, FsyncFailedError, OSError.
    """
    piece = cipher.header.piece
    descriptor = os.open(paths(directory, piece)[0], os.O_RDWR)
    opened = PieceFile(descriptor, piece, cipher, FrameIndex.empty(cipher.header.start_lsn))
    files.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    verified = verify_tail(_content(descriptor), cipher)
    opened.index = verified.index
    return opened, verified.torn


def _content(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    parts, position = [], 0
    while position < size:
        part = os.pread(descriptor, size - position, position)
        if not part:
            break
        parts.append(part)
        position += len(part)
    return b"".join(parts)


def frame_size_bytes(plaintext_size_bytes: int) -> int:
    return plaintext_size_bytes + FRAME_OVERHEAD_SIZE_BYTES
