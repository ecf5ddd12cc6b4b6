"""The metadata database: what `Repository`, `Transaction` and `SeatTable` do in SQL, done in dicts.

A commit happens at one moment, or not; its answer may be lost either way. It is fenced by the epoch, as the real one
is. `tests/integration/test_simulated_database.py` runs both through the same steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Protocol, TypeVar

from keymanager.leadership import Seat, Term
from keymanager.lease_table import Held, Holder
from keymanager.records import (
    StoredKek,
    StoredKeyConfiguration,
    StoredKeyUser,
    StoredLease,
    StoredProject,
    StoredReplacement,
    StoredRevocation,
    StoredToken,
)
from keymanager.repository import Repository
from keymanager.state import KeyAccess, KmsAccess
from keymanager.transaction import Transaction
from shared import audit_chain as audit
from shared.api.keymanager import KeyState, Role, Workspace
from shared.clock import Clock
from shared.errors import ConflictError, NotLeaderError, PermissionDeniedError, UnavailableError
from shared.ids import AccountId, InstanceId, KeyConfigurationId, ProjectId
from shared.keysession import ReplacedError
from tests.simulation.loop import Process, SimulatedLoop, current_process
from tests.simulation.network import Network

T = TypeVar("T")
NAME = "database"


class Listener(Protocol):
    """Is told what becomes durable, at the moment when it does."""

    def outcome(self, revocation_id: str, instance_id: InstanceId, outcome: str) -> None: ...

    def sealed(self, revocation_id: str) -> None: ...

    def project_is(self, project_id: ProjectId, state: KeyState) -> None: ...

    def access_is(self, key_configuration_id: KeyConfigurationId, access: KmsAccess, by: Process) -> None: ...


@dataclass
class _Revocation:
    project_id: ProjectId
    state: KeyState
    reason: str
    detected_at: datetime
    outcomes: dict[InstanceId, tuple[Holder, str]] = field(default_factory=dict)
    sealed_after_s: float | None = None


class Database:
    """The tables."""

    def __init__(self, loop: SimulatedLoop, network: Network, rng: random.Random) -> None:
        self.loop, self.network, self._rng = loop, network, rng
        self.listener: Listener | None = None
        self.failing = 0.0
        """Probability that an answer is lost."""
        self.seat = Seat(0, 0, None)
        self.seat_taken_s = 0.0
        self.account_id = AccountId.new()
        self.key_configurations: dict[KeyConfigurationId, StoredKeyConfiguration] = {}
        self.workspaces: list[Workspace] = []
        self.projects: dict[ProjectId, StoredProject] = {}
        self.keks: dict[tuple[ProjectId, int], StoredKek] = {}
        self.leases: dict[tuple[ProjectId, InstanceId], StoredLease] = {}
        self.revocations: dict[str, _Revocation] = {}
        self.nodes: dict[str, tuple[str, int, InstanceId]] = {}
        self.instances: dict[InstanceId, tuple[str, Role]] = {}
        self.key_users: set[tuple[ProjectId, str]] = set()
        self.chain: list[audit.Link] = []

    async def request(self, work: Callable[[], T], timeout_s: float = 30.0) -> T:
        """What `work` returns, done at one moment on the other side of the network. Raises UnavailableError; then it
        was done or not, or will be."""
        process = current_process()
        answer: asyncio.Future[tuple[T | None, Exception | None]] = asyncio.get_running_loop().create_future()

        def hear(result: T | None, error: Exception | None) -> None:
            if not answer.done():
                answer.set_result((result, error))

        def arrive() -> None:
            fate = self._rng.random()
            if fate < self.failing / 2:  # the connection broke on the way there
                failure = UnavailableError("the metadata database failed: ConnectionResetError")
                self.network.send(NAME, process.name, lambda: hear(None, failure))
                return
            result: T | None = None
            error: Exception | None = None
            try:
                result = work()
            except Exception as caught:
                error = caught
            if fate < self.failing:  # … or on the way back
                error, result = UnavailableError("the metadata database failed: ConnectionResetError"), None
            self.network.send(NAME, process.name, lambda: hear(result, error))

        self.network.send(process.name, NAME, arrive)
        try:
            async with asyncio.timeout(timeout_s):
                result, error = await answer
        except TimeoutError:
            raise UnavailableError("the metadata database failed: TimeoutError") from None
        if error is not None:
            raise error
        return result  # type: ignore[return-value]


class SimulatedSeat:
    """`SeatAccess`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def look(self, timeout_s: float) -> Seat:
        return await self._database.request(lambda: self._database.seat, timeout_s)

    async def take(self, seen: Seat, holder: InstanceId, node_id: str, place: str, timeout_s: float) -> bool:
        def work() -> bool:
            seat = self._database.seat
            if (seat.epoch, seat.renewals, seat.holder) != (seen.epoch, seen.renewals, seen.holder):
                return False
            self._database.seat = Seat(seen.epoch + 1, 0, holder, node_id, place)
            self._database.seat_taken_s = self._database.loop.time()
            return True

        return await self._database.request(work, timeout_s)

    async def renew(self, epoch: int, holder: InstanceId, timeout_s: float) -> bool:
        def work() -> bool:
            seat = self._database.seat
            if (seat.epoch, seat.holder) != (epoch, holder):
                return False
            self._database.seat = replace(seat, renewals=seat.renewals + 1)
            return True

        return await self._database.request(work, timeout_s)

    async def give_back(self, epoch: int, holder: InstanceId, timeout_s: float) -> None:
        def work() -> None:
            seat = self._database.seat
            if (seat.epoch, seat.holder) == (epoch, holder):
                self._database.seat = replace(seat, holder=None)

        await self._database.request(work, timeout_s)

    async def aclose(self) -> None:
        pass


