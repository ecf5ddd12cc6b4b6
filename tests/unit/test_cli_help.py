"""Help, completion and the cost of starting: what everybody meets first."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from keylake.cli.app import app

TREE = typer.main.get_command(app)
HEAVY = ("boto3", "httpx", "cryptography", "asyncpg", "fastapi", "uvicorn", "keylake.client", "keylake.cluster")


def commands(command: Any = None, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every path in the tree, groups included."""
    command = command or TREE
    found = [path]
    for name, child in sorted(getattr(command, "commands", {}).items()):
        found += commands(child, (*path, name))
    return found


def leaf(path: tuple[str, ...]) -> Any:
    command: Any = TREE
    for name in path:
        command = command.commands[name]
    return command


def test_the_tree_is_what_people_were_promised() -> None:
    tops = {path[0] for path in commands() if path}
    assert tops == {
        *("up", "down", "status", "demo", "drill", "doctor", "psql", "audit", "receipt", "scrub", "inspect", "console"),
        *("cloud", "key-config", "workspace", "project", "branch", "endpoint", "token", "safekeeper", "completion"),
        "link",
    }
    keys = {path[2] for path in commands() if path[:2] == ("cloud", "key") and len(path) == 3}
    assert keys >= {"create", "list", "show", "disable", "enable", "schedule-deletion", "cancel-deletion"}
    assert keys >= {"deny", "allow", "rotate", "log"}


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.output
    command = leaf(path)
    assert command.help
    assert len(command.help) > 10
    if not hasattr(command, "commands"):
        assert f"keylake {' '.join(path)}" in result.output, "no example"
        assert "Examples" in result.output


@pytest.mark.parametrize("path", [p for p in commands() if hasattr(leaf(p), "commands")], ids=" ".join)
def test_a_group_without_a_command_shows_its_help(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, list(path))
    assert "Usage:" in result.output


@pytest.mark.parametrize("path", [p for p in commands() if not hasattr(leaf(p), "commands")], ids=" ".join)
def test_every_command_but_the_interactive_ones_prints_json(path: tuple[str, ...]) -> None:
    options = {option for parameter in leaf(path).params for option in parameter.opts}
    documents = {
        ("audit", "export"),
        ("receipt", "get"),
        ("receipt", "show"),
        ("completion",),
    }  # for programs as they are
    assert ("--json" in options) == (path not in {("psql",), ("console",), *documents})


def test_help_imports_nothing_heavy() -> None:
    script = f"import sys, keylake.cli.app; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("keylake ")


def test_exit_codes_are_documented() -> None:
    output = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    for code in range(6):
        assert f"{code} " in output.partition("Exit codes")[2]


def completed(shell: str, words: str) -> str:
    """What the shell is offered behind `words`."""
    environment = {"_KEYLAKE_COMPLETE": f"complete_{shell}"}
    if shell == "bash":
        environment |= {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    else:
        environment |= {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    script = "from keylake.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, check=False
    ).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_options(shell: str) -> None:
    assert "revocation" in completed(shell, "keylake drill rev")
    assert "--outage-grace" in completed(shell, "keylake key-config create --out")
    assert "pgbench" in completed(shell, "keylake drill revocation --while ")
    script = CliRunner().invoke(app, ["completion", shell])
    assert script.exit_code == 0
    assert f"complete_{shell}" in script.output


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_itself_completes(tmp_path: Path) -> None:
    program = tmp_path / "keylake"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from keylake.cli import main; main()' \"$@\"\n")
    program.chmod(0o755)
    script = (
        "source <(keylake completion bash); COMP_WORDS=(keylake endp); COMP_CWORD=1; _keylake_completion keylake; "
        'echo "${COMPREPLY[@]}"'
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["endpoint"]
