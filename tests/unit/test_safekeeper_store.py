"""The log on disk: what is appended is read back, whatever crashes, and damage is never served."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safekeeper import files, piece_file
from safekeeper.control_store import DiskFullError
from safekeeper.term_history import TermHistory
from safekeeper.wal_segment import FRAME_OVERHEAD_SIZE_BYTES, PIECE_HEADER_SIZE_BYTES, PieceId
from safekeeper.wal_store import StoreTuning, WalStore
from shared.errors import ConflictError, IntegrityError, InvalidInputError, KeyAccessError, UnavailableError
from shared.lsn import WAL_SEGMENT_SIZE_BYTES
from tests.fixtures.broken_sync import BrokenSync
from tests.fixtures.safekeepers import START_LSN, StoreBench, read_all, store_bench


@pytest.fixture
def rng() -> random.Random:
    """Seeded by pytest-randomly, so a failure comes back with `-p randomly -p "randomly_seed=…"`."""
    return random.Random(random.getrandbits(64))


async def append(store: WalStore, data: bytes, term: int = 1, frame: int = 1000) -> None:
    for start in range(0, len(data), frame):
        await store.append(term, store.flush_lsn, [data[start : start + frame]])


def test_zeros_fall_between_their_neighbours_in_writes_of_a_few_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large write would become one folio of the page cache, which makes every sync of a frame in it dearer."""
    sizes: list[int] = []
    pwrite = os.pwrite

    def noted(descriptor: int, data: bytes, offset: int) -> int:
        sizes.append(len(data))
        return pwrite(descriptor, data, offset)

    path = tmp_path / "piece"
    path.write_bytes(b"\xff" * 100_000)
    monkeypatch.setattr(os, "pwrite", noted)
    with path.open("r+b") as file:
        files.write_zeros(file.fileno(), 40, 90_001)
    assert path.read_bytes() == b"\xff" * 40 + bytes(89_961) + b"\xff" * 9_999
    assert max(sizes) <= 16 * 1024


async def test_reads_back_what_was_appended_in_parts(tmp_path: Path) -> None:
    async with store_bench(tmp_path / "t") as bench:
        store = await bench.open()
        assert await store.append(1, START_LSN, [b"one", memoryview(b"two"), b"three"]) == START_LSN + 11
        assert await store.read(START_LSN, 100) == b"onetwothree"
        assert await store.read(START_LSN + 3, 3) == b"two"
        assert await store.read(START_LSN + 11, 100) == b""
        assert await store.read(START_LSN + 12345, 100) == b""
        with pytest.raises(InvalidInputError):
            await store.read(START_LSN - 1, 1)
        with pytest.raises(ConflictError):
            await store.append(1, START_LSN + 12, [b"a gap"])
        with pytest.raises(ConflictError):
            await store.append(1, START_LSN + 3, [b"a rewrite"])
        await store.aclose()


async def test_reads_come_from_disk_too(tmp_path: Path, rng: random.Random) -> None:
    data = rng.randbytes(300_000)
    async with store_bench(tmp_path / "t") as bench:
        store = await bench.open()
        await append(store, data, frame=777)
        store.drop_keys()  # cache and open pieces
        for _ in range(50):
            at, size = rng.randrange(len(data)), rng.randrange(1, 5000)
            got = await store.read(START_LSN + at, size)
            assert got == data[at : at + len(got)]
            assert len(got) >= 1
        assert await read_all(store, START_LSN) == data
        await append(store, b"more, in a piece with a new key")
        assert len(bench.state().log.extents) == 2
        assert await read_all(store, START_LSN) == data + b"more, in a piece with a new key"
        await store.aclose()


async def test_survives_a_crash_at_any_point_between_appends(tmp_path: Path, rng: random.Random) -> None:
    data = rng.randbytes(50_000)
    async with store_bench(tmp_path / "t") as bench:
        done = 0
        while done < len(data):
            store = await bench.open()
            assert store.flush_lsn == START_LSN + done
            for _ in range(rng.randrange(4)):
                size = rng.randrange(1, 4000)
                await append(store, data[done : done + size], frame=5000)
                done = min(done + size, len(data))
            del store  # no close: the process is gone
        store = await bench.open()
        assert await read_all(store, START_LSN) == data
        sequences = [extent.piece.sequence for extent in bench.state().log.extents]
        assert sequences == sorted(set(sequences)), "a piece's name is never used twice"
        await store.aclose()


