"""CloudTrail LookupEvents: the caller's account, newest first, one attribute filter, pages of at most 50."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
from collections.abc import Callable
from typing import Any, Final

from customercloud.aws.access import KeyAccess
from customercloud.aws.cloudtrail import Call, lookup_event
from customercloud.aws.errors import AwsError
from customercloud.aws.kms import Operation
from customercloud.aws.params import Params
from customercloud.aws.trail import Trail

_MAX_RESULTS: Final = 50
_ATTRIBUTES: Final = (
    "EventId", "EventName", "ReadOnly", "Username", "ResourceType", "ResourceName", "EventSource", "AccessKeyId",
)  # fmt: skip


class LookupEvents:
    """`delay` is how long events are withheld: the real service takes minutes, and readers must live with it."""

    def __init__(self, trail: Trail, access: KeyAccess, delay: Callable[[], dt.timedelta]) -> None:
        self._trail = trail
        self._access = access
        self._delay = delay

    @property
    def operations(self) -> dict[str, Operation]:
        return {"LookupEvents": self.lookup_events}

    def lookup_events(self, call: Call, params: Params) -> dict[str, Any]:
        limit = params.integer("MaxResults", -(2**31), 2**31)
        limit = _MAX_RESULTS if limit is None else limit
        start_s, end_s = params.timestamp("StartTime"), params.timestamp("EndTime")
        attributes = params.objects("LookupAttributes")
        token = params.optional_string("NextToken", 1, 1024)
        call.audit.request_parameters = {"maxResults": limit}
        if params.has("EventCategory"):
            raise AwsError("InvalidEventCategoryException", "Insights events do not exist here")
        if not 1 <= limit <= _MAX_RESULTS:
            raise AwsError("InvalidMaxResultsException", f"MaxResults is 1 to {_MAX_RESULTS}")
        if start_s is not None and end_s is not None and start_s > end_s:
            raise AwsError("InvalidTimeRangeException", "The start time is after the end time")
        wanted = _attribute(attributes)
        self._access.authorize_account(call)
        account_id = call.caller.caller.account_id
        before = _position(token, account_id, wanted, start_s, end_s)
        latest_s = (call.now - self._delay()).timestamp()

        events: list[dict[str, Any]] = []
        last = 0
        for entry in self._trail.newest_first():
            if before is not None and entry.number >= before:
                continue
            record = entry.record
            if record["recipientAccountId"] != account_id:
                continue
            event = lookup_event(record)
            time_s = event["EventTime"]
            if time_s > min(latest_s, end_s if end_s is not None else latest_s):
                continue
            if start_s is not None and time_s < start_s:
                continue
            if wanted is not None and not _matches(event, *wanted):
                continue
            if len(events) == limit:
                return {"Events": events, "NextToken": _token(last, account_id, wanted, start_s, end_s)}
            last = entry.number
            events.append(event | {"CloudTrailEvent": entry.line.decode()})
        return {"Events": events}


def _attribute(attributes: list[dict[str, Any]]) -> tuple[str, str] | None:
    if not attributes:
        return None
    key, value = attributes[0].get("AttributeKey"), attributes[0].get("AttributeValue")
    if len(attributes) > 1 or key not in _ATTRIBUTES or not isinstance(value, str) or not value:
        raise AwsError("InvalidLookupAttributesException", "LookupAttributes holds at most one known attribute")
    return str(key), value


def _matches(event: dict[str, Any], key: str, value: str) -> bool:
    if key in ("ResourceType", "ResourceName"):
        return any(resource[key] == value for resource in event["Resources"])
    return bool(event.get(key) == value)


def _query_digest(account_id: str, *query: object) -> str:
    return hashlib.sha256(json.dumps([account_id, *query]).encode()).hexdigest()[:16]


def _token(last: int, account_id: str, *query: object) -> str:
    return base64.b64encode(f"{last}.{_query_digest(account_id, *query)}".encode()).decode()


def _position(token: str | None, account_id: str, *query: object) -> int | None:
    """The number of the last entry of the page before. A token fits only the query that it came from."""
    if token is None:
        return None
    try:
        number, _, digest = base64.b64decode(token, validate=True).decode("ascii").partition(".")
    except ValueError:  # not base64, not ASCII
        number, digest = "", ""
    if not number.isdecimal() or len(number) > 18 or digest != _query_digest(account_id, *query):
        raise AwsError("InvalidNextTokenException", "The token is invalid, or was used with another query")
    return int(number)
