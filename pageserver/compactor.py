"""Executes compaction.py: merges L0 layers into L1, makes image layers. In the background, beside ingest and reads.

    inputs, streamed  →  a layer of the target size: built, sealed, uploaded  →  … the next  →  an index that lists them
    instead of the inputs  →  when the last reader of the inputs has left, their objects are deleted

Memory: the indexes of the inputs and a window of each, one layer in the making, its sealed bytes; for one timeline at a
time. A crash or an error before the index leaves orphans and changes nothing; after it, the inputs are the orphans.
Nothing is remembered of what was under way.

What may interleave: flushes (which publish, too: both under `Flusher.lock`, from the index of then) and reads; the loss
of the keys, which closes `Live`. Everything else that replaces or removes layers holds `lock`: one merge or run of
images, GC (collector.py), a step of key upkeep. So inputs stay listed and stored while they are read, a layer that is
uploaded and not listed yet is nobody else's orphan, and no DEK that was asked for before a count of keys is on its way
to the store afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Final

from pageserver.compaction import (
    Cuts,
    ImagePlan,
    Partition,
    deltas_above,
    depth,
    divided,
    holes,
    image_lsn,
    partitions,
    plan_images,
    plan_merge,
)
from pageserver.flush import Built, FlushStats, Pacer, SealedLayer, seal_layer, upload_layer
from pageserver.flusher import Flusher
from pageserver.index_part import IndexPart
from pageserver.layer.delta import DeltaBuilder, DeltaIndex, RawRun, RunHeader, run_header_range
from pageserver.layer.image import ImageBuilder, ImageIndex
from pageserver.layer.name import LayerDescriptor, covering_range
from pageserver.layer_stream import LayerStream, keys_of
from pageserver.live import Live, TimelineConfig, TimelineServices
from pageserver.read_path import Base, Chain
from pageserver.remote_timeline import FencedError
from pageserver.value import Value
from shared.errors import CorruptedError, KeyAccessError, KeylakeError, UnavailableError
from shared.failpoints import failpoint
from shared.keyspace import REL_BLOCK, REL_SIZE, WHOLE_KEYSPACE, KeyRange, pack_key, unpack_key
from shared.telemetry import get_logger

_IMAGE_BATCH_KEYS: Final = 64
_MAX_STREAMS: Final = 64
"""Layers that one run of images reads: their indexes are in memory meanwhile."""
_log = get_logger(__name__)


@dataclass(slots=True)
class CompactionStats:
    """What was done since the timeline was opened."""

    merges: int = 0
    image_runs: int = 0
    layers_read: int = 0
    layers_written: int = 0
    read_size_bytes: int = 0
    """Sealed size of delta layers that were merged."""
    written_size_bytes: int = 0
    merge_s: float = 0.0
    images_s: float = 0.0


class Compactor:
    """`current` gives the timeline's Live."""

    def __init__(
        self,
        services: TimelineServices,
        config: TimelineConfig,
        flusher: Flusher,
        current: Callable[[], Live | None],
    ) -> None:
        self.lock = asyncio.Lock()
        """Held by whoever replaces or removes layers. Taken before `Flusher.lock`."""
        self.fault = ""
        self.stats = CompactionStats()
        self._services = services
        self._config = config
        self._flusher = flusher
        self._current = current
        self._wake = asyncio.Event()

    def flushed(self) -> None:
        """There may be work."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.compaction_interval_s):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self.compact()
            except KeylakeError:
                # `compact` has recorded it. What does not pass is tried again, too: it costs a look.
                await asyncio.sleep(self._config.retry_delay_s)

    async def compact(self, *, force: bool = False) -> None:
        """Do all that is due; with `force`, merge all L0 layers there are and make all images that help any read.

        Raises KeylakeError; `fault` says why then, and reads are as good as before.
        """
        try:
            while True:
                async with self._services.compactions, self.lock:
                    live = self._current()
                    if live is None or not await self._step(live, force=force):
                        break
        except KeyAccessError:
            raise
        except KeylakeError as error:
            live = self._current()
            if live is not None and not live.closed:
                fault = f"{error.code}: {error}"
                if fault != self.fault:
                    log = _log.info if error.retryable else _log.error
                    log("compaction failed", timeline_id=str(live.index.timeline_id), error=str(error))
                self.fault = fault
                self._flusher.compaction_failed(fault)
            raise
        self.fault = ""
        self._flusher.compaction_failed("")

    async def _step(self, live: Live, *, force: bool) -> bool:
        """One merge, or one run of images. Returns False when nothing is due."""
        config = self._config
        inputs = plan_merge(
            live.layer_map.layers, 1 if force else config.compaction_l0_layers, config.compaction_l0_layers_at_once
        )
        started = perf_counter()
        if inputs:
            with live.working():
                await self._take_over(live, inputs, self._writer(live), self._merge)
            self.stats.merges += 1
            self.stats.merge_s += perf_counter() - started
            return True
        plans = await self._image_plans(live, 1 if force else config.image_layer_deltas)
        for plan in plans:
            for piece in divided(plan, live.layer_map.layers, _MAX_STREAMS):
                with live.working():
                    await self._take_over(live, [], self._writer(live), partial(self._make_images, plan=piece))
        if plans:
            self.stats.image_runs += 1
            self.stats.images_s += perf_counter() - started
        return False  # images follow merges: there is nothing behind them

    def _writer(self, live: Live) -> _Writer:
        return _Writer(live, self._services, self._config.chunk_size_bytes, self.stats)

    async def _take_over(
        self,
        live: Live,
        inputs: list[LayerDescriptor],
        writer: _Writer,
        make: Callable[[list[LayerDescriptor], _Writer], Awaitable[None]],
    ) -> None:
        """Let `make` write layers, list them instead of `inputs`, and then delete those."""
        made = writer.made
        try:
            await make(inputs, writer)
            failpoint("compaction-stored")
            await self._flusher.publish(
                live,
                lambda index: _exchanged(index, inputs, made),
                on_listed=lambda: _install(live, made),
            )
        except BaseException:
            # Orphans now; unless the index may still arrive that lists them.
            if live.remote.envelope_under_way is None:
                live.remote.abandon_layers(layer.descriptor.name for layer in made)
            raise
        failpoint("compaction-listed")
        await remove_layers(live, inputs)

    # --- L0 to L1 ---

    async def _merge(self, inputs: list[LayerDescriptor], writer: _Writer) -> None:
        """`inputs`: L0 layers, oldest first, of consecutive LSNs."""
        live, target = writer.live, self._config.compaction_target_bytes
        lsn_start, lsn_end = inputs[0].lsn_start, inputs[-1].lsn_end
        streams = [LayerStream(live.layers, await live.layers.open(layer)) for layer in inputs]
        indexes = [_delta_index(stream) for stream in streams]
        parts = partitions(live.layer_map.layers, inputs[-1].last_lsn)
        cuts = Cuts(holes(parts, lambda keys: any(index.has_key_in(keys) for index in indexes)))
        pacer = Pacer(live.check)
        builder = DeltaBuilder()
        for key, numbers in keys_of(streams, WHOLE_KEYSPACE):
            if pacer.is_over():
                await pacer.pause()
            runs: list[RawRun] = []
            chains: list[int] = []
            size = 0
            for number in numbers:
                entry = indexes[number].find(key)
                if entry is None:
                    raise CorruptedError("a delta layer's index has lost a key")
                end = entry.payload_offset + entry.payload_size_bytes
                stream = streams[number]
                data = stream.peek(entry.offset, end)
                runs.append(RawRun.of(entry, await stream.read(entry.offset, end) if data is None else data))
                size += entry.payload_size_bytes
                chains.append(entry.chain_length)
            if cuts.between(key) or (builder.size_bytes and builder.size_bytes + size > target):
                await writer.write_delta(builder, lsn_start, lsn_end)
                builder = DeltaBuilder()
            if size > target and len(runs) > 1:
                starts = [inputs[number].lsn_start for number in numbers]
                await self._write_by_lsn(key, runs, chains, [lsn_start, *starts[1:], lsn_end], writer)
            else:
                builder.add_raw(key, runs, chains[-1])
        await writer.write_delta(builder, lsn_start, lsn_end)
        self.stats.layers_read += len(inputs)
        self.stats.read_size_bytes += sum(layer.size_bytes for layer in inputs)

    async def _write_by_lsn(
        self, key: bytes, runs: list[RawRun], chains: list[int], bounds: list[int], writer: _Writer
    ) -> None:
        """A key with more values than a layer is to hold: several layers of this key alone, one behind the other.

        `runs` with their chain lengths, oldest first; run i lies in the LSNs [bounds[i], bounds[i + 1]).
        """
        first = size = 0
        for number, run in enumerate(runs):
            size += len(run.payloads)
            following = runs[number + 1 : number + 2]
            if not following or size + len(following[0].payloads) > self._config.compaction_target_bytes:
                builder = DeltaBuilder()
                builder.add_raw(key, runs[first : number + 1], chains[number])
                await writer.write_delta(builder, bounds[first], bounds[number + 1])
                first, size = number + 1, 0

    # --- images ---

    async def _image_plans(self, live: Live, threshold: int) -> list[ImagePlan]:
        layers = live.layer_map.layers
        lsn = image_lsn(layers)
        if lsn is None:
            return []
        found: list[tuple[Partition, list[LayerDescriptor]]] = []
        held: set[tuple[str, bytes]] = set()
        for part in partitions(layers, lsn):
            deltas = deltas_above(layers, part, lsn)
            if depth(deltas) < threshold:
                continue
            found.append((part, deltas))
            for layer in deltas:
                index = (await live.layers.open(layer)).index
                if not isinstance(index, DeltaIndex):
                    raise CorruptedError("a layer is listed as a delta layer and is none")
                if index.has_key_in(part.key_range):
                    held.add((layer.name, part.key_range.start))
        return plan_images(found, lsn, threshold, lambda layer, keys: (layer.name, keys.start) in held)

    async def _make_images(self, inputs: list[LayerDescriptor], writer: _Writer, *, plan: ImagePlan) -> None:
        """Images of everything that exists in the plan's range at its LSN, complete for the range; on a branch, of all
        that it has changed there, also into what does not exist."""
        live, lsn = writer.live, plan.lsn
        layers = live.layer_map.layers
        parts = [
            part
            for part in partitions(layers, lsn)
            if part.key_range.start < plan.key_range.end and plan.key_range.start < part.key_range.end
        ]
        wanted = {layer.name: layer for part in parts for layer in deltas_above(layers, part, lsn)}
        newest_first = sorted(wanted.values(), key=lambda layer: -layer.lsn_start)
        images = list({part.image.name: part.image for part in parts if part.image is not None}.values())
        streams = [LayerStream(live.layers, await live.layers.open(layer)) for layer in (*newest_first, *images)]
        sizes = _RelSizes(live, lsn)
        pacer = Pacer(live.check)
        builder, start = ImageBuilder(), plan.key_range.start
        batch: list[tuple[bytes, Chain]] = []
        keys = keys_of(streams, plan.key_range)
        is_branch = live.parent is not None
        while True:
            batch.clear()
            for key, numbers in keys:
                if pacer.is_over():
                    await pacer.pause()
                if key[0] != REL_BLOCK or await sizes.exists(key):
                    batch.append((key, await _chain(live, streams, numbers, key, lsn)))
                elif is_branch:
                    batch.append((key, _NOTHING))
                if len(batch) == _IMAGE_BATCH_KEYS:
                    break
            if not batch:
                break
            values = await live.reader.build_all(batch)
            live.check()
            for (key, _), found in zip(batch, values, strict=True):
                value = b"" if found is None and is_branch else found
                if value is None:
                    continue
                if builder.size_bytes and builder.size_bytes + len(value) > self._config.compaction_target_bytes:
                    await writer.write_image(builder, KeyRange(start, key), lsn)
                    builder, start = ImageBuilder(), key
                builder.add(key, value)
        await writer.write_image(builder, KeyRange(start, plan.key_range.end), lsn)


async def remove_layers(live: Live, layers: Sequence[LayerDescriptor]) -> None:
    """Of layers that are listed no more: when their last reader has left, delete their objects. Raises FencedError;
    after any other error they are orphans, deleted later."""
    if not layers:
        return
    await live.older_readers_left()
    try:
        await live.remote.delete_layers([layer.name for layer in layers])
    except FencedError:
        raise
    except KeylakeError as error:
        _log.info("old layers were not deleted", timeline_id=str(live.index.timeline_id), code=error.code)


class _Writer:
    """Seals and uploads layers, one at a time."""

    def __init__(self, live: Live, services: TimelineServices, chunk_size_bytes: int, stats: CompactionStats) -> None:
        self.live = live
        self.made: list[SealedLayer] = []
        self._services = services
        self._chunk_size_bytes = chunk_size_bytes
        self._stats = stats

    async def write_delta(self, builder: DeltaBuilder, lsn_start: int, lsn_end: int) -> None:
        """Nothing, if there is nothing in it."""
        if builder.size_bytes:
            keys = covering_range(*builder.key_span)
            # In a thread: for a large layer it would hold the loop for tens of milliseconds.
            plaintext, index = await self._services.pool.run_to_end(builder.finish, lsn_start, lsn_end)
            self.live.check()
            await self._write(Built(plaintext, index, keys))

    async def write_image(self, builder: ImageBuilder, key_range: KeyRange, lsn: int) -> None:
        plaintext, index = await self._services.pool.run_to_end(builder.finish, lsn)
        self.live.check()
        await self._write(Built(plaintext, index, key_range))

    async def _write(self, built: Built) -> None:
        live, services, stats = self.live, self._services, FlushStats()
        layer, sealed = await seal_layer(built, live.remote, services.pool, self._chunk_size_bytes, stats, level=1)
        live.check()
        self.made.append(layer)
        await upload_layer(layer, sealed, live.remote, services.files, stats)
        live.check()
        self._stats.layers_written += 1
        self._stats.written_size_bytes += len(sealed)


class _RelSizes:
    """Which blocks exist at an LSN. Values of a block outlive its fork's truncation and drop; images leave them out."""

    def __init__(self, live: Live, lsn: int) -> None:
        self._live = live
        self._lsn = lsn
        self._fork = b""
        self._blocks = 0

    async def exists(self, key: bytes) -> bool:
        """Keys of blocks, one fork after the other."""
        fork, block = key[:14], int.from_bytes(key[14:], "big")
        if fork != self._fork:
            _, spc, db, rel, number, _ = unpack_key(key)
            live = self._live
            with live.in_use():
                value = await live.reader.value(live.snapshot, pack_key(REL_SIZE, spc, db, rel, number, 0), self._lsn)
            live.check()
            self._fork, self._blocks = fork, 0 if value is None else int.from_bytes(value, "big")
        return block < self._blocks


