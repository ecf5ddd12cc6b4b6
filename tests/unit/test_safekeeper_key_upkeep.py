"""Keys of WAL pieces are renewed while WAL comes in, and a kill at any step loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from safekeeper import files, piece_file
from safekeeper.key_upkeep import PieceUpkeep
from safekeeper.wal_store import WalStore
from shared.api.keymanager import KeyUse, ObjectName
from shared.crypto.aead import AeadKey
from shared.crypto.envelope import Envelope
from shared.errors import CorruptedError, KeyAccessError
from shared.ids import ProjectId
from shared.key_upkeep import Pace, UpkeepTuning
from shared.lsn import WAL_SEGMENT_SIZE_BYTES
from tests.fixtures.safekeepers import StoreBench, read_all, store_bench
from tests.unit.test_safekeeper_store import append

FAST = Pace(UpkeepTuning(rewraps_per_s=1e9, rekeyed_bytes_per_s=1e12))
START = 2 * WAL_SEGMENT_SIZE_BYTES - 3000
"""The log crosses a segment's end early, so that it has closed pieces."""


def upkeep(bench: StoreBench, store: WalStore) -> PieceUpkeep:
    return PieceUpkeep(store, bench.directory, store._control, store._keys, bench.pool)


async def uses(bench: StoreBench, store: WalStore) -> list[KeyUse]:
    return (await upkeep(bench, store).census()).uses()


def versions(found: list[KeyUse]) -> set[tuple[int, int]]:
    return {(use.kek_version, use.dek_version) for use in found}


async def keep(bench: StoreBench, store: WalStore) -> None:
    lease = store._keys.project.lease
    assert lease is not None
    await upkeep(bench, store).rekey(lease.dek_floor, FAST)
    await upkeep(bench, store).rewrap(lease.kek_version, FAST)


async def filled(bench: StoreBench, data: bytes) -> WalStore:
    """Some closed pieces, by a segment's end and by restarts, and an open one."""
    third = len(data) // 3
    for start in (0, third, 2 * third):
        store = await bench.open()
        await append(store, data[start : start + third], frame=777)
        if start != 2 * third:
            await store.aclose()
    assert len(bench.state().log.extents) == 4
    return store


@pytest.fixture
def data() -> bytes:
    return random.Random(random.getrandbits(64)).randbytes(30_000)


async def test_after_a_rewrap_the_old_kek_is_not_needed(tmp_path: Path, data: bytes) -> None:
    async with store_bench(tmp_path / "t", start_lsn=START) as bench:
        store = await filled(bench, data)
        before = {path: path.read_bytes() for path in bench.pieces()}
        assert versions(await uses(bench, store)) == {(1, 1)}
        bench.keys.rotate(bench.project_id)
        await keep(bench, store)
        assert versions(await uses(bench, store)) == {(2, 1)}
        assert {path: path.read_bytes() for path in bench.pieces()} == before
        bench.keys.destroy(bench.project_id, 1)
        await append(store, b"more")
        store = await bench.open()
        assert await read_all(store, START) == data + b"more"
        await store.aclose()


async def test_after_a_rekey_every_piece_is_another(tmp_path: Path, data: bytes) -> None:
    async with store_bench(tmp_path / "t", start_lsn=START) as bench:
        store = await filled(bench, data)
        before = set(bench.pieces())
        bench.keys.rotate(bench.project_id, rekey=True)
        await keep(bench, store)
        assert versions(await uses(bench, store)) == {(2, 2)}
        assert not before & set(bench.pieces())
        bench.keys.destroy(bench.project_id, 1)
        assert await read_all(store, START) == data
        await append(store, b"more")
        for _ in range(2):
            store = await bench.open()
            assert await read_all(store, START) == data + b"more"
            await keep(bench, store)  # and nothing is left to do
        sequences = [extent.piece.sequence for extent in bench.state().log.extents]
        assert len(set(sequences)) == len(sequences)
        await store.aclose()


