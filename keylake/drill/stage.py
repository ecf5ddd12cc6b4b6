"""What drills share: a project with a load on it, the customer's side, and the notes that become the report."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Final, TypeVar

import asyncpg

from keylake.client import Connection, KeylakeClient
from keylake.cluster import Customer
from keylake.demo.ledger import CLIENT_ERRORS, Ledger, Load, check, describe
from keylake.demo.pgbench import run_pgbench
from keylake.drill.report import DrillReport, Mark, Promise, Sealed, bucketed, kinds_of
from shared.api.keymanager import AwsKey, KeyConfiguration, KeyState, NoCause, Project, Revocation
from shared.errors import InvalidInputError, KeylakeError, UnavailableError

T = TypeVar("T")
Progress = Callable[[str], None]

_CONNECT_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.02
_READ_PAUSE_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Bound:
    """Upper bounds, in seconds from the customer's no to the last sealed instance."""

    reachable_s: float
    partitioned_s: float


@dataclass
class Reader:
    """The smallest load: one client that reads one row, again and again."""

    connect: Callable[[], Awaitable[asyncpg.Connection[Any]]]
    ledger: Ledger
    _task: asyncio.Task[None] | None = None
    _number: int = 0

    async def __aenter__(self) -> Reader:
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def wait_for_commits(self, count: int, timeout_s: float = 60.0) -> None:
        """Returns after `count` more answers. Raises TimeoutError."""
        target = len(self.ledger.acknowledged) + count
        async with asyncio.timeout(timeout_s):
            while len(self.ledger.acknowledged) < target:  # noqa: ASYNC110 - as in `Load`
                await asyncio.sleep(_POLL_S)

    async def _read(self) -> None:
        connection: asyncpg.Connection[Any] | None = None
        try:
            while True:
                try:
                    connection = connection or await self.connect()
                    await connection.fetchval("SELECT n FROM drill")
                    self._number += 1
                    self.ledger.acknowledged[f"read {self._number}"] = monotonic()
                except CLIENT_ERRORS as error:
                    self.ledger.errors.append((monotonic(), *describe(error)))
                    if connection is not None:
                        connection.terminate()
                        connection = None
                await asyncio.sleep(_READ_PAUSE_S)
        finally:
            if connection is not None:
                connection.terminate()