async def test_a_segment_boundary_starts_a_new_piece(tmp_path: Path, rng: random.Random) -> None:
    start = 2 * WAL_SEGMENT_SIZE_BYTES - 5000
    data = rng.randbytes(WAL_SEGMENT_SIZE_BYTES + 20_000)
    async with store_bench(tmp_path / "t", start_lsn=start) as bench:
        store = await bench.open()
        await append(store, data, frame=700_001)
        assert [e.piece.segment_number for e in bench.state().log.extents] == [1, 2, 3]
        assert [e.start_lsn for e in bench.state().log.extents][1:] == [
            2 * WAL_SEGMENT_SIZE_BYTES,
            3 * WAL_SEGMENT_SIZE_BYTES,
        ]
        assert await read_all(store, start, 1 << 20) == data
        await store.aclose()
        store = await bench.open()
        assert await read_all(store, start, 1 << 20) == data
        assert all(path.stat().st_size < WAL_SEGMENT_SIZE_BYTES + 100_000 for path in bench.pieces())
        await store.aclose()


async def test_a_clip_is_logical_and_survives_a_restart(tmp_path: Path) -> None:
    async with store_bench(tmp_path / "t") as bench:
        store = await bench.open()
        await append(store, b"a" * 3000)
        [piece] = bench.pieces()
        before = piece.read_bytes()[: PIECE_HEADER_SIZE_BYTES + 3 * (1000 + FRAME_OVERHEAD_SIZE_BYTES)]
        acceptor = bench.state().acceptor
        cut = START_LSN + 1500
        history = TermHistory.of([(1, START_LSN), (2, cut)])
        await store.persist(replace(acceptor, term=2, history=history), clip_lsn=cut)
        assert store.flush_lsn == cut
        assert await read_all(store, START_LSN) == b"a" * 1500
        await append(store, b"b" * 1000, term=2)
        assert await read_all(store, START_LSN) == b"a" * 1500 + b"b" * 1000
        assert piece.read_bytes() == before, "an older piece is never rewritten"
        for _ in range(2):
            store = await bench.open()
            assert await read_all(store, START_LSN) == b"a" * 1500 + b"b" * 1000
        await store.aclose()


async def test_no_plaintext_and_no_key_on_disk(tmp_path: Path) -> None:
    canary = b"canary-4711-in-the-wal"
    async with store_bench(tmp_path / "t") as bench:
        store = await bench.open()
        await append(store, canary * 100)
        on_disk = b"".join(path.read_bytes() for path in bench.directory.iterdir())
        assert canary not in on_disk
        assert canary in await read_all(store, START_LSN)
        await store.aclose()


# --- damage ---


async def written(bench: StoreBench, data: bytes, frame: int = 900) -> Path:
    """One piece, its process gone."""
    store = await bench.open()
    await append(store, data, frame=frame)
    [piece] = bench.pieces()
    return piece


async def test_a_tail_torn_at_any_byte_is_cut(tmp_path: Path, rng: random.Random) -> None:
    """The file ends inside the last frame: cut there, all frames before are kept, and the log goes on."""
    data = rng.randbytes(600)
    async with store_bench(tmp_path / "t") as bench:
        piece = await written(bench, data, frame=200)
        content = piece.read_bytes()
        control = (bench.directory / "control").read_bytes()
        last_start = PIECE_HEADER_SIZE_BYTES + 2 * (200 + FRAME_OVERHEAD_SIZE_BYTES)
        last_end = last_start + 200 + FRAME_OVERHEAD_SIZE_BYTES
        for size in range(last_start, last_end + 1):
            piece.write_bytes(content[:size])
            (bench.directory / "control").write_bytes(control)
            store = await bench.open()
            kept = 600 if size == last_end else 400
            assert store.flush_lsn == START_LSN + kept, size
            if size % 40 == 0:
                await append(store, b"next")
                assert await read_all(store, START_LSN) == data[:kept] + b"next"
                await store.aclose()


