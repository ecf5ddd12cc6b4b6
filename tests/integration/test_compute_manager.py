"""The compute manager with real agents, real Postgres and real safekeepers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from compute.crashes import Crashes
from compute.follower import Follower
from compute.manager import Manager
from compute.repository import TimelineRow
from keylake.ports import free_port
from shared.api.compute import (
    Admission,
    ChangeEndpoint,
    ConnectTarget,
    CreatedEndpoint,
    CreateEndpoint,
    CreateTimeline,
    Endpoint,
    EndpointSize,
    EndpointState,
    FirstQuery,
    LogIn,
    Timeline,
)
from shared.api.keymanager import KeyState, Role
from shared.auth import Scope, Service
from shared.config import Address
from shared.errors import (
    ConflictError,
    KeyAccessError,
    NotFoundError,
    PermissionDeniedError,
    RevokedError,
    UnavailableError,
)
from shared.http import ServiceClient
from shared.ids import EndpointId, InstanceId, ProjectId
from shared.postgres import PG_BIN_VARIABLE, find_postgres
from shared.wire.scram import ScramVerifier
from tests.cluster.processes import below
from tests.fixtures.compute_cluster import ComputeCluster, compute_cluster
from tests.fixtures.keymanager import metadata_dsn, metadata_server
from tests.fixtures.waiting import wait_until

__all__ = ["metadata_dsn", "metadata_server"]  # fixtures

pytestmark = pytest.mark.integration

CONNECTION_LOST = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
"""What asyncpg raises when the server goes away, depending on when."""


@pytest.fixture
async def cluster(metadata_dsn: str) -> AsyncIterator[ComputeCluster]:
    with tempfile.TemporaryDirectory(prefix="kl-") as scratch:  # short: sockets lie below
        async with compute_cluster(Path(scratch), metadata_dsn) as running:
            yield running


@pytest.fixture
async def client(cluster: ComputeCluster) -> AsyncIterator[ServiceClient]:
    async with cluster.client() as client:
        yield client


async def make_endpoint(client: ServiceClient, project_id: ProjectId, name: str = "main") -> CreatedEndpoint:
    path = f"/v1/projects/{project_id}"
    timeline = await client.call(Timeline, "POST", f"{path}/timelines", body=CreateTimeline(name="main"))
    body = CreateEndpoint(timeline_id=timeline.timeline_id, name=name)
    return await client.call(CreatedEndpoint, "POST", f"{path}/endpoints", body=body)


async def reach(client: ServiceClient, endpoint: Endpoint) -> ConnectTarget:
    return await client.call(ConnectTarget, "POST", f"/v1/endpoints/{endpoint.endpoint_id}:connect")


async def state_of(client: ServiceClient, endpoint: Endpoint) -> Endpoint:
    return await client.call(Endpoint, "GET", f"/v1/endpoints/{endpoint.endpoint_id}")


async def asleep(client: ServiceClient, endpoint: Endpoint, user: str) -> ScramVerifier:
    """By which the proxy asks this role for its password before it has the endpoint started."""
    path, body = f"/v1/endpoints/{endpoint.endpoint_id}:log-in", LogIn(user_hex=user.encode().hex())
    admission = await client.call(Admission, "POST", path, body=body)
    assert admission.verifier is not None
    return ScramVerifier.parse(admission.verifier)


async def log_in(target: ConnectTarget, endpoint: CreatedEndpoint, **options: Any) -> Any:
    return await asyncpg.connect(
        host=target.compute.host,
        port=target.compute.port,
        user=endpoint.user,
        password=endpoint.password,
        database=endpoint.database,
        timeout=20,
        **options,
    )


def be_impatient(cluster: ComputeCluster) -> None:
    """From the next start on, who hangs is given up soon."""
    settings = cluster.settings.model_copy(update={"liveness_timeout_s": 3.0, "idle_poll_interval_s": 0.1})
    cluster.manager._services = replace(cluster.services, settings=settings)


async def query_until_it_fails(connection: Any, timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            await connection.fetchval("SELECT 1")


async def test_commits_are_quorum_durable_and_survive_the_loss_of_one_safekeeper(
    cluster: ComputeCluster, client: ServiceClient
) -> None:
    endpoint = await make_endpoint(client, ProjectId.new())
    target = await reach(client, endpoint)
    running = await state_of(client, endpoint)
    assert running.state is EndpointState.RUNNING
    assert running.term == 1
    assert {stage.stage for stage in running.stages} >= {"election", "basebackup", "postgres", "stream"}
    assert "tmpfs" in running.volume

    connection = await log_in(target, endpoint)
    names = await connection.fetchval("SHOW synchronous_standby_names")
    assert names == 'ANY 2 ("safekeeper-1", "safekeeper-2", "safekeeper-3")'
    await connection.execute("CREATE TABLE t AS SELECT generate_series(1, 1000) AS a")
    await cluster.safekeepers[2].stop()
    await connection.execute("INSERT INTO t VALUES (1001)", timeout=20)

    # With two of three down a commit must hang, and come through once one is back: nothing else may release it.
    await cluster.safekeepers[1].stop()
    waiting = asyncio.create_task(connection.execute("INSERT INTO t VALUES (1002)"))
    done, _ = await asyncio.wait({waiting}, timeout=1.0)
    assert not done
    # Not even a cancel: until a quorum holds it, nobody sees it.
    notices: list[str] = []
    connection.add_log_listener(lambda _, message: notices.append(message.message))
    other = await log_in(target, endpoint)
    await other.execute("SELECT pg_cancel_backend($1)", connection.get_server_pid())
    await wait_until(lambda: notices)
    assert "canceling wait for synchronous replication" in notices[0]
    assert await other.fetchval("SELECT count(*) FROM t WHERE a = 1002") == 0
    assert not waiting.done()
    await cluster.safekeepers[1].start()
    await asyncio.wait_for(waiting, 20)
    assert await other.fetchval("SELECT count(*) FROM t WHERE a = 1002") == 1
    await other.close()
    await connection.close()

    # The one that was away longest is brought up again, too.
    await cluster.safekeepers[2].start()

    async def caught_up() -> bool:
        statuses = [
            await each.status(endpoint.project_id, endpoint.timeline_id) for each in cluster.services.safekeepers
        ]
        return len({status.flush_lsn for status in statuses if status is not None}) == 1

    await wait_until(caught_up)


async def test_a_manager_that_slept_through_its_lease_names_no_compute(
    cluster: ComputeCluster, client: ServiceClient
) -> None:
    endpoint = await make_endpoint(client, ProjectId.new())
    await reach(client, endpoint)
    # As after SIGSTOP and SIGCONT: nobody has told the manager yet, only its clock can.
    cluster.clock.ahead_s = cluster.leases.ttl_s + 0.1
    with pytest.raises(KeyAccessError):
        await cluster.manager.connect(endpoint.endpoint_id)


async def test_concurrent_callers_share_one_start(cluster: ComputeCluster, client: ServiceClient) -> None:
    endpoint = await make_endpoint(client, ProjectId.new())
    targets = await asyncio.gather(*(reach(client, endpoint) for _ in range(8)))
    assert len({target.instance_id for target in targets}) == 1
    assert (await state_of(client, endpoint)).term == 1

    # The last stages of that start are the proxy's to tell, once, and of this compute only.
    assert all(target.wants_first_query for target in targets)
    path = f"/v1/endpoints/{endpoint.endpoint_id}:first-query"
    for instance_id, login_s in ((InstanceId.new(), 1.0), (targets[0].instance_id, 2.0), (targets[0].instance_id, 3.0)):
        await client.request("POST", path, body=FirstQuery(instance_id=instance_id, login_s=login_s, query_s=0.5))
    stages = [(each.stage, each.seconds) for each in (await state_of(client, endpoint)).stages]
    assert stages[-2:] == [("login", 2.0), ("first_query", 0.5)]
    assert len({name for name, _ in stages}) == len(stages)
    assert not (await reach(client, endpoint)).wants_first_query


async def test_stop_is_graceful_and_leaves_nothing(cluster: ComputeCluster, client: ServiceClient) -> None:
    endpoint = await make_endpoint(client, ProjectId.new())
    path = f"/v1/endpoints/{endpoint.endpoint_id}"
    assert (await asleep(client, endpoint, "app")).check_password(endpoint.password)
    half, later = ChangeEndpoint(size=EndpointSize.HALF), ChangeEndpoint(size=EndpointSize.QUARTER)
    assert (await client.call(Endpoint, "PATCH", path, body=half)).size is EndpointSize.HALF
    began = datetime.now(UTC)
    target = await reach(client, endpoint)
    changed = await client.call(Endpoint, "PATCH", path, body=later)
    assert (changed.size, changed.running_size) == (EndpointSize.QUARTER, EndpointSize.HALF)
    assert changed.suspend_after_s == endpoint.suspend_after_s
    assert "1536 MiB" in changed.volume
    assert changed.boot_key_made_at is not None
    assert began <= changed.boot_key_made_at <= datetime.now(UTC)
    connection = await log_in(target, endpoint)
    assert await connection.fetchval("SHOW shared_buffers") == "64MB"
    reserved = int(await connection.fetchval("SHOW superuser_reserved_connections"))
    assert target.max_sessions == int(await connection.fetchval("SHOW max_connections")) - reserved == 100
    assert await connection.fetchval("SHOW work_mem") == "5MB"
    assert await connection.fetchval("SHOW max_parallel_workers") == "0"
    await connection.execute("CREATE TABLE t (a int)")
    await connection.execute("CREATE ROLE anna LOGIN PASSWORD 's3cret'; ALTER ROLE app PASSWORD 'another'")
    await connection.close()
    body = LogIn(user_hex=b"nobody".hex())
    admission = await client.call(Admission, "POST", f"{path}:log-in", body=body)
    assert (admission.verifier, admission.target) == (None, target), "it runs, and asks for the password itself"
    stopped = await client.call(Endpoint, "POST", f"/v1/endpoints/{endpoint.endpoint_id}:stop")
    assert stopped.state is EndpointState.STOPPED
    assert stopped.reason == "stopped on request"
    assert stopped.boot_key_made_at is None
    assert not Path(target.compute.host).exists()
    assert not list(cluster.settings.log_dir.iterdir())
    # Stopping again, or killing, is fine.
    again = await client.call(Endpoint, "POST", f"/v1/endpoints/{endpoint.endpoint_id}:kill")
    assert again.state is EndpointState.STOPPED
    # Who may log in is known, and whoever only says so does not start it.
    assert (await asleep(client, endpoint, "anna")).check_password("s3cret")
    assert (await asleep(client, endpoint, "app")).check_password("another")
    assert not (await asleep(client, endpoint, "nobody")).check_password("s3cret")
    assert (await state_of(client, endpoint)).state is EndpointState.STOPPED
    # The shutdown checkpoint is in the log of a majority: their ends agree, and nobody streams any more.
    statuses = [await each.status(endpoint.project_id, endpoint.timeline_id) for each in cluster.services.safekeepers]
    assert not any(status.streaming for status in statuses if status is not None)


async def test_revocation_kills_the_compute_and_refuses_starts_until_it_is_lifted(
    cluster: ComputeCluster, client: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = await make_endpoint(client, ProjectId.new())
    target = await reach(client, endpoint)
    connection = await log_in(target, endpoint)
    hold, over = cluster.manager._runs[endpoint.endpoint_id]._lsn_hold, asyncio.Event()
    monkeypatch.setattr(hold, "release", over.wait)
    await cluster.leases.revoke(endpoint.project_id)
    with pytest.raises(CONNECTION_LOST):
        await query_until_it_fails(connection, 5)
    # The acknowledgement says that computes are gone, and waits for nothing else; and nobody is sent to one that is.
    await wait_until(lambda: {Role.COMPUTE, Role.MANAGER} <= cluster.leases.acknowledged.keys())
    assert (await state_of(client, endpoint)).state is EndpointState.STOPPING
    over.set()

    async def stopped() -> bool:
        return (await state_of(client, endpoint)).state is EndpointState.STOPPED

    await wait_until(stopped)
    reason = (await state_of(client, endpoint)).reason
    assert "REVOKED" in reason
    assert "KMS: disabled" in reason
    with pytest.raises(RevokedError):
        await reach(client, endpoint)
    assert not list(cluster.settings.runtime_dir.iterdir())


async def test_who_starts_waits_for_a_turn_and_may_give_up(
    cluster: ComputeCluster, client: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = await make_endpoint(client, ProjectId.new())
    turns = cluster.manager._turns
    for _ in range(cluster.settings.max_starting):
        await turns.acquire()
    waiting = asyncio.create_task(reach(client, endpoint))

    async def waits() -> bool:
        return "its turn" in (await state_of(client, endpoint)).reason

    await wait_until(waits)
    stopped = await client.call(Endpoint, "POST", f"/v1/endpoints/{endpoint.endpoint_id}:stop")
    assert stopped.state is EndpointState.STOPPED
    with pytest.raises(UnavailableError, match="stopped on request"):
        await waiting
    again = asyncio.create_task(reach(client, endpoint))
    await wait_until(waits)
    turns.release()
    await again
    assert not turns.locked(), "who runs has given it back"

    # Nor does one that waits for a quorum hold up the others.
    async def never(follower: Follower) -> None:
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(Follower, "run", never)
    lost = await make_endpoint(client, ProjectId.new())
    waiting = asyncio.create_task(reach(client, lost))
    await wait_until(
        lambda: any(run.plan is not None for run in cluster.manager._runs.values() if not run.ready.done())
    )
    assert not turns.locked()
    await client.call(Endpoint, "POST", f"/v1/endpoints/{lost.endpoint_id}:kill")
    await asyncio.gather(waiting, return_exceptions=True)
    assert turns._value == 1


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "has not said anything")])
async def test_an_agent_that_is_dead_or_hangs_ends_the_run(
    cluster: ComputeCluster, client: ServiceClient, number: signal.Signals, reason: str
) -> None:
    """And is a crash."""
    be_impatient(cluster)
    endpoint = await make_endpoint(client, ProjectId.new())
    await reach(client, endpoint)
    [run] = cluster.manager._runs.values()
    assert run._agent is not None
    pid = run._agent.inner_pid
    assert pid is not None
    os.kill(pid, number)

    async def stopped() -> bool:
        return (await state_of(client, endpoint)).state is EndpointState.STOPPED

    await wait_until(stopped)
    dead = await state_of(client, endpoint)
    assert reason in dead.reason
    assert (dead.crashes, dead.next_start_at) == (1, None)


async def test_too_many_crashes_in_a_row_are_not_followed_by_another_start_whoever_is_asked(
    cluster: ComputeCluster, client: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = cluster.services.repository
    endpoint = await make_endpoint(client, ProjectId.new())
    # As a manager before this one has left it; then it goes on.
    await repository.run_over(endpoint.endpoint_id, "", 0, None, Crashes(5))
    with tempfile.TemporaryDirectory(prefix="kl-") as directory:
        broken = Path(directory) / "postgres"
        real = find_postgres().program("postgres")
        broken.write_text(f'#!/bin/sh\ncase "$1" in --*) exec {real} "$@" ;; esac\nexit 1\n')
        for path in (broken, broken.parent):
            path.chmod(0o755)
        monkeypatch.setenv(PG_BIN_VARIABLE, directory)
        for crashes in (6, 7, 8):
            with pytest.raises(UnavailableError, match="Postgres did not start"):
                await client.request("POST", f"/v1/endpoints/{endpoint.endpoint_id}:start")  # it waits for nothing
            assert (await state_of(client, endpoint)).crashes == crashes
    monkeypatch.undo()
    refused = r"crashed 8 times in a row \(Postgres did not start\); it is not started for another [5-8] s"
    with pytest.raises(UnavailableError, match=refused):
        await reach(client, endpoint)
    assert (await state_of(client, endpoint)).next_start_at is not None
    manager = cluster.manager
    async with Manager(cluster.services, manager._pageserver, manager._keys, "compute-2") as successor:
        with pytest.raises(UnavailableError, match=refused):
            await successor.connect(endpoint.endpoint_id)
        seen = await successor.endpoint(endpoint.endpoint_id)
        assert (seen.crashes, seen.next_start_at is None) == (8, False)
        # Somebody who knows better does not have to wait.
        seen = await successor.start(endpoint.endpoint_id)
        assert (seen.state, seen.crashes, seen.next_start_at) == (EndpointState.RUNNING, 8, None)
        await successor.stop(endpoint.endpoint_id, graceful=True)
    assert (await repository.endpoint(endpoint.endpoint_id)).crashes == Crashes()


async def test_a_newer_term_deposes_the_compute(cluster: ComputeCluster, client: ServiceClient) -> None:
    from shared.api.safekeeper import VoteRequest

    endpoint = await make_endpoint(client, ProjectId.new())
    target = await reach(client, endpoint)
    connection = await log_in(target, endpoint)
    for safekeeper in cluster.services.safekeepers[:2]:
        vote = await safekeeper.vote(
            endpoint.project_id, endpoint.timeline_id, VoteRequest(term=7, candidate="another")
        )
        assert vote.granted
    # The old compute may not commit any more ...
    with pytest.raises((*CONNECTION_LOST, TimeoutError)):
        await connection.execute("CREATE TABLE lost (a int)", timeout=5)

    # ... and goes.
    async def stopped() -> bool:
        return (await state_of(client, endpoint)).state is EndpointState.STOPPED

    await wait_until(stopped)
    assert "term 7" in (await state_of(client, endpoint)).reason
    # The next start asks for a higher term by itself (and then wants a basebackup that this fixture cannot make).
    with pytest.raises((UnavailableError, ConflictError)):
        await reach(client, endpoint)
    status = await cluster.services.safekeepers[0].status(endpoint.project_id, endpoint.timeline_id)
    assert status is not None
    assert status.term == 8


async def test_no_majority_no_start(cluster: ComputeCluster, client: ServiceClient) -> None:
    endpoint = await make_endpoint(client, ProjectId.new())
    for safekeeper in cluster.safekeepers[:2]:
        await safekeeper.stop()
    with pytest.raises(UnavailableError, match="no quorum"):
        await reach(client, endpoint)
    assert (await state_of(client, endpoint)).state is EndpointState.STOPPED
    for safekeeper in cluster.safekeepers[:2]:
        await safekeeper.start()
    await reach(client, endpoint)


async def test_creation_is_idempotent_and_typed(cluster: ComputeCluster, client: ServiceClient) -> None:
    project_id = ProjectId.new()
    path = f"/v1/projects/{project_id}"
    first = await client.call(Timeline, "POST", f"{path}/timelines", body=CreateTimeline(name="main"))
    again = await client.call(Timeline, "POST", f"{path}/timelines", body=CreateTimeline(name="main"))
    assert first == again
    body = CreateEndpoint(timeline_id=first.timeline_id, name="main")
    endpoint = await client.call(CreatedEndpoint, "POST", f"{path}/endpoints", body=body)
    with pytest.raises(ConflictError):
        await client.call(CreatedEndpoint, "POST", f"{path}/endpoints", body=body)
    with pytest.raises(NotFoundError):
        await client.call(CreatedEndpoint, "POST", f"/v1/projects/{ProjectId.new()}/endpoints", body=body)
    listed = (await client.request("GET", f"{path}/endpoints")).json()
    assert [each["endpoint_id"] for each in listed] == [str(endpoint.endpoint_id)]
    assert "password" not in listed[0]
    for verb in ("", ":start", ":stop", ":kill", ":connect"):
        method = "GET" if not verb else "POST"
        with pytest.raises(NotFoundError):
            await client.request(method, f"/v1/endpoints/{EndpointId.new()}{verb}")
    row = await cluster.services.repository.endpoint(endpoint.endpoint_id)
    assert endpoint.password not in repr(row)
    assert row.scram_verifier.startswith("SCRAM-SHA-256$")


async def test_two_endpoints_of_one_timeline_do_not_run_at_once_and_each_can_be_deleted(
    cluster: ComputeCluster, client: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    project_id = ProjectId.new()
    first = await make_endpoint(client, project_id, "first")
    second = await make_endpoint(client, project_id, "second")
    target = await reach(client, first)
    with pytest.raises(ConflictError):
        await reach(client, second)

    # Until the first one is deleted, and its compute with it.
    connection = await log_in(target, first)
    await client.request("DELETE", f"/v1/endpoints/{first.endpoint_id}")
    with pytest.raises(CONNECTION_LOST):
        await connection.execute("SELECT 1")
    assert not list(cluster.settings.runtime_dir.iterdir())
    assert not list(cluster.settings.log_dir.iterdir())
    await wait_until(lambda: not any(project_id in session.held for session in cluster.leases.sessions))
    for method, verb in (("GET", ""), ("POST", ":connect"), ("DELETE", "")):
        with pytest.raises(NotFoundError):
            await client.request(method, f"/v1/endpoints/{first.endpoint_id}{verb}")
    assert [each.endpoint_id for each in await cluster.manager.endpoints(project_id)] == [second.endpoint_id]
    assert (await make_endpoint(client, project_id, "first")).endpoint_id != first.endpoint_id  # the name is free

    # Who was about to start the other one when it was deleted does not start it.
    looking, deleted = asyncio.Event(), asyncio.Event()
    projects_of = cluster.manager._projects_of

    async def slowly(row: TimelineRow) -> list[ProjectId]:
        looking.set()
        await deleted.wait()
        return await projects_of(row)

    monkeypatch.setattr(cluster.manager, "_projects_of", slowly)
    starting = asyncio.create_task(reach(client, second))
    await looking.wait()
    await client.request("DELETE", f"/v1/endpoints/{second.endpoint_id}")
    deleted.set()
    with pytest.raises(NotFoundError):
        await starting


async def test_scopes_and_project_bound_tokens(cluster: ComputeCluster, client: ServiceClient) -> None:
    project_id = ProjectId.new()
    endpoint = await make_endpoint(client, project_id)
    path = f"/v1/endpoints/{endpoint.endpoint_id}"
    async with cluster.client(Scope.COMPUTE_CONNECT) as proxy:
        with pytest.raises(PermissionDeniedError):
            await proxy.request("POST", f"{path}:kill")
        with pytest.raises(PermissionDeniedError):
            await proxy.request("POST", f"{path}:connect", project_id=ProjectId.new())
        await proxy.request("GET", path, project_id=project_id)


async def test_keys_that_are_gone_refuse_a_timeline(cluster: ComputeCluster, client: ServiceClient) -> None:
    project_id = ProjectId.new()
    cluster.leases.states[project_id] = (KeyState.REVOKED, "KMS: disabled")
    with pytest.raises(RevokedError):
        await client.request("POST", f"/v1/projects/{project_id}/timelines", body=CreateTimeline())


async def test_a_spare_agent_is_used_once_and_replaced(metadata_dsn: str) -> None:
    with tempfile.TemporaryDirectory(prefix="kl-") as scratch:
        async with compute_cluster(Path(scratch), metadata_dsn, spare_agents=1) as cluster, cluster.client() as client:
            launcher = cluster.services.launcher
            await wait_until(lambda: launcher._spares)
            [spare] = launcher._spares
            endpoint = await make_endpoint(client, ProjectId.new())
            await reach(client, endpoint)
            [run] = cluster.manager._runs.values()
            assert run._agent is spare
            await wait_until(lambda: launcher._spares)
            assert launcher._spares[0] is not spare


IN_A_CONTAINER = """
import runpy
from shared import sandbox
sandbox.detect_isolation = lambda: sandbox.Isolation.MOUNTS
runpy.run_module("compute", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("program", [("-m", "compute"), ("-c", IN_A_CONTAINER)], ids=["best", "mounts"])
async def test_the_process_and_what_its_death_takes_along(cluster: ComputeCluster, program: tuple[str, str]) -> None:
    """`python -m compute` with a configuration file; killed, it leaves no compute, and its successor no files. Also
    where no pid namespace ends with the agent."""
    port = free_port()
    settings = cluster.settings.model_dump(mode="json") | {
        "listen": {"port": port},
        "node_id": "compute-2",
        "database_url": cluster.settings.database_url.get_secret_value(),
        "runtime_dir": str(cluster.settings.runtime_dir / "2"),
        "log_dir": str(cluster.settings.log_dir / "2"),
    }
    config = cluster.settings.runtime_dir.parent / "compute.json"
    config.write_text(json.dumps(settings))
    log = config.with_suffix(".log")
    with log.open("wb") as output:
        argv = [sys.executable, *program, "--config", str(config)]
        process = await asyncio.to_thread(subprocess.Popen, argv, stderr=output)
    try:
        await wait_until(lambda: "compute manager is up" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        admin = cluster.realm.admin
        other = ServiceClient(
            Service.COMPUTE,
            Address(port=port),
            cluster.realm.ca_certificate,
            admin,
            admin.scopes,
            timeout_s=60,
        )
        async with other:
            endpoint = await make_endpoint(other, ProjectId.new())
            target = await reach(other, endpoint)
        connection = await log_in(target, endpoint)
        family = below(process.pid)
        agents = [each.pid for each in family if each.command.startswith("python")]
        assert agents
        for pid in agents:
            os.kill(pid, signal.SIGSTOP)  # an agent that hangs goes as well: the kernel sees to it
        process.kill()
        with pytest.raises(CONNECTION_LOST):
            await query_until_it_fails(connection, 10)
        connection.terminate()
        assert endpoint.password not in log.read_text()
        await wait_until(lambda: not any(each.exists for each in family))
        process.wait()
        leftovers = [cluster.settings.runtime_dir / "2" / "in-1", cluster.settings.log_dir / "2" / "in-1.log"]
        leftovers[0].mkdir(exist_ok=True)  # as of an agent that could not clean up
        leftovers[1].touch()
        volumes = (cluster.settings.log_dir / "2" / "volumes").readlink()
        leftovers.append(volumes / "keylake-1" / "pgdata")  # where there are no namespaces
        leftovers[2].mkdir(parents=True)
        with log.open("wb") as output:
            process = await asyncio.to_thread(subprocess.Popen, argv, stderr=output)
        await wait_until(lambda: "compute manager is up" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        assert not any(each.exists() for each in leftovers)
    finally:
        process.kill()
        process.wait()


async def test_an_unused_compute_is_suspended(metadata_dsn: str) -> None:
    """Never under a statement or a transaction, never when told so; a session that is idle does not keep it."""
    with tempfile.TemporaryDirectory(prefix="kl-") as scratch:
        async with (
            compute_cluster(Path(scratch), metadata_dsn, idle_poll_interval_s=0.1) as cluster,
            cluster.client() as client,
        ):
            endpoint = await make_endpoint(client, ProjectId.new())
            path = f"/v1/endpoints/{endpoint.endpoint_id}"
            assert endpoint.suspend_after_s == cluster.settings.suspend_after_s == 300

            async def suspend_after(seconds: float | None) -> None:
                body = ChangeEndpoint(suspend_after_s=seconds)
                changed = await client.call(Endpoint, "PATCH", path, body=body)
                assert changed.suspend_after_s == (300 if seconds is None else seconds)

            async def stopped() -> bool:
                return (await state_of(client, endpoint)).state is EndpointState.STOPPED

            connection = await log_in(await reach(client, endpoint), endpoint)
            await connection.execute("CREATE TABLE t (a int)")
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("INSERT INTO t VALUES (1)")
            await suspend_after(0.3)
            await asyncio.sleep(1)  # three times as long: nothing may happen
            # Nor when the transaction was begun after the compute had last said that nobody uses it.
            [run] = cluster.manager._runs.values()
            resumed = run.resumed
            run._unused.set_result(None)
            await asyncio.wait_for(resumed, 20)
            target = await reach(client, endpoint)
            assert target.instance_id == run.instance_id
            await connection.execute("SELECT pg_sleep(1)")
            await suspend_after(0)
            await transaction.commit()
            await asyncio.sleep(1)
            assert await connection.fetchval("SELECT count(*) FROM t") == 1, "it was told never to"

            # Nor while somebody waits without a transaction: for the time, for a lock, for a quorum.
            reports: list[float] = []
            agent = run._agent
            assert agent is not None
            on_idle = agent.on_idle

            def reported(idle_s: float) -> None:
                reports.append(idle_s)
                on_idle(idle_s)

            agent.on_idle = reported

            async def is_kept_by(waiting: asyncio.Task[Any]) -> None:
                await wait_until(lambda: reports and reports[-1] < 0.1)
                reports.clear()
                await suspend_after(0.3)
                await wait_until(lambda: len(reports) > 8)  # much longer than that
                assert not waiting.done()
                now = await state_of(client, endpoint)
                assert (now.state, now.instance_id) == (EndpointState.RUNNING, target.instance_id)
                await suspend_after(0)

            other = await log_in(target, endpoint)
            waiting = asyncio.create_task(connection.execute("SELECT pg_sleep(60)"))
            await is_kept_by(waiting)
            await other.execute("SELECT pg_cancel_backend($1)", connection.get_server_pid())
            with pytest.raises(asyncpg.QueryCanceledError):
                await waiting
            await other.execute("SELECT pg_advisory_lock(1)")  # its session is idle from here on
            waiting = asyncio.create_task(connection.execute("SELECT pg_advisory_lock(1)"))
            await is_kept_by(waiting)
            await other.execute("SELECT pg_advisory_unlock(1)")
            await waiting
            for safekeeper in cluster.safekeepers[1:]:
                await safekeeper.stop()
            waiting = asyncio.create_task(connection.execute("INSERT INTO t VALUES (2)"))
            await is_kept_by(waiting)
            for safekeeper in cluster.safekeepers[1:]:
                await safekeeper.start()
            await asyncio.wait_for(waiting, 20)
            assert await other.fetchval("SELECT count(*) FROM t") == 2
            await other.close()
            await suspend_after(0.3)

            await wait_until(stopped, 20)  # although the session is still connected
            assert (await state_of(client, endpoint)).reason == "suspended: nobody used it for 0.3 s"
            with pytest.raises(CONNECTION_LOST):
                await connection.fetchval("SELECT 1")
