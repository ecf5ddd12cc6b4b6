"""HTTP API of a safekeeper: shared.api.safekeeper, translated to calls of the node and its timelines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from fastapi import Depends, FastAPI, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from safekeeper.node import SafekeeperNode
from safekeeper.timeline import Timeline
from shared.api.safekeeper import (
    CreateTimeline,
    Elected,
    EndOfWal,
    InspectWal,
    SafekeeperStatus,
    StopStream,
    StreamFrom,
    TimelineStatus,
    VoteRequest,
    VoteResponse,
    WalContent,
    WalScrubReport,
)
from shared.auth import Scope, Service, TokenVerifier
from shared.authorize import Authorizer
from shared.errors import InvalidInputError
from shared.ids import ProjectId, TimelineId
from shared.key_upkeep_app import add_key_routes
from shared.service import Readiness, create_service_app

_TIMELINES = "/v1/projects/{project_id}/timelines"
_TIMELINE = _TIMELINES + "/{timeline_id}"


async def parse_ids(project_id: str, timeline_id: str) -> tuple[ProjectId, TimelineId]:
    """Raises InvalidInputError."""
    try:
        return ProjectId.parse(project_id), TimelineId.parse(timeline_id)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None


Ids = Annotated[tuple[ProjectId, TimelineId], Depends(parse_ids)]


async def find_timeline(ids: Ids, request: Request) -> Timeline:
    """Not a plain function: FastAPI would run it in a thread. Raises NotFoundError, IntegrityError."""
    node: SafekeeperNode = request.app.state.node
    return node.timeline(*ids)


Found = Annotated[Timeline, Depends(find_timeline)]


def create_app(
    node: SafekeeperNode, verifier: TokenVerifier, readiness: Readiness, registry: CollectorRegistry
) -> FastAPI:
    app = create_service_app(Service.SAFEKEEPER, registry, readiness, verifier)
    app.state.node = node
    registry.register(_TimelineMetrics(node))
    authorize = Authorizer(verifier)
    elector = [Depends(authorize(Scope.WAL_ELECT))]
    admin = [Depends(authorize(Scope.STORAGE_ADMIN))]
    reader = [Depends(authorize(Scope.STATUS_READ))]

    # The verbs before the plain path, which would match `{timeline_id}:vote` as an id.
    @app.post(_TIMELINE + ":vote", dependencies=elector)
    async def vote(timeline: Found, request: VoteRequest) -> VoteResponse:
        return await timeline.vote(request)

    @app.post(_TIMELINE + ":elected", dependencies=elector)
    async def elected(timeline: Found, request: Elected) -> TimelineStatus:
        return await timeline.elected(request)

    @app.post(_TIMELINE + ":end-of-wal", dependencies=elector)
    async def end_of_wal(timeline: Found) -> EndOfWal:
        return await timeline.end_of_wal()

    @app.post(_TIMELINE + ":stream", dependencies=elector)
    async def stream(timeline: Found, request: StreamFrom) -> TimelineStatus:
        return await timeline.stream_from(request)

    @app.post(_TIMELINE + ":stop-stream", dependencies=elector)
    async def stop_stream(timeline: Found, request: StopStream) -> TimelineStatus:
        return await timeline.stop_stream(request)

    @app.post(_TIMELINE + ":inspect", dependencies=[Depends(authorize(Scope.STORAGE_INSPECT))])
    async def inspect(timeline: Found, request: InspectWal) -> WalContent:
        """Which records a sealed piece has, of this node's disk or of the object store; no data leaves."""
        return await timeline.describe(request)

    @app.post(_TIMELINE + ":scrub", dependencies=reader)
    async def scrub(timeline: Found) -> WalScrubReport:
        """Read and verify all offloaded WAL of the timeline, whoever put it, and hold it against this safekeeper's log.
        One run at a time."""
        return await timeline.scrub()

    @app.post(_TIMELINE, dependencies=admin)
    async def create(ids: Ids, request: CreateTimeline) -> TimelineStatus:
        return (await node.create(*ids, request)).status()

    @app.delete(_TIMELINE, dependencies=admin, status_code=204)
    async def delete(ids: Ids, offloaded: bool = False) -> Response:
        """What this safekeeper has of it. With `offloaded`, which is refused while it has any, instead what all of them
        have put into the object store: when the timeline is deleted on each, and not before."""
        await (node.delete_offloaded if offloaded else node.delete)(*ids)
        return Response(status_code=204)

    @app.get(_TIMELINE, dependencies=reader)
    async def timeline_status(timeline: Found) -> TimelineStatus:
        return timeline.status()

    add_key_routes(app, node.node_id, authorize, node.key_upkeep, node.project_keys)

    @app.get("/v1/status", dependencies=reader)
    async def status() -> SafekeeperStatus:
        return node.status()

    return app


class _TimelineMetrics(Collector):
    """Computed when scraped, so that a commit costs no bookkeeping."""

    def __init__(self, node: SafekeeperNode) -> None:
        self._node = node

    def collect(self) -> Iterable[GaugeMetricFamily]:
        labels = ["project_id", "timeline_id"]
        term = GaugeMetricFamily("keylake_safekeeper_term", "Highest term promised", labels=labels)
        flush = GaugeMetricFamily("keylake_safekeeper_flush_lsn_bytes", "End of the durable log", labels=labels)
        commit = GaugeMetricFamily("keylake_safekeeper_commit_lsn_bytes", "Known to be held by a quorum", labels=labels)
        streaming = GaugeMetricFamily("keylake_safekeeper_streaming", "1 while WAL comes from a compute", labels=labels)
        subscriptions = GaugeMetricFamily("keylake_safekeeper_subscriptions", "Clients of the WAL port", labels=labels)
        fault = GaugeMetricFamily("keylake_safekeeper_fault", "1 while the timeline is not served", labels=labels)
        held_back = GaugeMetricFamily(
            "keylake_safekeeper_held_back_bytes", "Durable, not acknowledged: the pageserver lags", labels=labels
        )
        for timeline in self._node.timelines():
            names = [str(timeline.project_id), str(timeline.timeline_id)]
            status = timeline.status()
            term.add_metric(names, status.term)
            flush.add_metric(names, status.flush_lsn.value)
            commit.add_metric(names, status.commit_lsn.value)
            streaming.add_metric(names, status.streaming)
            subscriptions.add_metric(names, timeline.subscriptions)
            fault.add_metric(names, bool(timeline.fault))
            held_back.add_metric(names, status.held_back_size_bytes)
        return [term, flush, commit, streaming, subscriptions, fault, held_back]
