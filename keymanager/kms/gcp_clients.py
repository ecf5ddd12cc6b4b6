"""The SDK's clients for one Google key configuration: our own identity, the account that it impersonates, and KMS.

**REST, not gRPC**, though gRPC is the SDK's default. Measured against customercloud over TLS on one machine of 2 cores
an unwrap takes about 12 ms over REST and 7 ms over gRPC: at a call a second that decides nothing. What does: a gRPC
channel that lost its peer reconnects on a timer of its own (up to two minutes) and answers UNAVAILABLE meanwhile
without asking anybody, so an outage would seem to last longer than it does; it cannot bound connecting and reading
apart; and it brings threads and a resolver of its own into a process that holds keys. Over REST a request is a request.

Blocking: everything here runs in the adapter's threads.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import google.auth
import google.auth.credentials
import google.auth.transport.requests
import requests
from google.auth import impersonated_credentials
from google.cloud import kms_v1
from google.cloud.kms_v1.services.key_management_service.transports import KeyManagementServiceRestTransport
from google.oauth2 import service_account
from requests.adapters import HTTPAdapter

from keymanager.kms.calls import DEFAULT_LIMITS, CallLimits
from shared.errors import InvalidInputError

KEY_NAME: Final = (
    r"projects/[a-z][a-z0-9-]{4,28}[a-z0-9]/locations/[a-z0-9-]{1,63}"
    r"/keyRings/[a-zA-Z0-9_-]{1,63}/cryptoKeys/[a-zA-Z0-9_-]{1,63}"
)
REQUEST_REASON: Final = "x-goog-request-reason"
_KMS_URL: Final = "https://cloudkms.googleapis.com"
_IAM_URL: Final = "https://iamcredentials.googleapis.com"
_KMS_SCOPE: Final = "https://www.googleapis.com/auth/cloudkms"
_CLOUD_SCOPE: Final = "https://www.googleapis.com/auth/cloud-platform"
_MAX_ERROR_SIZE_BYTES: Final = 64 * 1024

# At DEBUG the SDK logs whole requests and answers, and in those are the keys.
logging.getLogger("google.cloud.kms_v1").setLevel(logging.INFO)


@dataclass(frozen=True, slots=True)
class GoogleKmsConfig:
    """One key configuration. Raises InvalidInputError for a name that is no crypto key's: a version would pin it."""

    key_name: str
    service_account: str | None = None
    """Of the customer; None uses our own identity as it is."""
    session_duration_s: int = 900
    """Of an impersonated token. It outlives the account's policy, so this bounds how long a withdrawn trust can go
    unnoticed; a changed key policy or key state is noticed at the next call."""
    credentials_file: Path | None = None
    """Key of our own service account; None for Application Default Credentials (metadata server, federation, …).

    No other kind of file: those can name any address as the one to ask for tokens."""
    kms_endpoint_url: str | None = None
    iam_endpoint_url: str | None = None
    ca_bundle: Path | None = None
    """PEM file of trusted roots; None for the SDK's own."""
    limits: CallLimits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        if not re.fullmatch(KEY_NAME, self.key_name):
            raise InvalidInputError("the key must be given as projects/…/locations/…/keyRings/…/cryptoKeys/…")
        if not 1 <= self.session_duration_s <= 3600:
            raise InvalidInputError("an impersonated token lives at most an hour")


class TokenEndedError(Exception):
    """KMS does not take the token any more (401)."""


class IdentityRefusedError(Exception):
    """A token was refused: that of the account to impersonate, or (no `request_id`) that of our own identity."""

    def __init__(self, http_status: int, body: bytes, request_id: str | None) -> None:
        super().__init__(f"HTTP {http_status}")
        self.http_status = http_status
        self.body = body
        self.request_id = request_id


@dataclass(frozen=True, slots=True)
class AccessToken:
    """No repr: whoever reads it can use the key for an hour."""

    value: str
    expires_at: datetime | None
    """None: it ends when KMS says so."""

    def __repr__(self) -> str:
        return f"AccessToken(…, expires_at={self.expires_at})"


class _SessionCredentials(google.auth.credentials.Credentials):
    """One token at a time. The adapter looks after it, so the SDK must not."""

    def refresh(self, request: Any) -> None:
        raise TokenEndedError


