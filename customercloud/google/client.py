"""What the customer does with its own Google Cloud, and what whoever runs the simulation does to it.

`GoogleCustomer` is the vendor's SDK with the customer's own credentials: it works against the real Google Cloud just as
well, but for `entries`. `GoogleCloudAdmin` speaks to `/_keylake/` and exists only here. Both block; asyncio code calls
them in a thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from google.cloud import kms_v1
from google.cloud.kms_v1.services.key_management_service.transports import KeyManagementServiceRestTransport
from google.iam.v1 import iam_policy_pb2, policy_pb2
from google.oauth2 import service_account

from customercloud.client import CloudAdmin
from customercloud.google.admin import (
    AccountCredentials,
    CompleteDestruction,
    DataAccessLogs,
    GoogleBootstrapAnswer,
    GoogleBootstrapRequest,
)

VENDOR_ROLES: Final = ("roles/cloudkms.cryptoKeyEncrypterDecrypter", "roles/cloudkms.viewer")
"""What the vendor's account needs on a key, and all that it gets."""
_STATES: Final = kms_v1.CryptoKeyVersion.CryptoKeyVersionState
_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class GoogleAddress:
    """Where Google Cloud is. All None for the real one."""

    url: str | None = None
    ca_bundle: Path | None = None


class _RestTransport(KeyManagementServiceRestTransport):
    """REST with a private root."""

    def __init__(self, address: GoogleAddress, credentials: Any) -> None:
        scheme, _, host = (address.url or "https://cloudkms.googleapis.com").partition("://")
        super().__init__(host=host, url_scheme=scheme, credentials=credentials, always_use_jwt_access=True)
        if address.ca_bundle is not None:
            self._session.verify = str(address.ca_bundle)
            self._session.trust_env = False  # REQUESTS_CA_BUNDLE would win over `verify`


def rest_transport(address: GoogleAddress, credentials: Any) -> KeyManagementServiceRestTransport:
    """The SDK's REST transport to this address. The endpoint option of the SDK's client cannot name a private root."""
    return _RestTransport(address, credentials)


