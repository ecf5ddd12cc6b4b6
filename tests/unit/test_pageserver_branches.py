"""Whose keys a branch needs, and what is left of it when they are gone: in one project, and across two."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from pageserver.index_part import Ancestor, IndexPart
from pageserver.timeline import Timeline, TimelineExistsError
from shared.api.keymanager import KeyState
from shared.errors import (
    ConflictError,
    CorruptedError,
    InvalidInputError,
    KeyAccessError,
    KeylakeError,
    LeaseExpiredError,
    NotFoundError,
    RevokedError,
    ShreddedError,
    UnavailableError,
)
from shared.ids import ProjectId, TimelineId
from shared.lease import KeyLoss, Lease
from shared.wal.page import boundary_of
from tests.fixtures.pageserver import IMAGE, INITDB_LSN, REL, WAL, Engine, engine, page_of, record

BLOCK = REL.block_key(0)


@dataclass
class Pair:
    """A timeline with one value above its initdb, and a branch of it, in the same project or in one of its own."""

    process: Engine
    project_id: ProjectId
    """The branch's."""
    lease: Lease
    parent: Timeline
    child: Timeline

    def find(self, project_id: ProjectId, timeline_id: TimelineId) -> Timeline:
        if (project_id, timeline_id) != (self.parent.project_id, self.parent.timeline_id):
            raise NotFoundError("no such timeline")
        return self.parent

    async def reopen_child(self) -> Timeline:
        process = self.process
        return await Timeline.open(
            self.project_id, self.child.timeline_id, process.services, self.lease, process.config, find=self.find
        )


@asynccontextmanager
async def pair(root: Path, *, own_project: bool, state: Sequence[tuple[bytes, bytes]] = ()) -> AsyncIterator[Pair]:
    """`state`: what the parent's initdb has besides."""
    async with engine(root) as process:
        parent = await process.create([(BLOCK, page_of(1)), *state])
        lsn = parent.last_record_lsn + 0x40
        await parent.put_batch([(BLOCK, lsn, WAL, record(100, b"parent"))], lsn, parent.last_record_lsn)
        project_id, lease = process.project_id, process.lease
        children: list[Timeline] = []

        async def on_loss(loss: KeyLoss) -> dict[str, float]:
            return await children[0].drop_plaintext()

        if own_project:
            project_id = ProjectId.new()
            lease = await process.keys.acquire(project_id, on_loss)
        child = await Timeline.branch(
            project_id,
            TimelineId.new(),
            process.services,
            lease,
            process.config,
            parent,
            lsn,
            lambda *_: parent,
        )
        children.append(child)
        yield Pair(process, project_id, lease, parent, child)
        await child.drop_plaintext()


async def error_of(timeline: Timeline) -> type[KeylakeError] | None:
    try:
        await timeline.get_page(REL, 0, timeline.last_record_lsn)
    except KeylakeError as error:
        return type(error)
    return None


async def test_a_branch_with_keys_of_its_own_needs_both(tmp_path: Path) -> None:
    async with pair(tmp_path, own_project=True) as two:
        keys, parent, child = two.process.keys, two.parent, two.child
        page = await child.get_page(REL, 0, child.last_record_lsn)
        assert page == await parent.get_page(REL, 0, child.last_record_lsn)
        lsn = child.last_record_lsn + 0x40
        await child.put_batch([(BLOCK, lsn, WAL, record(200, b"child"))], lsn, child.last_record_lsn)
        await child.checkpoint()
        for layer, _ in (await two.reopen_child()).require_live().index.layers:
            assert layer.lsn_start > INITDB_LSN

        await keys.revoke(two.project_id)
        assert await error_of(child) is RevokedError
        assert await error_of(parent) is None
        await keys.restore(two.project_id)
        await child.reopen()
        assert await error_of(child) is None

        await keys.revoke(parent.project_id)
        assert await error_of(parent) is RevokedError
        assert await error_of(child) is RevokedError, "its own lease is live, but half of its pages is the parent's"
        assert not child.is_live
        with pytest.raises(RevokedError):
            await child.reopen()
        await keys.restore(parent.project_id)
        assert not child.ancestor_is_usable
        with pytest.raises(UnavailableError):
            await child.reopen()
        await parent.reopen()
        assert child.ancestor_is_usable
        await child.reopen()
        assert (await child.get_page(REL, 0, lsn))[200:205] == b"child"

        # The parent's keys are destroyed: nothing of the branch can be read any more, whatever its own key says.
        await keys.shred(parent.project_id)
        assert await error_of(child) is ShreddedError
        with pytest.raises(ShreddedError):
            await two.reopen_child()


