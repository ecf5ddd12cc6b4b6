"""Three safekeepers, managers and computes, a pageserver, a bad network, bad disks, and one who remembers.

Real code: elections and followers of the compute manager (`compute.election`, `compute.follower` and the core under
them), the safekeeper's timeline with all its cores, peer recovery and WAL sender, the pageserver's WAL receiver with
its quorum rule. Around them stand a virtual clock, network and disks (this package), computes that are a log and three
streams, and the *oracle*, which knows what was acknowledged to anybody and compares everything with it.

Everything is decided by one `random.Random(seed)`: the same seed is the same run, to the last message.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

import structlog

from compute.election import Candidacy, Elections
from compute.follower import Follower, RunInfo
from compute.proposer import Membership, Plan, Reservation, majority
from compute.replacement import Replacer
from compute.storage_clients import SafekeeperAddress, SafekeeperClient
from pageserver.quorum import NOTHING_COMMITTED
from pageserver.walreceiver import Peer, WalReceiver
from safekeeper.control_file import FILE_NAME, ControlState
from safekeeper.log_map import LogMap, Place
from safekeeper.offload import OffloadTuning
from shared.api.safekeeper import (
    CreateTimeline,
    Donor,
    Elected,
    EndOfWal,
    StreamFrom,
    TimelineStatus,
    VoteRequest,
    VoteResponse,
)
from shared.config import Address
from shared.errors import IntegrityError, KeylakeError, NotFoundError, UnavailableError
from shared.framed_tcp import FramedConnection
from shared.ids import ProjectId, TimelineId
from shared.lsn import WAL_SEGMENT_SIZE_BYTES, Lsn
from shared.wire.walstream import pack_wal
from tests.simulation_wal.network import Connection, Network
from tests.simulation_wal.safekeeper import (
    ACKNOWLEDGE,
    PROJECT,
    START,
    SYSTEM_IDENTIFIER,
    TIMELINE,
    Objects,
    SimSafekeeper,
    Surroundings,
)
from tests.simulation_wal.virtual_time import Process, VirtualLoop, current_process
from tests.simulation_wal.wal import HEADER_BYTES, MAX_RECORD_BYTES, Decoder, end_of_wal, make_record

NODES: Final = ("safekeeper-1", "safekeeper-2", "safekeeper-3")
RPC_TIMEOUT_S: Final = 2.0
VOTE_TIMEOUT_S: Final = 0.5
POLL_INTERVAL_S: Final = 0.25
SETTLING_S: Final = 30.0
"""How long the end of a run, when all is well again, may take."""


class InvariantError(AssertionError):
    """What must never happen has happened."""


class Oracle:
    """Remembers what anybody was told is committed."""

    def __init__(self, start_lsn: int) -> None:
        self.start_lsn = start_lsn
        self.log = bytearray()
        self._committers: dict[int, str] = {}

    @property
    def end_lsn(self) -> int:
        return self.start_lsn + len(self.log)

    def committed(self, who: str, log: bytes, end_lsn: int) -> None:
        """`log` begins where the timeline begins, and was told to be committed up to `end_lsn`."""
        size = end_lsn - self.start_lsn
        if size > len(log):
            raise InvariantError(f"{who} counts as committed what it does not have")
        known = min(size, len(self.log))
        if log[:known] != self.log[:known]:
            at = next(i for i in range(known) if log[i] != self.log[i])
            raise InvariantError(f"{who} commits other WAL at {self.start_lsn + at} than was committed there before")
        self.log += log[known:size]

    def commits_in(self, term: int, who: str) -> None:
        if self._committers.setdefault(term, who) != who:
            raise InvariantError(f"{who} and {self._committers[term]} both commit in term {term}")

    def begins(self, who: str, prefix: bytes) -> None:
        """Somebody takes `prefix` for the log, and will write behind it."""
        if not prefix.startswith(self.log):
            raise InvariantError(f"{who} starts at {self.start_lsn + len(prefix)}, without WAL that was committed")


@dataclass
class Compute:
    """A Postgres that lives as long as nobody kills it, whatever its manager thinks."""

    world: World
    name: str
    plan: Plan
    prefix: bytes
    process: Process
    log: bytearray = field(default_factory=bytearray)
    acknowledged: dict[str, int] = field(default_factory=dict)
    started: bool = False
    """Clients write; before that there is the checkpoint of its start only."""
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False
    """Its log ends with half a record, and that is all it will ever write."""

    @property
    def start_lsn(self) -> int:
        return self.plan.start_lsn.value

    @property
    def end_lsn(self) -> int:
        return self.start_lsn + len(self.log)

    def write(self) -> None:
        if self.ended:
            return
        world, rng = self.world, self.world.rng
        world.serial += 1
        size = rng.randint(HEADER_BYTES, MAX_RECORD_BYTES)
        self.log += make_record(self.plan.term, world.serial, size)
        self.grown.set()

    def write_half(self) -> None:
        if not self.ended:
            self.world.serial += 1
            self.log += make_record(self.plan.term, self.world.serial, MAX_RECORD_BYTES)[:-1]
            self.ended = True
            self.grown.set()

    async def run(self) -> None:
        rng = self.world.rng
        self.write()
        while True:
            await asyncio.sleep(rng.expovariate(4.0))
            if self.started:
                for _ in range(rng.choice((1, 1, 2, 6))):
                    self.write()

    async def serve(self, connection: Connection) -> None:
        """One walsender."""
        node = connection._peer
        first = await connection.receive_one()
        if first is None:
            return
        assert first[0] == START
        sent = int.from_bytes(first[1], "big")
        if not self.start_lsn <= sent <= self.end_lsn:
            raise UnavailableError("requested WAL is not here")
        listening = current_process().spawn(self._listen(node, connection))
        try:
            while not listening.done():
                if sent < self.end_lsn:
                    # All there is, or some of it: frames end anywhere.
                    rng, left = self.world.rng, self.end_lsn - sent
                    size = left if rng.random() < 0.5 else rng.randint(1, left)
                    await connection.send(pack_wal(sent, bytes(self.log[sent - self.start_lsn :][:size])))
                    sent += size
                else:
                    self.grown.clear()
                    waiting = asyncio.ensure_future(self.grown.wait())
                    await asyncio.wait((waiting, listening), return_when=asyncio.FIRST_COMPLETED)
                    waiting.cancel()
        finally:
            listening.cancel()

    async def _listen(self, node: str, connection: Connection) -> None:
        with suppress(KeylakeError):
            while frames := await connection.receive():
                for kind, payload in frames:
                    assert kind == ACKNOWLEDGE
                    self._acknowledge(node, int.from_bytes(payload, "big"))

    def _acknowledge(self, node: str, lsn: int) -> None:
        self.acknowledged[node] = max(lsn, self.acknowledged.get(node, 0))
        positions = sorted(self.acknowledged.values(), reverse=True)
        if len(positions) < majority(len(NODES)):
            return
        held = positions[majority(len(NODES)) - 1]
        # Clients hear of whole records.
        _, committed = end_of_wal(self.start_lsn, bytes(self.log[: held - self.start_lsn]))
        if committed > self.start_lsn:
            self.world.oracle.commits_in(self.plan.term, self.name)
            self.world.oracle.committed(self.name, self.prefix + self.log, committed)


class SimClient:
    """What `SafekeeperClient` is to a manager."""

    def __init__(self, world: World, caller: str, node: SimSafekeeper) -> None:
        self._world = world
        self._caller = caller
        self._node = node
        self.node_id: Final = node.node_id
        self.address: Final = world.addresses[node.node_id]

    async def _call(self, work: Callable[[], Any], timeout_s: float = RPC_TIMEOUT_S) -> Any:
        return await self._world.network.call(self._caller, self.node_id, work, timeout_s)

    async def status(self, project_id: ProjectId, timeline_id: TimelineId) -> TimelineStatus | None:
        try:
            return cast("TimelineStatus", await self._call(self._node.status))
        except NotFoundError:
            return None

    async def create_timeline(
        self, project_id: ProjectId, timeline_id: TimelineId, body: CreateTimeline
    ) -> TimelineStatus:
        return cast("TimelineStatus", await self._call(lambda: self._node.create(body)))

    async def vote(self, project_id: ProjectId, timeline_id: TimelineId, body: VoteRequest) -> VoteResponse:
        answer = cast("VoteResponse", await self._call(lambda: self._node.vote(body)))
        if answer.granted:
            self._world.note(self._caller, f"has the vote of {self.node_id} for term {body.term}")
        return answer

    async def end_of_wal(self, project_id: ProjectId, timeline_id: TimelineId) -> EndOfWal:
        async def work() -> tuple[EndOfWal, bytes]:
            end = await self._node.end_of_wal()
            timeline = self._node.timeline
            assert timeline is not None
            return end, timeline.content

        end, content = await self._call(work)
        # What the basebackup will hold.
        self._world.prefixes[self._caller] = content[: end.end_lsn.value - self._world.start_lsn]
        return cast("EndOfWal", end)

    async def elect(self, project_id: ProjectId, timeline_id: TimelineId, body: Elected) -> TimelineStatus:
        return cast("TimelineStatus", await self._call(lambda: self._node.elected(body)))

    async def stream(self, project_id: ProjectId, timeline_id: TimelineId, body: StreamFrom) -> None:
        await self._call(lambda: self._node.stream(body))


class Manager:
    """As compute/run.py: an election, followers, a compute. Several may want to lead at the same time."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.process = Process(name)
        self.compute: Compute | None = None
        self.running = asyncio.Event()
        self.over = asyncio.Event()

    def start(self) -> None:
        self.world.note(self.name, "wants to lead")
        self.process.spawn(self._run())

    async def _run(self) -> None:
        try:
            await self._lead()
        except KeylakeError as error:
            if isinstance(error, IntegrityError):
                # Votes that contradict each other: the proposer is right to stop, and something is wrong.
                raise InvariantError(f"{self.name}: {error}") from None
            self.world.note(self.name, f"gives up: {error}")
        finally:
            self.over.set()

    async def _lead(self) -> None:
        world = self.world
        clients = [SimClient(world, self.name, node) for node in world.nodes.values()]
        elections = Elections(cast("Sequence[SafekeeperClient]", clients), VOTE_TIMEOUT_S)
        candidacy = Candidacy(PROJECT, TIMELINE, Lsn(world.start_lsn), self.name)
        plan = await elections.run(candidacy, self._reserve)
        prefix = world.prefixes[self.name]
        world.note(self.name, f"won term {plan.term}: donor {plan.donor}, from {plan.start_lsn.value}")
        # The log begins where the timeline begins, and the plan may name that as its start.
        prefix = prefix[: plan.start_lsn.value - world.start_lsn]
        if world.may_begin(plan.term):
            world.oracle.begins(self.name, prefix)
        info = RunInfo(
            project_id=PROJECT,
            timeline_id=TIMELINE,
            candidate=self.name,
            create=CreateTimeline(system_identifier=SYSTEM_IDENTIFIER, start_lsn=Lsn(world.start_lsn)),
            told=frozenset(world.told),
            plan=plan,
            donors={plan.donor: Donor(node_id=plan.donor, address=world.addresses[plan.donor].wal)},
        )
        deposed = asyncio.Event()

        def on_deposed(term: int) -> None:
            deposed.set()

        followers = [
            Follower(
                cast("SafekeeperClient", client),
                info,
                poll_interval_s=POLL_INTERVAL_S,
                before_create=self._before_create,
                on_deposed=on_deposed,
            )
            for client in clients
        ]
        for follower in followers:
            self.process.spawn(follower.run())
        await self._majority([follower.reached for follower in followers])
        compute = self.compute = world.start_compute(plan, prefix)
        info.stream = StreamFrom.model_validate(
            {
                "term": plan.term,
                "start_lsn": plan.start_lsn,
                "compute": {"host": f"/{compute.name}", "port": 1},
                "user": "safekeeper",
                "password": "unused",
            }
        )
        for follower in followers:
            follower.nudge()
        await self._majority([follower.streaming for follower in followers])
        compute.started = True
        world.note(self.name, "serves")
        self.running.set()
        await deposed.wait()
        world.note(self.name, "is deposed")
        if self.world.rng.random() < 0.5:  # and its compute may go on for a while without it
            compute.process.kill()
        self.process.kill()

    async def _majority(self, events: list[asyncio.Event]) -> None:
        waiting = {asyncio.create_task(event.wait()) for event in events}
        left = majority(len(events))
        while left > 0:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            left -= len(done)
        for task in waiting:
            task.cancel()

    async def _reserve(self, at_least: int) -> Reservation:
        return await self.world.members.reserve_same(at_least)

    async def _before_create(self, node_id: str) -> None:
        self.world.told.add(node_id)

    def kill(self) -> None:
        self.process.kill()


