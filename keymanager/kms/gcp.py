"""Google Cloud KMS through google-cloud-kms, as a service account of the customer's project.

Our own identity impersonates the account; the token is shared and renewed as `sessions` says. The encryption context is
the additional authenticated data, in its canonical bytes. Google's log does not show it.

Cloud KMS makes no data keys: a KEK is random bytes of our own, encrypted. Checksums (CRC32C) go with every request, are
required to have been verified, and are checked on every answer.

**Joining with the customer's log.** Cloud Audit Logs give a record an `insertId` that the caller never learns, and
Google's answers carry no request id. The only value of the caller's choosing that the log keeps for each call is the
`X-Goog-Request-Reason` header: `protoPayload.requestMetadata.requestAttributes.reason`. So every request is given a
reason of its own, a random id, and that is its request id here. (The user agent is kept, too, but belongs to the client
and not to the call.) Uses of keys stand in the data access log, which the customer must have enabled.

Limits of Python: the SDK hands the plaintext over as immutable bytes (and the JSON and base64 text they came in), which
cannot be wiped; they are dropped at once and only the SecretKey is kept.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, Final, TypeVar

import google.api_core.exceptions as api_errors
import google.auth.exceptions as auth_errors
import google_crc32c
import requests.exceptions as http_errors
from google.cloud import kms_v1
from google.protobuf import json_format

from keymanager.kms.base import (
    Classification,
    Destruction,
    GeneratedKek,
    Hold,
    KeyDescription,
    KeyState,
    KmsCallObserver,
    KmsError,
    Verdict,
    WrappedKek,
    generated_here,
    rewrapped_here,
)
from keymanager.kms.calls import Answer, KmsCalls
from keymanager.kms.gcp_clients import (
    REQUEST_REASON,
    AccessToken,
    GoogleClients,
    GoogleKmsConfig,
    IdentityRefusedError,
    TokenEndedError,
)
from keymanager.kms.gcp_verdicts import (
    CREDENTIALS_ENDED,
    GENERATE_ACCESS_TOKEN,
    OWN_TOKEN,
    UNAUTHENTICATED,
    classify,
    parse_error,
)
from keymanager.kms.sessions import Sessions
from shared.clock import Clock
from shared.crypto.context import EncryptionContext
from shared.crypto.secret import SecretKey

__all__ = ["GoogleKms", "GoogleKmsConfig"]

T = TypeVar("T")

_MAX_BLOB_SIZE_BYTES: Final = 64 * 1024
_VERSION_STATES: Final = kms_v1.CryptoKeyVersion.CryptoKeyVersionState
_KEY_STATES: Final[dict[int, KeyState]] = {
    _VERSION_STATES.ENABLED: KeyState.ENABLED,
    _VERSION_STATES.DISABLED: KeyState.DISABLED,
    _VERSION_STATES.DESTROY_SCHEDULED: KeyState.PENDING_DELETION,
}


class _DamagedAnswerError(Exception):
    """A checksum is missing or wrong, or the answer is for another key: not what KMS sent, or not to us."""


class GoogleKms:
    """KmsProvider for Google Cloud. Belongs to one event loop."""

    def __init__(
        self, config: GoogleKmsConfig, *, observer: KmsCallObserver | None = None, clock: Clock | None = None
    ) -> None:
        """Makes no call. `observer` hears of every request, those to the identity services included."""
        self._config = config
        self._calls = KmsCalls(
            "google-kms",
            _judge,
            config.limits,
            observer=observer,
            clock=clock,
        )
        self._clients = GoogleClients(config)
        self._sessions = Sessions(self._new_token, self._calls.clock)

    # ── what a provider does ───────────────────────────────────────────────────────────────────────────────────

    async def generate_kek(self, context: EncryptionContext) -> GeneratedKek:
        return await generated_here(self, context)

    async def wrap(self, secret: SecretKey, context: EncryptionContext) -> WrappedKek:
        return await self._in_time("Encrypt", lambda: self._encrypt(secret, context))

    async def unwrap(self, wrapped: bytes, context: EncryptionContext) -> SecretKey:
        return await self._in_time("Decrypt", lambda: self._decrypt(wrapped, context))

    async def rewrap(self, wrapped: bytes, context: EncryptionContext, hold: Hold | None = None) -> WrappedKek:
        return await rewrapped_here(self, wrapped, context, hold)

    async def describe(self) -> KeyDescription:
        """The state of the primary version, which is what wraps. Needs cloudkms.cryptoKeys.get."""

        def call(client: kms_v1.KeyManagementServiceClient, request_id: str) -> Answer[KeyDescription]:
            request = kms_v1.GetCryptoKeyRequest(name=self._config.key_name)
            key = client.get_crypto_key(request, retry=None, metadata=[(REQUEST_REASON, request_id)])
            version = key.primary.name.rpartition("/")[2] or None
            description = KeyDescription(
                key_id=key.name,
                state=_KEY_STATES.get(key.primary.state, KeyState.OTHER),
                key_version=version,
                deletion_date=key.primary.destroy_time,
            )
            return Answer(description, request_id, version)

        return await self._in_time("GetCryptoKey", lambda: self._call("GetCryptoKey", call))

    async def destruction(self) -> Destruction:
        """Every version: any of them may have wrapped. A key itself stays, as a name. Needs
        cloudkms.cryptoKeyVersions.list."""

        def call(client: kms_v1.KeyManagementServiceClient, request_id: str) -> Answer[Destruction]:
            request = kms_v1.ListCryptoKeyVersionsRequest(parent=self._config.key_name)
            versions = client.list_crypto_key_versions(request, retry=None, metadata=[(REQUEST_REASON, request_id)])
            states = {each.name.rpartition("/")[2]: _VERSION_STATES(each.state).name for each in versions}
            named = ", ".join(f"{version} {state}" for version, state in sorted(states.items())[:16])
            gone = bool(states) and set(states.values()) == {"DESTROYED"}
            evidence = f"ListCryptoKeyVersions: {len(states)} versions: {named} ({request_id})"
            return Answer(Destruction(gone, evidence), request_id, None)

        return await self._in_time("ListCryptoKeyVersions", lambda: self._call("ListCryptoKeyVersions", call))

    async def aclose(self) -> None:
        await self._calls.aclose()
        self._clients.close()

    # ── calls ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _encrypt(self, secret: SecretKey, context: EncryptionContext) -> WrappedKek:
        aad = context.to_aad()

        def call(client: kms_v1.KeyManagementServiceClient, request_id: str) -> Answer[WrappedKek]:
            # Protocol buffers take no memoryview: this copy lives until the request is sent.
            plaintext = secret.copied()
            request = kms_v1.EncryptRequest(
                name=self._config.key_name,
                plaintext=plaintext,
                plaintext_crc32c=_crc32c(plaintext),
                additional_authenticated_data=aad,
                additional_authenticated_data_crc32c=_crc32c(aad),
            )
            answer = client.encrypt(request, retry=None, metadata=[(REQUEST_REASON, request_id)])
            key, _, version = answer.name.rpartition("/cryptoKeyVersions/")
            verified = answer.verified_plaintext_crc32c and answer.verified_additional_authenticated_data_crc32c
            if not verified or answer.ciphertext_crc32c != _crc32c(answer.ciphertext) or key != self._config.key_name:
                raise _DamagedAnswerError
            return Answer(WrappedKek(answer.ciphertext, version), request_id, version)

        return await self._call("Encrypt", call)

    async def _decrypt(self, wrapped: bytes, context: EncryptionContext) -> SecretKey:
        """Which version it was the answer does not say. It names the key, so no other key's blob opens."""
        if not 1 <= len(wrapped) <= _MAX_BLOB_SIZE_BYTES:
            # A blob that the limits of KMS exclude is a damaged one.
            raise KmsError(Classification(Verdict.CORRUPT), operation="Decrypt", provider_code="ImpossibleBlobSize")
        aad = context.to_aad()

        def call(client: kms_v1.KeyManagementServiceClient, request_id: str) -> Answer[SecretKey]:
            request = kms_v1.DecryptRequest(
                name=self._config.key_name,
                ciphertext=wrapped,
                ciphertext_crc32c=_crc32c(wrapped),
                additional_authenticated_data=aad,
                additional_authenticated_data_crc32c=_crc32c(aad),
            )
            answer = client.decrypt(request, retry=None, metadata=[(REQUEST_REASON, request_id)])
            if answer.plaintext_crc32c != _crc32c(answer.plaintext):
                raise _DamagedAnswerError
            return Answer(SecretKey(answer.plaintext), request_id, None)

        return await self._call("Decrypt", call)

    async def _in_time(self, operation: str, work: Callable[[], Awaitable[T]]) -> T:
        """Raises KmsError and nothing else."""
        return await self._calls.in_time(operation, work)

    async def _call(self, operation: str, call: Callable[[kms_v1.KeyManagementServiceClient, str], Answer[T]]) -> T:
        async def attempt(token: AccessToken) -> T:
            return await self._calls.attempt(operation, lambda: call(self._clients.kms(token), _new_request_id()))

        return await self._sessions.use(attempt, CREDENTIALS_ENDED)

    async def _new_token(self) -> tuple[AccessToken, datetime | None]:
        impersonated = self._config.service_account is not None

        def fetch() -> Answer[AccessToken]:
            request_id = _new_request_id()
            return Answer(self._clients.new_token(request_id), request_id if impersonated else None, None)

        token = await self._calls.attempt(GENERATE_ACCESS_TOKEN if impersonated else OWN_TOKEN, fetch)
        return token, token.expires_at