class SimulatedTransaction(Transaction):
    """Collects what is to happen; `changes` are made at the commit."""

    def __init__(self, database: Database, clock: Clock, process: Process) -> None:
        super().__init__(None, clock)
        self._database, self._process = database, process
        self.changes: list[Callable[[], None]] = []

    async def audit(self, entries: Iterable[audit.AuditEntry]) -> None:
        database, at, wanted = self._database, self._clock.now(), list(entries)

        def change() -> None:
            head = database.chain[-1].head if database.chain else audit.ChainHead()
            database.chain += audit.append(head, at, wanted)

        self.changes.append(change)

    async def set_kms_access(self, key_configuration_id: KeyConfigurationId, access: KmsAccess) -> None:
        database, process = self._database, self._process

        def change() -> None:
            stored = database.key_configurations[key_configuration_id]
            database.key_configurations[key_configuration_id] = replace(stored, kms_access=access)
            if database.listener is not None:
                database.listener.access_is(key_configuration_id, access, process)

        self.changes.append(change)

    async def set_project(self, project_id: ProjectId, state: KeyState, reason: str, access: KeyAccess) -> None:
        database = self._database

        def change() -> None:
            stored = database.projects[project_id]
            database.projects[project_id] = replace(
                stored, state=state, state_reason=reason, held=access.held, shredded=access.shredded
            )
            if database.listener is not None:
                database.listener.project_is(project_id, state)

        self.changes.append(change)

    async def require_key_generation(self, key_configuration_id: KeyConfigurationId, generation: int) -> None:
        database = self._database

        def change() -> None:
            if database.key_configurations[key_configuration_id].key_generation != generation:
                raise ConflictError("the key was replaced by another one meanwhile: try again")

        self.changes.append(change)

    async def insert_kek(self, kek: StoredKek) -> None:
        def change() -> None:
            self._database.keks[kek.project_id, kek.kek_version] = kek

        self.changes.append(change)

    async def destroy_keks(self, project_id: ProjectId) -> None:
        """What `shred_store` does in SQL, of which nothing else is here: a shredding is asked of the revoker."""
        keks = self._database.keks

        def change() -> None:
            for of in [of for of in keks if of[0] == project_id]:
                keks[of] = replace(keks[of], wrapped=None, destroyed_at=self._clock.now())

        self.changes.append(change)

    async def register_instance(self, node_id: str, instance_id: InstanceId, role: Role, kid: str) -> int:
        database = self._database
        node, known = await database.request(lambda: (database.nodes.get(node_id), database.instances.get(instance_id)))
        if node is not None and node[0] != kid:
            raise PermissionDeniedError("this node name belongs to another signing key")
        if known is not None:
            if known != (node_id, role):
                raise ConflictError("this instance was here before with another name or role")
            if node is None or node[2] != instance_id:
                raise ReplacedError("a newer instance of this node has taken over")
        generation = 1 if node is None else node[1] + 1

        def change() -> None:
            if database.nodes.get(node_id) != node:  # the real one waits for the row's lock
                raise UnavailableError("somebody registered under this name at the same time")
            database.nodes[node_id] = kid, generation, instance_id
            database.instances[instance_id] = node_id, role

        self.changes.append(change)
        return generation

    async def insert_leases(self, leases: Iterable[StoredLease]) -> None:
        wanted = list(leases)

        def change() -> None:
            for lease in wanted:
                self._database.leases[lease.project_id, lease.holder.instance_id] = lease

        self.changes.append(change)

    async def delete_leases(self, leases: Iterable[tuple[ProjectId, InstanceId]]) -> None:
        gone = list(leases)

        def change() -> None:
            for lease in gone:
                self._database.leases.pop(lease, None)

        self.changes.append(change)

    async def insert_key_user(self, project_id: ProjectId, node_id: str) -> None:
        self.changes.append(lambda: self._database.key_users.add((project_id, node_id)))

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
        def change() -> None:
            row = self._database.revocations.setdefault(
                revocation_id, _Revocation(project_id, state, reason, detected_at)
            )
            for held in outstanding:
                row.outcomes.setdefault(held.holder.instance_id, (held.holder, "pending"))

        self.changes.append(change)

    async def insert_restoration(
        self, restoration_id: str, project_id: ProjectId, reason: str, detected_at: datetime, restored_after_s: float
    ) -> None:
        pass  # only receipts read them

    async def delete_restoration(self, restoration_id: str) -> None:
        pass

    async def set_outcomes(
        self, revocation_id: str, outcomes: Iterable[tuple[InstanceId, str, float, Mapping[str, float]]]
    ) -> None:
        database, wanted = self._database, list(outcomes)

        def change() -> None:
            row = database.revocations[revocation_id]
            for instance_id, outcome, _, _ in wanted:
                holder, _ = row.outcomes[instance_id]
                row.outcomes[instance_id] = holder, outcome
                if database.listener is not None:
                    database.listener.outcome(revocation_id, instance_id, outcome)

        self.changes.append(change)

    async def seal_revocation(self, revocation_id: str, sealed_after_s: float) -> None:
        database = self._database

        def change() -> None:
            database.revocations[revocation_id].sealed_after_s = sealed_after_s
            if database.listener is not None:
                database.listener.sealed(revocation_id)

        self.changes.append(change)


