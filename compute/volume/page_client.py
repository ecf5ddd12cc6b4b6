"""Blocks of relations at one LSN, from the pageserver: pipelined, in batches, some ahead of being asked for.

One connection, made anew when it is lost; requests that had no answer are sent again, which is safe, because what they
ask for never changes. A request that stays without an answer for `timeout_s` fails.

Pages that were fetched ahead wait here, in the clear, until they are asked for: MAX_AHEAD_PAGES at most, oldest out.
They come and go in batches: one that has a page left holds them all. What could not be fetched ahead says nothing about
what can be fetched now, so it is asked for again when it is wanted.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from shared.errors import KeylakeError, UnavailableError
from shared.framed_tcp import FramedConnection
from shared.keyspace import RelTag
from shared.lsn import Lsn
from shared.telemetry import get_logger
from shared.wire import pagestream
from shared.wire.frames import ERROR, ErrorFrame, ProtocolError

_log = get_logger(__name__)

BATCH_PAGES: Final = 32
MAX_AHEAD_PAGES: Final = 2048
"""16 MiB, of batches that are not used up."""
_MAX_AHEAD_REQUESTS: Final = 32
_MAX_REQUESTS: Final = 96
"""In flight. The pageserver takes 128 of one connection, then it stops reading."""
_RETRY_DELAY_S: Final = 0.2

Connect = Callable[[], Awaitable[FramedConnection]]
"""An authenticated connection with its timeline opened. Raises KeylakeError."""


class _Batch:
    """One request of consecutive blocks."""

    __slots__ = ("blocks", "is_ahead", "left", "rel", "task")

    def __init__(self, rel: RelTag, blocks: range, task: asyncio.Task[list[bytes]], *, is_ahead: bool) -> None:
        self.rel = rel
        self.blocks = blocks
        self.task = task
        self.is_ahead = is_ahead
        self.left = len(blocks)
        """That nobody has asked for."""


class PageClient:
    """Implements `PageSource`. `close` it."""

    def __init__(self, connect: Connect, lsn: Lsn, timeout_s: float) -> None:
        self._connect = connect
        self._lsn = lsn
        self._timeout_s = timeout_s
        self._connection: _Pipeline | None = None
        self._connecting = asyncio.Lock()
        self._slots = asyncio.Semaphore(_MAX_REQUESTS)
        self._ahead: dict[tuple[RelTag, int], _Batch] = {}
        """By block that nobody has asked for yet."""
        self._batches: dict[_Batch, None] = {}
        """Those of `_ahead`, oldest first."""
        self._batches_pages = 0
        self._ahead_requests = 0
        self._fetching: set[asyncio.Task[list[bytes]]] = set()
        self.pages_fetched = 0

    async def pages(self, rel: RelTag, first_block: int, count: int) -> list[bytes]:
        """Raises KeylakeError: the pageserver's, UnavailableError when there was no answer in time."""
        runs: list[tuple[_Batch, int, int]] = []  # (batch, from, to) in blocks
        block, end = first_block, first_block + count
        while block < end:
            batch = self._take_ahead(rel, block)
            if batch is not None and runs and runs[-1][0] is batch:
                runs[-1] = (batch, runs[-1][1], block + 1)
                block += 1
            elif batch is not None:
                runs.append((batch, block, block + 1))
                block += 1
            else:
                stop = block + 1
                while stop < end and stop - block < BATCH_PAGES and (rel, stop) not in self._ahead:
                    stop += 1
                runs.append((self._batch(rel, range(block, stop)), block, stop))
                block = stop
        # All of them, even when one fails: a task whose error nobody takes would be one more in the log.
        results = await asyncio.gather(*(batch.task for batch, _, _ in runs), return_exceptions=True)
        found: list[bytes] = []
        for (batch, start, stop), result in zip(runs, results, strict=True):
            if isinstance(result, KeylakeError) and batch.is_ahead:
                found += await self._fetch(rel, start, stop - start)
            elif isinstance(result, BaseException):
                raise result
            else:
                found += result[start - batch.blocks.start : stop - batch.blocks.start]
        return found

    def prefetch(self, rel: RelTag, first_block: int, count: int) -> None:
        for start in range(first_block, first_block + count, BATCH_PAGES):
            if self._ahead_requests >= _MAX_AHEAD_REQUESTS:
                return
            batch = self._batch(rel, range(start, min(start + BATCH_PAGES, first_block + count)), is_ahead=True)
            self._ahead_requests += 1
            batch.task.add_done_callback(functools.partial(self._arrived_ahead, batch))
            for block in batch.blocks:
                self._take_ahead(rel, block)
                self._ahead[rel, block] = batch
            self._batches[batch] = None
            self._batches_pages += len(batch.blocks)
            while self._batches_pages > MAX_AHEAD_PAGES:
                self._forget(next(iter(self._batches)))

    def _take_ahead(self, rel: RelTag, block: int) -> _Batch | None:
        """It is handed over once: the kernel keeps it."""
        batch = self._ahead.pop((rel, block), None)
        if batch is not None:
            batch.left -= 1
            if not batch.left:
                self._forget(batch)
        return batch

    def _forget(self, batch: _Batch) -> None:
        if batch in self._batches:
            del self._batches[batch]
            self._batches_pages -= len(batch.blocks)
            for block in batch.blocks:
                if self._ahead.get((batch.rel, block)) is batch:
                    del self._ahead[batch.rel, block]

    def _arrived_ahead(self, batch: _Batch, task: asyncio.Task[list[bytes]]) -> None:
        self._ahead_requests -= 1
        if task.cancelled() or task.exception() is not None:  # retrieved: perhaps nobody asks for these pages
            self._forget(batch)

    def _batch(self, rel: RelTag, blocks: range, *, is_ahead: bool = False) -> _Batch:
        return _Batch(rel, blocks, self._fetch(rel, blocks.start, len(blocks)), is_ahead=is_ahead)

    def _fetch(self, rel: RelTag, first_block: int, count: int) -> asyncio.Task[list[bytes]]:
        task = asyncio.create_task(self._fetched(rel, first_block, count))
        self._fetching.add(task)
        task.add_done_callback(self._fetching.discard)
        return task

    async def _fetched(self, rel: RelTag, first_block: int, count: int) -> list[bytes]:
        try:
            async with asyncio.timeout(self._timeout_s), self._slots:
                pages = await self._ask(rel, first_block, count)
        except TimeoutError:
            raise UnavailableError("the pageserver did not answer in time") from None
        if len(pages) != count:
            raise ProtocolError("the pageserver answered with another number of pages")
        self.pages_fetched += count
        return pages

    async def _ask(self, rel: RelTag, first_block: int, count: int) -> list[bytes]:
        """Until there is an answer that is final."""
        while True:
            try:
                pipeline = await self._connected()
                return await pipeline.ask(rel, first_block, count)
            except KeylakeError as error:
                if not error.retryable:
                    raise
                _log.info("pages do not come, asking again", code=error.code, reason=str(error))
            await asyncio.sleep(_RETRY_DELAY_S)

    async def _connected(self) -> _Pipeline:
        async with self._connecting:
            if self._connection is None or self._connection.lost:
                self._connection = _Pipeline(await self._connect(), self._lsn)
            return self._connection

    async def close(self) -> None:
        """Nothing is fetched any more, and no page that was is held here, nor in the connection."""
        for batch in list(self._batches):
            self._forget(batch)
        fetching = list(self._fetching)
        for task in fetching:
            task.cancel()
        await asyncio.gather(*fetching, return_exceptions=True)
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


