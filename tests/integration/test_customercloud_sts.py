"""STS over an unmodified boto3: session policies, tags, chains of roles, users' sessions, and exact refusals."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError

from customercloud.aws.admin import RoleRequest
from tests.fixtures.aws_refusals import refused
from tests.fixtures.customercloud import REGION

if TYPE_CHECKING:
    from tests.fixtures.customercloud import AwsTenant

pytestmark = pytest.mark.integration
VERSION = "2012-10-17"


def policy(*statements: dict[str, Any]) -> str:
    return json.dumps({"Version": VERSION, "Statement": list(statements)})


def allow(action: Any, resource: str = "*", **more: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": action, "Resource": resource, **more}


def trust(*principals: str, action: Any = "sts:AssumeRole", **more: Any) -> str:
    return policy({"Effect": "Allow", "Principal": {"AWS": list(principals)}, "Action": action, **more})


def test_a_session_policy_narrows_the_session(aws: AwsTenant) -> None:
    key = aws.customer.create_key(role_arn=aws.role_arn)
    narrowed = aws.assume_role(Policy=policy(allow("kms:Encrypt")))
    kms = aws.client("kms", narrowed["Credentials"])
    sealed = kms.encrypt(KeyId=key, Plaintext=b"x")["CiphertextBlob"]
    session = narrowed["AssumedRoleUser"]["Arn"]
    message = (
        f"User: {session} is not authorized to perform: kms:Decrypt on resource: {key} "
        "because no session policy allows the kms:Decrypt action"
    )
    with refused("AccessDeniedException", message):
        kms.decrypt(CiphertextBlob=sealed)
    assert aws.role_client().decrypt(CiphertextBlob=sealed)["Plaintext"] == b"x"
    # Nor does a grant to the role reach further than the session does.
    grant = aws.customer.kms.create_grant(
        KeyId=key, GranteePrincipal=aws.role_arn, Operations=["Decrypt", "RetireGrant"]
    )
    with refused("AccessDeniedException", message):
        kms.decrypt(CiphertextBlob=sealed)
    with refused("AccessDeniedException"):
        kms.retire_grant(KeyId=key, GrantId=grant["GrantId"])


def test_violations_are_said_in_the_frameworks_words(aws: AwsTenant) -> None:
    sts = aws.client("sts", aws.names.vendor, parameter_validation=False)
    failed, long = "failed to satisfy constraint: Member must", "x" * 65
    for request, message in (
        ({"RoleSessionName": long},
         f"Value '{long}' at 'roleSessionName' {failed} have length less than or equal to 64"),
        ({"RoleSessionName": "a:b"},
         rf"Value 'a:b' at 'roleSessionName' {failed} satisfy regular expression pattern: [\w+=,.@-]*"),
        ({"DurationSeconds": 899},
         f"Value '899' at 'durationSeconds' {failed} have value greater than or equal to 900"),
        ({"ExternalId": "x"}, f"Value 'x' at 'externalId' {failed} have length greater than or equal to 2"),
        ({"Tags": [{"Key": "k"}]}, f"Value null at 'tags.1.member.value' {failed} not be null"),
    ):  # fmt: skip
        with refused("ValidationError", f"1 validation error detected: {message}"):
            sts.assume_role(**({"RoleArn": aws.role_arn, "RoleSessionName": "test"} | request))
    with refused("ValidationError"):
        sts.assume_role(RoleArn=aws.role_arn)
    with refused("PackedPolicyTooLarge"):
        sts.assume_role(RoleArn=aws.role_arn, RoleSessionName="test", Policy=policy(allow("kms:*")) + " " * 2048)
    with refused("ValidationError", f"{'r' * 20} is invalid"):
        sts.assume_role(RoleArn="r" * 20, RoleSessionName="test")


def test_tags_and_a_source_identity_go_along_a_chain_of_roles(aws: AwsTenant) -> None:
    first, last = (f"arn:aws:iam::{aws.account_id}:role/team/{name}" for name in ("first", "last"))
    actions = ["sts:AssumeRole", "sts:TagSession", "sts:SetSourceIdentity"]
    admin_arn = aws.names.customer.arn
    put = aws.admin.put_role
    put(aws.account_id, "first", RoleRequest(
        path="/team/", trust_policy=trust(admin_arn, action=actions), policies={"p": policy(allow(actions))},
        max_session_s=7200,
    ))  # fmt: skip
    only_red = {"StringEquals": {"aws:PrincipalTag/team": "red", "aws:SourceIdentity": "alice"}}
    put(aws.account_id, "last", RoleRequest(
        path="/team/", trust_policy=trust(first, action=actions, Condition=only_red),
        policies={"p": policy(allow("kms:*", Condition=only_red))}, max_session_s=7200,
    ))  # fmt: skip
    sts = aws.client("sts", aws.names.customer)
    plain = sts.assume_role(RoleArn=first, RoleSessionName="plain")
    with refused("AccessDenied", status=403):
        aws.client("sts", plain["Credentials"]).assume_role(RoleArn=last, RoleSessionName="plain")
    tags = [{"Key": "team", "Value": "red"}]
    one = sts.assume_role(
        RoleArn=first, RoleSessionName="one", Tags=tags, TransitiveTagKeys=["team"], SourceIdentity="alice"
    )
    assert one["SourceIdentity"] == "alice"
    chained = aws.client("sts", one["Credentials"])
    with refused(
        "ValidationError",
        "The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining.",
    ):
        chained.assume_role(RoleArn=last, RoleSessionName="two", DurationSeconds=3601)
    with refused("InvalidParameterValue"):
        chained.assume_role(RoleArn=last, RoleSessionName="two", Tags=[{"Key": "Team", "Value": "blue"}])
    with refused("AccessDenied", status=403):
        chained.assume_role(RoleArn=last, RoleSessionName="two", SourceIdentity="mallory")
    two = chained.assume_role(RoleArn=last, RoleSessionName="two")
    kms = aws.client("kms", two["Credentials"])
    assert "Keys" in kms.list_keys()
    record = next(aws.customer.events(EventName="ListKeys"))
    assert record["userIdentity"]["sessionContext"]["sourceIdentity"] == "alice"


def test_tags_need_a_right_of_their_own(aws: AwsTenant) -> None:
    message = f"User: {aws.names.vendor.arn} is not authorized to perform: sts:TagSession on resource: {aws.role_arn}"
    with pytest.raises(ClientError, match=message):
        aws.assume_role(Tags=[{"Key": "a", "Value": "b"}])
    with refused("InvalidParameterValue"):
        aws.assume_role(Tags=[{"Key": "a", "Value": "b"}, {"Key": "A", "Value": "c"}])
    with refused("InvalidParameterValue", "The specified transitive tag key must be included in the requested tags."):
        aws.assume_role(TransitiveTagKeys=["a"])


def test_a_users_own_session(aws: AwsTenant) -> None:
    sts = aws.client("sts", aws.names.customer)
    credentials = sts.get_session_token(DurationSeconds=900)["Credentials"]
    session = aws.client("sts", credentials)
    assert session.get_caller_identity()["Arn"] == aws.names.customer.arn
    assert aws.client("kms", credentials).list_keys()["Keys"] == []
    for call in (session.get_session_token, lambda: session.get_federation_token(Name="bob")):
        with pytest.raises(ClientError, match="with session credentials"):
            call()
    for key in (credentials["AccessKeyId"], aws.names.customer.access_key_id):
        assert sts.get_access_key_info(AccessKeyId=key)["Account"] == aws.account_id


def test_a_federated_user_has_at_most_what_both_say(aws: AwsTenant) -> None:
    sts = aws.client("sts", aws.names.customer)
    key = aws.customer.create_key()
    narrowed = sts.get_federation_token(Name="bob", Policy=policy(allow("kms:ListKeys")))
    arn = f"arn:aws:sts::{aws.account_id}:federated-user/bob"
    assert narrowed["FederatedUser"] == {"FederatedUserId": f"{aws.account_id}:bob", "Arn": arn}
    kms = aws.client("kms", narrowed["Credentials"])
    assert len(kms.list_keys()["Keys"]) == 1
    with refused("AccessDeniedException"):
        kms.encrypt(KeyId=key, Plaintext=b"x")
    bare = aws.client("kms", sts.get_federation_token(Name="bob")["Credentials"])
    with refused("AccessDeniedException"):
        bare.list_keys()


def test_what_does_not_exist_here_is_refused_as_aws_refuses_it(aws: AwsTenant) -> None:
    sts = aws.client("sts", aws.names.customer)
    with refused("InvalidAuthorizationMessageException", "Message is not valid"):
        sts.decode_authorization_message(EncodedMessage="x")
    with refused("OutboundWebIdentityFederationDisabledException", status=403):
        sts.get_web_identity_token(Audience=["x"], SigningAlgorithm="RS256")
    with refused("AccessDenied", status=403):
        sts.assume_root(TargetPrincipal="111122223333", TaskPolicyArn={"arn": "arn:aws:iam::aws:policy/x/IAMAudit"})
    with refused("ExpiredTradeInTokenException"):
        sts.get_delegated_access_token(TradeInToken="x")
    anonymous: Any = boto3.session.Session(region_name=REGION).client(
        "sts", endpoint_url=aws.cloud.url, verify=str(aws.cloud.ca_bundle), config=Config(signature_version=UNSIGNED)
    )
    role = {"RoleArn": aws.role_arn, "RoleSessionName": "test"}
    issuer = "https://token.actions.githubusercontent.com"
    payload = "eyJpc3MiOiJodHRwczovL3Rva2VuLmFjdGlvbnMuZ2l0aHVidXNlcmNvbnRlbnQuY29tIn0"
    with refused("InvalidIdentityToken", f"No OpenIDConnect provider found in your account for {issuer}"):
        anonymous.assume_role_with_web_identity(**role, WebIdentityToken=f"eyJhbGciOiJub25lIn0.{payload}.AAAA")
    with refused(
        "InvalidIdentityToken",
        "The ID Token provided is not a valid JWT. (You may see this error if you sent an Access Token)",
    ):
        anonymous.assume_role_with_web_identity(**role, WebIdentityToken="nonsense")
    with refused("InvalidIdentityToken"):
        anonymous.assume_role_with_saml(
            RoleArn=aws.role_arn, PrincipalArn=f"arn:aws:iam::{aws.account_id}:saml-provider/x", SAMLAssertion="AAAA"
        )
    anonymous.close()


def test_no_operation_of_sts_and_cloudtrail_is_unknown(aws: AwsTenant) -> None:
    """Of all that botocore knows of: each succeeds, or refuses with an error that it declares or that all have."""
    common = {"ValidationError", "ValidationException", "AccessDenied", "AccessDeniedException"}
    for service in ("sts", "cloudtrail"):
        client = aws.client(service, aws.names.customer)
        model = client.meta.service_model
        for name in model.operation_names:
            operation = model.operation_model(name)
            members = {} if operation.input_shape is None else _minimal(operation.input_shape)
            try:
                client._make_api_call(name, members)
            except ClientError as error:
                declared = {shape.metadata.get("error", {}).get("code", shape.name) for shape in operation.error_shapes}
                declared |= {shape.name for shape in operation.error_shapes}
                assert error.response["Error"]["Code"] in declared | common, (service, name)  # noqa: PT017


def _minimal(shape: Any) -> Any:
    """A value that the service's model allows, made of nothing but the model."""
    least = shape.metadata.get("min", 1)
    match shape.type_name:
        case "structure":
            return {name: _minimal(shape.members[name]) for name in shape.required_members}
        case "list":
            return [_minimal(shape.member)]
        case "string":
            return shape.enum[0] if shape.enum else "x" * max(least, 20)
        case "integer" | "long":
            return least
        case "timestamp":
            return 0
        case _:
            return None


def test_there_are_no_trails(aws: AwsTenant) -> None:
    trail = aws.client("cloudtrail", aws.names.customer)
    assert trail.describe_trails()["trailList"] == []
    assert trail.list_trails()["Trails"] == []
    arn = f"arn:aws:cloudtrail:{REGION}:{aws.account_id}:trail/main"
    unknown = f"Unknown trail: {arn} for the user: {aws.account_id}"
    for name in ("main", arn):
        with refused("TrailNotFoundException", unknown):
            trail.get_trail_status(Name=name)
        with refused("TrailNotFoundException", unknown):
            trail.get_event_selectors(TrailName=name)
    with refused("UnsupportedOperationException"):
        trail.create_trail(Name="main", S3BucketName="bucket")
    with refused("AccessDeniedException"):
        aws.role_client("cloudtrail").describe_trails()
