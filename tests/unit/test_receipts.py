"""Receipts of every kind: one form, one signature, any flipped byte shows, and a page for people."""

from __future__ import annotations

import base64
import json
import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from keylake.cli.app import app
from keylake.cli.common import ExitCode
from keylake.receipt_page import headline, page
from shared.auth import SignatureVerifier, TokenIssuer, TrustBundle
from shared.deletion import ObjectKind
from shared.errors import IntegrityError
from shared.ids import AccountId, KekId, KeyConfigurationId, ProjectId, WorkspaceId
from shared.receipt import (
    ErasureReceipt,
    MalformedReceiptError,
    Receipt,
    ReceiptAudit,
    ReceiptDestroyedKey,
    ReceiptGrant,
    ReceiptInstance,
    ReceiptKek,
    ReceiptKept,
    ReceiptKey,
    ReceiptKmsCall,
    ReceiptNode,
    ReceiptObjects,
    ReceiptPrecondition,
    RestoreReceipt,
    RevocationReceipt,
    ShredReceipt,
    SignedReceipt,
)

SIGNER = TokenIssuer.create("keymanager", [])
VERIFIER = SignatureVerifier(TrustBundle.of([SIGNER]))
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
KC = KeyConfigurationId.new()
COMMON: dict[str, Any] = {
    "issued_at": AT,
    "account_id": AccountId.new(),
    "workspace_id": WorkspaceId.new(),
    "project_id": ProjectId.new(),
    "project_name": "shop <b>",
    "reason": "because",
    "detected_at": AT,
    "key": ReceiptKey(key_configuration_id=KC, provider="aws", identifier="arn:key", principal="arn:role"),
    "keks": [ReceiptKek(kek_id=KekId.new(), kek_version=1, cmk_key_version="v1", destroyed=True)],
    "kms_calls": [ReceiptKmsCall(at=AT, operation="Decrypt", request_id="req-1", verdict="ok")],
    "audit": ReceiptAudit(first_sequence=1, head_sequence=9, head_hash="0" * 64),
    "kept": [ReceiptKept(node_id="pageserver", reported_at=AT, kek_version=1, objects=7, size_bytes=70)],
    "verified": ["this"],
    "not_verified": ["that"],
    "kid": SIGNER.kid,
}
SEALING: dict[str, Any] = {
    "revocation_id": "rev-1",
    "keks_dropped_after_s": 0.001,
    "sealed_after_s": 0.5,
    "instances": [
        ReceiptInstance(
            node_id="pageserver", role="pageserver", generation=1, outcome="fenced", after_s=0.4, steps_s={"x": 0.1}
        )
    ],
}
LOOKED, AGAIN = AT - timedelta(seconds=0.75), AT + timedelta(seconds=2)
NODE = ReceiptNode(
    node_id="safekeeper-1",
    looked_at=None,
    deleted_objects=3,
    deleted_size_bytes=9,
    deleted=[ReceiptObjects(kind=ObjectKind.LAYER, objects=3, old_versions=2, size_bytes=9)],
    left_objects=1,
    remains=["a layer: AccessDenied"],
    not_checked=["old versions"],
    holds_keys=False,
)
RECEIPTS: list[Receipt] = [
    RevocationReceipt(**COMMON, **SEALING, state="REVOKED"),
    RestoreReceipt(
        **COMMON,
        state="ACTIVE",
        restoration_id="res-1",
        revocation_id=None,
        restored_after_s=0.2,
        instances=[ReceiptGrant(node_id="pageserver", role="pageserver", generation=2, after_s=0.3)],
    ),
    ShredReceipt(
        **COMMON,
        **SEALING,
        state="SHREDDED",
        shred_id="shr-1",
        asked_by="alice",
        asked_at=AT,
        approved_by="bob",
        keks_destroyed=2,
        staged_destroyed=1,
        nodes=[NODE],
        left=["backups"],
    ),
    ErasureReceipt(
        **COMMON,
        state="ERASED",
        shred_id="shr-1",
        checked_by="alice",
        keys=[
            ReceiptDestroyedKey(
                key_configuration_id=KC,
                provider="aws",
                identifier="arn:key",
                principal="arn:role",
                destroyed=True,
                evidence="NotFoundException",
                request_ids=["req-2"],
            )
        ],
        preconditions=[ReceiptPrecondition(name="p", outcome="attested", evidence=["said"])],
        nodes=[
            NODE,
            NODE.model_copy(update={"node_id": "pageserver", "looked_at": LOOKED, "left_objects": 0}),
            NODE.model_copy(update={"node_id": "safekeeper-2", "looked_at": AGAIN}),
        ],
    ),
]


@pytest.mark.parametrize("receipt", RECEIPTS, ids=lambda each: each.kind)
def test_one_form_and_any_change_shows(receipt: Receipt) -> None:
    content = receipt.sign(SIGNER).serialize()
    signed = SignedReceipt.parse(content)
    signed.check(VERIFIER)
    assert (signed.receipt, signed.serialize()) == (receipt, content)
    for position in range(len(content)):
        twin = bytearray(content)
        twin[position] ^= 1
        with pytest.raises((MalformedReceiptError, IntegrityError)):
            SignedReceipt.parse(bytes(twin)).check(VERIFIER)


