"""What a client was told is committed stays, exactly once, whoever dies."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import asyncpg
import psycopg
import pytest
import pytest_asyncio

import compute as package
from keylake.cluster import Cluster, RunningProject
from keylake.demo.ledger import Ledger
from keylake.ports import free_port
from shared.api.common import ArmFailpoints
from shared.api.compute import Endpoint, EndpointState, Timeline
from shared.api.safekeeper import TimelineStatus
from shared.auth import Scope, Service, TokenIssuer
from shared.config import Address
from shared.errors import ConflictError, KeylakeError, NotFoundError, UnavailableError
from shared.failpoints import VARIABLE
from shared.http import ServiceClient
from shared.roles import OWNER_SCOPES
from shared.wire.pgauth import SASLInitialResponse
from shared.wire.pgstartup import SSLRequest, StartupMessage
from shared.wire.scram import MECHANISM, ScramClient
from tests.cluster.bank import Bank, audit, open_bank
from tests.cluster.primary import Session, caught_up, connect, safekeeper_timelines
from tests.cluster.processes import ComputeProcesses, compute_of, find_compute, postmasters
from tests.fixtures.forked_cluster import ForkedCluster, ForkedService
from tests.fixtures.waiting import all_threads_stopped, wait_until
from tests.integration.test_pageserver_failpoints import EVERY_STEP, MORE_SENDS, SENDS

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

ROUNDS = 50
SAFEKEEPERS = ("safekeeper-1", "safekeeper-2", "safekeeper-3")
COMMITS_PER_ROUND = 20
MANAGER = "compute"


@dataclass(slots=True)
class Place:
    """A cluster with a bank. Every test leaves all services running and adds to one ledger."""

    cluster: Cluster
    project: RunningProject
    ledger: Ledger = field(default_factory=Ledger)
    banks: int = 0

    async def connect(self) -> Session:
        return await connect(self.project)

    def bank(self, clients: int = 4, by: Callable[[], Awaitable[Session]] | None = None) -> Bank:
        self.banks += 1
        return Bank(by or self.connect, self.ledger, f"b{self.banks}", clients)

    async def check(self, session: Session | None = None) -> None:
        connection = session or await self.connect()
        problems = await audit(connection, self.ledger)
        await connection.close()
        assert not problems, problems

    async def safekeeper(self, name: str) -> TimelineStatus:
        return (await safekeeper_timelines(self.cluster, self.project))[SAFEKEEPERS.index(name)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Place]:
    # Leases that outlast the start of a keymanager on a busy machine: who loses a lease rightly loses its compute.
    settings: dict[str, dict[str, float]] = {"compute": {"poll_interval_s": 0.2}, "keymanager": {"lease_ttl_s": 15}}
    async with ForkedCluster(settings=settings) as cluster:
        place = Place(cluster, await cluster.create_project("bank"))
        await open_bank(place.connect)
        yield place


# --- one after the other ---


def victims() -> list[str]:
    """Whom each round kills: safekeepers mostly, then computes and the pageserver, the others now and then."""
    turns = [*SAFEKEEPERS, "pageserver", "agent"] * (ROUNDS // 5)
    turns[9], turns[29] = "keymanager", "keymanager"
    turns[14], turns[34] = "postmaster", "postmaster"
    turns[19], turns[39] = "proxy", "proxy"
    turns[24] = MANAGER
    return turns


async def test_fifty_crashes(place: Place) -> None:
    """One at a time, under load. Commits must go on, and nothing be lost or doubled."""
    async with place.bank() as bank:
        await bank.commits(COMMITS_PER_ROUND)
        for number, victim in enumerate(victims()):
            try:
                await crash(place, bank, victim)
            except TimeoutError as error:
                error.add_note(f"round {number}, {victim}")
                raise
    await place.check()
    await converge(place)


async def crash(place: Place, bank: Bank, victim: str) -> None:
    """SIGKILL; commits go on; the victim is back and has caught up when this returns."""
    cluster = place.cluster
    if victim in ("agent", "postmaster"):
        # Whoever connects next starts another.
        compute = await compute_of(cluster, place.project.endpoint.endpoint_id)
        os.kill(compute.agent.pid if victim == "agent" else compute.postmaster.pid, signal.SIGKILL)
        await compute.gone()
        await bank.commits(COMMITS_PER_ROUND)
        return
    compute = await compute_of(cluster, place.project.endpoint.endpoint_id)
    generation = await lease_generation(cluster, compute) if victim == "keymanager" else 0
    await cluster.service(victim).kill()
    if victim == MANAGER:
        await compute.gone()  # nobody would ever stop it
    if victim not in (MANAGER, "proxy"):
        try:
            await bank.commits(COMMITS_PER_ROUND)
        finally:
            check_alive(place, compute, victim)
    flushed = max(t.flush_lsn for t in (await safekeeper_timelines(cluster, place.project)).values())
    await cluster.service(victim).start()
    if victim in SAFEKEEPERS:

        async def caught_up() -> bool:
            status = await place.safekeeper(victim)
            return status.streaming and status.flush_lsn >= flushed

        await wait_until(caught_up)
    if victim == "keymanager":
        # Or the next crash may be of this one again, and again, until the compute's lease has run out, and rightly.
        async def renewed() -> bool:
            check_alive(place, compute, victim)
            return await lease_generation(cluster, compute) > generation

        await wait_until(renewed)
    await bank.commits(COMMITS_PER_ROUND)


async def lease_generation(cluster: Cluster, compute: ComputeProcesses) -> int:
    """Which key session the compute's lease was renewed by last."""
    leases = (await cluster.client.keymanager_status()).leases
    return max((each.generation for each in leases if str(each.instance_id) == compute.socket_dir.name), default=0)


