"""A database that is copied file by file, however large: in layers of bounded size, all or nothing."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from pageserver.ingest_shell import IngestShell, load_tip
from pageserver.layer.name import LayerKind
from pageserver.timeline import Timeline
from shared.errors import KeylakeError, NotFoundError
from shared.keyspace import CHECKPOINT_KEY, CONTROL_FILE_KEY, Fork, RelTag, rel_map_key
from shared.storage.memory import MemoryObjectStore
from shared.wal.reader import RawRecord
from shared.wal.rmgr import RmgrId
from shared.wal.rmgr_xlog import XlogOp
from tests.fixtures.dying_store import DyingObjectStore
from tests.fixtures.keys import InMemoryKeySource
from tests.fixtures.pageserver import IMAGE, INITDB_LSN, PAGE, QUICK, Engine, engine, page_of
from tests.unit.test_ingest_state import new_tip, record

SOURCE, TARGET = (1663, 1), (1663, 20_000)
LAYER_BYTES = 4 * PAGE
SMALL = replace(QUICK, compaction_target_bytes=LAYER_BYTES, image_threshold_values=1000)
FORKS = {(16384, Fork.MAIN): 30, (16384, Fork.VISIBILITY_MAP): 1, (16390, Fork.MAIN): 3, (16391, Fork.MAIN): 0}
COPY = record(RmgrId.DBASE, 0x00, struct.pack("<4I", TARGET[1], TARGET[0], SOURCE[1], SOURCE[0]))
NEXT_OID = record(RmgrId.XLOG, XlogOp.NEXT_OID, struct.pack("<I", 28_192))
START = INITDB_LSN + 0x40
RECORDS: Sequence[RawRecord] = [
    (START + 0x40 * number, START + 0x40 * (number + 1), raw) for number, raw in enumerate((NEXT_OID, COPY, NEXT_OID))
]
COPIED_LSN = RECORDS[1][1]


def fill(rel: int, fork: Fork, block: int) -> bytes:
    return page_of((rel + 100 * fork + block) % 250)


def initdb() -> list[tuple[bytes, bytes]]:
    tip = new_tip()
    values = [(CHECKPOINT_KEY, tip.checkpoint.serialize()), (CONTROL_FILE_KEY, tip.control.serialize())]
    values += [(rel_map_key(*SOURCE), b"map of the source"), (rel_map_key(1664, 0), b"shared map")]
    for (rel, fork), blocks in FORKS.items():
        tag = RelTag(*SOURCE, rel, fork)
        values += [(tag.block_key(block), fill(rel, fork, block)) for block in range(blocks)]
        values.append((tag.size_key(), struct.pack(">I", blocks)))
    return values


async def ingest(timeline: Timeline) -> None:
    """Whatever it lacks of RECORDS."""
    shell = IngestShell(timeline, await load_tip(timeline))
    await shell.ingest([each for each in RECORDS if each[1] > timeline.last_record_lsn])


async def check_copied(timeline: Timeline) -> None:
    for lsn in (COPIED_LSN, timeline.last_record_lsn):
        assert await timeline.get(rel_map_key(*TARGET), lsn) == b"map of the source"
        for (rel, fork), blocks in FORKS.items():
            tag = RelTag(*TARGET, rel, fork)
            assert await timeline.rel_size(tag, lsn) == blocks
            pages = await timeline.get_pages(tag, range(blocks), lsn)
            assert pages == [fill(rel, fork, block) for block in range(blocks)]
            with pytest.raises(NotFoundError):
                await timeline.get_page(tag, blocks, lsn)
    await check_absent(timeline, RECORDS[0][1])


async def check_absent(timeline: Timeline, lsn: int) -> None:
    assert await timeline.get(rel_map_key(*TARGET), lsn) is None
    tag = RelTag(*TARGET, 16384, Fork.MAIN)
    assert await timeline.rel_size(tag, lsn) is None
    with pytest.raises(NotFoundError):
        await timeline.get_page(tag, 0, lsn)


async def test_a_copied_database_becomes_many_layers_of_bounded_size(tmp_path: Path) -> None:
    async with engine(tmp_path, config=SMALL) as one:
        timeline = await one.create(initdb())
        await ingest(timeline)
        assert timeline.last_record_lsn == RECORDS[-1][1]
        assert timeline.in_memory_size_bytes < PAGE, "none of the pages is in the memory of ingest"
        await check_copied(timeline)
        live = timeline.require_live()
        made = [layer for layer in live.layer_map.layers if layer.lsn_start > INITDB_LSN]
        images = sorted((x for x in made if x.kind is LayerKind.IMAGE), key=lambda image: image.key_range.start)
        assert {image.lsn_start for image in images} == {COPIED_LSN}
        assert len(images) >= 34 * PAGE // LAYER_BYTES
        assert all(older.key_range.end == newer.key_range.start for older, newer in pairwise(images))
        assert max(layer.size_bytes for layer in made) < 2 * LAYER_BYTES
        assert max(layer.last_lsn for layer in made) == COPIED_LSN

        # Life goes on: what is written to the copy lies above it, and compaction and images go through all of it.
        tag, lsn = RelTag(*TARGET, 16384, Fork.MAIN), RECORDS[-1][1] + 0x40
        await timeline.put_batch([(tag.block_key(3), lsn, IMAGE, page_of(251))], lsn, lsn - 0x40)
        await timeline.checkpoint()
        await timeline.compactor.compact(force=True)
        fresh = await one.open()
        await check_copied_but(fresh, tag, lsn)


async def check_copied_but(timeline: Timeline, tag: RelTag, lsn: int) -> None:
    assert await timeline.get_page(tag, 3, lsn) == page_of(251)
    assert await timeline.get_page(tag, 3, lsn - 1) == fill(16384, Fork.MAIN, 3)
    assert await timeline.get_page(tag, 4, lsn) == fill(16384, Fork.MAIN, 4)
    await check_absent(timeline, RECORDS[0][1])


@pytest.mark.parametrize("dies_after", [False, True])
async def test_a_copy_is_there_or_not_whenever_its_pageserver_dies(tmp_path: Path, *, dies_after: bool) -> None:
    for changes in range(200):
        inner, keys = MemoryObjectStore(), InMemoryKeySource()
        dying = DyingObjectStore(inner, 1_000_000, dies_after=dies_after)
        async with engine(tmp_path / f"{changes}", store=dying, keys=keys, config=SMALL) as first:
            timeline = await first.create(initdb())
            dying._left = changes
            try:
                await ingest(timeline)
                await timeline.checkpoint()
            except KeylakeError:
                assert dying.dead
        async with engine(tmp_path / f"{changes} again", store=inner, like=first, config=SMALL) as second:
            await goes_on(second)
        if not dying.dead:
            assert changes > 2 * 34 * PAGE // LAYER_BYTES
            return
    pytest.fail("the copy never came to its end")


async def goes_on(process: Engine) -> None:
    timeline = await process.open()
    if timeline.last_record_lsn < COPIED_LSN:
        await check_absent(timeline, timeline.last_record_lsn)
    else:
        await check_copied(timeline)
    await ingest(timeline)
    await timeline.checkpoint()
    await check_copied(timeline)
    objects = [info.key async for info in process.store.list("") if "/layers/" in info.key]
    assert len(objects) == 2 * timeline.layer_count, "what the crash left is deleted"
