"""The redo worker of one project: started when first needed, started again when it died, killed with the lease."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pageserver.redo.build import RedoBinaries
from pageserver.redo.worker import RedoWorker
from shared.errors import LeaseExpiredError, UnavailableError
from shared.telemetry import get_logger

_log = get_logger(__name__)


class ProjectRedo:
    """Implements `pageserver.page_reader.PageRedo`. One worker serves all timelines of the project."""

    def __init__(self, binaries: RedoBinaries) -> None:
        self._binaries = binaries
        self._worker: RedoWorker | None = None
        self._starting = asyncio.Lock()
        self._allowed = True

    @property
    def running(self) -> bool:
        return self._worker is not None

    def allow(self) -> None:
        """The lease is live again: workers may be started."""
        self._allowed = True

    async def kill(self) -> None:
        """The lease is over: end the worker now, and start none until `allow`. Returns when it is gone."""
        self._allowed = False
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            await worker.wait_closed()

    async def close(self) -> None:
        await self.kill()

    async def apply(
        self,
        rel: tuple[int, int, int],
        fork: int,
        blkno: int,
        base: bytes | None,
        records: Sequence[tuple[int, bytes]],
    ) -> bytes:
        """See PageRedo. A request whose worker dies is tried once more with a new one: the crash may have been another
        request's fault."""
        worker = await self._running_worker()
        try:
            return await worker.apply(rel, fork, blkno, base, records)
        except UnavailableError as error:
            self._forget(worker, error)
        worker = await self._running_worker()
        try:
            return await worker.apply(rel, fork, blkno, base, records)
        except UnavailableError as error:
            self._forget(worker, error)
            raise

    def _forget(self, worker: RedoWorker, error: UnavailableError) -> None:
        if self._worker is worker:
            self._worker = None
            worker.kill()
            _log.warning("redo worker died", error=str(error))

    async def _running_worker(self) -> RedoWorker:
        worker = self._worker
        if worker is not None:
            return worker
        async with self._starting:
            if not self._allowed:
                raise LeaseExpiredError("the keys were lost meanwhile")
            if self._worker is None:
                started = await RedoWorker.start(self._binaries)
                if not self._allowed:  # lost while it started
                    started.kill()
                    await started.wait_closed()
                    raise LeaseExpiredError("the keys were lost meanwhile")
                self._worker = started
            return self._worker
