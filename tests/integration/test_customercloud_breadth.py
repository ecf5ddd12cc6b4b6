"""The rest of KMS over an unmodified boto3: aliases, tags, listings, names of keys, and what does not exist here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.exceptions import ClientError
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_private_key

from tests.fixtures.aws_refusals import refused

if TYPE_CHECKING:
    from tests.fixtures.customercloud import AwsTenant
    from tests.fixtures.s3 import S3Server

pytestmark = pytest.mark.integration


def _alias_arn(key: str, name: str) -> str:
    return f"{key.rpartition(':')[0]}:{name}"


# ── every operation ────────────────────────────────────────────────────────────────────────────────────────────────


def _minimal(shape: Any, key: str) -> Any:
    """A value that the service's model allows, made of nothing but the model."""
    match shape.type_name:
        case "structure":
            return {name: _minimal(shape.members[name], key) for name in shape.required_members}
        case "list":
            return [_minimal(shape.member, key)]
        case "string" if shape.name == "KeyIdType":
            return key
        case "string":
            return shape.enum[0] if shape.enum else "eu-central-1" if shape.name == "RegionType" else "alias/x"
        case "blob":
            return b"x"
        case "integer":
            return 32
        case _:
            return None


def test_no_operation_of_kms_is_unknown_or_a_server_error(aws: AwsTenant, kms: Any, key: str) -> None:
    """Of all that botocore knows of: each succeeds or refuses in KMS's own words."""
    model = kms.meta.service_model
    for name in model.operation_names:
        operation = model.operation_model(name)
        own_key = aws.customer.create_key()
        members = {} if operation.input_shape is None else _minimal(operation.input_shape, own_key)
        try:
            kms._make_api_call(name, members)
        except ClientError as error:
            code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
            assert status == 400, (name, code)
            declared = {shape.name for shape in operation.error_shapes}
            common = {"ValidationException", "AccessDeniedException", "NotAuthorizedException"}
            assert code in declared | common | {"UnsupportedOperationException"}, name


def test_what_symmetric_keys_cannot_do(kms: Any, key: str) -> None:
    usage = "{} key usage is ENCRYPT_DECRYPT which is not valid for {}."
    with refused("InvalidKeyUsageException", usage.format(key, "Sign")):
        kms.sign(KeyId=key, Message=b"x", SigningAlgorithm="ECDSA_SHA_256")
    with refused("InvalidKeyUsageException", usage.format(key, "GenerateMac")):
        kms.generate_mac(KeyId=key, Message=b"x", MacAlgorithm="HMAC_SHA_256")
    origin = f"{key} origin is AWS_KMS which is not valid for this operation."
    with refused("UnsupportedOperationException", origin):
        kms.get_parameters_for_import(KeyId=key, WrappingAlgorithm="RSAES_OAEP_SHA_256", WrappingKeySpec="RSA_2048")
    with refused("UnsupportedOperationException"):
        kms.get_public_key(KeyId=key)
    with refused("UnsupportedOperationException"):
        kms.replicate_key(KeyId=key, ReplicaRegion="us-west-2")
    with refused(
        "InvalidKeyUsageException", "Algorithm RSAES_OAEP_SHA_1 is incompatible with key spec SYMMETRIC_DEFAULT."
    ):
        kms.encrypt(KeyId=key, Plaintext=b"x", EncryptionAlgorithm="RSAES_OAEP_SHA_1")
    assert kms.describe_custom_key_stores()["CustomKeyStores"] == []
    with refused("CustomKeyStoreNotFoundException"):
        kms.connect_custom_key_store(CustomKeyStoreId="cks-1234567890abcdef0")


def test_who_may_not_use_a_key_does_not_learn_its_kind(aws: AwsTenant, key: str) -> None:
    with refused("AccessDeniedException"):
        aws.role_client().sign(KeyId=key, Message=b"x", SigningAlgorithm="ECDSA_SHA_256")


@pytest.mark.parametrize(
    ("request_members", "code", "message"),
    [
        (
            {"KeySpec": "HMAC_256"},
            "ValidationException",
            "You must specify a KeyUsage value for all KMS keys except for symmetric encryption keys.",
        ),
        ({"KeySpec": "HMAC_256", "KeyUsage": "GENERATE_VERIFY_MAC"}, "UnsupportedOperationException", None),
        ({"KeyUsage": "SIGN_VERIFY"}, "ValidationException", None),
        (
            {"KeySpec": "SYMMETRIC_DEFAULT", "CustomerMasterKeySpec": "SYMMETRIC_DEFAULT"},
            "ValidationException",
            "You cannot specify KeySpec and CustomerMasterKeySpec in the same request. "
            "CustomerMasterKeySpec is deprecated.",
        ),
        ({"Origin": "AWS_CLOUDHSM"}, "UnsupportedOperationException", None),
    ],
)
def test_keys_that_cannot_be_made(kms: Any, request_members: dict[str, Any], code: str, message: str | None) -> None:
    with refused(code, message):
        kms.create_key(**request_members)


