"""What the customer does with its own Azure, and what whoever runs the simulation does to it.

`AzureCustomer` is Microsoft's own SDK with the customer's own credentials: it works against the real Key Vault just as
well. `AzureCloudAdmin` speaks to `/_keylake/azure` and exists only here; in the real cloud that is the portal, Azure
Resource Manager and Azure Monitor. Both block; asyncio code calls them in a thread.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

from azure.identity import ClientSecretCredential
from azure.keyvault.keys import KeyClient, KeyVaultKey

from customercloud.azure.access import AccessPolicy, Permission, Role, RoleAssignment
from customercloud.azure.admin import (
    BootstrapAnswer,
    BootstrapRequest,
    PrincipalChange,
    PrincipalCredentials,
    PrincipalRequest,
    SecretRequest,
    VaultAnswer,
    VaultRequest,
)
from customercloud.azure.identity import FederatedCredential
from customercloud.client import CloudAdmin


@dataclass(frozen=True, slots=True)
class AzureEndpoint:
    """Where the vault is. `authority` and `ca_bundle` are None for the real Azure."""

    vault_url: str
    authority: str | None = None
    ca_bundle: Path | None = None
    verify_challenge_resource: bool = True
    """False where the vault is reached by an address, which is nobody's subdomain."""


@dataclass(frozen=True, slots=True)
class ClientSecret:
    tenant_id: str
    client_id: str
    value: str = field(repr=False)

    @classmethod
    def of(cls, credentials: PrincipalCredentials) -> ClientSecret:
        return cls(credentials.tenant_id, credentials.client_id, credentials.client_secret)


