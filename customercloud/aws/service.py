"""One request from bytes to bytes: which service, who, what comes of it, and the log entry before the answer.

    faults (outage, latency) → authentication → faults (throttling, errors) → operation → audit log, durable → answer

Whatever was done is logged before it is answered; when the log cannot be written the answer is a server error.
"""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from botocore.loaders import Loader

from customercloud.aws.access import KeyAccess
from customercloud.aws.authorization import Caller
from customercloud.aws.cloudtrail import (
    Authenticated,
    Call,
    api_call_record,
    recipients,
    service_record,
)
from customercloud.aws.errors import AwsError, server_error, throttled
from customercloud.aws.event_bridge import EventBridge
from customercloud.aws.identity import Session, SessionTokens, UserSession
from customercloud.aws.kms import KmsCrypto, Operation
from customercloud.aws.kms_admin import KmsAdmin
from customercloud.aws.kms_aliases import KmsAliases
from customercloud.aws.kms_elsewhere import KmsElsewhere
from customercloud.aws.kms_grants import KmsGrants
from customercloud.aws.kms_import import KmsImport
from customercloud.aws.kms_last_usage import KmsLastUsage
from customercloud.aws.kms_steps import KeySteps
from customercloud.aws.kms_tags import KmsTags
from customercloud.aws.lookup_events import LookupEvents
from customercloud.aws.params import Params
from customercloud.aws.query import members_of, parse_form, xml_answer, xml_error
from customercloud.aws.sigv4 import (
    Authorization,
    HttpRequest,
    SignatureError,
    SignatureProblem,
    parse_authorization,
    verify,
)
from customercloud.aws.state import AwsState
from customercloud.aws.sts import Sts
from customercloud.aws.sts_elsewhere import UNSIGNED, StsElsewhere, refuse_unsigned
from customercloud.aws.trail import Trail
from customercloud.aws.trails import Trails
from customercloud.aws.validation import ServiceModel
from customercloud.faults import FaultInjector, Injected, Service
from shared.clock import Clock
from shared.telemetry import get_logger

_log = get_logger(__name__)

JSON_TYPE: Final = "application/x-amz-json-1.1"
FORM_TYPE: Final = "application/x-www-form-urlencoded"
TARGETS: Final = {
    "TrentService": Service.KMS,
    "com.amazonaws.cloudtrail.v20131101.CloudTrail_20131101": Service.CLOUDTRAIL,
}
_HTML_502: Final = b"<html><head><title>502 Bad Gateway</title></head><body>Bad Gateway</body></html>"

# (code in the JSON services, code in STS)
_SIGNATURE_CODES: Final = {
    SignatureProblem.MISSING: ("MissingAuthenticationTokenException", "MissingAuthenticationToken"),
    SignatureProblem.INCOMPLETE: ("IncompleteSignatureException", "IncompleteSignature"),
    SignatureProblem.SCOPE: ("InvalidSignatureException", "SignatureDoesNotMatch"),
    SignatureProblem.SKEW: ("InvalidSignatureException", "SignatureDoesNotMatch"),
    SignatureProblem.MISMATCH: ("InvalidSignatureException", "SignatureDoesNotMatch"),
}


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Peer:
    """What the transport knows about the client."""

    address: str
    secure_transport: bool
    disconnected: Callable[[], Awaitable[None]]
    """Returns when the client hangs up; never, if it does not."""


