"""The host's half of `keylake demo --compose`: starts the operator's container and does for it what no container may.

The operator's container cannot kill or start its neighbours, and must not be able to: a Docker socket inside of a
container is root on the host. So it asks, and this process does it: one JSON object a line, a request on the
container's stdout, a reply on its stdin. The few services that the stack has are killed and started by name, logs are
handed out, and nothing else is done. What people read goes to the container's stderr, which is the terminal.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keylake.provision import SERVICES
from shared.errors import InvalidInputError, UnavailableError

MAX_LINE_SIZE_BYTES: Final = 64 * 1024 * 1024
_COMMAND_TIMEOUT_S: Final = 120.0


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    do: Literal["kill", "start", "logs"]
    service: str = Field(default="", max_length=64)


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    text: str = ""
    error: str = ""


def parse_request(line: bytes) -> Request:
    """Raises InvalidInputError unless it asks for something that the host does."""
    try:
        request = Request.model_validate_json(line)
    except ValidationError:
        raise InvalidInputError("the operator's container does not speak the protocol") from None
    if request.do != "logs" and request.service not in SERVICES:
        raise InvalidInputError("the operator's container asks for a service that there is not")
    return request


def compose_command() -> list[str]:
    """Compose v2, or else docker-compose. Raises UnavailableError."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) is None:
            continue
        if subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0:
            return command
    raise UnavailableError("neither `docker compose` nor `docker-compose` is there")


def _write_all(descriptor: int, data: bytes) -> None:
    """Raises BrokenPipeError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _terminal() -> list[str]:
    """The container has no terminal (`-T`), but what it prints to stderr reaches ours: let it use colours and width."""
    if not sys.stderr.isatty():
        return []
    return ["-e", "FORCE_COLOR=1", "-e", f"COLUMNS={shutil.get_terminal_size().columns}"]


class Host:
    """Docker, as far as the demo needs it. `directory` holds docker-compose.yml."""

    def __init__(self, directory: Path) -> None:
        """Raises UnavailableError when there is no such file, or no Compose."""
        if not (directory / "docker-compose.yml").exists():
            raise UnavailableError(f"no docker-compose.yml in {directory}: run this in Keylake's checkout")
        self._directory = directory
        self._compose = compose_command()

    @classmethod
    def of_this_checkout(cls) -> Host:
        """Raises UnavailableError."""
        return cls(Path(__file__).resolve().parent.parent)

    def run_operator(self, arguments: Sequence[str]) -> int:
        """Run a command in the operator's container and serve it. Returns its exit code. Raises UnavailableError."""
        argv = [*self._compose, "run", "--rm", "--no-deps", "-T", *_terminal(), "operator", *arguments]
        # Not buffered towards it, so that leaving has nothing to flush to a container that is gone.
        process = subprocess.Popen(argv, cwd=self._directory, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None  # noqa: S101 - they are pipes
        assert process.stdout is not None  # noqa: S101
        with process, open(process.stdout.fileno(), "rb", closefd=False) as requests:
            self._serve(requests, process.stdin)
        return process.returncode

    def _serve(self, requests: IO[bytes], replies: IO[bytes]) -> None:
        while line := requests.readline(MAX_LINE_SIZE_BYTES):
            try:
                reply = Reply(text=self._do(parse_request(line)))
            except (InvalidInputError, UnavailableError) as error:
                reply = Reply(error=str(error))
            try:
                _write_all(replies.fileno(), reply.model_dump_json().encode() + b"\n")
            except BrokenPipeError:
                return

    def _do(self, request: Request) -> str:
        match request.do:
            case "kill":
                return self._docker("kill", "-s", "SIGKILL", request.service)
            case "start":
                return self._docker("start", request.service)
            case "logs":
                return self._docker("logs", "--no-color")

    def _docker(self, *arguments: str) -> str:
        """Its output. Raises UnavailableError."""
        try:
            done = subprocess.run(
                [*self._compose, *arguments],
                cwd=self._directory,
                capture_output=True,
                timeout=_COMMAND_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UnavailableError(f"docker compose {arguments[0]} took too long") from None
        if done.returncode != 0:
            raise UnavailableError(f"docker compose {arguments[0]}: {done.stderr.decode(errors='replace')[-500:]}")
        return done.stdout.decode(errors="replace")
