"""The real key client, with a real keymanager behind it, passes the contract of key sources."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from shared.api.keymanager import KeyState, RevokeRequest
from shared.ids import ProjectId
from shared.keyclient import KeyClient
from shared.lease import Lease
from tests.fixtures.key_source_contract import KeySourceContract
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from tests.fixtures.keymanager import Keymanager

pytestmark = pytest.mark.integration


@dataclass
class RealBench:
    keys: KeyClient
    manager: Keymanager
    project_id: ProjectId
    other_project_id: ProjectId
    leases: dict[ProjectId, Lease] = field(default_factory=dict)

    async def revoke(self) -> None:
        async with self.manager.client() as client:
            path = f"/v1/projects/{self.project_id}:revoke"
            await client.request("POST", path, body=RevokeRequest(reason="an incident"))
        sealed = await self.manager.wait_sealed(self.project_id)
        assert all(instance.outcome == "acknowledged" for instance in sealed.instances)

    async def restore(self) -> None:
        async with self.manager.client() as client:
            await client.request("POST", f"/v1/projects/{self.project_id}:restore")
        await self.manager.wait_state(self.project_id, KeyState.ACTIVE)
        await wait_until(lambda: all(lease.live for lease in self.keys.leases()))

    async def rotate(self) -> None:
        async with self.manager.client() as client:
            await client.request("POST", f"/v1/projects/{self.project_id}/keks:rotate")
        version = (await self.manager.project(self.project_id)).keks[-1].kek_version
        await wait_until(lambda: all(x.kek_version == version for x in self.keys.leases() if x.live))

    async def run_out(self) -> None:
        self.manager.kill()
        await wait_until(lambda: not any(lease.live for lease in self.keys.leases()))
        # The loss is handled in the next turns of the event loop; the keys are wiped when it begins.
        await wait_until(lambda: all(h.lost and not h.handling for h in self.keys._held.values()))


@pytest.fixture
async def bench(keymanager: Keymanager, cmk: str) -> AsyncIterator[RealBench]:
    _, workspace = await keymanager.bind(cmk)
    one, other = await keymanager.create_project(workspace), await keymanager.create_project(workspace)
    async with keymanager.key_client(request_timeout_s=5) as keys:
        yield RealBench(keys, keymanager, one.project_id, other.project_id)


class TestReal(KeySourceContract):
    pass
