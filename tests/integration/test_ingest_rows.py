"""Every special case of ingest, row by row: right with its handling, and noticed without it.

One stock primary does each thing once, across the wraps of all counters (tests/fixtures/special_cases.py). Each row
names what shows it: raw pages, SLRU bytes, files. With all of ingest they are the primary's; with the row's handling
taken out, and nothing else, they are not.

Not here, but in tests/unit/test_ingest_state.py: HEAP2_LOCK_UPDATED that clears a map bit, which no client can bring
about at will; and what is refused. Nowhere: what happens to free space maps, which are not kept (ADR 5).
"""

from __future__ import annotations

import functools
import random
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import lz4.block
import pytest
import pytest_asyncio
import zstandard

from pageserver import native
from pageserver.ingest import WalIngest
from pageserver.ingest_state import Tip
from pageserver.redo.build import prepare
from pageserver.redo.worker import RedoWorker
from pageserver.slru import follows_or_equals
from shared.keyspace import CONTROL_FILE_KEY, Fork, Slru, rel_map_key, two_phase_key
from shared.postgres import PostgresServer, initdb
from shared.wal import rmgr_dbase, rmgr_smgr, rmgr_xact, rmgr_xlog
from shared.wal.control import CheckPoint, ControlFile
from shared.wal.image import uncompressed
from shared.wal.reader import RECORD_HEADER_SIZE_BYTES, RawRecord
from shared.wal.record import ImageFlag, Rel, parse_blocks, parse_header
from shared.wal.rmgr import RmgrId
from shared.wal.rmgr_clog import ClogOp
from shared.wal.rmgr_commit_ts import CommitTsOp
from shared.wal.rmgr_heap import VisibilityClear
from shared.wal.rmgr_multixact import MultixactOp
from shared.wal.rmgr_relmap import UPDATE as RELMAP_UPDATE
from shared.wal.rmgr_replorigin import ReplOriginOp, ReplOriginSet, parse_checkpoint_file
from shared.wal.rmgr_smgr import SmgrOp, TruncateFlag
from shared.wal.rmgr_standby import StandbyOp
from shared.wal.rmgr_xact import XactOp
from shared.wal.rmgr_xlog import XlogOp
from shared.wal.writer import build_record
from tests.fixtures import special_cases
from tests.fixtures.replay import (
    PAGE,
    Imported,
    RelFork,
    Replayed,
    access_methods,
    read_records,
    relation_differences,
    relation_files,
    replay,
    slru_differences,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]


IMAGE_HEADER = struct.Struct("<HHB")
"""XLogRecordBlockImageHeader: length, hole_offset, bimg_info."""


@dataclass(slots=True)
class World:
    """The primary's WAL and files, and what replaying all of it came to."""

    imported: Imported
    batches: list[list[RawRecord]]
    whole: Replayed
    behind: list[str]
    """What our checkpoint lacked where the primary logged one."""
    files: dict[RelFork, bytes]
    rels: dict[str, Rel]
    gone: dict[str, Rel]
    replays: dict[type[WalIngest], tuple[Replayed, list[str]]] = field(default_factory=dict)

    async def replay(self, ingest: type[WalIngest]) -> tuple[Replayed, list[str]]:
        """Once per way of ingesting: many rows share one."""
        if ingest not in self.replays:
            self.replays[ingest] = await self._replay(ingest)
        return self.replays[ingest]

    async def _replay(self, ingest: type[WalIngest]) -> tuple[Replayed, list[str]]:
        watching, behind = watch_checkpoints(ingest)
        whole = self.whole
        replayed = await replay(whole.pgdata, self.imported, self.batches, whole.end_lsn, whole.redo, watching)
        replayed.access_methods = whole.access_methods
        return replayed, behind

    def records(self) -> Iterable[tuple[int, bytes]]:
        return ((end, record) for batch in self.batches for _, end, record in batch)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    root = Path(tempfile.mkdtemp(prefix="keylake-test-", dir="/dev/shm"))
    redo = await RedoWorker.start(await prepare(root / "c"))
    try:
        pgdata = root / "p"
        await initdb(pgdata)
        await special_cases.age(pgdata, root / "s")
        imported = Imported.read(pgdata)
        async with PostgresServer(pgdata, socket_dir=root / "s", conf=special_cases.CONF) as server:
            await special_cases.live_before(server)
        async with PostgresServer(pgdata, socket_dir=root / "s", conf=special_cases.CHANGED_CONF) as server:
            rels, gone = await special_cases.live(server)
            methods = await access_methods(server, ("postgres", "template1", "logged", "copied"))
        batches, end_lsn = read_records(pgdata, imported.position)
        watching, behind = watch_checkpoints(WalIngest)
        whole = await replay(pgdata, imported, batches, end_lsn, redo, watching)
        whole.access_methods = methods
        yield World(imported, batches, whole, behind, relation_files(pgdata), rels, gone)
    finally:
        await redo.close()
        shutil.rmtree(root)


