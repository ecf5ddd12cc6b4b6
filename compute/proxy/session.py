"""One client's session: two asyncio protocols back to back, and every way in which it can end.

    client ──► ClientSide ──► ServerSide.transport ──► Postgres
    client ◄── ClientSide.transport ◄── BackendStream ◄── ServerSide ◄── Postgres

Bytes from the client are passed on as they come. Bytes from Postgres go through `BackendStream`, one pass over the
message headers, and past two leases, ours and the compute's own: a chunk that arrives when one of them is not live is
not passed on. A compute whose own is over is as good as gone (compute/lease_file.py). Flow control: a
transport whose write buffer is full pauses the reading of the other one, so memory per session is bounded by the
buffers' limits.

States: WAITING (the client has said whom it wants) → RELAYING → ENDED. `end` and `cut` may be called at any time, from
anywhere.

**What waits to be sent.** `end` lets it out first. When the keys are gone nothing may leave any more, so `cut` shuts
the socket's sending side in the same step: what the kernel has not taken by then stays here. The farewell cannot
overtake what waits, since TLS numbers its records: a client that has read up to now is told why, and one that has not
is cut off without a word, which TLS lets it see.
"""

from __future__ import annotations

import asyncio
import enum
from typing import Final, cast

from compute.lease_file import ComputeLease
from compute.proxy import goodbye
from compute.proxy.backend_stream import BackendStream
from compute.proxy.cancel import CancelKeys
from compute.proxy.first_row import FirstRow
from shared.api.safekeeper import ComputeAddress
from shared.clock import SystemClock
from shared.errors import KeyAccessError
from shared.ids import ProjectId
from shared.lease import Lease
from shared.receiver import Receiver
from shared.sockets import stop_sending
from shared.telemetry import get_logger
from shared.wire.buffer import ProtocolViolationError
from shared.wire.pgproto import BackendKeyData, Terminate

_log = get_logger(__name__)

WRITE_BUFFER_HIGH_BYTES: Final = 256 * 1024
_TERMINATE: Final = Terminate().serialize()
STARTUP_BUFFER_LIMIT_BYTES: Final = 16 * 1024
"""A start-up packet has 10,000 bytes at most, and a client that has sent one waits for the answer."""


def as_stream(transport: asyncio.BaseTransport) -> asyncio.Transport:
    """For the type checker: uvloop's transports have asyncio's methods, but not its classes."""
    return cast("asyncio.Transport", transport)


class Phase(enum.Enum):
    STARTUP = "startup"
    WAITING = "waiting"
    RELAYING = "relaying"
    ENDED = "ended"


