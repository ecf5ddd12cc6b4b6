"""basebackup@LSN: a tar archive that is a PGDATA which a stock Postgres starts on, at exactly this LSN.

A *bare* one lacks the relations, so its size does not depend on that of the database.

A standby gets no WAL: it starts from the last checkpoint in the log, like one that was killed with these files on its
disk, and has the log streamed from that checkpoint's redo on. So it learns which transactions run from the log's own
running-xacts records, which a minted shutdown checkpoint would deny (docs/adr/0027).

Order of members: directories, small files, SLRU segments, two-phase files, relations, the WAL segment with the minted
checkpoint if there is one, and `global/pg_control` last, so that a torn archive cannot boot (Neon: basebackup.rs). Init
forks are served as they are and, once more, as the main fork of their unlogged relation, which is what crash recovery
would do (reinit.c). Configuration files are the compute's business.

Format of the archive: POSIX ustar, as Python's tarfile writes it. The archive is plaintext: it goes only over TLS
into a volume, never to a disk.
"""

from __future__ import annotations

import tarfile
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Final

from pageserver.initdb_import import (
    FORK_SUFFIXES,
    PAGE_SIZE_BYTES,
    RELATION_SEGMENT_BLOCKS,
    SLRU_DIRECTORIES,
)
from pageserver.slru import SLRU_PAGES_PER_SEGMENT
from pageserver.timeline import Timeline, some_record_before
from shared.errors import ConflictError, CorruptedError, InvalidInputError
from shared.keyspace import (
    CHECKPOINT_KEY,
    CONTROL_FILE_KEY,
    GLOBAL_TABLESPACE_OID,
    REL_MAP,
    REL_SIZE,
    REPL_ORIGIN,
    SLRU_PAGE,
    TWO_PHASE,
    Fork,
    RelTag,
    Slru,
    field1_range,
    unpack_key,
)
from shared.wal.control import CheckPoint, ControlFile
from shared.wal.rmgr_replorigin import checkpoint_file
from shared.wal.rmgr_xact import twophase_file_name
from shared.wal.writer import mint_shutdown_checkpoint
from shared.wire.pagestream import StartAs

PG_VERSION_FILE: Final = b"16\n"
_BATCH_BLOCKS: Final = 256
_DIRECTORIES: Final = (
    "base",
    "global",
    "pg_commit_ts",
    "pg_dynshmem",
    "pg_logical",
    "pg_logical/mappings",
    "pg_logical/snapshots",
    "pg_multixact",
    "pg_multixact/members",
    "pg_multixact/offsets",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_tblspc",
    "pg_twophase",
    "pg_wal",
    "pg_wal/archive_status",
    "pg_xact",
)


async def relation_sizes(timeline: Timeline, lsn: int) -> list[tuple[RelTag, int]]:
    """Every relation fork at `lsn` with its size in blocks, ascending. Raises as `Timeline.scan`."""
    found = []
    for key, content in await timeline.scan(field1_range(REL_SIZE), lsn):
        _, spc, db, rel, fork, _ = unpack_key(key)
        found.append((RelTag(spc, db, rel, Fork(fork)), int.from_bytes(content, "big")))
    return found


