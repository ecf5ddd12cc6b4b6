"""One request from bytes to bytes: which vault or tenant, who, what comes of it, the audit record before the answer.

    faults (outage, latency) → authentication → faults (throttling, errors) → authorisation → operation
    → audit log, durable → answer

Whatever was done is logged before it is answered; when the log cannot be written the answer is a server error. Requests
without a good token are logged too (`Authentication`), as the real service does: the first request of every SDK client
is one.

**Which vault.** The first label of the Host header, when the host is a name of several labels: `myvault.kv.example`
is the vault `myvault`. An IP address or a name of one label means the vault `default`, so that plain
https://127.0.0.1:port works (with the SDK's `verify_challenge_resource=False`: it otherwise wants the resource of the
challenge to be a parent of the host, which no address has). For a named vault the challenge's resource is the rest of
the host, so that the SDK's own check passes unchanged.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import json
import re
import uuid
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from customercloud.aws.service import HttpAnswer, Peer
from customercloud.aws.sigv4 import HttpRequest
from customercloud.aws.trail import Trail
from customercloud.azure import errors
from customercloud.azure.access import denial
from customercloud.azure.audit import Received, key_vault_record, service_record, sign_in_record
from customercloud.azure.bodies import Body
from customercloud.azure.bundles import key_id
from customercloud.azure.entra import Entra, EntraError
from customercloud.azure.errors import AzureError
from customercloud.azure.keys import Key
from customercloud.azure.operations import KeyCall, KeyOperations, Used, forget_loaded_keys
from customercloud.azure.routes import ABSENT_COLLECTIONS, COLLECTIONS, Route, route
from customercloud.azure.state import DEFAULT_VAULT, LOCATION, AzureState, Vault
from customercloud.azure.tokens import (
    KEY_VAULT_AUDIENCE,
    MAX_TOKEN_SIZE_BYTES,
    Caller,
    TokenAuthority,
    TokenError,
    claimed_app_id,
)
from customercloud.faults import ErrorKind, FaultInjector, Injected, Service
from shared.clock import Clock
from shared.telemetry import get_logger

_log = get_logger(__name__)

MAX_BODY_SIZE_BYTES: Final = 64 * 1024
API_VERSIONS: Final = ("2016-10-01", "7.0", "7.1", "7.2", "7.3", "7.4", "7.5", "7.6", "2025-07-01")
"""Those of Microsoft's own SDK. All are answered alike, so with members that the older ones did not have."""
JSON_TYPE: Final = "application/json; charset=utf-8"
_HOST: Final = re.compile(r"[A-Za-z0-9.-]{1,253}|\[[0-9a-fA-F:.]{2,45}\]")
_HTML_502: Final = b"<html><head><title>502 Bad Gateway</title></head><body>Bad Gateway</body></html>"

_FAULT_ANSWERS: Final = {
    ErrorKind.INTERNAL: (500, "InternalServerError", "An internal error occurred. (injected fault)"),
    ErrorKind.DEPENDENCY_TIMEOUT: (504, "GatewayTimeout", "The request timed out. (injected fault)"),
    ErrorKind.KEY_UNAVAILABLE: (503, "ServiceUnavailable", "The service is unavailable. (injected fault)"),
    ErrorKind.BAD_GATEWAY: (502, "BadGateway", "injected fault"),
}
_NO_VAULT: Final = AzureError(404, "VaultNotFound", "There is no key vault of this name here.")


