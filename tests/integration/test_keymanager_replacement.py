"""Another CMK under a living keymanager: from cloud to cloud, killed in the middle, raced by everything else."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shared.api.keymanager import (
    CreateKeyConfiguration,
    CreateWorkspace,
    KeyConfiguration,
    KeyState,
    KeyWork,
    KeyWorkKind,
    ObjectName,
    Project,
    ReplaceKey,
    Replacement,
    Workspace,
)
from shared.auth import Scope
from shared.cmk import CmkKey
from shared.crypto.envelope import Envelope
from shared.errors import ConflictError, InvalidInputError, NotFoundError, PermissionDeniedError, RevokedError
from shared.ids import KeyConfigurationId, ProjectId
from tests.fixtures.customercloud import new_tenant
from tests.fixtures.key_source_contract import Losses, named
from tests.fixtures.keymanager import Keymanager
from tests.fixtures.kms_clouds import CUSTOMERS, KmsClouds
from tests.fixtures.kms_customer_aws import AwsCustomer
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from tests.fixtures.customercloud import CloudProcess
    from tests.fixtures.keymanager import Trust
    from tests.fixtures.kms_customers import KmsCustomer

pytestmark = pytest.mark.integration


class Bench:
    """A keymanager with a customer in each cloud."""

    def __init__(self, manager: Keymanager, customers: dict[str, KmsCustomer]) -> None:
        self.manager = manager
        self.customers = customers

    async def configure(self, key: CmkKey, **options: Any) -> KeyConfiguration:
        body = CreateKeyConfiguration(name=f"kc-{secrets.token_hex(4)}", key=key, probe_interval_s=0.2, **options)
        async with self.manager.client() as client:
            return await client.call(KeyConfiguration, "POST", "/v1/key-configurations", body=body)

    async def workspace(self, configuration_id: KeyConfigurationId) -> Workspace:
        body = CreateWorkspace(name=f"ws-{secrets.token_hex(4)}", key_configuration_id=configuration_id)
        async with self.manager.client() as client:
            return await client.call(Workspace, "POST", "/v1/workspaces", body=body)

    async def begin(self, configuration_id: KeyConfigurationId, key: CmkKey, *, dry_run: bool = False) -> Replacement:
        async with self.manager.client() as client:
            path, params = f"/v1/key-configurations/{configuration_id}:replace", {"dry_run": dry_run}
            return await client.call(Replacement, "POST", path, params=params, body=ReplaceKey(key=key), timeout_s=30)

    async def work(self, configuration_id: KeyConfigurationId) -> list[KeyWork]:
        async with self.manager.client() as client:
            path = f"/v1/key-configurations/{configuration_id}"
            return (await client.call(KeyConfiguration, "GET", path)).work

    async def progress(self, configuration_id: KeyConfigurationId) -> Replacement | None:
        async with self.manager.client() as client:
            try:
                return await client.call(Replacement, "GET", f"/v1/key-configurations/{configuration_id}/replacement")
            except NotFoundError:
                return None

    async def abort(self, configuration_id: KeyConfigurationId) -> None:
        async with self.manager.client() as client:
            await client.request("DELETE", f"/v1/key-configurations/{configuration_id}/replacement")

    async def done(self, configuration_id: KeyConfigurationId, key: CmkKey) -> None:
        async def over() -> bool:
            return await self.progress(configuration_id) is None

        await wait_until(over, 60)
        async with self.manager.client() as client:
            now = await client.call(KeyConfiguration, "GET", f"/v1/key-configurations/{configuration_id}")
        assert now.key == key

    async def replace(self, configuration_id: KeyConfigurationId, key: CmkKey) -> None:
        await self.begin(configuration_id, key)
        await self.done(configuration_id, key)

    async def rotate_kek(self, project_id: ProjectId) -> None:
        async with self.manager.client() as client:
            await client.call(Project, "POST", f"/v1/projects/{project_id}/keks:rotate", timeout_s=30)


@pytest.fixture
async def bench(
    kms_clouds: KmsClouds, tmp_path: Path, trust: Trust, metadata_dsn: str, shared_cloud: CloudProcess
) -> AsyncIterator[Bench]:
    with ExitStack() as stack:
        customers = {name: stack.enter_context(make(kms_clouds)) for name, make in CUSTOMERS.items()}
        manager = Keymanager(tmp_path, trust, metadata_dsn, new_tenant(shared_cloud))
        stack.callback(manager.tenant.close)
        manager.options |= {"kms_deadline_s": 3.0, "kms_read_timeout_s": 2.0}
        for customer in customers.values():
            manager.options |= customer.keymanager_settings
        try:
            await manager.start()
            yield Bench(manager, customers)
            assert manager.stop() == 0
            assert manager.errors() == []
        finally:
            if manager.process is not None and manager.process.poll() is None:
                manager.kill()


async def test_around_the_clouds_while_others_work(bench: Bench) -> None:
    """Azure → Google → OpenBao → AWS. Each CMK that was left is destroyed for good at once."""
    manager, customers = bench.manager, bench.customers
    route = [name for name in ("google", "openbao", "aws") if name in customers]
    configuration = await bench.configure(customers["azure"].cmk)
    configuration_id = configuration.key_configuration_id
    workspace = await bench.workspace(configuration_id)
    project_id = (await manager.create_project(workspace)).project_id
    things: list[tuple[Any, Any, bytes]] = []
    working = True
    async with manager.key_client() as keys:
        losses = Losses()
        await keys.acquire(project_id, losses)

        async def work() -> None:
            while working:
                [(dek, envelope)] = await keys.generate(project_id, [thing := named()])
                things.append((thing, envelope, dek.seal(bytes(12), b"row", b"")))
                await keys.unwrap(project_id, [(thing, envelope)])
                await asyncio.sleep(0.01)

        async with asyncio.TaskGroup() as group:
            group.create_task(work())
            last = customers["azure"]
            for name in route:
                await bench.rotate_kek(project_id)
                await bench.replace(configuration_id, customers[name].cmk)
                await asyncio.to_thread(last.destroy)
                last = customers[name]
            await bench.rotate_kek(project_id)
            working = False
        assert not losses.seen
    assert len(things) > 20
    # Of the first keymanager, nothing is left in memory; what is stored opens with the newest CMK alone.
    manager.kill()
    await manager.start()
    async with manager.key_client() as keys:
        await keys.acquire(project_id, Losses())
        for thing, envelope, sealed in things:
            [dek] = await keys.unwrap(project_id, [(thing, envelope)])
            assert dek.open(bytes(12), sealed, b"") == b"row"
    assert {envelope.kek_version for _, envelope, _ in things} >= set(range(1, len(route) + 1))
    # And the newest one's customer is who decides now.
    await asyncio.to_thread(last.disable)
    await manager.wait_state(project_id, KeyState.REVOKED)
    await asyncio.to_thread(last.enable)
    await manager.wait_state(project_id, KeyState.ACTIVE)
    assert (await manager.verify_audit()).intact


async def test_a_killed_keymanager_goes_on_with_what_is_left(bench: Bench) -> None:
    manager, customers = bench.manager, bench.customers
    old, new = customers["aws"], customers["google"]
    configuration_id = (await bench.configure(old.cmk)).key_configuration_id
    workspace = await bench.workspace(configuration_id)
    projects = [(await manager.create_project(workspace)).project_id for _ in range(10)]
    await bench.begin(configuration_id, new.cmk)

    async def staged() -> bool:
        return len(await manager.audit("kek.stage")) >= 3

    await wait_until(staged)
    manager.kill()
    await manager.start()
    await bench.done(configuration_id, new.cmk)
    recorded = await manager.audit("kek.stage")
    assert len({record["project_id"] for record in recorded}) == 10
    assert len(recorded) == 10  # none twice
    await asyncio.to_thread(old.destroy)
    manager.kill()
    await manager.start()
    async with manager.key_client() as keys:
        for project_id in projects:
            await keys.acquire(project_id, Losses())
            await keys.generate(project_id, [named()])


async def test_projects_and_keks_that_come_meanwhile_are_taken_along(bench: Bench) -> None:
    manager, customers = bench.manager, bench.customers
    configuration_id = (await bench.configure(customers["aws"].cmk)).key_configuration_id
    workspace = await bench.workspace(configuration_id)
    projects = [(await manager.create_project(workspace)).project_id for _ in range(3)]
    await bench.begin(configuration_id, customers["azure"].cmk)
    while await bench.progress(configuration_id) is not None:
        # A conflict: it was too late for the old CMK. The next one is under the new.
        with contextlib.suppress(ConflictError):
            projects.append((await manager.create_project(workspace)).project_id)
            await bench.rotate_kek(projects[0])
    await bench.done(configuration_id, customers["azure"].cmk)
    await asyncio.to_thread(customers["aws"].destroy)
    manager.kill()
    await manager.start()
    async with manager.key_client() as keys:
        for project_id in projects:
            await keys.acquire(project_id, Losses())
            await keys.generate(project_id, [named()])


async def test_what_is_refused_changes_nothing(bench: Bench) -> None:
    manager, customers = bench.manager, bench.customers
    aws, google = customers["aws"], customers["google"]
    configuration_id = (await bench.configure(aws.cmk)).key_configuration_id
    project_id = (await manager.create_project(await bench.workspace(configuration_id))).project_id
    with pytest.raises(ConflictError, match="already"):
        await bench.begin(configuration_id, aws.cmk)
    with pytest.raises(NotFoundError):
        await bench.begin(KeyConfigurationId.new(), google.cmk)
    with pytest.raises(NotFoundError):
        await bench.abort(configuration_id)
    await asyncio.to_thread(google.deny)
    with pytest.raises(InvalidInputError, match="may not use the key"):
        await bench.begin(configuration_id, google.cmk)
    await asyncio.to_thread(google.allow)
    async with manager.client(scopes=frozenset({Scope.SECURITY_ADMIN, Scope.WORKSPACE_ADMIN})) as client:
        with pytest.raises(PermissionDeniedError):
            await client.request(
                "POST", f"/v1/key-configurations/{configuration_id}:replace", body=ReplaceKey(key=google.cmk)
            )
    # The emergency: the old CMK is revoked, so nothing that it wraps can be opened to be wrapped anew.
    await asyncio.to_thread(aws.disable)
    await manager.wait_state(project_id, KeyState.REVOKED)
    with pytest.raises(RevokedError, match="old key must be usable"):
        await bench.begin(configuration_id, google.cmk)
    await asyncio.to_thread(aws.enable)
    await manager.wait_state(project_id, KeyState.ACTIVE)
    assert await bench.progress(configuration_id) is None


async def test_a_dry_run_tries_the_key_and_begins_nothing(bench: Bench) -> None:
    manager, customers = bench.manager, bench.customers
    aws, google = customers["aws"], customers["google"]
    configuration_id = (await bench.configure(aws.cmk)).key_configuration_id
    workspace = await bench.workspace(configuration_id)
    for _ in range(2):
        await manager.create_project(workspace)
    tried = await bench.begin(configuration_id, google.cmk, dry_run=True)
    assert (tried.key, tried.keks, tried.staged, tried.dry_run) == (google.cmk, 2, 0, True)
    assert await bench.progress(configuration_id) is None
    assert await bench.work(configuration_id) == []
    assert [record["outcome"] for record in await manager.audit("cmk.replace")] == ["dry_run"]
    await asyncio.to_thread(google.allow_all_but, "cloudkms.cryptoKeyVersions.useToEncrypt")
    with pytest.raises(InvalidInputError, match="useToEncrypt"):
        await bench.begin(configuration_id, google.cmk, dry_run=True)


async def test_what_happens_while_a_replacement_waits(bench: Bench) -> None:
    """For its new CMK, which passes its trial and wraps no KEK yet; so all the rest happens meanwhile, for certain."""
    manager, old, new = bench.manager, bench.customers["google"], bench.customers["aws"]
    assert isinstance(new, AwsCustomer)
    configuration_id = (await bench.configure(old.cmk)).key_configuration_id
    workspace = await bench.workspace(configuration_id)
    projects = [(await manager.create_project(workspace)).project_id for _ in range(3)]
    kept: list[tuple[ProjectId, ObjectName, Envelope]] = []
    await asyncio.to_thread(new.allow_canaries_only)

    async def use(*used: ProjectId) -> None:
        async with manager.key_client() as keys:
            for project_id in used:
                await keys.acquire(project_id, Losses())
                [(_, envelope)] = await keys.generate(project_id, [thing := named()])
                kept.append((project_id, thing, envelope))

    async def waits() -> None:
        before = manager.log.count("a replacement of a CMK waits")
        await wait_until(lambda: manager.log.count("a replacement of a CMK waits") > before)

    await bench.begin(configuration_id, new.cmk)
    await waits()
    # Given up, and begun again.
    await bench.abort(configuration_id)
    assert await bench.progress(configuration_id) is None
    await bench.begin(configuration_id, new.cmk)
    # Another one is refused, the same again is this one.
    with pytest.raises(ConflictError, match="under way"):
        await bench.begin(configuration_id, bench.customers["azure"].cmk)
    stuck = await bench.begin(configuration_id, new.cmk)
    [work] = await bench.work(configuration_id)
    assert (work.kind, work.done, work.total) == (KeyWorkKind.REPLACE, 0, 3)
    assert work.started_at == stuck.started_at
    # A KEK rotation, a project, and a new version of the old CMK: all of it still under the old CMK.
    await use(*projects)
    await bench.rotate_kek(projects[0])
    projects.append((await manager.create_project(workspace)).project_id)
    await asyncio.to_thread(old.rotate)
    async with manager.keylake() as keylake:
        assert (await keylake.rewrap(configuration_id)).rewrapped == 5
        await keylake.revoke(projects[1], "an incident")
    await use(projects[0], projects[3])
    # The customer takes the old CMK away. Nothing can be unwrapped, so the new one alone does not help.
    await asyncio.to_thread(old.disable)
    await manager.wait_state(projects[0], KeyState.REVOKED)
    await asyncio.to_thread(new.allow)
    await waits()
    assert await manager.audit("kek.stage") == []
    # And gives it back. The project that an operator keeps stopped comes along, and stays stopped.
    await asyncio.to_thread(old.enable)
    await bench.done(configuration_id, new.cmk)
    assert len(await manager.audit("kek.stage")) == 5
    await asyncio.to_thread(old.destroy)
    manager.kill()
    await manager.start()
    await manager.wait_state(projects[0], KeyState.ACTIVE)
    assert (await manager.project(projects[1])).state is KeyState.REVOKED
    async with manager.keylake() as keylake:
        await keylake.restore(projects[1])
    await use(*projects)
    assert {envelope.kek_version for project_id, _, envelope in kept if project_id == projects[0]} == {1, 2}
    async with manager.key_client() as keys:
        for project_id in projects:
            await keys.acquire(project_id, Losses())
        for project_id, thing, envelope in kept:
            await keys.unwrap(project_id, [(thing, envelope)])
