"""How much may be acknowledged while the pageserver lags: so that a bulk load cannot run away from it. A core.

Stock Postgres has no hook to slow a writer down (Neon's patch sleeps in the backend). What it does have is the wait of
a commit for its synchronous standbys. So WAL is received, sealed and flushed as fast as it comes, but acknowledged only
up to a limit above what the pageserver has ingested; as that moves on, so do the acknowledgements. Whoever commits
behind the limit waits, and nothing fails. A single transaction is not slowed down before it commits.

There is no exception, as there is none in Neon (max_replication_write_lag): a pageserver that is slow, stuck or away is
waited for until it has caught up. Without it commits go on for as much WAL as the limit allows, so a restart of it is
not noticed; and what it lacks, which safekeepers have to keep on their disks, is bounded.
"""

from __future__ import annotations


class Backpressure:
    """Heard on the event loop, asked by the receiving thread; one integer goes between them."""

    __slots__ = ("_ingested_lsn", "_limit_size_bytes")

    def __init__(self, limit_size_bytes: int, ingested_lsn: int) -> None:
        """`limit_size_bytes`: WAL that may be acknowledged and not ingested; 0: any amount. `ingested_lsn`: what the
        pageserver has at least, until it says more."""
        self._limit_size_bytes = limit_size_bytes
        self._ingested_lsn = ingested_lsn

    def heard(self, ingested_lsn: int) -> None:
        """The pageserver says how far it has got; less than before, after a restart. 0: it does not say."""
        if ingested_lsn:
            self._ingested_lsn = ingested_lsn

    def allowed_lsn(self, flush_lsn: int) -> int:
        """Up to where `flush_lsn` may be acknowledged. May go back; an acknowledgement that was given stays."""
        if not self._limit_size_bytes:
            return flush_lsn
        return min(flush_lsn, self._ingested_lsn + self._limit_size_bytes)
