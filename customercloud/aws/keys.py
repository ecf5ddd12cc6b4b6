"""Life of a KMS key: states, transitions, rotation, deletion, and what of it is visible when.

States and transitions (KMS Developer Guide, "Key states")::

              DisableKey                 ScheduleKeyDeletion
    Enabled ─────────────► Disabled ◄──────────┐ (from both)
       ▲  ◄───────────────    │     ──────────►│
       │      EnableKey       └─ Cancel ─── PendingDeletion ── deletion date ──► destroyed (the record is gone)
       └───────────────────────────────────────┘ never directly: a cancelled key is Disabled

A key whose material the customer brings (origin EXTERNAL) is PendingImport for as long as it has none: before the first
import, and again once its material was deleted or has expired. Then no call is good for anything, at once, and only the
same material can be imported again.

Management calls (Describe, Enable, PutKeyPolicy, …) see a change at once. Cryptographic calls and authorisation see the
*effective view*, which follows after the propagation delay that was in force at the change: AWS documents that key
state and policy are eventually consistent, and a revocation test without that delay proves too much.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import os
import uuid
from enum import StrEnum
from typing import Final, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field

from customercloud.aws.errors import AwsError, unsupported

MIN_DELETION_WINDOW_DAYS: Final = 7
MAX_DELETION_WINDOW_DAYS: Final = 30
MAX_ON_DEMAND_ROTATIONS: Final = 25
DEFAULT_ROTATION_PERIOD_DAYS: Final = 365


class KeyState(StrEnum):
    ENABLED = "Enabled"
    DISABLED = "Disabled"
    PENDING_DELETION = "PendingDeletion"
    PENDING_IMPORT = "PendingImport"


class KeyOrigin(StrEnum):
    AWS_KMS = "AWS_KMS"
    EXTERNAL = "EXTERNAL"
    """The customer's own material, imported."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KeyMaterial(_Record):
    """One generation of 256-bit key material ("backing key")."""

    material_id: str
    secret: Base64Bytes = Field(repr=False)
    created_at: dt.datetime
    rotation_type: Literal["AUTOMATIC", "ON_DEMAND"] | None
    """How it became current; None for the first."""

    @classmethod
    def new(cls, now: dt.datetime, rotation_type: Literal["AUTOMATIC", "ON_DEMAND"] | None = None) -> KeyMaterial:
        # model_construct: validation would take the raw bytes for base64 text.
        return cls.model_construct(
            material_id=os.urandom(32).hex(), secret=os.urandom(32), created_at=now, rotation_type=rotation_type
        )


class Imported(_Record):
    """Which material a key takes: none but the one that was imported first, however often it was deleted since."""

    material_id: str
    salt_hex: str
    digest_hex: str

    @classmethod
    def of(cls, secret: bytes) -> Imported:
        salt = os.urandom(16)
        return cls(material_id=os.urandom(32).hex(), salt_hex=salt.hex(), digest_hex=_digest(salt, secret))

    def matches(self, secret: bytes) -> bool:
        return hmac.compare_digest(_digest(bytes.fromhex(self.salt_hex), secret), self.digest_hex)


def _digest(salt: bytes, secret: bytes) -> str:
    return hmac.digest(salt, secret, hashlib.sha256).hex()


class ImportParameters(_Record):
    """What GetParametersForImport has given out: the key to wrap material with, and the token that goes with it."""

    token_hex: str
    private_key: Base64Bytes = Field(repr=False)
    """RSA; PKCS #8, DER."""
    algorithm: str
    valid_to: dt.datetime


class KeyPolicy(_Record):
    document: str
    binding: dict[str, str]
    """Principal ARN → unique id of the user or role that it meant when the policy was stored."""


class KeyView(_Record):
    """What cryptographic calls see from `visible_at` on."""

    visible_at: dt.datetime
    state: KeyState
    policy: KeyPolicy
    material_id: str
    tags: dict[str, str] | None = None
    """None in state of an earlier version, which had no delay for them."""


