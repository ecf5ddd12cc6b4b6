"""Where the pageserver gets its WAL from when its source goes away: real sockets, safekeepers that say what a test
wants."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from pageserver import walreceiver
from pageserver.walreceiver import IngestRecords, Peer, WalReceiver
from shared.auth import Principal, Scope, Service
from shared.config import Address
from shared.framed_tcp import FramedConnection, FramedServer
from shared.ids import ProjectId, TimelineId
from shared.tls import client_context, server_context
from shared.wal.reader import RawRecord, WalStreamDecoder
from shared.wire.walstream import (
    FEEDBACK,
    MAX_FRAME_SIZE_BYTES,
    SUBSCRIBE,
    Feedback,
    Status,
    Subscribe,
    SubscribeFlags,
    pack_wal,
)
from tests.fixtures.realm import Realm
from tests.fixtures.wal import WalBuilder

START = 0x2000000
BUFFER_BYTES = 64 * 1024


@dataclass
class Safekeeper:
    """Holds `log` from START on, all of it flushed, in the history of `term`."""

    node_id: str
    term: int
    log: bytes

    def __post_init__(self) -> None:
        self.sent = asyncio.Event()
        """A subscriber that wants bytes has been sent all that there are."""
        self.told: asyncio.Queue[Feedback] = asyncio.Queue()

    async def serve(self, connection: FramedConnection, principal: Principal) -> None:
        frame = await connection.receive_one()
        assert frame is not None
        assert frame[0] == SUBSCRIBE
        wanted = Subscribe.parse(frame[1])
        await connection.send(Status(self.term, self.term, START + len(self.log), 0).pack())
        if not wanted.flags & SubscribeFlags.STATUS_ONLY:
            for at in range(wanted.start, START + len(self.log), BUFFER_BYTES):
                connection.write(pack_wal(at, self.log[at - START : at - START + BUFFER_BYTES]))
            self.sent.set()
        while frames := await connection.receive():
            for kind, payload in frames:
                assert kind == FEEDBACK
                self.told.put_nowait(Feedback.parse(payload))

    def server(self, realm: Realm) -> FramedServer:
        return FramedServer(
            Address(host="127.0.0.1", port=0),
            server_context(realm.identity(Service.SAFEKEEPER).files),
            realm.verifier(Service.SAFEKEEPER),
            Scope.WAL_READ,
            MAX_FRAME_SIZE_BYTES,
            self.serve,
        )


def peers_of(servers: Mapping[str, FramedServer]) -> list[Peer]:
    return [Peer(node, Address(port=server.port)) for node, server in servers.items()]


def receiver_of(
    realm: Realm, peers: Sequence[Peer], wal: WalBuilder, ingest: IngestRecords, *, stored_lsn: int = START
) -> WalReceiver:
    """Of a timeline like `wal`, from START on. `stored_lsn`: up to where it is in layers."""
    return WalReceiver(
        ProjectId.new(),
        TimelineId.new(),
        peers,
        realm.issuers[Service.PAGESERVER],
        client_context(realm.ca_certificate),
        WalStreamDecoder(START, system_identifier=wal.system_identifier),
        ingest,
        lambda: stored_lsn,
    )


async def test_whoever_is_not_of_the_committed_term_hears_what_is_in_layers_and_nothing_else(tmp_path: Path) -> None:
    """A term may not be able to begin before: its donor may have to trim what its peers have trimmed (ADR 40)."""
    realm = Realm.create(tmp_path)
    wal = WalBuilder(START)
    wal.append_noop(3000)
    donor = Safekeeper("a", 2, bytes(wal.data))
    async with donor.server(realm) as server:
        receiver = receiver_of(
            realm,
            [Peer("a", Address(port=server.port)), *(Peer(name, Address(port=1)) for name in "bc")],
            wal,
            _ingest_nothing,
            stored_lsn=START + 100,
        )
        work = asyncio.create_task(receiver.run())
        try:
            async with asyncio.timeout(20):
                assert await donor.told.get() == Feedback(0, START + 100, 0)
        finally:
            work.cancel()
            await asyncio.wait([work])


async def test_whoever_is_asked_instead_of_a_source_that_is_behind_comes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old disk may be back, whose log ends before what is ingested. If those who have the rest waited as after a
    failure, the one that was given up could be back first, each time."""
    monkeypatch.setattr(walreceiver, "_SOURCE_CHECK_S", 0.1)
    realm = Realm.create(tmp_path)
    wal = WalBuilder(START)
    for size in (100, 200, 300):
        wal.append_noop(size)
    old, *others = [Safekeeper("a", 1, b""), *(Safekeeper(name, 2, bytes(wal.data)) for name in "bc")]
    arrived = asyncio.Event()

    async def ingest(records: Sequence[RawRecord]) -> None:
        if records[-1] == wal.records[-1]:
            arrived.set()

    async with AsyncExitStack() as stack:
        servers = {each.node_id: await stack.enter_async_context(each.server(realm)) for each in (old, *others)}
        receiver = receiver_of(realm, peers_of(servers), wal, ingest)
        connect = receiver._connect

        async def connect_in_turn(peer: Peer) -> FramedConnection:
            if peer.node_id != old.node_id:
                await old.sent.wait()
            return await connect(peer)

        monkeypatch.setattr(receiver, "_connect", connect_in_turn)
        work = asyncio.create_task(receiver.run())
        try:
            async with asyncio.timeout(20):
                await arrived.wait()
        finally:
            work.cancel()
            await asyncio.wait([work])


