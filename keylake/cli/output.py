"""What commands print: JSON for programs, tables for people. Nothing else writes to stdout."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import BaseModel, TypeAdapter
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from keylake.cli.common import printable

_UNBOUNDED_WIDTH: Final = 1000
"""Where stdout is no terminal: a program reads it, and nothing may be folded or cut."""

_STYLES: Final = {
    "ACTIVE": "green",
    "RUNNING": "green",
    "ready": "green",
    "ok": "green",
    "acknowledged": "green",
    "Enabled": "green",
    "SUSPENDED": "yellow",
    "STARTING": "yellow",
    "STOPPING": "yellow",
    "waiting": "yellow",
    "warning": "yellow",
    "pending": "yellow",
    "fenced": "yellow",
    "allowed": "green",
    "denied": "red",
    "not allowed": "red",
    "Disabled": "red",
    "PendingDeletion": "red",
    "REVOKED": "red",
    "SHREDDED": "bold red",
    "down": "bold red",
    "missing": "bold red",
    "unreadable": "bold red",
    "wrong_key": "bold red",
}


def console() -> Console:
    """For stdout as it is now."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _UNBOUNDED_WIDTH)


def notes() -> Console:
    """For stderr: progress and remarks, which must not get into what a program reads."""
    return Console(highlight=False, stderr=True)


def to_json(value: Any) -> Any:
    """Models, dataclasses and what the standard library has → what `json` can write."""
    match value:
        case BaseModel():
            return value.model_dump(mode="json")
        case Mapping():
            return {str(key): to_json(item) for key, item in value.items()}
        case list() | tuple():
            return [to_json(item) for item in value]
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return TypeAdapter(type(value)).dump_python(value, mode="json")
        case _:
            return TypeAdapter(Any).dump_python(value, mode="json")


def emit(value: Any, as_json: bool, human: Callable[[], RenderableType]) -> None:
    """Print `value` as JSON, or what `human` makes of it. A string is printed as it is: no markup, never folded."""
    if as_json:
        sys.stdout.write(json.dumps(to_json(value), indent=2, ensure_ascii=False) + "\n")
        return
    shown = human()
    if isinstance(shown, str):
        console().print(shown, markup=False, soft_wrap=True)
    else:
        console().print(shown)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", empty: str = "none") -> Table:
    """Cells are never markup. Ids and states stay on one line; other text folds at the terminal's edge."""
    made = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold", justify="right" if column in _NUMBERS else "left")
    count = 0
    for row in rows:
        made.add_row(*(cell(value) for value in row))
        count += 1
    if not count:
        made.add_row(Text(empty, style="dim"))
    return made


_NUMBERS: Final = frozenset({"#", "seconds", "restarts", "pid", "term", "version", "wraps", "generation"})


def facts(pairs: Iterable[tuple[str, object]]) -> Table:
    """Name and value, one pair a line."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        made.add_row(name, cell(value))
    return made


def cell(value: object) -> Text:
    match value:
        case None | "":
            return Text("-", style="dim")
        case datetime():
            return Text(value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ"), no_wrap=True)
        case float():
            return Text(f"{value:.3f}", no_wrap=True)
        case _:
            text = printable(str(value))
            return Text(text, style=_STYLES.get(text, ""), no_wrap=" " not in text and len(text) <= 24)
