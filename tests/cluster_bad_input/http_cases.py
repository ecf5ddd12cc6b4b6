"""Attacks on the HTTP ports, route by route. Each makes its attempts; `test_bad_input` awaits them all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from shared.auth import Scope
from shared.service import MAX_BODY_SIZE_BYTES
from tests.cluster_bad_input.bodies import MALFORMED_IDS, Bodies
from tests.cluster_bad_input.place import CANARY, Place
from tests.cluster_bad_input.routes import Api, Ids, Route, check, ids_of_idle, unknown_ids
from tests.cluster_bad_input.tokens import for_another_project, wrong_tokens

Attempt = Coroutine[Any, Any, object]
_NO_HTTP_ROUTE: Final = frozenset(
    {Scope.KEYS_SESSION, Scope.KEYS_USE, Scope.STORAGE_READ, Scope.WAL_READ, Scope.WAL_FEEDBACK}
)
"""Scopes of the framed ports and of key sessions."""
_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "KEYLAKE")
_NOWHERE: Final = (
    "/",
    "/v1",
    "/v2/status",
    "/docs",
    "/redoc",
    "/v1//status",
    "/%00",
    "/../etc/passwd",
    f"/{'x' * 9000}",
)
_OPEN_TO_ALL: Final = ("/healthz", "/readyz", "/openapi.json")
_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class Target:
    """One route of one service, and who may use it: found by asking, about things that do not exist."""

    place: Place
    api: Api
    route: Route
    ids: Ids
    """Of things that exist."""
    accepted: frozenset[Scope]

    @property
    def about(self) -> str:
        return f"{self.api.name} {self.route.method} {self.route.template}"

    @property
    def token(self) -> str:
        return self.place.token(self.api.service, min(self.accepted))

    @property
    def path(self) -> str:
        return self.route.path(self.ids)

    async def attempt(
        self, about: str, wanted: set[int], path: str, token: str | None, content: Any = None, header: str | None = None
    ) -> None:
        headers = None if header is None else {"Authorization": header}
        response = await self.api.send(self.route.method, path, token, content, headers)
        check(response, wanted, f"{self.api.name}, {about}", *([token] if token else []))


Attack = Callable[[Target], Iterator[Attempt]]


@asynccontextmanager
async def every_route(place: Place) -> AsyncIterator[list[Target]]:
    """Of every service of Keylake that runs."""
    async with AsyncExitStack() as stack:
        names = [name for name in sorted(place.cluster.services) if name != "customercloud"]
        apis = [await stack.enter_async_context(Api(place, name)) for name in names]
        ids = await ids_of_idle(place)

        async def target(api: Api, route: Route) -> Target:
            return Target(place, api, route, ids, await _accepted(place, api, route))

        yield [await target(api, route) for api in apis for route in api.routes]


async def _accepted(place: Place, api: Api, route: Route) -> frozenset[Scope]:
    path, body = route.path(unknown_ids()), None if route.body is None else b"{}"

    async def opens(scope: Scope) -> bool:
        return (await api.send(route.method, path, place.token(api.service, scope), body)).status_code != 403

    answers = await asyncio.gather(*map(opens, Scope))
    accepted = frozenset(scope for scope, answer in zip(Scope, answers, strict=True) if answer)
    assert accepted, f"nobody may use {route}"
    assert not accepted & _NO_HTTP_ROUTE, (route, accepted)
    return accepted


def dealt(targets: list[Target], attack: Attack) -> Iterator[Attempt]:
    """An attack on every route. Nodes of one service run the same program: they take its attempts in turn."""
    for target in targets:
        nodes = sorted({other.api.name for other in targets if other.api.service is target.api.service})
        for number, attempt in enumerate(attack(target)):
            if nodes[number % len(nodes)] == target.api.name:
                yield attempt
            else:
                attempt.close()


async def carry_out(attempts: Iterable[Attempt]) -> None:
    """All of them, some at once, each made when it is its turn: tokens expire.

    Raises AssertionError with whatever went wrong.
    """
    waiting, done, failed = iter(attempts), 0, list[str]()

    async def work() -> None:
        nonlocal done
        for attempt in waiting:
            try:
                await attempt
            except Exception as error:
                failed.append(f"{type(error).__name__}: {error}")
            done += 1

    await asyncio.gather(*(work() for _ in range(_AT_ONCE)))
    assert done
    assert not failed, f"{len(failed)} of {done}:\n" + "\n".join(failed[:100])


# --- attacks ---


def tokens(target: Target) -> Iterator[Attempt]:
    """Nobody gets in without a good token, and nobody learns first what a body should have been."""
    bodies = [None] if target.route.body is None else [b"{}", b"no JSON " + CANARY.encode()]
    wrong = wrong_tokens(target.place, target.api.service, target.accepted)
    for number, (name, (token, status)) in enumerate(wrong.items()):
        # In turn: each route gets both bodies, and so does each kind of token, on one route or another.
        body = bodies[number % len(bodies)] if status == 401 else bodies[0]
        yield target.attempt(name, {status}, target.path, token, body)
    for scope in target.accepted:
        token = for_another_project(target.place, target.api.service, scope)
        # A list has nothing in it for them: see `check`.
        wanted = {403, 200} if target.route.method == "GET" and not target.route.parameters else {403}
        yield target.attempt(f"{scope} for another project", wanted, target.path, token, bodies[0])
    for header in ("Basic dXNlcjpwYXNz", "Bearer", CANARY, f"Bearer {CANARY} {CANARY}"):
        yield target.attempt(header, {401}, target.path, None, bodies[0], header)


def unknown(target: Target) -> Iterator[Attempt]:
    """One id at a time names nothing."""
    route, body_schema = target.route, target.route.body
    strange = unknown_ids()
    names = set(route.parameters)
    if body_schema is not None:
        good = Bodies(body_schema, target.api.schemas, strange).good()
        names |= good.keys() & strange.keys()
    wanted = {404}
    if route.method == "DELETE":
        wanted = {404, 204}  # what is not there is deleted already
    elif route.method == "GET" and not route.template.endswith("}"):
        wanted = {404, 200}  # nothing has no parts: see `check`
    if route.method in ("POST", "PUT") and route.template.endswith("}"):
        names.remove(route.parameters[-1])  # the caller's own choice for something new
    for name in names:
        ids = {**target.ids, name: strange[name]}
        content = None
        if body_schema is not None:
            content = json.dumps(Bodies(body_schema, target.api.schemas, ids).good()).encode()
        yield target.attempt(f"unknown {name}", wanted, route.path(ids), target.token, content)


def malformed(target: Target) -> Iterator[Attempt]:
    """Ids that are none, and parameters behind the question mark."""
    odd = [*MALFORMED_IDS[1:], "prj-0123456789abcdef%0a", "%00", "%2e%2e", "..%2f..", "x" * 10_000, "%ff%fe", "%F0%9F"]
    content = None
    if target.route.body is not None:
        content = json.dumps(Bodies(target.route.body, target.api.schemas, target.ids).good()).encode()
    for name in target.route.parameters:
        for text in odd:
            path = target.route.path({**target.ids, name: text})
            yield target.attempt(f"{name} is {text[:40]!r}", {400, 404, 405}, path, target.token, content)
    for parameter in target.route.query:
        numeric = parameter["schema"].get("type") == "integer"
        for value in ["", "x", "-1", "1.5", "9" * 5000, "1e400", "nan", "%00"] if numeric else MALFORMED_IDS:
            path = f"{target.path}?{parameter['name']}={value}"
            yield target.attempt(f"{parameter['name']} is {value[:40]!r}", {400}, path, target.token, content)


def bodies(target: Target) -> Iterator[Attempt]:
    """About things that exist, so that a body that is taken would do something."""
    if target.route.body is None:
        return
    for name, content in Bodies(target.route.body, target.api.schemas, target.ids).bad():
        yield target.attempt(name, {400}, target.path, target.token, content)


def large_bodies(target: Target) -> Iterator[Attempt]:
    """More than anybody may send, said beforehand or not."""
    if target.route.body is not None:
        size = MAX_BODY_SIZE_BYTES + 1
        yield target.attempt("too large", {413}, target.path, target.token, b" " * size)
        yield target.attempt("too large, length not said", {413}, target.path, target.token, _chunks(size))


async def _chunks(size_bytes: int) -> AsyncIterator[bytes]:
    for start in range(0, size_bytes, 1 << 20):
        yield b" " * min(1 << 20, size_bytes - start)


def methods(targets: list[Target]) -> Iterator[Attempt]:
    """Methods that a path does not have, and paths that nobody has, with a token and without."""
    for service in {target.api.service for target in targets}:
        everyone = [target for target in targets if target.api.service is service]
        mine = [target for target in everyone if target.api is everyone[0].api]  # of one node
        api, token = mine[0].api, mine[0].place.token(mine[0].api.service, Scope.STATUS_READ)

        async def attempt(method: str, path: str, wanted: set[int], token: str | None, api: Api = api) -> None:
            check(await api.send(method, path, token), wanted, api.name)

        for path in {target.path for target in mine}:
            offered = {target.route.method for target in mine if target.path == path}
            for method in set(_METHODS) - offered:
                # A verb behind a colon, with a method of the thing itself, is a malformed id.
                yield attempt(method, path, {400, 403, 405}, token)
                yield attempt(method, path, {401, 405}, None)
        for path in _NOWHERE:
            for method in ("GET", "POST", "DELETE"):
                yield attempt(method, path, {404}, token)
        for path in _OPEN_TO_ALL:
            for method in set(_METHODS) - {"GET", "HEAD"}:
                yield attempt(method, path, {405}, None)
