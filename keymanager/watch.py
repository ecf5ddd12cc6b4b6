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
- **A permission restores everything at once**, and resets every count.
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
PROBE_JITTER: Final = 0.1
"""A pause is up to so much shorter or longer: probes of many key configurations spread out."""


def longest_pause_s(interval_s: float) -> float:
    """Between two probes, before the jitter."""
    return max(interval_s, BACKOFF_MAX_S)


class ProbeOutcome(enum.StrEnum):
    """What one probe, a real unwrap of the canary, came to."""

    ALLOWED = "ALLOWED"
    DENIED = "DENIED"
    UNREACHABLE = "UNREACHABLE"
    THROTTLED = "THROTTLED"
    AMBIGUOUS = "AMBIGUOUS"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What follows from a probe: perhaps an event, and when to look again (seconds from now)."""

    event: KeyEvent | None
    probe_again_after_s: float
    confirming: bool = False
    """The next probe is the confirmation of this one, and comes at once rather than an interval later."""


class Watch:
    """One key configuration's history of answers, as far as it matters."""

    __slots__ = ("_denials", "_grace_s", "_inconclusive", "_interval_s", "_last_allowed_s", "access")

    def __init__(self, access: KmsAccess, grace_s: float, interval_s: float, last_allowed_s: float) -> None:
        """`last_allowed_s`: when the KMS last said yes, on the clock whose seconds `judge` is given."""
        self.access = access
        self._grace_s = grace_s
        self._interval_s = interval_s
        self._last_allowed_s = last_allowed_s
        self._denials = 0
        self._inconclusive = 0

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
            return Judgement(self._change(KeyEvent.KMS_ALLOWED), self._interval_s)
        if outcome is ProbeOutcome.DENIED:
            self._denials += 1
            if self._denials < DENIALS_TO_REVOKE:
                return Judgement(None, min(CONFIRM_AFTER_S, self._interval_s), confirming=True)
            return Judgement(self._change(KeyEvent.KMS_DENIED), self._interval_s)
        self._inconclusive += 1
        if self._inconclusive < INCONCLUSIVE_TO_SUSPEND:
            return Judgement(None, min(RECONFIRM_AFTER_S, self._interval_s), confirming=True)
        pause_s = self._backoff_s()
        left_s = self._last_allowed_s + self._grace_s - now_s
        if left_s > 0:
            return Judgement(None, min(left_s, pause_s))
        return Judgement(self._change(KeyEvent.KMS_OUTAGE), pause_s)

    def _backoff_s(self) -> float:
        """The interval, twice, four times … as long, with each answer that was none beyond those that suspend."""
        doublings = min(self._inconclusive - INCONCLUSIVE_TO_SUSPEND, 16)
        return min(self._interval_s * 2.0**doublings, longest_pause_s(self._interval_s))

    def _change(self, event: KeyEvent) -> KeyEvent | None:
        """The event, if it changes anything."""
        before, self.access = self.access, kms_step(self.access, event)
        return None if self.access is before else event
