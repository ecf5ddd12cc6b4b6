"""A whole Keylake on this machine: every service as a process of its own, for demos, tests and trying things out.

    async with Cluster() as cluster:                       # a temporary one, gone at the end
        project = await cluster.create_project("shop")
        connection = await asyncpg.connect(**project.connection.asyncpg_arguments())

No Docker and no root needed. What differs from the containers of docker-compose.yml: the object store is a directory,
the metadata database is a private Postgres of the same wheel, and the customer's cloud is a process on the same
machine.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

import httpx
from pydantic import SecretStr

from compute.guard.build import prepare_guard
from customercloud.aws.admin import BootstrapAnswer
from customercloud.client import AccessKey, AwsCustomer, CloudAdmin
from customercloud.client import Endpoint as CloudEndpoint
from customercloud.faults import Faults
from customercloud.faults import Service as CloudService
from keylake.client import Connection, KeylakeClient
from keylake.layout import METADATA_ROLES, METADATA_SUPERUSER, PROXY_DOMAIN, SAFEKEEPERS, Layout, Ports, write_secret
from keylake.links import Cut, Links, LinkState
from keylake.metadata import METADATA_DATABASE, prepare_database
from keylake.process import ServiceProcess
from pageserver.redo.build import prepare
from shared.api.compute import CreatedEndpoint, Timeline
from shared.api.keymanager import AwsKey, CreateKeyConfiguration, KeyConfiguration, Project, Workspace
from shared.auth import Service, TokenIssuer
from shared.crypto.aead import NULL_CIPHER_VARIABLE
from shared.errors import ConflictError, UnavailableError
from shared.ids import InstanceId, WorkspaceId
from shared.postgres import Auth, PostgresServer, initdb
from shared.tls import client_context, service_host_name

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RunningProject:
    """A project with storage and an endpoint: what most people want in one call."""

    project: Project
    timeline: Timeline
    endpoint: CreatedEndpoint
    connection: Connection


class Customer:
    """The customer's side: its AWS account and its administrator. Blocking calls run in threads."""

    def __init__(self, bootstrap: BootstrapAnswer, endpoint: CloudEndpoint, admin: CloudAdmin) -> None:
        self.bootstrap = bootstrap
        self.aws = AwsCustomer(endpoint, AccessKey.of(bootstrap.customer))
        self.simulation = admin

    def trouble_for_keylake(self, **faults: Any) -> Faults:
        """Faults of the KMS, and of STS, that Keylake sees and the customer does not."""
        spared = frozenset({self.bootstrap.customer.access_key_id})
        return Faults(services=frozenset({CloudService.KMS, CloudService.STS}), spared_access_key_ids=spared, **faults)

    async def create_key(self, description: str = "Keylake CMK") -> str:
        """ARN of a new CMK that Keylake's role may use."""
        return await asyncio.to_thread(self.aws.create_key, description, role_arn=self.bootstrap.role_arn)

    async def disable(self, key_arn: str) -> None:
        await asyncio.to_thread(self.aws.disable, key_arn)

    async def enable(self, key_arn: str) -> None:
        await asyncio.to_thread(self.aws.enable, key_arn)

    async def schedule_deletion(self, key_arn: str) -> None:
        await asyncio.to_thread(self.aws.schedule_deletion, key_arn)

    async def cancel_deletion(self, key_arn: str) -> None:
        """The key is disabled afterwards: `enable` brings it back."""
        await asyncio.to_thread(self.aws.cancel_deletion, key_arn)

    async def deny(self, key_arn: str) -> None:
        """An explicit Deny for Keylake's role in the key's policy."""
        await asyncio.to_thread(self.aws.deny_role, key_arn, self.bootstrap.role_arn)

    async def allow(self, key_arn: str) -> None:
        await asyncio.to_thread(self.aws.allow_role, key_arn, self.bootstrap.role_arn)

    async def audit_log(self) -> list[dict[str, Any]]:
        """Every CloudTrail record, oldest first."""
        return await asyncio.to_thread(self.simulation.audit_log)

    def close(self) -> None:
        self.aws.close()
        self.simulation.close()


