"""A redo worker that is given bad records, bad bytes and bad luck."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from pageserver.redo.build import RedoBinaries, prepare
from pageserver.redo.worker import RedoWorker
from shared.errors import CorruptedError, IntegrityError, InvalidInputError, KeylakeError, UnavailableError
from shared.sandbox import Isolation, detect_isolation
from shared.wal.image import page_lsn
from shared.wal.page import align8, format_lsn
from shared.wal.record import parse_blocks
from shared.wal.rmgr import RmgrId
from tests.fixtures.redo_history import Change, History, Page, make_history
from tests.fixtures.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

XLOG_HEAP_INSERT = 0x00
XLOG_HEAP_INIT_PAGE = 0x80
WITH_LZ4 = 0x08
"""BKPIMAGE_COMPRESS_LZ4: our Postgres is built without."""


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="keylake-test-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def binaries(scratch: Path) -> RedoBinaries:
    return asyncio.run(prepare(scratch / "cache"))


@pytest.fixture(scope="module")
def history(scratch: Path) -> History:
    return asyncio.run(make_history(scratch, rounds=2, full_page_writes=False))


@pytest.fixture
async def worker(binaries: RedoBinaries) -> AsyncIterator[RedoWorker]:
    worker = await RedoWorker.start(binaries)
    yield worker
    worker.kill()
    await worker.wait_closed()


def pairs(changes: list[Change]) -> list[tuple[int, bytes]]:
    return [(change.end_lsn, change.record) for change in changes]


def heap_page(history: History) -> tuple[Page, bytes, list[Change]]:
    """A heap page with its content before and a chain of changes that all move its LSN."""
    for page, changes in history.changes.items():
        heap = list(itertools.takewhile(lambda change: change.rmgr_id == RmgrId.HEAP, changes))
        base = history.read(history.before, page)
        if len(heap) > 20 and base is not None and any(base):
            return page, base, heap
    raise AssertionError("no heap page with a long chain in the whole history")


def init_page(history: History, *, longer_than: int = 1) -> tuple[Page, list[Change]]:
    """A heap page that its first record initialises."""
    return next(
        (page, changes)
        for page, changes in history.changes.items()
        if len(changes) > longer_than
        and changes[0].starts_over
        and changes[0].record[16] & 0xF0 == XLOG_HEAP_INIT_PAGE
        and all(change.rmgr_id == RmgrId.HEAP for change in changes[:3])
    )


async def assert_usable(worker: RedoWorker, history: History) -> None:
    page, base, changes = heap_page(history)
    rebuilt = await worker.apply(*page, base, pairs(changes))
    assert page_lsn(rebuilt) == changes[-1].end_lsn


# ---- what is refused, by a worker that goes on


async def test_each_record_moves_the_page_to_its_end(worker: RedoWorker, history: History) -> None:
    page, base, changes = heap_page(history)
    whole = await worker.apply(*page, base, pairs(changes))
    step = base
    for end_lsn, record in pairs(changes):
        step = await worker.apply(*page, step, [(end_lsn, record)])
    assert step == whole


async def test_replies_come_in_order_whatever_is_under_way(binaries: RedoBinaries, history: History) -> None:
    worker = await RedoWorker.start(binaries, max_outstanding=7)
    page, base, changes = heap_page(history)
    lengths = [1 + index % len(changes) for index in range(200)]
    pages = await asyncio.gather(*(worker.apply(*page, base, pairs(changes[:length])) for length in lengths))
    assert [page_lsn(rebuilt) for rebuilt in pages] == [changes[length - 1].end_lsn for length in lengths]
    await worker.close()


async def test_a_record_of_another_page_is_refused(worker: RedoWorker, history: History) -> None:
    (rel, fork, block), base, changes = heap_page(history)
    with pytest.raises(CorruptedError, match="does not refer to the page"):
        await worker.apply(rel, fork, block + 1, base, pairs(changes[:1]))
    with pytest.raises(CorruptedError, match="does not refer to the page"):
        await worker.apply((rel[0], rel[1], rel[2] + 1), fork, block, base, pairs(changes[:1]))
    await assert_usable(worker, history)


async def test_records_out_of_order_are_refused(worker: RedoWorker, history: History) -> None:
    page, base, changes = heap_page(history)
    with pytest.raises(InvalidInputError, match="do not ascend"):
        await worker.apply(*page, base, [*pairs(changes[:2]), *pairs(changes[:1])])
    later = await worker.apply(*page, base, pairs(changes[:5]))
    with pytest.raises(InvalidInputError, match="do not ascend"):
        await worker.apply(*page, later, pairs(changes[3:6]))
    await assert_usable(worker, history)


async def test_a_change_needs_a_page(worker: RedoWorker, history: History) -> None:
    page, _, changes = heap_page(history)
    for base in (None, bytes(8192)):
        with pytest.raises(CorruptedError, match="there is none"):
            await worker.apply(*page, base, pairs(changes[:1]))
    await assert_usable(worker, history)


async def test_an_initialising_record_needs_no_page(worker: RedoWorker, history: History) -> None:
    page, changes = init_page(history)
    rebuilt = await worker.apply(*page, None, pairs(changes))
    assert page_lsn(rebuilt) == changes[-1].end_lsn


async def test_a_changed_byte_is_found_when_asked_for(worker: RedoWorker, history: History) -> None:
    page, base, changes = heap_page(history)
    record = bytearray(changes[0].record)
    record[-1] ^= 1
    with pytest.raises(CorruptedError, match="CRC"):
        await worker.apply(*page, base, [(changes[0].end_lsn, bytes(record))], verify_crc=True)
    await assert_usable(worker, history)


async def test_a_record_of_other_length_is_refused(worker: RedoWorker, history: History) -> None:
    page, base, changes = heap_page(history)
    for record in (changes[0].record + b"\0", changes[0].record[:-1]):
        with pytest.raises(CorruptedError, match="own length"):
            await worker.apply(*page, base, [(changes[0].end_lsn, record)])
    await assert_usable(worker, history)


@pytest.mark.parametrize(
    "rmgr_id", [RmgrId.XACT, RmgrId.SMGR, RmgrId.DBASE, RmgrId.STANDBY, RmgrId.LOGICALMSG, 128, 255]
)
async def test_records_with_other_effects_are_refused(worker: RedoWorker, history: History, rmgr_id: int) -> None:
    page, base, changes = heap_page(history)
    record = bytearray(changes[0].record)
    record[17] = rmgr_id
    with pytest.raises(CorruptedError, match="of this kind"):
        await worker.apply(*page, base, [(changes[0].end_lsn, bytes(record))])
    await assert_usable(worker, history)


async def test_an_image_that_does_not_fit_a_page_is_refused(worker: RedoWorker, history: History) -> None:
    page, change = first_image(history)
    record = bytearray(change.record)
    # hole_offset follows the block header (id, fork_flags, data_length) and the image's length.
    struct.pack_into("<H", record, 24 + 4 + 2, 0xFFF0)
    with pytest.raises(CorruptedError):
        await worker.apply(*page, None, [(change.end_lsn, bytes(record))])
    await assert_usable(worker, history)


def first_image(history: History) -> tuple[Page, Change]:
    """A full-page image of a page with a hole, in the first block of its record."""
    for page, changes in history.changes.items():
        for change in changes:
            block = parse_blocks(change.record).blocks[0]
            if (
                block.image is not None
                and block.image.hole_length
                and (block.rel, block.fork, block.block_number) == page
            ):
                return page, change
    raise AssertionError("no full-page image in the whole history")


async def test_what_redo_raises_says_which_record_of_which_page(worker: RedoWorker, history: History) -> None:
    page, change = first_image(history)
    record = bytearray(change.record)
    image_info = 24 + 4 + 4
    # Marked as compressed in a way that our Postgres is not built for; then the hole length is in the record.
    record[image_info] |= WITH_LZ4
    block = parse_blocks(change.record).blocks[0]
    assert block.image is not None
    record[image_info + 1 : image_info + 1] = struct.pack("<H", block.image.hole_length)
    struct.pack_into("<I", record, 0, len(record))
    start_lsn = change.end_lsn - align8(len(record))
    for _ in range(200):  # nothing that it held may stay held
        with pytest.raises(IntegrityError) as failure:
            await worker.apply(*page, None, [(change.end_lsn, bytes(record))])
        (spc, db, number), fork, blkno = page
        lsn = format_lsn(change.end_lsn)
        where = f"redo of block {blkno} of {spc}/{db}/{number}, fork {fork} up to {lsn}"
        found = re.fullmatch(
            rf"{where}: (\w+) record that ends at {lsn}: XX000: could not restore image at {format_lsn(start_lsn)} "
            r"compressed with LZ4 not supported by build, block 0 \(XLogReadBufferForRedoExtended\)",
            str(failure.value),
        )
        assert found, failure.value
        assert found[1].upper() == RmgrId(change.rmgr_id).name
    await assert_usable(worker, history)


async def test_a_chain_longer_than_a_request_is_cut(worker: RedoWorker, history: History) -> None:
    page, change = first_image(history)
    chain = [(change.end_lsn + 8 * index, change.record) for index in range(1 + 17 * 1024 * 1024 // len(change.record))]
    rebuilt = await worker.apply(*page, None, chain)
    assert page_lsn(rebuilt) == chain[-1][0]


async def test_masks_are_the_resource_managers_own(worker: RedoWorker, history: History) -> None:
    page, base, changes = heap_page(history)
    rebuilt = await worker.apply(*page, base, pairs(changes))
    masked = await worker.mask(RmgrId.HEAP, page[2], rebuilt)
    assert masked != rebuilt
    assert await worker.mask(RmgrId.HEAP, page[2], masked) == masked
    assert await worker.mask(RmgrId.XLOG, page[2], rebuilt) == rebuilt


# ---- how a worker ends


async def test_a_panic_is_answered_and_ends_the_worker(worker: RedoWorker, history: History) -> None:
    page, changes = init_page(history)
    # The second insertion, on a page that has not seen any: "invalid max offset number".
    empty = bytearray(await worker.apply(*page, None, pairs(changes[:1])))
    struct.pack_into("<HH", empty, 12, 24, 8192)  # pd_lower, pd_upper: no line pointers, all free
    second = next(change for change in changes[1:] if change.record[16] & 0x70 == XLOG_HEAP_INSERT)
    with pytest.raises(IntegrityError, match="invalid max offset number"):
        await worker.apply(*page, bytes(empty), pairs([second, *changes[2:3]]))
    await worker.wait_closed()
    assert not worker.is_alive
    with pytest.raises(UnavailableError):
        await worker.ping()


@pytest.mark.parametrize("isolation", [Isolation.NAMESPACES, Isolation.NONE])
async def test_sigkill_in_the_middle_of_requests(
    binaries: RedoBinaries, history: History, isolation: Isolation
) -> None:
    if isolation is Isolation.NAMESPACES and detect_isolation() is Isolation.NONE:
        pytest.skip("this machine allows no namespaces")
    worker = await RedoWorker.start(binaries, isolation=isolation)
    page, base, changes = heap_page(history)
    end_lsn = changes[0].end_lsn
    many = [(end_lsn + index, changes[0].record) for index in range(50_000)]
    under_way = [asyncio.create_task(worker.apply(*page, base, many)) for _ in range(20)]
    await asyncio.sleep(0)
    redo_pid = worker.redo_pid
    assert redo_pid is not None
    directory = worker._sandbox.directory
    assert directory.exists()

    os.kill(worker.pid, signal.SIGKILL)

    results = await asyncio.gather(*under_way, return_exceptions=True)
    assert all(isinstance(result, UnavailableError) for result in results)
    assert not worker.is_alive
    await worker.wait_closed()
    await wait_until(lambda: is_gone(redo_pid))  # the kernel ends what the outermost process held
    assert not directory.exists()
    with pytest.raises(UnavailableError):
        await worker.ping()
    worker.kill()  # again is fine
    await worker.close()


def is_gone(pid: int) -> bool:
    """Ended, though whoever inherited it may not have collected its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


