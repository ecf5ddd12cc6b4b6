"""The fault-injecting wrapper and the retry policy."""

from __future__ import annotations

import asyncio
import random

import pytest

from shared.retry import NO_RETRY, RetryPolicy, retry
from shared.storage.base import ObjectExistsError, ObjectStore, StoreDeniedError, StoreUnavailableError
from shared.storage.faulty import Call, FaultyObjectStore, Moment, Operation
from shared.storage.memory import MemoryObjectStore


@pytest.fixture
def inner() -> MemoryObjectStore:
    return MemoryObjectStore()


@pytest.fixture
def store(inner: MemoryObjectStore) -> FaultyObjectStore:
    return FaultyObjectStore(inner)


async def test_without_faults_it_is_transparent(store: FaultyObjectStore) -> None:
    plain: ObjectStore = store
    await plain.put("a", b"1")
    await plain.put_if_absent("b", b"23")
    assert await plain.get("a") == b"1"
    assert await plain.get_range("b", 1, 2) == b"3"
    assert (await plain.head("b")).size_bytes == 2
    assert [info.key async for info in plain.list()] == ["a", "b"]
    await plain.delete("a")
    await plain.delete_many(["b"])
    assert [call.operation for call in store.calls] == [
        Operation.PUT,
        Operation.PUT_IF_ABSENT,
        Operation.GET,
        Operation.GET_RANGE,
        Operation.HEAD,
        Operation.LIST,
        Operation.DELETE,
        Operation.DELETE_MANY,
    ]
    assert store.calls[-1] == Call(Operation.DELETE_MANY, "b")
    await plain.close()


async def test_the_first_calls_fail(store: FaultyObjectStore, inner: MemoryObjectStore) -> None:
    store.fail(Operation.PUT, times=2)
    for _ in range(2):
        with pytest.raises(StoreUnavailableError):
            await store.put("a", b"1")
        assert [info async for info in inner.list()] == []
    await store.put("a", b"1")


async def test_a_lost_reply(store: FaultyObjectStore, inner: MemoryObjectStore) -> None:
    store.fail(Operation.PUT_IF_ABSENT, moment=Moment.AFTER)
    with pytest.raises(StoreUnavailableError):
        await store.put_if_absent("a", b"1")
    assert await inner.get("a") == b"1"
    with pytest.raises(ObjectExistsError):
        await store.put_if_absent("a", b"1")


async def test_faults_choose_keys_and_errors(store: FaultyObjectStore) -> None:
    store.fail(Operation.PUT, key_prefix="bad/", times=1_000, error=lambda: StoreDeniedError("no"))
    await store.put("good/a", b"1")
    with pytest.raises(StoreDeniedError):
        await store.put("bad/a", b"1")
    store.heal()
    await store.put("bad/a", b"1")


async def test_listings_fail_at_either_end(store: FaultyObjectStore) -> None:
    await store.put("a", b"1")
    store.fail(Operation.LIST, moment=Moment.AFTER)
    listing = store.list()
    assert (await anext(listing)).key == "a"
    with pytest.raises(StoreUnavailableError):
        await anext(listing)
    store.fail(Operation.LIST)
    with pytest.raises(StoreUnavailableError):
        await anext(store.list())


async def test_hold_and_release(store: FaultyObjectStore, inner: MemoryObjectStore) -> None:
    hold = store.hold(Operation.PUT)
    writing = asyncio.create_task(store.put("a", b"1"))
    await hold.reached.wait()
    await store.put("b", b"2")  # only one call is held
    assert [info.key async for info in inner.list()] == ["b"]
    hold.release.set()
    await writing
    assert [info.key async for info in inner.list()] == ["a", "b"]


async def test_delay(store: FaultyObjectStore) -> None:
    store.delay(Operation.GET, 0.02, times=1)
    await store.put("a", b"1")
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    await store.get("a")
    assert loop.time() - started_s >= 0.02


async def test_retry_gives_up_after_its_attempts() -> None:
    slept: list[float] = []
    numbers: list[int] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def attempt(number: int) -> str:
        numbers.append(number)
        raise StoreUnavailableError(str(number))

    policy = RetryPolicy(attempts=4, first_delay_s=1.0, max_delay_s=3.0)
    with pytest.raises(StoreUnavailableError, match="3"):
        await retry(policy, attempt, retryable=lambda _: True, sleep=sleep, rng=random.Random(1))
    assert numbers == [0, 1, 2, 3]
    assert len(slept) == 3
    assert all(0 <= delay_s <= bound_s for delay_s, bound_s in zip(slept, [1.0, 2.0, 3.0], strict=True))


async def test_retry_stops_at_errors_that_do_not_pass() -> None:
    numbers: list[int] = []

    async def attempt(number: int) -> str:
        numbers.append(number)
        raise StoreDeniedError("no")

    with pytest.raises(StoreDeniedError):
        await retry(RetryPolicy(), attempt, retryable=lambda error: isinstance(error, StoreUnavailableError))
    assert numbers == [0]


async def test_retry_with_the_wrapper(store: FaultyObjectStore) -> None:
    store.fail(Operation.PUT, times=2)
    policy = RetryPolicy(attempts=3, first_delay_s=0.0)
    await retry(
        policy, lambda _: store.put("a", b"1"), retryable=lambda error: isinstance(error, StoreUnavailableError)
    )
    assert len(store.calls) == 3
    store.fail(Operation.PUT)
    with pytest.raises(StoreUnavailableError):
        await retry(NO_RETRY, lambda _: store.put("a", b"1"), retryable=lambda _: True)


def test_delays_never_overflow() -> None:
    policy = RetryPolicy(attempts=10_000, first_delay_s=0.1, max_delay_s=2.0)
    rng = random.Random(2)
    assert all(0 <= policy.delay_s(failed, rng) <= 2.0 for failed in (1, 2, 60, 5_000, 10**9))
    with pytest.raises(ValueError, match="at least one attempt"):
        RetryPolicy(attempts=0)