def check_alive(place: Place, compute: ComputeProcesses, victim: str) -> None:
    """A crash of a service is no reason to lose the compute."""
    if not compute.postmaster.exists:
        endpoint_id = str(place.project.endpoint.endpoint_id)
        said = (place.cluster.layout.logs / "compute.log").read_text().splitlines()
        ends = [line for line in said if endpoint_id in line and ("run is over" in line or "crashed" in line)]
        pytest.fail(f"the compute is lost to a crash of {victim}. The last ends of its kind:\n" + "\n".join(ends[-5:]))


async def converge(place: Place) -> None:
    """Without load, all three safekeepers come to hold the same log."""

    async def equal() -> bool:
        timelines = (await safekeeper_timelines(place.cluster, place.project)).values()
        logs = {(t.flush_lsn, t.last_log_term, tuple(t.term_history)) for t in timelines}
        return len(timelines) == len(SAFEKEEPERS) and len(logs) == 1

    await wait_until(equal)


# --- safekeepers ---


async def test_a_safekeeper_that_was_away_catches_up_and_counts_again(place: Place) -> None:
    cluster = place.cluster
    away, other = cluster.service("safekeeper-3"), cluster.service("safekeeper-1")
    async with place.bank() as bank:
        await bank.commits(COMMITS_PER_ROUND)
        await away.kill()
        at = monotonic()
        await bank.commits(500)
        await away.start()
    assert not place.ledger.errors_since(at), "two of three are a quorum: no client may notice"
    await converge(place)
    # Now the quorum needs it.
    async with place.bank() as bank:
        await bank.commits(COMMITS_PER_ROUND)
        await other.kill()
        await bank.commits(100)
        await other.start()
        await bank.commits(COMMITS_PER_ROUND)
    await place.check()
    await converge(place)


