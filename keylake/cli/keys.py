"""`keylake key-config` and `keylake workspace`: which key Keylake uses, and what is kept under it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from keylake.cli.common import AsJson, Home, examples, group

if TYPE_CHECKING:
    from rich.console import RenderableType

    from keylake.client import KeylakeClient
    from shared.api.keymanager import KeyConfiguration, Project, Replacement, Rewrap, Workspace
    from shared.cmk import CmkKey
    from shared.ids import KeyConfigurationId

_PROGRESS_POLL_S: Final = 0.2

FromFile = Annotated[
    Path | None,
    typer.Option(
        "--from",
        help="JSON file with a key of any provider: docs/key-configurations.md.",
        show_default=False,
        dir_okay=False,
    ),
]

configurations = group("Which key of the customer's cloud Keylake uses, and as whom.")
workspaces = group("Workspaces: projects of one workspace are kept under one key.")


@configurations.command(
    "create",
    epilog=examples(
        "keylake key-config create main --key my-key",
        "keylake key-config create main --key my-key --outage-grace 300  # go on for 5 minutes without the KMS",
        "keylake key-config create azure --from key.json  # a key in any cloud: docs/key-configurations.md",
    ),
)
def create_configuration(
    name: Annotated[str, typer.Argument(help="A name for it.", show_default=False)],
    key: Annotated[
        str | None,
        typer.Option(
            help="Description, id or ARN of a key in the customer's cloud; not needed when it has only one.",
            show_default=False,
        ),
    ] = None,
    from_file: FromFile = None,
    outage_grace: Annotated[
        float, typer.Option(help="Seconds to go on when the KMS cannot be reached.", min=0, max=7200)
    ] = 0.0,
    probe_interval: Annotated[
        float, typer.Option(help="Seconds between two probes of the key.", min=0.1, max=3600)
    ] = 1.0,
    role_arn: Annotated[
        str | None,
        typer.Option(help="Role to use the key as; the local customer's role unless given.", show_default=False),
    ] = None,
    external_id: Annotated[
        str | None, typer.Option(help="External id that the role asks for.", show_default=False)
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Register a key. It is tried at once, with every kind of call that is ever made of it; a refusal names the
    permission that is missing.

    A key of the local customer's AWS account by --key; any other, in AWS, Azure Key Vault, Google Cloud KMS or OpenBao,
    by --from. docs/key-configurations.md says what the file holds, and what the key's owner must allow.
    """
    from keylake.cli import session
    from keylake.cli.output import emit
    from shared.api.keymanager import CreateKeyConfiguration
    from shared.errors import InvalidInputError

    if from_file is not None and not (key is role_arn is external_id is None):
        raise InvalidInputError("--from says everything about the key: no --key, --role-arn or --external-id with it")
    request = session.build(
        CreateKeyConfiguration,
        name=name,
        key=_any_key(key, from_file, home, role_arn, external_id),
        outage_grace_s=outage_grace,
        probe_interval_s=probe_interval,
    )
    made = session.ask(home, lambda client: client.create_key_configuration(request))
    emit(made, as_json, lambda: f"{made.key_configuration_id}  {made.state.value}")