def test_every_violation_of_a_request_is_said(aws: AwsTenant, key: str) -> None:
    """boto3's own checks are off, as those of other languages' SDKs are."""
    unchecked = aws.client("kms", aws.names.customer, parameter_validation=False)
    with refused(
        "ValidationException",
        "2 validation errors detected: "
        "Value null at 'keyId' failed to satisfy constraint: Member must not be null; "
        "Value '0' at 'numberOfBytes' failed to satisfy constraint: Member must have value greater than or equal to 1",
    ):
        unchecked.generate_data_key(NumberOfBytes=0)


# ── names ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_aliases_name_keys_where_aws_allows_it(kms: Any, key: str) -> None:
    kms.create_alias(AliasName="alias/cmk", TargetKeyId=key)
    for name in ("alias/cmk", _alias_arn(key, "alias/cmk")):
        sealed = kms.encrypt(KeyId=name, Plaintext=b"x")["CiphertextBlob"]
        assert kms.decrypt(KeyId=name, CiphertextBlob=sealed)["KeyId"] == key
        assert kms.generate_data_key(KeyId=name, KeySpec="AES_256")["KeyId"] == key
        assert kms.generate_data_key_without_plaintext(KeyId=name, KeySpec="AES_256")["KeyId"] == key
        assert kms.re_encrypt(SourceKeyId=name, DestinationKeyId=name, CiphertextBlob=sealed)["KeyId"] == key
        assert kms.describe_key(KeyId=name)["KeyMetadata"]["Arn"] == key


def test_and_nowhere_else(kms: Any, key: str) -> None:
    kms.create_alias(AliasName="alias/cmk", TargetKeyId=key)
    for operation in (
        kms.disable_key, kms.enable_key, kms.schedule_key_deletion, kms.cancel_key_deletion, kms.get_key_policy,
        kms.list_key_policies, kms.rotate_key_on_demand, kms.enable_key_rotation, kms.get_key_rotation_status,
        kms.list_key_rotations, kms.list_grants, kms.list_resource_tags, kms.get_key_last_usage,
    ):  # fmt: skip
        with refused("NotFoundException", "Invalid keyId 'alias/cmk'"):
            operation(KeyId="alias/cmk")
        with refused("InvalidArnException"):
            operation(KeyId=_alias_arn(key, "alias/cmk"))
    assert kms.describe_key(KeyId=key)["KeyMetadata"]["KeyState"] == "Enabled"


def test_ids_of_multi_region_keys_are_ids_of_keys_that_do_not_exist(aws: AwsTenant, kms: Any) -> None:
    ghost = "mrk-d3b95762d3b95762d3b95762d3b95762"
    arn = f"arn:aws:kms:eu-central-1:{aws.account_id}:key/{ghost}"
    with refused("NotFoundException", f"Key '{arn}' does not exist"):
        kms.describe_key(KeyId=ghost)
    with refused("NotFoundException", "Invalid keyId 'mrk-fake-key-id'"):
        kms.describe_key(KeyId="mrk-fake-key-id")


def test_an_empty_message_is_none(kms: Any, key: str) -> None:
    """As recorded from AWS: the body of such a refusal has its type and nothing else."""
    with pytest.raises(ClientError) as caught:
        kms.decrypt(KeyId=key, CiphertextBlob=b"garbage")
    assert "message" not in caught.value.response
    assert caught.value.response["Error"] == {"Message": "", "Code": "InvalidCiphertextException"}


def test_management_takes_ids_and_arns(kms: Any, key: str) -> None:
    for name in (key, key.rpartition("/")[2]):
        kms.disable_key(KeyId=name)
        kms.enable_key(KeyId=name)
        kms.tag_resource(KeyId=name, Tags=[{"TagKey": "a", "TagValue": "b"}])
        kms.update_key_description(KeyId=name, Description="changed")
        assert kms.schedule_key_deletion(KeyId=name)["KeyId"] == key
        assert kms.cancel_key_deletion(KeyId=name)["KeyId"] == key
        kms.enable_key(KeyId=name)


