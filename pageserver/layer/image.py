"""Image layers: the keys of a key range at one LSN, with their whole values. docs/formats/image-layer.md.

The plaintext is, in this order: the values, the index, the footer (layer/footer.py). It is sealed in chunks. The
index, with k keys in ascending order, little-endian, column by column::

    18k  keys
    8k   end of each value, counted from the start of the plaintext

An image layer is complete for its key range, and may be empty. A key that is not listed did not exist; on a branch, it
was not changed there, and what has an empty value did not exist. (No key that exists has one.)

A core: no I/O, no keys.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from operator import lt
from struct import Struct
from typing import Final

from pageserver.layer.footer import Footer
from pageserver.layer.name import LayerKind
from shared.errors import CorruptedError
from shared.keyspace import KEY_SIZE_BYTES, KeyRange

_INDEX_ROW_BYTES: Final = KEY_SIZE_BYTES + 8
_KEY: Final = Struct(f"{KEY_SIZE_BYTES}s")


class ImageIndex:
    """The index of one image layer in memory."""

    __slots__ = ("_ends", "_positions", "_sorted", "footer")

    def __init__(self, footer: Footer, index: bytes | memoryview) -> None:
        """`index`: the bytes between the values and the footer. Raises CorruptedError."""
        count = footer.keys
        view = memoryview(index)
        if len(view) != count * _INDEX_ROW_BYTES or footer.values != count or footer.lsn_end != footer.lsn_start + 1:
            raise CorruptedError("an image layer's index has the wrong size")
        self.footer = footer
        keys = [key for (key,) in _KEY.iter_unpack(view[: count * KEY_SIZE_BYTES])]
        if not all(map(lt, keys, keys[1:])):
            raise CorruptedError("an image layer's keys are not sorted")
        self._positions = dict(zip(keys, range(count), strict=True))
        self._sorted = keys
        # memoryview.cast refuses what is empty, and array what is no bytes.
        self._ends = memoryview(array("Q", bytes(view[count * KEY_SIZE_BYTES :])))

    def find(self, key: bytes) -> tuple[int, int] | None:
        """Half-open byte range of the value of `key` in the plaintext. Raises CorruptedError for an impossible one."""
        position = self._positions.get(key)
        if position is None:
            return None
        start = self._ends[position - 1] if position else 0
        end = self._ends[position]
        if not start <= end <= self.footer.index_offset:
            raise CorruptedError("an image layer's index has an impossible entry")
        return start, end

    def keys_in(self, key_range: KeyRange) -> Sequence[bytes]:
        """Keys of the range, ascending."""
        keys = self._sorted
        return keys[bisect_left(keys, key_range.start) : bisect_left(keys, key_range.end)]

    @property
    def key_count(self) -> int:
        return len(self._sorted)

    @property
    def memory_size_bytes(self) -> int:
        return len(self._sorted) * 200


class ImageBuilder:
    """Makes the plaintext of an image layer. Call `add` in key order, then `finish`."""

    __slots__ = ("_buffer", "_ends", "_keys")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._keys: list[bytes] = []
        self._ends: list[int] = []

    def add(self, key: bytes, value: bytes) -> None:
        self._buffer += value
        self._keys.append(key)
        self._ends.append(len(self._buffer))

    def finish(self, lsn: int) -> tuple[bytearray, ImageIndex]:
        """The plaintext, and the index as a reader would have it."""
        count = len(self._keys)
        footer = Footer(LayerKind.IMAGE, count, count, len(self._buffer), lsn, lsn + 1)
        index = b"".join(self._keys) + array("Q", self._ends).tobytes()
        self._buffer += index
        self._buffer += footer.serialize()
        return self._buffer, ImageIndex(footer, index)

    @property
    def size_bytes(self) -> int:
        return len(self._buffer)

    @property
    def key_span(self) -> tuple[bytes, bytes]:
        """First and last key. Only after at least one `add`."""
        return self._keys[0], self._keys[-1]
