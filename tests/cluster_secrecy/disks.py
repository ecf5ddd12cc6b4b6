"""Where a local cluster keeps bytes, who of its processes could put some elsewhere, and who else may read them."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from keylake.cluster import Cluster
from shared.sandbox import SHARED_MEMORY_DIR, Isolation, detect_isolation
from tests.cluster_secrecy.canaries import spellings

IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs", "mqueue", "proc", "sysfs", "devpts"}
OTHERS = 0o077


def runtime_dir(cluster: Cluster) -> Path:
    """Sockets, below /tmp."""
    settings = json.loads((cluster.layout.config / "compute.json").read_text())
    return Path(settings["runtime_dir"]).parent


def persistent(cluster: Cluster) -> dict[str, list[Path]]:
    """Name → files and directories. Together they are everything."""
    layout = cluster.layout
    parts = {
        "object store": [layout.objects, layout.anchors],
        "safekeepers": sorted(layout.data.glob("safekeeper-*")),
        "pageserver's cache": [layout.pageserver_cache],
        "compute logs": [layout.data / "compute-logs"],
        "metadata database": [layout.metadata],
        "customer's cloud": [layout.customercloud],
        "service logs": [layout.logs],
        "settings and keys": [layout.config, layout.keys, layout.pki, layout.state_file],
        "sockets": [runtime_dir(cluster)],
    }
    known = {path for paths in parts.values() for path in paths}
    rest = [path for path in (*layout.home.iterdir(), *layout.data.iterdir()) if path not in {*known, layout.data}]
    return {**parts, "whatever else lies in the home directory": rest}


def readable_by_others(roots: Iterable[Path]) -> list[str]:
    """Files and directories with a permission for group or others. Sockets are as private as their directory."""
    found = []
    for root in roots:
        for path in [root, *root.rglob("*")]:
            with suppress(FileNotFoundError):
                mode = path.lstat().st_mode
                if (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and mode & OTHERS:
                    found.append(f"{oct(stat.S_IMODE(mode))} {path}")
    return found


# --- processes ---


@dataclass(frozen=True, slots=True)
class Process:
    """One of the cluster's. What may not be read (a process that is not dumpable, and we are not root) is empty."""

    pid: int
    argv: bytes
    environ: bytes
    written: tuple[Path, ...]
    """Regular files on a disk, as the process names them, that it has open for writing."""
    shared_memory: tuple[Path, ...]
    """What it has mapped or open below /dev/shm, or was told of in its argv."""


def processes(cluster: Cluster) -> list[Process]:
    """Every process of the cluster: the services, the metadata database, and all that they started."""
    roots = [service.pid for service in cluster.services.values() if service.running]
    with suppress(FileNotFoundError):
        roots.append(int((cluster.layout.metadata / "postmaster.pid").read_text().split()[0]))
    found = []
    for pid in _with_descendants(roots):
        with suppress(FileNotFoundError, ProcessLookupError):
            try:
                found.append(_process(pid))
            except OSError as error:
                if error.errno != errno.EINVAL:  # what the kernel says of the mounts of one that is just ending
                    raise
    return found


def told(cluster_processes: Iterable[Process], secrets_by_name: Mapping[str, bytes]) -> list[str]:
    """Secrets in an argv, which anybody on the machine may read, or in an environ, which is inherited."""
    return [
        f"{name} ({spelling}) of process {process.pid}"
        for process in cluster_processes
        for name, secret in secrets_by_name.items()
        for spelling, needle in spellings(secret).items()
        if needle in process.argv or needle in process.environ
    ]


def _with_descendants(roots: list[int]) -> set[int]:
    parents: dict[int, int] = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):
                # proc(5): the second field stands in parentheses and may hold anything.
                parents[int(directory.name)] = int((directory / "stat").read_text().rpartition(") ")[2].split()[1])
    family = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in family and pid not in family}:
        family |= more
    return family


def _process(pid: int) -> Process:
    directory = Path(f"/proc/{pid}")
    argv = (directory / "cmdline").read_bytes()
    shared = {
        Path(word) for word in argv.decode(errors="replace").split("\0") if word.startswith(f"{SHARED_MEMORY_DIR}/")
    }
    written: set[Path] = set()
    with suppress(PermissionError):
        shared |= {Path(p) for p in _mapped(directory) if p.startswith(f"{SHARED_MEMORY_DIR}/")}
        for path, on_disk in _open_for_writing(directory):
            if on_disk:
                written.add(path)
            elif path.is_relative_to(SHARED_MEMORY_DIR):
                shared.add(path)
    environ = b""
    with suppress(PermissionError):
        environ = (directory / "environ").read_bytes()
    return Process(pid, argv, environ, tuple(sorted(written)), tuple(sorted(shared)))


def _mapped(directory: Path) -> Iterator[str]:
    for line in (directory / "maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6:
            yield fields[5]


def _open_for_writing(directory: Path) -> Iterator[tuple[Path, bool]]:
    """(path, is it on a disk) of every regular file that is open for writing."""
    in_memory = _devices_in_memory(directory)
    for descriptor in (directory / "fd").iterdir():
        with suppress(FileNotFoundError):
            state = descriptor.stat()
            info = (directory / "fdinfo" / descriptor.name).read_text()
            flags = int(next(line.split()[1] for line in info.splitlines() if line.startswith("flags:")), 8)
            if stat.S_ISREG(state.st_mode) and flags & os.O_ACCMODE != os.O_RDONLY:
                name = os.readlink(descriptor)
                # Anonymous memory (memfd_create, POSIX shared memory that is unlinked) belongs to no mount.
                on_disk = state.st_dev not in in_memory and not name.startswith("/memfd:")
                yield Path(name), on_disk


def _devices_in_memory(directory: Path) -> set[int]:
    """Device numbers of mounts without a disk, as the process sees its mounts. A lazy volume is one: what is written
    there its server writes, which is looked at, too."""
    devices = set()
    for line in (directory / "mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind, source, *_ = rest.split()
        if kind in IN_MEMORY or (kind, source) == ("fuse", "keylake"):
            major, _, minor = fields.split()[2].partition(":")
            devices.add(os.makedev(int(major), int(minor)))
    return devices


def shared_memory_of(cluster_processes: Iterable[Process]) -> list[Path]:
    """What lies below /dev/shm for other processes to see and belongs to the cluster.

    Where computes and redo workers cannot have namespaces of their own, their volumes lie there by design.
    """
    if detect_isolation() is Isolation.NONE:
        return []
    paths = {path for process in cluster_processes for path in process.shared_memory}
    return [path for path in sorted(paths) if path.exists()]
