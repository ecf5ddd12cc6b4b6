"""A pageserver that starts loads its timelines one after the other: who asks for one meanwhile waits."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pageserver.redo.build import RedoBinaries
from pageserver.tenants import Environment, Tenants
from shared.auth import Service
from shared.errors import NotFoundError, UnavailableError
from shared.ids import ProjectId, TimelineId
from shared.keyspace import CHECKPOINT_KEY, CONTROL_FILE_KEY
from shared.postgres_installation import PostgresInstallation
from shared.storage.base import ObjectStore
from shared.storage.memory import MemoryObjectStore
from shared.tls import client_context
from tests.fixtures.pageserver import QUICK, Engine
from tests.fixtures.realm import Realm
from tests.unit.test_ingest_state import new_tip
from tests.unit.test_pageserver_branches import pair


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


async def test_a_branch_is_waited_for_while_its_ancestor_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "pki").mkdir()
    realm = Realm.create(tmp_path / "pki")
    tip = new_tip()
    state = [(CHECKPOINT_KEY, tip.checkpoint.serialize()), (CONTROL_FILE_KEY, tip.control.serialize())]
    async with pair(tmp_path / "layers", own_project=False, state=state) as two:
        await two.parent.checkpoint()
        stored = two.process.store
        store = SlowStore(f"projects/{two.project_id}/timelines/{two.parent.timeline_id}/")
        async for info in stored.list():
            await store.put(info.key, await stored.get(info.key))
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
