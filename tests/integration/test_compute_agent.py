"""One agent with its Postgres: what it gives its users, what it keeps from them, and what is left when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import ssl
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from compute.agent.protocol import (
    Boot,
    Ended,
    Follow,
    PostgresOptions,
    Prepared,
    Running,
    Start,
    Tokens,
    role_digest,
)
from compute.agent.replica import Replica
from compute.agent.roles import bootstrap_sql
from compute.agent.tunnel import TUNNEL_HOST_NAME, tunnel_client_context
from compute.guard.build import prepare_guard
from compute.launcher import AgentProcess, make_socket_dir, remove_socket_dir
from shared.api.keymanager import KeyState, Role
from shared.api.pageserver import ADMIN_ROLE
from shared.auth import Scope, Service
from shared.config import Address
from shared.errors import IntegrityError, UnavailableError
from shared.ids import EndpointId, InstanceId, ProjectId, TimelineId
from shared.lsn import Lsn
from shared.postgres import PG_BIN_VARIABLE, PostgresServer, initdb
from shared.sandbox import Isolation
from shared.tls import CertificateAuthority
from shared.wire.scram import ScramVerifier
from tests.fixtures.basebackups import BasebackupSource
from tests.fixtures.contrib import TRUSTED, UNTRUSTED, postgres_with_contrib
from tests.fixtures.leases import LeaseServer
from tests.fixtures.npm import NotHereError
from tests.fixtures.realm import Realm
from tests.fixtures.waiting import wait_until

pytestmark = pytest.mark.integration

CANARY = "canary-7f3a91"
HASH = "A" * 43 + "="


@dataclass(slots=True)
class Bench:
    scratch: Path
    realm: Realm
    source: BasebackupSource
    leases: LeaseServer
    project_id: ProjectId
    socket_dir: Path
    agent: AgentProcess
    guard: Path

    def boot_message(self, **changes: Any) -> Boot:
        values: dict[str, Any] = {
            "instance_id": InstanceId.new(),
            "endpoint_id": EndpointId.new(),
            "project_id": self.project_id,
            "timeline_id": TimelineId.new(),
            "system_identifier": self.source.system_identifier,
            "keymanager": self.leases.address,
            "pages": self.source.address,
            "ca_certificate": self.realm.ca_certificate,
            "socket_dir": self.socket_dir,
            "sealed_log": self.scratch / "log",
            "log_size_bytes": 1 << 20,
            "owner": "app",
            "owner_verifier": ScramVerifier.compute("pw", secrets.token_bytes(16)).serialize(),
            "database": "app",
            "safekeeper_password": "s" * 32,
            "postgres": PostgresOptions(guard=self.guard, standby_names=[], shared_buffers_mb=16),
            **changes,
        }
        return Boot(**values)

    def tokens(self) -> Tokens:
        issuer = self.realm.issuers[Service.COMPUTE]
        return Tokens(
            keymanager=issuer.issue(Service.KEYMANAGER, [Scope.KEYS_SESSION], project_id=self.project_id),
            pageserver=issuer.issue(Service.PAGESERVER, [Scope.STORAGE_READ], project_id=self.project_id),
        )

    async def prepare(self, **changes: Any) -> Prepared:
        await self.agent.boot(self.boot_message(**changes), self.tokens)
        return await self.agent.prepared

    async def run(self, **changes: Any) -> Running:
        await self.prepare(**changes)
        await self.agent.start(Start(term=1, start_lsn=self.source.start_lsn))
        return await self.agent.running

    async def connect(self, **options: Any) -> Any:
        arguments: dict[str, Any] = {"user": "app", "password": "pw", "database": "app", **options}
        return await asyncpg.connect(host=str(self.socket_dir), timeout=10, **arguments)


@asynccontextmanager
async def agent_bench(isolation: Isolation | None = None) -> AsyncIterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="kl-") as directory:
        scratch = Path(directory)
        (scratch / "pki").mkdir()
        realm = Realm.create(scratch / "pki")
        source = await BasebackupSource.create(scratch)
        agent = await AgentProcess.spawn(volume_size_bytes=512 << 20, isolation=isolation)
        socket_dir = make_socket_dir(scratch, "s")
        try:
            async with source.serving(realm), LeaseServer(realm).serving() as leases:
                try:
                    yield Bench(
                        scratch, realm, source, leases, ProjectId.new(), socket_dir, agent, await prepare_guard()
                    )
                finally:
                    await agent.close()
        finally:
            remove_socket_dir(socket_dir)
        assert not agent.directory.exists()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with agent_bench() as running:
        yield running


def processes_of(bench: Bench) -> list[int]:
    """Every process whose command line or root leads to this agent's directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(bench.agent.directory).encode() in command:
                found.append(int(entry.name))
    return found


