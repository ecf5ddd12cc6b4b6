"""Golden bytes of the audit trail: version 1 of exported records and anchors must be read, as it is here, for ever."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.audit_anchor import Anchor, anchor_key, read_anchor
from shared.audit_chain import AuditEntry, ChainHead, append
from shared.audit_export import ExportVerifier, parse_line, write_line
from shared.auth import SignatureVerifier, TokenIssuer, TrustBundle
from shared.ids import ProjectId

AT = datetime(2026, 11, 26, 5, 11, 37, 123456, tzinfo=UTC)
LINKS = append(
    ChainHead(),
    AT,
    [
        AuditEntry("admin:alice", "project.create", "ok", ProjectId("prj-0123456789abcdef"), {"ü": "1", "a": "2"}),
        AuditEntry("keymanager", "kms.calls", "ok"),
    ],
)
SIGNER = TokenIssuer("keymanager", [], Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
VERIFIER = SignatureVerifier(TrustBundle.of([SIGNER]))
LINES = (
    '{"sequence":1,"at":"2026-11-26T05:11:37.123456Z","actor":"admin:alice","action":"project.c'
    'reate","outcome":"ok","project_id":"prj-0123456789abcdef","details":{"a":"2","ü":"1"},"pre'
    'vious_hash":"0000000000000000000000000000000000000000000000000000000000000000","record_has'
    'h":"f57c25782427d70c50343280de639bf98f3a3874b7f7bad048f1d12170a37abf"}\n{"sequence":2,"at":'
    '"2026-11-26T05:11:37.123456Z","actor":"keymanager","action":"kms.calls","outcome":"ok","pr'
    'oject_id":null,"details":{},"previous_hash":"f57c25782427d70c50343280de639bf98f3a3874b7f7b'
    'ad048f1d12170a37abf","record_hash":"258575e29a508c111eb5d81a5e011964f9c4e478937dffb4e988e2'
    '23de3e0a78"}\n'
)
ANCHOR = (
    '{"at":"2026-11-26T05:11:37.123456Z","kid":"keymanager","record_hash":"258575e29a508c111eb5'
    'd81a5e011964f9c4e478937dffb4e988e223de3e0a78","sequence":2,"version":1,"signature":"taYKq3'
    'Uxt4Lr4G5xCuPb4jxRzL6Tg_xgzwj-B-aZB4XmKqiTGtSCfcHWLBAfEZ7zk7kqhjn7PpppnpbsjetnBA"}'
)


def test_lines() -> None:
    assert b"".join(map(write_line, LINKS)).decode() == LINES
    verifier = ExportVerifier()
    assert [verifier.feed(line) for line in LINES.encode().splitlines()] == LINKS
    assert parse_line(LINES.encode().splitlines()[0]) == LINKS[0]


def test_anchor() -> None:
    anchor = Anchor.sign(LINKS[1].head, AT, SIGNER)  # Ed25519 is deterministic
    assert anchor.encode().decode() == ANCHOR
    assert anchor_key(2) == "audit/anchors/00000000000000000002.json"
    assert read_anchor(anchor_key(2), ANCHOR.encode(), VERIFIER).anchor == anchor


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("05:11:37", "05:11:38"),
        ("keymanager", "keymanagex"),
        ('"sequence":2', '"sequence":3'),
        ('"version":1', '"version":2'),
        ('record_hash":"', 'record_hash":"0'),
        ('"}', ""),
        ('"}', '"} '),
        (',"kid"', ', "kid"'),
    ],
)
def test_tampered_twins(old: str, new: str) -> None:
    changed = ANCHOR.replace(old, new)
    assert changed != ANCHOR
    assert read_anchor(anchor_key(2), changed.encode(), VERIFIER).problem is not None
