"""Who may log in, listed for the control plane at the end of a compute: all of them, and nobody else.

A list that is nearly right would lock somebody out: the proxy has no compute started for a role that is not on it. So
nobody changes a role between the list and the end of Postgres. Whatever does (CREATE, ALTER and DROP ROLE, a prepared
transaction with one of them, a commit that still waits for the quorum) holds a lock on pg_authid until it is over; our
session takes one that excludes these, reads, and keeps it until all other sessions have ended, and new ones find no
socket. A shutdown alone would not do: it ends the newest session first, which is ours, and whoever waited for the lock
may have it before they are told. When any of this takes too long there is no list (ADR 49).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import asyncpg

from compute.agent.admin import connect_as_admin
from compute.agent.postgres_conf import POSTGRES_PORT
from compute.agent.protocol import MAX_LOGIN_ROLES, LoginRole
from compute.agent.roles import RESERVED_ROLES
from shared.telemetry import get_logger

_log = get_logger(__name__)
_TIMEOUT_S: Final = 2.0
_LOCK_TIMEOUT: Final = "500ms"
_LOOK_S: Final = 0.01
_HIDDEN_PORT: Final = POSTGRES_PORT + 1

# As the shutdown would, with the same words to them. A backend that has its lock or waits for it is found here, too.
_END_OTHERS: Final = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
 WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
"""

# As Postgres sees it: get_role_password in crypt.c, InitializeSessionUserId in miscinit.c. MD5 passwords are left out:
# pg_hba.conf says scram-sha-256. A date that Python has no year for is as good as none.
_ROLES: Final = """
SELECT rolname, rolpassword, CASE WHEN rolvaliduntil < '9999-01-01' THEN rolvaliduntil END AS valid_until
  FROM pg_authid
 WHERE rolcanlogin AND rolpassword LIKE 'SCRAM-SHA-256$%'
   AND (rolvaliduntil IS NULL OR rolvaliduntil > now()) AND rolname <> ALL ($1)
 LIMIT $2
"""


@asynccontextmanager
async def held_login_roles(
    socket_dir: Path, admin_password: str, owner: str, owner_verifier: str
) -> AsyncIterator[dict[str, LoginRole] | None]:
    """By name, and as it stays until Postgres ends or this is left. None: not known for certain.

    An owner that was dropped is on it: the endpoint's next start makes it again."""
    session: Any = None
    roles: dict[str, LoginRole] | None = None
    try:
        try:
            with _hidden(socket_dir) as port:
                session = await connect_as_admin(
                    socket_dir,
                    admin_password,
                    _TIMEOUT_S,
                    port=port,
                    command_timeout_s=_TIMEOUT_S,
                    lock_timeout=_LOCK_TIMEOUT,
                )
                await session.execute("BEGIN; LOCK TABLE pg_authid IN SHARE MODE")
                found = await _read(session)
                if not await session.fetchval("SELECT true FROM pg_authid WHERE rolname = $1", owner):
                    found[owner] = LoginRole(verifier=owner_verifier)
                async with asyncio.timeout(_TIMEOUT_S):
                    await _end_others(session)
                roles = found if len(found) <= MAX_LOGIN_ROLES else None
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError, ValueError) as error:
            _log.info("who may log in at the end is not known", error=type(error).__name__)
        yield roles  # and no await since the socket is back, nor until the shutdown
    finally:
        if session is not None:
            session.terminate()


@contextmanager
def _hidden(socket_dir: Path) -> Iterator[int]:
    """Under a port that nobody knows: who comes now waits for the next compute, and is not let in here for a moment."""
    known, hidden = (socket_dir / f".s.PGSQL.{port}" for port in (POSTGRES_PORT, _HIDDEN_PORT))
    known.rename(hidden)
    try:
        yield _HIDDEN_PORT
    finally:
        hidden.rename(known)


async def _end_others(session: Any) -> None:
    """Returns when ours is the only session."""
    while await session.fetchval(_END_OTHERS):
        await asyncio.sleep(_LOOK_S)
        await session.execute("SELECT pg_stat_clear_snapshot()")  # or the transaction sees those that it saw before


async def _read(session: Any) -> dict[str, LoginRole]:
    """Raises ValueError for a name that is not UTF-8, or a verifier that Postgres takes and we do not."""
    rows = await session.fetch(_ROLES, sorted(RESERVED_ROLES), MAX_LOGIN_ROLES + 1)
    return {row["rolname"]: LoginRole(verifier=row["rolpassword"], valid_until=row["valid_until"]) for row in rows}
