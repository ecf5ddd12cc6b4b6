"""Plots as SVG text, for light and dark backgrounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

_WIDTH: Final = 720
_HEIGHT: Final = 320
_LEFT: Final = 48
_BOTTOM: Final = 40
_STYLE: Final = (
    "text{font:13px system-ui,sans-serif;fill:#333}.axis{stroke:#999}.grid{stroke:#999;opacity:.25}"
    "polyline{fill:none;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
)
_COLOURS: Final = ("#2a7f62", "#3b6fb6", "#b3541e", "#8a4fa3", "#777")


@dataclass(frozen=True, slots=True)
class Curve:
    label: str
    values: Sequence[float]


def ecdf(title: str, curves: Sequence[Curve]) -> str:
    """Share of runs (y) that took at most so many seconds (x): one curve each."""
    curves = [curve for curve in curves if curve.values]
    end = max([max(curve.values) for curve in curves] + [0.001]) * 1.05
    width, height = _WIDTH - _LEFT - 16, _HEIGHT - _BOTTOM - 40

    def x(value: float) -> float:
        return _LEFT + width * value / end

    def y(share: float) -> float:
        return 40 + height * (1 - share)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT + 20 * len(curves)}" role="img" '
        f'aria-label="{escape(title)}"><style>{_STYLE}</style><text x="{_LEFT}" y="20">{escape(title)}</text>'
    ]
    for share in (0.0, 0.5, 0.99, 1.0):
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y(share):.1f}" x2="{_LEFT + width}" y2="{y(share):.1f}"/>')
        if share != 1.0:
            parts.append(f'<text x="{_LEFT - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{share:g}</text>')
    for tick in range(6):
        at = end * tick / 5
        parts.append(f'<text x="{x(at):.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{at:.2f} s</text>')
    for number, curve in enumerate(curves):
        colour, ordered = _COLOURS[number % len(_COLOURS)], sorted(curve.values)
        points, share = [f"{x(0):.1f},{y(0):.1f}"], 0.0
        for rank, value in enumerate(ordered, 1):
            points.append(f"{x(value):.1f},{y(share):.1f}")
            share = rank / len(ordered)
            points.append(f"{x(value):.1f},{y(share):.1f}")
        points.append(f"{x(end):.1f},{y(1):.1f}")
        parts.append(f'<polyline points="{" ".join(points)}" style="stroke:{colour}"/>')
        at = _HEIGHT + 20 * number
        parts.append(
            f'<line x1="{_LEFT}" y1="{at - 4}" x2="{_LEFT + 20}" y2="{at - 4}" stroke="{colour}" stroke-width="3"/>'
        )
        parts.append(f'<text x="{_LEFT + 28}" y="{at}">{escape(curve.label)}, n = {len(ordered)}</text>')
    return "".join(parts) + "</svg>\n"
