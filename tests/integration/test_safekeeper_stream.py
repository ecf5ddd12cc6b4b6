"""Safekeeper processes as synchronous standbys of a real PostgreSQL: commits, crashes, fencing, keys."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import signal
import ssl
from collections.abc import AsyncIterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from shared.api.safekeeper import ComputeAddress, VoteRequest
from shared.errors import (
    ConflictError,
    InvalidInputError,
    KeyAccessError,
    KeylakeError,
    NotFoundError,
    PermissionDeniedError,
    RevokedError,
)
from shared.ids import ProjectId, TimelineId
from shared.lsn import Lsn
from shared.tls import CertificateAuthority, server_context
from shared.wire.walstream import STATUS, Feedback, Status, SubscribeFlags
from tests.fixtures.safekeeper_postgres import Primary, primary_postgres
from tests.fixtures.safekeeper_process import (
    SafekeeperClient,
    SafekeeperProcess,
    elect,
    safekeeper_processes,
    timeline_clients,
)
from tests.fixtures.waiting import wait_until

pytestmark = pytest.mark.integration


class Setup:
    """A primary with a table, and a timeline in term 1 that streams from it to all safekeepers."""

    def __init__(
        self, primary: Primary, processes: list[SafekeeperProcess], clients: list[SafekeeperClient], start: Lsn
    ) -> None:
        self.primary = primary
        self.processes = processes
        self.clients = clients
        self.start = start

    @property
    def names(self) -> list[str]:
        return [process.node_id for process in self.processes]

    async def stream(self, client: SafekeeperClient, term: int = 1) -> None:
        await client.stream(term, self.start, self.primary.address)

    async def check_copies(self, end: int | None = None) -> None:
        """Every safekeeper gets to the end of the primary's WAL, and holds exactly its bytes."""
        end = (await self.primary.flush_lsn()).value if end is None else end
        expected = self.primary.wal(self.start.value, end)
        for client in self.clients:
            await wait_until(partial(reaches, client, end), 30)
            assert await client.read(self.start.value, end) == expected


async def reaches(client: SafekeeperClient, lsn: int) -> bool:
    return (await client.status()).flush_lsn.value >= lsn


async def is_held_back(client: SafekeeperClient) -> bool:
    return (await client.status()).held_back_size_bytes > 0


async def is_streaming(client: SafekeeperClient) -> bool:
    return (await client.status()).streaming


@contextlib.asynccontextmanager
async def streaming_setup(directory: Path, count: int = 3) -> AsyncIterator[Setup]:
    async with primary_postgres() as primary, safekeeper_processes(directory, count) as processes:
        await primary.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        start = await primary.insert_lsn()
        async with timeline_clients(processes, primary.system_identifier, start.value) as clients:
            assert await elect(clients, 1, of=count) == start
            setup = Setup(primary, processes, clients, start)
            for client in clients:
                await setup.stream(client)
            for client in clients:
                await wait_until(partial(is_streaming, client))
            await primary.require_quorum(setup.names)
            yield setup


async def test_every_copy_equals_the_primarys_wal(tmp_path: Path) -> None:
    async with streaming_setup(tmp_path) as setup:
        await setup.primary.execute("INSERT INTO t SELECT i, repeat('x', 500) FROM generate_series(1, 50000) i")
        await setup.primary.execute("SELECT pg_switch_wal()")
        await setup.primary.execute("UPDATE t SET v = 'y' WHERE id % 7 = 0")
        end = (await setup.primary.flush_lsn()).value
        assert end - setup.start.value > 30_000_000
        await setup.check_copies(end)
        ends = {str(await client.end_of_wal()) for client in setup.clients}
        assert len(ends) == 1
        canary = b"x" * 100
        for process in setup.processes:
            for path in process.data_dir.rglob("*"):
                assert not path.is_file() or canary not in path.read_bytes()


