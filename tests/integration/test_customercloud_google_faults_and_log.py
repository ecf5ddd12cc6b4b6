"""Google's side on bad days and in the records: faults over both transports, audit logs, impersonation, restarts."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import google.api_core.exceptions as api_errors
import pytest
from google.cloud import kms_v1

from customercloud.client import AwsCustomer
from customercloud.faults import ErrorKind, Faults, Outage, Service
from tests.fixtures.google import new_google_tenant

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fixtures.customercloud import AwsTenant, StartCloud
    from tests.fixtures.google import GoogleTenant

pytestmark = pytest.mark.integration

Kms = kms_v1.KeyManagementServiceClient


@pytest.fixture(params=["rest", "grpc"])
def kms(google: GoogleTenant, request: pytest.FixtureRequest) -> Kms:
    make = google.rest_client if request.param == "rest" else google.grpc_client
    return make(google.credentials())


@pytest.fixture
def key(google: GoogleTenant) -> str:
    return google.key()


def encrypt(kms: Kms, key: str, timeout: float = 5.0) -> bytes:
    answer = kms.encrypt(kms_v1.EncryptRequest(name=key, plaintext=b"x"), retry=None, timeout=timeout)
    return bytes(answer.ciphertext)


# ── faults ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("faults", "code"),
    [
        (Faults(outage=Outage.REFUSE), 503),
        (Faults(throttle_rate=1), 429),
        (Faults(error_rate=1), 500),
        (Faults(error_rate=1, error_kind=ErrorKind.DEPENDENCY_TIMEOUT), 504),
        (Faults(error_rate=1, error_kind=ErrorKind.KEY_UNAVAILABLE), 503),
    ],
    ids=["outage", "throttled", "internal", "timeout", "unavailable"],
)
def test_faults(google: GoogleTenant, kms: Kms, key: str, faults: Faults, code: int) -> None:
    encrypt(kms, key)
    with google.admin.during(faults):
        with pytest.raises(api_errors.GoogleAPICallError) as caught:
            encrypt(kms, key)
        assert caught.value.code == code
        assert (caught.value.reason == "RATE_LIMIT_EXCEEDED") == (code == 429)
    encrypt(kms, key)


def test_a_hanging_cloud_holds_the_call_until_the_client_gives_up(google: GoogleTenant, kms: Kms, key: str) -> None:
    encrypt(kms, key)
    with google.admin.during(Faults(outage=Outage.HANG)):
        started_s = time.monotonic()
        with pytest.raises(Exception, match=r"(?i)deadline|timed out"):
            encrypt(kms, key, timeout=0.3)
        assert 0.2 < time.monotonic() - started_s < 3
    encrypt(kms, key)


def test_faults_hit_the_services_and_callers_that_they_name(google: GoogleTenant, aws: AwsTenant, key: str) -> None:
    kms = google.rest_client(google.credentials())
    aws_customer: AwsCustomer = aws.customer
    with google.admin.during(Faults(outage=Outage.REFUSE, services=frozenset({Service.GOOGLE_KMS}))):
        aws_customer.create_key()
        with pytest.raises(api_errors.ServiceUnavailable):
            encrypt(kms, key)
    vendor = google.grpc_client(google.credentials(google.names.vendor.credentials_file))
    google.customer.allow(key, f"serviceAccount:{google.names.vendor.email}")
    spared = frozenset({google.names.vendor.email})
    with google.admin.during(Faults(throttle_rate=1, spared_access_key_ids=spared)):
        encrypt(vendor, key)
        with pytest.raises(api_errors.TooManyRequests):
            encrypt(kms, key)


def test_disabling_is_late_and_enabling_is_not(google: GoogleTenant, kms: Kms, key: str) -> None:
    with google.admin.during(Faults(propagation_delay_s=3600)):
        google.customer.disable(key)
        states = kms_v1.CryptoKeyVersion.CryptoKeyVersionState
        assert google.customer.describe(key).primary.state == states.DISABLED, "management sees it at once"
        encrypt(kms, key)
        google.customer.enable(key)
        encrypt(kms, key)
        google.customer.rotate(key)
        assert google.customer.describe(key).primary.name.endswith("/2")
        answer = kms.encrypt(name=key, plaintext=b"x")
        assert answer.name.endswith("/1"), "a new primary is eventual, too"


# ── records ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_call_is_recorded_and_nothing_secret(google: GoogleTenant, kms: Kms, key: str) -> None:
    request = kms_v1.EncryptRequest(name=key, plaintext=b"top secret", additional_authenticated_data=b"aad of it")
    blob = kms.encrypt(request, metadata=[("x-goog-request-reason", "because-1")]).ciphertext
    google.customer.disable(key)
    with pytest.raises(api_errors.GoogleAPICallError):
        kms.decrypt(name=key, ciphertext=blob)
    entries = google.entries()
    encrypted = next(e for e in entries if e["protoPayload"]["methodName"] == "Encrypt")
    payload = encrypted["protoPayload"]
    assert encrypted["logName"] == f"projects/{google.project}/logs/cloudaudit.googleapis.com%2Fdata_access"
    assert encrypted["severity"] == "INFO"
    assert encrypted["resource"] == {
        "type": "cloudkms_cryptokey",
        "labels": {
            "project_id": google.project,
            "location": "europe-west3",
            "key_ring_id": key.split("/")[5],
            "crypto_key_id": "cmk",
        },
    }
    assert payload["resourceName"] == key
    assert payload["serviceName"] == "cloudkms.googleapis.com"
    assert payload["authenticationInfo"]["principalEmail"] == google.names.customer.email
    assert payload["authorizationInfo"] == [
        {
            "resource": key,
            "permission": "cloudkms.cryptoKeyVersions.useToEncrypt",
            "permissionType": "DATA_READ",
            "granted": True,
        }
    ]
    assert payload["requestMetadata"]["requestAttributes"]["reason"] == "because-1"
    assert payload["requestMetadata"]["callerIp"] == "127.0.0.1"
    assert payload["request"] == {"@type": "type.googleapis.com/google.cloud.kms.v1.EncryptRequest", "name": key}
    assert "status" not in payload
    refused = entries[-1]
    assert (refused["severity"], refused["protoPayload"]["methodName"]) == ("ERROR", "Decrypt")
    assert refused["protoPayload"]["status"]["code"] == 9
    changed = next(e for e in entries if e["protoPayload"]["methodName"] == "UpdateCryptoKeyVersion")
    assert changed["logName"].endswith("%2Factivity")
    assert changed["resource"]["type"] == "cloudkms_cryptokeyversion"
    text = json.dumps(entries)
    for secret in ("top secret", "dG9wIHNlY3JldA", "aad of it", "YWFkIG9mIGl0", "Crc32c"):
        assert secret not in text


def test_a_stranger_and_a_throttled_caller_are_in_the_owners_log(google: GoogleTenant, key: str) -> None:
    stranger = google.rest_client(google.credentials(google.names.vendor.credentials_file))
    with pytest.raises(api_errors.Forbidden):
        encrypt(stranger, key)
    denied = google.entries()[-1]["protoPayload"]
    assert denied["status"]["code"] == 7
    assert denied["authenticationInfo"]["principalEmail"] == google.names.vendor.email
    assert "granted" not in denied["authorizationInfo"][0]
    kms = google.grpc_client(google.credentials())
    with google.admin.during(Faults(throttle_rate=1)), pytest.raises(api_errors.ResourceExhausted):
        encrypt(kms, key)
    assert google.entries()[-1]["protoPayload"]["status"]["code"] == 8


def test_data_access_logs_are_the_customers_choice_and_activity_is_not(
    google: GoogleTenant, kms: Kms, key: str
) -> None:
    google.admin.set_data_access_logs(google.project, enabled=False)
    before = len(google.entries())
    encrypt(kms, key)
    kms.get_crypto_key(name=key)
    google.customer.kms.create_crypto_key_version(parent=key, crypto_key_version=kms_v1.CryptoKeyVersion())
    methods = [e["protoPayload"]["methodName"] for e in google.entries()[before:]]
    assert methods == ["CreateCryptoKeyVersion"]
    google.admin.set_data_access_logs(google.project, enabled=True)
    encrypt(kms, key)
    assert google.entries()[-1]["protoPayload"]["methodName"] == "Encrypt"


def test_audit_configs_of_the_project_say_what_is_logged(google: GoogleTenant, kms: Kms, key: str) -> None:
    """As a customer really switches data access logs on: in the project's IAM policy."""
    url = f"{google.cloud.url}/v1/projects/{google.project}"
    session = google.authorized_session()
    other = google.admin.put_account(google.project, "auditor")
    reader = f"serviceAccount:{other.email}"

    def put(mask: str | None, **policy: Any) -> Any:
        body = {"policy": policy} | ({} if mask is None else {"updateMask": mask})
        return session.post(f"{url}:setIamPolicy", json=body)

    def logged() -> list[str]:
        before = len(google.entries())
        encrypt(kms, key)
        kms.get_crypto_key(name=key)
        return [e["protoPayload"]["methodName"] for e in google.entries()[before:]]

    policy = session.post(f"{url}:getIamPolicy", json={}).json()
    assert "auditConfigs" not in policy
    assert put("auditConfigs", auditConfigs=[]).json()["bindings"] == policy["bindings"]
    assert logged() == []
    reads = {"service": "cloudkms.googleapis.com", "auditLogConfigs": [{"logType": "DATA_READ"}]}
    assert put("auditConfigs", auditConfigs=[reads]).json()["auditConfigs"] == [reads]
    assert logged() == ["Encrypt"]
    # Without a mask the audit configs stay as they are.
    assert put(None, bindings=policy["bindings"]).json()["auditConfigs"] == [reads]
    admin = google.names.customer.email
    exempted = {"logType": "DATA_READ", "exemptedMembers": [f"serviceAccount:{admin}"]}
    all_but = {"service": "allServices", "auditLogConfigs": [exempted, {"logType": "ADMIN_READ"}]}
    assert put("bindings,auditConfigs", bindings=policy["bindings"], auditConfigs=[reads, all_but]).status_code == 200
    assert logged() == ["GetCryptoKey"]
    for bad in (
        {"service": "allServices"},
        {"service": "x", "auditLogConfigs": [{"logType": "DATA_READ"}]},
        {"service": "allServices", "auditLogConfigs": [{}]},
        {"service": "allServices", "auditLogConfigs": [{"logType": "DATA_READ", "exemptedMembers": ["nobody"]}]},
    ):
        assert put("auditConfigs", auditConfigs=[bad]).status_code == 400, bad
    assert reader not in str(session.post(f"{url}:getIamPolicy", json={}).json())


