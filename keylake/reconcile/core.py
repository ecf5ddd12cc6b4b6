"""Compares KMS calls as we recorded them with the calls in the customer's log, and names what stands on one side only.

Calls are joined by the provider's request id. A call of ours that got no answer has none; it may or may not stand in
the customer's log, and explains at most one call there of the same operation, at about that time, that nothing else
explains. Whoever has our credentials can hide one call behind each such gap: so gaps are counted.

Administration by others (the customer disables its key) and sign-ins are no findings. Uses of the key by others are.

This file is a core: no I/O and no clock.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from keylake.reconcile.logs import SIGN_INS
from shared.audit_kms_calls import RecordedCall
from shared.kms_log import LoggedCall

CLOCK_SKEW: Final = timedelta(seconds=5)
"""Between the customer's log and ours, the time that a call takes included."""


class Kind(enum.StrEnum):
    NOT_LOGGED = "recorded by us, unknown to the cloud"
    NOT_RECORDED = "made as our principal, not recorded by us"
    TWICE = "logged twice under one request id of ours"
    DIFFERENT = "logged as another call than we recorded"
    OTHER_PRINCIPAL = "used by another principal"


@dataclass(frozen=True, slots=True)
class Finding:
    """A call that stands on one side only, or not as the same on both."""

    kind: Kind
    at: datetime
    operation: str
    key: str
    principal: str
    request_id: str
    outcome: str
    remark: str = ""


@dataclass(slots=True)
class Reconciliation:
    findings: list[Finding] = field(default_factory=list)
    joined: int = 0
    maybe: int = 0
    """Calls of ours without a sure answer that are not in the customer's log: they may not have got there."""
    explained: int = 0
    """Calls in the customer's log that only such a call of ours explains."""
    administration: int = 0
    """Calls on the same keys by others that do not use the key."""
    forgotten: int = 0
    """Calls of ours that were never recorded, because the database was down for too long: our own word for a gap."""
    by_operation: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(who, operation, outcome) in the customer's log → how many, of the keys compared."""

    @property
    def agrees(self) -> bool:
        return not self.findings


@dataclass(frozen=True, slots=True)
class Window:
    """Times [since, until]. A call outside is joined, but is no finding: the other side may not reach that far."""

    since: datetime | None = None
    until: datetime | None = None

    def has(self, at: datetime) -> bool:
        return (self.since is None or at >= self.since) and (self.until is None or at <= self.until)


class Ours:
    """What we recorded: fed record by record, then asked."""

    def __init__(self) -> None:
        self.by_id: dict[str, RecordedCall] = {}
        self.unsure: list[RecordedCall] = []
        self.forgotten = 0
        self.principals: dict[str, set[str]] = {}
        """Key → as whom we used it."""
        self.providers: dict[str, str] = {}
        """Key → whose it is."""

    def recorded(self, request_id: str) -> tuple[str, str] | None:
        call = self.by_id.get(request_id)
        return None if call is None else (call.key, call.principal)

    def add(self, call: RecordedCall) -> None:
        if call.operation in SIGN_INS:
            return
        self.principals.setdefault(call.key, set())
        if call.principal:
            self.principals[call.key].add(call.principal)
            self.providers[call.key] = call.provider
        if call.request_id is None:
            self.unsure.append(call)
            return
        known = self.by_id.get(call.request_id)
        # A call stands in the record of its use and in the ledger: the latter knows its own time and principal.
        if known is None or not known.principal:
            self.by_id[call.request_id] = call


