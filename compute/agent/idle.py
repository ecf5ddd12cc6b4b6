"""Whether a compute's Postgres lives, and for how long nobody has used it; the manager suspends it by that (Neon:
compute_ctl's monitor).

One that takes no connection and gives no answer for a while is a crash that did not end by itself. An error is an
answer: it is full, or it is shutting down.

In use is a Postgres with a session that is not `idle`: a statement runs, or a transaction is open, also one that waits
for a lock or for its client. So is one whose autovacuum works. A session that is connected and idle is not use: clients
with connection pools would keep every compute up for ever. What such a session loses with its compute (LISTEN,
temporary tables, session-level advisory locks) is told in docs/compute.md.

A session that came and went between two looks is not seen here: the manager knows when it named the compute to a proxy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import asyncpg

from compute.agent.admin import connect_as_admin
from compute.agent.postgres import CrashedError
from compute.agent.postgres_conf import POSTGRES_PORT
from shared.api.pageserver import ADMIN_ROLE
from shared.telemetry import get_logger
from shared.wire.pgstartup import SSLRequest

_log = get_logger(__name__)
TIMEOUT_S: Final = 5.0
_MISSES: Final = 3
"""So many looks in a row must fail: one may, after the whole machine has slept."""

_IDLE_S: Final = """
SELECT extract(epoch FROM min(CASE
           WHEN backend_type = 'client backend' AND state = 'idle' THEN clock_timestamp() - state_change
           ELSE interval '0' END))::float8
  FROM pg_stat_activity
 WHERE backend_type IN ('client backend', 'autovacuum worker') AND usename IS DISTINCT FROM $1
"""


Look = Callable[[float], Awaitable[float | None]]
"""Within so many seconds: for how many nobody has used Postgres. None when nobody is connected. Raises what asyncpg
does."""


async def watch(
    look: Look,
    interval_s: float,
    liveness_timeout_s: float,
    report: Callable[[float], Awaitable[None]],
) -> None:
    """Tell `report` every `interval_s` for how many seconds Postgres has been idle. Until cancelled.

    A look that fails does not say that: whoever does not hear that a compute is idle keeps it. Raises CrashedError when
    there was no answer for `liveness_timeout_s`.
    """
    loop = asyncio.get_running_loop()
    last_use = answered_at = loop.time()
    misses = 0
    while True:
        await asyncio.sleep(interval_s)
        try:
            idle_s = await look(min(TIMEOUT_S, liveness_timeout_s / _MISSES))
        except asyncpg.PostgresError as error:
            _log.info("cannot see whether Postgres is idle", error=type(error).__name__)
            answered_at, misses = loop.time(), 0
            continue
        except (asyncpg.InterfaceError, OSError, TimeoutError) as error:
            _log.info("Postgres does not answer", error=type(error).__name__)
            misses += 1
            silent_s = loop.time() - answered_at
            if misses >= _MISSES and silent_s >= liveness_timeout_s:
                raise CrashedError(f"Postgres has not answered for {silent_s:.0f} s") from None
            continue
        answered_at, misses = loop.time(), 0
        if idle_s is not None:
            last_use = max(last_use, loop.time() - idle_s)
        await report(loop.time() - last_use)


async def knock(socket_dir: Path, timeout_s: float) -> None:
    """Returns when the postmaster takes a connection and gives it a process, which says whether it has TLS: before who
    comes has said who that is, and without a line in the log. Raises OSError, TimeoutError."""
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_unix_connection(str(socket_dir / f".s.PGSQL.{POSTGRES_PORT}"))
        try:
            writer.write(SSLRequest().serialize())
            if not await reader.read(1):
                raise ConnectionResetError("Postgres closed the connection")
        finally:
            writer.close()


async def look(socket_dir: Path, admin_password: str, timeout_s: float) -> float | None:
    """By a session of its own: that it can be had says something, too."""
    connection = await connect_as_admin(socket_dir, admin_password, timeout_s)
    try:
        return await ask(connection, timeout_s)
    finally:
        await connection.close(timeout=timeout_s)


async def ask(connection: Any, timeout_s: float) -> float | None:
    idle_s: float | None = await connection.fetchval(_IDLE_S, ADMIN_ROLE, timeout=timeout_s)
    return idle_s
