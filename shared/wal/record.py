"""A raw record → what it says about blocks (Postgres `access/xlogrecord.h`, checks of DecodeXLogRecord).

    XLogRecord (24 bytes)
    for each block:  id u8 · fork_flags u8 · data_length u16
                     [image: length u16 · hole_offset u16 · bimg_info u8 [· hole_length u16 if compressed with a hole]]
                     [rel: tablespace u32 · database u32 · relfilenumber u32, unless SAME_REL] · block number u32
    255 · length u8, or 254 · length u32      main data, if any;  253 · u16 origin;  252 · u32 top-level xid
    for each block: image bytes, then data bytes;  then main data, to the end

`parse_blocks` is the hot path of ingest and answers tuples with names; `parse_record` is the whole record as one value,
for whoever is not in a hurry.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NamedTuple, TypeAlias

from shared.errors import CorruptedError
from shared.keyspace import Fork
from shared.wal.reader import RECORD_HEADER, RECORD_HEADER_SIZE_BYTES

PAGE_SIZE_BYTES: Final = 8192
"""BLCKSZ, the size of a block of a relation."""

MAX_BLOCK_ID: Final = 32
INFO_RMGR_MASK: Final = 0xF0
"""The part of xl_info that belongs to the resource manager."""

Rel: TypeAlias = tuple[int, int, int]
"""RelFileLocator: (tablespace OID, database OID, relfilenumber). Database 0 for relations shared by all databases."""


class BlockFlag(IntEnum):
    """Bits of fork_flags above the fork."""

    HAS_IMAGE = 0x10
    HAS_DATA = 0x20
    WILL_INIT = 0x40
    SAME_REL = 0x80


class ImageFlag(IntEnum):
    """Bits of bimg_info."""

    HAS_HOLE = 0x01
    APPLY = 0x02
    PGLZ = 0x04
    LZ4 = 0x08
    ZSTD = 0x10


COMPRESSED: Final = int(ImageFlag.PGLZ | ImageFlag.LZ4 | ImageFlag.ZSTD)
_HAS_IMAGE, _HAS_DATA, _WILL_INIT, _SAME_REL = (int(flag) for flag in BlockFlag)
_HAS_HOLE, _APPLY = int(ImageFlag.HAS_HOLE), int(ImageFlag.APPLY)
DATA_SHORT, DATA_LONG, ORIGIN, TOPLEVEL_XID = 255, 254, 253, 252
"""Ids of fragments that are no blocks: XLR_BLOCK_ID_DATA_SHORT, …"""


class BlockImage(NamedTuple):
    """A full-page image: record[start:end], without its hole, maybe compressed. See `shared.wal.image`."""

    start: int
    end: int
    hole_offset: int
    hole_length: int
    flags: int

    @property
    def is_applied(self) -> bool:
        """False for images that only check consistency (wal_consistency_checking): redo does not restore them."""
        return self.flags & _APPLY != 0


class Block(NamedTuple):
    """One block reference. `flags` are the BlockFlag bits; its data is record[data_start:data_end]."""

    block_id: int
    rel: Rel
    fork: int
    block_number: int
    flags: int
    image: BlockImage | None
    data_start: int
    data_end: int

    @property
    def starts_over(self) -> bool:
        """Is the page after this record independent of the page before it?"""
        return self.flags & _WILL_INIT != 0 or (self.image is not None and self.image.is_applied)


class Blocks(NamedTuple):
    """All block references of a record, by ascending id; main data is record[main_start:]."""

    blocks: tuple[Block, ...]
    main_start: int


class RecordHeader(NamedTuple):
    """XLogRecord."""

    total_length_bytes: int
    xid: int
    prev_lsn: int
    info: int
    rmgr_id: int
    crc: int


@dataclass(frozen=True, slots=True)
class Record:
    """A record, taken apart."""

    header: RecordHeader
    blocks: tuple[Block, ...]
    main_data: bytes = field(repr=False)
    origin_id: int | None
    toplevel_xid: int | None


_new = tuple.__new__  # a NamedTuple's own constructor takes twice as long
BLOCK_HEADER = struct.Struct("<BBH")
IMAGE_HEADER = struct.Struct("<HHB")
HOLE_LENGTH = struct.Struct("<H")
REL = struct.Struct("<III")
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
# One block without image and the short main data header: nine records of ten. At 24: block id, fork and flags, data
# length, tablespace, database, relfilenumber, block number, id of the main data's header, its length.
_SINGLE = struct.Struct("<BBHIIIIBB")
_unpack_single = _SINGLE.unpack_from
SINGLE_END: Final = RECORD_HEADER_SIZE_BYTES + _SINGLE.size
"""Where the data of such a block begins. Ingest does for these records what `parse_blocks` does."""
# No block at all: commits.
_NO_BLOCKS_MAIN = RECORD_HEADER_SIZE_BYTES + 2


def parse_header(record: bytes) -> RecordHeader:
    """Raises CorruptedError when there is no whole header or its length is not that of `record`."""
    if len(record) < RECORD_HEADER_SIZE_BYTES:
        raise CorruptedError(f"WAL record of {len(record)} bytes has no whole header")
    header = RecordHeader._make(RECORD_HEADER.unpack_from(record))
    if header.total_length_bytes != len(record):
        raise CorruptedError(f"WAL record of {header.total_length_bytes} bytes is {len(record)} bytes long")
    return header


def parse_blocks(record: bytes) -> Blocks:
    """Block references of one whole raw record.

    Raises CorruptedError wherever DecodeXLogRecord would refuse the record, and for a fork that does not exist.
    """
    size = len(record)
    if size >= SINGLE_END:
        block_id, fork_flags, data_length, spc, db, rel, block_number, main_id, main_length = _unpack_single(record, 24)
        fork = fork_flags & 0x0F
        if (
            main_id == 255
            and block_id == 0
            and fork_flags & 0x90 == 0  # no image, own rel
            and fork <= 3
            and (data_length > 0) is (fork_flags & 0x20 != 0)
            and SINGLE_END + data_length + main_length == size
        ):
            end = SINGLE_END + data_length
            block = _new(Block, (0, (spc, db, rel), fork, block_number, fork_flags & 0xF0, None, SINGLE_END, end))
            return _new(Blocks, ((block,), end))
    if size > _NO_BLOCKS_MAIN and record[24] == 255 and _NO_BLOCKS_MAIN + record[25] == size:
        return _new(Blocks, ((), _NO_BLOCKS_MAIN))
    blocks, main_start, _origin, _xid = _parse_fragments(record)
    return Blocks(blocks, main_start)


def parse_record(record: bytes) -> Record:
    """Raises CorruptedError."""
    header = parse_header(record)
    blocks, main_start, origin_id, toplevel_xid = _parse_fragments(record)
    return Record(header, blocks, record[main_start:], origin_id, toplevel_xid)


def _parse_fragments(record: bytes) -> tuple[tuple[Block, ...], int, int | None, int | None]:
    try:
        return _parse_fragment_headers(record)
    except struct.error:
        raise CorruptedError("WAL record ends inside its fragment headers") from None


def _parse_fragment_headers(record: bytes) -> tuple[tuple[Block, ...], int, int | None, int | None]:
    size = len(record)
    if size < RECORD_HEADER_SIZE_BYTES:
        raise CorruptedError(f"WAL record of {size} bytes has no whole header")
    pos = RECORD_HEADER_SIZE_BYTES
    payload = 0  # bytes that the headers so far promise behind the headers
    main_length = 0
    origin_id: int | None = None
    toplevel_xid: int | None = None
    rel: Rel | None = None
    # (id, rel, fork, block number, flags, data length, image without its place)
    found: list[tuple[int, Rel, int, int, int, int, BlockImage | None]] = []

    while size - pos > payload:
        fragment_id = record[pos]
        if fragment_id in (DATA_SHORT, DATA_LONG):
            if fragment_id == DATA_SHORT:
                main_length = record[pos + 1] if pos + 1 < size else 0
                pos += 2
            else:
                (main_length,) = _U32.unpack_from(record, pos + 1)
                pos += 5
            payload += main_length
            break  # by convention the main data fragment is the last
        if fragment_id == ORIGIN:
            (origin_id,) = _U16.unpack_from(record, pos + 1)
            pos += 3
        elif fragment_id == TOPLEVEL_XID:
            (toplevel_xid,) = _U32.unpack_from(record, pos + 1)
            pos += 5
        elif fragment_id <= MAX_BLOCK_ID:
            _, fork_flags, data_length = BLOCK_HEADER.unpack_from(record, pos)
            pos += BLOCK_HEADER.size
            if found and fragment_id <= found[-1][0]:
                raise CorruptedError(f"WAL record has block {fragment_id} out of order")
            if fork_flags & 0x0F > Fork.INIT:
                raise CorruptedError(f"WAL record has block {fragment_id} in fork {fork_flags & 0x0F}")
            if (data_length > 0) is not (fork_flags & _HAS_DATA != 0):
                raise CorruptedError(
                    f"WAL record has block {fragment_id} with {data_length} bytes of data and flags {fork_flags:#04x}"
                )
            payload += data_length
            image: BlockImage | None = None
            if fork_flags & _HAS_IMAGE:
                image, pos = _parse_image_header(record, pos, fragment_id)
                payload += image.end
            if not fork_flags & _SAME_REL:
                rel = REL.unpack_from(record, pos)
                pos += REL.size
            elif rel is None:
                raise CorruptedError("WAL record has no block before the first that says 'same relation'")
            (block_number,) = _U32.unpack_from(record, pos)
            pos += 4
            found.append((fragment_id, rel, fork_flags & 0x0F, block_number, fork_flags & 0xF0, data_length, image))
        else:
            raise CorruptedError(f"WAL record has a fragment of unknown id {fragment_id}")

    if size - pos != payload:
        raise CorruptedError(f"WAL record promises {payload} bytes of data and has {size - pos}")
    blocks: list[Block] = []
    for block_id, block_rel, fork, block_number, flags, data_length, image in found:
        if image is not None:
            image = image._replace(start=pos, end=pos + image.end)
            pos = image.end
        blocks.append(Block(block_id, block_rel, fork, block_number, flags, image, pos, pos + data_length))
        pos += data_length
    return tuple(blocks), pos, origin_id, toplevel_xid


def _parse_image_header(record: bytes, pos: int, block_id: int) -> tuple[BlockImage, int]:
    """The image as if it started at 0, and the position behind its header."""
    length, hole_offset, flags = IMAGE_HEADER.unpack_from(record, pos)
    pos += IMAGE_HEADER.size
    compressed = flags & COMPRESSED != 0
    if not compressed:
        hole_length = PAGE_SIZE_BYTES - length
    elif flags & _HAS_HOLE:
        (hole_length,) = HOLE_LENGTH.unpack_from(record, pos)
        pos += HOLE_LENGTH.size
    else:
        hole_length = 0
    if flags & _HAS_HOLE:
        sane = hole_offset > 0 and hole_length > 0 and length != PAGE_SIZE_BYTES
    else:
        sane = hole_offset == 0 and hole_length == 0
    if compressed and length == PAGE_SIZE_BYTES:
        sane = False
    if not sane or hole_offset + hole_length > PAGE_SIZE_BYTES:
        raise CorruptedError(
            f"WAL record has block {block_id} with an impossible image: {length} bytes, hole of {hole_length} at"
            f" {hole_offset}, flags {flags:#04x}"
        )
    return BlockImage(0, length, hole_offset, hole_length, flags), pos
