"""Block references and page images."""

from __future__ import annotations

import struct
import tracemalloc

import lz4.block
import pytest
import zstandard

from shared.errors import CorruptedError
from shared.keyspace import Fork
from shared.wal.image import page_lsn, pglz_decompress, restore_image, with_page_lsn
from shared.wal.readable import is_readable, readable_for
from shared.wal.record import BlockImage, ImageFlag, parse_blocks, parse_header, parse_record
from shared.wal.rmgr import RmgrId
from shared.wal.writer import build_record

REL = (1663, 5, 16384)
IMAGE = struct.Struct("<HHB")


def _record(fragments: bytes) -> bytes:
    return build_record(rmgr_id=RmgrId.BTREE, info=0x10, prev_lsn=4096, xid=3, fragments=fragments)


def _block(
    number: int, flags: int, length: int, rel: tuple[int, int, int] | None, block: int, image: bytes = b""
) -> bytes:
    where = struct.pack("<III", *rel) if rel else b""
    return struct.pack("<BBH", number, flags, length) + image + where + struct.pack("<I", block)


def test_one_block_with_data() -> None:
    record = _record(_block(0, 0x20, 5, REL, 42) + b"\xff\x03" + b"block" + b"abc")
    (block,), main_start = parse_blocks(record)
    assert (block.block_id, block.rel, block.fork, block.block_number) == (0, REL, Fork.MAIN, 42)
    assert record[block.data_start : block.data_end] == b"block"
    assert record[main_start:] == b"abc"
    assert not block.starts_over
    assert parse_record(record).blocks == (block,)
    assert (
        parse_header(record)
        == parse_record(record).header
        == (len(record), 3, 4096, 0x10, RmgrId.BTREE, parse_header(record).crc)
    )


def test_one_block_with_another_id_or_an_image_takes_no_short_cut() -> None:
    record = _record(_block(3, 0, 0, REL, 42) + b"\xff\x03abc")
    assert parse_blocks(record).blocks[0].block_id == 3
    image = IMAGE.pack(8192, 0, 2)
    record = _record(_block(0, 0x10, 0, (1, 2, 3), 42, image) + b"\xff\x03" + bytes(8192) + b"abc")
    assert parse_blocks(record).blocks[0].image == BlockImage(51, 51 + 8192, 0, 0, 2)
    # Its relation and block number look like the main data header that ends the short cut.
    header = _block(0, 0x10, 0, (1, 2, 0xFF000003), 108, IMAGE.pack(100, 50, 3))
    record = _record(header + b"\xff\x03" + bytes(100) + b"abc")
    assert len(record) == 46 + 108
    assert parse_blocks(record).blocks[0].rel == (1, 2, 0xFF000003)


def test_no_block_at_all() -> None:
    assert parse_blocks(_record(b"\xff\x01z")) == ((), 26)
    assert parse_blocks(_record(b"")) == ((), 24)
    assert parse_blocks(_record(b"\xfe" + struct.pack("<I", 300) + bytes(300))) == ((), 29)


def test_several_blocks_share_a_relation_and_carry_images() -> None:
    stored = bytes(range(1, 101)) + b"tail"
    image = struct.pack("<HHB", len(stored), 100, 0x01 | 0x02)
    record = _record(
        _block(0, 0x10 | 0x20, 2, REL, 7, image)
        + _block(1, 0x80 | 0x40 | Fork.VISIBILITY_MAP, 0, None, 0)
        + b"\xfd" + struct.pack("<H", 9) + b"\xfc" + struct.pack("<I", 77)
        + b"\xfe" + struct.pack("<I", 4)
        + stored + b"d0" + b"main"
    )  # fmt: skip
    parsed = parse_record(record)
    first, second = parsed.blocks
    assert (parsed.origin_id, parsed.toplevel_xid, parsed.main_data) == (9, 77, b"main")
    assert "b'main'" not in repr(parsed)
    assert first.image is not None
    assert first.image.is_applied
    assert first.starts_over
    assert record[first.data_start : first.data_end] == b"d0"
    page = restore_image(record, first.image)
    assert page == stored[:100] + bytes(8192 - len(stored)) + b"tail"
    assert (second.rel, second.fork, second.starts_over) == (REL, Fork.VISIBILITY_MAP, True)
    assert parse_blocks(record).blocks == parsed.blocks


def test_an_image_for_verification_only_does_not_start_the_page_over() -> None:
    stored = bytes(8192)
    record = _record(_block(0, 0x10, 0, REL, 7, struct.pack("<HHB", 8192, 0, 0)) + stored)
    (block,), _ = parse_blocks(record)
    assert not block.starts_over
    assert block.image is not None
    assert restore_image(record, block.image) == stored


