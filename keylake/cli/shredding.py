"""`keylake project shred` and `keylake project verify-erasure`: the end of a project, by two people's word."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keylake.cli.common import AsJson, Home, examples, group

if TYPE_CHECKING:
    from rich.console import RenderableType

    from keylake.client import KeylakeClient
    from shared.api.keymanager import Project
    from shared.api.shredding import ErasureReport, Shred

app = group(
    "End a project for good: one person asks, another approves, each with a token of their own (`keylake token create "
    "--role security-admin`). See docs/shredding.md."
)

_Project = Annotated[str, typer.Argument(metavar="PROJECT", help="Name or id.", show_default=False)]
_Typed = Annotated[
    str | None,
    typer.Option("--name", help="The project's name, typed; asked for unless given.", show_default=False),
]


@app.command(
    "ask",
    epilog=examples("KEYLAKE_TOKEN=$ALICE keylake project shred ask shop --reason 'the contract has ended'"),
)
def ask(
    project: _Project,
    reason: Annotated[str, typer.Option(help="Why; it goes into the audit log and the receipt.", show_default=False)],
    name: _Typed = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Ask for a project to be shredded. Nothing happens until another person approves."""
    from keylake.cli import session
    from shared.api.shredding import AskShred

    typed = _typed(project, name)
    request = session.build(AskShred, project_name=typed, reason=reason)

    async def work(client: KeylakeClient, found: Project) -> Shred:
        return await client.ask_shred(found.project_id, request.project_name, request.reason)

    _show(project, home, as_json, work)


