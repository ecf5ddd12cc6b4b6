"""What stands before the API of every keymanager: who may be answered at all, and that nothing leaves too late.

While another keymanager leads, every request is answered with NotLeaderError, which says who (to those with a good
token), and /readyz with 503 `standby`. While this one leads, its term's API answers; and before an answer leaves, the
term is looked at once more. An answer that would be too late becomes an UnavailableError: what was asked may or may not
have been done. (Sessions look at every message themselves: `session.py`.)

It also bounds how much is under way at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fastapi import FastAPI, Request, Response, WebSocket
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keymanager.leadership import Term
from shared.auth import PersonToken, Service, TokenVerifier, TrustBundle
from shared.errors import KeylakeError, NotLeaderError, OverloadedError, UnauthenticatedError, UnavailableError
from shared.ids import ProjectId, WorkspaceId
from shared.service import Readiness, create_service_app, error_response

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


@dataclass(frozen=True, slots=True)
class Serving:
    """The API of a term."""

    term: Term
    app: ASGIApp


class Front:
    """An ASGI application. `serving` is set while this process leads and is ready."""

    def __init__(self, standby: ASGIApp, max_requests: int, max_sessions: int) -> None:
        self.serving: Serving | None = None
        self._standby = standby
        self._left = {"http": max_requests, "websocket": max_sessions}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind, serving = scope["type"], self.serving
        if serving is not None and not serving.term.valid:
            serving = None
        if kind not in self._left:  # the server's own start and stop
            await self._standby(scope, receive, send)
            return
        if scope["path"] == "/healthz":  # that we live is no claim of a leader's
            await (self._standby if serving is None else serving.app)(scope, receive, send)
            return
        if not self._left[kind]:
            await _refuse(scope, receive, send, OverloadedError("too much is under way here: come back later"))
            return
        self._left[kind] -= 1
        try:
            if serving is None:
                await self._standby(scope, receive, send)
            elif kind == "http":
                await _Guarded(serving.term, scope, receive, send).run(serving.app)
            else:
                await serving.app(scope, receive, send)
        finally:
            self._left[kind] += 1


async def _refuse(scope: Scope, receive: Receive, send: Send, error: KeylakeError) -> None:
    response = error_response(error)
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(response)
    else:
        await response(scope, receive, send)


class _Guarded:
    """One request of a term."""

    def __init__(self, term: Term, scope: Scope, receive: Receive, send: Send) -> None:
        self._term = term
        self._scope, self._receive, self._send = scope, receive, send
        self._start: Message | None = None
        self._refused = False

    async def run(self, app: ASGIApp) -> None:
        await app(self._scope, self._receive, self._checked)

    async def _checked(self, message: Message) -> None:
        """The head is kept until there is a body to go with it: an answer leaves as a whole, or not."""
        if self._refused:
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        if not self._term.valid:
            self._refused = True
            if self._start is None:
                raise UnavailableError("this keymanager does not lead any more")  # in the middle of a body
            error = UnavailableError("this keymanager does not lead any more; what was asked may have been done")
            await _refuse(self._scope, self._receive, self._send, error)
            return
        start, self._start = self._start, None
        if start is not None:
            await self._send(start)
        await self._send(message)


class _Elsewhere:
    """Whether a person's token is still good, only the leader knows."""

    def __init__(self, leader: Callable[[], str]) -> None:
        self._leader = leader

    def refusal(self) -> NotLeaderError:
        who = self._leader()
        return NotLeaderError(f"{who} leads, not this keymanager" if who else "no keymanager leads at this moment")

    async def confirm(self, person: PersonToken) -> None:
        raise self.refusal()

    async def workspaces_of(self, project_ids: Iterable[ProjectId]) -> Mapping[ProjectId, WorkspaceId]:
        raise self.refusal()


def standby_app(trusted: TrustBundle, readiness: Readiness, leader: Callable[[], str]) -> FastAPI:
    """What a keymanager says that does not lead. `leader`: the name of who does; empty when that is not known."""
    elsewhere = _Elsewhere(leader)
    verifier = TokenVerifier(trusted, Service.KEYMANAGER, elsewhere)
    app = create_service_app(Service.KEYMANAGER, CollectorRegistry(), readiness, verifier)

    @app.api_route("/{path:path}", methods=_METHODS, include_in_schema=False)
    async def refuse(request: Request) -> Response:  # the token was looked at before
        raise elsewhere.refusal()

    @app.websocket("/v1/session")
    async def refuse_session(socket: WebSocket) -> None:
        scheme, _, token = socket.headers.get("authorization", "").partition(" ")
        try:
            if scheme.lower() != "bearer":
                raise UnauthenticatedError("a key session needs a bearer token")
            verifier.verify(token)
            raise elsewhere.refusal()
        except KeylakeError as error:
            await socket.send_denial_response(error_response(error))

    return app
