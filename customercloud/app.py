"""The HTTP application: SDK endpoints at `/`, administration at `/_keylake/`, health and metrics."""

from __future__ import annotations

import contextlib
import datetime as dt
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest

from customercloud.admin import ADMIN_PREFIX, admin_guard, faults_router
from customercloud.aws.admin import aws_router
from customercloud.aws.event_bridge import EventBridge
from customercloud.aws.identity import SessionTokens
from customercloud.aws.service import AwsEndpoint, Peer
from customercloud.aws.sigv4 import HttpRequest
from customercloud.aws.state import SEAL_PURPOSE, AwsState
from customercloud.aws.trail import Trail
from customercloud.azure import routes as azure_routes
from customercloud.azure import service as azure_service
from customercloud.azure import state as azure_state
from customercloud.azure.admin import azure_router
from customercloud.azure.audit import REQUIRED_MEMBERS as AZURE_RECORD_MEMBERS
from customercloud.config import CustomerCloudSettings
from customercloud.durable import (
    HOST_KEY_SIZE_BYTES,
    DirectoryLock,
    SealedFile,
    load_or_create_secret,
    write_atomically,
)
from customercloud.faults import FaultInjector
from customercloud.google.admin import google_router
from customercloud.google.entries import Entries
from customercloud.google.rest import RestRequest, RestSide
from customercloud.google.service import GoogleEndpoint
from customercloud.google.state import SEAL_PURPOSE as GOOGLE_SEAL_PURPOSE
from customercloud.google.state import GoogleState
from customercloud.google.tokens import AccessTokens
from shared.clock import Clock, SystemClock
from shared.errors import InvalidInputError, KeylakeError
from shared.service import error_response

MAX_BODY_SIZE_BYTES: Final = 1024 * 1024
AZURE_TENANT_PATH: Final = "/{tenant:uuid}/{rest:path}"
"""Entra ID: discovery documents and the token endpoint of a tenant."""


@dataclass(frozen=True, slots=True)
class AwsParts:
    state: AwsState
    trail: Trail
    events: EventBridge
    endpoint: AwsEndpoint


def open_aws(directory: Path, region: str, host_key: bytes, faults: FaultInjector, clock: Clock) -> AwsParts:
    """Raises IntegrityError or CorruptedError when what lies in `directory` is not ours or not whole."""
    directory.mkdir(mode=0o700, exist_ok=True)
    state = AwsState(SealedFile(directory / "state.sealed", host_key, SEAL_PURPOSE), region)
    trail = Trail(directory / "cloudtrail.jsonl")
    events = EventBridge()
    endpoint = AwsEndpoint(state, SessionTokens(host_key), trail, events, faults, clock)
    return AwsParts(state, trail, events, endpoint)


@dataclass(frozen=True, slots=True)
class GoogleParts:
    state: GoogleState
    entries: Entries
    endpoint: GoogleEndpoint


def open_google(directory: Path, host_key: bytes, faults: FaultInjector, clock: Clock) -> GoogleParts:
    """Raises IntegrityError or CorruptedError when what lies in `directory` is not ours or not whole."""
    directory.mkdir(mode=0o700, exist_ok=True)
    state = GoogleState(SealedFile(directory / "state.sealed", host_key, GOOGLE_SEAL_PURPOSE))
    entries = Entries(directory / "auditlog.jsonl")
    return GoogleParts(state, entries, GoogleEndpoint(state, AccessTokens(host_key), entries, faults, clock))


@dataclass(frozen=True, slots=True)
class AzureParts:
    state: azure_state.AzureState
    trail: Trail
    endpoint: azure_service.AzureEndpoint


def open_azure(directory: Path, host_key: bytes, faults: FaultInjector, clock: Clock) -> AzureParts:
    """Raises IntegrityError or CorruptedError when what lies in `directory` is not ours or not whole."""
    directory.mkdir(mode=0o700, exist_ok=True)
    state = azure_state.AzureState(SealedFile(directory / "state.sealed", host_key, azure_state.SEAL_PURPOSE))
    trail = Trail(directory / "auditevent.jsonl", AZURE_RECORD_MEMBERS)
    return AzureParts(state, trail, azure_service.AzureEndpoint(state, trail, faults, clock))


def admin_token(settings: CustomerCloudSettings) -> str:
    """From the settings, or from `admin.token` in the state directory, made at the first start."""
    if settings.admin_token is not None:
        return settings.admin_token.get_secret_value()
    path = settings.state_dir / "admin.token"
    if not path.exists():
        write_atomically(path, secrets.token_urlsafe(32).encode())
    return path.read_text(encoding="ascii").strip()


