"""Taking keys away, and giving them back: one owner of every change of a project's state.

Revocation, in order, each step in the audit chain with its time since detection:

    1  stop issuing            in memory, before anything is awaited: no lease is renewed, no DEK is generated or
                               unwrapped
    2  drop the KEKs           wiped in the same step, with every key that somebody works with at that moment
    3  push Revoke             to every holder's session, in the same step: a slow database does not put it off
    4  store                   state, revocation, and who held leases, in one transaction (repeated until it succeeds)
    5  collect                 an acknowledgement, or the end of the lease ("fenced"), whichever is first, per holder;
                               stored in groups, of all projects: what has come in while one group was written is the
                               next one
    6  sealed                  when nobody is pending: in the transaction that stores the last outcomes

The next leader, or the same keymanager after a restart, pushes again, to each pending holder that connects, and goes on
at 5: what is stored says whom to wait for, and until when is not known, so each of them gets a whole ttl from then.
Before step 4 nothing is stored, and nothing needs to be: the KMS is asked again before anything is issued, and the
leases run out. What was pushed already can be taken back, then: SUSPENDED and REVOKED are not final.

SHREDDED is. So a shredding is pushed after step 4, not before; until then whoever renews, or connects, is told REVOKED.

A project becomes ACTIVE again only after its last revocation is sealed. So no instance ever renews through a revocation
that it has not seen.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Protocol

from keymanager.cmk import ACCESS_WORDS
from keymanager.keyring import Keyring
from keymanager.lease_table import CLOCK_DRIFT, Held, Holder, LeaseTable
from keymanager.projects import ProjectEntry, Projects
from keymanager.records import StoredRevocation
from keymanager.repository import Repository
from keymanager.state import KeyAccess, KeyEvent, KmsAccess
from keymanager.transaction import Transaction
from shared.api.keymanager import KeyState, Restored, Revoke
from shared.audit_chain import AuditEntry
from shared.clock import Clock
from shared.errors import NotLeaderError, UnavailableError
from shared.ids import InstanceId, KeyConfigurationId, ProjectId
from shared.telemetry import get_logger

_log = get_logger(__name__)
_STORE_RETRY_S: Final = 0.2
_ALLOWED_AGAIN: Final = "the customer's KMS allows the use of the key"
_MAX_GROUP: Final = 1000
"""Outcomes in one transaction, which holds the audit chain meanwhile."""


class Pusher(Protocol):
    """The sessions, as seen from here. Must not block and must not raise."""

    def push_to(self, instance_ids: Iterable[InstanceId], message: Revoke) -> None:
        """To those of them that have a session now."""
        ...

    def announce(self, message: Restored) -> None:
        """To every session that may know of the project."""
        ...


@dataclass(slots=True)
class _Pending:
    """A holder whose outcome is not stored yet."""

    holder: Holder
    fence_at_s: float
    outcome: str = ""
    """Empty: not known yet."""
    after_s: float = 0.0
    steps_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class OpenRevocation:
    """A revocation that is not sealed yet."""

    revocation_id: str
    entry: ProjectEntry
    state: KeyState
    reason: str
    detected_at: datetime
    started_s: float
    keks_dropped_after_s: float
    keks_dropped: int
    pending: dict[InstanceId, _Pending]
    settled: list[InstanceId] = field(default_factory=list)
    """Of these, in this order: an outcome is there, and not stored yet."""

    def message(self) -> Revoke:
        unstored = self.entry.ending and self.state.final
        return Revoke(
            revocation_id=self.revocation_id,
            project_id=self.entry.project_id,
            state=self.entry.state if unstored else self.state,
            reason=self.entry.reason if unstored else self.reason,
        )


def _seconds(value: float) -> str:
    return f"{value:.6f}"


def _outcome_entry(revocation: OpenRevocation, instance_id: InstanceId, pending: _Pending) -> AuditEntry:
    details = {
        "revocation_id": revocation.revocation_id,
        "instance_id": str(instance_id),
        "after_s": _seconds(pending.after_s),
        **{f"step:{name}": _seconds(value) for name, value in sorted(pending.steps_s.items())},
    }
    actor = f"node/{pending.holder.node_id}" if pending.outcome == "acknowledged" else "keymanager"
    return AuditEntry(actor, "revocation.instance", pending.outcome, revocation.entry.project_id, details)


class Revoker:
    """Runs in the keymanager's task group, which owns its collectors."""

    def __init__(
        self,
        repository: Repository,
        projects: Projects,
        keyring: Keyring,
        leases: LeaseTable,
        sessions: Pusher,
        clock: Clock,
        tasks: asyncio.TaskGroup,
        recorded: Callable[[], None] = lambda: None,
    ) -> None:
        """`recorded` is called when a step of a revocation stands in the audit chain. Must not block."""
        self._recorded = recorded
        self._repository = repository
        self._projects = projects
        self._keyring = keyring
        self._leases = leases
        self._sessions = sessions
        self._clock = clock
        self._tasks = tasks
        self._storing = asyncio.Lock()  # keeps the stored order of states the order in which they happened
        self._open: dict[str, OpenRevocation] = {}
        self._collecting: list[OpenRevocation] = []
        """Those that are stored, and not sealed."""
        self._collector: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        """An outcome has come in, or a revocation."""
        self._returning: dict[ProjectId, asyncio.Task[None]] = {}

    # --- events ---

    async def kms_event(
        self, key_configuration_id: KeyConfigurationId, event: KeyEvent, access: KmsAccess, details: Mapping[str, str]
    ) -> None:
        """The watcher's judgement of a key configuration has changed."""
        reason = ACCESS_WORDS[access]
        if details.get("kms_code"):
            reason += f" ({details['kms_code']})"
        entries = self._projects.of_key_configuration(key_configuration_id)
        audited = AuditEntry(
            "keymanager/watcher",
            "key_configuration.access_changed",
            access.value,
            None,
            {"key_configuration_id": str(key_configuration_id), "event": event.value, **details},
        )

        async def store_access(transaction: Transaction) -> list[AuditEntry]:
            await transaction.set_kms_access(key_configuration_id, access)
            return [audited]

        await self._apply(entries, event, reason, "keymanager/watcher", store_access)

    async def operator_event(self, entry: ProjectEntry, event: KeyEvent, reason: str, actor: str) -> None:
        """`:revoke` or `:restore`. Raises ConflictError when it makes no sense in this state."""
        after = entry.access.step(event)  # refuse before anything is changed

        async def audit_call(transaction: Transaction) -> list[AuditEntry]:
            # Whoever holds it does so from now on, also where that changes no state as long as the KMS says no. What
            # does change the state is stored behind this.
            await transaction.set_project(entry.project_id, entry.state, entry.reason, after)
            return [AuditEntry(actor, f"project.{event.value}", "ok", entry.project_id, {"reason": reason})]

        await self._apply([entry], event, reason, actor, audit_call)

    async def shred(
        self, entry: ProjectEntry, reason: str, actor: str, also: Callable[[Transaction], Awaitable[list[AuditEntry]]]
    ) -> None:
        """The end of a project's keys, and the fan-out that ends its leases. `also` destroys what is stored of them, in
        the same transaction; it is called again if that has to be repeated."""
        await self._apply([entry], KeyEvent.SHREDDED, reason, actor, also)

    async def erase(self, entry: ProjectEntry, also: Callable[[Transaction], Awaitable[list[AuditEntry]]]) -> None:
        """The stronger word for a project that is shredded. Nobody holds a lease on it, so nobody is told.

        Raises ConflictError when it is not shredded, UnavailableError; then nothing has changed.
        """
        after = entry.access.step(KeyEvent.ERASED)
        reason = "every precondition of cryptographic erasure was checked"
        async with self._storing:
            async with self._repository.transaction() as transaction:
                audited = await also(transaction)
                await transaction.set_project(entry.project_id, after.state, reason, after)
                await transaction.audit(audited)
            entry.access = after
            entry.end(reason)
        self._recorded()

    async def project_event(self, entry: ProjectEntry, event: KeyEvent) -> None:
        """A project that was made while its key configuration changed catches up."""

        async def nothing_else(transaction: Transaction) -> list[AuditEntry]:
            return []

        kms = entry.access.step(event).kms
        await self._apply([entry], event, "" if kms is None else ACCESS_WORDS[kms], "keymanager", nothing_else)

    async def _apply(
        self,
        entries: Iterable[ProjectEntry],
        event: KeyEvent,
        reason: str,
        actor: str,
        also: Callable[[Transaction], Awaitable[list[AuditEntry]]],
    ) -> None:
        detected_at, started_s = self._clock.now(), self._clock.monotonic_s()
        revocations: list[OpenRevocation] = []
        # As of this event. Until it is stored the next one may have been stepped through in memory, whose own
        # transaction has more to do: a shredding's destroys the wraps.
        accesses: list[KeyAccess] = []
        returning: list[ProjectEntry] = []
        for entry in entries:  # Invariant: no await in this loop, so all projects stop together
            entry.access = entry.access.step(event)
            if entry.access.state is KeyState.ACTIVE:
                if entry.state is not KeyState.ACTIVE:
                    returning.append(entry)
            elif entry.access.state is not entry.state and not entry.ending:
                revocations.append(self._stop(entry, reason, detected_at, started_s))
                accesses.append(entry.access)
        for revocation in revocations:
            if not revocation.state.final:
                self._push(revocation)

        async def store(transaction: Transaction) -> None:
            audited = await also(transaction)
            for revocation, access in zip(revocations, accesses, strict=True):
                audited += await self._store_revocation(transaction, revocation, access, actor)
            await transaction.audit(audited)

        await self._store(store)
        if revocations:
            self._recorded()
        for revocation in revocations:
            if revocation.state.final:
                revocation.entry.end(reason)
                self._push(revocation)
            self._collect_too(revocation)
        for entry in returning:
            self._return(entry, actor, reason, detected_at, started_s)

    def _stop(self, entry: ProjectEntry, reason: str, detected_at: datetime, started_s: float) -> OpenRevocation:
        """Steps 1 and 2."""
        entry.stop(reason)
        dropped = self._keyring.drop(entry.project_id)
        now_s = self._clock.monotonic_s()
        pending = {
            held.holder.instance_id: _Pending(held.holder, held.expires_at_s)
            for held in self._leases.outstanding(entry.project_id, now_s)
        }
        revocation = OpenRevocation(
            f"rev-{secrets.token_hex(8)}",
            entry,
            entry.access.state,
            reason,
            detected_at,
            started_s,
            now_s - started_s,
            dropped,
            pending,
        )
        entry.unsealed.add(revocation.revocation_id)
        self._open[revocation.revocation_id] = revocation
        return revocation

    async def _store_revocation(
        self, transaction: Transaction, revocation: OpenRevocation, access: KeyAccess, actor: str
    ) -> list[AuditEntry]:
        """Step 4, for one project."""
        entry = revocation.entry
        await transaction.set_project(entry.project_id, revocation.state, revocation.reason, access)
        await transaction.insert_revocation(
            revocation.revocation_id,
            entry.project_id,
            revocation.state,
            revocation.reason,
            revocation.detected_at,
            revocation.keks_dropped_after_s,
            [Held(entry.project_id, pending.holder, pending.fence_at_s) for pending in revocation.pending.values()],
        )
        details = {
            "revocation_id": revocation.revocation_id,
            "reason": revocation.reason,
            "detected_at": revocation.detected_at.isoformat(),
            "keks_dropped": str(revocation.keks_dropped),
            "keks_dropped_after_s": _seconds(revocation.keks_dropped_after_s),
            "holders": ",".join(sorted(pending.holder.node_id for pending in revocation.pending.values())),
        }
        return [AuditEntry(actor, "project.revoking", revocation.state.value, entry.project_id, details)]

    async def _store(self, work: Callable[[Transaction], Awaitable[None]]) -> None:
        """One transaction, repeated until the database takes it: what has happened must get into the chain.

        Raises NotLeaderError when our term is over.
        """
        async with self._storing:
            while True:
                try:
                    async with self._repository.transaction() as transaction:
                        await work(transaction)
                    return
                except NotLeaderError:
                    raise  # the next leader finds out for itself: it asks the KMS before it issues anything
                except UnavailableError as error:
                    _log.error("a state change could not be stored; trying again", reason=str(error))
                await asyncio.sleep(_STORE_RETRY_S)

    # --- steps 3, 5 and 6 ---

    def _push(self, revocation: OpenRevocation) -> None:
        self._sessions.push_to(revocation.pending, revocation.message())

    def _collect_too(self, revocation: OpenRevocation) -> None:
        """Its rows are there: what comes of its holders can be stored."""
        self._collecting.append(revocation)
        if self._collector is None:
            self._collector = self._tasks.create_task(self._collect())
        self._changed.set()

    async def _collect(self) -> None:
        """One for all revocations, which share transactions: a key configuration takes all its projects along."""
        while self._collecting:
            self._changed.clear()
            if any(each.settled or not each.pending for each in self._collecting):
                await self._store_outcomes()
                continue
            now_s, fence_at_s = self._clock.monotonic_s(), float("inf")
            for revocation in self._collecting:
                for instance_id, pending in revocation.pending.items():
                    if pending.fence_at_s <= now_s:
                        self._settle(revocation, instance_id, "fenced", {})
                    else:
                        fence_at_s = min(fence_at_s, pending.fence_at_s)
            if self._changed.is_set():
                continue
            try:
                async with asyncio.timeout(fence_at_s - now_s):
                    await self._changed.wait()
            except TimeoutError:
                pass
        self._collector = None

    def acknowledge(
        self, instance_id: InstanceId, project_id: ProjectId, revocation_id: str, steps_s: Mapping[str, float]
    ) -> bool:
        """An instance says that it holds nothing any more. False when nobody waits for that.

        Without an await: the session that brings the word may be gone before it is stored, and the collector stores it.
        """
        revocation = self._open.get(revocation_id)
        if revocation is None or revocation.entry.project_id != project_id:
            return False
        pending = revocation.pending.get(instance_id)
        if pending is None or pending.outcome:
            return False
        self._settle(revocation, instance_id, "acknowledged", steps_s)
        return True

    def _settle(
        self, revocation: OpenRevocation, instance_id: InstanceId, outcome: str, steps_s: Mapping[str, float]
    ) -> None:
        pending = revocation.pending[instance_id]
        pending.outcome, pending.steps_s = outcome, steps_s
        pending.after_s = self._clock.monotonic_s() - revocation.started_s
        self._leases.release(revocation.entry.project_id, instance_id)
        revocation.settled.append(instance_id)
        self._changed.set()

    async def _store_outcomes(self) -> None:
        """What has come in of all revocations, up to a limit; and which of them have everything now."""
        left = _MAX_GROUP
        groups: list[tuple[OpenRevocation, list[InstanceId]]] = []
        sealed: list[tuple[OpenRevocation, float]] = []
        now_s = self._clock.monotonic_s()
        for revocation in self._collecting:
            group = revocation.settled[:left]
            left -= len(group)
            if group:
                groups.append((revocation, group))
            if len(group) == len(revocation.pending):
                sealed.append((revocation, now_s - revocation.started_s))

        async def store(transaction: Transaction) -> None:
            audited = []
            for revocation, group in groups:
                known = [(each, revocation.pending[each]) for each in group]
                await transaction.set_outcomes(
                    revocation.revocation_id,
                    [(each, pending.outcome, pending.after_s, pending.steps_s) for each, pending in known],
                )
                audited += [_outcome_entry(revocation, each, pending) for each, pending in known]
            gone = [(revocation.entry.project_id, each) for revocation, group in groups for each in group]
            if gone:
                await transaction.delete_leases(gone)
            for revocation, after_s in sealed:
                await transaction.seal_revocation(revocation.revocation_id, after_s)
                details = {"revocation_id": revocation.revocation_id, "after_s": _seconds(after_s)}
                state, project_id = revocation.state.value, revocation.entry.project_id
                audited.append(AuditEntry("keymanager", "project.sealed", state, project_id, details))
            await transaction.audit(audited)

        await self._store(store)
        for revocation, group in groups:
            del revocation.settled[: len(group)]
            for instance_id in group:
                del revocation.pending[instance_id]
        for revocation, after_s in sealed:
            self._sealed(revocation, after_s)
        if sealed:
            self._recorded()

    def _sealed(self, revocation: OpenRevocation, after_s: float) -> None:
        """That it is stands in the database."""
        entry = revocation.entry
        self._collecting.remove(revocation)
        del self._open[revocation.revocation_id]
        entry.unsealed.discard(revocation.revocation_id)
        sealed, entry.sealed = entry.sealed, asyncio.Event()
        sealed.set()
        _log.warning(
            "project sealed",
            project_id=str(entry.project_id),
            state=revocation.state.value,
            reason=revocation.reason,
            sealed_after_s=round(after_s, 3),
        )

    # --- back ---

    def _return(self, entry: ProjectEntry, actor: str, reason: str, detected_at: datetime, started_s: float) -> None:
        task = self._tasks.create_task(self._restore(entry, actor, reason, detected_at, started_s))
        self._returning[entry.project_id] = task

        def ended(task: asyncio.Task[None]) -> None:
            if self._returning.get(entry.project_id) is task:
                del self._returning[entry.project_id]

        task.add_done_callback(ended)

    async def returned(self, entry: ProjectEntry) -> None:
        """A return to ACTIVE that has begun is in force. One that waits for its revocation to be sealed, as long as a
        lease, is not waited for."""
        task = self._returning.get(entry.project_id)
        if task is not None and not entry.unsealed:
            await asyncio.wait({task})

    async def _restore(
        self, entry: ProjectEntry, actor: str, reason: str, detected_at: datetime, started_s: float
    ) -> None:
        while entry.unsealed:
            await entry.sealed.wait()
        if entry.access.state is not KeyState.ACTIVE or entry.state is KeyState.ACTIVE:
            return

        restoration_id = f"res-{secrets.token_hex(8)}"

        async def store(transaction: Transaction) -> None:
            if entry.ending:  # its end is stored with what it destroys, or not at all
                await transaction.delete_restoration(restoration_id)
                return
            state = entry.access.state  # looked at again: it may have changed while we waited for our turn
            reason = "" if state is KeyState.ACTIVE else entry.reason
            await transaction.set_project(entry.project_id, state, reason, entry.access)
            if state is KeyState.ACTIVE:
                after_s = self._clock.monotonic_s() - started_s
                await transaction.insert_restoration(
                    restoration_id, entry.project_id, reason or _ALLOWED_AGAIN, detected_at, after_s
                )
            else:
                await transaction.delete_restoration(restoration_id)
            details = {"restoration_id": restoration_id}
            await transaction.audit([AuditEntry(actor, "project.restored", state.value, entry.project_id, details)])

        await self._store(store)
        if entry.access.state is not KeyState.ACTIVE:
            await self._store(store)  # denied again while the transaction ran: the database must not say ACTIVE
            return
        if entry.issuing:
            return
        entry.state, entry.reason = KeyState.ACTIVE, ""
        self._sessions.announce(Restored(project_id=entry.project_id))
        _log.warning("project active again", project_id=str(entry.project_id))

    # --- restart and reconnect ---

    def resume(self, stored: Sequence[StoredRevocation], ttl_s: float) -> None:
        """Go on with what an earlier keymanager began; and with returns to ACTIVE that it did not finish."""
        now_s, now = self._clock.monotonic_s(), self._clock.now()
        for each in stored:
            entry = self._projects.get(each.project_id)
            fence_at_s = now_s + ttl_s * (1 + CLOCK_DRIFT)
            started_s = now_s - max(0.0, (now - each.detected_at).total_seconds())
            pending = {holder.instance_id: _Pending(holder, fence_at_s) for holder in each.pending}
            revocation = OpenRevocation(
                each.revocation_id, entry, each.state, each.reason, each.detected_at, started_s, 0.0, 0, pending
            )
            entry.unsealed.add(each.revocation_id)
            self._open[each.revocation_id] = revocation
            self._collect_too(revocation)
        for entry in self._projects.all():
            if entry.access.state is KeyState.ACTIVE and entry.state is not KeyState.ACTIVE:
                self._return(entry, "keymanager", "", now, now_s)

    def unanswered(self, instance_id: InstanceId) -> list[Revoke]:
        """What an instance that has just connected still has to acknowledge."""
        return [
            revocation.message()
            for revocation in self._open.values()
            if instance_id in revocation.pending and not revocation.pending[instance_id].outcome
        ]
