"""What a KMS's refusal means, in words for the person who can do something about it. A core.

Which permission is missing is told by the refusal itself, or else by the operation that was refused; its name is the
provider's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, assert_never

from keymanager.kms.base import DenialReason, KmsError
from shared.api.keymanager import AwsKey, AzureKey, CmkKey, GoogleKey, OpenBaoKey

_STATES: Final[Mapping[DenialReason, str]] = {
    DenialReason.DISABLED: "the key is disabled: enable it",
    DenialReason.PENDING_DELETION: "the key is waiting for its deletion: cancel that and enable the key",
    DenialReason.INVALID_STATE: "the key is in a state that allows no use",
}
_AWS_PERMISSIONS: Final[Mapping[str, str]] = {"ReEncrypt": "kms:ReEncryptFrom and kms:ReEncryptTo"}
_GOOGLE_PERMISSIONS: Final[Mapping[str, str]] = {
    "Encrypt": "cloudkms.cryptoKeyVersions.useToEncrypt",
    "Decrypt": "cloudkms.cryptoKeyVersions.useToDecrypt",
    "GetCryptoKey": "cloudkms.cryptoKeys.get",
    "ListCryptoKeyVersions": "cloudkms.cryptoKeyVersions.list",
}
_AZURE_PERMISSIONS: Final[Mapping[str, tuple[str, str]]] = {
    "WrapKey": ("wrapKey", "keys/wrap/action"),
    "UnwrapKey": ("unwrapKey", "keys/unwrap/action"),
    "GetKey": ("get", "keys/read"),
    "GetDeletedKey": ("get", "keys/read"),
}
"""Operation → the access policy's word, the data action of RBAC."""
_OPENBAO_PATHS: Final[Mapping[str, tuple[str, str]]] = {
    "GenerateDataKey": ("update", "datakey/plaintext"),
    "Encrypt": ("update", "encrypt"),
    "Decrypt": ("update", "decrypt"),
    "DecryptWithoutContext": ("update", "decrypt"),
    "ReadKey": ("read", "keys"),
}


def explain(error: KmsError, key: CmkKey) -> str:
    """One line: what was refused, and what to change. Names no secret."""
    if error.reason is None:
        return f"the KMS gave no usable answer ({error.operation}: {error.verdict}, {error.provider_code})"
    if error.reason is DenialReason.ACCESS_DENIED:
        to_do = f"{key.principal} may not use the key: allow it {_permission(error, key)}"
    elif error.reason is DenialReason.PRINCIPAL_DENIED:
        to_do = _principal(key)
    elif error.reason is DenialReason.NOT_FOUND:
        to_do = f"there is no key {key.identifier}, or not any more"
    else:
        to_do = _STATES[error.reason]
    return f"the KMS refuses ({error.operation}: {error.provider_code}); {to_do}"


def _permission(error: KmsError, key: CmkKey) -> str:
    """Its name, and in parentheses where it is given."""
    operation = error.operation
    match key:
        case AwsKey():
            permission = error.permission or _AWS_PERMISSIONS.get(operation, f"kms:{operation}")
            return f"{permission} (in the key's policy or in the role's)"
        case AzureKey():
            word, action = _AZURE_PERMISSIONS.get(operation, (operation, operation))
            return f"{word} (RBAC: Microsoft.KeyVault/vaults/{action}, in Key Vault Crypto Service Encryption User)"
        case GoogleKey():
            permission = _GOOGLE_PERMISSIONS.get(operation, operation)
            return f"{permission} (roles/cloudkms.cryptoKeyEncrypterDecrypter and roles/cloudkms.viewer)"
        case OpenBaoKey():
            capability, path = _OPENBAO_PATHS.get(operation, ("update", operation))
            return f"{capability} on {key.mount}/{path}/{key.key_name} (in the role's policy)"
        case _:
            assert_never(key)


def _principal(key: CmkKey) -> str:
    match key:
        case AwsKey():
            return "the role cannot be assumed: its trust policy must allow us, with the external id"
        case AzureKey():
            return f"application {key.client_id} is not in tenant {key.tenant_id}, or is disabled there: consent to it"
        case GoogleKey():
            return (
                f"{key.service_account} cannot be impersonated: grant our own service account "
                "roles/iam.serviceAccountTokenCreator on it"
            )
        case OpenBaoKey():
            return "we cannot log in with the AppRole: it, its secret id or its token was withdrawn"
        case _:
            assert_never(key)
