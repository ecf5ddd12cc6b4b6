"""Postgres is Postgres: what users do, broadly; then the compute is started again from storage, and every page is held
against what its predecessor had on its own volume; and so is the state outside of relations.

Not here: JIT, ICU's collations and XML, which the binary is built without; wraps of xids and multixacts, which no
endpoint goes through (tests/integration/test_ingest_rows.py has them, of a stock primary); free space maps, which are
not kept (ADR 5).
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from keylake.cluster import Cluster, RunningProject
from pageserver.redo.build import prepare
from pageserver.redo.worker import RedoWorker
from shared.keyspace import Fork
from shared.postgres import unprivileged
from tests.cluster import workloads
from tests.cluster.pages import bare_basebackup, page_client
from tests.cluster.primary import PAGE, SHUT_DOWN_LEASE_S, STATE, Primary, connect, shut_down
from tests.cluster.test_pages import has_bits, sequence_values
from tests.fixtures.forked_cluster import ForkedCluster
from tests.fixtures.replay import RMGR_OF, equal_masked

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

DATABASES = ["app", "postgres", "template1", "by_log", "by_copy_renamed", "by_log_again"]


@dataclass(slots=True)
class Place:
    cluster: Cluster
    project: RunningProject
    redo: RedoWorker
    rows: dict[str, int]
    """Of every table that keeps them, as the first compute saw it."""
    first: Primary


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Place]:
    settings: dict[str, dict[str, Any]] = {
        "pageserver": {"checkpoint_distance_mb": 8},
        "compute": {"poll_interval_s": 0.2, "superuser_owners": True},
        "keymanager": {"lease_ttl_s": SHUT_DOWN_LEASE_S},
    }
    async with ForkedCluster(settings=settings) as cluster:
        project = await cluster.create_project("workloads")
        redo = await RedoWorker.start(await prepare())
        try:
            await workloads.run_all(project)
            rows = await count_rows(project)
            yield Place(cluster, project, redo, rows, await shut_down(cluster, project, DATABASES))
        finally:
            await redo.close()


async def count_rows(project: RunningProject) -> dict[str, int]:
    """Sequential scans: what is in the pages, not what an index says."""
    connection = await connect(project)
    await connection.execute("set enable_indexscan = off; set enable_indexonlyscan = off; set enable_bitmapscan = off")
    tables = await connection.fetch(
        "select oid::regclass::text as name from pg_class where relkind in ('r', 'm') and relpersistence = 'p'"
        " and relnamespace = 'public'::regnamespace"
    )
    counts = {}
    for row in tables:
        counts[row["name"]] = await connection.fetchval(f"select count(*) from {row['name']}")  # noqa: S608
    await connection.close()
    return counts


def reaches(fork: Fork, size: int | None, content: bytes) -> bool:
    """Stock Postgres logs neither that it extends a file, nor that it formats a map page which has no bits yet."""
    behind = content[(size or 0) * PAGE :]
    if fork is Fork.VISIBILITY_MAP:
        return not has_bits(behind)
    return size is not None and size * PAGE <= len(content) and not behind.strip(b"\0")


async def differences(place: Place, primary: Primary, counts: Counter[str]) -> list[str]:
    different = await state_differences(place, primary, counts)
    async with page_client(place.cluster, place.project) as client:
        for tag, content in primary.forks.items():
            method = primary.methods.get((tag.db, tag.rel), "heap")
            where = f"{tag.db}/{tag.rel} {tag.fork.name} ({method})"
            size = await client.size(tag, primary.lsn)
            if not reaches(tag.fork, size, content):
                different.append(f"{where} has {size} blocks, the primary {len(content) // PAGE}")
                continue
            if size is None:
                continue
            for block, page in enumerate(await client.pages(tag, range(size), primary.lsn)):
                expected = content[block * PAGE : (block + 1) * PAGE]
                counts.update(("pages", method, tag.fork.name))
                if page == expected:
                    counts["equal"] += 1
                elif method == "S" and tag.fork is Fork.MAIN:
                    (value, ahead), (their_value, their_ahead) = sequence_values(page), sequence_values(expected)
                    step = (value - their_value) // their_ahead if their_ahead else 0
                    # Logged ahead of what was given out: by as many steps as are left.
                    if ahead != 0 or value != their_value + step * their_ahead:
                        different.append(f"{where} block {block}")
                elif not await equal_masked(place.redo, tag.db, tag.fork, block, method, page, expected):
                    different.append(f"{where} block {block}")
    return different


async def state_differences(place: Place, primary: Primary, counts: Counter[str]) -> list[str]:
    """What is kept outside of relations. Zeros at a segment's end may be missing: nobody logs how long its file is."""
    files = await bare_basebackup(place.cluster, place.project, primary.lsn)
    names = {name for name in files if any(fnmatch(name, pattern) for pattern in STATE)}
    counts.update(name.rpartition("/")[0] for name in names)
    return [name for name in sorted(names | primary.state.keys())
            if files.get(name, b"").rstrip(b"\0") != primary.state.get(name, b"").rstrip(b"\0")]  # fmt: skip


