"""The row that says who leads, in the metadata database: what `leadership.py` asks for, done."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg

from keymanager.leadership import Seat
from keymanager.repository import SESSION, UNAVAILABLE
from shared.config import Address
from shared.errors import UnavailableError
from shared.ids import InstanceId


def place_of(listen: Address) -> str:
    """The place of a process that listens there (on `listen.port` as it really is): the kernel lets no other process of
    this boot and this network namespace do that before our socket is closed, and a keymanager closes it after its term.
    A process that is stopped keeps it. Empty when the kernel does not say.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id} {os.readlink('/proc/self/ns/net')} {listen}"
    except OSError:
        return ""


class SeatTable:
    """Over a connection of its own, so that a renewal waits behind no other work. It is made again when it was lost."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: Any = None

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    async def look(self, timeout_s: float) -> Seat:
        """Raises UnavailableError, as all of these: then nobody knows whether it was done."""
        async with self._connected(timeout_s) as connection:
            row = await connection.fetchrow("SELECT epoch, renewals, holder, node_id, place FROM leader")
        holder = None if row["holder"] is None else InstanceId(row["holder"])
        return Seat(row["epoch"], row["renewals"], holder, row["node_id"], row["place"])

    async def take(self, seen: Seat, holder: InstanceId, node_id: str, place: str, timeout_s: float) -> bool:
        """Make `holder` lead in the next epoch. False: it is not the seat that was seen any more.

        Waits for transactions that are being written in the epoch before.
        """
        async with self._connected(timeout_s) as connection:
            done: str = await connection.execute(
                "UPDATE leader SET epoch = epoch + 1, renewals = 0, holder = $1, node_id = $2, place = $3, "
                "renewed_at = clock_timestamp() WHERE epoch = $4 AND renewals = $5 AND holder IS NOT DISTINCT FROM $6",
                str(holder),
                node_id,
                place,
                seen.epoch,
                seen.renewals,
                None if seen.holder is None else str(seen.holder),
            )
        return done == "UPDATE 1"

    async def renew(self, epoch: int, holder: InstanceId, timeout_s: float) -> bool:
        """Count a renewal. False: somebody else has the seat."""
        async with self._connected(timeout_s) as connection:
            done: str = await connection.execute(
                "UPDATE leader SET renewals = renewals + 1, renewed_at = clock_timestamp() "
                "WHERE epoch = $1 AND holder = $2",
                epoch,
                str(holder),
            )
        return done == "UPDATE 1"

    async def give_back(self, epoch: int, holder: InstanceId, timeout_s: float) -> None:
        """So that the next one need not wait. Only after the last thing has left this process."""
        async with self._connected(timeout_s) as connection:
            await connection.execute(
                "UPDATE leader SET holder = NULL WHERE epoch = $1 AND holder = $2", epoch, str(holder)
            )

    @contextlib.asynccontextmanager
    async def _connected(self, timeout_s: float) -> AsyncIterator[Any]:
        try:
            async with asyncio.timeout(timeout_s):
                if self._connection is None or self._connection.is_closed():
                    self._connection = await asyncpg.connect(self._dsn, timeout=timeout_s, server_settings=SESSION)
                yield self._connection
        except UNAVAILABLE as error:
            await self.aclose()
            raise UnavailableError(f"the metadata database failed: {type(error).__name__}") from error
        except asyncpg.PostgresError as error:  # no such database, no such role, wrong password
            await self.aclose()
            raise UnavailableError(f"the metadata database refused: {type(error).__name__}") from error
        except asyncio.CancelledError:
            await self.aclose()  # its answer must not be taken for the next one's
            raise
