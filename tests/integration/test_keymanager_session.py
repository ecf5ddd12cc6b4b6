"""Key sessions, from outside: who may open one, what may be said in it, and what ends it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from customercloud.faults import Faults, Outage
from customercloud.faults import Service as CloudService
from shared.api.keymanager import (
    CLOSE_PERMISSION_DENIED,
    CLOSE_PROTOCOL,
    CLOSE_REPLACED,
    CLOSE_SLOW,
    CLOSE_UNAUTHENTICATED,
    SERVER_MESSAGE,
    Acknowledge,
    Authenticate,
    Failed,
    Generate,
    Hello,
    Keys,
    Renew,
    Renewed,
    Role,
    ServerMessage,
    Unwrap,
    Welcome,
    WrappedObject,
)
from shared.auth import Scope, Service, TokenIssuer
from shared.crypto.transport import KeyTransport
from shared.errors import (
    IntegrityError,
    LeaseExpiredError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from shared.ids import InstanceId, ProjectId
from shared.keyclient import KeyClient
from shared.keysession import ReplacedError, session_tokens
from shared.tls import client_context
from tests.fixtures.key_source_contract import Losses, named
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from tests.fixtures.keymanager import Keymanager

pytestmark = pytest.mark.integration


@asynccontextmanager
async def raw_socket(keymanager: Keymanager, token: str | None) -> AsyncIterator[ClientConnection]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with connect(
        "wss://keymanager.keylake/v1/session",
        host="127.0.0.1",
        port=keymanager.port,
        ssl=client_context(keymanager.trust.ca_certificate),
        additional_headers=headers,
        ping_interval=None,
        close_timeout=1,
        compression=None,
    ) as connection:
        yield connection


def token_of(keymanager: Keymanager, role: Role = Role.PAGESERVER, **options: Any) -> str:
    issuer = keymanager.trust.issuers[role]
    return issuer.issue(Service.KEYMANAGER, options.pop("scopes", issuer.scopes), **options)


def hello(role: Role = Role.PAGESERVER, node_id: str = "pageserver-7", **changes: Any) -> Hello:
    values = {
        "role": role,
        "node_id": node_id,
        "instance_id": InstanceId.new(),
        "transport_public": KeyTransport().public,
    }
    return Hello(**(values | changes))


async def receive(connection: ClientConnection) -> ServerMessage:
    async with asyncio.timeout(5):
        return SERVER_MESSAGE.validate_json(await connection.recv())


async def ends_with(connection: ClientConnection) -> tuple[int, str]:
    """The close code and reason; messages before it are skipped."""
    async with asyncio.timeout(15):
        try:
            while True:
                await connection.recv()
        except ConnectionClosed as closed:
            return (1006, "") if closed.rcvd is None else (closed.rcvd.code, closed.rcvd.reason)


@asynccontextmanager
async def opened(
    keymanager: Keymanager, role: Role = Role.PAGESERVER, **options: Any
) -> AsyncIterator[ClientConnection]:
    """A raw session after its Welcome."""
    async with raw_socket(keymanager, options.pop("token", None) or token_of(keymanager, role)) as connection:
        await connection.send(hello(role, **options).model_dump_json())
        assert isinstance(await receive(connection), Welcome)
        yield connection


# --- who may open a session ---


async def test_handshake_refuses_bad_tokens(keymanager: Keymanager) -> None:
    trust = keymanager.trust
    pageserver = trust.issuers[Role.PAGESERVER]
    bad = {
        "none": (None, 401),
        "garbage": ("not.a.token", 401),
        "expired": (token_of(keymanager, ttl_s=-60), 401),
        "other audience": (pageserver.issue(Service.SAFEKEEPER, pageserver.scopes), 401),
        "stranger's key under a known kid": (trust.stranger.issue(Service.KEYMANAGER, [Scope.KEYS_SESSION]), 401),
        "admin without the scope": (trust.admin.issue(Service.KEYMANAGER, trust.admin.scopes), 403),
        "scope that the key may not claim": (trust.admin.issue(Service.KEYMANAGER, [Scope.KEYS_SESSION]), 403),
        "too long": ("x" * 5000, 401),
    }
    for name, (token, status) in bad.items():
        with pytest.raises(InvalidStatus) as refused:
            async with raw_socket(keymanager, token):
                pass
        assert refused.value.response.status_code == status, name
        assert json.loads(refused.value.response.body or b"")["code"] in ("unauthenticated", "permission_denied"), name


async def test_client_raises_what_the_keymanager_says_about_its_token(keymanager: Keymanager) -> None:
    stranger = TokenIssuer.create("nobody", {Scope.KEYS_SESSION})
    for issuer, error in ((stranger, UnauthenticatedError), (keymanager.trust.admin, PermissionDeniedError)):
        keys = KeyClient(
            keymanager.address,
            keymanager.trust.ca_certificate,
            session_tokens(issuer),
            role=Role.PROXY,
            node_id="proxy-1",
        )
        async with keys:
            with pytest.raises(error):
                await keys.acquire(ProjectId.new(), Losses())


async def test_client_refuses_a_server_with_another_services_name(keymanager: Keymanager, cmk: str) -> None:
    context = client_context(keymanager.trust.ca_certificate)
    with pytest.raises(OSError, match="certificate"):
        async with connect("wss://pageserver.keylake/", host="127.0.0.1", port=keymanager.port, ssl=context):
            pass


# --- what may be said ---


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        '{"op": "unknown"}',
        '{"op": "renew", "request_id": 1, "project_ids": ["prj-zz"]}',
        '{"op": "locate", "request_id": 1, "project_ids": ["prj-zz"]}',
        '{"op": "confirm-token", "request_id": 1, "token_id": "tok-0123456789abcdef", "digest": "AAAA"}',
        f'{{"op": "confirm-token", "request_id": 1, "token_id": "tok-zz", "digest": "{"A" * 43}="}}',
        '{"op": "renew", "request_id": "x", "project_ids": []}',
        '{"op": "renew", "request_id": 1, "project_ids": [], "more": 1}',
        '{"op": "unwrap", "request_id": 1, "project_id": "prj-0000000000000000", "items": []}',
        '{"op": "acknowledge", "revocation_id": "r", "project_id": "prj-0000000000000000", "steps_s": {"a": -1}}',
        '{"op": "acknowledge", "revocation_id": "r", "project_id": "prj-0000000000000000", "steps_s": {"a": 1e999}}',
        '{"op": "welcome", "generation": 1, "lease_ttl_s": 1, "transport_public": ""}',
        b"\x00\x01binary",
        "[" * 100_000,
    ],
)
async def test_malformed_messages_end_the_session_with_a_reason(keymanager: Keymanager, text: str | bytes) -> None:
    async with opened(keymanager) as connection:
        await connection.send(text)
        code, reason = await ends_with(connection)
    assert code == CLOSE_PROTOCOL
    assert reason


async def test_reason_of_a_malformed_message_never_repeats_its_contents(keymanager: Keymanager) -> None:
    async with opened(keymanager) as connection:
        await connection.send(json.dumps({"op": "authenticate", "token": ["sesame"]}))
        _, reason = await ends_with(connection)
    assert "token" in reason
    assert "sesame" not in reason
    assert "sesame" not in keymanager.log


async def test_first_message_must_be_a_usable_hello(keymanager: Keymanager) -> None:
    low_order = bytes(32)  # X25519 with it gives no secret
    for first in (
        Renew(request_id=1, project_ids=[]).model_dump_json(),
        hello(transport_public=low_order).model_dump_json(),
        "{}",
    ):
        async with raw_socket(keymanager, token_of(keymanager)) as connection:
            await connection.send(first)
            assert (await ends_with(connection))[0] == CLOSE_PROTOCOL


async def test_second_hello_and_silence_end_the_session(keymanager: Keymanager) -> None:
    async with opened(keymanager) as connection:
        await connection.send(hello().model_dump_json())
        assert (await ends_with(connection))[0] == CLOSE_PROTOCOL
    async with raw_socket(keymanager, token_of(keymanager)) as connection:
        assert (await ends_with(connection))[0] == CLOSE_SLOW


async def test_message_larger_than_the_limit_ends_the_session(keymanager: Keymanager) -> None:
    async with opened(keymanager) as connection:
        await connection.send("x" * (2 * 1024 * 1024))
        assert (await ends_with(connection))[0] == 1009


async def test_unknown_projects_are_left_out_of_a_renewal(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    async with opened(keymanager) as connection:
        message = Renew(request_id=1, project_ids=[ProjectId.new(), project.project_id, project.project_id])
        await connection.send(message.model_dump_json())
        renewed = await receive(connection)
    assert isinstance(renewed, Renewed)
    assert [grant.project_id for grant in renewed.grants] == [project.project_id]
    async with keymanager.key_client() as keys:
        with pytest.raises(NotFoundError):
            await keys.acquire(ProjectId.new(), Losses())


async def test_acknowledging_what_nobody_asked_changes_nothing(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    async with opened(keymanager) as connection:
        acknowledge = Acknowledge(revocation_id="rev-0", project_id=project.project_id, steps_s={"x": 1.0})
        await connection.send(acknowledge.model_dump_json())
        await connection.send(Renew(request_id=1, project_ids=[]).model_dump_json())
        assert isinstance(await receive(connection), Renewed)
    assert await keymanager.revocations(project.project_id) == []


# --- least privilege ---


@pytest.mark.parametrize("role", [Role.COMPUTE, Role.PROXY, Role.MANAGER])
async def test_roles_without_data_hold_leases_but_get_no_keys(keymanager: Keymanager, cmk: str, role: Role) -> None:
    project = await keymanager.new_project(cmk)
    async with keymanager.key_client(role) as keys:
        await keys.acquire(project.project_id, Losses())
        with pytest.raises(PermissionDeniedError, match="keys:use"):
            await keys.generate(project.project_id, [named()])
    [denied] = await keymanager.audit("dek.generate")
    assert (denied["outcome"], denied["actor"]) == ("permission_denied", f"node/{role.value}-1")


async def test_claiming_a_storage_role_without_its_scope_does_not_help(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    proxy_tokens = session_tokens(keymanager.trust.issuers[Role.PROXY])
    async with KeyClient(
        keymanager.address, keymanager.trust.ca_certificate, proxy_tokens, role=Role.PAGESERVER, node_id="pageserver-8"
    ) as keys:
        await keys.acquire(project.project_id, Losses())
        with pytest.raises(PermissionDeniedError):
            await keys.generate(project.project_id, [named()])


async def test_having_the_scope_without_the_role_does_not_help(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    async with opened(keymanager, Role.PAGESERVER, node_id="proxy-8") as storage:
        assert storage is not None
    async with raw_socket(keymanager, token_of(keymanager, Role.PAGESERVER)) as connection:
        await connection.send(hello(Role.PROXY, "proxy-9").model_dump_json())
        await receive(connection)
        await connection.send(Renew(request_id=1, project_ids=[project.project_id]).model_dump_json())
        await receive(connection)
        wanted = Generate(request_id=2, project_id=project.project_id, objects=[named()])
        await connection.send(wanted.model_dump_json())
        failed = await receive(connection)
    assert isinstance(failed, Failed)
    assert failed.code == "permission_denied"


async def test_token_for_one_project_touches_no_other(keymanager: Keymanager, cmk: str) -> None:
    mine, other = await keymanager.new_project(cmk), await keymanager.new_project(cmk)
    tokens = session_tokens(keymanager.trust.issuers[Role.PAGESERVER], mine.project_id)
    async with KeyClient(
        keymanager.address, keymanager.trust.ca_certificate, tokens, role=Role.PAGESERVER, node_id="pageserver-8"
    ) as keys:
        await keys.acquire(mine.project_id, Losses())
        await keys.generate(mine.project_id, [named()])
        with pytest.raises(NotFoundError):
            await keys.acquire(other.project_id, Losses())
    token = token_of(keymanager, project_id=mine.project_id)
    async with opened(keymanager, token=token, node_id="pageserver-9") as connection:
        wanted = Generate(request_id=2, project_id=other.project_id, objects=[named()])
        await connection.send(wanted.model_dump_json())
        failed = await receive(connection)
    assert isinstance(failed, Failed)
    assert failed.code == "permission_denied"


async def test_no_keys_without_a_lease_of_this_very_instance(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    async with keymanager.key_client(node_id="pageserver-1") as holder, opened(keymanager) as connection:
        await holder.acquire(project.project_id, Losses())
        wanted = Generate(request_id=2, project_id=project.project_id, objects=[named()])
        await connection.send(wanted.model_dump_json())
        failed = await receive(connection)
    assert isinstance(failed, Failed)
    assert failed.code == LeaseExpiredError.code


async def test_wrong_context_and_tampered_envelopes_are_refused(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    async with keymanager.key_client() as keys:
        await keys.acquire(project.project_id, Losses())
        [(_, envelope)] = await keys.generate(project.project_id, [thing := named()])
        twins = [
            (named(), envelope),
            (thing.model_copy(update={"object_name": "other"}), envelope),
            (thing.model_copy(update={"kind": "layer/2"}), envelope),
            (thing, replace(envelope, kek_version=2)),
            (thing, replace(envelope, nonce=bytes(12))),
            (thing, replace(envelope, wrapped_dek=bytes(48))),
            (thing, replace(envelope, commitment=bytes(32))),
        ]
        for name, twin in twins:
            with pytest.raises(IntegrityError):
                await keys.unwrap(project.project_id, [(name, twin)])
    refused = [record for record in await keymanager.audit("dek.unwrap") if record["outcome"] == "integrity"]
    assert len(refused) == len(twins)


# --- one node, one instance ---


async def test_newer_instance_fences_the_older_for_good(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    losses = Losses()
    async with keymanager.key_client(node_id="pageserver-1") as older:
        lease = await older.acquire(project.project_id, losses)
        [(dek, _)] = await older.generate(project.project_id, [named()])
        async with keymanager.key_client(node_id="pageserver-1") as newer:
            new_lease = await newer.acquire(project.project_id, Losses())
            async with asyncio.timeout(5):
                await older.wait_replaced()
            await wait_until(lambda: losses.seen)
            assert dek.wiped
            assert not lease.live
            assert new_lease.generation > lease.generation
            with pytest.raises(ReplacedError):
                await older.acquire(project.project_id, Losses())
            new_lease.check()
        # The newer one is gone; the older one still must not come back.
        same_again = keymanager.key_client(node_id="pageserver-1", instance_id=older.identity.instance_id)
        async with same_again, asyncio.timeout(5):
            await same_again.wait_replaced()
    replacing = [i for i in await keymanager.audit("session.open") if i["actor"] == "node/pageserver-1"]
    assert [record["details"]["generation"] for record in replacing] == ["1", "2"]


async def test_same_instance_may_come_back(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    losses = Losses()
    async with keymanager.key_client() as keys:
        lease = await keys.acquire(project.project_id, losses)
        first = lease.generation
        assert keys._session is not None
        keys._session.abort()
        await wait_until(lambda: lease.generation > first)
        lease.check()
    assert losses.seen == []


async def test_node_name_belongs_to_the_key_that_used_it_first(keymanager: Keymanager) -> None:
    async with opened(keymanager, Role.PAGESERVER, node_id="pageserver-1"):
        async with raw_socket(keymanager, token_of(keymanager, Role.PROXY)) as thief:
            await thief.send(hello(Role.PROXY, "pageserver-1").model_dump_json())
            code, reason = await ends_with(thief)
        assert code == CLOSE_PERMISSION_DENIED
        assert "another signing key" in reason
        assert (await keymanager.status()).instances == 1


async def test_two_raw_sessions_of_one_node_leave_one(keymanager: Keymanager) -> None:
    async with opened(keymanager, node_id="pageserver-1") as older, opened(keymanager, node_id="pageserver-1"):
        assert (await ends_with(older))[0] == CLOSE_REPLACED
        assert (await keymanager.status()).instances == 1


# --- tokens run out ---


async def test_session_ends_with_its_token(keymanager: Keymanager) -> None:
    token = token_of(keymanager, ttl_s=-3)  # good for two more seconds of leeway
    async with opened(keymanager, token=token) as connection:
        assert (await ends_with(connection))[0] == CLOSE_UNAUTHENTICATED


async def test_client_renews_its_token_in_the_same_session(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    issuer = keymanager.trust.issuers[Role.PAGESERVER]
    issued: list[str] = []

    def short_lived() -> str:
        issued.append(issuer.issue(Service.KEYMANAGER, issuer.scopes, ttl_s=-3))  # the leeway is 5 s
        return issued[-1]

    async with KeyClient(
        keymanager.address, keymanager.trust.ca_certificate, short_lived, role=Role.PAGESERVER, node_id="pageserver-1"
    ) as keys:
        lease = await keys.acquire(project.project_id, Losses())
        await wait_until(lambda: len(issued) > 8)  # every half second: twice as long as the first token was good for
        lease.check()
        assert lease.generation == 1


@pytest.mark.parametrize("kind", ["other project", "other key", "expired"])
async def test_new_token_must_be_for_the_same_caller(keymanager: Keymanager, kind: str) -> None:
    tokens = {
        "other project": token_of(keymanager, project_id=ProjectId.new()),
        "other key": token_of(keymanager, Role.SAFEKEEPER),
        "expired": token_of(keymanager, ttl_s=-60),
    }
    async with opened(keymanager) as connection:
        await connection.send(Authenticate(token=tokens[kind]).model_dump_json())
        code, _ = await ends_with(connection)
    assert code == (CLOSE_UNAUTHENTICATED if kind == "expired" else CLOSE_PERMISSION_DENIED)


# --- batches, and what they cost ---


async def test_unwraps_are_batched_single_flight_and_need_no_kms(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    async with keymanager.key_client() as keys:
        await keys.acquire(project.project_id, Losses())
        names = [named(f"layer-{n}") for n in range(1500)]
        made = await keys.generate(project.project_id, names)
        envelopes = [envelope for _, envelope in made]
        commitments = [dek.seal(bytes(12), b"x", b"") for dek, _ in made]
        await keys.release(project.project_id)
        del made
        await keys.acquire(project.project_id, Losses())
        kms_calls = len([e for e in keymanager.tenant.admin.audit_log() if "keylake:kek" in json.dumps(e)])
        asked = [(name, envelope) for name, envelope in zip(names, envelopes, strict=True)]
        answers = await asyncio.gather(*(keys.unwrap(project.project_id, [item]) for item in asked + asked))
        assert [a[0].seal(bytes(12), b"x", b"") for a in answers] == commitments * 2
        after = len([e for e in keymanager.tenant.admin.audit_log() if "keylake:kek" in json.dumps(e)])
    assert after == kms_calls
    unwraps = await keymanager.audit("dek.unwrap")
    assert sum(int(record["details"]["objects"]) for record in unwraps) == 1500
    assert len(unwraps) < 10
    generated = await keymanager.audit("dek.generate")
    assert sum(int(record["details"]["objects"]) for record in generated) == 1500
    assert {record["details"]["kek_versions"] for record in generated} == {"1"}
    [kek] = (await keymanager.project(project.project_id)).keks
    assert kek.wraps >= 1500


def kek_decrypts(keymanager: Keymanager) -> int:
    """Unwraps of KEKs in the customer's own log."""
    decrypts = keymanager.tenant.customer.events(EventName="Decrypt")
    return sum("keylake:kek" in event["requestParameters"]["encryptionContext"] for event in decrypts)


