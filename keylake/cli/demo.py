"""`keylake demo`: the whole story, on a cluster of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from keylake.cli.common import AsJson, examples
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
    as_json: AsJson = False,
) -> None:
    """Show the main job from start to end: write, read, disable the key, see everything stop, and come back."""
    if compose and keep:
        raise InvalidInputError("--keep is for the local cluster: containers stay until `make down`")
    if compose and as_json:
        raise InvalidInputError(
            "--json is for the local cluster: the containers' demo tells its story and ends with 0 or 1"
        )
    from keylake.demo import main

    raise typer.Exit(main(compose=compose, keep=keep, as_json=as_json))


def register(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "keylake demo",
            "keylake demo --keep  # look around afterwards",
            "keylake demo --json | jq .failed  # the story goes to stderr",
        )
    )(demo)
