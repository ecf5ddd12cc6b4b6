"""Keys whose material the customer brings: parameters for an import, the import, and its end.

The material goes from the customer's hardware to KMS wrapped under an RSA key of KMS's that is good for a day. Deleting
it is the fastest way to take a key away: it takes no waiting period, and the customer can bring it back.
"""

from __future__ import annotations

import base64
import datetime as dt
import os
from typing import Any, Final

from cryptography.hazmat.primitives import keywrap
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA1, SHA256, HashAlgorithm
from cryptography.hazmat.primitives.serialization import load_der_private_key

from customercloud.aws.cloudtrail import Call
from customercloud.aws.errors import AwsError, not_found, unsupported, validation_error
from customercloud.aws.key_pairs import new_key_pair
from customercloud.aws.keys import ImportParameters, Key, KeyOrigin
from customercloud.aws.kms import Operation
from customercloud.aws.kms_steps import KeySteps
from customercloud.aws.params import MAX_CIPHERTEXT_SIZE_BYTES, Params

_VALID_FOR: Final = dt.timedelta(hours=24)
_LONGEST_LIFE: Final = dt.timedelta(days=365)
_MATERIAL_SIZE_BYTES: Final = 32
_TOKEN_SIZE_BYTES: Final = 256
_EXPIRES, _STAYS = "KEY_MATERIAL_EXPIRES", "KEY_MATERIAL_DOES_NOT_EXPIRE"
_OAEP: Final[dict[str, HashAlgorithm]] = {
    "RSAES_OAEP_SHA_1": SHA1(),  # noqa: S303 - the algorithm is defined with it
    "RSAES_OAEP_SHA_256": SHA256(),
    "RSA_AES_KEY_WRAP_SHA_1": SHA1(),  # noqa: S303
    "RSA_AES_KEY_WRAP_SHA_256": SHA256(),
}
_TESTED: Final = ("WrappingAlgorithm", "WrappingKeySpec", "ExpirationModel", "ValidTo")
"""Members that policies can test."""


