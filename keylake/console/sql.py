"""The SQL box: one statement to an endpoint whose password was saved when it was made, through the proxy as anybody."""

from __future__ import annotations

from typing import Any, Final

import asyncpg
from pydantic import BaseModel, ConfigDict, Field

from keylake.client import START_TIMEOUT_S, KeylakeClient
from keylake.connections import load_connections
from keylake.console.hats import Hat
from keylake.place import Place
from shared.errors import InvalidInputError, NotFoundError, PermissionDeniedError
from shared.ids import EndpointId

MAX_ROWS: Final = 200
MAX_CELL_LENGTH: Final = 300
TIMEOUT_S: Final = 30.0


class Statement(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)
    hat: Hat
    endpoint_id: str = Field(max_length=40)
    sql: str = Field(min_length=1, max_length=20_000, repr=False)


async def run(place: Place, client: KeylakeClient, statement: Statement) -> dict[str, Any]:
    """Columns, at most MAX_ROWS rows as text, and the command's tag; or Postgres's own error, with its SQLSTATE.

    Raises PermissionDeniedError, NotFoundError, InvalidInputError.
    """
    try:
        endpoint_id = EndpointId.parse(statement.endpoint_id)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None
    if statement.hat is not Hat.DATA_USER:
        raise PermissionDeniedError("only a data user has connection strings: who runs a database does not read it")
    endpoint = await client.endpoint(endpoint_id)
    saved = next((each for each in load_connections(place.home) if each.endpoint_id == endpoint_id), None)
    if saved is None:
        raise NotFoundError(f"the password of {endpoint.name} was not saved here: make the endpoint with `keylake`")
    proxy = client.addresses.proxy
    target = saved.connection(proxy.host, proxy.port, client.ca_certificate)
    try:
        connection = await asyncpg.connect(**target.asyncpg_arguments(), timeout=START_TIMEOUT_S)
    except asyncpg.PostgresError as error:
        return _refused(error)
    except (OSError, TimeoutError, asyncpg.InterfaceError) as error:
        return {"error": type(error).__name__, "sqlstate": None}
    try:
        return await _rows(connection, statement.sql)
    except asyncpg.PostgresError as error:
        return _refused(error)
    except (OSError, TimeoutError, asyncpg.InterfaceError) as error:
        return {"error": str(error) or type(error).__name__, "sqlstate": None}
    finally:
        connection.terminate()


async def _rows(connection: Any, sql: str) -> dict[str, Any]:
    prepared = await connection.prepare(sql, timeout=TIMEOUT_S)
    columns = [attribute.name for attribute in prepared.get_attributes() or ()]
    rows = await prepared.fetch(timeout=TIMEOUT_S)
    cells = [[None if cell is None else str(cell)[:MAX_CELL_LENGTH] for cell in row] for row in rows[:MAX_ROWS]]
    return {"columns": columns, "rows": cells, "more": len(rows) > MAX_ROWS, "status": prepared.get_statusmsg()}


def _refused(error: asyncpg.PostgresError) -> dict[str, Any]:
    details = [getattr(error, name, None) for name in ("detail", "hint")]
    return {"error": str(error), "sqlstate": error.sqlstate, "details": [each for each in details if each]}
