"""What the kernel asks of a volume, and the answers.

    data not written since boot   from `PageSource`, at the start LSN
    data written                  from `SealedBlocks`

Most requests are answered at once; those that need the pageserver are coroutines. Whether data may leave is decided
last: `check_lease` runs after everything was opened, right before the answer is handed over.

Two kinds of failure. A read that fails is an EIO for who reads, and an error in the log. A *write* that fails must end
the volume: with the kernel's writeback cache the process that wrote has long gone on, without fsync nobody would ever
tell it, and what was written would be gone (`broken`).

What may interleave: everything is on one event loop. A write to a part of a block that is still at its origin fetches
it first, and looks again whether it still is. The kernel keeps requests for the same pages of a file apart.
"""

from __future__ import annotations

import errno
import stat
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Protocol

from compute.volume import fuse_wire as wire
from compute.volume.files import Directory, File, Node, Tree
from compute.volume.fuse_wire import Opcode, Request
from compute.volume.sealed_blocks import BLOCK_SIZE_BYTES, SealedBlocks, VolumeFullError
from shared.errors import IntegrityError, KeyAccessError, KeylakeError
from shared.keyspace import RelTag
from shared.telemetry import get_logger

_log = get_logger(__name__)

_ZEROS: Final = bytes(BLOCK_SIZE_BYTES)
_MAX_FILE_SIZE_BYTES: Final = 1 << 44
_RENAME_NOREPLACE: Final = 1
_FALLOC_KEEP_SIZE: Final = 1

Answer = bytes | list[bytes] | None
"""What goes behind the header; None: the kernel expects no answer."""


