"""Ingest against a real primary: from its initdb and its WAL alone, every page and SLRU that it has after a shutdown.

Workloads, broadly. Each special case by itself is in test_ingest_rows.py.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio

from pageserver.ingest import WalIngest
from pageserver.ingest_state import UnsupportedWalError
from pageserver.redo.build import prepare
from pageserver.redo.worker import RedoWorker
from shared.keyspace import CHECKPOINT_KEY, TWO_PHASE, Slru, rel_map_key, two_phase_key
from shared.postgres import PostgresServer, initdb
from shared.wal.control import CheckPoint, ControlFile
from shared.wal.rmgr import RmgrId
from tests.fixtures.redo_history import INSERT, SCHEMA
from tests.fixtures.replay import (
    Imported,
    Replayed,
    access_methods,
    read_records,
    relation_differences,
    relation_files,
    replay,
    slru_differences,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

CONF: dict[str, str | int | float | bool] = {
    "fsync": False,
    "full_page_writes": False,
    "wal_level": "replica",
    "wal_keep_size": "4GB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "1h",
    "shared_buffers": "16MB",
    "autovacuum": False,
    "max_prepared_transactions": 8,
}


async def workload(server: PostgresServer) -> None:
    async def connect(database: str = "postgres") -> asyncpg.Connection[asyncpg.Record]:
        return await asyncpg.connect(host=server.host, port=server.port, user="postgres", database=database)

    async def one_by_one(statements: str) -> None:
        """VACUUM, CREATE DATABASE and the like refuse to be one of several statements of a query."""
        for statement in statements.split("; "):
            await connection.execute(statement)

    connection = await connect()
    await connection.execute(SCHEMA)
    for number in range(3):
        await connection.execute(INSERT, number * 1500, number * 1500 + 1499)
        await connection.execute("insert into dup select g % 5, repeat('x', g % 90) from generate_series(1, 3000) g")
        await connection.execute(
            "insert into small select g, 0 from generate_series($1::int, $2::int) g", number * 300, number * 300 + 299
        )
        await connection.execute("insert into wide select g, repeat('z', 3000) from generate_series(1, 300) g")
        await one_by_one("vacuum (freeze, analyze) t; vacuum small; vacuum dup")
        # All-visible pages change: the visibility map's bits are cleared without naming it.
        await connection.execute("update small set v = v + 1 where id % 3 = 0")
        await connection.execute("update t set k = k + 1, txt = txt || 'y' where id % 11 = 0")
        await connection.execute("delete from t where id % 13 = 0")
        await connection.execute("select count(*) from (select 1 from dup where v = 1 for share) s")
        # Truncated, then grown again: no block may show its life before.
        await connection.execute("delete from wide where id > 20")
        await connection.execute("vacuum (truncate) wide")
        await connection.execute("insert into wide select g, repeat('w', 500) from generate_series(1, 3000) g")
        await connection.execute("vacuum (freeze) wide")
    # Subtransactions, aborts, drops on commit and on abort.
    async with connection.transaction():
        for number in range(200):
            async with connection.transaction():
                await connection.execute("insert into small values ($1, 1)", 100_000 + number)
    await connection.execute("begin; create table aborted as select generate_series(1, 1000) g; rollback")
    await one_by_one("create table dropped as select generate_series(1, 1000) g; vacuum (freeze) dropped")
    await connection.execute("drop table dropped")
    await connection.execute("truncate dup; insert into dup select 1, 'again' from generate_series(1, 100)")
    # Multixacts of two lockers, with updates.
    other = await connect()
    for number in range(300):
        async with connection.transaction():
            await connection.execute("select 1 from small where id = $1 for key share", number)
            async with other.transaction():
                await other.execute("select 1 from small where id = $1 for key share", number)
                await other.execute("update small set v = v + 1 where id = $1", number)
    await other.close()
    # Two-phase: one committed, one rolled back, one left prepared.
    await connection.execute("begin; insert into dup values (7, 'p'); prepare transaction 'committed'")
    await connection.execute("commit prepared 'committed'")
    await connection.execute("begin; create table never (i int); prepare transaction 'aborted'")
    await connection.execute("rollback prepared 'aborted'")
    await connection.execute("begin; insert into dup values (8, 'left'); prepare transaction 'left'")
    # Databases by both strategies, one dropped; relation maps rewritten.
    await connection.execute("create database logged strategy wal_log")
    await connection.execute("create database copied template logged strategy file_copy")
    await connection.execute("create database gone strategy file_copy")
    await connection.execute("drop database gone")
    in_copy = await connect("copied")
    await in_copy.execute("create table c as select g, md5(g::text) from generate_series(1, 2000) g")
    await in_copy.execute("vacuum full pg_class")
    await in_copy.execute("vacuum full pg_proc")
    await in_copy.close()
    await one_by_one("vacuum full pg_database; reindex table pg_type")
    # More transactions than one page of the commit log holds, and then some.
    await connection.execute(
        "create procedure many(n int) language plpgsql as"
        " $$ begin for i in 1..n loop insert into dup values (9, 'm'); commit; end loop; end $$"
    )
    await connection.execute("call many(34000)")
    await one_by_one("vacuum (freeze) dup; vacuum freeze; create index late on t using gist (r)")
    await connection.execute("cluster small using small_pkey")
    await connection.execute("select pg_switch_wal()")
    await connection.execute("update small set v = 5 where id < 10")
    await connection.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ingested() -> AsyncIterator[Replayed]:
    root = Path(tempfile.mkdtemp(prefix="keylake-test-", dir="/dev/shm"))
    pgdata = root / "p"
    await initdb(pgdata)
    imported = Imported.read(pgdata)
    server = PostgresServer(pgdata, socket_dir=root / "s", conf=CONF)
    async with server:
        await workload(server)
        methods = await access_methods(server, ("postgres", "template1", "logged", "copied"))
    redo = await RedoWorker.start(await prepare(root / "c"))
    batches, end = read_records(pgdata, imported.position)
    result = await replay(pgdata, imported, batches, end, redo)
    result.access_methods = methods
    yield result
    await redo.close()
    shutil.rmtree(root)


async def test_every_page_equals_the_primarys(ingested: Replayed) -> None:
    counts: Counter[str] = Counter()
    different = await relation_differences(ingested, relation_files(ingested.pgdata), counts)
    assert not different
    assert counts["pages"] > 5000
    assert counts["equal"] > counts["masked"]


async def test_relations_that_are_gone_are_gone(ingested: Replayed) -> None:
    on_disk = {(spc, db, rel) for spc, db, rel, _ in relation_files(ingested.pgdata)}
    on_disk |= {
        (1663, int(f.parent.name), int(f.name.removesuffix("_init"))) for f in ingested.pgdata.glob("base/*/*_init")
    }
    assert {rel for rel, _ in ingested.tip.rel_sizes} <= on_disk


async def test_every_slru_page_equals_the_primarys(ingested: Replayed) -> None:
    for kind in Slru:
        assert not await slru_differences(ingested, kind)
    assert len(ingested.tip.slru_pages[Slru.CLOG]) >= 2
    assert ingested.tip.checkpoint.next_multi > 300


async def test_relation_maps_two_phase_files_and_checkpoint(ingested: Replayed) -> None:
    pgdata = ingested.pgdata
    maps = {(1664, 0): pgdata / "global/pg_filenode.map"}
    maps |= {(1663, int(f.parent.name)): f for f in pgdata.glob("base/*/pg_filenode.map")}
    assert ingested.tip.rel_maps == maps.keys()
    for key, file in maps.items():
        assert ingested.store.newest(rel_map_key(*key)) == file.read_bytes()
    left = {int(f.name, 16): f.read_bytes() for f in (pgdata / "pg_twophase").iterdir()}
    assert ingested.tip.two_phase == left.keys()
    assert len(left) == 1
    for xid, content in left.items():
        assert ingested.store.newest(two_phase_key(xid)) == content
    assert sum(1 for key in ingested.store.versions if key[0] == TWO_PHASE) >= 3

    real = ControlFile.parse((pgdata / "global/pg_control").read_bytes()).checkpoint
    ours = ingested.tip.checkpoint
    assert ours == CheckPoint.parse(ingested.store.newest(CHECKPOINT_KEY) or b"")
    assert 0 <= ours.next_xid - real.next_xid <= 1024
    assert ours.next_oid >= real.next_oid
    assert (ours.next_multi, ours.next_multi_offset) == (real.next_multi, real.next_multi_offset)
    assert (ours.oldest_xid, ours.oldest_xid_database) == (real.oldest_xid, real.oldest_xid_database)
    assert (ours.oldest_multi, ours.oldest_multi_database) == (real.oldest_multi, real.oldest_multi_database)


async def test_a_tablespace_is_refused(ingested: Replayed) -> None:
    """XLOG_TBLSPC_CREATE: an OID and a path."""
    body = b"\x01\x40\0\0/somewhere\0"
    header = (24 + 2 + len(body)).to_bytes(4, "little") + bytes(12) + bytes([0, RmgrId.TBLSPC]) + bytes(6)
    record = header + bytes([255, len(body)]) + body
    with pytest.raises(UnsupportedWalError, match="tablespaces"):
        WalIngest(ingested.tip).ingest([(ingested.end_lsn, ingested.end_lsn + 64, record)])