# ── aliases ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_alias_is_pointed_at_another_key(aws: AwsTenant, kms: Any, key: str) -> None:
    other = aws.customer.create_key()
    kms.create_alias(AliasName="alias/current", TargetKeyId=key)
    sealed = kms.encrypt(KeyId="alias/current", Plaintext=b"x")["CiphertextBlob"]
    kms.update_alias(AliasName="alias/current", TargetKeyId=other.rpartition("/")[2])
    assert kms.describe_key(KeyId="alias/current")["KeyMetadata"]["Arn"] == other
    # The old blob opens by itself, and not under the alias's new key.
    assert kms.decrypt(CiphertextBlob=sealed)["KeyId"] == key
    with refused("IncorrectKeyException"):
        kms.decrypt(CiphertextBlob=sealed, KeyId="alias/current")
    (listed,) = kms.list_aliases(KeyId=other)["Aliases"]
    assert listed["AliasArn"] == _alias_arn(key, "alias/current")
    assert listed["LastUpdatedDate"] > listed["CreationDate"]
    assert kms.list_aliases(KeyId=key)["Aliases"] == []


def test_refusals_of_aliases(aws: AwsTenant, kms: Any, key: str) -> None:
    with refused("NotFoundException", f"Alias {_alias_arn(key, 'alias/none')} is not found."):
        kms.update_alias(AliasName="alias/none", TargetKeyId=key)
    kms.create_alias(AliasName="alias/a", TargetKeyId=key)
    doomed = aws.customer.create_key()
    kms.schedule_key_deletion(KeyId=doomed)
    with refused("KMSInvalidStateException", f"{doomed} is pending deletion."):
        kms.update_alias(AliasName="alias/a", TargetKeyId=doomed)
    for name, code, message in (
        ("noprefix", "ValidationException", None),
        ("alias/a:b", "ValidationException", "alias/a:b contains invalid characters for an alias"),
        (
            "alias/a b",
            "ValidationException",
            "1 validation error detected: Value 'alias/a b' at 'aliasName' failed to satisfy constraint: "
            "Member must satisfy regular expression pattern: ^[a-zA-Z0-9:/_-]+$",
        ),
        ("alias/aws/ebs", "NotAuthorizedException", ""),
        ("alias/a", "AlreadyExistsException", f"An alias with the name {_alias_arn(key, 'alias/a')} already exists"),
    ):
        with refused(code, message):
            kms.create_alias(AliasName=name, TargetKeyId=key)
    with refused("ValidationException", "Aliases must refer to keys. Not aliases"):
        kms.create_alias(AliasName="alias/b", TargetKeyId="alias/a")


def test_a_key_has_at_most_50_aliases(kms: Any, key: str) -> None:
    for number in range(50):
        kms.create_alias(AliasName=f"alias/{number}", TargetKeyId=key)
    with refused("LimitExceededException"):
        kms.create_alias(AliasName="alias/one-more", TargetKeyId=key)


# ── tags and descriptions ──────────────────────────────────────────────────────────────────────────────────────────


def _tags(kms: Any, key: str) -> dict[str, str]:
    pages = kms.get_paginator("list_resource_tags").paginate(KeyId=key, PaginationConfig={"PageSize": 2})
    return {tag["TagKey"]: tag["TagValue"] for page in pages for tag in page["Tags"]}


def test_tags(kms: Any) -> None:
    key = kms.create_key(Tags=[{"TagKey": "team", "TagValue": "a"}])["KeyMetadata"]["KeyId"]
    assert _tags(kms, key) == {"team": "a"}
    more = [{"TagKey": name, "TagValue": f"v-{name}"} for name in ("team", "x", "y", "z")]
    kms.tag_resource(KeyId=key, Tags=more)
    assert _tags(kms, key) == {"team": "v-team", "x": "v-x", "y": "v-y", "z": "v-z"}
    kms.untag_resource(KeyId=key, TagKeys=["x", "never there"])
    assert _tags(kms, key) == {"team": "v-team", "y": "v-y", "z": "v-z"}
    with refused("TagException", "Tags beginning with aws: are reserved"):
        kms.tag_resource(KeyId=key, Tags=[{"TagKey": "AWS:x", "TagValue": ""}])
    with refused("TagException"):
        kms.tag_resource(KeyId=key, Tags=[{"TagKey": "d", "TagValue": "1"}, {"TagKey": "d", "TagValue": "2"}])
    with refused("TagException"):
        kms.tag_resource(KeyId=key, Tags=[{"TagKey": f"t{n}", "TagValue": ""} for n in range(50)])
    with refused("TagException"):
        kms.create_key(Tags=[{"TagKey": "aws:x", "TagValue": ""}])
    kms.schedule_key_deletion(KeyId=key)
    changes: tuple[Callable[[], object], ...] = (
        lambda: kms.tag_resource(KeyId=key, Tags=more),
        lambda: kms.untag_resource(KeyId=key, TagKeys=["y"]),
        lambda: kms.update_key_description(KeyId=key, Description="x"),
    )
    for change in changes:
        with refused("KMSInvalidStateException"):
            change()
    assert len(_tags(kms, key)) == 3


