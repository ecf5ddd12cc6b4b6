"""How long after the customer's no the last plaintext may leave, at worst, for the settings in force.

Theory of operation. Counted from the moment from which the customer's KMS says yes to nothing any more (its own
propagation comes before that, and is not ours to bound) to the moment from which no instance answers with data and no
commit is acknowledged. Two parts, each a sum of what may follow each other:

    detection     the last yes, decided before that moment, may be answered a whole deadline later; a pause; then as
                  many probes as a verdict takes, each of which may use up its deadline
    the rest      reachable: the push. Cut off, stopped or killed: a lease that was renewed at the very last moment.
                  When the keymanager itself is stalled: what it may still be stalled for before its term is over

What a verdict takes, for each kind of answer (`watch.py`):

    denied        DENIALS_TO_REVOKE denials in a row
    no answer     INCONCLUSIVE_TO_SUSPEND probes in a row, and the grace is over, which a last probe finds out
    flapping      as no answer, with the denials among the answers that do not revoke yet

`tests/unit/test_keymanager_bound.py` plays the watcher against every adversary that hypothesis finds, and one that
reaches each detection bound exactly. This file is a core: no I/O and no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from keymanager.lease_table import CLOCK_DRIFT
from keymanager.watch import (
    CONFIRM_AFTER_S,
    DENIALS_TO_REVOKE,
    INCONCLUSIVE_TO_SUSPEND,
    RECONFIRM_AFTER_S,
)
from shared.api.keymanager import KeyState, NoCause, WorstCase

FAN_OUT_S: Final = 2.0
"""Granted to a push until an instance that can hear it holds nothing; it begins with the end of issuing, and waits for
no database. What it takes is measured: docs/benchmarks.md."""


@dataclass(frozen=True, slots=True)
class BoundSettings:
    """What the bound depends on, all in seconds."""

    interval_s: float
    """Between two probes."""
    grace_s: float
    """Without any yes."""
    deadline_s: float
    """Of one probe, with everything that it waits for."""
    lease_ttl_s: float
    leader_ttl_s: float
    session_s: float | None
    """How long a session with the customer's cloud outlives the trust that it was given on; None: not ours to know."""
    fan_out_s: float = FAN_OUT_S


def detection_s(cause: NoCause, settings: BoundSettings) -> float | None:
    """From the last possible yes to the end of issuing. None: not known."""
    interval_s, deadline_s = settings.interval_s, settings.deadline_s
    confirm_s, reconfirm_s = min(CONFIRM_AFTER_S, interval_s), min(RECONFIRM_AFTER_S, interval_s)
    first_probe_s = deadline_s + interval_s
    row_s = INCONCLUSIVE_TO_SUSPEND * deadline_s + (INCONCLUSIVE_TO_SUSPEND - 1) * reconfirm_s
    denied_s = first_probe_s + DENIALS_TO_REVOKE * deadline_s + (DENIALS_TO_REVOKE - 1) * confirm_s
    match cause:
        case NoCause.DENIED:
            return denied_s
        case NoCause.NO_ANSWER:
            return max(settings.grace_s + deadline_s, first_probe_s + row_s)
        case NoCause.FLAPPING:
            denial_s = (DENIALS_TO_REVOKE - 1) * (deadline_s + confirm_s)
            return max(settings.grace_s + deadline_s, first_probe_s + row_s) + denial_s
        case NoCause.TRUST_WITHDRAWN:
            return None if settings.session_s is None else settings.session_s + denied_s
        case NoCause.OPERATOR:
            return 0.0


def worst_case(cause: NoCause, settings: BoundSettings) -> WorstCase:
    found_s = detection_s(cause, settings)
    state = KeyState.SUSPENDED if cause is NoCause.NO_ANSWER else KeyState.REVOKED
    if found_s is None:
        return WorstCase(cause=cause, state=state)
    lease_s = settings.lease_ttl_s * (1 + CLOCK_DRIFT)
    return WorstCase(
        cause=cause,
        state=state,
        detection_s=_rounded(found_s),
        # Whoever hears nothing within the push's time is cut off, and its lease ends it.
        reachable_s=_rounded(found_s + min(settings.fan_out_s, lease_s)),
        partitioned_s=_rounded(found_s + lease_s),
        keymanager_stalled_s=_rounded(found_s + settings.leader_ttl_s + lease_s),
    )


def worst_cases(settings: BoundSettings) -> list[WorstCase]:
    """One for every cause."""
    return [worst_case(cause, settings) for cause in NoCause]


def _rounded(seconds: float) -> float:
    """Upwards, to milliseconds: it stays a bound."""
    return -(-seconds * 1000 // 1) / 1000
