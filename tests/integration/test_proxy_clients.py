"""The clients that people use, through the proxy: psql, asyncpg, psycopg 3, SQLAlchemy; and many at once."""

from __future__ import annotations

import asyncio
import resource
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import psycopg
import pytest
import pytest_asyncio
import sqlalchemy
from sqlalchemy.ext.asyncio import create_async_engine

from shared.postgres import find_postgres
from tests.fixtures.proxy import DOMAIN, Backend, ProxyBench, proxy_bench, running_backend
from tests.fixtures.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

MANY = 200


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with running_backend(f"max_connections={MANY + 20}") as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(backend: Backend) -> AsyncIterator[ProxyBench]:
    """One for all: no test here breaks anything."""
    # The wheel's psql has no TLS. 200 clients of one process do not shake hands in 10 s on a busy machine. They take
    # twice the file descriptors that the proxy may have at first.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with proxy_bench(
        backend, allow_plaintext_loopback=True, startup_timeout_s=60, open_files=(256, most)
    ) as running:
        yield running


def psycopg_arguments(bench: ProxyBench) -> dict[str, Any]:
    """By the host's name, with its certificate checked: libpq has SNI."""
    return {
        "host": f"{bench.endpoint_id}.{DOMAIN}",
        "hostaddr": "127.0.0.1",
        "port": bench.port,
        "user": "postgres",
        "password": "pw",
        "dbname": "postgres",
        "sslmode": "verify-full",
        "sslrootcert": str(bench.realm.ca_certificate),
    }


