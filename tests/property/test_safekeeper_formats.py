"""On-disk formats and the stream parser: round trips, and arbitrary bytes raise what is documented and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safekeeper.acceptor import AcceptorState
from safekeeper.control_file import ControlState
from safekeeper.copy_stream import CopyStreamReader
from safekeeper.log_map import LogMap
from safekeeper.tail_cache import TailCache
from safekeeper.term_history import TermHistory
from safekeeper.wal_segment import (
    FRAME_OVERHEAD_SIZE_BYTES,
    PIECE_HEADER_SIZE_BYTES,
    FrameIndex,
    PieceCipher,
    PieceHeader,
    PieceId,
    index_frames,
    open_frames,
    verify_tail,
)
from shared.crypto.aead import AeadKey, Suite
from shared.crypto.secret import SecretKey
from shared.errors import CorruptedError, IntegrityError
from shared.ids import ProjectId, TimelineId
from shared.lsn import WAL_SEGMENT_SIZE_BYTES, Lsn
from shared.wire.buffer import ProtocolViolationError
from shared.wire.pgframing import MessageFramer
from shared.wire.pgproto import CopyData, CopyDone, NoticeResponse
from shared.wire.replication import PrimaryKeepalive, XLogData, parse_from_primary

# --- control file ---


@st.composite
def control_states(draw: st.DrawFn) -> ControlState:
    """States that a log can get into: appends in rising terms, over segment ends, with clips."""
    start = lsn = draw(st.integers(0, 1 << 40))
    log, entries, term = LogMap(start), [], 0
    for _ in range(draw(st.integers(0, 5))):
        term += draw(st.integers(1, 3))
        entries.append((term, lsn))
        for _ in range(draw(st.integers(0, 2))):
            log = log.opened(PieceId(lsn // WAL_SEGMENT_SIZE_BYTES, term, log.next_sequence), lsn)
            room = (lsn // WAL_SEGMENT_SIZE_BYTES + 1) * WAL_SEGMENT_SIZE_BYTES - lsn
            lsn += draw(st.integers(1, room))
        if draw(st.booleans()):
            lsn = draw(st.integers(max(start, entries[-1][1]), lsn))
            log = log.closed_at(lsn)
    history = TermHistory.of(entries)
    seat, generation = draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 2**32 - 1))
    commit_lsn = draw(st.integers(start, lsn))
    ends = [extent.end_lsn for extent in log.extents if extent.end_lsn is not None and extent.end_lsn <= commit_lsn]
    if trimmed_lsn := draw(st.sampled_from([0, *ends])):
        log = log.trimmed_at(trimmed_lsn)
    acceptor = AcceptorState(start, term + draw(st.integers(0, 2)), history, commit_lsn, seat, generation)
    return ControlState(
        "safekeeper-1", ProjectId.new(), TimelineId.new(), draw(st.integers(0, 2**64 - 1)), acceptor, log
    )


@given(control_states())
def test_a_control_file_round_trips(state: ControlState) -> None:
    assert ControlState.parse(state.serialize()) == state


@given(control_states(), st.data())
def test_an_altered_control_file_is_refused(state: ControlState, data: st.DataObject) -> None:
    good = state.serialize()
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CorruptedError):
        ControlState.parse(bytes(bad))
    with pytest.raises(CorruptedError):
        ControlState.parse(good[: data.draw(st.integers(0, len(good) - 1))])
    with pytest.raises(CorruptedError):
        ControlState.parse(good + b"\0")


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_not_a_control_file(data: bytes) -> None:
    with pytest.raises(CorruptedError):
        ControlState.parse(data)


@given(control_states(), st.data())
def test_a_map_that_cannot_be_is_refused_even_with_a_good_crc(state: ControlState, data: st.DataObject) -> None:
    extents = list(state.log.extents)
    if not extents:
        return
    at = data.draw(st.integers(0, len(extents) - 1))
    extent = extents[at]
    extents[at] = data.draw(
        st.sampled_from(
            [
                extent._replace(start_lsn=extent.start_lsn + 1),
                extent._replace(piece=extent.piece._replace(term=extent.piece.term + 100)),
                extent._replace(piece=extent.piece._replace(segment_number=extent.piece.segment_number + 1)),
                extent._replace(piece=extent.piece._replace(sequence=state.log.next_sequence)),
                extent._replace(end_lsn=extent.start_lsn),
                extent._replace(end_lsn=extent.start_lsn + WAL_SEGMENT_SIZE_BYTES + 1),
            ]
        )
    )
    broken = replace(state, log=replace(state.log, extents=tuple(extents)))
    with pytest.raises(CorruptedError):
        ControlState.parse(broken.serialize())


# --- pieces ---

AAD = b"context"


def make_cipher(start_lsn: int = 1000, term: int = 3) -> PieceCipher:
    header = PieceHeader(PieceId(start_lsn // WAL_SEGMENT_SIZE_BYTES, term, 1), start_lsn, Suite.AES_256_GCM)
    return PieceCipher(AeadKey(SecretKey.generate()), AAD, header)


def seal_all(cipher: PieceCipher, frames: list[bytes]) -> bytes:
    index = FrameIndex.empty(cipher.header.start_lsn)
    parts = [cipher.header.serialize()]
    for frame in frames:
        parts += cipher.seal(index.frames, index.end_lsn, frame)
        index.append(len(frame))
    return b"".join(parts)


frame_lists = st.lists(st.binary(min_size=1, max_size=700), min_size=1, max_size=6)


@given(frame_lists, st.integers(0, 5000), st.data())
def test_frames_round_trip(frames: list[bytes], zeros: int, data: st.DataObject) -> None:
    cipher = make_cipher()
    sealed = seal_all(cipher, frames) + bytes(zeros)
    tail = verify_tail(sealed, cipher)
    assert not tail.torn
    assert tail.index.end_lsn == 1000 + sum(map(len, frames))
    assert index_frames(sealed, cipher.header, tail.index.end_lsn).offsets == tail.index.offsets
    first = data.draw(st.integers(0, len(frames) - 1))
    count = data.draw(st.integers(1, len(frames) - first))
    start, end = tail.index.offsets[first], tail.index.offsets[first + count]
    assert open_frames(cipher, tail.index, first, sealed[start:end], count) == frames[first : first + count]


@given(frame_lists, st.data())
def test_an_altered_piece_never_yields_other_or_fewer_bytes(frames: list[bytes], data: st.DataObject) -> None:
    cipher = make_cipher()
    sealed = bytearray(seal_all(cipher, frames))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(IntegrityError):
        verify_tail(bytes(sealed) + bytes(3000), cipher)


@given(frame_lists, st.data())
def test_frames_that_are_dropped_doubled_or_swapped_are_noticed(frames: list[bytes], data: st.DataObject) -> None:
    cipher = make_cipher()
    sealed = seal_all(cipher, frames)
    index = verify_tail(sealed, cipher).index
    pieces = [sealed[index.offsets[i] : index.offsets[i + 1]] for i in range(len(frames))]
    changed = data.draw(
        st.one_of(
            st.permutations(pieces),
            st.lists(st.sampled_from(pieces), min_size=1, max_size=len(pieces) + 1),
        )
    )
    if changed == pieces[: len(changed)]:
        return  # cut at a frame's end: the control file notices that, not the piece
    with pytest.raises(IntegrityError):
        verify_tail(sealed[:PIECE_HEADER_SIZE_BYTES] + b"".join(changed) + bytes(600), cipher)


@given(st.binary(max_size=2000), st.booleans())
def test_arbitrary_bytes_behind_a_header_are_no_frames(data: bytes, fill: bool) -> None:
    """Never an exception other than IntegrityError, never a frame."""
    cipher = make_cipher()
    try:
        tail = verify_tail(cipher.header.serialize() + data + bytes(4096 if fill else 0), cipher)
    except IntegrityError:
        return
    assert tail.index.frames == 0


@given(st.binary(max_size=100))
def test_arbitrary_bytes_are_no_header(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        PieceHeader.parse(data)


@given(st.builds(PieceId, st.integers(0, 2**60), st.integers(1, 2**64 - 1), st.integers(0, 2**32 - 1)))
def test_a_pieces_name_round_trips(piece: PieceId) -> None:
    assert PieceId.parse(piece.file_name) == piece


@given(st.text(alphabet="0123456789abcdefABCDEF.gkey", max_size=45))
def test_other_names_are_no_pieces(name: str) -> None:
    piece = PieceId.parse(name)
    assert piece is None or piece.file_name == name


def test_the_overhead_is_what_the_table_says() -> None:
    assert PIECE_HEADER_SIZE_BYTES == 40
    assert FRAME_OVERHEAD_SIZE_BYTES == 24 + 16


# --- the stream ---

messages = st.one_of(
    st.binary(max_size=400).map(lambda data: ("w", data)),
    st.booleans().map(lambda reply: ("k", reply)),
    st.just(("n", None)),
)


@given(st.lists(messages, max_size=20), st.integers(0, 1 << 60), st.data())
def test_the_stream_parser_agrees_with_the_protocol_module(
    script: list[tuple[str, object]], start: int, data: st.DataObject
) -> None:
    lsn, wire = start, b""
    for kind, value in script:
        if kind == "w":
            assert isinstance(value, bytes)
            wire += CopyData(XLogData(Lsn(lsn), Lsn(lsn), 7, value).serialize()).serialize()
            lsn += len(value)
        elif kind == "k":
            wire += CopyData(PrimaryKeepalive(Lsn(lsn), 7, bool(value)).serialize()).serialize()
        else:
            wire += NoticeResponse.of("NOTICE", "00000", "hello").serialize()
    wire += CopyDone().serialize()

    expected, replies = b"", 0
    for frame in MessageFramer().feed(wire):
        if frame.type == b"d":
            match parse_from_primary(frame.payload):
                case XLogData(data=payload):
                    expected += payload
                case PrimaryKeepalive(reply_requested=True):
                    replies += 1

    reader = CopyStreamReader(start)
    got, asked, ended, position = b"", False, False, 0
    while position < len(wire):
        size = data.draw(st.integers(1, len(wire) - position))
        reader.free[:size] = wire[position : position + size]
        reader.received(size)
        position += size
        received = reader.take()
        got += received.data
        asked |= received.reply_requested
        ended |= received.ended
    assert (got, asked, ended, reader.expected_lsn) == (expected, replies > 0, True, lsn)


@given(st.integers(1, 1 << 40), st.integers(-10, 10).filter(bool))
def test_a_gap_or_a_rewrite_is_refused(start: int, distance: int) -> None:
    reader = CopyStreamReader(start + 10)
    wire = CopyData(XLogData(Lsn(start + 10 + distance), Lsn(0), 0, b"data").serialize()).serialize()
    reader.free[: len(wire)] = wire
    reader.received(len(wire))
    with pytest.raises(ProtocolViolationError):
        reader.take()


@given(st.binary(min_size=1, max_size=500))
def test_arbitrary_bytes_in_the_stream_raise_only_what_is_documented(data: bytes) -> None:
    reader = CopyStreamReader(0)
    reader.free[: len(data)] = data
    reader.received(len(data))
    try:
        reader.take()
    except ProtocolViolationError:
        return
    assert len(reader.free) > 0


# --- the cache ---


@settings(max_examples=200)
@given(
    st.integers(1, 500),
    st.lists(st.tuples(st.integers(1, 80), st.booleans()), min_size=1, max_size=200),
    st.data(),
)
def test_the_tail_cache_answers_the_truth_or_nothing(
    capacity: int, appends: list[tuple[int, bool]], data: st.DataObject
) -> None:
    cache, log = TailCache(capacity), bytearray()
    for size, skip in appends:
        if skip:
            log += bytes(7)  # appended without the cache's knowledge
        chunk = bytearray((len(log) + i) % 251 for i in range(size))
        cache.append(len(log), bytearray(chunk))
        log += chunk
        assert cache.size_bytes <= capacity + size
    assert cache.read(len(log), 10) is None
    last = len(log) - appends[-1][0]
    assert cache.read(last, 1000) == bytes(log[last:]), "the newest frame is always there"
    for _ in range(20):
        lsn, size = data.draw(st.integers(0, len(log) - 1)), data.draw(st.integers(1, 300))
        found = cache.read(lsn, size)
        if found is not None:
            assert 1 <= len(found) <= size
            assert found == log[lsn : lsn + len(found)]
    cache.wipe()
    assert cache.read(last, 1) is None
    assert cache.size_bytes == 0
