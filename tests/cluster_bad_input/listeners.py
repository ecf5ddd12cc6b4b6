"""What a cluster's processes listen on, as the kernel knows it: so that no port is forgotten."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from keylake.cluster import Cluster
from tests.cluster_secrecy.disks import processes

_LISTENING = "0A"  # proc_pid_net(5): TCP_LISTEN
_ACCEPTS = 0x10000  # __SO_ACCEPTCON


@dataclass(frozen=True, slots=True, order=True)
class Listener:
    host: str
    """Hexadecimal, as the kernel prints it; of a Unix socket its path."""
    port: int

    @property
    def is_unix(self) -> bool:
        return self.port < 0


def listeners(cluster: Cluster) -> list[Listener]:
    """Sockets that a process of the cluster accepts connections on, in whatever network namespace it is."""
    found: set[Listener] = set()
    for process in processes(cluster):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            directory = Path(f"/proc/{process.pid}")
            mine = {os.readlink(d) for d in (directory / "fd").iterdir()}
            found |= {listener for inode, listener in _all(directory / "net") if f"socket:[{inode}]" in mine}
    return sorted(found)


def _all(net: Path) -> Iterator[tuple[str, Listener]]:
    for name in ("tcp", "tcp6"):
        for line in (net / name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING:
                host, _, port = fields[1].partition(":")
                yield fields[9], Listener(host, int(port, 16))
    for line in (net / "unix").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[3], 16) & _ACCEPTS:
            yield fields[6], Listener(fields[7] if len(fields) > 7 else "", -1)


def configured_ports(cluster: Cluster) -> dict[int, str]:
    """Port → the setting that names it, of all services."""
    found: dict[int, str] = {}
    for name in cluster.services:
        for setting, value in json.loads((cluster.layout.config / f"{name}.json").read_text()).items():
            if setting.endswith("listen"):
                found[value["port"]] = setting
            elif setting == "port":
                found[value] = setting
    return found