@app.command(
    "approve",
    epilog=examples(
        "keylake project shred status shop  # look at what was asked for",
        "KEYLAKE_TOKEN=$BOB keylake project shred approve shop --id shr-0123456789abcdef",
    ),
)
def approve(
    project: _Project,
    shred_id: Annotated[str, typer.Option("--id", help="What is approved: of `status`.", show_default=False)],
    name: _Typed = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Destroy all keys of a project, and its data. There is no way back."""
    from keylake.cli import session
    from shared.api.shredding import ApproveShred

    typed = _typed(project, name)
    request = session.build(ApproveShred, project_name=typed, shred_id=shred_id)

    async def work(client: KeylakeClient, found: Project) -> Shred:
        return await client.approve_shred(found.project_id, request.project_name, request.shred_id)

    _show(project, home, as_json, work)


@app.command("status", epilog=examples("keylake project shred status shop", "keylake project shred status shop --json"))
def status(project: _Project, home: Home = None, as_json: AsJson = False) -> None:
    """Who asked, who approved, what was destroyed, and exactly what is left."""

    async def work(client: KeylakeClient, found: Project) -> Shred:
        return await client.shred(found.project_id)

    _show(project, home, as_json, work)


@app.command("cancel", epilog=examples("KEYLAKE_TOKEN=$BOB keylake project shred cancel shop"))
def cancel(project: _Project, home: Home = None, as_json: AsJson = False) -> None:
    """Take back what nobody has approved yet."""

    async def work(client: KeylakeClient, found: Project) -> Shred:
        return await client.cancel_shred(found.project_id)

    _show(project, home, as_json, work)


def _typed(project: str, name: str | None) -> str:
    if name is not None:
        return name
    typed: str = typer.prompt(f"Type the name of {project}, which will be gone for good", err=True)
    return typed


def _show(
    text: str, home: Path | None, as_json: bool, work: Callable[[KeylakeClient, Project], Awaitable[Shred]]
) -> None:
    from keylake.cli import lookup, session
    from keylake.cli.output import emit

    async def act(client: KeylakeClient) -> Shred:
        return await work(client, await lookup.project(client, text))

    found = session.ask(home, act)
    emit(found, as_json, lambda: _facts(found))


def _facts(shred: Shred) -> RenderableType:
    from rich.console import Group

    from keylake.cli.output import facts, table

    rows: list[tuple[str, object]] = [
        ("project", f"{shred.project_name} ({shred.project_id})"),
        ("shred", shred.shred_id),
        ("state", shred.state),
        ("reason", shred.reason),
        ("asked", f"by {shred.asked_by}, {shred.asked_at:%Y-%m-%d %H:%M:%SZ}"),
    ]
    if shred.decided_by is None:
        rows.append(("another person approves", f"until {shred.expires_at:%Y-%m-%d %H:%M:%SZ}"))
    else:
        rows.append(("decided", f"by {shred.decided_by}"))
    if shred.state in ("deleting", "done"):
        rows.append(("KEKs destroyed", f"{shred.keks_destroyed}, and {shred.staged_destroyed} staged"))
    if shred.revocation is not None:
        sealed_after_s = shred.revocation.sealed_after_s
        rows.append(("leases", "not over yet" if sealed_after_s is None else f"over after {sealed_after_s:.3f} s"))
    rows += [("left", text) for text in shred.left]
    nodes = [
        (n.node_id, n.looked_at or "not yet", n.deleted_objects, n.deleted_kinds, n.deleted_size_bytes, n.left_objects)
        for n in shred.nodes
    ]
    parts: list[RenderableType] = [facts(rows)]
    if nodes:
        parts.append(table(("node", "looked", "objects deleted", "which", "bytes", "left"), nodes))
    return Group(*parts)


def verify_erasure(
    project: _Project,
    backups: Annotated[
        str | None,
        typer.Option(
            "--attest-backups",
            help="Your word on copies outside of Keylake: where they are, who looked.",
            show_default=False,
        ),
    ] = None,
    key_copies: Annotated[
        str | None,
        typer.Option("--attest-key-copies", help="Your word on copies of the key's material.", show_default=False),
    ] = None,
    instances: Annotated[
        str | None,
        typer.Option(
            "--attest-instances",
            help="Your word on instances that never answered: powered off, by whom.",
            show_default=False,
        ),
    ] = None,
    stopped_projects: Annotated[
        str | None,
        typer.Option(
            "--attest-stopped-projects",
            help="Your word on KEKs of projects that are stopped now: that they never come back, or are others.",
            show_default=False,
        ),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Check every precondition of erasure now. ERASED is printed only when all of them hold; else it ends with 1.

    What no program can look at takes a person's word, which is recorded under their name and in the receipt.
    """
    from keylake.cli import lookup, session
    from keylake.cli.output import emit
    from shared.api.shredding import Attestation

    words = {
        "backups": backups,
        "key-copies": key_copies,
        "instances": instances,
        "stopped-projects": stopped_projects,
    }
    said = [session.build(Attestation, subject=subject, text=text) for subject, text in words.items() if text]

    async def check(client: KeylakeClient) -> ErasureReport:
        return await client.verify_erasure((await lookup.project(client, project)).project_id, said)

    found = session.ask(home, check)
    emit(found, as_json, lambda: _report(found))
    if found.state.value != "ERASED":
        raise typer.Exit(1)


def _report(report: ErasureReport) -> RenderableType:
    from rich.console import Group

    from keylake.cli.output import facts, table

    rows = [(each.name, each.outcome, "; ".join(each.evidence)) for each in report.preconditions]
    return Group(
        facts([("project", report.project_id), ("state", report.state.value), ("checked by", report.checked_by)]),
        table(("precondition", "outcome", "evidence"), rows),
    )


def add_commands(projects: typer.Typer) -> None:
    projects.add_typer(app, name="shred")
    projects.command(
        "verify-erasure",
        epilog=examples(
            "keylake project verify-erasure shop",
            "KEYLAKE_TOKEN=$ALICE keylake project verify-erasure shop --attest-backups 'none outside of the account' "
            "--attest-key-copies 'the material was made in the KMS and never exported'",
        ),
    )(verify_erasure)
