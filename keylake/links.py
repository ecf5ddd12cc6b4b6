"""Connections between the services of a local cluster that can be cut: partitions on demand.

    cluster = Cluster(links=True)
    await cluster.partition("pageserver", "keymanager")   # neither hears the other any more
    await cluster.heal()

A *link* is a TCP port (or a Unix socket) of our own that passes bytes on, unread, from one service to another. Each
service is given the addresses of its links in place of the real ones; it cannot tell the difference, and has no part in
it. TLS goes through end to end.

    SILENT    a cable pulled: connections stay open and nothing arrives. What was sent is held, and arrives late when
              the link is healed, as TCP would send it again. New connections are taken, and hear nothing
    REFUSED   a port closed: connections are reset, new ones refused

A compute's Unix socket is where it is, and several services come to it. It is taken over while it is in use
(`take_over`): it gets another name, which those who are connected do not notice, and a *door* of ours takes its place.
Behind the door each service has a link of its own; which one comes is told by its process (SO_PEERCRED, unix(7)).

The links run in a thread of their own: a test that blocks its event loop must not stop its cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, TypeVar

from shared.errors import InvalidInputError

T = TypeVar("T")
_CHUNK_SIZE_BYTES: Final = 64 * 1024
_SOCKET_NAME: Final = ".s.PGSQL.5432"
_TAKEN_OVER: Final = ".taken-over"
_DOOR: Final = ".door"
_CREDENTIALS: Final = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]


class _Listening(Protocol):
    def close(self) -> None: ...


class Cut(enum.StrEnum):
    """How a link is cut."""

    SILENT = "silent"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class LinkState:
    """All links between two services together."""

    between: tuple[str, str]
    """In the order of their names: a cut works in both directions."""
    cut: Cut | None


@dataclass(slots=True, eq=False)
class _Connection:
    peer_port: int | None
    """Of the service's end; None over a Unix socket."""
    flowing: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def is_of(self, pids: Collection[int] | None) -> bool:
        return pids is None or (self.peer_port is not None and any(_has_port(pid, self.peer_port) for pid in pids))


