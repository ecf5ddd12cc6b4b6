"""Grants over an unmodified boto3: what they allow, what beats them, and who may end them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from customercloud.aws.admin import UserRequest
from customercloud.faults import Faults
from tests.fixtures.aws_refusals import refused

if TYPE_CHECKING:
    from tests.fixtures.customercloud import AwsTenant

pytestmark = pytest.mark.integration

CONTEXT = {"tenant": "t1", "branch": "b1"}
GHOST = "0" * 64


@pytest.fixture
def vendor(aws: AwsTenant) -> Any:
    """A session of a role that no policy allows anything."""
    return aws.role_client()


@pytest.fixture
def other_user(aws: AwsTenant) -> Iterator[tuple[str, Any]]:
    """(ARN, KMS client) of a user of the customer's account without policies."""
    credentials = aws.admin.put_user(aws.account_id, "somebody", UserRequest())
    yield credentials.arn, aws.client("kms", credentials)
    aws.admin.delete_user(aws.account_id, "somebody")


def test_a_grant_allows_its_operations_and_nothing_else(aws: AwsTenant, kms: Any, key: str, vendor: Any) -> None:
    with refused("AccessDeniedException"):
        vendor.generate_data_key(KeyId=key, KeySpec="AES_256")
    answer = kms.create_grant(KeyId=key, GranteePrincipal=aws.role_arn, Operations=["GenerateDataKey", "Decrypt"])
    assert len(answer["GrantId"]) == 64
    assert answer["GrantToken"]
    sealed = vendor.generate_data_key(KeyId=key, KeySpec="AES_256")
    assert vendor.decrypt(CiphertextBlob=sealed["CiphertextBlob"])["Plaintext"] == sealed["Plaintext"]
    too_much: tuple[Callable[[], object], ...] = (
        lambda: vendor.encrypt(KeyId=key, Plaintext=b"x"),
        lambda: vendor.generate_data_key_without_plaintext(KeyId=key, KeySpec="AES_256"),
        lambda: vendor.re_encrypt(CiphertextBlob=sealed["CiphertextBlob"], DestinationKeyId=key),
        lambda: vendor.describe_key(KeyId=key),
        lambda: vendor.disable_key(KeyId=key),
        lambda: vendor.list_grants(KeyId=key),
    )
    for beyond in too_much:
        with refused("AccessDeniedException"):
            beyond()
    kms.revoke_grant(KeyId=key, GrantId=answer["GrantId"])
    with refused("AccessDeniedException"):
        vendor.decrypt(CiphertextBlob=sealed["CiphertextBlob"])


def test_re_encrypt_needs_both_of_its_operations(aws: AwsTenant, kms: Any, key: str, vendor: Any) -> None:
    other = aws.customer.create_key()
    sealed = kms.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext=CONTEXT)["CiphertextBlob"]
    move = {"CiphertextBlob": sealed, "SourceEncryptionContext": CONTEXT, "DestinationKeyId": other}
    kms.create_grant(KeyId=key, GranteePrincipal=aws.role_arn, Operations=["ReEncryptFrom"])
    with refused("AccessDeniedException"):
        vendor.re_encrypt(**move)
    kms.create_grant(KeyId=other, GranteePrincipal=aws.role_arn, Operations=["ReEncryptTo"])
    assert vendor.re_encrypt(**move)["KeyId"] == other


@pytest.mark.parametrize(
    ("constraint", "allowed", "denied"),
    [
        (
            {"EncryptionContextSubset": {"tenant": "t1"}},
            # Names are compared without case, values with it (API reference, GrantConstraints).
            [{"tenant": "t1"}, {"Tenant": "t1"}, CONTEXT],
            [{}, {"tenant": "t2"}, {"tenant": "T1"}],
        ),
        ({"EncryptionContextEquals": CONTEXT}, [CONTEXT], [{}, {"tenant": "t1"}, {**CONTEXT, "more": "1"}]),
    ],
    ids=["subset", "equals"],
)
def test_constraints_on_the_encryption_context(
    aws: AwsTenant,
    kms: Any,
    key: str,
    vendor: Any,
    constraint: dict[str, dict[str, str]],
    allowed: list[dict[str, str]],
    denied: list[dict[str, str]],
) -> None:
    operations = ["Encrypt", "Decrypt", "DescribeKey"]
    kms.create_grant(KeyId=key, GranteePrincipal=aws.role_arn, Operations=operations, Constraints=constraint)
    vendor.describe_key(KeyId=key)
    for context in allowed:
        sealed = vendor.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext=context)["CiphertextBlob"]
        vendor.decrypt(CiphertextBlob=sealed, EncryptionContext=context)
    for context in denied:
        sealed = kms.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext=context)["CiphertextBlob"]
        with refused("AccessDeniedException"):
            vendor.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext=context)
        with refused("AccessDeniedException"):
            vendor.decrypt(CiphertextBlob=sealed, EncryptionContext=context)


