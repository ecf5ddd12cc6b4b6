"""A private place to run one process tree in, which the kernel frees with the tree, SIGKILL included.

With `Isolation.NAMESPACES` the tree gets mount, pid, ipc and (unless asked otherwise) network namespaces of its own
and a private tmpfs over a given directory. Nobody outside sees the mount; when the tree's first process dies, however
it dies, the kernel kills the rest of the pid namespace, and the tmpfs and all System V memory go with it. Works as
root, and as anybody else where user namespaces are allowed.

    setpriv --pdeathsig KILL       dies with us ...
    └─ unshare … --kill-child      ... and takes pid 1 of the namespace with it
       └─ sh: mount tmpfs, exec    pid 1: the command itself

With `Isolation.MOUNTS` there is no pid namespace: where /proc is masked, as in a container, a new one could not be
mounted, and with the old one nobody in there would find its own processes. Files are as private, and are gone with the
last process; but a process dies only with the one that started it (PR_SET_PDEATHSIG), so each has to ask for that.

    setpriv --pdeathsig KILL       one process, which becomes ...
    └─ unshare → sh → the command  ... the command itself

With `Isolation.NONE` (Docker without CAP_SYS_ADMIN, for one) it gets a directory of mode 700 under /dev/shm: also only
in memory, but visible to its user and to root, and somebody must call `wipe`. Processes die with the thread that
started them (PR_SET_PDEATHSIG); their own children do not. Who was killed wipes nothing: `sandboxes_dir` keeps all of
an installation in one place, where its next start does.

Not promised: that pages of the tmpfs are never swapped. Where the kernel knows `noswap` (6.4) and we are root, it is
set.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import functools
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared.errors import InvalidInputError, UnavailableError

SHARED_MEMORY_DIR: Final = Path("/dev/shm")  # noqa: S108 - the point is that it is in memory
_PREFIX: Final = "keylake-"
_PROBE_TIMEOUT_S: Final = 15.0
_DYING_S: Final = 10.0
"""A postmaster gives its children 5 s when it is killed by the death of its parent; until then they may write files."""

DIE_WITH_PARENT: Final = ("setpriv", "--pdeathsig", "KILL", "--")
_MOUNTS: Final = ("--mount", "--ipc")
_PIDS: Final = ("--pid", "--fork", "--kill-child=KILL")

# noswap is refused by older kernels and in user namespaces. A /proc of the new pid namespace hides all other processes.
_ENTER: Final = """
mount -t tmpfs -o "$2,noswap" keylake "$1" 2>/dev/null || mount -t tmpfs -o "$2" keylake "$1" || exit 125
test "$3" = pids && mount -t proc proc /proc 2>/dev/null
shift 3
exec "$@"
"""

# Is the directory ours, and does /proc count processes as we do? Where it does not (a pid namespace in a container in
# which /proc is masked), an agent would not find the processes that it has to kill.
_PROBE: Final = 'test -w "$1" && read -r pid rest </proc/self/stat && test "$pid" = $$'


class Isolation(enum.Enum):
    """Strongest first."""

    NAMESPACES = "namespaces"
    MOUNTS = "mounts"
    NONE = "none"

    @property
    def private_mounts(self) -> bool:
        """Nobody outside sees the files, and the kernel frees them with the tree's last process."""
        return self is not Isolation.NONE

    @property
    def private_pids(self) -> bool:
        """The kernel ends the whole tree with its first process."""
        return self is Isolation.NAMESPACES


@functools.cache
def detect_isolation() -> Isolation:
    """The best that this machine allows, found by trying it once (some 10 ms, blocking)."""
    if shutil.which("unshare") is None or shutil.which("setpriv") is None:
        return Isolation.NONE
    return next(each for each in Isolation if each is Isolation.NONE or _works(each))


def _works(isolation: Isolation) -> bool:
    with tempfile.TemporaryDirectory(prefix="keylake-probe-") as directory:
        sandbox = Sandbox(isolation, Path(directory), 1 << 20)
        try:
            probe = subprocess.run(
                sandbox.command(["sh", "-c", _PROBE, "probe", directory]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_PROBE_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
    return probe.returncode == 0


def _memory_dir() -> Path | None:
    """None: there is none that we may use."""
    usable = SHARED_MEMORY_DIR.is_dir() and os.access(SHARED_MEMORY_DIR, os.W_OK)
    return SHARED_MEMORY_DIR if usable else None


@contextlib.contextmanager
def sandboxes_dir(link: Path) -> Iterator[Path]:
    """A directory for the sandboxes of one installation, in memory where there is some. It is told at `link`, a
    symbolic link in a directory that is ours alone: what an earlier life that was killed has left is removed at the
    start, so its processes must have ended, or be about to.

    Raises UnavailableError when that cannot be removed: nobody else would.
    """
    _remove_linked(link)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_memory_dir()))
    directory.chmod(0o711)  # sandboxes of other owners lie in it, of mode 700 each
    link.symlink_to(directory)
    try:
        yield directory
    finally:
        _remove_linked(link)


