"""STS over the Query protocol: AssumeRole and GetCallerIdentity, with XML answers.

AssumeRole is decided like every access to a resource with its own policy: the role's trust policy is the resource
policy, `sts:ExternalId` is a condition key. A caller of another account needs an identity policy of its own besides.
The external id is what keeps a vendor that serves many customers from being talked into using another customer's role
("The confused deputy problem", IAM User Guide).
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable
from html import escape
from typing import Any, Final
from urllib.parse import parse_qsl

from customercloud.aws.access import condition_context
from customercloud.aws.arn import session_arn
from customercloud.aws.authorization import authorize
from customercloud.aws.cloudtrail import ROLE_RESOURCE_TYPE, Call, Resource, event_time
from customercloud.aws.errors import AwsError
from customercloud.aws.identity import (
    MAX_SESSION_S,
    MIN_SESSION_S,
    AccessKey,
    Role,
    Session,
    SessionTokens,
    is_external_id,
)
from customercloud.aws.policy import PolicyKind, parse_policy
from customercloud.aws.state import AwsState

XML_NAMESPACE: Final = "https://sts.amazonaws.com/doc/2011-06-15/"
_SESSION_NAME: Final = r"[A-Za-z0-9_+=,.@-]{2,64}"

Xml = dict[str, "str | Xml"]


def parse_form(body: bytes) -> dict[str, str]:
    """The Query protocol's parameters. Raises AwsError for a body that is no form or names one twice."""
    try:
        pairs = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=64
        )
    except (UnicodeDecodeError, ValueError):
        raise AwsError("MalformedQueryString", "The query string is malformed", 400) from None
    form = dict(pairs)
    if len(form) != len(pairs):
        raise AwsError("MalformedQueryString", "The query string names a parameter twice", 400)
    return form


def xml_answer(action: str, result: Xml, request_id: str) -> bytes:
    body = _xml({f"{action}Response": {f"{action}Result": result, "ResponseMetadata": {"RequestId": request_id}}})
    return body.replace(">", f' xmlns="{XML_NAMESPACE}">', 1).encode()


def xml_error(error: AwsError, request_id: str) -> bytes:
    kind = "Sender" if error.http_status < 500 else "Receiver"
    detail: Xml = {"Type": kind, "Code": error.code, "Message": error.message}
    body = _xml({"ErrorResponse": {"Error": detail, "RequestId": request_id}})
    return body.replace(">", f' xmlns="{XML_NAMESPACE}">', 1).encode()


def _xml(tree: Xml) -> str:
    return "".join(
        f"<{name}>{_xml(value) if isinstance(value, dict) else escape(value)}</{name}>" for name, value in tree.items()
    )