def test_an_explicit_deny_beats_a_grant(aws: AwsTenant, kms: Any, key: str, vendor: Any) -> None:
    kms.create_grant(KeyId=key, GranteePrincipal=aws.role_arn, Operations=["Encrypt"])
    vendor.encrypt(KeyId=key, Plaintext=b"x")
    aws.customer.deny_role(key, aws.role_arn)
    with refused("AccessDeniedException"):
        vendor.encrypt(KeyId=key, Plaintext=b"x")


def test_a_grant_does_not_outlive_the_role_it_names(aws: AwsTenant, kms: Any, key: str) -> None:
    from customercloud.aws.admin import RoleRequest
    from customercloud.aws.identity import trust_policy_document

    kms.create_grant(KeyId=key, GranteePrincipal=aws.role_arn, Operations=["Encrypt"])
    aws.role_client().encrypt(KeyId=key, Plaintext=b"x")
    aws.admin.delete_role(aws.account_id, aws.role_name)
    trust = trust_policy_document([aws.names.vendor.arn], aws.names.external_id)
    aws.admin.put_role(aws.account_id, aws.role_name, RoleRequest(trust_policy=trust))
    with refused("AccessDeniedException"):
        aws.role_client().encrypt(KeyId=key, Plaintext=b"x")


def test_a_token_is_good_before_the_grant_has_spread(aws: AwsTenant, kms: Any, key: str, vendor: Any) -> None:
    aws.admin.set_faults(Faults(propagation_delay_s=600))
    answer = kms.create_grant(KeyId=key, GranteePrincipal=aws.role_arn, Operations=["Encrypt"])
    with refused("AccessDeniedException"):
        vendor.encrypt(KeyId=key, Plaintext=b"x")
    vendor.encrypt(KeyId=key, Plaintext=b"x", GrantTokens=[answer["GrantToken"]])
    # Taking it back spreads as slowly, and the token still works meanwhile.
    kms.revoke_grant(KeyId=key, GrantId=answer["GrantId"])
    assert kms.list_grants(KeyId=key)["Grants"] == []
    vendor.encrypt(KeyId=key, Plaintext=b"x", GrantTokens=[answer["GrantToken"]])
    with refused("InvalidGrantTokenException"):
        vendor.encrypt(KeyId=key, Plaintext=b"x", GrantTokens=["nonsense"])


def test_a_token_is_no_right_by_itself(aws: AwsTenant, kms: Any, key: str, vendor: Any, other_user: Any) -> None:
    user_arn, user = other_user
    token = kms.create_grant(KeyId=key, GranteePrincipal=user_arn, Operations=["Encrypt"])["GrantToken"]
    user.encrypt(KeyId=key, Plaintext=b"x")
    with refused("AccessDeniedException"):
        vendor.encrypt(KeyId=key, Plaintext=b"x", GrantTokens=[token])


def test_listing(aws: AwsTenant, kms: Any, key: str, other_user: Any) -> None:
    user_arn, _ = other_user
    ids = [
        kms.create_grant(KeyId=key, GranteePrincipal=grantee, Operations=["Decrypt"], **more)["GrantId"]
        for grantee, more in (
            (aws.role_arn, {"Name": "first", "RetiringPrincipal": user_arn}),
            (aws.role_arn, {"Constraints": {"EncryptionContextSubset": CONTEXT}}),
            (user_arn, {}),
        )
    ]
    pages = list(kms.get_paginator("list_grants").paginate(KeyId=key, PaginationConfig={"PageSize": 2}))
    assert [len(page["Grants"]) for page in pages] == [2, 1]
    grants = [grant for page in pages for grant in page["Grants"]]
    assert [grant["GrantId"] for grant in grants] == ids
    first = grants[0]
    assert (first["KeyId"], first["Name"], first["Operations"]) == (key, "first", ["Decrypt"])
    assert (first["GranteePrincipal"], first["RetiringPrincipal"]) == (aws.role_arn, user_arn)
    assert first["IssuingAccount"] == f"arn:aws:iam::{aws.account_id}:root"
    assert grants[1]["Constraints"] == {"EncryptionContextSubset": CONTEXT}
    assert "GrantToken" not in json.dumps(pages, default=str)
    for query, found in (({"GrantId": ids[1]}, ids[1:2]), ({"GranteePrincipal": user_arn}, ids[2:])):
        assert [grant["GrantId"] for grant in kms.list_grants(KeyId=key, **query)["Grants"]] == found
    retirable = kms.list_retirable_grants(RetiringPrincipal=user_arn)["Grants"]
    assert [grant["GrantId"] for grant in retirable] == ids[:1]
    with refused("InvalidMarkerException"):
        kms.list_grants(KeyId=key, Marker="nonsense")
    with refused("InvalidGrantIdException"):
        kms.list_grants(KeyId=key, GrantId="nonsense")


