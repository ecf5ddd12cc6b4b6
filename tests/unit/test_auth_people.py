"""Tokens for people, as far as a service can judge them by itself; and what it remembers of the keymanager's word."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.api.keymanager import RegisterToken, Role, TokenConfirmed
from shared.auth import (
    MAX_PERSON_TTL_S,
    BearerToken,
    PersonRole,
    PersonToken,
    Principal,
    Scope,
    Service,
    TokenIssuer,
    TokenVerifier,
    TrustBundle,
)
from shared.clock import ManualClock
from shared.config import Address
from shared.confirmed import Confirmed
from shared.errors import InvalidInputError, KeylakeError, PermissionDeniedError, UnauthenticatedError
from shared.ids import ProjectId, TokenId, WorkspaceId
from shared.keyclient import KeyClient
from shared.keysession import KeySession
from shared.roles import OWNER_SCOPES, PERSON_SCOPES, SERVICE_SCOPES
from shared.tls import CertificateAuthority

OWNER = TokenIssuer.create("admin", OWNER_SCOPES)
HALF = TokenIssuer.create("half", {Scope.TOKENS_ISSUE, Scope.AUDIT_READ, Scope.STATUS_READ})
SERVANT = TokenIssuer.create("compute", OWNER_SCOPES - {Scope.TOKENS_ISSUE})
BUNDLE = TrustBundle.of([OWNER, HALF, SERVANT])
WS, PRJ = WorkspaceId.new(), ProjectId.new()


class Registry:
    """Takes the tokens that it was told of."""

    def __init__(self, *good: str) -> None:
        self.good = {hashlib.sha256(token.encode()).digest() for token in good}

    async def confirm(self, person: PersonToken) -> None:
        if person.digest not in self.good:
            raise UnauthenticatedError("not registered")

    async def workspaces_of(self, project_ids: Iterable[ProjectId]) -> Mapping[ProjectId, WorkspaceId]:
        return dict.fromkeys(project_ids, WS)


def verifier(registry: Registry | None = None, audience: Service = Service.COMPUTE) -> TokenVerifier:
    return TokenVerifier(BUNDLE, audience, registry)


def issued(issuer: TokenIssuer = OWNER, role: PersonRole = PersonRole.AUDITOR, **options: Any) -> str:
    return issuer.issue_for_person(role, subject="alice", ttl_s=3600, **options)


def forged(issuer: TokenIssuer = OWNER, **claims: Any) -> str:
    """A person's token with arbitrary claims, signed by a trusted key. None removes a claim."""
    now = int(time.time())
    base: dict[str, Any] = {
        "iss": issuer.kid,
        "sub": "alice",
        "aud": [service.value for service in Service],
        "iat": now,
        "exp": now + 3600,
        "jti": str(TokenId.new()),
        "role": "auditor",
    }
    merged = {name: value for name, value in (base | claims).items() if value is not None}
    return jwt.encode(merged, issuer._private_key, algorithm="EdDSA", headers={"kid": issuer.kid})


@pytest.mark.parametrize("role", PersonRole)
async def test_a_registered_token_is_its_role(role: PersonRole) -> None:
    token = issued(role=role, workspace_id=WS, project_id=PRJ)
    principal = await verifier(Registry(token)).admit(token)
    assert principal.scopes == PERSON_SCOPES[role]
    assert (principal.subject, principal.workspace_id, principal.project_id) == ("alice", WS, PRJ)
    assert principal.person is not None
    assert principal.actor == f"admin:alice:{principal.person.token_id}"


async def test_a_token_that_nobody_registered_is_good_for_nothing() -> None:
    token = issued()
    for where in (verifier(Registry()), verifier(None)):
        with pytest.raises(UnauthenticatedError):
            await where.admit(token)


async def test_people_open_no_connection_that_stays() -> None:
    """Key sessions and framed ports take `verify`: nothing of a person is there to be ended by a revocation."""
    token = issued()
    with pytest.raises(PermissionDeniedError):
        verifier(Registry(token)).verify(token)


def test_no_role_of_people_has_a_scope_of_connections_that_stay() -> None:
    of_wal = {Scope.WAL_READ, Scope.WAL_FEEDBACK, Scope.WAL_ELECT}
    of_connections = {Scope.KEYS_SESSION, Scope.KEYS_USE, Scope.STORAGE_READ, *of_wal}
    for role, scopes in PERSON_SCOPES.items():
        assert not scopes & (of_connections | {Scope.STORAGE_ADMIN, Scope.COMPUTE_CONNECT, Scope.TOKENS_ISSUE}), role
    for service in SERVICE_SCOPES.keys() - {"admin"}:
        assert Scope.TOKENS_ISSUE not in SERVICE_SCOPES[service]


