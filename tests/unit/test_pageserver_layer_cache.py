"""The local cache of sealed layer files."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pageserver.layer_cache import LayerCache
from shared.storage.base import InvalidKeyError, InvalidRangeError, ObjectNotFoundError
from shared.storage.faulty import FaultyObjectStore, Operation
from shared.storage.memory import MemoryObjectStore
from shared.storage.threads import BlockingPool
from tests.fixtures.waiting import wait_until

KEYS = [f"projects/p/timelines/t/layers/layer-{n}" for n in range(4)]


@pytest.fixture
async def pool() -> AsyncIterator[BlockingPool]:
    made = BlockingPool(2, "test")
    yield made
    await made.close()


async def test_reads_come_from_disk_after_insert(tmp_path: Path, pool: BlockingPool) -> None:
    store = FaultyObjectStore(MemoryObjectStore())
    cache = await LayerCache.open(store, tmp_path, 1000, pool)
    await store.put(KEYS[0], b"0123456789")
    await cache.insert(KEYS[0], b"0123456789")
    assert await cache.read(KEYS[0], 2, 5) == b"234"
    assert (cache.local_reads, cache.remote_reads) == (1, 0)
    assert not [call for call in store.calls if call.operation is Operation.GET_RANGE]
    assert stat.S_IMODE(cache.path(KEYS[0]).stat().st_mode) == 0o600


async def test_a_miss_is_answered_by_range_and_fetched_behind(tmp_path: Path, pool: BlockingPool) -> None:
    store = MemoryObjectStore()
    cache = await LayerCache.open(store, tmp_path, 1000, pool)
    await store.put(KEYS[0], b"0123456789")
    fetcher = asyncio.create_task(cache.run())
    assert await cache.read(KEYS[0], 0, 3) == b"012"
    await wait_until(lambda: KEYS[0] in cache)
    assert cache.path(KEYS[0]).read_bytes() == b"0123456789"
    fetcher.cancel()


async def test_least_recently_used_goes_first(tmp_path: Path, pool: BlockingPool) -> None:
    store = MemoryObjectStore()
    cache = await LayerCache.open(store, tmp_path, 30, pool)
    for key in KEYS[:3]:
        await store.put(key, b"x" * 10)
        await cache.insert(key, b"x" * 10)
    await cache.read(KEYS[0], 0, 1)
    await cache.insert(KEYS[3], b"x" * 10)
    assert [key in cache for key in KEYS] == [True, False, True, True]
    assert cache.size_bytes == 30
    assert not cache.path(KEYS[1]).exists()
    await cache.insert(KEYS[1], b"x" * 31)  # larger than all of it
    assert KEYS[1] not in cache


async def test_a_restart_finds_files_and_drops_leftovers(tmp_path: Path, pool: BlockingPool) -> None:
    store = MemoryObjectStore()
    cache = await LayerCache.open(store, tmp_path, 1000, pool)
    await cache.insert(KEYS[0], b"0123456789")
    await cache.remember_number("projects/p/timelines/t/index-seen", 7)
    half = cache.path(KEYS[1]).with_name("layer-1.abcd@tmp")
    half.write_bytes(b"half")
    again = await LayerCache.open(store, tmp_path, 1000, pool)
    assert await again.read(KEYS[0], 0, 2) == b"01"
    assert again.size_bytes == 10
    assert not half.exists()
    assert await again.recall_number("projects/p/timelines/t/index-seen") == 7
    smaller = await LayerCache.open(store, tmp_path, 5, pool)
    assert smaller.size_bytes == 0
    assert await smaller.recall_number("projects/p/timelines/t/index-seen") == 7


@pytest.mark.parametrize("damage", ["shorter", "gone", "a folder", "a link"])
async def test_a_file_that_is_not_what_it_was_is_dropped(tmp_path: Path, pool: BlockingPool, damage: str) -> None:
    store = MemoryObjectStore()
    cache = await LayerCache.open(store, tmp_path, 1000, pool)
    await store.put(KEYS[0], b"0123456789")
    await cache.insert(KEYS[0], b"0123456789")
    path = cache.path(KEYS[0])
    if damage == "shorter":
        os.truncate(path, 4)
    else:
        path.unlink()
        if damage == "a folder":
            path.mkdir()
        elif damage == "a link":
            path.symlink_to("/etc/hostname")
    assert await cache.read(KEYS[0], 3, 8) == b"34567"
    assert KEYS[0] not in cache


async def test_errors_of_the_store_pass_through(tmp_path: Path, pool: BlockingPool) -> None:
    store = MemoryObjectStore()
    cache = await LayerCache.open(store, tmp_path, 1000, pool)
    with pytest.raises(ObjectNotFoundError):
        await cache.read(KEYS[0], 0, 1)
    await store.put(KEYS[0], b"0123456789")
    with pytest.raises(InvalidRangeError):
        await cache.read(KEYS[0], 0, 11)
    with pytest.raises(InvalidKeyError):
        await cache.insert("../outside", b"x")


async def test_a_disk_that_cannot_be_written_is_no_error(tmp_path: Path, pool: BlockingPool) -> None:
    store = MemoryObjectStore()
    cache = await LayerCache.open(store, tmp_path, 1000, pool)
    (tmp_path / "projects").write_bytes(b"a file where a folder should be")
    await store.put(KEYS[0], b"0123456789")
    await cache.insert(KEYS[0], b"0123456789")
    assert KEYS[0] not in cache
    assert await cache.read(KEYS[0], 0, 2) == b"01"


async def test_retain_drops_only_what_is_not_listed_under_the_prefix(tmp_path: Path, pool: BlockingPool) -> None:
    cache = await LayerCache.open(MemoryObjectStore(), tmp_path, 1000, pool)
    other = "projects/q/timelines/t/layers/layer-0"
    for key in (*KEYS[:2], other):
        await cache.insert(key, b"x")
    await cache.retain("projects/p/", [KEYS[1]])
    assert [key in cache for key in (*KEYS[:2], other)] == [False, True, True]