class Members:
    """What the metadata database is to `compute.replacement`, and to those who reserve terms. May be restored from a
    backup of before the last replacement."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._term = 0
        self.shown = Membership()
        """What the database says."""
        self.true = Membership()
        """What it would say, had it not been restored."""
        self._last_seat = 0
        self._backups: dict[int, tuple[int, Membership]] = {}
        """Of just before a term was reserved, to replace a disk in it."""
        self._backup = self._term, self.shown

    def restore(self) -> None:
        self._world.note("members", "are those of a backup")
        self._term, self.shown = self._backup

    def repair(self) -> None:
        self.shown = self.true

    async def reserve(self, at_least: int) -> Reservation:
        return await self._reserve(at_least, 1)

    async def reserve_same(self, at_least: int) -> Reservation:
        if not self._world.shares_terms:
            return Reservation(at_least)  # nobody keeps terms apart but the votes; and there are no replacements
        return await self._reserve(at_least, 0)

    async def _reserve(self, at_least: int, generations: int) -> Reservation:
        await self._way()
        before = self._term, self.shown
        self._term = max(self._term + 1, at_least)
        self._backups[self._term] = before
        self.shown = replace(self.shown, generation=self.shown.generation + generations)
        self.true = replace(self.true, generation=max(self.true.generation, self.shown.generation))
        reserved = Reservation(self._term, self.shown)
        await self._way()
        return reserved

    async def new_seat(self) -> int:
        await self._way()
        self._last_seat += 1
        return self._last_seat

    async def change_seat(self, node_id: str, seat: int, term: int) -> bool:
        await self._way()
        changed = self._may_change(term)
        if changed:
            self.true = self.shown = replace(self.shown, seats={**self.shown.seats, node_id: seat})
            self._backup = self._backups[term]
            self._world.note(node_id, f"is disk {seat} from now on")
        await self._way()
        return changed

    def _may_change(self, term: int) -> bool:
        return term == self._term

    async def _way(self) -> None:
        await asyncio.sleep(self._world.rng.uniform(0.0005, 0.01))


class Replacing:
    """An operator replaces a safekeeper's lost disk, by the manager's own code. May die half way, and be repeated."""

    def __init__(self, world: World, node_id: str) -> None:
        self.world = world
        self.node_id = node_id
        self.name = f"replacer-{len(world.replacings) + 1}"
        self.process = Process(self.name)

    def start(self) -> None:
        self.world.note(self.name, f"replaces {self.node_id}")
        self.process.spawn(self._run())

    async def _run(self) -> None:
        world = self.world
        clients = [SimClient(world, self.name, node) for node in world.nodes.values()]
        safekeepers = cast("Sequence[SafekeeperClient]", clients)

        async def told(node_id: str) -> None:
            world.told.add(node_id)

        replacer = Replacer(
            Elections(safekeepers, VOTE_TIMEOUT_S),
            safekeepers,
            world.members,
            Candidacy(PROJECT, TIMELINE, Lsn(world.start_lsn), self.name),
            CreateTimeline(system_identifier=SYSTEM_IDENTIFIER, start_lsn=Lsn(world.start_lsn)),
            told,
        )
        try:
            replaced = await replacer.replace(self.node_id, world.members.shown)
        except KeylakeError as error:
            if isinstance(error, IntegrityError) and "simulated" not in str(error):  # a disk's own trouble
                raise InvariantError(f"{self.name}: {error}") from None
            world.note(self.name, f"gives up: {error}")
            return
        world.note(self.name, "is done" if replaced else "has nothing to do")
        if replaced:
            world.replaced(world.nodes[self.node_id])


class SimPageserver:
    """The real receiver; what it ingests is compared with what was committed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.process: Process | None = None
        self.receiver: _Receiver | None = None
        self.remote_consistent_lsn = world.start_lsn
        self.ingested_lsn = world.start_lsn

    def start(self) -> None:
        self.process = Process("pageserver")
        self.process.run(self._start)

    def _start(self) -> None:
        assert self.process is not None
        self.ingested_lsn = self.remote_consistent_lsn
        self.receiver = _Receiver(self)
        self.process.spawn(self.receiver.run())
        self.process.spawn(self._upload())

    def crash(self) -> None:
        if self.process is not None:
            self.world.note("pageserver", "crashes")
            self.process.kill()
            self.process = self.receiver = None

    async def ingest(self, records: Sequence[Any]) -> None:
        oracle = self.world.oracle
        for lsn, record in records:
            if lsn != self.ingested_lsn:
                raise InvariantError(f"ingested a record at {lsn}, after {self.ingested_lsn}")
            if lsn > oracle.end_lsn:
                raise InvariantError("the pageserver is ahead of what anybody knows")
            before = bytes(oracle.log[: lsn - oracle.start_lsn])
            oracle.committed("the pageserver", before + record, lsn + len(record))
            self.ingested_lsn = lsn + len(record)

    async def _upload(self) -> None:
        while True:
            await asyncio.sleep(self.world.rng.uniform(0.1, 0.8))
            self.remote_consistent_lsn = self.ingested_lsn