class KmsImport:
    def __init__(self, steps: KeySteps) -> None:
        self._steps = steps

    @property
    def operations(self) -> dict[str, Operation]:
        return {
            "GetParametersForImport": self.get_parameters,
            "ImportKeyMaterial": self.import_material,
            "DeleteImportedKeyMaterial": self.delete_material,
        }

    def get_parameters(self, call: Call, params: Params) -> dict[str, Any]:
        algorithm, spec = params.string("WrappingAlgorithm"), params.string("WrappingKeySpec")
        key = self._key(call, params, {"wrappingAlgorithm": algorithm, "wrappingKeySpec": spec}, read_only=True)
        if algorithm not in _OAEP or not spec.startswith("RSA_"):
            raise unsupported(f"{algorithm} with {spec} is not supported for this key.")
        private, public = new_key_pair(spec)
        token, valid_to = os.urandom(_TOKEN_SIZE_BYTES), call.now + _VALID_FOR
        parameters = ImportParameters.model_construct(
            token_hex=token.hex(), private_key=private, algorithm=algorithm, valid_to=valid_to
        )
        self._steps.keep(key.offering(parameters, call.now))
        return {
            "KeyId": key.arn,
            "ImportToken": base64.b64encode(token).decode("ascii"),
            "PublicKey": base64.b64encode(public).decode("ascii"),
            "ParametersValidTo": valid_to.timestamp(),
        }

    def import_material(self, call: Call, params: Params) -> dict[str, Any]:
        model = params.choice("ExpirationModel", (_EXPIRES, _STAYS)) or _EXPIRES
        expires_at = _expiry(params)
        logged: dict[str, Any] = {"expirationModel": model}
        logged |= {} if expires_at is None else {"validTo": expires_at.isoformat()}
        key = self._key(call, params, logged)
        if model == _EXPIRES and expires_at is None:
            raise validation_error("A validTo date must be set if the ExpirationModel is KEY_MATERIAL_EXPIRES")
        if model == _STAYS and expires_at is not None:
            raise validation_error(
                "A validTo date must not be set if the ExpirationModel is KEY_MATERIAL_DOES_NOT_EXPIRE"
            )
        if expires_at is not None and not call.now < expires_at <= call.now + _LONGEST_LIFE:
            raise validation_error("The validTo date must be in the future, and at most 365 days from now")
        if params.optional_string("ImportType") == "NEW_KEY_MATERIAL" and key.imported is not None:
            raise unsupported("a key here has one imported material: there is no rotation to another one")
        parameters = _parameters(key, params.blob("ImportToken", MAX_CIPHERTEXT_SIZE_BYTES), call.now)
        secret = _unwrap(parameters, params.blob("EncryptedKeyMaterial", MAX_CIPHERTEXT_SIZE_BYTES))
        if len(secret) != _MATERIAL_SIZE_BYTES:
            raise AwsError("IncorrectKeyMaterialException", f"The key material must have {_MATERIAL_SIZE_BYTES} bytes.")
        key = key.with_material(secret, expires_at, call.now, self._steps.delay())
        self._steps.change(call, key)
        return {"KeyId": key.arn, "KeyMaterialId": key.current_material_id}

    def delete_material(self, call: Call, params: Params) -> dict[str, Any]:
        """Of a key that has none, too."""
        key = self._key(call, params)
        asked, own = params.optional_string("KeyMaterialId"), key.imported and key.imported.material_id
        if asked not in (None, own):
            raise not_found(f"Key material {asked} does not exist in {key.arn}")
        if key.materials:
            key = key.without_material()
        self._steps.change(call, key)
        return {"KeyId": key.arn} | ({"KeyMaterialId": own} if own else {})

    def _key(self, call: Call, params: Params, logged: dict[str, Any] | None = None, *, read_only: bool = False) -> Key:
        given = {name: params.members.get(name) for name in _TESTED}
        tested = {f"kms:{name.lower()}": (str(value),) for name, value in given.items() if value is not None}
        key = self._steps.key(call, params, logged, read_only=read_only, conditions=tested)
        key.require_origin(KeyOrigin.EXTERNAL)
        key.refuse_pending_deletion()
        return key


def _expiry(params: Params) -> dt.datetime | None:
    seconds = params.timestamp("ValidTo")
    return None if seconds is None else dt.datetime.fromtimestamp(seconds, dt.UTC)


def _parameters(key: Key, token: bytes, now: dt.datetime) -> ImportParameters:
    found = next((each for each in key.import_parameters if each.token_hex == token.hex()), None)
    if found is None:
        raise AwsError("InvalidImportTokenException", "The import token is invalid, or of another key.")
    if now >= found.valid_to:
        raise AwsError("ExpiredImportTokenException", "The import token has expired: get new parameters for import.")
    return found


def _unwrap(parameters: ImportParameters, wrapped: bytes) -> bytes:
    """Raises InvalidCiphertextException."""
    private = load_der_private_key(parameters.private_key, password=None, unsafe_skip_rsa_key_validation=True)
    assert isinstance(private, rsa.RSAPrivateKey)  # noqa: S101 - `get_parameters` makes no others
    size = private.key_size // 8
    hashed = _OAEP[parameters.algorithm]
    try:
        opened = private.decrypt(wrapped[:size], padding.OAEP(padding.MGF1(hashed), hashed, None))
        if parameters.algorithm.startswith("RSA_AES"):
            # PKCS #11's CKM_RSA_AES_KEY_WRAP: an AES key under RSA, and the material under it (RFC 5649).
            return keywrap.aes_key_unwrap_with_padding(opened, wrapped[size:])
        if len(wrapped) != size:
            raise ValueError
    except (ValueError, keywrap.InvalidUnwrap):
        raise AwsError("InvalidCiphertextException") from None
    return opened
