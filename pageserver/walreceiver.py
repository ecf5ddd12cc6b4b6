"""Committed WAL from the safekeepers, in order, into ingest.

Every safekeeper is connected to for its STATUS; one of them, the *source*, also sends the bytes. Bytes wait in a
bounded buffer until a quorum holds them (pageserver/quorum.py) and only then reach the decoder: nothing that is
ingested is ever taken back. When the source goes away, or votes, its connection ends, what was not committed is
forgotten, and another one is asked from the position after the last byte that the decoder has. A source that holds
less than the quorum and does not catch up (it was away, and no compute runs that would bring it up) is given up, too.

A quorum may hold half a record: a commit position in bytes says nothing of records. The next term cuts such a log at
the end of its last complete record and writes other bytes behind it. So a position is about the logs of its own term
alone, and bytes of a later term wait until a quorum holds them in that term (ADR 50); a new source is asked from the
end of the last complete record, with a decoder that has forgotten the half; and what safekeepers are told to be
committed, which no election may cut, ends with a complete record, too.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from pageserver.quorum import NOTHING_COMMITTED, committed, majority
from shared.auth import Scope, Service, TokenIssuer
from shared.config import Address
from shared.errors import CorruptedError, IntegrityError, KeylakeError, UnavailableError
from shared.failpoints import failpoint
from shared.framed_tcp import FramedConnection, connect
from shared.ids import ProjectId, TimelineId
from shared.telemetry import get_logger
from shared.wal.reader import RawRecord, WalStreamDecoder
from shared.wire.frames import ERROR, ErrorFrame, ProtocolError
from shared.wire.walstream import (
    MAX_FRAME_SIZE_BYTES,
    STATUS,
    WAL,
    Feedback,
    Status,
    Subscribe,
    SubscribeFlags,
    parse_wal,
)

MAX_BUFFER_SIZE_BYTES: Final = 32 * 1024 * 1024
_MAX_FEED_BYTES: Final = 64 * 1024
_SOURCE_CHECK_S: Final = 0.5
_REPORT_PACE_S: Final = 0.05
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Peer:
    """A safekeeper's WAL port."""

    node_id: str
    address: Address


class RolledBackError(IntegrityError):
    """The object store shows an older timeline than it was given."""


IngestRecords = Callable[[Sequence[RawRecord]], Awaitable[None]]


