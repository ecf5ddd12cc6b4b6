"""Every page of a running database, read over the wire, against the page that its own compute has."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import struct
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from keylake.cluster import Cluster, RunningProject
from keylake.demo.pgbench import run_pgbench
from pageserver.redo.build import prepare
from pageserver.redo.worker import RedoWorker
from shared.api.pageserver import Compact, Garbage, LeaseLsn, LsnLease, RetentionWindow, TimelineInfo
from shared.errors import InvalidInputError, NotFoundError, UnavailableError
from shared.keyspace import Fork, RelTag
from shared.lsn import Lsn
from shared.wal.rmgr import RmgrId
from tests.cluster.pages import PageClient, page_client
from tests.cluster.primary import (
    PAGE,
    SHUT_DOWN_LEASE_S,
    Primary,
    Session,
    call_pageserver,
    caught_up,
    connect,
    shut_down,
    tag_of,
)
from tests.cluster.processes import compute_of
from tests.fixtures.forked_cluster import ForkedCluster
from tests.fixtures.redo_history import INSERT, SCHEMA
from tests.fixtures.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

ZEROS = bytes(PAGE)
DATABASES = ["app", "postgres", "template1", "logged", "copied"]
FIRST_NORMAL_OID = 16384
LSN_LEASE_S = 20.0
RMGR_OF = {
    "heap": RmgrId.HEAP,
    "btree": RmgrId.BTREE,
    "hash": RmgrId.HASH,
    "gin": RmgrId.GIN,
    "gist": RmgrId.GIST,
    "spgist": RmgrId.SPGIST,
    "brin": RmgrId.BRIN,
}


@dataclass(slots=True)
class Place:
    """A cluster with a database in it that has lived, and the files that its first compute left."""

    cluster: Cluster
    project: RunningProject
    redo: RedoWorker
    relations: Relations
    first: Primary


@dataclass(slots=True)
class Relations:
    """Those that some test is about."""

    dropped: list[RelTag]
    unlogged: list[RelTag]
    """Their main forks, before the compute ended."""
    truncated: RelTag
    holed: RelTag


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Place]:
    # Small layers, so that most pages come from sealed files and some from memory.
    settings: dict[str, dict[str, Any]] = {
        "pageserver": {"checkpoint_distance_mb": 4, "compaction_l0_layers": 3, "lsn_lease_s": LSN_LEASE_S},
        "compute": {"poll_interval_s": 0.2},
        "keymanager": {"lease_ttl_s": SHUT_DOWN_LEASE_S},
    }
    async with ForkedCluster(settings=settings) as cluster:
        project = await cluster.create_project("pages")
        redo = await RedoWorker.start(await prepare())
        try:
            relations = await live(project)
            yield Place(cluster, project, redo, relations, await shut_down(cluster, project, DATABASES))
        finally:
            await redo.close()


# --- the life of the database ---


async def live(project: RunningProject) -> Relations:
    """Everything that a user may do to pages."""
    await run_pgbench(project.connection, "-i", "-s", "1", "-I", "dtGvp", "-q")
    await run_pgbench(project.connection, "-n", "-c", "4", "-t", "100")
    connection = await connect(project)

    async def one_by_one(statements: str) -> None:
        """VACUUM, CREATE DATABASE and the like refuse to be one of several statements of a query."""
        for statement in statements.split("; "):
            await connection.execute(statement)

    await connection.execute(SCHEMA)
    await connection.execute("select setseed(0.5)")
    for number in range(2):
        await connection.execute(INSERT, number * 1500, number * 1500 + 1499)
        await connection.execute("insert into dup select g % 5, repeat('x', g % 90) from generate_series(1, 3000) g")
        await connection.execute(
            "insert into small select g, 0 from generate_series($1::int, $2::int) g", number * 300, number * 300 + 299
        )
        await connection.execute("insert into wide select g, repeat('z', 3000) from generate_series(1, 300) g")
        await one_by_one("vacuum (freeze, analyze) t; vacuum small; vacuum dup")
        # All-visible pages change: the visibility map's bits are cleared without naming it.
        await connection.execute("update small set v = v + 1 where id % 3 = 0")
        await connection.execute("update t set k = k + 1, txt = txt || 'y' where id % 11 = 0")
        await connection.execute("delete from t where id % 13 = 0")
        await connection.execute("select count(*) from (select 1 from dup where v = 1 for share) s")
        # Truncated, then grown again: no block may show its life before.
        await connection.execute("delete from wide where id > 20")
        await connection.execute("vacuum (truncate) wide")
        await connection.execute("insert into wide select g, repeat('w', 500) from generate_series(1, 2000) g")
        await connection.execute("select nextval('s') from generate_series(1, 50)")
    # Truncated, and not grown again.
    await one_by_one("create table shrunk as select generate_series(1, 20000) g; delete from shrunk where g > 1000")
    await connection.execute("vacuum (truncate) shrunk")
    truncated = await tag_of(connection, "shrunk")
    async with connection.transaction():
        for number in range(100):
            async with connection.transaction():
                await connection.execute("insert into small values ($1, 1)", 100_000 + number)
    await connection.execute("begin; create table aborted as select generate_series(1, 1000) g; rollback")
    await one_by_one("create table dropped as select generate_series(1, 1000) g; create index on dropped (g)")
    await connection.execute("vacuum dropped")
    dropped = await tag_of(connection, "dropped")
    gone = [
        dropped,
        RelTag(dropped.spc, dropped.db, dropped.rel, Fork.VISIBILITY_MAP),
        await tag_of(connection, "dropped_g_idx"),
        await tag_of(connection, "dup"),  # TRUNCATE gives it a new file
    ]
    await connection.execute("drop table dropped")
    await connection.execute("truncate dup; insert into dup select 1, 'again' from generate_series(1, 100)")
    await lock_rows(project, connection)
    if await connection.fetchval("select current_setting('max_prepared_transactions')::int") > 0:
        await connection.execute("begin; insert into dup values (7, 'p'); prepare transaction 'committed'")
        await connection.execute("commit prepared 'committed'")
        await connection.execute("begin; insert into dup values (8, 'left'); prepare transaction 'left'")
    await connection.execute("insert into u select g, repeat('u', 100) from generate_series(1, 500) g")
    unlogged = [await tag_of(connection, name) for name in ("u", "u_pkey")]
    holed = await leave_a_hole(connection)
    await one_by_one("create database logged strategy wal_log; create database copied strategy file_copy")
    await one_by_one("create database gone strategy file_copy; drop database gone")
    in_copy = await connect(project, "copied")
    await in_copy.execute("create table c as select g, md5(g::text) from generate_series(1, 2000) g")
    await in_copy.execute("vacuum full pg_class")
    await in_copy.close()
    await one_by_one("vacuum full pg_type; vacuum freeze; create index late on t using gist (r)")
    await connection.execute("cluster small using small_pkey")
    await connection.execute("update small set v = 5 where id < 10")
    await connection.close()
    return Relations(gone, unlogged, truncated, holed)


async def lock_rows(project: RunningProject, connection: Session) -> None:
    """Multixacts: of two lockers, and of lockers and an update."""
    other = await connect(project)
    for number in range(50):
        async with connection.transaction():
            await connection.execute("select 1 from small where id = $1 for key share", number)
            async with other.transaction():
                await other.execute("select 1 from small where id = $1 for key share", number)
                await other.execute("update small set v = v + 1 where id = $1", number)
    await other.close()


async def leave_a_hole(connection: Session) -> RelTag:
    """A relation with blocks that exist and were never written.

    A hash index that doubles makes room for all the new buckets at once, writes the last block of them, and comes to
    the others one split at a time (_hash_alloc_buckets). There is one split for some 300 rows.
    """
    await connection.execute("create table hashed (v int); create index hashed_v on hashed using hash (v)")
    await connection.execute("insert into hashed select generate_series(1, 22000)")
    return await tag_of(connection, "hashed_v")


# --- comparing ---


async def compare(place: Place, primary: Primary) -> Counter[str]:
    """Every page of every fork. Fails unless all of them are the primary's own."""
    counts: Counter[str] = Counter()
    different: list[str] = []
    async with page_client(place.cluster, place.project) as client:
        for tag, content in primary.forks.items():
            different += await compare_fork(place, primary, client, tag, content, counts)
    assert not different, f"{len(different)} differ: {different[:20]}"
    assert counts["sizes equal"] > 0.95 * len(primary.forks)
    assert counts["pages"] > 5000
    assert counts["equal"] > counts["masked"]
    assert counts["zeros"] > 10
    assert counts["FORK INIT"] > 0
    assert counts["FORK VISIBILITY_MAP"] > 0
    assert {f"METHOD {method}" for method in (*RMGR_OF, "S")} <= counts.keys()
    return counts


