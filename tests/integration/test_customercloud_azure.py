"""Microsoft's unmodified SDKs against customercloud: keys of every kind and their whole life."""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from azure.core.exceptions import (
    ResourceExistsError,
    ResourceNotFoundError,
)
from azure.keyvault.keys import (
    JsonWebKey,
    KeyClient,
    KeyReleasePolicy,
    KeyRotationLifetimeAction,
    KeyRotationPolicy,
    KeyRotationPolicyAction,
)
from azure.keyvault.keys.crypto import (
    KeyWrapAlgorithm,
    SignatureAlgorithm,
)
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256

from customercloud.azure.access import Role
from customercloud.azure.admin import VaultRequest
from customercloud.azure.bodies import base64url
from customercloud.faults import Faults
from shared.errors import ConflictError
from tests.fixtures.azure import API, Raw, crypto, error_of, named_vault, refusal
from tests.fixtures.kms_customer_azure import AzureTenant

if TYPE_CHECKING:
    from tests.fixtures.kms_customer_azure import AzureTenant

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("localhost_names")]


# ── keys ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_as_it_is_created_and_read(azure: AzureTenant, keys: KeyClient, name: str) -> None:
    expires = datetime(2040, 1, 1, tzinfo=UTC)
    key = keys.create_rsa_key(
        name, size=3072, key_operations=["wrapKey", "unwrapKey"], expires_on=expires, tags={"purpose": "cmk"}
    )
    assert (key.key_type, key.key_operations) == ("RSA", ["wrapKey", "unwrapKey"])
    assert key.id == f"{azure.cloud.url}/keys/{name}/{key.properties.version}"
    properties = keys.get_key(name).properties
    assert (properties.enabled, properties.expires_on, properties.tags) == (True, expires, {"purpose": "cmk"})
    assert (properties.recovery_level, properties.recoverable_days) == ("Recoverable+Purgeable", 90)
    assert len(key.key.n) == 3072 // 8  # type: ignore[attr-defined]
    assert keys.create_rsa_key(f"{name}-hsm", hardware_protected=True).key_type == "RSA-HSM"
    assert keys.get_key(name.upper()).id == key.id


def test_versions_lists_and_pages(azure: AzureTenant, raw: Raw, keys: KeyClient, name: str) -> None:
    versions = {keys.create_rsa_key(name).properties.version for _ in range(3)}
    assert {p.version for p in keys.list_properties_of_key_versions(name)} == versions
    paged = keys.list_properties_of_key_versions(name, max_page_size=2).by_page()
    assert len([list(page) for page in paged]) >= 1
    listed = {p.name: p for p in keys.list_properties_of_keys()}
    assert {name, azure.key_name} <= listed.keys()
    assert listed[name].version is None
    first = raw("GET", f"/keys/{name}/versions", params=API | {"maxresults": "2"}).json()
    rest = raw("GET", first["nextLink"], params=None).json()
    assert (len(first["value"]), len(rest["value"]), rest["nextLink"]) == (2, 1, None)


def test_updates_keep_what_they_do_not_name(keys: KeyClient, name: str) -> None:
    first = keys.create_rsa_key(name, tags={"a": "b"})
    second = keys.create_rsa_key(name)
    start = datetime(2020, 1, 1, tzinfo=UTC)
    changed = keys.update_key_properties(name, first.properties.version, enabled=False, not_before=start)
    assert (changed.properties.enabled, changed.properties.not_before) == (False, start)
    assert changed.properties.tags == {"a": "b"}
    assert keys.get_key(name).properties.version == second.properties.version
    assert keys.get_key(name).properties.enabled
    latest = keys.update_key_properties(name, key_operations=["sign"])
    assert (latest.properties.version, latest.key_operations) == (second.properties.version, ["sign"])


def test_soft_delete_recover_and_purge(azure: AzureTenant, keys: KeyClient, name: str) -> None:
    key = keys.create_rsa_key(name)
    poller = keys.begin_delete_key(name)
    poller.wait()
    deleted = poller.result()
    assert deleted.scheduled_purge_date is not None
    assert deleted.deleted_date is not None
    assert deleted.scheduled_purge_date - deleted.deleted_date == timedelta(days=90)
    assert deleted.recovery_id == f"{azure.cloud.url}/deletedkeys/{name}"
    with pytest.raises(ResourceNotFoundError):
        keys.get_key(name)
    assert name in {k.name for k in keys.list_deleted_keys()}
    assert name not in {p.name for p in keys.list_properties_of_keys()}
    with pytest.raises(ResourceExistsError):
        keys.create_rsa_key(name)
    status, code, inner, message = refusal(lambda: keys.create_rsa_key(name))
    assert (status, code, inner) == (409, "Conflict", "ObjectIsDeletedButRecoverable")
    assert f"Key {name} is currently in a deleted but recoverable state" in message
    recovery = keys.begin_recover_deleted_key(name)
    recovery.wait()
    assert recovery.result().id == keys.get_key(name).id == key.id
    assert refusal(lambda: keys.get_deleted_key(name))[:3] == (404, "KeyNotFound", None)
    keys.begin_delete_key(name).wait()
    keys.purge_deleted_key(name)
    assert refusal(lambda: keys.get_deleted_key(name))[:2] == (404, "KeyNotFound")
    assert keys.create_rsa_key(name).id != key.id


