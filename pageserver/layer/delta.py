"""Delta layers: all values of some keys in an LSN range, sorted by key and LSN. docs/formats/delta-layer.md.

The plaintext is, in this order: one *run* per key, the index, the footer (layer/footer.py). It is sealed in chunks
(shared/crypto/sealed_object.py), so a read opens the chunks of one run and no others. All integers little-endian.

A run of n values::

    8n   LSN of each value
    4n   end of each payload, counted from the start of the payloads
    n    kind of each value (pageserver/value.py)
    …    the payloads, one behind the other

The index, with k keys in ascending order, column by column::

    18k  keys
    8k   offset of each run
    8k   LSN of its first value
    8k   LSN of its last value
    4k   number of its values
    4k   size of its payloads in bytes
    4k   chain length: values at the end of this layer that a read must apply on top of an image, older layers included

A core: no I/O, no keys.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from operator import le, lt
from struct import Struct
from typing import Final, NamedTuple

from pageserver.layer.footer import Footer
from pageserver.layer.in_memory import Run
from pageserver.layer.name import LayerKind
from pageserver.value import START_TABLE, Value, ValueKind, chain_start
from shared.errors import CorruptedError
from shared.keyspace import KEY_SIZE_BYTES, KeyRange

_RUN_ROW_BYTES: Final = 13
_INDEX_ROW_BYTES: Final = KEY_SIZE_BYTES + 3 * 8 + 3 * 4
_KEY: Final = Struct(f"{KEY_SIZE_BYTES}s")
_PACKED_VALUES: Final = 32
_HEADERS: Final = [Struct(f"<{n}Q{n}I{n}B").pack for n in range(_PACKED_VALUES)]
_MAX_U32: Final = (1 << 32) - 1


class RunEntry(NamedTuple):
    """What the index knows of one key. `offset` counts from the start of the plaintext."""

    offset: int
    first_lsn: int
    last_lsn: int
    values: int
    payload_size_bytes: int
    chain_length: int

    @property
    def payload_offset(self) -> int:
        return self.offset + self.values * _RUN_ROW_BYTES


class DeltaIndex:
    """The index of one delta layer in memory: a dictionary of keys, and columns that are looked into in place."""

    __slots__ = ("_chains", "_counts", "_firsts", "_lasts", "_offsets", "_positions", "_sizes", "_sorted", "footer")

    def __init__(self, footer: Footer, index: bytes | memoryview) -> None:
        """`index`: the bytes between the runs and the footer. Raises CorruptedError."""
        count = footer.keys
        view = memoryview(index)
        if len(view) != count * _INDEX_ROW_BYTES:
            raise CorruptedError("a delta layer's index has the wrong size")
        self.footer = footer
        keys = [key for (key,) in _KEY.iter_unpack(view[: count * KEY_SIZE_BYTES])]
        if not all(map(lt, keys, keys[1:])):
            raise CorruptedError("a delta layer's keys are not sorted")
        self._positions = dict(zip(keys, range(count), strict=True))
        self._sorted = keys
        wide, narrow = (
            view[count * KEY_SIZE_BYTES : count * (KEY_SIZE_BYTES + 24)],
            view[count * (KEY_SIZE_BYTES + 24) :],
        )
        wide_columns, narrow_columns = wide.cast("B").cast("Q"), narrow.cast("B").cast("I")
        self._offsets, self._firsts, self._lasts = (wide_columns[i * count : (i + 1) * count] for i in range(3))
        self._counts, self._sizes, self._chains = (narrow_columns[i * count : (i + 1) * count] for i in range(3))

    def find(self, key: bytes) -> RunEntry | None:
        """Where the run of `key` lies. Raises CorruptedError when the index says that it lies outside of the runs."""
        position = self._positions.get(key)
        if position is None:
            return None
        entry = RunEntry(
            self._offsets[position],
            self._firsts[position],
            self._lasts[position],
            self._counts[position],
            self._sizes[position],
            self._chains[position],
        )
        if (
            entry.values == 0
            or entry.first_lsn > entry.last_lsn
            or entry.payload_offset + entry.payload_size_bytes > self.footer.index_offset
        ):
            raise CorruptedError("a delta layer's index has an impossible entry")
        return entry

    def chain_lengths(self, keys: set[bytes]) -> dict[bytes, int]:
        """Chain length at the end of this layer, for those of `keys` that it holds."""
        positions, chains = self._positions, self._chains
        return {key: chains[positions[key]] for key in keys & positions.keys()}

    def keys_in(self, key_range: KeyRange) -> Sequence[bytes]:
        """Keys of the range, ascending."""
        keys = self._sorted
        return keys[bisect_left(keys, key_range.start) : bisect_left(keys, key_range.end)]

    def has_key_in(self, key_range: KeyRange) -> bool:
        keys = self._sorted
        position = bisect_left(keys, key_range.start)
        return position < len(keys) and keys[position] < key_range.end

    @property
    def key_count(self) -> int:
        return len(self._sorted)

    @property
    def memory_size_bytes(self) -> int:
        """About what it takes: key objects, dictionary, columns."""
        return len(self._sorted) * 240


class Selection(NamedTuple):
    """Values [first, end) of a run, and which bytes of its payloads hold them."""

    first: int
    end: int
    payload_start: int
    payload_end: int
    complete: bool
    """The oldest of them starts a chain: nothing older is needed."""


def run_header_range(entry: RunEntry) -> tuple[int, int]:
    """Half-open byte range of the run's columns in the plaintext."""
    return entry.offset, entry.payload_offset


