"""What is stored under a (key, LSN): an image, a change, or the end of something.

To read a key at an LSN, gather its values from the LSN downwards until one that *starts a chain* (it needs no older
value), then apply them upwards. `WAL` and `WAL_INIT` are raw Postgres records, applied by the redo worker; `NATIVE`
ones are applied in Python (pageserver/native.py), because Postgres changes those pages without naming them in the
record, or outside of its buffers.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple


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


class Value(NamedTuple):
    """One version. `lsn` is the END of the record that made it (Neon invariant 1), as a plain integer."""

    lsn: int
    kind: int
    payload: bytes


new_value: Final[Callable[[tuple[int, int, bytes]], Value]] = partial(tuple.__new__, Value)
"""Of a tuple of three: half the time of `Value(…)`, which is a function of Python's, for chains of hundreds."""
