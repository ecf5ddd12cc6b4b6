"""The console's own HTTP: the page, a stream of what a hat sees, and its buttons.

It listens on loopback in plain HTTP, like any development server, and defends itself as one must: a random key, which
the page has from the URL's fragment (so it is in no log and no Referer) and sends as a header (so no other site's form
or image can act); only our own names as Host (DNS rebinding); a Content-Security-Policy without inline code.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field

from keylake.cluster import Customer
from keylake.console import actions, sql
from keylake.console.hats import Hat, Wardrobe
from keylake.console.setup import make_project
from keylake.console.snapshot import Viewer
from keylake.console.stored import StoredFiles
from keylake.place import Place
from keylake.receipt_page import headline
from shared.auth import SignatureVerifier, TrustBundle
from shared.errors import InvalidInputError, KeylakeError, UnauthenticatedError
from shared.ids import ProjectId
from shared.receipt import MAX_RECEIPT_SIZE_BYTES, SignedReceipt
from shared.service import error_response

POLL_S: Final = 1.0
CLOUD_POLL_S: Final = 5.0
"""Every look at the customer's keys is a record in the customer's own log."""
KEY_HEADER: Final = "X-Keylake-Console"
STATIC: Final = Path(__file__).with_name("static")
_MAX_BODY_SIZE_BYTES: Final = 64 * 1024
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Word(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)
    word: str = Field(min_length=3, max_length=200, repr=False)


def create_app(place: Place, wardrobe: Wardrobe, customer: Customer, key: str, port: int) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    files = StoredFiles(place.stored())
    hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}
    acted = _Pulse()

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            _check(request, hosts, key)
            answer = await call_next(request)
        except KeylakeError as error:
            answer = error_response(error)
        answer.headers.update(_HEADERS)
        return answer

    @app.exception_handler(KeylakeError)
    async def refused(request: Request, error: KeylakeError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(InvalidInputError("the request is malformed"))  # without its content: it may hold data

    @app.get("/")
    async def index() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/api/stream")
    async def stream(hat: Hat, request: Request) -> StreamingResponse:
        viewer = Viewer(place, wardrobe, customer, hat)

        async def events() -> AsyncIterator[bytes]:
            async with contextlib.aclosing(viewer):
                while not await request.is_disconnected():
                    pulse = acted.next()
                    yield b"data: " + json.dumps(await _look(viewer)).encode() + b"\n\n"
                    await asyncio.wait({pulse}, timeout=CLOUD_POLL_S if hat is Hat.CUSTOMER else POLL_S)

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post("/api/act", status_code=204)
    async def act(request: actions.Request) -> None:
        try:
            if request.hat is Hat.CUSTOMER:
                await actions.act_in_cloud(customer, request)
            elif request.hat is Hat.OPERATOR:
                await actions.act_on_network(place, request)
            else:
                await actions.act_in_keylake(place, await wardrobe.client(request.hat), request)
        finally:
            acted.beat()

    @app.post("/api/setup", status_code=204)
    async def set_up() -> None:
        try:
            await make_project(place, wardrobe, customer)
        finally:
            acted.beat()

    @app.post("/api/sql")
    async def run_sql(statement: sql.Statement) -> dict[str, Any]:
        return await sql.run(place, await wardrobe.client(statement.hat), statement)

    @app.get("/api/files")
    async def listing() -> list[dict[str, Any]]:
        return await asyncio.to_thread(files.listing)

    @app.get("/api/file")
    async def window(
        name: Annotated[str, Query(max_length=1000)], offset: Annotated[int, Query(ge=0, lt=1 << 50)] = 0
    ) -> dict[str, Any]:
        return await asyncio.to_thread(files.window, name, offset)

    @app.post("/api/find")
    async def find(wanted: Word) -> dict[str, Any]:
        return await files.find(wanted.word)

    @app.get("/api/receipt")
    async def receipt(
        hat: Hat,
        project_id: Annotated[str, Query(max_length=40)],
        kind: Annotated[str, Query(max_length=20)] = "revocation",
        revocation_id: Annotated[str | None, Query(max_length=40)] = None,
    ) -> Response:
        try:
            project = ProjectId.parse(project_id)
        except ValueError as error:
            raise InvalidInputError(str(error)) from None
        content = await (await wardrobe.client(hat)).receipt(project, revocation_id, kind=kind)
        return Response(content, media_type="application/json")

    @app.post("/api/verify")
    async def verify(request: Request) -> dict[str, Any]:
        """Is a receipt genuine, to the last byte? No service is asked."""
        content = await request.body()
        return await asyncio.to_thread(_verified, content, place.trust_bundle)

    app.mount("/static", StaticFiles(directory=STATIC))
    return app


def _check(request: Request, hosts: set[str], key: str) -> None:
    """Raises UnauthenticatedError, InvalidInputError."""
    if request.headers.get("host", "").lower() not in hosts:
        raise UnauthenticatedError("this console answers to its own address only")
    length = request.headers.get("content-length", "0")
    most = MAX_RECEIPT_SIZE_BYTES if request.url.path == "/api/verify" else _MAX_BODY_SIZE_BYTES
    if request.method == "POST" and not (length.isdigit() and int(length) <= most):
        raise InvalidInputError("the request is too large, or does not say how large it is")
    if request.url.path.startswith("/api/"):
        given = request.headers.get(KEY_HEADER, "")
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise UnauthenticatedError("open the console with the address that `keylake console` has printed")


def _verified(content: bytes, trust_bundle: Path) -> dict[str, Any]:
    """Raises MalformedReceiptError, IntegrityError."""
    signed = SignedReceipt.parse(content)
    signed.check(SignatureVerifier(TrustBundle.load(trust_bundle)))
    receipt = signed.receipt
    return {
        "headline": f"{receipt.kind}: {headline(receipt)}",
        "signed_by": receipt.kid,
        "issued_at": receipt.issued_at.isoformat(),
        "verified": receipt.verified,
        "not_verified": receipt.not_verified,
    }


async def _look(viewer: Viewer) -> dict[str, Any]:
    try:
        return await viewer.look()
    except KeylakeError as error:
        return {"error": str(error), "code": error.code}


class _Pulse:
    """Wakes every stream when somebody has pressed a button."""

    def __init__(self) -> None:
        self._next: asyncio.Future[None] | None = None

    def next(self) -> asyncio.Future[None]:
        if self._next is None or self._next.done():
            self._next = asyncio.get_running_loop().create_future()
        return self._next

    def beat(self) -> None:
        if self._next is not None and not self._next.done():
            self._next.set_result(None)
