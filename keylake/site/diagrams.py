"""Mermaid's sequence and state diagrams and flowcharts as SVG: a core, text in, text out.

Markdown has its diagrams as Mermaid's text, which code forges draw by themselves. Mermaid is 3 MB of script; the site
has none of it, works without any, and prints. The subset is what our documents use; everything else raises ValueError.
State diagrams and flowcharts are drawn in the same way as sequences: a state or a box is a column, a transition or an
edge an arrow in a row of its own, so that no two of them ever cross.

Grammar: mermaid.js.org/syntax/sequenceDiagram.html, .../stateDiagram.html and .../flowchart.html.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

_LETTER: Final = 7.0
"""Mean width of a letter in px, at the 13 px that the style sheet sets."""
_LINE: Final = 17
_WRAP: Final = 34
"""Letters of a label, and of a note over one column, in a line."""
_PADDING: Final = 12
_GAP: Final = 24

_PARTICIPANT: Final = re.compile(r"participant (\w+) as (.+)")
_NOTE: Final = re.compile(r"Note over (\w+)(?:,(\w+))?: (.+)")
_MESSAGE: Final = re.compile(r"(\w+)(->>|-->>|--x)(\w+): (.+)")
_COMPOSITE: Final = re.compile(r"state (\w+) \{")
_TRANSITION: Final = re.compile(r"(\w+|\[\*\]) --> (\w+|\[\*\])(?:: (.+))?")
_BOX: Final = re.compile(r'(\w+)\["?([^"\]]+)"?\]')
_SUBGRAPH: Final = re.compile(r'subgraph \w+ \["?([^"\]]+)"?\]')
_EDGE: Final = re.compile(r'(\w+) (-->|-\.->)\|"?([^"|]+)"?\| (\w+)')


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the picture: an arrow between two columns, or a note over them."""

    first: int
    last: int
    lines: tuple[str, ...]
    arrow: str = ""
    """Mermaid's: `->>` solid, `-->>` dashed, `--x` dashed and lost; empty for a note."""

    @property
    def width(self) -> float:
        return max((len(line) for line in self.lines), default=0) * _LETTER + 2 * _PADDING

    @property
    def height(self) -> float:
        return len(self.lines) * _LINE + (_GAP if self.arrow else _GAP + 4)


@dataclass(slots=True)
class Picture:
    columns: dict[str, str] = field(default_factory=dict)
    """Name → label, in order."""
    rows: list[Row] = field(default_factory=list)
    groups: list[tuple[str, int, int]] = field(default_factory=list)
    """Label over the columns first to last."""

    def index(self, name: str) -> int:
        return list(self.columns).index(name)


def svg(source: str) -> str:
    """The picture. Raises ValueError for what is neither kind of diagram, and for a line that is not understood."""
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    if lines[:1] == ["sequenceDiagram"] and ";" in source:
        raise ValueError("not understood: a semicolon, where Mermaid ends a line and then fails")
    match lines:
        case ["sequenceDiagram", *rest]:
            return _draw(_sequence(rest))
        case ["stateDiagram-v2", *rest]:
            return _draw(_states(rest))
        case ["flowchart LR", *rest]:
            return _draw(_flowchart(rest))
        case _:
            raise ValueError(f"neither a sequence, nor a state diagram, nor a flowchart: {lines[:1]}")


def fence(source: str, language: str, css_class: str, options: Any, md: Any, **_: Any) -> str:
    """A formatter of pymdownx.superfences."""
    return f'<div class="{css_class}">{svg(source)}</div>'