class AwsEndpoint:
    """All services of one region behind one URL, as SDKs reach them with `endpoint_url`."""

    def __init__(
        self,
        state: AwsState,
        tokens: SessionTokens,
        trail: Trail,
        events: EventBridge,
        faults: FaultInjector,
        clock: Clock,
    ) -> None:
        self._state = state
        self._events = events
        self._tokens = tokens
        self._trail = trail
        self._faults = faults
        self._clock = clock
        access = KeyAccess(state)
        steps = KeySteps(state, access, self.delay)
        self._models = {service: service_model(service) for service in (Service.KMS, Service.STS, Service.CLOUDTRAIL)}
        lookup = LookupEvents(trail, access, lambda: dt.timedelta(seconds=faults.faults.trail_delay_s))
        self._json_operations: dict[Service, dict[str, Operation]] = {
            Service.KMS: KmsCrypto(access).operations
            | KmsAdmin(state, access, steps).operations
            | KmsAliases(state, access, self.delay).operations
            | KmsGrants(state, access, steps).operations
            | KmsImport(steps).operations
            | KmsTags(steps).operations
            | KmsLastUsage(trail, steps).operations
            | KmsElsewhere(access, steps).operations,
            Service.CLOUDTRAIL: lookup.operations | Trails(self._models[Service.CLOUDTRAIL], access).operations,
        }
        sts = Sts(state, access, tokens, self._session_lifetime)
        self._sts_operations = sts.operations | StsElsewhere(access).operations

    def delay(self) -> dt.timedelta:
        """How long decisions will still see what was before a change that is made now."""
        return dt.timedelta(seconds=self._faults.faults.propagation_delay_s)

    def _session_lifetime(self) -> dt.timedelta | None:
        seconds = self._faults.faults.session_lifetime_s
        return None if seconds is None else dt.timedelta(seconds=seconds)

    async def handle(self, request: HttpRequest, peer: Peer) -> HttpAnswer:
        request_id = str(uuid.uuid4())
        service, action = _route(request)
        claimed = _claimed_access_key(request)
        key_id = _named_key(service, request)
        match await self._faults.before(service, claimed, peer.disconnected, key_id):
            case Injected.UNAVAILABLE:
                return HttpAnswer(503, {"content-type": "text/plain"}, b"Service Unavailable")
            case Injected.GONE:
                return HttpAnswer(499, {}, b"")
            case Injected.NOTHING:
                pass
        await self.housekeeping()
        if service is None:
            error = AwsError("UnknownOperationException", "", 404)
            return _json_error(error, request_id)
        try:
            if service is Service.STS and action in UNSIGNED:
                refuse_unsigned(action, self._sts_params(action, request))
            caller = self._authenticate(request, service)
        except AwsError as error:
            _log.warning("request not authenticated", service=service.value, action=action[:64], code=error.code)
            return _error_answer(service, error, request_id)
        call = Call(
            service=service,
            action=action[:128],
            region=self._state.region,
            caller=caller,
            now=self._clock.now(),
            request_id=request_id,
            source_ip=peer.address,
            user_agent=(request.header("user-agent") or "")[:1024],
            secure_transport=peer.secure_transport,
        )
        answer = HttpAnswer(500, {}, b"")
        refused: AwsError | None = None
        try:
            self._injected_refusal(call, key_id)
            answer = self._execute(call, request)
        except AwsError as error:
            refused = error
        except OSError as error:
            _log.error("state cannot be written", action=action, exc_info=error)
            refused = server_error(service)
        await self._record(call, refused)
        return answer if refused is None else _error_answer(service, refused, request_id)

    def _execute(self, call: Call, request: HttpRequest) -> HttpAnswer:
        headers = {"x-amzn-requestid": call.request_id}
        if call.service is Service.STS:
            xml_operation = self._sts_operations.get(call.action)
            if xml_operation is None:
                version = parse_form(request.body).get("Version", "")
                message = f"Could not find operation {call.action[:64]} for version {version[:32] or 'NO_VERSION'}"
                raise AwsError("InvalidAction", message, 400)
            result = xml_operation(call, self._sts_params(call.action, request))
            return HttpAnswer(
                200, headers | {"content-type": "text/xml"}, xml_answer(call.action, result, call.request_id)
            )
        operation = self._json_operations[call.service].get(call.action)
        if operation is None:
            raise AwsError("UnknownOperationException", "", 400)
        params = Params.from_body(request.body)
        if call.action != "LookupEvents":  # has refusals of its own for what its model forbids
            self._models[call.service].validate(call.action, params.members)
        members = operation(call, params)
        body = b"" if members is None else json.dumps(members).encode()
        return HttpAnswer(200, headers | {"content-type": JSON_TYPE}, body)

    def _sts_params(self, action: str, request: HttpRequest) -> Params:
        """Raises AwsError for what the operation's model does not allow."""
        model = self._models[Service.STS]
        members = members_of(model, action, parse_form(request.body))
        model.validate(action, members)
        return Params(members)

    def _injected_refusal(self, call: Call, key_id: str | None) -> None:
        if self._faults.throttles(call.service, call.caller.access_key_id, key_id):
            raise throttled(call.service)
        if kind := self._faults.fails(call.service, call.caller.access_key_id, key_id):
            raise server_error(call.service, kind, "injected fault")

    # ── who ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _authenticate(self, request: HttpRequest, service: Service) -> Authenticated:
        """Raises AwsError in the service's own words."""
        sts = service is Service.STS
        status = 403 if sts else 400
        unknown = AwsError(
            "InvalidClientTokenId" if sts else "UnrecognizedClientException",
            "The security token included in the request is invalid.",
            status,
        )
        try:
            authorization = parse_authorization(request)
            caller, secret = self._credentials(request, authorization, unknown)
            now = self._clock.now() + self._faults.skew(service, caller.access_key_id)
            verify(request, authorization, secret, region=self._state.region, service=service.value, now=now)
        except SignatureError as error:
            raise AwsError(_SIGNATURE_CODES[error.problem][sts], error.detail, status) from None
        # After the signature: whoever only found a token learns nothing from it.
        if caller.session is not None and now >= caller.session.expires_at:
            raise AwsError(
                "ExpiredToken" if sts else "ExpiredTokenException",
                "The security token included in the request is expired",
                status,
            )
        return caller

    def _credentials(
        self, request: HttpRequest, authorization: Authorization, unknown: AwsError
    ) -> tuple[Authenticated, str]:
        """The caller that the access key and session token stand for, and the secret that must have signed."""
        token, now = request.header("x-amz-security-token"), self._clock.now()
        if token is None:
            user = self._state.user_by_access_key(authorization.access_key_id)
            if user is None or not user.exists(now):
                raise unknown
            key = user.access_key
            return Authenticated(user.caller(now), key.access_key_id, user.name, None), key.secret_access_key
        session = self._tokens.open(token)
        if session is None or session.access_key.access_key_id != authorization.access_key_id:
            raise unknown
        caller = self._session_caller(session, now)
        if caller is None:
            raise unknown
        key = session.access_key
        name = session.role_name if isinstance(session, Session) else session.user_name
        return Authenticated(caller, key.access_key_id, name, session), key.secret_access_key

    def _session_caller(self, session: Session | UserSession, now: dt.datetime) -> Caller | None:
        """With the rights that its role or user has now; None when that is gone."""
        if isinstance(session, Session):
            role = self._state.role_by_id(session.role_id)
            return role.caller(session, now) if role is not None and role.exists(now) else None
        user = self._state.user_by_id(session.user_id)
        if user is None or not user.exists(now):
            return None
        return user.caller(now) if session.federated_name is None else user.federated_caller(session, now)

    # ── what is written down ───────────────────────────────────────────────────────────────────────────────────

    async def _record(self, call: Call, error: AwsError | None) -> None:
        refusal = None if error is None else (error.code, error.message)
        accounts = recipients(call, refusal and refusal[0])
        shared_id = str(uuid.uuid4()) if len(accounts) > 1 else None
        records = [
            api_call_record(
                call,
                region=self._state.region,
                recipient=account,
                error=refusal,
                event_id=str(uuid.uuid4()),
                shared_id=shared_id,
            )
            for account in accounts
        ]
        await self._trail.append(records)
        self._events.publish(records)

    async def housekeeping(self) -> None:
        """What KMS does by itself when its time has come: destroy keys and imported material, rotate keys. Cheap when
        nothing is due."""
        now = self._clock.now()
        for key_id in list(self._state.snapshot.keys):
            # Looked up anew: other requests run while an entry is written.
            key = self._state.snapshot.keys.get(key_id)
            if key is not None and key.is_due_for_destruction(now):
                await self.destroy_key(key_id)
            elif key is not None and key.has_expired_material(now):
                self._state.put_key(key.without_material())
                details = {"keyId": key.key_id}
                await self._record_service_event("DeleteExpiredKeyMaterial", key.account_id, key.arn, details)
            elif key is not None and (rotated := key.automatic_rotation(now, self.delay())):
                self._state.put_key(rotated)
                details = {"keyId": key.key_id, "rotationType": "AUTOMATIC"}
                await self._record_service_event("RotateKey", key.account_id, key.arn, details)

        for grant in list(self._state.snapshot.grants.values()):
            if grant.ends_at is not None and now >= grant.ends_at:
                self._state.remove_grant(grant)
        for user in list(self._state.snapshot.users.values()):
            if not user.exists(now):
                self._state.remove_user(user)
        for role in list(self._state.snapshot.roles.values()):
            if not role.exists(now):
                self._state.remove_role(role)
        for alias in list(self._state.snapshot.aliases.values()):
            if not alias.is_listed and alias.target(now) is None:
                self._state.remove_alias(alias)

    async def destroy_key(self, key_id: str) -> None:
        """The end of the waiting period: the material is gone for good, and the log says so (`DeleteKey`)."""
        key = self._state.snapshot.keys.get(key_id)
        if key is None:
            return
        self._state.destroy_key(key)
        await self._record_service_event("DeleteKey", key.account_id, key.arn, {"keyId": key.key_id})

    async def _record_service_event(self, name: str, account_id: str, key_arn: str, details: dict[str, Any]) -> None:
        record = service_record(
            name,
            region=self._state.region,
            account_id=account_id,
            key_arn=key_arn,
            now=self._clock.now(),
            event_id=str(uuid.uuid4()),
            request_id=str(uuid.uuid4()),
            details=details,
        )
        await self._trail.append([record])
        self._events.publish([record])


