"""A local cluster that another process runs, as seen from its home: `keylake up` started it, this talks to it.

attached = Attached.to(Path(".keylake"))
async with attached.client() as client:
    print(await client.projects())
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import httpx
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from keylake import supervision
from keylake.client import KeylakeClient
from keylake.layout import SAFEKEEPERS, Layout, Ports
from keylake.link_control import SHOW, LinkRequest, ask
from keylake.links import LinkState
from shared.auth import BearerToken, Service, TokenIssuer
from shared.errors import CorruptedError, UnavailableError
from shared.tls import client_context, service_host_name

if TYPE_CHECKING:
    from keylake.cluster import Customer

PROBE_TIMEOUT_S: Final = 3.0
_MAX_STATE_SIZE_BYTES: Final = 1 << 20
_PORTS: Final = TypeAdapter(Ports)


class NotRunningError(UnavailableError):
    """There is no cluster in this home."""

    code = "not_running"


class Health(enum.StrEnum):
    READY = "ready"
    STANDBY = "standby"  # it is well, and another one of its kind does the work
    WAITING = "waiting"  # it answers, and says that it cannot work yet
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    name: str
    address: str
    health: Health
    pid: int | None
    restarts: int


class _State(BaseModel):
    model_config = ConfigDict(extra="ignore")  # what a newer Keylake adds does not hide the ports
    ports: dict[str, object]


def parse_ports(content: bytes) -> Ports:
    """Raises CorruptedError unless it is a `cluster.json`."""
    try:
        ports = _PORTS.validate_python(_State.model_validate_json(content).ports)
    except ValidationError:
        raise CorruptedError("cluster.json is malformed: stop the cluster and start it again") from None
    if not len(ports.safekeepers) == len(ports.safekeepers_wal) == SAFEKEEPERS:
        raise CorruptedError(f"cluster.json does not name {SAFEKEEPERS} safekeepers")
    return ports


class Attached:
    """Paths, ports and clients of a running cluster. Makes no connection by itself."""

    def __init__(self, layout: Layout, ports: Ports, state: supervision.SupervisorState | None) -> None:
        self.layout = layout
        self.ports = ports
        self.state = state

    @property
    def home(self) -> Path:
        return self.layout.home

    @property
    def trust_bundle(self) -> Path:
        return self.layout.trust_bundle

    @property
    def has_links(self) -> bool:
        """Was it started with `--links`?"""
        return self.state is not None and self.state.links is not None

    async def links(self, request: LinkRequest = SHOW) -> list[LinkState]:
        """All of them, as they are when the request is done. Raises ConflictError when there are none,
        InvalidInputError for two that do not speak with each other, UnavailableError."""
        return await ask(None if self.state is None else self.state.links, request)

    def stored(self) -> dict[str, Path]:
        """Where sealed data lies: store → directory."""
        return {
            "objects": self.layout.objects,
            **{f"safekeeper-{number}": self.layout.safekeeper(number) for number in range(1, SAFEKEEPERS + 1)},
        }

    @classmethod
    def to(cls, home: Path) -> Attached:
        """Raises NotRunningError when no supervisor runs there or it is not ready, CorruptedError."""
        layout = Layout(home)
        owner = supervision.find(home)
        if owner is None:
            raise NotRunningError(f"no Keylake is running in {home}")
        owner.close()
        try:
            with layout.state_file.open("rb") as file:
                content = file.read(_MAX_STATE_SIZE_BYTES)
        except FileNotFoundError:
            raise NotRunningError(f"the Keylake in {home} is still starting, or is about to stop") from None
        return cls(layout, parse_ports(content), supervision.SupervisorState.load(home))

    def client(self, token: str | None = None) -> KeylakeClient:
        """Keylake's own APIs, as the owner, or as the person with this token. Raises InvalidInputError."""
        credentials = TokenIssuer.load(self.layout.admin_key) if token is None else BearerToken(token)
        return KeylakeClient(self.ports.addresses(), self.layout.ca_certificate, credentials)

    def customer(self) -> Customer:
        """The customer's side, to be closed. Blocks for one request. Raises UnavailableError."""
        # Only here: boto3 takes as long to import as everything else together.
        from customercloud.client import CloudAdmin
        from customercloud.client import Endpoint as CloudEndpoint
        from keylake.cluster import Customer

        url = f"https://127.0.0.1:{self.ports.customercloud}"
        try:
            token = self.layout.customer_admin_token.read_text().strip()
        except FileNotFoundError:
            raise UnavailableError("the customer's cloud has no administrator's token in this home") from None
        admin = CloudAdmin(url, token, verify=self.layout.ca_certificate)
        # Idempotent: it answers with the accounts and credentials that are there.
        bootstrap = admin.bootstrap_aws(self.layout.secret("external-id"))
        return Customer(bootstrap, CloudEndpoint(bootstrap.region, url, self.layout.ca_certificate), admin)

    async def health(self) -> list[ServiceHealth]:
        """Every part, asked at once; each has PROBE_TIMEOUT_S to answer."""
        ports, layout = self.ports, self.layout
        parts: list[tuple[str, Service | None, int]] = [
            ("customercloud", None, ports.customercloud),
            *((name, Service.KEYMANAGER, port) for name, port in ports.keymanagers.items()),
            *((f"safekeeper-{n}", Service.SAFEKEEPER, port) for n, port in enumerate(ports.safekeepers, 1)),
            ("pageserver", Service.PAGESERVER, ports.pageserver),
            ("compute", Service.COMPUTE, ports.manager),
            ("proxy", Service.PROXY, ports.proxy_http),
        ]
        services: Mapping[str, supervision.ServiceState] = {} if self.state is None else self.state.services
        context = client_context(layout.ca_certificate)
        async with httpx.AsyncClient(verify=context, trust_env=False, timeout=PROBE_TIMEOUT_S) as http:

            async def probe(name: str, service: Service | None, port: int) -> ServiceHealth:
                health = await ask_health(http, service, "127.0.0.1", port)
                state = services.get(name)
                pid, restarts = (None, 0) if state is None else (state.pid, state.restarts)
                return ServiceHealth(name, f"127.0.0.1:{port}", health, pid, restarts)

            metadata, *rest = await asyncio.gather(self._metadata(), *(probe(*part) for part in parts))
        return [metadata, *rest]

    async def _metadata(self) -> ServiceHealth:
        """The metadata Postgres listens only on a Unix socket, which its postmaster.pid names (miscadmin.h: line 1 the
        pid, line 4 the port, line 5 the directory)."""
        name = "metadata"
        try:
            lines = (self.layout.metadata / "postmaster.pid").read_text(errors="replace")[:4096].splitlines()
            pid, socket_path = int(lines[0]), f"{lines[4]}/.s.PGSQL.{int(lines[3])}"
        except (OSError, ValueError, IndexError):
            return ServiceHealth(name, "-", Health.DOWN, None, 0)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                _, writer = await asyncio.open_unix_connection(socket_path)
        except (OSError, TimeoutError):
            return ServiceHealth(name, socket_path, Health.DOWN, None, 0)
        writer.close()
        return ServiceHealth(name, socket_path, Health.READY, pid, 0)


async def ask_health(http: httpx.AsyncClient, service: Service | None, host: str, port: int) -> Health:
    """Of the service there; None: the customer's cloud."""
    path = "/healthz" if service is None else "/readyz"
    extensions = {} if service is None else {"sni_hostname": service_host_name(service.value)}
    try:
        return _health(await http.get(f"https://{host}:{port}{path}", extensions=extensions))
    except httpx.HTTPError:
        return Health.DOWN


def _health(answer: httpx.Response) -> Health:
    if answer.status_code == 200:
        return Health.READY
    try:
        return Health.STANDBY if answer.json() == {"status": "standby"} else Health.WAITING
    except ValueError:
        return Health.WAITING
