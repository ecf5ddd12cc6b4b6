"""All timelines of a pageserver: they are loaded one after the other when it starts, and deleted whoever dies when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from keylake.object_files import inspect_index
from pageserver import attached as attached_module
from pageserver.attached import Environment
from pageserver.redo.build import RedoBinaries
from pageserver.removal import Mark, Removal
from pageserver.tenants import Tenants
from shared.auth import Service
from shared.errors import ConflictError, CorruptedError, IntegrityError, NotFoundError, UnavailableError
from shared.ids import ProjectId, TimelineId
from shared.keyspace import CHECKPOINT_KEY, CONTROL_FILE_KEY
from shared.postgres_installation import PostgresInstallation
from shared.storage.base import ObjectStore
from shared.storage.memory import MemoryObjectStore
from shared.tls import client_context
from tests.fixtures.dying_store import DyingObjectStore
from tests.fixtures.pageserver import IMAGE, QUICK, REL, Engine, engine, page_of
from tests.fixtures.realm import Realm
from tests.fixtures.waiting import wait_until
from tests.unit.test_ingest_state import new_tip
from tests.unit.test_pageserver_branches import Pair, pair


class SlowStore(MemoryObjectStore):
    """Objects below `prefix` do not come until `open` is set."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix
        self.open = asyncio.Event()

    async def get(self, key: str) -> bytes:
        if key.startswith(self._prefix):
            await self.open.wait()
        return await super().get(key)


def environment(process: Engine, store: ObjectStore, realm: Realm) -> Environment:
    nowhere = Path("/nonexistent")  # nobody redoes anything here
    binaries = RedoBinaries(PostgresInstallation(nowhere, "17"), nowhere, nowhere)
    issuer, context = realm.issuers[Service.PAGESERVER], client_context(realm.ca_certificate)
    return Environment(store, process.files, process.keys, process.pool, binaries, QUICK, [], issuer, context)


def initdb_state() -> list[tuple[bytes, bytes]]:
    tip = new_tip()
    return [(CHECKPOINT_KEY, tip.checkpoint.serialize()), (CONTROL_FILE_KEY, tip.control.serialize())]


@pytest.fixture(scope="module")
def realm(tmp_path_factory: pytest.TempPathFactory) -> Realm:
    return Realm.create(tmp_path_factory.mktemp("pki"))


def folder(project_id: ProjectId, timeline_id: TimelineId) -> str:
    return f"projects/{project_id}/timelines/{timeline_id}/"


async def copied(store: ObjectStore, to: ObjectStore) -> None:
    async for info in store.list():
        await to.put(info.key, await store.get(info.key))


async def keys_below(store: ObjectStore, prefix: str) -> list[str]:
    return [info.key async for info in store.list(prefix)]


async def test_a_branch_is_waited_for_while_its_ancestor_is_loaded(tmp_path: Path, realm: Realm) -> None:
    async with pair(tmp_path, own_project=False, state=initdb_state()) as two:
        await two.parent.checkpoint()
        store = SlowStore(folder(two.project_id, two.parent.timeline_id))
        await copied(two.process.store, store)
        async with Tenants(environment(two.process, store, realm)) as tenants:
            ids = two.project_id, two.child.timeline_id
            with pytest.raises(UnavailableError, match="being loaded"):
                await tenants.loaded(*ids, timeout_s=0.3)
            waiting = asyncio.create_task(tenants.loaded(*ids, timeout_s=30))
            with pytest.raises(NotFoundError):
                await tenants.loaded(two.project_id, TimelineId.new(), timeout_s=30)
            with pytest.raises(NotFoundError):
                await tenants.loaded(ProjectId.new(), two.child.timeline_id, timeout_s=30)
            assert not waiting.done()
            store.open.set()
            assert (await waiting).timeline_id == two.child.timeline_id


async def test_keys_that_went_and_came_back_are_a_reason_to_try_again_at_once(
    tmp_path: Path, realm: Realm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached_module, "FAULT_PAUSE_S", 3600.0)
    async with stored_pair(tmp_path / "first") as (two, store):
        ids = two.parent.project_id, two.parent.timeline_id
        keys = two.process.keys.for_another_node()
        async with engine(tmp_path / "another", store=store, keys=keys, like=two.process) as process:
            await keys.release(ids[0])  # the engine's own lease: here the timeline is told of a loss
            async with Tenants(environment(process, store, realm)) as tenants:
                await tenants.loaded(*ids, timeout_s=20)
                attached = tenants.attached(*ids)
                newest = max(await keys_below(store, folder(*ids) + "index/"))
                genuine = await store.get(newest)

                async def load_again(envelope: bytes) -> None:
                    await keys.revoke(ids[0])
                    await store.put(newest, envelope)
                    await keys.restore(ids[0])

                await load_again(genuine[:-1])
                await wait_until(lambda: attached.fault)
                await load_again(genuine)
                await wait_until(lambda: not attached.fault)
                assert attached.timeline.is_live


# --- deleting ---


@asynccontextmanager
async def pageserver(two: Pair, store: ObjectStore, realm: Realm, disk: Path) -> AsyncIterator[Tenants]:
    """One that has loaded all that there is, and finished what another one had begun."""
    async with (
        engine(disk, store=store, like=two.process) as process,
        Tenants(environment(process, store, realm)) as tenants,
    ):
        await tenants.loaded(two.parent.project_id, two.parent.timeline_id, timeout_s=20)
        project = tenants._projects[two.project_id]
        await wait_until(lambda: not project.ending and not any(project.is_loading(each) for each in project.tasks))
        yield tenants


