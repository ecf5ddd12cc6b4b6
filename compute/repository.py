"""What the manager remembers, in its own schema of the metadata Postgres."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import asyncpg

from compute.agent.protocol import LoginRole, LoginRoles
from compute.crashes import Crashes
from compute.proposer import Membership, Reservation
from shared.api.compute import ChangeEndpoint, EndpointSize
from shared.api.pageserver import AncestorInfo
from shared.errors import ConflictError, NotFoundError, UnavailableError
from shared.ids import EndpointId, ProjectId, TimelineId
from shared.lsn import Lsn
from shared.migrate import load_migrations, migrate
from shared.table_files import rewrite_tables

_COMMAND_TIMEOUT_S: Final = 10.0
_POOL_SIZE: Final = 8
_UNREACHABLE: Final = (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)


@dataclass(frozen=True, slots=True)
class TimelineRow:
    timeline_id: TimelineId
    project_id: ProjectId
    name: str
    system_identifier: int
    start_lsn: Lsn | None
    """None until the pageserver has made it."""
    safekeepers: frozenset[str]
    """Those that were told to make it."""
    ancestor: AncestorInfo | None
    """Set for a branch. Its LSN is rounded once the pageserver has made it."""
    membership: Membership
    deleting: bool
    """It is to go, and some of it may be gone."""
    created_at: datetime


@dataclass(frozen=True, slots=True)
class EndpointRow:
    endpoint_id: EndpointId
    project_id: ProjectId
    timeline_id: TimelineId
    name: str
    owner: str
    database: str
    scram_verifier: str
    reason: str
    term: int
    start_lsn: Lsn | None
    suspend_after_s: float | None
    """None: the installation's."""
    size: EndpointSize | None
    """None: as the installation is set."""
    read_only_lsn: Lsn | None
    follows: bool
    crashes: Crashes
    created_at: datetime

    @property
    def read_only(self) -> bool:
        return self.follows or self.read_only_lsn is not None


@dataclass(frozen=True, slots=True)
class ListedRole:
    """What the list of a timeline's roles says of one."""

    last_term: int
    """Of the timeline; 0: no compute was ever elected."""
    is_branch: bool
    term: int | None
    """In which the list was made; None: there is none."""
    endpoint_id: str | None
    """Whose compute made it."""
    mock_nonce: str | None
    role: LoginRole | None
    """None: it is not on the list."""


def _unreachable(error: Exception) -> UnavailableError:
    return UnavailableError(f"the metadata database cannot be reached: {type(error).__name__}")


def _timeline(row: Any) -> TimelineRow:
    ancestor = None
    if row["ancestor_timeline_id"] is not None:
        ancestor = AncestorInfo(
            project_id=ProjectId.parse(row["ancestor_project_id"]),
            timeline_id=TimelineId.parse(row["ancestor_timeline_id"]),
            lsn=Lsn(row["ancestor_lsn"]),
        )
    return TimelineRow(
        timeline_id=TimelineId.parse(row["timeline_id"]),
        project_id=ProjectId.parse(row["project_id"]),
        name=row["name"],
        system_identifier=int(row["system_identifier"]),
        start_lsn=None if row["start_lsn"] is None else Lsn(row["start_lsn"]),
        safekeepers=frozenset(row["safekeepers"]),
        ancestor=ancestor,
        membership=_membership(row),
        deleting=row["deleting"],
        created_at=row["created_at"],
    )


def _membership(row: Any) -> Membership:
    return Membership(row["generation"], json.loads(row["seats"]))


def _crashes(row: Any) -> Crashes:
    next_start_at = row["next_start_at"]
    return Crashes(row["crashes"], 0.0 if next_start_at is None else next_start_at.timestamp(), row["crash_reason"])


def _endpoint(row: Any) -> EndpointRow:
    return EndpointRow(
        endpoint_id=EndpointId.parse(row["endpoint_id"]),
        project_id=ProjectId.parse(row["project_id"]),
        timeline_id=TimelineId.parse(row["timeline_id"]),
        name=row["name"],
        owner=row["owner"],
        database=row["database"],
        scram_verifier=row["scram_verifier"],
        reason=row["reason"],
        term=row["term"],
        start_lsn=None if row["start_lsn"] is None else Lsn(row["start_lsn"]),
        suspend_after_s=row["suspend_after_s"],
        size=None if row["size"] is None else EndpointSize(row["size"]),
        read_only_lsn=None if row["read_only_lsn"] is None else Lsn(row["read_only_lsn"]),
        follows=row["follows"],
        crashes=_crashes(row),
        created_at=row["created_at"],
    )


