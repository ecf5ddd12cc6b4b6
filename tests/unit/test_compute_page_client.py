"""Pages for a lazy volume over connections that break, answer late, or answer nonsense."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from compute.volume.page_client import BATCH_PAGES, MAX_AHEAD_PAGES, PageClient
from shared.errors import CorruptedError, KeylakeError, NotFoundError, UnavailableError
from shared.framed_tcp import FramedConnection
from shared.lsn import Lsn
from shared.wire import pagestream
from shared.wire.frames import ErrorFrame, FrameDecoder, pack_frame
from tests.fixtures.fuse_kernel import REL, page
from tests.fixtures.waiting import wait_until


class Wire:
    """The pageserver's end of one connection, in memory."""

    def __init__(self) -> None:
        self.asked: list[pagestream.BlocksRequest] = []
        self._frames: asyncio.Queue[list[tuple[int, bytes]]] = asyncio.Queue()

    def write(self, data: bytes) -> None:
        for kind, payload in FrameDecoder(1 << 20).feed(data):
            assert kind == pagestream.GET_PAGES
            self.asked.append(pagestream.BlocksRequest.parse(payload))

    async def receive(self) -> list[tuple[int, bytes]]:
        return await self._frames.get()

    def abort(self) -> None:
        self.break_off()

    async def close(self) -> None:
        """Nothing to do."""

    def say(self, frame: bytes) -> None:
        self._frames.put_nowait(FrameDecoder(1 << 20).feed(frame))

    def break_off(self) -> None:
        self._frames.put_nowait([])

    def answer(self, request: pagestream.BlocksRequest) -> None:
        pages = [page(block) for block in range(request.block, request.block + request.count)]
        self.say(pagestream.pack_pages(request.request_id, pages))


class Bench:
    def __init__(self) -> None:
        self.wires: list[Wire] = []
        self.client = PageClient(self._connect, Lsn(1000), timeout_s=5.0)

    async def _connect(self) -> FramedConnection:
        self.wires.append(Wire())
        return cast("FramedConnection", self.wires[-1])

    async def asked(self, count: int, wire: int = 0) -> list[pagestream.BlocksRequest]:
        await wait_until(lambda: len(self.wires) > wire and len(self.wires[wire].asked) >= count, timeout_s=5.0)
        return self.wires[wire].asked


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await made.client.close()


def expected(first: int, count: int) -> list[bytes]:
    return [page(block) for block in range(first, first + count)]


async def test_batches_are_pipelined_and_may_be_answered_in_any_order(bench: Bench) -> None:
    reading = asyncio.create_task(bench.client.pages(REL, 5, 2 * BATCH_PAGES + 3))
    asked = await bench.asked(3)
    assert [(each.block, each.count) for each in asked] == [
        (5, BATCH_PAGES),
        (5 + BATCH_PAGES, BATCH_PAGES),
        (5 + 2 * BATCH_PAGES, 3),
    ]
    assert {each.lsn for each in asked} == {1000}
    for request in reversed(asked):
        bench.wires[0].answer(request)
    assert await reading == expected(5, 2 * BATCH_PAGES + 3)
    assert bench.client.pages_fetched == 2 * BATCH_PAGES + 3


async def test_what_was_fetched_ahead_is_not_asked_for_again(bench: Bench) -> None:
    bench.client.prefetch(REL, 10, 20)
    [ahead] = await bench.asked(1)
    reading = asyncio.create_task(bench.client.pages(REL, 8, 6))  # before it has come
    asked = await bench.asked(2)
    assert (asked[1].block, asked[1].count) == (8, 2)
    bench.wires[0].answer(ahead)
    bench.wires[0].answer(asked[1])
    assert await reading == expected(8, 6)
    assert await bench.client.pages(REL, 14, 16) == expected(14, 16)  # after
    assert len(bench.wires[0].asked) == 2
    again = asyncio.create_task(bench.client.pages(REL, 14, 1))  # handed over once: the kernel keeps it
    bench.wires[0].answer((await bench.asked(3))[2])
    assert await again == expected(14, 1)


async def test_what_waits_to_be_asked_for_is_bounded(bench: Bench) -> None:
    for start in range(0, 10 * MAX_AHEAD_PAGES, BATCH_PAGES):
        bench.client.prefetch(REL, start, BATCH_PAGES)
        asked = len(bench.wires[0].asked) if bench.wires else 0
        await asyncio.sleep(0)
        for request in bench.wires[0].asked[asked:] if bench.wires else []:
            bench.wires[0].answer(request)
    assert len(bench.client._ahead) <= MAX_AHEAD_PAGES