async def test_a_new_disk_takes_the_place_of_a_lost_one(place: Place) -> None:
    """Then it counts: with one other it is the quorum. The old disk turns up, and counts for nothing."""
    cluster, victim = place.cluster, place.cluster.service("safekeeper-2")
    disk, old = cluster.layout.data / "safekeeper-2", cluster.layout.data / "safekeeper-2.old"
    async with place.bank() as bank:
        await bank.commits(COMMITS_PER_ROUND)
        await victim.kill()
        disk.rename(old)
        await victim.start()
        await bank.commits(COMMITS_PER_ROUND)

        # It does not count, and it is said why.
        async def said() -> bool:
            endpoint = await cluster.client.endpoint(place.project.endpoint.endpoint_id)
            return "safekeeper-2: it does not know the timeline any more: its disk was lost" in endpoint.reason

        await wait_until(said, 20)
        assert {each.outcome for each in await cluster.client.replace_safekeeper("safekeeper-1")} == {"kept"}
        with pytest.raises(NotFoundError):
            await cluster.client.replace_safekeeper("safekeeper-9")
        await cluster.service("safekeeper-3").kill()
        [refused] = await cluster.client.replace_safekeeper("safekeeper-2")  # it takes all of the others
        assert (refused.outcome, "quorum" in refused.problem) == ("failed", True)
        await cluster.service("safekeeper-3").start()
        # Asked again after each death, it goes on: with the same disk, also when that is the member already.
        for step in _wanted(REPLACING_STEPS):
            await manager_dies_at(place, step, lambda: cluster.client.replace_safekeeper("safekeeper-2"))
        await cluster.service(MANAGER).start()
        [replaced] = await cluster.client.replace_safekeeper("safekeeper-2")
        assert replaced.outcome == ("kept" if ALL else "replaced"), replaced.problem
        assert {each.outcome for each in await cluster.client.replace_safekeeper("safekeeper-2")} == {"kept"}
        await bank.commits(COMMITS_PER_ROUND)
        # The quorum needs it now.
        await cluster.service("safekeeper-3").kill()
        await bank.commits(COMMITS_PER_ROUND)
        await cluster.service("safekeeper-3").start()
    await place.check()
    await converge(place)
    new = await place.safekeeper("safekeeper-2")
    assert new.seat > 0
    others = [(await place.safekeeper(name)).generation for name in ("safekeeper-1", "safekeeper-3")]
    assert others == [new.generation] * 2, "all have voted in the new membership"
    assert new.generation > 0
    # The old disk votes in no term any more, and its WAL is nobody's: only two are left.
    await victim.kill()
    disk.rename(disk.with_name("safekeeper-2.new"))
    old.rename(disk)
    await victim.start()
    before = await place.safekeeper("safekeeper-2")
    assert before.seat == 0
    await cluster.client.kill_endpoint(place.project.endpoint.endpoint_id)
    await place.check()
    assert (await place.safekeeper("safekeeper-2")).term == before.term
    [refused] = await cluster.client.replace_safekeeper("safekeeper-2")
    assert "was replaced: give it an empty one" in refused.problem
    # Back to the member.
    await victim.kill()
    disk.rename(disk.with_name("safekeeper-2.old"))
    disk.with_name("safekeeper-2.new").rename(disk)
    await victim.start()
    await place.check()
    await converge(place)
    shutil.rmtree(disk.with_name("safekeeper-2.old"))


# --- the compute manager, at every step that persists or sends ---

STARTING_STEPS = [
    "term-reserved:1",
    "election-won:1",
    "elected-sent:1",
    "elected-sent:2",  # a majority knows that the election is won
    "majority-reached:1",
    "compute-started:1",
    "stream-sent:1",
    "stream-sent:2",
    "majority-streams:1",
]
ENDING_STEPS = ["run-ended:1", "run-before-record:1", "run-recorded:1"]
BRANCHING_STEPS = ["timeline-recorded:1", "timeline-before-made:1", "safekeeper-recorded:1", "safekeeper-recorded:3"]
REPLACING_STEPS = ["seat-given:1", "others-brought-up:1", "new-disk-voted:1", "seat-before-change:1", "seat-changed:1"]
"""In this order, as those of a branch: each goes on where the one before it died."""
ALWAYS = {"elected-sent:2", "run-before-record:1", "seat-before-change:1"}
ALL = os.environ.get("KEYLAKE_ALL_FAILPOINTS") == "1"  # make crash-anywhere


def _wanted(steps: Sequence[str]) -> list[str]:
    return [step for step in steps if ALL or step in ALWAYS]


