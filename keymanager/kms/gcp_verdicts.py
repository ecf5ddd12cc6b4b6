"""What an error answer of Cloud KMS or of the IAM Credentials API means. Pure.

Judged by the JSON body's `status` and details and not by the SDK's exception: over REST a disabled key and a damaged
ciphertext are both `BadRequest`. Codes: google.rpc.Code, google.rpc.error_details, and answers that public reports
show. Whatever is not recognised is AMBIGUOUS.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from keymanager.kms.base import Classification, DenialReason, Verdict

GENERATE_ACCESS_TOKEN: Final = "GenerateAccessToken"  # noqa: S105 - the name of a call
OWN_TOKEN: Final = "OwnToken"  # noqa: S105 - the name of a call
DECRYPT: Final = "Decrypt"
UNAUTHENTICATED: Final = "UNAUTHENTICATED"
CREDENTIALS_ENDED: Final = frozenset({UNAUTHENTICATED})
"""Answers that speak of the token and not of the key: a new one may do."""

_MAX_BODY_SIZE_BYTES: Final = 64 * 1024
_MAX_DETAILS: Final = 32
_IAM_DENIED: Final = "IAM_PERMISSION_DENIED"
_STATE: Final = re.compile(r"current state is: ([A-Z_]{1,40})")
_STATES: Final = {
    "DISABLED": DenialReason.DISABLED,
    "DESTROYED": DenialReason.NOT_FOUND,
    "DESTROY_SCHEDULED": DenialReason.PENDING_DELETION,
}
_UNREACHABLE: Final = frozenset({"UNAVAILABLE", "INTERNAL", "DEADLINE_EXCEEDED", "UNKNOWN", "CANCELLED"})


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """`{"error": {"status", "message", "details"}}`."""

    http_status: int
    status: str
    """Name of a google.rpc.Code."""
    message: str = ""
    reasons: frozenset[str] = frozenset()
    """`reason` of every ErrorInfo."""
    violations: frozenset[str] = frozenset()
    """`type` of every violated precondition."""


def parse_error(http_status: int, body: bytes) -> ErrorAnswer | None:
    """None for what is no answer of a Google API: a gateway's page, a proxy's."""
    if len(body) > _MAX_BODY_SIZE_BYTES:
        return None
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    error = content.get("error") if isinstance(content, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("status"), str):
        return None
    details = [d for d in _list(error.get("details")) if isinstance(d, dict)]
    violations = [v for d in details for v in _list(d.get("violations")) if isinstance(v, dict)]
    return ErrorAnswer(
        http_status,
        error["status"],
        _text(error.get("message")),
        frozenset(_text(d["reason"]) for d in details if "reason" in d),
        frozenset(_text(v["type"]) for v in violations if "type" in v),
    )


def _list(value: Any) -> list[Any]:
    return value[:_MAX_DETAILS] if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def classify(operation: str, answer: ErrorAnswer) -> Classification:
    """The verdict on an error answer. `operation` is the API's name, e.g. `Decrypt`.

    A 5xx is never a denial, whatever its body says: it may come from something in between.
    """
    if answer.http_status >= 500 or answer.status in _UNREACHABLE:
        return Classification(Verdict.UNREACHABLE)
    if answer.status == "RESOURCE_EXHAUSTED" or answer.http_status == 429:
        return Classification(Verdict.THROTTLED)
    if operation == GENERATE_ACCESS_TOKEN:
        return _classify_impersonation(answer)
    match answer.status:
        case "FAILED_PRECONDITION":
            reason = _state_reason(answer)
            return Classification(Verdict.AMBIGUOUS) if reason is None else Classification(Verdict.DENIED, reason)
        case "PERMISSION_DENIED" if _is_iam_denial(answer, "cloudkms."):
            return Classification(Verdict.DENIED, DenialReason.ACCESS_DENIED)
        case "NOT_FOUND" if not answer.message.startswith("The request concerns location"):
            # The exception is a request that was sent to the wrong place: it says nothing of the key.
            return Classification(Verdict.DENIED, DenialReason.NOT_FOUND)
        case "INVALID_ARGUMENT" if operation == DECRYPT and not answer.message.startswith("The checksum in field"):
            # The exception is a request that was damaged on its way: the blob itself may be good.
            return Classification(Verdict.CORRUPT)
        case _:
            return Classification(Verdict.AMBIGUOUS)


def _classify_impersonation(answer: ErrorAnswer) -> Classification:
    """The right to impersonate lies in the policy of the customer's account: its withdrawal is the customer's no, and
    so is the account's deletion."""
    denied = answer.status == "PERMISSION_DENIED" and _is_iam_denial(answer, "iam.serviceAccounts.")
    if denied or answer.status == "NOT_FOUND":
        return Classification(Verdict.DENIED, DenialReason.PRINCIPAL_DENIED)
    return Classification(Verdict.AMBIGUOUS)


def _is_iam_denial(answer: ErrorAnswer, permissions: str) -> bool:
    """Told from the other things that are answered PERMISSION_DENIED: an API that is not enabled, billing, a token of
    too narrow a scope, a network perimeter."""
    if answer.reasons:
        return _IAM_DENIED in answer.reasons
    return answer.message.startswith(f"Permission '{permissions}")


def _state_reason(answer: ErrorAnswer) -> DenialReason | None:
    """From the violated precondition (`KEY_DISABLED`), else from the sentence."""
    states = sorted(v.removeprefix("KEY_") for v in answer.violations if v.startswith("KEY_"))
    if not states and (match := _STATE.search(answer.message)):
        states = [match.group(1)]
    if not states:
        return None
    return next((_STATES[state] for state in states if state in _STATES), DenialReason.INVALID_STATE)
