"""Main data of the records that ingest handles itself, laid out as in the headers of PostgreSQL 16."""

from __future__ import annotations

import struct
from collections.abc import Callable

import google_crc32c
import pytest

from shared.errors import CorruptedError
from shared.keyspace import Fork
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
from shared.wal.record import Block, parse_blocks
from shared.wal.rmgr import RmgrId
from shared.wal.rmgr_xact import XactInfo, XactOp
from shared.wal.writer import build_record

REL, OTHER = (1663, 5, 16384), (1663, 5, 16385)


# ---- transactions ---------------------------------------------------------------------------------------------------

EVERYTHING = (
    struct.pack("<q", 123456789)
    + struct.pack("<I", 0x1FF | 1 << 30)
    + struct.pack("<II", 5, 1663)
    + struct.pack("<iII", 2, 901, 902)
    + struct.pack("<i6I", 2, *REL, *OTHER)
    + struct.pack("<iiII", 1, 2, 5, 16384)
    + struct.pack("<i", 1) + b"sixteen bytes ..".ljust(16)
    + struct.pack("<I", 900)
    + b"the gid\0"
    + struct.pack("<Qq", 0x16B3748, 77)
)  # fmt: skip


def test_a_commit_with_everything() -> None:
    end = rmgr_xact.parse(XactOp.COMMIT_PREPARED | 0x80, 0, EVERYTHING)
    assert end == rmgr_xact.XactEnd(
        committed=True,
        was_prepared=True,
        xid=900,
        time_us=123456789,
        info=XactInfo(0x1FF | 1 << 30),
        database=5,
        tablespace=1663,
        subxids=(901, 902),
        dropped_rels=(REL, OTHER),
        dropped_stats=((2, 5, 16384),),
        invalidations=b"sixteen bytes ..",
        gid=b"the gid",
        origin_lsn=0x16B3748,
        origin_time_us=77,
    )
    assert "the gid" not in repr(end)


def test_a_plain_commit_and_a_plain_abort() -> None:
    for op, committed in ((XactOp.COMMIT, True), (XactOp.ABORT, False)):
        end = rmgr_xact.parse(op, 55, struct.pack("<q", 1))
        assert isinstance(end, rmgr_xact.XactEnd)
        assert (end.committed, end.was_prepared, end.xid, end.subxids, end.dropped_rels) == (
            committed,
            False,
            55,
            (),
            (),
        )


@pytest.mark.parametrize("size", range(len(EVERYTHING)))
def test_a_cut_commit_is_refused(size: int) -> None:
    with pytest.raises(CorruptedError):
        rmgr_xact.parse(XactOp.COMMIT_PREPARED | 0x80, 0, EVERYTHING[:size])


@pytest.mark.parametrize(
    ("info", "data"),
    [
        (XactOp.COMMIT_PREPARED | 0x80, EVERYTHING + b"\0"),
        (XactOp.ABORT_PREPARED | 0x80, EVERYTHING),  # invalidations
        (XactOp.COMMIT | 0x80, EVERYTHING),  # prepared xid in a plain commit
        (XactOp.COMMIT | 0x80, struct.pack("<qI", 1, 1 << 20)),
        (XactOp.COMMIT | 0x80, struct.pack("<qIi", 1, XactInfo.HAS_SUBXACTS, -1)),
        (XactOp.COMMIT | 0x80, struct.pack("<qIi", 1, XactInfo.HAS_RELS, 1 << 30)),
        (0x70, b""),
    ],
)
def test_an_impossible_transaction_record_is_refused(info: int, data: bytes) -> None:
    with pytest.raises(CorruptedError):
        rmgr_xact.parse(info, 0, data)


def _prepare(gid: bytes = b"my gid\0") -> bytes:
    head = struct.Struct("<IIIIqIiiiiii?xHQq")
    assert head.size == rmgr_xact.TWOPHASE_HEADER_SIZE_BYTES
    parts = [gid, struct.pack("<3I", 8, 9, 10), struct.pack("<3I", *REL), struct.pack("<3I", *OTHER), b"records"]
    body = b"".join(part.ljust((len(part) + 7) & ~7, b"\0") for part in parts)
    fields = (
        rmgr_xact.TWOPHASE_MAGIC,
        head.size + len(body) + 4,
        7,
        5,
        99,
        10,
        3,
        1,
        1,
        0,
        0,
        0,
        False,
        len(gid),
        1,
        2,
    )
    return head.pack(*fields) + body


