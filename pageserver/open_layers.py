"""Layers of one timeline that are open: their DEK, their index and the chunks read lately, all in memory.

Everything in here is plaintext under a lease. `close` drops it; from then on nothing can be added, so a read that was
under way when the keys were lost leaves nothing behind.

A chunk is verified when it is opened (AES-GCM tag, bound to project, timeline, object, position). If that fails for the
copy on local disk, the copy is dropped and the chunk fetched once more from the object store; if it fails again, that
is an IntegrityError.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from pageserver.layer.footer import FOOTER_SIZE_BYTES, Footer
from pageserver.layer.name import LayerDescriptor
from pageserver.layer.opened import PARSE_INDEX, LayerIndex, OpenLayer
from pageserver.layer_cache import LayerCache
from pageserver.lru import ByteLru
from pageserver.remote_timeline import RemoteTimeline
from shared.crypto.sealed_object import HEADER_SIZE_BYTES, ObjectLayout, ObjectOpener
from shared.errors import CorruptedError, IntegrityError, LeaseExpiredError
from shared.storage.base import InvalidRangeError, ObjectNotFoundError
from shared.storage.threads import BlockingPool

T = TypeVar("T")


class OpenLayers:
    def __init__(
        self,
        remote: RemoteTimeline,
        files: LayerCache,
        pool: BlockingPool,
        *,
        index_capacity_bytes: int,
        chunk_capacity_bytes: int,
    ) -> None:
        self._remote = remote
        self._files = files
        self._pool = pool
        self._open: ByteLru[str, OpenLayer] = ByteLru(index_capacity_bytes)
        self._chunks: ByteLru[tuple[str, int], bytes] = ByteLru(chunk_capacity_bytes)
        self._under_way: dict[Hashable, asyncio.Future[None]] = {}
        self._closed = False

    def peek(self, layer: LayerDescriptor) -> OpenLayer | None:
        """The layer, if it is open."""
        return self._open.get(layer.name)

    async def open(self, layer: LayerDescriptor) -> OpenLayer:
        """Open a layer: unwrap its DEK, read footer and index. Raises KeyAccessError, IntegrityError, and what the
        object store raises."""
        found = self._open.get(layer.name)
        if found is None:
            found = await self._once(layer.name, lambda: self._open.get(layer.name), lambda: self._load(layer))
        return found

    def peek_bytes(self, layer: OpenLayer, start: int, end: int) -> bytes | None:
        """Plaintext bytes [start, end), if their chunks are in memory. Raises IntegrityError past the end."""
        layout = layer.opener.layout
        if not 0 <= start <= end <= layout.plaintext_size_bytes:
            raise CorruptedError("a layer's index points outside of the layer")
        if start == end:
            return b""
        size = layout.chunk_size_bytes
        first, last = start // size, (end - 1) // size
        name = layer.descriptor.name
        if first == last:
            chunk = self._chunks.get((name, first))
            return None if chunk is None else chunk[start - first * size : end - first * size]
        parts = []
        for number in range(first, last + 1):
            chunk = self._chunks.get((name, number))
            if chunk is None:
                return None
            parts.append(chunk)
        return b"".join(parts)[start - first * size : end - first * size]

    async def read(self, layer: OpenLayer, start: int, end: int) -> bytes:
        """Plaintext bytes [start, end) of a layer."""
        data = self.peek_bytes(layer, start, end)
        if data is not None:
            return data
        size = layer.opener.layout.chunk_size_bytes
        name = layer.descriptor.name
        chunks = range(start // size, (end - 1) // size + 1)
        if len(chunks) == 1:
            key = (name, chunks.start)
            (chunk,) = await self._once(
                key, lambda: _single(self._chunks.get(key)), lambda: self._fetch(layer.descriptor, layer.opener, chunks)
            )
            return chunk[start - chunks.start * size : end - chunks.start * size]
        plain = b"".join(await self._fetch(layer.descriptor, layer.opener, chunks))
        return plain[start - chunks.start * size : end - chunks.start * size]

    async def read_through(self, layer: OpenLayer, start: int, end: int) -> tuple[int, bytes]:
        """Plaintext that holds at least the bytes [start, end), and where it begins. Not kept, and not fetched ahead:
        for those who read a whole layer once. Raises as `read`."""
        layout = layer.opener.layout
        if not 0 <= start < end <= layout.plaintext_size_bytes:
            raise CorruptedError("a layer's index points outside of the layer")
        chunks = layout.chunk_range(start, end)
        plain = await self._opened(layer.descriptor, layer.opener, chunks, ahead=False)
        return chunks.start * layout.chunk_size_bytes, b"".join(plain)

    def install(self, layer: LayerDescriptor, opener: ObjectOpener, index: LayerIndex) -> None:
        """Take over a layer that was just written, so that it need not be read back."""
        self._open.put(layer.name, OpenLayer(layer, opener, index), index.memory_size_bytes)

    def close(self) -> None:
        """Drop all plaintext, and stay empty."""
        self._closed = True
        self._open.close()
        self._chunks.close()

    @property
    def memory_size_bytes(self) -> int:
        return self._open.size_bytes + self._chunks.size_bytes

    @property
    def chunk_stats(self) -> tuple[int, int]:
        """(hits, misses) of the chunk cache."""
        return self._chunks.hits, self._chunks.misses

    async def _load(self, layer: LayerDescriptor) -> OpenLayer:
        key = await self._remote.layer_key(layer)
        object_key = self._remote.layer_object_key(layer.name)
        context = self._remote.object_context(object_key, layer.kind)
        header = await self._sealed(object_key, 0, min(HEADER_SIZE_BYTES, layer.size_bytes))
        try:
            opener = ObjectOpener(key, context, ObjectLayout.parse(header, layer.size_bytes))
        except IntegrityError:
            # The header is not behind a tag of its own: a damaged local copy shows here first.
            header = await self._again(object_key, 0, min(HEADER_SIZE_BYTES, layer.size_bytes))
            opener = ObjectOpener(key, context, ObjectLayout.parse(header, layer.size_bytes))
        try:
            return await self._load_index(layer, opener)
        except IntegrityError:
            # Or it was damaged into another valid one (the chunk size), and so no tag fits. Once more, all of it.
            header = await self._again(object_key, 0, min(HEADER_SIZE_BYTES, layer.size_bytes))
            return await self._load_index(
                layer, ObjectOpener(key, context, ObjectLayout.parse(header, layer.size_bytes))
            )

    async def _load_index(self, layer: LayerDescriptor, opener: ObjectOpener) -> OpenLayer:
        size = opener.layout.plaintext_size_bytes
        if size < FOOTER_SIZE_BYTES:
            raise CorruptedError("a layer is shorter than its footer")
        footer = Footer.parse(await self._plain(layer, opener, size - FOOTER_SIZE_BYTES, size), size)
        if (footer.kind, footer.lsn_start, footer.lsn_end) != (layer.kind, layer.lsn_start, layer.lsn_end):
            raise CorruptedError("a layer's footer contradicts the timeline's index")
        data = await self._plain(layer, opener, *footer.index_range(size))
        index = await self._pool.run_to_end(PARSE_INDEX[layer.kind], footer, data)
        opened = OpenLayer(layer, opener, index)
        self._check_open()
        self._open.put(layer.name, opened, index.memory_size_bytes)
        return opened

    async def _plain(self, layer: LayerDescriptor, opener: ObjectOpener, start: int, end: int) -> bytes:
        if start == end:
            return b""  # the index of an empty image
        chunks = opener.layout.chunk_range(start, end)
        first = chunks.start * opener.layout.chunk_size_bytes
        return b"".join(await self._fetch(layer, opener, chunks))[start - first : end - first]

    async def _fetch(self, layer: LayerDescriptor, opener: ObjectOpener, chunks: range) -> list[bytes]:
        """Open consecutive chunks and keep them."""
        plain = await self._opened(layer, opener, chunks)
        for number, chunk in zip(chunks, plain, strict=True):
            self._chunks.put((layer.name, number), chunk, len(chunk))
        return list(plain)

    async def _opened(
        self, layer: LayerDescriptor, opener: ObjectOpener, chunks: range, *, ahead: bool = True
    ) -> Sequence[bytes]:
        object_key = self._remote.layer_object_key(layer.name)
        start, end = opener.layout.sealed_range(chunks)
        try:
            plain = opener.open_chunks(chunks, await self._sealed(object_key, start, end, ahead=ahead))
        except IntegrityError:
            plain = opener.open_chunks(chunks, await self._again(object_key, start, end))
        self._check_open()
        return plain

    async def _sealed(self, object_key: str, start: int, end: int, *, ahead: bool = True) -> bytes:
        with _complete():
            return await self._files.read(object_key, start, end, ahead=ahead)

    async def _again(self, object_key: str, start: int, end: int) -> bytes:
        """The local copy is damaged: drop it and ask the object store."""
        await self._files.drop(object_key)
        with _complete():
            return await self._files.read(object_key, start, end, remote=True)

    def _check_open(self) -> None:
        if self._closed:
            raise LeaseExpiredError("the keys were lost while a layer was read")

    async def _once(self, key: Hashable, find: Callable[[], T | None], load: Callable[[], Awaitable[T]]) -> T:
        """Of concurrent callers with the same key one loads and the others wait for it, then look again."""
        while True:
            other = self._under_way.get(key)
            if other is None:
                break
            await asyncio.wait([other])
            found = find()
            if found is not None:
                return found
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._under_way[key] = done
        try:
            return await load()
        finally:
            del self._under_way[key]
            done.set_result(None)


@contextmanager
def _complete() -> Iterator[None]:
    """What the index lists must be there. To a reader "no such object" would sound like "no such block"."""
    try:
        yield
    except InvalidRangeError:
        raise CorruptedError("a layer object is shorter than the timeline's index says") from None
    except ObjectNotFoundError:
        raise CorruptedError("a layer object that the timeline's index lists is missing") from None


def _single(chunk: bytes | None) -> list[bytes] | None:
    return None if chunk is None else [chunk]
