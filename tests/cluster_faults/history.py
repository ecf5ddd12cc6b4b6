"""What clients were told and when, beside what the customer's KMS said: nothing may be acknowledged after the bound.

Times are one process's monotonic clock. An answer counts when it *arrived*: the bound is on when it may leave, so an
answer that travelled late would be counted against us, never for us. This file is a core.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class No:
    """The KMS says yes to nothing in [since_s, until_s)."""

    since_s: float
    bound_s: float
    until_s: float = math.inf


@dataclass(slots=True)
class History:
    """Of one workspace."""

    nos: list[No] = field(default_factory=list)
    answers: list[tuple[float, str]] = field(default_factory=list)
    """(when it arrived, what and by which way): successful reads and acknowledged commits."""

    def said_no(self, since_s: float, bound_s: float) -> None:
        """Call it when the customer's change has returned."""
        assert not self.is_no
        self.nos.append(No(since_s, bound_s))

    @property
    def is_no(self) -> bool:
        """It says no now."""
        return bool(self.nos) and self.nos[-1].until_s == math.inf

    def will_say_yes(self, until_s: float) -> None:
        """Call it before the customer allows again."""
        last = self.nos.pop()
        self.nos.append(No(last.since_s, last.bound_s, until_s))

    def answered(self, at_s: float, what: str) -> None:
        self.answers.append((at_s, what))

    def violations(self, commits: Iterable[float] = ()) -> list[str]:
        """In words; empty when all is well. `commits`: when acknowledgements of commits arrived."""
        found = []
        for at_s, what in [*self.answers, *((at_s, "commit") for at_s in commits)]:
            for no in self.nos:
                if no.since_s + no.bound_s < at_s < no.until_s:
                    late_s = at_s - no.since_s
                    found.append(f"{what} {late_s:.3f} s after the no; the bound is {no.bound_s:.3f} s")
        return found

    def last_answer_after_s(self, commits: Iterable[float] = ()) -> float:
        """How long after the last no the last answer arrived; 0 when none did."""
        no = self.nos[-1]
        times = [at_s for at_s, _ in self.answers] + list(commits)
        return max((at_s - no.since_s for at_s in times if no.since_s < at_s < no.until_s), default=0.0)

    def ways_since(self, since_s: float) -> Counter[str]:
        """How many answers came by which way."""
        return Counter(what for at_s, what in self.answers if at_s >= since_s)
