"""`keylake receipt`: signed proof of a revocation, a restore, a shred or an erasure, for somebody who was not there."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keylake.cli.common import AsJson, Home, examples, group

if TYPE_CHECKING:
    from shared.receipt import SignedReceipt

app = group("Signed proof of what a revocation, restore, shred or erasure did, for somebody who was not there.")


class Kind(enum.StrEnum):
    REVOCATION = "revocation"
    RESTORE = "restore"
    SHRED = "shred"
    ERASURE = "erasure"


_File = Annotated[Path, typer.Argument(help="A receipt.", show_default=False, exists=True, dir_okay=False)]


@app.command(
    "get",
    epilog=examples(
        "keylake receipt get shop --out receipt.json",
        "keylake receipt get shop --revocation rev-0123456789abcdef | jq .sealed_after_s",
        "keylake receipt get shop --restoration res-0123456789abcdef --out restore.json",
        "keylake receipt get shop --kind shred --out shred.json",
    ),
)
def get(
    project: Annotated[str, typer.Argument(help="Name or id of a project.", show_default=False)],
    revocation: Annotated[
        str | None,
        typer.Option(help="Id, of `keylake project revocations`; the newest unless given.", show_default=False),
    ] = None,
    restoration: Annotated[
        str | None,
        typer.Option(help="Id of a restore, as `keylake project revocations` tells it.", show_default=False),
    ] = None,
    kind: Annotated[
        Kind | None,
        typer.Option(help="Of what: the newest of its kind; of a revocation unless given.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write here instead of to stdout.", show_default=False, dir_okay=False)
    ] = None,
    home: Home = None,
) -> None:
    """The receipt of a revocation that is over; or of a restore, of the shred, of the erasure."""
    from keylake.cli import lookup, session
    from keylake.cli.output import notes
    from keylake.client import KeylakeClient

    of = (kind or (Kind.REVOCATION if restoration is None else Kind.RESTORE)).value

    async def ask(client: KeylakeClient) -> bytes:
        project_id = (await lookup.project(client, project)).project_id
        return await client.receipt(project_id, revocation, restoration_id=restoration, kind=of)

    content = session.ask(home, ask)
    if out is None:
        typer.echo(content.decode("ascii"), nl=False)
    else:
        out.write_bytes(content)
        notes().print(f"{out}: `keylake receipt verify {out}` says whether it is genuine", markup=False)


@app.command(
    "verify",
    epilog=examples(
        "keylake receipt verify receipt.json", "keylake receipt verify receipt.json --trust trust.json  # elsewhere"
    ),
)
def verify(
    file: _File,
    trust: Annotated[
        Path | None,
        typer.Option(
            help="Trust bundle with the keymanager's public key; the home's unless given.",
            show_default=False,
            dir_okay=False,
        ),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Is it genuine, to the last byte? No service is asked. Ends with 1 when it is not."""
    from keylake.cli.common import home_dir
    from keylake.cli.output import emit, facts
    from keylake.layout import Layout
    from keylake.receipt_page import headline
    from shared.auth import SignatureVerifier, TrustBundle

    signed = _read(file)
    signed.check(SignatureVerifier(TrustBundle.load(trust or Layout(home_dir(home)).trust_bundle)))
    receipt = signed.receipt
    emit(
        receipt,
        as_json,
        lambda: facts(
            [
                ("genuine", f"signed by {receipt.kid}, {receipt.issued_at:%Y-%m-%d %H:%M:%SZ}"),
                ("project", f"{receipt.project_name} ({receipt.project_id})"),
                ("state", f"{receipt.state}: {receipt.reason}"),
                ("receipt", f"{receipt.kind}: {headline(receipt)}"),
                ("detected", receipt.detected_at.isoformat()),
                ("audit chain", f"record {receipt.audit.head_sequence}, {receipt.audit.head_hash}"),
                *(("verified", text) for text in receipt.verified),
                *(("not verified", text) for text in receipt.not_verified),
            ]
        ),
    )


@app.command("show", epilog=examples("keylake receipt show receipt.json --out receipt.html"))
def show(
    file: _File,
    out: Annotated[Path, typer.Option(help="The page to write.", dir_okay=False)] = Path("receipt.html"),
) -> None:
    """A page for people, with a picture of who was sealed when. Says nothing about whether it is genuine."""
    from keylake.cli.output import notes
    from keylake.receipt_page import page

    out.write_text(page(_read(file)), encoding="utf-8")
    notes().print(str(out), markup=False)


def _read(file: Path) -> SignedReceipt:
    from shared.errors import InvalidInputError
    from shared.receipt import MAX_RECEIPT_SIZE_BYTES, SignedReceipt

    try:
        with file.open("rb") as stream:
            return SignedReceipt.parse(stream.read(MAX_RECEIPT_SIZE_BYTES + 1))
    except OSError as error:
        raise InvalidInputError(f"{file} cannot be read: {error.strerror}") from None


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="receipt")
