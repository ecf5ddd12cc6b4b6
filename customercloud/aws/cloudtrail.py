"""CloudTrail records: who called what, with which parameters, and what came of it.

Shape and rules from the KMS Developer Guide ("Logging AWS KMS API calls with AWS CloudTrail" and its per-operation
examples) and the CloudTrail User Guide ("CloudTrail record contents"): camelCase members, plaintext and ciphertext
never present, `responseElements` null for read-only calls, `errorCode` the exception's name, except that KMS denials
stand as `AccessDenied` [assumed: public records show both spellings].

Pure: event ids and the time come from the caller.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import Any, Final

from customercloud.aws.arn import user_arn
from customercloud.aws.authorization import Caller
from customercloud.aws.identity import Session, UserSession
from customercloud.faults import Service

EVENT_VERSION: Final = "1.11"
KEY_RESOURCE_TYPE: Final = "AWS::KMS::Key"
ROLE_RESOURCE_TYPE: Final = "AWS::IAM::Role"
_MAX_ERROR_MESSAGE_SIZE_CHARACTERS: Final = 1024

EVENT_SOURCES: Final = {
    Service.KMS: "kms.amazonaws.com",
    Service.STS: "sts.amazonaws.com",
    Service.CLOUDTRAIL: "cloudtrail.amazonaws.com",
}


@dataclass(frozen=True, slots=True)
class Authenticated:
    """A verified caller and how it proved itself."""

    caller: Caller
    access_key_id: str
    user_name: str
    """The user's name, or the role's."""
    session: Session | UserSession | None

    @property
    def principal_type(self) -> str:
        """As `aws:PrincipalType` says it."""
        if self.caller.is_root:
            return "Account"
        if isinstance(self.session, Session):
            return "AssumedRole"
        is_federated = self.session is not None and self.session.federated_name is not None
        return "FederatedUser" if is_federated else "User"

    @property
    def user_id(self) -> str:
        """As GetCallerIdentity, CloudTrail and `aws:userid` say it."""
        if isinstance(self.session, Session):
            return f"{self.caller.unique_id}:{self.session.session_name}"
        return self.caller.account_id if self.caller.is_root else self.caller.unique_id


@dataclass(frozen=True, slots=True)
class Resource:
    account_id: str
    type: str
    arn: str


@dataclass(slots=True)
class Audit:
    """What an operation has learned about itself so far; filled as it goes, so that a refusal is logged with it.

    Operations put in only what may stand in the log: never Plaintext, CiphertextBlob or credentials.
    """

    request_parameters: dict[str, Any] | None = None
    response_elements: dict[str, Any] | None = None
    additional_event_data: dict[str, Any] | None = None
    resources: list[Resource] = field(default_factory=list)
    read_only: bool = True

    def add_resource(self, resource: Resource) -> None:
        if resource not in self.resources:
            self.resources.append(resource)


@dataclass(frozen=True, slots=True)
class Call:
    """One authenticated request, as operations see it."""

    service: Service
    action: str
    region: str
    caller: Authenticated
    now: dt.datetime
    request_id: str
    source_ip: str
    user_agent: str
    secure_transport: bool
    audit: Audit = field(default_factory=Audit)


def event_time(now: dt.datetime) -> str:
    return now.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def recipients(call: Call, error_code: str | None) -> list[str]:
    """Accounts whose logs get the event: the caller's, and the resource owner's unless access was denied."""
    accounts = [call.caller.caller.account_id]
    if error_code not in ("AccessDenied", "AccessDeniedException"):
        accounts += [resource.account_id for resource in call.audit.resources]
    return list(dict.fromkeys(accounts))


def api_call_record(
    call: Call, *, region: str, recipient: str, error: tuple[str, str] | None, event_id: str, shared_id: str | None
) -> dict[str, Any]:
    """The record of an API call, for the log of `recipient`. `error` is (code, message)."""
    audit = call.audit
    record: dict[str, Any] = {
        "eventVersion": EVENT_VERSION,
        "userIdentity": _user_identity(call.caller, recipient),
        "eventTime": event_time(call.now),
        "eventSource": EVENT_SOURCES[call.service],
        "eventName": call.action,
        "awsRegion": region,
        "sourceIPAddress": call.source_ip,
        "userAgent": call.user_agent,
    }
    if error is not None:
        code = "AccessDenied" if error[0] == "AccessDeniedException" else error[0]
        record |= {"errorCode": code, "errorMessage": error[1][:_MAX_ERROR_MESSAGE_SIZE_CHARACTERS]}
    record |= {
        "requestParameters": audit.request_parameters,
        "responseElements": None if error is not None else audit.response_elements,
    }
    if error is None and audit.additional_event_data is not None:
        record["additionalEventData"] = audit.additional_event_data
    record |= {"requestID": call.request_id, "eventID": event_id, "readOnly": audit.read_only}
    if audit.resources:
        record["resources"] = [{"accountId": r.account_id, "type": r.type, "ARN": r.arn} for r in audit.resources]
    record |= {"eventType": "AwsApiCall", "managementEvent": True, "recipientAccountId": recipient}
    if shared_id is not None:
        record["sharedEventID"] = shared_id
    record["eventCategory"] = "Management"
    return record


def service_record(
    name: str,
    *,
    region: str,
    account_id: str,
    key_arn: str,
    now: dt.datetime,
    event_id: str,
    request_id: str,
    details: dict[str, Any],
) -> dict[str, Any]:
    """What KMS does by itself: `RotateKey`, `DeleteKey` (Developer Guide, ct-rotatekey, ct-delete-key)."""
    return {
        "eventVersion": EVENT_VERSION,
        "userIdentity": {"accountId": account_id, "invokedBy": "AWS Internal"},
        "eventTime": event_time(now),
        "eventSource": EVENT_SOURCES[Service.KMS],
        "eventName": name,
        "awsRegion": region,
        "sourceIPAddress": "AWS Internal",
        "userAgent": "AWS Internal",
        "requestParameters": None,
        "responseElements": None,
        "requestID": request_id,
        "eventID": event_id,
        "readOnly": False,
        "resources": [{"accountId": account_id, "type": KEY_RESOURCE_TYPE, "ARN": key_arn}],
        "eventType": "AwsServiceEvent",
        "recipientAccountId": account_id,
        "serviceEventDetails": details,
        "managementEvent": True,
        "eventCategory": "Management",
    }


def _user_identity(authenticated: Authenticated, recipient: str) -> dict[str, Any]:
    caller = authenticated.caller
    session = authenticated.session
    principal_id = authenticated.user_id
    if recipient != caller.account_id:
        return {"type": "AWSAccount", "principalId": principal_id, "accountId": caller.account_id}
    kinds = {"Account": "Root", "User": "IAMUser"}
    identity: dict[str, Any] = {
        "type": kinds.get(authenticated.principal_type, authenticated.principal_type),
        "principalId": principal_id,
        "arn": caller.arn,
        "accountId": caller.account_id,
        "accessKeyId": authenticated.access_key_id,
    }
    if session is None:
        return identity | {"userName": authenticated.user_name}
    context: dict[str, Any] = {
        "attributes": {"creationDate": event_time(session.issued_at), "mfaAuthenticated": "false"}
    }
    if session.source_identity is not None:
        context["sourceIdentity"] = session.source_identity
    if isinstance(session, UserSession) and session.federated_name is None:
        return identity | {"userName": authenticated.user_name, "sessionContext": context}
    context["sessionIssuer"] = {
        "type": "Role" if isinstance(session, Session) else "IAMUser",
        "principalId": session.role_id if isinstance(session, Session) else session.user_id,
        "arn": caller.issuer_arn if isinstance(session, Session) else user_arn(caller.account_id, session.user_name),
        "accountId": caller.account_id,
        "userName": authenticated.user_name,
    }
    return identity | {"sessionContext": context}


def lookup_event(record: dict[str, Any]) -> dict[str, Any]:
    """A record as `LookupEvents` wraps it, but for the JSON text of the record itself."""
    identity = record["userIdentity"]
    issuer = identity.get("sessionContext", {}).get("sessionIssuer", {})
    user_name = identity.get("userName") or issuer.get("userName")
    event: dict[str, Any] = {
        "EventId": record["eventID"],
        "EventName": record["eventName"],
        "ReadOnly": str(record["readOnly"]).lower(),
        "EventTime": dt.datetime.fromisoformat(record["eventTime"]).timestamp(),
        "EventSource": record["eventSource"],
        "Resources": [{"ResourceType": r["type"], "ResourceName": r["ARN"]} for r in record.get("resources", [])],
    }
    if access_key_id := identity.get("accessKeyId"):
        event["AccessKeyId"] = access_key_id
    if user_name:
        # For a role session the console and LookupEvents show the session's name.
        event["Username"] = identity["principalId"].partition(":")[2] or user_name
    return event