@dataclass(slots=True)
class _Link:
    """Lives in the thread's event loop."""

    between: frozenset[str]
    connect: Callable[[], Awaitable[Streams]]
    listen: Callable[[Accept], Awaitable[_Listening]]
    server: _Listening | None = None
    is_cut: bool = False
    cut_pids: Collection[int] | None = None
    """Whose connections are cut; None: everybody's."""
    connections: set[_Connection] = field(default_factory=set)

    async def open(self) -> None:
        self.is_cut = False
        if self.server is None:
            self.server = await self.listen(self._accept)
        for connection in self.connections:
            connection.flowing.set()

    def hold(self, pids: Collection[int] | None) -> None:
        """Nothing passes from now on."""
        if self.is_cut and pids is not None:
            pids = None if self.cut_pids is None else {*self.cut_pids, *pids}
        self.is_cut, self.cut_pids = True, pids
        for connection in self.connections:
            if connection.is_of(pids):
                connection.flowing.clear()

    async def close(self) -> None:
        if self.server is not None:
            self.server.close()
            self.server = None
            await asyncio.sleep(0)  # whoever is accepted already comes to `_accept` in this turn of the loop
        tasks = [connection.task for connection in self.connections if connection.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = writer.get_extra_info("peername")
        connection = _Connection(name[1] if isinstance(name, tuple) else None)
        if not (self.is_cut and connection.is_of(self.cut_pids)):
            connection.flowing.set()
        self.connections.add(connection)
        connection.task = asyncio.create_task(self._pass_on(connection.flowing, reader, writer))
        connection.task.add_done_callback(lambda _: self.connections.discard(connection))

    async def _pass_on(
        self, flowing: asyncio.Event, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        ends = [writer]
        try:
            await flowing.wait()
            try:
                other_reader, other = await self.connect()
            except OSError:
                _reset(writer)
                return
            ends.append(other)
            async with asyncio.TaskGroup() as both:
                both.create_task(_copy(flowing, reader, other))
                both.create_task(_copy(flowing, other_reader, writer))
        except asyncio.CancelledError:
            for end in ends:
                _reset(end)
            raise
        finally:
            await _close(ends)


class _Door:
    """A Unix socket at which several services come in. Behind it each of them has its own link."""

    def __init__(self, name_of: Callable[[int], str]) -> None:
        """`name_of`: the service that a process is; empty for any other, which comes in as nobody."""
        self._name_of = name_of
        self._accepts: dict[str, Accept] = {}
        self._server: asyncio.Server

    async def open(self, path: Path) -> None:
        """When everybody listens."""
        self._server = await asyncio.start_unix_server(self._take, path, limit=_CHUNK_SIZE_BYTES)

    def close(self) -> None:
        self._server.close()

    def listen_for(self, name: str) -> Callable[[Accept], Awaitable[_Listening]]:
        async def listen(accept: Accept) -> _Listening:
            self._accepts[name] = accept
            return _Entry(self._accepts, name)

        return listen

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        credentials = writer.get_extra_info("socket").getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
        )
        accept = self._accepts.get(self._name_of(_CREDENTIALS.unpack(credentials)[0]))
        if accept is None:
            _reset(writer)
        else:
            accept(reader, writer)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One service's way in."""

    accepts: dict[str, Accept]
    name: str

    def close(self) -> None:
        self.accepts.pop(self.name, None)


async def _close(ends: Sequence[asyncio.StreamWriter]) -> None:
    """Both are closed, also when the wait for it is cancelled."""
    for end in ends:
        end.close()
    try:
        for end in ends:
            with contextlib.suppress(OSError):
                await end.wait_closed()
    except asyncio.CancelledError:
        for end in ends:
            end.transport.abort()
        raise


def _reset(writer: asyncio.StreamWriter) -> None:
    """Not a polite end: the other side gets an error (RST over TCP), and what is in the buffers is lost."""
    connection = writer.get_extra_info("socket")
    if connection.family == socket.AF_INET and not writer.transport.is_closing():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _copy(flowing: asyncio.Event, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One direction, to its end. What was read when the link is cut waits here."""
    with contextlib.suppress(OSError):
        while True:
            chunk = await reader.read(_CHUNK_SIZE_BYTES)
            await flowing.wait()
            if not chunk:
                break
            writer.write(chunk)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
        return
    # Reset by either side: the other one must hear of it, too.
    await flowing.wait()
    _reset(writer)


def _has_port(pid: int, port: int) -> bool:
    """Has the process a TCP socket over IPv4 that is bound to this local port? (proc_pid_net(5))"""
    try:
        lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
        inodes = {fields[9] for line in lines if (fields := line.split())[1].endswith(f":{port:04X}")}
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            target = os.readlink(descriptor)
            if target.startswith("socket:[") and target[8:-1] in inodes:
                return True
    return False


class Links:
    """All links of a cluster. `start` before the first `add_…`, `stop` at the end."""

    def __init__(self) -> None:
        self._links: list[_Link] = []
        self._doors: list[_Door] = []
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        async def close_all() -> None:
            for door in self._doors:
                door.close()
            await asyncio.gather(*(link.close() for link in self._links))

        await self._run(close_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)
        self._loop.close()

    async def add_tcp(self, source: str, target: str, port: int) -> int:
        """The port of 127.0.0.1 at which `source` finds what `target` has at `port`."""

        async def connect() -> Streams:
            return await asyncio.open_connection("127.0.0.1", port, limit=_CHUNK_SIZE_BYTES)

        at = 0  # any, and then always the same one

        async def listen(accept: Accept) -> asyncio.Server:
            nonlocal at
            server = await asyncio.start_server(accept, "127.0.0.1", at, limit=_CHUNK_SIZE_BYTES)
            at = server.sockets[0].getsockname()[1]
            return server

        await self._add(_Link(frozenset({source, target}), connect, listen))
        return at

    async def add_postgres_socket(self, source: str, target: str, socket_dir: Path, link_dir: Path) -> None:
        """As `add_tcp`, from a Unix socket in `link_dir`, which is made here with mode 0700, to the one in
        `socket_dir`."""
        link_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = link_dir / _SOCKET_NAME

        async def connect() -> Streams:
            return await asyncio.open_unix_connection(socket_dir / _SOCKET_NAME, limit=_CHUNK_SIZE_BYTES)

        async def listen(accept: Accept) -> asyncio.Server:
            path.unlink(missing_ok=True)
            return await asyncio.start_unix_server(accept, path, limit=_CHUNK_SIZE_BYTES)

        await self._add(_Link(frozenset({source, target}), connect, listen))

    async def take_over(
        self, socket_dir: Path, target: str, sources: Collection[str], name_of: Callable[[int], str]
    ) -> None:
        """Who connects to this Postgres socket of `target` from now on comes over links: one for each of `sources`,
        and one that is never cut for whoever is none of them. `name_of`: which of them a process is, or empty."""
        path, taken_over, ours = (socket_dir / name for name in (_SOCKET_NAME, _TAKEN_OVER, _DOOR))

        async def connect() -> Streams:
            return await asyncio.open_unix_connection(taken_over, limit=_CHUNK_SIZE_BYTES)

        door = _Door(name_of)
        for name in sources:
            await self._add(_Link(frozenset({name, target}), connect, door.listen_for(name)))
        await self._add(_Link(frozenset(), connect, door.listen_for("")))
        taken_over.hardlink_to(path)
        await self._run(door.open(ours))
        self._doors.append(door)
        ours.rename(path)  # nobody finds it missing

    async def _add(self, link: _Link) -> None:
        await self._run(link.open())
        self._links.append(link)

    async def cut(self, one: str, other: str | None, how: Cut, pids: Collection[int] | None = None) -> None:
        """All links between two services; without `other`, all of one. `pids`: connections of these processes only,
        silently. Raises InvalidInputError when there are none."""
        found = [link for link in self._links if one in link.between and (other is None or other in link.between)]
        if not found:
            raise InvalidInputError(f"there is no link of {one}" + ("" if other is None else f" with {other}"))

        async def cut_all() -> None:
            for link in found:  # no await in here: no byte passes the last one when the first one is cut
                link.hold(pids)
            if how is Cut.REFUSED:
                await asyncio.gather(*(link.close() for link in found))

        await self._run(cut_all())

    async def state(self) -> list[LinkState]:
        """Of every two services that speak with each other."""

        async def look() -> dict[tuple[str, str], Cut | None]:
            found: dict[tuple[str, str], Cut | None] = {}
            for link in self._links:
                if not link.between:
                    continue
                one, other = sorted(link.between)
                is_cut = link.is_cut and link.cut_pids is None  # for everybody, that is
                how = None if not is_cut else Cut.SILENT if link.server is not None else Cut.REFUSED
                found[one, other] = how or found.get((one, other))
            return found

        found = await self._run(look())
        return [LinkState(between, found[between]) for between in sorted(found)]

    async def heal(self) -> None:
        """All of them."""

        async def open_all() -> None:
            await asyncio.gather(*(link.open() for link in self._links))

        await self._run(open_all())

    async def _run(self, work: Awaitable[T]) -> T:
        """In the links' thread."""

        async def awaited() -> T:
            return await work

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(awaited(), self._loop))
