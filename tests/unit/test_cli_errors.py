"""Every error becomes one line on stderr and a documented exit code; never a traceback."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import typer
from typer.testing import CliRunner

from keylake.attached import NotRunningError
from keylake.cli.app import app
from keylake.cli.common import ExitCode, KeylakeGroup, error_line, exit_code, home_dir, printable
from keylake.cli.session import cloud_error
from keylake.demo.report import Report
from keylake.reference.cli import examples_of
from shared.errors import ERRORS_BY_CODE, KeylakeError
from tests.unit.test_cli_help import TREE, commands, leaf

EXPECTED = {
    "internal": ExitCode.FAILED,
    "invalid_input": ExitCode.USAGE,
    "not_found": ExitCode.USAGE,
    "conflict": ExitCode.FAILED,
    "unauthenticated": ExitCode.REFUSED,
    "permission_denied": ExitCode.REFUSED,
    "unavailable": ExitCode.UNAVAILABLE,
    "not_leader": ExitCode.UNAVAILABLE,
    "overloaded": ExitCode.UNAVAILABLE,
    "integrity": ExitCode.FAILED,
    "corrupted": ExitCode.FAILED,
    "key_access": ExitCode.REFUSED,
    "lease_expired": ExitCode.UNAVAILABLE,
    "key_suspended": ExitCode.UNAVAILABLE,
    "key_revoked": ExitCode.REFUSED,
    "key_shredded": ExitCode.REFUSED,
}


@pytest.mark.parametrize("code", EXPECTED)
def test_exit_code_of_every_error(code: str) -> None:
    error = ERRORS_BY_CODE[code]("it is so")
    assert exit_code(error) is EXPECTED[code]
    assert error_line(error).startswith("keylake: it is so")


def test_nothing_of_the_error_tree_is_forgotten() -> None:
    shared = {code for code, cls in ERRORS_BY_CODE.items() if cls.__module__ == "shared.errors"}
    assert shared == set(EXPECTED)


def test_not_running_says_what_to_do() -> None:
    error = NotRunningError("no Keylake is running in /x")
    assert exit_code(error) is ExitCode.NOT_RUNNING
    assert "keylake up" in error_line(error)


def test_a_line_is_one_line_without_control_characters() -> None:
    line = error_line(KeylakeError("first\nsecond \x1b[31mred\x07"))
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line
    assert "\x07" not in line
    assert printable("naïve ✓") == "naïve ✓"


def test_an_error_in_a_command_is_no_traceback() -> None:
    broken = typer.Typer(cls=KeylakeGroup)

    @broken.command()
    def fail() -> None:
        raise ERRORS_BY_CODE["key_revoked"]("the key says no")

    @broken.command()
    def other() -> None: ...

    result = CliRunner().invoke(broken, ["fail"])
    assert result.exit_code == ExitCode.REFUSED
    assert result.stdout == ""
    assert result.stderr.startswith("keylake: the key says no; ")
    assert len(result.stderr.splitlines()) == 1


MAY_END_WITH: dict[str, tuple[ExitCode, ...]] = {
    **dict.fromkeys(("down", "completion"), (ExitCode.OK, ExitCode.USAGE)),  # nobody is there to say yes
    # They read a file first, and there is none.
    **dict.fromkeys(("inspect control", "inspect index", "inspect layer", "inspect wal"), (ExitCode.USAGE,)),
    **dict.fromkeys(("receipt show", "receipt verify"), (ExitCode.USAGE,)),
    **dict.fromkeys(("key-config create", "key-config replace"), (ExitCode.NOT_RUNNING, ExitCode.USAGE)),
    **dict.fromkeys(("audit reconcile", "audit verify"), (ExitCode.NOT_RUNNING, ExitCode.USAGE)),
    "drill rotation": (ExitCode.NOT_RUNNING, ExitCode.USAGE),
    "drill shred": (ExitCode.USAGE,),  # two people's tokens are missing
    # They ask first, and nobody answers.
    "project shred ask": (ExitCode.FAILED,),
    **dict.fromkeys(("project shred approve", "safekeeper replace"), (ExitCode.NOT_RUNNING, ExitCode.FAILED)),
}
STARTS_SOMETHING = {("up",), ("demo",), ("doctor",)}


def command_lines(command: Any) -> Iterator[list[str]]:
    """Words behind `keylake`, of each example in the command's help that is a command line of ours alone."""
    for example in examples_of(command):
        words = re.split(r" (?:\||&&|>) ", re.sub(r"^KEYLAKE_TOKEN=\$\w+ ", "", example))[0]
        if words.startswith("keylake "):
            yield shlex.split(words, comments=True)[1:]


