"""A cluster whose services can be cut off, and the workspaces on it."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from time import monotonic
from typing import Any, Final

import asyncpg
import httpx

from customercloud.aws.admin import RoleRequest, UserRequest
from customercloud.aws.identity import trust_policy_document
from customercloud.faults import ErrorKind, Faults, KeyFaults, Outage
from keylake.cluster import Cluster, RunningProject
from keylake.demo.ledger import CLIENT_ERRORS, Ledger, describe
from keylake.ports import free_port
from keylake.process import ServiceProcess
from shared.api.keymanager import (
    AwsKey,
    CreateKeyConfiguration,
    KeyConfiguration,
    KeyState,
    Project,
    Revocation,
    WorstCase,
)
from shared.auth import Scope, Service, TokenIssuer
from shared.errors import KeylakeError, LeaseExpiredError, RevokedError, SuspendedError, UnavailableError
from shared.http import ServiceClient
from shared.ids import WorkspaceId
from shared.keyspace import Fork, RelTag
from shared.retry import RetryPolicy, retry
from shared.tls import client_context, service_host_name
from tests.cluster.bank import Bank, audit, open_bank
from tests.cluster.pages import page_client
from tests.cluster.primary import Session, caught_up, tag_of
from tests.cluster.processes import ComputeProcesses, compute_of
from tests.cluster.wal import wal_reader
from tests.cluster_faults.history import History
from tests.cluster_faults.schedule import Event
from tests.fixtures.forked_cluster import ForkedCluster, ForkedService
from tests.fixtures.waiting import wait_until

LEASE_TTL_S: Final = 10.0
LEADER_TTL_S: Final = 2.5
"""Room for a machine that has more to do: a takeover must end before a lease does. A leader that is cut off without a
word is noticed by its clients two renewals later, at two thirds of the lease."""
PROBE_INTERVAL_S: Final = 0.5
BYSTANDER_GRACE_S: Final = 600.0
BYSTANDERS_WAY: Final = "the bystander's proxy"
SETTINGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "keymanager": {
        "lease_ttl_s": LEASE_TTL_S,
        "leader_ttl_s": LEADER_TTL_S,
        "restore_hold_s": 0,  # the same keys go in each round
    },
    "compute": {"poll_interval_s": 0.5},
}
_READ_EVERY_S: Final = 0.1
_WRITE_EVERY_S: Final = 0.05
_RETRY_S: Final = 0.3
_ACCOUNT: Final = "111122223333"


class Place:
    """The cluster, a second proxy that nothing happens to, and the faults of the customers' keys. And the bystander's
    compute manager and proxy: who cuts a manager off ends what runs under it, whoever's it is."""

    def __init__(self, cluster: Cluster, ways: Mapping[str, int]) -> None:
        self.cluster = cluster
        self.ways = dict(ways)
        """Proxies by name: the port for clients."""
        self._key_faults: dict[str, KeyFaults] = {}
        self._faulting = asyncio.Lock()  # what is set last stands
        keymanagers = cluster.client.addresses.keymanager
        issuer = TokenIssuer.load(cluster.layout.admin_key)
        scopes = frozenset({Scope.STATUS_READ, Scope.SECURITY_ADMIN})
        # Impatient: the keymanager that it asks first may be stopped.
        self.keymanager = ServiceClient(
            Service.KEYMANAGER, keymanagers, cluster.layout.ca_certificate, issuer, scopes, timeout_s=1.0
        )

    async def fault(self, key_arn: str, faults: KeyFaults | None) -> None:
        """What requests that name this key see from now on; None: nothing."""
        key_id = key_arn.rpartition("/")[2]
        customer = self.cluster.customer
        spared = frozenset({customer.bootstrap.customer.access_key_id})
        async with self._faulting:
            self._key_faults.pop(key_id, None)
            if faults is not None:
                self._key_faults[key_id] = faults
            everything = Faults(of_keys=dict(self._key_faults), spared_access_key_ids=spared)
            await asyncio.to_thread(customer.simulation.set_faults, everything)


@asynccontextmanager
async def open_place() -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(ForkedCluster(settings=SETTINGS, keymanagers=2, links=True))
        # The vendor may assume any role that trusts it: each workspace here has one of its own.
        policy = {"Effect": "Allow", "Action": "sts:AssumeRole", "Resource": "*"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [policy]})
        admin = cluster.customer.simulation
        await asyncio.to_thread(
            admin.put_user, "444455556666", "keylake", UserRequest(policies={"bootstrap": document})
        )
        ways = {"proxy": cluster.ports.proxy}
        second, ways["proxy-2"] = clone(cluster, "proxy", "proxy-2", node_id="proxy-2")
        manager, manager_port = clone(cluster, "compute", "compute-2", node_id="compute-2")
        of_bystander, ways[BYSTANDERS_WAY] = clone(cluster, "proxy", "proxy-3", node_id="proxy-3", manager=manager_port)
        for service in (second, manager, of_bystander):
            stack.push_async_callback(service.stop)
            await service.start()
        place = Place(cluster, ways)
        stack.push_async_callback(place.keymanager.aclose)
        yield place


