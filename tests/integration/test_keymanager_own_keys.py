"""Key configurations that change, projects with a CMK of their own, and projects that move to another one."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from customercloud.faults import Faults, Outage
from keylake.client import KeylakeClient
from shared.api.keymanager import (
    AwsKey,
    ChangeKeyConfiguration,
    ChangeWorkspace,
    CreateKeyConfiguration,
    CreateProject,
    CreateWorkspace,
    KeyConfiguration,
    KeyState,
    MoveProject,
    NoCause,
    Project,
    ReplaceKey,
    Replacement,
    Workspace,
)
from shared.auth import BearerToken, Scope
from shared.cmk import CmkKey
from shared.errors import (
    ConflictError,
    InvalidInputError,
    KeylakeError,
    NotFoundError,
    PermissionDeniedError,
    RevokedError,
)
from shared.ids import KeyConfigurationId, ProjectId
from shared.migrate import load_migrations, migrate
from shared.roles import PersonRole
from tests.fixtures.customercloud import new_tenant
from tests.fixtures.key_source_contract import Losses, named
from tests.fixtures.keymanager import Keymanager
from tests.fixtures.kms_clouds import CUSTOMERS, KmsClouds
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from tests.fixtures.customercloud import CloudProcess
    from tests.fixtures.keymanager import Trust
    from tests.fixtures.kms_customers import KmsCustomer

pytestmark = pytest.mark.integration


async def change(keymanager: Keymanager, configuration_id: KeyConfigurationId, **changes: Any) -> KeyConfiguration:
    body = ChangeKeyConfiguration(**changes)
    async with keymanager.client() as client:
        return await client.call(KeyConfiguration, "PATCH", f"/v1/key-configurations/{configuration_id}", body=body)


async def configure(keymanager: Keymanager, key: CmkKey) -> KeyConfigurationId:
    body = CreateKeyConfiguration(name=f"kc-{secrets.token_hex(4)}", key=key, probe_interval_s=0.2)
    async with keymanager.client() as client:
        made = await client.call(KeyConfiguration, "POST", "/v1/key-configurations", body=body)
    return made.key_configuration_id


def aws_key(keymanager: Keymanager, key: str) -> AwsKey:
    tenant = keymanager.tenant
    return AwsKey(key_arn=key, role_arn=tenant.role_arn, external_id=tenant.names.external_id)


async def create(keymanager: Keymanager, workspace: Workspace, own: KeyConfigurationId | None = None) -> Project:
    body = CreateProject(name=f"project-{secrets.token_hex(4)}", key_configuration_id=own)
    async with keymanager.client() as client:
        return await client.call(Project, "POST", f"/v1/workspaces/{workspace.workspace_id}/projects", body=body)


async def move(keymanager: Keymanager, project_id: ProjectId, target: KeyConfigurationId) -> Project:
    async with keymanager.client() as client:
        body = MoveProject(key_configuration_id=target)
        return await client.call(Project, "POST", f"/v1/projects/{project_id}:move-key", body=body, timeout_s=60)


async def rotate_kek(keymanager: Keymanager, project_id: ProjectId) -> None:
    async with keymanager.client() as client:
        await client.call(Project, "POST", f"/v1/projects/{project_id}/keks:rotate", timeout_s=30)


class Content:
    """Data keys of one project, and something sealed under each."""

    def __init__(self, keymanager: Keymanager, project_id: ProjectId) -> None:
        self._keymanager = keymanager
        self._project_id = project_id
        self._things: list[tuple[Any, Any, bytes]] = []

    async def add(self) -> None:
        async with self._keymanager.key_client() as keys:
            await keys.acquire(self._project_id, Losses())
            [(dek, envelope)] = await keys.generate(self._project_id, [thing := named()])
            self._things.append((thing, envelope, dek.seal(bytes(12), b"row", b"")))

    async def check(self) -> None:
        """All of it opens, from what is stored: a keymanager without memory is asked."""
        self._keymanager.kill()
        await self._keymanager.start()
        async with self._keymanager.key_client() as keys:
            await keys.acquire(self._project_id, Losses())
            for thing, envelope, sealed in self._things:
                [dek] = await keys.unwrap(self._project_id, [(thing, envelope)])
                assert dek.open(bytes(12), sealed, b"") == b"row"


# --- changes of a key configuration ---


async def test_changes_are_in_effect_at_once_and_on_record(keymanager: Keymanager, cmk: str) -> None:
    configuration, workspace = await keymanager.bind(cmk, probe_interval_s=3600)
    project = await keymanager.create_project(workspace)
    configuration_id = configuration.key_configuration_id
    named_now = await change(keymanager, configuration_id, name="another name")
    assert (named_now.name, named_now.probe_interval_s) == ("another name", 3600)
    denied = {case.cause: case.reachable_s for case in named_now.worst_cases}[NoCause.DENIED]
    assert denied is not None
    assert denied > 3600  # said before it matters
    # Nobody would look for an hour.
    await asyncio.to_thread(keymanager.tenant.customer.disable, cmk)
    await change(keymanager, configuration_id, probe_interval_s=0.2)
    await keymanager.wait_state(project.project_id, KeyState.REVOKED)
    await asyncio.to_thread(keymanager.tenant.customer.enable, cmk)
    await keymanager.wait_state(project.project_id, KeyState.ACTIVE)
    # A grace, given just before it is needed, and taken back.
    await change(keymanager, configuration_id, outage_grace_s=7200)
    with keymanager.tenant.admin.during(Faults(outage=Outage.REFUSE)):

        async def unreachable() -> bool:
            async with keymanager.client() as client:
                now = await client.call(KeyConfiguration, "GET", f"/v1/key-configurations/{configuration_id}")
            return now.last_verdict.startswith("UNREACHABLE")

        await wait_until(unreachable)
        assert (await keymanager.project(project.project_id)).state is KeyState.ACTIVE
        await change(keymanager, configuration_id, outage_grace_s=0)
        await keymanager.wait_state(project.project_id, KeyState.SUSPENDED)
    await keymanager.wait_state(project.project_id, KeyState.ACTIVE)
    keymanager.kill()
    await keymanager.start()
    async with keymanager.client() as client:
        kept = await client.call(KeyConfiguration, "GET", f"/v1/key-configurations/{configuration_id}")
    assert (kept.name, kept.outage_grace_s, kept.probe_interval_s) == ("another name", 0, 0.2)
    records = [record["details"] for record in await keymanager.audit("key_configuration.change")]
    assert [(r.get("old_probe_interval_s"), r.get("probe_interval_s")) for r in records] == [
        (None, None),
        ("3600.0", "0.2"),
        (None, None),
        (None, None),
    ]
    assert records[0]["name"] == "another name"


async def test_what_cannot_be_changed(keymanager: Keymanager, cmk: str) -> None:
    configuration, _ = await keymanager.bind(cmk)
    other, _ = await keymanager.bind(cmk)
    for wanted, changes in (
        (ConflictError, {"name": other.name}),
        (InvalidInputError, {}),
    ):
        with pytest.raises(wanted):
            await change(keymanager, configuration.key_configuration_id, **changes)
    with pytest.raises(NotFoundError):
        await change(keymanager, KeyConfigurationId.new(), name="x")
    path = f"/v1/key-configurations/{configuration.key_configuration_id}"
    body = ChangeKeyConfiguration(outage_grace_s=1)
    async with keymanager.client(scopes=keymanager.trust.admin.scopes - {Scope.ACCOUNT_ADMIN}) as client:
        with pytest.raises(PermissionDeniedError):
            await client.request("PATCH", path, body=body)
    assert await keymanager.audit("key_configuration.change") == []


# --- a project's own key ---


async def test_a_project_under_its_own_key_follows_that_one_alone(keymanager: Keymanager, cmk: str) -> None:
    customer = keymanager.tenant.customer
    its_key = await asyncio.to_thread(lambda: customer.create_key(role_arn=keymanager.tenant.role_arn))
    configuration, workspace = await keymanager.bind(cmk)
    own, _ = await keymanager.bind(its_key)
    inherits = await create(keymanager, workspace)
    has_own = await create(keymanager, workspace, own.key_configuration_id)
    assert inherits.key_configuration_id == configuration.key_configuration_id
    assert has_own.key_configuration_id == own.key_configuration_id
    await asyncio.to_thread(customer.disable, its_key)
    await keymanager.wait_state(has_own.project_id, KeyState.REVOKED)
    assert (await keymanager.project(inherits.project_id)).state is KeyState.ACTIVE
    keymanager.kill()
    await keymanager.start()
    assert (await keymanager.project(has_own.project_id)).state is KeyState.REVOKED
    await asyncio.to_thread(customer.enable, its_key)
    await keymanager.wait_state(has_own.project_id, KeyState.ACTIVE)
    await asyncio.to_thread(customer.disable, cmk)
    await keymanager.wait_state(inherits.project_id, KeyState.REVOKED)
    assert (await keymanager.project(has_own.project_id)).state is KeyState.ACTIVE
    await asyncio.to_thread(customer.enable, cmk)
    await keymanager.wait_state(inherits.project_id, KeyState.ACTIVE)
    # Another CMK for its key configuration takes it along, and nothing of its workspace.
    content = Content(keymanager, has_own.project_id)
    await content.add()
    third = await asyncio.to_thread(lambda: customer.create_key(role_arn=keymanager.tenant.role_arn))
    async with keymanager.client() as client:
        path = f"/v1/key-configurations/{own.key_configuration_id}"
        assert isinstance(own.key, AwsKey)
        body = ReplaceKey(key=own.key.model_copy(update={"key_arn": third}))
        begun = await client.call(Replacement, "POST", f"{path}:replace", body=body, timeout_s=30)
        assert begun.keks == 1

        async def replaced() -> bool:
            return (await client.call(KeyConfiguration, "GET", path)).key == body.key

        await wait_until(replaced)
    await asyncio.to_thread(customer.disable, its_key)
    await content.check()
    assert (await keymanager.project(inherits.project_id)).state is KeyState.ACTIVE


async def test_who_runs_projects_does_not_choose_their_key(keymanager: Keymanager, cmk: str) -> None:
    configuration, workspace = await keymanager.bind(cmk)
    other, _ = await keymanager.bind(cmk)
    project = await keymanager.create_project(workspace)
    path = f"/v1/workspaces/{workspace.workspace_id}/projects"
    own = CreateProject(name="own", key_configuration_id=other.key_configuration_id)
    async with keymanager.client(scopes=frozenset({Scope.WORKSPACE_ADMIN})) as client:
        with pytest.raises(PermissionDeniedError):
            await client.request("POST", path, body=own)
        body = MoveProject(key_configuration_id=other.key_configuration_id)
        with pytest.raises(PermissionDeniedError):
            await client.request("POST", f"/v1/projects/{project.project_id}:move-key", body=body)
    async with keymanager.client(scopes=frozenset({Scope.ACCOUNT_ADMIN})) as client:
        with pytest.raises(PermissionDeniedError):
            await client.request("POST", path, body=CreateProject(name="inherits"))
        assert (await client.call(Project, "POST", path, body=own)).key_configuration_id == other.key_configuration_id
    denied = [(r["details"]["route"], r["details"]["needs"]) for r in await keymanager.audit("admin.denied")]
    assert [needs for _, needs in denied] == ["account:admin", "account:admin", "workspace:admin"]
    # And what is in use stays: by a workspace, by a project.
    async with keymanager.client() as client:
        for each in (configuration, other):
            with pytest.raises(ConflictError, match="bound to this key configuration"):
                await client.request("DELETE", f"/v1/key-configurations/{each.key_configuration_id}")


# --- another key for a workspace ---


async def change_workspace(keymanager: Keymanager, workspace: Workspace, **changes: Any) -> Workspace:
    async with keymanager.client() as client:
        path = f"/v1/workspaces/{workspace.workspace_id}"
        return await client.call(Workspace, "PATCH", path, body=ChangeWorkspace(**changes))


async def test_a_workspace_comes_under_another_key_with_its_projects_to_come(keymanager: Keymanager, cmk: str) -> None:
    customer = keymanager.tenant.customer
    its_key = await asyncio.to_thread(lambda: customer.create_key(role_arn=keymanager.tenant.role_arn))
    configuration, workspace = await keymanager.bind(cmk)
    other = await configure(keymanager, aws_key(keymanager, its_key))
    former = configuration.key_configuration_id
    was_there = await create(keymanager, workspace)
    had_it = await create(keymanager, workspace, other)
    content = Content(keymanager, was_there.project_id)
    await content.add()

    changed = await change_workspace(keymanager, workspace, key_configuration_id=other, name="renamed")
    assert (changed.key_configuration_id, changed.name) == (other, "renamed")
    [record] = await keymanager.audit("workspace.change")
    assert (record["details"]["old_key_configuration_id"], record["details"]["name"]) == (str(former), "renamed")
    new = await create(keymanager, workspace)
    for _ in range(2):
        for project, under in ((was_there, former), (had_it, other), (new, other)):
            assert (await keymanager.project(project.project_id)).key_configuration_id == under
        await content.check()  # by a keymanager without memory
    await asyncio.to_thread(customer.disable, its_key)
    for project in (had_it, new):
        await keymanager.wait_state(project.project_id, KeyState.REVOKED)
    assert (await keymanager.project(was_there.project_id)).state is KeyState.ACTIVE
    await asyncio.to_thread(customer.enable, its_key)
    for project in (had_it, new):
        await keymanager.wait_state(project.project_id, KeyState.ACTIVE)

    # The one that was there follows by the move that there is, and then nothing is left under the former key.
    async with keymanager.client() as client:
        with pytest.raises(ConflictError, match="bound to this key configuration"):
            await client.request("DELETE", f"/v1/key-configurations/{former}")
        await move(keymanager, was_there.project_id, other)
        await client.request("DELETE", f"/v1/key-configurations/{former}")


async def test_projects_that_are_made_meanwhile_are_under_one_key_or_the_other(
    keymanager: Keymanager, cmk: str
) -> None:
    """In memory and in the database alike: what is stored opens with the key that it is said to be under."""
    configuration, workspace = await keymanager.bind(cmk)
    other, _ = await keymanager.bind(
        await asyncio.to_thread(lambda: keymanager.tenant.customer.create_key(role_arn=keymanager.tenant.role_arn))
    )
    keys_in_turn = [other, configuration] * 2
    projects: list[Project] = []

    async def make() -> None:
        for _ in range(2):
            projects.append(await create(keymanager, workspace))

    async def turn() -> None:
        for each in keys_in_turn:
            await change_workspace(keymanager, workspace, key_configuration_id=each.key_configuration_id)
            moving = [move(keymanager, project.project_id, each.key_configuration_id) for project in projects[:1]]
            await asyncio.gather(*moving)

    await asyncio.gather(make(), make(), turn())
    before = {p.project_id: (await keymanager.project(p.project_id)).key_configuration_id for p in projects}
    keymanager.kill()
    await keymanager.start()
    async with keymanager.key_client() as keys:
        for project_id, under in before.items():
            assert (await keymanager.project(project_id)).key_configuration_id == under
            await keys.acquire(project_id, Losses())
            await keys.generate(project_id, [named()])


async def test_projects_of_before_are_under_the_key_of_their_workspace(metadata_dsn: str) -> None:
    """The migration: which key a project is under stood with its workspace."""
    migrations = load_migrations("keymanager")
    connection = await asyncpg.connect(metadata_dsn, server_settings={"search_path": "keymanager"})
    try:
        await migrate(connection, "keymanager", migrations[:6])
        await connection.execute(
            """
            INSERT INTO account VALUES ('acc-1', 'a', now());
            INSERT INTO key_configuration
                SELECT name, 'acc-1', name, '{}', 0, 1, '', '', 'ALLOWED', '', NULL, now(), now()
                FROM (VALUES ('kc-1'), ('kc-2')) AS k (name);
            INSERT INTO workspace VALUES ('ws-1', 'acc-1', 'w', 'kc-1', now());
            INSERT INTO project (project_id, workspace_id, name, state, created_at, key_configuration_id)
                VALUES ('prj-1', 'ws-1', 'p', 'ACTIVE', now(), NULL), ('prj-2', 'ws-1', 'q', 'ACTIVE', now(), 'kc-2');
            """
        )
        await migrate(connection, "keymanager", migrations)
        rows = await connection.fetch("SELECT project_id, key_configuration_id FROM project_key ORDER BY project_id")
        assert [tuple(row) for row in rows] == [("prj-1", "kc-1"), ("prj-2", "kc-2")]
    finally:
        await connection.close()


async def test_what_a_workspace_cannot_become(keymanager: Keymanager, cmk: str) -> None:
    _, workspace = await keymanager.bind(cmk)
    _, other = await keymanager.bind(cmk)
    for wanted, changes in (
        (ConflictError, {"name": other.name}),
        (InvalidInputError, {}),
        (NotFoundError, {"key_configuration_id": KeyConfigurationId.new()}),
    ):
        with pytest.raises(wanted):
            await change_workspace(keymanager, workspace, **changes)
    async with keymanager.client(scopes=keymanager.trust.admin.scopes - {Scope.ACCOUNT_ADMIN}) as client:
        for method in ("PATCH", "DELETE"):
            with pytest.raises(PermissionDeniedError):
                await client.request(method, f"/v1/workspaces/{workspace.workspace_id}", body=ChangeWorkspace(name="x"))
    assert await keymanager.audit("workspace.change") == []


async def test_an_empty_workspace_is_deleted(keymanager: Keymanager, cmk: str) -> None:
    _, workspace = await keymanager.bind(cmk)
    _, spare = await keymanager.bind(cmk)
    await create(keymanager, workspace)
    async with keymanager.keylake() as client:
        token, issued = await client.create_token(
            PersonRole.WORKSPACE_ADMIN, subject="w", ttl_s=600, workspace_id=spare.workspace_id
        )
        with pytest.raises(ConflictError, match="a project is in this workspace"):
            await client.delete_workspace(workspace.workspace_id)
        await client.delete_workspace(spare.workspace_id)
        with pytest.raises(NotFoundError):
            await client.delete_workspace(spare.workspace_id)
        await client.delete_key_configuration(spare.key_configuration_id)
        assert await client.workspaces() == [workspace]
        assert [each.token_id for each in await client.tokens()] == [issued.token_id]  # the audit chain names it
    async with KeylakeClient(client.addresses, client.ca_certificate, BearerToken(token)) as bound:
        assert await bound.projects() == []
        with pytest.raises(PermissionDeniedError):
            await bound.create_project(workspace.workspace_id, "elsewhere")
    keymanager.kill()
    await keymanager.start()
    async with keymanager.keylake() as client:
        assert await client.workspaces() == [workspace]
    [record] = await keymanager.audit("workspace.delete")
    assert record["details"] == {"workspace_id": str(spare.workspace_id), "name": spare.name}


# --- moving ---


@pytest.fixture
async def clouds(
    kms_clouds: KmsClouds, tmp_path: Path, trust: Trust, metadata_dsn: str, shared_cloud: CloudProcess
) -> AsyncIterator[tuple[Keymanager, KmsCustomer, KmsCustomer]]:
    """A keymanager with a customer in AWS and one in Google's cloud."""
    with CUSTOMERS["aws"](kms_clouds) as aws, CUSTOMERS["google"](kms_clouds) as google:
        manager = Keymanager(tmp_path, trust, metadata_dsn, new_tenant(shared_cloud))
        manager.options |= {"kms_deadline_s": 3.0, "kms_read_timeout_s": 2.0}
        manager.options |= aws.keymanager_settings | google.keymanager_settings
        try:
            await manager.start()
            yield manager, aws, google
            assert manager.stop() == 0
            assert manager.errors() == []
        finally:
            if manager.process is not None and manager.process.poll() is None:
                manager.kill()
            manager.tenant.close()


