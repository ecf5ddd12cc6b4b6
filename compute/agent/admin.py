"""Sessions of the agent itself at its compute's Postgres, which nobody outside of the sandbox can open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import asyncpg

from compute.agent.postgres_conf import POSTGRES_PORT
from shared.api.pageserver import ADMIN_ROLE


async def connect_as_admin(
    socket_dir: Path,
    password: str,
    timeout_s: float,
    *,
    port: int = POSTGRES_PORT,
    command_timeout_s: float | None = None,
    **settings: str,
) -> Any:
    """An asyncpg connection; the caller closes it. Raises what asyncpg does, OSError and TimeoutError."""
    return await asyncpg.connect(
        host=str(socket_dir),
        port=port,
        user=ADMIN_ROLE,
        password=password,
        database="postgres",
        timeout=timeout_s,
        command_timeout=command_timeout_s,
        server_settings={"application_name": "keylake agent", **settings},
    )