class AzureEndpoint:
    """Every vault and every tenant behind one URL."""

    def __init__(self, state: AzureState, trail: Trail, faults: FaultInjector, clock: Clock) -> None:
        self._state = state
        self._trail = trail
        self._faults = faults
        self._clock = clock
        self._authority = TokenAuthority(state.snapshot.signing_key)
        self._entra = Entra(state, self._authority, self._token_lifetime)
        self._operations = KeyOperations(state, self.delay, self._transition)

    def delay(self) -> dt.timedelta:
        """How long a change that is made now takes to be seen."""
        return dt.timedelta(seconds=self._faults.faults.propagation_delay_s)

    def _transition(self) -> dt.timedelta:
        """How long a deletion or recovery that begins now is in progress."""
        return dt.timedelta(seconds=self._faults.faults.key_vault_transition_s)

    def _token_lifetime(self) -> dt.timedelta | None:
        seconds = self._faults.faults.session_lifetime_s
        return None if seconds is None else dt.timedelta(seconds=seconds)

    async def handle(self, request: HttpRequest, peer: Peer) -> HttpAnswer:
        """A body above MAX_BODY_SIZE_BYTES may be cut off after one byte more."""
        request_id = str(uuid.uuid4())
        is_vault = request.path.split("/")[1] in (*COLLECTIONS, *ABSENT_COLLECTIONS)
        service = Service.KEY_VAULT if is_vault else Service.ENTRA
        match await self._faults.before(service, self._claimed(request, service), peer.disconnected):
            case Injected.UNAVAILABLE:
                return HttpAnswer(503, {"content-type": "text/plain"}, b"Service Unavailable")
            case Injected.GONE:
                return HttpAnswer(499, {}, b"")
            case Injected.NOTHING:
                pass
        await self.housekeeping()
        if is_vault:
            return await self._vault_request(request, peer, request_id)
        return await self._entra_request(request, peer, request_id)

    def _claimed(self, request: HttpRequest, service: Service) -> str | None:
        if service is Service.ENTRA:
            return _form(request).get("client_id")
        return claimed_app_id(_bearer(request) or "")

    def _received(self, request: HttpRequest, peer: Peer, request_id: str, started: dt.datetime) -> Received:
        query = f"?{request.query}" if request.query else ""
        return Received(
            time=started,
            request_id=request_id,
            address=peer.address,
            user_agent=(request.header("user-agent") or "")[:1024],
            uri=f"{_origin(request)}{request.path}{query}"[:2048],
            api_version=_query(request).get("api-version", "")[:32],
            duration_ms=max(0, int((self._clock.now() - started).total_seconds() * 1000)),
        )

    # ── Key Vault ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _vault_request(self, request: HttpRequest, peer: Peer, request_id: str) -> HttpAnswer:
        started = self._clock.now()
        vault = self._state.snapshot.vaults.get(_vault_name(request))
        if vault is None:
            return _answer(request, request_id, _NO_VAULT.status, _NO_VAULT.body())
        operation, caller, used = "Authentication", None, Used()
        refusal: AzureError | None = None
        status, members = 500, None
        try:
            caller = self._authenticate(request, vault)
            wanted = route(request.method, request.path)
            operation = wanted.operation
            self._injected_refusal(Service.KEY_VAULT, caller.app_id)
            call = self._call(request, vault, wanted, used, started)
            self._authorize(caller, call)
            members = await self._operations.handlers[wanted.operation](call)
            status = 204 if members is None else 200
        except AzureError as error:
            refusal, status = error, error.status
        except OSError as error:
            _log.error("state cannot be written", operation=operation, exc_info=error)
            refusal = AzureError(500, "InternalServerError", "")
        record = key_vault_record(
            vault,
            self._received(request, peer, request_id, started),
            operation=operation,
            caller=caller,
            key_id=used.key_id,
            algorithm=used.algorithm,
            status=status,
            refusal=refusal,
        )
        await self._trail.append([record])
        if refusal is not None:
            return _refused(request, request_id, refusal)
        return _answer(request, request_id, status, b"" if members is None else json.dumps(members).encode())

    def _authenticate(self, request: HttpRequest, vault: Vault) -> Caller:
        resource = _challenge_resource(request)
        challenge = f'Bearer authorization="{_origin(request)}/{vault.tenant_id}", resource="{resource}"'
        token = _bearer(request)
        if token is None or len(token) > MAX_TOKEN_SIZE_BYTES:
            raise errors.unauthorized("AKV10000: Request is missing a Bearer or PoP token.", challenge)
        try:
            return self._authority.verify(
                token,
                tenant_id=vault.tenant_id,
                audiences=frozenset({KEY_VAULT_AUDIENCE, resource}),
                now=self._clock.now() + self._faults.skew(Service.KEY_VAULT, claimed_app_id(token)),
            )
        except TokenError as error:
            _log.warning("token not accepted", vault=vault.name, problem=str(error)[:64])
            detail = f'{challenge}, error="invalid_token"'
            raise errors.unauthorized(str(error), detail) from None

    def _call(self, request: HttpRequest, vault: Vault, wanted: Route, used: Used, now: dt.datetime) -> KeyCall:
        query = _query(request)
        version = query.get("api-version")
        if not version:
            raise errors.bad_parameter("api-version must be specified")
        if version not in API_VERSIONS:
            raise errors.bad_parameter(
                f"The specified version ({version[:64]}) is not recognized. Consider using the latest supported "
                f"version ({API_VERSIONS[-1]})."
            )
        if len(request.body) > MAX_BODY_SIZE_BYTES:
            raise AzureError(413, "BadParameter", "The request body is too large.\r\n")
        body = Body.parse(request.body) if request.method in ("POST", "PUT", "PATCH") else Body({})
        return KeyCall(_origin(request), vault, wanted, query, body, now, used)

    def _authorize(self, caller: Caller, call: KeyCall) -> None:
        """Before the key is looked up: who may not ask learns nothing of what there is."""
        access = call.vault.effective_access(caller.object_id, call.now)
        permission, name = call.route.permission, call.route.name
        if access.allows(caller.object_id, permission, name):
            return
        if name is not None:
            call.used.key_id = key_id(call.origin, name, call.route.version or None)
        scope = call.vault.resource_id + ("" if name is None else f"/keys/{name}")
        raise denial(
            access.mode,
            permission,
            app_id=caller.app_id,
            object_id=caller.object_id,
            issuer=caller.issuer,
            vault=call.vault.name,
            location=LOCATION,
            scope=scope,
        )

    def _injected_refusal(self, service: Service, app_id: str) -> None:
        if self._faults.throttles(service, app_id):
            raise errors.throttled()
        if kind := self._faults.fails(service, app_id):
            raise AzureError(*_FAULT_ANSWERS[kind])

    # ── Entra ID ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _entra_request(self, request: HttpRequest, peer: Peer, request_id: str) -> HttpAnswer:
        tenant_id, _, document = request.path.strip("/").partition("/")
        origin = _origin(request)
        try:
            match (request.method, document):
                case ("GET", "v2.0/.well-known/openid-configuration" | ".well-known/openid-configuration"):
                    return _json(request_id, 200, self._entra.openid_configuration(origin, tenant_id))
                case ("GET", "discovery/v2.0/keys" | "discovery/keys"):
                    return _json(request_id, 200, self._entra.jwks(tenant_id))
                case ("POST", "oauth2/v2.0/token" | "oauth2/token"):
                    return await self._token_request(request, peer, request_id, tenant_id)
                case _:
                    return _json(request_id, 404, {"error": "not_found"})
        except EntraError as error:
            return _json(request_id, error.status, error.body(request_id, self._clock.now()))

    async def _token_request(self, request: HttpRequest, peer: Peer, request_id: str, tenant_id: str) -> HttpAnswer:
        started = self._clock.now()
        form = _form(request)
        client_id = form.get("client_id", "")[:64]
        refusal: EntraError | None = None
        granted = None
        try:
            try:
                self._injected_refusal(Service.ENTRA, client_id)
            except AzureError as fault:
                if fault.status == 502:
                    return HttpAnswer(502, {"content-type": "text/html"}, _HTML_502)
                code = 90055 if fault.status == 429 else 90033
                raise EntraError(fault.status, "temporarily_unavailable", code, fault.message) from None
            granted = self._entra.token(tenant_id, form, started)
        except EntraError as error:
            refusal = error
        if tenant_id in self._state.snapshot.tenants:
            record = sign_in_record(
                self._received(request, peer, request_id, started),
                tenant_id=tenant_id,
                client_id=client_id,
                object_id=None if granted is None else granted.principal.object_id,
                code=0 if refusal is None else refusal.code,
                description="" if refusal is None else str(refusal),
            )
            await self._trail.append([record])
        if refusal is not None:
            answer = _json(request_id, refusal.status, refusal.body(request_id, started))
            if refusal.status == 429:
                answer.headers["retry-after"] = str(errors.RETRY_AFTER_S)
            return answer
        assert granted is not None  # noqa: S101 - it is, or there was a refusal
        return _json(request_id, 200, granted.answer)

    # ── what the service does by itself ────────────────────────────────────────────────────────────────────────

    async def housekeeping(self) -> None:
        """Purge and rotate what is due. Cheap when nothing is."""
        now = self._clock.now()
        for index in list(self._state.snapshot.keys):
            # Looked up anew: other requests run while a key is made or an entry is written.
            key = self._state.snapshot.keys.get(index)
            vault = self._state.snapshot.vaults[index.partition("/")[0]]
            if key is not None and key.is_due_for_purge(now):
                await self.purge(vault, key.name)
            elif key is not None and key.is_due_for_rotation(now):
                with contextlib.suppress(AzureError):  # deleted meanwhile
                    await self._rotate_if_due(vault, key, now)

    async def _rotate_if_due(self, vault: Vault, key: Key, now: dt.datetime) -> None:
        rotated = await self._operations.rotated(vault, key, now)
        if len(rotated.versions) == len(key.versions) + 1:  # else another request did it while this one made its key
            self._state.put_key(vault, rotated)
            await self._record_own(vault, "KeyRotateIfDue", f"{rotated.name}/{rotated.current.version}")

    async def purge(self, vault: Vault, name: str) -> None:
        """The end of the retention: the key is gone for good, and the log says so."""
        key = self._state.key(vault, name)
        if key is not None:
            self._state.purge_key(vault, key)
            forget_loaded_keys()
            await self._record_own(vault, "KeyPurge", key.name)

    async def _record_own(self, vault: Vault, operation: str, name: str) -> None:
        origin = f"https://{vault.name}.vault.azure.net"
        record = service_record(
            vault,
            operation=operation,
            key_id=f"{origin}/keys/{name}",
            now=self._clock.now(),
            request_id=str(uuid.uuid4()),
        )
        await self._trail.append([record])


