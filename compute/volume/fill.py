"""A volume as it is at boot: the small files of a bare basebackup, and relations that are still at the pageserver."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath
from typing import Final

from compute.agent.basebackup import ArchiveReader
from compute.volume.file_system import FileSystem
from compute.volume.files import Directory, File, Node, Origin, Tree
from compute.volume.sealed_blocks import BLOCK_SIZE_BYTES
from shared.errors import CorruptedError, UnavailableError
from shared.framed_tcp import FramedConnection
from shared.keyspace import GLOBAL_TABLESPACE_OID, Fork, RelTag
from shared.lsn import Lsn
from shared.wire import pagestream
from shared.wire.frames import ERROR, ErrorFrame, ProtocolError

_REQUEST_ID: Final = 1
_SEGMENT_BLOCKS: Final = (1 << 30) // BLOCK_SIZE_BYTES
"""RELSEG_SIZE of pg_config.h: relations lie in files of 1 GiB."""
_SUFFIXES: Final = {Fork.MAIN: "", Fork.FSM: "_fsm", Fork.VISIBILITY_MAP: "_vm", Fork.INIT: "_init"}
MAX_FORKS: Final = 4_000_000


class TreeSink:
    """Takes the members of an archive (`ArchiveSink`)."""

    def __init__(self, files: FileSystem, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._files = files
        self._now_ns = now_ns
        self._file: File | None = None
        self._offset = 0

    def directory(self, path: PurePosixPath) -> None:
        if path.parts:
            self._files.tree.add_directory(self._above(path), path.name.encode(), 0o700, self._now_ns())

    def start(self, path: PurePosixPath) -> None:
        self._file = self._files.tree.add_file(self._above(path), path.name.encode(), 0o600, self._now_ns())
        self._offset = 0

    def data(self, data: memoryview) -> None:
        assert self._file is not None  # noqa: S101 - data comes after a start
        self._files.write_all(self._file, self._offset, data)
        self._offset += len(data)

    def end(self) -> None:
        self._file = None

    def _above(self, path: PurePosixPath) -> Directory:
        return directory_of(self._files.tree, path)


def directory_of(tree: Tree, path: PurePosixPath) -> Directory:
    """The directory that `path` is in. Raises CorruptedError."""
    return _with_room(_descend(tree, [part.encode() for part in path.parts[:-1]]), path.name.encode())


def _descend(tree: Tree, path: Iterable[bytes]) -> Node:
    """Raises CorruptedError."""
    node: Node = tree.root
    for part in path:
        entry = node.entries.get(part) if isinstance(node, Directory) else None
        if entry is None:
            raise CorruptedError("a member of the basebackup has no directory")
        node = entry[1]
    return node


def _with_room(node: Node, name: bytes) -> Directory:
    """A directory that has nothing of that name. Raises CorruptedError."""
    if not isinstance(node, Directory) or name in node.entries:
        raise CorruptedError("a member of the basebackup is there twice, or below a file")
    return node


def add_relation(tree: Tree, tag: RelTag, blocks: int, now_ns: int) -> None:
    """The files of one fork, whose content is still at the pageserver. An init fork is served once more, as the main
    fork of its unlogged relation, as crash recovery would do (reinit.c). Raises CorruptedError."""
    _add_fork(tree, tag, blocks, _SUFFIXES[tag.fork], now_ns)
    if tag.fork is Fork.INIT:
        _add_fork(tree, tag, blocks, "", now_ns)


def _add_fork(tree: Tree, tag: RelTag, blocks: int, suffix: str, now_ns: int) -> None:
    path = (b"global",) if tag.spc == GLOBAL_TABLESPACE_OID else (b"base", b"%d" % tag.db)
    directory = _descend(tree, path)
    for first in range(0, max(blocks, 1), _SEGMENT_BLOCKS):
        segment = first // _SEGMENT_BLOCKS
        name = (f"{tag.rel}{suffix}" + (f".{segment}" if segment else "")).encode()
        file = tree.add_file(_with_room(directory, name), name, 0o600, now_ns)
        file.origin = Origin(tag, first)
        file.origin_blocks = min(blocks - first, _SEGMENT_BLOCKS)
        file.size = file.origin_blocks * BLOCK_SIZE_BYTES


async def fetch_relations(connection: FramedConnection, lsn: Lsn) -> list[tuple[RelTag, int]]:
    """Every relation fork at `lsn` with its size in blocks. Raises KeylakeError."""
    await connection.send(pagestream.BasebackupRequest(_REQUEST_ID, lsn.value).pack(pagestream.RELATIONS))
    found: list[tuple[RelTag, int]] = []
    while True:
        frame = await connection.receive_one()
        if frame is None:
            raise UnavailableError("the pageserver closed the connection in the middle of a listing")
        kind, payload = frame
        if kind == ERROR:
            raise ErrorFrame.parse(payload).exception()
        if kind != pagestream.RELATION_SIZES:
            raise ProtocolError(f"unexpected frame of type {kind:#x} in a listing")
        _, some = pagestream.parse_relation_sizes(payload)
        if not some:
            return found
        found += some
        if len(found) > MAX_FORKS:
            raise ProtocolError("the listing does not end")


async def fill(
    files: FileSystem, connection: FramedConnection, lsn: Lsn, start_as: pagestream.StartAs
) -> tuple[int, int]:
    """Make `files` what Postgres starts on at `lsn`. Returns (size of the archive in bytes, number of forks).

    Raises KeylakeError: the pageserver's, CorruptedError, VolumeFullError.
    """
    kind = pagestream.BASEBACKUP_KINDS[start_as, True]
    archive = ArchiveReader(TreeSink(files))
    await connection.send(pagestream.BasebackupRequest(_REQUEST_ID, lsn.value).pack(kind))
    await archive.take_all(connection)
    relations = await fetch_relations(connection, lsn)
    await _add_relations(files.tree, relations)
    return archive.size_bytes, len(relations)


async def _add_relations(tree: Tree, relations: Sequence[tuple[RelTag, int]]) -> None:
    now_ns = time.time_ns()
    for number, (tag, blocks) in enumerate(relations):
        add_relation(tree, tag, blocks, now_ns)
        if number % 1024 == 0:
            await asyncio.sleep(0)
