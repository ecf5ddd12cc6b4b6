"""What an error answer of Azure Key Vault or Entra ID means. Pure tables.

Codes: Key Vault's REST error codes and recorded answers of the service; the AADSTS list of the Microsoft identity
platform. Whatever is not in a table is AMBIGUOUS.

Of Key Vault's many 403s only those deny that speak of the key or of our rights to it. `ForbiddenByFirewall` and
`ForbiddenByConnection` speak of where we come from: a changed address of ours would look the same, so they do not
revoke; the grace runs.

Of Entra's refusals only those deny in which the customer's own directory says that the principal is gone or switched
off. A wrong or expired secret (7000215, 7000222) is *not* the customer's no: the secret belongs to our application's
registration in our own tenant, the customer cannot change it, and one forgotten renewal of ours would revoke every
customer at once. Likewise an unknown tenant (90002: also what a wrong authority answers) and an untrusted assertion.
They are AMBIGUOUS: nothing is revoked, the grace runs, a human looks.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from keymanager.kms.base import Classification, DenialReason, Verdict

GET_TOKEN: Final = "GetToken"  # noqa: S105 - the name of an operation
UNWRAP_KEY: Final = "UnwrapKey"

_DENIED: Final = {
    "KeyDisabled": DenialReason.DISABLED,
    "AccessDenied": DenialReason.ACCESS_DENIED,
    "ForbiddenByRbac": DenialReason.ACCESS_DENIED,
    "ForbiddenByPolicy": DenialReason.ACCESS_DENIED,
    "KeyExpired": DenialReason.INVALID_STATE,
    "KeyNotYetValid": DenialReason.INVALID_STATE,
    "KeyOperationForbidden": DenialReason.INVALID_STATE,
}
"""Inner codes of a 403. The fifth and sixth are by analogy with secrets; wrap only, an expired key still unwraps."""

_PRINCIPAL_DENIED: Final = frozenset(
    {
        700016,  # the directory has no service principal of ours: never let in, or removed
        7000229,  # likewise, in other words
        7000112,  # our service principal is disabled in it
    }
)
_TOKEN_THROTTLED: Final = frozenset({90055, 50196})
_TOKEN_UNREACHABLE: Final = frozenset({90033, 90006, 50002})
"""Transient faults of the service by its own word."""


def classify(operation: str, http_status: int, code: str, inner_code: str) -> Classification:
    """The verdict on an error answer of Key Vault. A 5xx is never a denial, whatever its body says."""
    if http_status >= 500 or http_status == 408:
        return Classification(Verdict.UNREACHABLE)
    if http_status == 429 or code == "Throttled":
        return Classification(Verdict.THROTTLED)
    if http_status == 403 and inner_code in _DENIED:
        return Classification(Verdict.DENIED, _DENIED[inner_code])
    if (http_status, code) == (404, "KeyNotFound"):
        return Classification(Verdict.DENIED, DenialReason.NOT_FOUND)
    if (http_status, code, operation) == (400, "BadParameter", UNWRAP_KEY):
        return Classification(Verdict.CORRUPT)
    return Classification(Verdict.AMBIGUOUS)


def classify_token(http_status: int, aadsts_codes: Collection[int]) -> Classification:
    """The verdict on an error answer of the token endpoint."""
    if http_status >= 500 or http_status == 408 or not _TOKEN_UNREACHABLE.isdisjoint(aadsts_codes):
        return Classification(Verdict.UNREACHABLE)
    if http_status == 429 or not _TOKEN_THROTTLED.isdisjoint(aadsts_codes):
        return Classification(Verdict.THROTTLED)
    if not _PRINCIPAL_DENIED.isdisjoint(aadsts_codes):
        return Classification(Verdict.DENIED, DenialReason.PRINCIPAL_DENIED)
    return Classification(Verdict.AMBIGUOUS)
