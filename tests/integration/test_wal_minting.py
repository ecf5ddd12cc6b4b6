"""shared/wal against a real PostgreSQL 16: it starts where we say that its log ends."""

from __future__ import annotations

import dataclasses
import re
import shutil
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.lsn import WAL_BLOCK_SIZE_BYTES, WAL_SEGMENT_SIZE_BYTES, Lsn
from shared.wal.control import ControlFile, DbState
from shared.wal.page import format_lsn, record_start
from shared.wal.reader import RawRecord, WalStreamDecoder, find_end_of_wal
from shared.wal.record import parse_record
from shared.wal.writer import mint_shutdown_checkpoint
from tests.fixtures.wal import WalBuilder
from tests.fixtures.wal_cluster import Cluster, make_workload_cluster, scratch_directory

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with scratch_directory() as path:
        yield path


@pytest.fixture(scope="module")
def stopped(scratch: Path) -> Cluster:
    return make_workload_cluster(scratch / "base")


@pytest.fixture(scope="module")
def records(stopped: Cluster) -> list[RawRecord]:
    identifier = ControlFile.parse(stopped.control()).system_identifier
    decoder = WalStreamDecoder(stopped.first_lsn(), system_identifier=identifier, synchronise=True)
    return stopped.decode(decoder)


def _replication_stream(cluster: Cluster, start_lsn: int, end_lsn: int) -> Iterator[tuple[int, bytes]]:
    """(lsn, data) as a walsender of a running cluster sends them, up to `end_lsn`."""

    def read_exactly(size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = link.recv(size - len(data))
            assert piece, "walsender hung up"
            data += piece
        return data

    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(60)
        link.connect(str(cluster.root / ".s.PGSQL.5432"))
        startup = struct.pack("!I", 0x30000) + b"user\0postgres\0replication\0true\0\0"
        link.sendall(struct.pack("!I", len(startup) + 4) + startup)
        while True:
            kind, length = struct.unpack("!cI", read_exactly(5))
            message = read_exactly(length - 4)
            assert kind != b"E", message
            if kind == b"Z":
                query = f"START_REPLICATION PHYSICAL {format_lsn(start_lsn)} TIMELINE 1".encode() + b"\0"
                link.sendall(b"Q" + struct.pack("!I", len(query) + 4) + query)
            elif kind == b"d" and message[:1] == b"w":
                (lsn,) = struct.unpack_from("!Q", message, 1)
                yield lsn, message[25:]
                if lsn + len(message) - 25 >= end_lsn:
                    return


PAGE = WAL_BLOCK_SIZE_BYTES
SEGMENT = WAL_SEGMENT_SIZE_BYTES
POSITIONS = {
    "where the log ends": None,
    "page start": (PAGE, 0),
    "header split by a page": (PAGE, 8),
    "header ends a page": (PAGE, 24),
    "body split by a page": (PAGE, 64),
    "two bytes on the next page": (PAGE, 112),
    "fills its page": (PAGE, 120),
    "after a switch": (0, 0),
    "segment start": (SEGMENT, 0),
    "split by a segment": (SEGMENT, 40),
    "fills its segment": (SEGMENT, 120),
}
"""`end_lsn` of the old log: so many bytes before a page or segment ends, or just behind an XLOG_SWITCH."""


@pytest.mark.parametrize("name", POSITIONS)
def test_postgres_starts_on_a_minted_checkpoint(
    stopped: Cluster, records: list[RawRecord], scratch: Path, name: str
) -> None:
    control = ControlFile.parse(stopped.control())
    log = WalBuilder(records[-1][1], prev_lsn=records[-1][0], system_identifier=control.system_identifier)
    if (position := POSITIONS[name]) is not None:
        unit, before = position
        if unit != PAGE:
            log.switch()
        if unit == SEGMENT:
            log.append_noop(SEGMENT - 3 * PAGE)
        if unit:
            log.fill_to(-(-(log.end_lsn + PAGE) // unit) * unit - before)
    end_lsn, last_record_start = log.end_lsn, log.prev_lsn

    cluster = stopped.copy_to(scratch / re.sub(r"\W", "-", name))
    shutil.rmtree(cluster.data / "pg_wal")
    (cluster.data / "pg_wal" / "archive_status").mkdir(parents=True)
    point = dataclasses.replace(control.checkpoint, time_s=1_700_000_000, next_oid=control.checkpoint.next_oid + 1000)
    # As if it had been running: nothing but the minted state may count.
    stale = dataclasses.replace(control, state=DbState.IN_PRODUCTION, checkpoint_lsn=4711).serialize()
    minted = mint_shutdown_checkpoint(stale, point, last_record_start, end_lsn)
    (cluster.data / "global" / "pg_control").write_bytes(minted.control)
    for segment, content in minted.segments.items():
        (cluster.data / "pg_wal" / segment).write_bytes(content)

    with cluster.running():
        started = cluster.log.read_text()
        assert "database system was shut down at 2023-11-14" in started
        assert not re.search(r"redo|recover|invalid|PANIC|FATAL|WARNING", started), started
        assert cluster.sql("select count(*), max(a) from built;").split() == ["9000|9000"]
        cluster.sql("create table after (a int primary key); insert into after select generate_series(1, 3000);")
        flushed = Lsn.parse(cluster.sql("select pg_current_wal_flush_lsn();").strip()).value
        # The safekeepers' view: the old log, then whatever the walsender sends from its end on.
        decoder = WalStreamDecoder(
            end_lsn, last_record_start=last_record_start, system_identifier=control.system_identifier
        )
        streamed = bytearray()
        seen: list[RawRecord] = []
        for lsn, data in _replication_stream(cluster, end_lsn, flushed):
            streamed += data
            seen += decoder.feed(lsn, data)
    assert seen[0][:2] == (minted.checkpoint_lsn, minted.end_lsn)
    assert streamed.startswith(minted.streamed)
    assert parse_record(seen[0][2]).header.prev_lsn == last_record_start
    assert len(seen) > 3000
    assert parse_record(seen[1][2]).header.prev_lsn == minted.checkpoint_lsn

    # The whole history, old log and new, is one chain.
    decoder = WalStreamDecoder(log.start_lsn, last_record_start=records[-1][0])
    same = decoder.feed(log.start_lsn, bytes(log.data)) == log.records
    assert same
    same = cluster.decode(decoder)[: len(seen)] == seen
    assert same
    cluster.start()
    assert cluster.sql("select count(*) from after;").strip() == "3000"
    cluster.stop()
    shutil.rmtree(cluster.root)


def test_the_end_of_wal_is_where_crash_recovery_ends(stopped: Cluster, scratch: Path) -> None:
    cluster = stopped.copy_to(scratch / "crash")
    with cluster.running():
        cluster.sql("checkpoint;")
        start = ControlFile.parse(cluster.control()).checkpoint.redo
        cluster.sql("insert into t select generate_series(30000, 39000);")
        cluster.stop("immediate")
    found = find_end_of_wal(cluster.read_wal, start)
    assert found.last_record_start is not None
    cluster.log.unlink()
    cluster.start()
    recovered = cluster.log.read_text()
    cluster.stop("immediate")
    assert f"redo done at {format_lsn(found.last_record_start)} " in recovered
    # Recovery appended the checkpoint that we would have minted.
    assert ControlFile.parse(cluster.control()).checkpoint_lsn == record_start(found.end_lsn)

    # A torn log ends at the last record that is whole.
    decoder = WalStreamDecoder(start)
    whole = cluster.decode(decoder)
    for _, end_lsn, _ in whole[1 : -1 : len(whole) // 20]:
        previous = max(raw for raw in whole if raw[1] < end_lsn)
        cut = end_lsn - 8

        def read_torn(lsn: int, size_bytes: int, cut: int = cut) -> bytes:
            return cluster.read_wal(lsn, min(size_bytes, cut - lsn)) if lsn < cut else b""

        end = find_end_of_wal(read_torn, start)
        assert (end.last_record_start, end.end_lsn) == previous[:2]
    shutil.rmtree(cluster.root)