def watch_checkpoints(ingest: type[WalIngest]) -> tuple[type[WalIngest], list[str]]:
    """`ingest`, and a list that gets what our checkpoint lacks wherever the primary logs its own: a start from just
    before there would give ids out again, or look for what is gone."""
    behind: list[str] = []

    class Watching(ingest):  # type: ignore[valid-type,misc]
        def _xlog(self, record: rmgr_xlog.XlogRecord | None, start: int, end: int) -> None:
            if isinstance(record, rmgr_xlog.XlogCheckpoint):
                behind.extend(f"{name} at {end:X}" for name in lacks(self.tip, record.checkpoint))
            super()._xlog(record, start, end)
            if isinstance(record, rmgr_xlog.XlogCheckpoint) and self.tip.control.checkpoint_lsn != start:
                behind.append(f"where a standby starts, at {end:X}")

    return Watching, behind


def lacks(tip: Tip, logged: CheckPoint) -> list[str]:
    mine = tip.checkpoint
    names = []
    if mine.next_xid < logged.next_xid:
        names.append("nextXid")
    if mine.next_oid < logged.next_oid:
        names.append("nextOid")
    for name in ("next_multi", "next_multi_offset", "newest_commit_ts_xid"):
        if not follows_or_equals(getattr(mine, name), getattr(logged, name)):
            names.append(name)
    # Nothing begins or ends between the list of who runs and the checkpoint's record. When shut down, nobody does.
    if logged.oldest_active_xid and mine.oldest_active_xid != logged.oldest_active_xid:
        names.append("oldestActiveXid")
    # Horizons may stay behind as long as nothing is cut: what they point at must be there.
    for kind, number, per_page in (
        (Slru.CLOG, mine.oldest_xid, native.CLOG_XACTS_PER_PAGE),
        (Slru.MULTIXACT_OFFSETS, mine.oldest_multi, native.MULTIXACT_OFFSETS_PER_PAGE),
        (Slru.COMMIT_TS, mine.oldest_commit_ts_xid, native.COMMIT_TS_XACTS_PER_PAGE),
    ):
        if number // per_page not in tip.slru_pages[kind]:
            names.append(f"horizon of {kind.name}")
    return names


# --- what shows a row: the differences from the primary, in words ---

Shows = Callable[[World, Replayed, list[str]], Awaitable[list[str]]]


def pages_of(name: str, fork: Fork) -> Shows:
    """All bytes of one fork, and its very size."""

    async def differences(world: World, replayed: Replayed, behind: list[str]) -> list[str]:
        rel = world.rels[name]
        content = world.files[(*rel, fork)]
        size = replayed.tip.rel_sizes.get((rel, fork))
        if size is None or size * PAGE != len(content):
            return [f"{name} {fork.name} has {size} blocks, the primary {len(content) // PAGE}"]
        return await relation_differences(replayed, {(*rel, fork): content})

    return differences


