"""One call, whatever carried it: who, what comes of it, and the log entry before the answer.

    faults (outage, latency) → authentication → reading → faults (throttling, errors) → operation → audit log → answer

Whatever was done is logged before it is answered; when the log cannot be written the answer is a server error.
"""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import Message

from customercloud.faults import ErrorKind, FaultInjector, Injected
from customercloud.google.access import Access
from customercloud.google.auditlog import MAX_REASON_SIZE_CHARACTERS, MAX_USER_AGENT_SIZE_CHARACTERS, Origin, record
from customercloud.google.call import Api, Call, LogType, Operation, Principal
from customercloud.google.entries import Entries
from customercloud.google.errors import Code, GoogleError, error_info, throttled, unauthenticated
from customercloud.google.iam import audits
from customercloud.google.identity import Project
from customercloud.google.keys import Key, State
from customercloud.google.kms_admin import KmsAdmin
from customercloud.google.kms_crypto import KmsCrypto
from customercloud.google.kms_elsewhere import KmsElsewhere
from customercloud.google.names import ProjectName, ServiceAccountName
from customercloud.google.oauth import Impersonation, OAuthAnswer, TokenEndpoint
from customercloud.google.policies import Locations, Policies
from customercloud.google.state import GoogleState
from customercloud.google.tokens import AccessTokens, Problem, TokenError, verify_assertion
from shared.clock import Clock
from shared.telemetry import get_logger

_log = get_logger(__name__)

_FAULT_ERRORS: Final = {
    ErrorKind.INTERNAL: GoogleError(Code.INTERNAL, "Internal error encountered."),
    ErrorKind.DEPENDENCY_TIMEOUT: GoogleError(Code.DEADLINE_EXCEEDED, "The request timed out."),
    ErrorKind.KEY_UNAVAILABLE: GoogleError(Code.UNAVAILABLE, "The service is currently unavailable."),
}


class GatewayFaultError(Exception):
    """Something in front of the service answers instead of it. `http_status` 502, 503, or 499 when nobody listens."""

    def __init__(self, http_status: int) -> None:
        super().__init__(f"HTTP {http_status}")
        self.http_status = http_status


@dataclass(frozen=True, slots=True)
class Carrier:
    """What the transport knows about a request."""

    address: str
    headers: Mapping[str, str]
    """Lower-case names."""
    routed_to: str
    disconnected: Callable[[], Awaitable[None]]
    """Returns when the client hangs up; never, if it does not."""

    def origin(self) -> Origin:
        reason = self.headers.get("x-goog-request-reason")
        return Origin(
            self.address,
            self.headers.get("user-agent", "")[:MAX_USER_AGENT_SIZE_CHARACTERS],
            None if reason is None else reason[:MAX_REASON_SIZE_CHARACTERS],
        )


