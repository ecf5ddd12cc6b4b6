"""Asks every customer's KMS, again and again, whether we may still use the key: a real unwrap of a canary.

One probe at a time per key configuration. Whoever has a reason to ask sooner shares one that is sent after they said
so: a failed unwrap on the data path, an event of the customer's cloud (`hint`), a person (`:revalidate`). What the
answers mean is `watch.py`.
"""

from __future__ import annotations

import asyncio
import hmac
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from keymanager.audit_log import AuditLog
from keymanager.cmk import PROBE_OUTCOMES, Cmks, call_details, calls_made, canary_context, canary_digest
from keymanager.kms.base import KmsError
from keymanager.records import StoredKeyConfiguration
from keymanager.repository import Repository
from keymanager.state import KeyEvent, KmsAccess
from keymanager.watch import Hold, HoldDown, Judgement, ProbeOutcome, Watch, jittered_s
from shared.audit_chain import AuditEntry
from shared.clock import Clock
from shared.errors import NotLeaderError, UnavailableError
from shared.ids import KeyConfigurationId
from shared.telemetry import get_logger

_log = get_logger(__name__)
_NOTE_EVERY_S: Final = 5.0
"""The time of the last probe is stored this often while nothing changes."""
HINT_SPACING_S: Final = 1.0
"""However many hints come, they have a KMS asked so seldom: who can send them cannot use up its quota."""

OnKmsEvent = Callable[[KeyConfigurationId, KeyEvent, KmsAccess, Mapping[str, str]], Awaitable[None]]


@dataclass(slots=True)
class _Watched:
    configuration: StoredKeyConfiguration
    watch: Watch
    last_outcome: ProbeOutcome | None = None
    last_verdict: str = ""
    last_probe_at: datetime | None = None
    noted_s: float = float("-inf")
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    checking: asyncio.Task[Judgement] | None = None
    periodic: asyncio.Task[None] | None = None
    hinted_s: float = float("-inf")
    hint: asyncio.TimerHandle | None = None
    """The wake that a hint waits for."""


