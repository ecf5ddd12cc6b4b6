"""Keys in Azure Key Vault, used as our application in the customer's tenant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from keymanager.kms import azure_log
from keymanager.kms.base import KmsError, KmsProvider
from keymanager.kms.kind import KmsKind, Surroundings
from shared.api.keymanager import AzureKey

_PERMISSIONS: Final[Mapping[str, tuple[str, str]]] = {
    "WrapKey": ("wrapKey", "keys/wrap/action"),
    "UnwrapKey": ("unwrapKey", "keys/unwrap/action"),
    "GetKey": ("get", "keys/read"),
    "GetDeletedKey": ("get", "keys/read"),
}
"""Operation → the access policy's word, the data action of RBAC."""


class AzureSettings(BaseModel):
    """How Azure is reached, and as whom. `authority` and what follows are given for a simulated cloud only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    client_secrets: dict[str, SecretStr] = Field(
        default_factory=dict, description="secrets of the vendor's own applications, by client id"
    )
    federated_token_file: Path | None = Field(
        default=None, description="workload identity, for applications without a secret"
    )
    token_max_age_s: int = Field(default=900, ge=60, le=86_400, description="when a token is renewed at the latest")
    authority: str | None = Field(default=None, pattern=r"^https://[^/?#@]+$", description="the token service's URL")
    disable_instance_discovery: bool = False
    verify_challenge_resource: bool = Field(
        default=True, description="off only where vaults are reached by address or by a name of one label"
    )
    ca_bundle: Path | None = Field(default=None, description="PEM file of the roots that the endpoints chain to")


class Azure(KmsKind[AzureKey, AzureSettings]):
    """An application whose secret we do not have gets an adapter all the same, every call of which says so (AMBIGUOUS):
    one missing secret must not keep the others' keys from being used."""

    key = AzureKey
    settings = AzureSettings
    adapter = "keymanager.kms.azure"
    log = azure_log.READER

    def connect(self, key: AzureKey, settings: AzureSettings, around: Surroundings) -> KmsProvider:
        from keymanager.kms.azure import AzureKms, AzureKmsConfig

        secret = settings.client_secrets.get(key.client_id)
        config = AzureKmsConfig(
            vault_url=key.vault_url,
            key_name=key.key_name,
            tenant_id=key.tenant_id,
            client_id=key.client_id,
            client_secret=None if secret is None else secret.get_secret_value(),
            federated_token_file=settings.federated_token_file,
            authority=settings.authority,
            disable_instance_discovery=settings.disable_instance_discovery,
            verify_challenge_resource=settings.verify_challenge_resource,
            token_max_age_s=settings.token_max_age_s,
            ca_bundle=settings.ca_bundle,
            limits=around.limits,
        )
        return AzureKms(config, observer=around.observer, clock=around.clock)

    def permission(self, error: KmsError, key: AzureKey) -> str:
        word, action = _PERMISSIONS.get(error.operation, (error.operation, error.operation))
        return f"{word} (RBAC: Microsoft.KeyVault/vaults/{action}, in Key Vault Crypto Service Encryption User)"

    def principal(self, key: AzureKey) -> str:
        return f"application {key.client_id} is not in tenant {key.tenant_id}, or is disabled there: consent to it"

    def session_life_s(self, settings: AzureSettings) -> float:
        return settings.token_max_age_s


KIND: Final = Azure()
