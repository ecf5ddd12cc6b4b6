"""What the providers share to survive a restart: the host key, sealed files, and the append-only log.

The host key stands in for the hardware security module of the real cloud: 32 random bytes in `host.key`, mode 0600,
made at the first start. Key material, secret access keys and policies lie on disk only under AES-256-GCM with it.
Whoever can read that file has every key in this simulator, as whoever owned the real HSM would.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from shared.errors import ConflictError, CorruptedError, IntegrityError

HOST_KEY_SIZE_BYTES: Final = 32
_NONCE_SIZE_BYTES: Final = 12
_TAG_SIZE_BYTES: Final = 16


def fsync_directory(directory: Path) -> None:
    """So that a created, renamed or removed name survives a power cut, not only the file's content."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` (mode 0600): after a crash it holds the old content or the new, whole and durable."""
    scratch = path.with_name(path.name + ".new")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, stat.S_IRUSR | stat.S_IWUSR)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    fsync_directory(path.parent)


def load_or_create_secret(path: Path, size_bytes: int) -> bytes:
    """The file's bytes, made random at first. Raises CorruptedError when the file has another size.

    Raises IntegrityError when others than the owner may read it: a key file that leaked is no key.
    """
    if not path.exists():
        write_atomically(path, os.urandom(size_bytes))
    if path.stat().st_mode & 0o077:
        raise IntegrityError(f"{path.name} is readable by others; make it mode 0600")
    secret = path.read_bytes()
    if len(secret) != size_bytes:
        raise CorruptedError(f"{path.name} has {len(secret)} bytes instead of {size_bytes}")
    return secret


class DirectoryLock:
    """Exclusive use of a directory by this process, until `release` or its end (flock on `lock`)."""

    def __init__(self, directory: Path) -> None:
        """Raises ConflictError when another process holds it."""
        self._descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, stat.S_IRUSR | stat.S_IWUSR)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise ConflictError(f"another process uses {directory.name}") from None

    def release(self) -> None:
        os.close(self._descriptor)


class SealedFile:
    """One file under the host key: 12 bytes random nonce, then AES-256-GCM with the file's purpose as AAD."""

    def __init__(self, path: Path, host_key: bytes, purpose: bytes) -> None:
        self._path = path
        self._aead = AESGCM(host_key)
        self._purpose = purpose

    def read(self) -> bytes | None:
        """None when it was never written. Raises IntegrityError when it does not open under this host key."""
        if not self._path.exists():
            return None
        data = self._path.read_bytes()
        if len(data) < _NONCE_SIZE_BYTES + _TAG_SIZE_BYTES:
            raise CorruptedError(f"{self._path.name} is too short to be sealed")
        try:
            return self._aead.decrypt(data[:_NONCE_SIZE_BYTES], data[_NONCE_SIZE_BYTES:], self._purpose)
        except InvalidTag:
            raise IntegrityError(f"{self._path.name} does not open under this host key") from None

    def write(self, plaintext: bytes) -> None:
        """Durable when it returns. One random nonce per write: far fewer than 2^32 under one host key."""
        nonce = os.urandom(_NONCE_SIZE_BYTES)
        write_atomically(self._path, nonce + self._aead.encrypt(nonce, plaintext, self._purpose))


class AppendLog:
    """Lines in a file, durable before `append` returns. Concurrent appends share one fdatasync (group commit).

    A line that a crash cut short is removed when the log is opened: its `append` never returned.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        _drop_torn_tail(path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, stat.S_IRUSR | stat.S_IWUSR)
        fsync_directory(path.parent)
        self._size_bytes = path.stat().st_size
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="append-log")
        self._waiting: list[bytes] = []
        self._flush: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None

    def __iter__(self) -> Iterator[bytes]:
        """Every durable line, oldest first, without its newline. Reads the file anew."""
        with self._path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line[:-1]

    async def append(self, lines: list[bytes]) -> None:
        """Raises OSError when the disk refuses; the caller must then not report success."""
        if any(b"\n" in line for line in lines):
            raise ValueError("a log line holds no newline")
        self._waiting += lines
        # What joins before the flush begins goes with it; the task that runs now took its batch already.
        if self._flush is None:
            self._flush = asyncio.create_task(self._flush_after(self._running))
        await asyncio.shield(self._flush)

    async def _flush_after(self, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            await asyncio.wait({previous})
        batch, self._waiting = b"".join(line + b"\n" for line in self._waiting), []
        self._running, self._flush = self._flush, None
        await asyncio.get_running_loop().run_in_executor(self._executor, self._write, batch)

    def _write(self, batch: bytes) -> None:
        written = 0
        try:
            while written < len(batch):
                written += os.write(self._descriptor, batch[written:])
            os.fdatasync(self._descriptor)
        except OSError:
            # Half a line in the middle would be a damaged log; nobody was told that this batch is in it.
            os.ftruncate(self._descriptor, self._size_bytes)
            raise
        self._size_bytes += written

    async def close(self) -> None:
        """Waits for what is under way."""
        tasks = {task for task in (self._flush, self._running) if task is not None}
        if tasks:
            await asyncio.wait(tasks)
        self._executor.shutdown()
        os.close(self._descriptor)


def _drop_torn_tail(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        file.truncate(position)
        file.flush()
        os.fsync(file.fileno())
