"""The proxy's leases: one per project with sessions, and the end of those sessions when it is lost."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from shared.errors import KeyAccessError
from shared.ids import ProjectId
from shared.lease import KeyLoss, KeySource, Lease, key_access_error


class Endable(Protocol):
    """A session, as far as this module knows it."""

    def end(self, farewell: bytes) -> None:
        """Say this and close. Idempotent."""
        ...

    def cut(self, error: KeyAccessError) -> None:
        """The keys are gone: say so if it can be said at once, and close; nothing that waits to be sent leaves any
        more. Idempotent."""
        ...

    def abort(self) -> None:
        """Close without a word, now."""
        ...

    async def wait_closed(self) -> None: ...


class Projects:
    """What may interleave: one event loop; a session registers before it awaits anything, so a loss always finds it."""

    def __init__(self, keys: KeySource, *, linger_s: float, drain_timeout_s: float) -> None:
        self._keys = keys
        self._linger_s = linger_s
        self._drain_timeout_s = drain_timeout_s
        self._leases: dict[ProjectId, Lease] = {}
        self._sessions: dict[ProjectId, set[Endable]] = {}
        self._lost: dict[ProjectId, asyncio.Event] = {}
        self._releases: set[asyncio.Task[None]] = set()

    async def enter(self, project_id: ProjectId, session: Endable) -> Lease:
        """Register a session under a live lease. Raises KeyAccessError, UnavailableError."""
        self._sessions.setdefault(project_id, set()).add(session)
        try:
            lease = await self._keys.acquire(project_id, self._on_loss, self._cut)
            self._leases[project_id] = lease
            lease.check()
        except BaseException:
            self.leave(project_id, session)
            raise
        return lease

    def leave(self, project_id: ProjectId, session: Endable) -> None:
        """The session is over. The last one's lease lingers, so that short connections do not ask for one each."""
        sessions = self._sessions.get(project_id)
        if sessions is None:
            return
        sessions.discard(session)
        if not sessions:
            task = asyncio.create_task(self._release_later(project_id))
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)

    async def _release_later(self, project_id: ProjectId) -> None:
        await asyncio.sleep(self._linger_s)
        if not self._sessions.get(project_id):
            self._sessions.pop(project_id, None)
            self._leases.pop(project_id, None)
            self._lost.pop(project_id, None)
            await self._keys.release(project_id)

    def count(self) -> int:
        return sum(map(len, self._sessions.values()))

    async def lost_within(self, lease: Lease, timeout_s: float) -> bool:
        """Wait for the news that the keys are gone. True at once when they are."""
        event = self._lost.setdefault(lease.project_id, asyncio.Event())
        try:
            async with asyncio.timeout(timeout_s):
                while lease.live:
                    event.clear()
                    await event.wait()
        except TimeoutError:
            return not lease.live
        return True

    def _cut(self, loss: KeyLoss) -> None:
        lease = self._leases.get(loss.project_id)
        error = key_access_error(loss.state, loss.reason, None if lease is None else lease.workspace_id)
        for session in list(self._sessions.get(loss.project_id, ())):
            session.cut(error)

    async def _on_loss(self, loss: KeyLoss) -> dict[str, float]:
        began = time.monotonic()
        event = self._lost.get(loss.project_id)
        if event is not None:
            event.set()
        self._cut(loss)
        await self._closed(list(self._sessions.get(loss.project_id, ())))
        return {"close_connections": round(time.monotonic() - began, 6)}

    async def end_all(self, farewell: bytes) -> None:
        """For the proxy's own end."""
        sessions = [session for each in self._sessions.values() for session in each]
        for session in sessions:
            session.end(farewell)
        await self._closed(sessions)
        for task in list(self._releases):
            task.cancel()
        await asyncio.gather(*self._releases, return_exceptions=True)

    async def _closed(self, sessions: list[Endable]) -> None:
        """Return when they are closed, which have ended; what does not flush in time is dropped."""
        closing = asyncio.gather(*(session.wait_closed() for session in sessions))
        try:
            async with asyncio.timeout(self._drain_timeout_s):
                await asyncio.shield(closing)
        except TimeoutError:
            for session in sessions:
                session.abort()
            await closing
