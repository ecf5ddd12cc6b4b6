"""What is true at the moment of a stop, while the database, or a KMS, lets everybody wait.

A real `KeyManager` and a real `Session`, on the simulation's clock, database and KMS: a database that does not answer
for half a minute costs no time here.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from keymanager.cmk import Cmks, canary_digest
from keymanager.config import KeymanagerSettings
from keymanager.kek_canary import new_kek
from keymanager.kms.base import GeneratedKek, Hold, KmsCallObserver, WrappedKek
from keymanager.kms_ledger import KmsLedger
from keymanager.leadership import Seat, Term
from keymanager.lease_table import Holder
from keymanager.manager import KeyManager
from keymanager.projects import ProjectEntry
from keymanager.records import StoredKek, StoredKeyConfiguration, StoredLease, StoredProject, StoredReplacement
from keymanager.session import Session
from keymanager.state import KeyAccess, KeyEvent, KmsAccess
from keymanager.transaction import Transaction
from shared.api.keymanager import AwsKey, Generate, KeyState, ObjectName, Role, Unwrap, Workspace, WrappedObject
from shared.audit_chain import AuditEntry
from shared.auth import Principal, Scope, Service, TokenVerifier, TrustBundle
from shared.cmk import CmkKey
from shared.config import Address, Identity
from shared.crypto.context import EncryptionContext
from shared.crypto.secret import SecretKey
from shared.crypto.transport import KeyTransport
from shared.errors import IntegrityError, NotLeaderError, RevokedError, ShreddedError, UnavailableError
from shared.ids import InstanceId, KekId, KeyConfigurationId, ProjectId, TimelineId, WorkspaceId
from tests.simulation import database as db
from tests.simulation.kms import Mood, SimulatedCmk, SimulatedProvider
from tests.simulation.loop import Process, SimulatedLoop
from tests.simulation.network import Network

NODE = InstanceId.new()
WORKSPACE, PROJECT, KEK = WorkspaceId.new(), ProjectId.new(), KekId.new()
KEY, OTHER_KEY = KeyConfigurationId.new(), KeyConfigurationId.new()
HOLDER = Holder(InstanceId.new(), "pageserver-1", Role.PAGESERVER, 1)
AT = datetime(2026, 1, 1, tzinfo=UTC)
OBJECT = ObjectName(timeline_id=TimelineId.new(), object_name="a layer", kind="layer/1")
AWS = AwsKey(
    key_arn="arn:aws:kms:eu-central-1:111122223333:key/x",
    role_arn="arn:aws:iam::111122223333:role/keylake",
    external_id="here",
)
PRINCIPAL = Principal(
    "test",
    "test",
    frozenset({Scope.KEYS_SESSION, Scope.KEYS_USE}),
    None,
    AT.timestamp() + timedelta(days=1).total_seconds(),
)
NOWHERE = Path("/-")
SETTINGS = KeymanagerSettings(
    listen=Address(port=1),
    identity=Identity(
        certificate=NOWHERE, private_key=NOWHERE, ca_certificate=NOWHERE, signing_key=NOWHERE, trust_bundle=NOWHERE
    ),
    node_id="keymanager-1",
    metadata_dsn=cast("Any", "simulated"),
    lease_ttl_s=5.0,
)


class Provider(SimulatedProvider):
    """Remembers which plaintext it gave away. It has no call to wrap a KEK anew, as most clouds' KMS have none."""

    def __init__(self, cmk: SimulatedCmk, observer: KmsCallObserver, given: asyncio.Queue[SecretKey]) -> None:
        super().__init__(cmk, observer)
        self._given = given

    async def unwrap(self, wrapped: bytes, context: EncryptionContext) -> SecretKey:
        secret = await super().unwrap(wrapped, context)
        self._given.put_nowait(secret)
        return secret

    async def generate_kek(self, context: EncryptionContext) -> GeneratedKek:
        made = await super().generate_kek(context)
        self._given.put_nowait(made.plaintext)
        return made

    async def rewrap(self, wrapped: bytes, context: EncryptionContext, hold: Hold | None = None) -> WrappedKek:
        assert hold is not None
        return await self.wrap(hold(await self.unwrap(wrapped, context)), context)


