"""Whether the caller may, as all operations ask it: along the resource hierarchy, with the decision in the audit."""

from __future__ import annotations

from typing import Final

from customercloud.google.call import Authorization, Call, Resource, target_of
from customercloud.google.errors import not_found, permission_denied
from customercloud.google.iam import grants, lineage
from customercloud.google.keys import Key, Ring
from customercloud.google.names import KeyName, LocationName, RingName, ServiceAccountName, VersionName, check_location
from customercloud.google.state import GoogleState

_DOMAINS: Final = {
    "cloudkms": "cloudkms.googleapis.com",
    "iam": "iam.googleapis.com",
    "resourcemanager": "cloudresourcemanager.googleapis.com",
}


class Access:
    def __init__(self, state: GoogleState) -> None:
        self._state = state

    def holds(self, call: Call, permission: str, resource: Resource) -> bool:
        """By the policies in force now, which may be older than the newest ones."""
        policies = [self._state.policy(target) for target in lineage(target_of(resource))]
        member = call.principal.member
        return any(
            policy is not None and grants(policy.in_force.at(call.now), member, permission) for policy in policies
        )

    def require(self, call: Call, permission: str, resource: Resource) -> None:
        """Raises PERMISSION_DENIED, and NOT_FOUND for a location that is none. Says nothing of what exists.

        The resource enters the call's audit first. To be called once in each operation that is decided about.
        """
        call.audit.resource = call.audit.resource or resource
        if isinstance(resource, LocationName | RingName | KeyName | VersionName):
            location = resource if isinstance(resource, LocationName) else resource.location
            check_location(location.location, call.routed_to)
        decided_on = target_of(resource)
        granted = self.holds(call, permission, resource)
        call.audit.authorizations.append(Authorization(str(decided_on), permission, granted))
        if not granted:
            raise permission_denied(permission, str(decided_on), _DOMAINS[permission.split(".", 1)[0]])
        call.admit()

    def ring(self, name: RingName) -> Ring:
        """Raises NOT_FOUND."""
        ring = self._state.ring(name)
        if ring is None:
            raise not_found(f"KeyRing {name} not found.")
        return ring

    def key(self, name: KeyName) -> Key:
        """Raises NOT_FOUND."""
        key = self._state.key(name)
        if key is None:
            raise not_found(f"CryptoKey {name} not found.")
        return key

    def account(self, email: str) -> ServiceAccountName | None:
        """The full name behind `projects/-/serviceAccounts/{email}`."""
        account = self._state.snapshot.accounts.get(email)
        return None if account is None else ServiceAccountName(account.project_id, account.email)
