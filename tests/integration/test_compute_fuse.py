"""The lazy volume under a real Postgres: everything that Postgres does to files, and what is left of it when it ends.

Needs /dev/fuse and a mount namespace. Elsewhere it is skipped, but not in CI, where that would hide a broken volume.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import zlib
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from compute.sealed_log import read_batches
from shared import sandbox
from shared.api.compute import CreatedEndpoint, Endpoint, EndpointState
from shared.api.keymanager import Role
from shared.http import ServiceClient
from shared.ids import ProjectId
from shared.postgres import PG_BIN_VARIABLE, find_postgres
from shared.sandbox import Isolation
from tests.cluster.processes import Process, below, standing_still
from tests.cluster_secrecy import lazy, memory
from tests.fixtures.compute_cluster import ComputeCluster, compute_cluster
from tests.fixtures.contrib import postgres_with_contrib
from tests.fixtures.fuse import why_no_fuse
from tests.fixtures.keymanager import metadata_dsn, metadata_server
from tests.fixtures.npm import NotHereError
from tests.fixtures.waiting import wait_until
from tests.integration.test_compute_manager import (
    CONNECTION_LOST,
    be_impatient,
    log_in,
    make_endpoint,
    reach,
    state_of,
)

__all__ = ["metadata_dsn", "metadata_server"]  # fixtures

pytestmark = pytest.mark.integration

_BLOCK = 8192
_PIECE = 16
_STEPS = {"kill_postgres", "wipe_boot_key", "remove_volume", "remove_log_and_socket"}
CANARY = b"canary-5c1f77e0"


@pytest.fixture
def no_amcheck(monkeypatch: pytest.MonkeyPatch) -> NotHereError | None:
    """Why there is none; otherwise computes run a Postgres that has it."""
    try:
        monkeypatch.setenv(PG_BIN_VARIABLE, str(postgres_with_contrib().bin_dir))
    except NotHereError as error:
        return error
    return None


@pytest.fixture
def shared_buffers_mb() -> int:
    """A test may have another size."""
    return 64


@pytest.fixture
async def cluster(
    metadata_dsn: str, no_amcheck: NotHereError | None, shared_buffers_mb: int
) -> AsyncIterator[ComputeCluster]:
    if why := why_no_fuse():
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="kl-") as scratch:
        # amcheck is not for everybody.
        options = {"volume": "fuse", "superuser_owners": True, "shared_buffers_mb": shared_buffers_mb}
        async with compute_cluster(Path(scratch), metadata_dsn, pageserver=True, **options) as running:
            yield running


@pytest.fixture
async def client(cluster: ComputeCluster) -> AsyncIterator[ServiceClient]:
    async with cluster.client() as client:
        yield client


async def restarted(client: ServiceClient, endpoint: CreatedEndpoint, connection: Any) -> tuple[Any, Endpoint]:
    """With the files that there were, and as long as they were."""
    before = await files(connection)
    await client.request("POST", f"/v1/endpoints/{endpoint.endpoint_id}:stop")
    connection = await log_in(await reach(client, endpoint), endpoint)
    state = await state_of(client, endpoint)
    assert state.volume.startswith("FUSE, pages on demand")
    assert await files(connection) == as_booted(before)
    return connection, state


async def files(connection: Any) -> dict[str, int]:
    """Name → size, of the database and of what all databases share, and both stay as they are.

    Without what a start leaves out and Postgres makes again: free space maps, and caches of the catalogs."""
    await connection.execute("ALTER SYSTEM SET autovacuum = off")
    await connection.execute("SELECT pg_reload_conf()")

    async def quiet() -> bool:
        query = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'autovacuum %'"
        return not await connection.fetchval(query)

    await wait_until(quiet)
    await connection.execute("CHECKPOINT")  # what was dropped is unlinked
    found = await connection.fetch(
        """
        SELECT directory || '/' || name AS path, (pg_stat_file(directory || '/' || name)).size
          FROM (SELECT 'global' UNION SELECT 'base/' || oid FROM pg_database WHERE datname = current_database())
               AS directories (directory), pg_ls_dir(directory) AS name
         WHERE name NOT LIKE '%\\_fsm' AND name <> 'pg_internal.init'
        """
    )
    return {each["path"]: each["size"] for each in found}


def as_booted(before: dict[str, int]) -> dict[str, int]:
    """The same, but for unlogged relations: empty, as their init forks have it."""
    unlogged = {name.removesuffix("_init") for name in before if name.endswith("_init")}
    assert unlogged
    kept = {name: size for name, size in before.items() if name.removesuffix("_vm") not in unlogged}
    return kept | {name: before[f"{name}_init"] for name in unlogged}


async def content(connection: Any, *tables: str) -> dict[str, Any]:
    return {
        table: tuple(
            await connection.fetchrow(
                f"SELECT count(*), md5(string_agg(t::text, ',' ORDER BY t::text)) FROM {table} t"  # noqa: S608
            )
        )
        for table in tables
    }


async def program(name: str, endpoint: CreatedEndpoint, host: str, *arguments: str) -> tuple[int | None, str]:
    """(exit status, output) of one of Postgres's own."""
    process = await asyncio.create_subprocess_exec(
        find_postgres().program(name),
        *arguments,
        env={
            "PATH": os.environ["PATH"],
            "PGHOST": host,
            "PGUSER": endpoint.user,
            "PGPASSWORD": endpoint.password,
            "PGDATABASE": endpoint.database,
            "PGOPTIONS": "-c client_min_messages=warning",
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def pgbench(endpoint: CreatedEndpoint, host: str, *arguments: str) -> None:
    status, output = await program("pgbench", endpoint, host, *arguments)
    assert status == 0, output


async def amcheck(endpoint: CreatedEndpoint, host: str, *arguments: str) -> tuple[int | None, str]:
    """pg_amcheck: every page of tables and B-trees, each row's entry in each index, and the way to it from the root."""
    strictly = ("--parent-check", "--rootdescend", "--heapallindexed", "--no-strict-names", "--install-missing")
    return await program("pg_amcheck", endpoint, host, *strictly, *arguments)


async def test_postgres_does_all_that_it_does_to_files(
    cluster: ComputeCluster, client: ServiceClient, no_amcheck: NotHereError | None
) -> None:
    # What Postgres has no room for it has to read again.
    settings = cluster.settings.model_copy(update={"shared_buffers_mb": 2})
    cluster.manager._services = replace(cluster.services, settings=settings)
    endpoint = await make_endpoint(client, ProjectId.new())
    target = await reach(client, endpoint)
    await pgbench(endpoint, target.compute.host, "-i", "-s", "1", "-q")
    connection: Any = await log_in(target, endpoint)
    await connection.execute(
        """
        CREATE TABLE big AS SELECT i, md5(i::text) AS m, repeat('f', i % 300) AS f FROM generate_series(1, 20000) i;
        ALTER TABLE big ADD PRIMARY KEY (i);
        CREATE UNLOGGED TABLE scratch (a int PRIMARY KEY);
        INSERT INTO scratch SELECT generate_series(1, 1000);
        CREATE TABLE gone AS SELECT i FROM generate_series(1, 10000) i;
        """
    )
    connection, small = await restarted(client, endpoint, connection)
    assert await connection.fetchval("SELECT count(*) FROM scratch") == 0  # from its init fork
    await connection.execute("INSERT INTO scratch SELECT generate_series(1, 500)")
    before = await content(connection, "pgbench_accounts", "big")
    assert before["big"][0] == 20000

    async def check(*arguments: str) -> None:
        """All of it is in order as it lies in the volume, not in somebody's cache."""
        await forget(cluster)
        if no_amcheck is None:
            host = (await reach(client, endpoint)).compute.host
            assert await amcheck(endpoint, host, *(arguments or ("--schema", "public"))) == (0, "")

    # All of it on files that are still at their origin: written in part, rewritten, replaced, dropped.
    await pgbench(endpoint, (await reach(client, endpoint)).compute.host, "-n", "-c", "2", "-t", "100")
    await check()
    await connection.execute("CREATE INDEX ON big (m)")
    await check()
    await connection.execute("UPDATE big SET f = f || 'u' WHERE i % 3 = 0")
    await connection.execute("TRUNCATE gone")
    await connection.execute("INSERT INTO gone SELECT generate_series(1, 10)")
    await connection.execute("VACUUM FULL big")
    await connection.execute("VACUUM pgbench_accounts")
    await check()
    if not lazy.why_not():
        # And it is the blocks' file that all of the table came from, but for the 2 MiB of Postgres's own buffers.
        await forget(cluster)
        read = bytes_read(cluster)
        assert await connection.fetchval("SELECT count(*) FROM big") == 20000
        size = await connection.fetchval("SELECT pg_relation_size('big')")
        assert bytes_read(cluster) - read > size - (2 << 20) > 2 << 20
    await connection.execute("CREATE DATABASE wal_logged")
    await connection.execute("CREATE DATABASE copied STRATEGY file_copy")
    await check("--database", "wal_logged", "--database", "copied")
    await connection.execute("DROP DATABASE wal_logged")
    await connection.execute("SET work_mem = '64kB'")
    assert await connection.fetchval("SELECT count(*) FROM (SELECT f FROM big ORDER BY f OFFSET 10) x") == 19990
    await wait_until(lambda: _has_spilled(connection))
    async with connection.transaction():
        sort = await connection.cursor("SELECT i, m FROM big ORDER BY reverse(m)")
        rows = await sort.fetch(10)
        await forget(cluster)
        rows += await sort.fetch(20000)
    assert [m[::-1] for _, m in rows] == sorted(m[::-1] for _, m in rows)
    assert sorted(i for i, _ in rows) == list(range(1, 20001))
    await connection.execute("CREATE TEMPORARY TABLE t AS SELECT * FROM big; DROP TABLE t")
    assert await connection.fetchval("SELECT count(*) FROM scratch") == 500
    after = await content(connection, "pgbench_accounts", "pgbench_history", "big", "gone")
    await check()

    connection, large = await restarted(client, endpoint, connection)
    assert await content(connection, "pgbench_accounts", "pgbench_history", "big", "gone") == after
    assert await connection.fetchval("SELECT i FROM big WHERE m = md5('777')") == 777

    # The database has grown by more pages than a start reads, and the start reads as many as it did before.
    await connection.execute(
        "INSERT INTO big SELECT i, md5(i::text), repeat('g', 900) FROM generate_series(20001, 35000) i"
    )
    blocks = await connection.fetchval("SELECT sum(pg_relation_size(oid)) / 8192 FROM pg_class")
    connection, larger = await restarted(client, endpoint, connection)
    assert await connection.fetchval("SELECT count(*) FROM big") == 35000
    starts = [each.pages_at_start for each in (small, large, larger)]
    assert all(pages is not None for pages in starts)
    assert blocks > 4000
    assert 0 < max(starts) < 1000  # type: ignore[type-var,operator]
    assert larger.pages_at_start <= large.pages_at_start + 20  # type: ignore[operator]
    [run] = cluster.manager._runs.values()
    assert run._lsn_hold._renewing is not None  # the pages of its start stay readable
    stages = [stage.stage for stage in larger.stages]
    assert [name for name in stages if name in ("election", "basebackup", "mount", "postgres")] == [
        "election", "basebackup", "mount", "postgres",
    ]  # fmt: skip

    # A backend that is shot takes Postgres with it, and the compute: the next one starts from storage.
    backend = await connection.fetchval("SELECT pg_backend_pid()")
    [run] = cluster.manager._runs.values()
    assert run._agent is not None
    victims = [each for each in below(run._agent.pid) if _inner_pid(each.pid) == backend]
    assert len(victims) == 1
    os.kill(victims[0].pid, signal.SIGKILL)
    await wait_until(lambda: _stopped(client, endpoint))
    connection = await log_in(await reach(client, endpoint), endpoint)
    assert await connection.fetchval("SELECT count(*) FROM big") == 35000
    assert await content(connection, "pgbench_accounts", "pgbench_history", "gone") == {
        name: after[name] for name in ("pgbench_accounts", "pgbench_history", "gone")
    }
    await check("--all")
    if no_amcheck is None:
        # An index that does not hold what its table does would be noticed.
        await connection.execute(
            """
            CREATE FUNCTION changing(int) RETURNS int IMMUTABLE LANGUAGE sql RETURN $1;
            CREATE INDEX wrong ON gone (changing(i));
            CREATE OR REPLACE FUNCTION changing(int) RETURNS int IMMUTABLE LANGUAGE sql RETURN -$1;
            """
        )
        host = (await reach(client, endpoint)).compute.host
        status, output = await amcheck(endpoint, host, "--index", "wrong")
        assert (status, "lacks matching index tuple" in output) == (2, True), output

    # Revoked while pages are under way: whoever waits for one dies like everybody else.
    scan = asyncio.create_task(connection.fetchval("SELECT sum(length(m)) FROM big"))
    await cluster.leases.revoke(endpoint.project_id)
    await wait_until(lambda: _stopped(client, endpoint))
    await asyncio.gather(scan, return_exceptions=True)
    connection.terminate()
    assert set(cluster.leases.acknowledged[Role.COMPUTE].steps_s) == {"wipe_volume_keys", *_STEPS}
    await cluster.leases.restore(endpoint.project_id)
    connection = await log_in(await reach(client, endpoint), endpoint)
    assert await connection.fetchval("SELECT sum(length(m)) FROM big") == 32 * 35000

    # A server that hangs wipes nothing, and nobody says that it did; it dies, and so does who waits for it.
    [run] = cluster.manager._runs.values()
    assert run._agent is not None
    server = next(each for each in below(run._agent.pid) if Volume.is_server(each.pid))
    os.kill(server.pid, signal.SIGSTOP)
    waiting = asyncio.create_task(connection.execute("CREATE INDEX ON big (f)"))
    cluster.leases.acknowledged.clear()
    await cluster.leases.revoke(endpoint.project_id)
    await wait_until(lambda: Role.COMPUTE in cluster.leases.acknowledged)
    steps = cluster.leases.acknowledged[Role.COMPUTE].steps_s
    assert set(steps) == {"volume_server_did_not_answer", *_STEPS}
    assert not server.exists
    with pytest.raises(CONNECTION_LOST):
        await waiting
    if no_amcheck is not None:
        no_amcheck.give_up()  # the rest is done


async def _has_spilled(connection: Any) -> bool:
    """Statistics come after the transaction, and at most once a second."""
    query = "SELECT temp_bytes > 1000000 FROM pg_stat_database WHERE datname = 'app'"
    return bool(await connection.fetchval(query))


async def _stopped(client: ServiceClient, endpoint: Endpoint) -> bool:
    return (await state_of(client, endpoint)).state is EndpointState.STOPPED


def _inner_pid(pid: int) -> int:
    """As its own pid namespace numbers it (proc(5), NSpid)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1])


def server_of(cluster: ComputeCluster) -> Process:
    """Of the one compute that runs: who serves its volume."""
    [run] = cluster.manager._runs.values()
    assert run._agent is not None
    return next(each for each in below(run._agent.pid) if Volume.is_server(each.pid))


async def forget(cluster: ComputeCluster) -> None:
    """The kernel keeps no page of the volume: what is read from here on, its server is asked for."""
    if lazy.why_not():
        return
    [run] = cluster.manager._runs.values()
    assert run._agent is not None
    # In a thread: the pageserver that it may wait for is in this process.
    await asyncio.to_thread(_drop_caches, Volume.root(server_of(cluster).pid, run._agent.directory))


def _drop_caches(pgdata: Path) -> None:
    """All databases but the templates, which nobody writes to."""
    lazy.flush(pgdata)
    for directory in (pgdata / "base").iterdir():
        if directory.name not in ("1", "4", "5"):
            for path in directory.iterdir():
                with suppress(FileNotFoundError), path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read(cluster: ComputeCluster) -> int:
    """By the volume's server, of its blocks and of /dev/fuse; pages come over a socket, which do not count here."""
    counts = Path(f"/proc/{server_of(cluster).pid}/io").read_text()
    return int(next(line for line in counts.splitlines() if line.startswith("rchar:")).split()[1])


class Volume:
    """What somebody with all rights on the machine sees of a running compute's volume."""

    def __init__(self, agent_pid: int, directory: Path, blocks_dir: Path) -> None:
        self.server = next(each for each in below(agent_pid) if self.is_server(each.pid))
        self.pgdata = self.root(self.server.pid, directory)
        opened = Path(f"/proc/{self.server.pid}/fd").iterdir()
        # Without a name: the link in /proc is the only way to it.
        [found] = [each for each in opened if os.readlink(each).startswith(f"{blocks_dir}/")]
        assert os.readlink(found).endswith("(deleted)")
        self.blocks = os.open(found, os.O_RDWR)

    @staticmethod
    def root(server_pid: int, directory: Path) -> Path:
        return Path(f"/proc/{server_pid}/root{directory}/pgdata")

    @staticmethod
    def is_server(pid: int) -> bool:
        return b"compute.volume" in Path(f"/proc/{pid}/cmdline").read_bytes()

    def sealed(self) -> bytes:
        return os.pread(self.blocks, os.fstat(self.blocks).st_size, 0)

    @classmethod
    def forgotten(cls, path: Path) -> None:
        """By the kernel: who reads it next asks the volume's server."""
        cls.flushed(path)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @staticmethod
    def flushed(path: Path) -> bytes:
        """The file as Postgres sees it, once the kernel has written all of it."""
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            return file.read()

    def alter(self, path: Path) -> None:
        """One bit of each block. Then read `path`, past the kernel's cache."""
        lazy.flush(self.pgdata)
        sealed = self.sealed()
        for at in range(100, len(sealed), 4096):
            os.pwrite(self.blocks, bytes([sealed[at] ^ 1]), at)
        self.read(path)

    def read(self, path: Path, block: int = 0) -> bytes:
        """Of a file, past the kernel's cache."""
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return os.pread(file.fileno(), _BLOCK, block * _BLOCK)

    def readable(self, path: Path) -> int:
        """So many blocks of a file have canaries in them; others are empty, or I/O errors."""
        found = 0
        for block in range(path.stat().st_size // _BLOCK):
            with suppress(OSError):
                found += CANARY in self.read(path, block)
        return found


async def check_combo_cids(connection: Any, volume: Volume) -> None:
    """Which command of a transaction made or ended a row is on the page, and in no record of WAL: cursors see by it
    what was there when they were opened. So a page that has left Postgres's memory must come back as it was written,
    and not as the pageserver has it. `cids` is of before this compute; `t` is much larger than shared_buffers."""
    async with connection.transaction():
        await connection.execute(
            """
            DECLARE base CURSOR FOR SELECT id, v FROM cids;
            UPDATE cids SET v = 'made';
            DECLARE made CURSOR FOR SELECT id, v FROM cids;
            UPDATE cids SET v = 'changed' WHERE id % 2 = 0;
            DECLARE changed CURSOR FOR SELECT id, v FROM cids;
            DELETE FROM cids WHERE id % 5 = 0;
            DECLARE deleted CURSOR FOR SELECT id, v FROM cids;
            UPDATE cids SET v = 'changed again';
            """
        )
        changed = {(i, "made" if i % 2 else "changed") for i in range(1, 5001)}
        seen = {name: {(i, name) for i in range(1, 5001)} for name in ("base", "made")}
        seen |= {"changed": changed, "deleted": {(i, v) for i, v in changed if i % 5}}
        path = volume.pgdata / await connection.fetchval("SELECT pg_relation_filepath('cids')")
        read = "SELECT pg_stat_get_xact_blocks_fetched(oid) - pg_stat_get_xact_blocks_hit(oid) FROM pg_class"
        read += " WHERE relname = 'cids'"
        for name, rows in seen.items():
            # By the index: a sequential scan would go through a ring of a few buffers.
            await connection.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off")
            assert await connection.fetchval("SELECT count(k) FROM (SELECT k FROM t ORDER BY c LIMIT 4000) x") == 4000
            await connection.execute("RESET enable_seqscan; RESET enable_bitmapscan")
            await asyncio.to_thread(volume.forgotten, path)
            before = await connection.fetchval(read)
            assert {tuple(row) for row in await connection.fetch(f"FETCH ALL FROM {name}")} == rows
            assert await connection.fetchval(read) - before >= path.stat().st_size // _BLOCK
    assert await connection.fetchval("SELECT count(*) FROM cids WHERE v = 'changed again'") == 4000


def look_for_anything(known: Iterable[bytes], left: bytes) -> None:
    """Known plaintext, wherever it begins; words. And nothing in it repeats, or can be made shorter."""
    pieces = {text[at : at + _PIECE] for text in known for at in range(len(text) - _PIECE + 1)}
    assert not [word for word in (CANARY, b"k" * 12, bytes(12)) if word in left]
    for start in range(0, len(left), 4 << 20):
        part = left[start : start + (4 << 20)]
        found = [part[at : at + _PIECE] for at in range(0, len(part), _PIECE)]
        assert pieces.isdisjoint(found)
        assert len(set(found)) == len(found)
    for start in range(0, len(left), 64 << 10):  # so little that one block in the clear shows
        part = left[start : start + (64 << 10)]
        assert len(zlib.compress(part, 1)) >= len(part)


@pytest.fixture
def without_pid_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container: what ends without them ends with them."""
    monkeypatch.setattr(sandbox, "detect_isolation", lambda: Isolation.MOUNTS)


@pytest.mark.usefixtures("without_pid_namespaces")
@pytest.mark.parametrize("shared_buffers_mb", [2])
async def test_what_is_left_after_a_kill_is_noise_and_altered_blocks_are_errors(
    cluster: ComputeCluster, client: ServiceClient
) -> None:
    if why := lazy.why_not():
        pytest.skip(why)
    endpoint = await make_endpoint(client, ProjectId.new())
    connection: Any = await log_in(await reach(client, endpoint), endpoint)
    await connection.execute(
        "CREATE TABLE t AS SELECT i, 'canary-5c1f77e0' || i AS c, repeat('k', 500) k FROM generate_series(1, 40000) i"
    )
    await connection.execute("CREATE INDEX ON t (c)")
    await connection.execute(
        """
        CREATE TABLE cids (id int, v text) WITH (fillfactor = 20, autovacuum_enabled = off);
        INSERT INTO cids SELECT i, 'base' FROM generate_series(1, 5000) i;
        """
    )
    logged = CANARY.decode() + " ".join(sha256(str(i).encode()).hexdigest() for i in range(2000))
    await connection.execute(f"DO $$ BEGIN RAISE WARNING '{logged}'; END $$")
    [run] = cluster.manager._runs.values()
    assert run._agent is not None
    agent_pid, agent_directory = run._agent.pid, run._agent.directory
    volume = Volume(agent_pid, agent_directory, cluster.settings.blocks.directory)
    keys = memory.key_slots(volume.server.pid)
    assert len(keys) >= 2  # the volume's, and that of its blocks
    path = volume.pgdata / await connection.fetchval("SELECT pg_relation_filepath('t')")
    full = await connection.fetchval("SELECT pg_walfile_name(pg_current_wal_lsn() - (8 << 20))")

    # The control: it is there, in plain text, for Postgres. And all of it reaches the files.
    table = await asyncio.to_thread(volume.flushed, path)  # the pageserver that it may wait for is in this process
    assert table.count(CANARY) > 30000  # the rest is in Postgres's own buffers
    wal = await asyncio.to_thread(volume.flushed, volume.pgdata / "pg_wal" / full)
    assert logged in await run.read_log()
    known = [table[: 16 * _BLOCK], wal[: 16 * _BLOCK], logged.encode()]
    assert min(map(len, known)) > 64 << 10
    sealed = volume.sealed()
    assert len(sealed) > len(table)
    await asyncio.to_thread(look_for_anything, known, sealed)
    for text in known:  # and one block in the clear would be seen
        spoiled = sealed[:_BLOCK] + text[:_BLOCK] + sealed[_BLOCK : 8 * _BLOCK]
        with pytest.raises(AssertionError):
            await asyncio.to_thread(look_for_anything, [text], spoiled)

    # Altered on the disk: Postgres gets an I/O error, and the compute goes on.
    assert await connection.fetchval("SELECT count(*) FROM t") == 40000
    await connection.execute("CHECKPOINT")  # a write that needs a block which is lost ends the compute
    with pytest.raises(OSError, match="Input/output error"):
        await asyncio.to_thread(volume.alter, path)
    with pytest.raises(asyncpg.PostgresError) as refused:
        await connection.fetchval("SELECT sum(length(c)) FROM t")
    assert refused.value.sqlstate == "58030"  # io_error
    assert await connection.fetchval("SELECT 1") == 1

    tree = below(agent_pid)
    assert run._agent.inner_pid == agent_pid
    assert len(tree) > 5
    os.kill(volume.server.pid, signal.SIGSTOP)
    os.kill(agent_pid, signal.SIGKILL)
    await wait_until(lambda: _stopped(client, endpoint))
    await wait_until(lambda: not any(each.exists for each in tree))
    assert not [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(agent_directory) in line]
    assert not agent_directory.exists()
    # All that is left: the log, and what no name leads to any more.
    left = [path for path in cluster.settings.log_dir.rglob("*") if path.is_file()]
    assert {path.name.rpartition(".log.")[0] for path in left} == {str(run.instance_id)}
    assert not [path for path in cluster.settings.runtime_dir.rglob("*") if path.is_file()]
    log = b"".join(sealed for path in left for _, sealed in read_batches(path.read_bytes()))
    assert len(log) > 64 << 10
    for noise in (volume.sealed(), log):
        await asyncio.to_thread(look_for_anything, known, noise)
    with pytest.raises(CONNECTION_LOST):
        await connection.fetchval("SELECT 1")
    os.close(volume.blocks)

    # From storage: nothing was lost, and the copy that was altered is forgotten.
    connection = await log_in(await reach(client, endpoint), endpoint)
    assert await connection.fetchval("SELECT count(*) FROM t WHERE c LIKE 'canary-%'") == 40000
    [run] = cluster.manager._runs.values()
    assert run._agent is not None
    volume = Volume(run._agent.pid, run._agent.directory, cluster.settings.blocks.directory)

    # A disk that was put back to a copy of before: what the compute of then has sealed opens in no other one. Postgres
    # and the kernel write nothing meanwhile: a write into what does not open would end the compute.
    assert memory.key_slots(volume.server.pid).isdisjoint(keys)
    await connection.execute("CREATE TABLE u AS SELECT * FROM t")
    path = volume.pgdata / await connection.fetchval("SELECT pg_relation_filepath('u')")
    with standing_still([each.pid for each in below(run._agent.pid) if each.command == "postgres"]):
        await asyncio.to_thread(lazy.flush, path.parent)
        assert await asyncio.to_thread(volume.readable, path) > 100
        newer = volume.sealed()
        older = sealed + sealed  # long enough, whatever this compute has written
        os.pwrite(volume.blocks, older[: len(newer)], 0)
        assert await asyncio.to_thread(volume.readable, path) == 0
        os.pwrite(volume.blocks, newer, 0)
    await check_combo_cids(connection, volume)
    os.close(volume.blocks)

    # Without its server the volume is dead, so the compute ends, and says why.
    [run] = cluster.manager._runs.values()
    assert run._agent is not None
    server = next(each for each in below(run._agent.pid) if Volume.is_server(each.pid))
    os.kill(server.pid, signal.SIGKILL)
    await wait_until(lambda: _stopped(client, endpoint))
    assert "the volume failed" in run.reason
    connection.terminate()

    # So it does when its server hangs: the agent, which sees that Postgres hangs with it, does not wait for it as well.
    be_impatient(cluster)
    await reach(client, endpoint)
    [run] = cluster.manager._runs.values()
    assert run._agent is not None
    server = next(each for each in below(run._agent.pid) if Volume.is_server(each.pid))
    os.kill(server.pid, signal.SIGSTOP)
    await wait_until(lambda: _stopped(client, endpoint), 40)
    assert "has not answered for" in run.reason  # the volume, or Postgres, which hangs with it
    assert not server.exists
