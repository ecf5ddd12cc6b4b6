"""The shell around every service: FastAPI app with uniform errors, tokens, health and metrics, served by uvicorn over
TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass, field
from typing import Any, Final, cast

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.dependencies.utils import get_parameterless_sub_dependant
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from shared.api.common import ArmFailpoints, ErrorBody, problem
from shared.auth import Scope, Service, TokenVerifier
from shared.authorize import Authorizer, OnRefusal, authenticate
from shared.config import Address
from shared.errors import InvalidInputError, KeyAccessError, KeylakeError, NotFoundError
from shared.failpoints import arm_instead, may_arm
from shared.receiver import ReceivingFor
from shared.telemetry import get_logger
from shared.tls import CertificateFiles
from shared.tracing import Kind, Span, TraceContext, span

MAX_BODY_SIZE_BYTES: Final = 8 * 1024 * 1024
KEEP_ALIVE_S: Final = 30
"""An idle connection is closed after this long. Longer than our clients keep one (httpx: 5 s): if both gave up at the
same time, a request could be sent into a connection that is just being closed."""
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LOOKS: Final = frozenset({"GET", "HEAD"})
_log = get_logger(__name__)
disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series of each, and nobody asks for it

Lifespan = Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]


@dataclass(slots=True)
class Readiness:
    """Why this service cannot work yet (name → reason); ready when empty."""

    missing: dict[str, str] = field(default_factory=dict)
    standby: bool = False
    """It is well, and another one does the work."""

    @property
    def status(self) -> str:
        if not self.missing:
            return "ready"
        return "standby" if self.standby else "waiting"


def error_response(error: KeylakeError) -> JSONResponse:
    key = error if isinstance(error, KeyAccessError) else None
    body = ErrorBody(
        code=error.code,
        message=str(error),
        retryable=error.retryable,
        workspace_id=None if key is None else key.workspace_id,
        hint=None if key is None else key.hint,
    )
    headers = {"WWW-Authenticate": "Bearer"} if error.http_status == 401 else None
    content = body.model_dump(mode="json", exclude_none=True)
    return JSONResponse(content, status_code=error.http_status, headers=headers)


class _JsonRequest(Request):
    """Its body is JSON as RFC 8259 has it: UTF-8, no NaN, and no half of a surrogate pair, which could be no text in
    any database or protocol that it is passed on to. Python's own parser takes all of these."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError:
            raise json.JSONDecodeError("this is not JSON", "", 0) from None


def _body_has_types(model: TypeAdapter[Any]) -> Callable[[Request], Awaitable[None]]:
    """JSON has types, and the OpenAPI names them. Pydantic keeps to them if asked; FastAPI has it look at Python's
    values instead, and there "5" and true are numbers. A dependency, which raises RequestValidationError."""

    async def check(request: Request) -> None:
        try:
            model.validate_json(await request.body(), strict=True)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in found]) from None

    return check