def test_duties_are_separate() -> None:
    """No scope is of two roles, and those of the auditor only read."""
    roles = list(PERSON_SCOPES.items())
    for number, (_, scopes) in enumerate(roles):
        for _, others in roles[number + 1 :]:
            assert not scopes & others
    assert PERSON_SCOPES[PersonRole.AUDITOR] == {Scope.AUDIT_READ, Scope.STATUS_READ, Scope.STORAGE_INSPECT}


@pytest.mark.parametrize(
    "token",
    [
        forged(scope="workspace:admin"),  # scopes grow
        forged(scope=""),
        forged(role="root"),
        forged(role=None),  # then it is a service's, and has no scope
        forged(role=None, scope="audit:read"),  # a service's token with an id, for an hour
        forged(role=None, scope="audit:read", jti=None),  # a service's token for an hour
        forged(role=None, scope="audit:read", jti=None, exp=int(time.time()) + 30),  # ... for several services
        forged(role=["auditor"]),
        forged(role=7),
        forged(jti=None),
        forged(jti="x"),
        forged(jti=7),
        forged(jti=f"prj-{'0' * 16}"),
        forged(exp=None),
        forged(iat=None),
        forged(exp=int(time.time()) - 60),
        forged(exp=int(time.time()) + MAX_PERSON_TTL_S + 60),
        forged(exp=1e400),
        forged(iat=int(time.time()) + 3600),
        forged(sub="a\nb"),
        forged(sub=""),
        forged(workspace="prj-0123456789abcdef"),
        forged(workspace=7),
        forged(project=str(WS)),
        forged(iss="compute"),
        forged(aud=["keymanager", "pageserver"]),
        forged(aud=[]),
        forged(aud=None),
        TokenIssuer.create("admin", OWNER_SCOPES).issue_for_person(PersonRole.AUDITOR, subject="a", ttl_s=60),
    ],
)
async def test_everything_else_is_unauthenticated(token: str) -> None:
    with pytest.raises(UnauthenticatedError):
        await verifier(Registry(token)).admit(token)


async def test_a_service_token_is_no_wider_by_a_workspace() -> None:
    now = int(time.time())
    token = forged(role=None, jti=None, aud="compute", scope="audit:read", exp=now + 60, workspace=str(WS))
    with pytest.raises(UnauthenticatedError):
        await verifier().admit(token)


@pytest.mark.parametrize(("issuer", "role"), [(HALF, PersonRole.SECURITY_ADMIN), (SERVANT, PersonRole.AUDITOR)])
async def test_no_key_issues_more_than_it_may(issuer: TokenIssuer, role: PersonRole) -> None:
    token = issued(issuer, role)
    with pytest.raises(PermissionDeniedError):
        await verifier(Registry(token)).admit(token)


async def test_both_bounds_hold() -> None:
    """A token of one workspace that also names a project of another opens neither."""
    token = issued(workspace_id=WS, project_id=PRJ)
    principal = await verifier(Registry(token)).admit(token)
    principal.require(Scope.AUDIT_READ, PRJ, WS)
    for project, workspace in ((PRJ, WorkspaceId.new()), (PRJ, None), (ProjectId.new(), WS), (None, WS), (None, None)):
        with pytest.raises(PermissionDeniedError):
            principal.require(Scope.AUDIT_READ, project, workspace)
    for scopes in (PERSON_SCOPES[PersonRole.WORKSPACE_ADMIN], PERSON_SCOPES[PersonRole.ACCOUNT_ADMIN]):
        with pytest.raises(PermissionDeniedError):
            principal.require(min(scopes), PRJ, WS)


def test_tokens_are_shown_to_nobody() -> None:
    token = issued()
    principal = verifier().read(token)
    parts = token.split(".")
    for shown in (repr(BearerToken(token)), str(BearerToken(token)), repr(principal), principal.actor):
        assert not any(part in shown for part in parts)
    assert principal.person is not None
    assert principal.person.digest.hex() not in repr(principal)
    assert repr(principal.person.digest) not in repr(principal)
    for text in ("", "x", "a.b", f"{token}\n", f"{token} {token}", "a.b.c.d", f"{'a' * 5000}.b.c"):
        with pytest.raises(InvalidInputError):
            BearerToken(text)


