"""`python -m compute.volume`: serves one compute's volume. Started by an agent only; see protocol.py.

A process of its own, because Postgres stands still while it waits for a page, and the agent has leases to renew; and
because the agent itself uses the files: who serves them must never wait for them.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
from pathlib import Path
from typing import Any

from compute.volume import mount
from compute.volume.file_system import FileSystem
from compute.volume.files import Tree
from compute.volume.fill import fill
from compute.volume.key_channel import KeyTaker
from compute.volume.page_client import PageClient
from compute.volume.protocol import (
    MAX_LINE_SIZE_BYTES,
    Counts,
    Failed,
    LeaseUntil,
    Mounted,
    Open,
    ReadCounts,
    Token,
    ToServer,
    pack_line,
    parse_to_server,
)
from compute.volume.sealed_blocks import BLOCK_SIZE_BYTES, SealedBlocks, make_block_file
from compute.volume.serve import FuseLoop
from shared.api.common import ApiModel
from shared.api.compute import StageTiming
from shared.auth import Service
from shared.clock import SystemClock
from shared.crypto.secret import SecretKey
from shared.entry import run
from shared.errors import InvalidInputError, KeylakeError, LeaseExpiredError, UnavailableError
from shared.framed_tcp import FramedConnection, connect
from shared.hardening import harden_process
from shared.telemetry import configure_logging, get_logger
from shared.tls import client_context
from shared.wire import pagestream

_log = get_logger(__name__)


class VolumeServer:
    """From `Open` to the end of the mount. `wipe` it in any case."""

    def __init__(self, opened: Open, key: SecretKey) -> None:
        """`key`: the volume's; ours from now on."""
        self._opened = opened
        self._key = key
        self._token = opened.token
        self._lease_until_s = opened.lease_until_s
        self._clock = SystemClock()
        self._tls = client_context(opened.ca_certificate)
        self._pages = PageClient(self._connect, opened.start_lsn, opened.page_timeout_s)
        self._blocks: SealedBlocks | None = None
        self._loop: FuseLoop | None = None
        self.broken: asyncio.Future[KeylakeError] = asyncio.get_running_loop().create_future()
        """Why it must not be used any more."""

    async def _connect(self) -> FramedConnection:
        opened = self._opened
        connection = await connect(
            Service.PAGESERVER, opened.pages, self._tls, self._token, pagestream.MAX_FRAME_SIZE_BYTES
        )
        await connection.send(pagestream.Open(opened.project_id, opened.timeline_id).pack())
        return connection

    def _check_lease(self) -> None:
        if self._clock.monotonic_s() >= self._lease_until_s:
            raise LeaseExpiredError("there is no live lease on the project's keys")

    def _break(self, error: KeylakeError) -> None:
        """Everybody who uses the volume gets an error from now on."""
        if not self.broken.done():
            _log.error("the volume must not be used any more", code=error.code, reason=str(error))
            self.broken.set_result(error)
        if self._loop is not None:
            self._loop.stop()

    async def mount(self) -> Mounted:
        """Raises KeylakeError."""
        opened = self._opened
        stages: list[StageTiming] = []
        began = self._clock.monotonic_s()

        def lap(stage: str) -> None:
            nonlocal began
            now = self._clock.monotonic_s()
            stages.append(StageTiming(stage=stage, seconds=round(now - began, 6)))
            began = now

        try:
            descriptor = make_block_file(opened.blocks_dir)
        except OSError as error:
            raise UnavailableError(f"the volume's file cannot be made: {error.strerror}") from None
        context = f"{opened.project_id} {opened.timeline_id} {opened.instance_id}".encode()
        self._blocks = SealedBlocks(descriptor, self._key, context, opened.limit_bytes // BLOCK_SIZE_BYTES)
        uid, gid = opened.owner or (os.geteuid(), os.getegid())
        tree = Tree(uid, gid, 0)
        files = FileSystem(tree, self._blocks, self._pages, self._check_lease, self._break)
        connection = await self._connect()
        try:
            size, forks = await fill(files, connection, opened.start_lsn, opened.start_as)
        finally:
            await connection.close()
        lap("basebackup")
        self._loop = FuseLoop(mount.mount(opened.mount_point), files, self._break)
        self._loop.start()
        lap("mount")
        return Mounted(basebackup_size_bytes=size, relation_forks=forks, stages=stages)

    def take(self, message: ToServer) -> ApiModel | None:
        """Returns the answer, if there is one."""
        match message:
            case LeaseUntil():
                self._lease_until_s = message.at_s
            case Token():
                self._token = message.token
            case ReadCounts():
                used = 0 if self._blocks is None else self._blocks.used_blocks
                return Counts(pages_fetched=self._pages.pages_fetched, blocks_written=used)
            case Open():
                raise InvalidInputError("the volume is open already")
        return None

    async def unmounted(self) -> None:
        assert self._loop is not None  # noqa: S101 - mounted first
        await asyncio.shield(self._loop.ended)

    async def wipe(self) -> None:
        """The mount is dead, and no key, no cipher and no page is left in this process when it returns. Nothing else of
        this server may run any more."""
        if self._loop is not None:
            await self._loop.wipe()
        if self._blocks is not None:
            self._blocks.close()
        self._key.wipe()
        await self._pages.close()
        gc.collect()  # what tasks and connections held in cycles; what is freed is overwritten (shared/hardening.py)


class _Pipe:
    """The server's end: stdin and stdout."""

    def __init__(self) -> None:
        self._reader = asyncio.StreamReader(limit=MAX_LINE_SIZE_BYTES)

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(self._reader), sys.stdin)

    async def receive(self) -> ToServer | None:
        """None at end of file, and for anything that is not a message."""
        try:
            return parse_to_server(await self._reader.readuntil(b"\n"))
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, InvalidInputError, OSError):
            return None

    @staticmethod
    def send(message: ApiModel) -> None:
        """Short lines, seldom: a pipe that takes no more has nobody who reads it."""
        os.write(sys.stdout.fileno(), pack_line(message))