async def test_a_piece_that_was_made_ahead_is_not_used_under_its_old_key(tmp_path: Path, data: bytes) -> None:
    async with store_bench(tmp_path / "t", start_lsn=START) as bench:
        store = await filled(bench, data)
        end = store.flush_lsn // WAL_SEGMENT_SIZE_BYTES * WAL_SEGMENT_SIZE_BYTES + WAL_SEGMENT_SIZE_BYTES
        store.maker.begin(1, end)
        await store.maker.settled()
        bench.keys.rotate(bench.project_id)
        assert versions(await uses(bench, store)) == {(1, 1)}
        await keep(bench, store)
        assert versions(await uses(bench, store)) == {(2, 1)}
        assert store.maker.idle
        await store.aclose()


async def test_writers_and_readers_go_on(tmp_path: Path, data: bytes) -> None:
    """Appends by the receiving thread and by the loop, and reads, while keys change under them again and again."""
    async with store_bench(tmp_path / "t", start_lsn=START) as bench:
        store = await filled(bench, data)
        written = bytearray(data)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        async def write() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                part = bytes([number % 251]) * (500 + number % 700)
                here = number % 3 and await loop.run_in_executor(
                    None, store.append_here, 1, store.flush_lsn, bytearray(part)
                )
                if not here:
                    await store.append(1, store.flush_lsn, [part])
                written.extend(part)

        async def read() -> None:
            while not stop.is_set():
                got = await read_all(store, START)
                assert got[: len(written)] == bytes(written)[: len(got)]  # it may be one append ahead

        async with asyncio.TaskGroup() as group:
            group.create_task(write())
            for _ in range(3):
                group.create_task(read())
            for _ in range(5):
                version = bench.keys.rotate(bench.project_id, rekey=True)
                await keep(bench, store)
                assert versions(await uses(bench, store)) == {(version, version)}
            stop.set()
        assert not store.fault
        store = await bench.open()
        assert await read_all(store, START) == bytes(written)
        await store.aclose()


