"""Our record of KMS calls beside the customer's log: what is a finding, and what is none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from keylake.reconcile.core import Kind, Ours, Reconciliation, Window, reconcile
from keylake.reconcile.logs import calls_of, parse_log
from keylake.reconcile.run import reach
from shared.audit_chain import AuditEntry, ChainHead, append
from shared.audit_kms_calls import MalformedCallsError, RecordedCall, forgotten_calls, recorded_calls
from shared.kms_log import LoggedCall, MalformedLogError

AT = datetime(2026, 11, 26, 5, 0, tzinfo=UTC)
KEY, OTHER_KEY, US = "arn:aws:kms:x:1:key/a", "arn:aws:kms:x:1:key/b", "arn:aws:iam::1:role/keylake"


def recorded(request_id: str | None, at: datetime = AT, verdict: str = "ok", **changes: Any) -> RecordedCall:
    return replace(RecordedCall(at, "Decrypt", request_id, verdict, KEY, "aws", US, 7), **changes)


def logged(request_id: str | None, at: datetime = AT, **changes: Any) -> LoggedCall:
    return replace(LoggedCall(at, "Decrypt", KEY, US, request_id, "ok", True), **changes)


def compare(ours: Sequence[RecordedCall], theirs: Sequence[LoggedCall], **options: Any) -> Reconciliation:
    side = Ours()
    for call in ours:
        side.add(call)
    return reconcile(side, theirs, **options)


def kinds(result: Reconciliation) -> list[tuple[Kind, str]]:
    return [(finding.kind, finding.request_id) for finding in result.findings]


def test_the_same_calls_on_both_sides_agree() -> None:
    result = compare([recorded("1"), recorded("2")], [logged("2"), logged("1")])
    assert result.agrees
    assert (result.joined, result.maybe, result.explained) == (2, 0, 0)
    assert result.by_operation == {("Keylake", "Decrypt", "ok"): 2}


def test_what_stands_on_one_side_only_is_named() -> None:
    result = compare([recorded("1"), recorded("2", AT + timedelta(seconds=1))], [logged("1"), logged("3")])
    assert kinds(result) == [(Kind.NOT_RECORDED, "3"), (Kind.NOT_LOGGED, "2")]
    missing = result.findings[1]
    assert (missing.operation, missing.key, missing.principal) == ("Decrypt", KEY, US)
    assert missing.at == AT + timedelta(seconds=1)
    assert missing.remark == "audit record 7"


def test_others_who_use_the_key_are_named_and_its_administrators_are_not() -> None:
    admin = logged("9", principal="alice", operation="DisableKey", uses_key=False)
    thief = logged("8", principal="mallory", outcome="AccessDenied")
    elsewhere = logged("7", principal="mallory", key=OTHER_KEY)
    result = compare([], [admin, thief, elsewhere], keys=[KEY])
    assert kinds(result) == [(Kind.OTHER_PRINCIPAL, "8")]
    assert result.findings[0].principal == "mallory"
    assert result.administration == 1


def test_somebody_elses_call_does_not_pass_for_ours_under_our_request_id() -> None:
    """Google's log has the id that the caller chose."""
    result = compare([recorded("1")], [logged("1"), logged("1"), logged("1", principal="mallory")])
    assert sorted(kinds(result)) == sorted([(Kind.TWICE, "1"), (Kind.OTHER_PRINCIPAL, "1")])
    stolen = compare([recorded("1")], [logged("1", principal="mallory")])
    assert {kind for kind, _ in kinds(stolen)} == {Kind.OTHER_PRINCIPAL, Kind.NOT_LOGGED}
    different = compare([recorded("1")], [logged("1", operation="Encrypt")])
    assert kinds(different) == [(Kind.DIFFERENT, "1")]


@pytest.mark.parametrize("verdict", ["unreachable", "throttled", "ambiguous"])
def test_a_call_without_a_sure_answer_may_or_may_not_be_logged(verdict: str) -> None:
    unsure = recorded(None, verdict=verdict)
    assert compare([unsure], []).maybe == 1
    explained = compare([unsure], [logged("1", AT + timedelta(seconds=2))])
    assert explained.agrees
    assert (explained.explained, explained.maybe) == (1, 0)
    # One explains one, of its operation, of its time.
    assert kinds(compare([unsure], [logged("1"), logged("2")])) == [(Kind.NOT_RECORDED, "2")]
    assert not compare([unsure], [logged("1", operation="Encrypt")]).agrees
    assert not compare([unsure], [logged("1", AT + timedelta(seconds=6))]).agrees
    # With an id (an error in between) it is joined by that.
    assert compare([recorded("1", verdict=verdict)], [logged("1")]).joined == 1
    assert compare([recorded("1", verdict=verdict)], []).agrees