class WalReceiver:
    """One timeline's feed. `run` works until it is cancelled or the WAL turns out to be corrupt."""

    reconnect_delay_s = 0.2
    """Before a safekeeper that was not to be had is asked again; longer after each failure."""

    def __init__(
        self,
        project_id: ProjectId,
        timeline_id: TimelineId,
        peers: Sequence[Peer],
        issuer: TokenIssuer,
        context: ssl.SSLContext,
        decoder: WalStreamDecoder,
        ingest: IngestRecords,
        remote_consistent_lsn: Callable[[], int],
    ) -> None:
        self._project_id = project_id
        self._timeline_id = timeline_id
        self._peers = peers
        self._issuer = issuer
        self._context = context
        self._decoder = decoder
        self._ingest = ingest
        self._remote_consistent_lsn = remote_consistent_lsn
        self._statuses: dict[str, Status] = {}
        self._connections: dict[str, FramedConnection] = {}
        self._source: str | None = None
        self._avoid: str | None = None
        """The source that was given up last: not the next one."""
        self._buffer: deque[tuple[int, memoryview]] = deque()
        self._buffered_bytes = 0
        self._changed = asyncio.Event()
        self._drained = asyncio.Event()
        self._fed = asyncio.Event()
        self._committed = NOTHING_COMMITTED

    @property
    def commit_lsn(self) -> int:
        """What a quorum is known to hold. Goes back only with a new term, by half a record."""
        return self._committed.lsn

    async def run(self) -> None:
        """Raises CorruptedError when committed WAL cannot be decoded, RolledBackError when a safekeeper was told that
        more is durable than is there, or whatever `ingest` raises."""
        async with asyncio.TaskGroup() as group:
            for peer in self._peers:
                group.create_task(self._follow(peer))
            group.create_task(self._feed())
            group.create_task(self._report())
            group.create_task(self._watch_source())

    async def _watch_source(self) -> None:
        """Give a source up that has sent all it has for a while, although a quorum has more."""
        stuck_at: tuple[str, int] | None = None
        while True:
            await asyncio.sleep(_SOURCE_CHECK_S)
            source = self._source
            status = None if source is None else self._statuses.get(source)
            if source is None:
                self._avoid = None  # nobody else could be had either
            if source is None or status is None or not self._is_behind(status):
                stuck_at = None
            elif stuck_at == (source, status.flush_lsn):
                _log.info("safekeeper is behind the quorum, another one is asked", peer=source)
                self._avoid, stuck_at = source, None
                self._drained.set()  # its session may not be reading, and would not see that its connection is gone
                if (connection := self._connections.get(source)) is not None:
                    connection.abort()
            else:
                stuck_at = source, status.flush_lsn

    def _is_behind(self, status: Status) -> bool:
        """Does a quorum have more than this source can give?"""
        if not self._committed.is_agreed_by(status):
            # Its bytes behind the last complete record are not those that are committed.
            return self._decoder.end_lsn < self.commit_lsn
        return status.flush_lsn <= self._decoder.next_lsn < self.commit_lsn

    @property
    def _feedable_lsn(self) -> int:
        """How far the source's bytes may be ingested. 0 while it is not known whether they are the committed ones."""
        status = None if self._source is None else self._statuses.get(self._source)
        return self.commit_lsn if status is not None and self._committed.is_agreed_by(status) else 0

    # --- connections ---

    async def _follow(self, peer: Peer) -> None:
        """Keep one safekeeper connected."""
        failures = 0
        while True:
            try:
                await self._session(peer)
                failures = 0
            except RolledBackError:
                raise
            except KeylakeError as error:
                failures += 1
                if failures in (1, 10, 100):
                    _log.info("safekeeper is not available", peer=peer.node_id, code=error.code, message=str(error))
            finally:
                self._lost(peer.node_id)
            await asyncio.sleep(min(self.reconnect_delay_s * failures, 2.0) or 0.01)

    async def _connect(self, peer: Peer) -> FramedConnection:
        scopes = [Scope.WAL_READ, Scope.WAL_FEEDBACK]
        token = self._issuer.issue(Service.SAFEKEEPER, scopes, project_id=self._project_id)
        return await connect(Service.SAFEKEEPER, peer.address, self._context, token, MAX_FRAME_SIZE_BYTES)

    async def _session(self, peer: Peer) -> None:
        connection = await self._connect(peer)
        try:
            is_source = self._source is None and peer.node_id != self._avoid
            if is_source:
                self._source, self._avoid = peer.node_id, None
                self._rewind()
            flags = SubscribeFlags.NONE if is_source else SubscribeFlags.STATUS_ONLY
            start = self._decoder.next_lsn
            subscribe = Subscribe(self._project_id, self._timeline_id, start, 0, flags)
            await connection.send(subscribe.pack())
            self._connections[peer.node_id] = connection
            while frames := await connection.receive():
                for kind, payload in frames:
                    if kind == STATUS:
                        await self._status(peer.node_id, Status.parse(payload))
                    elif kind == WAL and is_source:
                        await self._wal(*parse_wal(payload))
                    elif kind == ERROR:
                        raise ErrorFrame.parse(payload).exception()
                    else:
                        raise ProtocolError(f"unexpected frame type {kind:#x} from a safekeeper")
                if not is_source and self._source is None and peer.node_id != self._avoid:
                    return  # the source is gone: come back as the source
        finally:
            await connection.close()

    def _lost(self, node_id: str) -> None:
        self._statuses.pop(node_id, None)
        self._connections.pop(node_id, None)
        if self._source == node_id:
            self._source = None
            # Those who only report would not notice until their next status: make them reconnect.
            for connection in self._connections.values():
                connection.abort()

    def _rewind(self) -> None:
        """Back to the end of the last complete record: whatever came behind it may be other bytes now."""
        self._buffer.clear()
        self._buffered_bytes = 0
        self._drained.set()
        self._decoder = self._decoder.restarted()

    # --- flow ---

    async def _status(self, node_id: str, status: Status) -> None:
        # Whatever this pageserver, or one before it, has ever reported was durable by then.
        if status.remote_consistent_lsn > self._remote_consistent_lsn():
            raise RolledBackError("the object store lacks what safekeepers were told to be durable")
        self._statuses[node_id] = status
        if status.remote_consistent_lsn < min(status.flush_lsn, self._remote_consistent_lsn()):
            self._fed.set()  # it has not heard yet
        if node_id == self._source:
            self._changed.set()  # it may be in a newer term now
        now = committed(self._statuses.values(), majority(len(self._peers)))
        if now > self._committed:
            self._committed = now
            self._changed.set()

    async def _wal(self, lsn: int, data: memoryview) -> None:
        """Buffer bytes of the source, and stop reading from it while the buffer is full.

        While it is not read, neither its next status nor its end is seen. If it has died or voted meanwhile, and a
        quorum goes on without it, nothing in the buffer becomes feedable any more; then it is given up.
        """
        expected = self._buffer[-1][0] + len(self._buffer[-1][1]) if self._buffer else self._decoder.next_lsn
        if lsn != expected:
            raise ProtocolError("WAL from a safekeeper is not contiguous")
        self._buffer.append((lsn, data))
        self._buffered_bytes += len(data)
        self._changed.set()
        while self._buffered_bytes > MAX_BUFFER_SIZE_BYTES:
            self._drained.clear()
            await self._drained.wait()
            if self._source == self._avoid:
                raise UnavailableError("the source was given up")

    async def _feed(self) -> None:
        """Decode and ingest what is committed. Hands the loop back between slices, so that reads are served
        meanwhile."""
        while True:
            self._changed.clear()
            while self._buffer and self._buffer[0][0] < (limit := self._feedable_lsn):
                lsn, data = self._buffer.popleft()
                size = min(len(data), limit - lsn, _MAX_FEED_BYTES)
                if size < len(data):
                    self._buffer.appendleft((lsn + size, data[size:]))
                self._buffered_bytes -= size
                records = self._decoder.feed(lsn, bytes(data[:size]))
                if self._decoder.next_lsn != lsn + size:
                    raise CorruptedError("committed WAL holds zeros where a record should start")
                if records:
                    await self._ingest(records)
                self._drained.set()
                self._fed.set()
                await asyncio.sleep(0)
            self._fed.set()
            await self._changed.wait()

    async def _report(self) -> None:
        """Tell the safekeepers what is committed and what is stored. Nobody waits for it, so not for every commit."""
        while True:
            await self._fed.wait()
            self._fed.clear()
            self._send_feedback()
            await asyncio.sleep(_REPORT_PACE_S)

    def _send_feedback(self) -> None:
        """What is committed, only to those whose log it is: another one's position would mean other bytes. What is in
        layers, to all: they may have to trim before a term can begin (ADR 40)."""
        stored_lsn = self._remote_consistent_lsn()
        complete = min(self.commit_lsn, self._decoder.end_lsn)
        # What is decoded is ingested, but for the slice at hand. Safekeepers hold commits back that run away from it.
        feedback = Feedback(complete, stored_lsn, self._decoder.end_lsn).pack()
        stored = Feedback(0, stored_lsn, 0).pack()
        failpoint("feedback-before-send")
        for node_id, connection in self._connections.items():
            status = self._statuses.get(node_id)
            if status is not None:
                connection.write(feedback if self._committed.is_agreed_by(status) else stored)
        failpoint("feedback-sent")
