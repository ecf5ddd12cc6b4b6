"""The audit log: every call in CloudTrail's shape, through LookupEvents and whole, and nothing secret in it."""

from __future__ import annotations

import base64
import json
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

from customercloud.faults import ErrorKind, Faults

if TYPE_CHECKING:
    from tests.fixtures.customercloud import AwsTenant

pytestmark = pytest.mark.integration


@pytest.fixture
def key(aws: AwsTenant) -> str:
    return aws.customer.create_key(role_arn=aws.role_arn)


def test_a_use_by_the_role_looks_as_in_aws_documentation(aws: AwsTenant, key: str) -> None:
    vendor = aws.role_client()
    context = {"tenant": "t1", "branch": "b1"}
    sealed = vendor.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext=context)["CiphertextBlob"]
    answer = vendor.decrypt(CiphertextBlob=sealed, EncryptionContext=context)
    (record,) = aws.customer.events(EventName="Decrypt")

    identity = record.pop("userIdentity")
    issuer = identity["sessionContext"]["sessionIssuer"]
    assert identity["type"] == "AssumedRole"
    assert identity["arn"] == f"arn:aws:sts::{aws.account_id}:assumed-role/{aws.role_name}/test"
    assert identity["accountId"] == aws.account_id
    assert identity["accessKeyId"].startswith("ASIA")
    assert identity["principalId"] == f"{issuer['principalId']}:test"
    assert identity["sessionContext"]["attributes"]["mfaAuthenticated"] == "false"
    assert issuer == {
        "type": "Role", "principalId": issuer["principalId"], "arn": aws.role_arn,
        "accountId": aws.account_id, "userName": aws.role_name,
    }  # fmt: skip

    at = datetime.strptime(record.pop("eventTime"), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert abs(at - datetime.now(UTC)) < timedelta(minutes=1)
    uuid.UUID(record.pop("eventID"))
    assert "Boto3" in record.pop("userAgent")
    assert record == {
        "eventVersion": "1.11",
        "eventSource": "kms.amazonaws.com",
        "eventName": "Decrypt",
        "awsRegion": "eu-central-1",
        "sourceIPAddress": "127.0.0.1",
        "requestParameters": {
            "encryptionAlgorithm": "SYMMETRIC_DEFAULT",
            "encryptionContext": context,
            "keyId": key,
        },
        "responseElements": None,
        "additionalEventData": {"keyMaterialId": answer["KeyMaterialId"]},
        "requestID": answer["ResponseMetadata"]["RequestId"],
        "readOnly": True,
        "resources": [{"accountId": aws.account_id, "type": "AWS::KMS::Key", "ARN": key}],
        "eventType": "AwsApiCall",
        "managementEvent": True,
        "recipientAccountId": aws.account_id,
        "eventCategory": "Management",
    }


def test_refusals_are_logged_with_their_reason(aws: AwsTenant, key: str) -> None:
    vendor = aws.role_client()
    sealed = vendor.encrypt(KeyId=key, Plaintext=b"x")["CiphertextBlob"]
    request_ids = []

    def decrypt() -> None:
        with pytest.raises(ClientError) as caught:
            vendor.decrypt(CiphertextBlob=sealed, KeyId=key)
        request_ids.append(caught.value.response["ResponseMetadata"]["RequestId"])

    aws.customer.disable(key)
    decrypt()
    aws.customer.schedule_deletion(key)
    decrypt()
    aws.customer.cancel_deletion(key)
    aws.customer.enable(key)
    aws.customer.remove_role(key, aws.role_arn)
    decrypt()
    records = list(aws.customer.events(EventName="Decrypt"))
    assert [r["errorCode"] for r in records] == ["AccessDenied", "KMSInvalidStateException", "DisabledException"]
    assert [r["requestID"] for r in records] == list(reversed(request_ids))
    assert records[2]["errorMessage"] == f"{key} is disabled."
    assert all(r["responseElements"] is None and r["resources"][0]["ARN"] == key for r in records)


def test_faults_of_the_service_are_logged_too(aws: AwsTenant, key: str) -> None:
    vendor = aws.role_client()
    for faults, code in (
        (Faults(throttle_rate=1), "ThrottlingException"),
        (Faults(error_rate=1, error_kind=ErrorKind.KEY_UNAVAILABLE), "KeyUnavailableException"),
    ):
        with aws.admin.during(faults), pytest.raises(ClientError):
            vendor.encrypt(KeyId=key, Plaintext=b"x")
        assert next(aws.customer.events(EventName="Encrypt"))["errorCode"] == code


def test_management_calls_say_what_was_changed(aws: AwsTenant, key: str) -> None:
    aws.customer.disable(key.rpartition("/")[2])
    (record,) = aws.customer.events(EventName="DisableKey")
    assert record["requestParameters"] == {"keyId": key}
    assert record["responseElements"] == {"keyId": key}
    assert record["readOnly"] is False
    assert record["userIdentity"]["type"] == "IAMUser"
    assert record["userIdentity"]["userName"] == "admin"
    (put,) = aws.customer.events(EventName="PutKeyPolicy")
    assert aws.role_arn in put["requestParameters"]["policy"]


def test_an_assumed_role_is_seen_by_both_accounts(aws: AwsTenant) -> None:
    request_id = aws.assume_role()["ResponseMetadata"]["RequestId"]
    records = [r for r in aws.admin.audit_log() if r["requestID"] == request_id]
    by_account = {r["recipientAccountId"]: r for r in records}
    assert by_account.keys() == {aws.account_id, aws.names.vendor.account_id}
    assert len({r["sharedEventID"] for r in records}) == 1
    assert len({r["eventID"] for r in records}) == 2
    theirs = by_account[aws.account_id]["userIdentity"]
    assert theirs.keys() == {"type", "principalId", "accountId"}
    assert theirs["type"] == "AWSAccount"
    assert by_account[aws.names.vendor.account_id]["userIdentity"]["userName"] == "keylake"
    parameters = by_account[aws.account_id]["requestParameters"]
    assert parameters["externalId"] == aws.names.external_id
    assert list(aws.customer.events(EventName="AssumeRole")) == [by_account[aws.account_id]]


def test_a_refused_role_is_logged_for_the_caller_only(aws: AwsTenant) -> None:
    with pytest.raises(ClientError):
        aws.assume_role(ExternalId="wrong-one")
    assert list(aws.customer.events(EventName="AssumeRole")) == []
    own = [r for r in aws.admin.audit_log() if r["recipientAccountId"] == aws.names.vendor.account_id]
    assert [r["errorCode"] for r in own] == ["AccessDenied"]


def test_nothing_secret_is_ever_written(aws: AwsTenant, key: str) -> None:
    """Canaries through every operation that carries a secret, then a look at every byte on the disk."""
    vendor_credentials = aws.assume_role()["Credentials"]
    vendor = aws.client("kms", vendor_credentials)
    canary = b"canary-" + uuid.uuid4().hex.encode()
    sealed = vendor.encrypt(KeyId=key, Plaintext=canary, EncryptionContext={"visible": "context"})["CiphertextBlob"]
    data_key = vendor.generate_data_key(KeyId=key, KeySpec="AES_256")
    moved = vendor.re_encrypt(
        CiphertextBlob=sealed, SourceEncryptionContext={"visible": "context"}, DestinationKeyId=key
    )["CiphertextBlob"]
    vendor.decrypt(CiphertextBlob=moved)
    with pytest.raises(ClientError):
        vendor.decrypt(CiphertextBlob=sealed)
    secrets_ = {
        "plaintext": canary,
        "data key": data_key["Plaintext"],
        "session secret": vendor_credentials["SecretAccessKey"].encode(),
        "session token": vendor_credentials["SessionToken"].encode(),
        "customer secret": aws.names.customer.secret_access_key.encode(),
        "vendor secret": aws.names.vendor.secret_access_key.encode(),
        "admin token": aws.cloud.token.encode(),
        "ciphertext": sealed,
        "re-encrypted": moved,
        "wrapped data key": data_key["CiphertextBlob"],
    }
    files = [path for path in aws.cloud.state_dir.rglob("*") if path.is_file()]
    files.append(aws.cloud.directory / "process.log")
    everything = b"".join(path.read_bytes() for path in files)
    assert b'"visible":"context"' in everything, "the search looks in the right place"
    for name, secret in secrets_.items():
        for form in (secret, base64.b64encode(secret), secret.hex().encode()):
            assert form not in everything, name
    assert all(path.stat().st_mode & 0o077 == 0 for path in files if path.is_relative_to(aws.cloud.state_dir))


# ── LookupEvents ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_pages_have_every_event_once_newest_first(aws: AwsTenant, key: str) -> None:
    for number in range(120):
        aws.customer.kms.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext={"n": str(number)})
    records = list(aws.customer.events(EventName="Encrypt"))
    numbers = [int(r["requestParameters"]["encryptionContext"]["n"]) for r in records]
    assert numbers == list(reversed(range(120)))
    trail = aws.client("cloudtrail", aws.names.customer)
    sizes = [
        len(page["Events"])
        for page in trail.get_paginator("lookup_events").paginate(
            LookupAttributes=[{"AttributeKey": "ResourceName", "AttributeValue": key}],
            PaginationConfig={"PageSize": 40},
        )
    ]
    assert sizes[:3] == [40, 40, 40]
    assert sum(sizes) >= 121


