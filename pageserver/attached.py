"""One timeline of a pageserver, and the task that keeps it going.

A timeline's life is one loop: wait for the lease (and for the ancestor) → load the durable state → ingest and flush
until something ends it → again. What ends it is the loss of the keys, its own or its ancestor's (then plaintext is
dropped and the loop waits), or a fault: corrupt WAL, another writer, a full disk. A fault that may pass is retried with
a pause; one that does not stays, and the timeline's status says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final

from pageserver.ingest_memory import IngestMemory
from pageserver.ingest_shell import IngestShell, load_tip
from pageserver.layer_cache import LayerCache
from pageserver.redo.build import RedoBinaries
from pageserver.timeline import (
    Timeline,
    TimelineConfig,
)
from pageserver.walreceiver import Peer, WalReceiver
from shared.api.pageserver import (
    AncestorInfo,
    RetentionWindow,
    TimelineInfo,
)
from shared.auth import TokenIssuer
from shared.errors import (
    KeyAccessError,
    KeylakeError,
    LeaseExpiredError,
)
from shared.key_upkeep import UpkeepTuning
from shared.lease import KeySource
from shared.lsn import Lsn
from shared.storage.base import ObjectStore
from shared.storage.threads import BlockingPool
from shared.telemetry import get_logger
from shared.wal.reader import WalStreamDecoder

_LEASE_POLL_S: Final = 0.1
FAULT_PAUSE_S: Final = 1.0
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Environment:
    """What all projects of this process share."""

    store: ObjectStore
    files: LayerCache
    keys: KeySource
    pool: BlockingPool
    redo_binaries: RedoBinaries
    config: TimelineConfig
    peers: Sequence[Peer]
    issuer: TokenIssuer
    peer_context: ssl.SSLContext
    upkeep: UpkeepTuning = field(default_factory=UpkeepTuning)
    compactions: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    memory: IngestMemory = field(default_factory=IngestMemory)


class AttachedTimeline:
    """One timeline, with the task that keeps it going."""

    def __init__(self, timeline: Timeline, environment: Environment) -> None:
        self.timeline = timeline
        self._environment = environment
        self._receiver: WalReceiver | None = None
        self._work: asyncio.Task[None] | None = None
        self._keys_went = asyncio.Event()
        self.fault = ""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._keys_went.clear()
            await self._wait_for_lease()
            self._work = asyncio.create_task(self._live(), name=f"timeline {self.timeline.timeline_id}")
            try:
                await asyncio.wait([self._work])
            finally:
                await self._stop_work()
            if self.fault:
                await self._pause_after_fault()
            else:
                await asyncio.sleep(0)

    async def _pause_after_fault(self) -> None:
        """Ends early when the keys go: with what they were given again for, it is tried at once."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._keys_went.wait(), FAULT_PAUSE_S)

    async def _wait_for_lease(self) -> None:
        # A lease is a core without events, so one that comes back is noticed by looking. So is an ancestor.
        while not (self.timeline.lease.live and self.timeline.ancestor_is_usable):  # noqa: ASYNC110
            await asyncio.sleep(_LEASE_POLL_S)

    async def _live(self) -> None:
        timeline = self.timeline
        try:
            if not timeline.is_live:
                await timeline.reopen()
            ingest = IngestShell(timeline, await load_tip(timeline))
            receiver = WalReceiver(
                timeline.project_id,
                timeline.timeline_id,
                self._environment.peers,
                self._environment.issuer,
                self._environment.peer_context,
                WalStreamDecoder(
                    timeline.last_record_lsn,
                    system_identifier=timeline.system_identifier,
                    last_record_start=timeline.prev_record_lsn,
                ),
                ingest.ingest,
                lambda: timeline.remote_consistent_lsn,
            )
            self._receiver = receiver
            self.fault = ""
            async with asyncio.TaskGroup() as group:
                group.create_task(timeline.run())
                group.create_task(receiver.run())
                group.create_task(_ended(timeline))
        except KeylakeError as error:
            self._failed(error)
        except ExceptionGroup as group_error:
            known, rest = group_error.split(KeylakeError)
            if rest is not None:
                self.fault = "internal error; the service's log has the details"
                _log.error("timeline failed", timeline_id=str(timeline.timeline_id), exc_info=rest)
                await timeline.drop_plaintext()
            elif known is not None:
                self._failed(_first(known))
        finally:
            self._receiver = None
            # What is in memory was ingested by this run; the next one starts over from what is durable.
            await timeline.drop_plaintext()

    def _failed(self, error: KeylakeError) -> None:
        if isinstance(error, KeyAccessError):
            return  # `lose` is told by the key client; the loop waits for the lease
        self.fault = f"{error.code}: {error}"
        log = _log.warning if error.retryable else _log.error
        log("timeline failed", timeline_id=str(self.timeline.timeline_id), code=error.code, error=str(error))

    async def _stop_work(self) -> None:
        work, self._work = self._work, None
        if work is not None and not work.done():
            work.cancel()
            await asyncio.wait([work])

    async def lose(self) -> dict[str, float]:
        """The keys are lost: stop ingest and forget all plaintext. Returns the steps in seconds."""
        started = perf_counter()
        self._keys_went.set()
        steps_s = await self.timeline.drop_plaintext()
        await self._stop_work()
        return steps_s | {"ingest stopped": perf_counter() - started}

    def info(self) -> TimelineInfo:
        timeline = self.timeline
        ancestor = timeline.ancestor
        return TimelineInfo(
            project_id=timeline.project_id,
            timeline_id=timeline.timeline_id,
            state=timeline.lease.state,
            system_identifier=timeline.system_identifier,
            initdb_lsn=Lsn(timeline.initdb_lsn),
            last_record_lsn=Lsn(timeline.last_record_lsn),
            prev_record_lsn=Lsn(timeline.prev_record_lsn),
            disk_consistent_lsn=Lsn(timeline.disk_consistent_lsn),
            remote_consistent_lsn=Lsn(timeline.remote_consistent_lsn),
            commit_lsn=Lsn(self._receiver.commit_lsn if self._receiver is not None else 0),
            oldest_lsn=Lsn(timeline.oldest_lsn),
            retention=RetentionWindow(lsn_bytes=timeline.retention.lsn_bytes, age_s=timeline.retention.age_s),
            layers=timeline.layer_count,
            l0_layers=timeline.l0_layer_count,
            layer_size_bytes=timeline.layer_size_bytes,
            in_memory_size_bytes=timeline.in_memory_size_bytes,
            ancestor=None
            if ancestor is None
            else AncestorInfo(project_id=ancestor.project_id, timeline_id=ancestor.timeline_id, lsn=Lsn(ancestor.lsn)),
            branches={branch: Lsn(lsn) for branch, lsn in timeline.branches.items()},
            fault=self.fault or timeline.fault,
        )


async def _ended(timeline: Timeline) -> None:
    """Raises LeaseExpiredError when the timeline's plaintext is gone."""
    await timeline.ended()
    raise LeaseExpiredError("the plaintext was dropped")


def _first(group: ExceptionGroup[KeylakeError]) -> KeylakeError:
    """The first error of a group, wherever it is nested."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error
