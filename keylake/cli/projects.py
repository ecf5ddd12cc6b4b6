"""`keylake project`: databases, and what their keys have been through."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keylake.cli import encryption, shredding
from keylake.cli.common import AsJson, Home, examples, group

if TYPE_CHECKING:
    from keylake.client import KeylakeClient
    from shared.api.compute import Endpoint, Timeline
    from shared.api.keymanager import Project, Revocation
    from shared.ids import ProjectId

app = group("Projects: databases, each under key encryption keys of its own.")

ProjectName = Annotated[str, typer.Argument(metavar="PROJECT", help="Name or id.", show_default=False)]


@app.command(
    "create",
    epilog=examples(
        "keylake project create shop",
        "keylake project create shop --workspace eu --json",
        "keylake project create shop --key-config eu-key  # under a key of its own, not its workspace's",
        "keylake project create shop --bare  # without storage and endpoint",
    ),
)
def create(
    name: Annotated[str, typer.Argument(help="A name for it.", show_default=False)],
    workspace: Annotated[
        str | None,
        typer.Option(help="Name or id of the workspace; not needed when there is only one.", show_default=False),
    ] = None,
    key_config: Annotated[
        str | None,
        typer.Option(
            help="Name or id of a key configuration of its own; its workspace's unless given.", show_default=False
        ),
    ] = None,
    bare: Annotated[bool, typer.Option("--bare", help="Make neither storage nor an endpoint.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make a project with storage and an endpoint, and print how to connect to it, once.

    The password is saved in the home for `keylake psql`; Keylake itself keeps only a verifier of it.
    """
    from keylake.cli import lookup, session
    from keylake.cli.endpoints import CreatedConnection, make_endpoint
    from keylake.cli.output import emit
    from shared.api.keymanager import CreateProject
    from shared.errors import KeylakeError

    request = session.build(CreateProject, name=name)

    async def make(client: KeylakeClient) -> tuple[Project, CreatedConnection | None]:
        found = await lookup.workspace(client, workspace)
        own = None if key_config is None else await lookup.key_configuration(client, key_config)
        key_configuration_id = None if own is None else own.key_configuration_id
        project = await client.create_project(found.workspace_id, request.name, key_configuration_id)
        if bare:
            return project, None
        try:
            timeline = await client.create_timeline(project.project_id)
            return project, await make_endpoint(client, home, project, timeline, "main")
        except KeylakeError as error:
            raise type(error)(
                f"{error}; the project exists: go on with `keylake endpoint create {project.project_id}`"
            ) from None

    project, connection = session.ask(home, make)
    value = {"project": project} | ({} if connection is None else connection.as_dict())
    emit(value, as_json, lambda: str(project.project_id) if connection is None else connection.text(project))


