"""GetPage@LSN and basebackup over TCP (shared/wire/pagestream.py), pipelined.

Requests of one connection run side by side, up to MAX_REQUESTS_IN_FLIGHT; then the connection is not read any further.
Answers leave one after the other, each under a lease that is live at that moment: of a client that reads slowly, one
answer and the buffers of the transport (`shared.framed_tcp`) wait to be sent, and when the lease is lost that is
dropped with the connection (readers.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram

from pageserver.basebackup import basebackup, relation_sizes
from pageserver.native import PAGE_SIZE_BYTES
from pageserver.timeline import Timeline
from shared.auth import Principal, Scope
from shared.errors import KeyAccessError, KeylakeError, NotFoundError, UnavailableError
from shared.failpoints import failpoint
from shared.framed_tcp import FramedConnection
from shared.ids import ProjectId, TimelineId
from shared.lsn import Lsn
from shared.telemetry import get_logger
from shared.wire.frames import ErrorFrame, ProtocolError
from shared.wire.pagestream import (
    BASEBACKUP_KINDS,
    GET_PAGE,
    GET_PAGES,
    MAX_RELATIONS_PER_FRAME,
    NO_SUCH_FORK,
    OPEN,
    REL_SIZE,
    RELATIONS,
    BasebackupRequest,
    BlockRequest,
    BlocksRequest,
    Open,
    StartAs,
    pack_basebackup_end,
    pack_chunk,
    pack_page,
    pack_pages,
    pack_relation_sizes,
    pack_size,
)

PAGES_SCOPE: Final = Scope.STORAGE_READ
"""Of everything on this port."""
MAX_REQUESTS_IN_FLIGHT: Final = 128
_CHUNK_SIZE_BYTES: Final = 256 * 1024
_BASEBACKUPS: Final = {kind: what for what, kind in BASEBACKUP_KINDS.items()}
_log = get_logger(__name__)


class PageService:
    """The handler of one listening port. `find` waits for a timeline that is being loaded, for so many seconds; it
    raises NotFoundError, or KeyAccessError for a sealed project."""

    def __init__(
        self,
        find: Callable[[ProjectId, TimelineId, float], Awaitable[Timeline]],
        registry: CollectorRegistry,
        wait_lsn_timeout_s: float = 30.0,
    ) -> None:
        self._find = find
        self._wait_lsn_timeout_s = wait_lsn_timeout_s
        self._latency = Histogram(
            "keylake_pageserver_getpage_duration_seconds",
            "Time from request to answer of GetPage@LSN",
            registry=registry,
            buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1, 10),
        )
        self.pages_served = 0
        """Since the start, those in basebackups among them."""
        self._failures = Counter(
            "keylake_pageserver_getpage_failures", "GetPage@LSN answered with an error", ["code"], registry=registry
        )

    async def serve(self, connection: FramedConnection, principal: Principal) -> None:
        """One connection, from OPEN to its end."""
        frame = await connection.receive_one()
        if frame is None:
            return
        if frame[0] != OPEN:
            raise ProtocolError("the first request must be OPEN")
        opened = Open.parse(frame[1])
        principal.require(PAGES_SCOPE, opened.project_id)
        timeline = await self._find(opened.project_id, opened.timeline_id, self._wait_lsn_timeout_s)
        slots = asyncio.Semaphore(MAX_REQUESTS_IN_FLIGHT)

        def abort(error: KeyAccessError) -> None:
            connection.abort(ErrorFrame.of(0, error).pack())

        with timeline.readers.reading(abort):
            try:
                async with asyncio.TaskGroup() as group:
                    while frames := await connection.receive():
                        for kind, payload in frames:
                            await slots.acquire()
                            task = group.create_task(self._answer(connection, timeline, kind, payload))
                            task.add_done_callback(lambda _: slots.release())
            except ExceptionGroup as errors:
                # The reading loop's own: requests answer with theirs.
                raise errors.exceptions[0] from None

    async def _answer(self, connection: FramedConnection, timeline: Timeline, kind: int, payload: bytes) -> None:
        request_id = int.from_bytes(payload[:4], "big")
        try:
            if kind == GET_PAGE:
                await self._get_page(connection, timeline, BlockRequest.parse(payload))
            elif kind == REL_SIZE:
                await self._rel_size(connection, timeline, BlockRequest.parse(payload))
            elif kind == GET_PAGES:
                await self._get_pages(connection, timeline, BlocksRequest.parse(payload))
            elif kind == RELATIONS:
                await self._relations(connection, timeline, BasebackupRequest.parse(payload))
            elif kind in _BASEBACKUPS:
                start_as, bare = _BASEBACKUPS[kind]
                request = BasebackupRequest.parse(payload)
                await self._basebackup(connection, timeline, request, start_as, bare=bare)
            else:
                raise ProtocolError(f"unknown request type {kind:#x}")
        except KeylakeError as error:
            self._failures.labels(error.code).inc()
            # A connection that is gone ends the reading loop by itself.
            with contextlib.suppress(UnavailableError):
                await connection.send(ErrorFrame.of(request_id, error).pack())

    async def _get_page(self, connection: FramedConnection, timeline: Timeline, request: BlockRequest) -> None:
        started = perf_counter()
        await timeline.wait_lsn(request.lsn, self._wait_lsn_timeout_s)
        # Values of a block outlive its fork's truncation and drop: whether it exists, the size says.
        blocks = await timeline.rel_size(request.rel, request.lsn)
        if blocks is None or request.block >= blocks:
            raise NotFoundError(f"block {request.block} does not exist at {Lsn(request.lsn)}")
        page = await timeline.get_page(request.rel, request.block, request.lsn)
        await self._send_pages(connection, timeline, pack_page(request.request_id, page), 1, started)

    async def _get_pages(self, connection: FramedConnection, timeline: Timeline, request: BlocksRequest) -> None:
        started = perf_counter()
        await timeline.wait_lsn(request.lsn, self._wait_lsn_timeout_s)
        blocks = await timeline.rel_size(request.rel, request.lsn)
        if blocks is None or request.block + request.count > blocks:
            raise NotFoundError(f"not all of the blocks exist at {Lsn(request.lsn)}")
        pages = await timeline.get_pages(request.rel, range(request.block, request.block + request.count), request.lsn)
        await self._send_pages(connection, timeline, pack_pages(request.request_id, pages), len(pages), started)

    async def _send_pages(
        self, connection: FramedConnection, timeline: Timeline, frame: bytes, pages: int, started: float
    ) -> None:
        failpoint("page-before-send")
        await connection.send(frame, timeline.check_lease)
        failpoint("page-sent")
        self.pages_served += pages
        self._latency.observe(perf_counter() - started)

    async def _relations(self, connection: FramedConnection, timeline: Timeline, request: BasebackupRequest) -> None:
        await timeline.wait_lsn(request.lsn, self._wait_lsn_timeout_s)
        sizes = await relation_sizes(timeline, request.lsn)
        for start in range(0, len(sizes), MAX_RELATIONS_PER_FRAME):
            some = sizes[start : start + MAX_RELATIONS_PER_FRAME]
            await connection.send(pack_relation_sizes(request.request_id, some), timeline.check_lease)
        await connection.send(pack_relation_sizes(request.request_id, []))

    async def _rel_size(self, connection: FramedConnection, timeline: Timeline, request: BlockRequest) -> None:
        await timeline.wait_lsn(request.lsn, self._wait_lsn_timeout_s)
        blocks = await timeline.rel_size(request.rel, request.lsn)
        size = pack_size(request.request_id, NO_SUCH_FORK if blocks is None else blocks)
        await connection.send(size, timeline.check_lease)

    async def _basebackup(
        self,
        connection: FramedConnection,
        timeline: Timeline,
        request: BasebackupRequest,
        start_as: StartAs,
        *,
        bare: bool,
    ) -> None:
        started = perf_counter()
        await timeline.wait_lsn(request.lsn, self._wait_lsn_timeout_s)
        size = 0
        with timeline.held(request.lsn):  # or the GC cutoff might overtake a slow client
            async for piece in basebackup(timeline, request.lsn, start_as, bare=bare):
                for start in range(0, len(piece), _CHUNK_SIZE_BYTES):
                    chunk = memoryview(piece)[start : start + _CHUNK_SIZE_BYTES]
                    # Invariant: the pages in it were read under a live lease; it may have ended while the client was
                    # slow.
                    failpoint("basebackup-before-send")
                    await connection.send(pack_chunk(request.request_id, chunk), timeline.check_lease)
                size += len(piece)
        await connection.send(pack_basebackup_end(request.request_id, size))
        failpoint("basebackup-sent")
        self.pages_served += size // PAGE_SIZE_BYTES
        _log.info(
            "basebackup sent",
            timeline_id=str(timeline.timeline_id),
            lsn=str(Lsn(request.lsn)),
            size_bytes=size,
            seconds=round(perf_counter() - started, 3),
        )
