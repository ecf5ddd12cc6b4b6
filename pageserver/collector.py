"""Executes gc.py: moves the GC cutoff, and removes the layers that nobody can need any more.

    readers below the cutoff are refused  →  an index with the cutoff and without the layers  →  when the last reader of
    the layers has left, the slots are looked at once more, and their objects are deleted

So the cutoff is durable before anything is gone (Neon invariant 6), and a writer that was replaced deletes nothing
(RemoteTimeline.validate). A crash before the index changes nothing; after it, the layers are orphans.

Who may read below the cutoff: leased LSNs, branch points, and LSNs that somebody in this process holds. They are looked
at in the same step in which the cutoff moves (`_decide`); so whoever asks for one later is refused.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pageserver.compactor import Compactor, remove_layers
from pageserver.flusher import Flusher
from pageserver.gc import unneeded_layers
from pageserver.index_part import IndexPart
from pageserver.layer.name import LayerDescriptor
from pageserver.live import Live, TimelineConfig, TimelineServices
from pageserver.retention import LsnLeases, RetainLsns, Retention, below_cutoff, gc_cutoff, nothing_retained
from shared.errors import KeyAccessError, KeylakeError, UnavailableError
from shared.failpoints import failpoint
from shared.telemetry import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Collected:
    """What one run of GC did. LSNs are plain integers."""

    cutoff_lsn: int
    layers: int = 0
    size_bytes: int = 0


class Collector:
    """`current` gives the timeline's Live, `index` the last durable index."""

    def __init__(
        self,
        services: TimelineServices,
        config: TimelineConfig,
        flusher: Flusher,
        compactor: Compactor,
        current: Callable[[], Live | None],
        index: Callable[[], IndexPart],
    ) -> None:
        self.fault = ""
        self.retain_lsns: RetainLsns = nothing_retained
        """Where branches start."""
        self.leases = LsnLeases(services.clock.monotonic_s(), config.lsn_lease_s)
        self._clock = services.clock
        self._config = config
        self._flusher = flusher
        self._compactor = compactor
        self._current = current
        self._index = index
        self._held: Counter[int] = Counter()
        self._applied = 0

    # --- who may read what ---

    @property
    def oldest_lsn(self) -> int:
        """Every version from here on can be read."""
        return max(self._index().oldest_lsn, self._applied)

    def check_readable(self, lsn: int) -> None:
        """Raises InvalidInputError for an LSN that is not kept any more."""
        oldest = self.oldest_lsn
        if lsn < oldest and lsn not in self._retained():
            raise below_cutoff(lsn, oldest)

    def _retained(self) -> set[int]:
        """Raises UnavailableError while branch points are not known."""
        return {*self.retain_lsns(), *self._held, *self.leases.current(self._clock.monotonic_s())}

    @contextmanager
    def held(self, lsn: int) -> Iterator[None]:
        """Keep an LSN readable for as long as it takes. Raises as `check_readable`."""
        self.check_readable(lsn)
        self._held[lsn] += 1
        try:
            yield
        finally:
            self._held[lsn] -= 1
            if not self._held[lsn]:
                del self._held[lsn]

    def lease(self, lsn: int, ttl_s: float | None = None) -> float:
        """Keep an LSN readable for some time, whoever asks. Returns for how long, in seconds. Raises as
        `check_readable` and `LsnLeases.grant`."""
        self.check_readable(lsn)
        return self.leases.grant(lsn, self._clock.monotonic_s(), ttl_s)

    # --- collecting ---

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._config.gc_interval_s)
            if not self.leases.are_known(self._clock.monotonic_s()):
                continue
            try:
                await self.collect()
            except KeylakeError as error:
                if not isinstance(error, KeyAccessError):
                    self.fault = f"{error.code}: {error}"
                    _log.info("garbage collection failed", code=error.code, error=str(error))

    async def collect(self) -> Collected:
        """Move the cutoff as far as the retention window allows, and remove what is below it.

        Raises KeyAccessError, FencedError, UnavailableError (branches or leases of an earlier process are not known
        yet, and more).
        """
        async with self._compactor.lock:
            live = self._current()
            if live is None:
                raise UnavailableError("the timeline is being loaded")
            if not self.leases.are_known(self._clock.monotonic_s()):
                raise UnavailableError("LSN leases from before the start may still be held")
            done: list[tuple[int, list[LayerDescriptor]]] = []

            def collected(now: IndexPart) -> IndexPart:
                cutoff, gone = self._decide(now)
                done.append((cutoff, gone))
                if not gone and cutoff == now.latest_gc_cutoff_lsn:
                    return now
                failpoint("gc-decided")
                names = {layer.name for layer in gone}
                layers = tuple(each for each in now.layers if each[0].name not in names)
                return replace(now, latest_gc_cutoff_lsn=cutoff, layers=layers)

            await self._flusher.publish(live, collected)
            failpoint("gc-listed")
            ((cutoff, gone),) = done
            await remove_layers(live, gone)
        self.fault = ""
        return Collected(cutoff, len(gone), sum(layer.size_bytes for layer in gone))

    def _decide(self, index: IndexPart) -> tuple[int, list[LayerDescriptor]]:
        """The new cutoff, and the layers that go. From here on readers below it are refused.

        Under `Flusher.lock`, so nothing that is being published may add a reader; and without an await, so nobody who
        leases an LSN comes in between.
        """
        retained = self._retained()
        now_s = int(self._clock.now().timestamp())
        cutoff = gc_cutoff(
            index.retention, index.history, now_s, index.disk_consistent_lsn, max(index.oldest_lsn, self._applied)
        )
        self._applied = cutoff
        return cutoff, unneeded_layers((layer for layer, _ in index.layers), cutoff, retained)

    async def set_retention(self, retention: Retention) -> None:
        """Durable when it returns. A longer window does not bring back what is gone. Raises what publishing raises."""
        async with self._compactor.lock:
            live = self._current()
            if live is None:
                raise UnavailableError("the timeline is being loaded")
            await self._flusher.publish(live, lambda now: replace(now, retention=retention))