async def test_survives_kill_9_again_and_again(tmp_path: Path) -> None:
    """One safekeeper after the other dies in the middle of the load; commits go on, and all copies end up equal."""
    rng = random.Random(random.getrandbits(64))
    async with streaming_setup(tmp_path) as setup:
        stop = asyncio.Event()
        done = [0, 0, 0, 0]

        async def load(worker: int) -> None:
            connection = await setup.primary.connect()
            try:
                while not stop.is_set():
                    key = worker * 1_000_000 + done[worker]
                    await connection.execute("INSERT INTO t VALUES ($1, $2)", key, "v" * rng.randrange(1, 3000))
                    done[worker] += 1
            finally:
                await connection.close()

        async def more_commits(target: int) -> None:
            await wait_until(lambda: sum(done) > target)

        loads = [asyncio.create_task(load(worker)) for worker in range(4)]
        for _ in range(6):
            victim = rng.randrange(3)
            await more_commits(sum(done) + 100)
            setup.processes[victim].kill()
            await more_commits(sum(done) + 100)
            await setup.processes[victim].start()
            await wait_until(partial(restarted, setup, setup.clients[victim]))
        stop.set()
        await asyncio.gather(*loads)
        await setup.check_copies()


async def restarted(setup: Setup, client: SafekeeperClient) -> bool:
    """The compute manager's part: tell it again to stream."""
    try:
        await setup.stream(client)
    except KeylakeError as error:
        if not error.retryable:
            raise
        return False
    return await is_streaming(client)


async def test_a_vote_fences_the_old_compute(tmp_path: Path) -> None:
    """Once a majority has voted, no commit of the old primary is acknowledged, whatever it tries."""
    async with streaming_setup(tmp_path) as setup:
        await setup.primary.execute("INSERT INTO t VALUES (1, 'before')")
        votes = [await client.vote(2) for client in setup.clients[:2]]
        assert all(vote.granted for vote in votes)
        flushed = [vote.flush_lsn for vote in votes]
        connection = await setup.primary.connect()
        try:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(connection.execute("INSERT INTO t VALUES (2, 'after')"), 1.5)
        finally:
            connection.terminate()
        for client, lsn in zip(setup.clients[:2], flushed, strict=True):
            with pytest.raises(ConflictError):
                await setup.stream(client)
            with pytest.raises(ConflictError):  # the new term has no leader yet
                await setup.stream(client, term=2)
            status = await client.status()
            assert (status.flush_lsn, status.streaming, status.term) == (lsn, False, 2)
        rows = await setup.primary.value("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'quorum'")
        assert rows == 1
        assert not (await setup.clients[0].vote(2)).granted
        assert not (await setup.clients[0].vote(1)).granted


async def test_an_acknowledged_commit_is_in_every_quorum(tmp_path: Path) -> None:
    """Votes under full load: the position that a majority reports covers every commit that a client saw."""
    async with streaming_setup(tmp_path) as setup:
        seen: list[int] = []

        async def load(worker: int) -> None:
            connection = await setup.primary.connect()
            try:
                for number in range(100_000):
                    await connection.execute("INSERT INTO t VALUES ($1, 'v')", worker * 1_000_000 + number)
                    # Not `insert_lsn` of others: what this session's commit needed at most.
                    seen.append(await connection.fetchval("SELECT pg_current_wal_flush_lsn()"))
            finally:
                connection.terminate()

        loads = [asyncio.create_task(load(worker)) for worker in range(4)]
        await wait_until(lambda: len(seen) > 200)
        votes = await asyncio.gather(*(client.vote(2) for client in setup.clients[1:]))
        committed = len(seen)
        await asyncio.sleep(0.5)
        for task in loads:
            task.cancel()
        await asyncio.gather(*loads, return_exceptions=True)
        # A commit may have been acknowledged just before the second vote and be seen just after; none later.
        assert len(seen) - committed <= 4
        best = max(vote.flush_lsn.value for vote in votes)
        end = (await setup.clients[1].end_of_wal()).end_lsn.value
        assert end <= votes[0].flush_lsn.value + 7
        expected = setup.primary.wal(setup.start.value, best)
        for client, vote in zip(setup.clients[1:], votes, strict=True):
            mine = await client.read(setup.start.value, vote.flush_lsn.value)
            assert mine == expected[: len(mine)]


async def test_a_lagging_safekeeper_copies_from_the_donor(tmp_path: Path) -> None:
    async with streaming_setup(tmp_path) as setup:
        setup.processes[2].kill()
        await setup.primary.execute("INSERT INTO t SELECT i, repeat('z', 800) FROM generate_series(1, 25000) i")
        await setup.processes[2].start()
        lag = await setup.clients[2].status()
        start = await elect(setup.clients, 2)
        assert start.value - lag.flush_lsn.value > 16_000_000
        expected = setup.primary.wal(setup.start.value, start.value)
        for client in setup.clients:
            status = await client.status()
            assert (status.flush_lsn, status.last_log_term, status.term) == (start, 2, 2)
            assert [entry.term for entry in status.term_history] == [1, 2]
            assert await client.read(setup.start.value, start.value) == expected


