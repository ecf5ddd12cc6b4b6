"""A receipt as an HTML page: what happened when, instance by instance, and what was verified. A core: text in and out.

One file without scripts and without anything from elsewhere, so that it can be kept and sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final, assert_never

from shared.api.shredding import deleted_kinds
from shared.receipt import (
    ErasureReceipt,
    Receipt,
    ReceiptKek,
    ReceiptKept,
    ReceiptNode,
    RestoreReceipt,
    RevocationReceipt,
    ShredReceipt,
    SignedReceipt,
)

_WIDTH: Final = 720
_ROW: Final = 26
_LEFT: Final = 150
_STYLE: Final = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem }
code { overflow-wrap: anywhere } dt { font-weight: 600 } dd { margin: 0 0 .5rem }
svg { width: 100%; height: auto } svg text { fill: currentColor; font: 13px system-ui, sans-serif }
.axis { stroke: currentColor; opacity: .35 } .acknowledged { fill: #2a7f62 } .fenced { fill: #b3541e }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .2rem .6rem .2rem 0 }
"""


def page(signed: SignedReceipt) -> str:
    """The whole document."""
    receipt = signed.receipt
    title = headline(receipt)
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>",
        f"<p>{escape(receipt.reason)}. Detected {receipt.detected_at.isoformat()}.</p>",
        *_of_kind(receipt),
        _facts(receipt),
        _kept(receipt.kept),
        _calls(receipt),
        _list("Verified", receipt.verified),
        _list("Not verified", receipt.not_verified),
        "<p>This page is a rendering: <code>keylake receipt verify</code> says whether the receipt is genuine.</p>",
    ]
    return "\n".join(parts) + "\n"


def headline(receipt: Receipt) -> str:
    """In one line."""
    match receipt:
        case RevocationReceipt() | ShredReceipt():
            return f"{receipt.project_name}: {receipt.state}, sealed after {receipt.sealed_after_s:.3f} s"
        case RestoreReceipt():
            return f"{receipt.project_name}: {receipt.state} again after {receipt.restored_after_s:.3f} s"
        case ErasureReceipt():
            return f"{receipt.project_name}: {receipt.state}, {len(receipt.preconditions)} preconditions hold"
        case _:
            assert_never(receipt)


def _of_kind(receipt: Receipt) -> list[str]:
    match receipt:
        case RevocationReceipt():
            return [_sealing(receipt)]
        case RestoreReceipt():
            bars = [_Bar(g.node_id, g.after_s, "acknowledged", "lease granted again") for g in receipt.instances]
            label = f"{len(bars)} instances have leases again"
            return [_timeline(bars, receipt.restored_after_s, label)]
        case ShredReceipt():
            return [_sealing(receipt), _nodes(receipt.nodes), _list("What is left", receipt.left)]
        case ErasureReceipt():
            return [_looks(receipt), _preconditions(receipt), _destroyed(receipt), _nodes(receipt.nodes)]
        case _:
            assert_never(receipt)


@dataclass(frozen=True, slots=True)
class _Bar:
    name: str
    after_s: float
    look: str
    """A class of the style sheet."""
    what: str
    hint: str = ""


def _sealing(receipt: RevocationReceipt | ShredReceipt) -> str:
    bars = []
    for each in receipt.instances:
        steps = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in sorted(each.steps_s.items()))
        bars.append(_Bar(each.node_id, each.after_s, each.outcome, each.outcome, steps))
    label = f"{len(bars)} instances were sealed within {receipt.sealed_after_s:.3f} seconds"
    return _timeline(bars, receipt.sealed_after_s, label)


def _looks(receipt: ErasureReceipt) -> str:
    """When each node looked last, and when everything was judged: from the first of these on."""
    looked = [(each, each.looked_at) for each in receipt.nodes if each.looked_at is not None]
    first = min([at for _, at in looked] + [receipt.detected_at])
    bars = []
    for each, at in looked:
        found = f"{each.left_objects} objects left" if each.left_objects else "nothing left"
        what = found if at <= receipt.detected_at else f"{found}, looked again"
        look = "fenced" if each.left_objects else "acknowledged"
        bars.append(_Bar(each.node_id, (at - first).total_seconds(), look, what, at.isoformat()))
    judged_s = (receipt.detected_at - first).total_seconds()
    bars.append(_Bar("keymanager", judged_s, "acknowledged", "everything checked", receipt.detected_at.isoformat()))
    return _timeline(bars, judged_s, f"when {len(looked)} nodes looked, and when everything was checked")


def _timeline(bars: Sequence[_Bar], over_s: float, label: str) -> str:
    """One bar each, from the beginning to its end; seconds below."""
    end_s = max([over_s, *(each.after_s for each in bars), 0.001])
    scale = (_WIDTH - _LEFT - 70) / end_s
    rows = sorted(bars, key=lambda each: each.after_s)
    height = _ROW * (len(rows) + 2)
    axis_y = _ROW * len(rows) + 8
    ticks = [
        f'<text x="{_LEFT + at_s * scale:.1f}" y="{axis_y + 18}" text-anchor="middle">{at_s:.2f} s</text>'
        for at_s in (0, end_s / 2, end_s)
    ]
    drawn = "".join(_bar(number, each, scale) for number, each in enumerate(rows))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        f'{drawn}<line class="axis" x1="{_LEFT}" y1="{axis_y}" x2="{_LEFT + end_s * scale:.1f}" y2="{axis_y}"/>'
        f"{''.join(ticks)}</svg>"
    )


