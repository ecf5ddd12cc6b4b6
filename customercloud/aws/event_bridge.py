"""EventBridge as far as a customer needs it to tell somebody that a key has changed: one rule and one API destination.

The rule is on for an account that has a target: changes to its keys, as CloudTrail records them, go to a URL with a
bearer token, in the background and at least once. As with the real one, nothing is said about order, a target that is
away or overloaded is tried again for a while, one that refuses is not. Kept in memory only, as faults are.

Shapes: EventBridge User Guide, "AWS service events delivered via AWS CloudTrail"; retries: "Retrying event delivery".
"""

from __future__ import annotations

import asyncio
import ssl
import uuid
from collections.abc import Iterable
from typing import Any, Final

import httpx
from pydantic import BaseModel, ConfigDict, Field

from customercloud.aws.cloudtrail import EVENT_SOURCES
from customercloud.faults import Service
from shared.errors import InvalidInputError
from shared.telemetry import get_logger

_log = get_logger(__name__)

KEY_CHANGES: Final = frozenset(
    {
        "CancelKeyDeletion", "DeleteExpiredKeyMaterial", "DeleteImportedKeyMaterial", "DeleteKey", "DisableKey",
        "EnableKey", "ImportKeyMaterial", "PutKeyPolicy", "ScheduleKeyDeletion",
    }
)  # fmt: skip
"""The rule's `detail.eventName`."""
ATTEMPTS: Final = 30
_FIRST_PAUSE_S: Final = 0.25
"""Twice as long after each further attempt, up to _LONGEST_PAUSE_S: for about a minute in all (AWS: for a day)."""
_LONGEST_PAUSE_S: Final = 2.0
_TIMEOUT_S: Final = 5.0
_MAX_UNDER_WAY: Final = 64


class EventTarget(BaseModel):
    """An API destination and its connection."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(max_length=2048, pattern=r"^https?://[!-~]+$")
    token: str = Field(repr=False, min_length=1, max_length=8192, pattern=r"^[!-~]+$")
    ca_certificate: str | None = Field(default=None, max_length=65536)
    """PEM; without it, the machine's. The real EventBridge knows public authorities only."""
    server_name: str | None = Field(default=None, max_length=253, pattern=r"^[A-Za-z0-9.-]+$")
    """That the certificate must have, if that is not the URL's host."""


def event_of(record: dict[str, Any], event_id: str) -> dict[str, Any]:
    """A record of CloudTrail as EventBridge delivers it."""
    kind = "Service Event" if record["eventType"] == "AwsServiceEvent" else "API Call"
    return {
        "version": "0",
        "id": event_id,
        "detail-type": f"AWS {kind} via CloudTrail",
        "source": "aws.kms",
        "account": record["recipientAccountId"],
        "time": record["eventTime"],
        "region": record["awsRegion"],
        "resources": [],
        "detail": record,
    }


class EventBridge:
    """`close` ends what is under way."""

    def __init__(self) -> None:
        self._targets: dict[str, tuple[EventTarget, ssl.SSLContext]] = {}
        self._under_way: set[asyncio.Task[None]] = set()

    def set_target(self, account_id: str, target: EventTarget) -> None:
        """Raises InvalidInputError for a CA certificate that is none."""
        try:
            trusted = ssl.create_default_context(cadata=target.ca_certificate)
        except (ssl.SSLError, ValueError):
            raise InvalidInputError("ca_certificate is not a certificate in PEM") from None
        self._targets[account_id] = target, trusted

    def remove_target(self, account_id: str) -> None:
        self._targets.pop(account_id, None)

    def publish(self, records: Iterable[dict[str, Any]]) -> None:
        """Send on what the rule takes. Returns at once."""
        for record in records:
            found = self._targets.get(record["recipientAccountId"])
            if found is None or not _is_key_change(record):
                continue
            if len(self._under_way) >= _MAX_UNDER_WAY:
                _log.warning("event dropped: too many are under way", name=record["eventName"])
                continue
            delivery = asyncio.create_task(_deliver(*found, event_of(record, str(uuid.uuid4()))))
            self._under_way.add(delivery)
            delivery.add_done_callback(self._under_way.discard)

    async def close(self) -> None:
        under_way = list(self._under_way)
        for delivery in under_way:
            delivery.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


def _is_key_change(record: dict[str, Any]) -> bool:
    return record["eventSource"] == EVENT_SOURCES[Service.KMS] and record["eventName"] in KEY_CHANGES


async def _deliver(target: EventTarget, trusted: ssl.SSLContext, event: dict[str, Any]) -> None:
    headers = {"Authorization": f"Bearer {target.token}"}
    extensions = {} if target.server_name is None else {"sni_hostname": target.server_name}
    outcome = ""
    async with httpx.AsyncClient(verify=trusted, trust_env=False, timeout=_TIMEOUT_S) as http:
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(min(_FIRST_PAUSE_S * 2.0 ** (attempt - 1), _LONGEST_PAUSE_S))
            try:
                response = await http.post(target.url, json=event, headers=headers, extensions=extensions)
            except httpx.HTTPError as error:
                outcome = type(error).__name__
                continue
            if response.is_success:
                return
            outcome = str(response.status_code)
            if response.status_code not in (409, 429) and response.status_code < 500:
                break
    _log.warning("event not delivered", name=event["detail"]["eventName"], url=target.url, outcome=outcome)
