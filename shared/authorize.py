"""Which caller a route takes: the dependency that checks it, and that says so, for docs/roles.md and its tests.

No `from __future__ import annotations` here: FastAPI reads the signature of `Demand.__call__`, and could not resolve
names in text, because an instance has no module.
"""

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from shared.auth import Principal, Scope, TokenVerifier
from shared.errors import InvalidInputError, PermissionDeniedError, UnauthenticatedError
from shared.ids import ProjectId, WorkspaceId

IdT = TypeVar("IdT", ProjectId, WorkspaceId)


def bearer_token(request: Request) -> str:
    """Raises UnauthenticatedError when there is none."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise UnauthenticatedError("this API needs a bearer token")
    return token


async def authenticate(request: Request, verifier: TokenVerifier) -> Principal:
    """Who calls; verified once per request. Raises what `TokenVerifier.admit` does."""
    found = getattr(request.state, "caller", None)
    if not isinstance(found, Principal):
        found = request.state.caller = await verifier.admit(bearer_token(request))
    return found


@dataclass(frozen=True, slots=True)
class Place:
    """What a request is about, as far as a token may be bound to it."""

    project_id: ProjectId | None = None
    workspace_id: WorkspaceId | None = None


Locate = Callable[[Request], Awaitable[Place]]
"""Raises InvalidInputError. What does not exist has no place: who is bound to one must not learn that."""


OPEN_PATHS = ("/healthz", "/readyz")
"""What strangers may ask, too."""


class Reach(enum.Enum):
    """What a token that is bound to a workspace or project can do with a route."""

    PLACE = "its place"
    """If what the path names is in it."""
    LIST = "its part"
    """A list: it sees its part. The route filters."""
    NOTHING = "no"
    """The route is about everything."""


async def named_in_path(request: Request) -> Place:
    """The `project_id` and `workspace_id` of the path. Not of the query: the caller adds to that what they like."""
    return Place(_parsed(request, "project_id", ProjectId), _parsed(request, "workspace_id", WorkspaceId))


def _parsed(request: Request, name: str, kind: type[IdT]) -> IdT | None:
    raw = request.path_params.get(name)
    try:
        return None if raw is None else kind.parse(raw)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None


OnRefusal = Callable[[Request, Principal, Scope], Awaitable[None]]


class Demand:
    """A dependency: the caller has one of these scopes, and its token is good for what the path names."""

    def __init__(
        self,
        verifier: TokenVerifier,
        any_of: tuple[Scope, ...],
        reach: Reach,
        locate: Locate,
        on_refusal: OnRefusal | None,
    ) -> None:
        self.any_of = any_of
        self.reach = reach
        self._verifier = verifier
        self._locate = locate
        self._on_refusal = on_refusal

    async def __call__(self, request: Request) -> Principal:
        principal = await authenticate(request, self._verifier)
        place = await self._locate(request) if principal.bound else Place()
        held = next((scope for scope in self.any_of if scope in principal.scopes), self.any_of[0])
        try:
            if self.reach is Reach.LIST:
                place = Place(principal.project_id, principal.workspace_id)
            elif place.workspace_id is None and place.project_id is not None:
                found = await self._verifier.workspaces_of(principal, [place.project_id])
                place = Place(place.project_id, found.get(place.project_id))
            principal.require(held, place.project_id, place.workspace_id)
        except PermissionDeniedError:
            if self._on_refusal is not None:
                await self._on_refusal(request, principal, held)
            raise
        return principal

    def reach_at(self, path: str) -> Reach:
        """On a route of this path: one that names no place is about everything."""
        named = self._locate is not named_in_path or "{project_id}" in path or "{workspace_id}" in path
        return self.reach if named or self.reach is Reach.LIST else Reach.NOTHING


class Authorizer:
    """Makes the demands of one service: `dependencies=[Depends(authorize(Scope.X, …))]`."""

    def __init__(self, verifier: TokenVerifier, on_refusal: OnRefusal | None = None) -> None:
        self.verifier = verifier
        self._on_refusal = on_refusal

    def __call__(self, *any_of: Scope, reach: Reach = Reach.PLACE, locate: Locate = named_in_path) -> Demand:
        """One of these scopes is needed."""
        return Demand(self.verifier, any_of, reach, locate, self._on_refusal)


@dataclass(frozen=True, slots=True)
class Operation:
    """One route, and whom it takes."""

    method: str
    path: str
    any_of: tuple[Scope, ...]
    reach: Reach


def operations(app: FastAPI) -> list[Operation]:
    """Every route of a service's API, in its order. Raises ValueError for one that demands nothing."""
    found = []
    for route in app.routes:
        if not isinstance(route, APIRoute) or route.path in OPEN_PATHS:
            continue
        demands = _demands(route.dependant)
        if len(demands) != 1:
            raise ValueError(f"{route.path} has {len(demands)} demands")
        reach = demands[0].reach_at(route.path)
        found += [Operation(method, route.path, demands[0].any_of, reach) for method in sorted(route.methods or ())]
    return found


def _demands(dependant: Dependant) -> list[Demand]:
    own = [dependant.call] if isinstance(dependant.call, Demand) else []
    return own + [demand for each in dependant.dependencies for demand in _demands(each)]
