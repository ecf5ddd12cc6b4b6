"""What a timeline is made of while its keys are there, and the bounds of it.

Everything that is plaintext hangs on one `Live`. When the keys are lost it is closed and taken off its timeline: reads
that are under way fail, and nothing that they still do can bring plaintext back.

The `Live` of a branch hangs on one `Live` of its ancestor, and is closed with it in the same step: it holds pages that
were made from the ancestor's data, and a read under way may have looked into what was just emptied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Final

from pageserver.flush import SealedLayer
from pageserver.index_part import IndexPart
from pageserver.ingest_memory import IngestMemory
from pageserver.layer.in_memory import InMemoryLayer, KeyedValue
from pageserver.layer.layer_map import LayerMap
from pageserver.layer.name import LayerDescriptor, LayerKind
from pageserver.layer_cache import LayerCache
from pageserver.open_layers import OpenLayers
from pageserver.page_reader import PageReader, PageRedo
from pageserver.read_path import Ancestry, Snapshot
from pageserver.remote_timeline import RemoteTimeline
from pageserver.retention import Retention
from shared.clock import Clock, SystemClock
from shared.crypto.envelope import Envelope
from shared.errors import LeaseExpiredError
from shared.lease import KeySource
from shared.retry import RetryPolicy
from shared.storage.base import ObjectStore
from shared.storage.threads import BlockingPool
from shared.telemetry import get_logger

_log = get_logger(__name__)

ListedLayer = tuple[LayerDescriptor, Envelope]
_MAX_RETIRED: Final = 4
_LOST: Final = "the keys were lost meanwhile"
_NO_SNAPSHOT: Final = 1 << 62
"""A generation of snapshots that never grows old."""


@dataclass(frozen=True, slots=True)
class TimelineConfig:
    """Bounds of one timeline. Sizes are of memory, except the first."""

    checkpoint_distance_bytes: int = 64 * 1024 * 1024
    """WAL that one in-memory layer may span before it is frozen."""
    checkpoint_timeout_s: float = 60.0
    """Age at which it is frozen in any case, so that safekeepers need not keep WAL for long."""
    in_memory_size_bytes: int = 256 * 1024 * 1024
    """Memory that it may take before it is frozen in any case."""
    frozen_layers: int = 2
    """Ingest waits while there are so many that are not flushed."""
    image_threshold_values: int = 512
    """Chain length past which a flush adds an image. To redo so many records takes a worker some 0.3 ms
    (`python -m benchmarks redo`). Most pages of an index, or of a table that rows are appended to, are
    full before that; images of all of them would be half of what their ingest costs."""
    chunk_size_bytes: int = 64 * 1024
    """Plaintext bytes of a layer that are sealed, read and cached together."""
    page_cache_bytes: int = 64 * 1024 * 1024
    chunk_cache_bytes: int = 128 * 1024 * 1024
    index_cache_bytes: int = 256 * 1024 * 1024
    compaction_l0_layers: int = 8
    """Flushed layers that are merged into L1 when there are so many."""
    compaction_l0_layers_at_once: int = 10
    """At most: what one run reads. Their indexes are in memory meanwhile."""
    ingest_l0_layers: int = 40
    """Ingest waits while there are so many that are not merged, or reads would visit more and more of them; not while
    compaction fails, for whatever reason."""
    compaction_target_bytes: int = 32 * 1024 * 1024
    """Plaintext of a layer that compaction makes, about. Its memory is some three times that."""
    image_layer_deltas: int = 3
    """Images are made for keys that so many L1 layers above the last image hold."""
    compaction_interval_s: float = 10.0
    """Between two looks for work, if no flush asks for one."""
    gc_interval_s: float = 60.0
    retention: Retention = field(default_factory=Retention)
    """Of new timelines."""
    lsn_lease_s: float = 600.0
    """How long an LSN lease lasts, at most, and if its holder does not say. So long nothing is removed after a
    start."""
    retry_delay_s: float = 1.0
    """Pause after a flush that failed and may be tried again."""
    drain_timeout_s: float = 1.0
    """How long dropping plaintext waits for reads under way to notice, before they are thrown out."""
    store_retry: RetryPolicy = field(default_factory=RetryPolicy)


@dataclass(frozen=True, slots=True)
class TimelineServices:
    """What timelines of one process share."""

    store: ObjectStore
    files: LayerCache
    keys: KeySource
    redo: PageRedo
    pool: BlockingPool
    clock: Clock = field(default_factory=SystemClock)
    compactions: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    """So many of them run at a time: each has some layers in memory."""
    memory: IngestMemory = field(default_factory=IngestMemory)


@dataclass(slots=True)
class Frozen:
    """An in-memory layer on its way out, with the position that it ends at."""

    layer: InMemoryLayer
    last_record_lsn: int
    prev_record_lsn: int
    stored: SealedLayer | None = None
    """Its sealed layer, once that is durable: when only the index failed, only the index is tried again."""
    images: tuple[ListedLayer, ...] = ()
    """Layers that are stored already, and are to be listed with it (bulk.py)."""

    @property
    def unlisted(self) -> tuple[ListedLayer, ...]:
        """What is stored of it."""
        return self.images if self.stored is None else (*self.images, (self.stored.descriptor, self.stored.envelope))


@dataclass(eq=False, slots=True)
class _Use:
    """Somebody who is inside of `in_use` or `working`."""

    task: asyncio.Task[object] | None
    cancelling: int
    """How often the task had been asked to end when it came in."""
    thrown_out: bool = False


@dataclass(slots=True)
class Live:
    """Everything that is plaintext, or known only under a lease."""

    remote: RemoteTimeline
    layers: OpenLayers
    reader: PageReader
    index: IndexPart
    open: InMemoryLayer
    last_record_lsn: int
    prev_record_lsn: int
    disk_consistent_lsn: int
    opened_at_s: float
    """When the open layer was opened, on the event loop's clock."""
    frozen: list[Frozen] = field(default_factory=list)
    """Oldest first."""
    closed: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while nobody is inside `in_use`."""
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when somebody left it, or a layer was retired."""
    parent: Live | None = None
    """Of the ancestor, at which `index.ancestor` points."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is closed."""
    memory: IngestMemory = field(default_factory=IngestMemory)
    freeze_early: Callable[[], None] = lambda: None
    """Called when the open layer is to be frozen, because all timelines together take too much."""
    layer_map: LayerMap = field(init=False)
    l0_layers: int = field(init=False)
    """Flushed layers that are not merged yet."""
    _own: Snapshot = field(init=False)
    children: dict[int, Live] = field(default_factory=dict)
    _generation: int = 0
    _leaving: list[tuple[int, asyncio.Event]] = field(default_factory=list)
    _users: dict[int, int] = field(default_factory=dict)
    _inside: dict[int, _Use] = field(default_factory=dict)
    """In the order in which they came."""
    _retired: list[tuple[int, InMemoryLayer]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.idle.set()
        self.accept(self.index)
        self.changed()
        if self.parent is not None:
            self.parent.children[id(self)] = self

    @classmethod
    def start(
        cls,
        remote: RemoteTimeline,
        index: IndexPart,
        services: TimelineServices,
        config: TimelineConfig,
        now_s: float,
        parent: Live | None = None,
    ) -> Live:
        """From a durable index: nothing in memory yet. `parent`: the ancestor's, for a branch."""
        layers = OpenLayers(
            remote,
            services.files,
            services.pool,
            index_capacity_bytes=config.index_cache_bytes,
            chunk_capacity_bytes=config.chunk_cache_bytes,
        )
        return cls(
            remote=remote,
            layers=layers,
            reader=PageReader(layers, services.redo, config.page_cache_bytes),
            index=index,
            open=InMemoryLayer(index.disk_consistent_lsn + 1),
            last_record_lsn=index.disk_consistent_lsn,
            prev_record_lsn=index.prev_record_lsn,
            disk_consistent_lsn=index.disk_consistent_lsn,
            opened_at_s=now_s,
            parent=parent,
            memory=services.memory,
        )

    def accept(self, index: IndexPart) -> None:
        """`index` is durable. `changed` is to be called in the same step."""
        self.index = index
        self.layer_map = LayerMap(layer for layer, _ in index.layers)
        self.l0_layers = sum(layer.level == 0 and layer.kind is LayerKind.DELTA for layer, _ in index.layers)

    def account(self) -> None:
        """Say what the layers in memory take."""
        if not self.closed:
            frozen = sum(frozen.layer.size_bytes for frozen in self.frozen)
            self.memory.changed(id(self), self.open.size_bytes, frozen, self.freeze_early)

    def changed(self) -> None:
        """Layers came or went: readers that start from now on see that."""
        in_memory = (self.open, *(frozen.layer for frozen in reversed(self.frozen)))
        self._own = Snapshot(in_memory, self.layer_map)
        self._generation += 1

    @property
    def snapshot(self) -> Snapshot:
        """What there is to read at this moment. Good inside of `in_use`."""
        return self._own if self.parent is None else self._own._replace(ancestor=self.ancestry())

    def ancestry(self) -> Ancestry | None:
        """What a branch reads below its own values; None for a timeline that is none."""
        parent, ancestor = self.parent, self.index.ancestor
        return None if parent is None or ancestor is None else Ancestry(parent.snapshot, parent.layers, ancestor.lsn)

    async def older_readers_left(self) -> None:
        """Return when nobody uses a snapshot from before the last `changed`, or the plaintext was dropped."""
        if min(self._users, default=self._generation) < self._generation and not self.closed:
            left = asyncio.Event()
            self._leaving.append((self._generation, left))
            await left.wait()

    def _tell_leaving(self) -> None:
        oldest = min(self._users, default=self._generation)
        for generation, left in self._leaving:
            if oldest >= generation or self.closed:
                left.set()
        self._leaving = [each for each in self._leaving if not each[1].is_set()]

    def retire(self, layer: InMemoryLayer) -> None:
        """`snapshot` has no use for it any more; snapshots taken before may have."""
        self._retired.append((self._generation, layer))
        if len(self._retired) > _MAX_RETIRED:
            self._retired.pop(0)  # nobody comes for them: let it be freed at once
        self.left.set()

    def unused(self) -> list[InMemoryLayer]:
        """Retired layers that nobody can be reading, once each."""
        oldest = min(self._users, default=self._generation)
        unused = [layer for generation, layer in self._retired if generation <= oldest]
        self._retired = [(generation, layer) for generation, layer in self._retired if generation > oldest]
        return unused

    def freeze(self, now_s: float) -> bool:
        """The open layer takes no more values. Returns False when nothing was ingested since the last time."""
        end = self.last_record_lsn + 1
        if end <= self.open.lsn_start:
            self.opened_at_s = now_s
            return False
        self.open.freeze(end)
        self.frozen.append(Frozen(self.open, self.last_record_lsn, self.prev_record_lsn))
        self.open = InMemoryLayer(end)
        self.opened_at_s = now_s
        self.changed()
        self.account()
        return True

    def freeze_one(
        self,
        values: Iterable[KeyedValue],
        last_record_lsn: int,
        prev_record_lsn: int,
        images: tuple[ListedLayer, ...],
        now_s: float,
    ) -> None:
        """A frozen layer of one record's `values`, with `images`, while nothing else is in memory. It is behind
        `last_record_lsn`, so nobody reads it, until it is flushed."""
        if self.frozen or self.open.key_count or self.open.lsn_start != self.last_record_lsn + 1:
            raise RuntimeError("there are values that are not flushed")
        self.open.put_all(values)
        self.open.freeze(last_record_lsn + 1)
        self.frozen.append(Frozen(self.open, last_record_lsn, prev_record_lsn, images=images))
        self.open = InMemoryLayer(last_record_lsn + 1)
        self.opened_at_s = now_s
        self.changed()
        self.account()

    def working(self) -> AbstractContextManager[None]:
        """As `in_use`, for those who hold plaintext and no snapshot, for long: nothing waits for them to leave but the
        loss of keys. They keep the layers that they read by other means (Compactor.lock)."""
        return self._counted(_NO_SNAPSHOT)

    def in_use(self) -> AbstractContextManager[None]:
        """Around whatever holds plaintext, or a snapshot, over an await."""
        own = self._counted(self._generation)
        return own if self.parent is None else self._with_parent(self.parent, own)

    @contextmanager
    def _with_parent(self, parent: Live, own: AbstractContextManager[None]) -> Iterator[None]:
        with parent.in_use(), own:
            yield

    @contextmanager
    def _counted(self, generation: int) -> Iterator[None]:
        self.check()  # nobody comes in any more when it is waited for the last to leave
        task = asyncio.current_task()
        use = _Use(task, 0 if task is None else task.cancelling())
        self._inside[id(use)] = use
        self._users[generation] = self._users.get(generation, 0) + 1
        self.idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if use.thrown_out and task is not None and task.uncancel() <= use.cancelling:
                raise LeaseExpiredError(_LOST) from None  # it was we who cancelled it, and nobody else
            raise
        finally:
            del self._inside[id(use)]
            self._users[generation] -= 1
            if not self._users[generation]:
                del self._users[generation]
                if not self._users:
                    self.idle.set()
                if self._retired:
                    self.left.set()
                if self._leaving:
                    self._tell_leaving()

    def check(self) -> None:
        """Raises LeaseExpiredError when the plaintext was dropped meanwhile."""
        if self.closed:
            raise LeaseExpiredError(_LOST)

    async def drained(self, patience_s: float) -> None:
        """Return when nobody is inside of `in_use` or `working` any more, after `close`.

        Whoever is still there after `patience_s`, in a call that does not come back, is thrown out: the call is
        cancelled, and raises LeaseExpiredError. There is no other bound: who says that nothing is held has to wait
        until it is true.
        """
        try:
            async with asyncio.timeout(patience_s):
                await self.idle.wait()
        except TimeoutError:
            _log.warning(
                "reads were under way long after their keys were lost: cancelled",
                timeline_id=str(self.index.timeline_id),
                reads=self._throw_out(),
            )
            await self.idle.wait()

    def _throw_out(self) -> int:
        """Returns how many tasks were cancelled."""
        # Of a task that is in here more than once the innermost use: it is the one that the cancellation meets first.
        innermost = {use.task: use for use in self._inside.values() if use.task is not None}
        hanging = {task: use for task, use in innermost.items() if not use.thrown_out}
        for task, use in hanging.items():
            use.thrown_out = True
            task.cancel()
        return len(hanging)

    def close(self) -> None:
        """Forget all plaintext, also that of branches. Idempotent. No await in here."""
        self.closed = True
        self.memory.forget(id(self))
        self.ended.set()
        for child in list(self.children.values()):
            child.close()
        if self.parent is not None:
            self.parent.children.pop(id(self), None)
        self.layers.close()
        self.reader.close()
        for layer in self._own.in_memory:
            layer.clear()
        for _, layer in self._retired:
            layer.clear()
        self._retired.clear()
        self.frozen.clear()
        self.left.set()
        self._tell_leaving()
        self._own = Snapshot((), LayerMap())
