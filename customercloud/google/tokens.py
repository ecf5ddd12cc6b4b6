"""Bearer tokens: access tokens that the cloud signs, and JWTs that service accounts sign for themselves.

An access token is not stored. `ya29.<claims>.<signature>`: base64url JSON, and HMAC-SHA-256 over it with a key derived
from the host key; so tokens outlive a restart and end by the clock. The account is looked up at every use: deleting it
(or making it again, which gives another unique id) ends its tokens.

A self-signed JWT (what SDKs send to Google APIs when they hold a service account's key) is RS256 with the account's
key, issuer and subject the account, at most an hour; its audience is the service, or it says scopes in place of one
(AIP-4111).
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import BaseModel, ConfigDict, ValidationError

from customercloud.google.identity import ServiceAccount

_PURPOSE: Final = b"customercloud google access token v1"
_PREFIX: Final = "ya29."
MAX_TOKEN_SIZE_CHARACTERS: Final = 4096
MAX_SCOPES: Final = 32
MAX_LIFETIME: Final = dt.timedelta(hours=1)
_SKEW: Final = dt.timedelta(minutes=5)

FindAccount = Callable[[str], ServiceAccount | None]


class Problem(StrEnum):
    """`ErrorInfo.reason` of the refusal."""

    MISSING = "CREDENTIALS_MISSING"
    INVALID = "ACCESS_TOKEN_TYPE_UNSUPPORTED"
    EXPIRED = "ACCESS_TOKEN_EXPIRED"
    ACCOUNT = "ACCOUNT_STATE_INVALID"


class TokenError(Exception):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.value)
        self.problem = problem


class Claims(BaseModel):
    """What an access token says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    email: str
    unique_id: str
    expires_at: dt.datetime
    scopes: tuple[str, ...]
    delegate: str | None = None
    """Who impersonates the account."""


class AccessTokens:
    """Makes and checks access tokens."""

    def __init__(self, host_key: bytes) -> None:
        self._key = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=_PURPOSE).derive(host_key)

    def issue(self, claims: Claims) -> str:
        payload = _b64(claims.model_dump_json().encode())
        return f"{_PREFIX}{payload}.{_b64(self._sign(payload))}"

    def open(self, token: str) -> Claims:
        """Raises TokenError, INVALID, for anything that `issue` did not make. Does not look at the clock."""
        if not token.isascii() or len(token) > MAX_TOKEN_SIZE_CHARACTERS or not token.startswith(_PREFIX):
            raise TokenError(Problem.INVALID)
        payload, _, signature = token.removeprefix(_PREFIX).partition(".")
        # The text is compared, not what it decodes to: base64 has several spellings of the same bytes.
        if not hmac.compare_digest(signature, _b64(self._sign(payload))):
            raise TokenError(Problem.INVALID)
        try:
            return Claims.model_validate_json(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        except (binascii.Error, ValidationError, ValueError):
            raise TokenError(Problem.INVALID) from None

    def _sign(self, payload: str) -> bytes:
        return hmac.digest(self._key, payload.encode("ascii"), "sha256")


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


@dataclass(frozen=True, slots=True)
class Assertion:
    """A verified JWT of a service account."""

    account: ServiceAccount
    scopes: tuple[str, ...]


def verify_assertion(
    token: str, audience: str, find: FindAccount, now: dt.datetime, *, or_scopes: bool = False
) -> Assertion:
    """What a service account says of itself, signed with its key, for `audience`. Raises TokenError.

    `or_scopes`: one for no audience will do that names scopes; whether these do is for the caller to see.
    """
    if len(token) > MAX_TOKEN_SIZE_CHARACTERS:
        raise TokenError(Problem.INVALID)
    try:
        key_id = jwt.get_unverified_header(token).get("kid")
        said = jwt.decode(token, options={"verify_signature": False})
        issuer = said.get("iss")
        by_scopes = or_scopes and "aud" not in said and bool(said.get("scope"))
        account = find(issuer) if isinstance(issuer, str) else None
        key = next((k for k in account.keys if k.key_id == key_id), None) if account is not None else None
        if account is None or key is None:
            raise TokenError(Problem.INVALID)
        claims: dict[str, Any] = jwt.decode(
            token,
            key.public_key_pem,
            algorithms=["RS256"],
            audience=None if by_scopes else audience,
            # The clock is ours, so the times are checked below.
            options={
                "require": ["exp", "iat", *([] if by_scopes else ["aud"])],
                "verify_exp": False,
                "verify_iat": False,
                "verify_nbf": False,
            },
        )
    except (jwt.InvalidTokenError, ValueError):
        raise TokenError(Problem.INVALID) from None
    _check_times(claims, now)
    if claims.get("sub", account.email) != account.email:
        raise TokenError(Problem.INVALID)  # domain-wide delegation does not exist here
    scope = claims.get("scope")
    return Assertion(account, tuple(scope.split()[:MAX_SCOPES]) if isinstance(scope, str) else ())


def _check_times(claims: dict[str, Any], now: dt.datetime) -> None:
    issued, expires = claims["iat"], claims["exp"]
    if not all(isinstance(t, int | float) and 0 <= t < 2**40 for t in (issued, expires)):
        raise TokenError(Problem.INVALID)
    now_s = now.timestamp()
    if now_s >= expires:
        raise TokenError(Problem.EXPIRED)
    if issued > now_s + _SKEW.total_seconds() or expires - issued > (MAX_LIFETIME + _SKEW).total_seconds():
        raise TokenError(Problem.INVALID)