def clone(
    cluster: Cluster, name: str, as_name: str, node_id: str, *, manager: int | None = None
) -> tuple[ServiceProcess, int]:
    """A second instance of a service on ports of its own, not started: with a copy of its disk as it is now. Returns
    its port for data, too; of a compute manager, its only one. The keymanagers are not behind links: nothing cuts it
    off. `manager`: the port of a proxy's compute manager, if it is not the cluster's."""
    layout = cluster.layout
    values = json.loads((layout.config / f"{name}.json").read_text())
    port = free_port()
    values |= {"node_id": node_id, "listen": {"host": "127.0.0.1", "port": port}}
    values["keymanager"] = [{"host": "127.0.0.1", "port": port} for port in cluster.ports.keymanagers.values()]
    data_port = port if name == "compute" else free_port()
    for field_name in ("postgres_listen", "pages_listen", "wal_listen"):
        if field_name in values:
            values[field_name] = {"host": "127.0.0.1", "port": data_port}
    if name == "proxy":
        values["compute"] = {"host": "127.0.0.1", "port": manager or cluster.ports.manager}
    if name == "compute":
        values |= {"runtime_dir": f"{values['runtime_dir']}2", "log_dir": f"{values['log_dir']}-2", "spare_agents": 0}
    for field_name in ("data_dir", "cache_dir"):
        if field_name in values:
            copy = layout.data / as_name
            shutil.rmtree(copy, ignore_errors=True)
            with suppress(shutil.Error):  # of files that went away meanwhile
                shutil.copytree(values[field_name], copy, symlinks=True)
            values[field_name] = str(copy)
    service = Service(name.partition("-")[0])
    module = "compute.proxy" if service is Service.PROXY else service.value
    context = client_context(layout.ca_certificate)
    url = f"https://127.0.0.1:{values['listen']['port']}/readyz"

    async def ready() -> bool:
        try:
            async with httpx.AsyncClient(verify=context, trust_env=False, timeout=2) as http:
                answer = await http.get(url, extensions={"sni_hostname": service_host_name(service.value)})
                return answer.status_code == 200
        except httpx.HTTPError:
            return False

    config = layout.write_config(as_name, values)
    return ForkedService(as_name, module, config, layout.logs / f"{as_name}.log", ready), data_port


# --- workspaces ---


