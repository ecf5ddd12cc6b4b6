"""Audit records: Key Vault's AuditEvent, and the sign-ins of service principals. Pure.

Field set of AuditEvent from "Azure Key Vault logging" and published records; plaintext, ciphertext and tokens never
stand in one. `correlationId` is the request's `x-ms-request-id`, which the caller sees too. What a refusal's
`resultType` says differs between public records [assumed: Success, as there]; `httpStatusCode` is what to match on.
Sign-ins stand in the tenant's log under Entra ID's category `ServicePrincipalSignInLogs`, with the members that join.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any, Final

from customercloud.azure.errors import AzureError
from customercloud.azure.state import LOCATION, Vault
from customercloud.azure.tokens import Caller

KEY_VAULT_CATEGORY: Final = "AuditEvent"
SIGN_IN_CATEGORY: Final = "ServicePrincipalSignInLogs"
REQUIRED_MEMBERS: Final = frozenset({"time", "category", "operationName", "correlationId"})
_MAX_DESCRIPTION_SIZE_CHARACTERS: Final = 1024

_SIGNATURES: Final = {
    200: "OK", 204: "No Content", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 409: "Conflict", 413: "Request Entity Too Large", 429: "Too Many Requests",
    500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Received:
    """What a record tells of the request, whatever came of it."""

    time: dt.datetime
    request_id: str
    address: str
    user_agent: str
    uri: str
    api_version: str
    duration_ms: int


def log_time(moment: dt.datetime) -> str:
    """Seven digits of a second, as the service writes."""
    return moment.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "0Z"


def key_vault_record(
    vault: Vault,
    received: Received,
    *,
    operation: str,
    caller: Caller | None,
    key_id: str | None,
    algorithm: str | None,
    status: int,
    refusal: AzureError | None,
) -> dict[str, Any]:
    """`key_id` is the versioned kid when the operation got so far as to know it."""
    properties: dict[str, Any] = {
        "clientInfo": received.user_agent,
        "requestUri": received.uri,
        "httpStatusCode": status,
        "tlsVersion": "TLS1_3",
        "isRbacAuthorized" if vault.access.mode == "rbac" else "isAccessPolicyMatch": status not in (401, 403),
    }
    if key_id is not None:
        properties["id"] = key_id
    if algorithm is not None:
        properties["algorithm"] = algorithm
    record: dict[str, Any] = {
        "time": log_time(received.time),
        "category": KEY_VAULT_CATEGORY,
        "operationName": operation,
        "operationVersion": received.api_version,
        "resultType": "Success",
        "resultSignature": _SIGNATURES.get(status, str(status)),
        "durationMs": str(received.duration_ms),
        "correlationId": received.request_id,
        "callerIpAddress": received.address,
        "identity": {},
        "properties": properties,
        "resourceId": vault.resource_id.upper(),
        "location": LOCATION,
        "tenantId": vault.tenant_id,
    }
    if refusal is not None:
        record["resultDescription"] = refusal.message[:_MAX_DESCRIPTION_SIZE_CHARACTERS]
    if caller is not None:
        record["identity"] = {"claim": {"oid": caller.object_id, "appid": caller.app_id}}
    return record


def service_record(vault: Vault, *, operation: str, key_id: str, now: dt.datetime, request_id: str) -> dict[str, Any]:
    """What the service does by itself: `KeyRotateIfDue`, `KeyPurge` at the scheduled date."""
    received = Received(now, request_id, "", "Azure Key Vault", "", "", 0)
    return key_vault_record(
        vault, received, operation=operation, caller=None, key_id=key_id, algorithm=None, status=200, refusal=None
    )


def sign_in_record(
    received: Received, *, tenant_id: str, client_id: str, object_id: str | None, code: int, description: str
) -> dict[str, Any]:
    """`code` is the AADSTS number, 0 for a token that was given."""
    return {
        "time": log_time(received.time),
        "category": SIGN_IN_CATEGORY,
        "operationName": "Sign-in activity",
        "operationVersion": "1.0",
        "resultType": str(code),
        "resultSignature": "SUCCESS" if code == 0 else "FAILURE",
        "resultDescription": description[:_MAX_DESCRIPTION_SIZE_CHARACTERS],
        "durationMs": str(received.duration_ms),
        "correlationId": received.request_id,
        "callerIpAddress": received.address,
        "properties": {"appId": client_id, "servicePrincipalId": object_id, "userAgent": received.user_agent},
        "tenantId": tenant_id,
    }
