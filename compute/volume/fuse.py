"""The lazy volume, as its agent sees it: a FUSE mount that a child process serves (`python -m compute.volume`).

The child is a descendant like Postgres. At the end it gives up its keys and pages, says so, and is killed then; if it
says nothing in time, it is killed all the same. Its end is the end of the mount.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from compute.volume import mount
from compute.volume.base import Source, VolumeKind
from compute.volume.key_channel import KeyGiver
from compute.volume.protocol import (
    MAX_LINE_SIZE_BYTES,
    Counts,
    Failed,
    LeaseUntil,
    Mounted,
    Open,
    ReadCounts,
    Token,
    pack_line,
    parse_from_server,
)
from compute.volume.tmpfs import TmpfsVolume
from shared.api.common import ApiModel
from shared.api.compute import StageTiming
from shared.crypto.secret import SecretKey
from shared.errors import ERRORS_BY_CODE, InvalidInputError, KeylakeError, UnavailableError
from shared.postgres import unprivileged
from shared.sandbox import DIE_WITH_PARENT, Sandbox
from shared.telemetry import get_logger

_log = get_logger(__name__)
_ANSWER_TIMEOUT_S: Final = 10.0
_MISSES: Final = 3
"""So many questions in a row must stay without an answer: one may, after the whole machine has slept."""


class FuseVolume:
    """Implements `Volume`, from inside of the sandbox. Its server is started ahead: importing takes longer than
    mounting."""

    def __init__(
        self,
        sandbox: Sandbox,
        blocks_dir: Path,
        limit_bytes: int,
        server: asyncio.subprocess.Process,
        key_channel: KeyGiver,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._sandbox = sandbox
        self._blocks_dir = blocks_dir
        self._limit_bytes = limit_bytes
        self._server = server
        self._key_channel = key_channel
        self._memory = TmpfsVolume(sandbox)  # what the mount point lies on
        self._mounted: asyncio.Future[Mounted] = loop.create_future()
        self._counts: asyncio.Future[Counts] | None = None
        self._opened = False
        self._lease_until_s = 0.0
        self.failed: asyncio.Future[KeylakeError] = loop.create_future()
        self._reader = asyncio.create_task(self._read(), name="volume pipe")

    @classmethod
    async def start(cls, sandbox: Sandbox, blocks_dir: Path, limit_bytes: int) -> Self:
        """With a server that knows nothing yet. Raises OSError."""
        key_channel, theirs = KeyGiver.pair()
        try:
            with theirs:
                # Without a pid namespace nobody else ends it when the agent is killed.
                server = await asyncio.create_subprocess_exec(
                    *DIE_WITH_PARENT,
                    *(sys.executable, "-P", "-m", "compute.volume", "--key-channel", str(theirs.fileno())),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    pass_fds=(theirs.fileno(),),
                    limit=MAX_LINE_SIZE_BYTES,
                )
        except BaseException:
            key_channel.close()
            raise
        return cls(sandbox, blocks_dir, limit_bytes, server, key_channel)

    @property
    def description(self) -> str:
        return (
            f"FUSE, pages on demand, up to {self._limit_bytes >> 20} MiB of sealed blocks on disk, "
            "private mount namespace"
        )

    @property
    def is_lazy(self) -> bool:
        return True

    @property
    def size_bytes(self) -> int:
        return self._limit_bytes

    @property
    def path(self) -> Path:
        return self._memory.path

    async def prepare(self) -> None:
        await self._memory.prepare()

    async def fill(self, source: Source, boot_key: SecretKey, lease_until_s: float) -> list[StageTiming]:
        self._lease_until_s = lease_until_s
        self._opened = True
        self._key_channel.give(boot_key)
        self._send(
            Open(
                instance_id=source.instance_id,
                project_id=source.project_id,
                timeline_id=source.timeline_id,
                start_lsn=source.start_lsn,
                start_as=source.start_as,
                pages=source.pages,
                ca_certificate=source.ca_certificate,
                token=source.token,
                lease_until_s=lease_until_s,
                mount_point=self.path,
                owner=unprivileged().owner,
                blocks_dir=self._blocks_dir,
                limit_bytes=self._limit_bytes,
            )
        )
        mounted = await self._mounted
        _log.info(
            "volume mounted", basebackup_size_bytes=mounted.basebackup_size_bytes, relation_forks=mounted.relation_forks
        )
        return mounted.stages

    def lease_until(self, at_s: float) -> None:
        if self._opened and at_s != self._lease_until_s:
            self._lease_until_s = at_s
            self._send(LeaseUntil(at_s=at_s))

    def token(self, token: str) -> None:
        if self._opened:
            self._send(Token(token=token))

    async def watch(self, timeout_s: float) -> None:
        """By asking for its counts: its event loop answers that, and the kernel."""
        misses = 0
        while not self.failed.done():
            await asyncio.sleep(timeout_s / _MISSES)
            try:
                await self._ask_counts(timeout_s / _MISSES)
            except TimeoutError:
                misses += 1
            except KeylakeError:
                return  # it is gone, and `failed` says why
            else:
                misses = 0
            if misses >= _MISSES and not self.failed.done():
                self.failed.set_result(UnavailableError(f"its server has not answered for {timeout_s:g} s"))

    @property
    def free_bytes(self) -> int | None:
        return None

    async def pages_fetched(self) -> int | None:
        """Raises UnavailableError."""
        try:
            return (await self._ask_counts(_ANSWER_TIMEOUT_S)).pages_fetched
        except TimeoutError:
            raise UnavailableError("the volume's server did not answer") from None

    async def _ask_counts(self, timeout_s: float) -> Counts:
        """Raises TimeoutError, and why the server is gone. One answer is one for all who ask at the time."""
        if self._counts is None or self._counts.done():
            self._counts = asyncio.get_running_loop().create_future()
            self._send(ReadCounts())
        async with asyncio.timeout(timeout_s):
            return await asyncio.shield(self._counts)

    @property
    def server_pid(self) -> int:
        return self._server.pid

    def wipe_server(self, timeout_s: float) -> bool:
        return self._key_channel.take_back(timeout_s)

    def wipe(self) -> None:
        self._key_channel.close()
        mount.unmount(self.path)
        self._memory.wipe()

    def _send(self, message: ApiModel) -> None:
        """Short lines. A server that is gone does not hear them; `failed` says so."""
        if self._server.stdin is not None and not self._server.stdin.is_closing():
            self._server.stdin.write(pack_line(message))

    async def _read(self) -> None:
        """Until the server is gone."""
        assert self._server.stdout is not None  # noqa: S101 - it is a pipe
        error: KeylakeError = UnavailableError("the process that serves the volume died")
        with suppress(ValueError, OSError):
            while line := await self._server.stdout.readline():
                try:
                    message = parse_from_server(line)
                except InvalidInputError:
                    break
                match message:
                    case Mounted():
                        if not self._mounted.done():
                            self._mounted.set_result(message)
                    case Counts():
                        if self._counts is not None and not self._counts.done():
                            self._counts.set_result(message)
                    case Failed():
                        error = ERRORS_BY_CODE.get(message.code, KeylakeError)(message.message)
        if not self.failed.done():
            self.failed.set_result(error)
        for waiting in (self._mounted, self._counts):
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)
                waiting.exception()  # retrieved: nobody may be waiting


class RefusedVolume(TmpfsVolume):
    """Only FUSE would do, and there is none: the start fails, and says why."""

    async def prepare(self) -> None:
        raise UnavailableError(self._why)


def why_no_fuse(sandbox: Sandbox) -> str:
    """Empty when a FUSE volume can be had here."""
    if not sandbox.isolation.private_mounts:
        return mount.NO_NAMESPACE
    return mount.why_not_available(sandbox.directory)


async def make_volume(
    kind: VolumeKind, sandbox: Sandbox, blocks_dir: Path, limit_bytes: int
) -> FuseVolume | TmpfsVolume:
    """The best of what was asked for."""
    if kind is VolumeKind.TMPFS:
        return TmpfsVolume(sandbox)
    why = why_no_fuse(sandbox)
    if not why:
        try:
            return await FuseVolume.start(sandbox, blocks_dir, limit_bytes)
        except OSError as error:
            why = f"no FUSE: its server cannot be started: {os.strerror(error.errno or 0)}"
    if kind is VolumeKind.FUSE:
        return RefusedVolume(sandbox, why)
    return TmpfsVolume(sandbox, why)