async def manager_dies_at(place: Place, step: str, drive: Callable[[], Awaitable[object]]) -> None:
    """One that is started anew; its computes die with it. `drive`: what brings it there, unless the load does."""
    manager = place.cluster.service(MANAGER)
    await manager.kill()
    manager._environment[VARIABLE] = step
    with suppress(UnavailableError):  # it may be dead before anybody finds it ready
        await manager.start()
    driving = asyncio.create_task(_until_it_fails(drive))
    try:
        await wait_until(lambda: not manager.running, 30)
    finally:
        driving.cancel()
        del manager._environment[VARIABLE]
    assert manager._process is not None
    assert manager._process.returncode == -signal.SIGKILL, step


async def _until_it_fails(drive: Callable[[], Awaitable[object]]) -> None:
    with suppress(KeylakeError, TimeoutError):
        await drive()


async def test_the_manager_dies_at_every_step_and_nothing_is_lost(place: Place) -> None:
    """The next one is started at once, while a compute of the one before may still run: of two, one commits."""
    cluster, client, endpoint_id = place.cluster, place.cluster.client, place.project.endpoint.endpoint_id
    manager = cluster.service(MANAGER)

    async def connect() -> None:
        await client.start_endpoint(endpoint_id)

    async def stop() -> None:
        await bank.commits(COMMITS_PER_ROUND)
        await client.stop_endpoint(endpoint_id)

    async with place.bank() as bank:
        await bank.commits(COMMITS_PER_ROUND)
        for step in _wanted(STARTING_STEPS):
            await manager_dies_at(place, step, connect)
        for step in _wanted(ENDING_STEPS):
            await manager_dies_at(place, step, stop)
        await manager.start()
        await bank.commits(COMMITS_PER_ROUND)
        await wait_until(lambda: len(postmasters(cluster)) == 1, 20)
    await place.check()
    await converge(place)


@pytest.mark.skipif(not ALL, reason="make crash-anywhere")
async def test_a_branch_whose_manager_dies_is_finished_by_the_same_request(place: Place) -> None:
    client = place.cluster.client

    async def branch() -> Timeline:
        return await client.create_branch(place.project.timeline, "by-the-dead")

    for step in BRANCHING_STEPS:
        await manager_dies_at(place, step, branch)
    await place.cluster.service(MANAGER).start()
    with suppress(ConflictError):  # on a majority, it is finished
        await branch()
    timelines = await client.timelines(place.project.project.project_id)
    made = next(each for each in timelines if each.name == "by-the-dead")
    endpoint = await client.create_endpoint(made, "by-the-dead")
    assert (await client.start_endpoint(endpoint.endpoint_id)).state is EndpointState.RUNNING
    await client.delete_branch(made)


async def test_every_step_of_the_manager_that_has_a_name_is_among_them() -> None:
    sources = "".join(path.read_text() for path in Path(package.__path__[0]).rglob("*.py"))
    names = re.findall(r'failpoint\("([^"]+)"\)', sources)
    dies_at = {step.partition(":")[0] for step in (*STARTING_STEPS, *ENDING_STEPS, *BRANCHING_STEPS, *REPLACING_STEPS)}
    assert len(names) == len(set(names)) > 15
    assert set(names) == dies_at


# --- safekeepers ---


async def test_without_a_quorum_commits_wait_and_are_not_lost(place: Place) -> None:
    cluster = place.cluster
    async with place.bank() as bank:
        await bank.commits(COMMITS_PER_ROUND)
        at = monotonic()
        await asyncio.gather(cluster.service("safekeeper-1").kill(), cluster.service("safekeeper-2").kill())
        dead = monotonic()
        # A client of a live quorum would commit hundreds of times in this time.
        with pytest.raises(TimeoutError):
            await bank.commits(1000, timeout_s=1.0)
        assert not [n for n, t in place.ledger.acknowledged.items() if t > dead + 0.1]
        await cluster.service("safekeeper-1").start()
        await bank.commits(COMMITS_PER_ROUND)
        assert not place.ledger.errors_since(at), "they wait, and then they are answered"
        await cluster.service("safekeeper-2").start()
    await place.check()
    await converge(place)


