"""A project of a whole cluster, shredded; and a backup of everything that was made before.

The backup is all that Keylake has: metadata database, object store, safekeepers. The customer's cloud is not in it: it
is the customer's, and goes on.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import asyncpg
import pytest

from keylake.client import Connection, KeylakeClient
from keylake.cluster import Cluster, RunningProject
from keylake.layout import Layout
from keylake.receipt_page import page
from shared.api.keymanager import KeyState, Project
from shared.api.shredding import Attestation, Shred
from shared.auth import SignatureVerifier, TrustBundle
from shared.deletion import ObjectKind
from shared.errors import (
    ConflictError,
    KeyAccessError,
    KeylakeError,
    RevokedError,
    ShreddedError,
    UnavailableError,
)
from shared.keyspace import Fork, RelTag
from shared.receipt import ErasureReceipt, ShredReceipt, SignedReceipt
from tests.cluster.pages import page_client
from tests.cluster.people import person, shred_by_two
from tests.cluster.processes import below
from tests.cluster.tenants import said_over_http
from tests.cluster_secrecy.keys import metadata
from tests.fixtures.forked_cluster import ForkedCluster
from tests.fixtures.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

SETTINGS = {"keymanager": {"lease_ttl_s": 10, "leader_ttl_s": 6}}
"""Nobody notices that they were stopped for a moment."""
OF_BRANCHES = "no part of it is kept under the keys of a branch"
SECRET = "the quick brown fox is a trade secret"


def at(cluster: Cluster, connection: Connection) -> Connection:
    """The same endpoint, where this cluster listens."""
    return Connection(
        connection.endpoint_id,
        connection.host,
        cluster.ports.addresses().proxy.port,
        connection.user,
        connection.password,
        connection.database,
        cluster.layout.ca_certificate,
    )


async def rows(cluster: Cluster, connection: Connection) -> list[str]:
    found = await asyncpg.connect(**at(cluster, connection).asyncpg_arguments(), timeout=60)
    try:
        return [row["text"] for row in await found.fetch("SELECT text FROM secret ORDER BY text")]
    finally:
        await found.close()


def files_of(home: Path, project: Project) -> list[Path]:
    """Everything of the project on any disk of the cluster, by name."""
    return [p for p in home.rglob("*") if str(project.project_id) in str(p.relative_to(home)) and p.is_file()]


async def verifiers_of(cluster: Cluster, project: Project) -> set[str]:
    """Of the passwords of its roles, the owner's too, as the compute manager's database has them."""
    async with metadata(cluster) as database:
        owners = await database.fetch(
            "SELECT scram_verifier FROM compute.endpoints WHERE project_id = $1", str(project.project_id)
        )
        listed = await database.fetch(
            "SELECT role.value ->> 'verifier' FROM compute.login_roles JOIN compute.timelines USING (timeline_id),"
            " jsonb_each(roles) role WHERE project_id = $1",
            str(project.project_id),
        )
    return {verifier for (verifier,) in (*owners, *listed) if verifier}


async def in_table_files(cluster: Cluster, verifiers: set[str]) -> set[str]:
    """Those that are in the file of any table, as what was deleted is until it is vacuumed. The log is no table."""
    async with metadata(cluster) as database:
        await database.execute("CHECKPOINT")
    content = b"".join(p.read_bytes() for p in (cluster.layout.metadata / "base").rglob("*") if p.is_file())
    return {each for each in verifiers if each.rpartition(":")[2].encode() in content}


async def shred(stack: AsyncExitStack, cluster: Cluster, project: Project) -> Shred:
    """By two people. Returns when everybody has deleted everything."""
    await shred_by_two(stack, cluster, project)

    async def done() -> Shred | None:
        found = await cluster.client.shred(project.project_id)
        return found if found.state == "done" else None

    found = await wait_until(done, 30)
    assert isinstance(found, Shred)
    return found


def snapshot(cluster: Cluster, target: Path) -> None:
    """All that Keylake has on disk, at one moment: every process is stopped while it is copied, as by a power cut."""
    metadata = int((cluster.layout.metadata / "postmaster.pid").read_text().split()[0])
    family = [metadata, *(service.pid for service in cluster.services.values())]
    stopped = family + [process.pid for each in family for process in below(each)]
    try:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        ignored = shutil.ignore_patterns("postmaster.pid")
        shutil.copytree(cluster.layout.home, target, symlinks=True, ignore=ignored)
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


async def erase(cluster: Cluster, carol: KeylakeClient, project: Project, gone: str, alive: str, orphans: Path) -> None:
    """The word ERASED, of a project that is shredded. Two CMKs have wrapped its KEKs; `gone` is destroyed already."""
    home = cluster.layout.home
    words = [
        Attestation(subject="backups", text="the one that this test made is destroyed"),
        Attestation(subject="key-copies", text="the material was made in the KMS"),
    ]
    # Objects that nobody knows of come back, and one of the CMKs is there: not erased, for just that.
    shutil.copytree(orphans, home / "data" / "objects", dirs_exist_ok=True)
    assert files_of(home, project)
    early = await carol.verify_erasure(project.project_id, words)
    assert early.state is KeyState.SHREDDED
    assert {each.name for each in early.preconditions if not each.holds} == {
        "every CMK that ever wrapped one is destroyed",
        "a canary under the key does not open",
    }
    assert {key.identifier: key.destroyed for key in early.keys} == {gone: True, alive: False}
    assert files_of(home, project) == [], "what was found was deleted"
    with pytest.raises(ConflictError, match="not erased"):
        await carol.receipt(project.project_id, kind="erasure")
    await destroy(cluster, alive)
    # Once more, at the very last moment: the look before the word finds them.
    shutil.copytree(orphans, home / "data" / "objects", dirs_exist_ok=True)
    report = await carol.verify_erasure(project.project_id, words)
    assert report.state is KeyState.ERASED, [each for each in report.preconditions if not each.holds]
    assert files_of(home, project) == []
    assert (await cluster.client.project(project.project_id)).state is KeyState.ERASED
    log = {event["requestID"] for event in await cluster.customer.audit_log()}
    for key in report.keys:
        assert key.destroyed
        assert key.request_ids
        assert set(key.request_ids) <= log, "the customer's own log has each question"
    signed = SignedReceipt.parse(await carol.receipt(project.project_id, kind="erasure"))
    signed.check(SignatureVerifier(TrustBundle.load(cluster.layout.trust_bundle)))
    assert isinstance(signed.receipt, ErasureReceipt)
    assert {key.identifier for key in signed.receipt.keys} == {gone, alive}
    assert sum(text.startswith("attested, and not checked") for text in signed.receipt.not_verified) == 2
    assert (await cluster.client.verify_audit()).intact


async def orphaned(cluster: Cluster, branch: RunningProject) -> None:
    """A branch in another project, whose own key is alive: nothing of it can be read, nor branched off, without what it
    was made from, and whoever tries is told that this is for good."""
    assert (await cluster.client.project(branch.project.project_id)).state is KeyState.ACTIVE
    with pytest.raises(asyncpg.PostgresError) as refused:
        await rows(cluster, branch.connection)
    assert refused.value.sqlstate == ShreddedError.sqlstate
    with pytest.raises(KeyAccessError):
        await cluster.client.create_branch(branch.timeline, "of-a-branch")
    async with page_client(cluster, branch) as pages:
        with pytest.raises(KeylakeError):
            await pages.size(RelTag(1663, 1, 1259, Fork.MAIN), branch.timeline.start_lsn.value)


async def metadata_alone(home: Path, backup: Path, running: RunningProject, cmk: str) -> None:
    """A backup of the database without that of the objects and of the safekeepers: keys, and nothing that they open."""
    project = running.project
    shutil.rmtree(Layout(home).metadata)
    shutil.copytree(Layout(backup).metadata, Layout(home).metadata)
    async with ForkedCluster(home, settings=SETTINGS) as cluster:
        assert (await cluster.client.project(project.project_id)).state is KeyState.ACTIVE
        with pytest.raises(asyncpg.PostgresError) as refused:
            await rows(cluster, running.connection)
        assert refused.value.sqlstate == UnavailableError.sqlstate, "its key is there; no safekeeper has its WAL"
        assert files_of(home, project) == []
        await destroy(cluster, cmk)
        await revoked(cluster, project)
        with pytest.raises(asyncpg.PostgresError) as refused:
            await rows(cluster, running.connection)
        assert refused.value.sqlstate == RevokedError.sqlstate
        assert files_of(home, project) == []


async def revoked(cluster: Cluster, project: Project) -> None:
    """Returns when it is, everywhere."""

    async def look() -> bool:
        newest = (await cluster.client.revocations(project.project_id))[:1]
        return any(each.state is KeyState.REVOKED and each.sealed_after_s is not None for each in newest)

    await wait_until(look, 20)


async def destroy(cluster: Cluster, cmk: str) -> None:
    await cluster.customer.schedule_deletion(cmk)
    await asyncio.to_thread(cluster.customer.simulation.complete_deletion, cmk)


async def test_a_backup_brings_it_back_until_the_key_is_destroyed(tmp_path: Path) -> None:
    home, backup = tmp_path / "home", tmp_path / "backup"
    async with ForkedCluster(home, settings=SETTINGS) as cluster, AsyncExitStack() as stack:
        cmk, other_cmk, earlier = [await cluster.customer.create_key(name) for name in ("doomed", "kept", "earlier")]
        workspace = await cluster.create_workspace(earlier, "earlier")
        kept_workspace = await cluster.create_workspace(other_cmk, "kept")
        running = await cluster.create_project("shop", workspace.workspace_id)
        kept = await cluster.create_project("kept", kept_workspace.workspace_id)
        for each in (running, kept):
            connection = await asyncpg.connect(**each.connection.asyncpg_arguments(), timeout=60)
            await connection.execute("CREATE TABLE secret (text text)")
            await connection.execute("INSERT INTO secret VALUES ($1)", SECRET)
            await connection.close()
        doomed = await cluster.create_key_configuration(cmk, "doomed")
        project = await cluster.client.move_project(running.project.project_id, doomed.key_configuration_id)
        # And a branch of it, in a project under the other CMK.
        client = cluster.client
        own = await client.create_project(kept_workspace.workspace_id, "shop/dev")
        timeline = await client.create_branch(running.timeline, "main", project_id=own.project_id)
        endpoint = await client.create_endpoint(timeline)
        branch = RunningProject(own, timeline, endpoint, client.connection(endpoint))
        connection = await asyncpg.connect(**branch.connection.asyncpg_arguments(), timeout=60)
        await connection.execute("UPDATE secret SET text = text || ', twice'")
        await connection.close()
        snapshot(cluster, backup)
        assert files_of(backup, project)

        # Shredded: gone from every disk, and said so by everybody.
        await cluster.client.stop_endpoint(running.endpoint.endpoint_id)  # gracefully: who may log in is listed
        await rows(cluster, running.connection)  # a compute runs, and holds a lease
        before, verifiers = len(files_of(home, project)), await verifiers_of(cluster, project)
        assert await in_table_files(cluster, verifiers) == verifiers
        kept_verifiers = await verifiers_of(cluster, kept.project)
        done = await shred(stack, cluster, project)
        manager, *storage = done.nodes
        assert [node.node_id for node in storage] == ["pageserver", *(f"safekeeper-{n}" for n in (1, 2, 3))]
        assert all(node.deleted_objects > 0 for node in storage)
        assert sum(node.deleted_objects for node in storage) <= before
        assert (manager.node_id, manager.deleted_kinds) == ("compute", "2 verifier"), "its endpoint's, and its list's"
        assert await verifiers_of(cluster, project) == set()
        assert await in_table_files(cluster, verifiers) == set()
        assert await verifiers_of(cluster, kept.project) == kept_verifiers != set()
        assert not [text for text in done.left if "verifiers" in text]
        assert files_of(home, project) == []
        assert done.revocation is not None
        assert {each.outcome for each in done.revocation.instances} == {"acknowledged"}
        assert {each.role.value for each in done.revocation.instances} >= {"compute", "pageserver", "safekeeper"}
        with pytest.raises(asyncpg.PostgresError) as refused:
            await rows(cluster, running.connection)
        assert refused.value.sqlstate == ShreddedError.sqlstate
        await said_over_http(cluster, running, ShreddedError)
        with pytest.raises(KeyAccessError):
            await cluster.client.create_timeline(project.project_id, "another")
        assert await rows(cluster, kept.connection) == [SECRET]
        await orphaned(cluster, branch)
        assert any("shop/dev" in text for text in done.left)
        receipt = SignedReceipt.parse(await cluster.client.receipt(project.project_id, kind="shred"))
        receipt.check(SignatureVerifier(TrustBundle.load(cluster.layout.trust_bundle)))
        assert isinstance(receipt.receipt, ShredReceipt)
        assert any("backup" in text for text in receipt.receipt.left)
        for node in receipt.receipt.nodes:
            kinds = {each.kind: each.objects for each in node.deleted}
            assert sum(kinds.values()) == node.deleted_objects
            expected = {
                "pageserver": {ObjectKind.INDEX, ObjectKind.ENVELOPE},
                "compute": {ObjectKind.VERIFIER},
            }.get(node.node_id, {ObjectKind.WAL, ObjectKind.ENVELOPE})
            assert kinds.keys() >= expected
        assert "pageserver" in page(receipt)
        # A backup of the objects alone opens nothing; and the next look removes it.
        shutil.copytree(backup / "data" / "objects", home / "data" / "objects", dirs_exist_ok=True)
        assert files_of(home, project)
        with pytest.raises(asyncpg.PostgresError):
            await rows(cluster, running.connection)
        early = await (await person(stack, cluster, "carol")).verify_erasure(project.project_id)
        assert early.state is KeyState.SHREDDED
        assert {p.name for p in early.preconditions if p.outcome == "not met"} == {
            "every CMK that ever wrapped one is destroyed",
            "a canary under the key does not open",
            OF_BRANCHES,
        }
        assert files_of(home, project) == []

    copy_cloud(home, backup)
    await metadata_alone(home, backup, running, cmk)  # which is done with its copy of the cloud then

    # The whole backup, as long as the customer's key is alive: everything is back.
    async with ForkedCluster(backup, settings=SETTINGS) as cluster, AsyncExitStack() as stack:
        assert (await cluster.client.project(project.project_id)).state is KeyState.ACTIVE
        assert await rows(cluster, running.connection) == [SECRET]
        # Now the customer destroys it.
        await destroy(cluster, cmk)
        await revoked(cluster, project)
        with pytest.raises(asyncpg.PostgresError) as refused:
            await rows(cluster, running.connection)
        assert refused.value.sqlstate == RevokedError.sqlstate
        # And it is erased here as well: with a CMK that is gone and one, of before the move, that is not yet.
        orphans = tmp_path / "orphans"
        for path in files_of(backup / "data" / "objects", project):
            target = orphans / path.relative_to(backup / "data" / "objects")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        await shred(stack, cluster, project)
        assert files_of(backup, project) == []
        carol = await person(stack, cluster, "carol")
        held_up = await carol.verify_erasure(project.project_id)
        [by_branch] = [each for each in held_up.preconditions if each.name == OF_BRANCHES]
        assert by_branch.outcome == "not met"
        assert f"shop/dev ({own.project_id}) is ACTIVE" in by_branch.evidence[0]
        await shred(stack, cluster, own)
        await erase(cluster, carol, project, cmk, earlier, orphans)

        async def said_to_be_shredded() -> bool:
            with pytest.raises(asyncpg.PostgresError) as refused:
                await rows(cluster, running.connection)
            return refused.value.sqlstate == ShreddedError.sqlstate

        await wait_until(said_to_be_shredded)  # the proxy knew it as revoked, and asks anew with its next renewal


def copy_cloud(source: Path, target: Path) -> None:
    """The customer's cloud is one: where it is, it is as it was last."""
    shutil.rmtree(target / "data" / "customercloud")
    shutil.copytree(source / "data" / "customercloud", target / "data" / "customercloud")
