"""Projects, service accounts and their keys.

As in the real cloud a key is an RSA pair whose public half the cloud needs; here the private half is kept as well
(sealed with the rest), so that setting up the same cast twice hands out the same credentials.
"""

from __future__ import annotations

import secrets
from typing import Any, Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from pydantic import BaseModel, ConfigDict, Field

UNIVERSE: Final = "googleapis.com"
TOKEN_AUDIENCE: Final = "https://oauth2.googleapis.com/token"  # noqa: S105 - a URL
"""What SDKs put into an assertion as its audience, whatever the token endpoint's address is."""
_RSA_BITS: Final = 2048


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Project(_Record):
    project_id: str
    number: str
    data_access_logs: bool = True
    """Real projects start without; here somebody has enabled them."""


class AccountKey(_Record):
    key_id: str
    private_key_pem: str = Field(repr=False)
    public_key_pem: str

    @classmethod
    def new(cls) -> AccountKey:
        """Takes about 0.1 s."""
        key = rsa.generate_private_key(65537, _RSA_BITS)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return cls(
            key_id=secrets.token_hex(20),
            private_key_pem=pem.decode("ascii"),
            public_key_pem=public.decode("ascii"),
        )


class ServiceAccount(_Record):
    email: str
    project_id: str
    unique_id: str
    keys: tuple[AccountKey, ...] = ()

    @classmethod
    def new(cls, account_id: str, project_id: str) -> ServiceAccount:
        """A new unique id: an account that is made again under the same name is another one."""
        email = f"{account_id}@{project_id}.iam.gserviceaccount.com"
        return cls(email=email, project_id=project_id, unique_id=str(10**20 + secrets.randbelow(10**20)))

    @property
    def member(self) -> str:
        return f"serviceAccount:{self.email}"

    def credentials_file(self, token_uri: str) -> dict[str, Any]:
        """The JSON that the console lets one download, as `google.auth` reads it. Needs a key."""
        key = self.keys[-1]
        return {
            "type": "service_account",
            "project_id": self.project_id,
            "private_key_id": key.key_id,
            "private_key": key.private_key_pem,
            "client_email": self.email,
            "client_id": self.unique_id,
            "token_uri": token_uri,
            "universe_domain": UNIVERSE,
        }
