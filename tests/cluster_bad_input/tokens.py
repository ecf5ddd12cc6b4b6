"""Tokens that are not good, and what is wrong with them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Iterable
from typing import Any

from shared.auth import Scope, Service, TokenIssuer, TrustBundle
from shared.ids import ProjectId
from tests.cluster_bad_input.place import CANARY, Place

Wrong = dict[str, tuple[str | None, int]]
"""What is wrong → (token, status)."""


def wrong_tokens(place: Place, audience: Service, accepted: Iterable[Scope]) -> Wrong:
    """For something that wants one of the scopes `accepted`."""
    issuers, accepted = place.issuers, set(accepted)
    admin, scope = issuers["admin"], min(accepted)
    owner = next(i for i in issuers.values() if scope in i.scopes)
    other = next(s for s in Service if s is not audience)
    pretender = next(i for i in issuers.values() if scope not in i.scopes)
    good = owner.issue(audience, [scope])
    header, payload, signature = good.split(".")
    found: Wrong = {
        "none": (None, 401),
        "not a token": (CANARY, 401),
        "three dots": (f"{CANARY}...", 401),
        "too long": (f"{good}{'x' * 4096}", 401),
        "an altered signature": (f"{header}.{payload}.{_flip(signature)}", 401),
        "an altered payload": (f"{header}.{_flip(payload)}.{signature}", 401),
        "no signature": (f"{header}.{payload}.", 401),
        "the algorithm none": (f"{_part({'alg': 'none', 'kid': owner.kid})}.{payload}.", 401),
        "the public key as HMAC's": (_confused(place, owner, payload), 401),
        "expired": (owner.issue(audience, [scope], ttl_s=-60), 401),
        "another audience": (owner.issue(other, [scope]), 401),
        "a stranger's key": (TokenIssuer.create("stranger", Scope).issue(audience, [scope]), 401),
        "a stranger's key by a known name": (TokenIssuer.create(owner.kid, Scope).issue(audience, [scope]), 401),
        "a scope that its key may not claim": (pretender.issue(audience, [scope]), 403),
        "no scope": (admin.issue(audience, []), 403),
    }
    for name, issuer in issuers.items():
        if rest := issuer.scopes - accepted:
            found[f"every other scope of {name}"] = (issuer.issue(audience, rest), 403)
    return found


def for_another_project(place: Place, audience: Service, scope: Scope) -> str:
    """Good, for a project that does not exist."""
    return place.token(audience, scope, ProjectId.new())


def _part(value: dict[str, Any]) -> str:
    return _base64(json.dumps(value).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _flip(part: str) -> str:
    # Not the last character: some of its bits may mean nothing.
    return ("A" if part[0] != "A" else "B") + part[1:]


def _confused(place: Place, owner: TokenIssuer, payload: str) -> str:
    """Signed with what everybody knows, for a verifier that believes the header."""
    public = TrustBundle.load(place.cluster.layout.trust_bundle).keys[owner.kid].public_key_pem
    head = _part({"alg": "HS256", "kid": owner.kid, "typ": "JWT"})
    signature = hmac.new(public.encode(), f"{head}.{payload}".encode(), hashlib.sha256).digest()
    return f"{head}.{payload}.{_base64(signature)}"
