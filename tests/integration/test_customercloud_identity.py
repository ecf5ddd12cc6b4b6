"""Who may call: signatures, roles and external ids, sessions and their end, over the wire and with boto3."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import httpx
import pytest
from botocore.exceptions import ClientError

from customercloud.aws.admin import RoleRequest, UserRequest
from customercloud.aws.identity import trust_policy_document
from customercloud.aws.sigv4 import Authorization, HttpRequest, signature
from customercloud.client import Endpoint
from customercloud.faults import Faults
from shared.errors import ConflictError, InvalidInputError, NotFoundError, UnauthenticatedError

if TYPE_CHECKING:
    from tests.fixtures.customercloud import AwsTenant, StartCloud

pytestmark = pytest.mark.integration
REGION = "eu-central-1"


@contextmanager
def refused(code: str, status: int) -> Iterator[None]:
    with pytest.raises(ClientError) as caught:
        yield
    assert caught.value.response["Error"]["Code"] == code
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status


# ── signatures ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unknown_access_key(aws: AwsTenant) -> None:
    ghost = {"AccessKeyId": "AKIAGHOSTGHOSTGHOST1", "SecretAccessKey": "x" * 40}
    with refused("UnrecognizedClientException", 400):
        aws.client("kms", ghost).list_keys()
    with refused("UnrecognizedClientException", 400):
        aws.client("cloudtrail", ghost).lookup_events()
    with refused("InvalidClientTokenId", 403):
        aws.client("sts", ghost).get_caller_identity()


def test_a_wrong_secret(aws: AwsTenant) -> None:
    wrong = {"AccessKeyId": aws.names.customer.access_key_id, "SecretAccessKey": "x" * 40}
    with refused("InvalidSignatureException", 400):
        aws.client("kms", wrong).list_keys()
    with refused("SignatureDoesNotMatch", 403):
        aws.client("sts", wrong).get_caller_identity()


def signed(aws: AwsTenant, at: datetime, *, region: str = REGION, body: bytes = b"{}") -> httpx.Response:
    """A ListKeys that was signed by hand, so that the time can be chosen."""
    timestamp = at.strftime("%Y%m%dT%H%M%SZ")
    host = aws.cloud.url.partition("//")[2]
    headers = [
        ("host", host),
        ("x-amz-date", timestamp),
        ("x-amz-target", "TrentService.ListKeys"),
        ("content-type", "application/x-amz-json-1.1"),
    ]
    names = tuple(sorted(name for name, _ in headers))
    key = aws.names.customer
    authorization = Authorization(key.access_key_id, timestamp[:8], region, "kms", names, "")
    value = signature(HttpRequest("POST", "/", "", headers, b"{}"), authorization, key.secret_access_key, timestamp)
    credential = f"Credential={key.access_key_id}/{authorization.scope}"
    signed_headers = f"SignedHeaders={';'.join(names)}"
    headers.append(("authorization", f"AWS4-HMAC-SHA256 {credential}, {signed_headers}, Signature={value}"))
    return _post(aws, headers, body)


def _post(aws: AwsTenant, headers: list[tuple[str, str]], body: bytes) -> httpx.Response:
    context = ssl.create_default_context(cafile=str(aws.cloud.ca_bundle))
    with httpx.Client(verify=context, trust_env=False) as client:
        return client.post(aws.cloud.url, headers=headers, content=body)


def test_clock_skew_of_more_than_five_minutes(aws: AwsTenant) -> None:
    now = datetime.now(UTC)
    assert signed(aws, now).status_code == 200
    assert signed(aws, now - timedelta(minutes=4)).status_code == 200
    for minutes, text in ((-6, "Signature expired"), (6, "Signature not yet current")):
        answer = signed(aws, now + timedelta(minutes=minutes))
        assert answer.status_code == 400
        assert answer.json()["__type"] == "InvalidSignatureException"
        assert text in answer.json()["message"]


def test_another_region_or_body_than_the_signed_one(aws: AwsTenant) -> None:
    now = datetime.now(UTC)
    for answer in (signed(aws, now, region="us-west-2"), signed(aws, now, body=b'{"Limit": 1}')):
        assert answer.status_code == 400
        assert answer.json()["__type"] == "InvalidSignatureException"


def test_requests_that_are_not_signed_at_all(aws: AwsTenant) -> None:
    target = [("x-amz-target", "TrentService.ListKeys")]
    assert _post(aws, target, b"{}").json()["__type"] == "MissingAuthenticationTokenException"
    incomplete = [*target, ("authorization", "AWS4-HMAC-SHA256 nonsense")]
    assert _post(aws, incomplete, b"{}").json()["__type"] == "IncompleteSignatureException"
    assert _post(aws, [], b"").status_code == 404
    assert _post(aws, target, b"x" * (1024 * 1024 + 1)).status_code == 400


def test_failed_authentication_is_not_in_the_audit_log(aws: AwsTenant) -> None:
    wrong = {"AccessKeyId": aws.names.customer.access_key_id, "SecretAccessKey": "x" * 40}
    with refused("InvalidSignatureException", 400):
        aws.client("kms", wrong).create_key()
    assert list(aws.customer.events(EventName="CreateKey")) == []


# ── roles ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_vendor_assumes_the_role_with_the_external_id(aws: AwsTenant) -> None:
    answer = aws.assume_role(RoleSessionName="session-1")
    arn = f"arn:aws:sts::{aws.account_id}:assumed-role/{aws.role_name}/session-1"
    assert answer["AssumedRoleUser"]["Arn"] == arn
    assert timedelta(minutes=59) < answer["Credentials"]["Expiration"] - datetime.now(UTC) <= timedelta(hours=1)
    identity = aws.client("sts", answer["Credentials"]).get_caller_identity()
    assert (identity["Account"], identity["Arn"]) == (aws.account_id, arn)


def test_a_wrong_or_missing_external_id_or_role(aws: AwsTenant) -> None:
    with refused("AccessDenied", 403):
        aws.assume_role(ExternalId="another-customer")
    sts = aws.client("sts", aws.names.vendor)
    with refused("AccessDenied", 403):
        sts.assume_role(RoleArn=aws.role_arn, RoleSessionName="test")
    with refused("AccessDenied", 403):
        aws.assume_role(RoleArn=aws.role_arn + "x")


def test_another_vendor_cannot_use_the_role(aws: AwsTenant) -> None:
    """Neither somebody else of the vendor's account, nor the customer's own admin: the trust policy names one user."""
    allow = json.dumps({"Statement": {"Effect": "Allow", "Action": "sts:AssumeRole", "Resource": "*"}})
    other = aws.admin.put_user(aws.names.vendor.account_id, "intern", UserRequest(policies={"p": allow}))
    for credentials in (other, aws.names.customer):
        with refused("AccessDenied", 403):
            aws.client("sts", credentials).assume_role(
                RoleArn=aws.role_arn, RoleSessionName="test", ExternalId=aws.names.external_id
            )


def test_the_vendors_own_account_must_allow_too(aws: AwsTenant) -> None:
    aws.admin.put_user(aws.names.vendor.account_id, "keylake", UserRequest())
    with pytest.raises(ClientError, match="no identity-based policy allows the sts:AssumeRole action"):
        aws.assume_role()


def test_durations(aws: AwsTenant) -> None:
    short = aws.assume_role(DurationSeconds=900)["Credentials"]["Expiration"]
    assert short - datetime.now(UTC) <= timedelta(minutes=15)
    with refused("ValidationError", 400):
        aws.assume_role(DurationSeconds=3601)


def test_what_would_narrow_a_session_is_refused_not_ignored(aws: AwsTenant) -> None:
    with refused("ValidationError", 400):
        aws.assume_role(PolicyArns=[{"arn": "arn:aws:iam::aws:policy/ReadOnlyAccess"}])
    with refused("MalformedPolicyDocument", 400):
        aws.assume_role(Policy=json.dumps({"Statement": []}))
    with refused("AccessDenied", 403):
        aws.assume_role(SerialNumber="arn:aws:iam::111122223333:mfa/x", TokenCode="123456")


def test_an_altered_or_foreign_session_token(aws: AwsTenant) -> None:
    credentials = aws.assume_role()["Credentials"]
    other = aws.assume_role()["Credentials"]
    token = credentials["SessionToken"]
    for wrong in (token[:-8] + "AAAAAAA=", other["SessionToken"], "nonsense"):
        with refused("UnrecognizedClientException", 400):
            aws.client("kms", {**credentials, "SessionToken": wrong}).list_keys()
    bare = {"AccessKeyId": credentials["AccessKeyId"], "SecretAccessKey": credentials["SecretAccessKey"]}
    with refused("UnrecognizedClientException", 400):
        aws.client("kms", bare).list_keys()


def test_a_session_expires(aws: AwsTenant) -> None:
    aws.admin.set_faults(Faults(session_lifetime_s=0.1))
    credentials = aws.assume_role()["Credentials"]
    sts, kms = aws.client("sts", credentials), aws.client("kms", credentials)
    time.sleep(max(0.0, (credentials["Expiration"] - datetime.now(UTC)).total_seconds()) + 0.05)
    with refused("ExpiredToken", 403):
        sts.get_caller_identity()
    with refused("ExpiredTokenException", 400):
        kms.list_keys()


def test_deleting_the_role_ends_its_sessions_and_a_new_role_of_that_name_is_another(aws: AwsTenant) -> None:
    key = aws.customer.create_key(role_arn=aws.role_arn)
    vendor = aws.role_client()
    vendor.encrypt(KeyId=key, Plaintext=b"x")
    aws.admin.delete_role(aws.account_id, aws.role_name)
    with refused("UnrecognizedClientException", 400):
        vendor.encrypt(KeyId=key, Plaintext=b"x")
    with refused("AccessDenied", 403):
        aws.assume_role()
    trust = trust_policy_document([aws.names.vendor.arn], aws.names.external_id)
    aws.admin.put_role(aws.account_id, aws.role_name, RoleRequest(trust_policy=trust))
    again = aws.role_client()
    with refused("AccessDeniedException", 400):
        again.encrypt(KeyId=key, Plaintext=b"x")
    with refused("UnrecognizedClientException", 400):
        vendor.encrypt(KeyId=key, Plaintext=b"x")


def test_withdrawing_trust_stops_new_sessions_but_not_live_ones(aws: AwsTenant) -> None:
    """As on AWS: a session lives on. To cut it off at once the key's policy or the role itself must change."""
    key = aws.customer.create_key(role_arn=aws.role_arn)
    vendor = aws.role_client()
    trust = trust_policy_document([f"arn:aws:iam::{aws.account_id}:root"], None)
    aws.admin.put_role(aws.account_id, aws.role_name, RoleRequest(trust_policy=trust))
    with refused("AccessDenied", 403):
        aws.assume_role()
    vendor.encrypt(KeyId=key, Plaintext=b"x")
    cut = {
        "Effect": "Deny",
        "Action": "*",
        "Resource": "*",
        "Condition": {"DateLessThan": {"aws:TokenIssueTime": datetime.now(UTC).isoformat()}},
    }
    aws.admin.put_role(
        aws.account_id,
        aws.role_name,
        RoleRequest(trust_policy=trust, policies={"AWSRevokeOlderSessions": json.dumps({"Statement": cut})}),
    )
    with refused("AccessDeniedException", 400):
        vendor.encrypt(KeyId=key, Plaintext=b"x")


