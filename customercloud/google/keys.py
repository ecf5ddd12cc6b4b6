"""Life of crypto keys and their versions: states, transitions, rotation, destruction, and what is visible when.

States of a version ("Key version states", Cloud KMS documentation)::

              patch state=DISABLED            destroy (from both)
    ENABLED ─────────────────► DISABLED ─────────────► DESTROY_SCHEDULED ── destroyTime ──► DESTROYED
       ▲  ◄───────────────────    ▲                            │                   (the material is gone)
       │   patch state=ENABLED    └────────── restore ─────────┘
       └─ never directly: a restored version is DISABLED

Management calls see a change at once. For cryptographic calls enabling is strong and disabling (destroying, a new
primary) is eventual: "usually within a minute, exceptionally several hours" (Cloud KMS, "Resource consistency").
"""

from __future__ import annotations

import datetime as dt
import os
from enum import StrEnum
from typing import Final

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field

from customercloud.delayed import Delayed
from customercloud.google.errors import GoogleError, failed_precondition, not_found
from customercloud.google.names import KeyName, VersionName

DEFAULT_DESTROY_SCHEDULED: Final = dt.timedelta(days=30)
MIN_DESTROY_SCHEDULED: Final = dt.timedelta(hours=24)
MAX_DESTROY_SCHEDULED: Final = dt.timedelta(days=120)
MIN_ROTATION_PERIOD: Final = dt.timedelta(hours=24)
MAX_ROTATION_PERIOD: Final = dt.timedelta(hours=876_000)


class State(StrEnum):
    """Names as in kms_v1.CryptoKeyVersion.CryptoKeyVersionState."""

    ENABLED = "ENABLED"
    DISABLED = "DISABLED"
    DESTROY_SCHEDULED = "DESTROY_SCHEDULED"
    DESTROYED = "DESTROYED"


class ProtectionLevel(StrEnum):
    SOFTWARE = "SOFTWARE"
    HSM = "HSM"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Ring(_Record):
    name: str
    created_at: dt.datetime


class Version(_Record):
    """Immutable; every transition returns another one. Raises FAILED_PRECONDITION from a state that has no such."""

    number: int
    material: Base64Bytes | None = Field(repr=False)
    """256 bits; None when destroyed."""
    protection_level: ProtectionLevel
    state: State
    in_force: Delayed[State]
    created_at: dt.datetime
    destroy_at: dt.datetime | None = None
    destroyed_at: dt.datetime | None = None

    @classmethod
    def new(cls, number: int, level: ProtectionLevel, now: dt.datetime) -> Version:
        # model_construct: validation would take the raw bytes for base64 text.
        return cls.model_construct(
            number=number,
            material=os.urandom(32),
            protection_level=level,
            state=State.ENABLED,
            in_force=Delayed[State].of(State.ENABLED, now),
            created_at=now,
        )

    def enable(self, name: VersionName, now: dt.datetime) -> Version:
        self._require(name, State.ENABLED, State.DISABLED)
        return self.model_copy(update={"state": State.ENABLED, "in_force": Delayed[State].of(State.ENABLED, now)})

    def disable(self, name: VersionName, now: dt.datetime, delay: dt.timedelta) -> Version:
        self._require(name, State.ENABLED, State.DISABLED)
        return self._changed(State.DISABLED, now, delay)

    def schedule_destruction(
        self, name: VersionName, wait: dt.timedelta, now: dt.datetime, delay: dt.timedelta
    ) -> Version:
        self._require(name, State.ENABLED, State.DISABLED)
        return self._changed(State.DESTROY_SCHEDULED, now, delay).model_copy(update={"destroy_at": now + wait})

    def restore(self, name: VersionName, now: dt.datetime, delay: dt.timedelta) -> Version:
        self._require(name, State.DESTROY_SCHEDULED)
        return self._changed(State.DISABLED, now, delay).model_copy(update={"destroy_at": None})

    def destroyed(self, now: dt.datetime) -> Version:
        """The end of the waiting period. There is nothing left that a late view could use."""
        return self.model_copy(
            update={
                "state": State.DESTROYED,
                "in_force": Delayed[State].of(State.DESTROYED, now),
                "material": None,
                "destroyed_at": now,
                "destroy_at": None,
            }
        )

    def is_due_for_destruction(self, now: dt.datetime) -> bool:
        return self.state is State.DESTROY_SCHEDULED and self.destroy_at is not None and now >= self.destroy_at

    def usable_material(self, name: VersionName, now: dt.datetime) -> bytes:
        """For a cryptographic call at `now`. Raises FAILED_PRECONDITION with the state that the call sees."""
        state = self.in_force.at(now)
        if state is not State.ENABLED or self.material is None:
            raise not_enabled(name, state)
        return self.material

    def _changed(self, state: State, now: dt.datetime, delay: dt.timedelta) -> Version:
        return self.model_copy(update={"state": state, "in_force": self.in_force.then(state, now, delay)})

    def _require(self, name: VersionName, *states: State) -> None:
        if self.state not in states:
            message = (
                f"The request cannot be fulfilled. Resource {name} has value {self.state} in field "
                "crypto_key_version.state."
            )
            raise failed_precondition(message, str(name), f"KEY_{self.state}")


