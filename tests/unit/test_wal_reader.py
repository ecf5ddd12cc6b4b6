"""WalStreamDecoder and find_end_of_wal at the places where WAL is awkward."""

from __future__ import annotations

import struct

import pytest

from shared.errors import CorruptedError, InvalidInputError
from shared.lsn import WAL_BLOCK_SIZE_BYTES, WAL_SEGMENT_SIZE_BYTES
from shared.wal.page import (
    BACKUP_REMOVABLE,
    FIRST_IS_OVERWRITE_CONTRECORD,
    build_page_header,
    is_record_boundary,
    parse_page_header,
    record_start,
    segment_file_name,
)
from shared.wal.reader import EndOfWal, WalStreamDecoder, find_end_of_wal
from tests.fixtures.wal import SYSTEM_IDENTIFIER, WalBuilder

SEGMENT = WAL_SEGMENT_SIZE_BYTES
PAGE = WAL_BLOCK_SIZE_BYTES


def _decoder(log: WalBuilder) -> WalStreamDecoder:
    return WalStreamDecoder(log.start_lsn, system_identifier=SYSTEM_IDENTIFIER)


# ---- pages ----------------------------------------------------------------------------------------------------------


def test_page_headers_have_the_layout_of_xlog_internal_h() -> None:
    short = build_page_header(SEGMENT + PAGE, 99, remaining_bytes=5)
    assert short == struct.pack("<HHIQII", 0xD113, 0x0001, 1, SEGMENT + PAGE, 5, 0)
    long = build_page_header(SEGMENT, 99, flags=BACKUP_REMOVABLE)
    assert long == struct.pack("<HHIQIIQII", 0xD113, 0x0006, 1, SEGMENT, 0, 0, 99, SEGMENT, PAGE)
    assert parse_page_header(b"xx" + long, 2, SEGMENT, 99) == (0x0006, 0)
    assert parse_page_header(short, 0, SEGMENT + PAGE) == (0x0001, 5)


@pytest.mark.parametrize(
    ("offset", "value"), [(0, 0x12), (2, 0x12), (2, 0x00), (4, 2), (8, 1), (24, 1), (32, 1), (36, 1)]
)
def test_a_page_header_with_any_wrong_field_is_refused(offset: int, value: int) -> None:
    header = bytearray(build_page_header(SEGMENT, 99))
    header[offset] = value
    with pytest.raises(CorruptedError):
        parse_page_header(bytes(header), 0, SEGMENT, 99)
    with pytest.raises(CorruptedError, match="cut off"):
        parse_page_header(build_page_header(SEGMENT, 99)[:-1], 0, SEGMENT, 99)


def test_segment_names() -> None:
    assert segment_file_name(0x16B3748) == "000000010000000000000001"
    assert segment_file_name(0x1_FF00_0000) == "0000000100000001000000FF"
    assert segment_file_name(0x2_0000_0000 - 1) == "0000000100000001000000FF"
    assert segment_file_name(0x2_0000_0000) == "000000010000000200000000"


def test_record_boundaries() -> None:
    assert record_start(SEGMENT) == SEGMENT + 40
    assert record_start(SEGMENT + PAGE) == SEGMENT + PAGE + 24
    assert record_start(SEGMENT + 48) == SEGMENT + 48
    assert is_record_boundary(SEGMENT)
    assert is_record_boundary(SEGMENT + 40)
    assert not is_record_boundary(SEGMENT + 24)
    assert is_record_boundary(SEGMENT + PAGE + 24)
    assert not is_record_boundary(SEGMENT + PAGE + 28)


# ---- positions ------------------------------------------------------------------------------------------------------


def test_a_record_that_fills_its_page_ends_at_the_page_boundary() -> None:
    log = WalBuilder(SEGMENT + PAGE - 64)
    log.append_noop(60)
    log.append_noop(40)
    found = _decoder(log).feed(log.start_lsn, bytes(log.data))
    assert [raw[:2] for raw in found] == [
        (SEGMENT + PAGE - 64, SEGMENT + PAGE),
        (SEGMENT + PAGE + 24, SEGMENT + PAGE + 64),
    ]


