"""shared/wal against a real PostgreSQL 16: what we read is what pg_waldump and pg_controldata read."""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.lsn import WAL_SEGMENT_SIZE_BYTES, Lsn
from shared.wal import (
    rmgr_clog,
    rmgr_dbase,
    rmgr_heap,
    rmgr_multixact,
    rmgr_relmap,
    rmgr_smgr,
    rmgr_standby,
    rmgr_tblspc,
    rmgr_xact,
    rmgr_xlog,
)
from shared.wal.control import ControlFile, DbState
from shared.wal.image import restore_image, with_page_lsn
from shared.wal.page import format_lsn, record_start, segment_file_name
from shared.wal.reader import RawRecord, WalStreamDecoder
from shared.wal.record import ImageFlag, parse_blocks, parse_record
from shared.wal.rmgr import RMGR_NAMES, RmgrId
from tests.fixtures.wal_cluster import Cluster, make_workload_cluster, scratch_directory

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

EXPECTED = {
    *("XlogCheckpoint", "NextOid", "Switch", "BackupEnd", "RestorePoint", "PageImages", "RelmapUpdate"),
    *("XactEnd", "XactPrepare", "COMMIT", "ABORT", "COMMIT_PREPARED", "ABORT_PREPARED", "rels", "subxacts"),
    *("SmgrCreate", "SmgrTruncate", "DatabaseFileCopy", "DatabaseCreate", "DatabaseDrop", "MultixactCreate"),
    *("TablespaceCreate", "TablespaceDrop", "RunningXacts", "StandbyLocks", "VisibilityClear"),
}
"""What the workload must have made the parsers see."""


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with scratch_directory() as path:
        yield path


@pytest.fixture(scope="module")
def stopped(scratch: Path) -> Cluster:
    return make_workload_cluster(scratch / "base")


@pytest.fixture(scope="module")
def first_lsn(stopped: Cluster) -> int:
    return stopped.first_lsn()


@pytest.fixture(scope="module")
def records(stopped: Cluster, first_lsn: int) -> list[RawRecord]:
    identifier = ControlFile.parse(stopped.control()).system_identifier
    decoder = WalStreamDecoder(first_lsn, system_identifier=identifier, synchronise=True)
    return stopped.decode(decoder)


_LINE = re.compile(
    r"^rmgr: (\S+) +len \(rec/tot\): +\d+/ *(\d+), tx: +(\d+), lsn: ([0-9A-F/]+), prev ([0-9A-F/]+), desc: (.*)$"
)
_BLOCK = re.compile(
    r"^\tblkref #(\d+): rel (\d+)/(\d+)/(\d+) fork (\w+) blk (\d+)"
    r"(?: \(FPW(?P<verify> for WAL verification)?\); hole: offset: (\d+), length: (\d+)(?P<compressed>,.*)?)?$"
)
_FORKS = ("main", "fsm", "vm", "init")


def _waldump(cluster: Cluster, start: int, end: int) -> list[tuple[object, ...]]:
    """What pg_waldump says, in the shape of `_described`; the last element is its description."""
    text = cluster.run(
        "pg_waldump", "-b", "-p", str(cluster.data / "pg_wal"), "-s", format_lsn(start), "-e", format_lsn(end)
    )
    found: list[tuple[object, ...]] = []
    blocks: list[tuple[object, ...]] = []
    for line in text.splitlines():
        if match := _LINE.match(line):
            rmgr, total, xid, lsn, prev, description = match.groups()
            blocks = []
            found.append((Lsn.parse(lsn).value, rmgr, int(total), int(xid), Lsn.parse(prev).value, blocks, description))
        elif match := _BLOCK.match(line):
            number, spc, db, rel, fork, block, _, hole_offset, hole_length, _ = match.groups()
            image = None
            if hole_offset is not None:
                image = (match["verify"] is None, match["compressed"] is not None, int(hole_offset), int(hole_length))
            blocks.append((int(number), (int(spc), int(db), int(rel)), _FORKS.index(fork), int(block), image))
        else:
            assert not line.strip() or line.startswith("pg_waldump:"), line[:200]
    return found


