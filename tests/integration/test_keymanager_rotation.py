"""Rotation while others work, and while things die: no DEK is ever lost, and no call is made twice for nothing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from customercloud.faults import Faults, Service
from keymanager.adapters import provider_factory
from keymanager.config import KeymanagerSettings
from keymanager.keyring import WRAP_BLOCK
from keymanager.leadership import Term
from keymanager.manager import KeyManager
from keymanager.repository import Repository
from shared.api.keymanager import (
    KeyConfiguration,
    KeyState,
    KeyWorkKind,
    ObjectName,
    Project,
    Rewrap,
)
from shared.clock import SystemClock
from shared.crypto.envelope import Envelope
from shared.crypto.limits import MAX_WRAPS_PER_KEK
from shared.errors import ConflictError, KeylakeError, NotFoundError, RevokedError
from shared.ids import KeyConfigurationId, ProjectId
from tests.fixtures.key_source_contract import Losses, named
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from shared.keyclient import KeyClient
    from tests.fixtures.keymanager import Keymanager

pytestmark = pytest.mark.integration


class Sealed:
    """A byte string under a DEK of its own: opens as long as that DEK can be had."""

    def __init__(self, thing: ObjectName, envelope: Envelope, data: bytes) -> None:
        self.thing, self.envelope, self.data = thing, envelope, data

    @classmethod
    async def make(cls, keys: KeyClient, project_id: ProjectId) -> Sealed:
        [(dek, envelope)] = await keys.generate(project_id, [thing := named()])
        return cls(thing, envelope, dek.seal(bytes(12), b"row", b""))

    async def check(self, keys: KeyClient, project_id: ProjectId) -> None:
        [dek] = await keys.unwrap(project_id, [(self.thing, self.envelope)])
        assert dek.open(bytes(12), self.data, b"") == b"row"


async def rotate(keymanager: Keymanager, project_id: ProjectId, **params: Any) -> Project:
    async with keymanager.client() as client:
        return await client.call(Project, "POST", f"/v1/projects/{project_id}/keks:rotate", params=params)


async def rewrap(keymanager: Keymanager, configuration: KeyConfigurationId, *, dry_run: bool = False) -> Rewrap:
    async with keymanager.client() as client:
        path = f"/v1/key-configurations/{configuration}:rewrap"
        response = await client.request("POST", path, params={"dry_run": dry_run})
        return Rewrap.model_validate_json(response.content)


def re_encrypts(keymanager: Keymanager, of: str = "keylake:kek") -> int:
    """ReEncrypt calls for KEKs, or for canaries (keylake:canary-of), that the customer's own log has."""
    events = (event for event in keymanager.tenant.customer.events() if event["eventName"] == "ReEncrypt")
    return sum(of in event["requestParameters"]["sourceEncryptionContext"] for event in events)


def looks(keymanager: Keymanager) -> int:
    """How often the KMS was asked for its key's version: by us, the trial at the beginning included, or by others."""
    return sum(1 for _ in keymanager.tenant.customer.events(EventName="DescribeKey"))


def versions(project: Project) -> list[tuple[int, str]]:
    return [(kek.kek_version, kek.cmk_key_version) for kek in project.keks]


async def test_new_deks_are_under_the_new_kek_and_old_ones_open(keymanager: Keymanager, cmk: str) -> None:
    project_id = (await keymanager.new_project(cmk)).project_id
    async with keymanager.key_client() as keys:
        await keys.acquire(project_id, Losses())
        things = [await Sealed.make(keys, project_id)]
        for version in (2, 3):
            rotated = await rotate(keymanager, project_id)
            assert [kek.kek_version for kek in rotated.keks] == list(range(1, version + 1))
            assert len({kek.kek_id for kek in rotated.keks}) == version
            things.append(await Sealed.make(keys, project_id))
        assert [thing.envelope.kek_version for thing in things] == [1, 2, 3]
        for thing in things:
            await thing.check(keys, project_id)
    keymanager.kill()
    await keymanager.start()
    async with keymanager.key_client() as keys:
        await keys.acquire(project_id, Losses())
        for thing in things:
            await thing.check(keys, project_id)
        assert (await Sealed.make(keys, project_id)).envelope.kek_version == 3
    recorded = await keymanager.audit("kek.rotate")
    logged = {event["requestID"] for event in keymanager.tenant.customer.events()}
    assert [record["details"]["kek_version"] for record in recorded] == ["2", "3"]
    assert {record["details"]["kms_request_id"] for record in recorded} <= logged


