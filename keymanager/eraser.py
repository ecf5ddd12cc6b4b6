"""Looks at everything that `erasure.py` judges, and uses the word ERASED if it may."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from keymanager import shred_store
from keymanager.cmk import Cmks, calls_made, canary_context, canary_digest
from keymanager.erasure import AskedKey, CanaryOutcome, Facts, judge
from keymanager.keyring import Keyring
from keymanager.kms.base import DenialReason, Destruction, KmsError, KmsProvider
from keymanager.projects import ProjectEntry, Projects
from keymanager.records import StoredKeyConfiguration
from keymanager.repository import Repository
from keymanager.revocation import Revoker
from keymanager.shred_store import UsedCmk
from keymanager.shredding import Shredder
from keymanager.transaction import Transaction
from shared.api.keymanager import AuditVerification, KeyState
from shared.api.shredding import DestroyedKey, ErasureReport, VerifyErasure
from shared.audit_chain import AuditEntry
from shared.auth import Principal
from shared.clock import Clock
from shared.errors import ConflictError, NotFoundError, PermissionDeniedError
from shared.ids import KeyConfigurationId, ProjectId


class Eraser:
    """A use case of the admin API."""

    def __init__(
        self,
        repository: Repository,
        projects: Projects,
        keyring: Keyring,
        cmks: Cmks,
        revoker: Revoker,
        shredder: Shredder,
        clock: Clock,
        configuration_of: Callable[[KeyConfigurationId], StoredKeyConfiguration],
        verify_audit: Callable[[], Awaitable[AuditVerification]],
        *,
        can_sign: bool,
    ) -> None:
        self._repository = repository
        self._projects = projects
        self._keyring = keyring
        self._cmks = cmks
        self._revoker = revoker
        self._shredder = shredder
        self._clock = clock
        self._configuration_of = configuration_of
        self._verify_audit = verify_audit
        self._can_sign = can_sign

    async def verify(self, project_id: ProjectId, request: VerifyErasure, caller: Principal) -> ErasureReport:
        """Look now. The project is ERASED afterwards if every precondition holds; one that is already stays so, and the
        report of then is answered.

        Raises NotFoundError, ConflictError for a project that is not shredded, PermissionDeniedError for an attestation
        by who is not a person, UnavailableError.
        """
        entry = self._projects.get(project_id)
        if not entry.state.final:
            raise ConflictError(f"only a shredded project can be erased, and this one is {entry.state}")
        if request.attestations and caller.person is None:
            raise PermissionDeniedError("an attestation is a person's word: it takes a token of their own")
        before = await shred_store.erasure(self._repository, project_id)
        if before is not None:
            return before
        preconditions = judge(facts := await self._look(entry), request.attestations, caller.actor)
        erased = all(each.holds for each in preconditions)
        report = ErasureReport(
            project_id=project_id,
            state=KeyState.ERASED if erased else entry.state,
            checked_at=self._clock.now(),
            checked_by=caller.actor,
            keys=[each.key for each in facts.keys],
            preconditions=preconditions,
        )
        outcomes = {each.name: f"{each.outcome}: {'; '.join(each.evidence)}"[:1000] for each in preconditions}
        audited = AuditEntry(caller.actor, "project.erase", "ok" if erased else "refused", project_id, outcomes)
        if not erased:
            async with self._repository.transaction() as transaction:
                await transaction.audit([audited])
            return report

        async def store(transaction: Transaction) -> list[AuditEntry]:
            await shred_store.insert_erasure(transaction, report)
            return [audited]

        await self._revoker.erase(entry, store)
        return report

    async def _look(self, entry: ProjectEntry) -> Facts:
        project_id = entry.project_id
        await self._shredder.vacuum_if_needed(project_id)
        used, nodes, audit = await asyncio.gather(
            shred_store.used_cmks(self._repository, project_id),
            self._shredder.fresh_look(project_id),
            self._verify_audit(),
        )
        keys = await asyncio.gather(*(self._ask(each) for each in used))
        in_audit = await shred_store.cmks_in_audit(self._repository, project_id)
        shred = await self._shredder.status(project_id)
        newest = (await shred_store.shreds(self._repository, project_id))[0]
        return Facts(
            shred=shred,
            vacuumed=newest.vacuumed_at is not None,
            wraps_left=await shred_store.wraps_left(self._repository, project_id),
            keys_in_memory=self._keyring.keys_in_memory(project_id),
            leases_left=await shred_store.leases_left(self._repository, project_id),
            canaries=await self._keyring.scan(
                entry, [each for each in self._projects.all() if each.scope.account_id == entry.scope.account_id]
            ),
            branches=[
                f"{branch.name} ({project_id}) is {branch.state}"
                for project_id in await shred_store.branches(self._repository, entry.project_id)
                if not (branch := self._projects.get(project_id)).state.final
            ],
            keys=keys,
            keys_forgotten=sorted(in_audit - {each.key.identifier for each in used}),
            nodes=nodes,
            audit=audit,
            can_sign=self._can_sign,
        )

    async def _ask(self, used: UsedCmk) -> AskedKey:
        """Of the KMS itself, with a provider of its own: the key configuration may have another key by now."""
        provider = self._cmks.make_usable(used.key)
        try:
            with calls_made() as calls:
                told, found = await _destruction(provider)
                canary, evidence = await self._try_canary(used, provider)
        finally:
            await provider.aclose()
        key = DestroyedKey(
            key_configuration_id=used.key_configuration_id,
            provider=used.key.provider,
            identifier=used.key.identifier,
            principal=used.key.principal,
            destroyed=found.destroyed,
            evidence=found.evidence,
            request_ids=[call.request_id for call in calls if call.request_id is not None],
        )
        return AskedKey(key, told, canary, evidence)

    async def _try_canary(self, used: UsedCmk, provider: KmsProvider) -> tuple[CanaryOutcome, str]:
        try:
            stored = self._configuration_of(used.key_configuration_id)
        except NotFoundError:
            return "none", "its key configuration was deleted"
        if stored.key != used.key:
            return "none", "its key configuration has another key by now"
        context = canary_context(stored.account_id, stored.key_configuration_id)
        try:
            canary = await provider.unwrap(stored.canary_wrapped, context)
        except KmsError as error:
            gone = error.reason is DenialReason.NOT_FOUND
            return "refused" if gone else "unclear", f"{error} ({error.request_id or 'no request id'})"
        same = canary_digest(canary) == stored.canary_digest
        canary.wipe()
        return "opened", "the KMS unwrapped it" if same else "the KMS unwrapped it, into something else"


async def _destruction(provider: KmsProvider) -> tuple[bool, Destruction]:
    """Did the KMS say, and what."""
    try:
        return True, await provider.destruction()
    except KmsError as error:
        return False, Destruction(False, f"the KMS did not say: {error}")