async def compare_fork(
    place: Place, primary: Primary, client: PageClient, tag: RelTag, content: bytes, counts: Counter[str]
) -> list[str]:
    """What differs, in words."""
    method = primary.methods.get((tag.db, tag.rel), "heap")
    where = f"{tag.db}/{tag.rel} {tag.fork.name} ({method})"
    size = await client.size(tag, primary.lsn)
    if size is None:
        # Vacuum formats a map page, unlogged, before it knows whether there will be a bit on it: autovacuum comes when
        # it likes.
        return [] if tag.fork is Fork.VISIBILITY_MAP and not has_bits(content) else [f"{where} is not known"]
    # Stock Postgres does not log that it extends a file: behind the last block that a record names there are zeros.
    if size * PAGE > len(content) or content[size * PAGE :].strip(b"\0"):
        return [f"{where} has {size} blocks, the primary {len(content) // PAGE}"]
    counts["sizes equal"] += size * PAGE == len(content)
    for past in (size, size + 1, 0xFFFFFFFF):
        with pytest.raises(NotFoundError):
            await client.page(tag, past, primary.lsn)
    different = []
    for block, page in enumerate(await client.pages(tag, range(size), primary.lsn)):
        expected = content[block * PAGE : (block + 1) * PAGE]
        counts["pages"] += 1
        counts[f"FORK {tag.fork.name}"] += 1
        counts[f"METHOD {method}"] += 1
        counts["zeros"] += expected == ZEROS
        if page == expected:
            counts["equal"] += 1
        elif await equal_masked(place, tag, block, method, page, expected):
            counts["masked"] += 1
        else:
            different.append(f"{where} block {block}")
    return different


