"""What the keymanager asks of a customer's KMS, whichever cloud it is, and how the answers are judged.

A provider speaks for one key configuration: one CMK, used as one principal. It makes, wraps and unwraps KEKs; the CMK
itself never leaves the KMS. Every failure is a `KmsError` with one of five verdicts, and the difference between the
first two is the heart of the product:

    DENIED       the KMS, reached and healthy, says no. Two of these in a row revoke.
    UNREACHABLE  there was no answer, or the answer was that the KMS itself is broken. Never revokes: it lets the outage
                 grace run.
    THROTTLED    the KMS answered, so it is reachable; ask again, more slowly.
    AMBIGUOUS    anything that does not say whether the *customer* refuses: unknown codes, our own credentials or clock,
                 our own bugs. Treated as UNREACHABLE by the watcher, and a human should look.
    CORRUPT      this blob or this context does not open; says nothing about the key's state.

When in doubt a classification is AMBIGUOUS, never DENIED: a revocation that nobody asked for destroys availability,
while an unrecognised denial still ends in suspension when the grace has run out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from shared.crypto.context import EncryptionContext
from shared.crypto.secret import SecretKey
from shared.errors import KeylakeError


class Verdict(StrEnum):
    DENIED = "denied"
    UNREACHABLE = "unreachable"
    THROTTLED = "throttled"
    AMBIGUOUS = "ambiguous"
    CORRUPT = "corrupt"


class DenialReason(StrEnum):
    """Why the KMS says no; the only thing that tells a revocation from the road to erasure."""

    DISABLED = "disabled"
    PENDING_DELETION = "pending_deletion"
    NOT_FOUND = "not_found"
    """Destroyed, or never there: the two cannot be told apart from outside."""
    ACCESS_DENIED = "access_denied"
    """The key's or the identity's policy does not allow the principal."""
    PRINCIPAL_DENIED = "principal_denied"
    """The principal itself cannot be used any more: its trust was withdrawn, or it is gone."""
    INVALID_STATE = "invalid_state"
    """Another state in which the KMS refuses, e.g. a key store that the customer disconnected."""


@dataclass(frozen=True, slots=True)
class Classification:
    """A judged answer. `reason` is given exactly when the verdict is DENIED."""

    verdict: Verdict
    reason: DenialReason | None = None

    def __post_init__(self) -> None:
        if (self.verdict is Verdict.DENIED) != (self.reason is not None):
            raise ValueError("a denial has a reason, and nothing else has")


class KmsError(KeylakeError):
    """A KMS call that did not do what it was asked for.

    `provider_code` is the provider's own word (or the name of the transport's error), `request_id` the provider's id of
    the request when it answered at all: with it the entry in the customer's audit log can be found. `permission`: the
    one that is missing, when the answer named it.
    """

    http_status = 503
    code = "kms"
    sqlstate = "KL002"

    def __init__(
        self,
        classification: Classification,
        *,
        operation: str,
        provider_code: str,
        request_id: str | None = None,
        permission: str | None = None,
    ) -> None:
        self.verdict = classification.verdict
        self.reason = classification.reason
        self.operation = operation
        self.provider_code = provider_code
        self.request_id = request_id
        self.permission = permission
        reason = "" if self.reason is None else f" ({self.reason})"
        super().__init__(f"{operation}: {self.verdict}{reason}, {provider_code}")


class KeyState(StrEnum):
    """State of the CMK, over all providers."""

    ENABLED = "enabled"
    DISABLED = "disabled"
    PENDING_DELETION = "pending_deletion"
    OTHER = "other"
    """A state of the provider that allows no use: being created, waiting for import, unavailable."""


@dataclass(frozen=True, slots=True)
class KeyDescription:
    """What the KMS says about the CMK. Shown to people; the watcher trusts only a real unwrap."""

    key_id: str
    """The provider's full name of the key."""
    state: KeyState
    key_version: str | None
    """The version that wraps now; None when the provider does not say."""
    deletion_date: datetime | None


@dataclass(frozen=True, slots=True)
class Destruction:
    """Whether the CMK, with every version that ever wrapped anything, is gone for good by the KMS's own word."""

    destroyed: bool
    evidence: str
    """What was asked and answered, in one line."""


@dataclass(frozen=True, slots=True)
class WrappedKek:
    wrapped: bytes
    key_version: str
    """Version of the CMK that wrapped it."""


@dataclass(frozen=True, slots=True)
class GeneratedKek:
    """A new KEK. The owner of `plaintext` wipes it."""

    plaintext: SecretKey
    wrapped: bytes
    key_version: str


