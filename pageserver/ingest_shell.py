"""From records to the timeline: runs the ingest core and does what it cannot, reading."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Final

from pageserver.ingest import CopyDatabase, WalIngest
from pageserver.ingest_state import KeyedValue, Tip
from pageserver.point_in_time import commit_time
from pageserver.timeline import Timeline
from shared.errors import CorruptedError
from shared.keyspace import (
    CHECKPOINT_KEY,
    CONTROL_FILE_KEY,
    REL_BLOCK,
    REL_MAP,
    REL_SIZE,
    REPL_ORIGIN,
    SLRU_PAGE,
    TWO_PHASE,
    Fork,
    RelTag,
    Slru,
    database_range,
    field1_range,
    pack_key,
    rel_map_key,
    unpack_key,
)
from shared.wal.control import CheckPoint, ControlFile
from shared.wal.reader import RawRecord
from shared.wal.record import Rel

_COPY_BATCH_BLOCKS: Final = 256


async def load_tip(timeline: Timeline) -> Tip:
    """The newest state, from storage. Raises what reading raises."""
    lsn = timeline.last_record_lsn
    sizes: dict[tuple[Rel, int], int] = {}
    for key, value in await timeline.scan(field1_range(REL_SIZE), lsn):
        _, spc, db, rel, fork, _ = unpack_key(key)
        sizes[(spc, db, rel), fork] = int.from_bytes(value, "big")
    maps = {unpack_key(key)[1:3] for key, _ in await timeline.scan(field1_range(REL_MAP), lsn)}
    slrus: dict[Slru, set[int]] = {kind: set() for kind in Slru}
    for key, _ in await timeline.scan(field1_range(SLRU_PAGE), lsn):
        _, kind, _, _, _, page = unpack_key(key)
        slrus[Slru(kind)].add(page)
    two_phase = {unpack_key(key)[1] for key, _ in await timeline.scan(field1_range(TWO_PHASE), lsn)}
    origins = {
        unpack_key(k)[1]: int.from_bytes(v, "big") for k, v in await timeline.scan(field1_range(REPL_ORIGIN), lsn)
    }
    checkpoint = await timeline.get(CHECKPOINT_KEY, lsn)
    control = await timeline.get(CONTROL_FILE_KEY, lsn)
    if checkpoint is None or control is None:
        raise CorruptedError("the timeline has no checkpoint or control file")
    return Tip(
        sizes,
        {(spc, db) for spc, db in maps},
        slrus,
        two_phase,
        CheckPoint.parse(checkpoint),
        ControlFile.parse(control),
        origins,
        await commit_time(timeline, lsn) or 0,
    )


class IngestShell:
    """One run of ingest, from where the timeline stands. A new one is made whenever that goes back."""

    def __init__(self, timeline: Timeline, tip: Tip) -> None:
        self._timeline = timeline
        self._core = WalIngest(tip)

    async def ingest(self, records: Sequence[RawRecord]) -> None:
        """Records in LSN order. Raises CorruptedError, InvalidInputError, and what `Timeline.put_batch` raises."""
        while records:
            done = self._core.ingest(records)
            last_start, last_end, _ = records[done.consumed - 1]
            if done.copy is None:
                await self._timeline.put_batch(done.values, last_end, last_start)
            else:
                await self._copy_database(done.copy, records[: done.consumed], done.values)
            records = records[done.consumed :]

    async def _copy_database(self, copy: CopyDatabase, records: Sequence[RawRecord], values: list[KeyedValue]) -> None:
        """CREATE DATABASE … STRATEGY = file_copy: everything of the source, as it is before this record, the last one
        of `records`, becomes visible together with `values` of the record itself. However much that is."""
        timeline = self._timeline
        if len(records) > 1:
            start, end, _ = records[-2]
            before = [value for value in values if value[1] <= end]
            values = values[len(before) :]
            await timeline.put_batch(before, end, start)
        lsn = timeline.last_record_lsn
        sizes = {key: blocks for key, blocks in self._core.tip.rel_sizes.items() if key[0][:2] == copy.source}
        rel_map = await timeline.get(rel_map_key(*copy.source), lsn)
        if rel_map is None:
            raise CorruptedError("a database is copied that does not exist")
        values += self._core.copied_database(copy, rel_map, sizes)
        key_range = database_range(REL_BLOCK, *copy.target)
        await timeline.put_bulk(key_range, self._pages(copy, sizes, lsn), values, copy.lsn, records[-1][0])

    async def _pages(
        self, copy: CopyDatabase, sizes: dict[tuple[Rel, int], int], lsn: int
    ) -> AsyncIterator[tuple[bytes, bytes]]:
        """The source's blocks at `lsn` under the target's keys, ascending."""
        for (rel, fork), blocks in sorted(sizes.items()):
            tag = RelTag(*rel, Fork(fork))
            for first in range(0, blocks, _COPY_BATCH_BLOCKS):
                numbers = range(first, min(blocks, first + _COPY_BATCH_BLOCKS))
                pages = await self._timeline.get_pages(tag, numbers, lsn)
                for number, page in zip(numbers, pages, strict=True):
                    yield pack_key(REL_BLOCK, *copy.target, rel[2], fork, number), page
