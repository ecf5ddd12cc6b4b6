"""The threat model names tests that are there, and revocation.md says what the code computes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from keymanager.bound import FAN_OUT_S, BoundSettings
from tests.simulation.mutants import MUTANTS
from tests.simulation.witness import Bound

ROOT = Path(__file__).parents[2]
_NUMBERED = re.compile(r"^- \*\*G(\d+)\.\*\*", re.M)
_BRACKETS = re.compile(r"\[(`tests/[^\]]*)\]")


def guarantees() -> dict[int, str]:
    text = (ROOT / "docs/threat-model.md").read_text()
    text = text.partition("## Guarantees")[2].partition("\n## ")[0]
    starts = [*_NUMBERED.finditer(text)]
    ends = [*(match.start() for match in starts[1:]), len(text)]
    return {int(match[1]): text[match.start() : end] for match, end in zip(starts, ends, strict=True)}


def test_guarantees_are_numbered_without_gaps() -> None:
    assert list(guarantees()) == list(range(1, len(guarantees()) + 1))
    assert len(guarantees()) >= 16


@pytest.mark.parametrize("number", guarantees())
def test_a_guarantee_names_tests_that_are_there(number: int) -> None:
    named = [name for part in _BRACKETS.findall(guarantees()[number]) for name in re.findall(r"`(tests/[^`]+)`", part)]
    assert named
    for name in named:
        path, _, function = name.partition("::")
        defined = {
            node.name
            for node in ast.walk(ast.parse((ROOT / path).read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        tests = {each for each in defined if each.startswith("test_")}
        # A state machine is a test without a function of that name.
        assert function in tests if function else tests or "settings" in (ROOT / path).read_text()


def test_attackers_are_kept_from_things_by_guarantees_that_exist() -> None:
    text = (ROOT / "docs/threat-model.md").read_text()
    table = text.partition("## Attackers")[2].partition("\n## ")[0]
    last = [row.rsplit("|", 2)[1] for row in table.splitlines() if row.startswith("| A")]
    assert len(last) >= 10
    for cell in last:
        named = [int(number) for number in re.findall(r"G(\d+)", cell)]
        assert named
        assert set(named) <= set(guarantees())


def test_the_bound_that_is_written_down_is_the_computed_one() -> None:
    text = (ROOT / "docs/revocation.md").read_text()

    def bound(deadline_s: float) -> Bound:
        return Bound.of(BoundSettings(1.0, 0.0, deadline_s, 5.0, 1.5, session_s=None))

    assert f"`ttl` = 5 s, `f` = {FAN_OUT_S:g} s |" in text

    late = bound(4.0)
    assert f"| {late.reachable_s:.2f} s |" in text
    assert f"| {late.partitioned_s:.2f} s |" in text
    quick = bound(0.05)
    assert f"gives {quick.reachable_s:.1f} s and {quick.partitioned_s:.2f} s" in text
    assert f"{ {13: 'Thirteen'}[len(MUTANTS)] } mutants" in text
