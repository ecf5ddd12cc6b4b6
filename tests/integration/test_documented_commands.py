"""Every command of the tutorial and of the README does what is written there, on one local cluster, in their order.

The tutorial comes first; what the README repeats to the letter is not run again, and both clean up at the end. Output
is compared where a document shows it: `…` stands for anything, alone in a line for any lines.

The same cluster shows what docs/how-to/observe.md says: metrics, one request id through all services, spans.
"""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from keylake.attached import Attached
from keylake.cluster import Cluster
from keylake.reference import metrics
from tests.fixtures.forked_cluster import ForkedService
from tests.fixtures.keylake_command import KeylakeCommand
from tests.fixtures.metric_rules import violations
from tests.fixtures.otlp import Collector, collecting
from tests.fixtures.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(280)]

ROOT: Final = Path(__file__).parents[2]
FENCE: Final = re.compile(r"^```(sh|console)\n(.*?)^```$", re.M | re.S)
LAST: Final = "keylake down"
REPEATED: Final = "keylake project revocations"
"""Only reads. It is asked again until it says what the document shows: until the revocation is sealed."""
TIMEOUT_S: Final = 120

ELSEWHERE: Final = {
    "make setup && . .venv/bin/activate": ".ci/run",
    "make demo": ".ci/run",
    "make test": ".ci/run",
    "make docs": ".ci/run",
    "make up": "tests/compose/__main__.py",
    "make logs": "tests/compose/checks.py",
    "make down": "tests/compose/__main__.py",
    "make compose-test": ".ci/run",
    "keylake doctor": "tests/integration/test_cli_doctor.py::test_a_machine_that_runs_these_tests_is_well",
    "keylake drill revocation --while pgbench": "tests/integration/test_cli_cluster.py::test_drills",
    "keylake drill shred": "tests/integration/test_cli_cluster.py::test_the_drill_of_a_shredding",
}
"""Commands that are run in another place, and where."""
BY_HAND: Final = {"make console-test PICTURES=docs/pictures": "it takes the pictures anew"}
PYTHON: Final = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True, slots=True)
class Step:
    command: str
    shown: tuple[str, ...] | None
    """What the document says that it prints; None where it says nothing about it."""


def steps(document: str) -> Iterator[Step]:
    for language, text in FENCE.findall((ROOT / document).read_text()):
        if language == "sh":
            for line in text.splitlines():
                if command := re.split(r"\s+#\s|^#", line)[0].strip():
                    yield Step(command, None)
        else:
            for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
                command, *shown = part.splitlines()
                yield Step(command, tuple(shown))


def fits(shown: tuple[str, ...], printed: str) -> bool:
    """How much space there is between columns does not matter."""
    lines = [r"(?:.*\n)*" if line == "…" else _line(line) for line in shown]
    given = "".join(f"{' '.join(line.split())}\n" for line in printed.splitlines())
    return re.fullmatch("".join(lines), given) is not None


def _line(shown: str) -> str:
    words = " ".join(shown.split())
    return ".*".join(re.escape(part) for part in words.split("…")) + r"\n"


