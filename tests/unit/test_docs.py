"""The documentation says what the code does: reference pages, command lines, links, diagrams."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import typer

from keylake.cli.app import app
from keylake.reference import PAGES
from keylake.reference.cli import examples_of, leaves
from keylake.roles_table import http_operations
from keylake.site import diagrams
from keylake.site.links import ROOT_PAGES, rewrite, source_of

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / name for name in ROOT_PAGES), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
SHELL = ("sh", "console", "bash", "shell")


@pytest.mark.parametrize("name", PAGES)
def test_reference_pages_are_current(name: str) -> None:
    assert (ROOT / "docs/reference" / name).read_text() == PAGES[name](), "make docs-reference"


def test_the_reference_has_every_command_and_every_route() -> None:
    cli = PAGES["cli.md"]()
    assert len(leaves()) > 60
    for path, command in leaves():
        assert f"## keylake {' '.join(path)}\n" in cli
        assert examples_of(command)
    http = PAGES["http.md"]()
    for operations in http_operations().values():
        for each in operations:
            assert f"### `{each.method} {each.path}`\n" in http


def command_lines(text: str) -> Iterator[list[str]]:
    """Arguments of every `keylake` in lines of a shell."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        arguments: list[str] | None = None
        for token in lexer:
            if set(token) <= set("();<>|&"):
                if arguments is not None:
                    yield arguments
                arguments = None
            elif token == "keylake" and arguments is None:
                arguments = []
            elif arguments is not None:
                arguments.append(token)
        if arguments is not None:
            yield arguments


def parse(arguments: list[str]) -> None:
    """As the command line would, and no further; files that it names are there."""
    command: Any = _tree()
    if not arguments or arguments[0] == "…":
        return
    while hasattr(command, "commands"):
        if arguments and arguments[0].startswith("--"):
            command.make_context("keylake", arguments, resilient_parsing=True)
            return
        assert arguments, "a group without a command"
        assert arguments[0] in command.commands, f"no such command: {arguments[0]}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    if "--help" in arguments:
        return
    command.make_context("keylake", arguments)


@functools.cache
def _tree() -> Any:
    return typer.main.get_command(app)


def documented() -> list[str]:
    found = {
        " ".join(shlex.quote(each) for each in arguments)
        for document in DOCUMENTS
        for language, text in FENCE.findall(document.read_text())
        if language in SHELL
        for arguments in command_lines("\n".join(_commands(language, text)))
    }
    return sorted(found)


def _commands(language: str, text: str) -> list[str]:
    lines = text.splitlines()
    return [line for line in lines if line.startswith("$ ")] if language == "console" else lines