def test_filters(aws: AwsTenant, key: str) -> None:
    trail = aws.client("cloudtrail", aws.names.customer)
    vendor = aws.role_client()
    vendor.encrypt(KeyId=key, Plaintext=b"x")

    def names(**query: Any) -> list[str]:
        return [event["EventName"] for event in trail.lookup_events(**query)["Events"]]

    def by(attribute: str, value: str) -> list[str]:
        return names(LookupAttributes=[{"AttributeKey": attribute, "AttributeValue": value}])

    (event,) = trail.lookup_events(LookupAttributes=[{"AttributeKey": "EventName", "AttributeValue": "Encrypt"}])[
        "Events"
    ]
    assert event["Username"] == "test"
    assert event["ReadOnly"] == "true"
    assert event["Resources"] == [{"ResourceType": "AWS::KMS::Key", "ResourceName": key}]
    assert json.loads(event["CloudTrailEvent"])["eventID"] == event["EventId"]
    assert by("EventId", event["EventId"]) == ["Encrypt"]
    assert by("AccessKeyId", event["AccessKeyId"]) == ["Encrypt"]
    assert by("Username", "test") == ["Encrypt"]
    assert set(by("ReadOnly", "false")) == {"CreateKey", "PutKeyPolicy"}
    assert by("ResourceType", "AWS::IAM::Role") == ["AssumeRole"]
    assert "LookupEvents" in by("EventSource", "cloudtrail.amazonaws.com")
    assert names(EndTime=datetime.now(UTC) - timedelta(hours=1)) == []
    assert names(StartTime=datetime.now(UTC) + timedelta(hours=1)) == []
    assert "Encrypt" in names(StartTime=datetime.now(UTC) - timedelta(hours=1), EndTime=datetime.now(UTC))


