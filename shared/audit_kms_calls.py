"""Audit records of KMS calls, read back (docs/formats/audit-kms-calls.md).

This file is a core: no I/O and no clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from shared.audit_chain import Link
from shared.audit_export import parse_time
from shared.errors import CorruptedError

ACTION: Final = "kms.calls"
MAX_CALLS_PER_RECORD: Final = 256
_UNSURE: Final = frozenset({"unreachable", "throttled", "ambiguous"})
"""Verdicts of calls that may not have got as far as the customer's log: no answer, an answer from before the caller was
known, an error in between."""


class MalformedCallsError(CorruptedError):
    """A record of KMS calls that is none."""

    code = "malformed_kms_calls"


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One call, as we recorded it."""

    at: datetime
    operation: str
    """As the adapter names it."""
    request_id: str | None
    """None: no answer came."""
    verdict: str
    """ "ok", or what the adapter made of the failure."""
    key: str
    provider: str
    principal: str
    """Both "" where the record does not say."""
    sequence: int
    """Of the audit record."""

    @property
    def must_be_logged(self) -> bool:
        """An answer came that only the KMS itself gives, to a caller that it knows."""
        return self.request_id is not None and self.verdict not in _UNSURE


def recorded_calls(link: Link) -> Iterator[RecordedCall]:
    """The calls that an audit record tells of: none, for most. Raises MalformedCallsError."""
    details = link.entry.details
    if link.entry.action == ACTION:
        try:
            yield from _group(link)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise MalformedCallsError(f"record {link.sequence} holds no KMS calls, but says so") from None
        return
    for old in ("", "old_"):
        if key := details.get(f"{old}kms_key"):
            yield RecordedCall(
                link.at,
                details.get(f"{old}kms_operation", ""),
                details.get(f"{old}kms_request_id") or None,
                details.get(f"{old}kms_verdict", "ok"),
                key,
                "",
                "",
                link.sequence,
            )


def forgotten_calls(link: Link) -> int:
    """How many calls were made but not recorded, because the database was down for too long."""
    count = link.entry.details.get("forgotten", "0")
    return int(count) if link.entry.action == ACTION and count.isascii() and count.isdecimal() else 0


def _group(link: Link) -> Iterator[RecordedCall]:
    details = link.entry.details
    calls = json.loads(details["calls"])
    if not isinstance(calls, list) or len(calls) > MAX_CALLS_PER_RECORD:
        raise ValueError("not a list of calls")
    for at, operation, request_id, verdict in calls:
        if not all(isinstance(text, str) for text in (operation, request_id, verdict)):
            raise ValueError("not a call")
        yield RecordedCall(
            parse_time(at),
            operation,
            request_id or None,
            verdict,
            details["key"],
            details["provider"],
            details["principal"],
            link.sequence,
        )