def has_bits(visibility_map: bytes) -> bool:
    return any(visibility_map[start + 24 : start + PAGE].strip(b"\0") for start in range(0, len(visibility_map), PAGE))


async def equal_masked(place: Place, tag: RelTag, block: int, method: str, page: bytes, expected: bytes) -> bool:
    """But for what Postgres changes without WAL: hint bits and the like (rm_mask)."""
    if tag.fork is Fork.VISIBILITY_MAP:
        if tag.rel < FIRST_NORMAL_OID:
            # CREATE DATABASE … STRATEGY = wal_log logs map pages as if their content were a hole
            # (RelationCopyStorageUsingBuffer): every replay, Postgres's own too, loses bits. None is made up.
            return not any(mine & ~theirs for mine, theirs in zip(page[24:], expected[24:], strict=True))
        return page[24:] == expected[24:]
    if method == "S":
        # Values are logged up to 32 ahead of what was given out (SEQ_LOG_VALS).
        (value, ahead), (expected_value, expected_ahead) = sequence_values(page), sequence_values(expected)
        return ahead == 0 and value == expected_value + expected_ahead
    if method == "spgist" and block == 0:
        return page[24:28] == expected[24:28]  # the rest is a cache (SpGistUpdateMetaPage)
    rmgr = RMGR_OF.get(method, RmgrId.HEAP)
    return await place.redo.mask(rmgr, block, page) == await place.redo.mask(rmgr, block, expected)


