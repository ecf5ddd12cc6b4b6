"""What a customer's own log says of the uses of its key, in a form that is the same for every kind of KMS.

Whoever reads such a log gets values from JSON that nobody has checked: the helpers here take them apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from shared.errors import InvalidInputError

_TIME: Final = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?(?:Z|\+00:00)", re.ASCII
)


class MalformedLogError(InvalidInputError):
    """A file that is not the log of a cloud, or not in the form that its vendor's tools write."""

    code = "malformed_cloud_log"


@dataclass(frozen=True, slots=True)
class LoggedCall:
    """One record of the customer's log."""

    at: datetime
    operation: str
    """As our adapter for this cloud names it; the cloud's own name where our adapter has none."""
    key: str | None
    """As `CustomerKey.identifier` has it; None when the record names no key."""
    principal: str
    """As `CustomerKey.principal` has it, when it is one of ours."""
    request_id: str | None
    outcome: str
    """ "ok", or the cloud's code."""
    uses_key: bool
    """Encrypts or decrypts with it."""
    is_key_call: bool = True
    """False: signing in, or a request from before that; stands in some logs and not in others."""


Recorded = Callable[[str], tuple[str, str] | None]
"""By request id: (key, principal) of our own record of that call. For a log that names them otherwise than we do."""


@dataclass(frozen=True, slots=True)
class LogReader:
    """Of one kind of KMS."""

    title: str
    """What the vendor calls the log."""
    is_record: Callable[[dict[str, Any]], bool]
    """Tells its records from those of every other kind."""
    calls: Callable[[Iterator[dict[str, Any]], Recorded], Iterator[LoggedCall]]
    """Raises MalformedLogError."""
    sign_ins: frozenset[str] = frozenset()
    """Operations of our adapter that are no calls on a key: the vendor keeps them in another log, or not at all."""


def members(value: object) -> dict[str, Any]:
    """An object's members; none of what is no object."""
    return value if isinstance(value, dict) else {}


def items(value: object) -> list[Any]:
    """A list's items; none of what is no list."""
    return value if isinstance(value, list) else []


def text(record: dict[str, Any], name: str) -> str:
    """Raises MalformedLogError."""
    value = record.get(name)
    if not isinstance(value, str):
        raise MalformedLogError(f"a record of the cloud's log has no text {name!r}")
    return value


def time(record: dict[str, Any], name: str) -> datetime:
    """RFC 3339 in UTC, up to nine digits of a second, of which six are kept. Raises MalformedLogError."""
    match = _TIME.fullmatch(text(record, name))
    try:
        if match is not None:
            whole = datetime.strptime(match[1], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC)
            return whole.replace(microsecond=int((match[2] or "0").ljust(6, "0")[:6]))
    except ValueError:
        pass
    raise MalformedLogError(f"a record of the cloud's log has no time {name!r} in UTC")
