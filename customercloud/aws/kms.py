"""Cryptographic operations of KMS.

Every operation checks in the same order: parameters, key, authorisation, key state, dry run, and only then crypto.
So a caller without rights learns nothing about the key's state, and DryRun says exactly what the call would have said.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final

from customercloud.aws.access import KeyAccess
from customercloud.aws.blob import CiphertextBlob, invalid_ciphertext, open_blob, seal
from customercloud.aws.cloudtrail import Call
from customercloud.aws.errors import AwsError, unsupported, validation_error
from customercloud.aws.key_pairs import new_key_pair
from customercloud.aws.keys import Key, KeyMaterial
from customercloud.aws.params import MAX_CIPHERTEXT_SIZE_BYTES, MAX_PLAINTEXT_SIZE_BYTES, Params
from customercloud.aws.patterns import Context

_ALGORITHM: Final = "SYMMETRIC_DEFAULT"
_ALGORITHMS: Final = ("SYMMETRIC_DEFAULT", "RSAES_OAEP_SHA_1", "RSAES_OAEP_SHA_256", "SM2PKE")
_DATA_KEY_SIZES_BYTES: Final = {"AES_256": 32, "AES_128": 16}
_MAX_RANDOM_SIZE_BYTES: Final = 1024

Operation = Callable[[Call, Params], dict[str, Any] | None]


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _ignores_ciphertext(params: Params) -> bool:
    """A dry run may ask about a named key without having anything that it encrypted."""
    if "IGNORE_CIPHERTEXT" not in params.strings("DryRunModifiers"):
        return False
    if not params.boolean("DryRun"):
        raise validation_error("DryRunModifiers can only be given with DryRun.")
    return True


def refuse_dry_run(params: Params) -> None:
    """The last step before the effect: a dry run that comes here would have succeeded."""
    if params.boolean("DryRun"):
        raise AwsError("DryRunOperationException", "The request would have succeeded, but the DryRun option is set.")


class KmsCrypto:
    """Reads keys, changes nothing. Each method is one operation; it returns the answer's members."""

    def __init__(self, access: KeyAccess) -> None:
        self._access = access

    @property
    def operations(self) -> dict[str, Operation]:
        return {
            "Encrypt": self.encrypt,
            "Decrypt": self.decrypt,
            "GenerateDataKey": self.generate_data_key,
            "GenerateDataKeyWithoutPlaintext": self.generate_data_key_without_plaintext,
            "GenerateDataKeyPair": self.generate_data_key_pair,
            "GenerateDataKeyPairWithoutPlaintext": self.generate_data_key_pair_without_plaintext,
            "ReEncrypt": self.re_encrypt,
            "GenerateRandom": self.generate_random,
        }

    def encrypt(self, call: Call, params: Params) -> dict[str, Any]:
        key_id = params.string("KeyId")
        plaintext = params.blob("Plaintext", MAX_PLAINTEXT_SIZE_BYTES)
        context = params.encryption_context()
        self._common(call, params, {"keyId": key_id, "encryptionAlgorithm": _ALGORITHM}, context)
        key = self._authorized(call, params, key_id, context)
        self._algorithm(params, "EncryptionAlgorithm")
        material = self._usable(call, key)
        refuse_dry_run(params)
        blob = seal(key.key_id, material.material_id, material.secret, plaintext, context)
        self._succeeded(call, key, material)
        return {"CiphertextBlob": _b64(blob), "KeyId": key.arn, "EncryptionAlgorithm": _ALGORITHM}

    def decrypt(self, call: Call, params: Params) -> dict[str, Any]:
        context = params.encryption_context()
        key_id = params.optional_string("KeyId")
        logged = {"encryptionAlgorithm": _ALGORITHM} | ({"keyId": key_id} if key_id is not None else {})
        self._common(call, params, logged, context)
        if key_id is not None and _ignores_ciphertext(params):
            self._usable(call, self._authorized(call, params, key_id, context))
            refuse_dry_run(params)
        data = params.blob("CiphertextBlob", MAX_CIPHERTEXT_SIZE_BYTES)
        key, blob = self._key_of_blob(call, params, data, key_id, context, "Decrypt")
        self._algorithm(params, "EncryptionAlgorithm")
        self._usable(call, key)
        material = self._sealed_under(key, blob)
        refuse_dry_run(params)
        plaintext = open_blob(blob, material.secret, context)
        self._succeeded(call, key, material)
        return {
            "KeyId": key.arn,
            "Plaintext": _b64(plaintext),
            "EncryptionAlgorithm": _ALGORITHM,
            "KeyMaterialId": material.material_id,
        }

    def generate_data_key(self, call: Call, params: Params) -> dict[str, Any]:
        answer, plaintext = self._data_key(call, params)
        return answer | {"Plaintext": _b64(plaintext)}

    def generate_data_key_without_plaintext(self, call: Call, params: Params) -> dict[str, Any]:
        answer, _ = self._data_key(call, params)
        return answer

    def _data_key(self, call: Call, params: Params) -> tuple[dict[str, Any], bytes]:
        key_id = params.string("KeyId")
        spec = params.choice("KeySpec", tuple(_DATA_KEY_SIZES_BYTES))
        size_bytes = params.integer("NumberOfBytes", 1, _MAX_RANDOM_SIZE_BYTES)
        context = params.encryption_context()
        if (spec is None) == (size_bytes is None):
            raise validation_error("Please specify either number of bytes or key spec.")
        logged: dict[str, Any] = {"keyId": key_id}
        logged |= {"keySpec": spec} if spec is not None else {"numberOfBytes": size_bytes}
        self._common(call, params, logged, context)
        key = self._authorized(call, params, key_id, context)
        material = self._usable(call, key)
        refuse_dry_run(params)
        plaintext = os.urandom(size_bytes if size_bytes is not None else _DATA_KEY_SIZES_BYTES[spec or ""])
        blob = seal(key.key_id, material.material_id, material.secret, plaintext, context)
        self._succeeded(call, key, material)
        answer = {"CiphertextBlob": _b64(blob), "KeyId": key.arn, "KeyMaterialId": material.material_id}
        return answer, plaintext

    def generate_data_key_pair(self, call: Call, params: Params) -> dict[str, Any]:
        answer, private = self._data_key_pair(call, params)
        return answer | {"PrivateKeyPlaintext": _b64(private)}

    def generate_data_key_pair_without_plaintext(self, call: Call, params: Params) -> dict[str, Any]:
        answer, _ = self._data_key_pair(call, params)
        return answer

    def _data_key_pair(self, call: Call, params: Params) -> tuple[dict[str, Any], bytes]:
        key_id, spec = params.string("KeyId"), params.string("KeyPairSpec")
        context = params.encryption_context()
        self._common(call, params, {"keyId": key_id, "keyPairSpec": spec}, context)
        key = self._authorized(call, params, key_id, context, more={"kms:datakeypairspec": (spec,)})
        material = self._usable(call, key)
        refuse_dry_run(params)
        private, public = new_key_pair(spec)
        blob = seal(key.key_id, material.material_id, material.secret, private, context)
        self._succeeded(call, key, material)
        answer = {
            "PrivateKeyCiphertextBlob": _b64(blob),
            "PublicKey": _b64(public),
            "KeyId": key.arn,
            "KeyPairSpec": spec,
            "KeyMaterialId": material.material_id,
        }
        return answer, private

    def re_encrypt(self, call: Call, params: Params) -> dict[str, Any]:
        source_id = params.optional_string("SourceKeyId")
        destination_id = params.string("DestinationKeyId")
        source_context = params.encryption_context("SourceEncryptionContext")
        destination_context = params.encryption_context("DestinationEncryptionContext")
        logged: dict[str, Any] = {
            "sourceEncryptionAlgorithm": _ALGORITHM,
            "destinationEncryptionAlgorithm": _ALGORITHM,
            "destinationKeyId": destination_id,
        }
        if source_id is not None:
            logged["sourceKeyId"] = source_id
        if source_context:
            logged["sourceEncryptionContext"] = source_context
        if destination_context:
            logged["destinationEncryptionContext"] = destination_context
        self._common(call, params, logged, {})
        if source_id is not None and _ignores_ciphertext(params):
            source = self._authorized(call, params, source_id, source_context, "ReEncryptFrom")
            destination = self._authorized(call, params, destination_id, destination_context, "ReEncryptTo")
            for key in (source, destination):
                self._usable(call, key)
            refuse_dry_run(params)
        data = params.blob("CiphertextBlob", MAX_CIPHERTEXT_SIZE_BYTES)
        source, blob = self._key_of_blob(call, params, data, source_id, source_context, "ReEncryptFrom")
        destination = self._authorized(call, params, destination_id, destination_context, "ReEncryptTo")
        self._algorithm(params, "SourceEncryptionAlgorithm")
        self._algorithm(params, "DestinationEncryptionAlgorithm")
        self._usable(call, source)
        destination_material = self._usable(call, destination)
        source_material = self._sealed_under(source, blob)
        refuse_dry_run(params)
        plaintext = open_blob(blob, source_material.secret, source_context)
        resealed = seal(
            destination.key_id,
            destination_material.material_id,
            destination_material.secret,
            plaintext,
            destination_context,
        )
        call.audit.additional_event_data = {
            "sourceKeyMaterialId": source_material.material_id,
            "destinationKeyMaterialId": destination_material.material_id,
        }
        return {
            "CiphertextBlob": _b64(resealed),
            "SourceKeyId": source.arn,
            "KeyId": destination.arn,
            "SourceEncryptionAlgorithm": _ALGORITHM,
            "DestinationEncryptionAlgorithm": _ALGORITHM,
            "SourceKeyMaterialId": source_material.material_id,
            "DestinationKeyMaterialId": destination_material.material_id,
        }

    def generate_random(self, call: Call, params: Params) -> dict[str, Any]:
        size_bytes = params.integer("NumberOfBytes", 1, _MAX_RANDOM_SIZE_BYTES)
        if params.has("CustomKeyStoreId"):
            raise unsupported("custom key stores do not exist here")
        if size_bytes is None:
            raise validation_error("NumberOfBytes is required.")
        self._common(call, params, {"numberOfBytes": size_bytes}, {})
        self._access.authorize_account(call)
        return {"Plaintext": _b64(os.urandom(size_bytes))}

    # ── steps that the operations share ────────────────────────────────────────────────────────────────────────

    def _common(self, call: Call, params: Params, logged: dict[str, Any], context: dict[str, str]) -> None:
        if context:
            logged["encryptionContext"] = context
        call.audit.request_parameters = logged
        if params.has("Recipient"):
            raise unsupported("attested enclaves (Recipient) do not exist here")

    def _authorized(
        self,
        call: Call,
        params: Params,
        key_id: str,
        context: dict[str, str],
        action: str | None = None,
        more: Context | None = None,
    ) -> Key:
        key = self._access.resolve(call, key_id)
        alias = key_id.rpartition(":")[2] if "alias/" in key_id else None
        self._authorize(call, params, key, context, action, alias, more)
        return key

    def _authorize(
        self,
        call: Call,
        params: Params,
        key: Key,
        context: dict[str, str],
        action: str | None = None,
        alias: str | None = None,
        more: Context | None = None,
    ) -> None:
        self._access.authorize(
            call,
            key,
            action=action,
            encryption_context=context,
            request_alias=alias,
            grant_tokens=params.strings("GrantTokens"),
            more={"kms:encryptionalgorithm": (_ALGORITHM,), **self._same_key(call, params, key), **(more or {})},
        )

    def _same_key(self, call: Call, params: Params, key: Key) -> Context:
        """Of ReEncrypt: whether both keys are this one. When the other cannot be told, the call fails by itself."""
        if call.action != "ReEncrypt":
            return {}
        ids = {key.key_id, *self._ids(call, params)}
        return {"kms:reencryptonsamekey": (str(len(ids) == 1).lower(),)}

    def _ids(self, call: Call, params: Params) -> Iterator[str]:
        """Of the keys that a ReEncrypt names: the destination, and the source, by itself or by the ciphertext."""
        source = params.optional_string("SourceKeyId")
        with suppress(AwsError):
            yield self._access.resolve(call, params.string("DestinationKeyId")).key_id
            if source is not None:
                yield self._access.resolve(call, source).key_id
            else:
                yield CiphertextBlob.parse(params.blob("CiphertextBlob", MAX_CIPHERTEXT_SIZE_BYTES)).key_id

    def _key_of_blob(
        self,
        call: Call,
        params: Params,
        data: bytes,
        key_id: str | None,
        context: dict[str, str],
        action: str,
    ) -> tuple[Key, CiphertextBlob]:
        """The key named by the caller must be the one that the blob names; without one, the blob decides."""
        if key_id is not None:
            key = self._authorized(call, params, key_id, context, action)
            blob = CiphertextBlob.parse(data)
            if blob.key_id != key.key_id:
                raise AwsError(
                    "IncorrectKeyException",
                    "The key ID in the request does not identify a CMK that can perform this operation.",
                )
            return key, blob
        blob = CiphertextBlob.parse(data)
        key = self._access.resolve_blob(blob.key_id)
        self._authorize(call, params, key, context, action)
        return key, blob

    @staticmethod
    def _algorithm(params: Params, member: str) -> None:
        if (algorithm := params.choice(member, _ALGORITHMS)) not in (None, _ALGORITHM):
            raise AwsError(
                "InvalidKeyUsageException",
                f"Algorithm {algorithm} is incompatible with key spec SYMMETRIC_DEFAULT.",
            )

    @staticmethod
    def _usable(call: Call, key: Key) -> KeyMaterial:
        """The material that encrypts now. Raises DisabledException or KMSInvalidStateException."""
        view = key.effective(call.now)
        key.require_enabled(view.state)
        material = key.material(view.material_id)
        if material is None:
            raise AwsError("KMSInternalException", "a key without its material", 500)
        return material

    @staticmethod
    def _sealed_under(key: Key, blob: CiphertextBlob) -> KeyMaterial:
        material = key.material(blob.material_id)
        if material is None:
            raise invalid_ciphertext()
        return material

    @staticmethod
    def _succeeded(call: Call, key: Key, material: KeyMaterial) -> None:
        """The log of a success has the key's ARN, however the caller named it, and the material that was used."""
        if call.audit.request_parameters is not None:
            call.audit.request_parameters["keyId"] = key.arn
        call.audit.additional_event_data = {"keyMaterialId": material.material_id}