async def test_a_tail_of_which_any_sectors_are_missing_is_cut(tmp_path: Path, rng: random.Random) -> None:
    """A power cut keeps any subset of the sectors of the one frame that was being written."""
    data = rng.randbytes(9000)
    async with store_bench(tmp_path / "t") as bench:
        piece = await written(bench, data, frame=4500)
        content = piece.read_bytes()
        last_start = PIECE_HEADER_SIZE_BYTES + 4500 + FRAME_OVERHEAD_SIZE_BYTES
        last_end = last_start + 4500 + FRAME_OVERHEAD_SIZE_BYTES
        sectors = list(range(last_start // 512, last_end // 512 + 1))
        for _ in range(60):
            missing = rng.sample(sectors, rng.randrange(1, len(sectors) + 1))
            torn = bytearray(content)
            for sector in missing:
                start, end = max(sector * 512, last_start), min((sector + 1) * 512, last_end)
                torn[start:end] = bytes(end - start)
            piece.write_bytes(torn)
            store = await bench.open()
            assert store.flush_lsn == START_LSN + 4500, missing


async def test_every_altered_byte_is_noticed(tmp_path: Path, rng: random.Random) -> None:
    """Header, frame headers, ciphertext, tags, last frame included: never a shorter log, never other bytes."""
    async with store_bench(tmp_path / "t") as bench:
        piece = await written(bench, rng.randbytes(1500), frame=300)
        content = piece.read_bytes()
        used = PIECE_HEADER_SIZE_BYTES + 5 * (300 + FRAME_OVERHEAD_SIZE_BYTES)
        key = piece.with_name(piece.name + ".key")
        positions = {*range(PIECE_HEADER_SIZE_BYTES + 30), *range(used - 400, used), *rng.sample(range(used), 200)}
        for position in sorted(positions):
            altered = bytearray(content)
            altered[position] ^= 1 << rng.randrange(8)
            piece.write_bytes(altered)
            with pytest.raises(IntegrityError):
                await bench.open()
        piece.write_bytes(content)
        envelope = key.read_bytes()
        for position in range(len(envelope)):
            altered = bytearray(envelope)
            altered[position] ^= 1 << rng.randrange(8)
            key.write_bytes(altered)
            with pytest.raises(IntegrityError):
                await bench.open()


async def test_altered_bytes_of_a_closed_piece_are_noticed_when_read(tmp_path: Path, rng: random.Random) -> None:
    data = rng.randbytes(2000)
    async with store_bench(tmp_path / "t") as bench:
        piece = await written(bench, data, frame=500)
        store = await bench.open()
        await append(store, b"the next piece")
        content = piece.read_bytes()
        for position in rng.sample(range(PIECE_HEADER_SIZE_BYTES, len(content)), 60):
            altered = bytearray(content)
            altered[position] ^= 1 << rng.randrange(8)
            piece.write_bytes(altered)
            store = await bench.open()
            with pytest.raises(IntegrityError):
                await read_all(store, START_LSN)
            assert store.fault
            with pytest.raises(IntegrityError):  # for good, and for everything
                await store.append(1, store.flush_lsn, [b"x"])
            with pytest.raises(IntegrityError):
                await store.read(store.flush_lsn - 1, 1)
            piece.write_bytes(content)


async def test_a_missing_piece_or_key_is_noticed_without_a_key(tmp_path: Path) -> None:
    async with store_bench(tmp_path / "t") as bench:
        piece = await written(bench, b"x" * 1000)
        bench.keys.available = False
        for path in (piece, piece.with_name(piece.name + ".key")):
            content = path.read_bytes()
            path.unlink()
            with pytest.raises(IntegrityError):
                await bench.open(load=False)
            path.write_bytes(content)
        await bench.open(load=False)


async def test_an_older_copy_of_a_piece_is_noticed(tmp_path: Path) -> None:
    async with store_bench(tmp_path / "t") as bench:
        store = await bench.open()
        await append(store, b"a" * 1000)
        [piece] = bench.pieces()
        older = piece.read_bytes()
        await append(store, b"b" * 1000)
        store = await bench.open()  # closes the piece when it next appends
        await append(store, b"c" * 1000)
        piece.write_bytes(older)
        store = await bench.open()
        with pytest.raises(IntegrityError):
            await read_all(store, START_LSN)


async def test_an_older_copy_of_the_open_piece_is_noticed_below_commit_lsn(tmp_path: Path) -> None:
    async with store_bench(tmp_path / "t") as bench:
        store = await bench.open()
        await append(store, b"a" * 1000)
        [piece] = bench.pieces()
        older = piece.read_bytes()
        await append(store, b"b" * 1000)
        await store.persist(replace(bench.state().acceptor, commit_lsn=START_LSN + 1500))
        piece.write_bytes(older)
        with pytest.raises(IntegrityError, match="committed"):
            await bench.open()


async def test_pieces_do_not_pass_for_one_another(tmp_path: Path) -> None:
    """Same LSNs, same term, same sequence: another timeline's, another node's, another project's piece."""
    async with store_bench(tmp_path / "a") as bench:
        piece = await written(bench, b"mine" * 100)
        others = [
            StoreBench(tmp_path / "b", bench.pool, bench.keys, bench.project_id, node_id=bench.node_id),
            StoreBench(tmp_path / "c", bench.pool, bench.keys, bench.project_id, bench.timeline_id, "safekeeper-2"),
            StoreBench(tmp_path / "d", bench.pool, bench.keys, timeline_id=bench.timeline_id),
        ]
        for other in others:
            other.create([(1, START_LSN)])
            foreign = await written(other, b"yours" * 100)
            kept = tmp_path / "kept"
            shutil.copytree(bench.directory, kept)
            shutil.copy(foreign, piece)
            with pytest.raises(IntegrityError):  # the other's data under our key
                await bench.open()
            shutil.copy(foreign.with_name(foreign.name + ".key"), piece.with_name(piece.name + ".key"))
            with pytest.raises(IntegrityError):  # ... and with its own key
                await bench.open()
            shutil.rmtree(bench.directory)
            shutil.move(kept, bench.directory)
        assert (await bench.open()).flush_lsn == START_LSN + 400


async def test_files_that_are_not_part_of_the_log_go_away(tmp_path: Path) -> None:
    async with store_bench(tmp_path / "t") as bench:
        await written(bench, b"x" * 100)
        stray = bench.directory / PieceId(7, 9, 3).file_name
        stray.write_bytes(b"never came into use")
        stray.with_name(stray.name + ".key").write_bytes(b"...")
        store = await bench.open()
        assert not stray.exists()
        assert not stray.with_name(stray.name + ".key").exists()
        assert await store.read(START_LSN, 1000) == b"x" * 100


# --- the environment ---


async def test_a_full_disk_stops_acknowledging_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RLIMIT_FSIZE: a real EFBIG from the kernel, in the middle of a frame."""
    monkeypatch.setattr(piece_file, "INITIAL_ALLOCATION_BYTES", 4096)
    monkeypatch.setattr(piece_file, "ALLOCATION_STEP_BYTES", 4096)
    async with store_bench(tmp_path / "t") as bench:
        store = await bench.open()
        await append(store, b"a" * 2000)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        data, at = b"b" * 20_000, store.flush_lsn
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            for _ in range(2):
                with pytest.raises(DiskFullError):
                    await store.append(1, at, [data])
                assert store.flush_lsn == at
                assert await read_all(store, START_LSN) == b"a" * 2000
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        await store.append(1, at, [data])
        assert await read_all(store, START_LSN) == b"a" * 2000 + data
        store = await bench.open()
        assert await read_all(store, START_LSN) == b"a" * 2000 + data
        await store.aclose()


async def test_a_failed_fsync_is_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with store_bench(tmp_path / "t") as bench:
        store = await bench.open()
        await append(store, b"a" * 2000)

        def fail(descriptor: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(IntegrityError):
                await store.append(1, store.flush_lsn, [b"lost?"])
        assert store.flush_lsn == START_LSN + 2000
        with pytest.raises(IntegrityError):
            await store.append(1, store.flush_lsn, [b"never again"])
        with pytest.raises(IntegrityError):
            await store.read(START_LSN, 1)


ACROSS = 2 * WAL_SEGMENT_SIZE_BYTES - 1500
"""A log that begins here has a second piece behind 1500 bytes."""


def refusing(number: int) -> Callable[..., Any]:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


async def test_a_clip_that_leaves_files_on_the_disk_is_a_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk keeps is not part of the log any more. The log goes on where it was cut, without a gap."""
    async with store_bench(tmp_path / "t", start_lsn=ACROSS) as bench:
        store = await bench.open()
        await append(store, b"a" * 3000)
        _, dropped = bench.pieces()
        cut = ACROSS + 700
        promised = replace(bench.state().acceptor, term=2, history=TermHistory.of([(1, ACROSS), (2, cut)]))
        with monkeypatch.context() as patch:
            patch.setattr(piece_file, "discard", refusing(errno.EROFS))
            await store.persist(promised, clip_lsn=cut)
        assert store.flush_lsn == cut
        await append(store, b"b" * 500, term=2)
        state = bench.state()
        state.log.check(state.acceptor.history)
        assert dropped.exists()
        store = await bench.open()
        assert await read_all(store, ACROSS) == b"a" * 700 + b"b" * 500
        assert not dropped.exists(), "the next start removes it"
        await store.aclose()


async def test_a_clip_whose_caller_is_cancelled_is_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with store_bench(tmp_path / "t", start_lsn=ACROSS) as bench:
        store = await bench.open()
        await append(store, b"a" * 3000)
        cut = ACROSS + 700
        promised = replace(bench.state().acceptor, term=2, history=TermHistory.of([(1, ACROSS), (2, cut)]))
        writing, go_on, replace_file = threading.Event(), threading.Event(), files.replace_file

        def slowly(path: Path, data: bytes) -> None:
            writing.set()
            assert go_on.wait(20)
            replace_file(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(files, "replace_file", slowly)
            clipping = asyncio.create_task(store.persist(promised, clip_lsn=cut))
            await asyncio.to_thread(writing.wait, 20)
            clipping.cancel()
            with pytest.raises(asyncio.CancelledError):
                await clipping
            go_on.set()
            await store.persist_commit_lsn()  # comes behind it
        assert store.flush_lsn == cut
        await append(store, b"b" * 500, term=2)
        state = bench.state()
        state.log.check(state.acceptor.history)
        assert await read_all(store, ACROSS) == b"a" * 700 + b"b" * 500
        await store.aclose()


async def test_a_disk_that_says_not_now_at_the_start_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with store_bench(tmp_path / "t") as bench:
        await written(bench, b"a" * 1000)
        for name in ("read_header", "open_verified"):
            with monkeypatch.context() as patch:
                patch.setattr(piece_file, name, refusing(errno.EMFILE))
                store = await bench.open(check=False, load=False)
                with pytest.raises(UnavailableError):
                    await store.load()
            assert not store.fault
            await store.load()
            assert await read_all(store, START_LSN) == b"a" * 1000


@pytest.mark.parametrize("directory", [False, True])
async def test_a_control_file_whose_fsync_failed_is_never_relied_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: bool
) -> None:
    """Neither the old promise nor the new one is on the disk for sure: nobody is told either, by this process."""
    async with store_bench(tmp_path / "t") as bench:
        store = await bench.open()
        await append(store, b"a" * 1000)
        before = bench.state().acceptor
        promised = replace(before, term=2)
        with monkeypatch.context() as patch:
            broken = BrokenSync(patch, directory=directory)
            with pytest.raises(IntegrityError):
                await store.persist(promised)
            assert broken.failed
            assert store.fault
            for again in (store.persist(promised), store.append(1, store.flush_lsn, [b"x"]), store.read(START_LSN, 1)):
                with pytest.raises(IntegrityError):
                    await again
        assert store._control.state.acceptor == before, "in memory nothing was promised"
        assert bench.state().acceptor == (promised if directory else before), "on the disk there is one of them, whole"


async def test_a_control_file_that_cannot_be_replaced_is_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever says that nothing has changed says so truly: also when the directory cannot be opened to sync it."""
    async with store_bench(tmp_path / "t") as bench:
        store = await bench.open()
        await append(store, b"a" * 1000)
        before, cut = bench.state(), START_LSN + 300
        promised = replace(before.acceptor, term=2, history=TermHistory.of([(1, START_LSN), (2, cut)]))
        open_file = os.open

        def no_directory(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & os.O_DIRECTORY:
                raise OSError(errno.EMFILE, "Too many open files")
            return open_file(path, flags, *more, **named)

        for name, refusal in (("open", no_directory), ("replace", refusing(errno.ENOSPC))):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, refusal)
                with pytest.raises(DiskFullError):
                    await store.persist(promised, clip_lsn=cut)
            assert bench.state() == before
            assert store.flush_lsn == START_LSN + 1000
        await store.persist(promised, clip_lsn=cut)
        assert store.flush_lsn == cut
        await store.aclose()


# --- keys ---


async def test_nothing_is_read_or_appended_without_a_lease(tmp_path: Path) -> None:
    async with store_bench(tmp_path / "t") as bench:
        store = await bench.open()
        await append(store, b"a" * 2000)
        assert store._cache.size_bytes == 2000
        await bench.keys.revoke(bench.project_id)
        assert store._cache.size_bytes == 0
        with pytest.raises(KeyAccessError):
            await store.read(START_LSN, 10)
        with pytest.raises(KeyAccessError):
            await store.append(1, store.flush_lsn, [b"x"])
        await bench.keys.restore(bench.project_id)
        assert await read_all(store, START_LSN) == b"a" * 2000
        await append(store, b"b" * 10)
        assert await read_all(store, START_LSN) == b"a" * 2000 + b"b" * 10
        await store.aclose()


async def test_without_the_key_the_end_of_the_log_is_not_known(tmp_path: Path) -> None:
    async with store_bench(tmp_path / "t") as bench:
        await written(bench, b"a" * 100)
        store = await bench.open(load=False)
        await bench.keys.revoke(bench.project_id)
        with pytest.raises(KeyAccessError):
            await store.load()
        with pytest.raises(UnavailableError):
            store.check_ready()
        await bench.keys.restore(bench.project_id)
        await store.load()
        assert store.flush_lsn == START_LSN + 100


async def test_the_next_piece_is_made_ahead(tmp_path: Path) -> None:
    tuning = StoreTuning(prepare_at_bytes=4096)
    async with store_bench(tmp_path / "t", start_lsn=WAL_SEGMENT_SIZE_BYTES, tuning=tuning) as bench:
        store = await bench.open()
        await append(store, b"a" * 5000)
        prepared = store.maker.waiting
        assert prepared is not None
        assert prepared.segment_number == 2
        await store.maker.ready(1, 2 * WAL_SEGMENT_SIZE_BYTES)
        assert store.maker.waiting == prepared
        assert prepared not in [e.piece for e in bench.state().log.extents], "not part of the log yet"
        await append(store, b"a" * (WAL_SEGMENT_SIZE_BYTES - 5000 + 10), frame=1 << 20)
        assert bench.state().log.extents[-1].piece == prepared
        await store.aclose()


async def test_a_hint_that_rose_is_in_the_state_before_and_after_it_is_durable(tmp_path: Path) -> None:
    async with store_bench(tmp_path / "t") as bench:
        store = await bench.open()
        await append(store, b"some WAL")
        control, end_lsn = store._control, store.flush_lsn
        control.raise_commit_lsn(end_lsn)
        control.raise_remote_consistent_lsn(START_LSN + 3)
        control.raise_commit_lsn(START_LSN + 1)  # hints only rise
        raised = control.state
        assert (raised.acceptor.commit_lsn, raised.remote_consistent_lsn) == (end_lsn, START_LSN + 3)
        assert control.state is raised  # statuses that were made of it are good until it changes
        assert control.commit_lsn_is_dirty
        await store.persist_commit_lsn()
        assert not control.commit_lsn_is_dirty
        assert control.state == raised
        control.raise_commit_lsn(end_lsn + 1)
        assert control.state.acceptor.commit_lsn == end_lsn + 1
        assert raised.acceptor.commit_lsn == end_lsn