async def test_the_wal_port_follows_reports_and_takes_feedback(tmp_path: Path) -> None:
    async with streaming_setup(tmp_path) as setup:
        client = setup.clients[0]
        follower = await client.subscribe(setup.start.value, 0)
        watcher = await client.subscribe(setup.start.value, 0, SubscribeFlags.STATUS_ONLY)
        got = bytearray()
        statuses: list[Status] = []

        async def follow() -> None:
            while frames := await follower.receive():
                for kind, payload in frames:
                    if kind == STATUS:
                        statuses.append(Status.parse(payload))
                    else:
                        assert int.from_bytes(payload[:8], "big") == setup.start.value + len(got)
                        got.extend(payload[8:])

        watched: list[Status] = []

        async def watch() -> None:
            while frames := await watcher.receive():
                watched.extend(Status.parse(payload) for kind, payload in frames if kind == STATUS)

        tasks = [asyncio.create_task(follow()), asyncio.create_task(watch())]
        for _ in range(50):
            await setup.primary.execute("INSERT INTO t SELECT count(*), 'v' FROM t")
        end = (await setup.primary.flush_lsn()).value
        await wait_until(lambda: setup.start.value + len(got) >= end)
        assert bytes(got[: end - setup.start.value]) == setup.primary.wal(setup.start.value, end)
        await wait_until(lambda: watched[-1].flush_lsn >= end)
        assert all(a.flush_lsn <= b.flush_lsn for a, b in pairwise(watched))

        await watcher.send(Feedback(end - 10, 0).pack())
        await wait_until(lambda: watched[-1].commit_lsn == end - 10)
        await watcher.send(Feedback(setup.start.value, 0).pack())  # never back
        await watcher.send(Feedback(end + (1 << 30), 0).pack())  # never beyond the log
        await wait_until(lambda: watched[-1].commit_lsn > end - 10)
        assert watched[-1].commit_lsn <= (await client.status()).flush_lsn.value

        await client.vote(2)  # ends both
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        await follower.close()
        await watcher.close()

        setup.processes[0].stop()  # commit_lsn survives
        await setup.processes[0].start()
        assert (await client.status()).commit_lsn.value == watched[-1].commit_lsn