class _BoundedAdapter(HTTPAdapter):
    """Connections with our roots, our time limits and no retries, whatever the SDK asks for."""

    def __init__(self, config: GoogleKmsConfig) -> None:
        self._timeout = (config.limits.connect_timeout_s, config.limits.read_timeout_s)
        self._roots = None if config.ca_bundle is None else str(config.ca_bundle)
        super().__init__(pool_connections=2, pool_maxsize=config.limits.max_concurrency, max_retries=0)

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: object = None,
        verify: bool | str = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        roots = self._roots or verify
        return super().send(request, stream, timeout=self._timeout, verify=roots, cert=cert, proxies=proxies)


def _mount(session: Any, config: GoogleKmsConfig) -> None:
    session.mount("https://", _BoundedAdapter(config))
    session.mount("http://", _BoundedAdapter(config))


class _Transport(KeyManagementServiceRestTransport):
    def __init__(self, config: GoogleKmsConfig, credentials: _SessionCredentials) -> None:
        scheme, _, host = (config.kms_endpoint_url or _KMS_URL).rstrip("/").partition("://")
        super().__init__(host=host, url_scheme=scheme, credentials=credentials)
        _mount(self._session, config)


class _IdentityRequest(google.auth.transport.requests.Request):
    """How google-auth reaches the identity services. A refusal is raised at once: google-auth would retry some, and
    keeps the status of none."""

    def __init__(self, session: Any, impersonation_url: str, reason: str) -> None:
        super().__init__(session)
        self._impersonation_url = impersonation_url
        self._reason = reason

    def __call__(
        self,
        url: str,
        method: str = "GET",
        body: Any = None,
        headers: Any = None,
        timeout: Any = None,
        **options: Any,
    ) -> Any:
        impersonation = url == self._impersonation_url
        if impersonation:
            headers = {**(headers or {}), REQUEST_REASON: self._reason}
        response = super().__call__(url, method, body, headers, timeout, **options)  # type: ignore[no-untyped-call]
        if response.status != 200:
            data = bytes(response.data[:_MAX_ERROR_SIZE_BYTES])
            raise IdentityRefusedError(response.status, data, self._reason if impersonation else None)
        return response


class GoogleClients:
    """Thread-safe. Raises what the SDK raises, TokenEndedError, IdentityRefusedError."""

    def __init__(self, config: GoogleKmsConfig) -> None:
        self._config = config
        self._credentials = _SessionCredentials()  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()  # google-auth's credentials are not safe for concurrent refreshes
        self._session = requests.Session()
        _mount(self._session, config)
        self._own: Any = None
        self._kms: kms_v1.KeyManagementServiceClient | None = None
        iam = (config.iam_endpoint_url or _IAM_URL).rstrip("/")
        self._impersonation_url = f"{iam}/v1/projects/-/serviceAccounts/{config.service_account}:generateAccessToken"

    def new_token(self, reason: str) -> AccessToken:
        """Of the impersonated account, or of our own identity when none is named. `reason` stands in the log."""
        with self._lock:
            request = _IdentityRequest(self._session, self._impersonation_url, reason)
            credentials = self._load() if self._config.service_account is None else self._impersonated()
            credentials.refresh(request)
            # google-auth's expiry is UTC without saying so.
            expiry = credentials.expiry
            return AccessToken(credentials.token, None if expiry is None else expiry.replace(tzinfo=UTC))

    def kms(self, token: AccessToken) -> kms_v1.KeyManagementServiceClient:
        """The client, from now on with this token."""
        with self._lock:
            if self._kms is None:
                self._kms = kms_v1.KeyManagementServiceClient(transport=_Transport(self._config, self._credentials))
            self._credentials.token = token.value
            return self._kms

    def close(self) -> None:
        self._session.close()
        if self._kms is not None:
            self._kms.transport.close()  # type: ignore[no-untyped-call]

    def _load(self) -> Any:
        if self._own is None:
            path, scopes = self._config.credentials_file, [_CLOUD_SCOPE]
            if path is None:
                self._own, _ = google.auth.default(scopes=scopes)
            else:
                load: Callable[..., Any] = service_account.Credentials.from_service_account_file
                self._own = load(str(path), scopes=scopes)
        return self._own

    def _impersonated(self) -> Any:
        return impersonated_credentials.Credentials(  # type: ignore[no-untyped-call]
            source_credentials=self._load(),
            target_principal=self._config.service_account,
            target_scopes=[_KMS_SCOPE],
            lifetime=self._config.session_duration_s,
            iam_endpoint_override=self._impersonation_url,
        )
