"""Everything the simulated Azure knows, in memory and in one sealed file.

As in AWS's: every change makes a new immutable snapshot, writes it durably and only then becomes visible.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from customercloud.azure.access import Access
from customercloud.azure.identity import Application, ServicePrincipal, SigningKey
from customercloud.azure.keys import Key
from customercloud.durable import SealedFile
from shared.errors import CorruptedError

SEAL_PURPOSE: Final = b"customercloud azure state v1"
DEFAULT_VAULT: Final = "default"
"""Answers where the Host header names no vault: an IP address, or a name of one label."""
LOCATION: Final = "westeurope"
_ALWAYS: Final = dt.datetime.min.replace(tzinfo=dt.UTC)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AccessView(_Record):
    """What authorisation sees of one principal's rights, or of the vault's mode, from `visible_at` on."""

    visible_at: dt.datetime
    object_id: str | None
    """None: the mode."""
    access: Access


class Vault(_Record):
    name: str
    tenant_id: str
    recoverable_days: int = Field(default=90, ge=7, le=90)
    purge_protection: bool = False
    public_operations_on_disabled_keys: bool = False
    """Encrypt, verify and wrapKey work on a disabled key, as reported of the real service
    (azure-sdk-for-python#45342). Off: as documented."""
    access: Access = Access()
    views: tuple[AccessView, ...] = ()
    """Oldest first; of each principal, and of the mode, the last whose `visible_at` has come is seen. None at all when
    what is set is in force."""

    @property
    def recovery_level(self) -> str:
        customized = "" if self.recoverable_days == 90 else "Customized"
        return f"{customized}Recoverable" + ("" if self.purge_protection else "+Purgeable")

    @property
    def resource_id(self) -> str:
        return (
            "/subscriptions/00000000-0000-0000-0000-00000000c10d/resourcegroups/keylake"
            f"/providers/microsoft.keyvault/vaults/{self.name}"
        )

    def _seen(self, object_id: str | None, now: dt.datetime) -> Access:
        views = [view for view in self.views if view.object_id == object_id]
        return next((view.access for view in reversed(views) if view.visible_at <= now), self.access)

    def effective_access(self, object_id: str, now: dt.datetime) -> Access:
        """What decides about the principal's requests at `now`."""
        return self._seen(object_id, now).model_copy(update={"mode": self._seen(None, now).mode})

    def with_access(self, access: Access, object_id: str | None, now: dt.datetime, delay: dt.timedelta) -> Vault:
        """`access` differs in what the principal may do (or, without one, in the mode). In force after `delay`, and
        never before a change of the same that was made earlier."""
        others = tuple(view for view in self.views if view.object_id != object_id)
        pending = tuple(view for view in self.views if view.object_id == object_id and view.visible_at > now)
        changed = self.model_copy(update={"access": access, "views": others})
        if not pending and not delay:
            return changed
        seen = AccessView(visible_at=_ALWAYS, object_id=object_id, access=self._seen(object_id, now))
        visible_at = max([now + delay, *(view.visible_at for view in pending)])
        new = AccessView(visible_at=visible_at, object_id=object_id, access=access)
        return changed.model_copy(update={"views": (*others, seen, *pending, new)})


class Snapshot(_Record):
    """All of it. Keys of the mappings: applications by client id, principals by object id, vaults by name, keys by
    `vault/name in lower case`: the service compares names without regard to case."""

    format_version: Literal[1] = 1
    signing_key: SigningKey
    tenants: frozenset[str] = frozenset()
    applications: Mapping[str, Application] = Field(default_factory=dict)
    principals: Mapping[str, ServicePrincipal] = Field(default_factory=dict)
    vaults: Mapping[str, Vault] = Field(default_factory=dict)
    keys: Mapping[str, Key] = Field(default_factory=dict)


def key_index(vault: str, name: str) -> str:
    return f"{vault}/{name.lower()}"


class AzureState:
    """Reads are attributes of `snapshot`; changes go through the methods. Not thread-safe: the event loop owns it."""

    def __init__(self, file: SealedFile) -> None:
        """Raises IntegrityError or CorruptedError when the file is not ours or not whole."""
        self._file = file
        data = file.read()
        if data is None:
            # Written at once: tokens must outlive a restart before anything else was changed.
            self.snapshot = Snapshot(signing_key=SigningKey.new())
            self._commit()
            return
        try:
            self.snapshot = Snapshot.model_validate_json(data)
        except ValidationError:
            raise CorruptedError("the sealed state is not a snapshot of this version") from None

    def _commit(self, **update: object) -> None:
        changed = self.snapshot.model_copy(update=update)
        self._file.write(changed.model_dump_json().encode())
        self.snapshot = changed

    # ── directory ──────────────────────────────────────────────────────────────────────────────────────────────

    def principal_of(self, client_id: str, tenant_id: str) -> ServicePrincipal | None:
        return next(
            (
                principal
                for principal in self.snapshot.principals.values()
                if (principal.client_id, principal.tenant_id) == (client_id, tenant_id)
            ),
            None,
        )

    def put_application(self, application: Application) -> None:
        self._commit(
            applications={**self.snapshot.applications, application.client_id: application},
            tenants=self.snapshot.tenants | {application.home_tenant_id},
        )

    def put_principal(self, principal: ServicePrincipal) -> None:
        self._commit(
            principals={**self.snapshot.principals, principal.object_id: principal},
            tenants=self.snapshot.tenants | {principal.tenant_id},
        )

    def remove_principal(self, object_id: str) -> None:
        self._commit(principals={o: p for o, p in self.snapshot.principals.items() if o != object_id})

    # ── vaults and keys ────────────────────────────────────────────────────────────────────────────────────────

    def put_vault(self, vault: Vault) -> None:
        self._commit(
            vaults={**self.snapshot.vaults, vault.name: vault}, tenants=self.snapshot.tenants | {vault.tenant_id}
        )

    def keys_of(self, vault: Vault) -> list[Key]:
        """By name."""
        prefix = f"{vault.name}/"
        return [key for index, key in sorted(self.snapshot.keys.items()) if index.startswith(prefix)]

    def key(self, vault: Vault, name: str) -> Key | None:
        return self.snapshot.keys.get(key_index(vault.name, name))

    def put_key(self, vault: Vault, key: Key) -> None:
        self._commit(keys={**self.snapshot.keys, key_index(vault.name, key.name): key})

    def purge_key(self, vault: Vault, key: Key) -> None:
        """The key and its private keys are gone. Blocks of the old file may linger on the disk."""
        gone = key_index(vault.name, key.name)
        self._commit(keys={index: k for index, k in self.snapshot.keys.items() if index != gone})
