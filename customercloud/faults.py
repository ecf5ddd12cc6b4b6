"""Misbehaviour on demand: what a cloud does to its clients on a bad day.

Set by `PUT /_keylake/faults`, in force at once, kept in memory only: a restarted cloud is a healthy cloud. The
administrative paths and the health checks are never hit. Faults are applied in this order: outage, latency,
throttling, errors; the last two only to requests that are authenticated, so that they stand in the audit log like any
other refusal.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import random
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Final

from pydantic import BaseModel, ConfigDict, Field


class Outage(StrEnum):
    NONE = "none"
    REFUSE = "refuse"
    """Every request is answered 503 at once."""
    HANG = "hang"
    """Connections are accepted and requests read, and no answer comes while the outage lasts."""


class ErrorKind(StrEnum):
    """Which 5xx. The first three are the KMS exceptions that AWS marks as the service's own fault."""

    INTERNAL = "internal"
    DEPENDENCY_TIMEOUT = "dependency_timeout"
    KEY_UNAVAILABLE = "key_unavailable"
    BAD_GATEWAY = "bad_gateway"
    """An HTML page of a load balancer, not an answer of the service."""


class Service(StrEnum):
    KMS = "kms"
    STS = "sts"
    CLOUDTRAIL = "cloudtrail"
    GOOGLE_KMS = "google_kms"
    GOOGLE_IAM = "google_iam"
    """Policies of accounts and projects, impersonation, tokens."""
    KEY_VAULT = "key_vault"
    ENTRA = "entra"
    """Entra ID: Azure's tokens."""


class KeyFaults(BaseModel):
    """All off by default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    outage: Outage = Outage.NONE
    latency_s: float = Field(default=0.0, ge=0, le=300, description="added to every answer")
    throttle_rate: float = Field(default=0.0, ge=0, le=1, description="share of requests that are throttled")
    error_rate: float = Field(default=0.0, ge=0, le=1, description="share of requests that fail with error_kind")
    error_kind: ErrorKind = ErrorKind.INTERNAL


class Faults(KeyFaults):
    """All off by default. A request of a spared caller sees none of them."""

    of_keys: dict[str, KeyFaults] = Field(
        default_factory=dict,
        max_length=1000,
        description="AWS KMS only: what requests that name one of these keys, by key id, see in place of the five "
        "faults above, so that one customer's key is troubled and another's is not",
    )
    services: frozenset[Service] = Field(
        default=frozenset(Service),
        description="which services the five faults above hit, and a skewed clock",
    )
    spared_access_key_ids: frozenset[str] = Field(
        default=frozenset(),
        description="callers that neither these faults nor a skewed clock hit, by access key id (AWS), client id "
        "(Azure) or e-mail address (Google): with the customer's here, the vendor is cut off from a cloud in which "
        "the customer can still disable a key",
    )
    propagation_delay_s: float = Field(
        default=0.0,
        ge=0,
        le=86_400,
        description="how long after a change of a key's state, policy, tags or material, of an alias, or of an "
        "identity and its policies, decisions and cryptographic calls still see the old one; in force for changes made "
        "from now on",
    )
    key_vault_transition_s: float = Field(
        default=0.0,
        ge=0,
        le=86_400,
        description="Azure only: how long a deletion or recovery of a key that begins from now on is in progress, and "
        "the key in neither of the two lists",
    )
    session_lifetime_s: float | None = Field(
        default=None, gt=0, description="role sessions made from now on live this long, whatever was asked for"
    )
    trail_delay_s: float = Field(
        default=0.0, ge=0, le=86_400, description="how long an event is withheld from LookupEvents (AWS: minutes)"
    )
    clock_skew_s: float = Field(
        default=0.0,
        ge=-86_400,
        le=86_400,
        description="how far the clock of whoever checks a signature or a token is ahead of the clock of whoever made "
        "it (negative: behind); AWS and Azure tolerate 5 minutes, Google's token endpoint too",
    )


class Injected(StrEnum):
    """What the injector did to a request."""

    NOTHING = "nothing"
    UNAVAILABLE = "unavailable"
    """Answer 503 and do nothing else."""
    GONE = "gone"
    """The client hung up while it was waiting."""


NO_FAULTS: Final = Faults()


class FaultInjector:
    """Holds the faults in force and applies them. `faults` may be replaced at any time, from the event loop."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.SystemRandom()
        self._faults = NO_FAULTS
        self._changed = asyncio.Event()

    @property
    def faults(self) -> Faults:
        return self._faults

    def set(self, faults: Faults) -> None:
        """Requests that hang are let go (with 503, not carried out) as soon as the outage is over."""
        self._faults = faults
        self._changed.set()
        self._changed = asyncio.Event()

    def _of(self, service: Service | None, access_key_id: str | None, key_id: str | None) -> KeyFaults:
        """What this request sees."""
        faults = self._faults
        if access_key_id in faults.spared_access_key_ids:
            return NO_FAULTS
        if key_id is not None and key_id in faults.of_keys:
            return faults.of_keys[key_id]
        return faults if service is None or service in faults.services else NO_FAULTS

    async def before(
        self,
        service: Service | None,
        access_key_id: str | None,
        disconnected: Callable[[], Awaitable[None]],
        key_id: str | None = None,
    ) -> Injected:
        """Outage and latency. `access_key_id` and `key_id` are what the request claims; `disconnected` returns when it
        hangs up."""
        faults = self._of(service, access_key_id, key_id)
        if faults.outage is Outage.REFUSE:
            return Injected.UNAVAILABLE
        if faults.outage is Outage.HANG:
            hung_up = asyncio.ensure_future(disconnected())
            try:
                while self._of(service, access_key_id, key_id).outage is Outage.HANG:
                    changed = asyncio.ensure_future(self._changed.wait())
                    await asyncio.wait({hung_up, changed}, return_when=asyncio.FIRST_COMPLETED)
                    changed.cancel()
                    if hung_up.done():
                        return Injected.GONE
            finally:
                hung_up.cancel()
            return Injected.UNAVAILABLE
        if faults.latency_s:
            await asyncio.sleep(faults.latency_s)
        return Injected.NOTHING

    def skew(self, service: Service, access_key_id: str | None) -> dt.timedelta:
        """What this caller's signature or token is checked with, added to the true time."""
        faults = self._faults
        if service not in faults.services or access_key_id in faults.spared_access_key_ids:
            return dt.timedelta(0)
        return dt.timedelta(seconds=faults.clock_skew_s)

    def throttles(self, service: Service, access_key_id: str, key_id: str | None = None) -> bool:
        return self._rng.random() < self._of(service, access_key_id, key_id).throttle_rate

    def fails(self, service: Service, access_key_id: str, key_id: str | None = None) -> ErrorKind | None:
        faults = self._of(service, access_key_id, key_id)
        return faults.error_kind if self._rng.random() < faults.error_rate else None
