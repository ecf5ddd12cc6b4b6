"""One service as a child process: started, awaited until ready, stopped, killed, started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from shared.crypto.aead import NULL_CIPHER_VARIABLE
from shared.errors import UnavailableError
from shared.hardening import hardened_environment
from shared.roles import TOKEN_VARIABLES

READY_POLL_S: Final = 0.05
_LOG_TAIL_BYTES: Final = 2000
# Whose shell it was says nothing about how data is sealed: only a caller that asks for the null cipher gets it.
_NOT_INHERITED: Final = frozenset({*TOKEN_VARIABLES, NULL_CIPHER_VARIABLE})


def _die_with_parent() -> list[str]:
    """Prefix that makes a child end when we do, however we end (prctl PR_SET_PDEATHSIG)."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []


class Child(Protocol):
    """What is needed of a child process; asyncio's have it."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    async def wait(self) -> int: ...

    def send_signal(self, number: int, /) -> None:
        """May raise ProcessLookupError when it has ended."""


class ServiceProcess:
    """`python -m <module> --config <file>`, its output in a log file. `is_ready` is asked until it answers True."""

    def __init__(
        self,
        name: str,
        module: str,
        config: Path,
        log: Path,
        is_ready: Callable[[], Awaitable[bool]],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self._module = module
        self._config = config
        self._is_ready = is_ready
        self._environment = dict(environment or {})
        self._process: Child | None = None

    @property
    def pid(self) -> int:
        """Raises UnavailableError when it does not run."""
        if self._process is None or self._process.returncode is not None:
            raise UnavailableError(f"{self.name} is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self, timeout_s: float = 30.0) -> None:
        """Start it and wait until it is ready. Raises UnavailableError, with the end of its log, when it does not get
        there."""
        self._process = await self._spawn()
        try:
            async with asyncio.timeout(timeout_s):
                while not await self._is_ready():
                    if not self.running:
                        raise UnavailableError(
                            f"{self.name} ended with code {self._process.returncode}: {self._tail()}"
                        )
                    await asyncio.sleep(READY_POLL_S)
        except TimeoutError:
            await self.kill()
            raise UnavailableError(f"{self.name} was not ready within {timeout_s:g} s: {self._tail()}") from None

    async def _spawn(self) -> Child:
        with self._open_log() as output:
            return await asyncio.create_subprocess_exec(
                *_die_with_parent(),
                sys.executable,
                "-P",  # no folder of the current directory may stand in for one of ours
                "-m",
                self._module,
                "--config",
                str(self._config),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._child_environment(),
            )

    def _child_environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        environment = {**inherited, **self._environment, "PYTHONUNBUFFERED": "1"}
        return hardened_environment(environment, small_objects=self._module == "keymanager")

    def _open_log(self) -> BinaryIO:
        """For appending; a new one has mode 0600."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        return os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")

    async def stop(self, timeout_s: float = 15.0) -> None:
        """SIGTERM, and SIGKILL when that does not end it. Idempotent."""
        if self._process is None or self._process.returncode is not None:
            return
        self.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """SIGKILL, as a crash. Idempotent."""
        if self._process is None or self._process.returncode is not None:
            return
        self.send_signal(signal.SIGKILL)
        await self._process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _tail(self) -> str:
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").strip() or "(its log is empty)"
        return "(no log)"
