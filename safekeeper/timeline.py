"""One timeline of a safekeeper: performs what the acceptor decides, in the order in which it says so.

Theory of operation. At most one *writer* appends to the log: the stream from a compute, or the copying from a peer.
Both belong to a term, and both can be stopped so that nothing is acknowledged from then on and nothing appended after.
Votes, elections and stream control run one at a time under `_lock`; copying goes on outside of it, so that a vote for a
higher term can stop it.

    vote ─ lock ─► stop writer ─► end subscriptions ─► control file ─► answer
    elected ─ lock ─► stop writer ─► control file (history and clip at once) ─► recovery starts ─ unlock ─► wait for it

Shared state and who changes it: the log by the writer and, with no writer, by `elected`; `acceptor` (in the control
store) under the lock, but commit_lsn by anybody, upwards; `_subscriptions` by their own tasks.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, assert_never

from safekeeper import acceptor, files
from safekeeper.acceptor import AcceptorState, DropStream, Effect, EndSubscriptions, Persist, ReplyVote
from safekeeper.backpressure import Backpressure
from safekeeper.contents import PieceInspector, describe_piece
from safekeeper.control_file import FILE_NAME, ControlState
from safekeeper.control_store import ControlStore
from safekeeper.end_of_wal import RecordBoundary, find_last_record
from safekeeper.key_upkeep import PieceUpkeep
from safekeeper.log_map import LogMap
from safekeeper.offload import OffloadTuning, RemoteReader
from safekeeper.offloader import Offloader
from safekeeper.peer_recovery import ConnectToPeer, PeerRecovery
from safekeeper.piece_keys import PieceKeys, ProjectKeys
from safekeeper.remote_upkeep import RemoteUpkeep
from safekeeper.remote_wal import RemoteWal
from safekeeper.scrub import WalScrubber
from safekeeper.term_history import TermHistory
from safekeeper.wal_receiver import ReceiverTuning, WalReceiver
from safekeeper.wal_sender import Subscription, ended_by_election
from safekeeper.wal_store import StoreTuning, WalStore
from shared.api.safekeeper import (
    CreateTimeline,
    Elected,
    EndOfWal,
    InspectWal,
    StopStream,
    StreamFrom,
    TermStart,
    TimelineStatus,
    VoteRequest,
    VoteResponse,
    WalContent,
    WalScrubReport,
)
from shared.crypto.secret import KeyWipedError
from shared.errors import ConflictError, KeyAccessError, UnavailableError
from shared.failpoints import failpoint
from shared.ids import ProjectId, TimelineId
from shared.key_upkeep import UpkeepTuning
from shared.lease import KeyLoss, key_access_error
from shared.lsn import Lsn
from shared.storage.base import ObjectStore
from shared.telemetry import get_logger
from shared.wire.walstream import Feedback, Status

_log = get_logger(__name__)
T = TypeVar("T")

DELETED_SUFFIX: Final = ".deleted"
"""Of a timeline's directory that is being removed; finished at the next start."""


SEQUENCES_BITS: Final = 20
"""So many piece numbers, as a power of two, has each disk of a node."""

_SUBSCRIPTION_END_S: Final = 1.0
"""Subscriptions that were aborted end within a few turns of the event loop, unless the disk hangs. After this long that
is logged."""


@dataclass(frozen=True, slots=True)
class TimelineEnvironment:
    """What all timelines of a node share."""

    node_id: str
    executor: Executor
    connect_to_peer: ConnectToPeer
    elected_timeout_s: float = 60.0
    store: StoreTuning = field(default_factory=StoreTuning)
    receiver: ReceiverTuning = field(default_factory=ReceiverTuning)
    key_upkeep: UpkeepTuning = field(default_factory=UpkeepTuning)
    backpressure_size_bytes: int = 0
    """WAL that may be acknowledged and not ingested by the pageserver; 0: any amount."""
    objects: ObjectStore | None = None
    """Where WAL is offloaded to. None: all of it stays on the disk."""
    offload: OffloadTuning = field(default_factory=OffloadTuning)