def test_a_denial_was_logged() -> None:
    assert kinds(compare([recorded("1", verdict="denied")], [])) == [(Kind.NOT_LOGGED, "1")]


def test_the_ledger_and_the_record_of_a_use_name_one_call() -> None:
    use = recorded("1", AT + timedelta(seconds=1), principal="", provider="")
    for order in ([use, recorded("1")], [recorded("1"), use]):
        side = Ours()
        for call in order:
            side.add(call)
        assert side.by_id["1"].principal == US
        assert side.providers == {KEY: "aws"}


def test_sign_ins_are_no_calls_on_a_key() -> None:
    assert compare([recorded("1", operation="AssumeRole")], []).agrees
    # Azure: the challenge, and a token that had just ended.
    challenge = logged("c", operation="Authentication", principal="unknown", uses_key=False, is_key_call=False)
    assert compare([recorded("1")], [logged("1"), challenge]).agrees
    expired = compare([recorded("c")], [challenge])
    assert (expired.agrees, expired.joined) == (True, 0)


def test_a_refusal_that_names_no_key_is_ours_by_its_principal() -> None:
    assert compare([recorded("1", verdict="corrupt")], [logged("1", key=None)]).agrees
    assert kinds(compare([recorded("1")], [logged("1"), logged("2", key=None)])) == [(Kind.NOT_RECORDED, "2")]
    assert compare([recorded("1")], [logged("1"), logged("2", key=None, principal="alice")]).agrees


def test_a_refusal_that_names_no_key_is_no_finding_when_another_key_was_asked_about() -> None:
    """Such as a throttled Decrypt: CloudTrail has no key for it, and our record says which one it was."""
    throttled = recorded("2", verdict="throttled", key=OTHER_KEY)
    both = [recorded("1"), throttled], [logged("1"), logged("2", key=None, outcome="ThrottlingException")]
    assert compare(*both, keys=[KEY]).agrees
    assert compare(*both).joined == 2
    stranger = logged("3", key=None)
    assert kinds(compare(both[0], [*both[1], stranger], keys=[KEY])) == [(Kind.NOT_RECORDED, "3")]


def test_what_is_outside_of_the_window_is_joined_but_not_judged() -> None:
    early, late = AT - timedelta(hours=1), AT + timedelta(hours=1)
    window = Window(AT - timedelta(minutes=1), AT + timedelta(minutes=1))
    ours = [recorded("1", early), recorded("2", late), recorded("3")]
    theirs = [logged("1", early), logged("4", late), logged("5", early)]
    result = compare(ours, theirs, window=window)
    assert kinds(result) == [(Kind.NOT_LOGGED, "3")]
    assert result.joined == 1
    assert len(compare(ours, theirs).findings) == 4
    reached = reach([logged("1"), logged("2", AT + timedelta(minutes=1))], Window())
    assert reached == Window(AT + timedelta(seconds=5), AT + timedelta(seconds=55))
    assert reach([], window) == window
    assert compare([recorded("1", sequence=8)], [], newest_record=7).agrees
    assert not compare([recorded("1", sequence=7)], [], newest_record=7).agrees


# --- our records ---


def link_with(action: str, **details: str) -> Any:
    return append(ChainHead(), AT, [AuditEntry("keymanager", action, "ok", None, details)])[0]


def test_calls_are_read_from_the_chain() -> None:
    group = {"provider": "aws", "key": KEY, "principal": US, "forgotten": "3"}
    calls = [
        ["2026-11-26T05:00:00.000000Z", "Decrypt", "1", "ok"],
        ["2026-11-26T05:00:01.000000Z", "Decrypt", "", "unreachable"],
    ]
    link = link_with("kms.calls", calls=json.dumps(calls), **group)
    first, second = recorded_calls(link)
    assert (first.at, first.request_id, first.must_be_logged) == (AT, "1", True)
    assert (second.request_id, second.verdict, second.must_be_logged) == (None, "unreachable", False)
    assert forgotten_calls(link) == 3
    use = link_with("kek.unwrap", kms_key=KEY, kms_operation="Decrypt", kms_request_id="1", old_kms_key=OTHER_KEY)
    assert [(call.key, call.request_id) for call in recorded_calls(use)] == [(KEY, "1"), (OTHER_KEY, None)]
    assert list(recorded_calls(link_with("lease.grant"))) == []
    for broken in ("", "1", "[1]", "[[1,2,3,4]]", "[" * 100_000, json.dumps(calls * 200)):
        with pytest.raises(MalformedCallsError):
            list(recorded_calls(link_with("kms.calls", calls=broken, **group)))


