"""What must hold before the word ERASED is used, and what follows from what was found. A core: no I/O and no clock.

After NIST SP 800-88, "cryptographic erase": all keys under which the data can be opened are destroyed, at every level
and in every copy; what was done is verified, and what cannot be verified is stated by somebody, under their name.

A precondition is *met*, *not met*, *not checked* (nobody could look), or *attested* (a person's word, for the few
things that no program can look at). The first and the last hold; one that does not keeps the project SHREDDED.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from keymanager.kek_canary import CanaryScan
from shared.api.keymanager import AuditVerification, InstanceSealed
from shared.api.shredding import Attestation, DestroyedKey, Precondition, Shred, ShredNode

Outcome = Literal["met", "not met", "not checked", "attested"]
CanaryOutcome = Literal["refused", "opened", "unclear", "none"]
Subject = Literal["backups", "key-copies", "instances", "stopped-projects"]


@dataclass(frozen=True, slots=True)
class AskedKey:
    """What came of asking the customer's KMS about one key."""

    key: DestroyedKey
    told: bool
    """The KMS answered the question, one way or the other."""
    canary: CanaryOutcome
    """What a real unwrap with the key came to: refused because there is no such key (any more), or something else.
    "none": there is nothing that could be tried."""
    canary_evidence: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found by looking, just now."""

    shred: Shred
    vacuumed: bool
    wraps_left: int
    keys_in_memory: int
    leases_left: Sequence[str]
    canaries: CanaryScan
    branches: Sequence[str]
    """In words: projects with branches of this one that are not shredded."""
    keys: Sequence[AskedKey]
    keys_forgotten: Sequence[str]
    """By the audit chain these wrapped the project's KEKs, and we do not know how to ask about them any more."""
    nodes: Sequence[ShredNode]
    """`looked_at` is None for who was not heard of since this look began."""
    audit: AuditVerification
    can_sign: bool


def judge(facts: Facts, attestations: Sequence[Attestation], by: str) -> list[Precondition]:
    """Every precondition, in the order in which they are told."""
    said = {each.subject: f"{each.text} ({by})" for each in attestations}
    return [
        _shredded(facts.shred),
        _no_wraps(facts),
        _keys_destroyed(facts),
        _canary(facts.keys),
        _scan(facts.canaries, said),
        _branches(facts.branches),
        _no_plaintext(facts, said),
        _nothing_stored(facts.nodes),
        _stated("no copy outside can be opened without the destroyed keys", "backups", said),
        _stated("no copy of the customer's key itself", "key-copies", said),
        _record(facts),
    ]


def _of(name: str, not_met: Iterable[str], not_checked: Iterable[str], met: Sequence[str]) -> Precondition:
    no, unknown = list(not_met), list(not_checked)
    outcome: Outcome = "not met" if no else "not checked" if unknown else "met"
    return Precondition(name=name, outcome=outcome, evidence=[*no, *unknown] or list(met))


def _shredded(shred: Shred) -> Precondition:
    not_met = []
    if shred.state not in ("deleting", "done"):
        not_met.append(f"the newest request is {shred.state}")
    elif shred.revocation is None or shred.revocation.sealed_after_s is None:
        not_met.append("the fan-out is not over")
    met = f"asked by {shred.asked_by}, approved by {shred.decided_by}; {shred.keks_destroyed} KEKs destroyed"
    return _of("shredded by two people", not_met, [], [met])


def _no_wraps(facts: Facts) -> Precondition:
    not_met = [f"{facts.wraps_left} are in the metadata database"] if facts.wraps_left else []
    if not facts.vacuumed:
        not_met.append("the tables' files were not written anew")
    return _of("no wrapped KEK is kept", not_met, [], ["none in the metadata database, nor in its tables' files"])


def _keys_destroyed(facts: Facts) -> Precondition:
    not_met = [f"{a.key.identifier}: {a.key.evidence}" for a in facts.keys if a.told and not a.key.destroyed]
    unknown = [f"{a.key.identifier}: {a.key.evidence}" for a in facts.keys if not a.told]
    unknown += [
        f"{key}: it wrapped KEKs of this project, and nobody can ask about it here" for key in facts.keys_forgotten
    ]
    if not facts.keys:
        unknown.append("which keys wrapped the KEKs of this project is not known")
    met = [f"{a.key.identifier}: {a.key.evidence}" for a in facts.keys]
    return _of("every CMK that ever wrapped one is destroyed", not_met, unknown, met)


