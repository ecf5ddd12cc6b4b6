"""Starting agents, and the manager's end of their control pipes.

An agent is a Python process in a sandbox of its own; importing takes longer than booting. So a few *spares* are started
ahead, inside their sandboxes, knowing nothing: no project, no token, no key. The first message on the pipe makes one of
them the compute of an endpoint; it never serves a second one.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from compute.agent.processes import kill_tree
from compute.agent.protocol import (
    MAX_LINE_SIZE_BYTES,
    Alive,
    Boot,
    Cleared,
    Ended,
    Idle,
    InUse,
    LogContent,
    Prepared,
    ReadLog,
    Replayed,
    Running,
    Start,
    Stop,
    Tokens,
    pack_line,
    parse_from_agent,
)
from compute.volume.base import VolumeKind
from shared.api.common import ApiModel
from shared.crypto.aead import NULL_CIPHER_VARIABLE
from shared.errors import IntegrityError, InvalidInputError, KeylakeError, UnavailableError
from shared.hardening import hardened_environment
from shared.postgres import PG_BIN_VARIABLE, unprivileged
from shared.sandbox import Isolation, Sandbox
from shared.telemetry import get_logger

_log = get_logger(__name__)

TOKEN_REFRESH_S: Final = 15.0
_EXIT_TIMEOUT_S: Final = 5.0
_MESSAGE_TIMEOUT_S: Final = 10.0
_SILENT_LOOKS: Final = 3
_FIRST_ANSWER_S: Final = 0.5
"""What a client has after its compute runs, to log in and to be answered, before the next spare is made."""
_INHERITED: Final = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "TMPDIR", PG_BIN_VARIABLE, NULL_CIPHER_VARIABLE)

T = TypeVar("T")
TokenMint = Callable[[], Tokens]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Where a FUSE volume keeps what is written, sealed, and how much of it."""

    directory: Path
    size_bytes: int


