"""Parts of settings (shared/settings.py), which others use, too: where a peer listens, who a service is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from shared.tls import CertificateFiles


class Address(BaseModel):
    """Where a peer listens. Its certificate is checked against the service's name, not against `host`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    host: str = "127.0.0.1"
    port: int = Field(ge=0, le=65535)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def addresses_of(value: Any) -> Any:
    """One address is a list of one."""
    return (value,) if isinstance(value, Address | Mapping) else value


Addresses = Annotated[tuple[Address, ...], BeforeValidator(addresses_of), Field(min_length=1, max_length=9)]
"""Of all replicas of a service, in any order; in settings also one address without a list. Who is served where is found
out by asking."""


class Identity(BaseModel):
    """What a service needs to speak to its peers: its certificate, the CA, its signing key, the trust bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    certificate: Path
    private_key: Path
    ca_certificate: Path
    signing_key: Path
    trust_bundle: Path

    @property
    def files(self) -> CertificateFiles:
        return CertificateFiles(self.certificate, self.private_key)
