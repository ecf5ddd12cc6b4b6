"""`keylake audit`: Keylake's own record. `keylake doctor`: what this machine lacks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from keylake.cli import reconcile
from keylake.cli.common import AsJson, ExitCode, Home, examples, group

app = group("Keylake's own record of who did what with keys: a hash chain.")


@app.command(
    "list",
    epilog=examples("keylake audit list", "keylake audit list --project shop", "keylake audit list --after 120 --json"),
)
def list_records(
    after: Annotated[int, typer.Option(help="Only records after this number.", min=0)] = 0,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=1000)] = 100,
    project: Annotated[str | None, typer.Option(help="Only this project's: name or id.", show_default=False)] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Records, oldest first."""
    from keylake.cli import lookup, session
    from keylake.cli.output import emit, table
    from keylake.client import KeylakeClient
    from shared.api.keymanager import AuditRecord

    async def read(client: KeylakeClient) -> list[AuditRecord]:
        if project is None:
            return await client.audit(after, limit)
        wanted = (await lookup.project(client, project)).project_id
        found: list[AuditRecord] = []
        position = after
        while len(found) < limit and (page := await client.audit(position)):
            found += [record for record in page if record.project_id == wanted]
            position = page[-1].sequence
        return found[:limit]

    found = session.ask(home, read)
    emit(
        found,
        as_json,
        lambda: table(
            ("#", "time", "who", "action", "outcome", "project", "details"),
            [
                (
                    r.sequence,
                    r.at,
                    r.actor,
                    r.action,
                    r.outcome,
                    r.project_id,
                    ", ".join(f"{name}={value}" for name, value in sorted(r.details.items())),
                )
                for r in found
            ],
        ),
    )


@app.command(
    "export",
    epilog=examples(
        "keylake audit export --out audit.jsonl",
        "keylake audit export --after 120 | jq -r .action | sort | uniq -c",
    ),
)
def export(
    out: Annotated[
        Path | None, typer.Option(help="Write here instead of to stdout.", show_default=False, dir_okay=False)
    ] = None,
    after: Annotated[int, typer.Option(help="Only records after this number.", min=0)] = 0,
    home: Home = None,
) -> None:
    """All records as JSON lines, for keeping elsewhere and for `audit verify --file`. Progress is on stderr."""
    from keylake import audit_file
    from keylake.cli import session
    from keylake.cli.output import notes

    console = notes()
    with audit_file.output(out) as file:
        count = session.ask(
            home,
            lambda client: audit_file.export(
                lambda start, limit: client.audit(start, limit, complete=start == after),
                after,
                file,
                lambda n: console.print(f"{n} records …"),
            ),
        )
    console.print(f"{count} records" + ("" if out is None else f" in {out}"), markup=False)


@app.command(
    "verify",
    epilog=examples(
        "keylake audit verify",
        "keylake audit verify --json | jq -r .head_hash",
        "keylake audit verify --file audit.jsonl --anchors anchors/ --trust trust.json  # without a service",
    ),
)
def verify(
    file: Annotated[
        Path | None, typer.Option(help="An exported chain; no service is asked.", show_default=False, dir_okay=False)
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="With --file: a hash that was kept; one record must have it.", show_default=False),
    ] = None,
    anchors: Annotated[
        Path | None, typer.Option(help="With --file: a directory with copies of the anchors.", show_default=False)
    ] = None,
    trust: Annotated[
        Path | None,
        typer.Option(
            help="With --anchors: trust bundle with the keymanager's public key; the home's unless given.",
            show_default=False,
            dir_okay=False,
        ),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Walk the whole chain, and compare it with its anchors in the object store.

    Ends with 1 when a record was changed, removed or put in, or when history is not what was anchored; with 5 when the
    anchors could not be read.
    """
    if file is None:
        if head is not None or anchors is not None or trust is not None:
            raise typer.BadParameter("--head, --anchors and --trust go with --file")
        _verify_service(home, as_json)
    else:
        _verify_file(file, head, anchors, trust, home, as_json)


def _verify_service(home: Path | None, as_json: bool) -> None:
    from keylake.cli import session
    from keylake.cli.output import emit

    found = session.ask(home, lambda client: client.verify_audit())
    if not found.intact:
        text = f"NOT intact: {found.problem}"
    elif found.anchors_problem is not None:
        text = f"{found.records} records follow each other, but {found.anchors_problem}"
    else:
        text = f"intact: {found.records} records, head {found.head_hash}"
        text += "; it is not anchored" if found.anchors is None else f"; {found.anchors} anchors agree"
    emit(found, as_json, lambda: text)
    if not found.intact:
        raise typer.Exit(ExitCode.FAILED)
    if found.anchors_problem is not None:
        raise typer.Exit(ExitCode.UNAVAILABLE)


def _verify_file(
    file: Path, head: str | None, anchors: Path | None, trust: Path | None, home: Path | None, as_json: bool
) -> None:
    from keylake.audit_file import verify_file
    from keylake.cli.common import home_dir
    from keylake.cli.output import emit
    from keylake.layout import Layout
    from shared.auth import SignatureVerifier, TrustBundle

    if head is not None and not re.fullmatch("[0-9a-f]{64}", head):
        raise typer.BadParameter("--head is a hash of 64 hexadecimal digits")
    if trust is None and (known := Layout(home_dir(home)).trust_bundle).exists():
        trust = known
    signatures = None if trust is None else SignatureVerifier(TrustBundle.load(trust))
    found = verify_file(
        file, head=None if head is None else bytes.fromhex(head), anchors=anchors, signatures=signatures
    )
    text = f"intact: records {found.first} to {found.last}, head {found.head_hash}"
    if found.kept_head is not None:
        text += f"; the head that was kept is record {found.kept_head}"
    if found.anchors is not None:
        text += f"; {found.anchors} anchors agree"
        text += "" if found.signatures_checked else ", their signatures NOT checked: no --trust"
    emit(found, as_json, lambda: text if found.intact else f"NOT intact: {found.problem}")
    if not found.intact:
        raise typer.Exit(ExitCode.FAILED)


def doctor(
    proxy_port: Annotated[
        int | None,
        typer.Option(help="Also: is this port free for `keylake up`?", min=1, max=65535, show_default=False),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Look whether this machine has what Keylake needs, and say how to get what it lacks.

    Ends with 1 when something is missing without which Keylake does not work; warnings do not count.
    """
    from rich.console import Group
    from rich.text import Text

    from keylake.cli.common import home_dir
    from keylake.cli.output import emit, table
    from keylake.doctor import Verdict, examine

    found = examine(home_dir(home), proxy_port)
    emit(
        found,
        as_json,
        lambda: Group(
            table(("what", "verdict", "found"), [(f.name, f.verdict.value, f.detail) for f in found]),
            *(Text(f"{f.name}: {f.remedy}") for f in found if f.verdict is not Verdict.OK),
        ),
    )
    if any(f.verdict is Verdict.MISSING for f in found):
        raise typer.Exit(ExitCode.FAILED)


def register(root: typer.Typer) -> None:
    reconcile.register(app)
    root.add_typer(app, name="audit")
    root.command(epilog=examples("keylake doctor", "keylake doctor --proxy-port 5433 --json"))(doctor)
