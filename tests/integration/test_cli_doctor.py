"""`keylake doctor`: what is there, what is not, and what to do about it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from keylake.cli.console import DEFAULT_PORT
from keylake.doctor import Verdict, _console_port, _swap
from tests.fixtures.fuse import why_no_fuse

pytestmark = pytest.mark.integration


def doctor(
    *arguments: str, command: Sequence[str] = ("-m", "keylake.cli"), **environment: str
) -> tuple[int, dict[str, dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, *command, "doctor", "--json", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, {finding["name"]: finding for finding in json.loads(done.stdout)}


def test_a_machine_that_runs_these_tests_is_well(tmp_path: Path) -> None:
    code, found = doctor("--home", str(tmp_path / "home"))
    assert code == 0
    assert found["PostgreSQL"]["detail"].startswith("16.")
    assert {name for name, finding in found.items() if finding["verdict"] == "missing"} == set()
    assert all(bool(f["remedy"]) == (f["verdict"] != "ok") for f in found.values())
    assert not (tmp_path / "home").exists(), "it changes nothing"


def test_without_postgres(tmp_path: Path) -> None:
    code, found = doctor(KEYLAKE_PG_BIN=str(tmp_path))
    assert code == 1
    assert found["PostgreSQL"]["verdict"] == "missing"
    assert "KEYLAKE_PG_BIN" in found["PostgreSQL"]["remedy"]
    assert found["PostgreSQL headers"]["verdict"] == "missing"


def test_without_the_tools_of_the_system(tmp_path: Path) -> None:
    """No cc on PATH: the wheel's compiler is found. No unshare and setpriv: namespaces are not."""
    code, found = doctor(PATH=str(tmp_path))
    assert "ziglang" in found["C compiler"]["detail"]
    assert found["namespaces"]["verdict"] == "warning"
    assert "unshare" in found["namespaces"]["remedy"]
    if os.geteuid() == 0:  # then Postgres needs one of them
        assert code == 1
        assert found["PostgreSQL"]["verdict"] == "missing"


def test_without_any_compiler(tmp_path: Path) -> None:
    """Nor ziglang's, which is a module."""
    hiding = "import sys; sys.modules['ziglang'] = None; from keylake.cli import main; main()"
    code, found = doctor(command=["-c", hiding], PATH=str(tmp_path))
    assert code == 1
    assert found["C compiler"]["verdict"] == "missing"
    assert "install cc" in found["C compiler"]["remedy"]
    assert "pip install ziglang" in found["C compiler"]["remedy"]


def test_the_consoles_port_is_told_of() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        [taken] = _console_port(port)
    assert (taken.verdict, str(port) in taken.detail) == (Verdict.WARNING, True)
    assert "keylake console --port 0" in taken.remedy
    assert [finding.verdict for finding in _console_port(port)] == [Verdict.OK]
    assert str(DEFAULT_PORT) in doctor()[1]["console port"]["detail"]


def test_without_docker_all_is_well(tmp_path: Path) -> None:
    """Only `make up` needs it."""
    _, found = doctor(PATH=str(tmp_path))
    assert found["containers"]["verdict"] == "ok"
    assert "nothing else" in found["containers"]["detail"]


def test_fuse_is_told_of(tmp_path: Path) -> None:
    """As computes find it. Without the tools for namespaces there is none in any case."""
    _, found = doctor()
    assert found["fuse"]["verdict"] == ("warning" if why_no_fuse() else "ok")
    _, found = doctor(PATH=str(tmp_path))
    assert found["fuse"]["verdict"] == "warning"
    assert "tmpfs" in found["fuse"]["detail"]


def test_swap_is_told_of(tmp_path: Path) -> None:
    swaps = tmp_path / "swaps"
    swaps.write_text("Filename\tType\tSize\tUsed\tPriority\n")
    assert [finding.verdict for finding in _swap(swaps)] == [Verdict.OK]
    swaps.write_text("Filename\tType\tSize\tUsed\tPriority\n/dev/sda2 partition 2097148 0 -2\n")
    [finding] = _swap(swaps)
    assert (finding.verdict, "/dev/sda2" in finding.detail, bool(finding.remedy)) == (Verdict.WARNING, True, True)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code, found = doctor("--proxy-port", str(port))
    assert code == 1
    assert found["proxy port"]["verdict"] == "missing"
    assert doctor("--proxy-port", str(port))[1]["proxy port"]["verdict"] == "ok"