async def test_psql(bench: ProxyBench) -> None:
    script = b"""
        CREATE TEMP TABLE t (a int, b text);
        \\copy t FROM STDIN
1\tone
2\ttwo
\\.
        \\set FETCH_COUNT 1
        SELECT b FROM t ORDER BY a;
        \\copy (SELECT a FROM t ORDER BY a) TO STDOUT
        LISTEN c;
        NOTIFY c, 'heard';
        SELECT 'last';
    """
    argv = [find_postgres().program("psql"), "-X", "-Atq", "-v", "ON_ERROR_STOP=1", bench.conninfo()]
    done = await asyncio.to_thread(subprocess.run, argv, input=script, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert lines[:4] == ["one", "two", "1", "2"]
    assert any('notification "c" with payload "heard"' in line for line in lines)
    assert "last" in lines


async def test_a_cancel_of_psql(bench: ProxyBench) -> None:
    """Ctrl-C."""
    argv = [find_postgres().program("psql"), "-X", "-Atq", bench.conninfo("application_name=ctrl_c")]
    argv += ["-c", "SELECT pg_sleep(60)"]
    process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    admin = await bench.backend.admin()
    sql = "SELECT true FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND application_name = 'ctrl_c'"

    async def sleeps() -> Any:
        return await admin.fetchval(sql)

    await wait_until(sleeps)
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(20):
        _, errors = await process.communicate()
    assert b"canceling statement due to user request" in errors
    assert process.returncode == 1  # an error; 2 would be a lost connection
    await admin.close()


async def test_asyncpg(bench: ProxyBench) -> None:
    connection = await bench.connect()
    await connection.execute("CREATE TEMP TABLE t (a int, b text)")
    await connection.copy_records_to_table("t", records=[(n, f"row {n}") for n in range(5000)])
    taken = bytearray()

    async def take(data: bytes) -> None:
        taken.extend(data)

    await connection.copy_from_query("SELECT a FROM t ORDER BY a", output=take)
    assert taken.decode().split() == [str(n) for n in range(5000)]

    statement = await connection.prepare("SELECT b FROM t WHERE a = $1")
    assert [await statement.fetchval(n) for n in (1, 4999)] == ["row 1", "row 4999"]
    async with connection.transaction():
        seen = [row["a"] async for row in connection.cursor("SELECT a FROM t ORDER BY a", prefetch=7)]
    assert seen == list(range(5000))

    heard: asyncio.Queue[str] = asyncio.Queue()
    await connection.add_listener("c", lambda *event: heard.put_nowait(event[-1]))
    other = await bench.connect()
    await other.execute("NOTIFY c, 'heard'")
    assert await asyncio.wait_for(heard.get(), 10) == "heard"
    await other.close()

    with pytest.raises(TimeoutError):
        await connection.execute("SELECT pg_sleep(60)", timeout=0.2)  # asyncpg cancels it
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


def _psycopg(bench: ProxyBench) -> None:
    with psycopg.connect(**psycopg_arguments(bench), autocommit=True) as connection:
        cursor = connection.cursor()
        cursor.execute("CREATE TEMP TABLE t (a int, b bytea)")
        with cursor.copy("COPY t FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["int4", "bytea"])
            for n in range(2000):
                copy.write_row((n, bytes([n % 256]) * 50))
        with cursor.copy("COPY t TO STDOUT") as copy:
            assert sum(1 for _ in copy.rows()) == 2000
        for n in range(10):  # prepared after five times, by itself
            assert cursor.execute("SELECT b FROM t WHERE a = %s", (n,), prepare=True).fetchone() == (bytes([n]) * 50,)
        with connection.pipeline():
            results = [connection.execute("SELECT %s::int", (n,)) for n in range(50)]
        assert [result.fetchone() for result in results] == [(n,) for n in range(50)]
        with connection.transaction(), connection.cursor("named") as server_side:
            server_side.itersize = 100
            server_side.execute("SELECT a FROM t ORDER BY a")
            assert [row[0] for row in server_side] == list(range(2000))

        content = bytes(range(256)) * 4000
        with connection.transaction():
            [oid] = cursor.execute("SELECT lo_from_bytea(0, %s)", (content,)).fetchone() or [0]
            cursor.execute("SELECT lo_put(%s, 256, 'spliced')", (oid,))
        [read] = cursor.execute("SELECT lo_get(%s)", (oid,)).fetchone() or [b""]
        assert bytes(read) == content[:256] + b"spliced" + content[263:]
        cursor.execute("SELECT lo_unlink(%s)", (oid,))

        cursor.execute("CREATE TEMP TABLE u (a int CONSTRAINT positive CHECK (a > 0))")
        with pytest.raises(psycopg.errors.CheckViolation) as violated:
            cursor.execute("INSERT INTO u VALUES (-1)")
        diag = violated.value.diag
        assert (diag.sqlstate, diag.table_name, diag.constraint_name) == ("23514", "u", "positive")
        with pytest.raises(psycopg.errors.UndefinedColumn) as unknown:
            cursor.execute("SELECT nothing")
        assert unknown.value.diag.statement_position == "8"
        cursor.execute("BEGIN")
        for sql, error in (("SELECT 1 / 0", "22012"), ("SELECT 1", "25P02")):
            with pytest.raises(psycopg.Error) as failed:
                cursor.execute(sql)
            assert failed.value.sqlstate == error
        cursor.execute("ROLLBACK")

        connection.execute("LISTEN c")
        connection.execute("NOTIFY c, 'heard'")
        [notify] = connection.notifies(timeout=10, stop_after=1)
        assert notify.payload == "heard"


async def test_psycopg(bench: ProxyBench) -> None:
    await asyncio.to_thread(_psycopg, bench)


async def test_a_cancel_of_psycopg(bench: ProxyBench) -> None:
    connection = await psycopg.AsyncConnection.connect(**psycopg_arguments(bench), autocommit=True)
    async with connection:
        sleeping = asyncio.create_task(connection.execute("SELECT pg_sleep(60)"))
        admin = await bench.backend.admin()

        async def sleeps() -> bool:
            return bool(await admin.fetchval("SELECT true FROM pg_stat_activity WHERE wait_event = 'PgSleep'"))

        await wait_until(sleeps)
        await connection.cancel_safe(timeout=10)
        with pytest.raises(psycopg.errors.QueryCanceled):
            await sleeping
        assert await (await connection.execute("SELECT 1")).fetchone() == (1,)
        await admin.close()


async def test_sqlalchemy(bench: ProxyBench) -> None:
    items = sqlalchemy.Table(
        "sqlalchemy_items",
        sqlalchemy.MetaData(),
        sqlalchemy.Column("id", sqlalchemy.Integer, primary_key=True),
        sqlalchemy.Column("name", sqlalchemy.Text),
    )
    psycopg_url = sqlalchemy.URL.create("postgresql+psycopg")
    asyncpg_url = sqlalchemy.URL.create("postgresql+asyncpg", "postgres", "pw", "localhost", bench.port, "postgres")
    options = {"ssl": bench.tls(), "server_settings": {"options": f"endpoint={bench.endpoint_id}"}}
    for engine in (
        create_async_engine(psycopg_url, connect_args=psycopg_arguments(bench), pool_pre_ping=True),
        create_async_engine(asyncpg_url, connect_args=options, pool_pre_ping=True),
    ):
        async with engine.begin() as connection:
            await connection.run_sync(items.metadata.create_all)
            await connection.execute(items.insert(), [{"name": f"item {n}"} for n in range(500)])
        async with engine.connect() as connection:
            result = await connection.stream(sqlalchemy.select(items.c.name).order_by(items.c.id))
            assert [row.name async for row in result] == [f"item {n}" for n in range(500)]
        async with engine.begin() as connection:
            await connection.run_sync(items.metadata.drop_all)
        await engine.dispose()


async def test_psycopg_trusts_nobody_else(bench: ProxyBench) -> None:
    elsewhere, unknown_ca = {"host": f"{bench.endpoint_id}.elsewhere"}, {"sslrootcert": "system"}
    # TLS ends at the proxy, so nobody can be bound to its channel: who insists on that is told so, and not let down.
    bound = {"channel_binding": "require"}
    for changes, message in ((elsewhere, "certificate"), (unknown_ca, "certificate"), (bound, "channel binding")):
        with pytest.raises(psycopg.OperationalError, match=message):
            await psycopg.AsyncConnection.connect(**psycopg_arguments(bench) | changes)


async def test_two_hundred_at_once(bench: ProxyBench) -> None:
    """Of one address, which may have fifty that shake hands: the others wait, and nobody is refused."""
    tls = bench.tls()
    connections = await asyncio.gather(
        *(bench.connect(timeout=60, ssl=tls if number % 4 == 0 else None) for number in range(MANY))
    )
    pids = await asyncio.gather(*(each.fetchval("SELECT pg_backend_pid()") for each in connections))
    assert len(set(pids)) == MANY
    sums = await asyncio.gather(
        *(each.fetchval("SELECT sum(a) FROM generate_series(1, 1000) a") for each in connections)
    )
    assert set(sums) == {500500}
    # As many as Postgres has places, and one more: Postgres's own words reach the client.
    more = await asyncio.gather(*(bench.connect(ssl=None) for _ in range(30)), return_exceptions=True)
    refused = [each for each in more if isinstance(each, asyncpg.TooManyConnectionsError)]
    assert refused
    assert len(refused) < len(more)
    await asyncio.gather(*(each.close() for each in (*connections, *more) if each not in refused))


async def test_more_than_may_shake_hands_wait_for_their_turn(backend: Backend) -> None:
    async with proxy_bench(backend, max_handshakes=3, startup_timeout_s=60) as bench:
        connections = await asyncio.gather(*(bench.connect(timeout=60, ssl=bench.tls()) for _ in range(40)))
        assert sum(await asyncio.gather(*(each.fetchval("SELECT 1") for each in connections))) == 40
        await asyncio.gather(*(each.close() for each in connections))


async def test_no_more_sessions_than_file_descriptors(backend: Backend) -> None:
    """The machine allows a few: they are served, the others are told that they are too many."""
    # 2 * 9 + 10 + 20 + 256, where max_connections = 2000 would take 4286.
    async with proxy_bench(backend, max_handshakes=10, max_waiting_handshakes=20, open_files=(304, 304)) as bench:
        assert "too few file descriptors" in bench.log
        connections = [await bench.connect() for _ in range(9)]
        with pytest.raises(asyncpg.TooManyConnectionsError, match="to this proxy"):
            await bench.connect()
        assert sum(await asyncio.gather(*(each.fetchval("SELECT 1") for each in connections))) == 9
        await asyncio.gather(*(each.close() for each in connections))
