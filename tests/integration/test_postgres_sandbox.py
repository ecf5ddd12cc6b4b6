"""Sandboxes: nothing of a process tree survives its end, and nobody sees into it."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import sandbox as sandbox_module
from shared.errors import InvalidInputError, UnavailableError
from shared.postgres import find_postgres, postgres_command, postgres_environment, unprivileged
from shared.sandbox import Isolation, Sandbox, detect_isolation, sandboxes_dir

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]
needs_namespaces = pytest.mark.skipif(detect_isolation() is Isolation.NONE, reason="this machine allows no namespaces")
SIZE = 1 << 20


ALL = [
    pytest.param(Isolation.NAMESPACES, marks=needs_namespaces),
    pytest.param(Isolation.MOUNTS, marks=needs_namespaces),
    Isolation.NONE,
]


@pytest.fixture(params=ALL)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    made = Sandbox.create(size_bytes=SIZE, isolation=request.param)
    yield made
    made.wipe()
    made.wipe()
    assert not made.directory.exists()


@contextlib.contextmanager
def running(sandbox: Sandbox, script: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A shell script in a sandbox, and a pipe that ends when its last process is gone. $D is the directory."""
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        sandbox.command(["sh", "-c", f"D={sandbox.directory}; {script}"]),
        pass_fds=[write_end],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    os.close(write_end)
    try:
        yield process, read_end
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        os.close(read_end)


def ended(pipe: int) -> bool:
    """Waits for the pipe's end; nobody writes to it."""
    return bool(select.select([pipe], [], [], 20)[0]) and os.read(pipe, 1) == b""


def output(sandbox: Sandbox, script: str) -> str:
    with running(sandbox, script) as (process, _):
        return process.communicate(timeout=20)[0].decode()


def test_the_directory_is_private_and_empty(sandbox: Sandbox) -> None:
    assert output(sandbox, 'stat -c "%a %F" $D; ls -A $D').split("\n")[:2] == ["700 directory", ""]


def test_ends_with_the_status_of_its_command(sandbox: Sandbox) -> None:
    with running(sandbox, "exit 7") as (process, _):
        assert process.wait(timeout=20) == 7


def test_killing_the_outermost_process_ends_all(sandbox: Sandbox) -> None:
    # The shell's own child stays in the foreground: without a pid namespace, grandchildren are not promised.
    deep = "(sleep 1000 & sleep 1000) & echo up; " if sandbox.isolation.private_pids else "echo up; "
    with running(sandbox, f"echo secret > $D/file; {deep} exec sleep 1000") as (process, pipe):
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        inside = sandbox.directory / "file"
        assert inside.exists() is (sandbox.isolation is Isolation.NONE)
        process.send_signal(signal.SIGKILL)
        assert ended(pipe), "a process outlives the sandbox"
    if sandbox.isolation.private_mounts:
        assert not inside.exists()
    else:
        assert inside.exists(), "with NONE somebody must call wipe: the fixture does"


@needs_namespaces
def test_killing_the_inner_process_ends_all() -> None:
    sandbox = Sandbox.create(size_bytes=SIZE)
    with running(sandbox, "sleep 1000 & echo up; exec sleep 1000") as (process, pipe):
        assert process.stdout is not None
        process.stdout.readline()
        pid = sandbox.inner_pid(process.pid)
        assert pid is not None
        assert pid != process.pid
        os.kill(pid, signal.SIGKILL)
        assert ended(pipe)
    assert sandbox.inner_pid(process.pid) is None
    sandbox.wipe()


@needs_namespaces
@pytest.mark.parametrize("isolation", [Isolation.NAMESPACES, Isolation.MOUNTS])
def test_nobody_outside_sees_the_mount(isolation: Isolation) -> None:
    sandbox = Sandbox.create(size_bytes=SIZE, isolation=isolation)
    with running(sandbox, "echo secret > $D/file; echo up; exec sleep 1000") as (process, _):
        assert process.stdout is not None
        process.stdout.readline()
        assert list(sandbox.directory.iterdir()) == []
        assert str(sandbox.directory) not in Path("/proc/self/mountinfo").read_text()
        pid = sandbox.inner_pid(process.pid)
        assert str(sandbox.directory) in Path(f"/proc/{pid}/mountinfo").read_text()
    sandbox.wipe()