class Timeline:
    """`create` makes a new one; the constructor opens one of the disk: then `check_files`, and `make_ready` in time."""

    def __init__(
        self, directory: Path, state: ControlState, keys: ProjectKeys, environment: TimelineEnvironment
    ) -> None:
        self.project_id = state.project_id
        self.timeline_id = state.timeline_id
        self.keys = keys
        self._directory = directory
        self._environment = environment
        objects = environment.objects
        self._remote = None if objects is None else RemoteWal(objects, state.project_id, state.timeline_id)
        self._reader = None if self._remote is None else RemoteReader(self._remote, self._keys_of)
        self._control, self._store = self._open_log(state)
        self._scrubber: WalScrubber | None = None
        self._offloader: Offloader | None = None
        if self._remote is not None and self._reader is not None:
            self._offloader = offloader = Offloader(
                self._store, self._control, self._remote, self._reader, environment.node_id, environment.offload
            )
            self._scrubber = WalScrubber(
                self._remote, self._reader, lambda: self._control.state.log, lambda: offloader.trim_limit
            )
        self.key_upkeep = PieceUpkeep(
            self._store,
            directory,
            self._control,
            PieceKeys(keys, state.timeline_id, environment.node_id),
            environment.executor,
            None if self._remote is None else RemoteUpkeep(self._remote, environment.node_id, self._keys_of),
        )
        self._lock = asyncio.Lock()
        self._loading = asyncio.Lock()
        surely_ingested_lsn = max(state.log.start_lsn, state.remote_consistent_lsn)
        self._backpressure = Backpressure(environment.backpressure_size_bytes, surely_ingested_lsn)
        self._offloading = asyncio.Lock()
        self._closed = False
        self._electing = False
        self._writer: WalReceiver | PeerRecovery | None = None
        self._streamed: tuple[int, str, int] | None = None
        self._subscriptions: set[Subscription] = set()
        self.awaiting = 0
        self._boundary: RecordBoundary | None = None
        self._status_cache: tuple[int, ControlState, Status] | None = None

    # The two places where a timeline meets the disk and the compute; the simulation puts its own ones there.

    def _open_log(self, state: ControlState) -> tuple[ControlStore, WalStore]:
        environment = self._environment
        control = ControlStore(self._directory, state, environment.executor)
        store = WalStore(
            self._directory,
            control,
            PieceKeys(self.keys, state.timeline_id, environment.node_id),
            environment.executor,
            self._wake_subscriptions,
            self._is_awaited,
            environment.store,
            self._reader,
        )
        return control, store

    def _keys_of(self, node_id: str) -> PieceKeys:
        return PieceKeys(self.keys, self.timeline_id, node_id)

    def _make_receiver(self, request: StreamFrom) -> WalReceiver:
        return WalReceiver(
            self._store,
            self.keys,
            request,
            self._environment.node_id,
            self._control.state.system_identifier,
            self._environment.receiver,
            self._backpressure,
        )

    # --- life ---

    @classmethod
    async def create(
        cls,
        directory: Path,
        project_id: ProjectId,
        timeline_id: TimelineId,
        request: CreateTimeline,
        keys: ProjectKeys,
        environment: TimelineEnvironment,
    ) -> Timeline:
        """A new timeline in a new directory. Raises UnavailableError when the disk is full."""
        start_lsn = request.start_lsn.value
        state = ControlState(
            environment.node_id,
            project_id,
            timeline_id,
            request.system_identifier,
            AcceptorState(start_lsn, commit_lsn=start_lsn, seat=request.seat),
            # Invariant: no two disks of a node give the same name to an object. (One that was lost may have left some.)
            LogMap(start_lsn, next_sequence=request.seat << SEQUENCES_BITS),
        )
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(environment.executor, _create_directory, directory, state)
        except OSError as error:
            raise UnavailableError(f"the timeline cannot be stored: {error.strerror}") from None
        timeline = cls(directory, state, keys, environment)
        await timeline._store.load()
        return timeline

    async def check_files(self) -> None:
        """For one that was on the disk already. Raises IntegrityError, and is at fault then, for damage that shows
        without keys; UnavailableError when the disk cannot be read now, and `make_ready` looks again."""
        await self._store.check_files()

    @property
    def loaded(self) -> bool:
        """Has the end of the log been verified since the start?"""
        return self._store.loaded

    async def make_ready(self) -> None:
        """Find out, once, how far the log reaches; that takes the key.

        Raises UnavailableError when the key is not to be had (now), IntegrityError at fault.
        """
        if self._store.loaded:
            self._store.check_fault()
            return
        async with self._loading:
            try:
                await self._store.load()
            except KeyAccessError as error:
                raise UnavailableError(f"this timeline is not ready: {error}") from None
            self._wake_subscriptions()

    @property
    def fault(self) -> str:
        """Why it serves nothing, or does not serve yet; empty when all is well."""
        return self._store.fault or ("" if self._store.loaded else "not ready: the end of the log is not verified yet")

    async def persist_commit_lsn(self) -> None:
        """Raises UnavailableError, IntegrityError."""
        if self._control.commit_lsn_is_dirty and self._store.loaded and not self._store.fault:
            await self._store.persist_commit_lsn()

    async def offload(self) -> None:
        """One pass of offload.py. Raises KeyAccessError, UnavailableError, StoreDeniedError, IntegrityError."""
        async with self._offloading:
            if self._offloader is None or self._closed or not self._store.loaded or self._store.fault:
                return
            await self._offloader.run_once()

    async def aclose(self) -> None:
        self._closed = True
        async with self._lock:
            await self._stop_writer()
            self._end_subscriptions()
            try:
                await self.persist_commit_lsn()
            except UnavailableError as error:
                _log.info("commit_lsn was not persisted", reason=str(error))
            await self._store.aclose()

    async def delete(self) -> None:
        """Close, and remove everything of it from the disk. What is in the object store stays: peers may have it there
        only. Raises OSError, IntegrityError."""
        await self.aclose()
        async with self._offloading:  # what a pass was just putting is there now, and no other pass begins
            pass
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._environment.executor, remove_directory, self._directory)

    def same_as(self, request: CreateTimeline) -> bool:
        state = self._control.state
        here = (state.system_identifier, state.log.start_lsn, state.acceptor.seat)
        return here == (request.system_identifier, request.start_lsn.value, request.seat)

    # --- elections ---

    async def vote(self, request: VoteRequest) -> VoteResponse:
        """Raises ConflictError for another disk or an old membership, UnavailableError when not ready or the disk is
        full, IntegrityError at fault. Goes on to its end when the caller is cancelled."""
        response = await _to_its_end(self._vote(request))
        _log.info(
            "vote",
            timeline_id=str(self.timeline_id),
            candidate=request.candidate,
            asked_term=request.term,
            granted=response.granted,
            flush_lsn=str(response.flush_lsn),
        )
        return response

    async def _vote(self, request: VoteRequest) -> VoteResponse:
        # Invariant: whoever decides by the acceptor's state holds the lock until the effects are performed. Another
        # one, deciding meanwhile by the state of before, would take back what was promised.
        async with self._lock:
            await self.make_ready()
            state = self._control.state.acceptor
            effects = acceptor.vote(state, request.term, request.seat, request.generation)
            response = await self._perform(effects)
        assert response is not None  # noqa: S101 - every vote ends in a reply
        return response

    async def elected(self, request: Elected) -> TimelineStatus:
        """Adopt the leader's history; returns when the log reaches its start. The history is adopted when the caller is
        cancelled, too.

        Raises ConflictError, InvalidInputError (see acceptor.elected), KeyAccessError, UnavailableError when copying
        takes too long (it goes on; ask again), IntegrityError.
        """
        recovery = await _to_its_end(self._adopt(request))
        if recovery is not None:
            try:
                async with asyncio.timeout(self._environment.elected_timeout_s):
                    await recovery.wait()
            except TimeoutError:
                raise UnavailableError("still copying WAL from the donor") from None
        return self.status()

    async def _adopt(self, request: Elected) -> PeerRecovery | None:
        """What copies the rest of the log; None when there is no rest."""
        history = TermHistory.of((entry.term, entry.start_lsn.value) for entry in request.term_history)
        async with self._lock:
            await self.make_ready()
            # Decided before the writer is stopped: a refused message must not hurt a stream that is in order.
            if self._decide_elected(request.term, history):
                await self._stop_writer()
                await self._perform(self._decide_elected(request.term, history))
            return await self._recover(history, request)

    def _decide_elected(self, term: int, history: TermHistory) -> list[Effect]:
        return acceptor.elected(self._control.state.acceptor, self._store.flush_lsn, term, history)

    async def _recover(self, history: TermHistory, request: Elected) -> PeerRecovery | None:
        if self._store.flush_lsn >= history.entries[-1].start_lsn:
            return None
        running = self._writer
        if isinstance(running, PeerRecovery) and running.is_going_on(request.donor):
            return running
        await self._stop_writer()
        recovery = PeerRecovery(
            self._store,
            self.project_id,
            self.timeline_id,
            history,
            request.donor,
            self._environment.node_id,
            self._environment.connect_to_peer,
        )
        self._writer = recovery
        recovery.start()
        return recovery

    async def _perform(self, effects: list[Effect]) -> VoteResponse | None:
        try:
            return await self._perform_in_order(effects)
        finally:
            self._electing = False

    async def _perform_in_order(self, effects: list[Effect]) -> VoteResponse | None:
        response = None
        for effect in effects:
            match effect:
                case DropStream():
                    await self._stop_writer()
                case EndSubscriptions():
                    # Invariant: none begins before the log is clipped. It would go on with the new history's status
                    # behind bytes of the old one.
                    self._electing = True
                    self._end_subscriptions()
                case Persist(state=state, clip_lsn=clip_lsn):
                    if clip_lsn is not None and self._boundary is not None and self._boundary.end_lsn > clip_lsn:
                        self._boundary = None
                    await self._store.persist(state, clip_lsn)
                    self._wake_subscriptions()
                case ReplyVote(granted=granted):
                    failpoint("vote-before-reply")
                    response = self._vote_response(granted)
                case _:
                    assert_never(effect)
        return response

    def _vote_response(self, granted: bool) -> VoteResponse:
        state, flush_lsn = self._control.state.acceptor, self._store.flush_lsn
        return VoteResponse(
            granted=granted,
            term=state.term,
            last_log_term=state.last_log_term(flush_lsn),
            flush_lsn=Lsn(flush_lsn),
            commit_lsn=Lsn(state.commit_lsn),
            term_history=_term_starts(state.history.up_to(flush_lsn)),
        )

    async def end_of_wal(self) -> EndOfWal:
        """Raises CorruptedError when the log is not WAL, KeyAccessError, UnavailableError, IntegrityError."""
        await self.make_ready()
        state, flush_lsn = self._control.state, self._store.flush_lsn
        found = await find_last_record(
            self._store.read,
            state.log.start_lsn,
            flush_lsn,
            state.system_identifier,
            self._boundary,
            self._environment.executor,
            oldest_lsn=state.log.oldest_lsn,
        )
        if flush_lsn <= self._store.flush_lsn and state.acceptor.history == self._control.state.acceptor.history:
            self._boundary = found  # nothing was clipped meanwhile
        return EndOfWal(last_record_lsn=Lsn(found.last_record_lsn), end_lsn=Lsn(found.end_lsn))

    async def describe(self, request: InspectWal) -> WalContent:
        """Raises NotFoundError when there is no such piece here, KeyAccessError, UnavailableError, IntegrityError."""
        await self.keys.acquire()
        state, environment = self._control.state, self._environment
        inspector = PieceInspector(self._directory, environment.node_id, self._remote, self._keys_of)
        opened = await inspector.open(request)
        try:
            found = await describe_piece(opened, state.log.start_lsn, state.system_identifier, environment.executor)
        except KeyWipedError:
            self.keys.check()
            raise UnavailableError("the keys were lost meanwhile: try again") from None
        self.keys.check()  # Invariant: after decrypting, before anything leaves
        return found

    async def scrub(self) -> WalScrubReport:
        """What is wrong with the offloaded WAL (scrub.py). Raises ConflictError while another run is under way,
        KeyAccessError, UnavailableError, StoreDeniedError."""
        await self.make_ready()
        lease = await self.keys.acquire()
        if self._scrubber is None:
            return WalScrubReport(pieces=0, size_bytes=0, objects=0, findings=[])
        return await self._scrubber.run(lease.kek_version, lease.dek_floor)

    # --- stream ---

    async def stream_from(self, request: StreamFrom) -> TimelineStatus:
        """Start to receive. The same request again changes nothing, unless the stream had ended for good.

        Raises ConflictError: another term, an election that is not finished, or a second compute in a term in which a
        first one has written already (a term has one log). KeyAccessError, UnavailableError, IntegrityError.
        """
        async with self._lock:
            await self.make_ready()
            await self.keys.acquire()
            state, flush_lsn = self._control.state.acceptor, self._store.flush_lsn
            acceptor.check_may_stream(state, flush_lsn, request.term)
            term_start_lsn = state.history.entries[-1].start_lsn
            if request.start_lsn.value != term_start_lsn:
                raise ConflictError("the stream must start where the term starts")
            source = (request.term, request.compute.host, request.compute.port)
            streamed = self._streamed
            if streamed not in (None, source) and streamed[0] == request.term and flush_lsn > term_start_lsn:
                raise ConflictError("another compute has written in this term already: elect a new one")
            running = self._writer
            if isinstance(running, WalReceiver) and running.failure is None and running.request == request:
                return self.status()
            await self._stop_writer()
            receiver = self._make_receiver(request)
            self._writer, self._streamed = receiver, source
            receiver.start()
        return self.status()

    async def stop_stream(self, request: StopStream) -> TimelineStatus:
        """Raises ConflictError when the stream is of another term."""
        async with self._lock:
            if request.term != self._control.state.acceptor.term:
                raise ConflictError(f"term {request.term} is not the current one")
            if isinstance(self._writer, WalReceiver):
                await self._stop_writer()
        return self.status()

    async def _stop_writer(self) -> None:
        writer = self._writer
        if writer is not None:
            await writer.stop()
            if self._writer is writer:
                self._writer = None

    # --- what others see ---

    def status(self) -> TimelineStatus:
        """Needs no key. Before the end of the log is verified, flush_lsn is a lower bound."""
        state, flush_lsn = self._control.state, self._store.flush_lsn
        return TimelineStatus(
            project_id=self.project_id,
            timeline_id=self.timeline_id,
            system_identifier=state.system_identifier,
            term=state.acceptor.term,
            last_log_term=state.acceptor.last_log_term(flush_lsn),
            term_history=_term_starts(state.acceptor.history),
            timeline_start_lsn=Lsn(state.log.start_lsn),
            flush_lsn=Lsn(flush_lsn),
            commit_lsn=Lsn(state.acceptor.commit_lsn),
            streaming=self._writer is not None and self._writer.streaming,
            wal_size_bytes=flush_lsn - state.log.oldest_lsn,
            seat=state.acceptor.seat,
            generation=state.acceptor.generation,
            held_back_size_bytes=flush_lsn - self._backpressure.allowed_lsn(flush_lsn),
        )

    # --- wal_sender.Log ---

    @property
    def start_lsn(self) -> int:
        return self._control.state.log.oldest_lsn

    @property
    def flush_lsn(self) -> int:
        return self._store.flush_lsn

    def wire_status(self) -> Status:
        control, flush_lsn = self._control.state, self._store.flush_lsn
        cached = self._status_cache
        if cached is not None and cached[0] == flush_lsn and cached[1] is control:
            return cached[2]
        state = control.acceptor
        last_log_term = state.last_log_term(flush_lsn)
        status = Status(
            state.term,
            last_log_term,
            flush_lsn,
            state.commit_lsn,
            control.remote_consistent_lsn,
            control.log.oldest_lsn,
        )
        self._status_cache = flush_lsn, control, status
        return status

    async def read(self, lsn: int, max_size_bytes: int) -> bytes:
        return await self._store.read(lsn, max_size_bytes)

    def feedback(self, feedback: Feedback) -> None:
        """What a pageserver says. It is taken as far as this log reaches, and while that is of the current term."""
        state, flush_lsn = self._control.state.acceptor, self._store.flush_lsn
        self._backpressure.heard(min(feedback.ingested_lsn, flush_lsn))
        raised = acceptor.commit(state, flush_lsn, feedback.commit_lsn)
        if raised is not state:
            self._control.raise_commit_lsn(raised.commit_lsn)
        if state.last_log_term(flush_lsn) == state.term:
            # What is in layers was committed before, so the rule is the same.
            self._control.raise_remote_consistent_lsn(min(feedback.remote_consistent_lsn, flush_lsn))
        if raised is not state:
            self._wake_subscriptions()

    def subscribe(self, subscription: Subscription) -> None:
        self._store.check_ready()
        if self._electing:
            raise UnavailableError("an election changes the log just now: subscribe again")
        self._subscriptions.add(subscription)

    def unsubscribe(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)

    def _is_awaited(self) -> bool:
        """Is somebody waiting for the next append? Called by the thread that appends."""
        return self.awaiting > 0

    @property
    def subscriptions(self) -> int:
        return len(self._subscriptions)

    def _wake_subscriptions(self) -> None:
        for subscription in self._subscriptions:
            subscription.wake()

    def _end_subscriptions(self) -> None:
        for subscription in self._subscriptions:
            subscription.end(ended_by_election())

    # --- loss of keys ---

    def cut(self, loss: KeyLoss) -> None:
        """No WAL leaves when this returns. Idempotent. No await in here."""
        error = key_access_error(loss.state, loss.reason)
        for subscription in self._subscriptions:
            subscription.abort(error)

    async def drop_plaintext(self, loss: KeyLoss) -> dict[str, float]:
        """What a KeyLossHandler does for one timeline. Idempotent. Returns step → seconds since the call, when nothing
        is held any more, however long that takes."""
        started_s = time.monotonic()
        steps_s = {}
        subscriptions = list(self._subscriptions)
        self.cut(loss)
        writer = self._writer
        stopping = None if writer is None else asyncio.create_task(writer.stop())
        steps_s["subscriptions_ended"] = time.monotonic() - started_s
        self._store.drop_keys()
        steps_s["plaintext_dropped"] = time.monotonic() - started_s
        if stopping is not None:
            await stopping
            if self._writer is writer:
                self._writer = None
        self._store.drop_keys()  # again: an append that was under way has ended now
        await self.key_upkeep.plaintext_gone()
        steps_s["stream_stopped"] = time.monotonic() - started_s
        await self._finished(subscriptions)
        steps_s["subscriptions_gone"] = time.monotonic() - started_s
        return steps_s

    async def _finished(self, aborted: Sequence[Subscription]) -> None:
        """They send nothing any more; but what they were about to send is in memory until they have finished. They have
        cancelled it themselves; what a thread still reads from a disk ends when it ends."""
        finished = asyncio.gather(*(subscription.finished.wait() for subscription in aborted))
        done, _ = await asyncio.wait([finished], timeout=_SUBSCRIPTION_END_S)
        if not done:
            _log.warning(
                "subscriptions do not end with their keys: nothing is acknowledged before they have",
                timeline_id=str(self.timeline_id),
                subscriptions=sum(not subscription.finished.is_set() for subscription in aborted),
            )
        await finished


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which goes on when the caller is cancelled."""
    return await asyncio.shield(asyncio.create_task(work))


def _term_starts(history: TermHistory) -> list[TermStart]:
    return [TermStart(term=entry.term, start_lsn=Lsn(entry.start_lsn)) for entry in history.entries]


def _create_directory(directory: Path, state: ControlState) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    files.fsync_directory(directory.parent.parent)
    files.fsync_directory(directory.parent)
    files.replace_file(directory / FILE_NAME, state.serialize())


def remove_directory(directory: Path) -> None:
    """Of a timeline. Raises OSError, FsyncFailedError; the next start finishes it, if its name is gone already."""
    # Renamed first: a crash half way leaves nothing that looks like a damaged timeline.
    doomed = directory.with_name(directory.name + DELETED_SUFFIX)
    if doomed.exists():
        shutil.rmtree(doomed)
    directory.rename(doomed)
    files.fsync_directory(directory.parent)
    shutil.rmtree(doomed)