def gone_is(name: str) -> Shows:
    async def differences(world: World, replayed: Replayed, behind: list[str]) -> list[str]:
        rel = world.gone[name]
        assert not {key for key in world.files if key[:3] == rel}
        return [f"{name} has a fork {fork}" for known, fork in replayed.tip.rel_sizes if known == rel]

    return differences


def slru(kind: Slru) -> Shows:
    async def differences(world: World, replayed: Replayed, behind: list[str]) -> list[str]:
        return await slru_differences(replayed, kind)

    return differences


def behind_in(name: str) -> Shows:
    async def differences(world: World, replayed: Replayed, behind: list[str]) -> list[str]:
        return [what for what in behind if name in what]

    return differences


async def database_copied(world: World, replayed: Replayed, behind: list[str]) -> list[str]:
    (copied,) = {db for _, db in world.whole.tip.rel_maps} - {0, 1, 4, 5} - {database_of(world, "logged")}
    return await relation_differences(
        replayed, {key: content for key, content in world.files.items() if key[1] == copied}
    )


def database_of(world: World, name: str) -> int:
    """WAL_LOG is what makes `logged`: its OID is that of the first such record."""
    for _, record in world.records():
        if record[17] == RmgrId.DBASE and record[16] & 0xF0 == rmgr_dbase.DbaseOp.CREATE_WAL_LOG:
            parsed = rmgr_dbase.parse(record[16], record[parse_blocks(record).main_start :])
            return parsed.database
    raise AssertionError(name)


async def database_gone(world: World, replayed: Replayed, behind: list[str]) -> list[str]:
    _, gone, _ = world.gone["database"]
    assert not {key for key in world.files if key[1] == gone}
    maps = [f"map of {db}" for _, db in replayed.tip.rel_maps if db == gone]
    return maps + [f"relation {rel}" for rel, _ in replayed.tip.rel_sizes if rel[1] == gone]


async def relation_maps(world: World, replayed: Replayed, behind: list[str]) -> list[str]:
    pgdata = replayed.pgdata
    maps = {(1664, 0): pgdata / "global/pg_filenode.map"}
    maps |= {(1663, int(file.parent.name)): file for file in pgdata.glob("base/*/pg_filenode.map")}
    assert len(maps) == 6
    return [f"map {key}" for key, file in maps.items() if replayed.store.newest(rel_map_key(*key)) != file.read_bytes()]


async def two_phase_files(world: World, replayed: Replayed, behind: list[str]) -> list[str]:
    files = {int(file.name, 16): file.read_bytes() for file in (replayed.pgdata / "pg_twophase").iterdir()}
    assert len(files) == 1
    different = [f"file of {xid}" for xid in replayed.tip.two_phase ^ files.keys()]
    return different + [f"bytes of {xid}" for xid, content in files.items()
                        if replayed.store.newest(two_phase_key(xid)) != content]  # fmt: skip


async def origins(world: World, replayed: Replayed, behind: list[str]) -> list[str]:
    file = parse_checkpoint_file((replayed.pgdata / "pg_logical/replorigin_checkpoint").read_bytes())
    assert len(file) == 2
    return [f"origin {name}" for name in file.keys() | replayed.tip.origins.keys()
            if file.get(name) != replayed.tip.origins.get(name)]  # fmt: skip


async def parameters(world: World, replayed: Replayed, behind: list[str]) -> list[str]:
    theirs = ControlFile.parse((replayed.pgdata / "global/pg_control").read_bytes())
    assert theirs.track_commit_timestamp
    assert (theirs.wal_level, theirs.max_connections) == (2, 50)
    ours = replayed.tip.control
    assert ours == ControlFile.parse(replayed.store.newest(CONTROL_FILE_KEY) or b"")
    names = ("max_connections", "max_worker_processes", "max_wal_senders", "max_prepared_transactions",
             "max_locks_per_transaction", "wal_level", "wal_log_hints", "track_commit_timestamp")  # fmt: skip
    return [name for name in names if getattr(ours, name) != getattr(theirs, name)]


