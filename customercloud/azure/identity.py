"""Entra ID's objects: tenants, application registrations with their credentials, service principals.

An application is registered once, in its home tenant, where its secrets are. Every tenant that lets it in has a
service principal of its own for it; that is what roles and access policies name (its object id), and what the tenant's
administrator disables or removes to be rid of the application.
"""

from __future__ import annotations

import datetime as dt
import hmac
import os
import secrets
import uuid
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from pydantic import Base64Bytes, BaseModel, ConfigDict, Field

UUID_PATTERN: Final = r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
_SIGNING_KEY_SIZE_BITS: Final = 2048


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClientSecret(_Record):
    secret_id: str
    value: str = Field(repr=False)
    expires_at: dt.datetime | None = None

    @classmethod
    def new(cls, expires_at: dt.datetime | None = None) -> ClientSecret:
        return cls(secret_id=str(uuid.uuid4()), value=secrets.token_urlsafe(30), expires_at=expires_at)


class FederatedCredential(_Record):
    """Assertions of this issuer and subject, signed by this key, stand for the application (workload identity)."""

    issuer: str
    subject: str
    public_key_pem: str


class Application(_Record):
    client_id: str
    home_tenant_id: str
    name: str
    secrets: tuple[ClientSecret, ...] = ()
    federated: tuple[FederatedCredential, ...] = ()

    def secret(self, value: str) -> ClientSecret | None:
        """The secret with this value. Compares with each in constant time."""
        return next((s for s in self.secrets if hmac.compare_digest(s.value.encode(), value.encode())), None)


class ServicePrincipal(_Record):
    object_id: str
    client_id: str
    tenant_id: str
    enabled: bool = True


class SigningKey(_Record):
    """Signs the access tokens of every tenant. The private key is PKCS #8, DER."""

    key_id: str
    private_key: Base64Bytes = Field(repr=False)

    @classmethod
    def new(cls) -> SigningKey:
        private = rsa.generate_private_key(public_exponent=65537, key_size=_SIGNING_KEY_SIZE_BITS)
        der = private.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        # model_construct: validation would take the raw bytes for base64 text.
        return cls.model_construct(key_id=os.urandom(20).hex(), private_key=der)
