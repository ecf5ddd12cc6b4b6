"""Clients that move money, and remember what they were told.

Each transfer takes from one account, gives to another, and writes its number into a third table, in one transaction.
The number is *acknowledged* when the client saw the commit, *unknown* when its connection broke before. Afterwards the
total must be what it was, every acknowledged number there, none twice, none that nobody sent, and every account the sum
of its transfers: so lost, doubled and half transactions all show. What the clients were told is kept as the demo keeps
it (keylake.demo.ledger).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from time import monotonic

from keylake.demo.ledger import CLIENT_ERRORS, Ledger, describe
from tests.cluster.primary import Session
from tests.fixtures.waiting import wait_until

ACCOUNTS = 100
BALANCE = 1000
RETRY_S = 0.02

SCHEMA = """
create table account (id int primary key, balance int not null, opening int not null);
create table transfer (number text not null, source int not null, target int not null, amount int not null);
create index on transfer (number);
"""

# One statement is one transaction, and one round trip. Rows are locked in the order of their ids: no deadlocks.
_TRANSFER = """
do $$ begin
  perform 1 from account where id in ({source}, {target}) order by id for update;
  update account set balance = balance - {amount} where id = {source};
  update account set balance = balance + {amount} where id = {target};
  insert into transfer values ('{number}', {source}, {target}, {amount});
end $$
"""

_WRONG_BALANCES = """
select count(*) from account a where balance <> opening
  + (select coalesce(sum(amount), 0) from transfer where target = a.id)
  - (select coalesce(sum(amount), 0) from transfer where source = a.id)
"""

Connect = Callable[[], Awaitable[Session]]


class Bank:
    """`async with`: `clients` connections that transfer until the block ends, and reconnect for as long as it takes."""

    def __init__(self, connect: Connect, ledger: Ledger, name: str, clients: int = 4, *, pause_s: float = 0.01) -> None:
        """`name`: starts the numbers of these clients' transfers, and is never used again for the same ledger.
        `pause_s`: of each client, between two transfers, which leaves the processor to who has to come back."""
        self._connect = connect
        self.name = name
        self._clients = clients
        self._ledger = ledger
        self._pause_s = pause_s
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Bank:
        self._tasks = [asyncio.create_task(self._client(n)) for n in range(self._clients)]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    async def stop(self, timeout_s: float = 60.0) -> None:
        """Each client finishes what it is at; one that cannot within `timeout_s` is cut off. Idempotent."""
        self._stop.set()
        if self._tasks:
            _, hanging = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in hanging:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for task in self._tasks:
                if not task.cancelled():
                    task.result()
            self._tasks = []

    async def commits(self, count: int, timeout_s: float = 60.0) -> None:
        """Returns when `count` more transfers of anybody were acknowledged. Raises TimeoutError."""
        target = len(self._ledger.acknowledged) + count
        await wait_until(lambda: len(self._ledger.acknowledged) >= target, timeout_s)

    async def _client(self, number: int) -> None:
        rng = random.Random(number)
        connection: Session | None = None
        sequence = 0
        try:
            while not self._stop.is_set():
                try:
                    if connection is None:
                        connection = await self._connect()
                    sequence += 1
                    await self._transfer(connection, rng, f"{self.name}-{number}-{sequence}")
                    await asyncio.sleep(self._pause_s)
                except CLIENT_ERRORS as error:
                    self._ledger.errors.append((monotonic(), *describe(error)))
                    if connection is not None:
                        connection.terminate()
                        connection = None
                    await asyncio.sleep(RETRY_S)
        finally:
            if connection is not None:
                connection.terminate()

    async def _transfer(self, connection: Session, rng: random.Random, number: str) -> None:
        source, target = rng.sample(range(ACCOUNTS), 2)
        statement = _TRANSFER.format(source=source, target=target, amount=rng.randint(1, 100), number=number)
        # Unknown until the answer is there: a connection may break after the commit and before the news of it.
        self._ledger.unknown[number] = monotonic()
        await connection.execute(statement)
        del self._ledger.unknown[number]
        self._ledger.acknowledged[number] = monotonic()


async def open_bank(connect: Connect) -> None:
    connection = await connect()
    await connection.execute(SCHEMA)
    opening = "insert into account select id, $2::int, $2::int from generate_series(0, $1::int - 1) id"
    await connection.execute(opening, ACCOUNTS, BALANCE)
    await connection.close()


async def audit(connection: Session, ledger: Ledger) -> list[str]:
    """Everything that is wrong, in words; empty when database and clients agree. Not while anybody transfers."""
    rows = await connection.fetch("select number, count(*) as n from transfer group by 1")
    stored = {row["number"]: row["n"] for row in rows}
    problems = []
    if lost := ledger.acknowledged.keys() - stored.keys():
        problems.append(f"{len(lost)} acknowledged transfers are lost, e.g. {min(lost)}")
    if doubled := [number for number, count in stored.items() if count > 1]:
        problems.append(f"{len(doubled)} transfers are there twice, e.g. {min(doubled)}")
    if foreign := stored.keys() - ledger.acknowledged.keys() - ledger.unknown.keys():
        problems.append(f"{len(foreign)} transfers that nobody sent, e.g. {min(foreign)}")
    total = await connection.fetchval("select sum(balance) from account")
    if total != ACCOUNTS * BALANCE:
        problems.append(f"the total is {total}, not {ACCOUNTS * BALANCE}")
    if wrong := await connection.fetchval(_WRONG_BALANCES):
        problems.append(f"{wrong} accounts are not the sum of their transfers")
    return problems