def _described(raw: RawRecord) -> tuple[object, ...]:
    record = parse_record(raw[2])
    blocks = []
    for block in record.blocks:
        image = None
        if block.image is not None:
            compressed = block.image.flags & (ImageFlag.PGLZ | ImageFlag.LZ4 | ImageFlag.ZSTD) != 0
            image = (block.image.is_applied, compressed, block.image.hole_offset, block.image.hole_length)
        blocks.append((block.block_id, block.rel, block.fork, block.block_number, image))
    header = record.header
    name = RMGR_NAMES[RmgrId(header.rmgr_id)]
    return raw[0], name, header.total_length_bytes, header.xid, header.prev_lsn, blocks


def test_every_record_is_as_pg_waldump_sees_it(stopped: Cluster, records: list[RawRecord]) -> None:
    theirs = _waldump(stopped, records[0][0], records[-1][1])
    assert len(theirs) == len(records)
    for line, raw in zip(theirs, records, strict=True):
        assert line[:-1] == _described(raw)
    assert {line[1] for line in theirs} >= set(RMGR_NAMES.values()) - {"CommitTs", "ReplicationOrigin", "Generic"} - {
        "CLOG"  # only every 32768 transactions
    }


def test_the_log_is_seamless_and_ends_at_the_shutdown_checkpoint(stopped: Cluster, records: list[RawRecord]) -> None:
    for (_, end, _), (start, _, _) in itertools.pairwise(records):
        assert start == record_start(end)
    assert records[-1][0] == ControlFile.parse(stopped.control()).checkpoint_lsn
    assert any(len(record) > 1_000_000 for _, _, record in records), "the workload lost its long record"
    assert any(end % WAL_SEGMENT_SIZE_BYTES == 0 for _, end, _ in records), "the workload lost its switch"


@pytest.mark.parametrize(
    "chunk_sizes", [(8192,), (1 << 24,), (1, 40, 3, 8191, 24, 131072, 7), (99_991,), (17, 500_009, 5, 2, 8192)]
)
def test_chunk_sizes_do_not_matter(
    stopped: Cluster, first_lsn: int, records: list[RawRecord], chunk_sizes: tuple[int, ...]
) -> None:
    # Not `assert decoded == records`: pytest would work for minutes on explaining a difference.
    same = stopped.decode(WalStreamDecoder(first_lsn, synchronise=True), chunk_sizes) == records
    assert same
    index = chunk_sizes[0] % (len(records) - 100)
    end = records[index][1]
    decoder = WalStreamDecoder(end, last_record_start=records[index][0])
    same = stopped.decode(decoder, chunk_sizes) == records[index + 1 :]
    assert same
    # From the middle of anything: the first record that starts behind the next page header.
    decoder = WalStreamDecoder(end + 5, synchronise=True)
    later = stopped.decode(decoder, chunk_sizes)
    assert later
    same = later == records[-len(later) :]
    assert same


def test_single_block_fast_path_agrees_with_the_whole_parse(records: list[RawRecord]) -> None:
    for _, _, record in records:
        parsed = parse_record(record)
        blocks, main_start = parse_blocks(record)
        assert blocks == parsed.blocks
        assert record[main_start:] == parsed.main_data