def test_prepare_and_its_state_file() -> None:
    data = _prepare()
    assert rmgr_xact.parse(XactOp.PREPARE, 7, data) == rmgr_xact.XactPrepare(
        xid=7,
        database=5,
        owner=10,
        prepared_at_us=99,
        gid=b"my gid",
        subxids=(8, 9, 10),
        commit_rels=(REL,),
        abort_rels=(OTHER,),
        origin_lsn=1,
        origin_time_us=2,
    )
    file = rmgr_xact.twophase_file(data)
    assert file[:-4] == data
    assert struct.unpack("<I", file[-4:])[0] == google_crc32c.value(data)
    assert struct.unpack_from("<I", file, 4)[0] == len(file)
    assert rmgr_xact.twophase_file_name(0x1A2B) == "00001A2B"


@pytest.mark.parametrize(
    "data", [_prepare()[:-8], b"\0" + _prepare()[1:], _prepare(b"endless!"), _prepare(b"x" * 200 + b"\0"), b""]
)
def test_an_impossible_prepare_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptedError):
        rmgr_xact.parse(XactOp.PREPARE, 7, data)


def test_assignment_and_invalidations() -> None:
    assert rmgr_xact.parse(XactOp.ASSIGNMENT, 0, struct.pack("<IiII", 9, 2, 10, 11)) == rmgr_xact.XactAssignment(
        9, (10, 11)
    )
    assert rmgr_xact.parse(XactOp.INVALIDATIONS, 0, b"whatever") is None


# ---- the small ones -------------------------------------------------------------------------------------------------


def test_smgr() -> None:
    created = rmgr_smgr.parse(0x10, struct.pack("<IIIi", *REL, 3))
    assert created == rmgr_smgr.SmgrCreate(REL, Fork.INIT)
    cut = rmgr_smgr.parse(0x20, struct.pack("<IIIIi", 17, *REL, 7))
    assert cut == rmgr_smgr.SmgrTruncate(REL, 17, rmgr_smgr.TruncateFlag(7))


def test_clog() -> None:
    assert rmgr_clog.parse(0x00, struct.pack("<i", 4)) == rmgr_clog.ClogZeroPage(4)
    assert rmgr_clog.parse(0x10, struct.pack("<iII", 4, 70000, 5)) == rmgr_clog.ClogTruncate(4, 70000, 5)


def test_multixact() -> None:
    assert rmgr_multixact.parse(0x00, struct.pack("<i", 3)) == rmgr_multixact.MultixactZeroPage(False, 3)
    assert rmgr_multixact.parse(0x10, struct.pack("<i", 3)) == rmgr_multixact.MultixactZeroPage(True, 3)
    created = rmgr_multixact.parse(0x20, struct.pack("<IIiIIII", 8, 90, 2, 700, 1, 701, 5))
    assert created == rmgr_multixact.MultixactCreate(8, 90, ((700, 1), (701, 5)))
    cut = rmgr_multixact.parse(0x30, struct.pack("<IIIII", 5, 1, 2, 3, 4))
    assert cut == rmgr_multixact.MultixactTruncate(5, 1, 2, 3, 4)


def test_dbase() -> None:
    assert rmgr_dbase.parse(0x00, struct.pack("<IIII", 1, 2, 3, 4)) == rmgr_dbase.DatabaseFileCopy(1, 2, 3, 4)
    assert rmgr_dbase.parse(0x10, struct.pack("<II", 1, 2)) == rmgr_dbase.DatabaseCreate(1, 2)
    assert rmgr_dbase.parse(0x20, struct.pack("<IiII", 1, 2, 3, 4)) == rmgr_dbase.DatabaseDrop(1, (3, 4))


def test_tblspc() -> None:
    created = rmgr_tblspc.parse(0x00, struct.pack("<I", 9) + b"/secret/path\0")
    assert created == rmgr_tblspc.TablespaceCreate(9, b"/secret/path")
    assert "secret" not in repr(created)
    assert rmgr_tblspc.parse(0x10, struct.pack("<I", 9)) == rmgr_tblspc.TablespaceDrop(9)


def test_relmap() -> None:
    content = struct.pack("<II", rmgr_relmap.RELMAP_FILE_MAGIC, 1).ljust(520, b"\0")
    content += struct.pack("<I", google_crc32c.value(content))
    update = rmgr_relmap.parse(0, struct.pack("<IIi", 5, 1663, 524) + content)
    assert update == rmgr_relmap.RelmapUpdate(5, 1663, content)
    for wrong in (content[:-1] + b"!", b"\0" + content[1:], content[:-4]):
        with pytest.raises(CorruptedError):
            rmgr_relmap.parse(0, struct.pack("<IIi", 5, 1663, len(wrong)) + wrong)


