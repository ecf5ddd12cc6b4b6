"""Where a compute keeps PGDATA.

A volume holds plaintext to Postgres's eyes, and must leave nothing when the compute ends, however it ends. Kinds:

    tmpfs   memory, filled from a full basebackup; the start takes longer the larger the database is
    fuse    served by a process of ours: pages come from the pageserver when they are read, and what is written lies
            in a local file, sealed under a key of this boot; the start does not depend on the size of the database
"""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from shared.api.compute import StageTiming
from shared.config import Address
from shared.crypto.secret import SecretKey
from shared.errors import KeylakeError
from shared.ids import InstanceId, ProjectId, TimelineId
from shared.lsn import Lsn
from shared.wire.pagestream import StartAs


class VolumeKind(enum.StrEnum):
    """What the manager asks for."""

    AUTO = "auto"
    """FUSE where this machine has it, else tmpfs."""
    FUSE = "fuse"
    """FUSE, or no compute."""
    TMPFS = "tmpfs"


@dataclass(frozen=True, slots=True)
class Source:
    """What to fill a volume with, and from where."""

    instance_id: InstanceId
    project_id: ProjectId
    timeline_id: TimelineId
    start_lsn: Lsn
    start_as: StartAs
    pages: Address
    ca_certificate: Path
    token: str = field(repr=False)


class Volume(Protocol):
    """One compute's disk. Life: `prepare` once, `fill` once, use `path`, `wipe`."""

    @property
    def description(self) -> str:
        """What it is, for people: kind, where, size."""
        ...

    @property
    def is_lazy(self) -> bool:
        """It reads at the start LSN for as long as it lives, so somebody has to keep that readable."""
        ...

    @property
    def size_bytes(self) -> int:
        """How much fits in. Postgres's limits for WAL and temporary files are derived from it."""
        ...

    @property
    def path(self) -> Path:
        """PGDATA. Valid after `prepare`."""
        ...

    @property
    def failed(self) -> asyncio.Future[KeylakeError]:
        """Done when the volume must not be used any more."""
        ...

    async def prepare(self) -> None:
        """Make an empty PGDATA that Postgres accepts (mode 0700). Raises UnavailableError."""
        ...

    async def fill(self, source: Source, boot_key: SecretKey, lease_until_s: float) -> list[StageTiming]:
        """Make it a PGDATA that starts at the source's LSN; how long its stages took. Raises KeylakeError.

        `boot_key`: what is written to a disk is sealed under keys that it yields. It stays the caller's.
        """
        ...

    def lease_until(self, at_s: float) -> None:
        """Data may leave until then (`SystemClock`)."""
        ...

    def token(self, token: str) -> None:
        """A newer one for the pageserver."""
        ...

    async def watch(self, timeout_s: float) -> None:
        """Until cancelled. `failed` is done when who serves the volume has not answered for `timeout_s`."""
        ...

    @property
    def free_bytes(self) -> int | None:
        """None: who serves it would have to say so, and may hang; it says by itself when it is full (`failed`)."""
        ...

    async def pages_fetched(self) -> int | None:
        """How many pages have come from the pageserver one by one. None: that is not how it works."""
        ...

    @property
    def server_pid(self) -> int | None:
        """The child of ours that serves it, and has keys and pages in memory; None: no other process has any."""
        ...

    def wipe_server(self, timeout_s: float) -> bool:
        """The server gives up its keys and pages, and whoever uses the volume gets errors. Is nothing left in it, by
        its own word? Blocks until it says so; False when it does not in time, or has ended without. Kill it next."""
        ...

    def wipe(self) -> None:
        """Everything on it is gone when this returns. Idempotent. Only when no process uses it any more."""
        ...