async def test_a_storm_of_unwraps_under_a_cold_kek_is_one_kms_call(keymanager: Keymanager, cmk: str) -> None:
    project_id = (await keymanager.new_project(cmk)).project_id
    names = [named() for _ in range(60)]
    async with keymanager.key_client() as keys:
        await keys.acquire(project_id, Losses())
        made = await keys.generate(project_id, names)
        asked = [(name, envelope) for name, (_, envelope) in zip(names, made, strict=True)]
    keymanager.kill()
    await keymanager.start()
    before = await asyncio.to_thread(kek_decrypts, keymanager)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(keymanager.key_client(node_id=f"pageserver-{n}")) for n in range(3)]
        for client in clients:
            await client.acquire(project_id, Losses())
        # Slow, so that all of them wait for the same answer.
        with keymanager.tenant.admin.during(Faults(latency_s=0.3, services=frozenset({CloudService.KMS}))):
            await asyncio.gather(*(client.unwrap(project_id, [item]) for client in clients for item in asked))
            await asyncio.gather(*(client.generate(project_id, [named()]) for client in clients))
    assert await asyncio.to_thread(kek_decrypts, keymanager) == before + 1


async def test_plaintext_keks_are_few_and_leave_when_nobody_uses_them(keymanager: Keymanager, cmk: str) -> None:
    keymanager.options |= {"kek_cache_entries": 2, "kek_cache_idle_ttl_s": 1.0}
    keymanager.stop()
    await keymanager.start()
    _, workspace = await keymanager.bind(cmk)
    project_ids = [(await keymanager.create_project(workspace)).project_id for _ in range(4)]
    things = []
    async with keymanager.key_client() as keys:
        for project_id in project_ids:
            await keys.acquire(project_id, Losses())
            [(_, envelope)] = await keys.generate(project_id, [thing := named()])
            things.append((project_id, thing, envelope))
            assert len((await keymanager.status()).plaintext_keks) <= 2

        async def none_left() -> bool:
            return (await keymanager.status()).plaintext_keks == []

        await wait_until(none_left)
    async with keymanager.key_client(node_id="pageserver-2") as keys:
        for project_id, thing, envelope in things:
            await keys.acquire(project_id, Losses())
            await keys.unwrap(project_id, [(thing, envelope)])