# ── requests and answers ───────────────────────────────────────────────────────────────────────────────────────────


def _host(request: HttpRequest) -> tuple[str, str]:
    """(name or address, `:port` or nothing) as the client calls us; empty strings when it is no host at all."""
    try:
        parts = urlsplit(f"//{request.header('host') or ''}")
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        return "", ""
    name = parts.hostname or ""
    name = f"[{name}]" if ":" in name else name
    return (name, port) if _HOST.fullmatch(name) else ("", "")


def _origin(request: HttpRequest) -> str:
    return "https://" + "".join(_host(request))


def _labels(request: HttpRequest) -> tuple[str, str]:
    """(first label, the rest with the port) of a host of several labels; two empty strings for any other."""
    name, port = _host(request)
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        label, _, rest = name.partition(".")
        return (label, rest + port) if rest else ("", "")
    return "", ""


def _vault_name(request: HttpRequest) -> str:
    return _labels(request)[0] or DEFAULT_VAULT


def _challenge_resource(request: HttpRequest) -> str:
    rest = _labels(request)[1]
    return f"https://{rest}" if rest else KEY_VAULT_AUDIENCE


def _bearer(request: HttpRequest) -> str | None:
    scheme, _, token = (request.header("authorization") or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def _pairs(text: str) -> dict[str, str]:
    try:
        return dict(parse_qsl(text, max_num_fields=64))
    except ValueError:
        return {}


def _query(request: HttpRequest) -> dict[str, str]:
    return _pairs(request.query)


def _form(request: HttpRequest) -> Mapping[str, str]:
    return _pairs(request.body[:MAX_BODY_SIZE_BYTES].decode("utf-8", "replace"))


def _answer(request: HttpRequest, request_id: str, status: int, body: bytes) -> HttpAnswer:
    headers = {
        "cache-control": "no-cache",
        "x-ms-keyvault-region": LOCATION,
        "x-ms-keyvault-service-version": "1.9.2784.1",
        "x-ms-request-id": request_id,
        "x-content-type-options": "nosniff",
    }
    if body:
        headers["content-type"] = JSON_TYPE
    client_id = request.header("x-ms-client-request-id")
    if client_id is not None and len(client_id) <= 64 and client_id.isascii() and client_id.isprintable():
        headers["x-ms-client-request-id"] = client_id
    return HttpAnswer(status, headers, body)


def _refused(request: HttpRequest, request_id: str, refusal: AzureError) -> HttpAnswer:
    if refusal.status == 502:
        return HttpAnswer(502, {"content-type": "text/html"}, _HTML_502)
    answer = _answer(request, request_id, refusal.status, refusal.body())
    answer.headers.update(refusal.headers)
    return answer


def _json(request_id: str, status: int, members: dict[str, Any]) -> HttpAnswer:
    headers = {"content-type": JSON_TYPE, "cache-control": "no-store, no-cache", "x-ms-request-id": request_id}
    return HttpAnswer(status, headers, json.dumps(members).encode())