def test_a_deleted_user_is_out(aws: AwsTenant) -> None:
    user = aws.admin.put_user(aws.account_id, "temp", UserRequest())
    sts = aws.client("sts", user)
    sts.get_caller_identity()
    aws.admin.delete_user(aws.account_id, "temp")
    with refused("InvalidClientTokenId", 403):
        sts.get_caller_identity()


# ── the administrative side ────────────────────────────────────────────────────────────────────────────────────────


def test_the_admin_api_needs_its_token(aws: AwsTenant) -> None:
    from customercloud.client import CloudAdmin

    with CloudAdmin(aws.cloud.url, "w" * 32, verify=aws.cloud.ca_bundle) as stranger:
        for call in (stranger.faults, stranger.clear_faults, stranger.audit_log, lambda: stranger.bootstrap_aws("xx")):
            with pytest.raises(UnauthenticatedError):
                call()


def test_bootstrap_may_be_repeated(aws: AwsTenant) -> None:
    names = {"customer_account_id": aws.account_id, "vendor_account_id": aws.names.vendor.account_id}
    assert aws.admin.bootstrap_aws(aws.names.external_id, **names) == aws.names
    with pytest.raises(ConflictError):
        aws.admin.bootstrap_aws("another-id", **names)


def test_admin_refusals(aws: AwsTenant) -> None:
    key = aws.customer.create_key()
    with pytest.raises(ConflictError):
        aws.admin.complete_deletion(key)
    with pytest.raises(NotFoundError):
        aws.admin.complete_deletion("none")
    with pytest.raises(NotFoundError):
        aws.admin.delete_user(aws.account_id, "nobody")
    with pytest.raises(InvalidInputError):
        aws.admin.put_user(aws.account_id, "bad", UserRequest(policies={"p": "zzz"}))
    with pytest.raises(InvalidInputError):
        aws.admin.put_role(aws.account_id, "bad", RoleRequest(trust_policy="zzz"))


def test_plain_http_when_no_certificate_is_given(start_cloud: StartCloud) -> None:
    from tests.fixtures.customercloud import new_tenant

    cloud = start_cloud(tls=False)
    assert cloud.endpoint == Endpoint(REGION, f"http://127.0.0.1:{cloud.port}", None)
    tenant = new_tenant(cloud)
    try:
        key = tenant.customer.create_key(role_arn=tenant.role_arn)
        assert tenant.role_client().describe_key(KeyId=key)["KeyMetadata"]["Arn"] == key
    finally:
        tenant.close()
