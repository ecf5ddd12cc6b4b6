"""Keys in AWS KMS, used as a role of the customer's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from keymanager.kms import aws_log
from keymanager.kms.base import KmsError, KmsProvider
from keymanager.kms.kind import KmsKind, Surroundings
from shared.api.keymanager import AwsKey

_PERMISSIONS: Final[Mapping[str, str]] = {"ReEncrypt": "kms:ReEncryptFrom and kms:ReEncryptTo"}


class AwsSettings(BaseModel):
    """How AWS is reached, and as whom. Endpoints are given for a simulated cloud; the real ones need none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kms_endpoint_url: str | None = None
    sts_endpoint_url: str | None = None
    ca_bundle: Path | None = Field(default=None, description="PEM file of the roots that the endpoints chain to")
    access_key_id: str | None = Field(
        default=None, description="the vendor's own identity, which assumes the customer's role; None: boto3's chain"
    )
    secret_access_key: SecretStr | None = None
    session_duration_s: int = Field(default=3600, ge=900, le=43200, description="of an assumed role")


class Aws(KmsKind[AwsKey, AwsSettings]):
    key = AwsKey
    settings = AwsSettings
    adapter = "keymanager.kms.aws"
    log = aws_log.READER

    def connect(self, key: AwsKey, settings: AwsSettings, around: Surroundings) -> KmsProvider:
        from keymanager.kms.aws import AwsKms, AwsKmsConfig

        secret = settings.secret_access_key
        config = AwsKmsConfig(
            key_id=key.key_arn,
            region=key.key_arn.split(":")[3],
            role_arn=key.role_arn,
            external_id=key.external_id,
            session_name="keylake",
            session_duration_s=settings.session_duration_s,
            access_key_id=settings.access_key_id,
            secret_access_key=None if secret is None else secret.get_secret_value(),
            kms_endpoint_url=settings.kms_endpoint_url,
            sts_endpoint_url=settings.sts_endpoint_url,
            ca_bundle=settings.ca_bundle,
            limits=around.limits,
        )
        return AwsKms(config, observer=around.observer, clock=around.clock)

    def permission(self, error: KmsError, key: AwsKey) -> str:
        permission = error.permission or _PERMISSIONS.get(error.operation, f"kms:{error.operation}")
        return f"{permission} (in the key's policy or in the role's)"

    def principal(self, key: AwsKey) -> str:
        return "the role cannot be assumed: its trust policy must allow us, with the external id"

    def session_life_s(self, settings: AwsSettings) -> float:
        return settings.session_duration_s


KIND: Final = Aws()
