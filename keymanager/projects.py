"""What the keymanager knows of every project, in memory: who owns it, may its keys be used, which KEKs it has.

The database has the same; this copy is what is asked on every lease and key request, and it is the first to change:
`ProjectEntry.stop` takes effect before anything is awaited.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from keymanager.records import StoredKek, StoredProject
from keymanager.state import KeyAccess
from shared.api.keymanager import KekInfo, KeyState, Project, Workspace
from shared.auth import Principal
from shared.crypto.context import KeyScope
from shared.errors import KeyAccessError, NotFoundError, UnavailableError
from shared.ids import KeyConfigurationId, ProjectId, WorkspaceId
from shared.lease import key_access_error

_ENDING: Final = "it is being shredded"
_UNCONFIRMED: Final = "the customer's KMS has not said yes yet since this keymanager leads"


@dataclass(slots=True)
class ProjectEntry:
    """One project.

    `state` is what is in force and announced; `access` is what should be. They differ while a project is on its way
    back (it becomes ACTIVE again when its last revocation is sealed and the change is stored), and while its end is
    being stored (`ending`).
    """

    scope: KeyScope
    name: str
    key_configuration_id: KeyConfigurationId
    access: KeyAccess
    state: KeyState
    reason: str
    created_at: datetime
    keks: dict[int, StoredKek] = field(default_factory=dict)
    confirmed: bool = True
    """The KMS has said yes to this process, or what its denial or silence means is in `state`. Until then nothing is
    issued: not on the word of a database alone."""
    ending: bool = False
    """It is being shredded, and that is not stored yet. It is announced as REVOKED meanwhile: whoever hears SHREDDED
    believes in it for ever, and a leader that dies now leaves the project alive to the next one."""
    epoch: int = 0
    """Counts stops: what was begun in an earlier epoch must not end in a key that leaves."""
    unsealed: set[str] = field(default_factory=set)
    """Revocations that are still collecting acknowledgements."""
    sealed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set and replaced whenever a revocation is sealed."""

    @property
    def project_id(self) -> ProjectId:
        return self.scope.project_id

    @property
    def unconfirmed(self) -> bool:
        """ACTIVE by the database, and nothing is issued until the KMS agrees."""
        return self.state is KeyState.ACTIVE and not self.confirmed

    @property
    def issuing(self) -> bool:
        """Leases and DEKs may be given out."""
        return self.state is KeyState.ACTIVE and self.confirmed

    def stop(self, reason: str) -> None:
        """No lease and no DEK from here on. Call when `access` is no longer ACTIVE. A final state is announced by
        `end`, when it is stored."""
        self.ending = self.access.state.final
        self.state = KeyState.REVOKED if self.ending else self.access.state
        self.reason = _ENDING if self.ending else reason
        self.epoch += 1

    def end(self, reason: str) -> None:
        """The end of its keys is stored, and final."""
        self.ending, self.state, self.reason = False, self.access.state, reason

    def check(self, epoch: int | None = None) -> None:
        """Raises KeyAccessError unless keys may be given out now, and without a stop since `epoch`; UnavailableError
        while that is not known yet."""
        if self.unconfirmed:
            raise UnavailableError(_UNCONFIRMED)
        if not self.issuing or (epoch is not None and epoch != self.epoch):
            raise self.refusal()

    def refusal(self) -> KeyAccessError:
        """Why nobody is given a key of it."""
        return key_access_error(self.state, self.reason or "its keys were stopped meanwhile", self.scope.workspace_id)

    @property
    def current_kek(self) -> StoredKek:
        """The KEK for new DEKs."""
        return self.keks[max(self.keks)]

    def model(self) -> Project:
        return Project(
            project_id=self.project_id,
            workspace_id=self.scope.workspace_id,
            account_id=self.scope.account_id,
            key_configuration_id=self.key_configuration_id,
            name=self.name,
            state=self.state,
            state_reason=_UNCONFIRMED if self.unconfirmed else self.reason,
            keks=[
                KekInfo(
                    kek_id=kek.kek_id,
                    kek_version=kek.kek_version,
                    cmk_key_version=kek.cmk_key_version,
                    wraps=kek.wraps_reserved,
                    created_at=kek.created_at,
                    destroyed=kek.wrapped is None,
                )
                for _, kek in sorted(self.keks.items())
            ],
            created_at=self.created_at,
        )


class Projects:
    """All projects and workspaces, by id."""

    def __init__(self) -> None:
        self.workspaces: dict[WorkspaceId, Workspace] = {}
        self._entries: dict[ProjectId, ProjectEntry] = {}

    def add(self, stored: StoredProject, keks: Iterable[StoredKek], access: KeyAccess) -> ProjectEntry:
        workspace = self.workspaces[stored.workspace_id]
        entry = ProjectEntry(
            scope=KeyScope(workspace.account_id, workspace.workspace_id, stored.project_id),
            name=stored.name,
            key_configuration_id=stored.key_configuration_id,
            access=access,
            state=stored.state,
            reason=stored.state_reason,
            created_at=stored.created_at,
            keks={kek.kek_version: kek for kek in keks},
        )
        self._entries[stored.project_id] = entry
        return entry

    def get(self, project_id: ProjectId) -> ProjectEntry:
        """Raises NotFoundError."""
        entry = self._entries.get(project_id)
        if entry is None:
            raise NotFoundError("there is no such project")
        return entry

    def find(self, project_id: ProjectId) -> ProjectEntry | None:
        return self._entries.get(project_id)

    def workspace(self, workspace_id: WorkspaceId) -> Workspace:
        """Raises NotFoundError."""
        workspace = self.workspaces.get(workspace_id)
        if workspace is None:
            raise NotFoundError("there is no such workspace")
        return workspace

    def all(self) -> list[ProjectEntry]:
        return list(self._entries.values())

    def within(self, principal: Principal) -> list[ProjectEntry]:
        """All that its token is good for."""
        return [e for e in self._entries.values() if principal.may_touch(e.project_id, e.scope.workspace_id)]

    def ids_within(self, principal: Principal) -> set[ProjectId] | None:
        """None: all, and what is about none."""
        return {entry.project_id for entry in self.within(principal)} if principal.bound else None

    def key_configurations_within(self, principal: Principal) -> set[KeyConfigurationId]:
        """Those that something in the token's place is, or would be, kept under."""
        of_projects = {entry.key_configuration_id for entry in self.within(principal)}
        return of_projects | {
            workspace.key_configuration_id
            for workspace in self.workspaces.values()
            if principal.may_touch(None, workspace.workspace_id)
        }

    def of_key_configuration(self, key_configuration_id: KeyConfigurationId) -> list[ProjectEntry]:
        return [entry for entry in self._entries.values() if entry.key_configuration_id == key_configuration_id]

    def of_workspace(self, workspace_id: WorkspaceId) -> list[ProjectEntry]:
        return [entry for entry in self._entries.values() if entry.scope.workspace_id == workspace_id]