async def main(key_channel: KeyTaker) -> None:
    harden_process()
    pipe = _Pipe()
    await pipe.open()
    opened = await pipe.receive()
    if not isinstance(opened, Open):
        return
    try:
        server = VolumeServer(opened, key_channel.take())
    except UnavailableError as error:
        pipe.send(Failed(code=error.code, message=str(error)))
        return
    given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    key_channel.on_give_up(lambda: given_up.set_result(None))
    try:
        await _serve_until(given_up, pipe, server)
    finally:
        await server.wipe()
    key_channel.confirm()
    if given_up.done():
        key_channel.wait_closed()


async def _serve_until(given_up: asyncio.Future[None], pipe: _Pipe, server: VolumeServer) -> None:
    """Or until the server ends by itself, or its agent does."""
    tasks = [asyncio.create_task(_listen(pipe, server)), asyncio.create_task(_serve(pipe, server))]
    ends: set[asyncio.Future[Any]] = {*tasks, server.broken, given_up}
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if server.broken.done():
            pipe.send(Failed(code=server.broken.result().code, message=str(server.broken.result())))
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _serve(pipe: _Pipe, server: VolumeServer) -> None:
    """Until it is unmounted, or cannot be mounted."""
    try:
        pipe.send(await server.mount())
        await server.unmounted()
    except KeylakeError as error:
        pipe.send(Failed(code=error.code, message=str(error)))


async def _listen(pipe: _Pipe, server: VolumeServer) -> None:
    while (message := await pipe.receive()) is not None:
        answer = server.take(message)
        if answer is not None:
            pipe.send(answer)


if __name__ == "__main__":
    configure_logging("compute-volume", Path("/proc/self").resolve().name, "info")
    parser = argparse.ArgumentParser(prog="python -m compute.volume", description=__doc__)
    parser.add_argument("--key-channel", type=int, required=True, help="descriptor of a socket that the key comes over")
    descriptor = parser.parse_args().key_channel
    run(lambda: main(KeyTaker(descriptor)))