def test_purge_protection(azure: AzureTenant) -> None:
    vault = f"v{secrets.token_hex(6)}"
    settings = VaultRequest(tenant_id=azure.tenant_id, recoverable_days=7, purge_protection=True)
    azure.admin.put_vault(vault, settings)
    azure.admin.assign(vault, azure.names.customer.object_id, Role.ADMINISTRATOR)
    with pytest.raises(ConflictError):
        azure.admin.put_vault(vault, settings.model_copy(update={"purge_protection": False}))
    with named_vault(azure, vault) as customer:
        key = customer.create_key("cmk")
        assert key.properties.recovery_level == "CustomizedRecoverable"
        assert customer.delete("cmk") - datetime.now(UTC) < timedelta(days=7, minutes=1)
        message = 'Operation "purge" is not enabled for this vault.'
        assert refusal(lambda: customer.purge("cmk")) == (403, "Forbidden", "ForbiddenByPolicy", message)
        customer.recover("cmk")
        customer.delete("cmk")
        azure.admin.complete_key_deletion(vault, "cmk")  # the days are over
        assert refusal(lambda: customer.recover("cmk"))[:2] == (404, "KeyNotFound")


def test_rotation_and_its_policy(keys: KeyClient, name: str) -> None:
    first = keys.create_rsa_key(name, size=3072, key_operations=["wrapKey", "unwrapKey"], tags={"a": "b"})
    default = keys.get_key_rotation_policy(name)
    assert [(a.action, a.time_before_expiry) for a in default.lifetime_actions] == [("Notify", "P30D")]
    rotate = KeyRotationLifetimeAction(KeyRotationPolicyAction.rotate, time_after_create="P18M")
    notify = KeyRotationLifetimeAction(KeyRotationPolicyAction.notify, time_before_expiry="P30D")
    policy = keys.update_key_rotation_policy(
        name, KeyRotationPolicy(lifetime_actions=[rotate, notify], expires_in="P2Y")
    )
    assert policy.expires_in == "P2Y"
    assert [a.time_after_create for a in keys.get_key_rotation_policy(name).lifetime_actions] == ["P18M", None]
    second = keys.rotate_key(name)
    assert second.properties.version != first.properties.version
    assert (second.key_operations, second.properties.tags) == (["wrapKey", "unwrapKey"], {"a": "b"})
    assert second.properties.expires_on is not None
    assert second.properties.created_on is not None
    assert second.properties.expires_on.year == second.properties.created_on.year + 2
    assert len(second.key.n) == 3072 // 8  # type: ignore[attr-defined]
    for bad in (
        KeyRotationPolicy(lifetime_actions=[rotate], expires_in="P1D"),
        KeyRotationPolicy(lifetime_actions=[rotate, rotate]),
        KeyRotationPolicy(lifetime_actions=[KeyRotationLifetimeAction("Rotate", time_after_create="PT1H")]),
        KeyRotationPolicy(lifetime_actions=[KeyRotationLifetimeAction("Rotate", time_before_expiry="P30D")]),
    ):
        assert refusal(lambda bad=bad: keys.update_key_rotation_policy(name, bad))[:2] == (400, "BadParameter")  # type: ignore[misc]
    keys.update_key_properties(name, enabled=False)
    assert refusal(lambda: keys.rotate_key(name))[:3] == (403, "Forbidden", "KeyDisabled")


BAD_BODIES: list[tuple[Any, str]] = [
    ({}, "Property 'kty' is required.\r\n"),
    ({"kty": "XYZ"}, "Property  has invalid value\r\n"),
    ({"kty": 7}, "Property  has invalid value\r\n"),
    ({"kty": "RSA", "key_size": "2048"}, "Property  has invalid value\r\n"),
    ({"kty": "RSA", "key_size": 1024}, "Key size 1024 is not supported for key type RSA.\r\n"),
    ({"kty": "oct"}, "Invalid kty value: oct"),
    ({"kty": "EC", "crv": "P-1"}, "Property  has invalid value\r\n"),
    ({"kty": "EC", "key_ops": ["wrapKey"]}, "Property  has invalid value\r\n"),
    ({"kty": "RSA", "key_ops": ["everything"]}, "Property  has invalid value\r\n"),
    ({"kty": "RSA", "tags": {"a": 1}}, "Property  has invalid value\r\n"),
    ({"kty": "RSA", "attributes": {"exp": -1}}, "Property  has invalid value\r\n"),
    ({"kty": "RSA", "attributes": {"nbf": 2, "exp": 1}}, "Not before date must be before the expiration date."),
    ([], "Property  has invalid value\r\n"),
]


