"""What a drill's report says, and its page."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest

from keylake.drill.page import page
from keylake.drill.report import BUCKET_S, DrillReport, Mark, Promise, Sealed, bucketed, kinds_of
from keylake.drill.shred import judgement
from shared.api.keymanager import KeyState
from shared.api.shredding import ErasureReport, Precondition
from shared.ids import ProjectId


def report(**changes: object) -> DrillReport:
    values: dict[str, object] = {
        "kind": "revocation",
        "passed": True,
        "project_id": ProjectId("prj-0123456789abcdef"),
        "project_name": "<shop>",
        "started_at": datetime(2026, 1, 2, tzinfo=UTC),
        "duration_s": 4.0,
        "load": "one client that reads",
        "promises": [Promise(what="sealed in time", limit="2.00 s", measured="1.00 s", kept=True)],
        "marks": [Mark(at_s=1.0, what="the customer disables the key")],
        "instances": [
            Sealed(
                node_id="pageserver", role="pageserver", outcome="acknowledged", after_s=0.2, steps_s={"cache": 0.1}
            ),
            Sealed(node_id="compute", role="compute", outcome="fenced", after_s=1.5, steps_s={}),
        ],
        "answers": bucketed([0.1, 0.2, 0.9], [1.3], 4.0),
        "errors": kinds_of([(1.3, "57P01", "the customer's key is revoked")]),
        "revocation_id": "rev-0123456789abcdef",
    }
    return DrillReport.model_validate(values | changes)


def test_answers_are_counted_in_steps_with_the_empty_ones() -> None:
    counted = bucketed([0.0, 0.24, 0.25, 9.0], [-1.0, 0.6], 1.0)
    assert [(each.done, each.errors) for each in counted] == [(2, 0), (1, 0), (0, 1), (0, 0), (0, 0)]
    assert [each.at_s for each in counted] == [n * BUCKET_S for n in range(5)]


def test_errors_are_told_once_per_kind() -> None:
    kinds = kinds_of([(2.0, "b", "x"), (1.0, "a", "first"), (3.0, "a", "last")])
    assert [(k.code, k.count, k.first_at_s, k.last_at_s, k.message) for k in kinds] == [
        ("a", 2, 1.0, 3.0, "first"),
        ("b", 1, 2.0, 2.0, "x"),
    ]


def test_a_report_survives_json() -> None:
    assert DrillReport.model_validate_json(report().model_dump_json()) == report()


@pytest.mark.parametrize("passed", [True, False])
def test_the_page_says_the_verdict_and_draws_what_happened(passed: bool) -> None:
    text = page(report(passed=passed))
    assert ("every promise was kept" in text) is passed
    assert ("a promise was broken" in text) is not passed
    assert "<shop>" not in text  # names come from others
    assert "&lt;shop&gt;" in text
    assert "prefers-color-scheme: dark" in text
    for foreign in ("http:", "https:", "<script", "src="):
        assert foreign not in text  # one file, and nothing from elsewhere
    HTMLParser().feed(text)
    drawings = [f"<svg{part.partition('</svg>')[0]}</svg>" for part in text.split("<svg")[1:]]
    clients, instances = (ET.fromstring(each) for each in drawings)  # noqa: S314 - our own
    assert [rect.get("class") for rect in clients.iter("rect")] == ["done", "done", "errors"]
    assert [rect.get("class") for rect in instances.iter("rect")] == ["acknowledged", "fenced"]
    widths = [float(rect.get("width", "0")) for rect in instances.iter("rect")]
    assert widths[0] < widths[1]  # time to sealed, in order


def test_a_page_without_anything_to_draw() -> None:
    text = page(report(instances=[], answers=[], errors=[], marks=[], promises=[], passed=False))
    assert "No client saw an error" in text


def erasure(backups: str, key_copies: str, state: KeyState) -> ErasureReport:
    outcomes = {
        "shredded by two people": "met",
        "no copy outside can be opened without the destroyed keys": backups,
        "no copy of the customer's key itself": key_copies,
    }
    return ErasureReport(
        project_id=ProjectId("prj-0123456789abcdef"),
        state=state,
        checked_at=datetime(2026, 1, 2, tzinfo=UTC),
        checked_by="person:bob",
        keys=[],
        preconditions=[
            Precondition.model_validate({"name": name, "outcome": outcome, "evidence": []})
            for name, outcome in outcomes.items()
        ],
    )


@pytest.mark.parametrize(
    ("said", "found", "broken"),
    [
        ({"backups", "key-copies"}, ("attested", "attested", KeyState.ERASED), 0),
        ({"backups", "key-copies"}, ("attested", "attested", KeyState.SHREDDED), 1),
        ({"backups", "key-copies"}, ("attested", "not checked", KeyState.SHREDDED), 2),
        ({"backups"}, ("attested", "not checked", KeyState.SHREDDED), 0),
        (set(), ("not checked", "not checked", KeyState.SHREDDED), 0),
        (set(), ("not checked", "not checked", KeyState.ERASED), 1),
        (set(), ("not checked", "attested", KeyState.ERASED), 2),
    ],
)
def test_the_word_erased_is_expected_only_with_everybodys_word(
    said: set[str], found: tuple[str, str, KeyState], broken: int
) -> None:
    promises = judgement(erasure(*found), said)
    assert sum(not each.kept for each in promises) == broken
    assert len(promises) == 4