def test_other_accounts_see_nothing_of_it(aws: AwsTenant, key: str) -> None:
    aws.customer.kms.encrypt(KeyId=key, Plaintext=b"x")
    vendor_trail = aws.client("cloudtrail", aws.names.vendor)
    with pytest.raises(ClientError, match="AccessDenied"):
        vendor_trail.lookup_events()
    with pytest.raises(ClientError, match="AccessDenied"):
        aws.role_client("cloudtrail").lookup_events()


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({"MaxResults": 51}, "InvalidMaxResultsException"),
        ({"NextToken": "bm9uc2Vuc2U="}, "InvalidNextTokenException"),
        ({"StartTime": 2_000_000_000, "EndTime": 1_000_000_000}, "InvalidTimeRangeException"),
        (
            {"LookupAttributes": [{"AttributeKey": "Colour", "AttributeValue": "red"}]},
            "InvalidLookupAttributesException",
        ),
        ({"EventCategory": "insight"}, "InvalidEventCategoryException"),
    ],
)
def test_queries_that_make_no_sense(aws: AwsTenant, query: dict[str, Any], code: str) -> None:
    with pytest.raises(ClientError) as caught:
        aws.client("cloudtrail", aws.names.customer).lookup_events(**query)
    assert caught.value.response["Error"]["Code"] == code


def test_events_can_be_withheld_as_the_real_service_does(aws: AwsTenant, key: str) -> None:
    aws.customer.kms.encrypt(KeyId=key, Plaintext=b"x")
    aws.admin.set_faults(Faults(trail_delay_s=3600))
    assert list(aws.customer.events(EventName="Encrypt")) == []
    own = [r for r in aws.admin.audit_log() if r["recipientAccountId"] == aws.account_id]
    assert "Encrypt" in [r["eventName"] for r in own]
    aws.admin.clear_faults()
    assert len(list(aws.customer.events(EventName="Encrypt"))) == 1
