"""`keylake completion`: what a shell needs to complete our command lines."""

from __future__ import annotations

import enum
from typing import Annotated

import typer
from typer._completion_shared import get_completion_script  # typer has it for its own --show-completion only

from keylake.cli.common import examples


class Shell(enum.StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(shell: Annotated[Shell, typer.Argument(help="Whose.", show_default=False)]) -> None:
    """Print the completion for a shell. `keylake --install-completion` puts it where your shell looks for it."""
    typer.echo(get_completion_script(prog_name="keylake", complete_var="_KEYLAKE_COMPLETE", shell=shell.value))


def register(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "source <(keylake completion bash)  # for this shell",
            "keylake completion zsh > ~/.zfunc/_keylake",
            "keylake completion fish > ~/.config/fish/completions/keylake.fish",
        )
    )(completion)
