"""Sealed layer files on local disk: ciphertext exactly as in the object store, to save fetching it again.

A cache and nothing more: it is never the only copy, it is not fsynced, and it may be deleted at any time. It holds no
key and checks nothing; whoever opens the bytes verifies their tags, and calls `drop` when a local copy turns out to be
damaged. File names are object keys, under `root`.

The files never take more than `capacity_bytes` together; what was not read for longest goes first.

A read that finds no local file is answered from the object store, by range, at once; the whole object is fetched in
the background by `run`, for the reads to come.

A local read first asks the kernel for what its page cache has (preadv2 with RWF_NOWAIT), on the event loop: that takes
some microseconds, where a thread takes a hundred, most of them for the GIL. Only what the kernel would have to wait for
goes to a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Self

from shared.errors import KeylakeError
from shared.failpoints import failpoint
from shared.storage.base import Data, ObjectStore, check_key
from shared.storage.threads import BlockingPool
from shared.telemetry import get_logger

_TEMPORARY_SUFFIX: Final = "@tmp"
"""`@` stands in no object key."""
_FETCH_QUEUE_LENGTH: Final = 256
_MAX_LOCAL_NUMBER: Final = 1 << 63
_MAX_OPEN_FILES: Final = 128
_log = get_logger(__name__)


class LayerCache:
    """One per process. `capacity_bytes` 0 keeps nothing local."""

    def __init__(self, store: ObjectStore, root: Path, capacity_bytes: int, pool: BlockingPool) -> None:
        self._store = store
        self._root = root
        self._capacity = capacity_bytes
        self._pool = pool
        self._files: OrderedDict[str, int] = OrderedDict()
        self._size = 0
        self._fds: OrderedDict[str, int] = OrderedDict()
        self._wanted: asyncio.Queue[str] = asyncio.Queue(_FETCH_QUEUE_LENGTH)
        self._queued: set[str] = set()
        self._writing: set[str] = set()
        self.local_reads = 0
        self.remote_reads = 0

    @classmethod
    async def open(cls, store: ObjectStore, root: Path, capacity_bytes: int, pool: BlockingPool) -> Self:
        """Take over what an earlier process left under `root`. `pool` stays the caller's."""
        cache = cls(store, root, capacity_bytes, pool)
        found = await cache._pool.run(_scan, root)
        for key, size_bytes in found:
            cache._files[key] = size_bytes
            cache._size += size_bytes
        await cache._evict()
        return cache

    async def read(self, key: str, start: int, end: int, *, remote: bool = False, ahead: bool = True) -> bytes:
        """The bytes [start, end) of a sealed object; with `remote`, from the object store in any case. Without `ahead`
        the rest of the object is not fetched: nobody will come back for it.

        Raises what the object store raises: ObjectNotFoundError, StoreUnavailableError, InvalidRangeError, ….
        """
        if not remote and key in self._files:
            data = self._read_at_once(key, start, end)
            if data is None:
                data = await self._pool.run(_pread, self._path(key), start, end)
            if data is not None:
                self.local_reads += 1
                if key in self._files:
                    self._files.move_to_end(key)
                return data
            await self.drop(key)  # gone, or shorter than it was
        self.remote_reads += 1
        data = await self._store.get_range(key, start, end)
        if ahead and self._capacity and key not in self._files and key not in self._queued and not self._wanted.full():
            self._queued.add(key)
            self._wanted.put_nowait(key)
        return data

    async def insert(self, key: str, data: Data) -> None:
        """Keep a copy of an object. A disk that is full or broken is not an error: then there is no copy."""
        check_key(key)
        if len(data) > self._capacity or key in self._writing:
            return
        # Invariant: room is made first, and what is being written counts, so the limit holds at every moment.
        self._writing.add(key)
        self._size += len(data)
        kept = False
        try:
            await self.drop(key)
            await self._evict()
            if self._size <= self._capacity:  # or others are writing more than there is room for
                await self._pool.run(_write, self._path(key), data)
                self._close_file(key)  # another file has the name now
                self._files[key] = len(data)
                kept = True
        except OSError as error:
            _log.warning("local layer cache cannot be written", errno=error.errno)
        finally:
            self._writing.discard(key)
            if not kept:
                self._size -= len(data)

    async def drop(self, key: str) -> None:
        """Forget the local copy: it is damaged, or its layer is gone."""
        size_bytes = self._files.pop(key, None)
        if size_bytes is not None:
            self._size -= size_bytes
            self._close_file(key)
            await self._pool.run(_unlink, self._path(key))

    async def retain(self, prefix: str, keep: Iterable[str]) -> None:
        """Of the local files whose key starts with `prefix`, drop those that are not in `keep`."""
        kept = set(keep)
        for key in [key for key in self._files if key.startswith(prefix) and key not in kept]:
            await self.drop(key)

    async def forget(self, folder: str) -> None:
        """Everything below `folder`, numbers that were remembered too. Raises OSError when the disk does not let go."""
        await self.retain(f"{folder}/", ())
        await self._pool.run(_remove_tree, self._path(folder))

    async def run(self) -> None:
        """Fetch whole objects that were read by range. Until cancelled."""
        while True:
            key = await self._wanted.get()
            try:
                if key not in self._files:
                    await self.insert(key, await self._store.get(key))
            except KeylakeError as error:
                _log.info("layer was not fetched ahead", code=error.code)
            finally:
                self._queued.discard(key)

    def close(self) -> None:
        """Close files. What is on disk stays."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    async def remember_number(self, key: str, number: int) -> None:
        """Keep one number of a timeline on this machine, not secret: see RemoteTimeline. Best effort."""
        with contextlib.suppress(OSError):
            await self._pool.run(_write, self._path(key), str(number).encode("ascii"))

    async def recall_number(self, key: str) -> int:
        """What was remembered, 0 if nothing was or it is unreadable."""
        return await self._pool.run(_read_number, self._path(key))

    @property
    def size_bytes(self) -> int:
        return self._size

    def __contains__(self, key: object) -> bool:
        return key in self._files

    def path(self, key: str) -> Path:
        """Where the local copy of an object lies, if there is one."""
        return self._path(key)

    def _read_at_once(self, key: str, start: int, end: int) -> bytes | None:
        """What the kernel can give without waiting; None if it is not all of it."""
        fd = self._fds.get(key)
        if fd is None:
            try:
                fd = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:
                return None
            self._fds[key] = fd
            if len(self._fds) > _MAX_OPEN_FILES:
                _, oldest = self._fds.popitem(last=False)
                os.close(oldest)
        else:
            self._fds.move_to_end(key)
        # Descriptors are used here only, never in a thread: one that is closed meanwhile could be another file by then.
        buffer = bytearray(end - start)
        try:
            size_bytes = os.preadv(fd, [buffer], start, os.RWF_NOWAIT)
        except OSError:  # not in memory, or a file system that cannot tell
            return None
        return bytes(buffer) if size_bytes == end - start else None

    def _close_file(self, key: str) -> None:
        fd = self._fds.pop(key, None)
        if fd is not None:
            os.close(fd)

    async def _evict(self) -> None:
        while self._size > self._capacity and self._files:
            await self.drop(next(iter(self._files)))  # the one that was not read for longest

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)


# Everything below runs in the pool's threads.


def _scan(root: Path) -> list[tuple[str, int]]:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    found: list[tuple[float, str, int]] = []
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if name.endswith(_TEMPORARY_SUFFIX):
                path.unlink(missing_ok=True)
                continue
            stat = path.stat()
            key = str(path.relative_to(root))
            if "/layers/" in key:
                found.append((stat.st_mtime, key, stat.st_size))
    return [(key, size_bytes) for _, key, size_bytes in sorted(found)]


def _pread(path: Path, start: int, end: int) -> bytes | None:
    """None when the file is not there or too short."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        data = os.pread(fd, end - start, start)
        while 0 < len(data) < end - start:
            more = os.pread(fd, end - start - len(data), start + len(data))
            if not more:
                break
            data += more
    except OSError:
        return None
    finally:
        os.close(fd)
    return data if len(data) == end - start else None


def _write(path: Path, data: Data) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_TEMPORARY_SUFFIX}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            rest = memoryview(data).cast("B")
            while rest:
                rest = rest[os.write(fd, rest) :]
        finally:
            os.close(fd)
        failpoint("local-copy-written")
        temporary.replace(path)
        failpoint("local-copy-renamed")
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _remove_tree(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _read_number(path: Path) -> int:
    try:
        text = path.read_bytes()
    except OSError:
        return 0
    if not text.isdigit() or len(text) > 19:
        return 0
    return min(int(text), _MAX_LOCAL_NUMBER)
