"""A frozen in-memory layer → a sealed delta layer.

    which keys get an image  →  make those images  →  plaintext, sorted  →  seal  →  upload  →  local copy

Images are what bounds the work of a read: with full_page_writes off a page's chain would grow for ever. So a key whose
chain since its last image has become longer than a threshold gets one more value here, what it is at its last LSN
(Neon allows images inside of delta layers too). They are made from the frozen layer as any reader would, through redo,
while ingest goes on in the next layer.

All of it runs on the event loop in slices, with the sealing in a thread: a thread for the rest would hold the GIL for
5 ms at a time (sys.getswitchinterval), and every read would wait for it. Measured in benchmarks/pageserver_storage.py.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import itemgetter
from time import perf_counter
from typing import Final

from pageserver.layer.delta import DeltaBuilder, DeltaIndex
from pageserver.layer.image import ImageBuilder
from pageserver.layer.in_memory import InMemoryLayer, image_points, tail_length
from pageserver.layer.name import LayerDescriptor, covering_range, layer_name
from pageserver.layer.opened import LayerIndex
from pageserver.layer_cache import LayerCache
from pageserver.open_layers import OpenLayers
from pageserver.page_reader import PageReader
from pageserver.read_path import Snapshot
from pageserver.remote_timeline import RemoteTimeline
from shared.crypto.envelope import Envelope
from shared.crypto.sealed_object import HEADER_SIZE_BYTES, ObjectLayout, ObjectOpener, seal_object
from shared.errors import IntegrityError, InvalidInputError, KeyAccessError, KeylakeError
from shared.keyspace import KeyRange
from shared.storage.threads import BlockingPool
from shared.telemetry import get_logger

SLICE_S: Final = 0.001
"""How long the loop is held at a time."""
_LOOK_EVERY: Final = 16
_SORT_SLICE_KEYS: Final = 8192
_BATCH_KEYS: Final = 128
_log = get_logger(__name__)


class Pacer:
    """Hands the event loop back when this task has had it for SLICE_S."""

    __slots__ = ("_check", "_count", "_since")

    def __init__(self, check: Callable[[], None]) -> None:
        """`check` is called each time the loop comes back, and may raise."""
        self._since = perf_counter()
        self._count = 0
        self._check = check

    def is_over(self) -> bool:
        """Is it time to `pause`? Ask often: it looks at the clock every few calls only."""
        self._count += 1
        return self._count % _LOOK_EVERY == 0 and perf_counter() - self._since > SLICE_S

    async def pause(self) -> None:
        """Let others have the loop."""
        await asyncio.sleep(0)
        self._check()
        self._since = perf_counter()


@dataclass(slots=True)
class FlushStats:
    """What flushing one layer took."""

    values: int = 0
    keys: int = 0
    images: int = 0
    plaintext_size_bytes: int = 0
    images_s: float = 0.0
    build_s: float = 0.0
    seal_s: float = 0.0
    upload_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Built:
    """A layer in plaintext, and its index as a reader would have it."""

    plaintext: bytearray
    index: LayerIndex
    key_range: KeyRange
    """For which it is to be listed."""


async def chains_before(layers: OpenLayers, snapshot: Snapshot, keys: Iterable[bytes]) -> dict[bytes, int]:
    """For each of `keys`: how many values of the layers of `snapshot` a read of the newest version must apply.

    Walks layers from the newest down and asks each for the keys not found yet. Keys that none has are left out.
    """
    found: dict[bytes, int] = {}
    missing = set(keys)
    for layer in snapshot.layer_map.layers:
        if not missing:
            break
        opened = layers.peek(layer) or await layers.open(layer)
        if isinstance(opened.index, DeltaIndex):
            here = opened.index.chain_lengths(missing)
            found |= here
            missing -= here.keys()
        else:  # complete for its keys: nothing older counts
            missing = {key for key in missing if key not in layer.key_range}
        await asyncio.sleep(0)
    return found


class ImageMaker:
    """Makes the images that a frozen layer needs."""

    def __init__(
        self,
        reader: PageReader,
        snapshot: Snapshot,
        frozen: InMemoryLayer,
        before: dict[bytes, int],
        threshold: int,
        stats: FlushStats,
    ) -> None:
        """`snapshot` ends with `frozen`; `before` is the chain length of its keys in older layers."""
        self._reader = reader
        self._snapshot = snapshot
        self._frozen = frozen
        self._before = before
        self._threshold = threshold
        self._stats = stats

    async def images(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """Images of those of `keys` whose chain is longer than the threshold, at the LSN of their last value.

        A key that cannot be read now is left out: its records are kept, so nothing is lost, and the next layer tries
        again. Raises KeyAccessError only.
        """
        wanted = [key for key in keys if self._is_long(key)]
        if not wanted:
            return {}
        started = perf_counter()
        for key in wanted:
            await self._divide(key)
        results = await asyncio.gather(
            *(self._reader.value(self._snapshot, key, self._frozen.last_lsn(key)) for key in wanted),
            return_exceptions=True,
        )
        images: dict[bytes, bytes] = {}
        for key, result in zip(wanted, results, strict=True):
            if isinstance(result, bytes):
                images[key] = result
            elif isinstance(result, KeylakeError) and not isinstance(result, KeyAccessError):
                log = _log.error if isinstance(result, IntegrityError) else _log.info
                log("page image was not made", code=result.code, error=str(result))
            elif result is not None:
                raise result
        self._stats.images += len(images)
        self._stats.images_s += perf_counter() - started
        return images

    async def _divide(self, key: bytes) -> None:
        """Cut a very long run of the layer itself: a read may be for an LSN in the middle of it."""
        for lsn in image_points(self._frozen.run(key)):
            try:
                value = await self._reader.value(self._snapshot, key, lsn)
            except KeyAccessError:
                raise
            except KeylakeError:
                return  # the image at the end will fail as well, and say so
            if value is not None:
                self._frozen.insert_image(key, lsn, value)
                self._stats.images += 1

    def _is_long(self, key: bytes) -> bool:
        run = self._frozen.run(key)
        older = self._before.get(key, 0)
        if len(run) // 3 + older <= self._threshold:
            return False
        length, started = tail_length(run)
        return length + (0 if started else older) > self._threshold


async def build_delta(
    frozen: InMemoryLayer,
    lsn_end: int,
    before: dict[bytes, int],
    maker: ImageMaker,
    check: Callable[[], None],
    stats: FlushStats,
) -> Built:
    """The plaintext of the layer, in slices. `check` raises when the values are gone."""
    pacer = Pacer(check)
    started = perf_counter()
    # Sorting in slices, then once more over the sorted slices: timsort only merges those, so that no single call holds
    # the loop for as long as sorting all of it would.
    keys: list[bytes] = [key for key, _ in frozen.runs()]
    ordered: list[bytes] = []
    for start in range(0, len(keys), _SORT_SLICE_KEYS):
        ordered += sorted(keys[start : start + _SORT_SLICE_KEYS])
        await asyncio.sleep(0)
        check()
    ordered.sort()
    builder = DeltaBuilder()
    for start in range(0, len(ordered), _BATCH_KEYS):
        batch = ordered[start : start + _BATCH_KEYS]
        images = await maker.images(batch)
        check()
        for key in batch:
            builder.add_run(key, frozen.run(key), before.get(key, 0), images.get(key))
            if pacer.is_over():
                await pacer.pause()
    span = builder.key_span
    plaintext, index = builder.finish(frozen.lsn_start, lsn_end)
    stats.keys, stats.values = index.footer.keys, index.footer.values
    stats.build_s = perf_counter() - started - stats.images_s
    return Built(plaintext, index, covering_range(*span))


async def build_image(values: Iterable[tuple[bytes, bytes]], lsn: int, check: Callable[[], None]) -> Built:
    """An image layer of all of `values`, in any order, each key once. In slices. Raises InvalidInputError."""
    pacer = Pacer(check)
    builder = ImageBuilder()
    last = b""
    for key, value in sorted(values, key=itemgetter(0)):
        if key <= last:
            raise InvalidInputError("a key was given twice")
        last = key
        builder.add(key, value)
        if pacer.is_over():
            await pacer.pause()
    if not last:
        raise InvalidInputError("a timeline starts with some values")
    span = builder.key_span
    plaintext, index = builder.finish(lsn)
    return Built(plaintext, index, covering_range(*span))


@dataclass(frozen=True, slots=True)
class SealedLayer:
    """A layer that no index lists yet, ready to be uploaded and read."""

    descriptor: LayerDescriptor
    envelope: Envelope
    opener: ObjectOpener
    index: LayerIndex


async def seal_layer(
    built: Built, remote: RemoteTimeline, pool: BlockingPool, chunk_size_bytes: int, stats: FlushStats, level: int = 0
) -> tuple[SealedLayer, bytes]:
    """Seal a layer under a fresh DEK, in a thread. Returns it with the sealed object; the plaintext is gone then."""
    footer = built.index.footer
    name = layer_name(footer.kind, footer.lsn_start, footer.lsn_end, remote.generation, secrets.token_hex(8))
    object_key = remote.layer_object_key(name)
    key, envelope = await remote.new_layer_key(object_key, footer.kind)
    context = remote.object_context(object_key, footer.kind)
    started = perf_counter()
    sealed = await pool.run_to_end(seal_object, key, context, built.plaintext, chunk_size_bytes)
    stats.seal_s = perf_counter() - started
    stats.plaintext_size_bytes = len(built.plaintext)
    built.plaintext.clear()
    descriptor = LayerDescriptor(
        name, footer.kind, built.key_range, footer.lsn_start, footer.lsn_end, len(sealed), level
    )
    opener = ObjectOpener(key, context, ObjectLayout.parse(sealed[:HEADER_SIZE_BYTES], len(sealed)))
    return SealedLayer(descriptor, envelope, opener, built.index), sealed


async def upload_layer(
    layer: SealedLayer, sealed: bytes, remote: RemoteTimeline, files: LayerCache, stats: FlushStats
) -> None:
    """Make a sealed layer durable and keep a local copy. It does not count before an index lists it."""
    started = perf_counter()
    await remote.upload_layer(layer.descriptor, layer.envelope, sealed)
    await files.insert(remote.layer_object_key(layer.descriptor.name), sealed)
    stats.upload_s = perf_counter() - started
