"""The DEKs that one project's lease keeps in memory.

Two sets. *Cached* keys are found again by the envelope that they came out of; the least recently used is forgotten when
the project has too many, or all projects together take too much room, and each some time after it came, so that the
keymanager's log shows who goes on using it. *Issued* keys are all that were ever handed out and are still referenced by
anybody, cached or not: forgetting a key leaves it working for whoever is in the middle of using it, and overwrites it
when the last of them lets go, while `wipe` reaches every one of them.

This file is a core: no I/O; the clock is the caller's.
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from shared.api.keymanager import ObjectName
from shared.crypto.aead import AeadKey
from shared.crypto.envelope import Envelope

DEFAULT_CAPACITY: Final = 4096
"""Keys per project."""
DEFAULT_TTL_S: Final = 3600.0
DEFAULT_ROOM_SIZE_BYTES: Final = 64 * 1024 * 1024
"""For the keys of all projects of a process."""
ENTRY_SIZE_BYTES: Final = 1024
"""What a key takes, about: its memory, its cipher context, its envelope and its place here; the object's name comes on
top."""

_CacheKey = tuple[str, str, str, Envelope]


def _cache_key(name: ObjectName, envelope: Envelope) -> _CacheKey:
    # The object is part of the key: an envelope that was moved to another object must not be answered from the cache.
    return (name.timeline_id.text, name.object_name, name.kind, envelope)


class _Entry:
    """One cached key. Equal to itself only."""

    __slots__ = ("cache", "cipher", "expires_at_s", "key", "size_bytes")

    def __init__(self, cache: DekCache, key: _CacheKey, cipher: AeadKey, expires_at_s: float) -> None:
        self.cache = cache
        self.key = key
        self.cipher = cipher
        self.expires_at_s = expires_at_s
        self.size_bytes = ENTRY_SIZE_BYTES + len(key[1]) + len(key[2])


class DekRoom:
    """How much the caches of all projects may take together; the least recently used key of all goes first."""

    __slots__ = ("_limit_bytes", "_used", "size_bytes")

    def __init__(self, limit_bytes: int = DEFAULT_ROOM_SIZE_BYTES) -> None:
        """Raises ValueError for less room than one key may take."""
        if limit_bytes < 2 * ENTRY_SIZE_BYTES:
            raise ValueError("a key cache holds at least one key")
        self._limit_bytes = limit_bytes
        self._used: OrderedDict[_Entry, None] = OrderedDict()
        self.size_bytes = 0

    def enter(self, entry: _Entry) -> None:
        self._used[entry] = None
        self.size_bytes += entry.size_bytes
        while self.size_bytes > self._limit_bytes:
            oldest = next(iter(self._used))
            oldest.cache.forget(oldest)

    def touch(self, entry: _Entry) -> None:
        self._used.move_to_end(entry)

    def leave(self, entry: _Entry) -> None:
        del self._used[entry]
        self.size_bytes -= entry.size_bytes


class DekCache:
    """Not thread-safe; lives on one event loop. `wipe` it when it is of no use any more: its room knows it."""

    __slots__ = ("_cached", "_capacity", "_issued", "_now_s", "_room", "_ttl_s")

    def __init__(
        self,
        capacity: int = DEFAULT_CAPACITY,
        ttl_s: float = DEFAULT_TTL_S,
        now_s: Callable[[], float] = time.monotonic,
        room: DekRoom | None = None,
    ) -> None:
        """`now_s` is the caller's monotonic clock. `room`: None for one of its own. Raises ValueError for a capacity
        below 1."""
        if capacity < 1:
            raise ValueError("a key cache holds at least one key")
        self._capacity = capacity
        self._ttl_s = ttl_s
        self._now_s = now_s
        self._room = room or DekRoom()
        self._cached: OrderedDict[_CacheKey, _Entry] = OrderedDict()
        self._issued: weakref.WeakSet[AeadKey] = weakref.WeakSet()

    def get(self, name: ObjectName, envelope: Envelope) -> AeadKey | None:
        """The key of this envelope of this object, if it is cached, not wiped, and not older than `ttl_s`."""
        key = _cache_key(name, envelope)
        found = self._cached.get(key)
        if found is None:
            return None
        if found.cipher.wiped or self._now_s() >= found.expires_at_s:  # its user may wipe it
            self.forget(found)
            return None
        self._cached.move_to_end(key)
        self._room.touch(found)
        return found.cipher

    def put(self, name: ObjectName, envelope: Envelope, key: AeadKey) -> None:
        """Cache `key` and answer for wiping it from now on."""
        self._issued.add(key)
        entry = _Entry(self, _cache_key(name, envelope), key, self._now_s() + self._ttl_s)
        former = self._cached.get(entry.key)
        if former is not None:
            self.forget(former)
        self._cached[entry.key] = entry
        self._room.enter(entry)
        while len(self._cached) > self._capacity:
            self.forget(next(iter(self._cached.values())))

    def forget(self, entry: _Entry) -> None:
        """It is not found any more."""
        del self._cached[entry.key]
        self._room.leave(entry)

    def wipe(self) -> int:
        """Wipe every key that was ever put and still exists. Returns how many were live."""
        live = [key for key in self._issued if not key.wiped]
        for key in live:
            key.wipe()
        for entry in list(self._cached.values()):
            self.forget(entry)
        self._issued.clear()
        return len(live)

    def __len__(self) -> int:
        return len(self._cached)
