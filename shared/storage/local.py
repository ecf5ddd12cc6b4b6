"""An object store in a directory of one machine; several processes may share it.

Layout, under the root:

    <segment>@/<segment>@/<segment>     the object of key segment/segment/segment
    @tmp/<random>/<n>                   a write in progress of one open store, which holds a lock on that folder

Folders carry an `@` (which no key contains), so that the keys `a` and `a/b` can both exist, as on S3.

A write goes to a temporary file, which is fsynced and then renamed (`put`) or hard-linked (`put_if_absent`; link(2)
fails when the name exists, so exactly one creator wins) to its name; then the folder is fsynced. A crash at any
point leaves the old object, the new one or none, and at worst a file under `@tmp`, which no key can name and which
the next `open` of any process removes, once the lock of its dead owner is free. Empty folders stay.

The fsync of a folder that failed is never tried again: the kernel may have dropped what it could not write and would
report success the second time (PostgreSQL wiki, "Fsync Errors"). So the object that was being created goes away again,
lest somebody finds it there and takes it for durable, and from then on this store refuses every write
(StoreFailedError). The fsync of a temporary file may be tried again: each attempt writes a new one.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import secrets
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self

from shared.failpoints import failpoint
from shared.storage.base import (
    Data,
    InvalidRangeError,
    ObjectExistsError,
    ObjectInfo,
    ObjectNotFoundError,
    StoreDeniedError,
    StoreFailedError,
    StoreUnavailableError,
    check_key,
    check_prefix,
    check_range,
    check_size,
)
from shared.storage.threads import BlockingPool

_TEMPORARY: Final = "@tmp"
_FOLDER_MARK: Final = "@"
_LIST_BATCH_OBJECTS: Final = 500
_REFUSALS: Final = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTSUP, errno.EXDEV}
_NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class LocalObjectStore:
    """Made by `open`. Files are 0600 and folders 0700, owned by the process's user."""

    def __init__(self, root: Path, temporary: Path, lock_fd: int, pool: BlockingPool) -> None:
        self._root = root
        self._temporary = temporary
        self._lock_fd = lock_fd
        self._pool = pool
        self._temporary_names = itertools.count()
        self._durable_folders: set[Path] = {root}
        self._failure = ""

    @classmethod
    async def open(cls, root: Path, *, threads: int = 8) -> Self:
        """Create the directory if there is none and remove what crashed writers left."""
        pool = BlockingPool(threads, "local-store")
        try:
            temporary, lock_fd = await pool.run(_open_root, root)
        except BaseException:
            await pool.close()
            raise
        return cls(root, temporary, lock_fd, pool)

    async def put(self, key: str, data: Data) -> None:
        check_key(key)
        check_size(data)
        await self._pool.run(self._write, key, data, replace=True)

    async def put_if_absent(self, key: str, data: Data) -> None:
        check_key(key)
        check_size(data)
        await self._pool.run(self._write, key, data, replace=False)

    async def get(self, key: str) -> bytes:
        check_key(key)
        return await self._pool.run(self._read, key, None)

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        check_key(key)
        check_range(start, end)
        return await self._pool.run(self._read, key, (start, end))

    async def head(self, key: str) -> ObjectInfo:
        check_key(key)
        return await self._pool.run(self._stat, key)

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        check_prefix(prefix)
        *folders, _ = prefix.split("/")
        walk = _walk(self._folder(folders), "".join(f"{name}/" for name in folders), prefix)
        while batch := await self._pool.run(_next_batch, walk):
            for info in batch:
                yield info

    async def delete(self, key: str) -> None:
        check_key(key)
        await self._pool.run(self._delete, [key])

    async def delete_many(self, keys: Iterable[str]) -> None:
        checked = [check_key(key) for key in keys]
        await self._pool.run(self._delete, checked)

    async def close(self) -> None:
        if await self._pool.close():
            with suppress(OSError):
                self._temporary.rmdir()
            os.close(self._lock_fd)

    # Everything below runs in the pool's threads.

    def _folder(self, names: Iterable[str]) -> Path:
        return self._root.joinpath(*(name + _FOLDER_MARK for name in names))

    def _path(self, key: str) -> Path:
        *folders, name = key.split("/")
        return self._folder(folders) / name

    def _write(self, key: str, data: Data, *, replace: bool) -> None:
        path = self._path(key)
        temporary = self._temporary / str(next(self._temporary_names))
        with self._writing():
            try:
                _write_durably(temporary, data)
                failpoint("object-durable")
                self._make_folder(path.parent)
                if replace:
                    temporary.rename(path)
                else:
                    path.hardlink_to(temporary)
            except FileExistsError:
                # The winner may not have reached its own fsync yet, and our caller may act on what it sees.
                _fsync_folder(path.parent)
                raise ObjectExistsError(f"object {key} exists") from None
            except FileNotFoundError:
                self._durable_folders = {self._root}  # somebody removed folders under us: look again next time
                raise
            finally:
                with suppress(FileNotFoundError):  # after the rename, or if it could not even be created
                    temporary.unlink()
            failpoint("object-named")
            try:
                _fsync_folder(path.parent)
            except StoreFailedError:
                if not replace:
                    with suppress(OSError):
                        path.unlink()
                raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises StoreFailedError when an fsync failed before, or does now."""
        if self._failure:
            raise StoreFailedError(self._failure)
        with _narrowed():
            try:
                yield
            except StoreFailedError as error:
                self._failure = str(error)
                raise

    def _make_folder(self, folder: Path) -> None:
        """Create `folder` and make its name durable, and those of the folders above it."""
        # Not "fsync if we created it": another process may have created it and not have fsynced yet.
        if folder in self._durable_folders:
            return
        self._make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        _fsync_folder(folder.parent)
        self._durable_folders.add(folder)

    def _read(self, key: str, byte_range: tuple[int, int] | None) -> bytes:
        with _narrowed(), _opened(self._path(key), key) as fd:
            size = os.fstat(fd).st_size
            start, end = byte_range or (0, size)
            if end > size:
                raise InvalidRangeError(f"range [{start}, {end}) reaches past the end of {key} ({size} bytes)")
            return _read_exactly(fd, start, end)

    def _stat(self, key: str) -> ObjectInfo:
        with _narrowed(), _opened(self._path(key), key) as fd:
            return ObjectInfo(key, os.fstat(fd).st_size)

    def _delete(self, keys: Iterable[str]) -> None:
        changed: set[Path] = set()
        with self._writing():
            for key in keys:
                path = self._path(key)
                with suppress(FileNotFoundError):
                    path.unlink()
                    failpoint("object-unlinked")
                    changed.add(path.parent)
            for folder in changed:
                _fsync_folder(folder)


def _open_root(root: Path) -> tuple[Path, int]:
    """Returns this store's folder for temporary files and the descriptor that locks it."""
    with _narrowed():
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _fsync_folder(root.parent)
        parent = root / _TEMPORARY
        parent.mkdir(mode=0o700, exist_ok=True)
        for leftover in parent.iterdir():
            _remove_if_abandoned(leftover)
        while True:
            temporary = parent / secrets.token_hex(8)
            temporary.mkdir(mode=0o700)
            # Until we hold the lock another process may take the folder for abandoned and remove it.
            try:
                lock_fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            fcntl.flock(lock_fd, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, lock_fd
            os.close(lock_fd)


def _remove_if_abandoned(folder: Path) -> None:
    """Remove the temporary folder of a store whose process is gone: the kernel dropped its lock."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # another process was faster
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # its owner lives
    else:
        with suppress(FileNotFoundError):  # another process had the lock before us, and removed it
            for leftover in folder.iterdir():
                leftover.unlink(missing_ok=True)
            folder.rmdir()
    finally:
        os.close(fd)


def _walk(folder: Path, key_prefix: str, wanted_prefix: str) -> Iterator[ObjectInfo]:
    """Objects under `folder`, whose keys start with `key_prefix`, in key order, if they start with `wanted_prefix`."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(_key_part(entry) for entry in entries if not entry.name.startswith(_FOLDER_MARK))
    except FileNotFoundError:
        return
    for part in found:
        key = key_prefix + part
        if part.endswith("/"):
            if key.startswith(wanted_prefix) or wanted_prefix.startswith(key):
                yield from _walk(folder / (part[:-1] + _FOLDER_MARK), key, wanted_prefix)
        elif key.startswith(wanted_prefix):
            with suppress(FileNotFoundError):  # deleted meanwhile
                yield ObjectInfo(key, (folder / part).stat().st_size)


def _key_part(entry: os.DirEntry[str]) -> str:
    # A folder sorts with its slash: 'a-b' < 'a.b' < 'a/b' < 'a0', as the whole keys do.
    return entry.name.removesuffix(_FOLDER_MARK) + "/" if entry.name.endswith(_FOLDER_MARK) else entry.name


def _next_batch(walk: Iterator[ObjectInfo]) -> tuple[ObjectInfo, ...]:
    with _narrowed():
        return tuple(itertools.islice(walk, _LIST_BATCH_OBJECTS))


def _write_durably(path: Path, data: Data) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[os.write(fd, rest) :]
        failpoint("object-written")
        os.fsync(fd)
    finally:
        os.close(fd)


def _fsync_folder(folder: Path) -> None:
    """Raises StoreFailedError; OSError when it could not be tried, which may be tried again."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "unknown error")
        raise StoreFailedError(f"object store directory: fsync failed ({name}), nothing is written any more") from error
    finally:
        os.close(fd)


@contextmanager
def _opened(path: Path, key: str) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise ObjectNotFoundError(f"no object {key}") from None
    try:
        yield fd
    finally:
        os.close(fd)


def _read_exactly(fd: int, start: int, end: int) -> bytes:
    """The bytes [start, end) of a file that is at least `end` long. Objects are replaced, never changed in place."""
    pieces = []
    while start < end:
        piece = os.pread(fd, end - start, start)
        if not piece:
            raise StoreUnavailableError("object store: a file became shorter while it was read")
        pieces.append(piece)
        start += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@contextmanager
def _narrowed() -> Iterator[None]:
    """OSError → our errors. Messages name the errno only: a server path must not reach a client."""
    try:
        yield
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "unknown error")
        if error.errno in _REFUSALS:
            raise StoreDeniedError(f"object store directory refused the operation ({name})") from error
        if error.errno in _NO_ROOM:
            message = f"no room in the object store directory ({name}): make some, and writing goes on by itself"
            raise StoreUnavailableError(message) from error
        raise StoreUnavailableError(f"object store directory failed ({name})") from error
