"""Time as a dependency. Leases use `monotonic_s` only; `now` is for people and audit records."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    def monotonic_s(self) -> float:
        """Seconds that never go back and include the time the machine was suspended."""
        ...

    def now(self) -> datetime:
        """Wall-clock time, UTC, aware."""
        ...


class SystemClock:
    """CLOCK_BOOTTIME rather than CLOCK_MONOTONIC: a lease must also run out while the machine sleeps."""

    def monotonic_s(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def now(self) -> datetime:
        return datetime.now(UTC)


class ManualClock:
    """Stands still until `advance` is called."""

    def __init__(self, start: datetime | None = None) -> None:
        self._elapsed_s = 0.0
        self._start = start or datetime(2026, 1, 1, tzinfo=UTC)

    def monotonic_s(self) -> float:
        return self._elapsed_s

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._elapsed_s)

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError("time does not go back")
        self._elapsed_s += seconds
