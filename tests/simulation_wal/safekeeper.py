"""A safekeeper on a simulated disk: the real timeline, acceptor, control file, map, piece format, sender and recovery.

What is not the real one is only what calls the operating system: files (`Disk`), the log's shell over them (`SimLog`,
which does what `WalStore` does, with the same cores), the thread that talks to Postgres (`SimReceiver`), and the object
store (`SimStore`), of which a process may die between any two calls.

The disk loses on a crash what was not synced: of a frame that was being written any beginning may be left.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, cast

from safekeeper.acceptor import AcceptorState
from safekeeper.control_file import FILE_NAME, ControlState
from safekeeper.control_store import ControlStore, DiskFullError
from safekeeper.files import FsyncFailedError
from safekeeper.log_map import Extent, LogMap, Place
from safekeeper.offload import OffloadTuning, RemoteReader
from safekeeper.piece_keys import PieceKeys, ProjectKeys
from safekeeper.remote_wal import RemotePiece, timeline_prefix
from safekeeper.timeline import SEQUENCES_BITS, Timeline, TimelineEnvironment
from safekeeper.trim import begun_at
from safekeeper.wal_receiver import WalReceiver
from safekeeper.wal_segment import (
    KEY_SUFFIX,
    MAX_FRAME_PLAINTEXT_BYTES,
    PIECE_HEADER_SIZE_BYTES,
    FrameIndex,
    PieceCipher,
    PieceHeader,
    PieceId,
    index_frames,
    open_frames,
    verify_tail,
)
from safekeeper.wal_sender import serve_log
from safekeeper.wal_store import WalStore
from shared.api.safekeeper import (
    CreateTimeline,
    Donor,
    Elected,
    EndOfWal,
    StreamFrom,
    TimelineStatus,
    VoteRequest,
    VoteResponse,
)
from shared.crypto.aead import NONCE_SIZE_BYTES, AeadKey, default_suite
from shared.crypto.envelope import Envelope
from shared.crypto.secret import SecretKey
from shared.errors import (
    ConflictError,
    CorruptedError,
    IntegrityError,
    InvalidInputError,
    KeylakeError,
    NotFoundError,
    UnavailableError,
)
from shared.framed_tcp import FramedConnection
from shared.ids import KekId, ProjectId, TimelineId
from shared.lsn import WAL_SEGMENT_SIZE_BYTES, Lsn
from shared.storage.base import StoreUnavailableError
from shared.storage.memory import MemoryObjectStore
from shared.wire.frames import pack_frame
from shared.wire.walstream import SUBSCRIBE, WAL, Subscribe, parse_wal
from tests.simulation_wal.network import Connection, Network
from tests.simulation_wal.virtual_time import Crashed, Process, current_process
from tests.simulation_wal.wal import end_of_wal

PROJECT: Final = ProjectId.parse("prj-0123456789abcdef")
TIMELINE: Final = TimelineId.parse("tl-0123456789abcdef")
SYSTEM_IDENTIFIER: Final = 7
KEK_ID: Final = KekId("kek-0123456789abcdef")
DEK_SIZE_BYTES: Final = 32
ACKNOWLEDGE: Final = 0x50
"""Receiver → compute: everything before this position is durable here."""
START: Final = 0x51
"""Receiver → compute: send from here on."""


@dataclass
class Disk:
    """Survives crashes. `files` is what a power cut leaves; `cached` is written and not synced yet."""

    rng: random.Random
    files: dict[str, bytes] = field(default_factory=dict)
    cached: dict[str, bytes] = field(default_factory=dict)
    keys: dict[str, bytes] = field(default_factory=dict)
    """DEKs, by piece; the envelopes stand for them."""
    full: bool = False
    fsync_fails: bool = False
    crash_after: int | None = None
    """Crash before this many operations from now on."""
    lost: bool = False

    def power_cut(self) -> None:
        for name, written in self.cached.items():
            if name in self.files:
                self.files[name] += written[: self.rng.randint(0, len(written))]
        self.cached.clear()

    def copy(self) -> Disk:
        return Disk(self.rng, dict(self.files), keys=dict(self.keys))

    def take(self, other: Disk) -> None:
        self.files, self.cached, self.keys = dict(other.files), {}, dict(other.keys)

    def wipe(self) -> None:
        self.files.clear()
        self.cached.clear()
        self.keys.clear()
        self.lost = True


class Io:
    """What a process does with its disk; each step is a place where it may die."""

    def __init__(self, disk: Disk, process: Process, crash: Callable[[], None]) -> None:
        self.disk = disk
        self._process = process
        self._crash = crash

    async def step(self) -> None:
        disk, process = self.disk, self._process
        process.check()
        if disk.crash_after is not None:
            disk.crash_after -= 1
            if disk.crash_after < 0:
                disk.crash_after = None
                self._crash()
                raise Crashed
        await asyncio.sleep(disk.rng.uniform(0.0001, 0.002))
        process.check()

    def sync(self) -> None:
        """Raises FsyncFailedError; what was cached may have reached the disk or not."""
        if self.disk.fsync_fails:
            self.disk.fsync_fails = False
            self.disk.power_cut()
            raise FsyncFailedError("fsync failed: simulated")
        for name, written in self.disk.cached.items():
            if name in self.disk.files:
                self.disk.files[name] += written
        self.disk.cached.clear()

    async def replace(self, name: str, data: bytes) -> None:
        await self.step()
        if self.disk.full:
            raise DiskFullError("there is no space: simulated")
        if self.disk.fsync_fails:
            self.disk.fsync_fails = False
            if self.disk.rng.random() < 0.5:
                self.disk.files[name] = data
            raise FsyncFailedError("fsync failed: simulated")
        self.disk.files[name] = data
        await self.step()


class SimControl(ControlStore):
    """The real store of the control file, on the simulated disk."""

    def __init__(self, io: Io, state: ControlState) -> None:
        super().__init__(Path("/simulated"), state, cast("Executor", None))
        self._io = io

    async def _write(self, data: bytes) -> None:
        await self._io.replace(FILE_NAME, data)


@dataclass
class Objects:
    """The object store of all nodes. It loses nothing, but may be away."""

    in_layers_lsn: Callable[[], int]
    """What the pageserver has in layers that are durable."""
    content: dict[str, bytes] = field(default_factory=dict)
    away: bool = False
    removed_lsn: int = 0
    """Pieces that end here, at most, have been removed."""
    skipped: int = 0
    """How often a log went on where its donor's begins."""

    def covers(self, extent: Extent) -> bool:
        assert extent.end_lsn is not None
        found = (RemotePiece.parse(name.rpartition("/")[2]) for name in self.content)
        return any(
            piece.covers(extent.piece.term, extent.start_lsn, extent.end_lsn)
            for piece in found
            if piece is not None and f"{timeline_prefix(PROJECT, TIMELINE)}{piece.name}{KEY_SUFFIX}" in self.content
        )


