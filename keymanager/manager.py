"""The keymanager's use cases: what its admin API does, and the parts that run for as long as the process."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Collection, Sequence
from datetime import timedelta
from typing import Final

from keymanager import anchoring
from keymanager.anchoring import Anchorer, AnchorKeys
from keymanager.audit_log import AuditLog
from keymanager.cmk import Cmks, call_details, calls_made, kek_context
from keymanager.config import KeymanagerSettings
from keymanager.eraser import Eraser
from keymanager.kek_canary import new_kek
from keymanager.key_configurations import KeyConfigurations
from keymanager.key_users import KeyUsers
from keymanager.keyring import Keyring, KeyringLimits
from keymanager.kms.base import KmsError, Verdict
from keymanager.kms_ledger import KmsLedger
from keymanager.leadership import Term
from keymanager.lease_table import LeaseTable
from keymanager.lifecycle import KMS_EVENT
from keymanager.moving import Mover, MoverHooks
from keymanager.people import People
from keymanager.projects import ProjectEntry, Projects
from keymanager.providers import ProviderFactory
from keymanager.receipts import Receipts
from keymanager.records import StoredKek, StoredProject
from keymanager.replacement import Replacer, ReplacerHooks
from keymanager.repository import Repository
from keymanager.retirement import Retirement
from keymanager.revocation import Revoker
from keymanager.rotation import Policy, Rotator
from keymanager.session import SessionDeps, SessionLimits, Sessions
from keymanager.shredding import Shredder
from keymanager.state import KMS_STATE, KeyAccess, KeyEvent, KmsAccess
from keymanager.watch import HoldDown
from keymanager.watcher import Watcher
from shared.api.keymanager import (
    AuditRecord,
    AuditVerification,
    ChangeWorkspace,
    CreateProject,
    CreateWorkspace,
    KeymanagerStatus,
    KeyState,
    LeaseInfo,
    Project,
    Revocation,
    Workspace,
)
from shared.audit_chain import AuditEntry, Link
from shared.auth import TokenVerifier
from shared.clock import Clock
from shared.crypto.context import KeyScope
from shared.errors import InvalidInputError, KeylakeError, NotLeaderError, UnavailableError
from shared.ids import AccountId, KekId, KeyConfigurationId, ProjectId, WorkspaceId
from shared.lease import key_access_error
from shared.telemetry import get_logger

_log = get_logger(__name__)
_FIRST_KEK_VERSION: Final = 1
_FIRST_ANSWERS_S: Final = 1.0
"""So long the first answers of the KMSes are waited for before anybody is served."""


class _StopError(Exception):
    """Ends the task group that runs the keymanager."""


class KeyManager:
    """Made by `KeyManager.running`, which owns its tasks."""

    def __init__(
        self,
        settings: KeymanagerSettings,
        repository: Repository,
        cmks: Cmks,
        ledger: KmsLedger,
        clock: Clock,
        tasks: asyncio.TaskGroup,
        account_id: AccountId,
        term: Term,
        anchor_keys: AnchorKeys | None,
    ) -> None:
        self._settings = settings
        self._term = term
        self._repository = repository
        self._clock = clock
        self._tasks = tasks
        self._account_id = account_id
        self._changing = asyncio.Lock()  # what is stored of workspaces comes into effect in the same order
        self.projects = Projects()
        self.leases = LeaseTable()
        self.sessions = Sessions()
        self.audit_log = AuditLog(repository)
        self.people = People(repository, self.projects, clock, self.sessions.revoke_token)
        self._cmks = cmks
        self._ledger = ledger
        limits = KeyringLimits(settings.kek_cache_entries, settings.kek_cache_idle_ttl_s)
        self.keyring = Keyring(repository, self.audit_log, self._cmks, self._suspect, clock, limits)
        self.key_users = KeyUsers(repository, clock)
        self._anchorer: Anchorer | None = None
        if settings.audit_anchors is not None and anchor_keys is not None:
            self._anchorer = Anchorer(
                settings.audit_anchors, anchor_keys, repository, clock, settings.audit_anchor_interval_s
            )
        self.revoker = Revoker(
            repository, self.projects, self.keyring, self.leases, self.sessions, clock, tasks, self._anchor_soon
        )
        self.watcher = Watcher(
            repository,
            self.audit_log,
            self._cmks,
            clock,
            tasks,
            self.revoker.kms_event,
            random.SystemRandom(),
            HoldDown(settings.restore_hold_s, settings.restore_hold_max_s, settings.restore_calm_s),
        )
        self.key_configurations = KeyConfigurations(
            settings,
            repository,
            self.audit_log,
            self._cmks,
            self.watcher,
            clock,
            account_id,
            lambda configuration: self.rotator.work(configuration) + self.replacer.work(configuration),
        )
        self.rotator = Rotator(
            repository,
            self.audit_log,
            self.projects,
            self.keyring,
            self._cmks,
            clock,
            Policy(
                timedelta(days=settings.kek_max_age_days),
                settings.kek_max_wraps,
                settings.rotation_check_interval_s,
            ),
            self.key_configurations.get,
            self.key_configurations.put,
        )
        self.retirement = Retirement(
            repository,
            self.projects,
            self.keyring,
            self.key_users,
            self.rotator,
            clock,
            timedelta(days=settings.kek_max_age_days),
        )
        self.replacer = Replacer(
            repository,
            self.audit_log,
            self.projects,
            self.keyring,
            self._cmks,
            clock,
            tasks,
            ReplacerHooks(
                self.key_configurations.get, self.watcher.access, self.key_configurations.put, self.rotator.lock_of
            ),
        )
        self.mover = Mover(
            repository,
            self.audit_log,
            self.projects,
            self.keyring,
            self._cmks,
            self.revoker,
            MoverHooks(
                self.key_configurations.get,
                self.watcher.access,
                self.rotator.lock_of,
                self.replacer.is_under_way,
                self._suspect,
            ),
        )
        self.shredder = Shredder(
            repository,
            self.projects,
            self.key_users,
            self.revoker,
            self.sessions,
            clock,
            tasks,
            self.rotator.lock_of,
            self.replacer.forget,
            timedelta(hours=settings.shred_approval_h),
        )
        self.eraser = Eraser(
            repository,
            self.projects,
            self.keyring,
            cmks,
            self.revoker,
            self.shredder,
            clock,
            self.key_configurations.get,
            self.verify_audit,
            can_sign=anchor_keys is not None,
        )
        self.receipts = Receipts(
            repository,
            self.projects,
            self.shredder,
            self.key_users,
            clock,
            anchor_keys,
            self.key_configurations.get,
            self.verify_audit,
            lambda: self._ledger.flush(repository),
        )

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls,
        settings: KeymanagerSettings,
        repository: Repository,
        factory: ProviderFactory,
        clock: Clock,
        term: Term,
        anchor_keys: AnchorKeys | None = None,
    ) -> AsyncIterator[KeyManager]:
        """The leader of `term`: load what is stored, ask every KMS once, then be ready. Leaving wipes all keys.

        `repository` is the term's own view of it. Raises NotLeaderError when the term is over before that.
        `anchor_keys`: without them the audit chain is not anchored, whatever the settings say.
        """
        account_id = await _default_account(repository, settings.default_account_name)
        ledger = KmsLedger(clock, settings.kms_call_record_interval_s)
        cmks = Cmks(factory, ledger)
        try:
            async with asyncio.TaskGroup() as tasks:
                manager = cls(settings, repository, cmks, ledger, clock, tasks, account_id, term, anchor_keys)
                try:
                    tasks.create_task(manager.audit_log.run())
                    await manager._load()
                    tasks.create_task(manager._sweep_leases())
                    tasks.create_task(manager.keyring.run())
                    tasks.create_task(manager.rotator.run())
                    tasks.create_task(ledger.run(repository))
                    if manager._anchorer is not None:
                        tasks.create_task(manager._anchorer.run())
                    await manager.replacer.resume()
                    yield manager
                finally:
                    manager.sessions.end_all("this keymanager has stopped")
                    manager.keyring.close()
                raise _StopError
        except* _StopError:
            pass
        finally:
            await cmks.aclose()  # after the watcher, which goes on probing until its task has ended
            await _record_last_calls(ledger, repository)

    def session_deps(self, verifier: TokenVerifier) -> SessionDeps:
        settings = self._settings
        limits = SessionLimits(
            settings.lease_ttl_s,
            settings.outbox_messages,
            settings.concurrent_key_requests,
            settings.waiting_key_requests,
            settings.all_key_requests,
        )
        return SessionDeps(
            self._repository,
            self.projects,
            self.keyring,
            self.key_users,
            self.leases,
            self.revoker,
            self.shredder,
            self.audit_log,
            self.people,
            verifier,
            self._clock,
            limits,
            self._term,
        )

    def _anchor_soon(self) -> None:
        if self._anchorer is not None:
            self._anchorer.soon()

    # --- start ---

    async def _load(self) -> None:
        for workspace in await self._repository.workspaces():
            self.projects.workspaces[workspace.workspace_id] = workspace
        await self.key_configurations.load()
        keks: dict[ProjectId, list[StoredKek]] = {}
        for kek in await self._repository.keks():
            keks.setdefault(kek.project_id, []).append(kek)
        for project in await self._repository.projects():
            kms = self.key_configurations.stored[project.key_configuration_id].kms_access
            access = KeyAccess.of(
                kms, held=project.held, shredded=project.shredded, erased=project.state is KeyState.ERASED
            )
            self.projects.add(project, keks.get(project.project_id, []), access).confirmed = False
        await self.people.load()
        await self.key_users.load()
        now_s = self._clock.monotonic_s()
        longest_ttl_s = self._settings.lease_ttl_s
        for lease in await self._repository.leases():
            # Renewed until nobody knows when: live for a whole ttl from now.
            self.leases.grant(lease.project_id, lease.holder, lease.ttl_s, now_s)
            longest_ttl_s = max(longest_ttl_s, lease.ttl_s)
        self.revoker.resume(await self._repository.open_revocations(), longest_ttl_s)
        await self.shredder.load()
        # Nothing is issued on the word of a database: every KMS is asked. One that is slow, or away, holds up its own
        # projects, whose leases run on meanwhile, and nobody else's.
        asked = [self._tasks.create_task(self._confirm(key)) for key in self.key_configurations.stored]
        if asked:
            await asyncio.wait(asked, timeout=_FIRST_ANSWERS_S)

    async def _confirm(self, key_configuration_id: KeyConfigurationId) -> None:
        await self.watcher.check(key_configuration_id)
        if key_configuration_id not in self.key_configurations.stored:  # it was deleted meanwhile
            return
        self.watcher.start(key_configuration_id)
        await self.watcher.heard(key_configuration_id)
        for entry in self.projects.of_key_configuration(key_configuration_id):
            entry.confirmed = True

    def _suspect(self, key_configuration_id: KeyConfigurationId) -> None:
        self.watcher.suspect(key_configuration_id)

    async def _sweep_leases(self) -> None:
        """Record leases that ran out, and delete their rows. The table itself needs no sweeping to be right. What
        cannot be stored now is over at the next look, too."""
        while True:
            await asyncio.sleep(self._settings.lease_ttl_s / 2)
            over = self.leases.over(self._clock.monotonic_s())
            if not over:
                continue
            entries = (
                AuditEntry(
                    "keymanager",
                    "lease.expire",
                    "ok",
                    held.project_id,
                    {
                        "node_id": held.holder.node_id,
                        "instance_id": str(held.holder.instance_id),
                        "generation": str(held.holder.generation),
                    },
                )
                for held in over
            )
            try:
                await self.audit_log.record(
                    *entries, ended=[(held.project_id, held.holder.instance_id) for held in over]
                )
            except NotLeaderError:
                raise
            except UnavailableError as error:
                _log.error("expired leases could not be recorded", reason=str(error))
            else:
                self.leases.forget(over)

    # --- workspaces and projects ---

    async def create_workspace(self, request: CreateWorkspace, actor: str) -> Workspace:
        """Raises NotFoundError, ConflictError."""
        self.key_configurations.get(request.key_configuration_id)
        workspace = Workspace(
            workspace_id=WorkspaceId.new(),
            account_id=self._account_id,
            name=request.name,
            key_configuration_id=request.key_configuration_id,
            created_at=self._clock.now(),
        )
        details = {
            "workspace_id": str(workspace.workspace_id),
            "key_configuration_id": str(workspace.key_configuration_id),
        }
        async with self._repository.transaction() as transaction:
            await transaction.insert_workspace(workspace)
            await transaction.audit([AuditEntry(actor, "workspace.create", "ok", None, details)])
        self.projects.workspaces[workspace.workspace_id] = workspace
        return workspace

    async def change_workspace(self, workspace_id: WorkspaceId, request: ChangeWorkspace, actor: str) -> Workspace:
        """In effect at once, for projects that are made from now on; no KEK is touched.

        Raises NotFoundError, InvalidInputError when nothing is to be changed, ConflictError when the name is taken.
        """
        self.projects.workspace(workspace_id)
        changes = {name: value for name, value in dict(request).items() if value is not None}
        if not changes:
            raise InvalidInputError("say what is to be changed: name, key_configuration_id")
        if request.key_configuration_id is not None:
            self.key_configurations.get(request.key_configuration_id)
        async with self._changing:
            before = self.projects.workspace(workspace_id)
            after = before.model_copy(update=changes)
            details = {"workspace_id": str(workspace_id)}
            for name in changes:
                details |= {f"old_{name}": str(getattr(before, name)), name: str(getattr(after, name))}
            async with self._repository.transaction() as transaction:
                await transaction.change_workspace(after)
                await transaction.audit([AuditEntry(actor, "workspace.change", "ok", None, details)])
            self.projects.workspaces[workspace_id] = after
        return after

    async def delete_workspace(self, workspace_id: WorkspaceId, actor: str) -> None:
        """Raises NotFoundError, ConflictError while a project is in it."""
        async with self._changing:
            workspace = self.projects.workspace(workspace_id)
            details = {"workspace_id": str(workspace_id), "name": workspace.name}
            async with self._repository.transaction() as transaction:
                await transaction.delete_workspace(workspace_id)
                await transaction.audit([AuditEntry(actor, "workspace.delete", "ok", None, details)])
            del self.projects.workspaces[workspace_id]

    def workspaces(self) -> list[Workspace]:
        return list(self.projects.workspaces.values())

    async def create_project(self, workspace_id: WorkspaceId, request: CreateProject, actor: str) -> Project:
        """Makes version 1 of its KEK in the customer's KMS.

        Raises NotFoundError, ConflictError, KeyAccessError when the KMS refuses, UnavailableError when it gives no
        answer.
        """
        workspace = self.projects.workspace(workspace_id)
        key_configuration_id = request.key_configuration_id or workspace.key_configuration_id
        generation = self.key_configurations.get(key_configuration_id).key_generation
        access = self.watcher.access(key_configuration_id)
        if access is not KmsAccess.ALLOWED:
            raise key_access_error(KMS_STATE[access], "its key cannot be used now", workspace_id)
        scope = KeyScope(workspace.account_id, workspace_id, ProjectId.new())
        kek_id, now = KekId.new(), self._clock.now()
        with calls_made() as calls:
            try:
                generated = await self._cmks.of(key_configuration_id).generate_kek(
                    kek_context(scope, kek_id, _FIRST_KEK_VERSION)
                )
            except KmsError as error:
                self._suspect(key_configuration_id)
                await self.audit_log.record(
                    AuditEntry(actor, "project.create", error.verdict.value, None, call_details(calls))
                )
                if error.verdict is Verdict.DENIED:
                    why = self._cmks.explain(key_configuration_id, error)
                    raise key_access_error(KeyState.REVOKED, why, workspace_id) from None
                why = self._cmks.explain(key_configuration_id, error)
                raise UnavailableError(f"the project's key could not be made: {why}") from None
        kek = new_kek(scope, kek_id, _FIRST_KEK_VERSION, generated, now)
        stored = StoredProject(
            scope.project_id, workspace_id, request.name, False, False, KeyState.ACTIVE, "", now, key_configuration_id
        )
        details = {
            "workspace_id": str(workspace_id),
            "key_configuration_id": str(key_configuration_id),
            "kek_id": str(kek_id),
            "kek_version": "1",
            **call_details(calls),
        }
        try:
            async with self._repository.transaction() as transaction:
                await transaction.require_key_generation(key_configuration_id, generation)
                await transaction.insert_project(stored, kek)
                await transaction.audit([AuditEntry(actor, "project.create", "ok", scope.project_id, details)])
        except BaseException:
            generated.plaintext.wipe()
            raise
        # The CMK may have been denied while we were writing; then the project begins its life without its key.
        entry = self.projects.add(stored, [kek], KeyAccess())
        access = self.watcher.access(key_configuration_id)
        self.keyring.add(kek, generated.plaintext)
        if access is not KmsAccess.ALLOWED:
            await self.revoker.project_event(entry, KMS_EVENT[access])
        return self.project_model(entry)

    def project_model(self, entry: ProjectEntry) -> Project:
        """With what its return waits for beside its KMS's first yes."""
        model = entry.model()
        hold = self.watcher.hold(entry.key_configuration_id)
        if hold is None or entry.state.final:
            return model
        return model.model_copy(update={"state_reason": f"{model.state_reason}; {hold.reason}"})

    def project(self, project_id: ProjectId) -> Project:
        """Raises NotFoundError."""
        return self.project_model(self.projects.get(project_id))

    def all_projects(self) -> list[Project]:
        return list(map(self.project_model, self.projects.all()))

    def projects_of(self, workspace_id: WorkspaceId) -> list[Project]:
        """Raises NotFoundError."""
        self.projects.workspace(workspace_id)
        return list(map(self.project_model, self.projects.of_workspace(workspace_id)))

    # --- keys of projects ---

    async def revalidate_project(self, project_id: ProjectId, actor: str) -> Project:
        """Ask the KMS now. Returns the project as it is after the answer. Raises NotFoundError."""
        entry = self.projects.get(project_id)
        await self.audit_log.record(AuditEntry(actor, "project.revalidate", "ok", project_id))
        await self.watcher.ask_now(entry.key_configuration_id)
        await self.revoker.returned(entry)
        return self.project_model(entry)

    async def revalidate_workspace(self, workspace_id: WorkspaceId, actor: str) -> list[Project]:
        """As `revalidate_project`, for all projects of a workspace."""
        workspace = self.projects.workspace(workspace_id)
        details = {"workspace_id": str(workspace_id)}
        await self.audit_log.record(AuditEntry(actor, "workspace.revalidate", "ok", None, details))
        of_projects = {entry.key_configuration_id for entry in self.projects.of_workspace(workspace_id)}
        await asyncio.gather(*map(self.watcher.ask_now, of_projects | {workspace.key_configuration_id}))
        await asyncio.gather(*map(self.revoker.returned, self.projects.of_workspace(workspace_id)))
        return self.projects_of(workspace_id)

    async def revoke_project(self, project_id: ProjectId, reason: str, actor: str) -> Project:
        """An operator's own hold. Returns when it is in force and its Revokes are on their way, not when it is sealed.

        Raises NotFoundError, ConflictError.
        """
        entry = self.projects.get(project_id)
        await self.revoker.operator_event(entry, KeyEvent.OPERATOR_REVOKED, reason, actor)
        return self.project_model(entry)

    async def restore_project(self, project_id: ProjectId, actor: str) -> Project:
        """Lift the operator's hold. The project is ACTIVE again when its revocation is sealed, if the KMS agrees.

        Raises NotFoundError, ConflictError.
        """
        entry = self.projects.get(project_id)
        await self.watcher.ask_now(entry.key_configuration_id)
        await self.revoker.operator_event(entry, KeyEvent.OPERATOR_RESTORED, "the operator's hold was lifted", actor)
        await self.revoker.returned(entry)
        return self.project_model(entry)

    # --- what happened ---

    async def revocations(self, project_ids: Collection[ProjectId] | None, limit: int) -> list[Revocation]:
        return await self._repository.revocations(project_ids, limit)

    async def audit(
        self, after: int, limit: int, project_ids: Collection[ProjectId] | None, *, complete: bool = False
    ) -> list[AuditRecord]:
        """`complete`: first record the KMS calls that are in memory."""
        if complete:
            await self._ledger.flush(self._repository)
        return [_audit_model(link) for link in await self._repository.audit_page(after, limit, project_ids)]

    async def verify_audit(self) -> AuditVerification:
        return await anchoring.verify(self._repository, self._anchorer)

    def status(self) -> KeymanagerStatus:
        now_s = self._clock.monotonic_s()
        return KeymanagerStatus(
            node_id=self._settings.node_id,
            epoch=self._term.epoch,
            lease_ttl_s=self._settings.lease_ttl_s,
            instances=len(self.sessions),
            leases=[
                LeaseInfo(
                    project_id=held.project_id,
                    role=held.holder.role,
                    node_id=held.holder.node_id,
                    instance_id=held.holder.instance_id,
                    generation=held.holder.generation,
                    remaining_s=max(0.0, held.expires_at_s - now_s),
                )
                for held in self.leases.all()
                if held.expires_at_s > now_s
            ],
            plaintext_keks=self.keyring.plaintext_keks,
            anchoring=None if self._anchorer is None else self._anchorer.status,
        )


def _audit_model(link: Link) -> AuditRecord:
    return AuditRecord(
        sequence=link.sequence,
        at=link.at,
        actor=link.entry.actor,
        action=link.entry.action,
        outcome=link.entry.outcome,
        project_id=link.entry.project_id,
        details=dict(link.entry.details),
        previous_hash=link.previous_hash.hex(),
        record_hash=link.record_hash.hex(),
    )


async def _record_last_calls(ledger: KmsLedger, repository: Repository) -> None:
    await asyncio.sleep(0)  # requests that were abandoned have reported their ends to the event loop
    try:
        await ledger.flush(repository)
    except NotLeaderError:
        _log.warning("the term was over before the last KMS calls were recorded")
    except KeylakeError as error:
        _log.error("the last KMS calls could not be recorded", reason=str(error))


async def _default_account(repository: Repository, name: str) -> AccountId:
    """The account of this installation, made at the first start."""
    known: Sequence[AccountId] = await repository.accounts()
    if known:
        return known[0]
    account_id = AccountId.new()
    async with repository.transaction() as transaction:
        await transaction.insert_account(account_id, name)
        entry = AuditEntry("keymanager", "account.create", "ok", None, {"account_id": str(account_id)})
        await transaction.audit([entry])
    return account_id
