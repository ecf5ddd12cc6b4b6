"""A safekeeper, or a pageserver, whose disk is small: a file system of its own where we may mount one, a limit on files
elsewhere."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from shared.api.safekeeper import SafekeeperStatus, TimelineStatus
from shared.lsn import Lsn
from tests.cluster.primary import safekeeper_timelines
from tests.cluster_bad_input.place import Place
from tests.fixtures.waiting import wait_until

_FILE_LIMIT_BYTES = 2 << 20
_OBJECT_LIMIT_BYTES = 64 << 10
"""Less than a layer has of what the test writes."""
_PAGESERVERS = "projects@"
"""The folder of all objects that a pageserver puts (shared/storage/local.py)."""


@dataclass(slots=True)
class SmallDisk:
    place: Place
    name: str
    mounted: Path | None
    """None: there is only a limit on how long a file may be."""
    _log_from: int = field(init=False)

    def __post_init__(self) -> None:
        self._log_from = self._log.stat().st_size

    @property
    def _log(self) -> Path:
        return self.place.cluster.service(self.name).log

    @property
    def _index(self) -> int:
        return int(self.name.rpartition("-")[2]) - 1

    async def status(self) -> SafekeeperStatus:
        return await self.place.cluster.client.safekeeper_status(self._index)

    async def _timelines(self) -> dict[int, TimelineStatus]:
        return await safekeeper_timelines(self.place.cluster, self.place.busy)

    async def flush_lsn(self) -> Lsn:
        return (await self._timelines())[self._index].flush_lsn

    async def streaming(self) -> None:
        async def look() -> bool:
            mine = (await self._timelines()).get(self._index)
            return mine is not None and mine.streaming

        await wait_until(look, 30)

    async def full(self) -> None:
        """Returns when the safekeeper has noticed."""

        def said() -> bool:
            with self._log.open("rb") as file:
                file.seek(self._log_from)
                return b"WAL is not acknowledged" in file.read()

        await wait_until(said, 30)

    def grow(self) -> None:
        _grow(self.mounted, self.place.cluster.service(self.name).pid)

    async def caught_up(self) -> None:
        async def equal() -> bool:
            found = await self._timelines()
            return len(found) == 3 and len({each.flush_lsn for each in found.values()}) == 1

        await wait_until(equal, 60)


@asynccontextmanager
async def small_disk(place: Place, name: str, free_bytes: int) -> AsyncIterator[SmallDisk]:
    """Restarts the safekeeper, before and after. Its data stays."""
    service, directory = place.cluster.service(name), place.cluster.layout.safekeeper(int(name[-1]))
    if not _may_mount(directory.parent):
        _limit_files(service.pid, _FILE_LIMIT_BYTES)
        yield SmallDisk(place, name, None)
        return
    aside = directory.with_name(f"{name}.aside")
    await service.stop()
    used = _used_bytes(directory)
    directory.rename(aside)
    directory.mkdir(mode=0o700)
    _mount(directory, used + free_bytes)
    try:
        await asyncio.to_thread(shutil.copytree, aside, directory, dirs_exist_ok=True)
        await service.start()
        yield SmallDisk(place, name, directory)
    finally:
        await service.stop()
        await asyncio.to_thread(shutil.rmtree, aside)
        await asyncio.to_thread(shutil.copytree, directory, aside)
        _run("umount", str(directory))
        directory.rmdir()
        aside.rename(directory)
        await service.start()


@asynccontextmanager
async def small_disk_of_the_pageserver(place: Place, free_bytes: int) -> AsyncIterator[Callable[[], None]]:
    """Its objects and its cache. Restarts it, before and after; what it puts stays. Yields what makes room."""
    layout, service = place.cluster.layout, place.cluster.service("pageserver")
    config, objects = layout.config / "pageserver.json", layout.objects
    if not _may_mount(layout.data):
        _limit_files(service.pid, _OBJECT_LIMIT_BYTES)
        yield lambda: _grow(None, service.pid)
        return
    before, disk = config.read_text(), layout.data / "small-disk"
    small = disk / "objects"
    await service.stop()
    disk.mkdir()
    _mount(disk, _used_bytes(objects) + free_bytes)
    try:
        # A copy, as safekeepers are at work in the other one; what is theirs is not read here.
        await asyncio.to_thread(shutil.copytree, objects, small, ignore=shutil.ignore_patterns("@tmp"))
        values = {"object_store": {"url": small.as_uri()}, "cache_dir": str(disk / "cache")}
        config.write_text(json.dumps(json.loads(before) | values))
        await service.start()
        yield lambda: _grow(disk, service.pid)
    finally:
        await service.stop()
        shutil.rmtree(objects / _PAGESERVERS)
        shutil.copytree(small / _PAGESERVERS, objects / _PAGESERVERS)
        _run("umount", str(disk))
        disk.rmdir()
        config.write_text(before)
        await service.start()


def _grow(mounted: Path | None, pid: int) -> None:
    if mounted is not None:
        _run("mount", "-o", "remount,size=512m", str(mounted))
    else:
        _limit_files(pid, resource.RLIM_INFINITY)


def _used_bytes(directory: Path) -> int:
    return sum(4096 + path.stat().st_size for path in directory.rglob("*"))


def _mount(directory: Path, size_bytes: int) -> None:
    _run("mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0700", "keylake-test", str(directory))


def _may_mount(parent: Path) -> bool:
    if os.geteuid() != 0:
        return False
    probe = parent / "may-mount"
    probe.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "keylake-test", str(probe)], capture_output=True, check=False)
        if done.returncode == 0:
            _run("umount", str(probe))
        return done.returncode == 0
    finally:
        probe.rmdir()


def _limit_files(pid: int, size_bytes: int) -> None:
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size_bytes, hard))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
