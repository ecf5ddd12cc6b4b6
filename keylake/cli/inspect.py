"""`keylake inspect wal|control`: what a file of the storage says. `layer|index` are in storage.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keylake.cli.common import AsJson, Home, examples, group

if TYPE_CHECKING:
    from rich.console import RenderableType

    from shared.api.safekeeper import WalBlock, WalContent

app = group(
    "What a file of the storage says: to anybody, without a cluster or a key; with --contents, to who may know, as the "
    "service says it that has the project's keys. No value and no key is shown."
)

_File = Annotated[Path, typer.Argument(help="The file.", show_default=False, exists=True, dir_okay=False)]

Contents = Annotated[
    bool,
    typer.Option(
        "--contents",
        help="Ask the running cluster what is in it: an auditor's right. The file has to lie where it belongs.",
    ),
]


@app.command(
    "wal",
    epilog=examples(
        "keylake inspect wal 0000000000000001.0000000000000002.0000",
        "keylake inspect wal data/safekeeper-1/timelines/prj-…/tl-…/0000000000000001.0000000000000002.0000 --contents",
    ),
)
def wal(file: _File, contents: Contents = False, home: Home = None, as_json: AsJson = False) -> None:
    """A sealed piece of WAL, of a safekeeper's disk or of the object store: where it belongs and what frames it has.

    With its envelope beside it (FILE.key), also the versions of its keys. With --contents the records in it: headers
    and blocks, no data. The safekeeper that has the file opens these very bytes, or says that it has others; every
    frame has to be genuine.
    """
    from rich.console import Group

    from keylake.cli.output import emit, facts, to_json
    from safekeeper.inspection import MAX_PIECE_SIZE_BYTES, describe_piece, may_be_torn
    from shared.crypto.envelope import ENVELOPE_SIZE_BYTES, Envelope

    beside = file.with_name(file.name + ".key")
    envelope = Envelope.parse(_read(beside, ENVELOPE_SIZE_BYTES)) if beside.exists() else None
    data = _read(file, MAX_PIECE_SIZE_BYTES)
    report = describe_piece(data, envelope)
    sizes = f"{report.smallest_frame_bytes:,} to {report.largest_frame_bytes:,} bytes"
    behind = "nothing" if not report.behind_bytes else f"{report.behind_bytes:,} bytes"
    if may_be_torn(report):
        behind += ", as a crash may leave them"
    content = _records(file, data[: report.sealed_size_bytes], home) if contents else None
    document = to_json(report) | ({} if content is None else {"content": to_json(content)})

    def shown() -> RenderableType:
        return report_facts() if content is None else Group(report_facts(), _table(content))

    def report_facts() -> RenderableType:
        return facts(
            [
                ("term", report.term),
                ("WAL", f"{report.start_lsn} to {report.end_lsn}"),
                (
                    "frames",
                    f"{report.frames} of {sizes}",
                ),
                ("sealed", f"{report.sealed_size_bytes:,} bytes, {report.suite}"),
                ("behind the frames", behind),
                ("KEK version", "no envelope beside it" if report.kek_version is None else report.kek_version),
                ("DEK made under", "" if report.dek_version is None else f"KEK version {report.dek_version}"),
            ]
        )

    emit(document, as_json, shown)


def _records(file: Path, sealed: bytes, home: Path | None) -> WalContent:
    """The path says whose it is: …/<project>/<timeline>/<piece>, on a safekeeper's disk and in the object store."""
    import hashlib

    from keylake.cli import session
    from shared.api.safekeeper import InspectWal
    from shared.errors import InvalidInputError
    from shared.ids import ProjectId, TimelineId

    project, timeline = [part.removesuffix("@") for part in file.absolute().parts[-3:-1]]
    try:
        project_id, timeline_id = ProjectId.parse(project), TimelineId.parse(timeline)
    except ValueError:
        raise InvalidInputError("a piece whose content is asked for lies under <project>/<timeline>/") from None
    digest = hashlib.sha256(sealed).hexdigest()
    piece = InspectWal(name=file.name, sealed_size_bytes=len(sealed), sha256=digest)
    return session.ask(home, lambda client: client.inspect_wal(project_id, timeline_id, piece))


def _table(content: WalContent) -> RenderableType:
    from keylake.cli.output import table

    def of(block: WalBlock) -> str:
        image = "*" if block.has_image else ""
        return f"{block.tablespace}/{block.database}/{block.relfilenumber}.{block.fork}:{block.block}{image}"

    return table(
        ("LSN", "resource manager", "info", "xid", "bytes", "blocks (* with an image)"),
        [
            (
                each.start_lsn,
                each.resource_manager,
                f"{each.info:#04x}",
                each.xid,
                each.size_bytes,
                " ".join(map(of, each.blocks)),
            )
            for each in content.records
        ],
        title=f"{len(content.records)} records" + (", and more" if content.more else ""),
    )


@app.command("control", epilog=examples("keylake inspect control data/safekeeper-1/timelines/prj-…/tl-…/control"))
def control(file: _File, as_json: AsJson = False) -> None:
    """The control file of a safekeeper's timeline: promises, term history, and where each piece of the log lies."""
    from keylake.cli.output import emit, facts
    from safekeeper.inspection import describe_control

    report = describe_control(_read(file, 1 << 28))
    emit(
        report,
        as_json,
        lambda: facts(
            [
                ("safekeeper", report.node_id),
                ("timeline", f"{report.project_id}, {report.timeline_id}"),
                ("term", report.term),
                (
                    "log",
                    f"from {report.start_lsn}"
                    + ("" if report.oldest_lsn == report.start_lsn else f", kept from {report.oldest_lsn}"),
                ),
                ("committed", f"{report.commit_lsn}; in layers: {report.remote_consistent_lsn}"),
                *((f"term {term}", f"from {start}") for term, start in report.term_history),
                *(
                    (name, f"{start} to {'(open)' if end is None else end}, {place}")
                    for name, start, end, place in report.pieces
                ),
            ]
        ),
    )


def _read(file: Path, limit_bytes: int) -> bytes:
    """Raises InvalidInputError."""
    from shared.errors import InvalidInputError

    try:
        with file.open("rb") as stream:
            data = stream.read(limit_bytes + 1)
    except OSError as error:
        raise InvalidInputError(f"{file} cannot be read: {error.strerror}") from None
    if len(data) > limit_bytes:
        raise InvalidInputError(f"{file} is larger than any file of its kind")
    return data


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="inspect", rich_help_panel="Data")
