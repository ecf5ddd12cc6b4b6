"""The layer that ingest writes into: all values since the last freeze, in memory only (unlike Neon's, which spills).

A key's values are one flat list `[lsn, kind, payload, lsn, kind, payload, …]` in LSN order. Flat, because three
appends cost no object that the garbage collector has to track, and because a slice `[0::3]` is the column of LSNs that
a delta layer wants.

It holds plaintext: it lives under the lease and is dropped with it.

A core. One writer; readers run on the same event loop and take copies.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any, Final

from pageserver.value import Value, ValueKind, chain_start
from shared.keyspace import REL_BLOCK, KeyRange

KeyedValue = tuple[bytes, int, int, bytes]
"""(key, lsn, ValueKind, payload)."""

Run = list[Any]
"""[lsn: int, kind: int, payload: bytes, …]: see above."""

_VALUE_OVERHEAD_BYTES: Final = 96
"""Memory of a value beside its payload: object header, LSN, three list slots. Measured with tracemalloc."""
_KEY_OVERHEAD_BYTES: Final = 260
"""Memory of a key with its list and its place in the dictionary."""

LONG_RUN_VALUES: Final = 512
"""A key is reported in `long_runs` each time it has collected this many values."""
_LONG_RUN_SLOTS: Final = LONG_RUN_VALUES * 3
_DISMANTLED_SLOTS: Final = 3 * 4096
_PIECE_SLOTS: Final = 3 * 64
"""Of a run, looked at together: as slices, a value costs less than half of what it does one by one."""


class InMemoryLayer:
    """Values with LSN in [lsn_start, lsn_end), where the end is open until `freeze`."""

    __slots__ = ("_other_keys", "_runs", "_size", "_values", "long_runs", "lsn_end", "lsn_start")

    def __init__(self, lsn_start: int) -> None:
        self.lsn_start = lsn_start
        self.lsn_end: int | None = None
        self.long_runs: list[bytes] = []
        """Keys that have become long since somebody looked; the reader of this list clears it."""
        self._runs: dict[bytes, Run] = {}
        self._other_keys: list[bytes] = []  # those that are not blocks: scans ask for them, and they are few
        self._size = 0
        self._values = 0

    # --- writing ---

    def put(self, key: bytes, lsn: int, kind: int, payload: bytes) -> None:
        """Add one value. Per key, LSNs do not go back."""
        self.put_all(((key, lsn, kind, payload),))

    def put_all(self, values: Iterable[KeyedValue]) -> None:
        """Add values: THE hot path of ingest. Per key, LSNs do not go back. Raises RuntimeError when frozen."""
        if self.lsn_end is not None:
            raise RuntimeError("a frozen layer takes no values")
        runs = self._runs
        find = runs.get
        size = count = 0
        for key, lsn, kind, payload in values:
            run = find(key)
            if run is None:
                runs[key] = [lsn, kind, payload]
                size += _KEY_OVERHEAD_BYTES
                if key[0] != REL_BLOCK:
                    self._other_keys.append(key)
            else:
                run += (lsn, kind, payload)
                if len(run) % _LONG_RUN_SLOTS == 0:
                    self.long_runs.append(key)
            size += len(payload)
            count += 1
        self._size += size + count * _VALUE_OVERHEAD_BYTES
        self._values += count

    def insert_image(self, key: bytes, lsn: int, payload: bytes) -> None:
        """Add what `key` is at `lsn`, behind its values at or below it. A reader that starts there needs nothing
        older."""
        run = self._runs[key]
        index = _behind(run, lsn)
        run[index:index] = (lsn, int(ValueKind.IMAGE), payload)
        if len(run) % _LONG_RUN_SLOTS == 0:
            self.long_runs.append(key)  # or the next report would come a whole turn late
        self._size += len(payload) + _VALUE_OVERHEAD_BYTES
        self._values += 1

    def freeze(self, lsn_end: int) -> None:
        """No more values; the layer covers [lsn_start, lsn_end)."""
        self.lsn_end = lsn_end

    def clear(self) -> None:
        """Forget everything: the keys are lost."""
        self._runs = {}
        self._other_keys = []
        self.long_runs = []
        self._size = self._values = 0

    def dismantle(self) -> Iterator[None]:
        """As `clear`, a little at each step: freeing a full layer takes tens of milliseconds."""
        runs, self._runs = self._runs, {}
        self.clear()
        values = 0
        while runs:
            _, run = runs.popitem()
            while run:
                values += len(run) // 3
                del run[-_DISMANTLED_SLOTS:]
                if values * 3 >= _DISMANTLED_SLOTS:
                    values = 0
                    yield

    # --- reading ---

    def gather(self, key: bytes, lsn: int, floor: int, chain: list[Value]) -> bool:
        """Append the values of `key` with floor < LSN <= lsn to `chain`, newest first, up to one that starts a chain.

        Returns whether there was one, that is, whether nothing older is needed.
        """
        run = self._runs.get(key)
        if run is None:
            return False
        end = len(run) if run[-3] <= lsn else _behind(run, lsn)
        while end > 0:
            start = max(0, end - _PIECE_SLOTS)
            lsns, kinds = run[start:end:3], run[start + 1 : end : 3]
            above = bisect_right(lsns, floor)
            oldest = chain_start(kinds, above, len(kinds))
            first = max(above, oldest)
            payloads = run[start + 3 * first + 2 : end : 3]
            chain += zip(reversed(lsns[first:]), reversed(kinds[first:]), reversed(payloads), strict=True)
            if oldest >= 0 or above > 0:
                return oldest >= 0
            end = start
        return False

    def keys_in(self, key_range: KeyRange) -> list[bytes]:
        """Keys of the range that have values, in no order."""
        start, end = key_range.start, key_range.end
        keys: Iterable[bytes] = self._other_keys if start[0] != REL_BLOCK else self._runs
        return [key for key in keys if start <= key < end]

    def runs(self) -> Iterator[tuple[bytes, Run]]:
        """All keys with their values, in no order."""
        return iter(self._runs.items())

    def run(self, key: bytes) -> Run:
        return self._runs[key]

    def last_lsn(self, key: bytes) -> int:
        """LSN of the newest value of a key that is here."""
        lsn: int = self._runs[key][-3]
        return lsn

    @property
    def key_count(self) -> int:
        return len(self._runs)

    @property
    def value_count(self) -> int:
        return self._values

    @property
    def size_bytes(self) -> int:
        """Memory taken, about."""
        return self._size


def tail_length(run: Run) -> tuple[int, bool]:
    """(values behind the last one that starts a chain, is there such a one); without one, all values count."""
    end = len(run)
    while end > 0:
        start = max(0, end - _PIECE_SLOTS)
        kinds = run[start + 1 : end : 3]
        oldest = chain_start(kinds, 0, len(kinds))
        if oldest >= 0:
            return (len(run) - start) // 3 - 1 - oldest, True
        end = start
    return len(run) // 3, False


def image_points(run: Run) -> list[int]:
    """LSNs where images would cut the values behind the last chain start into pieces of LONG_RUN_VALUES; ascending."""
    length, _ = tail_length(run)
    first = len(run) // 3 - length
    return [run[index * 3] for index in range(first + LONG_RUN_VALUES - 1, len(run) // 3, LONG_RUN_VALUES)]


def _behind(run: Run, lsn: int) -> int:
    """Slot behind the last value at or below `lsn`."""
    return bisect_right(range(len(run) // 3), lsn, key=lambda i: run[i * 3]) * 3
