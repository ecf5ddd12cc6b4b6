"""The DEKs that one project's lease keeps in memory.

Two sets. *Cached* keys are found again by the envelope that they came out of; the least recently used is forgotten when
there are too many, and each some time after it came, so that the keymanager's log shows who goes on using it. *Issued*
keys are all that were ever handed out and are still referenced by anybody, cached or not: forgetting a key leaves it
working for whoever is in the middle of using it, while `wipe` reaches every one of them.

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
"""Keys per project: about 4 MiB with their cipher contexts and names, all of one size. So this bounds memory, too."""
DEFAULT_TTL_S: Final = 3600.0

_CacheKey = tuple[str, str, str, Envelope]


def _cache_key(name: ObjectName, envelope: Envelope) -> _CacheKey:
    # The object is part of the key: an envelope that was moved to another object must not be answered from the cache.
    return (name.timeline_id.text, name.object_name, name.kind, envelope)


class DekCache:
    """Not thread-safe; lives on one event loop."""

    __slots__ = ("_cached", "_capacity", "_issued", "_now_s", "_ttl_s")

    def __init__(
        self,
        capacity: int = DEFAULT_CAPACITY,
        ttl_s: float = DEFAULT_TTL_S,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`now_s` is the caller's monotonic clock. Raises ValueError for a capacity below 1."""
        if capacity < 1:
            raise ValueError("a key cache holds at least one key")
        self._capacity = capacity
        self._ttl_s = ttl_s
        self._now_s = now_s
        self._cached: OrderedDict[_CacheKey, tuple[AeadKey, float]] = OrderedDict()
        self._issued: weakref.WeakSet[AeadKey] = weakref.WeakSet()

    def get(self, name: ObjectName, envelope: Envelope) -> AeadKey | None:
        """The key of this envelope of this object, if it is cached, not wiped, and not older than `ttl_s`."""
        key = _cache_key(name, envelope)
        found = self._cached.get(key)
        if found is None:
            return None
        cipher, expires_at_s = found
        if cipher.wiped or self._now_s() >= expires_at_s:  # its user may wipe it
            del self._cached[key]
            return None
        self._cached.move_to_end(key)
        return cipher

    def put(self, name: ObjectName, envelope: Envelope, key: AeadKey) -> None:
        """Cache `key` and answer for wiping it from now on."""
        self._issued.add(key)
        self._cached[_cache_key(name, envelope)] = key, self._now_s() + self._ttl_s
        while len(self._cached) > self._capacity:
            self._cached.popitem(last=False)

    def wipe(self) -> int:
        """Wipe every key that was ever put and still exists. Returns how many were live."""
        live = [key for key in self._issued if not key.wiped]
        for key in live:
            key.wipe()
        self._cached.clear()
        self._issued.clear()
        return len(live)

    def __len__(self) -> int:
        return len(self._cached)
