"""Tokens for people at a real keymanager: registering, confirming over key sessions, revoking, and every way around."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import jwt
import pytest

from shared.api.keymanager import AuditRecord, IssuedToken, Project, RegisterToken, Role
from shared.auth import BearerToken, PersonRole, PersonToken, Service, TokenIssuer, TokenVerifier, TrustBundle
from shared.errors import (
    ConflictError,
    InvalidInputError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from shared.http import ServiceClient
from shared.ids import ProjectId, TokenId, WorkspaceId
from shared.keyclient import KeyClient
from shared.keysession import session_tokens
from tests.fixtures.key_source_contract import Losses
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from tests.fixtures.keymanager import Keymanager

pytestmark = pytest.mark.integration


@asynccontextmanager
async def person(keymanager: Keymanager, token: str) -> AsyncIterator[ServiceClient]:
    """Whoever has this token."""
    ca = keymanager.trust.ca_certificate
    async with ServiceClient(Service.KEYMANAGER, keymanager.address, ca, BearerToken(token), frozenset()) as client:
        yield client


def signed(keymanager: Keymanager, role: PersonRole = PersonRole.AUDITOR, **options: Any) -> str:
    return keymanager.trust.admin.issue_for_person(role, subject="alice", ttl_s=options.pop("ttl_s", 600), **options)


async def register(keymanager: Keymanager, token: str, issuer: TokenIssuer | None = None) -> IssuedToken:
    async with keymanager.client(issuer) as client:
        return await client.call(IssuedToken, "POST", "/v1/tokens", body=RegisterToken(token=token))


async def revoke(keymanager: Keymanager, token_id: TokenId) -> IssuedToken:
    async with keymanager.client() as client:
        return await client.call(IssuedToken, "POST", f"/v1/tokens/{token_id}:revoke")


def as_shown(keymanager: Keymanager, token: str) -> PersonToken:
    """What a service makes of it."""
    bundle = TrustBundle.load(keymanager.trust.directory / "trust.json")
    found = TokenVerifier(bundle, Service.COMPUTE).read(token).person
    assert found is not None
    return found


async def test_a_token_is_good_from_its_registration_to_its_revocation(keymanager: Keymanager) -> None:
    token = signed(keymanager)
    async with person(keymanager, token) as alice:
        with pytest.raises(UnauthenticatedError, match="not registered"):
            await alice.request("GET", "/v1/audit")
        issued = await register(keymanager, token)
        assert (issued.role, issued.subject, issued.revoked_at) == (PersonRole.AUDITOR, "alice", None)
        await alice.request("GET", "/v1/audit")
        with pytest.raises(PermissionDeniedError):
            await alice.request("POST", "/v1/projects/prj-0123456789abcdef:revoke")
        revoked = await revoke(keymanager, issued.token_id)
        assert revoked.revoked_at is not None
        assert await revoke(keymanager, issued.token_id) == revoked
        with pytest.raises(UnauthenticatedError, match="revoked"):
            await alice.request("GET", "/v1/audit")
    # Neither is undone by a restart.
    other = signed(keymanager)
    await register(keymanager, other)
    assert keymanager.stop() == 0
    await keymanager.start()
    async with person(keymanager, token) as alice, person(keymanager, other) as bob:
        with pytest.raises(UnauthenticatedError):
            await alice.request("GET", "/v1/audit")
        records = [AuditRecord.model_validate(each) for each in (await bob.request("GET", "/v1/audit")).json()]
        listed = [IssuedToken.model_validate(each) for each in (await bob.request("GET", "/v1/tokens")).json()]
    assert [each.revoked_at is None for each in listed] == [True, False]
    about = [(r.actor, r.action, r.details["token_id"]) for r in records if r.action.startswith("token.")]
    assert about[:2] == [("admin:admin", f"token.{what}", str(issued.token_id)) for what in ("issue", "revoke")]
    denied = [r for r in records if r.action == "admin.denied"]
    assert {r.actor for r in denied} == {f"admin:alice:{issued.token_id}"}
    # A token is nowhere but with its bearer: not in the log, not in an answer, not in the database.
    kept = keymanager.log + "".join(r.model_dump_json() for r in records) + await everything_stored(keymanager)
    for secret in (token, other):
        assert not any(part in kept for part in (secret, secret.split(".")[1], secret.split(".")[2]))


async def everything_stored(keymanager: Keymanager) -> str:
    import asyncpg

    connection = await asyncpg.connect(keymanager.dsn)
    try:
        tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'keymanager'")
        rows = [await connection.fetch(f"SELECT t::text FROM keymanager.{t['tablename']} t") for t in tables]  # noqa: S608
    finally:
        await connection.close()
    text = "".join(row["t"] for found in rows for row in found)
    assert "alice" in text
    return text


async def test_only_what_its_signer_may_issue_is_registered(keymanager: Keymanager, cmk: str) -> None:
    trust = keymanager.trust
    _, mine = await keymanager.bind(cmk)
    _, other = await keymanager.bind(cmk)
    project = await keymanager.create_project(other)
    service = trust.issuers[Role.PAGESERVER]
    fine = signed(keymanager)
    header, payload, signature = fine.split(".")
    bad = {
        "not a token": "x",
        "altered": f"{header}.{payload[:-2]}AA.{signature}",
        "a service's token": trust.admin.issue(Service.KEYMANAGER, trust.admin.scopes),
        "signed by a stranger": trust.stranger.issue_for_person(PersonRole.AUDITOR, subject="eve", ttl_s=60),
        "signed by a key that may not": service.issue_for_person(PersonRole.AUDITOR, subject="eve", ttl_s=60),
        "expired": signed(keymanager, ttl_s=-60),
        "for longer than anything may live": signed(keymanager, ttl_s=91 * 24 * 3600),
        "not for the keymanager": signed(keymanager, audiences=[Service.COMPUTE]),
        "for a project that does not exist": signed(keymanager, project_id=ProjectId.new()),
        "for a workspace that does not exist": signed(keymanager, workspace_id=WorkspaceId.new()),
        "for a project of another workspace": signed(
            keymanager, workspace_id=mine.workspace_id, project_id=project.project_id
        ),
    }
    for name, token in bad.items():
        with pytest.raises(InvalidInputError):
            await register(keymanager, token)
        if name not in ("not a token", "a service's token"):  # which is good, for what it is
            async with person(keymanager, token) as eve:
                with pytest.raises((UnauthenticatedError, PermissionDeniedError)):
                    await eve.request("GET", "/v1/projects")
    with pytest.raises(PermissionDeniedError):
        await register(keymanager, fine, service)
    assert await keymanager.audit("token.issue") == []
    # The same id with other claims, before and after: what was registered is that one token.
    await register(keymanager, fine)
    claims = jwt.decode(fine, options={"verify_signature": False})
    grown = jwt.encode(
        claims | {"role": "security-admin"}, trust.admin._private_key, algorithm="EdDSA", headers={"kid": "admin"}
    )
    with pytest.raises(ConflictError):
        await register(keymanager, grown)
    async with person(keymanager, grown) as eve:
        with pytest.raises(UnauthenticatedError):
            await eve.request("GET", "/v1/projects")
    # A person may not hand out anything, whatever they are.
    for role in PersonRole:
        token = signed(keymanager, role)
        await register(keymanager, token)
        async with person(keymanager, token) as somebody:
            with pytest.raises(PermissionDeniedError):
                await somebody.request("POST", "/v1/tokens", body=RegisterToken(token=signed(keymanager)))


async def test_services_confirm_over_their_key_session(keymanager: Keymanager, cmk: str) -> None:
    assert keymanager.stop() == 0
    keymanager.lease_ttl_s = 300  # nothing here ends by itself
    await keymanager.start()
    _, workspace = await keymanager.bind(cmk)
    project = await keymanager.create_project(workspace)
    token, unregistered = signed(keymanager), signed(keymanager)
    issued = await register(keymanager, token)
    async with keymanager.key_client(Role.MANAGER, "compute") as keys:
        shown = as_shown(keymanager, token)
        await keys.confirm(shown)
        wrong = PersonToken(shown.token_id, shown.role, as_shown(keymanager, unregistered).digest)
        for person_token in (as_shown(keymanager, unregistered), wrong):
            with pytest.raises(UnauthenticatedError):
                await keys.confirm(person_token)
        await keys.confirm(shown)
        found = await keys.workspaces_of([project.project_id, ProjectId.new()])
        assert found == {project.project_id: workspace.workspace_id}

        # Without a session, nobody's word counts, however fresh: a revocation would not be heard of.
        keymanager.kill()
        await wait_until(lambda: not keys.connected)
        with pytest.raises(UnavailableError):
            await keys.confirm(shown)
        assert await keys.workspaces_of([project.project_id]) == found
        await keymanager.start()
        await wait_until(lambda: keys.connected)
        assert not keys._holds(shown)
        await keys.confirm(shown)

        # A revocation is pushed: what was confirmed would hold for five minutes.
        await revoke(keymanager, issued.token_id)
        await wait_until(lambda: refuses(keys, shown))


async def test_a_session_of_one_project_knows_that_one_and_people_open_none(keymanager: Keymanager, cmk: str) -> None:
    _, workspace = await keymanager.bind(cmk)
    mine, other = await keymanager.create_project(workspace), await keymanager.create_project(workspace)
    token = signed(keymanager)
    await register(keymanager, token)
    trust = keymanager.trust
    tokens = session_tokens(trust.issuers[Role.COMPUTE], mine.project_id)
    agent = KeyClient(keymanager.address, trust.ca_certificate, tokens, role=Role.COMPUTE, node_id="compute-7")
    async with agent as keys:
        assert await keys.workspaces_of([mine.project_id, other.project_id]) == {
            mine.project_id: workspace.workspace_id
        }
        with pytest.raises(PermissionDeniedError):
            await keys.confirm(as_shown(keymanager, token))
    person_keys = KeyClient(keymanager.address, trust.ca_certificate, lambda: token, role=Role.PROXY, node_id="proxy-7")
    async with person_keys as keys:
        with pytest.raises(PermissionDeniedError, match="no connection that stays"):
            await keys.acquire(mine.project_id, Losses())


async def refuses(keys: KeyClient, person_token: PersonToken) -> bool:
    if keys._holds(person_token):
        return False
    with pytest.raises(UnauthenticatedError):
        await keys.confirm(person_token)
    return True


async def test_a_bound_token_sees_and_ends_its_place_only(keymanager: Keymanager, cmk: str) -> None:
    _, mine = await keymanager.bind(cmk)
    configuration, other = await keymanager.bind(cmk)
    project, foreign = await keymanager.create_project(mine), await keymanager.create_project(other)
    role = PersonRole.SECURITY_ADMIN
    of_mine = signed(keymanager, role, workspace_id=mine.workspace_id)
    of_project = signed(keymanager, role, project_id=project.project_id)
    of_other = await register(keymanager, signed(keymanager, role, project_id=foreign.project_id))
    inner = await register(keymanager, of_project)
    await register(keymanager, of_mine)
    async with person(keymanager, of_mine) as alice, person(keymanager, of_project) as bob:
        for who in (alice, bob):
            shown = [Project.model_validate(each) for each in (await who.request("GET", "/v1/projects")).json()]
            assert [each.project_id for each in shown] == [project.project_id]
            for path in (f"tokens/{of_other.token_id}:revoke", f"projects/{foreign.project_id}:revalidate"):
                with pytest.raises(PermissionDeniedError):
                    await who.request("POST", f"/v1/{path}")
            for path in (f"projects/{ProjectId.new()}", f"key-configurations/{configuration.key_configuration_id}"):
                with pytest.raises(PermissionDeniedError):
                    await who.request("GET", f"/v1/{path}")
            for path in (f"tokens/{TokenId.new()}:revoke", f"key-configurations/{mine.key_configuration_id}:rewrap"):
                with pytest.raises(PermissionDeniedError):
                    await who.request("POST", f"/v1/{path}")
            await who.request("GET", f"/v1/key-configurations/{mine.key_configuration_id}")
            await who.request("POST", f"/v1/projects/{project.project_id}:revalidate")
        listed = {each["token_id"] for each in (await alice.request("GET", "/v1/tokens")).json()}
        assert str(of_other.token_id) not in listed
        assert len(listed) == 2
        await alice.request("POST", f"/v1/tokens/{inner.token_id}:revoke")
        with pytest.raises(UnauthenticatedError):
            await bob.request("GET", "/v1/projects")