Clouds = tuple[Keymanager, "KmsCustomer", "KmsCustomer"]


async def homes(clouds: Clouds) -> tuple[KeyConfigurationId, KeyConfigurationId, Workspace]:
    """A key configuration in each cloud, and a workspace under the first."""
    manager, aws, google = clouds
    old, new = await configure(manager, aws.cmk), await configure(manager, google.cmk)
    async with manager.client() as client:
        body = CreateWorkspace(name=f"ws-{secrets.token_hex(4)}", key_configuration_id=old)
        return old, new, await client.call(Workspace, "POST", "/v1/workspaces", body=body)


async def test_a_project_moves_to_another_cloud_while_others_work(clouds: Clouds) -> None:
    manager, aws, google = clouds
    old, new, workspace = await homes(clouds)
    project, stays = await create(manager, workspace), await create(manager, workspace)
    content, losses, working = Content(manager, project.project_id), Losses(), True
    await content.add()
    async with manager.key_client(node_id="pageserver-2") as keys:
        await keys.acquire(project.project_id, losses)

        async def work() -> None:
            while working:
                [(_, envelope)] = await keys.generate(project.project_id, [thing := named()])
                await keys.unwrap(project.project_id, [(thing, envelope)])
                await asyncio.sleep(0.01)

        async def rotate() -> None:
            for _ in range(3):
                await rotate_kek(manager, project.project_id)

        async with asyncio.TaskGroup() as group:
            group.create_task(work())
            rotating = group.create_task(rotate())
            moved = await move(manager, project.project_id, new)
            assert moved.key_configuration_id == new
            assert (await move(manager, project.project_id, new)).key_configuration_id == new
            await rotating
            working = False
    assert losses.seen == []
    # From now on the new one's customer decides; the old one's key may go, as far as this project is concerned.
    await asyncio.to_thread(google.disable)
    await manager.wait_state(project.project_id, KeyState.REVOKED)
    assert (await manager.project(stays.project_id)).state is KeyState.ACTIVE
    await asyncio.to_thread(google.enable)
    await manager.wait_state(project.project_id, KeyState.ACTIVE)
    await asyncio.to_thread(aws.disable)
    await manager.wait_state(stays.project_id, KeyState.REVOKED)
    await content.add()
    await content.check()
    assert (await manager.project(project.project_id)).key_configuration_id == new
    # And back, once the old one answers again: then it has no key of its own any more.
    await asyncio.to_thread(aws.enable)
    await manager.wait_state(stays.project_id, KeyState.ACTIVE)
    assert (await move(manager, project.project_id, old)).key_configuration_id == old
    await asyncio.to_thread(google.destroy)
    async with manager.client() as client:
        await client.request("DELETE", f"/v1/key-configurations/{new}")
    await content.check()
    assert (await manager.verify_audit()).intact
    assert len(await manager.audit("project.move_key")) == 2


