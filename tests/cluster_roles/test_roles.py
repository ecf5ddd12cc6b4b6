"""The table of docs/roles.md, cell by cell, against real services; and that a token's place has walls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from keylake.client import KeylakeClient
from keylake.roles_table import CONNECTIONS, Connection, http_operations
from pageserver.page_service import PAGES_SCOPE
from safekeeper.wal_sender import FEEDBACK_SCOPE
from shared.api.compute import EndpointState
from shared.api.keymanager import ObjectName, Role
from shared.auth import BearerToken, PersonRole, Service, TokenIssuer
from shared.authorize import Operation, Reach
from shared.clock import SystemClock
from shared.config import Address
from shared.errors import (
    KeylakeError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from shared.framed_tcp import FramedConnection, connect
from shared.ids import InstanceId, TimelineId
from shared.keyclient import KeyClient
from shared.keysession import SessionIdentity, SessionOpener, dial_over_tls
from shared.roles import PERSON_SCOPES
from shared.tls import client_context
from shared.wire.frames import ERROR, ErrorFrame
from shared.wire.pagestream import MAX_FRAME_SIZE_BYTES
from shared.wire.walstream import Feedback, Subscribe, SubscribeFlags
from tests.cluster_roles.place import Place, Site, Subject, place_with_everybody, refusal, unknown_ids
from tests.fixtures.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

OPERATIONS = [(service, each) for service, found in http_operations().items() for each in found]
NAMES = [f"{service.value} {each.method} {each.path}" for service, each in OPERATIONS]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Place]:
    async with place_with_everybody() as found:
        yield found


# --- the table ---


@pytest.mark.parametrize(("service", "operation"), OPERATIONS, ids=NAMES)
async def test_a_row(place: Place, service: Service, operation: Operation) -> None:
    """Whoever has a tick is let in, everybody else is refused, and a refusal by the keymanager is on record."""
    head = (await place.owner.verify_audit()).records
    refused = []
    for subject in place.subjects:
        response = await place.send(service, operation, unknown_ids(), subject.token(service))
        if set(operation.any_of) & subject.scopes:
            assert response.status_code not in (401, 403), (subject.name, response.text)
        else:
            assert (response.status_code, refusal(response)) == (403, "permission_denied"), subject.name
            refused.append((subject.actor, operation.method, operation.path))
    for token in (None, "not.a.token"):
        assert (await place.send(service, operation, unknown_ids(), token)).status_code == 401
    denied = [r for r in await place.owner.audit(head) if r.action == "admin.denied"]
    recorded = [(r.actor, r.details["method"], r.details["route"]) for r in denied]
    assert recorded == (refused if service is Service.KEYMANAGER else [])


@pytest.mark.parametrize("connection", CONNECTIONS, ids=lambda each: each.what)
async def test_a_row_of_connections_that_stay(place: Place, connection: Connection) -> None:
    for subject in place.subjects:
        if connection.takes(subject.scopes):
            await _open(place, connection, subject)
        else:
            with pytest.raises(PermissionDeniedError):
                await _open(place, connection, subject)


async def _open(place: Place, connection: Connection, subject: Subject) -> None:
    """Raises PermissionDeniedError, and nothing else."""
    tls = client_context(place.cluster.layout.ca_certificate)
    token, ports = subject.token(connection.service), place.cluster.ports
    if connection.service is not Service.KEYMANAGER:
        port = ports.pages if PAGES_SCOPE in connection.all_of else ports.safekeepers_wal[0]
        framed = await connect(connection.service, Address(port=port), tls, token, MAX_FRAME_SIZE_BYTES)
        try:
            if FEEDBACK_SCOPE in connection.all_of:
                await _feed_back(framed, place.mine)
        finally:
            await framed.close()
        return
    identity = SessionIdentity(Role.PAGESERVER, f"test-{subject.name}", InstanceId.new())
    opener = SessionOpener([Address(port=ports.keymanager)], dial_over_tls(tls), identity, lambda: token, SystemClock())
    session = await opener.open(_unused_keys(place))
    running = asyncio.create_task(session.run())
    try:
        if connection is CONNECTIONS[1]:
            wanted = ObjectName(timeline_id=TimelineId.new(), object_name="x", kind="test")
            await session.generate(place.mine.running.project.project_id, [wanted], 10)
    except KeylakeError as error:
        if isinstance(error, PermissionDeniedError):
            raise
    finally:
        await session.close()
        await asyncio.gather(running, return_exceptions=True)


async def _feed_back(connection: FramedConnection, site: Site) -> None:
    """Feedback that says nothing new, and then what nobody may say: the first refusal tells which of them is refused.

    Raises PermissionDeniedError.
    """
    project_id, timeline_id = site.running.project.project_id, site.running.timeline.timeline_id
    subscribe = Subscribe(project_id, timeline_id, 0, 0, SubscribeFlags.STATUS_ONLY).pack()
    await connection.send(subscribe + Feedback(0, 0).pack() + subscribe)
    refusals: list[KeylakeError] = []
    while frames := await connection.receive():
        refusals += [ErrorFrame.parse(payload).exception() for kind, payload in frames if kind == ERROR]
    if isinstance(refusals[0], PermissionDeniedError):
        raise refusals[0]


def _unused_keys(place: Place) -> KeyClient:
    """Hears what a session has to say."""
    address, ca = Address(port=place.cluster.ports.keymanager), place.cluster.layout.ca_certificate
    return KeyClient(address, ca, lambda: "", role=Role.PAGESERVER, node_id="unused")


# --- bounds ---


@pytest.mark.parametrize(("service", "operation"), OPERATIONS, ids=NAMES)
async def test_a_bound_token_has_walls(place: Place, service: Service, operation: Operation) -> None:
    """Every role that may do it, bound to a workspace or to a project, about what is in another."""
    for role in (role for role, scopes in PERSON_SCOPES.items() if scopes & set(operation.any_of)):
        for site, foreign in ((place.mine, place.other), (place.other, place.mine)):
            for bounds in ({"workspace_id"}, {"project_id"}, {"workspace_id", "project_id"}):
                token = await _bound(place, role, site, frozenset(bounds))
                # With what it is bound to behind the question mark: that is for the caller to say, so it says nothing.
                for ids, query in ((foreign.ids, None), (unknown_ids(), None), (foreign.ids, site.ids)):
                    response = await place.send(service, operation, ids, token, query)
                    if operation.reach is Reach.LIST:
                        assert response.status_code == 200
                        _only(response.text, site, foreign)
                    else:
                        assert (response.status_code, refusal(response)) == (403, "permission_denied"), (role, bounds)
                if operation.method == "GET" and operation.reach is Reach.PLACE:
                    response = await place.send(service, operation, site.ids, token)
                    # A workspace as a whole is more than one project of it.
                    outside = "project_id" in bounds and "{workspace_id}" in operation.path
                    assert (response.status_code == 403) == outside, (role, bounds, response.text)
                    _only(response.text, site, foreign)


_TOKENS: dict[tuple[PersonRole, str, frozenset[str]], str] = {}


async def _bound(place: Place, role: PersonRole, site: Site, bounds: frozenset[str]) -> str:
    key = (role, site.ids["project_id"], bounds)
    if key not in _TOKENS:
        project = site.running.project
        _TOKENS[key] = await place.token(
            role,
            workspace_id=project.workspace_id if "workspace_id" in bounds else None,
            project_id=project.project_id if "project_id" in bounds else None,
        )
    return _TOKENS[key]


def _only(text: str, site: Site, foreign: Site) -> None:
    assert not any(value in text for value in foreign.ids.values()), text


async def test_lists_show_what_is_in_the_place(place: Place) -> None:
    """And not just nothing."""
    site, role = place.mine, PersonRole.AUDITOR
    for bounds in ({"workspace_id"}, {"project_id"}):
        token = await _bound(place, role, site, frozenset(bounds))
        async with KeylakeClient(place.owner.addresses, place.owner.ca_certificate, BearerToken(token)) as client:
            project = site.running.project
            assert [each.project_id for each in await client.projects()] == [project.project_id]
            assert [each.endpoint_id for each in await client.endpoints()] == [site.running.endpoint.endpoint_id]
            assert [str(c.key_configuration_id) for c in await client.key_configurations()] == [
                site.ids["key_configuration_id"]
            ]
            shown = {each.workspace_id for each in await client.workspaces()}
            assert shown == ({project.workspace_id} if "workspace_id" in bounds else set())
            assert {record.project_id for record in await client.audit()} == {project.project_id}


async def test_a_data_user_starts_the_endpoint_of_their_project(place: Place) -> None:
    token = await _bound(place, PersonRole.DATA_USER, place.mine, frozenset({"project_id"}))
    async with KeylakeClient(place.owner.addresses, place.owner.ca_certificate, BearerToken(token)) as client:
        [endpoint] = await client.endpoints()
        started = await client.start_endpoint(endpoint.endpoint_id)
        assert started.state is EndpointState.RUNNING
        with pytest.raises(PermissionDeniedError):
            await client.stop_endpoint(endpoint.endpoint_id)
        with pytest.raises(PermissionDeniedError):
            await client.start_endpoint(place.other.running.endpoint.endpoint_id)
        with pytest.raises(PermissionDeniedError):
            await client.create_token(PersonRole.DATA_USER, subject="a friend", ttl_s=60)
    await place.owner.stop_endpoint(endpoint.endpoint_id)


async def test_a_workspace_admin_makes_a_database_in_their_workspace(place: Place) -> None:
    """What comes into being is in their place at once, at every service."""
    workspace = await place.cluster.create_workspace(name="third")
    token = await place.token(PersonRole.WORKSPACE_ADMIN, workspace_id=workspace.workspace_id)
    async with KeylakeClient(place.owner.addresses, place.owner.ca_certificate, BearerToken(token)) as client:
        project = await client.create_project(workspace.workspace_id, "theirs")
        timeline = await client.create_timeline(project.project_id)
        endpoint = await client.create_endpoint(timeline)
        assert [each.endpoint_id for each in await client.endpoints()] == [endpoint.endpoint_id]
        assert [each.project_id for each in await client.projects()] == [project.project_id]
        with pytest.raises(PermissionDeniedError):
            await client.create_project(place.mine.running.project.workspace_id, "elsewhere")
        with pytest.raises(PermissionDeniedError):
            await client.create_timeline(place.mine.running.project.project_id, "elsewhere")
        with pytest.raises(PermissionDeniedError):
            await client.create_project(workspace.workspace_id, "own", workspace.key_configuration_id)
        with pytest.raises(PermissionDeniedError):
            await client.revoke(project.project_id, "of keys they know nothing")


# --- lives ---

STATUS = Operation("GET", "/v1/status", (), Reach.NOTHING)


async def test_no_service_takes_a_token_that_is_not_registered_or_is_revoked(place: Place) -> None:
    issuer = TokenIssuer.load(place.cluster.layout.admin_key)
    stray = issuer.issue_for_person(PersonRole.AUDITOR, subject="stray", ttl_s=600)
    expired = issuer.issue_for_person(PersonRole.AUDITOR, subject="late", ttl_s=-60)
    token, issued = await place.owner.create_token(PersonRole.AUDITOR, subject="short", ttl_s=600)
    narrow = issuer.issue_for_person(PersonRole.AUDITOR, subject="x", ttl_s=600, audiences=[Service.KEYMANAGER])
    await place.owner.register_token(narrow)
    for service in Service:
        for bad in (stray, expired):
            assert (await place.send(service, STATUS, {}, bad)).status_code == 401
        wanted = 200 if service is Service.KEYMANAGER else 401
        assert (await place.send(service, STATUS, {}, narrow)).status_code == wanted
        assert (await place.send(service, STATUS, {}, token)).status_code == 200
    await place.owner.revoke_token(issued.token_id)
    for service in Service:

        async def refused(service: Service = service) -> bool:
            return (await place.send(service, STATUS, {}, token)).status_code == 401

        await wait_until(refused)


async def test_while_the_keymanager_is_down_no_person_is_let_in_and_services_go_on(place: Place) -> None:
    token = await place.token(PersonRole.AUDITOR)
    assert (await place.send(Service.PAGESERVER, STATUS, {}, token)).status_code == 200
    keymanager = place.cluster.service("keymanager")
    await keymanager.stop()

    async def unavailable() -> bool:
        response = await place.send(Service.PAGESERVER, STATUS, {}, token)
        return (response.status_code, refusal(response)) == (503, "unavailable")

    try:
        await wait_until(unavailable)
        minutes = next(s for s in place.subjects if s.name == "admin")
        for service in (Service.COMPUTE, Service.SAFEKEEPER, Service.PROXY):
            assert (await place.send(service, STATUS, {}, token)).status_code == 503
            assert (await place.send(service, STATUS, {}, minutes.token(service))).status_code == 200
    finally:
        await keymanager.start()

    async def back() -> bool:
        return (await place.send(Service.PAGESERVER, STATUS, {}, token)).status_code == 200

    await wait_until(back)


async def test_tokens_are_in_no_log_and_no_file(place: Place) -> None:
    """Last but for pytest-randomly: whatever was sent so far."""
    secrets = [t for s in place.subjects if isinstance(s.credentials, BearerToken) for t in [s.token(Service.PROXY)]]
    parts = [part.encode() for token in (*secrets, *_TOKENS.values()) for part in token.split(".")[1:]]
    home = place.cluster.layout.home
    files = [path for path in home.rglob("*") if path.is_file() and path.stat().st_size < 1 << 26]
    assert any(path.suffix == ".log" for path in files)
    for path in files:
        data = path.read_bytes()
        assert not any(part in data for part in parts), path


async def test_a_wrong_token_is_not_a_person(place: Place) -> None:
    token = await place.token(PersonRole.AUDITOR)
    swapped = token[:-8] + ("A" * 8 if token[-8:] != "A" * 8 else "B" * 8)
    async with KeylakeClient(place.owner.addresses, place.owner.ca_certificate, BearerToken(swapped)) as client:
        with pytest.raises(UnauthenticatedError):
            await client.projects()
