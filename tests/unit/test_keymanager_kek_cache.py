"""Plaintext KEKs: how many are kept, how long, and that what is not kept is overwritten."""

from __future__ import annotations

import pytest

from keymanager.kek_cache import KekCache
from shared.clock import ManualClock
from shared.crypto.aead import AeadKey
from shared.crypto.secret import SecretKey
from shared.ids import ProjectId

A, B, C = ProjectId.new(), ProjectId.new(), ProjectId.new()


def kek() -> tuple[AeadKey, memoryview]:
    """A KEK, and its memory."""
    cipher = AeadKey(SecretKey.generate())
    return cipher, cipher.key.reveal()


def cache_of(entries: int, idle_ttl_s: float = 3600.0) -> tuple[KekCache, ManualClock]:
    clock = ManualClock()
    return KekCache(entries, idle_ttl_s, clock.monotonic_s), clock


def test_the_least_recently_used_is_overwritten() -> None:
    cache, _ = cache_of(2)
    memories = {}
    for project_id in (A, B):
        cipher, memories[project_id] = kek()
        cache.put(project_id, 1, cipher)
        del cipher
    assert cache.get(A, 1) is not None
    cache.put(C, 1, kek()[0])
    assert cache.get(B, 1) is None
    assert memories[B] == bytes(32) != memories[A]
    assert (len(cache), set(cache.projects)) == (2, {A, C})


def test_one_that_is_in_use_is_overwritten_by_drop_or_when_its_use_ends() -> None:
    cache, _ = cache_of(1)
    in_use, _ = kek()
    cache.put(A, 1, in_use)
    cache.put(B, 1, kek()[0])
    assert cache.get(A, 1) is None
    assert not in_use.wiped
    assert set(cache.projects) == {A, B}  # it is in memory, and said to be
    assert cache.drop(A) == 1
    assert in_use.wiped
    assert cache.projects == [B]
    in_use, memory = kek()
    cache.put(A, 2, in_use)
    cache.put(B, 1, kek()[0])
    del in_use
    assert memory == bytes(32)


def test_what_nobody_uses_for_a_while_is_overwritten() -> None:
    cache, clock = cache_of(10, idle_ttl_s=60)
    (used, of_used), (idle, of_idle) = kek(), kek()
    cache.put(A, 1, used)
    cache.put(A, 2, idle)
    del used, idle
    clock.advance(40)
    assert cache.get(A, 1) is not None
    clock.advance(20)
    cache.expire()
    assert of_idle == bytes(32) != of_used
    assert (len(cache), cache.projects) == (1, [A])
    clock.advance(40)
    clock.advance(20)
    assert cache.get(A, 1) is None  # a use that comes too late does not prolong it
    cache.expire()
    assert of_used == bytes(32)
    assert cache.projects == []


def test_drop_takes_all_versions_of_a_project_or_one() -> None:
    cache, _ = cache_of(10)
    memories = []
    for project_id, version in ((A, 1), (A, 2), (A, 3), (B, 1)):
        cipher, memory = kek()
        cache.put(project_id, version, cipher)
        memories.append(memory)
        del cipher
    assert cache.drop(A, 2) == 1
    assert [memory == bytes(32) for memory in memories] == [False, True, False, False]
    assert cache.drop(A) == 2
    assert cache.drop(A) == 0
    assert cache.projects == [B]
    cache.wipe()
    assert all(memory == bytes(32) for memory in memories)
    assert len(cache) == 0


def test_a_cache_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        cache_of(0)
