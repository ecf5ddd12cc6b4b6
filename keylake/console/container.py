"""`python -m keylake.console.container`: the console as a container of docker-compose.yml.

It wears every hat, so it has a bundle of its own: an owner's signing key, which hands out people's tokens, and the
customer's credentials. Its address, whose key is new at each start, goes to a file in memory and to no log: logs of
containers lie on disk.

    docker compose exec -T console cat /run/keylake/console
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import httpx

from keylake import compose
from keylake.attached import PROBE_TIMEOUT_S, ServiceHealth, ask_health
from keylake.client import KeylakeClient
from keylake.cluster import Customer
from keylake.console.serve import listen, serve
from keylake.layout import Layout, write_secret
from keylake.provision import CLOUD_PORT, DATA_DIR, HTTP_PORT, SAFEKEEPER_NAMES, SERVICES, cloud_ca
from shared.auth import BearerToken
from shared.errors import KeylakeError
from shared.telemetry import configure_logging, get_logger
from shared.tls import client_context

PORT_VARIABLE: Final = "KEYLAKE_CONSOLE_PORT"
"""Inside of the container and on the host alike: it stands in the address."""
ADDRESS_FILE: Final = Path("/run/keylake/console")

_log = get_logger(__name__)


class Stack:
    """Implements `keylake.console.place.Place` for the containers. Makes no connection by itself."""

    def __init__(self, directory: Path, home: Path = DATA_DIR, observed: Path = compose.OBSERVED_DIR) -> None:
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
        if token is None:
            return compose.client(self._directory)
        return KeylakeClient(compose.addresses(), Layout(self._directory).ca_certificate, BearerToken(token))

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


async def _announce(address: str) -> None:
    write_secret(ADDRESS_FILE, address + "\n")
    _log.info("the console is up; its address is a secret", file=str(ADDRESS_FILE))


def main() -> int:
    configure_logging("console", "console")
    directory = compose.inside()
    if directory is None:
        _log.error("this is for the console's container", variable=compose.STACK_VARIABLE)
        return 2
    try:
        # Which networks the container is on, and that only the host's loopback gets here, is the compose file's matter.
        with contextlib.closing(listen("0.0.0.0", int(os.environ[PORT_VARIABLE]))) as listener:  # noqa: S104
            asyncio.run(serve(Stack(directory), listener, _announce))
    except KeylakeError as error:
        _log.error("the console cannot go on", reason=str(error))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
