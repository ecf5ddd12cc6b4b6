"""`keylake drill`: take a key away on a live cluster, on purpose, and get a report of what came of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from keylake.cli.common import AsJson, Home, Yes, examples, group, home_dir

if TYPE_CHECKING:
    from keylake.client import Connection, KeylakeClient
    from keylake.cluster import Customer
    from keylake.drill.report import DrillReport
    from keylake.drill.stage import Stage
    from shared.api.keymanager import KeyConfiguration, Project

app = group("Drills on a live cluster: take a key away on purpose, and get a report of what came of it.")

OWN: Final = "drill"
"""Name of the workspace, the key configuration and the project that drills make for themselves."""
_TPCB_CLIENTS: Final = 4

ProjectOption = Annotated[
    str | None,
    typer.Option(
        help="Name or id of a project to run on; one of the drills' own unless given. Its clients feel it.",
        show_default=False,
    ),
]
While = Annotated[
    Literal["pgbench"] | None,
    typer.Option("--while", help="What runs meanwhile; one client that reads unless given.", show_default=False),
]
WhileLoad = Annotated[bool, typer.Option("--while-load", help="The same as --while pgbench.")]
Clients = Annotated[int, typer.Option(help="Of the load.", min=1, max=100)]
Hold = Annotated[float, typer.Option(help="Seconds that it stays like that.", min=0.5, max=3600)]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Directory for report.json and report.html; [bold]drills/[/bold] in the home unless given.",
        show_default=False,
        file_okay=False,
    ),
]


@app.command(
    "revocation",
    epilog=examples(
        "keylake drill revocation",
        "keylake drill revocation --while pgbench --clients 8",
        "keylake drill revocation --project shop --yes --json | jq .passed",
    ),
)
def revocation(
    project: ProjectOption = None,
    while_: While = None,
    while_load: WhileLoad = False,
    clients: Clients = _TPCB_CLIENTS,
    hold: Hold = 3.0,
    out: Out = None,
    yes: Yes = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """The customer disables the key, and enables it again.

    Ends with exit code 0 only if every promise was kept: sealed within the bound, no answer after that, everything
    back, nothing lost.
    """
    from keylake.drill import revocation as drill

    _drill("revocation", drill.run, project, while_, while_load, clients, hold, out, yes, home, as_json)


@app.command(
    "outage",
    epilog=examples(
        "keylake drill outage",
        "keylake drill outage --grace 10 --while pgbench",
        "keylake drill outage --project shop --yes",
    ),
)
def outage(
    project: ProjectOption = None,
    while_: While = None,
    while_load: WhileLoad = False,
    clients: Clients = _TPCB_CLIENTS,
    hold: Hold = 3.0,
    grace: Annotated[
        float, typer.Option(help="Outage grace of the drills' own key configuration, in seconds.", min=0, max=7200)
    ] = 4.0,
    out: Out = None,
    yes: Yes = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """The KMS stops answering for longer than the outage grace, and answers again.

    Only the simulated cloud can be told to. It goes down for every project under one of its keys.
    """
    from keylake.drill import outage as drill

    _drill("outage", drill.run, project, while_, while_load, clients, hold, out, yes, home, as_json, grace_s=grace)


@app.command(
    "rotation",
    epilog=examples(
        "keylake drill rotation",
        "keylake drill rotation --while pgbench --json | jq .promises",
        "keylake drill rotation --through azure.json --through google.json  # and back: docs/key-configurations.md",
    ),
)
def rotation(
    project: ProjectOption = None,
    through: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSON file with another key, in any cloud, that everything is moved to. May be repeated: to one after "
            "the other, and back.",
            show_default=False,
            dir_okay=False,
        ),
    ] = None,
    while_: While = None,
    while_load: WhileLoad = False,
    clients: Clients = _TPCB_CLIENTS,
    hold: Hold = 3.0,
    out: Out = None,
    yes: Yes = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """The customer's key gets a new version, the project a new KEK, every data key is wrapped again, and then all data
    sealed anew.

    No client may notice.
    """
    from functools import partial

    from keylake.cli.keys import key_from_file
    from keylake.drill import rotation as drill

    run = partial(drill.run, through=[key_from_file(each) for each in through or ()])
    _drill("rotation", run, project, while_, while_load, clients, hold, out, yes, home, as_json)


@app.command(
    "shred",
    epilog=examples(
        "export KEYLAKE_TOKEN_ASKS=$(keylake token create --role security-admin --ttl 1h --for alice)",
        "export KEYLAKE_TOKEN_APPROVES=$(keylake token create --role security-admin --ttl 1h --for bob)",
        "keylake drill shred",
        "keylake drill shred --attest-backups 'none were made of this cluster' --attest-key-copies 'never exported'",
    ),
)
def shred(
    while_: While = None,
    while_load: WhileLoad = False,
    clients: Clients = _TPCB_CLIENTS,
    hold: Hold = 3.0,
    backups: Annotated[
        str | None,
        typer.Option("--attest-backups", help="As of `keylake project verify-erasure`.", show_default=False),
    ] = None,
    key_copies: Annotated[
        str | None,
        typer.Option("--attest-key-copies", help="As of `keylake project verify-erasure`.", show_default=False),
    ] = None,
    stopped_projects: Annotated[
        str | None,
        typer.Option("--attest-stopped-projects", help="As of `keylake project verify-erasure`.", show_default=False),
    ] = None,
    out: Out = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """A project and a key are made, filled, and destroyed by two people; then its erasure is verified.

    It takes two people's tokens, as the variables KEYLAKE_TOKEN_ASKS and KEYLAKE_TOKEN_APPROVES. Without the first two
    attestations, which are the word of the one who approves, the drill ends in SHREDDED, and checks that nobody says
    ERASED; the third is needed while other projects of the account are suspended or revoked. No project but its own is
    touched.
    """
    import contextlib
    import os

    from keylake.cli import session
    from keylake.client import KeylakeClient
    from keylake.drill import shred as drill
    from shared.api.shredding import Attestation
    from shared.auth import BearerToken
    from shared.errors import InvalidInputError
    from shared.roles import APPROVES_VARIABLE, ASKS_VARIABLE

    words = {"backups": backups, "key-copies": key_copies, "stopped-projects": stopped_projects}
    said = [session.build(Attestation, subject=subject, text=text) for subject, text in words.items() if text]
    tokens = [os.environ.get(name) for name in (ASKS_VARIABLE, APPROVES_VARIABLE)]
    if not all(tokens):
        raise InvalidInputError(
            f"this drill takes two people: {ASKS_VARIABLE} and {APPROVES_VARIABLE} are their tokens, of `keylake token "
            "create --role security-admin`"
        )

    async def run(stage: Stage, hold_s: float) -> None:
        async with contextlib.AsyncExitStack() as stack:
            asks, approves = [
                await stack.enter_async_context(
                    KeylakeClient(stage.client.addresses, stage.client.ca_certificate, BearerToken(token or ""))
                )
                for token in tokens
            ]
            await drill.run(stage, drill.People(asks, approves, said), hold_s)

    _drill("shred", run, None, while_, while_load, clients, hold, out, True, home, as_json, disposable=True)


def _drill(
    kind: str,
    run: Callable[[Stage, float], Awaitable[None]],
    project: str | None,
    while_: str | None,
    while_load: bool,
    clients: int,
    hold_s: float,
    out: Path | None,
    yes: bool,
    home: Path | None,
    as_json: bool,
    *,
    grace_s: float = 0.0,
    disposable: bool = False,
) -> None:
    import asyncio

    from keylake.cli.output import emit, notes, table
    from keylake.drill.page import page
    from keylake.drill.stage import Stage

    _confirm(kind, project, home, yes)
    console = notes()
    load_clients = clients if while_ is not None or while_load else 0

    async def job() -> DrillReport:
        client, customer = await _cluster(home)
        try:
            found, configuration, connection = await (
                _disposable(client, customer) if disposable else _project(client, customer, project, grace_s, home)
            )

            def progress(text: str) -> None:
                console.print(text, markup=False)

            stage = Stage(kind, client, customer, found, configuration, connection, progress, load_clients)
            await run(stage, hold_s)
            return stage.report()
        finally:
            await client.aclose()
            customer.close()

    report = asyncio.run(job())
    directory = out or home_dir(home) / "drills" / f"{report.started_at:%Y%m%dT%H%M%SZ}-{kind}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(report.model_dump_json(indent=2))
    (directory / "report.html").write_text(page(report))
    if report.receipt is not None:
        (directory / "receipt.json").write_text(report.receipt)
    console.print(f"report: {directory / 'report.html'}", markup=False, soft_wrap=True)
    emit(
        report,
        as_json,
        lambda: table(
            ("promise", "limit", "measured", ""),
            [(each.what, each.limit, each.measured, "ok" if each.kept else "broken") for each in report.promises],
        ),
    )
    if not report.passed:
        raise typer.Exit(1)


def _confirm(kind: str, project: str | None, home: Path | None, yes: bool) -> None:
    """A drill on somebody's project, or on everybody's cloud, has to be wanted."""
    if yes:
        return
    if project is not None:
        what = {"rotation": "rotates the keys of"}.get(kind, "stops")
        typer.confirm(f"This drill {what} {project!r} while its clients are at work. Go on?", abort=True, err=True)
    elif kind == "outage" and (others := _others(home)):
        names = ", ".join(others[:5]) + (" …" if len(others) > 5 else "")
        typer.confirm(
            f"This drill takes the cloud down for {len(others)} other projects, too: {names}. Go on?",
            abort=True,
            err=True,
        )


def _others(home: Path | None) -> list[str]:
    from keylake.cli import session
    from keylake.place import inside

    if inside() is not None:
        return []  # the operator's container: the drill asks about nothing there
    return [each.name for each in session.ask(home, lambda client: client.projects()) if each.name != OWN]


async def _cluster(home: Path | None) -> tuple[KeylakeClient, Customer]:
    """The cluster of the home, or that of the containers when this is their operator's."""
    import asyncio

    from keylake.cli import session

    place = session.place(home)
    customer = await asyncio.to_thread(place.customer)
    return session.client_of(place), customer