@dataclass(slots=True)
class Tenant:
    """A project with a CMK and a role of its own, and its clients: a bank, and readers by every way."""

    place: Place
    name: str
    key_arn: str
    role: str
    configuration: KeyConfiguration
    project: RunningProject
    ways: Sequence[str]
    page: tuple[RelTag, int, int] = (RelTag(0, 0, 0, Fork.MAIN), 0, 0)
    ledger: Ledger = field(default_factory=Ledger)
    history: History = field(default_factory=History)
    errors: list[tuple[float, str, str, str]] = field(default_factory=list)
    """(when, SQLSTATE or class, message, detail) of every error that a reader saw."""
    bank: Bank | None = None
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _next_way: Any = None
    _banks: int = 0

    async def connect(self, way: str | None = None) -> Session:
        way = way or next(self._next_way)
        arguments = self.project.connection.asyncpg_arguments() | {"port": self.place.ways[way]}
        return await asyncpg.connect(**arguments, timeout=60)

    @property
    def role_arn(self) -> str:
        return f"arn:aws:iam::{_ACCOUNT}:role/{self.role}"

    async def open(self) -> None:
        self._next_way = cycle(self.ways)
        await open_bank(self.connect)
        connection = await self.connect()
        tag = await tag_of(connection, "account")
        await connection.close()
        info = await caught_up(self.place.cluster, self.project)
        self.page = (tag, 0, info.last_record_lsn.value)
        self._tasks = [asyncio.create_task(self._read(way)) for way in self.ways]
        self._tasks.append(asyncio.create_task(self._read_pages()))
        self._tasks.append(asyncio.create_task(self._read_wal()))
        await self.open_bank()

    async def open_bank(self) -> None:
        self._banks += 1
        self.bank = Bank(self.connect, self.ledger, f"{self.name}{self._banks}", clients=2, pause_s=_WRITE_EVERY_S)
        await self.bank.__aenter__()

    async def close(self) -> None:
        if self.bank is not None:
            await self.bank.stop(timeout_s=5)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def check(self) -> None:
        """Nothing that was acknowledged is lost, nothing is there twice."""
        assert self.bank is not None
        await self.bank.stop()
        connection = await self.connect()
        problems = await audit(connection, self.ledger)
        await connection.close()
        assert not problems, f"{self.name}: {problems}"

    async def works(self, since: float) -> None:
        """Returns when its clients read and commit again by every way. Raises TimeoutError."""

        def works() -> bool:
            commits = sum(at > since for at in self.ledger.acknowledged.values())
            return commits >= 5 and {*self.ways, "pages", "wal"} <= set(self.history.ways_since(since))

        await wait_until(works, 60.0)

    def check_errors(self, since: float) -> None:
        """What its clients were told since then: only what docs/errors.md has, with whose key it is and what to do."""
        reasons = {RevokedError, SuspendedError, LeaseExpiredError}
        hints = {error.sqlstate: error.hint for error in reasons}
        drivers = {"08003"}  # a connection that broke, in the driver's own words
        told = [error for error in self.errors if error[0] >= since and len(error[1]) == 5 and error[1] not in drivers]
        assert {code for _, code, *_ in told} <= {*hints, "57P01", "57P03", "08007"}, told
        of_key = [error for error in told if error[1] in hints]
        assert of_key, "nobody was told that it is the key"
        for _, code, message, detail in of_key:
            assert hints[code] in message, (code, message)
            if code != LeaseExpiredError.sqlstate:
                assert str(self.project.project.workspace_id) in detail, (code, message, detail)

    def commits(self) -> list[float]:
        return list(self.ledger.acknowledged.values())

    async def state(self) -> KeyState:
        path = f"/v1/projects/{self.project.project.project_id}"
        return (await self.place.keymanager.call(Project, "GET", path)).state

    async def unsealed(self) -> list[Revocation]:
        params = {"project_id": str(self.project.project.project_id)}
        answer = await self.place.keymanager.request("GET", "/v1/revocations", params=params)
        found = [Revocation.model_validate(each) for each in json.loads(answer.content)]
        return [each for each in found if each.sealed_after_s is None]

    async def compute(self) -> ComputeProcesses:
        return await compute_of(self.place.cluster, self.project.endpoint.endpoint_id)

    def bound(self, event: Event) -> WorstCase:
        """As the API says it."""
        return next(case for case in self.configuration.worst_cases if case.cause is event.cause)

    async def _read(self, way: str) -> None:
        """One client that reads, and comes back for as long as it takes. It never gives up waiting for an answer: that
        is what a late one would come to."""
        while True:
            connection: Session | None = None
            try:
                connection = await self.connect(way)
                while True:
                    assert await connection.fetchval("select opening from account where id = 1") is not None
                    self.history.answered(monotonic(), way)
                    await asyncio.sleep(_READ_EVERY_S)
            except CLIENT_ERRORS as error:
                code, message = describe(error)
                cause = error.__cause__ or error
                self.errors.append((monotonic(), code, message, getattr(cause, "detail", None) or ""))
            finally:
                if connection is not None:
                    connection.terminate()
            await asyncio.sleep(_RETRY_S)

    async def _read_pages(self, way: str = "pages", port: int = 0) -> None:
        """The same at the pageserver's own port: what a compute that reads pages would be given."""
        while True:
            with suppress(KeylakeError, OSError, TimeoutError):
                async with page_client(self.place.cluster, self.project, port) as client:
                    while True:
                        page = await client.page(*self.page)
                        assert page != bytes(8192)
                        self.history.answered(monotonic(), way)
                        await asyncio.sleep(_READ_EVERY_S)
            await asyncio.sleep(_RETRY_S)

    async def _read_wal(self, way: str = "wal", port: int = 0) -> None:
        """The same at a safekeeper's: what another pageserver would be given. It follows the log, and asks again from
        the last that it got, so there is always something to be had."""
        port = port or self.place.cluster.ports.safekeepers_wal[0]
        _, _, lsn = self.page
        while True:
            with suppress(KeylakeError, OSError, TimeoutError):
                async with wal_reader(self.place.cluster, self.project, port) as reader:
                    await reader.ask(lsn)
                    while True:
                        lsn, _ = await reader.read()
                        self.history.answered(monotonic(), way)
            await asyncio.sleep(_RETRY_S)

    @asynccontextmanager
    async def reading_copy(self, service: Service, port: int) -> AsyncIterator[None]:
        """Reads what a second instance of a service serves at its port for data, as long as the context lasts: that
        counts like every other answer. Raises TimeoutError when it serves nothing at all."""
        way = f"the copy of the {service}"
        match service:
            case Service.PAGESERVER:
                reader = self._read_pages(way, port)
            case Service.SAFEKEEPER:
                reader = self._read_wal(way, port)
            case _:
                self.place.ways[way] = port
                reader = self._read(way)
        begun, reading = monotonic(), asyncio.create_task(reader)
        try:
            # It has the newer generation of the name, so the keys are its own now.
            await wait_until(lambda: way in self.history.ways_since(begun), 30.0)
            yield
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    # --- the customer ---

    async def say_no(self, event: Event) -> None:
        """Returns when the KMS says yes to nothing any more."""
        customer, key = self.place.cluster.customer, self.key_arn
        match event:
            case Event.DISABLE:
                await customer.disable(key)
            case Event.DELETION:
                await customer.schedule_deletion(key)
            case Event.POLICY:
                await asyncio.to_thread(customer.aws.remove_role, key, self.role_arn)
            case Event.ROLE:
                await asyncio.to_thread(customer.simulation.delete_role, _ACCOUNT, self.role)
            case Event.TIMEOUT:
                await self.place.fault(key, KeyFaults(outage=Outage.HANG))
            case Event.SERVER_ERROR:
                await self.place.fault(key, KeyFaults(error_rate=1, error_kind=ErrorKind.BAD_GATEWAY))
            case Event.THROTTLE:
                await self.place.fault(key, KeyFaults(throttle_rate=1))
            case Event.FLAP:
                await self.place.fault(key, KeyFaults(error_rate=0.5))
                await customer.disable(key)

    async def say_yes(self, event: Event) -> None:
        customer, key = self.place.cluster.customer, self.key_arn
        match event:
            case Event.DISABLE:
                await customer.enable(key)
            case Event.DELETION:
                await customer.cancel_deletion(key)
                await customer.enable(key)
            case Event.POLICY:
                await asyncio.to_thread(customer.aws.allow_role, key, self.role_arn)
            case Event.ROLE:
                await put_role(self.place.cluster, self.role)
                # A policy means the role that was there when it was written, and not another one of its name.
                await asyncio.to_thread(customer.aws.allow_role, key, self.role_arn)
            case Event.TIMEOUT | Event.SERVER_ERROR | Event.THROTTLE:
                await self.place.fault(key, None)
            case Event.FLAP:
                await customer.enable(key)
                await self.place.fault(key, None)


