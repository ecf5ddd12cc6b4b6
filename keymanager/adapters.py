"""From a key configuration's CMK to the adapter that speaks for it, as the settings say."""

from __future__ import annotations

from keymanager.config import KeymanagerSettings
from keymanager.kms.base import KmsCallObserver, KmsProvider
from keymanager.kms.calls import CallLimits
from keymanager.kms.kind import Surroundings
from keymanager.providers import KINDS, ProviderFactory, kind_of
from shared.clock import Clock
from shared.cmk import CmkKey


def provider_factory(settings: KeymanagerSettings, clock: Clock) -> ProviderFactory:
    """Adapters for all kinds of KMS, which are loaded here. Blocks for seconds when they are not loaded yet."""
    for each in KINDS.values():
        each.load()
    limits = CallLimits(settings.kms_connect_timeout_s, settings.kms_read_timeout_s, settings.kms_deadline_s)

    def make(key: CmkKey, observer: KmsCallObserver) -> KmsProvider:
        kind = kind_of(key)
        return kind.connect(key, settings.of(kind), Surroundings(limits, observer, clock))

    return make


def session_life_s(key: CmkKey, settings: KeymanagerSettings) -> float | None:
    """How long a session with the key's KMS may outlive the trust in us that it was opened on. None: not known."""
    kind = kind_of(key)
    return kind.session_life_s(settings.of(kind))
