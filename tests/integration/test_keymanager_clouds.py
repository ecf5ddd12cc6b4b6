"""One workflow over every cloud: a real keymanager process, the vendor's own SDK, the customer's own KMS."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shared.api.keymanager import (
    CreateKeyConfiguration,
    CreateWorkspace,
    KeyConfiguration,
    KeyState,
    Project,
    Rewrap,
    Workspace,
)
from shared.errors import InvalidInputError, RevokedError
from shared.ids import KeyConfigurationId
from tests.fixtures.key_source_contract import Losses, named
from tests.fixtures.keymanager import Keymanager, special_keymanager
from tests.fixtures.kms_clouds import CUSTOMERS, KmsClouds
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from tests.fixtures.customercloud import CloudProcess
    from tests.fixtures.keymanager import Trust
    from tests.fixtures.kms_customers import KmsCustomer

pytestmark = pytest.mark.integration


@pytest.fixture(params=sorted(CUSTOMERS))
def customer(request: pytest.FixtureRequest, kms_clouds: KmsClouds) -> Iterator[KmsCustomer]:
    with CUSTOMERS[request.param](kms_clouds) as made:
        yield made


@pytest.fixture
async def manager(
    customer: KmsCustomer, tmp_path: Path, trust: Trust, metadata_dsn: str, shared_cloud: CloudProcess
) -> AsyncIterator[Keymanager]:
    """A keymanager that can use the customer's CMK."""
    options = {"kms_deadline_s": 3.0, "kms_read_timeout_s": 2.0, **customer.keymanager_settings}
    async with special_keymanager(tmp_path, trust, metadata_dsn, shared_cloud, **options) as made:
        await made.start()
        yield made


async def configure(manager: Keymanager, customer: KmsCustomer) -> KeyConfiguration:
    body = CreateKeyConfiguration(name=f"kc-{secrets.token_hex(4)}", key=customer.cmk, probe_interval_s=0.2)
    async with manager.client() as client:
        return await client.call(KeyConfiguration, "POST", "/v1/key-configurations", body=body)


async def make_project(manager: Keymanager, configuration_id: KeyConfigurationId) -> Project:
    body = CreateWorkspace(name=f"ws-{secrets.token_hex(4)}", key_configuration_id=configuration_id)
    async with manager.client() as client:
        workspace = await client.call(Workspace, "POST", "/v1/workspaces", body=body)
    return await manager.create_project(workspace)


async def test_the_whole_workflow(manager: Keymanager, customer: KmsCustomer) -> None:
    configuration = await configure(manager, customer)
    assert configuration.key == customer.cmk
    project = await make_project(manager, configuration.key_configuration_id)
    project_id = project.project_id
    async with manager.key_client() as keys:
        lease = await keys.acquire(project_id, Losses())
        [(dek, envelope)] = await keys.generate(project_id, [thing := named()])
        sealed = dek.seal(bytes(12), b"row", b"")

        # The customer says no, and yes again.
        await asyncio.to_thread(customer.disable)
        await manager.wait_state(project_id, KeyState.REVOKED)
        await wait_until(lambda: not lease.live)
        with pytest.raises(RevokedError):
            await keys.unwrap(project_id, [(thing, envelope)])
        assert (await manager.wait_sealed(project_id)).state is KeyState.REVOKED
        assert (await manager.status()).plaintext_keks == []
        await asyncio.to_thread(customer.enable)
        await manager.wait_state(project_id, KeyState.ACTIVE)
        await wait_until(lambda: lease.live)
        [again] = await keys.unwrap(project_id, [(thing, envelope)])
        assert again.open(bytes(12), sealed, b"") == b"row"

        # A new version of the CMK, and of the KEK.
        await asyncio.to_thread(customer.rotate)
        async with manager.client() as client:
            path = f"/v1/key-configurations/{configuration.key_configuration_id}:rewrap"
            done = await client.call(Rewrap, "POST", path, timeout_s=30)
            assert (done.keks, done.rewrapped) == (1, 1)
            await client.call(Project, "POST", f"/v1/projects/{project_id}/keks:rotate", timeout_s=30)
        now = await manager.project(project_id)
        assert {kek.cmk_key_version for kek in now.keks} == {done.cmk_key_version}
        assert done.cmk_key_version != project.keks[0].cmk_key_version

    # Nothing of that hangs on what is in memory.
    manager.kill()
    await manager.start()
    async with manager.key_client() as keys:
        await keys.acquire(project_id, Losses())
        [again] = await keys.unwrap(project_id, [(thing, envelope)])
        assert again.open(bytes(12), sealed, b"") == b"row"
        [(_, newest)] = await keys.generate(project_id, [named()])
        assert newest.kek_version == 2

    logged = await asyncio.to_thread(customer.audit_request_ids)
    actions = ("project.create", "kek.unwrap", "kek.rewrap", "kek.rotate")
    ours = [record for action in actions for record in await manager.audit(action)]
    assert len(ours) >= 4
    assert {record["details"]["kms_request_id"] for record in ours} <= logged
    assert (await manager.verify_audit()).intact


async def test_a_key_that_may_not_be_used_is_refused_with_what_is_missing(
    manager: Keymanager, customer: KmsCustomer
) -> None:
    await asyncio.to_thread(customer.deny)
    with pytest.raises(InvalidInputError, match="may not use the key: allow it") as refused:
        await configure(manager, customer)
    assert customer.cmk.principal in str(refused.value)
    await asyncio.to_thread(customer.disable)
    await asyncio.to_thread(customer.allow)
    with pytest.raises(InvalidInputError, match="enable it"):
        await configure(manager, customer)
    await asyncio.to_thread(customer.enable)
    assert (await configure(manager, customer)).state is KeyState.ACTIVE


async def test_each_permission_that_is_missing_is_named_at_once(manager: Keymanager, customer: KmsCustomer) -> None:
    """Also those that are needed only later, when keys are rotated or a project is erased."""
    for permission in customer.permissions:
        await asyncio.to_thread(customer.allow_all_but, permission)
        with pytest.raises(InvalidInputError, match=f"allow it {re.escape(permission)} \\(") as refused:
            await configure(manager, customer)
        assert customer.cmk.principal in str(refused.value)
    await asyncio.to_thread(customer.allow_all_but, None)
    assert (await configure(manager, customer)).state is KeyState.ACTIVE


async def test_without_our_own_credentials_the_others_are_served(manager: Keymanager, customer: KmsCustomer) -> None:
    """An operator lost the secret of one customer's principal: that is no word of the customer's."""
    configuration = await configure(manager, customer)
    project = await make_project(manager, configuration.key_configuration_id)
    aws = manager.tenant.customer.create_key(role_arn=manager.tenant.role_arn)
    section = next(iter(customer.keymanager_settings))
    kept = manager.options.pop(section)
    if section == "aws":
        manager.options["aws"] = {**kept, "secret_access_key": "not-the-one"}
    manager.expected_errors |= {"a key configuration cannot be used"}
    assert manager.stop() == 0
    await manager.start()
    await manager.wait_state(project.project_id, KeyState.SUSPENDED)
    if section != "aws":
        assert (await manager.new_project(aws)).state is KeyState.ACTIVE
    manager.options[section] = kept
    assert manager.stop() == 0
    await manager.start()
    await manager.wait_state(project.project_id, KeyState.ACTIVE)
