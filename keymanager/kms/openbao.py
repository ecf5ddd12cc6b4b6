"""OpenBao (and HashiCorp Vault) transit over its HTTP API: the customer runs the KMS itself.

What transit has and has not, as found out against OpenBao 2.7:

* AEAD keys take `associated_data` in datakey, encrypt and decrypt: the context is bound by the server. A server older
  than that parameter ignores it without a word, so the first blob of every provider is tried without it and must
  not open.
* `rewrap` takes no `associated_data`: a bound blob does not pass through it. So re-wrapping is decrypt and encrypt, and
  the KEK is in our memory between the two, as it is whenever it is used.
* `encrypt` makes a key that is not there if the policy has `create`: a destroyed key would seem to be back. The policy
  is to have `update` only; wrap asks for the key first all the same.
* The text form of a ciphertext is malleable (spare bits of base64, `v0` for `v1`), so blobs are kept in binary.
* A 403 does not say whether the token or the policy is at fault: `lookup-self`, of the default policy, tells
  them apart.
* Refusals carry no request id. Every request has an `X-Correlation-Id`; the customer's log shows it once
  `sys/config/auditing/request-headers/X-Correlation-Id` is set. Answers have the server's own id, always logged.
  Associated data, ciphertext and plaintext stand in the log as HMACs only.

Needed: update on `datakey/plaintext/<key>`, `encrypt/<key>` and `decrypt/<key>`, read on `keys/<key>`, under the mount.

Wrapped blob, version 1, big-endian::

    offset | size | field
    -------+------+-----------------------------------------------
    0      | 1    | version, 1
    1      | 4    | key version, 1 …
    5      | 60   | nonce (12), ciphertext (32), GCM tag (16)

Limits of Python: the plaintext comes as JSON and base64 text, which cannot be wiped; it is dropped at once.
"""

from __future__ import annotations

import base64
import json
import re
import ssl
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx

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
    rewrapped_here,
)
from keymanager.kms.calls import DEFAULT_LIMITS, Answer, CallLimits, KmsCalls, require_read_back
from keymanager.kms.sessions import Sessions
from shared.clock import Clock
from shared.crypto.context import EncryptionContext
from shared.crypto.secret import KEY_SIZE_BYTES, SecretKey
from shared.errors import InvalidInputError

T = TypeVar("T")

LOGIN: Final = "Login"
LOOKUP_SELF: Final = "LookupSelf"
PERMISSION_DENIED: Final = "PermissionDenied"
_MAX_ANSWER_SIZE_BYTES: Final = 64 * 1024
_BLOB: Final = struct.Struct(">BI60s")
_BLOB_VERSION: Final = 1
_CIPHERTEXT: Final = re.compile(r"vault:v([1-9][0-9]{0,9}):([A-Za-z0-9+/]{80})")
_AEAD_TYPES: Final = frozenset({"aes256-gcm96", "chacha20-poly1305"})
"""256-bit AEADs with a nonce of 12 bytes."""
_ADDRESS: Final = re.compile(r"https://[A-Za-z0-9.\-\[\]:]{1,255}")
_PATH: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}(/[A-Za-z0-9_.-]{1,128}){0,7}")
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")

_REFUSALS: Final = (
    # (HTTP status, part of the text, our name for it, what it means)
    (400, "soft-deleted", "SoftDeleted", Classification(Verdict.DENIED, DenialReason.DISABLED)),
    (400, "too old", "VersionTooOld", Classification(Verdict.DENIED, DenialReason.DISABLED)),
    (400, "encryption key not found", "KeyNotFound", Classification(Verdict.DENIED, DenialReason.NOT_FOUND)),
    (404, "no handler for route", "MountNotFound", Classification(Verdict.DENIED, DenialReason.NOT_FOUND)),
    (400, "message authentication failed", "AuthenticationFailed", Classification(Verdict.CORRUPT)),
    (400, "invalid ciphertext", "InvalidCiphertext", Classification(Verdict.CORRUPT)),
)


