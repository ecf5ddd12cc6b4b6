"""What leaves a keymanager, and when: the front with a term that ends at the worst moments."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.types import Message

from keymanager.front import Front, Serving
from keymanager.leadership import Term
from shared.clock import ManualClock

TTL_S = 1.5
SECRET = "what only a leader may say"


class Bench:
    def __init__(self, max_requests: int = 4) -> None:
        self.clock = ManualClock()
        self.term = Term(1, self.clock.monotonic_s(), TTL_S, self.clock)
        self.go_on = asyncio.Event()
        self.arrived = asyncio.Semaphore(0)
        api, standby = FastAPI(), FastAPI()

        @api.get("/at-once")
        async def at_once() -> PlainTextResponse:
            return PlainTextResponse(SECRET)

        @api.post("/waits")
        async def waits() -> PlainTextResponse:
            self.arrived.release()
            await self.go_on.wait()
            return PlainTextResponse(SECRET, status_code=201)

        @api.get("/in-parts")
        async def in_parts() -> StreamingResponse:
            async def parts() -> AsyncIterator[str]:
                yield "harmless"
                self.clock.advance(TTL_S)
                yield SECRET

            return StreamingResponse(parts())

        @standby.get("/{path:path}")
        async def refuse(path: str) -> PlainTextResponse:
            return PlainTextResponse("standby", status_code=503)

        self.front = Front(standby, max_requests, 1)
        self.front.serving = Serving(self.term, api)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.front), base_url="https://keymanager")


async def test_answers_of_a_leader_leave_as_they_are() -> None:
    bench = Bench()
    answer = await bench.http.get("/at-once")
    assert (answer.status_code, answer.text) == (200, SECRET)
    assert answer.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize("how", ["runs out", "is ended"])
async def test_answer_that_is_ready_after_the_term_is_withheld(how: str) -> None:
    bench = Bench()
    asking = asyncio.create_task(bench.http.post("/waits"))
    await bench.arrived.acquire()
    if how == "runs out":
        bench.clock.advance(TTL_S)
    else:
        bench.term.end()
    bench.go_on.set()
    answer = await asking
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert SECRET not in answer.text
    assert (await bench.http.get("/at-once")).text == "standby"


async def test_rest_of_an_answer_is_withheld_when_the_term_ends_in_its_middle() -> None:
    bench = Bench()
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError("there is no body")

    scope = {"type": "http", "method": "GET", "path": "/in-parts", "query_string": b"", "headers": []}
    with contextlib.suppress(Exception):  # whatever it is, the server ends the connection
        await bench.front(scope, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[-1] == {"type": "http.response.body", "body": b"harmless", "more_body": True}


async def test_what_is_too_much_is_refused_and_room_is_given_back() -> None:
    bench = Bench(max_requests=2)
    asking = [asyncio.create_task(bench.http.post("/waits")) for _ in range(2)]
    for _ in asking:
        await bench.arrived.acquire()
    for _ in range(3):
        answer = await bench.http.get("/at-once")
        assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (503, "overloaded", True)
    bench.go_on.set()
    assert [(await each).status_code for each in asking] == [201, 201]
    assert (await bench.http.get("/at-once")).status_code == 200