class Sts:
    """`session_lifetime` overrides how long sessions live (a fault of its own: see `Faults.session_lifetime_s`)."""

    def __init__(
        self, state: AwsState, tokens: SessionTokens, session_lifetime: Callable[[], dt.timedelta | None]
    ) -> None:
        self._state = state
        self._tokens = tokens
        self._session_lifetime = session_lifetime

    @property
    def operations(self) -> dict[str, Callable[[Call, dict[str, str]], Xml]]:
        return {"AssumeRole": self.assume_role, "GetCallerIdentity": self.get_caller_identity}

    def assume_role(self, call: Call, form: dict[str, str]) -> Xml:
        arn, name = form.get("RoleArn", ""), form.get("RoleSessionName", "")
        external_id = form.get("ExternalId")
        logged: dict[str, Any] = {"roleArn": arn, "roleSessionName": name} | (
            {"externalId": external_id} if external_id is not None else {}
        )
        call.audit.request_parameters = logged
        if not arn or not re.fullmatch(_SESSION_NAME, name):
            raise AwsError("ValidationError", "RoleArn and a RoleSessionName of 2 to 64 characters are required")
        if external_id is not None and not is_external_id(external_id):
            raise AwsError("ValidationError", "ExternalId has 2 to 1224 characters of [A-Za-z0-9_+=,.@:/-]")
        unsupported = form.keys() - {
            "Action", "Version", "RoleArn", "RoleSessionName", "ExternalId", "DurationSeconds",
        }  # fmt: skip
        if unsupported:
            # A session policy that was ignored would hand out more rights than were asked for.
            raise AwsError("ValidationError", f"not supported here: {sorted(unsupported)[0][:64]}")
        role = self._authorized_role(call, arn, external_id)
        duration = self._duration(form, role)
        logged["durationSeconds"] = int(duration.total_seconds())
        session = Session(
            access_key=AccessKey.new("ASIA"),
            account_id=role.account_id,
            role_name=role.name,
            role_id=role.role_id,
            session_name=name,
            issued_at=call.now,
            expires_at=call.now + (self._session_lifetime() or duration),
        )
        user: Xml = {
            "AssumedRoleId": f"{role.role_id}:{name}",
            "Arn": session_arn(role.account_id, role.name, name),
        }
        call.audit.response_elements = {
            # AWS logs the session token as well; this log holds nothing that opens anything.
            "credentials": {
                "accessKeyId": session.access_key.access_key_id,
                "expiration": event_time(session.expires_at),
            },
            "assumedRoleUser": {"assumedRoleId": f"{role.role_id}:{name}", "arn": user["Arn"]},
        }
        return {
            "Credentials": {
                "AccessKeyId": session.access_key.access_key_id,
                "SecretAccessKey": session.access_key.secret_access_key,
                "SessionToken": self._tokens.issue(session),
                "Expiration": session.expires_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            },
            "AssumedRoleUser": user,
        }

    def get_caller_identity(self, call: Call, form: dict[str, str]) -> Xml:
        """Needs no permission, as on AWS."""
        caller, session = call.caller.caller, call.caller.session
        user_id = caller.unique_id if session is None else f"{caller.unique_id}:{session.session_name}"
        return {"Arn": caller.arn, "UserId": user_id, "Account": caller.account_id}

    def _authorized_role(self, call: Call, arn: str, external_id: str | None) -> Role:
        """A role that does not exist is refused in the words of one that may not be assumed."""
        caller = call.caller.caller
        denied = f"User: {caller.arn} is not authorized to perform: sts:AssumeRole on resource: {arn}"
        role = self._state.snapshot.roles.get(arn)
        if role is None:
            raise AwsError("AccessDenied", denied, 403)
        call.audit.add_resource(Resource(role.account_id, ROLE_RESOURCE_TYPE, role.arn))
        context = condition_context(call)
        if external_id is not None:
            context["sts:externalid"] = (external_id,)
        refusal = authorize(
            caller,
            "sts:AssumeRole",
            role.arn,
            context,
            owner_account_id=role.account_id,
            resource_policy=parse_policy(role.trust_policy, PolicyKind.TRUST),
            binding=role.trust_binding,
        )
        if refusal is None:
            return role
        # About its own identity policies the caller is told; about a foreign trust policy it is not.
        own = "identity-based" in refusal.sentence or caller.account_id == role.account_id
        raise AwsError("AccessDenied", f"{denied} {refusal.sentence}" if own else denied, 403)

    @staticmethod
    def _duration(form: dict[str, str], role: Role) -> dt.timedelta:
        text = form.get("DurationSeconds", "3600")
        seconds = int(text) if re.fullmatch(r"[0-9]{1,6}", text) else 0
        if not MIN_SESSION_S <= seconds <= MAX_SESSION_S:
            raise AwsError("ValidationError", f"DurationSeconds is {MIN_SESSION_S} to {MAX_SESSION_S}")
        if seconds > role.max_session_s:
            raise AwsError(
                "ValidationError",
                "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.",
            )
        return dt.timedelta(seconds=seconds)
