"""Which faults are played together. A core.

The full product of part, condition and event, one fault at a time, is `full`. `COVERING` is what is played otherwise:
in each round every part is in another condition, all at once, and up to three workspaces lose their keys side by side.
It covers every pair of part and condition, of part and event, and of condition and event:
`tests/unit/test_fault_schedule.py` checks that. `make test` plays two of its six rounds, and `TAKEOVER`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shared.api.keymanager import KeyState, NoCause


class Part(enum.StrEnum):
    KEYMANAGER = "keymanager"  # the one that leads
    SAFEKEEPER = "safekeeper"  # one of three
    PAGESERVER = "pageserver"
    COMPUTE = "compute"  # of the workspaces that lose their keys: their agents, and cut off with them their manager
    PROXY = "proxy"  # one of two


class Condition(enum.StrEnum):
    REACHABLE = "reachable"
    PARTITIONED = "partitioned"  # from the keymanagers; the keymanager itself: from everybody
    PAUSED = "paused"  # SIGSTOP before the no, SIGCONT when its lease is over
    RESTARTED = "restarted"  # SIGKILL right after the no, and started again
    KILLED = "killed"  # SIGKILL in the middle of the fan-out, and started again
    RESTORED = "restored"  # a second instance is started from a copy of its disk, under its name


class Event(enum.StrEnum):
    DISABLE = "disable"
    DELETION = "deletion"
    POLICY = "policy"
    ROLE = "role"
    TIMEOUT = "timeout"
    SERVER_ERROR = "5xx"
    THROTTLE = "throttle"
    FLAP = "flap"  # disabled, and half of the answers are lost

    @property
    def cause(self) -> NoCause:
        match self:
            case Event.TIMEOUT | Event.SERVER_ERROR | Event.THROTTLE:
                return NoCause.NO_ANSWER
            case Event.FLAP:
                return NoCause.FLAPPING
            case _:
                return NoCause.DENIED

    @property
    def ends_in(self) -> frozenset[KeyState]:
        match self.cause:
            case NoCause.NO_ANSWER:
                return frozenset({KeyState.SUSPENDED})
            case NoCause.FLAPPING:
                return frozenset({KeyState.SUSPENDED, KeyState.REVOKED})
            case _:
                return frozenset({KeyState.REVOKED})


NOT_APPLICABLE: Final = frozenset({(Part.KEYMANAGER, Condition.RESTORED), (Part.COMPUTE, Condition.RESTORED)})
"""No second instance is started from a copy of their disks. A keymanager's is the metadata database: what one does that
finds an older copy there is tried in tests/integration/test_keymanager_revocation.py. A compute's, of a lazy volume,
has no name, is sealed under keys that end with it, and is taken up by no other: that an older copy opens in none is
tried in tests/integration/test_compute_fuse.py."""

WORKSPACES: Final = 3
"""That lose their keys in a round."""


@dataclass(frozen=True, slots=True)
class Round:
    conditions: Mapping[Part, Condition]
    events: Sequence[Event]

    @property
    def kills(self) -> bool:
        """Somebody, in the middle of the fan-out."""
        return Condition.KILLED in self.conditions.values()

    def __str__(self) -> str:
        parts = " ".join(f"{p}={c}" for p, c in self.conditions.items() if c is not Condition.REACHABLE)
        return f"{parts or 'all reachable'}: {', '.join(self.events)}"


def _diagonal(number: int) -> dict[Part, Condition]:
    """Part i is in condition i + number; what does not apply is reachable."""
    conditions = list(Condition)
    found = {}
    for index, part in enumerate(Part):
        condition = conditions[(number + index) % len(conditions)]
        found[part] = Condition.REACHABLE if (part, condition) in NOT_APPLICABLE else condition
    return found


COVERING: Final = [
    Round(_diagonal(0), (Event.DISABLE, Event.ROLE, Event.FLAP)),
    Round(_diagonal(1), (Event.DISABLE, Event.TIMEOUT, Event.THROTTLE)),
    Round(_diagonal(2), (Event.DELETION, Event.TIMEOUT)),
    Round(_diagonal(3), (Event.DELETION, Event.ROLE, Event.SERVER_ERROR)),
    Round(_diagonal(4), (Event.POLICY, Event.SERVER_ERROR, Event.FLAP)),
    Round(_diagonal(5), (Event.POLICY, Event.THROTTLE)),
]

TAKEOVER: Final = Round(
    dict.fromkeys(Part, Condition.REACHABLE) | {Part.KEYMANAGER: Condition.KILLED}, (Event.DISABLE,)
)
"""The shortest round with a keymanager in trouble: another one goes on with the fan-out."""


def full() -> Iterator[Round]:
    """Everything, one fault at a time; the events of one fault side by side."""
    events = list(Event)
    for part in Part:
        for condition in Condition:
            if (part, condition) in NOT_APPLICABLE:
                continue
            conditions = dict.fromkeys(Part, Condition.REACHABLE) | {part: condition}
            for start in range(0, len(events), WORKSPACES):
                yield Round(conditions, events[start : start + WORKSPACES])
