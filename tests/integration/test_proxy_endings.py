"""How sessions end: revocation, vanished computes, cancelled waits for the quorum, hostile clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import signal
import ssl
import struct
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest

from compute.guard.build import prepare_guard
from shared.api.keymanager import KeyState, Role
from shared.api.safekeeper import ComputeAddress
from shared.errors import RevokedError
from shared.ids import EndpointId
from tests.fixtures.proxy import Backend, ProxyBench, proxy_bench, running_backend, start_backend
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


class Raw:
    """A client that shows every message."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def begin(cls, bench: ProxyBench) -> Raw:
        """Up to AuthenticationSASL."""
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(SSL_REQUEST)
        assert await reader.readexactly(1) == b"S"
        await writer.start_tls(bench.tls(), server_hostname="localhost")
        raw = cls(reader, writer)
        parameters = {"user": "postgres", "database": "postgres", "options": f"endpoint={bench.endpoint_id}"}
        body = b"\0\3\0\0" + b"".join(f"{k}\0{v}\0".encode() for k, v in parameters.items()) + b"\0"
        writer.write(struct.pack(">I", len(body) + 4) + body)
        assert (await raw.receive())[0] == b"R"
        return raw

    @classmethod
    async def log_in(cls, bench: ProxyBench) -> Raw:
        from shared.wire.pgauth import SASLInitialResponse, SASLResponse
        from shared.wire.scram import ScramClient

        raw, scram = await cls.begin(bench), ScramClient("pw", secrets.token_urlsafe(18))
        writer = raw.writer
        writer.write(SASLInitialResponse("SCRAM-SHA-256", scram.first()).serialize())
        writer.write(SASLResponse(scram.final((await raw.receive())[1][4:])).serialize())
        while (await raw.receive())[0] != b"Z":
            pass
        return raw

    async def receive(self) -> tuple[bytes, bytes]:
        header = await self.reader.readexactly(5)
        (length,) = struct.unpack(">I", header[1:])
        return header[:1], await self.reader.readexactly(length - 4)

    def query(self, sql: str) -> None:
        self.writer.write(b"Q" + struct.pack(">I", len(sql) + 5) + sql.encode() + b"\0")

    async def rest(self) -> list[tuple[bytes, bytes]]:
        """All messages until the connection ends. Raises if it ends in the middle of one."""
        messages = []
        async with asyncio.timeout(20):
            while not (self.reader.at_eof()):
                kind = await self.reader.read(1)
                if not kind:
                    break
                length = int.from_bytes(await self.reader.readexactly(4), "big")
                messages.append((kind, await self.reader.readexactly(length - 4)))
        self.writer.close()
        return messages


def fields(payload: bytes) -> dict[str, str]:
    return {field[:1].decode(): field[1:].decode() for field in payload.split(b"\0") if field}


@pytest.mark.parametrize(
    ("state", "sqlstate"), [(KeyState.REVOKED, "KL003"), (KeyState.SUSPENDED, "KL002"), (KeyState.SHREDDED, "KL004")]
)
async def test_revocation_ends_every_session_with_one_clear_error(
    bench: ProxyBench, state: KeyState, sqlstate: str
) -> None:
    idle, in_transaction, busy, streaming = [await Raw.log_in(bench) for _ in range(4)]
    in_transaction.query("BEGIN")
    while (await in_transaction.receive())[0] != b"Z":
        pass
    busy.query("SELECT pg_sleep(60)")
    streaming.query("SELECT repeat('x', 500) FROM generate_series(1, 10000000)")
    assert (await streaming.receive())[0] == b"T"
    began = asyncio.get_running_loop().time()
    await bench.leases.revoke(bench.project_id, state, "KMS: DisabledException")
    # Rows that it has not made room for stay in the proxy, if there are any, and so does the error behind them.
    with contextlib.suppress(asyncio.IncompleteReadError, OSError):
        *before, last = [kind for kind, _ in await streaming.rest()]
        assert set(before) == {b"D"}
        assert last in (b"D", b"E")
    for session in (idle, in_transaction, busy):
        messages = await session.rest()
        errors = [payload for kind, payload in messages if kind == b"E"]
        assert len(errors) == 1
        assert messages[-1][0] == b"E"
        error = fields(errors[0])
        assert (error["S"], error["C"]) == ("FATAL", sqlstate)
        assert "KMS: DisabledException" in error["M"]
        assert str(bench.leases.workspace_id) in error["D"]
        assert error["H"]
        assert ("COMMIT that was under way" in error["D"]) is (session is not idle)
    assert asyncio.get_running_loop().time() - began < 5
    await wait_until(lambda: Role.PROXY in bench.leases.acknowledged)

    # New sessions get the same, at once; also where the manager is not asked any more.
    with pytest.raises(asyncpg.PostgresError) as caught:
        await bench.connect()
    assert caught.value.sqlstate == sqlstate
    if state is not KeyState.SHREDDED:
        await bench.leases.restore(bench.project_id)

        async def works() -> bool:
            try:
                connection = await bench.connect()
            except asyncpg.PostgresError:
                return False
            await connection.close()
            return True

        await wait_until(works)