class Repository:
    """Every method raises UnavailableError while the database cannot be reached. Use as an async context manager."""

    def __init__(self, database_url: str, schema: str) -> None:
        self._url = database_url
        self._schema = schema
        self._pool: Any = None

    async def __aenter__(self) -> Repository:
        """Connect and migrate."""
        try:
            self._pool = await asyncpg.create_pool(
                self._url,
                min_size=1,
                max_size=_POOL_SIZE,
                command_timeout=_COMMAND_TIMEOUT_S,
                server_settings={"search_path": self._schema, "application_name": "keylake compute"},
            )
            async with self._pool.acquire() as connection:
                await migrate(connection, self._schema, load_migrations("compute"))
        except (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.CannotConnectNowError) as error:
            raise _unreachable(error) from None
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._pool.close()

    async def _rows(self, sql: str, *arguments: object) -> list[Any]:
        try:
            rows: list[Any] = await self._pool.fetch(sql, *arguments)
        except _UNREACHABLE as error:
            raise _unreachable(error) from None
        return rows

    # --- timelines ---

    async def add_timeline(self, project_id: ProjectId, name: str, ancestor: AncestorInfo | None = None) -> TimelineRow:
        """A new timeline, or the one of that name that there is."""
        rows = await self._rows(
            "INSERT INTO timelines"
            " (timeline_id, project_id, name, ancestor_project_id, ancestor_timeline_id, ancestor_lsn)"
            " VALUES ($1, $2, $3, $4, $5, $6)"
            # Updating nothing makes the row that is there come back.
            " ON CONFLICT (project_id, name) DO UPDATE SET name = excluded.name RETURNING *",
            str(TimelineId.new()),
            str(project_id),
            name,
            None if ancestor is None else str(ancestor.project_id),
            None if ancestor is None else str(ancestor.timeline_id),
            None if ancestor is None else ancestor.lsn.value,
        )
        return _timeline(rows[0])

    async def find_timeline(self, project_id: ProjectId, name: str) -> TimelineRow | None:
        rows = await self._rows("SELECT * FROM timelines WHERE project_id = $1 AND name = $2", str(project_id), name)
        return _timeline(rows[0]) if rows else None

    async def branches(self, timeline_id: TimelineId) -> list[TimelineRow]:
        """Branched off this one, finished or not."""
        rows = await self._rows(
            "SELECT * FROM timelines WHERE ancestor_timeline_id = $1 ORDER BY created_at, timeline_id",
            str(timeline_id),
        )
        return [_timeline(row) for row in rows]

    async def timeline_deleting(self, timeline_id: TimelineId) -> None:
        """From now on it can only be deleted."""
        await self._rows("UPDATE timelines SET deleting = true WHERE timeline_id = $1", str(timeline_id))

    async def delete_timeline(self, timeline_id: TimelineId) -> None:
        """With its endpoints. Nothing is left of it anywhere else."""
        await self._rows(
            "WITH gone AS (DELETE FROM endpoints WHERE timeline_id = $1) DELETE FROM timelines WHERE timeline_id = $1",
            str(timeline_id),
        )

    async def timeline_made(self, timeline_id: TimelineId, system_identifier: int, start_lsn: Lsn) -> None:
        await self._rows(
            "UPDATE timelines SET system_identifier = $2, start_lsn = $3 WHERE timeline_id = $1",
            str(timeline_id),
            system_identifier,
            start_lsn.value,
        )

    async def safekeeper_told(self, timeline_id: TimelineId, node_id: str) -> None:
        """Recorded *before* the safekeeper is told: see the migration."""
        await self._rows(
            "UPDATE timelines SET safekeepers = array_append(safekeepers, $2)"
            " WHERE timeline_id = $1 AND NOT $2 = ANY (safekeepers)",
            str(timeline_id),
            node_id,
        )

    async def reserve_term(
        self, timeline_id: TimelineId, at_least: int, *, next_generation: bool = False
    ) -> Reservation:
        """A term ≥ `at_least` that was never returned before, and who the members are; in one statement, which
        `change_seat` relies on. `next_generation`: the members are about to change."""
        rows = await self._rows(
            "UPDATE timelines SET term = greatest(term + 1, $2), generation = generation + $3"
            " WHERE timeline_id = $1 RETURNING *",
            str(timeline_id),
            at_least,
            int(next_generation),
        )
        if not rows:
            raise NotFoundError("no such timeline")
        return Reservation(int(rows[0]["term"]), _membership(rows[0]))

    async def new_seat(self, timeline_id: TimelineId) -> int:
        """A number that no disk of this timeline's safekeepers was ever given."""
        rows = await self._rows(
            "UPDATE timelines SET last_seat = last_seat + 1 WHERE timeline_id = $1 RETURNING last_seat",
            str(timeline_id),
        )
        if not rows:
            raise NotFoundError("no such timeline")
        return int(rows[0]["last_seat"])

    async def change_seat(self, timeline_id: TimelineId, node_id: str, seat: int, term: int) -> bool:
        """From now on the node's disk `seat` is the member. False, and nothing changes, when somebody has reserved a
        later term than `term`, which is the one that everything was copied in."""
        rows = await self._rows(
            "UPDATE timelines SET seats = seats || jsonb_build_object($2::text, $3::int)"
            " WHERE timeline_id = $1 AND term = $4 RETURNING 1",
            str(timeline_id),
            node_id,
            seat,
            term,
        )
        return bool(rows)

    async def highest_term(self, timeline_id: TimelineId) -> int:
        """The highest term that was ever reserved; 0 for none."""
        rows = await self._rows("SELECT term FROM timelines WHERE timeline_id = $1", str(timeline_id))
        return int(rows[0]["term"]) if rows else 0

    async def timeline(self, timeline_id: TimelineId) -> TimelineRow:
        """Raises NotFoundError."""
        rows = await self._rows("SELECT * FROM timelines WHERE timeline_id = $1", str(timeline_id))
        if not rows:
            raise NotFoundError("no such timeline")
        return _timeline(rows[0])

    async def timelines(self, project_id: ProjectId) -> list[TimelineRow]:
        rows = await self._rows(
            "SELECT * FROM timelines WHERE project_id = $1 ORDER BY created_at, timeline_id", str(project_id)
        )
        return [_timeline(row) for row in rows]

    async def timelines_on(self, node_id: str) -> list[TimelineRow]:
        """Those that a safekeeper was told of, of all projects, ancestors before their branches."""
        rows = await self._rows(
            "SELECT * FROM timelines WHERE $1 = ANY (safekeepers) AND NOT deleting ORDER BY created_at, timeline_id",
            node_id,
        )
        return [_timeline(row) for row in rows]

    # --- endpoints ---

    async def add_endpoint(
        self,
        timeline: TimelineRow,
        name: str,
        owner: str,
        database: str,
        scram_verifier: str,
        *,
        read_only_lsn: Lsn | None = None,
        follows: bool = False,
        suspend_after_s: float | None = None,
        size: EndpointSize | None = None,
    ) -> EndpointRow:
        """Raises ConflictError when the project has an endpoint of that name."""
        rows = await self._rows(
            "INSERT INTO endpoints"
            " (endpoint_id, project_id, timeline_id, name, owner, database, scram_verifier, read_only_lsn,"
            " suspend_after_s, size, follows)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)"
            " ON CONFLICT (project_id, name) DO NOTHING RETURNING *",
            str(EndpointId.new()),
            str(timeline.project_id),
            str(timeline.timeline_id),
            name,
            owner,
            database,
            scram_verifier,
            None if read_only_lsn is None else read_only_lsn.value,
            suspend_after_s,
            size,
            follows,
        )
        if not rows:
            raise ConflictError("the project has an endpoint of that name; its password was shown when it was made")
        return _endpoint(rows[0])

    async def change_endpoint(self, endpoint_id: EndpointId, change: ChangeEndpoint) -> EndpointRow:
        """What `change` names. Raises NotFoundError."""
        named = change.model_fields_set
        rows = await self._rows(
            "UPDATE endpoints SET suspend_after_s = CASE WHEN $2 THEN $3 ELSE suspend_after_s END,"
            " size = CASE WHEN $4 THEN $5 ELSE size END WHERE endpoint_id = $1 RETURNING *",
            str(endpoint_id),
            "suspend_after_s" in named,
            change.suspend_after_s,
            "size" in named,
            change.size,
        )
        if not rows:
            raise NotFoundError("no such endpoint")
        return _endpoint(rows[0])

    async def delete_endpoint(self, endpoint_id: EndpointId) -> EndpointRow:
        """What it was. Raises NotFoundError."""
        rows = await self._rows("DELETE FROM endpoints WHERE endpoint_id = $1 RETURNING *", str(endpoint_id))
        if not rows:
            raise NotFoundError("no such endpoint")
        return _endpoint(rows[0])

    async def endpoint(self, endpoint_id: EndpointId) -> EndpointRow:
        """Raises NotFoundError."""
        rows = await self._rows("SELECT * FROM endpoints WHERE endpoint_id = $1", str(endpoint_id))
        if not rows:
            raise NotFoundError("no such endpoint")
        return _endpoint(rows[0])

    async def endpoints(self, project_id: ProjectId | None = None) -> list[EndpointRow]:
        """All of one project, or all."""
        rows = await self._rows(
            "SELECT * FROM endpoints WHERE $1::text IS NULL OR project_id = $1 ORDER BY created_at, endpoint_id",
            None if project_id is None else str(project_id),
        )
        return [_endpoint(row) for row in rows]

    # --- roles ---

    async def keep_login_roles(
        self, timeline_id: TimelineId, term: int, endpoint_id: EndpointId, roles: LoginRoles
    ) -> None:
        """Of the compute of `term`, at its end. An older one's changes nothing."""
        await self._rows(
            "INSERT INTO login_roles (timeline_id, term, endpoint_id, roles, mock_nonce) VALUES ($1, $2, $3, $4, $5)"
            " ON CONFLICT (timeline_id) DO UPDATE SET term = excluded.term, endpoint_id = excluded.endpoint_id,"
            " roles = excluded.roles, mock_nonce = excluded.mock_nonce WHERE excluded.term > login_roles.term",
            str(timeline_id),
            term,
            str(endpoint_id),
            json.dumps({digest: role.model_dump(mode="json") for digest, role in roles.roles.items()}),
            roles.mock_nonce,
        )

    async def listed_role(self, timeline_id: TimelineId, name: bytes) -> ListedRole:
        """Raises NotFoundError."""
        rows = await self._rows(
            "SELECT t.term AS last_term, t.ancestor_timeline_id, l.term, l.endpoint_id, l.mock_nonce,"
            # As `role_digest`.
            " l.roles -> encode(sha256(decode(l.mock_nonce, 'hex') || $2::bytea), 'hex') AS role"
            " FROM timelines t LEFT JOIN login_roles l USING (timeline_id) WHERE t.timeline_id = $1",
            str(timeline_id),
            name,
        )
        if not rows:
            raise NotFoundError("no such timeline")
        [row] = rows
        return ListedRole(
            last_term=row["last_term"],
            is_branch=row["ancestor_timeline_id"] is not None,
            term=row["term"],
            endpoint_id=row["endpoint_id"],
            mock_nonce=row["mock_nonce"],
            role=None if row["role"] is None else LoginRole.model_validate_json(row["role"]),
        )

    async def delete_verifiers(self, project_id: ProjectId) -> int:
        """Of all roles of a shredded project, owners of endpoints included. Returns how many there were."""
        listed = await self._rows(
            "DELETE FROM login_roles l USING timelines t WHERE t.timeline_id = l.timeline_id AND t.project_id = $1"
            " RETURNING (SELECT count(*) FROM jsonb_object_keys(l.roles)) AS roles",
            str(project_id),
        )
        owners = await self._rows(
            "UPDATE endpoints SET scram_verifier = '' WHERE project_id = $1 AND scram_verifier <> '' RETURNING 1",
            str(project_id),
        )
        # Each time, since the last time may have failed here.
        try:
            async with self._pool.acquire() as connection:
                await rewrite_tables(connection, ("login_roles", "endpoints"))
        except _UNREACHABLE as error:
            raise _unreachable(error) from None
        return sum(int(row["roles"]) for row in listed) + len(owners)

    # --- ends ---

    async def run_over(
        self, endpoint_id: EndpointId, reason: str, term: int, start_lsn: Lsn | None, crashes: Crashes
    ) -> None:
        """What is known of a run that has ended, and when there may be another one."""
        await self._rows(
            "UPDATE endpoints SET reason = $2, term = greatest(term, $3), start_lsn = coalesce($4, start_lsn),"
            " crashes = $5, next_start_at = $6, crash_reason = $7 WHERE endpoint_id = $1",
            str(endpoint_id),
            reason,
            term,
            None if start_lsn is None else start_lsn.value,
            crashes.count,
            datetime.fromtimestamp(crashes.next_start_s, UTC) if crashes.next_start_s else None,
            crashes.reason,
        )


@dataclass(frozen=True, slots=True)
class StoredMembers:
    """`replacement.Members`, of one timeline."""

    repository: Repository
    timeline_id: TimelineId

    async def reserve(self, at_least: int) -> Reservation:
        return await self.repository.reserve_term(self.timeline_id, at_least, next_generation=True)

    async def new_seat(self) -> int:
        return await self.repository.new_seat(self.timeline_id)

    async def change_seat(self, node_id: str, seat: int, term: int) -> bool:
        return await self.repository.change_seat(self.timeline_id, node_id, seat, term)
