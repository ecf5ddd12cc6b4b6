"""`python -m keylake.metadata --config FILE`: the metadata database as a service of its own, for docker-compose.yml.

A Postgres of the same installation that computes run. It listens on a Unix socket only: the wheel's Postgres has no
TLS, and a socket in a volume that only its two users share needs none. Each of them has a role that owns a schema of
its own and nothing else."""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import asyncpg
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from keylake.layout import METADATA_ROLES, METADATA_SUPERUSER
from shared.entry import run, wait_for_shutdown_signal
from shared.errors import InvalidInputError, KeylakeError, UnavailableError
from shared.postgres import Auth, PostgresServer, initdb
from shared.telemetry import configure_logging, get_logger

METADATA_DATABASE: Final = "keylake"
_CONF: Final[Mapping[str, str | int]] = {"shared_buffers": "16MB", "max_connections": 60}
_MAX_SETTINGS_SIZE_BYTES: Final = 64 * 1024
_PASSWORD: Final = re.compile(r"[A-Za-z0-9_-]{16,128}")

_log = get_logger(__name__)


class MetadataSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    data_dir: Path = Field(description="PGDATA; made when it is missing")
    socket_dir: Path = Field(description="where .s.PGSQL.5432 is; nothing else may use this directory")
    ready_file: Path | None = Field(default=None, description="exists while the database can be used")
    passwords: dict[str, SecretStr] = Field(description="of postgres, and of each service's role")

    @classmethod
    def load(cls, path: Path) -> MetadataSettings:
        """Raises InvalidInputError that names the offending key and never its value."""
        try:
            with path.open("rb") as file:
                settings = cls.model_validate_json(file.read(_MAX_SETTINGS_SIZE_BYTES))
        except OSError as error:
            raise InvalidInputError(f"cannot read settings from {path.name}: {type(error).__name__}") from None
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}"
                for e in error.errors(include_input=False, include_url=False)
            )
            raise InvalidInputError(f"settings in {path.name} are not valid: {problems}") from None
        for role in (METADATA_SUPERUSER, *METADATA_ROLES):
            # They become part of SQL: ALTER ROLE takes no parameters.
            if role not in settings.passwords or not _PASSWORD.fullmatch(settings.passwords[role].get_secret_value()):
                raise InvalidInputError(f"passwords.{role}: expected 16 to 128 letters, digits, - and _")
        return settings


async def make_data_directory(settings: MetadataSettings) -> None:
    """initdb beside it and a rename, so that one that was interrupted is never mistaken for a database."""
    if (settings.data_dir / "PG_VERSION").exists():
        return
    unfinished = settings.data_dir.with_name(settings.data_dir.name + ".new")
    if unfinished.exists():
        await asyncio.to_thread(shutil.rmtree, unfinished)
    password = settings.passwords[METADATA_SUPERUSER].get_secret_value()
    await initdb(
        unfinished, superuser=METADATA_SUPERUSER, password=password, auth_local=Auth.SCRAM, auth_host=Auth.REJECT
    )
    unfinished.rename(settings.data_dir)


async def prepare_database(socket_dir: Path, passwords: Mapping[str, SecretStr]) -> None:
    """The database, and a role per service that owns its own schema. Idempotent."""
    superuser_password = passwords[METADATA_SUPERUSER].get_secret_value()

    async def connect(database: str) -> asyncpg.Connection[asyncpg.Record]:
        return await asyncpg.connect(
            host=str(socket_dir), user=METADATA_SUPERUSER, password=superuser_password, database=database
        )

    admin = await connect("postgres")
    try:
        if not await admin.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", METADATA_DATABASE):
            await admin.execute(f"CREATE DATABASE {METADATA_DATABASE}")
    finally:
        await admin.close()
    admin = await connect(METADATA_DATABASE)
    try:
        await admin.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
        for role in METADATA_ROLES:
            if not await admin.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", role):
                await admin.execute(f"CREATE ROLE {role} LOGIN")
            await admin.execute(f"ALTER ROLE {role} PASSWORD '{passwords[role].get_secret_value()}'")
            await admin.execute(f"CREATE SCHEMA IF NOT EXISTS {role} AUTHORIZATION {role}")
            await admin.execute(f"ALTER ROLE {role} SET search_path = {role}")
    finally:
        await admin.close()


async def serve_until_shutdown(settings: MetadataSettings) -> None:
    """Returns at SIGTERM or SIGINT. Raises KeylakeError when Postgres does not start, or ends by itself."""
    await make_data_directory(settings)
    for name in (".s.PGSQL.5432", ".s.PGSQL.5432.lock"):
        # Of an earlier container. Its process id means nothing in this one, but Postgres would look it up.
        (settings.socket_dir / name).unlink(missing_ok=True)
    async with PostgresServer(settings.data_dir, socket_dir=settings.socket_dir, conf=_CONF) as server:
        await prepare_database(settings.socket_dir, settings.passwords)
        if settings.ready_file is not None:
            settings.ready_file.touch(mode=0o600)
        _log.info("metadata database is up")
        ended, asked = asyncio.create_task(server.wait()), asyncio.create_task(wait_for_shutdown_signal())
        try:
            await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise UnavailableError(f"Postgres ended by itself: {server.log_tail[-2000:]}")
        finally:
            if settings.ready_file is not None:
                settings.ready_file.unlink(missing_ok=True)
            for task in (ended, asked):
                task.cancel()
            await asyncio.gather(ended, asked, return_exceptions=True)
        _log.info("metadata database is going down")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m keylake.metadata",
        description="The metadata database of Keylake's services, on a Unix socket.",
        epilog="example: python -m keylake.metadata --config /etc/keylake/config/metadata.json",
    )
    parser.add_argument("--config", type=Path, required=True, help="JSON file with its settings")
    arguments = parser.parse_args()
    configure_logging("metadata", "metadata")
    try:
        settings = MetadataSettings.load(arguments.config)
        run(lambda: serve_until_shutdown(settings))
    except KeylakeError as error:
        _log.error("the metadata database cannot go on", reason=str(error), notes=getattr(error, "__notes__", []))
        raise SystemExit(2 if isinstance(error, InvalidInputError) else 1) from None


if __name__ == "__main__":
    main()
