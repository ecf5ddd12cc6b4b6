"""Framing: how a stream is cut into chunks must not matter, and scanner and framer must agree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.wire.buffer import ProtocolViolationError
from shared.wire.pgframing import Frame, FrameScanner, MessageFramer, pack_message

frames = st.lists(
    st.tuples(st.sampled_from([b"D", b"N", b"Z", b"C", b"\xff", b"\0"]), st.binary(max_size=30)), max_size=8
)
WANTED = (b"N", b"Z")


def cut(stream: bytes, data: st.DataObject) -> list[bytes]:
    """`stream` in chunks, some of them empty."""
    places = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    return [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]


@given(frames=frames, tail=st.binary(max_size=4), data=st.data())
def test_framer_does_not_see_chunks(frames: list[tuple[bytes, bytes]], tail: bytes, data: st.DataObject) -> None:
    stream = b"".join(pack_message(*frame) for frame in frames)
    framer = MessageFramer()
    seen = [frame for chunk in cut(stream + tail, data) for frame in framer.feed(chunk)]
    assert seen == [Frame(*frame) for frame in frames]
    assert framer.pending_bytes == len(tail)


@given(frames=frames, data=st.data(), kind=st.sampled_from([bytes, bytearray, memoryview]))
def test_scanner_does_not_see_chunks(
    frames: list[tuple[bytes, bytes]], data: st.DataObject, kind: type[bytes] | type[bytearray] | type[memoryview]
) -> None:
    stream = b"".join(pack_message(*frame) for frame in frames)
    scanner = FrameScanner(WANTED)
    types, wanted, offset = b"", [], 0
    for chunk in cut(stream, data):
        scan = scanner.scan(kind(chunk))
        types += scan.types
        for found in scan.wanted:
            assert 0 < found.end <= len(chunk)
            start, end = offset + found.start, offset + found.end
            assert stream[start:end] == pack_message(found.type, found.payload)
            wanted.append((found.type, found.payload))
        offset += len(chunk)
        ends = [0]
        for frame in frames:
            ends.append(ends[-1] + 5 + len(frame[1]))
        assert scanner.at_boundary == (offset in ends)
    assert types == b"".join(type_byte for type_byte, _ in frames)
    assert wanted == [frame for frame in frames if frame[0] in WANTED]


@given(stream=st.binary(max_size=60), data=st.data())
def test_random_streams_break_both_in_the_same_way(stream: bytes, data: st.DataObject) -> None:
    framer, scanner = MessageFramer(limit_bytes=20), FrameScanner((), limit_bytes=20)
    for chunk in cut(stream, data):
        try:
            expected = b"".join(frame.type for frame in framer.feed(chunk))
        except ProtocolViolationError:
            with pytest.raises(ProtocolViolationError):
                scanner.scan(chunk)
            for broken in (framer.feed, scanner.scan):
                with pytest.raises(ProtocolViolationError):
                    broken(b"")
            return
        assert scanner.scan(chunk).types == expected


@given(frames=frames, limit=st.integers(0, 40), wanted_limit=st.integers(0, 40), data=st.data())
def test_limits_are_per_type(
    frames: list[tuple[bytes, bytes]], limit: int, wanted_limit: int, data: st.DataObject
) -> None:
    stream = b"".join(pack_message(*frame) for frame in frames)
    fits = all(len(payload) <= (wanted_limit if t in WANTED else limit) for t, payload in frames)
    framer = MessageFramer(limit_bytes=limit, limits_bytes=dict.fromkeys(WANTED, wanted_limit))
    scanner = FrameScanner(WANTED, limit_bytes=limit, wanted_limit_bytes=wanted_limit)
    for reader in (framer.feed, scanner.scan):
        refused = False
        for chunk in cut(stream, data):
            try:
                reader(chunk)
            except ProtocolViolationError:
                refused = True
                break
        assert refused is not fits
