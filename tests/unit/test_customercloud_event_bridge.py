"""The simulated EventBridge, delivering to a server that has its days."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from customercloud.aws.event_bridge import EventBridge, EventTarget
from shared.errors import InvalidInputError

ACCOUNT = "111122223333"
RECORD: dict[str, Any] = {
    "eventSource": "kms.amazonaws.com",
    "eventName": "DisableKey",
    "eventType": "AwsApiCall",
    "eventTime": "2026-11-27T10:00:00Z",
    "awsRegion": "us-west-2",
    "recipientAccountId": ACCOUNT,
}


@dataclass
class Target:
    """Answers with these statuses, one after the other."""

    statuses: list[int]
    port: int = 0
    heard: asyncio.Queue[tuple[bytes, dict[str, Any]]] = field(default_factory=asyncio.Queue)
    """(head, event) of each request."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        size_bytes = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
        event = json.loads(await reader.readexactly(size_bytes))
        writer.write(b"HTTP/1.1 %d x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % self.statuses.pop(0))
        await writer.drain()
        writer.close()
        self.heard.put_nowait((head, event))


@asynccontextmanager
async def bridge_to(target: Target) -> AsyncIterator[EventBridge]:
    bridge = EventBridge()
    async with await asyncio.start_server(target.serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        bridge.set_target(ACCOUNT, EventTarget(url=f"http://127.0.0.1:{port}/v1/kms-events", token="sesame"))
        yield bridge
        await bridge.close()


async def under_way(bridge: EventBridge) -> None:
    """Until nothing is."""
    await asyncio.gather(*bridge._under_way)


async def test_an_overloaded_target_is_tried_again_and_gets_the_same_event() -> None:
    target = Target([503, 429, 202])
    async with bridge_to(target) as bridge:
        bridge.publish([RECORD])
        await under_way(bridge)
    heard = [target.heard.get_nowait() for _ in range(target.heard.qsize())]
    assert len(heard) == 3
    assert len({event["id"] for _, event in heard}) == 1
    head, event = heard[-1]
    assert b"\r\nauthorization: bearer sesame\r\n" in head
    assert (event["source"], event["detail-type"], event["account"]) == (
        "aws.kms",
        "AWS API Call via CloudTrail",
        ACCOUNT,
    )
    assert event["detail"] == RECORD


async def test_a_target_that_refuses_is_left_alone() -> None:
    target = Target([401])
    async with bridge_to(target) as bridge:
        bridge.publish([RECORD])
        await under_way(bridge)
    assert target.heard.qsize() == 1


async def test_only_changes_of_keys_of_an_account_with_a_target_are_sent() -> None:
    target = Target([])
    async with bridge_to(target) as bridge:
        bridge.publish(
            [
                RECORD | {"eventName": "Decrypt"},
                RECORD | {"eventSource": "sts.amazonaws.com"},
                RECORD | {"recipientAccountId": "444455556666"},
            ]
        )
        assert not bridge._under_way
        bridge.remove_target(ACCOUNT)
        bridge.publish([RECORD])
        assert not bridge._under_way


async def test_a_certificate_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidInputError):
        EventBridge().set_target(ACCOUNT, EventTarget(url="https://x", token="t", ca_certificate="no PEM"))
