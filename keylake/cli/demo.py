"""`keylake demo`: the whole story, on a cluster of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from keylake.cli.common import examples
from shared.errors import InvalidInputError


def demo(
    compose: Annotated[
        bool, typer.Option("--compose", help="Use the containers of docker-compose.yml instead of local processes.")
    ] = False,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep", help="Keep the files of the local cluster, to look at what is stored; the end says where."
        ),
    ] = False,
) -> None:
    """Show the main job from start to end: write, read, disable the key, see everything stop, and come back."""
    if compose and keep:
        raise InvalidInputError("--keep is for the local cluster: containers stay until `make down`")
    from keylake.demo import main

    raise typer.Exit(main(compose=compose, keep=keep))


def register(app: typer.Typer) -> None:
    app.command(epilog=examples("keylake demo", "keylake demo --keep  # look around afterwards"))(demo)