async def shutdown_checkpoint(world: World, replayed: Replayed, behind: list[str]) -> list[str]:
    theirs = ControlFile.parse((replayed.pgdata / "global/pg_control").read_bytes()).checkpoint
    ours = replayed.tip.checkpoint
    assert theirs.next_xid > 1 << 32, "xids must have wrapped"
    assert theirs.next_multi < 1000, "multixact ids must have wrapped"
    assert theirs.next_multi_offset < 1000, "member offsets must have wrapped"
    same = replace(ours, redo=theirs.redo, oldest_active_xid=0)
    return [] if same == theirs else [f"{ours} for {theirs}"]


# --- taking a row out ---


@functools.cache
def without(rmgr: RmgrId, *opcodes: int, mask: int = 0xF0) -> type[WalIngest]:
    """Ingest that does nothing for these records, but for their blocks."""

    class Without(WalIngest):
        def _special(self, rmid: int, info: int, xid: int, record: bytes, data: bytes, start: int, end: int) -> None:
            if rmid != rmgr or info & mask not in opcodes:
                super()._special(rmid, info, xid, record, data, start, end)

    return Without


@functools.cache
def without_drops(opcode: XactOp) -> type[WalIngest]:
    class WithoutDrops(WalIngest):
        def _special(self, rmid: int, info: int, xid: int, record: bytes, data: bytes, start: int, end: int) -> None:
            self.skip = rmid == RmgrId.XACT and info & 0x70 == opcode
            super()._special(rmid, info, xid, record, data, start, end)

        def _drop_rel(self, rel: Rel) -> None:
            if not self.skip:
                super()._drop_rel(rel)

    return WithoutDrops


@functools.cache
def without_clog(opcode: XactOp) -> type[WalIngest]:
    class WithoutClog(WalIngest):
        def _special(self, rmid: int, info: int, xid: int, record: bytes, data: bytes, start: int, end: int) -> None:
            self.skip = rmid == RmgrId.XACT and info & 0x70 == opcode
            super()._special(rmid, info, xid, record, data, start, end)

        def _set_clog(self, xids: tuple[int, ...], *, committed: bool, end: int) -> None:
            if not self.skip:
                super()._set_clog(xids, committed=committed, end=end)

    return WithoutClog


class WithoutVisibilityClears(WalIngest):
    def _clear_visibility(self, clears: Iterable[VisibilityClear], end: int) -> None:
        pass


class WithoutClearsOfOldBlocks(WalIngest):
    """Of updates that go to another block, which clear bits of both, the old one's first."""

    kept = slice(1, 2)

    def _clear_visibility(self, clears: Iterable[VisibilityClear], end: int) -> None:
        clears = tuple(clears)
        super()._clear_visibility(clears if len(clears) == 1 else clears[self.kept], end)


class WithoutClearsOfNewBlocks(WithoutClearsOfOldBlocks):
    kept = slice(0, 1)


class WithoutSubtransactions(WalIngest):
    def _set_clog(self, xids: tuple[int, ...], *, committed: bool, end: int) -> None:
        super()._set_clog(xids[:1], committed=committed, end=end)


class WithoutTruncation(WalIngest):
    flag = TruncateFlag.HEAP

    def _smgr(self, record: rmgr_smgr.SmgrCreate | rmgr_smgr.SmgrTruncate, end: int) -> None:
        if isinstance(record, rmgr_smgr.SmgrTruncate):
            record = replace(record, flags=record.flags & ~self.flag)
        super()._smgr(record, end)


class WithoutMapTruncation(WithoutTruncation):
    flag = TruncateFlag.VISIBILITY_MAP


