"""One client, several addresses: the one that leads is found, and nothing is asked twice that may have been done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CollectorRegistry

from keylake.ports import free_port
from shared.auth import Scope, Service, TokenIssuer, TokenVerifier, TrustBundle
from shared.config import Address
from shared.errors import ConflictError, NotLeaderError, UnavailableError
from shared.http import ServiceClient
from shared.service import HttpServer, Readiness, create_service_app
from shared.tls import CertificateAuthority, service_host_name
from tests.fixtures.waiting import wait_until


class Replica:
    """Answers `POST /v1/work` as it is told to."""

    def __init__(self, verifier: TokenVerifier) -> None:
        self.asked = 0
        self.answer: Callable[[], None] = lambda: None
        self.hang_s = 0.0
        self.breaks_off = False
        self.address = Address(port=0)
        self.app: FastAPI = create_service_app(Service.KEYMANAGER, CollectorRegistry(), Readiness(), verifier)

        @self.app.get("/v1/work")
        async def look() -> Response:
            async def parts() -> AsyncIterator[bytes]:
                yield b"wh"
                if self.breaks_off:
                    raise ConnectionError("as if the process had died")
                yield b"ole"

            self.asked += 1
            return StreamingResponse(parts())

        @self.app.post("/v1/work")
        async def work() -> dict[str, str]:
            self.asked += 1
            await asyncio.sleep(self.hang_s)
            self.answer()
            return {}

    def stand_by(self) -> None:
        def refuse() -> None:
            raise NotLeaderError("another one leads")

        self.answer = refuse


class Bench:
    def __init__(self, replicas: list[Replica], ca_certificate: Path, issuer: TokenIssuer) -> None:
        self.replicas = replicas
        self._ca_certificate = ca_certificate
        self._issuer = issuer

    def client(self, *addresses: Address, timeout_s: float = 10.0) -> ServiceClient:
        known = addresses or tuple(replica.address for replica in self.replicas)
        return ServiceClient(
            Service.KEYMANAGER, known, self._ca_certificate, self._issuer, self._issuer.scopes, timeout_s=timeout_s
        )


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    authority = CertificateAuthority()
    (tmp_path / "ca.crt").write_bytes(authority.certificate_pem)
    files = authority.issue_files(tmp_path, "keymanager", [service_host_name("keymanager")])
    issuer = TokenIssuer.create("admin", {Scope.STATUS_READ})
    verifier = TokenVerifier(TrustBundle.of([issuer]), Service.KEYMANAGER)
    replicas = [Replica(verifier) for _ in range(3)]
    async with AsyncExitStack() as stack:
        for replica in replicas:
            server = await stack.enter_async_context(HttpServer(replica.app, Address(port=0), files))
            replica.address = Address(port=server.port)
        yield Bench(replicas, tmp_path / "ca.crt", issuer)


async def test_the_leader_is_found_and_remembered(bench: Bench) -> None:
    first, second, leader = bench.replicas
    first.stand_by()
    second.stand_by()
    nobody = Address(port=free_port())
    async with bench.client(nobody, *(replica.address for replica in bench.replicas)) as client:
        for _ in range(3):
            await client.request("POST", "/v1/work")
        assert [replica.asked for replica in bench.replicas] == [1, 1, 3]
        leader.stand_by()
        first.answer = lambda: None
        await client.request("POST", "/v1/work")
        assert [replica.asked for replica in bench.replicas] == [2, 1, 4]


async def test_a_takeover_is_waited_for(bench: Bench) -> None:
    for replica in bench.replicas:
        replica.stand_by()
    async with bench.client() as client:
        asking = asyncio.create_task(client.request("POST", "/v1/work"))
        await wait_until(lambda: min(replica.asked for replica in bench.replicas) >= 2)
        assert not asking.done()
        bench.replicas[1].answer = lambda: None
        assert (await asking).is_success


async def test_patience_ends_with_the_timeout(bench: Bench) -> None:
    for replica in bench.replicas:
        replica.stand_by()
    async with bench.client(timeout_s=0.5) as client:
        with pytest.raises(NotLeaderError):
            await client.request("POST", "/v1/work")
    # Rounds with growing pauses: not as fast as it can.
    assert sum(replica.asked for replica in bench.replicas) < 60


async def test_what_may_have_been_done_is_not_asked_again(bench: Bench) -> None:
    first, *others = bench.replicas

    def withheld() -> None:
        raise UnavailableError("it may have been done")

    def conflict() -> None:
        raise ConflictError("not in this state")

    for answer, error in ((withheld, UnavailableError), (conflict, ConflictError)):
        first.answer = answer
        async with bench.client() as client:
            with pytest.raises(error) as raised:
                await client.request("POST", "/v1/work")
            assert type(raised.value) is error
    first.answer, first.hang_s = (lambda: None), 30.0
    async with bench.client() as client:
        with pytest.raises(UnavailableError):
            await client.request("POST", "/v1/work", timeout_s=0.3)
        assert [replica.asked for replica in others] == [0, 0]
        await client.request("POST", "/v1/work")  # the next request goes to somebody else
        assert [replica.asked for replica in others] == [1, 0]
    assert first.asked == 3


async def test_what_changes_nothing_is_asked_again_when_the_answer_does_not_come(bench: Bench) -> None:
    first, second, _ = bench.replicas
    first.breaks_off = True
    async with bench.client() as client:
        assert (await client.request("GET", "/v1/work")).content == b"whole"
    assert (first.asked, second.asked) == (1, 1)


async def test_one_address_is_asked_once(bench: Bench) -> None:
    [first, *_] = bench.replicas
    first.stand_by()
    async with bench.client(first.address) as client:
        with pytest.raises(NotLeaderError):
            await client.request("POST", "/v1/work")
    assert first.asked == 1
    async with bench.client(Address(port=free_port())) as client:
        with pytest.raises(UnavailableError):
            await client.request("POST", "/v1/work")
