"""A record with page images compressed by lz4 or zstd → what a Postgres that is built without these can replay.

The compute's Postgres may be built with them, and the redo worker's without (`access/xlogrecord.h`,
BKPIMAGE_COMPRESS_*). And records are kept as long as the history of their pages is: they should ask for nothing that
not every build has.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from shared.wal.image import uncompressed
from shared.wal.record import (
    BLOCK_HEADER,
    COMPRESSED,
    DATA_LONG,
    DATA_SHORT,
    HOLE_LENGTH,
    IMAGE_HEADER,
    ORIGIN,
    REL,
    TOPLEVEL_XID,
    Block,
    BlockFlag,
    BlockImage,
    ImageFlag,
    parse_record,
)
from shared.wal.writer import build_record

_FOREIGN: Final = int(ImageFlag.LZ4 | ImageFlag.ZSTD)
_NUMBER: Final = struct.Struct("<I")


def is_readable(blocks: Iterable[Block]) -> bool:
    """By every Postgres, whatever it is built with."""
    for block in blocks:  # noqa: SIM110 - ingest asks this often, and a generator takes twice as long
        if block.image is not None and block.image.flags & _FOREIGN:
            return False
    return True


def readable_for(record: bytes, block_id: int) -> bytes:
    """`record`, to be replayed for its block `block_id` alone. That block's image is no longer compressed; other blocks
    have none, if theirs is by lz4 or zstd: redo then takes these pages for newer, as it takes all but its target. So it
    grows by a page, however many images there are.

    Raises CorruptedError.
    """
    parsed = parse_record(record)
    headers, contents = bytearray(), bytearray()
    for block in parsed.blocks:
        flags, image, content = block.flags, block.image, b""
        if image is not None:
            if not image.flags & _FOREIGN:
                content = record[image.start : image.end]
            elif block.block_id == block_id and image.is_applied:
                content = uncompressed(record, image)
                image = image._replace(flags=image.flags & ~COMPRESSED)
            else:
                flags, image = flags & ~BlockFlag.HAS_IMAGE, None
        data = record[block.data_start : block.data_end]
        headers += BLOCK_HEADER.pack(block.block_id, block.fork | flags, len(data))
        if image is not None:
            headers += _image_header(image, len(content))
        if not flags & BlockFlag.SAME_REL:
            headers += REL.pack(*block.rel)
        headers += _NUMBER.pack(block.block_number)
        contents += content + data
    if parsed.origin_id is not None:
        headers += struct.pack("<BH", ORIGIN, parsed.origin_id)
    if parsed.toplevel_xid is not None:
        headers += struct.pack("<BI", TOPLEVEL_XID, parsed.toplevel_xid)
    if size := len(parsed.main_data):
        headers += bytes((DATA_SHORT, size)) if size < 256 else struct.pack("<BI", DATA_LONG, size)
    header = parsed.header
    return build_record(
        rmgr_id=header.rmgr_id,
        info=header.info,
        prev_lsn=header.prev_lsn,
        xid=header.xid,
        fragments=bytes(headers + contents) + parsed.main_data,
    )


def _image_header(image: BlockImage, size_bytes: int) -> bytes:
    header = IMAGE_HEADER.pack(size_bytes, image.hole_offset, image.flags)
    has_length = image.flags & COMPRESSED and image.flags & ImageFlag.HAS_HOLE
    return header + HOLE_LENGTH.pack(image.hole_length) if has_length else header
