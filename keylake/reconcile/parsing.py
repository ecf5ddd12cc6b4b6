"""What the readers of the clouds' logs share: values from JSON that nobody has checked."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, Final

from shared.errors import InvalidInputError

_TIME: Final = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?(?:Z|\+00:00)", re.ASCII
)


class MalformedLogError(InvalidInputError):
    """A file that is not the log of a cloud, or not in the form that its vendor's tools write."""

    code = "malformed_cloud_log"


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
