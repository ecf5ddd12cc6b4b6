"""Cryptographic methods of Cloud KMS. They change nothing.

Every method checks in the same order: name, authorisation, parameters and checksums, existence, state, and only then
crypto; so a caller without rights learns nothing about the key.
"""

from __future__ import annotations

import os
from typing import Any, Final, NoReturn

import google_crc32c
from google.cloud import kms_v1

from customercloud.google.access import Access
from customercloud.google.blob import CiphertextBlob, open_blob, seal, wrong_key
from customercloud.google.call import Api, Call, LogType, Operation, operation
from customercloud.google.errors import failed_precondition, invalid_argument
from customercloud.google.keys import Key, ProtectionLevel, Version
from customercloud.google.messages import protection_level
from customercloud.google.names import KeyName, LocationName, VersionName, parse_key_or_version

MAX_SIZE_BYTES: Final = 64 * 1024
"""Of plaintext and of AAD, each."""
MAX_HSM_SIZE_BYTES: Final = 8 * 1024
"""Of both together for a key of protection level HSM."""
_MIN_RANDOM_BYTES, _MAX_RANDOM_BYTES = 8, 1024
_ENCRYPT: Final = "cloudkms.cryptoKeyVersions.useToEncrypt"
_DECRYPT: Final = "cloudkms.cryptoKeyVersions.useToDecrypt"

_OTHER_PURPOSES: Final[tuple[tuple[str, type[Any], str, str], ...]] = (
    ("AsymmetricSign", kms_v1.AsymmetricSignRequest, "useToSign", "ASYMMETRIC_SIGN"),
    ("AsymmetricDecrypt", kms_v1.AsymmetricDecryptRequest, "useToDecrypt", "ASYMMETRIC_DECRYPT"),
    ("MacSign", kms_v1.MacSignRequest, "useToSign", "MAC"),
    ("MacVerify", kms_v1.MacVerifyRequest, "useToVerify", "MAC"),
    ("RawEncrypt", kms_v1.RawEncryptRequest, "useToEncrypt", "RAW_ENCRYPT_DECRYPT"),
    ("RawDecrypt", kms_v1.RawDecryptRequest, "useToDecrypt", "RAW_ENCRYPT_DECRYPT"),
    ("GetPublicKey", kms_v1.GetPublicKeyRequest, "viewPublicKey", "ASYMMETRIC_SIGN or ASYMMETRIC_DECRYPT"),
)
"""(method, its request, its permission, the purpose that it needs)."""


def crc32c(data: bytes) -> int:
    return int(google_crc32c.value(data))