@pytest.mark.parametrize(
    "path", [p for p in commands() if not hasattr(leaf(p), "commands") and p not in STARTS_SOMETHING], ids=" ".join
)
def test_every_example_says_so_without_a_cluster(
    path: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So each of them is a command line that is understood, too."""
    monkeypatch.setattr("typer.testing._get_command", lambda _: TREE)  # made once for all
    monkeypatch.chdir(tmp_path)
    found = list(command_lines(leaf(path)))
    assert found
    wanted = MAY_END_WITH.get(" ".join(path), (ExitCode.NOT_RUNNING,))
    for arguments in found:
        result = CliRunner().invoke(app, arguments, env={"KEYLAKE_HOME": str(tmp_path / "absent")}, input="")
        assert result.exit_code in wanted, (arguments, result.output)
        if result.exit_code == ExitCode.NOT_RUNNING:
            assert result.stdout == ""
            assert len(result.stderr.splitlines()) == 1
            assert "keylake up" in result.stderr
    assert not (tmp_path / "absent").exists(), "looking changes nothing"


@pytest.mark.parametrize("arguments", [["status"], ["cloud", "key", "list"], ["psql", "shop", "--", "-c", "select 1"]])
def test_an_empty_home_is_no_cluster(arguments: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, arguments, env={"KEYLAKE_HOME": str(tmp_path)})
    assert result.exit_code == ExitCode.NOT_RUNNING, result.output
    assert "keylake up" in result.stderr


def test_down_without_a_cluster_is_fine(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["down", "--home", str(tmp_path), "--json"])
    assert result.exit_code == 0
    assert '"stopped": false' in result.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nope"], "nope"),
        (["--nope"], "--nope"),
        (["project", "create"], "name"),
        (["project", "shwo"], "shwo"),
        (["up", "--proxy-port", "x"], "--proxy-port"),
        (["up", "--proxy-port", "70000"], "--proxy-port"),
        (["cloud", "fault", "set"], "at least one fault"),
        (["cloud", "fault", "set", "--outage", "perhaps"], "perhaps"),
        (["cloud", "fault", "set", "--error-rate", "2"], "--error-rate"),
        (["cloud", "key", "schedule-deletion", "x", "--days", "1"], "--days"),
        (["project", "create", "n" * 101], "name"),
        (["project", "revoke", "shop", "--reason", ""], "reason"),
        (["key-config", "create", "x", "--outage-grace", "-1"], "--outage-grace"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], word: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, arguments, env={"KEYLAKE_HOME": str(tmp_path)})
    assert result.exit_code == ExitCode.USAGE, result.output
    assert len(result.stderr.splitlines()) == 1
    assert word in result.stderr


@pytest.mark.parametrize(
    ("code", "exits"),
    [
        ("AccessDeniedException", ExitCode.REFUSED),
        ("NotFoundException", ExitCode.USAGE),
        ("ValidationException", ExitCode.USAGE),
        ("KMSInvalidStateException", ExitCode.FAILED),
        ("KMSInternalException", ExitCode.UNAVAILABLE),
        ("ThrottlingException", ExitCode.UNAVAILABLE),
        ("", ExitCode.UNAVAILABLE),
    ],
)
def test_what_the_cloud_refuses(code: str, exits: ExitCode) -> None:
    error = cloud_error({"Code": code, "Message": "because"})
    assert exit_code(error) is exits
    assert code in str(error)


def test_home_is_absolute_and_relative_to_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert home_dir(None) == tmp_path / ".keylake"
    assert home_dir(Path("x/../y")) == tmp_path / "y"
    assert home_dir(Path("/srv/k")) == Path("/srv/k")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (TimeoutError(), "no answer in time"),
        (asyncpg.ConnectionDoesNotExistError("closed in the middle"), "closed in the middle"),
        (ConnectionRefusedError(111, "refused"), "ConnectionRefusedError"),
    ],
)
def test_a_demo_that_breaks_off_says_where_and_what_to_do(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(report: Report, **_: bool) -> None:
        with report.chapter("3. Something that takes too long"):
            raise error

    monkeypatch.setattr("keylake.demo._local", broken)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == ExitCode.UNAVAILABLE
    [line] = result.stderr.splitlines()
    for word in (told, "3. Something that takes too long", "keylake demo --keep", "keylake doctor", "uptime"):
        assert word in line


@pytest.mark.parametrize("holds", [True, False])
def test_what_came_of_a_demo_is_json_and_its_story_is_elsewhere(holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def short(report: Report, **_: bool) -> None:
        with report.chapter("1. All of it"):
            report.time("cluster up", 1.5, "8 services")
            report.check("nothing is lost", holds)

    monkeypatch.setattr("keylake.demo._local", short)
    result = CliRunner().invoke(app, ["demo", "--json"])
    assert result.exit_code == (ExitCode.OK if holds else ExitCode.FAILED)
    told = json.loads(result.stdout)
    assert told.pop("seconds") >= 0
    assert told == {
        "passed": int(holds),
        "failed": [] if holds else ["nothing is lost"],
        "timings": [{"what": "cluster up", "seconds": 1.5, "note": "8 services"}],
    }
    assert "nothing is lost" in result.stderr
    assert CliRunner().invoke(app, ["demo", "--json", "--compose"]).exit_code == ExitCode.USAGE
