"""The PostgreSQL 16 that Keylake runs: initdb, and one plain server of our own. Also the door to its binaries.

postgres_installation.py   where the binaries are, how to start them when we are root (all of it importable from here)
postgres.py                initdb; PostgresServer, for the metadata database and for tests
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import re
import signal
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from shared.errors import ConflictError, InvalidInputError, UnavailableError
from shared.postgres_installation import (
    PG_BIN_VARIABLE,
    PG_MAJOR_VERSION,
    PostgresInstallation,
    Unprivileged,
    find_postgres,
    postgres_command,
    postgres_environment,
    unprivileged,
)

__all__ = [
    "PG_BIN_VARIABLE",
    "PG_MAJOR_VERSION",
    "Auth",
    "PostgresInstallation",
    "PostgresServer",
    "Shutdown",
    "Unprivileged",
    "find_postgres",
    "initdb",
    "postgres_command",
    "postgres_environment",
    "unprivileged",
]

_MAX_SOCKET_PATH_BYTES: Final = 107  # sockaddr_un.sun_path without its NUL


class Auth(enum.Enum):
    """pg_hba.conf methods that we use."""

    TRUST = "trust"
    SCRAM = "scram-sha-256"
    REJECT = "reject"


async def initdb(
    pgdata: Path,
    *,
    superuser: str = "postgres",
    password: str | None = None,
    auth_local: Auth = Auth.TRUST,
    auth_host: Auth = Auth.SCRAM,
    wal_segment_size_mb: int = 16,
    installation: PostgresInstallation | None = None,
) -> None:
    """Make a data directory: UTF8, locale C, no data checksums, not synced to disk. `pgdata` must be absent or empty.

    Without a `password` the superuser can not log in where SCRAM is asked for. Directories above `pgdata` must let
    whom Postgres runs as through (`unprivileged`). Raises ConflictError when `pgdata` is not empty, UnavailableError
    when initdb fails (its output is in the notes).
    """
    installation = installation or find_postgres()
    pgdata.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(pgdata.iterdir()):
        raise ConflictError("the data directory is not empty")
    pgdata.chmod(0o700)
    unprivileged(installation).give(pgdata)
    argv = [installation.program("initdb"), "-D", str(pgdata), "-U", superuser, "-E", "UTF8", "--locale=C", "--no-sync"]
    argv += ["--no-instructions", f"--wal-segsize={wal_segment_size_mb}"]
    argv += [f"--auth-local={auth_local.value}", f"--auth-host={auth_host.value}"]
    with contextlib.ExitStack() as stack:
        descriptors: tuple[int, ...] = ()
        if password is not None:
            # In memory only, and not on the command line. A pipe would do but for the user we may have to become.
            memory = stack.enter_context(os.fdopen(os.memfd_create("password"), "w", encoding="utf-8"))
            memory.write(password + "\n")
            memory.flush()
            descriptors = (memory.fileno(),)
            argv.append(f"--pwfile=/dev/fd/{memory.fileno()}")
        process = await asyncio.create_subprocess_exec(
            *postgres_command(argv, installation=installation),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=postgres_environment(),
            pass_fds=descriptors,
        )
    _, stderr = await process.communicate()
    if process.returncode != 0:
        failure = UnavailableError(f"initdb failed with status {process.returncode}")
        failure.add_note(stderr.decode(errors="replace")[-2000:])
        raise failure


class Shutdown(enum.Enum):
    """How to stop: pg_ctl's modes, and SIGKILL."""

    FAST = signal.SIGINT
    IMMEDIATE = signal.SIGQUIT
    KILL = signal.SIGKILL


_READY: Final = re.compile(rb"database system is ready to accept (read-only )?connections")
_TAIL_SIZE_BYTES: Final = 16 * 1024


