"""`make first-run`: what a stranger sees who types the README's commands on a bare machine, recorded.

Twice: in a container of Debian that has Python and make and nothing else, as a user who is not root; and with a Docker
engine and nothing else. Written as asciicasts (version 2 of the format, asciinema's) below docs/first-run, and as text
into docs/first-run.md. A command that fails ends the recording, and what was recorded before it stays.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from keylake.compose_host import compose_command
from tests.compose.engine import MissingError, docker, require, running_engine
from tests.compose.images import CERTIFICATES, PIP_SETTINGS, ROOT, make_base, make_s3
from tests.compose.stack import Stack

CASTS: Final = ROOT / "docs" / "first-run"
COLUMNS: Final = 110
ROWS: Final = 32
_USER: Final = "you"
_SH: Final = re.compile(r"^```sh\n(.*?)^```$", re.M | re.S)
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\].*?(?:\x07|\x1b\\)")
_SECRETS: Final = (
    re.compile(r"(?<=key=)[\w-]{16,}"),
    re.compile(r"(?<=app:)[^@\s]{16,}(?=@)"),
    re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]+"),
)
"""The console's key, passwords in connection strings, tokens. What they opened is gone when the recording ends."""

OMITTED: Final = {
    "make test": "it takes half an hour",
    "keylake drill shred": "it takes the tokens of two people",
    "keylake console": "it is a web page",
}
"""Commands of the README that are not recorded, and why."""
TYPED: Final = {
    "keylake psql shop": "create table orders as select generate_series(1, 3) as id; select count(*) from orders",
    "keylake psql shop/dev": "delete from orders where id = 2; select count(*) from orders",
}
"""What somebody types there."""
AFTERWARDS: Final = {"keylake cloud key disable my-key": "sleep 5"}
WITH_DOCKER: Final = (
    "make up",
    "$COMPOSE run --rm -T operator python -m keylake.compose project shop > shop.json",
    "$COMPOSE run --rm -T operator keylake drill revocation",
    "make renew",
    "$COMPOSE run --rm -T operator keylake drill revocation",
    "make down",
)
"""README and docs/compose.md."""


@dataclass(frozen=True, slots=True)
class Recording:
    name: str
    title: str
    events: list[tuple[float, str]]
    """Seconds since the start, and what the terminal was sent."""
    machine: str
    """How much of one there was: on a busy one everything takes longer."""

    @classmethod
    def of(cls, cast: Path) -> Recording:
        head, *lines = map(json.loads, cast.read_text(encoding="utf-8").splitlines())
        return cls(cast.stem, head["title"], [(at, text) for at, _, text in lines], head["machine"])

    def asciicast(self) -> str:
        head = {"version": 2, "width": COLUMNS, "height": ROWS, "title": self.title, "machine": self.machine}
        lines = [head, *([round(at, 3), "o", text] for at, text in self.events)]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def transcript(self) -> str:
        text = _ESCAPES.sub("", "".join(text for _, text in self.events)).replace("\r\n", "\n")
        # Of a line that was written over and over, what it said last.
        return "\n".join(line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.removesuffix("\n").split("\n"))


def commands_of_the_readme() -> Iterator[str]:
    for block in _SH.findall((ROOT / "README.md").read_text()):
        for line in block.splitlines():
            command = re.split(r"\s+#\s|^#", line)[0].strip()
            if not command or command in OMITTED:
                continue
            yield f"{command} <<< {shlex.quote(TYPED[command])}" if command in TYPED else command
            if command in AFTERWARDS:
                yield AFTERWARDS[command]


def record(
    name: str, title: str, commands: Sequence[str], bash: Sequence[str], environment: Mapping[str, str]
) -> Recording:
    """`bash`: how one is started. Raises CalledProcessError."""
    script = "\n".join(["set -e", *(f"printf '$ %s\\n' {shlex.quote(each)}\n{each}" for each in commands)])
    # script(1) gives it a terminal; what comes is read as it comes.
    inside = f"stty cols {COLUMNS} rows {ROWS}; exec {shlex.join([*bash, '-c', script])}"
    process = subprocess.Popen(
        ["script", "--quiet", "--return", "--command", inside, "/dev/null"],
        cwd=ROOT,
        stdin=subprocess.PIPE,  # left open: script would pass its end on, and the terminal show it
        stdout=subprocess.PIPE,
        env=environment,
    )
    events, busy, begun, rest = [], os.getloadavg()[0], time.monotonic(), b""
    assert process.stdin is not None
    assert process.stdout is not None
    while data := os.read(process.stdout.fileno(), 1 << 16):
        whole, newline, rest = (rest + data).rpartition(b"\n")
        text = (whole + newline).decode(errors="replace")
        for secret in _SECRETS:
            text = secret.sub("…", text)
        sys.stdout.write(text)
        sys.stdout.flush()
        if text:
            events.append((time.monotonic() - begun, text))
    process.stdout.close()
    process.stdin.close()
    if process.wait() != 0:
        raise subprocess.CalledProcessError(process.returncode, title, rest.decode(errors="replace"), "")
    machine = f"{os.cpu_count()} processors, load {busy:.1f} before it and {os.getloadavg()[0]:.1f} at its end"
    return Recording(name, title, events, machine)


