"""How the key of a volume gets from the agent that made it to the process that serves the volume, and back out of it.

A socket pair of their own, which the server inherits: so the key is in no argument, environment, file, JSON parser or
buffer of an event loop. Only the number of the descriptor stands in the server's arguments.

    agent                             server
      │ ── 32 bytes: the key ─────────►  │  before `Open` (protocol.py)
      │ ── 1 byte, or end of file ────►  │  give it up: wipes all keys and pages
      │ ◄─────────────────── 1 byte ───  │  they are gone
      │ ── end of file, or SIGKILL ───►  │  ends

The agent blocks while it waits for that byte: nothing else may happen in between, and it has a time limit.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Self

from shared.crypto.derive import derive_key
from shared.crypto.secret import KEY_SIZE_BYTES, SecretKey
from shared.errors import UnavailableError

KEY_LABEL: Final = b"keylake/v1/compute-volume"
"""A volume's key is that of its compute's boot key."""
_GIVE_UP: Final = b"\x01"
_GONE: Final = b"\x02"


class KeyGiver:
    """The agent's end."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._given = False

    @classmethod
    def pair(cls) -> tuple[Self, socket.socket]:
        """And the server's end, for it to inherit. Raises OSError."""
        ours, theirs = socket.socketpair()
        return cls(ours), theirs

    def give(self, boot_key: SecretKey) -> None:
        """The key that `boot_key` yields. Once. Raises UnavailableError, KeyWipedError."""
        key = derive_key(boot_key, KEY_LABEL)
        self._given = True
        try:
            self._socket.sendall(key.reveal())
        except OSError as error:
            raise UnavailableError(f"the volume's server takes no key: {error.strerror}") from None
        finally:
            key.wipe()

    def take_back(self, timeout_s: float) -> bool:
        """Has the server said that nothing is left of the key, and of what it opened? Waits for that, blocking. True as
        well when it never got one."""
        with suppress(OSError):
            if self._given:
                self._socket.settimeout(timeout_s)
                with suppress(BrokenPipeError):  # it has ended by itself, and said so before perhaps
                    self._socket.sendall(_GIVE_UP)
                self._given = self._socket.recv(1) != _GONE
        return not self._given

    def close(self) -> None:
        self._socket.close()


class KeyTaker:
    """The server's end."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor` is ours from now on. Raises OSError when it is no socket."""
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)

    def take(self) -> SecretKey:
        """The key, which is there already. Raises UnavailableError when it is not."""
        key = bytearray(KEY_SIZE_BYTES)
        size = 0
        with suppress(OSError):
            size = self._socket.recv_into(key, KEY_SIZE_BYTES, socket.MSG_DONTWAIT)
        if size != KEY_SIZE_BYTES:
            raise UnavailableError("the volume's key did not come")
        return SecretKey(key)

    def on_give_up(self, callback: Callable[[], None]) -> None:
        """To be called once `take` was, in the running event loop: `callback` when the key is to be given up."""
        loop = asyncio.get_running_loop()

        def heard() -> None:
            loop.remove_reader(self._socket)
            callback()

        loop.add_reader(self._socket, heard)

    def confirm(self) -> None:
        """Everything is gone."""
        with suppress(OSError):
            self._socket.sendall(_GONE)

    def wait_closed(self) -> None:
        """Returns when the agent has closed its end, or is gone. Blocks: there is nothing else to do any more."""
        self._socket.setblocking(True)  # libuv makes what it watches non-blocking, behind Python's back
        with suppress(OSError):
            while self._socket.recv(1):
                pass
