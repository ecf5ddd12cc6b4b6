"""Versioned migrations of a service's own schema in the metadata Postgres.

A migration is a file `NNNN_what_it_does.sql` (four digits, from 0001, no gaps) in the service's `migrations` folder.
Each runs once; all that are due run in order in one transaction with the rows that record them, under an advisory
lock, so that several instances may start at once. A migration that was applied is never edited: its SHA-256 is
recorded and compared.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

from shared.errors import ConflictError, InvalidInputError

_FILE_NAME: Final = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
_SCHEMA_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,40}")


@dataclass(frozen=True, slots=True)
class Migration:
    number: int
    name: str
    sql: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def load_migrations(package: str) -> list[Migration]:
    """The migrations in folder `migrations` of `package`, in order. Raises InvalidInputError for a gap or an odd
    name.
    """
    found = []
    for file in resources.files(package).joinpath("migrations").iterdir():
        if not file.name.endswith(".sql"):
            continue
        match = _FILE_NAME.fullmatch(file.name)
        if match is None:
            raise InvalidInputError(f"{file.name} is not named like a migration")
        found.append(Migration(int(match[1]), file.name, file.read_text()))
    found.sort(key=lambda migration: migration.number)
    if [m.number for m in found] != list(range(1, len(found) + 1)):
        raise InvalidInputError("migrations must be numbered from 0001 without gaps")
    return found


async def migrate(connection: Any, schema: str, migrations: list[Migration]) -> int:
    """Bring `schema` up to date; returns how many migrations ran. `connection` is an asyncpg connection of a role that
    owns the schema or may create it; statements of a migration find their tables through search_path, which names only
    `schema`.

    Raises ConflictError when the database is newer than this program, or when an applied migration was edited.
    """
    if not _SCHEMA_NAME.fullmatch(schema):
        raise InvalidInputError("not a schema name")
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", zlib.crc32(b"keylake-migrate-" + schema.encode()))
        # IF NOT EXISTS would ask for the right to create schemas even where the schema was made for us.
        if not await connection.fetchval("SELECT 1 FROM pg_namespace WHERE nspname = $1", schema):
            await connection.execute(f"CREATE SCHEMA {schema}")
        await connection.execute(f"SET LOCAL search_path TO {schema}")
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS migrations (number integer PRIMARY KEY, name text NOT NULL,"
            " sha256 text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        applied = {row["number"]: row["sha256"] for row in await connection.fetch("SELECT * FROM migrations")}
        if len(applied) > len(migrations):
            raise ConflictError(f"schema {schema} is of a newer version of Keylake")
        for migration in migrations:
            if migration.number in applied:
                if applied[migration.number] != migration.sha256:
                    raise ConflictError(f"migration {migration.name} was edited after it was applied")
                continue
            await connection.execute(migration.sql)
            await connection.execute(
                "INSERT INTO migrations (number, name, sha256) VALUES ($1, $2, $3)",
                migration.number,
                migration.name,
                migration.sha256,
            )
    return len(migrations) - len(applied)
