"""The errors that Keylake raises.

    KeylakeError
    ├── InvalidInputError        the caller's fault: malformed or out of range; nothing was changed
    │   └── NotFoundError        ... names something that does not exist
    ├── ConflictError            the caller's fault: not in this state
    ├── UnauthenticatedError     no token, an expired one, or not for us
    ├── PermissionDeniedError    a good token without the scope
    ├── UnavailableError         the environment: may be retried
    │   ├── NotLeaderError       ... another keymanager leads: nothing was done, ask that one
    │   └── OverloadedError      ... too much at once: nothing was done, come back later
    ├── IntegrityError           a tag, checksum or commitment did not verify: never retried, never data
    │   └── CorruptedError       ... a format could not be parsed at all
    └── KeyAccessError           the key says no, and so do we
        ├── LeaseExpiredError    no live lease here (partition, pause, keymanager down)
        ├── SuspendedError       KMS unreachable longer than the grace
        ├── RevokedError         KMS denied; comes back when it allows again
        └── ShreddedError        our KEKs are destroyed; never comes back

Every class says two things: may the same call be retried (`retryable`), and how the error looks over HTTP
(`http_status`, `code`) and to a Postgres client (`sqlstate`). `str(error)` must never hold key bytes, user data or
server paths: it reaches clients. SQLSTATEs of class `KL` are ours; the rest are Postgres's (appendix A of its manual).
"""

from __future__ import annotations

from typing import ClassVar

from shared.ids import WorkspaceId


class KeylakeError(Exception):
    """Root of all errors that are raised on purpose."""

    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    sqlstate: ClassVar[str] = "XX000"


class InvalidInputError(KeylakeError):
    http_status = 400
    code = "invalid_input"
    sqlstate = "08P01"


class NotFoundError(InvalidInputError):
    http_status = 404
    code = "not_found"
    sqlstate = "08004"


class ConflictError(KeylakeError):
    http_status = 409
    code = "conflict"
    sqlstate = "55000"


class UnauthenticatedError(KeylakeError):
    http_status = 401
    code = "unauthenticated"
    sqlstate = "28000"


class PermissionDeniedError(KeylakeError):
    http_status = 403
    code = "permission_denied"
    sqlstate = "42501"


class UnavailableError(KeylakeError):
    retryable = True
    http_status = 503
    code = "unavailable"
    sqlstate = "57P03"


class NotLeaderError(UnavailableError):
    code = "not_leader"


class OverloadedError(UnavailableError):
    code = "overloaded"
    sqlstate = "53000"


class IntegrityError(KeylakeError):
    http_status = 500
    code = "integrity"
    sqlstate = "XX001"


class CorruptedError(IntegrityError):
    code = "corrupted"


class KeyAccessError(KeylakeError):
    http_status = 403
    code = "key_access"
    sqlstate = "KL000"
    hint: ClassVar[str] = ""
    """What whoever wanted the data can do."""

    def __init__(self, message: str = "", workspace_id: WorkspaceId | None = None) -> None:
        """`workspace_id`: whose key it is, where that is known."""
        super().__init__(message)
        self.workspace_id = workspace_id


class LeaseExpiredError(KeyAccessError):
    retryable = True
    http_status = 503
    code = "lease_expired"
    sqlstate = "KL001"
    hint = "The key service cannot be reached from here. Reconnect in a few seconds."


class SuspendedError(KeyAccessError):
    retryable = True
    http_status = 503
    code = "key_suspended"
    sqlstate = "KL002"
    hint = "The customer's KMS cannot be reached. Reconnect when it answers: no committed data is lost."


class RevokedError(KeyAccessError):
    http_status = 403
    code = "key_revoked"
    sqlstate = "KL003"
    hint = "Allow the key in the customer's KMS again and reconnect: no committed data is lost."


class ShreddedError(KeyAccessError):
    http_status = 410
    code = "key_shredded"
    sqlstate = "KL004"
    hint = "The project's keys were destroyed. Its data can never be read again, by anybody."


def _all_subclasses(cls: type[KeylakeError]) -> list[type[KeylakeError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _all_subclasses(sub))]


ERRORS_BY_CODE: dict[str, type[KeylakeError]] = {cls.code: cls for cls in _all_subclasses(KeylakeError)}
"""Wire code → class: how a client turns a peer's error answer back into the exception."""
