"""Clients that run pgbench's TPC-B and remember what they were told.

Each transaction carries a number of its own into `pgbench_history.filler`. When the client sees the commit, the
number is *acknowledged*; when the connection breaks in the middle, its outcome is *unknown*. Afterwards the database
must hold every acknowledged number exactly once, an unknown one at most once, and no other; and the four TPC-B sums
must agree. So lost, doubled and half transactions all show.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

import asyncpg

Connect = Callable[[], Awaitable["asyncpg.Connection[Any]"]]

RETRY_S: Final = 0.05
CLIENT_ERRORS: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # what asyncpg says when the server ended an idle connection and it did not notice yet
    OSError,
    TimeoutError,
)
_STATEMENT: Final = """
DO $$ BEGIN
  UPDATE pgbench_accounts SET abalance = abalance + {delta} WHERE aid = {aid};
  UPDATE pgbench_tellers SET tbalance = tbalance + {delta} WHERE tid = {tid};
  UPDATE pgbench_branches SET bbalance = bbalance + {delta} WHERE bid = {bid};
  INSERT INTO pgbench_history (tid, bid, aid, delta, mtime, filler)
    VALUES ({tid}, {bid}, {aid}, {delta}, CURRENT_TIMESTAMP, '{number}');
END $$
"""
"""TPC-B of pgbench in one round trip: one statement is one transaction."""

_SUMS: Final = """
SELECT (SELECT coalesce(sum(abalance), 0) FROM pgbench_accounts), (SELECT coalesce(sum(tbalance), 0) FROM
pgbench_tellers),
       (SELECT coalesce(sum(bbalance), 0) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history)
"""


def describe(error: BaseException) -> tuple[str, str]:
    """(SQLSTATE or class, message). asyncpg hides a FATAL error that ends a connection behind one of its own."""
    if isinstance(error.__cause__, asyncpg.PostgresError):
        error = error.__cause__
    return getattr(error, "sqlstate", None) or type(error).__name__, str(error)


@dataclass(slots=True)
class Ledger:
    """What all clients were told. Times are `time.monotonic()`."""

    acknowledged: dict[str, float] = field(default_factory=dict)
    unknown: dict[str, float] = field(default_factory=dict)
    errors: list[tuple[float, str, str]] = field(default_factory=list)
    """(when, SQLSTATE or class, message) of every error that a client saw."""
    longest_gap_s: float = 0.0
    """Longest time that any client waited between two acknowledged transactions."""

    def errors_since(self, since: float) -> list[tuple[float, str, str]]:
        return [error for error in self.errors if error[0] >= since]


class Load:
    """`async with`: `clients` connections under load until the block ends. They reconnect for as long as it takes."""

    def __init__(self, connect: Connect, scale: int, clients: int, ledger: Ledger) -> None:
        self._connect = connect
        self._scale = scale
        self._clients = clients
        self._ledger = ledger
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._run = len(ledger.acknowledged)

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._client(n)) for n in range(self._clients)]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def wait_for_commits(self, count: int, timeout_s: float = 60.0) -> None:
        """Returns when `count` more transactions were acknowledged. Raises TimeoutError."""
        target = len(self._ledger.acknowledged) + count
        async with asyncio.timeout(timeout_s):
            # Waking this up from every commit would cost more than looking.
            while len(self._ledger.acknowledged) < target:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def _client(self, number: int) -> None:
        rng = random.Random(number)  # noqa: S311 - choice of rows, not of keys
        connection: asyncpg.Connection[Any] | None = None
        sequence = 0
        last_commit = monotonic()
        while not self._stop.is_set():
            try:
                if connection is None:
                    connection = await self._connect()
                sequence += 1
                name = f"{self._run}-{number}-{sequence}"
                statement = _STATEMENT.format(
                    delta=rng.randint(-5000, 5000),
                    aid=rng.randint(1, 100_000 * self._scale),
                    tid=rng.randint(1, 10 * self._scale),
                    bid=rng.randint(1, self._scale),
                    number=name,
                )
                # Unknown until the answer is there: a connection may break after the commit and before the news of it.
                self._ledger.unknown[name] = monotonic()
                await connection.execute(statement)
                now = monotonic()
                del self._ledger.unknown[name]
                self._ledger.acknowledged[name] = now
                self._ledger.longest_gap_s = max(self._ledger.longest_gap_s, now - last_commit)
                last_commit = now
            except CLIENT_ERRORS as error:
                self._ledger.errors.append((monotonic(), *describe(error)))
                if connection is not None:
                    connection.terminate()
                    connection = None
                await asyncio.sleep(RETRY_S)
        if connection is not None:
            await connection.close()


async def check(connection: asyncpg.Connection[Any], ledger: Ledger) -> list[str]:
    """Everything that is wrong, in words; empty when database and clients agree."""
    rows = await connection.fetch("SELECT btrim(filler) AS number, count(*) AS n FROM pgbench_history GROUP BY 1")
    stored = {row["number"]: row["n"] for row in rows}
    problems = []
    if lost := ledger.acknowledged.keys() - stored.keys():
        problems.append(f"{len(lost)} acknowledged transactions are lost, e.g. {min(lost)}")
    if doubled := [number for number, count in stored.items() if count > 1]:
        problems.append(f"{len(doubled)} transactions are there twice, e.g. {min(doubled)}")
    if foreign := stored.keys() - ledger.acknowledged.keys() - ledger.unknown.keys():
        problems.append(f"{len(foreign)} transactions that nobody sent, e.g. {min(foreign)}")
    sums = await connection.fetchrow(_SUMS)
    if sums is None or len(set(sums)) != 1:
        problems.append(f"the TPC-B sums differ: {tuple(sums or ())}")
    return problems
