"""Elections among safekeepers with real logs on disk and real connections between them."""

from __future__ import annotations

import asyncio
import errno
import random
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from safekeeper import files, node, piece_file
from safekeeper.wal_sender import Subscription
from shared.api.safekeeper import Donor, TermStart
from shared.auth import Scope, Service
from shared.config import Address
from shared.errors import ConflictError, IntegrityError, InvalidInputError, PermissionDeniedError, UnavailableError
from shared.framed_tcp import FramedConnection, connect
from shared.lsn import WAL_SEGMENT_SIZE_BYTES, Lsn
from shared.tls import client_context
from shared.wal.reader import WalStreamDecoder
from shared.wire.frames import ERROR, ErrorFrame
from shared.wire.walstream import MAX_FRAME_SIZE_BYTES, Feedback, Status, Subscribe, SubscribeFlags
from tests.fixtures.safekeeper_nodes import Leadership, NodeBench, choose, elect, nodes
from tests.fixtures.waiting import wait_until
from tests.fixtures.wal import WalBuilder

START = WAL_SEGMENT_SIZE_BYTES + 40
SIZES = (40, 300, 3000, 20_000)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(random.getrandbits(64))


def records(builder: WalBuilder, rng: random.Random, count: int) -> bytes:
    before = len(builder.data)
    for _ in range(count):
        builder.append_noop(rng.choice(SIZES))
    return bytes(builder.data[before:])


async def logs(benches: list[NodeBench]) -> list[bytes]:
    return [await bench.log() for bench in benches]


async def test_wal_that_only_the_minority_had_is_clipped_and_replaced(tmp_path: Path, rng: random.Random) -> None:
    async with nodes(tmp_path, START) as benches:
        first, second, third = benches
        await elect(benches, 1)
        wal = WalBuilder(START)
        common = records(wal, rng, 20)
        for bench in benches:
            await bench.write(1, START, common)
        fork = WalBuilder(wal.end_lsn, prev_lsn=wal.prev_lsn)
        lost = records(fork, rng, 30)
        await first.write(1, wal.end_lsn, lost)
        pieces = {path: path.read_bytes() for path in first.directory.rglob("0*") if path.suffix != ".key"}
        await first.stop()

        chosen = await elect([second, third], 2)
        assert chosen.start_lsn == wal.end_lsn
        after = records(wal, rng, 25)
        for bench in (second, third):
            await bench.write(2, chosen.start_lsn, after)

        await first.start()
        chosen = await elect(benches, 3)
        assert chosen.donor is not first
        assert await logs(benches) == [common + after] * 3
        assert lost not in await first.log()
        for path, content in pieces.items():
            assert path.read_bytes()[: 1 << 12] == content[: 1 << 12], "an older piece is never rewritten"
        assert [e.term for e in first.timeline.status().term_history] == [1, 2, 3]
        await first.crash()
        await first.start()
        await first.timeline.make_ready()
        assert await first.log() == common + after


async def test_the_cut_is_behind_the_last_whole_record(tmp_path: Path, rng: random.Random) -> None:
    async with nodes(tmp_path, START) as benches:
        await elect(benches, 1)
        wal = WalBuilder(START)
        whole = records(wal, rng, 10)
        half = records(wal, rng, 1)[:20]
        for bench, data in zip(benches, (whole + half, whole + half[:10], whole[:-100]), strict=True):
            await bench.write(1, START, data)
        chosen = await elect(benches, 2)
        assert chosen.start_lsn == START + len(whole)
        assert await logs(benches) == [whole] * 3


@pytest.mark.parametrize("missing", range(1, 8))
async def test_the_padding_behind_the_last_record_is_filled(tmp_path: Path, rng: random.Random, missing: int) -> None:
    """Postgres's flush position need not be aligned; the next term starts aligned."""
    async with nodes(tmp_path, START) as benches:
        await elect(benches, 1)
        wal = WalBuilder(START)
        wal.append_noop(1000)
        wal.append_noop(1001)  # seven bytes of padding
        data = bytes(wal.data)[:-missing]
        for bench, size in zip(benches, (len(data), len(data), 500), strict=True):
            await bench.write(1, START, data[:size])
        chosen = await elect(benches, 2)
        assert chosen.start_lsn == wal.end_lsn
        assert await logs(benches) == [bytes(wal.data)] * 3


