"""`keylake endpoint`: connection targets, each with at most one running compute."""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keylake.cli.common import AsJson, Home, Yes, examples, group, home_dir, printable

if TYPE_CHECKING:
    from keylake.client import Connection, KeylakeClient
    from shared.api.compute import CreatedEndpoint, Endpoint, EndpointSize, Timeline
    from shared.api.keymanager import Project
    from shared.ids import EndpointId
    from shared.point_in_time import PointInTime

app = group("Endpoints: what Postgres clients connect to. A compute starts with the first connection.")

EndpointName = Annotated[
    str,
    typer.Argument(
        metavar="ENDPOINT",
        help="Id, PROJECT/ENDPOINT, name, or the project's name when it has only one.",
        show_default=False,
    ),
]


SuspendAfter = Annotated[
    str | None,
    typer.Option(
        metavar="SECONDS|never|default",
        help="Stop the compute when nobody has used it for as long; the next connection starts another one.",
        show_default=False,
    ),
]


def _suspend_after_s(text: str | None) -> float | None:
    """0: never; None: as the installation is set."""
    match text:
        case None | "default":
            return None
        case "never":
            return 0.0
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter("a number of seconds, or never, or default", param_hint="--suspend-after") from None


Size = Annotated[
    str | None,
    typer.Option(
        metavar="CU|default",
        help="Compute units: 0.25, 0.5, 1, 2, 4 or 8, each 4 GiB of memory; from the next start on.",
        show_default=False,
    ),
]


def _size(text: str | None) -> str | None:
    """None: as the installation is set."""
    return None if text in (None, "default") else text


def _sizes(endpoint: Endpoint) -> str:
    text = "the installation's" if endpoint.size is None else f"{endpoint.size.value} CU"
    if endpoint.instance_id is not None and endpoint.running_size != endpoint.size:
        running = "the installation's" if endpoint.running_size is None else f"{endpoint.running_size.value} CU"
        text += f" from its next start on; it runs with {running}"
    return text


def _crashes(endpoint: Endpoint) -> str:
    if not endpoint.crashes:
        return "none"
    text = f"{endpoint.crashes} in a row"
    return text if endpoint.next_start_at is None else f"{text}; next start {endpoint.next_start_at:%H:%M:%S} UTC"


def _follows(endpoint: Endpoint) -> str:
    if endpoint.replay_lsn is None or endpoint.lag_bytes is None:
        return "yes" if endpoint.follows else "no"
    return f"is at {endpoint.replay_lsn}, {endpoint.lag_bytes} bytes of WAL behind"


def _suspends(endpoint: Endpoint) -> str:
    return f"after {endpoint.suspend_after_s:g} s without use" if endpoint.suspend_after_s else "never"


@dataclass(frozen=True, slots=True)
class CreatedConnection:
    """A new endpoint and how to reach it: the one time that its password is shown."""

    endpoint: CreatedEndpoint
    connection: Connection
    saved_as: Path | None
    """None: a replica whose password is not known here."""

    def as_dict(self) -> dict[str, Any]:
        endpoint = self.endpoint.model_dump(mode="json", exclude={"password"})
        saved_as = None if self.saved_as is None else str(self.saved_as)
        return {"endpoint": endpoint, "dsn": self.connection.dsn, "saved_as": saved_as}

    def text(self, project: Project) -> str:
        name = project.name if self.endpoint.name == "main" else f"{project.name}/{self.endpoint.name}"
        shown = f"project {project.project_id}, endpoint {self.endpoint.endpoint_id}\n\n{self.connection.dsn}\n\n"
        if self.saved_as is None:
            return shown + "Its password is that of the endpoint that writes to its branch."
        return shown + f"This is shown once. Connect with: keylake psql {shlex.quote(printable(name))}"


async def make_endpoint(
    client: KeylakeClient,
    home: Path | None,
    project: Project,
    timeline: Timeline,
    name: str,
    *,
    read_only_at: PointInTime | None = None,
    follows: bool = False,
    suspend_after_s: float | None = None,
    size: EndpointSize | None = None,
) -> CreatedConnection:
    """Make it and save its password for `keylake psql`."""
    from pydantic import SecretStr

    from keylake.connections import SavedConnection

    endpoint = await client.create_endpoint(
        timeline, name, read_only_at=read_only_at, follows=follows, suspend_after_s=suspend_after_s, size=size
    )
    if follows:
        password = await _password_of(client, home_dir(home), timeline)
        if not password:
            return CreatedConnection(endpoint, client.connection(endpoint), None)
        endpoint = endpoint.model_copy(update={"password": password})
    saved_as = SavedConnection(
        endpoint_id=endpoint.endpoint_id,
        endpoint_name=endpoint.name,
        project_id=project.project_id,
        project_name=project.name,
        user=endpoint.user,
        database=endpoint.database,
        password=SecretStr(endpoint.password),
    ).save(home_dir(home))
    return CreatedConnection(endpoint, client.connection(endpoint), saved_as)


