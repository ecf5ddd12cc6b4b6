"""A drill's report as an HTML page: the verdict, the promises, and what happened when. A core: text in and out.

One file without scripts and without anything from elsewhere, so that it can be kept and sent.
"""

from __future__ import annotations

from html import escape
from typing import Final

from keylake.drill.report import DrillReport, Sealed

_WIDTH: Final = 720
_LEFT: Final = 150
_ROW: Final = 26
_CHART: Final = 150
_STYLE: Final = """
:root { color-scheme: light dark; --good: #2a7f62; --bad: #b3541e }
@media (prefers-color-scheme: dark) { :root { --good: #57b894; --bad: #e08850 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem }
code { overflow-wrap: anywhere } dt { font-weight: 600 } dd { margin: 0 0 .5rem }
svg { width: 100%; height: auto } svg text { fill: currentColor; font: 12px system-ui, sans-serif }
.axis { stroke: currentColor; opacity: .35 } .mark { stroke: currentColor; stroke-dasharray: 3 3; opacity: .6 }
.done, .acknowledged { fill: var(--good) } .errors, .fenced, .pending { fill: var(--bad) }
.kept { color: var(--good); font-weight: 600 } .broken { color: var(--bad); font-weight: 600 }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .2rem .6rem .2rem 0; vertical-align: top }
"""


def page(report: DrillReport) -> str:
    """The whole document."""
    verdict = "every promise was kept" if report.passed else "a promise was broken"
    title = f"{report.kind} drill on {report.project_name}: {verdict}"
    kind = "kept" if report.passed else "broken"
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{_STYLE}</style>",
        f'<h1>{escape(report.kind.capitalize())} drill: <span class="{kind}">{verdict}</span></h1>',
        f"<p>Project <code>{escape(report.project_name)}</code> (<code>{report.project_id}</code>), "
        f"{report.started_at.isoformat(timespec='seconds')}, {report.duration_s:.1f} s, {escape(report.load)}.</p>",
        _promises(report),
        "<h2>What clients saw</h2>",
        _clients(report),
        _marks(report),
        _errors(report),
        _instances(report),
    ]
    return "\n".join(part for part in parts if part) + "\n</html>\n"


def _promises(report: DrillReport) -> str:
    rows = "".join(
        f"<tr><td>{escape(each.what)}</td><td>{escape(each.limit)}</td><td>{escape(each.measured)}</td>"
        f'<td class="{"kept" if each.kept else "broken"}">{"kept" if each.kept else "broken"}</td></tr>'
        for each in report.promises
    )
    return f"<table><tr><th>promise</th><th>limit</th><th>measured</th><th></th></tr>{rows}</table>"


def _clients(report: DrillReport) -> str:
    """Answers upwards, errors downwards, per bucket; what happened as dashed lines, numbered as in the list below."""
    most = max([each.done for each in report.answers] + [each.errors for each in report.answers] + [1])
    scale = (_WIDTH - 20) / max(report.duration_s, 0.001)
    half, top = _CHART / 2, 18
    middle = top + half
    bars = []
    for each in report.answers:
        x, width = 10 + each.at_s * scale, max(0.6, scale * 0.25 - 0.4)
        if each.done:
            height = half * each.done / most
            bars.append(_rect("done", x, middle - height, width, height, f"{each.at_s:.2f} s: {each.done} done"))
        if each.errors:
            height = half * each.errors / most
            bars.append(_rect("errors", x, middle, width, height, f"{each.at_s:.2f} s: {each.errors} errors"))
    lines = []
    for number, mark in enumerate(report.marks, 1):
        x = 10 + mark.at_s * scale
        lines.append(f'<line class="mark" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + _CHART}"/>')
        lines.append(f'<text x="{x:.1f}" y="12" text-anchor="middle">{number}</text>')
    ticks = [
        f'<text x="{10 + at_s * scale:.1f}" y="{top + _CHART + 16}" text-anchor="middle">{at_s:.1f} s</text>'
        for at_s in (0, report.duration_s / 2, report.duration_s)
    ]
    label = f"answers and errors of clients over {report.duration_s:.1f} seconds"
    return (
        f'<svg viewBox="0 0 {_WIDTH + 20} {top + _CHART + 24}" role="img" aria-label="{escape(label)}">'
        f'{"".join(bars)}<line class="axis" x1="10" y1="{middle}" x2="{_WIDTH - 10}" y2="{middle}"/>'
        f"{''.join(lines)}{''.join(ticks)}</svg><p>Above the line: answers; below: errors; most in a quarter of a "
        f"second: {most}.</p>"
    )


def _rect(kind: str, x: float, y: float, width: float, height: float, title: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _marks(report: DrillReport) -> str:
    items = "".join(f"<li>{mark.at_s:.3f} s: {escape(mark.what)}</li>" for mark in report.marks)
    return f"<ol>{items}</ol>"


def _errors(report: DrillReport) -> str:
    if not report.errors:
        return "<p>No client saw an error.</p>"
    rows = "".join(
        f"<tr><td><code>{escape(each.code)}</code></td><td>{each.count}</td><td>{each.first_at_s:.2f} to "
        f"{each.last_at_s:.2f} s</td><td>{escape(each.message)}</td></tr>"
        for each in report.errors
    )
    return f"<table><tr><th>SQLSTATE</th><th>how often</th><th>when</th><th>message</th></tr>{rows}</table>"


def _instances(report: DrillReport) -> str:
    """Time to sealed, one bar per instance, from the detection on."""
    if not report.instances:
        return ""
    rows = sorted(report.instances, key=lambda each: each.after_s or 0.0)
    end_s = max([each.after_s or 0.0 for each in rows] + [0.001])
    scale = (_WIDTH - _LEFT - 190) / end_s
    bars = "".join(_bar(number, each, scale) for number, each in enumerate(rows))
    label = f"{len(rows)} instances, the last one sealed after {end_s:.3f} seconds"
    return (
        "<h2>Time to sealed, per instance</h2>"
        f'<svg viewBox="0 0 {_WIDTH} {_ROW * len(rows) + 6}" role="img" aria-label="{escape(label)}">{bars}</svg>'
        "<p>From the moment in which the keymanager knew. Revocation "
        f"<code>{escape(report.revocation_id or '')}</code>.</p>"
    )


def _bar(number: int, instance: Sealed, scale: float) -> str:
    y, after_s = _ROW * number, instance.after_s or 0.0
    steps = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in sorted(instance.steps_s.items()))
    return (
        f'<text x="{_LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(instance.node_id[-22:])}</text>'
        + _rect(escape(instance.outcome), _LEFT, y + 4, max(1.0, after_s * scale), _ROW - 10, steps or instance.outcome)
        + f'<text x="{_LEFT + after_s * scale + 6:.1f}" y="{y + 16}">{after_s:.3f} s, {escape(instance.outcome)}</text>'
    )
