"""The directory backend: what crashes leave, processes that share a directory, errors of the disk."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from safekeeper.remote_wal import RemotePiece, RemoteWal
from safekeeper.wal_segment import PieceId
from shared.api.keymanager import ObjectName
from shared.ids import ProjectId, TimelineId
from shared.lsn import WAL_SEGMENT_SIZE_BYTES
from shared.storage.base import (
    ObjectExistsError,
    ObjectNotFoundError,
    StoreDeniedError,
    StoreFailedError,
    StoreUnavailableError,
)
from shared.storage.local import LocalObjectStore
from tests.fixtures.broken_sync import BrokenSync
from tests.fixtures.keys import InMemoryKeySource, ignore_loss

OBJECT_BYTES = 24 << 20

WRITER = f"""
import asyncio, sys
from pathlib import Path
from shared.storage.local import LocalObjectStore

async def main() -> None:
    store = await LocalObjectStore.open(Path(sys.argv[1]))
    for number in range(1_000_000):
        await store.{{method}}(f"round/{{key}}", bytes([number % 251]) * {OBJECT_BYTES})

asyncio.run(main())
"""


def temporary_files(root: Path) -> list[Path]:
    return [Path(folder) / name for folder, _, names in os.walk(root / "@tmp") for name in names]


def is_half_written(path: Path) -> bool:
    try:
        return 0 < path.stat().st_size < OBJECT_BYTES
    except FileNotFoundError:  # renamed meanwhile
        return False


def kill_in_the_middle_of_a_put(root: Path, method: str, key: str) -> None:
    """Start a process that writes one object after the other and kill -9 it while one is being written."""
    script = WRITER.format(method=method, key=key)
    with subprocess.Popen([sys.executable, "-c", script, str(root)]) as writer:
        deadline_s = time.monotonic() + 60
        while not any(is_half_written(path) for path in temporary_files(root)):
            assert writer.poll() is None
            assert time.monotonic() < deadline_s
        writer.send_signal(signal.SIGKILL)


@pytest.mark.parametrize(("method", "key"), [("put", "same"), ("put_if_absent", "{number}")])
async def test_kill_9_leaves_no_partial_object(tmp_path: Path, method: str, key: str) -> None:
    caught_in_the_act = 0
    for _ in range(10):
        kill_in_the_middle_of_a_put(tmp_path, method, key)
        caught_in_the_act += bool(temporary_files(tmp_path))
        store = await LocalObjectStore.open(tmp_path)
        assert temporary_files(tmp_path) == []
        async for info in store.list():
            assert info.size_bytes == OBJECT_BYTES
            data = await store.get(info.key)
            assert data == data[:1] * OBJECT_BYTES
            await store.delete(info.key)
        await store.close()
        if caught_in_the_act >= 2:
            break
    assert caught_in_the_act >= 2, "the process was never killed while it wrote"


async def test_a_living_process_keeps_its_temporary_files(tmp_path: Path) -> None:
    ours = await LocalObjectStore.open(tmp_path)
    (in_progress,) = (tmp_path / "@tmp").iterdir()
    (in_progress / "7").write_bytes(b"half")
    other = await LocalObjectStore.open(tmp_path)
    assert (in_progress / "7").exists()
    await other.close()
    assert (in_progress / "7").exists()
    await ours.close()
    third = await LocalObjectStore.open(tmp_path)
    assert not in_progress.exists()
    await third.close()
    assert list((tmp_path / "@tmp").iterdir()) == []


async def test_stores_opened_at_once_do_not_remove_each_other(tmp_path: Path) -> None:
    for _ in range(20):
        stores = await asyncio.gather(*(LocalObjectStore.open(tmp_path, threads=1) for _ in range(8)))
        await asyncio.gather(*(store.put(f"k/{n}", b"x") for n, store in enumerate(stores)))
        for store in stores:
            await store.close()


async def test_a_creation_race_between_stores_has_one_winner(tmp_path: Path) -> None:
    stores = [await LocalObjectStore.open(tmp_path, threads=2) for _ in range(4)]
    for number in range(30):
        outcomes = await asyncio.gather(
            *(store.put_if_absent(f"new/{number}/key", bytes([n])) for n, store in enumerate(stores * 4)),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes if outcome is not None] == [ObjectExistsError] * 15
    for store in stores:
        await store.close()


async def test_what_is_stored_is_private_and_under_its_key(tmp_path: Path) -> None:
    store = await LocalObjectStore.open(tmp_path / "new" / "root")
    await store.put("prj/layer.X", b"x")
    path = tmp_path / "new" / "root" / "prj@" / "layer.X"
    assert path.read_bytes() == b"x"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_nlink == 1
    assert path.parent.stat().st_mode & 0o777 == 0o700
    await store.put_if_absent("prj/created", b"x")
    assert (path.parent / "created").stat().st_nlink == 1
    assert temporary_files(tmp_path / "new" / "root") == []
    await store.close()


async def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    store = await LocalObjectStore.open(tmp_path / "root")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(StoreUnavailableError):
        await store.get("link")
    await store.close()


async def test_folders_removed_by_somebody_come_back(tmp_path: Path) -> None:
    store = await LocalObjectStore.open(tmp_path)
    await store.put("a/b/key", b"1")
    (tmp_path / "a@" / "b@" / "key").unlink()
    (tmp_path / "a@" / "b@").rmdir()
    with pytest.raises(StoreUnavailableError):
        await store.put("a/b/key", b"2")
    await store.put("a/b/key", b"2")
    assert await store.get("a/b/key") == b"2"
    await store.close()


async def test_errors_do_not_name_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailableError) as caught:
        await LocalObjectStore.open(tmp_path / "file" / "root")
    assert str(tmp_path) not in str(caught.value)
    assert "ENOTDIR" in str(caught.value)
    store = await LocalObjectStore.open(tmp_path / "root")
    with pytest.raises(ObjectNotFoundError) as missing:
        await store.get("key")
    assert str(tmp_path) not in str(missing.value)
    await store.close()


async def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    store = await LocalObjectStore.open(tmp_path)
    await store.put("key", b"before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # EFBIG is as good as ENOSPC
    try:
        for write in (store.put, store.put_if_absent):
            with pytest.raises(StoreUnavailableError, match=r"EFBIG\): make some, and writing goes on by itself"):
                await write("key", bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert temporary_files(tmp_path) == []
    assert await store.get("key") == b"before"
    await store.close()


@pytest.mark.parametrize("method", ["put", "put_if_absent", "delete", "delete_many"])
async def test_a_folder_whose_fsync_failed_ends_all_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The second fsync would succeed, and prove nothing."""
    store = await LocalObjectStore.open(tmp_path)
    await store.put("a/there", b"1")
    calls: dict[str, Callable[[], Awaitable[None]]] = {
        "put": lambda: store.put("a/new", b"2"),
        "put_if_absent": lambda: store.put_if_absent("a/new", b"2"),
        "delete": lambda: store.delete("a/there"),
        "delete_many": lambda: store.delete_many(["a/there"]),
    }
    with monkeypatch.context() as patch:
        broken = BrokenSync(patch, directory=True)
        with pytest.raises(StoreFailedError) as caught:
            await calls[method]()
        assert broken.failed
        assert not caught.value.retryable
        for again in calls.values():
            with pytest.raises(StoreFailedError):
                await again()
    if method == "put_if_absent":  # nobody finds it there and takes it for durable
        with pytest.raises(ObjectNotFoundError):
            await store.get("a/new")
    await store.close()
    opened = await LocalObjectStore.open(tmp_path)
    await opened.put_if_absent("b/new", b"2")
    await opened.close()


