"""Validation against the service's model: every violation is found and worded as AWS words it."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from customercloud.aws.errors import AwsError
from customercloud.aws.service import service_model
from customercloud.faults import Service

KEY = "1234abcd-12ab-34cd-56ef-1234567890ab"
FAILED = "failed to satisfy constraint:"
KMS = service_model(Service.KMS)


def refusal(operation: str, **members: Any) -> AwsError:
    with pytest.raises(AwsError) as caught:
        KMS.validate(operation, members)
    return caught.value


@pytest.mark.parametrize(
    ("operation", "members", "sentence"),
    [
        ("DescribeKey", {}, f"Value null at 'keyId' {FAILED} Member must not be null"),
        (
            "DescribeKey",
            {"KeyId": ""},
            f"Value '' at 'keyId' {FAILED} Member must have length greater than or equal to 1",
        ),
        (
            "GenerateDataKey",
            {"KeyId": KEY, "KeySpec": "AES_512"},
            f"Value 'AES_512' at 'keySpec' {FAILED} Member must satisfy enum value set: [AES_256, AES_128]",
        ),
        (
            "GenerateRandom",
            {"NumberOfBytes": 0},
            f"Value '0' at 'numberOfBytes' {FAILED} Member must have value greater than or equal to 1",
        ),
        (
            "CreateAlias",
            {"AliasName": "alias/a b", "TargetKeyId": KEY},
            f"Value 'alias/a b' at 'aliasName' {FAILED} "
            "Member must satisfy regular expression pattern: ^[a-zA-Z0-9:/_-]+$",
        ),
        (
            "Encrypt",
            {"KeyId": KEY, "Plaintext": base64.b64encode(bytes(4097)).decode()},
            f"Value at 'plaintext' {FAILED} Member must have length less than or equal to 4096",
        ),
        (
            "TagResource",
            {"KeyId": KEY, "Tags": [{"TagKey": "a", "TagValue": "b"}, {"TagKey": "k" * 129, "TagValue": ""}]},
            f"Value '{'k' * 129}' at 'tags.2.member.tagKey' {FAILED} Member must have length less than or equal to 128",
        ),
        (
            "CreateGrant",
            {"KeyId": KEY, "Operations": ["Decrypt", "Destroy"]},
            f"Value '[Decrypt, Destroy]' at 'operations' {FAILED} "
            "Member must satisfy constraint: [Member must satisfy enum value set: [",
        ),
        (
            "Decrypt",
            {"GrantTokens": ["t"] * 11},
            f"Value '[{', '.join(['t'] * 11)}]' at 'grantTokens' {FAILED} "
            "Member must have length less than or equal to 10",
        ),
    ],
)
def test_one_violation(operation: str, members: dict[str, Any], sentence: str) -> None:
    error = refusal(operation, **members)
    assert error.code == "ValidationException"
    assert error.message.startswith(f"1 validation error detected: {sentence}")


def test_all_violations_are_said_at_once() -> None:
    error = refusal("GenerateDataKey", KeySpec="x", NumberOfBytes=1025)
    assert error.message.startswith("3 validation errors detected: ")
    for where in ("'keyId'", "'keySpec'", "'numberOfBytes'"):
        assert where in error.message
    assert error.message.count("; ") == 2


def test_no_secret_is_shown() -> None:
    assert "AAAA" not in refusal("Encrypt", KeyId=KEY, Plaintext="A" * 8000).message


@pytest.mark.parametrize(
    ("operation", "members"),
    [
        ("DescribeKey", {"KeyId": 1}),
        ("Encrypt", {"KeyId": KEY, "Plaintext": "not base64!"}),
        ("Encrypt", {"KeyId": KEY, "Plaintext": "AA==", "EncryptionContext": {"a": 1}}),
        ("Encrypt", {"KeyId": KEY, "Plaintext": "AA==", "EncryptionContext": []}),
        ("GenerateRandom", {"NumberOfBytes": True}),
        ("TagResource", {"KeyId": KEY, "Tags": ["a"]}),
        ("CreateGrant", {"KeyId": KEY, "Operations": [1]}),
        ("Decrypt", {"DryRun": 1}),
    ],
)
def test_wrong_types(operation: str, members: dict[str, Any]) -> None:
    assert refusal(operation, **members).code == "SerializationException"


def test_members_that_the_model_does_not_know_are_ignored() -> None:
    KMS.validate("DescribeKey", {"KeyId": KEY, "Invented": 1})


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@given(st.data())
def test_any_members_are_valid_or_refused_as_aws_refuses(data: st.DataObject) -> None:
    operation = data.draw(st.sampled_from(sorted(KMS.operations)))
    shapes = KMS.members_of(operation)
    members = data.draw(st.dictionaries(st.sampled_from(shapes) if shapes else st.text(), JSON_VALUES))
    code = None
    try:
        KMS.validate(operation, members)
    except AwsError as error:
        code = error.code
    assert code in (None, "ValidationException", "SerializationException")