async def test_commits_wait_for_a_pageserver_that_lags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bulk load is received and flushed at once, and acknowledged as the pageserver comes after it; nothing fails."""
    monkeypatch.setenv("KEYLAKE_SAFEKEEPER_BACKPRESSURE_LAG_MB", "1")
    limit = 1 << 20
    async with streaming_setup(tmp_path, count=1) as setup:
        await setup.primary.require_quorum(setup.names, quorum=1)
        [client] = setup.clients
        pageserver = await client.subscribe(setup.start.value, 0, SubscribeFlags.STATUS_ONLY)
        ingested = setup.start.value
        await pageserver.send(Feedback(ingested, 0, ingested).pack())
        await setup.primary.execute("INSERT INTO t VALUES (0, 'fits')")
        load = asyncio.create_task(
            setup.primary.execute("INSERT INTO t SELECT i, repeat('x', 500) FROM generate_series(1, 8000) i")
        )
        await wait_until(lambda: ahead(setup, 4 * limit))
        end = (await setup.primary.flush_lsn()).value
        await wait_until(partial(reaches, client, end))  # durable: what waits is the acknowledgement
        acknowledged = "SELECT flush_lsn FROM pg_stat_replication"
        while ingested + limit < end:
            assert not load.done()
            ingested += limit // 2
            await pageserver.send(Feedback(ingested, 0, ingested).pack())
            want = min(ingested + limit, end)
            await wait_until(partial(at_least, setup, acknowledged, want))
            assert load.done() or Lsn(await setup.primary.value(acknowledged)).value <= ingested + limit
        await load
        assert await setup.primary.value("SELECT count(*) FROM t") == 8001
        # One that is away is waited for, too, also by a safekeeper that starts and has not heard of it yet.
        await pageserver.close()
        [process] = setup.processes
        process.stop()
        await process.start()
        await setup.stream(client)
        late = asyncio.create_task(setup.primary.execute("INSERT INTO t VALUES (8001, 'late')"))
        await wait_until(partial(is_held_back, client))
        assert not late.done()
        pageserver = await client.subscribe(setup.start.value, 0, SubscribeFlags.STATUS_ONLY)
        ingested = (await client.status()).flush_lsn.value
        await pageserver.send(Feedback(ingested, 0, ingested).pack())
        await late
        assert (await client.status()).held_back_size_bytes == 0
        await pageserver.close()


async def ahead(setup: Setup, size_bytes: int) -> bool:
    return (await setup.primary.flush_lsn()).value > setup.start.value + size_bytes


async def at_least(setup: Setup, query: str, lsn: int) -> bool:
    return Lsn(await setup.primary.value(query)).value >= lsn


async def test_without_keys_nothing_is_acknowledged_served_or_lost(tmp_path: Path) -> None:
    async with streaming_setup(tmp_path, count=1) as setup:
        await setup.primary.require_quorum(setup.names, quorum=1)
        [process], [client] = setup.processes, setup.clients
        await setup.primary.execute("INSERT INTO t VALUES (1, 'before')")
        follower = await client.subscribe(setup.start.value, 0)
        process.signal(signal.SIGUSR1)

        async def ended() -> bool:
            return not (await client.status()).streaming

        await wait_until(ended)
        with contextlib.suppress(KeylakeError):
            while await asyncio.wait_for(follower.receive(), 10):
                pass
        await follower.close()
        connection = await setup.primary.connect()
        pending = asyncio.create_task(connection.execute("INSERT INTO t VALUES (2, 'while revoked')"))
        await asyncio.sleep(0.7)
        assert not pending.done()
        with pytest.raises(RevokedError):
            await client.read(setup.start.value, setup.start.value + 10)
        with pytest.raises(RevokedError):
            await setup.stream(client)
        assert (await client.vote(1)).granted is False, "a vote needs no key once the log is verified"

        process.signal(signal.SIGUSR2)

        async def again() -> bool:
            try:
                await setup.stream(client)
            except KeyAccessError:
                return False
            return True

        await wait_until(again)
        await asyncio.wait_for(pending, 20)
        await connection.close()
        await setup.check_copies()


async def test_a_full_disk_stops_commits_until_there_is_space(tmp_path: Path) -> None:
    """RLIMIT_FSIZE of the running process: no file may grow beyond 300 kB, so neither frames nor new pieces fit."""
    async with streaming_setup(tmp_path, 1) as setup:
        await setup.primary.require_quorum(setup.names, quorum=1)
        [process], [client] = setup.processes, setup.clients
        assert process.process is not None
        pid = process.process.pid
        await setup.primary.execute("INSERT INTO t VALUES (1, 'before')")
        soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (300_000, hard))
        connection = await setup.primary.connect()
        pending = asyncio.create_task(
            connection.execute("INSERT INTO t SELECT i, repeat('f', 500) FROM generate_series(2, 4000) i")
        )
        await wait_until(lambda: "disk_full" in process.log.read_text())
        await asyncio.sleep(0.7)
        assert not pending.done()
        assert (await client.node_status()).fault == ""
        acknowledged = (await client.status()).flush_lsn.value
        assert await client.read(setup.start.value, acknowledged) == setup.primary.wal(setup.start.value, acknowledged)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
        await asyncio.wait_for(pending, 20)
        await connection.close()
        await setup.check_copies()


# --- TLS and passwords ---


@contextlib.asynccontextmanager
async def tls_tunnel(primary: Primary, directory: Path) -> AsyncIterator[ComputeAddress]:
    """What a compute's agent runs: TLS with a certificate of its own, Postgres's socket behind it."""
    files = CertificateAuthority().issue_files(directory, "compute", ["compute"])

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = f"{primary.address.host}/.s.PGSQL.{primary.address.port}"
        inner_reader, inner_writer = await asyncio.open_unix_connection(path)
        await asyncio.gather(pipe(reader, inner_writer), pipe(inner_reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=server_context(files))
    try:
        port = server.sockets[0].getsockname()[1]
        yield ComputeAddress(host="127.0.0.1", port=port, certificate_pem=files.certificate.read_text())
    finally:
        server.close()


async def test_tls_with_one_certificate_and_scram(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    async with (
        primary_postgres() as primary,
        safekeeper_processes(tmp_path, 1) as processes,
        tls_tunnel(primary, tmp_path) as address,
    ):
        await primary.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        await primary.execute("CREATE ROLE replicator REPLICATION LOGIN PASSWORD 'correct horse'")
        hba = primary.server.pgdata / "pg_hba.conf"
        hba.write_text("local replication replicator scram-sha-256\nlocal all all trust\nlocal replication all trust\n")
        await primary.execute("SELECT pg_reload_conf()")
        start = await primary.insert_lsn()
        async with timeline_clients(processes, primary.system_identifier, start.value) as [client]:
            assert await elect([client], 1, of=1) == start
            impostor = CertificateAuthority().issue_files(other, "compute", ["compute"])
            wrong = [
                (address, "wrong password"),
                (address.model_copy(update={"certificate_pem": impostor.certificate.read_text()}), "correct horse"),
            ]
            for compute, password in wrong:
                await client.stream(1, start, compute, "replicator", password)
                await asyncio.sleep(0.5)
                assert not await is_streaming(client)
            # A server that asks for nothing has proved nothing.
            await client.stream(1, start, primary.address, "postgres", "correct horse")
            await asyncio.sleep(0.5)
            assert not await is_streaming(client)

            await client.stream(1, start, address, "replicator", "correct horse")
            await wait_until(lambda: is_streaming(client))
            await primary.require_quorum(["safekeeper-1"], quorum=1)
            await primary.execute("INSERT INTO t SELECT i, repeat('t', 300) FROM generate_series(1, 10000) i")
            end = (await primary.flush_lsn()).value
            await wait_until(lambda: reaches(client, end))
            assert await client.read(start.value, end) == primary.wal(start.value, end)
            await primary.require_quorum(["safekeeper-1"], quorum=1)
        log = processes[0].log.read_text()
        assert "correct horse" not in log


async def test_another_database_is_refused(tmp_path: Path) -> None:
    async with primary_postgres() as primary, safekeeper_processes(tmp_path, 1) as processes:
        start = await primary.insert_lsn()
        async with timeline_clients(processes, primary.system_identifier + 1, start.value) as [client]:
            await elect([client], 1, of=1)
            await client.stream(1, start, primary.address)
            await asyncio.sleep(0.5)
            status = await client.status()
            assert not status.streaming
            assert status.flush_lsn == start


async def test_a_second_compute_in_one_term_is_refused(tmp_path: Path) -> None:
    async with streaming_setup(tmp_path, 1) as setup:
        await setup.primary.require_quorum(setup.names, quorum=1)
        await setup.primary.execute("INSERT INTO t VALUES (1, 'v')")
        with pytest.raises(ConflictError, match="another compute"):
            await setup.clients[0].stream(1, setup.start, setup.primary.address.model_copy(update={"port": 5555}))
        assert await is_streaming(setup.clients[0])


async def test_the_api_wants_the_right_scopes(tmp_path: Path) -> None:
    async with safekeeper_processes(tmp_path, 1) as [process], timeline_clients([process], 1, 40) as [client]:
        base = f"https://127.0.0.1:{process.http_port}{client.path}"
        for method, path in (("POST", ":vote"), ("POST", ":elected"), ("POST", ":stream"), ("GET", "")):
            response = await client.http._http.request(method, base + path, extensions=client.http._extensions, json={})
            assert response.status_code == 401, (method, path)
        with pytest.raises(PermissionDeniedError):
            await client.http.request("GET", client.path, project_id=ProjectId.new())
        with pytest.raises(InvalidInputError):
            await client.http.request("POST", f"{client.path}x:vote", body=VoteRequest(term=1, candidate="c"))
        stranger = client.path.replace(str(client.timeline_id), str(TimelineId.new()))
        with pytest.raises(NotFoundError):
            await client.http.request("GET", stranger)
        await client.create(1, 40)
        with pytest.raises(ConflictError):
            await client.create(2, 40)
        assert (await client.node_status()).fault == ""
        metrics = await client.http.request("GET", "/metrics")
        assert "keylake_safekeeper_flush_lsn_bytes" in metrics.text
        await client.http.request("DELETE", client.path)
        with pytest.raises(NotFoundError):
            await client.status()
        assert not list(process.data_dir.rglob(str(client.timeline_id) + "*"))
