"""The page protocol: what is packed parses back, and bytes of nobody raise ProtocolError and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.keyspace import Fork, RelTag
from shared.wire import pagestream
from shared.wire.frames import FrameDecoder, ProtocolError

_U32 = st.integers(0, (1 << 32) - 1)
_LSN = st.integers(0, (1 << 64) - 1)
_REL = st.builds(RelTag, _U32, _U32, _U32, st.sampled_from(Fork))


def payload(frame: bytes, kind: int) -> bytes:
    [(got, content)] = FrameDecoder(pagestream.MAX_FRAME_SIZE_BYTES).feed(frame)
    assert got == kind
    return content


@given(_U32, _LSN, _REL, st.integers(0, (1 << 32) - 65), st.integers(1, pagestream.MAX_PAGES_PER_REQUEST))
def test_get_pages(request_id: int, lsn: int, rel: RelTag, block: int, count: int) -> None:
    request = pagestream.BlocksRequest(request_id, lsn, rel, block, count)
    assert pagestream.BlocksRequest.parse(payload(request.pack(), pagestream.GET_PAGES)) == request


@given(_U32, _LSN, _REL, _U32)
def test_get_page(request_id: int, lsn: int, rel: RelTag, block: int) -> None:
    request = pagestream.BlockRequest(request_id, lsn, rel, block)
    assert pagestream.BlockRequest.parse(payload(request.pack(pagestream.GET_PAGE), pagestream.GET_PAGE)) == request


@given(_U32, st.sets(_REL, max_size=50), _U32)
def test_relation_sizes(request_id: int, rels: set[RelTag], blocks: int) -> None:
    relations = [(rel, blocks) for rel in sorted(rels)]
    frame = payload(pagestream.pack_relation_sizes(request_id, relations), pagestream.RELATION_SIZES)
    assert pagestream.parse_relation_sizes(frame) == (request_id, relations)
    if len(relations) > 1:
        backwards = pagestream.pack_relation_sizes(request_id, relations[::-1])
        with pytest.raises(ProtocolError):
            pagestream.parse_relation_sizes(payload(backwards, pagestream.RELATION_SIZES))


@given(_U32, st.integers(1, pagestream.MAX_PAGES_PER_REQUEST))
def test_pages(request_id: int, count: int) -> None:
    pages = [bytes([i]) * 8192 for i in range(count)]
    frame = payload(pagestream.pack_pages(request_id, pages), pagestream.PAGES)
    assert pagestream.parse_pages(frame) == (request_id, pages)


def test_the_largest_answers_fit_into_a_frame() -> None:
    pages = [bytes(8192)] * pagestream.MAX_PAGES_PER_REQUEST
    relations = [(RelTag(1, 1, i, Fork.MAIN), 1) for i in range(pagestream.MAX_RELATIONS_PER_FRAME)]
    for frame in (pagestream.pack_pages(1, pages), pagestream.pack_relation_sizes(1, relations)):
        assert FrameDecoder(pagestream.MAX_FRAME_SIZE_BYTES).feed(frame)


_PARSERS = [
    pagestream.Open.parse,
    pagestream.BlockRequest.parse,
    pagestream.BlocksRequest.parse,
    pagestream.BasebackupRequest.parse,
    pagestream.parse_pages,
    pagestream.parse_relation_sizes,
    pagestream.parse_request_id,
    pagestream.parse_size,
    pagestream.parse_basebackup_end,
]


@given(st.one_of(st.binary(max_size=120), st.sampled_from([12, 31, 33, 4, 8, 16, 21, 38, 39]).map(bytes)))
def test_bytes_of_nobody(data: bytes) -> None:
    for parse in _PARSERS:
        try:
            parse(data)
        except ProtocolError:
            continue