class AzureCustomer:
    """The customer's key administrator, for one vault. `name` is a key's name. Raises the SDK's exceptions."""

    def __init__(self, endpoint: AzureEndpoint, secret: ClientSecret) -> None:
        trust: dict[str, Any] = {} if endpoint.ca_bundle is None else {"connection_verify": str(endpoint.ca_bundle)}
        authority: dict[str, Any] = (
            {} if endpoint.authority is None else {"authority": endpoint.authority, "disable_instance_discovery": True}
        )
        self._credential = ClientSecretCredential(
            secret.tenant_id, secret.client_id, secret.value, **authority, **trust
        )
        self.keys = KeyClient(
            endpoint.vault_url,
            self._credential,
            verify_challenge_resource=endpoint.verify_challenge_resource,
            **trust,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self.keys.close()
        self._credential.close()

    # ── life of a key ──────────────────────────────────────────────────────────────────────────────────────────

    def create_key(self, name: str, size_bits: int = 2048) -> KeyVaultKey:
        return self.keys.create_rsa_key(name, size=size_bits)

    def disable(self, name: str) -> None:
        """Every version: what an older one wrapped must not open either."""
        self._set_enabled(name, enabled=False)

    def enable(self, name: str) -> None:
        self._set_enabled(name, enabled=True)

    def _set_enabled(self, name: str, *, enabled: bool) -> None:
        for version in list(self.keys.list_properties_of_key_versions(name)):
            self.keys.update_key_properties(name, version.version, enabled=enabled)

    def delete(self, name: str) -> dt.datetime:
        """Soft-deletes. When the key will be gone; until then it can be recovered, and cannot be used."""
        scheduled = self.keys.begin_delete_key(name).result().scheduled_purge_date
        if scheduled is None:
            raise RuntimeError("the vault has no soft delete")
        return scheduled

    def recover(self, name: str) -> None:
        self.keys.begin_recover_deleted_key(name).result()

    def purge(self, name: str) -> None:
        """Ends the retention of a deleted key: it is gone for good. Refused where the vault has purge protection."""
        self.keys.purge_deleted_key(name)

    def rotate(self, name: str) -> str:
        """A new version now; returns it. What older versions wrapped still opens."""
        version = self.keys.rotate_key(name).properties.version
        if version is None:
            raise RuntimeError("the new version has no name")
        return version


class AzureCloudAdmin(CloudAdmin):
    """The simulation's administrator, for Azure. Raises as CloudAdmin does."""

    def bootstrap_azure(self, **names: str) -> BootstrapAnswer:
        """Customer, vault and vendor; `names` are the fields of BootstrapRequest. May be repeated."""
        request = BootstrapRequest.model_validate(names)
        return BootstrapAnswer.model_validate_json(self._call("POST", "azure/bootstrap", request.model_dump_json()))

    # ── identities ─────────────────────────────────────────────────────────────────────────────────────────────

    def put_principal(self, tenant_id: str, client_id: str | None = None, name: str = "app") -> PrincipalCredentials:
        """Lets the application into the tenant; without one, a new application whose home the tenant is."""
        request = PrincipalRequest(client_id=client_id, name=name)
        answer = self._call("POST", f"azure/tenants/{tenant_id}/principals", request.model_dump_json())
        return PrincipalCredentials.model_validate_json(answer)

    def set_principal_enabled(self, tenant_id: str, object_id: str, *, enabled: bool) -> None:
        change = PrincipalChange(enabled=enabled)
        self._call("PATCH", f"azure/tenants/{tenant_id}/principals/{object_id}", change.model_dump_json())

    def remove_principal(self, tenant_id: str, object_id: str) -> None:
        self._call("DELETE", f"azure/tenants/{tenant_id}/principals/{object_id}")

    def replace_secret(self, client_id: str, expires_at: dt.datetime | None = None) -> str:
        request = SecretRequest(expires_at=expires_at)
        answer = self._call("PUT", f"azure/applications/{client_id}/secret", request.model_dump_json())
        secret: str = json.loads(answer)["client_secret"]
        return secret

    def trust(self, client_id: str, federated: FederatedCredential) -> None:
        path = f"azure/applications/{client_id}/federated-credentials"
        self._call("PUT", path, federated.model_dump_json())

    # ── vaults ─────────────────────────────────────────────────────────────────────────────────────────────────

    def vault(self, name: str) -> VaultAnswer:
        return VaultAnswer.model_validate_json(self._call("GET", f"azure/vaults/{name}"))

    def put_vault(self, name: str, request: VaultRequest) -> VaultAnswer:
        answer = self._call("PUT", f"azure/vaults/{name}", request.model_dump_json())
        return VaultAnswer.model_validate_json(answer)

    def put_policy(self, vault: str, object_id: str, permissions: frozenset[Permission]) -> None:
        """No permissions: the principal's policy is removed."""
        policy = AccessPolicy(object_id=object_id, permissions=permissions)
        self._call("PUT", f"azure/vaults/{vault}/access-policies", policy.model_dump_json())

    def assign(self, vault: str, object_id: str, role: Role, key_name: str | None = None) -> None:
        assignment = RoleAssignment(object_id=object_id, role=role, key_name=key_name)
        self._call("PUT", f"azure/vaults/{vault}/role-assignments", assignment.model_dump_json())

    def unassign(self, vault: str, object_id: str, key_name: str | None = None) -> None:
        query = "" if key_name is None else "?" + urlencode({"key_name": key_name})
        self._call("DELETE", f"azure/vaults/{vault}/role-assignments/{object_id}{query}")

    def complete_key_deletion(self, vault: str, key_name: str) -> None:
        """End the retention of a deleted key, purge protection or not: the key is gone now."""
        self._call("POST", f"azure/vaults/{vault}/keys/{key_name}/complete-deletion")

    # ── what happened ──────────────────────────────────────────────────────────────────────────────────────────

    def azure_events(
        self, tenant_id: str, *, since: dt.datetime | None = None, operation: str | None = None
    ) -> Iterator[dict[str, Any]]:
        """The tenant's audit records, newest first, as it would find them in Azure Monitor."""
        query: dict[str, str] = {} if since is None else {"since": since.isoformat()}
        query |= {} if operation is None else {"operation": operation}
        answer = self._call("GET", f"azure/tenants/{tenant_id}/events?{urlencode(query)}")
        for line in answer.splitlines():
            yield json.loads(line)