def with_python(base: str) -> Recording:
    settings = {name: os.environ[name] for name in PIP_SETTINGS if name in os.environ}
    settings |= {"PIP_CERT": str(CERTIFICATES), "LANG": "C.UTF-8", "TERM": "xterm-256color"}
    given = [part for name, value in settings.items() for part in ("--env", f"{name}={value}")]
    place = ["--network", "host", "--shm-size", "3g"]
    container = docker("run", "--detach", "--init", *place, base, "sleep", "inf").strip()
    try:
        docker("exec", container, "useradd", "--create-home", "--shell", "/bin/bash", _USER)
        home = f"/home/{_USER}/keylake"
        docker("exec", "--user", _USER, container, "mkdir", home)
        with subprocess.Popen(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE) as archive:
            unpack = ["docker", "exec", "--interactive", "--user", _USER, container, "tar", "-x", "-C", home]
            subprocess.run(unpack, stdin=archive.stdout, check=True)
        terminal = ["docker", "exec", "--interactive", "--tty", "--user", _USER, "--workdir", home, *given]
        commands = list(commands_of_the_readme())
        return record("python", "With Python, and nothing else", commands, [*terminal, container, "bash"], os.environ)
    finally:
        docker("rm", "--force", container)


def with_docker(stack: Stack) -> Recording:
    compose = " ".join(compose_command())
    commands = [each.replace("$COMPOSE", compose) for each in WITH_DOCKER]
    try:
        return record("docker", "With Docker, and nothing else", commands, ["bash"], stack.environment)
    finally:
        stack.compose("down", "--volumes", "--remove-orphans", check=False)
        (ROOT / "shop.json").unlink(missing_ok=True)


def page() -> str:
    """docs/first-run.md, of all casts that there are."""
    left_out = "; ".join(f"`{command}` ({why})" for command, why in OMITTED.items())
    parts = [
        "# First runs, recorded\n",
        "By `make first-run`: the commands of the README, as they are typed on a bare machine; the first that fails",
        "ends it. Once in a container of Debian with `python3`, `python3-venv` and `make`, as a user who is not root;",
        f"once with a Docker engine. Left out: {left_out}.",
        "The casts are asciinema's. Keys, passwords and tokens are masked, and what they opened is gone.\n",
    ]
    for path in sorted(CASTS.glob("*.cast"), reverse=True):
        each = Recording.of(path)
        minutes = each.events[-1][0] / 60
        parts.append(
            f"## {each.title}\n\n[{path.name}](first-run/{path.name}), {minutes:.1f} minutes ({each.machine})\n"
        )
        parts.append(f"```text\n{each.transcript()}\n```\n")
    return "\n".join(parts)


def main() -> int:
    wanted = sys.argv[1:] or ["python", "docker"]
    recordings = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the engine ends, too
    try:
        require("debootstrap", "script", "git", "make")
        with running_engine():
            stack = Stack()
            make_base(stack.base, "make")
            if "python" in wanted:
                recordings.append(with_python(stack.base))
            if "docker" in wanted:
                make_s3(stack.s3, stack.base)
                recordings.append(with_docker(stack))
    except (MissingError, RuntimeError, subprocess.CalledProcessError) as error:
        told = f"\n{error.stdout}" if isinstance(error, subprocess.CalledProcessError) else ""
        print(f"first-run: {error}{told}"[-4000:], file=sys.stderr)
        return 1
    finally:
        CASTS.mkdir(exist_ok=True)
        for each in recordings:
            (CASTS / f"{each.name}.cast").write_text(each.asciicast(), encoding="utf-8")
        (ROOT / "docs" / "first-run.md").write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
