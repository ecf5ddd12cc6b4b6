"""What ingest keeps outside of relations, record by record: corners that a workload does not come to at will."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from pageserver import ingest, native
from pageserver.ingest import MAX_GAP_BLOCKS, Ingested, WalIngest
from pageserver.ingest_state import Tip, UnsupportedWalError
from pageserver.slru import member_pages_between, page_precedes, pages_before
from pageserver.value import ValueKind
from shared.errors import CorruptedError
from shared.keyspace import CHECKPOINT_KEY, CONTROL_FILE_KEY, Fork, RelTag, Slru, repl_origin_key, slru_key
from shared.wal.control import CheckPoint, ControlFile, DbState
from shared.wal.record import ImageFlag
from shared.wal.rmgr import RmgrId
from shared.wal.rmgr_heap import HEAP_BLOCKS_PER_MAP_PAGE, Heap2Op
from shared.wal.rmgr_standby import StandbyOp
from shared.wal.rmgr_xact import XactInfo, XactOp
from shared.wal.rmgr_xlog import XlogOp
from shared.wal.writer import build_record

END = 0x5000000
REL = (1663, 5, 16384)
CHECKPOINT = CheckPoint(
    redo=100,
    this_timeline=1,
    prev_timeline=1,
    full_page_writes=True,
    next_xid=10_240,
    next_oid=20_000,
    next_multi=50,
    next_multi_offset=100,
    oldest_xid=731,
    oldest_xid_database=1,
    oldest_multi=1,
    oldest_multi_database=1,
    time_s=1,
    oldest_commit_ts_xid=0,
    newest_commit_ts_xid=0,
    oldest_active_xid=0,
)


def new_tip(checkpoint: CheckPoint = CHECKPOINT, *, track_commit_timestamp: bool = False) -> Tip:
    control = ControlFile(
        system_identifier=1, control_version=1300, catalog_version=202307071, state=DbState.SHUTDOWNED, time_s=1,
        checkpoint_lsn=100, checkpoint=checkpoint, unlogged_lsn=1000, min_recovery_lsn=0, min_recovery_timeline=0,
        backup_start_lsn=0, backup_end_lsn=0, backup_end_required=False, wal_level=1, wal_log_hints=False,
        max_connections=100, max_worker_processes=8, max_wal_senders=10, max_prepared_transactions=0,
        max_locks_per_transaction=64, track_commit_timestamp=track_commit_timestamp, max_align=8,
        float_format=1234567.0, block_size_bytes=8192, relation_segment_blocks=131072, wal_block_size_bytes=8192,
        wal_segment_size_bytes=1 << 24, name_data_length=64, index_max_keys=32, toast_max_chunk_size_bytes=1996,
        large_object_chunk_size_bytes=2048, float8_by_value=True, data_checksum_version=0,
        mock_authentication_nonce=bytes(32),
    )  # fmt: skip
    return Tip({}, {(1664, 0)}, {kind: {0} for kind in Slru}, set(), checkpoint, control)


def record(rmgr_id: int, info: int, main: bytes = b"", *, xid: int = 0, fragments: bytes = b"") -> bytes:
    data = bytes((255, len(main))) + main if main else b""
    return build_record(rmgr_id=rmgr_id, info=info, prev_lsn=1, xid=xid, fragments=fragments + data)


def feed(tip: Tip, *records: bytes) -> Ingested:
    return WalIngest(tip).ingest([(END + 1000 * n, END + 1000 * (n + 1), raw) for n, raw in enumerate(records)])


def kinds(done: Ingested, key: bytes) -> list[int]:
    return [kind for stored, _, kind, _ in done.values if stored == key]


# --- checkpoints ---


def checkpoint_record(opcode: XlogOp, **changes: int) -> bytes:
    return record(RmgrId.XLOG, opcode, replace(CHECKPOINT, **changes).serialize())  # type: ignore[arg-type]


def test_an_online_checkpoint_never_takes_anything_back() -> None:
    """It is filled in before its record is written: what was logged in between is newer."""
    tip = new_tip(replace(CHECKPOINT, oldest_xid=900, oldest_multi=40))
    feed(
        tip,
        record(RmgrId.XLOG, XlogOp.NEXT_OID, struct.pack("<I", 28_192)),
        checkpoint_record(
            XlogOp.CHECKPOINT_ONLINE, next_xid=5_000, next_oid=20_000, next_multi=49, next_multi_offset=120, time_s=9
        ),
    )
    after = tip.checkpoint
    assert (after.next_xid, after.next_oid, after.next_multi, after.next_multi_offset) == (10_240, 28_192, 50, 120)
    assert (after.oldest_xid, after.oldest_multi, after.time_s) == (900, 40, 9)
    feed(tip, checkpoint_record(XlogOp.CHECKPOINT_ONLINE, oldest_xid=950, oldest_multi=45, next_xid=20_000))
    assert (tip.checkpoint.oldest_xid, tip.checkpoint.oldest_multi, tip.checkpoint.next_xid) == (950, 45, 20_000)


def test_a_shutdown_checkpoint_is_exact() -> None:
    tip = new_tip()
    feed(tip, checkpoint_record(XlogOp.CHECKPOINT_SHUTDOWN, next_xid=9_300, next_oid=19_000, redo=7))
    assert (tip.checkpoint.next_xid, tip.checkpoint.next_oid, tip.checkpoint.redo) == (9_300, 19_000, 100)


def running(*, complete: bool) -> bytes:
    return record(RmgrId.STANDBY, StandbyOp.RUNNING_XACTS, struct.pack("<ii?3xIII", 0, 0, not complete, 9, 9, 8))


@pytest.mark.parametrize("opcode", [XlogOp.CHECKPOINT_ONLINE, XlogOp.CHECKPOINT_SHUTDOWN])
def test_the_control_file_has_the_newest_checkpoint_as_it_was_logged_and_where(opcode: XlogOp) -> None:
    """A standby that starts from it must not be told of more than was true there."""
    tip = new_tip()
    logged = replace(CHECKPOINT, redo=END + 500, next_xid=9_300, oldest_active_xid=9_200)
    other = record(RmgrId.XLOG, XlogOp.NEXT_OID, struct.pack("<I", 28_192))
    done = feed(tip, other, record(RmgrId.XLOG, opcode, logged.serialize()), commit(10_300), other)
    assert kinds(done, CONTROL_FILE_KEY) == [ValueKind.IMAGE]
    (stored,) = (payload for key, _, _, payload in done.values if key == CONTROL_FILE_KEY)
    control = ControlFile.parse(stored)
    assert control == tip.control == replace(new_tip().control, checkpoint_lsn=END + 1000, checkpoint=logged)
    standby = ControlFile.parse(control.of_standby(END + 4000).serialize())
    assert (standby.state, standby.min_recovery_lsn) == (DbState.IN_ARCHIVE_RECOVERY, END + 4000)
    assert (standby.checkpoint_lsn, standby.checkpoint) == (END + 1000, logged)


def test_a_standby_does_not_start_where_it_would_not_know_who_runs_but_never_before_a_copied_database() -> None:
    tip = new_tip()
    ingest, lsn = WalIngest(tip), END

    def kept(*records: bytes) -> bool:
        """Is a checkpoint behind them, whose redo is before them, what a standby starts from?"""
        nonlocal lsn
        logged = checkpoint_record(XlogOp.CHECKPOINT_ONLINE, redo=lsn)
        for each in (*records, logged):
            lsn += 1000
            ingest.ingest([(lsn, lsn + 1000, each)])
        return tip.control.checkpoint_lsn == lsn

    copy = record(RmgrId.DBASE, 0x00, struct.pack("<4I", 20_000, 1663, 1, 1663))
    assert kept(running(complete=False)), "what was copied before this run of ingest is not known"
    assert kept(running(complete=False)), "nor is it before that checkpoint's redo"
    assert not kept(running(complete=False))
    assert kept(running(complete=True))
    assert kept(), "the list is still the last one"
    assert not kept(running(complete=False))
    assert kept(running(complete=False), copy)
    assert kept(running(complete=False)), "the copy was behind that one's redo"
    assert not kept(running(complete=False))


def test_a_list_of_who_runs_moves_the_oldest_active_xid() -> None:
    """A start from here on would look for older transactions in pg_subtrans (StartupSUBTRANS)."""
    tip = new_tip(replace(CHECKPOINT, oldest_active_xid=5))
    done = feed(tip, running(complete=True), running(complete=False))
    assert tip.checkpoint == replace(CHECKPOINT, oldest_active_xid=9)
    (stored,) = (payload for key, _, _, payload in done.values if key == CHECKPOINT_KEY)
    assert CheckPoint.parse(stored) == tip.checkpoint


def test_full_page_writes_are_known_from_their_record() -> None:
    tip = new_tip()
    feed(tip, record(RmgrId.XLOG, XlogOp.FPW_CHANGE, b"\0"))
    assert not tip.checkpoint.full_page_writes


# --- xids ---


def commit(xid: int, subxids: tuple[int, ...] = (), *, header_xid: int | None = None) -> bytes:
    main = struct.pack("<q", 77)
    info = int(XactOp.COMMIT)
    if subxids:
        info |= 0x80
        main += struct.pack(f"<Ii{len(subxids)}I", XactInfo.HAS_SUBXACTS, len(subxids), *subxids)
    return record(RmgrId.XACT, info, main, xid=xid if header_xid is None else header_xid)


def test_a_subtransaction_without_a_record_of_its_own_counts() -> None:
    """Its xid is in the commit record only; given out again, it would be born committed."""
    tip = new_tip()
    feed(tip, commit(10_000, (10_240, 10_300)))
    assert tip.checkpoint.next_xid > 10_300


def test_next_xid_is_not_rounded_across_the_wrap() -> None:
    """On a new epoch's first page of the commit log, which nothing has zeroed yet, no start could be made."""
    first_of_last = (1 << 32) - 1024
    tip = new_tip(replace(CHECKPOINT, next_xid=first_of_last))
    for xid in (first_of_last, first_of_last + 1, (1 << 32) - 2):
        feed(tip, commit(xid))
        assert tip.checkpoint.next_xid == xid + 1
    feed(tip, commit((1 << 32) - 1))
    assert tip.checkpoint.next_xid == (1 << 32) + 3
    feed(tip, commit(3))
    assert tip.checkpoint.next_xid == (1 << 32) + 1024