class RunHeader:
    """The columns of one run."""

    __slots__ = ("_ends", "_kinds", "_lsns")

    def __init__(self, entry: RunEntry, header: bytes | memoryview) -> None:
        """Raises CorruptedError."""
        count = entry.values
        if len(header) != count * _RUN_ROW_BYTES:
            raise CorruptedError("a run's header has the wrong size")
        view = memoryview(header).cast("B")
        self._lsns = view[: 8 * count].cast("Q")
        self._ends = view[8 * count : 12 * count].cast("I")
        self._kinds = view[12 * count :]
        if self._ends[count - 1] != entry.payload_size_bytes:
            raise CorruptedError("a run's payloads do not have the announced size")

    def select(self, entry: RunEntry, lsn: int, floor: int) -> Selection:
        """Values with floor < LSN <= lsn, from the newest down to one that starts a chain.

        Raises CorruptedError for ends of payloads that go back or past the run.
        """
        end = entry.values if lsn >= entry.last_lsn else bisect_right(self._lsns, lsn)
        above = bisect_right(self._lsns, floor, 0, end)
        oldest = chain_start(self._kinds, above, end)
        first = max(above, oldest)
        start = self._ends[first - 1] if first else 0
        stop = self._ends[end - 1] if end else 0
        if not start <= stop <= entry.payload_size_bytes:
            raise CorruptedError("a run's payloads overlap")
        return Selection(first, end, start, stop, oldest >= 0)

    def take(self, selection: Selection, payloads: bytes | memoryview, chain: list[Value]) -> None:
        """Append the selected values to `chain`, newest first. `payloads`: the bytes that the selection names.

        Raises CorruptedError for ends of payloads that go back.
        """
        selected, base, data = slice(selection.first, selection.end), selection.payload_start, bytes(payloads)
        ends = self._ends[selected].tolist()
        starts = [base, *ends[:-1]]
        if not all(map(le, starts, ends)):
            raise CorruptedError("a run's payloads overlap")
        parts = [data[start - base : end - base] for start, end in zip(starts, ends, strict=False)]
        chain += zip(reversed(self._lsns[selected]), reversed(self._kinds[selected]), reversed(parts), strict=True)


class RawRun(NamedTuple):
    """A run as it lies in a layer: three columns and the payloads, little-endian. What compaction moves about."""

    lsns: memoryview
    ends: memoryview
    kinds: memoryview
    payloads: memoryview

    @classmethod
    def of(cls, entry: RunEntry, data: bytes | memoryview) -> RawRun:
        """`data`: the whole run, header and payloads. Raises CorruptedError."""
        count, view = entry.values, memoryview(data).cast("B")
        if len(view) != count * _RUN_ROW_BYTES + entry.payload_size_bytes:
            raise CorruptedError("a run has the wrong size")
        RunHeader(entry, view[: count * _RUN_ROW_BYTES])
        return cls(view[: 8 * count], view[8 * count : 12 * count], view[12 * count : 13 * count], view[13 * count :])


