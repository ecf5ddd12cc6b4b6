"""HTTP API of the pageserver: shared.api.pageserver, translated to calls of the tenants."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from fastapi import Depends, FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pageserver.page_service import PageService
from pageserver.point_in_time import lsn_by_timestamp
from pageserver.retention import Retention
from pageserver.tenants import Tenants
from shared.api.pageserver import (
    Compact,
    CreateTimeline,
    FindLsn,
    Garbage,
    InspectObject,
    LeaseLsn,
    LsnByTimestamp,
    LsnLease,
    ObjectContent,
    PageserverStatus,
    RetentionWindow,
    ScrubReport,
    Strays,
    TimelineInfo,
)
from shared.auth import Principal, Scope, Service, TokenVerifier
from shared.authorize import Authorizer
from shared.errors import InvalidInputError
from shared.ids import ProjectId, TimelineId
from shared.key_upkeep_app import add_key_routes
from shared.lsn import Lsn
from shared.service import Readiness, create_service_app

_LOAD_WAIT_S = 5.0
_TIMELINE = "/v1/projects/{project_id}/timelines/{timeline_id}"


def parse_ids(project_id: str, timeline_id: str) -> tuple[ProjectId, TimelineId]:
    """Raises InvalidInputError."""
    try:
        return ProjectId.parse(project_id), TimelineId.parse(timeline_id)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None


Ids = Annotated[tuple[ProjectId, TimelineId], Depends(parse_ids)]


def create_app(
    node_id: str,
    tenants: Tenants,
    pages: PageService,
    verifier: TokenVerifier,
    readiness: Readiness,
    registry: CollectorRegistry,
) -> FastAPI:
    app = create_service_app(Service.PAGESERVER, registry, readiness, verifier)
    registry.register(_TimelineMetrics(tenants))
    authorize = Authorizer(verifier)
    may_admin = Depends(authorize(Scope.STORAGE_ADMIN))
    admin = [may_admin]
    historian = [Depends(authorize(Scope.STORAGE_HISTORY, Scope.STORAGE_ADMIN))]
    reader = [Depends(authorize(Scope.STATUS_READ, Scope.STORAGE_HISTORY, Scope.STORAGE_ADMIN))]

    # The verb before the plain path, which would match `{timeline_id}:checkpoint` as an id.
    @app.post(_TIMELINE + ":checkpoint", dependencies=historian)
    async def checkpoint(ids: Ids) -> TimelineInfo:
        """Seal and upload everything ingested so far."""
        attached = tenants.attached(*ids)
        await attached.timeline.checkpoint()
        return attached.info()

    @app.post(_TIMELINE + ":lsn-by-timestamp", dependencies=historian)
    async def get_lsn_by_timestamp(ids: Ids, body: FindLsn) -> LsnByTimestamp:
        """Where the timeline stood at a time. Everything that is ingested counts; nothing is waited for."""
        found = await lsn_by_timestamp(tenants.timeline(*ids), body.timestamp)
        return LsnByTimestamp(kind=found.kind, lsn=Lsn(found.lsn))

    @app.post(_TIMELINE + ":compact", dependencies=historian)
    async def compact(ids: Ids, body: Compact) -> TimelineInfo:
        """Merge layers and make images; returns when it is done. Goes on by itself in any case."""
        attached = tenants.attached(*ids)
        await attached.timeline.compactor.compact(force=body.force)
        return attached.info()

    @app.post(_TIMELINE + ":gc", dependencies=historian)
    async def collect_garbage(ids: Ids) -> Garbage:
        """Remove what nobody can read any more. Goes on by itself in any case."""
        done = await tenants.timeline(*ids).history.collect()
        return Garbage(oldest_lsn=Lsn(done.cutoff_lsn), layers=done.layers, size_bytes=done.size_bytes)

    @app.post(_TIMELINE + ":retention", dependencies=historian)
    async def set_retention(ids: Ids, body: RetentionWindow) -> TimelineInfo:
        """How much history is kept from now on. What is gone stays gone."""
        attached = tenants.attached(*ids)
        await attached.timeline.history.set_retention(Retention(body.lsn_bytes, body.age_s))
        return attached.info()

    @app.post(_TIMELINE + ":scrub", dependencies=reader)
    async def scrub(ids: Ids) -> ScrubReport:
        """Read and verify everything in the object store. Takes as long as reading all of it; one run at a time."""
        timeline = tenants.timeline(*ids)
        lease = timeline.lease
        lease.check()
        return await timeline.scrubber.run(lease.kek_version, lease.dek_floor)

    @app.post(_TIMELINE + ":inspect", dependencies=[Depends(authorize(Scope.STORAGE_INSPECT))])
    async def inspect(ids: Ids, body: InspectObject) -> ObjectContent:
        """What is in a sealed object of the object store: counts, keys and positions; no value leaves."""
        timeline = tenants.timeline(*ids)
        content = await timeline.inspector.describe(body.object_name, body.sha256)
        timeline.lease.check()
        return ObjectContent(object_name=body.object_name, content=content)

    @app.post(_TIMELINE + ":lease-lsn", dependencies=historian)
    async def lease_lsn(ids: Ids, body: LeaseLsn) -> LsnLease:
        """Keep one version readable, however far the retention window moves on. Leases end with the process: whoever
        holds one asks again, and nothing is removed after a start before there was time to."""
        timeline = await tenants.loaded(*ids, _LOAD_WAIT_S)  # who starts just after us asks at once
        ttl_s = timeline.lease_lsn(body.read_lsn.value, body.ttl_s)
        return LsnLease(read_lsn=body.read_lsn, ttl_s=ttl_s)

    @app.post(_TIMELINE)
    async def create_timeline(ids: Ids, body: CreateTimeline, caller: Principal = may_admin) -> TimelineInfo:
        """Idempotent; takes as long as an initdb, or as a flush of the ancestor."""
        if body.ancestor is not None:
            # A branch shows what its ancestor holds, and that may be another project's.
            caller.require(Scope.STORAGE_ADMIN, body.ancestor.project_id)
        return await tenants.create(*ids, body.ancestor)

    @app.delete(_TIMELINE, dependencies=admin, status_code=204)
    async def delete_timeline(ids: Ids) -> None:
        """Idempotent. Refused while the timeline has branches."""
        await tenants.delete(*ids)

    @app.get(_TIMELINE, dependencies=reader)
    async def get_timeline(ids: Ids) -> TimelineInfo:
        return tenants.attached(*ids).info()

    @app.post("/v1/projects/{project_id}:scrub", dependencies=reader)
    async def scrub_project(project_id: str) -> Strays:
        """What the object store holds, by its names, of timelines that are not here."""
        try:
            return await tenants.strays(ProjectId.parse(project_id))
        except ValueError as error:
            raise InvalidInputError(str(error)) from None

    add_key_routes(app, node_id, authorize, tenants.upkeep, tenants.project_keys)

    @app.get("/v1/status", dependencies=[Depends(authorize(Scope.STATUS_READ))])
    async def status() -> PageserverStatus:
        return PageserverStatus(
            node_id=node_id,
            timelines=tenants.infos(),
            redo_workers=tenants.redo_workers,
            pages_served=pages.pages_served,
            fault=tenants.fault,
        )

    return app


class _TimelineMetrics(Collector):
    """Read when scraped: positions and sizes per timeline."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    def collect(self) -> Iterable[GaugeMetricFamily]:
        families = {
            name: GaugeMetricFamily(f"keylake_pageserver_{name}", text, labels=["project_id", "timeline_id"])
            for name, text in (
                ("last_record_lsn_bytes", "End of the last record ingested"),
                ("remote_consistent_lsn_bytes", "Everything below is durable in the object store"),
                ("oldest_lsn_bytes", "The GC cutoff: every version from here on can be read"),
                ("layers", "Layer files"),
                ("l0_layers", "Layer files that are flushed and not compacted yet"),
                ("layer_size_bytes", "Sealed size of all layers"),
                ("in_memory_size_bytes", "Plaintext values in memory"),
            )
        }
        for info in self._tenants.infos():
            labels = [str(info.project_id), str(info.timeline_id)]
            families["last_record_lsn_bytes"].add_metric(labels, info.last_record_lsn.value)
            families["remote_consistent_lsn_bytes"].add_metric(labels, info.remote_consistent_lsn.value)
            families["oldest_lsn_bytes"].add_metric(labels, info.oldest_lsn.value)
            families["l0_layers"].add_metric(labels, info.l0_layers)
            families["layers"].add_metric(labels, info.layers)
            families["layer_size_bytes"].add_metric(labels, info.layer_size_bytes)
            families["in_memory_size_bytes"].add_metric(labels, info.in_memory_size_bytes)
        return families.values()
