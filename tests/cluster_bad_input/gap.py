"""A primary that is no Postgres: it logs every safekeeper in and sends what WAL it likes."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from shared.lsn import Lsn
from shared.wire.pgproto import CommandComplete, CopyData, DataRow
from shared.wire.replication import StandbyStatusUpdate, XLogData, parse_from_standby

PORT = 5432
_READY = b"Z\0\0\0\x05I"
_LOGGED_IN = b"R\0\0\0\x08\0\0\0\0" + _READY
_NO_COLUMNS = b"T\0\0\0\x06\0\0"
_COPY_BOTH = b"W\0\0\0\x07\0\0\0"


@dataclass(slots=True)
class FakePrimary:
    system_identifier: int
    start: Lsn
    good_bytes: int
    """As many are sent, then a gap, until `heal`."""
    asked_from: list[Lsn] = field(default_factory=list)
    flushed: list[Lsn] = field(default_factory=list)
    healed: bool = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._talk(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big") - 4)
        writer.write(_LOGGED_IN)
        await _message(reader)  # IDENTIFY_SYSTEM
        row = DataRow((str(self.system_identifier).encode(), b"1", str(self.start).encode(), None))
        writer.write(_NO_COLUMNS + row.serialize() + CommandComplete("IDENTIFY_SYSTEM").serialize() + _READY)
        command = (await _message(reader)).decode("ascii")
        lsn = Lsn.parse(next(word for word in command.rstrip("\0").split() if "/" in word))
        self.asked_from.append(lsn)
        writer.write(_COPY_BOTH)
        end = self.start + self.good_bytes
        if lsn < end:
            writer.write(_wal(lsn, end - lsn))
        more = _wal(end, 1000) if self.healed else _wal(end + 1000, 1000)
        while True:
            status = parse_from_standby(await _message(reader))
            if isinstance(status, StandbyStatusUpdate):
                self.flushed.append(status.flush_lsn)
                if status.flush_lsn == end:
                    writer.write(more)


async def _message(reader: asyncio.StreamReader) -> bytes:
    _, length = struct.unpack(">cI", await reader.readexactly(5))
    return await reader.readexactly(length - 4)


def _wal(lsn: Lsn, size_bytes: int) -> bytes:
    data = XLogData(lsn, lsn + size_bytes, 0, b"w" * size_bytes)
    return CopyData(data.serialize()).serialize()


@asynccontextmanager
async def fake_primary(directory: Path, system_identifier: int, start: Lsn) -> AsyncIterator[FakePrimary]:
    """On the Unix socket that a Postgres in `directory` would have."""
    primary = FakePrimary(system_identifier, start, 1000)
    server = await asyncio.start_unix_server(primary.serve, directory / f".s.PGSQL.{PORT}")
    try:
        yield primary
    finally:
        server.close()