class AgentProcess:
    """One agent. `boot` it once; then await `prepared`, `running`, `ended`; `close` it in any case."""

    def __init__(self, process: asyncio.subprocess.Process, sandbox: Sandbox) -> None:
        loop = asyncio.get_running_loop()
        self._process = process
        self._sandbox = sandbox
        self.prepared: asyncio.Future[Prepared] = loop.create_future()
        self.running: asyncio.Future[Running] = loop.create_future()
        self.ended: asyncio.Future[Ended] = loop.create_future()
        """Always gets a result: the agent's last word, or that it died without one. `close` waits for its processes."""
        self.on_idle: Callable[[float], None] = lambda idle_s: None
        """Called every few seconds with how long nobody has used Postgres, in seconds."""
        self.on_cleared: Callable[[], None] = lambda: None
        """Called when the agent says that nothing of the project is left, before `ended`."""
        self.replayed: Replayed | None = None
        """What a replica said last."""
        self._messages = 0
        """Heard so far."""
        self._in_use: asyncio.Future[InUse] = loop.create_future()
        self._log_asked: asyncio.Future[LogContent] | None = None
        self._log_lock = asyncio.Lock()
        self._reader = asyncio.create_task(self._read(), name="agent pipe")
        self._refresher: asyncio.Task[None] | None = None

    @classmethod
    async def spawn(
        cls,
        *,
        volume_size_bytes: int,
        isolation: Isolation | None = None,
        volume: VolumeKind = VolumeKind.TMPFS,
        blocks: Blocks | None = None,
        parent_dir: Path | None = None,
    ) -> AgentProcess:
        """Start one that knows nothing yet. `isolation`: None for the best that this machine allows. `blocks`: needed
        unless the volume is tmpfs. `parent_dir`: of its sandbox.

        Raises UnavailableError.
        """
        sandbox = await asyncio.to_thread(_make_sandbox, volume_size_bytes, isolation, parent_dir)
        argv = [sys.executable, "-P", "-m", "compute.agent", "--isolation", sandbox.isolation.value]
        argv += ["--directory", str(sandbox.directory), "--size-bytes", str(volume_size_bytes)]
        argv += ["--volume", volume.value]
        if blocks is not None:
            argv += ["--blocks-dir", str(blocks.directory.absolute()), "--blocks-size-bytes", str(blocks.size_bytes)]
        try:
            process = await asyncio.create_subprocess_exec(
                *sandbox.command(argv),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=MAX_LINE_SIZE_BYTES,
                env=hardened_environment({name: os.environ[name] for name in _INHERITED if name in os.environ}),
            )
        except OSError as error:
            sandbox.wipe()
            raise UnavailableError(f"an agent cannot be started: {error.strerror}") from None
        return cls(process, sandbox)

    @property
    def directory(self) -> Path:
        """Where its volume is, as the agent sees it."""
        return self._sandbox.directory

    @property
    def pid(self) -> int:
        """Of the outermost process: killing it ends the tree."""
        return self._process.pid

    @property
    def inner_pid(self) -> int | None:
        """Of the agent itself; None when it has not started or is gone."""
        return self._sandbox.inner_pid(self._process.pid)

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def boot(self, boot: Boot, tokens: TokenMint) -> None:
        """Raises UnavailableError when the agent is gone."""
        await self._send(boot)
        await self._send(tokens())
        self._refresher = asyncio.create_task(self._refresh(tokens), name="agent tokens")

    async def start(self, start: Start) -> None:
        """Raises UnavailableError when the agent is gone."""
        await self._send(start)

    async def stop(self, timeout_s: float) -> None:
        """Ask for a graceful stop, and wait until it is over. What takes longer than `timeout_s` is killed."""
        self._in_use = asyncio.get_running_loop().create_future()
        await self._stop(Stop(timeout_s=timeout_s))

    async def stop_if_unused(self, unused_for_s: float, timeout_s: float) -> bool:
        """As `stop`, but False when somebody has used it within the last `unused_for_s`: then it goes on."""
        self._in_use = asyncio.get_running_loop().create_future()
        await self._stop(Stop(timeout_s=timeout_s, unused_for_s=unused_for_s))
        return not self._in_use.done()

    async def _stop(self, stop: Stop) -> None:
        try:
            # The sending, too: a pipe that nobody reads fills up.
            async with asyncio.timeout(stop.timeout_s + _EXIT_TIMEOUT_S):
                with suppress(UnavailableError):
                    await self._send(stop)
                either: set[asyncio.Future[Any]] = {self.ended, self._in_use}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            _log.warning("an agent did not stop in time and is killed", pid=self.pid)
            self.kill()
            await asyncio.shield(self.ended)

    async def wait_silent(self, timeout_s: float) -> None:
        """Returns when it has not said anything for `timeout_s`, or a third more. In several looks: when this process
        itself stood still, what was said meanwhile is read before the next one."""
        looks = 0
        while looks < _SILENT_LOOKS:
            messages = self._messages
            await asyncio.sleep(timeout_s / _SILENT_LOOKS)
            looks = looks + 1 if messages == self._messages else 0

    async def read_log(self) -> str:
        """The end of Postgres's log in the clear. Raises UnavailableError when the agent is gone or does not answer,
        IntegrityError when the log on the disk was altered."""
        async with self._log_lock:
            self._log_asked = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(_MESSAGE_TIMEOUT_S):
                    await self._send(ReadLog())
                    content = await self._log_asked
            except TimeoutError:
                raise UnavailableError("the compute did not answer in time") from None
        if content.problem:
            raise IntegrityError(f"the compute's log: {content.problem}")
        return content.text

    def kill(self) -> None:
        """SIGKILL: with a sandbox of namespaces the kernel frees everything of it.

        Each process by itself: the kernel ends a namespace once its first process has ended, and that one cannot while
        it waits for a volume whose server hangs.
        """
        if self.alive:
            kill_tree(self.pid)

    async def close(self) -> None:
        """The agent and everything of it is gone when this returns. Idempotent."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._refresher is not None:
            self._refresher.cancel()
            await asyncio.gather(self._refresher, return_exceptions=True)
        try:
            async with asyncio.timeout(_EXIT_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            _log.warning("an agent did not end by itself and is killed", pid=self.pid)
            self.kill()
            await self._process.wait()
        await self._reader
        await asyncio.to_thread(self._sandbox.wipe)

    async def _send(self, message: ApiModel) -> None:
        if self._process.stdin is None or self._process.returncode is not None:
            raise UnavailableError("the compute is gone")
        try:
            self._process.stdin.write(pack_line(message))
            await self._process.stdin.drain()
        except (OSError, RuntimeError):  # uvloop raises RuntimeError on a closed transport
            raise UnavailableError("the compute is gone") from None

    async def _refresh(self, tokens: TokenMint) -> None:
        while True:
            await asyncio.sleep(TOKEN_REFRESH_S)
            try:
                await self._send(tokens())
            except UnavailableError:
                return

    async def _read(self) -> None:
        """Take messages until the agent ends; whoever waits for one that never came gets to know it."""
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        ended = Ended(reason="the compute's process died", crashed=True)
        try:
            while line := await self._process.stdout.readline():
                self._messages += 1
                match message := parse_from_agent(line):
                    case Prepared():
                        _resolve(self.prepared, message)
                    case Running():
                        _resolve(self.running, message)
                    case Alive():
                        pass  # it was counted
                    case Idle():
                        self.on_idle(message.idle_s)
                    case Replayed():
                        self.replayed = message
                    case InUse():
                        _resolve(self._in_use, message)
                    case LogContent():
                        if self._log_asked is not None:
                            _resolve(self._log_asked, message)
                    case Cleared():
                        self.on_cleared()
                    case Ended():
                        ended = message
                        _resolve(self.ended, ended)  # its process may take its time
        except (InvalidInputError, ValueError, OSError) as error:
            _log.error("an agent does not speak the protocol", error=str(error))
            self.kill()
        gone = UnavailableError(f"the compute ended: {ended.reason}")
        for future in (self.prepared, self.running, self._log_asked):
            if future is not None and not future.done():
                future.set_exception(gone)
                future.exception()  # retrieved: nobody may be waiting
        _resolve(self.ended, ended)


def _resolve(future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


def _make_sandbox(size_bytes: int, isolation: Isolation | None, parent_dir: Path | None) -> Sandbox:
    owner = unprivileged().owner
    return Sandbox.create(size_bytes=size_bytes, network=True, owner=owner, parent_dir=parent_dir, isolation=isolation)


class Launcher:
    """Hands out agents, and keeps `spares` of them ready. Use as an async context manager."""

    def __init__(
        self,
        *,
        volume_size_bytes: int,
        spares: int,
        volume: VolumeKind = VolumeKind.TMPFS,
        blocks: Blocks | None = None,
        parent_dir: Path | None = None,
    ) -> None:
        """`parent_dir`: of all sandboxes."""
        self._parent_dir = parent_dir
        self._volume_size_bytes = volume_size_bytes
        self._volume = volume
        self._blocks = blocks
        self._wanted = spares
        self._spares: list[AgentProcess] = []
        self._filling: asyncio.Task[None] | None = None
        self._starting = 0
        """Agents that were taken and do not run yet."""

    async def __aenter__(self) -> Launcher:
        self._refill()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._wanted = 0
        if self._filling is not None:
            await asyncio.gather(self._filling, return_exceptions=True)
        spares, self._spares = self._spares, []
        await asyncio.gather(*(spare.close() for spare in spares))

    async def take(self, volume_size_bytes: int | None = None) -> AgentProcess:
        """An agent that knows nothing yet; the caller closes it. `volume_size_bytes`: None for the spares' own; for any
        other there is none ahead. Its spare is replaced when it runs or has ended: a client waits for it, and the
        imports of another agent would take half of the processor time of that wait. Raises UnavailableError."""
        agent = await self._next(volume_size_bytes)
        self._starting += 1
        agent.running.add_done_callback(self._has_started)
        return agent

    async def _next(self, volume_size_bytes: int | None) -> AgentProcess:
        if volume_size_bytes is not None and volume_size_bytes != self._volume_size_bytes:
            return await self._spawn(volume_size_bytes)
        while self._spares:
            spare = self._spares.pop(0)
            if spare.alive:
                return spare
            await spare.close()
        return await self._spawn(self._volume_size_bytes)

    def _has_started(self, running: asyncio.Future[Running]) -> None:
        self._starting -= 1
        if not self._starting:
            # It takes connections; the one that woke it has yet to log in and to be answered.
            asyncio.get_running_loop().call_later(_FIRST_ANSWER_S, self._refill)

    async def _spawn(self, volume_size_bytes: int) -> AgentProcess:
        return await AgentProcess.spawn(
            volume_size_bytes=volume_size_bytes, volume=self._volume, blocks=self._blocks, parent_dir=self._parent_dir
        )

    def _refill(self) -> None:
        if self._starting:
            return  # the last of them does
        if self._filling is None or self._filling.done():
            self._filling = asyncio.create_task(self._fill(), name="spare agents")

    async def _fill(self) -> None:
        while len(self._spares) < self._wanted:
            try:
                self._spares.append(await self._spawn(self._volume_size_bytes))
            except KeylakeError as error:
                _log.warning("no spare agent", reason=str(error))
                return


def make_socket_dir(runtime_dir: Path, name: str) -> Path:
    """An empty directory, mode 0700, for one compute's Unix socket."""
    directory = runtime_dir / name
    directory.mkdir(mode=0o700)
    return directory


def remove_socket_dir(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