async def test_killing_the_redo_process_itself_is_noticed(worker: RedoWorker) -> None:
    redo_pid = worker.redo_pid
    assert redo_pid is not None
    os.kill(redo_pid, signal.SIGKILL)
    await worker.wait_closed()  # by itself, nobody asked for anything
    with pytest.raises(UnavailableError, match="ended"):
        await worker.ping()


async def test_kill_fails_everything_at_once(worker: RedoWorker, history: History) -> None:
    page, base, changes = heap_page(history)
    task = asyncio.create_task(worker.apply(*page, base, pairs(changes)))
    await asyncio.sleep(0)
    worker.kill()
    assert not worker.is_alive
    with pytest.raises(UnavailableError, match="killed"):
        await task
    with pytest.raises(UnavailableError):
        await worker.apply(*page, base, pairs(changes))


async def test_close_answers_what_is_under_way(worker: RedoWorker, history: History) -> None:
    page, base, changes = heap_page(history)
    under_way = [asyncio.create_task(worker.apply(*page, base, pairs(changes))) for _ in range(50)]
    await asyncio.sleep(0)
    await worker.close()
    for task in under_way:
        assert page_lsn(await task) == changes[-1].end_lsn
    with pytest.raises(UnavailableError):
        await worker.ping()


async def test_a_worker_that_stands_still_is_killed(binaries: RedoBinaries) -> None:
    worker = await RedoWorker.start(binaries, stall_timeout_s=0.3)
    redo_pid = worker.redo_pid
    assert redo_pid is not None
    os.kill(redo_pid, signal.SIGSTOP)
    with pytest.raises(UnavailableError, match="in time"):
        await worker.ping()
    await worker.wait_closed()


