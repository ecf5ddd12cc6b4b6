"""Rotation of keys, while everybody goes on working.

    KEK          a new version for new DEKs; the old versions stay, to unwrap what they wrapped     `rotate_kek`
    CMK version  the customer's KMS has new key material: every KEK is wrapped again, by one KMS call  `rewrap`

Data is never touched. A new key is used only when it is stored: the row is committed first, then it enters memory. Each
step stands alone and is stored by itself, so whoever is killed in the middle only has to look again at what is left;
nothing needs to be remembered of a rotation but the versions in the rows.

By itself: KEKs are rotated when they are old or have wrapped much (`Policy`), and KEKs are wrapped again when the KMS
names another version than theirs.

What may interleave: revocation at any time (`ProjectEntry.stop` is synchronous; whoever awaited looks at the epoch),
rotations of other projects, and the same rotation asked for again, which waits for the first (`_lock`) and finds that
it is done: a request names the version that the new one is to follow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from weakref import WeakValueDictionary

from keymanager.audit_log import AuditLog
from keymanager.cmk import Cmks, call_details, calls_made, canary_context, kek_context
from keymanager.kek_canary import new_kek
from keymanager.keyring import Keyring
from keymanager.kms.base import KmsError, Verdict
from keymanager.projects import ProjectEntry, Projects
from keymanager.records import StoredKek, StoredKeyConfiguration
from keymanager.repository import Repository
from shared.api.keymanager import KeyState, KeyWork, KeyWorkKind, Rewrap
from shared.audit_chain import AuditEntry
from shared.clock import Clock
from shared.crypto.secret import KeyWipedError
from shared.errors import ConflictError, KeyAccessError, KeylakeError, UnavailableError
from shared.failpoints import failpoint
from shared.ids import KekId, KeyConfigurationId, ProjectId
from shared.lease import key_access_error
from shared.telemetry import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Policy:
    """When the keymanager rotates without being asked."""

    kek_max_age: timedelta
    kek_max_wraps: int
    look_every_s: float


ConfigurationOf = Callable[[KeyConfigurationId], StoredKeyConfiguration]
"""Raises NotFoundError."""
CanaryStored = Callable[[StoredKeyConfiguration], None]


class Rotator:
    """Runs in the keymanager's process; `run` in its task group."""

    def __init__(
        self,
        repository: Repository,
        audit_log: AuditLog,
        projects: Projects,
        keyring: Keyring,
        cmks: Cmks,
        clock: Clock,
        policy: Policy,
        configuration_of: ConfigurationOf,
        canary_stored: CanaryStored,
    ) -> None:
        """`canary_stored` is called with a key configuration whose canary was wrapped again."""
        self._repository = repository
        self._audit_log = audit_log
        self._projects = projects
        self._keyring = keyring
        self._cmks = cmks
        self._clock = clock
        self._policy = policy
        self._configuration_of = configuration_of
        self._canary_stored = canary_stored
        self._locks: WeakValueDictionary[ProjectId | KeyConfigurationId, asyncio.Lock] = WeakValueDictionary()
        """Each for as long as somebody holds it or waits for it."""
        self._rewraps: dict[KeyConfigurationId, KeyWork] = {}

    # --- by itself ---

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._policy.look_every_s)
            for entry in self._projects.all():
                if entry.issuing and self._is_due(entry.current_kek):
                    await self._quietly(self._rotate_if_due(entry))
            for key_configuration_id in self._cmks.all():
                await self._quietly(self.rewrap(key_configuration_id, "keymanager/rotation"))

    @staticmethod
    async def _quietly(work: Awaitable[object]) -> None:
        try:
            await work
        except KeylakeError as error:
            _log.warning("a rotation that was due has failed and is tried again later", code=error.code)

    async def _rotate_if_due(self, entry: ProjectEntry) -> None:
        async with self._lock(entry.project_id):
            if self._is_due(entry.current_kek):
                await self._new_kek(entry, "keymanager/rotation")

    def _is_due(self, kek: StoredKek) -> bool:
        too_old = self._clock.now() - kek.created_at >= self._policy.kek_max_age
        return too_old or kek.wraps_reserved >= self._policy.kek_max_wraps

    # --- KEK ---

    async def rotate_kek(
        self,
        project_id: ProjectId,
        actor: str,
        *,
        from_version: int | None = None,
        dry_run: bool = False,
        dek_floor: bool = False,
    ) -> ProjectEntry:
        """A new version of the project's KEK, for all DEKs from now on.

        `from_version`: the one that it is to follow, or the current one of when it was asked for. When there is a newer
        one already, nothing is changed: asked for again, or by many at once, it is done once. `dry_run`: the KMS makes
        a KEK, which is wiped; nothing is stored but the record of it. `dek_floor`: DEKs of before are replaced; that
        begins with a new version, always.

        Raises NotFoundError, KeyAccessError when the project is stopped or the KMS refuses, UnavailableError when the
        KMS gives no answer; then the old version is still the current one. ConflictError: there is no such version yet.
        """
        entry = self._projects.get(project_id)
        follows = entry.current_kek.kek_version if from_version is None else from_version
        async with self._lock(project_id):
            current = entry.current_kek.kek_version
            if follows > current:
                raise ConflictError(f"the project's KEK is version {current}: there is no version {follows} to follow")
            if follows == current or dek_floor:
                await self._new_kek(entry, actor, dry_run=dry_run, dek_floor=dek_floor)
        return entry

    async def _new_kek(
        self, entry: ProjectEntry, actor: str, *, dry_run: bool = False, dek_floor: bool = False
    ) -> None:
        epoch, before = entry.epoch, entry.current_kek
        generation = self._configuration_of(entry.key_configuration_id).key_generation
        entry.check()
        kek_id, kek_version = KekId.new(), before.kek_version + 1
        with calls_made() as calls:
            try:
                made = await self._cmks.of(entry.key_configuration_id).generate_kek(
                    kek_context(entry.scope, kek_id, kek_version)
                )
            except KmsError as error:
                await self._failed(entry, "kek.rotate", actor, error, call_details(calls))
        failpoint("kek-made")
        now = self._clock.now()
        kek = new_kek(entry.scope, kek_id, kek_version, made, now)
        details = {"kek_id": str(kek_id), "kek_version": str(kek_version), **call_details(calls)}
        if dry_run:
            made.plaintext.wipe()
            await self._audit_log.record(AuditEntry(actor, "kek.rotate", "dry_run", entry.project_id, details))
            return
        with self._keyring.working(entry.project_id, keks=True) as held:
            held.add(made.plaintext)
            entry.check(epoch)
            async with self._repository.transaction() as transaction:
                await transaction.require_key_generation(entry.key_configuration_id, generation)
                await transaction.insert_kek(kek)
                entries = [AuditEntry(actor, "kek.rotate", "ok", entry.project_id, details)]
                if dek_floor:
                    await transaction.raise_dek_floor(entry.project_id, kek_version)
                    floor = {"dek_floor": str(kek_version)}
                    entries.append(AuditEntry(actor, "project.rekey", "ok", entry.project_id, floor))
                await transaction.audit(entries)
            failpoint("kek-stored")
            # Stored, so it is the current version, whatever has happened meanwhile. Its plaintext stays only if it may.
            entry.keks[kek_version] = kek
            if entry.issuing and entry.epoch == epoch and not made.plaintext.wiped:
                self._keyring.add(kek, held.release(made.plaintext))

    async def _failed(
        self, entry: ProjectEntry, action: str, actor: str, error: KmsError, details: dict[str, str]
    ) -> None:
        """Record it, and raise what the caller is to know."""
        await self._audit_log.record(AuditEntry(actor, action, error.verdict.value, entry.project_id, details))
        raise self._refusal(entry.key_configuration_id, error) from None

    # --- CMK version ---

    async def rewrap(
        self,
        key_configuration_id: KeyConfigurationId,
        actor: str,
        *,
        dry_run: bool = False,
    ) -> Rewrap:
        """Wrap every KEK of a key configuration, and its canary, under the CMK's current version.

        One call of the adapter for each of them that has another version. What was done before an error stays done;
        `work` says how far it is. Raises NotFoundError, KeyAccessError, UnavailableError.
        """
        self._configuration_of(key_configuration_id)
        async with self._lock(key_configuration_id):
            configuration = self._configuration_of(key_configuration_id)
            current = await self._current_version(configuration)
            entries = self._projects.of_key_configuration(key_configuration_id)
            keks = [(entry, kek) for entry in entries for kek in entry.keks.values() if kek.wrapped is not None]
            outdated = [(entry, kek) for entry, kek in keks if kek.cmk_key_version != current]
            done = 0
            if not dry_run:
                if configuration.canary_cmk_key_version != current:
                    await self._rewrap_canary(configuration, actor)
                done = await self._rewrap_keks(key_configuration_id, outdated, actor)
        return Rewrap(
            key_configuration_id=key_configuration_id,
            cmk_key_version=current,
            keks=len(keks),
            outdated=len(outdated),
            rewrapped=done,
            dry_run=dry_run,
        )

    def work(self, key_configuration_id: KeyConfigurationId) -> list[KeyWork]:
        """The rewrap that is under way."""
        found = self._rewraps.get(key_configuration_id)
        return [] if found is None else [found]

    async def _rewrap_keks(
        self, key_configuration_id: KeyConfigurationId, keks: Sequence[tuple[ProjectEntry, StoredKek]], actor: str
    ) -> int:
        """How many there were to do."""
        done, started_at = 0, self._clock.now()
        try:
            for number, (entry, kek) in enumerate(keks):
                self._rewraps[key_configuration_id] = KeyWork(
                    kind=KeyWorkKind.REWRAP, done=number, total=len(keks), started_at=started_at
                )
                done += await self._rewrap_kek(entry, kek, actor)
        finally:
            self._rewraps.pop(key_configuration_id, None)
        return done

    async def _current_version(self, configuration: StoredKeyConfiguration) -> str:
        try:
            version = (await self._cmks.of(configuration.key_configuration_id).describe()).key_version
        except KmsError as error:
            raise self._refusal(configuration.key_configuration_id, error) from None
        if version is None:
            raise ConflictError("this KMS does not say which version of the key is the current one")
        return version

    async def _rewrap_kek(self, entry: ProjectEntry, kek: StoredKek, actor: str) -> bool:
        """False when the KEK was destroyed meanwhile."""
        if kek.wrapped is None:
            return False
        context = kek_context(entry.scope, kek.kek_id, kek.kek_version)
        with self._keyring.working(entry.project_id, keks=True) as held, calls_made() as calls:
            try:
                wrapped = await self._cmks.of(entry.key_configuration_id).rewrap(kek.wrapped, context, held.add)
            except KmsError as error:
                await self._failed(entry, "kek.rewrap", actor, error, call_details(calls))
            except KeyWipedError:
                raise entry.refusal() from None
        failpoint("kek-rewrapped")
        details = {"kek_version": str(kek.kek_version), **call_details(calls), "cmk_key_version": wrapped.key_version}
        async with self._repository.transaction() as transaction:
            if not await transaction.replace_wrapped_kek(kek, wrapped.wrapped, wrapped.key_version):
                return False
            await transaction.audit([AuditEntry(actor, "kek.rewrap", "ok", entry.project_id, details)])
        failpoint("kek-rewrap-stored")
        # The rest of the row may have changed: wraps are counted while we wait.
        entry.keks[kek.kek_version] = replace(
            entry.keks[kek.kek_version], wrapped=wrapped.wrapped, cmk_key_version=wrapped.key_version
        )
        return True

    async def _rewrap_canary(self, configuration: StoredKeyConfiguration, actor: str) -> None:
        """So that the customer may disable the old version: the watcher's question is about the current one."""
        key_configuration_id = configuration.key_configuration_id
        context = canary_context(configuration.account_id, key_configuration_id)
        with calls_made() as calls:
            try:
                wrapped = await self._cmks.of(key_configuration_id).rewrap(configuration.canary_wrapped, context)
            except KmsError as error:
                raise self._refusal(key_configuration_id, error) from None
        failpoint("canary-rewrapped")
        details = {"key_configuration_id": str(key_configuration_id), **call_details(calls)}
        async with self._repository.transaction() as transaction:
            await transaction.set_canary(key_configuration_id, wrapped.wrapped, wrapped.key_version)
            await transaction.audit([AuditEntry(actor, "canary.rewrap", "ok", None, details)])
        failpoint("canary-rewrap-stored")
        # The rest of the row may have changed: its settings, for one.
        now = self._configuration_of(key_configuration_id)
        self._canary_stored(replace(now, canary_wrapped=wrapped.wrapped, canary_cmk_key_version=wrapped.key_version))

    def _refusal(self, key_configuration_id: KeyConfigurationId, error: KmsError) -> KeyAccessError | UnavailableError:
        """What a KMS's failure means to whoever asked for a use of the key."""
        why = self._cmks.explain(key_configuration_id, error)
        if error.verdict is Verdict.DENIED:
            return key_access_error(KeyState.REVOKED, why)
        return UnavailableError(f"the customer's KMS could not be used: {why}")

    def lock_of(self, of: ProjectId | KeyConfigurationId) -> asyncio.Lock:
        """Held while KEKs of this configuration are wrapped again, or a KEK of this project is made."""
        return self._lock(of)

    def _lock(self, of: ProjectId | KeyConfigurationId) -> asyncio.Lock:
        return self._locks.setdefault(of, asyncio.Lock())
