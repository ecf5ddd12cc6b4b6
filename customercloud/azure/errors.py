"""Refusals as Key Vault words them: HTTP status, code, message, inner code.

Taken from recorded answers of the real service where one was found (captures in Microsoft's own SDK repositories and
public issue threads); a wording marked [assumed] is by analogy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

RETRY_AFTER_S: Final = 1


class AzureError(Exception):
    """An answer of Key Vault that is none. `inner` is `error.innererror.code`."""

    def __init__(
        self, status: int, code: str, message: str, inner: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.inner = inner
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        error: dict[str, object] = {"code": self.code, "message": self.message}
        if self.inner is not None:
            error["innererror"] = {"code": self.inner}
        return json.dumps({"error": error}).encode()


def bad_parameter(message: str) -> AzureError:
    return AzureError(400, "BadParameter", message)


def invalid_value(name: str = "") -> AzureError:
    """The service's sentence for a member that it cannot use. It rarely says which: the two spaces are its own."""
    return bad_parameter(f"Property {name} has invalid value\r\n")


def not_exportable(*, exportable: bool, policy: bool) -> AzureError:
    """Of a request that names one of the two, or both: secure key release is for premium vaults. Recorded answers."""
    if exportable and policy:
        return bad_parameter(
            "AKV.SKR.1001: The exportable attribute is only supported with premium vaults and API version >= "
            "'7.3-preview'."
        )
    if exportable:
        return bad_parameter("AKV.SKR.1004: Exportable keys must have release policy.")
    return bad_parameter("AKV.SKR.1005: Non-exportable keys must not have release policy.")


def required(name: str) -> AzureError:
    return bad_parameter(f"Property '{name}' is required.\r\n")


def not_base64url(name: str) -> AzureError:
    return bad_parameter(f"Content of '{name}' is not base64url.\r\nProperty '{name}' is required.\r\n")


def incorrect_parameter() -> AzureError:
    """What decrypt and unwrapKey say of bytes that this key did not make."""
    return bad_parameter("The parameter is incorrect.\r\n")


def key_not_found(name_or_id: str) -> AzureError:
    return AzureError(
        404,
        "KeyNotFound",
        f"A key with (name/id) {name_or_id} was not found in this key vault. If you recently deleted this key you may "
        "be able to recover it using the correct recovery command. For help resolving this issue, please see "
        "https://go.microsoft.com/fwlink/?linkid=2125182",
    )


def deleted_key_not_found(name: str) -> AzureError:
    return AzureError(404, "KeyNotFound", f"Deleted Key not found: {name}")


def version_not_found(name: str, version: str) -> AzureError:
    return key_not_found(f"{name}/{version}")


def deleted_but_recoverable(name: str) -> AzureError:
    return AzureError(
        409,
        "Conflict",
        f"Key {name} is currently in a deleted but recoverable state, and its name cannot be reused; in this state, "
        "the key can only be recovered or purged.",
        "ObjectIsDeletedButRecoverable",
    )


def being_deleted(name: str) -> AzureError:
    """The message as Microsoft's tests of its own SDK for C++ expect it of the service; the inner code is [assumed] by
    analogy with the recorded ObjectIsBeingRecovered."""
    message = f"Key {name} is currently being deleted and cannot be re-created; retry later."
    return AzureError(409, "Conflict", message, "ObjectIsBeingDeleted")


def being_recovered(name: str) -> AzureError:
    """As recorded for a secret in terraform-provider-azurerm#12285."""
    message = f"Key {name} is currently being recovered and cannot be re-created; retry later."
    return AzureError(409, "Conflict", message, "ObjectIsBeingRecovered")


def key_type_not_supported(kty: str) -> AzureError:
    return AzureError(400, "BadParameter", f"Invalid kty value: {kty}", "KeyTypeNotSupported")


def incompatible_algorithm(kid: str, kty: str, algorithm: str) -> AzureError:
    family = "EC" if algorithm.startswith("ES") else "RSA"
    return bad_parameter(
        f"Key and signing algorithm are incompatible. Key {kid} is of type '{kty}', and algorithm '{algorithm}' can "
        f"only be used with a key of type '{family}' or '{family}-HSM'."
    )


def not_here(what: str) -> AzureError:
    """For what a real vault has and this one does not: refused loudly, with a status that SDKs do not retry."""
    return AzureError(501, "NotImplemented", f"There are no {what} in this vault.")


def key_disabled(operation: str) -> AzureError:
    message = f"Operation {operation} is not allowed on a disabled key."
    return AzureError(403, "Forbidden", message, "KeyDisabled")


def key_expired(operation: str) -> AzureError:
    """[assumed] by analogy with the recorded SecretExpired."""
    message = f"Operation {operation} is not allowed on an expired key."
    return AzureError(403, "Forbidden", message, "KeyExpired")


def key_not_yet_valid(operation: str) -> AzureError:
    """[assumed] by analogy with the recorded SecretNotYetValid."""
    message = f"Operation {operation} is not allowed on a key that is not yet valid."
    return AzureError(403, "Forbidden", message, "KeyNotYetValid")


def operation_not_permitted(operation: str) -> AzureError:
    message = f"Operation {operation} is not permitted on this key."
    return AzureError(403, "Forbidden", message, "KeyOperationForbidden")


def purge_protected() -> AzureError:
    return AzureError(403, "Forbidden", 'Operation "purge" is not enabled for this vault.', "ForbiddenByPolicy")


def throttled() -> AzureError:
    return AzureError(
        429,
        "Throttled",
        "Request was not processed because too many requests were received. Reason: VaultRequestTypeLimitReached",
        headers={"retry-after": str(RETRY_AFTER_S)},
    )


def unauthorized(message: str, challenge: str) -> AzureError:
    return AzureError(401, "Unauthorized", message, headers={"www-authenticate": challenge})