async def test_a_client_that_does_not_read_does_not_hold_up_a_revocation(bench: ProxyBench) -> None:
    stuck = await Raw.log_in(bench)
    stuck.query("SELECT repeat('x', 1000) FROM generate_series(1, 1000000)")
    transport = stuck.writer.transport
    assert isinstance(transport, asyncio.Transport)
    transport.pause_reading()
    await bench.leases.revoke(bench.project_id)
    await wait_until(lambda: Role.PROXY in bench.leases.acknowledged, timeout_s=5)
    stuck.writer.transport.abort()


async def test_a_partitioned_proxy_stops_by_itself(backend: Backend) -> None:
    async with proxy_bench(backend) as bench:
        bench.leases.ttl_s = 1.0
        session = await Raw.log_in(bench)
        bench.leases.ttl_s = 1.0
        await bench.leases.partition()
        messages = await session.rest()
        assert fields(messages[-1][1])["C"] == "KL001"


async def test_a_paused_proxy_passes_nothing_on_after_its_lease(backend: Backend) -> None:
    """Stopped for longer than its lease, it wakes up with rows in its socket: they may not go out."""
    async with proxy_bench(backend) as bench:
        bench.leases.ttl_s = 1.0
        session = await Raw.log_in(bench)
        session.query("SELECT pg_sleep(1), 'canary'")
        await asyncio.sleep(0.3)
        os.kill(bench.process.pid, signal.SIGSTOP)
        try:
            await bench.leases.partition()
            await asyncio.sleep(2.5)
        finally:
            os.kill(bench.process.pid, signal.SIGCONT)
        messages = await session.rest()
        assert not any(b"canary" in payload for kind, payload in messages if kind == b"D")
        assert fields(messages[-1][1])["C"] == "KL001"


async def test_a_refusal_by_the_manager_has_its_sqlstate(bench: ProxyBench) -> None:
    bench.manager.error = RevokedError("the customer's key is revoked: KMS: disabled")
    with pytest.raises(asyncpg.PostgresError, match="KMS: disabled") as caught:
        await bench.connect()
    assert caught.value.sqlstate == "KL003"
    assert caught.value.hint


async def test_a_compute_that_vanishes_is_said_so_and_its_successor_is_found() -> None:
    with contextlib.ExitStack() as stack:
        backend = await asyncio.to_thread(stack.enter_context, running_backend())
        async with proxy_bench(backend) as bench:
            idle, busy, halfway = await Raw.log_in(bench), await Raw.log_in(bench), await Raw.begin(bench)
            busy.query("SELECT pg_sleep(60)")
            await asyncio.sleep(0.2)
            # Without a word: backends that see that the postmaster is gone say so, and it tells them of each other.
            os.kill(backend.process.pid, signal.SIGSTOP)
            for pid in [*_children(backend.process.pid), backend.process.pid]:
                os.kill(pid, signal.SIGKILL)
            backend.process.wait()
            for session in (idle, busy):
                messages = await session.rest()
                assert fields(messages[-1][1])["C"] == "57P01"
            told = fields((await halfway.rest())[-1][1])
            assert (told["C"], told["M"]) == ("57P03", "the compute has stopped during log-in")
            # Nobody there: clear words, soon.
            with pytest.raises(asyncpg.CannotConnectNowError, match="cannot be reached"):
                await bench.connect()
            (backend.directory / "pgdata" / "postmaster.pid").unlink()
            backend.process = (await asyncio.to_thread(start_backend, backend.directory)).process
            bench.point_at(backend.compute)
            connection = await bench.connect()
            assert await connection.fetchval("SELECT 1") == 1
            await connection.close()


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return list(map(int, file.read().split()))


