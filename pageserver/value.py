"""What is stored under a (key, LSN): an image, a change, or the end of something.

To read a key at an LSN, gather its values from the LSN downwards until one that *starts a chain* (it needs no older
value), then apply them upwards. `WAL` and `WAL_INIT` are raw Postgres records, applied by the redo worker; `NATIVE`
ones are applied in Python (pageserver/native.py), because Postgres changes those pages without naming them in the
record, or outside of its buffers.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final, TypeAlias


class ValueKind(enum.IntEnum):
    IMAGE = 0
    """The whole value: a page, a size, a file."""
    WAL = 1
    """A WAL record to apply to the page."""
    WAL_INIT = 2
    """A WAL record that initialises the page (will-init, or a full-page image that is applied)."""
    NATIVE = 3
    """A change that Python applies."""
    TOMBSTONE = 4
    """Gone from here on. Empty payload."""


CHAIN_START: Final = frozenset({ValueKind.IMAGE, ValueKind.WAL_INIT, ValueKind.TOMBSTONE})


Value: TypeAlias = tuple[int, int, bytes]
"""One version: its LSN, ValueKind and payload. The LSN is the END of the record that made it (Neon invariant 1), as a
plain integer; the whole is a plain tuple, because `zip` makes chains of hundreds of them."""

START_TABLE: Final = bytes(kind in CHAIN_START for kind in range(256))
"""For `bytes.translate`: 1 for a kind that starts a chain, or else 0."""
_SEARCHED_AT_ONCE: Final = 128


def chain_start(kinds: Sequence[int], low: int, end: int) -> int:
    """Index of the last one of kinds[low:end] that starts a chain; -1 when there is none."""
    while end > low:
        start = max(low, end - _SEARCHED_AT_ONCE)
        found = bytes(kinds[start:end]).translate(START_TABLE).rfind(1)
        if found >= 0:
            return start + found
        end = start
    return -1
