"""A project to another key configuration, while everybody goes on working: its KEKs under another CMK.

Each KEK is unwrapped by the old CMK and wrapped by the new one, in memory; then one transaction stores all the new
wraps and the new key configuration, and from the next step of the event loop on everything uses them. Until it commits
nothing has changed, so there is nothing to resume: a keymanager that was killed before has the project where it was,
one that was killed after has it where it is going, and the same request again does what is left to do.

Both CMKs must be usable: what the old one wraps can be opened by it alone, so an emergency move away from a revoked
CMK is refused. The old one is looked at again before the commit: a denial that was found out meanwhile holds.

What may interleave: everything but rotation of these keys and of this project's KEKs, and replacement of either CMK,
whose locks are held. A replacement of the old CMK that is under way refuses a move: it may have staged these KEKs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from keymanager.audit_log import AuditLog
from keymanager.cmk import Cmks, call_details, calls_made, kek_context
from keymanager.keyring import Keyring
from keymanager.kms.base import KmsError, KmsProvider, Verdict
from keymanager.lifecycle import KMS_EVENT, KMS_STATE, KmsAccess
from keymanager.projects import ProjectEntry, Projects
from keymanager.records import StagedKek, StoredKek, StoredKeyConfiguration
from keymanager.repository import Repository
from keymanager.revocation import Revoker
from shared.api.keymanager import KeyState
from shared.audit_chain import AuditEntry
from shared.crypto.secret import KeyWipedError
from shared.errors import ConflictError, KeylakeError, UnavailableError
from shared.failpoints import failpoint
from shared.ids import KeyConfigurationId, ProjectId
from shared.lease import key_access_error


@dataclass(frozen=True, slots=True)
class MoverHooks:
    """What the keymanager does for a move."""

    configuration: Callable[[KeyConfigurationId], StoredKeyConfiguration]
    """Raises NotFoundError."""
    access: Callable[[KeyConfigurationId], KmsAccess]
    lock: Callable[[ProjectId | KeyConfigurationId], asyncio.Lock]
    """The one that rotation holds while it wraps KEKs of this key configuration, or makes one of this project."""
    is_replacing: Callable[[KeyConfigurationId], bool]
    suspect: Callable[[KeyConfigurationId], None]
    """Something went wrong with this key: look now."""


class Mover:
    """Runs in the keymanager's process."""

    def __init__(
        self,
        repository: Repository,
        audit_log: AuditLog,
        projects: Projects,
        keyring: Keyring,
        cmks: Cmks,
        revoker: Revoker,
        hooks: MoverHooks,
    ) -> None:
        self._repository = repository
        self._audit_log = audit_log
        self._projects = projects
        self._keyring = keyring
        self._cmks = cmks
        self._revoker = revoker
        self._hooks = hooks

    async def move(self, project_id: ProjectId, target: KeyConfigurationId, actor: str) -> ProjectEntry:
        """Returns when it is there. A project that is there already stays as it is.

        Raises NotFoundError; KeyAccessError when either CMK may not be used, with the reason; UnavailableError;
        ConflictError when the old CMK is being replaced, or either was replaced meanwhile.
        """
        entry = self._projects.get(project_id)
        source = entry.key_configuration_id
        self._hooks.configuration(target)
        async with AsyncExitStack() as stack:
            for configuration in sorted({source, target}):  # in this order, so that nobody deadlocks
                await stack.enter_async_context(self._hooks.lock(configuration))
            await stack.enter_async_context(self._hooks.lock(project_id))
            if entry.key_configuration_id not in (source, target):
                raise ConflictError("the project was moved elsewhere meanwhile: try again")
            if entry.key_configuration_id != target:
                await self._move(entry, target, actor)
        return entry

    async def _move(self, entry: ProjectEntry, target: KeyConfigurationId, actor: str) -> None:
        source = entry.key_configuration_id
        old, new = self._hooks.configuration(source), self._hooks.configuration(target)
        if entry.access.shredded or not entry.confirmed:
            entry.check()
        if self._hooks.is_replacing(source):
            raise ConflictError("the project's key is being replaced: wait until that is done, or abort it")
        self._check(source, target)
        keks = [kek for kek in entry.keks.values() if kek.wrapped is not None]
        providers = self._cmks.of(source), self._cmks.of(target)
        moved = [await self._wrap(entry, kek, providers, target, actor) for kek in keks]
        self._check(source, target)
        failpoint("move-wrapped")
        details = {
            "old_key_configuration_id": str(source),
            "key_configuration_id": str(target),
            "old_key": old.key.identifier,
            "key": new.key.identifier,
            "keks": str(len(moved)),
        }
        async with self._repository.transaction() as transaction:
            for configuration in sorted((old, new), key=lambda each: each.key_configuration_id):
                await transaction.require_key_generation(
                    configuration.key_configuration_id, configuration.key_generation
                )
            await transaction.move_project(entry.project_id, target, keks, moved)
            await transaction.audit([AuditEntry(actor, "project.move_key", "ok", entry.project_id, details)])
        failpoint("move-stored")
        # No await until everything in memory says the same: whoever looks next finds the new CMK and its wraps.
        entry.key_configuration_id = target
        for staged in moved:
            entry.keks[staged.kek_version] = replace(
                entry.keks[staged.kek_version], wrapped=staged.wrapped, cmk_key_version=staged.cmk_key_version
            )
        access = self._hooks.access(target)
        if entry.access.kms is not access:
            # The old CMK was denied, or the new one, while we stored: what counts now is what the new one says.
            await self._revoker.project_event(entry, KMS_EVENT[access])

    def _check(self, source: KeyConfigurationId, target: KeyConfigurationId) -> None:
        for configuration, why in (
            (source, "the old key must be usable to move away from it: what it wraps can only be opened by it"),
            (target, "the new key cannot be used now"),
        ):
            self._hooks.configuration(configuration)  # it is still there
            access = self._hooks.access(configuration)
            if access is not KmsAccess.ALLOWED:
                raise key_access_error(KMS_STATE[access], why)

    async def _wrap(
        self,
        entry: ProjectEntry,
        kek: StoredKek,
        providers: tuple[KmsProvider, KmsProvider],
        target: KeyConfigurationId,
        actor: str,
    ) -> StagedKek:
        """One KEK under the new CMK; on record, because both customers' clouds have the calls on record."""
        assert kek.wrapped is not None  # noqa: S101 - the caller leaves destroyed ones out
        old, new = providers
        context = kek_context(entry.scope, kek.kek_id, kek.kek_version)
        with self._keyring.working(entry.project_id, keks=True) as held:
            with calls_made() as unwraps:
                try:
                    secret = held.add(await old.unwrap(kek.wrapped, context))
                except KmsError as error:
                    raise await self._failed(entry, entry.key_configuration_id, kek, actor, error) from None
            with calls_made() as wraps:
                try:
                    made = await new.wrap(secret, context)
                except KmsError as error:
                    held.wipe()  # what follows waits for the database
                    raise await self._failed(entry, target, kek, actor, error) from None
                except KeyWipedError:
                    raise entry.refusal() from None
        of_old = {f"old_{name}": value for name, value in call_details(unwraps).items()}
        details = {"kek_version": str(kek.kek_version), **of_old, **call_details(wraps)}
        await self._audit_log.record(AuditEntry(actor, "kek.move", "ok", entry.project_id, details))
        return StagedKek(entry.project_id, kek.kek_version, made.wrapped, made.key_version)

    async def _failed(
        self, entry: ProjectEntry, configuration: KeyConfigurationId, kek: StoredKek, actor: str, error: KmsError
    ) -> KeylakeError:
        self._hooks.suspect(configuration)
        details = {
            "kek_version": str(kek.kek_version),
            "key_configuration_id": str(configuration),
            "kms_verdict": error.verdict.value,
            "kms_code": error.provider_code,
        }
        await self._audit_log.record(AuditEntry(actor, "kek.move", error.verdict.value, entry.project_id, details))
        why = self._cmks.explain(configuration, error)
        if error.verdict is Verdict.DENIED:
            return key_access_error(KeyState.REVOKED, why, entry.scope.workspace_id)
        return UnavailableError(f"a KMS could not be used: {why}")
