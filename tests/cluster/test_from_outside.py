"""Programs that know nothing of ours, at a whole cluster: a driver of another language, a generator of requests."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
import sqlalchemy
from sqlalchemy.ext.asyncio import create_async_engine

from keylake.layout import PROXY_DOMAIN
from keylake.roles_table import http_operations
from shared.api.compute import EndpointState
from shared.auth import Service, TokenIssuer
from shared.authorize import Operation
from shared.tls import client_context, service_host_name
from tests.cluster_roles.place import Place, place_with_everybody, site_of, unknown_ids
from tests.fixtures.npm import NotHereError, npm_packages
from tests.fixtures.openapi import Explorer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Place]:
    async with place_with_everybody() as found:
        yield found


async def test_node_postgres(place: Place, tmp_path: Path) -> None:
    """Of a project that nobody has used: its first connection wakes the compute."""
    try:
        packages = await asyncio.to_thread(npm_packages, "drivers")
    except NotHereError as error:
        error.give_up()
    running = place.mine.running
    connection, endpoint_id = running.connection, running.endpoint.endpoint_id
    assert (await place.owner.endpoint(endpoint_id)).state is EndpointState.STOPPED
    settings = tmp_path / "settings.json"
    settings.write_text(
        json.dumps(
            {
                "host": "127.0.0.1",
                "port": connection.port,
                "name": f"{endpoint_id}.{PROXY_DOMAIN}",
                "endpoint": str(endpoint_id),
                "user": connection.user,
                "password": connection.password,
                "database": connection.database,
                "ca": str(connection.ca_certificate),
            }
        )
    )
    done = await asyncio.to_thread(
        subprocess.run,
        ["node", str(packages / "session.mjs"), str(settings)],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "ok a pool", done.stdout
    assert (await place.owner.endpoint(endpoint_id)).state is EndpointState.RUNNING


async def test_sqlalchemys_pools_outlive_a_compute(place: Place) -> None:
    """Of psycopg and asyncpg, which ask before they lend a connection out: that wakes the next compute."""
    running = await place.cluster.create_project(f"pools {secrets.token_hex(4)}")
    connection, endpoint_id = running.connection, running.endpoint.endpoint_id
    arguments = connection.asyncpg_arguments()
    by_name = {
        "host": f"{endpoint_id}.{PROXY_DOMAIN}",
        "hostaddr": "127.0.0.1",
        "port": connection.port,
        "user": connection.user,
        "password": connection.password,
        "dbname": connection.database,
        "sslmode": "verify-full",
        "sslrootcert": str(connection.ca_certificate),
    }
    engines = [
        create_async_engine(sqlalchemy.URL.create(f"postgresql+{driver}"), connect_args=how, pool_pre_ping=True)
        for driver, how in (("psycopg", by_name), ("asyncpg", arguments))
    ]
    items = sqlalchemy.Table(
        "items",
        sqlalchemy.MetaData(),
        sqlalchemy.Column("id", sqlalchemy.Integer, primary_key=True),
        sqlalchemy.Column("name", sqlalchemy.Text),
    )
    wanted, instances = [], set()
    for round_number in range(2):
        for engine in engines:
            async with engine.begin() as session:
                await session.run_sync(items.metadata.create_all)
                names = [f"{round_number} {engine.driver} {n}" for n in range(100)]
                await session.execute(items.insert(), [{"name": name} for name in names])
            wanted += names
            async with engine.connect() as session:
                result = await session.stream(sqlalchemy.select(items.c.name).order_by(items.c.id))
                assert [row.name async for row in result] == wanted
        endpoint = await place.owner.endpoint(endpoint_id)
        instances.add(endpoint.instance_id)
        await place.owner.stop_endpoint(endpoint_id)
    assert len(instances) == 2
    for engine in engines:
        await engine.dispose()


GO_WHERE_THEY_ARE_TOLD = {
    ("keymanager", "POST", "/v1/key-configurations"),
    ("keymanager", "POST", "/v1/key-configurations/{key_configuration_id}:replace"),
    ("safekeeper", "POST", "/v1/projects/{project_id}/timelines/{timeline_id}:elected"),
    ("safekeeper", "POST", "/v1/projects/{project_id}/timelines/{timeline_id}:stream"),
}
"""Their bodies name hosts, and a request that is made up must not reach for one. cluster_bad_input has bad ones."""


MAY_WAIT = {("POST", "/v1/projects/{project_id}/timelines/{timeline_id}:gc")}
"""A pageserver removes nothing right after its start: who held an LSN lease may not have asked again yet."""


@asynccontextmanager
async def explorer_of(place: Place, service: Service) -> AsyncIterator[Explorer]:
    """With a project of its own."""
    cluster = place.cluster
    site = await site_of(cluster, await cluster.create_project(f"explored {secrets.token_hex(4)}"))
    issuers = [TokenIssuer.load(path) for path in sorted(cluster.layout.keys.glob("*.json")) if path.stem != "trust"]

    def token(operation: Operation) -> str:
        scope, issuer = next((s, i) for s in operation.any_of for i in issuers if s in i.scopes)
        return issuer.issue(service, [scope])

    extensions = {"sni_hostname": service_host_name(service.value)}
    document = (await place.http[service].get("/openapi.json", extensions=extensions)).json()
    verify = client_context(cluster.layout.ca_certificate)
    with httpx.Client(base_url=place.http[service].base_url, verify=verify, trust_env=False, timeout=60) as http:
        yield Explorer(document, http, extensions, token, (site.ids, unknown_ids()), MAY_WAIT)


@pytest.mark.parametrize("service", list(http_operations()), ids=lambda service: service.value)
async def test_answers_are_as_the_openapi_says(place: Place, service: Service) -> None:
    """Whatever is asked: an answer that is described, none that is the service's fault, and a no to what it forbids."""
    operations = [
        each
        for each in http_operations()[service]
        if (service.value, each.method, each.path) not in GO_WHERE_THEY_ARE_TOLD
    ]
    async with explorer_of(place, service) as explorer:
        statuses = await asyncio.to_thread(explorer.explore, operations)
    assert statuses[200] >= len(operations) // 3, statuses
    if service is not Service.PROXY:  # nothing can be asked of it but its status
        assert {400, 404} <= statuses.keys(), statuses


async def test_an_answer_that_is_not_described_is_noticed(place: Place) -> None:
    async with explorer_of(place, Service.COMPUTE) as explorer:
        [status] = [each for each in http_operations()[Service.COMPUTE] if each.path == "/v1/status"]
        assert await asyncio.to_thread(explorer.explore, [status]) == {200: 1}
        promised = explorer.document["components"]["schemas"]["ManagerStatus"]
        promised["required"].append("never")
        with pytest.raises(BaseExceptionGroup, match="1 wrong answers"):
            await asyncio.to_thread(explorer.explore, [status])
        promised["required"].pop()
        # And what it says is forbidden, but is taken.
        change = next(each for each in http_operations()[Service.COMPUTE] if each.method == "PATCH")
        forbidden = explorer.document["components"]["schemas"]["ChangeEndpoint"]["properties"]
        forbidden["suspend_after_s"] = {"type": "number", "maximum": 0}
        with pytest.raises(BaseExceptionGroup, match="1 wrong answers"):
            await asyncio.to_thread(replace(explorer, effort=20).explore, [change])
