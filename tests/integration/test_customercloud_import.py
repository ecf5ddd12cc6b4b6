"""Keys with the customer's own material: imported, deleted, expired, imported again. Over an unmodified boto3."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import keywrap

from tests.fixtures.aws_import import external_key, import_material, wrap
from tests.fixtures.aws_refusals import refused

if TYPE_CHECKING:
    from tests.fixtures.customercloud import AwsTenant

pytestmark = pytest.mark.integration


def metadata(kms: Any, key: str) -> dict[str, Any]:
    found: dict[str, Any] = kms.describe_key(KeyId=key)["KeyMetadata"]
    return found


def test_a_key_is_what_was_imported_and_nothing_without_it(aws: AwsTenant, kms: Any) -> None:
    key, secret = external_key(kms), os.urandom(32)
    pending = f"{key} is pending import."
    new = metadata(kms, key)
    assert (new["Origin"], new["KeyState"], new["Enabled"]) == ("EXTERNAL", "PendingImport", False)
    assert new.keys().isdisjoint({"ExpirationModel", "ValidTo", "CurrentKeyMaterialId"})
    calls: tuple[Callable[[], object], ...] = (
        lambda: kms.encrypt(KeyId=key, Plaintext=b"x"),
        lambda: kms.generate_data_key(KeyId=key, KeySpec="AES_256"),
        lambda: kms.enable_key(KeyId=key),
        lambda: kms.disable_key(KeyId=key),
    )
    for call in calls:
        with refused("KMSInvalidStateException", pending):
            call()

    imported = import_material(kms, key, secret)
    assert imported["KeyId"] == key
    there = metadata(kms, key)
    assert (there["KeyState"], there["ExpirationModel"]) == ("Enabled", "KEY_MATERIAL_DOES_NOT_EXPIRE")
    assert there["CurrentKeyMaterialId"] == imported["KeyMaterialId"]
    sealed = kms.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext={"a": "b"})["CiphertextBlob"]
    assert kms.decrypt(CiphertextBlob=sealed, EncryptionContext={"a": "b"})["Plaintext"] == b"x"

    assert kms.delete_imported_key_material(KeyId=key)["KeyMaterialId"] == imported["KeyMaterialId"]
    assert metadata(kms, key)["KeyState"] == "PendingImport"
    with refused("KMSInvalidStateException", pending):
        kms.decrypt(CiphertextBlob=sealed, EncryptionContext={"a": "b"})
    with refused("IncorrectKeyMaterialException"):
        import_material(kms, key, os.urandom(32))
    assert import_material(kms, key, secret)["KeyMaterialId"] == imported["KeyMaterialId"]
    assert kms.decrypt(CiphertextBlob=sealed, EncryptionContext={"a": "b"})["Plaintext"] == b"x"

    # A key that had none when its deletion was scheduled has none when that is cancelled.
    kms.delete_imported_key_material(KeyId=key)
    kms.schedule_key_deletion(KeyId=key)
    with refused("KMSInvalidStateException", f"{key} is pending deletion."):
        import_material(kms, key, secret)
    kms.cancel_key_deletion(KeyId=key)
    assert metadata(kms, key)["KeyState"] == "PendingImport"

    recorded = aws.customer.events()
    names = [record["eventName"] for record in recorded if "errorCode" not in record]
    assert (names.count("ImportKeyMaterial"), names.count("DeleteImportedKeyMaterial")) == (2, 2)
    assert secret.hex() not in json.dumps(list(aws.customer.events()))


def test_material_that_is_to_expire_does(aws: AwsTenant, kms: Any) -> None:
    key = external_key(kms)
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=2)
    import_material(kms, key, os.urandom(32), ValidTo=until)
    there = metadata(kms, key)
    assert (there["ExpirationModel"], there["ValidTo"]) == ("KEY_MATERIAL_EXPIRES", until)
    asked_at = datetime.now(UTC)
    while metadata(kms, key)["KeyState"] == "Enabled":
        assert asked_at < until
        asked_at = datetime.now(UTC)
    assert datetime.now(UTC) >= until
    [record] = aws.customer.events(EventName="DeleteExpiredKeyMaterial")
    assert (record["eventType"], record["resources"][0]["ARN"]) == ("AwsServiceEvent", key)


def test_every_way_to_wrap_it(kms: Any) -> None:
    for spec in ("RSA_2048", "RSA_3072"):
        key, secret, between = external_key(kms), os.urandom(32), os.urandom(32)
        given = kms.get_parameters_for_import(
            KeyId=key, WrappingAlgorithm="RSA_AES_KEY_WRAP_SHA_256", WrappingKeySpec=spec
        )
        wrapped = wrap(given["PublicKey"], between) + keywrap.aes_key_wrap_with_padding(between, secret)
        kms.import_key_material(
            KeyId=key,
            ImportToken=given["ImportToken"],
            EncryptedKeyMaterial=wrapped,
            ExpirationModel="KEY_MATERIAL_DOES_NOT_EXPIRE",
        )
        assert metadata(kms, key)["KeyState"] == "Enabled"
    with refused("UnsupportedOperationException"):
        kms.get_parameters_for_import(KeyId=key, WrappingAlgorithm="RSAES_PKCS1_V1_5", WrappingKeySpec="RSA_2048")


def test_what_is_refused(kms: Any, key: str) -> None:
    own, other = external_key(kms), external_key(kms)
    given = kms.get_parameters_for_import(KeyId=own, WrappingAlgorithm="RSAES_OAEP_SHA_256", WrappingKeySpec="RSA_2048")
    wrapped = wrap(given["PublicKey"], bytes(32))
    request = {"KeyId": own, "ImportToken": given["ImportToken"], "EncryptedKeyMaterial": wrapped}
    stays = {"ExpirationModel": "KEY_MATERIAL_DOES_NOT_EXPIRE"}
    without_date = "A validTo date must be set if the ExpirationModel is KEY_MATERIAL_EXPIRES"
    for change, code, message in (
        ({"ExpirationModel": "KEY_MATERIAL_EXPIRES"}, "ValidationException", without_date),
        ({}, "ValidationException", without_date),
        ({"ValidTo": datetime.now(UTC) - timedelta(days=1)}, "ValidationException", None),
        (stays | {"ValidTo": datetime.now(UTC) + timedelta(days=1)}, "ValidationException", None),
        (stays | {"ImportToken": b"another"}, "InvalidImportTokenException", None),
        (stays | {"KeyId": other}, "InvalidImportTokenException", None),
        (stays | {"EncryptedKeyMaterial": wrapped[:-1] + b"x"}, "InvalidCiphertextException", ""),
        (stays | {"EncryptedKeyMaterial": wrapped + b"x"}, "InvalidCiphertextException", ""),
        (
            stays | {"EncryptedKeyMaterial": wrap(given["PublicKey"], bytes(16))},
            "IncorrectKeyMaterialException",
            None,
        ),
    ):
        with refused(code, message):
            kms.import_key_material(**(request | change))
    assert metadata(kms, own)["KeyState"] == "PendingImport"
    kms.import_key_material(**(request | stays))
    with refused("UnsupportedOperationException"):
        kms.import_key_material(**(request | stays), ImportType="NEW_KEY_MATERIAL")
    made_there = f"{key} origin is AWS_KMS which is not valid for this operation."
    with refused("UnsupportedOperationException", made_there):
        kms.import_key_material(**(request | stays | {"KeyId": key}))
    with refused("UnsupportedOperationException", made_there):
        kms.delete_imported_key_material(KeyId=key)
    brought = f"{own} origin is EXTERNAL which is not valid for this operation."
    for rotation in (kms.enable_key_rotation, kms.disable_key_rotation, kms.rotate_key_on_demand):
        with refused("UnsupportedOperationException", brought):
            rotation(KeyId=own)