async def _password_of(client: KeylakeClient, home: Path, timeline: Timeline) -> str:
    """That of the one endpoint that writes to it, if it was saved here. Empty: not known."""
    from keylake.connections import load_connections

    writing = {
        each.endpoint_id
        for each in await client.endpoints()
        if each.timeline_id == timeline.timeline_id and not each.follows and each.read_only_lsn is None
    }
    found = [each.password for each in load_connections(home) if each.endpoint_id in writing]
    return found[0].get_secret_value() if len(found) == len(writing) == 1 else ""


@app.command(
    "create",
    epilog=examples(
        "keylake endpoint create shop --name reports",
        "keylake endpoint create shop --name replica --follow",
        "keylake endpoint create shop --name yesterday --read-only-at 2026-11-26T10:00:00Z",
    ),
)
def create(
    project: Annotated[
        str | None,
        typer.Argument(help="Name or id of the project; not needed when there is only one.", show_default=False),
    ] = None,
    name: Annotated[str, typer.Option(help="A name for it.")] = "main",
    timeline: Annotated[
        str | None,
        typer.Option("--branch", "--timeline", help="Name or id of the branch.", show_default="main"),
    ] = None,
    read_only_at: Annotated[
        str | None,
        typer.Option(metavar="LSN|TIME", help="Show the branch as it was then, and refuse writes.", show_default=False),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="A read replica: follow what is committed to the branch, refuse writes.")
    ] = False,
    suspend_after: SuspendAfter = None,
    size: Size = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make an endpoint of a project, with storage if it has none yet, and print how to connect to it, once."""
    from keylake.cli import lookup, session
    from keylake.cli.branches import parse_point
    from keylake.cli.output import emit
    from shared.api.compute import CreateEndpoint

    point = None if read_only_at is None else parse_point(read_only_at)
    if follow and point is not None:
        raise typer.BadParameter("an endpoint stays at a point in time, or follows: give one of them")

    async def make(client: KeylakeClient) -> tuple[Project, CreatedConnection]:
        found = await lookup.project(client, project)
        if timeline is None and not await client.timelines(found.project_id):
            chosen = await client.create_timeline(found.project_id)
        else:
            chosen = await lookup.timeline(client, found.project_id, timeline)
        request = session.build(
            CreateEndpoint,
            timeline_id=chosen.timeline_id,
            name=name,
            suspend_after_s=_suspend_after_s(suspend_after),
            size=_size(size),
        )
        made = await make_endpoint(
            client,
            home,
            found,
            chosen,
            request.name,
            read_only_at=point,
            follows=follow,
            suspend_after_s=request.suspend_after_s,
            size=request.size,
        )
        return found, made

    found, made = session.ask(home, make)
    emit(made.as_dict(), as_json, lambda: made.text(found))


@app.command("list", epilog=examples("keylake endpoint list"))
def list_endpoints(home: Home = None, as_json: AsJson = False) -> None:
    """Every endpoint, its state and the kind of its volume."""
    from keylake.cli import session
    from keylake.cli.output import emit, table

    found = session.ask(home, lambda client: client.endpoints())
    emit(
        found,
        as_json,
        lambda: table(
            ("name", "id", "project", "state", "crashes", "volume", "term", "reason"),
            [
                (e.name, e.endpoint_id, e.project_id, e.state.value, _crashes(e), e.volume, e.term, e.reason)
                for e in found
            ],
        ),
    )


@app.command("show", epilog=examples("keylake endpoint show shop"))
def show(endpoint: EndpointName, home: Home = None, as_json: AsJson = False) -> None:
    """One endpoint, with the stages of its last start."""

    async def look(client: KeylakeClient, endpoint_id: EndpointId) -> Endpoint:
        return await client.endpoint(endpoint_id)

    _act(endpoint, home, as_json, look)


@app.command(
    "set",
    epilog=examples(
        "keylake endpoint set shop --suspend-after 60",
        "keylake endpoint set shop --suspend-after never  # stays up until it is stopped",
        "keylake endpoint set shop --size 2 && keylake endpoint stop shop",
    ),
)
def change(
    endpoint: EndpointName,
    suspend_after: SuspendAfter = None,
    size: Size = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Change what is given: a size for the next start, all else at once."""
    from keylake.cli import session
    from shared.api.compute import ChangeEndpoint

    changes: dict[str, object] = {}
    if suspend_after is not None:
        changes["suspend_after_s"] = _suspend_after_s(suspend_after)
    if size is not None:
        changes["size"] = _size(size)
    if not changes:
        raise typer.BadParameter("nothing to change: give --suspend-after or --size")
    request = session.build(ChangeEndpoint, **changes)
    _act(endpoint, home, as_json, lambda client, endpoint_id: client.change_endpoint(endpoint_id, request))