def postmaster_of(bench: Bench) -> int:
    """The first of its processes that is a postgres."""
    return min(pid for pid in processes_of(bench) if Path(f"/proc/{pid}/comm").read_text().strip() == "postgres")


def volume_files(bench: Bench) -> list[Path]:
    """PGDATA as the agent sees it, through /proc/<pid>/root; empty when there is nobody any more."""
    pid = bench.agent.inner_pid
    if pid is None:
        return []
    root = Path(f"/proc/{pid}/root{bench.agent.directory}")
    return [path for path in root.rglob("*") if path.is_file()]


FORBIDDEN = (
    # what makes a commit durable, and what Postgres says where
    "ALTER SYSTEM SET synchronous_standby_names = ''",
    "ALTER SYSTEM SET synchronous_commit = off",
    "ALTER SYSTEM SET fsync = on",
    "ALTER SYSTEM SET archive_command = 'id'",
    "ALTER SYSTEM RESET ALL",
    *(
        f"{how} {setting}"
        for setting in (
            "synchronous_standby_names = ''",
            "log_min_messages = panic",
            "lc_messages = 'de_DE'",
            "session_replication_role = replica",
            "session_preload_libraries = 'x'",
            "dynamic_library_path = '/tmp'",
            "temp_file_limit = -1",
            "allow_system_table_mods = on",
            "zero_damaged_pages = on",
            "ignore_checksum_failure = on",
            "archive_mode = on",
            "archive_command = 'id'",
            "wal_consistency_checking = 'all'",
            "primary_conninfo = 'host=x'",
            "shared_preload_libraries = ''",
            "max_wal_senders = 0",
        )
        for how in ("SET", "ALTER ROLE app SET", "ALTER DATABASE app SET")
    ),
    "SELECT set_config('synchronous_standby_names', '', false)",
    "SELECT pg_reload_conf()",
    "SELECT pg_rotate_logfile()",
    "SHOW data_directory",
    "SELECT * FROM pg_hba_file_rules",
    "SELECT * FROM pg_file_settings",
    "LOAD 'auto_explain'",
    "LOAD '/tmp/x.so'",
    "CHECKPOINT",
    # replication, backups, the log
    "SELECT pg_create_physical_replication_slot('x')",
    "SELECT pg_create_logical_replication_slot('x', 'test_decoding')",
    "SELECT pg_drop_replication_slot('x')",
    "SELECT pg_replication_origin_create('x')",
    "SELECT pg_backup_start('x')",
    "SELECT pg_create_restore_point('x')",
    "SELECT pg_switch_wal()",
    "SELECT pg_promote()",
    "CREATE SUBSCRIPTION s CONNECTION 'dbname=app' PUBLICATION p WITH (connect = false)",
    "CREATE PUBLICATION p FOR ALL TABLES",
    # files and programs
    "COPY t FROM '/etc/passwd'",
    "COPY t TO '/tmp/x'",
    "COPY (SELECT 1) TO '/tmp/x'",
    "COPY t FROM PROGRAM 'id'",
    "COPY t TO PROGRAM 'cat'",
    "SELECT pg_read_file('postgresql.conf')",
    "SELECT pg_read_binary_file('global/pg_control')",
    "SELECT pg_ls_dir('.')",
    "SELECT pg_ls_waldir()",
    "SELECT pg_ls_tmpdir()",
    "SELECT pg_stat_file('postgresql.conf')",
    "SELECT pg_current_logfile()",
    "SELECT lo_import('/etc/passwd')",
    "SELECT lo_export(lo_create(0), '/tmp/x')",
    "CREATE TABLESPACE s LOCATION '/tmp'",
    "CREATE EXTENSION vector",
    "CREATE FOREIGN DATA WRAPPER w",
    # code that runs as Postgres, or as somebody else
    "CREATE FUNCTION f() RETURNS text LANGUAGE internal AS 'pg_read_file'",
    "CREATE FUNCTION f(text) RETURNS int LANGUAGE c AS 'libc.so.6', 'system'",
    "CREATE FUNCTION pg_catalog.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE OR REPLACE FUNCTION pg_catalog.version() RETURNS text LANGUAGE sql AS $$ SELECT '' $$",
    "CREATE EVENT TRIGGER e ON ddl_command_start EXECUTE FUNCTION pg_catalog.suppress_redundant_updates_trigger()",
    "CREATE ACCESS METHOD m TYPE TABLE HANDLER heap_tableam_handler",
    "CREATE TYPE b (INPUT = int4in, OUTPUT = int4out)",
    "CREATE TEXT SEARCH TEMPLATE t (LEXIZE = dsimple_lexize)",
    "UPDATE pg_proc SET prosecdef = true WHERE proname = 'version'",
    "UPDATE pg_authid SET rolsuper = true",
    "UPDATE pg_database SET datdba = 0",
    "ALTER DATABASE postgres OWNER TO app",
    "ALTER DATABASE postgres SET search_path = 'x'",
    "DROP DATABASE template1",
    # roles
    "SELECT * FROM pg_authid",
    "SELECT * FROM pg_shadow",
    *(f"ALTER ROLE app {attribute}" for attribute in ("SUPERUSER", "REPLICATION", "BYPASSRLS")),
    *(f"CREATE ROLE x {attribute}" for attribute in ("SUPERUSER", "REPLICATION", "BYPASSRLS")),
    *(f"CREATE ROLE x IN ROLE {role}" for role in ("keylake_admin", "keylake_safekeeper", "pg_read_server_files")),
    *(
        statement
        for role in ("keylake_admin", "keylake_safekeeper")
        for statement in (
            f"GRANT {role} TO app",
            f"ALTER ROLE {role} PASSWORD 'x'",
            f"ALTER ROLE {role} NOLOGIN",
            f"ALTER ROLE {role} SET search_path = 'x'",
            f"ALTER ROLE {role} SET keylake.owner_of = 'x'",
            f"ALTER ROLE {role} RENAME TO x",
            f"DROP ROLE {role}",
            f"SET ROLE {role}",
            f"SET SESSION AUTHORIZATION {role}",
            f"REASSIGN OWNED BY {role} TO app",
        )
    ),
    "ALTER DEFAULT PRIVILEGES FOR ROLE keylake_admin GRANT ALL ON TABLES TO app",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename IS NULL",
)


