"""A freshly initialised PGDATA → the first image layer of a project.

The data directory is one that `initdb` has just made and shut down cleanly: every page is on disk, the log ends with
its shutdown checkpoint, and nobody's data is in it yet. Where that log ends is where the project's history begins
(`initdb_lsn`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pageserver.ingest import pack_size
from pageserver.slru import SLRU_PAGES_PER_SEGMENT
from shared.errors import CorruptedError
from shared.keyspace import (
    CHECKPOINT_KEY,
    CONTROL_FILE_KEY,
    DEFAULT_TABLESPACE_OID,
    GLOBAL_TABLESPACE_OID,
    Fork,
    RelTag,
    Slru,
    rel_map_key,
    slru_key,
)
from shared.wal.control import ControlFile, DbState
from shared.wal.page import segment_file_name
from shared.wal.reader import find_end_of_wal

PAGE_SIZE_BYTES: Final = 8192
SLRU_DIRECTORIES: Final = {
    Slru.CLOG: "pg_xact",
    Slru.MULTIXACT_OFFSETS: "pg_multixact/offsets",
    Slru.MULTIXACT_MEMBERS: "pg_multixact/members",
    Slru.COMMIT_TS: "pg_commit_ts",
}
RELATION_SEGMENT_BLOCKS: Final = 131072
"""RELSEG_SIZE: a relation's file is cut at 1 GiB."""

FORK_SUFFIXES: Final = {
    Fork.MAIN: "",
    Fork.FSM: "_fsm",
    Fork.VISIBILITY_MAP: "_vm",
    Fork.INIT: "_init",
}
_FORKS: Final = {suffix: fork for fork, suffix in FORK_SUFFIXES.items()}
_RELATION_FILE: Final = re.compile(r"([0-9]+)(_fsm|_vm|_init)?(?:\.([0-9]+))?")


@dataclass(frozen=True, slots=True)
class ImportedInitdb:
    """Where a fresh cluster's history begins. LSNs are plain integers."""

    system_identifier: int
    initdb_lsn: int
    """End of its shutdown checkpoint."""
    last_record_lsn: int
    """Start of that record."""


def read_position(pgdata: Path) -> ImportedInitdb:
    """Raises CorruptedError unless `pgdata` is a cleanly shut down cluster of the Postgres that we know."""
    control = ControlFile.parse((pgdata / "global/pg_control").read_bytes())
    if control.state is not DbState.SHUTDOWNED:
        raise CorruptedError("initdb left a cluster that is not shut down")
    start = control.checkpoint_lsn
    segment = (pgdata / "pg_wal" / segment_file_name(start)).read_bytes()

    def read(lsn: int, size_bytes: int) -> bytes:
        offset = lsn % len(segment)
        return segment[offset : offset + size_bytes] if lsn // len(segment) == start // len(segment) else b""

    end = find_end_of_wal(read, start, system_identifier=control.system_identifier)
    if end.last_record_start != start:
        raise CorruptedError("initdb left records behind its shutdown checkpoint")
    return ImportedInitdb(control.system_identifier, end.end_lsn, start)


def read_values(pgdata: Path) -> Iterator[tuple[bytes, bytes]]:
    """(key, image) of everything that `pgdata` holds, not sorted. FSM forks are left out (pageserver/ingest.py)."""
    control = (pgdata / "global/pg_control").read_bytes()
    yield CONTROL_FILE_KEY, control
    yield CHECKPOINT_KEY, ControlFile.parse(control).checkpoint.serialize()
    yield from _read_database(pgdata / "global", GLOBAL_TABLESPACE_OID, 0)
    for directory in sorted((pgdata / "base").iterdir()):
        if directory.name.isdigit():
            yield from _read_database(directory, DEFAULT_TABLESPACE_OID, int(directory.name))
    for kind, name in SLRU_DIRECTORIES.items():
        for file in sorted((pgdata / name).iterdir()):
            first = int(file.name, 16) * SLRU_PAGES_PER_SEGMENT
            for index, page in enumerate(_pages(file)):
                yield slru_key(kind, first + index), page


def _read_database(directory: Path, spc: int, db: int) -> Iterator[tuple[bytes, bytes]]:
    sizes: dict[RelTag, int] = {}
    for file in sorted(directory.iterdir()):
        if file.name == "pg_filenode.map":
            yield rel_map_key(spc, db), file.read_bytes()
        match = _RELATION_FILE.fullmatch(file.name)
        if match is None:
            continue
        rel, suffix, segment = match.groups()
        tag = RelTag(spc, db, int(rel), _FORKS[suffix or ""])
        if tag.fork is Fork.FSM:
            continue
        first = int(segment or 0) * RELATION_SEGMENT_BLOCKS
        sizes.setdefault(tag, 0)
        for index, page in enumerate(_pages(file)):
            yield tag.block_key(first + index), page
            sizes[tag] = max(sizes[tag], first + index + 1)
    for tag, blocks in sizes.items():
        yield tag.size_key(), pack_size(blocks)


def _pages(file: Path) -> Iterator[bytes]:
    data = file.read_bytes()
    if len(data) % PAGE_SIZE_BYTES:
        raise CorruptedError(f"{file.name} is not a whole number of pages")
    return (data[i : i + PAGE_SIZE_BYTES] for i in range(0, len(data), PAGE_SIZE_BYTES))