@dataclass(frozen=True, slots=True)
class AppRole:
    """Issued by the customer, and withdrawn by it: destroying the secret id is a way to revoke."""

    role_id: str
    secret_id: str = field(repr=False)
    mount: str = "approle"


@dataclass(frozen=True, slots=True)
class Token:
    """A token that somebody else keeps alive. Needs `auth/token/lookup-self` (the default policy has it)."""

    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class OpenBaoConfig:
    """One key configuration. Raises InvalidInputError for names that would reach another path, and without TLS."""

    address: str
    key_name: str
    auth: AppRole | Token
    mount: str = "transit"
    namespace: str | None = None
    ca_bundle: Path | None = None
    """PEM file of trusted roots; None for the system's."""
    limits: CallLimits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        if not _ADDRESS.fullmatch(self.address):
            raise InvalidInputError("the address is https://host:port, without a path")
        paths = [self.mount, *([] if self.namespace is None else [self.namespace])]
        paths += [self.auth.mount] if isinstance(self.auth, AppRole) else []
        names = [part for path in (*paths, self.key_name) for part in path.split("/")]
        if not _NAME.fullmatch(self.key_name) or not all(_PATH.fullmatch(path) for path in paths):
            raise InvalidInputError("mount, namespace and key are names of letters, digits, '_', '-' and '.'")
        if {".", ".."} & set(names):
            raise InvalidInputError("mount, namespace and key are names, not ways")


@dataclass(frozen=True, slots=True)
class WrappedBlob:
    key_version: int
    sealed: bytes

    def serialize(self) -> bytes:
        return _BLOB.pack(_BLOB_VERSION, self.key_version, self.sealed)

    def ciphertext(self) -> str:
        return f"vault:v{self.key_version}:{base64.b64encode(self.sealed).decode('ascii')}"

    @classmethod
    def parse(cls, data: bytes) -> WrappedBlob | None:
        """None for anything that `serialize` cannot have made."""
        if len(data) != _BLOB.size:
            return None
        version, key_version, sealed = _BLOB.unpack(data)
        return None if version != _BLOB_VERSION or key_version < 1 else cls(key_version, sealed)

    @classmethod
    def of_ciphertext(cls, text: str) -> WrappedBlob:
        """Raises ValueError for a ciphertext that does not hold one key."""
        match = _CIPHERTEXT.fullmatch(text)
        if match is None or int(match[1]) >= 1 << 32:
            raise ValueError("not the ciphertext of a key")
        return cls(int(match[1]), base64.b64decode(match[2], validate=True))


class Refused(Exception):  # noqa: N818 - an answer, not an error of ours
    """An error answer. `errors` is None when it is not the service's own: it came from something in between."""

    def __init__(self, status: int, errors: tuple[str, ...] | None, correlation_id: str) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
        self.errors = errors
        self.correlation_id = correlation_id


def parse_errors(body: bytes) -> tuple[str, ...] | None:
    """The texts of an error answer, `{"errors": [...]}`; None for a body of another shape."""
    try:
        members = json.loads(body)
    except (ValueError, RecursionError):
        return None
    errors = members.get("errors") if isinstance(members, dict) else None
    if not isinstance(errors, list) or not all(isinstance(text, str) for text in errors):
        return None
    return tuple(errors)