@dataclass
class Stage:
    """One drill, from its beginning (`time 0` of the report) to its report."""

    kind: str
    client: KeylakeClient
    customer: Customer
    project: Project
    configuration: KeyConfiguration
    connection: Connection
    progress: Progress
    clients: int = 0
    """That run TPC-B; 0: one that reads."""
    ledger: Ledger = field(default_factory=Ledger)
    promises: list[Promise] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    revocation: Revocation | None = None
    receipt: str | None = None
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    _begun: float = field(default_factory=monotonic)

    async def restore_hold_s(self) -> float:
        """What the return takes beside the KMS's yes: a drill soon after another one looks like a KMS that flaps."""
        wanted = self.configuration.key_configuration_id
        [found] = [c for c in await self.client.key_configurations() if c.key_configuration_id == wanted]
        return 0.0 if found.restore_hold is None else found.restore_hold.needed_s

    # --- notes ---

    def now_s(self) -> float:
        return monotonic() - self._begun

    def mark(self, what: str) -> float:
        """Returns when it happened."""
        at_s = self.now_s()
        self.marks.append(Mark(at_s=at_s, what=what))
        self.progress(f"{at_s:7.2f} s  {what}")
        return at_s

    def promise(self, what: str, limit: str, measured: str, *, kept: bool) -> None:
        self.promises.append(Promise(what=what, limit=limit, measured=measured, kept=kept))
        self.progress(f"{'kept' if kept else 'BROKEN':>9}  {what}: {measured} (limit: {limit})")

    def promise_within(self, what: str, measured_s: float, limit_s: float) -> None:
        self.promise(what, f"{limit_s:.2f} s", f"{measured_s:.2f} s", kept=measured_s <= limit_s)

    # --- what acts ---

    @property
    def key_arn(self) -> str:
        """Raises InvalidInputError: only keys of the simulated cloud can be turned from here."""
        key = self.configuration.key
        if not isinstance(key, AwsKey) or key.role_arn != self.customer.bootstrap.role_arn:
            raise InvalidInputError("a drill can only turn a key of the simulated cloud's AWS customer")
        return key.key_arn

    async def connect(self) -> asyncpg.Connection[Any]:
        arguments = self.connection.asyncpg_arguments()
        connection: asyncpg.Connection[Any] = await asyncpg.connect(**arguments, timeout=_CONNECT_TIMEOUT_S)
        return connection

    @contextlib.asynccontextmanager
    async def load(self) -> AsyncIterator[Load | Reader]:
        """Clients at work. When it begins, the drill's clock does."""
        self.progress("preparing the database")
        if self.clients:
            await run_pgbench(self.connection, "-i", "-s", "1", "-I", "dtGvp", "-q")
            load: Load | Reader = Load(self.connect, 1, self.clients, self.ledger)
        else:
            connection = await self.connect()
            await connection.execute("CREATE TABLE IF NOT EXISTS drill (n int)")
            await connection.execute("INSERT INTO drill SELECT 1 WHERE NOT EXISTS (SELECT 1 FROM drill)")
            await connection.close()
            load = Reader(self.connect, self.ledger)
        async with load:
            await load.wait_for_commits(1)
            self.started_at, self._begun = datetime.now(UTC), monotonic()
            self.mark("clients are at work")
            yield load

    def bound(self, cause: NoCause) -> Bound:
        """What the keymanager promises for this key configuration, with its own settings."""
        case = next(each for each in self.configuration.worst_cases if each.cause is cause)
        if case.reachable_s is None or case.partitioned_s is None:
            raise UnavailableError("the keymanager does not know its worst case")
        return Bound(case.reachable_s, case.partitioned_s)

    async def until(self, what: str, look: Callable[[], Awaitable[T | None]], timeout_s: float) -> T:
        """What `look` gives when it gives something. Raises UnavailableError, and what is no passing fault."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    with contextlib.suppress(UnavailableError):
                        if (found := await look()) is not None:
                            return found
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise UnavailableError(f"it did not happen within {timeout_s:.0f} s: {what}") from None

    async def sealed_since(self, known: set[str], state: KeyState) -> Revocation | None:
        """The first revocation that is not in `known`, when it is sealed."""
        for revocation in await self.client.revocations(self.project.project_id):
            if revocation.revocation_id not in known and revocation.state is state:
                return revocation if revocation.sealed_after_s is not None else None
        return None

    async def revocations_so_far(self) -> set[str]:
        return {each.revocation_id for each in await self.client.revocations(self.project.project_id)}

    async def active(self) -> bool | None:
        project = await self.client.project(self.project.project_id)
        return True if project.state is KeyState.ACTIVE else None

    # --- what clients were told ---

    def answered_s(self) -> list[float]:
        """When, in order."""
        return sorted(at - self._begun for at in self.ledger.acknowledged.values())

    def first_answer_after(self, at_s: float) -> float | None:
        return next((each for each in self.answered_s() if each > at_s), None)

    def errors_s(self) -> list[tuple[float, str, str]]:
        return [(at - self._begun, code, message) for at, code, message in self.ledger.errors if at >= self._begun]

    async def nothing_is_lost(self) -> None:
        """Compares what clients were told with what is there. Only with TPC-B there is something to compare."""
        if not self.clients:
            return
        connection = await self.connect()
        try:
            problems = await check(connection, self.ledger)
        finally:
            await connection.close()
        self.promise(
            "no acknowledged transaction is lost, none is there twice",
            "0",
            "; ".join(problems) or f"{len(self.ledger.acknowledged)} acknowledged, all there once",
            kept=not problems,
        )

    # --- the end ---

    async def keep_receipt(self, kind: str = "revocation") -> None:
        """The signed receipt of the revocation, or of the end of the project, if the keymanager gives one."""
        if self.revocation is None:
            return
        revocation_id = self.revocation.revocation_id if kind == "revocation" else None
        try:
            content = await self.client.receipt(self.project.project_id, revocation_id, kind=kind)
        except KeylakeError as error:
            self.promise("there is a signed receipt", "yes", str(error), kept=False)
            return
        self.receipt = content.decode("ascii")
        self.promise("there is a signed receipt", "yes", f"{len(content)} bytes", kept=True)

    def report(self) -> DrillReport:
        duration_s = self.now_s()
        errors = self.errors_s()
        instances = [] if self.revocation is None else self.revocation.instances
        return DrillReport(
            kind=self.kind,
            passed=bool(self.promises) and all(each.kept for each in self.promises),
            project_id=self.project.project_id,
            project_name=self.project.name,
            started_at=self.started_at,
            duration_s=duration_s,
            load=f"{self.clients} clients with pgbench's TPC-B" if self.clients else "one client that reads",
            promises=self.promises,
            marks=self.marks,
            instances=[
                Sealed(
                    node_id=each.node_id,
                    role=each.role.value,
                    outcome=each.outcome,
                    after_s=each.after_s,
                    steps_s=each.steps_s,
                )
                for each in instances
            ],
            answers=bucketed(self.answered_s(), (at_s for at_s, _, _ in errors), duration_s),
            errors=kinds_of(errors),
            revocation_id=None if self.revocation is None else self.revocation.revocation_id,
            receipt=self.receipt,
        )