@dataclass(frozen=True, slots=True)
class KmsCall:
    """One request to the KMS or its identity service, for the audit chain: failed ones too.

    `request_id` joins it to the entry of the customer's own audit log.
    """

    operation: str
    request_id: str | None
    duration_s: float
    key_version: str | None
    """Version of the CMK that was used, when the provider said so."""
    error: KmsError | None
    key: str = ""
    """The CMK's identifier; the adapter leaves it to whoever files the call."""


KmsCallObserver = Callable[[KmsCall], None]
"""Called on the event loop after every request; must not block and must not raise."""


Hold = Callable[[SecretKey], SecretKey]
"""Takes a plaintext KEK before it is awaited with, and gives it back: so whoever asked for work with it can wipe it in
the middle, and using it then raises KeyWipedError."""


class KmsProvider(Protocol):
    """One CMK, used as one principal. All calls end within a deadline and raise KmsError and nothing else, but for
    KeyWipedError when the KEK that they work with was wiped.

    The same context must be given to unwrap as to wrap; it stands in the customer's audit log in the clear.
    """

    async def generate_kek(self, context: EncryptionContext) -> GeneratedKek:
        """A new random 256-bit KEK, wrapped under the CMK."""
        ...

    async def wrap(self, secret: SecretKey, context: EncryptionContext) -> WrappedKek:
        """Wrap a KEK that exists. The caller keeps `secret`."""
        ...

    async def unwrap(self, wrapped: bytes, context: EncryptionContext) -> SecretKey:
        """The KEK in `wrapped`. Succeeds only while the CMK allows it, whatever version wrapped it."""
        ...

    async def rewrap(self, wrapped: bytes, context: EncryptionContext, hold: Hold | None = None) -> WrappedKek:
        """The same KEK under the CMK's current version. Where the KMS has no call for that, the KEK is open here
        meanwhile, in the hands of `hold`."""
        ...

    async def describe(self) -> KeyDescription:
        """May be denied while unwrap is allowed, and the other way round."""
        ...

    async def destruction(self) -> Destruction:
        """Raises KmsError when the KMS does not say: denied, not reached."""
        ...

    async def aclose(self) -> None:
        """Release connections and threads. Calls under way end first, or at their deadline."""
        ...


async def destruction_by_absence(kms: KmsProvider) -> Destruction:
    """For a KMS that does not know a key any more once it is destroyed, and knows it until then. The key had been
    there: it wrapped for us. Raises KmsError for every other answer."""
    try:
        found = await kms.describe()
    except KmsError as error:
        if error.reason is not DenialReason.NOT_FOUND:
            raise
        return Destruction(True, f"{error.operation}: {error.provider_code} ({error.request_id or 'no request id'})")
    until = "" if found.deletion_date is None else f" until {found.deletion_date:%Y-%m-%d %H:%M:%SZ}"
    return Destruction(False, f"the key is {found.state.value.replace('_', ' ')}{until}")


async def generated_here(kms: KmsProvider, context: EncryptionContext) -> GeneratedKek:
    """`generate_kek` of a KMS that makes no data keys: the KEK is made here, and wrapped."""
    secret = SecretKey.generate()
    try:
        wrapped = await kms.wrap(secret, context)
    except BaseException:
        secret.wipe()
        raise
    return GeneratedKek(secret, wrapped.wrapped, wrapped.key_version)


async def rewrapped_here(kms: KmsProvider, wrapped: bytes, context: EncryptionContext, hold: Hold | None) -> WrappedKek:
    """`rewrap` of a KMS that has no call for it: two calls, each in its own time, and the KEK is open here between
    them."""
    secret = await kms.unwrap(wrapped, context)
    try:
        return await kms.wrap(secret if hold is None else hold(secret), context)
    finally:
        secret.wipe()


class NoProvider:
    """A KmsProvider for a CMK that we have no credentials for: every call is AMBIGUOUS, because it is our own fault and
    says nothing of the customer's will."""

    async def generate_kek(self, context: EncryptionContext) -> GeneratedKek:
        raise _no_credentials("GenerateKek")

    async def wrap(self, secret: SecretKey, context: EncryptionContext) -> WrappedKek:
        raise _no_credentials("Wrap")

    async def unwrap(self, wrapped: bytes, context: EncryptionContext) -> SecretKey:
        raise _no_credentials("Unwrap")

    async def rewrap(self, wrapped: bytes, context: EncryptionContext, hold: Hold | None = None) -> WrappedKek:
        raise _no_credentials("Rewrap")

    async def describe(self) -> KeyDescription:
        raise _no_credentials("Describe")

    async def destruction(self) -> Destruction:
        raise _no_credentials("Describe")

    async def aclose(self) -> None:
        pass


def _no_credentials(operation: str) -> KmsError:
    return KmsError(Classification(Verdict.AMBIGUOUS), operation=operation, provider_code="NoCredentials")
