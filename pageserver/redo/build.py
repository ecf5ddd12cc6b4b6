"""Makes what a redo worker is started from: the compiled extension, and the files of its scratch data directory.

Both are made once and kept in a cache directory (shared/c_library.py); files are only renamed into place, complete.

    <cache>/walredo-<hash>.so    of the sources, the Postgres version and headers' place, the compiler's flags
    <cache>/scratch-<version>/   PG_VERSION, global/pg_control of one initdb; empty configuration and directories
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared import c_library
from shared.c_library import FLAGS, default_cache_dir, make_cache_dir
from shared.postgres import PostgresInstallation, find_postgres, initdb

_HERE: Final = Path(__file__).parent
SOURCES: Final = tuple(_HERE / name for name in ("walredo.c", "redo_page.c", "confine.c"))
HEADER: Final = _HERE / "walredo.h"
_FLAGS: Final = FLAGS

_EMPTY_FILES: Final = ("postgresql.conf", "postgresql.auto.conf")
_DIRECTORIES: Final = ("global", "pg_dynshmem", "pg_notify")  # all that shared memory start-up looks into


@dataclass(frozen=True, slots=True)
class RedoBinaries:
    """What `RedoWorker.start` needs; the same for all workers of a process."""

    installation: PostgresInstallation
    library: Path
    scratch: Path
    sandboxes: Path | None = None
    """Where the workers' sandboxes are made, as by `shared.sandbox.sandboxes_dir`; None: nobody removes what a worker
    leaves whose process was killed together with its owner."""


async def prepare(cache_dir: Path | None = None, *, installation: PostgresInstallation | None = None) -> RedoBinaries:
    """Compile and initialise what is not in the cache yet. Takes seconds the first time, milliseconds afterwards.

    May run at the same time in several processes. Raises UnavailableError, which says what to install or set.
    """
    installation = installation or find_postgres()
    cache_dir = (cache_dir or default_cache_dir()).absolute()
    make_cache_dir(cache_dir)
    library = await build_library(cache_dir, installation)
    return RedoBinaries(installation, library, await _make_scratch(cache_dir, installation))


async def build_library(
    cache_dir: Path, installation: PostgresInstallation, *, compiler: list[str] | None = None
) -> Path:
    """Compile the extension unless that was done before. `compiler` defaults to `find_compiler()`."""
    return await c_library.build(
        "walredo", SOURCES, (HEADER,), cache_dir, installation, flags=_FLAGS, compiler=compiler
    )


async def _make_scratch(cache_dir: Path, installation: PostgresInstallation) -> Path:
    """A data directory without any data: just what single-user Postgres reads before it hands over to walredo.c."""
    scratch = cache_dir / f"scratch-{installation.version}"
    if scratch.exists():
        return scratch
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=cache_dir) as work:
        full = Path(work) / "full"
        os.chmod(work, 0o755)  # initdb may run as somebody else  # noqa: S103
        await initdb(full, wal_segment_size_mb=1, installation=installation)
        trimmed = Path(work) / "trimmed"
        trimmed.mkdir()
        for name in _DIRECTORIES:
            (trimmed / name).mkdir()
        for name in _EMPTY_FILES:
            (trimmed / name).touch()
        for name in ("PG_VERSION", "global/pg_control"):
            shutil.copyfile(full / name, trimmed / name)
        for path in (trimmed, *trimmed.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # copied by an unprivileged user
        try:
            trimmed.rename(scratch)
        except OSError:
            if not scratch.exists():  # else somebody else was faster
                raise
    return scratch