def _token_first(verifier: TokenVerifier) -> type[APIRoute]:
    """FastAPI reads and parses the body before it asks any dependency. These routes look at the token before that, so
    that a stranger can neither make a service work nor learn what a body should have been."""

    class TokenFirst(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            if self.body_field is not None:
                # The last one: who may not do it does not learn what a body should have been, either.
                check = _body_has_types(TypeAdapter(cast("Any", self.body_field.field_info.annotation)))
                self.dependant.dependencies.append(
                    get_parameterless_sub_dependant(depends=Depends(check), path=self.path_format)
                )
            handle = super().get_route_handler()

            async def checked(request: Request) -> Response:
                await authenticate(request, verifier)
                return await handle(_JsonRequest(request.scope, request.receive))

            return checked

    return TokenFirst


def create_service_app(
    service: Service,
    registry: CollectorRegistry,
    readiness: Readiness,
    verifier: TokenVerifier,
    lifespan: Lifespan | None = None,
    *,
    on_refusal: OnRefusal | None = None,
    max_body_size_bytes: int = MAX_BODY_SIZE_BYTES,
) -> FastAPI:
    """A FastAPI app with /healthz (alive), /readyz (may work), /metrics and the error format of `shared.errors`.

    The first two tell a stranger nothing but up or down, and /openapi.json what this repository says, too; everything
    else needs a token: metrics have projects' ids in them. Bodies larger than `max_body_size_bytes` are refused while
    they are read. `on_refusal` is told of tokens that may not have metrics.
    """
    app = FastAPI(
        title=f"Keylake {service.value}",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    app.add_middleware(_BodyLimit, max_body_size_bytes=max_body_size_bytes)
    app.add_middleware(_Observed, registry=registry)

    @app.exception_handler(KeylakeError)
    async def known(request: Request, error: KeylakeError) -> Response:
        if error.http_status >= 500 and not error.retryable:
            _log.error("request failed", path=request.url.path, code=error.code, message=str(error))
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        # Names the fields, never their values: a value may be a secret.
        fields = "; ".join(problem(each) for each in error.errors()[:5])
        return error_response(InvalidInputError(f"malformed request: {fields}"))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        # The framework's own: no such route, no such method, a body that is no text.
        kind = NotFoundError if error.status_code == 404 else InvalidInputError
        body = ErrorBody(code=kind.code, message=str(error.detail), retryable=False)
        return JSONResponse(body.model_dump(), status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        # This handler stands outside of all middleware, so the trace is over.
        request_id = request.scope.get("state", {}).get("request_id", "")
        _log.error("unexpected error", path=request.url.path, request_id=request_id, exc_info=error)
        return error_response(KeylakeError(f"internal error; the service's log has the details: request {request_id}"))

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> Response:
        return JSONResponse({"status": readiness.status}, status_code=503 if readiness.missing else 200)

    # From here on: whoever comes with a token.
    app.router.route_class = _token_first(verifier)
    authorize = Authorizer(verifier, on_refusal)
    status_reader = Depends(authorize(Scope.STATUS_READ))

    @app.get("/metrics", dependencies=[status_reader], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus, which can be given a token."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    if may_arm():

        @app.post("/v1/failpoints", dependencies=[Depends(authorize(Scope.STORAGE_ADMIN))], status_code=204)
        async def arm_failpoints(body: ArmFailpoints) -> None:
            arm_instead(body.order)

    return app


class _Observed:
    """ASGI middleware: a trace, a log line and a duration for each request. What is asked again and again (GET) and
    goes well is a line only at the level debug."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._seconds = Histogram(
            "keylake_http_request_duration_seconds",
            "Time from the first byte of a request to the last of its answer",
            ["method", "route", "status"],
            registry=registry,
            buckets=(0.005, 0.025, 0.1, 0.5, 2.5, 10, 60),
        )

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        header = next((value for name, value in scope["headers"] if name == b"traceparent"), b"")
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer_id = (b"x-request-id", observed.context.trace_id.encode())
                message = {**message, "headers": [*message.get("headers", ()), answer_id]}
            await send(message)

        method = scope["method"] if scope["method"] in _METHODS else "other"
        parent = TraceContext.parse(header.decode("latin-1"))
        # Nobody wants a trace of each look at a status.
        with span(method, Kind.SERVER, parent, sampled=method not in _LOOKS) as observed:
            scope.setdefault("state", {})["request_id"] = observed.context.trace_id
            started = time.monotonic()
            try:
                await self._app(scope, receive, noted)
            finally:
                self._note(observed, scope, method, status, time.monotonic() - started)

    def _note(self, observed: Span, scope: AsgiScope, method: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")  # the template: what stands in its place is no label
        self._seconds.labels(method, route, str(status)).observe(seconds)
        observed.name = f"{method} {route}"
        observed.attributes |= {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
        }
        observed.failed = status >= 500
        log = _log.debug if method in _LOOKS and status < 400 else _log.info
        log("request", method=method, route=route, status=status, seconds=round(seconds, 4))


class _BodyLimit:
    """ASGI middleware: counts what is really read, whatever Content-Length says."""

    def __init__(self, app: ASGIApp, max_body_size_bytes: int) -> None:
        self._app = app
        self._max = max_body_size_bytes

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max:
                raise HTTPException(413, f"a request body has at most {self._max} bytes")
            return message

        await self._app(scope, limited, send)


class _Http(ReceivingFor):
    """uvicorn calls these two with what it would give its own protocols."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(H11Protocol(**parts))


class _WebSocket(ReceivingFor):
    def __init__(self, **parts: Any) -> None:
        super().__init__(WebSocketsSansIOProtocol(**parts))


class HttpServer:
    """uvicorn inside our own event loop: `async with` starts it and stops it gracefully."""

    def __init__(self, app: ASGIApp, listen: Address, files: CertificateFiles | None) -> None:
        config = uvicorn.Config(
            app,
            host=listen.host,
            port=listen.port,
            ssl_certfile=None if files is None else str(files.certificate),
            ssl_keyfile=None if files is None else str(files.private_key),
            log_config=None,
            access_log=False,
            server_header=False,
            http=cast("type[asyncio.Protocol]", _Http),
            ws=cast("type[asyncio.Protocol]", _WebSocket),
            ws_max_size=1024 * 1024,
            ws_ping_interval=None,  # lease renewals are the heartbeat
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=64 * 1024,
            lifespan="on",
        )
        if files is not None:
            config.load()
            assert config.ssl is not None  # noqa: S101 - given certificate files, uvicorn makes one
            config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
        self._server = QuietServer(config)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> HttpServer:
        self._task = asyncio.create_task(self._server.serve())
        started = asyncio.create_task(self._server.has_started.wait())
        await asyncio.wait({self._task, started}, return_when=asyncio.FIRST_COMPLETED)
        if not self._server.has_started.is_set():
            started.cancel()
            await self._task  # raises why it could not start
            raise OSError("the HTTP server did not start: is the port taken?")
        return self

    @property
    def port(self) -> int:
        """The port that it really listens on (useful when 0 was asked for)."""
        return int(self._server.servers[0].sockets[0].getsockname()[1])

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.should_exit = True
        if self._task is not None:
            await self._task


class QuietServer(uvicorn.Server):
    """Leaves signals to us and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.has_started = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self.has_started.set()
