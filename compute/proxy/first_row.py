"""What a client waits for once its compute is up: the log-in, and the first question that gets a row. A core.

The last stages of a start are seen only from where the clients are. One session is enough to time them: the first that
gets a row. A question that gets none (SET, BEGIN) does not count; the clock starts anew with the next one. How long a
client thinks in between does not count either.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

_HEADER: Final = struct.Struct(">BI")
_ROW: Final = ord("D")


def has_row(messages: bytes) -> bool:
    """Does a DataRow begin in here? `messages` begins with a message, and may end in the middle of one."""
    position, last = 0, len(messages) - _HEADER.size
    while position <= last:
        kind, length = _HEADER.unpack_from(messages, position)
        if kind == _ROW:
            return True
        if length < 4:
            return False  # not the protocol; BackendStream says so
        position += 1 + length
    return False


class FirstRow:
    """Of one session."""

    def __init__(self, now_s: Callable[[], float], seen: Callable[[float, float], None]) -> None:
        """The compute is up. `seen` is called once at most: seconds from now to the log-in, and from the question to
        its row."""
        self._now_s = now_s
        self._seen = seen
        self._began_s = now_s()
        self._login_s: float | None = None
        self._asked_s: float | None = None

    def logged_in(self) -> None:
        if self._login_s is None:
            self._login_s = self._now_s() - self._began_s

    def asked(self) -> None:
        """The client said something."""
        if self._login_s is not None and self._asked_s is None:
            self._asked_s = self._now_s()

    def answered(self, messages: bytes, *, ready: bool) -> bool:
        """As for `has_row`. `ready`: they end with a ReadyForQuery. True: that was the row, and it is over."""
        if self._login_s is None or self._asked_s is None:
            return False
        if has_row(messages):
            self._seen(self._login_s, self._now_s() - self._asked_s)
            return True
        if ready:
            self._asked_s = None
        return False
