"""What commands print."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest

from keylake.attached import Health, ServiceHealth
from keylake.cli.output import cell, emit, facts, table
from shared.ids import ProjectId

PROJECT = ProjectId("prj-0123456789abcdef")


def test_json_of_everything_that_commands_hold(capsys: pytest.CaptureFixture[str]) -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    service = ServiceHealth("proxy", "127.0.0.1:1", Health.READY, None, 2)
    emit({"id": PROJECT, "at": at, "services": [service], "none": None}, True, lambda: "unused")
    assert json.loads(capsys.readouterr().out) == {
        "id": "prj-0123456789abcdef",
        "at": "2026-01-02T03:04:05Z",
        "services": [{"name": "proxy", "address": "127.0.0.1:1", "health": "ready", "pid": None, "restarts": 2}],
        "none": None,
    }


def test_nothing_is_cut_or_folded_where_a_program_reads(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 400
    emit(None, False, lambda: table(("a", "b"), [(long, PROJECT)]))
    line = next(line for line in capsys.readouterr().out.splitlines() if "x" in line)
    assert long in line
    assert str(PROJECT) in line
    emit(None, False, lambda: "[red]" + long)
    assert capsys.readouterr().out == "[red]" + long + "\n"


def test_names_are_no_markup_and_no_escape_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    emit(None, False, lambda: facts([("name", "[bold]x[/bold]\x1b[2J")]))
    out = capsys.readouterr().out
    assert "[bold]x[/bold]" in out
    assert "\x1b" not in out


def test_an_empty_table_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    emit(None, False, lambda: table(("name",), []))
    assert "none" in capsys.readouterr().out


def test_cells() -> None:
    assert cell(None).plain == "-"
    assert cell(datetime(2026, 1, 1, 1, tzinfo=timezone(timedelta(hours=1)))).plain == "2026-01-01 00:00:00Z"
    assert cell(1.23456).plain == "1.235"
    assert cell("ACTIVE").style == "green"