class _Pipeline:
    """One connection and who waits for its answers."""

    def __init__(self, connection: FramedConnection, lsn: Lsn) -> None:
        self._stream = connection
        self._lsn = lsn
        self._waiting: dict[int, asyncio.Future[list[bytes]]] = {}
        self._last_id = 0
        self._reader = asyncio.create_task(self._read(), name="pages")

    @property
    def lost(self) -> bool:
        return self._reader.done()

    async def ask(self, rel: RelTag, first_block: int, count: int) -> list[bytes]:
        """Raises the pageserver's error, UnavailableError when the connection is lost."""
        if self.lost:
            raise UnavailableError("the connection to the pageserver is lost")
        self._last_id = self._last_id % 0xFFFFFFFF + 1
        request_id = self._last_id
        answer: asyncio.Future[list[bytes]] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = answer
        try:
            # Small, and bounded by how many may be in flight.
            self._stream.write(pagestream.BlocksRequest(request_id, self._lsn.value, rel, first_block, count).pack())
            return await answer
        finally:
            self._waiting.pop(request_id, None)

    async def _read(self) -> None:
        error: KeylakeError = UnavailableError("the connection to the pageserver is lost")
        try:
            while frames := await self._stream.receive():
                for kind, payload in frames:
                    self._take(kind, payload)
        except KeylakeError as reason:
            error = reason if reason.retryable else UnavailableError(str(reason))
        finally:
            for answer in list(self._waiting.values()):
                if not answer.done():
                    answer.set_exception(error)
            self._stream.abort()

    def _take(self, kind: int, payload: bytes) -> None:
        if kind == pagestream.PAGES:
            request_id, pages = pagestream.parse_pages(payload)
            self._resolve(request_id, pages)
        elif kind == ERROR:
            frame = ErrorFrame.parse(payload)
            if frame.request_id == 0:
                raise frame.exception()
            self._resolve(frame.request_id, frame.exception())
        else:
            raise ProtocolError(f"unexpected frame of type {kind:#x} among pages")

    def _resolve(self, request_id: int, result: Sequence[bytes] | KeylakeError) -> None:
        answer = self._waiting.get(request_id)  # None: who asked has given up
        if answer is None or answer.done():
            return
        if isinstance(result, KeylakeError):
            answer.set_exception(result)
        else:
            answer.set_result(list(result))

    async def close(self) -> None:
        # The reader is not cancelled: the error of a cancelled task holds its frames, these hold the task, and pages.
        # No garbage collector sees that circle (CPython 3.11).
        self._stream.abort()
        await self._reader
        await self._stream.close()
