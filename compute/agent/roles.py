"""Roles and the database of a compute, made sure of at every boot.

Two steps, because nothing may ever listen without a password:

1. `bootstrap_sql` runs in single-user mode (`postgres --single`, SQL on stdin, no socket; some 20 ms). It sets the
   passwords: verifiers only, so that no password reaches Postgres.
2. `ensure_database` runs as the superuser over the socket once Postgres is up: CREATE DATABASE cannot be conditional
in SQL.

Both commit with `synchronous_commit = local`: the safekeepers stream only once the compute is ready. Nothing is at
risk by that. Whatever a user commits later lies behind these records in the log, so a quorum that holds it holds them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import asyncpg

from compute.agent.admin import connect_as_admin
from compute.agent.protocol import IDENTIFIER_PATTERN, SAFEKEEPER_ROLE, SCRAM_VERIFIER_PATTERN
from shared.api.pageserver import ADMIN_ROLE
from shared.errors import InvalidInputError, UnavailableError
from shared.ids import EndpointId

OWNER_MARK: Final = "keylake.owner_of"
"""A setting of the safekeepers' role: of which endpoint the owner has the password."""
RESERVED_ROLES: Final = frozenset({ADMIN_ROLE, SAFEKEEPER_ROLE})


def bootstrap_sql(
    *,
    admin_verifier: str,
    safekeeper_verifier: str,
    owner: str,
    owner_verifier: str,
    endpoint_id: EndpointId,
    superuser_owner: bool = False,
) -> str:
    """Without `superuser_owner` no role but ours is a superuser when this is through, whatever there was before.

    For `postgres --single -j`, where a statement ends at a semicolon and two newlines. Raises InvalidInputError."""
    for verifier in (admin_verifier, safekeeper_verifier, owner_verifier):
        if not re.fullmatch(SCRAM_VERIFIER_PATTERN, verifier):
            raise InvalidInputError("not a SCRAM verifier")
    _check_name(owner)
    mark = f"{OWNER_MARK}={endpoint_id}"
    return "".join(
        statement + ";\n\n"
        for statement in (
            f"ALTER ROLE {ADMIN_ROLE} PASSWORD '{admin_verifier}'",
            _ensure_role(SAFEKEEPER_ROLE, "LOGIN REPLICATION", safekeeper_verifier),
            # The owner's password is set once. After that it is the owner's own: ALTER ROLE must outlive a restart. But
            # a branch comes with the role of the timeline that it was made from, and with an endpoint and a password
            # of its own. The mark says whose password it is; it is committed with it, and out of the owner's reach.
            _ensure_role(
                owner,
                "LOGIN CREATEDB CREATEROLE",
                owner_verifier,
                unless=f"SELECT FROM pg_roles WHERE rolname = '{SAFEKEEPER_ROLE}' AND '{mark}' = ANY (rolconfig)",
                then=f"ALTER ROLE {SAFEKEEPER_ROLE} SET {OWNER_MARK} = '{endpoint_id}'; ",
            ),
            _ensure_superusers(owner if superuser_owner else None),
        )
    )


def _ensure_role(name: str, attributes: str, verifier: str, *, unless: str = "", then: str = "") -> str:
    """The role exists with this password; an existing role keeps its own if `unless` finds a row."""
    condition = f"ELSIF NOT EXISTS ({unless})" if unless else "ELSE"
    begin = "THEN " if unless else ""
    return (
        f"DO $do$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{name}') "
        f"THEN CREATE ROLE {name} {attributes} PASSWORD '{verifier}'; {then}"
        f"{condition} {begin}ALTER ROLE {name} PASSWORD '{verifier}'; {then}END IF; END $do$"
    )


def _ensure_superusers(owner: str | None) -> str:
    """Writes nothing where nothing has to change, which is nearly always."""
    if owner is not None:
        return (
            f"DO $do$ BEGIN IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = '{owner}') "  # noqa: S608 - checked
            f"THEN ALTER ROLE {owner} SUPERUSER; END IF; END $do$"
        )
    return (
        "DO $do$ DECLARE name text; BEGIN FOR name IN SELECT rolname FROM pg_roles WHERE rolsuper "  # noqa: S608
        f"AND rolname <> '{ADMIN_ROLE}' LOOP EXECUTE format('ALTER ROLE %I NOSUPERUSER', name); END LOOP; END $do$"
    )


def _check_name(name: str) -> None:
    if not re.fullmatch(IDENTIFIER_PATTERN, name) or name in RESERVED_ROLES or name.startswith("pg_"):
        raise InvalidInputError("not a name for a role or database")


async def ensure_database(socket_dir: Path, admin_password: str, owner: str, database: str) -> None:
    """Make `database` unless it is there. Raises UnavailableError when the superuser cannot log in or it cannot be
    made.
    """
    _check_name(owner)
    if database != "postgres":
        _check_name(database)
    try:
        connection = await connect_as_admin(socket_dir, admin_password, 30.0, synchronous_commit="local")
        try:
            if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", database):
                await connection.execute(f"CREATE DATABASE {database} OWNER {owner}")
        finally:
            await connection.close(timeout=5.0)
    except (asyncpg.PostgresError, OSError, TimeoutError) as error:
        raise UnavailableError(f"the compute's database could not be set up: {type(error).__name__}") from None