async def test_every_page_is_the_primarys_own(place: Place) -> None:
    counts: Counter[str] = Counter()
    assert not await differences(place, place.first, counts)
    assert counts["pages"] > 5000
    assert set(RMGR_OF) <= counts.keys(), "every access method"
    assert counts["INIT"] > 5
    assert counts["VISIBILITY_MAP"] > 0
    # One bit of one row would be noticed.
    tag, content = next((tag, content) for tag, content in place.first.forks.items() if b"over a restart" in content)
    at = content.index(b"over a restart")
    changed = content[:at] + b"O" + content[at + 1 :]
    assert len(await differences(place, replace(place.first, forks={tag: changed}), Counter())) == 1
    # So would one of each kind of state.
    state = place.first.state
    for directory in ("pg_xact", "pg_multixact/offsets", "pg_multixact/members", "pg_twophase", "global", "base/1"):
        name = next(
            name for name, content in state.items() if name.startswith(f"{directory}/") and content.strip(b"\0")
        )
        assert counts[directory] > 0
        altered = bytearray(state[name])
        altered[len(altered.rstrip(b"\0")) - 1] ^= 1
        primary = replace(place.first, forks={}, state={**state, name: bytes(altered)})
        assert await differences(place, primary, Counter()) == [name]


async def test_the_next_compute_has_it_all_and_goes_on(place: Place) -> None:
    rows = await count_rows(place.project)
    assert rows == place.rows
    connection = await connect(place.project)
    assert await connection.fetchval("select count(*) from unlogged") == 0
    await connection.execute("insert into unlogged (id, v) values (1, 'again')")
    await connection.execute("commit prepared 'left'")
    assert await connection.fetchval("select count(*) from log where what = 'over a restart'") == 1
    assert await connection.fetchval("select nextval('counted')") >= 5000
    content = await connection.fetchval("select lo_get(77001)")
    assert len(content) == 32000
    assert content[9000:9011] == b"overwritten"
    # Each index answers as the table does.
    await connection.execute("set enable_seqscan = off")
    assert await connection.fetchval("select count(*) from typed where c_text = 'tt'") == await connection.fetchval(
        "select count(*) filter (where c_text || '' = 'tt') from typed"
    )
    found = await connection.fetch("select id from embedded order by v <-> '[1,1,1]' limit 5")
    assert len(found) == 5
    await connection.execute("insert into typed select * from typed where c_int4 < 50")
    await connection.execute("vacuum (freeze)")
    await connection.execute("reindex database app")
    await connection.close()
    second = await shut_down(place.cluster, place.project, DATABASES)
    assert second.lsn > place.first.lsn
    assert not await differences(place, second, Counter())
    # And the past stays what it was.
    assert not await differences(place, place.first, Counter())


async def test_nobody_makes_a_tablespace(place: Place) -> None:
    """Not even a superuser, and ingest does not get to see the attempt."""
    connection = await connect(place.project)
    # A directory that Postgres may have: it sets its mode to 0700, whatever comes of the rest.
    location = Path(tempfile.mkdtemp(prefix="kl-"))
    unprivileged().give(location)
    for statement in (f"create tablespace elsewhere location '{location}'",
                      "set allow_in_place_tablespaces = on; create tablespace elsewhere location ''"):  # fmt: skip
        for part in statement.split("; "):
            if part.startswith("set"):
                await connection.execute(part)
                continue
            with pytest.raises(asyncpg.FeatureNotSupportedError, match="tablespaces are not supported"):
                await connection.execute(part)
    shutil.rmtree(location)
    assert await connection.fetchval("select count(*) from pg_tablespace") == 2
    await connection.execute("create table behind_it as select 1 v")
    await connection.execute("drop table behind_it")  # the other tests, before and behind, count all tables
    await connection.close()
    status = await place.cluster.client.pageserver_status()
    assert [timeline.fault for timeline in status.timelines] == [""]
