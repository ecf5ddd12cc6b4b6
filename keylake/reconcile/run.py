"""Reads both sides, in the order in which nothing can be missed, and compares them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Final

from keylake.audit_file import lines_of, records_after
from keylake.client import KeylakeClient
from keylake.reconcile.core import CLOCK_SKEW, Kind, Ours, Reconciliation, Window, reconcile
from keylake.reconcile.logs import READERS
from shared.api.keymanager import AuditRecord
from shared.audit_chain import ChainVerifier, Link
from shared.audit_export import ExportVerifier
from shared.audit_kms_calls import forgotten_calls, recorded_calls
from shared.kms_log import LoggedCall, Recorded

_IN_FLIGHT: Final = timedelta(seconds=10)
"""A call that the customer's log has for so long was answered, or given up."""
_POLL_S: Final = 0.5

ReadLog = Callable[[Recorded], Awaitable[Sequence[LoggedCall]]]


@dataclass(frozen=True, slots=True)
class Report:
    """What the comparison found, and whether our side is whole."""

    result: Reconciliation
    keys: Sequence[str]
    window: Window
    records: int
    chain_problem: str | None

    @property
    def agrees(self) -> bool:
        return self.result.agrees and self.chain_problem is None


class OurSide:
    """Our audit chain, verified on the way."""

    def __init__(self) -> None:
        self.ours = Ours()
        self.last = 0
        self.chain_problem: str | None = None
        self._chain = ChainVerifier()

    async def read_on(self, client: KeylakeClient) -> None:
        """What was recorded since the last time, and the calls that the keymanager has in memory."""
        start = self.last

        async def page(after: int, limit: int) -> list[AuditRecord]:
            return await client.audit(after, limit, complete=after == start)

        async for link in records_after(page, start):
            self._chain.feed(link)
            self._add(link)
        self.chain_problem = self._chain.problem

    def read_file(self, path: Path) -> None:
        """An export. Raises InvalidInputError when it cannot be read, MalformedCallsError."""
        export = ExportVerifier()
        for line in lines_of(path):
            link = export.feed(line)
            if link is None:
                break
            self._add(link)
        self.chain_problem = export.problem

    def _add(self, link: Link) -> None:
        self.last = link.sequence
        for call in recorded_calls(link):
            self.ours.add(call)
        self.ours.forgotten += forgotten_calls(link)

    def compare(
        self,
        theirs: Sequence[LoggedCall],
        cloud: str | None,
        only: Iterable[str],
        window: Window,
        newest_record: int | None = None,
    ) -> Report:
        """`cloud`: whose log it is; None for all of them together. `only`: these keys; none: all of those clouds' that
        we recorded a call on."""
        clouds = set(READERS) if cloud is None else {cloud}
        keys = sorted(only) or sorted(key for key, provider in self.ours.providers.items() if provider in clouds)
        result = reconcile(self.ours, theirs, keys=keys, window=window, newest_record=newest_record)
        return Report(result, keys, window, self.last, self.chain_problem)


async def compare_now(
    client: KeylakeClient,
    read_log: ReadLog,
    cloud: str | None,
    only: Iterable[str] = (),
    window: Window | None = None,
    *,
    in_flight: timedelta = _IN_FLIGHT,
) -> Report:
    """Both sides as they are now. `read_log`: the customer's log; asked once.

    Ours is read before it (all of that must be in the log) and after it (all of the log must be in that, but for calls
    whose answer is on its way).
    """
    side = OurSide()
    await side.read_on(client)
    newest = side.last
    theirs = await read_log(side.ours.recorded)
    read_at, deadline_s = datetime.now(UTC), monotonic() + in_flight.total_seconds()
    window = window or Window()
    # A log that reaches back so far only says nothing about before.
    window = Window(window.since or min((call.at for call in theirs), default=None), window.until)
    while True:
        await side.read_on(client)
        report = side.compare(theirs, cloud, only, window, newest)
        late = any(f.kind is Kind.NOT_RECORDED and read_at - f.at < in_flight for f in report.result.findings)
        if not late or monotonic() > deadline_s:
            return report
        await asyncio.sleep(_POLL_S)


def reach(theirs: Sequence[LoggedCall], window: Window) -> Window:
    """Where `window` leaves it open: from the first to the last call of a log that was written down at some time."""
    times = [call.at for call in theirs]
    since = window.since or (min(times) + CLOCK_SKEW if times else None)
    until = window.until or (max(times) - CLOCK_SKEW if times else None)
    return Window(since, until)