def _sequence(lines: list[str]) -> Picture:
    picture = Picture()
    for line in lines:
        if found := _PARTICIPANT.fullmatch(line):
            picture.columns[found[1]] = found[2]
        elif found := _NOTE.fullmatch(line):
            first, last = sorted((picture.index(found[1]), picture.index(found[2] or found[1])))
            picture.rows.append(Row(first, last, _wrap(found[3], _WRAP * (last - first + 1))))
        elif found := _MESSAGE.fullmatch(line):
            first, last = picture.index(found[1]), picture.index(found[3])
            picture.rows.append(Row(first, last, _wrap(found[4], _WRAP), found[2]))
        else:
            raise ValueError(f"not understood: {line}")
    return picture


def _states(lines: list[str]) -> Picture:
    """The start and the end, `[*]`, are not drawn: the first state is on the left, the last on the right."""
    picture = Picture()
    members: dict[str, list[str]] = {}
    inside = ""
    for line in lines:
        if found := _COMPOSITE.fullmatch(line):
            inside = found[1]
        elif line == "}":
            inside = ""
        elif inside:
            members.setdefault(inside, []).append(line)
        elif not _TRANSITION.fullmatch(line):
            raise ValueError(f"not understood: {line}")
    transitions = [found for line in lines if (found := _TRANSITION.fullmatch(line)) and "[*]" not in found.groups()]
    names = dict.fromkeys(name for found in transitions for name in (found[1], found[2]))
    together = {name: group for group in members.values() for name in group}
    for name in names:
        for each in together.get(name, [name]):  # members of one state stand side by side
            picture.columns.setdefault(each, each)
    picture.groups = [(label, picture.index(group[0]), picture.index(group[-1])) for label, group in members.items()]
    for found in transitions:
        first, last = picture.index(found[1]), picture.index(found[2])
        picture.rows.append(Row(first, last, _wrap(found[3] or "", _WRAP), "->>"))
    return picture


def _flowchart(lines: list[str]) -> Picture:
    """Boxes in the order in which they are declared, each before the first edge that names it."""
    picture = Picture()
    group: tuple[str, int] | None = None
    for line in lines:
        if found := _SUBGRAPH.fullmatch(line):
            group = found[1], len(picture.columns)
        elif line == "end" and group:
            picture.groups.append((*group, len(picture.columns) - 1))
            group = None
        elif found := _BOX.fullmatch(line):
            picture.columns[found[1]] = found[2]
        elif found := _EDGE.fullmatch(line):
            first, last = picture.index(found[1]), picture.index(found[4])
            picture.rows.append(Row(first, last, _wrap(found[3], _WRAP), "->>" if found[2] == "-->" else "-->>"))
        else:
            raise ValueError(f"not understood: {line}")
    if group:
        raise ValueError(f"not understood: subgraph {group[0]} without its end")
    return picture


def _wrap(text: str, letters: int) -> tuple[str, ...]:
    return tuple(part for given in re.split(r"<br/?>", text) for part in textwrap.wrap(given.strip(), letters))


def _centres(picture: Picture) -> list[float]:
    """Of the columns, as near to each other as labels and messages allow, in px."""
    half = [len(label) * _LETTER / 2 + _PADDING for label in picture.columns.values()]
    for row in picture.rows:
        if not row.arrow and row.first == row.last:
            half[row.first] = max(half[row.first], row.width / 2)
    for label, first, last in picture.groups:
        if first == last:
            half[first] = max(half[first], len(label) * _LETTER / 2 + _PADDING)
    centres = [half[0] + _PADDING]
    for column in range(1, len(half)):
        needed = centres[-1] + half[column - 1] + half[column] + _PADDING
        for row in picture.rows:
            first, last = sorted((row.first, row.last))
            if last == column and first < last:
                needed = max(needed, centres[first] + row.width)
        centres.append(needed)
    return centres


