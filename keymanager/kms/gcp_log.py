"""Cloud Audit Logs: entries of Cloud KMS as `gcloud logging read --format=json` prints them.

An entry's form is google.logging.v2.LogEntry with google.cloud.audit.AuditLog in it. The log knows no request id of the
caller's but the reason that rode in `X-Goog-Request-Reason`: Keylake gives each request one of its own. Uses of keys
are in the data access log, which the customer has to switch on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from shared.kms_log import LoggedCall, LogReader, Recorded, members, text, time

_USES: Final = frozenset(
    {"Encrypt", "Decrypt", "RawEncrypt", "RawDecrypt", "AsymmetricSign", "AsymmetricDecrypt", "MacSign", "MacVerify"}
)


def _is_record(value: dict[str, Any]) -> bool:
    return "protoPayload" in value and "logName" in value


def _calls(records: Iterator[dict[str, Any]], _: Recorded) -> Iterator[LoggedCall]:
    """Raises MalformedLogError."""
    seen: set[tuple[str, str]] = set()
    for record in records:
        payload = members(record.get("protoPayload"))
        if payload.get("serviceName") != "cloudkms.googleapis.com":
            continue
        # Logging may deliver an entry twice: its id and time are what tells.
        identity = (str(record.get("insertId")), text(record, "timestamp"))
        if identity in seen:
            continue
        seen.add(identity)
        method = text(payload, "methodName").rpartition(".")[2]
        attributes = members(members(payload.get("requestMetadata")).get("requestAttributes"))
        reason = attributes.get("reason")
        email = members(payload.get("authenticationInfo")).get("principalEmail")
        code = members(payload.get("status")).get("code")
        yield LoggedCall(
            time(record, "timestamp"),
            method,
            _key(payload.get("resourceName")),
            email if isinstance(email, str) else "unknown",
            reason if isinstance(reason, str) else None,
            "ok" if code in (None, 0) else f"status {code}",
            method in _USES,
        )


def _key(resource: object) -> str | None:
    if not isinstance(resource, str) or "/cryptoKeys/" not in resource:
        return None
    return resource.partition("/cryptoKeyVersions/")[0]


READER: Final = LogReader("Google Cloud Audit Logs", _is_record, _calls, frozenset({"GenerateAccessToken", "OwnToken"}))