async def test_a_rotation_asked_for_by_many_at_once_is_done_once(keymanager: Keymanager, cmk: str) -> None:
    project_id = (await keymanager.new_project(cmk)).project_id
    things: list[Sealed] = []
    rotating = True

    async def work(keys: KeyClient) -> None:
        while rotating:
            things.append(await Sealed.make(keys, project_id))

    async with keymanager.key_client() as keys:
        await keys.acquire(project_id, Losses())
        async with asyncio.TaskGroup() as group:
            group.create_task(work(keys))
            for version in (1, 2, 3):
                same = (rotate(keymanager, project_id, from_version=version) for _ in range(8))
                answers = await asyncio.gather(*same)
                assert {len(project.keks) for project in answers} == {version + 1}
            rotating = False
        # One whose answer was lost, asked again; and one that takes for granted what is not there yet.
        assert len((await rotate(keymanager, project_id, from_version=3)).keks) == 4
        with pytest.raises(ConflictError, match="is version 4"):
            await rotate(keymanager, project_id, from_version=5)
        project = await keymanager.project(project_id)
        assert [kek.kek_version for kek in project.keks] == [1, 2, 3, 4]
        assert (await Sealed.make(keys, project_id)).envelope.kek_version == 4
        for thing in things:
            await thing.check(keys, project_id)
    assert len(await keymanager.audit("kek.rotate")) == 3


async def test_those_who_name_no_version_join_the_rotation_that_is_under_way(keymanager: Keymanager, cmk: str) -> None:
    """In this process, where it is certain that all of them have asked before the first is done."""
    project_id = (await keymanager.new_project(cmk)).project_id
    assert keymanager.stop() == 0
    settings, clock = KeymanagerSettings(**keymanager.settings()), SystemClock()
    async with Repository.open(keymanager.dsn, 4, clock, idle_transaction_timeout_s=60) as repository:
        [row] = await repository.fetch("SELECT epoch FROM leader")
        term = Term(row["epoch"], clock.monotonic_s(), 3600, clock)
        factory = provider_factory(settings, clock)
        async with KeyManager.running(settings, repository.during(term), factory, clock, term) as manager:
            for version in (2, 3):
                await asyncio.gather(*(manager.rotator.rotate_kek(project_id, "test") for _ in range(8)))
                assert max(manager.projects.get(project_id).keks) == version


async def test_a_dry_run_of_a_rotation_asks_the_kms_and_changes_nothing(keymanager: Keymanager, cmk: str) -> None:
    before = await keymanager.new_project(cmk, probe_interval_s=3600)
    assert await rotate(keymanager, before.project_id, dry_run=True) == before
    [tried] = await keymanager.audit("kek.rotate")
    assert (tried["outcome"], tried["details"]["kek_version"]) == ("dry_run", "2")
    logged = {event["requestID"] for event in keymanager.tenant.customer.events()}
    assert tried["details"]["kms_request_id"] in logged
    await asyncio.to_thread(keymanager.tenant.customer.disable, cmk)
    with pytest.raises(RevokedError, match="enable it"):
        await rotate(keymanager, before.project_id, dry_run=True)
    await asyncio.to_thread(keymanager.tenant.customer.enable, cmk)
    assert (await keymanager.status()).plaintext_keks == [before.project_id]


async def test_a_kms_that_refuses_or_is_away_leaves_the_old_kek_in_use(keymanager: Keymanager, cmk: str) -> None:
    project_id = (await keymanager.new_project(cmk, probe_interval_s=3600)).project_id
    customer = keymanager.tenant.customer
    await asyncio.to_thread(customer.disable, cmk)
    with pytest.raises(RevokedError, match="DisabledException"):
        await rotate(keymanager, project_id)
    await asyncio.to_thread(customer.enable, cmk)
    assert len((await keymanager.project(project_id)).keks) == 1
    assert [record["outcome"] for record in await keymanager.audit("kek.rotate")] == ["denied"]

    revoked_id = (await keymanager.new_project(cmk)).project_id
    await asyncio.to_thread(customer.disable, cmk)
    await keymanager.wait_state(revoked_id, KeyState.REVOKED)
    with pytest.raises(RevokedError):
        await rotate(keymanager, revoked_id)
    assert len((await keymanager.project(revoked_id)).keks) == 1


async def test_rotation_of_what_is_not_there(keymanager: Keymanager) -> None:
    with pytest.raises(NotFoundError):
        await rotate(keymanager, ProjectId.new())
    with pytest.raises(NotFoundError):
        await rewrap(keymanager, KeyConfigurationId.new())


