"""Compiling the C that a stock Postgres loads (redo worker, commit guard), once, into a cache directory.

A library's name holds a hash of everything that it depends on, so a new version of any of it makes a new file, and
files are only ever renamed into place, complete. Nothing in them is secret, but they are code that will run: a cache
directory that others may write to is refused.

    <cache>/<name>-<hash>.so    of the sources, the Postgres version and headers' place, the compiler's flags
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from shared.errors import UnavailableError
from shared.postgres import PostgresInstallation

COMPILE_TIMEOUT_S: Final = 300.0

FLAGS: Final = (
    "-std=gnu11",
    "-O2",
    "-fPIC",
    "-shared",
    "-Wall",
    "-Wextra",
    "-Werror",
    # Postgres's own headers need these two: they pun types and count on wrapping integers.
    "-fno-strict-aliasing",
    "-fwrapv",
    "-fvisibility=hidden",
    "-fstack-protector-strong",
    "-U_FORTIFY_SOURCE",
    "-D_FORTIFY_SOURCE=2",
    "-Wl,-z,relro,-z,now,-z,noexecstack",
)


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/keylake, or ~/.cache/keylake."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "keylake"


def make_cache_dir(cache_dir: Path) -> None:
    """Raises UnavailableError when it cannot be made, or somebody else may write to it."""
    try:
        cache_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        found = cache_dir.stat()
    except OSError as error:
        raise UnavailableError("the cache directory can not be made: set XDG_CACHE_HOME") from error
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnavailableError(
            "the cache directory belongs to somebody else or can be written by others, and code is run from it: "
            "chmod go-w it, or set XDG_CACHE_HOME"
        )


def find_compiler() -> list[str]:
    """The system's `cc`, or PyPI's ziglang. Raises UnavailableError when there is neither."""
    if (system := shutil.which("cc")) is not None:
        return [system]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    raise UnavailableError("no C compiler: install cc (gcc or clang), or `pip install ziglang`")


async def build(
    name: str,
    sources: Sequence[Path],
    headers: Sequence[Path],
    cache_dir: Path,
    installation: PostgresInstallation,
    *,
    flags: Sequence[str] = FLAGS,
    compiler: list[str] | None = None,
) -> Path:
    """Compile the library unless that was done before. `compiler` defaults to `find_compiler()`.

    Which compiler did it does not matter, so a cache that was filled elsewhere (a container image's) needs none here.
    May run at the same time in several processes. Raises UnavailableError, which says what to install or set.
    """
    # As system headers, so that warnings are about our code only.
    flags = [*flags, "-isystem", str(installation.server_include_dir())]
    digest = hashlib.sha256()
    for part in (
        *(path.read_bytes() for path in (*sources, *headers)),
        installation.version.encode(),
        *(text.encode() for text in flags),
    ):
        digest.update(len(part).to_bytes(8, "big") + part)
    library = cache_dir / f"{name}-{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    compiler = compiler or find_compiler()
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache_dir) as work:
        output = Path(work) / f"{name}.so"
        await _compile(name, [*compiler, *flags, "-o", str(output), *map(str, sources)])
        output.chmod(0o755)  # loaded by an unprivileged user
        output.replace(library)
    return library


async def _compile(name: str, argv: list[str]) -> None:
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(COMPILE_TIMEOUT_S):
            output, _ = await process.communicate()
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    if process.returncode != 0:
        failure = UnavailableError(f"{name} does not compile (the compiler's output is in the notes)")
        failure.add_note(output.decode(errors="replace")[-4000:])
        raise failure