def _draw(picture: Picture) -> str:
    centres = _centres(picture)
    top = _LINE + _PADDING if picture.groups else 4.0
    heads = top + _LINE + _PADDING
    ends = heads + _GAP / 2 + sum(row.height for row in picture.rows) + _PADDING
    labels = list(picture.columns.values())
    width = centres[-1] + max(len(labels[-1]) * _LETTER / 2, *_overhang(picture)) + 2 * _PADDING
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {ends:.0f}" width="{width:.0f}" '
        f'role="img" aria-label="{html.escape("; ".join(_spoken(picture)))}">'
    ]
    for label, first, last in picture.groups:
        left, right = (centres[n] + sign * (len(labels[n]) * _LETTER / 2 + 16) for n, sign in ((first, -1), (last, 1)))
        middle, wide = (left + right) / 2, max(right - left, len(label) * _LETTER + 2 * _PADDING)
        x = f"{middle - wide / 2:.1f}"
        parts.append(f'<rect class="group" x="{x}" y="2" width="{wide:.1f}" height="{heads + 4:.1f}"/>')
        parts += _text(middle, 17, (label,), "middle")
    for centre, label in zip(centres, labels, strict=True):
        half = len(label) * _LETTER / 2 + _PADDING - 2
        parts.append(f'<line class="life" x1="{centre:.1f}" y1="{heads:.1f}" x2="{centre:.1f}" y2="{ends:.1f}"/>')
        parts.append(
            f'<rect class="head" x="{centre - half:.1f}" y="{top:.1f}" width="{2 * half:.1f}" '
            f'height="{heads - top:.1f}" rx="4"/>'
        )
        parts += _text(centre, top + _LINE + 2, (label,), "middle")
    y = heads + _GAP / 2
    for row in picture.rows:
        parts += _arrow(row, centres, y) if row.arrow else _note(row, centres, y)
        y += row.height
    return "".join([*parts, "</svg>"])


def _overhang(picture: Picture) -> Iterator[float]:
    """How far notes reach to the right of the last column's centre, in px."""
    yield 0.0
    last = len(picture.columns) - 1
    yield from (row.width / 2 for row in picture.rows if row.last == last and not row.arrow)
    yield from (row.width for row in picture.rows if row.first == row.last == last and row.arrow)


def _note(row: Row, centres: list[float], y: float) -> list[str]:
    middle = (centres[row.first] + centres[row.last]) / 2
    width = max(row.width, centres[row.last] - centres[row.first] + 2 * _GAP)
    height = len(row.lines) * _LINE + 8
    box = f'<rect class="note" x="{middle - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" rx="3"/>'
    return [box, *_text(middle, y + _LINE, row.lines, "middle")]


def _arrow(row: Row, centres: list[float], y: float) -> list[str]:
    start, end = centres[row.first], centres[row.last]
    line = y + len(row.lines) * _LINE + 4
    back = -1 if end < start else 1
    dashed = ' stroke-dasharray="5 4"' if row.arrow.startswith("--") else ""
    parts = [f'<line class="arrow" x1="{start:.1f}" y1="{line}" x2="{end - 2 * back:.1f}" y2="{line}"{dashed}/>']
    if row.arrow == "--x":
        x = end - 8 * back
        parts.append(f'<path class="arrow" d="M{x - 5:.1f} {line - 5}l10 10m0 -10l-10 10"/>')
    else:
        parts.append(f'<path class="tip" d="M{end:.1f} {line}l{-9 * back} -5v10z"/>')
    return [*parts, *_text((start + end) / 2, y + _LINE - 3, row.lines, "middle")]


def _text(x: float, y: float, lines: tuple[str, ...], anchor: str) -> list[str]:
    return [
        f'<text x="{x:.1f}" y="{y + number * _LINE:.1f}" text-anchor="{anchor}">{html.escape(line)}</text>'
        for number, line in enumerate(lines)
    ]


def _spoken(picture: Picture) -> Iterator[str]:
    """The picture for whoever cannot see it."""
    labels = list(picture.columns.values())
    for row in picture.rows:
        text = " ".join(row.lines)
        yield f"{labels[row.first]} to {labels[row.last]}: {text}" if row.arrow else f"{labels[row.first]}: {text}"
