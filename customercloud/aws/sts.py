"""STS: sessions of roles and users, and who a caller is.

AssumeRole is decided like every access to a resource with its own policy: the role's trust policy is the resource
policy, `sts:ExternalId` is a condition key. A caller of another account needs an identity policy of its own besides.
The external id is what keeps a vendor that serves many customers from being talked into using another customer's role
("The confused deputy problem", IAM User Guide). Tags and a source identity need rights of their own
(sts:TagSession, sts:SetSourceIdentity), from both sides, too.

There are no managed policies, no MFA devices and no identity providers here: what names one is refused, never ignored,
as it would hand out more rights than were asked for.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable
from typing import Any, Final

from customercloud.aws.access import KeyAccess, condition_context
from customercloud.aws.arn import federated_arn, session_arn
from customercloud.aws.authorization import authorize
from customercloud.aws.cloudtrail import ROLE_RESOURCE_TYPE, Call, Resource, event_time
from customercloud.aws.errors import AwsError
from customercloud.aws.identity import (
    MAX_CHAINED_SESSION_S,
    AccessKey,
    Role,
    Session,
    SessionTokens,
    UserSession,
    account_of_access_key,
)
from customercloud.aws.kms_steps import tag_conditions
from customercloud.aws.params import Params
from customercloud.aws.patterns import MalformedPolicyError
from customercloud.aws.policy import PolicyKind, parse_policy
from customercloud.aws.query import Xml
from customercloud.aws.state import AwsState

_ROLE_ARN: Final = re.compile(r"arn:aws:iam::[0-9]{12}:role/.+")
_MAX_SESSION_POLICY_SIZE_CHARACTERS: Final = 2048
_MAX_REQUEST_POLICY_SIZE_CHARACTERS: Final = 100_000
_DEFAULT_ROLE_SESSION_S: Final = 3600
_DEFAULT_USER_SESSION_S: Final = 43_200
_MAX_ROOT_SESSION_S: Final = 3600

StsOperation = Callable[[Call, Params], Xml]


def _refused(message: str) -> AwsError:
    return AwsError("ValidationError", message)


class Sts:
    """`session_lifetime` overrides how long sessions live (a fault of its own: see `Faults.session_lifetime_s`)."""

    def __init__(
        self,
        state: AwsState,
        access: KeyAccess,
        tokens: SessionTokens,
        session_lifetime: Callable[[], dt.timedelta | None],
    ) -> None:
        self._state = state
        self._access = access
        self._tokens = tokens
        self._session_lifetime = session_lifetime

    @property
    def operations(self) -> dict[str, StsOperation]:
        return {
            "AssumeRole": self.assume_role,
            "GetCallerIdentity": self.get_caller_identity,
            "GetSessionToken": self.get_session_token,
            "GetFederationToken": self.get_federation_token,
            "GetAccessKeyInfo": self.get_access_key_info,
        }

    # ── roles ──────────────────────────────────────────────────────────────────────────────────────────────────

    def assume_role(self, call: Call, params: Params) -> Xml:
        arn, name = params.string("RoleArn"), params.string("RoleSessionName")
        external_id, source_identity = params.optional_string("ExternalId"), params.optional_string("SourceIdentity")
        policy, tags = params.optional_string("Policy", maximum=_MAX_REQUEST_POLICY_SIZE_CHARACTERS), _tags(params)
        logged: dict[str, Any] = {"roleArn": arn, "roleSessionName": name}
        logged |= {} if external_id is None else {"externalId": external_id}
        logged |= {} if source_identity is None else {"sourceIdentity": source_identity}
        logged |= {} if policy is None else {"policy": policy}
        if tags:
            logged["tags"] = [{"key": key, "value": value} for key, value in tags.items()]
        call.audit.request_parameters = logged
        if _ROLE_ARN.fullmatch(arn) is None:
            raise _refused(f"{arn} is invalid")
        _check_policy(policy)
        _refuse_absent(params, "AssumeRole")
        inherited, transitive = _inherited(call, params, tags)
        source_identity = _source_identity(call, source_identity)
        role = self._authorized_role(call, arn, params, tags, source_identity)
        duration = self._duration(call, params, role)
        logged["durationSeconds"] = int(duration.total_seconds())
        session = Session(
            access_key=AccessKey.new(role.account_id, "ASIA"),
            account_id=role.account_id,
            role_name=role.name,
            role_id=role.role_id,
            session_name=name,
            issued_at=call.now,
            expires_at=call.now + (self._session_lifetime() or duration),
            policy=policy,
            tags={**tags, **inherited},
            transitive_tag_keys=transitive,
            source_identity=source_identity,
        )
        user: Xml = {"AssumedRoleId": f"{role.role_id}:{name}", "Arn": session_arn(role.account_id, role.name, name)}
        answer = self._issued(call, session) | {"AssumedRoleUser": user}
        return answer | ({"SourceIdentity": source_identity} if source_identity is not None else {})

    def _authorized_role(
        self, call: Call, arn: str, params: Params, tags: dict[str, str], source_identity: str | None
    ) -> Role:
        """A role that does not exist is refused in the words of one that may not be assumed."""
        role = self._state.snapshot.roles.get(arn)
        if role is None or not role.exists(call.now):
            raise AwsError("AccessDenied", _denied(call, "sts:AssumeRole", arn), 403)
        call.audit.add_resource(Resource(role.account_id, ROLE_RESOURCE_TYPE, role.arn))
        context = condition_context(call, role.account_id)
        context |= {"sts:rolesessionname": (params.string("RoleSessionName"),), **tag_conditions(tags)}
        if (external_id := params.optional_string("ExternalId")) is not None:
            context["sts:externalid"] = (external_id,)
        if (seconds := params.optional_integer("DurationSeconds")) is not None:
            context["sts:durationseconds"] = (str(seconds),)
        if transitive := params.strings("TransitiveTagKeys"):
            context["sts:transitivetagkeys"] = tuple(transitive)
        if source_identity is not None:
            context["sts:sourceidentity"] = (source_identity,)
        actions = ["sts:AssumeRole"]
        actions += ["sts:TagSession"] if tags else []
        actions += ["sts:SetSourceIdentity"] if source_identity is not None else []
        for action in actions:
            self._authorize(call, role, action, context)
        return role

    @staticmethod
    def _authorize(call: Call, role: Role, action: str, context: dict[str, tuple[str, ...]]) -> None:
        caller, rights = call.caller.caller, role.rights.at(call.now)
        refusal = authorize(
            caller,
            action,
            role.arn,
            context,
            owner_account_id=role.account_id,
            resource_policy=parse_policy(rights.trust_policy, PolicyKind.TRUST),
            binding=rights.trust_binding,
        )
        if refusal is None:
            return
        # About its own policies the caller is told; about a foreign trust policy it is not.
        own = "resource-based" not in refusal.sentence or caller.account_id == role.account_id
        denied = _denied(call, action, role.arn)
        raise AwsError("AccessDenied", f"{denied} {refusal.sentence}" if own else denied, 403)

    @staticmethod
    def _duration(call: Call, params: Params, role: Role) -> dt.timedelta:
        seconds = params.optional_integer("DurationSeconds") or _DEFAULT_ROLE_SESSION_S
        if call.caller.session is not None and seconds > MAX_CHAINED_SESSION_S:
            raise _refused(
                "The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining."
            )
        if seconds > role.max_session_s:
            raise _refused("The requested DurationSeconds exceeds the MaxSessionDuration set for this role.")
        return dt.timedelta(seconds=seconds)

    # ── users ──────────────────────────────────────────────────────────────────────────────────────────────────

    def get_caller_identity(self, call: Call, params: Params) -> Xml:
        """Needs no permission, as on AWS."""
        caller = call.caller.caller
        return {"Arn": caller.arn, "UserId": call.caller.user_id, "Account": caller.account_id}

    def get_session_token(self, call: Call, params: Params) -> Xml:
        """Needs no permission, and gives the user's own rights for a time."""
        duration = self._user_duration(call, params)
        call.audit.request_parameters = {"durationSeconds": int(duration.total_seconds())}
        _refuse_session(call)
        _refuse_absent(params, "GetSessionToken")
        caller = call.caller.caller
        session = UserSession(
            access_key=AccessKey.new(caller.account_id, "ASIA"),
            account_id=caller.account_id,
            user_name=call.caller.user_name,
            user_id=caller.unique_id,
            issued_at=call.now,
            expires_at=call.now + (self._session_lifetime() or duration),
        )
        return self._issued(call, session)

    def get_federation_token(self, call: Call, params: Params) -> Xml:
        name, policy, tags = (
            params.string("Name"),
            params.optional_string("Policy", maximum=_MAX_REQUEST_POLICY_SIZE_CHARACTERS),
            _tags(params),
        )
        duration = self._user_duration(call, params)
        logged = {"name": name, "durationSeconds": int(duration.total_seconds())}
        call.audit.request_parameters = logged | ({} if policy is None else {"policy": policy})
        _refuse_session(call)
        _check_policy(policy)
        _refuse_absent(params, "GetFederationToken")
        caller = call.caller.caller
        arn = federated_arn(caller.account_id, name)
        for action in ("sts:GetFederationToken", "sts:TagSession")[: 2 if tags else 1]:
            self._access.authorize_account(call, arn, action=action, more=tag_conditions(tags))
        session = UserSession(
            access_key=AccessKey.new(caller.account_id, "ASIA"),
            account_id=caller.account_id,
            user_name=call.caller.user_name,
            user_id=caller.unique_id,
            federated_name=name,
            issued_at=call.now,
            expires_at=call.now + (self._session_lifetime() or duration),
            policy=policy,
            tags=tags,
        )
        user: Xml = {"FederatedUserId": f"{caller.account_id}:{name}", "Arn": arn}
        return self._issued(call, session) | {"FederatedUser": user}

    def get_access_key_info(self, call: Call, params: Params) -> Xml:
        """The account is in the id itself, whether the key exists or not."""
        key = params.string("AccessKeyId")
        call.audit.request_parameters = {"accessKeyId": key}
        self._access.authorize_account(call)
        user = self._state.user_by_access_key(key)
        account_id = account_of_access_key(key) if user is None else user.account_id
        if account_id is None:
            raise _refused("Invalid Access Key ID.")
        return {"Account": account_id}

    @staticmethod
    def _user_duration(call: Call, params: Params) -> dt.timedelta:
        seconds = params.optional_integer("DurationSeconds") or _DEFAULT_USER_SESSION_S
        # "…defaults to one hour" for the account's root user, whatever it asked for (API reference).
        return dt.timedelta(seconds=min(seconds, _MAX_ROOT_SESSION_S) if call.caller.caller.is_root else seconds)

    # ── steps ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _issued(self, call: Call, session: Session | UserSession) -> Xml:
        key = session.access_key
        # AWS logs the session token as well; this log holds nothing that opens anything.
        call.audit.response_elements = {
            "credentials": {"accessKeyId": key.access_key_id, "expiration": event_time(session.expires_at)}
        }
        if isinstance(session, Session):
            call.audit.response_elements["assumedRoleUser"] = {
                "assumedRoleId": f"{session.role_id}:{session.session_name}",
                "arn": session_arn(session.account_id, session.role_name, session.session_name),
            }
        return {
            "Credentials": {
                "AccessKeyId": key.access_key_id,
                "SecretAccessKey": key.secret_access_key,
                "SessionToken": self._tokens.issue(session),
                "Expiration": session.expires_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            }
        }


