"""Who may do what in a vault: access policies or Azure RBAC, whichever the vault is set to. Pure.

One `Permission` is a word of an access policy ("keys unwrapKey") and a data action of RBAC
("Microsoft.KeyVault/vaults/keys/unwrap/action") at once. Roles and their data actions are those of "Azure built-in
roles for Key Vault data plane operations", as far as they speak of keys.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from pydantic import BaseModel, ConfigDict

from customercloud.azure.errors import AzureError


class Permission(StrEnum):
    """The value is the access policy's word."""

    GET = "get"
    LIST = "list"
    CREATE = "create"
    IMPORT = "import"
    UPDATE = "update"
    DELETE = "delete"
    RECOVER = "recover"
    PURGE = "purge"
    BACKUP = "backup"
    RESTORE = "restore"
    ENCRYPT = "encrypt"
    DECRYPT = "decrypt"
    WRAP = "wrapKey"
    UNWRAP = "unwrapKey"
    SIGN = "sign"
    VERIFY = "verify"
    RELEASE = "release"
    ROTATE = "rotate"
    GET_ROTATION_POLICY = "getrotationpolicy"
    SET_ROTATION_POLICY = "setrotationpolicy"


_ACTIONS: Final = {
    Permission.GET: "keys/read",
    Permission.LIST: "keys/read",
    Permission.CREATE: "keys/create/action",
    Permission.IMPORT: "keys/import/action",
    Permission.UPDATE: "keys/update/action",
    Permission.DELETE: "keys/delete",
    Permission.RECOVER: "keys/recover/action",
    Permission.PURGE: "keys/purge/action",
    Permission.BACKUP: "keys/backup/action",
    Permission.RESTORE: "keys/restore/action",
    Permission.ENCRYPT: "keys/encrypt/action",
    Permission.DECRYPT: "keys/decrypt/action",
    Permission.WRAP: "keys/wrap/action",
    Permission.UNWRAP: "keys/unwrap/action",
    Permission.SIGN: "keys/sign/action",
    Permission.VERIFY: "keys/verify/action",
    Permission.RELEASE: "keys/release/action",
    Permission.ROTATE: "keys/rotate/action",
    Permission.GET_ROTATION_POLICY: "keyrotationpolicies/read",
    Permission.SET_ROTATION_POLICY: "keyrotationpolicies/write",
}


def data_action(permission: Permission) -> str:
    return f"Microsoft.KeyVault/vaults/{_ACTIONS[permission]}"


class Mode(StrEnum):
    ACCESS_POLICY = "access_policy"
    RBAC = "rbac"


class Role(StrEnum):
    ADMINISTRATOR = "Key Vault Administrator"
    CRYPTO_OFFICER = "Key Vault Crypto Officer"
    CRYPTO_USER = "Key Vault Crypto User"
    ENCRYPTION_USER = "Key Vault Crypto Service Encryption User"
    READER = "Key Vault Reader"


_P = Permission
_ENCRYPTION_USER: Final = frozenset({_P.GET, _P.LIST, _P.WRAP, _P.UNWRAP})
ROLE_PERMISSIONS: Final = {
    Role.ADMINISTRATOR: frozenset(Permission),
    Role.CRYPTO_OFFICER: frozenset(Permission),
    Role.CRYPTO_USER: _ENCRYPTION_USER | {_P.UPDATE, _P.BACKUP, _P.ENCRYPT, _P.DECRYPT, _P.SIGN, _P.VERIFY},
    Role.ENCRYPTION_USER: _ENCRYPTION_USER,
    Role.READER: frozenset({_P.GET, _P.LIST}),
}


class RoleAssignment(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    object_id: str
    role: Role
    key_name: str | None = None
    """Scope: one key, or the vault."""

    def allows(self, object_id: str, permission: Permission, key_name: str | None) -> bool:
        in_scope = self.key_name is None or (key_name is not None and self.key_name.lower() == key_name.lower())
        return self.object_id == object_id and in_scope and permission in ROLE_PERMISSIONS[self.role]


class AccessPolicy(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    object_id: str
    permissions: frozenset[Permission]


class Access(BaseModel):
    """All that decides. What the vault is not set to is kept, and not asked, as in the real service."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Mode = Mode.RBAC
    policies: tuple[AccessPolicy, ...] = ()
    assignments: tuple[RoleAssignment, ...] = ()

    def allows(self, object_id: str, permission: Permission, key_name: str | None) -> bool:
        """`key_name` is None for what concerns the vault as a whole, e.g. listing."""
        match self.mode:
            case Mode.RBAC:
                return any(a.allows(object_id, permission, key_name) for a in self.assignments)
            case Mode.ACCESS_POLICY:
                return any(p.object_id == object_id and permission in p.permissions for p in self.policies)


def denial(
    mode: Mode,
    permission: Permission,
    *,
    app_id: str,
    object_id: str,
    issuer: str,
    vault: str,
    location: str,
    scope: str,
) -> AzureError:
    """`scope` is the resource id of the vault, or of the key in it."""
    match mode:
        case Mode.RBAC:
            message = (
                "Caller is not authorized to perform action on resource.\r\nIf role assignments, deny assignments or "
                "role definitions were changed recently, please observe propagation time.\r\n"
                f"Caller: appid={app_id};oid={object_id};iss={issuer}\r\n"
                f"Action: '{data_action(permission)}'\r\nResource: '{scope}'\r\nAssignment: (not found)\r\n"
                "DenyAssignmentId: null\r\nDecisionReason: 'DeniedWithNoValidRBAC' \r\n"
                f"Vault: {vault};location={location}\r\n"
            )
            return AzureError(403, "Forbidden", message, "ForbiddenByRbac")
        case Mode.ACCESS_POLICY:
            message = (
                f"The user, group or application 'appid={app_id};oid={object_id};numgroups=0;iss={issuer}' does not "
                f"have keys {permission} permission on key vault '{vault};location={location}'. For help resolving "
                "this issue, please see https://go.microsoft.com/fwlink/?linkid=2125287"
            )
            return AzureError(403, "Forbidden", message, "AccessDenied")