class PostgresServer:
    """One plain, private Postgres server: the metadata database, and tests. Not a compute.

    Listens on 127.0.0.1:`port`, or with `socket_dir` on a Unix socket there (both may be given). `conf` goes to the
    command line, so it must hold no secret. The server's log goes to `log`; the last 16 KiB are kept in memory.
    When the thread that started it ends, the server shuts down (fast). It may be started again after it stopped.
    """

    def __init__(
        self,
        pgdata: Path,
        *,
        port: int | None = None,
        socket_dir: Path | None = None,
        conf: Mapping[str, str | int | float | bool] | None = None,
        log: Path | None = None,
        installation: PostgresInstallation | None = None,
    ) -> None:
        if port is None and socket_dir is None:
            raise InvalidInputError("a server needs a port or a socket directory")
        self.pgdata = pgdata
        self.port = port or 5432
        self.socket_dir = socket_dir
        self._listen = port is not None
        self._conf = dict(conf or {})
        self._log = log
        self._installation = installation or find_postgres()
        self._process: asyncio.subprocess.Process | None = None
        self._pump: asyncio.Task[None] | None = None
        self._tail: deque[bytes] = deque(maxlen=64)
        if self._conf.get("log_min_messages") in ("fatal", "panic"):
            raise InvalidInputError("log_min_messages would hide that the server is ready")
        if socket_dir and len(os.fsencode(socket_dir / f".s.PGSQL.{self.port}")) > _MAX_SOCKET_PATH_BYTES:
            raise InvalidInputError("the socket directory's path is too long for a Unix socket")

    @property
    def host(self) -> str:
        """What a client passes as host: the socket directory if there is one."""
        return str(self.socket_dir) if self.socket_dir else "127.0.0.1"

    @property
    def pid(self) -> int | None:
        """The postmaster, while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def log_tail(self) -> str:
        return b"".join(self._tail).decode(errors="replace")

    async def start(self, *, timeout_s: float = 60.0) -> None:
        """Returns when the server takes connections.

        Raises ConflictError when it is started already, UnavailableError (with the log's end as a note) when it
        does not start.
        """
        if self._process is not None:
            raise ConflictError("the server is already started")
        argv = [self._installation.program("postgres"), "-D", str(self.pgdata)]
        for name, value in self._settings().items():
            argv += ["-c", f"{name}={_setting(value)}"]
        unprivileged(self._installation).give(self.pgdata)
        if self.socket_dir is not None:
            self.socket_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            unprivileged(self._installation).give(self.socket_dir)
        self._tail.clear()
        process = await asyncio.create_subprocess_exec(
            *postgres_command(argv, parent_death_signal=signal.SIGINT, installation=self._installation),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=postgres_environment(),
            start_new_session=True,  # Ctrl-C is for us: we stop it when we are done with it
        )
        self._process = process
        ready: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._pump = asyncio.create_task(self._read_log(process.stderr, ready), name="postgres log")
        try:
            async with asyncio.timeout(timeout_s):
                is_ready = await ready
        except TimeoutError:
            is_ready = False
        except BaseException:
            await self.stop(Shutdown.KILL)
            raise
        if not is_ready:
            await self.stop(Shutdown.KILL)
            failure = UnavailableError("Postgres did not start")
            failure.add_note(self.log_tail[-4000:])
            raise failure

    def _settings(self) -> dict[str, str | int | float | bool]:
        fixed: dict[str, str | int | float | bool] = {
            "port": self.port,
            "listen_addresses": "127.0.0.1" if self._listen else "",
            "unix_socket_directories": str(self.socket_dir or ""),
            "logging_collector": False,
            "log_destination": "stderr",
            "lc_messages": "C",  # we look for a message
        }
        return {**self._conf, **fixed}

    async def _read_log(self, stream: asyncio.StreamReader | None, ready: asyncio.Future[bool]) -> None:
        """Ends at end of file, which is when the last process of the server is gone: all of them hold the pipe."""
        log: BinaryIO | None = None
        if self._log is not None:
            # Errors quote what was asked: for our own eyes only.
            descriptor = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            log = os.fdopen(descriptor, "ab", buffering=0)
        seen = b""
        try:
            while stream is not None and (chunk := await stream.read(1 << 16)):
                self._tail.append(chunk[-_TAIL_SIZE_BYTES:])
                while sum(map(len, self._tail)) > _TAIL_SIZE_BYTES and len(self._tail) > 1:
                    self._tail.popleft()
                if log is not None:
                    log.write(chunk)
                if not ready.done():
                    seen = seen[-256:] + chunk
                    if _READY.search(seen):
                        ready.set_result(True)
        finally:
            if log is not None:
                log.close()
            if not ready.done():
                ready.set_result(False)

    async def stop(self, how: Shutdown = Shutdown.FAST, *, timeout_s: float = 60.0) -> None:
        """Returns when every process of the server is gone. Does nothing when it is not running.

        Raises UnavailableError when it had to be killed because it did not stop in time; then it is gone as well.
        """
        process, pump = self._process, self._pump
        if process is None or pump is None:
            return
        if process.returncode is None:
            process.send_signal(how.value)
        in_time = True
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(pump)
        except TimeoutError:
            in_time = False
            if process.returncode is None:
                process.kill()
            await pump
        await process.wait()
        self._process = self._pump = None
        if not in_time:
            raise UnavailableError("Postgres did not stop in time and was killed")

    async def wait(self) -> int:
        """Wait until the server ends by itself; its exit status (negative: signal)."""
        if self._process is None:
            raise ConflictError("the server is not started")
        return await self._process.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()


def _setting(value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
