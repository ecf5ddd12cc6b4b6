"""Workspaces on a shared cluster, each under a CMK of its own: their clients, and what their customers do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from keylake.cluster import Cluster, Customer, RunningProject
from keylake.demo.ledger import CLIENT_ERRORS, Ledger, describe
from shared.api.compute import EndpointState
from shared.api.keymanager import KeyState, NoCause, Revocation, WorstCase
from shared.auth import Service, TokenIssuer
from shared.config import Address
from shared.errors import KeyAccessError, RevokedError, ShreddedError, SuspendedError
from shared.keyspace import Fork, RelTag
from shared.lsn import Lsn
from shared.tls import client_context, service_host_name
from tests.cluster.bank import Bank, audit, open_bank
from tests.cluster.pages import PageClient, page_client
from tests.cluster.primary import Session, caught_up, connect, safekeeper_timelines, tag_of
from tests.cluster.processes import ComputeProcesses, compute_of
from tests.fixtures.waiting import wait_until

LEASE_TTL_S = 2.0
PROBE_INTERVAL_S = 0.2

Act = Callable[[Customer, str], Awaitable[None]]


@dataclass(slots=True)
class Tenant:
    """A workspace under a CMK of its own, with one project and a bank in it."""

    cluster: Cluster
    key_arn: str
    project: RunningProject
    page: tuple[RelTag, int, int] = (RelTag(0, 0, 0, Fork.MAIN), 0, 0)
    """(fork, block, LSN) of a page with rows in it."""
    ledger: Ledger = field(default_factory=Ledger)
    banks: int = 0

    async def connect(self) -> Session:
        return await connect(self.project)

    def bank(self, clients: int = 3, by: Callable[[], Awaitable[Session]] | None = None) -> Bank:
        self.banks += 1
        return Bank(by or self.connect, self.ledger, f"b{self.banks}", clients)

    async def check(self) -> None:
        connection = await self.connect()
        problems = await audit(connection, self.ledger)
        await connection.close()
        assert not problems, problems

    async def compute(self) -> ComputeProcesses:
        return await compute_of(self.cluster, self.project.endpoint.endpoint_id)

    async def state(self) -> KeyState:
        return (await self.cluster.client.project(self.project.project.project_id)).state

    async def becomes(self, state: KeyState, timeout_s: float = 20.0) -> None:
        async def look() -> bool:
            return await self.state() is state

        await wait_until(look, timeout_s)

    async def revocations(self) -> list[Revocation]:
        return await self.cluster.client.revocations(self.project.project.project_id)

    async def sealed(self, timeout_s: float = 20.0) -> Revocation:
        """Returns when the last revocation is over: every instance has acknowledged, or its lease has run out."""

        async def look() -> Revocation | None:
            found = await self.revocations()
            done = found and all(r.sealed_after_s is not None for r in found)
            return max(found, key=lambda r: r.detected_at) if done else None

        revocation = await wait_until(look, timeout_s)
        assert isinstance(revocation, Revocation)
        return revocation

    async def read_page(self, client: PageClient) -> bytes:
        return await client.page(*self.page)

    async def read_page_anew(self) -> bytes:
        """By a connection of its own: one that was there when the keys were lost has ended with them."""
        async with page_client(self.cluster, self.project) as client:
            return await self.read_page(client)

    async def bound(self, cause: NoCause) -> WorstCase:
        """As it is computed for the settings in force."""
        configuration = await self.cluster.client.key_configuration(self.project.project.key_configuration_id)
        return next(case for case in configuration.worst_cases if case.cause is cause)

    async def flushed(self) -> list[Lsn]:
        """flush_lsn of every safekeeper."""
        return [t.flush_lsn for t in (await safekeeper_timelines(self.cluster, self.project)).values()]

    def told_since(self, at: float) -> set[tuple[str, str]]:
        """(SQLSTATE, message) of every error that a server sent to a client; the driver's own have no SQLSTATE."""
        return {(code, message) for _, code, message in self.ledger.errors_since(at) if len(code) == 5}

    def acknowledged_since(self, at: float) -> list[str]:
        return [number for number, when in self.ledger.acknowledged.items() if when > at]


