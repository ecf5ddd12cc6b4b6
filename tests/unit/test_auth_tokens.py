"""Tokens: who signs, for whom, for what, until when."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.auth import Principal, Scope, Service, TokenIssuer, TokenVerifier, TrustBundle
from shared.errors import InvalidInputError, PermissionDeniedError, UnauthenticatedError
from shared.ids import ProjectId

ADMIN = TokenIssuer.create("admin", {Scope.ACCOUNT_ADMIN, Scope.AUDIT_READ})
PROXY = TokenIssuer.create("proxy", {Scope.KEYS_SESSION})
VERIFIER = TokenVerifier(TrustBundle.of([ADMIN, PROXY]), Service.KEYMANAGER)


def forged(issuer: TokenIssuer = ADMIN, headers: dict[str, Any] | None = None, **claims: Any) -> str:
    """A token with arbitrary claims, signed by a trusted key. None removes a claim."""
    now = int(time.time())
    base: dict[str, Any] = {
        "iss": issuer.kid,
        "sub": issuer.kid,
        "aud": "keymanager",
        "iat": now,
        "exp": now + 60,
        "scope": "audit:read",
    }
    merged = {name: value for name, value in (base | claims).items() if value is not None}
    return jwt.encode(merged, issuer._private_key, algorithm="EdDSA", headers={"kid": issuer.kid} | (headers or {}))


def test_a_good_token_names_its_bearer() -> None:
    project = ProjectId.new()
    principal = VERIFIER.verify(
        ADMIN.issue(Service.KEYMANAGER, [Scope.AUDIT_READ], project_id=project, subject="alice", ttl_s=30)
    )
    assert (principal.kid, principal.subject, principal.project_id) == ("admin", "alice", project)
    assert principal.scopes == {Scope.AUDIT_READ}
    assert 30 <= principal.expires_at_s - time.time() <= 36


@pytest.mark.parametrize(
    "token",
    [
        "",
        "a.b.c",
        "x" * 5000,
        forged(exp=int(time.time()) - 60),
        forged(aud="pageserver"),
        forged(aud=["keymanager", "pageserver"], iss="somebody"),
        forged(iss="proxy"),
        forged(exp=None),
        forged(iat=None),
        forged(aud=None),
        forged(sub=None),
        forged(scope=None),
        forged(scope="root"),
        forged(project="prj-1"),
        forged(project=7),
        forged(sub="a\0b"),
        forged(sub="a\nb"),
        forged(sub=""),
        forged(sub="x" * 500),
        forged(headers={"kid": "nobody"}),
        forged(headers={"kid": "proxy"}),
        TokenIssuer("admin", ADMIN.scopes, Ed25519PrivateKey.generate()).issue(Service.KEYMANAGER, [Scope.AUDIT_READ]),
        jwt.encode({"sub": "x"}, "", algorithm="none", headers={"kid": "admin"}),
        jwt.encode({"sub": "x"}, "k" * 32, algorithm="HS256", headers={"kid": "admin"}),
    ],
)
def test_everything_else_is_unauthenticated(token: str) -> None:
    with pytest.raises(UnauthenticatedError):
        VERIFIER.verify(token)


def test_the_public_key_is_no_hmac_secret() -> None:
    """The classic confusion: a token under HS256 whose secret is the verifier's public key."""
    import base64
    import hashlib
    import hmac

    def part(data: bytes) -> bytes:
        return base64.urlsafe_b64encode(data).rstrip(b"=")

    head = part(json.dumps({"alg": "HS256", "typ": "JWT", "kid": "admin"}).encode())
    now = int(time.time())
    claims = {"iss": "admin", "sub": "x", "aud": "keymanager", "iat": now, "exp": now + 60, "scope": "audit:read"}
    body = head + b"." + part(json.dumps(claims).encode())
    mac = hmac.digest(ADMIN.public_key_pem.encode(), body, hashlib.sha256)
    with pytest.raises(UnauthenticatedError):
        VERIFIER.verify((body + b"." + part(mac)).decode())


def test_a_key_cannot_claim_scopes_that_the_bundle_does_not_give_it() -> None:
    with pytest.raises(PermissionDeniedError):
        VERIFIER.verify(PROXY.issue(Service.KEYMANAGER, [Scope.ACCOUNT_ADMIN]))


def test_require() -> None:
    mine, other = ProjectId.new(), ProjectId.new()
    anywhere = Principal("k", "s", frozenset({Scope.AUDIT_READ}), None)
    anywhere.require(Scope.AUDIT_READ)
    anywhere.require(Scope.AUDIT_READ, mine)
    bound = Principal("k", "s", frozenset({Scope.AUDIT_READ}), mine)
    bound.require(Scope.AUDIT_READ, mine)
    for principal, scope, project in (
        (anywhere, Scope.ACCOUNT_ADMIN, None),
        (bound, Scope.AUDIT_READ, other),
        (bound, Scope.AUDIT_READ, None),
    ):
        with pytest.raises(PermissionDeniedError):
            principal.require(scope, project)


def test_signing_keys_are_saved_for_their_owner_only_and_shown_to_nobody(tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    ADMIN.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    loaded = TokenIssuer.load(path)
    assert VERIFIER.verify(loaded.issue(Service.KEYMANAGER, [Scope.AUDIT_READ])).kid == "admin"
    assert "PRIVATE" not in repr(loaded)
    assert "PRIVATE" not in str(loaded)
    with pytest.raises(FileExistsError):
        ADMIN.save(path)
    path.write_text("{}")
    with pytest.raises(InvalidInputError):
        TokenIssuer.load(path)
    with pytest.raises(InvalidInputError):
        TrustBundle.load(tmp_path / "absent.json")
