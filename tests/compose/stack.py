"""The shipped docker-compose.yml as a project of its own: set through the environment, and nothing else changed."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from keylake.compose_host import compose_command
from keylake.ports import free_port
from tests.compose.engine import docker
from tests.compose.images import CERTIFICATES, ROOT

_HEALTHY_TIMEOUT_S: Final = 180.0
_MAKE_TIMEOUT_S: Final = 900.0
_PROJECT_LABEL: Final = "com.docker.compose.project"
_S3_HEALTH: Final = "import urllib.request as r; r.urlopen('http://127.0.0.1:9000/moto-api/')"


@dataclass(frozen=True, slots=True)
class Container:
    name: str
    """Of the service."""
    facts: dict[str, Any]
    """What `docker inspect` says."""

    @property
    def id(self) -> str:
        return str(self.facts["Id"])

    @property
    def runs(self) -> bool:
        return bool(self.facts["State"]["Running"])

    @property
    def health(self) -> str:
        return str(self.facts["State"].get("Health", {}).get("Status", "none"))


@dataclass(slots=True)
class Stack:
    project: str = field(default_factory=lambda: f"keylake-test-{secrets.token_hex(4)}")
    proxy_port: int = field(default_factory=free_port)
    console_port: int = field(default_factory=free_port)
    fuse_device: str = "/dev/fuse"

    @property
    def base(self) -> str:
        return f"{self.project}-base"

    @property
    def image(self) -> str:
        return f"{self.project}-image"

    @property
    def s3(self) -> str:
        return f"{self.project}-s3"

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "COMPOSE_PROJECT_NAME": self.project,
            "KEYLAKE_PROXY_PORT": str(self.proxy_port),
            "KEYLAKE_CONSOLE_PORT": str(self.console_port),
            "KEYLAKE_FUSE_DEVICE": self.fuse_device,
            "KEYLAKE_IMAGE": self.image,
            "BASE_IMAGE": self.base,
            "KEYLAKE_BUILD_NETWORK": "host",
            "PIP_CERT": str(CERTIFICATES),
            "KEYLAKE_S3_IMAGE": self.s3,
            "KEYLAKE_S3_COMMAND": "python /opt/moto/moto_server.py -H 0.0.0.0 -p 9000",
            "KEYLAKE_S3_HEALTH": f'python -c "{_S3_HEALTH}"',
        }

    @property
    def compose_version(self) -> str:
        return self.compose("version", "--short").stdout.strip()

    def compose(
        self, *arguments: str, timeout_s: float = 600.0, check: bool = True, more: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`more`: of its environment. Raises CalledProcessError unless `check` is off."""
        return subprocess.run(
            [*compose_command(), *arguments],
            cwd=ROOT,
            env={**self.environment, **(more or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=check,
        )

    def make(
        self, target: str, *, seconds: float | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """As people type it, with our Compose. `seconds`: SIGTERM after so long, by timeout(1), which ends with 124.

        Raises CalledProcessError unless `check` is off."""
        # What the `make` that we may run under was given is not for this one.
        environment = {
            name: value for name, value in self.environment.items() if not name.startswith(("MAKE", "MFLAGS"))
        }
        limit = [] if seconds is None else ["timeout", f"{seconds:g}"]
        return subprocess.run(
            [*limit, "make", target, f"COMPOSE={shlex.join(compose_command())}"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_MAKE_TIMEOUT_S,
            check=check,
        )

    def operator(
        self, *arguments: str, check: bool = True, password: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`password`: PGPASSWORD there, and on no command line."""
        given = ("-e", "PGPASSWORD") if password is not None else ()
        more = {} if password is None else {"PGPASSWORD": password}
        return self.compose("run", "--rm", "--no-deps", "-T", *given, "operator", *arguments, check=check, more=more)

    def keylake(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """On the host, as people run it; its output goes where ours does."""
        argv = [sys.executable, "-P", "-c", "from keylake.cli import main; main()", *arguments]
        return subprocess.run(argv, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, text=True, check=False)

    def containers(self) -> list[Container]:
        ids = docker("ps", "--all", "--quiet", "--filter", f"label={_PROJECT_LABEL}={self.project}").split()
        facts: list[dict[str, Any]] = json.loads(docker("inspect", *ids)) if ids else []
        return [Container(each["Config"]["Labels"]["com.docker.compose.service"], each) for each in facts]

    def wait_until_healthy(self) -> list[Container]:
        """All that run. Raises TimeoutError that names those which are not."""
        deadline = time.monotonic() + _HEALTHY_TIMEOUT_S
        while True:
            containers = [each for each in self.containers() if each.runs]
            if all(each.health == "healthy" for each in containers):
                return containers
            if time.monotonic() > deadline:
                raise TimeoutError(f"not healthy: {[each.name for each in containers if each.health != 'healthy']}")
            time.sleep(0.5)

    def left_over(self) -> list[str]:
        """Containers, volumes and networks of the project."""
        own = f"label={_PROJECT_LABEL}={self.project}"
        return [
            *docker("ps", "--all", "--filter", own, "--format", "{{.Names}}").split(),
            *docker("volume", "ls", "--filter", own, "--format", "{{.Name}}").split(),
            *docker("network", "ls", "--filter", own, "--format", "{{.Name}}").split(),
        ]

    def volumes(self) -> dict[str, Path]:
        """Name → directory on this machine."""
        names = docker("volume", "ls", "--quiet", "--filter", f"label={_PROJECT_LABEL}={self.project}").split()
        return {each["Name"]: Path(each["Mountpoint"]) for each in json.loads(docker("volume", "inspect", *names))}
