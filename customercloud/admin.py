"""The administrative side: `/_keylake/…`, guarded by a bearer token. For whoever runs the simulation, not for SDKs."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request

from customercloud.faults import FaultInjector, Faults
from shared.authorize import bearer_token
from shared.errors import UnauthenticatedError

ADMIN_PREFIX = "/_keylake"


def admin_guard(token: str) -> Callable[[Request], Awaitable[None]]:
    """Dependency that raises UnauthenticatedError unless the request carries `token`; compares in constant time."""

    async def check(request: Request) -> None:
        if not hmac.compare_digest(bearer_token(request).encode(), token.encode()):
            raise UnauthenticatedError("not the administrator's token")

    return check


def faults_router(injector: FaultInjector) -> APIRouter:
    router = APIRouter(prefix="/faults", tags=["faults"])

    @router.get("")
    async def get_faults() -> Faults:
        """The faults in force."""
        return injector.faults

    @router.put("")
    async def put_faults(faults: Faults) -> Faults:
        """Replace all faults; what is left out is off."""
        injector.set(faults)
        return injector.faults

    @router.delete("")
    async def clear_faults() -> Faults:
        """A healthy cloud again."""
        injector.set(Faults())
        return injector.faults

    return router
