"""Both sides of the trust boundary, on each of the three clouds: a real keymanager, the cloud's own log, every call."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

import asyncpg
import pytest

from customercloud.faults import Outage
from keylake import audit_file
from keylake.cli.reconcile import live_calls
from keylake.cluster import Customer
from keylake.reconcile.core import Kind, Window
from keylake.reconcile.logs import SIGN_INS, calls_of, read_log
from keylake.reconcile.run import OurSide, Report, compare_now, reach
from keymanager.kms.base import KmsCall
from shared.api.keymanager import CreateKeyConfiguration, CreateWorkspace, KeyConfiguration, KeyState, Rewrap, Workspace
from shared.crypto.context import EncryptionContext
from shared.kms_log import LoggedCall, Recorded
from tests.fixtures.key_source_contract import Losses, named
from tests.fixtures.keymanager import Keymanager, special_keymanager
from tests.fixtures.kms_clouds import CUSTOMERS
from tests.fixtures.kms_customer_aws import aws_customer
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from tests.fixtures.customercloud import CloudProcess
    from tests.fixtures.keymanager import Trust
    from tests.fixtures.kms_clouds import KmsClouds
    from tests.fixtures.kms_customer_aws import AwsCustomer
    from tests.fixtures.kms_customer_azure import AzureCustomer
    from tests.fixtures.kms_customer_google import GoogleCustomer
    from tests.fixtures.kms_customer_openbao import OpenBaoCustomer

    LoggingCustomer = AwsCustomer | AzureCustomer | GoogleCustomer | OpenBaoCustomer

pytestmark = pytest.mark.integration


@pytest.fixture(params=sorted(CUSTOMERS))
def customer(request: pytest.FixtureRequest, kms_clouds: KmsClouds) -> Iterator[LoggingCustomer]:
    with CUSTOMERS[request.param](kms_clouds) as made:
        yield cast("LoggingCustomer", made)


@pytest.fixture
async def manager(
    customer: LoggingCustomer, tmp_path: Path, trust: Trust, metadata_dsn: str, shared_cloud: CloudProcess
) -> AsyncIterator[Keymanager]:
    options = {"kms_deadline_s": 3.0, "kms_read_timeout_s": 2.0, **customer.keymanager_settings}
    async with special_keymanager(tmp_path, trust, metadata_dsn, shared_cloud, **options) as made:
        await made.start()
        yield made


async def compare(manager: Keymanager, customer: LoggingCustomer, in_flight_s: float = 10) -> Report:
    """`in_flight_s`: how long to wait for records of calls that were just made; all of it when there is a finding."""
    cloud = customer.name

    async def log(recorded: Recorded) -> Sequence[LoggedCall]:
        return list(calls_of(await asyncio.to_thread(customer.audit_records), cloud, recorded))

    async with manager.keylake() as keylake:
        return await compare_now(keylake, log, cloud, in_flight=timedelta(seconds=in_flight_s))


def kinds(report: Report) -> list[Kind]:
    return [finding.kind for finding in report.result.findings]


def write_log(path: Path, customer: LoggingCustomer) -> Path:
    """As the vendor's tools write it."""
    records = customer.audit_records()
    match customer.name:
        case "aws":
            path.write_text(json.dumps({"Records": records}))
        case "azure" | "openbao":
            path.write_text("".join(json.dumps(record) + "\r\n" for record in records))
        case "google":
            path.write_text(json.dumps(records, indent=2))
    return path


