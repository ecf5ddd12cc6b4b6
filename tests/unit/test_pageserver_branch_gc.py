"""Branches beside compaction and GC: what a branch reads stays for as long as there is the branch, and no longer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pageserver.timeline import Timeline
from shared.clock import ManualClock
from shared.errors import InvalidInputError
from shared.ids import TimelineId
from shared.wal.page import boundary_of
from tests.fixtures.pageserver import INITDB_LSN, Engine, engine
from tests.unit.test_pageserver_compaction import EAGER, check, filled, grow, pages


async def branch_of(on: Engine, parent: Timeline, lsn: int) -> Timeline:
    child = await Timeline.branch(
        on.project_id, TimelineId.new(), on.services, on.lease, on.config, parent, lsn, lambda *_: parent
    )
    on.timelines.append(child)
    return child


async def test_a_branch_keeps_what_it_reads_and_nothing_else(tmp_path: Path) -> None:
    async with engine(tmp_path, config=EAGER) as one:
        parent, history = await filled(one, layers=8)
        at = sorted(history)[2]
        child = await branch_of(one, parent, at)
        assert await pages(child, child.last_record_lsn) == history[at]

        await parent.compactor.compact(force=True)
        await parent.history.collect()
        assert parent.oldest_lsn == max(history)
        assert await pages(child, child.last_record_lsn) == history[at]
        below = sorted(history)[0]
        for reader in (parent, child):
            with pytest.raises(InvalidInputError, match="not kept any more"):
                await pages(reader, below)
        with pytest.raises(InvalidInputError):
            await branch_of(one, parent, below)

        fresh_parent = await one.open()
        fresh = await Timeline.open(
            one.project_id, child.timeline_id, one.services, one.lease, one.config, find=lambda *_: fresh_parent
        )
        one.timelines.append(fresh)
        assert await pages(fresh, fresh.last_record_lsn) == history[at], "from the object store alone"

        kept = fresh_parent.layer_count
        await fresh_parent.remove_branch(child.timeline_id)
        await fresh_parent.history.collect()
        assert fresh_parent.layer_count < kept


async def test_a_branch_is_compacted_and_collected_itself(tmp_path: Path) -> None:
    """Its own window ends at its own newest record, and nothing of it hides what it has inherited."""
    async with engine(tmp_path, config=EAGER) as one:
        parent, before = await filled(one, layers=3)
        at = max(before)
        child = await branch_of(one, parent, at)
        await grow(parent, 2)
        newest = await pages(parent, parent.last_record_lsn)
        history = {boundary_of(at): before[at]}
        for _ in range(6):
            await grow(child, 1, blocks=3)  # the others are its ancestor's for ever
            history[child.last_record_lsn] = await pages(child, child.last_record_lsn)
        await child.compactor.compact(force=True)
        await check(child, history)
        await parent.compactor.compact(force=True)
        await parent.history.collect()
        await child.history.collect()
        await check(child, history)
        assert child.oldest_lsn == max(history)
        assert await pages(parent, parent.last_record_lsn) == newest
        grandchild = await branch_of(one, child, max(history))
        await child.history.collect()
        await grow(child, 2)
        await child.compactor.compact(force=True)
        await child.history.collect()
        assert await pages(grandchild, grandchild.last_record_lsn) == history[max(history)]


async def test_a_lease_below_the_branch_point_is_the_ancestors_to_keep(tmp_path: Path) -> None:
    clock = ManualClock()
    async with engine(tmp_path, config=replace(EAGER, lsn_lease_s=10.0), clock=clock) as one:
        parent, history = await filled(one, layers=6)
        leased, held, at = sorted(history)[1:4]
        child = await branch_of(one, parent, at)
        clock.advance(10)
        child.lease_lsn(leased, 10)
        await parent.compactor.compact(force=True)
        with child.held(held):
            await parent.history.collect()
            assert await pages(child, held) == history[held]
            assert await pages(child, leased) == history[leased]
        await parent.history.collect()
        assert await pages(child, leased) == history[leased]
        with pytest.raises(InvalidInputError):
            await pages(child, held)
        with pytest.raises(InvalidInputError):
            child.lease_lsn(INITDB_LSN)