def classify(operation: str, status: int, errors: tuple[str, ...] | None) -> tuple[str, Classification]:
    """(our name for the answer, what it means). The service's own texts are matched, never passed on."""
    text = " ".join(errors or ()).lower()
    if status == 503 and "sealed" in text:
        # An operator's seal and a restart that nobody has unsealed yet look alike: an outage, not a denial.
        return "Sealed", Classification(Verdict.UNREACHABLE)
    if status == 429:
        return "RateLimited", Classification(Verdict.THROTTLED)
    if status >= 500 or status < 400 or status in (408, 412) or errors is None:
        # 3xx: a standby that would send us to the active node. 412: a node that lags behind.
        return f"HTTP {status}", Classification(Verdict.UNREACHABLE)
    if operation == LOGIN:
        if status == 403 or (status == 400 and "invalid role or secret id" in text):
            return "LoginRefused", Classification(Verdict.DENIED, DenialReason.PRINCIPAL_DENIED)
        return f"HTTP {status}", Classification(Verdict.AMBIGUOUS)
    if status == 403:
        return PERMISSION_DENIED, Classification(Verdict.DENIED, DenialReason.ACCESS_DENIED)
    for known, part, name, meaning in _REFUSALS:
        if status == known and part in text:
            return name, meaning
    if status == 404 and operation == "ReadKey" and not errors:
        return "KeyNotFound", Classification(Verdict.DENIED, DenialReason.NOT_FOUND)
    return f"HTTP {status}", Classification(Verdict.AMBIGUOUS)


def _judge(operation: str, error: Exception) -> KmsError | None:
    request_id = None
    match error:
        case Refused():
            code, meaning = classify(operation, error.status, error.errors)
            # What did not come from the service itself is not in its log.
            request_id = error.correlation_id if error.errors is not None and error.status < 500 else None
        case httpx.HTTPError():
            code, meaning = type(error).__name__, Classification(Verdict.UNREACHABLE)
        case KeyError() | ValueError() | TypeError() | RecursionError():
            # An answer that is none: members that are missing, or a key of another size.
            code, meaning = "UnusableAnswer", Classification(Verdict.AMBIGUOUS)
        case _:
            return None
    return KmsError(meaning, operation=operation, provider_code=code, request_id=request_id)