async def make_projects(keymanager: Keymanager, cmk: str, count: int) -> tuple[KeyConfiguration, list[Project]]:
    configuration, workspace = await keymanager.bind(cmk)
    return configuration, [await keymanager.create_project(workspace) for _ in range(count)]


async def test_a_new_cmk_version_costs_one_call_per_kek(keymanager: Keymanager, cmk: str) -> None:
    configuration, projects = await make_projects(keymanager, cmk, 3)
    await rotate(keymanager, projects[0].project_id)
    configuration_id = configuration.key_configuration_id
    old = (await rewrap(keymanager, configuration_id, dry_run=True)).cmk_key_version
    new = await asyncio.to_thread(keymanager.tenant.customer.rotate, cmk)
    looked = await rewrap(keymanager, configuration_id, dry_run=True)
    assert (looked.keks, looked.outdated, looked.rewrapped, looked.cmk_key_version) == (4, 4, 0, new)
    assert re_encrypts(keymanager) == 0
    done = await rewrap(keymanager, configuration_id)
    assert (done.keks, done.outdated, done.rewrapped) == (4, 4, 4)
    assert re_encrypts(keymanager) == 4
    assert re_encrypts(keymanager, "keylake:canary-of") == 1 + 1  # the trial at the beginning, and now
    for project in projects:
        assert {version for _, version in versions(await keymanager.project(project.project_id))} == {new} != {old}
    assert (await rewrap(keymanager, configuration_id, dry_run=True)).outdated == 0
    recorded = await keymanager.audit("kek.rewrap")
    assert len(recorded) == 4
    assert {record["details"]["cmk_key_version"] for record in recorded} == {new}
    # The wraps that are stored now are good: nothing is left in memory of the old ones.
    keymanager.kill()
    await keymanager.start()
    async with keymanager.key_client() as keys:
        for project in projects:
            await keys.acquire(project.project_id, Losses())
            await (await Sealed.make(keys, project.project_id)).check(keys, project.project_id)


async def test_a_rewrap_that_is_killed_goes_on_where_it_stopped(keymanager: Keymanager, cmk: str) -> None:
    configuration, projects = await make_projects(keymanager, cmk, 12)
    configuration_id = configuration.key_configuration_id
    new = await asyncio.to_thread(keymanager.tenant.customer.rotate, cmk)

    async def rewrapped() -> int:
        return len(await keymanager.audit("kek.rewrap"))

    async def ask() -> None:
        with pytest.raises(KeylakeError):
            await rewrap(keymanager, configuration_id)

    asking = asyncio.create_task(ask())
    await wait_until(lambda: re_encrypts(keymanager) > 4)
    keymanager.kill()
    await asking
    await keymanager.start()
    before = await rewrapped()
    assert 0 < before < 12
    done = await rewrap(keymanager, configuration_id)
    assert done.outdated == done.rewrapped == 12 - before
    for project in projects:
        assert versions(await keymanager.project(project.project_id)) == [(1, new)]
    assert (await keymanager.verify_audit()).intact


async def test_a_rewrap_says_how_far_it_is(keymanager: Keymanager, cmk: str) -> None:
    configuration, _ = await make_projects(keymanager, cmk, 6)
    configuration_id = configuration.key_configuration_id
    await asyncio.to_thread(keymanager.tenant.customer.rotate, cmk)
    seen: list[tuple[int, int]] = []
    async with keymanager.client() as client:
        path = f"/v1/key-configurations/{configuration_id}"
        with keymanager.tenant.admin.during(Faults(latency_s=0.1, services=frozenset({Service.KMS}))):
            asked = asyncio.create_task(rewrap(keymanager, configuration_id))

            async def halfway() -> bool:
                now = await client.call(KeyConfiguration, "GET", path)
                seen.extend((work.done, work.total) for work in now.work if work.kind is KeyWorkKind.REWRAP)
                return asked.done() or any(done for done, _ in seen)

            await wait_until(halfway)
            assert (await asked).rewrapped == 6
        assert any(0 < done < total == 6 for done, total in seen)
        assert (await client.call(KeyConfiguration, "GET", path)).work == []


async def test_a_new_cmk_version_is_picked_up_by_itself(keymanager: Keymanager, cmk: str) -> None:
    keymanager.options["rotation_check_interval_s"] = 0.2
    keymanager.stop()
    await keymanager.start()
    project = await keymanager.new_project(cmk)
    await asyncio.sleep(0.5)  # nothing is outdated: nothing is to happen
    assert re_encrypts(keymanager) == 0
    new = await asyncio.to_thread(keymanager.tenant.customer.rotate, cmk)

    async def moved() -> bool:
        return versions(await keymanager.project(project.project_id)) == [(1, new)]

    await wait_until(moved)
    assert (await keymanager.audit("kek.rewrap"))[0]["actor"] == "keymanager/rotation"


