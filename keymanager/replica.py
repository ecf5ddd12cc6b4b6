"""One of several keymanagers on one metadata database: waits, leads, and makes way.

The shell of `leadership.py`: it asks the seat what that says, and runs a `KeyManager` for each term that it wins. What
was loaded in a term ends with it; the next term, whoever's it is, loads everything anew and asks every KMS.

What may interleave: the loop of `run` never waits for the term's work, so a renewal is not late because a KMS is slow.
The end of a term is noticed by everybody who looks at `Term.valid`, at once; that its tasks end and its keys are wiped
follows in the same turn of the event loop in which `run` notices.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final, Protocol

from prometheus_client import CollectorRegistry

from keymanager.anchoring import AnchorKeys
from keymanager.app import create_app
from keymanager.config import KeymanagerSettings
from keymanager.front import Front, Serving, standby_app
from keymanager.leadership import Election, Look, Renew, Seat, Take, Term, Wait
from keymanager.manager import KeyManager
from keymanager.metrics import register_metrics
from keymanager.providers import ProviderFactory
from keymanager.repository import Repository
from keymanager.seat import SeatTable
from shared.auth import Service, TokenVerifier, TrustBundle
from shared.clock import Clock
from shared.errors import KeylakeError, NotLeaderError, UnavailableError
from shared.ids import InstanceId
from shared.service import Readiness
from shared.telemetry import get_logger

_log = get_logger(__name__)
_PAUSE_AFTER_FAILURE_S: Final = 1.0
"""Between two attempts to lead that failed in `KeyManager.running`: somebody else may try meanwhile."""
_OPEN_AGAIN_S: Final = 0.5


class SeatAccess(Protocol):
    """Asks the seat. All raise UnavailableError; then nobody knows whether it was done. See `SeatTable`."""

    async def look(self, timeout_s: float) -> Seat: ...

    async def take(self, seen: Seat, holder: InstanceId, node_id: str, place: str, timeout_s: float) -> bool: ...

    async def renew(self, epoch: int, holder: InstanceId, timeout_s: float) -> bool: ...

    async def give_back(self, epoch: int, holder: InstanceId, timeout_s: float) -> None: ...

    async def aclose(self) -> None: ...


class Surroundings(Protocol):
    """Where a replica keeps its books, and how it is heard: a real database and an HTTP API, unless it is simulated."""

    @property
    def seat(self) -> SeatAccess: ...

    def opened(self) -> contextlib.AbstractAsyncContextManager[Repository]:
        """The metadata, migrated. Raises UnavailableError."""
        ...

    def serving(self, term: Term, manager: KeyManager) -> Serving:
        """The API of a term."""
        ...


class _Real:
    def __init__(self, settings: KeymanagerSettings, trusted: TrustBundle, clock: Clock) -> None:
        self._settings, self._trusted, self._clock = settings, trusted, clock
        self.seat: Final = SeatTable(settings.metadata_dsn.get_secret_value())

    def opened(self) -> contextlib.AbstractAsyncContextManager[Repository]:
        settings = self._settings
        return Repository.open(
            settings.metadata_dsn.get_secret_value(),
            settings.metadata_connections,
            self._clock,
            idle_transaction_timeout_s=settings.leader_ttl_s,
        )

    def serving(self, term: Term, manager: KeyManager) -> Serving:
        registry = CollectorRegistry()
        register_metrics(registry, manager)
        verifier = TokenVerifier(self._trusted, Service.KEYMANAGER, manager.people)
        return Serving(term, create_app(manager, verifier, registry, Readiness()))


class Replica:
    """`run` it in a task; `front` is its API."""

    def __init__(
        self,
        settings: KeymanagerSettings,
        factory: ProviderFactory,
        trusted: TrustBundle,
        anchor_keys: AnchorKeys | None,
        clock: Clock,
        surroundings: Callable[[KeymanagerSettings, TrustBundle, Clock], Surroundings] = _Real,
    ) -> None:
        self._settings = settings
        self._factory = factory
        self._surroundings = surroundings(settings, trusted, clock)
        self._anchor_keys = anchor_keys
        self._clock = clock
        self._instance_id = InstanceId.new()
        self._seat = self._surroundings.seat
        self._place = ""
        self._election = Election(self._instance_id, settings.leader_ttl_s, clock)
        self._readiness = Readiness({"leader": "the seat was not seen yet"})
        app = standby_app(trusted, self._readiness, lambda: "" if (s := self._election.seen) is None else s.node_id)
        self.front: Final = Front(app, settings.max_requests, settings.max_sessions)
        self._reign: asyncio.Task[None] | None = None

    async def run(self, place: str) -> None:
        """Until cancelled; then the seat is given back. `place`: see `place_of`.

        Raises ConflictError when the database is of a newer version, and whatever else keeps this process from ever
        leading.
        """
        self._place = place
        self._election = Election(self._instance_id, self._settings.leader_ttl_s, self._clock, place)
        try:
            while True:
                try:
                    async with self._surroundings.opened() as repository:
                        await self._take_part(repository)
                except UnavailableError as error:
                    self._away(error)
                    await asyncio.sleep(_OPEN_AGAIN_S)
        finally:
            await self._seat.aclose()

    async def _take_part(self, repository: Repository) -> None:
        term: Term | None = None
        try:
            while True:
                if self._reign is not None and (self._reign.done() or not (term and term.valid)):
                    await self._end_reign(term)
                term = await self._step()
                if term is not None and self._reign is None:
                    self._reign = asyncio.create_task(self._lead(term, repository))
        finally:
            await self._end_reign(term)
            if term is not None:
                with contextlib.suppress(UnavailableError):
                    await self._seat.give_back(term.epoch, self._instance_id, self._settings.leader_ttl_s)

    async def _step(self) -> Term | None:
        """Do what the election wants next. Returns our term, if we have one."""
        election, ttl_s = self._election, self._settings.leader_ttl_s
        step = election.next()
        if self._reign is not None and election.term is None:
            return None  # it ran out just now: ended first, whatever the database takes for an answer
        sent_at_s = self._clock.monotonic_s()
        try:
            match step:
                case Wait(seconds):
                    await self._wait(seconds)
                case Look():
                    election.saw(seat := await self._seat.look(ttl_s))
                    self._standing_by(seat)
                case Take(seen):
                    won = await self._seat.take(seen, self._instance_id, self._settings.node_id, self._place, ttl_s)
                    election.took(seen, sent_at_s, won=won)
                    if won:
                        self._readiness.missing, self._readiness.standby = {"leader": "loading"}, False
                case Renew(current):
                    # At the end of the term somebody has to be awake to end it. Not less: asking again is no faster.
                    timeout_s = max(0.0, current.valid_until_s - sent_at_s)
                    kept = await self._seat.renew(current.epoch, self._instance_id, timeout_s)
                    election.renewed(current, sent_at_s, kept=kept)
        except UnavailableError as error:
            election.unanswered()
            self._away(error)
        return election.term

    async def _wait(self, seconds: float) -> None:
        """At most `seconds`, and no longer than a reign lasts."""
        if self._reign is None:
            await asyncio.sleep(seconds)
        else:
            await asyncio.wait({self._reign}, timeout=seconds)

    # --- a term of ours ---

    async def _lead(self, term: Term, repository: Repository) -> None:
        """Until cancelled, or until something shows that the term is over."""
        try:
            async with KeyManager.running(
                self._settings, repository.during(term), self._factory, self._clock, term, self._anchor_keys
            ) as manager:
                self.front.serving = self._surroundings.serving(term, manager)
                _log.info("leading", epoch=term.epoch, lease_ttl_s=self._settings.lease_ttl_s)
                try:
                    await asyncio.Event().wait()
                finally:
                    self.front.serving = None
        except* NotLeaderError:
            term.end()

    async def _end_reign(self, term: Term | None) -> None:
        """Returns when nothing of it runs any more, and its keys are wiped. Raises what it failed with, except for what
        passes by itself."""
        reign, self._reign = self._reign, None
        if reign is not None:
            # While its term is good, as at a shutdown, it may still record its last calls to a KMS.
            reign.cancel()
            await asyncio.wait({reign})
        if term is not None:
            term.end()
        if reign is None:
            return
        failure = None if reign.cancelled() else reign.exception()
        _log.warning("not leading any more", epoch=None if term is None else term.epoch)
        if failure is None:
            return
        if not _passes(failure):
            raise failure
        _log.warning("leading failed", error=repr(failure))
        if term is not None:
            with contextlib.suppress(UnavailableError):
                await self._seat.give_back(term.epoch, self._instance_id, self._settings.leader_ttl_s)
        await asyncio.sleep(_PAUSE_AFTER_FAILURE_S)

    # --- what /readyz says ---

    def _standing_by(self, seat: Seat) -> None:
        self._readiness.missing = {"leader": "this keymanager does not lead"}
        self._readiness.standby = seat.holder not in (None, self._instance_id)

    def _away(self, error: UnavailableError) -> None:
        if self._readiness.missing.get("leader") != str(error):
            _log.warning("the metadata database is away", reason=str(error))
        self._readiness.missing = {"leader": str(error)}
        self._readiness.standby = False


def _passes(failure: BaseException) -> bool:
    """Errors of others: the database's, for example. Ours, a bug or a damaged row, end the process."""
    if isinstance(failure, BaseExceptionGroup):
        return all(_passes(error) for error in failure.exceptions)
    return isinstance(failure, KeylakeError)