class Place:
    """A keymanager that leads, with one project that HOLDER has a lease on."""

    def __init__(self, loop: SimulatedLoop, process: Process, tasks: asyncio.TaskGroup) -> None:
        rng = random.Random(1)
        self.network = Network(loop, rng)
        self.database = db.Database(loop, self.network, rng)
        self.database.seat = Seat(1, 0, NODE)
        self.process = process
        self.cmk = SimulatedCmk("kms", loop, self.network, rng)
        self.given: asyncio.Queue[SecretKey] = asyncio.Queue()
        self.tasks = tasks
        self.manager = self.new_manager()
        self.keyring, self.revoker = self.manager.keyring, self.manager.revoker
        self._populate()
        deps = self.manager.session_deps(TokenVerifier(TrustBundle(keys={}), Service.KEYMANAGER))
        transport = KeyTransport()
        transport.agree(KeyTransport().public, transport.public)
        self.session = Session(cast("Any", None), PRINCIPAL, HOLDER, transport, deps, self.manager.sessions)
        self.manager.sessions.add(self.session)
        tasks.create_task(self.manager._sweep_leases())

    def new_manager(self) -> KeyManager:
        """Of the term that the seat is in, before it has loaded anything."""
        process, database = self.process, self.database
        term = Term(database.seat.epoch, process.monotonic_s(), 1000.0, process)
        ledger = KmsLedger(process, 60.0)
        cmks = Cmks(self.provider, ledger)
        repository = db.SimulatedRepository(database, process, term)
        manager = KeyManager(SETTINGS, repository, cmks, ledger, process, self.tasks, database.account_id, term, None)
        self.tasks.create_task(manager.audit_log.run())
        return manager

    def provider(self, key: CmkKey, observer: KmsCallObserver) -> Provider:
        return Provider(self.cmk, observer, self.given)

    def _populate(self) -> None:
        manager, database, cmks = self.manager, self.database, self.manager._cmks
        canary = SecretKey.generate()
        wrapped, digest = self.cmk.wrapped(bytes(canary.reveal())), canary_digest(canary)
        for key in (KEY, OTHER_KEY):
            stored_key = StoredKeyConfiguration(
                key, database.account_id, str(key), AWS, 600.0, 1.0, wrapped, digest, KmsAccess.ALLOWED, "", AT, AT, AT
            )
            cmks.add(key, AWS, cmks.make(AWS))
            manager.key_configurations.put(stored_key)
            manager.watcher.add(stored_key)
            database.key_configurations[key] = stored_key
        workspace = manager.projects.workspaces[WORKSPACE] = Workspace(
            workspace_id=WORKSPACE,
            account_id=database.account_id,
            name="main",
            key_configuration_id=KEY,
            created_at=AT,
        )
        database.workspaces.append(workspace)
        self.entry = self.add_project(PROJECT, KEK)

    def add_project(self, project_id: ProjectId, kek_id: KekId) -> ProjectEntry:
        """HOLDER has a lease on it."""
        stored = StoredProject(project_id, WORKSPACE, str(project_id), False, False, KeyState.ACTIVE, "", AT, KEY)
        kek = StoredKek(project_id, kek_id, 1, self.cmk.wrapped(secrets.token_bytes(32)), "1", 0, AT)
        self.database.projects[project_id], self.database.keks[project_id, 1] = stored, kek
        entry = self.manager.projects.add(stored, [kek], KeyAccess())
        self.grant(project_id)
        return entry

    def grant(self, project_id: ProjectId = PROJECT) -> StoredLease:
        lease = StoredLease(project_id, HOLDER, SETTINGS.lease_ttl_s)
        self.manager.leases.grant(project_id, HOLDER, lease.ttl_s, self.process.monotonic_s())
        self.database.leases[project_id, HOLDER.instance_id] = lease
        return lease

    @contextmanager
    def database_away(self) -> Iterator[None]:
        self.network.cut(self.process.name, db.NAME)
        try:
            yield
        finally:
            self.network.mend()

    def said(self) -> list[tuple[str, str]]:
        """(op, state or code) of what was pushed to the holder since the last look."""
        found = []
        while not self.session._outbox.empty():
            message = json.loads(self.session._outbox.get_nowait())
            found.append((message["op"], message.get("state", message.get("code", ""))))
        return found

    async def revoke(self) -> None:
        await self.revoker.operator_event(self.entry, KeyEvent.OPERATOR_REVOKED, "an incident", "test")

    async def restore(self) -> None:
        await self.revoker.operator_event(self.entry, KeyEvent.OPERATOR_RESTORED, "it is over", "test")

    async def shred(self) -> None:
        async def destroy(transaction: Transaction) -> list[AuditEntry]:
            assert isinstance(transaction, db.SimulatedTransaction)
            await transaction.destroy_keks(PROJECT)
            return []

        await self.revoker.shred(self.entry, "two people's word", "test", destroy)

    async def sealed(self) -> None:
        while self.entry.unsealed:
            await self.entry.sealed.wait()

    def acknowledge(self) -> bool:
        [message] = self.revoker.unanswered(HOLDER.instance_id)
        return self.revoker.acknowledge(HOLDER.instance_id, PROJECT, message.revocation_id, {})

    def stored(self) -> StoredProject:
        return self.database.projects[PROJECT]