@pytest.mark.parametrize("warnings", ["warning", "error"])
async def test_a_commit_that_is_cancelled_while_it_waits_is_no_success(place: Place, warnings: str) -> None:
    """Postgres itself would say COMMIT, and show it to everybody. With client_min_messages = error it would not even
    warn."""
    paused = [place.cluster.service(name).pid for name in SAFEKEEPERS[:2]]
    connection, admin = await place.connect(), await place.connect()
    await connection.execute(f"SET client_min_messages = {warnings}")
    there = "SELECT to_regclass('in_doubt') IS NOT NULL"
    try:
        for pid in paused:
            os.kill(pid, signal.SIGSTOP)
        await wait_until(lambda: all(map(all_threads_stopped, paused)))
        committing = asyncio.create_task(connection.execute("CREATE TABLE in_doubt (a int)"))

        async def waits() -> bool:
            assert not committing.done(), committing
            return bool(await admin.fetchval("SELECT true FROM pg_stat_activity WHERE wait_event = 'SyncRep'"))

        await wait_until(waits)
        committing.cancel()  # asyncpg sends a cancel request, which goes through the proxy
        with pytest.raises((asyncio.CancelledError, asyncpg.PostgresError)):
            await committing
        # What the client was sent: not CREATE TABLE, but that nobody knows.
        await wait_until(connection.is_closed)
        # And what would be gone if the compute were lost now, nobody sees.
        assert not await admin.fetchval(there)
    finally:
        for pid in paused:
            os.kill(pid, signal.SIGCONT)

    async def takes_effect() -> bool:
        return bool(await admin.fetchval(there))

    await wait_until(takes_effect)
    await admin.execute("DROP TABLE in_doubt")
    await admin.close()
    await place.check()


# --- the pageserver ---


@pytest.mark.parametrize("step", [*SENDS, *(MORE_SENDS if EVERY_STEP else [])])
async def test_a_pageserver_that_dies_as_it_sends(place: Place, step: str) -> None:
    """What is committed and stored, to safekeepers; pages, or the first files of all, to a compute. Whoever was sent
    half of it, or all, goes on with the next pageserver."""
    cluster, pageserver = place.cluster, place.cluster.service("pageserver")
    await pageserver.kill()
    pageserver._environment[VARIABLE] = ""
    try:
        await pageserver.start()
    finally:
        del pageserver._environment[VARIABLE]
    async with place.bank() as bank:
        await bank.commits(COMMITS_PER_ROUND)
        issuer, ca = TokenIssuer.load(cluster.layout.keys / "compute.json"), cluster.layout.ca_certificate
        address = Address(port=cluster.ports.pageserver)
        async with ServiceClient(Service.PAGESERVER, address, ca, issuer, frozenset({Scope.STORAGE_ADMIN})) as client:
            await client.request("POST", "/v1/failpoints", body=ArmFailpoints(order=step))
        await cluster.client.kill_endpoint(place.project.endpoint.endpoint_id)  # the next one needs all of that
        await wait_until(lambda: not pageserver.running, 30)
        await pageserver.start()
        await bank.commits(COMMITS_PER_ROUND)
    await caught_up(cluster, place.project)
    await place.check()
    await converge(place)


# --- two computes ---


@asynccontextmanager
async def second_manager(place: Place) -> AsyncIterator[ServiceClient]:
    """Another compute manager over the same metadata and safekeepers, which knows nothing of the first one."""
    cluster = place.cluster
    runtime = Path(tempfile.mkdtemp(prefix="kl-", dir="/tmp"))
    values = json.loads((cluster.layout.config / f"{MANAGER}.json").read_text())
    values |= {
        "node_id": "compute-2",
        "listen": {"host": "127.0.0.1", "port": free_port()},
        "runtime_dir": str(runtime / "c"),
        "log_dir": str(cluster.layout.data / "compute-logs-2"),
    }
    config = cluster.layout.write_config("compute-2", values)
    base_url = f"https://127.0.0.1:{values['listen']['port']}"
    ready = cluster._readiness(base_url, "/readyz", Service.COMPUTE)
    log = cluster.layout.logs / "compute-2.log"
    process = cluster.services["compute-2"] = ForkedService("compute-2", "compute", config, log, ready)
    issuer = TokenIssuer.load(cluster.layout.admin_key)
    address = Address(port=values["listen"]["port"])
    ca = cluster.layout.ca_certificate
    try:
        await process.start()
        async with ServiceClient(Service.COMPUTE, address, ca, issuer, OWNER_SCOPES, timeout_s=60) as client:
            yield client
    finally:
        await process.stop()
        del cluster.services["compute-2"]
        shutil.rmtree(runtime)


