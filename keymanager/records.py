"""Rows of the keymanager's database, as the rest of the keymanager sees them. No plaintext key is ever in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from keymanager.lease_table import Holder
from keymanager.state import KmsAccess
from shared.api.keymanager import KeyState, KeyUse
from shared.cmk import CmkKey
from shared.ids import AccountId, KekId, KeyConfigurationId, ProjectId, TokenId, WorkspaceId
from shared.roles import PersonRole


@dataclass(frozen=True, slots=True)
class StoredKeyConfiguration:
    key_configuration_id: KeyConfigurationId
    account_id: AccountId
    name: str
    key: CmkKey
    outage_grace_s: float
    probe_interval_s: float
    canary_wrapped: bytes
    canary_digest: bytes
    kms_access: KmsAccess
    last_verdict: str
    last_probe_at: datetime | None
    last_allowed_at: datetime
    created_at: datetime
    key_generation: int = 1
    """How often the key was replaced, plus one."""
    canary_cmk_key_version: str = ""
    """The CMK's version that wrapped the canary; empty: not known."""


@dataclass(frozen=True, slots=True)
class StoredReplacement:
    """A CMK on its way in."""

    key_configuration_id: KeyConfigurationId
    key: CmkKey
    canary_wrapped: bytes
    canary_digest: bytes
    actor: str
    started_at: datetime
    canary_cmk_key_version: str = ""


@dataclass(frozen=True, slots=True)
class StagedKek:
    """A KEK as the CMK that is on its way in wrapped it."""

    project_id: ProjectId
    kek_version: int
    wrapped: bytes
    cmk_key_version: str


@dataclass(frozen=True, slots=True)
class StoredKek:
    project_id: ProjectId
    kek_id: KekId
    kek_version: int
    wrapped: bytes | None
    cmk_key_version: str
    wraps_reserved: int
    created_at: datetime
    last_unwrap_at: datetime | None = None
    destroyed_at: datetime | None = None
    canary: bytes | None = None
    """See kek_canary.py; None for one from before there were any."""


@dataclass(frozen=True, slots=True)
class StoredKeyUser:
    """A node that was given keys of a project, and what it said last that it keeps."""

    project_id: ProjectId
    node_id: str
    kek_floor: int = 1
    """It keeps nothing under an older KEK version, and never will."""
    uses: tuple[KeyUse, ...] = ()
    reported_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class StoredProject:
    project_id: ProjectId
    workspace_id: WorkspaceId
    name: str
    held: bool
    shredded: bool
    state: KeyState
    state_reason: str
    created_at: datetime
    key_configuration_id: KeyConfigurationId


@dataclass(frozen=True, slots=True)
class StoredRevocation:
    """A revocation that is not sealed yet, with the holders that have neither acknowledged nor run out."""

    revocation_id: str
    project_id: ProjectId
    state: KeyState
    reason: str
    detected_at: datetime
    pending: Sequence[Holder]


@dataclass(frozen=True, slots=True)
class StoredRestoration:
    """A project that was ACTIVE again, under this key."""

    restoration_id: str
    reason: str
    key_configuration_id: KeyConfigurationId
    key: CmkKey
    detected_at: datetime
    restored_after_s: float


@dataclass(frozen=True, slots=True)
class StoredToken:
    """A token for a person: what it says, and its SHA-256."""

    token_id: TokenId
    digest: bytes = field(repr=False)
    role: PersonRole
    subject: str
    workspace_id: WorkspaceId | None
    project_id: ProjectId | None
    issued_by: str
    issued_at: datetime
    expires_at: datetime
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class StoredLease:
    project_id: ProjectId
    holder: Holder
    ttl_s: float
