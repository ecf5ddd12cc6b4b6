"""A client of a safekeeper's WAL port: what a pageserver would say."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from keylake.cluster import Cluster, RunningProject
from shared.auth import Scope, Service, TokenIssuer
from shared.config import Address
from shared.errors import UnavailableError
from shared.framed_tcp import FramedConnection, connect
from shared.tls import client_context
from shared.wire.frames import ERROR, ErrorFrame
from shared.wire.walstream import MAX_FRAME_SIZE_BYTES, WAL, Subscribe, SubscribeFlags, parse_wal


class WalReader:
    """One connection, for one timeline. Made by `wal_reader`. `ask` once, then `read`."""

    def __init__(self, connection: FramedConnection, project: RunningProject) -> None:
        self._connection = connection
        self._project = project
        self._next_lsn = 0
        self._here: deque[tuple[int, bytes]] = deque()

    async def ask(self, lsn: int) -> None:
        """For all of the log from `lsn` on, and what follows. Does not wait for an answer."""
        self._next_lsn = lsn
        project = self._project
        request = Subscribe(project.project.project_id, project.timeline.timeline_id, lsn, 0, SubscribeFlags.NONE)
        await self._connection.send(request.pack())

    async def read(self) -> tuple[int, bytes]:
        """The next bytes, and their LSN. Raises the safekeeper's error; UnavailableError when it says none."""
        while not self._here:
            frames = await self._connection.receive()
            if not frames:
                raise UnavailableError("the safekeeper closed the connection")
            for kind, payload in frames:
                if kind == WAL:
                    start, data = parse_wal(payload)
                    assert start == self._next_lsn
                    assert data
                    self._next_lsn += len(data)
                    self._here.append((start, bytes(data)))
                if kind == ERROR:
                    raise ErrorFrame.parse(payload).exception()
        return self._here.popleft()


@asynccontextmanager
async def wal_reader(cluster: Cluster, project: RunningProject, port: int) -> AsyncIterator[WalReader]:
    """Connected to the safekeeper at this port. Raises UnavailableError."""
    issuer = TokenIssuer.load(cluster.layout.keys / "pageserver.json")
    token = issuer.issue(Service.SAFEKEEPER, [Scope.WAL_READ], project_id=project.project.project_id)
    context = client_context(cluster.layout.ca_certificate)
    connection = await connect(Service.SAFEKEEPER, Address(port=port), context, token, MAX_FRAME_SIZE_BYTES)
    try:
        yield WalReader(connection, project)
    finally:
        connection.abort()
        await connection.close()


async def first_wal(cluster: Cluster, project: RunningProject, port: int, lsn: int) -> bytes:
    """The first bytes of the timeline's log from `lsn` on that the safekeeper at this port sends. Raises its error."""
    async with wal_reader(cluster, project, port) as reader:
        await reader.ask(lsn)
        _, data = await reader.read()
    return data
