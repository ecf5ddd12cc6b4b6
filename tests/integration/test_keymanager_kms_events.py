"""The customer's cloud says that something happened to a key. Only that can have caused what follows: by itself, the
keymanager looks every ten minutes here."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import httpx
import pytest

from customercloud.aws.event_bridge import EventTarget
from customercloud.faults import Faults, Outage
from keymanager.kms_events import MAX_EVENT_SIZE_BYTES
from shared.api.keymanager import (
    CreateKeyConfiguration,
    CreateWorkspace,
    IssuedToken,
    KeyConfiguration,
    KeyState,
    RegisterToken,
    Workspace,
)
from shared.auth import PersonRole
from shared.ids import TokenId
from shared.service import MAX_BODY_SIZE_BYTES
from shared.tls import client_context, service_host_name
from tests.fixtures import cloud_events
from tests.fixtures.keymanager import Keymanager, special_keymanager
from tests.fixtures.kms_clouds import CUSTOMERS, KmsClouds
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from shared.auth import TokenIssuer
    from tests.fixtures.customercloud import CloudProcess
    from tests.fixtures.keymanager import Trust
    from tests.fixtures.kms_customer_azure import AzureCustomer
    from tests.fixtures.kms_customer_google import GoogleCustomer

pytestmark = pytest.mark.integration

SELDOM_S: Final = 600.0
PATH: Final = "/v1/kms-events"
HOST: Final = service_host_name("keymanager")
CHANGES: Final = {"azure": {"KeyUpdate"}, "google": {"UpdateCryptoKeyVersion"}}


def signed(issuer: TokenIssuer, role: PersonRole = PersonRole.KMS_NOTIFIER, **options: Any) -> str:
    return issuer.issue_for_person(role, subject="the relay", ttl_s=options.pop("ttl_s", 600), **options)


async def issued(keymanager: Keymanager, role: PersonRole = PersonRole.KMS_NOTIFIER, **options: Any) -> str:
    """A token that is in force."""
    return (await registered(keymanager, signed(keymanager.trust.admin, role, **options)))[0]


async def registered(keymanager: Keymanager, token: str) -> tuple[str, TokenId]:
    async with keymanager.client() as client:
        found = await client.call(IssuedToken, "POST", "/v1/tokens", body=RegisterToken(token=token))
    return token, found.token_id


@asynccontextmanager
async def http(keymanager: Keymanager) -> AsyncIterator[Callable[..., Any]]:
    """`post(token, event, path)`; an event is bytes, or becomes JSON."""
    trusted = client_context(keymanager.trust.ca_certificate)
    async with httpx.AsyncClient(
        base_url=f"https://{keymanager.address}", verify=trusted, trust_env=False, timeout=20
    ) as client:

        async def post(token: str | None, event: Any, path: str = PATH, method: str = "POST") -> httpx.Response:
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            content = event if isinstance(event, bytes) else json.dumps(event).encode()
            extensions = {"sni_hostname": HOST}
            return await client.request(method, path, content=content, headers=headers, extensions=extensions)

        yield post


async def test_what_the_cloud_says_is_acted_on_at_once(keymanager: Keymanager, cmk: str) -> None:
    """AWS, from the customer's call to the state of the project."""
    configuration, workspace = await keymanager.bind(cmk, probe_interval_s=SELDOM_S)
    project = await keymanager.create_project(workspace)
    tenant = keymanager.tenant
    customer = tenant.customer
    token, token_id = await registered(keymanager, signed(keymanager.trust.admin))
    target = EventTarget(
        url=f"https://{keymanager.address}{PATH}",
        token=token,
        ca_certificate=keymanager.trust.ca_certificate.read_text(),
        server_name=HOST,
    )
    assert token not in repr(target)
    await asyncio.to_thread(tenant.admin.put_event_target, tenant.account_id, target)

    await asyncio.to_thread(customer.disable, cmk)
    revoked = await keymanager.wait_state(project.project_id, KeyState.REVOKED)
    assert "DisabledException" in revoked.state_reason
    await asyncio.to_thread(customer.enable, cmk)
    await keymanager.wait_state(project.project_id, KeyState.ACTIVE)

    # The cloud tries again while nobody listens.
    assert keymanager.stop() == 0
    await asyncio.to_thread(customer.deny_role, cmk, tenant.role_arn)
    await asyncio.to_thread(tenant.admin.delete_event_target, tenant.account_id)  # what is under way goes on
    await keymanager.start()

    async def arrived() -> list[dict[str, Any]]:
        records = await keymanager.audit("kms.event")
        return [record for record in records if record["details"]["event"] == "aws PutKeyPolicy"]

    await wait_until(arrived)
    records = await keymanager.audit("kms.event")
    kinds = dict.fromkeys(record["details"]["event"] for record in records)  # each arrives once at least
    assert list(kinds) == ["aws DisableKey", "aws EnableKey", "aws PutKeyPolicy"]
    for record in records:
        assert record["actor"] == f"admin:the relay:{token_id}"
        assert (record["outcome"], record["project_id"]) == ("probe", None)
        assert record["details"].keys() == {"key_configuration_id", "event"}, "and nothing else of the body"
        assert record["details"]["key_configuration_id"] == str(configuration.key_configuration_id)
    assert (await keymanager.verify_audit()).intact
    # Without a target nothing is sent.
    await asyncio.to_thread(customer.allow_role, cmk, tenant.role_arn)
    assert await keymanager.audit("kms.event") == records