@needs_namespaces
def test_its_size_is_limited() -> None:
    sandbox = Sandbox.create(size_bytes=SIZE)
    assert output(sandbox, "head -c 2000000 /dev/zero > $D/big 2>/dev/null && echo fits || echo full") == "full\n"
    sandbox.wipe()


@needs_namespaces
def test_nothing_of_it_goes_to_swap_where_the_kernel_can_promise() -> None:
    sandbox = Sandbox.create(size_bytes=SIZE)
    options = output(sandbox, "grep $D /proc/self/mounts")
    assert "nosuid,nodev,noexec" in options
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if os.geteuid() == 0 and release >= (6, 4) and Path("/proc/self/uid_map").read_text().split()[2] == "4294967295":
        assert "noswap" in options
    sandbox.wipe()


@needs_namespaces
def test_it_has_no_network_unless_asked_for() -> None:
    without = Sandbox.create(size_bytes=SIZE)
    devices = output(without, "tail -n +3 /proc/net/dev")
    assert [line.split(":")[0].strip() for line in devices.splitlines()] in ([], ["lo"])
    with_network = Sandbox.create(size_bytes=SIZE, network=True)
    assert output(with_network, "readlink /proc/self/ns/net").strip() == os.readlink("/proc/self/ns/net")
    without.wipe()
    with_network.wipe()


@needs_namespaces
def test_the_directory_belongs_to_whom_it_is_for() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives directories away")
    sandbox = Sandbox.create(size_bytes=SIZE, owner=(1234, 4321))
    assert output(sandbox, 'stat -c "%u %g" $D') == "1234 4321\n"
    sandbox.wipe()


def test_postgres_runs_inside_and_is_not_root(sandbox: Sandbox) -> None:
    installation = find_postgres()
    directory = sandbox.directory
    if sandbox.isolation is Isolation.NONE:
        unprivileged().give(directory)
    script = """
        id -u >&2
        "$1/initdb" -D "$2/data" -U postgres --no-sync --wal-segsize=1 --locale=C >/dev/null &&
        echo 'select 6 * 7 as answer' | "$1/postgres" --single -D "$2/data" postgres
    """
    large = Sandbox(sandbox.isolation, directory, 256 << 20, owner=unprivileged().owner)
    done = subprocess.run(
        large.command(postgres_command(["sh", "-c", script, "sh", str(installation.bin_dir), str(directory)])),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=postgres_environment(),
        cwd="/",
    )
    assert 'answer = "42"' in done.stdout, done.stderr
    assert done.stderr.split()[0] != "0"


CHILD = """
import subprocess, sys
from shared.sandbox import Isolation, Sandbox
sandbox = Sandbox.create(size_bytes=1 << 20, isolation=Isolation(sys.argv[2]))
up = ["sh", "-c", 'echo "$0"; exec sleep 1000', str(sandbox.directory)]
process = subprocess.Popen(sandbox.command(up), pass_fds=[int(sys.argv[1])])
process.wait()
"""


@pytest.mark.parametrize("isolation", ALL)
def test_ends_with_the_process_that_started_it(isolation: Isolation) -> None:
    read_end, write_end = os.pipe()
    starter = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(write_end), isolation.value],
        pass_fds=[write_end],
        stdout=subprocess.PIPE,
    )
    os.close(write_end)
    assert starter.stdout is not None
    directory = Path(starter.stdout.readline().decode().rstrip("\n"))
    assert directory.is_dir()
    starter.kill()
    starter.wait()
    assert ended(read_end), "the sandbox outlives its starter"
    starter.stdout.close()
    os.close(read_end)
    directory.rmdir()  # nobody was left to call wipe; other sandboxes' directories are not ours to touch


