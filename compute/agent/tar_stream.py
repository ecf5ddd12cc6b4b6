"""Reading the tar archive of a basebackup as it arrives, and accepting nothing but what a basebackup may hold.

POSIX ustar (IEEE Std 1003.1, pax, "ustar Interchange Format"), blocks of 512 bytes. Taken: regular files and
directories with relative names. Refused: links, devices, absolute names, `..`, names that are not plain ASCII, a file
where a directory is, more bytes than promised. The archive comes from our own pageserver over TLS, but it is user
data that has been through an object store, and what reads it runs next to a key.

This file is a core: no I/O. Feed chunks, get events in order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from shared.errors import CorruptedError

BLOCK_SIZE_BYTES: Final = 512
MAX_FILE_SIZE_BYTES: Final = 1 << 30
"""Postgres cuts relations into segments of 1 GiB (RELSEG_SIZE)."""
_NAME: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}(/[A-Za-z0-9_.\-]{1,64}){0,7}")
_ZERO_BLOCK: Final = bytes(BLOCK_SIZE_BYTES)


@dataclass(frozen=True, slots=True)
class Directory:
    path: PurePosixPath


@dataclass(frozen=True, slots=True)
class FileStart:
    path: PurePosixPath
    size_bytes: int


@dataclass(frozen=True, slots=True)
class FileData:
    """The next bytes of the file that was started last; a view of the chunk that was fed, valid until the next
    `feed`.
    """

    data: memoryview


@dataclass(frozen=True, slots=True)
class FileEnd:
    path: PurePosixPath


Event = Directory | FileStart | FileData | FileEnd


class TarStream:
    """Incremental; holds less than one block between calls. After an error it must not be fed again."""

    def __init__(self) -> None:
        self._held = bytearray()  # of a header that is not complete
        self._file: PurePosixPath | None = None
        self._missing_bytes = 0  # of that file's content
        self._padding_bytes = 0  # to skip before the next header
        self._zero_blocks = 0
        self._paths: set[PurePosixPath] = set()

    @property
    def ended(self) -> bool:
        """The end-of-archive mark (two zero blocks) has come."""
        return self._zero_blocks >= 2

    def feed(self, chunk: bytes | memoryview) -> Iterator[Event]:
        """Events of this chunk; exhaust it before the next call. Raises CorruptedError."""
        view = memoryview(chunk)
        position = 0
        while position < len(view):
            if self._missing_bytes:
                data = view[position : position + self._missing_bytes]
                self._missing_bytes -= len(data)
                position += len(data)
                yield FileData(data)
                if not self._missing_bytes:
                    yield self._end_file()
            elif self._padding_bytes:
                skipped = min(self._padding_bytes, len(view) - position)
                self._padding_bytes -= skipped
                position += skipped
            else:
                wanted = BLOCK_SIZE_BYTES - len(self._held)
                self._held += view[position : position + wanted]
                position += wanted
                if len(self._held) == BLOCK_SIZE_BYTES:
                    block = bytes(self._held)
                    self._held.clear()
                    yield from self._header(block)

    def _end_file(self) -> FileEnd:
        path, self._file = self._file, None
        assert path is not None  # noqa: S101 - content follows a header only
        return FileEnd(path)

    def _header(self, block: bytes) -> Iterator[Event]:
        if block == _ZERO_BLOCK:
            self._zero_blocks += 1
            return
        if self._zero_blocks:
            raise CorruptedError("the basebackup goes on after its end")
        if block[257:262] != b"ustar" or not _checksum_is_good(block):
            raise CorruptedError("the basebackup is not a ustar archive")
        path = _path(block)
        if path in self._paths:
            raise CorruptedError("the basebackup names a path twice")
        self._paths.add(path)
        size = _octal(block[124:136])
        match block[156:157]:
            case b"5":
                if size:
                    raise CorruptedError("a directory of the basebackup has content")
                yield Directory(path)
            case b"0" | b"\0":
                if size > MAX_FILE_SIZE_BYTES:
                    raise CorruptedError("a file of the basebackup is larger than a segment")
                self._file, self._missing_bytes = path, size
                self._padding_bytes = -size % BLOCK_SIZE_BYTES
                yield FileStart(path, size)
                if size == 0:
                    yield self._end_file()
            case _:
                raise CorruptedError("the basebackup holds something that is neither a file nor a directory")


def _text(field: bytes) -> str:
    raw, _, rest = field.partition(b"\0")
    if rest.strip(b"\0"):
        raise CorruptedError("a header of the basebackup is malformed")
    try:
        return raw.decode("ascii")
    except UnicodeDecodeError:
        raise CorruptedError("a header of the basebackup is malformed") from None


def _octal(field: bytes) -> int:
    digits = field.rstrip(b"\0 ").lstrip(b" ")
    if not digits or not all(0x30 <= digit <= 0x37 for digit in digits):
        raise CorruptedError("a number in a header of the basebackup is malformed")
    return int(digits, 8)


def _checksum_is_good(block: bytes) -> bool:
    return _octal(block[148:156]) == sum(block) - sum(block[148:156]) + 8 * 0x20


def _path(block: bytes) -> PurePosixPath:
    prefix, name = _text(block[345:500]), _text(block[0:100])
    full = (f"{prefix}/{name}" if prefix else name).removeprefix("./").rstrip("/")
    if full in ("", "."):
        return PurePosixPath(".")
    if not _NAME.fullmatch(full) or any(part in (".", "..") for part in full.split("/")):
        raise CorruptedError("the basebackup names a path that a data directory does not have")
    return PurePosixPath(full)
