"""The kernel's side of FUSE as bytes: requests read from /dev/fuse, answers written to it.

Structures and numbers are those of `include/uapi/linux/fuse.h`, protocol 7.31, in the machine's own byte order and
without padding of our own. A request is a header of 40 bytes and what its opcode says; an answer is a header of 16
bytes and the same. Sizes are in bytes, times in nanoseconds since 1970.

A core: bytes in, values out, and back.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from shared.errors import CorruptedError

MAJOR: Final = 7
MINOR: Final = 31
ROOT_ID: Final = 1
MAX_WRITE_SIZE_BYTES: Final = 256 * 1024
REQUEST_BUFFER_SIZE_BYTES: Final = MAX_WRITE_SIZE_BYTES + 4096
"""The kernel refuses to hand out requests to a smaller buffer."""
PAGE_SIZE_BYTES: Final = 4096
_FOREVER_S: Final = 1 << 31
"""Nobody changes these files behind the kernel's back, so names and attributes never expire."""


class Opcode(enum.IntEnum):
    """Those that are answered; all others get ENOSYS, and the kernel does not ask again."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    READ = 15
    WRITE = 16
    STATFS = 17
    INIT = 26
    READDIR = 28
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    RENAME2 = 45


class InitFlag(enum.IntFlag):
    ASYNC_READ = 1 << 0
    BIG_WRITES = 1 << 5
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    NO_OPENDIR_SUPPORT = 1 << 24


WANTED_FLAGS: Final = (
    InitFlag.ASYNC_READ
    | InitFlag.BIG_WRITES
    | InitFlag.WRITEBACK_CACHE
    | InitFlag.NO_OPEN_SUPPORT
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    | InitFlag.NO_OPENDIR_SUPPORT
)
REQUIRED_FLAGS: Final = InitFlag.WRITEBACK_CACHE | InitFlag.NO_OPEN_SUPPORT | InitFlag.NO_OPENDIR_SUPPORT
"""Without the first Postgres waits for every write; without the others files would have to be opened (Linux 5.1)."""


class SetAttr(enum.IntFlag):
    """Which fields of a SETATTR count (FATTR_*)."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    CTIME = 1 << 10


_IN_HEADER: Final = struct.Struct("=IIQQIIIHH")
IN_HEADER_SIZE_BYTES: Final = _IN_HEADER.size
_OUT_HEADER: Final = struct.Struct("=IiQ")
_ATTR: Final = struct.Struct("=QQQQQQIIIIIIIIII")
_ENTRY: Final = struct.Struct("=QQQQII")
_ATTR_OUT: Final = struct.Struct("=QII")
_INIT_IN: Final = struct.Struct("=IIII")
_INIT_OUT: Final = struct.Struct("=IIIIHHIIHHI28x")
_SETATTR_IN: Final = struct.Struct("=IIQQQQQQIIIIIIII")
_IO_IN: Final = struct.Struct("=QQIIQII")
_WRITE_OUT: Final = struct.Struct("=II")
_MKNOD_IN: Final = struct.Struct("=IIII")
_MKDIR_IN: Final = struct.Struct("=II")
_RENAME_IN: Final = struct.Struct("=Q")
_RENAME2_IN: Final = struct.Struct("=QII")
_FALLOCATE_IN: Final = struct.Struct("=QQQII")
_FORGET_IN: Final = struct.Struct("=Q")
_BATCH_FORGET_IN: Final = struct.Struct("=II")
_FORGET_ONE: Final = struct.Struct("=QQ")
_STATFS_OUT: Final = struct.Struct("=QQQQQIIII24x")
_DIRENT: Final = struct.Struct("=QQII")


