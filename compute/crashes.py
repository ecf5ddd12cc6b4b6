"""When a compute that keeps crashing may be started again. A core.

A crash is what nobody asked for and nothing outside explains: Postgres or its agent ended, did not come up in time, or
answers no more. Four in a row cost nothing; from the fifth on the next start waits, 1 s and twice as long each time,
up to a minute. A compute that ran for SETTLED_S ends the row. Who connects in between waits, if it is not for long
(PATIENCE_S), and else is refused at once, with the reason: longer waits would tell less, and pile up.

The row is kept with the endpoint: a manager that restarts, perhaps because of the same trouble, goes on counting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FREE: Final = 4
PATIENCE_S: Final = 5.0
MAX_DELAY_S: Final = 60.0
SETTLED_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Crashes:
    """Of one endpoint, in a row. All times are Unix time."""

    count: int = 0
    next_start_s: float = 0.0
    """Not before."""
    reason: str = ""
    """Of the last one."""

    def and_another(self, now_s: float, ran_s: float, reason: str) -> Crashes:
        """`ran_s`: for how long it was RUNNING."""
        count = 1 if ran_s >= SETTLED_S else self.count + 1
        return Crashes(count, now_s + delay_s(count), reason)

    def wait_s(self, now_s: float) -> float:
        """Until the next start; never longer than the longest, wherever the clock was set to."""
        return min(MAX_DELAY_S, max(0.0, self.next_start_s - now_s))


def delay_s(count: int) -> float:
    """After the `count`th crash in a row."""
    return 0.0 if count <= FREE else float(min(MAX_DELAY_S, 2.0 ** (count - FREE - 1)))
