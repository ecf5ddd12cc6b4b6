"""CloudTrail: records of `LookupEvents` and of the files that a trail writes to S3.

A record's form is that of the CloudTrail User Guide ("record contents") and of the KMS Developer Guide ("Logging AWS
KMS API calls"). An event that concerns two accounts stands in both logs, with one `sharedEventID`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from shared.kms_log import LoggedCall, LogReader, MalformedLogError, Recorded, items, members, text, time

_USES: Final = frozenset(
    {
        "Encrypt",
        "Decrypt",
        "ReEncrypt",
        "GenerateDataKey",
        "GenerateDataKeyWithoutPlaintext",
        "GenerateDataKeyPair",
        "GenerateDataKeyPairWithoutPlaintext",
        "Sign",
        "Verify",
        "GenerateMac",
        "VerifyMac",
        "DeriveSharedSecret",
    }
)


def _is_record(value: dict[str, Any]) -> bool:
    return "eventSource" in value or "CloudTrailEvent" in value


def _calls(records: Iterator[dict[str, Any]], _: Recorded) -> Iterator[LoggedCall]:
    """Raises MalformedLogError."""
    seen: set[str] = set()
    for wrapped in records:
        record = _unwrap(wrapped)
        if text(record, "eventSource") != "kms.amazonaws.com":
            continue
        event = record.get("sharedEventID") or record.get("eventID")
        if isinstance(event, str):
            if event in seen:
                continue
            seen.add(event)
        operation = text(record, "eventName")
        request_id = record.get("requestID")
        yield LoggedCall(
            time(record, "eventTime"),
            operation,
            _key(record),
            _principal(members(record.get("userIdentity"))),
            request_id if isinstance(request_id, str) else None,
            str(record.get("errorCode") or "ok"),
            operation in _USES,
        )


def _unwrap(record: dict[str, Any]) -> dict[str, Any]:
    """LookupEvents carries the record as a text."""
    inner = record.get("CloudTrailEvent")
    if inner is None:
        return record
    try:
        return members(json.loads(inner))
    except (ValueError, TypeError, RecursionError):
        raise MalformedLogError("a CloudTrailEvent is not JSON") from None


def _key(record: dict[str, Any]) -> str | None:
    for resource in items(record.get("resources")):
        arn = members(resource).get("ARN")
        if isinstance(arn, str) and ":key/" in arn:
            return arn
    named = members(record.get("requestParameters")).get("keyId")
    return named if isinstance(named, str) and named.startswith("arn:") and ":key/" in named else None


def _principal(identity: dict[str, Any]) -> str:
    issuer = members(members(identity.get("sessionContext")).get("sessionIssuer"))
    for who in (issuer.get("arn"), identity.get("arn"), identity.get("principalId"), identity.get("invokedBy")):
        if isinstance(who, str):
            return who
    return "unknown"


READER: Final = LogReader("AWS CloudTrail", _is_record, _calls, frozenset({"AssumeRole", "CreateClient"}))
