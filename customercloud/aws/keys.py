"""Life of a KMS key: states, transitions, rotation, deletion, and what of it is visible when.

States and transitions (KMS Developer Guide, "Key states")::

              DisableKey                 ScheduleKeyDeletion
    Enabled ─────────────► Disabled ◄──────────┐ (from both)
       ▲  ◄───────────────    │     ──────────►│
       │      EnableKey       └─ Cancel ─── PendingDeletion ── deletion date ──► destroyed (the record is gone)
       └───────────────────────────────────────┘ never directly: a cancelled key is Disabled

Management calls (Describe, Enable, PutKeyPolicy, …) see a change at once. Cryptographic calls and authorisation see the
*effective view*, which follows after the propagation delay that was in force at the change: AWS documents that key
state and policy are eventually consistent, and a revocation test without that delay proves too much.
"""

from __future__ import annotations

import datetime as dt
import os
import uuid
from enum import StrEnum
from typing import Final, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field

from customercloud.aws.errors import AwsError

MIN_DELETION_WINDOW_DAYS: Final = 7
MAX_DELETION_WINDOW_DAYS: Final = 30
MAX_ON_DEMAND_ROTATIONS: Final = 25
DEFAULT_ROTATION_PERIOD_DAYS: Final = 365


class KeyState(StrEnum):
    ENABLED = "Enabled"
    DISABLED = "Disabled"
    PENDING_DELETION = "PendingDeletion"


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
    """Oldest first; the last one is current."""
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
    ) -> Key:
        key_id = str(uuid.uuid4())
        material = KeyMaterial.new(now)
        view = KeyView(
            visible_at=now, state=KeyState.ENABLED, policy=policy, material_id=material.material_id, tags=tags or {}
        )
        return cls.model_construct(
            key_id=key_id,
            account_id=account_id,
            arn=f"arn:aws:kms:{region}:{account_id}:key/{key_id}",
            description=description,
            created_at=now,
            state=KeyState.ENABLED,
            policy=policy,
            materials=(material,),
            tags=tags or {},
            views=(view,),
        )

    def rotation_due_at(self, now: dt.datetime) -> Key:
        """With its rotation period over."""
        return self.model_copy(update={"next_rotation": now})

    @property
    def current_material(self) -> KeyMaterial:
        return self.materials[-1]

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
            material_id=changed.current_material.material_id,
            tags=changed.tags,
        )
        still_visible = self.views.index(self.effective(now))
        return changed.model_copy(update={"views": (*self.views[still_visible:], view)})

    # ── transitions ────────────────────────────────────────────────────────────────────────────────────────────

    def enable(self, now: dt.datetime, delay: dt.timedelta) -> Key:
        self.refuse_pending_deletion()
        return self._changed(now, delay, state=KeyState.ENABLED)

    def disable(self, now: dt.datetime, delay: dt.timedelta) -> Key:
        self.refuse_pending_deletion()
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
        return self._changed(now, delay, state=KeyState.DISABLED, deletion_date=None, deletion_window_days=None)

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
        self.require_enabled(self.state)
        if self.on_demand_rotations >= MAX_ON_DEMAND_ROTATIONS:
            raise AwsError(
                "LimitExceededException",
                f"The on-demand rotations limit has been reached for the given keyId. No more on-demand rotations "
                f"can be performed for this key: {self.arn}",
            )
        return self._changed(now, delay, materials=(*self.materials, KeyMaterial.new(now, "ON_DEMAND")))

    def enable_rotation(self, period_days: int, now: dt.datetime) -> Key:
        self.require_enabled(self.state)
        return self.model_copy(
            update={"rotation_period_days": period_days, "next_rotation": now + dt.timedelta(days=period_days)}
        )

    def disable_rotation(self) -> Key:
        self.require_enabled(self.state)
        return self.model_copy(update={"rotation_period_days": None, "next_rotation": None})

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

    def refuse_pending_deletion(self) -> None:
        if self.state is KeyState.PENDING_DELETION:
            raise AwsError("KMSInvalidStateException", f"{self.arn} is pending deletion.")
