"""pg_control, records into pages, the minted checkpoint."""

from __future__ import annotations

import dataclasses
import struct

import google_crc32c
import pytest

from shared.errors import CorruptedError, InvalidInputError
from shared.lsn import WAL_BLOCK_SIZE_BYTES, WAL_SEGMENT_SIZE_BYTES
from shared.wal.control import CATALOG_VERSION, CONTROL_VERSION, CheckPoint, ControlFile, DbState
from shared.wal.page import build_page_header, segment_file_name
from shared.wal.reader import WalStreamDecoder, record_crc
from shared.wal.rmgr_xlog import XlogCheckpoint, parse
from shared.wal.writer import build_record, build_segments, lay_out_record, mint_shutdown_checkpoint

PAGE, SEGMENT = WAL_BLOCK_SIZE_BYTES, WAL_SEGMENT_SIZE_BYTES

CHECKPOINT = CheckPoint(
    redo=0x1000028,
    this_timeline=1,
    prev_timeline=1,
    full_page_writes=False,
    next_xid=5 << 32 | 731,
    next_oid=16400,
    next_multi=3,
    next_multi_offset=5,
    oldest_xid=722,
    oldest_xid_database=1,
    oldest_multi=1,
    oldest_multi_database=4,
    time_s=1_700_000_000,
    oldest_commit_ts_xid=0,
    newest_commit_ts_xid=0,
    oldest_active_xid=730,
)

CONTROL = ControlFile(
    system_identifier=0x6543210987654321,
    control_version=CONTROL_VERSION,
    catalog_version=CATALOG_VERSION,
    state=DbState.IN_PRODUCTION,
    time_s=1_699_999_999,
    checkpoint_lsn=0x1000028,
    checkpoint=CHECKPOINT,
    unlogged_lsn=1000,
    min_recovery_lsn=77,
    min_recovery_timeline=1,
    backup_start_lsn=88,
    backup_end_lsn=99,
    backup_end_required=True,
    wal_level=1,
    wal_log_hints=False,
    max_connections=100,
    max_worker_processes=8,
    max_wal_senders=10,
    max_prepared_transactions=0,
    max_locks_per_transaction=64,
    track_commit_timestamp=False,
    max_align=8,
    float_format=1234567.0,
    block_size_bytes=8192,
    relation_segment_blocks=131072,
    wal_block_size_bytes=8192,
    wal_segment_size_bytes=SEGMENT,
    name_data_length=64,
    index_max_keys=32,
    toast_max_chunk_size_bytes=1996,
    large_object_chunk_size_bytes=2048,
    float8_by_value=True,
    data_checksum_version=0,
    mock_authentication_nonce=b"nonce".ljust(32, b"!"),
)


# ---- pg_control -----------------------------------------------------------------------------------------------------


def test_control_file_fields_stand_where_pg_control_h_puts_them() -> None:
    data = CONTROL.serialize()
    assert len(data) == 8192
    assert struct.unpack_from("<QII", data) == (CONTROL.system_identifier, 1300, 202307071)
    assert struct.unpack_from("<i", data, 16) == (6,)
    assert struct.unpack_from("<Q", data, 32) == (0x1000028,)
    assert data[40:128] == CHECKPOINT.serialize()
    assert struct.unpack_from("<Q", data, 64) == (5 << 32 | 731,)
    assert struct.unpack_from("<q", data, 104) == (1_700_000_000,)
    assert struct.unpack_from("<I", data, 120) == (730,)
    assert struct.unpack_from("<d", data, 208) == (1234567.0,)
    assert data[256:288] == CONTROL.mock_authentication_nonce
    assert struct.unpack_from("<I", data, 288) == (google_crc32c.value(data[:288]),)
    assert not any(data[292:])
    assert ControlFile.parse(data) == CONTROL
    assert "nonce" not in repr(CONTROL).replace("mock_authentication_nonce", "")


def _patched(offset: int, value: bytes) -> bytes:
    data = bytearray(CONTROL.serialize())
    data[offset : offset + len(value)] = value
    data[288:292] = struct.pack("<I", google_crc32c.value(bytes(data[:288])))
    return bytes(data)


def test_a_control_file_that_is_not_ours_is_refused() -> None:
    good = CONTROL.serialize()
    with pytest.raises(CorruptedError, match="CRC"):
        ControlFile.parse(good[:100] + b"\xff" + good[101:])
    with pytest.raises(CorruptedError, match="pg_control of"):
        ControlFile.parse(good[:291])
    for offset in (8, 12, 16, 204, 208, 216, 224, 228):
        with pytest.raises(CorruptedError):
            ControlFile.parse(_patched(offset, b"\x77"))
    with pytest.raises(CorruptedError):
        CheckPoint.parse(bytes(87))


# ---- layout ---------------------------------------------------------------------------------------------------------


