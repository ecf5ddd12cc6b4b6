"""Where a branch, or a look at the past, begins: from what somebody asked for to an LSN.

"Now" means: with everything that was acknowledged to a client before the question came. Safekeepers hold that, and the
pageserver may be a little behind them; so it is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final

from compute.proposer import Membership, majority
from compute.repository import TimelineRow
from compute.storage_clients import PageserverClient, SafekeeperClient
from shared.api.pageserver import LsnKind, TimelineInfo
from shared.api.safekeeper import TimelineStatus
from shared.errors import InvalidInputError, KeylakeError, UnavailableError
from shared.lsn import Lsn
from shared.point_in_time import PointInTime
from shared.wal.page import boundary_of

_CATCH_UP_TIMEOUT_S: Final = 30.0
_POLL_S: Final = 0.05
_SETTLED_POLLS: Final = 20
"""So many equal answers: what is missing is half a record that nobody will finish."""


def acknowledged(flush_lsns: Sequence[Lsn], nodes: int) -> Lsn:
    """Nothing that was acknowledged to a client lies above this, and some of it may lie at it.

    `flush_lsns`: of those of the `nodes` safekeepers that answer. When all do, what a majority holds; else any of them
    may be the only one that answers and holds the last record. Raises UnavailableError without a majority.
    """
    if len(flush_lsns) < majority(nodes):
        raise UnavailableError("no quorum of safekeepers says how far the log goes")
    ordered = sorted(flush_lsns, reverse=True)
    return ordered[majority(nodes) - 1] if len(ordered) == nodes else ordered[0]


def ends_of_members(answers: Iterable[tuple[str, TimelineStatus | None]], membership: Membership) -> list[Lsn]:
    """Where the logs end of those that answer, by node. Another disk than the member's is no answer: the end of one
    that was replaced would count for a member that may hold more."""
    return [
        status.flush_lsn
        for node_id, status in answers
        if status is not None and status.seat == membership.seat(node_id)
    ]


class Points:
    def __init__(self, pageserver: PageserverClient, safekeepers: Sequence[SafekeeperClient]) -> None:
        self._pageserver = pageserver
        self._safekeepers = safekeepers

    async def resolve(self, timeline: TimelineRow, at: PointInTime | None) -> Lsn:
        """An LSN at which a log may begin. Without `at`, now.

        Raises InvalidInputError for one that the timeline has not, or not any more; UnavailableError.
        """
        info = await self._caught_up(timeline)
        if at is None:
            return info.last_record_lsn
        if at.lsn is not None:
            lsn = Lsn(boundary_of(at.lsn.value))
            if lsn > info.last_record_lsn:
                raise InvalidInputError(f"LSN {lsn} is above {info.last_record_lsn}, the end of the log")
            return lsn
        assert at.timestamp is not None  # noqa: S101 - one of them is set
        return await self._at_time(timeline, at.timestamp)

    async def _at_time(self, timeline: TimelineRow, time: datetime) -> Lsn:
        if time > datetime.now(UTC):
            raise InvalidInputError("that time has not come yet")
        found = await self._pageserver.lsn_by_timestamp(timeline.project_id, timeline.timeline_id, time)
        match found.kind:
            case LsnKind.PRESENT | LsnKind.FUTURE:
                return Lsn(boundary_of(found.lsn.value))
            case LsnKind.PAST:
                raise InvalidInputError("that time is before the first commit that is kept on this branch")
            case LsnKind.NODATA:
                raise InvalidInputError("nothing has been committed on this branch yet")

    async def _caught_up(self, timeline: TimelineRow) -> TimelineInfo:
        """Once the pageserver has ingested everything that was acknowledged before this call."""
        project_id, timeline_id = timeline.project_id, timeline.timeline_id

        async def ask(safekeeper: SafekeeperClient) -> tuple[str, TimelineStatus | None]:
            try:
                return safekeeper.node_id, await safekeeper.status(project_id, timeline_id)
            except KeylakeError:
                return safekeeper.node_id, None

        answers = await asyncio.gather(*map(ask, self._safekeepers))
        target = acknowledged(ends_of_members(answers, timeline.membership), len(self._safekeepers))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _CATCH_UP_TIMEOUT_S
        before, settled = None, 0
        while True:
            info = await self._pageserver.timeline(project_id, timeline_id)
            # A log may end with half a record: then the bytes are there, and no more records come of them.
            seen = info.last_record_lsn, info.commit_lsn
            settled = settled + 1 if seen == before and info.commit_lsn >= target else 0
            before = seen
            if info.last_record_lsn >= target or settled >= _SETTLED_POLLS:
                return info
            if loop.time() > deadline:
                raise UnavailableError("the pageserver has not ingested yet what is committed")
            await asyncio.sleep(_POLL_S)
