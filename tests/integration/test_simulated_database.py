"""The simulation's database and the real one, through the same steps, with the same answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from random import Random
from typing import Any

import pytest

from keymanager.leadership import Seat, Term
from keymanager.lease_table import Held, Holder
from keymanager.records import StoredKek, StoredKeyConfiguration, StoredLease, StoredProject
from keymanager.replica import SeatAccess
from keymanager.repository import Repository
from keymanager.seat import SeatTable
from keymanager.state import KeyAccess, KmsAccess
from shared.api.keymanager import AwsKey, KeyState, Role, Workspace
from shared.audit_chain import AuditEntry, ChainVerifier
from shared.clock import Clock, SystemClock
from shared.errors import KeylakeError
from shared.ids import AccountId, InstanceId, KekId, KeyConfigurationId, ProjectId, WorkspaceId
from tests.simulation.database import Database, SimulatedRepository, SimulatedSeat
from tests.simulation.loop import Process, SimulatedLoop
from tests.simulation.network import Network

pytestmark = pytest.mark.integration

AT = datetime(2026, 1, 1, tzinfo=UTC)
ACCOUNT, WORKSPACE = AccountId("acc-0000000000000001"), WorkspaceId("ws-0000000000000001")
KEY, PROJECT = KeyConfigurationId("kc-0000000000000001"), ProjectId("prj-0000000000000001")
FIRST, SECOND = InstanceId("in-0000000000000001"), InstanceId("in-0000000000000002")
NODE_A, NODE_B = InstanceId("in-00000000000000aa"), InstanceId("in-00000000000000bb")
CONFIGURATION = StoredKeyConfiguration(
    KEY,
    ACCOUNT,
    "main",
    AwsKey(
        key_arn="arn:aws:kms:eu-central-1:111122223333:key/x",
        role_arn="arn:aws:iam::111122223333:role/keylake",
        external_id="contract",
    ),
    3.0,
    1.0,
    b"canary",
    b"d" * 32,
    KmsAccess.ALLOWED,
    "ALLOWED",
    AT,
    AT,
    AT,
)
STORED_WORKSPACE = Workspace(
    workspace_id=WORKSPACE, account_id=ACCOUNT, name="main", key_configuration_id=KEY, created_at=AT
)
STORED_PROJECT = StoredProject(PROJECT, WORKSPACE, "shop", False, False, KeyState.ACTIVE, "", AT, KEY)
KEK = StoredKek(PROJECT, KekId("kek-0000000000000001"), 1, b"wrapped", "1", 0, AT)

Transcript = list[Any]


async def said(transcript: Transcript, what: str, step: Callable[[], Awaitable[Any]]) -> None:
    try:
        transcript.append((what, await step()))
    except KeylakeError as error:
        transcript.append((what, type(error).__name__))


async def go_through(repository: Repository, seat: SeatAccess, clock: Clock) -> Transcript:
    """`repository` has a project, in epoch 1, whose seat NODE_A holds."""
    told: Transcript = []
    term = Term(1, clock.monotonic_s(), 60.0, clock)
    mine = repository.during(term)

    async def registered(node: str, instance: InstanceId, role: Role = Role.PAGESERVER, kid: str = "k") -> int:
        async with mine.transaction() as transaction:
            return await transaction.register_instance(node, instance, role, kid)

    await said(told, "first", lambda: registered("a", FIRST))
    await said(told, "again", lambda: registered("a", FIRST))
    await said(told, "another name", lambda: registered("b", FIRST))
    await said(told, "another key", lambda: registered("a", SECOND, kid="other"))
    await said(told, "a newer one", lambda: registered("a", SECOND))
    await said(told, "the older one", lambda: registered("a", FIRST))

    holders = [Holder(FIRST, "a", Role.PAGESERVER, 2), Holder(SECOND, "a", Role.PAGESERVER, 3)]
    async with mine.transaction() as transaction:
        older = StoredLease(PROJECT, holders[0], 4.0)
        await transaction.insert_leases([older, *(StoredLease(PROJECT, holder, 5.0) for holder in holders)])
    told.append(("leases", sorted((lease.holder.instance_id, lease.ttl_s) for lease in await mine.leases())))
    async with mine.transaction() as transaction:
        await transaction.set_kms_access(KEY, KmsAccess.DENIED)
        await transaction.set_project(PROJECT, KeyState.REVOKED, "denied", KeyAccess())
        held = [Held(PROJECT, holder, 9.0) for holder in holders]
        for _ in range(2):  # a commit whose answer was lost is repeated
            await transaction.insert_revocation("rev-1", PROJECT, KeyState.REVOKED, "denied", AT, 0.1, held)
        await transaction.audit([AuditEntry("test", "x", "ok", PROJECT)])

    def pending(found: list[Any]) -> Any:
        return [(each.revocation_id, each.state, sorted(h.instance_id for h in each.pending)) for each in found]

    told.append(("open", pending(await mine.open_revocations())))
    async with mine.transaction() as transaction:
        await transaction.set_outcomes("rev-1", [(FIRST, "fenced", 1.0, {})])
        await transaction.delete_leases([(PROJECT, FIRST)])
        await transaction.audit([AuditEntry("test", "y", "ok", PROJECT)])
    told.append(("one left", pending(await mine.open_revocations())))
    told.append(("its lease", [lease.holder.instance_id for lease in await mine.leases()]))
    async with mine.transaction() as transaction:
        await transaction.set_outcomes("rev-1", [(SECOND, "acknowledged", 0.5, {"cache": 0.1})])
        await transaction.seal_revocation("rev-1", 1.2)
    told.append(("sealed", pending(await mine.open_revocations())))
    await said(told, "reserved", lambda: mine.reserve_wraps(PROJECT, 1, 10))
    await said(told, "reserved again", lambda: mine.reserve_wraps(PROJECT, 1, 10))
    await mine.note_probe(KEY, "DENIED", AT, AT.replace(year=2025))
    [stored] = await mine.key_configurations()
    told.append(("probed", stored.last_verdict, stored.last_allowed_at, stored.kms_access))
    [project] = await mine.projects()
    told.append(("project", project.state, project.state_reason, project.held))

    try:
        async with mine.transaction() as transaction:
            await transaction.set_project(PROJECT, KeyState.SHREDDED, "half", KeyAccess())
            raise RuntimeError("in the middle")
    except RuntimeError:
        pass
    [project] = await mine.projects()
    told.append(("nothing of a transaction that failed", project.state))

    seen = await seat.look(1.0)
    told.append(("seat", seen.epoch, seen.holder))
    await said(told, "renewed", lambda: seat.renew(1, NODE_A, 1.0))
    await said(told, "renewed by another one", lambda: seat.renew(1, NODE_B, 1.0))
    await said(told, "taken as it was before", lambda: seat.take(seen, NODE_B, "b", "", 1.0))
    seen = await seat.look(1.0)
    await said(told, "taken as it is", lambda: seat.take(seen, NODE_B, "b", "", 1.0))
    await said(told, "renewed by the former one", lambda: seat.renew(1, NODE_A, 1.0))
    await said(told, "a write of the former term", lambda: mine.reserve_wraps(PROJECT, 1, 10))
    told.append(("its term", term.valid))
    await seat.give_back(1, NODE_A, 1.0)
    told.append(("not theirs to give", (await seat.look(1.0)).holder))
    await seat.give_back(2, NODE_B, 1.0)
    told.append(("given back", (await seat.look(1.0)).holder))
    return told


async def real(dsn: str) -> Transcript:
    clock, seat = SystemClock(), SeatTable(dsn)
    try:
        async with Repository.open(dsn, 4, clock, idle_transaction_timeout_s=5) as repository:
            empty = await seat.look(5.0)
            assert (empty.epoch, empty.holder) == (0, None)
            assert await seat.take(empty, NODE_A, "a", "", 5.0)
            async with repository.during(Term(1, clock.monotonic_s(), 60.0, clock)).transaction() as transaction:
                await transaction.insert_account(ACCOUNT, "account")
                await transaction.insert_key_configuration(CONFIGURATION)
                await transaction.insert_workspace(STORED_WORKSPACE)
                await transaction.insert_project(STORED_PROJECT, KEK)
            return await go_through(repository, seat, clock)
    finally:
        await seat.aclose()


def simulated() -> Transcript:
    loop = SimulatedLoop()
    rng = Random(1)
    database = Database(loop, Network(loop, rng), rng)
    database.seat = Seat(1, 0, NODE_A, "a")
    database.key_configurations[KEY] = CONFIGURATION
    database.workspaces.append(STORED_WORKSPACE)
    database.projects[PROJECT], database.keks[PROJECT, 1] = STORED_PROJECT, KEK
    process = Process("test", loop)
    told = loop.run_until_complete(
        process.spawn(go_through(SimulatedRepository(database, process), SimulatedSeat(database), process))
    )
    verifier = ChainVerifier()
    assert all(verifier.feed(link) for link in database.chain)
    assert len(database.chain) == 2
    loop.close()
    return told


async def test_both_tell_the_same(metadata_dsn: str) -> None:
    import asyncio

    expected = await real(metadata_dsn)
    assert await asyncio.to_thread(simulated) == expected
    told = {line[0]: line[1] for line in expected}
    assert (told["first"], told["again"], told["a newer one"]) == (1, 2, 3)
    assert told["the older one"] == "ReplacedError"
    assert told["a write of the former term"] == "NotLeaderError"
