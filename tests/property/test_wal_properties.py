"""Decoders of WAL: chunking does not matter, nothing but documented errors comes out, parse and serialize agree."""

from __future__ import annotations

import contextlib
import struct
from itertools import pairwise

import google_crc32c
import lz4.block
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import CorruptedError
from shared.lsn import WAL_BLOCK_SIZE_BYTES, WAL_SEGMENT_SIZE_BYTES
from shared.wal import (
    record as record_module,
)
from shared.wal import (
    rmgr_clog,
    rmgr_commit_ts,
    rmgr_dbase,
    rmgr_heap,
    rmgr_logicalmsg,
    rmgr_multixact,
    rmgr_relmap,
    rmgr_replorigin,
    rmgr_smgr,
    rmgr_standby,
    rmgr_tblspc,
    rmgr_xact,
    rmgr_xlog,
)
from shared.wal.control import CHECKPOINT_SIZE_BYTES, CheckPoint, ControlFile
from shared.wal.image import pglz_decompress, restore_image
from shared.wal.page import is_record_boundary, record_start
from shared.wal.readable import is_readable, readable_for
from shared.wal.reader import EndOfWal, RawRecord, WalStreamDecoder, find_end_of_wal
from shared.wal.record import BlockImage, ImageFlag, parse_blocks, parse_record
from shared.wal.rmgr import RmgrId
from shared.wal.writer import build_record
from tests.fixtures.wal import SYSTEM_IDENTIFIER, WalBuilder

PAGE, SEGMENT = WAL_BLOCK_SIZE_BYTES, WAL_SEGMENT_SIZE_BYTES

start_lsns = st.one_of(
    st.sampled_from([SEGMENT, SEGMENT + PAGE, SEGMENT + 40, 2 * SEGMENT - 24, 2 * SEGMENT - PAGE, (1 << 40) + PAGE]),
    st.integers(SEGMENT // 8, SEGMENT // 2).map(lambda n: n * 8).filter(is_record_boundary),
)
record_sizes = st.one_of(st.integers(29, 300), st.integers(29, 300), st.integers(PAGE - 100, 3 * PAGE))


@st.composite
def logs(draw: st.DrawFn) -> WalBuilder:
    log = WalBuilder(draw(start_lsns))
    for size in draw(st.lists(record_sizes, max_size=25)):
        log.append_noop(size)
        if -log.end_lsn % SEGMENT < 5 * PAGE and draw(st.booleans()):
            log.switch()
    return log


def _edges(start: int, end: int, cuts: list[int]) -> list[int]:
    """Where the chunks of [start, end) begin and end; `cuts` may lie anywhere."""
    return sorted({start, end, *(start + cut % (end - start + 1) for cut in cuts)})


def _feed(log: WalBuilder, cuts: list[int], decoder: WalStreamDecoder | None = None) -> list[RawRecord]:
    decoder = decoder or WalStreamDecoder(log.start_lsn, system_identifier=SYSTEM_IDENTIFIER)
    data = bytes(log.data)
    skipped = decoder.next_lsn - log.start_lsn
    found: list[RawRecord] = []
    for start, end in pairwise(_edges(skipped, len(data), cuts)):
        found += decoder.feed(log.start_lsn + start, data[start:end])
    return found


@given(logs(), st.lists(st.integers(0, 200_000), max_size=40))
def test_chunking_does_not_matter(log: WalBuilder, cuts: list[int]) -> None:
    same = _feed(log, cuts) == log.records
    assert same


@settings(deadline=None)  # how long thousands of tiny chunks take is the machine's business
@given(logs(), st.integers(1, 30))
def test_tiny_chunks_do_not_matter(log: WalBuilder, size: int) -> None:
    same = _feed(log, list(range(0, len(log.data), size))) == log.records
    assert same


@given(logs(), st.data())
def test_decoding_may_start_behind_any_record(log: WalBuilder, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(log.records)))
    if index:
        last_start, end, _ = log.records[index - 1]
        decoder = WalStreamDecoder(end, last_record_start=last_start)
        same = _feed(log, data.draw(st.lists(st.integers(0, 200_000))), decoder) == log.records[index:]
        assert same


