"""Named places where a test may kill the process: before and after each step that persists or sends.

    KEYLAKE_UNSAFE_FAILPOINTS=control-renamed:3 python -m safekeeper …      SIGKILL the third time it gets there
    KEYLAKE_UNSAFE_FAILPOINTS= python -m safekeeper …                       none yet: POST /v1/failpoints arms them

Without the variable `failpoint` is a call that does nothing, and there is no such route (shared/service.py). With it,
empty or not, a service that listens to more than its own machine refuses to start (`refuse_failpoints`).
"""

from __future__ import annotations

import ipaddress
import os
import signal
from collections.abc import Mapping
from typing import Final

from shared.errors import InvalidInputError

VARIABLE: Final = "KEYLAKE_UNSAFE_FAILPOINTS"


class Failpoints:
    """Armed ones, and how often each is still let through."""

    def __init__(self, order: str) -> None:
        """`order`: name:count, separated by commas. Raises InvalidInputError."""
        self._left: dict[str, int] = {}
        for part in filter(None, order.split(",")):
            name, separator, count = part.partition(":")
            if not name or not (separator and count.isdecimal() and int(count) >= 1):
                raise InvalidInputError(f"{VARIABLE}: expected name:count, as in control-renamed:1")
            self._left[name] = int(count)

    def __bool__(self) -> bool:
        return bool(self._left)

    def due(self, name: str) -> bool:
        """Count one arrival at `name`; true when this is the one to die at."""
        left = self._left.get(name)
        if left is None:
            return False
        self._left[name] = left - 1
        return left == 1


_failpoints: Failpoints | None = None
"""None: this is no process of a test, and none can be armed."""


def arm(environment: Mapping[str, str]) -> None:
    """Once per process, at its start. Raises InvalidInputError for an order that cannot be read."""
    global _failpoints
    order = environment.get(VARIABLE)
    _failpoints = None if order is None else Failpoints(order)


def may_arm() -> bool:
    """Was the process started with the variable?"""
    return _failpoints is not None


def arm_instead(order: str) -> None:
    """Of what is armed now. Raises InvalidInputError for an order that cannot be read, or when nothing may be armed."""
    global _failpoints
    if not may_arm():
        raise InvalidInputError(f"{VARIABLE} is not set")
    _failpoints = Failpoints(order)


def refuse_failpoints(listen_host: str) -> None:
    """Raises InvalidInputError when failpoints are, or can be, armed in a service that others can reach."""
    if _failpoints is not None and not _is_loopback(listen_host):
        raise InvalidInputError(f"{VARIABLE} is for tests: this service listens on {listen_host}")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def failpoint(name: str) -> None:
    """Die here, at once, if a test said so."""
    if _failpoints is not None and _failpoints.due(name):
        os.kill(os.getpid(), signal.SIGKILL)
