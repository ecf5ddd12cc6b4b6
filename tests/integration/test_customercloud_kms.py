"""The simulated KMS, called by an unmodified boto3 over HTTPS: every operation, and every way it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

from customercloud.client import VENDOR_ACTIONS
from customercloud.faults import Faults
from tests.fixtures.aws_refusals import refused

if TYPE_CHECKING:
    from tests.fixtures.customercloud import AwsTenant

pytestmark = pytest.mark.integration

CONTEXT = {"tenant": "t1", "branch": "b1"}


# ── the life of data ───────────────────────────────────────────────────────────────────────────────────────────────


def test_encrypt_and_decrypt(kms: Any, key: str) -> None:
    sealed = kms.encrypt(KeyId=key, Plaintext=b"secret", EncryptionContext=CONTEXT)
    assert sealed["KeyId"] == key
    assert sealed["EncryptionAlgorithm"] == "SYMMETRIC_DEFAULT"
    assert b"secret" not in sealed["CiphertextBlob"]
    opened = kms.decrypt(CiphertextBlob=sealed["CiphertextBlob"], EncryptionContext=CONTEXT)
    assert opened["Plaintext"] == b"secret"
    assert (opened["KeyId"], opened["EncryptionAlgorithm"]) == (key, "SYMMETRIC_DEFAULT")
    assert len(opened["KeyMaterialId"]) == 64
    named = kms.decrypt(CiphertextBlob=sealed["CiphertextBlob"], EncryptionContext=CONTEXT, KeyId=key)
    assert named["Plaintext"] == b"secret"


@pytest.mark.parametrize(
    ("request_members", "size_bytes"),
    [({"KeySpec": "AES_256"}, 32), ({"KeySpec": "AES_128"}, 16), ({"NumberOfBytes": 77}, 77)],
)
def test_generate_data_key(kms: Any, key: str, request_members: dict[str, Any], size_bytes: int) -> None:
    answer = kms.generate_data_key(KeyId=key, EncryptionContext=CONTEXT, **request_members)
    assert len(answer["Plaintext"]) == size_bytes
    assert (
        kms.decrypt(CiphertextBlob=answer["CiphertextBlob"], EncryptionContext=CONTEXT)["Plaintext"]
        == answer["Plaintext"]
    )
    blind = kms.generate_data_key_without_plaintext(KeyId=key, EncryptionContext=CONTEXT, **request_members)
    assert "Plaintext" not in blind
    opened = kms.decrypt(CiphertextBlob=blind["CiphertextBlob"], EncryptionContext=CONTEXT)["Plaintext"]
    assert len(opened) == size_bytes
    assert opened != answer["Plaintext"]


def test_data_key_needs_exactly_one_size(kms: Any, key: str) -> None:
    with refused("ValidationException"):
        kms.generate_data_key(KeyId=key)
    with refused("ValidationException"):
        kms.generate_data_key(KeyId=key, KeySpec="AES_256", NumberOfBytes=32)


def test_re_encrypt_to_another_key_and_context(aws: AwsTenant, kms: Any, key: str) -> None:
    other = aws.customer.create_key()
    sealed = kms.encrypt(KeyId=key, Plaintext=b"moved", EncryptionContext=CONTEXT)["CiphertextBlob"]
    answer = kms.re_encrypt(
        CiphertextBlob=sealed,
        SourceEncryptionContext=CONTEXT,
        DestinationKeyId=other,
        DestinationEncryptionContext={"tenant": "t2"},
    )
    assert (answer["SourceKeyId"], answer["KeyId"]) == (key, other)
    assert (
        kms.decrypt(CiphertextBlob=answer["CiphertextBlob"], EncryptionContext={"tenant": "t2"})["Plaintext"]
        == b"moved"
    )
    with refused("InvalidCiphertextException"):
        kms.re_encrypt(CiphertextBlob=sealed, DestinationKeyId=other)


def test_generate_random(kms: Any) -> None:
    first, second = (kms.generate_random(NumberOfBytes=1024)["Plaintext"] for _ in range(2))
    assert len(first) == 1024
    assert first != second
    with refused("ValidationException", "NumberOfBytes is required."):
        kms.generate_random()
    with refused(
        "ValidationException",
        "1 validation error detected: Value '1025' at 'numberOfBytes' failed to satisfy constraint: "
        "Member must have value less than or equal to 1024",
    ):
        kms.generate_random(NumberOfBytes=1025)


# ── what does not open ─────────────────────────────────────────────────────────────────────────────────────────────


def test_wrong_or_missing_context_and_flipped_bits(kms: Any, key: str) -> None:
    sealed = kms.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext=CONTEXT)["CiphertextBlob"]
    for context in ({}, {"tenant": "t1"}, {**CONTEXT, "more": "1"}, {"tenant": "t1", "branch": "b2"}):
        with refused("InvalidCiphertextException", ""):
            kms.decrypt(CiphertextBlob=sealed, EncryptionContext=context)
    for position in (0, 4, 60, 75, len(sealed) - 1):
        damaged = bytearray(sealed)
        damaged[position] ^= 1
        with refused("InvalidCiphertextException", ""):
            kms.decrypt(CiphertextBlob=bytes(damaged), EncryptionContext=CONTEXT, KeyId=key)


def test_garbage_and_truncation(kms: Any) -> None:
    for blob in (b"x", b"garbage" * 40, bytes(6144)):
        with refused("InvalidCiphertextException", ""):
            kms.decrypt(CiphertextBlob=blob)


def test_a_blob_of_another_key(aws: AwsTenant, kms: Any, key: str) -> None:
    other = aws.customer.create_key()
    sealed = kms.encrypt(KeyId=other, Plaintext=b"x")["CiphertextBlob"]
    message = "The key ID in the request does not identify a CMK that can perform this operation."
    with refused("IncorrectKeyException", message):
        kms.decrypt(CiphertextBlob=sealed, KeyId=key)
    with refused("IncorrectKeyException", message):
        kms.re_encrypt(CiphertextBlob=sealed, SourceKeyId=key, DestinationKeyId=key)


def test_a_blob_of_a_key_that_never_was(kms: Any, key: str) -> None:
    sealed = bytearray(kms.encrypt(KeyId=key, Plaintext=b"x")["CiphertextBlob"])
    sealed[5:21] = bytes(16)
    with refused("AccessDeniedException"):
        kms.decrypt(CiphertextBlob=bytes(sealed))


def test_sizes(kms: Any, key: str) -> None:
    largest = kms.encrypt(KeyId=key, Plaintext=bytes(4096))["CiphertextBlob"]
    assert len(largest) <= 6144
    assert kms.decrypt(CiphertextBlob=largest)["Plaintext"] == bytes(4096)
    with refused(
        "ValidationException",
        "1 validation error detected: Value at 'plaintext' failed to satisfy constraint: "
        "Member must have length less than or equal to 4096",
    ):
        kms.encrypt(KeyId=key, Plaintext=bytes(4097))
    with refused("ValidationException"):
        kms.decrypt(CiphertextBlob=bytes(6145))


# ── key names ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_way_to_name_a_key(aws: AwsTenant, kms: Any, key: str) -> None:
    kms.create_alias(AliasName="alias/cmk", TargetKeyId=key)
    alias_arn = key.rpartition(":")[0] + ":alias/cmk"
    key_id = key.rpartition("/")[2]
    for name in (key_id, key, "alias/cmk", alias_arn):
        assert kms.encrypt(KeyId=name, Plaintext=b"x")["KeyId"] == key
        assert kms.describe_key(KeyId=name)["KeyMetadata"]["Arn"] == key


def test_names_that_do_not_exist(aws: AwsTenant, kms: Any, key: str) -> None:
    ghost = "11111111-2222-3333-4444-555555555555"
    arn = f"arn:aws:kms:eu-central-1:{aws.account_id}"
    for name, message in {
        ghost: f"Key '{arn}:key/{ghost}' does not exist",
        f"{arn}:key/{ghost}": f"Key '{arn}:key/{ghost}' does not exist",
        "alias/none": f"Alias {arn}:alias/none is not found.",
        "nonsense": "Invalid keyId 'nonsense'",
        key.replace("eu-central-1", "us-west-2"): "Invalid arn us-west-2",
    }.items():
        with refused("NotFoundException", message):
            kms.encrypt(KeyId=name, Plaintext=b"x")
    with refused("InvalidArnException"):
        kms.describe_key(KeyId="arn:aws:s3:::bucket")
    with refused("AccessDeniedException"):
        kms.describe_key(KeyId=f"arn:aws:kms:eu-central-1:999999999999:key/{ghost}")


def test_aliases(aws: AwsTenant, kms: Any, key: str) -> None:
    for name in ("alias/b", "alias/a", "alias/c"):
        kms.create_alias(AliasName=name, TargetKeyId=key)
    pages = list(kms.get_paginator("list_aliases").paginate(KeyId=key, PaginationConfig={"PageSize": 2}))
    assert len(pages) == 2
    assert [alias["AliasName"] for page in pages for alias in page["Aliases"]] == ["alias/a", "alias/b", "alias/c"]
    assert pages[0]["Aliases"][0]["TargetKeyId"] == key.rpartition("/")[2]
    kms.delete_alias(AliasName="alias/b")
    with refused("NotFoundException"):
        kms.delete_alias(AliasName="alias/b")
    with refused("AlreadyExistsException"):
        kms.create_alias(AliasName="alias/a", TargetKeyId=key)
    with refused("NotAuthorizedException"):
        kms.create_alias(AliasName="alias/aws/x", TargetKeyId=key)
    with refused("ValidationException"):
        kms.create_alias(AliasName="noprefix", TargetKeyId=key)
    with refused("ValidationException"):
        kms.create_alias(AliasName="alias/z", TargetKeyId="alias/a")


def test_list_keys_pages(aws: AwsTenant, kms: Any) -> None:
    keys = {aws.customer.create_key() for _ in range(5)}
    pages = list(kms.get_paginator("list_keys").paginate(PaginationConfig={"PageSize": 2}))
    assert [len(page["Keys"]) for page in pages] == [2, 2, 1]
    assert {entry["KeyArn"] for page in pages for entry in page["Keys"]} == keys


def test_metadata_of_a_new_key(aws: AwsTenant, kms: Any) -> None:
    metadata = kms.create_key(Description="mine")["KeyMetadata"]
    assert metadata["AWSAccountId"] == aws.account_id
    assert metadata["Arn"].endswith(f"key/{metadata['KeyId']}")
    assert abs(metadata["CreationDate"] - datetime.now(UTC)) < timedelta(minutes=1)
    expected = {
        "Description": "mine", "Enabled": True, "KeyState": "Enabled", "KeyUsage": "ENCRYPT_DECRYPT",
        "KeySpec": "SYMMETRIC_DEFAULT", "CustomerMasterKeySpec": "SYMMETRIC_DEFAULT", "Origin": "AWS_KMS",
        "KeyManager": "CUSTOMER", "MultiRegion": False, "EncryptionAlgorithms": ["SYMMETRIC_DEFAULT"],
    }  # fmt: skip
    assert metadata.items() >= expected.items()
    for unsupported in (
        {"KeySpec": "RSA_2048", "KeyUsage": "SIGN_VERIFY"},
        {"MultiRegion": True},
        {"Origin": "EXTERNAL_KEY_STORE"},
    ):
        with refused("UnsupportedOperationException"):
            kms.create_key(**unsupported)


# ── key states ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _uses(kms: Any, key: str, sealed: bytes) -> dict[str, Any]:
    return {
        "encrypt": lambda: kms.encrypt(KeyId=key, Plaintext=b"x"),
        "decrypt": lambda: kms.decrypt(CiphertextBlob=sealed),
        "decrypt named": lambda: kms.decrypt(CiphertextBlob=sealed, KeyId=key),
        "data key": lambda: kms.generate_data_key(KeyId=key, KeySpec="AES_256"),
        "data key without": lambda: kms.generate_data_key_without_plaintext(KeyId=key, KeySpec="AES_256"),
        "re-encrypt": lambda: kms.re_encrypt(CiphertextBlob=sealed, DestinationKeyId=key),
        "dry run": lambda: kms.encrypt(KeyId=key, Plaintext=b"x", DryRun=True),
    }


def test_disabled_key_refuses_every_use_and_comes_back(kms: Any, key: str) -> None:
    sealed = kms.encrypt(KeyId=key, Plaintext=b"x")["CiphertextBlob"]
    kms.disable_key(KeyId=key)
    for use in _uses(kms, key, sealed).values():
        with refused("DisabledException", f"{key} is disabled."):
            use()
    metadata = kms.describe_key(KeyId=key)["KeyMetadata"]
    assert (metadata["KeyState"], metadata["Enabled"]) == ("Disabled", False)
    for manage in (kms.rotate_key_on_demand, kms.enable_key_rotation, kms.disable_key_rotation):
        with refused("DisabledException"):
            manage(KeyId=key)
    kms.enable_key(KeyId=key)
    assert kms.decrypt(CiphertextBlob=sealed)["Plaintext"] == b"x"


def test_pending_deletion_refuses_every_use_and_can_be_cancelled(kms: Any, key: str) -> None:
    sealed = kms.encrypt(KeyId=key, Plaintext=b"x")["CiphertextBlob"]
    answer = kms.schedule_key_deletion(KeyId=key, PendingWindowInDays=7)
    assert (answer["KeyId"], answer["KeyState"], answer["PendingWindowInDays"]) == (key, "PendingDeletion", 7)
    assert timedelta(days=6, hours=23) < answer["DeletionDate"] - datetime.now(UTC) <= timedelta(days=7)
    for use in _uses(kms, key, sealed).values():
        with refused("KMSInvalidStateException", f"{key} is pending deletion."):
            use()
    assert kms.describe_key(KeyId=key)["KeyMetadata"]["DeletionDate"] == answer["DeletionDate"]
    for manage in (kms.enable_key, kms.disable_key, kms.schedule_key_deletion, kms.rotate_key_on_demand):
        with refused("KMSInvalidStateException"):
            manage(KeyId=key)
    with refused("KMSInvalidStateException"):
        kms.create_alias(AliasName="alias/late", TargetKeyId=key)
    assert kms.cancel_key_deletion(KeyId=key)["KeyId"] == key
    with refused("DisabledException"):
        kms.decrypt(CiphertextBlob=sealed)
    kms.enable_key(KeyId=key)
    assert kms.decrypt(CiphertextBlob=sealed)["Plaintext"] == b"x"
    assert "DeletionDate" not in kms.describe_key(KeyId=key)["KeyMetadata"]
    with refused("KMSInvalidStateException", f"{key} is not pending deletion."):
        kms.cancel_key_deletion(KeyId=key)


@pytest.mark.parametrize("days", [1, 6, 31])
def test_waiting_period_is_7_to_30_days(kms: Any, key: str, days: int) -> None:
    with refused("ValidationException"):
        kms.schedule_key_deletion(KeyId=key, PendingWindowInDays=days)
    assert kms.describe_key(KeyId=key)["KeyMetadata"]["KeyState"] == "Enabled"


def test_a_destroyed_key_is_gone_for_good(aws: AwsTenant, kms: Any, key: str) -> None:
    kms.create_alias(AliasName="alias/doomed", TargetKeyId=key)
    sealed = kms.encrypt(KeyId=key, Plaintext=b"x")["CiphertextBlob"]
    kms.schedule_key_deletion(KeyId=key)
    aws.admin.complete_deletion(key)
    with refused("NotFoundException", f"Key '{key}' does not exist"):
        kms.decrypt(CiphertextBlob=sealed, KeyId=key)
    with refused("AccessDeniedException"):
        kms.decrypt(CiphertextBlob=sealed)
    with refused("NotFoundException"):
        kms.cancel_key_deletion(KeyId=key)
    assert kms.list_aliases()["Aliases"] == []
    assert [e["eventType"] for e in aws.customer.events(EventName="DeleteKey")] == ["AwsServiceEvent"]


def test_dry_run_succeeds_by_an_error(kms: Any, key: str) -> None:
    sealed = kms.encrypt(KeyId=key, Plaintext=b"x")["CiphertextBlob"]
    message = "The request would have succeeded, but the DryRun option is set."
    uses: tuple[Callable[[], object], ...] = (
        lambda: kms.encrypt(KeyId=key, Plaintext=b"x", DryRun=True),
        lambda: kms.decrypt(CiphertextBlob=sealed, DryRun=True),
        lambda: kms.generate_data_key(KeyId=key, KeySpec="AES_256", DryRun=True),
        lambda: kms.re_encrypt(CiphertextBlob=sealed, DestinationKeyId=key, DryRun=True),
    )
    for use in uses:
        with refused("DryRunOperationException", message):
            use()


# ── rotation ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rotation_makes_new_material_and_old_blobs_still_open(aws: AwsTenant, kms: Any, key: str) -> None:
    old = kms.generate_data_key(KeyId=key, KeySpec="AES_256")
    new_material = aws.customer.rotate(key)
    new = kms.generate_data_key(KeyId=key, KeySpec="AES_256")
    assert old["KeyMaterialId"] != new["KeyMaterialId"] == new_material
    assert kms.describe_key(KeyId=key)["KeyMetadata"]["CurrentKeyMaterialId"] == new_material
    for answer in (old, new):
        opened = kms.decrypt(CiphertextBlob=answer["CiphertextBlob"], KeyId=key)
        assert (opened["Plaintext"], opened["KeyMaterialId"]) == (answer["Plaintext"], answer["KeyMaterialId"])
    moved = kms.re_encrypt(CiphertextBlob=old["CiphertextBlob"], DestinationKeyId=key)
    assert (moved["SourceKeyMaterialId"], moved["DestinationKeyMaterialId"]) == (old["KeyMaterialId"], new_material)

    rotations = kms.list_key_rotations(KeyId=key)["Rotations"]
    assert [(r["RotationType"], r["KeyMaterialState"], r["KeyMaterialId"]) for r in rotations] == [
        ("ON_DEMAND", "CURRENT", new_material)
    ]
    everything = kms.list_key_rotations(KeyId=key, IncludeKeyMaterial="ALL_KEY_MATERIAL")["Rotations"]
    assert [r["KeyMaterialState"] for r in everything] == ["NON_CURRENT", "CURRENT"]


def test_25_rotations_on_demand_and_no_more(kms: Any, key: str) -> None:
    for _ in range(25):
        kms.rotate_key_on_demand(KeyId=key)
    with refused("LimitExceededException"):
        kms.rotate_key_on_demand(KeyId=key)
    assert len(kms.list_key_rotations(KeyId=key)["Rotations"]) == 25


def test_automatic_rotation_settings(kms: Any, key: str) -> None:
    assert kms.get_key_rotation_status(KeyId=key)["KeyRotationEnabled"] is False
    kms.enable_key_rotation(KeyId=key, RotationPeriodInDays=90)
    status = kms.get_key_rotation_status(KeyId=key)
    assert (status["KeyRotationEnabled"], status["RotationPeriodInDays"]) == (True, 90)
    assert timedelta(days=89) < status["NextRotationDate"] - datetime.now(UTC) <= timedelta(days=90)
    with refused("ValidationException"):
        kms.enable_key_rotation(KeyId=key, RotationPeriodInDays=2561)
    kms.disable_key_rotation(KeyId=key)
    assert kms.get_key_rotation_status(KeyId=key)["KeyRotationEnabled"] is False


# ── key policies ───────────────────────────────────────────────────────────────────────────────────────────────────


def _vendor_can(kms: Any, key: str) -> None:
    sealed = kms.generate_data_key(KeyId=key, KeySpec="AES_256")["CiphertextBlob"]
    kms.decrypt(CiphertextBlob=sealed, KeyId=key)


def test_the_role_may_do_what_the_key_policy_says_and_nothing_else(aws: AwsTenant, key: str) -> None:
    vendor = aws.role_client()
    session_arn = f"arn:aws:sts::{aws.account_id}:assumed-role/{aws.role_name}/test"
    with refused(
        "AccessDeniedException",
        f"User: {session_arn} is not authorized to perform: kms:Encrypt on resource: {key} "
        "because no identity-based policy allows the kms:Encrypt action",
    ):
        vendor.encrypt(KeyId=key, Plaintext=b"x")
    aws.customer.allow_role(key, aws.role_arn)
    _vendor_can(vendor, key)
    for beyond in (vendor.disable_key, vendor.enable_key, vendor.schedule_key_deletion, vendor.get_key_policy):
        with refused("AccessDeniedException"):
            beyond(KeyId=key)
    for account_wide in (vendor.list_keys, vendor.create_key):
        with refused("AccessDeniedException"):
            account_wide()
    assert "kms:DisableKey" not in VENDOR_ACTIONS


def test_taking_the_role_out_of_the_key_policy_denies_a_live_session(aws: AwsTenant, key: str) -> None:
    aws.customer.allow_role(key, aws.role_arn)
    vendor = aws.role_client()
    _vendor_can(vendor, key)
    aws.customer.remove_role(key, aws.role_arn)
    with refused("AccessDeniedException"):
        vendor.generate_data_key(KeyId=key, KeySpec="AES_256")
    aws.customer.allow_role(key, aws.role_arn)
    _vendor_can(vendor, key)


def test_deny_beats_allow(aws: AwsTenant, key: str) -> None:
    aws.customer.allow_role(key, aws.role_arn)
    vendor = aws.role_client()
    aws.customer.deny_role(key, aws.role_arn)
    session_arn = f"arn:aws:sts::{aws.account_id}:assumed-role/{aws.role_name}/test"
    with refused(
        "AccessDeniedException",
        f"User: {session_arn} is not authorized to perform: kms:Encrypt on resource: {key} "
        "with an explicit deny in a resource-based policy",
    ):
        vendor.encrypt(KeyId=key, Plaintext=b"x")
    aws.customer.allow_role(key, aws.role_arn)
    _vendor_can(vendor, key)


def test_denied_is_said_before_disabled(aws: AwsTenant, key: str) -> None:
    """Whoever may not use a key learns nothing about its state."""
    vendor = aws.role_client()
    aws.customer.disable(key)
    with refused("AccessDeniedException"):
        vendor.encrypt(KeyId=key, Plaintext=b"x")


def test_encryption_context_conditions(aws: AwsTenant, key: str) -> None:
    aws.customer.allow_role(key, aws.role_arn, {"keylake:project": "prj-1"})
    vendor = aws.role_client()
    sealed = vendor.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext={"keylake:project": "prj-1"})["CiphertextBlob"]
    vendor.decrypt(CiphertextBlob=sealed, EncryptionContext={"keylake:project": "prj-1"})
    for context in ({}, {"keylake:project": "prj-2"}, {"other": "prj-1"}):
        with refused("AccessDeniedException"):
            vendor.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext=context)
    # Two names for AWS, one condition key with two values for the policy: both must be allowed.
    with refused("AccessDeniedException"):
        vendor.encrypt(
            KeyId=key, Plaintext=b"x", EncryptionContext={"keylake:project": "prj-2", "Keylake:Project": "prj-1"}
        )


def test_encryption_context_keys_condition(aws: AwsTenant, key: str) -> None:
    document = aws.customer.policy(key)
    document["Statement"].append(
        {
            "Effect": "Allow",
            "Principal": {"AWS": aws.role_arn},
            "Action": "kms:Encrypt",
            "Resource": "*",
            "Condition": {
                "ForAllValues:StringEquals": {"kms:EncryptionContextKeys": ["tenant", "branch"]},
                "Null": {"kms:EncryptionContextKeys": False},
            },
        }
    )
    aws.customer.put_policy(key, document)
    vendor = aws.role_client()
    for allowed in (CONTEXT, {"tenant": "t"}):
        vendor.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext=allowed)
    for denied in ({}, {**CONTEXT, "other": "x"}):
        with refused("AccessDeniedException"):
            vendor.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext=denied)


def test_malformed_policies_are_refused_and_change_nothing(aws: AwsTenant, kms: Any, key: str) -> None:
    before = aws.customer.policy(key)
    root = {"AWS": f"arn:aws:iam::{aws.account_id}:root"}
    sound = {"Effect": "Allow", "Principal": root, "Action": "kms:*", "Resource": "*"}
    for statement in (
        {**sound, "Effect": "Maybe"},
        {**sound, "Principal": {"AWS": f"arn:aws:iam::{aws.account_id}:role/nobody"}},
        {**sound, "Principal": {"AWS": "arn:aws:iam::000000000000:root"}},
        {**sound, "NotPrincipal": root},
        {**sound, "Condition": {"IpAddress": {"aws:SourceIp": "here"}}},
        {key_: value for key_, value in sound.items() if key_ != "Principal"},
    ):
        with refused("MalformedPolicyDocumentException"):
            aws.customer.put_policy(key, {"Version": "2012-10-17", "Statement": [statement]})
    with refused("MalformedPolicyDocumentException"):
        kms.put_key_policy(KeyId=key, Policy="zzz")
    with refused("MalformedPolicyDocumentException"):
        kms.create_key(Policy="zzz")
    assert aws.customer.policy(key) == before


def test_lockout_check_and_its_bypass(aws: AwsTenant, kms: Any, key: str) -> None:
    only_vendor = {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Principal": {"AWS": aws.role_arn}, "Action": "kms:*", "Resource": "*"}],
    }
    message = "The new key policy will not allow you to update the key policy in the future."
    with refused("MalformedPolicyDocumentException", message):
        aws.customer.put_policy(key, only_vendor)
    with refused("MalformedPolicyDocumentException", message):
        kms.create_key(Policy=json.dumps(only_vendor))
    kms.put_key_policy(KeyId=key, Policy=json.dumps(only_vendor), BypassPolicyLockoutSafetyCheck=True)
    with refused("AccessDeniedException"):
        kms.disable_key(KeyId=key)
    aws.role_client().disable_key(KeyId=key)


def test_another_customer_has_no_access(aws: AwsTenant, shared_cloud: Any, key: str) -> None:
    from tests.fixtures.customercloud import new_tenant

    stranger = new_tenant(shared_cloud)
    try:
        sealed = aws.customer.kms.encrypt(KeyId=key, Plaintext=b"x")["CiphertextBlob"]
        uses: tuple[Callable[[], object], ...] = (
            lambda: stranger.customer.kms.decrypt(CiphertextBlob=sealed),
            lambda: stranger.customer.kms.decrypt(CiphertextBlob=sealed, KeyId=key),
            lambda: stranger.customer.kms.describe_key(KeyId=key),
            lambda: stranger.customer.kms.disable_key(KeyId=key),
        )
        for use in uses:
            with refused("AccessDeniedException"):
                use()
        # Both accounts must allow: the owner by the key's policy, the stranger's own by an identity policy.
        document = aws.customer.policy(key)
        document["Statement"].append(
            {"Effect": "Allow", "Principal": {"AWS": stranger.account_id}, "Action": "kms:Decrypt", "Resource": "*"}
        )
        aws.customer.put_policy(key, document)
        assert stranger.customer.kms.decrypt(CiphertextBlob=sealed, KeyId=key)["Plaintext"] == b"x"
    finally:
        stranger.close()


# ── consistency ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_change_reaches_cryptographic_calls_after_the_propagation_delay(aws: AwsTenant, kms: Any, key: str) -> None:
    sealed = kms.encrypt(KeyId=key, Plaintext=b"x")["CiphertextBlob"]
    aws.admin.set_faults(Faults(propagation_delay_s=1.0))
    started = datetime.now(UTC)
    kms.disable_key(KeyId=key)
    assert kms.describe_key(KeyId=key)["KeyMetadata"]["KeyState"] == "Disabled"
    code, answers = "", 0
    while not code:
        try:
            kms.decrypt(CiphertextBlob=sealed)
        except ClientError as error:
            code = error.response["Error"]["Code"]
        else:
            answers += 1
            assert datetime.now(UTC) - started < timedelta(seconds=10)
    assert code == "DisabledException"
    assert answers > 0
    assert datetime.now(UTC) - started >= timedelta(seconds=1)
