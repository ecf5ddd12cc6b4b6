"""The customers' CMKs: one KMS provider per key configuration, and the calls that each use of it made."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Final

from keymanager.audit_log import AuditLog
from keymanager.explain import explain
from keymanager.kms.base import KmsCall, KmsError, KmsProvider, NoProvider, Verdict
from keymanager.kms_ledger import KmsLedger
from keymanager.providers import ProviderFactory
from keymanager.state import KmsAccess
from keymanager.watch import ProbeOutcome
from shared.audit_chain import AuditEntry
from shared.cmk import CmkKey
from shared.crypto.context import EncryptionContext, KeyScope
from shared.crypto.secret import SecretKey
from shared.errors import InvalidInputError, UnavailableError
from shared.ids import AccountId, KekId, KeyConfigurationId
from shared.telemetry import get_logger

_log = get_logger(__name__)
_collected: ContextVar[list[KmsCall] | None] = ContextVar("kms_calls", default=None)

PROBE_OUTCOMES: Final[dict[Verdict, ProbeOutcome]] = {
    Verdict.DENIED: ProbeOutcome.DENIED,
    Verdict.UNREACHABLE: ProbeOutcome.UNREACHABLE,
    Verdict.THROTTLED: ProbeOutcome.THROTTLED,
    Verdict.AMBIGUOUS: ProbeOutcome.AMBIGUOUS,
    # The canary's blob is damaged, in our database or on its way: that is not the customer saying no.
    Verdict.CORRUPT: ProbeOutcome.AMBIGUOUS,
}


def collect(call: KmsCall) -> None:
    """Files the call under the use that made it (`calls_made`)."""
    calls = _collected.get()
    if calls is not None:
        calls.append(call)


@contextlib.contextmanager
def calls_made() -> Iterator[list[KmsCall]]:
    """The KMS calls that are made inside, in order."""
    calls: list[KmsCall] = []
    token = _collected.set(calls)
    try:
        yield calls
    finally:
        _collected.reset(token)


def call_details(calls: list[KmsCall]) -> dict[str, str]:
    """What joins our audit record to the customer's own log: the last call's name and request id."""
    if not calls:
        return {}
    last = calls[-1]
    details = {"kms_operation": last.operation, "kms_request_id": last.request_id or "", "kms_key": last.key}
    if last.key_version is not None:
        details["cmk_key_version"] = last.key_version
    if last.error is not None:
        details["kms_verdict"] = last.error.verdict.value
        details["kms_code"] = last.error.provider_code
    return {name: _foreign_text(value) for name, value in details.items()}


def _foreign_text(text: str) -> str:
    """A text that another system chose, fit for logs and the database."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:200])


def canary_context(account_id: AccountId, key_configuration_id: KeyConfigurationId) -> EncryptionContext:
    return EncryptionContext({"keylake:account": str(account_id), "keylake:canary-of": str(key_configuration_id)})


def kek_context(scope: KeyScope, kek_id: KekId, kek_version: int) -> EncryptionContext:
    """What the CMK wraps a KEK for; it stands in the customer's audit log."""
    return scope.context().with_pairs(**{"keylake:kek": str(kek_id), "keylake:kek-version": str(kek_version)})


def canary_digest(canary: SecretKey) -> bytes:
    """SHA-256 of a canary: 256 random bits, so its digest tells nothing."""
    return hashlib.sha256(canary.reveal()).digest()


@dataclass(frozen=True, slots=True)
class Canary:
    """A random key that is good for nothing but being unwrapped: the watcher's probe."""

    wrapped: bytes
    digest: bytes
    key_version: str
    """Of the CMK."""


