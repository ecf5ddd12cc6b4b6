"""Starting, finding and stopping the process that supervises a local cluster (`keylake.supervisor`), from outside.

    supervisor.pid    locked while a supervisor lives (`keylake.pidlock`)
    supervisor.json   what it started; kept afterwards, because the proxy's port is used again
    logs/supervisor.log

The supervisor says how far it is over a pipe, one JSON object a line, until the cluster is ready.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keylake.pidlock import Owner
from shared.errors import CorruptedError, KeylakeError, UnavailableError
from shared.postgres_installation import PG_BIN_VARIABLE
from shared.roles import TOKEN_VARIABLES

START_TIMEOUT_S: Final = 300.0
"""The first start compiles what Postgres loads and makes a database cluster."""
STOP_TIMEOUT_S: Final = 60.0
_KILL_TIMEOUT_S: Final = 10.0
_LOG_TAIL_BYTES: Final = 1500
_MAX_STATE_SIZE_BYTES: Final = 1 << 20

ENTRIES: Final = (
    "pki",
    "pki.new",
    "pki.old",
    "keys",
    "config",
    "logs",
    "data",
    "connections",
    "cluster.json",
    "supervisor.json",
    "supervisor.pid",
)
"""Everything that Keylake puts into a home, and all that `keylake down --purge` removes."""


class Report(BaseModel):
    """One line of the supervisor's pipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["progress", "ready", "failed"]
    text: str = ""


class ServiceState(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    pid: int | None = Field(description="None while it is down and about to be started again")
    restarts: int = Field(ge=0)


class SupervisorState(BaseModel):
    """`supervisor.json`. Of a supervisor that has ended, only the port still means something."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    started_at: datetime
    proxy_port: int = Field(ge=1, le=65535)
    links: Path | None = Field(default=None, description="the socket at which links are cut; None: there are none")
    services: Mapping[str, ServiceState]

    @classmethod
    def load(cls, home: Path) -> SupervisorState | None:
        """None when there is none. Raises CorruptedError."""
        try:
            with state_file(home).open("rb") as file:
                return cls.model_validate_json(file.read(_MAX_STATE_SIZE_BYTES))
        except FileNotFoundError:
            return None
        except ValidationError:
            raise CorruptedError(f"{state_file(home)} is malformed: remove it") from None


def state_file(home: Path) -> Path:
    return home / "supervisor.json"


def pid_file(home: Path) -> Path:
    return home / "supervisor.pid"


def log_file(home: Path) -> Path:
    return home / "logs" / "supervisor.log"


def find(home: Path) -> Owner | None:
    """The supervisor of `home`, to be closed; None when none runs. Raises UnavailableError, CorruptedError."""
    return Owner.find(pid_file(home))


def choose_proxy_port(home: Path, wanted: int | None) -> int | None:
    """The port asked for, or else that of last time, so that connection strings stay good; None: any.

    Raises UnavailableError when the port that was asked for is taken.
    """
    if wanted is not None:
        if not is_free(wanted):
            raise UnavailableError(f"port {wanted} of 127.0.0.1 is taken: choose another one with --proxy-port")
        return wanted
    try:
        state = SupervisorState.load(home)
    except CorruptedError:
        return None
    return state.proxy_port if state is not None and is_free(state.proxy_port) else None


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections of the last run that linger in TIME_WAIT do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def start(
    home: Path, proxy_port: int | None, progress: Callable[[str], None], keymanagers: int = 1, *, links: bool = False
) -> None:
    """Start a supervisor that outlives us; returns when the cluster is ready.

    Raises UnavailableError with its reason when it does not get there. When we are interrupted it is stopped again.
    """
    for directory in (home, home / "logs"):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    arguments = ["--home", str(home), "--keymanagers", str(keymanagers)]
    arguments += [] if proxy_port is None else ["--proxy-port", str(proxy_port)]
    arguments += ["--links"] if links else []
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as reports:
        try:
            with log_file(home).open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "keylake.supervisor", *arguments, "--report-fd", str(writer)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(writer,),
                    env=child_environment(),
                    cwd=home,
                )
        finally:
            os.close(writer)
        try:
            for line in reports:
                report = Report.model_validate_json(line)
                match report.kind:
                    case "progress":
                        progress(report.text)
                    case "ready":
                        # It is on its own from here; Popen would warn that we leave it running.
                        process.returncode = 0
                        return
                    case "failed":
                        process.wait(STOP_TIMEOUT_S)
                        raise UnavailableError(f"{report.text}; the logs are in {home / 'logs'}")
        except BaseException:
            _end(process)
            raise
    process.wait(STOP_TIMEOUT_S)
    raise UnavailableError(f"the supervisor ended with code {process.returncode}: {_log_tail(home)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def child_environment() -> dict[str, str]:
    """Ours, with the modules found where ours were found, and never in the current directory: a `shared` or `compute`
    of somebody's own project would win over Keylake's. (Services do not hand all of it on to what they start, so the
    current directory has to be the home as well.)"""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    # A process that stays would keep what somebody had for one command.
    inherited = {name: value for name, value in os.environ.items() if name not in TOKEN_VARIABLES}
    environment = {**inherited, "PYTHONSAFEPATH": "1", "PYTHONPATH": path}
    if binaries := environment.get(PG_BIN_VARIABLE):
        environment[PG_BIN_VARIABLE] = os.path.abspath(binaries)
    return environment


def wait_until_ready(home: Path, owner: Owner, timeout_s: float = START_TIMEOUT_S) -> None:
    """For a supervisor that somebody else has just started. Raises UnavailableError."""
    deadline = time.monotonic() + timeout_s
    while not (home / "cluster.json").exists():
        if owner.wait(0.1):
            raise UnavailableError(f"the supervisor ended while it was starting: {_log_tail(home)}")
        if time.monotonic() > deadline:
            raise UnavailableError(f"the cluster is still not ready; see {log_file(home)}")


def stop(owner: Owner, timeout_s: float = STOP_TIMEOUT_S) -> bool:
    """Stop the cluster. True: gracefully. False: it took too long and was killed; its children die with it.

    Raises KeylakeError when even that does not end it.
    """
    owner.send(signal.SIGTERM)
    if owner.wait(timeout_s):
        return True
    owner.send(signal.SIGKILL)
    if not owner.wait(_KILL_TIMEOUT_S):
        raise KeylakeError(f"process {owner.pid} does not end, not even by SIGKILL")
    return False


def _log_tail(home: Path) -> str:
    with contextlib.suppress(OSError), log_file(home).open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
        if lines:
            return f"{lines[-1]} (more in {log_file(home)})"
    return f"nothing in {log_file(home)}"
