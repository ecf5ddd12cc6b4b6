"""Process entry of the compute manager: `python -m compute --config FILE`."""

from __future__ import annotations

import asyncio
import os
import shutil
from contextlib import AsyncExitStack
from pathlib import Path

from prometheus_client import CollectorRegistry

from compute.app import create_app
from compute.config import ManagerSettings
from compute.election import Elections
from compute.guard.build import prepare_guard
from compute.launcher import Launcher
from compute.manager import Manager
from compute.repository import Repository
from compute.run import RunServices
from compute.storage_clients import PageserverClient, SafekeeperClient
from shared.api.keymanager import Role
from shared.auth import Service, TokenIssuer, TokenVerifier, TrustBundle
from shared.entry import run, wait_for_shutdown_signal
from shared.failpoints import arm, refuse_failpoints
from shared.hardening import harden_process
from shared.keyclient import KeyClient
from shared.keysession import session_tokens
from shared.sandbox import sandboxes_dir
from shared.service import HttpServer, Readiness
from shared.settings import settings_from_arguments
from shared.telemetry import configure_logging, get_logger
from shared.tracing import configure_tracing

_log = get_logger(__name__)


def prepare_directories(settings: ManagerSettings) -> None:
    """Sockets and sealed logs of an earlier life are of no use: their computes died with their manager."""
    settings.blocks.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for directory in (settings.runtime_dir, settings.log_dir):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        for leftover in Path(directory).glob("in-*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


async def serve_until_shutdown(settings: ManagerSettings) -> None:
    """Returns at SIGTERM or SIGINT, or when a newer instance of this node has taken over."""
    identity = settings.identity
    issuer = TokenIssuer.load(identity.signing_key)
    prepare_directories(settings)
    guard = await prepare_guard(settings.guard_cache_dir)
    async with AsyncExitStack() as stack:
        volumes = stack.enter_context(sandboxes_dir(settings.log_dir / "volumes"))
        repository = await stack.enter_async_context(
            Repository(settings.database_url.get_secret_value(), settings.database_schema)
        )
        keys = await stack.enter_async_context(
            KeyClient(
                settings.keymanager,
                identity.ca_certificate,
                session_tokens(issuer),
                role=Role.MANAGER,
                node_id=settings.node_id,
            )
        )
        verifier = TokenVerifier(TrustBundle.load(identity.trust_bundle), Service.COMPUTE, keys)
        safekeepers = [
            SafekeeperClient(address, identity, issuer, settings.request_timeout_s) for address in settings.safekeepers
        ]
        pageserver = PageserverClient(settings.pageserver, identity, issuer, settings.request_timeout_s)
        stack.push_async_callback(pageserver.aclose)
        for client in safekeepers:
            stack.push_async_callback(client.aclose)
        launcher = await stack.enter_async_context(
            Launcher(
                volume_size_bytes=settings.volume_size_mb << 20,
                spares=settings.spare_agents,
                volume=settings.volume,
                blocks=settings.blocks,
                parent_dir=volumes,
            )
        )
        elections = Elections(safekeepers, settings.vote_timeout_s)
        services = RunServices(settings, repository, safekeepers, elections, launcher, issuer, pageserver, guard)
        manager = await stack.enter_async_context(Manager(services, pageserver, keys, settings.node_id))
        app = create_app(manager, repository, verifier, CollectorRegistry(), Readiness())
        http = await stack.enter_async_context(HttpServer(app, settings.listen, identity.files))
        _log.info("compute manager is up", http_port=http.port)
        ends = {
            asyncio.create_task(wait_for_shutdown_signal()),
            asyncio.create_task(keys.wait_replaced()),
            asyncio.create_task(keys.tend_deletions(manager.delete_project)),
        }
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()
        _log.info("compute manager is going down", fenced=keys.replaced)


def main() -> None:
    arm(os.environ)
    settings = settings_from_arguments(ManagerSettings, "compute", "Keylake compute manager: timelines and endpoints")
    refuse_failpoints(settings.listen.host)
    configure_logging("compute", settings.node_id, settings.log_level)
    configure_tracing("compute", settings.node_id, settings.otlp_endpoint)
    _log.info("process hardened", **harden_process())
    run(lambda: serve_until_shutdown(settings))


if __name__ == "__main__":
    main()
