"""Key policies over an unmodified boto3: every condition key that a call carries, and what is refused when stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

from customercloud.aws.admin import RoleRequest
from customercloud.aws.identity import trust_policy_document
from tests.fixtures.aws_refusals import refused

if TYPE_CHECKING:
    from tests.fixtures.customercloud import AwsTenant

pytestmark = pytest.mark.integration


def key_policy(aws: AwsTenant, *statements: dict[str, Any], version: str = "2012-10-17") -> str:
    own = {"Effect": "Allow", "Principal": {"AWS": aws.account_id}, "Action": "kms:*", "Resource": "*"}
    role = {"Effect": "Allow", "Principal": {"AWS": aws.role_arn}, "Action": "kms:*", "Resource": "*"}
    return json.dumps({"Version": version, "Statement": [own, role, *statements]})


def deny(action: str, condition: dict[str, Any]) -> dict[str, Any]:
    return {"Effect": "Deny", "Principal": "*", "Action": action, "Resource": "*", "Condition": condition}


def put(aws: AwsTenant, key: str, *statements: dict[str, Any]) -> None:
    aws.customer.kms.put_key_policy(KeyId=key, Policy=key_policy(aws, *statements))


def equals(key: str, value: str, operator: str = "StringEquals") -> dict[str, Any]:
    return {operator: {key: value}}


def _encrypt(kms: Any, key: str) -> object:
    return kms.encrypt(KeyId=key, Plaintext=b"x")


def _re_encrypt_on_same_key(kms: Any, key: str) -> object:
    return kms.re_encrypt(CiphertextBlob=kms.encrypt(KeyId=key, Plaintext=b"x")["CiphertextBlob"], DestinationKeyId=key)


# Each would be let through if its key were not set: the Deny would never fire.
CALLS: list[tuple[str, dict[str, Any], Callable[[Any, str], object]]] = [
    ("kms:ReEncrypt*", equals("kms:ReEncryptOnSameKey", "true", "Bool"), _re_encrypt_on_same_key),
    (
        "kms:ScheduleKeyDeletion",
        {"NumericLessThan": {"kms:ScheduleKeyDeletionPendingWindowInDays": "30"}},
        lambda kms, key: kms.schedule_key_deletion(KeyId=key, PendingWindowInDays=7),
    ),
    (
        "kms:EnableKeyRotation",
        {"NumericGreaterThan": {"kms:RotationPeriodInDays": 365}},
        lambda kms, key: kms.enable_key_rotation(KeyId=key, RotationPeriodInDays=366),
    ),
    (
        "kms:CreateGrant",
        equals("kms:GrantIsForAWSResource", "false", "Bool"),
        lambda kms, key: kms.create_grant(KeyId=key, GranteePrincipal=kms.get_role_arn, Operations=["Decrypt"]),
    ),
    (
        "kms:GenerateDataKeyPair",
        equals("kms:DataKeyPairSpec", "ECC_NIST_P256"),
        lambda kms, key: kms.generate_data_key_pair(KeyId=key, KeyPairSpec="ECC_NIST_P256"),
    ),
    ("kms:Encrypt", equals("aws:PrincipalType", "AssumedRole"), _encrypt),
    ("kms:Encrypt", equals("aws:RequestedRegion", "eu-central-1"), _encrypt),
    ("kms:Encrypt", equals("aws:MultiFactorAuthPresent", "false", "Bool"), _encrypt),
    ("kms:Encrypt", {"IpAddress": {"aws:SourceIp": "127.0.0.0/8"}}, _encrypt),
    ("kms:Encrypt", {"DateGreaterThan": {"aws:CurrentTime": "2020-01-01T00:00:00Z"}}, _encrypt),
    ("kms:Encrypt", equals("aws:SecureTransport", "true", "Bool"), _encrypt),
    ("kms:Encrypt", equals("aws:PrincipalTag/team", "red"), _encrypt),
    ("kms:Encrypt", {"StringLike": {"aws:userid": "AROA*:test"}}, _encrypt),
    ("kms:Encrypt", equals("kms:KeyUsage", "ENCRYPT_DECRYPT"), _encrypt),
    ("kms:Encrypt", {"StringNotEquals": {"aws:ResourceTag/tenant": "${aws:PrincipalTag/team}"}}, _encrypt),
    (
        "kms:Sign",
        equals("kms:SigningAlgorithm", "ECDSA_SHA_256"),
        lambda kms, key: kms.sign(KeyId=key, Message=b"x", SigningAlgorithm="ECDSA_SHA_256"),
    ),
]


def test_a_deny_fires_on_every_condition_key_of_a_call(aws: AwsTenant) -> None:
    trust = trust_policy_document([aws.names.vendor.arn], aws.names.external_id)
    aws.admin.put_role(aws.account_id, aws.role_name, RoleRequest(trust_policy=trust, tags={"team": "red"}))
    key = aws.customer.create_key()
    vendor = aws.role_client()
    vendor.get_role_arn = aws.role_arn
    for action, condition, call in CALLS:
        put(aws, key, deny(action, condition))
        with pytest.raises(ClientError, match="with an explicit deny in a resource-based policy"):
            call(vendor, key)
    put(aws, key)
    _encrypt(vendor, key)


def test_conditions_of_a_request_that_makes_a_key(aws: AwsTenant) -> None:
    from customercloud.aws.admin import UserRequest

    statements = [
        {"Effect": "Allow", "Action": "kms:*", "Resource": "*"},
        {
            "Effect": "Deny",
            "Action": ["kms:CreateKey", "kms:PutKeyPolicy"],
            "Resource": "*",
            "Condition": {"Bool": {"kms:BypassPolicyLockoutSafetyCheck": "true"}},
        },
        {
            "Effect": "Deny",
            "Action": "kms:CreateKey",
            "Resource": "*",
            "Condition": {"StringNotEquals": {"kms:KeySpec": "SYMMETRIC_DEFAULT"}},
        },
    ]
    document = json.dumps({"Version": "2012-10-17", "Statement": statements})
    maker = aws.admin.put_user(aws.account_id, "maker", UserRequest(policies={"p": document}))
    kms = aws.client("kms", maker)
    kms.create_key(KeySpec="SYMMETRIC_DEFAULT", KeyUsage="ENCRYPT_DECRYPT")
    with refused("AccessDeniedException"):
        kms.create_key(BypassPolicyLockoutSafetyCheck=True)


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        ({"StringEquals": {"kms:Invented": "x"}}, "the condition key kms:invented cannot be evaluated here"),
        ({"StringEquals": {"aws:Referer": "x"}}, "the condition key aws:referer cannot be evaluated here"),
        ({"StringSounds": {"aws:userid": "x"}}, "unknown condition operator StringSounds"),
        (
            {"StringEquals": {"aws:userid": "${aws:Invented}"}},
            "the condition key aws:invented cannot be evaluated here",
        ),
        ({"NumericEquals": {"kms:RotationPeriodInDays": "${aws:userid}"}}, None),
    ],
)
def test_what_cannot_be_evaluated_is_not_stored(aws: AwsTenant, key: str, condition: Any, reason: str | None) -> None:
    with refused("MalformedPolicyDocumentException", reason):
        put(aws, key, deny("kms:*", condition))


def test_policies_of_every_kind_are_stored(aws: AwsTenant, key: str) -> None:
    role = aws.admin.put_role(
        aws.account_id,
        "r",
        RoleRequest(path="/service-role/", trust_policy=trust_policy_document([aws.names.vendor.arn], None)),
    )
    assert role.arn == f"arn:aws:iam::{aws.account_id}:role/service-role/r"
    admin = [aws.names.customer.arn, f"arn:aws:iam::{aws.account_id}:root"]
    put(
        aws,
        key,
        {"Effect": "Deny", "NotPrincipal": {"AWS": admin}, "Action": "kms:PutKeyPolicy", "Resource": "*"},
        {"Effect": "Allow", "Principal": {"AWS": role.arn}, "Action": "kms:Decrypt", "Resource": "*"},
        {"Effect": "Allow", "Principal": {"Federated": "cognito-identity.amazonaws.com"}, "Action": "kms:Decrypt",
         "Resource": "*"},
        deny("kms:Encrypt", {"StringEquals": {"kms:ViaService": "s3.eu-central-1.amazonaws.com"}}),
        deny("kms:Encrypt", {"NotIpAddress": {"aws:SourceIp": "127.0.0.0/8"}}),
    )  # fmt: skip
    _encrypt(aws.role_client(), key)
    with refused("AccessDeniedException"):
        aws.role_client().put_key_policy(KeyId=key, Policy=key_policy(aws))
    with refused(
        "MalformedPolicyDocumentException", "Policy contains a statement with one or more invalid principals."
    ):
        put(
            aws,
            key,
            {"Effect": "Allow", "Principal": {"AWS": role.arn + "x"}, "Action": "kms:Decrypt", "Resource": "*"},
        )


# ── names of an encryption context ─────────────────────────────────────────────────────────────────────────────────


def test_names_that_differ_in_case_are_two_names_and_one_condition_key(aws: AwsTenant, key: str) -> None:
    put(aws, key, deny("kms:Encrypt", {"StringEquals": {"kms:EncryptionContext:tenant": "t2"}}))
    vendor = aws.role_client()
    both = {"tenant": "t1", "Tenant": "t3"}
    sealed = vendor.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext=both)["CiphertextBlob"]
    assert vendor.decrypt(CiphertextBlob=sealed, EncryptionContext=both)["Plaintext"] == b"x"
    with refused("InvalidCiphertextException"):
        vendor.decrypt(CiphertextBlob=sealed, EncryptionContext={"tenant": "t3", "Tenant": "t1"})
    with refused("AccessDeniedException"):
        vendor.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext={"tenant": "t1", "Tenant": "t2"})


def test_a_grant_to_a_service(aws: AwsTenant, kms: Any, key: str) -> None:
    service, source = "dynamodb.amazonaws.com", f"arn:aws:dynamodb:eu-central-1:{aws.account_id}:table/t"
    request = {"KeyId": key, "GranteeServicePrincipal": service, "Operations": ["Decrypt", "RetireGrant"]}
    with refused("ValidationException"):
        kms.create_grant(**request, RetiringPrincipal=aws.names.customer.arn)
    with refused("ValidationException"):
        kms.create_grant(**request, Constraints={"SourceArn": source})
    with refused("ValidationException"):
        kms.create_grant(**request, GranteePrincipal=aws.role_arn)
    made = kms.create_grant(**request, RetiringServicePrincipal=service, Constraints={"SourceArn": source})
    (grant,) = kms.list_grants(KeyId=key, GranteeServicePrincipal=service)["Grants"]
    assert grant["GrantId"] == made["GrantId"]
    assert (grant["GranteeServicePrincipal"], grant["RetiringServicePrincipal"]) == (service, service)
    assert grant["Constraints"] == {"SourceArn": source}
    assert "GranteePrincipal" not in grant
    listed = kms.list_retirable_grants(RetiringServicePrincipal=service)["Grants"]
    assert [g["GrantId"] for g in listed] == [made["GrantId"]]
    kms.revoke_grant(KeyId=key, GrantId=made["GrantId"])
