"""Shredding and erasure in the keymanager's database: rows in, rows out (migration 0006)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from pydantic import TypeAdapter

from keymanager.repository import Repository
from keymanager.transaction import Transaction
from shared.api.keymanager import DeletedObjects, ReportDeletion
from shared.api.shredding import ErasureReport, ShredNode
from shared.audit_chain import AuditEntry
from shared.cmk import CMK_KEY, CmkKey
from shared.ids import KeyConfigurationId, ProjectId

ShredState = Literal["asked", "cancelled", "expired", "approved"]
_TEXTS: TypeAdapter[list[str]] = TypeAdapter(list[str])


@dataclass(frozen=True, slots=True)
class StoredShred:
    shred_id: str
    project_id: ProjectId
    state: ShredState
    reason: str
    asked_by: str
    asked_subject: str
    asked_at: datetime
    expires_at: datetime
    decided_by: str | None = None
    decided_subject: str | None = None
    decided_at: datetime | None = None
    keks_destroyed: int = 0
    staged_destroyed: int = 0
    vacuumed_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class UsedCmk:
    """A CMK that wrapped KEKs of a project at some time."""

    key_configuration_id: KeyConfigurationId
    key: CmkKey


async def shreds(repository: Repository, project_id: ProjectId) -> list[StoredShred]:
    """Newest first."""
    rows = await repository.fetch("SELECT * FROM shred WHERE project_id = $1 ORDER BY number DESC", str(project_id))
    return [_shred(row) for row in rows]


async def approved(repository: Repository) -> list[ProjectId]:
    """Projects that are shredded."""
    rows = await repository.fetch("SELECT project_id FROM shred WHERE state = 'approved'")
    return [ProjectId(row["project_id"]) for row in rows]


async def nodes(repository: Repository, project_id: ProjectId) -> dict[str, ShredNode]:
    """What each node said last, by its name."""
    rows = await repository.fetch("SELECT * FROM shred_node WHERE project_id = $1", str(project_id))
    deleted: dict[str, list[DeletedObjects]] = {row["node_id"]: [] for row in rows}
    for row in await repository.fetch(
        "SELECT * FROM shred_node_object WHERE project_id = $1 ORDER BY kind", str(project_id)
    ):
        found = DeletedObjects.model_validate({name: row[name] for name in DeletedObjects.model_fields})
        deleted.setdefault(row["node_id"], []).append(found)
    return {
        row["node_id"]: ShredNode(
            node_id=row["node_id"],
            looked_at=row["looked_at"],
            deleted=deleted[row["node_id"]],
            left_objects=row["left_objects"],
            remains=_TEXTS.validate_json(row["remains"]),
            not_checked=_TEXTS.validate_json(row["not_checked"]),
            holds_keys=row["holds_keys"],
        )
        for row in rows
    }


async def done_nodes(repository: Repository) -> set[tuple[ProjectId, str]]:
    """Who has reported that nothing is left."""
    rows = await repository.fetch(
        "SELECT project_id, node_id FROM shred_node WHERE left_objects = 0 AND NOT holds_keys"
    )
    return {(ProjectId(row["project_id"]), row["node_id"]) for row in rows}


async def wraps_left(repository: Repository, project_id: ProjectId) -> int:
    """Wrapped KEKs of the project, wherever the database has them."""
    rows = await repository.fetch(
        "SELECT (SELECT count(*) FROM kek WHERE project_id = $1 AND wrapped IS NOT NULL) "
        "+ (SELECT count(*) FROM staged_kek WHERE project_id = $1) AS wraps",
        str(project_id),
    )
    return int(rows[0]["wraps"])


async def leases_left(repository: Repository, project_id: ProjectId) -> list[str]:
    """Nodes that hold one, as far as the database knows."""
    rows = await repository.fetch("SELECT node_id FROM lease WHERE project_id = $1", str(project_id))
    return [row["node_id"] for row in rows]


async def used_cmks(repository: Repository, project_id: ProjectId) -> list[UsedCmk]:
    """Every CMK that ever wrapped a KEK of the project, oldest first."""
    rows = await repository.fetch(
        "SELECT * FROM project_cmk WHERE project_id = $1 ORDER BY first_used_at, key::text", str(project_id)
    )
    return [UsedCmk(KeyConfigurationId(row["key_configuration_id"]), CMK_KEY.validate_json(row["key"])) for row in rows]


async def cmks_in_audit(repository: Repository, project_id: ProjectId) -> set[str]:
    """Identifiers of the CMKs with which the project's KEKs were wrapped or unwrapped, by the audit chain."""
    rows = await repository.fetch(
        "SELECT DISTINCT unnest(ARRAY[details ->> 'kms_key', details ->> 'old_kms_key']) AS key "
        "FROM audit WHERE project_id = $1 AND details ?| ARRAY['kms_key', 'old_kms_key']",
        str(project_id),
    )
    return {row["key"] for row in rows if row["key"]}