def _canary(keys: Sequence[AskedKey]) -> Precondition:
    not_met = [f"{a.key.identifier}: {a.canary_evidence}" for a in keys if a.canary == "opened"]
    unknown = [f"{a.key.identifier}: {a.canary_evidence}" for a in keys if a.canary == "unclear"]
    met = [f"{a.key.identifier}: {a.canary_evidence}" for a in keys if a.canary == "refused"]
    if not met:
        unknown.append("no canary of any of these keys could be tried")
    return _of("a canary under the key does not open", not_met, unknown, met)


def _scan(scan: CanaryScan, said: Mapping[Subject, str]) -> Precondition:
    name = "no live KEK opens what its KEKs sealed"
    unknown = [f"version {version} of the KEK has no canary to try keys on" for version in scan.missing]
    unknown += scan.not_tried
    stopped = [f"nobody can try {each} and may come back" for each in scan.not_live]
    met = f"{scan.tried} live KEKs were tried on {scan.canaries} canaries, and none opens one"
    if stopped and not scan.opened and not unknown and "stopped-projects" in said:
        return Precondition(name=name, outcome="attested", evidence=[met, *stopped, said["stopped-projects"]])
    return _of(name, scan.opened, [*unknown, *stopped], [met])


def _branches(alive: Sequence[str]) -> Precondition:
    not_met = [f"{each}: what was changed on its branches of this project is a copy under its keys" for each in alive]
    met = "no project with a branch of this one is alive"
    return _of("no part of it is kept under the keys of a branch", not_met, [], [met])


def _no_plaintext(facts: Facts, said: Mapping[Subject, str]) -> Precondition:
    name = "no plaintext key in any instance"
    not_met = [f"{facts.keys_in_memory} keys in the keymanager"] if facts.keys_in_memory else []
    not_met += [f"{node_id} holds a lease" for node_id in facts.leases_left]
    not_met += [f"{node.node_id} holds a key" for node in facts.nodes if node.looked_at is not None and node.holds_keys]
    instances: Sequence[InstanceSealed] = [] if facts.shred.revocation is None else facts.shred.revocation.instances
    fenced = [
        f"{each.node_id} (generation {each.generation}) never answered: its lease has run out, its memory nobody saw"
        for each in instances
        if each.outcome != "acknowledged"
    ]
    met = [f"{sum(each.outcome == 'acknowledged' for each in instances)} instances have said that they hold none"]
    if fenced and not not_met and "instances" in said:
        return Precondition(name=name, outcome="attested", evidence=[*fenced, said["instances"]])
    return _of(name, not_met, fenced, met)


def _nothing_stored(nodes: Sequence[ShredNode]) -> Precondition:
    silent = [f"{node.node_id} did not answer" for node in nodes if node.looked_at is None]
    left = [
        f"{node.node_id} has {node.left_objects} objects that it could not delete: {'; '.join(node.remains)}"
        for node in nodes
        if node.looked_at is not None and node.left_objects
    ]
    unknown = [f"{node.node_id}: {text}" for node in nodes if node.looked_at is not None for text in node.not_checked]
    met = [
        f"{node.node_id} deleted {node.deleted_objects} objects ({node.deleted_kinds or 'none'}), and found none now"
        for node in nodes
    ]
    return _of("no object, old version or orphan is stored", left, [*silent, *unknown], met or ["nobody had any"])


def _stated(name: str, subject: Subject, said: Mapping[Subject, str]) -> Precondition:
    if subject in said:
        return Precondition(name=name, outcome="attested", evidence=[said[subject]])
    return Precondition(name=name, outcome="not checked", evidence=[f"no program can look: attest {subject}"])


def _record(facts: Facts) -> Precondition:
    not_met = [] if facts.audit.intact else [f"the audit chain: {facts.audit.problem}"]
    if not facts.can_sign:
        not_met.append("this keymanager has no key to sign with")
    if facts.audit.anchors_problem is not None:
        not_met.append(f"the audit chain's anchors: {facts.audit.anchors_problem}")
    met = f"the audit chain is whole up to record {facts.audit.records}, and a receipt can be signed"
    return _of("the record is whole and can be signed", not_met, [], [met])