async def put_role(cluster: Cluster, name: str) -> None:
    bootstrap = cluster.customer.bootstrap
    trust = trust_policy_document(["arn:aws:iam::444455556666:user/keylake"], bootstrap.external_id)
    request = RoleRequest(trust_policy=trust)
    await asyncio.to_thread(cluster.customer.simulation.put_role, _ACCOUNT, name, request)


@asynccontextmanager
async def new_tenant(
    place: Place, name: str, *, grace_s: float, ways: Sequence[str], within: WorkspaceId | None = None
) -> AsyncIterator[Tenant]:
    """In a workspace of its own; or within somebody else's, under a key of its own."""
    cluster, role = place.cluster, f"keylake-{name}"
    await put_role(cluster, role)
    role_arn = f"arn:aws:iam::{_ACCOUNT}:role/{role}"
    key_arn = await asyncio.to_thread(cluster.customer.aws.create_key, name, role_arn=role_arn)
    key = AwsKey(key_arn=key_arn, role_arn=role_arn, external_id=cluster.customer.bootstrap.external_id)
    request = CreateKeyConfiguration(name=name, key=key, outage_grace_s=grace_s, probe_interval_s=PROBE_INTERVAL_S)
    # A machine that has too much to do answers too late, and we are told so before anything was made.
    configuration = await retry(
        RetryPolicy(attempts=5),
        lambda _: cluster.client.create_key_configuration(request),
        retryable=lambda error: isinstance(error, UnavailableError),
    )
    configured = configuration.key_configuration_id
    if within is None:
        within = (await cluster.client.create_workspace(name, configured)).workspace_id
    project = await cluster.client.create_project(within, name, configured)
    timeline = await cluster.client.create_timeline(project.project_id)
    endpoint = await cluster.client.create_endpoint(timeline)
    running = RunningProject(project, timeline, endpoint, cluster.client.connection(endpoint))
    tenant = Tenant(place, name, key_arn, role, configuration, running, ways)
    try:
        await tenant.open()
        yield tenant
    finally:
        await tenant.close()
