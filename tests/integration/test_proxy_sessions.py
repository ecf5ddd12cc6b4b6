"""The proxy process in front of a real PostgreSQL 16: what clients see when all is well."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest

from compute.proxy.proxy_protocol import SIGNATURE
from keylake.ports import free_port
from shared.errors import NotFoundError
from shared.ids import EndpointId, InstanceId
from shared.postgres import find_postgres
from tests.fixtures.proxy import DOMAIN, Backend, ProxyBench, proxy_bench, running_backend
from tests.fixtures.waiting import wait_until

pytestmark = pytest.mark.integration


SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with running_backend() as running:
        yield running


@pytest.fixture
async def bench(backend: Backend) -> AsyncIterator[ProxyBench]:
    async with proxy_bench(backend) as running:
        yield running


async def run(program: str, *arguments: str, stdin: bytes = b"", **environment: str) -> tuple[int, str]:
    """A client program of the wheel. It has no OpenSSL: it can only come without TLS."""
    process = await asyncio.create_subprocess_exec(
        find_postgres().program(program),
        *arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate(stdin)
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_queries_over_tls_with_the_endpoint_in_the_options(bench: ProxyBench) -> None:
    connection = await bench.connect()
    assert await connection.fetchval("SELECT 6 * 7") == 42
    rows = await connection.fetch("SELECT i, repeat('x', i % 500) AS x FROM generate_series(1, 20000) i")
    assert [len(row["x"]) for row in rows] == [i % 500 for i in range(1, 20001)]
    # A value larger than what is held back goes through as it comes.
    assert len(await connection.fetchval("SELECT repeat('y', 3000000)")) == 3_000_000
    await connection.close()


async def test_other_options_and_parameters_pass(bench: ProxyBench) -> None:
    connection = await bench.connect(
        server_settings={
            "options": f"-c work_mem=12345kB endpoint={bench.endpoint_id} -c statement_timeout=54321",
            "application_name": "me",
        }
    )
    assert await connection.fetchval("SHOW work_mem") == "12345kB"
    assert await connection.fetchval("SHOW statement_timeout") == "54321ms"
    assert await connection.fetchval("SHOW application_name") == "me"
    await connection.close()


async def test_the_host_name_routes_and_its_certificate_is_good(bench: ProxyBench) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
    writer.write(b"\0\0\0\x08\x04\xd2\x16\x2f")
    assert await reader.readexactly(1) == b"S"
    await writer.start_tls(bench.tls(), server_hostname=f"{bench.endpoint_id}.{DOMAIN}")
    writer.write(_startup({"user": "postgres", "database": "postgres"}))
    kind = await reader.readexactly(1)
    assert kind == b"R"  # AuthenticationSASL of the real server
    writer.close()
    await writer.wait_closed()


def _startup(parameters: dict[str, str]) -> bytes:
    body = b"\0\3\0\0" + b"".join(k.encode() + b"\0" + v.encode() + b"\0" for k, v in parameters.items()) + b"\0"
    return (len(body) + 4).to_bytes(4, "big") + body


async def test_direct_tls_needs_alpn(bench: ProxyBench) -> None:
    for alpn, expected in (([], b"E"), (["postgresql"], b"R")):
        context = bench.tls()
        if alpn:
            context.set_alpn_protocols(alpn)
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", bench.port, ssl=context, server_hostname=f"{bench.endpoint_id}.{DOMAIN}"
        )
        if alpn:
            writer.write(_startup({"user": "postgres", "database": "postgres"}))
        assert await reader.readexactly(1) == expected
        writer.close()


async def test_copy_both_ways(bench: ProxyBench) -> None:
    connection = await bench.connect()
    await connection.execute("CREATE TEMP TABLE t (a int, b text)")
    records = [(i, "z" * (i % 100)) for i in range(50_000)]
    await connection.copy_records_to_table("t", records=records)
    assert await connection.fetchval("SELECT count(*) FROM t WHERE length(b) = a % 100") == 50_000
    received = bytearray()

    async def take(data: bytes) -> None:
        received.extend(data)

    await connection.copy_from_query("SELECT a FROM t ORDER BY a", output=take)
    assert received.split() == [str(i).encode() for i in range(50_000)]
    await connection.close()


async def test_errors_and_prepared_statements_pass(bench: ProxyBench) -> None:
    connection = await bench.connect()
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.fetchval("SELECT 1 / 0")
    statement = await connection.prepare("SELECT $1::int + 1")
    assert [await statement.fetchval(i) for i in range(100)] == list(range(1, 101))
    await connection.close()


async def test_a_wrong_password_is_refused_by_postgres(bench: ProxyBench) -> None:
    with pytest.raises(asyncpg.InvalidPasswordError):
        await bench.connect(password="wrong")


async def test_cancel_reaches_the_right_backend_and_only_with_the_right_key(bench: ProxyBench) -> None:
    connection, other = await bench.connect(), await bench.connect()
    # asyncpg cancels over a connection of its own, as libpq does.
    sleeping = asyncio.create_task(connection.execute("SELECT pg_sleep(60)", timeout=0.5))
    other_sleeping = asyncio.create_task(other.execute("SELECT pg_sleep(2)"))
    with pytest.raises(TimeoutError):
        await sleeping
    assert await connection.fetchval("SELECT 1") == 1
    await other_sleeping
    admin = await bench.backend.admin()
    real_pids = {row["pid"] for row in await admin.fetch("SELECT pid FROM pg_stat_activity")}
    assert connection.get_server_pid() not in real_pids  # the proxy's own numbers
    # A made-up key does nothing.
    sleeping = asyncio.create_task(connection.execute("SELECT pg_sleep(0.5)"))
    reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
    writer.write(b"\0\0\0\x10\x04\xd2\x16\x2e" + connection.get_server_pid().to_bytes(4, "big") + b"\0\0\0\0")
    assert await reader.read() == b""
    writer.close()
    await sleeping
    for each in (connection, other, admin):
        await each.close()


async def test_replication_and_our_own_roles_are_refused(bench: ProxyBench) -> None:
    for options in ({"user": "keylake_admin"}, {"user": "keylake_safekeeper"}):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="reserved"):
            await bench.connect(**options)
    for value in ("true", "database", "on", "1", "yes"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="replication"):
            await bench.connect(server_settings={"options": f"endpoint={bench.endpoint_id}", "replication": value})


async def test_unknown_missing_and_contradicting_endpoints(bench: ProxyBench) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"server_settings": {}}, "no endpoint named"),
        ({"server_settings": {"options": "endpoint=nonsense"}}, "not an endpoint id"),
        ({"server_settings": {"options": f"endpoint={EndpointId.new()}"}}, "no such endpoint"),
    ]
    for options, message in cases:
        with pytest.raises(asyncpg.PostgresError, match=message) as caught:
            await bench.connect(**options)
        assert caught.value.sqlstate == "08004"


async def test_a_sleeping_compute_is_waited_for(bench: ProxyBench) -> None:
    """And the manager is told what its first query took: the first that got a row, of whichever session."""
    target = bench.manager.targets[bench.endpoint_id].model_copy(update={"wants_first_query": True})
    bench.manager.targets[bench.endpoint_id] = target
    bench.manager.delay_s = 1.0
    impatient = asyncio.create_task(bench.connect())  # the one that asked first goes away
    await wait_until(lambda: bench.manager.calls)
    waiting = [asyncio.create_task(bench.connect()) for _ in range(3)]
    await asyncio.sleep(0.3)
    impatient.cancel()
    connections = await asyncio.gather(*waiting)
    for each in connections:
        await each.execute("SET work_mem = '1MB'")
    assert bench.manager.first_queries == []
    assert await connections[0].fetchval("SELECT 1 FROM pg_sleep(0.2)") == 1
    await wait_until(lambda: bench.manager.first_queries)
    assert [await each.fetchval("SELECT 1") for each in connections] == [1, 1, 1]
    calls = bench.manager.calls
    assert calls == 1, "many wait for one start"
    bench.manager.delay_s = 0.0
    connections.append(await bench.connect())
    assert bench.manager.calls == calls  # known by now
    for each in connections:
        await each.close()
    [seen] = bench.manager.first_queries
    assert seen.instance_id == target.instance_id
    assert seen.query_s >= 0.2
    assert seen.login_s > 0


async def test_a_client_that_goes_away_while_it_waits_is_forgotten(bench: ProxyBench) -> None:
    bench.manager.delay_s = 30.0
    with pytest.raises(TimeoutError):
        await bench.connect(timeout=1)
    bench.manager.delay_s = 0.0
    connection = await bench.connect()
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


async def test_what_the_manager_refuses_the_client_gets(bench: ProxyBench) -> None:
    bench.manager.error = NotFoundError("no such endpoint")
    with pytest.raises(asyncpg.PostgresError, match="no such endpoint"):
        await bench.connect()


async def test_plaintext_is_refused_unless_allowed(backend: Backend, bench: ProxyBench) -> None:
    status, output = await run("psql", bench.conninfo("sslmode=disable"), "-c", "SELECT 1")
    assert status == 2
    assert "only takes TLS connections" in output
    async with proxy_bench(backend, allow_plaintext_loopback=True) as open_bench:
        status, output = await run("psql", open_bench.conninfo(), "-Atc", "SELECT 6 * 7")
        assert (status, output.strip()) == (0, "42")


async def test_pgbench_and_copy_of_the_wheels_own_clients(backend: Backend) -> None:
    async with proxy_bench(backend, allow_plaintext_loopback=True) as bench:
        status, output = await run("pgbench", "-i", "-s", "1", bench.conninfo())
        assert status == 0, output
        for protocol in ("simple", "extended", "prepared"):
            status, output = await run("pgbench", "-c", "8", "-t", "50", "-M", protocol, bench.conninfo())
            assert status == 0, output
            assert "number of transactions actually processed: 400/400" in output
        status, output = await run("psql", bench.conninfo(), "-Atc", "COPY (SELECT * FROM pgbench_accounts) TO STDOUT")
        assert status == 0
        assert output.count("\n") == 100_000


async def test_many_sessions_come_and_go(bench: ProxyBench) -> None:
    async def one() -> int:
        connection = await bench.connect()
        value: int = await connection.fetchval("SELECT 1")
        await connection.close()
        return value

    for _ in range(3):
        assert sum(await asyncio.gather(*(one() for _ in range(20)))) == 20
    admin = await bench.backend.admin()

    async def gone() -> bool:
        count: int = await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")
        return count == 1

    await wait_until(gone)
    await admin.close()


async def test_a_client_that_does_not_read_stops_the_server_and_costs_no_memory(bench: ProxyBench) -> None:
    def resident_kb() -> int:
        with open(f"/proc/{bench.process.pid}/status") as file:
            return int(next(line for line in file if line.startswith("VmRSS")).split()[1])

    connection, admin = await bench.connect(), await bench.backend.admin()
    before = resident_kb()
    read_on, received = asyncio.Event(), 0

    async def take(data: bytes) -> None:
        nonlocal received
        received += len(data)
        await read_on.wait()

    sql = "SELECT repeat('x', 999) FROM generate_series(1, 200000)"
    query = asyncio.create_task(connection.copy_from_query(sql, output=take, timeout=60))

    async def server_waits_for_client() -> bool:
        sql = "SELECT wait_event FROM pg_stat_activity WHERE query LIKE 'COPY%' AND pid <> pg_backend_pid()"
        return bool(await admin.fetchval(sql) == "ClientWrite")

    await wait_until(server_waits_for_client)
    assert resident_kb() - before < 20_000  # of 200 MB
    read_on.set()
    await query
    assert received == 200_000_000
    await connection.close()
    await admin.close()


async def test_too_many_connections(backend: Backend) -> None:
    async with proxy_bench(backend, max_connections=2) as bench:
        connections = [await bench.connect(), await bench.connect()]
        with pytest.raises(asyncpg.TooManyConnectionsError, match="proxy"):
            await bench.connect()
        await connections.pop().close()

        async def again() -> bool:
            try:
                connections.append(await bench.connect())
            except asyncpg.TooManyConnectionsError:
                return False
            return True

        await wait_until(again)
        for each in connections:
            await each.close()


async def test_too_many_connections_to_one_endpoint(backend: Backend) -> None:
    async with proxy_bench(backend, max_endpoint_connections=2) as bench:
        connections = [await bench.connect(), await bench.connect()]
        with pytest.raises(asyncpg.TooManyConnectionsError, match="to this endpoint"):
            await bench.connect()
        # Others have places of their own; those that wait for a start have one, too.
        other = EndpointId.new()
        bench.manager.targets[other] = bench.manager.targets[bench.endpoint_id].model_copy(
            update={"endpoint_id": other}
        )
        bench.manager.delay_s = 1.0
        options = {"server_settings": {"options": f"endpoint={other}"}}
        waiting = [asyncio.create_task(bench.connect(**options)) for _ in range(3)]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        refused = [each for each in results if isinstance(each, asyncpg.TooManyConnectionsError)]
        assert len(refused) == 1
        connections += [each for each in results if each is not refused[0]]
        # A compute has as many as its size allows, also when all of them have waited for it.
        small = EndpointId.new()
        bench.manager.targets[small] = bench.manager.targets[bench.endpoint_id].model_copy(
            update={"endpoint_id": small, "instance_id": InstanceId.new(), "max_sessions": 1}
        )
        options = {"server_settings": {"options": f"endpoint={small}"}}
        waiting = [asyncio.create_task(bench.connect(**options)) for _ in range(2)]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert sum(isinstance(each, asyncpg.TooManyConnectionsError) for each in results) == 1
        [served] = [each for each in results if not isinstance(each, BaseException)]
        await served.close()

        async def there_is_a_place() -> Any:
            with contextlib.suppress(asyncpg.TooManyConnectionsError):
                return await bench.connect(**options)

        connections.append(await wait_until(there_is_a_place))
        for each in connections:
            await each.close()


async def test_ipv6_and_ipv4_and_who_connects_in_the_log(backend: Backend) -> None:
    async with proxy_bench(
        backend,
        postgres_listen={"host": "::", "port": (port := free_port())},
        allow_plaintext_loopback=True,
        log_connections=True,
    ) as bench:
        bench.port = port
        for host in ("::1", "127.0.0.1"):
            for tls in (None, ssl_of_anybody()):
                connection = await bench.connect(host=host, ssl=tls)
                assert await connection.fetchval("SELECT 1") == 1
                await connection.close()
        await wait_until(lambda: bench.log.count('"session over"') == 4)
        assert '"client": "[::1]:' in bench.log
        assert '"client": "127.0.0.1:' in bench.log


def ssl_of_anybody() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def test_a_load_balancer_says_whom_it_speaks_for(backend: Backend) -> None:
    async with proxy_bench(
        backend, proxy_protocol_from=["127.0.0.1/32"], allow_plaintext_loopback=True, log_connections=True
    ) as bench:
        body = f"\0\3\0\0user\0postgres\0options\0endpoint={bench.endpoint_id}\0\0".encode()
        startup = struct.pack(">I", len(body) + 4) + body

        async def say(data: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
            try:
                writer.write(data)
                async with asyncio.timeout(10):
                    return await reader.read(400)
            finally:
                writer.close()

        local = b"PROXY UNKNOWN\r\n"
        far = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 5432\r\n"
        far6 = SIGNATURE + struct.pack(">BBH", 0x21, 0x21, 36) + bytes(15) + b"\2" + bytes(16) + b"\x10\0\x15\x38"
        assert (await say(local + startup))[:1] == b"R"  # asked for a password
        for header in (far, far6):
            assert b"only takes TLS" in await say(header + startup)
            assert await say(header + SSL_REQUEST) == b"S"
        # Not without, nor with half of one, nor with two.
        for wrong in (
            startup,
            SSL_REQUEST,
            b"PROXY TCP4 192.0.2.7\r\n" + startup,
            local + far + startup,
            SIGNATURE + startup,
        ):
            answer = await say(wrong)
            assert answer == b"" or b"08P01" in answer, answer
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(far + SSL_REQUEST)
        assert await reader.readexactly(1) == b"S"
        await writer.start_tls(bench.tls(), server_hostname="localhost")
        writer.write(startup)
        assert (await reader.read(1)) == b"R"
        writer.close()
        await wait_until(lambda: '"client": "192.0.2.7:56324"' in bench.log)
    async with proxy_bench(backend, allow_plaintext_loopback=True) as bench:
        # From anybody else it is not taken: a client cannot say who it is.
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(far + startup)
        with contextlib.suppress(ConnectionResetError):  # for what it did not want to read
            assert await reader.read(1) in (b"", b"E")
        writer.close()


def test_tls_1_1_is_refused(backend: Backend) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    import tempfile
    from pathlib import Path

    from compute.proxy.greeting import FrontTls
    from shared.tls import CertificateAuthority

    with tempfile.TemporaryDirectory() as directory:
        files = CertificateAuthority().issue_files(Path(directory), "front", ["localhost"])
        context = FrontTls(files).context
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