async def test_of_two_computes_only_the_newer_one_commits(place: Place) -> None:
    """The first manager and its agent are stopped (SIGSTOP), so nobody tells the older Postgres anything: only the
    safekeepers keep it from committing."""
    cluster, ledger, endpoint_id = place.cluster, place.ledger, place.project.endpoint.endpoint_id
    connection = place.project.connection
    manager = cluster.service(MANAGER)
    async with place.bank() as bank:
        await bank.commits(100)
        older = await compute_of(cluster, endpoint_id)
        manager.send_signal(signal.SIGSTOP)
        older.pause()
        try:
            # It does not depend on its manager, nor on its agent.
            await bank.commits(100)
            async with second_manager(place) as client:
                started = await client.call(Endpoint, "POST", f"/v1/endpoints/{endpoint_id}:start")
                elected = monotonic()
                assert started.state is EndpointState.RUNNING
                newer = find_compute(cluster, str(started.instance_id), "compute-2")

                async def connect_to_newer() -> Session:
                    return await asyncpg.connect(
                        host=str(newer.socket_dir),
                        port=5432,
                        user=connection.user,
                        password=connection.password,
                        database=connection.database,
                        command_timeout=60,
                    )

                async with place.bank(by=connect_to_newer) as newer_bank:
                    await newer_bank.commits(200)
                assert older.postmaster.exists, "both must run, or this shows nothing"
                late = [n for n, at in ledger.acknowledged.items() if at > elected and n.startswith(bank.name)]
                assert not late, f"the older compute committed {late[:3]} after the newer one was elected"
                await place.check(await connect_to_newer())
        finally:
            older.resume()
            manager.send_signal(signal.SIGCONT)
        # The first manager finds out, and starts a third one for whoever connects.
        await older.gone()
        await bank.commits(100)
    endpoint = await cluster.client.endpoint(endpoint_id)
    assert endpoint.term > started.term
    await place.check()
    await converge(place)


# --- what clients are told ---


@dataclass(slots=True)
class IdleSession:
    """One of libpq's, which has the last word of its server at hand when it is used again."""

    connection: psycopg.Connection[tuple[object, ...]]

    @classmethod
    async def open(cls, place: Place) -> IdleSession:
        return cls(await asyncio.to_thread(psycopg.connect, place.project.connection.dsn, autocommit=True))

    async def last_words(self) -> str:
        """Empty while it works."""
        try:
            await asyncio.to_thread(self.connection.execute, "select 1")
        except psycopg.OperationalError as error:
            return str(error)
        return ""


async def served(place: Place) -> None:
    """Who has begun to log in when the compute goes is told so, or let in and sent away again, and begins anew."""
    try:
        connection = await place.connect()
    except asyncpg.CannotConnectNowError as error:
        if "during log-in" not in str(error):
            raise
    else:
        with suppress(asyncpg.AdminShutdownError, asyncpg.ConnectionDoesNotExistError, asyncpg.InterfaceError):
            await place.check(connection)
            return
    await place.check()


async def test_idle_sessions_end_with_their_compute_and_who_is_not_logged_in_waits_for_the_next(place: Place) -> None:
    """ADR 41. And all of it again when the manager is killed, whose computes die with it."""
    client, endpoint_id = place.cluster.client, place.project.endpoint.endpoint_id
    first = await client.start_endpoint(endpoint_id)

    idle = await IdleSession.open(place)
    stopping = asyncio.create_task(client.stop_endpoint(endpoint_id))
    waiting = [asyncio.create_task(served(place)) for _ in range(3)]
    await stopping
    await asyncio.gather(*waiting)
    assert "terminating connection due to administrator command" in await idle.last_words()

    idle = await IdleSession.open(place)
    await client.kill_endpoint(endpoint_id)
    assert "terminating connection: the compute has stopped" in await idle.last_words()

    await place.check()
    idle = await IdleSession.open(place)
    compute = await compute_of(place.cluster, endpoint_id)
    manager = place.cluster.service(MANAGER)
    await manager.kill()
    await compute.gone()
    assert "terminating connection: the compute has stopped" in await idle.last_words()
    with pytest.raises(asyncpg.CannotConnectNowError):
        await place.connect()
    await manager.start()
    await place.check()
    assert (await client.endpoint(endpoint_id)).term > first.term