def test_a_record_across_a_page_ends_behind_its_rest() -> None:
    log = WalBuilder(SEGMENT + PAGE - 8)
    log.append_noop(61)
    (found,) = _decoder(log).feed(log.start_lsn, bytes(log.data))
    assert found[:2] == (SEGMENT + PAGE - 8, SEGMENT + PAGE + 24 + 56)
    assert found == log.records[0]


def test_a_record_longer_than_a_segment() -> None:
    log = WalBuilder(SEGMENT - 16)
    log.append_noop(SEGMENT + 3 * PAGE)
    log.append_noop(40)
    decoder = _decoder(log)
    found = []
    for offset in range(0, len(log.data), 131072):
        found += decoder.feed(log.start_lsn + offset, bytes(log.data[offset : offset + 131072]))
    same = found == log.records
    assert same
    assert found[0][1] > 2 * SEGMENT


def test_a_switch_ends_at_the_end_of_its_segment() -> None:
    log = WalBuilder(SEGMENT + 5 * PAGE)
    log.append_noop(100)
    start, end, _ = log.switch()
    log.append_noop(100)
    decoder = _decoder(log)
    found = decoder.feed(log.start_lsn, bytes(log.data))
    assert found == log.records
    assert end == 2 * SEGMENT
    assert found[1][:2] == (start, 2 * SEGMENT)
    assert found[2][0] == 2 * SEGMENT + 40


def test_a_switch_that_ends_its_segment_by_itself_skips_nothing() -> None:
    log = WalBuilder(2 * SEGMENT - 24)
    log.switch()
    log.append_noop(100)
    assert [raw[:2] for raw in _decoder(log).feed(log.start_lsn, bytes(log.data))] == [
        (2 * SEGMENT - 24, 2 * SEGMENT),
        (2 * SEGMENT + 40, 2 * SEGMENT + 144),
    ]


def test_a_record_is_handed_out_before_its_padding_arrives() -> None:
    log = WalBuilder(SEGMENT)
    log.append_noop(33)
    log.append_noop(40)
    decoder = _decoder(log)
    (first,) = decoder.feed(SEGMENT, bytes(log.data[: 40 + 33]))
    assert first == log.records[0]
    assert decoder.next_lsn == SEGMENT + 40 + 33
    assert decoder.end_lsn == SEGMENT + 40 + 40
    assert decoder.feed(decoder.next_lsn, bytes(log.data[40 + 33 :])) == log.records[1:]


def test_synchronising_skips_the_rest_of_a_record_that_fills_pages() -> None:
    log = WalBuilder(SEGMENT)
    log.append_noop(3 * PAGE)
    log.append_noop(50)
    for start in (SEGMENT + 1, SEGMENT + PAGE - 1, SEGMENT + PAGE, SEGMENT + 3 * PAGE):
        decoder = WalStreamDecoder(start, synchronise=True)
        assert decoder.feed(start, bytes(log.data[start - SEGMENT :])) == log.records[1:]
    decoder = WalStreamDecoder(SEGMENT, synchronise=True)
    assert decoder.feed(SEGMENT, bytes(log.data)) == log.records
    # Before the first record, `end_lsn` is where it will start.
    decoder = WalStreamDecoder(SEGMENT + 1, synchronise=True)
    size = log.records[0][1] - SEGMENT
    assert decoder.feed(SEGMENT + 1, bytes(log.data[1:size])) == []
    assert (decoder.last_record_start, decoder.end_lsn) == (None, log.records[0][1])


