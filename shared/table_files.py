"""Tables of a Postgres whose files shall hold nothing that was deleted.

A row that was deleted or changed stays in its table's file until the table is vacuumed, and longer when a transaction
of the same database is open whose snapshot may see it: VACUUM FULL copies it then. It says how many it copied (DETAIL
of its INFO, copy_table_data in cluster.c), so it is done again until there are none. (pg_stat_activity tells who has
which snapshot to superusers and owners only.)
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from typing import Any, Final

from shared.errors import UnavailableError

_TIMEOUT_S: Final = 10.0
_PAUSE_S: Final = 0.1
_COPIED: Final = re.compile(r"\d+")


async def rewrite_tables(connection: Any, tables: Iterable[str]) -> None:
    """Write them anew. Whoever uses one waits for some milliseconds. `tables`: names from the code. Raises
    UnavailableError when somebody keeps a transaction open, and what asyncpg raises."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _TIMEOUT_S
    for table in tables:
        while await _rewrite(connection, table):
            if loop.time() > deadline:
                raise UnavailableError(
                    f"what was deleted from {table} stays in its file while a transaction is open that began before:"
                    " end those of the metadata database (pg_stat_activity)"
                )
            await asyncio.sleep(_PAUSE_S)


async def _rewrite(connection: Any, table: str) -> int:
    """Returns how many deleted rows had to be copied."""
    details: list[str] = []

    def listen(_: object, message: Any) -> None:
        details.append(message.detail or "")

    connection.add_log_listener(listen)
    try:
        await connection.execute(f"VACUUM (FULL, VERBOSE) {table}")  # it runs in no transaction
        await asyncio.sleep(0)  # asyncpg tells its listeners in the next turn of the loop
    finally:
        connection.remove_log_listener(listen)
    copied = [int(found[0]) for detail in details if (found := _COPIED.search(detail))]
    if not copied:
        raise UnavailableError(f"VACUUM of {table} did not say what it has left over")
    return sum(copied)