def _bar(number: int, bar: _Bar, scale: float) -> str:
    y, width = _ROW * number, max(1.0, bar.after_s * scale)
    return (
        f'<text x="{_LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(bar.name)}</text>'
        f'<rect class="{bar.look}" x="{_LEFT}" y="{y + 4}" width="{width:.1f}" height="{_ROW - 10}">'
        f"<title>{escape(bar.hint or bar.what)}</title></rect>"
        f'<text x="{_LEFT + width + 6:.1f}" y="{y + 16}">{bar.after_s:.3f} s, {bar.what}</text>'
    )


def _facts(receipt: Receipt) -> str:
    key = receipt.key
    facts = [
        ("Project", f"{receipt.project_id} in {receipt.workspace_id} of {receipt.account_id}"),
        ("Customer's key", f"{key.identifier} ({key.provider}), used as {key.principal}"),
        ("KEKs", "; ".join(_kek(kek) for kek in receipt.keks)),
        *_identity(receipt),
        ("Audit chain", f"from record {receipt.audit.first_sequence} to {receipt.audit.head_sequence}, whose hash is"),
        ("", receipt.audit.head_hash),
        ("Signed by", f"{receipt.kid}, {receipt.issued_at.isoformat()}"),
    ]
    return "<dl>" + "".join(f"<dt>{escape(n)}</dt><dd><code>{escape(v)}</code></dd>" for n, v in facts) + "</dl>"


def _kek(kek: ReceiptKek) -> str:
    return f"version {kek.kek_version}, " + ("destroyed" if kek.destroyed else f"under {kek.cmk_key_version}")


def _identity(receipt: Receipt) -> list[tuple[str, str]]:
    match receipt:
        case RevocationReceipt():
            return [("Revocation", receipt.revocation_id)]
        case RestoreReceipt():
            return [
                ("Restore", f"{receipt.restoration_id}, the end of {receipt.revocation_id or 'no known revocation'}")
            ]
        case ShredReceipt():
            return [
                ("Shred", f"{receipt.shred_id}, fanned out as {receipt.revocation_id}"),
                ("Asked by", f"{receipt.asked_by}, {receipt.asked_at.isoformat()}"),
                ("Approved by", receipt.approved_by),
                ("Destroyed", f"{receipt.keks_destroyed} wrapped KEKs, and {receipt.staged_destroyed} staged"),
            ]
        case ErasureReceipt():
            return [("Shred", receipt.shred_id), ("Checked by", receipt.checked_by)]
        case _:
            assert_never(receipt)


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _nodes(nodes: Sequence[ReceiptNode]) -> str:
    rows = [
        (
            each.node_id,
            "not yet" if each.looked_at is None else each.looked_at.isoformat(),
            f"{each.deleted_objects}: {deleted_kinds(each.deleted)}" if each.deleted else each.deleted_objects,
            each.deleted_size_bytes,
            each.left_objects,
            "; ".join([*each.remains, *each.not_checked]),
        )
        for each in nodes
    ]
    heads = ("node", "looked", "objects deleted", "bytes", "left", "which, and where it could not look")
    return "<h2>What the nodes deleted</h2>" + _table(heads, rows)


def _kept(kept: Sequence[ReceiptKept]) -> str:
    if not kept:
        return ""
    rows = [
        (
            each.node_id,
            "not yet" if each.reported_at is None else each.reported_at.isoformat(),
            each.kek_version or "",
            each.objects,
            each.size_bytes,
        )
        for each in kept
    ]
    heads = ("node", "reported", "KEK version", "objects", "bytes, sealed")
    return "<h2>What is stored, by the nodes' last reports</h2>" + _table(heads, rows)


def _preconditions(receipt: ErasureReceipt) -> str:
    rows = [(each.name, each.outcome, "; ".join(each.evidence)) for each in receipt.preconditions]
    return "<h2>Preconditions</h2>" + _table(("precondition", "outcome", "evidence"), rows)


def _destroyed(receipt: ErasureReceipt) -> str:
    rows = [
        (
            each.identifier,
            "destroyed" if each.destroyed else "not destroyed",
            each.evidence,
            ", ".join(each.request_ids),
        )
        for each in receipt.keys
    ]
    return "<h2>The customer's keys</h2>" + _table(("key", "", "evidence", "request ids"), rows)


def _calls(receipt: Receipt) -> str:
    if not receipt.kms_calls:
        return ""
    did = "allowed" if isinstance(receipt, RestoreReceipt) else "refused"
    if any(call.verdict not in ("ok", "denied") for call in receipt.kms_calls):
        did = "did not allow"
    rows = "".join(
        f"<tr><td>{call.at.isoformat()}</td><td>{escape(call.operation)}</td><td>{escape(call.verdict)}</td><td><code>"
        f"{escape(call.request_id or 'no answer')}</code></td></tr>"
        for call in receipt.kms_calls
    )
    return (
        f"<h2>What the customer's cloud {did}</h2><p>The ids are those of the customer's own log.</p>"
        f"<table><tr><th>when</th><th>operation</th><th>verdict</th><th>request id</th></tr>{rows}</table>"
    )


def _list(heading: str, texts: list[str]) -> str:
    return f"<h2>{heading}</h2><ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"