async def _project(
    client: KeylakeClient, customer: Customer, project: str | None, grace_s: float, home: Path | None
) -> tuple[Project, KeyConfiguration, Connection]:
    """The project with this name, or the drills' own, with the connection that was saved when it was made."""
    from keylake.cli import lookup
    from keylake.connections import load_connections
    from keylake.place import inside
    from shared.api.keymanager import ChangeKeyConfiguration
    from shared.errors import InvalidInputError, NotFoundError

    if inside() is not None:  # no home here, so no passwords of others either
        if project is not None:
            raise InvalidInputError("in the operator's container a drill runs on a project of its own")
        return await _make(client, customer, grace_s, None)
    saved = {each.project_id: each for each in load_connections(home_dir(home))}
    if project is None:
        mine = [each for each in await client.projects() if each.name == OWN and each.project_id in saved]
        if not mine:
            return await _make(client, customer, grace_s, home_dir(home))
        found = mine[0]
    else:
        found = await lookup.project(client, project)
    configuration = await lookup.key_configuration(client, str(found.key_configuration_id))
    if project is None and configuration.outage_grace_s != grace_s:
        change = ChangeKeyConfiguration(outage_grace_s=grace_s)
        configuration = await client.change_key_configuration(configuration.key_configuration_id, change)
    if found.project_id not in saved:
        raise NotFoundError(
            f"no password of an endpoint of {found.name!r} is saved in this home; make one with `keylake endpoint "
            f"create {found.project_id}`"
        )
    proxy = client.addresses.proxy
    connection = saved[found.project_id].connection(proxy.host, proxy.port, client.ca_certificate)
    return found, configuration, connection


