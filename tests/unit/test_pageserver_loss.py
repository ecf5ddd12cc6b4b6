"""Keys that a pageserver loses: what leaves no more, and when it may say that nothing is left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from pageserver.attached import AttachedTimeline, Environment
from pageserver.page_service import PAGES_SCOPE, PageService
from pageserver.project import Branched, Project
from pageserver.project_redo import ProjectRedo
from pageserver.redo.build import RedoBinaries
from pageserver.timeline import Timeline
from shared.api.keymanager import KeyState
from shared.auth import Principal
from shared.errors import KeyAccessError, LeaseExpiredError, RevokedError
from shared.framed_tcp import FramedConnection
from shared.garbage import GarbageCollection
from shared.ids import ProjectId, TimelineId
from shared.lease import KeyLoss, Lease
from shared.postgres_installation import PostgresInstallation
from shared.storage.faulty import FaultyObjectStore, Operation
from shared.storage.memory import MemoryObjectStore
from shared.wire.frames import ERROR, ErrorFrame, FrameDecoder
from shared.wire.pagestream import MAX_FRAME_SIZE_BYTES, PAGES, BlocksRequest, Open
from tests.fixtures.pageserver import INITDB_LSN, QUICK, REL, Engine, engine, page_of
from tests.fixtures.sockets import LOOP_NAMES, LOOPS, rest_of, socket_pair, take_all
from tests.fixtures.waiting import wait_until
from tests.unit.test_pageserver_branches import pair

Run = Callable[[Coroutine[Any, Any, None]], None]
BLOCKS = 32
ANSWERS = 20
IMPATIENT = replace(QUICK, drain_timeout_s=0.05)
loops = pytest.mark.parametrize("run", LOOPS, ids=LOOP_NAMES)


def project_of(*timelines: Timeline) -> Project:
    """As `Tenants` has it, of timelines that nobody ingests into."""
    nowhere = Path("/nonexistent")  # nobody redoes anything here
    redo = ProjectRedo(RedoBinaries(PostgresInstallation(nowhere, "17"), nowhere, nowhere))
    project = Project(timelines[0].project_id, redo, list, GarbageCollection())
    for timeline in timelines:
        project.timelines[timeline.timeline_id] = AttachedTimeline(timeline, cast("Environment", None))
    return project


async def lose(lease: Lease, project: Project) -> dict[str, float]:
    """Up to the first await of `on_loss` it is one step with what the caller did before."""
    lease.revoked(KeyState.REVOKED, "the KMS said DisabledException")
    return await project.on_loss(KeyLoss(project.project_id, lease.state, lease.reason, "rev-1"))


# --- connections ---


@asynccontextmanager
async def served(one: Engine) -> AsyncIterator[tuple[Project, FramedConnection, Any]]:
    """A client of the page port that has opened a timeline of 32 blocks."""
    blocks = [(REL.block_key(number), page_of(number)) for number in range(BLOCKS)]
    timeline = await one.create([(REL.size_key(), BLOCKS.to_bytes(4, "big")), *blocks])

    async def find(project_id: ProjectId, timeline_id: TimelineId, timeout_s: float) -> Timeline:
        return timeline

    ours, theirs = socket_pair()
    connection = FramedConnection(*await asyncio.open_unix_connection(sock=ours), MAX_FRAME_SIZE_BYTES)
    service = PageService(find, CollectorRegistry())
    principal = Principal("compute", "compute", frozenset({PAGES_SCOPE}), one.project_id)
    serving = asyncio.create_task(service.serve(connection, principal))
    theirs.send(Open(one.project_id, one.timeline_id).pack())
    yield project_of(timeline), connection, theirs
    theirs.close()
    await asyncio.gather(serving, return_exceptions=True)  # the connection may have been lost
    await connection.close()


def ask(theirs: Any, answers: int) -> None:
    for number in range(answers):
        theirs.send(BlocksRequest(number + 1, INITDB_LSN, REL, 0, BLOCKS).pack())


@loops
def test_pages_that_wait_for_a_slow_client_stay_here(run: Run, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with engine(tmp_path) as one, served(one) as (project, connection, theirs):
            ask(theirs, ANSWERS)
            transport = connection._writer.transport
            await wait_until(transport.get_write_buffer_size)
            assert transport.get_write_buffer_size() < 2 * BLOCKS * 8192, "the others wait for their turn"
            assert take_all(theirs)  # there is room for more now
            steps = await lose(one.lease, project)
            assert await rest_of(theirs) == b""
            assert {"connections and plaintext dropped", "all plaintext gone"} < set(steps)

    run(scenario())


@loops
def test_a_client_that_has_read_everything_hears_why(run: Run, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with engine(tmp_path) as one, served(one) as (project, _, theirs):
            ask(theirs, 1)
            decoder, frames = FrameDecoder(MAX_FRAME_SIZE_BYTES), list[tuple[int, bytes]]()
            while not frames:
                frames += decoder.feed(await asyncio.get_running_loop().sock_recv(theirs, 1 << 20))
            await lose(one.lease, project)
            frames += decoder.feed(await rest_of(theirs))
            assert [kind for kind, _ in frames] == [PAGES, ERROR]
            farewell = ErrorFrame.parse(frames[1][1])
            assert (farewell.request_id, type(farewell.exception()).__name__) == (0, "RevokedError")

    run(scenario())


async def test_a_branch_of_another_project_is_cut_with_its_ancestor(tmp_path: Path) -> None:
    async with pair(tmp_path, own_project=True) as two:
        told: list[KeyAccessError] = []
        project = project_of(two.parent)
        branch = Branched(AttachedTimeline(two.child, cast("Environment", None)), project.redo)
        project._branches_elsewhere = lambda: [branch]
        with two.child.readers.reading(told.append):
            two.process.lease.revoked(KeyState.REVOKED, "the KMS said DisabledException")
            project.cut(KeyLoss(project.project_id, KeyState.REVOKED, "the KMS said DisabledException", "rev-1"))
            assert [type(error) for error in told] == [RevokedError]
            assert not two.child.is_live
        assert await lose(two.process.lease, project)


# --- acknowledged means dropped ---


async def test_a_read_that_hangs_is_thrown_out_before_anything_is_said(tmp_path: Path) -> None:
    store = FaultyObjectStore(MemoryObjectStore())
    async with (
        engine(tmp_path / "a", store=store) as one,
        engine(tmp_path / "b", like=one, store=store, config=IMPATIENT) as two,
    ):
        await one.create([(REL.block_key(0), page_of(1))])
        timeline = await two.open()
        live = timeline._live
        assert live is not None
        hold = store.hold(Operation.GET_RANGE)
        reading = asyncio.create_task(timeline.get_pages(REL, [0], INITDB_LSN))
        await hold.reached.wait()
        assert await lose(two.lease, project_of(timeline))
        assert live.idle.is_set()
        with pytest.raises(LeaseExpiredError):
            await reading


async def test_nothing_is_said_while_a_thread_has_plaintext_at_hand(tmp_path: Path) -> None:
    """It cannot be thrown out: its end is waited for, however long that takes."""
    async with engine(tmp_path, config=IMPATIENT) as one:
        timeline = await one.create()
        live = timeline._live
        assert live is not None
        begun, finish = threading.Event(), threading.Event()

        def work() -> None:
            begun.set()
            finish.wait(20)

        async def use() -> None:
            with live.in_use():
                await one.pool.run_to_end(work)

        using = asyncio.create_task(use())
        await asyncio.to_thread(begun.wait, 20)
        losing = asyncio.create_task(lose(one.lease, project_of(timeline)))
        again = asyncio.create_task(timeline.drop_plaintext())  # a second one says no more than the first
        done, _ = await asyncio.wait({losing, again, using}, timeout=5 * IMPATIENT.drain_timeout_s)
        cancelled = using.cancelling()
        finish.set()
        assert not done
        assert cancelled == 1
        assert await losing
        assert await again
        with pytest.raises(LeaseExpiredError):
            await using


async def test_who_is_cancelled_by_others_too_ends_as_cancelled(tmp_path: Path) -> None:
    async with engine(tmp_path, config=IMPATIENT) as one:
        timeline = await one.create()
        live = timeline._live
        assert live is not None

        async def use() -> None:
            with live.in_use(), live.working():
                await asyncio.Event().wait()

        alone, stopped = asyncio.create_task(use()), asyncio.create_task(use())
        await asyncio.sleep(0)
        timeline._forget()
        live._throw_out()
        stopped.cancel()
        await timeline.drop_plaintext()
        with pytest.raises(LeaseExpiredError):
            await alone
        with pytest.raises(asyncio.CancelledError):
            await stopped
        with pytest.raises(KeyAccessError), live.in_use():
            raise AssertionError("nobody comes in any more")


async def test_no_timeline_waits_for_what_another_one_has_under_way(tmp_path: Path) -> None:
    async with pair(tmp_path, own_project=False) as two:
        child, parent = two.child, two.parent
        live = child._live
        assert live is not None
        leave = asyncio.Event()

        async def use() -> None:
            with live.working():
                while not leave.is_set():
                    try:
                        await leave.wait()
                    except asyncio.CancelledError:
                        continue  # it does not let itself be thrown out

        using = asyncio.create_task(use())
        await asyncio.sleep(0)
        losing = asyncio.create_task(lose(two.lease, project_of(child, parent)))
        await asyncio.sleep(0)
        live_ones = child.is_live, parent.is_live
        leave.set()
        assert await losing
        assert live_ones == (False, False)
        await using
