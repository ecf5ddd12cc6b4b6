"""A Docker engine: the one that runs, or one of our own that leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

PREREQUISITES: Final = "apt-get install docker.io docker-compose debootstrap iptables postgresql-client"
_START_TIMEOUT_S: Final = 120.0
_STOP_TIMEOUT_S: Final = 120.0
_ENOUGH_MEMORY_KB: Final = 10 << 20
"""Images, layers and volumes take 2 GB, a base image that is made half of one, and what runs some GB."""


class MissingError(Exception):
    """Something that this machine has not got."""


def require(*programs: str) -> None:
    """Raises MissingError."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise MissingError(f"{', '.join(missing)} not found; on Debian: {PREREQUISITES}")


def docker(*arguments: str, timeout_s: float = 300.0) -> str:
    """Its stdout. Raises CalledProcessError with its stderr in `stderr`."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout_s, check=True)
    return done.stdout


@contextlib.contextmanager
def running_engine() -> Iterator[bool]:
    """DOCKER_HOST leads to an engine. True: it is our own, on data that is removed at the end. Raises MissingError."""
    require("docker")
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0:
        yield False
        return
    require("dockerd", "containerd", "runc")
    if os.geteuid() != 0:
        raise MissingError("no Docker engine answers, and one of our own needs root")
    # Short: the engine's sockets are below it.
    with scratch("keylake-docker-") as directory, _firewall_as_it_was(), _own_engine(directory):
        yield True


@contextlib.contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A directory that is removed at the end; in memory, where there is enough. Needs root.

    Packages and layers are synced to disk piece by piece: that takes most of their time, and whoever else has something
    to sync on this machine, as a metadata database under test, waits for seconds."""
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    available = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    in_memory = available is not None and int(available[1]) >= _ENOUGH_MEMORY_KB
    try:
        if in_memory:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6g,mode=0700", "tmpfs", directory], check=True)
        yield directory
    finally:
        if in_memory:
            subprocess.run(["umount", "--lazy", directory], check=False)
        shutil.rmtree(directory)


@contextlib.contextmanager
def _own_engine(directory: Path) -> Iterator[None]:
    address = f"unix://{directory}/docker.sock"
    before = os.environ.get("DOCKER_HOST")
    elsewhere = Path("/run/docker")  # for plugins, whatever --exec-root says
    was_there = elsewhere.exists()
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *("dockerd", "--host", address, "--bridge", "none"),  # networks are those of the compose file
                *("--data-root", f"{directory}/data", "--exec-root", f"{directory}/exec"),
                *("--pidfile", f"{directory}/docker.pid"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours: the containers are ended before their engine
        )
    os.environ["DOCKER_HOST"] = address
    try:
        _wait_until_up(process, directory / "log")
        yield
    finally:
        process.terminate()  # ends containers and containerd, too
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if before is None:
            del os.environ["DOCKER_HOST"]
        else:
            os.environ["DOCKER_HOST"] = before
        for where in _mounts_below(directory):
            subprocess.run(["umount", "--lazy", where], check=False)
        if not was_there:
            shutil.rmtree(elsewhere, ignore_errors=True)


def _wait_until_up(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while subprocess.run(["docker", "info"], capture_output=True, check=False).returncode != 0:
        if process.poll() is not None or time.monotonic() > deadline:
            raise MissingError(f"dockerd does not start:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.2)


def _mounts_below(directory: Path) -> list[str]:
    """Innermost first (proc(5), mountinfo: the fifth field is the mount point)."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [where for line in reversed(lines) if (where := line.split()[4]).startswith(f"{directory}/")]


@contextlib.contextmanager
def _firewall_as_it_was() -> Iterator[None]:
    """An engine leaves its chains, a policy and a sysctl behind."""
    forward = Path("/proc/sys/net/ipv4/ip_forward")
    forwarding = forward.read_text()
    programs = [program for program in ("iptables", "ip6tables") if shutil.which(program)]
    tables = [(program, table) for program in programs for table in ("nat", "filter")]
    before = {each: _rules(*each) for each in tables}
    try:
        yield
    finally:
        for each in tables:
            for command in undo(before[each], _rules(*each)):
                subprocess.run([each[0], "--wait", "-t", each[1], *command], capture_output=True, check=False)
        forward.write_text(forwarding)


def _rules(program: str, table: str) -> list[str]:
    done = subprocess.run([program, "--wait", "-t", table, "-S"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


def undo(before: Sequence[str], after: Sequence[str]) -> list[list[str]]:
    """What takes a table (`iptables -S`) back, as far as an engine has changed it: rules, then chains, then policies.

    Rules and chains that are not an engine's are somebody else's, and stay."""
    new = [line.split() for line in after if line not in before]
    chains = [line[1] for line in new if line[0] == "-N" and line[1].startswith("DOCKER")]
    rules = [line for line in new if line[0] == "-A" and re.search(r"\bDOCKER|\bdocker0\b|\bbr-", " ".join(line))]
    policies = [line.split() for line in before if line.startswith("-P") and line not in after]
    return [
        *(["-D", *rule[1:]] for rule in rules),
        *(["-F", chain] for chain in chains),
        *(["-X", chain] for chain in chains),
        *policies,
    ]