async def test_the_canary_of_a_key_without_projects_is_wrapped_again_by_itself(
    keymanager: Keymanager, cmk: str
) -> None:
    """Or the customer could not do away with the old version: the watcher would take that for a no."""
    keymanager.options["rotation_check_interval_s"] = 0.2
    keymanager.stop()
    await keymanager.start()
    await keymanager.bind(cmk)
    new = await asyncio.to_thread(keymanager.tenant.customer.rotate, cmk)

    async def wrapped_again() -> bool:
        return bool(await keymanager.audit("canary.rewrap"))

    await wait_until(wrapped_again)
    [record] = await keymanager.audit("canary.rewrap")
    assert record["details"]["cmk_key_version"] == new
    # It is known after a restart, too, that there is nothing to do.
    keymanager.kill()
    await keymanager.start()
    looked = looks(keymanager)
    await wait_until(lambda: looks(keymanager) >= looked + 2)
    assert len(await keymanager.audit("canary.rewrap")) == 1


async def test_an_old_kek_is_replaced_by_itself(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    assert len(project.keks) == 1
    keymanager.options |= {"rotation_check_interval_s": 0.2, "kek_max_age_days": 2 / 86400}
    keymanager.stop()
    await keymanager.start()

    async def rotated() -> bool:
        return len((await keymanager.project(project.project_id)).keks) > 1

    await wait_until(rotated)
    assert (await keymanager.audit("kek.rotate"))[0]["actor"] == "keymanager/rotation"


async def test_a_kek_that_has_wrapped_much_is_replaced_by_itself(keymanager: Keymanager, cmk: str) -> None:
    keymanager.options |= {"rotation_check_interval_s": 0.2, "kek_max_wraps": WRAP_BLOCK}
    keymanager.stop()
    await keymanager.start()
    project_id = (await keymanager.new_project(cmk)).project_id
    looked = looks(keymanager)
    await wait_until(lambda: looks(keymanager) >= looked + 2)
    assert len((await keymanager.project(project_id)).keks) == 1  # nothing is counted yet
    async with keymanager.key_client() as keys:
        await keys.acquire(project_id, Losses())
        thing = await Sealed.make(keys, project_id)

        async def rotated() -> bool:
            return len((await keymanager.project(project_id)).keks) == 2

        await wait_until(rotated)
        assert (await Sealed.make(keys, project_id)).envelope.kek_version == 2
        await thing.check(keys, project_id)
    assert (await keymanager.audit("kek.rotate"))[0]["actor"] == "keymanager/rotation"


async def test_at_its_limit_a_kek_wraps_nothing_more_and_still_unwraps(
    keymanager: Keymanager, cmk: str, metadata_dsn: str
) -> None:
    project_id = (await keymanager.new_project(cmk)).project_id
    async with keymanager.key_client() as keys:
        await keys.acquire(project_id, Losses())
        before = await Sealed.make(keys, project_id)
    keymanager.stop()
    connection = await asyncpg.connect(metadata_dsn)
    await connection.execute("UPDATE keymanager.kek SET wraps_reserved = $1", MAX_WRAPS_PER_KEK - WRAP_BLOCK + 1)
    await connection.close()
    await keymanager.start()
    async with keymanager.key_client() as keys:
        await keys.acquire(project_id, Losses())
        with pytest.raises(ConflictError, match="has reached its usage limit"):
            await Sealed.make(keys, project_id)
        await before.check(keys, project_id)
        await rotate(keymanager, project_id)
        assert (await Sealed.make(keys, project_id)).envelope.kek_version == 2


async def test_one_who_may_not_rotate_is_refused(keymanager: Keymanager, cmk: str) -> None:
    from shared.auth import Scope
    from shared.errors import PermissionDeniedError

    project = await keymanager.new_project(cmk)
    async with keymanager.client(scopes=frozenset({Scope.WORKSPACE_ADMIN, Scope.ACCOUNT_ADMIN})) as client:
        for path in (
            f"/v1/projects/{project.project_id}/keks:rotate",
            f"/v1/key-configurations/{KeyConfigurationId.new()}:rewrap",
        ):
            with pytest.raises(PermissionDeniedError):
                await client.request("POST", path)
    assert len((await keymanager.project(project.project_id)).keks) == 1