class ServerSide(Receiver):
    """The compute's end."""

    def __init__(self, session: ClientSide) -> None:
        self._session = session
        self.transport: asyncio.Transport | None = None
        self._words: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._heard = False  # `words` were taken, and nothing is read until more are wanted
        self._relaying = False
        self.stream = BackendStream()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = as_stream(transport)
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_HIGH_BYTES)

    def data_received(self, data: bytes) -> None:
        if self._relaying:
            self._session.from_server(self, data)
        elif not self._words.done():
            # What Postgres says first decides whether we stay with this compute.
            self._words.set_result(data)
            assert self.transport is not None  # noqa: S101 - connected
            self.transport.pause_reading()

    async def words(self) -> bytes:
        """Before `begin`, which must be called for the rest to come: the next chunk; empty when the connection ends
        without one."""
        if self._heard:
            if self.transport is None:
                return b""
            self._heard, self._words = False, asyncio.get_running_loop().create_future()
            self.transport.resume_reading()
        words = await self._words
        self._heard = True
        return words

    def send(self, data: bytes) -> None:
        """Before `begin`."""
        if self.transport is not None:
            self.transport.write(data)

    def begin(self) -> None:
        self._relaying = True
        if self.transport is not None:
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        self._session.pause_reading()

    def resume_writing(self) -> None:
        self._session.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if not self._words.done():
            self._words.set_result(b"")
        elif self._relaying:
            self._session.server_lost(self)

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class ClientSide(Receiver):
    """The client's end, and the session."""

    def __init__(self, cancel_keys: CancelKeys) -> None:
        loop = asyncio.get_running_loop()
        self.phase = Phase.STARTUP
        self.transport: asyncio.Transport | None = None
        self._cancel_keys = cancel_keys
        self._buffer = bytearray()
        self._arrived = asyncio.Event()
        self._server: ServerSide | None = None
        self._lease: Lease | None = None
        self._compute_lease: ComputeLease | None = None
        self._compute: ComputeAddress | None = None
        self._key_data: BackendKeyData | None = None
        self._server_gone: asyncio.Future[None] = loop.create_future()
        self._closed: asyncio.Future[None] = loop.create_future()
        self.logged_in: asyncio.Future[None] = loop.create_future()
        """Done when the client may send queries, or will never."""
        self._last_bytes = b""  # that the client sent
        self._asked = False  # it sent something that Postgres has not answered with a ReadyForQuery
        self._draining = False
        self._first_row: FirstRow | None = None
        self.commit_in_doubt = False

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = as_stream(transport)
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_HIGH_BYTES)

    def data_received(self, data: bytes) -> None:
        if self.phase is Phase.RELAYING:
            server = self._server
            if server is not None and server.transport is not None:
                server.transport.write(data)
                self._last_bytes = data[-len(_TERMINATE) :]
                self._asked = True
                if self._first_row is not None:
                    self._first_row.asked()
        elif self.phase is not Phase.ENDED:
            self._buffer += data
            self._arrived.set()
            if len(self._buffer) > STARTUP_BUFFER_LIMIT_BYTES:
                self.abort()

    def pause_writing(self) -> None:
        if self._server is not None and self._server.transport is not None:
            self._server.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._server is not None and self._server.transport is not None:
            self._server.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.phase = Phase.ENDED
        self.transport = None
        self._arrived.set()
        self._drop_server()
        self._finish(self._closed)

    # --- start-up ---

    async def read_exactly(self, size_bytes: int) -> bytes | None:
        """The next bytes of the start-up phase; None when the client is gone."""
        while len(self._buffer) < size_bytes:
            if self.transport is None:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        data = bytes(self._buffer[:size_bytes])
        del self._buffer[:size_bytes]
        return data

    def answer(self, data: bytes) -> None:
        """Say something to it before there is a compute."""
        if self.phase is Phase.WAITING and self.transport is not None:
            self.transport.write(data)

    def wait_for_compute(self) -> None:
        """The start-up packet is complete. Whoever sends more before an answer breaks the protocol."""
        if self.phase is Phase.STARTUP:
            self.phase = Phase.WAITING

    @property
    def broke_protocol(self) -> bool:
        return bool(self._buffer)

    def begin(
        self,
        server: ServerSide,
        first_words: bytes,
        compute: ComputeAddress,
        lease: Lease,
        first_row: FirstRow | None = None,
    ) -> None:
        """Relay from now on, for as long as the lease is live. `first_row`: to be timed."""
        if self.phase is not Phase.WAITING:
            server.abort()
            return
        self.phase = Phase.RELAYING
        self._server, self._compute, self._lease, self._first_row = server, compute, lease, first_row
        self._compute_lease = ComputeLease(compute, SystemClock())
        if self._buffer and server.transport is not None:
            server.transport.write(bytes(self._buffer))
            self._buffer.clear()
        self.from_server(server, first_words)
        server.begin()

    # --- relay ---

    def from_server(self, server: ServerSide, data: bytes) -> None:
        transport, lease, compute_lease = self.transport, self._lease, self._compute_lease
        if self.phase is not Phase.RELAYING or transport is None or lease is None or compute_lease is None:
            return
        if not lease.live:
            self.cut(lease.error())
            return
        if not compute_lease.live:
            self._compute_lease = None  # it does not come back for what follows the chunk that is dropped here
            server.abort()
            self._finish(self._server_gone)
            return
        stream = server.stream
        begins_whole = stream.at_boundary
        try:
            passed = stream.feed(data)
        except ProtocolViolationError:
            self.end(goodbye.broken_backend())
            return
        if passed.data:
            transport.write(passed.data)
        if passed.key_data is not None:
            self._give_key(transport, passed.key_data, lease.project_id)
            if passed.after_key_data:
                transport.write(passed.after_key_data)
        if passed.cancelled_wait:
            self.commit_in_doubt = True
            self.end(passed.cancelled_wait + goodbye.commit_in_doubt())
            return
        if stream.logged_in and not self.logged_in.done():
            self.logged_in.set_result(None)
            if self._first_row is not None:
                self._first_row.logged_in()
        elif self._first_row is not None and begins_whole and self._first_row.answered(passed.data, ready=stream.ready):
            self._first_row = None
        if stream.idle:
            self._asked = False
            if self._draining:
                self.end(goodbye.proxy_stops_idle())

    def _give_key(self, transport: asyncio.Transport, backend: BackendKeyData, project_id: ProjectId) -> None:
        assert self._compute is not None  # noqa: S101 - relaying
        self._key_data = self._cancel_keys.issue(project_id, self._compute, backend)
        transport.write(self._key_data.serialize())

    def server_lost(self, server: ServerSide) -> None:
        """Postgres closed the connection."""
        if self.phase is not Phase.RELAYING:
            return
        if server.stream.said_goodbye or self._last_bytes == _TERMINATE:
            self.end(b"")  # it has said why, or it was asked to
        else:
            self._finish(self._server_gone)

    async def wait_logged_in(self) -> None:
        """Returns when it is, or when there is no Postgres any more that could log it in."""
        await asyncio.wait((self.logged_in, self._server_gone), return_when=asyncio.FIRST_COMPLETED)

    async def wait_server_gone(self) -> None:
        """Returns when the compute went away without a word, or never."""
        await asyncio.shield(self._server_gone)

    def pause_reading(self) -> None:
        if self.transport is not None:
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self.transport is not None:
            self.transport.resume_reading()

    # --- end ---

    def drain(self) -> None:
        """The proxy goes: end when nothing is under way, which may be now.

        A client that has sent several statements ahead may be ended between two of them, as by a shutdown of Postgres.
        """
        self._draining = True
        if self.phase is Phase.WAITING:
            self.end(goodbye.proxy_takes_no_more())
        elif self._server is not None and not self._under_way:
            self.end(goodbye.proxy_stops_idle())

    @property
    def _under_way(self) -> bool:
        """Is Postgres at work for the client, or in a transaction of its?"""
        return self._server is not None and (self._asked or not self._server.stream.idle)

    def end(self, farewell: bytes) -> None:
        """Say `farewell`, if it can still be understood, and close. Idempotent: the first one counts."""
        if self.phase is Phase.ENDED:
            return
        server = self._server
        self.phase = Phase.ENDED
        transport = self.transport
        if transport is not None:
            if server is None or server.stream.at_boundary:
                transport.write(farewell)
            transport.close()
        self._drop_server()

    def cut(self, error: KeyAccessError) -> None:
        """The keys are gone: nothing leaves when this returns, of a session that is closing already, too. The client is
        told `error` if nothing waits to be sent before it. Idempotent."""
        self.end(goodbye.of_error(error, under_way=self._under_way and self.logged_in.done()))
        if self.transport is not None:
            stop_sending(self.transport)

    def abort(self) -> None:
        self.phase = Phase.ENDED
        if self.transport is not None:
            self.transport.abort()
        self._drop_server()

    async def wait_closed(self) -> None:
        await asyncio.shield(self._closed)

    def _drop_server(self) -> None:
        if self._server is not None:
            self._server.abort()
        if self._key_data is not None:
            self._cancel_keys.forget(self._key_data)
            self._key_data = None
        self._finish(self.logged_in)

    @staticmethod
    def _finish(future: asyncio.Future[None]) -> None:
        if not future.done():
            future.set_result(None)