async def test_a_stale_address_is_asked_for_again(bench: ProxyBench) -> None:
    connection = await bench.connect()
    await connection.close()
    bench.point_at(ComputeAddress(host="/nowhere", port=5432))
    calls = bench.manager.calls
    connection = await bench.connect()  # the old one is still remembered, and works
    await connection.close()
    assert bench.manager.calls == calls
    async with proxy_bench(bench.backend) as other:
        other.point_at(ComputeAddress(host="/nowhere", port=5432))
        with pytest.raises(asyncpg.CannotConnectNowError):
            await other.connect()
        assert other.manager.calls == 3
        other.point_at(other.backend.compute)
        connection = await other.connect()
        await connection.close()


async def test_the_proxys_own_shutdown_is_announced(backend: Backend) -> None:
    async with proxy_bench(backend) as bench:
        session = await Raw.log_in(bench)
        bench.process.terminate()
        error = fields((await session.rest())[-1][1])
        assert error["C"] == "57P01"
        assert "proxy" in error["M"]
        assert await asyncio.to_thread(bench.process.wait, 10) == 0


async def test_a_shutdown_lets_transactions_finish_and_takes_nobody_new(backend: Backend) -> None:
    async with proxy_bench(backend, shutdown_grace_s=20) as bench:
        idle, working = await Raw.log_in(bench), await Raw.log_in(bench)
        for sql in ("BEGIN", "SELECT 1"):
            working.query(sql)
            while (await working.receive())[0] != b"Z":
                pass
        bench.manager.targets.clear()
        bench.manager.delay_s = 30.0
        other = EndpointId.new()
        waits = asyncio.create_task(bench.connect(server_settings={"options": f"endpoint={other}"}))
        await wait_until(lambda: bench.manager.calls == 2)
        bench.process.terminate()

        error = fields((await idle.rest())[-1][1])
        assert (error["C"], error.get("D")) == ("57P01", None)
        for refused in (waits, asyncio.create_task(bench.connect())):
            with pytest.raises(asyncpg.CannotConnectNowError, match="proxy is shutting down"):
                await refused
        working.query("SELECT 'still here'")
        assert (await working.receive())[0] == b"T"
        while (await working.receive())[0] != b"Z":
            pass
        assert bench.process.poll() is None
        working.query("COMMIT")
        assert [kind for kind, _ in await working.rest()] == [b"C", b"Z", b"E"]
        assert await asyncio.to_thread(bench.process.wait, 10) == 0


async def test_a_shutdown_does_not_wait_for_ever(backend: Backend) -> None:
    async with proxy_bench(backend, shutdown_grace_s=0.2) as bench:
        session = await Raw.log_in(bench)
        session.query("SELECT pg_sleep(60)")
        bench.process.terminate()
        error = fields((await session.rest())[-1][1])
        assert error["C"] == "57P01"
        assert "not known" in error["D"]
        assert await asyncio.to_thread(bench.process.wait, 10) == 0


# --- the wait for the quorum ---


@pytest.fixture(scope="module")
def waiting_backend() -> Iterator[Backend]:
    """A primary, guarded as a compute is."""
    guard = f"shared_preload_libraries={asyncio.run(prepare_guard())}"
    with running_backend("wal_level=replica", guard) as running:
        yield running


