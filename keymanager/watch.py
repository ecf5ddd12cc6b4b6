"""What a row of KMS answers means: the watcher's judgement of one key configuration.

Rules, and why:

- **Denied** needs two definitive denials with no permission in between; the second probe follows at once. One denial
  may be a KMS replica that lags behind an `EnableKey`. A lost answer between two denials is not a permission, so it
  does not start the count again.
- **Unreachable never revokes.** It lets the grace run, counted from the last time the KMS said yes, then it suspends.
  At least three inconclusive probes without a permission in between are needed, so that with a grace of 0 one lost
  packet is not an outage. A denial between them is not a permission, so it does not start this count again either:
  answers that take turns must not put off the end of the grace.
- **Throttled and ambiguous answers never revoke either, but they let the same grace run.** The bound that we promise is
  "at most the grace without a yes": whoever can exhaust a KMS's request quota could otherwise put off the discovery of
  a revocation for as long as they like.
- **A permission restores everything at once**, and resets every count. But a KMS that takes it back soon after, again
  and again, would kill and start the computes each time: then it takes a stretch of nothing but yes, longer with each
  such fall (`HoldDown`). Falling is never put off, and a person's `:revalidate` does not wait (`lift_hold`).
- **Who gives no answer is asked less and less often**, up to BACKOFF_MAX_S: an overloaded KMS is not helped by more
  questions. Not who denies: the customer who allows again wants to see it. The end of a grace is met all the same.

This file is a core: no I/O; the time comes in.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from keymanager.lifecycle import KeyEvent, KmsAccess, kms_step

DENIALS_TO_REVOKE: Final = 2
INCONCLUSIVE_TO_SUSPEND: Final = 3
CONFIRM_AFTER_S: Final = 0.05
"""Not 0: a flood of probes would look like an attack, and two answers in the same millisecond confirm nothing."""
RECONFIRM_AFTER_S: Final = 0.25
BACKOFF_MAX_S: Final = 4.0
"""Or the interval, if that is longer."""
PROBE_JITTER: Final = 0.2
"""A pause is up to so much shorter: probes of many key configurations spread out. Not longer: an interval is what was
promised."""


def jittered_s(pause_s: float, draw: float) -> float:
    """A pause between two probes that may take `pause_s` at most, for a `draw` from [0, 1).

    A short one stays as it is: an end, of a grace or of a hold-down, is not approached in ever smaller steps.
    """
    return max(pause_s * (1 - PROBE_JITTER * draw), min(pause_s, RECONFIRM_AFTER_S))


class ProbeOutcome(enum.StrEnum):
    """What one probe, a real unwrap of the canary, came to."""

    ALLOWED = "ALLOWED"
    DENIED = "DENIED"
    UNREACHABLE = "UNREACHABLE"
    THROTTLED = "THROTTLED"
    AMBIGUOUS = "AMBIGUOUS"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What follows from a probe: perhaps an event, and when to look again (seconds from now, at most)."""

    event: KeyEvent | None
    probe_again_after_s: float
    confirming: bool = False
    """The next probe is the confirmation of this one, and comes at once rather than an interval later."""


@dataclass(frozen=True, slots=True)
class HoldDown:
    """How long a KMS that flaps must say nothing but yes before what it took comes back. All in seconds."""

    first_s: float = 5.0
    """After the first fall that came soon after a return; twice as long with each further one. 0: never."""
    longest_s: float = 300.0
    calm_s: float = 600.0
    """A fall so long after the return, or longer, is not a flap, and ends the row of them."""

    def needed_s(self, flaps: int) -> float:
        if flaps == 0:
            return 0.0
        return min(self.first_s * 2.0 ** min(flaps - 1, 64), self.longest_s)


NO_HOLD: Final = HoldDown(first_s=0.0)


@dataclass(frozen=True, slots=True)
class Hold:
    """Why the first yes of a KMS is not believed."""

    flaps: int
    """Times that it said yes and took it back soon after, in a row."""
    needed_s: float
    left_s: float
    """Of `needed_s`, if it goes on saying yes; all of it while it does not."""

    @property
    def reason(self) -> str:
        return (
            f"it took its yes back soon after {self.flaps} times in a row, so it has to say nothing but yes for "
            f"{self.needed_s:g} s, of which {self.left_s:.0f} s are left"
        )


