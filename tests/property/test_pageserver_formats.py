"""Whatever bytes a parser of the pageserver gets, it answers with values or with CorruptedError."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from pageserver import native
from pageserver.index_part import IndexPart
from pageserver.layer.delta import DeltaBuilder, DeltaIndex, RunHeader, run_header_range
from pageserver.layer.footer import FOOTER_SIZE_BYTES, Footer
from pageserver.layer.image import ImageBuilder, ImageIndex
from pageserver.layer.in_memory import LONG_RUN_VALUES, InMemoryLayer, Run, image_points, tail_length
from pageserver.layer.name import LayerKind, parse_layer_name
from pageserver.value import CHAIN_START, Value, ValueKind
from shared.errors import CorruptedError
from shared.keyspace import WHOLE_KEYSPACE, Fork, RelTag, Slru, slru_key
from shared.wal.rmgr_clog import XidStatus

keys = st.binary(min_size=18, max_size=18)
runs = st.lists(
    st.tuples(st.integers(1, 1000), st.sampled_from([int(kind) for kind in ValueKind]), st.binary(max_size=40)),
    min_size=1,
    max_size=40,
).map(lambda values: sorted(values, key=lambda value: value[0]))


def flat(values: list[tuple[int, int, bytes]]) -> Run:
    return [field for value in values for field in value]


def naive(values: list[tuple[int, int, bytes]], lsn: int, floor: int) -> tuple[list[Value], bool]:
    """The chain at `lsn`, by looking at every value."""
    chain: list[Value] = []
    for value in reversed(values):
        if floor < value[0] <= lsn:
            chain.append(value)
            if value[1] in CHAIN_START:
                return chain, True
    return chain, False


@given(st.dictionaries(keys, runs, min_size=1, max_size=8), st.integers(0, 1001), st.integers(-1, 1001), st.data())
def test_delta_layers_and_memory_give_the_chain_that_looking_at_all_values_gives(
    contents: dict[bytes, list[tuple[int, int, bytes]]], lsn: int, floor: int, data: st.DataObject
) -> None:
    builder = DeltaBuilder()
    memory = InMemoryLayer(0)
    images: dict[bytes, bytes] = {}
    for key in sorted(contents):
        if data.draw(st.booleans()):
            images[key] = b"image"
        builder.add_run(key, flat(contents[key]), 3, images.get(key))
        memory.put_all((key, *value) for value in contents[key])
    plaintext = bytes(builder.finish(1, 2000)[0])
    footer = Footer.parse(plaintext[-FOOTER_SIZE_BYTES:], len(plaintext))
    start, end = footer.index_range(len(plaintext))
    index = DeltaIndex(footer, plaintext[start:end])
    for key, values in contents.items():
        in_memory: list[Value] = []
        assert (in_memory, memory.gather(key, lsn, floor, in_memory)) == naive(values, lsn, floor)
        stored = values + ([(values[-1][0], int(ValueKind.IMAGE), images[key])] if key in images else [])
        entry = index.find(key)
        assert entry is not None
        header = RunHeader(entry, plaintext[slice(*run_header_range(entry))])
        selection = header.select(entry, lsn, floor)
        at = entry.payload_offset
        chain: list[Value] = []
        header.take(selection, plaintext[at + selection.payload_start : at + selection.payload_end], chain)
        assert (chain, selection.complete) == naive(stored, lsn, floor)
        tail, started = tail_length(flat(stored))
        assert index.chain_lengths({key})[key] == (tail if started else tail + 3)
    missing = data.draw(keys)
    assert (index.find(missing) is None) == (missing not in contents)


@given(runs)
def test_image_points_lie_behind_the_last_chain_start(values: list[tuple[int, int, bytes]]) -> None:
    long = values + [(1000 + n, int(ValueKind.WAL), b"") for n in range(1, 2 * LONG_RUN_VALUES + 44)]
    points = image_points(flat(long))
    assert points == sorted(points)
    assert 2 <= len(points) <= 3
    assert image_points(flat(values)) == []


@given(st.dictionaries(keys, st.binary(max_size=60), min_size=1, max_size=8), keys)
def test_image_layers_round_trip(contents: dict[bytes, bytes], other: bytes) -> None:
    builder = ImageBuilder()
    for key in sorted(contents):
        builder.add(key, contents[key])
    plaintext = bytes(builder.finish(7)[0])
    footer = Footer.parse(plaintext[-FOOTER_SIZE_BYTES:], len(plaintext))
    index = ImageIndex(footer, plaintext[slice(*footer.index_range(len(plaintext)))])
    for key in {*contents, other}:
        place = index.find(key)
        assert (None if place is None else plaintext[slice(*place)]) == contents.get(key)


@given(st.binary(max_size=200))
def test_footers_names_and_indexes_of_any_bytes(data: bytes) -> None:
    for parse in (
        lambda: Footer.parse(data[:FOOTER_SIZE_BYTES], 1000),
        lambda: parse_layer_name(data.decode("latin-1")),
        lambda: IndexPart.parse(data),
    ):
        with contextlib.suppress(CorruptedError):
            parse()


@given(
    st.sampled_from([LayerKind.DELTA, LayerKind.IMAGE]),
    st.integers(1, 5),
    st.integers(0, 300),
    st.binary(max_size=400),
    keys,
    st.integers(0, 1 << 64),
)
def test_layer_indexes_of_any_bytes(
    kind: LayerKind, count: int, offset: int, data: bytes, key: bytes, lsn: int
) -> None:
    footer = Footer(kind, count, count, offset, 5, 6)
    try:
        if kind is LayerKind.IMAGE:
            image = ImageIndex(footer, data)
            for known in (*image.keys_in(WHOLE_KEYSPACE), key):
                place = image.find(known)
                assert place is None or 0 <= place[0] <= place[1] <= offset
            return
        delta = DeltaIndex(footer, data)
        for known in (*delta.keys_in(WHOLE_KEYSPACE), key):
            entry = delta.find(known)
            if entry is None:
                continue
            start, end = run_header_range(entry)
            assert 0 <= start <= end <= offset
            header = RunHeader(entry, data.ljust(end - start, b"\x05")[: end - start])
            selection = header.select(entry, lsn, -1)
            header.take(selection, bytes(selection.payload_end - selection.payload_start), [])
    except CorruptedError:
        pass


@given(st.integers(0, 3), st.integers(0, 40), st.data())
def test_a_delta_index_with_altered_bytes(position_share: int, seed: int, data: st.DataObject) -> None:
    builder = DeltaBuilder()
    for block in range(4):
        builder.add_run(REL.block_key(block), [10, 1, b"a", 20, 1, b"bb", 30, 0, b"ccc"], 0)
    plaintext = bytearray(builder.finish(1, 100)[0])
    for _ in range(1 + seed % 4):
        plaintext[data.draw(st.integers(0, len(plaintext) - 1))] = data.draw(st.integers(0, 255))
    try:
        footer = Footer.parse(bytes(plaintext[-FOOTER_SIZE_BYTES:]), len(plaintext))
        index = DeltaIndex(footer, bytes(plaintext[slice(*footer.index_range(len(plaintext)))]))
        for block in range(4):
            entry = index.find(REL.block_key(block))
            if entry is not None:
                header = RunHeader(entry, bytes(plaintext[slice(*run_header_range(entry))]))
                selection = header.select(entry, 10 * position_share, -1)
                at = entry.payload_offset
                payloads = bytes(plaintext[at + selection.payload_start : at + selection.payload_end])
                header.take(selection, payloads, [])
    except CorruptedError:
        pass


REL = RelTag(1663, 5, 16384, Fork.MAIN)
NATIVE_KEYS = [
    *(slru_key(kind, 3) for kind in Slru),
    RelTag(1663, 5, 16384, Fork.VISIBILITY_MAP).block_key(0),
    REL.block_key(0),
]


@given(st.sampled_from(NATIVE_KEYS), st.lists(st.binary(max_size=30) | st.binary(max_size=30).map(lambda b: b"\1" + b)))
def test_native_changes_of_any_bytes(key: bytes, payloads: list[bytes]) -> None:
    with contextlib.suppress(CorruptedError):
        assert len(native.apply_native(key, bytes(8192), payloads)) == 8192


@given(st.lists(st.tuples(st.integers(0, 32767), st.sampled_from([XidStatus.COMMITTED, XidStatus.ABORTED]))))
def test_commit_log_against_a_dictionary(changes: list[tuple[int, XidStatus]]) -> None:
    key = slru_key(Slru.CLOG, 0)
    page = native.apply_native(key, bytes(8192), [native.pack_clog_set([xid], status) for xid, status in changes])
    last = dict(changes)
    for xid in {0, 1, 32767, *last}:
        assert page[xid // 4] >> xid % 4 * 2 & 3 == last.get(xid, XidStatus.IN_PROGRESS)


@given(st.integers(0, 0xFFFFFFFF), st.lists(st.tuples(st.integers(3, 0xFFFFFFFF), st.integers(0, 5)), max_size=40))
def test_multixact_members_against_a_dictionary(start: int, members: list[tuple[int, int]]) -> None:
    pages: dict[int, bytes] = {}
    for number, payload in native.pack_multixact_members(start, members):
        pages[number] = native.apply_native(slru_key(Slru.MULTIXACT_MEMBERS, number), bytes(8192), [payload])
    for number, (xid, status) in enumerate(members):
        offset = (start + number) % (1 << 32)
        page = pages[offset // 1636]
        # The macros of multixact.c, spelled out.
        flags = offset // 4 % 409 * 20
        assert int.from_bytes(page[flags : flags + 4], "little") >> offset % 4 * 8 & 0xFF == status
        at = flags + 4 + offset % 4 * 4
        assert int.from_bytes(page[at : at + 4], "little") == xid