@cache
def service_model(service: Service) -> ServiceModel:
    """From the installed botocore: the same file that boto3 builds its client of."""
    code = "ValidationError" if service is Service.STS else "ValidationException"
    return ServiceModel(Loader().load_service_model(service.value, "service-2"), code)


def _route(request: HttpRequest) -> tuple[Service | None, str]:
    """(service, action) that the request is for; no service when it cannot be told."""
    prefix, dot, action = (request.header("x-amz-target") or "").rpartition(".")
    if dot:
        return TARGETS.get(prefix), action
    if (request.header("content-type") or "").startswith(FORM_TYPE):
        try:
            return Service.STS, parse_form(request.body).get("Action", "")
        except AwsError:
            return Service.STS, ""
    return None, ""


def _named_key(service: Service | None, request: HttpRequest) -> str | None:
    """The id of the key that a KMS request names, by id or ARN, as far as that can be told; for faults only."""
    if service is not Service.KMS:
        return None
    try:
        body = json.loads(request.body)
    except (ValueError, RecursionError):
        return None
    named = body.get("KeyId", body.get("SourceKeyId")) if isinstance(body, dict) else None
    return named.rpartition("/")[2] if isinstance(named, str) else None


def _claimed_access_key(request: HttpRequest) -> str | None:
    try:
        return parse_authorization(request).access_key_id
    except SignatureError:
        return None


def _error_answer(service: Service, error: AwsError, request_id: str) -> HttpAnswer:
    if error.http_status == 502:
        return HttpAnswer(502, {"content-type": "text/html"}, _HTML_502)
    if service is Service.STS:
        headers = {"content-type": "text/xml", "x-amzn-requestid": request_id}
        return HttpAnswer(error.http_status, headers, xml_error(error, request_id))
    return _json_error(error, request_id)


def _json_error(error: AwsError, request_id: str) -> HttpAnswer:
    headers = {"content-type": JSON_TYPE, "x-amzn-requestid": request_id, "x-amzn-errortype": error.code}
    # AWS leaves an empty message out.
    body = {"__type": error.code} | ({"message": error.message} if error.message else {})
    return HttpAnswer(error.http_status, headers, json.dumps(body).encode())
