"""Which keys of the customers' are used, and as whom: key configurations from their first proof to their end.

In memory as the database has them, and beside each one an adapter (`Cmks`) and a watcher of its KMS. What may
interleave: changes of one configuration, whose stored order is the order in which they come into effect; rotations and
replacements, which put what they stored (`put`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from keymanager.adapters import session_life_s
from keymanager.audit_log import AuditLog
from keymanager.bound import BoundSettings, worst_cases
from keymanager.cmk import Cmks, call_details, calls_made, make_canary
from keymanager.config import KeymanagerSettings
from keymanager.kms_events import KmsEvent, names_of
from keymanager.records import StoredKeyConfiguration
from keymanager.repository import Repository
from keymanager.state import KMS_STATE, KmsAccess
from keymanager.watch import ProbeOutcome
from keymanager.watcher import Watcher
from shared.api.keymanager import (
    ChangeKeyConfiguration,
    CreateKeyConfiguration,
    KeyConfiguration,
    KeyWork,
    RestoreHold,
)
from shared.audit_chain import AuditEntry
from shared.clock import Clock
from shared.errors import InvalidInputError, NotFoundError
from shared.ids import AccountId, KeyConfigurationId


class KeyConfigurations:
    """Use cases of the admin API."""

    def __init__(
        self,
        settings: KeymanagerSettings,
        repository: Repository,
        audit_log: AuditLog,
        cmks: Cmks,
        watcher: Watcher,
        clock: Clock,
        account_id: AccountId,
        work: Callable[[KeyConfigurationId], list[KeyWork]],
    ) -> None:
        """`work`: what is under way on the KEKs of one."""
        self._settings = settings
        self._repository = repository
        self._audit_log = audit_log
        self._cmks = cmks
        self._watcher = watcher
        self._clock = clock
        self._account_id = account_id
        self._work = work
        self._changing = asyncio.Lock()  # keeps the stored order of settings the order in which they come into effect
        self.stored: dict[KeyConfigurationId, StoredKeyConfiguration] = {}

    async def load(self) -> None:
        """What the database has. Nobody is asked yet."""
        for stored in await self._repository.key_configurations():
            self.stored[stored.key_configuration_id] = stored
            self._cmks.add(stored.key_configuration_id, stored.key, self._cmks.make_usable(stored.key))
            self._watcher.add(stored)

    def put(self, stored: StoredKeyConfiguration) -> None:
        """Call when it is stored."""
        self.stored[stored.key_configuration_id] = stored
        self._watcher.replace(stored)

    async def create(self, request: CreateKeyConfiguration, actor: str) -> KeyConfiguration:
        """Proves that the key can be used: a canary is wrapped and unwrapped.

        Raises InvalidInputError that says what the customer has to change, UnavailableError when the KMS cannot be
        reached, ConflictError when the name is taken.
        """
        key_configuration_id = KeyConfigurationId.new()
        provider = self._cmks.make(request.key)
        try:
            with calls_made() as calls:
                canary = await make_canary(
                    provider,
                    request.key,
                    self._account_id,
                    key_configuration_id,
                    self._audit_log,
                    actor,
                    "key_configuration.create",
                )
            now = self._clock.now()
            stored = StoredKeyConfiguration(
                key_configuration_id,
                self._account_id,
                request.name,
                request.key,
                request.outage_grace_s,
                request.probe_interval_s,
                canary.wrapped,
                canary.digest,
                KmsAccess.ALLOWED,
                ProbeOutcome.ALLOWED.value,
                now,
                now,
                now,
                canary_cmk_key_version=canary.key_version,
            )
            details = {
                "key_configuration_id": str(key_configuration_id),
                "provider": request.key.provider,
                "key": request.key.identifier,
                "principal": request.key.principal,
                **call_details(calls),
            }
            async with self._repository.transaction() as transaction:
                await transaction.insert_key_configuration(stored)
                await transaction.audit([AuditEntry(actor, "key_configuration.create", "ok", None, details)])
        except BaseException:
            await provider.aclose()
            raise
        self.stored[key_configuration_id] = stored
        self._cmks.add(key_configuration_id, request.key, provider)
        self._watcher.add(stored)
        self._watcher.start(key_configuration_id)
        return self._model(stored)

    def all(self) -> list[KeyConfiguration]:
        return [self._model(stored) for stored in self.stored.values()]

    def show(self, key_configuration_id: KeyConfigurationId) -> KeyConfiguration:
        """Raises NotFoundError."""
        return self._model(self.get(key_configuration_id))

    async def change(
        self, key_configuration_id: KeyConfigurationId, request: ChangeKeyConfiguration, actor: str
    ) -> KeyConfiguration:
        """In effect at once. Raises NotFoundError, InvalidInputError when nothing is to be changed, ConflictError when
        the name is taken."""
        before = self.get(key_configuration_id)
        changes = request.model_dump(exclude_none=True)
        if not changes:
            raise InvalidInputError("say what is to be changed: name, outage_grace_s, probe_interval_s")
        after = replace(before, **changes)
        details = {"key_configuration_id": str(key_configuration_id)}
        for name in changes:
            details |= {f"old_{name}": str(getattr(before, name)), name: str(getattr(after, name))}
        async with self._changing:
            async with self._repository.transaction() as transaction:
                await transaction.change_key_configuration(
                    key_configuration_id, after.name, after.outage_grace_s, after.probe_interval_s
                )
                await transaction.audit([AuditEntry(actor, "key_configuration.change", "ok", None, details)])
            # The rest of the row may have changed: its canary, for one.
            self.put(replace(self.get(key_configuration_id), **changes))
        return self.show(key_configuration_id)

    async def delete(self, key_configuration_id: KeyConfigurationId, actor: str) -> None:
        """Raises NotFoundError, ConflictError while a workspace or a project is bound to it."""
        self.get(key_configuration_id)
        details = {"key_configuration_id": str(key_configuration_id)}
        async with self._repository.transaction() as transaction:
            await transaction.delete_key_configuration(key_configuration_id)
            await transaction.audit([AuditEntry(actor, "key_configuration.delete", "ok", None, details)])
        self.stored.pop(key_configuration_id, None)
        self._watcher.remove(key_configuration_id)
        await self._cmks.remove(key_configuration_id)

    def get(self, key_configuration_id: KeyConfigurationId) -> StoredKeyConfiguration:
        """Raises NotFoundError."""
        stored = self.stored.get(key_configuration_id)
        if stored is None:
            raise NotFoundError("there is no such key configuration")
        return stored

    def _model(self, stored: StoredKeyConfiguration) -> KeyConfiguration:
        verdict, probed_at = self._watcher.last(stored.key_configuration_id)
        return KeyConfiguration(
            key_configuration_id=stored.key_configuration_id,
            account_id=stored.account_id,
            name=stored.name,
            key=stored.key,
            outage_grace_s=stored.outage_grace_s,
            probe_interval_s=stored.probe_interval_s,
            state=KMS_STATE[self._watcher.access(stored.key_configuration_id)],
            last_verdict=verdict,
            last_probe_at=probed_at,
            restore_hold=self._hold(stored.key_configuration_id),
            created_at=stored.created_at,
            worst_cases=worst_cases(self._bound_settings(stored)),
            work=self._work(stored.key_configuration_id),
        )

    def _hold(self, key_configuration_id: KeyConfigurationId) -> RestoreHold | None:
        hold = self._watcher.hold(key_configuration_id)
        return None if hold is None else RestoreHold(flaps=hold.flaps, needed_s=hold.needed_s, left_s=hold.left_s)

    def _bound_settings(self, stored: StoredKeyConfiguration) -> BoundSettings:
        settings = self._settings
        return BoundSettings(
            interval_s=stored.probe_interval_s,
            grace_s=stored.outage_grace_s,
            deadline_s=settings.kms_deadline_s,
            lease_ttl_s=settings.lease_ttl_s,
            leader_ttl_s=settings.leader_ttl_s,
            session_s=session_life_s(stored.key, settings),
        )

    async def take_events(self, events: Sequence[KmsEvent], actor: str) -> int:
        """Have the KMS of every key that they name asked. Returns how many key configurations that are.

        Probes come first, then the audit records: of each probe that an event has begun, not of each event, so that
        whoever may send them cannot fill the chain with what Keylake knows nothing of.
        """
        by_name = {name: event for event in events for name in event.names}
        found = {
            key_configuration_id: by_name[name]
            for key_configuration_id, stored in self.stored.items()
            for name in names_of(stored.key)
            if name in by_name
        }
        begun = [each for each in found if self._watcher.hint(each)]
        if begun:
            details = ({"key_configuration_id": str(each), "event": found[each].kind} for each in begun)
            await self._audit_log.record(*(AuditEntry(actor, "kms.event", "probe", None, each) for each in details))
        return len(found)
