"""Who shakes hands at the same time, and who waits for it. No I/O.

Whoever says nothing has a place for `startup_timeout_s`. So one host could take all places, and new ones as these end;
it gets a few of them, and the rest of what comes from it waits, behind nobody else. A thousand clients of one host are
all served, some at a time: a handshake takes milliseconds. An IPv6 address stands for its /64, which is what one host
gets.

Free places go round the addresses that wait. When too many wait, one is refused of the address that has most of them:
whoever has none waiting is not kept out by who has a thousand.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv6Address
from typing import Final

from compute.proxy.proxy_protocol import Peer
from shared.errors import OverloadedError

_HOST_BITS: Final = 64

_Host = int | None
_Turn = asyncio.Future[None]


class Crowd:
    def __init__(self, places: int, places_of_one: int, waiting: int) -> None:
        """`places_of_one`: of one address. `waiting`: so many in all may wait for a place."""
        self._free = places
        self._places_of_one = places_of_one
        self._room = waiting
        self._present: collections.Counter[_Host] = collections.Counter()
        self._waiting: dict[_Host, collections.deque[_Turn]] = {}
        """The one whose turn is next comes first; none is empty."""

    @property
    def present(self) -> int:
        return self._present.total()

    @asynccontextmanager
    async def place_for(self, peer: Peer | None) -> AsyncIterator[None]:
        """When there is one, and for as long as `peer` shakes hands. Raises OverloadedError when too many wait."""
        host = _host(peer)
        if self._may_enter(host):
            self._enter(host)
        else:
            await self._wait(host)
        try:
            yield
        finally:
            self._leave(host)

    def _may_enter(self, host: _Host) -> bool:
        return self._free > 0 and self._present[host] < self._places_of_one

    def _enter(self, host: _Host) -> None:
        self._free -= 1
        self._present[host] += 1

    def _leave(self, host: _Host) -> None:
        self._free += 1
        self._present[host] -= 1
        if not self._present[host]:
            del self._present[host]
        for following in self._waiting:
            if self._may_enter(following):
                self._admit(following)
                break

    def _admit(self, host: _Host) -> None:
        """Who has waited longest of it. Another address is the next one's."""
        turn = self._waiting[host][0]
        self._take_out(host, turn)
        if host in self._waiting:
            self._waiting[host] = self._waiting.pop(host)
        self._enter(host)
        turn.set_result(None)

    async def _wait(self, host: _Host) -> None:
        """Until it has a place."""
        if not self._room:
            self._make_room(host)
        turn: _Turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(host, collections.deque()).append(turn)
        self._room -= 1
        try:
            await asyncio.shield(turn)
        except asyncio.CancelledError:
            if not turn.done():
                self._take_out(host, turn)
            elif turn.exception() is None:
                self._leave(host)  # it was given one in this very moment
            raise

    def _make_room(self, host: _Host) -> None:
        """Raises OverloadedError when `host` is the one that has to go."""
        most = max(self._waiting, key=lambda each: len(self._waiting[each]), default=host)
        if len(self._waiting.get(most, ())) <= len(self._waiting.get(host, ())) + 1:
            raise _refusal()
        last = self._waiting[most][-1]
        self._take_out(most, last)
        last.set_exception(_refusal())

    def _take_out(self, host: _Host, turn: _Turn) -> None:
        self._waiting[host].remove(turn)
        self._room += 1
        if not self._waiting[host]:
            del self._waiting[host]


def _refusal() -> OverloadedError:
    return OverloadedError("too many connections wait to be served, most of them from this address: try again")


def _host(peer: Peer | None) -> _Host:
    if peer is None:
        return None
    number = int(peer.address)
    # No IPv4 address is as large as the smallest IPv6 network in use.
    return number >> _HOST_BITS << _HOST_BITS if isinstance(peer.address, IPv6Address) else number
