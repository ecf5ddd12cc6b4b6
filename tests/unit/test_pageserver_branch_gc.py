"""Branches beside compaction and GC: what a branch reads stays for as long as there is the branch, and no longer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pageserver.layer.name import LayerKind
from pageserver.timeline import Timeline
from shared.clock import ManualClock
from shared.errors import InvalidInputError
from shared.ids import TimelineId
from shared.keyspace import WHOLE_KEYSPACE, two_phase_key
from shared.wal.page import boundary_of
from tests.fixtures.pageserver import IMAGE, INITDB_LSN, REL, TOMBSTONE, WAL, Engine, engine, record
from tests.unit.test_pageserver_compaction import BLOCKS, EAGER, check, filled, grow, layers_visited, live_of, pages
from tests.unit.test_pageserver_timeline import put


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


async def test_reads_of_a_branch_visit_a_bounded_number_of_layers(tmp_path: Path) -> None:
    """However long it lives, and whether a key was changed on it or is its ancestor's. Its images have what it changed,
    also what it dropped; all else shines through."""
    dropped, kept = two_phase_key(7), two_phase_key(8)
    async with engine(tmp_path, config=EAGER) as one:
        parent, before = await filled(one, layers=3)
        await put(parent, (dropped, IMAGE, b"7"), (kept, IMAGE, b"8"))
        await parent.checkpoint()
        await parent.compactor.compact(force=True)
        child = await branch_of(one, parent, parent.last_record_lsn)
        await put(child, (dropped, TOMBSTONE, b""))
        own = [await pages(child, child.last_record_lsn)]
        worst: list[int] = []
        for number in range(48):
            key = REL.block_key(1 + number % 3)
            await put(child, (key, WAL, record(9, b"x")), (REL.block_key(0), WAL, record(9, b"y")))
            await child.checkpoint()
            own.append(await pages(child, child.last_record_lsn))
            await child.compactor.compact()
            assert await pages(await reopened(one, child, parent), child.last_record_lsn) == own[-1]
            if number % 6 == 5:
                worst.append(max([await layers_visited(child, REL.block_key(block)) for block in range(BLOCKS)]))
        # As for a timeline of its own (test_a_read_visits_a_bounded_number_of_layers), and in the ancestor once more.
        assert max(worst) <= 2 * (3 + 8 + 1)
        assert max(worst[4:]) <= max(worst[:4]), "it does not grow with history"

        await child.compactor.compact(force=True)
        await child.history.collect()
        live = live_of(await reopened(one, child, parent))
        images = [layer for layer in live.layer_map.layers if layer.kind is LayerKind.IMAGE]
        assert live.layer_map.layers == tuple(images), "nothing else is needed any more"
        in_images = {key for layer in images for key in (await live.layers.open(layer)).index.keys_in(WHOLE_KEYSPACE)}
        assert in_images == {*(REL.block_key(block) for block in range(4)), dropped}, "what is inherited is not copied"
        with live.in_use():
            values = await live.reader.values(live.snapshot, [dropped, kept], child.last_record_lsn)
        assert values == [None, b"8"]
        assert await pages(child, child.last_record_lsn) == own[-1]
        assert own[-1][4:] == before[max(before)][4:]


async def reopened(on: Engine, child: Timeline, parent: Timeline) -> Timeline:
    """From the object store, with nothing cached."""
    fresh = await Timeline.open(
        on.project_id, child.timeline_id, on.services, on.lease, on.config, find=lambda *_: parent
    )
    on.timelines.append(fresh)
    return fresh


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
