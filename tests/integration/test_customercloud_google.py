"""Google Cloud KMS as its unmodified SDK sees it, over REST and over gRPC: the whole surface, the exact refusals."""

from __future__ import annotations

import contextlib
import json
import secrets
from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import google.api_core.exceptions as api_errors
import google_crc32c
import grpc
import pytest
import requests
from google.auth.credentials import AnonymousCredentials
from google.cloud import kms_v1
from google.cloud.kms_v1.services.key_management_service.transports import KeyManagementServiceTransport
from google.cloud.location import locations_pb2
from google.iam.v1 import iam_policy_pb2, policy_pb2
from google.longrunning import operations_pb2
from google.protobuf import field_mask_pb2
from tink import TinkError, aead
from tink.integration import gcpkms

if TYPE_CHECKING:
    from tests.fixtures.google import GoogleTenant

pytestmark = pytest.mark.integration

Kms = kms_v1.KeyManagementServiceClient
STATES = kms_v1.CryptoKeyVersion.CryptoKeyVersionState
SYMMETRIC = kms_v1.CryptoKey(purpose=kms_v1.CryptoKey.CryptoKeyPurpose.ENCRYPT_DECRYPT)


@pytest.fixture(params=["rest", "grpc"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def kms(google: GoogleTenant, transport: str) -> Kms:
    """As the customer's administrator."""
    return client(google, transport, google.credentials())


def client(google: GoogleTenant, transport: str, credentials: Any) -> Kms:
    return google.rest_client(credentials) if transport == "rest" else google.grpc_client(credentials)


@pytest.fixture
def ring(google: GoogleTenant, kms: Kms) -> str:
    parent = f"projects/{google.project}/locations/europe-west3"
    return str(kms.create_key_ring(parent=parent, key_ring_id="ring", key_ring=kms_v1.KeyRing()).name)


@pytest.fixture
def key(kms: Kms, ring: str) -> str:
    return str(kms.create_crypto_key(parent=ring, crypto_key_id="cmk", crypto_key=SYMMETRIC).name)


def crc(data: bytes) -> int:
    return int(google_crc32c.value(data))


def refusal(call: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Status, message and details of a refusal, the same over both transports."""
    with pytest.raises(api_errors.GoogleAPICallError) as caught:
        call(*arguments)
    error = caught.value
    details = {type(detail).__name__: detail for detail in error.details if not isinstance(detail, dict)}
    if error.grpc_status_code is not None:
        return {"status": error.grpc_status_code.name, "message": error.message, "details": details}
    assert error.response is not None
    body = error.response.json()["error"]
    assert body["code"] == error.response.status_code
    shown = {detail["@type"].rpartition(".")[2]: detail for detail in body.get("details", [])}
    return {"status": body["status"], "message": body["message"], "details": shown}


# ── cryptography ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_encrypt_and_decrypt_with_aad_and_checksums(kms: Kms, key: str) -> None:
    plaintext, aad = secrets.token_bytes(32), b"context"
    answer = kms.encrypt(
        kms_v1.EncryptRequest(
            name=key,
            plaintext=plaintext,
            plaintext_crc32c=crc(plaintext),
            additional_authenticated_data=aad,
            additional_authenticated_data_crc32c=crc(aad),
        )
    )
    assert answer.name == f"{key}/cryptoKeyVersions/1"
    assert answer.verified_plaintext_crc32c
    assert answer.verified_additional_authenticated_data_crc32c
    assert answer.ciphertext_crc32c == crc(answer.ciphertext)
    assert answer.protection_level == kms_v1.ProtectionLevel.SOFTWARE
    opened = kms.decrypt(
        kms_v1.DecryptRequest(
            name=key,
            ciphertext=answer.ciphertext,
            ciphertext_crc32c=crc(answer.ciphertext),
            additional_authenticated_data=aad,
        )
    )
    assert (opened.plaintext, opened.plaintext_crc32c, opened.used_primary) == (plaintext, crc(plaintext), True)


def test_what_was_not_sent_is_not_verified(kms: Kms, key: str) -> None:
    answer = kms.encrypt(name=key, plaintext=b"x")
    assert not answer.verified_plaintext_crc32c
    assert not answer.verified_additional_authenticated_data_crc32c


def test_wrong_checksums_are_refused(kms: Kms, key: str) -> None:
    for request in (
        kms_v1.EncryptRequest(name=key, plaintext=b"x", plaintext_crc32c=crc(b"y")),
        kms_v1.EncryptRequest(name=key, plaintext=b"x", additional_authenticated_data_crc32c=1),
    ):
        answer = refusal(kms.encrypt, request)
        assert answer["status"] == "INVALID_ARGUMENT"
        assert answer["message"].startswith("The checksum in field ")
    blob = kms.encrypt(name=key, plaintext=b"x").ciphertext
    wrong = kms_v1.DecryptRequest(name=key, ciphertext=blob, ciphertext_crc32c=crc(b""))
    expected = "The checksum in field ciphertext_crc32c did not match the data in field ciphertext."
    assert refusal(lambda: kms.decrypt(wrong))["message"].endswith(expected)


def test_wrong_aad_wrong_key_and_damage(kms: Kms, ring: str, key: str) -> None:
    blob = kms.encrypt(name=key, plaintext=b"x").ciphertext
    other = kms.create_crypto_key(parent=ring, crypto_key_id="other", crypto_key=SYMMETRIC).name
    foreign = kms.encrypt(name=other, plaintext=b"x").ciphertext
    invalid, elsewhere = "the ciphertext is invalid.", "verify that 'name' refers to the correct CryptoKey."
    for ciphertext, aad, reason in (
        (blob, b"aad", invalid),
        (blob[:-1], b"", invalid),
        (blob[:-1] + bytes([blob[-1] ^ 1]), b"", invalid),
        (b"x", b"", invalid),
        (b64encode(blob), b"", invalid),
        (foreign, b"", elsewhere),
        (b"", b"", elsewhere),
    ):
        request = kms_v1.DecryptRequest(name=key, ciphertext=ciphertext, additional_authenticated_data=aad)
        answer = refusal(kms.decrypt, request)
        assert answer["status"] == "INVALID_ARGUMENT"
        assert answer["message"].endswith(f"Decryption failed: {reason}")


def test_sizes(kms: Kms, ring: str, key: str) -> None:
    full = secrets.token_bytes(65536)
    blob = kms.encrypt(kms_v1.EncryptRequest(name=key, plaintext=full, additional_authenticated_data=full)).ciphertext
    opened = kms.decrypt(kms_v1.DecryptRequest(name=key, ciphertext=blob, additional_authenticated_data=full))
    assert opened.plaintext == full
    assert kms.decrypt(name=key, ciphertext=kms.encrypt(name=key, plaintext=b"").ciphertext).plaintext == b""
    assert refusal(lambda: kms.encrypt(name=key, plaintext=bytes(65537)))["status"] == "INVALID_ARGUMENT"
    template = kms_v1.CryptoKeyVersionTemplate(protection_level=kms_v1.ProtectionLevel.HSM)
    hsm = kms.create_crypto_key(
        parent=ring,
        crypto_key_id="hsm",
        crypto_key=kms_v1.CryptoKey(purpose=SYMMETRIC.purpose, version_template=template),
    )
    assert kms.encrypt(name=hsm.name, plaintext=bytes(8192)).protection_level == kms_v1.ProtectionLevel.HSM
    assert refusal(lambda: kms.encrypt(name=hsm.name, plaintext=bytes(8193)))["status"] == "INVALID_ARGUMENT"


def test_a_version_can_be_named_to_encrypt_but_not_to_decrypt(kms: Kms, key: str) -> None:
    kms.create_crypto_key_version(parent=key, crypto_key_version=kms_v1.CryptoKeyVersion())
    answer = kms.encrypt(name=f"{key}/cryptoKeyVersions/2", plaintext=b"x")
    assert answer.name == f"{key}/cryptoKeyVersions/2"
    assert kms.decrypt(name=key, ciphertext=answer.ciphertext).used_primary is False
    missing = refusal(lambda: kms.encrypt(name=f"{key}/cryptoKeyVersions/3", plaintext=b"x"))
    assert missing["status"] == "NOT_FOUND"


def test_methods_of_other_purposes_are_refused(kms: Kms, key: str) -> None:
    version = f"{key}/cryptoKeyVersions/1"
    for call in (
        lambda: kms.mac_sign(name=version, data=b"x"),
        lambda: kms.asymmetric_decrypt(name=version, ciphertext=b"x"),
        lambda: kms.asymmetric_sign(name=version, digest=kms_v1.Digest(sha256=bytes(32))),
        lambda: kms.get_public_key(name=version),
        lambda: kms.raw_encrypt(kms_v1.RawEncryptRequest(name=version, plaintext=b"x")),
    ):
        assert refusal(call)["status"] == "INVALID_ARGUMENT"


def test_random_bytes(google: GoogleTenant, kms: Kms) -> None:
    location = f"projects/{google.project}/locations/europe-west3"
    asked = kms_v1.GenerateRandomBytesRequest(location=location, length_bytes=64, protection_level="HSM")
    answer = kms.generate_random_bytes(asked)
    assert len(answer.data) == 64
    assert answer.data_crc32c == crc(answer.data)


# ── keys and versions ──────────────────────────────────────────────────────────────────────────────────────────────


def test_rotation_and_primary(kms: Kms, key: str) -> None:
    old = kms.encrypt(name=key, plaintext=b"old").ciphertext
    version = kms.create_crypto_key_version(parent=key, crypto_key_version=kms_v1.CryptoKeyVersion())
    assert version.name == f"{key}/cryptoKeyVersions/2"
    assert kms.get_crypto_key(name=key).primary.name.endswith("/1"), "a new version is not primary by itself"
    rotated = kms.update_crypto_key_primary_version(name=key, crypto_key_version_id="2")
    assert rotated.primary.name == version.name
    new = kms.encrypt(name=key, plaintext=b"new")
    assert new.name == version.name
    opened = kms.decrypt(name=key, ciphertext=old)
    assert (opened.plaintext, opened.used_primary) == (b"old", False)


@pytest.mark.parametrize("state", ["DISABLED", "DESTROY_SCHEDULED", "DESTROYED"])
def test_versions_that_are_not_enabled(google: GoogleTenant, kms: Kms, key: str, state: str) -> None:
    blob = kms.encrypt(name=key, plaintext=b"x").ciphertext
    version = f"{key}/cryptoKeyVersions/1"
    match state:
        case "DISABLED":
            google.customer.disable(key)
        case "DESTROY_SCHEDULED":
            google.customer.schedule_destruction(key)
        case _:
            google.customer.schedule_destruction(key)
            google.admin.complete_destruction(key)
    for call in (
        lambda: kms.decrypt(name=key, ciphertext=blob),
        lambda: kms.encrypt(name=key, plaintext=b"x"),
        lambda: kms.encrypt(name=version, plaintext=b"x"),
        lambda: kms.update_crypto_key_primary_version(name=key, crypto_key_version_id="1"),
    ):
        answer = refusal(call)
        assert answer["status"] == "FAILED_PRECONDITION"
        assert answer["message"].endswith(f"{version} is not enabled, current state is: {state}.")
        (violation,) = _violations(answer)
        assert violation == (f"KEY_{state}", version)
    assert kms.get_crypto_key_version(name=version).state.name == state


def _violations(answer: dict[str, Any]) -> list[tuple[str, str]]:
    detail = answer["details"]["PreconditionFailure"]
    if isinstance(detail, dict):
        return [(violation["type"], violation["subject"]) for violation in detail["violations"]]
    return [(violation.type, violation.subject) for violation in detail.violations]


def test_life_of_a_version(google: GoogleTenant, kms: Kms, key: str) -> None:
    name = f"{key}/cryptoKeyVersions/1"
    blob = kms.encrypt(name=key, plaintext=b"x").ciphertext

    def set_state(state: Any) -> Any:
        version = kms_v1.CryptoKeyVersion(name=name, state=state)
        return kms.update_crypto_key_version(crypto_key_version=version, update_mask={"paths": ["state"]})

    assert set_state(STATES.DISABLED).state == STATES.DISABLED
    assert set_state(STATES.ENABLED).state == STATES.ENABLED
    scheduled = kms.destroy_crypto_key_version(name=name)
    assert scheduled.state == STATES.DESTROY_SCHEDULED
    assert timedelta(days=29) < scheduled.destroy_time - datetime.now(UTC) <= timedelta(days=30)
    for refused in (lambda: set_state(STATES.ENABLED), lambda: kms.destroy_crypto_key_version(name=name)):
        answer = refusal(refused)
        assert answer["status"] == "FAILED_PRECONDITION"
        assert answer["message"].endswith(
            f"The request cannot be fulfilled. Resource {name} has value DESTROY_SCHEDULED in field "
            "crypto_key_version.state."
        )
    restored = kms.restore_crypto_key_version(name=name)
    assert (restored.state, restored.destroy_time) == (STATES.DISABLED, None)
    assert refusal(lambda: kms.restore_crypto_key_version(name=name))["status"] == "FAILED_PRECONDITION"
    set_state(STATES.ENABLED)
    assert kms.decrypt(name=key, ciphertext=blob).plaintext == b"x"
    kms.destroy_crypto_key_version(name=name)
    google.admin.complete_destruction(key)
    gone = kms.get_crypto_key_version(name=name)
    assert gone.state == STATES.DESTROYED
    assert gone.destroy_event_time is not None
    assert refusal(lambda: kms.restore_crypto_key_version(name=name))["status"] == "FAILED_PRECONDITION"
    wrong = kms_v1.CryptoKeyVersion(name=name, state=STATES.ENABLED)
    for paths in ([], ["algorithm"], ["state", "name"]):
        mask = {"paths": paths}
        request = kms_v1.UpdateCryptoKeyVersionRequest(crypto_key_version=wrong, update_mask=mask)
        assert refusal(kms.update_crypto_key_version, request)["status"] == "INVALID_ARGUMENT"


def test_settings_of_a_key(kms: Kms, ring: str) -> None:
    tomorrow = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    asked = kms_v1.CryptoKey(
        purpose=SYMMETRIC.purpose,
        labels={"team": "storage"},
        rotation_period=timedelta(days=30),
        next_rotation_time=tomorrow,
        destroy_scheduled_duration=timedelta(days=2),
    )
    made = kms.create_crypto_key(parent=ring, crypto_key_id="set", crypto_key=asked)
    assert dict(made.labels) == {"team": "storage"}
    assert made.rotation_period == timedelta(days=30)
    assert made.next_rotation_time == tomorrow
    scheduled = kms.destroy_crypto_key_version(name=made.primary.name)
    assert scheduled.destroy_time - datetime.now(UTC) < timedelta(days=2)
    changed = kms.update_crypto_key(
        crypto_key=kms_v1.CryptoKey(name=made.name, labels={"a": "b"}, rotation_period=timedelta(days=60)),
        update_mask={"paths": ["labels", "rotation_period"]},
    )
    assert (dict(changed.labels), changed.rotation_period) == ({"a": "b"}, timedelta(days=60))
    assert changed.next_rotation_time == tomorrow
    for fields, paths in (
        ({"labels": {"Upper": "x"}}, ["labels"]),
        ({"rotation_period": timedelta(hours=23)}, ["rotation_period"]),
        ({"next_rotation_time": datetime(2020, 1, 1, tzinfo=UTC)}, ["next_rotation_time"]),
        ({}, ["purpose"]),
        ({}, ["primary"]),
        ({}, []),
    ):
        request = kms_v1.UpdateCryptoKeyRequest(
            crypto_key=kms_v1.CryptoKey(name=made.name, **fields), update_mask={"paths": paths}
        )
        assert refusal(kms.update_crypto_key, request)["status"] == "INVALID_ARGUMENT"


def test_keys_that_cannot_be_made(kms: Kms, ring: str, key: str) -> None:
    purposes = kms_v1.CryptoKey.CryptoKeyPurpose
    for status, key_id, asked in (
        ("ALREADY_EXISTS", "cmk", SYMMETRIC),
        ("INVALID_ARGUMENT", "no/slash", SYMMETRIC),
        ("INVALID_ARGUMENT", "", SYMMETRIC),
        ("INVALID_ARGUMENT", "k", kms_v1.CryptoKey()),
        ("UNIMPLEMENTED", "k", kms_v1.CryptoKey(purpose=purposes.MAC)),
        ("UNIMPLEMENTED", "k", kms_v1.CryptoKey(purpose=purposes.ASYMMETRIC_SIGN)),
        ("INVALID_ARGUMENT", "k", kms_v1.CryptoKey(purpose=SYMMETRIC.purpose, rotation_period=timedelta(days=9))),
    ):
        request = kms_v1.CreateCryptoKeyRequest(parent=ring, crypto_key_id=key_id, crypto_key=asked)
        assert refusal(kms.create_crypto_key, request)["status"] == status


def test_a_key_without_a_version_cannot_encrypt(kms: Kms, ring: str) -> None:
    request = kms_v1.CreateCryptoKeyRequest(
        parent=ring, crypto_key_id="empty", crypto_key=SYMMETRIC, skip_initial_version_creation=True
    )
    name = kms.create_crypto_key(request).name
    assert "primary" not in kms.get_crypto_key(name=name)
    assert refusal(lambda: kms.encrypt(name=name, plaintext=b"x"))["status"] == "FAILED_PRECONDITION"


def test_lists_are_paged(google: GoogleTenant, kms: Kms, ring: str) -> None:
    names = [kms.create_crypto_key(parent=ring, crypto_key_id=f"k{i}", crypto_key=SYMMETRIC).name for i in range(5)]
    assert [key.name for key in kms.list_crypto_keys(kms_v1.ListCryptoKeysRequest(parent=ring, page_size=2))] == names
    pages = list(kms.list_crypto_keys(kms_v1.ListCryptoKeysRequest(parent=ring, page_size=2)).pages)
    assert [(len(page.crypto_keys), page.total_size) for page in pages] == [(2, 5), (2, 5), (1, 5)]
    for _ in range(10):
        kms.create_crypto_key_version(parent=names[0], crypto_key_version=kms_v1.CryptoKeyVersion())
    request = kms_v1.ListCryptoKeyVersionsRequest(parent=names[0], page_size=4)
    numbers = [int(v.name.rpartition("/")[2]) for v in kms.list_crypto_key_versions(request)]
    assert numbers == list(range(1, 12))
    assert [r.name for r in kms.list_key_rings(parent=ring.rpartition("/keyRings/")[0])] == [ring]
    for wrong in ({"page_token": "!"}, {"page_size": -1}, {"page_token": "YWJj"}):
        asked = kms_v1.ListCryptoKeysRequest(parent=ring, **wrong)
        assert refusal(kms.list_crypto_keys, asked)["status"] == "INVALID_ARGUMENT"


def test_names(google: GoogleTenant, kms: Kms, ring: str, key: str) -> None:
    assert kms.get_key_ring(name=ring).name == ring
    missing = refusal(lambda: kms.get_crypto_key(name=f"{key}x"))
    assert missing["status"] == "NOT_FOUND"
    assert missing["message"].endswith(f"CryptoKey {key}x not found.")
    nowhere = ring.replace("europe-west3", "atlantis")
    refused = refusal(lambda: kms.get_key_ring(name=nowhere))
    assert refused["status"] == "NOT_FOUND"
    assert "The request concerns location 'atlantis' but was sent to location" in refused["message"]


def test_locations(google: GoogleTenant, kms: Kms) -> None:
    project = f"projects/{google.project}"
    listed = kms.list_locations(locations_pb2.ListLocationsRequest(name=project)).locations
    assert {"global", "europe-west3", "us-east1"} <= {location.location_id for location in listed}
    name = f"{project}/locations/global"
    assert kms.get_location(locations_pb2.GetLocationRequest(name=name)).name == name


# ── who may ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_policies_with_etag(google: GoogleTenant, kms: Kms, key: str) -> None:
    empty = kms.get_iam_policy(request=iam_policy_pb2.GetIamPolicyRequest(resource=key))
    assert (list(empty.bindings), empty.etag) == ([], b"\x00\x20\x01")
    role = "roles/cloudkms.cryptoKeyEncrypter"
    policy = policy_pb2.Policy(etag=empty.etag, bindings=[policy_pb2.Binding(role=role, members=[google.member])])

    def put(asked: policy_pb2.Policy) -> policy_pb2.Policy:
        return kms.set_iam_policy(request=iam_policy_pb2.SetIamPolicyRequest(resource=key, policy=asked))

    stored = put(policy)
    assert stored.etag not in (b"", empty.etag)
    assert kms.get_iam_policy(request=iam_policy_pb2.GetIamPolicyRequest(resource=key)) == stored
    assert refusal(lambda: put(policy))["status"] == "ABORTED"
    for binding in (
        policy_pb2.Binding(role="roles/no.such", members=[google.member]),
        policy_pb2.Binding(role=role, members=["keylake"]),
        policy_pb2.Binding(role=role, members=["serviceAccount:ghost@nowhere-1.iam.gserviceaccount.com"]),
        policy_pb2.Binding(role=role, members=[google.member], condition={"expression": "false"}),
    ):
        assert refusal(put, policy_pb2.Policy(bindings=[binding]))["status"] == "INVALID_ARGUMENT"


def test_conditions_are_refused(google: GoogleTenant, kms: Kms, key: str) -> None:
    binding = policy_pb2.Binding(
        role="roles/cloudkms.viewer", members=[google.member], condition={"expression": "false"}
    )
    asked = iam_policy_pb2.SetIamPolicyRequest(resource=key, policy=policy_pb2.Policy(version=3, bindings=[binding]))
    answer = refusal(lambda: kms.set_iam_policy(request=asked))
    assert answer["message"] == "Conditions are not supported on this resource."
    audited = policy_pb2.Policy(audit_configs=[policy_pb2.AuditConfig(service="allServices")])
    mask = field_mask_pb2.FieldMask(paths=["audit_configs"])
    asked = iam_policy_pb2.SetIamPolicyRequest(resource=key, policy=audited, update_mask=mask)
    assert refusal(lambda: kms.set_iam_policy(request=asked))["status"] == "INVALID_ARGUMENT"


# ── filters, orders, and methods that do nothing here ──────────────────────────────────────────────────────────────


def test_filters_and_orders(google: GoogleTenant, kms: Kms, ring: str) -> None:
    for key_id, team in (("a1", "red"), ("a2", "blue"), ("b1", "red")):
        made = kms_v1.CryptoKey(SYMMETRIC, labels={"team": team})
        kms.create_crypto_key(parent=ring, crypto_key_id=key_id, crypto_key=made)
    kms.update_crypto_key_version(
        crypto_key_version=kms_v1.CryptoKeyVersion(
            name=f"{ring}/cryptoKeys/b1/cryptoKeyVersions/1", state=STATES.DISABLED
        ),
        update_mask=field_mask_pb2.FieldMask(paths=["state"]),
    )

    def listed(**request: Any) -> list[str]:
        pages = kms.list_crypto_keys(request={"parent": ring, "page_size": 2, **request})
        return [key.name.rpartition("/")[2] for key in pages]

    for text, expected in {
        "": ["a1", "a2", "b1"],
        "labels.team=red": ["a1", "b1"],
        "labels.team != red": ["a2"],
        "-labels.team=red": ["a2"],
        "NOT labels.team=red": ["a2"],
        'name:"A" primary.state=ENABLED': ["a1", "a2"],
        "primary.state=DISABLED AND labels.team=red": ["b1"],
        # OR binds closer than AND.
        "name:a1 OR name:b1 AND primary.state=DISABLED": ["b1"],
        "name:a1 OR (name:b1 primary.state=DISABLED)": ["a1", "b1"],
        "createTime < 2020-01-01T00:00:00Z": [],
        'create_time > "2020-01-01T00:00:00Z"': ["a1", "a2", "b1"],
        "purpose=ENCRYPT_DECRYPT": ["a1", "a2", "b1"],
        "versionTemplate.protectionLevel=HSM": [],
    }.items():
        assert listed(filter=text) == expected, text
    assert listed(order_by="name desc") == ["b1", "a2", "a1"]
    assert listed(order_by="name desc", filter="labels.team=red") == ["b1", "a1"]
    versions = kms.list_crypto_key_versions(
        request={"parent": f"{ring}/cryptoKeys/b1", "filter": "state=DISABLED", "order_by": "name"}
    )
    assert [version.state for version in versions] == [STATES.DISABLED]
    for request in ({"filter": "team=red"}, {"filter": "name:"}, {"filter": "(name:a"}, {"order_by": "createTime"}):
        assert refusal(lambda request=request: listed(**request))["status"] == "INVALID_ARGUMENT", request


def test_no_method_of_the_service_is_unknown(google: GoogleTenant, kms: Kms, key: str, ring: str) -> None:
    """Of all that the SDK knows of, over both transports: each succeeds or refuses in the service's own words."""
    location = ring.partition("/keyRings")[0]
    names = {
        "location": location, "keyRing": ring, "cryptoKey": key, "cryptoKeyVersion": f"{key}/cryptoKeyVersions/1",
        "importJob": f"{ring}/importJobs/j", "retiredResource": f"{location}/retiredResources/r",
    }  # fmt: skip
    methods = {name for name, value in vars(KeyManagementServiceTransport).items() if isinstance(value, property)}
    assert methods - LOOKED_AT_ELSEWHERE == RPCS.keys()
    for method, (member, kind) in RPCS.items():
        request: dict[str, Any] = {member: names[kind]}
        call = getattr(kms, method)
        if method in NOT_HERE:
            answer = refusal(lambda call=call, request=request: call(request=request))
            assert answer["status"] == "UNIMPLEMENTED", method
            assert answer["message"].endswith(" does not exist here."), method
            continue
        with contextlib.suppress(api_errors.BadRequest, api_errors.NotFound):  # in words that other tests look at
            call(request=request)
    assert list(kms.list_import_jobs(parent=ring)) == []
    assert list(kms.list_retired_resources(parent=location)) == []
    assert refusal(lambda: kms.get_import_job(name=names["importJob"]))["status"] == "NOT_FOUND"
    operation = operations_pb2.GetOperationRequest(name=f"{location}/operations/o")
    assert refusal(lambda: kms.get_operation(request=operation))["status"] == "NOT_FOUND"


LOOKED_AT_ELSEWHERE = {
    "host", "kind", "operations_client", "update_crypto_key", "update_crypto_key_version", "get_iam_policy",
    "set_iam_policy", "test_iam_permissions", "get_location", "list_locations", "get_operation",
}  # fmt: skip
NOT_HERE = {
    "create_import_job", "import_crypto_key_version", "import_trusted_key_wrapped_crypto_key_version",
    "export_trusted_key_wrapped_crypto_key_version", "delete_crypto_key", "delete_crypto_key_version", "decapsulate",
}  # fmt: skip
RPCS = {
    "list_key_rings": ("parent", "location"),
    "list_crypto_keys": ("parent", "keyRing"),
    "list_crypto_key_versions": ("parent", "cryptoKey"),
    "list_import_jobs": ("parent", "keyRing"),
    "list_retired_resources": ("parent", "location"),
    "get_key_ring": ("name", "keyRing"),
    "get_crypto_key": ("name", "cryptoKey"),
    "get_crypto_key_version": ("name", "cryptoKeyVersion"),
    "get_public_key": ("name", "cryptoKeyVersion"),
    "get_import_job": ("name", "importJob"),
    "get_retired_resource": ("name", "retiredResource"),
    "create_key_ring": ("parent", "location"),
    "create_crypto_key": ("parent", "keyRing"),
    "create_crypto_key_version": ("parent", "cryptoKey"),
    "create_import_job": ("parent", "keyRing"),
    "import_crypto_key_version": ("parent", "cryptoKey"),
    "import_trusted_key_wrapped_crypto_key_version": ("parent", "cryptoKey"),
    "export_trusted_key_wrapped_crypto_key_version": ("name", "cryptoKeyVersion"),
    "delete_crypto_key": ("name", "cryptoKey"),
    "delete_crypto_key_version": ("name", "cryptoKeyVersion"),
    "update_crypto_key_primary_version": ("name", "cryptoKey"),
    "destroy_crypto_key_version": ("name", "cryptoKeyVersion"),
    "restore_crypto_key_version": ("name", "cryptoKeyVersion"),
    "encrypt": ("name", "cryptoKey"),
    "decrypt": ("name", "cryptoKey"),
    "raw_encrypt": ("name", "cryptoKeyVersion"),
    "raw_decrypt": ("name", "cryptoKeyVersion"),
    "asymmetric_sign": ("name", "cryptoKeyVersion"),
    "asymmetric_decrypt": ("name", "cryptoKeyVersion"),
    "mac_sign": ("name", "cryptoKeyVersion"),
    "mac_verify": ("name", "cryptoKeyVersion"),
    "decapsulate": ("name", "cryptoKeyVersion"),
    "generate_random_bytes": ("location", "location"),
}


def test_every_permission_counts_by_itself(google: GoogleTenant, kms: Kms, key: str, transport: str) -> None:
    """An encrypter may not decrypt, a decrypter may not encrypt, neither may look."""
    blob = kms.encrypt(name=key, plaintext=b"x").ciphertext
    other = google.admin.put_account(google.project, f"user-{secrets.token_hex(4)}")
    caller = client(google, transport, google.credentials(other.credentials_file))
    uses: dict[str, Callable[[], Any]] = {
        "cloudkms.cryptoKeyVersions.useToEncrypt": lambda: caller.encrypt(name=key, plaintext=b"x"),
        "cloudkms.cryptoKeyVersions.useToDecrypt": lambda: caller.decrypt(name=key, ciphertext=blob),
        "cloudkms.cryptoKeys.get": lambda: caller.get_crypto_key(name=key),
    }
    for role, allowed in (
        (None, set[str]()),
        ("roles/cloudkms.cryptoKeyEncrypter", {"cloudkms.cryptoKeyVersions.useToEncrypt"}),
        ("roles/cloudkms.cryptoKeyDecrypter", {"cloudkms.cryptoKeyVersions.useToDecrypt"}),
        ("roles/cloudkms.viewer", {"cloudkms.cryptoKeys.get"}),
        ("roles/cloudkms.admin", {"cloudkms.cryptoKeys.get"}),
        ("roles/cloudkms.cryptoKeyEncrypterDecrypter", set(uses) - {"cloudkms.cryptoKeys.get"}),
    ):
        members = [f"serviceAccount:{other.email}"]
        bindings = [] if role is None else [policy_pb2.Binding(role=role, members=members)]
        google.customer.put_policy(key, policy_pb2.Policy(bindings=bindings))
        asked = iam_policy_pb2.TestIamPermissionsRequest(resource=key, permissions=sorted(uses))
        assert set(caller.test_iam_permissions(request=asked).permissions) == allowed
        for permission, use in uses.items():
            if permission in allowed:
                use()
                continue
            answer = refusal(use)
            assert answer["status"] == "PERMISSION_DENIED"
            expected = f"Permission '{permission}' denied on resource '{key}' (or it may not exist)."
            assert answer["message"].endswith(expected)
            info = answer["details"]["ErrorInfo"]
            assert (info["reason"] if isinstance(info, dict) else info.reason) == "IAM_PERMISSION_DENIED"


def test_what_a_ring_grants_holds_for_its_keys_and_nothing_else(
    google: GoogleTenant, kms: Kms, ring: str, key: str, transport: str
) -> None:
    other = google.admin.put_account(google.project, f"user-{secrets.token_hex(4)}")
    google.customer.allow(ring, f"serviceAccount:{other.email}")
    caller = client(google, transport, google.credentials(other.credentials_file))
    caller.encrypt(name=key, plaintext=b"x")
    elsewhere = google.key(allowed=False)
    assert refusal(lambda: caller.encrypt(name=elsewhere, plaintext=b"x"))["status"] == "PERMISSION_DENIED"
    missing = refusal(lambda: caller.encrypt(name=f"{elsewhere}x", plaintext=b"x"))
    assert missing["status"] == "PERMISSION_DENIED", "whether it exists is not told"


def test_an_account_signs_for_scopes_in_place_of_an_audience(google: GoogleTenant, key: str) -> None:
    """As the SDK does it for credentials that were given scopes."""
    enough, narrow = (
        google.credentials().with_scopes([f"https://www.googleapis.com/auth/{scope}"])
        for scope in ("cloudkms", "devstorage.read_only")
    )
    kms = google.rest_client(enough)
    assert kms.decrypt(name=key, ciphertext=kms.encrypt(name=key, plaintext=b"x").ciphertext).plaintext == b"x"
    refused = refusal(lambda: google.rest_client(narrow).get_crypto_key(name=key))
    assert refused["status"] == "PERMISSION_DENIED"
    assert refused["details"]["ErrorInfo"]["reason"] == "ACCESS_TOKEN_SCOPE_INSUFFICIENT"


def test_tokens_of_nobody(google: GoogleTenant, key: str) -> None:
    own, vendor = google.names.customer.credentials_file, google.names.vendor.credentials_file
    good = google.access_token()
    forged = google.credentials(own | {"private_key": vendor["private_key"]})
    forged = forged.with_always_use_jwt_access(True)
    forged._create_self_signed_jwt("https://cloudkms.googleapis.com/")
    forged.refresh(google.auth_request())
    narrow = google.access_token("https://www.googleapis.com/auth/devstorage.read_only")
    url = f"{google.cloud.url}/v1/{key}"
    for token, status, reason in (
        ("ya29.e30.AAAA", 401, "ACCESS_TOKEN_TYPE_UNSUPPORTED"),
        (good[:-1] + ("A" if good[-1] != "A" else "B"), 401, "ACCESS_TOKEN_TYPE_UNSUPPORTED"),
        (forged.token, 401, "ACCESS_TOKEN_TYPE_UNSUPPORTED"),
        (narrow, 403, "ACCESS_TOKEN_SCOPE_INSUFFICIENT"),
    ):
        answer = requests.get(
            url, headers={"Authorization": f"Bearer {token}"}, verify=str(google.cloud.ca_bundle), timeout=10
        )
        assert answer.status_code == status
        assert answer.json()["error"]["details"][0]["reason"] == reason
        with pytest.raises(api_errors.GoogleAPICallError) as caught:
            google.grpc_client_with_token(token).get_crypto_key(name=key, retry=None)
        assert caught.value.code == status
        assert caught.value.reason == reason


def test_enums_are_numbers_or_names_as_asked(google: GoogleTenant, key: str) -> None:
    session = google.authorized_session()
    url = f"{google.cloud.url}/v1/{key}"
    named = session.get(url).json()
    numbered = session.get(url, params={"$alt": "json;enum-encoding=int"}).json()
    assert (named["purpose"], numbered["purpose"]) == ("ENCRYPT_DECRYPT", 1)
    assert (named["primary"]["state"], numbered["primary"]["state"]) == ("ENABLED", 1)
    assert named["destroyScheduledDuration"] == "2592000s"
    body = {"plaintext": "eA==", "plaintextCrc32c": str(crc(b"x"))}
    answer = session.post(f"{url}:encrypt", json=body).json()
    assert isinstance(answer["ciphertextCrc32c"], str)
    assert answer["verifiedPlaintextCrc32c"] is True
    assert "verifiedAdditionalAuthenticatedDataCrc32c" not in answer, "what is false is left out"


def test_requests_that_are_none(google: GoogleTenant, key: str) -> None:
    session = google.authorized_session()
    url = f"{google.cloud.url}/v1/{key}"
    for method, path, content, status in (
        ("POST", ":encrypt", b"{", 400),
        ("POST", ":encrypt", b"[]", 400),
        ("POST", ":encrypt", b'{"plain": "eA=="}', 400),
        ("POST", ":encrypt", b'{"plaintext": 7}', 400),
        ("POST", ":encrypt", b'{"plaintext": "c2VjcmV0!"}', 400),
        ("POST", ":encrypt", b'{"plaintext": "eA==", "plaintextCrc32c": "secret"}', 400),
        ("POST", ":encrypt?no=1", b"{}", 400),
        ("GET", "?fields=name", b"", 501),
        ("GET", "", b'{"a": 1}', 400),
        ("PATCH", "?updateMask=labels,", b"{}", 400),
        ("POST", ":frobnicate", b"{}", 404),
        ("DELETE", "", b"", 501),
        ("PUT", "", b"", 404),
    ):
        answer = session.request(method, url + path, data=content)
        assert answer.status_code == status, (path, content, answer.text)
        assert answer.json()["error"]["code"] == status
        assert "secret" not in answer.text
        assert "c2Vjc" not in answer.text
    assert session.post(f"{url}:encrypt", data=b"x" * 2_000_000).status_code == 400
    bare = requests.get(url, verify=str(google.cloud.ca_bundle), timeout=10)
    assert bare.status_code == 401
    assert bare.headers["www-authenticate"].startswith("Bearer realm=")
    assert json.loads(bare.text)["error"]["details"][0]["reason"] == "CREDENTIALS_MISSING"


# ── below the SDK, and above it ────────────────────────────────────────────────────────────────────────────────────


def test_grpc_without_the_sdk(google: GoogleTenant, key: str) -> None:
    """A request goes where `x-goog-request-params` says, else to `global`; bytes that are no message are refused."""
    token = google.access_token()
    credentials = [("authorization", f"Bearer {token}")]
    routed = [*credentials, ("x-goog-request-params", f"name={quote(key, safe='')}")]
    request = kms_v1.GetCryptoKeyRequest.serialize(kms_v1.GetCryptoKeyRequest(name=key))
    service = "/google.cloud.kms.v1.KeyManagementService"
    with google.channel() as channel:

        def call(method: str, data: bytes, metadata: list[tuple[str, str]]) -> tuple[grpc.StatusCode, str | None]:
            try:
                stub: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
                stub(data, metadata=tuple(metadata), timeout=10)
            except grpc.RpcError as error:
                return error.code(), error.details()
            return grpc.StatusCode.OK, None

        assert call(f"{service}/GetCryptoKey", request, routed)[0] is grpc.StatusCode.OK
        status, details = call(f"{service}/GetCryptoKey", request, credentials)
        assert status is grpc.StatusCode.NOT_FOUND
        assert details is not None
        assert "was sent to location 'global'" in details
        assert call(f"{service}/GetCryptoKey", b"\xff\xff", routed)[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert call(f"{service}/GetCryptoKey", request, [])[0] is grpc.StatusCode.UNAUTHENTICATED
        assert call(f"{service}/Frobnicate", b"", routed)[0] is grpc.StatusCode.UNIMPLEMENTED


def test_tinks_aead(kms: Kms, key: str) -> None:
    """Tink's own client, which knows one address only; so it is given the SDK's client with ours."""
    aead.register()
    tink_client = gcpkms.GcpKmsClient(None, credentials=AnonymousCredentials())  # type: ignore[no-untyped-call]
    tink_client._client = kms
    remote = tink_client.get_aead(f"gcp-kms://{key}")
    envelope = aead.KmsEnvelopeAead(aead.aead_key_templates.AES256_GCM, remote)
    sealed = envelope.encrypt(b"a long text" * 10_000, b"associated")
    assert envelope.decrypt(sealed, b"associated") == b"a long text" * 10_000
    for wrong in ((sealed, b"other"), (sealed[:-1], b"associated"), (b"", b"")):
        with pytest.raises(TinkError):
            envelope.decrypt(*wrong)