def test_a_named_request_that_is_repeated_makes_no_second_grant(aws: AwsTenant, kms: Any, key: str) -> None:
    request = {"KeyId": key, "GranteePrincipal": aws.role_arn, "Operations": ["Decrypt"], "Name": "once"}
    assert kms.create_grant(**request)["GrantId"] == kms.create_grant(**request)["GrantId"]
    other = kms.create_grant(**(request | {"Operations": ["Decrypt", "Encrypt"]}))["GrantId"]
    assert {grant["GrantId"] for grant in kms.list_grants(KeyId=key)["Grants"]} > {other}
    assert len(kms.list_grants(KeyId=key)["Grants"]) == 2


def test_who_may_retire(aws: AwsTenant, kms: Any, key: str, vendor: Any, other_user: Any) -> None:
    user_arn, user = other_user

    def new(**more: Any) -> Any:
        request = {"KeyId": key, "GranteePrincipal": aws.role_arn, "Operations": ["Decrypt"]}
        return kms.create_grant(**(request | more))

    grant = new(RetiringPrincipal=user_arn)
    with refused("AccessDeniedException"):
        vendor.retire_grant(GrantToken=grant["GrantToken"])
    user.retire_grant(GrantToken=grant["GrantToken"])
    with refused("InvalidGrantTokenException"):
        user.retire_grant(GrantToken=grant["GrantToken"])
    grant = new(Operations=["Decrypt", "RetireGrant"])
    with refused("AccessDeniedException"):
        user.retire_grant(KeyId=key, GrantId=grant["GrantId"])
    vendor.retire_grant(KeyId=key, GrantId=grant["GrantId"])
    grant = new()
    kms.retire_grant(KeyId=key, GrantId=grant["GrantId"])  # the account that issued it
    with refused("NotFoundException", f"Grant ID {grant['GrantId']} not found"):
        kms.retire_grant(KeyId=key, GrantId=grant["GrantId"])
    for wrong in ({}, {"KeyId": key}, {"GrantId": GHOST}):
        with refused("ValidationException"):
            kms.retire_grant(**wrong)
    assert kms.list_grants(KeyId=key)["Grants"] == []


def test_who_may_revoke(kms: Any, key: str, vendor: Any, aws: AwsTenant) -> None:
    grant = kms.create_grant(KeyId=key, GranteePrincipal=aws.role_arn, Operations=["RetireGrant"])
    with refused("AccessDeniedException"):
        vendor.revoke_grant(KeyId=key, GrantId=grant["GrantId"])
    with refused("NotFoundException"):
        kms.revoke_grant(KeyId=key, GrantId=GHOST)
    with refused("InvalidGrantIdException"):
        kms.revoke_grant(KeyId=key, GrantId="nonsense")
    kms.revoke_grant(KeyId=key, GrantId=grant["GrantId"])


def test_a_grantee_passes_on_no_more_than_it_has(
    aws: AwsTenant, kms: Any, key: str, vendor: Any, other_user: Any
) -> None:
    user_arn, user = other_user
    constraint = {"EncryptionContextSubset": {"tenant": "t1"}}
    kms.create_grant(
        KeyId=key, GranteePrincipal=aws.role_arn, Operations=["Encrypt", "CreateGrant"], Constraints=constraint
    )
    wider: tuple[dict[str, Any], ...] = (
        {"Operations": ["Encrypt", "Decrypt"], "Constraints": constraint},
        {"Operations": ["Encrypt"]},
        {"Operations": ["Encrypt"], "Constraints": {"EncryptionContextSubset": {"branch": "b1"}}},
    )
    for request in wider:
        with refused("AccessDeniedException"):
            vendor.create_grant(KeyId=key, GranteePrincipal=user_arn, **request)
    narrower = {"EncryptionContextEquals": CONTEXT}
    vendor.create_grant(KeyId=key, GranteePrincipal=user_arn, Operations=["Encrypt"], Constraints=narrower)
    user.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext=CONTEXT)


def test_another_account_needs_its_own_policies_besides(aws: AwsTenant, kms: Any, key: str, shared_cloud: Any) -> None:
    from tests.fixtures.customercloud import new_tenant

    stranger = new_tenant(shared_cloud)
    try:
        for grantee in (stranger.names.customer.arn, stranger.role_arn):
            kms.create_grant(KeyId=key, GranteePrincipal=grantee, Operations=["Encrypt"])
        stranger.customer.kms.encrypt(KeyId=key, Plaintext=b"x")
        with refused("AccessDeniedException"):  # the role has no identity policy
            stranger.role_client().encrypt(KeyId=key, Plaintext=b"x")
    finally:
        stranger.close()