def test_standby() -> None:
    running = rmgr_standby.parse(0x10, struct.pack("<ii?3xIIIIII", 2, 1, True, 800, 790, 799, 790, 795, 796))
    assert running == rmgr_standby.RunningXacts(800, 790, 799, (790, 795), (796,), True)
    assert rmgr_standby.parse(0x00, struct.pack("<iIII", 1, 7, 5, 9)) == rmgr_standby.StandbyLocks(((7, 5, 9),))
    assert rmgr_standby.parse(0x20, b"messages") is None


def test_xlog() -> None:
    assert rmgr_xlog.parse(0x30, struct.pack("<I", 24576)) == rmgr_xlog.NextOid(24576)
    assert rmgr_xlog.parse(0x20, b"anything") is None
    assert rmgr_xlog.parse(0x40, b"") == rmgr_xlog.Switch()
    assert rmgr_xlog.parse(0x50, struct.pack("<Q", 99)) == rmgr_xlog.BackupEnd(99)
    assert rmgr_xlog.parse(0x60, struct.pack("<6i??2x", 1, 2, 3, 4, 5, 6, True, False)) == rmgr_xlog.ParameterChange(
        1, 2, 3, 4, 5, 6, True, False
    )
    assert rmgr_xlog.parse(0x70, struct.pack("<q64s", 5, b"name")) == rmgr_xlog.RestorePoint(5, b"name")
    assert rmgr_xlog.parse(0x80, b"\1") == rmgr_xlog.FullPageWritesChange(True)
    assert rmgr_xlog.parse(0x90, struct.pack("<qII", 5, 1, 1)) == rmgr_xlog.EndOfRecovery(5, 1, 1)
    assert rmgr_xlog.parse(0xA0, b"") == rmgr_xlog.PageImages(for_hint=True)
    assert rmgr_xlog.parse(0xB0, b"") == rmgr_xlog.PageImages(for_hint=False)
    assert rmgr_xlog.parse(0xD0, struct.pack("<Qq", 7, 5)) == rmgr_xlog.OverwriteContrecord(7, 5)
    for info, data in ((0x00, bytes(87)), (0x30, bytes(5)), (0x80, b"\2"), (0xC0, b""), (0xB0, b"x")):
        with pytest.raises(CorruptedError):
            rmgr_xlog.parse(info, data)


@pytest.mark.parametrize(
    ("parse", "info"),
    [
        (rmgr_smgr.parse, 0x30),
        (rmgr_clog.parse, 0x20),
        (rmgr_multixact.parse, 0x40),
        (rmgr_dbase.parse, 0x30),
        (rmgr_tblspc.parse, 0x20),
        (rmgr_relmap.parse, 0x10),
        (rmgr_standby.parse, 0x30),
        (rmgr_commit_ts.parse, 0x20),
        (rmgr_replorigin.parse, 0x20),
        (rmgr_logicalmsg.parse, 0x10),
    ],
)
def test_an_unknown_opcode_is_refused(parse: Callable[[int, bytes], object], info: int) -> None:
    with pytest.raises(CorruptedError, match="unknown opcode"):
        parse(info, bytes(64))


# ---- heap -----------------------------------------------------------------------------------------------------------


def _clears(rmgr_id: int, info: int, blocks: list[int], main: bytes) -> tuple[rmgr_heap.VisibilityClear, ...]:
    headers = b"".join(struct.pack("<BBHIIII", number, 0, 0, *REL, block) for number, block in enumerate(blocks))
    fragments = headers + bytes((255, len(main))) + main
    record = build_record(rmgr_id=rmgr_id, info=info, prev_lsn=1, fragments=fragments)
    found: tuple[Block, ...]
    found, main_start = parse_blocks(record)
    return rmgr_heap.visibility_clears(rmgr_id, info, found, record, main_start)


def _update(flags: int) -> bytes:
    return struct.pack("<IHBBIH", 700, 1, 0, flags, 0, 2)