class SimulatedRepository(Repository):
    def __init__(self, database: Database, clock: Clock, term: Term | None = None) -> None:
        super().__init__(None, clock, term)  # type: ignore[arg-type]
        self._database = database

    def during(self, term: Term) -> SimulatedRepository:
        return SimulatedRepository(self._database, self._clock, term)

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        term, database = self._term, self._database
        assert term is not None
        term.check()

        def fence() -> None:
            if database.seat.epoch != term.epoch:
                raise NotLeaderError("another keymanager leads by now: nothing was written")

        def commit() -> None:
            fence()  # the real one makes the next epoch wait for the end of this transaction
            for change in transaction.changes:
                change()

        transaction = SimulatedTransaction(database, self._clock, current_process())
        try:
            await database.request(fence)
            yield transaction
            await database.request(commit)
        except NotLeaderError:
            term.end()
            raise

    async def _read(self, work: Callable[[], T]) -> T:
        return await self._database.request(work)

    async def _write(self, change: Callable[[], T]) -> T:
        done: list[T] = []
        async with self.transaction() as transaction:
            assert isinstance(transaction, SimulatedTransaction)
            transaction.changes.append(lambda: done.append(change()))
        return done[0]

    async def accounts(self) -> list[AccountId]:
        return await self._read(lambda: [self._database.account_id])

    async def key_configurations(self) -> list[StoredKeyConfiguration]:
        return await self._read(lambda: list(self._database.key_configurations.values()))

    async def replacements(self) -> list[StoredReplacement]:
        return []

    async def workspaces(self) -> list[Workspace]:
        return await self._read(lambda: list(self._database.workspaces))

    async def projects(self) -> list[StoredProject]:
        return await self._read(lambda: list(self._database.projects.values()))

    async def keks(self) -> list[StoredKek]:
        return await self._read(lambda: list(self._database.keks.values()))

    async def key_users(self) -> list[StoredKeyUser]:
        return await self._read(lambda: [StoredKeyUser(*user) for user in sorted(self._database.key_users)])

    async def dek_floors(self) -> dict[ProjectId, int]:
        return {}

    async def fetch(self, query: str, *arguments: object) -> list[Any]:
        return []  # nobody deletes here what was shredded

    async def tokens(self) -> list[StoredToken]:
        return []

    async def leases(self) -> list[StoredLease]:
        return await self._read(lambda: list(self._database.leases.values()))

    async def open_revocations(self) -> list[StoredRevocation]:
        def work() -> list[StoredRevocation]:
            return [
                StoredRevocation(
                    revocation_id,
                    row.project_id,
                    row.state,
                    row.reason,
                    row.detected_at,
                    [holder for holder, outcome in row.outcomes.values() if outcome == "pending"],
                )
                for revocation_id, row in self._database.revocations.items()
                if row.sealed_after_s is None
            ]

        return await self._read(work)

    async def note_probe(
        self, key_configuration_id: KeyConfigurationId, verdict: str, probed_at: datetime, allowed_at: datetime
    ) -> None:
        def change() -> None:
            known = self._database.key_configurations
            stored = known[key_configuration_id]
            known[key_configuration_id] = replace(
                stored,
                last_verdict=verdict,
                last_probe_at=probed_at,
                last_allowed_at=max(stored.last_allowed_at, allowed_at),
            )

        await self._write(change)

    async def _change_kek(
        self, project_id: ProjectId, kek_version: int, change: Callable[[StoredKek], StoredKek]
    ) -> Any:
        def work() -> StoredKek:
            keks = self._database.keks
            keks[project_id, kek_version] = change(keks[project_id, kek_version])
            return keks[project_id, kek_version]

        return await self._write(work)

    async def note_unwrap(self, project_id: ProjectId, kek_version: int, at: datetime, canary: bytes | None) -> None:
        await self._change_kek(
            project_id, kek_version, lambda kek: replace(kek, last_unwrap_at=at, canary=kek.canary or canary)
        )

    async def reserve_wraps(self, project_id: ProjectId, kek_version: int, block: int) -> int:
        kek = await self._change_kek(
            project_id, kek_version, lambda kek: replace(kek, wraps_reserved=kek.wraps_reserved + block)
        )
        return int(kek.wraps_reserved)