def test_key_states(aws: AwsTenant, kms: Any, key: str) -> None:
    request = {"KeyId": key, "GranteePrincipal": aws.role_arn, "Operations": ["Decrypt"]}
    grant = kms.create_grant(**request)["GrantId"]
    kms.disable_key(KeyId=key)
    with refused("DisabledException", f"{key} is disabled."):
        kms.create_grant(**request)
    kms.schedule_key_deletion(KeyId=key)
    with refused("KMSInvalidStateException", f"{key} is pending deletion."):
        kms.create_grant(**request)
    assert [g["GrantId"] for g in kms.list_grants(KeyId=key)["Grants"]] == [grant]
    kms.revoke_grant(KeyId=key, GrantId=grant)


def test_requests_that_make_no_sense(aws: AwsTenant, kms: Any, key: str) -> None:
    request = {"KeyId": key, "GranteePrincipal": aws.role_arn, "Operations": ["Decrypt"]}
    both = {"EncryptionContextSubset": CONTEXT, "EncryptionContextEquals": CONTEXT}
    for changes, code in (
        ({"Operations": ["Sign"]}, "ValidationException"),
        ({"Operations": ["Destroy"]}, "ValidationException"),
        ({"GranteePrincipal": "not a principal"}, "ValidationException"),
        ({"GranteePrincipal": f"arn:aws:iam::{aws.account_id}:role/nobody"}, "InvalidArnException"),
        ({"GranteePrincipal": "arn:aws:iam::999999999999:root"}, "InvalidArnException"),
        ({"RetiringPrincipal": "nobody"}, "InvalidArnException"),
        ({"Constraints": both}, "ValidationException"),
        ({"Name": "not a name"}, "ValidationException"),
        ({"KeyId": "alias/none"}, "NotFoundException"),
        ({"DryRun": True}, "DryRunOperationException"),
    ):
        with refused(code):
            kms.create_grant(**(request | changes))
    assert kms.list_grants(KeyId=key)["Grants"] == []


def test_policies_can_say_which_grants_may_be_made(aws: AwsTenant, kms: Any, key: str, vendor: Any) -> None:
    document = aws.customer.policy(key)
    document["Statement"].append(
        {
            "Effect": "Allow",
            "Principal": {"AWS": aws.role_arn},
            "Action": "kms:CreateGrant",
            "Resource": "*",
            "Condition": {
                "ForAllValues:StringEquals": {"kms:GrantOperations": ["Decrypt", "Encrypt"]},
                "StringEquals": {"kms:GrantConstraintType": "EncryptionContextSubset"},
            },
        }
    )
    aws.customer.put_policy(key, document)
    request = {"KeyId": key, "GranteePrincipal": aws.role_arn, "Operations": ["Decrypt"]}
    constrained = request | {"Constraints": {"EncryptionContextSubset": CONTEXT}}
    vendor.create_grant(**constrained)
    for denied in (request, constrained | {"Operations": ["Decrypt", "DescribeKey"]}):
        with refused("AccessDeniedException"):
            vendor.create_grant(**denied)


def test_the_log_says_who_granted_what_and_holds_no_token(aws: AwsTenant, kms: Any, key: str) -> None:
    answer = kms.create_grant(
        KeyId=key, GranteePrincipal=aws.role_arn, Operations=["Encrypt", "Decrypt"], Name="vendor"
    )
    kms.revoke_grant(KeyId=key, GrantId=answer["GrantId"])
    (created,) = aws.customer.events(EventName="CreateGrant")
    assert created["requestParameters"] == {
        "keyId": key,
        "granteePrincipal": aws.role_arn,
        "operations": ["Decrypt", "Encrypt"],
        "name": "vendor",
    }
    assert created["responseElements"] == {"grantId": answer["GrantId"], "keyId": key}
    assert created["readOnly"] is False
    (revoked,) = aws.customer.events(EventName="RevokeGrant")
    assert revoked["requestParameters"] == {"keyId": key, "grantId": answer["GrantId"]}
    assert answer["GrantToken"] not in json.dumps(aws.admin.audit_log())


def test_grants_survive_a_kill(start_cloud: Any) -> None:
    from tests.fixtures.customercloud import new_tenant

    cloud = start_cloud()
    aws = new_tenant(cloud)
    try:
        key = aws.customer.create_key()
        token = aws.customer.kms.create_grant(KeyId=key, GranteePrincipal=aws.role_arn, Operations=["Encrypt"])
        cloud.stop(kill=True)
        assert token["GrantToken"].encode() not in (cloud.state_dir / "aws" / "state.sealed").read_bytes()
        cloud.start()
        aws.role_client().encrypt(KeyId=key, Plaintext=b"x", GrantTokens=[token["GrantToken"]])
    finally:
        aws.close()
