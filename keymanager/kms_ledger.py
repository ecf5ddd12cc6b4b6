"""Every call that we make to a customer's KMS, recorded in the audit chain: what the customer's own log is joined with.

The record of what a call was for ("kek.unwrap", …) is durable before a key is used, and names the call. But there are
calls without such a record: the watcher's probes, one a second, looks for a new version of the CMK, and all but the
last of several calls that serve one purpose. So all are collected here, as the adapters report them, and recorded in
groups: one record of action `kms.calls` per CMK and interval. What was not recorded yet is lost with the process, and
then stands in the customer's log alone, where `keylake audit reconcile` names it.

Details of such a record (docs/formats/audit-kms-calls.md): `provider`, `key`, `principal`, and `calls`, a JSON list of
`[time of the request, operation, request id or "", verdict or "ok"]`.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from keymanager.kms.base import KmsCall
from keymanager.repository import Repository
from shared.audit_chain import AuditEntry
from shared.audit_export import format_time
from shared.audit_kms_calls import ACTION, MAX_CALLS_PER_RECORD
from shared.clock import Clock
from shared.cmk import CmkKey
from shared.errors import KeylakeError, NotLeaderError
from shared.telemetry import get_logger

_log = get_logger(__name__)
_MAX_WAITING_PER_KEY: Final = 20_000
"""While the database does not answer: then the oldest are forgotten, and their number is recorded."""


@dataclass(slots=True)
class _Waiting:
    key: CmkKey
    calls: deque[tuple[str, str, str, str]] = field(default_factory=deque)
    forgotten: int = 0


class KmsLedger:
    """`note` is given to every adapter; `run` in a task."""

    def __init__(self, clock: Clock, interval_s: float) -> None:
        self._clock = clock
        self._interval_s = interval_s
        self._waiting: dict[str, _Waiting] = {}
        self._many = asyncio.Event()
        self._flushing = asyncio.Lock()

    def note(self, key: CmkKey, call: KmsCall) -> None:
        """Must not block: it is called after every request."""
        waiting = self._waiting.setdefault(f"{key.identifier} {key.principal}", _Waiting(key))
        asked_at = self._clock.now() - timedelta(seconds=call.duration_s)
        verdict = "ok" if call.error is None else call.error.verdict.value
        waiting.calls.append((format_time(asked_at), call.operation, call.request_id or "", verdict))
        if len(waiting.calls) > _MAX_WAITING_PER_KEY:
            waiting.calls.popleft()
            waiting.forgotten += 1
        if len(waiting.calls) >= MAX_CALLS_PER_RECORD:
            self._many.set()

    async def run(self, repository: Repository) -> None:
        while True:
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._many.wait()
            except TimeoutError:
                pass
            self._many.clear()
            try:
                await self.flush(repository)
            except NotLeaderError:
                raise
            except KeylakeError as error:
                _log.error("KMS calls could not be recorded; trying again", reason=str(error))
                await asyncio.sleep(self._interval_s)

    async def flush(self, repository: Repository) -> None:
        """Record what is waiting. Raises UnavailableError, CorruptedError (the chain); then it is still waiting."""
        async with self._flushing:
            for name, waiting in list(self._waiting.items()):
                while waiting.calls or waiting.forgotten:
                    group = [waiting.calls.popleft() for _ in range(min(len(waiting.calls), MAX_CALLS_PER_RECORD))]
                    forgotten, waiting.forgotten = waiting.forgotten, 0
                    try:
                        async with repository.transaction() as transaction:
                            await transaction.audit([_entry(waiting.key, group, forgotten)])
                    except BaseException:
                        waiting.calls.extendleft(reversed(group))
                        waiting.forgotten += forgotten
                        raise
                if not waiting.calls:
                    self._waiting.pop(name, None)


def _entry(key: CmkKey, calls: list[tuple[str, str, str, str]], forgotten: int) -> AuditEntry:
    details = {
        "provider": key.provider,
        "key": key.identifier,
        "principal": key.principal,
        "calls": json.dumps(calls, separators=(",", ":")),
    }
    if forgotten:
        details["forgotten"] = str(forgotten)
    return AuditEntry("keymanager", ACTION, "ok", None, details)