def test_policies_can_test_tags_and_aliases(aws: AwsTenant, kms: Any, key: str) -> None:
    cases: tuple[tuple[dict[str, Any], Callable[[], object]], ...] = (
        (
            {"StringEquals": {"aws:ResourceTag/use": "vendor"}},
            lambda: kms.tag_resource(KeyId=key, Tags=[{"TagKey": "use", "TagValue": "vendor"}]),
        ),
        (
            {"ForAnyValue:StringEquals": {"kms:ResourceAliases": "alias/vendor"}},
            lambda: kms.create_alias(AliasName="alias/vendor", TargetKeyId=key),
        ),
    )
    for condition, change in cases:
        document = json.loads(kms.get_key_policy(KeyId=key)["Policy"])
        allowed = {"Effect": "Allow", "Principal": {"AWS": aws.role_arn}, "Action": "kms:Encrypt", "Resource": "*"}
        root = [s for s in document["Statement"] if s["Principal"] != {"AWS": aws.role_arn}]
        aws.customer.put_policy(key, document | {"Statement": [*root, allowed | {"Condition": condition}]})
        vendor = aws.role_client()
        with refused("AccessDeniedException"):
            vendor.encrypt(KeyId=key, Plaintext=b"x")
        change()
        vendor.encrypt(KeyId=key, Plaintext=b"x")


def test_description(kms: Any, key: str) -> None:
    kms.update_key_description(KeyId=key, Description="")
    assert kms.describe_key(KeyId=key)["KeyMetadata"]["Description"] == ""
    kms.update_key_description(KeyId=key, Description="d" * 8192)
    assert kms.describe_key(KeyId=key)["KeyMetadata"]["Description"] == "d" * 8192
    with refused("ValidationException"):
        kms.update_key_description(KeyId=key, Description="d" * 8193)


# ── listings and the rest ──────────────────────────────────────────────────────────────────────────────────────────


def test_pages_of_every_listing(aws: AwsTenant, kms: Any, key: str) -> None:
    aws.customer.create_key()
    for name in ("alias/a", "alias/b"):
        kms.create_alias(AliasName=name, TargetKeyId=key)
    kms.tag_resource(KeyId=key, Tags=[{"TagKey": name, "TagValue": ""} for name in "ab"])
    for _ in range(2):
        kms.rotate_key_on_demand(KeyId=key)
        kms.create_grant(KeyId=key, GranteePrincipal=aws.role_arn, Operations=["Decrypt"])
    for listing, members, request in (
        (kms.list_keys, "Keys", {}),
        (kms.list_aliases, "Aliases", {}),
        (kms.list_resource_tags, "Tags", {"KeyId": key}),
        (kms.list_key_rotations, "Rotations", {"KeyId": key}),
        (kms.list_grants, "Grants", {"KeyId": key}),
    ):
        whole = listing(**request)
        assert (len(whole[members]), whole["Truncated"], "NextMarker" in whole) == (2, False, False)
        first = listing(Limit=1, **request)
        assert (len(first[members]), first["Truncated"]) == (1, True)
        second = listing(Limit=1, Marker=first["NextMarker"], **request)
        assert (second["Truncated"], first[members] + second[members]) == (False, whole[members])
        with refused("InvalidMarkerException"):
            listing(Marker="nonsense", **request)
        with refused("ValidationException"):
            listing(Limit=1001, **request)
    with refused("InvalidMarkerException"):
        kms.list_aliases(Marker=kms.list_keys(Limit=1)["NextMarker"])
    policies = kms.list_key_policies(KeyId=key)
    assert (policies["PolicyNames"], policies["Truncated"]) == (["default"], False)


