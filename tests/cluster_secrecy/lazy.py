"""A cluster whose computes are on another kind of volume from now on, and what of a lazy one lies on a disk."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from compute.volume.base import VolumeKind
from keylake.cluster import Cluster
from tests.cluster_secrecy.disks import Process
from tests.fixtures.fuse import why_no_fuse

_libc = ctypes.CDLL(None, use_errno=True)


def why_not() -> str:
    """Empty when it can be had here and looked into. In CI it must."""
    why = ""
    if os.geteuid() != 0:
        why = "only root reads the files of processes that are not dumpable"
        if os.environ.get("CI"):
            pytest.fail(why)
    return why or why_no_fuse()


async def use_volume(cluster: Cluster, kind: VolumeKind) -> None:
    """The compute manager starts anew; its computes end with it."""
    config = cluster.layout.config / "compute.json"
    await cluster.service("compute").stop()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"volume": kind.value}))
    await cluster.service("compute").start()


@dataclass(frozen=True, slots=True)
class Server:
    """The process that serves a compute's lazy volume."""

    pid: int
    blocks: Path
    """Its file, which has no name: the link in /proc is the only way to it."""


def servers(processes: Iterable[Process], cluster: Cluster) -> list[Server]:
    """Of all computes that run. A spare agent's has no file yet."""
    directory = cluster.layout.data / "compute-logs"
    found = []
    for process in processes:
        if b"compute.volume" in process.argv.split(b"\0"):
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                name = os.readlink(descriptor)
                if name.startswith(f"{directory}/"):
                    assert name.endswith("(deleted)")
                    found.append(Server(process.pid, descriptor))
    return found


def flush(path: Path) -> None:
    """What the kernel has cached of the file system of `path` is with its server when this returns (syncfs(2))."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _libc.syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), "syncfs")
    finally:
        os.close(descriptor)
