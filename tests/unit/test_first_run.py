"""What `make first-run` records and writes, without the machines."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.compose.first_run import (
    CASTS,
    OMITTED,
    TYPED,
    WITH_DOCKER,
    Recording,
    commands_of_the_readme,
    record,
)


def test_a_recording_shows_commands_and_answers_and_no_secret(tmp_path: Path) -> None:
    key, password, token = "k" * 32, "p" * 32, f"eyJ{'h' * 20}.{'p' * 20}.{'s' * 20}"
    commands = [
        "test -t 1 && echo 'a terminal'",
        "printf 'half\\rwhole\\n\\033[1mbold\\033[0m\\n'",
        f"echo 'http://127.0.0.1:1/#key={key}'; echo 'postgresql://app:{password}@localhost/app'; echo {token}",
    ]
    recording = record("one", "One run", commands[:2], ["bash"], os.environ)
    assert recording.transcript().splitlines() == [
        f"$ {commands[0]}",
        "a terminal",
        f"$ {commands[1]}",
        "whole",
        "bold",
    ]
    cast = tmp_path / "one.cast"
    secretive = record("one", "One run", commands, ["bash"], os.environ)
    cast.write_text(secretive.asciicast())
    assert key not in cast.read_text()
    assert password not in cast.read_text()
    assert token not in cast.read_text()
    assert "key=…" in Recording.of(cast).transcript()
    assert Recording.of(cast).transcript() == secretive.transcript()


def test_a_command_that_fails_ends_it() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        record("one", "One run", ["false", "echo never"], ["bash"], os.environ)


def test_the_readmes_commands_are_what_is_recorded() -> None:
    commands = list(commands_of_the_readme())
    assert commands[:3] == ["make demo", "make setup && . .venv/bin/activate", "keylake up"]
    assert commands[-1] == "keylake down"
    assert len(commands) > 20
    assert not set(commands) & (OMITTED.keys() | TYPED.keys())
    assert len([each for each in commands if "<<<" in each]) == len(TYPED)


@pytest.mark.parametrize(("name", "commands"), [("python", list(commands_of_the_readme())), ("docker", [*WITH_DOCKER])])
def test_what_was_recorded_is_what_is_written_today(name: str, commands: list[str]) -> None:
    """Whoever changes a command of the README records it anew: `make first-run`."""
    transcript = Recording.of(CASTS / f"{name}.cast").transcript()
    typed = [line.removeprefix("$ ") for line in transcript.splitlines() if line.startswith("$ ")]
    assert [re.sub(r"^docker[ -]compose\b", "$COMPOSE", command) for command in typed] == commands
    assert transcript in (CASTS.parent / "first-run.md").read_text()
