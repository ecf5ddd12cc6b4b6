"""What the demo acts on: a Keylake, its customer, and the power to break things. One class per way of running it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Protocol

from keylake.client import KeylakeClient
from keylake.cluster import Cluster, Customer


class Target(Protocol):
    """A running Keylake that the demo may break."""

    client: KeylakeClient
    customer: Customer

    def persistent(self) -> dict[str, list[Path]]:
        """Where each part keeps its bytes: name → files and directories."""
        ...

    async def kill(self, service: str) -> None:
        """SIGKILL, as a crash. `safekeeper-1` …, `pageserver`, `keymanager`."""
        ...

    async def start(self, service: str) -> None:
        """Start it again; returns when it is ready."""
        ...

    async def wipe_pageserver_disk(self) -> None:
        """Everything that the pageserver has on disk, while it does not run."""
        ...


class LocalTarget:
    """The embedded cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.client = cluster.client
        self.customer = cluster.customer

    def persistent(self) -> dict[str, list[Path]]:
        layout = self._cluster.layout
        return {
            "object store": [layout.objects, layout.anchors],
            "safekeepers": [layout.data / name for name in self._cluster.services if name.startswith("safekeeper")],
            "pageserver's cache": [layout.pageserver_cache],
            "compute logs": [layout.data / "compute-logs"],
            "metadata database": [layout.metadata],
            "customer's cloud": [layout.customercloud],
            "service logs": [layout.logs],
        }

    async def kill(self, service: str) -> None:
        await self._cluster.service(service).kill()

    async def start(self, service: str) -> None:
        await self._cluster.service(service).start()

    async def wipe_pageserver_disk(self) -> None:
        await asyncio.to_thread(shutil.rmtree, self._cluster.layout.pageserver_cache)
