"""Until when a compute may let rows out: a file beside its Unix socket, from its agent to a proxy on its machine.

An agent kills its Postgres when its lease is over. But what was stopped (SIGSTOP, a paused sandbox) goes on in any
order, Postgres first perhaps, and its rows would be on their way before the agent has seen a clock. So the agent writes
down, with each renewal, when its lease ends, and behind that the proxy passes nothing on. Both go by one clock, which
runs while they stand still. Where a compute is reached over TCP its agent passes the rows on, and looks itself
(agent/tunnel.py).

The file is not for those who want to lie: whoever may write in the socket's directory is this compute, and the proxy
has a lease of its own on the project.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from shared.api.safekeeper import ComputeAddress
from shared.clock import Clock

_NAME: Final = "lease"
_NEVER: Final = float("-inf")
_MAX_SIZE_BYTES: Final = 64


class LeaseFile:
    """The agent's side."""

    def __init__(self, socket_dir: Path) -> None:
        self._path = socket_dir / _NAME
        self._next = socket_dir / f"{_NAME}.next"
        self._until_s = _NEVER

    def write(self, until_s: float) -> None:
        """`until_s`: on the system's clock. Raises OSError."""
        if until_s == self._until_s:
            return
        self._next.write_text(repr(until_s))
        self._next.replace(self._path)  # whoever reads has the old time or the new one
        self._until_s = until_s

    def remove(self) -> None:
        """The lease is over. Whoever comes too late for that is told by the time in it."""
        with suppress(OSError):
            self._path.unlink()


class ComputeLease:
    """The proxy's side, looked at per chunk of rows: the file is read when the time that was read last is over."""

    __slots__ = ("_clock", "_path", "_until_s")

    def __init__(self, compute: ComputeAddress, clock: Clock) -> None:
        over_tcp = compute.certificate_pem is not None
        self._path = f"{compute.host}/{_NAME}"
        self._until_s = float("inf") if over_tcp else _NEVER
        self._clock = clock

    @property
    def live(self) -> bool:
        if self._clock.monotonic_s() < self._until_s:
            return True
        self._until_s = _read(self._path)
        return self._clock.monotonic_s() < self._until_s


def _read(path: str) -> float:
    """In the past when there is none. Whatever lies there, it neither waits nor follows a link."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return float(os.read(descriptor, _MAX_SIZE_BYTES))
        finally:
            os.close(descriptor)
    except (OSError, ValueError):
        return _NEVER
