"""The end of a project at a real keymanager: two people, all wraps, all leases, every node, and what is left."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from customercloud.faults import Faults
from keylake.receipt_page import page
from shared.api.keymanager import AwsKey, KeyState, MoveProject, Project, RegisterToken, ReplaceKey, Replacement, Role
from shared.api.shredding import ApproveShred, AskShred, Attestation, ErasureReport, Shred, VerifyErasure
from shared.auth import BearerToken, PersonRole, Service, SignatureVerifier, TrustBundle
from shared.clock import SystemClock
from shared.deletion import Deleted, Deletion, ObjectKind
from shared.errors import (
    ConflictError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    ShreddedError,
)
from shared.http import ServiceClient
from shared.ids import ProjectId
from shared.keyholding import HeldProject
from shared.receipt import ErasureReceipt, ShredReceipt, SignedReceipt
from tests.fixtures.key_source_contract import Losses, named
from tests.fixtures.keymanager import Keymanager, special_keymanager
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from shared.keyclient import KeyClient
    from shared.lease import KeyLoss
    from tests.fixtures.customercloud import CloudProcess
    from tests.fixtures.keymanager import Trust

pytestmark = pytest.mark.integration


@dataclass
class People:
    """Two security admins, and the same person twice."""

    manager: Keymanager
    alice: ServiceClient
    alice_again: ServiceClient
    bob: ServiceClient
    owner: ServiceClient

    async def ask(self, client: ServiceClient, project: Project, name: str | None = None) -> Shred:
        body = AskShred(project_name=name or project.name, reason="the contract has ended")
        return await client.call(Shred, "POST", f"/v1/projects/{project.project_id}/shred", body=body)

    async def approve(self, client: ServiceClient, project: Project, shred_id: str, name: str | None = None) -> Shred:
        body = ApproveShred(project_name=name or project.name, shred_id=shred_id)
        path = f"/v1/projects/{project.project_id}/shred:approve"
        return await client.call(Shred, "POST", path, body=body, timeout_s=60)

    async def status(self, project_id: ProjectId) -> Shred:
        return await self.owner.call(Shred, "GET", f"/v1/projects/{project_id}/shred")

    async def cancel(self, client: ServiceClient, project_id: ProjectId) -> Shred:
        return await client.call(Shred, "DELETE", f"/v1/projects/{project_id}/shred")


@asynccontextmanager
async def people_of(manager: Keymanager) -> AsyncIterator[People]:
    async with AsyncExitStack() as stack:
        owner = await stack.enter_async_context(manager.client())

        async def person(subject: str) -> ServiceClient:
            token = manager.trust.admin.issue_for_person(PersonRole.SECURITY_ADMIN, subject=subject, ttl_s=600)
            await owner.request("POST", "/v1/tokens", body=RegisterToken(token=token))
            ca, address = manager.trust.ca_certificate, manager.address
            client = ServiceClient(Service.KEYMANAGER, address, ca, BearerToken(token), frozenset())
            return await stack.enter_async_context(client)

        yield People(manager, await person("alice"), await person("Alice"), await person("bob"), owner)


@pytest.fixture
async def manager(
    tmp_path: Path, trust: Trust, metadata_dsn: str, shared_cloud: CloudProcess
) -> AsyncIterator[Keymanager]:
    options: dict[str, Any] = {"audit_anchors": {"url": (tmp_path / "anchors").as_uri()}}
    async with special_keymanager(tmp_path, trust, metadata_dsn, shared_cloud, **options) as made:
        await made.start()
        yield made


async def wraps(manager: Keymanager) -> list[bytes]:
    """Every wrapped KEK in the database."""
    connection = await asyncpg.connect(manager.dsn)
    try:
        rows = await connection.fetch(
            "SELECT wrapped FROM keymanager.kek WHERE wrapped IS NOT NULL "
            "UNION ALL SELECT wrapped FROM keymanager.staged_kek"
        )
        return [row["wrapped"] for row in rows]
    finally:
        await connection.close()


async def in_table_files(manager: Keymanager, texts: list[bytes]) -> int:
    """How many of `texts` are in the files of the tables of KEKs, as they are on disk."""
    connection = await asyncpg.connect(manager.dsn)
    try:
        await connection.execute("CHECKPOINT")
        root = Path(await connection.fetchval("SHOW data_directory"))
        paths = await connection.fetch(
            "SELECT pg_relation_filepath(oid) AS path FROM pg_class WHERE relname IN ('kek', 'staged_kek')"
        )
        content = b"".join((root / row["path"]).read_bytes() for row in paths)
        # Whatever else there is of this database: the file of before, if it were still there.
        others = b"".join(p.read_bytes() for p in (root / paths[0]["path"]).parent.iterdir() if p.is_file())
    finally:
        await connection.close()
    return sum(text in content or text in others for text in texts)


async def test_it_takes_two_people_who_mean_the_same_thing(manager: Keymanager) -> None:
    customer = manager.tenant.customer
    cmk = await asyncio.to_thread(customer.create_key, role_arn=manager.tenant.role_arn)
    project, other = await manager.new_project(cmk), await manager.new_project(cmk)
    async with people_of(manager) as people:
        with pytest.raises(NotFoundError, match="nobody has asked"):
            await people.status(project.project_id)
        with pytest.raises(ConflictError, match="waits for an approval"):
            await people.approve(people.bob, project, "shr-0123456789abcdef")
        with pytest.raises(InvalidInputError, match="not the name of this project"):
            await people.ask(people.alice, project, other.name)
        with pytest.raises(PermissionDeniedError, match="two people"):
            await people.ask(people.owner, project)
        asked = await people.ask(people.alice, project)
        assert (asked.state, asked.keks_destroyed, asked.left) == ("asked", 0, [])
        assert asked.expires_at - asked.asked_at == timedelta(hours=24)
        with pytest.raises(ConflictError, match="has asked already"):
            await people.ask(people.bob, project)
        for same in (people.alice, people.alice_again):
            with pytest.raises(PermissionDeniedError, match="another person"):
                await people.approve(same, project, asked.shred_id)
        with pytest.raises(PermissionDeniedError, match="two people"):
            await people.approve(people.owner, project, asked.shred_id)
        with pytest.raises(InvalidInputError):
            await people.approve(people.bob, project, asked.shred_id, other.name)
        with pytest.raises(ConflictError, match="look at it first"):
            await people.approve(people.bob, project, "shr-0123456789abcdef")
        assert (await manager.project(project.project_id)).state is KeyState.ACTIVE
        assert (await people.cancel(people.bob, project.project_id)).state == "cancelled"
        with pytest.raises(ConflictError, match="cancelled"):
            await people.approve(people.bob, project, asked.shred_id)
        # Too late is not in time.
        again = await people.ask(people.bob, project)
        connection = await asyncpg.connect(manager.dsn)
        await connection.execute("UPDATE keymanager.shred SET expires_at = now() WHERE shred_id = $1", again.shred_id)
        await connection.close()
        assert (await people.status(project.project_id)).state == "expired"
        with pytest.raises(ConflictError, match="not approved in time"):
            await people.approve(people.alice, project, again.shred_id)
        assert len(await wraps(manager)) == 2
        assert (await manager.project(project.project_id)).state is KeyState.ACTIVE
        final = await people.ask(people.bob, project)
        done = await people.approve(people.alice, project, final.shred_id)
        assert (done.state, done.keks_destroyed) in [("deleting", 1), ("done", 1)]
        assert (done.asked_by.split(":")[1], (done.decided_by or "").split(":")[1]) == ("bob", "alice")
        with pytest.raises(ConflictError, match="is shredded"):
            await people.ask(people.alice, project)
        assert (await manager.project(other.project_id)).state is KeyState.ACTIVE
    actions = ["shred.ask", "shred.approve", "shred.cancel", "shred.ask", "shred.expire", "shred.ask", "shred.approve"]
    recorded = [r for a in sorted(set(actions)) for r in await manager.audit(a)]
    in_order = sorted(recorded, key=lambda record: record["sequence"])
    outcomes = [(r["action"], r["outcome"]) for r in in_order if r["outcome"] == "ok"]
    assert outcomes == [
        ("shred.ask", "ok"),
        ("shred.cancel", "ok"),
        ("shred.ask", "ok"),
        ("shred.expire", "ok"),
        ("shred.ask", "ok"),
        ("shred.approve", "ok"),
    ]
    assert sum(r["outcome"] == "permission_denied" for r in in_order) == 2
    assert (await manager.verify_audit()).intact


class Store:
    """A node's storage, as far as the keymanager sees it."""

    def __init__(self, objects: int, left: int = 0) -> None:
        self.objects = objects
        self.left = left
        self.looks = 0

    async def delete(self, _: ProjectId) -> Deletion:
        self.looks += 1
        deleted, self.objects = self.objects, 0
        remains = ("a layer: AccessDenied",) if self.left else ()
        gone = {ObjectKind.LAYER: Deleted(deleted, deleted // 2, deleted * 100)} if deleted else {}
        return Deletion(gone, self.left, remains)


async def test_everything_goes_everywhere_and_never_comes_back(manager: Keymanager) -> None:
    customer = manager.tenant.customer
    cmk, new, survivor = [
        await asyncio.to_thread(customer.create_key, role_arn=manager.tenant.role_arn) for _ in range(3)
    ]
    configuration, workspace = await manager.bind(cmk)
    project, other = await manager.create_project(workspace), await manager.create_project(workspace)
    project_id = project.project_id
    losses = Losses()
    may_answer = asyncio.Event()

    async def slow(loss: KeyLoss) -> dict[str, float]:
        await may_answer.wait()
        return await losses(loss)

    async with AsyncExitStack() as stack:
        people = await stack.enter_async_context(people_of(manager))
        pageserver = await stack.enter_async_context(manager.key_client(Role.PAGESERVER))
        away = await stack.enter_async_context(manager.key_client(Role.SAFEKEEPER, "safekeeper-1"))
        lease = await pageserver.acquire(project_id, slow)
        await away.acquire(project_id, Losses())
        [(_, envelope)] = await pageserver.generate(project_id, [thing := named()])
        branch, below = await manager.new_project(survivor), await manager.new_project(survivor)
        for each, ancestor in ((branch, project), (below, branch), (branch, project)):
            await pageserver.acquire(each.project_id, Losses())
            await pageserver.note_branch(each.project_id, ancestor.project_id)
        assert len(await manager.audit("project.branch")) == 2
        await away.generate(project_id, [named()])
        store = Store(7, left=2)
        stack.enter_context(background(pageserver.tend_deletions(store.delete)))
        for _ in range(6):
            await people.owner.call(Project, "POST", f"/v1/projects/{project_id}/keks:rotate", timeout_s=30)
        # Another CMK is on its way in, and gets stuck: some KEKs wait as it wrapped them.
        await asyncio.to_thread(manager.tenant.admin.set_faults, Faults(latency_s=0.05))
        aws = AwsKey(key_arn=new, role_arn=manager.tenant.role_arn, external_id=manager.tenant.names.external_id)
        path = f"/v1/key-configurations/{configuration.key_configuration_id}"
        await people.owner.call(Replacement, "POST", f"{path}:replace", body=ReplaceKey(key=aws), timeout_s=30)
        await wait_until(lambda: staged(manager))
        await asyncio.to_thread(customer.disable, new)
        await asyncio.to_thread(manager.tenant.admin.clear_faults)
        before = await wraps(manager)
        assert len(before) > 8, "eight in use, and staged ones"
        assert await in_table_files(manager, before) == len(before), "the search finds what is there"
        await away.aclose()

        asked = await people.ask(people.alice, project)
        approved = await people.approve(people.bob, project, asked.shred_id)
        assert (approved.state, approved.keks_destroyed) == ("deleting", 7)
        assert approved.staged_destroyed >= 1
        # Gone from the database, its files too; but for the other projects'.
        kept = [wrap for wrap in before if wrap in await wraps(manager)]
        assert 3 <= len(kept) <= 4
        assert await in_table_files(manager, [wrap for wrap in before if wrap not in kept]) == 0
        assert (await manager.project(project_id)).state is KeyState.SHREDDED
        assert all(kek.destroyed for kek in (await manager.project(project_id)).keks)
        with pytest.raises(ShreddedError):
            await pageserver.unwrap(project_id, [(thing, envelope)])
        # Nobody deletes before the last lease is over.
        assert store.looks == 0
        may_answer.set()
        sealed = await manager.wait_sealed(project_id)
        assert sealed.state is KeyState.SHREDDED
        assert {i.outcome for i in sealed.instances} == {"acknowledged"}
        assert losses.seen[-1].state is KeyState.SHREDDED
        assert not lease.live
        await wait_until(lambda: store.looks >= 1)

        async def said() -> Shred | None:
            found = await people.status(project_id)
            return found if any(node.looked_at for node in found.nodes) else None

        found = await wait_until(said)
        assert found is not None
        assert found.state == "deleting"
        here, gone = sorted(found.nodes, key=lambda node: node.node_id)
        assert (here.deleted_objects, here.deleted_size_bytes, here.left_objects) == (7, 700, 2)
        assert (here.holds_keys, gone.looked_at) == (False, None)
        text = "\n".join(found.left)
        for word in ("AccessDenied", "safekeeper-1", cmk, new, "write-ahead log", "backups"):
            assert word in text, text
        assert "were not written anew" not in text

        # A node that was away is told when it is back, by whichever keymanager leads then.
        manager.kill()
        await manager.start()
        back = Store(3)
        again = await stack.enter_async_context(manager.key_client(Role.SAFEKEEPER, "safekeeper-1"))
        stack.enter_context(background(again.tend_deletions(back.delete)))
        await wait_until(lambda: back.looks >= 1)
        store.left = 0

        async def done() -> bool:
            return (await people.status(project_id)).state == "done"

        # What could not be deleted is tried again when the node comes back.
        returned = await stack.enter_async_context(manager.key_client(Role.PAGESERVER))
        stack.enter_context(background(returned.tend_deletions(store.delete)))
        await wait_until(done)
        assert (await manager.project(project_id)).state is KeyState.SHREDDED
        with pytest.raises(ShreddedError):
            await again.acquire(project_id, Losses())
        with pytest.raises(ConflictError, match="nothing restores it"):
            await people.owner.request("POST", f"/v1/projects/{project_id}:restore", timeout_s=30)
        with pytest.raises(ShreddedError) as refused:
            await people.owner.request("POST", f"/v1/projects/{project_id}/keks:rotate")
        assert refused.value.workspace_id == project.workspace_id
        own, _ = await manager.bind(cmk)
        body = MoveProject(key_configuration_id=own.key_configuration_id)
        with pytest.raises(ShreddedError):
            await people.owner.request("POST", f"/v1/projects/{project_id}:move-key", body=body, timeout_s=30)
        # A node has no way to say that something else is to go.
        session = again._session
        assert session is not None
        with pytest.raises(ConflictError, match="not shredded"):
            await session.report_deletion(other.project_id, Deletion(), 5, holds_keys=False)
        await again.acquire(other.project_id, Losses())
        await again.generate(other.project_id, [named()])
        # A branch of a branch that a node told of when all were alive.
        with pytest.raises(ShreddedError):
            await again.note_branch(other.project_id, project_id)
        sought = Sought(manager, people, project, other, returned, store, before[0])
        await erase(sought, (cmk, new), [branch, below])
    assert (await manager.verify_audit()).intact


@dataclass
class Sought:
    """Where the word ERASED is to be had for a project that is shredded, and what may keep it back."""

    manager: Keymanager
    people: People
    project: Project
    other: Project
    """Under the same CMK, and not shredded."""
    node: KeyClient
    """One that answers, …"""
    store: Store
    """… and what it stores."""
    wrap: bytes
    """An old copy of a wrapped KEK."""


async def erase(sought: Sought, cmks: tuple[str, str], branches: list[Project]) -> None:
    """The word ERASED, and every step on the way to it."""
    manager, people, project_id = sought.manager, sought.people, sought.project.project_id
    customer = manager.tenant.customer
    words = [
        Attestation(subject="backups", text="none outside of the account"),
        Attestation(subject="key-copies", text="the material was made in the KMS"),
    ]

    async def verify(client: ServiceClient, said: list[Attestation]) -> tuple[ErasureReport, dict[str, str]]:
        body = VerifyErasure(attestations=said)
        path = f"/v1/projects/{project_id}:verify-erasure"
        report = await client.call(ErasureReport, "POST", path, body=body, timeout_s=60)
        return report, {each.name: each.outcome for each in report.preconditions if not each.holds}

    async def receipt(kind: str) -> SignedReceipt:
        path, params = f"/v1/projects/{project_id}/receipt", {"kind": kind}
        content = (await people.owner.request("GET", path, params=params)).content
        signed = SignedReceipt.parse(content)
        signed.check(SignatureVerifier(TrustBundle.load(manager.trust.directory / "trust.json")))
        return signed

    with pytest.raises(PermissionDeniedError, match="a person's word"):
        await verify(people.owner, words)
    report, missing = await verify(people.alice, words)
    assert report.state is KeyState.SHREDDED
    assert missing == {
        "every CMK that ever wrapped one is destroyed": "not met",
        "a canary under the key does not open": "not met",
        "no part of it is kept under the keys of a branch": "not met",
    }
    evidence = {each.name: "; ".join(each.evidence) for each in report.preconditions}
    for branch in branches:
        assert str(branch.project_id) in evidence["no part of it is kept under the keys of a branch"]
        assert str(branch.project_id) in str((await people.status(project_id)).left)
        await people.approve(people.bob, branch, (await people.ask(people.alice, branch)).shred_id)
    tried = evidence["no live KEK opens what its KEKs sealed"]
    assert re.match(r"[1-9]\d* live KEKs were tried on 7 canaries", tried)
    assert {key.identifier for key in report.keys} == set(cmks), "also the one that wrapped what was only staged"
    with pytest.raises(ConflictError, match="not erased"):
        await receipt("erasure")
    # On its way to destruction is not destroyed; and one of two is not all.
    for cmk in cmks:
        await asyncio.to_thread(customer.schedule_deletion, cmk)
    await asyncio.to_thread(manager.tenant.admin.complete_deletion, cmks[0])
    # What is stopped by that, too, cannot be tried: it takes a word that it does not come back.
    await manager.wait_state(sought.other.project_id, KeyState.REVOKED)
    report, missing = await verify(people.alice, words)
    assert missing == {
        "every CMK that ever wrapped one is destroyed": "not met",
        "no live KEK opens what its KEKs sealed": "not checked",
    }
    assert f"version 1 of {sought.other.project_id}, which is REVOKED" in str(report.preconditions)
    words.append(Attestation(subject="stopped-projects", text="their key is destroyed"))
    report, missing = await verify(people.alice, words)
    assert missing == {"every CMK that ever wrapped one is destroyed": "not met"}
    assert "pending deletion" in str(report.preconditions)
    await asyncio.to_thread(manager.tenant.admin.complete_deletion, cmks[1])
    report, missing = await verify(people.owner, [])
    assert set(missing.values()) == {"not checked"}
    assert len(missing) == 3
    assert (await manager.project(project_id)).state is KeyState.SHREDDED
    await each_keeps_the_word_back(sought, lambda: verify(people.alice, words))
    report, missing = await verify(people.alice, words)
    assert (report.state, missing) == (KeyState.ERASED, {})
    assert (await manager.project(project_id)).state is KeyState.ERASED
    assert (await verify(people.owner, []))[0] == report, "what was checked then is what there is to see"
    log = {event["requestID"] for event in await asyncio.to_thread(manager.tenant.admin.audit_log)}
    for key in report.keys:
        assert key.destroyed
        assert key.request_ids
        assert set(key.request_ids) <= log

    shred = (await receipt("shred")).receipt
    assert isinstance(shred, ShredReceipt)
    assert (shred.state, shred.keks_destroyed) == ("SHREDDED", 7)
    assert sum(node.deleted_objects for node in shred.nodes) == 10
    assert all(kek.destroyed for kek in shred.keks)
    assert any("nothing is left" in text for text in shred.verified)
    signed = await receipt("erasure")
    erasure = signed.receipt
    assert isinstance(erasure, ErasureReceipt)
    assert {key.identifier for key in erasure.keys} == set(cmks)
    assert sum(each.outcome == "attested" for each in erasure.preconditions) == 3
    assert sum(text.startswith("attested, and not checked") for text in erasure.not_verified) == 3
    assert "made in the KMS" in page(signed)
    # It is so after a restart, too.
    manager.kill()
    await manager.start()
    assert (await manager.project(project_id)).state is KeyState.ERASED
    assert (await receipt("erasure")).receipt.state == "ERASED"


async def each_keeps_the_word_back(
    sought: Sought, verify: Callable[[], Awaitable[tuple[ErasureReport, dict[str, str]]]]
) -> None:
    """What was found by looking is made untrue, one thing at a time: where it is looked for, and by nothing else."""
    manager, project = sought.manager, sought.project
    connection = await asyncpg.connect(manager.dsn, server_settings={"search_path": "keymanager"})
    own = "project_id = $1 AND kek_version = 1"
    project_id = str(project.project_id)
    try:
        # Somebody brings a wrap back from a backup.
        await connection.execute(f"UPDATE kek SET wrapped = $2 WHERE {own}", project_id, sought.wrap)  # noqa: S608
        assert (await verify())[1] == {"no wrapped KEK is kept": "not met"}
        await connection.execute(f"UPDATE kek SET wrapped = NULL WHERE {own}", project_id)  # noqa: S608
        # The tables' files cannot be written anew: somebody has the database end it while it waits for a reader.
        await connection.execute("UPDATE shred SET vacuumed_at = NULL WHERE project_id = $1", project_id)
        manager.expected_errors.add("the tables of wrapped KEKs could not be written anew")
        async with connection.transaction():
            await connection.execute("LOCK TABLE kek IN ACCESS SHARE MODE")
            looking = asyncio.ensure_future(verify())

            async def ended() -> bool:
                return bool(
                    await connection.fetch(
                        "SELECT pg_cancel_backend(pid) FROM pg_locks WHERE relation = 'kek'::regclass "
                        "AND mode = 'AccessExclusiveLock' AND NOT granted"
                    )
                )

            await wait_until(ended)
            assert (await looking)[1] == {"no wrapped KEK is kept": "not met"}
        # Somebody still has a lease, as far as the database knows.
        await connection.execute(
            "INSERT INTO lease SELECT $1, instance_id, node_id, 'COMPUTE', 1, 5, now() FROM instance LIMIT 1",
            project_id,
        )
        assert (await verify())[1] == {"no plaintext key in any instance": "not met"}
        await connection.execute("DELETE FROM lease WHERE project_id = $1", project_id)
        # A node is not done with dropping what it held.
        released = sought.node._released
        released[project.project_id] = HeldProject(project.project_id, Losses(), SystemClock(), 1)
        assert (await verify())[1] == {"no plaintext key in any instance": "not met"}
        del released[project.project_id]
        # A node finds an object again.
        sought.store.left = 1
        assert (await verify())[1] == {"no object, old version or orphan is stored": "not met"}
        sought.store.left = 0
        # The record was written over.
        await connection.execute("UPDATE audit SET actor = actor || '!' WHERE sequence = 3")
        assert (await verify())[1] == {"the record is whole and can be signed": "not met"}
        await connection.execute("UPDATE audit SET actor = rtrim(actor, '!') WHERE sequence = 3")
    finally:
        await connection.close()
    assert (await manager.project(project.project_id)).state is KeyState.SHREDDED


async def staged(manager: Keymanager) -> bool:
    return len(await manager.audit("kek.stage")) >= 1


@contextmanager
def background(work: Coroutine[Any, Any, None]) -> Iterator[None]:
    """Runs until the block ends."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