# --- SLRUs ---


def test_which_segments_a_truncation_takes() -> None:
    pages = range(200)
    assert pages_before(Slru.CLOG, pages, 63) == list(range(32))
    assert pages_before(Slru.CLOG, pages, 64) == list(range(64))
    assert pages_before(Slru.MULTIXACT_OFFSETS, pages, 95) == list(range(64))
    last = (1 << 32) // 32768 - 1
    assert pages_before(Slru.CLOG, [0, 31, last - 31, last], 0) == [last - 31, last]
    assert not page_precedes(Slru.CLOG, 5, 5)
    half = (1 << 31) // 32768
    assert page_precedes(Slru.CLOG, 5, 5 + half - 1)
    assert not page_precedes(Slru.CLOG, 5, 5 + half), "half a turn away is not before"


def test_members_are_cut_by_segments_across_the_wrap() -> None:
    per_segment = 1636 * 32
    last_segment = (1 << 32) // per_segment
    pages = [0, 31, 32, last_segment * 32, last_segment * 32 + 3]
    assert member_pages_between(pages, last_segment * per_segment, 10) == [last_segment * 32, last_segment * 32 + 3]
    assert member_pages_between(pages, 0, per_segment) == [0, 31]
    assert member_pages_between(pages, 5, 10) == []