class Watcher:
    """Runs in the keymanager's task group."""

    def __init__(
        self,
        repository: Repository,
        audit_log: AuditLog,
        cmks: Cmks,
        clock: Clock,
        tasks: asyncio.TaskGroup,
        on_event: OnKmsEvent,
        rng: random.Random,
        hold_down: HoldDown,
    ) -> None:
        self._repository = repository
        self._audit_log = audit_log
        self._cmks = cmks
        self._clock = clock
        self._tasks = tasks
        self._on_event = on_event
        self._rng = rng
        self._hold_down = hold_down
        self._watched: dict[KeyConfigurationId, _Watched] = {}

    def add(self, stored: StoredKeyConfiguration) -> None:
        """Watch a key configuration from now on. `start` begins the probing."""
        since_s = max(0.0, (self._clock.now() - stored.last_allowed_at).total_seconds())
        watch = Watch(
            stored.kms_access,
            stored.outage_grace_s,
            stored.probe_interval_s,
            self._clock.monotonic_s() - since_s,
            self._hold_down,
        )
        self._watched[stored.key_configuration_id] = _Watched(
            stored, watch, last_verdict=stored.last_verdict, last_probe_at=stored.last_probe_at
        )

    def start(self, key_configuration_id: KeyConfigurationId) -> None:
        watched = self._watched[key_configuration_id]
        watched.periodic = self._tasks.create_task(self._watch(watched))

    def remove(self, key_configuration_id: KeyConfigurationId) -> None:
        watched = self._watched.pop(key_configuration_id, None)
        if watched is None:
            return
        for task in (watched.periodic, watched.checking):
            if task is not None:
                task.cancel()
        if watched.hint is not None:
            watched.hint.cancel()
        watched.heard.set()

    def replace(self, stored: StoredKeyConfiguration) -> None:
        """The same key configuration with another canary, another key, or other settings: for the next probe, which
        comes at once when it would come at another time now."""
        watched = self._watched.get(stored.key_configuration_id)
        if watched is None:
            return
        before, watched.configuration = watched.configuration, stored
        settings = (stored.outage_grace_s, stored.probe_interval_s)
        if settings != (before.outage_grace_s, before.probe_interval_s):
            watched.watch.configure(*settings)
            watched.wake.set()

    def access(self, key_configuration_id: KeyConfigurationId) -> KmsAccess:
        return self._watched[key_configuration_id].watch.access

    def last(self, key_configuration_id: KeyConfigurationId) -> tuple[str, datetime | None]:
        """The last verdict and when it was asked for."""
        watched = self._watched[key_configuration_id]
        return watched.last_verdict, watched.last_probe_at

    def hold(self, key_configuration_id: KeyConfigurationId) -> Hold | None:
        """Why the KMS's first yes is not enough. None: it is, or it is there."""
        return self._watched[key_configuration_id].watch.hold(self._clock.monotonic_s())

    async def heard(self, key_configuration_id: KeyConfigurationId) -> None:
        """Returns when the KMS has said yes to this process, or when its denial or silence is in force. Not before:
        an outage grace that a database counts is nobody's yes."""
        await self._watched[key_configuration_id].heard.wait()

    def suspect(self, key_configuration_id: KeyConfigurationId) -> None:
        """Something went wrong with this key: look now."""
        watched = self._watched.get(key_configuration_id)
        if watched is not None:
            watched.wake.set()

    def hint(self, key_configuration_id: KeyConfigurationId) -> bool:
        """Somebody, who may be wrong, says that something happened to this key. Look at once, or HINT_SPACING_S after
        the last time that it was for a hint; with a probe that is sent after this call. False: one that waits to be
        sent does for this hint, too.

        No more than that: unlike a person's word it lifts no hold.
        """
        watched = self._watched.get(key_configuration_id)
        if watched is None or watched.hint is not None:
            return False

        def wake() -> None:
            watched.hint, watched.hinted_s = None, self._clock.monotonic_s()
            watched.wake.set()

        wait_s = max(0.0, watched.hinted_s + HINT_SPACING_S - self._clock.monotonic_s())
        watched.hint = asyncio.get_running_loop().call_later(wait_s, wake)
        return True

    async def check(self, key_configuration_id: KeyConfigurationId) -> Judgement:
        """Probe now, and again at once as far as a verdict needs confirmation. Returns when its consequences (state
        stored, Revokes pushed) have begun."""
        watched = self._watched[key_configuration_id]
        if watched.checking is None:
            watched.checking = self._tasks.create_task(self._check(watched))
            watched.checking.add_done_callback(lambda _: setattr(watched, "checking", None))
        return await asyncio.shield(watched.checking)

    async def ask_now(self, key_configuration_id: KeyConfigurationId) -> Judgement:
        """As `check`, for a person, with a probe that is sent after this call: one that is under way may have been
        answered before whatever they want to see. All who ask meanwhile share it. No hold-down is waited for."""
        watched = self._watched[key_configuration_id]
        await self._no_probe_under_way(watched)
        watched.watch.lift_hold()
        return await self.check(key_configuration_id)

    async def _no_probe_under_way(self, watched: _Watched) -> None:
        if watched.checking is not None:
            await asyncio.wait({watched.checking})

    async def _watch(self, watched: _Watched) -> None:
        key_configuration_id = watched.configuration.key_configuration_id
        while True:
            if watched.wake.is_set():
                # Whoever set it may know of something that is newer than the probe that is under way.
                await self._no_probe_under_way(watched)
                watched.wake.clear()
            judgement = await self.check(key_configuration_id)
            pause_s = jittered_s(judgement.probe_again_after_s, self._rng.random())
            try:
                async with asyncio.timeout(pause_s):
                    await watched.wake.wait()
            except TimeoutError:
                pass

    async def _check(self, watched: _Watched) -> Judgement:
        noting: asyncio.Task[None] | None = None
        while True:
            asked_at_s = self._clock.monotonic_s()
            watched.last_probe_at = self._clock.now()
            outcome, details = await self._probe(watched.configuration)
            judgement = watched.watch.judge(outcome, asked_at_s, self._clock.monotonic_s())
            key_configuration_id = watched.configuration.key_configuration_id
            if judgement.event is not None:
                await self._on_event(key_configuration_id, judgement.event, watched.watch.access, details)
            if outcome is ProbeOutcome.ALLOWED or watched.watch.access is not KmsAccess.ALLOWED:
                watched.heard.set()
            if noting is not None:
                await noting
            if not judgement.confirming:
                await self._note(watched, outcome, details)
                return judgement
            # Beside the confirming probe, not before it: a slow database must not put off the discovery of a denial.
            noting = self._tasks.create_task(self._note(watched, outcome, details))
            await asyncio.sleep(judgement.probe_again_after_s)

    async def _probe(self, configuration: StoredKeyConfiguration) -> tuple[ProbeOutcome, Mapping[str, str]]:
        context = canary_context(configuration.account_id, configuration.key_configuration_id)
        with calls_made() as calls:
            try:
                canary = await self._cmks.of(configuration.key_configuration_id).unwrap(
                    configuration.canary_wrapped, context
                )
            except KmsError as error:
                return PROBE_OUTCOMES[error.verdict], call_details(calls)
        right = hmac.compare_digest(canary_digest(canary), configuration.canary_digest)
        canary.wipe()
        return ProbeOutcome.ALLOWED if right else ProbeOutcome.AMBIGUOUS, call_details(calls)

    async def _note(self, watched: _Watched, outcome: ProbeOutcome, details: Mapping[str, str]) -> None:
        """Record what changed; a row of equal answers is recorded once."""
        code = details.get("kms_code", "")
        watched.last_verdict = f"{outcome.value} ({code})" if code else outcome.value
        changed, watched.last_outcome = outcome is not watched.last_outcome, outcome
        now_s = self._clock.monotonic_s()
        if not changed and now_s - watched.noted_s < _NOTE_EVERY_S:
            return
        watched.noted_s = now_s
        key_configuration_id = watched.configuration.key_configuration_id
        allowed_at = self._clock.now() - timedelta(seconds=now_s - watched.watch.last_allowed_s)
        try:
            await self._repository.note_probe(
                key_configuration_id, watched.last_verdict, watched.last_probe_at or self._clock.now(), allowed_at
            )
            if changed:
                audited = {"key_configuration_id": str(key_configuration_id), **details}
                await self._audit_log.record(
                    AuditEntry("keymanager/watcher", "cmk.probe", outcome.value, None, audited)
                )
        except NotLeaderError:
            raise
        except UnavailableError as error:
            _log.error("a probe's outcome could not be stored", reason=str(error))
        if changed:
            _log.info("KMS probe", key_configuration_id=str(key_configuration_id), outcome=watched.last_verdict)
