"""Which of several keymanagers serves: the decisions, without the database and without waiting.

One row of the metadata database, the *seat*, says who leads, in which *epoch*, and how often that was *renewed*. Theory
of operation:

    replica ──Look──► seat    the same seat for longer than ttl: its holder is dead, or cut off, or stopped
            ──Take──► seat    compare and set: only if it is still the seat that was seen; the epoch goes up by one
            ──Renew─► seat    every ttl/3, only in its own epoch; it then leads until ttl after it *sent* that

No clock is compared with another machine's, the database's included: clocks of databases are set, and then a leader
would be deposed that still believes in itself. A replica counts from when the answer with a seat has *arrived*, the
leader counts from when it sent the renewal that made the seat, so the leader always stops first (`CLOCK_DRIFT` pays for
clocks that tick at different speeds).

Invariants, for all replicas of one seat:

- at no moment are the terms of two of them valid;
- a term that is over never comes back, whatever answers arrive later: its holder takes the seat again, in a new epoch;
- an answer that was lost (the commit happened, or it did not) is never taken for either.

`Term.check` stands after the work and before its result leaves, as the check of a lease does (`shared.lease`). What is
written is fenced by the epoch, in the database (`repository.py`).

This file is a core: no I/O, and the clock comes in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from keymanager.lease_table import CLOCK_DRIFT
from shared.clock import Clock
from shared.errors import NotLeaderError
from shared.ids import InstanceId

RENEWALS_PER_TTL: Final = 3
LOOKS_PER_TTL: Final = 6


@dataclass(frozen=True, slots=True)
class Seat:
    """The row as it was at one moment. Two equal seats: nobody has renewed or taken it in between."""

    epoch: int
    renewals: int
    holder: InstanceId | None
    """None: nobody; it was never taken, or was given back."""
    node_id: str = ""
    """Name of the holder, for people."""
    place: str = ""
    """Where the holder lives, and nobody else while it lives: see `Election`. Empty: not known."""


class Term:
    """The time in which one replica leads. Cheap enough for every message: `check()` reads a clock and compares."""

    __slots__ = ("_clock", "_over", "_ttl_s", "_valid_until_s", "epoch")

    def __init__(self, epoch: int, taken_at_s: float, ttl_s: float, clock: Clock) -> None:
        """`taken_at_s`: when the request that took the seat was sent, on `clock`."""
        self.epoch: Final = epoch
        self._ttl_s = ttl_s
        self._clock = clock
        self._valid_until_s = taken_at_s + ttl_s
        self._over = False

    @property
    def valid(self) -> bool:
        """Once False, never True again."""
        if not self._over and self._clock.monotonic_s() >= self._valid_until_s:
            self._over = True
        return not self._over

    @property
    def valid_until_s(self) -> float:
        return self._valid_until_s

    def check(self) -> None:
        """Raises NotLeaderError unless this replica leads now. Call it after the work, before its result leaves."""
        if not self.valid:
            raise NotLeaderError("this keymanager does not lead any more")

    def extend(self, sent_at_s: float) -> None:
        """The renewal that was sent at `sent_at_s` is in the seat."""
        if self.valid:
            self._valid_until_s = max(self._valid_until_s, sent_at_s + self._ttl_s)

    def end(self) -> None:
        """It is over: somebody else has the seat, or is to have it."""
        self._over = True


@dataclass(frozen=True, slots=True)
class Look:
    """Read the seat; then `saw`."""


@dataclass(frozen=True, slots=True)
class Take:
    """Make ourselves the holder in epoch `seen.epoch + 1` if the seat is still `seen`; then `took`."""

    seen: Seat


@dataclass(frozen=True, slots=True)
class Renew:
    """Count a renewal if we are still the holder in this epoch; then `renewed`."""

    term: Term


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do for `seconds`, at most."""

    seconds: float


Step: TypeAlias = Look | Take | Renew | Wait


class Election:
    """What one replica does next, and what it knows. One request at a time: its answer, or `unanswered`, before the
    next `next`."""

    def __init__(self, instance_id: InstanceId, ttl_s: float, clock: Clock, place: str = "") -> None:
        """`instance_id` is this process's own: whoever is started again is somebody else. `place`: something that only
        one living process can have, and that we have. So a holder of before in our place is dead, and is not waited
        for. Empty: nothing is known to be like that.
        """
        self._place = place
        self._instance_id = instance_id
        self._ttl_s = ttl_s
        self._clock = clock
        self._seen: Seat | None = None
        self._seen_at_s = float("-inf")
        self._asked_at_s = float("-inf")
        self._again_at_s = float("-inf")
        self.term: Term | None = None
        """Ours, while it is valid. Invariant: at most one, and it is None before the seat is taken again."""

    @property
    def seen(self) -> Seat | None:
        """The seat as it was last seen; None: not known."""
        return self._seen

    def next(self) -> Step:
        now_s = self._clock.monotonic_s()
        if self.term is not None and self.term.valid:
            renew_at_s = self._asked_at_s + self._ttl_s / RENEWALS_PER_TTL
            if now_s >= renew_at_s:
                self._asked_at_s = now_s
                return Renew(self.term)
            return Wait(min(renew_at_s, self.term.valid_until_s) - now_s)
        self.term = None
        take_at_s = max(self._free_at_s(), self._again_at_s)
        if self._seen is not None and now_s >= take_at_s:
            self._asked_at_s = now_s
            return Take(self._seen)
        look_at_s = self._asked_at_s + self._ttl_s / LOOKS_PER_TTL
        if now_s >= look_at_s:
            self._asked_at_s = now_s
            return Look()
        return Wait(min(look_at_s, take_at_s) - now_s)

    def _free_at_s(self) -> float:
        """When the seat that was seen may be taken, if it is still the same."""
        if self._seen is None:
            return float("inf")
        # Our own seat without a term: a term of ours that is over, or a Take whose answer was lost. Nobody uses it.
        if self._seen.holder in (None, self._instance_id):
            return self._seen_at_s
        if self._place and self._seen.place == self._place:
            return self._seen_at_s
        return self._seen_at_s + self._ttl_s * (1 + CLOCK_DRIFT)

    # --- answers ---

    def saw(self, seat: Seat) -> None:
        """The answer to a Look has arrived now."""
        if seat != self._seen:
            self._seen, self._seen_at_s = seat, self._clock.monotonic_s()

    def took(self, seen: Seat, sent_at_s: float, *, won: bool) -> None:
        """The answer to `Take(seen)`, which was sent at `sent_at_s`."""
        self._seen = None  # it is another one now, either way
        if won:
            self.term = Term(seen.epoch + 1, sent_at_s, self._ttl_s, self._clock)

    def renewed(self, term: Term, sent_at_s: float, *, kept: bool) -> None:
        """The answer to `Renew(term)`, which was sent at `sent_at_s`."""
        if kept:
            term.extend(sent_at_s)
        else:
            term.end()

    def unanswered(self) -> None:
        """The request may have been done or not, and nothing is concluded from that: what was seen may be out of date
        now, and a Take, which compares, finds that out."""
        self._again_at_s = self._clock.monotonic_s() + self._ttl_s / LOOKS_PER_TTL
