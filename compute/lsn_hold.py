"""Keeping the version that a compute reads readable on the pageserver, for as long as it runs: the one that a lazy
compute started at, or that a read-only endpoint is of.

A lease is asked for before the compute reads anything, and again when a third of it is over. A pageserver that restarts
removes nothing for as long as a lease may last (`pageserver/retention.py`), so one that is away for a while is no harm.
"""

from __future__ import annotations

import asyncio
from typing import Final

from compute.storage_clients import PageserverClient
from shared.errors import InvalidInputError, KeylakeError
from shared.ids import ProjectId, TimelineId
from shared.lsn import Lsn
from shared.telemetry import get_logger

_log = get_logger(__name__)
_RENEWALS_PER_LEASE: Final = 3
_RETRY_INTERVAL_S: Final = 5.0


class LsnHold:
    """`take` it, then `release`: the last lease just runs out."""

    def __init__(self, pageserver: PageserverClient, project_id: ProjectId, timeline_id: TimelineId) -> None:
        self._pageserver = pageserver
        self._project_id = project_id
        self._timeline_id = timeline_id
        self._renewing: asyncio.Task[None] | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Has the pageserver's InvalidInputError when the version is not kept any more."""

    async def take(self, lsn: Lsn) -> None:
        """Raises KeylakeError: the pageserver's, when there is no lease."""
        ttl_s = await self._lease(lsn)
        self._renewing = asyncio.create_task(self._renew(lsn, ttl_s), name="LSN lease")

    async def _lease(self, lsn: Lsn) -> float:
        return await self._pageserver.lease_lsn(self._project_id, self._timeline_id, lsn)

    async def _renew(self, lsn: Lsn, ttl_s: float) -> None:
        pause_s = ttl_s / _RENEWALS_PER_LEASE
        while True:
            await asyncio.sleep(pause_s)
            try:
                pause_s = await self._lease(lsn) / _RENEWALS_PER_LEASE
            except InvalidInputError as error:
                self.lost.set_exception(error)
                self.lost.exception()  # retrieved: the run may be over for another reason
                return
            except KeylakeError as error:
                _log.warning("an LSN lease was not renewed", lsn=str(lsn), code=error.code, reason=str(error))
                pause_s = min(pause_s, _RETRY_INTERVAL_S)

    async def release(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        self.lost.cancel()