def test_last_usage_is_what_the_log_says(kms: Any, key: str) -> None:
    assert kms.get_key_last_usage(KeyId=key)["KeyLastUsage"] == {}
    used = kms.encrypt(KeyId=key, Plaintext=b"x")
    with pytest.raises(ClientError):
        kms.decrypt(KeyId=key, CiphertextBlob=b"garbage")
    usage = kms.get_key_last_usage(KeyId=key)["KeyLastUsage"]
    assert (usage["Operation"], usage["KmsRequestId"]) == ("Encrypt", used["ResponseMetadata"]["RequestId"])


@pytest.mark.parametrize("spec", ["RSA_2048", "ECC_NIST_P256", "ECC_NIST_P521", "ECC_SECG_P256K1"])
def test_data_key_pairs(kms: Any, key: str, spec: str) -> None:
    request = {"KeyId": key, "KeyPairSpec": spec, "EncryptionContext": {"tenant": "t1"}}
    pair = kms.generate_data_key_pair(**request)
    assert (pair["KeyId"], pair["KeyPairSpec"]) == (key, spec)
    blind = kms.generate_data_key_pair_without_plaintext(**request)
    assert "PrivateKeyPlaintext" not in blind
    for made in (pair, blind):
        sealed = made["PrivateKeyCiphertextBlob"]
        private = kms.decrypt(CiphertextBlob=sealed, EncryptionContext={"tenant": "t1"})["Plaintext"]
        own_public = load_der_private_key(private, None).public_key()
        assert own_public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == made["PublicKey"]
        assert made.get("PrivateKeyPlaintext", private) == private
        with refused("InvalidCiphertextException"):
            kms.decrypt(CiphertextBlob=sealed)
    with refused("DryRunOperationException"):
        kms.generate_data_key_pair(DryRun=True, **request)
    with refused("UnsupportedOperationException"):
        kms.generate_data_key_pair(KeyId=key, KeyPairSpec="SM2")


def test_a_dry_run_without_a_ciphertext(kms: Any, key: str) -> None:
    dry = {"DryRun": True, "DryRunModifiers": ["IGNORE_CIPHERTEXT"]}
    with refused("DryRunOperationException"):
        kms.decrypt(KeyId=key, **dry)
    with refused("DryRunOperationException"):
        kms.re_encrypt(SourceKeyId=key, DestinationKeyId=key, **dry)
    with refused("ValidationException"):
        kms.decrypt(KeyId=key, DryRunModifiers=["IGNORE_CIPHERTEXT"])
    kms.disable_key(KeyId=key)
    with refused("DisabledException"):
        kms.decrypt(KeyId=key, **dry)


def test_who_am_i(aws: AwsTenant) -> None:
    for credentials, arn in (
        (aws.names.customer, aws.names.customer.arn),
        (
            aws.assume_role()["Credentials"],
            f"arn:aws:sts::{aws.account_id}:assumed-role/{aws.role_name}/test",
        ),
    ):
        identity = aws.client("sts", credentials).get_caller_identity()
        assert (identity["Account"], identity["Arn"]) == (aws.account_id, arn)


# ── a second opinion ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def moto(s3_server: S3Server) -> Iterator[Any]:
    if s3_server.pid is None:
        pytest.skip("KEYLAKE_TEST_S3_ENDPOINT is not moto")
    session = boto3.session.Session("test", "test", region_name="eu-central-1")
    client = session.client("kms", endpoint_url=s3_server.endpoint)
    yield client
    client.close()


@pytest.fixture(params=["kms", "moto"])
def either(request: pytest.FixtureRequest) -> Any:
    """Both must say the same of what moto is right about: crypto, context, names, sizes, records. Not of states and
    rights, which moto does not enforce."""
    return request.getfixturevalue(request.param)


def test_opinions_on_crypto(either: Any) -> None:
    key = either.create_key()["KeyMetadata"]["Arn"]
    context = {"tenant": "t1"}
    sealed = either.encrypt(KeyId=key, Plaintext=b"secret", EncryptionContext=context)
    assert sealed["KeyId"] == key
    opened = either.decrypt(CiphertextBlob=sealed["CiphertextBlob"], EncryptionContext=context)
    assert (opened["Plaintext"], opened["KeyId"]) == (b"secret", key)
    damaged = bytearray(sealed["CiphertextBlob"])
    damaged[-1] ^= 1
    for blob, wrong in ((sealed["CiphertextBlob"], {}), (sealed["CiphertextBlob"], {"a": "b"}), (damaged, context)):
        with refused("InvalidCiphertextException", ""):
            either.decrypt(CiphertextBlob=bytes(blob), EncryptionContext=wrong)
    data_key = either.generate_data_key(KeyId=key, KeySpec="AES_128", EncryptionContext=context)
    assert len(data_key["Plaintext"]) == 16
    opened = either.decrypt(CiphertextBlob=data_key["CiphertextBlob"], EncryptionContext=context)
    assert opened["Plaintext"] == data_key["Plaintext"]
    other = either.create_key()["KeyMetadata"]["Arn"]
    moved = either.re_encrypt(
        CiphertextBlob=sealed["CiphertextBlob"], SourceEncryptionContext=context, DestinationKeyId=other
    )
    assert (moved["SourceKeyId"], moved["KeyId"]) == (key, other)
    assert either.decrypt(CiphertextBlob=moved["CiphertextBlob"])["Plaintext"] == b"secret"


