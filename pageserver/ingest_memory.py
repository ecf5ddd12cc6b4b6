"""What the in-memory layers of all timelines of a process may take together.

Each timeline has bounds of its own (TimelineConfig); with many of them these add up. So there is one more for all: when
open layers take half of it, the largest is frozen, whosever it is, and its flush begins; when open and frozen ones take
all of it, ingest waits for a flush. One of both always makes room: what is not open is being flushed.

A core, but for the waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

UNLIMITED_BYTES: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class _Share:
    open_bytes: int
    frozen_bytes: int
    freeze: Callable[[], None]


class IngestMemory:
    """`limit_bytes` is exceeded by what one batch of values comes to, per timeline."""

    def __init__(self, limit_bytes: int = UNLIMITED_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._shares: dict[int, _Share] = {}
        self._open_bytes = 0
        self._frozen_bytes = 0
        self._less = asyncio.Event()

    @property
    def size_bytes(self) -> int:
        return self._open_bytes + self._frozen_bytes

    @property
    def is_full(self) -> bool:
        return self.size_bytes >= self._limit_bytes

    async def room(self) -> None:
        """Return when it is not full."""
        while self.is_full:
            self._less.clear()
            await self._less.wait()

    def changed(self, owner: int, open_bytes: int, frozen_bytes: int, freeze: Callable[[], None]) -> None:
        """What `owner` takes now. `freeze` is called when its open layer is to be frozen, maybe at once; it says so by
        another `changed`."""
        self._forget(owner)
        self._shares[owner] = _Share(open_bytes, frozen_bytes, freeze)
        self._open_bytes += open_bytes
        self._frozen_bytes += frozen_bytes
        self._tell()
        if self._open_bytes > self._limit_bytes // 2:
            max(self._shares.values(), key=lambda share: share.open_bytes).freeze()

    def forget(self, owner: int) -> None:
        """It takes nothing any more."""
        self._forget(owner)
        self._tell()

    def _forget(self, owner: int) -> None:
        share = self._shares.pop(owner, None)
        if share is not None:
            self._open_bytes -= share.open_bytes
            self._frozen_bytes -= share.frozen_bytes

    def _tell(self) -> None:
        if not self.is_full:
            self._less.set()