async def _ingest_nothing(records: Sequence[RawRecord]) -> None:
    raise AssertionError("nothing is committed")


async def test_a_half_record_that_a_quorum_holds_commits_no_later_terms_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Term 1 leaves a record and half of another one on two nodes. Term 2 cuts the half off, and what it writes in its
    place gets to one node only; term 3, which knows nothing of that, commits other and fewer bytes there."""
    monkeypatch.setattr(walreceiver, "_SOURCE_CHECK_S", 0.05)
    realm = Realm.create(tmp_path)
    logs = [WalBuilder(START) for _ in range(3)]
    for wal, size in zip(logs, (900, 300, 150), strict=True):
        wal.append_noop(100)
        wal.append_noop(size)
    cut, second, third = bytes(logs[0].data[:-200]), bytes(logs[1].data), bytes(logs[2].data)
    assert len(third) < len(second) < len(cut)
    a, b, c = Safekeeper("a", 1, cut), Safekeeper("b", 1, cut), Safekeeper("c", 3, third)
    ingested: list[RawRecord] = []
    arrived = asyncio.Event()

    async def ingest(records: Sequence[RawRecord]) -> None:
        ingested.extend(records)
        arrived.set()

    async with AsyncExitStack() as stack:
        servers = {each.node_id: await stack.enter_async_context(each.server(realm)) for each in (a, b, c)}
        receiver = receiver_of(realm, peers_of(servers), logs[0], ingest)
        reachable = {node: asyncio.Event() for node in "abc"}
        reachable["a"].set()
        reachable["b"].set()
        connect = receiver._connect

        async def connect_when_reachable(peer: Peer) -> FramedConnection:
            await reachable[peer.node_id].wait()
            return await connect(peer)

        monkeypatch.setattr(receiver, "_connect", connect_when_reachable)
        work = asyncio.create_task(receiver.run())
        try:
            async with asyncio.timeout(20):
                await arrived.wait()
                assert receiver.commit_lsn == START + len(cut)
                reachable["b"].clear()
                arrived.clear()
                a.sent.clear()
                a.term, a.log = 2, second
                for connection in list(receiver._connections.values()):
                    connection.abort()
                await a.sent.wait()
                while not receiver._buffer and not arrived.is_set():  # noqa: ASYNC110 - the receiver tells nobody
                    await asyncio.sleep(0.01)
                b.term, b.log = 3, third
                reachable["b"].set()
                reachable["c"].set()
                await arrived.wait()
        finally:
            work.cancel()
            await asyncio.wait([work])
    assert ingested == logs[2].records
    assert receiver.commit_lsn == START + len(third)


async def test_a_source_that_filled_the_buffer_and_lost_an_election_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has sent will never be committed, so the buffer is full for ever: and while it is, nobody reads from the
    connection, to see that it has ended."""
    monkeypatch.setattr(walreceiver, "MAX_BUFFER_SIZE_BYTES", BUFFER_BYTES)
    monkeypatch.setattr(walreceiver, "_SOURCE_CHECK_S", 0.02)
    lost, won = WalBuilder(START), WalBuilder(START)
    lost.fill_to(START + 4 * BUFFER_BYTES)
    for size in (100, 200, 300):
        won.append_noop(size)
    realm = Realm.create(tmp_path)
    a, b, c = Safekeeper("a", 1, bytes(lost.data)), Safekeeper("b", 2, bytes(won.data)), Safekeeper("c", 2, b"")
    c.log = b.log
    ingested: list[RawRecord] = []
    arrived = asyncio.Event()

    async def ingest(records: Sequence[RawRecord]) -> None:
        ingested.extend(records)
        arrived.set()

    async with AsyncExitStack() as stack:
        servers = {each.node_id: await stack.enter_async_context(each.server(realm)) for each in (a, b, c)}
        receiver = receiver_of(realm, peers_of(servers), lost, ingest)
        # The two others come up when the first one has sent everything.
        connected = asyncio.Event()
        connect = receiver._connect

        async def connect_in_turn(peer: Peer) -> FramedConnection:
            if peer.node_id != a.node_id:
                await connected.wait()
            return await connect(peer)

        monkeypatch.setattr(receiver, "_connect", connect_in_turn)
        work = asyncio.create_task(receiver.run())
        try:
            async with asyncio.timeout(20):
                await a.sent.wait()
                while receiver._buffered_bytes <= BUFFER_BYTES:  # noqa: ASYNC110 - the receiver tells nobody
                    await asyncio.sleep(0.01)
                connected.set()
                await arrived.wait()
        finally:
            work.cancel()
            await asyncio.wait([work])
    assert ingested == won.records
    assert receiver.commit_lsn == won.end_lsn
