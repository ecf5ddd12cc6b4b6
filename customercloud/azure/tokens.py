"""Access tokens as Entra ID gives them to Key Vault: JWT, RS256, version 1.0 claims. Pure; the time is given.

The vault looks at signature, issuer (the tenant that the vault belongs to), audience and lifetime, and at nothing in
the directory: a token outlives the service principal that it was given to, as in the real cloud, until it expires.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import uuid
from dataclasses import dataclass
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_der_private_key

from customercloud.azure.identity import ServicePrincipal, SigningKey

KEY_VAULT_AUDIENCE: Final = "https://vault.azure.net"
KEY_VAULT_APP_ID: Final = "cfa8b339-82a2-471a-a3c9-0fc0be7a4093"
"""Key Vault's own application: as a resource it means the same as the URL."""
MAX_TOKEN_SIZE_BYTES: Final = 16 * 1024
_ALGORITHM: Final = "RS256"
_CLAIMS: Final = ("aud", "iss", "iat", "nbf", "exp", "appid", "oid", "tid")


@dataclass(frozen=True, slots=True)
class Caller:
    app_id: str
    object_id: str
    tenant_id: str

    @property
    def issuer(self) -> str:
        return issuer_of(self.tenant_id)


class TokenError(Exception):
    """The message is the service's, for the body of its 401."""


def issuer_of(tenant_id: str) -> str:
    return f"https://sts.windows.net/{tenant_id}/"


class TokenAuthority:
    """Mints and checks tokens with one signing key."""

    def __init__(self, key: SigningKey) -> None:
        private = load_der_private_key(key.private_key, password=None)
        assert isinstance(private, RSAPrivateKey)  # noqa: S101 - SigningKey.new makes no other
        self._private = private
        self._public = private.public_key()
        self._key_id = key.key_id

    def jwks(self) -> dict[str, Any]:
        """The public key, for whoever wants to check our tokens."""
        numbers = self._public.public_numbers()
        key = {
            "kty": "RSA",
            "use": "sig",
            "kid": self._key_id,
            "n": _b64url_int(numbers.n),
            "e": _b64url_int(numbers.e),
        }
        return {"keys": [key]}

    def mint(self, principal: ServicePrincipal, audience: str, now: dt.datetime, lifetime: dt.timedelta) -> str:
        issued = int(now.timestamp())
        claims = {
            "aud": audience,
            "iss": issuer_of(principal.tenant_id),
            "iat": issued,
            "nbf": issued,
            "exp": int((now + lifetime).timestamp()),
            "appid": principal.client_id,
            "appidacr": "1",
            "idp": issuer_of(principal.tenant_id),
            "idtyp": "app",
            "oid": principal.object_id,
            "sub": principal.object_id,
            "tid": principal.tenant_id,
            "uti": uuid.uuid4().hex[:22],
            "ver": "1.0",
        }
        return jwt.encode(claims, self._private, algorithm=_ALGORITHM, headers={"kid": self._key_id})

    def verify(self, token: str, *, tenant_id: str, audiences: frozenset[str], now: dt.datetime) -> Caller:
        """Raises TokenError. The signature is checked first, so that forgers learn nothing but that."""
        try:
            header = jwt.get_unverified_header(token[: MAX_TOKEN_SIZE_BYTES + 1])
            claims = jwt.decode(
                token,
                self._public,
                algorithms=[_ALGORITHM],
                # Time is the given clock's; audience and issuer have answers of their own.
                options={
                    "verify_exp": False, "verify_nbf": False, "verify_iat": False, "verify_aud": False,
                    "verify_iss": False, "verify_sub": False,
                },
            )  # fmt: skip
        except (jwt.PyJWTError, ValueError):
            raise TokenError("AKV10046: Unable to resolve the key used for signature validation.") from None
        if header.get("kid") != self._key_id or any(name not in claims for name in _CLAIMS):
            raise TokenError("AKV10046: Unable to resolve the key used for signature validation.")
        if claims["iss"] != issuer_of(tenant_id) or claims["tid"] != tenant_id:
            raise TokenError(
                f"AKV10032: Invalid issuer. Expected one of {issuer_of(tenant_id)}, found {claims['iss']}."
            )
        if str(claims["aud"]).rstrip("/") not in audiences | {KEY_VAULT_APP_ID}:
            raise TokenError(f"AKV10022: Invalid audience. Expected {min(audiences)}, found: {claims['aud']}.")
        seconds = now.timestamp()
        if not claims["nbf"] - 300 <= seconds:  # the service allows five minutes of clock skew
            raise TokenError("[TokenNotYetValid] Error validating token: 'S2S12087'.")
        if seconds >= claims["exp"]:
            raise TokenError("[TokenExpired] Error validating token: 'S2S12086'.")
        return Caller(str(claims["appid"]), str(claims["oid"]), tenant_id)


def claimed_app_id(token: str) -> str | None:
    """What an unverified token says of its owner: for fault injection, never for a decision."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        app_id = claims["appid"]
    except (IndexError, ValueError, KeyError, TypeError):
        return None
    return app_id if isinstance(app_id, str) else None


def _b64url_int(value: int) -> str:
    data = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
