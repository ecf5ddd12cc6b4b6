"""The storage engine with WAL of a real primary and a real redo worker: layers and images change no page."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pageserver.redo.build import prepare
from pageserver.redo.worker import RedoWorker
from pageserver.timeline import InitdbPosition, Timeline, TimelineServices
from shared.keyspace import Fork, RelTag
from tests.fixtures.pageserver import PAGE, QUICK, WAL, WAL_INIT, engine
from tests.fixtures.redo_history import Change, History, Page, make_history

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

FSM = 1


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="keylake-test-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def history(scratch: Path) -> History:
    directory = scratch / "history"
    directory.mkdir()
    return asyncio.run(make_history(directory, rounds=3, full_page_writes=False))


def tag(page: Page) -> RelTag:
    (spc, db, rel), fork, _ = page
    return RelTag(spc, db, rel, Fork(fork))


def pages_of(history: History) -> dict[Page, tuple[bytes | None, list[Change]]]:
    """Pages with their base, if their records can be applied on it."""
    pages = {}
    for page, changes in history.changes.items():
        base = history.read(history.before, page)
        if page[1] != FSM and (base is not None or changes[0].starts_over):
            pages[page] = base, changes
    return pages


async def test_pages_through_layers_and_images_are_those_of_plain_redo(scratch: Path, history: History) -> None:
    pages = pages_of(history)
    records = sorted({change.end_lsn for _, changes in pages.values() for change in changes})
    by_lsn: dict[int, list[tuple[Page, Change]]] = {}
    for page, (_, changes) in pages.items():
        for change in changes:
            by_lsn.setdefault(change.end_lsn, []).append((page, change))
    assert len(records) > 5000
    start = records[0] - 8
    worker = await RedoWorker.start(await prepare(scratch / "cache"))
    config = replace(
        QUICK,
        image_threshold_values=6,
        chunk_size_bytes=8192,
        checkpoint_distance_bytes=1 << 40,
        page_cache_bytes=1 << 20,
    )
    async with engine(scratch / "layers", config=config) as one:
        services = TimelineServices(one.store, one.files, one.keys, worker, one.pool)
        initdb = [
            (tag(page).block_key(page[2]), base if base is not None else bytes(PAGE))
            for page, (base, changes) in pages.items()
            if base is not None
        ]
        position = InitdbPosition(1, start, start - 8)
        timeline = await Timeline.create(one.project_id, one.timeline_id, services, one.lease, config, position, initdb)
        background = asyncio.create_task(timeline.run())
        previous = start
        checkpoints = {records[len(records) * n // 6] for n in range(1, 6)}
        images = 0
        for lsn in records:
            values = [
                (tag(page).block_key(page[2]), lsn, WAL_INIT if change.starts_over else WAL, change.record)
                for page, change in by_lsn[lsn]
            ]
            await timeline.put_batch(values, lsn, previous)
            previous = lsn
            if lsn in checkpoints:
                await timeline.checkpoint()
                images += timeline.last_flush.images
        assert images > 50
        assert timeline.layer_count == 6

        rng = random.Random(1)
        end = records[-1]
        fresh = await Timeline.open(one.project_id, one.timeline_id, services, one.lease, config)
        checked = 0
        for reader in (timeline, fresh):
            for page in rng.sample(sorted(pages), min(len(pages), 600)):
                base, changes = pages[page]
                for lsn in {min(end, reader.last_record_lsn), rng.randrange(records[0], reader.last_record_lsn)}:
                    chain = [(change.end_lsn, change.record) for change in changes if change.end_lsn <= lsn]
                    begins = max(
                        (n for n, change in enumerate(changes[: len(chain)]) if change.starts_over), default=None
                    )
                    if begins is None and base is None:
                        continue  # not there yet
                    expected = base if begins is None else None
                    if chain[begins or 0 :]:
                        expected = await worker.apply(page[0], page[1], page[2], expected, chain[begins or 0 :])
                    assert await reader.get_page(tag(page), page[2], lsn) == expected, f"{page} at {lsn:X}"
                    checked += 1
        assert checked > 1000
        background.cancel()
        await fresh.drop_plaintext()
        await timeline.drop_plaintext()
    worker.kill()
    await worker.wait_closed()