async def test_the_rest_of_a_segment_after_a_switch_is_filled(tmp_path: Path, rng: random.Random) -> None:
    async with nodes(tmp_path, START) as benches:
        await elect(benches, 1)
        wal = WalBuilder(START)
        before = records(wal, rng, 5)
        switch_at = wal.end_lsn
        wal.switch()
        for bench, extra in zip(benches, (5000, 24, 100), strict=True):
            await bench.write(1, START, bytes(wal.data)[: switch_at - START + extra])
        chosen = await elect(benches, 2)
        assert chosen.start_lsn == 2 * WAL_SEGMENT_SIZE_BYTES
        copies = await logs(benches)
        assert copies[0] == copies[1] == copies[2]
        assert len(copies[0]) == 2 * WAL_SEGMENT_SIZE_BYTES - START
        assert copies[0].startswith(before)


async def test_an_empty_timeline_elects_its_start(tmp_path: Path) -> None:
    async with nodes(tmp_path, START) as benches:
        found = await benches[0].timeline.end_of_wal()
        assert (found.last_record_lsn, found.end_lsn) == (Lsn(0), Lsn(START))
        assert (await elect(benches, 1)).start_lsn == START
        assert (await elect(benches, 5)).start_lsn == START
        assert [bench.timeline.status().last_log_term for bench in benches] == [5, 5, 5]


async def test_a_history_that_takes_back_committed_wal_is_refused(tmp_path: Path, rng: random.Random) -> None:
    async with nodes(tmp_path, START) as benches:
        await elect(benches, 1)
        data = records(WalBuilder(START), rng, 10)
        for bench in benches:
            await bench.write(1, START, data)
        timeline = benches[0].timeline
        timeline.feedback(Feedback(START + len(data), 0))
        await benches[0].vote(2)
        history = [TermStart(term=1, start_lsn=Lsn(START)), TermStart(term=2, start_lsn=Lsn(START + 400))]
        with pytest.raises(ConflictError, match="committed"):
            await benches[0].elected(2, history, benches[1].donor)
        assert await benches[0].log() == data
        with pytest.raises(ConflictError):
            await benches[0].elected(3, [*history[:1], TermStart(term=3, start_lsn=Lsn(START + 400))], benches[1].donor)
        with pytest.raises(InvalidInputError):
            await benches[0].elected(2, [TermStart(term=2, start_lsn=Lsn(START + 8))], benches[1].donor)
        with pytest.raises(InvalidInputError):
            await benches[0].elected(2, history[:1], benches[1].donor)
        assert await benches[0].log() == data


async def test_feedback_counts_only_in_the_logs_own_term(tmp_path: Path, rng: random.Random) -> None:
    async with nodes(tmp_path, START) as benches:
        await elect(benches, 1)
        data = records(WalBuilder(START), rng, 3)
        await benches[0].write(1, START, data)
        await benches[0].vote(2)
        benches[0].timeline.feedback(Feedback(START + len(data), 0))
        assert benches[0].timeline.status().commit_lsn == Lsn(START)