@pytest.mark.parametrize("line", documented())
def test_a_documented_command_line_is_one(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(line)
    for name in arguments[2:]:  # a file that it reads
        if not name.startswith(("-", "/")) and len(name) < 100:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
    parse(arguments)


@pytest.mark.parametrize("line", ["key-config frobnicate", "project create", "status --nope", "up --proxy-port x"])
def test_a_wrong_command_line_is_found(line: str) -> None:
    with pytest.raises((AssertionError, typer.TyperException)):
        parse(shlex.split(line))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """Within a checkout, without MkDocs; `make docs` looks at anchors, too."""
    name = str(document.relative_to(ROOT))
    page = ROOT_PAGES.get(name) or name.removeprefix("docs/")
    if name == "README.md":
        page = "../README.md"
    rewrite(document.read_text(), page, ROOT)


def test_links_of_a_checkout_become_those_of_the_site(tmp_path: Path) -> None:
    for name in ("ARCHITECTURE.md", "docs/errors.md", "docs/adr/0001-x.md", "shared/tls.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert source_of("architecture.md") == "ARCHITECTURE.md"
    changed = {
        ("[a](docs/errors.md#x)", "architecture.md"): "[a](errors.md#x)",
        ("[a](../../ARCHITECTURE.md)", "adr/0001-x.md"): "[a](../architecture.md)",
        ("[a](../README.md) [b](errors.md)", "lifecycle.md"): "[a](index.md) [b](errors.md)",
        ("see [`tls`](../shared/tls.py)", "errors.md"): "see `tls`",
        ("`[a](nowhere.md)`", "errors.md"): "`[a](nowhere.md)`",
        ("[a](https://example.com/x) [b](#here)", "errors.md"): "[a](https://example.com/x) [b](#here)",
    }
    for (text, page), expected in changed.items():
        assert rewrite(text, page, tmp_path) == expected
    with pytest.raises(ValueError, match=r"nowhere\.md"):
        rewrite("[a](nowhere.md)", "errors.md", tmp_path)


def fences(language: str) -> list[str]:
    return [text for path in DOCUMENTS for kind, text in FENCE.findall(path.read_text()) if kind == language]


def test_every_diagram_can_be_drawn() -> None:
    sources = fences("mermaid")
    assert len(sources) >= 6
    assert {source.split()[0] for source in sources} == {"sequenceDiagram", "stateDiagram-v2", "flowchart"}
    for source in sources:
        drawn = diagrams.svg(source)
        assert drawn.startswith("<svg ")
        arrows = len(re.findall(r"->>|--x|-\.->|-->(?! \[)", source)) - source.count("[*] -->")
        assert drawn.count('class="arrow" x1') == arrows, "each arrow of the text is in the picture"
        assert "http" not in drawn.replace("http://www.w3.org/2000/svg", "")


def test_a_sequence_is_drawn_in_order() -> None:
    drawn = diagrams.svg("sequenceDiagram\nparticipant A as one\nparticipant B as two\nA->>B: go\nB--xA: <lost>\n")
    assert drawn.index(">one<") < drawn.index(">two<") < drawn.index(">go<") < drawn.index(">&lt;lost&gt;<")
    assert drawn.count("stroke-dasharray") == 1


def test_a_flowchart_has_its_boxes_in_their_groups() -> None:
    drawn = diagrams.svg(
        'flowchart LR\na[one]\nsubgraph us [ours]\nb[two, x]\nc["@ three"]\nend\na -->|"go@1"| c\nc -.->|back| b\n'
    )
    for text in ("one", "ours", "two, x", "@ three", "go@1", "back"):
        assert drawn.count(f">{text}<") == 1
    assert drawn.count("stroke-dasharray") == drawn.count('class="group"') == 1
    heads = [float(x) for x in re.findall(r'class="head" x="([\d.]+)"', drawn)]
    [group] = [float(x) for x in re.findall(r'class="group" x="([\d.]+)"', drawn)]
    assert heads[0] < group < heads[1] < heads[2]


@pytest.mark.parametrize(
    "source",
    [
        "",
        "graph TD",
        "sequenceDiagram\nloop x",
        "sequenceDiagram\nparticipant A as one\nNote over A: this; that",
        "stateDiagram-v2\nwhat is this",
        "flowchart LR\na[one] --> b[two]",
        "flowchart LR\nsubgraph us [ours]\na[one]",
    ],
)
def test_what_is_not_understood_is_an_error(source: str) -> None:
    with pytest.raises(ValueError, match=r"understood|neither"):
        diagrams.svg(source)


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads((ROOT / "docs/assets/grafana-keylake.json").read_text())
    known = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs/reference/metrics.md").read_text(), re.M))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += re.findall(r"^\| `(.*keylake_.*?)` \|", (ROOT / "docs/how-to/observe.md").read_text(), re.M)
    assert len(expressions) > 20
    for expression in expressions:
        promql_parser.parse(expression)  # raises ValueError for what Prometheus would refuse, wrong types among it
    asked = {name for expression in expressions for name in re.findall(r"\b(?:keylake|customercloud)_\w+", expression)}
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in asked} <= known
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_every_page_is_in_the_navigation() -> None:
    """`make docs` asks for it, too; here without MkDocs."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = {ROOT / "docs" / found for found in re.findall(r"[\w/-]+\.md$", nav, re.M)}
    patterns = re.findall(r"[\w/-]+/\*\.md$", nav, re.M)
    listed = named | {path for pattern in patterns for path in (ROOT / "docs").glob(pattern)}
    assert {ROOT / "docs" / page for page in ROOT_PAGES.values()} <= named
    pages = set((ROOT / "docs").rglob("*.md"))
    assert pages <= listed
    assert named - pages == {ROOT / "docs" / page for page in ROOT_PAGES.values()}