async def basebackup(
    timeline: Timeline, lsn: int, start_as: StartAs = StartAs.PRIMARY, *, bare: bool = False
) -> AsyncIterator[bytes]:
    """Pieces of the archive, in order. The timeline must have ingested exactly up to `lsn`, the end of the log; for one
    that does not add to the log, at least up to there. A `bare` one has no files of relations:
    whoever asks for it takes `relation_sizes` and reads page by page.

    Raises InvalidInputError when it has not, ConflictError when no compute has written to the timeline yet, so that a
    standby has nothing to start from, and whatever reading pages raises: then the archive is torn, and unusable.
    """
    if timeline.last_record_lsn == lsn:
        prev_record_lsn = timeline.prev_record_lsn
    elif start_as is not StartAs.PRIMARY:
        prev_record_lsn = some_record_before(lsn)
    else:
        raise InvalidInputError("a basebackup starts a primary, so it can only be had at the end of the log")
    control = await timeline.get(CONTROL_FILE_KEY, lsn)
    if control is None:
        raise CorruptedError("the timeline has no control file")
    standby = None
    if start_as is StartAs.STANDBY:
        standby = ControlFile.parse(control).of_standby(lsn)
        if standby.checkpoint.redo < timeline.log_start_lsn:
            raise ConflictError("no compute has written to this branch yet: there is nothing to follow")
    for name in _DIRECTORIES:
        yield _directory(name)
    yield _file("PG_VERSION", PG_VERSION_FILE)

    for key, content in await timeline.scan(field1_range(REL_MAP), lsn):
        _, spc, db, *_ = unpack_key(key)
        if spc != GLOBAL_TABLESPACE_OID:
            yield _directory(f"base/{db}")
            yield _file(f"base/{db}/PG_VERSION", PG_VERSION_FILE)
        yield _file(f"{_database_directory(spc, db)}/pg_filenode.map", content)

    async for piece in _slrus(timeline, lsn):
        yield piece
    for key, content in await timeline.scan(field1_range(TWO_PHASE), lsn):
        yield _file(f"pg_twophase/{twophase_file_name(unpack_key(key)[1])}", content)
    origins = await timeline.scan(field1_range(REPL_ORIGIN), lsn)
    if origins:
        progress = {unpack_key(key)[1]: int.from_bytes(content, "big") for key, content in origins}
        yield _file("pg_logical/replorigin_checkpoint", checkpoint_file(progress))

    for tag, blocks in () if bare else await relation_sizes(timeline, lsn):
        async for piece in _relation(timeline, tag, blocks, lsn, FORK_SUFFIXES[tag.fork]):
            yield piece
        if tag.fork is Fork.INIT:
            async for piece in _relation(timeline, tag, blocks, lsn, ""):
                yield piece

    if standby is not None:
        yield _file("global/pg_control", standby.serialize())
    else:
        checkpoint = await timeline.get(CHECKPOINT_KEY, lsn)
        if checkpoint is None:
            raise CorruptedError("the timeline has no checkpoint")
        minted = mint_shutdown_checkpoint(control, CheckPoint.parse(checkpoint), prev_record_lsn, lsn)
        for name, segment in minted.segments.items():
            yield _file(f"pg_wal/{name}", segment)
        yield _file("global/pg_control", minted.control)
    yield bytes(2 * tarfile.BLOCKSIZE)


async def _slrus(timeline: Timeline, lsn: int) -> AsyncIterator[bytes]:
    """SLRU segments: whole files of up to 32 pages; a page that is missing inside one reads as zeros."""
    segments: defaultdict[tuple[Slru, int], dict[int, bytes]] = defaultdict(dict)
    for key, page in await timeline.scan(field1_range(SLRU_PAGE), lsn):
        _, kind, _, _, _, number = unpack_key(key)
        segment, index = divmod(number, SLRU_PAGES_PER_SEGMENT)
        segments[Slru(kind), segment][index] = page
    for (slru, segment), pages in segments.items():
        content = b"".join(pages.get(i, bytes(PAGE_SIZE_BYTES)) for i in range(max(pages) + 1))
        yield _file(f"{SLRU_DIRECTORIES[slru]}/{segment:04X}", content)


async def _relation(timeline: Timeline, tag: RelTag, blocks: int, lsn: int, suffix: str) -> AsyncIterator[bytes]:
    """One fork as files of up to 1 GiB, pages read in batches. An empty fork is an empty file."""
    directory = _database_directory(tag.spc, tag.db)
    for first in range(0, max(blocks, 1), RELATION_SEGMENT_BLOCKS):
        end = min(blocks, first + RELATION_SEGMENT_BLOCKS)
        segment = first // RELATION_SEGMENT_BLOCKS
        name = f"{directory}/{tag.rel}{suffix}" + (f".{segment}" if segment else "")
        yield _header(name, (end - first) * PAGE_SIZE_BYTES)
        for start in range(first, end, _BATCH_BLOCKS):
            pages = await timeline.get_pages(tag, range(start, min(start + _BATCH_BLOCKS, end)), lsn)
            yield b"".join(pages)


def _database_directory(spc: int, db: int) -> str:
    return "global" if spc == GLOBAL_TABLESPACE_OID else f"base/{db}"


def _directory(name: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    info.mode = 0o700
    return info.tobuf(tarfile.USTAR_FORMAT)


def _header(name: str, size_bytes: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size_bytes
    info.mode = 0o600
    return info.tobuf(tarfile.USTAR_FORMAT)


def _file(name: str, content: bytes) -> bytes:
    return _header(name, len(content)) + content + bytes(-len(content) % tarfile.BLOCKSIZE)
