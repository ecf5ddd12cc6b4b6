"""Calls of a blocking vendor SDK: in threads, under a deadline, each reported. What all adapters have in common.

A vendor's SDK blocks, so every request runs in a small thread pool of the adapter's own, under a deadline that covers
waiting for a thread, too. The SDK's retries are to be off: whether and when to ask again is the watcher's decision, and
a retry would hide an answer from it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from keymanager.kms.base import Classification, KmsCall, KmsCallObserver, KmsError, Verdict
from shared.clock import Clock, SystemClock
from shared.crypto.secret import SecretKey
from shared.errors import InvalidInputError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What a request brought."""

    value: T
    request_id: str | None
    """The provider's; None when nothing was sent, which is then not reported either."""
    key_version: str | None


Judge = Callable[[str, Exception], KmsError | None]
"""(operation, what the SDK raised) → the failure; None for what is none of the SDK's: a bug, to be raised as it is."""


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Of every call to a KMS. Raises InvalidInputError for ones with which none would ever end well."""

    connect_timeout_s: float = 1.0
    read_timeout_s: float = 2.0
    deadline_s: float = 4.0
    """With everything that a call waits for: a thread, a new session, a second attempt."""
    max_concurrency: int = 8

    def __post_init__(self) -> None:
        if self.max_concurrency < 1 or min(self.connect_timeout_s, self.read_timeout_s, self.deadline_s) <= 0:
            raise InvalidInputError("timeouts and concurrency must be positive")


DEFAULT_LIMITS: Final = CallLimits()


class KmsCalls:
    """Belongs to one event loop. `observer` hears of every request."""

    def __init__(
        self,
        name: str,
        judge: Judge,
        limits: CallLimits,
        *,
        observer: KmsCallObserver | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.clock = clock or SystemClock()
        self._judge = judge
        self._deadline_s = limits.deadline_s
        self._observer = observer
        self._executor = ThreadPoolExecutor(max_workers=limits.max_concurrency, thread_name_prefix=name)

    async def in_time(self, operation: str, work: Callable[[], Awaitable[T]]) -> T:
        """One operation with everything that it waits for: threads, a new session, a second attempt.

        Raises what `work` raises; KmsError, UNREACHABLE, when the deadline passes. A request that is abandoned then
        ends by itself, at the SDK's own timeouts.
        """
        started_s = self.clock.monotonic_s()
        try:
            async with asyncio.timeout(self._deadline_s):
                return await work()
        except TimeoutError:
            late = KmsError(Classification(Verdict.UNREACHABLE), operation=operation, provider_code="DeadlineExceeded")
            self._observe(operation, started_s, None, None, late)
            raise late from None

    async def attempt(self, operation: str, request: Callable[[], Answer[T]]) -> T:
        """One request in the thread pool. Raises KmsError as judged."""
        started_s = self.clock.monotonic_s()
        sent = self._executor.submit(request)
        try:
            answer = await asyncio.wrap_future(sent)
        except asyncio.CancelledError:
            # It may be on its way, and then stands in the customer's log: we report it, too, when it has ended.
            loop = asyncio.get_running_loop()

            def ended(done: Future[Answer[T]]) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                    loop.call_soon_threadsafe(self._abandoned_ended, operation, started_s, done)

            sent.add_done_callback(ended)
            raise
        except Exception as error:
            failure = self._judge(operation, error)
            if failure is None:
                raise
            self._observe(operation, started_s, failure.request_id, None, failure)
        else:
            if answer.request_id is not None:
                self._observe(operation, started_s, answer.request_id, answer.key_version, None)
            return answer.value
        raise failure

    def _abandoned_ended(self, operation: str, started_s: float, sent: Future[Answer[T]]) -> None:
        """Nobody waits for this answer any more."""
        if sent.cancelled():
            return  # it was never sent
        error = sent.exception()
        if error is None:
            answer = sent.result()
            if isinstance(answer.value, SecretKey):
                answer.value.wipe()
            if answer.request_id is not None:
                self._observe(operation, started_s, answer.request_id, answer.key_version, None)
        elif isinstance(error, Exception) and (failure := self._judge(operation, error)) is not None:
            self._observe(operation, started_s, failure.request_id, None, failure)

    async def aclose(self) -> None:
        """Requests under way end first, or at the SDK's timeouts."""
        await asyncio.to_thread(self._executor.shutdown)

    def _observe(
        self, operation: str, started_s: float, request_id: str | None, version: str | None, error: KmsError | None
    ) -> None:
        if self._observer is not None:
            self._observer(KmsCall(operation, request_id, self.clock.monotonic_s() - started_s, version, error))


def require_read_back(operation: str, opened: SecretKey, wrapped: SecretKey) -> None:
    """What a wrap gave must open to what was wrapped before it may be stored. Wipes `opened`. Raises KmsError."""
    try:
        if not opened.matches(wrapped):
            raise KmsError(Classification(Verdict.CORRUPT), operation=operation, provider_code="ReadBackDiffers")
    finally:
        opened.wipe()
