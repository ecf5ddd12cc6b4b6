"""Killing a process tree for good.

Postgres's children call setsid, so signalling a process group does not reach them, and one that is busy notices the
death of its parent late. But a process whose parent dies becomes a child of its nearest *subreaper* (prctl(2)), which
pid 1 of a namespace is anyway. So: be the subreaper, and kill one's children until there are none.

And nobody may notice the others die: a backend that sees its postmaster gone has a last word for its client
("unexpected postmaster exit"), which is not why the session ends. So all are stopped before the first one is killed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

_PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> None:
    """Orphans among our descendants become our children. Raises OSError."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def children() -> list[int]:
    """Our child processes that still run. A zombie does not: it holds no memory and no file any more."""
    return [pid for pid in _children_of("self") if _runs(pid)]


def _children_of(process: str) -> list[int]:
    """Zombies included. Empty when there is no such process."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
                found += map(int, (thread / "children").read_text().split())
    return found


def _with_descendants(roots: list[int]) -> list[int]:
    """Parents stand before their children."""
    found = list(roots)
    for pid in found:  # grows meanwhile
        found += _children_of(str(pid))
    return found


def _runs(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    # proc(5): the state is the first field behind the command's name, which may hold anything but ends with ")".
    return stat.rpartition(b") ")[2][:1] not in b"ZX"


def stop_descendants(spared: int) -> None:
    """SIGSTOP every descendant but our child `spared`, and what they fork meanwhile: to be killed soon."""
    stopped: set[int] = set()
    while family := [
        pid for pid in _with_descendants([pid for pid in children() if pid != spared]) if pid not in stopped
    ]:
        for pid in family:
            _signal(pid, signal.SIGSTOP)
        stopped.update(family)


def kill_descendants(timeout_s: float = 5.0) -> int:
    """SIGKILL every descendant; returns how many processes were signalled, once none runs any more.

    Blocks, for milliseconds as a rule: nothing else may happen in between, which is the point. Exit statuses are left
    to whoever waits for them. Raises TimeoutError when a process does not die (uninterruptible sleep).
    """
    killed: set[int] = set()
    deadline = time.monotonic() + timeout_s
    while remaining := children():
        family = [pid for pid in _with_descendants(remaining) if pid not in killed]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in family:
                _signal(pid, number)
        killed.update(family)
        if not _wait_for_ends(remaining, deadline):
            raise TimeoutError(f"{len(remaining)} processes do not die")
    return len(killed)


def _wait_for_ends(pids: list[int], deadline: float) -> bool:
    """False: one of them, whose parents we are, still runs at the deadline.

    Nobody looks again and again: when a machine's computes all end at once, each of them would keep a core from the
    others' ends.
    """
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue  # somebody has collected it
        try:
            ends = select.poll()
            ends.register(descriptor, select.POLLIN)
            if not ends.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return False
        finally:
            os.close(descriptor)
    return True


def kill_tree(root: int) -> None:
    """SIGKILL `root` and all its descendants, none of whom sees another one die. Does not wait for their ends."""
    family = _with_descendants([root])
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in family:
            _signal(pid, number)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it was faster
        os.kill(pid, number)