def test_entries_can_be_late(google: GoogleTenant, kms: Kms, key: str) -> None:
    with google.admin.during(Faults(trail_delay_s=3600)):
        encrypt(kms, key)
        assert google.entries() == []
    assert google.entries()[-1]["protoPayload"]["methodName"] == "Encrypt"


# ── impersonation ──────────────────────────────────────────────────────────────────────────────────────────────────


def _generate(google: GoogleTenant, caller: dict[str, Any], **changes: Any) -> Any:
    body = {"scope": ["https://www.googleapis.com/auth/cloudkms"], "lifetime": "600s"} | changes
    session = google.authorized_session(caller)
    url = f"{google.cloud.url}/v1/projects/-/serviceAccounts/{google.names.service_account}:generateAccessToken"
    return session.post(url, json=body)


def test_impersonation(google: GoogleTenant, key: str) -> None:
    vendor, customer = google.names.vendor.credentials_file, google.names.customer.credentials_file
    answer = _generate(google, vendor)
    assert answer.status_code == 200
    expires = datetime.strptime(answer.json()["expireTime"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert timedelta(seconds=590) < expires - datetime.now(UTC) <= timedelta(seconds=600)
    encrypt(google.grpc_client_with_token(answer.json()["accessToken"]), key)
    record = next(e for e in google.entries() if e["protoPayload"]["methodName"] == "GenerateAccessToken")
    assert record["resource"]["type"] == "service_account"
    assert record["protoPayload"]["serviceName"] == "iamcredentials.googleapis.com"
    assert record["protoPayload"]["request"]["name"].endswith(google.names.service_account)
    assert "accessToken" not in json.dumps(record)
    refused = _generate(google, customer)
    assert refused.status_code == 403, "owner is not token creator"
    assert "iam.serviceAccounts.getAccessToken" in refused.json()["error"]["message"]
    for lifetime in ("3601s", "0s", "soon"):
        assert _generate(google, vendor, lifetime=lifetime).status_code == 400
    for scope in ([], ["x"]):
        assert _generate(google, vendor, scope=scope).status_code == 400
    assert _generate(google, vendor, delegates=["x"]).status_code == 501


def test_tokens_end(google: GoogleTenant, key: str) -> None:
    with google.admin.during(Faults(session_lifetime_s=1.0)):
        token = _generate(google, google.names.vendor.credentials_file).json()["accessToken"]
    client = google.grpc_client_with_token(token)

    def use_until_refused() -> None:
        for _ in range(100):
            encrypt(client, key)
            time.sleep(0.05)

    with pytest.raises(api_errors.Unauthenticated) as caught:
        use_until_refused()
    assert caught.value.reason == "ACCESS_TOKEN_EXPIRED"


# ── restarts ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_everything_survives_sigkill_and_nothing_lies_open_on_disk(start_cloud: StartCloud, tmp_path: Path) -> None:
    cloud = start_cloud()
    google = new_google_tenant(cloud, tmp_path)
    try:
        key = google.key()
        kms = google.rest_client(google.credentials())
        blob = encrypt(kms, key)
        google.customer.rotate(key)
        entries = google.entries()
        cloud.stop(kill=True)
        cloud.start()
        assert google.entries() == entries
        assert kms.decrypt(name=key, ciphertext=blob).plaintext == b"x"
        assert google.customer.describe(key).primary.name.endswith("/2")
        again = google.admin.bootstrap_google(customer_project=google.project)
        assert again.customer == google.names.customer
        stored = b"".join(path.read_bytes() for path in (cloud.state_dir / "google").iterdir())
        private_key = google.names.customer.credentials_file["private_key"]
        assert private_key[100:150].encode() not in stored
        assert b"BEGIN" not in stored
    finally:
        google.close()