async def test_a_file_whose_fsync_failed_is_written_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await LocalObjectStore.open(tmp_path)
    with monkeypatch.context() as patch:
        BrokenSync(patch, directory=False)
        with pytest.raises(StoreUnavailableError):
            await store.put_if_absent("a/key", b"1")
    assert temporary_files(tmp_path) == []
    await store.put_if_absent("a/key", b"1")
    await store.close()


async def test_wal_whose_folder_was_not_synced_is_not_offloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever put it would delete his own copy: he is never told that it is there, however often he tries."""
    store, keys, project_id = await LocalObjectStore.open(tmp_path), InMemoryKeySource(), ProjectId.new()
    await keys.acquire(project_id, ignore_loss)
    name = ObjectName(timeline_id=TimelineId.new(), object_name="a", kind="b")
    [(_, envelope)] = await keys.generate(project_id, [name])
    remote = RemoteWal(store, project_id, name.timeline_id)
    piece = RemotePiece(PieceId(1, 1, 0), WAL_SEGMENT_SIZE_BYTES, WAL_SEGMENT_SIZE_BYTES + 100, "safekeeper-1")
    await remote.put(replace(piece, piece=PieceId(1, 1, 1)), b"of before", envelope)  # so that folders are there
    with monkeypatch.context() as patch:
        broken = BrokenSync(patch, directory=True)
        for _ in range(3):
            with pytest.raises(StoreFailedError):
                await remote.put(piece, b"sealed", envelope)
        assert broken.failed
    assert piece not in await remote.pieces()
    await store.close()
    await keys.close()


@pytest.mark.skipif(not Path("/sys/kernel").exists(), reason="needs sysfs")
async def test_a_place_where_nobody_may_write_is_a_refusal() -> None:
    with pytest.raises(StoreDeniedError):
        await LocalObjectStore.open(Path("/sys/kernel/objects"))  # sysfs: not even root