async def test_the_ancestors_lease_is_checked_although_nobody_has_told_of_its_end(tmp_path: Path) -> None:
    """A process that was paused: the clock knows, the handlers do not."""
    async with pair(tmp_path, own_project=True) as two:
        lsn = two.child.last_record_lsn + 0x40
        await two.child.put_batch([(BLOCK, lsn, IMAGE, page_of(9))], lsn, two.child.last_record_lsn)
        assert await error_of(two.child) is None
        two.parent.lease.revoked(KeyState.REVOKED, "somebody will hear of it")
        assert two.parent.is_live, "nobody has dropped anything"
        with pytest.raises(KeyAccessError):
            await two.child.get_page(REL, 0, lsn)


async def test_losing_the_parents_plaintext_ends_reads_of_the_branch_under_way(tmp_path: Path) -> None:
    async with pair(tmp_path, own_project=False) as two:
        redo = two.process.redo
        started, go_on = asyncio.Event(), asyncio.Event()
        apply = redo.apply

        async def slow(*arguments: object) -> bytes:
            started.set()
            await go_on.wait()
            return await apply(*arguments)  # type: ignore[arg-type]

        redo.apply = slow  # type: ignore[method-assign, assignment]
        reading = asyncio.create_task(two.child.get_page(REL, 0, two.child.last_record_lsn))
        await started.wait()
        ended = asyncio.create_task(two.child.ended())
        dropping = asyncio.create_task(two.parent.drop_plaintext())
        await ended
        go_on.set()
        with pytest.raises(LeaseExpiredError):
            await reading
        await dropping
        redo.apply = apply  # type: ignore[method-assign]


async def test_where_a_branch_may_begin(tmp_path: Path) -> None:
    async with pair(tmp_path, own_project=False) as two:
        process, parent = two.process, two.parent

        async def branch(lsn: int, of: Timeline = parent, timeline_id: TimelineId | None = None) -> Timeline:
            return await Timeline.branch(
                process.project_id,
                timeline_id or TimelineId.new(),
                process.services,
                process.lease,
                process.config,
                of,
                lsn,
                lambda *_: of,
            )

        with pytest.raises(UnavailableError, match="not ingested"):
            await branch(parent.last_record_lsn + 8)
        for below in (8, INITDB_LSN - 8):
            with pytest.raises(InvalidInputError):
                await branch(below)
        with pytest.raises(InvalidInputError, match="the oldest one of this branch"):
            await branch(two.child.last_record_lsn - 8, two.child)
        assert (await branch(INITDB_LSN + 1)).last_record_lsn == INITDB_LSN + 8
        with pytest.raises(TimelineExistsError):
            await branch(parent.last_record_lsn, timeline_id=two.child.timeline_id)
        # It was noted, and then the pageserver died: it can be finished where it was begun, and nowhere else.
        noted = TimelineId.new()
        await parent.add_branch(noted, parent.last_record_lsn)
        with pytest.raises(ConflictError):
            await branch(INITDB_LSN, timeline_id=noted)
        await branch(parent.last_record_lsn, timeline_id=noted)
        assert parent.branches[noted] == parent.last_record_lsn
        await parent.remove_branch(noted)
        await parent.remove_branch(noted)
        assert noted not in parent.branches


def test_lsns_are_rounded_to_where_a_log_can_begin() -> None:
    page, segment = 0x2000, 0x1000000
    assert [boundary_of(page + n) for n in (0, 1, 8, 17, 24, 25, 8192 - 7)] == [
        page, page, page, page + 24, page + 24, page + 32, page + 8192,
    ]  # fmt: skip
    assert [boundary_of(segment + n) for n in (0, 24, 33, 40)] == [segment, segment, segment + 40, segment + 40]


@pytest.mark.parametrize("lsn", [INITDB_LSN + 0x48, INITDB_LSN + 0x1000])
def test_an_index_that_contradicts_its_branch_point_is_refused(lsn: int) -> None:
    project_id, timeline_id = ProjectId.new(), TimelineId.new()
    end = INITDB_LSN + 0x40
    index = IndexPart(project_id, timeline_id, 77, INITDB_LSN, end, INITDB_LSN, ())
    good = Ancestor(project_id, TimelineId.new(), end)
    for ancestor in (good, None):
        for branches in ({}, {TimelineId.new(): INITDB_LSN}):
            whole = IndexPart(project_id, timeline_id, 77, INITDB_LSN, end, INITDB_LSN, (), ancestor, branches)
            assert IndexPart.parse(whole.serialize()) == whole
    assert b"ancestor" not in index.serialize()
    for wrong in (Ancestor(project_id, TimelineId.new(), lsn), Ancestor(project_id, timeline_id, end)):
        with pytest.raises(CorruptedError):
            IndexPart.parse(IndexPart(project_id, timeline_id, 77, INITDB_LSN, end, INITDB_LSN, (), wrong).serialize())