# --- their logs ---

CLOUDTRAIL = {
    "eventTime": "2026-11-26T05:00:00Z",
    "eventSource": "kms.amazonaws.com",
    "eventName": "Decrypt",
    "userIdentity": {"arn": "arn:aws:sts::1:assumed-role/keylake/s", "sessionContext": {"sessionIssuer": {"arn": US}}},
    "requestID": "1",
    "eventID": "e1",
    "resources": [{"ARN": KEY}],
}
AUDIT_EVENT = {
    "time": "2026-11-26T05:00:00.1234567Z",
    "category": "AuditEvent",
    "operationName": "KeyUnwrap",
    "correlationId": "1",
    "identity": {"claim": {"appid": "app-1", "oid": "o-1"}},
    "properties": {"id": "https://v.vault.azure.net/keys/cmk/0123", "httpStatusCode": 200},
}
BAO_RECORD: dict[str, Any] = {
    "time": "2026-11-26T05:00:00.123456789Z",
    "type": "response",
    "auth": {"display_name": "approle", "metadata": {"role_name": "keylake"}, "token_type": "service"},
    "request": {
        "id": "0e14a478-7db5-3d0a-7b0c-94c7c9354bd6",
        "operation": "update",
        "mount_point": "transit/",
        "mount_type": "transit",
        "namespace": {"id": "n1", "path": "team/"},
        "path": "transit/decrypt/cmk",
        "headers": {"x-correlation-id": ["1"]},
    },
    "error": "1 error occurred:\n\t* permission denied\n\n",
}
LOG_ENTRY = {
    "logName": "projects/p/logs/cloudaudit.googleapis.com%2Fdata_access",
    "insertId": "i",
    "timestamp": "2026-11-26T05:00:00.123456789Z",
    "protoPayload": {
        "serviceName": "cloudkms.googleapis.com",
        "methodName": "Decrypt",
        "resourceName": "projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/2",
        "authenticationInfo": {"principalEmail": "keylake@p.iam.gserviceaccount.com"},
        "requestMetadata": {"requestAttributes": {"reason": "1"}},
        "status": {"code": 7},
    },
}


def unknown(_: str) -> None:
    """No call of ours."""


@pytest.mark.parametrize(
    ("document", "cloud", "expected"),
    [
        ({"Records": [CLOUDTRAIL, CLOUDTRAIL]}, "aws", LoggedCall(AT, "Decrypt", KEY, US, "1", "ok", True)),
        ({"Events": [{"EventId": "e", "CloudTrailEvent": json.dumps(CLOUDTRAIL)}]}, "aws", None),
        (
            {"records": [AUDIT_EVENT, {**AUDIT_EVENT, "category": "AzurePolicyEvaluationDetails"}]},
            "azure",
            LoggedCall(
                AT.replace(microsecond=123456),
                "UnwrapKey",
                "https://v.vault.azure.net/keys/cmk",
                "app-1",
                "1",
                "ok",
                True,
            ),
        ),
        (
            [LOG_ENTRY, LOG_ENTRY],
            "google",
            LoggedCall(
                AT.replace(microsecond=123456),
                "Decrypt",
                "projects/p/locations/l/keyRings/r/cryptoKeys/k",
                "keylake@p.iam.gserviceaccount.com",
                "1",
                "status 7",
                True,
            ),
        ),
        (
            [{**BAO_RECORD, "type": "request"}, BAO_RECORD],
            "openbao",
            LoggedCall(
                AT.replace(microsecond=123456),
                "Decrypt",
                "team/transit/keys/cmk",
                "keylake",
                "0e14a478-7db5-3d0a-7b0c-94c7c9354bd6",
                "1 error occurred: * permission denied",
                True,
            ),
        ),
    ],
)
def test_logs_as_the_vendors_tools_write_them(document: object, cloud: str, expected: LoggedCall | None) -> None:
    for text in (json.dumps(document), json.dumps(document, indent=2) + "\n"):
        assert parse_log(text, unknown)[0] == cloud
        [call] = parse_log(text, unknown)[1]
        assert expected is None or call == expected
    [inner] = [document] if isinstance(document, list) else document.values() if isinstance(document, dict) else []
    lines = "\n".join(json.dumps(record) for record in inner)
    assert parse_log(lines, unknown) == parse_log(json.dumps(document), unknown)


