"""From a name to a connection, by way of the name's addresses."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def through_addresses(host: str, port: int, connect: Callable[[str], Awaitable[T]]) -> T:
    """What `connect` makes of the first IP address of `host` that takes it. Raises OSError, and what `connect` raises.

    uvloop's `create_connection` looks a name up in a future of its own. When it is cancelled it forgets that one, and a
    look-up that fails later is logged as an exception that nobody retrieved: each time that a peer's name is gone.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
    for address in addresses[:-1]:
        try:
            return await connect(address)
        except TimeoutError:
            raise
        except OSError:
            continue
    return await connect(addresses[-1])
