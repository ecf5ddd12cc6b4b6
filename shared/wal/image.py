"""Full-page image of a record → page (Postgres RestoreBlockImage, pg_lzcompress.c; `storage/bufpage.h`)."""

from __future__ import annotations

import struct
from typing import Final

import lz4.block
import zstandard

from shared.errors import CorruptedError
from shared.wal.record import PAGE_SIZE_BYTES, BlockImage, ImageFlag

_PAGE_LSN: Final = struct.Struct("<II")
_PD_UPPER: Final = struct.Struct("<H")
_PD_UPPER_OFFSET: Final = 14


def restore_image(record: bytes, image: BlockImage) -> bytes:
    """The page of `image` in `record`, its hole filled with zeros. The page LSN is not yet that of the record.

    Raises CorruptedError.
    """
    stored = uncompressed(record, image)
    if not image.hole_length:
        return stored
    return stored[: image.hole_offset] + bytes(image.hole_length) + stored[image.hole_offset :]


def uncompressed(record: bytes, image: BlockImage) -> bytes:
    """The bytes of `image` as they would stand in `record` without compression: the page without its hole.

    Raises CorruptedError, before it has more than a page in memory: whoever has the compute may write any image.
    """
    stored = record[image.start : image.end]
    length = PAGE_SIZE_BYTES - image.hole_length
    if image.flags & ImageFlag.PGLZ:
        stored = pglz_decompress(stored, length)
    elif image.flags & ImageFlag.LZ4:
        stored = _lz4_decompress(stored, length)
    elif image.flags & ImageFlag.ZSTD:
        stored = _zstd_decompress(stored, length)
    if len(stored) != length or not 0 <= image.hole_offset <= length:
        raise CorruptedError(f"page image of {len(stored)} bytes where {length} are expected")
    return stored


def _lz4_decompress(source: bytes, raw_size_bytes: int) -> bytes:
    """One block without a header, as LZ4_compress_default makes it."""
    try:
        content: bytes = lz4.block.decompress(source, uncompressed_size=raw_size_bytes)
    except (lz4.block.LZ4BlockError, ValueError):  # ValueError: there is nothing to decompress
        raise CorruptedError("lz4 data does not decompress to the size of its page") from None
    return content


def _zstd_decompress(source: bytes, raw_size_bytes: int) -> bytes:
    """One frame, as ZSTD_compress makes it: with its content's size, which is what the library allocates."""
    try:
        if zstandard.frame_content_size(source) != raw_size_bytes:
            raise CorruptedError("zstd data is not of the size of its page")
        return zstandard.ZstdDecompressor().decompress(source, allow_extra_data=False)
    except zstandard.ZstdError:
        raise CorruptedError("zstd data does not decompress to the size of its page") from None


def with_page_lsn(page: bytes, lsn: int) -> bytes:
    """`page` with pd_lsn = `lsn` (the *end* of the record, as redo sets it), unless the page is new (PageIsNew).

    pd_lsn is two 32-bit halves, the higher one first.
    """
    if len(page) != PAGE_SIZE_BYTES:
        raise CorruptedError(f"page of {len(page)} bytes")
    if _PD_UPPER.unpack_from(page, _PD_UPPER_OFFSET)[0] == 0:
        return page
    return _PAGE_LSN.pack(lsn >> 32, lsn & 0xFFFFFFFF) + page[_PAGE_LSN.size :]


def page_lsn(page: bytes) -> int:
    """pd_lsn. Raises CorruptedError when `page` has another size than a page."""
    if len(page) != PAGE_SIZE_BYTES:
        raise CorruptedError(f"page of {len(page)} bytes")
    high, low = _PAGE_LSN.unpack_from(page)
    return int(high) << 32 | int(low)


def pglz_decompress(source: bytes, raw_size_bytes: int) -> bytes:
    """Undo pglz_compress, which must yield exactly `raw_size_bytes` and use all of `source` (check_complete).

    A control byte announces eight items, lowest bit first: 0 a literal byte; 1 a tag of two bytes,
    `oooo llll  oooo oooo`, copying l + 3 bytes from o bytes back, l = 15 adding a third byte to the length.
    Raises CorruptedError.
    """
    size = len(source)
    out = bytearray()
    pos = 0
    while pos < size and len(out) < raw_size_bytes:
        control = source[pos]
        pos += 1
        for _ in range(8):
            if pos >= size or len(out) >= raw_size_bytes:
                break
            if control & 1:
                if pos + 2 > size:
                    raise CorruptedError("pglz data ends inside a tag")
                length = (source[pos] & 0x0F) + 3
                offset = (source[pos] & 0xF0) << 4 | source[pos + 1]
                pos += 2
                if length == 18:
                    if pos >= size:
                        raise CorruptedError("pglz data ends inside a tag")
                    length += source[pos]
                    pos += 1
                if offset == 0 or offset > len(out):
                    raise CorruptedError("pglz tag points before the start of its data")
                length = min(length, raw_size_bytes - len(out))
                # The copy may overlap what it writes: then the last `offset` bytes repeat.
                match = out[-offset:]
                out += (match * (length // offset + 1))[:length]
            else:
                out.append(source[pos])
                pos += 1
            control >>= 1
    if pos != size or len(out) != raw_size_bytes:
        raise CorruptedError(f"pglz data of {size} bytes does not decompress to {raw_size_bytes} bytes")
    return bytes(out)
