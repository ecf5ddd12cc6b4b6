"""What a compute itself has on its volume, to hold the pageserver's pages against.

Shared buffers are newer than files, and a user may not CHECKPOINT. But a shutdown checkpoint writes everything. So the
agent is stopped (SIGSTOP), which keeps the volume; the postmaster is shut down (SIGINT); the files are read; and the
agent goes on, finds its Postgres ended, and clears up. No other page can have changed in between, and the last record
of the log is that checkpoint.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import asyncpg
from pydantic import BaseModel

from keylake.cluster import Cluster, RunningProject
from shared.api.compute import EndpointState
from shared.api.pageserver import TimelineInfo
from shared.api.safekeeper import TimelineStatus
from shared.auth import Scope, Service, TokenIssuer
from shared.config import Address
from shared.errors import KeylakeError
from shared.http import ServiceClient
from shared.keyspace import Fork, RelTag
from shared.wal.control import ControlFile, DbState
from tests.cluster.processes import compute_of
from tests.fixtures.waiting import wait_until

PAGE = 8192
SHUT_DOWN_LEASE_S = 60.0
"""For who uses `shut_down`: a lazy volume lets nothing out when its agent has said nothing for as long as a lease."""
Session: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
M = TypeVar("M", bound=BaseModel)
_FORKS = {None: Fork.MAIN, "_vm": Fork.VISIBILITY_MAP, "_init": Fork.INIT, "_fsm": Fork.FSM}
_FILE = re.compile(r"([0-9]+)(_fsm|_vm|_init)?(?:\.([0-9]+))?")

STATE = ("pg_xact/*", "pg_multixact/*/*", "pg_twophase/*", "global/pg_filenode.map", "base/*/pg_filenode.map")

ACCESS_METHODS = """
select case when c.relisshared then 0 else d.oid end as db, pg_relation_filenode(c.oid) as rel,
       coalesce(a.amname, c.relkind::text) as method
from pg_class c left join pg_am a on a.oid = c.relam, pg_database d
where d.datname = current_database() and pg_relation_filenode(c.oid) is not null
"""


@dataclass(frozen=True, slots=True)
class Primary:
    """A compute's files at its shutdown checkpoint, which ends at `lsn`."""

    lsn: int
    term: int
    forks: Mapping[RelTag, bytes]
    """Without FSMs; of unlogged relations only the init forks: nothing else of them outlives a compute."""
    methods: Mapping[tuple[int, int], str]
    """(database, relfilenumber) → access method, S for sequences."""
    state: Mapping[str, bytes]
    """Files outside of relations that have a history, by their names below the data directory (STATE)."""


async def connect(project: RunningProject, database: str | None = None) -> Session:
    """Through the proxy; starts the compute."""
    arguments = project.connection.asyncpg_arguments()
    if database is not None:
        arguments["database"] = database
    return await asyncpg.connect(**arguments, timeout=60, command_timeout=120)


async def tag_of(connection: Session, name: str) -> RelTag:
    """The main fork of a relation of the current database."""
    row = await connection.fetchrow(
        "select oid, pg_relation_filenode($1::text::regclass) as rel from pg_database"
        " where datname = current_database()",
        name,
    )
    assert row is not None
    return RelTag(1663, row["oid"], row["rel"], Fork.MAIN)


async def shut_down(cluster: Cluster, project: RunningProject, databases: list[str]) -> Primary:
    """Shut the endpoint's Postgres down and take its files. `databases`: whose relations' access methods to learn."""
    endpoint_id = project.endpoint.endpoint_id
    methods: dict[tuple[int, int], str] = {}
    for database in databases:
        connection = await connect(project, database)
        methods |= {(row["db"], row["rel"]): row["method"] for row in await connection.fetch(ACCESS_METHODS)}
        await connection.close()
    term = (await cluster.client.endpoint(endpoint_id)).term
    compute = await compute_of(cluster, endpoint_id)
    compute.pause()
    try:
        os.kill(compute.postmaster.pid, signal.SIGINT)
        await wait_until(lambda: not compute.postmaster.exists)
        forks = await asyncio.to_thread(read_forks, compute.pgdata_from_here)
        state = await asyncio.to_thread(read_state, compute.pgdata_from_here)
        control = ControlFile.parse((compute.pgdata_from_here / "global/pg_control").read_bytes())
    finally:
        compute.resume()
    await compute.gone()
    await wait_until(lambda: stopped(cluster, project))
    assert control.state is DbState.SHUTDOWNED
    info = await caught_up(cluster, project)
    assert info.prev_record_lsn.value == control.checkpoint_lsn, "the log must end with the shutdown checkpoint"
    return Primary(info.last_record_lsn.value, term, forks, methods, state)


