"""`keylake branch`: branches of a project's data, from now or from any point of the past that is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from keylake.cli.common import AsJson, Home, Yes, examples, group, home_dir

if TYPE_CHECKING:
    from collections.abc import Mapping

    from keylake.cli.endpoints import CreatedConnection
    from keylake.client import KeylakeClient
    from shared.api.compute import Endpoint, Timeline
    from shared.api.keymanager import Project
    from shared.ids import TimelineId
    from shared.point_in_time import PointInTime

app = group("Branches: copies of a database that cost nothing until something changes.")

BranchName = Annotated[str, typer.Argument(metavar="BRANCH", help="Name or id.", show_default=False)]
OfProject = Annotated[
    str | None,
    typer.Option("--project", help="Name or id of the project; not needed when there is only one.", show_default=False),
]


def parse_point(text: str) -> PointInTime:
    """Raises InvalidInputError."""
    from shared.errors import InvalidInputError
    from shared.point_in_time import PointInTime

    try:
        return PointInTime.parse(text)
    except ValueError as error:
        raise InvalidInputError(f"{text!r}: {error}") from None


@app.command(
    "create",
    epilog=examples(
        "keylake branch create dev --project shop",
        "keylake branch create before-the-drop --project shop --at 2026-11-26T10:00:00Z",
        "keylake branch create fix --project shop --from dev --at 0/18915F8",
        "keylake branch create partner --project shop --key-config partners-key  # under a key of its own",
        "keylake psql shop/dev  # each branch has an endpoint of its name",
    ),
)
def create(
    name: Annotated[str, typer.Argument(help="A name for it.", show_default=False)],
    project: OfProject = None,
    source: Annotated[
        str | None, typer.Option("--from", help="Name or id of the branch to make it from.", show_default="main")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(metavar="LSN|TIME", help="As it was then; with what is committed now, if not given."),
    ] = None,
    key_config: Annotated[
        str | None,
        typer.Option(
            help="Name or id of a key configuration of its own: the branch becomes a project, PROJECT/NAME.",
            show_default=False,
        ),
    ] = None,
    bare: Annotated[bool, typer.Option("--bare", help="Make no endpoint.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make a branch and an endpoint on it, and print how to connect to it, once. Copies no data.

    What is written to a branch later, the branch that it was made from never sees, nor the other way round. With a key
    configuration of its own, what is written to it is kept under that key; to read it takes both keys.
    """
    from keylake.cli import lookup, session
    from keylake.cli.endpoints import make_endpoint
    from keylake.cli.output import emit

    point = None if at is None else parse_point(at)

    async def make(client: KeylakeClient) -> tuple[Project, Timeline, CreatedConnection | None]:
        found = await lookup.project(client, project)
        parent = await lookup.timeline(client, found.project_id, source)
        if key_config is None:
            branch = await client.create_branch(parent, name, point)
        else:
            own = await lookup.key_configuration(client, key_config)
            found = await client.create_project(found.workspace_id, f"{found.name}/{name}", own.key_configuration_id)
            branch = await client.create_branch(parent, "main", point, project_id=found.project_id)
        return found, branch, None if bare else await make_endpoint(client, home, found, branch, branch.name)

    found, branch, made = session.ask(home, make)
    value = {"branch": branch} | ({} if made is None else made.as_dict())
    emit(value, as_json, lambda: str(branch.timeline_id) if made is None else made.text(found))


@app.command("list", epilog=examples("keylake branch list --project shop"))
def list_branches(project: OfProject = None, home: Home = None, as_json: AsJson = False) -> None:
    """Every branch of a project, and which one it was made from, where."""
    from keylake.cli import lookup, session
    from keylake.cli.output import emit, table

    async def look(client: KeylakeClient) -> list[Timeline]:
        return await client.timelines((await lookup.project(client, project)).project_id)

    found = session.ask(home, look)
    names = {t.timeline_id: t.name for t in found}
    emit(
        found,
        as_json,
        lambda: table(
            ("name", "id", "from", "at", "created"),
            [(t.name, t.timeline_id, _parent(t, names), t.start_lsn, t.created_at) for t in found],
        ),
    )


@app.command("show", epilog=examples("keylake branch show dev --project shop"))
def show(branch: BranchName, project: OfProject = None, home: Home = None, as_json: AsJson = False) -> None:
    """One branch, with its endpoints and the branches that were made from it."""
    from rich.console import Group

    from keylake.cli import lookup, session
    from keylake.cli.output import emit, facts, table

    async def look(client: KeylakeClient) -> tuple[Timeline, list[Timeline], list[Endpoint]]:
        found = await lookup.project(client, project)
        chosen = await lookup.timeline(client, found.project_id, branch)
        everyone = await client.timelines(found.project_id)
        return chosen, everyone, [e for e in await client.endpoints() if e.timeline_id == chosen.timeline_id]

    chosen, everyone, endpoints = session.ask(home, look)
    children = [t for t in everyone if t.ancestor_timeline_id == chosen.timeline_id]
    emit(
        {"branch": chosen, "branches": children, "endpoints": endpoints},
        as_json,
        lambda: Group(
            facts(
                [
                    ("name", chosen.name),
                    ("id", chosen.timeline_id),
                    ("project", chosen.project_id),
                    ("from", _parent(chosen, {t.timeline_id: t.name for t in everyone})),
                    ("at", chosen.start_lsn),
                    ("created", chosen.created_at),
                ]
            ),
            table(
                ("branch made from it", "id", "at", "created"),
                [(t.name, t.timeline_id, t.start_lsn, t.created_at) for t in children],
            ),
            table(
                ("endpoint", "id", "state", "read-only at"),
                [(e.name, e.endpoint_id, e.state.value, e.read_only_lsn or "") for e in endpoints],
            ),
        ),
    )


@app.command("delete", epilog=examples("keylake branch delete dev --project shop --yes"))
def delete(
    branch: BranchName, project: OfProject = None, yes: Yes = False, home: Home = None, as_json: AsJson = False
) -> None:
    """Delete a branch with its endpoints, for good. Refused while other branches were made from it."""
    from keylake.cli import lookup, session
    from keylake.cli.output import emit
    from keylake.connections import forget_connection

    async def find(client: KeylakeClient) -> Timeline:
        found = await lookup.project(client, project)
        return await lookup.timeline(client, found.project_id, branch)

    chosen = session.ask(home, find)
    if not yes:
        typer.confirm(f"Delete the branch {chosen.name!r} with all that was written to it?", abort=True, err=True)

    async def remove(client: KeylakeClient) -> list[Endpoint]:
        endpoints = [e for e in await client.endpoints() if e.timeline_id == chosen.timeline_id]
        await client.delete_branch(chosen)
        return endpoints

    gone = session.ask(home, remove)
    for endpoint in gone:
        forget_connection(home_dir(home), endpoint.endpoint_id)
    emit({"deleted": chosen, "endpoints": gone}, as_json, lambda: f"branch {chosen.timeline_id} is deleted")


def _parent(timeline: Timeline, names: Mapping[TimelineId, str]) -> str:
    if timeline.ancestor_timeline_id is None:
        return ""
    return names.get(timeline.ancestor_timeline_id, str(timeline.ancestor_timeline_id))
