"""How much may be acknowledged while the pageserver lags: so that a bulk load cannot run away from it. A core.

Stock Postgres has no hook to slow a writer down (Neon's patch sleeps in the backend). What it does have is the wait of
a commit for its synchronous standbys. So WAL is received, sealed and flushed as fast as it comes, but acknowledged only
up to a limit above what the pageserver has ingested; as that moves on, so do the acknowledgements. Whoever commits
behind the limit waits, and nothing fails. A single transaction is not slowed down before it commits.

Only a pageserver that works is waited for. One that is away, or makes no progress for `patience_s`, holds up nobody:
commits do not depend on it (ARCHITECTURE.md, "When something fails").
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BackpressureTuning:
    lag_size_bytes: int = 128 * 1024 * 1024
    """WAL that may be acknowledged and not ingested. 0: any amount."""
    patience_s: float = 5.0
    """Without any progress of the pageserver it is not waited for."""


class Backpressure:
    """Heard on the event loop, asked by the receiving thread. Times are of one monotonic clock."""

    __slots__ = ("_heard", "_tuning")

    def __init__(self, tuning: BackpressureTuning) -> None:
        self._tuning = tuning
        self._heard: tuple[int, float] | None = None  # exchanged as a whole: two threads

    def heard(self, ingested_lsn: int, now_s: float) -> None:
        """The pageserver says how far it has got; less than before, after a restart."""
        if ingested_lsn and (self._heard is None or self._heard[0] != ingested_lsn):
            self._heard = ingested_lsn, now_s

    def allowed_lsn(self, flush_lsn: int, now_s: float) -> int:
        """Up to where `flush_lsn` may be acknowledged. May go back; an acknowledgement that was given stays."""
        heard, limit = self._heard, self._tuning.lag_size_bytes
        if heard is None or not limit or flush_lsn - heard[0] <= limit or now_s - heard[1] > self._tuning.patience_s:
            return flush_lsn
        return heard[0] + limit