class DeltaBuilder:
    """Makes the plaintext of a delta layer. Call `add_run` or `add_raw` in key order, then `finish`."""

    __slots__ = ("_buffer", "_chains", "_counts", "_firsts", "_keys", "_lasts", "_offsets", "_sizes", "_values")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._keys: list[bytes] = []
        self._offsets: list[int] = []
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        self._counts: list[int] = []
        self._sizes: list[int] = []
        self._chains: list[int] = []
        self._values = 0

    def add_run(self, key: bytes, run: Run, chain_before: int, image: bytes | None = None) -> None:
        """All values of `key` (layer/in_memory.py), which `chain_before` values of older layers belong to.

        `image` is what the key is at the LSN of its last value; it becomes one more value there.
        """
        lsns, kinds, payloads = run[0::3], run[1::3], run[2::3]
        if image is not None:
            lsns.append(lsns[-1])
            kinds.append(int(ValueKind.IMAGE))
            payloads.append(image)
        count = len(lsns)
        ends = list(accumulate(map(len, payloads)))
        kind_bytes = bytes(kinds)
        start = kind_bytes.translate(START_TABLE).rfind(1)
        chain = min(count - 1 - start if start >= 0 else chain_before + count, _MAX_U32)
        if ends[-1] > _MAX_U32:
            raise OverflowError("the values of one key do not fit a run")
        buffer = self._buffer
        self._keys.append(key)
        self._offsets.append(len(buffer))
        self._firsts.append(lsns[0])
        self._lasts.append(lsns[-1])
        self._counts.append(count)
        self._sizes.append(ends[-1])
        self._chains.append(chain)
        self._values += count
        if count < _PACKED_VALUES:
            buffer += _HEADERS[count](*lsns, *ends, *kinds)
        else:
            buffer += array("Q", lsns).tobytes() + array("I", ends).tobytes() + kind_bytes
        buffer += b"".join(payloads)

    def add_raw(self, key: bytes, runs: Sequence[RawRun], chain_length: int) -> None:
        """All values of `key`, from one layer or several, oldest first. `chain_length`: of the newest of them."""
        ends, base = bytearray(), 0
        for run in runs:
            ends += run.ends if base == 0 else array("I", [base + end for end in run.ends.cast("I")]).tobytes()
            base += len(run.payloads)
        if base > _MAX_U32:
            raise OverflowError("the values of one key do not fit a run")
        lsns = b"".join([run.lsns for run in runs])
        count = len(lsns) // 8
        buffer = self._buffer
        self._keys.append(key)
        self._offsets.append(len(buffer))
        self._firsts.append(int.from_bytes(lsns[:8], "little"))
        self._lasts.append(int.from_bytes(lsns[-8:], "little"))
        self._counts.append(count)
        self._sizes.append(base)
        self._chains.append(chain_length)
        self._values += count
        buffer += lsns
        buffer += ends
        for run in runs:
            buffer += run.kinds
        for run in runs:
            buffer += run.payloads

    def finish(self, lsn_start: int, lsn_end: int) -> tuple[bytearray, DeltaIndex]:
        """The plaintext, and the index as a reader would have it."""
        footer = Footer(LayerKind.DELTA, len(self._keys), self._values, len(self._buffer), lsn_start, lsn_end)
        parts = [b"".join(self._keys)]
        parts += (array("Q", column).tobytes() for column in (self._offsets, self._firsts, self._lasts))
        parts += (array("I", column).tobytes() for column in (self._counts, self._sizes, self._chains))
        index = b"".join(parts)
        self._buffer += index
        self._buffer += footer.serialize()
        return self._buffer, DeltaIndex(footer, index)

    @property
    def size_bytes(self) -> int:
        return len(self._buffer)

    @property
    def key_span(self) -> tuple[bytes, bytes]:
        """First and last key. Only after at least one run."""
        return self._keys[0], self._keys[-1]