class SlowDisk:
    """Control files are not written before `go_on`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.writing, self.go_on = threading.Event(), threading.Event()
        self._replace_file = files.replace_file
        patch.setattr(files, "replace_file", self._slowly)

    def _slowly(self, path: Path, data: bytes) -> None:
        self.writing.set()
        assert self.go_on.wait(20)
        self._replace_file(path, data)


async def test_feedback_is_taken_from_pageservers_only(tmp_path: Path, rng: random.Random) -> None:
    """Computes and peers read WAL by the same port. By their word nothing is committed, or in layers."""
    async with nodes(tmp_path, START, count=1) as [bench]:
        await elect([bench], 1, of=1)
        data = records(WalBuilder(START), rng, 3)
        await bench.write(1, START, data)
        assert bench.server is not None
        address, context = Address(port=bench.server.port), client_context(bench.realm.ca_certificate)
        end = START + len(data)

        async def connected(service: Service, *scopes: Scope) -> FramedConnection:
            token = bench.realm.issuers[service].issue(Service.SAFEKEEPER, scopes, project_id=bench.project_id)
            connection = await connect(Service.SAFEKEEPER, address, context, token, MAX_FRAME_SIZE_BYTES)
            flags = SubscribeFlags.STATUS_ONLY
            await connection.send(Subscribe(bench.project_id, bench.timeline_id, START, 0, flags).pack())
            await connection.send(Feedback(end, end, end).pack())
            return connection

        for service in (Service.COMPUTE, Service.SAFEKEEPER):
            connection = await connected(service, Scope.WAL_READ)
            said = []
            while frames := await connection.receive():
                said += [ErrorFrame.parse(payload).exception() for kind, payload in frames if kind == ERROR]
            assert [type(error) for error in said] == [PermissionDeniedError]
            await connection.close()
            with pytest.raises(PermissionDeniedError):
                await connected(service, Scope.WAL_READ, Scope.WAL_FEEDBACK)
        state = bench.timeline._control.state
        assert (state.acceptor.commit_lsn, state.remote_consistent_lsn) == (START, 0)

        connection = await connected(Service.PAGESERVER, Scope.WAL_READ, Scope.WAL_FEEDBACK)
        await wait_until(lambda: bench.timeline.status().commit_lsn == Lsn(end))
        assert bench.timeline._control.state.remote_consistent_lsn == end
        await connection.close()


async def test_feedback_counts_as_far_as_the_log_reaches_and_in_its_own_term(
    tmp_path: Path, rng: random.Random
) -> None:
    async with nodes(tmp_path, START, count=1) as [bench]:
        await elect([bench], 1, of=1)
        data = records(WalBuilder(START), rng, 3)
        await bench.write(1, START, data[:100])
        beyond = (1 << 64) - 1
        bench.timeline.feedback(Feedback(beyond, beyond, beyond))
        state = bench.timeline._control.state
        assert (state.acceptor.commit_lsn, state.remote_consistent_lsn) == (START + 100, START + 100)
        await bench.write(1, START, data)
        await bench.vote(2)
        bench.timeline.feedback(Feedback(beyond, beyond, beyond))
        state = bench.timeline._control.state
        assert (state.acceptor.commit_lsn, state.remote_consistent_lsn) == (START + 100, START + 100)


async def test_what_was_promised_is_not_taken_back_by_those_who_write_beside_it(
    tmp_path: Path, rng: random.Random
) -> None:
    """While a vote is being written, housekeeping writes commit_lsn, and its caller leaves."""
    async with nodes(tmp_path, START, count=1) as [bench]:
        await elect([bench], 1, of=1)
        data = records(WalBuilder(START), rng, 3)
        await bench.write(1, START, data)
        timeline = bench.timeline
        timeline.feedback(Feedback(START + len(data), 0))
        with pytest.MonkeyPatch.context() as patch:
            disk = SlowDisk(patch)
            voting = asyncio.create_task(bench.vote(5))
            await asyncio.to_thread(disk.writing.wait, 20)
            keeping = asyncio.create_task(timeline.persist_commit_lsn())
            await asyncio.sleep(0)
            disk.go_on.set()
            assert (await voting).granted
            await keeping
        assert timeline.status().term == 5
        assert timeline.status().commit_lsn == Lsn(START + len(data))

        with pytest.MonkeyPatch.context() as patch:
            disk = SlowDisk(patch)
            voting = asyncio.create_task(bench.vote(7))
            await asyncio.to_thread(disk.writing.wait, 20)
            voting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await voting
            lower = asyncio.create_task(bench.vote(6))
            await asyncio.sleep(0)
            disk.go_on.set()
            assert not (await lower).granted
        assert timeline.status().term == 7
        await bench.crash()
        await bench.start()
        assert bench.timeline.status().term == 7


async def test_housekeeping_outlives_what_goes_wrong_with_a_timeline(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "_HOUSEKEEPING_PERIOD_S", 0.01)
    async with nodes(tmp_path, START, count=1) as [bench]:
        await elect([bench], 1, of=1)
        data = records(WalBuilder(START), rng, 3)
        await bench.write(1, START, data)
        await bench.crash()
        refused = []

        def refuse(*arguments: Any) -> Any:
            refused.append(arguments)
            raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(piece_file, "read_header", refuse)
            await bench.start()
            await wait_until(lambda: len(refused) > 2)
            with pytest.raises(UnavailableError):
                await bench.log()
        await wait_until(lambda: bench.timeline.loaded)
        assert await bench.log() == data

        def defect() -> None:
            refused.clear()
            raise ValueError("a defect")

        with monkeypatch.context() as patch:
            patch.setattr(bench.timeline._store, "persist_commit_lsn", defect)
            bench.timeline.feedback(Feedback(START + 100, 0))
            await wait_until(lambda: not refused)
        persisted = bench.timeline._control
        await wait_until(lambda: not persisted.commit_lsn_is_dirty)


async def test_a_vote_overtakes_a_recovery_that_hangs(tmp_path: Path, rng: random.Random) -> None:
    async with nodes(tmp_path, START) as benches:
        await elect(benches, 1)
        wal = WalBuilder(START)
        data = records(wal, rng, 10)
        for bench in benches[:2]:
            await bench.write(1, START, data)
        chosen = await choose(benches, 2)
        assert chosen is not None
        nobody = Donor(node_id="safekeeper-2", address=Address(port=1))
        waiting = asyncio.create_task(benches[2].elected(2, chosen.history, nobody))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        assert (await benches[2].vote(3)).granted
        with pytest.raises(ConflictError):
            await waiting
        chosen = await elect(benches, 4)
        assert await logs(benches) == [data] * 3


async def test_elected_may_be_repeated_and_given_another_donor(tmp_path: Path, rng: random.Random) -> None:
    async with nodes(tmp_path, START) as benches:
        await elect(benches, 1)
        data = records(WalBuilder(START), rng, 10)
        for bench in benches[:2]:
            await bench.write(1, START, data)
        chosen = await choose(benches, 2)
        assert chosen is not None
        nobody = Donor(node_id="safekeeper-2", address=Address(port=1))
        hanging = asyncio.create_task(benches[2].elected(2, chosen.history, nobody))
        await asyncio.sleep(0.2)
        for _ in range(2):
            status = await benches[2].elected(2, chosen.history, chosen.donor.donor)
            assert status.flush_lsn == Lsn(START + len(data))
        with pytest.raises(ConflictError):
            await hanging


async def test_what_a_damaged_disk_means(tmp_path: Path, rng: random.Random) -> None:
    """A timeline whose log or control file is damaged neither votes nor serves, says so, and stays so."""
    async with nodes(tmp_path, START) as benches:
        await elect(benches, 1)
        data = records(WalBuilder(START), rng, 10)
        for bench in benches:
            await bench.write(1, START, data)
        for bench in benches:
            await bench.crash()
        [piece] = [p for p in benches[0].directory.rglob("0*") if p.suffix != ".key"]
        content = bytearray(piece.read_bytes())
        content[200] ^= 1
        piece.write_bytes(content)
        [control] = benches[1].directory.rglob("control")
        control.write_bytes(control.read_bytes()[:-1] + b"?")
        [gone] = benches[2].directory.rglob("control")
        gone.unlink()
        for bench in benches:
            await bench.start()
            assert bench.node is not None
            with pytest.raises(IntegrityError):
                await bench.vote(2)
            if bench is not benches[0]:  # not made anew, as if nothing had ever been promised
                with pytest.raises(IntegrityError):
                    await bench.create(START)
            assert str(bench.timeline_id) in bench.node.status().fault
            with pytest.raises(IntegrityError):
                await bench.node.log(bench.project_id, bench.timeline_id)


async def test_two_processes_never_share_a_directory(tmp_path: Path) -> None:
    async with nodes(tmp_path, START, 1) as [bench]:
        twin = NodeBench(bench.node_id, bench.directory, bench.realm, bench.pool, bench.project_id, bench.timeline_id)
        with pytest.raises(ConflictError):
            await twin.start()


async def test_random_elections_crashes_and_writes_lose_nothing(tmp_path: Path, rng: random.Random) -> None:
    """The model test's claim (tests/property/test_safekeeper_consensus.py) with real logs, keys, files and sockets."""
    async with nodes(tmp_path, START) as benches:
        committed = b""
        commits = 0
        term = 1
        leader: Leadership = await elect(benches, term)
        wal = bytearray()
        for _ in range(80):
            action = rng.choice(["elect", "write", "write", "write", "write", "crash", "start", "start"])
            up = [bench for bench in benches if bench.up]
            if action == "elect":
                term += 1
                chosen = await choose(rng.sample(up, rng.randrange(1, len(up) + 1)), term)
                if chosen is None:
                    continue
                leader = chosen
                wal = bytearray((await chosen.donor.log())[: chosen.start_lsn - START])
                wal += bytes(chosen.start_lsn - START - len(wal))
                assert wal.startswith(committed)
                for bench in up:
                    if rng.random() < 0.8 and bench.timeline.status().term == term:
                        await bench.elected(term, chosen.history, chosen.donor.donor)
            elif action == "write":
                builder = WalBuilder(START + len(wal), prev_lsn=last_record(bytes(wal)))
                wal += records(builder, rng, rng.randrange(1, 4))
                acknowledged = []
                for bench in rng.sample(up, rng.randrange(1, len(up) + 1)):
                    cut = len(wal) - rng.choice([0, 0, 0, 0, 0, 0, 5, 33])
                    try:
                        await bench.write(leader.term, START, bytes(wal[:cut]), rng.choice([100, 1000, 1 << 20]))
                    except ConflictError:
                        continue
                    acknowledged.append(bench.timeline.flush_lsn - START)
                acknowledged.sort(reverse=True)
                if len(acknowledged) >= 2 and acknowledged[1] == len(wal):
                    assert wal.startswith(committed)
                    committed = bytes(wal)
                    commits += 1
            elif action == "crash" and len(up) > 1:
                await rng.choice(up).crash()
            elif action == "start":
                for bench in benches:
                    if not bench.up:
                        await bench.start()
        for bench in benches:
            if not bench.up:
                await bench.start()
        await elect(benches, term + 1)
        final = await logs(benches)
        assert final[0] == final[1] == final[2]
        assert final[0].startswith(committed)


