"""Keys of a timeline are renewed while it works, and a crash at any step loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pageserver.key_project import ProjectKeys
from pageserver.key_upkeep import TimelineKeys
from pageserver.timeline import Timeline
from shared.api.keymanager import KeyUse
from shared.crypto.envelope import Envelope
from shared.errors import IntegrityError, KeylakeError, UnavailableError
from shared.ids import ProjectId, TimelineId
from shared.key_upkeep import KeyUpkeep, Pace, UpkeepTuning, merged
from shared.lease import Lease
from shared.storage.base import ObjectNotFoundError, ObjectStore
from shared.storage.faulty import FaultyObjectStore, Moment, Operation
from shared.storage.memory import MemoryObjectStore
from tests.fixtures.dying_store import DyingObjectStore
from tests.fixtures.pageserver import INITDB_LSN, REL, WAL, Engine, engine, page_of, record
from tests.fixtures.waiting import wait_until
from tests.unit.test_pageserver_timeline import put

FAST = UpkeepTuning(interval_s=0.01, rewraps_per_s=1e9, rekeyed_bytes_per_s=1e12)
BLOCKS = 6


@dataclass
class Holder:
    """What tenants are to ProjectKeys."""

    project_id: ProjectId
    lease: Lease | None
    timelines: dict[TimelineId, Timeline]
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def timeline_keys(self) -> Mapping[TimelineId, TimelineKeys]:
        return {timeline_id: timeline.keys for timeline_id, timeline in self.timelines.items()}


def project_keys(on: Engine, *timelines: Timeline) -> ProjectKeys:
    return ProjectKeys(
        Holder(on.project_id, on.lease, {timeline.timeline_id: timeline for timeline in timelines}), on.store
    )


async def uses(on: Engine, *timelines: Timeline) -> list[KeyUse]:
    found = await project_keys(on, *timelines).census()
    return merged(use for counter in found.values() for use in counter.uses())


def versions(found: list[KeyUse]) -> set[tuple[int, int]]:
    return {(use.kek_version, use.dek_version) for use in found}


async def filled(on: Engine, layers: int = 3) -> Timeline:
    timeline = await on.create([(REL.block_key(block), page_of(block)) for block in range(BLOCKS)])
    for number in range(layers):
        for block in range(BLOCKS):
            await put(timeline, (REL.block_key(block), WAL, record(100 + number, b"x")))
        await timeline.checkpoint()
    return timeline


async def pages(timeline: Timeline) -> list[bytes]:
    lsn = timeline.last_record_lsn
    return [await timeline.get_page(REL, block, lsn) for block in range(BLOCKS)]


async def keep(keys: ProjectKeys, *, rekey: bool = False) -> None:
    lease, pace = keys.lease, Pace(FAST)
    assert lease is not None
    if rekey:
        await keys.rekey(lease.dek_floor, pace)
    await keys.rewrap(lease.kek_version, pace)


async def names(store: ObjectStore) -> list[str]:
    return [info.key async for info in store.list("")]


async def test_after_a_rewrap_the_old_kek_is_not_needed(tmp_path: Path) -> None:
    async with engine(tmp_path / "a") as one:
        timeline = await filled(one)
        want, layers = await pages(timeline), timeline.layer_count
        assert versions(await uses(one, timeline)) == {(1, 1)}
        before = [key for key in await names(one.store) if "/layers/" in key]
        one.keys.rotate(one.project_id)
        await keep(project_keys(one, timeline))
        found = await uses(one, timeline)
        # The index is sealed anew, under a DEK of its own; layers keep their bytes and their DEKs.
        assert versions(found) == {(2, 1), (2, 2)}
        assert sum(use.objects for use in found if use.dek_version == 1) == layers
        assert [key for key in await names(one.store) if "/layers/" in key] == before
        one.keys.destroy(one.project_id, 1)
        assert await pages(timeline) == want
        async with engine(tmp_path / "b", like=one) as two:
            assert await pages(await two.open()) == want


async def test_a_pass_that_finds_nothing_changes_nothing(tmp_path: Path) -> None:
    store = FaultyObjectStore(MemoryObjectStore())
    async with engine(tmp_path, store=store) as one:
        timeline = await filled(one)
        one.keys.rotate(one.project_id, rekey=True)
        keys = project_keys(one, timeline)
        await keep(keys, rekey=True)
        wraps = one.keys.rewraps
        store.calls.clear()
        await keep(keys, rekey=True)
        assert {call.operation for call in store.calls} <= {Operation.LIST, Operation.GET}
        assert one.keys.rewraps == wraps


async def test_after_a_rekey_no_byte_is_under_an_old_dek(tmp_path: Path) -> None:
    async with engine(tmp_path / "a") as one:
        timeline = await filled(one)
        want, layers = await pages(timeline), timeline.layer_count
        before = set(await names(one.store))
        orphan = f"projects/{one.project_id}/timelines/{one.timeline_id}/layers/image-0000000000001000-{'ab' * 8}"
        some = next(key for key in before if "/layers/" in key and key.endswith(".key"))
        await one.store.put(orphan, b"half")
        await one.store.put(orphan + ".key", await one.store.get(some))
        one.keys.rotate(one.project_id, rekey=True)
        await keep(project_keys(one, timeline), rekey=True)
        assert versions(await uses(one, timeline)) == {(2, 2)}
        after = set(await names(one.store))
        assert not before & after
        assert orphan not in after
        assert timeline.layer_count == layers
        one.keys.destroy(one.project_id, 1)
        assert await pages(timeline) == want
        async with engine(tmp_path / "b", like=one) as two:
            assert await pages(await two.open()) == want


async def test_a_backup_of_the_object_store_opens_until_its_kek_is_destroyed(tmp_path: Path) -> None:
    async with engine(tmp_path / "a") as one:
        timeline = await filled(one)
        then, backup = await pages(timeline), MemoryObjectStore()
        for name in await names(one.store):
            await backup.put(name, await one.store.get(name))
        await put(timeline, (REL.block_key(0), WAL, record(200, b"later")))
        await timeline.checkpoint()
        now = await pages(timeline)
        one.keys.rotate(one.project_id, rekey=True)
        await keep(project_keys(one, timeline), rekey=True)
        assert not {await backup.get(name) for name in await names(backup)} & {
            await one.store.get(name) for name in await names(one.store)
        }
        async with engine(tmp_path / "b", like=one, store=backup) as restored:
            assert await pages(await restored.open()) == then != now
        one.keys.destroy(one.project_id, 1)
        async with engine(tmp_path / "c", like=one, store=backup) as restored:
            with pytest.raises(IntegrityError):
                await restored.open()
        async with engine(tmp_path / "d", like=one) as two:
            assert await pages(await two.open()) == now


async def copy(store: ObjectStore, into: ObjectStore, keys: Iterable[str]) -> None:
    for key in keys:
        with contextlib.suppress(ObjectNotFoundError):  # gone since the listing
            await into.put(key, await store.get(key))


async def test_a_backup_that_is_taken_meanwhile_is_whole_when_a_listing_has_nothing_new(tmp_path: Path) -> None:
    async with engine(tmp_path / "a") as one:
        timeline = await filled(one)
        want = await pages(timeline)
        for number in range(8):
            backup, listed = MemoryObjectStore(), await names(one.store)
            first = len(listed) * number // 7
            await copy(one.store, backup, listed[:first])
            one.keys.rotate(one.project_id, rekey=bool(number % 2))
            await keep(project_keys(one, timeline), rekey=True)
            await copy(one.store, backup, listed[first:])
            while missing := set(await names(one.store)) - set(await names(backup)):
                await copy(one.store, backup, missing)
            async with engine(tmp_path / f"restored-{number}", like=one, store=backup) as restored:
                assert await pages(await restored.open()) == want


async def test_an_orphan_under_an_old_kek_goes_with_the_next_index(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await filled(one)
        some = next(key for key in await names(one.store) if "/layers/" in key and key.endswith(".key"))
        orphan = f"projects/{one.project_id}/timelines/{one.timeline_id}/layers/image-0000000000001000-{'cd' * 8}"
        await one.store.put(orphan + ".key", await one.store.get(some))  # its upload was cut off here
        damaged = orphan[:-4] + "eeee"
        await one.store.put(damaged + ".key", b"rubbish")
        one.keys.rotate(one.project_id)
        assert (1, 1) in versions(await uses_or_none(one, timeline))
        await keep(project_keys(one, timeline))
        assert {orphan + ".key", damaged + ".key"}.isdisjoint(await names(one.store))
        assert {use.kek_version for use in await uses(one, timeline)} == {2}


async def uses_or_none(one: Engine, timeline: Timeline) -> list[KeyUse]:
    """The damaged orphan makes a census fail: nobody can say what is under which key."""
    with pytest.raises(KeylakeError, match="envelope"):
        await uses(one, timeline)
    return [KeyUse(kek_version=1, dek_version=1, objects=1, size_bytes=0)]


async def test_an_older_wrap_that_comes_late_does_no_harm(tmp_path: Path) -> None:
    """A store with retries may deliver a duplicate of an older put behind a newer one."""
    async with engine(tmp_path / "a") as one:
        timeline = await filled(one)
        want = await pages(timeline)
        late = {key: await one.store.get(key) for key in await names(one.store) if "/layers/" in key and ".key" in key}
        one.keys.rotate(one.project_id)
        await keep(project_keys(one, timeline))
        for key, envelope in late.items():
            await one.store.put(key, envelope)
        one.keys.destroy(one.project_id, 1)
        async with engine(tmp_path / "b", like=one) as two:
            reopened = await two.open()
            assert await pages(reopened) == want
            one.keys.rotate(one.project_id)
            await keep(project_keys(two, reopened))
            assert {Envelope.parse(await one.store.get(key)).kek_version for key in late} == {3}


async def test_what_is_flushed_meanwhile_is_kept(tmp_path: Path) -> None:
    """A flush publishes indexes of its own while layers are wrapped again and replaced."""
    async with engine(tmp_path / "a") as one:
        timeline = await filled(one, layers=6)
        stop = asyncio.Event()

        async def write() -> int:
            rounds = 0
            while not stop.is_set() and rounds < 30:  # nobody compacts here, and ingest waits at 40 layers
                for block in range(BLOCKS):
                    await put(timeline, (REL.block_key(block), WAL, record(200, b"y")))
                await timeline.checkpoint()
                rounds += 1
            return rounds

        async def read() -> None:
            while not stop.is_set():
                await pages(timeline)
                await asyncio.sleep(0)  # what is cached waits for nothing

        one.keys.rotate(one.project_id, rekey=True)
        async with asyncio.TaskGroup() as group:
            writer, _ = group.create_task(write()), group.create_task(read())
            for _ in range(3):
                one.keys.rotate(one.project_id, rekey=True)
                await keep(project_keys(one, timeline), rekey=True)
            stop.set()
        await keep(project_keys(one, timeline), rekey=True)
        want = await pages(timeline)
        assert [page[0] for page in want] == [6 + writer.result()] * BLOCKS
        assert versions(await uses(one, timeline)) == {(5, 5)}
        for version in (1, 2, 3, 4):
            one.keys.destroy(one.project_id, version)
        async with engine(tmp_path / "b", like=one) as two:
            assert await pages(await two.open()) == want


async def test_readers_of_the_old_layer_finish(tmp_path: Path) -> None:
    """Its objects go when the last of them has left."""
    store = FaultyObjectStore(MemoryObjectStore())
    async with engine(tmp_path, store=store, cache_capacity_bytes=0) as one:
        await filled(one)
        timeline = await one.open()  # nothing in memory
        one.keys.rotate(one.project_id, rekey=True)
        hold = store.hold(Operation.GET_RANGE)
        reading = asyncio.create_task(pages(timeline))
        await hold.reached.wait()
        before = {key for key in await names(store) if "/layers/" in key}
        keeping = asyncio.create_task(keep(project_keys(one, timeline), rekey=True))
        live = timeline._live
        assert live is not None
        await wait_until(lambda: bool(live._leaving))  # the new layer is listed; the old one waits for its reader
        assert before <= set(await names(store))
        hold.release.set()
        assert len(await reading) == BLOCKS
        await keeping
        assert not before & set(await names(store))


@contextlib.asynccontextmanager
async def killed(one: Engine, root: Path, changes: int, *, dies_after: bool) -> AsyncIterator[tuple[Engine, bool]]:
    """Upkeep by a process that is killed after `changes` changes of the store. Yields whether it got to its end."""
    store = DyingObjectStore(one.store, changes, dies_after=dies_after)
    async with engine(root, like=one, store=store) as dying:
        try:
            timeline = await dying.open()
            await keep(project_keys(dying, timeline), rekey=True)
        except UnavailableError:
            assert store.dead
        yield dying, not store.dead


@pytest.mark.parametrize("dies_after", [False, True])
@pytest.mark.parametrize("rekey", [False, True])
async def test_a_kill_between_any_two_steps_loses_nothing(tmp_path: Path, rekey: bool, dies_after: bool) -> None:
    changes, finished = 0, False
    while not finished:
        async with engine(tmp_path / f"{changes}") as one:
            want = await pages(await filled(one))
            one.keys.rotate(one.project_id, rekey=rekey)
            async with killed(one, tmp_path / f"{changes}-dying", changes, dies_after=dies_after) as (_, finished):
                pass
            # Whatever it left: a count that finds nothing under the old KEK must be right.
            async with engine(tmp_path / f"{changes}-next", like=one) as two:
                timeline = await two.open()
                assert await pages(timeline) == want
                done = all(use.kek_version > 1 for use in await uses(two, timeline))
                assert done or not finished
                if not done:
                    await keep(project_keys(two, timeline), rekey=True)
                    found = versions(await uses(two, timeline))
                    assert {kek for kek, _ in found} == {2}
                    if rekey:
                        assert found == {(2, 2)}
                one.keys.destroy(one.project_id, 1)
            async with engine(tmp_path / f"{changes}-last", like=one) as three:
                last = await three.open()
                assert await pages(last) == want
                await put(last, (REL.block_key(0), WAL, record(300, b"z")))
                await last.checkpoint()
        changes += 1
    assert changes > 8, "the pass was cut off at each of its steps"


@pytest.mark.parametrize("moment", list(Moment))
async def test_a_hiccup_at_any_step_and_a_kill_soon_after_lose_nothing(tmp_path: Path, moment: Moment) -> None:
    """A step that failed, or whose answer was lost, is taken back up by the same process; which then dies, too."""
    hiccup, reached = 0, True
    while reached:
        for changes in (hiccup + 2, hiccup + 5, 1000):
            root = tmp_path / f"{hiccup}-{changes}"
            async with engine(root / "a") as one:
                want = await pages(await filled(one, layers=2))
                one.keys.rotate(one.project_id, rekey=True)
                dying = DyingObjectStore(one.store, changes, dies_after=False)
                flaky = FaultyObjectStore(dying)
                async with engine(root / "b", like=one, store=flaky) as two:
                    timeline = await two.open()
                    flaky.fail_nth_change(hiccup, moment)
                    for _ in range(3):
                        with contextlib.suppress(UnavailableError):
                            await keep(project_keys(two, timeline), rekey=True)
                            break
                    reached = flaky.quiet
                async with engine(root / "c", like=one) as three:
                    timeline = await three.open()
                    assert await pages(timeline) == want
                    await keep(project_keys(three, timeline), rekey=True)
                    assert versions(await uses(three, timeline)) == {(2, 2)}
                    one.keys.destroy(one.project_id, 1)
                async with engine(root / "d", like=one) as four:
                    assert await pages(await four.open()) == want
        hiccup += 1
    assert hiccup > 8


async def test_a_count_waits_for_keys_that_are_on_their_way(tmp_path: Path) -> None:
    """A flush that was given its DEK before the rotation is in the count, however slow the store is."""
    store = FaultyObjectStore(MemoryObjectStore())
    async with engine(tmp_path, store=store) as one:
        timeline = await filled(one)
        await put(timeline, (REL.block_key(0), WAL, record(300, b"z")))
        hold = store.hold(Operation.PUT_IF_ABSENT)
        flushing = asyncio.create_task(timeline.checkpoint())
        await hold.reached.wait()
        one.keys.rotate(one.project_id)
        counting = asyncio.create_task(uses(one, timeline))
        await asyncio.sleep(0.05)
        assert not counting.done()
        hold.release.set()
        await flushing
        total = sum(use.objects for use in await counting if use.kek_version == 1)
        assert total >= timeline.layer_count


async def test_no_count_while_a_timeline_is_not_loaded(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await filled(one)
        with pytest.raises(UnavailableError, match="not loaded here"):
            await uses(one)
        await one.keys.revoke(one.project_id)
        await timeline.drop_plaintext()
        with pytest.raises(UnavailableError):
            await uses(one, timeline)


async def test_upkeep_runs_by_itself_and_reports(tmp_path: Path) -> None:
    async with engine(tmp_path) as one:
        timeline = await filled(one)
        project = project_keys(one, timeline)
        upkeep = KeyUpkeep(one.keys, FAST, lambda: [project])
        running = asyncio.create_task(upkeep.run())
        try:
            await wait_until(lambda: one.project_id in one.keys.reports)
            assert versions(one.keys.reports[one.project_id][1]) == {(1, 1)}
            one.keys.rotate(one.project_id)
            await wait_until(lambda: one.keys.reports[one.project_id][0] == 2)
            assert {use.kek_version for use in one.keys.reports[one.project_id][1]} == {2}
            one.keys.rotate(one.project_id, rekey=True)
            await wait_until(lambda: versions(one.keys.reports[one.project_id][1]) == {(3, 3)})
            # Revoked, and rotated meanwhile: nothing happens until the keys are back.
            await one.keys.revoke(one.project_id)
            one.keys.rotate(one.project_id)
            await one.keys.restore(one.project_id)
            await timeline.reopen()
            await wait_until(lambda: one.keys.reports[one.project_id][0] == 4)
            status = await upkeep.status("pageserver-1", project)
            assert (status.kek_version, status.dek_floor, status.fault) == (4, 3, "")
            assert timeline.last_record_lsn > INITDB_LSN
        finally:
            running.cancel()
            await asyncio.wait([running])