@given(logs(), st.integers(0, 200_000), st.lists(st.integers(0, 200_000)))
def test_synchronising_finds_the_records_behind_the_next_page_header(
    log: WalBuilder, offset: int, cuts: list[int]
) -> None:
    start = log.start_lsn + min(offset, len(log.data))
    next_page = -(-start // PAGE) * PAGE
    found = _feed(log, cuts, WalStreamDecoder(start, synchronise=True))
    same = found == [raw for raw in log.records if raw[0] > next_page]
    assert same


@given(logs())
def test_ends_and_starts_join(log: WalBuilder) -> None:
    assert all(start == record_start(end) for (_, end, _), (start, _, _) in pairwise(log.records))


@given(logs(), st.integers(0, 200_000), st.integers(1, 5000))
def test_the_end_of_a_cut_log_is_its_last_whole_record(log: WalBuilder, size: int, chunk: int) -> None:
    data = bytes(log.data[: size % (len(log.data) + 1)])
    end = log.start_lsn + len(data)

    def read(lsn: int, size_bytes: int) -> bytes:
        return data[lsn - log.start_lsn : lsn - log.start_lsn + size_bytes]

    whole = [raw for raw, last in zip(log.records, log.last_bytes, strict=True) if last <= end]
    expected = EndOfWal(whole[-1][0], whole[-1][1]) if whole else EndOfWal(None, log.start_lsn)
    assert find_end_of_wal(read, log.start_lsn, chunk_size_bytes=chunk) == expected
    # Zeros behind the cut are not written yet, unless the cut is inside a record: that is damage.
    if not whole or whole[-1][1] <= end:
        last_end = whole[-1][1] if whole else log.start_lsn
        data = bytes(log.data[: last_end - log.start_lsn]) + bytes(20_000)
        assert find_end_of_wal(read, log.start_lsn, chunk_size_bytes=max(chunk, 40)) == expected


@given(
    logs(),
    st.lists(st.tuples(st.integers(0, 200_000), st.integers(1, 255)), min_size=1),
    st.lists(st.integers(0, 200_000)),
)
def test_a_changed_log_yields_true_records_or_corrupted_error(
    log: WalBuilder, changes: list[tuple[int, int]], cuts: list[int]
) -> None:
    for position, difference in changes:
        if log.data:
            log.data[position % len(log.data)] ^= difference
    decoder = WalStreamDecoder(log.start_lsn, system_identifier=SYSTEM_IDENTIFIER)
    data = bytes(log.data)
    found: list[RawRecord] = []
    with contextlib.suppress(CorruptedError):
        for start, end in pairwise(_edges(0, len(data), cuts)):
            found += decoder.feed(log.start_lsn + start, data[start:end])
    # Every record that comes out is a true one, whatever stands around it; and none is left out in the middle.
    same = found == log.records[: len(found)]
    assert same
    assert decoder.end_lsn in {log.start_lsn, *(end for _, end, _ in log.records)}


@given(start_lsns, st.binary(max_size=20_000), st.booleans(), st.lists(st.integers(0, 20_000)))
def test_random_bytes_are_no_records(start: int, data: bytes, synchronise: bool, cuts: list[int]) -> None:
    decoder = WalStreamDecoder(start, synchronise=synchronise)
    with contextlib.suppress(CorruptedError):
        for first, last in pairwise(_edges(0, len(data), cuts)):
            assert decoder.feed(start + first, data[first:last]) == []


# ---- records --------------------------------------------------------------------------------------------------------

REL = st.tuples(*[st.integers(0, 2**32 - 1)] * 3)


@st.composite
def fragments(draw: st.DrawFn) -> bytes:
    """Mostly well-formed fragments of a record."""
    headers, payload, first = b"", b"", True
    for block_id in sorted(draw(st.sets(st.sampled_from([0, 0, 0, 1, 2, 32, 33]), max_size=3))):
        flags, data = draw(st.sampled_from([0, 0, 1, 2, 3, 4])), draw(st.binary(max_size=10))
        image_header = image = b""
        if draw(st.integers(0, 3)) == 3:
            flags |= 0x10
            info = draw(st.sampled_from([0, 1, 2, 3, 3, 3, 7, 6, 5, 0x0B, 0x13, 0x08]))
            image = draw(st.binary(max_size=200))
            hole_length = struct.pack("<H", draw(st.integers(0, 9000))) if info & 1 and info & 0x1C else b""
            image_header = struct.pack("<HHB", len(image), draw(st.integers(0, 200)), info) + hole_length
        if data:
            flags |= 0x20
        flags |= draw(st.sampled_from([0, 0x40]))
        if not first and draw(st.booleans()):
            flags |= 0x80
        headers += struct.pack("<BBH", block_id, flags, len(data)) + image_header
        headers += b"" if flags & 0x80 else struct.pack("<III", *draw(REL))
        headers += struct.pack("<I", draw(st.integers(0, 2**32 - 1)))
        payload += image + data
        first = False
    if draw(st.booleans()):
        headers += b"\xfd\x01\x00"
    main = draw(st.binary(max_size=300))
    if draw(st.booleans()):
        headers += bytes((255, len(main))) if len(main) < 256 else b"\xfe" + struct.pack("<I", len(main))
        payload += main
    return headers + payload


@given(
    st.one_of(fragments(), st.binary(max_size=200)),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=2),
)
def test_records_parse_inside_their_bounds_or_raise(body: bytes, changes: list[tuple[int, int]]) -> None:
    changed = bytearray(body)
    for position, value in changes:
        if position < len(changed):
            changed[position] = value
    record = build_record(rmgr_id=10, info=0, prev_lsn=1, fragments=bytes(changed))
    try:
        slow = parse_record(record)
    except CorruptedError:
        with pytest.raises(CorruptedError):
            parse_blocks(record)
        return
    blocks, main_start = parse_blocks(record)
    assert blocks == slow.blocks
    assert record[main_start:] == slow.main_data
    reached: int | None = None
    for block in blocks:
        start = block.image.start if block.image else block.data_start
        assert reached is None or start == reached
        assert start <= block.data_start <= block.data_end <= main_start <= len(record)
        reached = block.data_end
        if block.image:
            assert block.image.end == block.data_start
            with contextlib.suppress(CorruptedError):
                assert len(restore_image(record, block.image)) == 8192
        with contextlib.suppress(CorruptedError):
            made = parse_record(readable_for(record, block.block_id))
            assert is_readable(made.blocks)
            assert (made.main_data, made.origin_id) == (slow.main_data, slow.origin_id)
            assert [each[:4] for each in made.blocks] == [each[:4] for each in blocks]
    assert reached is None or reached == main_start