@pytest.mark.parametrize(
    ("rmgr_id", "info", "blocks", "main", "expected"),
    [
        (RmgrId.HEAP, 0x00, [9], struct.pack("<HB", 1, 0x09), [(9, 3)]),
        (RmgrId.HEAP, 0x80, [9], struct.pack("<HB", 1, 0x08), []),
        (RmgrId.HEAP, 0x10, [9], struct.pack("<IHBB", 1, 2, 0, 1), [(9, 3)]),
        (RmgrId.HEAP, 0x10, [9], struct.pack("<IHBB", 1, 2, 1, 2), []),
        (RmgrId.HEAP, 0x60, [9], struct.pack("<IHBB", 1, 2, 0, 1), [(9, 2)]),
        (RmgrId.HEAP, 0x20, [9, 4], _update(0x13), [(4, 3), (9, 3)]),
        (RmgrId.HEAP, 0x20, [9, 4], _update(0x01), [(4, 3)]),
        (RmgrId.HEAP, 0xA0, [9, 4], _update(0x02), [(9, 3)]),
        (RmgrId.HEAP, 0x40, [9], _update(0x01), [(9, 3)]),
        (RmgrId.HEAP, 0x40, [9], _update(0x10), []),
        (RmgrId.HEAP2, 0x50, [9], struct.pack("<BxHH", 3, 1, 1), [(9, 3)]),
        (RmgrId.HEAP2, 0xD0, [9], struct.pack("<BxH", 2, 1), []),
        (RmgrId.HEAP2, 0x60, [9], struct.pack("<IHBB", 1, 2, 0, 1), [(9, 2)]),
        (RmgrId.HEAP2, 0x10, [9], b"\xff" * 9, []),
        (RmgrId.HEAP, 0x70, [9], b"\xff" * 2, []),
        (RmgrId.BTREE, 0x00, [9], b"\xff" * 9, []),
    ],
)
def test_visibility_map_bits_that_heap_records_clear(
    rmgr_id: int, info: int, blocks: list[int], main: bytes, expected: list[tuple[int, int]]
) -> None:
    assert [(clear.heap_block, clear.bits) for clear in _clears(rmgr_id, info, blocks, main)] == expected


def test_heap_records_without_what_redo_needs_are_refused() -> None:
    with pytest.raises(CorruptedError):
        _clears(RmgrId.HEAP, 0x20, [9], _update(1)[:-1])
    with pytest.raises(CorruptedError):
        _clears(RmgrId.HEAP, 0x00, [], struct.pack("<HB", 1, 1))


def test_positions_in_the_visibility_map() -> None:
    assert rmgr_heap.map_position(0) == (0, 24, 0)
    assert rmgr_heap.map_position(7) == (0, 25, 6)
    assert rmgr_heap.map_position(32671) == (0, 8191, 6)
    assert rmgr_heap.map_position(32672) == (1, 24, 0)


# ---- commit timestamps, replication origins, logical messages --------------------------------------------------------


def test_commit_timestamp_records() -> None:
    assert rmgr_commit_ts.parse(0x00, struct.pack("<i", 7)) == rmgr_commit_ts.CommitTsZeroPage(7)
    assert rmgr_commit_ts.parse(0x10, struct.pack("<iI", 7, 900)) == rmgr_commit_ts.CommitTsTruncate(7, 900)
    for info, data in ((0x00, bytes(5)), (0x10, bytes(7))):
        with pytest.raises(CorruptedError):
            rmgr_commit_ts.parse(info, data)


def test_replication_origin_records_and_their_file() -> None:
    forced = struct.pack("<QH?5x", 0x1234, 3, True)
    assert rmgr_replorigin.parse(0x00, forced) == rmgr_replorigin.ReplOriginSet(3, 0x1234, True)
    assert rmgr_replorigin.parse(0x10, struct.pack("<H", 3)) == rmgr_replorigin.ReplOriginDrop(3)
    content = rmgr_replorigin.checkpoint_file({3: 0x1234, 1: 1})
    assert content[:4] == (0x1257DADE).to_bytes(4, "little")
    assert len(content) == 4 + 2 * 16 + 4
    assert rmgr_replorigin.parse_checkpoint_file(content) == {3: 0x1234, 1: 1}
    for broken in (content[:-1], content[:10] + b"x" + content[11:], b"", b"\0" * 8):
        with pytest.raises(CorruptedError):
            rmgr_replorigin.parse_checkpoint_file(broken)


def test_logical_messages() -> None:
    data = struct.pack("<I?3xQQ", 5, True, 4, 3) + b"pre\0" + b"abc"
    assert rmgr_logicalmsg.parse(0x00, data) == rmgr_logicalmsg.LogicalMessage(5, True, b"pre", b"abc")
    for broken in (data[:-1], data + b"x", struct.pack("<I?3xQQ", 5, True, 3, 0) + b"pre",
                   struct.pack("<I?3xQQ", 5, True, 1 << 63, 0)):  # fmt: skip
        with pytest.raises(CorruptedError):
            rmgr_logicalmsg.parse(0x00, broken)