# --- who may wake it ---


async def try_to_log_in(place: Place, user: str, password: str) -> bool:
    """False: wrong password, or no such role; nobody says which."""
    arguments = place.project.connection.asyncpg_arguments() | {"user": user, "password": password}
    try:
        connection = await asyncpg.connect(**arguments, timeout=60)
    except asyncpg.InvalidPasswordError:
        return False
    assert await connection.fetchval("SELECT current_user") == user
    await connection.close()
    return True


async def offered_salt(place: Place, user: str) -> str:
    """What a client of that name is asked, by whoever asks: the proxy, or Postgres."""
    connection = place.project.connection
    parameters = {"user": user, "database": "app", "options": f"endpoint={connection.endpoint_id}"}
    reader, writer = await asyncio.open_connection(connection.host, connection.port)
    try:
        async with asyncio.timeout(60):
            writer.write(SSLRequest().serialize())
            assert await reader.readexactly(1) == b"S"
            await writer.start_tls(connection.ssl_context(), server_hostname=connection.host)
            writer.write(StartupMessage(parameters).serialize())
            assert (await reader.readuntil(MECHANISM.encode() + b"\0\0"))[:1] == b"R"
            writer.write(SASLInitialResponse(MECHANISM, ScramClient("", "nonce").first()).serialize())
            await reader.readuntil(b",s=")
            return (await reader.readuntil(b",")).decode()
    finally:
        writer.close()


async def test_only_who_knows_a_password_wakes_a_compute(place: Place) -> None:
    """And whoever Postgres knows can wake it, however its compute ended (ADR 49)."""
    client, endpoint_id = place.cluster.client, place.project.endpoint.endpoint_id
    connection = await place.connect()
    await connection.execute(
        "CREATE ROLE anna LOGIN PASSWORD 's3cret'; CREATE ROLE gone LOGIN PASSWORD 's3cret' VALID UNTIL '2000-01-01'"
    )
    await connection.close()
    awake = [await offered_salt(place, user) for user in ("anna", "nobody")]
    stopped = await client.stop_endpoint(endpoint_id)
    for user, password in (("anna", "wrong"), ("nobody", "s3cret"), ("gone", "s3cret"), ("app", "s3cret")):
        assert not await try_to_log_in(place, user, password)
    assert [await offered_salt(place, user) for user in ("anna", "nobody")] == awake, "it does not tell who is there"
    endpoint = await client.endpoint(endpoint_id)
    assert (endpoint.state, endpoint.term) == (EndpointState.STOPPED, stopped.term)
    # A role that SQL has made wakes it. Changed by SQL, its old password does not any more.
    assert await try_to_log_in(place, "anna", "s3cret")
    connection = await place.connect()
    await connection.execute("ALTER ROLE anna PASSWORD 'changed'; CREATE ROLE berta LOGIN PASSWORD 'b'")
    await connection.close()
    await client.stop_endpoint(endpoint_id)
    assert not await try_to_log_in(place, "anna", "s3cret")
    assert (await client.endpoint(endpoint_id)).state is EndpointState.STOPPED
    assert await try_to_log_in(place, "berta", "b")
    # Killed, it tells nobody who may log in: so everybody is let through to Postgres, which knows.
    connection = await place.connect()
    await connection.execute("CREATE ROLE clara LOGIN PASSWORD 'c'; ALTER ROLE app PASSWORD 'of the owner'")
    compute = await compute_of(place.cluster, endpoint_id)
    os.kill(compute.agent.pid, signal.SIGKILL)
    await compute.gone()
    assert not await try_to_log_in(place, "app", place.project.connection.password), "as the list of before has it"
    assert await try_to_log_in(place, "clara", "c")
    assert await try_to_log_in(place, "app", "of the owner")
    # The same when a role is being changed at the end.
    connection = await asyncpg.connect(
        **place.project.connection.asyncpg_arguments() | {"password": "of the owner"}, timeout=60
    )
    await connection.execute(f"ALTER ROLE app PASSWORD '{place.project.connection.password}'")
    await connection.execute("BEGIN; ALTER ROLE anna PASSWORD 'undone'")
    await client.stop_endpoint(endpoint_id)
    assert not await try_to_log_in(place, "nobody", "s3cret")
    assert (await client.endpoint(endpoint_id)).state is EndpointState.RUNNING
    assert await try_to_log_in(place, "anna", "changed")
    await place.check()


