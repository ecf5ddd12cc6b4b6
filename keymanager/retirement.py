"""The end of old KEK versions, and the beginning of a full re-key.

    rotate  →  nodes wrap their DEKs again, and say so  →  `retire`: the old version is destroyed
    `rekey`: rotate, and ask for all DEKs of before to be replaced  →  nodes seal their data anew

Destroyed means: its row keeps the number, the wrapped KEK is gone from the row and from a replacement of the CMK that
is under way, the plaintext is wiped. A version is destroyed only when every node that was ever given a key of the
project has reported that it keeps nothing under it (`key_users.py` says why an old report is good enough).

What may interleave: the project's lock keeps rotations out, the key configuration's lock re-wraps and replacements, so
nobody stores a wrap of a KEK that is being destroyed.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from keymanager.key_users import KeyUsers
from keymanager.keyring import Keyring
from keymanager.projects import ProjectEntry, Projects
from keymanager.repository import Repository
from keymanager.rotation import Rotator
from shared.api.keymanager import KekInUse, KekStatus, KeyStatus, RetiredKeks
from shared.audit_chain import AuditEntry
from shared.clock import Clock
from shared.crypto.limits import MAX_WRAPS_PER_KEK
from shared.errors import ConflictError
from shared.failpoints import failpoint
from shared.ids import ProjectId


class Retirement:
    """Use cases of the admin API."""

    def __init__(
        self,
        repository: Repository,
        projects: Projects,
        keyring: Keyring,
        key_users: KeyUsers,
        rotator: Rotator,
        clock: Clock,
        kek_max_age: timedelta,
    ) -> None:
        self._repository = repository
        self._projects = projects
        self._keyring = keyring
        self._key_users = key_users
        self._rotator = rotator
        self._clock = clock
        self._kek_max_age = kek_max_age

    async def retire(self, project_id: ProjectId, actor: str, *, dry_run: bool = False) -> RetiredKeks:
        """Destroy every KEK version but the current one that nothing is left under.

        Raises NotFoundError; ConflictError that names who keeps what, when there are old versions and none may go (a
        dry run answers instead); UnavailableError.
        """
        entry = self._projects.get(project_id)
        configuration = entry.key_configuration_id
        # In this order, as whoever else takes both (moving.py).
        async with self._rotator.lock_of(configuration), self._rotator.lock_of(project_id):
            if entry.key_configuration_id != configuration:
                raise ConflictError("the project was moved to another key meanwhile: try again")
            retired, in_use = self._sort(entry)
            if retired and not dry_run:
                await self._destroy(entry, retired, actor)
            elif in_use and not dry_run:
                reasons = "; ".join(f"KEK {use.kek_version}, {use.node_id}: {use.reason}" for use in in_use)
                raise ConflictError(f"nothing was destroyed: {reasons}")
        return RetiredKeks(project_id=project_id, retired=retired, in_use=in_use, dry_run=dry_run)

    def _sort(self, entry: ProjectEntry) -> tuple[list[int], list[KekInUse]]:
        current = entry.current_kek.kek_version
        retired: list[int] = []
        in_use: list[KekInUse] = []
        for version, kek in sorted(entry.keks.items()):
            if version == current or kek.wrapped is None:
                continue
            blockers = self._key_users.blockers(entry.project_id, version)
            in_use += blockers
            if not blockers:
                retired.append(version)
        return retired, in_use

    async def _destroy(self, entry: ProjectEntry, versions: list[int], actor: str) -> None:
        now = self._clock.now()
        async with self._repository.transaction() as transaction:
            for version in versions:
                await transaction.destroy_kek(entry.project_id, version, now)
            await transaction.audit(
                AuditEntry(
                    actor,
                    "kek.destroy",
                    "ok",
                    entry.project_id,
                    {"kek_version": str(version), "kek_id": str(entry.keks[version].kek_id)},
                )
                for version in versions
            )
            failpoint("retirement-written")
        failpoint("retirement-stored")
        for version in versions:
            entry.keks[version] = replace(entry.keks[version], wrapped=None, destroyed_at=now)
            self._keyring.drop_version(entry.project_id, version)

    async def rekey(self, project_id: ProjectId, actor: str) -> KeyStatus:
        """Rotate the KEK, and have every DEK of before replaced. Raises as `Rotator.rotate_kek`."""
        entry = self._projects.get(project_id)
        await self._rotator.rotate_kek(project_id, actor, dek_floor=True)
        self._key_users.raise_dek_floor(project_id, entry.current_kek.kek_version)
        return self.status(project_id)

    def status(self, project_id: ProjectId) -> KeyStatus:
        """Raises NotFoundError."""
        entry = self._projects.get(project_id)
        return KeyStatus(
            project_id=project_id,
            state=entry.state,
            key_configuration_id=entry.key_configuration_id,
            keks=[
                KekStatus(**dict(info), last_unwrap_at=kek.last_unwrap_at, destroyed_at=kek.destroyed_at)
                for info, (_, kek) in zip(entry.model().keks, sorted(entry.keks.items()), strict=True)
            ],
            wraps_limit=MAX_WRAPS_PER_KEK,
            next_rotation_at=entry.current_kek.created_at + self._kek_max_age,
            dek_floor=self._key_users.dek_floor(project_id),
            holders=self._key_users.holders(project_id),
        )
