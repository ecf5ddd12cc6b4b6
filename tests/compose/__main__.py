"""`python -m tests.compose`: docker-compose.yml on a Docker engine, from an empty machine to an empty machine.

Needs root unless an engine runs (DOCKER_HOST); docs/compose.md names the packages. Everything is the shipped file's,
but for MinIO, whose image comes from a registry: an S3 server from the package index stands for it. It keeps objects in
memory, so what lies in the object store is looked at through S3, by the demo.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

from shared.errors import KeylakeError
from shared.roles import APPROVES_VARIABLE, ASKS_VARIABLE
from tests.compose import checks
from tests.compose.engine import MissingError, docker, require, running_engine
from tests.compose.images import make_base, make_s3
from tests.compose.stack import Stack

_FAILURES: Final = (
    *(AssertionError, KeylakeError, OSError, ValueError, LookupError, RuntimeError, TimeoutError),
    *(subprocess.SubprocessError, StopIteration),
)


@dataclass(slots=True)
class Outcome:
    passed: int = 0
    failed: list[str] = field(default_factory=list)

    def try_(self, claim: str, look: Callable[[], str]) -> None:
        begun = time.monotonic()
        try:
            seen = look()
        except _FAILURES as error:
            told = (
                f"{error.stdout or ''}{error.stderr or ''}" if isinstance(error, subprocess.CalledProcessError) else ""
            )
            print(f"  ✗ {claim}: {type(error).__name__}: {error} {told[-3000:]}", flush=True)
            self.failed.append(claim)
            return
        print(f"  ✓ {claim}: {seen} ({time.monotonic() - begun:.0f} s)", flush=True)
        self.passed += 1


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    print(f"{what} …", flush=True)
    begun = time.monotonic()
    yield
    print(f"  {time.monotonic() - begun:.0f} s", flush=True)


def exit_code(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout or ''}{done.stderr or ''}"[-3000:]
    return "exit code 0"


_DRILLS: Final[dict[str, tuple[str, ...]]] = {
    "revocation": (),
    "outage": ("--grace", "1", "--hold", "0.5"),
    "rotation": ("--hold", "0.5"),
    "shred": ("--hold", "0.5", "--attest-backups", "none were made of this stack", "--attest-key-copies", "none"),
}
AS_TWO_PEOPLE: Final = f"""
asks=$(keylake token create --role security-admin --ttl 10m --for alice) &&
approves=$(keylake token create --role security-admin --ttl 10m --for bob) &&
export {ASKS_VARIABLE}="$asks" {APPROVES_VARIABLE}="$approves" &&
exec "$@"
"""
"""Their tokens are never on a command line, nor in what the engine tells of a container."""


def drill(stack: Stack, kind: str) -> str:
    """As an operator does it. Its exit code says whether every promise was kept, its report which ones there were."""
    command = ("keylake", "drill", kind, *_DRILLS[kind], "--json", "--out", "/tmp/drill")  # noqa: S108
    shell = ("sh", "-c", AS_TWO_PEOPLE, "sh") if kind == "shred" else ()
    done = stack.operator(*shell, *command, check=False)
    exit_code(done)
    report = json.loads(done.stdout)
    assert (report["kind"], report["passed"]) == (kind, True)
    kept = f"{len(report['promises'])} promises kept"
    return kept if report["revocation_id"] is None else f"{kept}, revocation {report['revocation_id']}"


def down(stack: Stack, before: set[str] | None) -> str:
    stack.make("down")
    left = stack.left_over()
    assert not left, left
    if before is not None:
        assert everything() == before, everything() ^ before
    return "no container, volume or network"


def complaints(stack: Stack) -> list[str]:
    """The last warnings and errors of the services' logs."""
    lines = stack.compose("logs", "--no-color", check=False).stdout.splitlines()
    return [line[:500] for line in lines if '"level": "warning"' in line or '"level": "error"' in line][-60:]


def everything() -> set[str]:
    """All networks and volumes of the engine, whoever made them."""
    networks = docker("network", "ls", "--format", "network {{.Name}}").splitlines()
    return {*networks, *docker("volume", "ls", "--format", "volume {{.Name}}").splitlines()}


def run(stack: Stack, outcome: Outcome, directory: Path, *, alone: bool) -> None:
    """`alone`: nobody else uses the engine."""
    with step("a base image of Debian packages"):
        make_base(stack.base)
    with step("the image, and an S3 server in MinIO's place"), ThreadPoolExecutor(2) as pool:
        for build in (
            pool.submit(make_s3, stack.s3, stack.base),
            pool.submit(stack.compose, "build", timeout_s=1800),
        ):
            build.result()
    before = everything() if alone else None
    try:
        with step("up"):
            told = stack.make("up").stdout
            containers = stack.wait_until_healthy()
        print(f"  {len(containers)} containers are healthy", flush=True)
        outcome.try_("make up", lambda: checks.told_where(stack, told))
        outcome.try_("the image", lambda: checks.image(stack))
        outcome.try_("two ports are published", lambda: checks.published(stack, stack.containers()))
        outcome.try_("keylake demo --compose", lambda: exit_code(stack.keylake("demo", "--compose")))
        name, canary = "", ""

        def by_hand() -> str:
            nonlocal name, canary
            name, canary, seen = checks.postgres(stack, directory)
            return seen

        outcome.try_("psql from the host", by_hand)
        for kind in _DRILLS:
            outcome.try_(f"keylake drill {kind}", partial(drill, stack, kind))
        outcome.try_("make logs", lambda: checks.logs(stack))
        outcome.try_("keylake in the operator's container", lambda: checks.by_command(stack))
        outcome.try_("the console", lambda: checks.console(stack))
        outcome.try_("nobody has power", lambda: checks.powerless(stack.wait_until_healthy()))
        outcome.try_("the S3 server's volume", lambda: checks.room_for_objects(stack))
        outcome.try_("no default password", lambda: checks.no_default_password(stack))
        outcome.try_("secrets are shown nowhere", lambda: checks.secrets_stay_where_they_are(stack))
        if canary:
            outcome.try_("lazy volumes where they are granted", lambda: checks.lazy_volumes(stack, directory, canary))
            outcome.try_("no plaintext on disk", lambda: checks.no_plaintext(stack, name, canary))
        outcome.try_("there is one of each", lambda: checks.one_of_each(stack))
        if outcome.failed:
            print("\n".join(complaints(stack)))
    finally:
        outcome.try_("make down leaves nothing", lambda: down(stack, before))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.compose", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()

    def interrupted(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, interrupted)
    begun, stack, outcome = time.monotonic(), Stack(), Outcome()
    try:
        require("debootstrap", "psql", "tar")
        with running_engine() as own, tempfile.TemporaryDirectory(prefix="keylake-compose-") as directory:
            engine = docker("version", "--format", "Docker {{.Server.Version}}").strip()
            print(engine, "of our own, Compose" if own else "with Compose", stack.compose_version, flush=True)
            try:
                run(stack, outcome, Path(directory), alone=own)
            finally:
                if not own:  # our own engine's data goes as a whole
                    for image in (stack.image, stack.s3, stack.base):
                        subprocess.run(["docker", "rmi", "--force", image], capture_output=True, check=False)
    except (MissingError, subprocess.CalledProcessError, RuntimeError, TimeoutError) as error:
        told = f"\n{error.stdout}{error.stderr}"[-5000:] if isinstance(error, subprocess.CalledProcessError) else ""
        print(f"compose-test: {error}{told}", file=sys.stderr)
        return 1
    print(f"{outcome.passed} passed, {len(outcome.failed)} failed")
    print(f"in {time.monotonic() - begun:.0f} s")
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
