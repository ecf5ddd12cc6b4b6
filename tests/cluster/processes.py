"""The processes of a cluster's computes, as the operating system sees them.

A compute's volume is mounted in a mount namespace of its own. `/proc/<pid>/root` leads into it for whoever may trace
that process: root, and also the plain user who made the user namespace that it runs in (user_namespaces(7)).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from keylake.cluster import Cluster
from shared.ids import EndpointId
from tests.fixtures.waiting import wait_until


@dataclass(frozen=True, slots=True)
class Process:
    """One line of the process table. A pid together with its start is never used again."""

    pid: int
    started: int
    parent: int
    state: str
    command: str

    @property
    def runs(self) -> bool:
        return self.state not in "ZX"

    @property
    def exists(self) -> bool:
        """Still the same process, and no zombie: a zombie holds neither memory nor files."""
        now = _read(self.pid)
        return now is not None and now.started == self.started and now.runs


def _read(pid: int) -> Process | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # proc(5): the command stands in parentheses and may hold any character, these included.
    before, _, after = stat.rpartition(") ")
    fields = after.split()
    return Process(pid, int(fields[19]), int(fields[1]), fields[0], before.partition(" (")[2])


def title(process: Process) -> str:
    """What it calls itself: of Postgres's, which kind and whose; empty when it has ended."""
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


@contextmanager
def standing_still(pids: Iterable[int]) -> Iterator[None]:
    """These processes are stopped (SIGSTOP) within the block."""
    stopped = list(pids)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def below(ancestor: int) -> list[Process]:
    """All running descendants of a process, namespaces or not."""
    everyone = [p for d in Path("/proc").iterdir() if d.name.isdigit() and (p := _read(int(d.name))) is not None]
    family, found = {ancestor}, list[Process]()
    while more := [p for p in everyone if p.parent in family and p.pid not in family]:
        family |= {p.pid for p in more}
        found += more
    return [p for p in found if p.runs]


@dataclass(frozen=True, slots=True)
class ComputeProcesses:
    """Of one running compute."""

    agent: Process
    postmaster: Process
    everyone: tuple[Process, ...]
    """The agent and everything below it."""
    socket_dir: Path
    pgdata: Path
    """Absolute, as the compute sees it."""

    @property
    def pgdata_from_here(self) -> Path:
        """Also readable when the postmaster has ended, for as long as the agent lives."""
        return Path(f"/proc/{self.agent.pid}/root") / self.pgdata.relative_to("/")

    def alive(self) -> list[Process]:
        return [p for p in self.everyone if p.exists]

    def pause(self) -> None:
        """SIGSTOP to the agent: it can neither renew its lease, nor hear of anything, nor kill its Postgres."""
        os.kill(self.agent.pid, signal.SIGSTOP)

    def resume(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.agent.pid, signal.SIGCONT)

    def pause_all(self) -> None:
        """SIGSTOP to everything of it, what was started since it was looked at included."""
        paused: set[int] = set()
        while running := [pid for pid in self._pids() if pid not in paused]:
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            paused.update(running)

    def resume_all(self, *, but_the_agent: bool = False) -> None:
        for pid in self._pids():
            if not (but_the_agent and pid == self.agent.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _pids(self) -> list[int]:
        """Of all that runs now. The agent's first: it would kill the others."""
        return [process.pid for process in (self.agent, *below(self.agent.pid)) if process.exists]

    async def gone(self, timeout_s: float = 20.0) -> None:
        """Returns when none of its processes runs any more. Raises TimeoutError."""
        await wait_until(lambda: not self.alive(), timeout_s)


async def compute_of(cluster: Cluster, endpoint_id: EndpointId, manager: str = "compute") -> ComputeProcesses:
    """The compute that runs for an endpoint. Raises LookupError."""
    endpoint = await cluster.client.endpoint(endpoint_id)
    return find_compute(cluster, str(endpoint.instance_id), manager)


def find_compute(cluster: Cluster, instance_id: str, manager: str = "compute") -> ComputeProcesses:
    """As `compute_of`, for one instance. Raises LookupError."""
    family = below(cluster.service(manager).pid)
    by_pid = {p.pid: p for p in family}
    for process in family:
        # The postmaster is the one whose parent is no postgres.
        parent = by_pid.get(process.parent)
        if process.command != "postgres" or parent is None or parent.command == "postgres":
            continue
        socket_dir = Path(_lock_file_lines(process)[4])
        if socket_dir.name == instance_id:
            pgdata = Path(os.readlink(f"/proc/{process.pid}/cwd"))
            return ComputeProcesses(parent, process, (parent, *below(parent.pid)), socket_dir, pgdata)
    raise LookupError(f"no Postgres runs for {instance_id}")


def postmasters(cluster: Cluster) -> list[Process]:
    """Of all computes, also of those whose manager is dead."""
    everyone = [p for d in Path("/proc").iterdir() if d.name.isdigit() and (p := _read(int(d.name))) is not None]
    commands = {p.pid: p.command for p in everyone}
    return [
        p
        for p in everyone
        if p.runs
        and p.command == "postgres"
        and commands.get(p.parent) != "postgres"
        and Path(_lock_file_lines(p)[4]).is_relative_to(cluster.runtime_dir / "c")
    ]


def _lock_file_lines(postmaster: Process) -> list[str]:
    """postmaster.pid (pidfile.h): pid, data directory, start time, port, socket directory, …"""
    try:
        lines = Path(f"/proc/{postmaster.pid}/cwd/postmaster.pid").read_text().splitlines()
    except OSError:  # it has not come so far, or it is ending, and its volume with it (ENOTCONN, ESRCH)
        lines = []
    return lines + [""] * 5
