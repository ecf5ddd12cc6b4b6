"""Who keeps data under which KEK version of which project, as far as the nodes have said so.

A node enters the list before it is given its first key of a project, and never leaves it. It then reports what it keeps
(`shared.api.keymanager.ReportUses`). A report holds for ever after: new DEKs, and DEKs wrapped again, are always under
the version in force, so what a node keeps only moves to newer versions. That is why `kek_floor` only rises, why a
version may be destroyed while a node that has reported is away, and why one that has said nothing stops everything.

What may interleave: reports of different nodes; `Rotator` and `Retirement` read the floors between two awaits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from keymanager.records import StoredKeyUser
from keymanager.repository import Repository
from shared.api.keymanager import KekInUse, KeyHolder, KeyUse
from shared.audit_chain import AuditEntry
from shared.clock import Clock
from shared.ids import ProjectId


class KeyUsers:
    """The table in memory; the database is written first."""

    def __init__(self, repository: Repository, clock: Clock) -> None:
        self._repository = repository
        self._clock = clock
        self._users: dict[tuple[ProjectId, str], StoredKeyUser] = {}
        self._dek_floors: dict[ProjectId, int] = {}

    async def load(self) -> None:
        for user in await self._repository.key_users():
            self._users[user.project_id, user.node_id] = user
        self._dek_floors = await self._repository.dek_floors()

    def of(self, project_id: ProjectId) -> list[StoredKeyUser]:
        return [user for key, user in sorted(self._users.items()) if key[0] == project_id]

    def dek_floor(self, project_id: ProjectId) -> int:
        """DEKs made under an older KEK version are to be replaced."""
        return self._dek_floors.get(project_id, 0)

    def raise_dek_floor(self, project_id: ProjectId, kek_version: int) -> None:
        """Call when it is stored."""
        self._dek_floors[project_id] = max(kek_version, self.dek_floor(project_id))

    async def enter(self, project_id: ProjectId, node_id: str) -> None:
        """Before a node is given its first key. Raises UnavailableError."""
        if (project_id, node_id) in self._users:
            return
        async with self._repository.transaction() as transaction:
            await transaction.insert_key_user(project_id, node_id)
        self._users.setdefault((project_id, node_id), StoredKeyUser(project_id, node_id))

    async def report(self, project_id: ProjectId, node_id: str, kek_version: int, uses: Sequence[KeyUse]) -> None:
        """A node's word. Raises UnavailableError."""
        await self.enter(project_id, node_id)
        floor = min([kek_version, *(use.kek_version for use in uses)])
        before = self._users[project_id, node_id]
        async with self._repository.transaction() as transaction:
            now = self._clock.now()
            await transaction.set_key_user(project_id, node_id, floor, uses, now)
            if floor > before.kek_floor:
                details = {"node_id": node_id, "kek_floor": str(floor)}
                await transaction.audit([AuditEntry(f"node/{node_id}", "kek.released", "ok", project_id, details)])
        latest = self._users[project_id, node_id]
        self._users[project_id, node_id] = replace(
            latest, kek_floor=max(latest.kek_floor, floor), uses=tuple(uses), reported_at=now
        )

    def blockers(self, project_id: ProjectId, kek_version: int) -> list[KekInUse]:
        """Why this version cannot be destroyed; empty if it can."""
        return [
            KekInUse(kek_version=kek_version, node_id=user.node_id, reason=_reason(user, kek_version))
            for user in self.of(project_id)
            if user.kek_floor <= kek_version
        ]

    def holders(self, project_id: ProjectId) -> list[KeyHolder]:
        return [
            KeyHolder(
                node_id=user.node_id, kek_floor=user.kek_floor, reported_at=user.reported_at, uses=list(user.uses)
            )
            for user in self.of(project_id)
        ]


def _reason(user: StoredKeyUser, kek_version: int) -> str:
    if user.reported_at is None:
        return "it was given keys and has not said yet what it keeps"
    kept = [use for use in user.uses if use.kek_version == kek_version]
    if kept:
        objects, size_bytes = sum(use.objects for use in kept), sum(use.size_bytes for use in kept)
        old = sum(use.objects for use in kept if use.superseded)
        which = f", {old} of them old versions that the bucket keeps: a full re-key removes those" if old else ""
        return f"it keeps {objects} objects, {size_bytes} bytes, under this version{which}"
    return f"it has not looked since {user.reported_at:%Y-%m-%d %H:%M:%SZ}, when this or an older version was in use"
