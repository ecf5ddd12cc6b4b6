"""Plaintext KEKs, and what is done with them.

A KEK is unwrapped by the KMS when it is needed, once however many ask for it, kept while its project is ACTIVE and uses
it (`kek_cache.py`), and wiped by `drop`. With the KEK in memory, generating and unwrapping DEKs calls no KMS.

What may interleave: `drop` is synchronous. Whoever has a plaintext key in hand while awaiting a KMS, the database or a
turn has it in a `WorkingSet` (`working`), which `drop` wipes, too; so no plaintext outlives a stop because somebody
waits. Whoever awaited looks at the project's epoch afterwards.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final
from weakref import WeakValueDictionary

from keymanager.audit_log import AuditLog
from keymanager.cmk import Cmks, call_details, calls_made, kek_context
from keymanager.kek_cache import KekCache
from keymanager.kek_canary import CanaryScan, make_canary, opens
from keymanager.kms.base import KmsError
from keymanager.projects import ProjectEntry
from keymanager.records import StoredKek
from keymanager.repository import Repository
from shared.api.keymanager import ObjectName, WrappedObject
from shared.audit_chain import AuditEntry
from shared.clock import Clock
from shared.crypto.aead import AeadKey
from shared.crypto.envelope import Envelope, rewrap_dek, unwrap_dek, wrap_dek
from shared.crypto.limits import MAX_WRAPS_PER_KEK
from shared.crypto.secret import KeyWipedError, SecretKey
from shared.errors import ConflictError, IntegrityError, KeyAccessError, UnavailableError
from shared.ids import KeyConfigurationId, ProjectId

WRAP_BLOCK: Final = 4096
"""Wraps that are counted in advance, in one write: after a crash at most so many are counted that were never made."""
SLICE: Final = 64
"""Keys per turn of the event loop, about a millisecond."""

_SWEEPS_PER_TTL: Final = 8
_UNWRAPS_AT_ONCE: Final = 16
"""When every KEK of an account is tried."""

_Kek = tuple[ProjectId, int]


@dataclass(frozen=True, slots=True)
class KeyringLimits:
    """How many KEKs are kept, and for how long after their last use."""

    kek_entries: int
    kek_idle_ttl_s: float


class WorkingSet:
    """Plaintext keys of one project that somebody works with right now. Wiped when they are done, or at the project's
    stop: what comes in after that is wiped at once, and using it raises KeyWipedError."""

    __slots__ = ("_keks", "_keys", "_stopped")

    def __init__(self, *, keks: bool) -> None:
        self._keks = keks
        self._keys: list[SecretKey] = []
        self._stopped = False

    def add(self, key: SecretKey) -> SecretKey:
        """Takes ownership."""
        self._keys.append(key)
        if self._stopped:
            key.wipe()
        return key

    def release(self, key: SecretKey) -> SecretKey:
        """Gives ownership back."""
        self._keys.remove(key)
        return key

    def wipe(self) -> None:
        """For good."""
        self._stopped = True
        for key in self._keys:
            key.wipe()
        self._keys.clear()

    @property
    def live(self) -> int:
        """Keys in it that are not wiped."""
        return sum(not key.wiped for key in self._keys)

    @property
    def live_keks(self) -> int:
        return self.live if self._keks else 0


class Keyring:
    def __init__(
        self,
        repository: Repository,
        audit_log: AuditLog,
        cmks: Cmks,
        suspect: Callable[[KeyConfigurationId], None],
        clock: Clock,
        limits: KeyringLimits,
    ) -> None:
        """`suspect` is called when the KMS fails on the data path: the watcher then looks at once."""
        self._repository = repository
        self._audit_log = audit_log
        self._cmks = cmks
        self._suspect = suspect
        self.turn: Final = asyncio.Lock()
        """Held for one slice of key work, so that there is one slice to a turn of the event loop however many ask."""
        self._closed = False
        self._clock = clock
        self._limits = limits
        self._keks = KekCache(limits.kek_entries, limits.kek_idle_ttl_s, clock.monotonic_s)
        self._working: dict[ProjectId, list[WorkingSet]] = {}
        self._unwrapping: dict[_Kek, asyncio.Task[AeadKey]] = {}
        self._allowance: OrderedDict[_Kek, int] = OrderedDict()
        """Wraps that are counted and not made yet; forgotten, they were counted for nothing."""
        self._reserving: WeakValueDictionary[_Kek, asyncio.Lock] = WeakValueDictionary()
        """Each for as long as somebody holds it or waits for it."""

    @property
    def plaintext_keks(self) -> list[ProjectId]:
        """The project of each KEK that is in memory: kept, or being worked with."""
        return self._keks.projects + [
            of for of, sets in self._working.items() for each in sets for _ in range(each.live_keks)
        ]

    async def run(self) -> None:
        """Until cancelled: what nobody uses does not stay in memory for want of somebody who looks."""
        while True:
            await asyncio.sleep(self._limits.kek_idle_ttl_s / _SWEEPS_PER_TTL)
            self._keks.expire()

    def keys_in_memory(self, project_id: ProjectId) -> int:
        """Plaintext keys of the project, KEKs and DEKs."""
        kept = self._keks.projects.count(project_id)
        return kept + sum(each.live for each in self._working.get(project_id, ()))

    @contextmanager
    def working(self, project_id: ProjectId, *, keks: bool = False) -> Iterator[WorkingSet]:
        """For plaintext keys of the project that are held across an await. `keks`: KEKs rather than DEKs."""
        held = WorkingSet(keks=keks)
        sets = self._working.setdefault(project_id, [])
        sets.append(held)
        if self._closed:
            held.wipe()
        try:
            yield held
        finally:
            held.wipe()
            sets.remove(held)
            if not sets:
                self._working.pop(project_id, None)

    def drop(self, project_id: ProjectId) -> int:
        """Wipe the project's KEKs, and whatever of its keys is being worked with. Returns how many KEKs there were."""
        at_work = self._working.get(project_id, ())
        keks = self._keks.drop(project_id) + sum(each.live_keks for each in at_work)
        for each in at_work:
            each.wipe()
        return keks

    def drop_version(self, project_id: ProjectId, kek_version: int) -> None:
        """Wipe a KEK that is destroyed."""
        self._keks.drop(project_id, kek_version)

    def close(self) -> None:
        """Wipe everything, for good: a KEK that is on its way does not enter memory any more."""
        self._closed = True
        self._keks.wipe()
        for sets in self._working.values():
            for each in sets:
                each.wipe()
        for task in self._unwrapping.values():
            task.cancel()

    def add(self, kek: StoredKek, plaintext: SecretKey) -> None:
        """Keep a KEK that was just made. Takes ownership of `plaintext`."""
        if self._closed:
            plaintext.wipe()
            return
        self._keks.put(kek.project_id, kek.kek_version, AeadKey(plaintext))

    async def generate(
        self, entry: ProjectEntry, objects: Sequence[ObjectName], held: WorkingSet
    ) -> list[tuple[SecretKey, Envelope]]:
        """A new DEK for each object, in `held`.

        Raises KeyAccessError when the project is or gets stopped, UnavailableError when the KMS is needed and fails,
        ConflictError when the KEK is used up.
        """
        epoch, kek = entry.epoch, entry.current_kek
        entry.check()
        await self._reserve(entry, kek, len(objects))
        cipher = await self._cipher(entry, kek)
        made: list[tuple[SecretKey, Envelope]] = []
        for start in range(0, len(objects), SLICE):
            async with self.turn:
                entry.check(epoch)
                for name in objects[start : start + SLICE]:
                    context = entry.scope.object_context(name.timeline_id, name.object_name, name.kind)
                    dek = held.add(SecretKey.generate())
                    made.append((dek, wrap_dek(cipher, kek.kek_id, kek.kek_version, dek, context)))
        entry.check(epoch)
        return made

    async def unwrap(
        self, entry: ProjectEntry, items: Sequence[WrappedObject], held: WorkingSet
    ) -> list[tuple[SecretKey, Envelope]]:
        """The DEKs of these envelopes, in `held`.

        Raises KeyAccessError, UnavailableError, IntegrityError (one of them is not what it claims to be; none is
        returned).
        """
        epoch = entry.epoch
        entry.check()
        opened: list[tuple[SecretKey, Envelope]] = []
        for start in range(0, len(items), SLICE):
            part = [(item.object, Envelope.parse(item.envelope)) for item in items[start : start + SLICE]]
            ciphers: dict[int, AeadKey] = {}
            for _, envelope in part:
                kek = entry.keks.get(envelope.kek_version)
                if kek is None or kek.kek_id != envelope.kek_id:
                    raise IntegrityError("the envelope names a KEK that this project does not have")
                if kek.kek_version not in ciphers:
                    ciphers[kek.kek_version] = await self._cipher(entry, kek)
            async with self.turn:
                entry.check(epoch)
                for name, envelope in part:
                    context = entry.scope.object_context(name.timeline_id, name.object_name, name.kind)
                    opened.append((held.add(unwrap_dek(ciphers[envelope.kek_version], envelope, context)), envelope))
        entry.check(epoch)
        return opened

    async def rewrap(self, entry: ProjectEntry, items: Sequence[WrappedObject]) -> list[Envelope]:
        """The DEKs of these envelopes under the current KEK, which is stored. One that is already comes back as it is.

        Raises as `unwrap`; ConflictError when the KEK is used up.
        """
        epoch, kek = entry.epoch, entry.current_kek
        entry.check()
        envelopes = [Envelope.parse(item.envelope) for item in items]
        outdated = sum(envelope.kek_version != kek.kek_version for envelope in envelopes)
        if outdated:
            await self._reserve(entry, kek, outdated)
        cipher = await self._cipher(entry, kek)
        made: list[Envelope] = []
        for start in range(0, len(items), SLICE):
            with self.working(entry.project_id) as held:
                opened = await self.unwrap(entry, items[start : start + SLICE], held)
                async with self.turn:
                    entry.check(epoch)
                    for item, (dek, envelope) in zip(items[start : start + SLICE], opened, strict=True):
                        if envelope.kek_version == kek.kek_version:
                            made.append(envelope)
                            continue
                        if envelope.kek_version > kek.kek_version:
                            raise ConflictError("the KEK was rotated meanwhile: try again")
                        name = item.object
                        context = entry.scope.object_context(name.timeline_id, name.object_name, name.kind)
                        made.append(rewrap_dek(cipher, kek.kek_id, kek.kek_version, dek, envelope, context))
        entry.check(epoch)
        return made

    async def _cipher(self, entry: ProjectEntry, kek: StoredKek) -> AeadKey:
        """The KEK, from memory or from the KMS."""
        key = (entry.project_id, kek.kek_version)
        cipher = self._keks.get(*key)
        if cipher is not None:
            return cipher
        task = self._unwrapping.get(key)
        if task is None:
            task = asyncio.create_task(self._unwrap_kek(entry, kek))
            self._unwrapping[key] = task
            task.add_done_callback(lambda done: self._unwrapped(key, done))
        return await asyncio.shield(task)  # one impatient caller does not take it away from the others

    def _unwrapped(self, key: _Kek, task: asyncio.Task[AeadKey]) -> None:
        self._unwrapping.pop(key, None)
        if not task.cancelled():
            task.exception()  # retrieved: whoever waited may be gone

    async def _unwrap_kek(self, entry: ProjectEntry, kek: StoredKek) -> AeadKey:
        epoch = entry.epoch
        # Its row of now, not of when it was asked for: another CMK may have wrapped it since, or it was destroyed.
        kek = entry.keks[kek.kek_version]
        if kek.wrapped is None:
            entry.check()
            raise IntegrityError("this KEK was destroyed")
        context = kek_context(entry.scope, kek.kek_id, kek.kek_version)
        with self.working(entry.project_id, keks=True) as held, calls_made() as calls:
            try:
                plaintext = held.add(await self._cmks.of(entry.key_configuration_id).unwrap(kek.wrapped, context))
            except KmsError as error:
                self._suspect(entry.key_configuration_id)
                await self._audit_log.record(self._kek_entry(entry, kek, "failed", call_details(calls)))
                why = self._cmks.explain(entry.key_configuration_id, error)
                raise UnavailableError(f"the project's key could not be unwrapped: {why}") from None
            canary = await self._canary_of(entry, kek, plaintext, call_details(calls))
            now = self._clock.now()
            await self._repository.note_unwrap(entry.project_id, kek.kek_version, now, canary)
            await self._audit_log.record(self._kek_entry(entry, kek, "ok", call_details(calls)))
            entry.check(epoch)  # Invariant: no KEK enters memory after its project was stopped, or after `close`
            if self._closed:
                raise UnavailableError("this keymanager has stopped")
            if entry.keks[kek.kek_version].wrapped is None:
                raise IntegrityError("this KEK was destroyed")
            cipher = AeadKey(held.release(plaintext))
        self._keks.put(entry.project_id, kek.kek_version, cipher)
        entry.keks[kek.kek_version] = replace(entry.keks[kek.kek_version], last_unwrap_at=now, canary=canary)
        return cipher

    async def _canary_of(
        self, entry: ProjectEntry, kek: StoredKek, plaintext: SecretKey, details: dict[str, str]
    ) -> bytes | None:
        """The one that is kept, which this KEK opens, or a new one; None for a KEK that was wiped as it arrived.
        Raises IntegrityError, UnavailableError."""
        if plaintext.wiped:
            return kek.canary
        cipher = AeadKey(plaintext)
        if kek.canary is None:
            return make_canary(cipher, entry.scope, kek.kek_id, kek.kek_version)
        if opens(cipher, entry.scope, kek.canary):
            return kek.canary
        await self._audit_log.record(self._kek_entry(entry, kek, "failed", details))
        raise IntegrityError("the KMS unwrapped another key than the KEK that was made: its row was changed")

    async def scan(self, shredded: ProjectEntry, others: Sequence[ProjectEntry]) -> CanaryScan:
        """Try every KEK that is in memory, and every one of `others`, on the canaries of a shredded project."""
        canaries = {version: kek.canary for version, kek in shredded.keks.items() if kek.canary is not None}
        tried: set[_Kek] = set()
        opened: list[str] = []
        not_tried: list[str] = []
        not_live: list[str] = []
        at_once = asyncio.Semaphore(_UNWRAPS_AT_ONCE)

        async def try_one(of: _Kek, cipher: AeadKey) -> None:
            async with self.turn:
                tried.add(of)
                opened.extend(
                    f"version {version} of the KEK is that of version {of[1]} of {of[0]}"
                    for version, canary in canaries.items()
                    if opens(cipher, shredded.scope, canary)
                )

        async def try_stored(other: ProjectEntry, kek: StoredKek) -> None:
            of = other.project_id, kek.kek_version
            try:
                async with at_once:
                    other.check()
                    await try_one(of, await self._cipher(other, kek))
            except (KeyAccessError, KeyWipedError):
                not_live.append(f"version {of[1]} of {of[0]}, which is {other.state}")
            except (UnavailableError, IntegrityError) as error:
                not_tried.append(f"version {of[1]} of {of[0]}: {error}")

        stored = [(other, kek) for other in others for kek in other.keks.values() if kek.wrapped is not None]
        await asyncio.gather(*(try_stored(other, kek) for other, kek in stored))
        for project_id, version, cipher in self._keks.live:
            if (project_id, version) not in tried:
                with suppress(KeyWipedError):
                    await try_one((project_id, version), cipher)
        missing = tuple(sorted(shredded.keks.keys() - canaries.keys()))
        return CanaryScan(len(canaries), missing, len(tried), tuple(opened), tuple(not_tried), tuple(not_live))

    @staticmethod
    def _kek_entry(entry: ProjectEntry, kek: StoredKek, outcome: str, details: dict[str, str]) -> AuditEntry:
        details = {"kek_version": str(kek.kek_version), **details}
        return AuditEntry("keymanager", "kek.unwrap", outcome, entry.project_id, details)

    async def _reserve(self, entry: ProjectEntry, kek: StoredKek, wraps: int) -> None:
        """Count wraps before they are made. Raises ConflictError at the limit of limits.py."""
        key = (entry.project_id, kek.kek_version)
        lock = self._reserving.setdefault(key, asyncio.Lock())
        async with lock:
            left = self._allowance.get(key, 0)
            if left < wraps:
                if entry.keks[kek.kek_version].wraps_reserved + WRAP_BLOCK > MAX_WRAPS_PER_KEK:
                    raise ConflictError("the KEK has reached its usage limit: rotate the project's KEK")
                total = await self._repository.reserve_wraps(entry.project_id, kek.kek_version, WRAP_BLOCK)
                entry.keks[kek.kek_version] = replace(entry.keks[kek.kek_version], wraps_reserved=total)
                left += WRAP_BLOCK
            self._allowance[key] = left - wraps
            self._allowance.move_to_end(key)
            if len(self._allowance) > self._limits.kek_entries:
                self._allowance.popitem(last=False)
