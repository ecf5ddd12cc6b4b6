"""Copying what this safekeeper lacks from the donor that an election chose.

The bytes [own flush_lsn, start of the new term) are fetched from the donor's WAL port and appended under the terms that
the adopted history gives for them. The donor's log may end up to seven bytes (alignment) or the rest of a segment
(after XLOG_SWITCH) before the new term starts: Postgres leaves zeros there, and so do we.

Invariant as for the stream: when `stop` has returned, nothing is being appended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from safekeeper.term_history import TermHistory
from safekeeper.wal_segment import MAX_FRAME_PLAINTEXT_BYTES
from safekeeper.wal_store import WalStore
from shared.api.safekeeper import Donor
from shared.errors import ConflictError, IntegrityError, KeyAccessError, KeylakeError
from shared.failpoints import failpoint
from shared.framed_tcp import FramedConnection
from shared.ids import ProjectId, TimelineId
from shared.lsn import WAL_SEGMENT_SIZE_BYTES
from shared.telemetry import get_logger
from shared.wire.frames import ERROR, ErrorFrame, ProtocolError
from shared.wire.walstream import END, STATUS, WAL, Status, Subscribe, SubscribeFlags, parse_wal

_log = get_logger(__name__)
_RETRY_DELAY_S: Final = 0.2
_ALIGNMENT_BYTES: Final = 8

ConnectToPeer = Callable[[Donor, ProjectId], Awaitable[FramedConnection]]


def is_padding(end_lsn: int, start_lsn: int) -> bool:
    """Can [end_lsn, start_lsn) be what Postgres leaves zero behind a record? Less than an alignment, or the rest of a
    segment."""
    size = start_lsn - end_lsn
    return 0 < size < _ALIGNMENT_BYTES or (
        start_lsn % WAL_SEGMENT_SIZE_BYTES == 0 and 0 < size < WAL_SEGMENT_SIZE_BYTES
    )


class PeerRecovery:
    """Brings the log up to where `history`'s last term starts. `start`, then `wait` or `stop`."""

    streaming: Final = False

    def __init__(
        self,
        store: WalStore,
        project_id: ProjectId,
        timeline_id: TimelineId,
        history: TermHistory,
        donor: Donor,
        own_node_id: str,
        connect: ConnectToPeer,
    ) -> None:
        self.term = history.last_term
        self.donor = donor
        self._target_lsn = history.entries[-1].start_lsn
        self._store = store
        self._project_id = project_id
        self._timeline_id = timeline_id
        self._history = history
        self._own_node_id = own_node_id
        self._connect = connect
        self._connection: FramedConnection | None = None
        self._stopped = False
        self._appending = False
        self._task: asyncio.Task[None] | None = None
        self._log = _log.bind(timeline_id=str(timeline_id), term=self.term)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="peer-recovery")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.warning("peer recovery has ended", donor=self.donor.node_id, reason=str(error))

    def is_going_on(self, donor: Donor) -> bool:
        return self.donor == donor and self._task is not None and not self._task.done()

    async def wait(self) -> None:
        """Returns when the log reaches the start of the term. Raises what made it impossible. May be cancelled."""
        assert self._task is not None  # noqa: S101 - started before
        await asyncio.wait([self._task])
        if self._task.cancelled() or self._stopped:
            raise ConflictError("the election was overtaken by another one")
        self._task.result()

    async def stop(self) -> None:
        self._stopped = True
        if self._connection is not None:
            self._connection.abort()
        if self._task is None:
            return
        if not self._appending:
            self._task.cancel()
        await asyncio.wait([self._task])

    # --- inside ---

    async def _run(self) -> None:
        """Raises ConflictError, KeyAccessError, IntegrityError: what trying again does not heal."""
        while self._store.flush_lsn < self._target_lsn and not self._stopped:
            try:
                if self.donor.node_id == self._own_node_id:
                    await self._fill(self._store.flush_lsn)
                else:
                    await self._session()
                continue
            except (ConflictError, KeyAccessError, IntegrityError) as error:
                if not error.retryable:
                    raise
                reason = str(error)
            except KeylakeError as error:
                reason = str(error)
            self._log.info("peer recovery is interrupted", donor=self.donor.node_id, reason=reason)
            await asyncio.sleep(_RETRY_DELAY_S)

    async def _session(self) -> None:
        """One connection to the donor; returns at its end or when the log reaches the target."""
        connection = await self._connect(self.donor, self._project_id)
        self._connection = connection
        try:
            start_lsn = self._store.flush_lsn
            subscribe = Subscribe(self._project_id, self._timeline_id, start_lsn, self._target_lsn, SubscribeFlags.NONE)
            await connection.send(subscribe.pack())
            while not self._stopped and (frames := await connection.receive()):
                for kind, payload in frames:
                    await self._on_frame(kind, payload)
                    if self._store.flush_lsn >= self._target_lsn or self._stopped:
                        return
        finally:
            self._connection = None
            await connection.close()

    async def _on_frame(self, kind: int, payload: bytes) -> None:
        if kind == WAL:
            lsn, data = parse_wal(payload)
            if lsn != self._store.flush_lsn:
                raise ProtocolError("WAL from the donor is not contiguous")
            await self._append(data)
        elif kind == STATUS:
            status = Status.parse(payload)
            # The donor voted in this election, so its term is ours unless another one has begun since.
            if status.term != self.term:
                raise ConflictError(f"the donor is in term {status.term}, not {self.term}")
            if self._store.flush_lsn < status.oldest_lsn <= self._target_lsn:
                # What it has trimmed was committed, so it is of this history; and it is in layers: nobody misses it.
                await self._store.begin_at(status.oldest_lsn)
            elif status.flush_lsn == self._store.flush_lsn:
                await self._fill(status.flush_lsn)
        elif kind == ERROR:
            raise ErrorFrame.parse(payload).exception()
        elif kind != END:
            raise ProtocolError(f"unexpected frame type {kind:#x} from the donor")

    async def _fill(self, end_lsn: int) -> None:
        """The donor has no more than we have: what is missing can only be padding."""
        if end_lsn >= self._target_lsn:
            return
        if not is_padding(end_lsn, self._target_lsn):
            raise ConflictError("the donor's log does not reach the start of the new term")
        await self._append(memoryview(bytes(self._target_lsn - end_lsn)))

    async def _append(self, data: memoryview) -> None:
        """Append up to the target, each part under its own term."""
        lsn = self._store.flush_lsn
        end_lsn = min(lsn + len(data), self._target_lsn)
        for term, start, end in self._history.ranges(lsn, end_lsn):
            while start < end and not self._stopped:
                part = data[start - lsn : min(end - lsn, start - lsn + MAX_FRAME_PLAINTEXT_BYTES)]
                self._appending = True
                try:
                    start = await self._store.append(term, start, [part])
                    failpoint("recovery-appended")
                finally:
                    self._appending = False