def read_forks(pgdata: Path) -> dict[RelTag, bytes]:
    """Every relation fork of a data directory that has a history."""
    forks: dict[RelTag, bytes] = {}
    databases = [(1664, 0, pgdata / "global")]
    databases += [(1663, int(d.name), d) for d in (pgdata / "base").iterdir() if d.name.isdigit()]
    for spc, db, directory in databases:
        names = {f.name for f in directory.iterdir()}
        for name in names:
            match = _FILE.fullmatch(name)
            if match is None:
                continue  # temporary relations, pg_filenode.map, …
            rel, suffix, segment = match.groups()
            assert segment is None, "no relation here reaches 1 GiB"
            fork = _FORKS[suffix]
            if fork is Fork.INIT or (fork is not Fork.FSM and f"{rel}_init" not in names):
                forks[RelTag(spc, db, int(rel), fork)] = (directory / name).read_bytes()
    return forks


def read_state(pgdata: Path) -> dict[str, bytes]:
    return {str(file.relative_to(pgdata)): file.read_bytes() for pattern in STATE for file in pgdata.glob(pattern)}


async def stopped(cluster: Cluster, project: RunningProject) -> bool:
    return (await cluster.client.endpoint(project.endpoint.endpoint_id)).state is EndpointState.STOPPED


async def safekeeper_timelines(cluster: Cluster, project: RunningProject) -> dict[int, TimelineStatus]:
    """By the safekeepers' index; those that do not answer are left out."""
    found: dict[int, TimelineStatus] = {}
    for index in range(len(cluster.client.addresses.safekeepers)):
        try:
            status = await cluster.client.safekeeper_status(index)
        except KeylakeError:
            continue
        for timeline in status.timelines:
            if timeline.timeline_id == project.timeline.timeline_id:
                found[index] = timeline
    return found


async def pageserver_timeline(cluster: Cluster, project: RunningProject) -> TimelineInfo | None:
    """None while the pageserver does not serve it."""
    try:
        status = await cluster.client.pageserver_status()
    except KeylakeError:
        return None
    return next((t for t in status.timelines if t.timeline_id == project.timeline.timeline_id), None)


async def call_pageserver(
    cluster: Cluster, project: RunningProject, verb: str, answer: type[M], body: BaseModel | None = None
) -> M:
    """POST …/timelines/<the project's>:<verb>, as the compute manager could. Raises the pageserver's error."""
    client = ServiceClient(
        Service.PAGESERVER,
        Address(port=cluster.ports.pageserver),
        cluster.layout.ca_certificate,
        TokenIssuer.load(cluster.layout.keys / "compute.json"),
        frozenset({Scope.STORAGE_ADMIN}),
        timeout_s=60,
    )
    async with client:
        project_id, timeline_id = project.project.project_id, project.timeline.timeline_id
        path = f"/v1/projects/{project_id}/timelines/{timeline_id}:{verb}"
        return await client.call(answer, "POST", path, body=body, project_id=project_id)


async def caught_up(cluster: Cluster, project: RunningProject, timeout_s: float = 60.0) -> TimelineInfo:
    """Returns when the pageserver has ingested everything that a majority of the safekeepers holds."""

    async def look() -> TimelineInfo | None:
        ends = sorted(t.flush_lsn for t in (await safekeeper_timelines(cluster, project)).values())
        info = await pageserver_timeline(cluster, project)
        return info if info is not None and len(ends) > 1 and info.last_record_lsn >= ends[-2] else None

    info = await wait_until(look, timeout_s)
    assert isinstance(info, TimelineInfo)
    return info
