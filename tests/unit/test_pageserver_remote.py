"""The timeline in the object store: slots of the index, rivals, lost answers, rollbacks, orphans."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from pageserver.index_part import IndexPart
from pageserver.layer.name import LayerDescriptor, LayerKind, layer_name
from pageserver.remote_timeline import VOID, FencedError, RemoteTimeline, TimelineExistsError
from shared.errors import CorruptedError, IntegrityError, UnavailableError
from shared.keyspace import KeyRange
from shared.retry import NO_RETRY, RetryPolicy
from shared.storage.base import ObjectInfo, StoreFailedError
from shared.storage.faulty import FaultyObjectStore, Moment, Operation
from shared.storage.local import LocalObjectStore
from shared.storage.memory import MemoryObjectStore
from tests.fixtures.broken_sync import BrokenSync
from tests.fixtures.pageserver import INITDB_LSN, REL, Engine, engine, page_of


def remote(on: Engine, retry: RetryPolicy = NO_RETRY) -> RemoteTimeline:
    return RemoteTimeline(on.project_id, on.timeline_id, on.store, on.files, on.keys, on.lease, retry)


def index_of(on: Engine, lsn: int, prev: int = 0) -> IndexPart:
    return IndexPart(on.project_id, on.timeline_id, 77, INITDB_LSN, lsn, prev, ())


async def slots(on: Engine) -> list[str]:
    return [info.key.rpartition("/")[2] async for info in on.store.list("") if "/index/" in info.key]


def slot_key(on: Engine, slot: int) -> str:
    return f"projects/{on.project_id}/timelines/{on.timeline_id}/index/{slot:016x}"


async def test_versions_follow_each_other_and_old_ones_go(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        writer = remote(one)
        assert await writer.load() is None
        for lsn in range(0x1000, 0x1005):
            await writer.publish(index_of(one, lsn))
        assert await slots(one) == ["0" * 15 + "4", "0" * 15 + "4.key", "0" * 15 + "5", "0" * 15 + "5.key"]
        loaded = await remote(one).load()
        assert loaded == replace(index_of(one, 0x1004), generation=1)


async def test_of_two_writers_one_is_fenced(tmp_path: Path) -> None:
    async with engine(tmp_path / "a") as one, engine(tmp_path / "b", like=one) as two:
        first, second = remote(one), remote(two)
        await first.load()
        await first.publish(index_of(one, 0x1000))
        await second.load()
        await second.publish(index_of(two, 0x1010))
        with pytest.raises(FencedError):
            await first.publish(index_of(one, 0x1020))
        with pytest.raises(FencedError):
            await first.publish(index_of(one, 0x1030))
        loaded = await remote(one).load()
        assert loaded is not None
        assert loaded.disk_consistent_lsn == 0x1010


@pytest.mark.parametrize("moment", list(Moment))
@pytest.mark.parametrize("operation", [Operation.PUT_IF_ABSENT, Operation.LIST])
async def test_a_lost_answer_is_settled_by_the_next_try(tmp_path: Path, moment: Moment, operation: Operation) -> None:
    store = FaultyObjectStore(MemoryObjectStore())
    async with engine(tmp_path, store=store) as one:
        writer = remote(one)
        await writer.load()
        await writer.publish(index_of(one, 0x1000))
        store.fail(operation, moment=moment, key_prefix=slot_key(one, 2)[:-16])
        with pytest.raises(UnavailableError):
            await writer.publish(index_of(one, 0x1010))
        # More was flushed meanwhile: the begun version is finished first, then the newer one gets its own slot.
        await writer.publish(index_of(one, 0x1020))
        loaded = await remote(one).load()
        assert loaded is not None
        assert loaded.disk_consistent_lsn == 0x1020
        assert "0" * 15 + "3" in await slots(one)


async def test_a_retry_of_the_same_version_takes_no_second_slot(tmp_path: Path) -> None:
    store = FaultyObjectStore(MemoryObjectStore())
    async with engine(tmp_path, store=store) as one:
        writer = remote(one)
        await writer.load()
        store.fail(Operation.PUT_IF_ABSENT, moment=Moment.AFTER, key_prefix=slot_key(one, 1))
        with pytest.raises(UnavailableError):
            await writer.publish(index_of(one, 0x1000))
        await writer.publish(index_of(one, 0x1000))
        assert await slots(one) == ["0" * 15 + "1", "0" * 15 + "1.key"]


async def test_a_slot_begun_by_a_dead_writer_is_closed(tmp_path: Path) -> None:
    store = FaultyObjectStore(MemoryObjectStore())
    async with engine(tmp_path, store=store) as one:
        dead = remote(one)
        await dead.load()
        await dead.publish(index_of(one, 0x1000))
        # Its envelope for slot 2 gets there, the index does not.
        store.fail(Operation.PUT_IF_ABSENT, moment=Moment.AFTER, key_prefix=slot_key(one, 2) + ".key")
        with pytest.raises(UnavailableError):
            await dead.publish(index_of(one, 0x1010))
        alive = remote(one)
        loaded = await alive.load()
        assert loaded is not None
        assert loaded.disk_consistent_lsn == 0x1000
        assert await store.get(slot_key(one, 2)) == VOID
        await alive.publish(index_of(one, 0x1020))
        # The dead one was only asleep.
        with pytest.raises(FencedError):
            await dead.publish(index_of(one, 0x1010))
        loaded = await remote(one).load()
        assert loaded is not None
        assert loaded.disk_consistent_lsn == 0x1020


async def test_a_writer_that_slept_until_its_slot_was_deleted_is_fenced(tmp_path: Path) -> None:
    async with engine(tmp_path / "a") as one, engine(tmp_path / "b", like=one) as two:
        asleep = remote(one)
        await asleep.load()
        await asleep.publish(index_of(one, 0x1000))
        awake = remote(two)
        await awake.load()
        for lsn in range(0x1010, 0x1015):
            await awake.publish(index_of(two, lsn))
        assert "0" * 15 + "2" not in await slots(one)
        with pytest.raises(FencedError):
            await asleep.publish(index_of(one, 0x1020))
        loaded = await remote(two).load()
        assert loaded is not None
        assert loaded.disk_consistent_lsn == 0x1014


class StaleListings(MemoryObjectStore):
    """Shares its objects with `inner`, but still lists below `prefix` what was there at the beginning."""

    def __init__(self, inner: MemoryObjectStore, prefix: str) -> None:
        super().__init__()
        self._objects = inner._objects
        self._prefix = prefix
        self._listed = [
            ObjectInfo(key, len(data)) for key, data in sorted(inner._objects.items()) if key.startswith(prefix)
        ]

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        if prefix.startswith(self._prefix):
            for info in self._listed:
                yield info
            return
        async for info in super().list(prefix):
            yield info


async def long_asleep(one: Engine, two: Engine) -> tuple[RemoteTimeline, str]:
    """A writer whose next slot another one has filled and deleted, and a layer of that one; and no listing says so."""
    asleep = remote(one)
    await asleep.load()
    await asleep.publish(index_of(one, 0x1000))
    assert isinstance(one.store, MemoryObjectStore)
    asleep._store = StaleListings(one.store, slot_key(one, 1)[:-16])
    awake = remote(two)
    await awake.load()
    for lsn in range(0x1010, 0x1015):
        await awake.publish(index_of(two, lsn))
    layer = awake.layer_object_key(layer_name(LayerKind.IMAGE, 0x1010, 0x1011, awake.generation, "ab" * 8))
    await two.store.put(layer, b"the rival's")
    return asleep, layer


async def test_a_writer_that_slept_is_fenced_although_listings_are_old(tmp_path: Path) -> None:
    async with engine(tmp_path / "a") as one, engine(tmp_path / "b", like=one) as two:
        asleep, layer = await long_asleep(one, two)
        before = await slots(two)
        await asleep.look_for_orphans(set())
        with pytest.raises(FencedError):
            await asleep.publish(index_of(one, 0x1020))
        assert await two.store.get(layer) == b"the rival's"
        assert await slots(two) == before, "nor has it left a version behind"


async def test_a_writer_that_slept_deletes_nothing_although_listings_are_old(tmp_path: Path) -> None:
    async with engine(tmp_path / "a") as one, engine(tmp_path / "b", like=one) as two:
        asleep, layer = await long_asleep(one, two)
        with pytest.raises(FencedError):
            await asleep.delete_layers([layer.rpartition("/")[2]])
        assert await two.store.get(layer) == b"the rival's"


async def test_a_slot_is_deleted_after_all_older_ones(tmp_path: Path) -> None:
    """Also one that was closed, between two versions that are kept."""
    store = FaultyObjectStore(MemoryObjectStore())
    async with engine(tmp_path, store=store) as one:
        dead = remote(one)
        await dead.load()
        await dead.publish(index_of(one, 0x1000))
        store.fail(Operation.PUT_IF_ABSENT, moment=Moment.AFTER, key_prefix=slot_key(one, 2) + ".key")
        with pytest.raises(UnavailableError):
            await dead.publish(index_of(one, 0x1010))
        alive = remote(one)
        await alive.load()
        await alive.publish(index_of(one, 0x1020))
        assert {name[:16] for name in await slots(one)} == {f"{slot:016x}" for slot in (1, 2, 3)}
        await alive.publish(index_of(one, 0x1030))
        assert {name[:16] for name in await slots(one)} == {f"{slot:016x}" for slot in (3, 4)}


async def test_an_older_index_shown_again_is_noticed(tmp_path: Path) -> None:
    async with engine(tmp_path / "a") as one:
        writer = remote(one)
        await writer.load()
        await writer.publish(index_of(one, 0x1000))
        saved = {key: await one.store.get(key) for key in (slot_key(one, 1), slot_key(one, 1) + ".key")}
        await writer.publish(index_of(one, 0x1010))
        await writer.publish(index_of(one, 0x1020))
        # The operator of the store rolls it back.
        for slot in (1, 2, 3):
            await one.store.delete_many([slot_key(one, slot), slot_key(one, slot) + ".key"])
        for key, data in saved.items():
            await one.store.put(key, data)
        with pytest.raises(IntegrityError):
            await remote(one).load()
        async with engine(tmp_path / "empty disk", like=one) as two:
            with pytest.raises(IntegrityError):
                await remote(two).load(at_least_lsn=0x1020)
            # What cannot be noticed: no local memory, nobody who knows better.
            assert await remote(two).load() == replace(index_of(one, 0x1000), generation=1)


async def test_an_index_whose_folder_was_not_synced_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [await LocalObjectStore.open(tmp_path / "store") for _ in range(2)]
    async with engine(tmp_path / "a", store=stores[0]) as one:
        writer = remote(one, RetryPolicy(attempts=4, first_delay_s=0))
        await writer.load()
        await writer.publish(index_of(one, 0x1000))
        with monkeypatch.context() as patch:
            broken = BrokenSync(patch, directory=True)
            for _ in range(3):
                with pytest.raises(StoreFailedError):
                    await writer.publish(index_of(one, 0x1010))
            assert broken.failed
        async with engine(tmp_path / "b", store=stores[1], like=one) as two:
            after = remote(two)
            assert await after.load() == replace(index_of(one, 0x1000), generation=1)
            await after.publish(index_of(two, 0x1010))
    for store in stores:
        await store.close()


async def test_an_index_under_another_number_or_name_does_not_open(tmp_path: Path) -> None:
    async with engine(tmp_path / "a") as one, engine(tmp_path / "b", like=one) as two:
        writer = remote(one)
        await writer.load()
        await writer.publish(index_of(one, 0x1000))
        for suffix in ("", ".key"):
            await one.store.put(slot_key(one, 9) + suffix, await one.store.get(slot_key(one, 1) + suffix))
        with pytest.raises(IntegrityError):
            await remote(two).load()
        await one.store.delete_many([slot_key(one, 9), slot_key(one, 9) + ".key"])
        other = replace(two, timeline_id=type(one.timeline_id).new())
        for suffix in ("", ".key"):
            await one.store.put(slot_key(other, 1) + suffix, await one.store.get(slot_key(one, 1) + suffix))
        with pytest.raises(IntegrityError):
            await remote(other).load()


async def test_every_altered_byte_of_index_and_envelope_is_noticed(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        writer = remote(one)
        await writer.load()
        await writer.publish(index_of(one, 0x1000))
        for key in (slot_key(one, 1), slot_key(one, 1) + ".key"):
            good = await one.store.get(key)
            for position in range(0, len(good), 7 if key.endswith(".key") else 13):
                await one.store.put(key, good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
                with pytest.raises(IntegrityError):
                    await remote(one).load()
            await one.store.put(key, good[:-1])
            with pytest.raises(IntegrityError):
                await remote(one).load()
            await one.store.delete(key)
            with pytest.raises(IntegrityError):
                await remote(one).load(at_least_lsn=0x1000)
            await one.store.put(key, good)
        assert await remote(one).load() == replace(index_of(one, 0x1000), generation=1)


async def test_orphans_are_deleted_once_nobody_can_list_them(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await one.create([(REL.block_key(0), page_of(1))])
        orphan = f"projects/{one.project_id}/timelines/{one.timeline_id}/layers/image-0000000000001000-{'ab' * 8}"
        await one.store.put(orphan, b"half")
        await one.store.put(orphan + ".key", b"half")
        writer = remote(one)
        index = await writer.load()
        assert index is not None
        assert await one.store.get(orphan) == b"half"
        await writer.publish(index)
        left = [info.key async for info in one.store.list("") if "/layers/" in info.key]
        assert len(left) == 2
        assert orphan not in left
        assert await timeline.get_page(REL, 0, INITDB_LSN) == page_of(1)


async def test_create_twice(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        await one.create()
        with pytest.raises(TimelineExistsError):
            await one.create()


async def test_a_rewrapped_envelope_is_found_beside_the_layer(tmp_path: Path) -> None:
    """After a KEK rotation the copy in the index is stale, and only `<layer>.key` opens."""
    async with engine(tmp_path) as one:
        await one.create([(REL.block_key(0), page_of(1))])
        writer = remote(one)
        index = await writer.load()
        assert index is not None
        ((layer, envelope),) = index.layers
        stale = replace(envelope, kek_version=envelope.kek_version + 7)
        await writer.publish(replace(index, layers=((layer, stale),)))
        reopened = await one.open()
        assert await reopened.get_page(REL, 0, INITDB_LSN) == page_of(1)


# --- the index as bytes ---


async def test_index_round_trips_and_refuses_the_rest(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        await one.create([(REL.block_key(0), page_of(1))])
        index = await remote(one).load()
        assert index is not None
        data = index.serialize()
        assert IndexPart.parse(data) == index
        for bad in (
            b"",
            b"{}",
            data[:-1],
            data.replace(b'"format_version":1', b'"format_version":2'),
            data.replace(b'"layers"', b'"unknown":1,"layers"'),
            data.replace(b'"initdb_lsn"', b'"initdb"'),
            data.replace(b"image-", b"other-"),
            data.replace(b"KLEV", b""),
            data.replace(b'"envelope":"', b'"envelope":"!!'),
            data.replace(b'"disk_consistent_lsn":"0/1000"', b'"disk_consistent_lsn":"0/FFE"'),
            b"\xff" + data,
        ):
            if bad == data:
                continue
            with pytest.raises(CorruptedError) as caught:
                IndexPart.parse(bad)
            assert str(one.project_id) not in str(caught.value)


def test_a_layer_from_the_future_is_refused() -> None:
    name = layer_name(LayerKind.DELTA, 0x1001, 0x1100, 1, "0" * 16)
    LayerDescriptor(name, LayerKind.DELTA, KeyRange(bytes(18), b"\1" * 18), 0x1001, 0x1100, 10)
    with pytest.raises(CorruptedError):
        LayerDescriptor(name, LayerKind.DELTA, KeyRange(bytes(18), b"\1" * 18), 0x1001, 0x1101, 10)
