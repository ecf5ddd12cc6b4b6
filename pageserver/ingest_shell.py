"""From records to the timeline: runs the ingest core and does what it cannot, reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pageserver.ingest import CopyDatabase, WalIngest
from pageserver.ingest_state import KeyedValue, Tip
from pageserver.point_in_time import commit_time
from pageserver.timeline import Timeline
from pageserver.value import ValueKind
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
    field1_range,
    pack_key,
    rel_map_key,
    unpack_key,
)
from shared.wal.control import CheckPoint, ControlFile
from shared.wal.reader import RawRecord
from shared.wal.record import Rel

_IMAGE: Final = int(ValueKind.IMAGE)
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
            values = done.values
            if done.copy is not None:
                values = await self._copy_database(done.copy, records[: done.consumed], values)
            await self._timeline.put_batch(values, last_end, last_start)
            records = records[done.consumed :]

    async def _copy_database(
        self, copy: CopyDatabase, records: Sequence[RawRecord], values: list[KeyedValue]
    ) -> list[KeyedValue]:
        """CREATE DATABASE … STRATEGY = file_copy: everything of the source, as it is before this record.

        Stores the values of the records before, and returns those of the last one with the copies, which become
        visible together.
        """
        timeline = self._timeline
        before, own = values, []
        if len(records) > 1:
            start, end, _ = records[-2]
            before = [value for value in values if value[1] <= end]
            own = values[len(before) :]
            await timeline.put_batch(before, end, start)
        else:
            own = values
        lsn = timeline.last_record_lsn
        sizes = {key: blocks for key, blocks in self._core.tip.rel_sizes.items() if key[0][:2] == copy.source}
        for (rel, fork), blocks in sizes.items():
            tag = RelTag(*rel, Fork(fork))
            for first in range(0, blocks, _COPY_BATCH_BLOCKS):
                numbers = range(first, min(blocks, first + _COPY_BATCH_BLOCKS))
                pages = await timeline.get_pages(tag, numbers, lsn)
                own += (
                    (pack_key(REL_BLOCK, *copy.target, rel[2], fork, number), copy.lsn, _IMAGE, page)
                    for number, page in zip(numbers, pages, strict=True)
                )
        rel_map = await timeline.get(rel_map_key(*copy.source), lsn)
        if rel_map is None:
            raise CorruptedError("a database is copied that does not exist")
        return own + self._core.copied_database(copy, rel_map, sizes)
