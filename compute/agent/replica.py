"""What a read replica's agent does that another one's does not: it hands WAL to its Postgres, and it has no password.

Roles and passwords of a replica are the log's, the bootstrap superuser's too, and that one is a primary's of which
nobody here knows anything. So the agent gets its session before anybody else can get one, and keeps it: Postgres starts
with a pg_hba.conf that lets in the agent's role alone, on a socket that nobody has been told of; once the agent is in,
the real one is put in its place; and the address is told when nobody is in but the agent, and nobody can come in
without a password.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import asyncpg

from compute.agent import idle
from compute.agent.admin import connect_as_admin
from compute.agent.postgres import ComputePostgres
from compute.agent.postgres_conf import hba_conf
from compute.agent.protocol import Boot, Follow, Replayed
from compute.agent.wal_sender import WalSender
from compute.agent.wal_source import WalSource
from shared.errors import UnavailableError
from shared.lsn import Lsn
from shared.tls import client_context

_SNAPSHOT_PATIENCE_S: Final = 30.0
_LOG_IN_TIMEOUT_S: Final = 10.0
_REPORT_PACE_S: Final = 1.0
_OTHERS: Final = (
    "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
)


class Replica:
    """`start`, then `look`; `report` all the time; `close`."""

    def __init__(
        self, boot: Boot, follow: Follow, directory: Path, token: Callable[[], str], check: Callable[[], None]
    ) -> None:
        """`directory`: to be made, for the socket that WAL goes through. `check`: raises KeyAccessError unless WAL may
        be handed on."""
        self._socket_dir = boot.socket_dir
        context = client_context(boot.ca_certificate)
        self._source = WalSource(boot.project_id, boot.timeline_id, follow.safekeepers, context, token)
        self._sender = WalSender(directory, boot.system_identifier, follow.log_start_lsn, self._source, check)
        self._session: Any = None

    @property
    def conninfo(self) -> str:
        return self._sender.conninfo

    async def start(self, postgres: ComputePostgres, pgdata: Path, lsn: Lsn) -> None:
        """Returns when it takes queries, as of `lsn` or later, from those who may. No time limit of its own: how much
        there is to replay since the last checkpoint, the caller cannot know.

        Raises UnavailableError, CrashedError."""
        try:
            await self._sender.start()
        except OSError as error:
            raise UnavailableError(f"there is no socket for the WAL: {error.strerror}") from None
        starting = asyncio.create_task(postgres.start(None))
        late = asyncio.create_task(self._wait_in_vain(lsn))
        try:
            await asyncio.wait({starting, late}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                raise UnavailableError(
                    "the replica waits for a transaction of the primary that has more than 64 subtransactions: try "
                    "again when it is over"
                )
            starting.result()
        finally:
            for task in (starting, late):
                task.cancel()
            await asyncio.gather(starting, late, return_exceptions=True)
        self._session = await self._log_in()
        (pgdata / "pg_hba.conf").write_text(hba_conf(follows=True))
        postgres.reload()
        try:
            async with asyncio.timeout(_LOG_IN_TIMEOUT_S):
                while await self._is_open() or await self._session.fetchval(_OTHERS):
                    pass
        except TimeoutError:
            raise UnavailableError("the replica could not be closed to everybody without a password") from None

    async def _wait_in_vain(self, lsn: Lsn) -> None:
        """What could still be missing when everything up to `lsn` is replayed is a list of running transactions: the
        one in the log had left some out (subxid_overflow; procarray.c, ProcArrayApplyRecoveryInfo). The pageserver
        avoids checkpoints with such lists where it can (pageserver/ingest_state.py)."""
        await self._sender.wait_replayed(lsn.value)
        await asyncio.sleep(_SNAPSHOT_PATIENCE_S)

    async def _log_in(self) -> Any:
        try:
            return await connect_as_admin(self._socket_dir, "", _LOG_IN_TIMEOUT_S)
        except (OSError, TimeoutError) as error:
            raise UnavailableError(f"the agent cannot log in: {type(error).__name__}") from None

    async def _is_open(self) -> bool:
        """Does anybody get in without a password?"""
        try:
            connection = await self._log_in()
        except asyncpg.InvalidAuthorizationSpecificationError:
            return False
        await connection.close(timeout=_LOG_IN_TIMEOUT_S)
        return True

    async def look(self, timeout_s: float) -> float | None:
        """`idle.Look`. The session is an old one, which Postgres goes on with also when nobody gets a new one."""
        await idle.knock(self._socket_dir, timeout_s)
        return await idle.ask(self._session, timeout_s)

    async def report(self, send: Callable[[Replayed], Awaitable[None]]) -> None:
        """When something has changed. Until cancelled."""
        told = None
        while True:
            replayed_lsn = self._sender.replayed_lsn
            now = Replayed(
                replay_lsn=Lsn(replayed_lsn) if replayed_lsn else None,
                end_lsn=Lsn(max(self._source.end_lsn, replayed_lsn)),
                problem=self._source.problem,
            )
            if now != told:
                await send(now)
                told = now
            await asyncio.sleep(_REPORT_PACE_S)

    def close(self) -> None:
        """No WAL leaves from now on."""
        self._sender.close()
