"""Files that survive: sealed, atomic, append-only; and what is refused when they were tampered with."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from customercloud.aws.trail import Trail
from customercloud.durable import AppendLog, DirectoryLock, SealedFile, load_or_create_secret, write_atomically
from shared.errors import ConflictError, CorruptedError, IntegrityError

HOST_KEY = bytes(range(32))


def test_a_sealed_file_opens_under_its_key_and_purpose_only(tmp_path: Path) -> None:
    path = tmp_path / "state"
    file = SealedFile(path, HOST_KEY, b"purpose")
    assert file.read() is None
    file.write(b"plaintext that must not be seen")
    assert b"plaintext" not in path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert file.read() == b"plaintext that must not be seen"
    for wrong in (SealedFile(path, bytes(32), b"purpose"), SealedFile(path, HOST_KEY, b"other")):
        with pytest.raises(IntegrityError):
            wrong.read()


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_changed_byte_of_a_sealed_file_opens(position: int, change: int) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"sealed-{os.getpid()}"  # noqa: S108 - one name per process
    try:
        SealedFile(path, HOST_KEY, b"purpose").write(b"x" * 20)
        data = bytearray(path.read_bytes())
        data[position % len(data)] ^= change
        path.write_bytes(data)
        with pytest.raises(IntegrityError):
            SealedFile(path, HOST_KEY, b"purpose").read()
    finally:
        path.unlink(missing_ok=True)


def test_a_cut_sealed_file_is_corrupted(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"short")
    with pytest.raises(CorruptedError):
        SealedFile(path, HOST_KEY, b"purpose").read()


def test_a_secret_is_made_once_and_guarded(tmp_path: Path) -> None:
    path = tmp_path / "host.key"
    secret = load_or_create_secret(path, 32)
    assert load_or_create_secret(path, 32) == secret
    path.chmod(0o644)
    with pytest.raises(IntegrityError, match="0600"):
        load_or_create_secret(path, 32)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(CorruptedError):
        load_or_create_secret(path, 32)


def test_a_directory_has_one_owner(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    with pytest.raises(ConflictError):
        DirectoryLock(tmp_path)
    lock.release()
    DirectoryLock(tmp_path).release()


def test_an_atomic_write_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / "file.new").write_bytes(b"left by a crash")
    write_atomically(path, b"first")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


async def test_concurrent_appends_are_all_durable_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = AppendLog(path)
    expected = {f"line {i}".encode() for i in range(300)}
    await asyncio.gather(*(log.append([line]) for line in expected))
    assert set(log) == expected
    await log.append([b"a", b"b"])
    assert list(log)[-2:] == [b"a", b"b"]
    await log.close()
    assert len(path.read_bytes().splitlines()) == 302


async def test_an_append_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    log = AppendLog(tmp_path / "log")
    for number in range(20):
        await log.append([str(number).encode()])
        assert (tmp_path / "log").read_bytes().splitlines()[-1] == str(number).encode()
    await log.close()


async def test_a_cancelled_append_does_not_disturb_the_others(tmp_path: Path) -> None:
    log = AppendLog(tmp_path / "log")
    cancelled = asyncio.create_task(log.append([b"cancelled"]))
    await asyncio.sleep(0)
    cancelled.cancel()
    await log.append([b"kept"])
    await log.close()
    assert b"kept" in (tmp_path / "log").read_bytes().splitlines()


@pytest.mark.parametrize("tail", [b'{"half', b"x" * 200_000])
async def test_a_torn_last_line_is_dropped(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\n" + tail)
    log = AppendLog(path)
    await log.append([b"three"])
    await log.close()
    assert path.read_bytes() == b"one\ntwo\nthree\n"


async def test_a_refused_batch_leaves_no_half_line(tmp_path: Path) -> None:
    """A disk that takes half a line and then no more, by the kernel's limit on file sizes."""
    log = AppendLog(tmp_path / "log")
    await log.append([b"one"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            await log.append([b"two is too long"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "log").read_bytes() == b"one\n"
    await log.append([b"three"])
    await log.close()
    assert (tmp_path / "log").read_bytes() == b"one\nthree\n"


async def test_the_trail_refuses_a_damaged_file(tmp_path: Path) -> None:
    for damaged in (b"not json\n", b"[]\n", b"{}\n"):
        path = tmp_path / "trail"
        path.write_bytes(damaged)
        with pytest.raises(CorruptedError):
            Trail(path)


async def test_the_trail_reads_back_what_it_wrote(tmp_path: Path) -> None:
    record = {"userIdentity": {}, "eventTime": "2026-11-22T02:00:00Z", "eventName": "Decrypt", "eventID": "1"}
    trail = Trail(tmp_path / "trail")
    await trail.append([record, record | {"eventID": "2"}])
    await trail.close()
    again = Trail(tmp_path / "trail")
    assert [(e.number, e.record["eventID"]) for e in again.newest_first()] == [(2, "2"), (1, "1")]
    assert [json.loads(line)["eventID"] for line in again.lines()] == ["1", "2"]
    await again.close()
