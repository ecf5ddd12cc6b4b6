"""IAM: roles, policies, and the decision whether a member has a permission.

A policy binds members to roles and is attached to a project, a key ring, a crypto key or a service account. What a
policy grants holds for everything beneath ("Resource hierarchy", IAM documentation); there is no deny. Role contents:
"IAM basic and predefined roles reference", cut to the permissions that exist here.
"""

from __future__ import annotations

import datetime as dt
import re
import secrets
from collections.abc import Iterable
from typing import Final

from pydantic import BaseModel, ConfigDict

from customercloud.delayed import Delayed
from customercloud.google.names import (
    KeyName,
    LocationName,
    PolicyTarget,
    ProjectName,
    RingName,
    ServiceAccountName,
)

EMPTY_ETAG: Final = b"\x00\x20\x01"
"""Of a policy that was never set ("ACAB")."""
_ETAG_SIZE_BYTES: Final = 8
ALL_SERVICES: Final = "allServices"
_MEMBER: Final = re.compile(
    r"allUsers|allAuthenticatedUsers|(?:user|group|serviceAccount):[^@\s]+@[^@\s]+|domain:[a-z0-9.-]+"
    r"|deleted:(?:user|group|serviceAccount):[^@\s]+@[^@\s]+\?uid=[0-9]+"
)

_CRYPT: Final = ("cloudkms.cryptoKeyVersions.useToEncrypt", "cloudkms.cryptoKeyVersions.useToDecrypt")
_OTHER_PURPOSES: Final = (
    "cloudkms.cryptoKeyVersions.useToSign",
    "cloudkms.cryptoKeyVersions.useToVerify",
    "cloudkms.cryptoKeyVersions.useToDecapsulate",
    "cloudkms.cryptoKeyVersions.viewPublicKey",
)
_RANDOM: Final = "cloudkms.locations.generateRandomBytes"
_LOCATIONS: Final = ("cloudkms.locations.get", "cloudkms.locations.list")
_PROJECT: Final = ("resourcemanager.projects.get",)
_VIEW: Final = (
    "cloudkms.keyRings.get",
    "cloudkms.keyRings.list",
    "cloudkms.cryptoKeys.get",
    "cloudkms.cryptoKeys.list",
    "cloudkms.cryptoKeyVersions.get",
    "cloudkms.cryptoKeyVersions.list",
    "cloudkms.importJobs.get",
    "cloudkms.importJobs.list",
    "cloudkms.retiredResources.get",
    "cloudkms.retiredResources.list",
    *_LOCATIONS,
    *_PROJECT,
)
_GET_POLICY: Final = ("cloudkms.keyRings.getIamPolicy", "cloudkms.cryptoKeys.getIamPolicy")
_SET_POLICY: Final = ("cloudkms.keyRings.setIamPolicy", "cloudkms.cryptoKeys.setIamPolicy")
_ADMIN: Final = (
    *_VIEW,
    *_GET_POLICY,
    *_SET_POLICY,
    "cloudkms.keyRings.create",
    "cloudkms.cryptoKeys.create",
    "cloudkms.cryptoKeys.update",
    "cloudkms.cryptoKeys.delete",
    "cloudkms.importJobs.create",
    "cloudkms.cryptoKeyVersions.create",
    "cloudkms.cryptoKeyVersions.update",
    "cloudkms.cryptoKeyVersions.destroy",
    "cloudkms.cryptoKeyVersions.restore",
    "cloudkms.cryptoKeyVersions.delete",
)
_ACCOUNT_POLICY: Final = ("iam.serviceAccounts.getIamPolicy", "iam.serviceAccounts.setIamPolicy")
_PROJECT_POLICY: Final = ("resourcemanager.projects.getIamPolicy", "resourcemanager.projects.setIamPolicy")

