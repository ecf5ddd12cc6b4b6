"""One timeline of one project: its values from ingest, its layers, its reads.

Theory of operation. Ingest puts values into the *open* in-memory layer. When that spans checkpoint_distance_bytes of
WAL, or is old enough, it is *frozen* and a new one opened. Frozen layers are flushed in the background, oldest first,
into sealed delta layers (flusher.py), and the index lists them (remote_timeline.py). A read looks at a snapshot of all
of it (read_path.py). Compaction (compactor.py) makes few layers of many, and images; GC (collector.py) removes what
lies below the retention window.

    initdb_lsn ≤ remote_consistent_lsn ≤ disk_consistent_lsn ≤ last_record_lsn

`last_record_lsn`: ingested, readable. `disk_consistent_lsn`: in sealed layers outside of this process (Neon: on local
disk; here: in the object store, not listed yet). `remote_consistent_lsn`: listed by a durable index. Only the last one
survives this process, so only it may be announced to safekeepers, which drop WAL below it (Neon invariant 4).

When the keys are lost, `drop_plaintext` closes everything that is plaintext (live.py) and forgets what was not durable.
`reopen` loads the durable state again, and ingest starts over at its last_record_lsn, which has gone back.

A branch is a timeline with an *ancestor*: below its ancestor_lsn it has nothing of its own, and reads go on there. The
ancestor's index lists the branch before the branch's own index exists, so that garbage collection knows of it whoever
dies when. Invariant: ancestor_lsn ≤ the ancestor's remote_consistent_lsn, so a branch never waits for its ancestor.

What may interleave at an `await`. One caller puts, one task flushes (under `Flusher.lock`), any number read. A put
changes nothing until its values are in, and moves last_record_lsn in the same step. A reader takes `Live.snapshot` once
and `Live` keeps what that holds alive (`in_use`); a flush swaps layer for layer in one step. Whoever awaited something
calls `Live.check` and then `Lease.check` before it uses or returns what it has.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Final

from pageserver.bulk import write_images
from pageserver.collector import Collector
from pageserver.compactor import Compactor
from pageserver.contents import Inspector
from pageserver.flush import FlushStats, build_image, seal_layer, upload_layer
from pageserver.flusher import Flusher
from pageserver.index_part import MAX_BRANCHES, Ancestor, IndexPart
from pageserver.key_upkeep import TimelineKeys
from pageserver.known_timeline import KnownTimeline
from pageserver.layer.in_memory import KeyedValue
from pageserver.live import Live, TimelineConfig, TimelineServices
from pageserver.lsn_waiters import LsnWaiters
from pageserver.readers import Readers
from pageserver.remote_timeline import FencedError, RemoteTimeline, TimelineExistsError
from pageserver.retention import HistoryPoint
from pageserver.scrub import Scrubber
from shared.errors import (
    ConflictError,
    CorruptedError,
    InvalidInputError,
    KeyAccessError,
    KeylakeError,
    LeaseExpiredError,
    NotFoundError,
    UnavailableError,
)
from shared.failpoints import failpoint
from shared.ids import ProjectId, TimelineId
from shared.keyspace import KeyRange, RelTag
from shared.lease import Lease
from shared.lsn import Lsn
from shared.telemetry import get_logger
from shared.wal.page import boundary_of, is_record_boundary
from shared.wal.reader import RECORD_HEADER_SIZE_BYTES

__all__ = [
    "AncestorNotLoadedError",
    "FencedError",
    "FindTimeline",
    "InitdbPosition",
    "NoSuchTimelineError",
    "Timeline",
    "TimelineConfig",
    "TimelineExistsError",
    "TimelineServices",
]

_SIZE_BYTES: Final = 4
_SCAN_BATCH_KEYS: Final = 256
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class InitdbPosition:
    """Where the history of a new timeline begins. LSNs are plain integers."""

    system_identifier: int
    initdb_lsn: int
    """End of initdb's last record."""
    prev_record_lsn: int
    """Start of it."""


FindTimeline = Callable[[ProjectId, TimelineId], "Timeline"]
"""Raises NotFoundError, or why it is not loaded."""


def _no_timeline(project_id: ProjectId, timeline_id: TimelineId) -> Timeline:
    raise NotFoundError("there is no other timeline")