@asynccontextmanager
async def stored_pair(root: Path) -> AsyncIterator[tuple[Pair, MemoryObjectStore]]:
    """What lies in the object store of a timeline and a branch with layers and several versions of its index."""
    async with pair(root, own_project=False, state=initdb_state()) as two:
        for fill in (1, 2):
            lsn = two.child.last_record_lsn + 0x40
            await two.child.put_batch([(REL.block_key(0), lsn, IMAGE, page_of(fill))], lsn, lsn - 0x40)
            await two.child.checkpoint()
        store = MemoryObjectStore()
        await copied(two.process.store, store)
        yield two, store


@pytest.mark.parametrize("dies_after", [False, True])
async def test_a_timeline_is_there_or_deleted_whenever_its_pageserver_dies(
    tmp_path: Path, realm: Realm, *, dies_after: bool
) -> None:
    """At each change of the object store. The next pageserver, on another machine, finishes what was begun."""
    async with stored_pair(tmp_path / "first") as (two, whole):
        ids, child = (two.project_id, two.child.timeline_id), folder(two.project_id, two.child.timeline_id)
        remained = 0
        for changes in range(100):
            inner = MemoryObjectStore()
            await copied(whole, inner)
            dying = DyingObjectStore(inner, 1_000_000, dies_after=dies_after)
            async with pageserver(two, dying, realm, tmp_path / f"{changes}") as tenants:
                dying._left = changes
                try:
                    await tenants.delete(*ids)
                except UnavailableError:
                    assert dying.dead
                finished = not dying.dead
            async with pageserver(two, inner, realm, tmp_path / f"{changes} another") as tenants:
                parent = tenants.timeline(two.parent.project_id, two.parent.timeline_id)
                if await keys_below(inner, child):
                    remained += 1
                    timeline = tenants.timeline(*ids)
                    assert await timeline.get_page(REL, 0, two.child.remote_consistent_lsn) == page_of(2)
                    assert list(parent.branches) == [two.child.timeline_id]
                    await tenants.delete(*ids)
                with pytest.raises(NotFoundError):
                    tenants.timeline(*ids)
                assert not await keys_below(inner, child)
                assert not parent.branches
            if finished:
                assert changes > 8
                assert remained == 1, "only before the first change"
                return
        pytest.fail("the deletion never came to its end")


async def test_a_deletion_whose_ancestor_is_not_loaded_yet_goes_on_by_itself(tmp_path: Path, realm: Realm) -> None:
    async with stored_pair(tmp_path) as (two, stored):
        parent, child = ((two.project_id, each.timeline_id) for each in (two.parent, two.child))
        store = SlowStore(folder(*parent))
        await copied(stored, store)
        # A pageserver has died behind the branch's objects.
        removal = Removal(store, *child)
        await removal.begin(Mark(parent))
        await removal.remove_objects()
        assert await removal.begun() == Mark(parent)
        async with Tenants(environment(two.process, store, realm)) as tenants:
            with pytest.raises(UnavailableError, match="its ancestor, which lists it"):
                await tenants.delete(*child)
            with pytest.raises(NotFoundError):
                tenants.timeline(*child)
            store.open.set()
            await tenants.loaded(*parent, timeout_s=20)
            await wait_until(lambda: not tenants.timeline(*parent).branches)
            await wait_until(lambda: not tenants._projects[two.project_id].ending)
            assert not await keys_below(store, folder(*child))
            await tenants.delete(*parent)
        assert not await keys_below(store, "")


async def test_what_is_damaged_can_be_deleted_when_nothing_is_branched_off_it(tmp_path: Path, realm: Realm) -> None:
    async with stored_pair(tmp_path) as (two, store):
        parent, child = ((two.project_id, each.timeline_id) for each in (two.parent, two.child))
        newest = max(await keys_below(store, folder(*parent) + "index/"))
        assert newest.endswith(".key")
        await store.delete(newest)
        async with Tenants(environment(two.process, store, realm)) as tenants:
            project = tenants._projects[two.project_id]
            await wait_until(lambda: isinstance(project.unloaded.get(parent[1]), IntegrityError))
            await wait_until(lambda: child[1] in project.unloaded)
            with pytest.raises(ConflictError, match="has branches"):
                await tenants.delete(*parent)
            with pytest.raises(UnavailableError, match="is not loaded"):
                await tenants.delete(*child)  # its ancestor cannot be told, and goes next
            await tenants.delete(*parent)
            await tenants.delete(*child)
            for gone in (parent, child):
                with pytest.raises(NotFoundError):
                    tenants.timeline(*gone)
        assert not await keys_below(store, "")


async def test_what_a_creation_that_died_has_left_is_in_nobodys_way(tmp_path: Path, realm: Realm) -> None:
    """An envelope and no index: no timeline."""
    async with stored_pair(tmp_path) as (two, store):
        ids = two.project_id, TimelineId.new()
        await store.put(folder(*ids) + "index/0000000000000001.key", b"half")
        async with pageserver(two, store, realm, tmp_path / "another") as tenants:
            with pytest.raises(NotFoundError):
                tenants.timeline(*ids)
            tenants._projects[two.project_id].check_loaded(ids[1])
            await tenants.delete(*ids)
        assert not await keys_below(store, folder(*ids))


def test_a_mark_is_one_or_refused(tmp_path: Path) -> None:
    for mark in (Mark(None), Mark((ProjectId.new(), TimelineId.new()))):
        assert Mark.parse(mark.serialize()) == mark
        file = tmp_path / "000000000000000a"
        file.write_bytes(mark.serialize())
        assert inspect_index(file) == {"slot": 10, "void": False, "deleted": True}
    whole = Mark((ProjectId.new(), TimelineId.new())).serialize()
    for bad in (b"", b"KLG", b"KLIV", whole[:-1], whole + b"0", whole[:4] + b"\xff" * 39, whole[:24]):
        with pytest.raises(CorruptedError):
            Mark.parse(bad)
