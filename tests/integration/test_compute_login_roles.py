"""Who may log in, listed at the end of a compute: nobody else is there any more who could change a role."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from compute.agent.login_roles import held_login_roles
from shared.api.pageserver import ADMIN_ROLE
from shared.postgres import PostgresServer, initdb
from shared.wire.scram import ScramVerifier
from tests.fixtures.waiting import wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where a socket's path is short enough, and where Postgres gets to."""
    path = Path(tempfile.mkdtemp(prefix="kl-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


async def test_all_other_sessions_have_ended_before_the_list_is_out(directory: Path) -> None:
    """Or the shutdown, which ends the newest session first, would end the one that holds the lock before them."""
    await initdb(directory / "pgdata", superuser=ADMIN_ROLE)
    async with PostgresServer(directory / "pgdata", socket_dir=directory / "s") as server:
        other = await asyncpg.connect(host=server.host, user=ADMIN_ROLE, database="postgres")
        await other.execute("CREATE ROLE app LOGIN PASSWORD 'pw'")
        async with held_login_roles(directory / "s", "", "app", "") as roles:
            assert roles is not None
            assert ScramVerifier.parse(roles["app"].verifier).check_password("pw")
            assert server.pid is not None
            await wait_until(other.is_closed, 5)
