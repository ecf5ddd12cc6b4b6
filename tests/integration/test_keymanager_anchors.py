"""Anchors of the audit chain: made by a real keymanager, contradicted by a history that was rewritten as a whole."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from pydantic import SecretStr

from keylake.audit_file import export, output, verify_file
from shared.api.keymanager import AnchoringStatus, KeyState, RevokeRequest
from shared.audit_anchor import ANCHOR_PREFIX, read_anchor
from shared.audit_chain import AuditEntry, ChainHead, append
from shared.auth import SignatureVerifier, TrustBundle
from shared.ids import ProjectId
from shared.storage.base import ObjectStore
from shared.storage.config import ObjectStoreSettings, open_store
from tests.fixtures.keymanager import Keymanager, special_keymanager
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from tests.fixtures.customercloud import CloudProcess
    from tests.fixtures.keymanager import Trust
    from tests.fixtures.s3 import S3Server

pytestmark = pytest.mark.integration


@pytest.fixture
async def manager(
    tmp_path: Path, trust: Trust, metadata_dsn: str, shared_cloud: CloudProcess
) -> AsyncIterator[Keymanager]:
    """Not started. Anchors go into a directory, at the start and after revocations only."""
    options = {"audit_anchors": {"url": (tmp_path / "anchors").as_uri()}, "audit_anchor_interval_s": 3600}
    async with special_keymanager(tmp_path, trust, metadata_dsn, shared_cloud, **options) as made:
        yield made


async def status(manager: Keymanager) -> AnchoringStatus:
    found = (await manager.status()).anchoring
    assert found is not None
    return found


async def wait_anchored(manager: Keymanager, at_least: int = 1) -> AnchoringStatus:
    async def anchored() -> AnchoringStatus | None:
        found = await status(manager)
        return found if found.sequence >= at_least else None

    found = await wait_until(anchored)
    assert isinstance(found, AnchoringStatus)
    return found


async def revoked_project(manager: Keymanager) -> ProjectId:
    """The chain has some records, and an anchor of the revocation's end."""
    cmk = manager.tenant.customer.create_key(role_arn=manager.tenant.role_arn)
    project = await manager.new_project(cmk, probe_interval_s=3600)
    async with manager.client() as http:
        path = f"/v1/projects/{project.project_id}:revoke"
        await http.request("POST", path, body=RevokeRequest(reason="a drill"))
    await manager.wait_sealed(project.project_id)
    [sealed] = await manager.audit("project.sealed")
    await wait_anchored(manager, sealed["sequence"])
    return project.project_id


async def rewrite(dsn: str, sequence: int, length: int | None = None, **changes: Any) -> None:
    """What somebody does who owns the whole database: change a record, and make every later hash and the head anew."""
    connection = await asyncpg.connect(dsn, server_settings={"search_path": "keymanager"})
    try:
        async with connection.transaction():
            rows = await connection.fetch("SELECT * FROM audit ORDER BY sequence")
            head = ChainHead()
            for row in rows[:length]:
                project = row["project_id"]
                entry = AuditEntry(
                    row["actor"],
                    row["action"],
                    row["outcome"],
                    None if project is None else ProjectId(project),
                    json.loads(row["details"]),
                )
                if row["sequence"] == sequence:
                    entry = replace(entry, **changes)
                [link] = append(head, row["at"], [entry])
                head = link.head
                await connection.execute(
                    "UPDATE audit SET actor = $2, previous_hash = $3, record_hash = $4 WHERE sequence = $1",
                    link.sequence,
                    entry.actor,
                    link.previous_hash,
                    link.record_hash,
                )
            await connection.execute("DELETE FROM audit WHERE sequence > $1", head.sequence)
            await connection.execute(
                "UPDATE audit_head SET sequence = $1, record_hash = $2", head.sequence, head.record_hash
            )
    finally:
        await connection.close()


