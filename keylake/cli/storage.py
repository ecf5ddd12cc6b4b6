"""`keylake scrub`: the object store against the index. `keylake inspect layer|index`: what a file of it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keylake.cli.common import AsJson, ExitCode, Home, examples
from keylake.cli.inspect import Contents
from keylake.cli.inspect import app as inspection

if TYPE_CHECKING:
    from keylake.client import KeylakeClient
    from shared.api.pageserver import Findings

    _Scrubbed = dict[str, dict[str, Findings | None]]
    """Timeline → layers, wal; project → strays."""

_File = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="As it lies in the object store.", show_default=False, dir_okay=False),
]


def scrub(
    project: Annotated[
        str | None, typer.Argument(metavar="PROJECT", help="Name or id; all unless given.", show_default=False)
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Read and verify everything in the object store: each timeline's layers and index, and its offloaded WAL.

    They are held against the index and against a safekeeper's log; what belongs to no timeline is named, too. Ends with
    1 when something is missing, unreadable or under a wrong key. Orphans and outdated keys, which are ordinary after a
    crash or a rotation, are only named.
    """
    from keylake.cli import lookup, session
    from keylake.cli.output import emit, table

    async def look(client: KeylakeClient) -> _Scrubbed:
        only = None if project is None else (await lookup.project(client, project)).project_id
        found: _Scrubbed = {}
        for timeline in (await client.pageserver_status()).timelines:
            if only is None or timeline.project_id == only:
                parts: dict[str, Findings | None] = {"layers": await client.scrub(timeline)}
                parts["wal"] = await client.scrub_wal(timeline)
                found[str(timeline.timeline_id)] = parts
        projects = [each.project_id for each in await client.projects()] if only is None else [only]
        for project_id in projects:
            found[str(project_id)] = {"strays": await client.scrub_project(project_id)}
        return found

    found = session.ask(home, look)
    reports = [
        (place, part, report) for place, parts in found.items() for part, report in parts.items() if report is not None
    ]
    rows = [
        (place, part, finding.kind.value, finding.object, finding.detail)
        for place, part, report in reports
        for finding in report.findings
    ]
    sizes = [getattr(report, "size_bytes", 0) for _, _, report in reports]
    objects = sum(report.objects for _, part, report in reports if part != "strays")
    title = f"{objects} objects, {sum(sizes) / 1e6:.1f} MB read"
    emit(
        {
            place: {
                part: None if report is None else {**report.model_dump(mode="json"), "damaged": report.damaged}
                for part, report in parts.items()
            }
            for place, parts in found.items()
        },
        as_json,
        lambda: table(("of", "part", "finding", "object", "detail"), rows, title=title, empty="nothing found"),
    )
    if any(report.damaged for _, _, report in reports):
        raise typer.Exit(ExitCode.FAILED)


@inspection.command(
    "layer",
    epilog=examples(
        "keylake inspect layer image-0000000001500000-0000000000000001-0123456789abcdef --json",
        "keylake inspect layer …/projects/prj-…@/timelines/tl-…@/layers@/delta-… --contents",
    ),
)
def inspect_layer(file: _File, contents: Contents = False, home: Home = None, as_json: AsJson = False) -> None:
    """A layer: kind, LSNs, generation, sizes, key versions; with --contents also which keys it holds."""
    from keylake.object_files import inspect_layer as look

    _show(look, file, contents, home, as_json)


@inspection.command(
    "index",
    epilog=examples(
        "keylake inspect index 0000000000000007 --json",
        "KEYLAKE_TOKEN=$AUDITOR keylake inspect index …/projects/prj-…@/timelines/tl-…@/index@/0000000000000007 "
        "--contents",
    ),
)
def inspect_index(file: _File, contents: Contents = False, home: Home = None, as_json: AsJson = False) -> None:
    """A version of a timeline's index: slot, sizes, key versions; with --contents all of it."""
    from keylake.object_files import inspect_index as look

    _show(look, file, contents, home, as_json)


def _show(look: Callable[[Path], dict[str, Any]], file: Path, contents: bool, home: Path | None, as_json: bool) -> None:
    from keylake.cli.output import emit, table

    found = look(file)
    if contents:
        found["content"] = _contents(file, home)
    emit(found, as_json, lambda: table(("field", "value"), [(name, str(value)) for name, value in found.items()]))


def _contents(file: Path, home: Path | None) -> dict[str, Any]:
    import hashlib

    from keylake.cli import session
    from keylake.object_files import Placed

    placed = Placed.of(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()

    async def ask(client: KeylakeClient) -> dict[str, Any]:
        return (await client.inspect_object(placed.project_id, placed.timeline_id, placed.name, digest)).content

    return session.ask(home, ask)


def register(root: typer.Typer) -> None:
    root.command(epilog=examples("keylake scrub", "keylake scrub shop --json"), rich_help_panel="Data")(scrub)
