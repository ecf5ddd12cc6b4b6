"""A client of the pageserver's page port: what a compute that reads pages over the network would say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import PurePosixPath

from compute.agent.basebackup import ArchiveReader
from keylake.cluster import Cluster, RunningProject
from shared.auth import Scope, Service, TokenIssuer
from shared.config import Address
from shared.errors import KeylakeError, UnavailableError
from shared.framed_tcp import FramedConnection, connect
from shared.keyspace import RelTag
from shared.tls import client_context
from shared.wire.frames import ERROR, ErrorFrame
from shared.wire.pagestream import (
    BASEBACKUP_BARE_READ_ONLY,
    GET_PAGE,
    MAX_FRAME_SIZE_BYTES,
    NO_SUCH_FORK,
    PAGE,
    REL_SIZE,
    SIZE,
    BasebackupRequest,
    BlockRequest,
    Open,
    parse_request_id,
    parse_size,
)

IN_FLIGHT = 64


class PageClient:
    """Requests side by side on one connection. Made by `page_client`."""

    def __init__(self, connection: FramedConnection) -> None:
        self._connection = connection
        self._waiting: dict[int, asyncio.Future[bytes | int]] = {}
        self._last_id = 0
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._ended: KeylakeError | None = None

    def ask(self, kind: int, rel: RelTag, block: int, lsn: int) -> asyncio.Future[bytes | int]:
        """Send one request and return at once. The answer is a page, a size, or the error that came instead."""
        if self._ended is not None:
            raise self._ended
        self._last_id += 1
        answer = asyncio.get_running_loop().create_future()
        self._waiting[self._last_id] = answer
        self._connection.write(BlockRequest(self._last_id, lsn, rel, block).pack(kind))
        return answer

    async def page(self, rel: RelTag, block: int, lsn: int) -> bytes:
        """Raises the pageserver's error."""
        async with self._slots:
            page = await self.ask(GET_PAGE, rel, block, lsn)
        assert isinstance(page, bytes)
        return page

    async def pages(self, rel: RelTag, blocks: Sequence[int], lsn: int) -> list[bytes]:
        return list(await asyncio.gather(*(self.page(rel, block, lsn) for block in blocks)))

    async def size(self, rel: RelTag, lsn: int) -> int | None:
        """In blocks; None when the fork does not exist."""
        async with self._slots:
            size = await self.ask(REL_SIZE, rel, 0, lsn)
        assert isinstance(size, int)
        return None if size == NO_SUCH_FORK else size

    async def run(self) -> None:
        """Hands out answers until the connection ends; then every question that is open fails."""
        error: KeylakeError = UnavailableError("the pageserver closed the connection")
        try:
            while frames := await self._connection.receive():
                for kind, payload in frames:
                    self._answer(kind, payload)
        except KeylakeError as ended:
            error = ended
        self._ended = error
        for waiting in self._waiting.values():
            waiting.set_exception(error)
            waiting.exception()  # retrieved: nobody may be waiting
        self._waiting.clear()

    def _answer(self, kind: int, payload: bytes) -> None:
        match kind:
            case _ if kind == PAGE:
                request_id, page = parse_request_id(payload)
                self._waiting.pop(request_id).set_result(bytes(page))
            case _ if kind == SIZE:
                request_id, size = parse_size(payload)
                self._waiting.pop(request_id).set_result(size)
            case _ if kind == ERROR:
                frame = ErrorFrame.parse(payload)
                if frame.request_id == 0:
                    raise frame.exception()  # of the connection: the end of it
                self._waiting.pop(frame.request_id).set_exception(frame.exception())
            case _:
                raise AssertionError(f"unexpected frame of type {kind:#x}")


@asynccontextmanager
async def page_client(cluster: Cluster, project: RunningProject, port: int = 0) -> AsyncIterator[PageClient]:
    async with page_connection(cluster, project, port) as connection:
        client = PageClient(connection)
        reading = asyncio.create_task(client.run())
        try:
            yield client
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


class _Files:
    """Of a basebackup, in memory."""

    def __init__(self) -> None:
        self.contents: dict[str, bytearray] = {}
        self._open = bytearray()

    def directory(self, path: PurePosixPath) -> None:
        pass

    def start(self, path: PurePosixPath) -> None:
        self._open = self.contents[str(path)] = bytearray()

    def data(self, data: memoryview) -> None:
        self._open += data

    def end(self) -> None:
        pass


async def bare_basebackup(cluster: Cluster, project: RunningProject, lsn: int) -> dict[str, bytes]:
    """Every file that a compute would get at `lsn`, but for relations."""
    files = _Files()
    async with page_connection(cluster, project) as connection:
        await connection.send(BasebackupRequest(1, lsn).pack(BASEBACKUP_BARE_READ_ONLY))
        await ArchiveReader(files).take_all(connection)
    return {name: bytes(content) for name, content in files.contents.items()}


@asynccontextmanager
async def page_connection(cluster: Cluster, project: RunningProject, port: int = 0) -> AsyncIterator[FramedConnection]:
    """One authenticated connection for one project's timeline; `port`: of another instance than the cluster's."""
    issuer = TokenIssuer.load(cluster.layout.keys / "compute.json")
    project_id = project.project.project_id
    token = issuer.issue(Service.PAGESERVER, [Scope.STORAGE_READ], project_id=project_id)
    context = client_context(cluster.layout.ca_certificate)
    address = Address(port=port or cluster.ports.pages)
    connection = await connect(Service.PAGESERVER, address, context, token, MAX_FRAME_SIZE_BYTES)
    try:
        await connection.send(Open(project_id, project.timeline.timeline_id).pack())
        yield connection
    finally:
        connection.abort()
        await connection.close()
