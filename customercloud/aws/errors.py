"""Refusals as AWS words them: an error code, a message, an HTTP status."""

from __future__ import annotations

from typing import Final

from customercloud.faults import ErrorKind, Service

_KMS_FAULTS: Final = {
    ErrorKind.INTERNAL: ("KMSInternalException", 500),
    ErrorKind.DEPENDENCY_TIMEOUT: ("DependencyTimeoutException", 503),
    ErrorKind.KEY_UNAVAILABLE: ("KeyUnavailableException", 500),
}
_OTHER_FAULTS: Final = {
    # What every AWS service has ("Common Errors" of the API references of STS and CloudTrail).
    ErrorKind.INTERNAL: ("InternalFailure", 500),
    ErrorKind.DEPENDENCY_TIMEOUT: ("ServiceUnavailable", 503),
    ErrorKind.KEY_UNAVAILABLE: ("ServiceUnavailable", 503),
}


class AwsError(Exception):
    """An AWS error answer. `code` is what boto3 shows as `Error.Code`; the JSON services answer 400 to nearly all."""

    def __init__(self, code: str, message: str = "", http_status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.http_status = http_status


def server_error(service: Service, kind: ErrorKind = ErrorKind.INTERNAL, message: str = "") -> AwsError:
    """The service's own fault, as it says that. BAD_GATEWAY is the answer of something in front of it."""
    if kind is ErrorKind.BAD_GATEWAY:
        return AwsError("InternalFailure", message, 502)
    code, status = (_KMS_FAULTS if service is Service.KMS else _OTHER_FAULTS)[kind]
    return AwsError(code, message, status)


def throttled(service: Service) -> AwsError:
    match service:
        case Service.KMS:
            text = "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls."
            return AwsError("ThrottlingException", text)
        case Service.STS:
            return AwsError("Throttling", "Rate exceeded")
        case _:
            return AwsError("ThrottlingException", "Rate exceeded")


def validation_error(message: str) -> AwsError:
    return AwsError("ValidationException", message)


def constraint_error(value: str | None, member: str, constraint: str) -> AwsError:
    """The Coral framework's sentence. `value` is left out for blobs, as AWS does: it would be the plaintext."""
    shown = "Value" if value is None else f"Value '{value}'"
    if value == "":
        shown = "Value ''"
    return validation_error(
        f"1 validation error detected: {shown} at '{member}' failed to satisfy constraint: {constraint}"
    )


def missing_error(member: str) -> AwsError:
    return validation_error(
        f"1 validation error detected: Value null at '{member}' failed to satisfy constraint: Member must not be null"
    )


def not_found(message: str) -> AwsError:
    return AwsError("NotFoundException", message)


def access_denied(message: str) -> AwsError:
    return AwsError("AccessDeniedException", message)


def unsupported(message: str) -> AwsError:
    """For what AWS has and this simulator does not: refused loudly instead of half done."""
    return AwsError("UnsupportedOperationException", message)
