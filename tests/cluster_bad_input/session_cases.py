"""Attacks on the keymanager's WebSocket, which is in no schema: key sessions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from shared.api.common import ErrorBody
from shared.api.keymanager import CLOSE_PERMISSION_DENIED, CLOSE_PROTOCOL, Hello, Role
from shared.auth import Scope, Service
from shared.ids import InstanceId
from shared.tls import client_context, service_host_name
from tests.cluster_bad_input.http_cases import Attempt
from tests.cluster_bad_input.place import CANARY, Place
from tests.cluster_bad_input.tokens import wrong_tokens

_TOO_BIG: Final = 1009


def _hello(**changes: Any) -> str:
    hello = Hello(role=Role.PROXY, node_id="proxy", instance_id=InstanceId.new(), transport_public=bytes(32))
    return json.dumps(hello.model_dump(mode="json") | changes)


def attempts(place: Place) -> Iterator[Attempt]:
    for about, (token, status) in wrong_tokens(place, Service.KEYMANAGER, {Scope.KEYS_SESSION}).items():
        yield _not_opened(place, about, token, status)
    first: dict[str, tuple[str | bytes, int]] = {
        "nothing": ("", CLOSE_PROTOCOL),
        "no JSON": (f"no JSON {CANARY}", CLOSE_PROTOCOL),
        "bytes": (b"\xff\xfe", CLOSE_PROTOCOL),
        "a Hello in bytes": (_hello().encode(), CLOSE_PROTOCOL),
        "no operation": (json.dumps({"x": CANARY}), CLOSE_PROTOCOL),
        "an unknown operation": (json.dumps({"op": CANARY}), CLOSE_PROTOCOL),
        "a key first": (json.dumps({"op": "renew", "request_id": 1, "project_ids": []}), CLOSE_PROTOCOL),
        "nested too deep": ("[" * 100_000, CLOSE_PROTOCOL),
        "half a surrogate": ('{"op": "hello", "node_id": "\\ud800"}', CLOSE_PROTOCOL),
        "too long": ("x" * (1024 * 1024 + 1), _TOO_BIG),
        "an unknown role": (_hello(role="root"), CLOSE_PROTOCOL),
        "a node with a NUL": (_hello(node_id="a\0b"), CLOSE_PROTOCOL),
        "a malformed instance": (_hello(instance_id="in-x"), CLOSE_PROTOCOL),
        "a short key": (_hello(transport_public="AAAA"), CLOSE_PROTOCOL),
        "a key of no use": (_hello(), CLOSE_PROTOCOL),
        "more than a Hello has": (_hello(secret=CANARY), CLOSE_PROTOCOL),
    }
    for about, (message, code) in first.items():
        yield _closed(place, about, message, code)
    # A good key, for a name that belongs to somebody else.
    point = "CQ" + "A" * 41 + "="
    stolen = _hello(node_id="pageserver", role="pageserver", transport_public=point)
    yield _closed(place, "somebody else's name", stolen, CLOSE_PERMISSION_DENIED)


def _connect(place: Place, token: str | None) -> connect:
    return connect(
        f"wss://{place.address('keymanager')}/v1/session",
        ssl=client_context(place.ca_certificate),
        server_hostname=service_host_name("keymanager"),
        additional_headers={} if token is None else {"Authorization": f"Bearer {token}"},
        proxy=None,
    )


async def _not_opened(place: Place, about: str, token: str | None, status: int) -> None:
    with pytest.raises(InvalidStatus) as caught:
        async with _connect(place, token):
            pass
    response = caught.value.response
    assert response.status_code == status, (about, response)
    ErrorBody.model_validate_json(response.body)
    assert CANARY.encode() not in response.body


async def _closed(place: Place, about: str, message: str | bytes, code: int) -> None:
    token = place.issuers["proxy"].issue(Service.KEYMANAGER, [Scope.KEYS_SESSION])
    async with _connect(place, token) as socket:
        await socket.send(message)
        with pytest.raises(ConnectionClosed) as caught:
            await socket.recv()
    close = caught.value.rcvd
    assert close is not None, about
    assert close.code == code, (about, close)
    assert CANARY not in close.reason, (about, close)