@app.command("start", epilog=examples("keylake endpoint start shop"))
def start(endpoint: EndpointName, home: Home = None, as_json: AsJson = False) -> None:
    """Start its compute now, instead of at the first connection."""
    _act(endpoint, home, as_json, lambda client, endpoint_id: client.start_endpoint(endpoint_id))


@app.command("stop", epilog=examples("keylake endpoint stop shop"))
def stop(endpoint: EndpointName, home: Home = None, as_json: AsJson = False) -> None:
    """Stop its compute gracefully. The next connection starts another one."""
    _act(endpoint, home, as_json, lambda client, endpoint_id: client.stop_endpoint(endpoint_id))


@app.command("kill", epilog=examples("keylake endpoint kill shop"))
def kill(endpoint: EndpointName, home: Home = None, as_json: AsJson = False) -> None:
    """End its compute as a crash would. What was committed is safe; the next connection starts another one."""
    _act(endpoint, home, as_json, lambda client, endpoint_id: client.kill_endpoint(endpoint_id))


@app.command("delete", epilog=examples("keylake endpoint delete shop/reports --yes"))
def delete(endpoint: EndpointName, yes: Yes = False, home: Home = None, as_json: AsJson = False) -> None:
    """Delete an endpoint for good: its compute is stopped, its connections end. The branch and its data stay."""
    from keylake.cli import lookup, session
    from keylake.cli.output import emit
    from keylake.connections import forget_connection

    found = session.ask(home, lambda client: lookup.endpoint(client, endpoint))
    if not yes:
        running = f", which is {found.state.value}" if found.state.value != "STOPPED" else ""
        typer.confirm(
            f"Delete the endpoint {printable(found.name)!r} ({found.endpoint_id}){running}?", abort=True, err=True
        )
    session.ask(home, lambda client: client.delete_endpoint(found.endpoint_id))
    forget_connection(home_dir(home), found.endpoint_id)
    emit({"deleted": found}, as_json, lambda: f"endpoint {found.endpoint_id} is deleted; its branch keeps the data")


def _act(
    text: str, home: Path | None, as_json: bool, action: Callable[[KeylakeClient, EndpointId], Awaitable[Endpoint]]
) -> None:
    from rich.console import Group

    from keylake.cli import lookup, session
    from keylake.cli.output import emit, facts, table

    async def act(client: KeylakeClient) -> Endpoint:
        found = await lookup.endpoint(client, text)
        return await action(client, found.endpoint_id)

    after = session.ask(home, act)
    emit(
        after,
        as_json,
        lambda: Group(
            facts(
                [
                    ("name", after.name),
                    ("id", after.endpoint_id),
                    ("project", after.project_id),
                    ("branch", after.timeline_id),
                    ("read-only at", after.read_only_lsn or "no"),
                    ("follows", _follows(after)),
                    ("state", after.state.value),
                    ("reason", after.reason),
                    ("crashes", _crashes(after)),
                    ("volume", after.volume),
                    ("boot key made", after.boot_key_made_at),
                    ("term", after.term),
                    ("started at", after.start_lsn),
                    ("user", after.user),
                    ("database", after.database),
                    ("suspends", _suspends(after)),
                    ("pages fetched to start", "all" if after.pages_at_start is None else after.pages_at_start),
                    ("size", _sizes(after)),
                ]
            ),
            table(("stage of the start", "seconds"), [(s.stage, s.seconds) for s in after.stages]),
        ),
    )
