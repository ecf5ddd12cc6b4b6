"""The newest WAL in plaintext, in memory, so that whoever follows the tail costs no decryption. A core."""

from __future__ import annotations

from bisect import bisect_right


class TailCache:
    """A contiguous run of WAL that ends where the log ends, at most about `capacity_bytes` of it."""

    __slots__ = ("_capacity", "_chunks", "_end", "_first", "_size", "_starts")

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._chunks: list[bytearray] = []
        self._starts: list[int] = []
        self._first = 0  # index of the oldest chunk that still counts
        self._size = 0
        self._end = -1

    @property
    def size_bytes(self) -> int:
        return self._size

    def append(self, lsn: int, data: bytearray) -> None:
        """Takes ownership of `data`, which follows what is there; if not, what is there is forgotten."""
        if lsn != self._end:
            self.wipe()
        self._chunks.append(data)
        self._starts.append(lsn)
        self._end = lsn + len(data)
        self._size += len(data)
        while self._size > self._capacity and self._first < len(self._chunks) - 1:
            self._size -= len(self._chunks[self._first])
            self._chunks[self._first] = bytearray()
            self._first += 1
        if self._first > 64 and self._first * 2 > len(self._chunks):
            del self._chunks[: self._first]
            del self._starts[: self._first]
            self._first = 0

    def read(self, lsn: int, max_size_bytes: int) -> bytes | None:
        """Up to `max_size_bytes` from `lsn` on; None when they are not here."""
        if self._first >= len(self._starts) or not self._starts[self._first] <= lsn < self._end:
            return None
        at = bisect_right(self._starts, lsn) - 1
        offset = lsn - self._starts[at]
        chunk = self._chunks[at]
        if len(chunk) - offset >= max_size_bytes or at == len(self._chunks) - 1:
            return bytes(memoryview(chunk)[offset : offset + max_size_bytes])
        parts = [memoryview(chunk)[offset:]]
        size = len(parts[0])
        while size < max_size_bytes and (at := at + 1) < len(self._chunks):
            parts.append(memoryview(self._chunks[at])[: max_size_bytes - size])
            size += len(parts[-1])
        return b"".join(parts)

    def wipe(self) -> None:
        """Overwrite and forget everything."""
        for chunk in self._chunks[self._first :]:
            chunk[:] = bytes(len(chunk))
        self._chunks.clear()
        self._starts.clear()
        self._first = self._size = 0
        self._end = -1