def last_record(data: bytes) -> int:
    """Start of the last record in the log `data`; 0 when there is none."""
    decoder = WalStreamDecoder(START)
    decoder.feed(START, data)
    return decoder.last_record_start or 0


async def test_no_subscription_begins_while_the_log_is_clipped(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be sent the old tail, and then the status of the new history: bytes of two histories on one
    connection."""
    async with nodes(tmp_path, START) as benches:
        first, second, third = benches
        await elect(benches, 1)
        wal = WalBuilder(START)
        await first.write(1, START, records(wal, rng, 5))
        chosen = await choose([second, third], 2)
        assert chosen is not None
        await first.vote(2)
        timeline = first.timeline
        persist, reached, release = timeline._store.persist, asyncio.Event(), asyncio.Event()

        async def slow(*args: Any) -> None:
            reached.set()
            await release.wait()
            await persist(*args)

        monkeypatch.setattr(timeline._store, "persist", slow)
        electing = asyncio.create_task(first.elected(2, chosen.history, chosen.donor.donor))
        await reached.wait()
        with pytest.raises(UnavailableError, match="subscribe again"):
            timeline.subscribe(cast("Subscription", object()))
        release.set()
        await electing
        assert first.timeline.flush_lsn == START
        await peer_log(first, second)


async def peer_log(server: NodeBench, client: NodeBench) -> None:
    """The WAL port takes subscriptions."""
    connection = await client._connect(server.donor, server.project_id)
    await connection.send(Subscribe(server.project_id, server.timeline_id, START, 0, SubscribeFlags.NONE).pack())
    frame = await connection.receive_one()
    assert frame is not None
    assert Status.parse(frame[1]).term == 2
    await connection.close()
