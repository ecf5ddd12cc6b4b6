"""The codec against a real Postgres: log in with SCRAM, ask, and stream WAL, over a Unix socket."""

from __future__ import annotations

import asyncio
import base64
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import pytest
import pytest_asyncio

from shared.lsn import Lsn
from shared.postgres import Auth, PostgresServer, initdb
from shared.sandbox import SHARED_MEMORY_DIR
from shared.wire.pgauth import (
    AuthenticationOk,
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    SASLInitialResponse,
    SASLResponse,
)
from shared.wire.pgframing import FrameScanner, MessageFramer
from shared.wire.pgproto import (
    BackendKeyData,
    BackendMessage,
    CommandComplete,
    CopyBothResponse,
    CopyData,
    CopyDone,
    DataRow,
    ErrorField,
    ErrorResponse,
    FrontendMessage,
    NoticeResponse,
    ParameterStatus,
    Query,
    ReadyForQuery,
    RowDescription,
    Terminate,
    TransactionStatus,
    parse_backend,
)
from shared.wire.pgstartup import CancelRequest, SSLRequest, StartupMessage
from shared.wire.replication import (
    HotStandbyFeedback,
    PrimaryKeepalive,
    StandbyStatusUpdate,
    SystemIdentity,
    XLogData,
    identify_system,
    parse_from_primary,
    postgres_timestamp_us,
    start_replication,
)
from shared.wire.scram import MECHANISM, NONCE_LENGTH_BYTES, ScramClient, ScramKeys, ScramVerifier

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

USER = "postgres"
PASSWORD = "pencil \u2168 \u00aa"  # which SASLprep changes


@dataclass(frozen=True, slots=True)
class Server:
    pgdata: Path
    socket: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    base = SHARED_MEMORY_DIR if os.access(SHARED_MEMORY_DIR, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="keylake-test-", dir=base))
    try:
        pgdata = folder / "data"
        await initdb(pgdata, superuser=USER, password=PASSWORD, auth_local=Auth.SCRAM)
        conf: dict[str, str | bool] = {"fsync": False, "wal_level": "replica", "shared_buffers": "16MB"}
        async with PostgresServer(pgdata, socket_dir=folder, conf=conf):
            yield Server(pgdata, str(folder / ".s.PGSQL.5432"))
    finally:
        shutil.rmtree(folder)