def test_multixact_offsets_keep_the_segment_before_a_boundary() -> None:
    """multixact.c steps back one id, so that the cut is a page that exists."""
    tip = new_tip()
    tip.slru_pages[Slru.MULTIXACT_OFFSETS] = set(range(96))
    boundary = 64 * 2048
    feed(tip, record(RmgrId.MULTIXACT, 0x30, struct.pack("<IIIII", 1, 1, boundary, 0, 0)))
    assert tip.slru_pages[Slru.MULTIXACT_OFFSETS] == set(range(32, 96))
    feed(tip, record(RmgrId.MULTIXACT, 0x30, struct.pack("<IIIII", 1, boundary, boundary + 1, 0, 0)))
    assert tip.slru_pages[Slru.MULTIXACT_OFFSETS] == set(range(64, 96))


def test_a_page_with_a_negative_number_is_refused() -> None:
    with pytest.raises(CorruptedError):
        feed(new_tip(), record(RmgrId.CLOG, 0x00, struct.pack("<i", -1)))


# --- commit timestamps ---


def parameters(*, track: bool) -> bytes:
    return record(RmgrId.XLOG, XlogOp.PARAMETER_CHANGE, struct.pack("<6i??2x", 55, 8, 10, 4, 64, 2, False, track))


def test_commit_timestamps_begin_and_end_with_their_setting() -> None:
    tip = new_tip()
    assert not kinds(feed(tip, commit(10_000)), slru_key(Slru.COMMIT_TS, 10_000 // 819))
    on = feed(tip, parameters(track=True))
    assert (tip.checkpoint.oldest_commit_ts_xid, tip.checkpoint.newest_commit_ts_xid) == (10_240, 10_240)
    assert tip.control.max_connections == 55
    assert kinds(on, CONTROL_FILE_KEY) == [ValueKind.IMAGE]
    assert kinds(on, slru_key(Slru.COMMIT_TS, 10_240 // 819)) == [ValueKind.IMAGE]
    kept = feed(tip, commit(10_300))
    assert kinds(kept, slru_key(Slru.COMMIT_TS, 10_300 // 819)) == [ValueKind.NATIVE]
    assert tip.checkpoint.newest_commit_ts_xid == 10_300
    again = feed(tip, parameters(track=True))
    assert not again.values, "nothing has changed"
    off = feed(tip, parameters(track=False))
    assert kinds(off, slru_key(Slru.COMMIT_TS, 10_300 // 819)) == [ValueKind.TOMBSTONE]
    assert not tip.slru_pages[Slru.COMMIT_TS]
    assert (tip.checkpoint.oldest_commit_ts_xid, tip.checkpoint.newest_commit_ts_xid) == (0, 0)


# --- replication origins ---


def test_an_origin_goes_back_only_by_force() -> None:
    tip = new_tip()

    def advance(lsn: int, *, force: bool) -> Ingested:
        return feed(tip, record(RmgrId.REPLORIGIN, 0x00, struct.pack("<QH?5x", lsn, 3, force)))

    advance(50, force=False)
    assert not advance(40, force=False).values
    assert tip.origins == {3: 50}
    assert kinds(advance(40, force=True), repl_origin_key(3)) == [ValueKind.IMAGE]
    assert tip.origins == {3: 40}
    dropped = feed(tip, record(RmgrId.REPLORIGIN, 0x10, struct.pack("<H", 3)))
    assert kinds(dropped, repl_origin_key(3)) == [ValueKind.TOMBSTONE]
    assert not tip.origins


# --- blocks ---


def block(number: int, *, flags: int = 0, spc: int = 1663) -> bytes:
    return struct.pack("<BBHIIII", 0, flags, 0, spc, *REL[1:], number)


def test_a_lock_of_an_updated_row_clears_the_frozen_bit_of_its_block_and_nothing_else() -> None:
    """heap_xlog_lock_updated, which no client can bring about at will."""
    heap_block = HEAP_BLOCKS_PER_MAP_PAGE + 6
    tip = new_tip()
    tip.rel_sizes = {(REL, Fork.MAIN): heap_block + 1, (REL, Fork.VISIBILITY_MAP): 2}
    map_key = RelTag(*REL, Fork.VISIBILITY_MAP).block_key(1)

    def lock_updated(flags: int) -> list[tuple[int, bytes]]:
        main = struct.pack("<IHBB", 10_000, 3, 0, flags)  # xl_heap_lock_updated
        done = feed(tip, record(RmgrId.HEAP2, Heap2Op.LOCK_UPDATED, main, xid=10_000, fragments=block(heap_block)))
        return [(kind, payload) for key, _, kind, payload in done.values if key == map_key]

    assert not lock_updated(0)
    ((kind, payload),) = lock_updated(1)  # XLH_LOCK_ALL_FROZEN_CLEARED
    assert kind == ValueKind.NATIVE
    before = bytes(24) + bytes([0b11111111]) * 8168
    after = bytearray(before)
    after[24 + 1] = 0b11011111  # of four blocks the third, of its two bits the higher one
    assert native.apply_native(map_key, before, [payload]) == after


def test_what_a_record_leaves_empty_before_its_block_is_zeros_and_has_a_bound() -> None:
    tip = new_tip()
    done = feed(tip, record(RmgrId.BTREE, 0, b"x", fragments=block(3, flags=0x40)))
    assert [kinds(done, RelTag(*REL, Fork.MAIN).block_key(number)) for number in range(5)] == [
        *([ValueKind.TOMBSTONE],) * 3,
        [ValueKind.WAL_INIT],
        [],
    ]
    for fragments in (block(MAX_GAP_BLOCKS + 5, flags=0x40), block(4_000_000_000), block(4_000_000_000, flags=2)):
        with pytest.raises(UnsupportedWalError, match="extends a relation"):
            feed(tip, record(RmgrId.BTREE, 0, b"x", fragments=fragments))


def test_records_that_come_to_much_are_handed_over_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes of log may stand for many blocks: those of one slice of the log are not collected first."""
    monkeypatch.setattr(ingest, "_MANY_VALUES", 100)
    short = [record(RmgrId.BTREE, 0, b"x", fragments=block(number, flags=0x40)) for number in (150, 300, 301)]
    image = struct.pack("<BBH", 0, 0x50, 0) + struct.pack("<HHB", 10, 4, ImageFlag.APPLY | ImageFlag.HAS_HOLE)
    long = build_record(
        rmgr_id=RmgrId.BTREE, info=0, prev_lsn=1, fragments=image + struct.pack("<IIII", *REL, 450) + bytes(10)
    )
    tip = new_tip()
    assert [feed(tip, *short).consumed, feed(tip, *short[1:]).consumed, feed(tip, long, *short).consumed] == [1, 1, 1]
    assert feed(tip, *short, *short).consumed == 6
    assert tip.rel_sizes[REL, Fork.MAIN] == 451


# --- what is refused ---


@pytest.mark.parametrize("rmgr_id", [22, 127, 128, 255])
def test_an_unknown_resource_manager_stops_ingest(rmgr_id: int) -> None:
    """Of an extension, or of another Postgres. Nobody here knows what its redo would do."""
    with pytest.raises(UnsupportedWalError, match="resource manager"):
        feed(new_tip(), record(rmgr_id, 0, b"x"))


def test_other_tablespaces_stop_ingest_wherever_they_show() -> None:
    assert feed(new_tip(), record(RmgrId.BTREE, 0, b"x", fragments=block(0, flags=0x40))).values
    for raw in (
        record(RmgrId.TBLSPC, 0x00, struct.pack("<I", 16500) + b"/somewhere\0"),
        record(RmgrId.SMGR, 0x10, struct.pack("<IIIi", 16500, 5, 16384, 0)),
        record(RmgrId.DBASE, 0x00, struct.pack("<IIII", 16385, 16500, 5, 1663)),
        record(RmgrId.DBASE, 0x00, struct.pack("<IIII", 16385, 1663, 5, 16500)),
        record(RmgrId.DBASE, 0x10, struct.pack("<II", 16385, 16500)),
        record(RmgrId.BTREE, 0, b"x", fragments=block(0, flags=0x40, spc=16500)),
    ):
        with pytest.raises(UnsupportedWalError, match="tablespaces"):
            feed(new_tip(), raw)


@pytest.mark.parametrize("flag", [ImageFlag.LZ4, ImageFlag.ZSTD])
@pytest.mark.parametrize("rmgr_id", [RmgrId.XLOG, RmgrId.BTREE])
def test_an_image_that_does_not_decompress_stops_ingest(flag: ImageFlag, rmgr_id: RmgrId) -> None:
    """Now, not when somebody reads the page."""
    header = struct.pack("<BBH", 0, 0x10, 0) + struct.pack("<HHB", 10, 0, flag | ImageFlag.APPLY)
    raw = build_record(
        rmgr_id=rmgr_id, info=XlogOp.FPI if rmgr_id == 0 else 0, prev_lsn=1,
        fragments=header + struct.pack("<IIII", *REL, 0) + bytes(10),
    )  # fmt: skip
    with pytest.raises(CorruptedError, match="the size of its page"):
        feed(new_tip(), raw)