def test_opinions_on_requests(either: Any) -> None:
    key = either.create_key()["KeyMetadata"]["Arn"]
    constraint = "failed to satisfy constraint: Member must"
    with refused(
        "ValidationException",
        f"1 validation error detected: Value at 'plaintext' {constraint} have length less than or equal to 4096",
    ):
        either.encrypt(KeyId=key, Plaintext=bytes(4097))
    with refused(
        "ValidationException",
        f"1 validation error detected: Value 'AES_512' at 'keySpec' {constraint} satisfy enum value set: "
        "[AES_256, AES_128]",
    ):
        either.generate_data_key(KeyId=key, KeySpec="AES_512")
    for sizes in ({}, {"KeySpec": "AES_256", "NumberOfBytes": 32}):
        with refused("ValidationException", "Please specify either number of bytes or key spec."):
            either.generate_data_key(KeyId=key, **sizes)
    with refused("NotFoundException"):
        either.describe_key(KeyId="11111111-2222-3333-4444-555555555555")
    with refused("ValidationException", "alias/a:b contains invalid characters for an alias"):
        either.create_alias(AliasName="alias/a:b", TargetKeyId=key)
    with refused(
        "ValidationException",
        f"1 validation error detected: Value 'alias/a b' at 'aliasName' {constraint} "
        "satisfy regular expression pattern: ^[a-zA-Z0-9:/_-]+$",
    ):
        either.create_alias(AliasName="alias/a b", TargetKeyId=key)
    with refused("NotAuthorizedException"):
        either.create_alias(AliasName="alias/aws/s3", TargetKeyId=key)
    with refused("NotFoundException", "No such policy exists"):
        either.get_key_policy(KeyId=key, PolicyName="other")


def test_opinions_on_records(either: Any) -> None:
    metadata = either.create_key(Description="d", Tags=[{"TagKey": "a", "TagValue": "1"}])["KeyMetadata"]
    key = metadata["KeyId"]
    described = either.describe_key(KeyId=metadata["Arn"])["KeyMetadata"]
    for member in ("Arn", "KeyId", "Description", "KeyState", "KeySpec", "Origin", "KeyManager"):
        assert described[member] == metadata[member]
    assert (described["KeyState"], described["KeySpec"]) == ("Enabled", "SYMMETRIC_DEFAULT")
    name = f"alias/opinion-{key}"
    either.create_alias(AliasName=name, TargetKeyId=key)
    assert [alias["AliasName"] for alias in either.list_aliases(KeyId=key)["Aliases"]] == [name]
    assert either.describe_key(KeyId=name)["KeyMetadata"]["KeyId"] == key
    with refused("AlreadyExistsException"):
        either.create_alias(AliasName=name, TargetKeyId=key)
    either.tag_resource(KeyId=key, Tags=[{"TagKey": "b", "TagValue": "2"}])
    either.untag_resource(KeyId=key, TagKeys=["a"])
    assert either.list_resource_tags(KeyId=key)["Tags"] == [{"TagKey": "b", "TagValue": "2"}]
    either.update_key_description(KeyId=key, Description="other")
    assert either.describe_key(KeyId=key)["KeyMetadata"]["Description"] == "other"
    assert either.list_key_policies(KeyId=key)["PolicyNames"] == ["default"]
    either.enable_key_rotation(KeyId=key)
    assert either.get_key_rotation_status(KeyId=key)["KeyRotationEnabled"] is True
    either.disable_key_rotation(KeyId=key)
    assert either.get_key_rotation_status(KeyId=key)["KeyRotationEnabled"] is False
    either.delete_alias(AliasName=name)
    assert either.list_aliases(KeyId=key)["Aliases"] == []