@pytest.mark.parametrize(
    "fragments",
    [
        b"\xff",
        b"\xff\x05abcd",
        b"\xff\x03abcd",
        b"\xfb\x03abc",
        _block(0, 0, 0, REL, 1) + b"\xff\x03ab",
        _block(0, 0x04, 0, REL, 1) + b"\xff\x03abc",
        _block(0, 0x20, 0, REL, 1) + b"\xff\x03abc",
        _block(0, 0, 2, REL, 1) + b"\xff\x03deabc",
        _block(0, 0x80, 0, None, 1) + b"\xff\x00" + b"\xff\x0f".ljust(17, b"x"),
        _block(0, 0x10, 0, REL, 1, IMAGE.pack(8192, 0, 4)) + bytes(8192),  # compressed to a whole page
        b"\xfe\x01",
        b"\xfb\x00\x00\x00\x00",
        _block(33, 0, 0, REL, 1),
        _block(0, 0, 0, None, 1)[:7],
        _block(0, 0x80, 0, None, 1),
        _block(0, 0, 3, REL, 1) + b"abc",
        _block(0, 0x20, 0, REL, 1),
        _block(0, 0x04, 0, REL, 1),
        _block(0, 0x20, 3, REL, 1) + b"ab",
        _block(1, 0, 0, REL, 1) + _block(0, 0, 0, REL, 1),
        _block(0, 0, 0, REL, 1) + _block(0, 0, 0, REL, 1),
        _block(0, 0x10, 0, REL, 1, IMAGE.pack(4000, 0, 0)) + bytes(4000),  # neither hole nor whole
        _block(0, 0x10, 0, REL, 1, IMAGE.pack(8192, 8, 1)) + bytes(8192),  # a hole in a whole page
        _block(0, 0x10, 0, REL, 1, IMAGE.pack(9000, 0, 0)) + bytes(9000),  # longer than a page
        _block(0, 0x10, 0, REL, 1, IMAGE.pack(100, 101, 1)) + bytes(100),  # hole beyond the page
        _block(0, 0x10, 0, REL, 1, IMAGE.pack(100, 5, 4)) + bytes(100),  # hole offset without hole
        _block(0, 0x10, 0, REL, 1, IMAGE.pack(100, 8000, 5) + struct.pack("<H", 300)) + bytes(100),
    ],
)  # fmt: skip
def test_what_postgres_would_refuse_is_refused(fragments: bytes) -> None:
    with pytest.raises(CorruptedError):
        parse_blocks(_record(fragments))
    with pytest.raises(CorruptedError):
        parse_record(_record(fragments))


def test_a_record_of_another_length_than_it_says_is_refused() -> None:
    with pytest.raises(CorruptedError):
        parse_header(_record(b"\xff\x01a") + b"b")
    with pytest.raises(CorruptedError):
        parse_blocks(b"short")


def _compressed(method: ImageFlag, data: bytes) -> bytes:
    if method is ImageFlag.LZ4:
        packed: bytes = lz4.block.compress(data, store_size=False)
        return packed
    return zstandard.ZstdCompressor().compress(data)


METHODS = [ImageFlag.LZ4, ImageFlag.ZSTD]


@pytest.mark.parametrize("method", METHODS)
def test_images_of_a_postgres_with_other_compression_are_pages(method: ImageFlag) -> None:
    page = b"begin" * 20 + bytes(4000) + b"end!" * 1023
    stored = _compressed(method, page[:100] + page[4100:])
    assert restore_image(b"xx" + stored, BlockImage(2, 2 + len(stored), 100, 4000, method | 3)) == page
    stored = _compressed(method, page)
    assert restore_image(stored, BlockImage(0, len(stored), 0, 0, method | 2)) == page