def test_a_record_given_up_after_a_crash_is_dropped() -> None:
    log = WalBuilder(SEGMENT)
    log.append_noop(100)
    kept = bytes(log.data)
    lost = WalBuilder(log.end_lsn, prev_lsn=log.prev_lsn)
    lost.append_noop(2 * PAGE)
    kept += bytes(lost.data[: PAGE - log.end_lsn % PAGE])
    overwrite = WalBuilder(SEGMENT + PAGE, prev_lsn=log.prev_lsn)
    overwrite.append_noop(80)
    overwrite.append_noop(50)
    overwrite.data[:24] = build_page_header(SEGMENT + PAGE, 0, flags=FIRST_IS_OVERWRITE_CONTRECORD)
    found = _decoder(log).feed(SEGMENT, kept + bytes(overwrite.data))
    assert found == log.records + overwrite.records


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def log() -> WalBuilder:
    log = WalBuilder(SEGMENT)
    for size in (100, 8000, 70, 20000, 64):
        log.append_noop(size)
    return log


@pytest.mark.parametrize("lsn", [SEGMENT + 1000 - 8, SEGMENT + 1001, SEGMENT + PAGE, 0])
def test_gaps_and_overlaps_are_refused_and_change_nothing(log: WalBuilder, lsn: int) -> None:
    decoder = _decoder(log)
    first = decoder.feed(SEGMENT, bytes(log.data[:1000]))
    with pytest.raises(CorruptedError, match="expected 0/10003E8"):
        decoder.feed(lsn, b"1234")
    assert first + decoder.feed(SEGMENT + 1000, bytes(log.data[1000:])) == log.records


def _broken(log: WalBuilder, position: int, replacement: bytes) -> bytes:
    data = bytearray(log.data)
    data[position - SEGMENT : position - SEGMENT + len(replacement)] = replacement
    return bytes(data)


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize(
    ("offset", "replacement", "message"),
    [
        (0, struct.pack("<I", 23), "absurd length 23"),
        (0, struct.pack("<I", 1 << 31), "absurd length"),
        (0, bytes(4), "has length 0"),
        (4, b"\xff", "wrong CRC"),
        (8, b"\xff", "xl_prev"),
        (20, b"\x00\x00\x00\x00", "wrong CRC"),
        (29, b"\xfe", "wrong CRC"),
    ],
)
def test_a_broken_record_is_refused_for_good(
    log: WalBuilder, index: int, offset: int, replacement: bytes, message: str
) -> None:
    start = log.records[index][0]
    data = _broken(log, start + offset, replacement)
    decoder = WalStreamDecoder(SEGMENT, last_record_start=0)
    with pytest.raises(CorruptedError, match=message):
        decoder.feed(SEGMENT, data)
    assert decoder.end_lsn == (log.records[index - 1][1] if index else SEGMENT)
    assert decoder.last_record_start == (log.records[index - 1][0] if index else 0)
    with pytest.raises(CorruptedError, match=message):
        decoder.feed(decoder.next_lsn, b"")


@pytest.mark.parametrize(
    ("position", "replacement", "message"),
    [
        (SEGMENT, b"\0\1", "magic"),
        (SEGMENT + 24, b"\1", "another database system"),
        (SEGMENT + PAGE, b"\0", "magic"),
        (SEGMENT + PAGE + 2, b"\0", "continues a record by"),
        (SEGMENT + PAGE + 8, b"\1", "address"),
        (SEGMENT + PAGE + 16, b"\1", "continues a record by"),
    ],
)
def test_a_broken_page_is_refused(log: WalBuilder, position: int, replacement: bytes, message: str) -> None:
    with pytest.raises(CorruptedError, match=message):
        _decoder(log).feed(SEGMENT, _broken(log, position, replacement))


def test_a_continuation_without_beginning_is_refused(log: WalBuilder) -> None:
    with pytest.raises(CorruptedError, match="never began"):
        WalStreamDecoder(SEGMENT + PAGE).feed(SEGMENT + PAGE, bytes(log.data[PAGE:]))


def test_a_first_record_cannot_follow_the_future(log: WalBuilder) -> None:
    later = WalBuilder(SEGMENT, prev_lsn=SEGMENT + 40)
    later.append_noop(50)
    with pytest.raises(CorruptedError, match="xl_prev"):
        _decoder(later).feed(SEGMENT, bytes(later.data))


