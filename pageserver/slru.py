"""Which pages a truncation of an SLRU takes (Postgres slru.c, SimpleLruTruncate), on rings of numbers that wrap.

A core: numbers in, numbers out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pageserver import native
from shared.keyspace import Slru

SLRU_PAGES_PER_SEGMENT: Final = 32
_MASK32: Final = 0xFFFFFFFF
_HALF: Final = 0x80000000


@dataclass(frozen=True, slots=True)
class _Ring:
    """Ids per page, and the first id of a page's comparison (behind the ids that mean something special)."""

    per_page: int
    first: int


# CLOGPagePrecedes, MultiXactOffsetPagePrecedes, CommitTsPagePrecedes. Members are cut by segments, not by order.
_RINGS: Final = {
    Slru.CLOG: _Ring(native.CLOG_XACTS_PER_PAGE, 4),
    Slru.MULTIXACT_OFFSETS: _Ring(native.MULTIXACT_OFFSETS_PER_PAGE, 2),
    Slru.COMMIT_TS: _Ring(native.COMMIT_TS_XACTS_PER_PAGE, 4),
}


def follows_or_equals(number: int, other: int) -> bool:
    """On a ring of 2^32 (transam.c, TransactionIdFollowsOrEquals, for normal xids)."""
    return (number - other) & _MASK32 < _HALF


def page_precedes(kind: Slru, page: int, other: int) -> bool:
    """The SLRU's PagePrecedes: every id of `page` comes before every id of `other`."""
    ring = _RINGS[kind]
    first, other_first = (number * ring.per_page + ring.first for number in (page, other))
    return not follows_or_equals(first, other_first) and not follows_or_equals(first, other_first + ring.per_page - 1)


def pages_before(kind: Slru, pages: Iterable[int], cutoff_page: int) -> list[int]:
    """Those of `pages` that lie in segments wholly before `cutoff_page` (SlruMayDeleteSegment)."""
    gone = []
    for page in pages:
        start = page - page % SLRU_PAGES_PER_SEGMENT
        last = start + SLRU_PAGES_PER_SEGMENT - 1
        if page_precedes(kind, start, cutoff_page) and page_precedes(kind, last, cutoff_page):
            gone.append(page)
    return gone


def member_pages_between(pages: Iterable[int], start_member: int, end_member: int) -> list[int]:
    """Those of `pages` in the segments from that of `start_member` up to that of `end_member`, which stays
    (multixact.c, PerformMembersTruncation)."""
    per_segment = native.MULTIXACT_MEMBERS_PER_PAGE * SLRU_PAGES_PER_SEGMENT
    segments = _MASK32 // per_segment + 1
    first = start_member // per_segment
    span = (end_member // per_segment - first) % segments
    return [page for page in pages if (page // SLRU_PAGES_PER_SEGMENT - first) % segments < span]
