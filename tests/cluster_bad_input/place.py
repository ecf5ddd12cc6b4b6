"""The cluster under attack: one project whose compute runs, and one that nobody uses, whose every position stands
still."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from keylake.cluster import Cluster, RunningProject
from keylake.layout import SAFEKEEPERS
from shared.auth import PersonRole, Scope, Service, TokenIssuer
from shared.config import Address
from shared.http import ServiceClient
from shared.ids import ProjectId
from tests.cluster.primary import caught_up, connect, safekeeper_timelines
from tests.fixtures.forked_cluster import ForkedCluster
from tests.fixtures.waiting import wait_until

CANARY = f"canary-{secrets.token_hex(8)}"
"""Part of everything that is sent as a secret. It may stand in no answer and no log."""

SETTINGS: dict[str, dict[str, Any]] = {
    # A tunnel, so that a compute has a port, too.
    "compute": {"tunnel_listen_host": "127.0.0.1", "poll_interval_s": 0.2},
    # A lease that is given back half a minute after its last session would be a change of state.
    "proxy": {"lease_linger_s": 3600, "startup_timeout_s": 5.0},
    # A client that asks for the future waits so long.
    "pageserver": {"wait_lsn_timeout_s": 1.0},
}


@dataclass(frozen=True, slots=True)
class Place:
    cluster: Cluster
    busy: RunningProject
    idle: RunningProject
    issuers: Mapping[str, TokenIssuer]
    """Every signing key that is trusted, by its id."""

    @property
    def ca_certificate(self) -> Path:
        return self.cluster.layout.ca_certificate

    def config(self, name: str) -> dict[str, Any]:
        """A service's settings."""
        values: dict[str, Any] = json.loads((self.cluster.layout.config / f"{name}.json").read_text())
        return values

    def address(self, name: str, setting: str = "listen") -> Address:
        return Address.model_validate(self.config(name)[setting])

    def token(self, audience: Service, scope: Scope, project_id: ProjectId | None = None) -> str:
        """A good one, by a key that may claim `scope`."""
        issuer = next(each for each in self.issuers.values() if scope in each.scopes)
        return issuer.issue(audience, [scope], project_id=project_id)

    async def checkpoint(self, project: RunningProject) -> None:
        """The pageserver puts what it has ingested into the object store now, not at some time later."""
        scopes = frozenset({Scope.STORAGE_ADMIN})
        address, issuer = self.address("pageserver"), self.issuers["compute"]
        async with ServiceClient(Service.PAGESERVER, address, self.ca_certificate, issuer, scopes) as client:
            path = f"/v1/projects/{project.project.project_id}/timelines/{project.timeline.timeline_id}:checkpoint"
            await client.request("POST", path)

    async def idle_is_committed(self) -> bool:
        """Every safekeeper knows that a quorum has all of the idle project's log: no position will move any more."""
        timelines = (await safekeeper_timelines(self.cluster, self.idle)).values()
        return (
            len(timelines) == SAFEKEEPERS and len({lsn for t in timelines for lsn in (t.commit_lsn, t.flush_lsn)}) == 1
        )

    async def busy_has_answered(self) -> bool:
        """The last stage of its start is known, which the proxy tells of in its own time."""
        endpoint = await self.cluster.client.endpoint(self.busy.endpoint.endpoint_id)
        return any(stage.stage == "first_query" for stage in endpoint.stages)

    async def connect(self) -> asyncpg.Connection[asyncpg.Record]:
        return await connect(self.busy)


@asynccontextmanager
async def place_under_attack() -> AsyncIterator[Place]:
    async with ForkedCluster(settings=SETTINGS) as cluster:
        idle = await cluster.create_project("idle")
        busy = await cluster.create_project("busy", idle.project.workspace_id)
        keys = {path.stem: path for path in cluster.layout.keys.glob("*.json") if path.stem != "trust"}
        place = Place(cluster, busy, idle, {name: TokenIssuer.load(path) for name, path in sorted(keys.items())})
        # A log and pages of its own, and then nothing any more.
        connection = await connect(idle)
        await connection.execute("create table t as select 'idle' as body")
        await connection.close()
        await cluster.client.stop_endpoint(idle.endpoint.endpoint_id)
        await caught_up(cluster, idle)
        await place.checkpoint(idle)
        await wait_until(place.idle_is_committed)
        connection = await place.connect()
        await connection.execute("create table work (n bigint primary key)")
        await connection.fetchval("select 1")  # a compute's first row is a change of state, too
        await connection.close()
        await wait_until(place.busy_has_answered)
        await cluster.client.create_token(PersonRole.AUDITOR, subject="auditor", ttl_s=3600)
        yield place