class _OverError(Exception):
    pass


Story = Callable[[Place], Awaitable[None]]


def play(story: Story) -> None:
    loop = SimulatedLoop()
    process = Process("keymanager", loop)

    async def run() -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                await story(Place(loop, process, tasks))
                raise _OverError
        except* _OverError:
            pass

    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(process.spawn(run()))
    finally:
        loop.close()
        asyncio.set_event_loop(None)


def start(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(work)


# --- who is told what, and when ---


def test_a_revocation_is_pushed_before_the_database_has_it_and_answers_count_from_then_on() -> None:
    async def story(place: Place) -> None:
        with place.database_away():
            revoking = start(place.revoke())
            await asyncio.sleep(0)
            assert place.said() == [("revoke", "REVOKED")]
            assert place.acknowledge()
            await asyncio.sleep(20)
            assert not revoking.done()
            assert place.stored().state is KeyState.ACTIVE
        await revoking
        await place.sealed()
        assert place.stored().state is KeyState.REVOKED
        [row] = place.database.revocations.values()
        assert [outcome for _, outcome in row.outcomes.values()] == ["acknowledged"]
        assert place.said() == [], "once is enough"

    play(story)


def test_shredded_is_said_when_it_is_stored_and_until_then_the_project_is_revoked() -> None:
    async def story(place: Place) -> None:
        with place.database_away():
            shredding = start(place.shred())
            await asyncio.sleep(0)
            denied = start(place.revoker.kms_event(KEY, KeyEvent.KMS_DENIED, KmsAccess.DENIED, {}))
            await asyncio.sleep(3)
            assert place.said() == []
            assert [message.state for message in place.revoker.unanswered(HOLDER.instance_id)] == [KeyState.REVOKED]
            assert place.session._grant(place.entry, 5.0, place.process.monotonic_s()).state is KeyState.REVOKED
            assert place.manager.project(PROJECT).state is KeyState.REVOKED
            with pytest.raises(RevokedError, match="being shredded"):
                place.entry.check()
        await shredding
        assert place.said() == [("revoke", "SHREDDED")]
        assert place.stored().shredded
        with pytest.raises(ShreddedError):
            place.entry.check()
        await denied
        assert place.acknowledge()
        await place.sealed()
        assert [row.state for row in place.database.revocations.values()] == [KeyState.SHREDDED], "and nothing twice"

    play(story)


def test_a_leader_that_ends_before_a_shredding_is_stored_has_told_nobody() -> None:
    async def story(place: Place) -> None:
        with place.database_away():
            shredding = start(place.shred())
            await asyncio.sleep(3)
            place.database.seat = Seat(2, 0, InstanceId.new())
        with pytest.raises(NotLeaderError):
            await shredding
        assert place.said() == []
        assert place.entry.state is KeyState.REVOKED
        assert place.stored().state is KeyState.ACTIVE
        assert place.database.keks[PROJECT, 1].wrapped is not None

    play(story)


@dataclass
class Listener:
    """`db.Listener`: no state is stored that the KEKs do not have."""

    place: Place

    def outcome(self, revocation_id: str, instance_id: InstanceId, outcome: str) -> None: ...

    def sealed(self, revocation_id: str) -> None: ...

    def access_is(self, key_configuration_id: KeyConfigurationId, access: KmsAccess, by: Process) -> None: ...

    def project_is(self, project_id: ProjectId, state: KeyState) -> None:
        destroyed = self.place.database.keks[PROJECT, 1].wrapped is None
        assert destroyed == state.final


@pytest.mark.parametrize("after_s", [0.0, 0.003, 0.006, 0.012])
def test_a_return_that_is_being_stored_stores_no_end_that_destroys_nothing(after_s: float) -> None:
    async def story(place: Place) -> None:
        await place.revoke()
        assert place.acknowledge()
        await place.sealed()
        place.database.listener = Listener(place)
        await place.restore()
        await asyncio.sleep(after_s)
        await place.shred()
        await place.sealed()
        await asyncio.sleep(1)
        assert place.stored().state is KeyState.SHREDDED
        assert place.entry.state is KeyState.SHREDDED

    play(story)


# --- whose word counts ---


def test_a_grace_does_not_outlive_the_leader_who_heard_the_last_yes() -> None:
    async def story(place: Place) -> None:
        place.cmk.become(Mood.BROKEN)
        leader = place.new_manager()  # after a restart: in memory is nothing
        await leader._load()
        entry = leader.projects.get(PROJECT)
        await asyncio.sleep(60)
        assert leader.watcher.access(KEY) is KmsAccess.ALLOWED, "by the database, and for 9 minutes more"
        with pytest.raises(UnavailableError, match="not said yes"):
            entry.check()
        assert "not said yes" in leader.project(PROJECT).state_reason
        place.cmk.become(Mood.ALLOWS)
        await asyncio.sleep(10)
        entry.check()
        assert leader.project(PROJECT).state_reason == ""
        place.cmk.become(Mood.BROKEN)
        await asyncio.sleep(60)
        entry.check()  # this one has heard it itself

    play(story)


# --- keys in somebody's hand ---


async def generate(place: Place) -> None:
    with place.keyring.working(PROJECT) as held:
        await place.keyring.generate(place.entry, [OBJECT], held)


def test_a_kek_whose_use_waits_for_the_database_is_wiped_with_the_others() -> None:
    async def story(place: Place) -> None:
        await generate(place)
        place.keyring.drop(PROJECT)
        await place.given.get()
        with place.database_away():
            asking = start(generate(place))
            kek = await place.given.get()
            await asyncio.sleep(1)
            assert not kek.wiped
            assert place.keyring.plaintext_keks == [PROJECT], "it is in memory, whoever has it"
            assert place.keyring.keys_in_memory(PROJECT) == 1
            revoking = start(place.revoke())
            await asyncio.sleep(0)
            assert kek.wiped
            assert place.keyring.plaintext_keks == []
            assert place.keyring.keys_in_memory(PROJECT) == 0
        with pytest.raises(RevokedError):
            await asking
        await revoking

    play(story)


def test_a_live_kek_that_is_the_shredded_ones_is_found_by_its_canary() -> None:
    """Under another project's name, where nothing but trying it can tell."""

    async def story(place: Place) -> None:
        plaintext = SecretKey.generate()
        twin = bytes(plaintext.reveal())
        made = GeneratedKek(plaintext, place.cmk.wrapped(twin), "1")
        kek = new_kek(place.entry.scope, KekId.new(), 2, made, AT)
        shredded = replace(place.entry, keks={2: replace(kek, wrapped=None)})
        before = await place.keyring.scan(shredded, [place.entry])
        assert (before.canaries, before.tried, before.opened, before.not_tried) == (1, 1, (), ())
        other = StoredKek(ProjectId.new(), KekId.new(), 5, b"", "1", 0, AT)
        place.keyring.add(other, SecretKey(twin))
        [opened] = (await place.keyring.scan(shredded, [place.entry])).opened
        assert f"that of version 5 of {other.project_id}" in opened
        without = replace(place.entry, keks={2: replace(kek, canary=None)})
        assert (await place.keyring.scan(without, [])).missing == (2,)
        await place.revoke()
        stopped = await place.keyring.scan(shredded, [place.entry])
        assert stopped.not_live == (f"version 1 of {PROJECT}, which is REVOKED",)

    play(story)


def test_a_kek_that_is_not_the_one_that_was_made_does_not_enter_memory() -> None:
    """The KMS opens what it is given: a row that was changed together with its context would be used."""

    async def story(place: Place) -> None:
        with place.keyring.working(PROJECT) as held:
            await place.keyring.generate(place.entry, [OBJECT], held)
        canary = place.entry.keks[1].canary
        assert canary == place.database.keks[PROJECT, 1].canary is not None
        place.keyring.drop(PROJECT)
        other = place.cmk.wrapped(secrets.token_bytes(32))
        place.entry.keks[1] = replace(place.entry.keks[1], wrapped=other)
        with place.keyring.working(PROJECT) as held, pytest.raises(IntegrityError, match="another key"):
            await place.keyring.generate(place.entry, [OBJECT], held)
        assert place.keyring.keys_in_memory(PROJECT) == 0

    play(story)


def test_a_kek_that_arrives_after_the_stop_is_wiped_as_it_arrives() -> None:
    async def story(place: Place) -> None:
        await generate(place)
        place.keyring.drop(PROJECT)
        await place.given.get()
        asking = start(generate(place))
        await asyncio.sleep(0)
        with place.database_away():
            revoking = start(place.revoke())
            assert (await place.given.get()).wiped
            assert place.keyring.keys_in_memory(PROJECT) == 0
        with pytest.raises(RevokedError):
            await asking
        await revoking

    play(story)


@pytest.mark.parametrize("asked", ["generate", "unwrap"])
def test_deks_whose_record_waits_for_the_database_are_wiped_and_never_leave(asked: str) -> None:
    async def story(place: Place) -> None:
        request: Generate | Unwrap = Generate(request_id=1, project_id=PROJECT, objects=[OBJECT])
        if asked == "unwrap":
            with place.keyring.working(PROJECT) as held:
                [(_, envelope)] = await place.keyring.generate(place.entry, [OBJECT], held)
            item = WrappedObject(object=OBJECT, envelope=envelope.serialize())
            request = Unwrap(request_id=1, project_id=PROJECT, items=[item])
        else:
            await generate(place)
        with place.database_away():
            serving = start(place.session._serve_keys(place.entry, request))
            await asyncio.sleep(1)
            assert place.keyring.keys_in_memory(PROJECT) == 2, "the KEK, and a DEK"
            assert place.keyring.plaintext_keks == [PROJECT]
            revoking = start(place.revoke())
            await asyncio.sleep(0)
            assert place.keyring.keys_in_memory(PROJECT) == 0
        with pytest.raises(RevokedError):
            await serving
        await revoking
        assert place.said() == [("revoke", "REVOKED")]

    play(story)


async def move(place: Place) -> None:
    await place.manager.mover.move(PROJECT, OTHER_KEY, "test")


async def stage(place: Place) -> None:
    replacement = StoredReplacement(KEY, AWS, b"-", b"-", "test", AT)
    provider = place.provider(AWS, lambda _: None)
    await place.manager.replacer._stage(replacement, provider, place.entry, place.entry.keks[1])


async def rewrap(place: Place) -> None:
    await place.manager.rotator._rewrap_kek(place.entry, place.entry.keks[1], "test")


@pytest.mark.parametrize("work", [move, stage, rewrap])
def test_a_kek_that_is_on_its_way_to_another_cmk_or_version_is_wiped(
    work: Callable[[Place], Coroutine[Any, Any, None]],
) -> None:
    async def story(place: Place) -> None:
        working = start(work(place))
        kek = await place.given.get()
        assert place.keyring.plaintext_keks == [PROJECT]
        revoking = start(place.revoke())
        await asyncio.sleep(0)
        assert kek.wiped
        assert place.keyring.plaintext_keks == []
        with pytest.raises(RevokedError, match="an incident"):
            await working
        await revoking

    play(story)


def test_a_kek_that_waits_to_be_stored_is_wiped_with_the_others() -> None:
    async def story(place: Place) -> None:
        await place.manager.rotator.rotate_kek(PROJECT, "test")
        assert not (await place.given.get()).wiped, "stored, and in use"
        assert place.keyring.drop(PROJECT) == 1
        with place.database_away():
            rotating = start(place.manager.rotator.rotate_kek(PROJECT, "test"))
            kek = await place.given.get()
            await asyncio.sleep(1)
            assert not kek.wiped
            assert place.keyring.plaintext_keks == [PROJECT]
            revoking = start(place.revoke())
            await asyncio.sleep(0)
            assert kek.wiped
            assert place.keyring.plaintext_keks == []
        await asyncio.wait({rotating, revoking})
        assert (rotating.exception(), revoking.exception()) == (None, None)
        assert place.database.keks[PROJECT, 3] == place.entry.keks[3], (
            "what was stored is the current one, stopped or not"
        )
        assert place.keyring.plaintext_keks == []

    play(story)


def test_a_kek_that_is_stored_when_the_keymanager_has_stopped_does_not_enter_memory() -> None:
    async def story(place: Place) -> None:
        with place.database_away():
            rotating = start(place.manager.rotator.rotate_kek(PROJECT, "test"))
            kek = await place.given.get()
            await asyncio.sleep(1)
            place.keyring.close()
            assert kek.wiped
        await rotating
        assert place.keyring.plaintext_keks == []

    play(story)


def test_a_working_set_ends_with_its_work_and_with_the_keymanager() -> None:
    async def story(place: Place) -> None:
        with place.keyring.working(PROJECT) as held:
            kept = held.release(held.add(SecretKey.generate()))
            key = held.add(SecretKey.generate())
            assert place.keyring.keys_in_memory(PROJECT) == 1
        assert (key.wiped, kept.wiped) == (True, False)
        assert place.keyring.keys_in_memory(PROJECT) == 0
        with place.keyring.working(PROJECT) as held:
            key = held.add(SecretKey.generate())
            place.keyring.close()
            assert key.wiped
        with place.keyring.working(PROJECT) as held:
            assert held.add(SecretKey.generate()).wiped, "this keymanager has stopped"

    play(story)


# --- leases and their rows ---


def test_the_row_of_a_lease_that_ran_out_goes_though_the_database_was_away() -> None:
    async def story(place: Place) -> None:
        with place.database_away():
            await asyncio.sleep(40)  # the lease ran out, and its end could not be recorded
            assert place.database.leases
        await asyncio.sleep(20)
        assert place.database.leases == {}
        assert list(place.manager.leases.all()) == []
        ended = [link.entry.action for link in place.database.chain]
        assert "lease.expire" in ended

    play(story)


def test_the_row_of_a_lease_that_was_given_back_goes_though_the_database_was_away() -> None:
    async def story(place: Place) -> None:
        with place.database_away():
            releasing = start(place.session._release([PROJECT]))
            await asyncio.sleep(0)
            assert place.manager.leases.outstanding(PROJECT, place.process.monotonic_s()) == []
            await releasing
        await asyncio.sleep(40)
        assert place.database.leases == {}
        assert list(place.manager.leases.all()) == []

    play(story)


def test_projects_of_one_key_are_sealed_together() -> None:
    """Twenty transactions one after the other would be what the last of them waits for."""

    async def story(place: Place) -> None:
        entries = [place.entry, *(place.add_project(ProjectId.new(), KekId.new()) for _ in range(19))]
        await place.revoker.kms_event(KEY, KeyEvent.KMS_DENIED, KmsAccess.DENIED, {})
        for message in place.revoker.unanswered(HOLDER.instance_id):
            assert place.revoker.acknowledge(HOLDER.instance_id, message.project_id, message.revocation_id, {})
        for entry in entries:
            while entry.unsealed:
                await entry.sealed.wait()
        links = place.database.chain
        assert sum(link.entry.action == "project.sealed" for link in links) == len(entries)
        assert sum(link.entry.action == "revocation.instance" for link in links) == len(entries)
        of_outcomes = {"revocation.instance", "project.sealed"}
        assert len({link.at for link in links if link.entry.action in of_outcomes}) == 1, "more than one transaction"

    play(story)


def test_a_lease_that_is_granted_anew_while_its_end_is_recorded_keeps_its_row() -> None:
    async def story(place: Place) -> None:
        with place.database_away():
            await asyncio.sleep(8)  # it ran out, and its end waits to be recorded
            granting = start(place.session._store_leases([place.entry]))
            await asyncio.sleep(0)
        await granting
        await asyncio.sleep(1)
        assert place.manager.leases.holds(PROJECT, HOLDER.instance_id, place.process.monotonic_s())
        assert (PROJECT, HOLDER.instance_id) in place.database.leases

    play(story)


def test_ends_and_beginnings_that_wait_together_are_stored_in_their_order() -> None:
    async def story(place: Place) -> None:
        key, lease = (PROJECT, HOLDER.instance_id), place.grant()
        for first, second in ((True, False), (False, True)):
            with place.database_away():
                waiting = [start(place.manager.audit_log.record())]  # what is being written meanwhile
                await asyncio.sleep(0)
                for begins in (first, second):
                    record = place.manager.audit_log.record
                    work = record(leases=[lease]) if begins else record(ended=[key])
                    waiting.append(start(work))
                    await asyncio.sleep(0)
            await asyncio.gather(*waiting)
            assert (key in place.database.leases) == second

    play(story)