class Watch:
    """One key configuration's history of answers, as far as it matters."""

    __slots__ = (
        "_denials",
        "_flaps",
        "_grace_s",
        "_hold_down",
        "_hold_lifted",
        "_inconclusive",
        "_interval_s",
        "_last_allowed_s",
        "_restored_s",
        "_yes_since_s",
        "access",
    )

    def __init__(
        self,
        access: KmsAccess,
        grace_s: float,
        interval_s: float,
        last_allowed_s: float,
        hold_down: HoldDown = NO_HOLD,
    ) -> None:
        """`last_allowed_s`: when the KMS last said yes, on the clock whose seconds `judge` is given."""
        self.access = access
        self._grace_s = grace_s
        self._interval_s = interval_s
        self._last_allowed_s = last_allowed_s
        self._denials = 0
        self._inconclusive = 0
        self._hold_down = hold_down
        self._hold_lifted = False
        self._flaps = 0
        self._restored_s: float | None = None
        self._yes_since_s: float | None = None
        """Nothing but yes was heard since; None: the last answer was something else."""

    @property
    def last_allowed_s(self) -> float:
        return self._last_allowed_s

    def configure(self, grace_s: float, interval_s: float) -> None:
        """From the next probe on."""
        self._grace_s = grace_s
        self._interval_s = interval_s

    def judge(self, outcome: ProbeOutcome, asked_at_s: float, now_s: float) -> Judgement:
        """Take in the answer to a probe that was sent at `asked_at_s`."""
        if outcome is ProbeOutcome.ALLOWED:
            self._denials = self._inconclusive = 0
            self._last_allowed_s = max(self._last_allowed_s, asked_at_s)
            if self._yes_since_s is None:
                self._yes_since_s = now_s
            hold = self.hold(now_s)
            if hold is not None:
                return Judgement(None, min(hold.left_s, self._interval_s))
            return Judgement(self._change(KeyEvent.KMS_ALLOWED, now_s), self._interval_s)
        self._yes_since_s, self._hold_lifted = None, False
        if outcome is ProbeOutcome.DENIED:
            self._denials += 1
            if self._denials < DENIALS_TO_REVOKE:
                return Judgement(None, min(CONFIRM_AFTER_S, self._interval_s), confirming=True)
            return Judgement(self._change(KeyEvent.KMS_DENIED, now_s), self._interval_s)
        self._inconclusive += 1
        if self._inconclusive < INCONCLUSIVE_TO_SUSPEND:
            return Judgement(None, min(RECONFIRM_AFTER_S, self._interval_s), confirming=True)
        pause_s = self._backoff_s()
        left_s = self._last_allowed_s + self._grace_s - now_s
        if left_s > 0:
            return Judgement(None, min(left_s, pause_s))
        return Judgement(self._change(KeyEvent.KMS_OUTAGE, now_s), pause_s)

    def hold(self, now_s: float) -> Hold | None:
        """What a return waits for. None: for nothing, or for one yes."""
        if self.access is KmsAccess.ALLOWED or self._hold_lifted:
            return None
        needed_s = self._hold_down.needed_s(self._flaps)
        left_s = needed_s if self._yes_since_s is None else self._yes_since_s + needed_s - now_s
        return Hold(self._flaps, needed_s, left_s) if left_s > 0 else None

    def lift_hold(self) -> None:
        """A person wants it back now: the next answer restores, if it is a yes. What was counted stays counted."""
        self._hold_lifted = True

    def _backoff_s(self) -> float:
        """The interval, twice, four times … as long, with each answer that was none beyond those that suspend."""
        doublings = min(self._inconclusive - INCONCLUSIVE_TO_SUSPEND, 16)
        return min(self._interval_s * 2.0**doublings, max(self._interval_s, BACKOFF_MAX_S))

    def _change(self, event: KeyEvent, now_s: float) -> KeyEvent | None:
        """The event, if it changes anything."""
        before, self.access = self.access, kms_step(self.access, event)
        if self.access is before:
            return None
        if self.access is KmsAccess.ALLOWED:
            self._restored_s, self._hold_lifted = now_s, False
        elif before is KmsAccess.ALLOWED:
            soon = self._restored_s is not None and now_s - self._restored_s < self._hold_down.calm_s
            self._flaps = self._flaps + 1 if soon else 0
        return event