def not_enabled(name: VersionName, state: State) -> GoogleError:
    return failed_precondition(f"{name} is not enabled, current state is: {state}.", str(name), f"KEY_{state}")


class Key(_Record):
    """Immutable. All of them are symmetric (ENCRYPT_DECRYPT, GOOGLE_SYMMETRIC_ENCRYPTION)."""

    name: str
    uid_hex: str
    """16 bytes that ciphertexts carry."""
    created_at: dt.datetime
    labels: dict[str, str]
    protection_level: ProtectionLevel
    """Of versions made from now on."""
    versions: tuple[Version, ...]
    """Oldest first, numbered from 1 without gaps."""
    primary: int | None
    primary_in_force: Delayed[int | None]
    rotation_period: dt.timedelta | None = None
    next_rotation: dt.datetime | None = None
    destroy_scheduled: dt.timedelta = DEFAULT_DESTROY_SCHEDULED

    @classmethod
    def new(
        cls,
        name: KeyName,
        now: dt.datetime,
        *,
        level: ProtectionLevel,
        labels: dict[str, str],
        with_version: bool,
        destroy_scheduled: dt.timedelta,
        rotation_period: dt.timedelta | None,
        next_rotation: dt.datetime | None,
    ) -> Key:
        primary = 1 if with_version else None
        return cls.model_construct(
            name=str(name),
            uid_hex=os.urandom(16).hex(),
            created_at=now,
            labels=labels,
            protection_level=level,
            versions=(Version.new(1, level, now),) if with_version else (),
            primary=primary,
            primary_in_force=Delayed[int | None].of(primary, now),
            rotation_period=rotation_period,
            next_rotation=next_rotation,
            destroy_scheduled=destroy_scheduled,
        )

    @property
    def uid(self) -> bytes:
        return bytes.fromhex(self.uid_hex)

    def find(self, number: int | None) -> Version | None:
        return self.versions[number - 1] if number is not None and 1 <= number <= len(self.versions) else None

    def version(self, name: VersionName) -> Version:
        """Raises NOT_FOUND."""
        version = self.find(name.number)
        if version is None:
            raise not_found(f"CryptoKeyVersion {name} not found.")
        return version

    def with_version(self, version: Version) -> Key:
        """`version` in place of the one with its number, or as the newest."""
        kept = [v for v in self.versions if v.number != version.number]
        return self.model_copy(update={"versions": tuple(sorted((*kept, version), key=lambda v: v.number))})

    def add_version(self, now: dt.datetime) -> tuple[Key, Version]:
        version = Version.new(len(self.versions) + 1, self.protection_level, now)
        return self.with_version(version), version

    def with_primary(self, number: int, now: dt.datetime, delay: dt.timedelta) -> Key:
        in_force = self.primary_in_force.then(number, now, delay)
        return self.model_copy(update={"primary": number, "primary_in_force": in_force})

    def automatic_rotation(self, now: dt.datetime) -> Key | None:
        """With a new primary version when one is due, else None. One rotation, however many were missed."""
        if self.rotation_period is None or self.next_rotation is None or now < self.next_rotation:
            return None
        missed = (now - self.next_rotation) // self.rotation_period
        upcoming = self.next_rotation + (missed + 1) * self.rotation_period
        rotated, version = self.add_version(now)
        return rotated.with_primary(version.number, now, dt.timedelta(0)).model_copy(update={"next_rotation": upcoming})