class FileSystemError(Exception):
    """Becomes `number`, an errno, for who asked."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode.get(number, str(number)))
        self.number = number


class PageSource(Protocol):
    """Blocks of relations as they were at the start LSN."""

    async def pages(self, rel: RelTag, first_block: int, count: int) -> list[bytes]:
        """Raises KeylakeError."""
        ...

    def prefetch(self, rel: RelTag, first_block: int, count: int) -> None:
        """They will be asked for soon."""
        ...


class FileSystem:
    """Hand it requests by `answer`. `tree` and `blocks` may be filled before the first one (`fill`)."""

    def __init__(
        self,
        tree: Tree,
        blocks: SealedBlocks,
        pages: PageSource,
        check_lease: Callable[[], None],
        broken: Callable[[KeylakeError], None],
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.tree = tree
        self.blocks = blocks
        self._pages = pages
        self._check_lease = check_lease
        self._broken = broken
        self._now_ns = now_ns
        self._handlers: dict[int, Callable[[Request], Answer | Coroutine[Any, Any, Answer]]] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._batch_forget,
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.MKNOD: self._mknod,
            Opcode.MKDIR: self._mkdir,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._rmdir,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename2,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.FALLOCATE: self._fallocate,
            Opcode.READDIR: self._readdir,
            Opcode.STATFS: self._statfs,
            Opcode.INIT: self._init,
            Opcode.INTERRUPT: lambda request: None,
            Opcode.DESTROY: lambda request: b"",
        }

    def answer(self, request: Request) -> Answer | Awaitable[Answer]:
        """Raises FileSystemError; so may what is awaited."""
        handler = self._handlers.get(request.opcode)
        if handler is None:
            raise FileSystemError(errno.ENOSYS)
        return handler(request)

    # --- filling it, before anybody else sees it ---

    def write_all(self, file: File, offset: int, data: bytes | memoryview) -> None:
        """Behind what the file holds so far. Not for files that have an origin. Raises FileSystemError."""
        if offset == file.size and bytes(data) == bytes(len(data)):
            file.size += len(data)  # a hole: most of a WAL segment
        else:
            self._store(file, offset, memoryview(data))

    # --- names ---

    def _node(self, node_id: int) -> Node:
        node = self.tree.node(node_id)
        if node is None:
            raise FileSystemError(errno.ESTALE)
        return node

    def _directory(self, node_id: int) -> Directory:
        node = self._node(node_id)
        if not isinstance(node, Directory):
            raise FileSystemError(errno.ENOTDIR)
        return node

    def _file(self, node_id: int) -> File:
        node = self._node(node_id)
        if not isinstance(node, File):
            raise FileSystemError(errno.EISDIR)
        return node

    def _lookup(self, request: Request) -> Answer:
        entry = self._directory(request.node_id).entries.get(wire.parse_name(request.body))
        if entry is None:
            return wire.NO_ENTRY
        return self._handed_out(entry[1])

    @staticmethod
    def _handed_out(node: Node) -> bytes:
        node.known += 1
        return wire.pack_entry(node.attributes())

    def _forget(self, request: Request) -> Answer:
        self._forgotten(request.node_id, wire.parse_forget(request.body))
        return None

    def _batch_forget(self, request: Request) -> Answer:
        for node_id, count in wire.parse_batch_forget(request.body):
            self._forgotten(node_id, count)
        return None

    def _forgotten(self, node_id: int, count: int) -> None:
        node = self.tree.node(node_id)
        if node is not None:
            node.known = max(0, node.known - count)
            self._drop_if_over(node)

    def _drop_if_over(self, node: Node) -> None:
        if self.tree.forget(node) and isinstance(node, File):
            for slot in node.slots.values():
                self.blocks.give_back(slot)
            node.slots.clear()

    def _mknod(self, request: Request) -> Answer:
        mode, name = wire.parse_mknod(request.body)
        if not stat.S_ISREG(mode):
            raise FileSystemError(errno.EPERM)
        directory = self._free_name(request.node_id, name)
        return self._handed_out(self.tree.add_file(directory, name, mode, self._now_ns()))

    def _mkdir(self, request: Request) -> Answer:
        mode, name = wire.parse_mkdir(request.body)
        directory = self._free_name(request.node_id, name)
        return self._handed_out(self.tree.add_directory(directory, name, mode, self._now_ns()))

    def _free_name(self, node_id: int, name: bytes) -> Directory:
        directory = self._directory(node_id)
        if not directory.links:
            raise FileSystemError(errno.ENOENT)
        if name in directory.entries:
            raise FileSystemError(errno.EEXIST)
        return directory

    def _unlink(self, request: Request) -> Answer:
        directory, name = self._directory(request.node_id), wire.parse_name(request.body)
        if isinstance(self._named(directory, name), Directory):
            raise FileSystemError(errno.EISDIR)
        self._remove(directory, name)
        return b""

    def _rmdir(self, request: Request) -> Answer:
        directory, name = self._directory(request.node_id), wire.parse_name(request.body)
        node = self._named(directory, name)
        if not isinstance(node, Directory):
            raise FileSystemError(errno.ENOTDIR)
        if node.entries:
            raise FileSystemError(errno.ENOTEMPTY)
        self._remove(directory, name)
        return b""

    @staticmethod
    def _named(directory: Directory, name: bytes) -> Node:
        entry = directory.entries.get(name)
        if entry is None:
            raise FileSystemError(errno.ENOENT)
        return entry[1]

    def _remove(self, directory: Directory, name: bytes) -> None:
        self._drop_if_over(self.tree.remove(directory, name, self._now_ns()))

    def _rename(self, request: Request) -> Answer:
        directory, old, new = wire.parse_rename(request.body)
        return self._renamed(request.node_id, old, directory, new, replace=True)

    def _rename2(self, request: Request) -> Answer:
        directory, flags, old, new = wire.parse_rename2(request.body)
        if flags & ~_RENAME_NOREPLACE:
            raise FileSystemError(errno.EINVAL)
        return self._renamed(request.node_id, old, directory, new, replace=not flags)

    def _renamed(self, old_id: int, old_name: bytes, new_id: int, new_name: bytes, *, replace: bool) -> Answer:
        old, new = self._directory(old_id), self._directory(new_id)
        node = self._named(old, old_name)
        above: Directory | None = new
        while above is not None:
            if above is node:
                raise FileSystemError(errno.EINVAL)
            above = above.parent
        target = new.entries.get(new_name)
        if target is not None:
            if not replace:
                raise FileSystemError(errno.EEXIST)
            if target[1] is node:
                return b""
            self._check_replaceable(node, target[1])
            self._remove(new, new_name)
        self.tree.move(old, old_name, new, new_name, self._now_ns())
        return b""

    @staticmethod
    def _check_replaceable(node: Node, target: Node) -> None:
        if isinstance(target, Directory):
            if not isinstance(node, Directory):
                raise FileSystemError(errno.EISDIR)
            if target.entries:
                raise FileSystemError(errno.ENOTEMPTY)
        elif isinstance(node, Directory):
            raise FileSystemError(errno.ENOTDIR)

    def _readdir(self, request: Request) -> Answer:
        directory = self._directory(request.node_id)
        offset, size = wire.parse_io(request.body)
        found: list[bytes] = []
        for name, position, node in directory.listing(offset):
            entry = wire.pack_dirent(node.node_id, position, node.mode, name)
            size -= len(entry)
            if size < 0:
                break
            found.append(entry)
        return b"".join(found)

    # --- attributes ---

    def _getattr(self, request: Request) -> Answer:
        return wire.pack_attributes(self._node(request.node_id).attributes())

    def _setattr(self, request: Request) -> Answer | Coroutine[Any, Any, Answer]:
        node = self._node(request.node_id)
        change = wire.parse_setattr(request.body, self._now_ns())
        if change.mode is not None:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(change.mode)
        node.uid = node.uid if change.uid is None else change.uid
        node.gid = node.gid if change.gid is None else change.gid
        node.atime_ns = node.atime_ns if change.atime_ns is None else change.atime_ns
        node.mtime_ns = node.mtime_ns if change.mtime_ns is None else change.mtime_ns
        node.time_ns = self._now_ns() if change.ctime_ns is None else change.ctime_ns
        if change.size_bytes is None:
            return wire.pack_attributes(node.attributes())
        return self._resized(self._file(request.node_id), change.size_bytes)

    def _resized(self, file: File, size_bytes: int) -> Answer | Coroutine[Any, Any, Answer]:
        if size_bytes > _MAX_FILE_SIZE_BYTES:
            raise FileSystemError(errno.EFBIG)
        block, rest = divmod(size_bytes, BLOCK_SIZE_BYTES)
        if size_bytes < file.size and rest and file.is_at_origin(block):
            return self._resized_at_origin(file, size_bytes, block)
        return self._resize(file, size_bytes)

    async def _resized_at_origin(self, file: File, size_bytes: int, block: int) -> Answer:
        await self._bring_in(file, [block])
        return self._resize(file, size_bytes)

    def _resize(self, file: File, size_bytes: int) -> Answer:
        block, rest = divmod(size_bytes, BLOCK_SIZE_BYTES)
        if size_bytes < file.size and rest and block in file.slots:
            # What is cut off must read as zeros when the file grows again.
            self._store(file, size_bytes, memoryview(bytes(BLOCK_SIZE_BYTES - rest)))
        for slot in file.resize(size_bytes):
            self.blocks.give_back(slot)
        file.mtime_ns = self._now_ns()
        return wire.pack_attributes(file.attributes())

    def _fallocate(self, request: Request) -> Answer:
        """Grows the file. Nothing is set aside: a disk that is full ends the volume anyway."""
        file = self._file(request.node_id)
        offset, length, mode = wire.parse_fallocate(request.body)
        if mode & ~_FALLOC_KEEP_SIZE:
            raise FileSystemError(errno.EOPNOTSUPP)
        if offset + length > _MAX_FILE_SIZE_BYTES:
            raise FileSystemError(errno.EFBIG)
        if not mode and offset + length > file.size:
            file.size = offset + length
        return b""

    def _statfs(self, request: Request) -> Answer:
        limit = self.blocks.limit_blocks
        return wire.pack_statfs(BLOCK_SIZE_BYTES, limit, max(0, limit - self.blocks.used_blocks))

    def _init(self, request: Request) -> Answer:
        major, minor, readahead, flags = wire.parse_init(request.body)
        if major != wire.MAJOR or minor < wire.MINOR or flags & wire.REQUIRED_FLAGS != wire.REQUIRED_FLAGS:
            raise FileSystemError(errno.EPROTO)
        return wire.pack_init(readahead, flags & wire.WANTED_FLAGS)

    # --- data ---

    def _read(self, request: Request) -> Answer | Coroutine[Any, Any, Answer]:
        file = self._file(request.node_id)
        offset, size = wire.parse_io(request.body)
        end = min(offset + size, file.size)
        if offset >= end:
            return b""
        first, stop = offset // BLOCK_SIZE_BYTES, -(-end // BLOCK_SIZE_BYTES)
        if file.origin is not None and first < file.origin_blocks:
            self._read_ahead(file, first, stop - first)
            if any(file.is_at_origin(block) for block in range(first, min(stop, file.origin_blocks))):
                return self._read_from_origin(file, offset, end, first, stop)
        return self._leaves(self._cut(self._local(file, first, stop), first, offset, end))

    async def _read_from_origin(self, file: File, offset: int, end: int, first: int, stop: int) -> Answer:
        parts: list[bytes] = []
        block = first
        while block < stop:
            run = block
            at_origin = file.is_at_origin(block)
            while run < stop and file.is_at_origin(run) == at_origin:
                run += 1
            parts += await self._fetch(file, block, run - block) if at_origin else self._local(file, block, run)
            block = run
        return self._leaves(self._cut(parts, first, offset, end))

    def _read_ahead(self, file: File, first: int, count: int) -> None:
        ahead = file.read_ahead.read(first, count, file.origin_blocks)
        if ahead and file.origin is not None and all(file.is_at_origin(block) for block in ahead):
            self._pages.prefetch(file.origin.rel, file.origin.first_block + ahead.start, len(ahead))

    async def _fetch(self, file: File, first: int, count: int) -> list[bytes]:
        assert file.origin is not None  # noqa: S101 - it has blocks at an origin
        try:
            return await self._pages.pages(file.origin.rel, file.origin.first_block + first, count)
        except KeylakeError as error:
            raise self._unreadable(error) from None

    def _local(self, file: File, first: int, stop: int) -> list[bytes]:
        """Written blocks and holes."""
        parts: list[bytes] = []
        block = first
        try:
            while block < stop:
                slots: list[int] = []
                while block + len(slots) < stop and (slot := file.slots.get(block + len(slots))) is not None:
                    slots.append(slot)
                if slots:
                    parts.append(self.blocks.read(slots, file.node_id, block))
                    block += len(slots)
                else:
                    parts.append(_ZEROS)
                    block += 1
        except (KeylakeError, OSError) as error:
            raise self._unreadable(error) from None
        return parts

    @staticmethod
    def _unreadable(error: KeylakeError | OSError) -> FileSystemError:
        """Never data: what cannot be read or opened is an I/O error."""
        code = error.code if isinstance(error, KeylakeError) else "os"
        level = _log.error if isinstance(error, IntegrityError) else _log.warning
        level("a block of the volume cannot be read", code=code, reason=str(error))
        return FileSystemError(errno.EIO)

    @staticmethod
    def _cut(parts: list[bytes], first: int, offset: int, end: int) -> list[bytes]:
        """Whole blocks from block `first` on → bytes [offset, end)."""
        skip = offset - first * BLOCK_SIZE_BYTES
        excess = sum(map(len, parts)) - skip - (end - offset)
        if excess:
            parts[-1] = parts[-1][: len(parts[-1]) - excess]
        if skip:
            parts[0] = parts[0][skip:]
        return parts

    def _leaves(self, parts: list[bytes]) -> list[bytes]:
        # Invariant: after decrypting, before a byte leaves.
        try:
            self._check_lease()
        except KeyAccessError as error:
            raise self._unreadable(error) from None
        return parts

    def _write(self, request: Request) -> Answer | Coroutine[Any, Any, Answer]:
        file = self._file(request.node_id)
        offset, data = wire.parse_write(request.body)
        end = offset + len(data)
        if end > _MAX_FILE_SIZE_BYTES:
            raise FileSystemError(errno.EFBIG)
        cut = {offset // BLOCK_SIZE_BYTES} if offset % BLOCK_SIZE_BYTES else set()
        if end % BLOCK_SIZE_BYTES:
            cut.add(end // BLOCK_SIZE_BYTES)
        partial = [block for block in cut if file.is_at_origin(block)]
        if partial:
            return self._write_at_origin(file, offset, bytes(data), partial)
        return self._written(file, offset, data)

    async def _write_at_origin(self, file: File, offset: int, data: bytes, partial: list[int]) -> Answer:
        await self._bring_in(file, partial)
        return self._written(file, offset, memoryview(data))

    async def _bring_in(self, file: File, blocks: list[int]) -> None:
        """Blocks that are at their origin become written ones. Raises FileSystemError after `broken`."""
        for block in blocks:
            try:
                (page,) = await self._fetch(file, block, 1)
            except FileSystemError:
                self._broken(VolumeFullError("a block that is written in part cannot be read"))
                raise
            if file.is_at_origin(block):
                self._store_blocks(file, block, memoryview(page))

    def _written(self, file: File, offset: int, data: memoryview) -> Answer:
        self._store(file, offset, data)
        file.mtime_ns = self._now_ns()
        return wire.pack_write(len(data))

    def _store(self, file: File, offset: int, data: memoryview) -> None:
        """No block that is cut may be at its origin. Raises FileSystemError after `broken`."""
        end = offset + len(data)
        if not data:
            return
        first, head = divmod(offset, BLOCK_SIZE_BYTES)
        last, tail = divmod(end, BLOCK_SIZE_BYTES)
        if head or tail:
            # Complete the first and the last block with what they hold.
            stop = last + bool(tail)
            before = b"".join(self._block(file, first))[:head] if head else b""
            after = b"".join(self._block(file, last))[tail:] if tail else b""
            data = memoryview(b"".join((before, data, after)))
            assert len(data) == (stop - first) * BLOCK_SIZE_BYTES  # noqa: S101 - our own arithmetic
        self._store_blocks(file, first, data)
        file.size = max(file.size, end)

    def _block(self, file: File, block: int) -> list[bytes]:
        try:
            return self._local(file, block, block + 1)
        except FileSystemError:
            self._broken(VolumeFullError("a block that is written in part cannot be read"))
            raise

    def _store_blocks(self, file: File, first: int, data: memoryview) -> None:
        slots: list[int] = []
        try:
            for block in range(first, first + len(data) // BLOCK_SIZE_BYTES):
                slot = file.slots.get(block)
                if slot is None:
                    slot = file.slots[block] = self.blocks.take()
                slots.append(slot)
            self.blocks.write(slots, file.node_id, first, data)
        except KeylakeError as error:
            self._broken(error)
            raise FileSystemError(errno.ENOSPC) from None