def _new_request_id() -> str:
    return f"keylake-{uuid.uuid4()}"


def _crc32c(data: bytes) -> int:
    return int(google_crc32c.value(data))


def _judge(operation: str, error: Exception) -> KmsError | None:
    match error:
        case api_errors.GoogleAPICallError() if error.response is not None:
            response: Any = error.response
            request_id = response.request.headers.get(REQUEST_REASON)
            return _judged(operation, response.status_code, response.content, request_id)
        case IdentityRefusedError() if error.request_id is not None:
            return _judged(operation, error.http_status, error.body, error.request_id)
        case IdentityRefusedError():
            # Our own identity is not the customer's business: never a denial.
            verdict = Verdict.UNREACHABLE if error.http_status >= 500 else Verdict.AMBIGUOUS
            code = f"HTTP {error.http_status}"
            return KmsError(Classification(verdict), operation=operation, provider_code=code)
        case TokenEndedError():
            code = UNAUTHENTICATED
            return KmsError(Classification(Verdict.AMBIGUOUS), operation=operation, provider_code=code)
        case http_errors.RequestException() | auth_errors.TransportError() | json_format.ParseError():
            # Timeouts, refused and reset connections, TLS, proxies. The last: an answer not in the service's own
            # format, so from something in between.
            verdict = Verdict.UNREACHABLE
        case _DamagedAnswerError() | api_errors.GoogleAPIError() | auth_errors.GoogleAuthError() | ValueError():
            # Our own configuration or credentials, or an answer that is none; ValueError: a key of another size.
            verdict = Verdict.AMBIGUOUS
        case _:
            return None
    return KmsError(Classification(verdict), operation=operation, provider_code=type(error).__name__.lstrip("_"))


def _judged(operation: str, http_status: int, body: bytes, request_id: str | None) -> KmsError:
    answer = parse_error(http_status, body)
    if answer is None:
        # No answer of Google's: a gateway, a proxy, a portal.
        verdict, code = Classification(Verdict.UNREACHABLE), f"HTTP {http_status}"
        return KmsError(verdict, operation=operation, provider_code=code)
    detail = sorted(answer.violations | answer.reasons)
    code = answer.status if not detail else f"{answer.status}/{detail[0]}"
    return KmsError(classify(operation, answer), operation=operation, provider_code=code, request_id=request_id)
