"""The proxy's own HTTP API: health, metrics and a status page's numbers."""

from __future__ import annotations

from fastapi import Depends, FastAPI
from prometheus_client import CollectorRegistry

from compute.proxy.server import ProxyServer
from shared.api.common import ApiModel
from shared.auth import Scope, Service, TokenVerifier
from shared.authorize import Authorizer
from shared.service import Readiness, create_service_app


class ProxyStatus(ApiModel):
    node_id: str
    sessions: int
    handshakes: int


def create_app(
    server: ProxyServer, node_id: str, verifier: TokenVerifier, registry: CollectorRegistry, readiness: Readiness
) -> FastAPI:
    app = create_service_app(Service.PROXY, registry, readiness, verifier)
    reader = Depends(Authorizer(verifier)(Scope.STATUS_READ))

    @app.get("/v1/status", dependencies=[reader])
    async def status() -> ProxyStatus:
        return ProxyStatus(node_id=node_id, sessions=server.sessions, handshakes=server.handshakes)

    return app
