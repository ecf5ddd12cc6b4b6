"""Writes what is recorded for every message (wraps, unwraps, denials, leases that begin or end, with their rows) in
groups, and in the order in which it came: a row that a lease's end deletes is not one that was inserted since.

Whoever records waits until the record is durable, and only then lets the key or the lease go: nothing leaves
unrecorded. One transaction at a time takes everything that has come in since the last one, so the cost of a commit is
shared: ten thousand instances whose leases have run out in an outage have new ones after some twenty transactions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from keymanager.records import StoredLease
from keymanager.repository import Repository
from shared.audit_chain import AuditEntry
from shared.errors import KeylakeError, OverloadedError, UnavailableError
from shared.ids import InstanceId, ProjectId

_MAX_WAITING: Final = 16_384
_MAX_GROUP: Final = 512

_LeaseKey = tuple[ProjectId, InstanceId]


@dataclass(frozen=True, slots=True)
class _Waiting:
    entries: Sequence[AuditEntry]
    leases: Sequence[StoredLease]
    ended: Sequence[_LeaseKey]
    written: asyncio.Future[None]


class AuditLog:
    """`run` it in a task; then `record`."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue(_MAX_WAITING)
        self._ended = False

    async def record(
        self, *entries: AuditEntry, leases: Sequence[StoredLease] = (), ended: Sequence[_LeaseKey] = ()
    ) -> None:
        """Returns when the entries are durable, and the leases that they describe: begun, or ended. Raises
        UnavailableError when they cannot be written, OverloadedError when too many wait for that already."""
        if self._ended:
            raise UnavailableError("nothing can be recorded any more: this keymanager has stopped")
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait(_Waiting(entries, leases, ended, written))
        except asyncio.QueueFull:
            raise OverloadedError("too much waits to be recorded: come back later") from None
        await asyncio.shield(written)

    async def run(self) -> None:
        """Until cancelled; then whoever waits is told so, and so is whoever comes later."""
        group: list[_Waiting] = []
        try:
            while True:
                group = [await self._waiting.get()]
                while len(group) < _MAX_GROUP and not self._waiting.empty():
                    group.append(self._waiting.get_nowait())
                await self._write(group)
        finally:
            self._ended = True
            while not self._waiting.empty():
                group.append(self._waiting.get_nowait())
            stopped = "this keymanager has stopped: nobody knows whether it is recorded"
            for each in group:
                if not each.written.done():
                    _fail(each.written, UnavailableError(stopped))

    async def _write(self, group: Sequence[_Waiting]) -> None:
        try:
            async with self._repository.transaction() as transaction:
                last: dict[_LeaseKey, StoredLease | None] = {}
                for each in group:
                    last |= {(lease.project_id, lease.holder.instance_id): lease for lease in each.leases}
                    last |= dict.fromkeys(each.ended)
                if begun := [lease for lease in last.values() if lease is not None]:
                    await transaction.insert_leases(begun)
                if ended := [key for key, lease in last.items() if lease is None]:
                    await transaction.delete_leases(ended)
                await transaction.audit(entry for each in group for entry in each.entries)
        except KeylakeError as error:
            if len(group) > 1 and not isinstance(error, UnavailableError):
                for each in group:  # one of them cannot be stored: the others can
                    await self._write([each])
                return
            for each in group:
                _fail(each.written, type(error)(str(error)))
        else:
            for each in group:
                each.written.set_result(None)


def _fail(written: asyncio.Future[None], error: KeylakeError) -> None:
    written.set_exception(error)
    written.exception()  # retrieved: whoever waited may be gone
