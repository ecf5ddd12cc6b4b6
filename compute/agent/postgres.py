"""The one Postgres of an agent: single-user boot step, start, ready, stop."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from compute.sealed_log import MAX_BATCH_SIZE_BYTES, SealedLog
from shared.errors import UnavailableError
from shared.postgres import PostgresInstallation, postgres_command, postgres_environment
from shared.telemetry import get_logger

_log = get_logger(__name__)

_READY: Final = re.compile(rb"\] LOG:  database system is ready to accept (?:read-only )?connections")
_SINGLE_USER_TIMEOUT_S: Final = 60.0


class CrashedError(UnavailableError):
    """Postgres itself is what does not work."""


class ComputePostgres:
    """Runs with the postgresql.conf and pg_hba.conf that lie in `pgdata`. What it prints goes to the sealed log
    only.
    """

    def __init__(
        self, pgdata: Path, installation: PostgresInstallation, log: SealedLog, prefix: Sequence[str] = ()
    ) -> None:
        """`prefix`: what the command line starts with, e.g. a network namespace without a network."""
        self._pgdata = pgdata
        self._installation = installation
        self._log = log
        self._prefix = tuple(prefix)
        self._process: asyncio.subprocess.Process | None = None
        self._pump: asyncio.Task[None] | None = None

    def _command(self, *arguments: str) -> list[str]:
        argv = [self._installation.program("postgres"), *arguments]
        # SIGQUIT, an immediate shutdown: where there is no pid namespace that dies with us, it takes its children
        # along.
        command = postgres_command(argv, parent_death_signal=signal.SIGQUIT, installation=self._installation)
        return [*self._prefix, *command]

    async def run_single_user(self, sql: str) -> None:
        """Run `sql` without any other process and without a socket. Raises CrashedError at its first error."""
        process = await asyncio.create_subprocess_exec(
            *self._command(
                "--single", "-j", "-D", str(self._pgdata), "-c", "exit_on_error=on", "-c", "synchronous_commit=local",
                "postgres",
            ),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=postgres_environment(),
        )  # fmt: skip
        try:
            async with asyncio.timeout(_SINGLE_USER_TIMEOUT_S):
                _, stderr = await process.communicate(sql.encode())
        except TimeoutError:
            raise CrashedError("the compute's roles could not be set up in time") from None
        finally:
            if process.returncode is None:
                process.kill()
        self._log.append(stderr)
        if process.returncode != 0:
            raise CrashedError(f"the compute's roles could not be set up: status {process.returncode}")

    async def start(self, timeout_s: float | None) -> None:
        """Returns when it takes connections. Raises CrashedError."""
        process = await asyncio.create_subprocess_exec(
            *self._command("-D", str(self._pgdata)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=postgres_environment(),
        )
        self._process = process
        ready = asyncio.get_running_loop().create_future()
        self._pump = asyncio.create_task(self._seal_log(process, ready), name="postgres log")
        try:
            async with asyncio.timeout(timeout_s):
                if not await ready:
                    raise CrashedError("Postgres did not start")
        except TimeoutError:
            raise CrashedError("Postgres did not start in time") from None

    async def _seal_log(self, process: asyncio.subprocess.Process, ready: asyncio.Future[bool]) -> None:
        """Ends at end of file, which is when the last process of the server is gone: all of them hold the pipe."""
        assert process.stderr is not None  # noqa: S101 - it is a pipe
        seen = b""
        try:
            while chunk := await process.stderr.read(MAX_BATCH_SIZE_BYTES):
                self._log.append(chunk)
                if not ready.done():
                    seen = seen[-256:] + chunk
                    if _READY.search(seen):
                        ready.set_result(True)
        except OSError as error:
            # Without a reader Postgres would stop at its next message; without its log it must not go on unseen either.
            _log.error("Postgres's log cannot be written", error=error.strerror)
            process.kill()
        finally:
            if not ready.done():
                ready.set_result(False)

    async def wait(self) -> int:
        """The exit status of the server, once it ends."""
        assert self._process is not None  # noqa: S101 - started first
        return await self._process.wait()

    def reload(self) -> None:
        """It reads its configuration again, in its own time."""
        assert self._process is not None  # noqa: S101 - started first
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGHUP)

    async def stop(self, timeout_s: float) -> bool:
        """Fast shutdown: sessions end, and a shutdown checkpoint goes to the safekeepers. False when it took too
        long.
        """
        process = self._process
        if process is None:
            return True
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(timeout_s):
                await process.wait()
                if self._pump is not None:
                    await asyncio.shield(self._pump)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """After everything was killed: collect what is left of it."""
        if self._process is not None:
            await self._process.wait()
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