def sequence_values(page: bytes) -> tuple[int, int]:
    """(last_value, log_cnt) of the one tuple of a sequence."""
    (line_pointer,) = struct.unpack_from("<I", page, 24)
    offset = line_pointer & 0x7FFF
    value, log_count = struct.unpack_from("<qq", page, offset + page[offset + 22])
    return value, log_count


# --- tests: the fixture's database, at its first LSN, whatever happens around it ---


async def test_every_page_is_the_primarys_own(place: Place) -> None:
    info = await caught_up(place.cluster, place.project)
    assert info.layers > 2, "there must be sealed layers to read from"
    await compare(place, place.first)


async def test_the_comparison_would_notice_one_bit(place: Place) -> None:
    """Of a user's row: masks hide hint bits, not data."""
    primary = place.first
    tag = next(t for t, content in primary.forks.items() if content.count(b"again") == 100)
    content = bytearray(primary.forks[tag])
    content[content.index(b"again")] ^= 1
    async with page_client(place.cluster, place.project) as client:
        assert not await compare_fork(place, primary, client, tag, primary.forks[tag], Counter())
        assert len(await compare_fork(place, primary, client, tag, bytes(content), Counter())) == 1
        longer = primary.forks[tag] + bytes(content[:PAGE])
        assert len(await compare_fork(place, primary, client, tag, longer, Counter())) == 1


async def test_after_a_crash_of_the_pageserver(place: Place) -> None:
    await place.cluster.service("pageserver").kill()
    await place.cluster.service("pageserver").start()
    await caught_up(place.cluster, place.project)
    await compare(place, place.first)


async def test_after_the_pageserver_has_lost_its_disk(place: Place) -> None:
    pageserver = place.cluster.service("pageserver")
    await pageserver.kill()
    await asyncio.to_thread(shutil.rmtree, place.cluster.layout.pageserver_cache)
    await pageserver.start()
    await caught_up(place.cluster, place.project)
    await compare(place, place.first)


async def test_after_the_compute_crashed_and_another_went_on(place: Place) -> None:
    connection = await connect(place.project)
    assert await connection.fetchval("select count(*) from u") == 0, "an unlogged table is empty in a new compute"
    before = (await place.cluster.client.endpoint(place.project.endpoint.endpoint_id)).term
    await connection.execute(INSERT, 10_000, 10_999)
    await connection.execute("update small set v = v + 1")
    # In the middle of a transaction, with half a batch of records on the way.
    await connection.execute("begin; delete from t where id % 3 = 0; insert into wide select g, 'lost' from t, "
                             "generate_series(1, 2) g")  # fmt: skip
    compute = await compute_of(place.cluster, place.project.endpoint.endpoint_id)
    await place.cluster.client.kill_endpoint(place.project.endpoint.endpoint_id)
    await compute.gone()
    connection.terminate()
    connection = await connect(place.project)
    assert await connection.fetchval("select count(*) from wide where big = 'lost'") == 0
    await connection.execute("vacuum (freeze) t")
    await connection.execute(INSERT, 20_000, 20_999)
    await connection.execute("insert into u values (1, 'again')")
    await connection.close()
    second = await shut_down(place.cluster, place.project, DATABASES)
    assert second.term > before >= place.first.term
    assert second.lsn > place.first.lsn
    await compare(place, second)
    # And the past stays what it was.
    await compare(place, place.first)