LEAVES_IT = """
import os, signal, sys
from pathlib import Path
from shared.sandbox import Isolation, Sandbox, sandboxes_dir
with sandboxes_dir(Path(sys.argv[1])) as parent:
    sandbox = Sandbox.create(size_bytes=1 << 20, parent_dir=parent, isolation=Isolation.NONE)
    (sandbox.directory / "pgdata").mkdir(mode=0o500)
    (sandbox.directory / "file").write_text("secret")
    print(sandbox.directory, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_installation_left_in_memory_is_removed_by_its_next_start(tmp_path: Path) -> None:
    link, others = tmp_path / "volumes", tmp_path / "others"
    with sandboxes_dir(others) as neighbour:
        kept = Sandbox.create(size_bytes=SIZE, parent_dir=neighbour, isolation=Isolation.NONE)
        killed = subprocess.run(
            [sys.executable, "-c", LEAVES_IT, str(link)], stdout=subprocess.PIPE, text=True, check=False
        )
        left = Path(killed.stdout.strip())
        assert (left / "file").read_text() == "secret"
        with sandboxes_dir(link) as parent:
            assert not left.parent.exists()
            assert list(parent.iterdir()) == []
        assert not parent.exists()
        assert kept.directory.is_dir()
    assert list(tmp_path.iterdir()) == []
    # After the machine was started anew there is nothing. And what is no such directory is left alone.
    (tmp_path / "documents").mkdir()
    for target in ("nothing", "documents"):
        link.symlink_to(tmp_path / target)
        with sandboxes_dir(link):
            pass
    assert (tmp_path / "documents").is_dir()
    with pytest.raises(UnavailableError, match="nowhere"):
        Sandbox.create(size_bytes=SIZE, parent_dir=tmp_path, isolation=Isolation.NONE)


NOT_ROOT = """
import os, subprocess
from shared.sandbox import Isolation, Sandbox, detect_isolation
assert os.geteuid() == 65534
assert detect_isolation() is Isolation.NAMESPACES
for isolation in (Isolation.NAMESPACES, Isolation.MOUNTS):
    sandbox = Sandbox.create(size_bytes=1 << 20, isolation=isolation)
    done = subprocess.run(
        sandbox.command(["sh", "-c", f"echo secret > {sandbox.directory}/file && cat {sandbox.directory}/file"]),
        capture_output=True, text=True,
    )
    assert done.stdout == "secret\\n", done
    assert list(sandbox.directory.iterdir()) == []
    as_root, as_ourselves = (
        subprocess.run(sandbox.command(["id", "-u"], as_ourselves=flag), capture_output=True, text=True).stdout.strip()
        for flag in (False, True)
    )
    assert (as_root, as_ourselves) == ("0", "65534"), (as_root, as_ourselves)
    sandbox.wipe()
print("fine")
"""


@needs_namespaces
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_works_for_somebody_who_is_not_root() -> None:
    with tempfile.TemporaryDirectory() as repository:
        # The checkout itself may not be readable for others.
        shutil.copytree(Path(sandbox_module.__file__).parent, Path(repository) / "shared")
        os.chmod(repository, 0o755)  # noqa: S103
        as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
        done = subprocess.run(
            [*as_nobody, sys.executable, "-c", textwrap.dedent(NOT_ROOT)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            cwd=repository,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": repository, "PYTHONDONTWRITEBYTECODE": "1"},
        )
    assert done.stdout == "fine\n", done.stderr


def test_plaintext_needs_memory_to_be_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox_module, "SHARED_MEMORY_DIR", tmp_path / "missing")
    with pytest.raises(UnavailableError, match="nowhere"):
        Sandbox.create(size_bytes=SIZE, isolation=Isolation.NONE)


def test_a_sandbox_without_size_is_refused() -> None:
    with pytest.raises(InvalidInputError):
        Sandbox.create(size_bytes=0)
