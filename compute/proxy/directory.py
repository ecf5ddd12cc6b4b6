"""Where the compute of an endpoint is: asked of the manager, which wakes it, and remembered while it works."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import Final

from compute.agent.tunnel import TUNNEL_HOST_NAME, tunnel_client_context
from compute.proxy.first_row import FirstRow
from shared.addresses import through_addresses
from shared.api.compute import MAX_STAGE_S, Admission, ConnectTarget, FirstQuery, LogIn
from shared.api.safekeeper import ComputeAddress
from shared.errors import KeylakeError
from shared.http import ServiceClient
from shared.ids import EndpointId
from shared.telemetry import get_logger
from shared.wire.scram import ScramVerifier

_log = get_logger(__name__)
_CONNECT_TIMEOUT_S: Final = 5.0


Answer = ConnectTarget | ScramVerifier


@dataclass(slots=True)
class _Question:
    task: asyncio.Task[Answer]
    waiting: int = 0


class Directory:
    def __init__(self, manager: ServiceClient, wake_timeout_s: float) -> None:
        self._manager = manager
        self._wake_timeout_s = wake_timeout_s
        self._known: dict[EndpointId, ConnectTarget] = {}
        self._asking: dict[tuple[EndpointId, bytes | None], _Question] = {}
        self._telling: set[asyncio.Task[None]] = set()

    async def find(self, endpoint_id: EndpointId) -> ConnectTarget:
        """Wakes the endpoint. However many wait, the manager is asked once.

        Raises what the manager raises, UnavailableError when it cannot be reached or takes too long."""
        known = self._known.get(endpoint_id)
        if known is not None:
            return known
        answer = await self._answer(endpoint_id, None)
        assert isinstance(answer, ConnectTarget)  # noqa: S101 - nothing else was asked
        return answer

    async def admit(self, endpoint_id: EndpointId, user: bytes) -> Answer:
        """As `find`, for a client who has not proved anything yet. A verifier: the endpoint does not run; `find` it for
        who proves that he knows this role's password."""
        return self._known.get(endpoint_id) or await self._answer(endpoint_id, user)

    async def _answer(self, endpoint_id: EndpointId, user: bytes | None) -> Answer:
        key = (endpoint_id, user)
        question = self._asking.get(key)
        if question is None:
            question = self._asking[key] = _Question(asyncio.create_task(self._ask(endpoint_id, user)))
        question.waiting += 1
        try:
            return await asyncio.shield(question.task)
        finally:
            question.waiting -= 1
            if not question.waiting:  # answered, or nobody wants to know any more
                if self._asking.get(key) is question:
                    del self._asking[key]
                question.task.cancel()

    async def _ask(self, endpoint_id: EndpointId, user: bytes | None) -> Answer:
        path, timeout_s = f"/v1/endpoints/{endpoint_id}", self._wake_timeout_s
        if user is None:
            target = await self._manager.call(ConnectTarget, "POST", f"{path}:connect", timeout_s=timeout_s)
        else:
            body = LogIn(user_hex=user.hex())
            admission = await self._manager.call(Admission, "POST", f"{path}:log-in", body=body, timeout_s=timeout_s)
            if admission.verifier is not None:
                return ScramVerifier.parse(admission.verifier)
            assert admission.target is not None  # noqa: S101 - one of the two
            target = admission.target
        self._known[endpoint_id] = target
        return target

    def first_row(self, target: ConnectTarget) -> FirstRow | None:
        """For a session that begins now: the manager is told of the first row of a compute. None: it knows."""
        known = self._known.get(target.endpoint_id)
        if known is None or known.instance_id != target.instance_id or not known.wants_first_query:
            return None
        return FirstRow(
            asyncio.get_running_loop().time, lambda login_s, query_s: self._first_query(target, login_s, query_s)
        )

    def _first_query(self, target: ConnectTarget, login_s: float, query_s: float) -> None:
        known = self._known.get(target.endpoint_id)
        if known is None or known.instance_id != target.instance_id or not known.wants_first_query:
            return  # another session was faster
        self._known[target.endpoint_id] = known.model_copy(update={"wants_first_query": False})
        seen = FirstQuery(
            instance_id=target.instance_id, login_s=min(login_s, MAX_STAGE_S), query_s=min(query_s, MAX_STAGE_S)
        )
        task = asyncio.create_task(self._tell(target.endpoint_id, seen), name="first query")
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _tell(self, endpoint_id: EndpointId, seen: FirstQuery) -> None:
        try:
            await self._manager.request("POST", f"/v1/endpoints/{endpoint_id}:first-query", body=seen)
        except KeylakeError as error:
            _log.info("the time of a first query was not told", endpoint_id=str(endpoint_id), reason=str(error))

    def forget(self, target: ConnectTarget) -> None:
        """It does not answer there any more."""
        known = self._known.get(target.endpoint_id)
        if known is not None and known.instance_id == target.instance_id:
            del self._known[target.endpoint_id]


def socket_path(compute: ComputeAddress) -> str:
    return f"{compute.host}/.s.PGSQL.{compute.port}"


async def open_compute(compute: ComputeAddress, protocol: asyncio.BaseProtocol) -> None:
    """Connect to a compute's Postgres: over its Unix socket, or through its agent's TLS tunnel with the pinned
    certificate. Raises OSError, TimeoutError."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(_CONNECT_TIMEOUT_S):
        if compute.certificate_pem is None:
            await loop.create_unix_connection(lambda: protocol, socket_path(compute))
        else:
            context: ssl.SSLContext = tunnel_client_context(compute.certificate_pem)
            await through_addresses(
                compute.host,
                compute.port,
                lambda address: loop.create_connection(
                    lambda: protocol, address, compute.port, ssl=context, server_hostname=TUNNEL_HOST_NAME
                ),
            )
