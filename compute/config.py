"""Settings of the compute manager."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from compute.launcher import Blocks
from compute.sizes import Resources
from compute.storage_clients import SafekeeperAddress
from compute.volume.base import VolumeKind
from shared.config import Address, Addresses
from shared.settings import ServiceSettings


class ManagerSettings(ServiceSettings):
    """`python -m compute`: timelines, endpoints, elections, agents."""

    model_config = SettingsConfigDict(env_prefix="KEYLAKE_COMPUTE_")

    database_url: SecretStr = Field(description="metadata Postgres, postgres://role:password@host:port/database")
    database_schema: str = Field(default="compute", pattern=r"^[a-z][a-z0-9_]{0,40}$")
    keymanager: Addresses = Field(description="the API of the keymanager, or of all its replicas")
    pageserver: Address = Field(description="the pageserver's API")
    pages: Address = Field(description="the pageserver's port for pages and basebackups")
    safekeepers: list[SafekeeperAddress] = Field(
        min_length=1, max_length=9, description="the quorum's members; a majority of them makes a commit durable"
    )
    runtime_dir: Path = Field(
        description="Unix sockets of computes; mode 0700; its path must be short (a socket's has 107 bytes at most)"
    )
    log_dir: Path = Field(description="Postgres's logs, sealed under each compute's boot key; mode 0700")

    volume: VolumeKind = Field(
        default=VolumeKind.AUTO,
        description="where computes keep their files: fuse, pages on demand and sealed blocks on disk "
        "(docs/compute.md); tmpfs, in memory, filled at the start; auto, fuse where the machine has it, else tmpfs",
    )
    # From here to max_parallel_workers: of endpoints that have no size of their own (compute/sizes.py).
    volume_size_mb: int = Field(
        default=1024, ge=128, description="memory that one compute's files may take, on a tmpfs volume"
    )
    volume_disk_mb: int = Field(
        default=4096, ge=128, description="disk that one compute's written blocks may take, on a fuse volume"
    )
    volume_dir: Path | None = Field(
        default=None,
        description="where fuse volumes keep written blocks, sealed under each compute's boot key, in files without a "
        "name; unset: log_dir",
    )
    shared_buffers_mb: int = Field(default=64, ge=1, description="Postgres's shared_buffers")
    max_connections: int = Field(default=100, ge=1, le=10_000, description="Postgres's max_connections")
    work_mem_mb: int = Field(default=4, ge=1, description="Postgres's work_mem")
    maintenance_work_mem_mb: int = Field(default=64, ge=1, description="Postgres's maintenance_work_mem")
    max_parallel_workers: int = Field(default=8, ge=0, le=8, description="Postgres's max_parallel_workers")
    superuser_owners: bool = Field(
        default=False,
        description="owners of endpoints are superusers, for conformance runs on projects that are thrown away after "
        "(docs/conformance.md); off: no user role is one",
    )
    guard_cache_dir: Path | None = Field(
        default=None, description="the compiled commit guard (compute/guard); default: the user's cache"
    )
    log_size_mb: int = Field(default=8, ge=1, description="sealed log kept per compute; older lines are dropped")
    tunnel_listen_host: str | None = Field(
        default=None,
        description="listen for TLS on this address, on a port of the system's choice, for proxies and safekeepers on "
        "other hosts; unset: Unix socket only",
    )
    tunnel_advertised_host: str | None = Field(default=None, description="what others connect to; default: the same")

    start_timeout_s: float = Field(default=120.0, gt=0, description="a start that takes longer is given up")
    stop_timeout_s: float = Field(default=20.0, gt=0, description="a graceful stop that takes longer becomes a kill")
    request_timeout_s: float = Field(default=30.0, gt=0, description="one call to a safekeeper or the pageserver")
    vote_timeout_s: float = Field(default=5.0, gt=0, description="a safekeeper that answers later does not vote")
    poll_interval_s: float = Field(default=1.0, gt=0, description="how often a run looks at each safekeeper")
    suspend_after_s: float = Field(
        default=300.0,
        ge=0,
        description="a compute that nobody has used for as long is stopped, and started again by the next connection; "
        "0: never. Endpoints may have their own",
    )
    idle_poll_interval_s: float = Field(default=5.0, gt=0, description="how often a compute looks whether it is idle")
    liveness_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="a compute whose Postgres, agent or volume has not answered for as long is killed",
    )
    max_starting: int = Field(
        default=8, ge=1, description="computes that start at the same time; others wait for their turn"
    )
    spare_agents: int = Field(default=1, ge=0, le=16, description="agent processes started ahead of their endpoint")

    @property
    def blocks(self) -> Blocks:
        """Of fuse volumes."""
        return Blocks(self.volume_dir or self.log_dir, self.volume_disk_mb << 20)

    @property
    def resources(self) -> Resources:
        """Of endpoints that have no size of their own."""
        return Resources(
            volume_mb=self.volume_size_mb,
            shared_buffers_mb=self.shared_buffers_mb,
            max_connections=self.max_connections,
            work_mem_mb=self.work_mem_mb,
            maintenance_work_mem_mb=self.maintenance_work_mem_mb,
            max_parallel_workers=self.max_parallel_workers,
        )
