"""A person's token in the environment goes no further than the command that it was given for."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from keylake import supervision
from keylake.cli.app import app
from keylake.cli.common import ExitCode
from keylake.cli.tokens import ttl_s
from keylake.place import STACK_VARIABLE
from keylake.process import ServiceProcess
from shared.errors import InvalidInputError


def test_what_stays_does_not_inherit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYLAKE_TOKEN", "a.b.c")
    assert "KEYLAKE_TOKEN" not in supervision.child_environment()


async def test_no_service_is_started_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its log says what it found in its environment. Nor does a shell's variable switch sealing off."""
    monkeypatch.setenv("KEYLAKE_TOKEN", "a.b.c")
    monkeypatch.setenv("KEYLAKE_UNSAFE_NULL_CIPHER", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "nosy.py").write_text("import os, time\nprint(sorted(os.environ), flush=True)\ntime.sleep(60)\n")
    log = tmp_path / "log"

    async def has_spoken() -> bool:
        return log.exists() and log.read_bytes().endswith(b"]\n")

    process = ServiceProcess("nosy", "nosy", tmp_path / "none.json", log, has_spoken)
    await process.start()
    await process.stop()
    assert "PYTHONPATH" in log.read_text()
    assert "KEYLAKE_" not in log.read_text()


def test_in_the_operators_container_it_is_about_the_containers(tmp_path: Path) -> None:
    """There is no home. The secrets of these containers are not made yet."""
    environment = {"KEYLAKE_HOME": str(tmp_path / "absent")}
    for arguments in (["list"], ["revoke", "tok-0123456789abcdef"], ["create", "--role", "auditor", "--ttl", "1m"]):
        outside = CliRunner().invoke(app, ["token", *arguments], env=environment)
        assert outside.exit_code == ExitCode.NOT_RUNNING, outside.output
        inside = CliRunner().invoke(app, ["token", *arguments], env=environment | {STACK_VARIABLE: str(tmp_path)})
        assert inside.exit_code == ExitCode.UNAVAILABLE, inside.output
        assert "has not been provisioned" in inside.stderr


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("8h", 28800), ("7d", 604800)])
def test_times(text: str, seconds: int) -> None:
    assert ttl_s(text) == seconds


@pytest.mark.parametrize("text", ["", "8", "h", "0h", "-1h", "1.5h", "8 h", "8H", "8h\n", "99999999h", "٣h", "1e3s"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(InvalidInputError):
        ttl_s(text)