class SimStore(MemoryObjectStore):
    """One process's way to them; each call is a place where it may die."""

    def __init__(self, io: Io, objects: Objects) -> None:
        super().__init__()
        self._io = io
        self._all = objects
        self._objects = objects.content

    async def _turn(self) -> None:
        await self._io.step()
        if self._all.away:
            raise StoreUnavailableError("the object store is away: simulated")

    async def delete(self, key: str) -> None:
        await super().delete(key)
        piece = RemotePiece.parse(key.rpartition("/")[2])
        if piece is not None:
            assert piece.end_lsn <= self._all.in_layers_lsn(), "WAL is removed that is not in layers"
            self._all.removed_lsn = max(self._all.removed_lsn, piece.end_lsn)

    async def delete_many(self, keys: Iterable[str]) -> None:
        for key in keys:
            await self.delete(key)


class SimPieceKeys(PieceKeys):
    """Envelopes of the simulation wrap nothing."""

    def __init__(self) -> None:
        pass

    async def unwrap(self, piece: PieceId, envelope: Envelope) -> tuple[AeadKey, bytes]:
        return AeadKey(SecretKey(envelope.wrapped_dek[:DEK_SIZE_BYTES])), piece.file_name.encode()


def envelope_of(key: bytes) -> Envelope:
    return Envelope(KEK_ID, 1, bytes(NONCE_SIZE_BYTES), key.ljust(48, b"\0"), bytes(32))


Committed = Callable[[int, int], bytes]
"""The WAL between two positions that everybody has to have."""


