"""How many clients of one address shake hands at the same time. A core.

All who shake hands share `max_handshakes` places, and whoever says nothing has one for `startup_timeout_s`. So one host
could take all of them; a bound for each address leaves some to the others. An IPv6 address stands for its /64, which is
what one host gets.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv6Address
from typing import Final

from compute.proxy.proxy_protocol import Peer
from shared.errors import OverloadedError

_HOST_BITS: Final = 64


class Crowd:
    def __init__(self, limit: int | None) -> None:
        """`limit`: of one address; None: none."""
        self._limit = limit
        self._present: collections.Counter[int] = collections.Counter()

    @contextmanager
    def place_for(self, peer: Peer | None) -> Iterator[None]:
        """For as long as `peer` shakes hands. Raises OverloadedError when its address has too many already."""
        if self._limit is None or peer is None:
            yield
            return
        host = _host(peer)
        if self._present[host] >= self._limit:
            raise OverloadedError("too many connections from this address that have not said yet whom they want")
        self._present[host] += 1
        try:
            yield
        finally:
            self._present[host] -= 1
            if not self._present[host]:
                del self._present[host]


def _host(peer: Peer) -> int:
    number = int(peer.address)
    # No IPv4 address is as large as the smallest IPv6 network in use.
    return number >> _HOST_BITS << _HOST_BITS if isinstance(peer.address, IPv6Address) else number
