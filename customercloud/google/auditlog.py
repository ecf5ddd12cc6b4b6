"""Records of Cloud Audit Logs, as Cloud Logging shows them.

Written from google.cloud.audit.AuditLog, google.rpc.context.AttributeContext and "Cloud KMS audit logging". Plaintext,
ciphertext, AAD and their checksums never stand in `request`. `requestAttributes.reason` is what the caller sent as
`X-Goog-Request-Reason`: the only value of a caller's own choosing that the log keeps besides the user agent.

Pure: ids and times come from the caller.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from customercloud.google.call import Api, Call, LogType, Operation, Resource
from customercloud.google.errors import GoogleError
from customercloud.google.names import KeyName, LocationName, ProjectName, RingName, ServiceAccountName, VersionName

AUDIT_LOG_TYPE: Final = "type.googleapis.com/google.cloud.audit.AuditLog"
MAX_REASON_SIZE_CHARACTERS: Final = 1024
MAX_USER_AGENT_SIZE_CHARACTERS: Final = 1024


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a call came from."""

    address: str
    user_agent: str
    reason: str | None


def log_name(project: str, log: LogType) -> str:
    kind = "activity" if log is LogType.ADMIN_WRITE else "data_access"
    return f"projects/{project}/logs/cloudaudit.googleapis.com%2F{kind}"


def timestamp(time: dt.datetime) -> str:
    return time.astimezone(dt.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def record(
    operation: Operation,
    log: LogType,
    call: Call,
    resource: Resource,
    request: Message,
    origin: Origin,
    error: GoogleError | None,
    *,
    unique_id: str | None,
    insert_id: str,
    received_at: dt.datetime,
) -> dict[str, Any]:
    """One LogEntry. `unique_id` is that of a service account that is the resource."""
    attributes: dict[str, Any] = {"time": timestamp(call.now), "auth": {}}
    if origin.reason is not None:
        attributes["reason"] = origin.reason
    payload: dict[str, Any] = {
        "@type": AUDIT_LOG_TYPE,
        "serviceName": operation.api.domain,
        "methodName": operation.name,
        "resourceName": str(resource),
        "authenticationInfo": _authentication(call),
        "authorizationInfo": [
            {
                "resource": a.resource,
                "permission": a.permission,
                "permissionType": log.value,
            }
            | ({"granted": True} if a.granted else {})
            for a in call.audit.authorizations
        ],
        "requestMetadata": {
            "callerIp": origin.address,
            "callerSuppliedUserAgent": origin.user_agent,
            "requestAttributes": attributes,
        },
        "request": request_members(request),
    }
    if error is not None:
        payload["status"] = {"code": error.code.number, "message": error.message}
    if isinstance(resource, KeyName | RingName | VersionName | LocationName):
        location = resource if isinstance(resource, LocationName) else resource.location
        payload["resourceLocation"] = {"currentLocations": [location.location]}
    return {
        "logName": log_name(resource.project, log),
        "insertId": insert_id,
        "timestamp": timestamp(call.now),
        "receiveTimestamp": timestamp(received_at),
        "severity": "ERROR" if error is not None else "NOTICE" if log is LogType.ADMIN_WRITE else "INFO",
        "resource": _monitored_resource(operation, resource, unique_id),
        "protoPayload": payload,
    }


def request_members(request: Message) -> dict[str, Any]:
    """The request without its bytes: those are plaintext, ciphertext, AAD, digests."""
    public = type(request)()
    public.CopyFrom(request)
    for field in request.DESCRIPTOR.fields:
        if field.type == FieldDescriptor.TYPE_BYTES or field.name.endswith("crc32c"):
            public.ClearField(field.name)
    kind = {"@type": f"type.googleapis.com/{request.DESCRIPTOR.full_name}"}
    members: dict[str, Any] = json_format.MessageToDict(public)
    return kind | members


def _authentication(call: Call) -> dict[str, Any]:
    principal = call.principal
    info: dict[str, Any] = {"principalEmail": principal.email, "principalSubject": principal.member}
    if principal.delegate is not None:
        info["serviceAccountDelegationInfo"] = [
            {
                "firstPartyPrincipal": {"principalEmail": principal.delegate},
                "principalSubject": f"serviceAccount:{principal.delegate}",
            }
        ]
    return info


def _monitored_resource(operation: Operation, resource: Resource, unique_id: str | None) -> dict[str, Any]:
    match resource:
        case VersionName(key=key):
            labels = _key_labels(key) | {"crypto_key_version_id": resource.version_id}
            return {"type": "cloudkms_cryptokeyversion", "labels": labels}
        case KeyName():
            return {"type": "cloudkms_cryptokey", "labels": _key_labels(resource)}
        case RingName():
            return {"type": "cloudkms_keyring", "labels": _ring_labels(resource)}
        case ServiceAccountName():
            labels = {"project_id": resource.project, "email_id": resource.email, "unique_id": unique_id or ""}
            return {"type": "service_account", "labels": labels}
        case ProjectName():
            return {"type": "project", "labels": {"project_id": resource.project}}
        case LocationName():
            labels = {"project_id": resource.project, "service": Api.KMS.domain, "method": operation.name}
            return {"type": "audited_resource", "labels": labels}


def _ring_labels(ring: RingName) -> dict[str, str]:
    return {"project_id": ring.project, "location": ring.location.location, "key_ring_id": ring.ring_id}


def _key_labels(key: KeyName) -> dict[str, str]:
    return _ring_labels(key.ring) | {"crypto_key_id": key.key_id}
