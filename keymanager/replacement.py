"""Another CMK for a key configuration, in the same cloud or in another one, while everybody goes on working.

    begin     the new CMK is tried with a canary, and stored as what is to come
    stage     each KEK: unwrapped by the old CMK, wrapped by the new one, stored beside the old wrap      one at a time
    switch    one transaction: every KEK gets its new wrap, the configuration its new key and canary

Until the switch everything uses the old CMK, from then on everything uses the new one; there is no time in between, so
nothing has to ask which of them wrapped a KEK. A KEK that comes into being meanwhile is found missing at the switch and
staged; one that was wrapped before and is stored after it is refused (`Transaction.require_key_generation`).

It takes both CMKs. When the old one is denied nothing can be unwrapped any more, so a replacement is refused then; one
that is under way waits until the old one answers again, or is given up by `abort`. A keymanager that was killed goes on
with what is not staged yet.

What may interleave: everything. `_lock`, which rotation of the same key configuration shares, keeps rewraps out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from keymanager.audit_log import AuditLog
from keymanager.cmk import Cmks, call_details, calls_made, kek_context, make_canary
from keymanager.explain import explain
from keymanager.keyring import Keyring
from keymanager.kms.base import KmsError, KmsProvider, Verdict
from keymanager.projects import ProjectEntry, Projects
from keymanager.records import StagedKek, StoredKek, StoredKeyConfiguration, StoredReplacement
from keymanager.repository import Repository
from keymanager.state import KMS_STATE, KmsAccess
from shared.api.keymanager import KeyState, KeyWork, KeyWorkKind, Replacement
from shared.audit_chain import AuditEntry
from shared.clock import Clock
from shared.cmk import CmkKey
from shared.crypto.secret import KeyWipedError
from shared.errors import ConflictError, KeylakeError, NotFoundError, UnavailableError
from shared.failpoints import failpoint
from shared.ids import KeyConfigurationId, ProjectId
from shared.lease import key_access_error
from shared.telemetry import get_logger

_log = get_logger(__name__)
_TRY_AGAIN_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class ReplacerHooks:
    """What the keymanager does for a replacement."""

    configuration: Callable[[KeyConfigurationId], StoredKeyConfiguration]
    """Raises NotFoundError."""
    access: Callable[[KeyConfigurationId], KmsAccess]
    switched: Callable[[StoredKeyConfiguration], None]
    """The configuration has another key and canary now. Called in the same step in which everything else changes."""
    lock: Callable[[KeyConfigurationId], asyncio.Lock]
    """The one that rotation holds while it wraps KEKs of this configuration."""


class Replacer:
    """Runs in the keymanager's process and task group."""

    def __init__(
        self,
        repository: Repository,
        audit_log: AuditLog,
        projects: Projects,
        keyring: Keyring,
        cmks: Cmks,
        clock: Clock,
        tasks: asyncio.TaskGroup,
        hooks: ReplacerHooks,
    ) -> None:
        self._repository = repository
        self._audit_log = audit_log
        self._projects = projects
        self._keyring = keyring
        self._cmks = cmks
        self._clock = clock
        self._tasks = tasks
        self._hooks = hooks
        self._pending: dict[KeyConfigurationId, StoredReplacement] = {}
        self._staged: dict[KeyConfigurationId, dict[tuple[ProjectId, int], StagedKek]] = {}
        self._running: dict[KeyConfigurationId, asyncio.Task[None]] = {}

    async def resume(self) -> None:
        """Go on with what an earlier process began."""
        for stored in await self._repository.replacements():
            self._pending[stored.key_configuration_id] = stored
            self._start(stored, self._cmks.make_usable(stored.key))

    # --- use cases ---

    async def begin(
        self, key_configuration_id: KeyConfigurationId, key: CmkKey, actor: str, *, dry_run: bool = False
    ) -> Replacement:
        """Returns when the new CMK was tried; the rest goes on by itself. The same again changes nothing. `dry_run`:
        nothing goes on.

        Raises NotFoundError; KeyAccessError when the old CMK is denied or away; InvalidInputError when the new one
        cannot be used; UnavailableError; ConflictError when another replacement is under way, or it has this key.
        """
        configuration = self._hooks.configuration(key_configuration_id)
        pending = self._pending.get(key_configuration_id)
        if pending is not None:
            if pending.key != key:
                raise ConflictError("another replacement of this key is under way: abort it first")
            return self.progress(key_configuration_id)
        if configuration.key == key:
            raise ConflictError("this key configuration has this key already")
        access = self._hooks.access(key_configuration_id)
        if access is not KmsAccess.ALLOWED:
            raise key_access_error(
                KMS_STATE[access], "the old key must be usable to replace it: what it wraps can only be opened by it"
            )
        provider = self._cmks.make(key)
        try:
            canary = await make_canary(
                provider, key, configuration.account_id, key_configuration_id, self._audit_log, actor, "cmk.replace"
            )
            stored = StoredReplacement(
                key_configuration_id,
                key,
                canary.wrapped,
                canary.digest,
                actor,
                self._clock.now(),
                canary.key_version,
            )
            details = self._details(stored) | {"step": "begin"}
            if dry_run:
                await self._audit_log.record(AuditEntry(actor, "cmk.replace", "dry_run", None, details))
                await provider.aclose()
                return self._model(stored, dry_run=True)
            failpoint("replacement-tried")
            async with self._repository.transaction() as transaction:
                await transaction.insert_replacement(stored)
                await transaction.audit([AuditEntry(actor, "cmk.replace", "ok", None, details)])
            failpoint("replacement-begun")
        except BaseException:
            await provider.aclose()
            raise
        self._pending[key_configuration_id] = stored
        self._start(stored, provider)
        return self.progress(key_configuration_id)

    async def abort(self, key_configuration_id: KeyConfigurationId, actor: str) -> None:
        """Keep the old CMK. Raises NotFoundError when no replacement is under way (any more)."""
        stored = self._pending.get(key_configuration_id)
        if stored is None:
            raise NotFoundError("no replacement of this key is under way")
        task = self._running.pop(key_configuration_id, None)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        if self._pending.pop(key_configuration_id, None) is None:
            raise NotFoundError("the key was replaced meanwhile")
        self._staged.pop(key_configuration_id, None)
        details = self._details(stored) | {"step": "abort"}
        failpoint("abort-halted")
        async with self._repository.transaction() as transaction:
            await transaction.delete_replacement(key_configuration_id)
            await transaction.audit([AuditEntry(actor, "cmk.replace", "aborted", None, details)])
        failpoint("abort-stored")

    def forget(self, project_id: ProjectId) -> None:
        """Of a project that is shredded no wrap waits for the switch any more, not even here."""
        for staged in self._staged.values():
            for of in [of for of in staged if of[0] == project_id]:
                del staged[of]

    def is_under_way(self, key_configuration_id: KeyConfigurationId) -> bool:
        return key_configuration_id in self._pending

    def progress(self, key_configuration_id: KeyConfigurationId) -> Replacement:
        """Raises NotFoundError when no replacement is under way."""
        stored = self._pending.get(key_configuration_id)
        if stored is None:
            raise NotFoundError("no replacement of this key is under way")
        return self._model(stored)

    def work(self, key_configuration_id: KeyConfigurationId) -> list[KeyWork]:
        """The replacement that is under way."""
        if not self.is_under_way(key_configuration_id):
            return []
        now = self.progress(key_configuration_id)
        return [KeyWork(kind=KeyWorkKind.REPLACE, done=now.staged, total=now.keks, started_at=now.started_at)]

    def _model(self, stored: StoredReplacement, *, dry_run: bool = False) -> Replacement:
        return Replacement(
            key_configuration_id=stored.key_configuration_id,
            key=stored.key,
            keks=len(self._keks(stored.key_configuration_id)),
            staged=len(self._staged.get(stored.key_configuration_id, {})),
            started_at=stored.started_at,
            dry_run=dry_run,
        )

    # --- work ---

    def _start(self, stored: StoredReplacement, provider: KmsProvider) -> None:
        self._running[stored.key_configuration_id] = self._tasks.create_task(self._run(stored, provider))

    async def _run(self, stored: StoredReplacement, provider: KmsProvider) -> None:
        """Until it is done, or cancelled. An error is tried again: it lasts as long as its cause."""
        used = False
        try:
            while not used:
                try:
                    async with self._hooks.lock(stored.key_configuration_id):
                        used = await self._stage_and_switch(stored, provider)
                except KeylakeError as error:
                    _log.warning("a replacement of a CMK waits", code=error.code, reason=str(error))
                    await asyncio.sleep(_TRY_AGAIN_S)
        finally:
            if not used:
                await provider.aclose()

    async def _stage_and_switch(self, stored: StoredReplacement, provider: KmsProvider) -> bool:
        key_configuration_id = stored.key_configuration_id
        staged = self._staged.setdefault(key_configuration_id, {})
        if not staged:
            for before in await self._repository.staged(key_configuration_id):
                staged[before.project_id, before.kek_version] = before
        for entry, kek in self._keks(key_configuration_id):
            if (kek.project_id, kek.kek_version) not in staged:
                await self._stage(stored, provider, entry, kek)
        details = self._details(stored) | {"step": "switch", "keks": str(len(staged))}
        async with self._repository.transaction() as transaction:
            if not await transaction.switch_key(stored):
                return False  # a KEK came into being meanwhile: stage it, and again
            await transaction.audit([AuditEntry(stored.actor, "cmk.replace", "ok", None, details)])
            failpoint("switch-written")
        failpoint("switch-stored")
        # No await from here to the end: whoever looks next finds the new provider with what it wrapped.
        old = self._hooks.configuration(key_configuration_id)
        former = self._cmks.replace(key_configuration_id, stored.key, provider)
        for entry, kek in self._keks(key_configuration_id):
            new = staged[kek.project_id, kek.kek_version]
            entry.keks[kek.kek_version] = replace(kek, wrapped=new.wrapped, cmk_key_version=new.cmk_key_version)
        self._hooks.switched(
            replace(
                old,
                key=stored.key,
                canary_wrapped=stored.canary_wrapped,
                canary_digest=stored.canary_digest,
                canary_cmk_key_version=stored.canary_cmk_key_version,
                key_generation=old.key_generation + 1,
            )
        )
        for of in (self._pending, self._staged, self._running):
            of.pop(key_configuration_id, None)
        await former.aclose()
        return True

    async def _stage(
        self, stored: StoredReplacement, provider: KmsProvider, entry: ProjectEntry, kek: StoredKek
    ) -> None:
        """One KEK. Raises KeyAccessError, UnavailableError; then nothing of it is stored."""
        assert kek.wrapped is not None  # noqa: S101 - `_keks` leaves destroyed ones out
        context = kek_context(entry.scope, kek.kek_id, kek.kek_version)
        key_configuration_id = stored.key_configuration_id
        with self._keyring.working(entry.project_id, keks=True) as held:
            with calls_made() as unwraps:
                try:
                    secret = held.add(await self._cmks.of(key_configuration_id).unwrap(kek.wrapped, context))
                except KmsError as error:
                    raise _refusal(error, self._cmks.explain(key_configuration_id, error)) from None
            failpoint("stage-unwrapped")
            with calls_made() as wraps:
                try:
                    wrapped = await provider.wrap(secret, context)
                except KmsError as error:
                    raise _refusal(error, explain(error, stored.key)) from None
                except KeyWipedError:
                    raise entry.refusal() from None
        failpoint("stage-wrapped")
        made = StagedKek(entry.project_id, kek.kek_version, wrapped.wrapped, wrapped.key_version)
        of_old = {f"old_{name}": value for name, value in call_details(unwraps).items()}
        details = {"kek_version": str(kek.kek_version), **of_old, **call_details(wraps)}
        async with self._repository.transaction() as transaction:
            await transaction.insert_staged(key_configuration_id, made)
            await transaction.audit([AuditEntry(stored.actor, "kek.stage", "ok", entry.project_id, details)])
        failpoint("stage-stored")
        self._staged[key_configuration_id][entry.project_id, kek.kek_version] = made

    def _keks(self, key_configuration_id: KeyConfigurationId) -> list[tuple[ProjectEntry, StoredKek]]:
        entries = self._projects.of_key_configuration(key_configuration_id)
        return [(entry, kek) for entry in entries for kek in entry.keks.values() if kek.wrapped is not None]

    def _details(self, stored: StoredReplacement) -> dict[str, str]:
        old = self._hooks.configuration(stored.key_configuration_id).key
        return {
            "key_configuration_id": str(stored.key_configuration_id),
            "old_key": old.identifier,
            "key": stored.key.identifier,
            "principal": stored.key.principal,
        }


def _refusal(error: KmsError, why: str) -> KeylakeError:
    if error.verdict is Verdict.DENIED:
        return key_access_error(KeyState.REVOKED, why)
    return UnavailableError(f"a KMS could not be used: {why}")
