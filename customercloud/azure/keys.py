"""Life of a Key Vault key: versions, their attributes, soft delete, rotation, and what of it is visible when.

::

    create ──► key with versions ──── DELETE ────► deleted (recoverable) ── purge, or scheduledPurgeDate ──► gone
                 ▲   │ create, rotate: one more         │
                 │   └ PATCH: enabled, nbf, exp, ops    │
                 └────────────── recover ───────────────┘   with every version as it was

Management calls see a change at once. Cryptographic calls see the *effective view*, which follows after the propagation
delay that was in force at the change: a revocation test without that delay proves too much.
"""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import dataclass
from typing import Final, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field

from customercloud.azure import errors
from customercloud.azure.durations import moved

KeyType = Literal["RSA", "RSA-HSM", "EC", "EC-HSM"]
_NO_TIME: Final = dt.timedelta(0)
RSA_SIZES_BITS: Final = (2048, 3072, 4096)
KEY_OPERATIONS: Final = ("encrypt", "decrypt", "sign", "verify", "wrapKey", "unwrapKey")
PUBLIC_OPERATIONS: Final = frozenset({"encrypt", "verify", "wrapKey"})
"""What needs the public key only: what a vault may be set to allow on a disabled key (azure-sdk-for-python#45342)."""
_OPENING_OPERATIONS: Final = frozenset({"decrypt", "unwrapKey", "verify"})
"""Allowed outside of nbf … exp, so that nobody loses data to a date ("About keys", date-time controlled operations)."""


@dataclass(frozen=True, slots=True)
class KeySpec:
    """What kind of key pair."""

    kty: KeyType
    size_bits: int
    curve: str | None = None
    """None for RSA."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KeyVersion(_Record):
    """The key pair of one version; never changes. `private_key` is PKCS #8, DER."""

    version: str
    kty: KeyType
    size_bits: int
    curve: str | None = None
    """None for RSA."""
    private_key: Base64Bytes = Field(repr=False)
    created: dt.datetime

    @classmethod
    def new(cls, spec: KeySpec, private_key: bytes, now: dt.datetime) -> KeyVersion:
        # model_construct: validation would take the raw bytes for base64 text.
        return cls.model_construct(
            version=uuid.uuid4().hex,
            kty=spec.kty,
            size_bits=spec.size_bits,
            curve=spec.curve,
            private_key=private_key,
            created=now,
        )

    @property
    def spec(self) -> KeySpec:
        return KeySpec(self.kty, self.size_bits, self.curve)


class Attributes(_Record):
    """What the owner may change of a version."""

    enabled: bool = True
    not_before: dt.datetime | None = None
    expires: dt.datetime | None = None
    key_ops: tuple[str, ...] = KEY_OPERATIONS
    tags: dict[str, str] = Field(default_factory=dict)
    updated: dt.datetime

    def refuse(self, operation: str, now: dt.datetime, *, public_on_disabled: bool) -> None:
        """Raises AzureError unless a key of these attributes may do `operation` at `now`."""
        if not self.enabled and not (public_on_disabled and operation in PUBLIC_OPERATIONS):
            raise errors.key_disabled(operation)
        if operation not in self.key_ops:
            raise errors.operation_not_permitted(operation)
        if operation in _OPENING_OPERATIONS:
            return
        if self.not_before is not None and now < self.not_before:
            raise errors.key_not_yet_valid(operation)
        if self.expires is not None and now >= self.expires:
            raise errors.key_expired(operation)


class RotationAction(_Record):
    """Exactly one of the triggers is given; both are durations (`durations`)."""

    type: Literal["Rotate", "Notify"]
    time_after_create: str | None = None
    time_before_expiry: str | None = None


class RotationPolicy(_Record):
    actions: tuple[RotationAction, ...]
    expiry_time: str | None = None
    """Lifetime of versions that a rotation makes."""
    created: dt.datetime
    updated: dt.datetime

    def next_rotation(self, created: dt.datetime, expires: dt.datetime | None) -> dt.datetime | None:
        """When a version of these dates is to be replaced; None for never."""
        rotate = next((action for action in self.actions if action.type == "Rotate"), None)
        if rotate is None:
            return None
        if rotate.time_after_create is not None:
            return moved(created, rotate.time_after_create)
        if expires is None and self.expiry_time is not None:
            expires = moved(created, self.expiry_time)
        if expires is None or rotate.time_before_expiry is None:
            return None
        return moved(expires, rotate.time_before_expiry, back=True)


class KeyView(_Record):
    """What cryptographic calls see from `visible_at` on."""

    visible_at: dt.datetime
    attributes: dict[str, Attributes]
    """By version; a version that is missing is not visible yet."""
    current: str
    deleted: bool


