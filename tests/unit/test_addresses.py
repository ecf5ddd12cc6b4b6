"""A name's addresses are tried in turn, and nothing is left behind of a connection that was given up."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from compute.proxy.directory import open_compute
from shared.addresses import through_addresses
from shared.api.safekeeper import ComputeAddress
from shared.auth import Service
from shared.config import Address
from shared.framed_tcp import connect
from shared.keysession import dial_over_tls
from shared.tls import client_context
from tests.fixtures.realm import Realm
from tests.fixtures.sockets import LOOP_NAMES, LOOPS

NOBODY = "nobody.invalid"


@pytest.mark.parametrize("run", LOOPS, ids=LOOP_NAMES)
def test_a_look_up_that_nobody_waits_for_any_more_says_nothing(
    run: Callable[[Coroutine[Any, Any, None]], None], tmp_path: Path
) -> None:
    realm = Realm.create(tmp_path)
    context = client_context(realm.ca_certificate)
    pem = realm.identity(Service.COMPUTE).files.certificate.read_text()
    told: list[dict[str, Any]] = []

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, problem: told.append(problem))
        compute = ComputeAddress(host=NOBODY, port=1, certificate_pem=pem)
        ways: tuple[Awaitable[Any], ...] = (
            connect(Service.SAFEKEEPER, Address(host=NOBODY, port=1), context, "token", 1000),
            dial_over_tls(context)(Address(host=NOBODY, port=1), "token", 5.0),
            open_compute(compute, asyncio.Protocol()),
        )
        tasks = [asyncio.ensure_future(way) for way in ways]
        await asyncio.sleep(0)  # each has begun to look the name up
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        del task, tasks
        with pytest.raises(socket.gaierror):
            await loop.getaddrinfo(NOBODY, 1)  # in turn: the others have ended, too
        await asyncio.sleep(0)
        gc.collect()

    run(scenario())
    assert not told


async def test_addresses_are_tried_until_one_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def found(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        assert (host, port) == ("both", 7)
        return [(None, None, None, "", (address, port)) for address in ("::1", "::1", "127.0.0.1", "127.0.0.2")]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", found)
    tried = []

    async def connect_to(address: str) -> str:
        tried.append(address)
        if address != "127.0.0.2":
            raise ConnectionRefusedError
        return "connected"

    assert await through_addresses("both", 7, connect_to) == "connected"
    assert tried == ["::1", "127.0.0.1", "127.0.0.2"]

    async def out_of_time(address: str) -> str:
        tried.append(address)
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await through_addresses("both", 7, out_of_time)
    assert tried == ["::1", "127.0.0.1", "127.0.0.2", "::1"]
