"""Which key each cloud's event is about, in the shapes that the clouds' own documentation shows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from keymanager.kms_events import MAX_EVENT_SIZE_BYTES, Handshake, KmsEvent, names_of, parse
from shared.api.keymanager import AzureKey, GoogleKey
from shared.cmk import CmkKey
from shared.errors import InvalidInputError
from tests.fixtures.cloud_events import (
    ARN,
    AWS,
    AZURE,
    GOOGLE,
    ID,
    OPENBAO,
    RING,
    by_arn,
    cloud_event,
    cloudtrail,
    deletion,
    entry,
    grid,
    push,
    record,
)

OTHERS: tuple[CmkKey, ...] = (
    AWS.model_copy(update={"key_arn": ARN[:-1] + "0"}),
    AWS.model_copy(update={"key_arn": ARN.replace("us-west-2", "us-west-1")}),
    AWS.model_copy(update={"key_arn": ARN.replace("1111", "9999")}),
    AZURE.model_copy(update={"key_name": "cmk-2"}),
    AZURE.model_copy(update={"vault_url": "https://sample-kv2.vault.azure.net"}),
    GOOGLE.model_copy(update={"key_name": f"{RING}/cryptoKeys/cmk2"}),
    GOOGLE.model_copy(update={"key_name": f"{RING}2/cryptoKeys/cmk"}),
    OPENBAO,
)


def events(value: Any) -> list[KmsEvent]:
    found = parse(json.dumps(value).encode())
    assert isinstance(found, list)
    return found


def about(value: Any, key: CmkKey) -> bool:
    return any(event.names & names_of(key) for event in events(value))


@pytest.mark.parametrize(
    ("event", "key", "kind"),
    [
        (cloudtrail(), AWS, "aws DisableKey"),
        (cloudtrail(requestParameters={"keyId": ARN}), AWS, "aws DisableKey"),
        (cloudtrail(requestParameters={"keyId": "alias/main"}, resources=by_arn(ARN)), AWS, "aws DisableKey"),
        (cloudtrail(requestParameters=None, responseElements={"keyId": ARN}), AWS, "aws DisableKey"),
        (cloudtrail(requestParameters={"aliasName": "alias/main", "targetKeyId": ID}), AWS, "aws DisableKey"),
        (cloudtrail(requestParameters=None, eventName="DeleteKey", serviceEventDetails={"keyId": ID}), AWS,
         "aws DeleteKey"),
        (deletion(), AWS, "aws KMS CMK Deletion"),
        ([grid()], AZURE, "azure Microsoft.KeyVault.KeyExpired"),
        (grid(), AZURE, "azure Microsoft.KeyVault.KeyExpired"),
        ([cloud_event()], AZURE, "azure Microsoft.KeyVault.KeyExpired"),
        ([grid("Microsoft.KeyVault.SecretExpired", ObjectType="Secret"), grid(VaultName="SAMPLE-KV")], AZURE,
         "azure Microsoft.KeyVault.SecretExpired"),
        (record("KeyUpdate"), AZURE, "azure KeyUpdate"),
        (push(entry()), GOOGLE, "google UpdateCryptoKeyVersion"),
        (push(entry(methodName="SetIamPolicy", resourceName=f"{RING}/cryptoKeys/cmk")), GOOGLE, "google SetIamPolicy"),
    ],
)  # fmt: skip
def test_a_documented_event_names_its_key_and_no_other(event: Any, key: CmkKey, kind: str) -> None:
    assert events(event)[0].kind == kind
    assert about(event, key)
    assert not any(about(event, other) for other in OTHERS)


@pytest.mark.parametrize(
    ("event", "place"),
    [
        ([grid("Microsoft.KeyVault.VaultAccessPolicyChanged", ObjectType="", ObjectName="")], AZURE),
        (record("VaultPatch"), AZURE),
        (push(entry(methodName="SetIamPolicy", resourceName=RING)), GOOGLE),
    ],
)
def test_an_event_of_a_whole_place_names_every_key_in_it(event: Any, place: AzureKey | GoogleKey) -> None:
    there = place.model_copy(update={"key_name": place.key_name + "2"})
    assert about(event, place)
    assert about(event, there)
    assert not about(event, AWS)


@pytest.mark.parametrize(
    "event",
    [
        cloudtrail(eventName="Decrypt", readOnly=True, resources=by_arn(ARN)),
        cloudtrail(errorCode="AccessDenied"),
        cloudtrail() | {"source": "aws.s3"},
        cloudtrail(requestParameters={"keyId": f"{ID}/../x"}),
        cloudtrail(requestParameters={"keyId": [ID]}, resources=[None, {"ARN": 5}, {"ARN": ARN + "\n"}]),
        cloudtrail() | {"account": "1111222233334"},
        cloudtrail() | {"detail": None},
        [grid("Microsoft.KeyVault.SecretExpired", ObjectType="Secret")],
        [grid("Microsoft.Storage.BlobCreated")],
        [grid(VaultName="sample-kv/x")],
        record("KeyUnwrap"),
        record("KeyUpdate", category="SignInLogs"),
        record("KeyUpdate", properties={"id": "https://sample-kv.vault.azure.net/secrets/cmk"}),
        push(entry(serviceName="storage.googleapis.com")),
        push(entry(status={"code": 7, "message": "denied"})),
        push(entry() | {"logName": "projects/customer-1/logs/cloudaudit.googleapis.com%2Fdata_access"}),
        push({}),
    ],
)
def test_uses_failures_and_what_is_about_no_key_name_nothing(event: Any) -> None:
    """Our own probe is a use: if it were an event for us, it would be followed by another one, for ever."""
    assert [found.names for found in events(event)] == [frozenset()]


def test_event_grid_is_told_that_it_is_welcome() -> None:
    code = "512d38b6-c7b8-40c8-89fe-f46f9e9622b6"
    shaken = grid("Microsoft.EventGrid.SubscriptionValidationEvent") | {"data": {"validationCode": code}}
    assert parse(json.dumps([shaken]).encode()) == Handshake(code)
    for bad in ("", "a b", "x" * 513, 5, None):
        with pytest.raises(InvalidInputError):
            events([shaken | {"data": {"validationCode": bad}}])


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"null", b"5", b'"x"', b"[]", b"{}", b"[1]", b"\xff", b"[" * 100_000, b'{"detail-type": NaN}'),
        *(b'{"message": {}}', b'{"message": {"data": "!"}}', b'{"message": {"data": "W10="}}', b'{"message": null}'),
        *(b'{"records": []}', b'{"records": {}}', b'{"records": [1]}', b'[{"eventType": ""}]', b'[{"eventType": 1}]'),
        b'{"specversion": "1.0"}',
        b" " * (MAX_EVENT_SIZE_BYTES + 1),
    ],
)
def test_what_is_no_event_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidInputError):
        parse(body)


def test_a_kind_is_a_line_of_ascii() -> None:
    [event] = events(cloudtrail(eventName="é\n" + "x" * 1000))
    assert event.kind == "aws ??" + "x" * 98