@pytest.fixture(params=["azure", "google"])
def customer(request: pytest.FixtureRequest, kms_clouds: KmsClouds) -> Iterator[AzureCustomer | GoogleCustomer]:
    with CUSTOMERS[request.param](kms_clouds) as made:
        yield made  # type: ignore[misc]


async def test_the_other_clouds_logs_are_events_too(
    customer: AzureCustomer | GoogleCustomer,
    tmp_path: Path,
    trust: Trust,
    metadata_dsn: str,
    shared_cloud: CloudProcess,
) -> None:
    """Every record of the customer's own log, as Azure Monitor or Pub/Sub would send it: one of them is the change."""
    options = {"kms_deadline_s": 3.0, "kms_read_timeout_s": 2.0, **customer.keymanager_settings}

    def event(record: dict[str, Any]) -> Any:
        if customer.name == "azure":
            return {"records": [record]}
        return {"message": {"data": base64.b64encode(json.dumps(record).encode()).decode(), "messageId": "1"}}

    async with special_keymanager(tmp_path, trust, metadata_dsn, shared_cloud, **options) as manager:
        await manager.start()
        async with manager.client() as client, http(manager) as post:
            body = CreateKeyConfiguration(name="kc", key=customer.cmk, probe_interval_s=SELDOM_S)
            configuration = await client.call(KeyConfiguration, "POST", "/v1/key-configurations", body=body)
            wanted = CreateWorkspace(name="ws", key_configuration_id=configuration.key_configuration_id)
            project = await manager.create_project(await client.call(Workspace, "POST", "/v1/workspaces", body=wanted))
            token = await issued(manager)
            for change, state in ((customer.disable, KeyState.REVOKED), (customer.enable, KeyState.ACTIVE)):
                before = len(await asyncio.to_thread(customer.audit_records))
                await asyncio.to_thread(change)
                records = (await asyncio.to_thread(customer.audit_records))[before:]
                answers = [(await post(token, event(record))).json() for record in records]
                assert {"probed": 1} in answers
                await manager.wait_state(project.project_id, state)
            # Uses are in that log, too, our own probes among them: none of them is followed by another probe.
            changes = {record["details"]["event"] for record in await manager.audit("kms.event")}
            assert changes == {f"{customer.name} {operation}" for operation in CHANGES[customer.name]}


async def test_only_a_notifier_and_the_owner_are_heard(keymanager: Keymanager, cmk: str) -> None:
    await keymanager.bind(cmk, probe_interval_s=SELDOM_S)
    trust, event = keymanager.trust, cloud_events.deletion() | {"resources": [cmk]}
    notifier, notifier_id = await registered(keymanager, signed(trust.admin))
    wrong = {
        "none": (None, 401),
        "no token": ("x", 401),
        "a stranger's": (signed(trust.stranger), 401),
        "not registered": (signed(trust.admin), 401),
        "expired": (signed(trust.admin, ttl_s=-60), 401),
        **{f"a {role}'s": (await issued(keymanager, role), 403) for role in PersonRole if role != "kms-notifier"},
    }
    async with http(keymanager) as post:
        for name, (token, status) in wrong.items():
            for body in (event, b"no event"):
                assert (await post(token, body)).status_code == status, name
        assert await keymanager.audit("kms.event") == []
        denied = await keymanager.audit("admin.denied")
        assert {record["details"]["needs"] for record in denied} == {"kms:notify"}

        good = await post(notifier, event)
        assert (good.status_code, good.json()) == (202, {"probed": 1})
        owner = trust.admin.issue(keymanager.client()._service, trust.admin.scopes)
        assert (await post(owner, event)).json() == {"probed": 1}
        # A notifier does nothing else.
        for path in ("/v1/projects", "/v1/key-configurations", "/v1/workspaces", "/v1/audit", "/v1/status", "/metrics"):
            assert (await post(notifier, b"", path, "GET")).status_code == 403, path
        async with keymanager.client() as client:
            await client.request("POST", f"/v1/tokens/{notifier_id}:revoke")
        assert (await post(notifier, event)).status_code == 401


async def test_an_event_tells_nobody_anything_and_a_bad_one_is_refused(keymanager: Keymanager, cmk: str) -> None:
    await keymanager.bind(cmk, probe_interval_s=SELDOM_S)
    async with http(keymanager) as post:
        token = await issued(keymanager)
        unknown: list[Any] = [cloud_events.cloudtrail(), [cloud_events.grid()], cloud_events.record("KeyUpdate")]
        unknown += [
            cloud_events.push(cloud_events.entry()),
            cloud_events.cloudtrail(eventName="Decrypt", readOnly=True),
        ]
        # With nobody at the KMS who could answer: none of this asks it.
        with keymanager.tenant.admin.during(Faults(outage=Outage.HANG)):
            for event in unknown:
                answer = await post(token, event)
                assert (answer.status_code, answer.json()) == (202, {"probed": 0}), event
        assert await keymanager.audit("kms.event") == []
        handshake = [cloud_events.grid("Microsoft.EventGrid.SubscriptionValidationEvent", validationCode="512d38b6")]
        shaken = await post(token, handshake)
        assert (shaken.status_code, shaken.json()) == (200, {"validationResponse": "512d38b6"})
        for body in (b"", b"sesame", b"[]", b"{}", b'{"message": {"data": "sesame!"}}', b"[" * 100_000, b"\xff"):
            refused = await post(token, body)
            assert (refused.status_code, refused.json()["code"]) == (400, "invalid_input"), body[:20]
            assert "sesame" not in refused.text
        for size, status in ((MAX_EVENT_SIZE_BYTES + 1, 400), (MAX_BODY_SIZE_BYTES + 1, 413)):
            assert (await post(token, b" " * size)).status_code == status
