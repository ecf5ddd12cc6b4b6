"""GetPage@LSN equals a naive replay to that LSN by stock Postgres; and stock Postgres starts from what we have.

`python -m benchmarks point-in-time` does the same with 1,000 pairs over a longer history.
"""

from __future__ import annotations

import io
import os
import random
import tarfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import asyncpg
import pytest
import pytest_asyncio

from pageserver.basebackup import basebackup
from shared.postgres import PostgresServer
from tests.fixtures import special_cases
from tests.fixtures.point_in_time import Compared, MixedHistory, choose_lsns, compare_at, mixed_history

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def history() -> AsyncIterator[MixedHistory]:
    async with mixed_history() as history:
        yield history


async def test_pages_at_random_lsns_are_those_of_a_naive_replay(history: MixedHistory) -> None:
    seed = int(os.environ.get("KEYLAKE_POINT_IN_TIME_SEED", "1"))
    rng = random.Random(seed)
    compared = Compared()
    for lsn in choose_lsns(history, 4, rng):
        await compare_at(history, lsn, 50, rng, compared)
    assert compared.pairs >= 200
    assert compared.layers > 3, "most pages must come from sealed layers"


async def test_a_stock_postgres_starts_from_the_end_of_it(history: MixedHistory) -> None:
    """Behind the wraps of all counters, with commit timestamps, an origin's progress and a prepared transaction."""
    timeline = history.timeline
    target = history.root / "started"
    target.mkdir(mode=0o700)
    pieces = [piece async for piece in basebackup(timeline, timeline.last_record_lsn)]
    with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as archive:
        archive.extractall(target, filter="data")
    for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf"):
        (target / name).write_text("local all all trust\n" if name == "pg_hba.conf" else "")
    server = PostgresServer(target, socket_dir=history.root / "n", conf=special_cases.CHANGED_CONF)
    async with server:
        connection = await asyncpg.connect(host=server.host, port=server.port, user="postgres", database="postgres")
        assert await connection.fetchval("select age(xmin) from t where id = 500001") < 5000
        assert await connection.fetchval("select count(*) from t") == 2000 + 3, "one transaction is still prepared"
        await connection.execute("commit prepared 'left'")
        assert await connection.fetchval("select count(*) from t") == 2000 + 4
        assert await connection.fetchval("select pg_replication_origin_progress('one', false)::text") == "0/ABCDEF"
        assert await connection.fetchval("select pg_replication_origin_progress('two', false)::text") == "0/1234"
        stamp = await connection.fetchval("select pg_xact_commit_timestamp(xmin) from t where id = 500004")
        assert stamp == datetime(2020, 2, 2, 2, 2, 2, tzinfo=UTC), "as its origin said"
        assert await connection.fetchval("select count(*) from unlogged") == 0
        # Rows that two lockers share are read and locked again: their multixacts are all there.
        async with connection.transaction():
            assert len(await connection.fetch("select 1 from t where id < 150 for update")) == 149
        await connection.execute("insert into t select g, 'after' from generate_series(600000, 601000) g")
        await connection.execute("vacuum (freeze)")
        await connection.execute("create database another strategy file_copy")
        await connection.close()
