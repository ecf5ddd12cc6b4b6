"""Microsoft's clients for one Azure key configuration: tokens of our application, and Key Vault with one token.

Blocking: everything here runs in the adapter's threads.

A token is fetched with a credential of its own, and the Key Vault client gets exactly that token: the SDKs' caches
would go on serving a token that the vault takes no more. It is handed out only for the scope and tenant that it was
fetched for, so a vault that asks for another one (a host that is not what it says) gets nothing.
"""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from azure.core.credentials import AccessToken, AccessTokenInfo, TokenRequestOptions
from azure.core.exceptions import AzureError, ClientAuthenticationError, ServiceRequestError, ServiceResponseError
from azure.core.pipeline import PipelineResponse
from azure.identity import ClientSecretCredential, WorkloadIdentityCredential
from azure.keyvault.keys import KeyClient

from keymanager.kms.calls import DEFAULT_LIMITS, CallLimits
from shared.errors import InvalidInputError

_KEY_VAULT_SCOPE: Final = "https://vault.azure.net/.default"
_KEY_NAME: Final = re.compile(r"[0-9A-Za-z-]{1,127}")
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class AzureKmsConfig:
    """One key configuration. Raises InvalidInputError for one that cannot be."""

    vault_url: str
    """https://<vault>.vault.azure.net, without a path."""
    key_name: str
    tenant_id: str
    """The customer's tenant, which the vault belongs to and in which our application has a service principal."""
    client_id: str
    """Our application."""
    client_secret: str | None = field(default=None, repr=False)
    federated_token_file: Path | None = None
    """Workload identity instead of a secret. Without either every call is AMBIGUOUS: `NoCredential`."""
    authority: str | None = None
    """https URL of the token service; None for Azure's public cloud."""
    disable_instance_discovery: bool = False
    """Do not ask login.microsoftonline.com whether it knows `authority`: needed for private and simulated clouds."""
    verify_challenge_resource: bool = True
    """False only where a vault is reached by address."""
    token_max_age_s: int = 900
    """A token outlives the principal (an hour or more), so this bounds how long a withdrawn principal can go unnoticed;
    withdrawn rights on the key are noticed at the next call."""
    ca_bundle: Path | None = None
    limits: CallLimits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        try:
            url = urlsplit(self.vault_url)
            good = url.scheme == "https" and bool(url.hostname) and self.vault_url == f"https://{url.netloc}"
        except ValueError:
            good = False
        if not good or "@" in self.vault_url or "\\" in self.vault_url:
            raise InvalidInputError("the vault's URL is https://<host>, without a path")
        if _KEY_NAME.fullmatch(self.key_name) is None:
            raise InvalidInputError("a key's name has 1 to 127 letters, digits and hyphens")
        if _UUID.fullmatch(self.tenant_id) is None or _UUID.fullmatch(self.client_id) is None:
            raise InvalidInputError("tenant and client id are UUIDs in lower case")


def scope_for(vault_url: str) -> str:
    """What a vault at this URL asks tokens for: the parent of its host (so the SDK verifies), or Azure's public cloud
    for an address or a bare name."""
    url = urlsplit(vault_url)
    host = url.hostname or ""
    with suppress(ValueError):
        ipaddress.ip_address(host)
        return _KEY_VAULT_SCOPE
    parent = url.netloc.partition(".")[2]
    return f"https://{parent}/.default" if parent else _KEY_VAULT_SCOPE


class NoTokenError(Exception):
    """The token service gave no token. What it said, as far as it said anything; never the secret."""

    def __init__(
        self, *, transport: str | None, http_status: int, error: str, codes: tuple[int, ...], request_id: str | None
    ) -> None:
        super().__init__(error)
        self.transport = transport
        """Name of the transport's error when there was no answer."""
        self.http_status = http_status
        self.error = error
        self.codes = codes
        self.request_id = request_id


@dataclass(frozen=True, slots=True)
class FetchedToken:
    value: str = field(repr=False)
    expires_at: datetime
    request_id: str
    scope: str
    tenant_id: str


