"""How much history is kept: where the GC cutoff may stand, and who still reads below it.

    cutoff = min(newest LSN - lsn_bytes, LSN of age_s ago), never going back

Every version at or above the cutoff can be read. Below it only single LSNs can: branch points, and leased ones.

An index version notes when it was made and how far it went (`HistoryPoint`): what was ingested by then was committed
by then. So the newest point that is at least `age_s` old bounds from below what "age_s ago" may mean, whatever the
clocks of the computes say; and without such a point nothing is old enough.

A core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from shared.errors import InvalidInputError, UnavailableError
from shared.lsn import Lsn

DEFAULT_RETENTION_LSN_BYTES: Final = 64 * 1024 * 1024
DEFAULT_RETENTION_AGE_S: Final = 7 * 24 * 3600
MAX_RETENTION_AGE_S: Final = 100 * 365 * 24 * 3600
MAX_LEASE_S: Final = 24 * 3600
MAX_LEASES: Final = 1000
_POINTS_PER_WINDOW: Final = 256


@dataclass(frozen=True, slots=True)
class Retention:
    """The window of history that is kept: whichever of the two reaches further back."""

    lsn_bytes: int = DEFAULT_RETENTION_LSN_BYTES
    """WAL before the newest record."""
    age_s: int = DEFAULT_RETENTION_AGE_S

    def __post_init__(self) -> None:
        if not (0 <= self.lsn_bytes < 1 << 63 and 0 <= self.age_s <= MAX_RETENTION_AGE_S):
            raise InvalidInputError("a retention window is out of range")


DEFAULT_RETENTION: Final = Retention()


@dataclass(frozen=True, slots=True, order=True)
class HistoryPoint:
    """At `time_s`, seconds since 1970, everything at or below `lsn` had been ingested."""

    time_s: int
    lsn: int


def remember(history: Sequence[HistoryPoint], now_s: int, lsn: int, age_s: int) -> tuple[HistoryPoint, ...]:
    """`history` with one more point, thinned out: some hundreds per window, and one that is older than it."""
    spacing_s = max(1, age_s // _POINTS_PER_WINDOW)
    points = list(history)
    if points:
        now_s = max(now_s, points[-1].time_s)  # a clock that was set back
    if len(points) >= 2 and points[-1].time_s - points[-2].time_s < spacing_s:
        points.pop()
    points.append(HistoryPoint(now_s, lsn))
    while len(points) >= 2 and points[1].time_s <= now_s - age_s:
        points.pop(0)
    return tuple(points)


def gc_cutoff(
    retention: Retention, history: Sequence[HistoryPoint], now_s: int, end_lsn: int, at_least_lsn: int
) -> int:
    """Where the cutoff may be moved to. `end_lsn`: newest durable LSN. `at_least_lsn`: where it stands.

    Never below `at_least_lsn`: it does not go back, not even when the window becomes longer.
    """
    old_enough = [point.lsn for point in history if point.time_s <= now_s - retention.age_s]
    by_time = end_lsn if retention.age_s == 0 else max(old_enough, default=0)
    return max(at_least_lsn, min(end_lsn - retention.lsn_bytes, by_time))


def nothing_retained() -> Iterable[int]:
    """A timeline without branches."""
    return ()


RetainLsns = Callable[[], Iterable[int]]
"""LSNs that branches start at. Raises UnavailableError while they are not known yet: then nothing is removed."""


class LsnLeases:
    """LSNs that somebody reads at, for a time (Neon: LSN leases). In memory: after a restart nothing is removed for as
    long as a lease may last, so that holders can renew theirs. So none lasts longer than that."""

    def __init__(self, now_s: float, longest_s: float) -> None:
        """Times are of one monotonic clock."""
        self._until: dict[int, float] = {}
        self._longest_s = longest_s
        self._known_from_s = now_s + longest_s

    def grant(self, lsn: int, now_s: float, ttl_s: float | None = None) -> float:
        """Returns how long it lasts from now on, at least: a lease is only ever prolonged. Whether `lsn` can still be
        read is the caller's to check. Raises InvalidInputError, UnavailableError (too many)."""
        ttl_s = self._longest_s if ttl_s is None else ttl_s
        if not 0 < ttl_s <= self._longest_s:
            raise InvalidInputError(f"an LSN lease lasts up to {self._longest_s:g} s here; it can be renewed")
        current = self.current(now_s)
        if lsn not in current and len(current) >= MAX_LEASES:
            raise UnavailableError("too many LSNs are leased")
        self._until[lsn] = max(self._until.get(lsn, 0.0), now_s + ttl_s)
        return self._until[lsn] - now_s

    def current(self, now_s: float) -> set[int]:
        """LSNs with a lease."""
        self._until = {lsn: until for lsn, until in self._until.items() if until > now_s}
        return set(self._until)

    def are_known(self, now_s: float) -> bool:
        """False while leases of an earlier process may still run."""
        return now_s >= self._known_from_s


def below_cutoff(lsn: int, cutoff: int) -> InvalidInputError:
    """What a reader hears who comes too late."""
    return InvalidInputError(f"LSN {Lsn(lsn)} is not kept any more: history begins at {Lsn(cutoff)}")
