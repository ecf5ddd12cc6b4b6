"""Changes of the keymanager's database that happen together, with the audit records that describe them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import asyncpg

from keymanager.lease_table import Held
from keymanager.records import (
    StagedKek,
    StoredKek,
    StoredKeyConfiguration,
    StoredLease,
    StoredProject,
    StoredReplacement,
    StoredToken,
)
from keymanager.state import KeyAccess, KmsAccess
from shared import audit_chain as audit
from shared.api.keymanager import KeyState, KeyUse, Role, Workspace
from shared.clock import Clock
from shared.errors import ConflictError, CorruptedError, PermissionDeniedError
from shared.ids import AccountId, InstanceId, KeyConfigurationId, ProjectId, TokenId, WorkspaceId
from shared.keysession import ReplacedError


class Transaction:
    """Changes that happen together. Made by `Repository.transaction`."""

    def __init__(self, connection: Any, clock: Clock) -> None:
        self._connection = connection
        self._clock = clock

    async def audit(self, entries: Iterable[audit.AuditEntry]) -> None:
        """Append to the chain. Holds the chain until the transaction ends: call it last.

        Raises CorruptedError when somebody has changed the chain so that nothing can follow.
        """
        row = await self._connection.fetchrow("SELECT sequence, record_hash FROM audit_head FOR UPDATE")
        if row is None:
            raise CorruptedError("the audit chain's head is missing")
        head = audit.ChainHead(row["sequence"], row["record_hash"])
        links = audit.append(head, self._clock.now(), entries)
        if not links:
            return
        entries = [link.entry for link in links]
        await self._append(
            "INSERT INTO audit SELECT * FROM unnest($1::bigint[], $2::timestamptz[], $3::text[], $4::text[], "
            "$5::text[], $6::text[], $7::jsonb[], $8::bytea[], $9::bytea[])",
            [link.sequence for link in links],
            [link.at for link in links],
            [entry.actor for entry in entries],
            [entry.action for entry in entries],
            [entry.outcome for entry in entries],
            [None if entry.project_id is None else str(entry.project_id) for entry in entries],
            [json.dumps(dict(entry.details)) for entry in entries],
            [link.previous_hash for link in links],
            [link.record_hash for link in links],
        )
        await self._connection.execute(
            "UPDATE audit_head SET sequence = $1, record_hash = $2", links[-1].sequence, links[-1].record_hash
        )

    async def _append(self, statement: str, *columns: Sequence[object]) -> None:
        try:
            await self._connection.execute(statement, *columns)
        except asyncpg.UniqueViolationError:
            raise CorruptedError("the audit chain goes on behind its head") from None

    async def execute(self, statement: str, *values: object) -> str:
        """One statement. Returns the database's own word of what it did, as `UPDATE 3`."""
        done: str = await self._connection.execute(statement, *values)
        return done

    async def insert_account(self, account_id: AccountId, name: str) -> None:
        await self._connection.execute(
            "INSERT INTO account VALUES ($1, $2, $3)", str(account_id), name, self._clock.now()
        )

    async def insert_key_configuration(self, stored: StoredKeyConfiguration) -> None:
        """Raises ConflictError when the name is taken."""
        await self._write(
            "INSERT INTO key_configuration (key_configuration_id, account_id, name, key, outage_grace_s, "
            "probe_interval_s, canary_wrapped, canary_digest, kms_access, last_verdict, last_probe_at, "
            "last_allowed_at, created_at, canary_cmk_key_version) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
            str(stored.key_configuration_id),
            str(stored.account_id),
            stored.name,
            stored.key.model_dump_json(),
            stored.outage_grace_s,
            stored.probe_interval_s,
            stored.canary_wrapped,
            stored.canary_digest,
            stored.kms_access.value,
            stored.last_verdict,
            stored.last_probe_at,
            stored.last_allowed_at,
            stored.created_at,
            stored.canary_cmk_key_version,
        )

    async def delete_key_configuration(self, key_configuration_id: KeyConfigurationId) -> None:
        """Raises ConflictError while a workspace or a project is bound to it."""
        try:
            await self._connection.execute(
                "DELETE FROM key_configuration WHERE key_configuration_id = $1", str(key_configuration_id)
            )
        except asyncpg.ForeignKeyViolationError:
            raise ConflictError("a workspace or a project is bound to this key configuration") from None

    async def insert_workspace(self, workspace: Workspace) -> None:
        """Raises ConflictError when the name is taken."""
        await self._write(
            "INSERT INTO workspace VALUES ($1, $2, $3, $4, $5)",
            str(workspace.workspace_id),
            str(workspace.account_id),
            workspace.name,
            str(workspace.key_configuration_id),
            workspace.created_at,
        )

    async def change_workspace(self, workspace: Workspace) -> None:
        """Name, and key configuration of projects to come. Raises ConflictError when the name is taken or the key
        configuration is gone."""
        try:
            await self._write(
                "UPDATE workspace SET name = $2, key_configuration_id = $3 WHERE workspace_id = $1",
                str(workspace.workspace_id),
                workspace.name,
                str(workspace.key_configuration_id),
            )
        except asyncpg.ForeignKeyViolationError:
            raise ConflictError("the key configuration was deleted meanwhile") from None

    async def delete_workspace(self, workspace_id: WorkspaceId) -> None:
        """Raises ConflictError while a project is in it."""
        try:
            await self._connection.execute("DELETE FROM workspace WHERE workspace_id = $1", str(workspace_id))
        except asyncpg.ForeignKeyViolationError:
            raise ConflictError("a project is in this workspace") from None

    async def insert_project(self, project: StoredProject, kek: StoredKek) -> None:
        """Raises ConflictError when the name is taken, or the workspace is gone."""
        try:
            await self._write(
                "INSERT INTO project (project_id, workspace_id, name, held, shredded, state, state_reason, created_at, "
                "key_configuration_id) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
                str(project.project_id),
                str(project.workspace_id),
                project.name,
                project.held,
                project.shredded,
                project.state.value,
                project.state_reason,
                project.created_at,
                str(project.key_configuration_id),
            )
        except asyncpg.ForeignKeyViolationError:
            raise ConflictError("the workspace was deleted meanwhile") from None
        await self.insert_kek(kek)
        await self._note_cmk(project.project_id)

    async def _note_cmk(self, project_id: ProjectId) -> None:
        """From now on the project has KEKs under the CMK of its key configuration."""
        await self._connection.execute(
            "INSERT INTO project_cmk SELECT project_id, key, key_configuration_id, $2 FROM project_key "
            "WHERE project_id = $1 ON CONFLICT DO NOTHING",
            str(project_id),
            self._clock.now(),
        )

    async def insert_kek(self, kek: StoredKek) -> None:
        """Raises ConflictError when the project has this version."""
        await self._write(
            "INSERT INTO kek (project_id, kek_version, kek_id, wrapped, cmk_key_version, wraps_reserved, created_at, "
            "canary) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
            str(kek.project_id),
            kek.kek_version,
            str(kek.kek_id),
            kek.wrapped,
            kek.cmk_key_version,
            kek.wraps_reserved,
            kek.created_at,
            kek.canary,
        )

    async def replace_wrapped_kek(self, kek: StoredKek, wrapped: bytes, cmk_key_version: str) -> bool:
        """The same KEK, wrapped by another version of the CMK. False when the row holds another wrap than `kek` by now:
        it was destroyed, or somebody else was faster."""
        changed: str = await self._connection.execute(
            "UPDATE kek SET wrapped = $4, cmk_key_version = $5 "
            "WHERE project_id = $1 AND kek_version = $2 AND wrapped = $3",
            str(kek.project_id),
            kek.kek_version,
            kek.wrapped,
            wrapped,
            cmk_key_version,
        )
        return changed == "UPDATE 1"

    async def destroy_kek(self, project_id: ProjectId, kek_version: int, at: datetime) -> None:
        """Its wraps are gone, from everywhere; its number stays taken."""
        await self._connection.execute(
            "UPDATE kek SET wrapped = NULL, destroyed_at = $3 WHERE project_id = $1 AND kek_version = $2",
            str(project_id),
            kek_version,
            at,
        )
        await self._connection.execute(
            "DELETE FROM staged_kek WHERE project_id = $1 AND kek_version = $2", str(project_id), kek_version
        )

    async def raise_dek_floor(self, project_id: ProjectId, kek_version: int) -> None:
        await self._connection.execute(
            "UPDATE project SET dek_floor = greatest(dek_floor, $2) WHERE project_id = $1", str(project_id), kek_version
        )

    async def insert_key_user(self, project_id: ProjectId, node_id: str) -> None:
        await self._connection.execute(
            "INSERT INTO key_user (project_id, node_id) VALUES ($1, $2) ON CONFLICT DO NOTHING",
            str(project_id),
            node_id,
        )

    async def set_key_user(
        self, project_id: ProjectId, node_id: str, kek_floor: int, uses: Sequence[KeyUse], at: datetime
    ) -> None:
        await self._connection.execute(
            "UPDATE key_user SET kek_floor = greatest(kek_floor, $3), uses = $4, reported_at = $5 "
            "WHERE project_id = $1 AND node_id = $2",
            str(project_id),
            node_id,
            kek_floor,
            json.dumps([use.model_dump() for use in uses]),
            at,
        )

    async def require_key_generation(self, key_configuration_id: KeyConfigurationId, generation: int) -> None:
        """Before a new wrap is stored: the CMK that made it is still the one in use, and stays so until the end of the
        transaction. Raises ConflictError."""
        current: int | None = await self._connection.fetchval(
            "SELECT key_generation FROM key_configuration WHERE key_configuration_id = $1 FOR SHARE",
            str(key_configuration_id),
        )
        if current != generation:
            raise ConflictError("the key was replaced by another one meanwhile: try again")

    async def insert_replacement(self, stored: StoredReplacement) -> None:
        """Raises ConflictError when there is one for this key configuration."""
        await self._write(
            "INSERT INTO replacement VALUES ($1, $2, $3, $4, $5, $6, $7)",
            str(stored.key_configuration_id),
            stored.key.model_dump_json(),
            stored.canary_wrapped,
            stored.canary_digest,
            stored.actor,
            stored.started_at,
            stored.canary_cmk_key_version,
        )

    async def delete_replacement(self, key_configuration_id: KeyConfigurationId) -> None:
        await self._connection.execute(
            "DELETE FROM replacement WHERE key_configuration_id = $1", str(key_configuration_id)
        )

    async def insert_staged(self, key_configuration_id: KeyConfigurationId, staged: StagedKek) -> None:
        await self._connection.execute(
            "INSERT INTO staged_kek VALUES ($1, $2, $3, $4, $5) ON CONFLICT (project_id, kek_version) DO UPDATE "
            "SET wrapped = excluded.wrapped, cmk_key_version = excluded.cmk_key_version",
            str(key_configuration_id),
            str(staged.project_id),
            staged.kek_version,
            staged.wrapped,
            staged.cmk_key_version,
        )
        await self._connection.execute(
            "INSERT INTO project_cmk SELECT $2, key, key_configuration_id, $3 FROM replacement "
            "WHERE key_configuration_id = $1 ON CONFLICT DO NOTHING",
            str(key_configuration_id),
            str(staged.project_id),
            self._clock.now(),
        )

    async def switch_key(self, stored: StoredReplacement) -> bool:
        """Everything that the old CMK wrapped becomes what the new one wrapped. False, and nothing is changed, while a
        KEK is not staged."""
        key_configuration_id = str(stored.key_configuration_id)
        await self._connection.execute(
            "SELECT 1 FROM key_configuration WHERE key_configuration_id = $1 FOR UPDATE", key_configuration_id
        )
        missing: int = await self._connection.fetchval(
            "SELECT count(*) FROM kek JOIN project USING (project_id) WHERE project.key_configuration_id = $1 "
            "AND kek.wrapped IS NOT NULL AND NOT EXISTS "
            "(SELECT 1 FROM staged_kek s WHERE s.project_id = kek.project_id AND s.kek_version = kek.kek_version)",
            key_configuration_id,
        )
        if missing:
            return False
        await self._connection.execute(
            "UPDATE kek SET wrapped = s.wrapped, cmk_key_version = s.cmk_key_version "
            "FROM staged_kek s JOIN project USING (project_id) "
            "WHERE s.key_configuration_id = $1 AND s.project_id = kek.project_id AND s.kek_version = kek.kek_version "
            "AND project.key_configuration_id = $1 AND kek.wrapped IS NOT NULL",
            key_configuration_id,
        )
        await self._connection.execute(
            "UPDATE key_configuration SET key = $2, canary_wrapped = $3, canary_digest = $4, "
            "canary_cmk_key_version = $5, key_generation = key_generation + 1 WHERE key_configuration_id = $1",
            key_configuration_id,
            stored.key.model_dump_json(),
            stored.canary_wrapped,
            stored.canary_digest,
            stored.canary_cmk_key_version,
        )
        await self.delete_replacement(stored.key_configuration_id)
        return True

    async def move_project(
        self,
        project_id: ProjectId,
        target: KeyConfigurationId,
        keks: Sequence[StoredKek],
        moved: Sequence[StagedKek],
    ) -> None:
        """Another key configuration and, under its CMK, all KEKs. Raises ConflictError when they are not all, or not as
        they were, or the key configuration is gone."""
        for kek, staged in zip(keks, moved, strict=True):
            if not await self.replace_wrapped_kek(kek, staged.wrapped, staged.cmk_key_version):
                raise ConflictError("the project's keys have changed meanwhile: try again")
        wrapped: int = await self._connection.fetchval(
            "SELECT count(*) FROM kek WHERE project_id = $1 AND wrapped IS NOT NULL", str(project_id)
        )
        if wrapped != len(moved):
            raise ConflictError("the project's keys have changed meanwhile: try again")
        try:
            await self._connection.execute(
                "UPDATE project SET key_configuration_id = $2 WHERE project_id = $1",
                str(project_id),
                str(target),
            )
        except asyncpg.ForeignKeyViolationError:
            raise ConflictError("the key configuration was deleted meanwhile") from None
        await self._note_cmk(project_id)

    async def change_key_configuration(
        self, key_configuration_id: KeyConfigurationId, name: str, outage_grace_s: float, probe_interval_s: float
    ) -> None:
        """Raises ConflictError when the name is taken."""
        await self._write(
            "UPDATE key_configuration SET name = $2, outage_grace_s = $3, probe_interval_s = $4 "
            "WHERE key_configuration_id = $1",
            str(key_configuration_id),
            name,
            outage_grace_s,
            probe_interval_s,
        )

    async def set_canary(self, key_configuration_id: KeyConfigurationId, wrapped: bytes, cmk_key_version: str) -> None:
        await self._connection.execute(
            "UPDATE key_configuration SET canary_wrapped = $2, canary_cmk_key_version = $3 "
            "WHERE key_configuration_id = $1",
            str(key_configuration_id),
            wrapped,
            cmk_key_version,
        )

    async def set_project(self, project_id: ProjectId, state: KeyState, reason: str, access: KeyAccess) -> None:
        """`state`: what is in force. Never back from shredded."""
        await self._connection.execute(
            "UPDATE project SET state = $2, state_reason = $3, held = $4, shredded = shredded OR $5 "
            "WHERE project_id = $1",
            str(project_id),
            state.value,
            reason,
            access.held,
            access.shredded,
        )

    async def set_kms_access(self, key_configuration_id: KeyConfigurationId, access: KmsAccess) -> None:
        await self._connection.execute(
            "UPDATE key_configuration SET kms_access = $2 WHERE key_configuration_id = $1",
            str(key_configuration_id),
            access.value,
        )

    async def register_instance(self, node_id: str, instance_id: InstanceId, role: Role, kid: str) -> int:
        """A session begins: its generation, greater than all before it under this name.

        Raises PermissionDeniedError when the name belongs to another key, ReplacedError when this instance was
        replaced by a newer one, ConflictError when it uses another name than before.
        """
        fetchrow = self._connection.fetchrow
        node = await fetchrow("SELECT kid, generation, instance_id FROM node WHERE node_id = $1 FOR UPDATE", node_id)
        if node is not None and node["kid"] != kid:
            raise PermissionDeniedError("this node name belongs to another signing key")
        known = await fetchrow("SELECT node_id, role FROM instance WHERE instance_id = $1", str(instance_id))
        if known is not None:
            if (known["node_id"], known["role"]) != (node_id, role.value):
                raise ConflictError("this instance was here before with another name or role")
            if node is None or node["instance_id"] != str(instance_id):
                raise ReplacedError("a newer instance of this node has taken over")
        generation: int = await self._connection.fetchval(
            "INSERT INTO node VALUES ($1, $2, 1, $3) ON CONFLICT (node_id) DO UPDATE "
            "SET generation = node.generation + 1, instance_id = excluded.instance_id RETURNING generation",
            node_id,
            kid,
            str(instance_id),
        )
        if known is None:
            await self._connection.execute(
                "INSERT INTO instance VALUES ($1, $2, $3, $4)", str(instance_id), node_id, role.value, self._clock.now()
            )
        return generation

    async def insert_leases(self, leases: Iterable[StoredLease]) -> None:
        """Of one project and instance the last one counts."""
        newest = list({(lease.project_id, lease.holder.instance_id): lease for lease in leases}.values())
        await self._connection.execute(
            "INSERT INTO lease SELECT *, $7 FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], "
            "$6::double precision[]) ON CONFLICT (project_id, instance_id) "
            "DO UPDATE SET generation = excluded.generation, ttl_s = excluded.ttl_s",
            [str(lease.project_id) for lease in newest],
            [str(lease.holder.instance_id) for lease in newest],
            [lease.holder.node_id for lease in newest],
            [lease.holder.role.value for lease in newest],
            [lease.holder.generation for lease in newest],
            [lease.ttl_s for lease in newest],
            self._clock.now(),
        )

    async def delete_leases(self, leases: Iterable[tuple[ProjectId, InstanceId]]) -> None:
        found = list(leases)
        await self._connection.execute(
            "DELETE FROM lease l USING unnest($1::text[], $2::text[]) AS gone (project_id, instance_id) "
            "WHERE l.project_id = gone.project_id AND l.instance_id = gone.instance_id",
            [str(project_id) for project_id, _ in found],
            [str(instance_id) for _, instance_id in found],
        )

    async def insert_revocation(
        self,
        revocation_id: str,
        project_id: ProjectId,
        state: KeyState,
        reason: str,
        detected_at: datetime,
        keks_dropped_after_s: float,
        outstanding: Sequence[Held],
    ) -> None:
        await self._connection.execute(
            "INSERT INTO revocation (revocation_id, project_id, state, reason, detected_at, keks_dropped_after_s) "
            "VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING",  # a commit whose answer was lost is repeated
            revocation_id,
            str(project_id),
            state.value,
            reason,
            detected_at,
            keks_dropped_after_s,
        )
        await self._connection.execute(  # the key as it was: the project may come under another one later
            "UPDATE revocation SET key_configuration_id = k.key_configuration_id, key = k.key FROM project_key k "
            "WHERE k.project_id = $1 AND revocation_id = $2",
            str(project_id),
            revocation_id,
        )
        holders = [held.holder for held in outstanding]
        # One statement, however many: this is on the way from a customer's no to those who have to hear of it.
        await self._connection.execute(
            "INSERT INTO revocation_instance (revocation_id, instance_id, node_id, role, generation) "
            "SELECT $1, * FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[]) ON CONFLICT DO NOTHING",
            revocation_id,
            [str(holder.instance_id) for holder in holders],
            [holder.node_id for holder in holders],
            [holder.role.value for holder in holders],
            [holder.generation for holder in holders],
        )

    async def insert_restoration(
        self, restoration_id: str, project_id: ProjectId, reason: str, detected_at: datetime, restored_after_s: float
    ) -> None:
        """The project is ACTIVE again, under the key of now."""
        await self._connection.execute(
            "INSERT INTO restoration (restoration_id, project_id, reason, detected_at, restored_after_s, "
            "key_configuration_id, key) SELECT $2, project_id, $3, $4, $5, key_configuration_id, key "
            "FROM project_key WHERE project_id = $1 ON CONFLICT DO NOTHING",
            str(project_id),
            restoration_id,
            reason,
            detected_at,
            restored_after_s,
        )

    async def delete_restoration(self, restoration_id: str) -> None:
        """It did not last until it was in effect."""
        await self._connection.execute("DELETE FROM restoration WHERE restoration_id = $1", restoration_id)

    async def set_outcomes(
        self, revocation_id: str, outcomes: Iterable[tuple[InstanceId, str, float, Mapping[str, float]]]
    ) -> None:
        """Of instances: what came of it, how long after the beginning, and the steps that they took."""
        found = list(outcomes)
        await self._connection.execute(
            "UPDATE revocation_instance i SET outcome = o.outcome, after_s = o.after_s, steps_s = o.steps_s "
            "FROM unnest($2::text[], $3::text[], $4::double precision[], $5::jsonb[]) "
            "AS o (instance_id, outcome, after_s, steps_s) "
            "WHERE i.revocation_id = $1 AND i.instance_id = o.instance_id",
            revocation_id,
            [str(instance_id) for instance_id, *_ in found],
            [outcome for _, outcome, *_ in found],
            [after_s for *_, after_s, _ in found],
            [json.dumps(dict(steps_s)) for *_, steps_s in found],
        )

    async def seal_revocation(self, revocation_id: str, sealed_after_s: float) -> None:
        await self._connection.execute(
            "UPDATE revocation SET sealed_after_s = $2 WHERE revocation_id = $1", revocation_id, sealed_after_s
        )

    async def insert_token(self, stored: StoredToken) -> None:
        """Raises ConflictError when the id was used before."""
        await self._write(
            "INSERT INTO token (token_id, digest, role, subject, workspace_id, project_id, issued_by, issued_at, "
            "expires_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            str(stored.token_id),
            stored.digest,
            stored.role.value,
            stored.subject,
            None if stored.workspace_id is None else str(stored.workspace_id),
            None if stored.project_id is None else str(stored.project_id),
            stored.issued_by,
            stored.issued_at,
            stored.expires_at,
        )

    async def revoke_token(self, token_id: TokenId, revoked_at: datetime) -> None:
        await self._connection.execute(
            "UPDATE token SET revoked_at = coalesce(revoked_at, $2) WHERE token_id = $1", str(token_id), revoked_at
        )

    async def _write(self, statement: str, *values: object) -> None:
        try:
            await self._connection.execute(statement, *values)
        except asyncpg.UniqueViolationError:
            raise ConflictError("this name or id is taken") from None
