"""Refusals as Google's APIs word them: a canonical code, a message, and details of `google.rpc`.

The same error goes over REST as `{"error": {"code", "message", "status", "details"}}` and over gRPC as a status with
`grpc-status-details-bin`.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Final

from google.protobuf import any_pb2, json_format
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

IAM_DENIED: Final = "IAM_PERMISSION_DENIED"


class Code(Enum):
    """(number of google.rpc.Code, HTTP status)."""

    INVALID_ARGUMENT = (3, 400)
    DEADLINE_EXCEEDED = (4, 504)
    NOT_FOUND = (5, 404)
    ALREADY_EXISTS = (6, 409)
    PERMISSION_DENIED = (7, 403)
    RESOURCE_EXHAUSTED = (8, 429)
    FAILED_PRECONDITION = (9, 400)
    ABORTED = (10, 409)
    UNIMPLEMENTED = (12, 501)
    INTERNAL = (13, 500)
    UNAVAILABLE = (14, 503)
    UNAUTHENTICATED = (16, 401)

    @property
    def number(self) -> int:
        return self.value[0]

    @property
    def http_status(self) -> int:
        return self.value[1]


class GoogleError(Exception):
    """One refusal. `details` are messages of google.rpc.error_details."""

    def __init__(self, code: Code, message: str, *details: Message) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.details = details

    def status(self) -> status_pb2.Status:
        status = status_pb2.Status(code=self.code.number, message=self.message)
        for detail in self.details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return status

    def body(self) -> dict[str, Any]:
        """The JSON answer."""
        error: dict[str, Any] = {
            "code": self.code.http_status,
            "message": self.message,
            "status": self.code.name,
        }
        details = json_format.MessageToDict(self.status()).get("details")
        return {"error": error | ({"details": details} if details else {})}


def error_info(reason: str, domain: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata)


def invalid_argument(message: str) -> GoogleError:
    return GoogleError(Code.INVALID_ARGUMENT, message)


def bad_request(field: str, description: str, message: str | None = None) -> GoogleError:
    """A field of the request that cannot be read or must not be there."""
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
    details = error_details_pb2.BadRequest(field_violations=[violation])
    return GoogleError(Code.INVALID_ARGUMENT, message or description, details)


def not_found(message: str) -> GoogleError:
    return GoogleError(Code.NOT_FOUND, message)


def already_exists(kind: str, name: object) -> GoogleError:
    return GoogleError(Code.ALREADY_EXISTS, f"{kind} {name} already exists.")


def failed_precondition(message: str, subject: str, violation: str) -> GoogleError:
    """`violation` is the type that clients read, e.g. `KEY_DISABLED`."""
    item = error_details_pb2.PreconditionFailure.Violation(type=violation, subject=subject)
    return GoogleError(Code.FAILED_PRECONDITION, message, error_details_pb2.PreconditionFailure(violations=[item]))


def unimplemented(message: str) -> GoogleError:
    """For what Google has and this simulator does not: refused loudly instead of half done."""
    return GoogleError(Code.UNIMPLEMENTED, message)


def permission_denied(permission: str, resource: str, domain: str) -> GoogleError:
    """Says the same whether the resource exists or not."""
    return GoogleError(
        Code.PERMISSION_DENIED,
        f"Permission '{permission}' denied on resource '{resource}' (or it may not exist).",
        error_info(IAM_DENIED, domain, permission=permission, resource=resource),
    )


def throttled(domain: str, project: str) -> GoogleError:
    return GoogleError(
        Code.RESOURCE_EXHAUSTED,
        "Quota exceeded for quota metric 'Cryptographic requests' and limit 'Cryptographic requests per minute' of "
        f"service '{domain}' for consumer 'projects/{project}'.",
        error_info(
            "RATE_LIMIT_EXCEEDED",
            "googleapis.com",
            service=domain,
            consumer=f"projects/{project}",
            quota_metric=f"{domain}/crypto_requests",
        ),
    )


def unauthenticated(reason: str, domain: str) -> GoogleError:
    return GoogleError(
        Code.UNAUTHENTICATED,
        "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other valid "
        "authentication credential. See https://developers.google.com/identity/sign-in/web/devconsole-project.",
        error_info(reason, "googleapis.com", service=domain),
    )
