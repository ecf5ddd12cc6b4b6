"""A timeline as ingest and page service use it: reads over all kinds of layers, waiting, faults, key loss."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pageserver import native
from pageserver.layer.in_memory import LONG_RUN_VALUES, tail_length
from pageserver.timeline import FencedError, Timeline
from shared.api.keymanager import KeyState
from shared.errors import (
    ConflictError,
    CorruptedError,
    InvalidInputError,
    KeyAccessError,
    LeaseExpiredError,
    NotFoundError,
    RevokedError,
    ShreddedError,
    UnavailableError,
)
from shared.keyspace import REL_BLOCK, REL_SIZE, SLRU_PAGE, Fork, KeyRange, RelTag, Slru, field1_range, slru_key
from shared.storage.faulty import ALWAYS, FaultyObjectStore, Hold, Operation
from shared.storage.memory import MemoryObjectStore
from shared.wal.rmgr_clog import XidStatus
from tests.fixtures.pageserver import (
    IMAGE,
    INITDB_LSN,
    NATIVE,
    PAGE,
    QUICK,
    REL,
    TOMBSTONE,
    WAL,
    WAL_INIT,
    apply_record,
    engine,
    page_of,
    record,
)
from tests.fixtures.waiting import wait_until

SIZE = REL.size_key()
BLOCK = REL.block_key(0)
VM = RelTag(1663, 5, 16384, Fork.VISIBILITY_MAP)


def count(page: bytes) -> int:
    """How many records `ByteRedo` has applied to it."""
    (number,) = struct.unpack_from("<Q", page)
    return int(number)


async def put(timeline: Timeline, *values: tuple[bytes, int, bytes]) -> int:
    """One record with these values; returns its LSN."""
    prev, lsn = timeline.last_record_lsn, timeline.last_record_lsn + 0x40
    await timeline.put_batch([(key, lsn, kind, payload) for key, kind, payload in values], lsn, prev)
    return lsn


@asynccontextmanager
async def running(timeline: Timeline) -> AsyncIterator[None]:
    task = asyncio.create_task(timeline.run())
    try:
        yield
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


# --- reading ---


async def test_a_page_at_every_lsn_from_memory_and_from_layers(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        want = {INITDB_LSN: page_of(1)}
        page = bytearray(page_of(1))
        for number in range(10):
            payload = record(100 + number, b"abc")
            apply_record(page, payload)
            want[await put(timeline, (BLOCK, WAL, payload))] = bytes(page)
            if number in (3, 6):
                await timeline.checkpoint()
        for reader in (timeline, await one.open()):
            for lsn, expected in want.items():
                if lsn <= reader.last_record_lsn:
                    assert await reader.get_page(REL, 0, lsn) == expected
                    assert await reader.get_page(REL, 0, min(lsn + 0x3F, reader.last_record_lsn)) == expected


async def test_kinds_of_values_and_what_starts_a_chain(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await one.create([(BLOCK, page_of(1)), (SIZE, struct.pack(">I", 1))])
        init = await put(timeline, (BLOCK, WAL_INIT, record(50, b"new")))
        page = await timeline.get_page(REL, 0, init)
        assert page[50:53] == b"new"
        assert page[1000] == 0
        tombstone = await put(timeline, (BLOCK, TOMBSTONE, b""), (SIZE, TOMBSTONE, b""))
        assert await timeline.get_page(REL, 0, tombstone) == bytes(PAGE)
        assert await timeline.rel_size(REL, tombstone) is None
        assert await timeline.rel_size(REL, init) == 1
        image = await put(timeline, (BLOCK, IMAGE, page_of(7)))
        assert await timeline.get_page(REL, 0, image) == page_of(7)
        with pytest.raises(NotFoundError):
            await timeline.get_page(REL, 99, image)
        assert await timeline.get(SIZE, image) is None
        with pytest.raises(NotFoundError):
            await timeline.get_pages(REL, range(3), image)


async def test_native_and_wal_on_one_visibility_map_page(tmp_path: Path) -> None:
    """Redo and Python take turns, in LSN order."""
    async with engine(tmp_path) as one:
        timeline = await one.create()
        key = VM.block_key(0)
        lsns = []
        for start in (0, 1):
            lsns.append(await put(timeline, (key, WAL, record(24 + start, b"\xff"))))
            lsns.append(await put(timeline, (key, NATIVE, native.pack_vm_clear([(start * 4, 1)]))))
            lsns.append(await put(timeline, (key, NATIVE, native.pack_vm_clear([(start * 4 + 1, 2)]))))
        page = await timeline.get_page(VM, 0, lsns[-1])
        assert page[24:26] == bytes([0b1111_0110, 0b1111_0110])
        assert (await timeline.get_page(VM, 0, lsns[1]))[24:26] == bytes([0b1111_1110, 0])
        assert one.redo.calls == 3
        truncated = await put(timeline, (key, NATIVE, native.pack_vm_truncate(4)))
        assert (await timeline.get_page(VM, 0, truncated))[24:26] == bytes([0b1111_0110, 0])


async def test_wal_without_a_page_is_corruption_except_in_a_visibility_map(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await one.create()
        lsn = await put(timeline, (REL.block_key(5), WAL, record(50, b"x")), (SIZE, WAL, b"x"))
        with pytest.raises(CorruptedError):
            await timeline.get_page(REL, 5, lsn)
        with pytest.raises(CorruptedError):
            await timeline.get(SIZE, lsn)


async def test_commit_log_pages_by_scan(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        keys = [slru_key(Slru.CLOG, page) for page in range(3)]
        timeline = await one.create([(key, bytes(PAGE)) for key in keys])
        await put(timeline, (keys[1], NATIVE, native.pack_clog_set([32768 + 2], XidStatus.COMMITTED)))
        await timeline.checkpoint()
        lsn = await put(timeline, (keys[1], NATIVE, native.pack_clog_set([32768 + 1], XidStatus.ABORTED)))
        dropped = await put(timeline, (keys[0], TOMBSTONE, b""))
        pages = dict(await timeline.scan(field1_range(SLRU_PAGE), lsn))
        assert sorted(pages) == keys
        assert pages[keys[1]][0] == 0b00_01_10_00
        assert [key for key, _ in await timeline.scan(field1_range(SLRU_PAGE), dropped)] == keys[1:]


async def test_scan_sees_every_source_once_and_nothing_newer(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        rels = [RelTag(1663, 5, 16384 + n, Fork.MAIN) for n in range(6)]
        timeline = await one.create([(rel.size_key(), struct.pack(">I", 1)) for rel in rels[:3]])
        await put(timeline, (rels[3].size_key(), IMAGE, struct.pack(">I", 4)))
        await timeline.checkpoint()
        await put(timeline, (rels[0].size_key(), IMAGE, struct.pack(">I", 10)))
        await timeline.checkpoint()
        lsn = await put(timeline, (rels[4].size_key(), IMAGE, struct.pack(">I", 5)))
        newer = await put(timeline, (rels[5].size_key(), IMAGE, struct.pack(">I", 6)))
        got = [(key, struct.unpack(">I", value)[0]) for key, value in await timeline.scan(field1_range(REL_SIZE), lsn)]
        assert got == list(zip([rel.size_key() for rel in rels[:5]], [10, 1, 1, 4, 5], strict=True))
        assert len(await timeline.scan(field1_range(REL_SIZE), newer)) == 6
        only = KeyRange(rels[2].size_key(), rels[4].size_key())
        assert [key for key, _ in await timeline.scan(only, newer)] == [rels[2].size_key(), rels[3].size_key()]


async def test_many_pages_at_once(tmp_path: Path) -> None:
    config = replace(QUICK, chunk_size_bytes=4096, chunk_cache_bytes=64 * 1024, page_cache_bytes=64 * 1024)
    async with engine(tmp_path, config=config) as one:
        timeline = await one.create([(REL.block_key(block), page_of(block)) for block in range(200)])
        lsn = await put(timeline, *((REL.block_key(block), WAL, record(9, b"!")) for block in range(0, 200, 3)))
        for reader in (timeline, await one.open()):
            at = min(lsn, reader.last_record_lsn)
            pages = await reader.get_pages(REL, range(200), at)
            for block, page in enumerate(pages):
                want = bytearray(page_of(block))
                if block % 3 == 0 and at == lsn:
                    apply_record(want, record(9, b"!"))
                assert page == want


async def test_hot_page_redoes_only_what_is_new(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        for _ in range(20):
            lsn = await put(timeline, (BLOCK, WAL, record(9, b"x")))
        await timeline.get_page(REL, 0, lsn)
        assert one.redo.records == 20
        await timeline.get_page(REL, 0, lsn)
        lsn = await put(timeline, (BLOCK, WAL, record(9, b"x")))
        assert count(await timeline.get_page(REL, 0, lsn)) == 21
        assert one.redo.records == 21
        assert count(await timeline.get_page(REL, 0, lsn - 0x40 * 11)) == 10


async def test_lsns_outside_of_history_are_refused(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        with pytest.raises(UnavailableError):
            await timeline.get_page(REL, 0, INITDB_LSN + 1)
        with pytest.raises(InvalidInputError):
            await timeline.get_page(REL, 0, INITDB_LSN - 1)


# --- writing ---


async def test_batches_out_of_order_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        lsn = await put(timeline, (BLOCK, IMAGE, page_of(2)))
        for values, last in (
            ([(BLOCK, lsn, IMAGE, b"")], lsn + 8),
            ([(BLOCK, lsn + 16, IMAGE, b"")], lsn + 8),
            ([], lsn - 8),
        ):
            with pytest.raises(ConflictError):
                await timeline.put_batch(values, last, lsn)
        assert timeline.last_record_lsn == lsn
        assert await timeline.get_page(REL, 0, lsn) == page_of(2)


async def test_wait_lsn(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        await timeline.wait_lsn(INITDB_LSN, 0)
        waiters = [asyncio.create_task(timeline.wait_lsn(INITDB_LSN + n, 10)) for n in (0x40, 0x80)]
        with pytest.raises(UnavailableError):
            await timeline.wait_lsn(INITDB_LSN + 0x1000, 0.01)
        assert len(timeline._waiters) == 2
        await put(timeline, (BLOCK, IMAGE, page_of(2)))
        await waiters[0]
        assert not waiters[1].done()
        await put(timeline)
        await waiters[1]


async def test_frozen_by_distance_flushed_in_the_background(tmp_path: Path) -> None:
    async with engine(tmp_path, config=replace(QUICK, checkpoint_distance_bytes=0x400)) as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        async with running(timeline):
            for _ in range(100):
                lsn = await put(timeline, (BLOCK, WAL, record(9, b"x")))
            await wait_until(lambda: timeline.remote_consistent_lsn > lsn - 0x480)
            assert timeline.layer_count > 4
            assert timeline.initdb_lsn <= timeline.remote_consistent_lsn <= timeline.disk_consistent_lsn <= lsn
            assert count(await timeline.get_page(REL, 0, lsn)) == 100


async def test_frozen_by_age(tmp_path: Path) -> None:
    async with engine(tmp_path, config=replace(QUICK, checkpoint_timeout_s=0.02)) as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        async with running(timeline):
            lsn = await put(timeline, (BLOCK, WAL, record(9, b"x")))
            await wait_until(lambda: timeline.remote_consistent_lsn == lsn)
        assert timeline.in_memory_size_bytes == 0


async def test_records_without_values_move_the_durable_position_too(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        lsn = await put(timeline)
        await timeline.checkpoint()
        assert timeline.layer_count == 1
        again = await one.open()
        assert (again.last_record_lsn, again.prev_record_lsn) == (lsn, lsn - 0x40)


async def test_ingest_waits_for_flushes_and_goes_on(tmp_path: Path) -> None:
    store = FaultyObjectStore(MemoryObjectStore())
    config = replace(QUICK, checkpoint_distance_bytes=0x40, frozen_layers=2)
    async with engine(tmp_path, store=store, config=config) as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        async with running(timeline):
            hold = store.hold(Operation.PUT_IF_ABSENT)
            await put(timeline, (BLOCK, WAL, record(9, b"x")))
            await hold.reached.wait()
            await put(timeline, (BLOCK, WAL, record(9, b"x")))
            third = asyncio.create_task(put(timeline, (BLOCK, WAL, record(9, b"x"))))
            for _ in range(10):
                await asyncio.sleep(0)
            assert not third.done()
            hold.release.set()
            lsn = await third
            assert count(await timeline.get_page(REL, 0, lsn)) == 3


async def test_a_store_that_is_away_is_a_fault_that_heals(tmp_path: Path) -> None:
    store = FaultyObjectStore(MemoryObjectStore())
    async with engine(tmp_path, store=store, config=replace(QUICK, checkpoint_distance_bytes=0x40)) as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        async with running(timeline):
            store.fail(Operation.PUT_IF_ABSENT, times=ALWAYS)
            lsn = await put(timeline, (BLOCK, WAL, record(9, b"x")))
            await wait_until(lambda: timeline.fault)
            assert timeline.remote_consistent_lsn == INITDB_LSN
            assert count(await timeline.get_page(REL, 0, lsn)) == 1
            store.heal()
            await wait_until(lambda: timeline.remote_consistent_lsn == lsn)
            assert timeline.fault == ""


async def test_when_only_the_index_failed_the_layer_is_not_written_again(tmp_path: Path) -> None:
    store = FaultyObjectStore(MemoryObjectStore())
    async with engine(tmp_path, store=store) as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        lsn = await put(timeline, (BLOCK, WAL, record(9, b"x")))
        store.fail(Operation.LIST, times=2)
        for _ in range(2):
            with pytest.raises(UnavailableError):
                await timeline.checkpoint()
        assert timeline.disk_consistent_lsn == lsn
        assert timeline.remote_consistent_lsn == INITDB_LSN
        await timeline.checkpoint()
        assert timeline.remote_consistent_lsn == lsn
        layers = [info.key async for info in store.list("") if "/layers/delta" in info.key]
        assert len(layers) == 2  # one, and its envelope


async def test_two_writers_the_loser_stops_but_still_reads(tmp_path: Path) -> None:
    async with engine(tmp_path / "a") as one, engine(tmp_path / "b", like=one) as two:
        first = await one.create([(BLOCK, page_of(1))])
        second = await two.open()
        await put(second, (BLOCK, IMAGE, page_of(2)))
        await second.checkpoint()
        lsn = await put(first, (BLOCK, IMAGE, page_of(3)))
        with pytest.raises(FencedError):
            await first.checkpoint()
        with pytest.raises(FencedError):
            await put(first, (BLOCK, IMAGE, page_of(4)))
        assert first.remote_consistent_lsn == INITDB_LSN
        assert "another pageserver" in first.fault
        assert await first.get_page(REL, 0, lsn) == page_of(3)
        await first.reopen()  # somebody decided that this one is it
        assert await first.get_page(REL, 0, first.last_record_lsn) == page_of(2)


# --- images that keep chains short ---


async def test_flush_adds_images_to_long_chains_over_layers(tmp_path: Path) -> None:
    async with engine(tmp_path, config=replace(QUICK, image_threshold_values=8)) as one:
        timeline = await one.create([(REL.block_key(block), page_of(1)) for block in range(2)])
        for round_number in range(10):
            for _ in range(3):
                lsn = await put(timeline, (BLOCK, WAL, record(9, b"x")))
            if round_number == 0:
                await put(timeline, (REL.block_key(1), WAL, record(9, b"x")))
            await timeline.checkpoint()
        assert lsn == timeline.last_record_lsn
        fresh = await one.open()
        one.redo.longest = 0
        for back in range(30):
            assert count(await fresh.get_page(REL, 0, lsn - 0x40 * back)) > 0
        assert count(await fresh.get_page(REL, 0, lsn)) == 30
        assert one.redo.longest <= 8 + 3
        assert count(await fresh.get_page(REL, 1, lsn)) == 1


async def test_flush_makes_images_of_native_chains_too(tmp_path: Path) -> None:
    key = slru_key(Slru.CLOG, 0)
    async with engine(tmp_path, config=replace(QUICK, image_threshold_values=8)) as one:
        timeline = await one.create([(key, bytes(PAGE))])
        for xid in range(3, 20):
            lsn = await put(timeline, (key, NATIVE, native.pack_clog_set([xid], XidStatus.COMMITTED)))
        want = await timeline.get(key, lsn)
        await timeline.checkpoint()
        assert timeline.last_flush.images == 1
        assert await (await one.open()).get(key, lsn) == want


async def test_without_redo_a_flush_keeps_the_records(tmp_path: Path) -> None:
    async with engine(tmp_path, config=replace(QUICK, image_threshold_values=2)) as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        for _ in range(5):
            lsn = await put(timeline, (BLOCK, WAL, record(9, b"x")))
        one.redo.available = False
        await timeline.checkpoint()
        assert timeline.remote_consistent_lsn == lsn
        assert timeline.last_flush.images == 0
        with pytest.raises(UnavailableError):
            await timeline.get_page(REL, 0, lsn)
        one.redo.available = True
        assert count(await timeline.get_page(REL, 0, lsn)) == 5
        lsn = await put(timeline, (BLOCK, WAL, record(9, b"x")))
        await timeline.checkpoint()
        assert timeline.last_flush.images == 1
        assert count(await (await one.open()).get_page(REL, 0, lsn)) == 6


async def test_hot_pages_get_images_while_their_layer_is_open(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        async with running(timeline):
            for _ in range(1000):
                lsn = await put(timeline, (BLOCK, WAL, record(9, b"x")))
                await asyncio.sleep(0)
            live = timeline._live
            assert live is not None
            await wait_until(lambda: tail_length(live.open.run(BLOCK))[0] < 2 * LONG_RUN_VALUES)
        one.redo.longest = one.redo.records = 0
        live.reader.close()  # no cached page helps
        for back in range(0, 999, 37):
            assert count(await timeline.get_page(REL, 0, lsn - 0x40 * back)) == 1000 - back
        assert one.redo.longest <= 2 * LONG_RUN_VALUES


async def test_a_flush_cuts_very_long_runs(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        for _ in range(1000):
            lsn = await put(timeline, (BLOCK, WAL, record(9, b"x")))
        await timeline.checkpoint()
        assert one.redo.records == 1000  # each once
        fresh = await one.open()
        one.redo.longest = 0
        for back in range(0, 999, 37):
            assert count(await fresh.get_page(REL, 0, lsn - 0x40 * back)) == 1000 - back
        assert one.redo.longest < LONG_RUN_VALUES


# --- caches and disk ---


async def test_restart_with_an_empty_disk(tmp_path: Path) -> None:
    async with engine(tmp_path / "a") as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        lsn = await put(timeline, (BLOCK, WAL, record(9, b"x")))
        await timeline.checkpoint()
        async with engine(tmp_path / "b", like=one) as two:
            again = await two.open(at_least_lsn=lsn)
            assert count(await again.get_page(REL, 0, lsn)) == 1
            assert two.files.local_reads == 0
            assert two.files.remote_reads > 0


async def test_no_file_holds_plaintext_and_reading_hot_pages_touches_no_disk(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        canary = b"canary in the coal mine"
        timeline = await one.create([(BLOCK, bytes(100) + canary + bytes(PAGE - 100 - len(canary)))])
        lsn = await put(timeline, (BLOCK, WAL, record(5000, canary)))
        await timeline.checkpoint()
        again = await one.open()
        page = await again.get_page(REL, 0, lsn)
        assert page.count(canary) == 2  # positive control
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(files) >= 3
        stored = [await one.store.get(info.key) async for info in one.store.list("")]
        assert not any(canary in data for data in (*stored, *(path.read_bytes() for path in files)))
        reads = one.files.local_reads, one.files.remote_reads
        for _ in range(10):
            await again.get_page(REL, 0, lsn)
            await again.get_page(REL, 0, lsn - 1)
        assert (one.files.local_reads, one.files.remote_reads) == reads


# --- losing keys ---


async def test_revocation_drops_everything_and_restore_goes_on_from_the_durable_position(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        durable = await put(timeline, (BLOCK, WAL, record(9, b"x")))
        await timeline.checkpoint()
        lost = await put(timeline, (BLOCK, WAL, record(9, b"y")))
        await timeline.get_page(REL, 0, lost)
        live = timeline._live
        assert live is not None
        waiter = asyncio.create_task(timeline.wait_lsn(lost + 0x40, 10))
        await asyncio.sleep(0)

        steps = await one.keys.revoke(one.project_id)
        assert set(steps) == {"plaintext dropped", "reads drained"}
        with pytest.raises(RevokedError):
            await waiter
        assert not timeline.is_live
        assert live.layers.memory_size_bytes == live.reader.cache_size_bytes == 0
        assert all(layer.size_bytes == 0 for layer in (live.open,))
        for attempt in (
            timeline.get_page(REL, 0, durable),
            timeline.scan(field1_range(REL_SIZE), durable),
            timeline.get_pages(REL, [0], durable),
            timeline.wait_lsn(durable, 1),
            timeline.put_batch([], lost + 8, lost),
            timeline.checkpoint(),
        ):
            with pytest.raises(RevokedError):
                await attempt
        assert timeline.remote_consistent_lsn == timeline.last_record_lsn == durable
        assert await timeline.drop_plaintext() == {}

        await one.keys.restore(one.project_id)
        with pytest.raises(UnavailableError):
            await timeline.get_page(REL, 0, durable)
        await timeline.reopen()
        assert (timeline.last_record_lsn, timeline.prev_record_lsn) == (durable, durable - 0x40)
        assert (await timeline.get_page(REL, 0, durable))[9:10] == b"x"
        assert await put(timeline, (BLOCK, WAL, record(9, b"y"))) == lost
        assert (await timeline.get_page(REL, 0, lost))[9:10] == b"y"
        await timeline.checkpoint()
        assert timeline.remote_consistent_lsn == lost


@pytest.mark.parametrize("during", ["the store's answer", "redo"])
@pytest.mark.parametrize("how", ["get_page", "get_pages", "scan"])
async def test_a_lease_that_ran_out_during_a_read_stops_the_answer(tmp_path: Path, how: str, during: str) -> None:
    """A process that was paused: nobody told it, and still nothing leaves."""
    store = FaultyObjectStore(MemoryObjectStore())
    async with engine(tmp_path / "a", store=store) as one, engine(tmp_path / "b", like=one, store=store) as two:
        writer = await one.create([(BLOCK, page_of(1))])
        lsn = await put(writer, (BLOCK, WAL, record(9, b"x")))
        await writer.checkpoint()
        timeline = await two.open()

        async def read() -> object:
            if how == "get_page":
                return await timeline.get_page(REL, 0, lsn)
            if how == "get_pages":
                return await timeline.get_pages(REL, [0], lsn)
            return await timeline.scan(field1_range(REL_BLOCK), lsn)

        if during == "redo":
            hold = two.redo.hold = Hold()
        else:
            hold = store.hold(Operation.GET_RANGE)
        reading = asyncio.create_task(read())
        await hold.reached.wait()
        two.lease.revoked(KeyState.ACTIVE, "the lease ran out")
        hold.release.set()
        with pytest.raises(LeaseExpiredError):
            await reading
        with pytest.raises(LeaseExpiredError):
            await read()  # in the cache by now, and still not


async def test_flushed_layers_are_freed_when_their_last_reader_has_left(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        async with running(timeline):
            lsn = await put(timeline, (BLOCK, WAL, record(9, b"x")))
            live = timeline._live
            assert live is not None
            layer = live.open
            with live.in_use():
                snapshot = live.snapshot
                await timeline.checkpoint()
                for _ in range(20):
                    await asyncio.sleep(0)
                assert layer.key_count == 1
                assert count(await live.reader.value(snapshot, BLOCK, lsn) or b"") == 1
            await wait_until(lambda: layer.key_count == 0)
            assert count(await timeline.get_page(REL, 0, lsn)) == 1


async def test_a_read_over_a_loss_and_a_restore_leaves_nothing_in_the_new_life(tmp_path: Path) -> None:
    store = FaultyObjectStore(MemoryObjectStore())
    config = replace(QUICK, drain_timeout_s=0.01)
    async with engine(tmp_path / "a", store=store) as one:
        await one.create([(BLOCK, page_of(1))])
        async with engine(tmp_path / "b", like=one, store=store, config=config) as two:
            two.timelines.clear()
            timeline = await two.open()
            old = timeline._live
            hold = store.hold(Operation.GET_RANGE)
            reading = asyncio.create_task(timeline.get_page(REL, 0, INITDB_LSN))
            await hold.reached.wait()
            await two.keys.revoke(two.project_id)
            await timeline.drop_plaintext()
            await two.keys.restore(two.project_id)
            await timeline.reopen()
            hold.release.set()
            with pytest.raises(KeyAccessError):
                await reading
            assert old is not None
            assert old.layers.memory_size_bytes == old.reader.cache_size_bytes == 0
            assert await timeline.get_page(REL, 0, INITDB_LSN) == page_of(1)


async def test_keys_lost_during_a_flush(tmp_path: Path) -> None:
    """Wherever the flush is: it ends, without a fault, and the next life is whole."""
    for operation, nth in [(Operation.PUT_IF_ABSENT, n) for n in range(4)] + [(Operation.LIST, 0)]:
        store = FaultyObjectStore(MemoryObjectStore())
        async with engine(tmp_path / f"{operation}{nth}", store=store) as one:
            timeline = await one.create([(BLOCK, page_of(1))])
            async with running(timeline):
                lsn = await put(timeline, (BLOCK, WAL, record(9, b"x")))
                for _ in range(nth):
                    store.delay(operation, 0, times=1)
                holds = [store.hold(operation)]
                flush = asyncio.create_task(timeline.checkpoint())
                for _ in range(nth):
                    await holds[-1].reached.wait()
                    holds.append(store.hold(operation))
                    holds[-2].release.set()
                await holds[-1].reached.wait()
                await one.keys.revoke(one.project_id)
                await one.keys.restore(one.project_id)
                reopening = asyncio.create_task(timeline.reopen())
                await asyncio.sleep(0)
                holds[-1].release.set()
                with pytest.raises(KeyAccessError):
                    await flush
                await reopening
                assert timeline.fault == ""
                assert timeline.last_record_lsn in (INITDB_LSN, lsn)
                if timeline.last_record_lsn == INITDB_LSN:
                    await put(timeline, (BLOCK, WAL, record(9, b"x")))
                await timeline.checkpoint()
                assert timeline.remote_consistent_lsn == lsn
                assert count(await timeline.get_page(REL, 0, lsn)) == 1


async def test_a_shredded_project_stays_closed(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await one.create([(BLOCK, page_of(1))])
        await one.keys.shred(one.project_id)
        await one.keys.restore(one.project_id)
        with pytest.raises(ShreddedError):
            await timeline.reopen()
        with pytest.raises(ShreddedError):
            await timeline.get_page(REL, 0, INITDB_LSN)


async def test_no_such_timeline(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        with pytest.raises(NotFoundError):
            await one.open()
