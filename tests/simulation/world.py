"""A whole run: keymanagers, instances and KMSes on one seed, what happens to them, and how it must end.

What runs is the real code: `Replica`, `KeyManager` with its watcher, revoker, keyring and lease table, `Session`;
`KeyClient` with its sessions and leases. Simulated are time, the network, the metadata database and the KMSes. An
instance does what every service does: opens sealed bytes with a DEK, takes its time, checks the lease, and serves.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import jwt
import structlog

from keymanager.bound import BoundSettings
from keymanager.cmk import canary_digest
from keymanager.config import KeymanagerSettings
from keymanager.front import Serving
from keymanager.leadership import Term
from keymanager.manager import KeyManager
from keymanager.records import StoredKek, StoredKeyConfiguration, StoredProject
from keymanager.replica import Replica
from keymanager.repository import Repository
from keymanager.session import KEY_USERS, serve_session
from keymanager.state import KmsAccess
from keymanager.transaction import Transaction
from shared.api.keymanager import AwsKey, KeyState, ObjectName, Role, Workspace
from shared.audit_chain import AuditEntry, ChainVerifier
from shared.auth import Principal, Scope, Service, TokenVerifier, TrustBundle
from shared.config import Address, Identity
from shared.crypto.aead import AeadKey, counter_nonce
from shared.crypto.envelope import Envelope
from shared.crypto.secret import SecretKey
from shared.errors import KeylakeError, NotLeaderError
from shared.ids import InstanceId, KekId, KeyConfigurationId, ProjectId, TimelineId, WorkspaceId
from shared.keyclient import KeyClient
from shared.keysession import Connection
from shared.lease import KeyLoss
from tests.simulation import database as db
from tests.simulation.kms import DEADLINE_S, Mood, SimulatedCmk, SimulatedProvider
from tests.simulation.loop import Process, SimulatedLoop, StuckError, current_process
from tests.simulation.network import ClientSide, Network, ServerSide, SimulatedConnection
from tests.simulation.witness import Bound, BrokenPromiseError, Witness

MAX_DRIFT: Final = 0.009
"""Of one clock against real time: two of them then differ by less than CLOCK_DRIFT."""
FAN_OUT_S: Final = 2.0
"""Allowed for the simulated network's slowest messages, where nothing fails."""
_COMES_BACK_S: Final = 40.0
_INTERVALS_S: Final = (0.5, 1.0)
_GRACES_S: Final = (0.0, 0.0, 3.0, 8.0)
_TTLS_S: Final = (1.0, 2.0, 5.0)
_BOUNDS: Final = {
    (interval_s, grace_s, ttl_s): Bound.of(
        BoundSettings(interval_s, grace_s, DEADLINE_S, ttl_s, leader_ttl_s=0.0, session_s=None, fan_out_s=FAN_OUT_S)
    )
    for interval_s, grace_s, ttl_s in product(_INTERVALS_S, set(_GRACES_S), _TTLS_S)
}
"""What the product promises for its settings; computed here, before a mutant changes what it computes it from."""
_BEGINNING: Final = datetime(2026, 1, 1, tzinfo=UTC)
_END_S: Final = _BEGINNING.timestamp() + 86_400
_TOKEN: Final = jwt.encode({"exp": _END_S}, "a key of 32 bytes that nobody checks", algorithm="HS256")
_PRINCIPAL: Final = Principal("simulated", "simulated", frozenset({Scope.KEYS_SESSION, Scope.KEYS_USE}), None, _END_S)
_PAGE: Final = b"a page of the customer's"
_TRUST: Final = TrustBundle(keys={})
_IDENTITY: Final = Identity(
    certificate=Path("/-"),
    private_key=Path("/-"),
    ca_certificate=Path("/-"),
    signing_key=Path("/-"),
    trust_bundle=Path("/-"),
)


@dataclass(frozen=True, slots=True)
class Result:
    seed: int
    history: list[str]
    violation: BrokenPromiseError | None
    served: int
    sealed: int
    simulated_s: float