@pytest.mark.parametrize("method", METHODS)
def test_compressed_images_that_are_no_page_are_refused_before_they_take_memory(method: ImageFlag) -> None:
    page, bomb = bytes(range(256)) * 32, bytes(64 << 20)
    whole = _compressed(method, page)
    lying = _compressed(method, bomb)
    wrong = [whole[:-1], whole + b"x", whole + whole, b"", b"x" * 40, whole[1:], lying]
    wrong += [_compressed(method, content) for content in (page[:-1], page + b"x", b"x", b"")]
    if method is ImageFlag.ZSTD:
        # One that says a page and holds more, and one that does not say.
        assert struct.pack("<I", len(bomb)) in lying[4:10]
        wrong.append(lying.replace(struct.pack("<I", len(bomb)), struct.pack("<I", len(page)), 1))
        wrong.append(zstandard.ZstdCompressor(write_content_size=False).compress(page))
    tracemalloc.start()
    for stored in wrong:
        with pytest.raises(CorruptedError):
            restore_image(stored, BlockImage(0, len(stored), 0, 0, method | 2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("method", METHODS)
def test_a_record_is_made_readable_for_one_block(method: ImageFlag) -> None:
    """Whose image is plain; foreign ones of others go, and everything else stays."""
    pages = [bytes([fill]) * 8192 for fill in (1, 2)]
    stored = [_compressed(method, pages[0]), _compressed(method, pages[1][:8000])]
    headers = (
        _block(0, 0x30, 4, REL, 42, IMAGE.pack(len(stored[0]), 0, method | ImageFlag.APPLY))
        + _block(1, 0xB0, 4, None, 43, IMAGE.pack(len(stored[1]), 100, method | 3) + struct.pack("<H", 192))
        + _block(2, 0x10, 0, (1, 2, 3), 44, IMAGE.pack(50, 100, ImageFlag.PGLZ | 3) + struct.pack("<H", 192))
        + _block(3, 0x90, 0, None, 45, IMAGE.pack(50, 20, 3))
        + _block(4, 0x90, 0, None, 46, IMAGE.pack(len(stored[0]), 0, method))  # for a check of consistency only
        + b"\xfd\x07\x00" + b"\xfc\x08\x00\x00\x00" + b"\xfe" + struct.pack("<I", 300)
    )  # fmt: skip
    payload = stored[0] + b"zero" + stored[1] + b"one!" + bytes(100) + stored[0]
    record = _record(headers + payload + b"m" * 300)
    before = parse_record(record)
    assert not is_readable(before.blocks)
    for target, page in ((0, pages[0]), (1, pages[1][:100] + bytes(192) + pages[1][:7900]), (2, b""), (4, b"")):
        made = readable_for(record, target)
        after = parse_record(made)
        assert is_readable(after.blocks)
        assert (after.main_data, after.origin_id, after.toplevel_xid) == (b"m" * 300, 7, 8)
        assert after.header[1:5] == before.header[1:5]
        for was, now in zip(before.blocks, after.blocks, strict=True):
            assert (was.block_id, was.rel, was.fork, was.block_number) == (
                now.block_id, now.rel, now.fork, now.block_number
            )  # fmt: skip
            assert made[now.data_start : now.data_end] == record[was.data_start : was.data_end]
        kept = {block.block_id for block in after.blocks if block.image is not None}
        assert kept == {2, 3} | ({target} if page else set())
        if page:
            image = after.blocks[target].image
            assert image is not None
            assert restore_image(made, image) == page


def test_an_image_of_a_wrong_size_is_refused() -> None:
    with pytest.raises(CorruptedError):
        restore_image(bytes(100), BlockImage(0, 100, 0, 0, 2))


def test_page_lsn_is_set_except_on_new_pages() -> None:
    new = bytes(8192)
    assert with_page_lsn(new, 0x1_0000_0002) == new
    used = bytes(14) + struct.pack("<H", 8000) + bytes(8176)
    stamped = with_page_lsn(used, 0x1_0000_0002)
    assert stamped[:8] == struct.pack("<II", 1, 2)
    assert stamped[8:] == used[8:]
    assert page_lsn(stamped) == 0x1_0000_0002
    for wrong in (b"", bytes(8191)):
        with pytest.raises(CorruptedError):
            with_page_lsn(wrong, 1)
        with pytest.raises(CorruptedError):
            page_lsn(wrong)


def test_pglz_literals_matches_overlaps_and_long_lengths() -> None:
    # "abc", then 6 bytes from 3 back (overlapping), then 18 + 10 bytes from 1 back.
    packed = bytes([0b0001_1000]) + b"abc" + bytes([0x03, 3]) + bytes([0x0F, 1, 10])
    assert pglz_decompress(packed, 37) == b"abcabcabc" + b"c" * 28
    # A last match may promise more than there is room for.
    assert pglz_decompress(b"\x02a\x00\x01", 3) == b"aaa"


@pytest.mark.parametrize(
    ("packed", "size"),
    [
        (b"\x01\x00", 3),  # cut tag
        (b"\x01\x0f\x01", 30),  # cut length
        (b"\x02a\x00\x02", 4),  # before the start
        (b"\x02a\x00\x02", 3),
        (b"\x02a\x00\x00", 4),  # no distance
        (b"\x00abc", 2),  # too much
        (b"\x00abc", 4),  # too little
        (b"", 1),
    ],
)
def test_pglz_refuses_what_is_not_pglz(packed: bytes, size: int) -> None:
    with pytest.raises(CorruptedError):
        pglz_decompress(packed, size)
