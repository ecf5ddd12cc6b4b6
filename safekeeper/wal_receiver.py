"""The synchronous standby: WAL of one compute, in one term, into the log; acknowledged when it is sealed and durable.

    Postgres ──► recv ──► seal, pwrite, fdatasync ──► lease check ──► StandbyStatusUpdate          one thread per stream
                              │ flush_lsn, plaintext for those who follow the tail
                              ▼
                        event loop: subscriptions, next piece, elections

**A thread, not a task.** Every commit of the database waits for this round trip, and nothing in it is concurrent: read,
write, answer. A blocking thread does it without handing anything over; the same through the event loop and an executor
cost 110 instead of 35 µs of CPU per commit (benchmarks/safekeeper_commit.py). What comes in during a fdatasync waits in
the socket and becomes the next frame (group commit), so backlog is bounded by the kernel. Everything that is not an
append to the piece at hand (a new piece, a full disk) goes through the loop, where the store lives.

No replication slot is used: the compute keeps its WAL (`wal_keep_size`), and a slot would be gone with its disk anyway.

While the pageserver lags, acknowledgements are held back (backpressure.py): what is durable is then more than what is
acknowledged.

Invariant: whoever appends or acknowledges holds the gate. `stop` closes the gate for good, so when it has returned,
nothing is being appended and nothing will be acknowledged any more. That is what a vote waits for.

Which errors end what: a lost connection, a refused login, a gap: reconnect, from flush_lsn, with backoff. A full disk,
or a keymanager that is away when a new piece is due: wait and try again, unacknowledged. No live lease, a damaged log,
a compute of another database: the stream ends for good (`failure`), until somebody sends a new StreamFrom.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from safekeeper.backpressure import Backpressure
from safekeeper.piece_keys import ProjectKeys
from safekeeper.replication_connection import PG_TIMELINE, ReplicationConnection
from safekeeper.wal_store import WalStore
from shared.api.safekeeper import StreamFrom
from shared.errors import ConflictError, IntegrityError, KeyAccessError, KeylakeError, UnavailableError
from shared.failpoints import failpoint
from shared.lsn import Lsn
from shared.telemetry import get_logger

_HELD_BACK_PACE_S: Final = 0.02
"""How often acknowledgements that are held back are looked at: the pageserver reports each 50 ms."""
_log = get_logger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ReceiverTuning:
    connect_timeout_s: float = 5.0
    """For each step of connecting and logging in."""
    first_delay_s: float = 0.05
    max_delay_s: float = 2.0
    retry_append_s: float = 0.5
    """Between two attempts while the disk is full."""
    idle_timeout_s: float = 20.0
    """After this long without a byte we ask for one; after as long again the connection is given up."""


class WalReceiver:
    """One StreamFrom. `start`, then `stop` (idempotent), both on the event loop; not started twice."""

    def __init__(
        self,
        store: WalStore,
        keys: ProjectKeys,
        request: StreamFrom,
        node_id: str,
        system_identifier: int,
        tuning: ReceiverTuning,
        backpressure: Backpressure,
    ) -> None:
        self.request = request
        self.term = request.term
        self.failure: KeylakeError | None = None
        self.streaming = False
        self._store = store
        self._keys = keys
        self._node_id = node_id
        self._system_identifier = system_identifier
        self._tuning = tuning
        self._backpressure = backpressure
        self._acknowledged_lsn = 0
        self._loop = asyncio.get_running_loop()
        self._gate = threading.Lock()
        self._stopped = threading.Event()
        self._connection: ReplicationConnection | None = None
        self._log = _log.bind(timeline_id=str(store.timeline_id), term=request.term)

    def start(self) -> None:
        # A daemon: it may sit in a connect that nobody waits for any more. Outside of the gate it can do no harm.
        run = partial(contextvars.copy_context().run, self._run)  # for the log lines
        threading.Thread(target=run, name=f"wal-{self._store.timeline_id}", daemon=True).start()

    async def stop(self) -> None:
        self._stopped.set()
        self.streaming = False
        connection = self._connection
        if connection is not None:
            connection.abort()
        # Waits for at most one append, and not on the loop, which that append may need.
        if not self._gate.acquire(blocking=False):
            await asyncio.to_thread(self._gate.acquire)
        self._gate.release()

    # --- the thread ---

    def _run(self) -> None:
        delay_s = self._tuning.first_delay_s
        while not self._stopped.is_set():
            before = self._store.flush_lsn
            try:
                self._session()
            except (KeyAccessError, IntegrityError, ConflictError) as error:
                self.failure = error
                if not self._stopped.is_set():
                    self._log.warning("the WAL stream has ended", code=error.code, reason=str(error))
                return
            except KeylakeError as error:
                if not self._stopped.is_set():
                    self._log.info("the WAL stream is interrupted", code=error.code, reason=str(error))
            except Exception as error:
                self.failure = KeylakeError("the WAL receiver has failed; the log has the details")
                self._log.error("the WAL receiver has failed", exc_info=error)
                return
            finally:
                self.streaming = False
            if self._store.flush_lsn > before:
                delay_s = self._tuning.first_delay_s
            self._stopped.wait(delay_s)
            delay_s = min(2 * delay_s, self._tuning.max_delay_s)

    def _session(self) -> None:
        """One connection, from login to its end. Raises what ended it."""
        self._on_loop(self._store.prepare(self.term))
        connection = ReplicationConnection.connect(self.request.compute, self._tuning.connect_timeout_s)
        self._connection = connection
        try:
            if self._stopped.is_set():
                return
            connection.log_in(self.request.user, self.request.password.get_secret_value(), self._node_id)
            system = connection.identify_system()
            if (system.system_identifier, system.pg_timeline) != (self._system_identifier, PG_TIMELINE):
                raise ConflictError("the compute is of another database system or WAL timeline")
            lsn = self._store.flush_lsn
            connection.start(lsn, self._tuning.idle_timeout_s)
            self._acknowledge(connection)
            self.streaming = not self._stopped.is_set()
            self._log.info("streaming WAL", lsn=str(Lsn(lsn)))
            self._receive(connection)
        finally:
            self._connection = None
            connection.close()

    def _receive(self, connection: ReplicationConnection) -> None:
        """The loop that every commit goes through. Raises UnavailableError when the stream ends."""
        asked = False
        while True:
            while self._acknowledged_lsn < self._store.flush_lsn and not connection.wait_readable(_HELD_BACK_PACE_S):
                self._release(connection)
            received = connection.receive()
            if received is None:
                if asked:
                    raise UnavailableError("the compute has fallen silent")
                asked = True
                self._acknowledge(connection, reply_requested=True)
                continue
            asked = False
            if received.data:
                self._take(connection, received.data)
            elif received.reply_requested:
                self._acknowledge(connection)
            if received.ended:
                raise UnavailableError("the compute ended the stream")

    def _acknowledge(self, connection: ReplicationConnection, *, reply_requested: bool = False) -> None:
        with self._gate:
            self._check_not_stopped()
            # Invariant: no acknowledgement without a lease that is live now. (Whoever is stopped between this line and
            # the next makes one: docs/honesty.md.)
            self._keys.check()
            connection.send_status(self._acknowledgeable(), reply_requested=reply_requested)

    def _acknowledgeable(self) -> int:
        """What is durable, as far as the pageserver keeps up. Never less than before."""
        allowed = self._backpressure.allowed_lsn(self._store.flush_lsn)
        self._acknowledged_lsn = max(self._acknowledged_lsn, allowed)
        return self._acknowledged_lsn

    def _release(self, connection: ReplicationConnection) -> None:
        """Acknowledge what was held back, if more of it may be by now."""
        before = self._acknowledged_lsn
        with self._gate:
            self._check_not_stopped()
            if self._acknowledgeable() > before:
                self._keys.check()
                connection.send_status(self._acknowledged_lsn)

    def _take(self, connection: ReplicationConnection, data: bytearray) -> None:
        """Make `data` durable and acknowledge it, trying again while the environment says "not now".

        Raises KeyAccessError, IntegrityError, UnavailableError when stopped or when the connection is lost.
        """
        store, waiting = self._store, False
        lsn = store.flush_lsn
        while True:
            with self._gate:
                self._check_not_stopped()
                try:
                    if not store.append_here(self.term, lsn, data):
                        self._on_loop(store.append(self.term, lsn, [data]))
                except UnavailableError as error:
                    if not waiting:
                        self._log.warning("WAL is not acknowledged", code=error.code, reason=str(error))
                    waiting = True
                else:
                    self._keys.check()
                    failpoint("acknowledge-before-send")
                    connection.send_status(self._acknowledgeable())
                    failpoint("acknowledge-sent")
                    return
            if store.flush_lsn > lsn:  # a part of it went into the old segment
                data = data[store.flush_lsn - lsn :]
                lsn = store.flush_lsn
            self._stopped.wait(self._tuning.retry_append_s)

    def _check_not_stopped(self) -> None:
        if self._stopped.is_set():
            raise UnavailableError("the stream was stopped")

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