async def test_wrap_count_is_never_under_counted_by_a_crash(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    counted = 0
    for round_number in range(1, 4):
        async with keymanager.key_client() as keys:
            await keys.acquire(project.project_id, Losses())
            await keys.generate(project.project_id, [named() for _ in range(100)])
        keymanager.kill()
        await keymanager.start()
        [kek] = (await keymanager.project(project.project_id)).keks
        assert kek.wraps >= 100 * round_number
        assert kek.wraps > counted
        counted = kek.wraps


async def test_keys_of_two_sessions_are_sealed_apart(keymanager: Keymanager, cmk: str) -> None:
    """What one session carries is of no use in another: sealed DEKs differ, and open only with their own transport."""
    project = await keymanager.new_project(cmk)
    async with keymanager.key_client() as keys:
        await keys.acquire(project.project_id, Losses())
        [(_, envelope)] = await keys.generate(project.project_id, [thing := named()])
    wrapped = WrappedObject(object=thing, envelope=envelope.serialize())
    transports, sealed = [], []
    for number in range(2):
        transport = KeyTransport()
        async with raw_socket(keymanager, token_of(keymanager)) as connection:
            await connection.send(
                hello(node_id=f"pageserver-3{number}", transport_public=transport.public).model_dump_json()
            )
            welcome = await receive(connection)
            assert isinstance(welcome, Welcome)
            transport.agree(transport.public, welcome.transport_public)
            await connection.send(Renew(request_id=1, project_ids=[project.project_id]).model_dump_json())
            await receive(connection)
            wanted = Unwrap(request_id=2, project_id=project.project_id, items=[wrapped])
            await connection.send(wanted.model_dump_json())
            answer = await receive(connection)
        assert isinstance(answer, Keys)
        transports.append(transport)
        sealed.append(answer.items[0])
    assert sealed[0].sealed_dek != sealed[1].sealed_dek
    first, second = (t.open_key(s.sealed_dek, s.envelope) for t, s in zip(transports, sealed, strict=True))
    assert first.matches(second)
    with pytest.raises(IntegrityError):
        transports[0].open_key(sealed[1].sealed_dek, sealed[1].envelope)


# --- bad neighbours ---


async def test_client_that_does_not_read_is_dropped_and_disturbs_nobody(keymanager: Keymanager, cmk: str) -> None:
    project = await keymanager.new_project(cmk)
    keymanager.stop()
    keymanager.options = {"outbox_messages": 16}
    keymanager.lease_ttl_s = 10  # on a busy machine, a keymanager this busy may be late by seconds
    await keymanager.start()
    losses = Losses()
    async with keymanager.key_client(node_id="pageserver-1") as good, opened(keymanager) as greedy:
        lease = await good.acquire(project.project_id, losses)
        await greedy.send(Renew(request_id=1, project_ids=[project.project_id]).model_dump_json())
        wanted = [named(f"layer-{n}") for n in range(1024)]

        async def ask_without_reading() -> None:
            for number in range(2, 2000):
                # Its lease must last, or the answers become too small to fill anything.
                renew = Renew(request_id=10_000 + number, project_ids=[project.project_id])
                await greedy.send(renew.model_dump_json())
                request = Generate(request_id=number, project_id=project.project_id, objects=wanted)
                await greedy.send(request.model_dump_json())

        async def is_gone() -> bool:
            return (await keymanager.status()).instances == 1

        asking = asyncio.create_task(ask_without_reading())
        try:
            await wait_until(is_gone, 60)
            lease.check()
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            greedy.transport.abort()
    assert losses.seen == []


async def test_hanging_kms_does_not_hold_up_leases_of_others(keymanager: Keymanager, cmk: str) -> None:
    """Unwrapping a KEK waits for the KMS; renewals on the same session and on others go on."""
    project = await keymanager.new_project(cmk, outage_grace_s=600)
    keymanager.stop()
    await keymanager.start()
    losses = Losses()
    async with keymanager.key_client() as keys:
        lease = await keys.acquire(project.project_id, losses)
        with keymanager.tenant.admin.during(Faults(outage=Outage.HANG)):
            for _ in range(3):
                with pytest.raises(UnavailableError):
                    await keys.generate(project.project_id, [named()])
                lease.check()
        await keys.generate(project.project_id, [named()])
    assert losses.seen == []