class SimLog:
    """What `WalStore` is to a timeline: append, read, clip, by the same cores and in the same order."""

    def __init__(
        self,
        io: Io,
        control: ControlStore,
        on_flush: Callable[[], None],
        remote: RemoteReader | None,
        committed: Committed,
        on_skip: Callable[[], None],
    ) -> None:
        self._io = io
        self._control = control
        self._on_flush = on_flush
        self._remote = remote
        self._committed = committed
        self._on_skip = on_skip
        self._writer: tuple[PieceId, PieceCipher, FrameIndex] | None = None
        self._append_lock = asyncio.Lock()
        self._begin_lsn = control.state.log.oldest_lsn
        self._bytes = bytearray()
        """From `_begin_lsn` on, also what lies in the object store or was trimmed since."""
        self._next_sequence = control.state.log.next_sequence
        self.flush_lsn = control.state.log.closed_end_lsn
        self.loaded = False
        self.fault = ""

    async def load(self) -> None:
        self.check_fault()
        if self.loaded:
            return
        state = self._control.state
        try:
            await self._io.step()
            open_end_lsn = None
            for extent in state.log.extents:
                if extent.place is Place.REMOTE:
                    assert extent.end_lsn is not None
                    self._bytes += self._committed(extent.start_lsn, extent.end_lsn)  # to look at; reads go there
                    continue
                content, cipher = self._open(extent.piece)
                if extent.end_lsn is None:
                    index = verify_tail(content, cipher).index
                    end_lsn = open_end_lsn = index.end_lsn
                else:
                    index, end_lsn = index_frames(content, cipher.header, extent.end_lsn), extent.end_lsn
                frames = open_frames(cipher, index, 0, content[PIECE_HEADER_SIZE_BYTES:], index.frames)
                self._bytes += b"".join(frames)[: end_lsn - extent.start_lsn]
            self.flush_lsn = state.end_of_log(open_end_lsn)
        except IntegrityError as error:
            raise self.failed(error) from None
        self.loaded = True

    def _open(self, piece: PieceId) -> tuple[bytes, PieceCipher]:
        disk, name = self._io.disk, piece.file_name
        if name not in disk.files or name not in disk.keys:
            raise CorruptedError("a WAL piece or its key is missing")
        content = disk.files[name]
        header = PieceHeader.parse(content)
        if header.piece != piece:
            raise CorruptedError("a WAL piece is another one than its name says")
        return content, PieceCipher(AeadKey(SecretKey(disk.keys[name])), name.encode(), header)

    async def append(self, term: int, lsn: int, parts: Sequence[bytes | bytearray | memoryview]) -> int:
        self.check_ready()
        if lsn != self.flush_lsn:
            raise ConflictError("WAL must be appended at the end of the log")
        data = bytes(bytearray().join(parts))
        assert 0 < len(data) <= MAX_FRAME_PLAINTEXT_BYTES
        async with self._append_lock:
            boundary = (lsn // WAL_SEGMENT_SIZE_BYTES + 1) * WAL_SEGMENT_SIZE_BYTES
            if lsn + len(data) > boundary:
                await self._append_frame(term, data[: boundary - lsn])
                data = data[boundary - lsn :]
            await self._append_frame(term, data)
            return self.flush_lsn

    async def _append_frame(self, term: int, data: bytes) -> None:
        writer = self._writer
        if writer is None or writer[0].term != term or self.flush_lsn == writer[0].segment_end_lsn:
            writer = await self._next_piece(term)
        piece, cipher, index = writer
        lsn, disk = self.flush_lsn, self._io.disk
        await self._io.step()
        if disk.full:
            self._writer = None  # this frame's number is used up
            disk.cached[piece.file_name] = cipher.seal(index.frames, lsn, data)[0]
            raise DiskFullError("there is no space: simulated")
        header, sealed = cipher.seal(index.frames, lsn, data)
        disk.cached[piece.file_name] = header + sealed
        await self._io.step()
        try:
            self._io.sync()
        except FsyncFailedError as error:
            raise self.failed(error) from None
        await self._io.step()
        index.append(len(data))
        self._bytes += data
        self.flush_lsn = lsn + len(data)
        self._on_flush()

    async def _next_piece(self, term: int) -> tuple[PieceId, PieceCipher, FrameIndex]:
        lsn, disk = self.flush_lsn, self._io.disk
        piece = PieceId(lsn // WAL_SEGMENT_SIZE_BYTES, term, self._next_sequence)
        self._next_sequence += 1
        key = disk.rng.randbytes(DEK_SIZE_BYTES)
        header = PieceHeader(piece, lsn, default_suite())
        await self._io.step()
        if disk.full:
            raise DiskFullError("there is no space: simulated")
        disk.keys[piece.file_name] = key
        disk.files[piece.file_name] = header.serialize()
        await self.change_control(lambda state: replace(state, log=state.log.opened(piece, lsn)))
        cipher = PieceCipher(AeadKey(SecretKey(key)), piece.file_name.encode(), header)
        self._writer = piece, cipher, FrameIndex.empty(lsn)
        return self._writer

    async def persist(self, acceptor: AcceptorState, clip_lsn: int | None = None) -> None:
        self.check_ready()

        def change(state: ControlState) -> ControlState:
            merged = replace(acceptor, commit_lsn=max(acceptor.commit_lsn, state.acceptor.commit_lsn))
            log = state.log if clip_lsn is None else state.log.closed_at(clip_lsn)
            return replace(state, acceptor=merged, log=log)

        def clipped() -> None:
            if clip_lsn is not None:
                self._writer = None
                if clip_lsn < self.flush_lsn:
                    self.flush_lsn = clip_lsn
                    del self._bytes[clip_lsn - self._begin_lsn :]

        await self.change_control(change, clipped)

    async def begin_at(self, lsn: int) -> None:
        self.check_ready()

        def begun() -> None:
            self._writer = None
            self.flush_lsn = self._begin_lsn = lsn
            self._bytes.clear()
            self._on_skip()

        await self.change_control(lambda state: begun_at(state, self.flush_lsn, lsn), begun)

    async def persist_commit_lsn(self) -> None:
        self.check_ready()
        await self.change_control(lambda state: state)

    async def change_control(
        self, change: Callable[[ControlState], ControlState], applied: Callable[[], None] = lambda: None
    ) -> None:
        before = self._control.state.log.local_pieces
        try:
            state = await self._control.update(change, applied)
        except IntegrityError as error:
            raise self.failed(error) from None
        for piece in sorted(before - state.log.local_pieces):
            await self._io.step()
            self._io.disk.files.pop(piece.file_name, None)
            self._io.disk.keys.pop(piece.file_name, None)

    async def sealed(self, extent: Extent) -> tuple[bytes, Envelope] | None:
        assert extent.end_lsn is not None
        await self._io.step()
        if extent.piece not in self._control.state.log.local_pieces:
            return None
        try:
            content, cipher = self._open(extent.piece)
            index = index_frames(content, cipher.header, extent.end_lsn)
        except IntegrityError as error:
            raise self.failed(error) from None
        return content[: index.end_offset], envelope_of(self._io.disk.keys[extent.piece.file_name])

    async def prepare(self, term: int) -> None:
        self.check_ready()

    async def read(self, lsn: int, max_size_bytes: int) -> bytes:
        self.check_ready()
        await asyncio.sleep(0)
        log = self._control.state.log
        if lsn < log.oldest_lsn:
            raise InvalidInputError("the log begins behind this position")
        if lsn >= self.flush_lsn:
            return b""
        extent = log.extents[log.find(lsn)]
        end_lsn = self.flush_lsn if extent.end_lsn is None else min(extent.end_lsn, self.flush_lsn)
        if extent.place is Place.REMOTE:
            assert self._remote is not None
            return await self._remote.read(extent, lsn, end_lsn, max_size_bytes)
        at = lsn - self._begin_lsn
        return bytes(self._bytes[at : at + max_size_bytes])

    async def aclose(self) -> None:
        pass

    def drop_keys(self) -> None:
        self._writer = None

    def check_fault(self) -> None:
        if self.fault:
            raise IntegrityError(self.fault)

    def check_ready(self) -> None:
        self.check_fault()
        if not self.loaded:
            raise UnavailableError("this timeline is not ready")

    def failed(self, error: KeylakeError) -> IntegrityError:
        self.fault = self.fault or str(error)
        return IntegrityError(self.fault)


ConnectToCompute = Callable[[str], "asyncio.Future[Connection]"]


class SimReceiver:
    """What `WalReceiver` is to a timeline: the synchronous standby of one compute; with the same gate."""

    def __init__(self, log: SimLog, request: StreamFrom, connect: Callable[[], object]) -> None:
        self.request = request
        self.term = request.term
        self.failure: KeylakeError | None = None
        self.streaming = False
        self._log = log
        self._connect = connect
        self._gate = asyncio.Lock()
        self._stopped = False
        self._connection: Connection | None = None

    def start(self) -> None:
        current_process().spawn(self._run())

    async def stop(self) -> None:
        self._stopped = True
        self.streaming = False
        if self._connection is not None:
            self._connection.abort()
        async with self._gate:
            pass

    async def _run(self) -> None:
        while not self._stopped:
            try:
                await self._session()
            except (IntegrityError, ConflictError) as error:
                self.failure = error
                return
            except KeylakeError:
                pass
            finally:
                self.streaming = False
            await asyncio.sleep(0.05)

    async def _session(self) -> None:
        connection = await cast("asyncio.Future[Connection]", self._connect())
        self._connection = connection
        try:
            if self._stopped:
                return
            await connection.send(pack_frame(START, self._log.flush_lsn.to_bytes(8, "big")))
            await self._acknowledge(connection)
            self.streaming = not self._stopped
            while frames := await connection.receive():
                for kind, payload in frames:
                    if kind == WAL:
                        await self._take(connection, *parse_wal(payload))
        finally:
            connection.abort()

    async def _acknowledge(self, connection: Connection) -> None:
        async with self._gate:
            if self._stopped:
                raise UnavailableError("the stream was stopped")
            await connection.send(pack_frame(ACKNOWLEDGE, self._log.flush_lsn.to_bytes(8, "big")))

    async def _take(self, connection: Connection, lsn: int, data: memoryview) -> None:
        log = self._log
        while True:
            async with self._gate:
                if self._stopped:
                    raise UnavailableError("the stream was stopped")
                with suppress(DiskFullError):
                    await log.append(self.term, lsn, [data])
                    await connection.send(pack_frame(ACKNOWLEDGE, log.flush_lsn.to_bytes(8, "big")))
                    return
            data, lsn = data[log.flush_lsn - lsn :], log.flush_lsn
            await asyncio.sleep(0.1)


class SimTimeline(Timeline):
    io: Io
    reach: Callable[[str], object]

    def __init__(
        self,
        io: Io,
        reach: Callable[[str], object],
        state: ControlState,
        connect_to_peer: object,
        world: Surroundings,
    ) -> None:
        self.io = io
        self.reach = reach
        self.world = world
        environment = TimelineEnvironment(
            state.node_id,
            cast("Executor", None),
            connect_to_peer,  # type: ignore[arg-type]
            elected_timeout_s=1.5,
            objects=SimStore(io, world.objects),
            offload=world.tuning,
        )
        keys = cast("ProjectKeys", _Keys())
        super().__init__(Path("/simulated"), state, keys, environment)

    def _open_log(self, state: ControlState) -> tuple[ControlStore, WalStore]:
        control = SimControl(self.io, state)
        objects = self.world.objects

        def on_skip() -> None:
            objects.skipped += 1

        log = SimLog(self.io, control, self._wake_subscriptions, self._reader, self.world.committed, on_skip)
        return control, cast("WalStore", log)

    def _keys_of(self, node_id: str) -> PieceKeys:
        return SimPieceKeys()

    def _make_receiver(self, request: StreamFrom) -> WalReceiver:
        host = request.compute.host
        return cast("WalReceiver", SimReceiver(cast("SimLog", self._store), request, lambda: self.reach(host)))

    async def end_of_wal(self) -> EndOfWal:
        await self.make_ready()
        # Real WAL shows where a record starts; this kind has to be read from where the timeline begins.
        last, end = end_of_wal(self.state.log.start_lsn, self.content)
        return EndOfWal(last_record_lsn=Lsn(last), end_lsn=Lsn(end))

    def streams_in(self, term: int) -> bool:
        return self._control.state.acceptor.last_log_term(self.flush_lsn) == term and self.status().streaming

    @property
    def content(self) -> bytes:
        """The whole log: what was trimmed, and then what its shell has in memory."""
        log = cast("SimLog", self._store)
        return self.world.committed(self.state.log.start_lsn, log._begin_lsn) + log._bytes

    @property
    def state(self) -> ControlState:
        return self._control.state

    @property
    def durable(self) -> ControlState:
        return self._control._durable


class _Keys:
    """A project whose keys are always there: revocation is another test's matter."""

    async def acquire(self) -> None:
        pass

    def check(self) -> None:
        pass


@dataclass
class Surroundings:
    """What all nodes have in common."""

    objects: Objects
    committed: Committed
    tuning: OffloadTuning


class SimSafekeeper:
    """One node: a disk, and now and then a process on it."""

    def __init__(
        self,
        node_id: str,
        rng: random.Random,
        network: Network,
        note: Callable[[str, str], None],
        world: Surroundings,
    ) -> None:
        self.node_id = node_id
        self.disk = Disk(rng)
        self._world = world
        self._network = network
        self._note = note
        self.process: Process | None = None
        self.timeline: SimTimeline | None = None
        self.old_disks: list[Disk] = []
        self.reach: Callable[[str, str], object] = lambda node, host: None
        self.peers: dict[str, SimSafekeeper] = {}

    def start(self) -> None:
        if self.process is not None:
            return
        self._note(self.node_id, "starts")
        self.process = Process(self.node_id)
        data = self.disk.files.get(FILE_NAME)
        if data is not None:
            self.process.run(self._open, ControlState.parse(data))
            assert self.timeline is not None
            self.process.spawn(self._ready(self.timeline))
        self.process.spawn(self._keep_house())

    def _open(self, state: ControlState) -> None:
        assert self.process is not None
        io = Io(self.disk, self.process, self.crash)
        self.timeline = SimTimeline(
            io, lambda host: self.reach(self.node_id, host), state, self._connect_to_peer, self._world
        )

    async def _ready(self, timeline: SimTimeline) -> None:
        await timeline.make_ready()

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(self.disk.rng.uniform(0.05, 0.4))
            if self.timeline is not None:
                with suppress(KeylakeError):
                    await self.timeline.persist_commit_lsn()
                    await self.timeline.offload()

    def crash(self) -> None:
        if self.process is None:
            return
        self._note(self.node_id, "crashes")
        process, self.process, self.timeline = self.process, None, None
        process.kill()
        self.disk.power_cut()

    def lose_disk(self) -> None:
        self.crash()
        self._note(self.node_id, "loses its disk")
        self.old_disks.append(self.disk.copy())
        self.disk.wipe()

    def bring_old_disk(self) -> None:
        """One that was lost, and perhaps replaced, turns up, and the node is started on it."""
        self.crash()
        self._note(self.node_id, "has an old disk")
        self.disk.take(self.old_disks[-1])
        self.disk.lost = True

    @property
    def up(self) -> SimTimeline | None:
        """Its timeline, if it serves one."""
        timeline = self.timeline
        return timeline if timeline is not None and timeline._store.loaded and not timeline._store.fault else None

    def _found(self) -> SimTimeline:
        if self.timeline is None:
            raise NotFoundError("there is no such timeline on this safekeeper")
        return self.timeline

    # --- what its HTTP API does ---

    async def status(self) -> TimelineStatus:
        return self._found().status()

    async def create(self, request: CreateTimeline) -> TimelineStatus:
        if self.timeline is None:
            start_lsn = request.start_lsn.value
            acceptor = AcceptorState(start_lsn, commit_lsn=start_lsn, seat=request.seat)
            log = LogMap(start_lsn, next_sequence=request.seat << SEQUENCES_BITS)
            state = ControlState(self.node_id, PROJECT, TIMELINE, request.system_identifier, acceptor, log)
            assert self.process is not None
            await Io(self.disk, self.process, self.crash).replace(FILE_NAME, state.serialize())
            if self.timeline is None:
                self._open(state)
        elif not self._found().same_as(request):
            raise ConflictError("this timeline exists already, with other values")
        await self._found().make_ready()
        return self._found().status()

    async def vote(self, request: VoteRequest) -> VoteResponse:
        return await self._found().vote(request)

    async def elected(self, request: Elected) -> TimelineStatus:
        return await self._found().elected(request)

    async def end_of_wal(self) -> EndOfWal:
        return await self._found().end_of_wal()

    async def stream(self, request: StreamFrom) -> TimelineStatus:
        return await self._found().stream_from(request)

    # --- its WAL port ---

    async def serve_wal(self, connection: Connection) -> None:
        first = await connection.receive_one()
        if first is None:
            return
        assert first[0] == SUBSCRIBE
        timeline = self._found()
        await timeline.make_ready()
        request = Subscribe.parse(first[1])
        await serve_log(cast("FramedConnection", connection), timeline, request, takes_feedback=True)

    async def _connect_to_peer(self, donor: Donor, project_id: ProjectId) -> Connection:
        return await self._network.connect(self.node_id, donor.node_id, self.peers[donor.node_id].serve_wal)
