"""The proxy in front of an endpoint that does not run: the password is proved before anything is started."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest

from shared.api.safekeeper import ComputeAddress
from shared.ids import EndpointId
from shared.wire.pgauth import SASLInitialResponse, SASLResponse
from shared.wire.pgproto import ErrorResponse, NegotiateProtocolVersion, Terminate
from shared.wire.pgstartup import PROTOCOL_3_0, StartupMessage
from shared.wire.scram import MECHANISM, ScramClient, ScramKeys, ScramVerifier
from tests.cluster_secrecy import memory
from tests.fixtures.proxy import Backend, ProxyBench, proxy_bench, running_backend
from tests.fixtures.waiting import wait_until

pytestmark = pytest.mark.integration

SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"
ROLES = {"anna": "s3cret", "Zoë O'Hara": "caf\u00e9 =,"}


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with running_backend() as running:
        yield running


@pytest.fixture(scope="module")
def verifiers(backend: Backend) -> dict[str, ScramVerifier]:
    """What Postgres made of passwords that it was told, of one with other iterations than usual."""

    async def make() -> dict[str, ScramVerifier]:
        admin = await backend.admin()
        for name, password in ROLES.items():
            await admin.execute(f"SET scram_iterations = {4096 + len(name)}")
            quoted = password.replace("'", "''")
            await admin.execute(f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{quoted}'")
        rows = await admin.fetch("SELECT rolname, rolpassword FROM pg_authid WHERE rolpassword IS NOT NULL")
        await admin.close()
        return {row["rolname"]: ScramVerifier.parse(row["rolpassword"]) for row in rows}

    return asyncio.run(make())


@pytest.fixture
async def bench(backend: Backend, verifiers: dict[str, ScramVerifier]) -> AsyncIterator[ProxyBench]:
    async with proxy_bench(backend, allow_plaintext_loopback=True, auth_timeout_s=2.0) as running:
        running.manager.asleep = dict(verifiers)
        yield running


async def test_a_password_starts_the_compute_and_none_does_not(
    bench: ProxyBench, verifiers: dict[str, ScramVerifier]
) -> None:
    said = set()
    for user, password in (("anna", "wrong"), ("anna", ""), ("nobody", "s3cret"), ("Anna", "s3cret")):
        with pytest.raises(asyncpg.InvalidPasswordError) as caught:
            await bench.connect(user=user, password=password)
        said.add(str(caught.value).replace(user, "…"))
    assert said == {'password authentication failed for user "…"'}, "who is there, and who is not, cannot be told apart"
    assert bench.manager.calls == 0
    for user, password in ROLES.items():
        bench.manager.asleep = dict(verifiers)
        bench.endpoint_id = EndpointId.new()
        bench.point_at(bench.backend.compute)
        connection = await bench.connect(user=user, password=password)
        assert await connection.fetchval("SELECT current_user") == user
        await connection.close()
        # It runs, and asks for the password itself.
        asked = len(bench.manager.asked_for)
        with pytest.raises(asyncpg.InvalidPasswordError):
            await bench.connect(user=user, password="wrong")
        assert len(bench.manager.asked_for) == asked
    assert bench.manager.calls == len(ROLES)


async def test_libpq_over_tls_and_many_at_once(bench: ProxyBench) -> None:
    """libpq says over TLS that it knows of channel binding; and that its answer may be believed."""
    bench.manager.delay_s = 0.5
    conninfo = bench.conninfo(f"sslmode=verify-ca sslrootcert={bench.realm.ca_certificate} require_auth=scram-sha-256")

    def ask() -> object:
        with psycopg.connect(conninfo) as connection:
            row = connection.execute("SELECT current_user").fetchone()
            return row and row[0]

    assert await asyncio.gather(*(asyncio.to_thread(ask) for _ in range(5))) == ["postgres"] * 5
    assert bench.manager.calls == 1
    assert bench.manager.asked_for.count("postgres") >= 1


async def test_a_compute_that_knows_another_password_has_the_last_word(
    bench: ProxyBench, verifiers: dict[str, ScramVerifier]
) -> None:
    assert bench.manager.asleep is not None
    bench.manager.asleep["anna"] = ScramVerifier.compute("before", b"0123456789abcdef")
    with pytest.raises(asyncpg.InvalidPasswordError):
        await bench.connect(user="anna", password="before")
    assert bench.manager.calls == 1
    # It runs now: whoever knows the password gets in.
    connection = await bench.connect(user="anna", password=ROLES["anna"])
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


async def test_who_has_proved_his_password_gets_to_the_next_compute(bench: ProxyBench) -> None:
    """One that is there no more when it is tried costs nobody his log-in."""
    bench.point_at(ComputeAddress(host="/nonexistent", port=5432))
    bench.manager.delay_s = 0.3
    connecting = asyncio.create_task(bench.connect())
    await wait_until(lambda: bench.manager.calls == 2)
    bench.point_at(bench.backend.compute)
    connection = await connecting
    assert await connection.fetchval("SELECT 1") == 1
    assert bench.manager.asked_for == ["postgres"]
    await connection.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root reads the memory of processes that are not dumpable")
async def test_the_clients_key_is_in_memory_until_it_is_logged_in(
    bench: ProxyBench, verifiers: dict[str, ScramVerifier]
) -> None:
    verifier = verifiers["anna"]
    keys = ScramKeys.derive(ROLES["anna"], verifier.salt, verifier.iterations)
    patterns = {("ClientKey", "raw"): keys.client_key.copied()}

    def found() -> int:
        return len(memory.search({bench.process.pid: "proxy"}, patterns))

    bench.manager.delay_s = 1.0
    connecting = asyncio.create_task(bench.connect(user="anna", password=ROLES["anna"]))
    await wait_until(lambda: bench.manager.calls)
    assert await asyncio.to_thread(found) == 1
    connection = await connecting
    assert await connection.fetchval("SELECT 1") == 1
    assert await asyncio.to_thread(found) == 0
    await connection.close()


# --- what is no log-in ---


@asynccontextmanager
async def raw(bench: ProxyBench, **parameters: Any) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
    protocol = parameters.pop("protocol", PROTOCOL_3_0)
    startup = {"user": "anna", "database": "postgres", "options": f"endpoint={bench.endpoint_id}", **parameters}
    client = Raw(reader, writer, StartupMessage(startup, protocol))
    try:
        yield client
    finally:
        writer.close()


class Raw:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, startup: StartupMessage) -> None:
        self._reader, self._writer, self.startup = reader, writer, startup

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def message(self) -> tuple[bytes, bytes]:
        """(type, payload); empty at the end."""
        async with asyncio.timeout(10):
            header = await self._reader.read(1)
            if not header:
                return b"", b""
            (length,) = struct.unpack(">I", await self._reader.readexactly(4))
            return header, await self._reader.readexactly(length - 4)

    async def refusal(self) -> str:
        """SQLSTATE of the error that comes next."""
        kind, payload = await self.message()
        assert kind == b"E", (kind, payload)
        assert await self.message() == (b"", b"")
        return ErrorResponse.parse(payload).sqlstate


async def test_nonsense_ends_the_connection_and_starts_nothing(bench: ProxyBench) -> None:
    client = ScramClient(ROLES["anna"], "nonce")
    good = SASLInitialResponse(MECHANISM, client.first()).serialize()
    for first in (
        b"Q\0\0\0\x0dSELECT 1\0",
        Terminate().serialize(),
        b"p\0\0\0\x03",
        b"p\xff\xff\xff\xff",
        struct.pack(">cI", b"p", 4 + 1025),
        SASLResponse(b"").serialize(),
        SASLInitialResponse(MECHANISM + "-PLUS", b"p=tls-server-end-point,,n=,r=nonce").serialize(),
        SASLInitialResponse(MECHANISM, b"p=tls-server-end-point,,n=,r=nonce").serialize(),
        SASLInitialResponse(MECHANISM, None).serialize(),
        SASLInitialResponse(MECHANISM, b"n,a=postgres,n=,r=nonce").serialize(),
    ):
        async with raw(bench) as talk:
            talk.send(talk.startup.serialize())
            assert (await talk.message())[0] == b"R"
            talk.send(first)
            assert await talk.refusal() == "08P01", first
    async with raw(bench) as talk:
        talk.send(talk.startup.serialize() + good)  # before it is asked
        assert await talk.refusal() == "08P01"
    async with raw(bench) as talk:
        talk.send(talk.startup.serialize())
        assert (await talk.message())[0] == b"R"
        talk.send(good + SASLResponse(b"c=biws,r=nonce,p=AAAA").serialize())
        assert (await talk.message())[0] == b"R"
        assert await talk.refusal() == "08P01"
    async with raw(bench) as talk:
        talk.send(talk.startup.serialize())
        await talk.message()
        assert await talk.refusal() == "57P03", "it does not answer for auth_timeout_s"
    assert bench.manager.calls == 0


async def test_a_newer_protocol_is_negotiated_by_the_proxy(bench: ProxyBench) -> None:
    """Postgres says so, too, when it is asked: the client hears it once."""
    async with raw(bench, protocol=PROTOCOL_3_0 + 2, **{"_pq_.unheard_of": "1"}) as talk:
        talk.send(talk.startup.serialize())
        kind, payload = await talk.message()
        assert kind == b"v"
        assert NegotiateProtocolVersion.parse(payload) == NegotiateProtocolVersion(PROTOCOL_3_0, ("_pq_.unheard_of",))
        client = ScramClient(ROLES["anna"], "nonce")
        await talk.message()
        talk.send(SASLInitialResponse(MECHANISM, client.first()).serialize())
        _, payload = await talk.message()
        talk.send(SASLResponse(client.final(payload[4:])).serialize())
        kind, payload = await talk.message()
        client.verify(payload[4:])
        assert await talk.message() == (b"R", bytes(4))


async def test_no_password_and_no_key_is_in_the_log(bench: ProxyBench, verifiers: dict[str, ScramVerifier]) -> None:
    for password in ("wrong-7f3a91", ROLES["anna"]):
        try:
            await (await bench.connect(user="anna", password=password)).close()
        except asyncpg.InvalidPasswordError:
            assert bench.manager.calls == 0
    assert bench.manager.calls == 1
    log = Path(bench.log_path).read_text()
    for secret in ("wrong-7f3a91", *ROLES.values(), *verifiers["anna"].serialize().replace("$", ":").split(":")[2:]):
        assert secret not in log