async def make_canary(
    provider: KmsProvider,
    key: CmkKey,
    account_id: AccountId,
    key_configuration_id: KeyConfigurationId,
    audit_log: AuditLog,
    actor: str,
    action: str,
) -> Canary:
    """A new canary that was proved to unwrap, with a key that was proved to be good for everything that Keylake will
    ever ask of it: what is not allowed is to be missed now, and not at the first rotation. A failure is recorded as the
    outcome of `action`.

    Raises InvalidInputError that says what the customer has to change, UnavailableError when the KMS cannot be reached.
    """
    context = canary_context(account_id, key_configuration_id)
    with calls_made() as calls:
        try:
            made = await provider.generate_kek(context)
            digest = canary_digest(made.plaintext)
            try:
                await provider.wrap(made.plaintext, context)
            finally:
                made.plaintext.wipe()
            canary = await provider.rewrap(made.wrapped, context)
            opened = await provider.unwrap(canary.wrapped, context)
            same = canary_digest(opened) == digest
            opened.wipe()
            await provider.describe()
            await provider.destruction()
        except KmsError as error:
            await audit_log.record(AuditEntry(actor, action, error.verdict.value, None, call_details(calls)))
            if error.verdict is Verdict.DENIED:
                raise InvalidInputError(f"this key cannot be used: {explain(error, key)}") from None
            raise UnavailableError(f"this key could not be tried: {explain(error, key)}") from None
    if not same:
        raise InvalidInputError("this KMS does not give back what it wrapped")
    return Canary(canary.wrapped, digest, canary.key_version)


class Cmks:
    """The CMK of each key configuration, and a provider for it. Every call goes into the ledger."""

    def __init__(self, factory: ProviderFactory, ledger: KmsLedger) -> None:
        self._factory = factory
        self._ledger = ledger
        self._providers: dict[KeyConfigurationId, tuple[CmkKey, KmsProvider]] = {}

    def make(self, key: CmkKey) -> KmsProvider:
        """A provider for a key that is not a key configuration yet. Raises InvalidInputError when the settings have
        nothing to use it with."""

        def observe(call: KmsCall) -> None:
            collect(replace(call, key=key.identifier))
            self._ledger.note(key, call)

        return self._factory(key, observe)

    def make_usable(self, key: CmkKey) -> KmsProvider:
        """As `make`, for a key of before. One that the settings have nothing for any more gets a provider that says so:
        it must not keep the others from being served."""
        try:
            return self.make(key)
        except InvalidInputError as error:
            _log.error("a key configuration cannot be used", key=key.identifier, reason=str(error))
            return NoProvider()

    def add(self, key_configuration_id: KeyConfigurationId, key: CmkKey, provider: KmsProvider) -> None:
        self._providers[key_configuration_id] = key, provider

    def replace(self, key_configuration_id: KeyConfigurationId, key: CmkKey, provider: KmsProvider) -> KmsProvider:
        """Returns the former provider, to be closed."""
        _, former = self._providers[key_configuration_id]
        self._providers[key_configuration_id] = key, provider
        return former

    def all(self) -> list[KeyConfigurationId]:
        return list(self._providers)

    def of(self, key_configuration_id: KeyConfigurationId) -> KmsProvider:
        return self._providers[key_configuration_id][1]

    def explain(self, key_configuration_id: KeyConfigurationId, error: KmsError) -> str:
        """A failure of this CMK's KMS for the person who has to do something about it."""
        return explain(error, self._providers[key_configuration_id][0])

    async def remove(self, key_configuration_id: KeyConfigurationId) -> None:
        _, provider = self._providers.pop(key_configuration_id, (None, None))
        if provider is not None:
            await provider.aclose()

    async def aclose(self) -> None:
        for key_configuration_id in list(self._providers):
            await self.remove(key_configuration_id)


ACCESS_WORDS: Final[dict[KmsAccess, str]] = {
    KmsAccess.ALLOWED: "",
    KmsAccess.OUTAGE: "the customer's KMS has not answered for longer than the outage grace",
    KmsAccess.DENIED: "the customer's KMS denies the use of the key",
}
"""Why a project is not active, when the KMS is the reason."""