def test_a_limit_on_the_length_of_records(log: WalBuilder) -> None:
    decoder = WalStreamDecoder(SEGMENT, max_record_size_bytes=10_000)
    with pytest.raises(CorruptedError, match="absurd length 20000"):
        decoder.feed(SEGMENT, bytes(log.data))


@pytest.mark.parametrize("lsn", [SEGMENT + 1, SEGMENT + 8, SEGMENT + PAGE + 16])
def test_a_start_where_no_record_can_be_is_the_callers_fault(lsn: int) -> None:
    with pytest.raises(InvalidInputError):
        WalStreamDecoder(lsn)
    WalStreamDecoder(lsn, synchronise=True)


# ---- the end --------------------------------------------------------------------------------------------------------


def test_zeros_wait_and_are_not_taken(log: WalBuilder) -> None:
    decoder = _decoder(log)
    cut = log.records[2][1] - SEGMENT
    assert decoder.feed(SEGMENT, bytes(log.data[:cut]) + bytes(100)) == log.records[:3]
    assert decoder.next_lsn == log.records[2][1]
    assert decoder.feed(decoder.next_lsn, bytes(24)) == []
    assert decoder.feed(decoder.next_lsn, bytes(log.data[cut:])) == log.records[3:]


def test_a_page_of_zeros_inside_a_record_waits(log: WalBuilder) -> None:
    decoder = _decoder(log)
    cut = 2 * PAGE
    assert decoder.feed(SEGMENT, bytes(log.data[:cut]) + bytes(PAGE)) == log.records[:3]
    assert decoder.next_lsn == SEGMENT + cut
    assert decoder.feed(decoder.next_lsn, bytes(log.data[cut:])) == log.records[3:]


def _end(log: WalBuilder, size: int, **options: bool) -> EndOfWal:
    def read(lsn: int, size_bytes: int) -> bytes:
        return bytes(log.data[lsn - log.start_lsn : min(size, lsn - log.start_lsn + size_bytes)])

    return find_end_of_wal(read, log.start_lsn, chunk_size_bytes=500, **options)


def test_the_end_of_wal_is_the_end_of_the_last_whole_record(log: WalBuilder) -> None:
    for size in (*range(300), *range(8000, 8600), len(log.data) - 1, len(log.data)):
        whole = [raw for raw, last in zip(log.records, log.last_bytes, strict=True) if last <= SEGMENT + size]
        expected = EndOfWal(whole[-1][0], whole[-1][1]) if whole else EndOfWal(None, SEGMENT)
        assert _end(log, size) == expected
        assert _end(log, size, synchronise=True) == expected


def test_the_end_of_wal_behind_a_switch_is_the_end_of_the_segment() -> None:
    log = WalBuilder(SEGMENT)
    start, end, record = log.switch()
    assert _end(log, 40 + len(record)) == EndOfWal(start, end) == EndOfWal(SEGMENT + 40, 2 * SEGMENT)
    assert _end(log, 40 + len(record) - 1) == EndOfWal(None, SEGMENT)


def test_damage_is_not_an_end(log: WalBuilder) -> None:
    log.data[-20] ^= 1
    with pytest.raises(CorruptedError, match="wrong CRC"):
        _end(log, len(log.data))


def test_a_restarted_decoder_takes_other_bytes_behind_the_last_complete_record() -> None:
    """After an election half a record may be gone, and another one stand in its place."""
    log, other = WalBuilder(SEGMENT + PAGE), WalBuilder(SEGMENT + PAGE)
    for builder in (log, other):
        builder.append(b"a" * 100)
    log.append(b"b" * 500)
    other.append(b"c" * 900)
    decoder = _decoder(log)
    (first,) = decoder.feed(log.start_lsn, bytes(log.data[:-8]))
    restarted = decoder.restarted()
    assert restarted.next_lsn == first[1]
    (second,) = restarted.feed(first[1], bytes(other.data[first[1] - other.start_lsn :]))
    assert second[0] == first[1]
    assert b"c" * 900 in second[2]