class NoSuchTimelineError(NotFoundError):
    """The object store has none: it was never created completely, or it is deleted."""


class AncestorNotLoadedError(UnavailableError):
    """A branch has to wait for the timeline that it was branched off."""


def some_record_before(lsn: int) -> int:
    """A start for the last record before `lsn` when nobody knows the true one. Postgres wants xl_prev to be lower than
    the record that it starts from, and looks no further (ValidXLogRecordHeader, randAccess)."""
    return lsn - RECORD_HEADER_SIZE_BYTES


class Timeline(KnownTimeline):
    """Made by `create`, `branch` or `open`. LSNs are plain integers; `lsn` of a read is the version, inclusive."""

    def __init__(
        self,
        project_id: ProjectId,
        timeline_id: TimelineId,
        services: TimelineServices,
        lease: Lease,
        config: TimelineConfig,
        find: FindTimeline = _no_timeline,
    ) -> None:
        """`find` gives the timelines that this one, or its ancestor, was branched off."""
        self.project_id = project_id
        self.timeline_id = timeline_id
        self.lease = lease
        self.config = config
        self._services = services
        self._find = find
        self._live: Live | None = None
        self._leaving: list[Live] = []  # closed, and somebody may be inside still
        self._index: IndexPart | None = None  # the last durable one: known without keys, too
        self.readers = Readers()
        self._waiters = LsnWaiters()
        self._flusher = Flusher(services, config, lambda: self._live, self._published)
        self.compactor = Compactor(services, config, self._flusher, lambda: self._live)
        self.history = Collector(services, config, self._flusher, self.compactor, lambda: self._live, self._known_index)
        # A branch point is read for as long as the branch exists.
        self.history.retain_lsns = lambda: self.branches.values()
        self.inspector = Inspector(services, lambda: self._live)
        self.scrubber = Scrubber(services, self._flusher, self.compactor, lambda: self._live)
        self.keys = TimelineKeys(services, config, self._flusher, self.compactor.lock, lambda: self._live)

    # --- beginning ---

    @classmethod
    async def create(
        cls,
        project_id: ProjectId,
        timeline_id: TimelineId,
        services: TimelineServices,
        lease: Lease,
        config: TimelineConfig,
        position: InitdbPosition,
        values: Iterable[tuple[bytes, bytes]],
    ) -> Timeline:
        """A new timeline whose first image layer is `values`, (key, whole value), as of position.initdb_lsn.

        Raises TimelineExistsError when it was created before; KeyAccessError; UnavailableError. After an error it may
        be tried again: what was written counts only once the index lists it.
        """
        timeline = cls(project_id, timeline_id, services, lease, config)
        remote = timeline._remote()
        if await remote.load() is not None:
            raise TimelineExistsError("the timeline exists")
        built = await build_image(values, position.initdb_lsn, lease.check)
        stats = FlushStats()
        layer, sealed = await seal_layer(built, remote, services.pool, config.chunk_size_bytes, stats)
        await upload_layer(layer, sealed, remote, services.files, stats)
        failpoint("create-stored")
        index = IndexPart(
            project_id,
            timeline_id,
            position.system_identifier,
            position.initdb_lsn,
            position.initdb_lsn,
            position.prev_record_lsn,
            ((layer.descriptor, layer.envelope),),
            retention=config.retention,
            history=(HistoryPoint(int(services.clock.now().timestamp()), position.initdb_lsn),),
        )
        await remote.publish(index)
        timeline._start(remote, index)
        return timeline

    @classmethod
    async def branch(
        cls,
        project_id: ProjectId,
        timeline_id: TimelineId,
        services: TimelineServices,
        lease: Lease,
        config: TimelineConfig,
        ancestor: Timeline,
        lsn: int,
        find: FindTimeline,
    ) -> Timeline:
        """A new timeline that begins as what `ancestor` is at `lsn`, rounded (`boundary_of`). Copies nothing.

        Raises as `create`, and as `Timeline.add_branch`. Again, after an error or a crash, with the same LSN: goes on.
        """
        timeline = cls(project_id, timeline_id, services, lease, config, find)
        remote = timeline._remote()
        if await remote.load() is not None:
            raise TimelineExistsError("the timeline exists")
        lsn = boundary_of(lsn)
        prev_record_lsn = await ancestor.add_branch(timeline_id, lsn)
        failpoint("branch-noted")
        index = IndexPart(
            project_id,
            timeline_id,
            ancestor.system_identifier,
            ancestor.initdb_lsn,
            lsn,
            prev_record_lsn,
            (),
            Ancestor(ancestor.project_id, ancestor.timeline_id, lsn),
            retention=config.retention,
            history=(HistoryPoint(int(services.clock.now().timestamp()), lsn),),
        )
        await remote.publish(index)
        timeline._start(remote, index)
        return timeline

    @classmethod
    async def open(
        cls,
        project_id: ProjectId,
        timeline_id: TimelineId,
        services: TimelineServices,
        lease: Lease,
        config: TimelineConfig,
        *,
        at_least_lsn: int = 0,
        find: FindTimeline = _no_timeline,
    ) -> Timeline:
        """Load a timeline from the object store. `at_least_lsn`: what safekeepers know to be durable here.

        Raises NotFoundError when there is none, AncestorNotLoadedError, IntegrityError when it is damaged or older than
        it was.
        """
        timeline = cls(project_id, timeline_id, services, lease, config, find)
        await timeline.reopen(at_least_lsn=at_least_lsn)
        return timeline

    async def reopen(self, *, at_least_lsn: int = 0) -> None:
        """Load the durable state, after `drop_plaintext` or a fault. What was not durable is forgotten.

        `last_record_lsn` goes back to what the index says: ingest starts over from there. Raises as `open`.
        """
        await self.drop_plaintext()
        # A flush of the life before may still be talking to the store. Its end is waited for, or it could take the
        # very slot of the index that this life will want.
        async with self._flusher.lock:
            remote = self._remote()
            index = await remote.load(at_least_lsn=max(at_least_lsn, self.remote_consistent_lsn))
            if index is None:
                raise NoSuchTimelineError("no such timeline")
            await self._services.files.retain(
                f"{remote.prefix}layers/", (remote.layer_object_key(layer.name) for layer, _ in index.layers)
            )
            self.lease.check()
            self._start(remote, index)

    def _remote(self) -> RemoteTimeline:
        services = self._services
        return RemoteTimeline(
            self.project_id,
            self.timeline_id,
            services.store,
            services.files,
            services.keys,
            self.lease,
            self.config.store_retry,
        )

    def _start(self, remote: RemoteTimeline, index: IndexPart) -> None:
        # Known from now on, whatever comes of it: `await_ancestor` has to know for whom to wait.
        self._index = index
        parent = None if index.ancestor is None else self._live_ancestor(index.ancestor)
        now_s = asyncio.get_running_loop().time()
        self._live = live = Live.start(remote, index, self._services, self.config, now_s, parent)
        live.freeze_early = lambda: self._freeze(live)
        self._flusher.reset()
        self._waiters.release(index.disk_consistent_lsn)

    def _published(self, index: IndexPart) -> None:
        self._index = index
        self.compactor.flushed()

    def _find_ancestor(self, ancestor: Ancestor) -> Timeline:
        try:
            return self._find(ancestor.project_id, ancestor.timeline_id)
        except NotFoundError:
            raise AncestorNotLoadedError("the timeline's ancestor is not loaded yet") from None

    def _live_ancestor(self, ancestor: Ancestor) -> Live:
        try:
            return self._find_ancestor(ancestor).require_live()
        except UnavailableError:
            raise AncestorNotLoadedError("the timeline's ancestor is not loaded yet") from None

    # --- branches ---

    def reads(self, project_id: ProjectId) -> bool:
        """Does an ancestor of it lie in this project?"""
        ancestor = self.ancestor
        if ancestor is None or ancestor.project_id == project_id:
            return ancestor is not None
        try:
            return self._find_ancestor(ancestor).reads(project_id)
        except KeylakeError:
            return False  # then it is not loaded either

    async def add_branch(self, branch: TimelineId, lsn: int) -> int:
        """Note in the index that `branch` reads this timeline at `lsn`, for as long as `remove_branch` is not called.

        Returns the start of the last record before `lsn`, or what may stand for it. Everything up to `lsn` is durable
        when it returns. Raises InvalidInputError for an LSN that is no record boundary or below `oldest_lsn`,
        UnavailableError for one that is not ingested yet, ConflictError when the branch is noted at another LSN or
        there are too many, and what flushing and publishing raise.
        """
        if not is_record_boundary(lsn):
            raise InvalidInputError(f"no log can begin at {Lsn(lsn)}")
        live = self.readable(lsn)
        self._check_branch_point(lsn)
        prev_record_lsn = live.prev_record_lsn if lsn == live.last_record_lsn else some_record_before(lsn)
        known = self.branches.get(branch)
        if known is not None:
            if known != lsn:
                raise ConflictError(f"the branch was begun at {Lsn(known)}")
            return prev_record_lsn
        if lsn > self.remote_consistent_lsn:
            await self.checkpoint()
        await self._publish_branches(lambda branches: self._with_branch(branches, branch, lsn))
        return prev_record_lsn

    def _check_branch_point(self, lsn: int) -> None:
        if lsn < self.oldest_lsn:
            raise InvalidInputError(f"LSN {Lsn(lsn)} is below {Lsn(self.oldest_lsn)}, the oldest one of this branch")

    def _with_branch(self, branches: Mapping[TimelineId, int], branch: TimelineId, lsn: int) -> dict[TimelineId, int]:
        self._check_branch_point(lsn)  # once more: what is in the index decides, not what was there a while ago
        if len(branches) >= MAX_BRANCHES:
            raise ConflictError(f"a timeline has at most {MAX_BRANCHES} branches")
        return {**branches, branch: lsn}

    async def remove_branch(self, branch: TimelineId) -> None:
        """The branch is gone, and nothing reads for it any more. Idempotent."""
        if branch in self.branches:
            await self._publish_branches(
                lambda branches: {known: lsn for known, lsn in branches.items() if known != branch}
            )

    async def _publish_branches(self, change: Callable[[Mapping[TimelineId, int]], dict[TimelineId, int]]) -> None:
        live = self._writable()
        await self._flusher.publish(live, lambda now: replace(now, branches=change(now.branches)))
        live.check()

    @property
    def ancestor_is_usable(self) -> bool:
        """False while a branch cannot be loaded because its ancestor is not."""
        if self.ancestor is None:
            return True
        try:
            self._find_ancestor(self.ancestor).require_live()
        except KeylakeError:
            return False
        return True

    async def ended(self) -> None:
        """Return when its plaintext is gone: the keys were lost, or its ancestor's plaintext is gone."""
        live = self._live
        if live is not None:
            await live.ended.wait()

    @contextmanager
    def held(self, lsn: int) -> Iterator[None]:
        """Keep an LSN readable for as long as it takes. Raises InvalidInputError when it is not any more."""
        with self.holder_of(lsn).history.held(lsn):
            yield

    def lease_lsn(self, lsn: int, ttl_s: float | None = None) -> float:
        """As `Collector.lease`."""
        return self.holder_of(lsn).history.lease(lsn, ttl_s)

    def holder_of(self, lsn: int) -> Timeline:
        """Whose garbage collection decides about this LSN: its own, or below the branch point its ancestor's."""
        ancestor = self.ancestor
        if ancestor is None or lsn >= ancestor.lsn:
            return self
        return self._find_ancestor(ancestor).holder_of(lsn)

    def check_lease(self) -> None:
        """Raises KeyAccessError unless the keys of all that it reads, its ancestors' too, may be used now."""
        self.lease.check()
        if self.ancestor is not None:
            self._find_ancestor(self.ancestor).check_lease()

    # --- writing ---

    async def put_batch(self, values: Sequence[KeyedValue], last_record_lsn: int, prev_record_lsn: int) -> None:
        """Take in what whole records come to: `values`, (key, lsn, ValueKind, payload), in LSN order per key.

        `last_record_lsn` is the end of the last of these records and `prev_record_lsn` its start; all LSNs of `values`
        lie above the former last_record_lsn. Readers see all of it or nothing. Waits while too many layers are not
        flushed. One caller at a time.

        Raises KeyAccessError, FencedError, ConflictError (not in order, or stopped by a fault).
        """
        live = self._writable()
        if self._flusher.must_wait(live) or self._services.memory.is_full:
            await self._flusher.room(live)
            await self._services.memory.room()
            live.check()
            self._writable()
        _check_order(live, values, last_record_lsn)
        live.open.put_all(values)
        live.last_record_lsn = last_record_lsn
        live.prev_record_lsn = prev_record_lsn
        if live.open.long_runs:
            self._flusher.long_runs()
        if self._waiters:
            self._waiters.release(last_record_lsn)
        if (
            last_record_lsn + 1 - live.open.lsn_start >= self.config.checkpoint_distance_bytes
            or live.open.size_bytes >= self.config.in_memory_size_bytes
        ):
            self._freeze(live)
        else:
            live.account()

    async def put_bulk(
        self,
        key_range: KeyRange,
        images: AsyncIterable[tuple[bytes, bytes]],
        values: Sequence[KeyedValue],
        last_record_lsn: int,
        prev_record_lsn: int,
    ) -> None:
        """Take in one record that comes to more than memory is to hold: `images`, (key, whole value) in the order of
        keys, which are all that exists in `key_range` from then on; and `values`, as for `put_batch`, of other keys.

        Durable when it returns, and readers see all of it or nothing. One caller at a time, with `put_batch`; `images`
        may read the timeline. Raises as `put_batch`, and what flushing raises: then nothing was taken in, or all of it
        once the timeline was opened again.
        """
        await self.checkpoint()
        async with self.compactor.lock:
            live = self._writable()
            _check_order(live, values, last_record_lsn)
            with live.working():
                listed = await write_images(live, self._services, self.config, key_range, images, last_record_lsn)
            self._writable()
            failpoint("bulk-stored")
            now_s = asyncio.get_running_loop().time()
            live.freeze_one(values, last_record_lsn, prev_record_lsn, listed, now_s)
            await self._flusher.flush(live)
        self._waiters.release(last_record_lsn)

    async def checkpoint(self) -> None:
        """Flush everything ingested so far; durable when it returns. Raises what flushing raises."""
        live = self._writable()
        self._freeze(live)
        await self._flusher.flush(live)

    async def run(self) -> None:
        """Freeze by age, flush, compact, collect garbage. The service's TaskGroup owns it; until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._flusher.run())
            group.create_task(self.compactor.run())
            group.create_task(self.history.run())

    def _freeze(self, live: Live) -> None:
        if live.freeze(asyncio.get_running_loop().time()):
            self._flusher.frozen()

    def _writable(self) -> Live:
        live = self.require_live()
        self._flusher.check_running()
        return live

    def require_live(self) -> Live:
        """Raises KeyAccessError, UnavailableError."""
        self.check_lease()
        if self._live is None or self._live.closed:
            raise UnavailableError("the timeline is being loaded")
        return self._live

    # --- reading ---

    async def wait_lsn(self, lsn: int, timeout_s: float) -> None:
        """Return when `lsn` is ingested. Raises UnavailableError after `timeout_s`, KeyAccessError when keys are
        lost."""
        if self.require_live().last_record_lsn >= lsn:
            return
        try:
            await self._waiters.wait(lsn, timeout_s)
        except TimeoutError:
            raise UnavailableError(
                f"LSN {Lsn(lsn)} did not arrive in time, the last one is {Lsn(self.last_record_lsn)}"
            ) from None

    async def get_page(self, rel: RelTag, block: int, lsn: int) -> bytes:
        """One block, 8192 bytes. Whether it lies below the fork's size is the caller's to know.

        Raises NotFoundError when it never was written, InvalidInputError for an LSN before the timeline began,
        UnavailableError for one that is not ingested yet, KeyAccessError, IntegrityError.
        """
        page = await self.get(rel.block_key(block), lsn)
        if page is None:
            raise _no_block(block, lsn)
        return page

    async def get(self, key: bytes, lsn: int) -> bytes | None:
        """The value of `key`, None when it does not exist. Raises as `get_page`."""
        live = self.readable(lsn)
        cached = live.reader.cached(key, lsn)
        if cached is not None:
            value = cached.value
        else:
            with live.in_use():
                value = await live.reader.value(live.snapshot, key, lsn)
            live.check()
        # Invariant: after decrypting and redo, and before anything leaves.
        self.check_lease()
        return value

    async def get_pages(self, rel: RelTag, blocks: Sequence[int], lsn: int) -> list[bytes]:
        """Many blocks of one fork, side by side. Raises as `get_page`."""
        live = self.readable(lsn)
        with live.in_use():
            values = await live.reader.values(live.snapshot, [rel.block_key(block) for block in blocks], lsn)
        live.check()
        self.check_lease()
        pages = [value for value in values if value is not None]
        if len(pages) < len(values):
            raise _no_block(blocks[values.index(None)], lsn)
        return pages

    async def scan(self, key_range: KeyRange, lsn: int) -> list[tuple[bytes, bytes]]:
        """All keys of the range that exist, ascending, with their values. Raises as `get_page`."""
        live = self.readable(lsn)
        with live.in_use():
            snapshot = live.snapshot
            keys = await live.reader.keys_in(snapshot, key_range, lsn)
            values: list[bytes | None] = []
            for start in range(0, len(keys), _SCAN_BATCH_KEYS):
                values += await live.reader.values(snapshot, keys[start : start + _SCAN_BATCH_KEYS], lsn)
        live.check()
        self.check_lease()
        return [(key, value) for key, value in zip(keys, values, strict=True) if value is not None]

    async def rel_size(self, rel: RelTag, lsn: int) -> int | None:
        """Size of a fork in blocks, None when it does not exist. Raises as `get_page`."""
        value = await self.get(rel.size_key(), lsn)
        if value is None:
            return None
        if len(value) != _SIZE_BYTES:
            raise CorruptedError("the size of a relation is malformed")
        return int.from_bytes(value, "big")

    def readable(self, lsn: int) -> Live:
        """Raises unless `lsn` can be read."""
        live = self.require_live()
        if lsn > live.last_record_lsn:
            raise UnavailableError(f"LSN {Lsn(lsn)} is not ingested yet")
        if lsn < live.index.initdb_lsn:
            raise InvalidInputError(f"LSN {Lsn(lsn)} is before the timeline began")
        ancestor = live.index.ancestor
        if ancestor is not None and lsn < ancestor.lsn:
            self._find_ancestor(ancestor).readable(lsn)  # what its garbage collection took is gone for us, too
        else:
            self.history.check_readable(lsn)
        return live

    # --- losing keys ---

    def cut(self, error: KeyAccessError) -> None:
        """The keys are lost: in one step, end all connections by which its pages leave, which say `error` if they can,
        and forget all plaintext. No await in here; `drop_plaintext` has to follow."""
        self.readers.cut(error)
        self._forget()

    def _forget(self) -> None:
        live, self._live = self._live, None
        if live is None:
            return
        self._leaving.append(live)
        live.close()
        self._flusher.reset()
        self._waiters.fail(self._loss())

    async def drop_plaintext(self) -> dict[str, float]:
        """The keys are lost: forget all plaintext, now. Returns the steps and what they took, in seconds.

        Reads and waits under way fail; what was ingested but not durable is forgotten. When this returns, nobody holds
        any of it: what does not end by itself within `drain_timeout_s` is cancelled, and its end waited for, however
        long it takes. Idempotent. `reopen` undoes it.
        """
        started = perf_counter()
        self._forget()
        dropped = perf_counter()
        leaving = list(self._leaving)
        if not leaving and not self.readers.leaving:
            return {}
        patience_s = self.config.drain_timeout_s
        await asyncio.gather(*(live.drained(patience_s) for live in leaving), self.readers.gone(patience_s))
        self._leaving = [live for live in self._leaving if not live.idle.is_set()]
        return {"plaintext dropped": dropped - started, "reads drained": perf_counter() - dropped}

    async def close(self) -> None:
        """For good. Nothing of it talks to the object store when it returns: a put that was cancelled half-way might
        still arrive there, so flushes under way are waited for."""
        async with self._flusher.lock:
            await self.drop_plaintext()

    def _loss(self) -> KeyAccessError:
        try:
            self.lease.check()
        except KeyAccessError as error:
            return error
        return LeaseExpiredError("the keys were lost meanwhile")


def _check_order(live: Live, values: Sequence[KeyedValue], last_record_lsn: int) -> None:
    before = live.last_record_lsn
    if last_record_lsn < before or (values and not (before < values[0][1] and values[-1][1] <= last_record_lsn)):
        raise ConflictError("values are not from the records behind the last one ingested")


def _no_block(block: int, lsn: int) -> NotFoundError:
    return NotFoundError(f"block {block} does not exist at {Lsn(lsn)}")
