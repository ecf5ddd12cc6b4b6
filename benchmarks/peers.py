"""Peers that are not ours: pgbouncer and gocryptfs, as Debian packages them. Who lacks one is told so in its row."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.harness import run
from keylake.ports import free_port
from shared.postgres import postgres_command, postgres_environment
from tests.fixtures.waiting import wait_until

_MOUNTED: Final = b"ready"
_UNMOUNT_TIMEOUT_S: Final = 3.0


def program(name: str) -> str | None:
    """Its path; None when it is not installed. Debian keeps daemons out of most users' PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


def not_measured(package: str) -> str:
    return f"not measured: apt-get install {package}"


@contextlib.asynccontextmanager
async def gocryptfs(directory: Path) -> AsyncIterator[Path | None]:
    """A new file system, mounted below `directory`, with its cipher files there, and defaults otherwise.

    None: it is not installed, or lacks what it needs: fusermount and a /dev/fuse.
    """
    command = program("gocryptfs")
    if command is None or program("fusermount") is None or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        yield None
        return
    cipher, mount_point, password = directory / "cipher", directory / "plain", directory / "password"
    cipher.mkdir(parents=True)
    mount_point.mkdir()
    password.write_text("a password of a benchmark\n")
    await run(command, "-init", "-q", "-passfile", str(password), str(cipher))
    process = await asyncio.create_subprocess_exec(
        command, "-fg", "-nosyslog", "-passfile", str(password), str(cipher), str(mount_point),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        said = b""
        while _MOUNTED not in said:
            line = await process.stdout.readline()
            if not line:
                raise RuntimeError(f"gocryptfs does not mount: {said.decode(errors='replace')}")
            said += line
        yield mount_point
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()  # it unmounts, and ends when nobody has it mounted …
        try:
            async with asyncio.timeout(_UNMOUNT_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()  # … but every sandbox that was made meanwhile has a copy of the mount
            await process.wait()


@dataclass(frozen=True, slots=True)
class Bouncer:
    port: int
    pid: int


@contextlib.asynccontextmanager
async def pgbouncer(
    host: Path, port: int, user: str, password: str, certificate: Path, private_key: Path
) -> AsyncIterator[Bouncer | None]:
    """In session mode, in front of a Postgres on a Unix socket; clients may come with TLS or without. None: it is not
    installed.

    SCRAM on both sides: it has the password in a file, checks clients with it, and logs in with it.
    """
    command = program("pgbouncer")
    if command is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="keylake-bench-") as name:
        directory, listen_port = Path(name), free_port()
        (directory / "users").write_text(f'"{user}" "{password}"\n')
        (directory / "ini").write_text(
            f"""
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {directory / "users"}
pool_mode = session
default_pool_size = 100
max_client_conn = 200
client_tls_sslmode = allow
client_tls_cert_file = {certificate}
client_tls_key_file = {private_key}
server_tls_sslmode = disable
log_connections = 0
log_disconnections = 0
log_stats = 0
"""
        )
        with (directory / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *postgres_command([command, str(directory / "ini")]),  # it does not run as root, either
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=postgres_environment(),
            )
        try:
            await wait_until(
                lambda: process.returncode is not None or b"process up" in (directory / "log").read_bytes()
            )
            if process.returncode is not None:
                raise RuntimeError(f"pgbouncer does not start: {(directory / 'log').read_text()}")
            yield Bouncer(listen_port, process.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()