@asynccontextmanager
async def new_tenant(cluster: Cluster, name: str, outage_grace_s: float = 0.0) -> AsyncIterator[Tenant]:
    key_arn = await cluster.customer.create_key(name)
    workspace = await cluster.create_workspace(
        key_arn, name, probe_interval_s=PROBE_INTERVAL_S, outage_grace_s=outage_grace_s
    )
    tenant = Tenant(cluster, key_arn, await cluster.create_project(name, workspace.workspace_id))
    await open_bank(tenant.connect)
    connection = await tenant.connect()
    tag = await tag_of(connection, "account")
    await connection.close()
    info = await caught_up(cluster, tenant.project)
    tenant.page = (tag, 0, info.last_record_lsn.value)
    try:
        yield tenant
    finally:
        await cluster.client.stop_endpoint(tenant.project.endpoint.endpoint_id)


async def nothing_is_served(tenant: Tenant, client: PageClient, expected: type[KeyAccessError]) -> None:
    """Not a page, not a connection, not a compute. `client`: a connection from better times."""
    with pytest.raises(expected):
        await tenant.read_page(client)
    async with page_client(tenant.cluster, tenant.project) as fresh:
        with pytest.raises(expected):
            await tenant.read_page(fresh)
    with pytest.raises(expected):
        await tenant.cluster.client.start_endpoint(tenant.project.endpoint.endpoint_id)
    endpoint = await tenant.cluster.client.endpoint(tenant.project.endpoint.endpoint_id)
    assert endpoint.state is EndpointState.STOPPED
    await said_over_http(tenant.cluster, tenant.project, expected)
    assert await sqlstate_of_connecting(tenant) == expected.sqlstate


SAID_OVER_HTTP: dict[type[KeyAccessError], tuple[int, str, str]] = {
    SuspendedError: (503, "key_suspended", "Reconnect when it answers"),
    RevokedError: (403, "key_revoked", "Allow the key in the customer's KMS again"),
    ShreddedError: (410, "key_shredded", "can never be read again"),
}
"""Status, code, and words of the hint (docs/errors.md)."""


async def said_over_http(cluster: Cluster, running: RunningProject, expected: type[KeyAccessError]) -> None:
    """What the manager and the keymanager answer whoever wants a compute or a KEK of it, as it comes."""
    addresses, admin = cluster.ports.addresses(), TokenIssuer.load(cluster.layout.admin_key)
    [keymanager] = [addresses.keymanager] if isinstance(addresses.keymanager, Address) else addresses.keymanager
    wanted = {
        Service.COMPUTE: (addresses.manager, f"/v1/endpoints/{running.endpoint.endpoint_id}:start"),
        Service.KEYMANAGER: (keymanager, f"/v1/projects/{running.project.project_id}/keks:rotate"),
    }
    status, code, words = SAID_OVER_HTTP[expected]
    async with httpx.AsyncClient(verify=client_context(cluster.layout.ca_certificate), trust_env=False) as http:
        for service, (address, path) in wanted.items():
            answer = await http.post(
                f"https://{address}{path}",
                headers={"Authorization": f"Bearer {admin.issue(service, admin.scopes)}"},
                extensions={"sni_hostname": service_host_name(service.value)},
                timeout=30,
            )
            body = answer.json()
            assert (answer.status_code, body["code"]) == (status, code), (service, answer.text)
            assert body["workspace_id"] == str(running.project.workspace_id), (service, answer.text)
            assert words in body["hint"], (service, answer.text)


async def refused(tenant: Tenant, expected: type[KeyAccessError]) -> None:
    """Returns when the page is not served any more, for this reason."""

    async def look() -> bool:
        try:
            await tenant.read_page_anew()
        except expected:
            return True
        return False

    await wait_until(look)


async def sqlstate_of_connecting(tenant: Tenant, timeout_s: float = 60.0) -> str:
    """How the proxy refuses, or that it says nothing for as long; empty when it lets in."""
    try:
        async with asyncio.timeout(timeout_s):
            connection = await tenant.connect()
    except CLIENT_ERRORS as error:
        return describe(error)[0]
    await connection.close()
    return ""


async def disable(customer: Customer, key_arn: str) -> None:
    await customer.disable(key_arn)


async def enable(customer: Customer, key_arn: str) -> None:
    await customer.enable(key_arn)


async def schedule_deletion(customer: Customer, key_arn: str) -> None:
    await customer.schedule_deletion(key_arn)


async def cancel_deletion(customer: Customer, key_arn: str) -> None:
    await customer.cancel_deletion(key_arn)
    await customer.enable(key_arn)


async def deny(customer: Customer, key_arn: str) -> None:
    await customer.deny(key_arn)


async def allow(customer: Customer, key_arn: str) -> None:
    await customer.allow(key_arn)