@given(st.binary(max_size=100))
def test_anything_parses_or_raises(data: bytes) -> None:
    for parse in (parse_record, parse_blocks, record_module.parse_header):
        with contextlib.suppress(CorruptedError):
            parse(data)


PARSERS = [
    *(module.parse for module in (rmgr_clog, rmgr_dbase, rmgr_multixact, rmgr_relmap)),
    *(module.parse for module in (rmgr_smgr, rmgr_standby, rmgr_tblspc, rmgr_xlog)),
    *(module.parse for module in (rmgr_commit_ts, rmgr_logicalmsg, rmgr_replorigin)),
    lambda info, data: rmgr_xact.parse(info, 1, data),
]


@given(st.binary(max_size=80))
def test_files_of_replication_origins_parse_or_raise(body: bytes) -> None:
    for content in (body, rmgr_replorigin.checkpoint_file({})[:4] + body):
        with contextlib.suppress(CorruptedError):
            rmgr_replorigin.parse_checkpoint_file(content)


@given(st.dictionaries(st.integers(0, 65535), st.integers(0, 2**64 - 1), max_size=9))
def test_files_of_replication_origins_round_trip(progress: dict[int, int]) -> None:
    assert rmgr_replorigin.parse_checkpoint_file(rmgr_replorigin.checkpoint_file(progress)) == progress


words = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1)), max_size=40)


@given(st.sampled_from(range(len(PARSERS))), st.integers(0, 255), words, st.binary(max_size=9))
def test_main_data_parses_or_raises(parser: int, info: int, numbers: list[int], tail: bytes) -> None:
    with contextlib.suppress(CorruptedError):
        PARSERS[parser](info, struct.pack(f"<{len(numbers)}I", *numbers) + tail)