def test_bad_bodies(raw: Raw, name: str) -> None:
    for body, message in BAD_BODIES:
        assert error_of(raw("POST", f"/keys/{name}/create", json=body)) == (400, "BadParameter", message), body


# ── other kinds of keys, backups, and what a vault has not ─────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("curve", "algorithm", "hashed"),
    [("P-256", "ES256", "sha256"), ("P-256K", "ES256K", "sha256"), ("P-384", "ES384", "sha384"),
     ("P-521", "ES512", "sha512")],
)  # fmt: skip
def test_curves(azure: AzureTenant, keys: KeyClient, name: str, curve: str, algorithm: str, hashed: str) -> None:
    key = keys.create_ec_key(name, curve=curve)
    assert (key.key_type, key.key.crv, key.key_operations) == ("EC", curve, ["sign", "verify"])  # type: ignore[attr-defined]
    digest = hashlib.new(hashed, b"x").digest()
    signer = SignatureAlgorithm(algorithm)
    with crypto(azure, str(key.id)) as remote:
        signature = remote.sign(signer, digest).signature
    local = keys.get_cryptography_client(name)
    assert local.verify(signer, digest, signature).is_valid, "with the public key, by the SDK"
    raw = Raw(azure)
    value = base64url(signature)
    for wrong, valid in ((value, True), (base64url(signature[:-1] + bytes([signature[-1] ^ 1])), False), ("AA", False)):
        body = {"alg": algorithm, "digest": base64url(digest), "value": wrong}
        assert raw("POST", f"/keys/{name}/verify", json=body).json() == {"value": valid}
    status, code, message = error_of(raw("POST", f"/keys/{name}/sign", json={"alg": "RS256", "value": "A" * 43}))
    assert (status, code) == (400, "BadParameter")
    assert message.startswith(f"Key and signing algorithm are incompatible. Key {key.id} is of type 'EC'")
    wrapped = raw("POST", f"/keys/{name}/wrapkey", json={"alg": "RSA-OAEP", "value": "AA"})
    assert error_of(wrapped)[:2] == (403, "Forbidden")
    raw.close()
    assert keys.rotate_key(name).key.crv == curve  # type: ignore[attr-defined]


def test_symmetric_keys_are_for_managed_hsms(keys: KeyClient, name: str) -> None:
    expected = (400, "BadParameter", "KeyTypeNotSupported", "Invalid kty value: oct")
    assert refusal(lambda: keys.create_oct_key(name)) == expected


