"""Altered and exchanged rows of the metadata database: a typed error, never a key, never another project's data.

The audit chain has its own: tests/integration/test_keymanager_api.py alters it where nobody else writes meanwhile.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from keylake.cluster import Cluster, RunningProject
from shared.api.compute import EndpointState
from shared.api.keymanager import KeyState, ObjectName, Project, Role
from shared.auth import TokenIssuer
from shared.config import Address
from shared.errors import KeylakeError
from shared.ids import ProjectId, TimelineId
from shared.keyclient import KeyClient
from shared.keysession import session_tokens
from shared.lease import KeyLoss
from shared.wire.scram import SALT_LENGTH_BYTES, ScramVerifier
from tests.cluster_secrecy.keys import metadata
from tests.cluster_secrecy.storage import stop_and_settle, without_keys
from tests.fixtures.forked_cluster import ForkedCluster
from tests.fixtures.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

ROWS = "select count(*), min(body), max(body) from t"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[Cluster]:
    async with ForkedCluster(settings={"compute": {"poll_interval_s": 0.2}}) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(cluster: Cluster) -> tuple[RunningProject, RunningProject]:
    """Two projects of one workspace, each with one row that says whose it is."""
    one = await cluster.create_project("one")
    other = await cluster.create_project("other", one.project.workspace_id)
    for project in (one, other):
        connection = await connect(project)
        await connection.execute(f"create table t as select '{project.project.name}' as body")
        await connection.close()
        await stop_and_settle(project, cluster)
    return one, other


async def connect(project: RunningProject, password: str | None = None) -> asyncpg.Connection[asyncpg.Record]:
    arguments = project.connection.asyncpg_arguments()
    if password is not None:
        arguments["password"] = password
    return await asyncpg.connect(**arguments, timeout=60)


async def assert_own_row(cluster: Cluster, project: RunningProject) -> None:
    connection = await connect(project)
    name = project.project.name
    assert tuple(await connection.fetchrow(ROWS) or ()) == (1, name, name)
    await connection.close()
    await stop_and_settle(project, cluster)


@asynccontextmanager
async def altered(cluster: Cluster, *tables: str) -> AsyncIterator[Any]:
    """A superuser's connection; afterwards these tables are as they were."""
    async with metadata(cluster) as connection:
        for table in tables:
            await connection.execute(f"create table {kept(table)} as table {table}")
        try:
            yield connection
        finally:
            # No foreign keys and no triggers meanwhile.
            await connection.execute("set session_replication_role = replica")
            for table in tables:
                await connection.execute(f"delete from {table}; insert into {table} select * from {kept(table)}")  # noqa: S608
                await connection.execute(f"drop table {kept(table)}")


SESSIONS = 6
"""Of three safekeepers, the pageserver, the compute manager, the proxy; computes have more."""


def kept(table: str) -> str:
    return f"public.kept_{table.replace('.', '_')}"


async def restart_keymanager(cluster: Cluster) -> None:
    """What it knows of keys it has read when it started. Every service has its session again when this returns."""
    await cluster.service("keymanager").kill()
    await cluster.service("keymanager").start()

    async def all_are_back() -> bool:
        return (await cluster.client.keymanager_status()).instances >= SESSIONS

    await wait_until(all_are_back)


# --- KEKs ---


async def lost(loss: KeyLoss) -> dict[str, float]:
    return {}


@asynccontextmanager
async def key_client(cluster: Cluster) -> AsyncIterator[KeyClient]:
    """As a pageserver."""
    issuer = TokenIssuer.load(cluster.layout.keys / "pageserver.json")
    async with KeyClient(
        Address(port=cluster.ports.keymanager),
        cluster.layout.ca_certificate,
        session_tokens(issuer),
        role=Role.PAGESERVER,
        node_id="a-test",
        request_timeout_s=3.0,
    ) as keys:
        yield keys


async def use(keys: KeyClient, project_id: ProjectId) -> None:
    """Have a DEK made and opened again. Raises what is in the way."""
    name = ObjectName(timeline_id=TimelineId.new(), object_name="test", kind="test/1")
    await keys.acquire(project_id, lost)
    try:
        [(_, envelope)] = await keys.generate(project_id, [name])
        await keys.unwrap(project_id, [(name, envelope)])
    finally:
        await keys.release(project_id)


BLOB = {"magic": 0, "version": 4, "key id": 10, "key material id": 30, "KDF nonce": 60, "IV": 75, "KEK": 90, "tag": -1}
FLIP = "update kek set wrapped = set_bit(wrapped, ($2::int + length(wrapped)) % length(wrapped) * 8, 1 - get_bit("
FLIP += "wrapped, ($2::int + length(wrapped)) % length(wrapped) * 8)) where project_id = $1"
STATEMENTS = {
    "cut": "update kek set wrapped = substr(wrapped, 1, length(wrapped) - 1) where project_id = $1",
    "emptied": "update kek set wrapped = '' where project_id = $1",
    "null": "update kek set wrapped = null where project_id = $1",
    "a million zeros": "update kek set wrapped = decode(repeat('00', 1000000), 'hex') where project_id = $1",
    "another version": "update kek set kek_version = 7 where project_id = $1",
    "another id": "update kek set kek_id = 'kek-0123456789abcdef' where project_id = $1",
    "no row": "delete from kek where project_id = $1",
}


