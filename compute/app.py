"""HTTP API of the compute manager: `shared.api.compute`, translated to calls of `Manager`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from compute.manager import Manager
from compute.repository import Repository
from shared.api.compute import (
    Admission,
    ChangeEndpoint,
    ConnectTarget,
    CreatedEndpoint,
    CreateEndpoint,
    CreateTimeline,
    Endpoint,
    EndpointState,
    FirstQuery,
    LogIn,
    ManagerStatus,
    ReplacedTimeline,
    ReplaceSafekeeper,
    Timeline,
)
from shared.auth import Principal, Scope, Service, TokenVerifier
from shared.authorize import Authorizer, Place, Reach
from shared.errors import InvalidInputError, NotFoundError, PermissionDeniedError
from shared.ids import EndpointId, ProjectId, TimelineId
from shared.service import Readiness, create_service_app

_PROJECT = "/v1/projects/{project_id}"
_ENDPOINT = "/v1/endpoints/{endpoint_id}"


def _project(project_id: str) -> ProjectId:
    try:
        return ProjectId.parse(project_id)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None


def _timeline(timeline_id: str) -> TimelineId:
    try:
        return TimelineId.parse(timeline_id)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None


def _endpoint(endpoint_id: str) -> EndpointId:
    try:
        return EndpointId.parse(endpoint_id)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None


ProjectPath = Annotated[ProjectId, Depends(_project)]
TimelinePath = Annotated[TimelineId, Depends(_timeline)]
EndpointPath = Annotated[EndpointId, Depends(_endpoint)]


def create_app(
    manager: Manager,
    repository: Repository,
    verifier: TokenVerifier,
    registry: CollectorRegistry,
    readiness: Readiness,
) -> FastAPI:
    app = create_service_app(Service.COMPUTE, registry, readiness, verifier)
    authorize = Authorizer(verifier)
    admin = Depends(authorize(Scope.WORKSPACE_ADMIN, Scope.COMPUTE_ADMIN))
    viewers = (Scope.STATUS_READ, Scope.WORKSPACE_ADMIN, Scope.COMPUTE_ADMIN)
    viewer = Depends(authorize(*viewers))
    finder = Depends(authorize(*viewers, Scope.DATA_USE))
    registry.register(_EndpointMetrics(manager))

    async def of_endpoint(request: Request) -> Place:
        """The path names no project, but the endpoint is of one."""
        try:
            return Place((await repository.endpoint(_endpoint(request.path_params["endpoint_id"]))).project_id)
        except NotFoundError:
            return Place()

    starter = Depends(authorize(Scope.COMPUTE_ADMIN, Scope.WORKSPACE_ADMIN, Scope.DATA_USE, locate=of_endpoint))
    stopper = Depends(authorize(Scope.COMPUTE_ADMIN, Scope.WORKSPACE_ADMIN, locate=of_endpoint))
    connector = Depends(authorize(Scope.COMPUTE_CONNECT, locate=of_endpoint))
    visible = Depends(authorize(*viewers, Scope.DATA_USE, Scope.COMPUTE_CONNECT, locate=of_endpoint))
    lister = Depends(authorize(*viewers, Scope.DATA_USE, reach=Reach.LIST))

    @app.post(_PROJECT + "/timelines")
    async def create_timeline(project_id: ProjectPath, body: CreateTimeline, caller: Principal = admin) -> Timeline:
        source = None if body.branch_from is None else body.branch_from.project_id
        if source is not None:
            # Whoever has a branch has what it was made from.
            workspaces = await verifier.workspaces_of(caller, {source})
            if not caller.may_touch(source, workspaces.get(source)):
                raise PermissionDeniedError("the token is not good for the project to branch off")
        return await manager.create_timeline(project_id, body.name, body.branch_from)

    @app.get(_PROJECT + "/timelines", dependencies=[finder])
    async def timelines(project_id: ProjectPath) -> list[Timeline]:
        return await manager.timelines(project_id)

    @app.delete(_PROJECT + "/timelines/{timeline_id}", dependencies=[admin], status_code=204)
    async def delete_timeline(project_id: ProjectPath, timeline_id: TimelinePath) -> None:
        """A branch, with its endpoints. Refused while other branches were made from it."""
        await manager.delete_timeline(project_id, timeline_id)

    @app.post(_PROJECT + "/endpoints", dependencies=[admin])
    async def create_endpoint(project_id: ProjectPath, body: CreateEndpoint) -> CreatedEndpoint:
        return await manager.create_endpoint(
            project_id,
            body.timeline_id,
            body.name,
            read_only_at=body.read_only_at,
            follows=body.follows,
            suspend_after_s=body.suspend_after_s,
            size=body.size,
        )

    @app.get(_PROJECT + "/endpoints", dependencies=[finder])
    async def project_endpoints(project_id: ProjectPath) -> list[Endpoint]:
        return await manager.endpoints(project_id)

    @app.get("/v1/endpoints")
    async def endpoints(caller: Principal = lister) -> list[Endpoint]:
        found = await manager.endpoints()
        workspaces = await verifier.workspaces_of(caller, {each.project_id for each in found})
        return [each for each in found if caller.may_touch(each.project_id, workspaces.get(each.project_id))]

    # The verbs before the plain path, which would match `{endpoint_id}:start` as an id.
    @app.post(_ENDPOINT + ":start", dependencies=[starter])
    async def start(endpoint_id: EndpointPath) -> Endpoint:
        return await manager.start(endpoint_id)

    @app.post(_ENDPOINT + ":stop", dependencies=[stopper])
    async def stop(endpoint_id: EndpointPath) -> Endpoint:
        return await manager.stop(endpoint_id, graceful=True)

    @app.post(_ENDPOINT + ":kill", dependencies=[stopper])
    async def kill(endpoint_id: EndpointPath) -> Endpoint:
        return await manager.stop(endpoint_id, graceful=False)

    @app.post(_ENDPOINT + ":connect", dependencies=[connector])
    async def connect(endpoint_id: EndpointPath) -> ConnectTarget:
        return await manager.connect(endpoint_id)

    @app.post(_ENDPOINT + ":log-in", dependencies=[connector])
    async def log_in(endpoint_id: EndpointPath, body: LogIn) -> Admission:
        """As `:connect`, for a client who has not proved anything yet: an endpoint that does not run is not started if
        it is known by which verifier the proxy can ask for the password first."""
        return await manager.log_in(endpoint_id, bytes.fromhex(body.user_hex))

    @app.post(_ENDPOINT + ":first-query", dependencies=[connector], status_code=204)
    async def first_query(endpoint_id: EndpointPath, body: FirstQuery) -> None:
        """The proxy's word for the last stages of a start. Once per compute; later ones change nothing."""
        await manager.first_query(endpoint_id, body)

    @app.patch(_ENDPOINT, dependencies=[stopper])
    async def change(endpoint_id: EndpointPath, body: ChangeEndpoint) -> Endpoint:
        return await manager.change_endpoint(endpoint_id, body)

    @app.delete(_ENDPOINT, dependencies=[stopper], status_code=204)
    async def delete_endpoint(endpoint_id: EndpointPath) -> None:
        """Its compute is stopped first. What was written to its timeline stays."""
        await manager.delete_endpoint(endpoint_id)

    @app.get(_ENDPOINT, dependencies=[visible])
    async def endpoint(endpoint_id: EndpointPath) -> Endpoint:
        return await manager.endpoint(endpoint_id)

    @app.post("/v1/safekeepers:replace", dependencies=[Depends(authorize(Scope.COMPUTE_ADMIN))])
    async def replace_safekeeper(body: ReplaceSafekeeper) -> list[ReplacedTimeline]:
        """The empty disk that this safekeeper has now takes the place of the one that it has lost."""
        return await manager.replace_safekeeper(body.node_id)

    @app.get("/v1/status", dependencies=[viewer])
    async def status() -> ManagerStatus:
        return await manager.status()

    return app


class _EndpointMetrics(Collector):
    """Computed when scraped."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def collect(self) -> Iterable[GaugeMetricFamily]:
        runs = GaugeMetricFamily("keylake_compute_runs", "Computes per state", labels=["state"])
        states = self._manager.states()
        for state in EndpointState:
            if state is not EndpointState.STOPPED:
                runs.add_metric([state.value], states.count(state))
        return [runs]
