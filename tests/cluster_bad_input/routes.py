"""Every HTTP route of a running cluster, as its services describe themselves in /openapi.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import httpx

from shared.api.common import ErrorBody
from shared.auth import Service
from shared.errors import ERRORS_BY_CODE
from shared.ids import EndpointId, KeyConfigurationId, ProjectId, TimelineId, TokenId, WorkspaceId
from shared.tls import client_context, service_host_name
from tests.cluster_bad_input.place import CANARY, Place

ID_TYPES: Final = {
    "project_id": ProjectId,
    "timeline_id": TimelineId,
    "endpoint_id": EndpointId,
    "workspace_id": WorkspaceId,
    "key_configuration_id": KeyConfigurationId,
    "token_id": TokenId,
}
"""What may stand in a path. A route with something else in it fails the suite until it stands here, too."""
Ids = Mapping[str, str]
BY_THE_FRAMEWORK: Final = {405, 413}
"""A method that a path does not have, a body that is too large: InvalidInputError with a status of HTTP's own."""


async def ids_of_idle(place: Place) -> Ids:
    """Of things that exist."""
    [workspace] = await place.cluster.client.workspaces()
    [token] = await place.cluster.client.tokens()
    return {
        "project_id": str(place.idle.project.project_id),
        "timeline_id": str(place.idle.timeline.timeline_id),
        "endpoint_id": str(place.idle.endpoint.endpoint_id),
        "workspace_id": str(workspace.workspace_id),
        "key_configuration_id": str(workspace.key_configuration_id),
        "token_id": str(token.token_id),
    }


def unknown_ids() -> Ids:
    """Well-formed, of nothing."""
    return {name: str(kind.new()) for name, kind in ID_TYPES.items()}


@dataclass(frozen=True, slots=True)
class Route:
    method: str
    template: str
    query: tuple[dict[str, Any], ...]
    body: dict[str, Any] | None
    """JSON schema; None when it takes no body."""

    def path(self, ids: Ids) -> str:
        return re.sub(r"\{(\w+)\}", lambda match: ids[match[1]], self.template)

    @property
    def parameters(self) -> list[str]:
        return re.findall(r"\{(\w+)\}", self.template)


class Api:
    """One service's HTTP port. Entering it asks the service what it serves."""

    def __init__(self, place: Place, name: str) -> None:
        self.name = name
        self.service = Service(name.partition("-")[0])
        self.routes: list[Route] = []
        self.schemas: dict[str, Any] = {}
        self._http = httpx.AsyncClient(
            base_url=f"https://{place.address(name)}",
            verify=client_context(place.ca_certificate),
            trust_env=False,
            timeout=30,
        )

    async def __aenter__(self) -> Self:
        document = (await self.send("GET", "/openapi.json", None)).json()
        self.schemas = document["components"]["schemas"]
        for template, methods in document["paths"].items():
            for method, operation in methods.items():
                query = tuple(p for p in operation.get("parameters", ()) if p["in"] == "query")
                content = operation.get("requestBody", {}).get("content", {})
                body = content["application/json"]["schema"] if content else None
                self.routes.append(Route(method.upper(), template, query, body))
        assert self.routes, self.name
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._http.aclose()

    async def send(
        self, method: str, path: str, token: str | None, content: Any = None, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        sent = dict(headers or {})
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        if content is not None:
            sent["Content-Type"] = "application/json"
        extensions = {"sni_hostname": service_host_name(self.service.value)}
        return await self._http.request(method, path, content=content, headers=sent, extensions=extensions)


def check(response: httpx.Response, wanted: set[int], about: object, *secrets: str) -> ErrorBody | None:
    """An answer with a documented status; an error has the one body that errors have, and nothing of ours in it."""
    where = f"{about}: {response.request.method} {response.request.url.path[:200]} -> {response.status_code} "
    where += response.text[:500]
    assert response.status_code in wanted, where
    for leak in ("Traceback", 'File "', CANARY, *secrets):
        assert leak not in response.text, where
        assert leak not in str(response.headers), where
    if response.status_code == 200:
        assert response.content == b"[]", where  # the list of what does not exist
    if response.is_success or response.request.method == "HEAD":
        return None
    assert response.headers["content-type"] == "application/json", where
    body = ErrorBody.model_validate_json(response.content)
    if response.status_code not in BY_THE_FRAMEWORK:
        assert ERRORS_BY_CODE[body.code].http_status == response.status_code, where
    if response.status_code == 401:
        assert response.headers["www-authenticate"] == "Bearer", where
    return body
