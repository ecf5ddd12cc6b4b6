"""The parts of `make compose-test` that need no engine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from shared.roles import APPROVES_VARIABLE, ASKS_VARIABLE
from tests.compose.__main__ import AS_TWO_PEOPLE
from tests.compose.engine import undo
from tests.compose.locked import excerpt, needed

LOCK = """\
alpha==1.0 \\
    --hash=sha256:aa
beta-two==2.0 ; python_full_version < '3.12' \\
    --hash=sha256:bb \\
    --hash=sha256:cc
beta-two==2.1 ; python_full_version >= '3.12' \\
    --hash=sha256:dd
gamma==3.0 \\
    --hash=sha256:ee
"""
BEFORE = ["-P FORWARD ACCEPT", "-N MINE", "-A FORWARD -j MINE", "-A MINE -j DROP"]
AFTER = [
    "-P FORWARD DROP",
    "-N MINE",
    "-N DOCKER",
    "-N DOCKER-USER",
    "-N LATER",
    "-A FORWARD -j DOCKER-USER",
    "-A FORWARD -o br-0123 -j DOCKER",
    "-A FORWARD -j MINE",
    "-A FORWARD -j LATER",
    "-A DOCKER-USER -j RETURN",
    "-A MINE -j DROP",
]


def test_an_excerpt_has_every_entry_of_a_name_and_no_other() -> None:
    assert excerpt(LOCK, {"beta-two"}) == "".join(LOCK.splitlines(keepends=True)[2:7])
    with pytest.raises(KeyError, match="delta"):
        excerpt(LOCK, {"alpha", "delta"})


def test_the_s3_server_and_all_that_it_needs_are_locked() -> None:
    names = needed("moto", ["server", "s3"])
    assert {"moto", "flask", "werkzeug", "boto3", "urllib3"} <= names
    assert "pytest" not in names
    lock = (Path(__file__).resolve().parent.parent.parent / "requirements-dev.lock").read_text()
    assert excerpt(lock, names).count("==") >= len(names)


def test_an_engines_rules_are_undone_and_nobody_elses() -> None:
    assert undo(BEFORE, AFTER) == [
        ["-D", "FORWARD", "-j", "DOCKER-USER"],
        ["-D", "FORWARD", "-o", "br-0123", "-j", "DOCKER"],
        ["-D", "DOCKER-USER", "-j", "RETURN"],
        ["-F", "DOCKER"],
        ["-F", "DOCKER-USER"],
        ["-X", "DOCKER"],
        ["-X", "DOCKER-USER"],
        ["-P", "FORWARD", "ACCEPT"],
    ]
    assert undo(BEFORE, BEFORE) == []


@pytest.mark.parametrize("refused", ["", "alice", "bob"])
def test_a_drill_has_the_tokens_of_two_people_or_does_not_run(refused: str, tmp_path: Path) -> None:
    keylake = tmp_path / "keylake"
    keylake.write_text(f'#!/bin/sh\ncase "$*" in *" --for {refused}") exit 7;; esac\necho "token of $8"\n')
    keylake.chmod(0o755)
    told = f'echo "${ASKS_VARIABLE}, ${APPROVES_VARIABLE}, $*"'
    done = subprocess.run(
        ["sh", "-c", AS_TWO_PEOPLE, "sh", "sh", "-c", told, "drill", "none were made", "of it"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    if refused:
        assert (done.returncode, done.stdout) == (7, "")
    else:
        assert done.stdout == "token of alice, token of bob, none were made of it\n"