class GoogleCustomer:
    """The customer's key administrator. `key` is a crypto key's resource name. Raises google.api_core's exceptions."""

    def __init__(self, address: GoogleAddress, credentials_file: dict[str, Any], project: str) -> None:
        credentials = service_account.Credentials.from_service_account_info(credentials_file)  # type: ignore[no-untyped-call]
        self.project = project
        self.kms = kms_v1.KeyManagementServiceClient(transport=rest_transport(address, credentials))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self.kms.transport.close()  # type: ignore[no-untyped-call]

    # ── life of a key ──────────────────────────────────────────────────────────────────────────────────────────

    def create_ring(self, ring_id: str, location: str = "global") -> str:
        parent = f"projects/{self.project}/locations/{location}"
        ring = self.kms.create_key_ring(
            parent=parent, key_ring_id=ring_id, key_ring=kms_v1.KeyRing(), timeout=_TIMEOUT_S
        )
        return str(ring.name)

    def create_key(self, ring: str, key_id: str, *, member: str | None = None) -> str:
        """The new key's name; `member` may use it from the start."""
        purpose = kms_v1.CryptoKey.CryptoKeyPurpose.ENCRYPT_DECRYPT
        key = kms_v1.CryptoKey(purpose=purpose)
        made = self.kms.create_crypto_key(parent=ring, crypto_key_id=key_id, crypto_key=key, timeout=_TIMEOUT_S)
        if member is not None:
            self.allow(made.name, member)
        return str(made.name)

    def describe(self, key: str) -> kms_v1.CryptoKey:
        return self.kms.get_crypto_key(name=key, timeout=_TIMEOUT_S)

    def versions(self, key: str) -> list[kms_v1.CryptoKeyVersion]:
        return list(self.kms.list_crypto_key_versions(parent=key, timeout=_TIMEOUT_S))

    def disable(self, key: str) -> None:
        """Every enabled version: a key has no state of its own, and old ciphertexts need old versions."""
        self._set_states(key, _STATES.ENABLED, _STATES.DISABLED)

    def enable(self, key: str) -> None:
        """Every disabled version."""
        self._set_states(key, _STATES.DISABLED, _STATES.ENABLED)

    def schedule_destruction(self, key: str) -> None:
        """Every version. Until destroyTime it can be restored, and cannot be used."""
        for version in self.versions(key):
            if version.state in (_STATES.ENABLED, _STATES.DISABLED):
                self.kms.destroy_crypto_key_version(name=version.name, timeout=_TIMEOUT_S)

    def restore(self, key: str) -> None:
        """Every version that waits for its destruction; they are disabled afterwards, as Google leaves them."""
        for version in self.versions(key):
            if version.state == _STATES.DESTROY_SCHEDULED:
                self.kms.restore_crypto_key_version(name=version.name, timeout=_TIMEOUT_S)

    def rotate(self, key: str) -> str:
        """A new primary version; returns its name. What older versions encrypted still opens."""
        version = self.kms.create_crypto_key_version(
            parent=key, crypto_key_version=kms_v1.CryptoKeyVersion(), timeout=_TIMEOUT_S
        )
        self.kms.update_crypto_key_primary_version(
            name=key, crypto_key_version_id=version.name.rpartition("/")[2], timeout=_TIMEOUT_S
        )
        return str(version.name)

    def _set_states(self, key: str, before: Any, after: Any) -> None:
        for version in self.versions(key):
            if version.state == before:
                self.kms.update_crypto_key_version(
                    crypto_key_version=kms_v1.CryptoKeyVersion(name=version.name, state=after),
                    update_mask={"paths": ["state"]},
                    timeout=_TIMEOUT_S,
                )

    # ── who may use it ─────────────────────────────────────────────────────────────────────────────────────────

    def policy(self, resource: str) -> policy_pb2.Policy:
        request = iam_policy_pb2.GetIamPolicyRequest(resource=resource)
        return self.kms.get_iam_policy(request=request, timeout=_TIMEOUT_S)

    def put_policy(self, resource: str, policy: policy_pb2.Policy) -> policy_pb2.Policy:
        """Refused (Aborted) when somebody else has changed it since `policy` was read."""
        request = iam_policy_pb2.SetIamPolicyRequest(resource=resource, policy=policy)
        return self.kms.set_iam_policy(request=request, timeout=_TIMEOUT_S)

    def allow(self, key: str, member: str, roles: tuple[str, ...] = VENDOR_ROLES) -> None:
        """These roles and no others. `member` is `serviceAccount:…`."""
        self._change(key, member, roles)

    def deny(self, key: str, member: str) -> None:
        """Take the member out of the key's policy: what is not granted is denied."""
        self._change(key, member, ())

    def _change(self, key: str, member: str, roles: tuple[str, ...]) -> None:
        policy = self.policy(key)
        members = {binding.role: set(binding.members) - {member} for binding in policy.bindings}
        for role in roles:
            members.setdefault(role, set()).add(member)
        bindings = [policy_pb2.Binding(role=role, members=sorted(m)) for role, m in members.items() if m]
        self.put_policy(key, policy_pb2.Policy(etag=policy.etag, version=1, bindings=bindings))


class GoogleCloudAdmin(CloudAdmin):
    """The simulation's administrator, with what concerns Google Cloud."""

    def bootstrap_google(self, **names: str) -> GoogleBootstrapAnswer:
        """Customer, vendor and account; `names` are fields of GoogleBootstrapRequest. May be repeated."""
        request = GoogleBootstrapRequest.model_validate(names)
        return GoogleBootstrapAnswer.model_validate_json(
            self._call("POST", "google/bootstrap", request.model_dump_json())
        )

    def put_account(self, project: str, account_id: str) -> AccountCredentials:
        return AccountCredentials.model_validate_json(
            self._call("PUT", f"google/projects/{project}/accounts/{account_id}")
        )

    def delete_account(self, email: str) -> None:
        self._call("DELETE", f"google/accounts/{email}")

    def set_data_access_logs(self, project: str, *, enabled: bool) -> None:
        body = DataAccessLogs(enabled=enabled).model_dump_json()
        self._call("PUT", f"google/projects/{project}/data-access-logs", body)

    def complete_destruction(self, key: str) -> None:
        """End the waiting period of the key's versions that are scheduled for destruction."""
        self._call("POST", "google/complete-destruction", CompleteDestruction(key_name=key).model_dump_json())

    def entries(self, project: str) -> Iterator[dict[str, Any]]:
        """Log entries of the project's audit logs, oldest first."""
        for line in self._call("GET", f"google/entries?project={project}").splitlines():
            yield json.loads(line)
