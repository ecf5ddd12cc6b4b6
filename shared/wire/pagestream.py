"""GetPage@LSN and basebackup: what a pageserver serves to computes, in frames of `shared.wire.frames`, pipelined.

    type | direction | payload (big-endian)
    -----+-----------+----------------------------------------------------------------------------------------
    0x2F | → server  | OPEN: project id (20 ASCII), timeline id (19 ASCII); once, before any request
    0x30 | → server  | GET_PAGE: request id u32, lsn u64, spc u32, db u32, rel u32, fork u8, block u32
    0x31 | → server  | REL_SIZE: request id u32, lsn u64, spc u32, db u32, rel u32, fork u8, 0 u32
    0x32 | → server  | GET_PAGES: as GET_PAGE, then count u16: that many blocks (1 to 64) from `block` on
    0x33 | → server  | RELATIONS: request id u32, lsn u64; every relation fork with its size
    0x34 | → server  | BASEBACKUP: request id u32, lsn u64; to start a primary at the end of the log
    0x35 | → server  | BASEBACKUP_READ_ONLY: the same at any LSN that is kept, for who never adds to the log
    0x36 | → server  | BASEBACKUP_BARE: as BASEBACKUP, without the files of relations: for who gets these page by page
    0x37 | → server  | BASEBACKUP_BARE_READ_ONLY: as BASEBACKUP_READ_ONLY, likewise
    0x38 | → server  | BASEBACKUP_STANDBY: the same at any LSN that is kept, for who replays what follows in the log
    0x39 | → server  | BASEBACKUP_BARE_STANDBY: as BASEBACKUP_STANDBY, likewise
    0x40 | → client  | PAGE: request id u32, 8192 bytes
    0x41 | → client  | SIZE: request id u32, blocks u32 (0xFFFFFFFF: the fork does not exist)
    0x42 | → client  | PAGES: request id u32, count * 8192 bytes
    0x43 | → client  | RELATION_SIZES: request id u32, up to 4096 times (spc u32, db u32, rel u32, fork u8, blocks u32),
         |           | ascending; none: that was all
    0x44 | → client  | CHUNK: request id u32, bytes of a tar archive
    0x45 | → client  | BASEBACKUP_END: request id u32, size u64 of the archive
    0x7F | → client  | ERROR (frames.py) with the request id

Requests are answered in any order. `lsn` is the version to read; the server waits until it has ingested that far
(bounded), and refuses below its GC cutoff. A block at or past the end of its fork is an error, not zeros; one below
it that was never written is zeros.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from shared.ids import ProjectId, TimelineId
from shared.keyspace import MAX_U32, Fork, RelTag
from shared.wire.frames import ProtocolError, pack_frame

OPEN: Final = 0x2F
GET_PAGE: Final = 0x30
REL_SIZE: Final = 0x31
GET_PAGES: Final = 0x32
RELATIONS: Final = 0x33
BASEBACKUP: Final = 0x34
BASEBACKUP_READ_ONLY: Final = 0x35
BASEBACKUP_BARE: Final = 0x36
BASEBACKUP_BARE_READ_ONLY: Final = 0x37
BASEBACKUP_STANDBY: Final = 0x38
BASEBACKUP_BARE_STANDBY: Final = 0x39
PAGE: Final = 0x40
SIZE: Final = 0x41
PAGES: Final = 0x42
RELATION_SIZES: Final = 0x43
CHUNK: Final = 0x44
BASEBACKUP_END: Final = 0x45

MAX_FRAME_SIZE_BYTES: Final = 1024 * 1024
MAX_PAGES_PER_REQUEST: Final = 64
MAX_RELATIONS_PER_FRAME: Final = 4096
_PAGE_SIZE_BYTES: Final = 8192
NO_SUCH_FORK: Final = 0xFFFFFFFF
_OPEN: Final = struct.Struct(">20s19s")
_BLOCK: Final = struct.Struct(">IQIIIBI")
_BLOCKS: Final = struct.Struct(">IQIIIBIH")
_BASEBACKUP: Final = struct.Struct(">IQ")
_RELATION: Final = struct.Struct(">IIIBI")
_ID: Final = struct.Struct(">I")
_SIZE: Final = struct.Struct(">II")
_END: Final = struct.Struct(">IQ")


class StartAs(enum.StrEnum):
    """What a Postgres that starts on a basebackup is going to be."""

    PRIMARY = "primary"
    """It goes on with the log, at its end."""
    READ_ONLY = "read_only"
    """It stays at its LSN."""
    STANDBY = "standby"
    """It replays what others add to the log."""


BASEBACKUP_KINDS: Final[Mapping[tuple[StartAs, bool], int]] = {
    (StartAs.PRIMARY, False): BASEBACKUP,
    (StartAs.PRIMARY, True): BASEBACKUP_BARE,
    (StartAs.READ_ONLY, False): BASEBACKUP_READ_ONLY,
    (StartAs.READ_ONLY, True): BASEBACKUP_BARE_READ_ONLY,
    (StartAs.STANDBY, False): BASEBACKUP_STANDBY,
    (StartAs.STANDBY, True): BASEBACKUP_BARE_STANDBY,
}
"""By what starts on it, and whether it is bare."""


@dataclass(frozen=True, slots=True)
class Open:
    project_id: ProjectId
    timeline_id: TimelineId

    def pack(self) -> bytes:
        return pack_frame(OPEN, _OPEN.pack(str(self.project_id).encode(), str(self.timeline_id).encode()))

    @classmethod
    def parse(cls, payload: bytes) -> Open:
        """Raises ProtocolError."""
        try:
            project, timeline = _OPEN.unpack(payload)
            return cls(ProjectId.parse(project.decode("ascii")), TimelineId.parse(timeline.decode("ascii")))
        except (struct.error, ValueError):
            raise ProtocolError("malformed OPEN") from None


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """GET_PAGE, or REL_SIZE with block 0."""

    request_id: int
    lsn: int
    rel: RelTag
    block: int

    def pack(self, kind: int) -> bytes:
        rel = self.rel
        payload = _BLOCK.pack(self.request_id, self.lsn, rel.spc, rel.db, rel.rel, rel.fork, self.block)
        return pack_frame(kind, payload)

    @classmethod
    def parse(cls, payload: bytes) -> BlockRequest:
        """Raises ProtocolError."""
        try:
            request_id, lsn, spc, db, rel, fork, block = _BLOCK.unpack(payload)
            return cls(request_id, lsn, RelTag(spc, db, rel, Fork(fork)), block)
        except (struct.error, ValueError):
            raise ProtocolError("malformed block request") from None


@dataclass(frozen=True, slots=True)
class BlocksRequest:
    """GET_PAGES: blocks [block, block + count)."""

    request_id: int
    lsn: int
    rel: RelTag
    block: int
    count: int

    def pack(self) -> bytes:
        rel = self.rel
        payload = _BLOCKS.pack(self.request_id, self.lsn, rel.spc, rel.db, rel.rel, rel.fork, self.block, self.count)
        return pack_frame(GET_PAGES, payload)

    @classmethod
    def parse(cls, payload: bytes) -> BlocksRequest:
        """Raises ProtocolError."""
        try:
            request_id, lsn, spc, db, rel, fork, block, count = _BLOCKS.unpack(payload)
            request = cls(request_id, lsn, RelTag(spc, db, rel, Fork(fork)), block, count)
        except (struct.error, ValueError):
            raise ProtocolError("malformed GET_PAGES") from None
        if not 1 <= count <= MAX_PAGES_PER_REQUEST or block + count > MAX_U32:
            raise ProtocolError(f"GET_PAGES of {count} pages; 1 to {MAX_PAGES_PER_REQUEST} are allowed")
        return request


@dataclass(frozen=True, slots=True)
class BasebackupRequest:
    """RELATIONS and the six kinds of BASEBACKUP."""

    request_id: int
    lsn: int

    def pack(self, kind: int = BASEBACKUP) -> bytes:
        return pack_frame(kind, _BASEBACKUP.pack(self.request_id, self.lsn))

    @classmethod
    def parse(cls, payload: bytes) -> BasebackupRequest:
        """Raises ProtocolError."""
        try:
            return cls(*_BASEBACKUP.unpack(payload))
        except struct.error:
            raise ProtocolError("malformed BASEBACKUP or RELATIONS") from None


def pack_page(request_id: int, page: bytes) -> bytes:
    return pack_frame(PAGE, _ID.pack(request_id), page)


def pack_pages(request_id: int, pages: Sequence[bytes]) -> bytes:
    return pack_frame(PAGES, _ID.pack(request_id), *pages)


def pack_relation_sizes(request_id: int, relations: Sequence[tuple[RelTag, int]]) -> bytes:
    """(fork, blocks) each, at most MAX_RELATIONS_PER_FRAME."""
    packed = [_RELATION.pack(tag.spc, tag.db, tag.rel, tag.fork, blocks) for tag, blocks in relations]
    return pack_frame(RELATION_SIZES, _ID.pack(request_id), *packed)


def pack_size(request_id: int, blocks: int) -> bytes:
    return pack_frame(SIZE, _SIZE.pack(request_id, blocks))


def pack_chunk(request_id: int, data: bytes | memoryview) -> bytes:
    return pack_frame(CHUNK, _ID.pack(request_id), data)


def pack_basebackup_end(request_id: int, size_bytes: int) -> bytes:
    return pack_frame(BASEBACKUP_END, _END.pack(request_id, size_bytes))


def parse_request_id(payload: bytes) -> tuple[int, memoryview]:
    """(request id, the rest) of PAGE and CHUNK. Raises ProtocolError."""
    if len(payload) < _ID.size:
        raise ProtocolError("frame without a request id")
    return _ID.unpack_from(payload)[0], memoryview(payload)[_ID.size :]


def parse_pages(payload: bytes) -> tuple[int, list[bytes]]:
    """(request id, pages). Raises ProtocolError."""
    request_id, rest = parse_request_id(payload)
    count, left = divmod(len(rest), _PAGE_SIZE_BYTES)
    if left or not 1 <= count <= MAX_PAGES_PER_REQUEST:
        raise ProtocolError("malformed PAGES")
    return request_id, [bytes(rest[i * _PAGE_SIZE_BYTES : (i + 1) * _PAGE_SIZE_BYTES]) for i in range(count)]


def parse_relation_sizes(payload: bytes) -> tuple[int, list[tuple[RelTag, int]]]:
    """(request id, (fork, blocks) each). Raises ProtocolError, also for forks that are not in ascending order."""
    request_id, rest = parse_request_id(payload)
    if len(rest) % _RELATION.size or len(rest) // _RELATION.size > MAX_RELATIONS_PER_FRAME:
        raise ProtocolError("malformed RELATION_SIZES")
    try:
        found = [
            (RelTag(spc, db, rel, Fork(fork)), blocks) for spc, db, rel, fork, blocks in _RELATION.iter_unpack(rest)
        ]
    except ValueError:
        raise ProtocolError("malformed RELATION_SIZES") from None
    if any(not earlier[0] < later[0] for earlier, later in pairwise(found)):
        raise ProtocolError("RELATION_SIZES are not in order")
    return request_id, found


def parse_size(payload: bytes) -> tuple[int, int]:
    """(request id, blocks or NO_SUCH_FORK). Raises ProtocolError."""
    try:
        request_id, blocks = _SIZE.unpack(payload)
    except struct.error:
        raise ProtocolError("malformed SIZE") from None
    return request_id, blocks


def parse_basebackup_end(payload: bytes) -> tuple[int, int]:
    """(request id, size of the archive in bytes). Raises ProtocolError."""
    try:
        request_id, size = _END.unpack(payload)
    except struct.error:
        raise ProtocolError("malformed BASEBACKUP_END") from None
    return request_id, size