async def test_a_keymanager_that_is_killed_has_it_here_or_there(clouds: Clouds) -> None:
    manager, aws, _ = clouds
    _, new, workspace = await homes(clouds)
    project = await create(manager, workspace)
    content = Content(manager, project.project_id)
    for _ in range(6):
        await content.add()
        await rotate_kek(manager, project.project_id)

    async def moving() -> None:
        with pytest.raises(KeylakeError):
            await move(manager, project.project_id, new)

    async def begun() -> bool:
        return len(await manager.audit("kek.move")) >= 2

    async with asyncio.TaskGroup() as group:
        group.create_task(moving())
        await wait_until(begun)
        manager.kill()
    await manager.start()
    assert await manager.audit("project.move_key") == []
    assert (await manager.project(project.project_id)).key_configuration_id == workspace.key_configuration_id
    await content.check()
    assert (await move(manager, project.project_id, new)).key_configuration_id == new
    await asyncio.to_thread(aws.destroy)
    await content.check()


async def test_what_is_refused_leaves_the_project_where_it_is(clouds: Clouds) -> None:
    manager, aws, google = clouds
    old, new, workspace = await homes(clouds)
    project = await create(manager, workspace)
    content = Content(manager, project.project_id)
    await content.add()
    with pytest.raises(NotFoundError):
        await move(manager, project.project_id, KeyConfigurationId.new())
    with pytest.raises(NotFoundError):
        await move(manager, ProjectId.new(), new)
    # Neither CMK may be one that is denied: known beforehand, …
    await asyncio.to_thread(google.deny)
    await wait_until(lambda: is_in(manager, new, KeyState.REVOKED))
    with pytest.raises(RevokedError, match="new key cannot be used"):
        await move(manager, project.project_id, new)
    await asyncio.to_thread(google.allow)
    await wait_until(lambda: is_in(manager, new, KeyState.ACTIVE))
    await asyncio.to_thread(aws.disable)
    await manager.wait_state(project.project_id, KeyState.REVOKED)
    with pytest.raises(RevokedError, match="old key must be usable"):
        await move(manager, project.project_id, new)
    await asyncio.to_thread(aws.enable)
    await manager.wait_state(project.project_id, KeyState.ACTIVE)
    # … or found out on the way, with the permission that is missing.
    await change(manager, new, probe_interval_s=3600)
    await asyncio.to_thread(google.deny)
    with pytest.raises(RevokedError, match="may not use the key"):
        await move(manager, project.project_id, new)
    assert [record["outcome"] for record in await manager.audit("kek.move")] == ["denied"]
    await asyncio.to_thread(google.allow)
    # Its key is being replaced: not two ways for the same KEKs at once.
    await change(manager, old, outage_grace_s=7200)
    await asyncio.to_thread(aws.outage, Outage.REFUSE)
    async with manager.client() as client:
        path = f"/v1/key-configurations/{old}"
        await client.call(Replacement, "POST", f"{path}:replace", body=ReplaceKey(key=google.cmk), timeout_s=30)
        with pytest.raises(ConflictError, match="being replaced"):
            await move(manager, project.project_id, new)
        await client.request("DELETE", f"{path}/replacement")
    await asyncio.to_thread(aws.outage, Outage.NONE)
    assert (await manager.project(project.project_id)).key_configuration_id == old
    await content.check()


async def is_in(manager: Keymanager, configuration_id: KeyConfigurationId, state: KeyState) -> bool:
    async with manager.client() as client:
        now = await client.call(KeyConfiguration, "GET", f"/v1/key-configurations/{configuration_id}")
    return now.state is state
