"""What an attacker, or a test, says to pageserver and safekeepers: all the bytes of a timeline, and whose are wrong."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from keylake.cluster import Cluster, RunningProject
from shared.api.compute import Timeline
from shared.api.pageserver import TimelineInfo
from shared.api.safekeeper import SafekeeperStatus, TimelineStatus
from shared.auth import Scope, Service, TokenIssuer
from shared.config import Address
from shared.errors import UnavailableError
from shared.framed_tcp import FramedConnection, connect
from shared.http import ServiceClient
from shared.ids import ProjectId, TimelineId
from shared.tls import client_context
from shared.wire import pagestream, walstream
from shared.wire.frames import ERROR, ErrorFrame
from tests.fixtures.waiting import wait_until


@dataclass(frozen=True, slots=True)
class Place:
    """One timeline of a cluster."""

    cluster: Cluster
    project_id: ProjectId
    timeline_id: TimelineId

    @classmethod
    def of(cls, cluster: Cluster, timeline: Timeline) -> Place:
        return cls(cluster, timeline.project_id, timeline.timeline_id)

    @property
    def api_path(self) -> str:
        return f"/v1/projects/{self.project_id}/timelines/{self.timeline_id}"

    # --- what it is said to be ---

    async def pageserver_info(self) -> TimelineInfo | None:
        """None while the pageserver does not serve it."""
        status = await self.cluster.client.pageserver_status()
        return next((t for t in status.timelines if t.timeline_id == self.timeline_id), None)

    async def safekeeper_status(self, index: int) -> tuple[SafekeeperStatus, TimelineStatus | None]:
        """Of safekeeper `index`, counted from 0."""
        status = await self.cluster.client.safekeeper_status(index)
        return status, next((t for t in status.timelines if t.timeline_id == self.timeline_id), None)

    async def caught_up(self) -> TimelineInfo:
        """Returns when all safekeepers hold the same, and the pageserver has ingested it."""

        async def look() -> TimelineInfo | None:
            found = [await self.safekeeper_status(index) for index in range(len(self.cluster.ports.safekeepers))]
            ends = {None if timeline is None else timeline.flush_lsn for _, timeline in found}
            info = await self.pageserver_info()
            return info if info is not None and ends == {info.last_record_lsn} else None

        info = await wait_until(look, 60)
        assert isinstance(info, TimelineInfo)
        return info

    async def checkpoint(self) -> TimelineInfo:
        """Everything that was ingested is in the object store when this returns."""
        async with service_client(self.cluster, Service.PAGESERVER, self.cluster.ports.pageserver) as client:
            return await client.call(TimelineInfo, "POST", f"{self.api_path}:checkpoint", timeout_s=60)

    # --- what it is ---

    @asynccontextmanager
    async def pages(self) -> AsyncIterator[FramedConnection]:
        """A connection to the page port, opened for this timeline."""
        token = _issuer(self.cluster, "compute").issue(
            Service.PAGESERVER, [Scope.STORAGE_READ], project_id=self.project_id
        )
        connection = await connect(
            Service.PAGESERVER,
            Address(port=self.cluster.ports.pages),
            client_context(self.cluster.layout.ca_certificate),
            token,
            pagestream.MAX_FRAME_SIZE_BYTES,
        )
        try:
            await connection.send(pagestream.Open(self.project_id, self.timeline_id).pack())
            yield connection
        finally:
            await connection.close()

    async def everything(self, lsn: int) -> str:
        """Digest of a basebackup at `lsn`: every page of every relation, and all state besides. Raises what the
        pageserver says.

        The same LSN always gives the same bytes, so this compares every row, and more than the rows.
        """
        digest = hashlib.sha256()
        async with self.pages() as connection:
            await connection.send(pagestream.BasebackupRequest(1, lsn).pack())
            while frames := await connection.receive():
                for kind, payload in frames:
                    if kind == pagestream.CHUNK:
                        digest.update(pagestream.parse_request_id(payload)[1])
                    elif kind == ERROR:
                        raise ErrorFrame.parse(payload).exception()
                    elif kind == pagestream.BASEBACKUP_END:
                        return digest.hexdigest()
        raise UnavailableError("the basebackup ended early")

    async def wal(self, index: int, start: int, end: int) -> bytes:
        """The bytes [start, end) of safekeeper `index`'s log. Raises what the safekeeper says."""
        token = _issuer(self.cluster, "pageserver").issue(
            Service.SAFEKEEPER, [Scope.WAL_READ], project_id=self.project_id
        )
        connection = await connect(
            Service.SAFEKEEPER,
            Address(port=self.cluster.ports.safekeepers_wal[index]),
            client_context(self.cluster.layout.ca_certificate),
            token,
            walstream.MAX_FRAME_SIZE_BYTES,
        )
        parts: list[bytes] = []
        subscribe = walstream.Subscribe(self.project_id, self.timeline_id, start, end, walstream.SubscribeFlags.NONE)
        try:
            await connection.send(subscribe.pack())
            while frames := await connection.receive():
                for kind, payload in frames:
                    if kind == walstream.WAL:
                        lsn, data = walstream.parse_wal(payload)
                        assert lsn == start + sum(map(len, parts)), "WAL is contiguous"
                        parts.append(bytes(data))
                    elif kind == ERROR:
                        raise ErrorFrame.parse(payload).exception()
                    elif kind == walstream.END:
                        return b"".join(parts)
        finally:
            await connection.close()
        raise UnavailableError("the WAL ended early")


def _issuer(cluster: Cluster, kid: str) -> TokenIssuer:
    return TokenIssuer.load(cluster.layout.keys / f"{kid}.json")


def service_client(cluster: Cluster, service: Service, port: int, kid: str = "compute") -> ServiceClient:
    """As another service (`kid`), with all that its key may claim."""
    issuer = _issuer(cluster, kid)
    return ServiceClient(service, Address(port=port), cluster.layout.ca_certificate, issuer, issuer.scopes)


@asynccontextmanager
async def without_keys(cluster: Cluster, *project_ids: ProjectId) -> AsyncIterator[None]:
    """An operator's revocation: everybody has dropped everything of these projects inside, and has the keys again
    afterwards."""
    client = cluster.client

    async def sealed(project_id: ProjectId) -> bool:
        return all(each.sealed_after_s is not None for each in await client.revocations(project_id))

    for project_id in project_ids:
        await client.revoke(project_id, "a test wants everything to be read again")
        await wait_until(partial(sealed, project_id))
    yield
    for project_id in project_ids:
        await client.restore(project_id)


async def all_stream(place: Place) -> None:
    """Returns when every safekeeper receives the running compute's WAL."""

    async def look() -> bool:
        found = [await place.safekeeper_status(index) for index in range(len(place.cluster.ports.safekeepers))]
        return all(timeline is not None and timeline.streaming for _, timeline in found)

    await wait_until(look)


async def stop_and_settle(project: RunningProject, cluster: Cluster) -> TimelineInfo:
    """Stop the project's compute gracefully; returns when everybody has its last record."""
    place = Place.of(cluster, project.timeline)
    await all_stream(place)  # who is still on its way when the compute stops stays behind until the next one
    await cluster.client.stop_endpoint(project.endpoint.endpoint_id)
    return await place.caught_up()
