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
_BLAMED_POLICY: Final = re.compile(r" (?:because no|in an?|in the) ([\w -]{1,40}? (?:policy|boundary))\b")
"""As in "because no session policy allows …" and "with an explicit deny in a session policy"."""
_CUSTOMERS_POLICIES: Final = frozenset({"resource-based policy", "role trust policy", "resource control policy"})
"""Of the role, or of its account's organization."""

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

    AWS names the kind of policy that refuses when it is the caller's own (its identity's or session's, its permissions
    boundary, its organization's), and often says nothing across accounts. Kinds that we do not know are not the
    customer's word either.
    """
    blamed = _BLAMED_POLICY.search(message)
    if code in ("AccessDenied", "AccessDeniedException") and (blamed is None or blamed[1] in _CUSTOMERS_POLICIES):
        return Classification(Verdict.DENIED, DenialReason.PRINCIPAL_DENIED)
    return Classification(Verdict.AMBIGUOUS)