def run(seed: int) -> Result:
    """The run of one seed, which is always the same. Never raises BrokenPromiseError: it is in the result."""
    rng = random.Random(seed)
    with _seeded(rng):
        return World(seed, rng).run()


def run_briefly(seed: int) -> Result:
    """As `run`, without the history of a run that was good."""
    result = run(seed)
    return result if result.violation is not None else replace(result, history=[])


@contextmanager
def _seeded(rng: random.Random) -> Iterator[None]:
    """Ids and jitter from the seed; no logs. Keys stay random: nothing depends on them. Garbage waits for the end."""

    def token_hex(size_bytes: int = 8) -> str:
        return rng.randbytes(size_bytes).hex()

    collecting = gc.isenabled()
    gc.disable()
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL), cache_logger_on_first_use=False
    )
    try:
        with (
            patch("secrets.token_hex", token_hex),
            patch("random.SystemRandom", lambda: random.Random(rng.getrandbits(64))),
        ):
            yield
    finally:
        structlog.configure(**before)
        if collecting:
            gc.enable()


# --- a keymanager ---


class KeymanagerHost:
    """A place where a keymanager runs, again and again."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.name = f"keymanager-{number}"
        self.port = number
        self.process = world.process(self.name)
        self.replica: Replica | None = None
        self.manager: KeyManager | None = None
        self.term: Term | None = None

    def start(self) -> None:
        self.process = self.world.process(self.name)
        self.replica = self.manager = self.term = None
        self.process.spawn(self._run())

    async def _run(self) -> None:
        process = current_process()
        settings = self.world.settings(self.name, self.port)
        replica = Replica(
            settings,
            lambda key, observer: SimulatedProvider(self.world.cmk_of(key), observer),
            _TRUST,
            None,
            process,
            lambda *_: _Surroundings(self, process),
        )
        self.replica = replica
        await replica.run(f"place of {self.name}")

    async def accept(self, connection: SimulatedConnection, accepted: Callable[[Exception | None], None]) -> None:
        """A client has connected to this process."""
        serving = None if self.replica is None else self.replica.front.serving
        manager, term = self.manager, self.term
        if serving is None or manager is None or term is None or not term.valid:
            connection.to_client(lambda: accepted(NotLeaderError("this keymanager does not lead")))
            return
        connection.to_client(lambda: accepted(None))
        process, witness = self.process, self.world.witness
        socket = ServerSide(connection, lambda text: witness.leaves(process, term, text))
        deps = manager.session_deps(TokenVerifier(_TRUST, Service.KEYMANAGER))
        await serve_session(socket, _PRINCIPAL, deps, manager.sessions)  # type: ignore[arg-type]


class _Surroundings:
    """`keymanager.replica.Surroundings`."""

    def __init__(self, host: KeymanagerHost, process: Process) -> None:
        self._host, self._process = host, process
        self.seat = db.SimulatedSeat(host.world.database)

    def opened(self) -> AbstractAsyncContextManager[Repository]:
        return nullcontext(db.SimulatedRepository(self._host.world.database, self._process))

    def serving(self, term: Term, manager: KeyManager) -> Serving:
        self._host.manager, self._host.term = manager, term
        self._host.world.witness.note(f"{self._host.name} leads in epoch {term.epoch}")
        return Serving(term, _no_http)


async def _ended(tasks: list[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


async def _no_http(*_: Any) -> None:
    raise AssertionError("there is no HTTP here")


# --- an instance ---


class Instance:
    """One process of a service. Its disk (the sealed page of each project) outlives it."""

    def __init__(
        self, world: World, node_id: str, role: Role, disk: dict[ProjectId, tuple[ObjectName, Envelope, bytes]]
    ):
        self.world, self.node_id, self.role, self.disk = world, node_id, role, disk
        self.instance_id = InstanceId.new()
        self.name = f"{node_id}.{world.next_number()}"
        world.witness.names[self.instance_id] = self.name
        self.process = world.process(self.name)
        self._rng = random.Random(world.rng.getrandbits(64))
        self._given: dict[ProjectId, list[AeadKey]] = {}
        self.client: KeyClient | None = None
        self.process.spawn(self._run())

    @property
    def in_use(self) -> bool:
        """It lives, and was not replaced by another one: then it would end itself."""
        return self.process.alive and not (self.client is not None and self.client.replaced)

    async def _run(self) -> None:
        client = KeyClient(
            [Address(port=host.port) for host in self.world.keymanagers],
            Path("/-"),
            lambda: _TOKEN,
            role=self.role,
            node_id=self.node_id,
            instance_id=self.instance_id,
            clock=self.process,
            request_timeout_s=3.0,
            rng=self._rng,
            dial=self._dial,
        )
        async with client:
            self.client = client
            async with asyncio.TaskGroup() as tasks:
                for project_id in self.world.projects:
                    tasks.create_task(self._use(client, project_id))

    async def _dial(self, address: Address, token: str, timeout_s: float) -> Connection:
        return await self.world.connect(self.process, self.world.keymanagers[address.port], timeout_s)

    async def _use(self, client: KeyClient, project_id: ProjectId) -> None:
        rng = self._rng
        while not client.replaced:
            await asyncio.sleep(rng.expovariate(1 / self.world.pause_s))
            try:
                lease = await client.acquire(project_id, self._on_loss)
                if self.role in KEY_USERS:
                    await self._open_page(client, project_id)
                if rng.random() < 0.2:
                    await asyncio.sleep(rng.expovariate(1 / 0.3))  # redo, a slow disk
                lease.check()
            except KeylakeError:
                continue
            self.world.witness.serves(self.node_id, self.instance_id, project_id, lease.generation)

    async def _open_page(self, client: KeyClient, project_id: ProjectId) -> None:
        if project_id not in self.disk:
            name = ObjectName(timeline_id=self.world.timeline_id, object_name=f"page of {self.node_id}", kind="layer/1")
            [(key, envelope)] = await client.generate(project_id, [name])
            self._given.setdefault(project_id, []).append(key)
            self.disk[project_id] = name, envelope, key.seal(counter_nonce(0), _PAGE, b"")
        name, envelope, sealed = self.disk[project_id]
        [key] = await client.unwrap(project_id, [(name, envelope)])
        given = self._given.setdefault(project_id, [])
        if not any(each is key for each in given):
            given.append(key)
        if key.open(counter_nonce(0), sealed, b"") != _PAGE:
            self.world.witness.break_off(f"{self.name} reads something else than was written")

    async def _on_loss(self, loss: KeyLoss) -> dict[str, float]:
        """Must find the DEKs wiped already; dropping the rest takes a while."""
        given = self._given.pop(loss.project_id, [])
        if not all(key.wiped for key in given):
            self.world.witness.break_off(f"{self.name} is told of a loss while it still has DEKs")
        took_s = self._rng.expovariate(1 / 0.05)
        await asyncio.sleep(took_s)
        return {"dropped": took_s}


# --- everything ---


@dataclass
class World:
    seed: int
    rng: random.Random
    keymanagers: list[KeymanagerHost] = field(default_factory=list)
    instances: list[Instance] = field(default_factory=list)
    projects: list[ProjectId] = field(default_factory=list)
    cmks: dict[KeyConfigurationId, SimulatedCmk] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = self.rng
        self.loop = SimulatedLoop()
        self.network = Network(self.loop, rng)
        self.database = db.Database(self.loop, self.network, rng)
        self.undisturbed = rng.random() < 0.15
        self.steady = rng.random() < 0.12
        """A customer changes their mind once; then the bounds are reached."""
        self.lease_ttl_s = rng.choice(_TTLS_S)
        self.leader_ttl_s = rng.choice((0.6, 1.5, 1.5, 1.5, 2.5))
        self.pause_s = rng.choice((0.3, 0.8, 0.8))
        self._dice = random.Random(f"rare {self.seed}")
        """For what happens in few runs: all else is the same with and without it."""
        self.timeline_id = TimelineId.new()
        self.mended = False
        self._numbers = 0
        self._processes: list[Process] = []
        self._connections: list[SimulatedConnection] = []
        self.witness = Witness(
            self.loop,
            self.database,
            self.cmks,
            {},
            {},
            self.lease_ttl_s,
            self.undisturbed,
            terms=self._terms,
            live=self._live,
        )
        self.database.listener = self.witness

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def process(self, name: str) -> Process:
        rng = self.rng
        process = Process(name, self.loop, 1 + rng.uniform(-MAX_DRIFT, MAX_DRIFT), rng.uniform(0, 1e5))
        self._processes.append(process)
        return process

    def cmk_of(self, key: object) -> SimulatedCmk:
        assert isinstance(key, AwsKey)
        return next(cmk for cmk in self.cmks.values() if key.key_arn.endswith(cmk.name))

    def _terms(self) -> Iterator[tuple[Process, Term]]:
        for host in self.keymanagers:
            if host.term is not None and host.process.alive:
                yield host.process, host.term

    def _live(self, project_id: ProjectId) -> Iterator[InstanceId]:
        """Who believes in a lease at this moment."""
        for instance in self.instances:
            if instance.process.alive and instance.client is not None:
                for lease in instance.client.leases():
                    if lease.project_id == project_id and lease.live:
                        yield instance.instance_id

    def settings(self, node_id: str, port: int) -> KeymanagerSettings:
        return KeymanagerSettings(
            listen=Address(port=port),
            identity=_IDENTITY,
            node_id=node_id,
            metadata_dsn="simulated",
            lease_ttl_s=self.lease_ttl_s,
            leader_ttl_s=self.leader_ttl_s,
            restore_hold_s=1.0,
            restore_hold_max_s=8.0,
        )

    # --- beginnings ---

    def _populate(self) -> None:
        rng = self.rng
        now = _BEGINNING
        for letter, projects in (("a", 2), ("b", 1)):
            key_configuration_id, workspace_id = KeyConfigurationId.new(), WorkspaceId.new()
            cmk = SimulatedCmk(f"kms-{letter}", self.loop, self.network, rng)
            self.cmks[key_configuration_id] = cmk
            grace_s, interval_s = rng.choice(_GRACES_S), rng.choice(_INTERVALS_S)
            canary = SecretKey.generate()
            key = AwsKey(
                key_arn=f"arn:aws:kms:eu-central-1:111122223333:key/{cmk.name}",
                role_arn="arn:aws:iam::111122223333:role/keylake",
                external_id="simulated",
            )
            self.database.key_configurations[key_configuration_id] = StoredKeyConfiguration(
                key_configuration_id,
                self.database.account_id,
                letter,
                key,
                grace_s,
                interval_s,
                cmk.wrapped(bytes(canary.reveal())),
                canary_digest(canary),
                KmsAccess.ALLOWED,
                "ALLOWED",
                now,
                now,
                now,
                canary_cmk_key_version="1",
            )
            self.witness.bounds[key_configuration_id] = _BOUNDS[interval_s, grace_s, self.lease_ttl_s]
            self.database.workspaces.append(
                Workspace(
                    workspace_id=workspace_id,
                    account_id=self.database.account_id,
                    name=letter,
                    key_configuration_id=key_configuration_id,
                    created_at=now,
                )
            )
            for number in range(projects):
                project_id = ProjectId.new()
                self.projects.append(project_id)
                self.witness.names[project_id] = f"project {letter}{number}"
                self.witness.key_of[project_id] = key_configuration_id
                kek = SecretKey.generate()
                self.database.projects[project_id] = StoredProject(
                    project_id,
                    workspace_id,
                    f"{letter}{number}",
                    False,
                    False,
                    KeyState.ACTIVE,
                    "",
                    now,
                    key_configuration_id,
                )
                self.database.keks[project_id, 1] = StoredKek(
                    project_id, KekId.new(), 1, cmk.wrapped(bytes(kek.reveal())), "1", 0, now
                )
        for number in range(rng.choice((1, 2, 2, 2, 3))):
            self.keymanagers.append(KeymanagerHost(self, number))
        for host in self.keymanagers:
            host.start()
        roles = [Role.PAGESERVER, Role.SAFEKEEPER, Role.COMPUTE, Role.SAFEKEEPER]
        for number, role in enumerate(roles[: rng.choice((2, 2, 2, 3, 4))]):
            self.instances.append(Instance(self, f"{role.value}-{number}", role, {}))

    # --- the network, as instances see it ---

    async def connect(self, client: Process, host: KeymanagerHost, timeout_s: float) -> Connection:
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        connection: SimulatedConnection | None = None

        def answer(error: Exception | None) -> None:
            if accepted.done():
                return
            if error is None:
                accepted.set_result(None)
            else:
                accepted.set_exception(error)

        def arrive() -> None:
            nonlocal connection
            server = host.process
            if not server.alive:
                self.network.send(host.name, client.name, lambda: answer(ConnectionRefusedError()))
                return
            connection = SimulatedConnection(self.network, client, server)
            self._connections.append(connection)
            server.spawn(host.accept(connection, answer))

        self.network.send(client.name, host.name, arrive)
        async with asyncio.timeout(timeout_s):
            await accepted
        assert connection is not None
        return ClientSide(connection)

    def kill(self, process: Process) -> None:
        process.kill()
        for connection in self._connections:
            if process in (connection.client_process, connection.server_process):
                connection.died(process)

    # --- what happens ---

    def run(self) -> Result:
        self._populate()
        loop, rng = self.loop, self.rng
        asyncio.set_event_loop(loop)
        for rare, share in ((self._shred, 0.25), (self._take_over_in_an_outage, 0.15)):
            if not self.undisturbed and self._dice.random() < share:
                loop.world(self._dice.uniform(0.5, 4.0), rare)
        try:
            self._until(rng.uniform(0.5, 2.0))
            end_s = loop.time() + rng.uniform(1.0, rng.choice((2.0, 4.0, 8.0)))
            mean_s = rng.choice((3.0, 6.0)) if self.undisturbed else rng.choice((0.2, 0.5, 1.2))
            if self.steady:
                end_s += 10.0
            while loop.time() < end_s and self.witness.violation is None:
                self._until(loop.time() + rng.expovariate(1 / mean_s))
                self._something_happens()
            self._all_is_well()
            healed_s = loop.time()
            while self.witness.violation is None and (missing := self._missing(healed_s)):
                if loop.time() > healed_s + _COMES_BACK_S:
                    self.witness.break_off(f"{_COMES_BACK_S:g} s after everything was mended: {missing}")
                    break
                self._until(loop.time() + 0.5)
            self._chain_is_whole()
        finally:
            simulated_s = loop.time()
            self._dispose()
        witness = self.witness
        return Result(
            self.seed, witness.history, witness.violation, witness.served, witness.sealed_revocations, simulated_s
        )

    def _until(self, at_s: float) -> None:
        if self.witness.violation is not None:
            return
        timer = self.loop.world(max(0.0, at_s - self.loop.time()), self.loop.stop)
        try:
            self.loop.run_forever()
        except StuckError:
            self.witness.break_off("nothing will ever happen again")
        timer.cancel()

    def _something_happens(self) -> None:
        rng = self.rng
        if self.undisturbed:
            self._key_changes((Mood.ALLOWS, Mood.DENIES))
            return
        happen: list[tuple[int, Callable[[], None]]] = [
            (0 if self.steady else 10, lambda: self._key_changes(tuple(Mood))),
            (5, self._denied_behind_a_cut),
            (6, self._cut),
            (6, self.network.mend),
            (5, self._pause),
            (3, self._kill_keymanager),
            (3, self._kill_instance),
            (2, self._copy_instance),
            (2, self._break_connection),
            (2, self._database_fails),
            (3, self._slow),
        ]
        [what] = rng.choices([each for _, each in happen], [weight for weight, _ in happen])
        what()

    def _key_changes(self, moods: tuple[Mood, ...]) -> None:
        if self.mended:
            return
        cmk = self.rng.choice(list(self.cmks.values()))
        mood = self.rng.choice((*moods, Mood.DENIES, Mood.ALLOWS))
        self.witness.note(f"{cmk.name} {mood.value}")
        cmk.become(mood)

    def _denied_behind_a_cut(self) -> None:
        """The case that leases are for: instances do not hear of it."""
        rng = self.rng
        for instance in rng.sample(self.instances, rng.randint(1, len(self.instances))):
            for host in self.keymanagers:
                self.network.cut(instance.name, host.name)
        self.witness.note("instances are cut off")
        self.loop.world(rng.uniform(0.0, 0.5), self._key_changes, (Mood.DENIES,) * 10)

    def _cut(self) -> None:
        rng = self.rng
        host = rng.choice(self.keymanagers).name
        others = [*(each.name for each in self.instances), db.NAME, *(cmk.name for cmk in self.cmks.values())]
        for other in rng.sample(others, rng.choice((1, 1, 2, len(others)))):
            self.witness.note(f"no packets between {host} and {other}")
            self.network.cut(host, other)

    def _pause(self) -> None:
        rng, loop = self.rng, self.loop
        hosts = [host.process for host in self.keymanagers]
        able = [p for p in [*hosts, *(i.process for i in self.instances)] if p.alive and not p.paused]
        if not able:
            return
        process, for_s = rng.choice(able), rng.expovariate(1 / 2.0)
        self.witness.note(f"{process.name} is stopped for {for_s:.3f} s")
        process.pause()
        if process in hosts:
            self.witness.keymanagers_stopped.append((loop.time(), loop.time() + for_s))
        loop.world(for_s, self._go_on, process)

    def _go_on(self, process: Process) -> None:
        if process.paused and process.alive:
            self.witness.note(f"{process.name} goes on")
            process.go_on()

    def _kill_keymanager(self) -> None:
        host = self.rng.choice(self.keymanagers)
        if not host.process.alive:
            return
        self.witness.note(f"{host.name} is killed")
        self.kill(host.process)
        self.loop.world(self.rng.expovariate(1 / 1.0), self._start_keymanager, host)

    def _shred(self) -> None:
        """Two people have agreed. What the shredder does around it is not here."""
        host = self._leader()
        if host is None or host.manager is None:
            return
        project_id = self._dice.choice(self.projects)
        self.witness.note(f"{host.name} is to shred {self.witness.name(project_id)}")
        if self._dice.random() < 0.7:  # … and cannot store it, and may die of that
            self.network.cut(host.name, db.NAME)
        host.process.spawn(self._ask_to_shred(host.manager, project_id))

    async def _ask_to_shred(self, manager: KeyManager, project_id: ProjectId) -> None:
        await asyncio.wait({manager._tasks.create_task(self._shred_it(manager, project_id))})

    async def _shred_it(self, manager: KeyManager, project_id: ProjectId) -> None:
        async def destroy(transaction: Transaction) -> list[AuditEntry]:
            assert isinstance(transaction, db.SimulatedTransaction)
            await transaction.destroy_keks(project_id)
            return []

        with suppress(KeylakeError):
            await manager.revoker.shred(manager.projects.get(project_id), "two people's word", "simulated", destroy)

    def _take_over_in_an_outage(self) -> None:
        """A grace may be running, and who heard the last yes is gone."""
        if self._leader() is None:
            return
        for cmk in self.cmks.values():
            self.witness.note(f"{cmk.name} {Mood.BROKEN.value}")
            cmk.become(Mood.BROKEN)
        self.loop.world(self._dice.uniform(0.0, 1.0), self._kill_leader)

    def _kill_leader(self) -> None:
        host = self._leader()
        if host is None:
            return
        self.witness.note(f"{host.name}, which leads, is killed")
        self.kill(host.process)
        self.loop.world(0.1, self._start_keymanager, host)

    def _leader(self) -> KeymanagerHost | None:
        """To whom something may happen: None when there is none, or everything is mended or over."""
        if self.mended or self.witness.over:
            return None
        leading = (h for h in self.keymanagers if h.term is not None and h.term.valid and h.process.alive)
        return next(leading, None)

    def _start_keymanager(self, host: KeymanagerHost) -> None:
        if not host.process.alive:
            self.witness.note(f"{host.name} is started")
            host.start()

    def _kill_instance(self) -> None:
        able = [instance for instance in self.instances if instance.process.alive]
        if not able:
            return
        instance = self.rng.choice(able)
        self.witness.note(f"{instance.name} is killed")
        self.kill(instance.process)
        self.loop.world(self.rng.expovariate(1 / 0.5), self._start_instance, instance)

    def _start_instance(self, before: Instance) -> None:
        if any(each.node_id == before.node_id and each.in_use for each in self.instances):
            return
        started = Instance(self, before.node_id, before.role, before.disk)
        self.witness.note(f"{started.name} is started")
        self.instances.append(started)

    def _copy_instance(self) -> None:
        """Somebody starts a copy of the machine, while the original lives (or is stopped, or cut off)."""
        original = self.rng.choice(self.instances)
        copy = Instance(self, original.node_id, original.role, dict(original.disk))
        self.witness.note(f"{copy.name} is started from a copy of {original.name}")
        self.instances.append(copy)

    def _break_connection(self) -> None:
        for connection in self._connections[-4:]:
            connection.broken()

    def _database_fails(self) -> None:
        self.database.failing = self.rng.choice((0.0, 0.1, 0.5, 1.0))
        self.witness.note(f"the database loses {self.database.failing:.0%} of all answers")

    def _slow(self) -> None:
        self.network.slow = self.rng.choice((1.0, 10.0, 50.0))
        self.witness.note(f"the network is {self.network.slow:g} times as slow")

    # --- the end ---

    def _all_is_well(self) -> None:
        if self.witness.violation is not None:
            return
        self.witness.note("everything is mended")
        self.mended = True
        self.network.slow, self.database.failing = 1.0, 0.0
        self.network.mend()
        for cmk in self.cmks.values():
            cmk.become(Mood.ALLOWS)
        for host in self.keymanagers:
            if host.process.paused:
                self._go_on(host.process)
            self._start_keymanager(host)
        for instance in self.instances:
            if instance.process.paused:
                self._go_on(instance.process)

    def _missing(self, since_s: float) -> str:
        """What is not as it should be in the end; empty: nothing."""
        unsealed = [each for each, row in self.database.revocations.items() if row.sealed_after_s is None]
        if unsealed:
            return f"{len(unsealed)} revocations are not sealed"
        for project_id, stored in self.database.projects.items():
            if stored.state is not KeyState.ACTIVE and not stored.shredded:
                return f"{self.witness.name(project_id)} is {stored.state.value}"
        for node_id, instance in {each.node_id: each for each in self.instances}.items():
            self._start_instance(instance)  # its supervisor does, when nothing of it is left
            for project_id in self.projects:
                if self.database.projects[project_id].shredded:
                    continue
                if self.witness.served_last.get((node_id, project_id), 0.0) <= since_s:
                    return f"{node_id} does not serve {self.witness.name(project_id)}"
        return ""

    def _chain_is_whole(self) -> None:
        verifier = ChainVerifier()
        if not all(verifier.feed(link) for link in self.database.chain):
            self.witness.break_off(f"the audit chain: {verifier.problem}")

    def _dispose(self) -> None:
        """End every task in an orderly way, so that nothing of this run is left for the garbage collector."""
        loop = self.loop
        self.witness.over = True
        for process in self._processes:
            process.bury()
        self.network.mend()
        with suppress(StuckError):
            while tasks := [task for each in self._processes for task in each.tasks if not task.done()]:
                for task in tasks:
                    task.cancel()
                loop.run_until_complete(_ended(tasks))
        loop.close()
        asyncio.set_event_loop(None)