ROLES: Final[dict[str, frozenset[str]]] = {
    "roles/owner": frozenset((*_ADMIN, *_CRYPT, *_OTHER_PURPOSES, *_ACCOUNT_POLICY, *_PROJECT_POLICY, _RANDOM)),
    "roles/viewer": frozenset((*_VIEW, *_GET_POLICY, "resourcemanager.projects.getIamPolicy")),
    "roles/cloudkms.admin": frozenset(_ADMIN),
    "roles/cloudkms.viewer": frozenset(_VIEW),
    "roles/cloudkms.cryptoKeyEncrypter": frozenset((_CRYPT[0], *_LOCATIONS, *_PROJECT)),
    "roles/cloudkms.cryptoKeyDecrypter": frozenset((_CRYPT[1], *_LOCATIONS, *_PROJECT)),
    "roles/cloudkms.cryptoKeyEncrypterDecrypter": frozenset((*_CRYPT, *_LOCATIONS, *_PROJECT)),
    "roles/cloudkms.cryptoOperator": frozenset((*_CRYPT, *_OTHER_PURPOSES, *_LOCATIONS, *_PROJECT, _RANDOM)),
    "roles/iam.securityAdmin": frozenset((*_GET_POLICY, *_SET_POLICY, *_ACCOUNT_POLICY, *_PROJECT_POLICY)),
    "roles/iam.serviceAccountAdmin": frozenset((*_ACCOUNT_POLICY, *_PROJECT)),
    "roles/iam.serviceAccountTokenCreator": frozenset(("iam.serviceAccounts.getAccessToken",)),
    "roles/iam.workloadIdentityUser": frozenset(("iam.serviceAccounts.getAccessToken",)),
}
"""Role → permissions. A custom role does not exist here."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Binding(_Record):
    role: str
    members: frozenset[str]


Bindings = tuple[Binding, ...]


class AuditLog(_Record):
    """One type of data access that is logged, but for some members."""

    log_type: str
    exempted: frozenset[str]


class AuditConfig(_Record):
    """Of a service, or of `allServices`."""

    service: str
    logs: tuple[AuditLog, ...]


AuditConfigs = tuple[AuditConfig, ...]


def audits(configs: AuditConfigs, service: str, log_type: str, member: str) -> bool:
    """The union of what is said of the service and of all: types as well as exemptions (google.iam.v1.AuditConfig)."""
    logs = [log for c in configs if c.service in (service, ALL_SERVICES) for log in c.logs if log.log_type == log_type]
    return bool(logs) and not any(member in log.exempted for log in logs)


class Policy(_Record):
    """What is stored, and through `in_force` what decides. `version` is always 1: conditions do not exist here."""

    bindings: Bindings
    etag_hex: str
    in_force: Delayed[Bindings]
    audit_configs: AuditConfigs | None = None
    """None until they are set for the first time."""

    @property
    def etag(self) -> bytes:
        return bytes.fromhex(self.etag_hex)

    @classmethod
    def new(cls, bindings: Bindings, now: dt.datetime) -> Policy:
        return cls(bindings=bindings, etag_hex=_etag(), in_force=Delayed[Bindings].of(bindings, now))

    def replaced(
        self, bindings: Bindings, audit_configs: AuditConfigs | None, now: dt.datetime, delay: dt.timedelta
    ) -> Policy:
        in_force = self.in_force.then(bindings, now, delay)
        return Policy(bindings=bindings, etag_hex=_etag(), in_force=in_force, audit_configs=audit_configs)


def _etag() -> str:
    return secrets.token_hex(_ETAG_SIZE_BYTES)


def is_member(text: str) -> bool:
    return _MEMBER.fullmatch(text) is not None


def grants(bindings: Bindings, member: str, permission: str) -> bool:
    """`member` is the caller, `user:…` or `serviceAccount:…`. Groups and domains have no members here."""
    wanted = {member, "allUsers", "allAuthenticatedUsers"}
    return any(permission in ROLES.get(b.role, ()) and not wanted.isdisjoint(b.members) for b in bindings)


def lineage(resource: PolicyTarget | LocationName) -> Iterable[PolicyTarget]:
    """The resource and what it lies in, as far as policies can be attached."""
    match resource:
        case KeyName():
            return (resource, resource.ring, ProjectName(resource.location.project))
        case RingName():
            return (resource, ProjectName(resource.location.project))
        case ServiceAccountName() | LocationName():
            own = () if isinstance(resource, LocationName) else (resource,)
            return (*own, ProjectName(resource.project))
        case ProjectName():
            return (resource,)