class WithoutCommitTimestamps(WalIngest):
    def _set_commit_ts(self, record: rmgr_xact.XactEnd, xids: tuple[int, ...], raw: bytes, end: int) -> None:
        pass


class WithoutOriginsOfCommits(WalIngest):
    def _advance_origin(self, raw: bytes, remote_lsn: int) -> None:
        pass


class WithoutForcedOrigins(WalIngest):
    def _set_origin(self, record: object) -> None:
        if not isinstance(record, ReplOriginSet) or not record.force:
            super()._set_origin(record)  # type: ignore[arg-type]


class WithoutNextXid(WalIngest):
    def _advance_next_xid(self, xid: int) -> int:
        return self.tip.checkpoint.next_xid & 0xFFFFFFFF


class WithoutHorizons(WalIngest):
    """Truncations cut, and move nothing in the checkpoint."""

    def _special(self, rmid: int, info: int, xid: int, record: bytes, data: bytes, start: int, end: int) -> None:
        before = self.tip.checkpoint
        super()._special(rmid, info, xid, record, data, start, end)
        if (rmid, info & 0xF0) in {
            (RmgrId.CLOG, ClogOp.TRUNCATE),
            (RmgrId.COMMIT_TS, CommitTsOp.TRUNCATE),
            (RmgrId.MULTIXACT, MultixactOp.TRUNCATE),
        }:
            self.tip.checkpoint = before


class WithoutOnlineCheckpoints(WalIngest):
    def _xlog(self, record: rmgr_xlog.XlogRecord | None, start: int, end: int) -> None:
        if not isinstance(record, rmgr_xlog.XlogCheckpoint) or record.is_shutdown:
            super()._xlog(record, start, end)


class WithoutNextMultixact(WalIngest):
    def _advance_multixact(self, record: object) -> None:
        pass


