"""What transports of an event loop cannot do with their sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket


def stop_sending(transport: asyncio.BaseTransport) -> None:
    """From the return of this on the kernel takes nothing more of this connection: what waits in the process, in
    buffers of the transport or of a TLS layer, never leaves. What the kernel has taken it still sends, and then FIN.

    `close` lets out what waits. `abort` drops it, but not at once: uvloop closes the socket a turn of the loop later,
    and sends on if it finds it writable before. Idempotent; the transport is still to be closed.
    """
    of_transport = transport.get_extra_info("socket")
    if of_transport is None or of_transport.fileno() < 0:
        return  # closed
    borrowed = socket.socket(of_transport.family, of_transport.type, of_transport.proto, fileno=of_transport.fileno())
    try:
        with contextlib.suppress(OSError):  # the peer was faster
            borrowed.shutdown(socket.SHUT_WR)
    finally:
        borrowed.detach()


def drop(transport: asyncio.WriteTransport) -> None:
    """End this connection: from the return of this on nothing leaves (`stop_sending`). Idempotent."""
    stop_sending(transport)
    transport.abort()