class GoogleEndpoint:
    """All APIs behind one address, as SDKs reach them with `api_endpoint`."""

    def __init__(
        self, state: GoogleState, tokens: AccessTokens, entries: Entries, faults: FaultInjector, clock: Clock
    ) -> None:
        self._state = state
        self._tokens = tokens
        self._entries = entries
        self._faults = faults
        self._clock = clock
        access = Access(state)
        policies = Policies(state, access)
        operations = [
            *KmsCrypto(access).operations,
            *KmsAdmin(state, access).operations,
            *KmsElsewhere(access).operations,
            *Locations(access).operations,
            *(operation for api in Api for operation in policies.operations(api) if api is not Api.CREDENTIALS),
            *Impersonation(state, access, tokens, self._token_lifetime).operations,
        ]
        self.operations = {(operation.api, operation.name): operation for operation in operations}
        self._token_endpoint = TokenEndpoint(state, tokens)

    def _token_lifetime(self) -> dt.timedelta | None:
        seconds = self._faults.faults.session_lifetime_s
        return None if seconds is None else dt.timedelta(seconds=seconds)

    async def invoke(self, operation: Operation, read: Callable[[], Message], carrier: Carrier) -> Message:
        """Raises GoogleError, or GatewayFaultError. `read` may raise GoogleError for a request that is none."""
        token = _bearer(carrier.headers.get("authorization", ""))
        await self._outage_and_latency(operation.api, self._claimed(token), carrier)
        try:
            self._housekeeping()
        except OSError as error:
            _log.error("state cannot be written", exc_info=error)
            raise GoogleError(Code.INTERNAL, "Internal error encountered.") from None
        try:
            principal = self._authenticate(token, operation.api)
        except TokenError as error:
            _log.warning("call not authenticated", method=operation.name, problem=error.problem.value)
            raise unauthenticated(error.problem.value, operation.api.domain) from None
        call = Call(
            principal=principal,
            now=self._clock.now(),
            delay=dt.timedelta(seconds=self._faults.faults.propagation_delay_s),
            routed_to=carrier.routed_to,
            admit=lambda: self._throttling_and_errors(operation.api, principal),
        )
        request = read()
        answer: Message | None = None
        refused = GoogleError(Code.INTERNAL, "Internal error encountered.")
        try:
            answer = operation.run(call, request)
        except GoogleError as error:
            refused = error
        except OSError as error:
            _log.error("state cannot be written", method=operation.name, exc_info=error)
        await self._record(operation, call, request, carrier, refused if answer is None else None)
        if answer is None:
            raise refused
        return answer

    async def exchange_token(self, body: bytes, carrier: Carrier) -> OAuthAnswer:
        """The token endpoint: not one of the APIs, and in nobody's audit log. Raises GatewayFaultError."""
        await self._outage_and_latency(Api.CREDENTIALS, None, carrier)
        now = self._clock.now()
        return self._token_endpoint.exchange(body, now, now + self._faults.skew(Api.CREDENTIALS.service, None))

    # ── faults ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _outage_and_latency(self, api: Api, claimed: str | None, carrier: Carrier) -> None:
        match await self._faults.before(api.service, claimed, carrier.disconnected):
            case Injected.UNAVAILABLE:
                raise GatewayFaultError(503)
            case Injected.GONE:
                raise GatewayFaultError(499)
            case Injected.NOTHING:
                pass

    def _throttling_and_errors(self, api: Api, principal: Principal) -> None:
        """After authorisation, so that the refusal stands in the log of whose key it was."""
        if self._faults.throttles(api.service, principal.email):
            raise throttled(api.domain, principal.project_id)
        kind = self._faults.fails(api.service, principal.email)
        if kind is ErrorKind.BAD_GATEWAY:
            raise GatewayFaultError(502)
        if kind is not None:
            raise _FAULT_ERRORS[kind]

    # ── who ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _claimed(self, token: str | None) -> str | None:
        """Whose token it is, as far as that can be told without looking at the clock."""
        try:
            return None if token is None else self._tokens.open(token).email
        except TokenError:
            return None

    def _authenticate(self, token: str | None, api: Api) -> Principal:
        """Raises TokenError; GoogleError for a token of another scope."""
        if token is None:
            raise TokenError(Problem.MISSING)
        if token.startswith("eyJ"):
            audience = f"https://{api.domain}/"
            now = self._clock.now() + self._faults.skew(api.service, self._claimed(token))
            said = verify_assertion(token, audience, self._state.snapshot.accounts.get, now, or_scopes=True)
            if said.scopes:
                _require_scope(api, said.scopes)
            account = said.account
            return Principal(account.email, account.unique_id, account.project_id, None)
        claims = self._tokens.open(token)
        if self._clock.now() + self._faults.skew(api.service, claims.email) >= claims.expires_at:
            raise TokenError(Problem.EXPIRED)
        found = self._state.snapshot.accounts.get(claims.email)
        if found is None or found.unique_id != claims.unique_id:
            raise TokenError(Problem.ACCOUNT)
        _require_scope(api, claims.scopes)
        return Principal(found.email, found.unique_id, found.project_id, claims.delegate)

    # ── what is written down ───────────────────────────────────────────────────────────────────────────────────

    async def _record(
        self, operation: Operation, call: Call, request: Message, carrier: Carrier, error: GoogleError | None
    ) -> None:
        """Into the log of the project that the resource lies in. Raises GoogleError when the disk refuses."""
        resource, log = call.audit.resource, operation.log
        project = None if resource is None else self._state.snapshot.projects.get(resource.project)
        if resource is None or log is None or project is None:
            return
        if not self._is_logged(operation.api, log, call, project):
            return
        account = (
            self._state.snapshot.accounts.get(resource.email) if isinstance(resource, ServiceAccountName) else None
        )
        entry = record(
            operation,
            log,
            call,
            resource,
            request,
            carrier.origin(),
            error,
            unique_id=None if account is None else account.unique_id,
            insert_id=secrets.token_hex(8),
            received_at=self._clock.now(),
        )
        try:
            await self._entries.append(entry)
        except OSError as failure:
            _log.error("audit log cannot be written", method=operation.name, exc_info=failure)
            raise GoogleError(Code.INTERNAL, "Internal error encountered.") from None

    def _is_logged(self, api: Api, log: LogType, call: Call, project: Project) -> bool:
        """Activity always; data access as the audit configs of the project's policy say, or without any, its switch."""
        policy = self._state.policy(ProjectName(project.project_id))
        if log is LogType.ADMIN_WRITE:
            return True
        if policy is None or policy.audit_configs is None:
            return project.data_access_logs
        return audits(policy.audit_configs, api.domain, log.value, call.principal.member)

    def _housekeeping(self) -> None:
        """What KMS does by itself when its time has come: destroy versions, rotate keys. One write, if any."""
        now = self._clock.now()
        changed = []
        for key in self._state.snapshot.keys.values():
            due = [version for version in key.versions if version.is_due_for_destruction(now)]
            after = key.automatic_rotation(now) or key
            for version in due:
                after = after.with_version(version.destroyed(now))
            if after is not key:
                changed.append(after)
        if changed:
            self._state.put_keys(*changed)

    def destroy_now(self, key: Key) -> None:
        """End the waiting period of every version of the key that is scheduled for destruction."""
        now = self._clock.now()
        after = key
        for version in key.versions:
            if version.state is State.DESTROY_SCHEDULED:
                after = after.with_version(version.destroyed(now))
        self._state.put_keys(after)


def _require_scope(api: Api, scopes: Collection[str]) -> None:
    if api.scopes.isdisjoint(scopes):
        raise GoogleError(
            Code.PERMISSION_DENIED,
            "Request had insufficient authentication scopes.",
            error_info("ACCESS_TOKEN_SCOPE_INSUFFICIENT", "googleapis.com", service=api.domain),
        )


def _bearer(header: str) -> str | None:
    scheme, _, token = header.partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