@configurations.command(
    "set",
    epilog=examples(
        "keylake key-config set main --outage-grace 300  # go on for 5 minutes without the KMS",
        "keylake key-config set main --name eu --probe-interval 5",
    ),
)
def change_configuration(
    configuration: Annotated[str, typer.Argument(help="Name or id.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Another name.", show_default=False)] = None,
    outage_grace: Annotated[
        float | None,
        typer.Option(help="Seconds to go on when the KMS cannot be reached.", min=0, max=7200, show_default=False),
    ] = None,
    probe_interval: Annotated[
        float | None, typer.Option(help="Seconds between two probes of the key.", min=0.1, max=3600, show_default=False)
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Change what is given, at once. For another key: `keylake key-config replace`."""
    from keylake.cli import lookup, session
    from keylake.cli.output import emit, facts
    from shared.api.keymanager import ChangeKeyConfiguration

    request = session.build(
        ChangeKeyConfiguration, name=name, outage_grace_s=outage_grace, probe_interval_s=probe_interval
    )

    async def change(client: KeylakeClient) -> KeyConfiguration:
        found = await lookup.key_configuration(client, configuration)
        return await client.change_key_configuration(found.key_configuration_id, request)

    now = session.ask(home, change)
    emit(
        now,
        as_json,
        lambda: facts(
            [("name", now.name), ("outage grace, s", now.outage_grace_s), ("probe interval, s", now.probe_interval_s)]
        ),
    )


@configurations.command("list", epilog=examples("keylake key-config list", "keylake key-config list --json"))
def list_configurations(home: Home = None, as_json: AsJson = False) -> None:
    """Every key configuration, with what the last probe of its key said."""
    from keylake.cli import session
    from keylake.cli.output import emit, table

    found = session.ask(home, lambda client: client.key_configurations())
    emit(
        found,
        as_json,
        lambda: table(
            ("name", "id", "state", "last verdict", "last probe", "key"),
            [
                (c.name, c.key_configuration_id, c.state.value, c.last_verdict, c.last_probe_at, c.key.identifier)
                for c in found
            ],
        ),
    )


@configurations.command("show", epilog=examples("keylake key-config show main", "keylake key-config show main --json"))
def show_configuration(
    configuration: Annotated[
        str | None, typer.Argument(help="Name or id; not needed when there is only one.", show_default=False)
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """One key configuration, and how long after the customer's no the last data may be served, at worst."""
    from keylake.cli import lookup, session
    from keylake.cli.output import emit

    found = session.ask(home, lambda client: lookup.key_configuration(client, configuration))
    emit(found, as_json, lambda: _render_configuration(found))


def _render_configuration(found: KeyConfiguration) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from keylake.cli.output import facts, table

    bounds = table(
        ("the customer's no", "ends in", "found out, s", "reachable, s", "cut off, s", "keymanager stalled, s"),
        [
            (
                _CAUSES[case.cause.value],
                case.state.value,
                *map(_bound, (case.detection_s, case.reachable_s, case.partitioned_s, case.keymanager_stalled_s)),
            )
            for case in found.worst_cases
        ],
    )
    return Group(
        facts(
            [
                ("name", found.name),
                ("id", found.key_configuration_id),
                ("key", found.key.identifier),
                ("used as", found.key.principal),
                ("state", found.state.value),
                ("last verdict", found.last_verdict),
                ("last probe", found.last_probe_at),
                *_hold(found),
                ("probe interval, s", found.probe_interval_s),
                ("outage grace, s", found.outage_grace_s),
                *((work.kind.value, f"{work.done} of {work.total} KEKs") for work in found.work),
            ]
        ),
        Text("\nWorst case: until nothing is served any more, counted from when the KMS last could say yes"),
        bounds,
    )


def _hold(found: KeyConfiguration) -> list[tuple[str, str]]:
    hold = found.restore_hold
    if hold is None:
        return []
    text = f"{hold.left_s:.0f} of {hold.needed_s:g} s of nothing but yes: it was taken back soon {hold.flaps} times"
    return [("back after", text)]


_CAUSES: Final = {
    "denied": "denied: disabled, deletion scheduled, policy or role removed",
    "no_answer": "no answer: timeouts, 5xx, throttling",
    "flapping": "denials and missing answers in turn",
    "trust_withdrawn": "no new session is given",
    "operator": "an operator's revoke",
}


def _bound(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{seconds:.1f}"


@configurations.command(
    "rewrap",
    epilog=examples(
        "keylake key-config rewrap main --dry-run  # how many KEKs are under an older version of the CMK",
        "keylake key-config rewrap main",
    ),
)
def rewrap(
    configuration: Annotated[str, typer.Argument(help="Name or id.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Wrap every KEK under the CMK's current version now. It happens by itself, too, a little later."""
    from keylake.cli import lookup, session
    from keylake.cli.output import emit, facts

    async def ask(client: KeylakeClient) -> Rewrap:
        found = await lookup.key_configuration(client, configuration)
        asked = asyncio.create_task(client.rewrap(found.key_configuration_id, dry_run=dry_run))
        try:
            await _show_rewrap(client, found.key_configuration_id, asked)
            return await asked
        finally:
            asked.cancel()

    done = session.ask(home, ask)
    emit(
        done,
        as_json,
        lambda: facts(
            [
                ("CMK version", done.cmk_key_version),
                ("KEKs", done.keks),
                ("under an older version", done.outdated),
                ("wrapped again", done.rewrapped),
            ]
        ),
    )


async def _show_rewrap(
    client: KeylakeClient, key_configuration_id: KeyConfigurationId, asked: asyncio.Task[Rewrap]
) -> None:
    """How far it is, until it is answered."""
    from keylake.cli.output import notes
    from shared.api.keymanager import KeyWorkKind
    from shared.errors import KeylakeError

    shown = 0
    while True:
        await asyncio.wait({asked}, timeout=_PROGRESS_POLL_S)
        if asked.done():
            return
        try:
            found = await client.key_configuration(key_configuration_id)
        except KeylakeError:
            continue  # what was asked for is not the worse for it
        for work in found.work:
            if work.kind is KeyWorkKind.REWRAP and work.done > shown:
                shown = work.done
                notes().print(f"{work.done} of {work.total} KEKs are wrapped again")


@configurations.command(
    "replace",
    epilog=examples(
        "keylake key-config replace main --key other-key     # another key of the local customer",
        "keylake key-config replace main --from azure.json   # a key in any cloud: docs/key-configurations.md",
        "keylake key-config replace main --from azure.json --dry-run",
        "keylake key-config replace main --abort",
    ),
)
def replace(
    configuration: Annotated[str, typer.Argument(help="Name or id.", show_default=False)],
    key: Annotated[
        str | None,
        typer.Option(help="Description, id or ARN of a key in the customer's local cloud.", show_default=False),
    ] = None,
    from_file: FromFile = None,
    abort: Annotated[bool, typer.Option("--abort", help="Give up one that is under way.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only try the key, and count.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Move everything under a key configuration to another CMK, without downtime. Returns when it is done."""
    from keylake.cli import lookup, session
    from keylake.cli.output import emit, facts, notes
    from shared.errors import InvalidInputError

    if [key is not None, from_file is not None, abort].count(True) != 1:
        raise InvalidInputError("say one of --key, --from and --abort")
    if abort and dry_run:
        raise InvalidInputError("--abort has no --dry-run")
    new = None if abort else _any_key(key, from_file, home)

    async def try_it(client: KeylakeClient, key: CmkKey) -> Replacement:
        found = await lookup.key_configuration(client, configuration)
        return await client.replace_key(found.key_configuration_id, key, dry_run=True)

    if dry_run and new is not None:
        tried = session.ask(home, lambda client: try_it(client, new))
        emit(tried, as_json, lambda: facts([("key, which may be used", tried.key.identifier), ("KEKs", tried.keks)]))
        return

    async def move(client: KeylakeClient) -> KeyConfiguration:
        found = await lookup.key_configuration(client, configuration)
        if new is None:
            await client.abort_replacement(found.key_configuration_id)
            return found
        progress = await client.replace_key(found.key_configuration_id, new)
        while (now := await client.replacement(found.key_configuration_id)) is not None:
            if now.staged != progress.staged:
                notes().print(f"{now.staged} of {now.keks} KEKs are wrapped by the new key")
            progress = now
            await asyncio.sleep(_PROGRESS_POLL_S)
        return await lookup.key_configuration(client, str(found.key_configuration_id))

    after = session.ask(home, move)
    emit(after, as_json, lambda: facts([("key configuration", after.name), ("key", after.key.identifier)]))


def key_from_file(path: Path) -> CmkKey:
    """Raises InvalidInputError that says what is wrong with it."""
    from pydantic import ValidationError

    from keymanager import providers  # noqa: F401 - so that keys of every kind can be read
    from shared.api.common import problem
    from shared.cmk import CMK_KEY
    from shared.errors import InvalidInputError

    try:
        return CMK_KEY.validate_json(path.read_bytes())
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise InvalidInputError(f"{path}: {'; '.join(problem(e) for e in error.errors()[:5])}") from None


def _any_key(
    key: str | None,
    from_file: Path | None,
    home: Path | None,
    role_arn: str | None = None,
    external_id: str | None = None,
) -> CmkKey:

    from keylake.cli import session
    from keylake.cli.cloud import find_key
    from shared.api.keymanager import AwsKey

    if from_file is not None:
        return key_from_file(from_file)
    with session.customer(home) as customer:
        arn = key if key is not None and key.startswith("arn:") else find_key(customer, key)["Arn"]
        role_arn = role_arn or customer.bootstrap.role_arn
        external_id = external_id or customer.bootstrap.external_id
    return session.build(AwsKey, key_arn=arn, role_arn=role_arn, external_id=external_id)


@configurations.command("delete", epilog=examples("keylake key-config delete main"))
def delete_configuration(
    configuration: Annotated[str, typer.Argument(help="Name or id.", show_default=False)],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Forget a key configuration. Only while no workspace and no project is bound to it."""
    from keylake.cli import lookup, session
    from keylake.cli.output import emit

    async def delete(client: KeylakeClient) -> KeyConfiguration:
        found = await lookup.key_configuration(client, configuration)
        await client.delete_key_configuration(found.key_configuration_id)
        return found

    gone = session.ask(home, delete)
    emit({"deleted": gone.key_configuration_id}, as_json, lambda: f"{gone.key_configuration_id} is deleted")


@workspaces.command(
    "create", epilog=examples("keylake workspace create main", "keylake workspace create eu --key-config eu-key")
)
def create_workspace(
    name: Annotated[str, typer.Argument(help="A name for it.", show_default=False)],
    key_config: Annotated[
        str | None,
        typer.Option(
            help="Name or id of the key configuration; not needed when there is only one.", show_default=False
        ),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make a workspace under a key."""
    from keylake.cli import lookup, session
    from keylake.cli.output import emit
    from shared.api.keymanager import CreateWorkspace

    async def create(client: KeylakeClient) -> Workspace:
        configuration = await lookup.key_configuration(client, key_config)
        request = session.build(CreateWorkspace, name=name, key_configuration_id=configuration.key_configuration_id)
        return await client.create_workspace(request.name, request.key_configuration_id)

    made = session.ask(home, create)
    emit(made, as_json, lambda: str(made.workspace_id))


@workspaces.command("list", epilog=examples("keylake workspace list"))
def list_workspaces(home: Home = None, as_json: AsJson = False) -> None:
    """Every workspace."""
    from keylake.cli import session
    from keylake.cli.output import emit, table

    found = session.ask(home, lambda client: client.workspaces())
    emit(
        found,
        as_json,
        lambda: table(
            ("name", "id", "key configuration", "created"),
            [(w.name, w.workspace_id, w.key_configuration_id, w.created_at) for w in found],
        ),
    )


@workspaces.command(
    "set",
    epilog=examples(
        "keylake workspace set main --name team",
        "keylake workspace set main --key-config eu  # for projects to come; `project move-key` takes the others",
    ),
)
def change_workspace(
    workspace: Annotated[str, typer.Argument(help="Name or id.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Another name.", show_default=False)] = None,
    key_config: Annotated[
        str | None, typer.Option(help="Name or id of another key configuration.", show_default=False)
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Change a workspace's name, or the key of projects that are made from now on. Those that are there stay under the
    key that they have, each until `keylake project move-key` takes it to another one.
    """
    from keylake.cli import lookup, session
    from keylake.cli.output import emit, facts
    from shared.api.keymanager import ChangeWorkspace

    async def change(client: KeylakeClient) -> Workspace:
        found = await lookup.workspace(client, workspace)
        other = None if key_config is None else await lookup.key_configuration(client, key_config)
        request = session.build(
            ChangeWorkspace, name=name, key_configuration_id=None if other is None else other.key_configuration_id
        )
        return await client.change_workspace(found.workspace_id, request)

    now = session.ask(home, change)
    emit(now, as_json, lambda: facts([("name", now.name), ("key configuration", now.key_configuration_id)]))


@workspaces.command("revalidate", epilog=examples("keylake workspace revalidate main"))
def revalidate_workspace(
    workspace: Annotated[str, typer.Argument(help="Name or id.", show_default=False)],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Ask the customer's KMS now, instead of at the next probe, about every key that its projects are under."""
    from keylake.cli import lookup, session
    from keylake.cli.output import emit, table

    async def ask(client: KeylakeClient) -> list[Project]:
        return await client.revalidate_workspace((await lookup.workspace(client, workspace)).workspace_id)

    found = session.ask(home, ask)
    emit(
        found,
        as_json,
        lambda: table(
            ("project", "id", "key", "reason"), [(p.name, p.project_id, p.state, p.state_reason) for p in found]
        ),
    )


@workspaces.command("delete", epilog=examples("keylake workspace delete main"))
def delete_workspace(
    workspace: Annotated[str, typer.Argument(help="Name or id.", show_default=False)],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Delete a workspace in which there is no project, and never was."""
    from keylake.cli import lookup, session
    from keylake.cli.output import emit

    async def delete(client: KeylakeClient) -> Workspace:
        found = await lookup.workspace(client, workspace)
        await client.delete_workspace(found.workspace_id)
        return found

    gone = session.ask(home, delete)
    emit({"deleted": gone.workspace_id}, as_json, lambda: f"{gone.workspace_id} is deleted")
