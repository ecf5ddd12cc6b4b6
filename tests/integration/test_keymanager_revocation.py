"""What happens to a project when its customer's key says no, says nothing, and says yes again."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import asyncpg
import pytest

from customercloud.faults import ErrorKind, Faults, Outage
from shared.api.keymanager import KeyConfiguration, KeyState, Project, RevokeRequest, Role
from shared.errors import ConflictError, RevokedError, SuspendedError, UnavailableError
from shared.lease import KeyLoss
from tests.fixtures.key_source_contract import Losses, named
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.fixtures.customercloud import StartCloud
    from tests.fixtures.keymanager import Keymanager

pytestmark = pytest.mark.integration


async def test_disabled_key_revokes_within_seconds_and_enabled_key_restores(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    losses, proxy_losses = Losses(), Losses()
    async with keymanager.key_client() as keys, keymanager.key_client(Role.PROXY) as proxy:
        lease = await keys.acquire(project.project_id, losses)
        proxy_lease = await proxy.acquire(project.project_id, proxy_losses)
        [(dek, envelope)] = await keys.generate(project.project_id, [thing := named()])
        sealed = dek.seal(bytes(12), b"row", b"")

        await asyncio.to_thread(keymanager.tenant.customer.disable, cmk)
        async with asyncio.timeout(5):
            await wait_until(lambda: not lease.live and not proxy_lease.live)
        with pytest.raises(RevokedError):
            lease.check()
        assert dek.wiped
        with pytest.raises(RevokedError):
            await keys.unwrap(project.project_id, [(thing, envelope)])
        revocation = await keymanager.wait_sealed(project.project_id)
        assert revocation.state is KeyState.REVOKED
        assert "DisabledException" in revocation.reason
        assert [i.outcome for i in revocation.instances] == ["acknowledged", "acknowledged"]
        assert all(i.after_s is not None and i.after_s < 2 for i in revocation.instances)
        assert revocation.instances[0].steps_s == {"dropped": 0.25}
        assert revocation.keks_dropped_after_s is not None
        assert revocation.sealed_after_s is not None
        assert revocation.keks_dropped_after_s <= revocation.sealed_after_s
        assert losses.seen[0].revocation_id == revocation.revocation_id
        assert (await keymanager.status()).plaintext_keks == []

        await asyncio.to_thread(keymanager.tenant.customer.enable, cmk)
        await keymanager.wait_state(project.project_id, KeyState.ACTIVE)
        await wait_until(lambda: lease.live and proxy_lease.live)
        [again] = await keys.unwrap(project.project_id, [(thing, envelope)])
        assert again.open(bytes(12), sealed, b"") == b"row"
    assert (await keymanager.verify_audit()).intact


async def test_scheduled_deletion_revokes_and_cancelling_it_restores(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    customer = keymanager.tenant.customer
    await asyncio.to_thread(customer.schedule_deletion, cmk)
    revoked = await keymanager.wait_state(project.project_id, KeyState.REVOKED, 5)
    assert "KMSInvalidStateException" in revoked.state_reason
    await asyncio.to_thread(customer.cancel_deletion, cmk)
    await asyncio.to_thread(customer.enable, cmk)
    await keymanager.wait_state(project.project_id, KeyState.ACTIVE)


async def test_policy_that_denies_our_role_revokes(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    customer, role = keymanager.tenant.customer, keymanager.tenant.role_arn
    await asyncio.to_thread(customer.deny_role, cmk, role)
    revoked = await keymanager.wait_state(project.project_id, KeyState.REVOKED, 5)
    assert "AccessDenied" in revoked.state_reason
    await asyncio.to_thread(customer.allow_role, cmk, role)
    await keymanager.wait_state(project.project_id, KeyState.ACTIVE)


async def test_only_projects_of_the_denied_key_are_revoked(keymanager: Keymanager, cmk: str) -> None:
    other_key = keymanager.tenant.customer.create_key(role_arn=keymanager.tenant.role_arn)
    denied, untouched = await keymanager.new_project(cmk), await keymanager.new_project(other_key)
    async with keymanager.key_client() as keys:
        lease = await keys.acquire(untouched.project_id, Losses())
        await asyncio.to_thread(keymanager.tenant.customer.disable, cmk)
        await keymanager.wait_sealed(denied.project_id)
        lease.check()
        assert (await keymanager.project(untouched.project_id)).state is KeyState.ACTIVE


async def test_unreachable_kms_suspends_after_the_grace_and_comes_back_by_itself(
    keymanager: Keymanager, cmk: str
) -> None:
    grace_s = 2.0
    project = await keymanager.new_project(cmk, outage_grace_s=grace_s)
    losses = Losses()
    async with keymanager.key_client() as keys:
        lease = await keys.acquire(project.project_id, losses)
        began_s = time.monotonic()
        with keymanager.tenant.admin.during(Faults(outage=Outage.REFUSE)):
            await wait_until(lambda: not lease.live)
            # The grace counts from the last yes, which was at most one probe interval before the outage.
            assert time.monotonic() - began_s > grace_s - 0.5
            suspended = await keymanager.project(project.project_id)
            assert suspended.state is KeyState.SUSPENDED
            with pytest.raises(SuspendedError):
                lease.check()
        await wait_until(lambda: lease.live)
    assert [loss.state for loss in losses.seen] == [KeyState.SUSPENDED]
    assert [r.state for r in await keymanager.revocations(project.project_id)] == [KeyState.SUSPENDED]


@pytest.mark.parametrize(
    "faults",
    [
        Faults(outage=Outage.HANG),
        Faults(throttle_rate=1.0),
        Faults(error_rate=1.0, error_kind=ErrorKind.KEY_UNAVAILABLE),
        Faults(error_rate=1.0, error_kind=ErrorKind.BAD_GATEWAY),
    ],
    ids=["hang", "throttled", "key-unavailable", "bad-gateway"],
)
async def test_no_answer_of_any_kind_suspends_and_never_revokes(
    keymanager: Keymanager, cmk: str, faults: Faults
) -> None:
    project = await keymanager.new_project(cmk)
    with keymanager.tenant.admin.during(faults):
        await keymanager.wait_state(project.project_id, KeyState.SUSPENDED, 15)
    await keymanager.wait_state(project.project_id, KeyState.ACTIVE)
    assert {r.state for r in await keymanager.revocations(project.project_id)} == {KeyState.SUSPENDED}


class Probes:
    """True when the cloud has seen so many more requests than when this was made."""

    def __init__(self, keymanager: Keymanager, more: int) -> None:
        self._admin = keymanager.tenant.admin
        self._enough = len(self._admin.audit_log()) + more

    def __call__(self) -> bool:
        return len(self._admin.audit_log()) >= self._enough


async def test_flapping_kms_within_the_grace_disturbs_nobody(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk, outage_grace_s=60, probe_interval_s=0.1)
    losses = Losses()
    async with keymanager.key_client() as keys:
        lease = await keys.acquire(project.project_id, losses)
        for _ in range(5):
            with keymanager.tenant.admin.during(Faults(error_rate=0.6, throttle_rate=0.2)):
                probed = Probes(keymanager, more=5)
                await wait_until(probed)
                lease.check()
    assert losses.seen == []
    assert await keymanager.revocations(project.project_id) == []


async def test_a_kms_that_takes_its_yes_back_is_not_believed_at_once_but_for_a_person(
    keymanager: Keymanager, cmk: str
) -> None:
    keymanager.stop()
    keymanager.options = {"restore_hold_s": 60.0}
    await keymanager.start()
    project, customer = await keymanager.new_project(cmk), keymanager.tenant.customer
    await asyncio.to_thread(customer.disable, cmk)
    await keymanager.wait_state(project.project_id, KeyState.REVOKED)
    await asyncio.to_thread(customer.enable, cmk)
    await keymanager.wait_state(project.project_id, KeyState.ACTIVE)
    await asyncio.to_thread(customer.disable, cmk)
    revoked = await keymanager.wait_state(project.project_id, KeyState.REVOKED)
    assert "DisabledException" in revoked.state_reason
    assert "60 s are left" in revoked.state_reason
    await asyncio.to_thread(customer.enable, cmk)
    async with keymanager.keylake() as client:

        async def says_yes() -> KeyConfiguration | None:
            [found] = await client.key_configurations()
            return found if found.last_verdict == "ALLOWED" else None

        held = await wait_until(says_yes)
        assert isinstance(held, KeyConfiguration)
        assert held.state is KeyState.REVOKED
        assert held.restore_hold is not None
        assert (held.restore_hold.flaps, held.restore_hold.needed_s) == (1, 60.0)
        await keymanager.wait_sealed(project.project_id)
        await client.revalidate(project.project_id)
        await keymanager.wait_state(project.project_id, KeyState.ACTIVE)
        assert (await client.key_configurations())[0].restore_hold is None


async def test_stopped_cloud_suspends_and_its_return_restores(keymanager: Keymanager, start_cloud: StartCloud) -> None:
    keymanager.stop()
    cloud = start_cloud()
    keymanager.tenant.close()
    from tests.fixtures.customercloud import new_tenant

    keymanager.tenant = new_tenant(cloud)
    await keymanager.start()
    key = keymanager.tenant.customer.create_key(role_arn=keymanager.tenant.role_arn)
    project = await keymanager.new_project(key)
    await asyncio.to_thread(cloud.stop, kill=True)
    await keymanager.wait_state(project.project_id, KeyState.SUSPENDED, 15)
    await asyncio.to_thread(cloud.start)
    await keymanager.wait_state(project.project_id, KeyState.ACTIVE, 15)


async def test_holder_that_does_not_answer_is_fenced_when_its_lease_is_over(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    never = asyncio.Event()

    async def hang(loss: KeyLoss) -> dict[str, float]:
        await never.wait()
        return {}

    async def fail(loss: KeyLoss) -> dict[str, float]:
        raise OSError("the volume is busy")

    async with (
        keymanager.key_client(node_id="pageserver-1") as good,
        keymanager.key_client(node_id="pageserver-2") as hanging,
        keymanager.key_client(Role.COMPUTE, node_id="compute-1") as failing,
    ):
        await good.acquire(project.project_id, Losses())
        await hanging.acquire(project.project_id, hang)
        await failing.acquire(project.project_id, fail)
        await asyncio.to_thread(keymanager.tenant.customer.disable, cmk)
        sealed = await keymanager.wait_sealed(project.project_id)
    outcomes = {instance.node_id: instance.outcome for instance in sealed.instances}
    assert outcomes == {"pageserver-1": "acknowledged", "pageserver-2": "fenced", "compute-1": "fenced"}
    fenced_after = [i.after_s for i in sealed.instances if i.outcome == "fenced"]
    assert all(after is not None and 1.0 < after < 3.5 for after in fenced_after)  # ttl is 2 s, renewed every 0.67 s


async def test_holder_that_acknowledges_and_is_gone_does_not_hold_up_the_seal(keymanager: Keymanager, cmk: str) -> None:
    """A newer instance of its node ends its session while the database is still busy with the acknowledgement."""
    project = await keymanager.new_project(cmk)
    revoked, acknowledge = asyncio.Event(), asyncio.Event()

    async def on_loss(loss: KeyLoss) -> dict[str, float]:
        revoked.set()
        await acknowledge.wait()
        return {}

    database = await asyncpg.connect(keymanager.dsn)
    waiting = (
        "select count(*) from pg_locks where relation = 'keymanager.revocation_instance'::regclass and not granted"
    )
    try:
        async with keymanager.key_client(node_id="short-lived") as keys:
            await keys.acquire(project.project_id, on_loss)
            await asyncio.to_thread(keymanager.tenant.customer.disable, cmk)
            await revoked.wait()
            async with database.transaction():
                await database.execute("lock table keymanager.revocation_instance in access exclusive mode")
                acknowledge.set()
                await wait_until(lambda: database.fetchval(waiting), 10)
                async with keymanager.key_client(node_id="short-lived"):
                    await keys.wait_replaced()
        revocation = await keymanager.wait_sealed(project.project_id)
        assert [i.outcome for i in revocation.instances] == ["acknowledged"]
        await asyncio.to_thread(keymanager.tenant.customer.enable, cmk)
        await keymanager.wait_state(project.project_id, KeyState.ACTIVE)
    finally:
        await database.close()


async def test_keymanager_killed_during_fan_out_finishes_it_after_its_restart(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    released = asyncio.Event()
    calls: list[str | None] = []

    async def slow(loss: KeyLoss) -> dict[str, float]:
        calls.append(loss.revocation_id)
        await released.wait()
        return {"unmounted": 0.5}

    losses = Losses()
    async with keymanager.key_client(node_id="pageserver-1") as slow_keys:
        await slow_keys.acquire(project.project_id, slow)
        async with keymanager.key_client(node_id="pageserver-2") as keys:
            await keys.acquire(project.project_id, losses)
            await asyncio.to_thread(keymanager.tenant.customer.disable, cmk)
            await wait_until(lambda: calls and losses.seen)
            # It is pushed before it is stored, and what is not stored the next keymanager finds out for itself.
            await wait_until(lambda: keymanager.revocations(project.project_id))
            keymanager.kill()
        half_way = calls[0]
        released.set()
        await keymanager.start()
        sealed = await keymanager.wait_sealed(project.project_id)
        assert sealed.revocation_id == half_way
        by_node = {instance.node_id: instance for instance in sealed.instances}
        assert by_node["pageserver-1"].outcome == "acknowledged"
        assert by_node["pageserver-1"].steps_s == {"unmounted": 0.5}
        assert set(calls) == {half_way}
        assert (await keymanager.project(project.project_id)).state is KeyState.REVOKED
        with pytest.raises(RevokedError):
            slow_keys.leases()[0].check()
    assert (await keymanager.verify_audit()).intact


async def test_denial_while_the_keymanager_was_down_is_found_before_anything_is_issued(
    keymanager: Keymanager, cmk: str
) -> None:
    project = await keymanager.new_project(cmk)
    keymanager.kill()
    await asyncio.to_thread(keymanager.tenant.customer.disable, cmk)
    await keymanager.start()
    assert (await keymanager.project(project.project_id)).state is KeyState.REVOKED
    async with keymanager.key_client() as keys:
        with pytest.raises(RevokedError):
            await keys.acquire(project.project_id, Losses())


async def test_metadata_of_before_the_denial_is_nobodys_yes(
    keymanager: Keymanager, cmk: str, metadata_server: str
) -> None:
    """The database is put back to a copy of when the project was ACTIVE, with a grace that is far from over. So is, in
    it, who held which lease. A keymanager that starts from it has to hear the KMS first."""
    project = await keymanager.new_project(cmk, outage_grace_s=600)
    customer, admin = keymanager.tenant.customer, keymanager.tenant.admin
    server = await asyncpg.connect(f"{metadata_server}/postgres")
    name = keymanager.dsn.rpartition("/")[2]
    async with keymanager.key_client() as keys, keymanager.key_client(node_id="pageserver-2") as other:
        lease = await keys.acquire(project.project_id, Losses())
        keymanager.stop()  # a database that is copied has no clients
        await server.execute(f"CREATE DATABASE {name}_copy TEMPLATE {name}")
        await keymanager.start()
        await asyncio.to_thread(customer.disable, cmk)
        await keymanager.wait_state(project.project_id, KeyState.REVOKED)
        keymanager.kill()
        try:
            keymanager.dsn = f"{metadata_server}/{name}_copy"
            with admin.during(Faults(outage=Outage.REFUSE)):
                await keymanager.start()
                assert (await keymanager.project(project.project_id)).state is KeyState.ACTIVE
                with pytest.raises(UnavailableError, match="not said yes"):
                    await other.acquire(project.project_id, Losses())
                assert not lease.live
            await keymanager.wait_state(project.project_id, KeyState.REVOKED)
            with pytest.raises(RevokedError):
                await other.acquire(project.project_id, Losses())
            assert not lease.live
            keymanager.stop()
        finally:
            await server.execute(f"DROP DATABASE {name}_copy WITH (FORCE)")
            await server.close()


async def test_leases_of_before_a_restart_count_as_live_for_a_whole_ttl(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    lost = Losses()
    async with keymanager.key_client(node_id="pageserver-9") as keys:
        await keys.acquire(project.project_id, lost)
        keymanager.kill()
        await asyncio.to_thread(keymanager.tenant.customer.disable, cmk)
    # pageserver-9 is gone without a word, while nobody listened.
    restarted_s = time.monotonic()
    await keymanager.start()
    sealed = await keymanager.wait_sealed(project.project_id)
    assert [(i.node_id, i.outcome) for i in sealed.instances] == [("pageserver-9", "fenced")]
    assert time.monotonic() - restarted_s > keymanager.lease_ttl_s


async def test_operators_hold_is_lifted_by_the_operator_only(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    async with keymanager.client() as client:
        path = f"/v1/projects/{project.project_id}"
        await client.request("POST", f"{path}:revoke", body=RevokeRequest(reason="an incident"))
        await keymanager.wait_sealed(project.project_id)
        after = await client.call(Project, "POST", f"{path}:revalidate")  # the KMS says yes; the operator does not
        assert (after.state, after.state_reason) == (KeyState.REVOKED, "an incident")
        await client.request("POST", f"{path}:restore")
        await keymanager.wait_state(project.project_id, KeyState.ACTIVE)
        with pytest.raises(ConflictError):
            await client.request("POST", f"{path}:restore")


async def test_an_operators_hold_on_what_the_kms_denies_outlives_a_restart(keymanager: Keymanager, cmk: str) -> None:
    """It changes no state when it is said."""
    project = await keymanager.new_project(cmk)
    path = f"/v1/projects/{project.project_id}"
    await asyncio.to_thread(keymanager.tenant.customer.disable, cmk)
    await keymanager.wait_sealed(project.project_id)
    async with keymanager.client() as client:
        await client.request("POST", f"{path}:revoke", body=RevokeRequest(reason="an incident"))
    keymanager.kill()
    await asyncio.to_thread(keymanager.tenant.customer.enable, cmk)
    await keymanager.start()
    async with keymanager.client() as client:
        assert (await client.call(Project, "POST", f"{path}:revalidate")).state is KeyState.REVOKED
        await client.request("POST", f"{path}:restore")
        await keymanager.wait_state(project.project_id, KeyState.ACTIVE)


async def test_revalidate_answers_when_a_return_is_in_force(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    path = f"/v1/projects/{project.project_id}:revalidate"
    async with keymanager.client() as client:
        for _ in range(5):
            await asyncio.to_thread(keymanager.tenant.customer.disable, cmk)
            assert (await client.call(Project, "POST", path)).state is KeyState.REVOKED
            await keymanager.wait_sealed(project.project_id)
            await asyncio.to_thread(keymanager.tenant.customer.enable, cmk)
            assert (await client.call(Project, "POST", path)).state is KeyState.ACTIVE


async def test_revalidate_finds_a_denial_long_before_the_next_probe(keymanager: Keymanager, cmk: str) -> None:
    _, workspace = await keymanager.bind(cmk, probe_interval_s=3600)
    project = await keymanager.create_project(workspace)
    await asyncio.to_thread(keymanager.tenant.customer.disable, cmk)
    async with keymanager.client() as client:
        began_s = time.monotonic()
        after = await client.call(Project, "POST", f"/v1/projects/{project.project_id}:revalidate")
        assert time.monotonic() - began_s < 2
        assert after.state is KeyState.REVOKED
        await asyncio.to_thread(keymanager.tenant.customer.enable, cmk)
        await client.request("POST", f"/v1/workspaces/{workspace.workspace_id}:revalidate")
        await keymanager.wait_state(project.project_id, KeyState.ACTIVE)


async def test_many_who_ask_share_one_probe_that_is_newer_than_their_question(keymanager: Keymanager, cmk: str) -> None:
    _, workspace = await keymanager.bind(cmk, probe_interval_s=3600)
    project = await keymanager.create_project(workspace)
    tenant, path = keymanager.tenant, f"/v1/projects/{project.project_id}:revalidate"
    slow = Faults(latency_s=0.5, spared_access_key_ids=frozenset({tenant.names.customer.access_key_id}))
    async with keymanager.client() as client:

        async def ask() -> Project:
            return await client.call(Project, "POST", path)

        def probes() -> int:
            return sum(record["eventName"] == "Decrypt" for record in tenant.admin.audit_log())

        before = probes()
        with tenant.admin.during(slow):
            first = asyncio.create_task(ask())
            await wait_until(first_is_asked(keymanager, project))
            many = [asyncio.create_task(ask()) for _ in range(20)]
            assert {(await each).state for each in [first, *many]} == {KeyState.ACTIVE}
            assert 1 <= probes() - before <= 3
            # It is under way, and will say yes: that must not be the answer to who asks after the customer's no.
            early = asyncio.create_task(ask())
            await asyncio.to_thread(tenant.customer.disable, cmk)
            assert (await ask()).state is KeyState.REVOKED
            await early
        # Nobody asks the KMS for an operator's word.
        with tenant.admin.during(Faults(outage=Outage.HANG)):
            await client.request(
                "POST", f"/v1/projects/{project.project_id}:revoke", body=RevokeRequest(reason="x"), timeout_s=1
            )


def first_is_asked(keymanager: Keymanager, project: Project) -> Callable[[], Awaitable[bool]]:
    """It stands in the audit chain before the KMS is asked."""

    async def look() -> bool:
        records = await keymanager.audit("project.revalidate")
        return any(record["project_id"] == str(project.project_id) for record in records)

    return look


async def test_failing_unwrap_on_the_data_path_makes_the_watcher_look(keymanager: Keymanager, cmk: str) -> None:
    _, workspace = await keymanager.bind(cmk, probe_interval_s=3600)
    project = await keymanager.create_project(workspace)
    keymanager.stop()  # so that the KEK is not in memory
    await keymanager.start()
    losses = Losses()
    async with keymanager.key_client() as keys:
        lease = await keys.acquire(project.project_id, losses)
        await asyncio.to_thread(keymanager.tenant.customer.disable, cmk)
        with pytest.raises((UnavailableError, RevokedError)):
            await keys.generate(project.project_id, [named()])
        await wait_until(lambda: not lease.live, 5)
        await wait_until(lambda: losses.seen, 5)
    assert losses.seen[0].state is KeyState.REVOKED