async def test_a_reader_of_a_piece_that_goes_reads_on_in_the_new_one(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with store_bench(tmp_path / "t", start_lsn=START) as bench:
        store = await filled(bench, data)
        store = await bench.open()  # nothing in memory
        asked, go_on = asyncio.Event(), asyncio.Event()
        unwrap = bench.keys.unwrap

        async def slow_once(project_id: ProjectId, items: Sequence[tuple[ObjectName, Envelope]]) -> list[AeadKey]:
            if not asked.is_set():
                asked.set()
                await go_on.wait()
            return await unwrap(project_id, items)

        monkeypatch.setattr(bench.keys, "unwrap", slow_once)
        reading = asyncio.create_task(store.read(START, 1000))
        await asked.wait()
        bench.keys.rotate(bench.project_id, rekey=True)
        await keep(bench, store)
        go_on.set()
        got = await reading
        assert got
        assert data.startswith(got)
        assert not store.fault
        await store.aclose()


async def test_the_loss_of_keys_waits_for_plaintext_that_is_being_sealed_anew(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with store_bench(tmp_path / "t", start_lsn=START) as bench:
        store = await filled(bench, data)
        keys = upkeep(bench, store)
        reached, go_on = threading.Event(), threading.Event()
        create_closed = piece_file.create_closed

        def slow(*arguments: Any) -> None:
            reached.set()
            assert go_on.wait(20)
            create_closed(*arguments)

        monkeypatch.setattr(piece_file, "create_closed", slow)
        version = bench.keys.rotate(bench.project_id, rekey=True)
        sealing = asyncio.create_task(keys.rekey(version, FAST))
        await asyncio.to_thread(reached.wait, 20)
        await bench.keys.revoke(bench.project_id)
        gone = asyncio.create_task(keys.plaintext_gone())
        await asyncio.sleep(0.02)
        assert not gone.done()
        go_on.set()
        await gone
        with pytest.raises(KeyAccessError):
            await sealing
        await bench.keys.restore(bench.project_id)
        store = await bench.open()
        assert await read_all(store, START) == data
        await store.aclose()


async def test_an_election_is_not_disturbed(tmp_path: Path, data: bytes) -> None:
    """The log is closed while a new piece is being opened: the election wins, and the map has no gap."""
    async with store_bench(tmp_path / "t", start_lsn=START) as bench:
        for cut in (START + 100, START + 20_000):
            bench.create([(1, START)])
            for path in bench.pieces():
                path.unlink()
            store = await filled(bench, data)
            bench.keys.rotate(bench.project_id, rekey=True)
            keeping = asyncio.create_task(keep(bench, store))
            await asyncio.sleep(0)
            await store.persist(bench.state().acceptor, clip_lsn=cut)
            await asyncio.gather(keeping, return_exceptions=True)
            assert not store.fault
            state = bench.state()
            state.log.check(state.acceptor.history)
            await keep(bench, store)
            assert await read_all(store, START) == data[: cut - START]
            await store.aclose()


class KilledError(Exception):
    """The process is gone. No OSError: nobody handles it."""


class Killer:
    """Lets so many changes of the disk happen, then none."""

    def __init__(self, patch: pytest.MonkeyPatch, changes: int, *, dies_after: bool) -> None:
        self.dead = False
        self._left = changes
        self._dies_after = dies_after
        for owner, name in (
            (files, "write_new"),
            (files, "fsync"),
            (os, "replace"),
            (piece_file, "discard"),
        ):
            patch.setattr(owner, name, self._guard(getattr(owner, name)))

    def _guard(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **named: Any) -> Any:
            if self._left == 0 or self.dead:
                self.dead = True
                raise KilledError
            self._left -= 1
            answer = real(*arguments, **named)
            if self._left == 0 and self._dies_after:
                self.dead = True
                raise KilledError
            return answer

        return change


@pytest.fixture
def no_power_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process has written outlives it without a sync, and hundreds of those are what takes time here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)


@pytest.mark.usefixtures("no_power_is_lost")
@pytest.mark.parametrize("dies_after", [False, True])
@pytest.mark.parametrize("rekey", [False, True])
async def test_a_kill_between_any_two_steps_loses_nothing(
    tmp_path: Path, data: bytes, rekey: bool, dies_after: bool
) -> None:
    changes, finished = 0, False
    while not finished:
        async with store_bench(tmp_path / f"{changes}", start_lsn=START) as bench:
            store = await filled(bench, data)
            bench.keys.rotate(bench.project_id, rekey=rekey)
            with pytest.MonkeyPatch.context() as patch:
                killer = Killer(patch, changes, dies_after=dies_after)
                with contextlib.suppress(KilledError):
                    await keep(bench, store)
                finished = not killer.dead
            del store  # no close: the process is gone
            store = await bench.open()
            assert await read_all(store, START) == data
            found = await uses(bench, store)
            done = all(use.kek_version == 2 for use in found)
            assert done or not finished
            if not done:
                await keep(bench, store)
                assert versions(await uses(bench, store)) == ({(2, 2)} if rekey else {(2, 1)})
            bench.keys.destroy(bench.project_id, 1)
            await append(store, b"more")
            store = await bench.open()
            assert await read_all(store, START) == data + b"more"
            assert not [path for path in bench.directory.iterdir() if path.name.endswith(".new")]
            await store.aclose()
        changes += 1
    assert changes > 10, "the pass was cut off at each of its steps"


async def test_a_count_waits_for_a_piece_that_is_being_made(tmp_path: Path, data: bytes) -> None:
    async with store_bench(tmp_path / "t", start_lsn=START) as bench:
        store = await filled(bench, data)
        before = sum(use.objects for use in await uses(bench, store))
        store.maker.begin(1, store.flush_lsn + WAL_SEGMENT_SIZE_BYTES)
        bench.keys.rotate(bench.project_id)
        assert sum(use.objects for use in await uses(bench, store)) == before + 1
        await store.aclose()


async def test_a_damaged_envelope_makes_every_count_fail(tmp_path: Path, data: bytes) -> None:
    """Fail closed: nobody says what is under which key."""
    async with store_bench(tmp_path / "t", start_lsn=START) as bench:
        store = await filled(bench, data)
        key = next(path for path in bench.directory.iterdir() if path.name.endswith(".key"))
        key.write_bytes(key.read_bytes()[:-1])
        with pytest.raises(CorruptedError):
            await uses(bench, store)
        await store.aclose()
