"""What every object store must do. Runs against the fake, a directory and a real S3 server process.

KEYLAKE_TEST_S3_ENDPOINT names another S3 server (tests/fixtures/s3.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shared.errors import ConflictError, InvalidInputError, NotFoundError
from shared.storage.base import (
    InvalidKeyError,
    InvalidRangeError,
    ObjectExistsError,
    ObjectInfo,
    ObjectNotFoundError,
    ObjectStore,
)
from shared.storage.config import ObjectStoreSettings, open_store

if TYPE_CHECKING:
    from tests.fixtures.s3 import S3Server  # not imported twice: pytest wants to rewrite its asserts


pytestmark = pytest.mark.integration

RACERS = 16
LARGE_BYTES = 32 << 20


@pytest.fixture(params=["memory", "local", "s3", "s3-prefixed"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ObjectStore]:
    match request.param:
        case "memory":
            settings = ObjectStoreSettings(url="memory://")
        case "local":
            settings = ObjectStoreSettings(url=f"file://{tmp_path}/objects")
        case name:
            server: S3Server = request.getfixturevalue("s3_server")
            settings = server.settings(server.new_bucket(), "deep/er" if name == "s3-prefixed" else "")
    store = await open_store(settings)
    yield store
    await store.close()


async def keys(store: ObjectStore, prefix: str = "") -> list[str]:
    return [info.key async for info in store.list(prefix)]


async def test_what_was_put_comes_back(store: ObjectStore) -> None:
    await store.put("prj-1/tl-2/layer.X", b"sealed")
    assert await store.get("prj-1/tl-2/layer.X") == b"sealed"
    assert await store.head("prj-1/tl-2/layer.X") == ObjectInfo("prj-1/tl-2/layer.X", 6)


@pytest.mark.parametrize("data", [b"view", bytearray(b"view"), memoryview(b"a view!")[2:6]])
async def test_takes_any_bytes(store: ObjectStore, data: bytes | bytearray | memoryview) -> None:
    await store.put("put", data)
    await store.put_if_absent("created", data)
    assert await store.get("put") == await store.get("created") == b"view"


async def test_an_object_may_be_empty(store: ObjectStore) -> None:
    await store.put_if_absent("empty", b"")
    assert await store.get("empty") == b""
    assert (await store.head("empty")).size_bytes == 0
    with pytest.raises(InvalidRangeError):
        await store.get_range("empty", 0, 1)


async def test_put_replaces(store: ObjectStore) -> None:
    await store.put("key", b"a longer first version")
    await store.put("key", b"second")
    assert await store.get("key") == b"second"
    assert await keys(store) == ["key"]


async def test_put_if_absent_refuses_and_keeps_the_object(store: ObjectStore) -> None:
    await store.put_if_absent("key", b"first")
    with pytest.raises(ObjectExistsError):
        await store.put_if_absent("key", b"second")
    with pytest.raises(ConflictError):  # its place in the error tree
        await store.put_if_absent("key", b"first")
    assert await store.get("key") == b"first"


async def test_put_if_absent_works_again_after_delete(store: ObjectStore) -> None:
    await store.put_if_absent("key", b"first")
    await store.delete("key")
    await store.put_if_absent("key", b"second")
    assert await store.get("key") == b"second"


@pytest.mark.parametrize("size_bytes", [1, 200_000])
@pytest.mark.parametrize("same_bytes", [False, True])
async def test_a_creation_race_has_one_winner(store: ObjectStore, size_bytes: int, same_bytes: bool) -> None:
    for round_number in range(5):
        key = f"race/{round_number}"
        bodies = [bytes([65 if same_bytes else racer]) * size_bytes for racer in range(RACERS)]
        outcomes = await asyncio.gather(*(store.put_if_absent(key, body) for body in bodies), return_exceptions=True)
        winners = [racer for racer, outcome in enumerate(outcomes) if outcome is None]
        losers = [outcome for outcome in outcomes if outcome is not None]
        assert len(winners) == 1, outcomes
        assert all(isinstance(outcome, ObjectExistsError) for outcome in losers), losers
        assert await store.get(key) == bodies[winners[0]]


async def test_concurrent_puts_leave_one_of_the_bodies(store: ObjectStore) -> None:
    bodies = [bytes([racer]) * 100_000 for racer in range(RACERS)]
    await asyncio.gather(*(store.put("key", body) for body in bodies))
    assert await store.get("key") in bodies


async def test_missing_objects(store: ObjectStore) -> None:
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: store.get("missing"),
        lambda: store.get_range("missing", 0, 1),
        lambda: store.head("missing"),
        lambda: store.get("mis/sing"),
    ]
    for call in calls:
        with pytest.raises(ObjectNotFoundError) as caught:
            await call()
        assert isinstance(caught.value, NotFoundError)
        assert "mis" in str(caught.value)


async def test_delete_is_idempotent(store: ObjectStore) -> None:
    await store.put("a/key", b"x")
    await store.delete("a/key")
    await store.delete("a/key")
    await store.delete("never/was")
    with pytest.raises(ObjectNotFoundError):
        await store.get("a/key")
    assert await keys(store) == []


async def test_delete_many(store: ObjectStore) -> None:
    for name in ("a", "b/c", "b/d", "e"):
        await store.put(name, b"x")
    await store.delete_many(["a", "b/d", "never/was", "a"])
    assert await keys(store) == ["b/c", "e"]
    await store.delete_many([])
    await store.delete_many(iter(["b/c"]))
    assert await keys(store) == ["e"]


async def test_delete_many_checks_all_keys_first(store: ObjectStore) -> None:
    await store.put("a", b"x")
    with pytest.raises(InvalidKeyError):
        await store.delete_many(["a", "../b"])
    assert await keys(store) == ["a"]


async def test_ranges_are_half_open_and_exact(store: ObjectStore) -> None:
    data = bytes(range(256)) * 5
    await store.put("key", data)
    for start, end in [(0, 1), (0, len(data)), (7, 300), (len(data) - 1, len(data)), (len(data) - 10, len(data) - 3)]:
        assert await store.get_range("key", start, end) == data[start:end]


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 11), (9, 11), (10, 11), (10, 10), (5, 5), (6, 5), (-1, 3), (-3, -1), (100, 200), (0, 1 << 70)],
)
async def test_a_range_is_never_shortened(store: ObjectStore, start: int, end: int) -> None:
    await store.put("key", b"0123456789")
    with pytest.raises(InvalidRangeError) as caught:
        await store.get_range("key", start, end)
    assert isinstance(caught.value, InvalidInputError)


async def test_large_objects(store: ObjectStore) -> None:
    data = hashlib.shake_256(b"large").digest(1 << 20) * (LARGE_BYTES >> 20)
    await store.put_if_absent("large/created", data)
    assert (await store.head("large/created")).size_bytes == LARGE_BYTES
    assert await store.get("large/created") == data
    assert await store.get_range("large/created", LARGE_BYTES - 8192, LARGE_BYTES) == data[-8192:]
    await store.put("large/created", data[:-1])
    assert await store.get("large/created") == data[:-1]


# Sorted as bytes: - . / digits letters. The folder `a/` must sort between `a.x` and `a0`.
SORTED_KEYS = ["A", "a", "a-b", "a.x", "a/b", "a/b-c/d", "a/b.c", "a/b/c", "a/b0", "a0", "a_", "b/c", "b/c/d/e/f"]


async def test_listing_is_in_key_order(store: ObjectStore) -> None:
    for key in reversed(SORTED_KEYS):
        await store.put(key, key.encode())
    assert [info async for info in store.list()] == [ObjectInfo(key, len(key)) for key in SORTED_KEYS]


@pytest.mark.parametrize(
    "prefix", ["", "a", "a/", "a/b", "a/b/", "a/b-c/d", "b/c/d/e/f", "b/c/d/e/f/", "zz/", "b/.", "A/"]
)
async def test_listing_by_any_beginning_of_a_key(store: ObjectStore, prefix: str) -> None:
    for key in SORTED_KEYS:
        await store.put(key, b"")
    assert await keys(store, prefix) == [key for key in SORTED_KEYS if key.startswith(prefix)]


async def test_a_key_may_be_the_folder_of_another(store: ObjectStore) -> None:
    await store.put("a", b"1")
    await store.put("a/b", b"2")
    await store.put("a/b/c", b"3")
    await store.delete("a/b")
    assert await keys(store) == ["a", "a/b/c"]
    assert await store.get("a/b/c") == b"3"


async def test_listing_goes_past_a_page(store: ObjectStore) -> None:
    expected = [f"page/{number:05}" for number in range(1100)]
    gate = asyncio.Semaphore(RACERS)

    async def put(key: str) -> None:
        async with gate:
            await store.put(key, b"x")

    await asyncio.gather(*(put(key) for key in expected))
    assert await keys(store) == expected
    assert await keys(store, "page/010") == expected[1000:1100]
    await store.delete_many(expected)
    assert await keys(store) == []


async def test_a_listing_may_be_abandoned_and_objects_deleted_while_it_runs(store: ObjectStore) -> None:
    for number in range(20):
        await store.put(f"k/{number:02}", b"x")
    seen = []
    async for info in store.list("k/"):
        seen.append(info.key)
        await store.delete(info.key)
        if len(seen) == 10:
            break
    assert seen == [f"k/{number:02}" for number in range(10)]
    assert await keys(store) == [f"k/{number:02}" for number in range(10, 20)]


EVIL_KEYS = [
    "",
    "/",
    "/etc/passwd",
    "a/",
    "a//b",
    "..",
    "../a",
    "a/../b",
    "a/..",
    ".",
    "a/./b",
    "@tmp/x",
    "a@/b",
    "a b",
    "a\n",
    "a\x00b",
    "a\\b",
    "clé",
    "а",  # noqa: RUF001 - Cyrillic a
    "٣",  # a digit, but not an ASCII one
    "\udcff",
    "%2e%2e/a",
    "a?versionId=1",
    "x" * 201,
    "/".join(["x" * 102] * 5),
]


@pytest.mark.parametrize("key", EVIL_KEYS)
async def test_evil_keys_are_refused_everywhere(store: ObjectStore, key: str) -> None:
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: store.put(key, b"x"),
        lambda: store.put_if_absent(key, b"x"),
        lambda: store.get(key),
        lambda: store.get_range(key, 0, 1),
        lambda: store.head(key),
        lambda: store.delete(key),
        lambda: store.delete_many([key]),
    ]
    for call in calls:
        with pytest.raises(InvalidKeyError):
            await call()
    if key not in ("", "a/", ".", "..", "a/.."):  # these are fine beginnings of a key
        with pytest.raises(InvalidKeyError):
            await keys(store, key)


async def test_the_longest_key_works(store: ObjectStore) -> None:
    key = "/".join(["x" * 200, "y" * 200, "z" * 110])
    assert len(key) == 512
    await store.put(key, b"x")
    assert await keys(store) == [key]


async def test_a_closed_store_is_dead(store: ObjectStore) -> None:
    await store.put("key", b"x")
    await store.close()
    await store.close()
    with pytest.raises(RuntimeError):
        await store.get("key")
    with pytest.raises(RuntimeError):
        await store.put("key", b"y")
    with pytest.raises(RuntimeError):
        await keys(store)


async def test_close_waits_for_running_writes(store: ObjectStore) -> None:
    body = os.urandom(1 << 20)
    writing = asyncio.create_task(store.put("key", body))
    await asyncio.sleep(0)
    await store.close()
    await writing
