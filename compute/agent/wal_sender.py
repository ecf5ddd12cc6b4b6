"""A primary for one standby, as far as its walreceiver can tell: the server's side of physical replication (PG manual,
"Streaming Replication Protocol"; libpqwalreceiver.c), on a Unix socket that only the agent and its Postgres reach.

    IDENTIFY_SYSTEM                        one row
    START_REPLICATION X/X TIMELINE 1       CopyData both ways: XLogData and keepalives; status updates

Everything else is refused. There is one WAL timeline (Postgres's word) and there never is another.

A walreceiver asks from the beginning of a segment on. Where our log begins inside of one, what lies before it is zeros
with page headers, as the segment that a primary starts on has it (shared/wal/writer.py).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from compute.agent.postgres_conf import MAX_STANDBY_DELAY_S, POSTGRES_PORT
from compute.agent.wal_source import WalSource
from shared.errors import KeylakeError
from shared.lsn import WAL_SEGMENT_SIZE_BYTES, Lsn
from shared.postgres import find_postgres, unprivileged
from shared.sockets import drop
from shared.telemetry import get_logger
from shared.wal.page import WAL_TIMELINE, segment_file_name
from shared.wal.writer import build_segments
from shared.wire.buffer import ProtocolViolationError
from shared.wire.pgauth import AuthenticationOk
from shared.wire.pgframing import MessageFramer, startup_payload_length
from shared.wire.pgproto import (
    CommandComplete,
    CopyBothResponse,
    CopyData,
    CopyDone,
    DataRow,
    ErrorResponse,
    FieldDescription,
    ParameterStatus,
    Query,
    ReadyForQuery,
    RowDescription,
    Terminate,
    TransactionStatus,
    parse_frontend,
)
from shared.wire.pgstartup import StartupMessage
from shared.wire.replication import (
    PrimaryKeepalive,
    StandbyStatusUpdate,
    XLogData,
    parse_from_standby,
    postgres_timestamp_us,
)

_log = get_logger(__name__)
_KEEPALIVE_S: Final = 10.0
"""Well below wal_receiver_timeout, 60 s."""
_MAX_AHEAD_BYTES: Final = 4 * WAL_SEGMENT_SIZE_BYTES
"""What is sent and not replayed lies in the volume; while replay waits for a query, no more than this."""
_MAX_REPLAY_PAUSE_S: Final = 2 * MAX_STANDBY_DELAY_S
"""It waits no longer for a query; what it waits for then is the rest of a record that is larger than that."""
_READ_SIZE_BYTES: Final = 64 * 1024
_MAX_MESSAGE_BYTES: Final = 64 * 1024
_START: Final = re.compile(r"START_REPLICATION ([0-9A-F]{1,8}/[0-9A-F]{1,8}) TIMELINE ([0-9]{1,10})")
_IDENTITY: Final = ("systemid", "timeline", "xlogpos", "dbname")
_READY: Final = ReadyForQuery(TransactionStatus.IDLE).serialize()


class WalSender:
    """Listens from `start` to `close`."""

    def __init__(
        self, directory: Path, system_identifier: int, log_start_lsn: Lsn, source: WalSource, check: Callable[[], None]
    ) -> None:
        """`directory`: of the socket, private. `check`: raises KeyAccessError unless WAL may be handed on."""
        self._directory = directory
        self._system_identifier = system_identifier
        self._log_start_lsn = log_start_lsn.value
        self._source = source
        self._check = check
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.WriteTransport] = {}
        self._heard = asyncio.Condition()
        self.replayed_lsn = 0
        """By the standby; 0 when it has not begun."""
        self._stuck_at_lsn = 0

    @property
    def conninfo(self) -> str:
        return f"host='{self._directory}' port={POSTGRES_PORT} user=standby"

    async def start(self) -> None:
        """Raises OSError."""
        self._directory.mkdir(mode=0o700)
        path = self._directory / f".s.PGSQL.{POSTGRES_PORT}"
        self._server = await asyncio.start_unix_server(self._accept, str(path), limit=_READ_SIZE_BYTES)
        unprivileged().give(self._directory)

    def close(self) -> None:
        """No WAL leaves from now on, also none that waits to be sent."""
        if self._server is not None:
            self._server.close()
        for task, transport in self._connections.items():
            drop(transport)
            task.cancel()

    async def wait_replayed(self, lsn: int) -> None:
        async with self._heard:
            await self._heard.wait_for(lambda: self.replayed_lsn >= lsn)

    # --- a connection ---

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - asyncio made one
        self._connections[task] = writer.transport
        task.add_done_callback(self._connections.pop)
        try:
            await _Session(self, reader, writer).run()
        except (KeylakeError, ProtocolViolationError, EOFError, OSError) as error:
            _log.info("the standby's connection ended", error=type(error).__name__, reason=str(error))
        finally:
            writer.transport.abort()

    def identity(self) -> tuple[bytes | None, ...]:
        end = Lsn(max(self._source.end_lsn, self._log_start_lsn))
        return str(self._system_identifier).encode(), str(WAL_TIMELINE).encode(), str(end).encode(), None

    def keepalive(self) -> bytes:
        sent = PrimaryKeepalive(Lsn(self._source.end_lsn), _now_us(), reply_requested=False)
        return CopyData(sent.serialize()).serialize()

    async def heard(self, status: StandbyStatusUpdate) -> None:
        async with self._heard:
            self.replayed_lsn = status.apply_lsn.value
            self._heard.notify_all()

    def before_log(self, lsn: int) -> bytes:
        """[`lsn`, start of the log). Raises ProtocolViolationError when that is more than the rest of a segment."""
        segment_lsn = self._log_start_lsn - self._log_start_lsn % WAL_SEGMENT_SIZE_BYTES
        if lsn < segment_lsn:
            raise ProtocolViolationError("the standby asks for WAL from before the log")
        segments = build_segments(b"", self._log_start_lsn, self._system_identifier)
        return segments[segment_file_name(segment_lsn)][lsn - segment_lsn : self._log_start_lsn - segment_lsn]

    async def stream(self, writer: asyncio.StreamWriter, lsn: int) -> None:
        """Until cancelled. Raises KeyAccessError, OSError."""
        if lsn < self._log_start_lsn:
            before = self.before_log(lsn)
            await self._send(writer, lsn, before)
            lsn = self._log_start_lsn
        async with aclosing(self._source.read(lsn)) as pieces:
            async for piece in pieces:
                await self._wait_for_room(lsn)
                await self._send(writer, lsn, bytes(piece))
                lsn += len(piece)

    async def _wait_for_room(self, lsn: int) -> None:
        if self.replayed_lsn == self._stuck_at_lsn:  # so it is, too, before it begins: it reads the checkpoint first
            return
        try:
            async with asyncio.timeout(_MAX_REPLAY_PAUSE_S):
                await self.wait_replayed(lsn - _MAX_AHEAD_BYTES)
        except TimeoutError:
            self._stuck_at_lsn = self.replayed_lsn

    async def _send(self, writer: asyncio.StreamWriter, lsn: int, data: bytes) -> None:
        self._check()  # Invariant: after decrypting, before anything leaves
        sent = XLogData(Lsn(lsn), Lsn(max(self._source.end_lsn, lsn + len(data))), _now_us(), data)
        writer.write(CopyData(sent.serialize()).serialize())
        await writer.drain()


class _Session:
    """One connection of the standby's."""

    def __init__(self, sender: WalSender, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._sender = sender
        self._reader = reader
        self._writer = writer
        self._streaming: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Until the standby leaves. Raises ProtocolViolationError, KeyAccessError, EOFError, OSError."""
        await self._greet()
        try:
            await self._listen()
        finally:
            await self._end_stream()

    async def _greet(self) -> None:
        length = startup_payload_length(await self._reader.readexactly(4))
        startup = StartupMessage.parse(await self._reader.readexactly(length))
        if startup.parameters.get("replication") != "true":
            raise ProtocolViolationError("this is no place for clients")
        version = ParameterStatus("server_version", find_postgres().version)
        self._writer.write(AuthenticationOk().serialize() + version.serialize() + _READY)

    async def _listen(self) -> None:
        framer = MessageFramer(limit_bytes=_MAX_MESSAGE_BYTES)
        while chunk := await self._reader.read(_READ_SIZE_BYTES):
            for frame in framer.feed(chunk):
                match parse_frontend(frame.type, frame.payload):
                    case Query(sql=sql) if not self._streaming:
                        self._execute(sql.rstrip(";"))
                    case CopyData(data=data) if self._streaming:
                        message = parse_from_standby(data)
                        if isinstance(message, StandbyStatusUpdate):
                            await self._sender.heard(message)
                            if message.reply_requested:
                                self._writer.write(self._sender.keepalive())
                    case CopyDone() if self._streaming:
                        await self._end_stream()
                        done = CommandComplete("START_REPLICATION").serialize()
                        self._writer.write(CopyDone().serialize() + done + _READY)
                    case Terminate():
                        return
                    case _:
                        raise ProtocolViolationError("unexpected message from the standby")

    def _execute(self, command: str) -> None:
        if command == "IDENTIFY_SYSTEM":
            columns = RowDescription(tuple(FieldDescription(name) for name in _IDENTITY))
            row = DataRow(self._sender.identity())
            done = CommandComplete("IDENTIFY_SYSTEM")
            self._writer.write(columns.serialize() + row.serialize() + done.serialize() + _READY)
        elif (start := _START.fullmatch(command)) and int(start[2]) == WAL_TIMELINE:
            self._writer.write(CopyBothResponse().serialize())
            stream = self._sender.stream(self._writer, Lsn.parse(start[1]).value)
            self._streaming = [asyncio.create_task(each) for each in (stream, self._keep_alive())]
            for task in self._streaming:
                task.add_done_callback(self._stream_ended)
        else:
            refusal = ErrorResponse.of("ERROR", "0A000", "only physical replication of WAL timeline 1 is served here")
            self._writer.write(refusal.serialize() + _READY)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(_KEEPALIVE_S)
            self._writer.write(self._sender.keepalive())

    def _stream_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            _log.info("WAL is not sent any more", reason=str(task.exception()))
            self._writer.transport.abort()

    async def _end_stream(self) -> None:
        streaming, self._streaming = self._streaming, []
        for task in streaming:
            task.cancel()
        await asyncio.gather(*streaming, return_exceptions=True)


def _now_us() -> int:
    return postgres_timestamp_us(datetime.now(UTC))
