"""Settings of the keymanager: `--config FILE` and `KEYLAKE_KEYMANAGER_…`.

Beside its own there is one group for each kind of KMS, under the kind's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, Field, SecretStr, create_model
from pydantic_settings import SettingsConfigDict

from keymanager.kms.kind import KmsKind
from keymanager.providers import KINDS
from shared.crypto.limits import MAX_WRAPS_PER_KEK
from shared.settings import ServiceSettings
from shared.storage.config import ObjectStoreSettings

S = TypeVar("S", bound=BaseModel)


class _OwnSettings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="KEYLAKE_KEYMANAGER_")

    metadata_dsn: SecretStr = Field(description="PostgreSQL connection string of the metadata database")
    metadata_connections: int = Field(default=8, ge=2, le=100)
    lease_ttl_s: float = Field(default=5.0, ge=0.5, le=300, description="how long an instance may go without renewal")
    kms_connect_timeout_s: float = Field(default=1.0, gt=0, le=30)
    kms_read_timeout_s: float = Field(default=2.0, gt=0, le=30)
    kms_deadline_s: float = Field(default=4.0, gt=0, le=60, description="of one KMS call with everything it waits for")
    restore_hold_s: float = Field(
        default=5.0,
        ge=0,
        le=3600,
        description="so long a KMS that took its yes back soon after must say nothing but yes before projects are "
        "back; twice as long each further time; 0: they are back at its first yes",
    )
    restore_hold_max_s: float = Field(default=300.0, ge=0, le=86_400, description="the longest that this gets")
    restore_calm_s: float = Field(
        default=600.0, gt=0, le=86_400, description="a yes that lasted so long was not taken back soon"
    )
    default_account_name: str = Field(default="default", min_length=1, max_length=100)
    outbox_messages: int = Field(
        default=1024, ge=16, le=65536, description="per session; a client that lets it fill up is dropped"
    )
    leader_ttl_s: float = Field(
        default=1.5,
        ge=0.3,
        le=60,
        description="how long the leader may go without renewal; the next one serves a little later than that, and "
        "within two thirds of lease_ttl_s nobody notices",
    )
    concurrent_key_requests: int = Field(default=8, ge=1, le=256, description="per session; more wait")
    waiting_key_requests: int = Field(default=256, ge=0, le=4096, description="per session; more are refused")
    all_key_requests: int = Field(
        default=4096, ge=1, le=65536, description="of all sessions, at work or waiting; more are refused"
    )
    max_sessions: int = Field(default=16_384, ge=1, le=1_000_000, description="open at once; more are refused")
    max_requests: int = Field(default=128, ge=1, le=65536, description="of the admin API, at once; more are refused")
    kek_max_age_days: float = Field(
        default=90.0, gt=0, le=3650, description="age at which a project gets a new KEK version by itself"
    )
    kek_max_wraps: int = Field(
        default=MAX_WRAPS_PER_KEK // 4 * 3,
        ge=1,
        le=MAX_WRAPS_PER_KEK,
        description="wraps, counted in blocks of 4096 before they are made, at which a project gets a new KEK version "
        "by itself: before the limit (2^24), at which new DEKs are refused",
    )
    kek_cache_entries: int = Field(
        default=16_384,
        ge=1,
        le=1_000_000,
        description="plaintext KEKs in memory, 1 KiB each; the least recently used go",
    )
    kek_cache_idle_ttl_s: float = Field(
        default=14_400.0,
        gt=0,
        le=31_536_000,
        description="how long a plaintext KEK stays after its last use. Longer than services cache DEKs (1 h) and an "
        "outage grace lasts (2 h at most) together, so that no project in use meets an outage without its KEK",
    )
    rotation_check_interval_s: float = Field(
        default=60.0, gt=0, le=86400, description="how often due KEK rotations and new CMK versions are looked for"
    )
    shred_approval_h: float = Field(
        default=24.0, gt=0, le=720, description="hours within which a second person must approve a shredding"
    )
    audit_anchors: ObjectStoreSettings | None = Field(
        default=None,
        description="object store for the audit chain's anchors, in which we need nothing but to create, read and list "
        "below audit/anchors/; None: the chain is not anchored",
    )
    audit_anchor_interval_s: float = Field(
        default=60.0, gt=0, le=86400, description="how often the chain is anchored while something is recorded"
    )
    kms_call_record_interval_s: float = Field(
        default=60.0,
        gt=0,
        le=3600,
        description="how often KMS calls are recorded; what was not yet recorded is lost with the process",
    )

    def of(self, kind: KmsKind[Any, S]) -> S:
        """How this kind of KMS is reached, and as whom."""
        found: S = getattr(self, kind.name)
        return found


if TYPE_CHECKING:
    KeymanagerSettings = _OwnSettings
else:
    KeymanagerSettings = create_model(
        "KeymanagerSettings",
        __base__=_OwnSettings,
        **{name: (kind.settings, kind.settings()) for name, kind in KINDS.items()},
    )
