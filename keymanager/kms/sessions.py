"""Sessions with an identity service: opened once for all callers, renewed in time, replaced when they have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, Generic, TypeVar

from keymanager.kms.base import KmsError, Verdict
from shared.clock import Clock

R = TypeVar("R")
T = TypeVar("T")

_RENEWAL_MARGIN: Final = timedelta(minutes=5)
_RENEWAL_SHARE: Final = 0.2
"""A session is renewed when this share of its life is left, or the margin, whichever is shorter."""
_RENEWAL_RETRY: Final = timedelta(seconds=10)
"""How long a session that could not be renewed, but has not expired, is used before the service is asked again."""


@dataclass(frozen=True, slots=True)
class Session(Generic[T]):
    value: T
    renew_after: datetime | None
    """None: it does not expire, or its maker looks after that."""
    expires_at: datetime | None
    generation: int


Open = Callable[[], Awaitable[tuple[T, datetime | None]]]
"""Makes a new session: what it is, and when it expires (None: never). Raises KmsError."""


class Sessions(Generic[T]):
    """The current session of one provider. Belongs to one event loop."""

    def __init__(self, open_session: Open[T], clock: Clock) -> None:
        self._open = open_session
        self._clock = clock
        self._session: Session[T] | None = None
        self._renewing = asyncio.Lock()

    @property
    def held(self) -> Session[T] | None:
        return self._session

    async def current(self) -> Session[T]:
        """The cached session, renewed in time. The identity service being out of reach does not end a session that
        the KMS still takes; its refusing does: then the customer has withdrawn the principal."""
        session = self._session
        if session is None:
            return await self.newer_than(0)
        if session.renew_after is None or self._clock.now() < session.renew_after:
            return session
        try:
            return await self.newer_than(session.generation)
        except KmsError as error:
            now = self._clock.now()
            if error.verdict is Verdict.DENIED or session.expires_at is None or now >= session.expires_at:
                raise
            if self._session is session:
                self._session = replace(session, renew_after=now + _RENEWAL_RETRY)
            return session

    async def use(self, attempt: Callable[[T], Awaitable[R]], ended: Collection[str]) -> R:
        """`attempt` with the current session, and once more with a newer one when it fails with a provider code of
        `ended`, which speaks of the session and not of the key. Raises what the last attempt raises."""
        session = await self.current()
        try:
            return await attempt(session.value)
        except KmsError as error:
            if error.provider_code not in ended:
                raise
        return await attempt((await self.newer_than(session.generation)).value)

    async def newer_than(self, generation: int) -> Session[T]:
        """A session newer than `generation`; calls that find it outdated together open one between them."""
        async with self._renewing:
            if self._session is not None and self._session.generation > generation:
                return self._session
            value, expires_at = await self._open()
            self._session = Session(value, self._renew_after(expires_at), expires_at, generation + 1)
            return self._session

    def _renew_after(self, expires_at: datetime | None) -> datetime | None:
        if expires_at is None:
            return None
        lifetime = max(expires_at - self._clock.now(), timedelta(0))
        return expires_at - min(_RENEWAL_MARGIN, lifetime * _RENEWAL_SHARE)
