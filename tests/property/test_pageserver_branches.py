"""Branches of branches against a naive model: a branch is a full copy of everything at or below its LSN."""

from __future__ import annotations

import asyncio
import struct
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pageserver.index_part import Ancestor
from pageserver.point_in_time import FoundLsn, find_lsn
from pageserver.timeline import Timeline
from shared.api.pageserver import LsnKind
from shared.ids import ProjectId, TimelineId
from shared.lsn import Lsn
from shared.point_in_time import PointInTime
from shared.wal.page import boundary_of
from tests.fixtures.pageserver import IMAGE, INITDB_LSN, PAGE, REL, WAL, Engine, engine, page_of
from tests.property.test_pageserver_timeline import BLOCKS, CLOG, SIZE, TINY, Oracle, block_change, check_all, take

MAX_TIMELINES = 5
which = st.integers(0, MAX_TIMELINES - 1)
blocks = st.lists(block_change, max_size=3, unique_by=lambda change: change[0])
gap = st.sampled_from([8, 0x40, 0x1000])
put = st.tuples(st.just("put"), which, blocks, st.integers(0, 3), gap)
at = st.just(1.0) | st.floats(0, 1)
step = st.one_of(
    put,
    put,
    put,
    st.tuples(st.just("branch"), which, at),
    st.tuples(st.just("check"), which, at),
    st.tuples(st.sampled_from(["checkpoint", "reopen", "delete"]), which),
    st.just(("restart",)),
)
put_within = st.tuples(st.just("put"), which, blocks, st.integers(0, 1), gap)
"""Sizes stay: images leave out what lies behind the end of its fork, and the model does not know of ends."""
compacting_step = st.one_of(
    *(put_within,) * 3,
    st.tuples(st.just("branch"), which, at),
    st.tuples(st.sampled_from(["compact", "compact", "reopen"]), which),
    st.just(("restart",)),
)


@dataclass
class Known:
    """One timeline: what keeps it, and what it should be."""

    timeline: Timeline
    oracle: Oracle
    parent: TimelineId | None
    lsn: int


class Forest:
    """All timelines of a project, as `Tenants` keeps them."""

    def __init__(self, process: Engine) -> None:
        self.process = process
        self.known: dict[TimelineId, Known] = {}

    def find(self, project_id: ProjectId, timeline_id: TimelineId) -> Timeline:
        assert project_id == self.process.project_id
        return self.known[timeline_id].timeline

    def pick(self, number: int) -> Known:
        return list(self.known.values())[number % len(self.known)]

    async def branch(self, parent: Known, lsn: int) -> None:
        process, timeline_id = self.process, TimelineId.new()
        made = await Timeline.branch(
            process.project_id,
            timeline_id,
            process.services,
            process.lease,
            process.config,
            parent.timeline,
            lsn,
            self.find,
        )
        lsn = boundary_of(lsn)
        oracle = Oracle({key: list(values) for key, values in parent.oracle.values.items()})
        oracle.forget_after(lsn)
        self.known[timeline_id] = Known(made, oracle, parent.timeline.timeline_id, lsn)
        assert made.ancestor == Ancestor(process.project_id, parent.timeline.timeline_id, lsn)
        assert made.last_record_lsn == made.remote_consistent_lsn == lsn <= parent.timeline.remote_consistent_lsn

    async def restart(self) -> None:
        """A new process: everything is opened anew, in any order that the ancestors allow."""
        for each in self.known.values():
            durable = each.timeline.remote_consistent_lsn
            each.oracle.forget_after(durable)
            process = self.process
            each.timeline = await Timeline.open(
                process.project_id,
                each.timeline.timeline_id,
                process.services,
                process.lease,
                process.config,
                at_least_lsn=durable,
                find=self.find,
            )

    async def reopen(self, known: Known) -> None:
        """Its plaintext goes, and with it that of everything that was branched off it; nothing else."""
        affected = [each for each in self.known.values() if self.comes_from(each, known)]
        await known.timeline.drop_plaintext()
        for each in self.known.values():
            assert each.timeline.is_live == (each not in affected)
        for each in affected:
            each.oracle.forget_after(each.timeline.remote_consistent_lsn)
            await each.timeline.reopen()

    def comes_from(self, each: Known, known: Known) -> bool:
        return each is known or (each.parent is not None and self.comes_from(self.known[each.parent], known))

    async def delete(self, known: Known) -> None:
        """As `Tenants.delete`, for one without branches."""
        if known.parent is None or known.timeline.branches:
            return
        await known.timeline.close()
        del self.known[known.timeline.timeline_id]
        await self.known[known.parent].timeline.remove_branch(known.timeline.timeline_id)

    async def check(self, known: Known, lsn: int) -> None:
        await check_all(known.timeline, known.oracle, lsn)
        children = {
            each.timeline.timeline_id: each.lsn
            for each in self.known.values()
            if each.parent == known.timeline.timeline_id
        }
        assert known.timeline.branches == children