def test_a_key_of_ones_own_is_imported(azure: AzureTenant, keys: KeyClient, name: str) -> None:
    own = rsa.generate_private_key(65537, 2048).private_numbers()
    numbers = {"n": own.public_numbers.n, "e": own.public_numbers.e, "d": own.d, "p": own.p, "q": own.q,
               "dp": own.dmp1, "dq": own.dmq1, "qi": own.iqmp}  # fmt: skip
    members = {key: value.to_bytes((value.bit_length() + 7) // 8) for key, value in numbers.items()}
    jwk = JsonWebKey(kty="RSA", key_ops=["wrapKey", "unwrapKey"], **members)
    key = keys.import_key(name, jwk, tags={"own": "yes"})
    assert (key.key_type, key.key_operations, key.properties.tags) == ("RSA", ["wrapKey", "unwrapKey"], {"own": "yes"})
    wrapped = own.private_key().public_key().encrypt(b"secret", padding.OAEP(padding.MGF1(SHA256()), SHA256(), None))
    with crypto(azure, str(key.id)) as client:
        assert client.unwrap_key(KeyWrapAlgorithm.rsa_oaep_256, wrapped).key == b"secret"
    assert keys.import_key(name, jwk, hardware_protected=True).key_type == "RSA-HSM"
    assert len(list(keys.list_properties_of_key_versions(name))) == 2
    broken = JsonWebKey(kty="RSA", **(members | {"d": members["d"][:-1] + b"\0"}))
    assert refusal(lambda: keys.import_key(name, broken))[:2] == (400, "BadParameter")
    curve = ec.generate_private_key(ec.SECP256R1()).private_numbers()
    point = {"x": curve.public_numbers.x, "y": curve.public_numbers.y, "d": curve.private_value}
    jwk = JsonWebKey(kty="EC", crv="P-256", **{key: value.to_bytes(32) for key, value in point.items()})
    assert keys.import_key(f"{name}-ec", jwk).key.crv == "P-256"  # type: ignore[attr-defined]


def test_a_backup_outlives_its_key(azure: AzureTenant, keys: KeyClient, name: str) -> None:
    first = keys.create_rsa_key(name)
    wrapped = keys.get_cryptography_client(name).wrap_key(KeyWrapAlgorithm.rsa_oaep_256, b"secret").encrypted_key
    keys.create_rsa_key(name)
    backup = keys.backup_key(name)
    assert b"secret" not in backup
    assert refusal(lambda: keys.restore_key_backup(backup))[:2] == (409, "Conflict")
    keys.begin_delete_key(name).wait()
    assert refusal(lambda: keys.restore_key_backup(backup))[2] == "ObjectIsDeletedButRecoverable"
    keys.purge_deleted_key(name)
    restored = keys.restore_key_backup(backup)
    assert len(list(keys.list_properties_of_key_versions(name))) == 2
    assert restored.name == name
    with crypto(azure, str(first.id)) as client:
        assert client.unwrap_key(KeyWrapAlgorithm.rsa_oaep_256, wrapped).key == b"secret"
    altered = backup[:-1] + bytes([backup[-1] ^ 1])
    message = "Backup blob contains invalid or corrupt version."
    assert refusal(lambda: keys.restore_key_backup(altered)) == (400, "BadParameter", None, message)


def test_what_is_not_here_is_refused_in_azures_shape(azure: AzureTenant, keys: KeyClient, raw: Raw) -> None:
    assert refusal(lambda: keys.release_key(azure.key_name, "attestation"))[:3] == (
        403, "Forbidden", "KeyOperationForbidden",
    )  # fmt: skip
    policy = KeyReleasePolicy(b'{"version":"1.0.0","anyOf":[]}')
    for call, code in (
        (lambda: keys.create_rsa_key("released", exportable=True, release_policy=policy), "AKV.SKR.1001: "),
        (lambda: keys.create_rsa_key("released", exportable=True), "AKV.SKR.1004: "),
        (lambda: keys.create_rsa_key("released", release_policy=policy), "AKV.SKR.1005: "),
        (lambda: keys.update_key_properties(azure.key_name, release_policy=policy), "AKV.SKR.1005: "),
    ):
        status, word, inner, message = refusal(call)
        assert (status, word, inner, message[: len(code)]) == (400, "BadParameter", None, code)
    assert refusal(lambda: keys.get_key_attestation(azure.key_name))[:2] == (400, "BadParameter")
    assert refusal(lambda: keys.get_random_bytes(8))[:2] == (400, "BadParameter")
    for path in ("/secrets", "/secrets/s/", "/certificates/c", "/deletedsecrets/s", "/storage"):
        assert error_of(raw("GET", path))[:2] == (501, "NotImplemented")
        assert error_of(raw("GET", path, headers={}))[:2] == (401, "Unauthorized")


def test_deletion_and_recovery_take_their_time(azure: AzureTenant, keys: KeyClient, name: str) -> None:
    """Nothing here waits for a clock: what is in progress stays so, until the faults say that it takes no time."""
    key = keys.create_rsa_key(name)
    with azure.admin.during(Faults(key_vault_transition_s=600)):
        poller = keys.begin_delete_key(name)
        assert poller.result().name == name
        assert poller.status() == "polling"
        assert refusal(lambda: keys.get_deleted_key(name))[:2] == (404, "KeyNotFound")
        assert refusal(lambda: keys.get_key(name))[:2] == (404, "KeyNotFound")
        assert name not in {k.name for k in keys.list_deleted_keys()}
        for call in (lambda: keys.create_rsa_key(name), lambda: keys.purge_deleted_key(name)):
            assert refusal(call)[:3] == (409, "Conflict", "ObjectIsBeingDeleted")
    with azure.admin.during(Faults(key_vault_transition_s=0.3)):
        other = keys.create_rsa_key(f"{name}-2")
        keys.begin_delete_key(other.name, _polling_interval=0.05).wait()
        assert keys.get_deleted_key(other.name).name == other.name
        recovery = keys.begin_recover_deleted_key(other.name, _polling_interval=0.05)
        recovery.wait()
        assert keys.get_key(other.name).id == other.id != key.id
    keys.begin_delete_key(other.name).wait()
    with azure.admin.during(Faults(key_vault_transition_s=600)):
        keys.begin_recover_deleted_key(other.name)
        message = f"Key {other.name} is currently being recovered and cannot be re-created; retry later."
        expected = (409, "Conflict", "ObjectIsBeingRecovered", message)
        assert refusal(lambda: keys.create_rsa_key(other.name)) == expected
        assert refusal(lambda: keys.get_key(other.name))[:2] == (404, "KeyNotFound")