async def test_an_altered_kek_opens_nothing(cluster: Cluster) -> None:
    """One project per case, so that one restart is enough for all."""
    workspace = await cluster.create_workspace(name="altered KEKs")
    projects: dict[str, Project] = {}
    for name in (*BLOB, *STATEMENTS):
        projects[name] = await cluster.client.create_project(workspace.workspace_id, name)
    healthy = await cluster.client.create_project(workspace.workspace_id, "healthy")
    async with altered(cluster, "kek") as database:
        for name, at in BLOB.items():
            await database.execute(FLIP, str(projects[name].project_id), at)
        for name, statement in STATEMENTS.items():
            await database.execute(statement, str(projects[name].project_id))
        await restart_keymanager(cluster)
        async with key_client(cluster) as keys:
            await use(keys, healthy.project_id)
            for name, project in projects.items():
                with pytest.raises(KeylakeError) as caught:
                    await use(keys, project.project_id)
                assert caught.value.code in ("unavailable", "integrity", "corrupted"), name
    await restart_keymanager(cluster)
    failed = [record for record in await cluster.client.audit() if record.action == "kek.unwrap"]
    assert {record.project_id for record in failed if record.details.get("kms_verdict") == "corrupt"} >= {
        projects[name].project_id for name in BLOB
    }
    async with key_client(cluster) as keys:
        for project in projects.values():
            await use(keys, project.project_id)


async def test_exchanged_keks_open_nothing_and_show_nothing_of_each_other(
    cluster: Cluster, pair: tuple[RunningProject, RunningProject]
) -> None:
    ids = [str(project.project.project_id) for project in pair]
    for columns in ("wrapped", "wrapped, kek_id"):
        async with altered(cluster, "kek") as database:
            await database.execute(
                f"update kek mine set ({columns}) = (select {columns} from kek where project_id ="  # noqa: S608
                " case mine.project_id when $1 then $2 else $1 end) where project_id in ($1, $2)",
                *ids,
            )
            await restart_keymanager(cluster)
            # What a service has opened stays open under its lease: so the leases are ended once.
            async with without_keys(cluster, *(project.project.project_id for project in pair)):
                pass
            for project in pair:
                with pytest.raises(KeylakeError):
                    await cluster.client.start_endpoint(project.endpoint.endpoint_id)
                assert (await cluster.client.endpoint(project.endpoint.endpoint_id)).state is EndpointState.STOPPED
        await restart_keymanager(cluster)
        # A safekeeper that was told that its log's key is not genuine trusts that log no more until it is restarted.
        for name in ("safekeeper-1", "safekeeper-2", "safekeeper-3"):
            await cluster.service(name).kill()
            await cluster.service(name).start()
        for project in pair:
            await assert_served_again(cluster, project)


async def assert_served_again(cluster: Cluster, project: RunningProject) -> None:
    """Storage loads its timelines again by itself, when it can."""

    async def look() -> bool:
        try:
            await cluster.client.start_endpoint(project.endpoint.endpoint_id)
        except KeylakeError:
            return False
        return True

    await wait_until(look, 30)
    await assert_own_row(cluster, project)


async def test_an_altered_canary_suspends_and_never_revokes(cluster: Cluster) -> None:
    """The watcher's probe fails then; that is our damage and not the customer's word."""
    workspace = await cluster.create_workspace(name="altered canary")
    project = await cluster.client.create_project(workspace.workspace_id, "altered canary")

    async def state(*wanted: KeyState) -> bool:
        return (await cluster.client.project(project.project_id)).state in wanted

    async with altered(cluster, "key_configuration") as database:
        await database.execute(
            "update key_configuration set canary_wrapped = set_byte(canary_wrapped, 90,"
            " 255 - get_byte(canary_wrapped, 90)) where key_configuration_id = $1",
            str(workspace.key_configuration_id),
        )
        await restart_keymanager(cluster)
        await wait_until(lambda: state(KeyState.SUSPENDED, KeyState.REVOKED))
        assert await state(KeyState.SUSPENDED)
    await restart_keymanager(cluster)
    await wait_until(lambda: state(KeyState.ACTIVE))


# --- whose is what ---


async def test_an_endpoint_turned_to_another_projects_timeline_shows_nothing(
    cluster: Cluster, pair: tuple[RunningProject, RunningProject]
) -> None:
    one, other = pair
    changes = {
        "compute.endpoints": (
            "update compute.endpoints set timeline_id = $1 where endpoint_id = $2",
            [str(other.timeline.timeline_id), str(one.endpoint.endpoint_id)],
        ),
        "compute.timelines": (
            "update compute.timelines set project_id = $1, name = 'stolen' where timeline_id = $2",
            [str(other.project.project_id), str(one.timeline.timeline_id)],
        ),
    }
    for table, (statement, arguments) in changes.items():
        async with altered(cluster, table) as database:
            await database.execute(statement, *arguments)
            with pytest.raises((asyncpg.PostgresError, KeylakeError)) as caught:
                await (await connect(one)).close()
            assert getattr(caught.value, "sqlstate", None) != "XX000", caught.value
        assert (await cluster.client.endpoint(one.endpoint.endpoint_id)).state is EndpointState.STOPPED
        for project in pair:
            await assert_own_row(cluster, project)


async def test_a_verifier_put_into_the_database_logs_nobody_in(
    cluster: Cluster, pair: tuple[RunningProject, RunningProject]
) -> None:
    """It is for the first start of an endpoint. From then on the password is the sealed database's own."""
    one, _ = pair
    password = secrets.token_urlsafe(24)
    verifier = ScramVerifier.compute(password, secrets.token_bytes(SALT_LENGTH_BYTES)).serialize()
    async with altered(cluster, "compute.endpoints") as database:
        await database.execute(
            "update compute.endpoints set scram_verifier = $1 where endpoint_id = $2",
            verifier,
            str(one.endpoint.endpoint_id),
        )
        with pytest.raises(asyncpg.InvalidPasswordError):
            await connect(one, password)
        await assert_own_row(cluster, one)