class Request(NamedTuple):
    """`body` is a view of the buffer that the request was read into: valid until the next read."""

    opcode: int
    unique: int
    node_id: int
    body: memoryview


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) says about one file."""

    node_id: int
    size_bytes: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    links: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class AttributeChange:
    """SETATTR: what is None stays."""

    mode: int | None
    uid: int | None
    gid: int | None
    size_bytes: int | None
    atime_ns: int | None
    mtime_ns: int | None
    ctime_ns: int | None


def parse_request(data: memoryview) -> Request:
    """Raises CorruptedError for what no kernel sends."""
    try:
        length, opcode, unique, node_id, _, _, _, _, _ = _IN_HEADER.unpack_from(data)
    except struct.error:
        raise CorruptedError("a FUSE request is shorter than its header") from None
    if length != len(data):
        raise CorruptedError("a FUSE request has not the length that it says")
    return Request(opcode, unique, node_id, data[IN_HEADER_SIZE_BYTES:])


def pack_answer_header(unique: int, size_bytes: int) -> bytes:
    """Of an answer with `size_bytes` behind it."""
    return _OUT_HEADER.pack(_OUT_HEADER.size + size_bytes, 0, unique)


def pack_error(unique: int, number: int) -> bytes:
    """`number`: an errno, positive."""
    return _OUT_HEADER.pack(_OUT_HEADER.size, -number, unique)


def parse_init(body: memoryview) -> tuple[int, int, int, int]:
    """(major, minor, max_readahead, flags)."""
    major, minor, readahead, flags = _unpack(_INIT_IN, body)
    return major, minor, readahead, flags


def pack_init(max_readahead_bytes: int, flags: int) -> bytes:
    pages = MAX_WRITE_SIZE_BYTES // PAGE_SIZE_BYTES
    return _INIT_OUT.pack(MAJOR, MINOR, max_readahead_bytes, flags, 64, 48, MAX_WRITE_SIZE_BYTES, 1, pages, 0, 0)


def pack_attributes(attributes: Attributes) -> bytes:
    """The answer to GETATTR and SETATTR."""
    return _ATTR_OUT.pack(_FOREVER_S, 0, 0) + _pack_attr(attributes)


def pack_entry(attributes: Attributes) -> bytes:
    """The answer to LOOKUP, MKNOD, MKDIR: the kernel knows the node from then on, until it forgets it."""
    return _ENTRY.pack(attributes.node_id, 0, _FOREVER_S, _FOREVER_S, 0, 0) + _pack_attr(attributes)


NO_ENTRY: Final = _ENTRY.pack(0, 0, _FOREVER_S, 0, 0, 0) + bytes(_ATTR.size)
"""The answer to LOOKUP for a name that is not there: the kernel remembers that, too."""


def _pack_attr(a: Attributes) -> bytes:
    (atime, atime_ns), (mtime, mtime_ns), (ctime, ctime_ns) = (
        divmod(each, 1_000_000_000) for each in (a.atime_ns, a.mtime_ns, a.ctime_ns)
    )
    return _ATTR.pack(
        a.node_id, a.size_bytes, -(-a.size_bytes // 512), atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        a.mode, a.links, a.uid, a.gid, 0, 8192, 0,
    )  # fmt: skip


def parse_setattr(body: memoryview, now_ns: int) -> AttributeChange:
    (valid, _, _, size, _, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode, _, uid, gid, _) = _unpack(
        _SETATTR_IN, body
    )
    return AttributeChange(
        mode=mode if valid & SetAttr.MODE else None,
        uid=uid if valid & SetAttr.UID else None,
        gid=gid if valid & SetAttr.GID else None,
        size_bytes=size if valid & SetAttr.SIZE else None,
        atime_ns=_time(valid & SetAttr.ATIME, valid & SetAttr.ATIME_NOW, atime, atime_ns, now_ns),
        mtime_ns=_time(valid & SetAttr.MTIME, valid & SetAttr.MTIME_NOW, mtime, mtime_ns, now_ns),
        ctime_ns=ctime * 1_000_000_000 + ctime_ns if valid & SetAttr.CTIME else None,
    )


def _time(is_set: int, is_now: int, seconds: int, nanoseconds: int, now_ns: int) -> int | None:
    if is_now:
        return now_ns
    return seconds * 1_000_000_000 + nanoseconds if is_set else None


def parse_io(body: memoryview) -> tuple[int, int]:
    """(offset, size) of READ and READDIR."""
    _, offset, size, *_ = _unpack(_IO_IN, body)
    return offset, size


def parse_write(body: memoryview) -> tuple[int, memoryview]:
    """(offset, data)."""
    _, offset, size, *_ = _unpack(_IO_IN, body)
    data = body[_IO_IN.size :]
    if len(data) != size:
        raise CorruptedError("a FUSE write has not the size that it says")
    return offset, data


def pack_write(size_bytes: int) -> bytes:
    return _WRITE_OUT.pack(size_bytes, 0)


def parse_name(body: memoryview) -> bytes:
    """The one name of LOOKUP, UNLINK, RMDIR."""
    (name,) = _names(body, 1)
    return name


def parse_mknod(body: memoryview) -> tuple[int, bytes]:
    """(mode with file type, name)."""
    mode, *_ = _unpack(_MKNOD_IN, body)
    (name,) = _names(body[_MKNOD_IN.size :], 1)
    return mode, name


def parse_mkdir(body: memoryview) -> tuple[int, bytes]:
    """(mode, name)."""
    mode, _ = _unpack(_MKDIR_IN, body)
    (name,) = _names(body[_MKDIR_IN.size :], 1)
    return mode, name


def parse_rename(body: memoryview) -> tuple[int, bytes, bytes]:
    """(new directory's node, old name, new name)."""
    (directory,) = _unpack(_RENAME_IN, body)
    old, new = _names(body[_RENAME_IN.size :], 2)
    return directory, old, new


def parse_rename2(body: memoryview) -> tuple[int, int, bytes, bytes]:
    """(new directory's node, flags, old name, new name)."""
    directory, flags, _ = _unpack(_RENAME2_IN, body)
    old, new = _names(body[_RENAME2_IN.size :], 2)
    return directory, flags, old, new


def parse_fallocate(body: memoryview) -> tuple[int, int, int]:
    """(offset, length, mode)."""
    _, offset, length, mode, _ = _unpack(_FALLOCATE_IN, body)
    return offset, length, mode


def parse_forget(body: memoryview) -> int:
    """How many times the node was handed out."""
    (count,) = _unpack(_FORGET_IN, body)
    return int(count)


def parse_batch_forget(body: memoryview) -> list[tuple[int, int]]:
    """(node, how many times it was handed out), each."""
    count, _ = _unpack(_BATCH_FORGET_IN, body)
    rest = body[_BATCH_FORGET_IN.size :]
    if len(rest) < count * _FORGET_ONE.size:
        raise CorruptedError("a FUSE request is shorter than its contents")
    return [_FORGET_ONE.unpack_from(rest, i * _FORGET_ONE.size) for i in range(count)]


def pack_statfs(block_size_bytes: int, blocks: int, free_blocks: int) -> bytes:
    return _STATFS_OUT.pack(blocks, free_blocks, free_blocks, 0, 0, block_size_bytes, 255, block_size_bytes, 0)


def pack_dirent(node_id: int, next_offset: int, mode: int, name: bytes) -> bytes:
    """One entry of READDIR. `next_offset`: where a later READDIR goes on behind it."""
    entry = _DIRENT.pack(node_id, next_offset, len(name), (mode >> 12) & 0xF) + name
    return entry + bytes(-len(entry) % 8)


def _unpack(form: struct.Struct, body: memoryview) -> tuple[int, ...]:
    try:
        return form.unpack_from(body)
    except struct.error:
        raise CorruptedError("a FUSE request is shorter than its contents") from None


def _names(body: memoryview, count: int) -> list[bytes]:
    names = bytes(body).split(b"\0")
    if len(names) != count + 1 or names[-1] or not all(names[:-1]):
        raise CorruptedError("a FUSE request has not the names that it should have")
    return names[:-1]