@pytest.mark.parametrize("subject", ["", "a\nb", "a\0b", "x" * 129, "ü"])
def test_whose_it_is_is_a_name(subject: str) -> None:
    with pytest.raises(InvalidInputError):
        OWNER.issue_for_person(PersonRole.AUDITOR, subject=subject, ttl_s=60)


def test_no_error_of_a_request_repeats_the_token() -> None:
    secret = f"{issued()}{'x' * 4096}"
    with pytest.raises(ValidationError) as caught:
        RegisterToken(token=secret)
    assert "eyJ" not in str(caught.value)
    assert "eyJ" not in repr(RegisterToken(token=issued()))


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda data: data.decode("latin-1")))
def test_no_text_is_a_token_and_none_breaks_the_parser(text: str) -> None:
    with pytest.raises(KeylakeError):
        verifier().read(text)


class TestConfirmed:
    PERSON = PersonToken(TokenId.new(), PersonRole.AUDITOR, b"d" * 32)

    def test_a_word_lasts_until_its_time(self) -> None:
        confirmed = Confirmed()
        assert not confirmed.holds(self.PERSON, 0.0)
        confirmed.confirm(self.PERSON.token_id, self.PERSON.digest, 5.0)
        assert confirmed.holds(self.PERSON, 4.9)
        assert not confirmed.holds(self.PERSON, 5.0)

    def test_it_is_about_this_token_only(self) -> None:
        confirmed = Confirmed()
        confirmed.confirm(self.PERSON.token_id, b"e" * 32, 5.0)
        assert not confirmed.holds(self.PERSON, 0.0)
        confirmed.confirm(TokenId.new(), self.PERSON.digest, 5.0)
        assert not confirmed.holds(self.PERSON, 0.0)

    def test_a_revocation_and_the_end_of_the_session_end_it(self) -> None:
        for end in (Confirmed.forget_tokens, lambda c: c.revoke(self.PERSON.token_id)):
            confirmed = Confirmed()
            confirmed.confirm(self.PERSON.token_id, self.PERSON.digest, 5.0)
            end(confirmed)
            assert not confirmed.holds(self.PERSON, 0.0)

    def test_it_is_bounded(self) -> None:
        confirmed = Confirmed(capacity=2)
        tokens = [PersonToken(TokenId.new(), PersonRole.AUDITOR, bytes([n]) * 32) for n in range(3)]
        for token in tokens:
            confirmed.confirm(token.token_id, token.digest, 5.0)
        assert [confirmed.holds(token, 0.0) for token in tokens] == [False, True, True]
        projects = [ProjectId.new() for _ in range(3)]
        for project in projects:
            confirmed.locate({project: WS})
        assert confirmed.workspaces(projects) == dict.fromkeys(projects[1:], WS)


def test_unbound_principals_touch_everything() -> None:
    anywhere = Principal("k", "s", frozenset({Scope.AUDIT_READ}), None)
    assert not anywhere.bound
    assert anywhere.may_touch(None, None)
    assert anywhere.may_touch(PRJ, WS)


class Overtaken:
    """A session whose answer and whose push arrive together: the reader has seen both before whoever asked goes on."""

    ended = False

    def __init__(self, keys: KeyClient) -> None:
        self._keys = keys

    async def confirm_token(self, person: PersonToken, timeout_s: float) -> None:
        answer = TokenConfirmed(request_id=1, token_id=person.token_id, digest=person.digest, ttl_s=60)
        self._keys.on_token_confirmed(answer, 0.0)
        self._keys.on_token_revoked(person.token_id)


async def test_a_revocation_that_arrives_with_the_confirmation_counts(tmp_path: Path) -> None:
    ca = tmp_path / "ca.crt"
    ca.write_bytes(CertificateAuthority().certificate_pem)
    clock = ManualClock()
    keys = KeyClient(Address(port=1), ca, lambda: "", role=Role.MANAGER, node_id="compute", clock=clock)
    keys._session = cast("KeySession", Overtaken(keys))
    person = PersonToken(TokenId.new(), PersonRole.AUDITOR, b"d" * 32)
    with pytest.raises(UnauthenticatedError):
        await keys.confirm(person)
    # And a word counts from when it was asked for, not from when it came.
    answer = TokenConfirmed(request_id=2, token_id=person.token_id, digest=person.digest, ttl_s=60)
    asked_at_s = clock.monotonic_s()
    clock.advance(59)
    keys.on_token_confirmed(answer, asked_at_s)
    await keys.confirm(person)
    clock.advance(1)
    assert not keys._holds(person)
