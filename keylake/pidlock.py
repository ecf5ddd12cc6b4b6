"""Who supervises a home: a file that is locked for as long as its owner lives, and says who that is.

`flock` answers *whether* somebody runs (the kernel drops the lock with the process, however it ends); the content
answers *who*. A pid alone may be somebody else's by now, so the file also holds when the process started and the id of
the machine's boot, and signals go through a pidfd that was opened before those were compared: never to a stranger.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import ConflictError, CorruptedError, UnavailableError

_MAX_SIZE_BYTES: Final = 4096
_CONTENT_TIMEOUT_S: Final = 2.0
_POLL_S: Final = 0.02
_START_TIME_FIELD: Final = 22 - 3  # proc(5): field 22 of /proc/PID/stat, counted from the state (3), after the name


class Identity(BaseModel):
    """One process of one boot of one machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pid: int = Field(ge=1, lt=1 << 31)
    start_ticks: int = Field(ge=0, lt=1 << 64)
    """When it started, in clock ticks since boot."""
    boot_id: str = Field(max_length=64)

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """None when there is no such process."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The name stands in parentheses and may itself hold some, so count from the last one.
        fields = stat.rpartition(")")[2].split()
        return cls(pid=pid, start_ticks=int(fields[_START_TIME_FIELD]), boot_id=boot_id)

    @classmethod
    def parse(cls, content: bytes) -> Identity:
        """Raises CorruptedError."""
        try:
            return cls.model_validate_json(content)
        except ValidationError:
            raise CorruptedError("the supervisor's pid file is malformed") from None


class PidLock:
    """A lock that is held."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def is_findable(self) -> bool:
        """Is it still the file that others look at? Not if somebody has deleted it, or the whole home."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False


@contextlib.contextmanager
def pid_lock(path: Path) -> Iterator[PidLock]:
    """Be the one who supervises, while the block runs. Raises ConflictError when somebody else does."""
    deadline = time.monotonic() + _CONTENT_TIMEOUT_S
    while (descriptor := _acquire(path)) is None:
        # Whoever looks whether it is taken holds it for a moment.
        if time.monotonic() > deadline:
            raise ConflictError("a supervisor of this home is already running")
        time.sleep(_POLL_S)
    try:
        identity = Identity.of(os.getpid())
        if identity is None:
            raise UnavailableError("/proc is not mounted, or is another pid namespace's")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, identity.model_dump_json().encode(), 0)
        yield PidLock(path, descriptor)
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _acquire(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Somebody may have removed the file between our open and our lock: then it is the new one that counts.
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


class Owner:
    """The live process that holds a lock. Use as a context manager, or call `close`."""

    def __init__(self, identity: Identity, pidfd: int) -> None:
        self.identity = identity
        self._pidfd = pidfd

    @property
    def pid(self) -> int:
        return self.identity.pid

    @classmethod
    def find(cls, path: Path) -> Self | None:
        """Who holds the lock; None when nobody does.

        Raises UnavailableError when it is held by a process that cannot be verified from here (another machine or
        container that shares the directory), CorruptedError when the file is not ours.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            deadline = time.monotonic() + _CONTENT_TIMEOUT_S
            # The owner locks first and writes then; it empties the file last and unlocks then.
            while is_locked(descriptor):
                if content := os.pread(descriptor, _MAX_SIZE_BYTES, 0):
                    owner = cls._verified(Identity.parse(content))
                    if owner is not None:
                        return owner
                if time.monotonic() > deadline:
                    raise UnavailableError(
                        "the supervisor's pid file is held by a process that is not visible from here (another "
                        "container or machine with the same directory?): stop it where it runs"
                    )
                time.sleep(_POLL_S)
            return None
        finally:
            os.close(descriptor)

    @classmethod
    def _verified(cls, identity: Identity) -> Self | None:
        try:
            pidfd = os.pidfd_open(identity.pid)
        except ProcessLookupError:
            return None
        # From here on the pid cannot change its meaning for us: what is compared now is what `send` reaches.
        if Identity.of(identity.pid) == identity:
            return cls(identity, pidfd)
        os.close(pidfd)
        return None

    def send(self, number: signal.Signals) -> None:
        """To this very process, or to nobody when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def wait(self, timeout_s: float) -> bool:
        """Has it ended, at the latest after `timeout_s`?"""
        return bool(select.select([self._pidfd], [], [], timeout_s)[0])

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def is_locked(descriptor: int) -> bool:
    """Does another open file hold the lock?"""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False
