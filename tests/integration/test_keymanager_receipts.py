"""Receipts of real revocations: what stands in them, that any flipped byte shows, and who gets one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from customercloud.faults import Faults
from keylake.receipt_page import page
from keymanager.watch import INCONCLUSIVE_TO_SUSPEND
from shared.api.keymanager import KeyState, MoveProject, Project, RevokeRequest
from shared.auth import SignatureVerifier, TokenIssuer, TrustBundle
from shared.errors import ConflictError, IntegrityError, InvalidInputError, NotFoundError
from shared.lease import KeyLoss
from shared.receipt import MalformedReceiptError, RestoreReceipt, RevocationReceipt, SignedReceipt
from tests.fixtures.key_source_contract import Losses, named
from tests.fixtures.keymanager import Keymanager, special_keymanager
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from tests.fixtures.customercloud import CloudProcess
    from tests.fixtures.keymanager import Trust

pytestmark = pytest.mark.integration


@pytest.fixture
async def manager(
    tmp_path: Path, trust: Trust, metadata_dsn: str, shared_cloud: CloudProcess
) -> AsyncIterator[Keymanager]:
    options = {"audit_anchors": {"url": (tmp_path / "anchors").as_uri()}}
    async with special_keymanager(tmp_path, trust, metadata_dsn, shared_cloud, **options) as made:
        await made.start()
        yield made


async def receipt_of(
    manager: Keymanager,
    project: Project,
    revocation_id: str | None = None,
    kind: str = "revocation",
    restoration_id: str | None = None,
) -> bytes:
    async with manager.keylake() as client:
        return await client.receipt(project.project_id, revocation_id, restoration_id=restoration_id, kind=kind)


def trusted(manager: Keymanager) -> SignatureVerifier:
    return SignatureVerifier(TrustBundle.load(manager.trust.directory / "trust.json"))


async def test_a_revocation_by_the_customer_and_its_receipt(manager: Keymanager) -> None:
    customer = manager.tenant.customer
    cmk = customer.create_key(role_arn=manager.tenant.role_arn)
    project = await manager.new_project(cmk)
    async with manager.key_client() as keys:
        lease = await keys.acquire(project.project_id, Losses())
        await keys.generate(project.project_id, [named()])
        await asyncio.to_thread(customer.disable, cmk)
        revocation = await manager.wait_sealed(project.project_id)
        await asyncio.to_thread(customer.enable, cmk)
        await manager.wait_state(project.project_id, KeyState.ACTIVE)
        await wait_until(lambda: lease.live)
    content = await receipt_of(manager, project, revocation.revocation_id)
    signed = SignedReceipt.parse(content)
    signed.check(trusted(manager))
    newest = SignedReceipt.parse(await receipt_of(manager, project)).receipt
    assert isinstance(newest, RevocationReceipt)
    assert newest.revocation_id == revocation.revocation_id
    receipt = signed.receipt
    assert isinstance(receipt, RevocationReceipt)
    assert (receipt.project_id, receipt.state) == (project.project_id, "REVOKED")
    assert receipt.key.identifier == cmk
    assert [kek.kek_version for kek in receipt.keks] == [1]
    [instance] = receipt.instances
    assert (instance.outcome, instance.steps_s) == ("acknowledged", {"dropped": 0.25})
    assert 0 <= receipt.keks_dropped_after_s <= instance.after_s <= receipt.sealed_after_s < 5
    # The ids are those of the customer's own log, of its denials.
    log = {event["requestID"]: event for event in await asyncio.to_thread(manager.tenant.admin.audit_log)}
    assert len(receipt.kms_calls) >= 2, "a denial and its confirmation"
    for call in receipt.kms_calls:
        assert log[call.request_id or ""]["errorCode"] == "DisabledException"
    assert any("1 acknowledged" in text for text in receipt.verified)
    assert any("no lease was granted" in text for text in receipt.verified)
    assert any("audit chain is whole" in text and "anchors" in text for text in receipt.verified)
    # Under another key since: the receipt still names the one that was revoked, and its refusals.
    other = await asyncio.to_thread(customer.create_key, role_arn=manager.tenant.role_arn)
    configuration, _ = await manager.bind(other)
    async with manager.client() as http:
        body = MoveProject(key_configuration_id=configuration.key_configuration_id)
        await http.request("POST", f"/v1/projects/{project.project_id}:move-key", body=body, timeout_s=60)
    log_after = {event["requestID"]: event for event in await asyncio.to_thread(manager.tenant.admin.audit_log)}
    later = SignedReceipt.parse(await receipt_of(manager, project)).receipt
    assert isinstance(later, RevocationReceipt)
    assert (later.key, later.kms_calls) == (receipt.key, receipt.kms_calls)
    assert not any("is the one that was revoked" in text for text in later.not_verified)
    # It came back, and that has a receipt, too: whose word it was, and who could work again.
    signed_restore = SignedReceipt.parse(await receipt_of(manager, project, kind="restore"))
    signed_restore.check(trusted(manager))
    restore = signed_restore.receipt
    assert isinstance(restore, RestoreReceipt)
    assert (restore.state, restore.revocation_id) == ("ACTIVE", revocation.revocation_id)
    assert restore.key.identifier == cmk
    [back] = restore.instances
    assert (back.node_id, back.role) == (instance.node_id, "pageserver")
    assert restore.detected_at > receipt.detected_at
    assert restore.kms_calls, "the probe that was allowed"
    for call in restore.kms_calls:
        assert "errorCode" not in log_after[call.request_id or ""]
    assert any("no lease was granted" in text for text in restore.verified), restore.verified
    assert "allowed" in page(signed_restore)
    # For people.
    html = page(signed)
    assert "<svg" in html
    for word in (instance.node_id, cmk, receipt.audit.head_hash, receipt.kms_calls[0].request_id or ""):
        assert word in html
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "")


async def test_each_suspension_revocation_and_restore_has_its_own(manager: Keymanager) -> None:
    customer = manager.tenant.customer
    cmk = await asyncio.to_thread(customer.create_key, role_arn=manager.tenant.role_arn)
    project = await manager.new_project(cmk)
    await asyncio.to_thread(customer.disable, cmk)
    await manager.wait_state(project.project_id, KeyState.REVOKED)
    assert (await manager.revocations(project.project_id))[0].restoration_id is None
    await asyncio.to_thread(customer.enable, cmk)
    await manager.wait_state(project.project_id, KeyState.ACTIVE)
    with manager.tenant.admin.during(Faults(throttle_rate=1.0)):
        await manager.wait_state(project.project_id, KeyState.SUSPENDED)
    await manager.wait_state(project.project_id, KeyState.ACTIVE)
    log = {event["requestID"]: event for event in await asyncio.to_thread(manager.tenant.admin.audit_log)}
    ended = await manager.revocations(project.project_id)
    assert [each.state for each in ended] == [KeyState.SUSPENDED, KeyState.REVOKED]
    found = {}
    for each in ended:
        signed = SignedReceipt.parse(await receipt_of(manager, project, each.revocation_id))
        signed.check(trusted(manager))
        assert isinstance(signed.receipt, RevocationReceipt)
        assert signed.receipt.revocation_id == each.revocation_id
        found[signed.receipt.state] = signed
    # No denial led to the suspension (one a moment before was another matter), and the customer's own log has what did.
    suspended = found["SUSPENDED"].receipt
    assert len(suspended.kms_calls) >= INCONCLUSIVE_TO_SUSPEND
    assert {call.verdict for call in suspended.kms_calls} == {"throttled"}
    for call in suspended.kms_calls:
        assert log[call.request_id or ""]["errorCode"] == "ThrottlingException"
    assert any("may not have got that far" in text for text in suspended.not_verified)
    assert "did not allow" in page(found["SUSPENDED"])
    assert "throttled" in page(found["SUSPENDED"])
    assert {call.verdict for call in found["REVOKED"].receipt.kms_calls} == {"denied"}
    assert "refused" in page(found["REVOKED"])
    # Each restore, the older one too, and what it ended.
    restores = []
    for each in ended:
        signed = SignedReceipt.parse(await receipt_of(manager, project, None, "restore", each.restoration_id))
        signed.check(trusted(manager))
        assert isinstance(signed.receipt, RestoreReceipt)
        assert (signed.receipt.restoration_id, signed.receipt.revocation_id) == (
            each.restoration_id,
            each.revocation_id,
        )
        restores.append(signed.receipt)
    newer, older = restores
    assert older.restoration_id != newer.restoration_id
    assert found["REVOKED"].receipt.detected_at < older.detected_at < suspended.detected_at < newer.detected_at
    unnamed = SignedReceipt.parse(await receipt_of(manager, project, kind="restore")).receipt
    assert isinstance(unnamed, RestoreReceipt)
    assert unnamed.restoration_id == newer.restoration_id
    with pytest.raises(NotFoundError, match="no such restore"):
        await receipt_of(manager, project, None, "restore", "res-0123456789abcdef")
    with pytest.raises(InvalidInputError, match="is a restore's id"):
        await receipt_of(manager, project, restoration_id=newer.restoration_id)
    with pytest.raises(InvalidInputError, match="is a revocation's id"):
        await receipt_of(manager, project, ended[0].revocation_id, "restore")


async def test_any_change_shows(manager: Keymanager) -> None:
    cmk = manager.tenant.customer.create_key(role_arn=manager.tenant.role_arn)
    project = await manager.new_project(cmk, probe_interval_s=3600)
    async with manager.client() as http:
        body = RevokeRequest(reason="a drill <b>&")
        await http.request("POST", f"/v1/projects/{project.project_id}:revoke", body=body)
    revocation = await manager.wait_sealed(project.project_id)
    content = await receipt_of(manager, project, revocation.revocation_id)
    verifier = trusted(manager)
    signed = SignedReceipt.parse(content)
    signed.check(verifier)
    assert signed.serialize() == content
    assert signed.receipt.kms_calls == [], "the customer's cloud was not asked"
    assert "a drill &lt;b&gt;&amp;" in page(signed)
    for position in range(len(content)):
        twin = bytearray(content)
        twin[position] ^= 1
        with pytest.raises((MalformedReceiptError, IntegrityError)):
            SignedReceipt.parse(bytes(twin)).check(verifier)
    for other in (content + b"\n", b" " + content, content[:-1], b"", b"{}", b"[" * 100_000):
        with pytest.raises(MalformedReceiptError):
            SignedReceipt.parse(other)
    # By whom it is signed matters: by a key that calls services, even one of ours, is not by the keymanager.
    other_issuer = TokenIssuer.create("admin", manager.trust.admin.scopes)
    forged = signed.receipt.model_copy(update={"kid": other_issuer.kid}).sign(other_issuer)
    with pytest.raises(IntegrityError):
        forged.check(SignatureVerifier(TrustBundle.of([other_issuer])))
    with pytest.raises(ValueError, match="names the key"):
        signed.receipt.sign(other_issuer)


async def test_there_is_none_before_the_end_or_of_what_never_was(manager: Keymanager) -> None:
    cmk = manager.tenant.customer.create_key(role_arn=manager.tenant.role_arn)
    project, other = await manager.new_project(cmk), await manager.new_project(cmk)
    for revocation_id in ("rev-0123456789abcdef", None):
        with pytest.raises(NotFoundError):
            await receipt_of(manager, project, revocation_id)
    may_answer = asyncio.Event()

    async def slow(loss: KeyLoss) -> dict[str, float]:
        await may_answer.wait()
        return {}

    async with manager.key_client() as keys:
        await keys.acquire(project.project_id, slow)
        async with manager.client() as http:
            path = f"/v1/projects/{project.project_id}:revoke"
            await http.request("POST", path, body=RevokeRequest(reason="a drill"))
        [revocation] = await manager.revocations(project.project_id)
        with pytest.raises(ConflictError, match="waits for"):
            await receipt_of(manager, project, revocation.revocation_id)
        may_answer.set()
        await manager.wait_sealed(project.project_id)
    with pytest.raises(NotFoundError):
        await receipt_of(manager, other, revocation.revocation_id)
    assert SignedReceipt.parse(await receipt_of(manager, project, revocation.revocation_id))
