"""Azure Monitor: AuditEvent records of Key Vault, as they lie in a storage account or come from a diagnostic export.

A record's form is that of "Azure Key Vault logging" (Microsoft Learn). `correlationId` is the `x-ms-request-id` that
the caller was given. The SDK's first request of a process is empty and without a token, to be told whom to ask for one:
it stands there as `Authentication` with status 401 and is no call on a key. Sign-ins stand in another log.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

from shared.kms_log import LoggedCall, LogReader, Recorded, members, text, time

_OPERATIONS: Final = {
    "KeyWrap": "WrapKey",
    "KeyUnwrap": "UnwrapKey",
    "KeyGet": "GetKey",
    "KeyGetDeleted": "GetDeletedKey",
}
"""The names that our adapter has for them."""
_USES: Final = frozenset({"KeyWrap", "KeyUnwrap", "KeyEncrypt", "KeyDecrypt", "KeySign", "KeyVerify"})
_KEY_PATH: Final = re.compile(r"/(?:deleted)?keys/([0-9A-Za-z-]{1,127})(?:/.*)?", re.ASCII)


def _is_record(value: dict[str, Any]) -> bool:
    return "operationName" in value and "correlationId" in value


def _calls(records: Iterator[dict[str, Any]], _: Recorded) -> Iterator[LoggedCall]:
    """Raises MalformedLogError."""
    for record in records:
        if record.get("category") != "AuditEvent":
            continue
        operation = text(record, "operationName")
        properties = members(record.get("properties"))
        status = properties.get("httpStatusCode")
        yield LoggedCall(
            time(record, "time"),
            _OPERATIONS.get(operation, operation),
            _key(properties),
            _principal(members(record.get("identity"))),
            text(record, "correlationId"),
            "ok" if status in (200, 204) else str(status),
            operation in _USES,
            operation != "Authentication",
        )


def _key(properties: dict[str, Any]) -> str | None:
    """`id` is there when the operation got so far as to know the key; the address of the request always."""
    for where in (properties.get("id"), properties.get("requestUri")):
        if isinstance(where, str):
            try:
                parts = urlsplit(where)
            except ValueError:  # brackets that are no IPv6 address
                continue
            if match := _KEY_PATH.fullmatch(parts.path):
                return f"{parts.scheme}://{parts.netloc.lower()}/keys/{match[1]}"
    return None


def _principal(identity: dict[str, Any]) -> str:
    """The application; for people, who they are."""
    claim = members(identity.get("claim"))
    upn = "http://schemas.xmlsoap.org/ws/2005/05/identity/claims/upn"
    for who in (claim.get("appid"), claim.get(upn), claim.get("oid")):
        if isinstance(who, str):
            return who
    return "unknown"


READER: Final = LogReader("Azure Monitor", _is_record, _calls, frozenset({"GetToken"}))
