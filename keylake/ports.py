"""TCP ports for services that are about to start, given to nobody else meanwhile.

A port that is free now may be taken before its service binds it: several clusters that start at once, as tests do,
would now and then pick the same. So a port is reserved by a lock on one byte of a file that all processes of a user
share; the kernel drops it when the process that picked the port ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import tempfile
from pathlib import Path
from typing import Final

from shared.errors import UnavailableError

_FIRST_PORT: Final = 10240
_FIRST_EPHEMERAL_PORT: Final = 32768
"""Linux's own default (net.ipv4.ip_local_port_range)."""
_ATTEMPTS: Final = 1000


class _Reservations:
    """Of this process. POSIX locks are lost when any descriptor of their file is closed: there is one, for ever."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._pid = 0
        self._ports: set[int] = set()

    def take(self, port: int) -> bool:
        """False when somebody has it, this process included. Raises UnavailableError."""
        if self._pid != os.getpid():  # locks do not go to a forked child
            self._descriptor, self._pid, self._ports = None, os.getpid(), set()
        if port in self._ports:
            return False
        if self._descriptor is None:
            self._descriptor = _open_reservations()
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
        except BlockingIOError:
            return False
        self._ports.add(port)
        return True


def _open_reservations() -> int:
    path = Path(tempfile.gettempdir()) / f"keylake-ports-{os.getuid()}"
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise UnavailableError(f"ports cannot be reserved in {path}: {error.strerror}") from None


_reservations = _Reservations()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free, and reserved for as long as this process lives.

    Below those that the kernel gives to outgoing connections: one of these could take it before it is used.
    Raises UnavailableError when there is none, or none can be reserved.
    """
    for _ in range(_ATTEMPTS):
        port = _FIRST_PORT + secrets.randbelow(_FIRST_EPHEMERAL_PORT - _FIRST_PORT)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if _reservations.take(port):
                return port
    raise UnavailableError("no free TCP port was found on 127.0.0.1")
