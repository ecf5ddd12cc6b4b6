"""Keys of one project on a pageserver: its timelines' upkeep, and a count of everything that is in the object store."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol

from pageserver.key_upkeep import KnownKeys, TimelineKeys
from shared.crypto.envelope import Envelope
from shared.errors import UnavailableError
from shared.ids import ProjectId, TimelineId
from shared.key_upkeep import Pace, UseCounter
from shared.lease import Lease
from shared.old_versions import OldVersions, timeline_of
from shared.storage.base import ObjectNotFoundError, ObjectStore

_ENVELOPE_SUFFIX = ".key"


class _Holder(Protocol):
    """What tenants know of a project."""

    project_id: ProjectId
    lease: Lease | None
    changing: asyncio.Lock
    """Held while a timeline is made."""

    def timeline_keys(self) -> Mapping[TimelineId, TimelineKeys]: ...


class ProjectKeys:
    """Implements `UpkeepProject`."""

    def __init__(self, holder: _Holder, store: ObjectStore) -> None:
        self._holder = holder
        self._store = store

    @property
    def project_id(self) -> ProjectId:
        return self._holder.project_id

    @property
    def lease(self) -> Lease | None:
        return self._holder.lease

    async def rewrap(self, kek_version: int, pace: Pace) -> None:
        for keys in list(self._holder.timeline_keys().values()):
            await keys.rewrap(kek_version, pace)

    async def rekey(self, dek_floor: int, pace: Pace) -> None:
        for keys in list(self._holder.timeline_keys().values()):
            await keys.rekey(dek_floor, pace)

    async def census(self) -> dict[TimelineId, UseCounter]:
        """By a listing: layers, orphans, every slot of the index, what timelines left that never came to be; and old
        versions of all that, and of what was deleted.

        Raises UnavailableError for a timeline that is stored and not loaded: what it is about to write is not known.
        """
        async with self._holder.changing:
            known = {timeline_id: await keys.known() for timeline_id, keys in self._holder.timeline_keys().items()}
        found: dict[TimelineId, dict[str, int]] = {timeline_id: {} for timeline_id in known}
        async for info in self._store.list(self._prefix):
            name = info.key.removeprefix(self._prefix)
            timeline_id, rest = timeline_of(name), name.partition("/")[2]
            if timeline_id not in known and rest.startswith("index/"):
                raise UnavailableError(f"{timeline_id} is in the object store and not loaded here")
            objects = found.setdefault(timeline_id, {})
            if info.key.endswith(_ENVELOPE_SUFFIX):
                objects.setdefault(info.key.removesuffix(_ENVELOPE_SUFFIX), 0)
            else:
                objects[info.key] = info.size_bytes
        counters = {
            timeline_id: await self._count(objects, known.get(timeline_id)) for timeline_id, objects in found.items()
        }
        await self._old_versions.count(counters, shared=False)
        return counters

    async def remove_old_versions(self, kek_version: int, dek_floor: int) -> list[str]:
        return await self._old_versions.remove(kek_version, dek_floor)

    @property
    def _old_versions(self) -> OldVersions:
        return OldVersions(self._store, self._prefix)

    @property
    def _prefix(self) -> str:
        return f"projects/{self.project_id}/timelines/"

    async def _count(self, objects: Mapping[str, int], known: KnownKeys | None) -> UseCounter:
        counter = UseCounter()
        envelopes = {} if known is None else known.envelopes
        for key, envelope in envelopes.items():
            counter.add(envelope, objects.get(key, 0))
        for key, size_bytes in objects.items():
            if key not in envelopes:
                beside = await self._stored(key)
                if beside is not None:
                    counter.add(beside, size_bytes)
        if known is not None and known.under_way is not None:
            counter.add(known.under_way, 0)
        return counter

    async def _stored(self, object_key: str) -> Envelope | None:
        """None: there is none, so nobody can open the object."""
        try:
            return Envelope.parse(await self._store.get(object_key + _ENVELOPE_SUFFIX))
        except ObjectNotFoundError:
            return None