NOT_IN_A_TRANSACTION = ("ALTER SYSTEM", "CREATE TABLESPACE", "DROP DATABASE")
REFUSALS = ("42501", "55P02")
"""insufficient_privilege; cant_change_runtime_param: nobody changes that one in a session."""
NOT_OFFERED = {"CREATE TABLESPACE s LOCATION '/tmp'": ("0A000",)}
"""feature_not_supported, whoever asks."""


async def test_the_owner_is_no_superuser_and_reaches_nothing_that_matters(bench: Bench) -> None:
    """Nor does anybody whom the owner makes as mighty as an owner can."""
    running = await bench.run()
    assert {stage.stage for stage in running.stages} == {
        "lease", "volume", "basebackup", "roles", "postgres", "database",
    }  # fmt: skip
    connection = await bench.connect()
    # What owners are for.
    await connection.execute("CREATE TABLE t (a int); INSERT INTO t VALUES (1)")
    await connection.execute("CREATE ROLE other LOGIN CREATEROLE CREATEDB PASSWORD 'pw'; GRANT ALL ON t TO other")
    await connection.execute("CREATE SCHEMA s; CREATE EXTENSION IF NOT EXISTS plpgsql")
    await connection.execute("CREATE FUNCTION s.f() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN 1; END $$")
    await connection.execute("CREATE DATABASE another")
    # All but pg_database_owner, which an owner is by its own database.
    named = r"SELECT rolname FROM pg_roles WHERE rolname LIKE 'pg\_%' AND rolname <> 'pg_database_owner'"
    predefined = [row["rolname"] for row in await connection.fetch(named)]
    assert "pg_execute_server_program" in predefined
    forbidden = [*FORBIDDEN]
    for role in predefined:
        forbidden += [
            f"GRANT {role} TO app",
            f"GRANT {role} TO other",
            f"SET ROLE {role}",
            f"CREATE ROLE x IN ROLE {role}",
        ]
    other = await bench.connect(user="other")
    allowed = []
    for session in (connection, other):
        for statement in forbidden:
            transaction = None if statement.startswith(NOT_IN_A_TRANSACTION) else session.transaction()
            if transaction is not None:
                await transaction.start()
            try:
                await session.execute(statement)
                allowed.append(statement)
            except asyncpg.PostgresError as error:
                # Refused for who they are, and not for what is not there, or for a slip of this test.
                if error.sqlstate not in NOT_OFFERED.get(statement, REFUSALS):
                    allowed.append(f"{statement}: {error.sqlstate} {error}")
            finally:
                if transaction is not None:
                    await transaction.rollback()
    assert allowed == []
    settings = {row["name"]: row["setting"] for row in await connection.fetch("SELECT name, setting FROM pg_settings")}
    assert settings["fsync"] == settings["full_page_writes"] == settings["restart_after_crash"] == "off"
    assert settings["listen_addresses"] == ""
    assert settings["dynamic_shared_memory_type"] == "mmap"
    await other.close()
    await connection.close()

    # The agent logs in to this database as a superuser: nobody may lay anything there that it would run.
    neighbour = await bench.connect(database="postgres")
    for statement in ("CREATE FUNCTION public.f() RETURNS int LANGUAGE sql AS 'SELECT 1'", "CREATE SCHEMA s"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await neighbour.execute(statement)
    await neighbour.close()
    for value in ("true", "database"):
        with pytest.raises(asyncpg.PostgresError, match=r"pg_hba|WAL sender"):
            await bench.connect(server_settings={"replication": value})


async def test_an_owner_creates_extensions_that_are_trusted_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        monkeypatch.setenv(PG_BIN_VARIABLE, str(postgres_with_contrib().bin_dir))
    except NotHereError as error:
        error.give_up()
    async with agent_bench() as bench:
        await bench.run()
        owner = await bench.connect()
        await owner.execute("CREATE ROLE other LOGIN CREATEROLE CREATEDB PASSWORD 'pw'")
        other = await bench.connect(user="other")
        for name in UNTRUSTED:
            for session in (owner, other):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await session.execute(f"CREATE EXTENSION {name}")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await owner.execute("CREATE LANGUAGE plpython3u")
        for name in TRUSTED:
            await owner.execute(f"CREATE EXTENSION {name}")
        # Their functions are in C, which no owner can make, and they work.
        row = await owner.fetchrow(
            "SELECT 'A'::citext = 'a', 'a=>1'::hstore -> 'a', similarity('keylake', 'keylakes') > 0.5"
        )
        assert tuple(row) == (True, "1", True)
        await other.close()
        await owner.close()


async def test_nobody_talks_a_commit_out_of_waiting_for_the_quorum(bench: Bench) -> None:
    await bench.run()
    connection = await bench.connect()
    notices: list[str] = []
    connection.add_log_listener(lambda _, message: notices.append(message.message))
    for value in ("off", "local", "remote_write", "remote_apply"):
        for statement in (
            f"SET synchronous_commit = {value}",
            f"SELECT set_config('synchronous_commit', '{value}', false)",
        ):
            await connection.execute(statement)
            assert await connection.fetchval("SHOW synchronous_commit") == "on"
    await wait_until(lambda: any("stays on" in notice for notice in notices))
    async with connection.transaction():
        await connection.execute("SET LOCAL synchronous_commit = off")
        assert await connection.fetchval("SHOW synchronous_commit") == "on"
    await connection.execute(
        "CREATE FUNCTION f() RETURNS text LANGUAGE sql SET synchronous_commit = off"
        " AS $$ SELECT current_setting('synchronous_commit') $$"
    )
    assert await connection.fetchval("SELECT f()") == "on"
    await connection.execute(
        "ALTER ROLE app SET synchronous_commit = off; ALTER DATABASE app SET synchronous_commit = local"
    )
    await connection.close()
    for options in ({}, {"options": "-c synchronous_commit=off"}, {"synchronous_commit": "local"}):
        connection = await bench.connect(server_settings=options)
        assert await connection.fetchval("SHOW synchronous_commit") == "on"
        await connection.close()


async def test_superusers_are_there_only_while_the_operator_wants_them() -> None:
    """And those that a superuser has made go with it, at the next start without."""
    verifier = ScramVerifier.compute("pw", secrets.token_bytes(16)).serialize()
    roles: dict[str, Any] = {
        "admin_verifier": verifier,
        "safekeeper_verifier": verifier,
        "owner": "app",
        "owner_verifier": verifier,
        "endpoint_id": EndpointId.new(),
    }
    scratch = Path(tempfile.mkdtemp(prefix="keylake-test-", dir="/dev/shm"))
    try:
        await initdb(scratch / "p", superuser=ADMIN_ROLE)
        async with PostgresServer(scratch / "p", socket_dir=scratch / "s", conf={"fsync": False}) as server:
            connection = await asyncpg.connect(host=server.host, user=ADMIN_ROLE, database="postgres")

            async def superusers(sql: str) -> set[str]:
                for statement in filter(None, sql.split(";\n\n")):
                    await connection.execute(statement)
                return {row["rolname"] for row in await connection.fetch("SELECT rolname FROM pg_roles WHERE rolsuper")}

            assert await superusers(bootstrap_sql(**roles)) == {ADMIN_ROLE}
            assert await superusers(bootstrap_sql(**roles, superuser_owner=True)) == {ADMIN_ROLE, "app"}
            await connection.execute('CREATE ROLE "an""other" SUPERUSER')
            assert await superusers(bootstrap_sql(**roles)) == {ADMIN_ROLE}
            await connection.close()
    finally:
        shutil.rmtree(scratch)


async def test_who_may_log_in(bench: Bench) -> None:
    await bench.run()
    for options in (
        {"password": "wrong"},
        {"user": "keylake_admin", "password": "", "database": "postgres"},
        {"user": "keylake_admin", "password": "guess", "database": "app"},
        {"user": "keylake_safekeeper", "password": "s" * 32},
        {"user": "app", "server_settings": {"replication": "true"}},
        {"user": "nobody"},
    ):
        with pytest.raises(asyncpg.PostgresError):
            await bench.connect(**options)
    walsender = await bench.connect(
        user="keylake_safekeeper", password="s" * 32, server_settings={"replication": "true"}
    )
    walsender.terminate()


async def test_the_log_is_sealed_and_readable_only_through_the_agent(bench: Bench) -> None:
    await bench.run()
    connection = await bench.connect()
    with pytest.raises(asyncpg.DataError):
        await connection.execute(f"SELECT '{CANARY}'::int")
    await connection.close()

    async def logged() -> bool:
        return CANARY in await bench.agent.read_log()

    await wait_until(logged)
    files = list(bench.scratch.glob("log*"))
    assert files
    assert not any(CANARY.encode() in path.read_bytes() for path in files)
    assert any(path.stat().st_size > 100 for path in files)

    # Altered or cut: that is said, and the compute goes on.
    [path] = files
    sealed = path.read_bytes()
    for spoiled in (sealed[:-1] + bytes([sealed[-1] ^ 1]), sealed[:-1]):
        path.write_bytes(spoiled)
        with pytest.raises(IntegrityError, match="the compute's log"):
            await bench.agent.read_log()
    path.write_bytes(sealed)
    await wait_until(logged)


@pytest.mark.parametrize("isolation", list(Isolation))
async def test_sigkill_of_the_agent_leaves_no_process_and_no_plaintext(isolation: Isolation) -> None:
    async with agent_bench(isolation) as bench:
        await bench.run()
        connection = await bench.connect()
        await connection.execute(f"CREATE TABLE {CANARY.replace('-', '_')} AS SELECT '{CANARY}' AS v")
        await connection.execute("SELECT pg_sleep(0)")
        busy = asyncio.create_task(connection.execute("SELECT count(*) FROM generate_series(1, 1000000000)"))
        await asyncio.sleep(0.2)
        files = volume_files(bench)
        assert any(CANARY.encode() in path.read_bytes() for path in files if "pg_wal" in str(path))  # positive control
        assert processes_of(bench)
        outside = bench.agent.directory
        if isolation is Isolation.NAMESPACES:
            assert not list(outside.iterdir())
        os.kill(bench.agent.pid, 9)
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await busy
        ended = await bench.agent.ended
        assert "died" in ended.reason
        await wait_until(lambda: not processes_of(bench))
        await bench.agent.close()
        assert not outside.exists()
        # What is left of the log is noise.
        assert not any(CANARY.encode() in path.read_bytes() for path in bench.scratch.glob("log*"))
        connection.terminate()


@pytest.mark.parametrize("isolation", [Isolation.NAMESPACES, Isolation.NONE])
async def test_revocation_kills_wipes_and_reports(isolation: Isolation) -> None:
    async with agent_bench(isolation) as bench:
        await bench.run()
        connection = await bench.connect()
        busy = asyncio.create_task(connection.execute("SELECT count(*) FROM generate_series(1, 1000000000)"))
        await asyncio.sleep(0.1)
        await bench.leases.revoke(bench.project_id, KeyState.REVOKED, "KMS: disabled")
        ended = await asyncio.wait_for(bench.agent.ended, 5)
        assert ended.key_state is KeyState.REVOKED
        assert "KMS: disabled" in ended.reason
        assert set(ended.steps_s) == {"kill_postgres", "wipe_boot_key", "remove_volume", "remove_log_and_socket"}
        assert sum(ended.steps_s.values()) < 1
        acknowledged = bench.leases.acknowledged[Role.COMPUTE]
        assert acknowledged.steps_s == ended.steps_s
        await wait_until(lambda: not processes_of(bench))
        assert not list(bench.socket_dir.iterdir())
        assert not list(bench.scratch.glob("log*"))
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await busy
        connection.terminate()


async def test_a_partitioned_agent_ends_when_its_lease_runs_out() -> None:
    async with agent_bench() as bench:
        bench.leases.ttl_s = 1.0
        await bench.run()
        await bench.leases.partition()
        ended = await asyncio.wait_for(bench.agent.ended, 5)
        assert "lease ran out" in ended.reason
        await wait_until(lambda: not processes_of(bench))


async def test_end_of_file_on_the_pipe_ends_everything(bench: Bench) -> None:
    await bench.run()
    await asyncio.wait_for(bench.agent.close(), 10)
    assert not processes_of(bench)
    assert not list(bench.socket_dir.iterdir())


async def test_a_graceful_stop_shuts_postgres_down(bench: Bench) -> None:
    await bench.run()
    connection = await bench.connect()
    transaction = connection.transaction()
    await transaction.start()
    assert not await bench.agent.stop_if_unused(0.1, 10)
    await transaction.commit()
    assert not await bench.agent.stop_if_unused(60, 10)
    assert await connection.fetchval("SELECT 1") == 1
    ended = await stop_under_role_changes(bench, connection)
    assert (ended.reason, ended.asked_for) == ("stopped", True)


async def stop_under_role_changes(bench: Bench, connection: Any) -> Ended:
    """Who may log in is listed as it is at the very end: whoever was told that a role is made finds it there."""
    await connection.execute(
        "CREATE ROLE anna LOGIN PASSWORD 's3cret' VALID UNTIL '2199-01-02 03:04:05+00';"
        "CREATE ROLE for_ever LOGIN PASSWORD 'x' VALID UNTIL 'infinity'; CREATE ROLE far LOGIN PASSWORD 'x';"
        "ALTER ROLE far VALID UNTIL '20000-01-01'; CREATE ROLE late LOGIN PASSWORD 'x' VALID UNTIL '2000-01-01';"
        "CREATE ROLE \"a group\" PASSWORD 'x'; CREATE ROLE without LOGIN"
    )
    made: list[str] = []

    async def make_more() -> None:
        with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            while True:
                name = f"r{len(made)}"
                await connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'SCRAM-SHA-256$4096:AAAA${HASH}:{HASH}'")
                made.append(name)

    making = asyncio.create_task(make_more())
    await wait_until(lambda: len(made) > 10)
    await bench.agent.stop(10)
    ended = await bench.agent.ended
    await making
    assert ended.login_roles is not None
    listed, nonce = ended.login_roles.roles, bytes.fromhex(ended.login_roles.mock_nonce)
    names = {"app", "anna", "for_ever", "far", *made}
    untold = f"r{len(made)}"  # was made or not, and nobody was told
    roles = {
        name: listed[digest] for name in (*names, untold) if (digest := role_digest(nonce, name.encode())) in listed
    }
    assert roles.keys() - {untold} == names
    assert len(roles) == len(listed), "and nobody else"
    assert roles["anna"].valid_until == datetime(2199, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert ScramVerifier.parse(roles["anna"].verifier).check_password("s3cret")
    assert ScramVerifier.parse(roles["app"].verifier).check_password("pw")
    assert (roles["for_ever"].valid_until, roles["far"].valid_until) == (None, None)
    return ended


async def test_a_crash_of_postgres_ends_the_agent(bench: Bench) -> None:
    await bench.run()
    connection = await bench.connect()
    connection.terminate()
    os.kill(postmaster_of(bench), signal.SIGKILL)
    ended = await asyncio.wait_for(bench.agent.ended, 10)
    assert "Postgres ended" in ended.reason
    assert ended.crashed


async def test_a_postgres_that_hangs_is_killed(bench: Bench) -> None:
    await bench.run(idle_poll_interval_s=0.05, liveness_timeout_s=0.6)
    connection = await bench.connect()
    await connection.execute("SELECT pg_sleep(1)")  # what is only busy is left alone
    os.kill(postmaster_of(bench), signal.SIGSTOP)
    ended = await asyncio.wait_for(bench.agent.ended, 20)
    assert "has not answered" in ended.reason
    assert ended.crashed
    connection.terminate()


async def test_a_replica_that_hangs_is_noticed_although_its_old_session_goes_on(bench: Bench) -> None:
    boot = bench.boot_message()
    await bench.run()
    follow = Follow(safekeepers=[Address(port=1)], log_start_lsn=bench.source.start_lsn)
    replica = Replica(boot, follow, bench.scratch / "wal", lambda: "", lambda: None)
    replica._session = await bench.connect()
    await replica.look(10)
    assert "startup packet" not in await bench.agent.read_log()
    os.kill(postmaster_of(bench), signal.SIGSTOP)
    assert await replica._session.fetchval("SELECT 1") == 1
    with pytest.raises(TimeoutError):
        await replica.look(0.5)
    replica._session.terminate()


async def _fill_pipe(agent: AgentProcess, tokens: Tokens) -> None:
    while True:  # until it takes no more
        await agent._send(tokens)


async def test_an_agent_that_hangs_is_noticed_and_holds_nobody_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compute.launcher._EXIT_TIMEOUT_S", 0.3)
    await bench.run(liveness_timeout_s=3.0)
    agent, pid = bench.agent, bench.agent.inner_pid
    assert pid is not None
    said = agent._messages
    await wait_until(lambda: agent._messages > said + 1)  # unasked
    os.kill(pid, signal.SIGSTOP)
    await asyncio.wait_for(agent.wait_silent(0.6), 20)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(_fill_pipe(agent, bench.tokens()), 2)
    await asyncio.wait_for(agent.stop(0.1), 20)
    assert "died" in (await asyncio.wait_for(agent.ended, 20)).reason
    await wait_until(lambda: not processes_of(bench))


async def test_refused_leases_and_bad_basebackups_are_reported(bench: Bench) -> None:
    bench.leases.states[bench.project_id] = (KeyState.SUSPENDED, "KMS timeout")
    with pytest.raises(UnavailableError):
        await bench.prepare()
    ended = await bench.agent.ended
    assert ended.key_state is KeyState.SUSPENDED


@pytest.mark.parametrize("fault", ["another cluster", "another position", "torn", "not a tar"])
async def test_bad_basebackups_do_not_start(fault: str) -> None:
    async with agent_bench() as bench:
        changes: dict[str, Any] = {}
        start_lsn = bench.source.start_lsn
        match fault:
            case "another cluster":
                changes["system_identifier"] = 1
            case "another position":
                start_lsn = Lsn(start_lsn.value + 8)
            case "torn":
                bench.source.archive = bench.source.archive[: len(bench.source.archive) // 2]
            case _:
                bench.source.archive = secrets.token_bytes(100_000)
        await bench.prepare(**changes)
        await bench.agent.start(Start(term=1, start_lsn=start_lsn))
        with pytest.raises(UnavailableError):
            await bench.agent.running
        ended = await bench.agent.ended
        assert "basebackup" in ended.reason
        await wait_until(lambda: not processes_of(bench))


async def test_the_tunnel_speaks_tls_with_the_pinned_certificate(bench: Bench) -> None:
    running = await bench.run(tunnel=Address(port=0))
    assert running.compute.certificate_pem is not None
    context = tunnel_client_context(running.compute.certificate_pem)
    reader, writer = await asyncio.open_connection(
        running.compute.host, running.compute.port, ssl=context, server_hostname=TUNNEL_HOST_NAME
    )
    body = b"\0\3\0\0user\0app\0database\0app\0\0"
    writer.write((len(body) + 4).to_bytes(4, "big") + body)
    assert await reader.readexactly(1) == b"R"
    writer.close()
    other = tunnel_client_context(CertificateAuthority().certificate_pem.decode())
    with pytest.raises(ssl.SSLError):
        await asyncio.open_connection(
            running.compute.host, running.compute.port, ssl=other, server_hostname=TUNNEL_HOST_NAME
        )


async def test_nothing_secret_in_argv_or_environment(bench: Bench) -> None:
    await bench.run()
    pid = bench.agent.inner_pid
    assert pid is not None
    for each in [pid, *processes_of(bench)]:
        seen = Path(f"/proc/{each}/cmdline").read_bytes() + Path(f"/proc/{each}/environ").read_bytes()
        assert b"s" * 32 not in seen
        assert b"SCRAM" not in seen
        assert b"eyJ" not in seen  # how every token begins