def test_special_records_say_what_pg_waldump_says(stopped: Cluster, records: list[RawRecord]) -> None:
    theirs = _waldump(stopped, records[0][0], records[-1][1])
    seen: set[str] = set()
    for (_, _, raw), line in zip(records, theirs, strict=True):
        record = parse_record(raw)
        info, data, text = record.header.info, record.main_data, str(line[-1])
        value: object = None
        match record.header.rmgr_id:
            case RmgrId.XLOG:
                value = rmgr_xlog.parse(info, data)
                if isinstance(value, rmgr_xlog.XlogCheckpoint):
                    point = value.checkpoint
                    assert f"redo {format_lsn(point.redo)}; tli 1; prev tli 1; fpw " in text
                    assert f"xid 0:{point.next_xid}; oid {point.next_oid}; multi {point.next_multi};" in text
                    assert f"oldest xid {point.oldest_xid} in DB {point.oldest_xid_database}" in text
                    assert f"oldest running xid {point.oldest_active_xid};" in text
                elif isinstance(value, rmgr_xlog.NextOid):
                    assert text == f"NEXTOID {value.next_oid}"
                elif isinstance(value, rmgr_xlog.RestorePoint):
                    assert value.name == b"here"
                elif isinstance(value, rmgr_xlog.BackupEnd):
                    assert text == f"BACKUP_END {format_lsn(value.start_lsn)}"
            case RmgrId.XACT:
                value = rmgr_xact.parse(info, record.header.xid, data)
                if isinstance(value, rmgr_xact.XactEnd):
                    verb = ("COMMIT" if value.committed else "ABORT") + ("_PREPARED" if value.was_prepared else "")
                    assert text.startswith(f"{verb} ")
                    dropped = re.findall(
                        r"(?:base|global)/(?:(\d+)/)?(\d+)", text.partition("rels:")[2].partition(";")[0]
                    )
                    assert [(str(db), str(rel)) for _, db, rel in value.dropped_rels] == dropped
                    subxids = re.search(r"subxacts: ([\d ]+)", text)
                    assert list(value.subxids) == ([int(x) for x in subxids[1].split()] if subxids else [])
                    seen.update(("rels",) if dropped else (), ("subxacts",) if subxids else ())
                    seen.add(verb)
                elif isinstance(value, rmgr_xact.XactPrepare):
                    assert text.startswith(f"PREPARE gid {value.gid.decode()}: ")
            case RmgrId.SMGR:
                value = rmgr_smgr.parse(info, data)
                spc, db, rel = value.rel
                path = f"base/{db}/{rel}" if spc == 1663 else f"global/{rel}"
                if isinstance(value, rmgr_smgr.SmgrCreate):
                    assert text == f"CREATE {path}{('', '_fsm', '_vm', '_init')[value.fork]}"
                else:
                    assert text == f"TRUNCATE {path} to {value.block_count} blocks flags {int(value.flags)}"
            case RmgrId.DBASE:
                value = rmgr_dbase.parse(info, data)
            case RmgrId.TBLSPC:
                value = rmgr_tblspc.parse(info, data)
            case RmgrId.MULTIXACT:
                value = rmgr_multixact.parse(info, data)
                if isinstance(value, rmgr_multixact.MultixactCreate):
                    assert f"CREATE_ID {value.multixact_id} offset {value.members_offset} nmembers 2:" in text
                    assert all(f"{xid} (sh)" in text for xid, _ in value.members)
            case RmgrId.RELMAP:
                value = rmgr_relmap.parse(info, data)
                assert f"database {value.database} tablespace {value.tablespace} size 524" in text
            case RmgrId.STANDBY:
                value = rmgr_standby.parse(info, data)
                if isinstance(value, rmgr_standby.RunningXacts):
                    assert f"nextXid {value.next_xid} latestCompletedXid {value.latest_completed_xid}" in text
                    assert f"oldestRunningXid {value.oldest_running_xid}" in text
            case RmgrId.CLOG:
                value = rmgr_clog.parse(info, data)
            case RmgrId.HEAP | RmgrId.HEAP2 as rmgr_id:
                main_start = len(raw) - len(data)
                clears = rmgr_heap.visibility_clears(rmgr_id, info, record.blocks, raw, main_start)
                flags = re.search(r"(?:flags: |old_infobits: \[[^\]]*\], flags: )0x([0-9A-F]+)", text)
                if clears:
                    value = clears[0]
                    assert flags is not None
                    assert int(flags[1], 16) & 3
                elif text.startswith(("INSERT", "DELETE", "MULTI_INSERT", "LOCK", "LOCK_UPDATED")):
                    assert flags is not None
                    assert not int(flags[1], 16) & 1, text
        if value is not None:
            seen.add(type(value).__name__)
    assert seen >= EXPECTED


