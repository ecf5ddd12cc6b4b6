"""Entra ID's side: discovery documents and the token endpoint (client credentials with secret or assertion).

Error answers as the Microsoft identity platform documents them ("Handling error codes in your application" and the
AADSTS list): `error`, `error_description` that starts with the AADSTS number, `error_codes`.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import jwt
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from customercloud.azure.identity import UUID_PATTERN, Application, ServicePrincipal
from customercloud.azure.state import AzureState
from customercloud.azure.tokens import KEY_VAULT_APP_ID, MAX_TOKEN_SIZE_BYTES, TokenAuthority

TOKEN_LIFETIME: Final = dt.timedelta(hours=1)
ASSERTION_TYPE: Final = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
ASSERTION_AUDIENCE: Final = "api://AzureADTokenExchange"
_ASSERTION_ALGORITHMS: Final = ["RS256", "ES256"]
_TENANT: Final = re.compile(UUID_PATTERN)


class EntraError(Exception):
    """A refusal; `code` is the AADSTS number."""

    def __init__(self, status: int, error: str, code: int, message: str) -> None:
        super().__init__(f"AADSTS{code}: {message}")
        self.status = status
        self.error = error
        self.code = code

    def body(self, request_id: str, now: dt.datetime) -> dict[str, Any]:
        timestamp = now.strftime("%Y-%m-%d %H:%M:%SZ")
        description = f"{self} Trace ID: {request_id} Correlation ID: {request_id} Timestamp: {timestamp}"
        return {
            "error": self.error,
            "error_description": description,
            "error_codes": [self.code],
            "timestamp": timestamp,
            "trace_id": request_id,
            "correlation_id": request_id,
        }


@dataclass(frozen=True, slots=True)
class Granted:
    principal: ServicePrincipal
    answer: dict[str, Any]


class Entra:
    """`lifetime` is that of tokens given from now on; None for the usual hour."""

    def __init__(
        self, state: AzureState, authority: TokenAuthority, lifetime: Callable[[], dt.timedelta | None]
    ) -> None:
        self._state = state
        self._authority = authority
        self._lifetime = lifetime

    # ── documents ──────────────────────────────────────────────────────────────────────────────────────────────

    def openid_configuration(self, origin: str, tenant_id: str) -> dict[str, Any]:
        self.require_tenant(tenant_id)
        base = f"{origin}/{tenant_id}"
        return {
            "issuer": f"{base}/v2.0",
            "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
            "token_endpoint": f"{base}/oauth2/v2.0/token",
            "jwks_uri": f"{base}/discovery/v2.0/keys",
            "token_endpoint_auth_methods_supported": ["client_secret_post", "private_key_jwt"],
            "response_types_supported": ["code"],
            "subject_types_supported": ["pairwise"],
            "id_token_signing_alg_values_supported": ["RS256"],
            "tenant_region_scope": "EU",
        }

    def jwks(self, tenant_id: str) -> dict[str, Any]:
        self.require_tenant(tenant_id)
        return self._authority.jwks()

    def require_tenant(self, tenant_id: str) -> None:
        if _TENANT.fullmatch(tenant_id) is None or tenant_id not in self._state.snapshot.tenants:
            raise EntraError(
                400,
                "invalid_tenant",
                90002,
                f"Tenant '{tenant_id[:64]}' not found. Check to make sure you have the correct tenant ID and are "
                "signing into the correct cloud.",
            )

    # ── tokens ─────────────────────────────────────────────────────────────────────────────────────────────────

    def token(self, tenant_id: str, form: Mapping[str, str], now: dt.datetime) -> Granted:
        """Raises EntraError. Who the caller is comes first, then what it asks for."""
        self.require_tenant(tenant_id)
        if form.get("grant_type") != "client_credentials":
            raise EntraError(400, "unsupported_grant_type", 70003, "The app requested an unsupported grant type.")
        client_id = form.get("client_id", "")
        application = self._state.snapshot.applications.get(client_id)
        principal = self._state.principal_of(client_id, tenant_id)
        if application is None or principal is None:
            raise EntraError(
                400,
                "unauthorized_client",
                700016,
                f"Application with identifier '{client_id[:64]}' was not found in the directory '{tenant_id}'. This "
                "can happen if the application has not been installed by the administrator of the tenant or consented "
                "to by any user in the tenant. You may have sent your authentication request to the wrong tenant.",
            )
        self._authenticate(application, form, now)
        if not principal.enabled:
            raise EntraError(
                401, "unauthorized_client", 7000112, f"Application '{client_id}'({application.name}) is disabled."
            )
        audience = _audience(form)
        lifetime = self._lifetime() or TOKEN_LIFETIME
        seconds = int(lifetime.total_seconds())
        answer = {
            "token_type": "Bearer",
            "expires_in": seconds,
            "ext_expires_in": seconds,
            "access_token": self._authority.mint(principal, audience, now, lifetime),
        }
        return Granted(principal, answer)

    def _authenticate(self, application: Application, form: Mapping[str, str], now: dt.datetime) -> None:
        if "client_assertion" in form:
            self._check_assertion(application, form, now)
            return
        value = form.get("client_secret")
        if not value:
            raise EntraError(
                401,
                "invalid_client",
                7000218,
                "The request body must contain the following parameter: 'client_assertion' or 'client_secret'.",
            )
        secret = application.secret(value)
        if secret is None:
            raise EntraError(
                401,
                "invalid_client",
                7000215,
                "Invalid client secret provided. Ensure the secret being sent in the request is the client secret "
                f"value, not the client secret ID, for a secret added to app '{application.client_id}'.",
            )
        if secret.expires_at is not None and now >= secret.expires_at:
            raise EntraError(
                401,
                "invalid_client",
                7000222,
                f"The provided client secret keys for app '{application.client_id}' are expired.",
            )

    def _check_assertion(self, application: Application, form: Mapping[str, str], now: dt.datetime) -> None:
        """Workload identity federation: a token of another issuer that the application trusts."""
        assertion = form["client_assertion"]
        malformed = EntraError(400, "invalid_request", 50027, "JWT token is invalid or malformed.")
        if form.get("client_assertion_type") != ASSERTION_TYPE or len(assertion) > MAX_TOKEN_SIZE_BYTES:
            raise malformed
        try:
            claims = jwt.decode(assertion, options={"verify_signature": False}, algorithms=_ASSERTION_ALGORITHMS)
        except (jwt.PyJWTError, ValueError):
            raise malformed from None
        subject = (claims.get("iss"), claims.get("sub"))
        trusted = next((c for c in application.federated if (c.issuer, c.subject) == subject), None)
        if trusted is None or claims.get("aud") not in (ASSERTION_AUDIENCE, [ASSERTION_AUDIENCE]):
            raise EntraError(
                401,
                "invalid_client",
                700213,
                "No matching federated identity record found for presented assertion subject "
                f"'{str(claims.get('sub'))[:128]}'.",
            )
        try:
            jwt.decode(
                assertion,
                load_pem_public_key(trusted.public_key_pem.encode()),  # type: ignore[arg-type]
                algorithms=_ASSERTION_ALGORITHMS,
                options={"verify_exp": False, "verify_nbf": False, "verify_iat": False, "verify_aud": False},
            )
        except (jwt.PyJWTError, ValueError, TypeError):
            raise EntraError(
                401, "invalid_client", 700027, "The signature of the client assertion is not valid."
            ) from None
        expires = claims.get("exp")
        if not isinstance(expires, int) or now.timestamp() >= expires:
            raise EntraError(401, "invalid_client", 700024, "Client assertion is not within its valid time range.")


def _audience(form: Mapping[str, str]) -> str:
    """The resource of `scope` (`<resource>/.default`) or, for the older endpoint, of `resource`."""
    resource = form.get("resource", "")
    scope = form.get("scope", "")
    if not resource:
        resource, marker, rest = scope.partition("/.default")
        if not marker or rest.strip() or not resource:
            raise EntraError(
                400,
                "invalid_scope",
                1002012,
                f"The provided value for scope {scope[:128]} is not valid. Client credential flows must have a scope "
                "value with /.default suffixed to the resource identifier (application ID URI).",
            )
    if resource == KEY_VAULT_APP_ID:
        return resource
    try:
        url = urlsplit(resource)
        known = url.scheme == "https" and bool(url.hostname) and url.path in ("", "/") and not url.query
    except ValueError:
        known = False
    if not known:
        raise EntraError(
            400,
            "invalid_resource",
            500011,
            f"The resource principal named {resource[:128]} was not found in the tenant.",
        )
    return resource.rstrip("/")
