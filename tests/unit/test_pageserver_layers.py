"""In-memory, delta and image layers and the layer map, without keys or I/O."""

from __future__ import annotations

import secrets

import pytest

from pageserver.layer.delta import DeltaBuilder, DeltaIndex, RunHeader, run_header_range
from pageserver.layer.footer import FOOTER_SIZE_BYTES, Footer
from pageserver.layer.image import ImageBuilder, ImageIndex
from pageserver.layer.in_memory import LONG_RUN_VALUES, InMemoryLayer, tail_length
from pageserver.layer.layer_map import LayerMap
from pageserver.layer.name import (
    LayerDescriptor,
    LayerKind,
    covering_range,
    layer_name,
    parse_generation,
    parse_layer_name,
)
from pageserver.value import Value
from shared.errors import CorruptedError
from shared.keyspace import REL_SIZE, KeyRange, field1_range
from tests.fixtures.pageserver import IMAGE, REL, TOMBSTONE, WAL, WAL_INIT

A, B, C = (REL.block_key(block) for block in (1, 2, 3))


def layer_with(*values: tuple[bytes, int, int, bytes]) -> InMemoryLayer:
    layer = InMemoryLayer(100)
    layer.put_all(values)
    return layer


# --- in memory ---


def test_gather_walks_down_to_a_chain_start() -> None:
    layer = layer_with((A, 101, WAL, b"0"), (A, 110, WAL_INIT, b"1"), (A, 120, WAL, b"2"), (A, 130, WAL, b"3"))
    chain: list[Value] = []
    assert layer.gather(A, 129, -1, chain)
    assert chain == [(120, WAL, b"2"), (110, WAL_INIT, b"1")]


def test_gather_stops_at_the_floor_and_before_the_first_value() -> None:
    layer = layer_with((A, 110, WAL, b"1"), (A, 120, WAL, b"2"))
    chain: list[Value] = []
    assert not layer.gather(A, 200, 110, chain)
    assert chain == [(120, WAL, b"2")]
    nothing: list[Value] = []
    assert not layer.gather(A, 109, -1, nothing)
    assert not layer.gather(B, 200, -1, nothing)
    assert nothing == []