@given(st.sampled_from([RmgrId.HEAP, RmgrId.HEAP2]), st.integers(0, 255), fragments())
def test_visibility_clears_name_blocks_of_the_record_or_raise(rmgr_id: int, info: int, body: bytes) -> None:
    record = build_record(rmgr_id=rmgr_id, info=info, prev_lsn=1, fragments=body)
    try:
        blocks, main_start = parse_blocks(record)
        clears = rmgr_heap.visibility_clears(rmgr_id, info, blocks, record, main_start)
    except CorruptedError:
        return
    assert {(clear.rel, clear.heap_block) for clear in clears} <= {(b.rel, b.block_number) for b in blocks}


# ---- pglz, pg_control -----------------------------------------------------------------------------------------------


def _pglz_compress(data: bytes) -> bytes:
    """Greedy, as simple as can be; what it writes is pglz."""
    out = bytearray()
    pos = 0
    while pos < len(data):
        control, items = 0, bytearray()
        for bit in range(8):
            if pos >= len(data):
                break
            length, offset = 0, 0
            for distance in range(1, min(pos, 300) + 1):
                run = 0
                while run < 273 and pos + run < len(data) and data[pos + run] == data[pos + run - distance]:
                    run += 1
                if run > length:
                    length, offset = run, distance
            if length >= 3:
                control |= 1 << bit
                items += bytes(((offset >> 4 & 0xF0) | min(length - 3, 15), offset & 0xFF))
                if length >= 18:
                    items.append(length - 18)
                pos += length
            else:
                items.append(data[pos])
                pos += 1
        out.append(control)
        out += items
    return bytes(out)


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=4), st.integers(1, 120)), max_size=8))
def test_pglz_round_trip(runs: list[tuple[bytes, int]]) -> None:
    data = b"".join(piece * count for piece, count in runs)
    assert pglz_decompress(_pglz_compress(data), len(data)) == data


@given(st.binary(max_size=100), st.integers(0, 8192))
def test_pglz_of_anything_has_the_size_asked_for_or_raises(data: bytes, size: int) -> None:
    with contextlib.suppress(CorruptedError):
        assert len(pglz_decompress(data, size)) == size


@given(st.binary(max_size=300), st.integers(0, 9000), st.integers(0, 9000), st.integers(0, 31))
def test_restored_images_are_pages_or_raise(data: bytes, offset: int, length: int, flags: int) -> None:
    with contextlib.suppress(CorruptedError):
        assert len(restore_image(data, BlockImage(0, len(data), offset, length, flags))) == 8192


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=300), st.integers(1, 60)), min_size=1, max_size=8),
    st.sampled_from([ImageFlag.LZ4, ImageFlag.ZSTD]),
    st.integers(-2, 2),
    st.lists(st.tuples(st.integers(0, 8191), st.integers(0, 255)), max_size=3),
)
def test_altered_images_of_other_compression_are_pages_or_raise(
    runs: list[tuple[bytes, int]], method: ImageFlag, longer: int, changes: list[tuple[int, int]]
) -> None:
    page = b"".join(piece * count for piece, count in runs)[:8192].ljust(8192, b"\0")
    content = page[:longer] if longer < 0 else page + bytes(longer)
    if method is ImageFlag.LZ4:
        stored = bytearray(lz4.block.compress(content, store_size=False))
    else:
        stored = bytearray(zstandard.ZstdCompressor().compress(content))
    for position, value in changes:
        stored[position % len(stored)] = value
    image = BlockImage(0, len(stored), 0, 0, method)
    try:
        restored = restore_image(bytes(stored), image)
    except CorruptedError:
        assert longer or changes
    else:
        assert len(restored) == 8192
        assert changes or (restored == page and not longer)


@given(st.binary(min_size=CHECKPOINT_SIZE_BYTES, max_size=CHECKPOINT_SIZE_BYTES))
def test_checkpoints_round_trip(data: bytes) -> None:
    point = CheckPoint.parse(data)
    assert CheckPoint.parse(point.serialize()) == point


@given(st.binary(min_size=288, max_size=288))
def test_control_files_parse_or_raise(data: bytes) -> None:
    for content in (data, data + struct.pack("<I", google_crc32c.value(data))):
        with contextlib.suppress(CorruptedError):
            ControlFile.parse(content)
