"""Process entry: `python -m pageserver --config FILE`."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

from prometheus_client import CollectorRegistry

from pageserver.app import create_app
from pageserver.attached import Environment
from pageserver.config import PageserverSettings
from pageserver.ingest_memory import IngestMemory
from pageserver.layer_cache import LayerCache
from pageserver.page_service import PAGES_SCOPE, PageService
from pageserver.redo.build import RedoBinaries, prepare
from pageserver.retention import Retention
from pageserver.tenants import Tenants
from pageserver.timeline import TimelineConfig
from pageserver.walreceiver import Peer
from shared.api.keymanager import Role
from shared.auth import Service, TokenIssuer, TokenVerifier, TrustBundle
from shared.entry import run, wait_for_shutdown_signal
from shared.failpoints import arm, refuse_failpoints
from shared.framed_tcp import FramedServer
from shared.hardening import harden_process
from shared.key_upkeep import UpkeepTuning
from shared.keyclient import KeyClient
from shared.keysession import session_tokens
from shared.sandbox import sandboxes_dir
from shared.service import HttpServer, Readiness
from shared.settings import settings_from_arguments
from shared.storage.config import open_store
from shared.storage.threads import BlockingPool
from shared.telemetry import configure_logging, get_logger
from shared.tls import client_context, server_context
from shared.tracing import configure_tracing
from shared.wire.pagestream import MAX_FRAME_SIZE_BYTES

_log = get_logger(__name__)
_POOL_THREADS = 8
_STALL_FACTOR = 5
"""Ingest waits for compaction when it is so many merges behind."""


async def serve_until_shutdown(settings: PageserverSettings) -> None:
    """Returns at SIGTERM or SIGINT, or when a newer instance of this node has taken over."""
    binaries = await prepare(settings.redo_cache_dir)
    settings.cache_dir.mkdir(parents=True, exist_ok=True)
    with sandboxes_dir(settings.cache_dir / "sandboxes") as sandboxes:
        await _serve(settings, replace(binaries, sandboxes=sandboxes))


async def _serve(settings: PageserverSettings, binaries: RedoBinaries) -> None:
    identity = settings.identity
    issuer = TokenIssuer.load(identity.signing_key)
    readiness = Readiness({"start": "attaching timelines"})
    registry = CollectorRegistry()
    store = await open_store(settings.object_store)
    pool = BlockingPool(_POOL_THREADS, "pageserver")
    try:
        files = await LayerCache.open(store, settings.cache_dir, settings.cache_size_mb << 20, pool)
        async with KeyClient(
            settings.keymanager,
            identity.ca_certificate,
            session_tokens(issuer),
            role=Role.PAGESERVER,
            node_id=settings.node_id,
        ) as keys:
            verifier = TokenVerifier(TrustBundle.load(identity.trust_bundle), Service.PAGESERVER, keys)
            environment = Environment(
                store,
                files,
                keys,
                pool,
                binaries,
                TimelineConfig(
                    checkpoint_distance_bytes=settings.checkpoint_distance_mb << 20,
                    compaction_l0_layers=settings.compaction_l0_layers,
                    ingest_l0_layers=_STALL_FACTOR * settings.compaction_l0_layers,
                    compaction_target_bytes=settings.compaction_target_mb << 20,
                    retention=Retention(settings.retention_lsn_mb << 20, settings.retention_age_s),
                    gc_interval_s=settings.gc_interval_s,
                    lsn_lease_s=settings.lsn_lease_s,
                ),
                [Peer(peer.node_id, peer.wal) for peer in settings.safekeepers],
                issuer,
                client_context(identity.ca_certificate),
                UpkeepTuning(interval_s=settings.key_upkeep_interval_s),
                memory=IngestMemory(settings.ingest_memory_mb << 20),
            )
            async with Tenants(environment) as tenants:
                pages = PageService(tenants.loaded, registry, settings.wait_lsn_timeout_s)
                page_server = FramedServer(
                    settings.pages_listen,
                    server_context(identity.files),
                    verifier,
                    PAGES_SCOPE,
                    MAX_FRAME_SIZE_BYTES,
                    pages.serve,
                )
                app = create_app(settings.node_id, tenants, pages, verifier, readiness, registry)
                async with (
                    page_server,
                    HttpServer(app, settings.listen, identity.files) as http,
                    asyncio.TaskGroup() as group,
                ):
                    evictions = group.create_task(files.run())
                    readiness.missing.clear()
                    _log.info("pageserver is up", http_port=http.port, pages_port=page_server.port)
                    ends = {
                        asyncio.create_task(wait_for_shutdown_signal()),
                        asyncio.create_task(keys.wait_replaced()),
                        asyncio.create_task(keys.tend_deletions(tenants.delete_project)),
                    }
                    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                    for task in ends:
                        task.cancel()
                    evictions.cancel()
                    _log.info("pageserver is going down", fenced=keys.replaced)
    finally:
        await store.close()
        await pool.close()


def main() -> None:
    settings = settings_from_arguments(
        PageserverSettings, "pageserver", "Keylake pageserver: sealed layers, GetPage@LSN"
    )
    arm(os.environ)
    refuse_failpoints(settings.listen.host)
    configure_logging("pageserver", settings.node_id, settings.log_level)
    configure_tracing("pageserver", settings.node_id, settings.otlp_endpoint)
    hardening = harden_process()
    _log.info("process hardened", **hardening)
    run(lambda: serve_until_shutdown(settings))


if __name__ == "__main__":
    main()
