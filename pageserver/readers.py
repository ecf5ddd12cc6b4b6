"""The connections by which a timeline's pages leave, and their end with its keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from shared.errors import KeyAccessError
from shared.telemetry import get_logger

_log = get_logger(__name__)


@dataclass(eq=False, slots=True)
class _Reader:
    abort: Callable[[KeyAccessError], None]
    task: asyncio.Task[object] | None
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class Readers:
    """Of one timeline. Those that read it through a branch are the branch's, which is lost with it."""

    def __init__(self) -> None:
        self._all: set[_Reader] = set()
        self._cut: set[_Reader] = set()

    @contextmanager
    def reading(self, abort: Callable[[KeyAccessError], None]) -> Iterator[None]:
        """Around what answers one connection, by the task that does. `abort`: drop the connection, now, with all that
        was not sent yet; it may be called more than once."""
        reader = _Reader(abort, asyncio.current_task())
        self._all.add(reader)
        try:
            yield
        finally:
            self._all.discard(reader)
            self._cut.discard(reader)
            reader.gone.set()

    def cut(self, error: KeyAccessError) -> None:
        """The keys are lost: nothing leaves by any of them when this returns. No await in here."""
        for reader in list(self._all):
            self._cut.add(reader)
            reader.abort(error)

    @property
    def leaving(self) -> bool:
        """Were some cut that have not ended yet, and may have answers at hand?"""
        return bool(self._cut)

    async def gone(self, patience_s: float) -> None:
        """Return when all that were cut have ended. What takes longer than `patience_s` is cancelled, and waited
        for."""
        cut = list(self._cut)
        try:
            async with asyncio.timeout(patience_s):
                for reader in cut:
                    await reader.gone.wait()
        except TimeoutError:
            hanging = [reader for reader in cut if not reader.gone.is_set()]
            _log.warning("connections did not end with their keys: cancelled", connections=len(hanging))
            for reader in hanging:
                if reader.task is not None:
                    reader.task.cancel()
            for reader in hanging:
                await reader.gone.wait()
