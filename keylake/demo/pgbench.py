"""pgbench of the Postgres that we ship, against an endpoint through the proxy."""

from __future__ import annotations

import asyncio
import os

from keylake.client import Connection
from keylake.tls_relay import SOCKET_PORT, TlsRelay
from shared.errors import KeylakeError
from shared.postgres import find_postgres


async def run_pgbench(connection: Connection, *arguments: str) -> str:
    """Its output. Raises KeylakeError when it fails. The password goes through the environment, never through argv."""
    async with TlsRelay(connection.host, connection.port, connection.ssl_context()) as relay:
        process = await asyncio.create_subprocess_exec(
            find_postgres().program("pgbench"),
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={
                **os.environ,
                "PGHOST": str(relay.socket_dir),
                "PGPORT": str(SOCKET_PORT),
                "PGUSER": connection.user,
                "PGPASSWORD": connection.password,
                "PGDATABASE": connection.database,
                "PGOPTIONS": f"endpoint={connection.endpoint_id}",
            },
        )
        try:
            output, _ = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
    text = output.decode(errors="replace")
    if process.returncode != 0:
        raise KeylakeError(f"pgbench failed: {text[-1000:]}")
    return text