class Key(_Record):
    """Immutable; every transition returns another Key. `delay` is how long cryptographic calls see the old one."""

    name: str
    versions: tuple[KeyVersion, ...]
    """Oldest first; the last one is current."""
    attributes: dict[str, Attributes]
    deleted_at: dt.datetime | None = None
    purge_at: dt.datetime | None = None
    settled_at: dt.datetime | None = None
    """Until then the newest deletion or recovery is in progress."""
    rotation_policy: RotationPolicy | None = None
    views: tuple[KeyView, ...]
    """Oldest first. At most one is visible at a time: the last whose `visible_at` has come."""

    @classmethod
    def new(cls, name: str, version: KeyVersion, attributes: Attributes) -> Key:
        view = KeyView(
            visible_at=version.created,
            attributes={version.version: attributes},
            current=version.version,
            deleted=False,
        )
        return cls.model_construct(
            name=name, versions=(version,), attributes={version.version: attributes}, views=(view,)
        )

    @property
    def current(self) -> KeyVersion:
        return self.versions[-1]

    @property
    def deleted(self) -> bool:
        """Or about to be."""
        return self.deleted_at is not None

    def is_settled(self, now: dt.datetime) -> bool:
        """No deletion or recovery is in progress."""
        return self.settled_at is None or now >= self.settled_at

    def is_seen(self, now: dt.datetime, *, deleted: bool) -> bool:
        """Among the deleted keys, or among the others: in neither while it goes from one to the other."""
        return self.deleted is deleted and self.is_settled(now)

    def refuse_unsettled(self, now: dt.datetime) -> None:
        """Raises AzureError while a deletion or recovery is in progress."""
        if not self.is_settled(now):
            raise errors.being_deleted(self.name) if self.deleted else errors.being_recovered(self.name)

    def version(self, version: str) -> KeyVersion:
        """The current one for "". Raises AzureError when there is none such."""
        if not version:
            return self.current
        found = next((v for v in self.versions if v.version == version), None)
        if found is None:
            raise errors.version_not_found(self.name, version)
        return found

    def effective(self, now: dt.datetime) -> KeyView:
        """What cryptographic calls see at `now`."""
        return next((view for view in reversed(self.views) if view.visible_at <= now), self.views[0])

    def usable(self, version: str, operation: str, now: dt.datetime, *, public_on_disabled: bool) -> KeyVersion:
        """The version that does `operation`. Raises AzureError as the service words it."""
        view = self.effective(now)
        if view.deleted:
            raise errors.key_not_found(f"{self.name}/{version}" if version else self.name)
        chosen = version or view.current
        if chosen not in view.attributes:
            raise errors.version_not_found(self.name, chosen)
        view.attributes[chosen].refuse(operation, now, public_on_disabled=public_on_disabled)
        return self.version(chosen)

    def _changed(self, now: dt.datetime, delay: dt.timedelta, **update: object) -> Key:
        """`update`, visible to cryptographic calls after `delay`; views that nobody can see any more are dropped."""
        changed = self.model_copy(update=update)
        view = KeyView(
            # Never before a change that was made earlier under a longer delay: changes become visible in order.
            visible_at=max(now + delay, self.views[-1].visible_at),
            attributes=changed.attributes,
            current=changed.current.version,
            deleted=changed.deleted,
        )
        still_visible = self.views.index(self.effective(now))
        return changed.model_copy(update={"views": (*self.views[still_visible:], view)})

    # ── transitions ────────────────────────────────────────────────────────────────────────────────────────────

    def add_version(self, version: KeyVersion, attributes: Attributes, delay: dt.timedelta) -> Key:
        return self._changed(
            version.created,
            delay,
            versions=(*self.versions, version),
            attributes={**self.attributes, version.version: attributes},
        )

    def rotated_attributes(self, now: dt.datetime) -> Attributes:
        """Those of the version that a rotation at `now` makes: the current one's, with a lifetime of its own."""
        policy = self.rotation_policy
        expires = None if policy is None or policy.expiry_time is None else moved(now, policy.expiry_time)
        return self.attributes[self.current.version].model_copy(
            update={"enabled": True, "not_before": None, "expires": expires, "updated": now}
        )

    def update(self, version: str, attributes: Attributes, now: dt.datetime, delay: dt.timedelta) -> Key:
        return self._changed(now, delay, attributes={**self.attributes, version: attributes})

    def delete(self, days: int, now: dt.datetime, delay: dt.timedelta, takes: dt.timedelta = _NO_TIME) -> Key:
        """`takes`: how long it is in progress."""
        purge_at = now + dt.timedelta(days=days)
        return self._changed(now, delay, deleted_at=now, purge_at=purge_at, settled_at=now + takes)

    def recover(self, now: dt.datetime, delay: dt.timedelta, takes: dt.timedelta = _NO_TIME) -> Key:
        return self._changed(now, max(delay, takes), deleted_at=None, purge_at=None, settled_at=now + takes)

    def restored(self, now: dt.datetime) -> Key:
        """From a backup: as it was, and seen at once."""
        view = KeyView(visible_at=now, attributes=self.attributes, current=self.current.version, deleted=False)
        return self.model_copy(update={"settled_at": None, "views": (view,)})

    def with_policy(self, policy: RotationPolicy) -> Key:
        return self.model_copy(update={"rotation_policy": policy})

    def is_due_for_rotation(self, now: dt.datetime) -> bool:
        """A key that is disabled or deleted waits until it is not."""
        attributes = self.attributes[self.current.version]
        if self.rotation_policy is None or self.deleted or not attributes.enabled:
            return False
        due = self.rotation_policy.next_rotation(self.current.created, attributes.expires)
        return due is not None and now >= due

    def is_due_for_purge(self, now: dt.datetime) -> bool:
        return self.purge_at is not None and now >= self.purge_at