def _remove_linked(link: Path) -> None:
    if not link.is_symlink():
        return
    directory = link.readlink()
    deadline = time.monotonic() + _DYING_S
    while _is_ours(directory):
        try:
            shutil.rmtree(directory, onerror=_ignore_missing)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or time.monotonic() > deadline:
                raise UnavailableError(
                    f"{directory}, of an earlier life, cannot be removed: {error.strerror}"
                ) from None
    link.unlink()


def _is_ours(directory: Path) -> bool:
    """There, and not somebody else's who got the same name after the machine was started anew."""
    try:
        state = directory.lstat()
    except FileNotFoundError:
        return False
    return directory.name.startswith(_PREFIX) and stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid()


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Where and how one process tree runs. Made by `create`; `wipe` when every process of it is gone."""

    isolation: Isolation
    directory: Path
    """Absolute. As the tree sees it: its private tmpfs, empty at the start, mode 700. Seen from outside it stays empty,
    but with NONE it is the very same directory."""
    size_bytes: int
    """Limit of the tmpfs. Not enforced with NONE."""
    network: bool = False
    """True: stay in our network namespace. False: there is only a loopback device, and it is down."""
    owner: tuple[int, int] | None = None
    """(uid, gid) that owns the directory, as numbered here. None: whoever we are."""

    @classmethod
    def create(
        cls,
        *,
        size_bytes: int,
        network: bool = False,
        owner: tuple[int, int] | None = None,
        parent_dir: Path | None = None,
        isolation: Isolation | None = None,
    ) -> Sandbox:
        """Make the directory, below `parent_dir` or else /dev/shm, or the directory for temporary files without it.

        With NONE the directory holds the content, so a `parent_dir` elsewhere than in /dev/shm is an error, and so is a
        machine without that. Raises UnavailableError.
        """
        if size_bytes < 1:
            raise InvalidInputError("a sandbox needs a size")
        isolation = isolation or detect_isolation()
        parent_dir = parent_dir or _memory_dir()
        if isolation is Isolation.NONE and (parent_dir is None or not parent_dir.is_relative_to(SHARED_MEMORY_DIR)):
            raise UnavailableError("neither namespaces nor /dev/shm: nowhere to put plaintext but a disk")
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent_dir))
        if isolation is Isolation.NONE and owner is not None:
            os.chown(directory, *owner)
        return cls(isolation, directory, size_bytes, network, owner)

    def command(self, argv: Sequence[str], *, as_ourselves: bool = False) -> list[str]:
        """The argv that runs `argv` inside. It starts with whatever must be started from outside.

        When we are not root, the command is root of a user namespace: it may mount and unmount, and it must become
        somebody else to run Postgres. With `as_ourselves` it gives that up and has our uid.

        The pid that the caller gets is the outermost process's: with NAMESPACES SIGKILL to it ends the tree, and other
        signals do not get through; `inner_pid` finds the process to send those to. It ends when the tree's first
        process ends, with its exit status. Start it from a thread that lives as long as it should: it dies with that
        thread. A command that changes its uid loses the parent-death signal and has to set it again (postgres_command).
        """
        if self.isolation is Isolation.NONE:
            return [*DIE_WITH_PARENT, *argv]
        options = f"size={self.size_bytes},mode=700,nosuid,nodev,noexec"
        if self.owner is not None:
            options += ",uid={},gid={}".format(*self.owner)
        pids = self.isolation.private_pids
        user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
        namespaces = (*user, *_MOUNTS, *(_PIDS if pids else ()), *(() if self.network else ("--net",)))
        enter = ["sh", "-c", _ENTER, "sandbox", str(self.directory), options, "pids" if pids else "no pids"]
        if as_ourselves and os.geteuid() != 0:
            enter += ["unshare", "--user", f"--map-user={os.geteuid()}", f"--map-group={os.getegid()}", "--"]
        return [*DIE_WITH_PARENT, "unshare", *namespaces, "--", *enter, *argv]

    def inner_pid(self, outer_pid: int) -> int | None:
        """The pid, as numbered here, of the command inside, given the pid that the argv of `command` got.

        None when it has not started (`unshare` has not forked) or is gone.
        """
        if not self.isolation.private_pids:
            return outer_pid
        try:
            children = Path(f"/proc/{outer_pid}/task/{outer_pid}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return int(children[0]) if children else None

    def wipe(self) -> None:
        """Remove the directory, and with NONE its content. Again is fine. Only when no process of the tree is left."""
        if self.isolation.private_mounts:
            with contextlib.suppress(FileNotFoundError):
                self.directory.rmdir()
        else:
            shutil.rmtree(self.directory, ignore_errors=False, onerror=_ignore_missing)


def _ignore_missing(function: object, path: str, error: tuple[type[BaseException], BaseException, object]) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]
