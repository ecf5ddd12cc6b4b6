"""How WAL gets to a replica's Postgres: real safekeepers, and a standby's connection made by hand."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from compute.agent.postgres_conf import POSTGRES_PORT
from compute.agent.wal_sender import WalSender
from compute.agent.wal_source import WalSource
from shared.auth import Scope, Service
from shared.errors import RevokedError
from shared.lsn import WAL_BLOCK_SIZE_BYTES, WAL_SEGMENT_SIZE_BYTES, Lsn
from shared.tls import client_context
from shared.wal.page import build_page_header
from shared.wire.pgframing import MessageFramer
from shared.wire.pgproto import CopyData, CopyDone, DataRow, ErrorResponse, Query, parse_backend
from shared.wire.pgstartup import StartupMessage
from shared.wire.replication import (
    PrimaryKeepalive,
    StandbyStatusUpdate,
    SystemIdentity,
    XLogData,
    identify_system,
    parse_from_primary,
    start_replication,
)
from shared.wire.walstream import Feedback
from tests.fixtures.safekeeper_nodes import NodeBench, elect, nodes
from tests.fixtures.sockets import rest_of, take_all
from tests.fixtures.waiting import wait_until
from tests.fixtures.wal import SYSTEM_IDENTIFIER, WalBuilder

pytestmark = pytest.mark.integration

SEGMENT = 3 * WAL_SEGMENT_SIZE_BYTES
START = SEGMENT + 2 * WAL_BLOCK_SIZE_BYTES + 400
"""Where the log begins: inside of a page, and of a segment."""


def source_of(benches: list[NodeBench]) -> WalSource:
    first = benches[0]
    issuer = first.realm.issuers[Service.COMPUTE]
    return WalSource(
        first.project_id,
        first.timeline_id,
        [bench.donor.address for bench in benches],
        client_context(first.realm.ca_certificate),
        lambda: issuer.issue(Service.SAFEKEEPER, [Scope.WAL_READ], project_id=first.project_id),
    )


def commit(lsn: int, *benches: NodeBench) -> None:
    for bench in benches:
        bench.timeline.feedback(Feedback(lsn, 0))


async def test_only_what_is_committed_comes_whoever_has_it(tmp_path: Path) -> None:
    async with nodes(tmp_path, START) as benches:
        first, second, third = benches
        await elect(benches, 1)
        wal = WalBuilder(START)
        for _ in range(20):
            wal.append_noop(300)
        common = bytes(wal.data)
        for bench in benches:
            await bench.write(1, START, common)
        source = source_of(benches)

        async with aclosing(source.read(START)) as reading:
            waiting = asyncio.create_task(anext(reading))
            await wait_until(lambda: source.end_lsn == wal.end_lsn)
            assert not waiting.done(), "nothing is known to be committed"
            commit(START + 600, first)
            assert bytes(await waiting) == common[:600]

            # The first one is gone; the second one has heard of more.
            waiting = asyncio.create_task(anext(reading))
            commit(wal.end_lsn, second)
            await first.stop()
            assert bytes(await waiting) == common[600:]

            # It also gets what no quorum has, and what an election takes back.
            fork = WalBuilder(wal.end_lsn, prev_lsn=wal.prev_lsn)
            fork.append_noop(5000)
            await second.write(1, wal.end_lsn, bytes(fork.data))
            waiting = asyncio.create_task(anext(reading))
            await wait_until(lambda: source.end_lsn == fork.end_lsn)
            assert not waiting.done()
            await first.start()
            await second.stop()
            chosen = await elect([first, third], 2)
            assert chosen.start_lsn == wal.end_lsn
            await second.start()
            await elect(benches, 3)
            after_lsn = wal.end_lsn
            wal.append_noop(5000)
            for bench in benches:
                await bench.write(3, after_lsn, bytes(wal.data)[after_lsn - START :])
            # Addresses have changed with the restarts; the third one's has not.
            commit(wal.end_lsn, third)
            assert bytes(await waiting) == bytes(wal.data)[after_lsn - START :]


async def test_one_that_hears_of_no_commits_is_left_and_holds_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compute.agent.wal_source._PATIENCE_S", 0.3)
    monkeypatch.setattr("compute.agent.wal_source._MAX_HELD_BYTES", 1000)
    async with nodes(tmp_path, START) as benches:
        await elect(benches, 1)
        wal = WalBuilder(START)
        wal.append_noop(500)
        small = wal.end_lsn
        wal.append_noop(5000)
        for bench in benches:
            await bench.write(1, START, bytes(wal.data)[: small - START])
        source = source_of(benches)
        async with aclosing(source.read(START)) as reading:
            commit(small, benches[2])
            assert bytes(await anext(reading)) == bytes(wal.data)[: small - START]
            waiting = asyncio.create_task(anext(reading))
            for bench in benches:
                await bench.write(1, START, bytes(wal.data))
            await wait_until(lambda: source.end_lsn == wal.end_lsn)
            assert not waiting.done()
            commit(wal.end_lsn, benches[1])
            got = bytes(await waiting)
            while len(got) < wal.end_lsn - small:
                got += bytes(await anext(reading))
            assert got == bytes(wal.data)[small - START :]


# --- the standby's side ---


class Standby:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer, self._framer = reader, writer, MessageFramer()
        self._ready: list[object] = []
        self.wal = b""

    async def next(self) -> object:
        while not self._ready:
            chunk = await self._reader.read(1 << 16)
            if not chunk:
                raise EOFError
            for frame in self._framer.feed(chunk):
                self._ready.append(parse_backend(frame.type, frame.payload))
        return self._ready.pop(0)

    async def until(self, kind: type[object]) -> object:
        while not isinstance(message := await self.next(), kind):
            pass
        return message

    def send(self, *messages: Query | CopyData | CopyDone) -> None:
        self._writer.write(b"".join(each.serialize() for each in messages))

    async def take(self, size: int) -> bytes:
        """The next `size` bytes of WAL."""
        while len(self.wal) < size:
            copied = await self.until(CopyData)
            assert isinstance(copied, CopyData)
            message = parse_from_primary(copied.data)
            if isinstance(message, XLogData):
                self.wal += message.data
        taken, self.wal = self.wal[:size], self.wal[size:]
        return taken

    def replayed(self, lsn: int, *, reply: bool = False) -> None:
        status = StandbyStatusUpdate(Lsn(lsn), Lsn(lsn), Lsn(lsn), 0, reply)
        self.send(CopyData(status.serialize()))


@asynccontextmanager
async def standby_of(sender: WalSender, directory: Path, **parameters: str) -> AsyncIterator[Standby]:
    reader, writer = await asyncio.open_unix_connection(str(directory / f".s.PGSQL.{POSTGRES_PORT}"))
    try:
        writer.write(StartupMessage({"user": "standby", **parameters}).serialize())
        yield Standby(reader, writer)
    finally:
        writer.close()


async def test_a_standby_gets_its_segment_from_the_start_and_is_not_run_away_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compute.agent.wal_sender._MAX_AHEAD_BYTES", 100_000)
    lease_is_over = False

    def check() -> None:
        if lease_is_over:
            raise RevokedError("over")

    async with nodes(tmp_path, START) as benches:
        await elect(benches, 1)
        wal = WalBuilder(START)
        for _ in range(30):
            wal.append_noop(50_000)
        data = bytes(wal.data)
        for bench in benches:
            await bench.write(1, START, data, frame=50_000)
            commit(START + 200_000, bench)
        directory = tmp_path / "wal"
        sender = WalSender(directory, SYSTEM_IDENTIFIER, Lsn(START), source_of(benches), check)
        await sender.start()
        assert directory.stat().st_mode & 0o777 == 0o700
        async with standby_of(sender, directory) as client:
            with pytest.raises(EOFError):  # it is not for clients
                await client.next()
        async with standby_of(sender, directory, replication="true") as standby:
            standby.send(identify_system())
            row = await standby.until(DataRow)
            assert isinstance(row, DataRow)
            identity = SystemIdentity.from_row(row.values)
            assert (identity.system_identifier, identity.pg_timeline) == (SYSTEM_IDENTIFIER, 1)
            for refused in ("START_REPLICATION 0/0 TIMELINE 2", "TIMELINE_HISTORY 2", "BASE_BACKUP", "SELECT 1"):
                standby.send(Query(refused))
                error = await standby.until(ErrorResponse)
                assert isinstance(error, ErrorResponse)
                assert error.sqlstate == "0A000"

            standby.send(start_replication(Lsn(SEGMENT), pg_timeline=1))
            error = await standby.until(ErrorResponse)  # the form that walreceivers do not use
            standby.send(Query(f"START_REPLICATION {Lsn(SEGMENT)} TIMELINE 1"))
            before = await standby.take(START - SEGMENT)
            for page in (SEGMENT, START - START % WAL_BLOCK_SIZE_BYTES):
                header = build_page_header(page, SYSTEM_IDENTIFIER)
                assert before[page - SEGMENT :].startswith(header)
            assert await standby.take(200_000) == data[:200_000]

            # It has begun to replay: from now on it is sent so much more than that and no more.
            standby.replayed(START + 150_000, reply=True)
            copied = await standby.until(CopyData)
            assert isinstance(copied, CopyData)
            assert isinstance(parse_from_primary(copied.data), PrimaryKeepalive)
            commit(wal.end_lsn, *benches)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await standby.take(len(data) - 200_000)
            assert 0 < len(standby.wal) < len(data) - 200_000
            position = START + 200_000
            while position < wal.end_lsn:
                ready = min(wal.end_lsn, max(position + 1, sender.replayed_lsn + 100_000))
                assert await standby.take(ready - position) == data[position - START : ready - START]
                position = ready
                standby.replayed(position)
                await sender.wait_replayed(position)
            standby.send(CopyDone())
            await standby.until(CopyDone)

            # And without a live lease nothing leaves.
            lease_is_over = True
            standby.send(Query(f"START_REPLICATION {Lsn(SEGMENT)} TIMELINE 1"))
            with pytest.raises(EOFError):
                await standby.take(1)

        # What waits for a slow one when the sender is closed stays here, although there is room for it by then.
        lease_is_over = False
        with socket.socket(socket.AF_UNIX) as slow:
            slow.setblocking(False)
            slow.connect(str(directory / f".s.PGSQL.{POSTGRES_PORT}"))
            slow.send(StartupMessage({"user": "standby", "replication": "true"}).serialize())
            slow.send(Query(f"START_REPLICATION {Lsn(SEGMENT)} TIMELINE 1").serialize())
            await wait_until(lambda: any(each.get_write_buffer_size() for each in sender._connections.values()))
            assert len(take_all(slow)) > 100_000
            sender.close()
            assert await rest_of(slow) == b""