async def test_one_page_that_is_left_does_not_hold_more_than_is_allowed(bench: Bench) -> None:
    batches = MAX_AHEAD_PAGES // BATCH_PAGES + 5
    for start in range(0, batches * BATCH_PAGES, BATCH_PAGES):
        bench.client.prefetch(REL, start, BATCH_PAGES)
        while not bench.wires or len(bench.wires[0].asked) * BATCH_PAGES <= start:  # noqa: ASYNC110 - a few turns of the loop are missing
            await asyncio.sleep(0)
        bench.wires[0].answer(bench.wires[0].asked[-1])
        assert len(await bench.client.pages(REL, start, BATCH_PAGES - 1)) == BATCH_PAGES - 1
    held = set(bench.client._ahead.values())
    assert sum(len(batch.task.result()) for batch in held) == MAX_AHEAD_PAGES
    # The oldest are forgotten, the newest are there.
    asked = len(bench.wires[0].asked)
    last = batches * BATCH_PAGES - 1
    assert await bench.client.pages(REL, last, 1) == expected(last, 1)
    assert len(bench.wires[0].asked) == asked


async def test_what_could_not_be_fetched_ahead_is_asked_for_when_it_is_wanted(bench: Bench) -> None:
    for before in (True, False):  # it failed before it was wanted, and after
        bench.client.prefetch(REL, 10, 4)
        [ahead] = (await bench.asked(1 if before else 3))[-1:]
        reading = None if before else asyncio.create_task(bench.client.pages(REL, 11, 2))
        await asyncio.sleep(0)
        bench.wires[0].say(ErrorFrame.of(ahead.request_id, NotFoundError("an outage")).pack())
        await wait_until(lambda: not bench.client._ahead)
        reading = reading or asyncio.create_task(bench.client.pages(REL, 11, 2))
        [again] = (await bench.asked(2 if before else 4))[-1:]
        assert (again.block, again.count) == (11, 2)
        bench.wires[0].answer(again)
        assert await reading == expected(11, 2)


async def test_a_lost_connection_is_made_anew_and_asked_again(bench: Bench) -> None:
    reading = asyncio.create_task(bench.client.pages(REL, 0, 2))
    await bench.asked(1)
    bench.wires[0].break_off()
    [again] = await bench.asked(1, wire=1)
    bench.wires[1].answer(again)
    assert await reading == expected(0, 2)


@pytest.mark.parametrize("error", [NotFoundError("no such block"), CorruptedError("a layer is damaged")])
async def test_a_final_error_is_handed_on(bench: Bench, error: KeylakeError) -> None:
    reading = asyncio.create_task(bench.client.pages(REL, 0, 1))
    [request] = await bench.asked(1)
    bench.wires[0].say(ErrorFrame.of(request.request_id, error).pack())
    with pytest.raises(type(error)):
        await reading
    assert len(bench.wires) == 1


async def test_an_error_that_may_pass_is_asked_about_again(bench: Bench) -> None:
    reading = asyncio.create_task(bench.client.pages(REL, 0, 1))
    [request] = await bench.asked(1)
    bench.wires[0].say(ErrorFrame.of(request.request_id, UnavailableError("loading")).pack())
    asked = await bench.asked(2)
    bench.wires[0].answer(asked[1])
    assert await reading == expected(0, 1)


@pytest.mark.parametrize("nonsense", [pack_frame(0x99, bytes(8)), pack_frame(pagestream.PAGES, bytes(100))])
async def test_nonsense_ends_the_connection_and_not_the_volume(bench: Bench, nonsense: bytes) -> None:
    reading = asyncio.create_task(bench.client.pages(REL, 0, 1))
    await bench.asked(1)
    bench.wires[0].say(nonsense)
    [again] = await bench.asked(1, wire=1)
    bench.wires[1].answer(again)
    assert await reading == expected(0, 1)


async def test_another_number_of_pages_is_refused(bench: Bench) -> None:
    reading = asyncio.create_task(bench.client.pages(REL, 0, 2))
    [request] = await bench.asked(1)
    bench.wires[0].say(pagestream.pack_pages(request.request_id, [page(0)]))
    with pytest.raises(KeylakeError):
        await reading


async def test_a_pageserver_that_stays_away_is_an_error_after_a_while() -> None:
    async def nobody() -> Any:
        raise UnavailableError("away")

    client = PageClient(nobody, Lsn(1000), timeout_s=0.3)
    with pytest.raises(UnavailableError, match="in time"):
        await client.pages(REL, 0, 1)
    await client.close()
