"""An object store in a dict: the verified fake. It passes the same contract suite as the real backends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from shared.storage.base import (
    Data,
    InvalidRangeError,
    ObjectExistsError,
    ObjectInfo,
    ObjectNotFoundError,
    check_key,
    check_prefix,
    check_range,
    check_size,
)


class MemoryObjectStore:
    """Lives as long as the object. Each call yields to the event loop once, as a real backend does."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._closed = False

    async def put(self, key: str, data: Data) -> None:
        check_key(key)
        check_size(data)
        await self._turn()
        self._objects[key] = bytes(data)

    async def put_if_absent(self, key: str, data: Data) -> None:
        check_key(key)
        check_size(data)
        await self._turn()
        if key in self._objects:
            raise ObjectExistsError(f"object {key} exists")
        self._objects[key] = bytes(data)

    async def get(self, key: str) -> bytes:
        check_key(key)
        await self._turn()
        return self._find(key)

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        check_key(key)
        check_range(start, end)
        await self._turn()
        data = self._find(key)
        if end > len(data):
            raise InvalidRangeError(f"range [{start}, {end}) reaches past the end of {key} ({len(data)} bytes)")
        return data[start:end]

    async def head(self, key: str) -> ObjectInfo:
        check_key(key)
        await self._turn()
        return ObjectInfo(key, len(self._find(key)))

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        check_prefix(prefix)
        await self._turn()
        for key in sorted(key for key in self._objects if key.startswith(prefix)):
            data = self._objects.get(key)
            if data is not None:  # it may have been deleted while the caller held the iterator
                yield ObjectInfo(key, len(data))

    async def delete(self, key: str) -> None:
        check_key(key)
        await self._turn()
        self._objects.pop(key, None)

    async def delete_many(self, keys: Iterable[str]) -> None:
        checked = [check_key(key) for key in keys]
        await self._turn()
        for key in checked:
            self._objects.pop(key, None)

    async def close(self) -> None:
        self._closed = True

    async def _turn(self) -> None:
        if self._closed:
            raise RuntimeError("object store is closed")
        await asyncio.sleep(0)

    def _find(self, key: str) -> bytes:
        try:
            return self._objects[key]
        except KeyError:
            raise ObjectNotFoundError(f"no object {key}") from None
