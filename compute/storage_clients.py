"""What the manager asks of safekeepers and the pageserver over their HTTP APIs, one method per route."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from pydantic import BaseModel, ConfigDict

from shared.api import pageserver, safekeeper
from shared.api.safekeeper import Elected, EndOfWal, StopStream, StreamFrom, TimelineStatus, VoteRequest, VoteResponse
from shared.auth import Scope, Service, TokenIssuer
from shared.config import Address, Identity
from shared.errors import NotFoundError
from shared.http import ServiceClient
from shared.ids import ProjectId, TimelineId
from shared.lsn import Lsn

SAFEKEEPER_SCOPES: Final = frozenset({Scope.WAL_ELECT, Scope.STORAGE_ADMIN, Scope.STATUS_READ})
PAGESERVER_SCOPES: Final = frozenset({Scope.STORAGE_ADMIN, Scope.STATUS_READ})
BRANCH_TIMEOUT_S: Final = 120.0
ELECT_TIMEOUT_S: Final = 300.0
"""Electing copies missing WAL from the donor before it answers."""


class SafekeeperAddress(BaseModel):
    """A member of the quorum. `node_id` is also the application_name by which Postgres knows its standby."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    node_id: str
    http: Address
    wal: Address


def timeline_path(project_id: ProjectId, timeline_id: TimelineId, verb: str = "") -> str:
    return f"/v1/projects/{project_id}/timelines/{timeline_id}{verb}"


class SafekeeperClient:
    """One safekeeper."""

    def __init__(self, address: SafekeeperAddress, identity: Identity, issuer: TokenIssuer, timeout_s: float) -> None:
        self.address: Final = address
        self._http = ServiceClient(
            Service.SAFEKEEPER,
            address.http,
            identity.ca_certificate,
            issuer,
            SAFEKEEPER_SCOPES & issuer.scopes,
            timeout_s=timeout_s,
        )

    @property
    def node_id(self) -> str:
        return self.address.node_id

    async def aclose(self) -> None:
        await self._http.aclose()

    async def create_timeline(
        self, project_id: ProjectId, timeline_id: TimelineId, body: safekeeper.CreateTimeline
    ) -> TimelineStatus:
        path = timeline_path(project_id, timeline_id)
        return await self._http.call(TimelineStatus, "POST", path, body=body, project_id=project_id)

    async def delete_timeline(self, project_id: ProjectId, timeline_id: TimelineId) -> None:
        """Its own copy. Does nothing when there is none."""
        await self._http.request("DELETE", timeline_path(project_id, timeline_id), project_id=project_id)

    async def delete_offloaded(self, project_id: ProjectId, timeline_id: TimelineId) -> None:
        """What any safekeeper has put into the object store; after all of them have deleted their copies."""
        path = timeline_path(project_id, timeline_id)
        await self._http.request("DELETE", path, params={"offloaded": True}, project_id=project_id)

    async def status(self, project_id: ProjectId, timeline_id: TimelineId) -> TimelineStatus | None:
        """None when it does not know the timeline."""
        path = timeline_path(project_id, timeline_id)
        try:
            return await self._http.call(TimelineStatus, "GET", path, project_id=project_id)
        except NotFoundError:
            return None

    async def vote(self, project_id: ProjectId, timeline_id: TimelineId, body: VoteRequest) -> VoteResponse:
        path = timeline_path(project_id, timeline_id, ":vote")
        return await self._http.call(VoteResponse, "POST", path, body=body, project_id=project_id)

    async def end_of_wal(self, project_id: ProjectId, timeline_id: TimelineId) -> EndOfWal:
        path = timeline_path(project_id, timeline_id, ":end-of-wal")
        return await self._http.call(EndOfWal, "POST", path, project_id=project_id)

    async def elect(self, project_id: ProjectId, timeline_id: TimelineId, body: Elected) -> TimelineStatus:
        path = timeline_path(project_id, timeline_id, ":elected")
        return await self._http.call(
            TimelineStatus, "POST", path, body=body, project_id=project_id, timeout_s=ELECT_TIMEOUT_S
        )

    async def stream(self, project_id: ProjectId, timeline_id: TimelineId, body: StreamFrom) -> None:
        # A SecretStr prints as asterisks, also into JSON; this body is the one place where the password has to be.
        wire = _StreamFromWire(**body.model_dump(exclude={"password"}), password=body.password.get_secret_value())
        path = timeline_path(project_id, timeline_id, ":stream")
        await self._http.request("POST", path, body=wire, project_id=project_id)

    async def stop_stream(self, project_id: ProjectId, timeline_id: TimelineId, body: StopStream) -> None:
        path = timeline_path(project_id, timeline_id, ":stop-stream")
        await self._http.request("POST", path, body=body, project_id=project_id)


class _StreamFromWire(BaseModel):
    """`StreamFrom` with the password written out."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    term: int
    start_lsn: Lsn
    compute: safekeeper.ComputeAddress
    user: str
    password: str


class PageserverClient:
    def __init__(self, address: Address, identity: Identity, issuer: TokenIssuer, timeout_s: float) -> None:
        self._http = ServiceClient(
            Service.PAGESERVER,
            address,
            identity.ca_certificate,
            issuer,
            PAGESERVER_SCOPES & issuer.scopes,
            timeout_s=timeout_s,
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def create_timeline(
        self, project_id: ProjectId, timeline_id: TimelineId, ancestor: pageserver.AncestorInfo | None = None
    ) -> pageserver.TimelineInfo:
        """Without an ancestor it runs an initdb there: a few seconds. With one it may have to flush that first."""
        path = timeline_path(project_id, timeline_id)
        body = pageserver.CreateTimeline(ancestor=ancestor)
        timeout_s = None if ancestor is None else BRANCH_TIMEOUT_S
        # A token is good for one project, or for all.
        about = project_id if ancestor is None or ancestor.project_id == project_id else None
        return await self._http.call(
            pageserver.TimelineInfo, "POST", path, body=body, project_id=about, timeout_s=timeout_s
        )

    async def timeline(self, project_id: ProjectId, timeline_id: TimelineId) -> pageserver.TimelineInfo:
        path = timeline_path(project_id, timeline_id)
        return await self._http.call(pageserver.TimelineInfo, "GET", path, project_id=project_id)

    async def lsn_by_timestamp(
        self, project_id: ProjectId, timeline_id: TimelineId, timestamp: datetime
    ) -> pageserver.LsnByTimestamp:
        path = timeline_path(project_id, timeline_id, ":lsn-by-timestamp")
        body = pageserver.FindLsn(timestamp=timestamp)
        return await self._http.call(pageserver.LsnByTimestamp, "POST", path, body=body, project_id=project_id)

    async def lease_lsn(self, project_id: ProjectId, timeline_id: TimelineId, lsn: Lsn) -> float:
        """Keep the version at `lsn` readable; for how long, in seconds. Raises InvalidInputError when it is not kept
        any more."""
        path = timeline_path(project_id, timeline_id, ":lease-lsn")
        body = pageserver.LeaseLsn(read_lsn=lsn)
        lease = await self._http.call(pageserver.LsnLease, "POST", path, body=body, project_id=project_id)
        return lease.ttl_s

    async def delete_timeline(self, project_id: ProjectId, timeline_id: TimelineId) -> None:
        """Does nothing when there is none. Raises ConflictError while it has branches."""
        path = timeline_path(project_id, timeline_id)
        await self._http.request("DELETE", path, project_id=project_id, timeout_s=BRANCH_TIMEOUT_S)
