"""Ingest takes shortcuts for the records that most of a log is made of: they come to what the long way comes to."""

from __future__ import annotations

import struct
from unittest import mock

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pageserver import ingest
from pageserver.ingest import WalIngest
from pageserver.ingest_state import KeyedValue
from shared.errors import KeylakeError
from shared.wal.rmgr import RmgrId
from shared.wal.rmgr_smgr import TruncateFlag
from shared.wal.writer import build_record
from tests.unit.test_ingest_state import END, new_tip

PLAIN = [RmgrId.HEAP, RmgrId.HEAP2, RmgrId.BTREE, RmgrId.GIN, RmgrId.SEQ, RmgrId.GENERIC]


@st.composite
def single_blocks(draw: st.DrawFn) -> bytes:
    """One block without an image, mostly well-formed."""
    data, main = draw(st.binary(max_size=12)), draw(st.binary(max_size=16))
    fork = draw(st.integers(0, 4)) | (0x20 if data else 0) | draw(st.sampled_from([0, 0, 0x40, 0x20]))
    length = len(data) + draw(st.sampled_from([0, 0, 0, 1]))
    head = struct.pack("<BBHIIII", draw(st.sampled_from([0, 0, 0, 1])), fork, length, 1663, 5, 16384,
                       draw(st.sampled_from([0, 1, 5, 40_000])))  # fmt: skip
    body = head + bytes((draw(st.sampled_from([255, 255, 255, 253])), len(main))) + data + main
    return build_record(
        rmgr_id=draw(st.sampled_from(PLAIN)), info=draw(st.integers(0, 15)) << 4, prev_lsn=1,
        xid=draw(st.sampled_from([0, 10_000, 10_300])), fragments=body,
    )  # fmt: skip


@st.composite
def commits(draw: st.DrawFn) -> bytes:
    main = draw(st.one_of(st.binary(min_size=8, max_size=8), st.binary(max_size=12)))
    info = draw(st.sampled_from([0, 0, 0, 0x20, 0x80, 0x60]))
    body = bytes((draw(st.sampled_from([255, 255, 254])), draw(st.sampled_from([len(main), 8])))) + main
    xid = draw(st.sampled_from([0, 3, 10_000, 40_000]))
    return build_record(rmgr_id=RmgrId.XACT, info=info, prev_lsn=1, xid=xid, fragments=body)


def outcome(records: list[bytes], *, tracking: bool) -> tuple[list[KeyedValue], object, object] | str:
    tip = new_tip(track_commit_timestamp=tracking)
    tip.rel_sizes[(1663, 5, 16384), 0] = 3
    tip.rel_sizes[(1663, 5, 16384), 2] = 1
    try:
        done = WalIngest(tip).ingest(
            [(END + 1000 * n, END + 1000 * (n + 1), record) for n, record in enumerate(records)]
        )
    except KeylakeError as error:
        return type(error).__name__
    # A shortcut may tell the map's change before the block's: they are of different keys.
    return sorted(done.values), tip.checkpoint, tip.rel_sizes


BARE_COMMIT = build_record(rmgr_id=RmgrId.XACT, info=0, prev_lsn=1, xid=10_000, fragments=bytes((255, 8)) + b"the time")


def record(rmgr_id: RmgrId, info: int, fragments: bytes) -> bytes:
    return build_record(rmgr_id=rmgr_id, info=info, prev_lsn=1, xid=10_000, fragments=fragments)


REL = struct.pack("<III", 1663, 5, 16384)
CHANGE = record(RmgrId.BTREE, 0, struct.pack("<BBH12sIBB", 0, 0, 0, REL, 1, 255, 2) + b"to")
TRUNCATE = record(RmgrId.SMGR, 0x20, bytes((255, 20)) + struct.pack("<I12sI", 1, REL, TruncateFlag.HEAP))
DROP = record(RmgrId.XACT, 0x80, bytes((255, 28)) + b"the time" + struct.pack("<II12s", 0x04, 1, REL))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(single_blocks(), commits()), max_size=2), st.booleans())
@example([CHANGE, TRUNCATE, CHANGE], False)  # a block that is known goes away, and comes back as a new one
@example([CHANGE, DROP, CHANGE], False)
def test_shortcuts_change_nothing(records: list[bytes], tracking: bool) -> None:
    records = [BARE_COMMIT, *records]
    short = outcome(records, tracking=tracking)
    with mock.patch.object(ingest, "SINGLE_END", 1 << 30), mock.patch.object(ingest, "_BARE_COMMIT", b""):
        long = outcome(records, tracking=tracking)
    assert short == long