def create_app(settings: CustomerCloudSettings, clock: Clock | None = None) -> FastAPI:
    """Opens the state directory, which one process owns at a time.

    Raises ConflictError when another one does; IntegrityError or CorruptedError when the state cannot be trusted.
    """
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = DirectoryLock(settings.state_dir)
    host_key = load_or_create_secret(settings.state_dir / "host.key", HOST_KEY_SIZE_BYTES)
    faults = FaultInjector()
    clock = clock or SystemClock()
    aws = open_aws(settings.state_dir / "aws", settings.region, host_key, faults, clock)
    google = open_google(settings.state_dir / "google", host_key, faults, clock)
    azure = open_azure(settings.state_dir / "azure", host_key, faults, clock)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await aws.events.close()
        await aws.trail.close()
        await google.entries.close()
        await azure.trail.close()
        lock.release()

    app = FastAPI(title="Keylake customer cloud", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    registry = CollectorRegistry()
    answers = Counter("customercloud_answers_total", "Answers to SDK calls", ["provider", "status"], registry=registry)
    admin = APIRouter(prefix=ADMIN_PREFIX, dependencies=[Depends(admin_guard(admin_token(settings)))])
    admin.include_router(faults_router(faults))
    admin.include_router(aws_router(aws.state, aws.trail, aws.events, aws.endpoint, clock))
    admin.include_router(
        google_router(
            google.state,
            google.entries,
            google.endpoint,
            clock,
            lambda: dt.timedelta(seconds=faults.faults.trail_delay_s),
        )
    )
    admin.include_router(azure_router(azure.state, azure.trail, azure.endpoint, faults, clock))
    app.include_router(admin)
    app.state.google = google.endpoint
    app.state.google_answers = lambda status: answers.labels("google", status).inc()

    @app.exception_handler(KeylakeError)
    async def refused(_: Request, error: KeylakeError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return error_response(InvalidInputError(problems))

    @app.get("/healthz")
    @app.get("/readyz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/")
    async def aws_call(request: Request) -> Response:
        body = await _limited_body(request)
        answer = await aws.endpoint.handle(_received(request, body), _peer(request))
        answers.labels("aws", answer.status).inc()
        return Response(answer.body, answer.status, answer.headers)

    rest = RestSide(google.endpoint)

    @app.api_route("/v1/{path:path}", methods=["GET", "POST", "PATCH", "PUT", "DELETE"], include_in_schema=False)
    @app.post("/token", include_in_schema=False)
    async def google_call(request: Request) -> Response:
        answer = await rest.handle(
            RestRequest(
                method=request.method,
                path=request.url.path,
                query=request.url.query,
                headers={name.lower(): value for name, value in request.headers.items()},
                body=await _limited_body(request),
                address=request.client.host if request.client else "unknown",
                disconnected=_disconnected(request),
            )
        )
        answers.labels("google", answer.status).inc()
        return Response(answer.body, answer.status, answer.headers)

    async def azure_call(request: Request) -> Response:
        body = await _body_up_to(request, azure_service.MAX_BODY_SIZE_BYTES)
        answer = await azure.endpoint.handle(_received(request, body), _peer(request))
        answers.labels("azure", answer.status).inc()
        return Response(answer.body, answer.status, answer.headers)

    methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    collections = (*azure_routes.COLLECTIONS, *azure_routes.ABSENT_COLLECTIONS)
    paths = [path for name in collections for path in (f"/{name}", f"/{name}/{{rest:path}}")]
    for path in (*paths, AZURE_TENANT_PATH):
        app.add_api_route(path, azure_call, methods=methods, include_in_schema=False)
    return app


async def _limited_body(request: Request) -> bytes:
    """Raises InvalidInputError for a body that is too large, before it is read whole."""
    body = await _body_up_to(request, MAX_BODY_SIZE_BYTES)
    if len(body) > MAX_BODY_SIZE_BYTES:
        raise InvalidInputError(f"a request has at most {MAX_BODY_SIZE_BYTES} bytes")
    return body


async def _body_up_to(request: Request, size_bytes: int) -> bytes:
    """The whole body, or its beginning of more than `size_bytes` when it is larger: the rest is not read."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > size_bytes:
            break
    return bytes(body)


def _received(request: Request, body: bytes) -> HttpRequest:
    return HttpRequest(
        method=request.method,
        path=request.url.path,
        query=request.url.query,
        headers=[(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in request.headers.raw],
        body=body,
    )


def _peer(request: Request) -> Peer:
    return Peer(
        address=request.client.host if request.client else "unknown",
        secure_transport=request.url.scheme == "https",
        disconnected=_disconnected(request),
    )


def _disconnected(request: Request) -> Callable[[], Awaitable[None]]:
    """After the body, the next message of the connection is that it is gone."""

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return wait
