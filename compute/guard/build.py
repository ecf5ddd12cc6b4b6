"""Makes the library that guards what a commit means (guard.c), or finds it in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from shared import c_library
from shared.postgres import PostgresInstallation, find_postgres

SOURCE: Final = Path(__file__).parent / "guard.c"


async def prepare_guard(cache_dir: Path | None = None, *, installation: PostgresInstallation | None = None) -> Path:
    """Compile it if it is not in the cache yet. Raises UnavailableError, which says what to install or set."""
    cache_dir = (cache_dir or c_library.default_cache_dir()).absolute()
    c_library.make_cache_dir(cache_dir)
    return await c_library.build("guard", (SOURCE,), (), cache_dir, installation or find_postgres())