# --- a pageserver that does not keep up ---


@asynccontextmanager
async def lag_limit(cluster: Cluster, size_bytes: int) -> AsyncIterator[None]:
    """Within the block safekeepers acknowledge so much WAL ahead of the pageserver, and no more."""
    configs = [cluster.layout.config / f"{name}.json" for name in SAFEKEEPERS]
    before = [config.read_text() for config in configs]
    limited = [json.dumps(json.loads(text) | {"backpressure_lag_mb": size_bytes >> 20}) for text in before]

    async def restart_with(texts: list[str]) -> None:
        for config, text in zip(configs, texts, strict=True):
            config.write_text(text)
        services = [cluster.service(name) for name in SAFEKEEPERS]
        await asyncio.gather(*(service.kill() for service in services))
        await asyncio.gather(*(service.start() for service in services))

    await restart_with(limited)
    try:
        yield
    finally:
        await restart_with(before)


async def test_a_bulk_load_waits_for_the_pageserver_and_nothing_fails(place: Place) -> None:
    """One that stands still while several sessions load more than may be acknowledged."""
    # The first of all sessions are within the limit, all of them by far not.
    sessions, copies, size_bytes, limit_size_bytes = 4, 12, 100_000, 1 << 20
    async with lag_limit(place.cluster, limit_size_bytes):
        pid = place.cluster.service("pageserver").pid
        watcher = await place.connect()
        await watcher.execute("create table loaded (session int, number int, line text)")
        loaders = [await place.connect() for _ in range(sessions)]
        acknowledged: list[int] = []

        async def load(number: int, times: int) -> None:
            rows = [(number, n, f"{n:1000}") for n in range(size_bytes // 1000)]
            for _ in range(times):
                async with loaders[number].transaction():
                    await loaders[number].copy_records_to_table("loaded", records=rows)
                    lsn = await loaders[number].fetchval("select (pg_current_wal_insert_lsn() - '0/0')::bigint")
                acknowledged.append(lsn)  # the commit's is behind it

        waiting = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'"
        # Now they have all pages that they need.
        await asyncio.gather(*(load(number, 1) for number in range(sessions)))
        assert await watcher.fetchval(waiting) == 0
        acknowledged.clear()
        os.kill(pid, signal.SIGSTOP)
        try:
            await wait_until(lambda: all_threads_stopped(pid))
            ingested_lsn = await watcher.fetchval("select (pg_current_wal_flush_lsn() - '0/0')::bigint")  # or less
            loads = asyncio.gather(*(load(number, copies) for number in range(sessions)))

            async def all_are_held_back() -> bool:
                timelines = (await safekeeper_timelines(place.cluster, place.project)).values()
                majority = sorted(timeline.held_back_size_bytes for timeline in timelines)[1]
                return majority > 0 and await watcher.fetchval(waiting) == sessions

            await wait_until(all_are_held_back)
            assert acknowledged
            assert max(acknowledged) <= ingested_lsn + limit_size_bytes
            assert not loads.done()
        finally:
            os.kill(pid, signal.SIGCONT)
        await loads
        assert len(acknowledged) == sessions * copies
        assert max(acknowledged) > ingested_lsn + 3 * limit_size_bytes
        assert await watcher.fetchval("select count(*) from loaded") == sessions * (copies + 1) * size_bytes // 1000
        await watcher.execute("drop table loaded")
        for connection in (watcher, *loaders):
            await connection.close()
