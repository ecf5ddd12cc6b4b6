"""`keylake project encryption`, `rewrap`, `rekey` and `retire-keks`: a project's keys, and what is under them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from keylake.cli.common import AsJson, Home, examples

if TYPE_CHECKING:
    from rich.console import RenderableType

    from keylake.client import KeylakeClient
    from keylake.encryption import Encryption, NodeKeys
    from shared.api.keymanager import RetiredKeks
    from shared.ids import ProjectId

_POLL_S: Final = 0.5
_ProjectName = Annotated[str, typer.Argument(metavar="PROJECT", help="Name or id.", show_default=False)]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what there is to do.")]


def add_commands(app: typer.Typer) -> None:
    """To `keylake project`."""
    app.command(
        "encryption", epilog=examples("keylake project encryption shop", "keylake project encryption shop --json")
    )(encryption)
    app.command("rewrap", epilog=examples("keylake project rewrap shop --dry-run", "keylake project rewrap shop"))(
        rewrap
    )
    app.command("rekey", epilog=examples("keylake project rekey shop --dry-run", "keylake project rekey shop"))(rekey)
    app.command(
        "retire-keks",
        epilog=examples(
            "keylake project retire-keks shop --dry-run  # which old KEK versions nothing is left under",
            "keylake project retire-keks shop",
        ),
    )(retire_keks)


def encryption(project: _ProjectName, home: Home = None, as_json: AsJson = False) -> None:
    """Its keys, and how much of its data is under which of them, asked from every storage node."""
    from keylake.cli import lookup, session
    from keylake.cli.output import emit

    async def look(client: KeylakeClient) -> Encryption:
        return await client.encryption((await lookup.project(client, project)).project_id)

    found = session.ask(home, look)
    emit(_value(found), as_json, lambda: _text(found))


def rewrap(project: _ProjectName, dry_run: _DryRun = False, home: Home = None, as_json: AsJson = False) -> None:
    """Wait until no data key is wrapped by an older KEK version. It happens by itself; this shows how far it is."""

    async def begin(client: KeylakeClient, project_id: ProjectId) -> None:
        await client.start_key_upkeep(project_id)

    _wait(
        project,
        begin,
        lambda found: found.rewrapped,
        lambda found: f"{found.outdated_objects} of {found.objects} objects are under an older KEK",
        dry_run=dry_run,
        home=home,
        as_json=as_json,
    )


def rekey(project: _ProjectName, dry_run: _DryRun = False, home: Home = None, as_json: AsJson = False) -> None:
    """Seal all data anew under new data keys, without downtime. Returns when it is done; one under way is joined."""

    from shared.errors import ConflictError

    async def begin(client: KeylakeClient, project_id: ProjectId) -> None:
        found = await client.encryption(project_id)
        if found.dek_floor == 0 or found.rekeyed:
            await client.rekey(project_id)
        elif found.held:  # a lock may have ended
            await client.start_key_upkeep(project_id)

    def done(found: Encryption) -> bool:
        if found.waits_for_locks:
            raise ConflictError(
                f"all data is sealed anew, and the object store keeps {found.old_dek_versions} old versions of it, "
                f"which keep their KEKs in use; ask again when it lets them go: {'; '.join(found.held)}"
            )
        return found.dek_floor > 0 and found.rekeyed

    _wait(
        project,
        begin,
        done,
        lambda found: f"{found.old_dek_bytes} bytes ({found.old_dek_objects} objects) are under data keys of before",
        dry_run=dry_run,
        home=home,
        as_json=as_json,
    )


def _wait(
    project: str,
    begin: Callable[[KeylakeClient, ProjectId], Awaitable[None]],
    done: Callable[[Encryption], bool],
    progress: Callable[[Encryption], str],
    *,
    dry_run: bool,
    home: Path | None,
    as_json: bool,
) -> None:
    """Interrupting it ends the waiting, not the work."""
    from keylake.cli import lookup, session
    from keylake.cli.output import emit, notes
    from shared.api.keymanager import KeyState
    from shared.lease import key_access_error

    async def run(client: KeylakeClient) -> Encryption:
        project_id = (await lookup.project(client, project)).project_id
        if dry_run:
            return await client.encryption(project_id)
        await begin(client, project_id)
        said = ""
        while not done(found := await client.encryption(project_id)):
            if found.state is not KeyState.ACTIVE:
                raise key_access_error(found.state, "the work goes on when its key may be used again")
            line = "; ".join([progress(found), *_problems(found)])
            if line != said:
                notes().print(line)
            said = line
            await asyncio.sleep(_POLL_S)
        return found

    found = session.ask(home, run)
    emit(_value(found), as_json, lambda: _text(found))


def _problems(found: Encryption) -> list[str]:
    silent = [f"{node.node}: {node.problem}" for node in found.nodes if not node.answered]
    faults = [f"{node.node}: {node.status.fault}" for node in found.nodes if node.status and node.status.fault]
    held = [f"the object store keeps {line}" for line in found.held]
    return silent + faults + held


def _value(found: Encryption) -> dict[str, object]:
    return {**found.model_dump(mode="json"), "current_share": found.current_share}


def _text(found: Encryption) -> RenderableType:
    from rich.console import Group

    from keylake.cli.output import facts, table

    due = f" ({found.old_dek_bytes} bytes are not)" if found.old_dek_bytes else ""
    return Group(
        facts(
            [
                ("project", found.project_id),
                ("key", found.state.value),
                ("key configuration", found.key_configuration_id),
                ("under the current KEK", f"{found.current_share:.2%} of {found.size_bytes} bytes"),
                ("data keys", f"made under KEK version {found.dek_floor} or later{due}" if found.dek_floor else "any"),
                ("old versions", _old_versions(found)),
                ("next KEK rotation", found.next_rotation_at),
            ]
        ),
        table(
            ("KEK", "version", "CMK version", "wraps", "of", "objects", "bytes", "last unwrap", "created", "destroyed"),
            [
                (
                    kek.kek_id,
                    kek.kek_version,
                    kek.cmk_key_version,
                    kek.wraps,
                    found.wraps_limit,
                    kek.objects,
                    kek.size_bytes,
                    kek.last_unwrap_at,
                    kek.created_at,
                    kek.destroyed_at,
                )
                for kek in found.keks
            ],
        ),
        table(
            ("node", "knows KEK", "state"),
            [
                (
                    node.node,
                    None if node.status is None else node.status.kek_version,
                    _state(node),
                )
                for node in found.nodes
            ],
        ),
    )


def _old_versions(found: Encryption) -> str:
    if not found.old_version_objects:
        return "none"
    text = f"{found.old_version_objects} objects, {found.old_version_bytes} bytes, that a re-key removes"
    return "; ".join([text, *(f"the object store keeps {line}" for line in found.held)])


def _state(node: NodeKeys) -> str:
    if node.status is None:
        return node.problem or "keeps nothing of it"
    return node.status.fault or ("working" if node.status.working else "idle")


def retire_keks(project: _ProjectName, dry_run: _DryRun = False, home: Home = None, as_json: AsJson = False) -> None:
    """Destroy old KEK versions that nothing is left under. What they wrapped can never be opened again."""
    from keylake.cli import lookup, session
    from keylake.cli.output import emit, facts

    async def retire(client: KeylakeClient) -> RetiredKeks:
        found = await lookup.project(client, project)
        return await client.retire_keks(found.project_id, dry_run=dry_run)

    done = session.ask(home, retire)
    emit(
        done,
        as_json,
        lambda: facts(
            [
                ("could be destroyed" if done.dry_run else "destroyed", ", ".join(map(str, done.retired))),
                *((f"KEK {use.kek_version} in use", f"{use.node_id}: {use.reason}") for use in done.in_use),
            ]
        ),
    )
