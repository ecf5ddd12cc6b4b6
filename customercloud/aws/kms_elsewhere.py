"""What AWS KMS has and this simulator does not, refused as AWS refuses it for keys and accounts that have none of it.

Asymmetric and HMAC keys: every key here is symmetric, so their operations are InvalidKeyUsageException on it.
Multi-Region keys: UnsupportedOperationException on a key of another kind. Custom key stores: there are none.
"""

from __future__ import annotations

from typing import Any, Final

from customercloud.aws.access import KeyAccess
from customercloud.aws.cloudtrail import Call
from customercloud.aws.errors import AwsError, unsupported
from customercloud.aws.kms import Operation
from customercloud.aws.kms_steps import KeySteps
from customercloud.aws.params import Params

_OTHER_USAGE: Final = ("Sign", "Verify", "GenerateMac", "VerifyMac", "DeriveSharedSecret", "Encapsulate", "Decapsulate")
_MULTI_REGION: Final = ("ReplicateKey", "UpdatePrimaryRegion")
_KEY_STORES: Final = (
    "ConnectCustomKeyStore", "DeleteCustomKeyStore", "DisconnectCustomKeyStore", "UpdateCustomKeyStore",
)  # fmt: skip


_TESTED: Final = (
    "SigningAlgorithm", "MessageType", "MacAlgorithm", "KeyAgreementAlgorithm", "ReplicaRegion", "PrimaryRegion",
)  # fmt: skip
"""Members that policies can test."""


def _conditions(params: Params) -> dict[str, tuple[str, ...]]:
    given = {name: params.members.get(name) for name in _TESTED}
    return {f"kms:{name.lower()}": (str(value),) for name, value in given.items() if value is not None}


class KmsElsewhere:
    """The caller is authorised first: who may not use a key does not learn what kind it is."""

    def __init__(self, access: KeyAccess, steps: KeySteps) -> None:
        self._access = access
        self._steps = steps

    @property
    def operations(self) -> dict[str, Operation]:
        return {
            **dict.fromkeys(_OTHER_USAGE, self.other_usage),
            **dict.fromkeys(_MULTI_REGION, self.multi_region),
            **dict.fromkeys(_KEY_STORES, self.key_store),
            "GetPublicKey": self.public_key,
            "CreateCustomKeyStore": self.create_key_store,
            "DescribeCustomKeyStores": self.key_stores,
        }

    def other_usage(self, call: Call, params: Params) -> dict[str, Any]:
        key = self._steps.key(call, params, read_only=True, alias=True, conditions=_conditions(params))
        raise AwsError(
            "InvalidKeyUsageException",
            f"{key.arn} key usage is ENCRYPT_DECRYPT which is not valid for {call.action}.",
        )

    def multi_region(self, call: Call, params: Params) -> dict[str, Any]:
        key = self._steps.key(call, params, conditions=_conditions(params))
        raise unsupported(f"{key.arn} is not a multi-region primary key.")

    def public_key(self, call: Call, params: Params) -> dict[str, Any]:
        key = self._steps.key(call, params, read_only=True, alias=True, conditions=_conditions(params))
        raise unsupported(f"{key.arn} key spec is SYMMETRIC_DEFAULT which is not valid for GetPublicKey.")

    def create_key_store(self, call: Call, params: Params) -> dict[str, Any]:
        call.audit.read_only = False
        self._access.authorize_account(call)
        raise unsupported("custom key stores do not exist here")

    def key_store(self, call: Call, params: Params) -> dict[str, Any]:
        call.audit.read_only = False
        self._access.authorize_account(call)
        store = params.string("CustomKeyStoreId", 1, 64)
        raise AwsError("CustomKeyStoreNotFoundException", f"Custom key store {store} does not exist")

    def key_stores(self, call: Call, params: Params) -> dict[str, Any]:
        self._access.authorize_account(call)
        if params.has("CustomKeyStoreId") or params.has("CustomKeyStoreName"):
            raise AwsError("CustomKeyStoreNotFoundException", "The custom key store does not exist")
        return {"CustomKeyStores": [], "Truncated": False}
