"""The REST side: routes under `/v1/`, and the token endpoint."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from customercloud.google.errors import Code, GoogleError
from customercloud.google.names import LOCATIONS, location_of
from customercloud.google.service import Carrier, GatewayFaultError, GoogleEndpoint
from customercloud.google.transcoding import enums_as_ints, find_route, read_request, write_answer

_JSON: Final = "application/json; charset=UTF-8"
_HTML_502: Final = b"<html><head><title>502 Server Error</title></head><body>Server Error</body></html>"
_CHALLENGE: Final = 'Bearer realm="https://accounts.google.com/", error="invalid_token"'


@dataclass(frozen=True, slots=True)
class RestRequest:
    method: str
    path: str
    query: str
    headers: dict[str, str]
    """Lower-case names."""
    body: bytes
    address: str
    disconnected: Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class RestAnswer:
    status: int
    headers: dict[str, str]
    body: bytes


class RestSide:
    def __init__(self, endpoint: GoogleEndpoint) -> None:
        self._endpoint = endpoint

    async def handle(self, request: RestRequest) -> RestAnswer:
        location = location_of(request.path.removeprefix("/v1/"))
        # A URL names the location itself, so REST requests are never sent to the wrong one, only to none.
        routed_to = location if location in LOCATIONS else "global"
        carrier = Carrier(request.address, request.headers, routed_to or "global", request.disconnected)
        try:
            if request.path == "/token" and request.method == "POST":
                answer = await self._endpoint.exchange_token(request.body, carrier)
                return RestAnswer(answer.status, {"content-type": _JSON, "cache-control": "no-store"}, answer.body)
            return await self._call(request, carrier)
        except GoogleError as error:
            headers = {"content-type": _JSON}
            if error.code is Code.UNAUTHENTICATED:
                headers["www-authenticate"] = _CHALLENGE
            return RestAnswer(error.code.http_status, headers, json.dumps(error.body()).encode())
        except GatewayFaultError as fault:
            if fault.http_status == 502:
                return RestAnswer(502, {"content-type": "text/html"}, _HTML_502)
            return RestAnswer(fault.http_status, {"content-type": "text/plain"}, b"Service Unavailable")

    async def _call(self, request: RestRequest, carrier: Carrier) -> RestAnswer:
        match = find_route(request.method, request.path)
        if match is None:
            raise GoogleError(Code.NOT_FOUND, "Method not found.")
        operation = self._endpoint.operations[match.route.api, match.route.operation]
        answer = await self._endpoint.invoke(
            operation, lambda: read_request(match, operation.request(), request.query, request.body), carrier
        )
        body = write_answer(answer, enums_as_ints=enums_as_ints(request.query))
        return RestAnswer(200, {"content-type": _JSON}, body)
