"""Serves the log by LSN to the pageserver and to peers: shared.wire.walstream over the WAL port.

One subscription per connection, two tasks each: one sends, one reads FEEDBACK. What follows the tail comes out of the
store's cache without decryption; what is older is decrypted on the way. The lease is checked by `WalStore.read`, after
decrypting; a subscription that was ended sends nothing more, and `abort` also takes back what the socket has not taken.

**Paced.** The first news is sent at once, what follows within PACE_S is sent together. Nobody waits for these bytes: a
commit is acknowledged by the stream's own thread, and the pageserver is read from at LSNs of the past. One message per
commit cost more CPU, on both sides, than sealing it and making it durable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from shared.auth import Principal, Scope
from shared.errors import ConflictError, InvalidInputError, KeylakeError, PermissionDeniedError
from shared.framed_tcp import FramedConnection
from shared.ids import ProjectId, TimelineId
from shared.lsn import Lsn
from shared.wire.frames import ProtocolError, pack_frame
from shared.wire.walstream import END, FEEDBACK, SUBSCRIBE, Feedback, Status, Subscribe, SubscribeFlags, pack_wal

WAL_SCOPE: Final = Scope.WAL_READ
"""Of everything on this port."""
FEEDBACK_SCOPE: Final = Scope.WAL_FEEDBACK
"""Of FEEDBACK, too. Whoever only reads the log says nothing about it: by a commit_lsn that is not true an election is
refused, and a compute is one of those that read."""
CHUNK_SIZE_BYTES: Final = 512 * 1024
PACE_S: Final = 0.05
"""Shortest time between two messages to one that follows the tail."""


class Log(Protocol):
    """What a subscription needs of a timeline."""

    awaiting: int
    """So many subscriptions have sent all there was and not heard of more: whoever appends has them woken. Changed on
    the event loop, read from any thread."""

    @property
    def start_lsn(self) -> int: ...

    @property
    def flush_lsn(self) -> int: ...

    def wire_status(self) -> Status: ...

    async def read(self, lsn: int, max_size_bytes: int) -> bytes: ...

    def feedback(self, feedback: Feedback) -> None: ...

    def subscribe(self, subscription: Subscription) -> None: ...

    def unsubscribe(self, subscription: Subscription) -> None: ...


FindLog = Callable[[ProjectId, TimelineId], Awaitable[Log]]


class Subscription:
    """One client of one timeline. Made, and run, by `serve`."""

    def __init__(
        self, log: Log, request: Subscribe, connection: FramedConnection, *, takes_feedback: bool = False
    ) -> None:
        self._log = log
        self._request = request
        self._connection = connection
        self._takes_feedback = takes_feedback
        self._changed = asyncio.Event()
        self._ended: KeylakeError | None = None
        self.finished = asyncio.Event()
        """`run` is over, and nothing refers to what it was sending."""

    def wake(self) -> None:
        """The log or its status has changed."""
        self._changed.set()

    def end(self, error: KeylakeError) -> None:
        """Send nothing more of the log; tell the client why and close."""
        self._ended = self._ended or error
        self._changed.set()

    def abort(self, error: KeylakeError) -> None:
        """As `end`, but at once, taking back what was not sent yet: plaintext must not leave any more."""
        self.end(error)
        self._connection.abort()

    async def run(self) -> None:
        """Returns when the range was sent or the client left. Raises what ended it otherwise."""
        self._log.subscribe(self)
        sending = asyncio.create_task(self._send())
        listening = asyncio.create_task(self._listen())
        try:
            await asyncio.wait({sending, listening}, return_when=asyncio.FIRST_COMPLETED)
            for task in (sending, listening):
                if task.done() and (error := task.exception()) is not None:
                    # Without its traceback: the frames in there hold the WAL that was being sent.
                    raise error.with_traceback(None)
        finally:
            for task in (sending, listening):
                task.cancel()
            await asyncio.gather(sending, listening, return_exceptions=True)
            self._log.unsubscribe(self)  # not before: whoever drops plaintext has to wait for us
            self.finished.set()

    async def _listen(self) -> None:
        while frames := await self._connection.receive():
            for kind, payload in frames:
                if kind != FEEDBACK:
                    raise ProtocolError(f"unexpected frame type {kind:#x} on a WAL subscription")
                feedback = Feedback.parse(payload)
                if not self._takes_feedback:
                    raise PermissionDeniedError(f"this token lacks the scope {FEEDBACK_SCOPE}")
                self._log.feedback(feedback)

    async def _send(self) -> None:
        log, connection = self._log, self._connection
        position, end = self._request.start, self._request.end
        wants_wal = not self._request.flags & SubscribeFlags.STATUS_ONLY
        told: Status | None = None
        while True:
            self._changed.clear()
            frames = []
            status = log.wire_status()
            if status != told:
                frames.append(status.pack())
                told = status
            if wants_wal:
                limit = min(end, status.flush_lsn) if end else status.flush_lsn
                if position < limit:
                    data = await log.read(position, min(CHUNK_SIZE_BYTES, limit - position))
                    frames.append(pack_wal(position, data))
                    position += len(data)
                if end and position >= end:
                    frames.append(pack_frame(END))
            if self._ended is not None:
                raise self._ended
            if frames:
                await connection.send(b"".join(frames))
            if wants_wal and end and position >= end:
                return
            if not wants_wal or position >= status.flush_lsn:
                await self._wait_for_more(status.flush_lsn)

    async def _wait_for_more(self, told_flush_lsn: int) -> None:
        await asyncio.sleep(PACE_S)
        # Invariant: announced before it is looked at, so that an append after the look finds somebody to wake.
        self._log.awaiting += 1
        try:
            if self._log.flush_lsn == told_flush_lsn:
                await self._changed.wait()
        finally:
            self._log.awaiting -= 1


async def serve(connection: FramedConnection, principal: Principal, find: FindLog) -> None:
    """Handler of one connection to the WAL port. Raises KeylakeError, which the client gets as an ERROR frame."""
    first = await connection.receive_one()
    if first is None:
        return
    kind, payload = first
    if kind != SUBSCRIBE:
        raise ProtocolError("the first frame must be SUBSCRIBE")
    request = Subscribe.parse(payload)
    principal.require(WAL_SCOPE, request.project_id)
    log = await find(request.project_id, request.timeline_id)
    await serve_log(connection, log, request, takes_feedback=FEEDBACK_SCOPE in principal.scopes)


async def serve_log(connection: FramedConnection, log: Log, request: Subscribe, *, takes_feedback: bool) -> None:
    """Raises KeylakeError."""
    wants_wal = not request.flags & SubscribeFlags.STATUS_ONLY
    if wants_wal and request.start < log.start_lsn:
        # A peer that lacks what was trimmed learns where to go on.
        await connection.send(log.wire_status().pack())
        raise InvalidInputError(f"the log begins at {Lsn(log.start_lsn)}")
    if request.end and request.end < request.start:
        raise InvalidInputError("the timeline has no such range of WAL")
    await Subscription(log, request, connection, takes_feedback=takes_feedback).run()


ENDED_BY_ELECTION: Final = "the safekeeper's term has changed: subscribe again"


def ended_by_election() -> ConflictError:
    return ConflictError(ENDED_BY_ELECTION)