async def test_a_cancelled_request_does_not_confuse_the_others(worker: RedoWorker, history: History) -> None:
    page, base, changes = heap_page(history)
    tasks = [asyncio.create_task(worker.apply(*page, base, pairs(changes[: 1 + n % 3]))) for n in range(300)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for number, result in enumerate(results):
        if number % 2 == 0:
            assert isinstance(result, asyncio.CancelledError)
        else:
            assert isinstance(result, bytes)
            assert page_lsn(result) == changes[number % 3].end_lsn
    await worker.close()


async def test_a_worker_that_can_not_start_says_why(binaries: RedoBinaries, scratch: Path) -> None:
    broken = RedoBinaries(binaries.installation, scratch / "missing.so", binaries.scratch)
    with pytest.raises(UnavailableError) as failure:
        await RedoWorker.start(broken)
    assert "missing" in "".join(failure.value.__notes__)


# ---- what it may not do


async def test_the_process_is_confined(
    worker: RedoWorker, binaries: RedoBinaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker.greeting is not None
    assert worker.greeting.system_calls_filtered
    monkeypatch.setenv("KEYLAKE_TEST_SECRET", "do not inherit")
    second = await RedoWorker.start(binaries)
    assert second.redo_pid is not None
    proc = Path(f"/proc/{second.redo_pid}")
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert int(status["CapEff"], 16) == 0
    assert b"do not inherit" not in (proc / "environ").read_bytes()
    limits = (proc / "limits").read_text()
    for name in ("Max core file size", "Max open files", "Max processes", "Max file size"):
        line = next(line for line in limits.splitlines() if line.startswith(name))
        assert line.removeprefix(name).split()[:2] == ["0", "0"]
    if detect_isolation() is Isolation.NAMESPACES:
        for kind in ("mnt", "pid", "ipc", "net"):
            assert os.readlink(proc / "ns" / kind) != os.readlink(f"/proc/self/ns/{kind}")
        if os.geteuid() == 0:
            assert os.readlink(proc / "ns" / "user") != os.readlink("/proc/self/ns/user")
    await second.close()


NOT_ROOT = """
import asyncio, os, sys
from pathlib import Path
from pageserver.redo.build import prepare
from pageserver.redo.worker import RedoWorker
from shared.sandbox import Isolation

async def main():
    assert os.geteuid() == 65534
    binaries = await prepare(Path(sys.argv[1]))
    for isolation in (None, Isolation.NONE):
        worker = await RedoWorker.start(binaries, isolation=isolation)
        await worker.ping()
        await worker.close()
    print("fine")

asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
async def test_works_for_somebody_who_is_not_root(tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents):
        if directory.is_relative_to(tempfile.gettempdir()) and directory != Path(tempfile.gettempdir()):
            directory.chmod(0o755)
    # The checkout itself may not be readable for others.
    for package in ("shared", "pageserver"):
        shutil.copytree(Path(__file__).parents[2] / package, tmp_path / package)
    cache = tmp_path / "cache"
    cache.mkdir()
    os.chown(cache, 65534, 65534)
    process = await asyncio.create_subprocess_exec(
        *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"),
        *(sys.executable, "-c", textwrap.dedent(NOT_ROOT), str(cache)),
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert output.decode().endswith("fine\n"), output.decode()


def resident_kib(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS")))


async def test_memory_stays_bounded(worker: RedoWorker, history: History) -> None:
    redo_pid = worker.redo_pid
    assert redo_pid is not None
    work = [
        (page, history.read(history.before, page), pairs(changes[:3]))
        for page, changes in list(history.changes.items())[:300]
        if changes[0].starts_over or history.read(history.before, page)
    ]
    page, base, changes = heap_page(history)
    bad = pairs(changes[:1])[0][1][:-1]

    async def run(count: int, number: int) -> None:
        for index in range(count):
            target, before, records = work[(index * 7 + number) % len(work)]
            await worker.apply(*target, before, records)
            if index % 10 == 0:
                with pytest.raises(CorruptedError):
                    await worker.apply(*page, base, [(changes[0].end_lsn, bad)])

    await run(3000, 0)
    before_kib = resident_kib(redo_pid)
    await asyncio.gather(*(run(6250, number) for number in range(16)))  # 100,000, and 10,000 that fail
    assert resident_kib(redo_pid) - before_kib < 1024


# ---- fuzzing


async def test_garbage_in_the_pipe_is_an_error_and_nothing_else(binaries: RedoBinaries) -> None:
    rng = random.Random(4711)
    outcomes: Counter[str] = Counter()
    for _ in range(25):
        worker = await RedoWorker.start(binaries, stall_timeout_s=0.2)
        body = rng.randbytes(rng.randrange(1, 400))
        kind = rng.randrange(3)
        garbage = (
            body
            if kind == 0
            else struct.pack("<IB", len(body), rng.choice(b"AMPX")) + body
            if kind == 1
            else struct.pack("<IB", 24 + len(body), ord("A")) + bytes(20) + struct.pack("<I", rng.randrange(5)) + body
        )
        worker._send(garbage)
        try:
            for _ in range(3):
                await worker.ping()
            outcomes["answered"] += 1
        except KeylakeError as error:
            outcomes[type(error).__name__] += 1
        worker.kill()
        await worker.wait_closed()
        assert not worker.is_alive
    assert sum(outcomes.values()) == 25
    assert outcomes["answered"] < 20


async def test_forged_records_are_an_error_or_a_page_and_nothing_else(binaries: RedoBinaries, history: History) -> None:
    rng = random.Random(815)
    pages = list(history.changes.items())
    outcomes: Counter[str] = Counter()
    worker = await RedoWorker.start(binaries, stall_timeout_s=0.5)
    for _ in range(1000):
        page, changes = rng.choice(pages)
        start = rng.randrange(len(changes))
        base = history.read(history.before if start == 0 else history.after, page)
        if base is not None and start:
            base = bytes(8) + base[8:]  # a page of another time, with an old LSN
        records = pairs(changes[start : start + 3])
        victim = rng.randrange(len(records))
        forged = bytearray(records[victim][1])
        for _ in range(rng.randrange(1, 4)):
            # Mostly behind the header, whose kind and length are checked first.
            forged[rng.randrange(20 if rng.random() < 0.1 else 44 % len(forged), len(forged))] = rng.randrange(256)
        records[victim] = (records[victim][0], bytes(forged))
        try:
            assert len(await worker.apply(*page, base, records)) == 8192
            outcomes["page"] += 1
        except KeylakeError as error:
            outcomes[type(error).__name__] += 1
            if isinstance(error, UnavailableError):
                assert not worker.is_alive
            if "PANIC" in str(error) or not worker.is_alive:
                outcomes["ended"] += 1
        with contextlib.suppress(UnavailableError):
            await worker.ping()
        if not worker.is_alive:
            await worker.wait_closed()
            outcomes["restarted"] += 1
            worker = await RedoWorker.start(binaries, stall_timeout_s=0.5)
    await worker.close()
    assert outcomes["page"] > 50
    assert outcomes["CorruptedError"] > 50
    assert outcomes["IntegrityError"] > 100
