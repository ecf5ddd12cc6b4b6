"""The log of one timeline on disk: append, read, clip. The shell around log_map.py and wal_segment.py.

Theory of operation. An append seals one frame, writes it and fdatasyncs it, all in one thread and without a stop;
only then does `flush_lsn` move. One append runs at a time, because its caller, the stream or the recovery, is one at a
time. The stream's thread calls `append_here`, which does only that; what it has appended is handed to the event loop in
`_fresh`. Everything else (a new piece, a full disk) is `append`'s, on the loop. A piece ends where its segment or its
term ends, where this process started, and where the disk was full; the next piece is made ahead of time.

What may interleave at an await, and with the stream's thread: reads, at any time; `drop_keys`, at any time, which takes
away the piece that is being appended to, after which an append finishes what the disk already has and then fails. Never
two appends, never a clip during an append. `begin_piece` and `replace_piece` may come at any time: the first keeps
appends waiting, and both look at the map once more when they change it.

`fault`: set for good when the log can no longer be trusted (a failed fsync, a frame that does not open, a piece that is
missing). From then on everything raises: a safekeeper that may have lost what it acknowledged must not vote.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from safekeeper import files, piece_file
from safekeeper.acceptor import AcceptorState
from safekeeper.control_file import ControlState
from safekeeper.control_store import ControlStore, DiskFullError
from safekeeper.log_map import Extent, Place
from safekeeper.offload import RemoteReader, read_for_upload
from safekeeper.piece_file import ALLOCATION_STEP_BYTES, PieceFile, frame_size_bytes
from safekeeper.piece_keys import PieceKeys
from safekeeper.piece_maker import PieceMaker
from safekeeper.piece_pool import PiecePool
from safekeeper.tail_cache import TailCache
from safekeeper.trim import begun_at
from safekeeper.wal_segment import (
    KEY_SUFFIX,
    MAX_FRAME_PLAINTEXT_BYTES,
    PieceId,
)
from shared.crypto.envelope import Envelope
from shared.crypto.secret import KeyWipedError
from shared.errors import (
    ConflictError,
    IntegrityError,
    InvalidInputError,
    KeylakeError,
    UnavailableError,
)
from shared.failpoints import failpoint
from shared.lsn import WAL_SEGMENT_SIZE_BYTES
from shared.telemetry import get_logger

_log = get_logger(__name__)

_LOW_SPACE_BYTES: Final = piece_file.INITIAL_ALLOCATION_BYTES // 2
_MAX_FRESH_BYTES: Final = 1024 * 1024
"""Plaintext that waits for the loop to take it into the cache while nobody follows the tail."""
Part = bytes | bytearray | memoryview
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoreTuning:
    tail_cache_size_bytes: int = 4 * 1024 * 1024
    prepare_at_bytes: int = WAL_SEGMENT_SIZE_BYTES // 2
    """How far into a segment the next piece is made."""


class WalStore:
    """Create, `load`, then use. Lives on one event loop; `flush_lsn` is meaningless before `load`."""

    def __init__(
        self,
        directory: Path,
        control: ControlStore,
        keys: PieceKeys,
        executor: Executor,
        on_flush: Callable[[], None],
        is_awaited: Callable[[], bool],
        tuning: StoreTuning | None = None,
        remote: RemoteReader | None = None,
    ) -> None:
        """`on_flush` is called on the loop after flush_lsn has moved; at once only while somebody `is_awaited` says so,
        which is asked by the thread that appends, after it has moved flush_lsn."""
        self.timeline_id = control.state.timeline_id
        self._log = _log.bind(timeline_id=str(self.timeline_id))
        self._directory = directory
        self._control = control
        self._keys = keys
        self._executor = executor
        self._on_flush = on_flush
        self._is_awaited = is_awaited
        self._loop = asyncio.get_running_loop()
        self._fresh: deque[tuple[int, bytearray, int]] = deque()
        self._fresh_bytes = 0
        self._waking = False
        self._tuning = tuning or StoreTuning()
        self._remote = remote
        self._cache = TailCache(self._tuning.tail_cache_size_bytes)
        self._pieces = PiecePool(directory, keys, executor)
        self._writer: PieceFile | None = None
        self._left_over: list[PieceFile] = []  # writers of before, to be trimmed when the map has their end
        self._allocating: asyncio.Task[None] | None = None
        self.maker = PieceMaker(directory, keys, executor, control.state.log.next_sequence)
        self._append_lock = asyncio.Lock()
        self._append_here_lock = threading.Lock()
        self._keys_epoch = 0
        self.flush_lsn = control.state.log.closed_end_lsn
        self.loaded = False
        self._checked = False
        self.fault = ""

    # --- start ---

    async def check_files(self) -> None:
        """Without keys: every piece is there and is what its name says; files that are not part of the log go away.

        Raises IntegrityError (and is at fault from then on), UnavailableError when the disk says "not now": `load`
        does it again.
        """
        try:
            await self._in_thread(self._check_files)
        except KeylakeError as error:
            raise self.failed(error) from None
        except OSError as error:
            raise UnavailableError(f"the log cannot be looked at: {error.strerror}") from None
        self._checked = True

    def _check_files(self) -> None:
        extents = self._control.state.log.extents
        for extent in extents:
            if extent.place is not Place.REMOTE:
                piece_file.read_header(self._directory, extent.piece, extent.start_lsn)
        kept = self._control.state.log.local_pieces
        for path in list(self._directory.iterdir()):
            piece = PieceId.parse(path.name.removesuffix(KEY_SUFFIX))
            half_written = path.name.endswith(KEY_SUFFIX + files.TEMPORARY_SUFFIX)
            if half_written or (piece is not None and piece not in kept):
                path.unlink(missing_ok=True)

    async def load(self) -> None:
        """Verify the piece that was open when the last process ended; from then on `flush_lsn` is known.

        Idempotent. Raises KeyAccessError and UnavailableError while the key is not to be had, IntegrityError for good.
        """
        self.check_fault()
        if self.loaded:
            return
        if not self._checked:
            await self.check_files()
        state = self._control.state
        extent = state.log.open_extent
        try:
            open_end_lsn = None
            if extent is not None:
                piece, torn = await self._pieces.open_verified(extent)
                self._left_over.append(piece)
                open_end_lsn = piece.end_lsn
                if torn:
                    self._log.warning("cut a torn frame off the log", piece=extent.piece.file_name)
            self.flush_lsn = state.end_of_log(open_end_lsn)
        except IntegrityError as error:
            raise self.failed(error) from None
        except OSError as error:
            raise UnavailableError(f"the log cannot be read: {error.strerror}") from None
        self.loaded = True

    # --- append ---

    async def append(self, term: int, lsn: int, parts: Sequence[Part]) -> int:
        """Make the bytes of `parts` durable at `lsn`, the end of the log; answer the new flush_lsn.

        At most MAX_FRAME_PLAINTEXT_BYTES in all. Not to be cancelled: stop the caller by other means and await this.
        Raises DiskFullError and UnavailableError (may be tried again, with the rest if flush_lsn moved),
        KeyAccessError, IntegrityError (for good).
        """
        self.check_ready()
        if lsn != self.flush_lsn:
            raise ConflictError("WAL must be appended at the end of the log")
        data = bytearray().join(parts)
        if not 0 < len(data) <= MAX_FRAME_PLAINTEXT_BYTES:
            raise InvalidInputError("a WAL frame has 1 byte to 1 MiB")
        async with self._append_lock:
            return await self._append(term, lsn, data)

    async def _append(self, term: int, lsn: int, data: bytearray) -> int:
        boundary = (lsn // WAL_SEGMENT_SIZE_BYTES + 1) * WAL_SEGMENT_SIZE_BYTES
        if lsn + len(data) > boundary:
            await self._append_frame(term, data[: boundary - lsn])
            data = data[boundary - lsn :]
        await self._append_frame(term, data)
        return self.flush_lsn

    async def _append_frame(self, term: int, data: bytearray) -> None:
        writer = self._writer
        if writer is None or writer.piece.term != term or self.flush_lsn == writer.piece.segment_end_lsn:
            writer = await self._next_piece(term)
        end_offset = writer.index.end_offset + frame_size_bytes(len(data))
        if end_offset > writer.allocated_bytes:
            if self._allocating is not None:
                await self._allocating  # its zeros must not fall on our frame
            writer.allocated_bytes = max(writer.allocated_bytes, end_offset)
        await self._in_thread(self._write_frame, writer, data)
        self._absorb()

    def append_here(self, term: int, lsn: int, data: bytearray) -> bool:
        """`append` for the thread that receives WAL, without the event loop: when `data` fits into the piece at hand.

        False: it does not, use `append`. Takes ownership of `data`. Raises as `append`.
        """
        with self._append_here_lock:
            writer = self._writer
            if writer is None or self.fault or lsn != self.flush_lsn or not writer.fits(term, lsn, len(data)):
                return False
            self._write_frame(writer, data)
            return True

    def _write_frame(self, writer: PieceFile, data: bytearray) -> None:
        """Seal, write, sync; then flush_lsn moves. In a thread."""
        lsn, epoch = self.flush_lsn, self._keys_epoch
        try:
            writer.append(data)
        except OSError as error:
            self._abandon_writer()
            raise DiskFullError(f"the log cannot be written: {error.strerror}") from None
        except KeyWipedError:
            self._abandon_writer()
            raise
        except IntegrityError as error:
            raise self.failed(error) from None
        size = len(data)
        writer.index.append(size)
        self._fresh.append((lsn, data, epoch))
        self.flush_lsn = lsn + size
        self._fresh_bytes += size
        # The loop is woken when somebody waits for it, or when there is something for it to do; once, however many
        # frames follow until it gets to it.
        if not self._waking and (self._is_awaited() or self._needs_loop(writer)):
            self._waking = True
            self._loop.call_soon_threadsafe(self._absorb)

    def _needs_loop(self, writer: PieceFile) -> bool:
        filled = self.flush_lsn % WAL_SEGMENT_SIZE_BYTES
        return (
            writer.allocated_bytes - writer.index.offsets[-1] < _LOW_SPACE_BYTES
            or self._fresh_bytes > _MAX_FRESH_BYTES
            or (filled >= self._tuning.prepare_at_bytes and self.maker.idle)
        )

    def _absorb(self) -> None:
        """On the loop: take over what the receiving thread has appended, tell those who follow, look ahead."""
        self._waking = False
        self._fresh_bytes = 0
        while self._fresh:
            lsn, data, epoch = self._fresh.popleft()
            if epoch == self._keys_epoch:
                self._cache.append(lsn, data)
            else:
                data[:] = bytes(len(data))
        if self._writer is not None:
            self._look_ahead(self._writer)
        self._on_flush()

    def _look_ahead(self, writer: PieceFile) -> None:
        """Start to make space, and the next piece, before they are needed."""
        end_offset = writer.index.end_offset
        filled = writer.end_lsn % WAL_SEGMENT_SIZE_BYTES
        if writer.allocated_bytes - end_offset < _LOW_SPACE_BYTES and self._allocating is None:
            # What is left of the segment, and a sixteenth for the frames' headers and tags.
            left = (WAL_SEGMENT_SIZE_BYTES - filled) * 17 // 16
            if end_offset + left > writer.allocated_bytes:
                self._allocating = asyncio.create_task(self._allocate(writer))
        if filled >= self._tuning.prepare_at_bytes and self.maker.idle:
            self.maker.begin(writer.piece.term, writer.piece.segment_end_lsn)

    async def _allocate(self, writer: PieceFile) -> None:
        start = writer.allocated_bytes
        end = start + ALLOCATION_STEP_BYTES
        try:
            await self._in_thread(writer.allocate, start, end)
            writer.allocated_bytes = end
        except OSError:
            # Whatever was written is zeros; the frames will find out by themselves whether there is space for them.
            writer.allocated_bytes = end
        except IntegrityError as error:
            self.failed(error)
        finally:
            self._allocating = None

    def _abandon_writer(self) -> None:
        """Nobody appends to this piece again: its key is gone, or its last frame number is used up by a write that may
        have left anything."""
        if self._writer is not None:
            self._left_over.append(self._writer)
            self._writer = None

    # --- pieces ---

    async def prepare(self, term: int) -> None:
        """Make the piece that the next append in `term` will need, so that the first commit does not wait for it.

        Raises KeyAccessError, UnavailableError, IntegrityError.
        """
        self.check_ready()
        writer = self._writer
        if writer is not None and writer.piece.term == term and self.flush_lsn < writer.piece.segment_end_lsn:
            return
        try:
            await self.maker.ready(term, self.flush_lsn)
        except IntegrityError as error:
            raise self.failed(error) from None

    async def begin_piece(self) -> None:
        """The piece that is open ends here; appends go on in a new one, with a new DEK. Does nothing when none is.

        Raises KeyAccessError, UnavailableError, ConflictError (an election was faster), IntegrityError.
        """
        self.check_ready()
        self._keys.project.check()
        async with self._append_lock:
            extent = self._control.state.log.open_extent
            if extent is None:
                return
            await self._in_thread(self._end_writer)
            await self._next_piece(extent.piece.term, extent)

    def _end_writer(self) -> None:
        """From the return on, no frame is being written, and none will be to this piece. In a thread."""
        with self._append_here_lock:
            self._abandon_writer()

    async def read_extent(self, extent: Extent) -> list[bytes] | None:
        """The WAL of a closed piece, in parts for frames. None when it is not part of the log any more.

        Raises KeyAccessError, UnavailableError, IntegrityError (for good).
        """
        parts: list[bytes] = []
        lsn, end_lsn = extent.start_lsn, extent.end_lsn
        while end_lsn is not None and lsn < end_lsn:
            try:
                part = await self._pieces.read(extent, lsn, end_lsn, MAX_FRAME_PLAINTEXT_BYTES)
            except IntegrityError as error:
                if extent not in self._control.state.log.extents:
                    return None
                raise self.failed(error) from None
            for start in range(0, len(part), MAX_FRAME_PLAINTEXT_BYTES):
                parts.append(part[start : start + MAX_FRAME_PLAINTEXT_BYTES])
            lsn += len(part)
        return parts

    async def replace_piece(self, extent: Extent, piece: PieceId) -> bool:
        """`piece`, whose files are durable, holds what the closed `extent` holds: it takes its place, and the old files
        go. False, and nothing is changed, when the log has no such extent (any more)."""
        fits = True

        def change(state: ControlState) -> ControlState:
            nonlocal fits
            log = state.log.replaced(extent, piece)
            fits = log is not None
            return state if log is None else replace(state, log=log)

        await self.change_control(change)
        return fits

    async def _next_piece(self, term: int, expected: Extent | None = None) -> PieceFile:
        """Close the piece that is open, and open the next one at the end of the log.

        `expected` is the piece that must be open. Raises ConflictError when it is not.
        """
        lsn = self.flush_lsn
        try:
            made = await self.maker.take(term, lsn)
        except IntegrityError as error:
            raise self.failed(error) from None

        def change(state: ControlState) -> ControlState:
            if expected is not None and (state.log.open_extent != expected or self.flush_lsn != lsn):
                raise ConflictError("the log was closed meanwhile")
            return replace(state, log=state.log.opened(made.piece, lsn))

        try:
            await self.change_control(change)
        except (ConflictError, DiskFullError):  # it will never be part of the log
            await self._discard([made.piece])
            raise
        await self._retire_writer()
        self._writer = made
        self._pieces.add(made)
        return made

    async def _retire_writer(self) -> None:
        """Give back the space that was allocated ahead. The map has the piece's end already."""
        self._abandon_writer()
        pieces, self._left_over = self._left_over, []
        if self._allocating is not None:
            await self._allocating
        for piece in pieces:
            try:
                await self._in_thread(piece.trim)
            except OSError as error:
                self._log.info("allocated space was not given back", piece=piece.piece.file_name, reason=error.strerror)

    async def _discard(self, pieces: Iterable[PieceId]) -> None:
        """Remove the files of what is not part of the log. What the disk keeps goes at the next start: whoever changed
        the log has done so, and must not be told otherwise."""
        for piece in pieces:
            failpoint("piece-before-removal")
            self._pieces.forget(piece)
            try:
                await self._in_thread(piece_file.discard, self._directory, piece)
            except OSError as error:
                self._log.warning("a WAL piece was not removed", piece=piece.file_name, reason=error.strerror)

    # --- control file ---

    async def persist(self, acceptor: AcceptorState, clip_lsn: int | None = None) -> None:
        """Make `acceptor` durable; with `clip_lsn` also close the log there and forget what is behind.

        Nothing may be appending. Raises DiskFullError (nothing changed), IntegrityError (for good).
        """
        self.check_ready()

        def change(state: ControlState) -> ControlState:
            commit_lsn = max(acceptor.commit_lsn, state.acceptor.commit_lsn)
            log = state.log if clip_lsn is None else state.log.closed_at(clip_lsn)
            return replace(state, acceptor=replace(acceptor, commit_lsn=commit_lsn), log=log)

        def clipped() -> None:
            # Invariant: in the step in which the file's new content counts. With the old flush_lsn behind the new map
            # the next piece would leave a gap, and what is in the gap would be acknowledged.
            self._abandon_writer()
            self._absorb()
            if clip_lsn is not None and clip_lsn < self.flush_lsn:
                self.flush_lsn = clip_lsn
                self._cache.wipe()
                self._pieces.clear()

        if clip_lsn is None:
            await self.change_control(change)
        else:
            await self.change_control(change, clipped)
            await self._retire_writer()

    async def persist_commit_lsn(self) -> None:
        """Bring what is known of commit_lsn and remote_consistent_lsn to disk, and change nothing else: not by a copy
        of the state, which an election that is under way may just be changing. Raises as `persist`."""
        self.check_ready()
        await self.change_control(lambda state: state)

    async def change_control(
        self, change: Callable[[ControlState], ControlState], applied: Callable[[], None] = lambda: None
    ) -> None:
        """`ControlStore.update`; then the files go of pieces that need not be on this disk any more. Raises
        DiskFullError (nothing changed), IntegrityError (for good)."""
        before = self._control.state.log.local_pieces
        try:
            state = await self._control.update(change, applied)
        except IntegrityError as error:
            raise self.failed(error) from None
        await self._discard(before - state.log.local_pieces)

    # --- read ---

    async def read(self, lsn: int, max_size_bytes: int) -> bytes:
        """Bytes of the log from `lsn` on, at least one; none at flush_lsn or behind it.

        The lease is checked after decrypting. Raises KeyAccessError, UnavailableError, IntegrityError (for good).
        """
        self.check_ready()
        log = self._control.state.log
        if lsn < log.oldest_lsn:
            raise InvalidInputError("the log begins behind this position")
        if lsn >= self.flush_lsn:
            return b""
        if self._fresh:
            self._absorb()
        data = self._cache.read(lsn, max_size_bytes)
        while data is None:
            log = self._control.state.log
            extent = log.extents[log.find(lsn)]
            end_lsn = self.flush_lsn if extent.end_lsn is None else min(extent.end_lsn, self.flush_lsn)
            if lsn >= end_lsn:
                raise UnavailableError("this part of the log is being cut off")
            if extent.place is Place.REMOTE:
                data = await self._read_remote(extent, lsn, end_lsn, max_size_bytes)
                break
            try:
                data = await self._pieces.read(extent, lsn, end_lsn, max_size_bytes)
            except (IntegrityError, UnavailableError) as error:
                if lsn < self.flush_lsn and extent.piece not in self._control.state.log.local_pieces:
                    continue  # sealed anew, or offloaded, while we read: it is elsewhere
                if isinstance(error, IntegrityError):
                    raise self.failed(error) from None
                raise
        self._keys.project.check()
        return data

    async def _read_remote(self, extent: Extent, lsn: int, end_lsn: int, max_size_bytes: int) -> bytes:
        """What is wrong in the object store is no reason to distrust the log here: it is not this node's to acknowledge
        any more."""
        if self._remote is None:
            raise UnavailableError("this part of the log is in the object store, and there is none in the settings")
        return await self._remote.read(extent, lsn, end_lsn, max_size_bytes)

    async def begin_at(self, lsn: int) -> None:
        """The log ends before `lsn`, and what lies between is not kept as WAL any more: go on from there.

        `lsn` is committed, and all of the log is of the history up to there. Nothing may be appending. Raises as
        `persist`.
        """
        self.check_ready()

        def begun() -> None:
            self._abandon_writer()
            self._absorb()
            self.flush_lsn = lsn
            self._cache.wipe()
            self._pieces.clear()

        await self.change_control(lambda state: begun_at(state, self.flush_lsn, lsn), begun)
        failpoint("log-begun")
        await self._retire_writer()

    # --- what offloader.py needs ---

    async def sealed(self, extent: Extent) -> tuple[bytes, Envelope] | None:
        """The sealed bytes of a closed piece on this disk, and its envelope. None when it is not there any more.

        Raises UnavailableError, IntegrityError (for good).
        """
        try:
            _, envelope = await self._in_thread(piece_file.read_header, self._directory, extent.piece, extent.start_lsn)
            return await read_for_upload(self._directory, extent), envelope
        except IntegrityError as error:
            if extent.piece not in self._control.state.log.local_pieces:
                return None  # sealed anew just now
            raise self.failed(error) from None
        except OSError as error:
            raise UnavailableError(f"the log cannot be read: {error.strerror}") from None

    # --- end ---

    def drop_keys(self) -> None:
        """The lease is gone: forget every key and overwrite the plaintext. The log stays usable under a new lease."""
        self._keys_epoch += 1
        while self._fresh:
            _, data, _ = self._fresh.popleft()
            data[:] = bytes(len(data))
        self._cache.wipe()
        self._pieces.clear()
        if self._remote is not None:
            self._remote.drop_keys()
        self._abandon_writer()
        self.maker.forget()

    async def aclose(self) -> None:
        """Let what runs in the background end, and close. Nothing may be appending."""
        await self._retire_writer()
        self.drop_keys()
        await self.maker.aclose()

    def check_fault(self) -> None:
        """Raises IntegrityError when the log is not to be trusted any more."""
        if self.fault:
            raise IntegrityError(self.fault)

    def check_ready(self) -> None:
        """Raises UnavailableError before `load` has succeeded, IntegrityError at fault."""
        self.check_fault()
        if not self.loaded:
            raise UnavailableError("this timeline is not ready: the end of its log is not verified yet")

    def failed(self, error: KeylakeError) -> IntegrityError:
        """From now on nothing is served. The error to raise."""
        if not self.fault:
            self.fault = str(error)
            self._log.error("the log is not served any more", reason=self.fault)
        return IntegrityError(self.fault)

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        call = functools.partial(work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)
