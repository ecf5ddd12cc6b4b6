"""More is ingested than can be flushed or merged: ingest waits, and goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pageserver.ingest_memory import IngestMemory
from pageserver.timeline import InitdbPosition, Timeline
from shared.errors import CorruptedError
from shared.ids import TimelineId
from tests.fixtures.pageserver import IMAGE, INITDB_LSN, PAGE, QUICK, REL, Engine, engine, page_of

BLOCK = REL.block_key(0)


async def put(timeline: Timeline, pages: int = 1) -> None:
    """One batch of that many pages."""
    before = timeline.last_record_lsn
    lsn = before + 0x40
    values = [(REL.block_key(number), lsn, IMAGE, page_of(lsn % 250)) for number in range(pages)]
    await timeline.put_batch(values, lsn, before)


async def waiting(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """The task of it, which waits for something."""
    task = asyncio.create_task(work)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()
    return task


async def layers_of(one: Engine, count: int) -> Timeline:
    timeline = await one.create([(BLOCK, page_of(1))])
    for _ in range(count):
        await put(timeline)
        await timeline.checkpoint()
    return timeline


async def test_ingest_waits_while_compaction_cannot_keep_up(tmp_path: Path) -> None:
    """Each flushed layer is one more that a read visits."""
    async with engine(tmp_path, config=replace(QUICK, ingest_l0_layers=3)) as one:
        timeline = await layers_of(one, 3)
        stalled = await waiting(put(timeline))
        await timeline.compactor.compact(force=True)
        await asyncio.wait_for(stalled, 10)
        assert timeline.l0_layer_count == 0
        await put(timeline)
        reopened = await one.open()
        assert reopened.require_live().l0_layers == 0


async def test_ingest_does_not_wait_for_a_compaction_that_fails(tmp_path: Path) -> None:
    """A damaged layer would stop every commit otherwise, in the end."""
    async with engine(tmp_path, config=replace(QUICK, ingest_l0_layers=2), cache_capacity_bytes=0) as one:
        await layers_of(one, 2)
        timeline = await one.open()
        stalled = await waiting(put(timeline))
        layer = next(layer for layer, _ in timeline.require_live().index.layers if layer.lsn_start > INITDB_LSN)
        key = timeline.require_live().remote.layer_object_key(layer.name)
        await one.store.put(key, bytes(len(await one.store.get(key))))
        with pytest.raises(CorruptedError):
            await timeline.compactor.compact(force=True)
        await asyncio.wait_for(stalled, 10)
        assert "compaction" in timeline.fault


async def test_all_timelines_together_have_a_bound(tmp_path: Path) -> None:
    limit = 40 * PAGE
    memory = IngestMemory(limit)
    async with engine(tmp_path) as one:
        services = replace(one.services, memory=memory)

        async def created() -> Timeline:
            timeline = await Timeline.create(
                one.project_id,
                TimelineId.new(),
                services,
                one.lease,
                replace(QUICK, frozen_layers=1000),
                InitdbPosition(77, INITDB_LSN, INITDB_LSN - 0x100),
                [(BLOCK, page_of(1))],
            )
            one.timelines.append(timeline)
            return timeline

        large, small = await created(), await created()
        await put(small, 4)
        await put(large, 10)
        assert memory.size_bytes == small.in_memory_size_bytes + large.in_memory_size_bytes > 14 * PAGE
        await put(small)
        assert not small.require_live().frozen
        await put(large, 10)  # now open layers take more than half of the limit
        assert large.require_live().frozen, "the largest one goes first"
        assert not small.require_live().frozen, "whoever has come last"
        while not memory.is_full:
            await put(large, 5)
        before = small.last_record_lsn
        stalled = await waiting(put(small))
        assert memory.size_bytes < limit + 20 * PAGE
        await large.checkpoint()
        await asyncio.wait_for(stalled, 10)
        assert small.last_record_lsn > before
        assert memory.size_bytes < limit // 2

        while not memory.is_full:
            await put(large, 5)
        stalled = await waiting(put(small))
        await large.drop_plaintext()
        await asyncio.wait_for(stalled, 10)
        assert memory.size_bytes == small.in_memory_size_bytes
