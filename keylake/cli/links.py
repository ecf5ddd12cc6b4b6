"""`keylake link`: the network between the services of a local cluster, cut on purpose."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keylake.cli.common import AsJson, Home, examples, group

if TYPE_CHECKING:
    from keylake.link_control import LinkRequest

app = group(
    "The network between services, of a cluster that was started with `keylake up --links`: cut it, and see who stops."
)


@app.command(
    "cut",
    epilog=examples(
        "keylake link cut pageserver keymanager  # neither hears the other any more",
        "keylake link cut keymanager customercloud  # the KMS is out of reach; the customer is not cut off",
        "keylake link cut safekeeper-1 --refused  # from everybody, as if its ports were closed",
    ),
)
def cut(
    one: Annotated[str, typer.Argument(metavar="SERVICE", help="As `keylake status` names it.", show_default=False)],
    other: Annotated[
        str | None,
        typer.Argument(metavar="OTHER", help="From whom; from everybody unless given.", show_default=False),
    ] = None,
    refused: Annotated[
        bool,
        typer.Option(
            "--refused",
            help="Connections are reset and new ones refused. Otherwise nothing arrives, as by a pulled cable.",
        ),
    ] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Cut services off from each other, at once; `heal` ends it.

    What is sent meanwhile arrives late, as TCP would send it again. What goes over Unix sockets is not cut: the proxy
    and the safekeepers with a compute on this machine.
    """
    from keylake.cli import session
    from keylake.link_control import LinkRequest
    from keylake.links import Cut

    how = Cut.REFUSED if refused else Cut.SILENT
    _done(session.build(LinkRequest, do="cut", one=one, other=other, how=how), home, as_json)


@app.command("heal", epilog=examples("keylake link heal"))
def heal(home: Home = None, as_json: AsJson = False) -> None:
    """End all cuts. What was held back arrives now."""
    from keylake.link_control import LinkRequest

    _done(LinkRequest(do="heal"), home, as_json)


@app.command("show", epilog=examples("keylake link show", "keylake link show --json | jq '.[] | select(.cut)'"))
def show(home: Home = None, as_json: AsJson = False) -> None:
    """Every two services that speak with each other, and whether they can."""
    from keylake.link_control import SHOW

    _done(SHOW, home, as_json)


def _done(request: LinkRequest, home: Path | None, as_json: bool) -> None:
    from keylake.cli import session
    from keylake.cli.output import emit, table

    found = asyncio.run(session.place(home).links(request))
    emit(
        found,
        as_json,
        lambda: table(("between", "and", "cut"), [(*each.between, each.cut) for each in found]),
    )