def _denied(call: Call, action: str, arn: str) -> str:
    return f"User: {call.caller.caller.arn} is not authorized to perform: {action} on resource: {arn}"


def _refuse_session(call: Call) -> None:
    if call.caller.session is not None:
        raise AwsError("AccessDenied", f"Cannot call {call.action} with session credentials", 403)


def _refuse_absent(params: Params, operation: str) -> None:
    for member in ("PolicyArns", "ProvidedContexts"):
        if params.has(member):
            raise _refused(f"{member} of {operation} cannot be used here: there are no managed policies or contexts.")
    if params.has("SerialNumber") or params.has("TokenCode"):
        message = (
            "MultiFactorAuthentication failed, unable to validate MFA code.  Please verify your MFA serial number "
        )
        raise AwsError("AccessDenied", f"{message}is valid and associated with this user.", 403)


def _check_policy(document: str | None) -> None:
    if document is None:
        return
    if len(document) > _MAX_SESSION_POLICY_SIZE_CHARACTERS:
        raise AwsError("PackedPolicyTooLarge", "Packed size of session policy exceeds the quota.")
    try:
        parse_policy(document, PolicyKind.IDENTITY)
    except MalformedPolicyError as error:
        raise AwsError("MalformedPolicyDocument", str(error)) from None


