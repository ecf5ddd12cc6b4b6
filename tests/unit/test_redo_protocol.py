"""The pipe protocol of the redo worker, without a worker."""

from __future__ import annotations

import itertools
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageserver.redo import protocol
from pageserver.redo.protocol import Reply, ReplyParser, Status
from shared.errors import CorruptedError, IntegrityError, InvalidInputError, KeylakeError, UnavailableError

SOURCES = Path(protocol.__file__).parent
PAGE = bytes(8192)
REL = (1663, 5, 16384)


def c_constant(name: str) -> int:
    """The value of a #define or enum member of the C side."""
    for path in sorted(SOURCES.glob("*.[ch]")):
        if match := re.search(rf"^(?:#define\s+|\s*){name}\s*=?\s+(.+?)(?:,|\s*/\*|$)", path.read_text(), re.MULTILINE):
            product = 1
            for factor in match[1].strip("() ").split("*"):
                product *= int(factor)
            return product
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROTOCOL_VERSION", protocol.PROTOCOL_VERSION),
        ("MAX_REQUEST_BYTES", protocol.MAX_REQUEST_BYTES),
        ("MAX_RECORD_BYTES", protocol.MAX_RECORD_BYTES),
        ("FRAME_HEADER_BYTES", protocol.FRAME_HEADER_SIZE_BYTES),
        ("RECORD_HEADER_BYTES", protocol.RECORD_OVERHEAD_BYTES),
        *((f"REPLY_{status.name}", status.value) for status in Status),
    ],
)
def test_both_sides_agree_on_the_numbers(name: str, value: int) -> None:
    assert c_constant(name) == value


def test_an_apply_request_is_laid_out_as_the_table_says() -> None:
    base = bytes(range(256)) * 32
    request = protocol.apply_request(REL, 2, 77, base, [(5, b"x" * 24), (9, b"y" * 30)], verify_crc=True)

    assert struct.unpack_from("<IBBBH", request) == (len(request) - 5, ord("A"), 3, 2, 0)
    assert struct.unpack_from("<IIIII", request, 5 + 4) == (*REL, 77, 2)
    assert request[5 + 24 : 5 + 24 + 8192] == base
    assert request[5 + 24 + 8192 :] == (struct.pack("<QI", 5, 24) + b"x" * 24 + struct.pack("<QI", 9, 30) + b"y" * 30)


def test_an_apply_request_without_base_has_no_gap() -> None:
    request = protocol.apply_request(REL, 0, 0, None, [(5, b"x" * 24)])
    assert request[6] == 0
    assert len(request) == 5 + 24 + 12 + 24


def test_a_mask_request_is_laid_out_as_the_table_says() -> None:
    request = protocol.mask_request(10, 3, PAGE)
    assert struct.unpack_from("<IBB3xI", request) == (8 + 8192, ord("M"), 10, 3)


@pytest.mark.parametrize(
    ("fork", "block", "base", "records"),
    [
        (4, 0, None, [(1, b"x" * 24)]),
        (-1, 0, None, [(1, b"x" * 24)]),
        (0, 0xFFFFFFFE, None, [(1, b"x" * 24)]),
        (0, -1, None, [(1, b"x" * 24)]),
        (0, 0, b"short", [(1, b"x" * 24)]),
        (0, 0, None, []),
        (0, 0, None, [(-1, b"x" * 24)]),
        (0, 0, None, [(1 << 64, b"x" * 24)]),
        (0, 0, None, [(1, bytes(protocol.MAX_REQUEST_BYTES))]),
    ],
)
def test_malformed_requests_are_refused_here(
    fork: int, block: int, base: bytes | None, records: list[tuple[int, bytes]]
) -> None:
    with pytest.raises(InvalidInputError):
        protocol.apply_request(REL, fork, block, base, records)


@pytest.mark.parametrize("rel", [(-1, 0, 0), (0, 1 << 32, 0)])
def test_relations_that_do_not_fit_are_refused_here(rel: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidInputError):
        protocol.apply_request(rel, 0, 0, None, [(1, b"x" * 24)])


def test_mask_requests_are_checked() -> None:
    for rmid, block, page in ((22, 0, PAGE), (-1, 0, PAGE), (0, -1, PAGE), (0, 0, b"")):
        with pytest.raises(InvalidInputError):
            protocol.mask_request(rmid, block, page)


@given(st.lists(st.integers(24, 3_000_000), min_size=1, max_size=40))
def test_a_split_chain_is_the_chain_and_each_part_fits(lengths: list[int]) -> None:
    records = [(index + 1, _ZEROS[:length]) for index, length in enumerate(lengths)]
    runs = protocol.split_chain(records)
    assert [record for run in runs for record in run] == records
    for run in runs:
        size = protocol.APPLY_OVERHEAD_BYTES + sum(protocol.RECORD_OVERHEAD_BYTES + len(record) for _, record in run)
        assert run
        assert size <= protocol.MAX_REQUEST_BYTES


_ZEROS = bytes(3_000_000)


@pytest.mark.parametrize("length", [0, 23, protocol.MAX_RECORD_BYTES + 1])
def test_records_of_impossible_length_are_refused_here(length: int) -> None:
    with pytest.raises(InvalidInputError):
        protocol.split_chain([(1, bytes(length))])


REPLIES = st.builds(Reply, st.sampled_from(Status), st.binary(max_size=100) | st.just(PAGE))


@given(st.lists(REPLIES, max_size=5), st.lists(st.integers(1, 9000), min_size=1, max_size=5))
def test_replies_survive_being_cut_anywhere(replies: list[Reply], sizes: list[int]) -> None:
    stream = b"".join(struct.pack("<IB", len(reply.payload), reply.status) + reply.payload for reply in replies)
    parser = ReplyParser()
    parsed: list[Reply] = []
    for size in itertools.cycle(sizes):
        if not stream:
            break
        parsed += parser.feed(stream[:size])
        stream = stream[size:]
    assert parsed == replies


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_a_reply_stream_of_anything_is_parsed_or_refused(chunks: list[bytes]) -> None:
    parser = ReplyParser()
    try:
        for chunk in chunks:
            for reply in parser.feed(chunk):
                assert len(reply.payload) <= protocol.PAGE_SIZE_BYTES
    except CorruptedError:
        pass


@given(REPLIES)
def test_a_greeting_of_anything_is_refused(reply: Reply) -> None:
    with pytest.raises(UnavailableError):
        protocol.parse_greeting(reply)


def test_a_greeting_is_understood() -> None:
    greeting = protocol.parse_greeting(Reply(Status.OK, struct.pack("<4sIII", b"KLWR", 1, 160014, 1)))
    assert (greeting.pg_version_num, greeting.system_calls_filtered) == (160014, True)
    with pytest.raises(UnavailableError):
        protocol.parse_greeting(Reply(Status.OK, struct.pack("<4sIII", b"KLWR", 2, 160014, 1)))


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (Status.INVALID, InvalidInputError),
        (Status.CORRUPTED, CorruptedError),
        (Status.FAILED, IntegrityError),
        (Status.PANIC, IntegrityError),
    ],
)
def test_each_status_has_its_error(status: Status, error: type[KeylakeError]) -> None:
    raised = protocol.error_of(Reply(status, b"why \xff"))
    assert type(raised) is error
    assert "why" in str(raised)
