"""A timeline that is started again and again: nothing that was committed is lost, whoever was killed."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from shared.api.compute import Endpoint, EndpointState
from shared.http import ServiceClient
from shared.ids import ProjectId
from tests.fixtures.compute_cluster import ComputeCluster, compute_cluster
from tests.fixtures.keymanager import metadata_dsn, metadata_server
from tests.fixtures.waiting import wait_until
from tests.integration.test_compute_manager import CONNECTION_LOST, log_in, make_endpoint, reach, state_of

__all__ = ["metadata_dsn", "metadata_server"]  # fixtures

pytestmark = pytest.mark.integration


@pytest.fixture
async def cluster(metadata_dsn: str) -> AsyncIterator[ComputeCluster]:
    with tempfile.TemporaryDirectory(prefix="kl-") as scratch:
        async with compute_cluster(Path(scratch), metadata_dsn, pageserver=True) as running:
            yield running


@pytest.fixture
async def client(cluster: ComputeCluster) -> AsyncIterator[ServiceClient]:
    async with cluster.client() as client:
        yield client


async def stopped(client: ServiceClient, endpoint: Endpoint) -> bool:
    return (await state_of(client, endpoint)).state is EndpointState.STOPPED


async def test_committed_rows_survive_stops_kills_and_crashes(cluster: ComputeCluster, client: ServiceClient) -> None:
    endpoint = await make_endpoint(client, ProjectId.new())
    connection: Any = await log_in(await reach(client, endpoint), endpoint)
    await connection.execute("CREATE TABLE t (a int PRIMARY KEY, b text)")
    expected = 0
    for term, ending in enumerate(("stop", "kill", "crash", "stop"), start=1):
        assert (await state_of(client, endpoint)).term == term
        await connection.executemany(
            "INSERT INTO t VALUES ($1, repeat('b', 200))", [(i,) for i in range(expected, expected + 300)]
        )
        expected += 300
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("INSERT INTO t VALUES (-1, 'never committed')")
        if ending == "crash":
            [run] = cluster.manager._runs.values()
            assert run._agent is not None
            os.kill(run._agent.pid, 9)
            await wait_until(lambda: stopped(client, endpoint))
        else:
            await client.request("POST", f"/v1/endpoints/{endpoint.endpoint_id}:{ending}")
        with pytest.raises(CONNECTION_LOST):
            await connection.fetchval("SELECT 1")
        connection = await log_in(await reach(client, endpoint), endpoint)
        assert await connection.fetchval("SELECT count(*) FROM t") == expected
        assert await connection.fetchval("SELECT count(*) FROM t WHERE a = -1") == 0
        assert await connection.fetchval("SELECT sum(length(b)) FROM t") == 200 * expected
    await connection.close()


async def test_an_owner_who_changes_the_password_keeps_the_new_one(
    cluster: ComputeCluster, client: ServiceClient
) -> None:
    endpoint = await make_endpoint(client, ProjectId.new())
    connection = await log_in(await reach(client, endpoint), endpoint)
    await connection.execute("ALTER ROLE app PASSWORD 'my own choice'")
    await connection.close()
    await client.request("POST", f"/v1/endpoints/{endpoint.endpoint_id}:stop")
    changed = endpoint.model_copy(update={"password": "my own choice"})
    connection = await log_in(await reach(client, endpoint), changed)
    assert await connection.fetchval("SELECT current_user") == "app"
    await connection.close()


async def test_revoked_and_restored(cluster: ComputeCluster, client: ServiceClient) -> None:
    endpoint = await make_endpoint(client, ProjectId.new())
    connection = await log_in(await reach(client, endpoint), endpoint)
    await connection.execute("CREATE TABLE t AS SELECT generate_series(1, 500) AS a")
    await cluster.leases.revoke(endpoint.project_id)
    await wait_until(lambda: stopped(client, endpoint))
    await cluster.leases.restore(endpoint.project_id)
    connection.terminate()
    connection = await log_in(await reach(client, endpoint), endpoint)
    assert await connection.fetchval("SELECT count(*) FROM t") == 500
    await connection.close()


async def test_killed_under_load_no_acknowledged_commit_is_lost(cluster: ComputeCluster, client: ServiceClient) -> None:
    """Kills fall into the middle of records: what was flushed then ends in half of one."""
    endpoint = await make_endpoint(client, ProjectId.new())
    connection: Any = await log_in(await reach(client, endpoint), endpoint)
    await connection.execute("CREATE TABLE t (a int PRIMARY KEY, b text)")
    await connection.close()
    rng = random.Random(20261122)
    acknowledged = 0
    for _ in range(6):
        connection = await log_in(await reach(client, endpoint), endpoint)
        assert await connection.fetchval("SELECT count(*) FROM t WHERE a <= $1", acknowledged) == acknowledged
        next_key = 1 + (await connection.fetchval("SELECT coalesce(max(a), 0) FROM t"))
        acknowledged = next_key - 1
        asyncio.get_running_loop().call_later(0.3 + rng.random() / 2, _kill_agents, cluster)
        try:
            while True:
                # Incompressible and long: one record spans pages, and the background writer flushes half of it.
                value = rng.randbytes(rng.randrange(100, 20_000)).hex()
                await connection.execute("INSERT INTO t VALUES ($1, $2)", next_key, value)
                acknowledged, next_key = next_key, next_key + 1
        except CONNECTION_LOST:
            connection.terminate()
        await wait_until(lambda: stopped(client, endpoint))


def _kill_agents(cluster: ComputeCluster) -> None:
    for run in cluster.manager._runs.values():
        if run._agent is not None:
            os.kill(run._agent.pid, 9)


async def test_a_log_that_ends_in_half_a_record_is_cut_there(cluster: ComputeCluster, client: ServiceClient) -> None:
    """Postgres's WAL writer flushes whole pages, so an open transaction leaves half a record on a quorum."""
    endpoint = await make_endpoint(client, ProjectId.new())
    connection: Any = await log_in(await reach(client, endpoint), endpoint)
    await connection.execute("CREATE TABLE t (b text)")
    for _ in range(3):
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("INSERT INTO t SELECT md5(random()::text) FROM generate_series(1, 3000)")

        async def a_quorum_holds_half_a_record() -> bool:
            known = [
                await each.status(endpoint.project_id, endpoint.timeline_id) for each in cluster.services.safekeepers
            ]
            flushed = sorted(status.flush_lsn.value for status in known if status is not None)
            return flushed[-2] % 8192 == 0

        await wait_until(a_quorum_holds_half_a_record)
        _kill_agents(cluster)
        await wait_until(lambda: stopped(client, endpoint))
        connection.terminate()
        connection = await log_in(await reach(client, endpoint), endpoint)
        assert await connection.fetchval("SELECT count(*) FROM t") == 0
    await connection.close()