def reconcile(
    ours: Ours,
    theirs: Iterable[LoggedCall],
    *,
    window: Window | None = None,
    newest_record: int | None = None,
    keys: Iterable[str] | None = None,
) -> Reconciliation:
    """`newest_record`: the last audit record that was there before the customer's log was read; younger ones may be
    missing in it. `keys`: only these; none: every key that we recorded a call on."""
    window = window or Window()
    result = Reconciliation(forgotten=ours.forgotten)
    wanted = set(ours.principals if keys is None else keys)
    logged: set[str] = set()
    orphans: list[LoggedCall] = []
    for call in theirs:
        mine = None if call.request_id is None else ours.by_id.get(call.request_id)
        by_us = _is_ours(call, ours.principals, wanted)
        if mine is not None and mine.key in wanted and (by_us or not call.is_key_call):
            _join(result, mine, call, logged)
        elif not call.is_key_call:
            continue
        elif by_us and call.key is None and mine is not None:
            continue  # refused before the cloud looked at the key, which we know and nobody asked about
        elif by_us:
            orphans.append(call)
        elif call.key in wanted:
            _note(result, call, "others")
            if not call.uses_key:
                result.administration += 1
            elif window.has(call.at):
                result.findings.append(_finding(Kind.OTHER_PRINCIPAL, call))
    gaps = _Gaps(call for call in ours.unsure if call.key in wanted)
    for request_id, mine in ours.by_id.items():
        if mine.key not in wanted or request_id in logged:
            continue
        if not mine.must_be_logged:
            gaps.add(mine)
        elif window.has(mine.at) and (newest_record is None or mine.sequence <= newest_record):
            result.findings.append(_missing(mine, ours.principals))
    for call in orphans:
        _note(result, call, "Keylake")
        if gaps.explain(call):
            result.explained += 1
        elif window.has(call.at):
            result.findings.append(_finding(Kind.NOT_RECORDED, call))
    result.maybe = gaps.left
    result.findings.sort(key=lambda finding: finding.at)
    return result


def _is_ours(call: LoggedCall, principals: Mapping[str, set[str]], wanted: set[str]) -> bool:
    """A record that names no key (the cloud refused before it looked) is ours when the principal is."""
    if call.key is not None:
        return call.key in wanted and call.principal in principals.get(call.key, ())
    return call.uses_key and any(call.principal in principals.get(key, ()) for key in wanted)


def _join(result: Reconciliation, mine: RecordedCall, call: LoggedCall, logged: set[str]) -> None:
    request_id = call.request_id or ""
    if not call.is_key_call:
        logged.add(request_id)
        return
    _note(result, call, "Keylake")
    if request_id in logged:
        result.findings.append(_finding(Kind.TWICE, call))
    elif (call.operation, call.key or mine.key) != (mine.operation, mine.key):
        result.findings.append(_finding(Kind.DIFFERENT, call, f"we recorded {mine.operation} on {mine.key}"))
    else:
        result.joined += 1
    logged.add(request_id)


def _note(result: Reconciliation, call: LoggedCall, who: str) -> None:
    result.by_operation[who, call.operation, call.outcome] += 1


def _finding(kind: Kind, call: LoggedCall, remark: str = "") -> Finding:
    return Finding(
        kind, call.at, call.operation, call.key or "", call.principal, call.request_id or "", call.outcome, remark
    )


def _missing(call: RecordedCall, principals: Mapping[str, set[str]]) -> Finding:
    principal = call.principal or ", ".join(sorted(principals.get(call.key, ())))
    return Finding(
        Kind.NOT_LOGGED,
        call.at,
        call.operation,
        call.key,
        principal,
        call.request_id or "",
        call.verdict,
        f"audit record {call.sequence}",
    )


class _Gaps:
    """Calls of ours without a sure answer, each of which explains one call at most."""

    def __init__(self, calls: Iterator[RecordedCall]) -> None:
        self._calls: dict[tuple[str, str], list[RecordedCall]] = {}
        self.left = 0
        for call in calls:
            self.add(call)

    def add(self, call: RecordedCall) -> None:
        self._calls.setdefault((call.key, call.operation), []).append(call)
        self.left += 1

    def explain(self, logged: LoggedCall) -> bool:
        candidates = self._calls.get((logged.key or "", logged.operation), [])
        near = [call for call in candidates if abs(call.at - logged.at) <= CLOCK_SKEW]
        if not near:
            return False
        candidates.remove(min(near, key=lambda call: abs(call.at - logged.at)))
        self.left -= 1
        return True