class Cluster:
    """Starts everything on `__aenter__`, ends it on `__aexit__`. `home` given: kept, and started again next time."""

    service_process: type[ServiceProcess] = ServiceProcess
    """How a service is run."""
    _safekeepers: Final = tuple(f"safekeeper-{number}" for number in range(1, SAFEKEEPERS + 1))

    def __init__(
        self,
        home: Path | None = None,
        *,
        proxy_port: int | None = None,
        keymanagers: int = 1,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        null_cipher: bool = False,
        links: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """`keymanagers`: how many replicas; one of them leads.

        `links`: let services reach each other over links that `partition` can cut (`keylake.links`).

        `settings`: service name → fields that differ from the defaults, e.g. {"keymanager": {"lease_ttl_s": 2}}.

        `null_cipher` switches encryption off, for positive controls of secrecy tests and as a peer in benchmarks.
        """
        self._temporary = home is None
        self.layout = Layout(home or Path(tempfile.mkdtemp(prefix="keylake-")))
        self._overrides = {name: dict(values) for name, values in (settings or {}).items()}
        self._environment = {NULL_CIPHER_VARIABLE: "1"} if null_cipher else {}
        self._progress = progress or (lambda _: None)
        self._proxy_port = proxy_port
        self._exit = AsyncExitStack()
        self.services: dict[str, ServiceProcess] = {}
        self.ports = Ports.pick(proxy_port, keymanagers)
        self._links = Links() if links else None
        self.client: KeylakeClient
        self.customer: Customer

    # --- life ---

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._exit.aclose()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._exit.aclose()

    async def _start(self) -> None:
        if self._temporary:
            self._exit.callback(shutil.rmtree, self.layout.home, ignore_errors=True)
        self.layout.create(len(self.ports.keymanagers))
        # Sockets have paths of at most 107 bytes, so they do not lie below `home`.
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="kl-", dir="/tmp"))
        self._exit.callback(shutil.rmtree, self.runtime_dir, ignore_errors=True)
        self._exit.callback(self.layout.state_file.unlink, missing_ok=True)

        if self._links is not None:
            self._links.start()
            self._exit.push_async_callback(self._links.stop)
        # A first compilation takes longer than a service may take to get ready.
        self._progress("what Postgres loads: compiled the first time")
        await asyncio.gather(prepare(), prepare_guard())
        self._progress("customer's cloud and metadata database")
        metadata, bootstrap = await asyncio.gather(self._start_metadata(), self._start_customercloud())
        self._progress("keymanager, safekeepers, pageserver, compute manager, proxy")
        configs = await self._configs(metadata, bootstrap)
        await self._start_keymanagers(configs)
        await asyncio.gather(
            *(self._start_service(name, "safekeeper", configs[name], Service.SAFEKEEPER) for name in self._safekeepers),
            self._start_service("pageserver", "pageserver", configs["pageserver"], Service.PAGESERVER),
        )
        await self._start_service("compute", "compute", configs["compute"], Service.COMPUTE)
        await self._start_service("proxy", "compute.proxy", configs["proxy"], Service.PROXY)
        issuer = TokenIssuer.load(self.layout.admin_key)
        self.client = KeylakeClient(self.ports.addresses(), self.layout.ca_certificate, issuer)
        self._exit.push_async_callback(self.client.aclose)
        state = {"ports": asdict(self.ports)}
        write_secret(self.layout.state_file, json.dumps(state))

    async def _start_metadata(self) -> PostgresServer:
        if not (self.layout.metadata / "PG_VERSION").exists():
            password = self.layout.secret(f"metadata-{METADATA_SUPERUSER}.password")
            await initdb(self.layout.metadata, superuser=METADATA_SUPERUSER, password=password, auth_local=Auth.SCRAM)
        server = PostgresServer(
            self.layout.metadata,
            socket_dir=self.runtime_dir / "m",
            conf={"shared_buffers": "16MB", "max_connections": 60},
            log=self.layout.logs / "metadata.log",
        )
        await server.start()
        self._exit.push_async_callback(server.stop)
        roles = (METADATA_SUPERUSER, *METADATA_ROLES)
        passwords = {role: SecretStr(self.layout.secret(f"metadata-{role}.password")) for role in roles}
        await prepare_database(Path(server.host), passwords)
        return server

    async def _start_customercloud(self) -> BootstrapAnswer:
        base_url = f"https://127.0.0.1:{self.ports.customercloud}"
        config = self.layout.write_config(
            "customercloud",
            {
                "port": self.ports.customercloud,
                "state_dir": str(self.layout.customercloud),
                "tls_cert_path": str(self.layout.pki / "customercloud.crt"),
                "tls_key_path": str(self.layout.pki / "customercloud.key"),
            },
        )
        ready = self._readiness(base_url, "/healthz", None)
        await self._run("customercloud", "customercloud", config, ready)
        token = self.layout.customer_admin_token.read_text().strip()
        admin = CloudAdmin(base_url, token, verify=self.layout.ca_certificate)
        bootstrap = await asyncio.to_thread(admin.bootstrap_aws, self.layout.secret("external-id"))
        endpoint = CloudEndpoint(bootstrap.region, base_url, self.layout.ca_certificate)
        self.customer = Customer(bootstrap, endpoint, admin)
        self._exit.callback(self.customer.close)
        return bootstrap

    async def _start_keymanagers(self, configs: Mapping[str, dict[str, Any]]) -> None:
        """One after the other, so that the first one leads; the others are ready when they stand by."""
        for name in self.ports.keymanagers:
            await self._start_service(name, "keymanager", configs[name], Service.KEYMANAGER)

    async def _start_service(self, name: str, module: str, values: dict[str, Any], service: Service) -> None:
        config = self.layout.write_config(name, values)
        standby = service is Service.KEYMANAGER and len(self.ports.keymanagers) > 1
        ready = self._readiness(f"https://127.0.0.1:{values['listen']['port']}", "/readyz", service, standby=standby)
        await self._run(name, module, config, ready)

    async def _run(self, name: str, module: str, config: Path, ready: Callable[[], Awaitable[bool]]) -> None:
        process = self.service_process(name, module, config, self.layout.logs / f"{name}.log", ready, self._environment)
        self.services[name] = process
        self._exit.push_async_callback(process.stop)
        await process.start()

    def _readiness(
        self, base_url: str, path: str, service: Service | None, *, standby: bool = False
    ) -> Callable[[], Awaitable[bool]]:
        """`standby`: one that is well while another one does the work counts, too."""
        context = client_context(self.layout.ca_certificate)
        extensions = {} if service is None else {"sni_hostname": service_host_name(service.value)}

        async def ready() -> bool:
            try:
                async with httpx.AsyncClient(verify=context, trust_env=False, timeout=2) as http:
                    answer = await http.get(base_url + path, extensions=extensions)
                    return answer.status_code == 200 or (standby and answer.json() == {"status": "standby"})
            except (httpx.HTTPError, ValueError):
                return False

        return ready

    # --- settings of the services ---

    async def _configs(self, metadata: PostgresServer, bootstrap: BootstrapAnswer) -> dict[str, dict[str, Any]]:
        ports, layout = self.ports, self.layout

        def address(port: int) -> dict[str, Any]:
            return {"host": "127.0.0.1", "port": port}

        async def to(source: str, target: str, port: int) -> dict[str, Any]:
            """Where `source` reaches `target`."""
            return address(port if self._links is None else await self._links.add_tcp(source, target, port))

        async def keymanagers(source: str) -> list[dict[str, Any]]:
            return [await to(source, name, port) for name, port in ports.keymanagers.items()]

        def common(service: Service, name: str, port: int) -> dict[str, Any]:
            return {"listen": address(port), "identity": layout.identity(service, name), "node_id": name}

        async def dsn(role: str, source: str) -> str:
            password, host = layout.secret(f"metadata-{role}.password"), metadata.host
            if self._links is not None:
                host = str(self.runtime_dir / "l" / source)
                await self._links.add_postgres_socket(source, "metadata", Path(metadata.host), Path(host))
            return f"postgresql://{role}:{password}@/{METADATA_DATABASE}?host={host}"

        async def cloud(source: str) -> str:
            return f"https://127.0.0.1:{(await to(source, 'customercloud', ports.customercloud))['port']}"

        safekeepers = [
            (f"safekeeper-{n}", http, wal)
            for n, (http, wal) in enumerate(zip(ports.safekeepers, ports.safekeepers_wal, strict=True), 1)
        ]
        configs: dict[str, dict[str, Any]] = {
            "pageserver": common(Service.PAGESERVER, "pageserver", ports.pageserver)
            | {
                "pages_listen": address(ports.pages),
                "keymanager": await keymanagers("pageserver"),
                "safekeepers": [
                    {"node_id": name, "wal": await to("pageserver", name, wal)} for name, _, wal in safekeepers
                ],
                "object_store": {"url": layout.objects.as_uri()},
                "cache_dir": str(layout.pageserver_cache),
            },
            "compute": common(Service.COMPUTE, "compute", ports.manager)
            | {
                "database_url": await dsn("compute", "compute"),
                "keymanager": await keymanagers("compute"),
                "pageserver": await to("compute", "pageserver", ports.pageserver),
                "pages": await to("compute", "pageserver", ports.pages),
                "safekeepers": [
                    {
                        "node_id": name,
                        "http": await to("compute", name, http),
                        "wal": await to("compute", name, wal),
                    }
                    for name, http, wal in safekeepers
                ],
                "runtime_dir": str(self.runtime_dir / "c"),
                "log_dir": str(layout.data / "compute-logs"),
            },
            "proxy": common(Service.PROXY, "proxy", ports.proxy_http)
            | {
                "postgres_listen": address(ports.proxy),
                "certificate": str(layout.pki / "postgres.crt"),
                "private_key": str(layout.pki / "postgres.key"),
                "domain": PROXY_DOMAIN,
                "shutdown_grace_s": 0,  # the computes behind it go as well
                "compute": await to("proxy", "compute", ports.manager),
                "keymanager": await keymanagers("proxy"),
            },
        }
        for name, port in ports.keymanagers.items():
            kms = await cloud(name)
            configs[name] = common(Service.KEYMANAGER, name, port) | {
                "metadata_dsn": await dsn("keymanager", name),
                "audit_anchors": {"url": layout.anchors.as_uri(), "connections": 4},
                "aws": {
                    "kms_endpoint_url": kms,
                    "sts_endpoint_url": kms,
                    "ca_bundle": str(layout.ca_certificate),
                    "access_key_id": bootstrap.vendor.access_key_id,
                    "secret_access_key": bootstrap.vendor.secret_access_key,
                },
            }
        for number, (name, http, wal) in enumerate(safekeepers, 1):
            configs[name] = common(Service.SAFEKEEPER, name, http) | {
                "wal_listen": address(wal),
                "keymanager": await keymanagers(name),
                "data_dir": str(layout.safekeeper(number)),
                "object_store": {"url": layout.objects.as_uri()},
            }
        for name, values in configs.items():
            kind = name.partition("-")[0]
            values |= self._overrides.get(kind, {}) | self._overrides.get(name, {})
        return configs

    # --- partitions ---

    async def partition(
        self, one: str, other: str | None = None, *, how: Cut = Cut.SILENT, pids: Collection[int] | None = None
    ) -> None:
        """From now on `one` and `other` do not hear each other; without `other`, nobody hears `one`.

        Names as for `service`, and `metadata`. `pids`: only connections that these processes have opened, silently:
        the agent of one compute, which otherwise counts as `compute`. The proxy and the safekeepers reach a compute
        over its Unix socket, which is cut when it was linked before (`link_compute`). A safekeeper that copies from
        another one uses the manager's link to it; between two safekeepers, its connections are cut there, silently. You
        and the customer still reach everybody.

        Raises InvalidInputError for two that do not speak with each other, ConflictError without `links`.
        """
        links = self._require_links()
        if one in self._safekeepers and other in self._safekeepers:
            for source, target in ((one, other), (other, one)):
                await links.cut("compute", target, Cut.SILENT, [self.service(source).pid])
        else:
            await links.cut(one, other, how, pids)

    async def link_compute(self, instance_id: InstanceId) -> None:
        """From now on who connects to the socket of this compute, which runs, can be cut off from it: the proxy and
        each safekeeper. Who is connected already cannot. Raises ConflictError without `links`."""
        sources = ("proxy", *self._safekeepers)

        def name_of(pid: int) -> str:
            return next((name for name in sources if (each := self.services[name]).running and each.pid == pid), "")

        directory = self.runtime_dir / "c" / str(instance_id)
        await self._require_links().take_over(directory, "compute", sources, name_of)

    async def heal(self) -> None:
        """Ends all partitions."""
        await self._require_links().heal()

    async def links(self) -> list[LinkState]:
        """Every two services that `partition` can cut off from each other, and whether they are."""
        return await self._require_links().state()

    def _require_links(self) -> Links:
        if self._links is None:
            raise ConflictError("this cluster was made without links: Cluster(links=True)")
        return self._links

    # --- what people do first ---

    async def create_key_configuration(
        self, key_arn: str, name: str = "main", *, outage_grace_s: float = 0.0, probe_interval_s: float = 1.0
    ) -> KeyConfiguration:
        """Keylake's use of the customer's key, through the role that the customer trusts it with."""
        bootstrap = self.customer.bootstrap
        key = AwsKey(key_arn=key_arn, role_arn=bootstrap.role_arn, external_id=bootstrap.external_id)
        return await self.client.create_key_configuration(
            CreateKeyConfiguration(name=name, key=key, outage_grace_s=outage_grace_s, probe_interval_s=probe_interval_s)
        )

    async def create_workspace(self, key_arn: str | None = None, name: str = "main", **key: float) -> Workspace:
        """A workspace under a CMK; a new one when none is given. `key`: see `create_key_configuration`."""
        key_arn = key_arn or await self.customer.create_key(f"CMK of {name}")
        configuration = await self.create_key_configuration(key_arn, name, **key)
        return await self.client.create_workspace(name, configuration.key_configuration_id)

    async def leader(self) -> ServiceProcess:
        """The keymanager that leads. Raises UnavailableError when none does for long enough."""
        return self.service((await self.client.keymanager_status()).node_id)

    async def create_project(self, name: str = "demo", workspace: WorkspaceId | None = None) -> RunningProject:
        """A project with storage and an endpoint. Its compute starts with the first connection."""
        workspace = workspace or (await self.create_workspace(name=f"workspace of {name}")).workspace_id
        project = await self.client.create_project(workspace, name)
        timeline = await self.client.create_timeline(project.project_id)
        endpoint = await self.client.create_endpoint(timeline)
        return RunningProject(project, timeline, endpoint, self.client.connection(endpoint))

    def service(self, name: str) -> ServiceProcess:
        """`customercloud`, `keymanager` (`keymanager-2` …), `safekeeper-1` …, `pageserver`, `compute`, `proxy`."""
        try:
            return self.services[name]
        except KeyError:
            raise UnavailableError(f"no service {name!r}; there are {', '.join(self.services)}") from None