async def test_every_call_stands_on_both_sides_until_one_is_smuggled_in(
    manager: Keymanager, customer: LoggingCustomer, tmp_path: Path
) -> None:
    # A life: made, used, denied, back, rotated, restarted; a probe each 0.2 s, and the customer at its own key.
    body = CreateKeyConfiguration(name=f"kc-{secrets.token_hex(4)}", key=customer.cmk, probe_interval_s=0.2)
    async with manager.client() as http:
        configuration = await http.call(KeyConfiguration, "POST", "/v1/key-configurations", body=body)
        in_it = CreateWorkspace(name="w", key_configuration_id=configuration.key_configuration_id)
        workspace = await http.call(Workspace, "POST", "/v1/workspaces", body=in_it)
        project_id = (await manager.create_project(workspace)).project_id
        await asyncio.to_thread(customer.disable)
        await manager.wait_state(project_id, KeyState.REVOKED)
        await asyncio.to_thread(customer.enable)
        await manager.wait_state(project_id, KeyState.ACTIVE)
        await asyncio.to_thread(customer.rotate)
        await http.call(
            Rewrap, "POST", f"/v1/key-configurations/{configuration.key_configuration_id}:rewrap", timeout_s=30
        )
    assert manager.stop() == 0
    await manager.start()
    async with manager.key_client() as keys:
        await keys.acquire(project_id, Losses())
        await keys.generate(project_id, [named()])

    before = await compare(manager, customer)
    assert before.result.findings == []
    assert before.agrees
    assert before.result.joined >= 10
    assert before.result.administration >= 3
    assert (before.result.maybe, before.result.explained, before.result.forgotten) == (0, 0, 0)
    assert list(before.keys) == [customer.cmk.identifier]

    # From files, without a service: the same.
    async with manager.keylake() as keylake:
        with audit_file.output(tmp_path / "audit.jsonl") as out:
            await audit_file.export(keylake.audit, 0, out, lambda _: None)
    side = OurSide()
    side.read_file(tmp_path / "audit.jsonl")
    cloud, theirs = await asyncio.to_thread(
        lambda: read_log(write_log(tmp_path / "log.json", customer), side.ours.recorded)
    )
    assert cloud == customer.name
    # Their log was written later than ours.
    window = reach(theirs, Window(until=max(call.at for call in side.ours.by_id.values()) - timedelta(seconds=1)))
    assert side.compare(theirs, cloud, (), window).result.findings == []

    # With our credentials, but not by our keymanager.
    provider = customer.provider()
    try:
        await provider.generate_kek(EncryptionContext({"a": "b"}))
    finally:
        await provider.aclose()
    smuggled = await compare(manager, customer, 1)
    assert set(kinds(smuggled)) == {Kind.NOT_RECORDED}
    for finding in smuggled.result.findings:
        assert (finding.key, finding.principal) == (customer.cmk.identifier, customer.cmk.principal)
    uses = {finding.operation for finding in smuggled.result.findings}
    assert uses & {"GenerateDataKey", "WrapKey", "Encrypt"}

    # By somebody else.
    stranger = await asyncio.to_thread(customer.use_as_stranger)
    used = await compare(manager, customer, 1)
    [by_other] = [finding for finding in used.result.findings if finding.kind is Kind.OTHER_PRINCIPAL]
    assert stranger in by_other.principal
    assert by_other.key == customer.cmk.identifier

    # On our side: a record too many (with a chain that fits itself), and one too few.
    connection = await asyncpg.connect(manager.dsn, server_settings={"search_path": "keymanager"})
    try:
        async with manager.keylake() as keylake:
            records = await keylake.audit(limit=1000, complete=True)
        [made] = [record for record in records if record.action == "project.create"]
        changed = made.details | {"kms_request_id": str(secrets.token_hex(16))}
        await connection.execute(
            "UPDATE audit SET details = $2 WHERE sequence = $1", made.sequence, json.dumps(changed)
        )
        forged = await compare(manager, customer, 1)
        assert forged.chain_problem is not None
        assert f"record {made.sequence} was altered" in forged.chain_problem
        assert kinds(forged).count(Kind.NOT_LOGGED) == 1

        group = next(record for record in records if record.action == "kms.calls")
        await connection.execute("DELETE FROM audit WHERE sequence = $1", group.sequence)
        removed = await compare(manager, customer, 1)
        assert not removed.agrees
        assert f"record {made.sequence} was altered" in (removed.chain_problem or "")
        lost = {call[2] for call in json.loads(group.details["calls"]) if call[1] not in SIGN_INS}
        found = {finding.request_id for finding in removed.result.findings if finding.kind is Kind.NOT_RECORDED}
        assert found & lost
    finally:
        await connection.close()


async def test_the_local_clusters_customer_has_the_logs_of_all_its_clouds(
    customer: LoggingCustomer, kms_clouds: KmsClouds
) -> None:
    """What `keylake audit reconcile` reads when it is given no file."""
    made: list[KmsCall] = []
    provider = customer.provider(made.append)
    try:
        await provider.generate_kek(EncryptionContext({"a": "b"}))
    finally:
        await provider.aclose()
    cloud = kms_clouds.customercloud

    def read() -> list[LoggedCall]:
        with aws_customer(cloud) as aws:
            local = Customer(aws.names, cloud.endpoint, cloud.admin())
            try:
                return live_calls(local, lambda _: None)
            finally:
                local.close()

    if customer.name in ("azure", "google"):  # the others have a log of their own
        logged = await asyncio.to_thread(read)
        uses = {call.request_id for call in logged if call.key == customer.cmk.identifier}
        assert {call.request_id for call in made if call.operation in ("Encrypt", "WrapKey")} & uses


def test_keys_of_every_cloud_are_compared_together() -> None:
    side = OurSide()
    side.ours.providers.update({"a": "aws", "z": "azure", "g": "google", "o": "openbao"})
    assert list(side.compare([], None, (), Window()).keys) == ["a", "g", "o", "z"]
    assert list(side.compare([], "google", (), Window()).keys) == ["g"]


async def test_a_killed_keymanager_leaves_calls_that_are_named_and_an_outage_leaves_none(
    manager: Keymanager, customer: LoggingCustomer
) -> None:
    body = CreateKeyConfiguration(name="kc", key=customer.cmk, probe_interval_s=0.2, outage_grace_s=3600)
    async with manager.client() as http:
        await http.call(KeyConfiguration, "POST", "/v1/key-configurations", body=body)

    async def verdict(word: str) -> None:
        async def reached() -> bool:
            async with manager.client() as http:
                [found] = (await http.request("GET", "/v1/key-configurations")).json()
            return word in found["last_verdict"]

        await wait_until(reached)

    await asyncio.to_thread(customer.outage, Outage.HANG)
    await verdict("UNREACHABLE")
    await asyncio.to_thread(customer.outage, Outage.NONE)
    await verdict("ALLOWED")
    after_outage = await compare(manager, customer)
    assert after_outage.result.findings == []
    assert after_outage.result.maybe + after_outage.result.explained > 0

    calls = after_outage.result.joined
    manager.kill()
    await manager.start()
    killed = await compare(manager, customer, 1)
    assert killed.chain_problem is None
    assert killed.result.joined > calls
    assert set(kinds(killed)) <= {Kind.NOT_RECORDED}
