"""Azure Key Vault through Microsoft's SDK, as our application's service principal in the customer's tenant.

Wrapping is always remote. The SDK's own `wrap_key` works locally once it knows the public key: no record in the
customer's log, and it goes on working after the key was disabled or deleted. So wraps and unwraps go through
`KeyClient.send_request`, the SDK's public way to call the service with its pipeline. And because the service may wrap
under a disabled key (azure-sdk-for-python#45342), nothing is stored that was not unwrapped once by the same key: a wrap
is two calls, a rewrap three.

How a KEK is bound to its encryption context, which Key Vault knows nothing of, is `azure_blob`'s matter. The vault sees
intermediate keys only; a KEK never leaves this process.

New wraps use the key's current version, so a rotation is picked up by itself; unwraps name the version that the blob
names, of the configured key and no other: a blob swapped for one of another key, still alive, would make a destroyed
key look alive.

Limits of Python: the intermediate key passes through JSON and base64 text that cannot be wiped; it is of no use
without the blob.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

from azure.core.exceptions import AzureError, DecodeError, ServiceRequestError, ServiceResponseError
from azure.core.rest import HttpRequest, HttpResponse
from azure.keyvault.keys import KeyClient

from keymanager.kms.azure_blob import WRAPPED_SIZES_BYTES, AzureBlob, VersionedKeyId, seal_kek
from keymanager.kms.azure_clients import AzureClients, AzureKmsConfig, FetchedToken, NoTokenError
from keymanager.kms.azure_verdicts import GET_TOKEN, UNWRAP_KEY, classify, classify_token
from keymanager.kms.base import (
    Classification,
    DenialReason,
    Destruction,
    GeneratedKek,
    Hold,
    KeyDescription,
    KeyState,
    KmsCallObserver,
    KmsError,
    Verdict,
    WrappedKek,
    destruction_by_absence,
    generated_here,
    rewrapped_here,
)
from keymanager.kms.calls import Answer, KmsCalls
from keymanager.kms.sessions import Open, Sessions
from shared.clock import Clock
from shared.crypto.context import EncryptionContext
from shared.crypto.secret import KEY_SIZE_BYTES, SecretKey
from shared.errors import CorruptedError, IntegrityError

__all__ = ["AzureKms", "AzureKmsConfig"]

T = TypeVar("T")

ALGORITHM: Final = "RSA-OAEP-256"
_MAX_CODE_SIZE_CHARACTERS: Final = 64
_WRAP_KEY: Final = "WrapKey"
_GET_KEY: Final = "GetKey"
_GET_DELETED_KEY: Final = "GetDeletedKey"


class _RefusedError(Exception):
    """An answer of Key Vault that is not a success."""

    def __init__(self, response: HttpResponse) -> None:
        members: Any = None
        with suppress(ValueError):  # not JSON: from something in between
            members = response.json()
        error = _member(members, "error")
        # Both spellings stand in recorded answers.
        inner = _member(error, "innererror") or _member(error, "innerError")
        self.status = response.status_code
        self.code = _text(error, "code")[:_MAX_CODE_SIZE_CHARACTERS]
        self.inner_code = _text(inner, "code")[:_MAX_CODE_SIZE_CHARACTERS]
        self.request_id: str | None = response.headers.get("x-ms-request-id")
        super().__init__(f"{self.status} {self.code}")


@dataclass(frozen=True, slots=True)
class _Wrapped:
    key_id: VersionedKeyId
    value: bytes


class _TokenSessions(Sessions[KeyClient]):
    """Renewed by age, too: see `AzureKmsConfig.token_max_age_s`."""

    def __init__(self, open_session: Open[KeyClient], clock: Clock, max_age: timedelta) -> None:
        super().__init__(open_session, clock)
        self._max_age = max_age

    def _renew_after(self, expires_at: datetime | None) -> datetime | None:
        by_age = self._clock.now() + self._max_age
        by_expiry = super()._renew_after(expires_at)
        return by_age if by_expiry is None else min(by_age, by_expiry)


class AzureKms:
    """KmsProvider for Azure Key Vault. Belongs to one event loop."""

    def __init__(
        self, config: AzureKmsConfig, *, observer: KmsCallObserver | None = None, clock: Clock | None = None
    ) -> None:
        """Makes no call. `observer` hears of every request, those for tokens included.

        (Not of the SDK's first, empty one to a vault, by which it learns the tenant: that is answered 401 and stands in
        the customer's log as `Authentication`, without an identity.)
        """
        self._config = config
        self._calls = KmsCalls(
            "azure-kms",
            _judge,
            config.limits,
            observer=observer,
            clock=clock,
        )
        self._clients = AzureClients(config)
        self._sessions = _TokenSessions(
            self._open_session, self._calls.clock, timedelta(seconds=config.token_max_age_s)
        )

    # ── what a provider does ───────────────────────────────────────────────────────────────────────────────────

    async def generate_kek(self, context: EncryptionContext) -> GeneratedKek:
        return await generated_here(self, context)

    async def wrap(self, secret: SecretKey, context: EncryptionContext) -> WrappedKek:
        """Two calls: what does not open again must not be stored."""
        intermediate = SecretKey.generate()
        try:
            wrapped = await self._use(_WRAP_KEY, lambda client: self._wrap_key(client, intermediate))
            opened = await self._unwrap_key(wrapped)
            try:
                if not opened.matches(intermediate):
                    raise _corrupt(_WRAP_KEY, "ReadBackDiffers")
            finally:
                opened.wipe()
            blob = seal_kek(secret, intermediate, wrapped.key_id, wrapped.value, context)
        finally:
            intermediate.wipe()
        return WrappedKek(blob.serialize(), wrapped.key_id.version)

    async def unwrap(self, wrapped: bytes, context: EncryptionContext) -> SecretKey:
        blob = self._parsed(wrapped)
        intermediate = await self._unwrap_key(_Wrapped(blob.key_id, blob.wrapped))
        try:
            return blob.open(intermediate, context)
        except IntegrityError:
            raise _corrupt(UNWRAP_KEY, "SealedKekDoesNotOpen") from None

    async def rewrap(self, wrapped: bytes, context: EncryptionContext, hold: Hold | None = None) -> WrappedKek:
        return await rewrapped_here(self, wrapped, context, hold)

    async def describe(self) -> KeyDescription:
        """Needs the right to get keys, which the other calls do not."""
        try:
            return await self._call(_GET_KEY, self._get_key)
        except KmsError as error:
            if error.reason is not DenialReason.NOT_FOUND:
                raise
            deleted = await self._deleted_key()
            if deleted is None:
                raise
            return deleted

    async def destruction(self) -> Destruction:
        """A key that was deleted is kept for its retention, and can be recovered: only one that is purged is gone."""
        found = await destruction_by_absence(self)
        if not found.destroyed:
            return found
        try:
            await self._call(_GET_DELETED_KEY, self._get_deleted_key)
        except KmsError as error:
            if error.reason is not DenialReason.NOT_FOUND:
                raise
            purged = f"{error.operation}: {error.provider_code} ({error.request_id or 'no request id'})"
            return Destruction(True, f"{found.evidence}; {purged}")
        return Destruction(False, "the key is deleted, and can be recovered")

    async def aclose(self) -> None:
        await self._calls.aclose()
        if (session := self._sessions.held) is not None:
            session.value.close()

    # ── requests ───────────────────────────────────────────────────────────────────────────────────────────────

    def _wrap_key(self, client: KeyClient, intermediate: SecretKey) -> Answer[_Wrapped]:
        # The empty version is the current one, and spelt as the SDK does it; the answer says which it was.
        path = f"keys/{self._config.key_name}//wrapkey"
        answer, request_id = _post(client, path, bytes(intermediate.reveal()))
        wrapped = _Wrapped(VersionedKeyId.parse(_text(answer, "kid")), _value(answer))
        if not self._is_ours(wrapped.key_id) or len(wrapped.value) not in WRAPPED_SIZES_BYTES:
            raise CorruptedError("the vault did not wrap with this key")
        return Answer(wrapped, request_id, wrapped.key_id.version)

    async def _unwrap_key(self, wrapped: _Wrapped) -> SecretKey:
        """The intermediate key."""
        version = wrapped.key_id.version

        def unwrap(client: KeyClient) -> Answer[bytearray]:
            path = f"keys/{self._config.key_name}/{version}/unwrapkey"
            answer, request_id = _post(client, path, wrapped.value)
            return Answer(bytearray(_value(answer)), request_id, version)

        opened = await self._use(UNWRAP_KEY, unwrap)
        if len(opened) != KEY_SIZE_BYTES:
            raise _corrupt(UNWRAP_KEY, "NotAKey")
        return SecretKey(opened)

    async def _use(self, operation: str, call: Callable[[KeyClient], Answer[T]]) -> T:
        """`_call`, with a key that is deleted, but can be recovered, told from one that is gone: the vault says
        KeyNotFound of both."""
        try:
            return await self._call(operation, call)
        except KmsError as error:
            if error.reason is not DenialReason.NOT_FOUND or await self._deleted_key() is None:
                raise
            raise KmsError(
                Classification(Verdict.DENIED, DenialReason.PENDING_DELETION),
                operation=error.operation,
                provider_code=error.provider_code,
                request_id=error.request_id,
            ) from None

    def _get_key(self, client: KeyClient) -> Answer[KeyDescription]:
        answer, request_id = _get(client, f"keys/{self._config.key_name}/")
        key_id = VersionedKeyId.parse(_text(_member(answer, "key"), "kid"))
        attributes = _member(answer, "attributes") or {}
        now_s = self._calls.clock.now().timestamp()
        state = KeyState.ENABLED if attributes.get("enabled") is True else KeyState.DISABLED
        if state is KeyState.ENABLED and not attributes.get("nbf", 0) <= now_s < attributes.get("exp", float("inf")):
            state = KeyState.OTHER  # not yet valid, or expired: unwraps, and does not wrap
        description = KeyDescription(
            key_id=f"{key_id.vault_url}/keys/{key_id.name}",
            state=state,
            key_version=key_id.version,
            deletion_date=None,
        )
        return Answer(description, request_id, key_id.version)

    async def _deleted_key(self) -> KeyDescription | None:
        """None when the vault does not show a deleted key of this name: there is none, or we may not see it."""
        try:
            return await self._call(_GET_DELETED_KEY, self._get_deleted_key)
        except KmsError:
            return None

    def _get_deleted_key(self, client: KeyClient) -> Answer[KeyDescription]:
        answer, request_id = _get(client, f"deletedkeys/{self._config.key_name}")
        purge = answer.get("scheduledPurgeDate")
        description = KeyDescription(
            key_id=f"{self._config.vault_url}/keys/{self._config.key_name}",
            state=KeyState.PENDING_DELETION,
            key_version=None,
            deletion_date=None if purge is None else datetime.fromtimestamp(purge, UTC),
        )
        return Answer(description, request_id, None)

    def _parsed(self, wrapped: bytes) -> AzureBlob:
        try:
            blob = AzureBlob.parse(wrapped)
        except CorruptedError:
            raise _corrupt(UNWRAP_KEY, "ImpossibleBlob") from None
        if not self._is_ours(blob.key_id):
            raise _corrupt(UNWRAP_KEY, "BlobOfAnotherKey")
        return blob

    def _is_ours(self, key_id: VersionedKeyId) -> bool:
        return key_id.is_of(self._config.vault_url, self._config.key_name)

    # ── calls and tokens ───────────────────────────────────────────────────────────────────────────────────────

    async def _call(self, operation: str, call: Callable[[KeyClient], Answer[T]]) -> T:
        """Raises KmsError and nothing else. A token that the vault does not take is replaced once."""

        async def attempt(client: KeyClient) -> T:
            return await self._calls.attempt(operation, lambda: call(client))

        return await self._calls.in_time(operation, lambda: self._sessions.use(attempt, {"Unauthorized"}))

    async def _open_session(self) -> tuple[KeyClient, datetime | None]:
        def fetch() -> Answer[FetchedToken]:
            token = self._clients.fetch_token()
            return Answer(token, token.request_id, None)

        token = await self._calls.attempt(GET_TOKEN, fetch)
        return self._clients.key_client(token), token.expires_at


# ── reading answers ────────────────────────────────────────────────────────────────────────────────────────────────


def _post(client: KeyClient, path: str, value: bytes) -> tuple[dict[str, Any], str]:
    body = {"alg": ALGORITHM, "value": base64.urlsafe_b64encode(value).rstrip(b"=").decode("ascii")}
    return _sent(client, HttpRequest("POST", path, json=body))


def _get(client: KeyClient, path: str) -> tuple[dict[str, Any], str]:
    return _sent(client, HttpRequest("GET", path))


def _sent(client: KeyClient, request: HttpRequest) -> tuple[dict[str, Any], str]:
    """(members of the answer, request id). Raises _RefusedError, and what the SDK raises."""
    response = client.send_request(request)
    if response.status_code != 200:
        raise _RefusedError(response)
    answer = response.json()
    if not isinstance(answer, dict):
        raise TypeError("the answer is not a JSON object")
    return answer, response.headers.get("x-ms-request-id") or "unknown"


def _value(answer: dict[str, Any]) -> bytes:
    """Raises CorruptedError."""
    text = _text(answer, "value")
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        raise CorruptedError("the vault's value is not base64url") from None


def _member(members: Any, name: str) -> dict[str, Any] | None:
    value = members.get(name) if isinstance(members, dict) else None
    return value if isinstance(value, dict) else None


def _text(members: Any, name: str) -> str:
    """Empty when there is no such text."""
    value = members.get(name) if isinstance(members, dict) else None
    return value if isinstance(value, str) else ""


def _corrupt(operation: str, code: str) -> KmsError:
    return KmsError(Classification(Verdict.CORRUPT), operation=operation, provider_code=code)


def _judge(operation: str, error: Exception) -> KmsError | None:
    request_id = None
    code = type(error).__name__
    match error:
        case _RefusedError():
            judged = classify(operation, error.status, error.code, error.inner_code)
            code = error.inner_code or error.code or f"HTTP {error.status}"
            request_id = error.request_id
        case NoTokenError():
            transport = Classification(Verdict.UNREACHABLE)
            judged = classify_token(error.http_status, error.codes) if error.transport is None else transport
            code, request_id = error.error, error.request_id
        case ServiceRequestError() | ServiceResponseError() | DecodeError():
            # Timeouts, refused and reset connections, TLS, proxies. The last: not in the service's own format.
            judged = Classification(Verdict.UNREACHABLE)
        case AzureError() | CorruptedError() | KeyError() | ValueError() | TypeError():
            # Our own configuration, a challenge that the SDK does not trust, or an answer that is none.
            judged = Classification(Verdict.AMBIGUOUS)
        case _:
            return None
    return KmsError(judged, operation=operation, provider_code=code, request_id=request_id)