@app.command("move-key", epilog=examples("keylake project move-key shop --key-config eu-key"))
def move_key(
    project: ProjectName,
    key_config: Annotated[
        str, typer.Option(help="Name or id of the key configuration to move to.", show_default=False)
    ],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Keep a project under another key configuration from now on, in any cloud, without downtime.

    Both keys must be usable: what the old one wraps can be opened by it alone.
    """
    from keylake.cli import lookup, session
    from keylake.cli.output import emit, facts

    async def move(client: KeylakeClient) -> Project:
        found = await lookup.project(client, project)
        target = await lookup.key_configuration(client, key_config)
        return await client.move_project(found.project_id, target.key_configuration_id)

    moved = session.ask(home, move)
    emit(moved, as_json, lambda: facts([("project", moved.name), ("key configuration", moved.key_configuration_id)]))


@app.command("list", epilog=examples("keylake project list", "keylake project list --json | jq '.[].state'"))
def list_projects(home: Home = None, as_json: AsJson = False) -> None:
    """Every project, and whether its key may be used."""
    from keylake.cli import session
    from keylake.cli.output import emit, table

    found = session.ask(home, lambda client: client.projects())
    emit(
        found,
        as_json,
        lambda: table(
            ("name", "id", "key", "reason", "workspace", "created"),
            [(p.name, p.project_id, p.state.value, p.state_reason, p.workspace_id, p.created_at) for p in found],
        ),
    )


@app.command("show", epilog=examples("keylake project show shop"))
def show(project: ProjectName, home: Home = None, as_json: AsJson = False) -> None:
    """One project: its keys, timelines and endpoints."""
    from rich.console import Group

    from keylake.cli import lookup, session
    from keylake.cli.output import emit, facts, table

    async def look(client: KeylakeClient) -> tuple[Project, list[Timeline], list[Endpoint]]:
        found = await lookup.project(client, project)
        timelines = await client.timelines(found.project_id)
        return found, timelines, [e for e in await client.endpoints() if e.project_id == found.project_id]

    found, timelines, endpoints = session.ask(home, look)
    emit(
        {"project": found, "timelines": timelines, "endpoints": endpoints},
        as_json,
        lambda: Group(
            facts(
                [
                    ("name", found.name),
                    ("id", found.project_id),
                    ("workspace", found.workspace_id),
                    ("account", found.account_id),
                    ("key configuration", found.key_configuration_id),
                    ("key", found.state.value),
                    ("reason", found.state_reason),
                    ("created", found.created_at),
                ]
            ),
            table(
                ("KEK", "version", "wraps", "CMK version", "created"),
                [(k.kek_id, k.kek_version, k.wraps, k.cmk_key_version, k.created_at) for k in found.keks],
            ),
            table(
                ("branch", "id", "from", "starts at", "created"),
                [(t.name, t.timeline_id, t.ancestor_timeline_id or "", t.start_lsn, t.created_at) for t in timelines],
            ),
            table(
                ("endpoint", "id", "state", "volume", "reason"),
                [(e.name, e.endpoint_id, e.state.value, e.volume, e.reason) for e in endpoints],
            ),
        ),
    )


@app.command("revalidate", epilog=examples("keylake project revalidate shop"))
def revalidate(project: ProjectName, home: Home = None, as_json: AsJson = False) -> None:
    """Ask the customer's KMS now, instead of at the next probe."""
    _act(project, home, as_json, lambda client, project_id: client.revalidate(project_id))


@app.command(
    "rotate-key",
    epilog=examples(
        "keylake project rotate-key shop",
        "keylake project rotate-key shop --from-version 3  # again and again: it makes version 4 once",
        "keylake project rotate-key shop --dry-run",
    ),
)
def rotate_key(
    project: ProjectName,
    from_version: Annotated[
        int | None,
        typer.Option(
            help="The version that the new one is to follow. When there is a newer one already, nothing is changed.",
            min=1,
            show_default="the current one",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only have the KMS make a KEK, which is thrown away.")
    ] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make a new version of the project's KEK, for all data keys from now on. The older versions stay."""
    _act(
        project,
        home,
        as_json,
        lambda client, project_id: client.rotate_kek(project_id, from_version, dry_run=dry_run),
    )


@app.command("revoke", epilog=examples("keylake project revoke shop --reason 'stolen laptop'"))
def revoke(
    project: ProjectName,
    reason: Annotated[str, typer.Option(help="Why; it goes into the audit log.")] = "by the operator",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Stop all use of a project's keys by an operator's word, without the KMS. `restore` lifts it."""
    from keylake.cli import session
    from shared.api.keymanager import RevokeRequest

    request = session.build(RevokeRequest, reason=reason)
    _act(project, home, as_json, lambda client, project_id: client.revoke(project_id, request.reason))


@app.command("restore", epilog=examples("keylake project restore shop"))
def restore(project: ProjectName, home: Home = None, as_json: AsJson = False) -> None:
    """Lift an operator's revocation. The KMS still has to allow the key's use."""
    _act(project, home, as_json, lambda client, project_id: client.restore(project_id))


def _act(
    text: str, home: Path | None, as_json: bool, action: Callable[[KeylakeClient, ProjectId], Awaitable[Project]]
) -> None:
    from keylake.cli import lookup, session
    from keylake.cli.output import emit, facts

    async def act(client: KeylakeClient) -> Project:
        found = await lookup.project(client, text)
        return await action(client, found.project_id)

    after = session.ask(home, act)
    emit(
        after,
        as_json,
        lambda: facts(
            [
                ("project", after.name),
                ("key", after.state.value),
                ("reason", after.state_reason),
                ("KEK version", max(kek.kek_version for kek in after.keks)),
            ]
        ),
    )


@app.command("revocations", epilog=examples("keylake project revocations shop"))
def revocations(project: ProjectName, home: Home = None, as_json: AsJson = False) -> None:
    """What became of everybody who held the project's keys, revocation by revocation, with times."""
    from rich.console import Group

    from keylake.cli import lookup, session
    from keylake.cli.output import emit, table

    async def look(client: KeylakeClient) -> list[Revocation]:
        return await client.revocations((await lookup.project(client, project)).project_id)

    found = session.ask(home, look)

    def heading(revocation: Revocation) -> str:
        sealed = "not sealed yet"
        if revocation.sealed_after_s is not None:
            sealed = f"sealed after {revocation.sealed_after_s:.3f} s"
        ids = revocation.revocation_id
        if revocation.restoration_id is not None:
            ids += f", ended by {revocation.restoration_id}"
        what = f"{revocation.state.value}: {revocation.reason}, {sealed}"
        return f"{revocation.detected_at:%Y-%m-%d %H:%M:%SZ}  {what}\n{ids}"

    def columns(revocation: Revocation) -> list[tuple[object, ...]]:
        return [
            (i.node_id, i.role.value, i.outcome, i.after_s, ", ".join(f"{k} {v:.3f} s" for k, v in i.steps_s.items()))
            for i in revocation.instances
        ]

    emit(
        found,
        as_json,
        lambda: (
            Group(
                *(table(("holder", "role", "outcome", "seconds", "steps"), columns(r), title=heading(r)) for r in found)
            )
            if found
            else "no revocations; `keylake project revalidate` has the customer's KMS asked now"
        ),
    )


encryption.add_commands(app)
shredding.add_commands(app)