async def _need(admin: Any, standbys: str) -> None:
    """Whose acknowledgements commits wait for: nobody's, or those of one that does not exist."""
    await admin.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{standbys}'")
    await admin.execute("SELECT pg_reload_conf()")

    async def known() -> bool:
        return bool(await admin.fetchval("SHOW synchronous_standby_names") == standbys)

    await wait_until(known)


async def _waiting_pid(admin: Any) -> int:
    async def waits() -> int | None:
        pid: int | None = await admin.fetchval("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        return pid

    pid = await wait_until(waits)
    assert isinstance(pid, int)
    return pid


@pytest.mark.parametrize("how", ["cancel", "terminate", "quiet", "extended"])
async def test_a_cancelled_wait_for_the_quorum_never_looks_like_a_commit(waiting_backend: Backend, how: str) -> None:
    async with proxy_bench(waiting_backend) as bench:
        admin = await waiting_backend.admin()
        await admin.execute("SET synchronous_commit = local")
        await admin.execute("DROP TABLE IF EXISTS t")
        await admin.execute("CREATE TABLE t (a int)")
        await _need(admin, "ANY 1 (nobody)")
        if how == "extended":
            connection = await bench.connect()
            statement = await connection.prepare("INSERT INTO t VALUES ($1)")
            running = asyncio.create_task(statement.fetch(1))
            await admin.execute("SELECT pg_cancel_backend($1)", await _waiting_pid(admin))
            # asyncpg wraps whatever ends a connection in the middle of a query into an error of its own (08003).
            with pytest.raises(asyncpg.PostgresError, match="transaction resolution unknown"):
                await running
            assert connection.is_closed()
        else:
            session = await Raw.log_in(bench)
            if how == "quiet":
                # Postgres would not even send its warning then, and report success.
                session.query("SET client_min_messages = error")
                while (await session.receive())[0] != b"Z":
                    pass
            session.query("INSERT INTO t VALUES (1)")
            function = "pg_terminate_backend" if how == "terminate" else "pg_cancel_backend"
            await admin.execute(f"SELECT {function}($1)", await _waiting_pid(admin))
            messages = await session.rest()
            assert [kind for kind, _ in messages if kind in (b"C", b"Z")] == []
            error = fields(messages[-1][1])
            assert (error["S"], error["C"]) == ("FATAL", "08007")
            assert "when a quorum holds it" in error["D"]
            assert messages[-2][0] == b"N"  # Postgres's own warning comes before it
        # Its record is in the local log: that is the whole problem. What would be gone with the compute, nobody sees.
        await _waiting_pid(admin)
        reader = await bench.connect()
        for session in (reader, admin):
            assert await session.fetchval("SELECT count(*) FROM t") == 0
        await _need(admin, "")

        async def seen() -> bool:
            return bool(await reader.fetchval("SELECT count(*) FROM t") == 1)

        await wait_until(seen)
        await reader.close()
        await admin.close()


async def test_other_warnings_pass(bench: ProxyBench) -> None:
    notices: list[str] = []
    connection = await bench.connect()
    connection.add_log_listener(lambda _, message: notices.append(message.message))
    await connection.execute("DO $$ BEGIN RAISE WARNING 'synchronous replication is nice'; END $$")
    await wait_until(lambda: notices)
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


# --- hostile clients ---


async def _say(bench: ProxyBench, data: bytes, timeout_s: float = 5.0) -> bytes:
    """What comes back until the other end closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
    try:
        writer.write(data)
        async with asyncio.timeout(timeout_s):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_impossible_lengths_are_refused_from_the_length(bench: ProxyBench) -> None:
    for length in (0, 1, 7, 10_005, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1):
        assert await _say(bench, struct.pack(">I", length) + b"\0\3\0\0") == b""
    # The same inside of TLS, where the refusal can be said in words.
    for length in (0, 7, 10_005, (1 << 31) - 1):
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(SSL_REQUEST)
        assert await reader.readexactly(1) == b"S"
        await writer.start_tls(bench.tls(), server_hostname="localhost")
        writer.write(struct.pack(">I", length) + b"\0\3\0\0")
        async with asyncio.timeout(5):
            assert b"invalid length of startup packet" in await reader.read()
        writer.close()


async def test_bytes_slipped_in_behind_the_sslrequest_get_nowhere(bench: ProxyBench) -> None:
    """CVE-2021-23214: what comes before TLS must not count as said inside of it."""
    body = b"\0\3\0\0user\0mallory\0\0"
    stuffed = SSL_REQUEST + struct.pack(">I", len(body) + 4) + body
    answer = await _say(bench, stuffed)
    assert answer[:1] == b"S"
    assert b"R" not in answer[1:2]
    reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
    writer.write(stuffed)
    assert await reader.readexactly(1) == b"S"
    with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
        await writer.start_tls(bench.tls(), server_hostname="localhost")
    writer.close()


async def test_garbage_and_half_sentences(bench: ProxyBench) -> None:
    rng = random.Random(20261122)
    for _ in range(150):
        kind = rng.randrange(4)
        if kind == 0:
            data = rng.randbytes(rng.randrange(1, 300))
        elif kind == 1:
            data = struct.pack(">I", rng.randrange(8, 200)) + rng.randbytes(rng.randrange(0, 300))
        elif kind == 2:
            data = SSL_REQUEST + rng.randbytes(rng.randrange(0, 300))
        else:
            data = struct.pack(">II", rng.randrange(8, 40), 80877100 + rng.randrange(8)) + rng.randbytes(32)
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        with contextlib.suppress(OSError):  # refused already
            writer.write(data)
            writer.write_eof()
            async with asyncio.timeout(5):
                await reader.read()
        writer.close()
    connection = await bench.connect()
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


async def test_one_address_does_not_take_all_places(backend: Backend) -> None:
    """Without a setting for it: of ten places one address has one, and says nothing there for as long as it may."""
    async with proxy_bench(backend, max_handshakes=10, max_waiting_handshakes=20) as bench:

        async def open_one() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return await asyncio.open_connection("127.0.0.1", bench.port, local_addr=("127.0.0.2", 0))

        silent = [await open_one() for _ in range(25)]
        async with asyncio.timeout(5):
            words = await asyncio.gather(*(reader.read() for reader, _ in silent[21:]))
            assert all(b"53000" in each for each in words), "those that are too many are told so"
            # Others wait for none of them: they have places, and if not, they are the next.
            others = await asyncio.gather(*(bench.connect() for _ in range(8)))
        await asyncio.gather(*(each.close() for each in others))
        for _, writer in silent:
            writer.close()
        reader, writer = await open_one()
        writer.write(SSL_REQUEST)
        async with asyncio.timeout(5):
            assert await reader.readexactly(1) == b"S", "its places are given back"
        writer.close()


async def test_the_slow_are_dropped(backend: Backend) -> None:
    async with proxy_bench(backend, startup_timeout_s=1.0, auth_timeout_s=1.0, max_handshakes=3) as bench:
        began = asyncio.get_running_loop().time()
        slow = [await asyncio.open_connection("127.0.0.1", bench.port) for _ in range(3)]
        slow[1][1].write(SSL_REQUEST[:5])
        slow[2][1].write(SSL_REQUEST)
        # All places are taken: the next one waits until they have lost theirs.
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(SSL_REQUEST)
        async with asyncio.timeout(5):
            assert await reader.readexactly(1) == b"S"
            assert asyncio.get_running_loop().time() - began > 0.9
            for slow_reader, slow_writer in slow:
                assert await slow_reader.read() in (b"", b"S")
                slow_writer.close()
        # It starts to log in and then says nothing.
        await writer.start_tls(bench.tls(), server_hostname="localhost")
        body = f"\0\3\0\0user\0postgres\0options\0endpoint={bench.endpoint_id}\0\0".encode()
        writer.write(struct.pack(">I", len(body) + 4) + body)
        async with asyncio.timeout(5):
            assert b"logging in took too long" in await reader.read()
        writer.close()
        connection = await bench.connect()
        await connection.close()
