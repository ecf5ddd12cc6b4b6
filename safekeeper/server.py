"""The whole of a safekeeper around a key source: disk threads, node, WAL port, HTTP API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from safekeeper.app import create_app
from safekeeper.config import SafekeeperSettings
from safekeeper.node import SafekeeperNode
from safekeeper.offload import OffloadTuning
from safekeeper.timeline import TimelineEnvironment
from safekeeper.wal_sender import WAL_SCOPE, serve
from safekeeper.wal_store import StoreTuning
from shared.api.safekeeper import Donor
from shared.auth import PeopleRegistry, Principal, Service, TokenIssuer, TokenVerifier, TrustBundle
from shared.framed_tcp import FramedConnection, FramedServer, connect
from shared.ids import ProjectId
from shared.key_upkeep import UpkeepTuning
from shared.lease import KeySource
from shared.service import HttpServer, Readiness
from shared.storage.config import open_store
from shared.telemetry import get_logger
from shared.tls import client_context, server_context
from shared.wire.walstream import MAX_FRAME_SIZE_BYTES

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RunningSafekeeper:
    node: SafekeeperNode
    http_port: int
    wal_port: int


@asynccontextmanager
async def running_safekeeper(
    settings: SafekeeperSettings,
    issuer: TokenIssuer,
    keys: KeySource,
    is_fenced: Callable[[], bool],
    people: PeopleRegistry | None = None,
) -> AsyncIterator[RunningSafekeeper]:
    """Serves while the context is open. Leaving refuses new work first, then stops streams, then closes logs."""
    verifier = TokenVerifier(TrustBundle.load(settings.identity.trust_bundle), Service.SAFEKEEPER, people)
    peer_context = client_context(settings.identity.ca_certificate)

    async def connect_to_peer(donor: Donor, project_id: ProjectId) -> FramedConnection:
        token = issuer.issue(Service.SAFEKEEPER, [WAL_SCOPE], project_id=project_id)
        return await connect(Service.SAFEKEEPER, donor.address, peer_context, token, MAX_FRAME_SIZE_BYTES)

    readiness = Readiness({"start": "opening timelines"})
    async with AsyncExitStack() as stack:
        executor = stack.enter_context(ThreadPoolExecutor(settings.io_threads, thread_name_prefix="disk"))
        objects = None
        if settings.object_store is not None:
            objects = await open_store(settings.object_store)
            stack.push_async_callback(objects.close)
        environment = TimelineEnvironment(
            settings.node_id,
            executor,
            connect_to_peer,
            settings.elected_timeout_s,
            StoreTuning(settings.tail_cache_size_bytes),
            key_upkeep=UpkeepTuning(interval_s=settings.key_upkeep_interval_s),
            backpressure_size_bytes=settings.backpressure_lag_mb << 20,
            objects=objects,
            offload=OffloadTuning(
                settings.offload_interval_s, settings.wal_keep_size_bytes, settings.wal_history_size_bytes
            ),
        )
        async with SafekeeperNode(settings.data_dir, environment, keys, is_fenced) as node:

            async def serve_wal(connection: FramedConnection, principal: Principal) -> None:
                await serve(connection, principal, node.log)

            wal_server = FramedServer(
                settings.wal_listen,
                server_context(settings.identity.files),
                verifier,
                WAL_SCOPE,
                MAX_FRAME_SIZE_BYTES,
                serve_wal,
            )
            app = create_app(node, verifier, readiness, CollectorRegistry())
            async with wal_server, HttpServer(app, settings.listen, settings.identity.files) as http:
                readiness.missing.clear()
                _log.info("safekeeper is up", http_port=http.port, wal_port=wal_server.port)
                yield RunningSafekeeper(node, http.port, wal_server.port)
                _log.info("safekeeper is going down", fenced=is_fenced())
