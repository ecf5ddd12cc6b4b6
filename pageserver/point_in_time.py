"""From a time to an LSN: where a timeline stood then.

Ingest keeps the latest time that any commit or abort has said so far, as one more value with history (COMMIT_TIME_KEY;
Neon has it beside each page of the commit log). It only rises, so the LSN of a time is found by bisection, as Neon does
(`find_lsn_for_timestamp`), with one read of that value for each step.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from pageserver.timeline import Timeline
from shared.api.pageserver import LsnKind
from shared.errors import CorruptedError, InvalidInputError
from shared.keyspace import COMMIT_TIME_KEY

POSTGRES_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_TIME_SIZE_BYTES: Final = 8
_STEP: Final = 8
"""Records end at multiples of it."""

CommitTime = Callable[[int], Awaitable[int | None]]
"""The latest commit time at or below an LSN; None when nothing was committed yet. Never falls as the LSN rises."""


class FoundLsn(NamedTuple):
    kind: LsnKind
    lsn: int
    """PRESENT: just before the end of the first commit or abort that is later than the time. FUTURE: the end of what
    there is. PAST, NODATA: where the timeline begins."""


async def find_lsn(commit_time_at: CommitTime, oldest_lsn: int, last_record_lsn: int, time_us: int) -> FoundLsn:
    """The highest LSN in [oldest_lsn, last_record_lsn] at or below which all commits are at or before `time_us`."""
    newest = await commit_time_at(last_record_lsn)
    if newest is None:
        return FoundLsn(LsnKind.NODATA, oldest_lsn)
    if newest <= time_us:
        return FoundLsn(LsnKind.FUTURE, last_record_lsn)
    oldest = await commit_time_at(oldest_lsn)
    if oldest is not None and oldest > time_us:
        return FoundLsn(LsnKind.PAST, oldest_lsn)

    async def is_later(lsn: int) -> bool:
        found = await commit_time_at(lsn)
        return found is not None and found > time_us

    following = await _first(is_later, oldest_lsn, last_record_lsn)
    if await commit_time_at(following - _STEP) is None:
        return FoundLsn(LsnKind.PAST, oldest_lsn)
    return FoundLsn(LsnKind.PRESENT, following - _STEP)


async def _first(holds: Callable[[int], Awaitable[bool]], below: int, holds_at: int) -> int:
    """The lowest LSN, a multiple of 8, at which it holds: not at `below`, at `holds_at`, and at all between once it
    did."""
    low, high = below // _STEP, -(-holds_at // _STEP)
    while high - low > 1:
        middle = (low + high) // 2
        if await holds(middle * _STEP):
            high = middle
        else:
            low = middle
    return high * _STEP


async def commit_time(timeline: Timeline, lsn: int) -> int | None:
    """Raises as `Timeline.get`."""
    value = await timeline.get(COMMIT_TIME_KEY, lsn)
    if value is not None and len(value) != _TIME_SIZE_BYTES:
        raise CorruptedError("a commit time is malformed")
    return None if value is None else int.from_bytes(value, "big")


def timestamp_us(time: datetime) -> int:
    """A TimestampTz. Raises InvalidInputError before the year 2000."""
    if time < POSTGRES_EPOCH:
        raise InvalidInputError("no database of ours is that old")
    return (time - POSTGRES_EPOCH) // _MICROSECOND


async def lsn_by_timestamp(timeline: Timeline, time: datetime) -> FoundLsn:
    """Raises as `Timeline.get`, InvalidInputError."""

    async def commit_time_at(lsn: int) -> int | None:
        return await commit_time(timeline, lsn)

    return await find_lsn(commit_time_at, timeline.oldest_lsn, timeline.last_record_lsn, timestamp_us(time))
