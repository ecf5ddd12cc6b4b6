"""HTTP routes of key upkeep, the same for safekeeper and pageserver."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import Depends, FastAPI

from shared.api.key_upkeep import KeyUpkeepStatus
from shared.auth import Scope
from shared.authorize import Authorizer
from shared.errors import InvalidInputError
from shared.ids import ProjectId
from shared.key_upkeep import KeyUpkeep, UpkeepProject

_KEYS = "/v1/projects/{project_id}/keys"


def add_key_routes(
    app: FastAPI, node_id: str, authorize: Authorizer, upkeep: KeyUpkeep, find: Callable[[ProjectId], UpkeepProject]
) -> None:
    """`find` raises NotFoundError."""

    def project_of(project_id: str) -> UpkeepProject:
        try:
            return find(ProjectId.parse(project_id))
        except ValueError as error:
            raise InvalidInputError(str(error)) from None

    @app.post(_KEYS + ":upkeep", status_code=202, dependencies=[Depends(authorize(Scope.SECURITY_ADMIN))])
    async def do_upkeep(project_id: str) -> KeyUpkeepStatus:
        """Begin a pass now. How far it is: the status."""
        project = project_of(project_id)
        upkeep.wake(project.project_id)
        return await upkeep.status(node_id, project)

    @app.get(_KEYS, dependencies=[Depends(authorize(Scope.STATUS_READ, Scope.SECURITY_ADMIN))])
    async def key_status(project_id: str) -> KeyUpkeepStatus:
        """What is stored under which key, by a look that begins now."""
        return await upkeep.status(node_id, project_of(project_id))