async def test_after_compaction_and_garbage_collection(place: Place) -> None:
    """Pages at random LSNs of a long mixed history are what they were, and the primary's are the primary's."""
    rng = random.Random(6)
    info = await caught_up(place.cluster, place.project)
    async with page_client(place.cluster, place.project) as client:
        samples: dict[tuple[RelTag, int, int], bytes] = {}
        tags = list(place.first.forks)
        while len(samples) < 1000:
            lsn = rng.randrange(info.oldest_lsn.value, place.first.lsn + 1)
            tag = rng.choice(tags)
            size = await client.size(tag, lsn)
            for block in rng.sample(range(size or 0), min(size or 0, 3)):
                samples[tag, block, lsn] = await client.page(tag, block, lsn)

        async def gc_may_run() -> bool:
            with contextlib.suppress(UnavailableError):  # leases from before the pageserver's start might be held
                await call_pageserver(place.cluster, place.project, "gc", Garbage)
                return True
            return False

        async def same(at_least_lsn: int) -> int:
            """Of the samples from there on."""
            kept = {key: page for key, page in samples.items() if key[2] >= at_least_lsn}
            got = await asyncio.gather(*(client.page(*key) for key in kept))
            assert got == list(kept.values())
            return len(kept)

        compacted = await call_pageserver(place.cluster, place.project, "compact", TimelineInfo, Compact(force=True))
        assert compacted.l0_layers == 0
        assert await same(info.oldest_lsn.value) == len(samples)
        # Half of this history becomes too old, but for one version that somebody has leased.
        leased = min(lsn for _, _, lsn in samples)
        cutoff = (leased + place.first.lsn) // 2
        await wait_until(gc_may_run, LSN_LEASE_S * 2)
        await call_pageserver(place.cluster, place.project, "lease-lsn", LsnLease, LeaseLsn(read_lsn=Lsn(leased)))
        end = (await caught_up(place.cluster, place.project)).remote_consistent_lsn.value
        window = RetentionWindow(lsn_bytes=end - cutoff, age_s=0)
        await call_pageserver(place.cluster, place.project, "retention", TimelineInfo, window)
        garbage = await call_pageserver(place.cluster, place.project, "gc", Garbage)
        assert garbage.oldest_lsn.value == cutoff
        assert 100 < await same(cutoff) < len(samples)
        for (tag, block, lsn), page in samples.items():
            if lsn == leased:
                assert await client.page(tag, block, lsn) == page
        for lsn in (leased + 1, cutoff - 1):
            with pytest.raises(InvalidInputError, match="not kept any more"):
                await client.size(tags[0], lsn)
        # And no further, whatever other tests write.
        window = RetentionWindow(lsn_bytes=1 << 40, age_s=0)
        await call_pageserver(place.cluster, place.project, "retention", TimelineInfo, window)
    await compare(place, place.first)


async def test_blocks_that_were_never_written_are_zeros(place: Place) -> None:
    async with page_client(place.cluster, place.project) as client:
        size = await client.size(place.relations.holed, place.first.lsn)
        assert size is not None
        pages = await client.pages(place.relations.holed, range(size), place.first.lsn)
        assert pages.count(ZEROS) > 10
        assert pages[-1] != ZEROS, "the last block of the doubled index is written"
        with pytest.raises(NotFoundError):
            await client.page(place.relations.holed, size, place.first.lsn)


async def test_what_was_truncated_away_is_gone(place: Place) -> None:
    """The blocks have a past, and it must not show."""
    async with page_client(place.cluster, place.project) as client:
        size = await client.size(place.relations.truncated, place.first.lsn)
        assert size == len(place.first.forks[place.relations.truncated]) // PAGE
        assert 0 < size < 20
        for block in (size, size + 10, size + 60):
            with pytest.raises(NotFoundError):
                await client.page(place.relations.truncated, block, place.first.lsn)


async def test_dropped_and_unlogged_relations_have_no_pages(place: Place) -> None:
    async with page_client(place.cluster, place.project) as client:
        for tag in (*place.relations.dropped, *place.relations.unlogged):
            assert tag not in place.first.forks
            assert await client.size(tag, place.first.lsn) is None, tag
            with pytest.raises(NotFoundError):
                await client.page(tag, 0, place.first.lsn)
        for tag in place.relations.unlogged:
            init = RelTag(tag.spc, tag.db, tag.rel, Fork.INIT)
            size = await client.size(init, place.first.lsn)
            assert size == len(place.first.forks[init]) // PAGE
