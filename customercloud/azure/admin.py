"""Administration of the simulated Azure: what the portal, Azure Resource Manager and Log Analytics are for.

Tenants, applications and service principals; vaults with their mode, access policies and role assignments; the audit
log. A change of who may do what is seen by callers after the propagation delay in force; everything else at once.
"""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Callable
from typing import Annotated, Final

from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from customercloud.aws.admin import stored_lines
from customercloud.aws.trail import Trail
from customercloud.azure.access import Access, AccessPolicy, Mode, Permission, Role, RoleAssignment
from customercloud.azure.identity import (
    UUID_PATTERN,
    Application,
    ClientSecret,
    FederatedCredential,
    ServicePrincipal,
)
from customercloud.azure.service import AzureEndpoint
from customercloud.azure.state import DEFAULT_VAULT, AzureState, Vault
from customercloud.faults import FaultInjector
from shared.clock import Clock
from shared.errors import ConflictError, NotFoundError

VAULT_NAME_PATTERN: Final = r"^[a-z][a-z0-9-]{1,22}[a-z0-9]$"
MAX_QUERY_RECORDS: Final = 10_000

Uuid = Annotated[str, Field(pattern=UUID_PATTERN)]
VaultName = Annotated[str, Field(pattern=VAULT_NAME_PATTERN)]
UuidPath = Annotated[str, Path(pattern=UUID_PATTERN)]
VaultPath = Annotated[str, Path(pattern=VAULT_NAME_PATTERN)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PrincipalCredentials(_Model):
    """An application as one tenant knows it, with a secret of the application."""

    tenant_id: str
    client_id: str
    object_id: str
    client_secret: str = Field(repr=False)


class PrincipalRequest(_Model):
    """A service principal in the tenant. Without `client_id` the application is made too, with this tenant as home."""

    client_id: Uuid | None = None
    name: str = Field(default="application", min_length=1, max_length=120)


class PrincipalChange(_Model):
    enabled: bool


class SecretRequest(_Model):
    expires_at: dt.datetime | None = None


class VaultRequest(_Model):
    tenant_id: Uuid
    mode: Mode = Mode.RBAC
    recoverable_days: int = Field(default=90, ge=7, le=90)
    purge_protection: bool = False
    public_operations_on_disabled_keys: bool = False


class VaultAnswer(_Model):
    name: str
    tenant_id: str
    mode: Mode
    recoverable_days: int
    purge_protection: bool
    public_operations_on_disabled_keys: bool
    policies: tuple[AccessPolicy, ...]
    assignments: tuple[RoleAssignment, ...]


class BootstrapRequest(_Model):
    """The usual cast: a customer with a vault, and a vendor whose application the customer lets in.

    The vendor's service principal gets no right to any key: that is for the customer to give.
    """

    customer_tenant_id: Uuid = "11111111-1111-4111-8111-111111111111"
    vendor_tenant_id: Uuid = "22222222-2222-4222-8222-222222222222"
    vault: VaultName = DEFAULT_VAULT


class BootstrapAnswer(_Model):
    customer: PrincipalCredentials
    """Key Vault Administrator of the vault."""
    vendor: PrincipalCredentials
    """The vendor's application as the customer's tenant knows it."""
    vault: str


class AzureAdmin:
    """Use cases of the routes below."""

    def __init__(self, state: AzureState, clock: Clock, delay: Callable[[], dt.timedelta]) -> None:
        self._state = state
        self._clock = clock
        self._delay = delay

    # ── identities ─────────────────────────────────────────────────────────────────────────────────────────────

    def bootstrap(self, request: BootstrapRequest) -> BootstrapAnswer:
        """Idempotent: what exists is kept, with its credentials. Raises ConflictError for another tenant's vault."""
        vault = self._state.snapshot.vaults.get(request.vault)
        if vault is not None and vault.tenant_id != request.customer_tenant_id:
            raise ConflictError(f"vault {request.vault} belongs to another tenant")
        if vault is None:
            self.put_vault(request.vault, VaultRequest(tenant_id=request.customer_tenant_id))
        customer = self._named_application(request.customer_tenant_id, "customer-admin")
        vendor = self._named_application(request.vendor_tenant_id, "keylake")
        admin = self.put_principal(
            request.customer_tenant_id, PrincipalRequest(client_id=customer.client_id, name=customer.name)
        )
        used = self.put_principal(
            request.customer_tenant_id, PrincipalRequest(client_id=vendor.client_id, name=vendor.name)
        )
        administrator = RoleAssignment(object_id=admin.object_id, role=Role.ADMINISTRATOR)
        if administrator not in self.vault(request.vault).access.assignments:
            self._bootstrap_access(request.vault, administrator)
        return BootstrapAnswer(
            customer=self._credentials(customer, admin), vendor=self._credentials(vendor, used), vault=request.vault
        )

    def _bootstrap_access(self, name: str, administrator: RoleAssignment) -> None:
        vault = self.vault(name)
        policy = AccessPolicy(object_id=administrator.object_id, permissions=frozenset(Permission))
        access = vault.access.model_copy(
            update={
                "assignments": (*vault.access.assignments, administrator),
                "policies": (*vault.access.policies, policy),
            }
        )
        self._state.put_vault(vault.with_access(access, administrator.object_id, self._clock.now(), dt.timedelta(0)))

    def _named_application(self, tenant_id: str, name: str) -> Application:
        found = next(
            (
                application
                for application in self._state.snapshot.applications.values()
                if (application.home_tenant_id, application.name) == (tenant_id, name) and application.secrets
            ),
            None,
        )
        if found is not None:
            return found
        application = Application(
            client_id=str(uuid.uuid4()), home_tenant_id=tenant_id, name=name, secrets=(ClientSecret.new(),)
        )
        self._state.put_application(application)
        return application

    def _credentials(self, application: Application, principal: ServicePrincipal) -> PrincipalCredentials:
        return PrincipalCredentials(
            tenant_id=principal.tenant_id,
            client_id=application.client_id,
            object_id=principal.object_id,
            client_secret=application.secrets[0].value,
        )

    def put_principal(self, tenant_id: str, request: PrincipalRequest) -> ServicePrincipal:
        """The tenant's principal of the application; the one that is there, if there is one."""
        client_id = request.client_id
        if client_id is None:
            application = Application(
                client_id=str(uuid.uuid4()), home_tenant_id=tenant_id, name=request.name, secrets=(ClientSecret.new(),)
            )
            self._state.put_application(application)
            client_id = application.client_id
        self.application(client_id)
        principal = self._state.principal_of(client_id, tenant_id)
        if principal is None:
            principal = ServicePrincipal(object_id=str(uuid.uuid4()), client_id=client_id, tenant_id=tenant_id)
            self._state.put_principal(principal)
        return principal

    def principal_credentials(self, tenant_id: str, request: PrincipalRequest) -> PrincipalCredentials:
        principal = self.put_principal(tenant_id, request)
        return self._credentials(self.application(principal.client_id), principal)

    def application(self, client_id: str) -> Application:
        application = self._state.snapshot.applications.get(client_id)
        if application is None:
            raise NotFoundError("no such application")
        return application

    def principal(self, tenant_id: str, object_id: str) -> ServicePrincipal:
        principal = self._state.snapshot.principals.get(object_id)
        if principal is None or principal.tenant_id != tenant_id:
            raise NotFoundError("no such service principal in this tenant")
        return principal

    def change_principal(self, tenant_id: str, object_id: str, change: PrincipalChange) -> None:
        principal = self.principal(tenant_id, object_id)
        self._state.put_principal(principal.model_copy(update={"enabled": change.enabled}))

    def remove_principal(self, tenant_id: str, object_id: str) -> None:
        self._state.remove_principal(self.principal(tenant_id, object_id).object_id)

    def replace_secret(self, client_id: str, request: SecretRequest) -> ClientSecret:
        """A new secret; those before it are gone."""
        secret = ClientSecret.new(request.expires_at)
        self._state.put_application(self.application(client_id).model_copy(update={"secrets": (secret,)}))
        return secret

    def trust(self, client_id: str, federated: FederatedCredential) -> None:
        application = self.application(client_id)
        kept = tuple(f for f in application.federated if (f.issuer, f.subject) != (federated.issuer, federated.subject))
        self._state.put_application(application.model_copy(update={"federated": (*kept, federated)}))

    # ── vaults ─────────────────────────────────────────────────────────────────────────────────────────────────

    def vault(self, name: str) -> Vault:
        vault = self._state.snapshot.vaults.get(name)
        if vault is None:
            raise NotFoundError(f"no vault {name}")
        return vault

    def put_vault(self, name: str, request: VaultRequest) -> Vault:
        """Makes the vault, or changes its settings; keys, access policies and role assignments stay.

        Raises ConflictError for another tenant, and when purge protection would be switched off.
        """
        settings = request.model_dump(exclude={"mode"})
        old = self._state.snapshot.vaults.get(name)
        if old is not None and old.tenant_id != request.tenant_id:
            raise ConflictError(f"vault {name} belongs to another tenant")
        if old is not None and old.purge_protection and not request.purge_protection:
            raise ConflictError("purge protection cannot be switched off")
        vault = (old or Vault(name=name, tenant_id=request.tenant_id)).model_copy(update=settings)
        if vault.access.mode is not request.mode:
            access = vault.access.model_copy(update={"mode": request.mode})
            vault = vault.with_access(access, None, self._clock.now(), self._delay())
        self._state.put_vault(vault)
        return vault

    def _change_access(self, name: str, object_id: str, change: Callable[[Access], Access]) -> Vault:
        vault = self.vault(name)
        vault = vault.with_access(change(vault.access), object_id, self._clock.now(), self._delay())
        self._state.put_vault(vault)
        return vault

    def put_policy(self, name: str, policy: AccessPolicy) -> Vault:
        """Replaces the principal's policy; one without permissions removes it."""

        def change(access: Access) -> Access:
            kept = tuple(p for p in access.policies if p.object_id != policy.object_id)
            return access.model_copy(update={"policies": (*kept, policy) if policy.permissions else kept})

        return self._change_access(name, policy.object_id, change)

    def assign(self, name: str, assignment: RoleAssignment) -> Vault:
        def change(access: Access) -> Access:
            kept = tuple(a for a in access.assignments if a != assignment)
            return access.model_copy(update={"assignments": (*kept, assignment)})

        return self._change_access(name, assignment.object_id, change)

    def unassign(self, name: str, object_id: str, key_name: str | None) -> Vault:
        """Removes the principal's roles: those on this key, or all when no key is named."""

        def change(access: Access) -> Access:
            kept = tuple(
                a
                for a in access.assignments
                if a.object_id != object_id or (key_name is not None and a.key_name != key_name)
            )
            return access.model_copy(update={"assignments": kept})

        return self._change_access(name, object_id, change)


def _vault_answer(vault: Vault) -> VaultAnswer:
    return VaultAnswer(
        name=vault.name,
        tenant_id=vault.tenant_id,
        mode=vault.access.mode,
        recoverable_days=vault.recoverable_days,
        purge_protection=vault.purge_protection,
        public_operations_on_disabled_keys=vault.public_operations_on_disabled_keys,
        policies=vault.access.policies,
        assignments=vault.access.assignments,
    )


def azure_router(
    state: AzureState, trail: Trail, endpoint: AzureEndpoint, faults: FaultInjector, clock: Clock
) -> APIRouter:
    router = APIRouter(prefix="/azure", tags=["azure"])
    admin = AzureAdmin(state, clock, endpoint.delay)

    @router.post("/bootstrap")
    async def bootstrap(request: BootstrapRequest) -> BootstrapAnswer:
        return admin.bootstrap(request)

    @router.post("/tenants/{tenant_id}/principals")
    async def put_principal(tenant_id: UuidPath, request: PrincipalRequest) -> PrincipalCredentials:
        return admin.principal_credentials(tenant_id, request)

    @router.patch("/tenants/{tenant_id}/principals/{object_id}", status_code=204)
    async def change_principal(tenant_id: UuidPath, object_id: UuidPath, change: PrincipalChange) -> None:
        """A disabled principal gets no tokens; those that it has live on until they expire."""
        admin.change_principal(tenant_id, object_id, change)

    @router.delete("/tenants/{tenant_id}/principals/{object_id}", status_code=204)
    async def remove_principal(tenant_id: UuidPath, object_id: UuidPath) -> None:
        """One that is made again for the same application has another object id, which no policy names."""
        admin.remove_principal(tenant_id, object_id)

    @router.put("/applications/{client_id}/secret")
    async def replace_secret(client_id: UuidPath, request: SecretRequest) -> dict[str, str]:
        return {"client_secret": admin.replace_secret(client_id, request).value}

    @router.put("/applications/{client_id}/federated-credentials", status_code=204)
    async def trust(client_id: UuidPath, federated: FederatedCredential) -> None:
        admin.trust(client_id, federated)

    @router.put("/vaults/{name}")
    async def put_vault(name: VaultPath, request: VaultRequest) -> VaultAnswer:
        return _vault_answer(admin.put_vault(name, request))

    @router.get("/vaults/{name}")
    async def get_vault(name: VaultPath) -> VaultAnswer:
        return _vault_answer(admin.vault(name))

    @router.put("/vaults/{name}/access-policies")
    async def put_policy(name: VaultPath, policy: AccessPolicy) -> VaultAnswer:
        return _vault_answer(admin.put_policy(name, policy))

    @router.put("/vaults/{name}/role-assignments")
    async def assign(name: VaultPath, assignment: RoleAssignment) -> VaultAnswer:
        return _vault_answer(admin.assign(name, assignment))

    @router.delete("/vaults/{name}/role-assignments/{object_id}")
    async def unassign(name: VaultPath, object_id: UuidPath, key_name: str | None = None) -> VaultAnswer:
        return _vault_answer(admin.unassign(name, object_id, key_name))

    @router.post("/vaults/{name}/keys/{key_name}/complete-deletion", status_code=204)
    async def complete_deletion(name: VaultPath, key_name: str) -> None:
        """Let the retention of a deleted key be over now, purge protection or not."""
        vault = admin.vault(name)
        key = state.key(vault, key_name)
        if key is None:
            raise NotFoundError("no such key")
        if not key.deleted:
            raise ConflictError("the key is not deleted")
        await endpoint.purge(vault, key.name)

    @router.get("/events")
    async def events() -> Response:
        """The whole audit log of all tenants, oldest first, one JSON record a line."""
        return StreamingResponse(stored_lines(trail), media_type="application/x-ndjson")

    @router.get("/tenants/{tenant_id}/events")
    async def tenant_events(
        tenant_id: UuidPath,
        since: Annotated[dt.datetime | None, Query()] = None,
        operation: Annotated[str | None, Query(max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_QUERY_RECORDS)] = MAX_QUERY_RECORDS,
    ) -> Response:
        """What the customer finds in Azure Monitor: its own tenant's records, newest first, one a line.

        Withheld for `trail_delay_s` (the real service: up to ten minutes).
        """
        latest = clock.now() - dt.timedelta(seconds=faults.faults.trail_delay_s)
        found: list[bytes] = []
        for entry in trail.newest_first():
            record = entry.record
            time = dt.datetime.fromisoformat(record["time"])
            if record.get("tenantId") != tenant_id or time > latest or (since is not None and time < since):
                continue
            if operation is not None and record["operationName"] != operation:
                continue
            found.append(json.dumps(record).encode() + b"\n")
            if len(found) == limit:
                break
        return Response(b"".join(found), media_type="application/x-ndjson")

    return router