class Shell:
    """A command of `keylake` alone is forked from a process that has its modules; what needs a shell gets one, and so
    do `up` and `down`, behind which processes stay and end."""

    def __init__(self, directory: Path, **environment: str) -> None:
        self._directory = directory
        self._keylake = KeylakeCommand(directory / "home", directory)
        self._more = environment
        self._environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "KEYLAKE_HOME": str(directory / "home"),
            "PYTHONUNBUFFERED": "1",
            "BROWSER": "true",
            **environment,
        }

    def run(self, command: str) -> tuple[int, str]:
        """Exit code, and what a terminal would show."""
        if not re.search(r"[;|&<>$`]|^(?!keylake )|^keylake (up|down)\b", command):
            forked = self._keylake.run(*shlex.split(command)[1:], **self._more)
            return forked.returncode, forked.stdout + forked.stderr
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self._directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        return done.returncode, done.stdout

    def run_until_interrupted(self, command: str) -> tuple[int, str]:
        """As somebody who presses Ctrl-C when it has said something."""
        with subprocess.Popen(
            command.split(),
            cwd=self._directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, first + rest


def check(shell: Shell, step: Step) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        if step.command == "keylake console":
            # Somebody may have one open: a port that is free, not the one that it has by default.
            code, printed = shell.run_until_interrupted(f"{step.command} --port 0")
            assert "http://127.0.0.1:" in printed
        else:
            code, printed = shell.run(step.command)
        assert code == 0, f"{step.command} ended with {code}: {printed}"
        if step.shown is None or fits(step.shown, printed):
            return
        again = step.command.startswith(REPEATED) and time.monotonic() < deadline
        assert again, f"{step.command} printed something else:\n{printed}"
        time.sleep(0.2)


def test_the_tutorial_and_the_readme(tmp_path: Path) -> None:
    tutorial = [step for step in steps("docs/tutorial.md") if step.command not in ELSEWHERE]
    readme = [step for step in steps("README.md") if step.command not in ELSEWHERE]
    assert len(tutorial) > 15
    assert len(readme) > 15
    taught = {step.command for step in tutorial}
    ends = [step for step in (*readme, *tutorial) if step.command.startswith(LAST)]
    with collecting() as (url, collector):
        shell = Shell(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=url)
        try:
            for step in (*tutorial, *(step for step in readme if step.command not in taught)):
                if step not in ends:
                    check(shell, step)
            check_metrics(tmp_path / "home")
            check_traces(tmp_path / "home", collector)
            for step in ends:
                check(shell, step)
        finally:
            shell.run("keylake down --purge --yes")
    assert {step.command for step in ends} == {"keylake down", "keylake down --purge --yes"}
    assert not (tmp_path / "home").exists()


def check_metrics(home: Path) -> None:
    """Names, units, help and labels of every service, and that docs/reference/metrics.md has them all."""
    scraped = asyncio.run(metrics.scrape(Attached.to(home)))
    page = (ROOT / "docs/reference/metrics.md").read_text()
    listed: dict[str, str] = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    assert listed.keys() == scraped.keys()
    for service, text in scraped.items():
        found = list(metrics.families(text))
        assert [problem for family in found for problem in violations(family)] == []
        rows = re.findall(r"^\| `(\w+)` \| (\w+) \| .*? \| (.*) \|$", listed[service], re.M)
        assert set(rows) == {(each.name, each.kind, each.help) for each in found}, "make docs-metrics"


def check_traces(home: Path, collector: Collector) -> None:
    """A connection that started a compute: one id in the logs of all who took part, one tree of spans."""
    services: dict[str, set[str]] = {}
    for log in home.glob("logs/*.log"):
        for found in re.finditer(r'"request_id": "([0-9a-f]{32})"', log.read_text()):
            services.setdefault(found[1], set()).add(log.stem)
    woken = [trace for trace, seen in services.items() if {"compute", "safekeeper-1", "safekeeper-2"} <= seen]
    assert woken

    def whole() -> bool:
        spans = {span["spanId"]: span for span in collector.spans if span["traceId"] in woken}
        roots = [span for span in spans.values() if span["name"] == "connect"]
        stages = {span["name"] for span in spans.values()}
        inner = [span for span in spans.values() if span["name"].endswith(":vote")]
        joined = all(span["parentSpanId"] in spans for span in inner)
        return bool(roots and inner and joined and {"election", "stream"} <= stages)

    asyncio.run(wait_until(whole))
    sent = json.dumps(collector.bodies)
    assert {f"keylake-{name}" for name in ("proxy", "compute", "safekeeper", "keymanager")} <= set(
        re.findall(r'"stringValue": "(keylake-\w+)"', sent)
    )
    for planted in ("shop", "my-key", "behind the picture", "arn:aws", r"(prj|ep|tl|ws)-[0-9a-f]{4}"):
        assert not re.search(planted, sent)


def test_every_make_in_a_sentence_is_run_somewhere() -> None:
    """`make …` between words: what stands in a block by itself is looked at by the test before."""
    mentioned = set(re.findall(r"`(make [^`]+)`", (ROOT / "README.md").read_text()))
    assert mentioned >= {"make up", "make logs", "make down", "make docs"}
    assert mentioned <= ELSEWHERE.keys() | BY_HAND.keys()


async def test_the_readmes_python_gets_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the letter, and what somebody would write next. The other block of Python is a test of its own, which
    test_pytest_plugin.py runs."""
    block, _ = PYTHON.findall((ROOT / "README.md").read_text())
    monkeypatch.setattr(Cluster, "service_process", ForkedService)
    block += "    assert await connection.fetchval('select 1') == 1\n    await connection.close()\n"
    scope: dict[str, object] = {}
    # As in `python -m asyncio`, which understands `async with` outside of functions.
    code = compile(block, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    await eval(code, scope)  # noqa: S307 - the README's own words


@pytest.mark.parametrize("command", ELSEWHERE)
def test_what_is_run_elsewhere_is(command: str) -> None:
    path, _, function = ELSEWHERE[command].partition("::")
    text = (ROOT / path).read_text()
    if command.startswith("make"):
        target = command.split()[1]
        runs = {
            ".ci/run": rf"^ *(at_most [0-9]+ )?make .*\b{target}\b",
            "tests/compose/__main__.py": rf'stack\.make\("{target}"',
            "tests/compose/checks.py": rf'stack\.make\("{target}"',
        }[path]
        recipe = re.search(rf"^{target}:.*\n\t@(.*)$", (ROOT / "Makefile").read_text(), re.M)
        if target == "compose-test":  # run as the target has it, beside what does not need make
            assert recipe is not None
            runs = re.escape(recipe[1].replace("$(BIN)", ".venv/bin"))
        # Every target that runs something sets up first.
        assert re.search(runs, text, re.M) or target == "setup"
        return
    [found] = [node for node in ast.walk(ast.parse(text)) if getattr(node, "name", "") == function]
    source = ast.get_source_segment(text, found) or ""
    assert all(word in source for word in command.split()[1:])


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        (("a  b",), "a   b  \n", True),
        (("…", "key …"), "x\ny\nkey arn:1\n", True),
        (("…", "key …"), "x\ny\nkey arn:1\nz\n", False),
        (("KEY: …s",), "KEY: 1.5 s\n", True),
        (("a.c",), "abc\n", False),
        ((), "", True),
        ((), "something\n", False),
        (("…",), "", True),
    ],
)
def test_what_is_shown_is_compared(shown: tuple[str, ...], printed: str, same: bool) -> None:
    assert fits(shown, printed) is same
