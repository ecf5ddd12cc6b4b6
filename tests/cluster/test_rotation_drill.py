"""Every kind of rotation under pgbench, through three clouds, while branches are made, layers compacted and services
killed, the keymanager that leads among them: no transaction fails and no row is lost. The objects lie in a bucket with
versioning, in which a re-key leaves nothing under keys of before, old versions and orphans included."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from keylake.cluster import Cluster, RunningProject
from keylake.demo.ledger import Ledger, Load, check
from keylake.demo.pgbench import run_pgbench
from keylake.encryption import Encryption
from shared.api.keymanager import AwsKey, KeyState
from shared.api.pageserver import Compact, TimelineInfo
from shared.cmk import CmkKey
from shared.errors import ConflictError, UnavailableError
from tests.cluster.primary import call_pageserver
from tests.fixtures.forked_cluster import ForkedCluster
from tests.fixtures.kms_customer_azure import AzureCustomer, azure_customer
from tests.fixtures.kms_customer_google import GoogleCustomer, google_customer
from tests.fixtures.waiting import wait_until
from tests.integration.test_old_versions import envelopes

if TYPE_CHECKING:
    from tests.fixtures.kms_clouds import KmsClouds
    from tests.fixtures.s3 import S3Server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

SCRIPT = "insert into drill (client) values (:client_id);\n"
_PROCESSED = re.compile(r"number of transactions actually processed: ([0-9]+)")
_FAILED = re.compile(r"number of failed transactions: ([0-9]+)")


@dataclass(slots=True)
class Drill:
    """A database under load by pgbench itself, and by clients that keep a ledger."""

    cluster: Cluster
    project: RunningProject
    script: Path
    ledger: Ledger = field(default_factory=Ledger)
    processed: int = 0
    """Transactions that pgbench was told are committed."""

    async def connect(self) -> asyncpg.Connection[asyncpg.Record]:
        return await asyncpg.connect(**self.project.connection.asyncpg_arguments(), timeout=60)

    async def encryption(self) -> Encryption:
        return await self.cluster.client.encryption(self.project.project.project_id)

    @contextlib.asynccontextmanager
    async def load(self) -> AsyncIterator[None]:
        stop = asyncio.Event()

        async def pgbench() -> None:
            while not stop.is_set():
                output = await run_pgbench(self.project.connection, "-n", "-c", "2", "-T", "3", "-f", str(self.script))
                processed, failed = _PROCESSED.search(output), _FAILED.search(output)
                assert processed is not None, output
                assert failed is not None, output
                assert failed[1] == "0", output
                self.processed += int(processed[1])

        async with asyncio.TaskGroup() as group, Load(self.connect, 1, 2, self.ledger) as load:
            group.create_task(pgbench())
            await load.wait_for_commits(50)
            try:
                yield
                await load.wait_for_commits(50)
            finally:
                stop.set()

    async def count(self, project: RunningProject) -> int:
        connection = await asyncpg.connect(**project.connection.asyncpg_arguments(), timeout=60)
        try:
            return int(await connection.fetchval("select count(*) from drill"))
        finally:
            await connection.close()

    async def branch(self, name: str) -> tuple[RunningProject, int]:
        """A branch from now, made while the layers are compacted; and how many rows it has at least."""
        client = self.cluster.client
        least = await self.count(self.project)
        compact = call_pageserver(self.cluster, self.project, "compact", TimelineInfo, Compact(force=True))
        timeline, compacted = await asyncio.gather(client.create_branch(self.project.timeline, name), compact)
        assert not compacted.fault
        endpoint = await client.create_endpoint(timeline, name)
        return RunningProject(self.project.project, timeline, endpoint, client.connection(endpoint)), least

    async def check(self) -> None:
        """Everything that was acknowledged is there, once."""
        connection = await self.connect()
        try:
            assert await connection.fetchval("select count(*) from drill") == self.processed
            assert await check(connection, self.ledger) == []
        finally:
            await connection.close()


async def restart(cluster: Cluster, name: str) -> None:
    """By SIGKILL."""
    await cluster.service(name).kill()
    await cluster.service(name).start()


async def restart_leader(cluster: Cluster) -> None:
    """By SIGKILL: the other keymanager goes on with what this one had begun."""
    leader = await cluster.leader()
    await leader.kill()
    [other] = {"keymanager", "keymanager-2"} - {leader.name}
    assert (await cluster.leader()).name == other
    await leader.start()


@pytest.fixture
def elsewhere(kms_clouds: KmsClouds) -> Iterator[tuple[AzureCustomer, GoogleCustomer]]:
    """The same customer in two other clouds."""
    cloud = kms_clouds.customercloud
    with azure_customer(cloud) as azure, google_customer(cloud, kms_clouds.directory) as google:
        yield azure, google


@pytest.fixture
def bucket(s3_server: S3Server) -> Iterator[tuple[Any, str]]:
    """With versioning, and its owner."""
    with s3_server.versioned_bucket() as made:
        yield made


def leave_an_orphan(owner: Any, bucket: str) -> str:
    """Half of a layer that no index lists, as a pageserver leaves it that dies in the middle of its upload; under a key
    of one that it did upload. Returns its name."""
    beside, version = next((key, version) for key, version in envelopes(owner, bucket) if "/layers/" in key)
    orphan = f"{beside.rpartition('/')[0]}/image-0000000000001000-{'ab' * 8}"
    owner.put_object(Bucket=bucket, Key=orphan, Body=b"half")
    source = {"Bucket": bucket, "Key": beside, "VersionId": version}
    owner.copy_object(Bucket=bucket, Key=f"{orphan}.key", CopySource=source)
    return orphan


async def test_every_rotation_under_load(
    tmp_path: Path,
    elsewhere: tuple[AzureCustomer, GoogleCustomer],
    bucket: tuple[Any, str],
    s3_server: S3Server,
) -> None:
    azure, google = elsewhere
    objects = {"object_store": s3_server.values(bucket[1], "keylake")}
    settings: dict[str, dict[str, Any]] = {
        "pageserver": {"checkpoint_distance_mb": 2} | objects,
        "safekeeper": objects,
        "keymanager": azure.keymanager_settings | google.keymanager_settings,
    }
    async with ForkedCluster(keymanagers=2, settings=settings) as cluster:
        customer, client = cluster.customer, cluster.client
        cmk = await customer.create_key()
        workspace = await cluster.create_workspace(cmk)
        project = await cluster.create_project("drill", workspace.workspace_id)
        project_id, configuration_id = project.project.project_id, workspace.key_configuration_id
        script = tmp_path / "drill.sql"
        script.write_text(SCRIPT)
        drill = Drill(cluster, project, script)
        await run_pgbench(project.connection, "-i", "-s", "1", "-I", "dtGvp", "-q")
        connection = await drill.connect()
        await connection.execute("create table drill (number bigserial, client int)")
        await connection.close()

        async def rewrapped() -> Encryption | None:
            found = await drill.encryption()
            return found if found.rewrapped else None

        async def rekeyed() -> Encryption | None:
            found = await drill.encryption()
            return found if found.dek_floor and found.rekeyed else None

        async with drill.load():
            # KEK, and its envelopes.
            await client.rotate_kek(project_id)
            branches = [await drill.branch("while-wraps-change")]
            after = await wait_until(rewrapped, 60)
            assert [kek.kek_version for kek in after.keks] == [1, 2]
            assert (after.outdated_objects, after.current_share) == (0, 1.0)

            # Again, across restarts of who stores.
            await client.rotate_kek(project_id)
            await restart(cluster, "pageserver")
            await restart(cluster, "safekeeper-2")
            await wait_until(rewrapped, 60)
            looked = await client.retire_keks(project_id, dry_run=True)
            assert looked.retired + sorted({use.kek_version for use in looked.in_use}) == [1, 2]

            # CMK version, then other CMKs: AWS → Azure → Google → AWS. Everything is under the new one, so the customer
            # may disable the old one. In the middle the keymanager is killed that moves the KEKs.
            await asyncio.to_thread(customer.aws.rotate, cmk)
            await client.rewrap(configuration_id)
            assert (await client.rewrap(configuration_id, dry_run=True)).outdated == 0
            bootstrap = customer.bootstrap
            back = AwsKey(
                key_arn=await customer.create_key("another"),
                role_arn=bootstrap.role_arn,
                external_id=bootstrap.external_id,
            )

            async def replaced() -> bool:
                with contextlib.suppress(UnavailableError):  # nobody leads just now
                    return await client.replacement(configuration_id) is None
                return False

            async def replace(key: CmkKey) -> None:
                await client.replace_key(configuration_id, key)
                if key == google.cmk:
                    await restart_leader(cluster)
                await wait_until(replaced, 30)
                [found] = await client.key_configurations()
                assert found.key == key

            await replace(azure.cmk)
            await customer.disable(cmk)
            await replace(google.cmk)
            await asyncio.to_thread(azure.disable)
            await replace(back)
            await asyncio.to_thread(google.disable)

            # All data anew. A store is dead when that begins, so it is not over before the keymanager dies that hands
            # out the new keys, and another store.
            assert (await drill.encryption()).old_version_objects > 0
            orphan = await asyncio.to_thread(leave_an_orphan, *bucket)
            await cluster.service("safekeeper-1").kill()
            begun = await client.rekey(project_id)
            assert begun.dek_floor == 4

            async def half_way() -> bool:
                found = await drill.encryption()
                assert not found.complete
                return found.old_dek_objects < found.objects

            await wait_until(half_way, 30)
            await restart_leader(cluster)
            branches.append(await drill.branch("while-all-is-sealed-anew"))
            await restart(cluster, "pageserver")
            await cluster.service("safekeeper-1").start()
            done = await wait_until(rekeyed, 60)
            assert done.old_dek_bytes == 0

            async def retired() -> bool:
                with contextlib.suppress(ConflictError):  # somebody has not reported yet
                    await client.retire_keks(project_id)
                return all(kek.destroyed for kek in (await drill.encryption()).keks[:-1])

            await wait_until(retired, 30)
            found = await asyncio.to_thread(envelopes, *bucket)
            assert {(envelope.kek_version, envelope.dek_version) for envelope, _ in found.values()} == {(4, 4)}
            versions = await asyncio.to_thread(bucket[0].list_object_versions, Bucket=bucket[1], Prefix=orphan)
            assert "Versions" not in versions
        assert drill.ledger.errors == []
        assert drill.processed > 0
        await drill.check()

        # Nobody's memory helps: everything that holds a key starts anew, with an empty cache.
        await client.kill_endpoint(project.endpoint.endpoint_id)
        keyed = ("keymanager", "keymanager-2", "safekeeper-1", "safekeeper-2", "safekeeper-3", "pageserver")
        for name in keyed:
            await cluster.service(name).kill()
        for name in keyed:
            await cluster.service(name).start()
        await drill.check()
        for branch, least in branches:
            assert least <= await drill.count(branch) <= drill.processed
        final = await drill.encryption()
        assert final.state is KeyState.ACTIVE
        assert [kek.destroyed for kek in final.keks] == [True, True, True, False]
        assert final.complete
        assert (await client.verify_audit()).intact
