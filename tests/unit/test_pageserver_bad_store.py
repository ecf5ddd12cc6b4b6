"""A timeline on a bad object store, with every operation that it uses: it converges, and loses nothing that it told."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from pageserver.removal import Mark, Removal
from pageserver.timeline import Timeline
from shared.errors import KeylakeError
from shared.key_upkeep import Pace
from shared.storage.faulty import FaultyObjectStore, Moment, Operation
from shared.storage.memory import MemoryObjectStore
from tests.fixtures.pageserver import REL, WAL, Engine, engine, record
from tests.fixtures.waiting import in_the_end
from tests.unit.test_pageserver_compaction import BLOCKS, EAGER, filled, grow, only_listed_layers, pages
from tests.unit.test_pageserver_key_upkeep import FAST
from tests.unit.test_pageserver_scrub import scrub
from tests.unit.test_pageserver_timeline import put

TIMES = 3
ONLY_REMOVAL = Operation.DELETE
"""The mark of a timeline that is deleted goes by itself."""


async def more(timeline: Timeline) -> None:
    for block in range(BLOCKS):
        await put(timeline, (REL.block_key(block), WAL, record(100, b"more")))
    await in_the_end(timeline.checkpoint)


async def everything(on: Engine, timeline: Timeline, number: int) -> None:
    """What changes or reads the object store, once."""
    await in_the_end(lambda: timeline.compactor.compact(force=True))
    await in_the_end(timeline.history.collect)
    version = on.keys.rotate(on.project_id, rekey=bool(number % 2))
    await in_the_end(lambda: timeline.keys.rekey(on.lease.dek_floor, Pace(FAST)))
    await in_the_end(lambda: timeline.keys.rewrap(version, Pace(FAST)))


async def check_on_an_empty_disk(one: Engine, directory: Path, told: int, want: list[bytes]) -> None:
    async with engine(directory, like=one, config=EAGER) as two:
        fresh = await in_the_end(two.open)
        assert fresh.remote_consistent_lsn == told
        assert await in_the_end(lambda: pages(fresh, told)) == want


@pytest.mark.parametrize("moment", list(Moment))
async def test_whatever_fails_at_first_is_done_in_the_end(tmp_path: Path, moment: Moment) -> None:
    store = FaultyObjectStore(MemoryObjectStore())
    store.reorder(random.Random(moment.value), 0.001)
    async with engine(tmp_path / "a", store=store, config=EAGER) as one:
        timeline, _ = await filled(one, layers=2)
        for number, operation in enumerate(each for each in Operation if each is not ONLY_REMOVAL):
            store.fail(operation, times=TIMES, moment=moment)
            for _ in range(2):
                await more(timeline)
            await everything(one, timeline, number)
            told, want = (
                timeline.remote_consistent_lsn,
                await in_the_end(lambda: pages(timeline, timeline.last_record_lsn)),
            )
            assert told == timeline.last_record_lsn
            await check_on_an_empty_disk(one, tmp_path / f"empty disk {number}", told, want)
            assert not timeline.fault
            assert store.quiet, f"{operation} failed as often as was ordered"
        # What failed deletes left is gone with the next versions of the index.
        await more(timeline)
        await everything(one, timeline, 0)
        await more(timeline)
        assert await only_listed_layers(one, timeline)
        assert (await scrub(one, timeline)).findings == []
    for operation in (Operation.PUT_IF_ABSENT, Operation.GET, Operation.LIST, Operation.DELETE_MANY, ONLY_REMOVAL):
        store.fail(operation, moment=moment)  # once: what is gone is not deleted again
    removal = Removal(store, one.project_id, one.timeline_id)
    await in_the_end(lambda: removal.begin(Mark(None)))
    await in_the_end(removal.remove_objects)
    await in_the_end(removal.end)
    assert store.quiet
    assert [info.key async for info in store.list()] == []


async def test_old_listings_lose_nothing(tmp_path: Path) -> None:
    """A store that breaks its contract: what was written is not listed for a while. The timeline may stop, which
    opening it again heals; nothing is deleted by what an old listing says."""
    store = FaultyObjectStore(MemoryObjectStore())
    config = replace(EAGER, retry_delay_s=0.001)
    async with engine(tmp_path / "a", store=store, config=config) as one:
        timeline, history = await filled(one, layers=4)
        for number in range(4):
            await store.freeze_lists()
            for _ in range(3):
                try:
                    await grow(timeline, 1)
                    history[timeline.last_record_lsn] = await pages(timeline, timeline.last_record_lsn)
                    await timeline.compactor.compact(force=True)
                    await timeline.history.collect()
                except KeylakeError:
                    break  # more would wait for layers to be flushed
            told = timeline.remote_consistent_lsn
            with pytest.raises(KeylakeError):
                await timeline.reopen()  # this machine knows better
            store.heal()
            await timeline.reopen()
            assert timeline.remote_consistent_lsn >= told
            for lsn, want in history.items():
                if timeline.oldest_lsn <= lsn <= timeline.last_record_lsn:
                    assert await pages(timeline, lsn) == want
            await grow(timeline, 1)
            async with engine(tmp_path / f"empty disk {number}", like=one, config=config) as two:
                fresh = await two.open()
                lsn = fresh.last_record_lsn
                assert lsn == timeline.last_record_lsn
                assert await pages(fresh, lsn) == await pages(timeline, lsn)
        assert not (await scrub(one, timeline)).damaged