class Client:
    """The least that can speak to a server: reads whole messages, knows no states."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._framer = MessageFramer()
        self._scanner = FrameScanner([b"N", b"Z"])  # looks on, as a proxy would
        self._messages: list[BackendMessage] = []
        self.scanned_types = b""
        self.scanned: list[BackendMessage] = []
        self.parameters: dict[str, str] = {}
        self.key: BackendKeyData | None = None

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, server: Server, credentials: str | ScramKeys = PASSWORD, **parameters: str
    ) -> AsyncIterator[Self]:
        reader, writer = await asyncio.open_unix_connection(server.socket)
        client = cls(reader, writer)
        try:
            writer.write(StartupMessage({"user": USER, **parameters}).serialize())
            await client._login(credentials)
            yield client
            client.send(Terminate())
        finally:
            writer.close()
            await writer.wait_closed()

    def send(self, message: FrontendMessage | SASLInitialResponse | SASLResponse) -> None:
        self._writer.write(message.serialize())

    async def receive(self) -> BackendMessage:
        while not self._messages:
            chunk = await self._reader.read(65536)
            assert chunk, "the server closed the connection"
            frames = self._framer.feed(chunk)
            scan = self._scanner.scan(chunk)
            self.scanned_types += scan.types
            self.scanned += [parse_backend(found.type, found.payload) for found in scan.wanted]
            assert self._scanner.at_boundary == (self._framer.pending_bytes == 0)
            for frame in frames:
                message = parse_backend(*frame)
                assert message.serialize()[5:] == frame.payload  # what a real server sends survives byte for byte
                self._messages.append(message)
        return self._messages.pop(0)

    async def _login(self, credentials: str | ScramKeys) -> None:
        offer = await self.receive()
        assert isinstance(offer, AuthenticationSASL)
        assert MECHANISM in offer.mechanisms
        nonce = base64.b64encode(secrets.token_bytes(NONCE_LENGTH_BYTES)).decode()
        scram = ScramClient(credentials, nonce)
        self.send(SASLInitialResponse(MECHANISM, scram.first()))
        challenge = await self.receive()
        assert isinstance(challenge, AuthenticationSASLContinue)
        self.send(SASLResponse(scram.final(challenge.data)))
        match await self.receive():
            case AuthenticationSASLFinal(data):
                scram.verify(data)
            case ErrorResponse() as error:
                raise RefusedError(error)
            case other:
                pytest.fail(f"unexpected {other!r}")
        assert await self.receive() == AuthenticationOk()
        while not isinstance(message := await self.receive(), ReadyForQuery):
            match message:
                case ParameterStatus(name, value):
                    self.parameters[name] = value
                case BackendKeyData():
                    self.key = message
                case other:
                    pytest.fail(f"unexpected {other!r}")

    async def ask(self, query: str | Query) -> list[BackendMessage]:
        """Everything up to ReadyForQuery, which comes last."""
        self.send(Query(query) if isinstance(query, str) else query)
        answer = [await self.receive()]
        while not isinstance(answer[-1], ReadyForQuery):
            answer.append(await self.receive())
        return answer

    async def value(self, query: str) -> str | None:
        (row,) = [message for message in await self.ask(query) if isinstance(message, DataRow)]
        return row.texts()[0]


class RefusedError(Exception):
    def __init__(self, response: ErrorResponse) -> None:
        super().__init__(response.sqlstate)
        self.response = response


async def test_login_with_password(server: Server) -> None:
    async with Client.connect(server, application_name="keylake test") as client:
        assert client.parameters["server_version"].startswith("16.")
        assert client.parameters["application_name"] == "keylake test"
        assert client.key is not None
        assert client.key.process_id > 0
        assert len(client.key.secret_key) == 4


async def test_login_with_a_wrong_password(server: Server) -> None:
    with pytest.raises(RefusedError) as caught:
        async with Client.connect(server, PASSWORD + "x"):
            pass
    response = caught.value.response
    assert (response.severity, response.sqlstate) == ("FATAL", "28P01")
    assert response.get(ErrorField.ROUTINE) is not None


async def test_postgres_stores_the_same_verifier_and_takes_ours(server: Server) -> None:
    async with Client.connect(server) as client:
        text = await client.value("SELECT rolpassword FROM pg_authid WHERE rolname = current_user")
        assert text is not None
        stored = ScramVerifier.parse(text)
        assert ScramVerifier.compute(PASSWORD, stored.salt, stored.iterations).serialize() == text
        ours = ScramVerifier.compute("ours", secrets.token_bytes(16))
        await client.ask(f"CREATE ROLE {USER}2 LOGIN PASSWORD '{ours.serialize()}'")
    async with Client.connect(server, "ours", user=f"{USER}2", database="postgres") as client:
        assert await client.value("SELECT current_user") == f"{USER}2"
    keys = ScramKeys.derive("ours", ours.salt, ours.iterations)  # what a proxy has learned
    async with Client.connect(server, keys, user=f"{USER}2", database="postgres") as client:
        assert await client.value("SELECT 1") == "1"


@pytest.mark.parametrize("password", ["\u0007bell", "\u0627\u0031", "caf\u00e9", "\U0001f600", "a\u00adb", "\ue000"])
async def test_passwords_that_saslprep_changes_or_refuses(server: Server, password: str) -> None:
    role = f"role_{password.encode().hex()}"
    async with Client.connect(server) as client:
        await client.ask(f"CREATE ROLE {role} LOGIN PASSWORD '{password}'")
    async with Client.connect(server, password, user=role, database="postgres") as client:
        assert await client.value("SELECT current_user") == role


async def test_results_errors_and_notices(server: Server) -> None:
    async with Client.connect(server) as client:
        answer = await client.ask("SELECT 1 AS one, NULL::text AS none, 'café' AS text, '' AS empty")
        description, row, complete, ready = answer
        assert isinstance(description, RowDescription)
        assert [(field.name, field.type_oid) for field in description.fields] == [
            ("one", 23),
            ("none", 25),
            ("text", 25),
            ("empty", 25),
        ]
        assert isinstance(row, DataRow)
        assert row.texts() == ("1", None, "café", "")
        assert complete == CommandComplete("SELECT 1")
        assert ready == ReadyForQuery(TransactionStatus.IDLE)
        await client.ask("BEGIN")
        error, failed = await client.ask("SELECT 1/0")
        assert isinstance(error, ErrorResponse)
        assert (error.severity, error.sqlstate) == ("ERROR", "22012")
        assert failed == ReadyForQuery(TransactionStatus.FAILED)
        await client.ask("ROLLBACK")
        notice, *_ = await client.ask("DO $$ BEGIN RAISE WARNING 'careful' USING DETAIL = 'why', HINT = 'so'; END $$")
        assert isinstance(notice, NoticeResponse)
        assert (notice.severity, notice.message) == ("WARNING", "careful")
        assert (notice.get(ErrorField.DETAIL), notice.get(ErrorField.HINT)) == ("why", "so")
        assert client.scanned_types.endswith(b"NCZ")
        assert notice in client.scanned
        rows = await client.ask("SELECT repeat('x', n) FROM generate_series(1, 3000) AS n")
        assert len(rows) == 3003


async def test_cancel(server: Server) -> None:
    async with Client.connect(server) as client:
        assert client.key is not None
        client.send(Query("SELECT pg_sleep(60)"))
        await _until_asleep(server)
        reader, writer = await asyncio.open_unix_connection(server.socket)
        writer.write(CancelRequest(client.key.process_id, client.key.secret_key).serialize())
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        while not isinstance(message := await client.receive(), ErrorResponse):
            assert isinstance(message, RowDescription)
        assert message.sqlstate == "57014"
        assert isinstance(await client.receive(), ReadyForQuery)


async def _until_asleep(server: Server) -> None:
    async with Client.connect(server) as watcher:
        asleep = "SELECT pg_sleep(0.01), count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        while True:
            (row,) = [message for message in await watcher.ask(asleep) if isinstance(message, DataRow)]
            if row.texts()[1] == "1":
                return


async def test_ssl_request_is_answered(server: Server) -> None:
    reader, writer = await asyncio.open_unix_connection(server.socket)
    writer.write(SSLRequest().serialize())
    assert await reader.readexactly(1) == b"N"
    writer.close()
    await writer.wait_closed()


async def test_streaming_wal(server: Server) -> None:
    async with (
        Client.connect(server) as sql,
        Client.connect(server, replication="true", application_name="sk1") as stream,
    ):
        (row,) = [message for message in await stream.ask(identify_system()) if isinstance(message, DataRow)]
        identity = SystemIdentity.from_row(row.values)
        assert identity.pg_timeline == 1
        assert identity.database is None
        assert str(identity.system_identifier) == await sql.value("SELECT system_identifier FROM pg_control_system()")
        start_lsn = Lsn(identity.flush_lsn.value & ~0x1FFF)  # the beginning of a page
        stream.send(start_replication(start_lsn, pg_timeline=1))
        assert await stream.receive() == CopyBothResponse()

        await sql.ask("CREATE TABLE t AS SELECT n, md5(n::text) AS text FROM generate_series(1, 5000) AS n")
        target = Lsn.parse(await sql.value("SELECT pg_current_wal_flush_lsn()") or "")
        wal = b""
        while start_lsn + len(wal) < target:
            message = await stream.receive()
            assert isinstance(message, CopyData)
            match parse_from_primary(message.data):
                case XLogData() as piece:
                    assert piece.start_lsn == start_lsn + len(wal)
                    assert piece.server_end_lsn >= piece.end_lsn
                    wal += piece.data
                case PrimaryKeepalive():
                    pass
        assert wal == _wal_on_disk(server, start_lsn, len(wal))
        assert wal[:2] == b"\x13\xd1"  # XLOG_PAGE_MAGIC of 16: 0xD113

        end_lsn = start_lsn + len(wal)
        now_us = postgres_timestamp_us(datetime.now(UTC))
        feedback = HotStandbyFeedback(now_us, 0, 0, 0, 0)
        stream.send(CopyData(feedback.serialize()))
        status = StandbyStatusUpdate(end_lsn, end_lsn, start_lsn, now_us, reply_requested=True)
        stream.send(CopyData(status.serialize()))
        while True:  # the server answers with a keepalive
            message = await stream.receive()
            assert isinstance(message, CopyData)
            if isinstance(parse_from_primary(message.data), PrimaryKeepalive):
                break
        status_query = """
            SELECT concat_ws(' ', write_lsn, flush_lsn, replay_lsn, (extract(epoch FROM reply_time) * 1000000)::bigint)
            FROM pg_stat_replication"""
        expected = f"{end_lsn} {end_lsn} {start_lsn} {now_us + 946_684_800_000_000}"
        while await sql.value(status_query) != expected:  # that keepalive may have been one of its own accord
            pass

        stream.send(CopyDone())
        while not isinstance(message := await stream.receive(), CopyDone):
            assert isinstance(message, CopyData)
        while not isinstance(message, ReadyForQuery):
            message = await stream.receive()
        assert b"W" in stream.scanned_types


def _wal_on_disk(server: Server, start_lsn: Lsn, length_bytes: int) -> bytes:
    end_lsn = start_lsn + length_bytes
    assert start_lsn.segment_number == end_lsn.segment_number
    number = start_lsn.segment_number
    segment = server.pgdata / "pg_wal" / f"00000001{number >> 8:08X}{number & 0xFF:08X}"
    return segment.read_bytes()[start_lsn.segment_offset_bytes : end_lsn.segment_offset_bytes]
