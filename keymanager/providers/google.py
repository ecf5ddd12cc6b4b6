"""Keys in Google Cloud KMS, used as a service account of the customer's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from keymanager.kms import gcp_log
from keymanager.kms.base import KmsError, KmsProvider
from keymanager.kms.kind import KmsKind, Surroundings
from shared.api.keymanager import GoogleKey

_PERMISSIONS: Final[Mapping[str, str]] = {
    "Encrypt": "cloudkms.cryptoKeyVersions.useToEncrypt",
    "Decrypt": "cloudkms.cryptoKeyVersions.useToDecrypt",
    "GetCryptoKey": "cloudkms.cryptoKeys.get",
    "ListCryptoKeyVersions": "cloudkms.cryptoKeyVersions.list",
}


class GoogleSettings(BaseModel):
    """How Google Cloud is reached, and as whom. Endpoints are given for a simulated cloud; the real ones need none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kms_endpoint_url: str | None = None
    iam_endpoint_url: str | None = Field(default=None, description="of the IAM Credentials API")
    ca_bundle: Path | None = Field(default=None, description="PEM file of the roots that the endpoints chain to")
    credentials_file: Path | None = Field(
        default=None,
        description="key of the vendor's own service account, which impersonates the customer's; None: Application "
        "Default Credentials",
    )
    session_duration_s: int = Field(default=3600, ge=60, le=3600, description="of an impersonated token")


class Google(KmsKind[GoogleKey, GoogleSettings]):
    key = GoogleKey
    settings = GoogleSettings
    adapter = "keymanager.kms.gcp"
    log = gcp_log.READER

    def connect(self, key: GoogleKey, settings: GoogleSettings, around: Surroundings) -> KmsProvider:
        from keymanager.kms.gcp import GoogleKms, GoogleKmsConfig

        config = GoogleKmsConfig(
            key_name=key.key_name,
            service_account=key.service_account,
            session_duration_s=settings.session_duration_s,
            credentials_file=settings.credentials_file,
            kms_endpoint_url=settings.kms_endpoint_url,
            iam_endpoint_url=settings.iam_endpoint_url,
            ca_bundle=settings.ca_bundle,
            limits=around.limits,
        )
        return GoogleKms(config, observer=around.observer, clock=around.clock)

    def permission(self, error: KmsError, key: GoogleKey) -> str:
        permission = _PERMISSIONS.get(error.operation, error.operation)
        return f"{permission} (roles/cloudkms.cryptoKeyEncrypterDecrypter and roles/cloudkms.viewer)"

    def principal(self, key: GoogleKey) -> str:
        return (
            f"{key.service_account} cannot be impersonated: grant our own service account "
            "roles/iam.serviceAccountTokenCreator on it"
        )

    def session_life_s(self, settings: GoogleSettings) -> float:
        return settings.session_duration_s


KIND: Final = Google()
