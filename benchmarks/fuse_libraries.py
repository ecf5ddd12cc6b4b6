"""What one uncached read of a FUSE file system costs in Python: our own loop, and the libraries there are (ADR 20).

    python -m benchmarks.fuse_libraries [--blocks 8192] [--rounds 3]

One file of 8 KiB blocks, read once each in random order, so that the kernel has none of them and reads nothing ahead.
Each server is a process of its own, with one thread; they take turns. CPU is the serving process's, all threads, by the
kernel's account. It needs root, for a mount namespace of its own. Libraries that are not installed say so; they are not
among Keylake's dependencies: `pip install mfusepy pyfuse3`, and `apt-get install libfuse3-3` (pyfuse3 is compiled, with
gcc and libfuse3-dev).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import importlib
import importlib.util
import os
import random
import stat
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any, Final

from rich.console import Console

from benchmarks.harness import Row, show
from compute.volume import mount
from compute.volume.file_system import FileSystem
from compute.volume.files import Origin, Tree
from compute.volume.sealed_blocks import BLOCK_SIZE_BYTES, SealedBlocks, make_block_file
from compute.volume.serve import FuseLoop
from shared.crypto.secret import SecretKey
from shared.errors import KeylakeError
from shared.keyspace import Fork, RelTag

_NAME: Final = "pages"
_PAGE: Final = os.urandom(BLOCK_SIZE_BYTES)
_REL: Final = RelTag(1663, 5, 16384, Fork.MAIN)
_MOUNT_TIMEOUT_S: Final = 20.0


class _Memory:
    """`PageSource`: all blocks are alike."""

    async def pages(self, rel: RelTag, first_block: int, count: int) -> list[bytes]:
        return [_PAGE] * count

    def prefetch(self, rel: RelTag, first_block: int, count: int) -> None: ...


def _serve_ours(directory: Path, blocks: int, *, sealed: bool) -> None:
    async def serve() -> None:
        def broken(error: KeylakeError) -> None:
            raise error

        with tempfile.TemporaryDirectory(prefix="keylake-bench-") as scratch:
            local = SealedBlocks(make_block_file(Path(scratch)), SecretKey.generate(), b"benchmark", blocks)
            files = FileSystem(Tree(0, 0, 0), local, _Memory(), lambda: None, broken)
            file = files.tree.add_file(files.tree.root, _NAME.encode(), 0o600, 0)
            if sealed:
                for block in range(blocks):
                    files.write_all(file, block * BLOCK_SIZE_BYTES, _PAGE)
            else:
                file.origin, file.origin_blocks, file.size = Origin(_REL, 0), blocks, blocks * BLOCK_SIZE_BYTES
            loop = FuseLoop(mount.mount(directory), files, broken)
            loop.start()
            await loop.ended

    asyncio.run(serve())


def _serve_mfusepy(directory: Path, blocks: int) -> None:
    library: Any = importlib.import_module("mfusepy")

    class Files(library.Operations):  # type: ignore[misc]
        use_ns = True

        def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
            if path == "/":
                return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
            if path != f"/{_NAME}":
                raise OSError(errno.ENOENT, "")
            return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": blocks * BLOCK_SIZE_BYTES}

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            return _PAGE * (size // BLOCK_SIZE_BYTES)

    library.FUSE(Files(), str(directory), foreground=True, nothreads=True)


def _serve_pyfuse3(directory: Path, blocks: int) -> None:
    library: Any = importlib.import_module("pyfuse3")
    trio: Any = importlib.import_module("trio")
    inode = library.ROOT_INODE + 1

    class Files(library.Operations):  # type: ignore[misc]
        async def getattr(self, number: int, ctx: object = None) -> Any:
            entry = library.EntryAttributes()
            entry.st_ino = number
            if number == library.ROOT_INODE:
                entry.st_mode = stat.S_IFDIR | 0o755
            else:
                entry.st_mode, entry.st_size = stat.S_IFREG | 0o600, blocks * BLOCK_SIZE_BYTES
            return entry

        async def lookup(self, parent: int, name: bytes, ctx: object = None) -> Any:
            if name != _NAME.encode():
                raise library.FUSEError(errno.ENOENT)
            return await self.getattr(inode)

        async def open(self, number: int, flags: int, ctx: object) -> Any:
            return library.FileInfo(fh=number)

        async def read(self, fh: int, offset: int, size: int) -> bytes:
            return _PAGE * (size // BLOCK_SIZE_BYTES)

    library.init(Files(), str(directory), set(library.default_options))
    trio.run(library.main)


_SERVERS: Final[dict[str, tuple[str, Callable[[Path, int], None]]]] = {
    "ours, pages from memory": ("", lambda directory, blocks: _serve_ours(directory, blocks, sealed=False)),
    "ours, blocks opened from the sealed file": (
        "",
        lambda directory, blocks: _serve_ours(directory, blocks, sealed=True),
    ),
    "mfusepy (ctypes, libfuse's loop)": ("mfusepy", _serve_mfusepy),
    "pyfuse3 (Cython, trio)": ("pyfuse3", _serve_pyfuse3),
}
_PEER: Final = next(iter(_SERVERS))


def _cpu_ns(pid: int) -> int:
    """Of all of its threads (Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat)."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def _one_pass(name: str, blocks: int) -> tuple[float, float]:
    """(CPU, wall time) per read in µs. Raises RuntimeError."""
    order = random.Random(1).sample(range(blocks), blocks)
    with tempfile.TemporaryDirectory(prefix="keylake-bench-") as text:
        directory = Path(text)
        argv = [sys.executable, "-m", "benchmarks.fuse_libraries", "--blocks", str(blocks)]
        server = subprocess.Popen([*argv, "--serve", name, "--directory", text], stderr=subprocess.PIPE, text=True)
        try:
            deadline = monotonic() + _MOUNT_TIMEOUT_S
            while not (directory / _NAME).exists():
                if server.poll() is not None or monotonic() > deadline:
                    server.kill()
                    raise RuntimeError(
                        f"{name} does not serve: {server.communicate()[1].strip().rpartition(chr(10))[2]}"
                    )
                sleep(0.02)
            descriptor = os.open(directory / _NAME, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                before, begun = _cpu_ns(server.pid), perf_counter()
                for block in order:
                    if len(os.pread(descriptor, BLOCK_SIZE_BYTES, block * BLOCK_SIZE_BYTES)) != BLOCK_SIZE_BYTES:
                        raise RuntimeError(f"{name} gave less than a block")
                took, used = perf_counter() - begun, _cpu_ns(server.pid) - before
            finally:
                os.close(descriptor)
        finally:
            mount.unmount(directory)
            server.kill()
            server.wait()
    return used / 1e3 / blocks, took * 1e6 / blocks


def measure(blocks: int, rounds: int) -> list[Row]:
    installed = [name for name, (module, _) in _SERVERS.items() if not module or importlib.util.find_spec(module)]
    passes: dict[str, list[tuple[float, float]]] = {name: [] for name in installed}
    for _ in range(rounds):
        for name in installed:
            passes[name].append(_one_pass(name, blocks))
    cpu = {name: statistics.median(used for used, _ in of) for name, of in passes.items()}
    wall = {name: statistics.median(took for _, took in of) for name, of in passes.items()}
    rows = []
    for name in _SERVERS:
        if name not in passes:
            rows.append(Row(f"one read: {name}", "not installed", "-", None, "report", None))
            continue
        measured = f"{cpu[name]:.0f} µs of CPU, {wall[name]:.0f} µs"
        peer = f"{cpu[_PEER]:.0f} µs of CPU, {_PEER}"
        rows.append(Row(f"one read: {name}", measured, peer, cpu[name] / cpu[_PEER], "report", None))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuse_libraries",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--blocks", type=int, default=8192, help="how many blocks of 8 KiB are read (8192)")
    parser.add_argument("--rounds", type=int, default=3, help="of all servers in turn; medians are shown (3)")
    for hidden in ("--serve", "--directory"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        with contextlib.suppress(KeyboardInterrupt):
            _SERVERS[arguments.serve][1](Path(arguments.directory), arguments.blocks)
    elif arguments.inside:
        show(measure(arguments.blocks, arguments.rounds), Console(highlight=False))
    else:
        namespace = ["unshare", "--mount", "--propagation", "private", "--"]
        argv = [sys.executable, "-m", "benchmarks.fuse_libraries", "--inside", *sys.argv[1:]]
        sys.exit(subprocess.run([*namespace, *argv], check=False).returncode)


if __name__ == "__main__":
    main()
