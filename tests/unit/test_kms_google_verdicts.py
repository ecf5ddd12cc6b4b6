"""Every status that Google's APIs can answer has the verdict that was decided for it, and nothing else is a denial."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.rpc import code_pb2
from hypothesis import given
from hypothesis import strategies as st

from keymanager.kms.base import Classification, DenialReason, Verdict
from keymanager.kms.gcp_verdicts import GENERATE_ACCESS_TOKEN, ErrorAnswer, classify, parse_error

V, R = Verdict, DenialReason
OPERATIONS = ["Encrypt", "Decrypt", "GetCryptoKey", GENERATE_ACCESS_TOKEN]
NAME = "projects/p/locations/global/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1"

# Decided by hand for an answer without details. What is not listed must be AMBIGUOUS.
DECIDED: dict[str, Classification] = {
    "NOT_FOUND": Classification(V.DENIED, R.NOT_FOUND),
    "RESOURCE_EXHAUSTED": Classification(V.THROTTLED),
    "UNAVAILABLE": Classification(V.UNREACHABLE),
    "INTERNAL": Classification(V.UNREACHABLE),
    "DEADLINE_EXCEEDED": Classification(V.UNREACHABLE),
    "UNKNOWN": Classification(V.UNREACHABLE),
    "CANCELLED": Classification(V.UNREACHABLE),
}


@pytest.mark.parametrize("status", [*code_pb2.Code.keys(), "", "SOMETHING_NEW"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_status(status: str, operation: str) -> None:
    expected = DECIDED.get(status, Classification(V.AMBIGUOUS))
    if status == "NOT_FOUND" and operation == GENERATE_ACCESS_TOKEN:
        expected = Classification(V.DENIED, R.PRINCIPAL_DENIED)
    if status == "INVALID_ARGUMENT" and operation == "Decrypt":
        expected = Classification(V.CORRUPT)
    assert classify(operation, ErrorAnswer(400, status)) == expected


@pytest.mark.parametrize("status", code_pb2.Code.keys())
@pytest.mark.parametrize("http_status", [500, 502, 503, 504])
def test_a_server_error_is_never_a_denial(status: str, http_status: int) -> None:
    answer = ErrorAnswer(http_status, status, f"{NAME} is not enabled, current state is: DISABLED.")
    for operation in OPERATIONS:
        assert classify(operation, answer).verdict is V.UNREACHABLE


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("DISABLED", R.DISABLED),
        ("DESTROYED", R.NOT_FOUND),
        ("DESTROY_SCHEDULED", R.PENDING_DELETION),
        ("PENDING_GENERATION", R.INVALID_STATE),
        ("IMPORT_FAILED", R.INVALID_STATE),
    ],
)
def test_states_by_violation_and_by_sentence(state: str, reason: DenialReason) -> None:
    sentence = f"{NAME} is not enabled, current state is: {state}."
    for answer in (
        ErrorAnswer(400, "FAILED_PRECONDITION", "", violations=frozenset({f"KEY_{state}"})),
        ErrorAnswer(400, "FAILED_PRECONDITION", sentence),
        ErrorAnswer(400, "FAILED_PRECONDITION", sentence, violations=frozenset({"SOMETHING_ELSE"})),
    ):
        assert classify("Decrypt", answer) == Classification(V.DENIED, reason)


def test_iam_denials_are_told_from_other_permission_errors() -> None:
    said = "Permission 'cloudkms.cryptoKeyVersions.useToDecrypt' denied on resource 'k' (or it may not exist)."
    for answer in (
        ErrorAnswer(403, "PERMISSION_DENIED", said),
        ErrorAnswer(403, "PERMISSION_DENIED", "in other words", reasons=frozenset({"IAM_PERMISSION_DENIED"})),
    ):
        assert classify("Decrypt", answer) == Classification(V.DENIED, R.ACCESS_DENIED)
    for reason in ("SERVICE_DISABLED", "BILLING_DISABLED", "ACCESS_TOKEN_SCOPE_INSUFFICIENT", "CONSUMER_INVALID"):
        answer = ErrorAnswer(403, "PERMISSION_DENIED", said, reasons=frozenset({reason}))
        assert classify("Decrypt", answer).verdict is V.AMBIGUOUS


def test_the_account_that_may_not_be_impersonated() -> None:
    said = "Permission 'iam.serviceAccounts.getAccessToken' denied on resource (or it may not exist)."
    answer = ErrorAnswer(403, "PERMISSION_DENIED", said)
    assert classify(GENERATE_ACCESS_TOKEN, answer) == Classification(V.DENIED, R.PRINCIPAL_DENIED)
    assert classify("Decrypt", answer).verdict is V.AMBIGUOUS
    assert classify(GENERATE_ACCESS_TOKEN, ErrorAnswer(401, "UNAUTHENTICATED")).verdict is V.AMBIGUOUS


def test_damage_on_the_way_is_not_damage_of_the_blob() -> None:
    said = "The checksum in field ciphertext_crc32c did not match the data in field ciphertext."
    assert classify("Decrypt", ErrorAnswer(400, "INVALID_ARGUMENT", said)).verdict is V.AMBIGUOUS
    misrouted = "The request concerns location 'eu' but was sent to location 'global'."
    assert classify("Decrypt", ErrorAnswer(404, "NOT_FOUND", misrouted)).verdict is V.AMBIGUOUS


_json: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_detail = st.fixed_dictionaries({}, optional={"reason": _json, "violations": _json, "@type": _json}) | _json


@given(st.binary(max_size=64) | st.builds(lambda e: json.dumps({"error": e}).encode(), st.fixed_dictionaries(
    {}, optional={"status": st.sampled_from(list(code_pb2.Code.keys())) | _json, "message": _json,
                  "details": st.lists(_detail, max_size=3) | _json})))  # fmt: skip
def test_any_body_is_parsed_or_none_and_judged(body: bytes) -> None:
    answer = parse_error(400, body)
    if answer is not None:
        for operation in OPERATIONS:
            classify(operation, answer)


def test_bodies_of_others_are_none() -> None:
    for body in (b"", b"<html>", b"[]", b'{"error": "x"}', b'{"error": {}}', b"[" * 100_000, b" " * 70_000, b"\xff"):
        assert parse_error(502, body) is None


def test_a_real_answer_is_read() -> None:
    violation = {"type": "KEY_DISABLED", "subject": NAME}
    detail = {"@type": "type.googleapis.com/google.rpc.PreconditionFailure", "violations": [violation]}
    error = {"code": 400, "message": "m", "status": "FAILED_PRECONDITION", "details": [detail]}
    expected = ErrorAnswer(400, "FAILED_PRECONDITION", "m", violations=frozenset({"KEY_DISABLED"}))
    assert parse_error(400, json.dumps({"error": error}).encode()) == expected
