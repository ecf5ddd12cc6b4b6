"""Which blocks of a file to fetch before they are asked for.

A file that is read forwards gets a window of blocks ahead of its reader, twice as long with each read up to a limit;
a read anywhere else closes it. The window is filled again when half of it is used up, so that fetches are long. The
kernel reads ahead too, but only some 128 KiB, and waits for them: what is far away needs more in flight.

A core: block numbers in, block numbers out.
"""

from __future__ import annotations

from typing import Final

MIN_WINDOW_BLOCKS: Final = 16
MAX_WINDOW_BLOCKS: Final = 256


class ReadAhead:
    """Of one file."""

    __slots__ = ("_expected", "_fetched_to", "_window")

    def __init__(self) -> None:
        self._expected = -1
        """Where a sequential reader goes on."""
        self._window = 0
        self._fetched_to = 0
        """Up to where the window has been asked for."""

    def read(self, first: int, count: int, end_of_file: int) -> range:
        """Blocks [first, first + count) are being read. Returns what to fetch as well, behind them; may be empty.

        Never a block twice while a scan goes on, and none at or past `end_of_file`.
        """
        sequential = first == self._expected
        self._expected = first + count
        if not sequential:
            self._window = 0
            self._fetched_to = 0
            return range(0)
        self._window = min(MAX_WINDOW_BLOCKS, max(MIN_WINDOW_BLOCKS, 2 * self._window))
        fetched_to = max(self._fetched_to, self._expected)
        if fetched_to - self._expected > self._window // 2:
            return range(0)
        end = min(end_of_file, self._expected + self._window)
        if end <= fetched_to:
            return range(0)
        self._fetched_to = end
        return range(fetched_to, end)