async def _make(
    client: KeylakeClient, customer: Customer, grace_s: float, home: Path | None
) -> tuple[Project, KeyConfiguration, Connection]:
    """A project of the drills' own, under a key of its own. `home`: where its password is saved; None: nowhere."""
    import secrets

    from keylake.cli.endpoints import make_endpoint

    taken = {each.name for each in await client.key_configurations()} | {w.name for w in await client.workspaces()}
    name = OWN if OWN not in taken else f"{OWN}-{secrets.token_hex(3)}"
    made, configuration = await _make_project(client, customer, grace_s, name, OWN)
    timeline = await client.create_timeline(made.project_id)
    if home is not None:
        return made, configuration, (await make_endpoint(client, home, made, timeline, "main")).connection
    return made, configuration, client.connection(await client.create_endpoint(timeline))


async def _disposable(client: KeylakeClient, customer: Customer) -> tuple[Project, KeyConfiguration, Connection]:
    """A project that nobody will miss, under a key that nothing else is under. Nobody keeps its password."""
    import secrets

    name = f"{OWN}-shred-{secrets.token_hex(3)}"
    made, configuration = await _make_project(client, customer, 0.0, name, name)
    timeline = await client.create_timeline(made.project_id)
    return made, configuration, client.connection(await client.create_endpoint(timeline))


async def _make_project(
    client: KeylakeClient, customer: Customer, grace_s: float, name: str, project_name: str
) -> tuple[Project, KeyConfiguration]:
    """In a workspace and under a key of its own, both called `name`."""
    from shared.api.keymanager import AwsKey, CreateKeyConfiguration

    bootstrap = customer.bootstrap
    key = AwsKey(
        key_arn=await customer.create_key("CMK of Keylake's drills"),
        role_arn=bootstrap.role_arn,
        external_id=bootstrap.external_id,
    )
    configuration = await client.create_key_configuration(
        CreateKeyConfiguration(name=name, key=key, outage_grace_s=grace_s)
    )
    workspace = await client.create_workspace(name, configuration.key_configuration_id)
    return await client.create_project(workspace.workspace_id, project_name), configuration
