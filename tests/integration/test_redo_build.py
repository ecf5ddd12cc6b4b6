"""How the redo extension and its scratch data directory come into being."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from keylake.cluster import Cluster
from keylake.process import ServiceProcess
from pageserver.redo import build
from pageserver.redo.build import RedoBinaries, build_library, prepare
from pageserver.redo.worker import RedoWorker
from shared.c_library import default_cache_dir, find_compiler
from shared.errors import UnavailableError
from shared.postgres import find_postgres

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

ZIG = [sys.executable, "-m", "ziglang", "cc"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)  # Postgres may run as somebody else
    return tmp_path / "cache"


async def answers(binaries: RedoBinaries) -> None:
    worker = await RedoWorker.start(binaries)
    await worker.ping()
    await worker.close()


async def test_is_made_once(cache: Path) -> None:
    first = await prepare(cache)
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    second = await prepare(cache)
    assert second == first
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == made
    await answers(second)


async def test_may_be_made_by_several_at_once(cache: Path) -> None:
    results = await asyncio.gather(*(prepare(cache) for _ in range(3)))
    assert len({result.library for result in results}) == 1
    assert not [path for path in cache.iterdir() if path.name.startswith(".")], "work in progress is left behind"
    await answers(results[0])


async def test_the_scratch_directory_holds_nothing_but_control_data(cache: Path) -> None:
    scratch = (await prepare(cache)).scratch
    assert {path.relative_to(scratch).as_posix() for path in scratch.rglob("*") if path.is_file()} == {
        "PG_VERSION",
        "global/pg_control",
        "postgresql.conf",
        "postgresql.auto.conf",
    }


async def test_a_change_of_anything_it_depends_on_is_another_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installation = find_postgres()
    cache.mkdir()
    first = await build_library(cache, installation)
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DKEYLAKE_TEST"))
    assert await build_library(cache, installation) != first


@pytest.mark.skipif(sys.platform != "linux", reason="ziglang is only needed on Linux")
async def test_ziglang_will_do(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(tmp_path / "zig"))
    cache.mkdir()
    library = await build_library(cache, find_postgres(), compiler=ZIG)
    prepared = await prepare(cache)
    await answers(RedoBinaries(prepared.installation, library, prepared.scratch))


def test_the_compiler_of_the_system_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cc").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler() == [str(tmp_path / "cc")]
    (tmp_path / "cc").unlink()
    assert find_compiler() == ZIG


def test_without_any_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="ziglang"):
        find_compiler()


async def test_a_compiler_that_fails_tells_why(cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    compiler = tmp_path / "broken-cc"
    compiler.write_text("#!/bin/sh\necho the reason >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(UnavailableError, match="does not compile") as failure:
        await build_library(cache, find_postgres(), compiler=[str(compiler)])
    assert "the reason" in "".join(failure.value.__notes__)
    assert list(cache.iterdir()) == []


async def test_a_cache_that_others_may_write_to_is_refused(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(UnavailableError, match="others"):
        await prepare(cache)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make somebody else's directory")
async def test_a_cache_of_somebody_else_is_refused(cache: Path) -> None:
    cache.mkdir()
    shutil.chown(cache, 65534)
    with pytest.raises(UnavailableError, match="somebody else"):
        await prepare(cache)


def test_the_cache_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "keylake"
    for value in ("", "relative/path"):  # the specification: relative paths are to be ignored
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_cache_dir() == Path.home() / ".cache" / "keylake"


async def test_a_cluster_compiles_before_its_services_are_timed(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a bare machine that takes longer than a service may take to get ready."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    seen: list[set[str]] = []

    class Stops(ServiceProcess):
        async def start(self, timeout_s: float = 0.0) -> None:
            seen.append({path.name.partition("-")[0] for path in (cache / "keylake").iterdir()})
            raise UnavailableError("that is enough")

    class NoService(Cluster):
        service_process = Stops

        async def _start_metadata(self) -> NoReturn:
            raise UnavailableError("that is enough")

    with pytest.raises(UnavailableError, match="that is enough"):
        async with NoService(tmp_path / "home"):
            pass
    await asyncio.sleep(0)
    assert seen == [{"guard", "scratch", "walredo"}]