@pytest.mark.parametrize("index", ["built_plain", "built_pglz"])
def test_restored_images_are_the_pages(stopped: Cluster, records: list[RawRecord], index: str) -> None:
    path = stopped.paths[index]
    content = (stopped.data / path).read_bytes()
    pages: dict[int, bytes] = {}
    compressed = 0
    for _, end_lsn, record in records:
        for block in parse_blocks(record).blocks:
            if block.image is None:
                continue
            page = restore_image(record, block.image)
            assert len(page) == 8192
            if f"base/{block.rel[1]}/{block.rel[2]}" == path and block.fork == 0:
                pages[block.block_number] = with_page_lsn(page, end_lsn)
                compressed += bool(block.image.flags & ImageFlag.PGLZ)
    assert len(content) // 8192 > 20
    assert (compressed > 20) is (index == "built_pglz")
    assert sorted(pages) == list(range(len(content) // 8192))
    different = [number for number, page in pages.items() if page != _without_hole(content, number)]
    assert not different


def _without_hole(content: bytes, number: int) -> bytes:
    """A page as redo leaves it: the server may have left old bytes in the hole, which images do not carry."""
    page = content[number * 8192 : (number + 1) * 8192]
    lower, upper = struct.unpack_from("<HH", page, 12)
    return page[:lower] + bytes(upper - lower) + page[upper:]


# ---- pg_control -----------------------------------------------------------------------------------------------------


def test_control_file_is_as_pg_controldata_sees_it(stopped: Cluster) -> None:
    content = stopped.control()
    control = ControlFile.parse(content)
    assert control.serialize() == content
    lines = stopped.run("pg_controldata", "-D", str(stopped.data)).splitlines()
    shown = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    point = control.checkpoint
    expected = {
        "pg_control version number": control.control_version,
        "Catalog version number": control.catalog_version,
        "Database system identifier": control.system_identifier,
        "Latest checkpoint location": format_lsn(control.checkpoint_lsn),
        "Latest checkpoint's REDO location": format_lsn(point.redo),
        "Latest checkpoint's REDO WAL file": segment_file_name(point.redo),
        "Latest checkpoint's TimeLineID": point.this_timeline,
        "Latest checkpoint's PrevTimeLineID": point.prev_timeline,
        "Latest checkpoint's full_page_writes": "on" if point.full_page_writes else "off",
        "Latest checkpoint's NextXID": f"{point.next_xid >> 32}:{point.next_xid & 0xFFFFFFFF}",
        "Latest checkpoint's NextOID": point.next_oid,
        "Latest checkpoint's NextMultiXactId": point.next_multi,
        "Latest checkpoint's NextMultiOffset": point.next_multi_offset,
        "Latest checkpoint's oldestXID": point.oldest_xid,
        "Latest checkpoint's oldestXID's DB": point.oldest_xid_database,
        "Latest checkpoint's oldestActiveXID": point.oldest_active_xid,
        "Latest checkpoint's oldestMultiXid": point.oldest_multi,
        "Latest checkpoint's oldestMulti's DB": point.oldest_multi_database,
        "Latest checkpoint's oldestCommitTsXid": point.oldest_commit_ts_xid,
        "Latest checkpoint's newestCommitTsXid": point.newest_commit_ts_xid,
        "Fake LSN counter for unlogged rels": format_lsn(control.unlogged_lsn),
        "Minimum recovery ending location": format_lsn(control.min_recovery_lsn),
        "Min recovery ending loc's timeline": control.min_recovery_timeline,
        "Backup start location": format_lsn(control.backup_start_lsn),
        "Backup end location": format_lsn(control.backup_end_lsn),
        "End-of-backup record required": "yes" if control.backup_end_required else "no",
        "wal_level setting": "replica",
        "wal_log_hints setting": "on" if control.wal_log_hints else "off",
        "max_connections setting": control.max_connections,
        "max_worker_processes setting": control.max_worker_processes,
        "max_wal_senders setting": control.max_wal_senders,
        "max_prepared_xacts setting": control.max_prepared_transactions,
        "max_locks_per_xact setting": control.max_locks_per_transaction,
        "track_commit_timestamp setting": "on" if control.track_commit_timestamp else "off",
        "Maximum data alignment": control.max_align,
        "Database block size": control.block_size_bytes,
        "Blocks per segment of large relation": control.relation_segment_blocks,
        "WAL block size": control.wal_block_size_bytes,
        "Bytes per WAL segment": control.wal_segment_size_bytes,
        "Maximum length of identifiers": control.name_data_length,
        "Maximum columns in an index": control.index_max_keys,
        "Maximum size of a TOAST chunk": control.toast_max_chunk_size_bytes,
        "Size of a large-object chunk": control.large_object_chunk_size_bytes,
        "Float8 argument passing": "by value" if control.float8_by_value else "by reference",
        "Data page checksum version": control.data_checksum_version,
        "Mock authentication nonce": control.mock_authentication_nonce.hex(),
    }
    assert {key: str(value) for key, value in expected.items()} == {key: shown[key] for key in expected}
    assert shown["Database cluster state"] == "shut down"
    assert control.state is DbState.SHUTDOWNED
