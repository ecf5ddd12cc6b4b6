"""Turns a timeline's frozen layers into durable ones, in the background, and keeps chains in the open layer short.

    frozen layer  →  sealed layer in the object store (disk_consistent_lsn)  →  index (remote_consistent_lsn)  →  swap

A step that failed and may be tried again is tried again; the frozen layer stays readable in memory meanwhile, and when
too many pile up, ingest waits; likewise when too many are flushed and not merged, which each read would visit. What may
not be tried again (another writer, damaged data) stops ingest for good, until somebody reopens the timeline: `fault`
says why.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Set
from dataclasses import replace

from pageserver.flush import (
    FlushStats,
    ImageMaker,
    SealedLayer,
    build_delta,
    chains_before,
    seal_layer,
    upload_layer,
)
from pageserver.index_part import IndexPart
from pageserver.layer.in_memory import InMemoryLayer, image_points
from pageserver.live import Frozen, Live, TimelineConfig, TimelineServices
from pageserver.read_path import Snapshot
from pageserver.remote_timeline import FencedError
from pageserver.retention import remember
from shared.errors import ConflictError, KeyAccessError, KeylakeError, UnavailableError
from shared.failpoints import failpoint
from shared.telemetry import get_logger

PRESSED_THRESHOLD_FACTOR = 8
"""Images are for chains that much longer while further layers wait to be flushed."""
_log = get_logger(__name__)


class Flusher:
    """`current` gives the timeline's Live; `published` hears of each index that became durable."""

    def __init__(
        self,
        services: TimelineServices,
        config: TimelineConfig,
        current: Callable[[], Live | None],
        published: Callable[[IndexPart], None],
    ) -> None:
        self.lock = asyncio.Lock()
        """Held while a flush may be talking to the object store."""
        self.fault = ""
        self.compaction_fault = ""
        self.last_flush = FlushStats()
        self._services = services
        self._config = config
        self._current = current
        self._published = published
        self._stopped_by: KeylakeError | None = None
        self._wake = asyncio.Event()
        self._long_runs = asyncio.Event()
        self._room = asyncio.Event()
        self._opened = asyncio.Event()

    # --- what ingest says and hears ---

    def check_running(self) -> None:
        """Raises FencedError or ConflictError when flushing has stopped for good."""
        if isinstance(self._stopped_by, FencedError):
            raise FencedError(str(self._stopped_by))
        if self._stopped_by is not None:
            raise ConflictError(f"the timeline takes no values: {self.fault}")

    def frozen(self) -> None:
        """There is a layer to flush."""
        self._wake.set()

    def long_runs(self) -> None:
        """The open layer has keys with many values."""
        self._long_runs.set()

    async def room(self, live: Live) -> None:
        """Wait until ingest may go on, because layers were flushed or merged or because something is wrong."""
        while self.must_wait(live) and not live.closed and self._stopped_by is None:
            self._room.clear()
            await self._room.wait()

    def must_wait(self, live: Live) -> bool:
        """Is there too much that is not flushed, or not merged?"""
        config = self._config
        return len(live.frozen) >= config.frozen_layers or (
            live.l0_layers >= config.ingest_l0_layers and not self.compaction_fault
        )

    def compaction_failed(self, fault: str) -> None:
        """Or works again, if `fault` is empty."""
        self.compaction_fault = fault
        self._room.set()

    def reset(self) -> None:
        """The timeline was opened anew, or its plaintext dropped."""
        self.fault = ""
        self._stopped_by = None
        self._room.set()
        self._wake.set()
        self._opened.set()

    # --- flushing ---

    async def run(self) -> None:
        """Until cancelled. Freezes by age, flushes, adds images, frees what was flushed."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._run_flushes())
            group.create_task(self._run_images())
            group.create_task(self._run_funerals())

    async def _run_flushes(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s = self._config.checkpoint_timeout_s
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            self._wake.clear()
            pause_s = self._config.checkpoint_timeout_s
            live = self._current()
            if live is None or self._stopped_by is not None:
                continue
            if loop.time() - live.opened_at_s >= self._config.checkpoint_timeout_s:
                live.freeze(loop.time())
            try:
                await self.flush(live)
            except KeylakeError:
                # `flush` has recorded it. Lost keys come back with another Live, or under the same one.
                pause_s = self._config.retry_delay_s

    async def flush(self, live: Live) -> None:
        """Flush all frozen layers of `live`. Raises KeylakeError; they are still there then, and `fault` says why."""
        async with self.lock:
            try:
                while live is self._current() and live.frozen and self._stopped_by is None:
                    await self._flush_oldest(live)
            except KeyAccessError:
                raise
            except KeylakeError as error:
                live.check()  # what fails because the keys went away is no fault
                self.fault = f"{error.code}: {error}"
                if not error.retryable:
                    self._stopped_by = error
                    self._room.set()
                log = _log.warning if error.retryable else _log.error
                log("flush failed", timeline_id=str(live.index.timeline_id), code=error.code, error=str(error))
                raise
            live.check()
            self.check_running()
            self.fault = ""

    async def publish(
        self,
        live: Live,
        change: Callable[[IndexPart], IndexPart],
        *,
        keep_of_orphans: Callable[[], Set[str]] | None = None,
        on_listed: Callable[[], None] = lambda: None,
    ) -> None:
        """A new version of the index that is not a flush's: `change` makes it of the one of then. Raises what
        publishing raises; `live.index` is the old one then. Nothing is done if `change` returns what it was given.

        With `keep_of_orphans`, layer objects other than those that it names are deleted, too.
        """
        async with self.lock:
            if live is not self._current():
                raise UnavailableError("the timeline was loaded anew meanwhile")
            if keep_of_orphans is not None:
                await live.remote.look_for_orphans(keep_of_orphans())
            index = change(live.index)
            if index is live.index:
                return
            await live.remote.publish(index)
            # Invariant: no await from here on, as in a flush: a reader finds what was exchanged as it was, or as it is.
            self._published(index)
            if live.closed:
                return
            on_listed()
            live.accept(index)
            live.changed()
            self._room.set()

    async def _flush_oldest(self, live: Live) -> None:
        frozen = live.frozen[0]
        stats = FlushStats()
        layers = live.index.layers
        if frozen.stored is None and frozen.layer.key_count:
            frozen.stored = await self._store(live, frozen, stats)
            failpoint("flush-stored")
        live.check()
        layers = (*layers, *frozen.unlisted)
        live.disk_consistent_lsn = frozen.last_record_lsn
        old = live.index
        now_s = int(self._services.clock.now().timestamp())
        index = replace(
            old,
            disk_consistent_lsn=frozen.last_record_lsn,
            prev_record_lsn=frozen.prev_record_lsn,
            layers=layers,
            history=remember(old.history, now_s, frozen.last_record_lsn, old.retention.age_s),
        )
        await live.remote.publish(index)
        failpoint("flush-listed")
        # Invariant: no await from here to the end, so a reader finds the values in memory or in the layer, never in
        # neither. The index is durable, even if the keys were lost while it was written.
        self._published(index)
        if live.closed:
            return
        if frozen.stored is not None:
            live.layers.install(frozen.stored.descriptor, frozen.stored.opener, frozen.stored.index)
        live.accept(index)
        live.frozen.pop(0)
        if frozen.last_record_lsn > live.last_record_lsn:  # as Live.freeze_one leaves it
            live.last_record_lsn, live.prev_record_lsn = frozen.last_record_lsn, frozen.prev_record_lsn
        live.changed()
        live.retire(frozen.layer)
        live.account()
        self.last_flush = stats
        self._room.set()

    async def _store(self, live: Live, frozen: Frozen, stats: FlushStats) -> SealedLayer:
        with live.in_use():
            older = Snapshot((), live.layer_map)
            before = await chains_before(live.layers, older, (key for key, _ in frozen.layer.runs()))
            live.check()
            # With more layers waiting, ingest is about to wait for this one: leave images to a later one.
            pressed = len(live.frozen) > 1
            threshold = self._config.image_threshold_values * (PRESSED_THRESHOLD_FACTOR if pressed else 1)
            snapshot = Snapshot((frozen.layer,), live.layer_map, live.ancestry())
            maker = ImageMaker(live.reader, snapshot, frozen.layer, before, threshold, stats)
            built = await build_delta(frozen.layer, frozen.last_record_lsn + 1, before, maker, live.check, stats)
            services = self._services
            layer, sealed = await seal_layer(built, live.remote, services.pool, self._config.chunk_size_bytes, stats)
        await upload_layer(layer, sealed, live.remote, services.files, stats)
        return layer

    # --- images in the open layer ---

    async def _run_images(self) -> None:
        """Put images at keys that change so often that a read of their newest version would take long."""
        while True:
            await self._long_runs.wait()
            self._long_runs.clear()
            live = self._current()
            if live is None:
                continue
            layer = live.open
            keys, layer.long_runs = layer.long_runs, []
            for key in dict.fromkeys(keys):
                if live.closed or layer.lsn_end is not None:
                    break  # gone; or frozen, and then the flush makes its images
                await self._image(live, layer, key)
                await asyncio.sleep(0)  # pages that Python makes never wait for anything

    async def _image(self, live: Live, layer: InMemoryLayer, key: bytes) -> None:
        for lsn in image_points(layer.run(key)):
            with live.in_use():
                try:
                    value = await live.reader.value(live.snapshot, key, lsn)
                except KeylakeError as error:
                    _log.info("page image was not made", code=error.code, error=str(error))
                    return
            if value is None or live.closed or layer.lsn_end is not None:
                return
            layer.insert_image(key, lsn, value)

    # --- memory of flushed layers ---

    async def _run_funerals(self) -> None:
        """Free flushed layers step by step, when the last reader has left them."""
        while True:
            live = self._current()
            if live is None:
                await self._opened.wait()
                self._opened.clear()
                continue
            await live.left.wait()
            live.left.clear()
            for layer in live.unused():
                for _ in layer.dismantle():
                    await asyncio.sleep(0)
