"""Who supervises a home: found while it lives, and nobody else is ever signalled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from keylake import supervision
from keylake.pidlock import Identity, Owner, pid_lock
from shared.errors import ConflictError, CorruptedError, UnavailableError

pytestmark = pytest.mark.integration

HOLD = """
import signal, sys
from pathlib import Path
from keylake.pidlock import pid_lock
if sys.argv[2] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with pid_lock(Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


@contextmanager
def holder(path: Path, kind: str = "polite") -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path), kind], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_nobody(tmp_path: Path) -> None:
    assert Owner.find(tmp_path / "pid") is None


def test_the_holder_is_found_and_stopped(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with holder(path) as process:
        owner = Owner.find(path)
        assert owner is not None
        with owner:
            assert owner.pid == process.pid
            assert not owner.wait(0.05)
            assert supervision.stop(owner, timeout_s=10)
            assert process.wait() == -signal.SIGTERM
            owner.send(signal.SIGKILL)  # to nobody
        assert Owner.find(path) is None


def test_one_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with holder(path, "stubborn") as process:
        owner = Owner.find(path)
        assert owner is not None
        with owner:
            assert not supervision.stop(owner, timeout_s=0.2)
        assert process.wait() == -signal.SIGKILL


def test_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with holder(path), pytest.raises(ConflictError), pid_lock(path):
        pass
    with pid_lock(path):
        assert path.stat().st_mode & 0o777 == 0o600
    with pid_lock(path):
        pass


def test_what_a_dead_holder_left_means_nobody(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with holder(path) as process:
        process.kill()
        process.wait()
    assert path.read_bytes()
    assert Owner.find(path) is None


@contextmanager
def locked_with(path: Path, content: bytes) -> Iterator[None]:
    """The file held by a live process that claims to be somebody else."""
    with holder(path):
        path.write_bytes(content)
        yield


@pytest.mark.parametrize("change", ["start_ticks", "boot_id", "gone"])
def test_a_stranger_with_that_pid_is_left_alone(change: str, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with subprocess.Popen(["sleep", "60"]) as stranger:
        try:
            identity = Identity.of(stranger.pid)
            assert identity is not None
            claimed = {
                "start_ticks": identity.model_copy(update={"start_ticks": identity.start_ticks + 1}),
                "boot_id": identity.model_copy(update={"boot_id": "another"}),
                "gone": identity.model_copy(update={"pid": (1 << 22) + 1}),  # past PID_MAX_LIMIT
            }[change]
            content = claimed.model_dump_json().encode()
            with locked_with(path, content), pytest.raises(UnavailableError, match="not visible from here"):
                Owner.find(path)
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_a_malformed_file_that_is_held(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with locked_with(path, b"123\n"), pytest.raises(CorruptedError):
        Owner.find(path)


def test_the_name_of_a_process_does_not_confuse(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 2 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as process:
        try:
            identity = Identity.of(process.pid)
            assert identity is not None
            mine = Identity.of(os.getpid())
            assert mine is not None
            assert identity.start_ticks >= mine.start_ticks > 0
        finally:
            process.kill()


def test_a_gone_process_has_no_identity() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert Identity.of(process.pid) is None


def test_the_lock_is_not_inherited(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with pid_lock(path):
        child = subprocess.Popen(["sleep", "60"])
    try:
        assert Owner.find(path) is None
    finally:
        child.kill()
        child.wait()
