"""What an error answer of AWS KMS or STS means. Pure tables.

Codes: the error shapes of botocore's KMS and STS models, and "Common errors" of their API references. Whatever is not
in a table is AMBIGUOUS.
"""

from __future__ import annotations

import re
from typing import Final

from keymanager.kms.base import Classification, DenialReason, Verdict

ASSUME_ROLE: Final = "AssumeRole"
_MISSING: Final = re.compile(r"is not authorized to perform: (kms:[A-Za-z]{1,64})\b")

_DENIED: Final = {
    "DisabledException": DenialReason.DISABLED,
    "NotFoundException": DenialReason.NOT_FOUND,
    "AccessDeniedException": DenialReason.ACCESS_DENIED,
    "AccessDenied": DenialReason.ACCESS_DENIED,
}
_CORRUPT: Final = frozenset({"InvalidCiphertextException", "IncorrectKeyException"})
_THROTTLED: Final = frozenset(
    {
        "ThrottlingException",
        "Throttling",
        "ThrottledException",
        "RequestThrottled",
        "RequestThrottledException",
        "RequestLimitExceeded",
        "TooManyRequestsException",
        "BandwidthLimitExceeded",
        "SlowDown",
    }
)
_UNREACHABLE: Final = frozenset(
    {
        "KMSInternalException",
        "KeyUnavailableException",
        "DependencyTimeoutException",
        "InternalFailure",
        "InternalError",
        "InternalServerError",
        "ServiceUnavailable",
        "ServiceUnavailableException",
        "RequestTimeout",
        "RequestTimeoutException",
        "IDPCommunicationError",
    }
)
CREDENTIALS_ENDED: Final = frozenset(
    {"ExpiredTokenException", "ExpiredToken", "UnrecognizedClientException", "InvalidClientTokenId"}
)
"""Answers that speak of the session and not of the key: a new session may do."""


def classify(operation: str, code: str, http_status: int, message: str = "") -> Classification:
    """The verdict on an error answer. `operation` is the API's name, e.g. `Decrypt`.

    A 5xx is never a denial, whatever its body says: it may come from something in between.
    """
    if http_status >= 500 or code in _UNREACHABLE:
        return Classification(Verdict.UNREACHABLE)
    if code in _THROTTLED or http_status == 429:
        return Classification(Verdict.THROTTLED)
    if operation == ASSUME_ROLE:
        return _classify_assume_role(code, message)
    if code == "KMSInvalidStateException":
        pending = "pending deletion" in message.lower()
        return Classification(Verdict.DENIED, DenialReason.PENDING_DELETION if pending else DenialReason.INVALID_STATE)
    if code in _DENIED:
        return Classification(Verdict.DENIED, _DENIED[code])
    if code in _CORRUPT:
        return Classification(Verdict.CORRUPT)
    return Classification(Verdict.AMBIGUOUS)


def missing_permission(message: str) -> str | None:
    """The action that a refusal names: of one ReEncrypt it may be either of two."""
    found = _MISSING.search(message)
    return None if found is None else found[1]


def _classify_assume_role(code: str, message: str) -> Classification:
    """Withdrawing trust from the role is a way to revoke. That *our* identity may not assume roles is not.

    Across accounts AWS gives a reason only for the caller's own side: "identity-based policy".
    """
    if code in ("AccessDenied", "AccessDeniedException") and "identity-based policy" not in message:
        return Classification(Verdict.DENIED, DenialReason.PRINCIPAL_DENIED)
    return Classification(Verdict.AMBIGUOUS)
