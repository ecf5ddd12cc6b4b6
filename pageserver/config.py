"""Settings of the pageserver: `--config FILE` and `KEYLAKE_PAGESERVER_…`."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import SettingsConfigDict

from pageserver.retention import MAX_LEASE_S, MAX_RETENTION_AGE_S
from shared.config import Address, Addresses
from shared.settings import ServiceSettings
from shared.storage.config import ObjectStoreSettings


class SafekeeperPeer(BaseModel):
    """A safekeeper's WAL port."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    node_id: str = Field(min_length=1, max_length=64)
    wal: Address


class PageserverSettings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="KEYLAKE_PAGESERVER_")

    pages_listen: Address = Field(description="GetPage@LSN and basebackups; loopback unless told otherwise")
    keymanager: Addresses
    safekeepers: list[SafekeeperPeer] = Field(min_length=1, max_length=9, description="all members of the quorum")
    object_store: ObjectStoreSettings
    cache_dir: Path = Field(description="sealed copies of layer files; may be lost at any time")
    cache_size_mb: int = Field(default=1024, ge=16, description="local disk that the layer cache may take")
    checkpoint_distance_mb: int = Field(default=64, ge=1, description="in-memory layer is flushed at this size")
    ingest_memory_mb: int = Field(
        default=1024, ge=64, description="memory of what is ingested and not flushed yet, of all timelines together"
    )
    compaction_l0_layers: int = Field(default=8, ge=2, le=1000, description="flushed layers that start a compaction")
    compaction_target_mb: int = Field(
        default=32, ge=1, le=512, description="size of a layer made by compaction, whose memory is three times that"
    )
    retention_lsn_mb: int = Field(default=64, ge=0, description="history kept of a new timeline, in WAL: this much …")
    retention_age_s: int = Field(
        default=7 * 24 * 3600, ge=0, le=MAX_RETENTION_AGE_S, description="… or this much, whichever reaches further"
    )
    gc_interval_s: float = Field(default=60.0, gt=0, description="how often history that is too old is removed")
    lsn_lease_s: float = Field(
        default=600.0, gt=0, le=MAX_LEASE_S, description="longest LSN lease; so long nothing is removed after a start"
    )
    wait_lsn_timeout_s: float = Field(
        default=30.0, gt=0, le=3600, description="how long a read waits for an LSN that is not ingested yet"
    )
    key_upkeep_interval_s: float = Field(
        default=1.0, gt=0, le=3600, description="how soon a new KEK version is noticed and envelopes are wrapped again"
    )
    redo_cache_dir: Path | None = Field(default=None, description="compiled redo extension; default: the user's cache")
