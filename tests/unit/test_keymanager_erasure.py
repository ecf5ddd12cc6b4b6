"""The word ERASED: every precondition by itself keeps it back, and what nobody can check takes a person's word."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from keymanager.erasure import AskedKey, Facts, judge
from keymanager.kek_canary import CanaryScan
from shared.api.keymanager import AuditVerification, DeletedObjects, InstanceSealed, KeyState, Revocation, Role
from shared.api.shredding import Attestation, DestroyedKey, Precondition, Shred, ShredNode
from shared.deletion import ObjectKind
from shared.ids import KeyConfigurationId, ProjectId

AT = datetime(2026, 1, 2, tzinfo=UTC)
PROJECT = ProjectId.new()
INSTANCE = InstanceSealed(
    node_id="pageserver", role=Role.PAGESERVER, generation=1, outcome="acknowledged", after_s=0.1, steps_s={}
)
REVOCATION = Revocation(
    revocation_id="rev-1",
    project_id=PROJECT,
    state=KeyState.SHREDDED,
    reason="",
    detected_at=AT,
    keks_dropped_after_s=0.0,
    sealed_after_s=0.2,
    instances=[INSTANCE],
)
NODE = ShredNode(
    node_id="pageserver",
    looked_at=AT,
    deleted=[DeletedObjects(kind=ObjectKind.LAYER, objects=5, old_versions=1, size_bytes=50)],
)
SHRED = Shred(
    shred_id="shr-0123456789abcdef",
    project_id=PROJECT,
    project_name="shop",
    state="done",
    reason="because",
    asked_by="alice",
    asked_at=AT,
    expires_at=AT,
    decided_by="bob",
    decided_at=AT,
    keks_destroyed=2,
    staged_destroyed=0,
    revocation=REVOCATION,
    nodes=[NODE],
    left=[],
)
KEY = DestroyedKey(
    key_configuration_id=KeyConfigurationId.new(),
    provider="aws",
    identifier="arn:key",
    principal="arn:role",
    destroyed=True,
    evidence="NotFoundException",
    request_ids=["req-1"],
)
ASKED = AskedKey(KEY, told=True, canary="refused", canary_evidence="NotFoundException")
AUDIT = AuditVerification(intact=True, records=9, head_hash="0" * 64, problem=None)
SCAN = CanaryScan(canaries=2, missing=(), tried=3, opened=(), not_tried=(), not_live=())
GOOD = Facts(
    shred=SHRED,
    vacuumed=True,
    wraps_left=0,
    keys_in_memory=0,
    leases_left=[],
    canaries=SCAN,
    branches=[],
    keys=[ASKED],
    keys_forgotten=[],
    nodes=[NODE],
    audit=AUDIT,
    can_sign=True,
)
WORDS = [Attestation(subject="backups", text="none"), Attestation(subject="key-copies", text="made in the KMS")]


def open_points(facts: Facts, words: list[Attestation] = WORDS) -> dict[str, str]:
    return {each.name: each.outcome for each in judge(facts, words, "alice") if not each.holds}


def test_all_hold() -> None:
    found = judge(GOOD, WORDS, "admin:alice")
    assert all(each.holds for each in found)
    assert [each.outcome for each in found].count("attested") == 2
    assert all(each.evidence for each in found)
    assert any("none (admin:alice)" in each.evidence for each in found)


@pytest.mark.parametrize(
    ("changes", "outcome", "word"),
    [
        ({"shred": SHRED.model_copy(update={"state": "asked", "revocation": None})}, "not met", "shredded by two"),
        (
            {"shred": SHRED.model_copy(update={"revocation": REVOCATION.model_copy(update={"sealed_after_s": None})})},
            "not met",
            "shredded by two",
        ),
        ({"wraps_left": 1}, "not met", "no wrapped KEK"),
        ({"vacuumed": False}, "not met", "no wrapped KEK"),
        ({"keys_in_memory": 1}, "not met", "no plaintext key"),
        ({"leases_left": ["pageserver"]}, "not met", "no plaintext key"),
        ({"nodes": [NODE.model_copy(update={"holds_keys": True})]}, "not met", "no plaintext key"),
        (
            {
                "shred": SHRED.model_copy(
                    update={
                        "revocation": REVOCATION.model_copy(
                            update={"instances": [INSTANCE.model_copy(update={"outcome": "fenced"})]}
                        )
                    }
                )
            },
            "not checked",
            "no plaintext key",
        ),
        (
            {"keys": [replace(ASKED, key=KEY.model_copy(update={"destroyed": False}))]},
            "not met",
            "every CMK",
        ),
        ({"keys": [ASKED, replace(ASKED, told=False)]}, "not checked", "every CMK"),
        ({"keys_forgotten": ["arn:older"]}, "not checked", "every CMK"),
        ({"canaries": replace(SCAN, opened=("version 1 is that of another",))}, "not met", "no live KEK"),
        ({"canaries": replace(SCAN, missing=(1,))}, "not checked", "no live KEK"),
        ({"canaries": replace(SCAN, not_tried=("version 1 of another",))}, "not checked", "no live KEK"),
        ({"canaries": replace(SCAN, not_live=("version 1 of another",))}, "not checked", "no live KEK"),
        ({"branches": ["shop/dev is ACTIVE"]}, "not met", "no part of it"),
        ({"keys": [replace(ASKED, canary="opened")]}, "not met", "a canary"),
        ({"keys": [replace(ASKED, canary="unclear")]}, "not checked", "a canary"),
        ({"keys": [replace(ASKED, canary="none")]}, "not checked", "a canary"),
        ({"nodes": [NODE.model_copy(update={"looked_at": None})]}, "not checked", "no object"),
        ({"nodes": [NODE.model_copy(update={"left_objects": 1})]}, "not met", "no object"),
        ({"nodes": [NODE.model_copy(update={"not_checked": ["old versions"]})]}, "not checked", "no object"),
        ({"audit": AUDIT.model_copy(update={"intact": False, "problem": "altered"})}, "not met", "the record"),
        ({"audit": AUDIT.model_copy(update={"anchors_problem": "no answer"})}, "not met", "the record"),
        ({"can_sign": False}, "not met", "the record"),
    ],
)
def test_each_by_itself_keeps_the_word_back(changes: dict[str, Any], outcome: str, word: str) -> None:
    found = open_points(replace(GOOD, **changes))
    [(name, what)] = found.items()
    assert what == outcome
    assert name.startswith(word)


def test_no_key_at_all_is_no_proof() -> None:
    assert set(open_points(replace(GOOD, keys=[])).values()) == {"not checked"}


@pytest.mark.parametrize("missing", ["backups", "key-copies"])
def test_what_no_program_can_look_at_takes_a_word(missing: str) -> None:
    words = [each for each in WORDS if each.subject != missing]
    assert list(open_points(GOOD, words).values()) == ["not checked"]


def test_a_word_on_instances_counts_for_those_that_never_answered_and_for_nothing_else() -> None:
    words = [*WORDS, Attestation(subject="instances", text="powered off")]
    silent = REVOCATION.model_copy(update={"instances": [INSTANCE.model_copy(update={"outcome": "fenced"})]})
    fenced = replace(GOOD, shred=SHRED.model_copy(update={"revocation": silent}))
    found = judge(fenced, words, "alice")
    assert all(each.holds for each in found)
    assert sum(isinstance(each, Precondition) and each.outcome == "attested" for each in found) == 3
    assert list(open_points(replace(fenced, keys_in_memory=1), words).values()) == ["not met"]


def test_a_word_on_stopped_projects_counts_for_their_keks_and_for_nothing_else() -> None:
    words = [*WORDS, Attestation(subject="stopped-projects", text="their keys are destroyed, too")]
    stopped = replace(SCAN, not_live=("version 1 of another, which is REVOKED",))
    found = judge(replace(GOOD, canaries=stopped), words, "alice")
    assert all(each.holds for each in found)
    [scan] = [each for each in found if each.name.startswith("no live KEK")]
    assert scan.outcome == "attested"
    assert "version 1 of another" in scan.evidence[1]
    assert scan.evidence[-1] == "their keys are destroyed, too (alice)"
    for more in ({"opened": ("that of another",)}, {"missing": (1,)}, {"not_tried": ("version 2",)}):
        assert len(open_points(replace(GOOD, canaries=replace(stopped, **more)), words)) == 1
