"""Native changes against pages laid out by hand, from the macros of clog.c, multixact.c and visibilitymap.c."""

from __future__ import annotations

import random
import struct

import pytest

from pageserver import native
from pageserver.native import apply_native
from shared.errors import CorruptedError
from shared.keyspace import Fork, RelTag, Slru, slru_key
from shared.wal.rmgr_clog import XidStatus

CLOG_KEY = slru_key(Slru.CLOG, 0)
OFFSETS_KEY = slru_key(Slru.MULTIXACT_OFFSETS, 0)
MEMBERS_KEY = slru_key(Slru.MULTIXACT_MEMBERS, 0)
VM_KEY = RelTag(1663, 5, 16384, Fork.VISIBILITY_MAP).block_key(0)
ZEROS = bytes(8192)


def test_page_geometry_is_postgres() -> None:
    assert native.CLOG_XACTS_PER_PAGE == 32768
    assert native.MULTIXACT_OFFSETS_PER_PAGE == 2048
    assert native.MULTIXACT_MEMBERS_PER_PAGE == 1636  # 409 groups of 4


def test_clog_puts_two_bits_per_xid_lowest_first() -> None:
    payload = native.pack_clog_set([0, 1, 5, 32768 + 7], XidStatus.COMMITTED)
    page = apply_native(CLOG_KEY, ZEROS, [payload])
    assert page[:3] == bytes([0b00_00_01_01, 0b01_00_01_00, 0])
    assert not any(page[3:])
    aborted = apply_native(CLOG_KEY, page, [native.pack_clog_set([1, 4], XidStatus.ABORTED)])
    assert aborted[:2] == bytes([0b00_00_10_01, 0b01_00_01_10])


def test_clog_last_xid_of_a_page() -> None:
    page = apply_native(CLOG_KEY, ZEROS, [native.pack_clog_set([65535], XidStatus.ABORTED)])
    assert page[8191] == 0b10_00_00_00
    assert not any(page[:8191])


def test_many_commits_at_once_are_what_they_are_one_by_one() -> None:
    before = random.Random(1).randbytes(8192)
    indexes = [0, 3, 4, 5, 4, 32767, 9000]
    alone = [native.pack_clog_commit(index) for index in indexes]
    together = apply_native(CLOG_KEY, before, [native.pack_clog_set(indexes, XidStatus.COMMITTED)])
    assert apply_native(CLOG_KEY, before, alone) == together
    # Whatever else comes in between has its place.
    aborted = native.pack_clog_set([3], XidStatus.ABORTED)
    mixed = apply_native(CLOG_KEY, before, [*alone, aborted])
    assert mixed == apply_native(CLOG_KEY, together, [aborted]) != together
    with pytest.raises(CorruptedError, match="beyond its page"):
        apply_native(CLOG_KEY, before, [*alone, alone[0][:3] + b"\x00\x80"])


def test_clog_does_not_go_back_from_committed_to_sub_committed() -> None:
    committed = native.pack_clog_set([3], XidStatus.COMMITTED)
    sub = native.pack_clog_set([3, 2], XidStatus.SUB_COMMITTED)
    assert apply_native(CLOG_KEY, ZEROS, [committed, sub])[0] == 0b01_11_00_00
    assert apply_native(CLOG_KEY, ZEROS, [sub, committed])[0] == 0b01_11_00_00


def test_multixact_offsets_include_the_start_of_the_next_one() -> None:
    ((page_number, payload),) = native.pack_multixact_offsets(2, 1, 3)
    assert page_number == 0
    page = apply_native(OFFSETS_KEY, ZEROS, [payload])
    assert struct.unpack_from("<4I", page) == (0, 0, 1, 4)


