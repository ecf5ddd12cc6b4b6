"""What the keymanager remembers: PostgreSQL through asyncpg.

Every change of state is made in a `Transaction` together with the audit records that describe it: both are there after
a crash, or neither. The audit chain's head row is locked by `Transaction.audit`, so call that last.

Every write is fenced: it happens in the epoch of the term that it is made in (`leadership.py`), or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from datetime import datetime
from typing import Any, Final, TypeAlias

import asyncpg
from pydantic import TypeAdapter

from keymanager.leadership import Term
from keymanager.lease_table import Holder
from keymanager.records import (
    StagedKek,
    StoredKek,
    StoredKeyConfiguration,
    StoredKeyUser,
    StoredLease,
    StoredProject,
    StoredReplacement,
    StoredRestoration,
    StoredRevocation,
    StoredToken,
)
from keymanager.state import KmsAccess
from keymanager.transaction import Transaction
from shared import audit_chain as audit
from shared.api.keymanager import InstanceSealed, KeyState, KeyUse, Revocation, Role, Workspace
from shared.clock import Clock
from shared.cmk import CMK_KEY, CmkKey
from shared.errors import CorruptedError, InvalidInputError, NotFoundError, NotLeaderError, UnavailableError
from shared.ids import AccountId, InstanceId, KekId, KeyConfigurationId, ProjectId, TokenId, WorkspaceId
from shared.migrate import load_migrations, migrate
from shared.roles import PersonRole
from shared.table_files import rewrite_tables

Record: TypeAlias = "asyncpg.Record"
SCHEMA: Final = "keymanager"
SESSION: Final = {"search_path": SCHEMA, "application_name": "keylake keymanager"}
_AUDIT_PAGE: Final = 1000
_ACQUIRE_TIMEOUT_S: Final = 10.0
_CLOSE_TIMEOUT_S: Final = 2.0
_LET_GO_TIMEOUT_S: Final = 1.0
_KEY_USES: Final = TypeAdapter(list[KeyUse])
UNAVAILABLE: Final = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # shutting down, starting up, crashed
    asyncpg.IdleInTransactionSessionTimeoutError,  # we were stopped in the middle …
    asyncpg.InternalClientError,  # … which is how asyncpg takes a server's last word that it did not ask for
    asyncpg.ObjectNotInPrerequisiteStateError,  # closed for connections, a lock not to be had
    asyncpg.InsufficientResourcesError,  # disk full, too many connections
)


async def _roll_back(connection: Any, transaction: Any) -> None:
    """Soon, or with the connection. When a query was cancelled asyncpg asks the server, over another connection, to
    cancel it too, and waits for the answer first: it never comes when we are cut off, and our term ends now."""
    try:
        async with asyncio.timeout(_LET_GO_TIMEOUT_S):
            await transaction.rollback()
    except (*UNAVAILABLE, asyncpg.PostgresError):
        connection.terminate()


class Repository:
    """A pool of connections. `open` it; then each term works with its own view of it, `during(term)`."""

    def __init__(self, pool: asyncpg.Pool[Record], clock: Clock, term: Term | None = None) -> None:
        self._pool = pool
        self._clock = clock
        self._term = term

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, dsn: str, connections: int, clock: Clock, *, idle_transaction_timeout_s: float
    ) -> AsyncIterator[Repository]:
        """Connect and migrate.

        `idle_transaction_timeout_s`: when the database ends a transaction that nobody goes on with, because its process
        was stopped in the middle, perhaps; it holds locks that the next leader waits for.

        Raises UnavailableError when the database cannot be reached, ConflictError when its schema is a newer one.
        """
        idle_ms = str(max(1, round(idle_transaction_timeout_s * 1000)))
        session = {**SESSION, "idle_in_transaction_session_timeout": idle_ms}
        try:
            async with asyncio.timeout(_ACQUIRE_TIMEOUT_S):
                alone = await asyncpg.connect(dsn, server_settings=SESSION)
                try:
                    await migrate(alone, SCHEMA, load_migrations("keymanager"))
                finally:
                    alone.terminate()
                pool = await asyncpg.create_pool(
                    dsn, min_size=1, max_size=connections, command_timeout=30, server_settings=session
                )
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError) as error:
            raise UnavailableError(f"the metadata database cannot be reached: {type(error).__name__}") from None
        try:
            yield cls(pool, clock)
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await pool.close()  # what is being written is finished
            pool.terminate()

    def during(self, term: Term) -> Repository:
        """The same database, for the leader of `term`."""
        return Repository(self._pool, self._clock, term)

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """All or nothing. Raises UnavailableError when the database cannot be reached, NotLeaderError when the term is
        over."""
        async with self._fenced() as connection:
            yield Transaction(connection, self._clock)

    @contextlib.asynccontextmanager
    async def _fenced(self) -> AsyncIterator[Any]:
        """A transaction in the epoch of our term: no other epoch can begin before it ends."""
        term = self._term
        assert term is not None  # noqa: S101 - only a leader has anything to write
        term.check()
        async with self._connection() as connection:
            transaction = connection.transaction()
            await transaction.start()
            try:
                epoch: int = await connection.fetchval("SELECT epoch FROM leader FOR KEY SHARE")
                if epoch != term.epoch:
                    term.end()
                    raise NotLeaderError("another keymanager leads by now: nothing was written")
                yield connection
            except BaseException:
                await _roll_back(connection, transaction)
                raise
            await transaction.commit()

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        try:
            connection = await self._pool.acquire(timeout=_ACQUIRE_TIMEOUT_S)
            try:
                yield connection
            finally:
                with contextlib.suppress(*UNAVAILABLE):  # it was ended then; what is under way is not to be replaced
                    await self._pool.release(connection, timeout=_LET_GO_TIMEOUT_S)
        except asyncpg.DataError as error:
            raise InvalidInputError("this cannot be stored: a text holds what the database does not take") from error
        except UNAVAILABLE as error:
            raise UnavailableError(f"the metadata database failed: {type(error).__name__}") from error

    # --- reads ---

    async def _fetch(self, query: str, *arguments: object) -> list[Record]:
        async with self._connection() as connection:
            rows: list[Record] = await connection.fetch(query, *arguments)
            return rows

    async def fetch(self, query: str, *arguments: object) -> list[Record]:
        """Rows, for whoever keeps the statements of one use case together elsewhere. Raises UnavailableError."""
        return await self._fetch(query, *arguments)

    async def accounts(self) -> list[AccountId]:
        rows = await self._fetch("SELECT account_id FROM account ORDER BY created_at")
        return [AccountId(row["account_id"]) for row in rows]

    async def key_configurations(self) -> list[StoredKeyConfiguration]:
        rows = await self._fetch("SELECT * FROM key_configuration ORDER BY created_at")
        return [
            StoredKeyConfiguration(
                KeyConfigurationId(row["key_configuration_id"]),
                AccountId(row["account_id"]),
                row["name"],
                CMK_KEY.validate_json(row["key"]),
                row["outage_grace_s"],
                row["probe_interval_s"],
                row["canary_wrapped"],
                row["canary_digest"],
                KmsAccess(row["kms_access"]),
                row["last_verdict"],
                row["last_probe_at"],
                row["last_allowed_at"],
                row["created_at"],
                row["key_generation"],
                row["canary_cmk_key_version"],
            )
            for row in rows
        ]

    async def replacements(self) -> list[StoredReplacement]:
        rows = await self._fetch("SELECT * FROM replacement ORDER BY started_at")
        return [
            StoredReplacement(
                KeyConfigurationId(row["key_configuration_id"]),
                CMK_KEY.validate_json(row["key"]),
                row["canary_wrapped"],
                row["canary_digest"],
                row["actor"],
                row["started_at"],
                row["canary_cmk_key_version"],
            )
            for row in rows
        ]

    async def staged(self, key_configuration_id: KeyConfigurationId) -> list[StagedKek]:
        rows = await self._fetch("SELECT * FROM staged_kek WHERE key_configuration_id = $1", str(key_configuration_id))
        return [
            StagedKek(ProjectId(row["project_id"]), row["kek_version"], row["wrapped"], row["cmk_key_version"])
            for row in rows
        ]

    async def workspaces(self) -> list[Workspace]:
        rows = await self._fetch("SELECT * FROM workspace ORDER BY created_at")
        return [Workspace(**dict(row)) for row in rows]

    async def projects(self) -> list[StoredProject]:
        rows = await self._fetch("SELECT * FROM project ORDER BY created_at")
        return [
            StoredProject(
                ProjectId(row["project_id"]),
                WorkspaceId(row["workspace_id"]),
                row["name"],
                row["held"],
                row["shredded"],
                KeyState(row["state"]),
                row["state_reason"],
                row["created_at"],
                KeyConfigurationId(row["key_configuration_id"]),
            )
            for row in rows
        ]

    async def keks(self) -> list[StoredKek]:
        rows = await self._fetch("SELECT * FROM kek ORDER BY project_id, kek_version")
        return [
            StoredKek(
                ProjectId(row["project_id"]),
                KekId(row["kek_id"]),
                row["kek_version"],
                row["wrapped"],
                row["cmk_key_version"],
                row["wraps_reserved"],
                row["created_at"],
                row["last_unwrap_at"],
                row["destroyed_at"],
                row["canary"],
            )
            for row in rows
        ]

    async def key_users(self) -> list[StoredKeyUser]:
        rows = await self._fetch("SELECT * FROM key_user")
        return [
            StoredKeyUser(
                ProjectId(row["project_id"]),
                row["node_id"],
                row["kek_floor"],
                tuple(_KEY_USES.validate_json(row["uses"])),
                row["reported_at"],
            )
            for row in rows
        ]

    async def dek_floors(self) -> dict[ProjectId, int]:
        rows = await self._fetch("SELECT project_id, dek_floor FROM project WHERE dek_floor > 0")
        return {ProjectId(row["project_id"]): row["dek_floor"] for row in rows}

    async def leases(self) -> list[StoredLease]:
        rows = await self._fetch("SELECT * FROM lease")
        return [StoredLease(ProjectId(row["project_id"]), _holder(row), row["ttl_s"]) for row in rows]

    async def open_revocations(self) -> list[StoredRevocation]:
        rows = await self._fetch("SELECT * FROM revocation WHERE sealed_after_s IS NULL ORDER BY number")
        found = []
        for row in rows:
            pending = await self._fetch(
                "SELECT * FROM revocation_instance WHERE revocation_id = $1 AND outcome = 'pending'",
                row["revocation_id"],
            )
            found.append(
                StoredRevocation(
                    row["revocation_id"],
                    ProjectId(row["project_id"]),
                    KeyState(row["state"]),
                    row["reason"],
                    row["detected_at"],
                    [_holder(instance) for instance in pending],
                )
            )
        return found

    async def revocations(self, project_ids: Collection[ProjectId] | None, limit: int) -> list[Revocation]:
        """Newest first; of these projects only, unless None."""
        rows = await self._fetch(
            "SELECT *, (SELECT restoration_id FROM restoration r WHERE r.project_id = revocation.project_id "
            "AND r.detected_at >= revocation.detected_at ORDER BY r.number LIMIT 1) AS restoration_id "
            "FROM revocation WHERE $1::text[] IS NULL OR project_id = ANY ($1) ORDER BY number DESC LIMIT $2",
            None if project_ids is None else [str(each) for each in project_ids],
            limit,
        )
        instances = await self._fetch(
            "SELECT * FROM revocation_instance WHERE revocation_id = ANY($1) ORDER BY node_id, generation",
            [row["revocation_id"] for row in rows],
        )
        by_revocation: dict[str, list[InstanceSealed]] = {}
        for row in instances:
            sealed = InstanceSealed(
                node_id=row["node_id"],
                role=Role(row["role"]),
                generation=row["generation"],
                outcome=row["outcome"],
                after_s=row["after_s"],
                steps_s=json.loads(row["steps_s"]),
            )
            by_revocation.setdefault(row["revocation_id"], []).append(sealed)
        return [
            Revocation(
                revocation_id=row["revocation_id"],
                project_id=ProjectId(row["project_id"]),
                state=KeyState(row["state"]),
                reason=row["reason"],
                detected_at=row["detected_at"],
                keks_dropped_after_s=row["keks_dropped_after_s"],
                sealed_after_s=row["sealed_after_s"],
                restoration_id=row["restoration_id"],
                instances=by_revocation.get(row["revocation_id"], []),
            )
            for row in rows
        ]

    async def tokens(self) -> list[StoredToken]:
        """All that were ever issued to people, newest first."""
        return [_token(row) for row in await self._fetch("SELECT * FROM token ORDER BY issued_at DESC, token_id")]

    async def token(self, token_id: TokenId) -> StoredToken:
        """Raises NotFoundError."""
        rows = await self._fetch("SELECT * FROM token WHERE token_id = $1", str(token_id))
        if not rows:
            raise NotFoundError("there is no such token")
        return _token(rows[0])

    async def audit_page(
        self, after: int, limit: int, project_ids: Collection[ProjectId] | None = None
    ) -> list[audit.Link]:
        """Records after sequence number `after`, oldest first; of these projects only, unless None."""
        rows = await self._fetch(
            "SELECT * FROM audit WHERE sequence > $1 AND ($3::text[] IS NULL OR project_id = ANY ($3)) "
            "ORDER BY sequence LIMIT $2",
            after,
            limit,
            None if project_ids is None else [str(each) for each in project_ids],
        )
        return [_link(row) for row in rows]

    async def audit_since(self, at: datetime) -> list[audit.Link]:
        """Records from `at` on that tell of calls to a KMS, oldest first."""
        rows = await self._fetch(
            "SELECT * FROM audit WHERE at >= $1 AND (details ? 'calls' OR details ? 'kms_key') ORDER BY sequence", at
        )
        return [_link(row) for row in rows]

    async def revocation_records(self, project_id: ProjectId, revocation_id: str) -> list[audit.Link]:
        """The project's records from the one with which a revocation begins to the one that says that it is sealed."""
        rows = await self._fetch(
            """
            WITH marks AS (
                SELECT min(sequence) FILTER (WHERE action = 'project.revoking') AS first,
                       max(sequence) FILTER (WHERE action = 'project.sealed') AS last
                FROM audit WHERE project_id = $1 AND details ->> 'revocation_id' = $2
            )
            SELECT audit.* FROM audit, marks
            WHERE project_id = $1 AND sequence BETWEEN marks.first AND marks.last ORDER BY sequence
            """,
            str(project_id),
            revocation_id,
        )
        return [_link(row) for row in rows]

    async def audit_of(self, project_id: ProjectId, action: str, name: str, value: str) -> list[audit.Link]:
        """The project's records of an action whose detail `name` is `value`, oldest first."""
        rows = await self._fetch(
            "SELECT * FROM audit WHERE project_id = $1 AND action = $2 AND details ->> $3 = $4 ORDER BY sequence",
            str(project_id),
            action,
            name,
            value,
        )
        return [_link(row) for row in rows]

    async def audit_range(self, project_id: ProjectId, first: int, last: int | None) -> list[audit.Link]:
        """The project's records from `first` to `last`, both included, oldest first; not more than ten thousand."""
        rows = await self._fetch(
            "SELECT * FROM audit WHERE project_id = $1 AND sequence >= $2 AND ($3::bigint IS NULL OR sequence <= $3) "
            "ORDER BY sequence LIMIT 10000",
            str(project_id),
            first,
            last,
        )
        return [_link(row) for row in rows]

    async def restorations(self, project_id: ProjectId) -> list[StoredRestoration]:
        """Newest first."""
        rows = await self._fetch(
            "SELECT * FROM restoration WHERE project_id = $1 ORDER BY number DESC", str(project_id)
        )
        return [
            StoredRestoration(
                row["restoration_id"],
                row["reason"],
                KeyConfigurationId(row["key_configuration_id"]),
                CMK_KEY.validate_json(row["key"]),
                row["detected_at"],
                row["restored_after_s"],
            )
            for row in rows
        ]

    async def revoked_key(self, revocation_id: str) -> tuple[KeyConfigurationId, CmkKey] | None:
        """The customer's key as it was at a revocation; None for one from before that was written down."""
        rows = await self._fetch("SELECT * FROM revocation WHERE revocation_id = $1", revocation_id)
        if not rows or rows[0]["key"] is None:
            return None
        return KeyConfigurationId(rows[0]["key_configuration_id"]), CMK_KEY.validate_json(rows[0]["key"])

    async def key_change_after(
        self, project_id: ProjectId, key_configuration_id: KeyConfigurationId, sequence: int
    ) -> int | None:
        """The first record after `sequence` with which the project came under another CMK."""
        rows = await self._fetch(
            """
            SELECT min(sequence) AS changed FROM audit WHERE sequence > $1 AND (
                (action = 'project.move_key' AND project_id = $2)
                OR (
                    action = 'cmk.replace' AND details ->> 'step' = 'switch'
                    AND details ->> 'key_configuration_id' = $3
                )
            )
            """,
            sequence,
            str(project_id),
            str(key_configuration_id),
        )
        changed: int | None = rows[0]["changed"]
        return changed

    async def audit_head(self) -> audit.ChainHead:
        """Raises CorruptedError when somebody removed it."""
        rows = await self._fetch("SELECT sequence, record_hash FROM audit_head")
        if not rows:
            raise CorruptedError("the audit chain's head is missing")
        return audit.ChainHead(rows[0]["sequence"], rows[0]["record_hash"])

    async def verify_audit(self, each: Callable[[audit.Link], Awaitable[None]] | None = None) -> audit.ChainVerifier:
        """Walk the whole chain, in one snapshot. `each` is called with every record that is good."""
        verifier = audit.ChainVerifier()
        async with (
            self._connection() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            head = await connection.fetchrow("SELECT sequence, record_hash FROM audit_head")
            async for row in connection.cursor("SELECT * FROM audit ORDER BY sequence", prefetch=_AUDIT_PAGE):
                try:
                    link = _link(row)
                except ValueError:
                    verifier.problem = f"record {row['sequence']} was altered: it holds what was never written"
                    break
                if not verifier.feed(link):
                    break
                if each is not None:
                    await each(link)
        if head is None:
            verifier.problem = verifier.problem or "the chain's head is missing"
        else:
            verifier.finish(audit.ChainHead(head["sequence"], head["record_hash"]))
        return verifier

    # --- writes that need no audit record ---

    async def note_probe(
        self, key_configuration_id: KeyConfigurationId, verdict: str, probed_at: datetime, allowed_at: datetime
    ) -> None:
        """The latest answer of the KMS, for people, and for the grace after a restart."""
        async with self._fenced() as connection:
            await connection.execute(
                "UPDATE key_configuration SET last_verdict = $2, last_probe_at = $3, "
                "last_allowed_at = greatest(last_allowed_at, $4) WHERE key_configuration_id = $1",
                str(key_configuration_id),
                verdict,
                probed_at,
                allowed_at,
            )

    async def note_unwrap(self, project_id: ProjectId, kek_version: int, at: datetime, canary: bytes | None) -> None:
        """The KMS unwrapped this KEK; for people. `canary`: to be kept if there is none."""
        async with self._fenced() as connection:
            await connection.execute(
                "UPDATE kek SET last_unwrap_at = $3, canary = coalesce(canary, $4) "
                "WHERE project_id = $1 AND kek_version = $2",
                str(project_id),
                kek_version,
                at,
                canary,
            )

    async def vacuum_keks(self) -> None:
        """Write the tables of wrapped KEKs anew, so that the database's files hold none that was destroyed; its WAL and
        its backups may. Whoever wraps or unwraps a KEK waits for some milliseconds. Raises UnavailableError."""
        if self._term is not None:
            self._term.check()
        async with self._connection() as connection:
            await connection.execute("SET lock_timeout = '5s'")
            try:
                await rewrite_tables(connection, ("kek", "staged_kek"))
            finally:
                await connection.execute("RESET lock_timeout")

    async def reserve_wraps(self, project_id: ProjectId, kek_version: int, block: int) -> int:
        """Count `block` more wraps before any of them is made. Returns the new total."""
        async with self._fenced() as connection:
            total: int | None = await connection.fetchval(
                "UPDATE kek SET wraps_reserved = wraps_reserved + $3 WHERE project_id = $1 AND kek_version = $2 "
                "RETURNING wraps_reserved",
                str(project_id),
                kek_version,
                block,
            )
        if total is None:
            raise NotFoundError("the project has no such KEK")
        return total


def _token(row: Record) -> StoredToken:
    return StoredToken(
        TokenId(row["token_id"]),
        row["digest"],
        PersonRole(row["role"]),
        row["subject"],
        None if row["workspace_id"] is None else WorkspaceId(row["workspace_id"]),
        None if row["project_id"] is None else ProjectId(row["project_id"]),
        row["issued_by"],
        row["issued_at"],
        row["expires_at"],
        row["revoked_at"],
    )


def _holder(row: Record) -> Holder:
    return Holder(InstanceId(row["instance_id"]), row["node_id"], Role(row["role"]), row["generation"])


def _link(row: Record) -> audit.Link:
    """Raises ValueError when somebody has written what we never write."""
    project, details = row["project_id"], json.loads(row["details"])
    if not isinstance(details, dict) or not all(isinstance(value, str) for value in details.values()):
        raise ValueError("audit details are not text")
    entry = audit.AuditEntry(
        row["actor"],
        row["action"],
        row["outcome"],
        None if project is None else ProjectId(project),
        details,
    )
    return audit.Link(row["sequence"], row["at"], entry, row["previous_hash"], row["record_hash"])