MULTIXACT, XACT, XLOG = RmgrId.MULTIXACT, RmgrId.XACT, RmgrId.XLOG
MAIN, VM, INIT = Fork.MAIN, Fork.VISIBILITY_MAP, Fork.INIT
ROWS: dict[str, tuple[type[WalIngest], Shows]] = {
    **{f"visibility map clear, {name}": (WithoutVisibilityClears, pages_of(f"vm_{name}", VM))
       for name in special_cases.VM_TABLES},
    "visibility map clear, update, the old block's": (WithoutClearsOfOldBlocks, pages_of("vm_update_new", VM)),
    "visibility map clear, update, the new block's": (WithoutClearsOfNewBlocks, pages_of("vm_update_new", VM)),
    "smgr create, main fork": (without(RmgrId.SMGR, SmgrOp.CREATE), pages_of("empty_rel", MAIN)),
    "smgr create, init fork": (without(RmgrId.SMGR, SmgrOp.CREATE), pages_of("unlogged", INIT)),
    "smgr truncate, main fork": (WithoutTruncation, pages_of("shrunk", MAIN)),
    "smgr truncate, visibility map": (WithoutMapTruncation, pages_of("shrunk", VM)),
    "drop on commit": (without_drops(XactOp.COMMIT), gone_is("dropped")),
    "drop on abort": (without_drops(XactOp.ABORT), gone_is("aborted")),
    "drop on abort of a subtransaction": (without_drops(XactOp.ABORT), gone_is("in_sub")),
    "drop on commit prepared": (without_drops(XactOp.COMMIT_PREPARED), gone_is("dropped_prepared")),
    "drop on abort prepared": (without_drops(XactOp.ABORT_PREPARED), gone_is("never")),
    "clog, commit": (without_clog(XactOp.COMMIT), slru(Slru.CLOG)),
    "clog, abort": (without_clog(XactOp.ABORT), slru(Slru.CLOG)),
    "clog, commit prepared": (without_clog(XactOp.COMMIT_PREPARED), slru(Slru.CLOG)),
    "clog, abort prepared": (without_clog(XactOp.ABORT_PREPARED), slru(Slru.CLOG)),
    "clog, subtransactions": (WithoutSubtransactions, slru(Slru.CLOG)),
    "clog zero": (without(RmgrId.CLOG, ClogOp.ZERO_PAGE), slru(Slru.CLOG)),
    "clog truncate": (without(RmgrId.CLOG, ClogOp.TRUNCATE), slru(Slru.CLOG)),
    "commit timestamps": (WithoutCommitTimestamps, slru(Slru.COMMIT_TS)),
    "commit timestamps zero": (without(RmgrId.COMMIT_TS, CommitTsOp.ZERO_PAGE), slru(Slru.COMMIT_TS)),
    "commit timestamps truncate": (without(RmgrId.COMMIT_TS, CommitTsOp.TRUNCATE), slru(Slru.COMMIT_TS)),
    "multixact create, offsets": (without(MULTIXACT, MultixactOp.CREATE), slru(Slru.MULTIXACT_OFFSETS)),
    "multixact create, members": (without(MULTIXACT, MultixactOp.CREATE), slru(Slru.MULTIXACT_MEMBERS)),
    "multixact zero, offsets": (without(MULTIXACT, MultixactOp.ZERO_OFFSETS_PAGE), slru(Slru.MULTIXACT_OFFSETS)),
    "multixact zero, members": (without(MULTIXACT, MultixactOp.ZERO_MEMBERS_PAGE), slru(Slru.MULTIXACT_MEMBERS)),
    "multixact truncate, offsets": (without(MULTIXACT, MultixactOp.TRUNCATE), slru(Slru.MULTIXACT_OFFSETS)),
    "multixact truncate, members": (without(MULTIXACT, MultixactOp.TRUNCATE), slru(Slru.MULTIXACT_MEMBERS)),
    "relation maps": (without(RmgrId.RELMAP, RELMAP_UPDATE), relation_maps),
    "database by file copy": (without(RmgrId.DBASE, rmgr_dbase.DbaseOp.CREATE_FILE_COPY), database_copied),
    "database dropped": (without(RmgrId.DBASE, rmgr_dbase.DbaseOp.DROP), database_gone),
    "two-phase prepare": (without(XACT, XactOp.PREPARE, mask=0x70), two_phase_files),
    "two-phase commit": (without(XACT, XactOp.COMMIT_PREPARED, mask=0x70), two_phase_files),
    "two-phase abort": (without(XACT, XactOp.ABORT_PREPARED, mask=0x70), two_phase_files),
    "nextXid": (WithoutNextXid, behind_in("nextXid")),
    "nextOid": (without(XLOG, XlogOp.NEXT_OID), behind_in("nextOid")),
    "nextMulti": (WithoutNextMultixact, behind_in("next_multi")),
    "who runs": (without(RmgrId.STANDBY, StandbyOp.RUNNING_XACTS), behind_in("oldestActiveXid")),
    "oldestXid, by clog truncate": (WithoutHorizons, behind_in(Slru.CLOG.name)),
    "oldestMulti, by multixact truncate": (WithoutHorizons, behind_in(Slru.MULTIXACT_OFFSETS.name)),
    "oldestCommitTsXid, by its truncate": (WithoutHorizons, behind_in(Slru.COMMIT_TS.name)),
    "newestCommitTsXid": (WithoutCommitTimestamps, behind_in("newest_commit_ts_xid")),
    "shutdown checkpoint": (without(XLOG, XlogOp.CHECKPOINT_SHUTDOWN), shutdown_checkpoint),
    "online checkpoint": (WithoutOnlineCheckpoints, behind_in("where a standby starts")),
    "parameter change": (without(XLOG, XlogOp.PARAMETER_CHANGE), parameters),
    "replication origin set": (WithoutForcedOrigins, origins),
    "replication origin of a commit": (WithoutOriginsOfCommits, origins),
    "replication origin dropped": (without(RmgrId.REPLORIGIN, ReplOriginOp.DROP), origins),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
async def test_a_row_is_right_and_its_lack_shows(world: World, row: str) -> None:
    sabotage, shows = ROWS[row]
    assert not await shows(world, world.whole, world.behind)
    assert await shows(world, *await world.replay(sabotage)), "the row's lack does not show"


async def test_every_page_of_the_same_life_is_the_primarys(world: World) -> None:
    counts: Counter[str] = Counter()
    assert not await relation_differences(world.whole, world.files, counts)
    assert counts["pages"] > 3000
    for kind in Slru:
        assert not await slru_differences(world.whole, kind)


async def test_compressed_images_are_of_both_kinds(world: World) -> None:
    """Those that ingest decompresses (an index that was built) and those that redo does (the first change after a
    checkpoint)."""
    by_log: set[bool] = set()
    for _, record in world.records():
        for block in parse_blocks(record).blocks:
            if block.image is not None and block.image.flags & ImageFlag.PGLZ:
                by_log.add(record[17] == RmgrId.XLOG)
    assert by_log == {True, False}
    for name in ("far", "far_g_idx"):
        assert not await pages_of(name, Fork.MAIN)(world, world.whole, [])


async def test_images_compressed_by_another_build_come_to_the_same_pages(world: World) -> None:
    """Ours has neither lz4 nor zstd, so the primary's own images are compressed anew, as theirs would be; its redo
    knows neither, too. Some of a record's images stay as they are."""
    rng, counts = random.Random(3), Counter[tuple[int, bool]]()
    batches = [[(start, end, compressed_anew(record, rng, counts)) for start, end, record in b] for b in world.batches]
    assert len(counts) == 6, "each method, by ingest and by redo"
    assert min(counts.values()) > 5
    whole = world.whole
    replayed = await replay(whole.pgdata, world.imported, batches, whole.end_lsn, whole.redo)
    replayed.access_methods = whole.access_methods
    assert not await relation_differences(replayed, world.files)


def compressed_anew(record: bytes, rng: random.Random, counts: Counter[tuple[int, bool]]) -> bytes:
    made = bytearray(record)
    blocks, _ = parse_blocks(record)
    images = [block.image for block in blocks if block.image is not None and block.image.flags & ImageFlag.PGLZ]
    limit = min((block.image.start if block.image else block.data_start for block in blocks), default=0)
    for image in reversed(images):
        described = IMAGE_HEADER.pack(image.end - image.start, image.hole_offset, image.flags)
        limit = at = made.rindex(described, RECORD_HEADER_SIZE_BYTES, limit)
        content = uncompressed(record, image)
        method = rng.choice([0, ImageFlag.LZ4, ImageFlag.ZSTD])
        counts[method, record[17] == RmgrId.XLOG] += 1
        match method:
            case ImageFlag.LZ4:
                content = lz4.block.compress(content, store_size=False)
            case ImageFlag.ZSTD:
                content = zstandard.ZstdCompressor().compress(content)
            case _:
                continue
        made[image.start : image.end] = content
        flags = image.flags & ~ImageFlag.PGLZ | method
        made[at : at + len(described)] = IMAGE_HEADER.pack(len(content), image.hole_offset, flags)
    if made == record:
        return record
    header = parse_header(record)
    return build_record(
        rmgr_id=header.rmgr_id,
        info=header.info,
        prev_lsn=header.prev_lsn,
        xid=header.xid,
        fragments=bytes(made[RECORD_HEADER_SIZE_BYTES:]),
    )


async def test_logical_messages_leave_nothing(world: World) -> None:
    ends = {end for end, record in world.records() if record[17] == RmgrId.LOGICALMSG}
    assert len(ends) == 2
    stored = [key for key, versions in world.whole.store.versions.items() for lsn, _, _ in versions if lsn in ends]
    assert {key[0] for key in stored} <= {0x07}, "a checkpoint, if the message's transaction was the first of its group"