def test_multixact_offsets_over_a_page_boundary_and_around() -> None:
    first, second = native.pack_multixact_offsets(2047, 100, 2)
    assert (first[0], second[0]) == (0, 1)
    assert struct.unpack_from("<I", apply_native(OFFSETS_KEY, ZEROS, [first[1]]), 2047 * 4) == (100,)
    assert struct.unpack_from("<I", apply_native(OFFSETS_KEY, ZEROS, [second[1]])) == (102,)
    # The id after 2^32 - 1 is 1, and an offset of 0 would mean "not set".
    last, wrapped = native.pack_multixact_offsets(0xFFFFFFFF, 0xFFFFFFFE, 2)
    assert (last[0], wrapped[0]) == (0xFFFFFFFF // 2048, 0)
    assert struct.unpack_from("<2I", apply_native(OFFSETS_KEY, ZEROS, [wrapped[1]])) == (0, 1)


def test_multixact_members_stand_in_groups_of_flags_and_xids() -> None:
    ((number, payload),) = native.pack_multixact_members(3, [(700, 1), (701, 5)])
    assert number == 0
    page = apply_native(MEMBERS_KEY, ZEROS, [payload])
    # Group 0: flag bytes 0-3, xids at 4, 8, 12, 16; group 1 starts at byte 20.
    assert page[3] == 1
    assert struct.unpack_from("<I", page, 16) == (700,)
    assert page[20] == 5
    assert struct.unpack_from("<I", page, 24) == (701,)
    assert sum(1 for byte in page if byte) == 6


def test_multixact_members_over_pages_and_around() -> None:
    over = native.pack_multixact_members(1635, [(1, 0), (2, 0)])
    assert [page for page, _ in over] == [0, 1]
    around = native.pack_multixact_members(0xFFFFFFFF, [(1, 0), (2, 0)])
    assert [page for page, _ in around] == [0xFFFFFFFF // 1636, 0]
    page = apply_native(MEMBERS_KEY, ZEROS, [over[0][1]])
    assert struct.unpack_from("<I", page, 408 * 20 + 16) == (1,)  # the last member of the last group


def test_visibility_clear_takes_bits_behind_the_page_header_and_leaves_the_lsn() -> None:
    full = bytes(range(24)) + b"\xff" * 8168
    payload = native.pack_vm_clear([(0, 3), (5, 2), (32671, 1)])
    page = apply_native(VM_KEY, full, [payload])
    assert page[:24] == bytes(range(24))
    assert page[24] == 0b11_11_11_00
    assert page[25] == 0b11_11_01_11
    assert page[8191] == 0b10_11_11_11
    assert page[26:8191] == b"\xff" * 8165


def test_visibility_clear_of_a_page_that_nobody_made_leaves_zeros() -> None:
    assert apply_native(VM_KEY, None, [native.pack_vm_clear([(9, 3)])]) == ZEROS


def test_visibility_truncate_keeps_what_is_before() -> None:
    full = b"\x07" * 24 + b"\xff" * 8168
    page = apply_native(VM_KEY, full, [native.pack_vm_truncate(6)])
    assert page[:24] == b"\x07" * 24
    assert page[24:26] == bytes([0xFF, 0b00_00_11_11])
    assert not any(page[26:])


def test_other_changes_need_a_page() -> None:
    with pytest.raises(CorruptedError):
        apply_native(CLOG_KEY, None, [native.pack_clog_set([1], XidStatus.COMMITTED)])


@pytest.mark.parametrize(
    ("key", "payload"),
    [
        (VM_KEY, native.pack_clog_set([1], XidStatus.COMMITTED)),
        (CLOG_KEY, native.pack_vm_clear([(1, 3)])),
        (MEMBERS_KEY, native.pack_multixact_offset(2, 1)[1]),
        (OFFSETS_KEY, native.pack_multixact_members(1, [(3, 0)])[0][1]),
        (RelTag(1663, 5, 16384, Fork.MAIN).block_key(0), native.pack_vm_clear([(1, 3)])),
        (CLOG_KEY, b""),
        (CLOG_KEY, b"\x01"),
        (CLOG_KEY, b"\x02\x01\x01\x00\x00"),
        (CLOG_KEY, b"\x01\x09"),
        (CLOG_KEY, b"\x01\x01\x07\x00\x00"),
        (CLOG_KEY, b"\x01\x01\x00\x00\x00"),
        (CLOG_KEY, b"\x01\x01\x01\x00\x80"),
        (CLOG_KEY, b"\x01\x01\x01\x00"),
        (OFFSETS_KEY, b"\x01\x02" + struct.pack("<HI", 2048, 1)),
        (MEMBERS_KEY, b"\x01\x03" + struct.pack("<HBI", 1636, 0, 1)),
        (MEMBERS_KEY, b"\x01\x03" + struct.pack("<HBI", 0, 6, 1)),
        (VM_KEY, b"\x01\x04" + struct.pack("<HB", 32672, 1)),
        (VM_KEY, b"\x01\x04" + struct.pack("<HB", 0, 4)),
        (VM_KEY, b"\x01\x05" + struct.pack("<H", 32672)),
        (VM_KEY, b"\x01\x05\x00"),
    ],
)
def test_malformed_or_misplaced_changes_are_refused(key: bytes, payload: bytes) -> None:
    with pytest.raises(CorruptedError):
        apply_native(key, ZEROS, [payload])


def test_base_must_be_a_page() -> None:
    with pytest.raises(CorruptedError):
        apply_native(CLOG_KEY, b"short", [native.pack_clog_set([1], XidStatus.COMMITTED)])


def test_commit_timestamps_are_ten_bytes_each() -> None:
    assert native.COMMIT_TS_XACTS_PER_PAGE == 819
    key = slru_key(Slru.COMMIT_TS, 0)
    page = apply_native(key, ZEROS, [native.pack_commit_ts([1, 819 + 818], -5, 7)])
    entry = struct.pack("<qH", -5, 7)
    assert page == bytes(10) + entry + bytes(816 * 10) + entry + bytes(2)
    for payload in (native.pack_commit_ts([0], 1, 1)[:-1], native.pack_commit_ts([], 1, 1)[:-3]):
        with pytest.raises(CorruptedError):
            apply_native(key, ZEROS, [payload])
    beyond = native.pack_commit_ts([0], 1, 1)[:-2] + struct.pack("<H", 819)
    with pytest.raises(CorruptedError):
        apply_native(key, ZEROS, [beyond])
    with pytest.raises(CorruptedError):
        apply_native(CLOG_KEY, ZEROS, [native.pack_commit_ts([0], 1, 1)])
