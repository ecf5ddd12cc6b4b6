"""What every command shares: options, exit codes, and how an error becomes one line and a code."""

from __future__ import annotations

import contextlib
import enum
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from shared.errors import (
    InvalidInputError,
    KeyAccessError,
    KeylakeError,
    PermissionDeniedError,
    RevokedError,
    ShreddedError,
    SuspendedError,
    UnauthenticatedError,
    UnavailableError,
)

DEFAULT_HOME: Final = Path(".keylake")


class ExitCode(enum.IntEnum):
    """What the `keylake` process ends with. `keylake psql` ends with psql's own code once psql has started."""

    OK = 0
    FAILED = 1  # anything else: a conflict, damaged data, a check that does not hold
    USAGE = 2  # the command line is wrong, or names something that does not exist
    NOT_RUNNING = 3  # no cluster in this home
    REFUSED = 4  # by a token's scopes, by the customer's cloud, or by the key: revoked, shredded
    UNAVAILABLE = 5  # something is down or does not answer, or the key is suspended: try again
    INTERRUPTED = 130


Home = Annotated[
    Path | None,
    typer.Option(
        "--home",
        envvar="KEYLAKE_HOME",
        help="The local cluster's directory; [bold].keylake[/bold] here unless given.",
        show_default=False,
        file_okay=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def home_dir(home: Path | None) -> Path:
    """Absolute. A relative one is relative to the current directory."""
    return Path(os.path.abspath(home or DEFAULT_HOME))


def examples(*lines: str) -> str:
    """The `epilog` of a command: lines that can be pasted into a shell, `# …` explains."""
    shown = []
    for line in lines:
        command, sign, remark = line.partition("  #")
        escaped = command.replace("[", "\\[")
        shown.append(f"[cyan]{escaped}[/cyan]" + (f"  [dim]# {remark.strip()}[/dim]" if sign else ""))
    return "\n".join(["[bold]Examples[/bold]", *shown])


def exit_code(error: KeylakeError) -> ExitCode:
    if error.code == "not_running":  # keylake.attached, which takes long to import
        return ExitCode.NOT_RUNNING
    if isinstance(error, InvalidInputError):
        return ExitCode.USAGE
    if error.retryable:
        return ExitCode.UNAVAILABLE
    if isinstance(error, UnauthenticatedError | PermissionDeniedError | KeyAccessError):
        return ExitCode.REFUSED
    return ExitCode.FAILED


def hint(error: KeylakeError) -> str:
    """What to do next; empty when the message says it already."""
    if error.code == "not_running":
        return "start it with `keylake up`, or name another one with --home"
    match error:
        case ShreddedError():
            return "its keys are destroyed for good; nothing brings this project back"
        case RevokedError():
            return "`keylake project list` says why; it comes back when the key allows it again"
        case SuspendedError():
            return "it comes back by itself when the customer's cloud answers; see `keylake cloud fault show`"
        case UnavailableError() if "keylake" not in str(error):
            return "`keylake status` shows what is down"
        case _:
            return ""


def error_line(error: KeylakeError) -> str:
    message = " ".join(str(error).split()) or error.code
    advice = hint(error)
    return f"keylake: {printable(message)}" + (f"; {advice}" if advice else "")


def printable(text: str) -> str:
    """Without control characters: names come from others and must not drive the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


class KeylakeGroup(TyperGroup):
    """The root: turns every error that is meant for people into one line on stderr and an exit code."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _one_line():
            return super().invoke(ctx)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except KeylakeError as error:
        line, code = error_line(error), exit_code(error)
    except typer.TyperException as error:
        if not (message := error.format_message()):
            raise  # no command was given: it prints the help
        context = getattr(error, "ctx", None)
        command = "keylake" if context is None else context.command_path
        line = f"keylake: {printable(' '.join(message.split())).rstrip('.')}; see `{command} --help`"
        code = ExitCode.USAGE
    else:
        return
    print(line, file=sys.stderr)  # noqa: T201 - this is the command line
    raise typer.Exit(code)


def group(help_text: str, **options: Any) -> typer.Typer:
    """A group of commands that shows its help when it is called without one."""
    return typer.Typer(help=help_text, no_args_is_help=True, rich_markup_mode="rich", **options)