class KmsCrypto:
    def __init__(self, access: Access) -> None:
        self._access = access

    @property
    def operations(self) -> list[Operation]:
        read, kms = LogType.DATA_READ, Api.KMS
        return [
            operation(kms, "Encrypt", read, kms_v1.EncryptRequest, self.encrypt),
            operation(kms, "Decrypt", read, kms_v1.DecryptRequest, self.decrypt),
            operation(kms, "GenerateRandomBytes", None, kms_v1.GenerateRandomBytesRequest, self.random_bytes),
            *(self._refusing(*method) for method in _OTHER_PURPOSES),
        ]

    def _refusing(self, name: str, request: type[Any], permission: str, purpose: str) -> Operation:
        """A method of keys that do not exist here: all of them are ENCRYPT_DECRYPT, and that is what it says."""
        permission = f"cloudkms.cryptoKeyVersions.{permission}"
        log = LogType.ADMIN_READ if name == "GetPublicKey" else LogType.DATA_READ

        def run(call: Call, message: Any) -> NoReturn:
            self._other_purpose(call, message.name, permission, purpose)

        return operation(Api.KMS, name, log, request, run)

    def encrypt(self, call: Call, request: kms_v1.EncryptRequest) -> kms_v1.EncryptResponse:
        """With the primary version, or with the version that `name` is."""
        name = call.about(parse_key_or_version(request.name))
        key_name = name.key if isinstance(name, VersionName) else name
        self._access.require(call, _ENCRYPT, key_name)
        plaintext, aad = request.plaintext, request.additional_authenticated_data
        _check_size("plaintext", plaintext)
        _check_size("additional_authenticated_data", aad)
        verified_plaintext = _verified("plaintext", plaintext, request.plaintext_crc32c)
        verified_aad = _verified("additional_authenticated_data", aad, request.additional_authenticated_data_crc32c)
        key = self._access.key(key_name)
        version_name, version = _version_to_encrypt(call, key, name)
        material = version.usable_material(version_name, call.now)
        if version.protection_level is ProtectionLevel.HSM and len(plaintext) + len(aad) > MAX_HSM_SIZE_BYTES:
            raise invalid_argument(
                "The combined length of plaintext and additional_authenticated_data must be at most "
                f"{MAX_HSM_SIZE_BYTES} bytes for this key."
            )
        ciphertext = seal(key.uid, version.number, material, plaintext, aad)
        return kms_v1.EncryptResponse(
            name=str(version_name),
            ciphertext=ciphertext,
            ciphertext_crc32c=crc32c(ciphertext),
            verified_plaintext_crc32c=verified_plaintext,
            verified_additional_authenticated_data_crc32c=verified_aad,
            protection_level=protection_level(version.protection_level),
        )

    def decrypt(self, call: Call, request: kms_v1.DecryptRequest) -> kms_v1.DecryptResponse:
        name = KeyName.parse(request.name)
        self._access.require(call, _DECRYPT, name)
        aad = request.additional_authenticated_data
        _check_size("additional_authenticated_data", aad)
        _verified("ciphertext", request.ciphertext, request.ciphertext_crc32c)
        _verified("additional_authenticated_data", aad, request.additional_authenticated_data_crc32c)
        key = self._access.key(name)
        blob = CiphertextBlob.parse(request.ciphertext)
        version = key.find(blob.version)
        if blob.key_uid != key.uid or version is None:
            raise wrong_key()
        material = version.usable_material(name.version(version.number), call.now)
        plaintext = open_blob(blob, material, aad)
        return kms_v1.DecryptResponse(
            plaintext=plaintext,
            plaintext_crc32c=crc32c(plaintext),
            used_primary=version.number == key.primary,
            protection_level=protection_level(version.protection_level),
        )

    def random_bytes(
        self, call: Call, request: kms_v1.GenerateRandomBytesRequest
    ) -> kms_v1.GenerateRandomBytesResponse:
        self._access.require(call, "cloudkms.locations.generateRandomBytes", LocationName.parse(request.location))
        if request.protection_level is not kms_v1.ProtectionLevel.HSM:
            raise invalid_argument("Protection level must be HSM.")
        if not _MIN_RANDOM_BYTES <= request.length_bytes <= _MAX_RANDOM_BYTES:
            raise invalid_argument(f"length_bytes must be between {_MIN_RANDOM_BYTES} and {_MAX_RANDOM_BYTES}.")
        data = os.urandom(request.length_bytes)
        return kms_v1.GenerateRandomBytesResponse(data=data, data_crc32c=crc32c(data))

    def _other_purpose(self, call: Call, name: str, permission: str, purpose: str) -> NoReturn:
        version_name = call.about(VersionName.parse(name))
        self._access.require(call, permission, version_name.key)
        self._access.key(version_name.key).version(version_name)
        raise invalid_argument(f"The CryptoKey.purpose must be {purpose}, but is ENCRYPT_DECRYPT.")


def _check_size(field: str, data: bytes) -> None:
    if len(data) > MAX_SIZE_BYTES:
        raise invalid_argument(f"The length of {field} must be at most {MAX_SIZE_BYTES} bytes.")


def _verified(field: str, data: bytes, checksum: int | None) -> bool:
    """Whether a checksum came and is right. Raises INVALID_ARGUMENT when it is wrong."""
    if checksum is not None and checksum != crc32c(data):
        raise invalid_argument(f"The checksum in field {field}_crc32c did not match the data in field {field}.")
    return checksum is not None


def _version_to_encrypt(call: Call, key: Key, name: KeyName | VersionName) -> tuple[VersionName, Version]:
    """The version that was asked for, or the primary that this call sees."""
    if isinstance(name, VersionName):
        return name, key.version(name)
    primary = key.find(key.primary_in_force.at(call.now))
    if primary is None:
        raise failed_precondition(f"CryptoKey {name} has no primary version.", str(name), "KEY_NO_PRIMARY_VERSION")
    return name.version(primary.number), primary
