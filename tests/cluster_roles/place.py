"""One cluster with two workspaces, and everybody who could ask it for something."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import httpx

from keylake.client import KeylakeClient
from keylake.cluster import Cluster, RunningProject
from shared.api.common import ErrorBody
from shared.auth import BearerToken, PersonRole, Service, TokenIssuer
from shared.authorize import Operation
from shared.config import Address
from shared.ids import EndpointId, KeyConfigurationId, ProjectId, TimelineId, TokenId, WorkspaceId
from shared.roles import PERSON_SCOPES, SERVICE_SCOPES, Scope
from shared.tls import client_context, service_host_name
from tests.fixtures.forked_cluster import ForkedCluster

IDS: Final = {
    "project_id": ProjectId,
    "timeline_id": TimelineId,
    "endpoint_id": EndpointId,
    "workspace_id": WorkspaceId,
    "key_configuration_id": KeyConfigurationId,
    "token_id": TokenId,
}
Ids = Mapping[str, str]


def unknown_ids() -> Ids:
    """Well-formed, of nothing: whoever is let in changes nothing."""
    return {name: str(kind.new()) for name, kind in IDS.items()}


@dataclass(frozen=True, slots=True)
class Subject:
    """Somebody who calls: a person with a role, or whoever has a signing key."""

    name: str
    scopes: frozenset[Scope]
    actor: str
    """As the audit log has it."""
    credentials: TokenIssuer | BearerToken

    def token(self, service: Service) -> str:
        return self.credentials.issue(service, self.scopes)


@dataclass(frozen=True, slots=True)
class Site:
    """One workspace with one project, as ids for paths."""

    running: RunningProject
    ids: Ids


@dataclass(frozen=True, slots=True)
class Place:
    cluster: Cluster
    subjects: tuple[Subject, ...]
    """Every role and every signing key; good for everything that they may do."""
    mine: Site
    other: Site
    http: Mapping[Service, httpx.AsyncClient]

    @property
    def owner(self) -> KeylakeClient:
        return self.cluster.client

    async def token(self, role: PersonRole, **bounds: Any) -> str:
        token, _ = await self.owner.create_token(role, subject="bound", ttl_s=3600, **bounds)
        return token

    async def send(
        self, service: Service, operation: Operation, ids: Ids, token: str | None, query: Ids | None = None
    ) -> httpx.Response:
        """With an empty body, which every route that wants one refuses as malformed, if it lets the caller in."""
        path = re.sub(r"\{(\w+)\}", lambda match: ids[match[1]], operation.path)
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        content = b'{"unknown": 1}' if operation.method in ("POST", "PATCH", "PUT") else None
        extensions = {"sni_hostname": service_host_name(service.value)}
        return await self.http[service].request(
            operation.method, path, params=query, headers=headers, content=content, extensions=extensions
        )


def refusal(response: httpx.Response) -> str:
    """The error's code; empty for an answer that is none."""
    return "" if response.is_success else ErrorBody.model_validate_json(response.content).code


@asynccontextmanager
async def place_with_everybody() -> AsyncIterator[Place]:
    async with ForkedCluster() as cluster, AsyncExitStack() as stack:
        mine = await cluster.create_project("mine")
        other = await cluster.create_project("other")
        ports, ca = cluster.ports, cluster.layout.ca_certificate
        addresses = {
            Service.KEYMANAGER: ports.keymanager,
            Service.COMPUTE: ports.manager,
            Service.PAGESERVER: ports.pageserver,
            Service.SAFEKEEPER: ports.safekeepers[0],
            Service.PROXY: ports.proxy_http,
        }
        http = {
            service: await stack.enter_async_context(
                httpx.AsyncClient(
                    base_url=f"https://{Address(port=port)}", verify=client_context(ca), trust_env=False, timeout=30
                )
            )
            for service, port in addresses.items()
        }
        subjects = []
        for role, scopes in PERSON_SCOPES.items():
            token, issued = await cluster.client.create_token(role, subject=role.value, ttl_s=3600)
            subjects.append(Subject(role, scopes, f"admin:{role.value}:{issued.token_id}", BearerToken(token)))
        for kind, scopes in SERVICE_SCOPES.items():
            name = "safekeeper-1" if kind == "safekeeper" else kind
            issuer = TokenIssuer.load(cluster.layout.keys / f"{name}.json")
            subjects.append(Subject(kind, scopes, f"{name}:{name}", issuer))
        yield Place(cluster, tuple(subjects), await site_of(cluster, mine), await site_of(cluster, other), http)


async def site_of(cluster: Cluster, running: RunningProject) -> Site:
    [workspace] = [w for w in await cluster.client.workspaces() if w.workspace_id == running.project.workspace_id]
    _, issued = await cluster.client.create_token(
        PersonRole.AUDITOR, subject="inhabitant", ttl_s=3600, project_id=running.project.project_id
    )
    return Site(
        running,
        {
            "project_id": str(running.project.project_id),
            "timeline_id": str(running.timeline.timeline_id),
            "endpoint_id": str(running.endpoint.endpoint_id),
            "workspace_id": str(workspace.workspace_id),
            "key_configuration_id": str(workspace.key_configuration_id),
            "token_id": str(issued.token_id),
        },
    )