async def branches(repository: Repository, project_id: ProjectId) -> list[ProjectId]:
    """Other projects with a branch of it, or of a branch of it."""
    rows = await repository.fetch(
        "WITH RECURSIVE below AS (SELECT project_id FROM branched_project WHERE ancestor_project_id = $1 UNION "
        "SELECT b.project_id FROM branched_project b JOIN below ON b.ancestor_project_id = below.project_id) "
        "SELECT project_id FROM below WHERE project_id <> $1 ORDER BY project_id",
        str(project_id),
    )
    return [ProjectId(row["project_id"]) for row in rows]


async def note_branch(
    repository: Repository, node_id: str, project_id: ProjectId, ancestor_project_id: ProjectId, at: datetime
) -> None:
    """Idempotent; the first time stands in the audit chain."""
    async with repository.transaction() as transaction:
        done = await transaction.execute(
            "INSERT INTO branched_project VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            str(project_id),
            str(ancestor_project_id),
            at,
        )
        if done.endswith(" 1"):
            details = {"ancestor_project_id": str(ancestor_project_id)}
            await transaction.audit([AuditEntry(f"node/{node_id}", "project.branch", "ok", project_id, details)])


async def erasure(repository: Repository, project_id: ProjectId) -> ErasureReport | None:
    rows = await repository.fetch("SELECT report FROM erasure WHERE project_id = $1", str(project_id))
    return ErasureReport.model_validate_json(rows[0]["report"]) if rows else None


# --- changes ---


async def insert_shred(transaction: Transaction, stored: StoredShred) -> None:
    await transaction.execute(
        "INSERT INTO shred (shred_id, project_id, state, reason, asked_by, asked_subject, asked_at, expires_at) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        stored.shred_id,
        str(stored.project_id),
        stored.state,
        stored.reason,
        stored.asked_by,
        stored.asked_subject,
        stored.asked_at,
        stored.expires_at,
    )


async def decide(transaction: Transaction, stored: StoredShred) -> None:
    await transaction.execute(
        "UPDATE shred SET state = $2, decided_by = $3, decided_subject = $4, decided_at = $5, keks_destroyed = $6, "
        "staged_destroyed = $7 WHERE shred_id = $1",
        stored.shred_id,
        stored.state,
        stored.decided_by,
        stored.decided_subject,
        stored.decided_at,
        stored.keks_destroyed,
        stored.staged_destroyed,
    )


async def set_vacuumed(transaction: Transaction, shred_id: str, at: datetime) -> None:
    await transaction.execute("UPDATE shred SET vacuumed_at = $2 WHERE shred_id = $1", shred_id, at)


async def destroy_keks(transaction: Transaction, project_id: ProjectId, at: datetime) -> tuple[int, int]:
    """All wraps of all versions are gone. Returns how many were in use, and how many were staged."""
    keks = await transaction.execute(
        "UPDATE kek SET wrapped = NULL, destroyed_at = $2 WHERE project_id = $1 AND wrapped IS NOT NULL",
        str(project_id),
        at,
    )
    staged = await transaction.execute("DELETE FROM staged_kek WHERE project_id = $1", str(project_id))
    return int(keks.rpartition(" ")[2]), int(staged.rpartition(" ")[2])


async def upsert_node(transaction: Transaction, node_id: str, said: ReportDeletion, at: datetime) -> None:
    await transaction.execute(
        "INSERT INTO shred_node (project_id, node_id, left_objects, remains, not_checked, holds_keys, looked_at) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (project_id, node_id) DO UPDATE SET "
        "left_objects = excluded.left_objects, remains = excluded.remains, not_checked = excluded.not_checked, "
        "holds_keys = excluded.holds_keys, looked_at = excluded.looked_at",
        str(said.project_id),
        node_id,
        said.left_objects,
        _array(said.remains),
        _array(said.not_checked),
        said.holds_keys,
        at,
    )
    for each in said.deleted:
        await transaction.execute(
            "INSERT INTO shred_node_object VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (project_id, node_id, kind) DO "
            "UPDATE SET objects = shred_node_object.objects + excluded.objects, "
            "old_versions = shred_node_object.old_versions + excluded.old_versions, "
            "size_bytes = shred_node_object.size_bytes + excluded.size_bytes",
            str(said.project_id),
            node_id,
            each.kind.value,
            each.objects,
            each.old_versions,
            each.size_bytes,
        )


async def insert_erasure(transaction: Transaction, report: ErasureReport) -> None:
    await transaction.execute(
        "INSERT INTO erasure VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        str(report.project_id),
        report.model_dump_json(),
        report.checked_at,
    )


def _array(texts: Sequence[str]) -> str:
    return json.dumps(list(texts))


def _shred(row: Any) -> StoredShred:
    return StoredShred(
        row["shred_id"],
        ProjectId(row["project_id"]),
        row["state"],
        row["reason"],
        row["asked_by"],
        row["asked_subject"],
        row["asked_at"],
        row["expires_at"],
        row["decided_by"],
        row["decided_subject"],
        row["decided_at"],
        row["keks_destroyed"],
        row["staged_destroyed"],
        row["vacuumed_at"],
    )