class Key(_Record):
    """Immutable; every transition returns another Key. Raises AwsError from a state that does not allow it."""

    key_id: str
    account_id: str
    arn: str
    description: str
    created_at: dt.datetime
    state: KeyState
    deletion_date: dt.datetime | None = None
    deletion_window_days: int | None = None
    policy: KeyPolicy
    materials: tuple[KeyMaterial, ...]
    """Oldest first; the last one is current. None while one is to be imported."""
    origin: KeyOrigin = KeyOrigin.AWS_KMS
    imported: Imported | None = None
    """None before the first import."""
    material_expires_at: dt.datetime | None = None
    """Of imported material that is there."""
    import_parameters: tuple[ImportParameters, ...] = ()
    tags: dict[str, str] = Field(default_factory=dict)
    rotation_period_days: int | None = None
    next_rotation: dt.datetime | None = None
    views: tuple[KeyView, ...]
    """Oldest first. At most one view is visible at a time: the last whose `visible_at` has come."""

    @classmethod
    def new(
        cls,
        account_id: str,
        region: str,
        description: str,
        policy: KeyPolicy,
        now: dt.datetime,
        tags: dict[str, str] | None = None,
        origin: KeyOrigin = KeyOrigin.AWS_KMS,
    ) -> Key:
        key_id = str(uuid.uuid4())
        materials = (KeyMaterial.new(now),) if origin is KeyOrigin.AWS_KMS else ()
        state = KeyState.ENABLED if materials else KeyState.PENDING_IMPORT
        material_id = materials[0].material_id if materials else ""
        view = KeyView(visible_at=now, state=state, policy=policy, material_id=material_id, tags=tags or {})
        return cls.model_construct(
            key_id=key_id,
            account_id=account_id,
            arn=f"arn:aws:kms:{region}:{account_id}:key/{key_id}",
            description=description,
            created_at=now,
            state=state,
            policy=policy,
            materials=materials,
            origin=origin,
            tags=tags or {},
            views=(view,),
        )

    def rotation_due_at(self, now: dt.datetime) -> Key:
        """With its rotation period over."""
        return self.model_copy(update={"next_rotation": now})

    @property
    def current_material(self) -> KeyMaterial:
        """Not to be asked for while one is to be imported."""
        return self.materials[-1]

    @property
    def current_material_id(self) -> str:
        """Empty while one is to be imported."""
        return self.current_material.material_id if self.materials else ""

    @property
    def on_demand_rotations(self) -> int:
        return sum(material.rotation_type == "ON_DEMAND" for material in self.materials)

    def material(self, material_id: str) -> KeyMaterial | None:
        return next((m for m in self.materials if m.material_id == material_id), None)

    def effective(self, now: dt.datetime) -> KeyView:
        """What cryptographic calls and authorisation see at `now`."""
        return next((view for view in reversed(self.views) if view.visible_at <= now), self.views[0])

    def _changed(self, now: dt.datetime, delay: dt.timedelta, **update: object) -> Key:
        """`update`, visible to cryptographic calls after `delay`; views that nobody can see any more are dropped."""
        changed = self.model_copy(update=update)
        view = KeyView(
            # Never before a change that was made earlier under a longer delay: changes become visible in order.
            visible_at=max(now + delay, self.views[-1].visible_at),
            state=changed.state,
            policy=changed.policy,
            material_id=changed.current_material_id,
            tags=changed.tags,
        )
        still_visible = self.views.index(self.effective(now))
        return changed.model_copy(update={"views": (*self.views[still_visible:], view)})

    # ── transitions ────────────────────────────────────────────────────────────────────────────────────────────

    def enable(self, now: dt.datetime, delay: dt.timedelta) -> Key:
        self.refuse_pending_deletion()
        self._refuse_pending_import()
        return self._changed(now, delay, state=KeyState.ENABLED)

    def disable(self, now: dt.datetime, delay: dt.timedelta) -> Key:
        self.refuse_pending_deletion()
        self._refuse_pending_import()
        return self._changed(now, delay, state=KeyState.DISABLED)

    def schedule_deletion(self, window_days: int, now: dt.datetime, delay: dt.timedelta) -> Key:
        self.refuse_pending_deletion()
        return self._changed(
            now,
            delay,
            state=KeyState.PENDING_DELETION,
            deletion_date=now + dt.timedelta(days=window_days),
            deletion_window_days=window_days,
        )

    def cancel_deletion(self, now: dt.datetime, delay: dt.timedelta) -> Key:
        if self.state is not KeyState.PENDING_DELETION:
            raise AwsError("KMSInvalidStateException", f"{self.arn} is not pending deletion.")
        state = KeyState.DISABLED if self.materials else KeyState.PENDING_IMPORT
        return self._changed(now, delay, state=state, deletion_date=None, deletion_window_days=None)

    def put_policy(self, policy: KeyPolicy, now: dt.datetime, delay: dt.timedelta) -> Key:
        return self._changed(now, delay, policy=policy)

    def described_as(self, description: str) -> Key:
        self.refuse_pending_deletion()
        return self.model_copy(update={"description": description})

    def with_tags(self, tags: dict[str, str], now: dt.datetime, delay: dt.timedelta) -> Key:
        """These tags and no others."""
        self.refuse_pending_deletion()
        return self._changed(now, delay, tags=tags)

    def effective_tags(self, now: dt.datetime) -> dict[str, str]:
        """What policies see."""
        tags = self.effective(now).tags
        return self.tags if tags is None else tags

    def rotate_on_demand(self, now: dt.datetime, delay: dt.timedelta) -> Key:
        self.require_origin(KeyOrigin.AWS_KMS)
        self.require_enabled(self.state)
        if self.on_demand_rotations >= MAX_ON_DEMAND_ROTATIONS:
            raise AwsError(
                "LimitExceededException",
                f"The on-demand rotations limit has been reached for the given keyId. No more on-demand rotations "
                f"can be performed for this key: {self.arn}",
            )
        return self._changed(now, delay, materials=(*self.materials, KeyMaterial.new(now, "ON_DEMAND")))

    def enable_rotation(self, period_days: int, now: dt.datetime) -> Key:
        self.require_origin(KeyOrigin.AWS_KMS)
        self.require_enabled(self.state)
        return self.model_copy(
            update={"rotation_period_days": period_days, "next_rotation": now + dt.timedelta(days=period_days)}
        )

    def disable_rotation(self) -> Key:
        self.require_origin(KeyOrigin.AWS_KMS)
        self.require_enabled(self.state)
        return self.model_copy(update={"rotation_period_days": None, "next_rotation": None})

    def offering(self, parameters: ImportParameters, now: dt.datetime) -> Key:
        """With these parameters for an import, besides those that are still good."""
        self.refuse_pending_deletion()
        good = [each for each in self.import_parameters if now < each.valid_to]
        return self.model_copy(update={"import_parameters": (*good, parameters)})

    def with_material(
        self, secret: bytes, expires_at: dt.datetime | None, now: dt.datetime, delay: dt.timedelta
    ) -> Key:
        """Raises IncorrectKeyMaterialException for other material than was imported before."""
        self.refuse_pending_deletion()
        if self.imported is not None and not self.imported.matches(secret):
            raise AwsError(
                "IncorrectKeyMaterialException",
                f"The key material is not the one that was imported before into {self.arn}.",
            )
        imported = self.imported or Imported.of(secret)
        material = KeyMaterial.model_construct(
            material_id=imported.material_id, secret=secret, created_at=now, rotation_type=None
        )
        state = KeyState.ENABLED if self.state is KeyState.PENDING_IMPORT else self.state
        return self._changed(
            now, delay, state=state, materials=(material,), imported=imported, material_expires_at=expires_at
        )

    def without_material(self) -> Key:
        """At once: there is nothing left that a late view could use."""
        state = self.state if self.state is KeyState.PENDING_DELETION else KeyState.PENDING_IMPORT
        views = tuple(view.model_copy(update={"state": state, "material_id": ""}) for view in self.views)
        return self.model_copy(update={"state": state, "materials": (), "material_expires_at": None, "views": views})

    def has_expired_material(self, now: dt.datetime) -> bool:
        return self.material_expires_at is not None and now >= self.material_expires_at

    def automatic_rotation(self, now: dt.datetime, delay: dt.timedelta) -> Key | None:
        """With new material when one is due, else None. A key that is not enabled waits until it is."""
        if self.next_rotation is None or self.rotation_period_days is None or now < self.next_rotation:
            return None
        if self.state is not KeyState.ENABLED:
            return None
        return self._changed(
            now,
            delay,
            materials=(*self.materials, KeyMaterial.new(now, "AUTOMATIC")),
            next_rotation=now + dt.timedelta(days=self.rotation_period_days),
        )

    def is_due_for_destruction(self, now: dt.datetime) -> bool:
        return self.state is KeyState.PENDING_DELETION and self.deletion_date is not None and now >= self.deletion_date

    # ── refusals ───────────────────────────────────────────────────────────────────────────────────────────────

    def require_enabled(self, state: KeyState) -> None:
        """What a cryptographic call answers for a key that is in `state`."""
        match state:
            case KeyState.ENABLED:
                return
            case KeyState.DISABLED:
                raise AwsError("DisabledException", f"{self.arn} is disabled.")
            case KeyState.PENDING_DELETION:
                raise AwsError("KMSInvalidStateException", f"{self.arn} is pending deletion.")
            case KeyState.PENDING_IMPORT:
                raise AwsError("KMSInvalidStateException", f"{self.arn} is pending import.")

    def require_origin(self, origin: KeyOrigin) -> None:
        if self.origin is not origin:
            raise unsupported(f"{self.arn} origin is {self.origin} which is not valid for this operation.")

    def _refuse_pending_import(self) -> None:
        if self.state is KeyState.PENDING_IMPORT:
            raise AwsError("KMSInvalidStateException", f"{self.arn} is pending import.")

    def refuse_pending_deletion(self) -> None:
        if self.state is KeyState.PENDING_DELETION:
            raise AwsError("KMSInvalidStateException", f"{self.arn} is pending deletion.")