_NOTHING: Final = Chain([], None)


async def _chain(live: Live, streams: Sequence[LayerStream], numbers: Sequence[int], key: bytes, lsn: int) -> Chain:
    """As `gather`, from streams: delta layers from the newest down, then images; what is inherited by the way of
    readers."""
    image = live.layer_map.image(key, lsn)
    floor = -1 if image is None else image.lsn_start
    values: list[Value] = []
    for number in numbers:
        stream = streams[number]
        index = stream.layer.index
        if isinstance(index, ImageIndex):
            if image is None or stream.layer.descriptor.name != image.name:
                continue
            place = index.find(key)
            value = None if place is None else bytes(await _read(stream, *place))
            return Chain(values, Base(value or None, floor, floor))
        entry = index.find(key)
        if entry is None or entry.first_lsn > lsn or entry.last_lsn <= floor:
            continue
        header = RunHeader(entry, await _read(stream, *run_header_range(entry)))
        selection = header.select(entry, lsn, floor)
        if selection.first == selection.end:
            continue
        start = entry.payload_offset
        data = await _read(stream, start + selection.payload_start, start + selection.payload_end)
        header.take(selection, data, values)
        if selection.complete:
            return Chain(values, None)
    with live.in_use():
        ancestry = live.ancestry()
        if ancestry is None:
            return Chain(values, None if image is None else Base(None, floor, floor))
        older = await live.reader.inherited(ancestry, key)
    live.check()
    return Chain(values + older.values, older.base)


async def _read(stream: LayerStream, start: int, end: int) -> memoryview:
    data = stream.peek(start, end)
    return await stream.read(start, end) if data is None else data


def _delta_index(stream: LayerStream) -> DeltaIndex:
    if not isinstance(stream.layer.index, DeltaIndex):
        raise CorruptedError("a layer is listed as a delta layer and is none")
    return stream.layer.index


def _exchanged(index: IndexPart, inputs: Sequence[LayerDescriptor], made: Sequence[SealedLayer]) -> IndexPart:
    gone = {layer.name for layer in inputs}
    kept = tuple((layer, envelope) for layer, envelope in index.layers if layer.name not in gone)
    if len(kept) + len(gone) != len(index.layers):
        raise UnavailableError("the layers that were compacted have changed meanwhile")
    return replace(index, layers=(*kept, *((layer.descriptor, layer.envelope) for layer in made)))


def _install(live: Live, made: Sequence[SealedLayer]) -> None:
    for layer in made:
        live.layers.install(layer.descriptor, layer.opener, layer.index)
