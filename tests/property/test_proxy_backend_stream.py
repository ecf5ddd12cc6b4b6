"""What the proxy passes on: everything, in whole messages, whatever the chunks, until it must not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute.proxy.backend_stream import BackendStream, is_cancelled_wait
from shared.wire.buffer import ProtocolViolationError
from shared.wire.pgproto import BackendKeyData, ErrorResponse, NoticeResponse, ReadyForQuery, TransactionStatus

LIMIT = 500
"""Small, so that there are long messages among the examples."""
READY = ReadyForQuery(TransactionStatus.IDLE).serialize()
KEY = BackendKeyData(4711, b"abcd")
WARNING = NoticeResponse(
    {
        "S": "WARNING",
        "V": "WARNING",
        "C": "01000",
        "M": "canceling wait for synchronous replication due to user request",
        "D": "The transaction has already committed locally, but might not have been replicated to the standby.",
        "F": "syncrep.c",
        "L": "303",
        "R": "SyncRepWaitForLSN",
    }
).serialize()


def message(kind: bytes, payload: bytes) -> bytes:
    return kind + (len(payload) + 4).to_bytes(4, "big") + payload


messages = st.builds(
    message,
    st.sampled_from([b"D", b"C", b"T", b"S", b"d", b"N", b"1", b"2"]),
    st.one_of(st.binary(max_size=60), st.integers(0, 3).map(lambda n: bytes(LIMIT - 2 + n))),
)


def chunks_of(data: bytes, sizes: list[int]) -> list[bytes]:
    chunks, position, index = [], 0, 0
    while position < len(data):
        size = sizes[index % len(sizes)]
        chunks.append(data[position : position + size])
        position, index = position + size, index + 1
    return chunks


sizes = st.lists(st.integers(1, 50) | st.integers(400, 3000), min_size=1, max_size=8)


@given(st.lists(messages, max_size=12), sizes)
def test_everything_passes_once_and_in_order(stream_messages: list[bytes], chunk_sizes: list[int]) -> None:
    login = message(b"R", b"\0\0\0\0")
    data = login + KEY.serialize() + READY + b"".join(stream_messages)
    stream, passed, keys = BackendStream(LIMIT), b"", []
    for chunk in chunks_of(data, chunk_sizes):
        result = stream.feed(chunk)
        passed += result.data
        if result.key_data is not None:
            keys.append(result.key_data)
            assert passed == login, "the key must come where it came"
            passed += result.after_key_data
        if stream.at_boundary:
            assert _is_whole(passed)
    assert keys == [KEY]
    assert passed == login + READY + b"".join(stream_messages)
    assert stream.logged_in
    assert stream.at_boundary


def _is_whole(data: bytes) -> bool:
    position = 0
    while position < len(data):
        position += 1 + int.from_bytes(data[position + 1 : position + 5], "big")
    return position == len(data)


@given(st.lists(messages, max_size=5), st.lists(messages, max_size=5), sizes)
def test_nothing_passes_from_a_cancelled_wait_on(
    before: list[bytes], after: list[bytes], chunk_sizes: list[int]
) -> None:
    login = message(b"R", b"\0\0\0\0") + READY
    data = login + b"".join(before) + WARNING + message(b"C", b"COMMIT\0") + READY + b"".join(after)
    stream, passed = BackendStream(LIMIT), b""
    for chunk in chunks_of(data, chunk_sizes):
        result = stream.feed(chunk)
        passed += result.data + result.after_key_data
        if result.cancelled_wait:
            assert result.cancelled_wait == WARNING
            break
    else:
        pytest.fail("the warning was not seen")
    assert passed == login + b"".join(before)
    assert stream.at_boundary


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_nonsense_raises_nothing_else(chunks: list[bytes]) -> None:
    stream = BackendStream()
    try:
        for chunk in chunks:
            stream.feed(chunk)
    except ProtocolViolationError:
        pass


@pytest.mark.parametrize("length", [0, 3, 0x40000003, 0xFFFFFFFF])
def test_impossible_lengths(length: int) -> None:
    with pytest.raises(ProtocolViolationError):
        BackendStream().feed(b"D" + length.to_bytes(4, "big"))


def test_which_notices_are_cancelled_waits() -> None:
    assert is_cancelled_wait(WARNING)
    texts = [
        "canceling wait for synchronous replication due to user request",
        "canceling the wait for synchronous replication and terminating connection due to administrator command",
    ]
    for text in texts:
        assert is_cancelled_wait(NoticeResponse({"M": text}).serialize())
        assert is_cancelled_wait(NoticeResponse({"S": "WARNING", "M": text}).serialize())
    assert is_cancelled_wait(NoticeResponse({"M": "übersetzt", "R": "SyncRepWaitForLSN"}).serialize())
    for harmless in (
        {"M": "x", "D": texts[0]},
        {"M": "not canceling wait for synchronous replication"},
        {"M": "x", "R": "exec_stmt_raise"},
    ):
        assert not is_cancelled_wait(NoticeResponse(harmless).serialize())


def test_a_fatal_error_at_the_end_is_a_goodbye() -> None:
    stream = BackendStream()
    stream.feed(message(b"R", b"\0\0\0\0") + READY)
    assert not stream.said_goodbye
    stream.feed(ErrorResponse.of("FATAL", "57P01", "bye").serialize())
    assert stream.said_goodbye


def test_memory_is_bounded_by_the_hold_limit() -> None:
    stream = BackendStream()
    stream.feed(message(b"R", b"\0\0\0\0") + READY)
    header = b"D" + (10_000_000).to_bytes(4, "big")
    assert stream.feed(header).data == header
    assert not stream.at_boundary
    for _ in range(9):
        assert len(stream.feed(bytes(1_000_000)).data) == 1_000_000
