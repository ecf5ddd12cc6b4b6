"""A cache bounded in bytes that forgets what was not used for longest. A core; one event loop."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class ByteLru(Generic[K, V]):
    """`close` empties it for good: a reader that was under way when the keys were lost can put nothing back."""

    __slots__ = ("_capacity", "_closed", "_entries", "_size", "hits", "misses")

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._size = 0
        self._closed = False
        self.hits = 0
        self.misses = 0

    def get(self, key: K) -> V | None:
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: K, value: V, size_bytes: int) -> None:
        """Add or replace. Something larger than the whole cache is kept alone, until the next put."""
        if self._closed:
            return
        old = self._entries.pop(key, None)
        if old is not None:
            self._size -= old[1]
        self._entries[key] = value, size_bytes
        self._size += size_bytes
        while self._size > self._capacity and len(self._entries) > 1:
            _, (_, freed) = self._entries.popitem(last=False)
            self._size -= freed

    def discard(self, key: K) -> None:
        old = self._entries.pop(key, None)
        if old is not None:
            self._size -= old[1]

    def close(self) -> None:
        self._closed = True
        self._entries.clear()
        self._size = 0

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size_bytes(self) -> int:
        return self._size
