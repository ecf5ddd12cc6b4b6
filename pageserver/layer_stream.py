"""Layers read once from end to end, in key order, through a small window: how compaction reads.

Nothing of it goes through the caches of readers. Plaintext under a lease: whoever holds a stream holds
`Live.working`, and lets go of it when the keys are lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import merge
from itertools import repeat
from typing import Final

from pageserver.layer.opened import OpenLayer
from pageserver.open_layers import OpenLayers
from shared.keyspace import KeyRange

WINDOW_SIZE_BYTES: Final = 1 << 20


class LayerStream:
    """Ranges are asked for in ascending order of their start."""

    __slots__ = ("_layers", "_start", "_window", "layer")

    def __init__(self, layers: OpenLayers, layer: OpenLayer) -> None:
        self.layer = layer
        self._layers = layers
        self._start = 0
        self._window = memoryview(b"")

    def peek(self, start: int, end: int) -> memoryview | None:
        """Plaintext bytes [start, end), if the window has them."""
        first = start - self._start
        if first >= 0 and end - self._start <= len(self._window):
            return self._window[first : end - self._start]
        return None

    async def read(self, start: int, end: int) -> memoryview:
        """The same in any case; moves the window. Raises what reading a layer raises."""
        if start == end:
            return memoryview(b"")
        size = self.layer.opener.layout.plaintext_size_bytes
        reach = max(end, min(start + WINDOW_SIZE_BYTES, size))
        self._start, plain = await self._layers.read_through(self.layer, start, reach)
        self._window = memoryview(plain)
        return self._window[start - self._start : end - self._start]

    def close(self) -> None:
        """Let go of the window: nothing more will be asked for."""
        self._window = memoryview(b"")


def keys_of(streams: Sequence[LayerStream], key_range: KeyRange) -> Iterator[tuple[bytes, list[int]]]:
    """All keys of a range, ascending, each with the numbers of the streams that have it. Closes each stream behind its
    last key: of layers that share the key space few are open at a time."""
    keys = [stream.layer.index.keys_in(key_range) for stream in streams]
    last = [of_stream[-1] if of_stream else b"" for of_stream in keys]
    numbered = [zip(of_stream, repeat(number)) for number, of_stream in enumerate(keys)]
    current, numbers = b"", list[int]()
    for key, number in merge(*numbered):
        if key != current:
            if numbers:
                yield current, numbers
            for done in numbers:
                if last[done] == current:
                    streams[done].close()
            current, numbers = key, []
        numbers.append(number)
    if numbers:
        yield current, numbers
