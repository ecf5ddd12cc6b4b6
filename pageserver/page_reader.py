"""Reads keys at an LSN: drives read_path.py, talks to redo, remembers pages that were made.

The cache holds `Base`s: what a key was at some LSN, and since when. A later read of a hot page then applies only the
records since. It is plaintext under a lease: `close` drops it, for good.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator, Sequence
from typing import Any, Final, Protocol

from pageserver.lru import ByteLru
from pageserver.open_layers import OpenLayers
from pageserver.read_path import (
    Ancestry,
    Base,
    Chain,
    GatherRequest,
    Layers,
    OpenRequest,
    RedoRequest,
    Snapshot,
    changed_lsn,
    gather,
    reconstruct,
)
from shared.keyspace import KeyRange, unpack_key

_ENTRY_OVERHEAD_BYTES: Final = 400
_YIELD_EVERY: Final = 256


class PageRedo(Protocol):
    """Rebuilds one page: pageserver/redo/worker.py, or whoever starts another worker when one is gone."""

    async def apply(
        self,
        rel: tuple[int, int, int],
        fork: int,
        blkno: int,
        base: bytes | None,
        records: Sequence[tuple[int, bytes]],
    ) -> bytes:
        """The page after `records`, (end LSN, record), oldest first. Raises CorruptedError, IntegrityError,
        InvalidInputError, UnavailableError."""
        ...


class PageReader:
    def __init__(self, layers: OpenLayers, redo: PageRedo, cache_capacity_bytes: int) -> None:
        self._layers = layers
        self._redo = redo
        self._cache: ByteLru[bytes, Base] = ByteLru(cache_capacity_bytes)
        self.records_redone = 0
        self.pages_redone = 0

    def cached(self, key: bytes, lsn: int) -> Base | None:
        """What `key` is at `lsn`, if that is remembered."""
        base = self._cache.get(key)
        return base if base is not None and base.changed_lsn <= lsn <= base.lsn else None

    async def value(self, snapshot: Snapshot, key: bytes, lsn: int) -> bytes | None:
        """The value of `key` at `lsn`; None when it does not exist. `lsn` is not above what `snapshot` has got."""
        base = self._cache.get(key)
        if base is not None:
            if base.changed_lsn > lsn:
                base = None
            elif base.lsn >= lsn:
                return base.value
        plan = gather(snapshot, self._layers, key, lsn, base)
        return await self._finish(key, lsn, plan, None)

    async def values(self, snapshot: Snapshot, keys: Sequence[bytes], lsn: int) -> list[bytes | None]:
        """As `value`, for many keys: what needs to wait waits side by side."""
        answers: list[bytes | None] = [None] * len(keys)
        waiting: list[tuple[int, Generator[GatherRequest, Any, Chain], GatherRequest | Chain]] = []
        for number, key in enumerate(keys):
            if number % _YIELD_EVERY == _YIELD_EVERY - 1:
                await asyncio.sleep(0)
            base = self._cache.get(key)
            if base is not None:
                if base.changed_lsn > lsn:
                    base = None
                elif base.lsn >= lsn:
                    answers[number] = base.value
                    continue
            plan = gather(snapshot, self._layers, key, lsn, base)
            try:
                request = next(plan)
            except StopIteration as stop:
                chain: Chain = stop.value
                work = reconstruct(key, chain)
                try:
                    next(work)
                except StopIteration as done:
                    answers[number] = self._remember(key, lsn, chain, done.value)
                    continue
                waiting.append((number, plan, chain))
            else:
                waiting.append((number, plan, request))
        if waiting:
            results = await _gathered([self._finish(keys[number], lsn, plan, at) for number, plan, at in waiting])
            for (number, _, _), value in zip(waiting, results, strict=True):
                answers[number] = value
        return answers

    async def inherited(self, ancestry: Ancestry, key: bytes) -> Chain:
        """The chain of `key` in an ancestor, at the branch point. Nothing is remembered of it."""
        return await self._driven(gather(ancestry.snapshot, ancestry.layers, key, ancestry.lsn, None), None)

    async def build_all(self, chains: Sequence[tuple[bytes, Chain]]) -> list[bytes | None]:
        """The values of keys whose chains are at hand, side by side. Nothing is remembered of them."""
        return await _gathered([self._build(key, chain) for key, chain in chains])

    async def keys_in(self, snapshot: Snapshot, key_range: KeyRange, lsn: int) -> list[bytes]:
        """Keys of the range that had a value at or below `lsn`, or later; ascending."""
        found: set[bytes] = set()
        layers: Layers = self._layers
        while True:
            for in_memory in snapshot.in_memory:
                found.update(in_memory.keys_in(key_range))
            for layer in snapshot.layer_map.overlapping(key_range, lsn):
                opened = layers.peek(layer) or await layers.open(layer)
                found.update(opened.index.keys_in(key_range))
            if snapshot.ancestor is None:
                return sorted(found)
            snapshot, layers, branched_lsn = snapshot.ancestor
            lsn = min(lsn, branched_lsn)

    def close(self) -> None:
        """Drop all pages, and remember none any more."""
        self._cache.close()

    @property
    def cache_size_bytes(self) -> int:
        return self._cache.size_bytes

    @property
    def cache_stats(self) -> tuple[int, int]:
        """(hits, misses), where a hit may still need newer records."""
        return self._cache.hits, self._cache.misses

    async def _finish(
        self,
        key: bytes,
        lsn: int,
        plan: Generator[GatherRequest, Any, Chain],
        at: GatherRequest | Chain | None,
    ) -> bytes | None:
        """Drive `plan` on from the request that it has made, or from its end, or (None) from its start."""
        chain = at if isinstance(at, Chain) else await self._driven(plan, at)
        return self._remember(key, lsn, chain, await self._build(key, chain))

    @staticmethod
    async def _driven(plan: Generator[GatherRequest, Any, Chain], at: GatherRequest | None) -> Chain:
        try:
            request = next(plan) if at is None else at
            while True:
                if isinstance(request, OpenRequest):
                    request = plan.send(await request.layers.open(request.layer))
                else:
                    request = plan.send(await request.layers.read(request.layer, request.start, request.end))
        except StopIteration as stop:
            chain: Chain = stop.value
            return chain

    async def _build(self, key: bytes, chain: Chain) -> bytes | None:
        work = reconstruct(key, chain)
        try:
            redo = next(work)
            while True:
                redo = work.send(await self._apply(key, redo))
        except StopIteration as stop:
            value: bytes | None = stop.value
            return value

    async def _apply(self, key: bytes, request: RedoRequest) -> bytes:
        _, spc, db, rel, fork, block = unpack_key(key)
        page = await self._redo.apply((spc, db, rel), fork, block, request.base, request.records)
        self.records_redone += len(request.records)
        self.pages_redone += 1
        return page

    def _remember(self, key: bytes, lsn: int, chain: Chain, value: bytes | None) -> bytes | None:
        size = _ENTRY_OVERHEAD_BYTES + (0 if value is None else len(value))
        known = self._cache.get(key)
        if known is None or known.lsn <= lsn:
            self._cache.put(key, Base(value, changed_lsn(chain), lsn), size)
        return value


async def _gathered(work: Sequence[Coroutine[Any, Any, bytes | None]]) -> list[bytes | None]:
    """Results in order. The first error cancels the rest and is raised itself, not in a group."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
