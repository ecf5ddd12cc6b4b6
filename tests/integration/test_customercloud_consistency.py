"""What AWS makes visible late: with a propagation delay nothing that decides changes at once; and what rotates itself.

The delay is far longer than the test, so that what must not be seen yet cannot be; its end is for the unit tests.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from customercloud.aws.admin import RoleRequest, UserRequest
from customercloud.aws.identity import trust_policy_document
from customercloud.faults import Faults
from tests.fixtures.aws_refusals import refused

if TYPE_CHECKING:
    from tests.fixtures.customercloud import AwsTenant

pytestmark = pytest.mark.integration
LATE = Faults(propagation_delay_s=600)
NOTHING = json.dumps({"Statement": {"Effect": "Deny", "Action": "*", "Resource": "*"}})


def test_identities_change_late(aws: AwsTenant) -> None:
    key = aws.customer.create_key(role_arn=aws.role_arn)
    vendor = aws.role_client()
    user = aws.admin.put_user(aws.account_id, "temp", UserRequest())
    with aws.admin.during(LATE):
        aws.admin.put_role(
            aws.account_id,
            aws.role_name,
            RoleRequest(trust_policy=trust_policy_document([aws.names.customer.arn], None), policies={"cut": NOTHING}),
        )
        aws.admin.put_user(aws.names.vendor.account_id, "keylake", UserRequest(policies={"cut": NOTHING}))
        aws.admin.delete_user(aws.account_id, "temp")
        vendor.encrypt(KeyId=key, Plaintext=b"x")
        aws.assume_role()
        aws.admin.delete_role(aws.account_id, aws.role_name)
        vendor.encrypt(KeyId=key, Plaintext=b"x")
        aws.client("sts", user).get_caller_identity()


def test_without_a_delay_they_change_at_once(aws: AwsTenant) -> None:
    aws.admin.put_user(aws.names.vendor.account_id, "keylake", UserRequest(policies={"cut": NOTHING}))
    with refused("AccessDenied", status=403):
        aws.assume_role()


def test_tags_and_aliases_are_seen_late(aws: AwsTenant) -> None:
    kms = aws.customer.kms
    key, other = aws.customer.create_key(role_arn=aws.role_arn), aws.customer.create_key(role_arn=aws.role_arn)
    only_red = {
        "Effect": "Allow", "Principal": {"AWS": aws.role_arn}, "Action": "kms:Encrypt", "Resource": "*",
        "Condition": {"StringEquals": {"aws:ResourceTag/team": "red"}},
    }  # fmt: skip
    own = {"Effect": "Allow", "Principal": {"AWS": aws.account_id}, "Action": "kms:*", "Resource": "*"}
    kms.put_key_policy(KeyId=key, Policy=json.dumps({"Statement": [own, only_red]}))
    kms.create_alias(AliasName="alias/moved", TargetKeyId=key)
    vendor = aws.role_client()
    with aws.admin.during(LATE):
        kms.tag_resource(KeyId=key, Tags=[{"TagKey": "team", "TagValue": "red"}])
        assert len(kms.list_resource_tags(KeyId=key)["Tags"]) == 1
        with refused("AccessDeniedException"):
            vendor.encrypt(KeyId=key, Plaintext=b"x")
        kms.update_alias(AliasName="alias/moved", TargetKeyId=other)
        assert kms.encrypt(KeyId="alias/moved", Plaintext=b"x")["KeyId"] == key
        kms.create_alias(AliasName="alias/new", TargetKeyId=key)
        with refused("NotFoundException"):
            kms.encrypt(KeyId="alias/new", Plaintext=b"x")
        assert {a["AliasName"] for a in kms.list_aliases()["Aliases"]} == {"alias/moved", "alias/new"}
        kms.delete_alias(AliasName="alias/moved")
        assert kms.encrypt(KeyId="alias/moved", Plaintext=b"x")["KeyId"] == key
        assert {a["AliasName"] for a in kms.list_aliases()["Aliases"]} == {"alias/new"}
        kms.create_alias(AliasName="alias/moved", TargetKeyId=other)


def test_a_key_rotates_itself_and_the_trail_says_so(aws: AwsTenant) -> None:
    kms = aws.customer.kms
    key = aws.customer.create_key()
    old = kms.encrypt(KeyId=key, Plaintext=b"old")["CiphertextBlob"]
    kms.enable_key_rotation(KeyId=key, RotationPeriodInDays=90)
    before = kms.describe_key(KeyId=key)["KeyMetadata"]["CurrentKeyMaterialId"]
    with aws.admin.during(LATE):
        aws.admin.complete_rotation_period(key)
        (rotation,) = kms.list_key_rotations(KeyId=key)["Rotations"]
        assert rotation["RotationType"] == "AUTOMATIC"
        assert kms.generate_data_key(KeyId=key, KeySpec="AES_256")["KeyMaterialId"] == before, "seen late, too"
    assert kms.describe_key(KeyId=key)["KeyMetadata"]["CurrentKeyMaterialId"] == rotation["KeyMaterialId"] != before
    assert kms.decrypt(CiphertextBlob=old)["Plaintext"] == b"old"
    (event,) = aws.customer.events(EventName="RotateKey")
    assert event["eventType"] == "AwsServiceEvent"
    assert event["serviceEventDetails"] == {"keyId": key.rpartition("/")[2], "rotationType": "AUTOMATIC"}
    next_rotation = kms.get_key_rotation_status(KeyId=key)["NextRotationDate"]
    assert (next_rotation - rotation["RotationDate"]).days == 90
