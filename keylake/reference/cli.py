"""docs/reference/cli.md, out of the command line's own tree."""

from __future__ import annotations

import enum
import inspect
import re
from pathlib import Path
from typing import Any, Final, get_args

import typer

from keylake.cli.app import app
from keylake.cli.common import ExitCode
from keylake.reference.text import one_line, table

_MARKUP: Final = re.compile(r"(?<!\\)\[/?[a-z ]+\]")

_HEAD: Final = """\
# Command line

Generated from `keylake --help` by `make docs-reference`; a test keeps it current, and another one runs the examples'
command lines through the parser.

Names and ids are both accepted wherever they are unambiguous. `--json` is there wherever something is shown. Progress
and remarks go to stderr, results to stdout. With a token of `keylake token create` in `KEYLAKE_TOKEN`, commands do what
its role may do; without, they are the owner's. `KEYLAKE_HOME` is the local cluster's directory (`--home` wins).

## Exit codes
"""
_COMPLETION: Final = """\
## Completion

`keylake --install-completion` writes it where the shell that you are in looks for it (bash, zsh, fish);
`keylake completion SHELL` prints it, for packagers and for whoever wants it somewhere else. Commands, options and their
choices are completed, without asking a running cluster.
"""
_MEANINGS: Final = {
    ExitCode.OK: "done",
    ExitCode.FAILED: "failed: a conflict, damaged data, a check that does not hold",
    ExitCode.USAGE: "the command line is wrong, or names something that does not exist",
    ExitCode.NOT_RUNNING: "no cluster is running in this home",
    ExitCode.REFUSED: "refused: by a token's role, by the customer's cloud, or by the key (revoked, shredded)",
    ExitCode.UNAVAILABLE: "unavailable: something is down or does not answer, or the key is suspended; try again",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C",
}


def leaves(command: Any = None, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every command that does something, with its path below `keylake`, in the order of `--help`."""
    command = command or typer.main.get_command(app)
    children = getattr(command, "commands", None)
    if children is None:
        return [(path, command)]
    return [leaf for name, child in children.items() if not child.hidden for leaf in leaves(child, (*path, name))]


def examples_of(command: Any) -> list[str]:
    """The lines of its help that can be pasted into a shell, with their remarks."""
    return [line for line in _plain(command.epilog or "").splitlines() if "keylake " in line]


def page() -> str:
    """The whole document."""
    codes = [(f"{code}", _MEANINGS[code]) for code in ExitCode]
    parts = [_HEAD, table(("code", "meaning"), codes), "`keylake psql` ends with psql's own.\n", _COMPLETION]
    return "\n".join([*parts, *(_command(path, command) for path, command in leaves())])


def _plain(text: str) -> str:
    """Without rich's markup."""
    return _MARKUP.sub("", text).replace("\\[", "[")


def _command(path: tuple[str, ...], command: Any) -> str:
    name = f"keylake {' '.join(path)}"
    usage = " ".join(
        [name, *(_usage(parameter) for parameter in command.params if parameter.param_type_name == "argument")]
    )
    parts = [f"## {name}\n", f"```text\n{usage} [OPTIONS]\n```\n", _paragraphs(command.help), ""]
    arguments = [each for each in command.params if each.param_type_name == "argument" and each.help]
    if arguments:
        parts.append(table(("argument", "meaning"), ((f"`{each.name}`", _about(each)) for each in arguments)))
    options = [each for each in command.params if each.param_type_name == "option" and each.name != "help"]
    if options:
        parts.append(table(("option", "meaning"), ((_names(each), _about(each)) for each in options)))
    if shown := examples_of(command):
        parts.append("```sh\n" + "\n".join(shown) + "\n```\n")
    return "\n".join(parts)


def _paragraphs(text: str | None) -> str:
    return "\n\n".join(one_line(_plain(part)) for part in inspect.cleandoc(text or "").split("\n\n"))


def _usage(parameter: Any) -> str:
    name = parameter.name.upper()
    name = f"{name}…" if parameter.nargs == -1 else name
    return name if parameter.required else f"[{name}]"


def _names(option: Any) -> str:
    names = ", ".join(f"`{each}`" for each in [*option.opts, *option.secondary_opts])
    if option.is_flag or option.count:
        return names
    return f"{names} *{_kind(option)}*"


def _kind(option: Any) -> str:
    annotation = option.type_descriptor.annotation
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "|".join(str(member.value) for member in annotation)
    if choices := get_args(annotation):
        return "|".join(str(getattr(each, "value", each)) for each in choices if each is not type(None))
    kind = {str: "text", Path: "path"}.get(annotation) or str(getattr(annotation, "__name__", annotation))
    limits = "..".join("" if each is None else f"{each:g}" for each in (option.min, option.max))
    return kind if limits == ".." else f"{kind} {limits}"


def _about(parameter: Any) -> str:
    text = one_line(_plain(parameter.help or ""))
    facts = []
    if parameter.envvar:
        facts.append(f"variable `{parameter.envvar}`")
    shown = getattr(parameter, "show_default", True)
    default = parameter.default
    if (
        shown
        and default is not None
        and not callable(default)
        and default is not False
        and default != ()
        and not (getattr(parameter, "is_flag", False))
    ):
        facts.append(f"default `{getattr(default, 'value', default)}`")
    if parameter.required and parameter.param_type_name == "option":
        facts.append("required")
    return f"{text} ({'; '.join(facts)})" if facts else text