class _Receiver(WalReceiver):
    def __init__(self, pageserver: SimPageserver) -> None:
        world = pageserver.world
        self._world = world
        super().__init__(
            PROJECT,
            TIMELINE,
            [Peer(node_id, world.addresses[node_id].wal) for node_id in NODES],
            cast("Any", None),
            cast("Any", None),
            cast("Any", Decoder(pageserver.remote_consistent_lsn)),
            pageserver.ingest,
            lambda: pageserver.remote_consistent_lsn,
        )
        self.reconnect_delay_s = world.reconnect_delay_s
        self.known = NOTHING_COMMITTED
        """As it was looked at last."""

    async def _connect(self, peer: Peer) -> FramedConnection:
        serve = self._world.nodes[peer.node_id].serve_wal
        connection = await self._world.network.connect("pageserver", peer.node_id, serve)
        return cast("FramedConnection", connection)


class World:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.duration_s = 1.0 + seed % 4 * 0.5
        self.history: list[tuple[float, str, str]] = []
        self.loop = asyncio.get_running_loop()
        # Close to the end of a segment, so that the log crosses into the next one.
        self.start_lsn = WAL_SEGMENT_SIZE_BYTES - self.rng.randint(1, 400)
        self.network = Network(self.rng, self._process)
        self.addresses = {
            node: SafekeeperAddress(node_id=node, http=Address(host=node, port=1), wal=Address(host=node, port=2))
            for node in NODES
        }
        self.objects = Objects(lambda: self.pageserver.remote_consistent_lsn)
        # Behind what is in layers a record is kept, as in earnest: else the last one of a log might lack its beginning.
        tuning = OffloadTuning(
            keep_size_bytes=self.rng.choice((0, 0, 200)),
            history_size_bytes=self.rng.choice((1, 1, 5)) * MAX_RECORD_BYTES,
        )
        around = Surroundings(self.objects, self._committed, tuning)
        self.nodes = {node: SimSafekeeper(node, self.rng, self.network, self.note, around) for node in NODES}
        for node in self.nodes.values():
            node.peers = self.nodes
            node.reach = self._reach_compute
        self.oracle = Oracle(self.start_lsn)
        self.pageserver = SimPageserver(self)
        self.computes: dict[str, Compute] = {}
        self.managers: list[Manager] = []
        self.prefixes: dict[str, bytes] = {}
        self.told: set[str] = set()
        self.settling = False
        self.members = Members(self)
        self.replacings: list[Replacing] = []
        self.serial = 0
        self.reconnect_delay_s = self.rng.choice((0.02, 0.05, WalReceiver.reconnect_delay_s))
        self.shares_terms = self.rng.random() < 0.5
        self.replaces = self.shares_terms and self.rng.random() < 0.6
        """Disks are lost, replaced, and turn up again."""
        if self.replaces:
            self.duration_s += 0.5
        self._commit_lsns: dict[tuple[str, int], int] = {}

    def _committed(self, start_lsn: int, end_lsn: int) -> bytes:
        if end_lsn > self.oracle.end_lsn:
            raise InvariantError(f"WAL up to {end_lsn} was taken for committed, and is not")
        return bytes(self.oracle.log[start_lsn - self.start_lsn : end_lsn - self.start_lsn])

    def note(self, who: str, what: str) -> None:
        self.history.append((round(self.loop.time(), 6), who, what))

    @property
    def _operators(self) -> list[Manager | Replacing]:
        return [*self.managers, *self.replacings]

    def _process(self, name: str) -> Process | None:
        if name in self.nodes:
            return self.nodes[name].process
        compute = self.computes.get(name)
        return compute.process if compute is not None and compute.process.alive else None

    async def _reach_compute(self, node: str, host: str) -> Connection:
        name = host.removeprefix("/")
        compute = self.computes.get(name)
        if compute is None:
            raise UnavailableError("there is no such compute")
        return await self.network.connect(node, name, compute.serve)

    def may_begin(self, term: int) -> bool:
        """Could a majority still follow the leader of this term? One whose answers came late may lack what was
        committed since: those who committed it promised a higher term before."""
        promised = [0 if data is None else ControlState.parse(data).acceptor.term for data in self._control_files]
        return sum(each <= term for each in promised) >= majority(len(NODES))

    @property
    def _control_files(self) -> list[bytes | None]:
        return [node.disk.files.get(FILE_NAME) for node in self.nodes.values()]

    def start_compute(self, plan: Plan, prefix: bytes) -> Compute:
        name = f"compute-{len(self.computes) + 1}"
        compute = self.computes[name] = Compute(self, name, plan, prefix, Process(name))
        compute.process.spawn(compute.run())
        return compute

    def lead(self) -> Manager:
        manager = Manager(self, f"manager-{len(self.managers) + 1}")
        self.managers.append(manager)
        manager.start()
        return manager

    # --- a run ---

    async def run(self) -> None:
        for node in self.nodes.values():
            node.start()
        request = CreateTimeline(system_identifier=SYSTEM_IDENTIFIER, start_lsn=Lsn(self.start_lsn))
        for node_id, node in self.nodes.items():
            self.told.add(node_id)
            assert node.process is not None
            await node.process.spawn(node.create(request))
        self.pageserver.start()
        self.lead()
        watching = self.loop.create_task(self._watch())
        troubling = self.loop.create_task(self._trouble())
        await asyncio.sleep(self.duration_s)
        troubling.cancel()
        await self._settle()
        watching.cancel()
        self._check_ends()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            self.check()
            cast("VirtualLoop", self.loop).raise_defects()

    async def _trouble(self) -> None:
        rng = self.rng
        troubles = (
            self._crash, self._crash_between_effects, self._crash_between_effects, self._isolate, self._part,
            self._bad_network, self._better_network, self._lead_again, self._kill_manager, self._kill_compute,
            self._fill_disk, self._break_fsync, self._crash_pageserver, self._lose_disk, self._take_store_away,
            *(self._trim_meanwhile,) * 3, *(self._leave_half,) * 4,
            *(self._grow_orphan,) * 4, *(self._rival,) * 4, *(self._replace,) * (16 if self.replaces else 0),
        )  # fmt: skip
        pace = rng.choice((1.5, 3.0, 6.0))
        while True:
            await asyncio.sleep(rng.expovariate(pace))
            rng.choice(troubles)()

    def _some_node(self) -> SimSafekeeper:
        return self.nodes[self.rng.choice(NODES)]

    def _later(self, work: Callable[[], None], at_most_s: float) -> None:
        def unless_settling() -> None:
            if not self.settling:
                work()

        self.loop.call_later(self.rng.uniform(0.01, at_most_s), unless_settling)

    def _crash(self) -> None:
        node = self._some_node()
        node.crash()
        self._later(node.start, 1.0)

    def _crash_between_effects(self) -> None:
        node = self._some_node()
        node.disk.crash_after = self.rng.randint(0, 8)
        self._later(node.start, 1.5)
        self._later(node.start, 3.0)

    def _isolate(self) -> None:
        node = self._some_node().node_id
        self.note("network", f"isolates {node}")
        for other in (*NODES, "pageserver", *(who.name for who in self._operators), *self.computes):
            self._cut(node, other)

    def _part(self) -> None:
        others = [*NODES, "pageserver", *(m.name for m in self.managers), *self.computes]
        node, other = self._some_node().node_id, self.rng.choice(others)
        self.note("network", f"parts {node} and {other}")
        self._cut(node, other)

    def _cut(self, one: str, other: str, at_least_s: float = 0.0) -> None:
        for pair in ((one, other), (other, one)):
            self.network.part(*pair)
            until_s = at_least_s + self.rng.uniform(0.01, 1.5)
            self.loop.call_later(until_s, self.network._parted.discard, pair)

    # Troubles that come in a certain order, and would hardly meet by chance.

    def _grow_orphan(self) -> None:
        """A compute reaches one node only: a tail grows there that nobody else has. Then others elect without it."""
        compute = next((c for c in reversed(list(self.computes.values())) if c.process.alive), None)
        if compute is None or not compute.started:
            return
        holder = self._some_node()
        self.note("network", f"leaves {compute.name} only {holder.node_id}")
        for node in NODES:
            if node != holder.node_id:
                self._cut(node, compute.name)
        for _ in range(self.rng.randint(1, 6)):
            compute.write()
        if self.rng.random() < 0.5:
            # It goes on, and hears nothing of the election.
            self._later(lambda: self._cut(self.lead().name, holder.node_id), 0.3)
            self._later(compute.process.kill, 1.0)
            return
        for step in (compute.process.kill, holder.crash, self._lead_again):
            self._later(step, 0.4)
        self._later(holder.start, 1.2)
        if self.rng.random() < 0.5:
            self._later(self._lead_again, 1.5)

    def _leave_half(self) -> None:
        """A compute leaves half a record everywhere. The next one reaches one node only, and the one after that knows
        nothing of it."""
        compute = next((c for c in reversed(list(self.computes.values())) if c.process.alive), None)
        if compute is None or not compute.started:
            return
        self.note(compute.name, "writes half a record")
        compute.write_half()
        holder = self._some_node()

        def lead_to_one() -> None:
            compute.process.kill()
            for node in NODES:
                if node != holder.node_id:
                    self._cut(node, f"compute-{len(self.computes) + 1}")
            self._lead_again()
            self._later(lead_without, 0.5)

        def lead_without() -> None:
            self._cut(self.lead().name, holder.node_id)

        self._later(lead_to_one, 0.3)

    def _rival(self) -> None:
        """Somebody else wants to lead, does not reach everybody, and those who vote for it crash."""
        rival = self.lead()
        unreached = self._some_node().node_id
        self.note("network", f"keeps {rival.name} from {unreached}")
        self._cut(rival.name, unreached)
        others = [node for node in NODES if node != unreached]
        self.rng.shuffle(others)
        voter = self.nodes[others[0]]
        if self.rng.random() < 0.7:  # and those who lead do not hear of it from the other voter
            for manager in self.managers[:-1]:
                self._cut(manager.name, others[1])

        def lose_voter() -> None:
            self._cut(rival.name, voter.node_id)
            voter.crash()

        # The candidate first waits for the one that it does not reach, and then asks for votes.
        soon_s = VOTE_TIMEOUT_S + self.rng.uniform(0.002, 0.03)
        self.loop.call_later(soon_s, lambda: None if self.settling else lose_voter())
        self.loop.call_later(soon_s + 0.05, lambda: None if self.settling else voter.start())

    def _bad_network(self) -> None:
        self.network.loss = self.rng.choice((0.02, 0.1, 0.3))
        self.network.doubling = self.rng.choice((0.0, 0.3))
        self.network.slowness = self.rng.choice((0.0, 0.1, 0.4))

    def _better_network(self) -> None:
        self.network.loss = self.network.doubling = self.network.slowness = 0.0

    def _lead_again(self) -> None:
        self.lead()

    def _kill_manager(self) -> None:
        self.rng.choice(self.managers).kill()

    def _kill_compute(self) -> None:
        if self.computes:
            self.rng.choice(list(self.computes.values())).process.kill()

    def _fill_disk(self) -> None:
        disk = self._some_node().disk
        disk.full = True
        self._later(lambda: setattr(disk, "full", False), 1.0)

    def _break_fsync(self) -> None:
        node = self._some_node()
        node.disk.fsync_fails = True
        self._later(node.crash, 1.0)  # somebody looks, and starts it again
        self._later(node.start, 2.0)

    def _crash_pageserver(self) -> None:
        self.pageserver.crash()
        self._later(self._start_pageserver, 0.5)

    def _start_pageserver(self) -> None:
        if self.pageserver.process is None:
            self.pageserver.start()

    def _lose_disk(self) -> None:
        """Of a minority, once in a while."""
        if self.rng.random() < 0.3 and not any(self.is_lost(node) for node in self.nodes.values()):
            node = self._some_node()
            node.lose_disk()
            self._later(node.start, 1.0)

    def _take_store_away(self) -> None:
        self.objects.away = True
        self._later(lambda: setattr(self.objects, "away", False), 0.5)

    def _trim_meanwhile(self) -> None:
        """One node is away while the others go on to new terms, which is what closes pieces, and trim them."""
        node = self._some_node()
        node.crash()
        self._lead_again()
        self._later(self._lead_again, 0.8)
        self._later(node.start, 2.0)

    def _replace(self) -> None:
        """A disk is lost that has, with one other, what was committed; the one that has not is about to vote."""
        lost = next((node for node in self.nodes.values() if self.is_lost(node)), None)
        if lost is not None:
            self._replace_disk(lost)
            return
        victim, behind = self.rng.sample(NODES, 2)
        node = self.nodes[victim]
        self._leave_behind(behind)

        def lose() -> None:
            if any(self.is_lost(each) for each in self.nodes.values()):
                return
            node.lose_disk()
            node.start()
            self._later(lambda: self._replace_disk(node), 0.3)

        self._later(lose, 0.3)

    def _leave_behind(self, behind: str) -> str | None:
        """The compute that serves reaches the others only, and commits. Returns its name."""
        compute = next((c for c in reversed(list(self.computes.values())) if c.process.alive), None)
        if compute is None or not compute.started:
            return None
        self.note("network", f"keeps {behind} from {compute.name}")
        self._cut(behind, compute.name)
        for _ in range(self.rng.randint(1, 6)):
            compute.write()
        return compute.name

    def replaced(self, node: SimSafekeeper) -> None:
        """Then the old disk turns up, as if nothing had been: the new one is what is lost now."""
        if self.rng.random() < 0.3:
            return
        behind, other = self.rng.sample([each for each in NODES if each != node.node_id], 2)

        def commit() -> None:
            compute = self._leave_behind(behind)
            self._later(lambda: turn_up(compute), 0.2)

        def turn_up(compute: str | None) -> None:
            if any(self.is_lost(each) for each in self.nodes.values()):
                return
            node.bring_old_disk()
            node.start()
            if self.rng.random() < 0.5:
                for replacing in self.replacings:
                    replacing.process.kill()
                self.members.restore()
            for who in (compute or behind, self.lead().name):
                self._cut(other, who)

        def lead_without() -> None:
            """And the one that is left behind does not hear of the new membership."""
            # First it waits for the one that it does not reach.
            soon_s = VOTE_TIMEOUT_S + self.rng.uniform(0.1, 0.2)
            self._cut(self.lead().name, behind, 2 * soon_s)
            self.loop.call_later(soon_s, lambda: None if self.settling else commit())

        self._later(commit if self.rng.random() < 0.5 else lead_without, 0.2)

    def _replace_disk(self, node: SimSafekeeper) -> None:
        if not self.is_lost(node):
            return
        replacing = Replacing(self, node.node_id)
        self.replacings.append(replacing)
        replacing.start()
        if self.rng.random() < 0.3:
            others = [each for each in NODES if each != node.node_id]
            self._cut(replacing.name, self.rng.choice(others))
        if self.rng.random() < 0.3:
            self._later(replacing.process.kill, 0.2)
        if self.rng.random() < 0.5:
            self._later(self._lead_again, 0.3)

    def is_lost(self, node: SimSafekeeper) -> bool:
        """Its disk was lost, and the one that it has is not the member."""
        if not node.disk.lost:
            return False
        data = node.disk.files.get(FILE_NAME)
        replaced = data is not None and ControlState.parse(data).acceptor.seat == self.members.true.seat(node.node_id)
        if replaced and self.members.true.seats.get(node.node_id):
            node.disk.lost = False
        return node.disk.lost

    async def _settle(self) -> None:
        """All is well again. Somebody must be able to lead, and everything must be where it belongs."""
        self.note("world", "settles")
        self.settling = True
        self.network.heal()
        self.objects.away = False
        for node in self.nodes.values():
            disk = node.disk
            disk.full = disk.fsync_fails = False
            disk.crash_after = None
            if node.timeline is not None and node.timeline._store.fault:
                node.crash()
            node.start()
        self._start_pageserver()
        for who in self._operators:
            who.process.kill()
        self.members.repair()
        deadline = self.loop.time() + SETTLING_S
        while True:
            manager = self.lead()
            waiting = [self.loop.create_task(event.wait()) for event in (manager.running, manager.over)]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=SETTLING_S / 3)
            for task in waiting:
                task.cancel()
            if manager.running.is_set():
                break
            manager.kill()
            if self.loop.time() > deadline:
                raise InvariantError("nobody can be elected, although all is well")
        before = self.oracle.end_lsn
        compute = manager.compute
        assert compute is not None
        while not self._is_settled(before, compute):
            await asyncio.sleep(0.05)
            cast("VirtualLoop", self.loop).raise_defects()
            if self.loop.time() > deadline:
                where = [node.timeline and node.timeline.wire_status() for node in self.nodes.values()]
                where_pages = self.pageserver.ingested_lsn, self.oracle.end_lsn
                raise InvariantError(f"the nodes do not come together, although all is well: {where} {where_pages}")
        compute.process.kill()
        await asyncio.sleep(0.3)

    def _is_settled(self, before_lsn: int, compute: Compute) -> bool:
        whole = [n.timeline for n in self.nodes.values() if not self.is_lost(n) and n.timeline is not None]
        return (
            self.oracle.end_lsn > max(before_lsn, compute.start_lsn)
            and self.pageserver.ingested_lsn >= before_lsn
            and all(timeline.streams_in(compute.plan.term) for timeline in whole)
        )

    # --- what must hold ---

    def check(self) -> None:
        """At any time. Raises InvariantError."""
        oracle = self.oracle
        logs = []
        for node in self.nodes.values():
            timeline = node.up
            if timeline is None:
                continue
            state, content = timeline.state, timeline.content
            self._check_node(node, timeline.state.acceptor.commit_lsn)
            size = state.acceptor.commit_lsn - self.start_lsn
            if size > len(content):
                raise InvariantError(f"{node.node_id} knows as committed what it does not have")
            known = min(size, len(oracle.log))
            if content[:known] != oracle.log[:known]:
                raise InvariantError(f"{node.node_id} knows as committed what is not")
            state.log.check(state.acceptor.history)
            self._check_offloaded(node.node_id, timeline.durable.log)
            logs.append((node.node_id, state.acceptor.history.up_to(timeline.flush_lsn), content))
        for number, (name, history, content) in enumerate(logs):
            for other, other_history, other_content in logs[number + 1 :]:
                end = history.common_point(other_history, self.start_lsn, self.start_lsn + len(other_content))
                size = min(end - self.start_lsn, len(content), len(other_content))
                if content[:size] != other_content[:size]:
                    raise InvariantError(f"the logs of {name} and {other} diverge inside of what they share")
        receiver = self.pageserver.receiver
        if receiver is not None:
            if receiver._committed < receiver.known:
                raise InvariantError("what the pageserver knows as committed goes back")
            receiver.known = receiver._committed

    def _check_offloaded(self, node_id: str, log: LogMap) -> None:
        """By what its disk says: it keeps whatever is not in layers, and what it has given away is to be had."""
        if log.trimmed_lsn > self.pageserver.remote_consistent_lsn:
            raise InvariantError(f"{node_id} has trimmed WAL that is not in layers")
        for extent in log.extents:
            if (
                extent.place is not Place.LOCAL
                and (extent.end_lsn or 0) > self.objects.removed_lsn
                and not self.objects.covers(extent)
            ):
                raise InvariantError(f"{node_id} says that a piece is in the object store, which is not there")

    def _check_node(self, node: SimSafekeeper, commit_lsn: int) -> None:
        key = node.node_id, id(node.process)
        if commit_lsn < self._commit_lsns.get(key, 0):
            raise InvariantError(f"commit_lsn of {node.node_id} goes back")
        self._commit_lsns[key] = commit_lsn

    def _check_ends(self) -> None:
        """When it has settled: nothing that was committed is gone."""
        self.check()
        for node in self.nodes.values():
            timeline = node.up
            if self.is_lost(node):
                continue
            if timeline is None:
                fault = "" if node.timeline is None else node.timeline.fault
                raise InvariantError(f"{node.node_id} does not serve, although all is well: {fault}")
            if not timeline.content.startswith(bytes(self.oracle.log)):
                holders = sum(
                    n.up is not None and n.up.content.startswith(bytes(self.oracle.log)) for n in self.nodes.values()
                )
                if holders < majority(len(NODES)):
                    raise InvariantError("WAL that was committed is not held by a majority any more")

    def digest(self) -> str:
        """Of all that happened."""
        return hashlib.sha256(repr((self.history, bytes(self.oracle.log))).encode()).hexdigest()[:16]


class FailedRun(Exception):  # noqa: N818 - it is what pytest shows
    def __init__(self, world: World, cause: BaseException) -> None:
        self.world = world
        self.cause = cause
        super().__init__(f"seed {world.seed}: {type(cause).__name__}: {cause}")


def run_seed(seed: int) -> World:
    """One whole run. Raises FailedRun, with the world's history in it."""
    before = structlog.get_config()
    collects = gc.isenabled()
    gc.disable()  # a run is short, and its garbage goes at the end
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    loop = VirtualLoop()
    made: list[World] = []

    async def main() -> None:
        made.append(World(seed))
        await made[0].run()

    try:
        loop.run_until_complete(main())
        loop.raise_defects()
    except Exception as error:
        cause = loop.defects[0] if loop.defects else error
        raise FailedRun(made[0], cause) from error
    finally:
        structlog.configure(**before)
        _end(loop, made)
        if collects:
            gc.enable()
    return made[0]


def _end(loop: VirtualLoop, made: list[World]) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.set_exception_handler(lambda *_: None)
    with suppress(BaseException):
        loop.run_until_complete(asyncio.sleep(0))
    loop.close()