def test_gather_finds_any_version_of_a_long_run() -> None:
    layer = layer_with(*((A, 100 + 10 * n, IMAGE, str(n).encode()) for n in range(1, 500)))
    for lsn in (110, 111, 119, 120, 2505, 5090, 9999):
        chain: list[Value] = []
        assert layer.gather(A, lsn, -1, chain)
        assert chain[0][2] == str(min(499, (lsn - 100) // 10)).encode()


def test_an_inserted_image_shortens_reads_above_it_only() -> None:
    layer = layer_with(*((A, 100 + n, WAL, b"%d" % n) for n in range(1, 10)))
    layer.insert_image(A, 105, b"page")
    above: list[Value] = []
    assert layer.gather(A, 107, -1, above)
    assert above == [(107, WAL, b"7"), (106, WAL, b"6"), (105, IMAGE, b"page")]
    below: list[Value] = []
    assert not layer.gather(A, 104, -1, below)
    assert len(below) == 4


def test_long_runs_are_reported_and_sizes_counted() -> None:
    layer = InMemoryLayer(0)
    for lsn in range(1, LONG_RUN_VALUES + 1):
        assert layer.long_runs == []
        layer.put(A, lsn, WAL, b"x" * 10)
    assert layer.long_runs == [A]
    assert layer.value_count == LONG_RUN_VALUES
    assert layer.key_count == 1
    assert layer.size_bytes >= LONG_RUN_VALUES * 10


def test_a_frozen_layer_takes_nothing_and_a_cleared_one_has_nothing() -> None:
    layer = layer_with((A, 110, WAL, b"1"))
    layer.freeze(111)
    with pytest.raises(RuntimeError):
        layer.put(A, 112, WAL, b"")
    layer.clear()
    chain: list[Value] = []
    assert not layer.gather(A, 200, -1, chain)
    assert chain == []
    assert layer.size_bytes == 0


def test_dismantling_frees_everything_step_by_step() -> None:
    layer = layer_with(*((A, 100 + n, WAL, b"x") for n in range(10_000)), *((B, 100 + n, WAL, b"y") for n in range(10)))
    steps = sum(1 for _ in layer.dismantle())
    assert 2 <= steps <= 4
    assert (layer.key_count, layer.size_bytes) == (0, 0)


def test_keys_in_range() -> None:
    size = REL.size_key()
    layer = layer_with((C, 101, WAL, b""), (size, 102, IMAGE, b""), (A, 103, WAL, b""))
    assert layer.keys_in(field1_range(REL_SIZE)) == [size]
    assert sorted(layer.keys_in(KeyRange(A, C))) == [A]


def test_tail_length() -> None:
    assert tail_length([1, WAL, b"", 2, WAL, b""]) == (2, False)
    assert tail_length([1, WAL, b"", 2, TOMBSTONE, b"", 3, WAL, b""]) == (1, True)
    assert tail_length([1, IMAGE, b""]) == (0, True)


# --- delta ---


def build(*runs: tuple[bytes, list[object], int, bytes | None]) -> tuple[bytes, DeltaIndex]:
    builder = DeltaBuilder()
    for key, run, before, image in runs:
        builder.add_run(key, run, before, image)
    plaintext, index = builder.finish(100, 1000)
    return bytes(plaintext), index


def read(plaintext: bytes, index: DeltaIndex, key: bytes, lsn: int, floor: int = -1) -> tuple[list[Value], bool]:
    entry = index.find(key)
    assert entry is not None
    start, end = run_header_range(entry)
    header = RunHeader(entry, plaintext[start:end])
    selection = header.select(entry, lsn, floor)
    at = entry.payload_offset
    chain: list[Value] = []
    header.take(selection, plaintext[at + selection.payload_start : at + selection.payload_end], chain)
    return chain, selection.complete


def test_delta_layer_gives_back_what_went_in() -> None:
    run: list[object] = [101, WAL, b"one", 105, WAL_INIT, b"", 109, WAL, b"three", 111, WAL, b"f"]
    plaintext, built = build((A, run, 0, None), (C, [120, IMAGE, b"page"], 0, None))
    size = len(plaintext)
    footer = Footer.parse(plaintext[-FOOTER_SIZE_BYTES:], size)
    start, end = footer.index_range(size)
    for index in (built, DeltaIndex(footer, plaintext[start:end])):
        assert read(plaintext, index, A, 110) == ([(109, WAL, b"three"), (105, WAL_INIT, b"")], True)
        assert read(plaintext, index, A, 104) == ([(101, WAL, b"one")], False)
        assert read(plaintext, index, A, 999, floor=109) == ([(111, WAL, b"f")], False)
        assert read(plaintext, index, A, 100) == ([], False)
        assert read(plaintext, index, C, 120) == ([(120, IMAGE, b"page")], True)
        assert index.find(B) is None
        assert list(index.keys_in(KeyRange(B, C))) == []
        assert list(index.keys_in(KeyRange(A, covering_range(C, C).end))) == [A, C]


def test_delta_layer_with_an_image_at_the_last_lsn() -> None:
    run: list[object] = [101, WAL, b"one", 105, WAL, b"two"]
    plaintext, index = build((A, run, 40, b"page"))
    assert read(plaintext, index, A, 105) == ([(105, IMAGE, b"page")], True)
    assert read(plaintext, index, A, 104) == ([(101, WAL, b"one")], False)


def test_delta_layer_carries_chain_lengths_on() -> None:
    wal: list[object] = [101, WAL, b"", 102, WAL, b""]
    started: list[object] = [101, IMAGE, b"", 102, WAL, b"", 103, WAL, b""]
    _, index = build((A, wal, 5, None), (B, started, 5, None), (C, wal, 5, b"page"))
    assert index.chain_lengths({A, B, C, REL.size_key()}) == {A: 7, B: 2, C: 0}


def test_a_run_of_many_values() -> None:
    run: list[object] = []
    for n in range(1, 2001):
        run += [100 + n, WAL, b"%d" % n]
    builder = DeltaBuilder()
    builder.add_run(A, run, 0)
    plaintext, index = builder.finish(100, 3000)
    chain, complete = read(bytes(plaintext), index, A, 1600, floor=1590)
    assert [payload for _, _, payload in chain] == [b"%d" % n for n in range(1500, 1490, -1)]
    assert not complete


def test_delta_index_refuses_what_it_cannot_be() -> None:
    plaintext, index = build((A, [101, WAL, b"one"], 0, None), (B, [101, WAL, b"two"], 0, None))
    start, end = index.footer.index_range(len(plaintext))
    data = plaintext[start:end]
    with pytest.raises(CorruptedError):
        DeltaIndex(index.footer, data[:-1])
    with pytest.raises(CorruptedError):
        DeltaIndex(index.footer, data[18:36] + data[:18] + data[36:])  # keys not sorted
    far = data[:36] + (1 << 40).to_bytes(8, "little") + data[44:]
    with pytest.raises(CorruptedError):
        DeltaIndex(index.footer, far).find(A)


# --- image ---


def test_image_layer_gives_back_what_went_in() -> None:
    builder = ImageBuilder()
    builder.add(A, b"a" * 8192)
    builder.add(B, b"")
    builder.add(C, b"c")
    assert builder.key_span == (A, C)
    plaintext, built = builder.finish(500)
    data = bytes(plaintext)
    footer = Footer.parse(data[-FOOTER_SIZE_BYTES:], len(data))
    start, end = footer.index_range(len(data))
    for index in (built, ImageIndex(footer, data[start:end])):
        values = {}
        for key in (A, B, C):
            place = index.find(key)
            assert place is not None
            values[key] = data[place[0] : place[1]]
        assert values == {A: b"a" * 8192, B: b"", C: b"c"}
        assert index.find(REL.block_key(9)) is None
        assert list(index.keys_in(KeyRange(B, C))) == [B]


# --- footer, names, map ---


def test_footer_refuses_what_it_cannot_be() -> None:
    good = Footer(LayerKind.DELTA, 2, 5, 100, 10, 20).serialize()
    assert Footer.parse(good, 1000) == Footer(LayerKind.DELTA, 2, 5, 100, 10, 20)
    for bad in (good[:-1], b"XXXX" + good[4:], good[:4] + b"\x02\x00" + good[6:], good[:-8] + b"\1" * 8):
        with pytest.raises(CorruptedError):
            Footer.parse(bad, 1000)
    with pytest.raises(CorruptedError):
        Footer.parse(good, 100)
    with pytest.raises(CorruptedError):
        Footer.parse(Footer(LayerKind.DELTA, 0, 5, 100, 10, 20).serialize(), 1000)


def test_layer_names_round_trip() -> None:
    name = layer_name(LayerKind.DELTA, 0x16B3748, 0x2000000, 7, "0123456789abcdef")
    assert name == "delta-00000000016B3748-0000000002000000-0000000000000007-0123456789abcdef"
    assert parse_generation(name) == 7
    assert parse_layer_name(name) == (LayerKind.DELTA, 0x16B3748, 0x2000000)
    image = layer_name(LayerKind.IMAGE, 0x10, 0x11, 7, "f" * 16)
    assert parse_layer_name(image) == (LayerKind.IMAGE, 0x10, 0x11)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "delta-00000000016B3748-0000000002000000",
        "delta-0000000002000000-00000000016B3748-0000000000000007-0123456789abcdef",
        "image-FFFFFFFFFFFFFFFF-0000000000000007-0123456789abcdef",
        "image-00000000016b3748-0000000000000007-0123456789abcdef",
        "image-00000000016B3748-0000000000000007-0123456789abcdef\n",
        "image-00000000016B3748-0123456789abcdef",
        "image-00000000016B3748-000000000000000A-0123456789abcdef",
        "../layers/image-00000000016B3748-0000000000000007-0123456789abcdef",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(CorruptedError):
        parse_layer_name(name)


def descriptor(kind: LayerKind, lsn_start: int, lsn_end: int, first: bytes = A, last: bytes = C) -> LayerDescriptor:
    name = layer_name(kind, lsn_start, lsn_end, 1, secrets.token_hex(8))
    return LayerDescriptor(name, kind, covering_range(first, last), lsn_start, lsn_end, 1000)


def test_descriptor_refuses_contradictions() -> None:
    name = layer_name(LayerKind.DELTA, 10, 20, 1, "0" * 16)
    for kind, keys, start, end, size in (
        (LayerKind.IMAGE, KeyRange(A, C), 10, 20, 5),
        (LayerKind.DELTA, KeyRange(C, A), 10, 20, 5),
        (LayerKind.DELTA, KeyRange(A, C[:-1]), 10, 20, 5),
        (LayerKind.DELTA, KeyRange(A, C), 10, 21, 5),
        (LayerKind.DELTA, KeyRange(A, C), 10, 20, 0),
    ):
        with pytest.raises(CorruptedError):
            LayerDescriptor(name, kind, keys, start, end, size)


def test_layer_map_walks_down_and_skips_what_cannot_answer() -> None:
    image = descriptor(LayerKind.IMAGE, 100, 101)
    old = descriptor(LayerKind.DELTA, 101, 200)
    only_b = descriptor(LayerKind.DELTA, 200, 300, B, B)
    new = descriptor(LayerKind.DELTA, 300, 400)
    layers = LayerMap([old, image, new, only_b])
    assert list(layers.deltas(A, 1000, -1)) == [new, old]
    assert list(layers.deltas(B, 350, -1)) == [new, only_b, old]
    assert list(layers.deltas(B, 299, 199)) == [only_b]
    assert list(layers.deltas(B, 299, 198)) == [only_b, old]
    assert layers.image(A, 100) is image
    assert layers.image(A, 99) is None
    assert layers.image(REL.block_key(9), 1000) is None
    assert layers.overlapping(KeyRange(A, B), 1000) == [new, old, image]
    assert len(layers) == 4
    assert layers.size_bytes == 4000
    changed = layers.changed(added=[descriptor(LayerKind.DELTA, 400, 500)], removed=[old.name])
    assert len(changed) == 4
    assert len(layers) == 4


def test_layer_map_refuses_layers_that_contradict_each_other() -> None:
    one = descriptor(LayerKind.DELTA, 101, 200)
    with pytest.raises(CorruptedError):
        LayerMap([one, one])
    with pytest.raises(CorruptedError):
        LayerMap([one, descriptor(LayerKind.DELTA, 199, 300)])
    LayerMap([descriptor(LayerKind.DELTA, 101, 200, A, A), descriptor(LayerKind.DELTA, 150, 300, B, C)])
