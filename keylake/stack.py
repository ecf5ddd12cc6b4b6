"""The containers of docker-compose.yml as `keylake` in the operator's container and the console among them see them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from keylake import compose
from keylake.attached import PROBE_TIMEOUT_S, ServiceHealth, ask_health
from keylake.client import KeylakeClient
from keylake.layout import Layout
from keylake.link_control import SHOW, LinkRequest
from keylake.links import LinkState
from keylake.provision import CLOUD_PORT, HTTP_PORT, SAFEKEEPER_NAMES, SERVICES, cloud_ca
from shared.errors import ConflictError
from shared.tls import client_context

if TYPE_CHECKING:
    from keylake.cluster import Customer


class Stack:
    """Implements `keylake.place.Place`. Makes no connection by itself."""

    def __init__(self, directory: Path, home: Path, observed: Path = compose.OBSERVED_DIR) -> None:
        """`directory`: the bundle. `observed`: where the volumes of others are mounted, read-only."""
        self._directory = directory
        self._observed = observed
        self.home = home

    @property
    def trust_bundle(self) -> Path:
        return Layout(self._directory).trust_bundle

    def stored(self) -> Mapping[str, Path]:
        return {"objects": self._observed / "minio", **{name: self._observed / name for name in SAFEKEEPER_NAMES}}

    def client(self, token: str | None = None) -> KeylakeClient:
        return compose.client(self._directory, token)

    def customer(self) -> Customer:
        return compose.customer(self._directory)

    async def health(self) -> list[ServiceHealth]:
        """Of all but the metadata database, which has no network: without it, no keymanager is ready."""
        bundle = Layout(self._directory)
        async with (
            httpx.AsyncClient(
                verify=client_context(bundle.ca_certificate), trust_env=False, timeout=PROBE_TIMEOUT_S
            ) as http,
            httpx.AsyncClient(
                verify=client_context(cloud_ca(bundle)), trust_env=False, timeout=PROBE_TIMEOUT_S
            ) as outside,
        ):
            cloud, *healths = await asyncio.gather(
                ask_health(outside, None, "customercloud", CLOUD_PORT),
                *(ask_health(http, service, name, HTTP_PORT) for name, service in SERVICES.items()),
            )
        return [
            ServiceHealth("customercloud", f"customercloud:{CLOUD_PORT}", cloud, None, 0),
            *(
                ServiceHealth(name, f"{name}:{HTTP_PORT}", health, None, 0)
                for name, health in zip(SERVICES, healths, strict=True)
            ),
        ]

    async def links(self, request: LinkRequest = SHOW) -> list[LinkState]:
        raise ConflictError(
            "containers reach each other directly: on the host, `docker network disconnect` cuts one of them off"
        )
