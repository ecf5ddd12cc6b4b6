"""Every code that AWS KMS and STS can answer has the verdict that was decided for it, and nothing else is a denial."""

from __future__ import annotations

import botocore.session
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keymanager.kms.aws_verdicts import ASSUME_ROLE, CREDENTIALS_ENDED, classify
from keymanager.kms.base import Classification, DenialReason, KmsError, Verdict

V, R = Verdict, DenialReason

# Decided by hand, against the descriptions in botocore's model. What is not listed must be AMBIGUOUS.
DECIDED: dict[str, tuple[Verdict, DenialReason | None]] = {
    "DisabledException": (V.DENIED, R.DISABLED),
    "NotFoundException": (V.DENIED, R.NOT_FOUND),
    "AccessDeniedException": (V.DENIED, R.ACCESS_DENIED),
    "AccessDenied": (V.DENIED, R.ACCESS_DENIED),
    "KMSInvalidStateException": (V.DENIED, R.INVALID_STATE),
    "InvalidCiphertextException": (V.CORRUPT, None),
    "IncorrectKeyException": (V.CORRUPT, None),
    "KMSInternalException": (V.UNREACHABLE, None),
    "KeyUnavailableException": (V.UNREACHABLE, None),
    "DependencyTimeoutException": (V.UNREACHABLE, None),
    "ServiceUnavailable": (V.UNREACHABLE, None),
    "InternalFailure": (V.UNREACHABLE, None),
    "ThrottlingException": (V.THROTTLED, None),
    "Throttling": (V.THROTTLED, None),
    "TooManyRequestsException": (V.THROTTLED, None),
    "RequestLimitExceeded": (V.THROTTLED, None),
}
# "Common errors" of the KMS API reference, and what an SDK or a gateway can show.
COMMON = [
    "ExpiredTokenException", "UnrecognizedClientException", "InvalidSignatureException", "IncompleteSignatureException",
    "MissingAuthenticationTokenException", "NotAuthorized", "OptInRequired", "RequestExpired", "ValidationException",
    "ValidationError", "MalformedQueryString", "SerializationException", "UnknownOperationException",
    "403", "400", "404", "SignatureDoesNotMatch", "InvalidClientTokenId", "RegionDisabledException",
    "PackedPolicyTooLarge", "",
]  # fmt: skip


def model_codes() -> list[str]:
    """Every error shape of botocore's KMS and STS models: a new one must be looked at before it is a denial."""
    session = botocore.session.get_session()
    return sorted({s.name for name in ("kms", "sts") for s in session.get_service_model(name).error_shapes})


@pytest.mark.parametrize("code", sorted({*model_codes(), *COMMON, *DECIDED}))
def test_every_code(code: str) -> None:
    verdict, reason = DECIDED.get(code, (V.AMBIGUOUS, None))
    for operation in ("Decrypt", "GenerateDataKey", "Encrypt", "ReEncrypt", "DescribeKey"):
        assert classify(operation, code, 400) == Classification(verdict, reason)


def test_pending_deletion_is_told_from_other_states() -> None:
    arn = "arn:aws:kms:eu-central-1:111122223333:key/k"
    answer = classify("Decrypt", "KMSInvalidStateException", 400, f"{arn} is pending deletion.")
    assert answer == Classification(V.DENIED, R.PENDING_DELETION)
    for message in (f"{arn} is pending import.", f"{arn} is unavailable.", ""):
        assert classify("Decrypt", "KMSInvalidStateException", 400, message).reason is R.INVALID_STATE


@pytest.mark.parametrize("code", sorted({*model_codes(), *COMMON, *DECIDED}))
@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_server_error_is_never_a_denial(code: str, status: int) -> None:
    for operation in ("Decrypt", ASSUME_ROLE):
        assert classify(operation, code, status).verdict is V.UNREACHABLE


def test_429_is_throttling_whatever_the_code() -> None:
    assert classify("Decrypt", "AccessDeniedException", 429).verdict is V.THROTTLED


def test_assuming_the_role_denied_by_the_customer_and_by_ourselves() -> None:
    prefix = "User: arn:aws:iam::444455556666:user/keylake is not authorized to perform: sts:AssumeRole on resource: r"
    for message in (
        prefix,
        f"{prefix} with an explicit deny in a resource-based policy",
        f"{prefix} because no resource-based policy allows the sts:AssumeRole action",
        f"{prefix} because no role trust policy allows the sts:AssumeRole action",
        f"{prefix} with an explicit deny in a resource control policy",
        f"{prefix}-in-a-session-policy",  # the role's name
        "",
    ):
        assert classify(ASSUME_ROLE, "AccessDenied", 403, message) == Classification(V.DENIED, R.PRINCIPAL_DENIED)
    for message in (
        f"{prefix} because no identity-based policy allows the sts:AssumeRole action",
        f"{prefix} with an explicit deny in an identity-based policy",
        f"{prefix} because no session policy allows the sts:AssumeRole action",
        f"{prefix} with an explicit deny in a session policy: arn:aws:iam::444455556666:policy/p",
        f"{prefix} because no permissions boundary allows the sts:AssumeRole action",
        f"{prefix} with an explicit deny in a permissions boundary",
        f"{prefix} because no service control policy allows the sts:AssumeRole action",
        f"{prefix} with an explicit deny in a service control policy",
        f"{prefix} because no VPC endpoint policy allows the sts:AssumeRole action",
        f"{prefix} with an explicit deny in a new kind of policy",
    ):
        assert classify(ASSUME_ROLE, "AccessDenied", 403, message).verdict is V.AMBIGUOUS


@pytest.mark.parametrize("code", sorted({*CREDENTIALS_ENDED, *COMMON, *model_codes()} - {"AccessDenied"}))
def test_nothing_else_about_assuming_the_role_is_a_denial(code: str) -> None:
    verdict = classify(ASSUME_ROLE, code, 403).verdict
    assert verdict in (V.AMBIGUOUS, V.UNREACHABLE)


@given(st.text(max_size=30), st.integers(0, 599), st.text(max_size=30))
def test_an_unknown_code_never_denies(code: str, status: int, message: str) -> None:
    if code not in DECIDED:
        assert classify("Decrypt", code, status, message).verdict in (V.AMBIGUOUS, V.UNREACHABLE, V.THROTTLED)


def test_a_denial_has_a_reason_and_nothing_else_has() -> None:
    for verdict in Verdict:
        if verdict is not V.DENIED:
            Classification(verdict)
            with pytest.raises(ValueError, match="reason"):
                Classification(verdict, R.DISABLED)
    with pytest.raises(ValueError, match="reason"):
        Classification(V.DENIED)


def test_the_error_says_what_the_audit_chain_needs() -> None:
    error = KmsError(
        Classification(V.DENIED, R.DISABLED), operation="Decrypt", provider_code="DisabledException", request_id="r-1"
    )
    assert str(error) == "Decrypt: denied (disabled), DisabledException"
    assert (error.verdict, error.reason, error.request_id) == (V.DENIED, R.DISABLED, "r-1")