async def play(steps: list[tuple[object, ...]], root: Path) -> None:
    async with engine(root, config=TINY, cache_capacity_bytes=20_000) as process:
        forest = Forest(process)
        initdb = [(REL.block_key(block), page_of(block)) for block in range(BLOCKS)]
        initdb += [(CLOG, bytes(PAGE)), (SIZE, struct.pack(">I", BLOCKS))]
        main = Known(await process.create(initdb), Oracle(), None, INITDB_LSN)
        for key, value in initdb:
            main.oracle.put(key, INITDB_LSN, IMAGE, value)
        forest.known[main.timeline.timeline_id] = main
        await take(main.timeline, main.oracle, [(0, WAL, 1)], 1, 0x40)
        await forest.branch(main, main.timeline.last_record_lsn)

        def place(known: Known, share: float, oldest: int) -> int:
            return oldest + int((known.timeline.last_record_lsn - oldest) * share)

        for name, *arguments in steps:
            match name, arguments:
                case "put", [int(number), list(changes), int(extra), int(gap)]:
                    known = forest.pick(number)
                    await take(known.timeline, known.oracle, changes, extra, gap)
                case "branch", [int(number), float(share)]:
                    parent = forest.pick(number)
                    if len(forest.known) < MAX_TIMELINES:
                        await forest.branch(parent, place(parent, share, parent.lsn))
                case "check", [int(number), float(share)]:
                    known = forest.pick(number)
                    await forest.check(known, place(known, share, INITDB_LSN))
                case "checkpoint", [int(number)]:
                    await forest.pick(number).timeline.checkpoint()
                case "compact", [int(number)]:
                    known = forest.pick(number)
                    await known.timeline.checkpoint()
                    await known.timeline.compactor.compact(force=True)
                case "reopen", [int(number)]:
                    await forest.reopen(forest.pick(number))
                case "delete", [int(number)]:
                    await forest.delete(forest.pick(number))
                case "restart", []:
                    await forest.restart()
                case _:
                    raise AssertionError(name)
        for _ in range(2):
            for known in forest.known.values():
                await forest.check(known, known.timeline.last_record_lsn)
                await forest.check(known, known.lsn)
            await forest.restart()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(step, min_size=20, max_size=50))
def test_branches_equal_full_copies(steps: list[tuple[object, ...]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        asyncio.run(play(steps, Path(root)))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(compacting_step, min_size=15, max_size=40))
def test_branches_that_are_compacted_equal_full_copies(steps: list[tuple[object, ...]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        asyncio.run(play(steps, Path(root)))


@given(
    st.text(max_size=70)
    | st.integers(0, (1 << 64) - 1).map(lambda lsn: str(Lsn(lsn)))
    | st.datetimes(timezones=st.timezones()).map(datetime.isoformat)
    | st.datetimes().map(datetime.isoformat)
)
def test_any_text_is_a_point_in_time_or_refused(text: str) -> None:
    try:
        point = PointInTime.parse(text)
    except ValueError:
        return
    assert (point.lsn is None) != (point.timestamp is None)
    assert point.timestamp is None or point.timestamp.tzinfo is not None
    assert PointInTime.parse(str(point)) == point


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), max_size=12),
    st.integers(0, 25),
    st.integers(0, 400),
    st.integers(0, 40),
)
def test_the_lsn_of_a_time_is_the_one_a_look_at_every_commit_finds(
    commits: list[tuple[int, int]], first: int, behind: int, time: int
) -> None:
    """`commits`: (bytes / 8 since the last one, time). Times may cross in the log."""
    lsn, log = 8, []
    for gap, time_us in commits:
        lsn += gap * 8
        log.append((lsn, time_us))
    oldest, newest = first * 8, max(lsn, first * 8) + behind // 8 * 8

    async def commit_time_at(at: int) -> int | None:
        return max((time_us for lsn, time_us in log if lsn <= at), default=None)

    def expected() -> FoundLsn:
        if not any(lsn <= newest for lsn, _ in log):
            return FoundLsn(LsnKind.NODATA, oldest)
        later = [lsn for lsn, time_us in log if time_us > time]
        if not later:
            return FoundLsn(LsnKind.FUTURE, newest)
        before = [lsn for lsn, _ in log if lsn < later[0]]
        if later[0] <= oldest or not before:
            return FoundLsn(LsnKind.PAST, oldest)
        return FoundLsn(LsnKind.PRESENT, later[0] - 8)

    assert asyncio.run(find_lsn(commit_time_at, oldest, newest, time)) == expected()