@pytest.mark.parametrize("receipt", RECEIPTS, ids=lambda each: each.kind)
def test_one_from_before_objects_were_counted_is_as_good_as_it_was(receipt: Receipt) -> None:
    members = receipt.model_dump(mode="json")
    del members["kept"]
    for node in members.get("nodes", ()):
        del node["deleted"]
    message = json.dumps(members, sort_keys=True, separators=(",", ":")).encode()
    members["signature"] = base64.b64encode(SIGNER.sign(b"keylake/v1/receipt\0", message)).decode()
    content = json.dumps(members, sort_keys=True, separators=(",", ":")).encode()
    signed = SignedReceipt.parse(content)
    signed.check(VERIFIER)
    assert signed.serialize() == content
    assert page(signed)


@pytest.mark.parametrize("receipt", RECEIPTS, ids=lambda each: each.kind)
def test_a_kind_does_not_pass_for_another(receipt: Receipt) -> None:
    content = receipt.sign(SIGNER).serialize()
    for other in ("revocation", "restore", "shred", "erasure", "no such kind"):
        if other != receipt.kind:
            with pytest.raises(MalformedReceiptError):
                SignedReceipt.parse(content.replace(f'"kind":"{receipt.kind}"'.encode(), f'"kind":"{other}"'.encode()))


@pytest.mark.parametrize("receipt", RECEIPTS, ids=lambda each: each.kind)
def test_the_page_says_everything_and_runs_nothing(receipt: Receipt) -> None:
    html = page(receipt.sign(SIGNER))
    assert "<b>" not in html
    assert "<script" not in html
    words = {"shop &lt;b&gt;", "arn:key", "req-1", "0" * 64, receipt.state, "this", "that"}
    match receipt:
        case RevocationReceipt():
            words |= {"rev-1", "pageserver", "fenced"}
        case RestoreReceipt():
            words |= {"res-1", "pageserver", "allowed"}
        case ShredReceipt():
            words |= {"shr-1", "alice", "bob", "safekeeper-1", "AccessDenied", "backups", "old versions"}
        case ErasureReceipt():
            words |= {"shr-1", "attested", "said", "NotFoundException", "req-2", "safekeeper-1"}
    assert [word for word in words if word not in html] == []
    assert receipt.project_name in headline(receipt)


@pytest.mark.parametrize("receipt", RECEIPTS, ids=lambda each: each.kind)
def test_the_page_has_a_picture_of_what_happened_when(receipt: Receipt) -> None:
    html = page(receipt.sign(SIGNER))
    picture = html[html.index("<svg") : html.index("</svg>") + len("</svg>")]
    drawn = [(rect.get("class"), rect[0].text) for rect in ET.fromstring(picture).iter("rect")]  # noqa: S314 - our own
    texts = [text.text for text in ET.fromstring(picture).iter("text")]  # noqa: S314
    match receipt:
        case RevocationReceipt() | ShredReceipt():
            assert drawn == [("fenced", "x 0.100 s")]
            assert {"pageserver", "0.400 s, fenced", "0.50 s"} <= set(texts)
        case RestoreReceipt():
            assert drawn == [("acknowledged", "lease granted again")]
            assert {"pageserver", "0.300 s, lease granted again"} <= set(texts)
        case ErasureReceipt():  # who has not looked yet is not in it
            looks = ("acknowledged", "acknowledged", "fenced")
            assert drawn == list(zip(looks, (each.isoformat() for each in (LOOKED, AT, AGAIN)), strict=True))
            told = {"0.000 s, nothing left", "0.750 s, everything checked", "2.750 s, 1 objects left, looked again"}
            assert {"pageserver", "keymanager", "safekeeper-2", *told} <= set(texts)
            assert "safekeeper-1" not in texts


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_whatever_is_no_receipt_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedReceiptError):
        SignedReceipt.parse(data)


@pytest.mark.parametrize("receipt", RECEIPTS, ids=lambda each: each.kind)
def test_the_command_says_whether_it_is_genuine_with_nothing_but_the_trust_bundle(
    receipt: Receipt, tmp_path: Path
) -> None:
    file, trust, others = (tmp_path / name for name in ("receipt.json", "trust.json", "others.json"))
    trust.write_text(TrustBundle.of([SIGNER]).model_dump_json())
    others.write_text(TrustBundle.of([TokenIssuer.create("keymanager", [])]).model_dump_json())

    def verify(content: bytes, by: Path = trust) -> Result:
        file.write_bytes(content)
        # No cluster has ever been in this home.
        environment = {"KEYLAKE_HOME": str(tmp_path / "absent")}
        return CliRunner().invoke(app, ["receipt", "verify", str(file), "--trust", str(by)], env=environment)

    content = receipt.sign(SIGNER).serialize()
    good = verify(content)
    assert good.exit_code == ExitCode.OK, good.output
    assert f"signed by {SIGNER.kid}" in good.stdout
    for word in (b"because", SIGNER.kid.encode(), b'"signature":"', b"2026"):
        position = content.index(word) + len(word) // 2
        bad = verify(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert (bad.exit_code, bad.stdout) == (ExitCode.FAILED, ""), word
        assert bad.stderr.startswith("keylake: ")
    assert verify(content[:-1]).exit_code == ExitCode.FAILED
    assert verify(content, by=others).exit_code == ExitCode.FAILED
    assert not (tmp_path / "absent").exists()
