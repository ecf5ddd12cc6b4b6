"""Process entry of the proxy: `python -m compute.proxy --config FILE`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from prometheus_client import CollectorRegistry

from compute.proxy.app import create_app
from compute.proxy.config import ProxySettings
from compute.proxy.directory import Directory
from compute.proxy.greeting import FrontTls
from compute.proxy.projects import Projects
from compute.proxy.server import ProxyServer
from shared.api.keymanager import Role
from shared.auth import Scope, Service, TokenIssuer, TokenVerifier, TrustBundle
from shared.entry import run, wait_for_shutdown_signal
from shared.hardening import harden_process
from shared.http import ServiceClient
from shared.keyclient import KeyClient
from shared.keysession import session_tokens
from shared.open_files import allow_open_files
from shared.service import HttpServer, Readiness
from shared.settings import settings_from_arguments
from shared.telemetry import configure_logging, get_logger
from shared.tls import CertificateFiles
from shared.tracing import configure_tracing

_log = get_logger(__name__)


@asynccontextmanager
async def running_proxy(settings: ProxySettings) -> AsyncIterator[tuple[ProxyServer, KeyClient, Readiness]]:
    """The whole proxy in this event loop."""
    identity = settings.identity
    issuer = TokenIssuer.load(identity.signing_key)
    registry = CollectorRegistry()
    async with AsyncExitStack() as stack:
        keys = await stack.enter_async_context(
            KeyClient(
                settings.keymanager,
                identity.ca_certificate,
                session_tokens(issuer),
                role=Role.PROXY,
                node_id=settings.node_id,
            )
        )
        manager = await stack.enter_async_context(
            ServiceClient(
                Service.COMPUTE,
                settings.compute,
                identity.ca_certificate,
                issuer,
                frozenset({Scope.COMPUTE_CONNECT}),
                timeout_s=settings.wake_timeout_s,
            )
        )
        server = await stack.enter_async_context(
            ProxyServer(
                settings,
                FrontTls(CertificateFiles(settings.certificate, settings.private_key)),
                Projects(keys, linger_s=settings.lease_linger_s, drain_timeout_s=settings.drain_timeout_s),
                Directory(manager, settings.wake_timeout_s),
                registry,
            )
        )
        verifier = TokenVerifier(TrustBundle.load(identity.trust_bundle), Service.PROXY, keys)
        readiness = Readiness()
        app = create_app(server, settings.node_id, verifier, registry, readiness)
        http = await stack.enter_async_context(HttpServer(app, settings.listen, identity.files))
        _log.info("proxy is up", postgres_port=server.port, http_port=http.port)
        yield server, keys, readiness


async def serve_until_shutdown(settings: ProxySettings) -> None:
    """Returns at SIGTERM or SIGINT, once sessions are over or have had their time (not after a second signal), or when
    a newer instance of this node has taken over."""
    async with running_proxy(settings) as (server, keys, readiness):
        ends = {asyncio.create_task(wait_for_shutdown_signal()), asyncio.create_task(keys.wait_replaced())}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not keys.replaced:
            readiness.missing["shutdown"] = "the proxy drains"
            ends |= {
                asyncio.create_task(server.drain(settings.shutdown_grace_s)),
                asyncio.create_task(wait_for_shutdown_signal()),
            }
            await asyncio.wait({each for each in ends if not each.done()}, return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()
        _log.info("proxy is going down", fenced=keys.replaced)


def within_open_files(settings: ProxySettings) -> ProxySettings:
    """With fewer `max_connections`, if this machine does not let us have as many: then the clients that are too many
    are told so, instead of finding that there is no descriptor left for the way to their compute."""
    missing = settings.open_files - allow_open_files(settings.open_files)
    if missing <= 0:
        return settings
    fewer = max(1, settings.max_connections - (missing + 1) // 2)
    _log.warning("too few file descriptors (ulimit -Hn) for max_connections", missing=missing, max_connections=fewer)
    return settings.model_copy(update={"max_connections": fewer})


def main() -> None:
    settings = settings_from_arguments(ProxySettings, "compute.proxy", "Keylake proxy: where Postgres clients connect")
    configure_logging("proxy", settings.node_id, settings.log_level)
    configure_tracing("proxy", settings.node_id, settings.otlp_endpoint)
    _log.info("process hardened", **harden_process())
    settings = within_open_files(settings)
    run(lambda: serve_until_shutdown(settings))


if __name__ == "__main__":
    main()
