"""Bounded retries with exponential backoff and full jitter, over an injected sleep and rng.

Retrying is safe only for calls that are idempotent or that can tell whether an earlier attempt took effect; that is
the caller's knowledge, so nothing is retried unless `retryable` says so.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

_RNG = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how patiently.

    The wait before attempt n (n ≥ 2) is uniform in [0, min(max_delay_s, first_delay_s * 2 ** (n - 2))]: "full
    jitter", so that clients which failed together do not come back together.
    """

    attempts: int = 4
    first_delay_s: float = 0.1
    max_delay_s: float = 2.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first_delay_s < 0 or self.max_delay_s < 0:
            raise ValueError("a retry policy needs at least one attempt and no negative delays")

    def delay_s(self, failed_attempts: int, rng: random.Random) -> float:
        """The wait after `failed_attempts` (≥ 1) attempts have failed."""
        # The exponent is capped: 2.0 ** 1024 overflows, and 2 ** 30 * anything is past every sensible maximum.
        ceiling_s = self.first_delay_s * 2.0 ** min(failed_attempts - 1, 30)
        return rng.uniform(0.0, min(self.max_delay_s, ceiling_s))


NO_RETRY = RetryPolicy(attempts=1)


async def retry(
    policy: RetryPolicy,
    attempt: Callable[[int], Awaitable[T]],
    *,
    retryable: Callable[[Exception], bool],
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    rng: random.Random = _RNG,
) -> T:
    """Await `attempt(0)`, `attempt(1)`, … until one returns; raise the last error when attempts run out.

    Raises: whatever `attempt` raised, at once if `retryable` refuses it.
    """
    for number in range(policy.attempts - 1):
        try:
            return await attempt(number)
        except Exception as error:
            if not retryable(error):
                raise
        await sleep(policy.delay_s(number + 1, rng))
    return await attempt(policy.attempts - 1)