class _HeldToken:
    """A TokenCredential with one token."""

    def __init__(self, token: FetchedToken) -> None:
        self._token = token

    def get_token_info(self, *scopes: str, options: TokenRequestOptions | None = None) -> AccessTokenInfo:
        tenant_id = (options or {}).get("tenant_id") or self._token.tenant_id
        if scopes != (self._token.scope,) or tenant_id != self._token.tenant_id:
            raise ClientAuthenticationError("the vault asks for a token of another scope or tenant")
        return AccessTokenInfo(self._token.value, int(self._token.expires_at.timestamp()))

    def get_token(
        self,
        *scopes: str,
        claims: str | None = None,
        tenant_id: str | None = None,
        enable_cae: bool = False,
        **kwargs: Any,
    ) -> AccessToken:
        options: TokenRequestOptions = {} if tenant_id is None else {"tenant_id": tenant_id}
        info = self.get_token_info(*scopes, options=options)
        return AccessToken(info.token, info.expires_on)


class AzureClients:
    """Thread-safe. Raises NoTokenError, and what the SDK raises."""

    def __init__(self, config: AzureKmsConfig) -> None:
        self._config = config
        self._transport: dict[str, Any] = {
            "connection_timeout": config.limits.connect_timeout_s,
            "read_timeout": config.limits.read_timeout_s,
            "retry_total": 0,
            "permit_redirects": False,
        }
        if config.ca_bundle is not None:
            self._transport["connection_verify"] = str(config.ca_bundle)

    def fetch_token(self) -> FetchedToken:
        responses: list[Any] = []

        def seen(response: PipelineResponse[Any, Any]) -> None:
            responses.append(response.http_response)

        scope = scope_for(self._config.vault_url)
        credential = self._credential(seen)
        try:
            token = credential.get_token_info(scope)
        except AzureError as error:
            raise _token_failure(error, responses[-1] if responses else None) from None
        finally:
            credential.close()
        return FetchedToken(
            value=token.token,
            expires_at=datetime.fromtimestamp(token.expires_on, UTC),
            request_id=_request_id(responses[-1]) or "unknown",
            scope=scope,
            tenant_id=self._config.tenant_id,
        )

    def _credential(self, seen: Any) -> ClientSecretCredential | WorkloadIdentityCredential:
        config = self._config
        common: dict[str, Any] = {
            **self._transport,
            "tenant_id": config.tenant_id,
            "client_id": config.client_id,
            "disable_instance_discovery": config.disable_instance_discovery,
            "raw_response_hook": seen,
        }
        if config.authority is not None:
            common["authority"] = config.authority
        if config.client_secret is not None:
            return ClientSecretCredential(client_secret=config.client_secret, **common)
        if config.federated_token_file is not None:
            return WorkloadIdentityCredential(token_file_path=str(config.federated_token_file), **common)
        raise NoTokenError(transport=None, http_status=0, error="NoCredential", codes=(), request_id=None)

    def key_client(self, token: FetchedToken) -> KeyClient:
        """Belongs to whoever asked for it, and is closed by them."""
        return KeyClient(
            self._config.vault_url,
            _HeldToken(token),
            verify_challenge_resource=self._config.verify_challenge_resource,
            **self._transport,
        )


def _token_failure(error: BaseException, response: Any) -> NoTokenError:
    """`response` is the last one of the token service, whatever it was about."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ServiceRequestError | ServiceResponseError):
            transport = type(cause).__name__
            return NoTokenError(transport=transport, http_status=0, error=transport, codes=(), request_id=None)
        cause = cause.__cause__ or cause.__context__
    status = 0 if response is None else int(response.status_code)
    members: Any = None
    if response is not None:
        with suppress(ValueError):
            members = response.json()
    members = members if isinstance(members, dict) else {}
    codes = members.get("error_codes")
    numbers = tuple(c for c in codes if isinstance(c, int)) if isinstance(codes, list) else ()
    word = str(members.get("error", ""))[:64] or (f"HTTP {status}" if status >= 400 else type(error).__name__)
    name = f"AADSTS{numbers[0]}" if numbers else word
    return NoTokenError(
        transport=None, http_status=status, error=name, codes=numbers, request_id=response and _request_id(response)
    )


def _request_id(response: Any) -> str | None:
    request_id: str | None = response.headers.get("x-ms-request-id")
    return request_id
