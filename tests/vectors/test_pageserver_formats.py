"""Bytes of layer files, kept for ever: what was written once must stay readable. Never change a line of these."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from pageserver import native
from pageserver.index_part import IndexPart
from pageserver.layer import footer
from pageserver.layer.delta import DeltaBuilder, DeltaIndex, RunHeader, run_header_range
from pageserver.layer.footer import FOOTER_SIZE_BYTES, Footer
from pageserver.layer.image import ImageBuilder, ImageIndex
from pageserver.layer.name import LayerKind, covering_range
from pageserver.retention import HistoryPoint, Retention
from pageserver.value import Value
from shared.errors import CorruptedError
from shared.wal.rmgr_clog import XidStatus

DOCS = Path(__file__).parents[2] / "docs" / "formats"
A = bytes.fromhex("00 0000067f 00000005 00004000 00 00000001")
B = bytes.fromhex("01 0000067f 00000005 00004000 00 00000000")

DELTA = bytes.fromhex(
    # run of A: LSNs 0x1010, 0x1020; ends 3, 7; kinds WAL_INIT, IMAGE; payloads
    "1010000000000000 2010000000000000 03000000 07000000 02 00 6f6e65 70616765"
    # run of B: LSN 0x1018, end 0, TOMBSTONE
    "1810000000000000 00000000 04"
    # keys
    "000000067f00000005000040000000000001 010000067f00000005000040000000000000"
    # offsets, first LSNs, last LSNs
    "0000000000000000 2100000000000000 1010000000000000 1810000000000000 2010000000000000 1810000000000000"
    # counts, payload sizes, chain lengths
    "02000000 01000000 07000000 00000000 00000000 00000000"
    # footer: KLDL, 1, keys 2, values 3, index at 46, LSNs [0x1001, 0x1021)
    "4b4c444c 0100 0000 0200000000000000 0300000000000000 2e00000000000000"
    "0110000000000000 2110000000000000 0000000000000000"
)

IMAGE = bytes.fromhex(
    "76616c7565"  # "value"
    "000000067f00000005000040000000000001 010000067f00000005000040000000000000"
    "0500000000000000 0500000000000000"
    "4b4c494c 0100 0000 0200000000000000 0200000000000000 0500000000000000"
    "0010000000000000 0110000000000000 0000000000000000"
)


def test_delta_layer() -> None:
    builder = DeltaBuilder()
    builder.add_run(A, [0x1010, 2, b"one", 0x1020, 0, b"page"], 5)
    builder.add_run(B, [0x1018, 4, b""], 0)
    assert bytes(builder.finish(0x1001, 0x1021)[0]) == DELTA
    parsed = Footer.parse(DELTA[-FOOTER_SIZE_BYTES:], len(DELTA))
    assert parsed == Footer(LayerKind.DELTA, 2, 3, 46, 0x1001, 0x1021)
    index = DeltaIndex(parsed, DELTA[slice(*parsed.index_range(len(DELTA)))])
    entry = index.find(A)
    assert entry is not None
    header = RunHeader(entry, DELTA[slice(*run_header_range(entry))])
    chain: list[Value] = []
    selection = header.select(entry, 0x101F, -1)
    at = entry.payload_offset
    header.take(selection, DELTA[at + selection.payload_start : at + selection.payload_end], chain)
    assert chain == [(0x1010, 2, b"one")]


def test_image_layer() -> None:
    builder = ImageBuilder()
    builder.add(A, b"value")
    builder.add(B, b"")
    assert bytes(builder.finish(0x1000)[0]) == IMAGE
    parsed = Footer.parse(IMAGE[-FOOTER_SIZE_BYTES:], len(IMAGE))
    index = ImageIndex(parsed, IMAGE[slice(*parsed.index_range(len(IMAGE)))])
    assert (index.find(A), index.find(B)) == ((0, 5), (5, 5))


INDEX = (
    '{"format_version":2,"project_id":"prj-0123456789abcdef","timeline_id":"tl-0123456789abcdef","pg_version":16,'
    '"system_identifier":7,"initdb_lsn":"0/1000","disk_consistent_lsn":"0/2000","prev_record_lsn":"0/1FC0",'
    '"generation":5,"latest_gc_cutoff_lsn":"0/1800","retention":{"lsn_bytes":2048,"age_s":60},'
    '"history":[{"time_s":100,"lsn":"0/1000"},{"time_s":160,"lsn":"0/2000"}],'
    '"layers":[{"name":"delta-0000000000001001-0000000000002001-0000000000000004-0123456789abcdef","kind":"delta",'
    '"key_start":"000000067f00000005000040000000000001","key_end":"010000067f00000005000040000000000001",'
    '"lsn_start":"0/1001","lsn_end":"0/2001","size_bytes":300,"level":1,"envelope":"%s"}]}'
)


def test_index() -> None:
    golden = json.loads((Path(__file__).parent / "golden_v1.json").read_text())
    text = INDEX % base64.b64encode(bytes.fromhex(golden["envelope"])).decode("ascii")
    index = IndexPart.parse(text.encode())
    assert index.serialize() == text.encode()
    ((layer, _),) = index.layers
    assert (layer.level, layer.generation, layer.key_range) == (1, 4, covering_range(A, B))
    assert (index.generation, index.oldest_lsn, index.retention) == (5, 0x1800, Retention(2048, 60))
    assert index.history == (HistoryPoint(100, 0x1000), HistoryPoint(160, 0x2000))
    for before, after in (
        ('"format_version":2', '"format_version":1'),
        ('"generation":5', '"generation":3'),
        ('"latest_gc_cutoff_lsn":"0/1800"', '"latest_gc_cutoff_lsn":"0/2001"'),
        ('"time_s":160', '"time_s":60'),
        ('"level":1', '"level":2'),
        ('"age_s":60', '"age_s":-1'),
    ):
        with pytest.raises(CorruptedError):
            IndexPart.parse(text.replace(before, after).encode())


def test_native_changes() -> None:
    assert native.pack_clog_set([3, 32768 + 4], XidStatus.COMMITTED).hex() == "0101" + "01" + "0300" + "0400"
    assert native.pack_multixact_offset(5, 9)[1].hex() == "0102" + "0500" + "09000000"
    assert native.pack_multixact_members(7, [(0x2BC, 4)])[0][1].hex() == "0103" + "0700" + "04" + "bc020000"
    assert native.pack_vm_clear([(6, 3)]).hex() == "0104" + "0600" + "03"
    assert native.pack_vm_truncate(8).hex() == "0105" + "0800"


def test_the_footer_in_the_docs_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (.+) \|$", (DOCS / "delta-layer.md").read_text(), re.MULTILINE)
    in_code = re.findall(r"^    (\d+) +\| (\d+) +\| (.+)$", footer.__doc__ or "", re.MULTILINE)
    assert rows == in_code
    assert sum(int(size) for _, size, _ in rows) == FOOTER_SIZE_BYTES
    offset = 0
    for start, size, _ in rows:
        assert int(start) == offset
        offset += int(size)
