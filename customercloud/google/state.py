"""Everything the simulated Google Cloud knows, in memory and in one sealed file.

Every change makes a new immutable snapshot, writes it durably and only then becomes visible, so that a crash or a full
disk never leaves memory and disk apart.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from customercloud.durable import SealedFile
from customercloud.google.iam import AuditConfigs, Bindings, Policy
from customercloud.google.identity import Project, ServiceAccount
from customercloud.google.keys import Key, Ring
from customercloud.google.names import KeyName, PolicyTarget, RingName
from shared.errors import CorruptedError

SEAL_PURPOSE: Final = b"customercloud google state v1"


class Snapshot(BaseModel):
    """Projects by id, accounts by e-mail address, the rest by resource name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    projects: Mapping[str, Project] = Field(default_factory=dict)
    accounts: Mapping[str, ServiceAccount] = Field(default_factory=dict)
    rings: Mapping[str, Ring] = Field(default_factory=dict)
    keys: Mapping[str, Key] = Field(default_factory=dict)
    policies: Mapping[str, Policy] = Field(default_factory=dict)


class GoogleState:
    """Reads are attributes of `snapshot`; changes go through the methods. Not thread-safe: the event loop owns it."""

    def __init__(self, file: SealedFile) -> None:
        """Raises IntegrityError or CorruptedError when the file is not ours or not whole."""
        self._file = file
        data = file.read()
        try:
            self.snapshot = Snapshot() if data is None else Snapshot.model_validate_json(data)
        except ValidationError:
            raise CorruptedError("the sealed state is not a snapshot of this version") from None

    def _commit(self, **update: object) -> None:
        changed = self.snapshot.model_copy(update=update)
        self._file.write(changed.model_dump_json().encode())
        self.snapshot = changed

    def put_project(self, project: Project) -> None:
        self._commit(projects={**self.snapshot.projects, project.project_id: project})

    def put_account(self, account: ServiceAccount) -> None:
        self._commit(accounts={**self.snapshot.accounts, account.email: account})

    def remove_account(self, account: ServiceAccount) -> None:
        self._commit(accounts={email: a for email, a in self.snapshot.accounts.items() if email != account.email})

    def ring(self, name: RingName) -> Ring | None:
        return self.snapshot.rings.get(str(name))

    def put_ring(self, ring: Ring) -> None:
        self._commit(rings={**self.snapshot.rings, ring.name: ring})

    def key(self, name: KeyName) -> Key | None:
        return self.snapshot.keys.get(str(name))

    def put_keys(self, *keys: Key) -> None:
        self._commit(keys={**self.snapshot.keys, **{key.name: key for key in keys}})

    def policy(self, target: PolicyTarget) -> Policy | None:
        return self.snapshot.policies.get(str(target))

    def put_policy(
        self,
        target: PolicyTarget,
        bindings: Bindings,
        now: dt.datetime,
        delay: dt.timedelta,
        audit_configs: AuditConfigs | None = None,
    ) -> Policy:
        """Replaces the bindings, and the audit configs if any are given; decisions follow after `delay`."""
        old = self.policy(target) or Policy.new((), now)
        policy = old.replaced(bindings, old.audit_configs if audit_configs is None else audit_configs, now, delay)
        self._commit(policies={**self.snapshot.policies, str(target): policy})
        return policy
