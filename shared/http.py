"""Client of our own HTTP APIs: TLS to a named service, a token on every request, errors as the exceptions they
were.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from shared.api.common import ErrorBody
from shared.auth import Credentials, Scope, Service
from shared.config import Address
from shared.errors import ERRORS_BY_CODE, CorruptedError, KeyAccessError, KeylakeError, NotLeaderError, UnavailableError
from shared.ids import ProjectId
from shared.retry import RetryPolicy
from shared.tls import client_context, service_host_name
from shared.tracing import Kind, current, span

Model = TypeVar("Model", bound=BaseModel)
_SAFE_METHODS: Final = frozenset({"GET", "HEAD"})
"""RFC 9110, section 9.2.1."""
_ROUNDS: Final = RetryPolicy(attempts=1, first_delay_s=0.1, max_delay_s=1.0)
_CONNECT_TIMEOUT_S: Final = 1.5
"""Where there are others to ask."""


class _NoAnswerError(UnavailableError):
    """It may have been done."""


class _NobodyThereError(_NoAnswerError):
    """No connection was made, so nothing can have been done."""


def error_from_response(response: httpx.Response) -> KeylakeError:
    """The exception that the peer raised; UnavailableError for a bare 5xx of something in between."""
    try:
        body = ErrorBody.model_validate_json(response.content)
    except ValidationError:
        return UnavailableError(f"HTTP {response.status_code} without an error body")
    error = ERRORS_BY_CODE.get(body.code, KeylakeError)(body.message)
    if isinstance(error, KeyAccessError):
        error.workspace_id = body.workspace_id
    return error


class ServiceClient:
    """Calls one service. Use as an async context manager, or call `aclose`."""

    def __init__(
        self,
        service: Service,
        address: Address | Sequence[Address],
        ca_certificate: Path,
        credentials: Credentials,
        scopes: frozenset[Scope],
        *,
        timeout_s: float = 10.0,
        rng: random.Random | None = None,
    ) -> None:
        """`address`: of all replicas, when there are several; the one that leads is found, and found again."""
        self._service = service
        self._addresses = deque((address,) if isinstance(address, Address) else address)
        self._credentials = credentials
        self._scopes = scopes
        self._timeout_s = timeout_s
        self._rng = rng or random.SystemRandom()
        self._extensions = {"sni_hostname": service_host_name(service.value)}
        self._http = httpx.AsyncClient(
            base_url=f"https://{self._addresses[0]}",
            verify=client_context(ca_certificate),
            timeout=timeout_s,
            trust_env=False,
        )

    async def __aenter__(self) -> ServiceClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: BaseModel | None = None,
        params: dict[str, Any] | None = None,
        project_id: ProjectId | None = None,
        timeout_s: float | None = None,
    ) -> httpx.Response:
        """One request. With one address, no retries. With several, the next one is asked where nothing can have been
        done: nobody listens there, another one leads, or it is a GET; with growing pauses after each round, until the
        time is up.
        `project_id` narrows the token to that project.

        Raises the peer's error, or UnavailableError when the peer cannot be reached or does not answer in time.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        give_up_s = time.monotonic() + timeout_s
        for attempt in itertools.count(1):
            address = self._addresses[0]
            token = self._credentials.issue(self._service, self._scopes, project_id=project_id)
            try:
                return await self._once(address, method, path, token, body, params, timeout_s)
            except (_NoAnswerError, NotLeaderError) as error:
                if len(self._addresses) == 1:
                    raise
                if self._addresses[0] == address:  # nobody else has found that out meanwhile
                    self._addresses.rotate(-1)
                if type(error) is _NoAnswerError and method not in _SAFE_METHODS:
                    raise  # it may have been done
                rounds, in_round = divmod(attempt, len(self._addresses))
                pause_s = 0.0 if in_round else _ROUNDS.delay_s(rounds, self._rng)
                if time.monotonic() + pause_s >= give_up_s:
                    raise
                await asyncio.sleep(pause_s)
        raise AssertionError("unreachable")

    async def _once(
        self,
        address: Address,
        method: str,
        path: str,
        token: str,
        body: BaseModel | None,
        params: dict[str, Any] | None,
        timeout_s: float,
    ) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"}
        parent = current()
        if parent is None:
            return await self._send(address, method, path, headers, body, params, timeout_s)
        with span(f"{method} {self._service.value}", Kind.CLIENT, parent) as calling:
            calling.attributes |= {"http.request.method": method, "peer.service": self._service.value}
            headers["traceparent"] = calling.context.traceparent
            return await self._send(address, method, path, headers, body, params, timeout_s)

    async def _send(
        self,
        address: Address,
        method: str,
        path: str,
        headers: dict[str, str],
        body: BaseModel | None,
        params: dict[str, Any] | None,
        timeout_s: float,
    ) -> httpx.Response:
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            response = await self._http.request(
                method,
                f"https://{address}{path}",
                content=None if body is None else body.model_dump_json(),
                params=params,
                headers=headers,
                extensions=self._extensions,
                timeout=httpx.Timeout(timeout_s, connect=self._connect_timeout_s(timeout_s)),
            )
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _NobodyThereError(f"{self._service.value} cannot be reached: {type(error).__name__}") from None
        except httpx.HTTPError as error:
            raise _NoAnswerError(f"{self._service.value} cannot be reached: {type(error).__name__}") from None
        if response.is_success:
            return response
        raise error_from_response(response)

    def _connect_timeout_s(self, timeout_s: float) -> float:
        return timeout_s if len(self._addresses) == 1 else min(timeout_s, _CONNECT_TIMEOUT_S)

    async def call(
        self,
        answer: type[Model],
        method: str,
        path: str,
        *,
        body: BaseModel | None = None,
        params: dict[str, Any] | None = None,
        project_id: ProjectId | None = None,
        timeout_s: float | None = None,
    ) -> Model:
        """As `request`, with the answer parsed. Raises CorruptedError for an answer of another shape."""
        response = await self.request(
            method, path, body=body, params=params, project_id=project_id, timeout_s=timeout_s
        )
        try:
            return answer.model_validate_json(response.content)
        except ValidationError:
            raise CorruptedError(f"{self._service.value} answered something that is not {answer.__name__}") from None
