"""The loop between the kernel and a `FileSystem`: requests off /dev/fuse, answers onto it."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from typing import Final

from compute.volume import fuse_wire as wire
from compute.volume.file_system import Answer, FileSystem, FileSystemError
from shared.errors import CorruptedError, KeylakeError, UnavailableError
from shared.telemetry import get_logger

_log = get_logger(__name__)
_REQUESTS_PER_TURN: Final = 64
"""Then everybody else on the event loop has a turn: the connection to the pageserver, the lease."""


class FuseLoop:
    """`start` it once `descriptor` is mounted; `ended` says when the file system is gone."""

    def __init__(self, descriptor: int, files: FileSystem, broken: Callable[[KeylakeError], None]) -> None:
        self._descriptor = descriptor
        self._files = files
        self._broken = broken
        self._buffer = bytearray(wire.REQUEST_BUFFER_SIZE_BYTES)
        self._view = memoryview(self._buffer)
        self._tasks: set[asyncio.Task[None]] = set()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.requests = 0

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._descriptor, self._take)

    def stop(self) -> None:
        """The mount is dead afterwards: whoever uses it gets an error. Idempotent."""
        if not self.ended.done():
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self.ended.set_result(None)

    async def wipe(self) -> None:
        """`stop`, and nobody works on a request any more; what requests brought is overwritten."""
        self.stop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._buffer[:] = bytes(len(self._buffer))

    def _take(self) -> None:
        for _ in range(_REQUESTS_PER_TURN):
            if self.ended.done():
                return
            try:
                size = os.readv(self._descriptor, [self._buffer])
            except OSError as error:
                match error.errno:
                    case errno.EAGAIN:
                        return
                    case errno.EINTR | errno.ENOENT:  # ENOENT: interrupted before we had it
                        continue
                    case errno.ENODEV:  # unmounted
                        self.stop()
                        return
                    case _:
                        self._broken(UnavailableError(f"/dev/fuse cannot be read: {error.strerror}"))
                        return
            self.requests += 1
            self._handle(self._view[:size])

    def _handle(self, data: memoryview) -> None:
        try:
            request = wire.parse_request(data)
        except CorruptedError as error:
            self._broken(error)
            return
        try:
            answer = self._files.answer(request)
        except Exception as error:
            self._failed(request.unique, error)
            return
        if answer is None or isinstance(answer, (bytes, list)):
            self._answer(request.unique, answer)
        else:
            # Only the number: `request.body` is overwritten by the next request.
            task = asyncio.ensure_future(self._later(request.unique, answer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _later(self, unique: int, awaited: Awaitable[Answer]) -> None:
        try:
            answer = await awaited
        except Exception as error:
            self._failed(unique, error)
        else:
            self._answer(unique, answer)

    def _failed(self, unique: int, error: Exception) -> None:
        """Whoever waits gets an answer, whatever happened. What was not foreseen may be a write that was lost."""
        if isinstance(error, FileSystemError):
            self._write(wire.pack_error(unique, error.number))
            return
        _log.error("a request of the volume failed", exc_info=error)
        self._write(wire.pack_error(unique, errno.EIO))
        self._broken(
            error if isinstance(error, KeylakeError) else UnavailableError(f"unexpected {type(error).__name__}")
        )

    def _answer(self, unique: int, answer: Answer) -> None:
        match answer:
            case None:
                return
            case bytes():
                self._write(wire.pack_answer_header(unique, len(answer)), answer)
            case _:
                self._write(wire.pack_answer_header(unique, sum(map(len, answer))), *answer)

    def _write(self, *parts: bytes) -> None:
        if self.ended.done():
            return
        try:
            os.writev(self._descriptor, parts if len(parts) < 1000 else [b"".join(parts)])
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # who asked is gone; unmounted
                self._broken(UnavailableError(f"/dev/fuse cannot be written: {error.strerror}"))