def _tags(params: Params) -> dict[str, str]:
    given = [(str(tag["Key"]), str(tag["Value"])) for tag in params.objects("Tags")]
    if len({key.lower() for key, _ in given}) != len(given):
        raise AwsError(
            "InvalidParameterValue", "Duplicate tag keys found. Please note that Tag keys are case insensitive."
        )
    return dict(given)


def _inherited(call: Call, params: Params, tags: dict[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """(tags that come from the calling session, names of all that the new session passes on)."""
    chosen = params.strings("TransitiveTagKeys")
    own = {key.lower() for key in tags}
    if not {key.lower() for key in chosen} <= own:
        raise AwsError(
            "InvalidParameterValue", "The specified transitive tag key must be included in the requested tags."
        )
    session = call.caller.session
    if not isinstance(session, Session):
        return {}, tuple(chosen)
    inherited = {key: session.tags[key] for key in session.transitive_tag_keys if key in session.tags}
    if own & {key.lower() for key in inherited}:
        raise AwsError(
            "InvalidParameterValue",
            "One of the specified transitive tag keys can't be set because it conflicts with a transitive tag key from "
            "the calling session.",
        )
    return inherited, (*chosen, *inherited)


def _source_identity(call: Call, given: str | None) -> str | None:
    """It stays the same along a chain of roles."""
    session = call.caller.session
    if session is None or session.source_identity is None:
        return given
    if given not in (None, session.source_identity):
        raise AwsError("AccessDenied", "SourceIdentity cannot be changed from that of the calling session.", 403)
    return session.source_identity