class OpenBaoKms:
    """KmsProvider for OpenBao. Belongs to one event loop."""

    def __init__(
        self, config: OpenBaoConfig, *, observer: KmsCallObserver | None = None, clock: Clock | None = None
    ) -> None:
        """Makes no call. `observer` hears of every request, logins included."""
        self._config = config
        self._calls = KmsCalls(
            "openbao",
            _judge,
            config.limits,
            observer=observer,
            clock=clock,
        )
        self._http = httpx.Client(
            base_url=config.address,
            verify=ssl.create_default_context(cafile=None if config.ca_bundle is None else str(config.ca_bundle)),
            timeout=httpx.Timeout(config.limits.read_timeout_s, connect=config.limits.connect_timeout_s),
            limits=httpx.Limits(max_connections=config.limits.max_concurrency),
            headers={"X-Vault-Request": "true", "Accept-Encoding": "identity"}
            | ({} if config.namespace is None else {"X-Vault-Namespace": config.namespace}),
            follow_redirects=False,
            trust_env=False,
        )
        self._sessions = Sessions(self._open_session, self._calls.clock)
        self._binds_context = False

    # ── what a provider does ───────────────────────────────────────────────────────────────────────────────────

    async def generate_kek(self, context: EncryptionContext) -> GeneratedKek:
        associated = _associated_data(context)

        def call(token: str) -> Answer[tuple[SecretKey, WrappedBlob]]:
            data, request_id = self._transit("datakey/plaintext", token, {"bits": 256, **associated})
            blob = WrappedBlob.of_ciphertext(data["ciphertext"])
            return Answer((_key(data["plaintext"]), blob), request_id, str(blob.key_version))

        plaintext, blob = await self._call("GenerateDataKey", call)
        try:
            await self._require_bound_context(blob)
        except BaseException:
            plaintext.wipe()
            raise
        return GeneratedKek(plaintext, blob.serialize(), str(blob.key_version))

    async def wrap(self, secret: SecretKey, context: EncryptionContext) -> WrappedKek:
        """Three calls: the key must be there, and what does not open again must not be stored."""
        await self.describe()
        associated = _associated_data(context)

        def encrypt(token: str) -> Answer[WrappedBlob]:
            # JSON takes no memoryview: this copy lives until the request is sent.
            plaintext = base64.b64encode(secret.copied()).decode("ascii")
            data, request_id = self._transit("encrypt", token, {"plaintext": plaintext, **associated})
            blob = WrappedBlob.of_ciphertext(data["ciphertext"])
            return Answer(blob, request_id, str(blob.key_version))

        blob = await self._call("Encrypt", encrypt)
        require_read_back("Encrypt", await self._decrypt(blob, associated), secret)
        await self._require_bound_context(blob)
        return WrappedKek(blob.serialize(), str(blob.key_version))

    async def unwrap(self, wrapped: bytes, context: EncryptionContext) -> SecretKey:
        blob = WrappedBlob.parse(wrapped)
        if blob is None:
            raise KmsError(Classification(Verdict.CORRUPT), operation="Decrypt", provider_code="ImpossibleBlob")
        return await self._decrypt(blob, _associated_data(context))

    async def rewrap(self, wrapped: bytes, context: EncryptionContext, hold: Hold | None = None) -> WrappedKek:
        return await rewrapped_here(self, wrapped, context, hold)

    async def describe(self) -> KeyDescription:
        config = self._config
        namespace = "" if config.namespace is None else f"{config.namespace}/"
        key_id = f"{config.address}/v1/{namespace}{config.mount}/keys/{config.key_name}"

        def call(token: str) -> Answer[KeyDescription]:
            data, request_id = self._request("GET", f"/v1/{config.mount}/keys/{config.key_name}", token)
            usable = data["type"] in _AEAD_TYPES and not data.get("derived")
            state = KeyState.ENABLED if usable else KeyState.OTHER
            version = str(int(data["latest_version"]))
            description = KeyDescription(
                key_id=key_id,
                state=KeyState.DISABLED if data.get("soft_deleted") else state,
                key_version=version,
                deletion_date=None,
            )
            return Answer(description, request_id, version)

        return await self._call("ReadKey", call)

    async def destruction(self) -> Destruction:
        return await destruction_by_absence(self)

    async def aclose(self) -> None:
        await self._calls.aclose()
        self._http.close()

    async def _decrypt(self, blob: WrappedBlob, associated: dict[str, str]) -> SecretKey:
        def call(token: str) -> Answer[SecretKey]:
            data, request_id = self._transit("decrypt", token, {"ciphertext": blob.ciphertext(), **associated})
            return Answer(_key(data["plaintext"]), request_id, str(blob.key_version))

        return await self._call("Decrypt", call)

    async def _require_bound_context(self, blob: WrappedBlob) -> None:
        """Once: what opens without its context is not bound to it, and nothing may be stored under such a server."""
        if self._binds_context:
            return
        try:
            opened = await self._decrypt(blob, {})
        except KmsError as error:
            if error.verdict is not Verdict.CORRUPT:
                raise
            self._binds_context = True
        else:
            opened.wipe()
            raise KmsError(Classification(Verdict.AMBIGUOUS), operation="Encrypt", provider_code="ContextNotBound")

    # ── calls ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _call(self, operation: str, call: Callable[[str], Answer[T]]) -> T:
        """Raises KmsError and nothing else. A 403 is a verdict on the key only when the token lives."""

        async def work() -> T:
            session = await self._sessions.current()
            try:
                return await self._calls.attempt(operation, lambda: call(session.value))
            except KmsError as denied:
                if denied.provider_code != PERMISSION_DENIED or await self._lives(session.value):
                    raise
                if isinstance(self._config.auth, Token):
                    raise self._token_ended(session.expires_at, denied.request_id) from None
            renewed = await self._sessions.newer_than(session.generation)
            return await self._calls.attempt(operation, lambda: call(renewed.value))

        return await self._calls.in_time(operation, work)

    def _token_ended(self, expires_at: datetime | None, request_id: str | None) -> KmsError:
        """It was alive when the session began. Before its time it was revoked; after it, nobody has renewed it."""
        expired = expires_at is not None and self._calls.clock.now() >= expires_at
        revoked = Classification(Verdict.DENIED, DenialReason.PRINCIPAL_DENIED)
        return KmsError(
            Classification(Verdict.AMBIGUOUS) if expired else revoked,
            operation=LOOKUP_SELF,
            provider_code="TokenExpired" if expired else "TokenRevoked",
            request_id=request_id,
        )

    async def _lives(self, token: str) -> bool:
        try:
            await self._calls.attempt(LOOKUP_SELF, lambda: self._lookup(token))
        except KmsError as error:
            if error.provider_code == PERMISSION_DENIED:
                return False
            raise
        return True

    async def _open_session(self) -> tuple[str, datetime | None]:
        """A token and when it expires. A given token that never worked says nothing about the customer's will."""
        auth = self._config.auth
        if isinstance(auth, AppRole):
            return await self._calls.attempt(LOGIN, lambda: self._login(auth))
        try:
            return auth.token, await self._calls.attempt(LOOKUP_SELF, lambda: self._lookup(auth.token))
        except KmsError as error:
            if error.provider_code != PERMISSION_DENIED:
                raise
            held = self._sessions.held
            if held is not None:
                raise self._token_ended(held.expires_at, error.request_id) from None
            unknown = Classification(Verdict.AMBIGUOUS)
            raise KmsError(
                unknown, operation=LOOKUP_SELF, provider_code="TokenUnknown", request_id=error.request_id
            ) from None

    def _login(self, auth: AppRole) -> Answer[tuple[str, datetime | None]]:
        body = {"role_id": auth.role_id, "secret_id": auth.secret_id}
        sent_at = self._calls.clock.now()
        members, request_id = self._send("POST", f"/v1/auth/{auth.mount}/login", None, body)
        granted = members["auth"]
        token, lifetime_s = str(granted["client_token"]), int(granted["lease_duration"])
        expires_at = datetime.fromtimestamp(sent_at.timestamp() + lifetime_s, sent_at.tzinfo) if lifetime_s else None
        return Answer((token, expires_at), request_id, None)

    def _lookup(self, token: str) -> Answer[datetime | None]:
        data, request_id = self._request("GET", "/v1/auth/token/lookup-self", token)
        expires_at = None if data["expire_time"] is None else datetime.fromisoformat(data["expire_time"])
        if expires_at is not None and expires_at.tzinfo is None:
            raise ValueError("a time of no zone is none")
        return Answer(expires_at, request_id, None)

    def _transit(self, action: str, token: str, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
        return self._request("POST", f"/v1/{self._config.mount}/{action}/{self._config.key_name}", token, body)

    def _request(
        self, method: str, path: str, token: str, body: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], str]:
        """(`data`, request id) of the answer."""
        members, request_id = self._send(method, path, token, body)
        return members["data"], request_id

    def _send(
        self, method: str, path: str, token: str | None, body: dict[str, Any] | None
    ) -> tuple[dict[str, Any], str]:
        """Raises Refused, httpx.HTTPError, KeyError, TypeError or ValueError."""
        correlation_id = str(uuid.uuid4())
        headers = {"X-Correlation-Id": correlation_id} | ({} if token is None else {"X-Vault-Token": token})
        with self._http.stream(method, path, json=body, headers=headers) as response:
            content = bytearray()
            for chunk in response.iter_raw():  # never unpacked: what is bounded is what came
                content += chunk
                if len(content) > _MAX_ANSWER_SIZE_BYTES:
                    raise ValueError("an answer of this size is none")
        if response.status_code != httpx.codes.OK:
            raise Refused(response.status_code, parse_errors(bytes(content)), correlation_id)
        members = json.loads(content)
        return members, str(members["request_id"])


def _associated_data(context: EncryptionContext) -> dict[str, str]:
    return {"associated_data": base64.b64encode(context.to_aad()).decode("ascii")}


def _key(text: str) -> SecretKey:
    key = bytearray(base64.b64decode(text, validate=True))
    if len(key) != KEY_SIZE_BYTES:
        raise ValueError("not a key")
    return SecretKey(key)