def bao(request_id: str, role: str, path: str, **changes: Any) -> dict[str, Any]:
    request = BAO_RECORD["request"] | {
        "id": f"i-{request_id}",
        "path": path,
        "headers": {"x-correlation-id": [request_id]},
    }
    return BAO_RECORD | {"request": request, "auth": {"metadata": {"role_name": role}}, "error": None} | changes


def test_openbao_names_keys_and_roles_as_our_own_calls_do() -> None:
    """Its log knows neither its address nor a role id: both are known from the calls that we have recorded."""
    records = [
        bao("1", "keylake", "transit/datakey/plaintext/cmk"),
        bao("2", "keylake", "transit/decrypt/cmk"),
        bao("3", "keylake", "transit/encrypt/other"),
        bao("4", "stranger", "transit/export/encryption-key/cmk"),
        bao("5", "owner", "transit/keys/cmk/config"),
        bao("6", "keylake", "auth/approle/login"),
        bao("7", "keylake", "auth/token/lookup-self"),
        bao("8", "keylake", "secret/encrypt/cmk"),
    ]
    records[-1]["request"]["mount_type"] = "kv"
    ours = {"1": ("https://bao/v1/team/transit/keys/cmk", "role-1")}
    found = [
        (call.request_id, call.operation, call.key, call.principal, call.uses_key, call.is_key_call)
        for call in calls_of(records, "openbao", ours.get)
    ]
    cmk = "https://bao/v1/team/transit/keys/cmk"
    assert found == [
        ("1", "GenerateDataKey", cmk, "role-1", True, True),
        ("i-2", "Decrypt", cmk, "role-1", True, True),
        ("i-3", "Encrypt", "team/transit/keys/other", "keylake", True, True),
        ("i-4", "update export/encryption-key", cmk, "stranger", True, True),
        ("i-5", "update keys/config", cmk, "owner", False, True),
        ("i-6", "Login", None, "keylake", False, False),
    ]


def test_the_key_of_a_refused_azure_call_is_in_its_address() -> None:
    properties = {
        "requestUri": "https://V.vault.azure.net/keys/cmk/0123/unwrapkey?api-version=7.5",
        "httpStatusCode": 403,
    }
    [call] = calls_of([{**AUDIT_EVENT, "properties": properties}], "azure", unknown)
    assert (call.key, call.outcome) == ("https://v.vault.azure.net/keys/cmk", "403")
    [challenge] = calls_of([{**AUDIT_EVENT, "operationName": "Authentication", "identity": {}}], "azure", unknown)
    assert not challenge.is_key_call
    assert challenge.principal == "unknown"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "1", "[1]", "[[]]", "{", "[" * 100_000, '{"Records":[1]}', '{"Events":[{"CloudTrailEvent":"{"}]}'],
)
def test_other_files_are_refused(content: str) -> None:
    with pytest.raises(MalformedLogError):
        parse_log(content, unknown)


@pytest.mark.parametrize("record", [CLOUDTRAIL, AUDIT_EVENT, LOG_ENTRY, BAO_RECORD])
def test_records_with_anything_in_them_are_read_or_refused(record: dict[str, Any]) -> None:
    """Every member of a record, at every depth, replaced by every kind of value."""
    for broken in variants(record):
        try:
            parse_log(json.dumps(broken), unknown)
        except MalformedLogError as error:
            assert len(str(error)) < 120  # noqa: PT017 - most variants are read


def variants(value: Any) -> list[Any]:
    made: list[Any] = [None, True, -1, 1.5, "", "x" * 50, "https://[", "2026-99-99T00:00:00Z", [], [None], {}, {"a": 1}]
    if isinstance(value, dict):
        for name, inner in value.items():
            made += [{**value, name: other} for other in variants(inner)]
            made.append({other: inner for other, inner in value.items() if other != name})
    if isinstance(value, list):
        for inner in value:
            made += [[other] for other in variants(inner)]
    return made
