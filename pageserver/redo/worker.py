"""One redo worker: a stock Postgres process, alone in a sandbox, that rebuilds pages for one project.

The process runs walredo.c inside single-user Postgres, in namespaces of its own, without a network, on a private
tmpfs of which it uses a few KiB (no page ever reaches a file, tmpfs or not). Requests go down one pipe and replies
come up another, in the same order; many requests may be under way.

    apply, mask, ping                      typed errors:
      a bad request                          InvalidInputError, the worker goes on
      a record that does not fit the page    CorruptedError or IntegrityError, the worker goes on unless it PANICs
      the worker is gone, or got killed      UnavailableError for all requests that were under way

A crashed worker does not say which request did it: as requests are served in order, it is the oldest one under
way, most likely. Starting another worker is the owner's decision. `kill` is for revoked leases: it returns at
once, nothing is answered any more, and the kernel frees all memory of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from collections import deque
from collections.abc import Sequence
from typing import Final

from pageserver.redo import protocol
from pageserver.redo.build import RedoBinaries
from pageserver.redo.protocol import Greeting, Rel, Reply, ReplyParser, Status
from shared.errors import KeylakeError, UnavailableError
from shared.postgres import postgres_command, postgres_environment, unprivileged
from shared.sandbox import Isolation, Sandbox, detect_isolation
from shared.wal.page import format_lsn

_TMPFS_SIZE_BYTES: Final = 4 * 1024 * 1024
_PIPE_SIZE_BYTES: Final = 1024 * 1024  # the most that an unprivileged process may ask for by default
_READ_SIZE_BYTES: Final = 256 * 1024
_UNSENT_LIMIT_BYTES: Final = 2 * protocol.MAX_REQUEST_BYTES

# As little of everything as Postgres accepts; walredo.c counts on shared_buffers. mmap, because the other kinds of
# dynamic shared memory leave something behind outside of the data directory when the process is killed.
_SETTINGS: Final = {
    "shared_buffers": "128",
    "wal_buffers": "4",
    "max_connections": "1",
    "max_worker_processes": "0",
    "max_wal_senders": "0",
    "max_prepared_transactions": "0",
    "max_locks_per_transaction": "10",
    "max_pred_locks_per_transaction": "10",
    "autovacuum_max_workers": "1",
    "huge_pages": "off",
    "dynamic_shared_memory_type": "mmap",
    "full_page_writes": "off",
    "wal_log_hints": "off",
}

_COPY_AND_RUN: Final = 'cp -R "$1/." "$2/" && shift && cd / && shift && exec "$@"'


class RedoWorker:
    """Made by `start`. Not thread-safe: it belongs to the event loop it was started on."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        sandbox: Sandbox,
        request_fd: int,
        reply_fd: int,
        *,
        max_outstanding: int,
        stall_timeout_s: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._process = process
        self._sandbox = sandbox
        self._request_fd = request_fd
        self._reply_fd = reply_fd
        self._stall_timeout_s = stall_timeout_s
        self._slots = asyncio.Semaphore(max_outstanding)
        self._parser = ReplyParser()
        self._pending: deque[asyncio.Future[Reply]] = deque()
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._may_send = asyncio.Event()
        self._may_send.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_progress_s = 0.0
        self._watchdog: asyncio.TimerHandle | None = None
        self._error: KeylakeError | None = None
        self._closing = False
        self._end_of_replies = asyncio.Event()
        self.greeting: Greeting | None = None
        self._loop.add_reader(reply_fd, self._on_readable)
        self._reaper = self._loop.create_task(self._reap(), name="redo worker reaper")

    @classmethod
    async def start(
        cls,
        binaries: RedoBinaries,
        *,
        max_outstanding: int = 128,
        stall_timeout_s: float = 60.0,
        start_timeout_s: float = 30.0,
        isolation: Isolation | None = None,
    ) -> RedoWorker:
        """Returns when the worker answers (tens of milliseconds).

        `max_outstanding` requests may be under way, further ones wait. A worker that answers nothing for
        `stall_timeout_s` while it has requests is killed. Raises UnavailableError (with its stderr as a note).
        """
        if isolation is None:
            isolation = await asyncio.to_thread(detect_isolation)
        owner = (await asyncio.to_thread(unprivileged, binaries.installation)).owner
        sandbox = Sandbox.create(
            size_bytes=_TMPFS_SIZE_BYTES, owner=owner, parent_dir=binaries.sandboxes, isolation=isolation
        )
        fds: list[int] = []
        try:
            fds += os.pipe()
            fds += os.pipe()
            request_read, request_write, reply_read, reply_write = fds
            for fd in (request_write, reply_read):
                os.set_blocking(fd, False)
                with contextlib.suppress(PermissionError):  # past the user's pipe quota: slower, not wrong
                    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE_BYTES)
            process = await asyncio.create_subprocess_exec(
                *_command(binaries, sandbox),
                stdin=request_read,
                stdout=reply_write,
                stderr=asyncio.subprocess.PIPE,
                env=postgres_environment(),
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            for fd in fds:
                os.close(fd)
            sandbox.wipe()
            raise
        os.close(request_read)
        os.close(reply_write)
        worker = cls(
            process,
            sandbox,
            request_write,
            reply_read,
            max_outstanding=max_outstanding,
            stall_timeout_s=stall_timeout_s,
        )
        try:
            async with asyncio.timeout(start_timeout_s):
                await worker._slots.acquire()
                worker.greeting = protocol.parse_greeting(await worker._expect())
        except (KeylakeError, TimeoutError) as error:
            worker.kill()
            await worker.wait_closed()
            failure = UnavailableError("the redo worker did not start")
            if process.stderr is not None:
                failure.add_note((await process.stderr.read())[-4000:].decode(errors="replace"))
            raise failure from error
        except BaseException:
            worker.kill()
            raise
        return worker

    # ---- what it does

    async def apply(
        self,
        rel: Rel,
        fork: int,
        blkno: int,
        base: bytes | None,
        records: Sequence[tuple[int, bytes]],
        *,
        verify_crc: bool = False,
    ) -> bytes:
        """The page after all `records`, each (end LSN, record without page headers), in ascending order of LSN.

        `base` is the page before them (its LSN is below the first record's), or None when the first record
        initialises or restores it. Every record must refer to this very block. `rel` is (tablespace OID, database
        OID, relfilenumber).

        Raises InvalidInputError, CorruptedError, IntegrityError, UnavailableError. Each says which page it is about; if
        redo refused a record, also which one, and of which resource manager.
        """
        page = base
        try:
            for run in protocol.split_chain(records):
                request = protocol.apply_request(rel, fork, blkno, page, run, verify_crc=verify_crc)
                page = await self._page(request)
        except KeylakeError as error:
            spc, db, number = rel
            place = f"block {blkno} of {spc}/{db}/{number}, fork {fork}"
            span = f" up to {format_lsn(records[-1][0])}" if records else ""
            raise type(error)(f"redo of {place}{span}: {error}") from error
        assert page is not None  # noqa: S101 - split_chain never returns nothing
        return page

    async def mask(self, rmid: int, blkno: int, page: bytes) -> bytes:
        """The page without what may differ between a primary and a replay: the resource manager's rm_mask."""
        return await self._page(protocol.mask_request(rmid, blkno, page))

    async def ping(self) -> None:
        await self._request(protocol.ping_request())

    # ---- how it ends

    @property
    def is_alive(self) -> bool:
        """False once requests can only fail."""
        return self._error is None and not self._closing

    @property
    def pid(self) -> int:
        """The outermost process: end it and all of the worker ends (with Isolation.NAMESPACES)."""
        return self._process.pid

    @property
    def redo_pid(self) -> int | None:
        """The Postgres process itself, as numbered here."""
        return self._sandbox.inner_pid(self._process.pid) if self._process.returncode is None else None

    def kill(self) -> None:
        """End the process with SIGKILL and fail all requests. Returns at once; `wait_closed` waits for the end."""
        self._fail(UnavailableError("the redo worker was killed"))

    async def close(self) -> None:
        """Take no more requests, answer those under way, end the process and wait for its end."""
        self._closing = True
        await self._idle.wait()
        self._fail(UnavailableError("the redo worker is closed"))
        await self.wait_closed()

    async def wait_closed(self) -> None:
        """Wait until the process and its tmpfs are gone, however that comes about."""
        await asyncio.shield(self._reaper)

    async def _reap(self) -> None:
        await self._process.wait()
        # Every process of the worker holds the pipe, so its end is when the last one has given up its memory.
        await self._end_of_replies.wait()
        self._sandbox.wipe()

    def _fail(self, error: KeylakeError) -> None:
        """All that is under way or to come fails, and the process is killed. The first call decides on the error."""
        if self._error is not None:
            return
        self._error = error
        self._loop.remove_writer(self._request_fd)
        os.close(self._request_fd)
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        pending, self._pending = self._pending, deque()
        self._unsent.clear()
        for future in pending:
            if not future.done():
                future.set_exception(UnavailableError(str(error)))
            self._slots.release()
        self._idle.set()
        self._may_send.set()

    # ---- requests and replies

    async def _page(self, request: bytes) -> bytes:
        payload = await self._request(request)
        if len(payload) != protocol.PAGE_SIZE_BYTES:
            self._fail(UnavailableError("the redo worker does not speak its protocol"))
            raise UnavailableError("the redo worker does not speak its protocol")
        return payload

    async def _request(self, request: bytes) -> bytes:
        await self._slots.acquire()
        while self._unsent_bytes > _UNSENT_LIMIT_BYTES and self._error is None:
            self._may_send.clear()
            try:
                await self._may_send.wait()
            except asyncio.CancelledError:
                self._slots.release()
                raise
        if self._error is not None or self._closing:
            self._slots.release()
            raise UnavailableError(str(self._error or "the redo worker is closing"))
        answer = self._expect()
        self._send(request)
        reply = await answer
        if reply.status is not Status.OK:
            raise protocol.error_of(reply)
        return reply.payload

    def _expect(self) -> asyncio.Future[Reply]:
        """Register for the next reply that nobody waits for yet."""
        future: asyncio.Future[Reply] = self._loop.create_future()
        if self._watchdog is None:
            self._last_progress_s = self._loop.time()
            self._watchdog = self._loop.call_later(self._stall_timeout_s, self._check_progress)
        self._pending.append(future)
        self._idle.clear()
        return future

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        if not self._unsent:
            view = view[self._write(view) :]
            if not view or self._error is not None:
                return
            self._loop.add_writer(self._request_fd, self._on_writable)
        self._unsent.append(view)
        self._unsent_bytes += len(view)

    def _write(self, view: memoryview) -> int:
        try:
            return os.write(self._request_fd, view)
        except (BlockingIOError, InterruptedError):
            return 0
        except BrokenPipeError:
            # Its last replies may tell why, so leave the rest to the reader and the reaper.
            return len(view)

    def _on_writable(self) -> None:
        while self._unsent:
            view = self._unsent[0]
            written = self._write(view)
            self._unsent_bytes -= written
            if written < len(view):
                self._unsent[0] = view[written:]
                break
            self._unsent.popleft()
        else:
            self._loop.remove_writer(self._request_fd)
        if self._unsent_bytes <= _UNSENT_LIMIT_BYTES:
            self._may_send.set()

    def _on_readable(self) -> None:
        """Take in whatever the pipe holds; after a failure only look for its end."""
        while not self._end_of_replies.is_set():
            try:
                data = os.read(self._reply_fd, _READ_SIZE_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            if not data:
                self._loop.remove_reader(self._reply_fd)
                os.close(self._reply_fd)
                self._end_of_replies.set()
                self._fail(UnavailableError("the redo worker ended"))
                return
            if self._error is not None:
                continue
            try:
                replies = self._parser.feed(data)
                for reply in replies:
                    self._answer(reply)
            except KeylakeError:
                self._fail(UnavailableError("the redo worker does not speak its protocol"))
                continue
            if len(data) < _READ_SIZE_BYTES:
                return

    def _answer(self, reply: Reply) -> None:
        if not self._pending:
            raise UnavailableError("a reply that nobody asked for")
        future = self._pending.popleft()
        self._slots.release()
        if not future.done():  # its caller may have been cancelled
            future.set_result(reply)
        self._last_progress_s = self._loop.time()
        if not self._pending:
            self._idle.set()

    def _check_progress(self) -> None:
        self._watchdog = None
        # We may be what was stopped, not the worker.
        self._on_readable()
        if not self._pending:
            return
        left_s = self._last_progress_s + self._stall_timeout_s - self._loop.time()
        if left_s <= 0:
            self._fail(UnavailableError("the redo worker did not answer in time and was killed"))
        else:
            self._watchdog = self._loop.call_later(left_s, self._check_progress)


def _command(binaries: RedoBinaries, sandbox: Sandbox) -> list[str]:
    data = str(sandbox.directory)
    postgres = [binaries.installation.program("postgres"), "--single", "-D", data]
    for name, value in {**_SETTINGS, "shared_preload_libraries": str(binaries.library)}.items():
        postgres += ["-c", f"{name}={value}"]
    start = ["sh", "-c", _COPY_AND_RUN, "redo", str(binaries.scratch), data, *postgres, "template1"]
    # Without a pid namespace, this is what ends the process with us.
    command = postgres_command(start, parent_death_signal=signal.SIGKILL, installation=binaries.installation)
    return sandbox.command(command, as_ourselves=True)