async def test_a_history_that_was_rewritten_as_a_whole_contradicts_an_anchor(
    manager: Keymanager, tmp_path: Path
) -> None:
    await manager.start()
    at_start = await wait_anchored(manager)
    await revoked_project(manager)
    good = await manager.verify_audit()
    assert (good.intact, good.anchors_problem) == (True, None)
    stored = sorted((tmp_path / "anchors").rglob("*.json"))
    assert good.anchors == len(stored) >= 3  # at the start, when the revocation began, when it was sealed
    signatures = SignatureVerifier(TrustBundle.load(manager.trust.directory / "trust.json"))
    assert all(read_anchor(path.name, path.read_bytes(), signatures).problem is None for path in stored)

    k = at_start.sequence + 1
    await rewrite(manager.dsn, k, actor="nobody")
    bad = await manager.verify_audit()
    assert not bad.intact
    contradicting = next(path for path in stored if int(path.stem) >= k)
    assert f"anchor {ANCHOR_PREFIX}{contradicting.name} contradicts the chain" in (bad.problem or "")
    assert f"in records {k} to {int(contradicting.stem)}" in (bad.problem or "")

    # An export shows it, too, to somebody with the anchors and the public key only; without them it looks whole.
    async with manager.keylake() as keylake:
        with output(tmp_path / "audit.jsonl") as file:
            assert await export(keylake.audit, 0, file, lambda _: None) >= good.records
    assert verify_file(tmp_path / "audit.jsonl").intact
    offline = verify_file(tmp_path / "audit.jsonl", anchors=tmp_path / "anchors", signatures=signatures)
    assert contradicting.name in (offline.problem or "")
    assert verify_file(tmp_path / "audit.jsonl", head=bytes.fromhex(good.head_hash)).problem is not None


async def test_a_keymanager_finds_out_itself_when_the_chain_grows_over_an_anchored_record(
    manager: Keymanager, tmp_path: Path
) -> None:
    """Records cut off the end, and new ones in their place."""
    manager.options["audit_anchor_interval_s"] = 0.1
    manager.expected_errors |= {"the audit chain could not be anchored"}
    await manager.start()
    project_id = await revoked_project(manager)
    head = (await manager.verify_audit()).records
    await wait_anchored(manager, head)
    await rewrite(manager.dsn, 0, length=head - 1)
    cut = await manager.verify_audit()
    assert f"there is no record {head}" in (cut.problem or "")
    async with manager.client() as http:
        await http.request("POST", f"/v1/projects/{project_id}:revalidate")  # one record

    async def noticed() -> bool:
        return "rewritten" in ((await status(manager)).problem or "")

    await wait_until(noticed)
    assert not (await manager.verify_audit()).intact


async def test_an_object_store_that_is_down_stops_nothing_and_shows(manager: Keymanager, tmp_path: Path) -> None:
    manager.options["audit_anchor_interval_s"] = 0.1
    manager.expected_errors |= {"the audit chain could not be anchored"}
    (tmp_path / "anchors").write_text("in the way")
    await manager.start()
    cmk = manager.tenant.customer.create_key(role_arn=manager.tenant.role_arn)
    project = await manager.new_project(cmk)
    manager.tenant.customer.disable(cmk)
    assert (await manager.wait_state(project.project_id, KeyState.REVOKED)).state is KeyState.REVOKED
    await manager.wait_sealed(project.project_id)

    async def failing() -> bool:
        return (await status(manager)).failures > 1

    await wait_until(failing)
    assert (await status(manager)).problem is not None
    verification = await manager.verify_audit()
    assert (verification.intact, verification.anchors) == (True, 0)
    assert "could not be read" in (verification.anchors_problem or "")
    async with manager.client() as http:
        metrics = (await http.request("GET", "/metrics")).text
    assert "keylake_audit_anchoring_failing 1.0" in metrics

    (tmp_path / "anchors").unlink()
    await wait_anchored(manager)
    assert (await status(manager)).problem is None
    async with manager.client() as http:
        metrics = (await http.request("GET", "/metrics")).text
    assert "keylake_audit_anchoring_failing 0.0" in metrics
    assert (await manager.verify_audit()).anchors_problem is None
    manager.tenant.customer.enable(cmk)


async def test_anchors_in_s3_and_a_keymanager_that_never_makes_the_bucket(
    manager: Keymanager, s3_server: S3Server
) -> None:
    bucket = s3_server.new_bucket()
    manager.expected_errors |= {"the audit chain could not be anchored"}
    manager.options |= {
        "audit_anchors": {
            "url": f"s3://{bucket}?endpoint={s3_server.endpoint}&create_bucket=false",
            "access_key_id": s3_server.access_key,
            "secret_access_key": s3_server.secret_key,
            "attempts": 1,
        },
        "audit_anchor_interval_s": 0.2,
    }
    await manager.start()

    async def failing() -> bool:
        return (await status(manager)).problem is not None

    await wait_until(failing)
    store: ObjectStore = await open_store(
        ObjectStoreSettings(
            url=f"s3://{bucket}?endpoint={s3_server.endpoint}",
            access_key_id=SecretStr(s3_server.access_key),
            secret_access_key=SecretStr(s3_server.secret_key),
        )
    )
    try:
        await wait_anchored(manager)
        names = [info.key async for info in store.list()]
        assert names
        assert all(name.startswith(ANCHOR_PREFIX) for name in names)
    finally:
        await store.close()
    assert ((await manager.verify_audit()).anchors or 0) >= 1
