"""Settings of a safekeeper: JSON file, or environment variables KEYLAKE_SAFEKEEPER_…"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from shared.config import Address, Addresses
from shared.settings import ServiceSettings
from shared.storage.config import ObjectStoreSettings


class SafekeeperSettings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="KEYLAKE_SAFEKEEPER_")

    data_dir: Path = Field(description="control files and sealed WAL; on a disk whose fsync means it")
    wal_listen: Address = Field(description="WAL port, for the pageserver and for peers")
    keymanager: Addresses = Field(description="where leases and DEKs come from")
    elected_timeout_s: float = Field(
        default=60.0, gt=0, le=3600, description="how long an election may keep its caller waiting for the copying"
    )
    tail_cache_size_bytes: int = Field(
        default=4 * 1024 * 1024,
        ge=1024 * 1024,
        le=1 << 30,
        description="plaintext WAL kept in memory per timeline, for those who follow its tail",
    )
    key_upkeep_interval_s: float = Field(
        default=1.0, gt=0, le=3600, description="how soon a new KEK version is noticed and envelopes are wrapped again"
    )
    backpressure_lag_mb: int = Field(
        default=512,
        ge=0,
        le=1 << 20,
        description="WAL acknowledged ahead of what the pageserver has ingested; commits behind that wait for it, "
        "however long it is away; 0: any",
    )
    object_store: ObjectStoreSettings | None = Field(
        default=None, description="where sealed WAL is offloaded to; without it all WAL stays on the disk"
    )
    wal_keep_size_bytes: int = Field(
        default=64 * 1024 * 1024,
        ge=0,
        le=1 << 50,
        description="WAL that stays on the disk in any case, per timeline, for peers and the pageserver",
    )
    wal_history_size_bytes: int = Field(
        default=1 << 30,
        ge=64 * 1024 * 1024,
        le=1 << 50,
        description="WAL that is kept, here or in the object store, behind what the pageserver has in layers; what is "
        "older is deleted",
    )
    offload_interval_s: float = Field(default=5.0, gt=0, le=3600, description="about how often WAL is offloaded")
    io_threads: int = Field(default=16, ge=2, le=256, description="threads that wait for the disk")