def test_a_record_is_laid_out_across_pages_byte_by_byte() -> None:
    record = build_record(rmgr_id=10, info=0x20, prev_lsn=5, xid=9, fragments=b"\xff\x0a0123456789")
    assert record[20:24] == struct.pack("<I", record_crc(record))
    placed = lay_out_record(record, SEGMENT - 32, 99)
    assert placed.record_lsn == SEGMENT - 32
    assert placed.data == record[:32] + build_page_header(SEGMENT, 99, 4) + record[32:] + bytes(4)
    assert placed.end_lsn == SEGMENT + 48
    placed = lay_out_record(record, SEGMENT + PAGE, 99)
    assert placed.record_lsn == SEGMENT + PAGE + 24
    assert placed.data == build_page_header(SEGMENT + PAGE, 99) + record + bytes(4)


@pytest.mark.parametrize("lsn", [SEGMENT + 3, SEGMENT + 24, SEGMENT + PAGE + 8])
def test_no_record_is_laid_out_where_none_can_be(lsn: int) -> None:
    with pytest.raises(InvalidInputError):
        lay_out_record(build_record(rmgr_id=0, info=0, prev_lsn=1), lsn, 99)
    with pytest.raises(InvalidInputError):
        mint_shutdown_checkpoint(CONTROL.serialize(), CHECKPOINT, lsn - 100, lsn)


def test_segments_hold_the_bytes_and_the_headers_that_readers_check() -> None:
    start = SEGMENT + 2 * PAGE + 800
    segments = build_segments(b"x" * 16, start, 99)
    assert list(segments) == [segment_file_name(SEGMENT)]
    content = segments[segment_file_name(SEGMENT)]
    assert len(content) == SEGMENT
    assert content.startswith(build_page_header(SEGMENT, 99) + bytes(100))
    assert content[2 * PAGE : 2 * PAGE + 24] == build_page_header(SEGMENT + 2 * PAGE, 99)
    assert content[2 * PAGE + 799 : 2 * PAGE + 817] == b"\0" + b"x" * 16 + b"\0"


# ---- minting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end_lsn", "record_lsn", "new_end", "segment_count"),
    [
        (SEGMENT + PAGE + 1000, SEGMENT + PAGE + 1000, SEGMENT + PAGE + 1120, 1),
        (SEGMENT + PAGE, SEGMENT + PAGE + 24, SEGMENT + PAGE + 144, 1),
        (SEGMENT, SEGMENT + 40, SEGMENT + 160, 1),
        (SEGMENT + PAGE - 8, SEGMENT + PAGE - 8, SEGMENT + PAGE + 136, 1),
        (SEGMENT + PAGE - 112, SEGMENT + PAGE - 112, SEGMENT + PAGE + 32, 1),
        (SEGMENT + PAGE - 120, SEGMENT + PAGE - 120, SEGMENT + PAGE, 1),
        (2 * SEGMENT - 40, 2 * SEGMENT - 40, 2 * SEGMENT + 120, 2),
        (2 * SEGMENT - 120, 2 * SEGMENT - 120, 2 * SEGMENT, 1),
    ],
)
def test_a_minted_checkpoint(end_lsn: int, record_lsn: int, new_end: int, segment_count: int) -> None:
    minted = mint_shutdown_checkpoint(CONTROL.serialize(), CHECKPOINT, end_lsn - 200, end_lsn)
    assert (minted.checkpoint_lsn, minted.end_lsn) == (record_lsn, new_end)
    expected = dataclasses.replace(CHECKPOINT, redo=record_lsn, oldest_active_xid=0)
    control = ControlFile.parse(minted.control)
    assert control == dataclasses.replace(
        CONTROL,
        state=DbState.SHUTDOWNED,
        time_s=CHECKPOINT.time_s,
        checkpoint_lsn=record_lsn,
        checkpoint=expected,
        min_recovery_lsn=0,
        min_recovery_timeline=0,
        backup_start_lsn=0,
        backup_end_lsn=0,
        backup_end_required=False,
    )
    assert len(minted.segments) == segment_count
    assert all(len(content) == SEGMENT for content in minted.segments.values())
    # As a stream, and as files read from the start of the page.
    decoder = WalStreamDecoder(end_lsn, last_record_start=end_lsn - 200, system_identifier=CONTROL.system_identifier)
    ((start, end, record),) = decoder.feed(end_lsn, minted.streamed)
    assert (start, end) == (record_lsn, new_end)
    assert parse(record[16], record[26:]) == XlogCheckpoint(True, expected)
    base = end_lsn - end_lsn % SEGMENT
    files = b"".join(minted.segments[name] for name in sorted(minted.segments))
    assert files[end_lsn - base : new_end - base] == minted.streamed
    decoder = WalStreamDecoder(record_lsn, system_identifier=CONTROL.system_identifier)
    assert decoder.feed(record_lsn, files[record_lsn - base :][: 2 * PAGE]) == [(start, end, record)]


@pytest.mark.parametrize("last_record_start", [0, -8, 2 * SEGMENT, 2 * SEGMENT - 16])
def test_a_last_record_that_cannot_be_is_refused(last_record_start: int) -> None:
    with pytest.raises(InvalidInputError):
        mint_shutdown_checkpoint(CONTROL.serialize(), CHECKPOINT, last_record_start, 2 * SEGMENT)
